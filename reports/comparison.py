"""A comparison's answer: its table, a sentence, and files of its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from glua_bench.config import LOWER, ORACLE, UPPER, RunConfig
from glua_bench.files import write_text
from glua_bench.paths import distinct
from glua_bench.records.run_directory import RunDirectory
from glua_bench.reports import statistics
from glua_bench.scoring.metrics import METRICS, PRIMARY, complete

LAST_BITS = (
    "Last bits: standard deviation of Dice over repeats of one seed whose first weights differ in "
    "their last bits alone, as threads and processors make sums differ."
)
NO_REPEATS = (
    "The spread over seeds of one machine may understate how far a result moves: threads and "
    "processors change last bits, which a training can amplify. `compare … --repeats 2` measures "
    "it."
)


def collect(runs: Iterable[tuple[str, str, RunDirectory]]) -> pd.DataFrame:
    """Rows per case, structure and selector of finished runs, with what the runs cost.

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
    return pd.concat(frames, ignore_index=True)


def costs(runs: Sequence[tuple[RunConfig, Mapping[str, Any]]]) -> list[float]:
    """Seconds of training of each run, from its configuration and summary.

    A stage that a run took from the cache costs what it cost the run that trained it; where that
    run is not among the given ones, the seconds are unknown (nan).
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
        sum(seconds for stage, seconds in summary["stage_seconds"].items())
        + sum(trained.get(key(config, stage), math.nan) for stage in summary["reused_stages"])
        for config, summary in runs
    ]


def compared(
    rows: pd.DataFrame, selector: str = "last"
) -> tuple[pd.DataFrame, dict[str, statistics.Design]]:
    """The rows that tables average, and what is paired in each task.

    Args:
        rows: as `collect` gives them.
        selector: whose checkpoints count.

    Returns:
        Ordinary rows of the selector (no repeats), of what is paired and of what entries that are
        left out have; the design of each task. A metric that some runs of an entry lack, because
        they are older than it, is nan for the entry: its mean would be over other runs.
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
    """An entry's or a selector's name as it is shown: one that saw target labels says so."""
    return f"{name} (privileged)" if name in (UPPER, ORACLE) else name


def competing(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores without the upper bound, which has seen target labels and takes no part.

    Args:
        scores: from `statistics.scores`.
    """
    return scores.drop(columns=UPPER, errors="ignore")


def gap_known(rows: pd.DataFrame, task: str, selector: str = "last") -> bool:
    """Whether the upper bound is clearly above the lower one, so that there is a gap to recover.

    Args:
        rows: as `collect` gives them.
        task: e.g. "phantom mr-ct".
        selector: whose checkpoints count.

    Returns:
        True where the 95 % interval of their difference lies above 0, and no seed has it below.
    """
    bounds = rows[rows["entry"].isin((LOWER, UPPER)) & (rows["task"] == task)]
    if not {LOWER, UPPER} <= set(bounds["entry"]):
        return False
    scores = statistics.scores(bounds, task, selector)
    if scores.shape[1] < 2:
        return False
    spans = (scores[UPPER] - scores[LOWER]).groupby("seed").mean()
    found = statistics.pairs(scores[[UPPER, LOWER]]).iloc[0]
    return bool(found["low"] > 0 and (spans > 0).all())


def table(rows: pd.DataFrame, selector: str = "last") -> pd.DataFrame:
    """One line per task and entry: means and standard deviations over seeds.

    Entries that are paired are averaged over the same seeds and cases, so that these are the means
    which intervals and tests are about. The gap recovered is (entry - source_only) / (supervised -
    source_only), from the mean Dice of the same seed; undefined where one of the two is not among
    the rows, or supervised is not clearly above source_only (`gap_known`).

    Args:
        rows: as `collect` gives them.
        selector: whose checkpoints count.

    Returns:
        Indexed by task and entry: seeds, Dice, sd (over seeds; nan for one), last bits (standard
        deviation over repeats of one seed; nan without repeats), the other metrics by their labels
        (ASSD mm, …), gap recovered, gap min, gap max, gap seeds (how many have one), missed
        (structures, over cases and seeds), training s, s a step (all training, for each update of
        the segmenter), peak MiB, compared (whether the entry is among those that are paired);
        sorted by Dice within a task.
    """
    bits = statistics.last_bits(rows[rows["selector"] == selector])
    rows, designs = compared(rows, selector)
    keys = ["task", "entry", "seed"]
    per_seed = statistics.means(rows, keys, list(METRICS))
    by_run = rows.groupby(keys, observed=True)
    per_seed["missed"] = by_run["missed"].sum()
    per_seed["seconds"] = by_run["seconds"].first()
    per_seed["memory"] = by_run["peak_memory_mib"].first()
    per_seed["a step"] = per_seed["seconds"] / by_run["step"].first()
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
            "s a step": by_entry["a step"].mean(),
            "peak MiB": by_entry["memory"].mean(),
        }
    )
    lines["last bits"] = [float(bits.get(key, math.nan)) for key in lines.index]
    lines["compared"] = [entry in designs[str(task)].entries for task, entry in lines.index]
    return lines.sort_values(["task", PRIMARY.label])


def gap_notes(lines: pd.DataFrame) -> list[str]:
    """A sentence for each task whose gap is withheld, or known for some of the seeds only.

    Args:
        lines: as `table` gives them.
    """
    notes = []
    for task, block in lines.groupby(level="task", sort=False):
        block = block.droplevel("task")
        if not {LOWER, UPPER} <= set(block.index):
            continue
        if block["gap recovered"].isna().all():
            notes.append(
                f"{task}: no gap is given, since {UPPER} is not clearly above {LOWER}; that takes "
                "a 95 % interval of their difference above 0, and a difference above 0 with every "
                "seed."
            )
            continue
        some = block["gap seeds"].between(1, block["seeds"] - 1)
        few = [str(entry) for entry in block.index[some] if entry not in (LOWER, UPPER)]
        if few:
            notes.append(
                f"{task}: the gap recovered by {', '.join(few)} is over the seeds that both "
                "bounds have, which are fewer than the seeds of its Dice."
            )
    return notes


def last_bits_note(lines: pd.DataFrame) -> str:
    """What the spread over seeds does not hold; "" where there is no spread.

    Args:
        lines: as `table` gives them.
    """
    if lines["last bits"].notna().any():
        return LAST_BITS
    return NO_REPEATS if lines["sd"].notna().any() else ""


def verdict(rows: pd.DataFrame, task: str, selector: str = "last", percent: bool = False) -> str:
    """A task's answer in plain words: the best entry, how sure, against the next one, what is out.

    The upper bound has seen target labels and does not take part.

    Args:
        rows: as `collect` gives them.
        task: e.g. "phantom mr-ct".
        selector: whose checkpoints count.
        percent: say Dice in percent, as reports do, instead of as a share of one.
    """

    def dice(value: float) -> str:
        return f"{_number(100 * value, 1)} %" if percent else _number(value, 3)

    def points(value: float) -> str:
        return f"{_number(100 * value, 1)} points" if percent else _number(value, 3)

    _, designs = compared(rows[rows["task"] == task], selector)
    left_out = "".join(f" {note}" for note in designs[task].notes)
    scores = competing(statistics.scores(rows, task, selector))
    if not scores.shape[1]:
        return f"{task}: nothing is there to compare besides {UPPER}.{left_out}"
    seeds, cases = statistics.counts(scores)
    ranked = statistics.ranking(scores)
    best = str(ranked.index[0])
    own = statistics.intervals(scores).loc[best]
    has = "has the highest mean Dice," if len(ranked) > 1 else "has a mean Dice of"
    text = f"{task}: {best} {has} {dice(own['mean'])}"
    span = f"95 % interval {dice(own['low'])} to {dice(own['high'])} over {cases} cases"
    if cases == 1:
        return f"{text}, on one case; intervals need more.{left_out}"
    if seeds == 1:
        return (
            f"{text}, with one seed ({span}, for this one training); what another training would "
            f"give needs more seeds (--seeds 3).{left_out}"
        )
    text += f" ({span} and {seeds} seeds)"
    if len(ranked) > 1:
        second = str(ranked.index[1])
        pairs = statistics.pairs(scores)
        pair = pairs[(pairs["a"].isin((best, second))) & (pairs["b"].isin((best, second)))].iloc[0]
        sign = 1 if pair["a"] == best else -1
        low, high = sorted((sign * pair["low"], sign * pair["high"]))
        text += (
            f"; the next, {second}, is {points(sign * pair['difference'])} lower (95 % interval "
            f"{points(low).split()[0]} to {points(high)}"
        )
        why = statistics.untested(seeds, cases)
        if why:
            text += f"). {why[:-1]}"
        else:
            p = "p < 0.001" if pair["p_holm"] < 0.001 else f"p = {pair['p_holm']:.3f}"
            counted = f" by Holm's method over {len(pairs)} pairs" if len(pairs) > 1 else ""
            text += f", {p}{counted})"
            if pair["p_holm"] >= statistics.SIGNIFICANT:
                text += ", which is not beyond chance"
    return f"{text}.{left_out}"


def write(rows: pd.DataFrame, folder: Path, selector: str = "last") -> list[Path]:
    """Write a comparison's numbers as CSV files.

    Args:
        rows: as `collect` gives them.
        folder: where; it is made.
        selector: whose checkpoints count.

    Returns:
        `rows.csv` (as given), `table.csv`, and of all tasks `intervals.csv`, and, without the
        upper bound, `pairs.csv` and `ranking.csv`.

    Raises:
        ConfigError: the directory cannot be written.
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
        write_text(folder / f"{name}.csv", frame.to_csv(index=False), "--out")
    return [folder / f"{name}.csv" for name in frames]


def as_metrics(lines: pd.DataFrame) -> dict[str, float]:
    """The table's main numbers by name, for a tracker.

    Args:
        lines: as `table` gives them.

    Returns:
        e.g. {"mr-ct/dice/glua": 0.8, "mr-ct/assd_mm/glua": 4.0, "mr-ct/dice_sd/glua": 0.01,
        "mr-ct/gap_recovered/glua": 0.7}; the share of the gap as a fraction, nan where a number
        is not defined; "dice_last_bits" where there are repeats.
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
    """An entry's name of letters, digits and a few signs: "union (GLUA)" → "union GLUA"."""
    return " ".join(re.sub(r"[^\w.\-]", " ", entry).split())[:90]  # of a tracker's 100


def as_text(lines: pd.DataFrame) -> str:
    """The table as plain text, a block for each task.

    Args:
        lines: as `table` gives them.
    """
    texts = {
        f"{PRIMARY.label} ± sd": map(_spread, lines[PRIMARY.label], lines["sd"]),
        "last bits": ("" if math.isnan(v) else f"± {v:.3f}" for v in lines["last bits"]),
        "gap recovered": (_gap(row) for _, row in lines.iterrows()),
        **{m.label: map(m.text, lines[m.label]) for m in METRICS.values() if m != PRIMARY},
        "missed": lines["missed"],
        "s a step": (_number(value, 2) for value in lines["s a step"]),
        "MiB": (_number(value, 0) for value in lines["peak MiB"]),
        "seeds": lines["seeds"],
    }
    if lines["last bits"].isna().all():
        del texts["last bits"]
    shown = pd.DataFrame({name: list(values) for name, values in texts.items()}, lines.index)
    text = []
    for task, block in shown.groupby(level="task", sort=False):
        block = block.droplevel("task").rename(index=title).rename_axis(None)
        text += [str(task), block.to_string(), ""]
    if (lines["seeds"] == 1).any():
        text.append("One seed has no standard deviation, and decides nothing: give --seeds 3.")
    text += [*gap_notes(lines), last_bits_note(lines)]
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
    return "?" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.0
