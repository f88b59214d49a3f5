"""The report of a sweep: what was asked, what was chosen, and what that choice was worth.

The choice comes first and stands by itself: it was made without test labels, unless the sweep's
objective was the oracle. What test labels say of it stands in a part of its own, which says that
it was looked at afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from glua_bench.files import write_text
from glua_bench.reports import sweep_charts
from glua_bench.reports.page import PageWriter, Section, make_folders, render
from glua_bench.reports.tables import Column, Table
from glua_bench.scoring.metrics import METRICS, PRIMARY

ORACLE_STAMP = "ORACLE (privileged): chosen by labels of target test cases, no result. "
AFTERWARDS = "looked at afterwards"
FEWEST_RANKED = 4  # trials; a rank correlation of fewer says nothing
MOST_PAIRS = 6  # contour plots
MOST_SHOWN = 10  # rows of the first table


@dataclass(frozen=True)
class Sweep:
    """What a report of a sweep is made of, as `glua_bench.sweeps.results.collect` gives it.

    Args:
        name: of the study.
        title: what it asks.
        facts: its definition in words.
        parameters: name → whether the axis is logarithmic; None where values are words.
        objectives: the quality first, then costs.
        oracle: whether the search read target labels.
        budget: trials that it may try.
        shared: `--set` texts of the method that all trials have.
        trials: a row a trial.
        runs: a row a run of a finished trial.
        seen: values while trials ran.
        importances: share of the variance by parameter, where there are enough trials.
        importances_note: what they are, or why there are none.
    """

    name: str
    title: str
    facts: Mapping[str, str]
    parameters: Mapping[str, bool | None]
    objectives: Sequence[str]
    oracle: bool
    budget: int
    shared: Sequence[str]
    trials: pd.DataFrame
    runs: pd.DataFrame
    seen: pd.DataFrame
    importances: pd.Series | None
    importances_note: str

    @property
    def objective(self) -> str:
        """The quality that was searched."""
        return self.objectives[0]

    @property
    def counted(self) -> pd.DataFrame:
        """The trials that the budget counts."""
        return self.trials[self.trials["counted"].astype(bool)]

    @property
    def done(self) -> pd.DataFrame:
        """The trials that have values."""
        return self.counted[self.counted["state"] == "done"]

    @property
    def front(self) -> list[int]:
        """Numbers of the trials that no other beats in one objective without losing in another."""
        signs = [1.0, *(-1.0 for _ in self.objectives[1:])]
        points = self.done[list(self.objectives)].to_numpy(float) * signs
        return [
            int(number)
            for number, own in zip(self.done["number"], points, strict=True)
            if not ((points >= own).all(axis=1) & (points > own).any(axis=1)).any()
        ]

    @property
    def chosen(self) -> int | None:
        """The trial of the highest quality; None where none has a value."""
        if self.done.empty:
            return None
        return int(self.done.loc[self.done[self.objective].idxmax(), "number"])

    def settings(self, number: int) -> dict[str, Any]:
        """What a trial gave the parameters."""
        row = self.trials[self.trials["number"] == number].iloc[0]
        return {name: row[f"method.{name}"] for name in self.parameters}

    def words(self, number: int) -> str:
        """The same in a phrase."""
        return ", ".join(f"{n} {shown(v)}" for n, v in self.settings(number).items())


@dataclass(frozen=True)
class Price:
    """What test labels say of a choice that was made without them. Dice in [0, 1].

    Args:
        trials: number, the objective, dice (mean over directions and seeds) and sd (over seeds);
            without trials that lack a score of some run.
        chosen: number of the chosen trial.
        best: number of the trial with the highest test Dice.
        difference: how much lower the chosen one is.
        spread: standard deviation of that difference over seeds; nan for one seed.
        rho: Spearman's rank correlation of objective and test Dice; nan for too few trials.
        seeds: how many there are.
        left_out: numbers of the trials that lack a score.
    """

    trials: pd.DataFrame
    chosen: int
    best: int
    difference: float
    spread: float
    rho: float
    seeds: int
    left_out: Sequence[int]

    def dice(self, number: int) -> tuple[float, float]:
        """Mean and standard deviation over seeds of a trial."""
        row = self.trials[self.trials["number"] == number].iloc[0]
        return float(row[PRIMARY.name]), float(row["sd"])


def price(sweep: Sweep) -> Price | None:
    """The price of not knowing; None where the chosen trial's runs have no test scores."""
    chosen = sweep.chosen
    if chosen is None or sweep.runs[PRIMARY.name].isna().all():
        return None
    by_run = sweep.runs.groupby(["trial", "seed", "direction"])[PRIMARY.name].mean()
    # Trials that lack a score of some run would be unequal.
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
    if len(table) >= FEWEST_RANKED and table[sweep.objective].nunique() > 1 < means.nunique():
        rho = float(stats.spearmanr(table[sweep.objective], table[PRIMARY.name]).statistic)
    left_out = sorted(int(n) for n in set(sweep.done["number"]) - set(table["number"]))
    spread = float(gap.std())
    return Price(table, chosen, best, float(gap.mean()), spread, rho, by_seed.shape[1], left_out)


def sentences(sweep: Sweep) -> list[str]:
    """The answer in plain words."""
    counts = sweep.counted["state"].value_counts()
    states = ("done", "pruned", "failed", "running", "waiting")
    told = ", ".join(f"{counts[s]} {s}" for s in states if s in counts).replace("done", "finished")
    number = sweep.chosen
    if number is None:
        return [f"No trial has a value yet ({told or 'none has begun'} of {sweep.budget})."]
    value = float(sweep.done.set_index("number")[sweep.objective][number])
    how = "by labels of target test cases" if sweep.oracle else "without target labels"
    found = [
        f"{sweep.words(number)} has the highest {sweep.objective}, {shown(value)} (trial {number}; "
        f"{told}, of {sweep.budget} trials): chosen {how}."
    ]
    if len(sweep.objectives) > 1:
        costs = " and ".join(sweep.objectives[1:])
        found.append(
            f"{len(sweep.front)} trials are on the Pareto front of {sweep.objective} and {costs}."
        )
    known = None if sweep.oracle else price(sweep)
    if known is not None:
        found.append(_price_in_words(sweep, known))
    return found


def _price_in_words(sweep: Sweep, known: Price) -> str:
    def percent(pair: tuple[float, float]) -> str:
        spread = "" if math.isnan(pair[1]) else f" ± {100 * pair[1]:.1f}"
        return f"{100 * pair[0]:.1f} %{spread}"

    text = (
        f"Looked at afterwards: the test Dice of this choice is {percent(known.dice(known.chosen))}"
    )
    if known.best == known.chosen:
        text += f", the highest of {len(known.trials)} trials"
    else:
        spread = "" if math.isnan(known.spread) else f" ± {100 * known.spread:.1f}"
        text += (
            f"; the oracle would have taken {sweep.words(known.best)} "
            f"({percent(known.dice(known.best))}, trial {known.best}), so not knowing cost "
            f"{100 * known.difference:.1f}{spread} points"
        )
    if not math.isnan(known.rho):
        text += (
            f"; the rank correlation of {sweep.objective} and test Dice is {known.rho:.2f} over "
            f"{len(known.trials)} trials"
        )
    return f"{text}."


def notices(sweep: Sweep) -> list[str]:
    """What a reader must know before using the numbers."""
    found = []
    if sweep.oracle:
        found.append(
            "ORACLE: the search read the labels of target test cases. What it chose is privileged: "
            "its scores on these cases are no result, and no comparison may use it."
        )
    open_ = sweep.budget - int(sweep.counted["state"].isin(["done", "pruned", "failed"]).sum())
    if open_ > 0:
        found.append(f"{open_} of {sweep.budget} trials are not finished; the choice may change.")
    failed = sweep.counted[sweep.counted["state"] == "failed"]
    for reason, own in failed.groupby("reason"):
        numbers = ", ".join(map(str, own["number"]))
        found.append(f"Trial {numbers} failed: {str(reason).rstrip('.')}.")
    if len(sweep.runs) and sweep.runs["seed"].nunique() == 1:
        found.append(
            "One seed a trial: differences between neighbouring trials may be chance (--seeds 3)."
        )
    lost = int(sweep.runs[PRIMARY.name].isna().sum())
    if lost:
        found.append(f"{lost} of {len(sweep.runs)} runs have no readable test scores any more.")
    return found


def as_metrics(sweep: Sweep) -> dict[str, float]:
    """The sweep's main numbers by name, for a tracker; what test labels say has its own prefix."""
    found: dict[str, float] = {}
    if sweep.chosen is not None:
        row = sweep.done.set_index("number").loc[sweep.chosen]
        found |= {f"chosen/{name}": float(row[name]) for name in sweep.objectives}
    known = None if sweep.oracle else price(sweep)
    if known is not None:
        found |= {
            f"afterwards/{PRIMARY.key}/chosen": known.dice(known.chosen)[0],
            f"afterwards/{PRIMARY.key}/highest": known.dice(known.best)[0],
            "afterwards/price": known.difference,
            "afterwards/rank_correlation": known.rho,
        }
    return found


def write(sweep: Sweep, out: Path) -> list[Path]:
    """Write `report.html`, `tables/`, `figures/`, and the rows behind them as CSV.

    Args:
        sweep: what is shown.
        out: the directory; it is made.

    Returns:
        The files, the page first.

    Raises:
        ConfigError: the directory cannot be made.
        RunFailure: a file cannot be written.
    """
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
        summary=sentences(sweep),
        notices=notices(sweep),
        sections=sections,
        objective=sweep.objective,
    )
    write_text(page, text, "--out")
    rows = []
    for name in ("trials", "runs", "seen"):
        rows.append(out / f"{name}.csv")
        write_text(rows[-1], getattr(sweep, name).to_csv(index=False), "--out")
    return [page, *rows, *writer.files]


class _Writer(PageWriter):
    """Builds the parts of a sweep's report and writes their files."""

    def __init__(self, sweep: Sweep, out: Path) -> None:
        super().__init__(out)
        self.sweep = sweep
        self.stamp = ORACLE_STAMP if sweep.oracle else ""
        # What stands at the axes, so that a figure that leaves the page keeps its stamp.
        self.label = f"{sweep.objective} (privileged)" if sweep.oracle else sweep.objective
        self.done = sweep.done.rename(columns={sweep.objective: self.label})

    def sections(self) -> list[Section]:
        """All parts, in the order of the page."""
        found = [
            Section("answers", "In short"),
            self._question(),
            self._choice(),
            self._history(),
            self._parameters(),
            self._trade_off(),
            self._afterwards(),
            self._workers(),
            self._trials(),
        ]
        return [s for s in found if s.blocks or s.intro or s.id == "answers"]

    def table(self, table: Table) -> dict[str, Any]:
        """Write a table in all its forms, with the stamp."""
        stamped = Table(**{**vars(table), "caption": self.stamp + table.caption})
        return super().table(stamped)

    def chart(self, name: str, caption: str, figure: Any) -> dict[str, Any]:
        """Write a chart, with the stamp."""
        return super().chart(name, self.stamp + caption, figure)

    def _question(self) -> Section:
        facts = self.sweep.facts
        table = Table(
            "definition",
            "The definition of the sweep.",
            list(facts),
            [Column("says", list(facts.values()))],
            first="entry",
        )
        return Section("question", "The question", self.sweep.title, [self.table(table)])

    def _choice(self) -> Section:
        sweep = self.sweep
        section = Section("choice", "The choice")
        number = sweep.chosen
        if number is None:
            return section
        own = [f"method.{n}={v}" for n, v in sweep.settings(number).items()]
        words = " ".join(f"--set {text}" for text in (*sweep.shared, *own))
        section.intro = f"The trial with the highest {self.label}. To use it:"
        section.command = f"glua-bench run --method {sweep.facts['method']} {words}"
        best = self.done.sort_values(self.label, ascending=False, kind="stable").head(MOST_SHOWN)
        caption = f"The {len(best)} best of {len(self.done)} finished trials by {self.label}."
        section.blocks.append(self.table(self._of_trials("best", caption, best)))
        points = self._curve_points()
        if points is not None:
            (name, log), *_ = sweep.parameters.items()
            caption = (
                f"{self.label} over {name}. Dots are runs, the line joins means over seeds, the "
                "area goes from the smallest to the largest."
            )
            figure = sweep_charts.curve(points, name, log, self.label, dice=False)
            section.blocks.append(self.chart(f"curve_{name}", caption, figure))
        return section

    def _curve_points(self) -> pd.DataFrame | None:
        """The runs of a sweep over one number, with its value; None for other sweeps."""
        sweep = self.sweep
        (name, log), *others = sweep.parameters.items()
        if others or log is None or sweep.runs["trial"].nunique() < 2:
            return None
        values = self.done.set_index("number")[f"method.{name}"].astype(float)
        return sweep.runs.assign(value=sweep.runs["trial"].map(values))

    def _history(self) -> Section:
        sweep = self.sweep
        section = Section("history", "How the search went")
        trials = sweep.counted.rename(columns={sweep.objective: self.label})
        if not trials["state"].isin(["done", "pruned", "failed"]).any():
            return section
        section.blocks.append(
            self.chart(
                "history",
                f"{self.label} over the trials in their order; larger is better.",
                sweep_charts.history(trials, sweep.seen, self.label, sweep.chosen),
            )
        )
        seen = sweep.seen[sweep.seen["trial"].isin(trials["number"])]
        if len(seen):
            figure = sweep_charts.courses(seen, trials, self.label, sweep.chosen)
            caption = "Values of the trials while they ran, by which the pruner judged them."
            section.blocks.append(self.chart("courses", caption, figure))
        return section

    def _parameters(self) -> Section:
        sweep, done = self.sweep, self.done
        section = Section("parameters", "The parameters")
        if len(done) < 2 or self._curve_points() is not None:  # the curve says it all
            return section
        others = "Other parameters vary as well." if len(sweep.parameters) > 1 else ""
        section.blocks.append(
            self.chart(
                "slices",
                f"{self.label} over each parameter; later trials are darker, the star is chosen. "
                f"{others}".strip(),
                sweep_charts.slices(done, sweep.parameters, self.label, sweep.chosen),
            )
        )
        section.intro = sweep.importances_note
        if sweep.importances is not None:
            figure = sweep_charts.importances(sweep.importances, self.label)
            section.blocks.append(self.chart("importances", sweep.importances_note, figure))
            ranked = list(sweep.importances.index)
        else:
            ranked = list(sweep.parameters)
        numeric = [name for name in ranked if sweep.parameters[name] is not None]
        pairs = list(itertools.combinations(numeric, 2))
        drawn = [pair for pair in pairs if sweep_charts.can_contour(done, *pair)][:MOST_PAIRS]
        if drawn:
            used = {n: sweep.parameters[n] for n in numeric if any(n in pair for pair in drawn)}
            figure = sweep_charts.contours(done, used, drawn, self.label, sweep.chosen)
            caption = (
                f"{self.label} between the trials (dots), for pairs of numbers. Where there are no "
                "dots, nothing is known."
            )
            section.blocks.append(self.chart("contours", caption, figure))
        elif pairs:
            section.intro += (
                f" Contours are left out: no pair of parameters has "
                f"{sweep_charts.FEWEST_FOR_CONTOURS} different places."
            )
        return section

    def _trade_off(self) -> Section:
        sweep = self.sweep
        section = Section("trade-off", "Quality against cost")
        if len(sweep.objectives) < 2 or self.done.empty:
            return section
        front = sweep.front
        for cost in sweep.objectives[1:]:
            caption = (
                f"{self.label} over {cost} of training a run, without stages that trials share."
            )
            figure = sweep_charts.front(self.done, self.label, cost, front)
            section.blocks.append(self.chart(f"front_{cost}", caption, figure))
        own = self.done[self.done["number"].isin(front)]
        own = own.sort_values(self.label, ascending=False)
        caption = "The Pareto front: no trial is better in one of these without being worse in one."
        section.blocks.append(self.table(self._of_trials("front", caption, own)))
        return section

    def _afterwards(self) -> Section:
        sweep = self.sweep
        section = Section("afterwards", "Looked at afterwards: the price of not knowing")
        if sweep.oracle:
            section.intro = (
                "The objective was the oracle itself, so there was nothing that it did not know."
            )
            return section
        known = price(sweep)
        if known is None:
            section.intro = "No test scores of the chosen trial's runs are there."
            return section
        section.intro = (
            "The harness scored the test cases of every finished run once its training was over, "
            f"at the checkpoint that {sweep.objective} chose. The search has not seen these "
            "numbers. To choose by them would be to choose by target labels."
        )
        section.warning = (
            "Labels of target test cases: for judging the objective, never for choosing."
        )
        section.blocks += [
            self.table(self._price_table(known)),
            self.chart(
                "agreement",
                f"Test Dice over {sweep.objective}, a dot a trial"
                f"{', bars: standard deviation over seeds' * (known.seeds > 1)}. Looked at "
                "afterwards.",
                sweep_charts.agreement(known.trials, sweep.objective, known.chosen, known.rho),
            ),
        ]
        points = self._curve_points()
        if points is not None:
            (name, log), *_ = sweep.parameters.items()
            caption = (
                f"{sweep.objective} and test Dice over {name}: what was known, and what was not."
            )
            figure = sweep_charts.curve(points, name, log, sweep.objective, dice=True)
            section.blocks.append(self.chart(f"curve_{name}_afterwards", caption, figure))
        return section

    def _price_table(self, known: Price) -> Table:
        sweep = self.sweep
        numbers = [known.chosen, known.best]
        dice = [known.dice(number) for number in numbers]
        values = known.trials.set_index("number")[sweep.objective]
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
                [*(100 * mean for mean, _ in dice), -100 * known.difference],
                spread=[*(100 * sd for _, sd in dice), 100 * known.spread],
                group=AFTERWARDS,
            ),
        ]
        if len(directions) > 1:
            for direction in directions:
                own = [100 * float(by_direction[direction, number]) for number in numbers]
                columns.append(Column(direction, [*own, own[0] - own[1]], group=AFTERWARDS))
        return Table(
            "price",
            "The chosen configuration, the one that the oracle would have chosen, and the price of "
            "not knowing, in points of test Dice.",
            [f"chosen by {sweep.objective}", "highest test Dice (oracle)", "chosen - oracle"],
            columns,
            unranked=frozenset({"highest test Dice (oracle)"}),
            notes=[
                f"± is the standard deviation over {known.seeds} seeds; of the "
                "difference, over the differences of equal seeds."
                if known.seeds > 1
                else "One seed: nothing says how much of the difference is chance.",
                *[
                    f"The highest of {len(known.trials)} means is partly luck, so the true price "
                    "is smaller rather than larger."
                ]
                * (known.best != known.chosen),
                *[f"Without trials {', '.join(map(str, known.left_out))}: scores are missing."]
                * bool(known.left_out),
            ],
            first="",
        )

    def _workers(self) -> Section:
        trials = self.sweep.trials.dropna(subset=["began", "ended"])
        section = Section("workers", "Who did what")
        if trials.empty:
            return section
        count = trials["worker"].nunique()
        repeated = int((~trials["counted"]).sum())
        section.intro = f"{len(trials)} trials by {count} worker process{'es'[: 2 * (count > 1)]}"
        section.intro += (
            f"; {repeated} were given up (killed or asked to end) and taken up again, counted once."
            if repeated
            else "."
        )
        caption = "When each worker was at which trial."
        section.blocks.append(self.chart("time_line", caption, sweep_charts.time_line(trials)))
        return section

    def _trials(self) -> Section:
        sweep = self.sweep
        section = Section("runs", "Trials and runs", "What every number was made of.")
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
                    Column.of(metric, runs[name], f"test {metric.heading}", group=AFTERWARDS)
                    for name, metric in METRICS.items()
                ),
            ]
            names = list(runs["run"])
            caption = "The runs of finished trials."
            table = Table("runs", caption, names, columns, frozenset(names), first="run")
            section.blocks.append(self.table(table))
        return section

    def _of_trials(
        self, name: str, caption: str, trials: pd.DataFrame, everything: bool = False
    ) -> Table:
        """A table with a row for each of some trials."""
        sweep = self.sweep
        columns = []
        if everything:
            columns = [
                Column("state", [_state(row) for row in trials.itertuples()]),
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


def _state(row: Any) -> str:
    return str(row.state) if row.counted else f"{row.state}, taken up again"


def shown(value: Any) -> str:
    """A value as a reader wants it."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return "–" if value is None else str(value)
