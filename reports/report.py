"""The report of runs: one page, with tables and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.config import ORACLE, UPPER, is_external
from glua_bench.errors import ConfigError, RunFailure, UserError
from glua_bench.files import replacing, undone, write_text
from glua_bench.registry import Registry, load_dataset
from glua_bench.reports import (
    case_pictures,
    charts,
    comparison,
    published,
    report_tables,
    statistics,
)
from glua_bench.reports.page import PageWriter, Section, file_name, make_folders, render, slug
from glua_bench.reports.results import Results, plain
from glua_bench.runs import carried
from glua_bench.scoring.metrics import PRIMARY
from glua_bench.task import Dataset

RUN_PICTURES = {  # figures of a run shown on the page, with their captions
    "strip": "images of both domains; restyled images, maps and the gap over training if the "
    "method has them",
}
MAX_DRAWN = 40  # entries in a chart


@dataclass(frozen=True)
class Options:
    """Options of a report.

    Attributes:
        selector: name of the checkpoint selector.
        title: title of the page.
        pictures: draw and embed images of cases.
        viewer: embed the volume viewer.
        data_root: directory of the datasets; None takes each dataset's default.
        plugins: files with further datasets.
    """

    selector: str = "last"
    title: str = "Comparison of adaptation methods"
    pictures: bool = True
    viewer: bool = False
    data_root: Path | None = None
    plugins: Sequence[Path] = ()


def write(
    results: Results, out: Path, options: Options, report: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Write `report.html`, `rows.parquet`, `tables/` and `figures/`.

    Args:
        results: the runs.
        out: directory of the report; created if missing.
        options: options of the report.
        report: receives progress messages.

    Returns:
        The files, the page first.

    Raises:
        UserError: no run has a checkpoint of the selector.
        RunFailure: a file cannot be written.
    """
    known = {str(name) for name in results.rows["selector"].unique()}
    if options.selector not in known:
        raise ConfigError(
            f"--selector {options.selector}: no run has a checkpoint of this selector; use one of "
            f"{', '.join(sorted(known))}."
        )
    _note_missing(results, options.selector)
    with undone(out):
        make_folders(out)
        writer = _Writer(results, out, options, report)
        sections = writer.sections()
        page = out / "report.html"
        write_text(page, _page(results, sections, options), "--out")
        every = [results.rows, *[results.repeats] * bool(len(results.repeats))]
        with replacing(out / "rows.parquet", "--out") as temporary:
            pd.concat(every, ignore_index=True).to_parquet(temporary, index=False)
    return [page, out / "rows.parquet", *writer.files]


def _note_missing(results: Results, selector: str) -> None:
    """Add a notice on entries without a checkpoint of the selector; fail if a task has none."""
    for task in results.tasks:
        every = results.rows.loc[results.rows["task"] == task, "entry"].astype(str)
        lacking = sorted(set(every) - set(results.of(task, selector)["entry"].astype(str)))
        if len(lacking) == every.nunique():
            raise ConfigError(
                f"--selector {selector}: no run on {task} has a checkpoint of this selector; use "
                "another one, or select other runs with --where."
            )
        if lacking:
            results.notices.append(
                f"{task}: excluded without a checkpoint of {selector}: {', '.join(lacking)}."
            )


def summary(results: Results, options: Options) -> list[tuple[str, str]]:
    """Return the verdict of each task, and how its best entry compares with the bounds."""
    selector, found = options.selector, []
    for task in results.tasks:
        rows = plain(results.of(task, selector))
        verdict = comparison.verdict(rows, task, selector, percent=True)
        found.append((verdict, comparison.bounds(rows, task, selector)))
    return found


class _Writer(PageWriter):
    """Builds the sections of a report and writes their files."""

    def __init__(
        self, results: Results, out: Path, options: Options, report: Callable[[str], None]
    ) -> None:
        super().__init__(out)
        self.results, self.options, self.report = results, options, report
        self.palette = charts.Palette([str(e) for e in results.rows["entry"].unique()])
        self.notices = results.notices
        selector = options.selector
        self.lines = comparison.table(plain(results.chosen_by(selector)), selector)
        self.entries = {
            task: report_tables.entries_of(results, task, selector) for task in results.tasks
        }
        self._datasets: dict[str, Dataset | None] = {}

    def sections(self) -> list[Section]:
        """Build all sections, in the order of the page."""
        found = [self._answers(), *(self._task(task) for task in self.results.tasks)]
        found += [self._ablation(method) for method in report_tables.ablated(self.results)]
        found += [self._cost(), self._selection()]
        if self.options.pictures:
            found.append(self._pictures())
        found.append(self._provenance())
        return [section for section in found if section.blocks or section.id == "answers"]

    def _answers(self) -> Section:
        lines = self.lines
        section = Section("answers", "Summary")
        if lines["gap recovered"].notna().any() and len(lines) <= 4 * MAX_DRAWN:
            caption = (
                "Gap recovered: share of the difference in mean Dice between source_only and "
                "supervised" + ", paired by seed" * bool((lines["gap seeds"] > 1).any()) + "."
            )
            figure = charts.gaps(lines, self.palette)
            section.blocks.append(self.chart("gap_recovered", caption, figure))
        return section

    def _task(self, task: str) -> Section:
        selector, results = self.options.selector, self.results
        self.report(f"{task}: tables and tests")
        rows, _ = comparison.compared(plain(results.of(task, selector)), selector)
        several = rows["seed"].nunique() > 1
        section = Section(f"task-{slug(task)}", task)
        section.blocks.append(self.table(report_tables.main(results, task, selector)))
        dataset, _, direction = task.partition(" ")
        context = published.context(dataset, direction)
        if context is not None:
            section.blocks.append({**self.table(context), "context": True})
        entries = self.entries[task]
        name = file_name(task)
        if len(entries) <= MAX_DRAWN:
            every = "every case and seed" if several else "every case"
            caption = f"Dice of {every}; missed structures are dots at 0."
            figure = charts.scores(rows, entries, self.palette)
            section.blocks.append(self.chart(f"scores_{name}", caption, figure))
        section.blocks.append(self.table(report_tables.cases(results, task, selector)))
        scores = comparison.competing(statistics.scores(rows, task, selector))
        if not 2 <= scores.shape[1] <= report_tables.MAX_PAIRED:
            return section
        section.blocks.append(self.table(report_tables.ranking(results, task, selector)))
        spans = statistics.intervals(scores).sort_values("mean", ascending=False)
        if spans["low"].notna().all():
            note = report_tables.interval_note(*statistics.counts(scores))
            caption = (
                f"{note} Overlap of these intervals is not a test: methods share cases and seeds, "
                "so compare two of them by the CI of their difference in the table of pairs."
            )
            figure = charts.intervals(spans, self.palette)
            section.blocks.append(self.chart(f"intervals_{name}", caption, figure))
        section.blocks.append(self.table(report_tables.pairs(results, task, selector)))
        cases = rows.groupby(["entry", "case"], observed=True)[PRIMARY.name].mean().unstack("case")
        cases.index = cases.index.astype(str)
        over = "structures and seeds" if several else "structures"
        caption = f"Mean Dice of each case over {over}; hard cases are dark columns."
        figure = charts.heat_map(cases.reindex(entries))
        section.blocks.append(self.chart(f"cases_{name}", caption, figure))
        return section

    def _ablation(self, method: str) -> Section:
        selector, results = self.options.selector, self.results
        section = Section(
            f"ablation-{slug(method)}",
            f"Ablation of {method}",
            "Selecting a setting by these numbers means selecting by target labels, which "
            "unsupervised adaptation does not have.",
        )
        section.blocks.append(self.table(report_tables.ablation(results, method, selector)))
        controls = self._controls(method)
        for setting, points in report_tables.curves(results, method, selector).items():
            several = points["seed"].nunique() > 1
            dots = "Dots: seeds; line: their mean." if several else "One seed."
            caption = f"Dice over {setting}. {dots}"
            if controls:
                bars = ", at the right edge with their standard deviation"
                bars *= any(map(_has_spread, controls.values()))
                caption += f" Dashed: variants without a value on this axis{bars}."
            figure = charts.curve(points, setting, controls)
            section.blocks.append(self.chart(f"curve_{method}_{setting}", caption, figure))
            section.blocks.append(self.table(report_tables.curve(method, setting, points)))
        return section

    def _controls(self, method: str) -> dict[str, pd.DataFrame]:
        """Return declared variants by name: task, seed, dice of each run."""
        rows = self.results.chosen_by(self.options.selector)
        rows = rows[(rows["method"] == method) & (rows["base"] == method)]
        rows = rows[(rows["variant"] != "") & (rows["settings"] != "{}")]
        dice = statistics.means(rows, ["variant", "task", "seed"]).reset_index()
        names, _ = self.results.declared(method)
        by_name = {name: dice[dice["variant"] == name] for name in names}
        return {name: own for name, own in by_name.items() if len(own)}

    def _cost(self) -> Section:
        lines = self.lines
        section = Section("cost", "Cost", "Training time and memory against Dice.")
        most = lines.groupby(level="task").size().max()
        if lines["training s"].notna().any() and most <= MAX_DRAWN:
            caption = "Dice over training time; marker area grows with peak memory."
            figure = charts.cost_quality(lines, self.palette)
            section.blocks.append(self.chart("cost_quality", caption, figure))
        section.blocks += [
            self.table(report_tables.cost(self.results, task, self.options.selector))
            for task in self.results.tasks
        ]
        return section

    def _selection(self) -> Section:
        results = self.results
        oracle = (
            "The oracle uses target labels (privileged) and gives the regret of the others."
            if ORACLE in set(results.rows["selector"])
            else "Their regret requires runs made with --oracle."
        )
        section = Section(
            "selection",
            "Checkpoint selection",
            "All selectors score the same checkpoints of the same trainings, without target "
            f"labels. {oracle}",
        )
        quality = report_tables.selector_quality(results)
        if quality is not None:
            section.blocks.append(self.table(quality))
            caption = "Regret of every run against the oracle (privileged)."
            figure = charts.selector_regret(report_tables.regrets(results))
            section.blocks.append(self.chart("selector_regret", caption, figure))
        for task in results.tasks:
            entries = [e for e in self.entries[task] if e != UPPER and not is_external(e)]
            if not entries:
                continue
            section.blocks.append(self.table(report_tables.selectors(results, task)))
            scores = results.checkpoints
            scores = scores[(scores["task"] == task) & scores["entry"].isin(entries)]
            drawn = "source_val" in set(scores["selector"]) if len(scores) else False
            if drawn and 0 < len(entries) <= MAX_DRAWN:
                rows = results.rows[results.rows["task"] == task]
                chosen = rows[["entry", "seed", "selector", "step"]].drop_duplicates()
                caption = (
                    f"{task}: source-validation Dice over training, and the checkpoints chosen by "
                    "each selector."
                )
                figure = charts.learning(scores, chosen, entries, self.palette)
                section.blocks.append(self.chart(f"learning_{task}", caption, figure))
        return section

    def _pictures(self) -> Section:
        section = Section(
            "pictures",
            "Cases",
            "The same slices for every method: best, median and worst case by mean Dice over all "
            "methods, at the lowest compared seed.",
        )
        if not self.results.directories:
            return section
        viewed: dict[str, tuple[Dataset, list[case_pictures.ComparedCase]]] = {}
        for task in self.results.tasks:
            dataset = self._dataset(task.partition(" ")[0])
            if dataset is None:
                continue
            self.report(f"{task}: pictures")
            try:
                selector = self.options.selector
                shown = case_pictures.compared_cases(self.results, task, dataset, selector)
            except UserError as error:  # e.g. files of another directory than the runs'
                self._no_pictures(task, error)
                continue
            if not shown:
                self.notices.append(f"{task}: no pictures, since no run keeps its predictions.")
                continue
            stem = self.stem("figures", f"side_by_side_{task}")
            entries = self.entries[task]
            png = stem.with_name(stem.name + ".png")
            self.files += case_pictures.draw(png, shown, entries, dataset)
            terms = "" if dataset.publishable else " Images of patients: not for redistribution."
            section.blocks.append(self.picture(png, f"{task}.{terms}"))
            section.blocks += self._pictures_of_runs(task, entries)
            viewed[task] = dataset, shown
        if self.options.viewer and viewed:
            section.blocks.append({"kind": "html", "html": _viewer(viewed)})
        return section

    def _pictures_of_runs(self, task: str, entries: Sequence[str]) -> list[dict[str, Any]]:
        """Return the methods' own pictures at the lowest seed, collapsed."""
        rows = plain(self.results.of(task, self.options.selector))
        first = rows.sort_values("seed").drop_duplicates("entry").set_index("entry")["run"]
        found = []
        for entry in entries:
            directory = self.results.directories.get(str(first.get(entry, "")))
            if directory is None:
                continue
            for name, meaning in RUN_PICTURES.items():
                path = directory.figures / f"{name}.png"
                if path.is_file():
                    block = self.picture(path, f"{entry}, {task}: {meaning} (run {directory.id}).")
                    found.append({**block, "folded": f"{entry}: {meaning}"})
        return found

    def _provenance(self) -> Section:
        section = Section("runs", "Runs", "The runs behind all numbers.")
        section.blocks.append(self.table(report_tables.runs(self.results, self.options.selector)))
        return section

    def _dataset(self, name: str) -> Dataset | None:
        if name not in self._datasets:
            try:
                dataset = load_dataset(name, self.options.data_root, self._plugins(name))
                for domain in dataset.domains():
                    dataset.cases(domain)  # fails for generated data that are not generated yet
                dataset.prepare(self.report)
                self._datasets[name] = dataset
            except (UserError, RunFailure, OSError) as error:
                self._no_pictures(name, error)
                self._datasets[name] = None
        return self._datasets[name]

    def _no_pictures(self, name: str, error: Exception) -> None:
        """Add a notice on a dataset or task without pictures."""
        elsewhere = "If its runs used files of another directory, give it with --data-root."
        hint = f" {elsewhere}" if self.options.data_root is None else ""
        self.notices.append(f"No pictures of {name}: {error}{hint}")

    def _plugins(self, name: str) -> list[Path]:
        """Return the plugins, with a dataset's description from its runs if it is unknown."""
        plugins = list(self.options.plugins)
        if name not in Registry("dataset", plugins):
            runs = self.results.directories.values()
            own = [run.path for run in runs if run.config.fold_name == name]
            plugins += [file for file in map(carried.description, own) if file is not None][:1]
        return plugins


# -- the page ----------------------------------------------------------------------------------


def _page(results: Results, sections: Sequence[Section], options: Options) -> str:
    return render(
        "report.html",
        title=options.title,
        summary=summary(results, options),
        notices=results.notices,
        protocols={task: _protocol(results, task) for task in results.tasks},
        sections=sections,
        oracle=ORACLE,
        selector=options.selector,
    )


def _protocol(results: Results, task: str) -> list[tuple[str, str]]:
    """Return the settings that all runs of a task share."""
    own = results.rows[results.rows["task"] == task]
    paired = statistics.design(plain(own[own["selector"] == own["selector"].iloc[0]]))
    shared: dict[str, str] = {}
    for text in own["protocol"].unique():
        for name, value in json.loads(str(text)).items():
            if value != "":
                shared[name.replace("_", " ")] = str(value)
    shared["test cases"] = str(own["case"].nunique())
    shared["seeds compared"] = ", ".join(str(seed) for seed in paired.seeds)
    return [item for item in shared.items() if item[0] not in ("data", "selector", "caveat")]


def _has_spread(runs: pd.DataFrame) -> bool:
    return bool(runs["task"].duplicated().any())  # several seeds of a task


def _viewer(viewed: dict[str, tuple[Dataset, list[case_pictures.ComparedCase]]]) -> str:
    from glua_bench.reports.viewer import ViewerCase, viewer

    return viewer(
        [
            ViewerCase(
                f"{task}: {case.id} ({case.note})",
                case.image,
                case.spacing,
                case.reference.astype(np.uint8),
                {name: found.astype(np.uint8) for name, found in case.predictions.items()},
                dataset.structures,
            )
            for task, (dataset, cases) in viewed.items()
            for case in cases
        ]
    )
