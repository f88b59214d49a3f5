"""What the commands `sweep` and `worker` do: open a study, work on it, say what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from glua_bench import console
from glua_bench.config import ORACLE, assignment
from glua_bench.console import Progress, duration
from glua_bench.errors import ConfigError, without_password
from glua_bench.files import write_json, write_text
from glua_bench.runs import execution
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunOptions
from glua_bench.sweeps import definition as definitions
from glua_bench.sweeps.definition import Definition
from glua_bench.sweeps.launch import Crew
from glua_bench.sweeps.progress import Display, Tracked, shown
from glua_bench.sweeps.results import chosen_trial
from glua_bench.sweeps.slurm import Jobs, Resources
from glua_bench.sweeps.study import (
    Claim,
    SweepStudy,
    counting,
    folder_of,
    free_name,
)
from glua_bench.sweeps.trial import Outcome, See, execute, requests
from glua_bench.sweeps.worker import Done, work

STORAGE_VARIABLE = "GLUA_BENCH_STORAGE"  # what stands for --storage
OWN = ("runs_root", "plugins")  # of the options, what each machine may name otherwise


def open_study(
    definition: Definition,
    base: RunOptions,
    storage: str | None,
    workers: int,
    fork: bool,
    resume: bool,
    report: Callable[[str], None],
) -> SweepStudy:
    """The study of a definition, new or going on.

    Args:
        definition: of the sweep.
        base: what all runs share beyond it.
        storage: path or URL; None takes the journal.
        workers: how many will use the storage.
        fork: begin a new study beside the one that is there.
        resume: it must have begun.
        report: receives what the user should know.

    Raises:
        ConfigError: the study began with another definition, or there is none to resume.
    """
    if base.devices > 1 and definition.pruner in ("median", "hyperband"):
        raise ConfigError(
            f"--devices {base.devices}: {definition.pruner} looks at the checkpoints of a run "
            "while it trains, which works with one process; use pruner: none or wilcoxon, or one "
            "device."
        )
    name = free_name(base.runs_root, definition.name) if fork else definition.name
    if resume and not folder_of(base.runs_root, name).is_dir():
        raise ConfigError(
            f"There is no sweep '{name}' in {base.runs_root} to resume; leave --resume out, or "
            "name its directory by --runs."
        )
    # Before anything is written, so that what cannot run leaves no study behind.
    for request in requests(definition, base, first_values(definition)):
        planned = plan(request, report)
    copy = folder_of(base.runs_root, name) / "definition.json"
    if copy.is_file():
        _same_storage(json.loads(copy.read_text(encoding="utf-8")), storage, name)
    study = SweepStudy(definition, base.runs_root, storage, name, report, workers)
    study.remember(
        {
            **definition.meaning(),
            "name": name,
            "request": {k: v for k, v in json.loads(base.to_json()).items() if k not in OWN},
            "code": planned.code,
        }
    )
    told = {**asdict(definition), "file": str(definition.file)}
    told["storage"] = None if storage is None else without_password(storage)
    # A worker may begin in another directory.
    named = replace(base, plugins=[file.absolute() for file in base.plugins])
    write_text(copy.with_name("request.json"), named.to_json(), "--runs")
    write_json(copy, told, "--runs")
    return study


def _same_storage(told: dict[str, Any], storage: str | None, name: str) -> None:
    """Refuse to begin again in the journal what was begun in a database.

    Raises:
        ConfigError: the sweep began with a storage, and none is given.
    """
    known = told.pop("storage", None)
    if known is not None and storage is None:
        raise ConfigError(
            f"The sweep '{name}' keeps its trials in {known}; give that by --storage or in "
            "GLUA_BENCH_STORAGE."
        )


def described(definition: Definition) -> list[str]:
    """The sweep in two lines."""
    searched = ", ".join(_range(parameter) for parameter in definition.space)
    judged = " and ".join(definition.objectives)
    stamp = ", ORACLE (reads target labels)" if definition.selector == ORACLE else ""
    return [
        f"sweep {definition.name}: {definition.method} on {definition.fold_name} "
        f"{', '.join(definition.directions)}, preset {definition.preset}, "
        f"{definition.seeds} seed{'s' if definition.seeds > 1 else ''} a trial{stamp}",
        f"{definition.trials} trials by {definition.sampler}, judged by {judged}: {searched}",
    ]


def _range(parameter: definitions.Parameter) -> str:
    if parameter.choices:
        return f"{parameter.name} of {', '.join(map(str, parameter.choices))}"
    log = " (log)" if parameter.log else ""
    return f"{parameter.name} from {parameter.low:g} to {parameter.high:g}{log}"


def planned(
    definition: Definition, base: RunOptions, workers: int, report: Callable[[str], None]
) -> list[str]:
    """What a sweep would cost, from a few steps on the real data."""
    ready = [
        plan(request, report) for request in requests(definition, base, first_values(definition))
    ]
    seconds = execution.estimate(ready[0]) * len(ready) * definition.trials
    return [
        f"{definition.trials * len(ready)} runs, at most about {duration(seconds / workers)} of "
        f"training with --workers {workers}; stages that trials share are trained once"
    ]


def first_values(definition: Definition) -> dict[str, Any]:
    """One configuration of the space."""
    return {
        p.name: p.choices[0] if p.choices else int(p.low) if p.whole else p.low
        for p in definition.space
    }


def join(
    name: str, runs_root: Path, storage: str | None, plugins: list[Path], report: Any
) -> tuple[SweepStudy, RunOptions]:
    """A study that `sweep` has begun, for a worker anywhere.

    Raises:
        ConfigError: there is none of that name.
    """
    folder = folder_of(runs_root, name)
    try:
        told = json.loads((folder / "definition.json").read_text(encoding="utf-8"))
        request = (folder / "request.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no sweep '{name}' in {runs_root}; begin it by `glua-bench sweep`, or name "
            "the directory of its runs by --runs."
        ) from error
    base = RunOptions.from_json(request, folder / "request.json")
    _same_storage(told, storage, name)
    space = tuple(
        definitions.Parameter(**{**p, "choices": tuple(p["choices"])}) for p in told.pop("space")
    )
    lists = ("directions", "settings", "objectives")
    definition = Definition(
        **{**told, "file": Path(told["file"]), **{key: tuple(told[key]) for key in lists}},
        space=space,
    )
    study = SweepStudy(definition, runs_root, storage, name, report, begun=True)
    return study, replace(base, runs_root=runs_root, plugins=plugins or base.plugins)


def run_worker(
    study: SweepStudy, base: RunOptions, report: Callable[[str], None], progress: Progress
) -> Done:
    """Take trials until there is none."""

    def run(claim: Claim, see: See) -> Outcome:
        def begin(ids: list[str]) -> None:
            study.note(claim, {"runs": ids})

        return execute(study.definition, base, claim.params, progress, see, begin)

    return work(study, run, report)


def run_crew(
    study: SweepStudy, base: RunOptions, storage: str | None, workers: int, stream: Any
) -> None:
    """Start workers on this machine, and show what they do until the study is finished."""
    if study.ended:
        return
    words = ["worker", "--study", study.name, "--runs", str(base.runs_root)]
    with _inherited(storage), _shown(study, base, workers, stream) as show:
        Crew(study, words, workers, show, base.devices).run()


def run_jobs(
    study: SweepStudy,
    base: RunOptions,
    storage: str | None,
    workers: int,
    resources: Resources,
    detach: bool,
    stream: Any,
    report: Callable[[str], None],
) -> bool:
    """Submit workers to SLURM; unless detached, show what they do until the study is finished.

    Returns:
        Whether the study is finished.
    """
    if study.ended:
        return True
    # A job begins in the directory of this command, but what is shared is named as a whole.
    words = ["worker", "--study", study.name, "--runs", str(base.runs_root.absolute())]
    with _inherited(storage):
        jobs = Jobs(study, words, workers, resources, report=report)
        if detach:
            jobs.begin()
            return False
        with _shown(study, base, workers, stream) as jobs.show:
            jobs.run()
    return True


@contextmanager
def _shown(
    study: SweepStudy, base: RunOptions, workers: int, stream: Any
) -> Iterator[Callable[[], None]]:
    """What shows the sweep on the terminal and, if the user wants it, in the tracker."""
    tracked = Tracked(study, base.runs_root) if base.mlflow else None
    with tracked or nullcontext(), Display(study.definition, workers, stream) as display:

        def show() -> None:
            trials = study.trials()
            display.show(trials)
            if tracked is not None:
                tracked.look(trials)

        yield show


@contextmanager
def _inherited(storage: str | None) -> Iterator[None]:
    """Tell workers the storage by their environment: all users of a machine see its commands."""
    if storage is None:
        yield
        return
    told = storage if "://" in storage else str(Path(storage).absolute())
    before = os.environ.get(STORAGE_VARIABLE)
    os.environ[STORAGE_VARIABLE] = told
    try:
        yield
    finally:
        del os.environ[STORAGE_VARIABLE]
        if before is not None:
            os.environ[STORAGE_VARIABLE] = before


def conclude(study: SweepStudy) -> list[str]:
    """What a sweep found, in lines."""
    trials = counting(study.trials())
    complete = [t for t in trials if t.values]
    objectives = study.definition.objectives
    stamp = " (ORACLE: chosen by labels of test cases, no result)" if ORACLE in objectives else ""
    if not complete:
        return [f"No trial of '{study.name}' has a value{_why_none(trials)}."]
    if len(objectives) > 1:
        front = sorted(study.study.best_trials, key=lambda t: -t.values[0])
        named = ", ".join(objectives)
        lines = [f"{len(front)} configurations on the Pareto front of {named}{stamp}:"]
        for trial in front:
            values = " ".join(f"{value:.4g}" for value in trial.values)
            lines.append(f"  {values}  {shown(trial.params)}")
        return lines
    chosen = max(complete, key=lambda t: t.values[0])
    own = [assignment(f"method.{name}", value) for name, value in chosen.params.items()]
    options = RunOptions(assignments=[*study.definition.method_settings, *own])
    return [
        f"Chosen by {objectives[0]}{stamp}: {shown(chosen.params)} "
        f"({objectives[0]} {chosen.values[0]:.4g}, trial {chosen.number} of {len(trials)})",
        f"Use it: {console.next_command(*options.words())}",
    ]


def has_value(study: SweepStudy) -> bool:
    """Whether any trial came to something."""
    return chosen_trial(counting(study.trials())) is not None


def _why_none(trials: list[FrozenTrial]) -> str:
    """The reason of the last failure, as the end of a sentence."""
    reasons = [str(t.user_attrs["reason"]) for t in trials if "reason" in t.user_attrs]
    return f"; the last one failed: {reasons[-1].rstrip('.')}" if reasons else ""


def next_command(study: SweepStudy, base: RunOptions) -> str:
    """The command that tries what was chosen with a seed that the search has not used."""
    definition, chosen = study.definition, chosen_trial(counting(study.trials()))
    if chosen is None:
        return "repair what the trials fail by, and the same command with --fork"
    request = replace(requests(definition, base, chosen.params)[0], seed=definition.seeds)
    return console.next_command("glua-bench", "run", *request.words())
