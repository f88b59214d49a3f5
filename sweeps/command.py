"""The commands `sweep` and `worker`: open a study, work on it, and report the result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glua_bench import console
from glua_bench.config import ORACLE, assignment
from glua_bench.console import Progress, duration
from glua_bench.documents import load_json
from glua_bench.errors import ConfigError, without_password
from glua_bench.files import write_json, write_text
from glua_bench.method import Stage
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunOptions
from glua_bench.runs.timing.estimate import Estimator, breakdown
from glua_bench.runs.timing.parts import SLICES, total
from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.launch import Crew
from glua_bench.sweeps.progress import Display, Tracked, shown
from glua_bench.sweeps.results import chosen_trial, values_in_words
from glua_bench.sweeps.slurm import Jobs, Resources
from glua_bench.sweeps.study import (
    Claim,
    SweepStudy,
    counting,
    differences,
    folder_of,
    free_name,
)
from glua_bench.sweeps.trial import Outcome, See, execute, requests
from glua_bench.sweeps.worker import Done, work

STORAGE_VARIABLE = "GLUA_BENCH_STORAGE"  # default of --storage
OWN = ("runs_root", "plugins")  # options that may differ between machines


def open_study(
    definition: Definition,
    base: RunOptions,
    storage: str | None,
    workers: int,
    fork: bool,
    resume: bool,
    report: Callable[[str], None],
) -> SweepStudy:
    """Open the study of a definition, new or existing.

    Args:
        definition: the sweep.
        base: options shared by all runs.
        storage: path or URL; None uses the journal.
        workers: expected number of workers.
        fork: start a new study beside the existing one.
        resume: require an existing study.
        report: receives messages for the user.

    Raises:
        ConfigError: the study was started with another definition, or there is none to resume.
    """
    if base.devices > 1 and definition.pruner in ("median", "hyperband"):
        raise ConfigError(
            f"--devices {base.devices}: {definition.pruner} reads the checkpoints of a run during "
            "training, which needs a single process; use pruner: none or wilcoxon, or one device."
        )
    name = free_name(base.runs_root, definition.name) if fork else definition.name
    if resume and not folder_of(base.runs_root, name).is_dir():
        raise ConfigError(
            f"There is no sweep '{name}' in {base.runs_root} to resume; omit --resume, or give "
            "its directory with --runs."
        )
    # Checked before anything is written, so that an invalid sweep leaves no study behind.
    for request in requests(definition, base, first_values(definition)):
        planned = plan(request, report)
    copy = folder_of(base.runs_root, name) / "definition.json"
    if copy.is_file():
        with suppress(ValueError):  # damaged; it is written again below
            _check_storage(load_json(copy.read_text(encoding="utf-8")), storage, name)
    study = SweepStudy(definition, base.runs_root, storage, name, report, workers)
    study.remember(
        {
            **_identity(definition, base, name),
            "code": planned.code,
        }
    )
    content = {**asdict(definition), "file": str(definition.file)}
    content["storage"] = storage and without_password(storage, whole=True)
    # A worker may start in another directory.
    absolute = replace(base, plugins=[file.absolute() for file in base.plugins])
    write_text(copy.with_name("request.json"), absolute.to_json(), "--runs")
    write_json(copy, content, "--runs")
    return study


def _identity(definition: Definition, base: RunOptions, name: str) -> dict[str, Any]:
    """Return what the files of a sweep say and its study remembers."""
    options = {k: v for k, v in json.loads(base.to_json()).items() if k not in OWN}
    return {**definition.meaning(), "name": name, "request": options}


def _check_storage(content: dict[str, Any], storage: str | None, name: str) -> None:
    """Remove the storage from a stored definition; reject a journal if the study has a database."""
    known = content.pop("storage", None)
    if known is not None and storage is None:
        raise ConfigError(
            f"The sweep '{name}' stores its trials in {known}; give it with --storage or in "
            f"{STORAGE_VARIABLE}."
        )


def described(definition: Definition) -> list[str]:
    """Describe the sweep in a few lines."""
    stamp = ", ORACLE (reads target labels)" if definition.selector == ORACLE else ""
    return [
        f"sweep {definition.name}: {definition.method} on {definition.fold_name} "
        f"{', '.join(definition.directions)}, preset {definition.preset}, "
        f"{definition.seeds} seed{'s' if definition.seeds > 1 else ''} per trial{stamp}",
        f"{definition.trials} trials, sampler {definition.sampler}, objective "
        f"{' and '.join(definition.objectives)}",
        *(f"  {parameter.name}: {values_in_words(parameter)}" for parameter in definition.space),
    ]


def planned(
    definition: Definition, base: RunOptions, workers: int, report: Callable[[str], None]
) -> list[str]:
    """Estimate the cost of a sweep with all its parts; it has no figures."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    estimator = Estimator(threads=threads, report=report)
    first: list[Mapping[str, float]] = []
    later: list[Mapping[str, float]] = []
    for request in requests(definition, base, first_values(definition)):
        run = plan(request, report)
        parts = dict(estimator.of(run).parts)
        first.append(parts)
        shared = {s.name for s in run.build().stages() if _unswept(s, definition)}
        later.append({n: 0.0 if n in (*shared, SLICES) else v for n, v in parts.items()})
    whole = total([*first, *later * (definition.trials - 1)])
    seconds = sum(whole.values()) / workers
    return [
        f"{definition.trials * len(first)} runs, at most about {duration(seconds)} with --workers "
        f"{workers} (in all {breakdown(whole)}); shared stages are trained once"
    ]


def _unswept(stage: Stage, definition: Definition) -> bool:
    """Return True if all trials share the stage."""
    swept = {parameter.name for parameter in definition.space}
    return stage.depends_on is not None and not swept & {*stage.depends_on}


def first_values(definition: Definition) -> dict[str, Any]:
    """Return one configuration of the space."""
    return {
        p.name: p.choices[0] if p.choices else int(p.low) if p.whole else p.low
        for p in definition.space
    }


def join(
    name: str, runs_root: Path, storage: str | None, plugins: list[Path], report: Any
) -> tuple[SweepStudy, RunOptions]:
    """Open an existing study for a worker on any machine.

    Raises:
        ConfigError: there is no such study.
    """
    folder = folder_of(runs_root, name)
    try:
        content = load_json((folder / "definition.json").read_text(encoding="utf-8"))
        request = (folder / "request.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no sweep '{name}' in {runs_root}; start it with `glua-bench sweep`, or "
            "give the directory of its runs with --runs."
        ) from error
    base = RunOptions.from_json(request, folder / "request.json")
    again = "repeat the command of the sweep, which writes it again"
    try:
        _check_storage(content, storage, name)
        space = [Parameter(**{**p, "choices": tuple(p["choices"])}) for p in content["space"]]
        content |= {"file": Path(content["file"]), "space": space}
        names = ("directions", "settings", "space", "objectives")
        definition = Definition(**{**content, **{key: tuple(content[key]) for key in names}})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / 'definition.json'} is damaged; {again}.") from error
    study = SweepStudy(definition, runs_root, storage, name, report, begun=True)
    # The study is what the files are compared with: it is read anyway, and it has no copy.
    known = {key: value for key, value in study.facts.items() if key != "code"}
    told = json.loads(json.dumps(_identity(definition, base, name)))
    if known and (changed := differences(known, told)):
        raise ConfigError(
            f"{folder}/definition.json or request.json is damaged ({'; '.join(changed)}); {again}."
        )
    return study, replace(base, runs_root=runs_root, plugins=plugins or base.plugins)


def run_worker(
    study: SweepStudy, base: RunOptions, report: Callable[[str], None], progress: Progress
) -> Done:
    """Run trials in this process until none is left."""

    def run(claim: Claim, see: See) -> Outcome:
        def begin(ids: list[str]) -> None:
            study.note(claim, {"runs": ids})

        return execute(study.definition, base, claim.params, progress, see, begin)

    return work(study, run, report)


def run_crew(
    study: SweepStudy, base: RunOptions, storage: str | None, workers: int, stream: Any
) -> None:
    """Start workers on this machine, and show their progress until the study is finished."""
    if study.ended:
        return
    words = ["worker", "--study", study.name, "--runs", str(base.runs_root)]
    with _exported(storage), _shown(study, base, workers, stream) as show:
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
    """Submit workers to SLURM; unless detached, show progress until the study is finished.

    Returns:
        True if the study is finished.
    """
    if study.ended:
        return True
    words = ["worker", "--study", study.name, "--runs", str(base.runs_root.absolute())]
    with _exported(storage):
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
    """Yield a function that shows the sweep on the terminal and in the tracker, if enabled."""
    tracked = Tracked(study, base.runs_root) if base.mlflow else None
    with tracked or nullcontext(), Display(study.definition, workers, stream) as display:

        def show() -> None:
            trials = study.trials()
            display.show(trials)
            if tracked is not None:
                tracked.look(trials)

        yield show


@contextmanager
def _exported(storage: str | None) -> Iterator[None]:
    """Pass the storage to workers by environment; all users of a machine see its commands."""
    if storage is None:
        yield
        return
    before = os.environ.get(STORAGE_VARIABLE)
    os.environ[STORAGE_VARIABLE] = storage if "://" in storage else str(Path(storage).absolute())
    try:
        yield
    finally:
        del os.environ[STORAGE_VARIABLE]
        if before is not None:
            os.environ[STORAGE_VARIABLE] = before


def conclude(study: SweepStudy) -> list[str]:
    """Return the result of a sweep in lines."""
    trials = counting(study.trials())
    objectives = study.definition.objectives
    stamp = " (ORACLE: chosen by labels of test cases, no result)" if ORACLE in objectives else ""
    chosen = chosen_trial(trials)
    if chosen is None:
        reasons = [str(t.user_attrs["reason"]) for t in trials if "reason" in t.user_attrs]
        why = f"; the last one failed: {reasons[-1].rstrip('.')}" if reasons else ""
        return [f"No trial of '{study.name}' has a value{why}."]
    if len(objectives) > 1:
        front = sorted(study.study.best_trials, key=lambda t: -t.values[0])
        lines = [
            f"{len(front)} configurations on the Pareto front of {', '.join(objectives)}{stamp}:"
        ]
        for trial in front:
            values = " ".join(f"{value:.4g}" for value in trial.values)
            lines.append(f"  {values}  {shown(trial.params)}")
        return lines
    own = [assignment(f"method.{name}", value) for name, value in chosen.params.items()]
    options = RunOptions(assignments=[*study.definition.method_settings, *own])
    return [
        f"Chosen by {objectives[0]}{stamp}: {shown(chosen.params)} "
        f"({objectives[0]} {chosen.values[0]:.4g}, trial {chosen.number} of {len(trials)})",
        f"Use it: {console.next_command(*options.words())}",
    ]


def chosen(study: SweepStudy) -> dict[str, Any] | None:
    """Return number, settings and values of the chosen trial, if any."""
    trial = chosen_trial(counting(study.trials()))
    if trial is None:
        return None
    values = dict(zip(study.definition.objectives, trial.values, strict=True))
    return {"trial": trial.number, "settings": dict(trial.params), "values": values}


def has_value(study: SweepStudy) -> bool:
    """Return True if any trial has a value."""
    return chosen_trial(counting(study.trials())) is not None


def next_command(study: SweepStudy, base: RunOptions) -> str:
    """Return the command that runs the chosen configuration with an unused seed."""
    definition, chosen = study.definition, chosen_trial(counting(study.trials()))
    if chosen is None:
        return "fix the cause, and repeat the command with --fork"
    request = replace(requests(definition, base, chosen.params)[0], seed=definition.seeds)
    return console.next_command("glua-bench", "run", *request.words())
