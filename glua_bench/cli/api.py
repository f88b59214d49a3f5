"""The Python interface: run, compare, load results, predict and score.

The functions take the options of the commands of the same names, and call the same functions.
Mistakes raise a `UserError` with the sentence that a command prints; a training that fails raises a
`RunFailure`.
"""

from __future__ import annotations

import html
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from glua_bench.cli.options import split_names
from glua_bench.config import RunConfig, assignment
from glua_bench.console import Progress
from glua_bench.documents import nearest
from glua_bench.errors import ConfigError, RunFailure, UserError, printable
from glua_bench.records.naming import Comparison, label_stamps
from glua_bench.records.run_directory import RunDirectory, check_predictions, unsealed_note
from glua_bench.registry import Registry, with_descriptions
from glua_bench.reports import comparison, results
from glua_bench.runs import configuration, execution, inputs, matrix, prediction
from glua_bench.runs import plan as planning
from glua_bench.runs.external import Guest
from glua_bench.runs.interruption import listening
from glua_bench.runs.matrix import Planned
from glua_bench.runs.plan import PlannedRun
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.scoring.files import score_files
from glua_bench.task import Structure

PathLike = str | Path
_FILES = ("data_root", "runs_root", "plugins")  # options that hold paths
_NOT_HERE = ("assignments", "runs_root", "devices")  # options with another name, or none


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run.

    Attributes:
        path: directory of the run.
        scores: mean over the test cases, indexed by structure, for the checkpoint of the first
            selector; distances in mm.
        cases: scores per case, structure and selector.
        config: complete configuration.
        already_done: True if the run was finished before.
        seconds: duration; 0 if it was finished before.
        stamps: what limits the result, from `stamps`.
    """

    path: Path
    scores: pd.DataFrame
    cases: pd.DataFrame
    config: RunConfig
    already_done: bool
    seconds: float
    stamps: Sequence[str] = ()

    @property
    def id(self) -> str:
        """Identity of the run."""
        return self.path.name

    @property
    def title(self) -> str:
        """Method, task, seed and checkpoint in words."""
        privileged = ", privileged (trained on target labels)" if self.config.privileged else ""
        return (
            f"{self.config.method} on {self.config.fold_name} {self.config.direction}, "
            f"seed {self.config.seed}, checkpoint by {self.config.selectors[0]}{privileged}"
        )

    def __repr__(self) -> str:
        return f"RunResult({self.title}: {self.path})"

    def _repr_html_(self) -> str:
        """Show title and scores in a notebook."""
        table = self.scores.to_html(float_format="{:.3f}".format)
        return f"<p>{html.escape(self.title)}</p>{table}{_paragraphs(self.stamps)}"


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """The finished runs of a comparison.

    Attributes:
        table: means and standard deviations over seeds, indexed by task and entry (see
            `reports.comparison.table`).
        verdicts: task → the best entry in one sentence, with its confidence interval.
        rows: scores per run, case, structure and selector.
        counts: number of runs that were run now, done before, run elsewhere, and failed.
        failed: id → reason of failed runs.
        members: file for `glua-bench report --runs`.
        stamps: what limits the results, from `stamps`.
    """

    table: pd.DataFrame
    verdicts: dict[str, str]
    rows: pd.DataFrame
    counts: dict[str, int]
    failed: dict[str, str]
    members: Path
    stamps: Sequence[str] = ()

    def check(self) -> None:
        """Raise an error if runs failed.

        Raises:
            RunFailure: the number of failed runs and the reason of the first.
        """
        if self.failed:
            first = next(iter(self.failed.values()))
            raise RunFailure(
                f"{len(self.failed)} of {sum(self.counts.values())} runs failed; reason of the "
                f"first: {first} Fix the cause and repeat the command with --retry-failed."
            )

    def __repr__(self) -> str:
        return f"ComparisonResult({' '.join(self.verdicts.values())})"

    def _repr_html_(self) -> str:
        """Show table and verdicts in a notebook."""
        shown = self.table.dropna(axis="columns", how="all")
        texts = [*self.verdicts.values(), *self.stamps]
        return shown.to_html(float_format="{:.3f}".format) + _paragraphs(texts)


def stamps(runs: Sequence[PlannedRun], imported: Sequence[RunDirectory] = ()) -> list[str]:
    """Return the sentences that are printed with results: protocol, caveats, labels, seals."""
    found: dict[str, None] = {}
    for run in runs:
        if protocol := run.dataset.protocol:
            found[f"PROTOCOL {protocol}."] = None
        if caveat := run.dataset.caveat(run.config.direction):
            found[f"CAVEAT {caveat}."] = None
    if note := unsealed_note([*(run.directory for run in runs), *imported]):
        found[note] = None
    recorded = []
    for run in runs:
        with suppress(UserError):  # not run yet, or not readable
            recorded.append(run.directory.read_environment())
    return [*found, *label_stamps(recorded)]


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def run(
    method: str | None = None,
    dataset: PathLike | None = None,
    direction: str | None = None,
    *,
    seed: int | None = None,
    fold: int | None = None,
    scenario: str | None = None,
    settings: Mapping[str, Any] | None = None,
    config: PathLike | None = None,
    runs: PathLike = "runs",
    quiet: bool = False,
    **options: Any,
) -> RunResult:
    """Train and evaluate one method on one dataset, as `glua-bench run` does.

    The same call resumes an interrupted run, and returns the result of a finished one.

    Args:
        method: name of the method.
        dataset: name of the dataset, or a description (FILE.yaml).
        direction: "source-target"; default: the dataset's first.
        seed: random seed; default: 0.
        fold: fold of the dataset; default: 1.
        scenario: "uda" (default) or "supervised".
        settings: name → value, by the names that `--set` takes, e.g. {"method.lr": 1e-3}.
        config: `config.yaml` of a run to repeat; the other arguments override it.
        runs: directory of all runs.
        quiet: print nothing.
        options: other options of the command, by their names with underscores: preset, steps,
            augmentation, data_root, device, precision, plugins (`--plugin`), selectors (names),
            oracle, mlflow, ….

    Raises:
        UserError: an argument is invalid.
        RunFailure: the training failed.
    """
    report = _reporter(quiet)
    given: dict[str, Any] = {
        "method": method,
        "dataset": None if dataset is None else str(dataset),
        "direction": direction,
        "seed": seed,
    }
    given |= {"fold": fold, "scenario": scenario}
    chosen = {name: value for name, value in given.items() if value is not None}
    shared = _options(RunOptions, settings, runs, options)
    if config is not None:
        named = {*chosen, *options, *(["assignments"] if settings else [])}
        base = RunRequest(**{"method": "", "dataset": "", **vars(shared), **chosen})
        request = configuration.of_run(Path(config), base, named, report)
    else:
        for needed in ("method", "dataset"):
            if needed not in chosen:
                raise ConfigError(f"'{needed}' is missing; give it, or config=FILE.")
        request = RunRequest(**{**vars(shared), **chosen})
    name, plugins = with_descriptions(request.dataset, request.plugins)
    request = replace(request, dataset=name, plugins=plugins)
    # Names first, because they are checked without reading any data.
    Registry("method", request.plugins).entry(request.method)
    planned = planning.plan(request, report)
    from glua_bench.reports.run_figures import draw_run

    with _signals(), Progress(enabled=not quiet) as progress:
        summary = execution.execute(planned, progress, draw_run)
    for text in summary.warnings:
        warnings.warn(printable(text), stacklevel=2)
    table = summary.table[summary.table["selector"] == planned.config.selectors[0]]
    return RunResult(
        planned.directory.path,
        table.drop(columns="selector").set_index("structure"),
        planned.directory.read_cases(),
        planned.config,
        summary.already_done,
        summary.seconds,
        stamps([planned]),
    )


def compare(
    methods: str | Sequence[str] = (),
    datasets: PathLike | Sequence[PathLike] = (),
    directions: str | Sequence[str] = (),
    *,
    seeds: int | None = None,
    fold: int | None = None,
    repeats: int | None = None,
    bounds: bool | None = None,
    jobs: int = 1,
    retry_failed: bool = False,
    settings: Mapping[str, Any] | None = None,
    config: PathLike | None = None,
    runs: PathLike = "runs",
    quiet: bool = False,
    **options: Any,
) -> ComparisonResult:
    """Run several methods under one protocol, as `glua-bench compare` does.

    Each run has its own process, also in a notebook. The same call resumes the comparison.

    Args:
        methods: names; NAME+photometric sets the augmentation, "supervised" is the upper bound.
            Names of imported entries are added to the table.
        datasets: names or descriptions (FILE.yaml).
        directions: e.g. "mr-ct", or "all"; default: each dataset's first.
        seeds: number of seeds; default: 3.
        fold: fold of the datasets; default: 1.
        repeats: extra trainings of seed 0 with perturbed last bits of the initial weights.
        bounds: include both bounds, source_only and supervised; default: True.
        jobs: concurrent runs.
        retry_failed: retry failed runs.
        settings: as in `run`, for all entries.
        config: comparison file (docs/configuration-files.md) instead of `methods`; the other
            arguments override it.
        runs: directory of all runs.
        quiet: print nothing.
        options: other options of the command, as in `run`.

    Raises:
        UserError: an argument is invalid.
        RunFailure: runs failed; the others are kept.
    """
    report = _reporter(quiet)
    given: dict[str, Any] = {"seeds": seeds, "fold": fold, "repeats": repeats, "bounds": bounds}
    given |= {"datasets": _names(datasets), "directions": _names(directions)}
    chosen = {name: value for name, value in given.items() if value is not None and value != []}
    shared = _options(RunOptions, settings, runs, options)
    named = {*chosen, *options, *(["assignments"] if settings else [])}
    asked = configuration.comparison(
        _names(methods), None if config is None else Path(config), chosen, shared, named
    )
    cells = asked.cells()
    guests = matrix.guests(cells, asked.imported, report)
    planned = matrix.plan(cells, report)
    result = conduct(
        asked.title, planned, jobs, retry_failed, report, _warn, asked.named, guests, quiet
    )
    result.check()
    return result


def conduct(
    title: str,
    planned: Sequence[Planned],
    jobs: int,
    retry_failed: bool,
    report: Callable[[str], None],
    warn: Callable[[str], None],
    named: bool = False,
    guests: Sequence[Guest] = (),
    quiet: bool = False,
) -> ComparisonResult:
    """Execute the runs of a comparison or an ablation, and summarise those that finished.

    Args:
        title: title of the command, e.g. "compare glua, sifa".
        planned: the runs.
        jobs: concurrent runs.
        retry_failed: retry failed runs.
        report: receives lines on progress.
        warn: receives warnings.
        named: keep the names of the entries for reports, which otherwise derive them from settings.
        guests: imported entries of the same tables.
        quiet: show no progress bar.
    """
    from glua_bench.runs.executor import Executor
    from glua_bench.runs.timing.display import Display

    groups = matrix.by_dataset(title, planned, guests)
    if lacking := execution.lacking_note([one.run for one in planned if one.state == "done"]):
        warn(lacking)
    with Display(report, None if quiet else sys.stdout) as display:
        outcome = Executor(planned, jobs, retry_failed, display.line, show=display.show).run()
    request = planned[0].run.request
    finished = matrix.finished(planned)
    finished += [(guest.entry, guest.task, guest.run) for guest in guests]
    rows = comparison.collect(finished) if finished else pd.DataFrame()
    tasks = [str(task) for task in rows["task"].unique()] if finished else []
    if finished and request.mlflow:
        _show_in_tracker(groups, rows, request.runs_root, warn)
    names = {item.run.id: item.cell.entry for item in planned} if named else None
    members = [*(item.run.directory for item in planned), *(guest.run for guest in guests)]
    return ComparisonResult(
        comparison.table(rows) if finished else pd.DataFrame(),
        {task: comparison.verdict(rows, task) for task in tasks},
        rows,
        {
            "ran": outcome.ran,
            "before": outcome.before,
            "elsewhere": outcome.elsewhere,
            "failed": len(outcome.failed),
        },
        outcome.failed,
        results.record(request.runs_root, title, members, names),
        stamps([item.run for item in planned], [guest.run for guest in guests]),
    )


def _show_in_tracker(
    groups: Sequence[Comparison], rows: pd.DataFrame, runs_root: Path, warn: Callable[[str], None]
) -> None:
    """Group the runs of each dataset under their comparison, with its table."""
    import tempfile

    from glua_bench.records.tracker import open_tracker
    from glua_bench.reports import charts

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


def load_results(
    path: PathLike = "runs",
    where: Mapping[str, Any] | None = None,
    *,
    plugins: Sequence[PathLike] = (),
) -> pd.DataFrame:
    """Load the scores of finished runs.

    Runs of different protocols are returned together; the column `protocol` tells them apart.

    Args:
        path: directory of all runs, the file of one comparison that `compare` names, or a
            `rows.parquet` of a report.
        where: setting → allowed value or list of values, e.g. {"method": ["glua", "sifa"]}.
        plugins: files with further methods.

    Returns:
        One row per run, case, structure and selector: dice, assd (mm), hd95 (mm), …, entry, task,
        seed, settings and costs. Rows with `perturbation` above 0 repeat seed 0.

    Raises:
        UserError: there is no finished run, or the file cannot be read.
    """
    path, files = Path(path), [Path(file) for file in plugins]
    chosen = {
        name: [str(v) for v in (values if isinstance(values, (list, tuple, set)) else [values])]
        for name, values in (where or {}).items()
    }
    read = results.from_rows if path.suffix == ".parquet" else results.from_runs
    found = read(path, chosen, files, _warn, pooled=False)
    rows = pd.concat([found.rows, found.repeats], ignore_index=True)
    texts = dict.fromkeys(rows.select_dtypes("category"), str)
    return rows.astype(texts)


def predict(
    images: PathLike | Sequence[PathLike | Sequence[PathLike]],
    *,
    run: PathLike | None = None,
    model: PathLike | None = None,
    domain: str | None = None,
    out: PathLike = "predicted",
    overwrite: bool = False,
    probabilities: bool = False,
    adapt: str | None = None,
    selector: str = "last",
    runs: PathLike = "runs",
    device: str = "auto",
    plugins: Sequence[PathLike] = (),
    quiet: bool = False,
) -> pd.DataFrame:
    """Segment new volumes with a finished run or an exported model, as `glua-bench predict` does.

    Args:
        images: NIfTI, NRRD or MetaImage files; or directories of them or of a DICOM series. Of a
            model with several channels: lists of the files of each case, or nnU-Net's names.
        run: finished run: its directory, or its id or a prefix of it.
        model: directory written by `glua-bench export`, instead of `run`.
        domain: domain of the images, e.g. "ct"; default: the target domain.
        out: output directory.
        overwrite: replace existing results.
        probabilities: also write class probabilities.
        adapt: "tent" adapts the model to the images while predicting; None does not.
        selector: selector of the checkpoint.
        runs: directory of all runs.
        device: "auto", "cpu" or "cuda".
        plugins: files with further methods.
        quiet: print nothing.

    Returns:
        Columns file (the image), labels (the written segmentation), structure, ml, the voxel
            size in mm (spacing_1 to spacing_3), and of the model: model (its method and directory),
            adapt, and privileged (whether it was trained on labels of the target).

    Raises:
        UserError: an argument or an image is invalid.
    """
    files = [Path(file) for file in plugins]
    folder = Path(out)
    loaded = prediction.from_either(
        None if run is None else str(run), model, Path(runs), files, device, selector
    )
    loaded = prediction.adapted(loaded, adapt)
    listed = [images] if isinstance(images, (str, Path)) else images
    paths = [Path(",".join(_listed(image))) for image in listed]
    given = inputs.find(paths, loaded.channels)
    prediction.refuse_existing(given.images, folder, overwrite, probabilities)
    report = _reporter(quiet)
    if loaded.config.privileged:
        report("PRIVILEGED: the model was trained on target labels.")
    if given.skipped:
        report(given.skipped)
    with Progress(enabled=not quiet) as progress:
        found = prediction.predict_all(
            loaded, given.images, folder, domain, probabilities, progress, _warn
        )
    table = prediction.volumes_table(found, loaded)
    labels = {str(each.file): str(each.labels) for each in found}
    table.insert(1, "labels", table["file"].map(labels))
    return table


def score(
    predictions: PathLike,
    references: PathLike,
    structures: Sequence[Structure] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Score label volumes against references, as `glua-bench score` does.

    Args:
        predictions: a file or a directory of label volumes.
        references: a file or a directory of reference label volumes.
        structures: the structures to score; default: every label value of the references.
        options: other arguments of `glua_bench.scoring.files.score_files`.

    Returns:
        One row per case and structure, with all metrics; distances in mm.

    Raises:
        UserError: a file cannot be read, or the files do not match.
    """
    check_predictions(Path(predictions))
    return score_files(Path(predictions), Path(references), structures, **options)


def _options(
    kind: type[RunOptions],
    settings: Mapping[str, Any] | None,
    runs: PathLike,
    given: Mapping[str, Any],
) -> RunOptions:
    """Build options from the arguments of a call.

    Raises:
        ConfigError: an argument is unknown.
    """
    known = sorted(spec.name for spec in fields(kind) if spec.name not in _NOT_HERE)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"Unknown argument '{name}'; {nearest(name, known)}.")
        if name in _FILES and value is not None:
            value = [Path(file) for file in value] if name == "plugins" else Path(value)
        if name == "selectors" and value is not None:
            value = ",".join(_names(value))
        values[name] = value
    texts = [assignment(name, value) for name, value in (settings or {}).items()]
    return kind(**values, assignments=texts, runs_root=Path(runs))


def _listed(value: PathLike | Sequence[PathLike]) -> list[str]:
    return [str(value)] if isinstance(value, (str, Path)) else [str(item) for item in value]


def _names(value: PathLike | Sequence[PathLike]) -> list[str]:
    """Split comma-separated names, or take them from a list."""
    return [name for text in _listed(value) for name in split_names(text)]


def _reporter(quiet: bool) -> Callable[[str], None]:
    return Progress(enabled=not quiet).line


def _warn(text: str) -> None:
    warnings.warn(printable(text), stacklevel=3)


def _signals() -> AbstractContextManager[None]:
    """Handle a scheduler's signals; only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    return listening() if main else nullcontext()
