"""The commands that train: `run`, `compare`, `ablate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glua_bench.cli_options import (
    Assignments,
    Augmentation,
    Bounds,
    DataRoot,
    DatasetNames,
    Device,
    DirectionNames,
    DryRun,
    Fold,
    Jobs,
    Mirrored,
    Numbers,
    Oracle,
    Plugins,
    Precision,
    Repeats,
    RetryFailed,
    RunPreset,
    RunsRoot,
    Seeds,
    Steps,
    say,
    say_browse,
    split_names,
    warn,
    with_descriptions,
)
from glua_bench.config import ORACLE
from glua_bench.console import next_command
from glua_bench.errors import RunFailure
from glua_bench.interruption import listening
from glua_bench.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from glua_bench.matrix import Cell
    from glua_bench.runs import PlannedRun, RunRequest
    from glua_bench.tracking import Comparison


def run(
    method: Annotated[str, typer.Option(help="Which method; see `glua-bench list methods`.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Which dataset; see `glua-bench list datasets`. Or FILE.yaml, which describes one."
        ),
    ],
    direction: Annotated[
        str | None, typer.Option(help="source-target, e.g. mr-ct; default is the dataset's first.")
    ] = None,
    fold: Fold = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    preset: RunPreset = None,
    set_: Assignments = None,
    scenario: Annotated[
        str,
        typer.Option(
            help="uda, or supervised: source_only on labelled target-train cases, the upper "
            "bound (privileged)."
        ),
    ] = "uda",
    augmentation: Augmentation = None,
    steps: Steps = None,
    data_root: DataRoot = None,
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    devices: Annotated[int, typer.Option(help="Processes, one a GPU (or CPU).", min=1)] = 1,
    precision: Precision = None,
    plugin: Plugins = None,
    oracle: Oracle = False,
    mlflow: Mirrored = True,
    dry_run: DryRun = False,
) -> None:
    """Train one method on one dataset, evaluate it, and record everything.

    The same command again resumes an interrupted run, and does nothing for a finished one.
    """
    dataset, plugin = with_descriptions(dataset, plugin)
    # A wrong name is found before the seconds that importing torch takes.
    Registry("method", plugin or []).entry(method)
    datasets = Registry("dataset", plugin or [])
    datasets.entry(datasets.fold_of(dataset, fold)[0])
    from glua_bench import runs
    from glua_bench.console import Progress
    from glua_bench.neighbours import Neighbourhood

    request = runs.RunRequest(
        method=method,
        dataset=dataset,
        direction=direction,
        fold=fold,
        scenario=scenario,
        preset=preset,
        seed=seed,
        augmentation=augmentation,
        steps=steps,
        assignments=set_ or [],
        plugins=plugin or [],
        data_root=data_root,
        runs_root=runs_root,
        device=device,
        devices=devices,
        precision=precision,
        oracle=oracle,
        mlflow=mlflow,
    )
    planned = runs.plan(request, say)
    config = planned.config
    say(
        f"{config.method} on {config.fold_name} {config.direction}, seed {config.seed}, preset "
        f"{config.preset}, augmentation {config.augmentation}"
        + (f", slices {Neighbourhood.of(config)}" if config.slices > 1 else "")
        + (f", perturbation {config.perturbation}" if config.perturbation else "")
        + (", PRIVILEGED (trains on target labels)" if config.privileged else "")
    )
    if dry_run:
        _show_plan(planned)
        return
    from glua_bench.reports.run_figures import draw_run

    leading = os.environ.get("LOCAL_RANK", "0") == "0"
    with listening(), Progress(enabled=leading) as progress:
        summary = runs.execute(planned, progress, draw_run)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for text in summary.warnings:
        warn(text)
    _show_result(planned, summary.table, summary.already_done, summary.seconds, request)


def _show_plan(planned: PlannedRun) -> None:
    from glua_bench import runs
    from glua_bench.console import duration

    for name, steps in planned.stages:
        say(f"  stage {name}: {steps} steps")
    if planned.directory.done:
        say(f"Already done: {planned.directory.path}. The command would only show the result.")
        return
    seconds = runs.estimate(planned)
    say(f"Would write {planned.directory.path}, in about {duration(seconds)} of training.")
    say("Next: the same command without --dry-run.")


def _show_result(
    planned: PlannedRun, table: pd.DataFrame, done: bool, seconds: float, request: RunRequest
) -> None:
    from glua_bench.console import duration
    from glua_bench.metrics import PRIMARY

    path = planned.directory.path
    if done:
        say(f"This run is already done (same settings, data and code): {path}")
    else:
        say(f"Finished in {duration(seconds)}.")
    say()
    primary = planned.config.selectors[0]
    say(_score_table(table[table["selector"] == primary]))
    others = table[(table["selector"] != primary) & (table["structure"] == "mean")]
    if len(others):
        scores = others.set_index("selector")[PRIMARY.name].map(PRIMARY.text)
        told = ", ".join(f"{name} {text}" for name, text in scores.items() if name != ORACLE)
        say(f"Mean {PRIMARY.title} by other selectors of the checkpoint: {told}")
        if ORACLE in scores:
            say(
                f"{ORACLE.upper()} (chosen by its score on the labelled test cases, no result): "
                f"{scores[ORACLE]}"
            )
    say(f"Checkpoint: {primary}. Distances in {planned.dataset.distance_note}.")
    if planned.config.privileged:
        say("PRIVILEGED: trained on target labels; an upper bound, not an adaptation result.")
    if planned.dataset.protocol:
        say(f"PROTOCOL {planned.dataset.protocol}.")
    say()
    say(f"Results: {path} (cases.parquet, predictions/, figures/)")
    say_browse(request)
    say(f"Next:    {_next_run(planned, request)}")


def _score_table(table: pd.DataFrame) -> str:
    from glua_bench.metrics import METRICS

    first = max([11, *(len(name) + 2 for name in table["structure"])])
    widths = {name: len(metric.label) + 3 for name, metric in METRICS.items()}
    heads = "".join(f"{METRICS[name].label:>{width}}" for name, width in widths.items())
    lines = [f"{'structure':<{first}}{heads}{'missed':>9}"]
    for row in table.to_dict("records"):
        missed = f"{row['misses']}" + f"/{row['cases']}" * (row["structure"] != "mean")
        cells = "".join(f"{METRICS[n].text(row[n]):>{width}}" for n, width in widths.items())
        lines.append(f"{row['structure']:<{first}}{cells}{missed:>9}")
    return "\n".join(lines)


def _next_run(planned: PlannedRun, request: RunRequest) -> str:
    """The command that makes the result comparable: both bounds, and three seeds."""
    config = planned.config
    words: list[object] = ["glua-bench", "compare", "--methods", config.method]
    words += ["--dataset", config.dataset, "--direction", config.direction]
    for assignment in request.assignments:
        if not assignment.startswith("perturbation="):  # compare --repeats makes these
            words += ["--set", assignment]
    for option, value in (
        ("--preset", request.preset),
        ("--augmentation", request.augmentation),
        ("--steps", request.steps),
        ("--runs", None if request.runs_root == Path("runs") else request.runs_root),
    ):
        if value is not None:
            words += [option, value]
    own = any(assignment.startswith("method.") for assignment in request.assignments)
    if own:
        words.append("--no-bounds")  # which do not have these settings
    line = next_command(
        *words, plugins=request.plugins, data_root=request.data_root, fold=config.fold
    )
    return line if own else f"{line}   (both bounds, three seeds)"


def compare(
    methods: Annotated[
        str,
        typer.Option(
            help="Names by commas; NAME+photometric asks for that augmentation, supervised is "
            "the upper bound."
        ),
    ],
    datasets: DatasetNames,
    directions: DirectionNames = None,
    fold: Fold = 1,
    seeds: Seeds = 3,
    repeats: Repeats = 0,
    bounds: Bounds = True,
    jobs: Jobs = 1,
    retry_failed: RetryFailed = False,
    out: Numbers = None,
    preset: RunPreset = None,
    set_: Assignments = None,
    augmentation: Augmentation = None,
    steps: Steps = None,
    data_root: DataRoot = None,
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    precision: Precision = None,
    plugin: Plugins = None,
    oracle: Oracle = False,
    mlflow: Mirrored = True,
    dry_run: DryRun = False,
) -> None:
    """Run methods side by side under one protocol, and print their table.

    The same command again runs what is missing. Several processes may be given the same command:
    they share the runs.
    """
    from glua_bench import matrix

    datasets, plugin = with_descriptions(datasets, plugin)
    base = _shared_request(locals())
    asked = split_names(methods), split_names(datasets), split_names(directions or "")
    cells = matrix.comparison(*asked, seeds, base, bounds, repeats)
    _run_matrix(f"compare {', '.join(asked[0])}", cells, jobs, retry_failed, dry_run, out)


def ablate(
    method: Annotated[str, typer.Option(help="Which method; see `glua-bench list methods -v`.")],
    datasets: DatasetNames,
    directions: DirectionNames = None,
    fold: Fold = 1,
    seeds: Seeds = 3,
    repeats: Repeats = 0,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="NAME=V1,V2",
            help="Also one run for each value of a setting, e.g. lr=1e-4,1e-3,1e-2, all else "
            "as without it. Repeatable.",
        ),
    ] = None,
    variants: Annotated[
        bool,
        typer.Option("--variants/--no-variants", help="Run the variants that the method declares."),
    ] = True,
    combine: Annotated[
        bool,
        typer.Option(
            "--combine",
            help="All combinations of the values that variants and --vary give to settings, "
            "instead of one change at a time.",
        ),
    ] = False,
    bounds: Bounds = True,
    jobs: Jobs = 1,
    retry_failed: RetryFailed = False,
    out: Numbers = None,
    preset: RunPreset = None,
    set_: Assignments = None,
    augmentation: Augmentation = None,
    steps: Steps = None,
    data_root: DataRoot = None,
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    precision: Precision = None,
    plugin: Plugins = None,
    oracle: Oracle = False,
    mlflow: Mirrored = True,
    dry_run: DryRun = False,
) -> None:
    """Run a method's declared variants and varied settings side by side, and print their table.

    The bounds are there to compare with, and do not follow --set method.NAME. A value of --vary
    that makes no other run than an entry above it is that entry.
    """
    from glua_bench import matrix

    datasets, plugin = with_descriptions(datasets, plugin)
    base = _shared_request(locals())
    asked = method, split_names(datasets), split_names(directions or "")
    cells = matrix.ablation(
        *asked, seeds, base, combine, vary or [], variants, bounds, say, repeats
    )
    title = f"ablate {method}" + (", combinations" if combine else "")
    _run_matrix(title, cells, jobs, retry_failed, dry_run, out)


def _shared_request(options: Mapping[str, Any]) -> RunRequest:
    """What all runs of a matrix share, from a command's options."""
    from glua_bench.runs import RunRequest

    same = [
        "fold",
        "preset",
        "augmentation",
        "steps",
        "data_root",
        "runs_root",
        "device",
        "precision",
        "oracle",
        "mlflow",
    ]
    return RunRequest(
        method="",
        dataset="",
        assignments=options["set_"] or [],
        plugins=options["plugin"] or [],
        **{name: options[name] for name in same},
    )


def _run_matrix(
    title: str, cells: list[Cell], jobs: int, retry_failed: bool, dry_run: bool, out: Path | None
) -> None:
    from glua_bench import matrix
    from glua_bench.console import duration
    from glua_bench.reports import comparison, results

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
            cost = f", {duration(seconds[key])} a run" if left else ""
            total += left * seconds.get(key, 0.0)
            say(f"  {key[0]:<{width}}  {key[1]:<20}  {counts}{cost}")
        done = sum(item.state == "done" for item in planned)
        say(f"{len(planned)} runs, {done} done; about {duration(total / jobs)} with --jobs {jobs}.")
        say("Next: the same command without --dry-run.")
        return
    groups = matrix.by_dataset(title, planned)
    outcome = matrix.Executor(planned, jobs, retry_failed, say).run()
    say(
        f"{len(planned)} runs: {outcome.ran} run now, {outcome.before} done before, "
        f"{outcome.elsewhere} by another process, {len(outcome.failed)} failed."
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
        if out is not None:
            say(f"Wrote {', '.join(str(file) for file in comparison.write(rows, out))}")
        if request.mlflow:
            _show_in_tracker(groups, rows, request.runs_root)
    if outcome.failed:
        first = next(iter(outcome.failed.values()))
        raise RunFailure(
            f"{len(outcome.failed)} of {len(planned)} runs failed, the first because: {first} "
            "Give the same command with --retry-failed once the reason is removed."
        )
    say()
    say(f"Rows:    {request.runs_root}/*/*/*/cases.parquet")
    say_browse(request)
    members = results.record(request.runs_root, title, [p.run.directory for p in planned])
    say(f"Next:    {_report_command(members, request)}")


def _report_command(members: Path, request: RunRequest) -> str:
    """The command that reports on the runs of a comparison and no others."""
    return next_command(
        *("glua-bench", "report", "--runs", members),
        plugins=request.plugins,
        data_root=request.data_root,
    )


def _show_in_tracker(groups: list[Comparison], rows: pd.DataFrame, runs_root: Path) -> None:
    """Nest the runs of each dataset under their comparison, with its table."""
    import tempfile

    from glua_bench.reports import charts, comparison
    from glua_bench.tracking import open_tracker

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
