"""One trial: the runs that a configuration needs, and the values that they come to."""

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

from glua_bench.config import assignment
from glua_bench.console import Progress
from glua_bench.errors import RunFailure, complaint
from glua_bench.runs import execution, interruption
from glua_bench.runs.executor import ATTEMPTS, child_command, running
from glua_bench.runs.plan import PlannedRun, build_method, plan
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.sweeps.definition import Definition

WAIT_SECONDS = 0.2  # between looks at the processes of a run

See = Callable[[int, float], bool]
Begin = Callable[[list[str]], None]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        values: one for each objective: quality (larger is better), then costs.
        facts: run ids, and the quality of each run under "direction, seed N".
    """

    values: tuple[float, ...]
    facts: Mapping[str, Any]


class Pruned(execution.Stopped):
    """A trial was ended early.

    Args:
        facts: as of an `Outcome`, of the runs that were finished before.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.facts = facts


def requests(
    definition: Definition, base: RunOptions, params: Mapping[str, Any]
) -> list[RunRequest]:
    """The runs of a configuration: every direction with every seed, in a fixed order.

    Args:
        definition: of the sweep.
        base: what all runs share beyond the definition (directories, devices, plugins).
        params: setting → value.
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
            assignments=[*base.assignments, *definition.settings, *chosen],
        )
        for seed in range(definition.seeds)
        for direction in definition.directions
    ]


def execute(
    definition: Definition,
    base: RunOptions,
    params: Mapping[str, Any],
    progress: Progress,
    see: See,
    begin: Begin = lambda ids: None,
) -> Outcome:
    """Run what a configuration needs; what is done already is read.

    Args:
        definition: of the sweep.
        base: what all runs share.
        params: setting → value.
        progress: what the user sees.
        see: told an intermediate step and value; returns whether the trial should end.
        begin: told the ids of the trial's runs so far when one more begins.

    Returns:
        The values: of quality the mean over the runs, each at the checkpoint that the objective
        chooses.

    Raises:
        Pruned: `see` asked for the end.
        UserError: the configuration is refused.
        RunFailure: a run failed, or the objective can judge none of its checkpoints.
    """
    qualities: dict[str, float] = {}
    seconds: list[float] = []
    ids: list[str] = []
    for request in requests(definition, base, params):
        planned = plan(request)
        ids.append(planned.id)
        begin(list(ids))  # so that a run that fails is known as this trial's
        known = list(qualities.values())

        def watched(
            step: int, score: float, known: list[float] = known, run: PlannedRun = planned
        ) -> None:
            # The mean of what is known by now, at a position that all trials pass alike.
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
        own = {s.name for s in planned_stages(planned) if s.depends_on is None}
        seconds.append(sum(v for k, v in summary["stage_seconds"].items() if k in own))
        if definition.pruner == "wilcoxon" and see(len(ids) - 1, quality):
            raise Pruned({"runs": ids, "qualities": qualities})
    mean = sum(qualities.values()) / len(qualities)
    costs = {"seconds": sum(seconds) / len(seconds)}
    values = (mean, *(costs[name] for name in definition.objectives[1:]))
    return Outcome(values, {"runs": ids, "qualities": qualities})


def execute_apart(
    planned: PlannedRun,
    progress: Progress,
    start: Callable[..., subprocess.Popen] = subprocess.Popen,
) -> None:
    """Run as `glua-bench run` does, in processes of its own.

    Fabric starts the further processes of a run by the command line of the first one, so that one
    must be `run` and not `worker`.

    Args:
        planned: the run, with several devices.
        progress: told where it begins.
        start: starts a process.

    Raises:
        RunFailure: the run failed, or its processes were killed again and again.
        Interrupted: this process was asked to end; the run has written its checkpoint.
    """
    devices = planned.request.devices
    changed = dict(os.environ)
    changed["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // devices))
    for _ in range(ATTEMPTS):
        while running(planned):  # processes of a killed worker go on with it
            interruption.end_if_asked()
            time.sleep(WAIT_SECONDS)
        if planned.directory.done:
            return
        progress.line(f"run {planned.id} begins in {devices} processes")
        with tempfile.TemporaryFile("w+") as errors:
            process = start(
                child_command(planned),
                env=changed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
            code = _wait(process)
            errors.seek(0)
            said = errors.read()
        if planned.directory.done:
            return
        interruption.end_if_asked()
        if 0 < code < 128:
            raise RunFailure(planned.directory.failed or complaint(said))
    raise RunFailure(
        f"The processes of {planned.directory.path} were killed {ATTEMPTS} times; look for a lack "
        "of memory, and give the same command again."
    )


def _wait(process: subprocess.Popen) -> int:
    """Wait for a run, and pass on that this process was asked to end; its exit code."""
    told = False
    try:
        while process.poll() is None:
            if interruption.asked() and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(WAIT_SECONDS)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    return int(process.returncode)


def planned_stages(planned: PlannedRun) -> tuple:
    """The stages of a planned run's method."""
    structures = planned.dataset.structures
    method = build_method(planned.config, structures, planned.method_class)
    return tuple(method.stages())


def best(summary: Mapping[str, Any], selector: str, place: Any) -> float:
    """The score of the checkpoint that a selector chose.

    Raises:
        RunFailure: it could judge none.
    """
    scores = summary["selector_scores"].get(selector, {})
    values = [float(v) for v in scores.values() if not math.isnan(float(v))]
    if not values:
        raise RunFailure(
            f"'{selector}' could judge no checkpoint of {place}; use an objective that has what it "
            "needs (`glua-bench list selectors`)."
        )
    return max(values)
