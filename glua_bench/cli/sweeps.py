"""The commands of a search: `sweep`, `worker`; and how its report is wired to it."""

from __future__ import annotations

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
    end,
    say,
    say_browse,
    split_names,
    warn,
    with_descriptions,
    with_options,
)
from glua_bench.errors import ConfigError
from glua_bench.runs.interruption import listening
from glua_bench.runs.request import RunOptions, RunsRoot

if TYPE_CHECKING:
    from glua_bench.sweeps.study import SweepStudy


class Where(str, Enum):
    """Where the workers of a sweep are."""

    local = "local"
    slurm = "slurm"
    debug = "debug"


@dataclass(frozen=True)
class Changes:
    """The options of `sweep` that replace what its file says."""

    trials: Annotated[int | None, typer.Option(min=1, help="In the place of the file's.")] = None
    dataset: Annotated[str | None, typer.Option(help="In the place of the file's.")] = None
    fold: Annotated[int | None, typer.Option(min=1, help="In the place of the file's.")] = None
    directions: DirectionNames = None
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Of every trial, in the place of the file's.")
    ] = None
    space: Annotated[
        str | None, typer.Option(help="auto: every setting of the method that has a range.")
    ] = None


@dataclass(frozen=True)
class Place:
    """The options of `sweep` that say where its workers are.

    Raises:
        ConfigError: the options contradict each other.
    """

    executor: Annotated[
        Where,
        typer.Option(
            help="Where workers are: local, processes of this machine; slurm, jobs of a cluster; "
            "debug, one in this process."
        ),
    ] = Where.local
    slurm: Annotated[
        Path | None, typer.Option(help="A YAML file of what a job asks for: docs/cluster.md.")
    ] = None
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Leave the jobs to SLURM; the same command looks at them."),
    ] = False

    def __post_init__(self) -> None:
        if (self.slurm is not None) != (self.executor is Where.slurm):
            raise ConfigError(
                "--executor slurm and --slurm FILE.yaml belong together; give both or neither."
            )
        if self.detach and self.executor is not Where.slurm:
            raise ConfigError(
                "--detach leaves jobs to SLURM; add --executor slurm, or leave it out."
            )


# The file says what all runs share of settings and augmentation.
@with_options(without=["assignments", "augmentation"])
def sweep(
    *,
    file: Annotated[
        str, typer.Argument(help="A sweep's YAML file, or the name of one: `list sweeps`.")
    ],
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, each with its GPU or cores.")
    ] = 1,
    changes: Changes,
    storage: Storage = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a sweep that has begun, or say it has not.")
    ] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="Begin a new study beside one of the same name.")
    ] = False,
    shared: RunOptions,
    place: Place,
    dry_run: DryRun = False,
) -> None:
    """Search settings of a method by a score that needs no target label.

    The same command again goes on where it was, and does nothing for a finished sweep.
    """
    if changes.dataset is not None:
        dataset, plugins = with_descriptions(changes.dataset, shared.plugins)
        changes, shared = replace(changes, dataset=dataset), replace(shared, plugins=plugins)
    from glua_bench.console import Progress
    from glua_bench.sweeps import command, definition
    from glua_bench.sweeps.slurm import read

    resources = None if place.slurm is None else read(place.slurm, shared.devices)
    directions = split_names(changes.directions or "")
    given = {**vars(changes), "directions": directions, "preset": shared.preset}
    told = definition.read(definition.find(file), shared.oracle, shared.plugins, **given)
    base = replace(shared, preset=None)  # each run has the definition's
    for line in command.described(told):
        say(line)
    if dry_run:
        for line in command.planned(told, base, workers, say):
            say(line)
        say("Next: the same command without --dry-run.")
        return
    study = command.open_study(told, base, storage, workers, fork, resume, say)
    try:
        if resources is not None:
            if not command.run_jobs(
                study, base, storage, workers, resources, place.detach, sys.stdout, say
            ):
                say("Next: the same command without --detach shows what they do.")
                return
        elif place.executor is Where.debug:
            with listening():
                command.run_worker(study, base, say, Progress())
        else:
            command.run_crew(study, base, storage, workers, sys.stdout)
    except KeyboardInterrupt:
        end(
            f"interrupted; what is done is kept in {study.folder}, and the same command goes on.",
            130,
        )
    for line in command.conclude(study):
        say(line)
    page = report_sweep(study, base, study.folder / "report")
    say(f"Report: {page}")
    say_browse(base)
    say(f"Next:   {command.next_command(study, base)}")
    if not command.has_value(study):
        raise typer.Exit(1)


def report_sweep(study: SweepStudy, base: RunOptions, out: Path) -> Path:
    """Write a sweep's report, and show the sweep in the tracker."""
    from glua_bench.records.tracker import open_tracker
    from glua_bench.reports import sweep_report
    from glua_bench.sweeps import results

    found = sweep_report.Sweep(**results.collect(study, base.runs_root))
    files = sweep_report.write(found, out)
    for sentence in sweep_report.sentences(found)[1:]:
        say(sentence)
    group = results.group(study, base.runs_root) if base.mlflow else None
    if group is not None:
        note = "\n\n".join([*sweep_report.notices(found), *sweep_report.sentences(found)])
        shown = [file for file in files if file.suffix in (".csv", ".png", ".html")]
        open_tracker(base.runs_root, warn).nest(group, sweep_report.as_metrics(found), shown, note)
    return files[0]


def worker(
    study: Annotated[str, typer.Option(help="The sweep's name.")],
    storage: Storage = None,
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """Work on a sweep that `sweep` has begun, here or on another machine, until it is finished."""
    from glua_bench.console import Progress
    from glua_bench.sweeps import command, launch

    launch.pin()
    joined, base = command.join(study, runs_root, storage, plugin or [], say)
    with listening():
        done = command.run_worker(joined, base, say, Progress(enabled=False))
    say(f"'{study}' is finished: {done.finished} trials here, {done.pruned} pruned.")
