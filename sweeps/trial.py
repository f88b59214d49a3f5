"""Run the trials of a sweep and compute their values."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glua_bench.config import DEFAULT_SELECTORS, ORACLE, assignment
from glua_bench.console import Progress
from glua_bench.errors import ConfigError, RunFailure, complaint
from glua_bench.runs import execution, interruption
from glua_bench.runs.executor import ATTEMPTS, child_command, running
from glua_bench.runs.plan import PlannedRun, plan
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.sweeps.definition import Definition

WAIT_SECONDS = 0.2  # between checks of the processes of a run

See = Callable[[int, float], bool]
Begin = Callable[[list[str]], None]


@dataclass(frozen=True)
class Outcome:
    """Result of a trial.

    Attributes:
        values: one per objective: quality (larger is better), then costs.
        facts: run ids, the quality of each run under "direction, seed N", and the number of runs
            that were finished before, if any.
    """

    values: tuple[float, ...]
    facts: Mapping[str, Any]


class Pruned(execution.Stopped):
    """A trial was pruned.

    Args:
        facts: as in `Outcome`, for the runs that had finished.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.facts = facts


def requests(
    definition: Definition, base: RunOptions, params: Mapping[str, Any]
) -> list[RunRequest]:
    """Return the runs of a configuration: every direction with every seed, in a fixed order.

    Args:
        definition: the sweep.
        base: options shared by all runs (directories, devices, plugins).
        params: setting → value.

    Raises:
        ConfigError: --selectors lacks the objective.
    """
    chosen = [assignment(f"method.{name}", value) for name, value in params.items()]
    return [
        base.request(
            method=definition.method,
            dataset=definition.dataset,
            fold=definition.fold,
            direction=direction,
            preset=definition.preset,
            seed=seed,
            selectors=with_objective(base.selectors, definition.selector),
            assignments=[*base.assignments, *definition.settings, *chosen],
        )
        for seed in range(definition.seeds)
        for direction in definition.directions
    ]


def with_objective(selectors: str | None, objective: str) -> str | None:
    """Return the text of --selectors with which the runs of a sweep evaluate its objective.

    Args:
        selectors: as given; None is the default, to which the objective is added.
        objective: a selector, or the oracle.

    Raises:
        ConfigError: other selectors are given.
    """
    names = ",".join(DEFAULT_SELECTORS) if selectors is None else selectors
    known = {name.strip() for name in names.split(",")}
    if objective == ORACLE or known & {objective, "all"}:
        return selectors
    if selectors is None:
        return f"{names},{objective}"
    raise ConfigError(
        f"--selectors {selectors} lacks the objective of the sweep; add '{objective}' to it."
    )


def execute(
    definition: Definition,
    base: RunOptions,
    params: Mapping[str, Any],
    progress: Progress,
    see: See,
    begin: Begin = lambda ids: None,
) -> Outcome:
    """Execute the runs of a configuration; finished runs are reused.

    Args:
        definition: the sweep.
        base: options shared by all runs.
        params: setting → value.
        progress: progress output.
        see: receives an intermediate step and value; returns True to prune the trial.
        begin: receives the ids of the trial's runs before each run.

    Returns:
        The trial's values; quality is the mean over runs, each at the checkpoint that the objective
        chooses.

    Raises:
        Pruned: `see` returned True.
        UserError: the configuration is invalid.
        RunFailure: a run failed, or the objective scores none of its checkpoints.
    """
    qualities: dict[str, float] = {}
    seconds: list[float] = []
    ids: list[str] = []
    reused = 0
    for request in requests(definition, base, params):
        planned = plan(request)
        ids.append(planned.id)
        reused += planned.directory.done
        if problem := planned.directory.problem:
            progress.line(f"{planned.directory.path} is damaged ({problem}): trained again")
        begin(list(ids))  # before the run, so that a failed one is known
        known = list(qualities.values())

        def watched(
            step: int, score: float, known: list[float] = known, run: PlannedRun = planned
        ) -> None:
            # Mean so far, at a step that is comparable between trials.
            steps = len(known) * run.config.candidates
            place = steps + math.ceil(step * run.config.candidates / run.config.steps)
            mean = (sum(known) + score) / (len(known) + 1)
            if math.isfinite(mean) and see(place, mean):
                raise execution.Stopped

        pruned = definition.pruner in ("median", "hyperband")
        watch = execution.Watch(definition.selector, watched) if pruned else None
        try:
            if base.devices > 1:
                execute_apart(planned, progress)
            else:
                execution.execute(planned, progress, watch=watch)
        except execution.Stopped as stopped:
            raise Pruned({"runs": ids[:-1], "qualities": qualities}) from stopped
        summary = planned.directory.read_summary()
        quality = best(summary, definition.selector, planned.directory.path)
        key = f"{request.direction}, seed {request.seed}"
        qualities[key] = quality
        own = {s.name for s in planned.build().stages() if s.depends_on is None}
        seconds.append(sum(v for k, v in summary["stage_seconds"].items() if k in own))
        if definition.pruner == "wilcoxon" and see(len(ids) - 1, quality):
            raise Pruned({"runs": ids, "qualities": qualities})
    mean = sum(qualities.values()) / len(qualities)
    costs = {"seconds": sum(seconds) / len(seconds)}
    values = (mean, *(costs[name] for name in definition.objectives[1:]))
    facts = {"runs": ids, "qualities": qualities, **({"reused": reused} if reused else {})}
    return Outcome(values, facts)


def execute_apart(
    planned: PlannedRun,
    progress: Progress,
    start: Callable[..., subprocess.Popen] = subprocess.Popen,
) -> None:
    """Execute a run in separate processes, as `glua-bench run` does.

    Fabric starts further processes with the command line of the first one, which must be that of
    the run and not of the worker.

    Args:
        planned: a run with several devices.
        progress: progress output.
        start: starts a process.

    Raises:
        RunFailure: the run failed, or its processes were killed repeatedly.
        Interrupted: this process was stopped; the run has written its checkpoint.
    """
    devices = planned.request.devices
    changed = dict(os.environ)
    changed["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // devices))
    for _ in range(ATTEMPTS):
        while running(planned):  # processes of a killed worker continue
            interruption.end_if_asked()
            time.sleep(WAIT_SECONDS)
        if planned.directory.done:
            return
        progress.line(f"run {planned.id} starts in {devices} processes")
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = start(
                child_command(planned),
                env=changed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # only this process receives Ctrl-C, and forwards it
            )
            code = _wait(process)
            errors.seek(0)
            output = errors.read()
        if planned.directory.done:
            return
        interruption.end_if_asked()
        if 0 < code < 128:
            raise RunFailure(planned.directory.failed or complaint(output))
    raise RunFailure(
        f"The processes of {planned.directory.path} were killed {ATTEMPTS} times; check the "
        "memory, and repeat the command."
    )


def _wait(process: subprocess.Popen) -> int:
    """Wait for a run, forward a request to stop, and return the exit code."""
    forwarded = False
    try:
        while process.poll() is None:
            if interruption.asked() and not forwarded:
                process.send_signal(signal.SIGTERM)
                forwarded = True
            time.sleep(WAIT_SECONDS)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    return int(process.returncode)


def best(summary: Mapping[str, Any], selector: str, place: Any) -> float:
    """Return the score of the checkpoint that a selector chose.

    Raises:
        RunFailure: it scored no checkpoint.
    """
    scores = summary["selector_scores"].get(selector, {})
    values = [float(v) for v in scores.values() if not math.isnan(float(v))]
    if not values:
        raise RunFailure(
            f"'{selector}' scored no checkpoint of {place}; use an objective whose requirements "
            "are met (`glua-bench list selectors`)."
        )
    return max(values)
