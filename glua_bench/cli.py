"""The commands, thin: read options, call the harness, say where the results lie.

torch, mlflow and the content packages are imported inside a command, so that `--help` and
`list` answer at once. This is also the one place that wires the harness to `reports`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glua_bench import __version__
from glua_bench.documents import SUFFIXES as DESCRIPTIONS
from glua_bench.errors import ConfigError, DataError, RunFailure, UserError
from glua_bench.interruption import Interrupted, listening
from glua_bench.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from glua_bench.matrix import Cell
    from glua_bench.runs import PlannedRun, RunRequest
    from glua_bench.sweeps.study import SweepStudy
    from glua_bench.task import Dataset
    from glua_bench.tracking import Comparison

app = typer.Typer(
    name="glua-bench",
    help="Unsupervised domain adaptation for medical image segmentation, measured so that the "
    "number can be trusted.",
    epilog="Begin with: glua-bench run --method source_only --dataset phantom",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Prepare, check or look at a dataset.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")

Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file with further methods, datasets or selectors."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="The dataset's directory; default is $GLUA_BENCH_DATA/DATASET (generated data: "
        "the cache).",
    ),
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="The directory of all runs.")]
DatasetName = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="See `glua-bench list`; or a description, FILE.yaml."),
]
PresetName = Annotated[
    str, typer.Option("--preset", help="Whose working grid: quick, standard or paper.")
]


RunPreset = Annotated[
    str | None,
    typer.Option("--preset", help="quick, standard or paper; default: quick, with a GPU standard."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting, e.g. method.mask_ratio=0.3, segmenter.name=timm:resnet18, "
        "grid.size=96, batch_size=4, slices=3. Repeatable; `list methods -v` names them.",
    ),
]
Augmentation = Annotated[
    str | None,
    typer.Option("--augmentation", help="none, geometric (default) or photometric."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Updates of the segmenter.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="32-true (default), bf16-mixed or 16-mixed."),
]
Oracle = Annotated[
    bool,
    typer.Option(
        "--oracle",
        help="Also score every checkpoint on the labelled test cases, to see what a selector "
        "misses; flagged, and never a result.",
    ),
]
Mirrored = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Mirror runs to MLflow.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run, and how long; train nothing.")
]
DatasetNames = Annotated[
    str,
    typer.Option("--datasets", "--dataset", help="Names, or descriptions FILE.yaml, by commas."),
]
DirectionNames = Annotated[
    str | None,
    typer.Option(
        "--directions",
        "--direction",
        help="all, or some by commas, e.g. mr-ct; default is each dataset's first.",
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", help="How many, from 0.")]
Bounds = Annotated[
    bool,
    typer.Option(
        "--bounds/--no-bounds",
        help="Add source_only and supervised, between which the gap lies.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs", min=1, help="Runs at once: one a GPU, or each with its share of the cores."
    ),
]
Processes = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Processes, a case each; default: all cores.")
]
Numbers = Annotated[
    Path | None,
    typer.Option("--out", help="Also write rows, table, intervals, pairs and ranking as CSV here."),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Where trials are kept: a path, or a database's URL for many machines; default is a "
        "journal in RUNS/sweeps/NAME. Also $GLUA_BENCH_STORAGE.",
        envvar="GLUA_BENCH_STORAGE",
        show_envvar=False,
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Begin again what failed earlier.")
]


def _with_descriptions(datasets: str, plugins: list[Path] | None) -> tuple[str, list[Path]]:
    """Names of datasets, and plugins: FILE.yaml among the names is a plugin with its own name."""
    names, files = [], list(plugins or [])
    for text in map(str.strip, datasets.split(",")):
        path = Path(text)
        if path.suffix in DESCRIPTIONS:
            files += [] if path in files else [path]
            text = Registry("dataset", files).name_of(path)
        names.append(text)
    return ",".join(names), files


class Where(str, Enum):
    """Where the workers of a sweep are."""

    local = "local"
    slurm = "slurm"
    debug = "debug"


class Kind(str, Enum):
    """What `list` can list."""

    methods = "methods"
    datasets = "datasets"
    selectors = "selectors"
    sweeps = "sweeps"


def say(text: str = "") -> None:
    """Print a line, on the first process of a run only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


# -- run ---------------------------------------------------------------------------------------


@app.command()
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
    dataset, plugin = _with_descriptions(dataset, plugin)
    # A wrong name is found before the seconds that importing torch takes.
    Registry("method", plugin or []).entry(method)
    Registry("dataset", plugin or []).entry(dataset)
    from glua_bench import runs
    from glua_bench.console import Progress
    from glua_bench.neighbours import Neighbourhood

    request = runs.RunRequest(
        method=method,
        dataset=dataset,
        direction=direction,
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
        f"{config.method} on {config.dataset} {config.direction}, seed {config.seed}, preset "
        f"{config.preset}, augmentation {config.augmentation}"
        + (f", slices {Neighbourhood.of(config)}" if config.slices > 1 else "")
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
    from glua_bench.runs import ORACLE

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
        dice = ", ".join(
            f"{row.selector} {row.dice:.3f}"
            for row in others.itertuples()
            if row.selector != ORACLE
        )
        say(f"Mean Dice by other selectors of the checkpoint: {dice}")
    for row in others[others["selector"] == ORACLE].itertuples():
        say(f"ORACLE (chosen by its score on the labelled test cases, no result): {row.dice:.3f}")
    say(f"Checkpoint: {primary}. Distances in {planned.dataset.distance_note}.")
    if planned.config.privileged:
        say("PRIVILEGED: trained on target labels; an upper bound, not an adaptation result.")
    if planned.dataset.protocol:
        say(f"PROTOCOL {planned.dataset.protocol}.")
    say()
    say(f"Results: {path} (cases.parquet, predictions/, figures/)")
    _say_browse(request)
    say(f"Next:    {_next_run(planned, request)}")


def _say_browse(request: RunRequest) -> None:
    from glua_bench.tracking import tracking_uri

    uri = tracking_uri(request.runs_root)
    if request.mlflow and uri.startswith("sqlite"):
        say(f"Browse:  mlflow ui --backend-store-uri {uri}")


def _score_table(table: pd.DataFrame) -> str:
    lines = [f"{'structure':<11}{'Dice':>7}{'ASSD mm':>10}{'HD95 mm':>10}{'missed':>9}"]
    for row in table.itertuples():
        missed = f"{row.misses}/{row.cases}" if row.structure != "mean" else str(row.misses)
        lines.append(
            f"{row.structure:<11}{row.dice:>7.3f}{row.assd:>10.2f}{row.hd95:>10.2f}{missed:>9}"
        )
    return "\n".join(lines)


def _next_run(planned: PlannedRun, request: RunRequest) -> str:
    """The command that makes the result comparable: both bounds, and three seeds."""
    config = planned.config
    words = [
        f"glua-bench compare --methods {config.method}",
        f"--dataset {config.dataset} --direction {config.direction}",
    ]
    words += [f"--plugin {file}" for file in request.plugins]
    words += [f"--set {assignment}" for assignment in request.assignments]
    for option, value in (
        ("--preset", request.preset),
        ("--augmentation", request.augmentation),
        ("--steps", request.steps),
        ("--data-root", request.data_root),
    ):
        if value is not None:
            words.append(f"{option} {value}")
    if request.runs_root != Path("runs"):
        words.append(f"--runs {request.runs_root}")
    if any(assignment.startswith("method.") for assignment in request.assignments):
        return " ".join([*words, "--no-bounds"])  # which do not have these settings
    return " ".join(words) + "   (both bounds, three seeds)"


# -- compare and ablate ------------------------------------------------------------------------


@app.command()
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
    seeds: Seeds = 3,
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

    datasets, plugin = _with_descriptions(datasets, plugin)
    base = _shared_request(locals())
    asked = _names(methods), _names(datasets), _names(directions or "")
    cells = matrix.comparison(*asked, seeds, base, bounds)
    _run_matrix(f"compare {', '.join(asked[0])}", cells, jobs, retry_failed, dry_run, out)


@app.command()
def ablate(
    method: Annotated[str, typer.Option(help="Which method; see `glua-bench list methods -v`.")],
    datasets: DatasetNames,
    directions: DirectionNames = None,
    seeds: Seeds = 3,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="NAME=V1,V2",
            help="Also one run for each value of a setting, e.g. mask_ratio=0.1,0.3,0.5, all else "
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

    datasets, plugin = _with_descriptions(datasets, plugin)
    base = _shared_request(locals())
    asked = method, _names(datasets), _names(directions or "")
    cells = matrix.ablation(*asked, seeds, base, combine, vary or [], variants, bounds, say)
    title = f"ablate {method}" + (", combinations" if combine else "")
    _run_matrix(title, cells, jobs, retry_failed, dry_run, out)


def _shared_request(options: Mapping[str, Any]) -> RunRequest:
    """What all runs of a matrix share, from a command's options."""
    from glua_bench.runs import RunRequest

    same = [
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
        **{name: options[name] for name in (*same, "oracle", "mlflow")},
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run_matrix(
    title: str, cells: list[Cell], jobs: int, retry_failed: bool, dry_run: bool, out: Path | None
) -> None:
    from glua_bench import matrix
    from glua_bench.console import duration
    from glua_bench.reports import comparison

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
    finished = [(p.cell.entry, p.cell.task, p.run.directory) for p in planned if p.state == "done"]
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
    _say_browse(request)
    say(f"Next:    glua-bench report --runs {request.runs_root}")


def _show_in_tracker(groups: list[Comparison], rows: pd.DataFrame, runs_root: Path) -> None:
    """Nest the runs of each dataset under their comparison, with its table."""
    import tempfile

    from glua_bench.reports import charts, comparison
    from glua_bench.tracking import MLflowMirror

    mirror = MLflowMirror(runs_root, warn)
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
            if not mirror.nest(group, comparison.as_metrics(lines), files, note):
                return  # one warning is enough


@app.command()
def report(
    runs_root: RunsRoot = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The directory of the report; default: report, of a sweep its own."
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="The report of a sweep, by its name.")
    ] = None,
    storage: Storage = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="A rows.parquet of a report, instead of run directories."),
    ] = None,
    tracker: Annotated[
        bool,
        typer.Option(
            "--from-mlflow",
            help="The runs of the MLflow store ($MLFLOW_TRACKING_URI, else that of --runs), "
            "instead of run directories.",
        ),
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            help="Only such runs, e.g. dataset=phantom, steps=500, method=glua,sifa. Repeatable.",
        ),
    ] = None,
    selector: Annotated[
        str, typer.Option("--selector", help="Whose checkpoints count; default: last.")
    ] = "last",
    title: Annotated[
        str, typer.Option("--title", help="Of the page.")
    ] = "Comparison of adaptation methods",
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw cases side by side.")
    ] = True,
    viewer: Annotated[
        bool,
        typer.Option("--viewer", help="Embed a viewer of volumes (NiiVue; needs npm once)."),
    ] = False,
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Write a page, tables (LaTeX, CSV, Markdown) and figures (SVG, PNG) of finished runs."""
    import tempfile

    if sweep is not None:
        if rows is not None or tracker or where:
            raise ConfigError(
                "--sweep takes all trials of one sweep; leave --rows, --from-mlflow and --where "
                "out, or leave --sweep out."
            )
        from glua_bench.sweeps import command

        study, base = command.join(sweep, runs_root, storage, plugin or [], say)
        page = _report_sweep(study, base, out or study.folder / "report")
        say(f"Report: {page}")
        say(f"Next:   open {page}; {command.next_command(study, base)}")
        return
    from glua_bench.reports import report as reporting
    from glua_bench.reports import results

    out = out or Path("report")

    chosen = results.parse_where(where or [])
    options = reporting.Options(selector, title, pictures, viewer, data_root, plugin or [])
    if rows is not None and tracker:
        raise ConfigError("--rows and --from-mlflow name two sources; give one of them.")
    with tempfile.TemporaryDirectory() as scratch:
        if rows is not None:
            found = results.from_rows(rows, chosen, plugin or [], warn)
        elif tracker:
            from glua_bench import tracking

            tracking.fetch_runs(tracking.tracking_uri(runs_root), Path(scratch), warn=warn)
            found = results.from_runs(Path(scratch), chosen, plugin or [], warn)
        else:
            found = results.from_runs(runs_root, chosen, plugin or [], warn)
        files = reporting.write(found, out, options, say)
    say()
    for sentence in reporting.summary(found, options):
        say(sentence)
    say()
    say(f"Report: {files[0]}   ({len(files) - 1} further files in {out})")
    say(f"Next:   open {files[0]}, and take {out}/tables/*.tex into a paper")


# -- predict and export ------------------------------------------------------------------------


RunName = Annotated[
    str | None,
    typer.Option("--run", help="A finished run: its directory, or its id or the beginning of it."),
]
SelectorName = Annotated[str, typer.Option("--selector", help="Whose checkpoint of the run.")]


@app.command()
def predict(
    images: Annotated[
        list[Path], typer.Argument(help="NIfTI, NRRD or MetaImage, of either domain.")
    ],
    run: RunName = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A directory that `export` wrote.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory of the results.")] = Path(
        "predicted"
    ),
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the classes' probabilities.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also draw slices with contours.")
    ] = False,
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Segment new volumes with a finished run or an exported model."""
    from glua_bench import prediction
    from glua_bench.console import Progress

    if (run is None) == (model is None):
        raise ConfigError("Give either --run or --model, which say what segments.")
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise DataError(f"The image {missing[0]} does not exist; check the names of the images.")
    if model is not None:
        loaded = prediction.from_directory(model, plugin or [], device)
    else:
        found = prediction.find_run(str(run), runs_root)
        loaded = prediction.from_run(found, plugin or [], device, selector)
    config = loaded.config
    say(
        f"{config.method}, trained on {config.dataset} {config.direction}"
        + (", PRIVILEGED (trained on target labels)" if config.privileged else "")
    )
    results = []
    with Progress() as progress:
        progress.stage("segment", len(images))
        for result in prediction.predict(loaded, images, out, probabilities, progress.update):
            results.append(result)
            if overlay:
                from glua_bench.reports.run_figures import draw_prediction

                name = prediction.name_of(result.file)
                draw_prediction(
                    out / f"{name}.png",
                    result.slices,
                    result.classes,
                    loaded.structures,
                    name,
                    loaded.publishable,
                )
    table = prediction.volumes_table(results)
    table.to_csv(out / "volumes.csv", index=False)
    say()
    for result in results:
        volumes = ", ".join(f"{name} {ml:.1f} ml" for name, ml in result.ml.items())
        say(f"{result.labels}: {volumes}")
    say(f"Volumes: {out / 'volumes.csv'}")
    if overlay and not loaded.publishable:
        say("The pictures may show the data's owner's images: look at them, do not pass them on.")
    say("Next:    open an image with its _seg file in a viewer, and look before you count on it.")


@app.command()
def export(
    run: RunName = None,
    out: Annotated[Path, typer.Option("--out", help="A new directory.")] = Path("model"),
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """Write a finished run's model: weights, configuration, card and licence, without the run."""
    from glua_bench import prediction

    if run is None:
        raise ConfigError("--run is missing; give a finished run's directory or id.")
    found = prediction.find_run(run, runs_root)
    loaded = prediction.from_run(found, plugin or [], "cpu", selector)
    folder = prediction.export(loaded, found, out, selector)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    say(f"Wrote {folder} ({size:.1f} MiB): {', '.join(sorted(f.name for f in folder.iterdir()))}")
    say(f"Next: glua-bench predict --model {folder} IMAGE.nii.gz")


# -- sweep -------------------------------------------------------------------------------------


@app.command()
def sweep(
    file: Annotated[
        str, typer.Argument(help="A sweep's YAML file, or the name of one: `list sweeps`.")
    ],
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, each with its GPU or cores.")
    ] = 1,
    trials: Annotated[int | None, typer.Option(min=1, help="In the place of the file's.")] = None,
    dataset: Annotated[str | None, typer.Option(help="In the place of the file's.")] = None,
    directions: DirectionNames = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Of every trial, in the place of the file's.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="auto: every setting of the method that has a range.")
    ] = None,
    storage: Storage = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a sweep that has begun, or say it has not.")
    ] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="Begin a new study beside one of the same name.")
    ] = False,
    preset: RunPreset = None,
    steps: Steps = None,
    data_root: DataRoot = None,
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    devices: Annotated[
        int, typer.Option(help="Processes of each run, one a GPU (or CPU).", min=1)
    ] = 1,
    precision: Precision = None,
    plugin: Plugins = None,
    oracle: Oracle = False,
    mlflow: Mirrored = True,
    executor: Annotated[
        Where,
        typer.Option(
            help="Where workers are: local, processes of this machine; slurm, jobs of a cluster; "
            "debug, one in this process."
        ),
    ] = Where.local,
    slurm: Annotated[
        Path | None,
        typer.Option("--slurm", help="A YAML file of what a job asks for: docs/cluster.md."),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Leave the jobs to SLURM; the same command looks at them."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Search settings of a method by a score that needs no target label.

    The same command again goes on where it was, and does nothing for a finished sweep.
    """
    if (slurm is not None) != (executor is Where.slurm):
        raise ConfigError(
            "--executor slurm and --slurm FILE.yaml belong together; give both or neither."
        )
    if detach and executor is not Where.slurm:
        raise ConfigError("--detach leaves jobs to SLURM; add --executor slurm, or leave it out.")
    if dataset is not None:
        dataset, plugin = _with_descriptions(dataset, plugin)
    from glua_bench.console import Progress
    from glua_bench.runs import RunRequest
    from glua_bench.sweeps import command, definition
    from glua_bench.sweeps.slurm import read

    resources = None if slurm is None else read(slurm, devices)

    told = definition.read(
        definition.find(file),
        oracle,
        plugin or [],
        trials=trials,
        dataset=dataset,
        directions=_names(directions or ""),
        seeds=seeds,
        space=space,
        preset=preset,
    )
    base = RunRequest(
        told.method,
        told.dataset,
        steps=steps,
        data_root=data_root,
        runs_root=runs_root,
        device=device,
        devices=devices,
        precision=precision,
        plugins=plugin or [],
        oracle=oracle,
        mlflow=mlflow,
    )
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
                study, base, storage, workers, resources, detach, sys.stdout, say
            ):
                say("Next: the same command without --detach shows what they do.")
                return
        elif executor is Where.debug:
            with listening():
                command.run_worker(study, base, say, Progress())
        else:
            command.run_crew(study, base, storage, workers, sys.stdout)
    except KeyboardInterrupt:
        _end(
            f"interrupted; what is done is kept in {study.folder}, and the same command goes on.",
            130,
        )
    for line in command.conclude(study):
        say(line)
    page = _report_sweep(study, base, study.folder / "report")
    say(f"Report: {page}")
    _say_browse(base)
    say(f"Next:   {command.next_command(study, base)}")
    if not command.has_value(study):
        raise typer.Exit(1)


def _report_sweep(study: SweepStudy, base: RunRequest, out: Path) -> Path:
    """Write a sweep's report, and show the sweep in the tracker."""
    from glua_bench.reports import sweep_report
    from glua_bench.sweeps import results
    from glua_bench.tracking import MLflowMirror

    found = sweep_report.Sweep(**results.collect(study, base.runs_root))
    files = sweep_report.write(found, out)
    for sentence in sweep_report.sentences(found)[1:]:
        say(sentence)
    group = results.group(study, base.runs_root) if base.mlflow else None
    if group is not None:
        note = "\n\n".join([*sweep_report.notices(found), *sweep_report.sentences(found)])
        shown = [file for file in files if file.suffix in (".csv", ".png", ".html")]
        MLflowMirror(base.runs_root, warn).nest(group, sweep_report.as_metrics(found), shown, note)
    return files[0]


@app.command()
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


# -- list --------------------------------------------------------------------------------------


@app.command(name="list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Only these.")] = None,
    plugin: Plugins = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Settings too (imports the methods).")
    ] = False,
) -> None:
    """List methods, datasets, selectors and sweeps: what each does, its paper, what it needs."""
    import textwrap

    broken = 0
    for chosen in [kind] if kind is not None else list(Kind):
        if chosen is Kind.sweeps:
            _list_sweeps()
            continue
        singular = chosen.value[:-1]
        entries = Registry(singular, plugin or []).entries()
        say(chosen.value.capitalize())
        for entry in entries:
            if entry.error:
                broken += 1
                say(f"  {entry.name:<13} BROKEN ({entry.origin}): {entry.error}")
                continue
            say(f"  {entry.name:<13} {entry.summary}")
            for label, key in (("paper", "reference"), ("needs", "needs")):
                text = entry.attributes.get(key)
                if text:
                    say(
                        textwrap.fill(
                            f"{label}: {text}",
                            96,
                            initial_indent=" " * 16,
                            subsequent_indent=" " * 23,
                        )
                    )
            if verbose and singular == "method":
                _list_settings(Registry(singular, plugin or []).load(entry.name))
        say()
    if broken:
        say(f"{broken} plugin(s) cannot be used; repair or uninstall them.")
    if kind is Kind.sweeps:
        say("Next: glua-bench sweep NAME --dry-run, or glua-bench sweep --help")
    else:
        say("Next: glua-bench run --method NAME --dataset NAME, or glua-bench run --help")


def _list_sweeps() -> None:
    import textwrap

    from glua_bench.documents import read_document
    from glua_bench.sweeps.definition import shipped

    say("Sweeps")
    for name, file in shipped().items():
        text = read_document(file)
        space, objective = text.take("space", object), text.take("objective", object)
        judged = ", ".join(objective) if isinstance(objective, list) else objective
        searched = space if isinstance(space, str) else ", ".join(space)
        say(f"  {name:<17} {text.take('title', str)}")
        told = (
            f"{text.take('method', str)}: {searched}; judged by {judged}, "
            f"{text.take('sampler', str, 'tpe')}"
        )
        say(textwrap.indent(textwrap.fill(told, 76), " " * 20))
    say(f"  Files: {shipped()['example'].parent}; example.yaml is the one to copy.")
    say()


def _list_settings(method: Any) -> None:
    from dataclasses import fields

    for spec in fields(method.Config):
        meta = spec.metadata
        allowed = ""
        if meta.get("choices"):
            allowed = f" [{', '.join(map(str, meta['choices']))}]"
        elif meta.get("low") is not None:
            allowed = f" [{meta['low']:g} to {meta['high']:g}]"
        say(f"{'':16}method.{spec.name} = {spec.default}{allowed}  {meta.get('help', '')}")


# -- data --------------------------------------------------------------------------------------


def _dataset(name: str, root: Path | None, plugins: list[Path] | None) -> Dataset:
    name, plugins = _with_descriptions(name, plugins)
    loaded: Dataset = Registry("dataset", plugins or []).load(name)(root)
    loaded.prepare(say)
    return loaded


@data_app.command()
def prepare(
    dataset: DatasetName,
    data_root: DataRoot = None,
    preset: PresetName = "quick",
    jobs: Processes = None,
    plugin: Plugins = None,
) -> None:
    """Generate or find a dataset's files, and preprocess them into the cache."""
    from glua_bench.cache import cache_root
    from glua_bench.console import Progress
    from glua_bench.preparation import prepare_cases

    data = _dataset(dataset, data_root, plugin)
    with Progress() as progress:
        problems = prepare_cases(data, data.grid(preset), progress, jobs)
    for domain in data.domains():
        counts = ", ".join(f"{len(data.split(domain, s))} {s}" for s in ("train", "val", "test"))
        bare = sum(case.label is None for case in data.cases(domain))
        note = f"; {bare} without a label, target images only" if bare else ""
        say(f"{domain}: {counts}{note}")
    say(f"Files: {data.root}   cache: {cache_root()}")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    if problems:
        raise DataError(
            f"Not all cases of '{dataset}' in {data.root} could be prepared; repair or replace the "
            "files named above and give the same command again, which does the rest."
        )
    say(f"Next: glua-bench data show {dataset}{_root_option(data_root)}")


@data_app.command()
def check(
    dataset: DatasetName,
    data_root: DataRoot = None,
    jobs: Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write what is found to this CSV file.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Read every file of a dataset; say what cannot be used, and what looks wrong.

    The labels of all cases are read, of the target's too: that is no training, and nothing of it
    reaches a run.
    """
    from glua_bench.console import Progress
    from glua_bench.findings import write_findings
    from glua_bench.integrity import check_dataset, refuse_problems, summary
    from glua_bench.parallel import cores

    data = _dataset(dataset, data_root, plugin)
    with Progress() as progress:
        facts, findings = check_dataset(data, progress, jobs or cores())
    names = [structure.name for structure in data.structures]
    say(
        f"{'case':<14}{'split':<7}{'voxels':<16}{'mm':<20}"
        + "".join(f"{n + ' ml':>10}" for n in names)
    )
    for one in facts:
        line = f"{one.case.id:<14}{one.case.split:<7}"
        if one.image is not None:
            line += f"{'×'.join(map(str, one.image.shape)):<16}"
            line += f"{'×'.join(f'{value:.2f}' for value in one.image.spacing):<20}"
        if one.image is not None and one.label is not None:
            line += "".join(f"{s.ml if s else 0:>10.1f}" for s in one.label.structures)
        say(line.rstrip())
    if findings:
        say()
    for found in findings:
        say(f"{found.severity} ({found.check}): {found.text}")
    if out is not None:
        write_findings(out, findings)
        say(f"Written: {out}")
    refuse_problems(findings, len(facts), f"'{dataset}' in {data.root}")
    say(f"All {len(facts)} cases in {data.root} can be used; {summary(findings)}.")
    root = _root_option(data_root)
    say(f"Next: glua-bench data show {dataset}{root}")
    say(f"      glua-bench run --method source_only --dataset {dataset}{root}")


@data_app.command()
def fingerprint(
    dataset: DatasetName,
    data_root: DataRoot = None,
    jobs: Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write it, to FILE.json or FILE.yaml.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A fingerprint: say what differs from it.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Sum a dataset up without a voxel, a name or a path; compare it with another's sum."""
    from glua_bench import fingerprint as sums
    from glua_bench.console import Progress
    from glua_bench.facts import gather
    from glua_bench.parallel import cores

    if out is not None:
        sums.format_of(out)  # before everything is read
    known = sums.read(against) if against is not None else None
    data = _dataset(dataset, data_root, plugin)
    with Progress() as progress:
        facts = gather(data, jobs or cores(), progress)
    table = sums.fingerprint(data, facts)
    for line in sums.describe(table):
        say(line)
    if out is not None:
        sums.write(out, table)
        say(f"Written: {out}")
    if known is not None:
        say()
        names = {sums.case_digest(one): one.case.id for one in facts}
        found = sums.differences(table, known, names)
        for sentence in found:
            say(sentence)
        if found:
            raise DataError(f"The data of '{dataset}' in {data.root} are not those of {against}.")
        say(f"The same cases in the same splits as {against}.")


@data_app.command(name="export")
def export_data(
    dataset: DatasetName,
    to: Annotated[Path, typer.Option("--to", help="Directory of the export.")],
    data_root: DataRoot = None,
    number: Annotated[
        int, typer.Option("--number", help="Of the first domain's dataset; the others count on.")
    ] = 501,
    link: Annotated[
        bool, typer.Option("--link", help="Link images where they can stay as they are.")
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", help="Also the predictions of this finished run.")
    ] = None,
    runs_root: RunsRoot = Path("runs"),
    jobs: Processes = None,
    plugin: Plugins = None,
) -> None:
    """Write a dataset, its splits and a run's predictions as nnU-Net keeps them."""
    from glua_bench import nnunet
    from glua_bench.console import Progress
    from glua_bench.parallel import cores

    data = _dataset(dataset, data_root, plugin)
    found = None
    if run is not None:
        from glua_bench.prediction import find_run

        found = find_run(run, runs_root)
        if found.config.dataset != data.name:
            raise ConfigError(
                f"--run {run} is a run on '{found.config.dataset}', not on '{data.name}': give one "
                "of this dataset."
            )
    with Progress() as progress:
        made = nnunet.export(data, to, number, link, jobs or cores(), progress)
        if found is not None:
            target = found.config.target
            folder = nnunet.folder_of(data, target, to, number).name
            place = to / nnunet.PREDICTIONS / folder / f"{found.config.method}_{found.id}"
            count = nnunet.export_predictions(
                data, target, found.predictions, place, jobs or cores(), progress
            )
    for one in made:
        note = f"; {one.left_out} without a label are left out" if one.left_out else ""
        say(f"{one.folder}: {one.cases} cases, {one.mebibytes:.1f} MiB{note}")
        if not (one.folder / "splits_final.json").is_file():
            say("  no validation cases, so nnU-Net will draw splits of its own")
    if found is not None:
        say(f"{place}: predictions of {count} test cases")
    if not data.publishable:
        say("The owner's terms hold for the copies as well.")
    say(f"Next: export nnUNet_raw={to / nnunet.RAW} nnUNet_preprocessed={to / nnunet.PREPROCESSED}")
    say(f"      nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity")


@data_app.command()
def show(
    dataset: DatasetName,
    data_root: DataRoot = None,
    preset: PresetName = "standard",
    out: Annotated[Path, typer.Option(help="Directory of the pictures.")] = Path("figures"),
    plugin: Plugins = None,
) -> None:
    """Draw each domain: slices with label contours, and how intensities are distributed."""
    data = _dataset(dataset, data_root, plugin)
    from glua_bench.reports.run_figures import draw_dataset

    for file in draw_dataset(data, data.grid(preset), out):
        say(f"Wrote {file}")
    if not data.publishable:
        say("These pictures show the data's owner's images: look at them, do not pass them on.")
    say(f"Next: glua-bench run --method source_only --dataset {dataset}{_root_option(data_root)}")


def _root_option(root: Path | None) -> str:
    return "" if root is None else f" --data-root {root}"


# -- plugins ------------------------------------------------------------------------------------


Out = Annotated[Path, typer.Option("--out", help="Directory of the new files.")]


@app.command()
def new_method(
    name: Annotated[str, typer.Argument(help="Of the method, e.g. my_method.")],
    out: Out = Path("."),
) -> None:
    """Write a method that runs, with its settings, its card and its conformance test."""
    from glua_bench import scaffold

    file, test = scaffold.new_method(name, out)
    say(f"Wrote {file} and {test}; it runs as it is, and is yours to change.")
    say(f"Check: pytest {test}")
    say(f"Next:  glua-bench run --plugin {file} --method {name} --dataset phantom")


@app.command()
def new_dataset(
    name: Annotated[str, typer.Argument(help="Of the dataset, e.g. my_data.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="The directory of your volumes.")
    ] = None,
    out: Out = Path("."),
    domains: Annotated[
        str | None,
        typer.Option(help="Names of the domains, e.g. ct,mr: words in the files' paths."),
    ] = None,
    structures: Annotated[
        str | None,
        typer.Option(help="Structures and their raw label values, e.g. liver=1,spleen=4."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take what the files suggest.")
    ] = False,
    python: Annotated[
        bool,
        typer.Option("--python", help="Write a class with its test, for what YAML cannot say."),
    ] = False,
) -> None:
    """Describe your own volumes for the other commands: asks, guesses, and writes NAME.yaml."""
    from glua_bench import scaffold

    names = tuple(part.strip() for part in (domains or "").split(",") if part.strip())
    if names and len(names) < 2:
        raise ConfigError(f"--domains {domains} does not name two domains; write e.g. ct,mr.")
    given = None if structures is None else scaffold.parse_structures(structures)
    if python:
        if len(names) > 2:
            raise ConfigError(f"--domains {domains} names more than two; give two with --python.")
        pair = (names[0], names[1]) if names else ("ct", "mr")
        file, test = scaffold.new_dataset(name, out, pair, given or {"organ": 1})
        say(f"Wrote {file} and {test}; set splits, orientation and grids in it.")
        say(f"Files: DIRECTORY/{{{pair[0]},{pair[1]}}}/PERSON_image.nii.gz and PERSON_label.nii.gz")
        say(f"Next:  glua-bench data check {name} --plugin {file} --data-root DIRECTORY")
        return
    from glua_bench.console import ask

    asked = not yes and sys.stdin.isatty()
    if data is None:
        if not asked:
            raise ConfigError(
                "new-dataset needs the directory of your volumes: give --data DIRECTORY, or "
                "--python for a class to fill in."
            )
        data = ask("Directory of the volumes", ".", Path)
    file = scaffold.new_description(name, out, data, partial(ask, asked=asked), names, given)
    say(f"Wrote {file}: read it, and change what is not so.")
    say(f"Next: glua-bench data check {file}")


# -- sync and doctor ---------------------------------------------------------------------------


@app.command()
def sync(runs_root: RunsRoot = Path("runs")) -> None:
    """Send to MLflow what it has missed; runs that it has are left alone."""
    if not runs_root.is_dir():
        raise ConfigError(
            f"There is no directory {runs_root}; name the one of your runs by --runs."
        )
    from glua_bench.tracking import MLflowMirror

    mirror = MLflowMirror(runs_root)
    counts = mirror.sync()
    say(
        f"{mirror.place}: {counts.uploaded} runs sent, {counts.present} there before, "
        f"{counts.unfinished} unfinished and left out, {counts.missed} not taken."
    )
    if counts.missed:
        raise RunFailure(
            f"The tracker at {mirror.place} did not take {counts.missed} runs; check "
            "MLFLOW_TRACKING_URI and give the command again, nothing is lost."
        )
    say(f"Next: mlflow ui --backend-store-uri {mirror.place}")


@app.command()
def doctor(runs_root: RunsRoot = Path("runs"), plugin: Plugins = None) -> None:
    """Versions, devices, data, tracker, plugins: what works here and what to do next."""
    from glua_bench.doctor import examine

    findings, todo = examine(runs_root, plugin or [])
    width = max(len(name) for name, _ in findings)
    for name, text in findings:
        say(f"{name:<{width}}  {text}")
    say()
    for line in todo:
        say(f"Next: {line}")


# -- entry -------------------------------------------------------------------------------------


def _version(show: bool) -> None:
    if show:
        print(f"glua-bench {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """The console script: errors are one sentence, without a traceback."""
    try:
        app()
    except (UserError, RunFailure) as error:
        _end(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Typer turns an interruption within a command into this code, and says nothing.
        if isinstance(stop, SystemExit) and (stop.code != 130 or isinstance(stop, _Told)):
            raise
        _end("interrupted; the same command resumes.", 130)
    except Interrupted as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # the first process of the run says it; an error here would kill that one
        _end(f"ended by {error}, after a checkpoint; the same command resumes.", 128 + error.number)
    except BrokenPipeError:
        # The reader of a pipe (e.g. head) has gone; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("GLUA_BENCH_DEBUG"):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        _end(
            f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno} ({text}); this "
            "is a defect of glua-bench or of a plugin: set GLUA_BENCH_DEBUG=1 to see where, and "
            "report it.",
            1,
        )


class _Told(SystemExit):
    """An end whose reason has been said."""


def _end(message: str, code: int) -> None:
    sys.stdout.flush()
    print(f"glua-bench: error: {message}", file=sys.stderr, flush=True)
    raise _Told(code)
