"""The tables of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from glua_bench.config import LOWER, ORACLE, UPPER, is_external, is_privileged
from glua_bench.reports import comparison, statistics
from glua_bench.reports.comparison import title
from glua_bench.reports.results import Results, plain
from glua_bench.reports.tables import Column, Table
from glua_bench.scoring.metrics import METRICS, MISSING, PRIMARY, SPACING, Metric

MAX_PAIRED = 40  # entries with a table of pairs (780 pairs)
MISSED = "A missed structure has Dice 0 and the diagonal of its volume as distance."
SPREAD = "±: standard deviation over seeds of the mean over cases and structures."
MODEL = "crossed random effects of seeds and cases, Cochran and Cox's quantile"
BOUNDS = frozenset(map(title, (LOWER, UPPER)))
PRIVILEGED = f"{UPPER} was trained on labelled target cases (privileged): an upper bound."


def ordered(lines: pd.DataFrame) -> list[str]:
    """Order the entries of one task for tables: lower bound, others by Dice, upper bound."""
    entries = [str(entry) for entry in lines[PRIMARY.label].sort_values().index]
    first, last = ([name] if name in entries else [] for name in (LOWER, UPPER))
    return [*first, *(e for e in entries if e not in (LOWER, UPPER)), *last]


def entries_of(results: Results, task: str, selector: str = "last") -> list[str]:
    """Return the entries of a task in the order of its main table."""
    return ordered(comparison.table(plain(results.of(task, selector)), selector).loc[task])


def _unranked(lines: pd.DataFrame) -> frozenset[str]:
    """Return the rows excluded from best and second: privileged and unpaired entries."""
    entry = lines.index.get_level_values("entry")
    unpaired = map(str, entry[~lines["compared"].to_numpy(bool)])
    return frozenset(map(title, {*filter(is_privileged, map(str, entry)), *unpaired}))


def _means(lines: pd.DataFrame) -> list[str]:
    """Return the notes on means and, if defined, their spread."""
    several = bool(lines["sd"].notna().any())
    over = "seeds, cases and structures" if several else "cases and structures, of one seed"
    return [f"Means over {over}. {MISSED}", *[SPREAD] * several]


def run_ids(rows: pd.DataFrame, entries: Sequence[str]) -> list[list[str]]:
    """Return the ids of the runs of each entry."""
    found = rows.drop_duplicates("run").groupby("entry", observed=True)["run"].agg(list)
    return [[str(run) for run in found.get(entry, [])] for entry in entries]


def main(results: Results, task: str, selector: str = "last") -> Table:
    """Build the main table of a task: the mean of every metric, and Dice and ASSD per structure.

    Args:
        results: the runs.
        task: e.g. "phantom mr-ct".
        selector: name of the checkpoint selector.
    """
    own = results.with_repeats(plain(results.of(task, selector)))
    every = comparison.table(own, selector)
    rows, designs = comparison.compared(own, selector)
    entries = ordered(every.loc[task])
    lines = every.loc[task].loc[entries]
    keys = ["entry", "seed", "structure"]
    by_structure = rows.groupby(keys, observed=True)[list(METRICS)].mean()
    by_structure = by_structure.groupby(["entry", "structure"], observed=True).mean()
    structures = [str(name) for name in rows["structure"].unique()]
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
        Column("gap recov. (%)", _gap(lines, entries), 0, better="higher"),
        Column("missed", [float(v) for v in lines["missed"]], 0),
        Column("seeds", [float(v) for v in lines["seeds"]], 0),
    ]
    marks, notes = {}, [*_means(lines), comparison.last_bits_note(lines)]
    notes += [PRIVILEGED] * (UPPER in entries) + comparison.gap_notes(every)
    notes += comparison.outside_notes(every.index)
    scores = comparison.competing(statistics.scores(rows, task, selector))
    why = untested(scores)
    if not why:
        best = str(scores.mean().idxmax())
        pairs = statistics.pairs(scores)
        marks = {(entries.index(e), len(structures)): "†" for e in _worse(pairs, best)}
        seeds, cases = statistics.counts(scores)
        corrected = f"; Holm correction over {len(pairs)} pairs" if len(pairs) > 1 else ""
        notes.append(
            ("†: " if marks else "No entry is ")
            + f"significantly lower than {best}, the best mean (p < {statistics.SIGNIFICANT:g}; "
            f"{MODEL}{corrected}; {cases} cases, {seeds} seeds)."
        )
    notes += [why, *designs[task].notes]
    return Table(
        f"main {task}",
        f"{task}: {_titles()} on the test cases; checkpoint selector: {title(selector)}.",
        [title(entry) for entry in entries],
        columns,
        _unranked(lines),
        marks,
        [note for note in notes if note],
        run_ids(results.with_repeats(rows), entries),
        apart=BOUNDS,
    )


def _titles() -> str:
    *first, last = (metric.title for metric in METRICS.values())
    return f"{', '.join(first)} and {last}"


def _mean(metric: Metric, lines: pd.DataFrame, title: str = "", group: str = "") -> Column:
    """Return the column of a metric's means; the primary metric has its spread."""
    spread = lines["sd"] if metric == PRIMARY else None
    return Column.of(metric, lines[metric.label], title, spread, group)


def _gap(lines: pd.DataFrame, entries: Sequence[str]) -> list[float]:
    """Return the gap recovered by each entry in percent; nan for the bounds."""
    return [
        math.nan if e in (LOWER, UPPER) else 100 * lines.loc[e, "gap recovered"] for e in entries
    ]


def untested(scores: pd.DataFrame) -> str:
    """Return the reason why a table has no tests; "" if it has."""
    if scores.shape[1] < 2:
        return "No tests: fewer than two methods."
    return statistics.untested(*statistics.counts(scores))


def _worse(pairs: pd.DataFrame, best: str) -> list[str]:
    """Return the entries that are significantly lower than the best."""
    lower = []
    for pair in pairs.itertuples():
        if best in (pair.a, pair.b) and pair.p_holm < statistics.SIGNIFICANT:
            other, sign = (pair.b, 1) if pair.a == best else (pair.a, -1)
            if sign * pair.difference > 0:
                lower.append(str(other))
    return lower


def cost(results: Results, task: str, selector: str = "last") -> Table:
    """Build the table of training time and memory of a task."""
    rows = plain(results.of(task, selector))
    lines = comparison.table(rows, selector).loc[task]
    entries = ordered(lines)
    lines = lines.loc[entries]
    devices = rows.drop_duplicates("run").groupby("entry", observed=True)["device"].unique()
    return Table(
        f"cost {task}",
        f"{task}: cost of training. A stage shared by several runs counts in each.",
        [title(entry) for entry in entries],
        [
            _mean(PRIMARY, lines),
            Column("training (s)", list(lines["training s"]), 0, better="lower"),
            Column("s/update", list(lines["s/update"]), 3, better="lower"),
            Column("peak memory (MiB)", list(lines["peak MiB"]), 0, better="lower"),
            Column("device", [", ".join(map(str, devices[e])) or "unknown" for e in entries]),
        ],
        _unranked(lines),
        notes=[
            *_means(lines),
            "s/update: all training, including further networks, per update of the segmenter. "
            "Peak memory: of the GPU, or of the process on a CPU.",
        ],
        ids=run_ids(rows, entries),
        apart=BOUNDS,
    )


def ranking(results: Results, task: str, selector: str = "last") -> Table:
    """Build the table of ranks by both ways to aggregate, with intervals."""
    rows, designs = comparison.compared(plain(results.of(task, selector)), selector)
    scores = comparison.competing(statistics.scores(rows, task, selector))
    ranks, spans = statistics.ranking(scores), statistics.intervals(scores)
    spans = spans.loc[ranks.index]
    entries = [str(entry) for entry in ranks.index]
    columns = [
        Column.of(PRIMARY, ranks["mean"]),
        *_interval(spans["low"], spans["high"]),
        Column("of the mean", list(ranks["rank"]), 0, group="rank"),
        Column("mean of ranks", list(ranks["mean_rank"]), 2, group="rank"),
    ]
    notes = [
        interval_note(*statistics.counts(scores)),
        "Of the mean: rank of the mean score. Mean of ranks: mean over ranks within each case and "
        "seed.",
    ]
    why = untested(scores)
    if not why:
        columns += [
            Column("from", list(ranks["rank_low"]), 0, group="rank interval"),
            Column("to", list(ranks["rank_high"]), 0, group="rank interval"),
        ]
        notes.append(
            "Rank interval: ranks not excluded by the pairwise tests (Holm-corrected p < "
            f"{statistics.SIGNIFICANT:g}); all true ranks are covered simultaneously with 95 % "
            "confidence."
        )
    return Table(
        f"ranking {task}",
        f"{task}: ranks by mean Dice, with intervals.",
        entries,
        columns,
        notes=[*notes, *[why] * bool(why), *designs[task].notes],
        ids=run_ids(rows, entries),
    )


def cases(results: Results, task: str, selector: str = "last") -> Table:
    """Build the table of test cases: voxel size, and the means over methods and seeds."""
    rows, _ = comparison.compared(plain(results.of(task, selector)), selector)
    methods = rows[~rows["entry"].isin([LOWER, UPPER])]
    chosen = methods if len(methods) else rows
    by_case = chosen.groupby("case", observed=True)
    means = by_case[list(METRICS)].mean()
    spacing = rows.groupby("case", observed=True)[list(SPACING)].first().reindex(means.index)
    return Table(
        f"cases {task}",
        f"{task}: voxel size and mean scores of each test case; checkpoint selector: "
        f"{title(selector)}.",
        [str(case) for case in means.index],
        [
            *(
                Column(f"axis {axis}", list(spacing[name]), 2, group="voxel (mm)")
                for axis, name in enumerate(SPACING, start=1)
            ),
            *(Column.of(metric, means[name]) for name, metric in METRICS.items()),
        ],
        frozenset(map(str, means.index)),
        notes=[
            "Distances are computed on the grid of the file, which limits their resolution to the "
            f"voxel size. Means over {'methods' if len(methods) else 'entries'}, seeds and "
            "structures."
        ],
        first="case",
    )


def _interval(low: pd.Series, high: pd.Series) -> list[Column]:
    """Return the columns of a confidence interval of Dice."""
    ends = {"low": low, "high": high}
    return [Column(name, list(100 * end), group="95 % CI") for name, end in ends.items()]


def interval_note(seeds: int, cases: int) -> str:
    """Return the note on the confidence intervals of a design."""
    if cases < 2:
        return "One case: no CI."
    if seeds < 2:
        return (
            f"95 % CI over {cases} cases (Student's t), for this training of each method only: one "
            "seed does not show the variation between trainings."
        )
    return (
        f"95 % CI for new cases and new trainings, from {cases} cases and {seeds} seeds ({MODEL}); "
        "docs/protocol.md reports its measured coverage."
    )


def pairs(results: Results, task: str, selector: str = "last") -> Table:
    """Build the table of pairwise differences, with intervals and tests; better entries first."""
    rows, designs = comparison.compared(plain(results.of(task, selector)), selector)
    scores = comparison.competing(statistics.scores(rows, task, selector))
    found = statistics.pairs(scores)
    why = untested(scores)
    swap = found["difference"] < 0
    first, second = found["a"].where(~swap, found["b"]), found["b"].where(~swap, found["a"])
    low = found["low"].where(~swap, -found["high"])
    high = found["high"].where(~swap, -found["low"])
    difference = list(100 * found["difference"].abs())
    columns = [
        Column("difference", difference, group="Dice (points)"),
        *_interval(low, high),
    ]
    notes = [interval_note(*statistics.counts(scores))]
    if why:
        notes.append(why)
    else:
        columns.append(Column("p", list(found["p"]), 4))
        if len(found) > 1:
            columns.append(Column("p (Holm)", list(found["p_holm"]), 4))
        notes.append("p < 0.05 if the 95 % CI excludes 0.")
        if len(found) > 1:
            notes.append(f"p (Holm): corrected over all {len(found)} pairs; intervals are not.")
    return Table(
        f"pairs {task}",
        f"{task}: pairwise differences, higher mean first.",
        [f"{a} – {b}" for a, b in zip(first, second, strict=True)],
        columns,
        notes=[*notes, *designs[task].notes],
        first="pair",
    )


# -- ablation ----------------------------------------------------------------------------------


def ablated(results: Results) -> list[str]:
    """Return the methods with runs at non-default settings."""
    changed = results.rows["settings"] != "{}"
    return sorted(results.rows.loc[changed, "method"].astype(str).unique())


def ablation(results: Results, method: str, selector: str = "last") -> Table:
    """Build the ablation of a method: bounds, parts, declared variants, further settings.

    Settings with a curve (`curves`) are excluded.
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
    names: dict[str, str] = {name: name for name in (LOWER, *parts)}
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
            Column("gap (%)", _gap(part, entries), 0, better="higher", group=task),
            *others,
            Column("seeds", list(part["seeds"]), 0, group=task),
        ]
    seconds = lines["s/update"].groupby("entry", observed=True).mean()
    columns.append(Column("s/update", list(seconds.reindex(entries)), 3))
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
        apart=BOUNDS,
    )


def curves(results: Results, method: str, selector: str = "last") -> dict[str, pd.DataFrame]:
    """Collect Dice over the values of each numeric setting, with all others at their defaults.

    Returns:
        setting → task, entry, value, seed, dice, changed (False for the default value), for
        settings with at least three values.
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
            # Runs of another version of the method may lack the setting.
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
    """Build the table of a curve (from `curves`)."""
    values = sorted(points["value"].unique())
    columns = []
    few: set[float] = set()  # values with fewer seeds than others are not ranked
    for task, part in points.groupby("task"):
        by_value = part.groupby("value")[PRIMARY.name]
        mean, deviation = (found.reindex(values) for found in (by_value.mean(), by_value.std()))
        columns.append(Column.of(PRIMARY, mean, spread=deviation, group=str(task)))
        seeds = by_value.size().reindex(values, fill_value=0)
        columns.append(Column("seeds", list(seeds.astype(float)), 0, group=str(task)))
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
            "The best value is known from target labels only: not a selection method.",
        ],
        first=setting,
    )


# -- selectors ---------------------------------------------------------------------------------


def selectors(results: Results, task: str) -> Table:
    """Build the table of Dice of each entry at the checkpoint of each selector."""
    rows = _trained(plain(results.rows[results.rows["task"] == task]))
    dice, seeds = _by_selector(rows)
    names = [str(name) for name in dice.columns if name != ORACLE]
    names += [ORACLE] * (ORACLE in dice)
    entries = [str(entry) for entry in dice.index]
    return Table(
        f"selectors {task}",
        f"{task}: Dice (%) at the checkpoint of each selector.",
        entries,
        [
            *(Column(title(name), list(100 * dice[name])) for name in names),
            Column("seeds", [float(seeds[entry]) for entry in entries], 0),
        ],
        notes=["oracle selects by Dice on the test cases (privileged): not a result."]
        * (ORACLE in names),
        ids=run_ids(rows, entries),
    )


def _trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of entries with selectors, without the upper bound."""
    return rows[[str(e) != UPPER and not is_external(str(e)) for e in rows["entry"]]]


def _by_selector(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return mean Dice, entry × selector, over the seeds with all selectors, and their number.

    If no seed of an entry has all of them, those that all its seeds have are compared.
    """
    keys = ["entry", "selector", "seed", "case"]
    per_case = rows.groupby(keys, observed=True)[PRIMARY.name].mean()
    per_run = per_case.groupby(["entry", "seed", "selector"], observed=True).mean()
    per_run = per_run.unstack("selector")
    per_run.columns = [str(name) for name in per_run.columns]
    judging = per_run.notna().groupby("entry", observed=True).transform("any")
    whole = (per_run.notna() | ~judging).all(axis=1)
    mixed = ~whole.groupby("entry", observed=True).transform("any")
    common = per_run.notna().groupby("entry", observed=True).transform("all")
    per_run, whole = per_run.where(common | ~mixed.to_numpy()[:, None]), whole | mixed
    by_entry = per_run[whole].groupby("entry", observed=True)
    dice, seeds = by_entry.mean(), by_entry.size()
    dice.index = seeds.index = [str(name) for name in dice.index]
    return dice, seeds


def regrets(results: Results) -> pd.DataFrame:
    """Compute the regret of each run and selector: the oracle's Dice minus the selector's.

    Returns:
        task, entry, seed, selector, regret; empty without runs made with --oracle.
    """
    rows = _trained(plain(results.rows))
    keys = ["task", "entry", "seed", "selector"]
    dice = statistics.means(rows, keys).unstack("selector")
    dice.columns = [str(name) for name in dice.columns]
    if ORACLE not in dice:
        return pd.DataFrame(columns=[*keys, "regret"])
    regret = -dice.drop(columns=ORACLE).sub(dice[ORACLE], axis=0)
    regret.columns.name = "selector"
    return regret.stack().rename("regret").dropna().reset_index()


def correlations(results: Results) -> pd.DataFrame:
    """Compute Spearman's correlation of each selector's score with target Dice.

    It is computed over all candidates of a task (pooled), and as the mean of correlations within
    runs, which is what selection within one run depends on.

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
    """Build the table of regret and rank correlation; None without runs made with --oracle."""
    regret, correlation = regrets(results), correlations(results)
    if regret.empty:
        return None
    names = [str(n) for n in regret.groupby("selector")["regret"].mean().sort_values().index]
    columns = []
    for task in sorted(regret["task"].astype(str).unique()):
        own = regret[regret["task"] == task].groupby("selector")["regret"]
        related = correlation[correlation["task"] == task].set_index("selector")
        mean, spread = (list(100 * part.reindex(names)) for part in (own.mean(), own.std()))
        columns.append(Column("regret", mean, 1, spread, "lower", task))
        for kind in ("pooled", "within"):
            rho = list(related[kind].reindex(names).astype(float))
            columns.append(Column(f"ρ {kind}", rho, 2, better="higher", group=task))
    return Table(
        "selectors",
        "Regret of each selector.",
        [title(name) for name in names],
        columns,
        notes=[
            "Regret: the oracle's Dice minus that of the chosen checkpoint, in points (mean ± "
            "standard deviation over runs of all entries). ρ: Spearman's correlation of score and "
            "target Dice over all checkpoints of all runs (pooled), and its mean within runs. Both "
            "use the oracle, i.e. target labels (privileged): they evaluate selectors, not methods."
        ],
        first="selector",
    )


# -- provenance --------------------------------------------------------------------------------


def runs(results: Results, selector: str = "last") -> Table:
    """Build the table of all runs with seed, device, commit and code."""
    rows = results.with_repeats(results.chosen_by(selector))
    dice = statistics.means(rows, ["run"])
    order = ["task", "entry", "seed", statistics.REPEAT]
    lines = rows.drop_duplicates("run").sort_values(order)
    repeats = [int(value) for value in lines[statistics.REPEAT]]
    entries = [
        title(str(entry)) + (f" (repeat {k}, last bits perturbed)" if k else "")
        for entry, k in zip(lines["entry"], repeats, strict=True)
    ]
    names = [str(run) for run in lines["run"]]
    return Table(
        "runs",
        "All runs of this report.",
        names,
        [
            Column("entry", entries),
            Column("task", list(lines["task"].astype(str))),
            Column("seed", list(lines["seed"].astype(float)), 0),
            # Not ranked: runs of different tasks, and of the upper bound, stand here.
            Column(PRIMARY.heading, list(PRIMARY.scale * dice[names]), PRIMARY.digits),
            Column("training (s)", list(lines["seconds"].astype(float)), 0),
            *(
                Column(name, [str(value) or MISSING for value in lines[name]])
                for name in ("device", "labels", "commit", "code", "seal")
            ),
        ],
        first="run",
    )
