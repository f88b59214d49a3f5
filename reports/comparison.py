"""Results of a comparison: table, verdict in one sentence, and CSV files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from glua_bench.config import (
    EXTERNAL,
    LOWER,
    ORACLE,
    UPPER,
    RunConfig,
    is_external,
    is_privileged,
)
from glua_bench.files import csv_text, write_text
from glua_bench.paths import distinct
from glua_bench.records.run_directory import RunDirectory
from glua_bench.reports import statistics
from glua_bench.scoring.metrics import METRICS, MISSING, PRIMARY, complete

LAST_BITS = (
    "Last bits: standard deviation of Dice over repeats of one seed whose initial weights differ "
    "only in their last bits, as sums do between processors and numbers of threads."
)
NO_REPEATS = (
    "The spread over seeds on one machine may underestimate the variation: processors and numbers "
    "of threads change last bits, which training can amplify. `compare … --repeats 2` measures it."
)
# Of entries stamped external, in every table with them.
OUTSIDE = (
    "external: predictions of another tool, scored here as those of a run; training data, budget, "
    "choice of the checkpoint and seeds are its author's statement and were not checked."
)


def collect(runs: Iterable[tuple[str, str, RunDirectory]]) -> pd.DataFrame:
    """Collect the rows of finished runs, with their costs.

    Args:
        runs: entry, task and directory of each run.

    Returns:
        The rows of `cases.parquet`, and entry, task, perturbation, seconds, peak_memory_mib.
    """
    given = [(entry, task, run, run.read_summary()) for entry, task, run in runs]
    seconds = costs([(run.config, summary) for _, _, run, summary in given])
    frames = [
        run.read_cases().assign(
            entry=entry,
            task=task,
            perturbation=getattr(run.config, statistics.REPEAT, 0),
            seconds=spent,
            peak_memory_mib=summary["peak_memory_mib"],
        )
        for (entry, task, run, summary), spent in zip(given, seconds, strict=True)
    ]
    return for_every_selector(pd.concat(frames, ignore_index=True))


def for_every_selector(rows: pd.DataFrame) -> pd.DataFrame:
    """Repeat the rows of external entries, which have no selector, for each selector of the others.

    Args:
        rows: of any runs, with the column selector.

    Returns:
        The rows; those of external entries alone get the selector "last".
    """
    outside = rows["selector"] == EXTERNAL
    if not outside.any():
        return rows
    own = rows[~outside]
    names = [str(name) for name in own["selector"].unique()] or ["last"]
    parts = [own, *(rows[outside].assign(selector=name) for name in names)]
    return pd.concat(parts, ignore_index=True)


def costs(runs: Sequence[tuple[RunConfig, Mapping[str, Any]]]) -> list[float]:
    """Return the seconds of training of each run, from configurations and summaries.

    A stage reused from the cache counts with the seconds of the run that trained it; nan if that
    run is not among the given ones, and for external entries.
    """

    def key(config: RunConfig, stage: str) -> tuple[Any, ...]:
        shared = config.fold_name, config.direction, config.seed, config.preset, config.steps
        return *shared, getattr(config, statistics.REPEAT, 0), stage

    trained = {
        key(config, stage): seconds
        for config, summary in runs
        for stage, seconds in summary["stage_seconds"].items()
        if stage not in summary["reused_stages"]
    }
    return [
        math.nan
        if config.external
        else sum(summary["stage_seconds"].values())
        + sum(trained.get(key(config, stage), math.nan) for stage in summary["reused_stages"])
        for config, summary in runs
    ]


def compared(
    rows: pd.DataFrame, selector: str = "last"
) -> tuple[pd.DataFrame, dict[str, statistics.Design]]:
    """Select the rows that tables average, and determine the pairing of each task.

    Args:
        rows: from `collect`.
        selector: name of the checkpoint selector.

    Returns:
        Rows of the selector without repeats (see `Design.of`), and the design of each task. A
        metric that some runs of an entry lack is nan for the entry, as its mean would be over
        fewer runs.
    """
    rows = complete(statistics.ordinary(rows[rows["selector"] == selector]))
    tasks = [str(task) for task in rows["task"].unique()]
    designs = {task: statistics.design(rows[rows["task"] == task]) for task in tasks}
    parts = [designs[task].of(rows[rows["task"] == task]) for task in tasks]
    rows = pd.concat(parts) if parts else rows
    for name in METRICS:
        lacking = rows[name].isna() & rows[PRIMARY.name].notna()
        if lacking.any():
            by_entry = lacking.groupby([rows["task"], rows["entry"]], observed=True)
            rows[name] = rows[name].mask(by_entry.transform("any"))
    return rows, designs


def title(name: str) -> str:
    """Return the displayed name of an entry or selector; marks use of target labels."""
    return f"{name} (privileged)" if name in (UPPER, ORACLE) else name


def competing(scores: pd.DataFrame) -> pd.DataFrame:
    """Drop entries that use target labels, such as the upper bound, from `statistics.scores`."""
    return scores[[entry for entry in scores if not is_privileged(entry)]]


def gap_known(rows: pd.DataFrame, task: str, selector: str = "last") -> bool:
    """Return True if the upper bound is clearly above the lower bound.

    That is, the 95 % CI of their difference and the difference of every seed are above 0.

    Args:
        rows: from `collect`.
        task: e.g. "phantom mr-ct".
        selector: name of the checkpoint selector.
    """
    bounds = rows[rows["entry"].isin((LOWER, UPPER)) & (rows["task"] == task)]
    if not {LOWER, UPPER} <= set(bounds["entry"]):
        return False
    scores = statistics.scores(bounds, task, selector)
    if scores.shape[1] < 2:
        return False
    spans = (scores[UPPER] - scores[LOWER]).groupby("seed").mean()
    _, low, _ = statistics.difference(scores, UPPER, LOWER)
    return bool(low > 0 and (spans > 0).all())


def table(rows: pd.DataFrame, selector: str = "last") -> pd.DataFrame:
    """Compute means and standard deviations over seeds for each task and entry.

    Paired entries are averaged over the same seeds and cases as in intervals and tests. The gap
    recovered is (entry - source_only) / (supervised - source_only), from the mean Dice of the same
    seed; it is undefined without both bounds, or unless supervised is clearly above source_only
    (`gap_known`).

    Args:
        rows: from `collect`.
        selector: name of the checkpoint selector.

    Returns:
        Indexed by task and entry: seeds, Dice, sd (over seeds), last bits (standard deviation over
        repeats of one seed), the other metrics by their labels (ASSD mm, …), gap recovered, gap
        min, gap max, gap seeds (number of seeds with a gap), missed (structures, over cases and
        seeds), training s, s/update (all training, per update of the segmenter), peak MiB,
        compared (True for paired entries). Undefined values are nan. Sorted by Dice within a task.
    """
    bits = statistics.last_bits(rows[rows["selector"] == selector])
    rows, designs = compared(rows, selector)
    keys = ["task", "entry", "seed"]
    per_seed = statistics.means(rows, keys, list(METRICS))
    by_run = rows.groupby(keys, observed=True)
    per_seed["missed"] = by_run["missed"].sum()
    per_seed["seconds"] = by_run["seconds"].first()
    per_seed["memory"] = by_run["peak_memory_mib"].first()
    per_seed["per update"] = per_seed["seconds"] / by_run["step"].first()
    dice = per_seed[PRIMARY.name].unstack("entry")
    if {LOWER, UPPER} <= set(dice):
        span = dice[UPPER] - dice[LOWER]
        known = [task for task in designs if gap_known(rows, task, selector)]
        span = span.where(span.index.get_level_values("task").isin(known))
        gap = dice.sub(dice[LOWER], axis=0).div(span, axis=0).stack()
        per_seed["gap"] = gap.reorder_levels(["task", "seed", "entry"]).swaplevel(1, 2)
    else:
        per_seed["gap"] = math.nan
    by_entry = per_seed.groupby(["task", "entry"], observed=True)
    scores = {metric.label: by_entry[name].mean() for name, metric in METRICS.items()}
    lines = pd.DataFrame(
        {
            "seeds": by_entry.size(),
            PRIMARY.label: scores.pop(PRIMARY.label),
            "sd": by_entry[PRIMARY.name].std(),
            "last bits": math.nan,
            **scores,
            "gap recovered": by_entry["gap"].mean(),
            "gap min": by_entry["gap"].min(),
            "gap max": by_entry["gap"].max(),
            "gap seeds": by_entry["gap"].count(),
            "missed": by_entry["missed"].sum(),
            "training s": by_entry["seconds"].mean(),
            "s/update": by_entry["per update"].mean(),
            "peak MiB": by_entry["memory"].mean(),
        }
    )
    lines["last bits"] = [float(bits.get(key, math.nan)) for key in lines.index]
    lines["compared"] = [entry in designs[str(task)].entries for task, entry in lines.index]
    return lines.sort_values(["task", PRIMARY.label])


def gap_notes(lines: pd.DataFrame) -> list[str]:
    """Return one sentence per task whose gap is undefined, or defined for some seeds only.

    Args:
        lines: from `table`.
    """
    notes = []
    for task, block in lines.groupby(level="task", sort=False):
        block = block.droplevel("task")
        if not {LOWER, UPPER} <= set(block.index):
            continue
        if block["gap recovered"].isna().all():
            notes.append(
                f"{task}: gap recovered is undefined, since {UPPER} is not clearly above {LOWER} "
                "(95 % CI of the difference above 0, and difference above 0 for every seed)."
            )
            continue
        some = block["gap seeds"].between(1, block["seeds"] - 1)
        few = [str(entry) for entry in block.index[some] if entry not in (LOWER, UPPER)]
        if few:
            notes.append(
                f"{task}: gap recovered of {', '.join(few)} is over the seeds of both bounds, "
                "fewer than those of Dice."
            )
    return notes


def outside_notes(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return the note on external entries, if there are any among (task, entry)."""
    return [OUTSIDE] * any(is_external(str(entry)) for _, entry in lines)


def last_bits_note(lines: pd.DataFrame) -> str:
    """Return the note on variation from last bits; "" for a table (of `table`) without spread."""
    if lines["last bits"].notna().any():
        return LAST_BITS
    return NO_REPEATS if lines["sd"].notna().any() else ""


def verdict(rows: pd.DataFrame, task: str, selector: str = "last", percent: bool = False) -> str:
    """State the best entry of a task, its difference to the runner-up, and what is excluded.

    Entries that use target labels, such as the upper bound, are not considered.

    Args:
        rows: from `collect`.
        task: e.g. "phantom mr-ct".
        selector: name of the checkpoint selector.
        percent: state Dice in percent, as reports do, instead of as a fraction.
    """
    scale, digits, unit, points = (100, 1, " %", " points") if percent else (1, 3, "", "")

    def number(value: float) -> str:
        return _number(scale * value, digits).replace("-", "−")

    def interval(low: float, high: float) -> str:
        return f"95 % CI {number(low)} to {number(high)}"

    _, designs = compared(rows[rows["task"] == task], selector)
    excluded = "".join(f" {note}" for note in designs[task].notes)
    scores = competing(statistics.scores(rows, task, selector))
    if not scores.shape[1]:
        return f"{task}: no entries besides {UPPER}.{excluded}"
    seeds, cases = statistics.counts(scores)
    ranked = statistics.ranking(scores)
    best = str(ranked.index[0])
    own = statistics.intervals(scores).loc[best]
    has = "has the highest mean Dice," if len(ranked) > 1 else "has a mean Dice of"
    text = f"{task}: {best} {has} {number(own['mean'])}{unit}"
    if cases == 1:
        return f"{text} (one case, no CI).{excluded}"
    text += f" ({interval(own['low'], own['high'])}; {cases} cases, "
    if seeds == 1:
        return f"{text}1 seed: for this training only; --seeds 3 covers new trainings).{excluded}"
    text += f"{seeds} seeds)"
    if len(ranked) == 1:
        return f"{text}.{excluded}"
    second = str(ranked.index[1])
    difference, low, high = statistics.difference(scores, best, second)
    text += f"; runner-up {second}: difference {number(difference)}{points} ({interval(low, high)})"
    why = statistics.untested(seeds, cases)
    if why:
        return f"{text}. {why}{excluded}"
    pairs = statistics.pairs(scores)
    corrected = f" (Holm, {len(pairs)} pairs)" if len(pairs) > 1 else ""
    return f"{text}, {_outcome(pairs, best, second)}{corrected}.{excluded}"


def _outcome(pairs: pd.DataFrame, first: str, second: str) -> str:
    """State the test of two entries, from `statistics.pairs`: "significant, p < 0.001"."""
    two = (first, second)
    p = pairs.loc[pairs["a"].isin(two) & pairs["b"].isin(two), "p_holm"].iloc[0]
    outcome = "not significant" if p >= statistics.SIGNIFICANT else "significant"
    return f"{outcome}, {'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}"


def bounds(rows: pd.DataFrame, task: str, selector: str = "last") -> str:
    """State how the best entry of a task compares with both bounds, in percent of Dice.

    Args:
        rows: from `collect`.
        task: e.g. "phantom mr-ct".
        selector: name of the checkpoint selector.

    Returns:
        One or two sentences; "" without bounds, or without other entries.
    """
    own = rows[rows["task"] == task]
    scores = statistics.scores(own, task, selector)
    others = competing(scores)
    present = [name for name in (LOWER, UPPER) if name in scores]
    if not present or not others.shape[1]:
        return ""
    best = str(others.mean().idxmax())
    tested = not statistics.untested(*statistics.counts(scores))
    parts = []
    for name in present:
        text = f"{title(name)} {_points(scores[name].mean())} %"
        if name != best:
            difference, low, high = statistics.difference(scores, best, name)
            text += f" ({best}: {_points(difference, '+')} points"
            if not math.isnan(low):
                text += f", 95 % CI {_points(low)} to {_points(high)}"
            # The upper bound is not a competitor and not tested.
            if name == LOWER and tested:
                text += f", {_outcome(statistics.pairs(others), best, name)}"
            text += ")"
        parts.append(text)
    found = f"{'Bounds' if len(parts) > 1 else 'Bound'}: {'; '.join(parts)}."
    gap = table(own, selector).loc[(task, best), "gap recovered"] if best != LOWER else math.nan
    if not math.isnan(gap):
        found += f" {best} recovers {_points(gap, digits=0)} % of the gap between them."
    if best == LOWER and others.shape[1] > 1:
        found += f" No method has a higher mean than {LOWER}."
    return found


def _points(fraction: float, sign: str = "", digits: int = 1) -> str:
    """Format a fraction in percent, with a typographic minus."""
    value = round(100 * fraction, digits) + 0.0
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def write(rows: pd.DataFrame, folder: Path, selector: str = "last") -> list[Path]:
    """Write the numbers of a comparison as CSV files.

    Args:
        rows: from `collect`.
        folder: directory of the files; created if missing.
        selector: name of the checkpoint selector.

    Returns:
        `rows.csv`, `table.csv`, `intervals.csv`, and, without the upper bound, `pairs.csv` and
        `ranking.csv`.

    Raises:
        ConfigError: a file cannot be written.
    """
    parts: dict[str, list[pd.DataFrame]] = {"intervals": [], "pairs": [], "ranking": []}
    for task in rows["task"].unique():
        scores = statistics.scores(rows, task, selector)
        for name, part in (
            ("intervals", statistics.intervals(scores).reset_index(names="entry")),
            ("pairs", statistics.pairs(competing(scores))),
            ("ranking", statistics.ranking(competing(scores)).reset_index(names="entry")),
        ):
            part.insert(0, "task", task)
            parts[name].append(part)
    frames = {"rows": rows, "table": table(rows, selector).reset_index()}
    frames.update({name: pd.concat(found, ignore_index=True) for name, found in parts.items()})
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", csv_text(frame), "--out")
    return [folder / f"{name}.csv" for name in frames]


def as_metrics(lines: pd.DataFrame) -> dict[str, float]:
    """Return the main numbers of a table (of `table`) by name, for a tracker.

    Returns:
        e.g. {"mr-ct/dice/glua": 0.8, "mr-ct/assd_mm/glua": 4.0, "mr-ct/dice_sd/glua": 0.01,
        "mr-ct/gap_recovered/glua": 0.7}, with "dice_last_bits" if there are repeats; undefined
        numbers are nan.
    """
    names = {
        **{metric.label: metric.key for metric in METRICS.values()},
        "sd": f"{PRIMARY.key}_sd",
        "gap recovered": "gap_recovered",
    }
    if lines["last bits"].notna().any():
        names["last bits"] = f"{PRIMARY.key}_last_bits"
    plain = distinct((str(entry) for _, entry in lines.index), _plain)
    return {
        f"{str(task).split(' ')[-1]}/{name}/{plain[str(entry)]}": float(row[column])
        for column, name in names.items()
        for (task, entry), row in lines.iterrows()
    }


def _plain(entry: str) -> str:
    """Return a name that trackers accept: "union (GLUA)" → "union GLUA"."""
    return " ".join(re.sub(r"[^\w.\-]", " ", entry).split())[:90]  # MLflow allows 100


def as_text(lines: pd.DataFrame, width: int | None = None) -> str:
    """Return a table (of `table`) as plain text, one block per task.

    Args:
        lines: result of `table`.
        width: characters per line; columns that do not fit follow below. None is unlimited.
    """
    texts = {
        f"{PRIMARY.label} ± sd": map(_spread, lines[PRIMARY.label], lines["sd"]),
        "last bits": ("" if math.isnan(v) else f"± {v:.3f}" for v in lines["last bits"]),
        "gap recovered": (_gap(row) for _, row in lines.iterrows()),
        **{m.label: map(m.text, lines[m.label]) for m in METRICS.values() if m != PRIMARY},
        "missed": lines["missed"],
        "s/update": (_number(value, 2) for value in lines["s/update"]),
        "MiB": (_number(value, 0) for value in lines["peak MiB"]),
        "seeds": lines["seeds"],
    }
    if lines["last bits"].isna().all():
        del texts["last bits"]
    shown = pd.DataFrame({name: list(values) for name, values in texts.items()}, lines.index)
    text = []
    for task, block in shown.groupby(level="task", sort=False):
        block = block.droplevel("task").rename(index=title).rename_axis(None)
        empty = block.astype(str).isin(["", MISSING]).all()
        block = block.loc[:, ~empty]
        text += [str(task), block.to_string(line_width=width), ""]
    if (lines["seeds"] == 1).any():
        text.append("One seed: no standard deviation and no tests; use --seeds 3.")
    text += [*gap_notes(lines), *filter(None, [last_bits_note(lines)]), *outside_notes(lines.index)]
    return "\n".join(text).rstrip()


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" + ("        " if math.isnan(deviation) else f" ± {deviation:.3f}")


def _gap(row: pd.Series) -> str:
    if math.isnan(row["gap recovered"]):
        return ""
    values: Sequence[float] = [100 * row[n] for n in ("gap recovered", "gap min", "gap max")]
    mean, low, high = (f"{value:.0f}".replace("-0", "0") for value in values)
    return f"{mean} %" if row["gap seeds"] == 1 else f"{mean} % ({low} to {high})"


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return MISSING
    return f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.0
