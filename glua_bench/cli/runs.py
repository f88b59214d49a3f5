"""The commands that train: `run`, `compare`, `ablate`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glua_bench.cli.options import (
    Bounds,
    DryRun,
    Tasks,
    Work,
    say,
    say_browse,
    split_names,
    warn,
    with_descriptions,
    with_options,
)
from glua_bench.config import ORACLE
from glua_bench.console import next_command
from glua_bench.errors import RunFailure
from glua_bench.registry import Registry
from glua_bench.runs.interruption import listening
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.task import fold_name

if TYPE_CHECKING:
    import pandas as pd

    from glua_bench.records.naming import Comparison
    from glua_bench.runs.execution import Summary
    from glua_bench.runs.matrix import Cell
    from glua_bench.runs.plan import PlannedRun


@with_options()
def run(request: RunRequest, dry_run: DryRun = False) -> None:
    """Train and evaluate one method on one dataset.

    The same command resumes an interrupted run and shows the result of a finished one.
    """
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
    from glua_bench.console import Progress
    from glua_bench.data.neighbours import Neighbourhood
    from glua_bench.runs import execution
    from glua_bench.runs.plan import plan

    planned = plan(request, say)
    config = planned.config
    say(
        f"{config.method} on {config.fold_name} {config.direction}, seed {config.seed}, preset "
        f"{config.preset}, augmentation {config.augmentation}"
        + (f", slices {Neighbourhood.of(config)}" if config.slices > 1 else "")
        + (f", perturbation {config.perturbation}" if config.perturbation else "")
        + (", PRIVILEGED (trained on target labels)" if config.privileged else "")
    )
    if dry_run:
        _show_plan(planned)
        return
    from glua_bench.reports.run_figures import draw_run

    leading = os.environ.get("LOCAL_RANK", "0") == "0"
    with listening(), Progress(enabled=leading) as progress:
        summary = execution.execute(planned, progress, draw_run)
    if not leading:
        return
    for text in summary.warnings:
        warn(text)
    _show_result(planned, summary)


def _show_plan(planned: PlannedRun) -> None:
    from glua_bench.console import duration
    from glua_bench.runs import execution

    for name, steps in planned.stages:
        say(f"  stage {name}: {steps} steps")
    if planned.directory.done:
        say(f"Already done: {planned.directory.path}; the command would show the result.")
        return
    seconds = execution.estimate(planned)
    say(f"Would write {planned.directory.path} after about {duration(seconds)} of training.")
    say("Next: the same command without --dry-run.")


def _show_result(planned: PlannedRun, summary: Summary) -> None:
    from glua_bench.console import duration
    from glua_bench.scoring.metrics import PRIMARY

    path, table = planned.directory.path, summary.table
    if summary.already_done:
        say(f"This run is already done (same settings, data and code): {path}")
    else:
        say(f"Finished in {duration(summary.seconds)}.")
    say()
    primary = planned.config.selectors[0]
    say(_score_table(table[table["selector"] == primary]))
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
    if planned.dataset.protocol:
        say(f"PROTOCOL {planned.dataset.protocol}.")
    if caveat := planned.dataset.caveat(planned.config.direction):
        say(f"CAVEAT {caveat}.")
    say()
    say(f"Results: {path} (cases.parquet, predictions/, figures/)")
    say_browse(planned.request)
    say(f"Next:    {_next_run(planned)}")


def _score_table(table: pd.DataFrame) -> str:
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


def _next_run(planned: PlannedRun) -> str:
    """Return the command that adds both bounds and further seeds."""
    config, request = planned.config, planned.request
    # `compare` gives each run one process, and perturbs weights by --repeats.
    kept = [a for a in request.assignments if not a.startswith("perturbation=")]
    shared = replace(request.shared(), devices=1, assignments=kept)
    words = ["glua-bench", "compare", "--methods", config.method]
    words += ["--dataset", config.dataset, "--direction", config.direction, *shared.words()]
    if any(assignment.startswith("method.") for assignment in kept):
        # The bounds do not have these settings.
        return next_command(*words, "--no-bounds", fold=config.fold)
    return f"{next_command(*words, fold=config.fold)}   (both bounds, three seeds)"


@with_options(without=["devices"])
def compare(
    *,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated names; NAME+photometric sets the augmentation, supervised is the "
            "upper bound."
        ),
    ],
    tasks: Tasks,
    bounds: Bounds = True,
    work: Work,
    shared: RunOptions,
    dry_run: DryRun = False,
) -> None:
    """Run several methods under one protocol and print a table.

    The same command resumes the comparison; processes with the same command share its runs.
    """
    from glua_bench.runs import matrix

    names = split_names(methods)
    datasets, directions, base = _resolved(tasks, shared)
    cells = matrix.comparison(names, datasets, directions, tasks.seeds, base, bounds, tasks.repeats)
    _run_matrix(f"compare {', '.join(names)}", cells, work, dry_run)


@with_options(without=["devices"])
def ablate(
    *,
    method: Annotated[
        str, typer.Option(help="Name of the method; see `glua-bench list methods -v`.")
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
    from glua_bench.runs import matrix

    datasets, directions, base = _resolved(tasks, shared)
    shape = method, datasets, directions, tasks.seeds, base
    cells = matrix.ablation(*shape, combine, vary or [], variants, bounds, say, tasks.repeats)
    title = f"ablate {method}" + (", combinations" if combine else "")
    _run_matrix(title, cells, work, dry_run)


def _resolved(tasks: Tasks, shared: RunOptions) -> tuple[list[str], list[str], RunOptions]:
    """Return datasets (with folds), directions, and options with descriptions as plugins."""
    datasets, plugins = with_descriptions(tasks.datasets, shared.plugins)
    base, registry = replace(shared, plugins=plugins), Registry("dataset", plugins)
    names = [fold_name(*registry.fold_of(name, tasks.fold)) for name in split_names(datasets)]
    return names, split_names(tasks.directions), base


def _run_matrix(title: str, cells: list[Cell], work: Work, dry_run: bool) -> None:
    from glua_bench.console import duration
    from glua_bench.reports import comparison, results
    from glua_bench.runs import matrix
    from glua_bench.runs.executor import Executor

    planned = matrix.plan(cells, say)
    if dry_run:
        states: dict[tuple[str, str], list[str]] = {}
        for item in planned:
            states.setdefault((item.cell.entry, item.cell.task), []).append(item.state)
        seconds = matrix.estimate(planned, say)
        total = 0.0
        width = max(len(entry) for entry, _ in states)
        for key, found in states.items():
            left = sum(state != "done" for state in found)
            counts = ", ".join(f"{found.count(s)} {s}" for s in dict.fromkeys(found))
            cost = f", {duration(seconds[key])} per run" if left else ""
            total += left * seconds.get(key, 0.0)
            say(f"  {key[0]:<{width}}  {key[1]:<20}  {counts}{cost}")
        done = sum(item.state == "done" for item in planned)
        say(
            f"{len(planned)} runs, {done} done; about {duration(total / work.jobs)} "
            f"with --jobs {work.jobs}."
        )
        say("Next: the same command without --dry-run.")
        return
    groups = matrix.by_dataset(title, planned)
    outcome = Executor(planned, work.jobs, work.retry_failed, say).run()
    say(
        f"{len(planned)} runs: {outcome.ran} run now, {outcome.before} done before, "
        f"{outcome.elsewhere} by other processes, {len(outcome.failed)} failed."
    )
    request = planned[0].run.request
    finished = matrix.finished(planned)
    if finished:
        rows = comparison.collect(finished)
        say()
        say(comparison.as_text(comparison.table(rows)))
        say()
        for task in rows["task"].unique():
            say(comparison.verdict(rows, task))
        caveats = (one.run.dataset.caveat(one.run.config.direction) for one in planned)
        for caveat in filter(None, dict.fromkeys(caveats)):
            say(f"CAVEAT {caveat}.")
        if work.out is not None:
            say(f"Wrote {', '.join(str(file) for file in comparison.write(rows, work.out))}")
        if request.mlflow:
            _show_in_tracker(groups, rows, request.runs_root)
    if outcome.failed:
        first = next(iter(outcome.failed.values()))
        raise RunFailure(
            f"{len(outcome.failed)} of {len(planned)} runs failed; reason of the first: {first} "
            "Fix the cause and repeat the command with --retry-failed."
        )
    say()
    say(f"Rows:    {request.runs_root}/*/*/*/cases.parquet")
    say_browse(request)
    members = results.record(request.runs_root, title, [p.run.directory for p in planned])
    words = ("glua-bench", "report", "--runs", members)
    line = next_command(*words, plugins=request.plugins, data_root=request.data_root)
    say(f"Next:    {line}")


def _show_in_tracker(groups: list[Comparison], rows: pd.DataFrame, runs_root: Path) -> None:
    """Group the runs of each dataset under their comparison, with its table."""
    import tempfile

    from glua_bench.records.tracker import open_tracker
    from glua_bench.reports import charts, comparison

    tracker = open_tracker(runs_root, warn)
    for group in groups:
        own = rows[rows["dataset"] == group.dataset]
        if own.empty:  # all of its runs failed
            continue
        lines = comparison.table(own)
        answers = [comparison.verdict(own, task) for task in own["task"].unique()]
        note = "\n\n".join([*answers, f"```\n{comparison.as_text(lines)}\n```"])
        with tempfile.TemporaryDirectory() as folder:
            files = comparison.write(own, Path(folder))
            if lines["gap recovered"].notna().any():
                palette = charts.Palette([str(entry) for entry in own["entry"].unique()])
                files += charts.files(charts.gaps(lines, palette), Path(folder) / "gap_recovered")
            if not tracker.nest(group, comparison.as_metrics(lines), files, note):
                return  # one warning is enough
