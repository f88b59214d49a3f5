"""The commands `sweep` and `worker`, and the report of a sweep."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glua_bench.cli.options import (
    DirectionNames,
    DryRun,
    Plugins,
    Storage,
    answer,
    end,
    note,
    progress,
    quiet,
    say,
    say_browse,
    split_names,
    with_options,
)
from glua_bench.console import warn
from glua_bench.errors import ConfigError
from glua_bench.registry import with_descriptions
from glua_bench.runs.completion import complete_names
from glua_bench.runs.interruption import listening
from glua_bench.runs.request import RunOptions, RunsRoot

if TYPE_CHECKING:
    from glua_bench.sweeps.study import SweepStudy


class Executor(str, Enum):
    """Executors of a sweep's workers."""

    local = "local"
    slurm = "slurm"
    debug = "debug"


@dataclass(frozen=True)
class Changes:
    """Options of `sweep` that override its file."""

    trials: Annotated[int | None, typer.Option(min=1, help="Overrides the file.")] = None
    dataset: Annotated[
        str | None,
        typer.Option(help="Overrides the file.", autocompletion=complete_names("dataset")),
    ] = None
    fold: Annotated[int | None, typer.Option(min=1, help="Overrides the file.")] = None
    directions: DirectionNames = None
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds per trial; overrides the file.")
    ] = None
    space: Annotated[
        str | None, typer.Option(help="auto: search all settings of the method that have a range.")
    ] = None


@dataclass(frozen=True)
class Place:
    """Options of `sweep` for its workers."""

    executor: Annotated[
        Executor,
        typer.Option(
            help="Executor of workers: local processes, slurm jobs, or debug (in this process)."
        ),
    ] = Executor.local
    slurm: Annotated[
        Path | None, typer.Option(help="YAML file of job resources; see docs/cluster.md.")
    ] = None
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Exit and leave jobs to SLURM."),
    ] = False

    def __post_init__(self) -> None:
        if (self.slurm is not None) != (self.executor is Executor.slurm):
            raise ConfigError(
                "--executor slurm needs --slurm FILE.yaml and vice versa; give both or neither."
            )
        if self.detach and self.executor is not Executor.slurm:
            raise ConfigError("--detach needs --executor slurm; add it, or omit --detach.")


# The file defines settings and augmentation.
@with_options(without=["assignments", "augmentation"])
def sweep(
    *,
    file: Annotated[
        str, typer.Argument(help="YAML file of a sweep, or a name from `list sweeps`.")
    ],
    workers: Annotated[
        int, typer.Option(min=1, help="Local processes, which share the GPUs or cores.")
    ] = 1,
    changes: Changes,
    storage: Storage = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an existing sweep.")] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="Start a new study even if one has the same name.")
    ] = False,
    shared: RunOptions,
    place: Place,
    dry_run: DryRun = False,
) -> None:
    """Search settings of a method without target labels.

    The same command resumes an interrupted sweep and shows the result of a finished one.
    """
    if changes.dataset is not None:
        dataset, plugins = with_descriptions(changes.dataset, shared.plugins)
        changes, shared = replace(changes, dataset=dataset), replace(shared, plugins=plugins)
    from glua_bench.sweeps import command, definition
    from glua_bench.sweeps.slurm import read

    resources = None if place.slurm is None else read(place.slurm, shared.devices)
    directions = split_names(changes.directions)
    given = {**vars(changes), "directions": directions, "preset": shared.preset}
    chosen = definition.read(definition.find(file), shared.oracle, shared.plugins, **given)
    base = replace(shared, preset=None)  # the definition has the preset
    for line in command.described(chosen):
        note(line)
    if dry_run:
        lines = command.planned(chosen, base, workers, note)
        for line in lines:
            say(line)
        note("Next: the same command without --dry-run.")
        answer(sweep=chosen.name, definition=chosen, plan=lines, next=[])
        return
    study = command.open_study(chosen, base, storage, workers, fork, resume, note)
    stream = io.StringIO() if quiet() else sys.stdout
    try:
        if resources is not None:
            if not command.run_jobs(
                study, base, storage, workers, resources, place.detach, stream, note
            ):
                note("Next: the same command without --detach shows their progress.")
                answer(sweep=study.name, path=study.folder, finished=False, next=[])
                return
        elif place.executor is Executor.debug:
            with listening():
                command.run_worker(study, base, note, progress())
        else:
            command.run_crew(study, base, storage, workers, stream)
    except KeyboardInterrupt:
        end(f"interrupted; finished trials are in {study.folder}; the same command resumes.", 130)
    for line in command.conclude(study):
        say(line)
    page, sentences = report_sweep(study, base, study.folder / "report")
    following = command.next_command(study, base)
    say(f"Report: {page}")
    say_browse(base)
    note(f"Next:   {following}")
    answer(
        sweep=study.name,
        path=study.folder,
        finished=True,
        chosen=command.chosen(study),
        summary=sentences,
        report=page,
        next=[following],
    )
    if not command.has_value(study):
        raise typer.Exit(1)


def report_sweep(study: SweepStudy, base: RunOptions, out: Path) -> tuple[Path, list[str]]:
    """Write a sweep's report, upload it to the tracker, and return its page and its sentences."""
    from glua_bench.records.tracker import open_tracker
    from glua_bench.reports import sweep_report
    from glua_bench.sweeps import results

    found = sweep_report.Sweep(**results.collect(study, base.runs_root))
    files = sweep_report.write(found, out)
    sentences = list(sweep_report.sentences(found))
    for sentence in [*sentences[1:], *found.stamps]:
        say(sentence)
    group = results.group(study, base.runs_root) if base.mlflow else None
    if group is not None:
        text = "\n\n".join([*sweep_report.notices(found), *sentences])
        shown = [file for file in files if file.suffix in (".csv", ".png", ".html")]
        open_tracker(base.runs_root, warn).nest(group, sweep_report.as_metrics(found), shown, text)
    return files[0], [*sentences, *found.stamps]


def worker(
    study: Annotated[str, typer.Option(help="Name of the sweep.")],
    storage: Storage = None,
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """Run trials of an existing sweep, also from another machine, until it is finished."""
    from glua_bench.console import Progress
    from glua_bench.sweeps import command, launch

    launch.pin()
    joined, base = command.join(study, runs_root, storage, plugin or [], note)
    with listening():
        done = command.run_worker(joined, base, note, Progress(enabled=False))
    answer(sweep=study, finished=done.finished, pruned=done.pruned, next=[])
    say(f"'{study}' is finished: {done.finished} trials here, {done.pruned} pruned.")
