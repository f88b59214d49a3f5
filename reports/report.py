"""The report: from results to one page, tables and figures, all from one frame."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.config import ORACLE, UPPER
from glua_bench.errors import ConfigError, RunFailure, UserError
from glua_bench.files import replacing, write_text
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

RUN_PICTURES = {  # figures of a run that the page shows, and what they are
    "restyled": "source images, the same restyled or translated, and target images",
    "pictures": "what the method shows of itself",
}
MOST_ENTRIES_DRAWN = 40  # rows of a chart; more cannot be told apart


@dataclass(frozen=True)
class Options:
    """What a report holds.

    Args:
        selector: whose checkpoints count.
        title: of the page.
        pictures: whether images of cases are drawn and embedded.
        viewer: whether the volume viewer is embedded.
        data_root: of the datasets; None is each dataset's default.
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
        out: the directory; it is made.
        options: what the report holds.
        report: receives a line about each part that takes time.

    Returns:
        The files, the page first.

    Raises:
        UserError: the selector judged no run.
        RunFailure: the directory cannot be written.
    """
    known = {str(name) for name in results.rows["selector"].unique()}
    if options.selector not in known:
        raise ConfigError(
            f"--selector {options.selector} chose no checkpoint of these runs; use one of "
            f"{', '.join(sorted(known))}."
        )
    _name_unjudged(results, options.selector)
    make_folders(out)
    writer = _Writer(results, out, options, report)
    sections = writer.sections()
    page = out / "report.html"
    write_text(page, _page(results, sections, options), "--out")
    with replacing(out / "rows.parquet", "--out") as temporary:
        every = results.rows
        if len(results.repeats):
            every = pd.concat([every, results.repeats], ignore_index=True)
        every.to_parquet(temporary, index=False)
    return [page, out / "rows.parquet", *writer.files]


def _name_unjudged(results: Results, selector: str) -> None:
    """Add a notice for the entries that a selector chose no checkpoint of.

    Raises:
        ConfigError: it chose none of a whole task.
    """
    for task in results.tasks:
        every = results.rows.loc[results.rows["task"] == task, "entry"].astype(str)
        lacking = sorted(set(every) - set(results.of(task, selector)["entry"].astype(str)))
        if len(lacking) == every.nunique():
            raise ConfigError(
                f"--selector {selector} chose no checkpoint of any run on {task}; choose another, "
                "or other runs with --where."
            )
        if lacking:
            results.notices.append(
                f"{task}: not in the tables, since {selector} chose no checkpoint of them: "
                f"{', '.join(lacking)}."
            )


def summary(results: Results, options: Options) -> list[str]:
    """Each task's answer in plain words."""
    return [
        comparison.verdict(
            plain(results.of(task, options.selector)),
            task,
            options.selector,
            percent=True,
        )
        for task in results.tasks
    ]


class _Writer(PageWriter):
    """Builds the parts of a report and writes their files."""

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
        """All parts, in the order of the page."""
        found = [self._answers(), *(self._task(task) for task in self.results.tasks)]
        found += [self._ablation(method) for method in report_tables.ablated(self.results)]
        found += [self._cost(), self._selection()]
        if self.options.pictures:
            found.append(self._pictures())
        found.append(self._provenance())
        return [section for section in found if section.blocks or section.id == "answers"]

    def _answers(self) -> Section:
        lines = self.lines
        section = Section("answers", "In short")
        if lines["gap recovered"].notna().any() and len(lines) <= 4 * MOST_ENTRIES_DRAWN:
            section.blocks.append(
                self.chart(
                    "gap_recovered",
                    "The share of the distance from source_only to supervised that each method "
                    "recovers, of the mean Dice of each seed.",
                    charts.gaps(lines, self.palette),
                )
            )
        return section

    def _task(self, task: str) -> Section:
        selector, results = self.options.selector, self.results
        self.report(f"{task}: tables and tests")
        rows, _ = comparison.compared(plain(results.of(task, selector)), selector)
        section = Section(f"task-{slug(task)}", task)
        section.blocks.append(self.table(report_tables.main(results, task, selector)))
        dataset, _, direction = task.partition(" ")
        context = published.context(dataset, direction)
        if context is not None:
            section.blocks.append({**self.table(context), "context": True})
        entries = self.entries[task]
        name = file_name(task)
        if len(entries) <= MOST_ENTRIES_DRAWN:
            section.blocks.append(
                self.chart(
                    f"scores_{name}",
                    "Dice of every case and seed; a structure that was missed is a dot at 0.",
                    charts.scores(rows, entries, self.palette),
                )
            )
        scores = comparison.competing(statistics.scores(rows, task, selector))
        if not 2 <= scores.shape[1] <= report_tables.MOST_PAIRED:
            return section
        section.blocks.append(self.table(report_tables.ranking(results, task, selector)))
        spans = statistics.intervals(scores).sort_values("mean", ascending=False)
        if spans["low"].notna().all():
            note = report_tables.interval_note(*statistics.counts(scores))
            section.blocks.append(
                self.chart(
                    f"intervals_{name}",
                    f"{note} Two methods are compared by the interval of their difference, in the "
                    "table of pairs, since they share cases and seeds.",
                    charts.intervals(spans, self.palette),
                )
            )
        section.blocks.append(self.table(report_tables.pairs(results, task, selector)))
        cases = rows.groupby(["entry", "case"], observed=True)[PRIMARY.name].mean().unstack("case")
        cases.index = cases.index.astype(str)
        section.blocks.append(
            self.chart(
                f"cases_{name}",
                "Mean Dice of each case over structures and seeds: hard cases are dark columns.",
                charts.heat_map(cases.reindex(entries)),
            )
        )
        return section

    def _ablation(self, method: str) -> Section:
        selector, results = self.options.selector, self.results
        section = Section(
            f"ablation-{slug(method)}",
            f"Ablation of {method}",
            "These numbers come from target labels: a setting that is chosen by them is chosen by "
            "target labels, and no result of an adaptation without them.",
        )
        section.blocks.append(self.table(report_tables.ablation(results, method, selector)))
        controls = self._controls(method)
        for setting, points in report_tables.curves(results, method, selector).items():
            section.blocks += [
                self.chart(
                    f"curve_{method}_{setting}",
                    f"Dice over {setting}; dots are seeds, the line joins their means."
                    + " Dashed: variants without a value on this axis" * bool(controls)
                    + ", with their standard deviation" * any(map(_spread, controls.values()))
                    + "." * bool(controls),
                    charts.curve(points, setting, controls),
                ),
                self.table(report_tables.curve(method, setting, points)),
            ]
        return section

    def _controls(self, method: str) -> dict[str, pd.DataFrame]:
        """Declared variants by name: task, seed, dice of each run."""
        rows = self.results.chosen_by(self.options.selector)
        rows = rows[
            (rows["method"] == method)
            & (rows["base"] == method)
            & (rows["variant"] != "")
            & (rows["settings"] != "{}")
        ]
        keys = ["variant", "task", "seed"]
        dice = statistics.means(rows, keys).reset_index()
        names, _ = self.results.declared(method)
        return {
            name: dice[dice["variant"] == name] for name in names if (dice["variant"] == name).any()
        }

    def _cost(self) -> Section:
        lines = self.lines
        section = Section("cost", "Cost", "Seconds and memory beside the quality that they buy.")
        if lines["training s"].notna().any() and len(lines) <= 4 * MOST_ENTRIES_DRAWN:
            section.blocks.append(
                self.chart(
                    "cost_quality",
                    "Dice over seconds of training; the area of a mark grows with memory.",
                    charts.cost_quality(lines, self.palette),
                )
            )
        section.blocks += [
            self.table(report_tables.cost(self.results, task, self.options.selector))
            for task in self.results.tasks
        ]
        return section

    def _selection(self) -> Section:
        results = self.results
        section = Section(
            "selection",
            "Choosing a checkpoint",
            "Every selector judged the same checkpoints of the same trainings, without target "
            "labels. "
            + (
                "The oracle read them (privileged): it shows what a selector misses."
                if ORACLE in set(results.rows["selector"])
                else "What each gives away can be said of runs made with --oracle."
            ),
        )
        quality = report_tables.selector_quality(results)
        if quality is not None:
            section.blocks += [
                self.table(quality),
                self.chart(
                    "selector_regret",
                    "Regret of every run against the oracle (privileged).",
                    charts.selector_regret(report_tables.regrets(results)),
                ),
            ]
        for task in results.tasks:
            section.blocks.append(self.table(report_tables.selectors(results, task)))
            entries = [entry for entry in self.entries[task] if entry != UPPER]
            scores = results.checkpoints
            scores = scores[(scores["task"] == task) & scores["entry"].isin(entries)]
            if len(scores) and 0 < len(entries) <= MOST_ENTRIES_DRAWN:
                rows = results.rows[results.rows["task"] == task]
                chosen = rows[["entry", "seed", "selector", "step"]].drop_duplicates()
                section.blocks.append(
                    self.chart(
                        f"learning_{task}",
                        f"{task}: Dice on source validation over training, and what each selector "
                        "chose.",
                        charts.learning(scores, chosen, entries, self.palette),
                    )
                )
        return section

    def _pictures(self) -> Section:
        section = Section(
            "pictures",
            "Cases",
            "The same slices for every method, of the best, the median and the worst case by the "
            "mean Dice over all methods; one seed, the lowest that is compared. Numbers hide what "
            "a picture shows.",
        )
        if not self.results.directories:
            return section
        viewed: dict[str, tuple[Dataset, list[case_pictures.ComparedCase]]] = {}
        for task in self.results.tasks:
            dataset = self._dataset(task.partition(" ")[0])
            if dataset is None:
                continue
            self.report(f"{task}: pictures")
            shown = case_pictures.compared_cases(self.results, task, dataset, self.options.selector)
            if not shown:
                self.notices.append(f"{task}: the runs here keep no predictions to draw.")
                continue
            stem = self.stem("figures", f"side_by_side_{task}")
            paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
            entries = self.entries[task]
            case_pictures.draw(paths, shown, entries, dataset)
            self.files += paths
            section.blocks.append(self.picture(paths[0], f"{task}. {_terms(dataset)}".strip()))
            section.blocks += self._pictures_of_runs(task, entries)
            viewed[task] = dataset, shown
        if self.options.viewer and viewed:
            section.blocks.append({"kind": "html", "html": _viewer(viewed)})
        return section

    def _pictures_of_runs(self, task: str, entries: Sequence[str]) -> list[dict[str, Any]]:
        """What methods show of themselves, folded away, of the lowest seed."""
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
        section = Section("runs", "Runs", "What every number was made of.")
        section.blocks.append(self.table(report_tables.runs(self.results, self.options.selector)))
        return section

    def _dataset(self, name: str) -> Dataset | None:
        if name not in self._datasets:
            try:
                dataset = load_dataset(name, self.options.data_root, self._plugins(name))
                dataset.prepare(self.report)
                self._datasets[name] = dataset
            except (UserError, RunFailure) as error:
                self.notices.append(f"No pictures of {name}: {error}")
                self._datasets[name] = None
        return self._datasets[name]

    def _plugins(self, name: str) -> list[Path]:
        """Plugins, with the description of a dataset that only its runs still know."""
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
    """What was equal for all runs of a task."""
    own = results.rows[results.rows["task"] == task]
    paired = statistics.design(plain(own[own["selector"] == own["selector"].iloc[0]]))
    shared: dict[str, str] = {}
    for text in own["protocol"].unique():
        for name, value in json.loads(str(text)).items():
            if value != "":
                shared[name.replace("_", " ")] = str(value)
    shared["test cases"] = str(own["case"].nunique())
    shared["seeds compared"] = ", ".join(str(seed) for seed in paired.seeds)
    shared.pop("data", None)
    shared.pop("selector", None)
    return list(shared.items())


def _spread(runs: pd.DataFrame) -> bool:
    """Whether a task has several seeds, so that its standard deviation is drawn."""
    return bool((runs.groupby("task", observed=True).size() > 1).any())


def _terms(dataset: Dataset) -> str:
    return "" if dataset.publishable else "Images of patients: not for redistribution."


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
