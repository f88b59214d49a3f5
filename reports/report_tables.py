"""The tables of a report: which numbers stand in them, and what their marks mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from glua_bench.config import LOWER, ORACLE, UPPER
from glua_bench.reports import comparison, statistics
from glua_bench.reports.comparison import title
from glua_bench.reports.results import Results, plain
from glua_bench.reports.tables import Column, Table
from glua_bench.scoring.metrics import METRICS, PRIMARY, Metric

MOST_PAIRED = 40  # entries whose pairs are listed: 780 pairs, of which nobody reads more
MEANS = (
    "Means over seeds, cases and structures; a missed structure counts with Dice 0 and the "
    "diagonal of its volume as distance."
)
SPREAD = "± is the standard deviation over seeds of the mean over cases and structures."
MODEL = (
    "from the mean squares of seeds and cases (crossed random effects, Cochran and Cox's quantile)"
)
PRIVILEGED = f"{UPPER} trained on labels of target cases (privileged): a bound, not a competitor."


def ordered(lines: pd.DataFrame) -> list[str]:
    """Entries of one task as they stand in tables: the lower bound, by Dice, the upper bound."""
    entries = [str(entry) for entry in lines[PRIMARY.label].sort_values().index]
    first, last = ([name] if name in entries else [] for name in (LOWER, UPPER))
    return [*first, *(e for e in entries if e not in (LOWER, UPPER)), *last]


def entries_of(results: Results, task: str, selector: str = "last") -> list[str]:
    """The entries of a task in the order of its main table."""
    return ordered(comparison.table(plain(results.of(task, selector)), selector).loc[task])


def _unranked(lines: pd.DataFrame) -> frozenset[str]:
    """Names of rows that are neither best nor second: the bound, and what is not paired."""
    entry = lines.index.get_level_values("entry")
    return frozenset(map(title, {UPPER, *map(str, entry[~lines["compared"].to_numpy(bool)])}))


def _means(lines: pd.DataFrame) -> list[str]:
    """What the means of a table are, and their spread where there is one."""
    return [MEANS, *[SPREAD] * bool(lines["sd"].notna().any())]


def run_ids(rows: pd.DataFrame, entries: Sequence[str]) -> list[list[str]]:
    """The runs behind each entry."""
    found = rows.drop_duplicates("run").groupby("entry", observed=True)["run"].agg(list)
    return [[str(run) for run in found.get(entry, [])] for entry in entries]


def main(results: Results, task: str, selector: str = "last") -> Table:
    """A task's main table in the field's form: every metric's mean, and that of each structure.

    Args:
        results: the runs.
        task: e.g. "phantom mr-ct".
        selector: whose checkpoints count.
    """
    own = results.with_repeats(plain(results.of(task, selector)))
    every = comparison.table(own, selector)
    rows, designs = comparison.compared(own, selector)
    lines = every.loc[task]
    entries = ordered(lines)
    keys = ["entry", "seed", "structure"]
    by_structure = rows.groupby(keys, observed=True)[list(METRICS)].mean()
    by_structure = by_structure.groupby(["entry", "structure"], observed=True).mean()
    structures = [str(name) for name in rows["structure"].unique()]
    lines = lines.loc[entries]

    columns = []
    for metric in METRICS.values():
        for structure in structures if metric.per_structure else ():
            values = by_structure[metric.name].xs(structure, level="structure").reindex(entries)
            columns.append(Column.of(metric, values, structure, group=metric.heading))
        columns.append(_mean(metric, lines, "mean", metric.heading))
        if metric == PRIMARY and lines["last bits"].notna().any():
            bits = list(metric.scale * lines["last bits"])
            columns.append(Column("last bits ±", bits, metric.digits, group=metric.heading))
    columns += [
        Column("gap recov. (%)", _gap(lines, entries), 0, None, "higher"),
        Column("missed", [float(v) for v in lines["missed"]], 0),
        Column("seeds", [float(v) for v in lines["seeds"]], 0),
    ]
    marks, notes = {}, [*_means(lines), comparison.last_bits_note(lines)]
    notes += [PRIVILEGED] * (UPPER in entries) + comparison.gap_notes(every)
    scores = comparison.competing(statistics.scores(rows, task, selector))
    why = untested(scores)
    if not why:
        best = str(scores.mean().idxmax())
        pairs = statistics.pairs(scores)
        marks = {(entries.index(e), len(structures)): "†" for e in _worse(pairs, best)}
        seeds, cases = statistics.counts(scores)
        corrected = f", by Holm's method over {len(pairs)} pairs" if len(pairs) > 1 else ""
        notes.append(
            (f"† lower than {best}, " if marks else f"No entry is lower than {best}, ")
            + "the best mean, beyond chance. Beyond chance is p < "
            f"{statistics.SIGNIFICANT:g} {MODEL}{corrected}; {cases} cases, {seeds} seeds."
        )
    notes += [why, *designs[task].notes]
    return Table(
        f"main_{task.replace(' ', '_')}",
        f"{task}: {_titles()} on the test cases, checkpoint by {title(selector)}.",
        [title(entry) for entry in entries],
        columns,
        _unranked(lines),
        marks,
        [note for note in notes if note],
        run_ids(results.with_repeats(rows), entries),
    )


def _titles() -> str:
    *first, last = (metric.title for metric in METRICS.values())
    return f"{', '.join(first)} and {last}"


def _mean(metric: Metric, lines: pd.DataFrame, title: str = "", group: str = "") -> Column:
    """The column of a metric's means, with the spread of the primary one."""
    spread = lines["sd"] if metric == PRIMARY else None
    return Column.of(metric, lines[metric.label], title, spread, group)


def _gap(lines: pd.DataFrame, entries: Sequence[str]) -> list[float]:
    """The share of the gap that entries recover in percent; nan for the bounds."""
    return [
        math.nan if e in (LOWER, UPPER) else 100 * lines.loc[e, "gap recovered"] for e in entries
    ]


def untested(scores: pd.DataFrame) -> str:
    """Why a table has no tests; "" where it has."""
    if scores.shape[1] < 2:
        return "Nothing is tested: one method stands besides the bound, or none."
    return statistics.untested(*statistics.counts(scores))


def _worse(pairs: pd.DataFrame, best: str) -> list[str]:
    """The entries that are lower than one of them beyond chance."""
    lower = []
    for pair in pairs.itertuples():
        if best in (pair.a, pair.b) and pair.p_holm < statistics.SIGNIFICANT:
            other, sign = (pair.b, 1) if pair.a == best else (pair.a, -1)
            if sign * pair.difference > 0:
                lower.append(str(other))
    return lower


def cost(results: Results, task: str, selector: str = "last") -> Table:
    """Seconds and memory of a task's entries beside their Dice."""
    rows = plain(results.of(task, selector))
    lines = comparison.table(rows, selector).loc[task]
    entries = ordered(lines)
    lines = lines.loc[entries]
    devices = rows.drop_duplicates("run").groupby("entry", observed=True)["device"].unique()
    return Table(
        f"cost_{task.replace(' ', '_')}",
        f"{task}: what training costs, stages that runs share counted in each.",
        [title(entry) for entry in entries],
        [
            _mean(PRIMARY, lines),
            Column("training (s)", list(lines["training s"]), 0, None, "lower"),
            Column("s an update", list(lines["s a step"]), 3, None, "lower"),
            Column("peak memory (MiB)", list(lines["peak MiB"]), 0, None, "lower"),
            Column("on", [", ".join(map(str, devices[e])) or MISSING_DEVICE for e in entries]),
        ],
        _unranked(lines),
        notes=[
            *_means(lines),
            "An update is one of the segmenter; what a method trains besides is in the seconds. "
            "Memory is that of the GPU where there is one, else of the whole process.",
        ],
        ids=run_ids(rows, entries),
    )


MISSING_DEVICE = "unknown"


def ranking(results: Results, task: str, selector: str = "last") -> Table:
    """Ranks by both ways to aggregate, with intervals and what the tests leave open."""
    rows, designs = comparison.compared(plain(results.of(task, selector)), selector)
    scores = comparison.competing(statistics.scores(rows, task, selector))
    ranks, spans = statistics.ranking(scores), statistics.intervals(scores)
    spans = spans.loc[ranks.index]
    entries = [str(entry) for entry in ranks.index]
    seeds, cases = statistics.counts(scores)
    columns = [
        Column.of(PRIMARY, ranks["mean"]),
        Column("low", list(100 * spans["low"]), 1, None, "", "95 % interval"),
        Column("high", list(100 * spans["high"]), 1, None, "", "95 % interval"),
        Column("of the mean", list(ranks["rank"]), 0, None, "", "rank"),
        Column("mean of ranks", list(ranks["mean_rank"]), 2, None, "", "rank"),
    ]
    notes = [
        interval_note(seeds, cases),
        "“Of the mean” ranks mean scores; “mean of ranks” ranks within each case and seed first.",
    ]
    why = untested(scores)
    if not why:
        columns += [
            Column("from", list(ranks["rank_low"]), 0, None, "", "left open"),
            Column("to", list(ranks["rank_high"]), 0, None, "", "left open"),
        ]
        notes.append(
            "“Left open” are the ranks that no test of two methods excludes (p < "
            f"{statistics.SIGNIFICANT:g} by Holm's method). They hold the true ranks of all "
            "methods at once with 95 % confidence."
        )
    return Table(
        f"ranking_{task.replace(' ', '_')}",
        f"{task}: ranks by mean Dice, and how sure they are.",
        entries,
        columns,
        notes=[*notes, *[why] * bool(why), *designs[task].notes],
        ids=run_ids(rows, entries),
    )


def interval_note(seeds: int, cases: int) -> str:
    """What the intervals of a design are about."""
    if cases < 2:
        return "One case has no interval."
    if seeds < 2:
        return (
            f"95 % intervals (Student's t) over {cases} cases, for this one training of each "
            "method: how far another training may lie from it, one seed cannot tell."
        )
    return (
        f"95 % intervals for new cases and new trainings, over {cases} cases and {seeds} seeds, "
        f"{MODEL}. How often they hold the truth is measured in docs/protocol.md."
    )


def pairs(results: Results, task: str, selector: str = "last") -> Table:
    """Every two entries: difference, interval, test."""
    rows, designs = comparison.compared(plain(results.of(task, selector)), selector)
    scores = comparison.competing(statistics.scores(rows, task, selector))
    found = statistics.pairs(scores)
    why = untested(scores)
    # The better entry first, so that every line reads the same way.
    turn = found["difference"] < 0
    sign = 1 - 2 * turn.astype(int)
    first = found["a"].astype(str).where(~turn, found["b"].astype(str))
    second = found["b"].astype(str).where(~turn, found["a"].astype(str))
    low = found["low"].where(~turn, -found["high"])
    high = found["high"].where(~turn, -found["low"])
    columns = [
        Column("difference", list(100 * sign * found["difference"]), 1, None, "", "Dice (points)"),
        Column("low", list(100 * low), 1, None, "", "95 % interval"),
        Column("high", list(100 * high), 1, None, "", "95 % interval"),
    ]
    notes = [interval_note(*statistics.counts(scores))]
    if why:
        notes.append(why)
    else:
        columns.append(Column("p", list(found["p"]), 4))
        if len(found) > 1:
            columns.append(Column("p (Holm)", list(found["p_holm"]), 4))
        notes.append("p belongs to the interval: below 0.05 where the interval leaves 0 out.")
        if len(found) > 1:
            notes.append(
                f"“Holm” is corrected for all {len(found)} pairs by Holm's method; the intervals "
                "are not."
            )
    return Table(
        f"pairs_{task.replace(' ', '_')}",
        f"{task}: every two methods, that of the higher mean first.",
        [f"{a} – {b}" for a, b in zip(first, second, strict=True)],
        columns,
        notes=[*notes, *designs[task].notes],
        first="pair",
    )


# -- ablation ----------------------------------------------------------------------------------


def ablated(results: Results) -> list[str]:
    """Methods with runs at other settings than their defaults."""
    changed = results.rows["settings"] != "{}"
    return sorted(results.rows.loc[changed, "method"].astype(str).unique())


def ablation(results: Results, method: str, selector: str = "last") -> Table:
    """A method's ablation: bounds, parts, declared variants in their order, further settings.

    Values of one number, of which there are three or more, are a curve instead (`curves`).
    """
    rows = results.chosen_by(selector)
    on_curves = {
        str(entry)
        for points in curves(results, method, selector).values()
        for entry in points.loc[points["changed"], "entry"]
    }
    own = rows[(rows["method"] == method) & (rows["base"] == method)]
    known = own.drop_duplicates("entry").set_index("entry")
    declared, parts = results.declared(method)
    names: dict[str, str] = {LOWER: LOWER}
    for part in parts:
        names[part] = part
    position = {name: index for index, name in enumerate(declared)}
    found = sorted(
        (entry for entry in known.index if str(entry) not in on_curves),
        key=lambda e: (position.get(str(known.loc[e, "variant"]), len(position)), str(e)),
    )
    for entry in found:
        names[str(entry)] = str(known.loc[entry, "variant"]) or str(entry)
    names[UPPER] = title(UPPER)
    shown = rows[rows["entry"].isin(names)]
    lines = comparison.table(shown, selector)
    compared, designs = comparison.compared(shown, selector)
    unpaired = set(lines.index.get_level_values("entry")[~lines["compared"].to_numpy(bool)])
    out = [f"{task}: {note}" for task, own_design in designs.items() for note in own_design.notes]
    present = set(lines.index.get_level_values("entry"))
    entries = [entry for entry in names if entry in present]
    columns = []
    for task in [t for t in results.tasks if method in set(own.loc[own["task"] == t, "method"])]:
        part = lines.loc[task].reindex(entries)
        first, *others = (_mean(metric, part, group=task) for metric in METRICS.values())
        columns += [
            first,
            Column("gap (%)", _gap(part, entries), 0, None, "higher", task),
            *others,
            Column("seeds", list(part["seeds"]), 0, None, "", task),
        ]
    seconds = lines["s a step"].groupby("entry", observed=True).mean()
    columns.append(Column("s an update", [float(seconds.get(e, math.nan)) for e in entries], 3))
    return Table(
        f"ablation_{method}",
        f"Ablation of {method}.",
        [names[entry] for entry in entries],
        columns,
        frozenset({names.get(entry, entry) for entry in unpaired} | {title(UPPER)}),
        notes=[
            *_means(lines),
            *filter(None, [comparison.last_bits_note(lines)]),
            *comparison.gap_notes(lines),
            *out,
        ],
        ids=run_ids(compared, entries),
        first="variant",
    )


def curves(results: Results, method: str, selector: str = "last") -> dict[str, pd.DataFrame]:
    """Dice over the values of one numeric setting, all others at their defaults.

    Returns:
        setting → task, entry, value, seed, dice, changed (whether the value is not the default),
        for settings with three values or more.
    """
    rows = results.chosen_by(selector)
    rows = rows[(rows["method"] == method) & (rows["base"] == method)]
    runs = rows.drop_duplicates("run").set_index("run")
    dice = statistics.means(rows, ["run"])
    found: dict[str, list[dict[str, Any]]] = {}
    settings = {run: json.loads(str(text)) for run, text in runs["settings"].items()}
    configs = {run: json.loads(str(text)) for run, text in runs["config"].items()}
    numeric = {
        name
        for changes in settings.values()
        for name, value in changes.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    for name in sorted(numeric):
        for run, changes in settings.items():
            # A run of another version of the method may not have the setting.
            if set(changes) - {name} or name not in configs[run]:
                continue
            found.setdefault(name, []).append(
                {
                    "task": str(runs.loc[run, "task"]),
                    "entry": str(runs.loc[run, "entry"]),
                    "value": float(configs[run][name]),
                    "seed": int(runs.loc[run, "seed"]),
                    PRIMARY.name: float(dice[run]),
                    "changed": bool(changes),
                }
            )
    frames = {name: pd.DataFrame(points) for name, points in found.items()}
    return {name: frame for name, frame in frames.items() if frame["value"].nunique() >= 3}


def curve(method: str, setting: str, points: pd.DataFrame) -> Table:
    """The numbers of a curve."""
    values = sorted(points["value"].unique())
    columns = []
    few: set[float] = set()  # values with fewer seeds than others, which compete with none
    for task, part in points.groupby("task"):
        by_value = part.groupby("value")[PRIMARY.name]
        mean, deviation = (found.reindex(values) for found in (by_value.mean(), by_value.std()))
        columns.append(Column.of(PRIMARY, mean, spread=deviation, group=str(task)))
        seeds = by_value.size().reindex(values, fill_value=0)
        columns.append(Column("seeds", list(seeds.astype(float)), 0, None, "", str(task)))
        few |= set(seeds.index[seeds < seeds.max()])
    default = set(points.loc[~points["changed"], "value"])
    names = {v: f"{v:g}" + (" (default)" if v in default else "") for v in values}
    return Table(
        f"curve_{method}_{setting}",
        f"{method}: Dice over {setting}, all other settings at their defaults.",
        list(names.values()),
        columns,
        frozenset(names[v] for v in few),
        notes=[
            *_means(points.groupby(["task", "value"])[PRIMARY.name].agg(sd="std")),
            "The best value here was found with target labels, so it is not a choice.",
        ],
        first=setting,
    )


# -- selectors ---------------------------------------------------------------------------------


def selectors(results: Results, task: str) -> Table:
    """The Dice that each selector would have given to each entry."""
    rows = plain(results.rows[results.rows["task"] == task])
    rows = rows[rows["entry"] != UPPER]
    dice, seeds = _by_selector(rows)
    names = [str(name) for name in dice.columns if name != ORACLE]
    names += [ORACLE] * (ORACLE in dice)
    entries = [str(entry) for entry in dice.index]
    return Table(
        f"selectors_{task.replace(' ', '_')}",
        f"{task}: Dice (%) of the checkpoint that each selector chooses.",
        entries,
        [
            *(Column(title(name), list(100 * dice[name]), 1) for name in names),
            Column("seeds", [float(seeds[entry]) for entry in entries], 0),
        ],
        notes=["oracle chose by Dice on the test cases (privileged): never a result."]
        if ORACLE in names
        else [],
        ids=run_ids(rows, entries),
    )


def _by_selector(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Mean Dice, entry × selector, of the seeds that all selectors of an entry judged; how many."""
    keys = ["entry", "selector", "seed", "case"]
    per_case = rows.groupby(keys, observed=True)[PRIMARY.name].mean()
    per_run = per_case.groupby(["entry", "seed", "selector"], observed=True).mean()
    per_run = per_run.unstack("selector")
    per_run.columns = [str(name) for name in per_run.columns]
    judging = per_run.notna().groupby("entry", observed=True).transform("any")
    whole = (per_run.notna() | ~judging).all(axis=1)
    by_entry = per_run[whole].groupby("entry", observed=True)
    dice, seeds = by_entry.mean(), by_entry.size()
    dice.index = seeds.index = [str(name) for name in dice.index]
    return dice, seeds


def regrets(results: Results) -> pd.DataFrame:
    """What a selector gives away: the oracle's Dice minus the selector's, of each run.

    Returns:
        task, entry, seed, selector, regret; empty where no run was made with --oracle.
    """
    rows = plain(results.rows)
    rows = rows[rows["entry"] != UPPER]
    keys = ["task", "entry", "seed", "selector"]
    dice = statistics.means(rows, keys).unstack("selector")
    dice.columns = [str(name) for name in dice.columns]
    if ORACLE not in dice:
        return pd.DataFrame(columns=[*keys, "regret"])
    regret = -dice.drop(columns=ORACLE).sub(dice[ORACLE], axis=0)
    regret.columns.name = "selector"
    return regret.stack().rename("regret").dropna().reset_index()


def correlations(results: Results) -> pd.DataFrame:
    """How well a selector's score orders checkpoints: Spearman's correlation with target Dice.

    Over all candidates of all runs of a task, and as the mean of the correlations within runs;
    the second is what a selector needs that chooses within one run.

    Returns:
        selector, task, pooled, within, checkpoints; empty without runs made with --oracle.
    """
    from scipy.stats import spearmanr

    columns = ["selector", "task", "pooled", "within", "checkpoints"]
    scores = results.checkpoints
    scores = scores[scores["entry"] != UPPER] if len(scores) else scores
    if not len(scores) or ORACLE not in set(scores["selector"]):
        return pd.DataFrame(columns=columns)
    wide = scores.pivot_table(
        index=["task", "run", "step"], columns="selector", values="score", observed=True
    )
    wide.columns = [str(name) for name in wide.columns]
    found = []
    for task, part in wide.groupby("task", observed=True):
        for name in part.columns:
            own = part[[name, ORACLE]].dropna() if name != ORACLE else part[[]]
            if name in (ORACLE, "last") or len(own) < 3:
                continue
            within = [
                float(spearmanr(run[name], run[ORACLE]).statistic)
                for _, run in own.groupby("run", observed=True)
                if run[name].nunique() > 1 and run[ORACLE].nunique() > 1
            ]
            found.append(
                {
                    "selector": name,
                    "task": str(task),
                    "pooled": float(spearmanr(own[name], own[ORACLE]).statistic),
                    "within": sum(within) / len(within) if within else math.nan,
                    "checkpoints": len(own),
                }
            )
    return pd.DataFrame(found, columns=columns)


def selector_quality(results: Results) -> Table | None:
    """Regret and rank correlation of every selector; None where no run was made with --oracle."""
    regret, correlation = regrets(results), correlations(results)
    if regret.empty:
        return None
    names = [str(n) for n in regret.groupby("selector")["regret"].mean().sort_values().index]
    columns = []
    for task in sorted(regret["task"].astype(str).unique()):
        own = regret[regret["task"] == task].groupby("selector")["regret"]
        related = correlation[correlation["task"] == task].set_index("selector")
        columns += [
            Column(
                "regret",
                [100 * float(own.mean().get(n, math.nan)) for n in names],
                1,
                [100 * float(own.std().get(n, math.nan)) for n in names],
                "lower",
                task,
            ),
            *(
                Column(
                    f"ρ {kind}",
                    [float(related[kind].get(n, math.nan)) for n in names],
                    2,
                    None,
                    "higher",
                    task,
                )
                for kind in ("pooled", "within")
            ),
        ]
    return Table(
        "selectors",
        "What choosing a checkpoint by each selector gives away.",
        [title(name) for name in names],
        columns,
        notes=[
            "Regret: the oracle's Dice minus that of the chosen checkpoint, in points, over the "
            "runs of all entries (± standard deviation). ρ: Spearman's correlation of score and "
            "target Dice, over all checkpoints of all runs (pooled), and the mean within runs. "
            "Both compare with the oracle, which reads target labels (privileged): they judge "
            "selectors, and are no result of a method."
        ],
        first="selector",
    )


# -- provenance --------------------------------------------------------------------------------


def runs(results: Results, selector: str = "last") -> Table:
    """Every run, with what its numbers were made by."""
    rows = results.with_repeats(results.chosen_by(selector))
    dice = statistics.means(rows, ["run"])
    order = ["task", "entry", "seed", statistics.REPEAT]
    lines = rows.drop_duplicates("run").sort_values(order)
    nudged = [int(value) for value in lines[statistics.REPEAT]]
    entries = [
        title(str(entry)) + (f" (repeat {k}, last bits nudged)" if k else "")
        for entry, k in zip(lines["entry"], nudged, strict=True)
    ]
    names = [str(run) for run in lines["run"]]
    return Table(
        "runs",
        "The runs behind the numbers.",
        names,
        [
            Column("entry", entries),
            Column("task", [str(task) for task in lines["task"]]),
            Column("seed", [float(seed) for seed in lines["seed"]], 0),
            Column(PRIMARY.heading, list(PRIMARY.scale * dice[names]), PRIMARY.digits),
            Column("training (s)", [float(value) for value in lines["seconds"]], 0),
            Column("on", [str(device) for device in lines["device"]]),
            Column("commit", [str(commit) for commit in lines["commit"]]),
            Column("code", [str(code) for code in lines["code"]]),
        ],
        first="run",
    )
