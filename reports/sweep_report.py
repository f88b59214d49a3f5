"""The report of a sweep: definition, chosen configuration, and post hoc evaluation.

The choice is made without test labels, unless the objective is the oracle. Numbers from test labels
are confined to a section that is marked post hoc.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from glua_bench.console import next_command
from glua_bench.files import csv_text, undone, write_text
from glua_bench.reports import sweep_charts
from glua_bench.reports.page import PageWriter, Section, make_folders, render
from glua_bench.reports.statistics import counted, numbered
from glua_bench.reports.tables import Column, Table
from glua_bench.scoring.metrics import METRICS, MISSING, PRIMARY

ORACLE_STAMP = "ORACLE (privileged): selected by labels of target test cases, not a result. "
POST_HOC = "post hoc"
ENDED = ("done", "pruned", "failed", "lost")  # states of trials
MIN_RANKED = 4  # trials for a rank correlation
MAX_PAIRS = 6  # contour plots
MAX_SHOWN = 10  # rows of the table of the best trials


@dataclass(frozen=True)
class Sweep:
    """The data of a sweep's report, from `glua_bench.sweeps.results.collect`.

    Attributes:
        name: name of the study.
        title: the question of the sweep.
        facts: the definition in words.
        parameters: name → True for a logarithmic axis; None for categorical parameters.
        objectives: the quality first, then costs.
        oracle: True if the search uses target labels.
        budget: maximum number of trials.
        data: options of `run` for dataset, direction and everything else that trials share.
        stamps: what the dataset states about results.
        trials: one row per trial.
        runs: one row per run of a finished trial.
        seen: intermediate values of trials.
        importances: share of the variance by parameter; None for too few trials.
        importances_note: description, or the reason why they are missing.
    """

    name: str
    title: str
    facts: Mapping[str, str]
    parameters: Mapping[str, bool | None]
    objectives: Sequence[str]
    oracle: bool
    budget: int
    trials: pd.DataFrame
    runs: pd.DataFrame
    seen: pd.DataFrame
    importances: pd.Series | None
    importances_note: str
    data: Sequence[str] = ()
    stamps: Sequence[str] = ()

    @property
    def objective(self) -> str:
        """The quality to maximize."""
        return self.objectives[0]

    @property
    def counted(self) -> pd.DataFrame:
        """The trials that count towards the budget."""
        return self.trials[self.trials["counted"].astype(bool)]

    @property
    def done(self) -> pd.DataFrame:
        """The finished trials."""
        return self.counted[self.counted["state"] == "done"]

    @property
    def front(self) -> list[int]:
        """Numbers of the trials on the Pareto front."""
        signs = [1.0, *(-1.0 for _ in self.objectives[1:])]
        points = self.done[list(self.objectives)].to_numpy(float) * signs
        return [
            int(number)
            for number, own in zip(self.done["number"], points, strict=True)
            if not ((points >= own).all(axis=1) & (points > own).any(axis=1)).any()
        ]

    @property
    def chosen(self) -> int | None:
        """Number of the trial with the highest quality, if any is finished."""
        if self.done.empty:
            return None
        return int(self.done.loc[self.done[self.objective].idxmax(), "number"])

    def settings(self, number: int) -> dict[str, Any]:
        """Return the parameter values of a trial."""
        row = self.trials[self.trials["number"] == number].iloc[0]
        return {name: row[f"method.{name}"] for name in self.parameters}

    def describe(self, number: int) -> str:
        """Return the parameter values of a trial as text."""
        return ", ".join(f"{n} {shown(v)}" for n, v in self.settings(number).items())


@dataclass(frozen=True)
class SelectionCost:
    """Post hoc evaluation of a choice by test labels. Dice in [0, 1].

    Attributes:
        trials: number, the objective, dice (mean over directions and seeds) and sd (over seeds),
            of trials with scores for all runs.
        chosen: number of the chosen trial.
        best: number of the trial with the highest test Dice.
        difference: test Dice of the best minus that of the chosen trial.
        spread: standard deviation of the difference over seeds; nan for one seed.
        rho: Spearman's rank correlation of objective and test Dice; nan for too few trials.
        seeds: number of seeds.
        excluded: numbers of trials that lack a score.
    """

    trials: pd.DataFrame
    chosen: int
    best: int
    difference: float
    spread: float
    rho: float
    seeds: int
    excluded: Sequence[int]

    def dice(self, number: int) -> tuple[float, float]:
        """Return the mean test Dice of a trial and its standard deviation over seeds."""
        row = self.trials[self.trials["number"] == number].iloc[0]
        return float(row[PRIMARY.name]), float(row["sd"])


def selection_cost(sweep: Sweep) -> SelectionCost | None:
    """Compute the cost of selecting without target labels; None without test scores."""
    chosen = sweep.chosen
    if chosen is None or sweep.runs[PRIMARY.name].isna().all():
        return None
    by_run = sweep.runs.groupby(["trial", "seed", "direction"])[PRIMARY.name].mean()
    # Exclude trials that lack the score of some run: their means would not be comparable.
    by_run = by_run.unstack(["seed", "direction"]).dropna()
    by_seed = by_run.T.groupby(level="seed").mean().T
    if chosen not in by_seed.index:
        return None
    means = by_seed.mean(axis=1)
    best = int(means.idxmax())
    gap = by_seed.loc[best] - by_seed.loc[chosen]
    table = sweep.done[sweep.done["number"].isin(means.index)][["number", sweep.objective]].copy()
    table[PRIMARY.name] = table["number"].map(means)
    table["sd"] = table["number"].map(by_seed.std(axis=1))
    rho = math.nan
    if len(table) >= MIN_RANKED and table[sweep.objective].nunique() > 1 < means.nunique():
        rho = float(stats.spearmanr(table[sweep.objective], table[PRIMARY.name]).statistic)
    excluded = sorted(int(n) for n in set(sweep.done["number"]) - set(table["number"]))
    return SelectionCost(
        table, chosen, best, float(gap.mean()), float(gap.std()), rho, by_seed.shape[1], excluded
    )


def failures(sweep: Sweep) -> list[str]:
    """Return a sentence for each reason why trials failed or were lost."""
    found = []
    for state in ("failed", "lost"):
        own = sweep.counted[sweep.counted["state"] == state]
        for reason, alike in own.groupby("reason"):
            numbers = ", ".join(map(str, alike["number"]))
            found.append(f"Trial {numbers} {state}: {str(reason).rstrip('.')}.")
    return found


def sentences(sweep: Sweep) -> list[str]:
    """Return the summary: the choice, the Pareto front, and the post hoc evaluation."""
    counts = sweep.counted["state"].value_counts()
    states = ("done", "pruned", "failed", "lost", "running", "waiting")
    shown_counts = ", ".join(f"{counts[s]} {s}" for s in states if s in counts)
    shown_counts = shown_counts.replace("done", "finished") or "none started"
    number = sweep.chosen
    if number is None:
        return [f"No finished trial yet ({shown_counts} of {sweep.budget})."]
    value = float(sweep.done.set_index("number")[sweep.objective][number])
    how = "by labels of target test cases" if sweep.oracle else "without target labels"
    found = [
        f"Selected {how}: {sweep.describe(number)} with the highest {sweep.objective}, "
        f"{shown(value)} (trial {number}; {shown_counts} of {sweep.budget} trials)."
    ]
    if len(sweep.objectives) > 1:
        costs = " and ".join(sweep.objectives[1:])
        found.append(
            f"{len(sweep.front)} trials are on the Pareto front of {sweep.objective} and {costs}."
        )
    cost = None if sweep.oracle else selection_cost(sweep)
    if cost is not None:
        found.append(_post_hoc(sweep, cost))
    return found


def _post_hoc(sweep: Sweep, cost: SelectionCost) -> str:
    def percent(mean: float, spread: float, unit: str = " %") -> str:
        around = "" if math.isnan(spread) else f" ± {100 * spread:.1f}"
        return f"{100 * mean:.1f}{around}{unit}"

    text = f"Post hoc: test Dice of this choice {percent(*cost.dice(cost.chosen))}"
    if cost.best == cost.chosen:
        text += f", the highest of {len(cost.trials)} trials"
    else:
        text += (
            f"; oracle choice {sweep.describe(cost.best)}: {percent(*cost.dice(cost.best))} "
            f"(trial {cost.best}); cost of selecting without target labels "
            f"{percent(cost.difference, cost.spread, ' points')}"
        )
    if not math.isnan(cost.rho):
        text += (
            f"; rank correlation of {sweep.objective} and test Dice {cost.rho:.2f} over "
            f"{len(cost.trials)} trials"
        )
    return f"{text}."


def notices(sweep: Sweep) -> list[str]:
    """Return the caveats of the numbers."""
    found = list(sweep.stamps)
    if sweep.oracle:
        found.append(
            "ORACLE: the search used the labels of target test cases. Its choice is privileged: "
            "its scores on these cases are not a result and must not enter a comparison."
        )
    open_ = sweep.budget - int(sweep.counted["state"].isin(ENDED).sum())
    if open_ > 0:
        found.append(f"{open_} of {sweep.budget} trials are not finished; the choice may change.")
    found += failures(sweep)
    if len(sweep.runs) and sweep.runs["seed"].nunique() == 1:
        found.append(
            "One seed per trial: differences between trials may be due to the seed; use --seeds 3."
        )
    lost = int(sweep.runs[PRIMARY.name].isna().sum())
    if lost:
        found.append(f"{lost} of {len(sweep.runs)} runs have no readable test scores.")
    return found


def as_metrics(sweep: Sweep) -> dict[str, float]:
    """Return the main numbers by name, for a tracker; numbers from test labels are "post_hoc/"."""
    found: dict[str, float] = {}
    if sweep.chosen is not None:
        row = sweep.done.set_index("number").loc[sweep.chosen]
        found |= {f"chosen/{name}": float(row[name]) for name in sweep.objectives}
    cost = None if sweep.oracle else selection_cost(sweep)
    if cost is not None:
        found |= {
            f"post_hoc/{PRIMARY.key}/chosen": cost.dice(cost.chosen)[0],
            f"post_hoc/{PRIMARY.key}/highest": cost.dice(cost.best)[0],
            "post_hoc/selection_cost": cost.difference,
            "post_hoc/rank_correlation": cost.rho,
        }
    return found


def write(sweep: Sweep, out: Path) -> list[Path]:
    """Write `report.html`, `tables/`, `figures/`, and the underlying rows as CSV.

    Args:
        sweep: the sweep.
        out: directory of the report; created if missing.

    Returns:
        The files, the page first.

    Raises:
        RunFailure: a file cannot be written.
    """
    with undone(out):
        make_folders(out)
        writer = _Writer(sweep, out)
        sections = writer.sections()
        page = out / "report.html"
        stamp = ORACLE_STAMP if sweep.oracle else ""
        if sweep.oracle:
            for section in sections:
                section.warning = stamp.strip()
        text = render(
            "sweep.html",
            title=f"{stamp}Sweep {sweep.name}",
            question=sweep.title,
            summary=[(sentence, "") for sentence in sentences(sweep)],
            notices=notices(sweep),
            sections=sections,
            objective=sweep.objective,
        )
        write_text(page, text, "--out")
        rows = []
        for name in ("trials", "runs", "seen"):
            rows.append(out / f"{name}.csv")
            write_text(rows[-1], csv_text(getattr(sweep, name)), "--out")
    return [page, *rows, *writer.files]


class _Writer(PageWriter):
    """Builds the sections of a sweep's report and writes their files."""

    def __init__(self, sweep: Sweep, out: Path) -> None:
        super().__init__(out)
        self.sweep = sweep
        self.stamp = ORACLE_STAMP if sweep.oracle else ""
        # Axis labels carry the stamp when a figure is used outside of the page.
        self.label = f"{sweep.objective} (privileged)" if sweep.oracle else sweep.objective
        self.done = sweep.done.rename(columns={sweep.objective: self.label})

    def sections(self) -> list[Section]:
        """Build all sections, in the order of the page."""
        found = [
            Section("answers", "Summary"),
            self._question(),
            self._choice(),
            self._history(),
            self._parameters(),
            self._trade_off(),
            self._evaluation(),
            self._workers(),
            self._trials(),
        ]
        return [s for s in found if s.blocks or s.intro or s.id == "answers"]

    def table(self, table: Table) -> dict[str, Any]:
        """Write a table with the stamp."""
        return super().table(replace(table, caption=self.stamp + table.caption))

    def chart(self, name: str, caption: str, figure: Any) -> dict[str, Any]:
        """Write a chart with the stamp."""
        return super().chart(name, self.stamp + caption, figure)

    def _question(self) -> Section:
        facts = self.sweep.facts
        table = Table(
            "definition",
            "Definition of the sweep.",
            list(facts),
            [Column("value", list(facts.values()))],
            first="setting",
        )
        return Section("question", "Question", self.sweep.title, [self.table(table)])

    def _choice(self) -> Section:
        sweep = self.sweep
        section = Section("choice", "Chosen configuration")
        number = sweep.chosen
        if number is None:
            return section
        own = [f"method.{n}={v}" for n, v in sweep.settings(number).items()]
        options = [*sweep.data, *(word for text in own for word in ("--set", text))]
        section.intro = f"The trial with the highest {self.label}. To use it:"
        words = "glua-bench", "run", "--method", sweep.facts["method"], *options
        section.command = next_command(*words)
        best = self.done.sort_values(self.label, ascending=False, kind="stable").head(MAX_SHOWN)
        caption = f"Best {len(best)} of {len(self.done)} finished trials by {self.label}."
        section.blocks.append(self.table(self._of_trials("best", caption, best)))
        points = self._curve_points()
        if points is not None:
            (name, log), *_ = sweep.parameters.items()
            caption = (
                f"{self.label} over {name}. Dots: runs; line: mean over seeds; band: minimum to "
                "maximum."
            )
            if points["seed"].nunique() == 1:
                caption = f"{self.label} over {name}. One run per value and direction."
            figure = sweep_charts.curve(points, name, log, self.label, dice=False)
            section.blocks.append(self.chart(f"curve_{name}", caption, figure))
        return section

    def _curve_points(self) -> pd.DataFrame | None:
        """Return the runs with the parameter's value, for a sweep over one number."""
        sweep = self.sweep
        (name, log), *others = sweep.parameters.items()
        if others or log is None or sweep.runs["trial"].nunique() < 2:
            return None
        values = self.done.set_index("number")[f"method.{name}"].astype(float)
        return sweep.runs.assign(value=sweep.runs["trial"].map(values))

    def _history(self) -> Section:
        sweep = self.sweep
        section = Section("history", "History")
        trials = sweep.counted.rename(columns={sweep.objective: self.label})
        if not trials["state"].isin(ENDED).any():
            return section
        caption = f"{self.label} of the trials in order; larger is better."
        figure = sweep_charts.history(trials, sweep.seen, self.label, sweep.chosen)
        section.blocks.append(self.chart("history", caption, figure))
        seen = sweep.seen[sweep.seen["trial"].isin(trials["number"])]
        if len(seen):
            figure = sweep_charts.courses(seen, trials, self.label, sweep.chosen)
            caption = "Intermediate values of the trials, which the pruner uses."
            section.blocks.append(self.chart("courses", caption, figure))
        return section

    def _parameters(self) -> Section:
        sweep, done = self.sweep, self.done
        section = Section("parameters", "Parameters")
        if len(done) < 2 or self._curve_points() is not None:  # shown as a curve
            return section
        others = " Other parameters vary as well." if len(sweep.parameters) > 1 else ""
        caption = (
            f"{self.label} over each parameter. Later trials are darker; star: chosen.{others}"
        )
        figure = sweep_charts.slices(done, sweep.parameters, self.label, sweep.chosen)
        section.blocks.append(self.chart("slices", caption, figure))
        section.intro = sweep.importances_note
        if sweep.importances is not None:
            figure = sweep_charts.importances(sweep.importances, self.label)
            section.blocks.append(self.chart("importances", sweep.importances_note, figure))
        ranked = list(sweep.parameters if sweep.importances is None else sweep.importances.index)
        numeric = [name for name in ranked if sweep.parameters[name] is not None]
        pairs = list(itertools.combinations(numeric, 2))
        drawn = [pair for pair in pairs if sweep_charts.can_contour(done, *pair)][:MAX_PAIRS]
        if drawn:
            used = {n: sweep.parameters[n] for n in numeric if any(n in pair for pair in drawn)}
            figure = sweep_charts.contours(done, used, drawn, self.label, sweep.chosen)
            caption = (
                f"{self.label} interpolated between the trials (dots), for pairs of parameters. "
                "Areas without dots are unknown."
            )
            section.blocks.append(self.chart("contours", caption, figure))
        elif pairs:
            section.intro += (
                f" Contours are omitted: no pair of parameters has "
                f"{sweep_charts.MIN_CONTOUR_POINTS} different points."
            )
        return section

    def _trade_off(self) -> Section:
        sweep = self.sweep
        section = Section("trade-off", "Trade-off of quality and cost")
        if len(sweep.objectives) < 2 or self.done.empty:
            return section
        front = sweep.front
        for cost in sweep.objectives[1:]:
            caption = (
                f"{self.label} over {cost} of training a run, without stages shared by trials."
            )
            figure = sweep_charts.front(self.done, self.label, cost, front)
            section.blocks.append(self.chart(f"front_{cost}", caption, figure))
        own = self.done[self.done["number"].isin(front)]
        own = own.sort_values(self.label, ascending=False)
        caption = "Pareto front: no trial is better in one objective and not worse in another."
        section.blocks.append(self.table(self._of_trials("front", caption, own)))
        return section

    def _evaluation(self) -> Section:
        sweep = self.sweep
        section = Section("post-hoc", "Post hoc: cost of selecting without target labels")
        if sweep.oracle:
            section.intro = "Not applicable: the objective is the oracle."
            return section
        cost = selection_cost(sweep)
        if cost is None:
            section.intro = "The runs of the chosen trial have no test scores."
            return section
        section.intro = (
            "Test scores of every finished run, at the checkpoint chosen by "
            f"{sweep.objective}. The search did not use them."
        )
        section.warning = (
            "These numbers use labels of target test cases: they evaluate the objective and must "
            "never select a configuration."
        )
        section.blocks.append(self.table(self._cost_table(cost)))
        bars = "; bars: standard deviation over seeds" * (cost.seeds > 1)
        caption = f"Post hoc: test Dice over {sweep.objective}, one dot per trial{bars}."
        figure = sweep_charts.agreement(cost.trials, sweep.objective, cost.chosen, cost.rho)
        section.blocks.append(self.chart("agreement", caption, figure))
        points = self._curve_points()
        if points is not None:
            (name, log), *_ = sweep.parameters.items()
            caption = (
                f"{sweep.objective} (used by the search) and test Dice (post hoc) over {name}."
            )
            figure = sweep_charts.curve(points, name, log, sweep.objective, dice=True)
            section.blocks.append(self.chart(f"curve_{name}_post_hoc", caption, figure))
        return section

    def _cost_table(self, cost: SelectionCost) -> Table:
        sweep = self.sweep
        numbers = [cost.chosen, cost.best]
        dice = [cost.dice(number) for number in numbers]
        values = cost.trials.set_index("number")[sweep.objective]
        by_direction = sweep.runs.groupby(["direction", "trial"])[PRIMARY.name].mean()
        directions = list(dict.fromkeys(sweep.runs["direction"]))
        columns = [
            Column("trial", [*map(str, numbers), ""]),
            *(
                Column(name, [*(shown(sweep.settings(n)[name]) for n in numbers), ""])
                for name in sweep.parameters
            ),
            Column(sweep.objective, [*(shown(values[n]) for n in numbers), ""]),
            Column(
                f"test {PRIMARY.heading}",
                [*(100 * mean for mean, _ in dice), -100 * cost.difference],
                spread=[*(100 * sd for _, sd in dice), 100 * cost.spread],
                group=POST_HOC,
            ),
        ]
        if len(directions) > 1:
            for direction in directions:
                own = [100 * float(by_direction[direction, number]) for number in numbers]
                columns.append(Column(direction, [*own, own[0] - own[1]], group=POST_HOC))
        notes = ["One seed: the difference cannot be separated from variation between seeds."]
        if cost.seeds > 1:
            notes = [
                f"±: standard deviation over {cost.seeds} seeds; of the difference, paired by seed."
            ]
        if cost.best != cost.chosen:
            notes.append(
                f"The highest of {len(cost.trials)} means is biased upwards, so the cost is an "
                "overestimate rather than an underestimate."
            )
        if cost.excluded:
            notes.append(f"Excluded without scores: {numbered('trial', cost.excluded)}.")
        return Table(
            "selection_cost",
            "Test Dice of the chosen configuration and of the oracle's choice; their difference is "
            "the cost of selecting without target labels, in points.",
            [f"chosen by {sweep.objective}", "highest test Dice (oracle)", "chosen - oracle"],
            columns,
            unranked=frozenset({"highest test Dice (oracle)"}),
            notes=notes,
            first="",
        )

    def _workers(self) -> Section:
        trials = self.sweep.trials.dropna(subset=["began", "ended"])
        section = Section("workers", "Workers")
        if trials.empty:
            return section
        workers = counted(trials["worker"].nunique(), "worker")
        restarted = int((~trials["counted"]).sum())
        again = f"; {restarted} interrupted and restarted, counted once" if restarted else ""
        section.intro = f"{counted(len(trials), 'trial')} by {workers}{again}."
        caption = "Trials of each worker over time."
        section.blocks.append(self.chart("time_line", caption, sweep_charts.time_line(trials)))
        return section

    def _trials(self) -> Section:
        sweep = self.sweep
        section = Section("runs", "Trials and runs", "The trials and runs behind all numbers.")
        if sweep.trials.empty:
            return section
        trials = sweep.trials.rename(columns={sweep.objective: self.label})
        table = self._of_trials("trials", "All trials.", trials, everything=True)
        section.blocks.append(self.table(table))
        runs = sweep.runs
        if len(runs):
            columns = [
                Column("trial", [str(n) for n in runs["trial"]]),
                Column("direction", list(runs["direction"])),
                Column("seed", [str(n) for n in runs["seed"]]),
                Column(self.label, [shown(v) for v in runs["quality"]]),
                *(
                    Column.of(metric, runs[name], f"test {metric.heading}", group=POST_HOC)
                    for name, metric in METRICS.items()
                ),
            ]
            names = list(runs["run"])
            caption = "Runs of finished trials."
            table = Table("runs", caption, names, columns, frozenset(names), first="run")
            section.blocks.append(self.table(table))
        return section

    def _of_trials(
        self, name: str, caption: str, trials: pd.DataFrame, everything: bool = False
    ) -> Table:
        """Build a table with one row per trial."""
        sweep = self.sweep
        columns = []
        if everything:
            restarted = trials["counted"].map({True: "", False: ", restarted"})
            columns = [
                Column("state", list(trials["state"] + restarted)),
                Column("attempt", [str(n) for n in trials["attempt"]]),
            ]
        for parameter in sweep.parameters:
            columns.append(Column(parameter, [shown(v) for v in trials[f"method.{parameter}"]]))
        for objective in (self.label, *sweep.objectives[1:]):
            columns.append(Column(objective, [shown(v) for v in trials[objective]]))
        if everything:
            seconds = (trials["ended"] - trials["began"]).dt.total_seconds()
            columns += [
                Column("seconds", list(seconds.astype(float)), digits=0),
                Column("reason", list(trials["reason"])),
            ]
        own = sweep.runs.groupby("trial")["run"].agg(list)
        numbers = [int(n) for n in trials["number"]]
        return Table(
            name,
            caption,
            [str(number) for number in numbers],
            columns,
            ids=[own.get(number, []) for number in numbers],
            first="trial",
        )


def shown(value: Any) -> str:
    """Format a value; "–" if missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
