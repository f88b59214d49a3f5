"""The commands that train: `run`, `compare`, `ablate`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glua_bench import OWN_THREADS, cores
from glua_bench.cli.options import (
    Bounds,
    DryRun,
    Tasks,
    Work,
    answer,
    note,
    on_command_line,
    progress,
    quiet,
    say,
    say_browse,
    split_names,
    with_options,
)
from glua_bench.config import ORACLE, UPPER, flat_settings
from glua_bench.console import is_terminal, leading, next_command, warn
from glua_bench.errors import ConfigError
from glua_bench.registry import Registry, with_descriptions
from glua_bench.runs.completion import complete_names
from glua_bench.runs.interruption import listening
from glua_bench.runs.request import RunOptions, RunRequest

if TYPE_CHECKING:
    import pandas as pd

    from glua_bench.runs.execution import Summary
    from glua_bench.runs.external import Guest
    from glua_bench.runs.matrix import Cell, Planned
    from glua_bench.runs.plan import PlannedRun


@with_options(optional=["method", "dataset"])
def run(
    context: typer.Context,
    request: RunRequest,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="Repeat the run of this config.yaml; other options override it."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train and evaluate one method on one dataset.

    The same command resumes an interrupted run and shows the result of a finished one.
    """
    if config is not None:
        from glua_bench.runs import configuration

        request = configuration.of_run(config, request, on_command_line(context), note)
    for name in ("method", "dataset"):
        if not getattr(request, name):
            raise ConfigError(f"--{name} is missing; name one, or give --config FILE.")
    dataset, plugins = with_descriptions(request.dataset, request.plugins)
    _run(replace(request, dataset=dataset, plugins=plugins), dry_run)


def run_request(
    file: Annotated[Path, typer.Argument(help="Request as JSON.", exists=True)],
) -> None:
    """Execute a request from a file; other commands start their runs with this command."""
    _run(RunRequest.from_json(file.read_text(encoding="utf-8"), file))


def _run(request: RunRequest, dry_run: bool = False) -> None:
    # Reject unknown names before importing torch, which takes seconds.
    Registry("method", request.plugins).entry(request.method)
    datasets = Registry("dataset", request.plugins)
    datasets.entry(datasets.fold_of(request.dataset, request.fold)[0])
    from glua_bench.data.parallel import Load
    from glua_bench.runs.sealed import process

    load = Load()
    if not dry_run:
        process.prepare()  # before a dataset is loaded
    from glua_bench.data.neighbours import Neighbourhood
    from glua_bench.runs import execution
    from glua_bench.runs.plan import plan

    planned = plan(request, note)
    config = planned.config
    note(
        f"{config.method} on {config.fold_name} {config.direction}, seed {config.seed}, preset "
        f"{config.preset}, augmentation {config.augmentation}"
        + (f", slices {Neighbourhood.of(config)}" if config.slices > 1 else "")
        + (f", perturbation {config.perturbation}" if config.perturbation else "")
        + (", PRIVILEGED (trained on target labels)" if config.privileged else "")
    )
    if dry_run:
        _show_plan(planned)
        return
    if not planned.directory.done and (advice := _crowded(request.device, load.of_others())):
        note(advice)
    from glua_bench.reports.run_figures import draw_run

    with listening(), progress() as bar:
        summary = execution.execute(planned, bar, draw_run)
    if not leading():
        return
    for text in summary.warnings:
        warn(text)
    _show_result(planned, summary)


def _crowded(device: str, busy: float) -> str:
    """Advise fewer threads if other programs use the cores; "" if not, or if the user has chosen.

    The number of threads is not reduced here, because the last bits of a result depend on it.
    """
    import torch

    from glua_bench.runs.plan import choose_device

    threads = torch.get_num_threads()
    free = max(1, int(cores() - busy + 0.5))
    chosen = os.environ.get("OMP_NUM_THREADS") not in (None, OWN_THREADS)
    if busy < 0.5 or free >= threads or chosen or choose_device(device) != "cpu":
        return ""
    return (
        f"Other programs keep {busy:.1f} of {cores()} cores busy: OMP_NUM_THREADS={free} may train "
        "faster, with other last bits."
    )


def _show_plan(planned: PlannedRun) -> None:
    from glua_bench.console import duration
    from glua_bench.reports.run_figures import draw_run
    from glua_bench.runs.timing.estimate import Estimator, breakdown

    for name, steps in planned.stages:
        say(f"  stage {name}: {steps} steps")
    path, done = planned.directory.path, planned.directory.done
    facts = {"path": path, "id": planned.id, "already_done": done, "stages": dict(planned.stages)}
    if done:
        say(f"Already done: {path}; the command would show the result.")
        answer(**facts, seconds=0.0, next=[])
        return
    if planned.directory.damage:
        warn(planned.directory.damage)
    expected = Estimator(draw_run).of(planned)
    say(
        f"Would write {path} after about {duration(expected.total)} "
        f"({expected.basis}): {breakdown(expected.parts, expected.reused)}."
    )
    note("Next: the same command without --dry-run.")
    answer(**facts, seconds=expected.total, parts=expected.parts, next=[])


def _show_result(planned: PlannedRun, summary: Summary) -> None:
    from glua_bench.cli import api
    from glua_bench.console import duration
    from glua_bench.runs.timing.parts import where_time_went
    from glua_bench.scoring.metrics import PRIMARY

    path, table = planned.directory.path, summary.table
    if summary.already_done:
        note(f"This run is already done (same settings, data and code): {path}")
    else:
        note(f"Finished in {duration(summary.seconds)}.")
        if went := where_time_went([planned.directory.read_summary()]):
            note(went)
    note()
    primary = planned.config.selectors[0]
    say(score_table(table[table["selector"] == primary]))
    others = table[(table["selector"] != primary) & (table["structure"] == "mean")]
    if len(others):
        scores = others.set_index("selector")[PRIMARY.name].map(PRIMARY.text)
        others = ", ".join(f"{name} {text}" for name, text in scores.items() if name != ORACLE)
        say(f"Mean {PRIMARY.title} with other selectors: {others}")
        if ORACLE in scores:
            say(f"{ORACLE.upper()} (selected by test labels, not a result): {scores[ORACLE]}")
    say(f"Selector: {primary}. Distances in {planned.dataset.distance_note}.")
    if planned.config.privileged:
        say("PRIVILEGED: trained on target labels; an upper bound, not an adaptation result.")
    for text in api.stamps([planned]):
        say(text)
    say()
    say(f"Results: {path} (cases.parquet, predictions/, figures/)")
    say_browse(planned.request)
    command, remark = _next_run(planned)
    note(f"Next:    {command}{remark}")
    answer(
        path=path,
        id=planned.id,
        already_done=summary.already_done,
        seconds=summary.seconds,
        selector=primary,
        scores=table,
        distances=planned.dataset.distance_note,
        privileged=planned.config.privileged,
        protocol=planned.dataset.protocol or None,
        caveat=planned.dataset.caveat(planned.config.direction) or None,
        config=planned.config.to_dict(),
        warnings=summary.warnings,
        next=[command],
    )


def score_table(table: pd.DataFrame) -> str:
    """Format the mean scores of each structure, from `summarise`."""
    from glua_bench.scoring.metrics import METRICS

    first = max([11, *(len(name) + 2 for name in table["structure"])])
    widths = {name: len(metric.label) + 3 for name, metric in METRICS.items()}
    heads = "".join(f"{METRICS[name].label:>{width}}" for name, width in widths.items())
    lines = [f"{'structure':<{first}}{heads}{'missed':>9}"]
    for row in table.to_dict("records"):
        missed = f"{row['misses']}" + f"/{row['cases']}" * (row["structure"] != "mean")
        cells = "".join(f"{METRICS[n].text(row[n]):>{width}}" for n, width in widths.items())
        lines.append(f"{row['structure']:<{first}}{cells}{missed:>9}")
    return "\n".join(lines)


def _next_run(planned: PlannedRun) -> tuple[str, str]:
    """Return the command that adds both bounds and further seeds, and a remark on it."""
    from glua_bench.runs.plan import resolve

    config, request = planned.config, planned.request
    # A request from a config.yaml contains every setting; those at their default are omitted.
    unset = replace(request, steps=None, augmentation=None, precision=None, assignments=[])
    default = flat_settings(resolve(unset, planned.dataset, planned.method_class).to_dict())
    own = flat_settings(config.to_dict())
    named = [(text.partition("=")[0].strip(), text) for text in request.assignments]
    # `compare` gives each run one process, and perturbs weights by --repeats.
    kept = [
        text
        for name, text in named
        if name != "perturbation" and (name not in own or own[name] != default.get(name))
    ]
    shared = replace(
        request.shared(),
        steps=None if own["steps"] == default["steps"] else request.steps,
        augmentation=None
        if own["augmentation"] == default["augmentation"]
        else request.augmentation,
        precision=None if own["precision"] == default["precision"] else request.precision,
        devices=1,
        assignments=kept,
    )
    words = ["glua-bench", "compare", "--methods", config.method]
    words += ["--dataset", config.dataset, "--direction", config.direction, *shared.words()]
    if any(assignment.startswith("method.") for assignment in kept):
        # The bounds do not have these settings.
        return next_command(*words, "--no-bounds", fold=config.fold), ""
    return next_command(*words, fold=config.fold), "   (both bounds, three seeds)"


@with_options(without=["devices"], optional=["datasets"])
def compare(
    *,
    context: typer.Context,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated names; NAME+photometric sets the augmentation, supervised is the "
            "upper bound. Also names of imported entries (`import`).",
            autocompletion=complete_names("method", UPPER),
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="File with entries of one or several methods (docs/configuration-files.md); other "
            "options override it.",
        ),
    ] = None,
    tasks: Tasks,
    bounds: Bounds = True,
    work: Work,
    shared: RunOptions,
    dry_run: DryRun = False,
) -> None:
    """Run several methods under one protocol and print a table.

    The same command resumes the comparison; processes with the same command share its runs.
    """
    from glua_bench.runs import configuration

    named = on_command_line(context)
    given = {
        "datasets": split_names(tasks.datasets),
        "directions": split_names(tasks.directions),
        **{name: getattr(tasks, name) for name in ("seeds", "fold", "repeats")},
        "bounds": bounds,
    }
    given = {name: value for name, value in given.items() if name in named}
    asked = configuration.comparison(split_names(methods), config, given, shared, named)
    _run_matrix(asked.title, asked.cells(), work, dry_run, asked.named, asked.imported)


@with_options(without=["devices"])
def ablate(
    *,
    method: Annotated[
        str,
        typer.Option(
            help="Name of the method; see `glua-bench list methods -v`.",
            autocompletion=complete_names("method"),
        ),
    ],
    tasks: Tasks,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="NAME=V1,V2",
            help="Values of a setting to run, one factor at a time, e.g. lr=1e-4,1e-3,1e-2; "
            "repeatable.",
        ),
    ] = None,
    variants: Annotated[
        bool,
        typer.Option("--variants/--no-variants", help="Run the method's declared variants."),
    ] = True,
    combine: Annotated[
        bool,
        typer.Option("--combine", help="Run all combinations of variants and --vary."),
    ] = False,
    bounds: Bounds = True,
    work: Work,
    shared: RunOptions,
    dry_run: DryRun = False,
) -> None:
    """Run variants and varied settings of a method and print a table.

    Bounds ignore --set method.NAME. A value of --vary that repeats another entry is merged with it.
    """
    from glua_bench.runs import configuration, matrix

    datasets, base = configuration.in_folds(split_names(tasks.datasets), tasks.fold, shared)
    shape = method, datasets, split_names(tasks.directions), tasks.seeds, base
    cells = matrix.ablation(*shape, combine, vary or [], variants, bounds, note, tasks.repeats)
    title = f"ablate {method}" + (", combinations" if combine else "")
    _run_matrix(title, cells, work, dry_run)


def _run_matrix(
    title: str,
    cells: list[Cell],
    work: Work,
    dry_run: bool,
    named: bool = False,
    imported: Sequence[str] = (),
) -> None:
    from glua_bench.cli import api
    from glua_bench.reports import comparison
    from glua_bench.runs import matrix
    from glua_bench.runs.timing.parts import where_time_went

    guests = matrix.guests(cells, imported, note)  # before anything is trained
    planned = matrix.plan(cells, note)
    if dry_run:
        _show_matrix(planned, work, guests)
        return
    warnings: list[str] = []

    def told(text: str) -> None:
        warnings.append(text)
        warn(text)

    result = api.conduct(
        title, planned, work.jobs, work.retry_failed, note, told, named, guests, quiet()
    )
    counts = result.counts
    note(
        f"{len(planned)} runs: {counts['ran']} run now, {counts['before']} done before, "
        f"{counts['elsewhere']} by other processes, {counts['failed']} failed."
    )
    if counts["ran"]:
        done = [item.run.directory for item in planned if item.state == "done"]
        if went := where_time_went([directory.read_summary() for directory in done]):
            note(went)
    request = planned[0].run.request
    written: list[Path] = []
    if len(result.rows):
        note()
        width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
        say(comparison.as_text(result.table, width))
        say()
        for text in result.verdicts.values():
            say(text)
        for text in result.stamps:
            say(text)
        if work.out is not None:
            written = comparison.write(result.rows, work.out)
            say(f"Wrote {', '.join(str(file) for file in written)}")
    words = ("glua-bench", "report", "--runs", result.members)
    line = next_command(*words, plugins=request.plugins, data_root=request.data_root)
    answer(
        title=title,
        table=result.table,
        verdicts=result.verdicts,
        runs=_runs(planned),
        counts=counts,
        failed=result.failed,
        members=result.members,
        tasks=_tasks(planned),
        external=_external(guests),
        warnings=warnings,
        files=written,
        next=[line],
    )
    result.check()
    note()
    note(f"Rows:    {request.runs_root}/*/*/*/cases.parquet")
    say_browse(request)
    note(f"Next:    {line}")


def _runs(planned: list[Planned]) -> list[dict[str, object]]:
    """Describe the runs of a matrix for `--json`."""
    return [
        {
            "entry": item.cell.entry,
            "task": item.cell.task,
            "seed": item.run.config.seed,
            "privileged": item.run.config.privileged,
            "perturbation": item.run.config.perturbation,
            "id": item.run.id,
            "path": item.run.directory.path,
            "state": item.state,
        }
        for item in planned
    ]


def _external(guests: Sequence[Guest]) -> list[dict[str, object]]:
    """Describe the imported entries of a matrix for `--json`."""
    return [{"entry": one.entry, "task": one.task, "path": one.run.path} for one in guests]


def _tasks(planned: list[Planned]) -> list[dict[str, object]]:
    """Describe the tasks of a matrix for `--json`."""
    tasks = {item.cell.task: item.run for item in planned}
    return [
        {
            "task": task,
            "distances": run.dataset.distance_note,
            "protocol": run.dataset.protocol or None,
            "caveat": run.dataset.caveat(run.config.direction) or None,
        }
        for task, run in tasks.items()
    ]


def _show_matrix(planned: list[Planned], work: Work, guests: Sequence[Guest]) -> None:
    """Show how many runs of each row are open, and how long they take."""
    from glua_bench.console import duration
    from glua_bench.reports.run_figures import draw_run
    from glua_bench.runs.executor import environment
    from glua_bench.runs.timing.estimate import Estimator, breakdown
    from glua_bench.runs.timing.parts import total

    threads = environment(0, work.jobs)["OMP_NUM_THREADS"]  # may be a list, "4,2"
    own = int(threads) if threads.isdigit() else None
    estimator = Estimator(draw_run, processes=True, threads=own, report=note)
    states: dict[tuple[str, str], list[str]] = {}
    expected: dict[tuple[str, str], list[dict[str, float]]] = {}
    for item in planned:
        key = item.cell.entry, item.cell.task
        states.setdefault(key, []).append(item.state)
        if item.run.directory.damage:
            warn(item.run.directory.damage)
        if item.state != "done":
            expected.setdefault(key, []).append(dict(estimator.of(item.run).parts))
    width = max(len(entry) for entry, _ in states)
    for key, found in states.items():
        counts = ", ".join(f"{found.count(s)} {s}" for s in dict.fromkeys(found))
        each = expected.get(key, [])
        mean = sum(sum(parts.values()) for parts in each) / max(1, len(each))
        cost = f", {duration(mean)} per run" if each else ""
        say(f"  {key[0]:<{width}}  {key[1]:<20}  {counts}{cost}")
    for guest in guests:
        say(f"  {guest.entry:<{width}}  {guest.task:<20}  imported")
    done = sum(item.state == "done" for item in planned)
    parts = total([parts for each in expected.values() for parts in each])
    seconds = sum(parts.values()) / work.jobs
    say(
        f"{len(planned)} runs, {done} done; about {duration(seconds)} with --jobs {work.jobs}"
        + (f" (in all {breakdown(parts)})." if parts else ".")
    )
    note("Next: the same command without --dry-run.")
    answer(
        runs=_runs(planned),
        external=_external(guests),
        done=done,
        seconds=seconds,
        parts=parts,
        next=[],
    )
