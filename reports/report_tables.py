"""The tables of a report: which numbers stand in them, and what their marks mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from glua_bench.reports import comparison, statistics
from glua_bench.reports.comparison import LOWER, UPPER
from glua_bench.reports.results import ORACLE, Results, plain
from glua_bench.reports.tables import Column, Table

SIGNIFICANT = 0.05
MOST_PAIRED = 40  # entries whose pairs are tested: 780 pairs, of which nobody reads more
SPREAD = (
    "± is the standard deviation over seeds of the mean over cases and structures; a missed "
    "structure counts with Dice 0 and the diagonal of its volume as distance."
)
UNTESTED = (
    f"No test: it needs two seeds or more, and two to {MOST_PAIRED} entries besides the bound."
)
PRIVILEGED = f"{UPPER} trained on labels of target cases (privileged): a bound, not a competitor."


def ordered(lines: pd.DataFrame) -> list[str]:
    """Entries of one task as they stand in tables: the lower bound, by Dice, the upper bound."""
    entries = [str(entry) for entry in lines["Dice"].sort_values().index]
    first, last = ([name] if name in entries else [] for name in (LOWER, UPPER))
    return [*first, *(e for e in entries if e not in (LOWER, UPPER)), *last]


def entries_of(results: Results, task: str, selector: str = "last") -> list[str]:
    """The entries of a task in the order of its main table."""
    return ordered(comparison.table(plain(results.of(task, selector)), selector).loc[task])


def title(entry: str) -> str:
    """An entry's name in a table."""
    return f"{entry} (privileged)" if entry == UPPER else entry


def run_ids(rows: pd.DataFrame, entries: Sequence[str]) -> list[list[str]]:
    """The runs behind each entry."""
    found = rows.drop_duplicates("run").groupby("entry", observed=True)["run"].agg(list)
    return [[str(run) for run in found.get(entry, [])] for entry in entries]


def main(results: Results, task: str, selector: str = "last") -> Table:
    """A task's main table in the field's form: Dice and ASSD of each structure, and their means.

    Args:
        results: the runs.
        task: e.g. "phantom mr-ct".
        selector: whose checkpoints count.
    """
    rows = plain(results.of(task, selector))
    lines = comparison.table(rows, selector).loc[task]
    entries = ordered(lines)
    keys = ["entry", "seed", "structure"]
    by_structure = rows.groupby(keys, observed=True)[["dice", "assd"]].mean()
    by_structure = by_structure.groupby(["entry", "structure"], observed=True).mean()
    structures = [str(name) for name in rows["structure"].unique()]
    lines = lines.loc[entries]

    def of(metric: str, structure: str, scale: float) -> list[float]:
        return [scale * float(by_structure[metric].get((e, structure), math.nan)) for e in entries]

    dice, assd = "Dice (%)", "ASSD (mm)"
    gap = [
        math.nan if e in (LOWER, UPPER) else 100 * lines.loc[e, "gap recovered"] for e in entries
    ]
    columns = [
        *(Column(s, of("dice", s, 100), 1, None, "higher", dice) for s in structures),
        Column(
            "mean",
            list(100 * lines["Dice"]),
            1,
            list(100 * lines["sd"]),
            "higher",
            dice,
        ),
        *(Column(s, of("assd", s, 1), 1, None, "lower", assd) for s in structures),
        Column("mean", list(lines["ASSD mm"]), 1, None, "lower", assd),
        Column("gap recov. (%)", gap, 0, None, "higher"),
        Column("missed", [float(v) for v in lines["missed"]], 0),
        Column("seeds", [float(v) for v in lines["seeds"]], 0),
    ]
    marks, notes = {}, [SPREAD, PRIVILEGED] if UPPER in entries else [SPREAD]
    scores = statistics.scores(rows[rows["entry"] != UPPER], task, selector=selector)
    best, worse = _worse_than_best(scores)
    if best:
        place = len(structures)
        marks = {(entries.index(entry), place): "†" for entry in worse}
        seeds, cases = (scores.index.get_level_values(n).nunique() for n in ("seed", "case"))
        notes.append(
            f"† lower than {best}, the best mean (Wilcoxon's test paired by case and seed, Holm's "
            f"correction over all pairs, p < {SIGNIFICANT:g}; {cases} cases, {seeds} seeds)."
        )
    else:
        notes.append(UNTESTED)
    return Table(
        f"main_{task.replace(' ', '_')}",
        f"{task}: Dice and ASSD on the test cases, checkpoint by {_selector(selector)}.",
        [title(entry) for entry in entries],
        columns,
        frozenset({title(UPPER)}),
        marks,
        notes,
        run_ids(rows, entries),
    )


def _worse_than_best(scores: pd.DataFrame) -> tuple[str, list[str]]:
    """The entry with the best mean, and those that are lower significantly.

    "" for one seed, which decides nothing, and for so many entries that no pair could.
    """
    seeds = scores.index.get_level_values("seed").nunique()
    if not 2 <= scores.shape[1] <= MOST_PAIRED or seeds < 2:
        return "", []
    best = str(scores.mean().idxmax())
    pairs = statistics.pairs(scores)
    lower = []
    for pair in pairs.itertuples():
        if best in (pair.a, pair.b) and pair.p_holm < SIGNIFICANT:
            other, sign = (pair.b, 1) if pair.a == best else (pair.a, -1)
            if sign * pair.difference > 0:
                lower.append(str(other))
    return best, lower


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
            Column("Dice (%)", list(100 * lines["Dice"]), 1, list(100 * lines["sd"]), "higher"),
            Column("training (s)", list(lines["training s"]), 0, None, "lower"),
            Column("s an update", list(lines["s a step"]), 3, None, "lower"),
            Column("peak memory (MiB)", list(lines["peak MiB"]), 0, None, "lower"),
            Column("on", [", ".join(map(str, devices[e])) or MISSING_DEVICE for e in entries]),
        ],
        frozenset({title(UPPER)}),
        notes=[
            "An update is one of the segmenter; what a method trains besides is in the seconds. "
            "Memory is that of the GPU where there is one, else of the whole process."
        ],
        ids=run_ids(rows, entries),
    )


MISSING_DEVICE = "unknown"


def ranking(results: Results, task: str, selector: str = "last") -> Table:
    """Ranks by both ways to aggregate, with intervals and stability."""
    rows = plain(results.of(task, selector))
    scores = statistics.scores(rows[rows["entry"] != UPPER], task, selector=selector)
    ranks, spans = statistics.ranking(scores), statistics.intervals(scores)
    spans = spans.loc[ranks.index]
    entries = [str(entry) for entry in ranks.index]
    return Table(
        f"ranking_{task.replace(' ', '_')}",
        f"{task}: ranks by mean Dice, and how stable they are.",
        entries,
        [
            Column("Dice (%)", list(100 * ranks["mean"]), 1, None, "higher"),
            Column("low", list(100 * spans["low"]), 1, None, "", "95 % interval"),
            Column("high", list(100 * spans["high"]), 1, None, "", "95 % interval"),
            Column("of the mean", list(ranks["rank"]), 0, None, "", "rank"),
            Column("mean of ranks", list(ranks["mean_rank"]), 2, None, "", "rank"),
            Column("same rank (%)", list(100 * ranks["stability"]), 0, None, "", "resamples"),
            Column("from", list(ranks["rank_low"]), 0, None, "", "resamples"),
            Column("to", list(ranks["rank_high"]), 0, None, "", "resamples"),
        ],
        notes=[
            "Intervals and resamples draw cases and seeds with replacement "
            f"({statistics.DRAWS} draws). “Of the mean” ranks mean scores; “mean of ranks” ranks "
            "within each case and seed first. The last two columns hold 95 % of the ranks."
        ],
        ids=run_ids(rows, entries),
    )


def pairs(results: Results, task: str, selector: str = "last") -> Table:
    """Every two entries: difference, interval, test, effect size, probability."""
    rows = plain(results.of(task, selector))
    scores = statistics.scores(rows[rows["entry"] != UPPER], task, selector=selector)
    found = statistics.pairs(scores)
    one_seed = scores.index.get_level_values("seed").nunique() == 1
    if one_seed:  # one training of each method says nothing about its next one
        found[["p_holm", "effect"]] = math.nan
    # The better entry first, so that every line reads the same way.
    turn = found["difference"] < 0
    sign = 1 - 2 * turn.astype(int)
    first = found["a"].astype(str).where(~turn, found["b"].astype(str))
    second = found["b"].astype(str).where(~turn, found["a"].astype(str))
    low = found["low"].where(~turn, -found["high"])
    high = found["high"].where(~turn, -found["low"])
    better = found["better"].where(~turn, 1 - found["better"])
    return Table(
        f"pairs_{task.replace(' ', '_')}",
        f"{task}: every two methods, the better one first.",
        [f"{a} – {b}" for a, b in zip(first, second, strict=True)],
        [
            Column(
                "difference", list(100 * sign * found["difference"]), 1, None, "", "Dice (points)"
            ),
            Column("low", list(100 * low), 1, None, "", "95 % interval"),
            Column("high", list(100 * high), 1, None, "", "95 % interval"),
            Column("p (Holm)", list(found["p_holm"]), 4),
            Column("effect size", list(sign * found["effect"]), 2),
            Column("P(better) (%)", list(100 * better), 0),
        ],
        notes=[UNTESTED] * one_seed
        + [
            "p by Wilcoxon's signed-rank test paired by case and seed, corrected by Holm's "
            "method; the effect size is the matched-pairs rank-biserial correlation; P(better) is "
            "the share of resamples of cases and seeds. Cases of one seed are not independent of "
            "those of another: with few cases p is too small, the interval is not."
        ],
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
    present = set(lines.index.get_level_values("entry"))
    entries = [entry for entry in names if entry in present]
    columns = []
    for task in [t for t in results.tasks if method in set(own.loc[own["task"] == t, "method"])]:
        part = lines.loc[task].reindex(entries)
        gap = [
            math.nan if e in (LOWER, UPPER) else 100 * part.loc[e, "gap recovered"] for e in entries
        ]
        columns += [
            Column("Dice (%)", list(100 * part["Dice"]), 1, list(100 * part["sd"]), "higher", task),
            Column("gap (%)", gap, 0, None, "higher", task),
            Column("ASSD (mm)", list(part["ASSD mm"]), 1, None, "lower", task),
            Column("seeds", list(part["seeds"]), 0, None, "", task),
        ]
    seconds = lines["s a step"].groupby("entry", observed=True).mean()
    columns.append(Column("s an update", [float(seconds.get(e, math.nan)) for e in entries], 3))
    return Table(
        f"ablation_{method}",
        f"Ablation of {method}.",
        [names[entry] for entry in entries],
        columns,
        frozenset({title(UPPER)}),
        notes=[SPREAD],
        ids=run_ids(shown, entries),
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
    per_case = rows.groupby(["run", "case"], observed=True)["dice"].mean()
    dice = per_case.groupby("run", observed=True).mean()
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
                    "dice": float(dice[run]),
                    "changed": bool(changes),
                }
            )
    frames = {name: pd.DataFrame(points) for name, points in found.items()}
    return {name: frame for name, frame in frames.items() if frame["value"].nunique() >= 3}


def curve(method: str, setting: str, points: pd.DataFrame) -> Table:
    """The numbers of a curve."""
    values = sorted(points["value"].unique())
    columns = []
    for task, part in points.groupby("task"):
        by_value = part.groupby("value")["dice"]
        mean, deviation = by_value.mean(), by_value.std()
        columns.append(
            Column(
                "Dice (%)",
                [100 * float(mean.get(value, math.nan)) for value in values],
                1,
                [100 * float(deviation.get(value, math.nan)) for value in values],
                "higher",
                str(task),
            )
        )
    default = set(points.loc[~points["changed"], "value"])
    return Table(
        f"curve_{method}_{setting}",
        f"{method}: Dice over {setting}, all other settings at their defaults.",
        [f"{value:g}" + (" (default)" if value in default else "") for value in values],
        columns,
        notes=[SPREAD, "The best value here was found with target labels, so it is not a choice."],
        first=setting,
    )


# -- selectors ---------------------------------------------------------------------------------


def selectors(results: Results, task: str) -> Table:
    """The Dice that each selector would have given to each entry."""
    rows = plain(results.rows[results.rows["task"] == task])
    rows = rows[rows["entry"] != UPPER]
    dice = _by_selector(rows)
    names = [str(name) for name in dice.columns if name != ORACLE]
    names += [ORACLE] * (ORACLE in dice)
    entries = [str(entry) for entry in dice.index]
    return Table(
        f"selectors_{task.replace(' ', '_')}",
        f"{task}: Dice (%) of the checkpoint that each selector chooses.",
        entries,
        [Column(_selector(name), list(100 * dice[name]), 1) for name in names],
        notes=["oracle chose by Dice on the test cases (privileged): never a result."]
        if ORACLE in names
        else [],
        ids=run_ids(rows, entries),
    )


def _by_selector(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice, entry × selector; of seeds that have all selectors."""
    keys = ["entry", "selector", "seed", "case"]
    per_case = rows.groupby(keys, observed=True)["dice"].mean()
    per_run = per_case.groupby(["entry", "selector", "seed"], observed=True).mean()
    dice = per_run.groupby(["entry", "selector"], observed=True).mean().unstack("selector")
    dice.columns = [str(name) for name in dice.columns]
    dice.index = [str(name) for name in dice.index]
    return dice


def regrets(results: Results) -> pd.DataFrame:
    """What a selector gives away: the oracle's Dice minus the selector's, of each run.

    Returns:
        task, entry, seed, selector, regret; empty where no run was made with --oracle.
    """
    rows = plain(results.rows)
    rows = rows[rows["entry"] != UPPER]
    keys = ["task", "entry", "seed", "selector"]
    per_case = rows.groupby([*keys, "case"], observed=True)["dice"].mean()
    dice = per_case.groupby(keys, observed=True).mean().unstack("selector")
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
        [_selector(name) for name in names],
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


def _selector(name: str) -> str:
    return f"{name} (privileged)" if name == ORACLE else name


# -- provenance --------------------------------------------------------------------------------


def runs(results: Results, selector: str = "last") -> Table:
    """Every run, with what its numbers were made by."""
    rows = results.chosen_by(selector)
    per_case = rows.groupby(["run", "case"], observed=True)["dice"].mean()
    dice = per_case.groupby("run", observed=True).mean()
    lines = rows.drop_duplicates("run").sort_values(["task", "entry", "seed"])
    names = [str(run) for run in lines["run"]]
    return Table(
        "runs",
        "The runs behind the numbers.",
        names,
        [
            Column("entry", [title(str(entry)) for entry in lines["entry"]]),
            Column("task", [str(task) for task in lines["task"]]),
            Column("seed", [float(seed) for seed in lines["seed"]], 0),
            Column("Dice (%)", [100 * float(dice[run]) for run in names], 1),
            Column("training (s)", [float(value) for value in lines["seconds"]], 0),
            Column("on", [str(device) for device in lines["device"]]),
            Column("commit", [str(commit) for commit in lines["commit"]]),
            Column("code", [str(code) for code in lines["code"]]),
        ],
        first="run",
    )
