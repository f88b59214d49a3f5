"""A comparison's answer: its table, a sentence, and files of its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from glua_bench.config import RunConfig
from glua_bench.errors import ConfigError
from glua_bench.paths import distinct
from glua_bench.reports import statistics
from glua_bench.tracking import RunDirectory

LOWER, UPPER = "source_only", "supervised"  # the ends of the gap


def collect(runs: Iterable[tuple[str, str, RunDirectory]]) -> pd.DataFrame:
    """Rows per case, structure and selector of finished runs, with what the runs cost.

    Args:
        runs: entry, task and directory of each run.

    Returns:
        The rows of `cases.parquet`, and entry, task, seconds, peak_memory_mib.
    """
    given = [(entry, task, run, run.read_summary()) for entry, task, run in runs]
    seconds = costs([(run.config, summary) for _, _, run, summary in given])
    frames = [
        run.read_cases().assign(
            entry=entry,
            task=task,
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
        return config.dataset, config.direction, config.seed, config.preset, config.steps, stage

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


def table(rows: pd.DataFrame, selector: str = "last") -> pd.DataFrame:
    """One line per task and entry: means and standard deviations over seeds.

    The gap recovered is (entry - source_only) / (supervised - source_only), from the mean Dice of
    the same seed; undefined where one of the two is not among the rows.

    Args:
        rows: as `collect` gives them.
        selector: whose checkpoints count.

    Returns:
        Indexed by task and entry: seeds, Dice, sd (nan for one seed), ASSD mm, gap recovered, gap
        min, gap max, missed (structures, over cases and seeds), training s, s a step (all
        training, for each update of the segmenter), peak MiB; sorted by Dice within a task.
    """
    rows = rows[rows["selector"] == selector]
    keys = ["task", "entry", "seed"]
    per_case = rows.groupby([*keys, "case"], observed=True)[["dice", "assd"]].mean()
    per_seed = per_case.groupby(keys, observed=True).mean()
    by_run = rows.groupby(keys, observed=True)
    per_seed["missed"] = by_run["missed"].sum()
    per_seed["seconds"] = by_run["seconds"].first()
    per_seed["memory"] = by_run["peak_memory_mib"].first()
    per_seed["a step"] = per_seed["seconds"] / by_run["step"].first()
    dice = per_seed["dice"].unstack("entry")
    if {LOWER, UPPER} <= set(dice):
        span = dice[UPPER] - dice[LOWER]
        gap = dice.sub(dice[LOWER], axis=0).div(span, axis=0).stack()
        per_seed["gap"] = gap.reorder_levels(["task", "seed", "entry"]).swaplevel(1, 2)
    else:
        per_seed["gap"] = math.nan
    by_entry = per_seed.groupby(["task", "entry"], observed=True)
    return pd.DataFrame(
        {
            "seeds": by_entry.size(),
            "Dice": by_entry["dice"].mean(),
            "sd": by_entry["dice"].std(),
            "ASSD mm": by_entry["assd"].mean(),
            "gap recovered": by_entry["gap"].mean(),
            "gap min": by_entry["gap"].min(),
            "gap max": by_entry["gap"].max(),
            "missed": by_entry["missed"].sum(),
            "training s": by_entry["seconds"].mean(),
            "s a step": by_entry["a step"].mean(),
            "peak MiB": by_entry["memory"].mean(),
        }
    ).sort_values(["task", "Dice"])


def verdict(rows: pd.DataFrame, task: str, selector: str = "last", percent: bool = False) -> str:
    """A task's answer in plain words: the best entry, how sure, and against the next one.

    The upper bound has seen target labels and does not take part.

    Args:
        rows: as `collect` gives them.
        task: e.g. "phantom mr-ct".
        selector: whose checkpoints count.
        percent: say Dice in percent, as reports do, instead of as a share of one.
    """

    def dice(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    def points(value: float) -> str:
        return f"{100 * value:.1f} points" if percent else f"{value:.3f}"

    scores = statistics.scores(rows[rows["entry"] != UPPER], task, selector=selector)
    seeds, cases = (scores.index.get_level_values(name).nunique() for name in ("seed", "case"))
    ranked = statistics.ranking(scores)
    best = str(ranked.index[0])
    text = f"{task}: {best} has the highest mean Dice, {dice(ranked['mean'].iloc[0])}"
    if seeds == 1:
        return f"{text}, with one seed; intervals need more (--seeds 3)."
    if cases == 1:
        return f"{text}, on one case; intervals need more."
    own = statistics.intervals(scores).loc[best]
    text += (
        f" (95 % interval {dice(own['low'])} to {dice(own['high'])} over {cases} cases and "
        f"{seeds} seeds)"
    )
    if len(ranked) == 1:
        return f"{text}."
    second = str(ranked.index[1])
    pair = statistics.pairs(scores[[best, second]]).iloc[0]
    return (
        f"{text}; the next, {second}, is {points(pair['difference'])} lower "
        f"({points(pair['low'])} to {points(pair['high'])}), and {best} is the better of the two "
        f"in {100 * pair['better']:.0f} % of resamples."
    )


def write(rows: pd.DataFrame, folder: Path, selector: str = "last") -> list[Path]:
    """Write a comparison's numbers as CSV files.

    Args:
        rows: as `collect` gives them.
        folder: where; it is made.
        selector: whose checkpoints count.

    Returns:
        `rows.csv` (as given), `table.csv`, and of all tasks `intervals.csv`, `pairs.csv` and
        `ranking.csv`.

    Raises:
        ConfigError: the directory cannot be written.
    """
    parts: dict[str, list[pd.DataFrame]] = {"intervals": [], "pairs": [], "ranking": []}
    for task in rows["task"].unique():
        scores = statistics.scores(rows, task, selector=selector)
        for name, part in (
            ("intervals", statistics.intervals(scores).reset_index(names="entry")),
            ("pairs", statistics.pairs(scores)),
            ("ranking", statistics.ranking(scores).reset_index(names="entry")),
        ):
            part.insert(0, "task", task)
            parts[name].append(part)
    frames = {"rows": rows, "table": table(rows, selector).reset_index()}
    frames.update({name: pd.concat(found, ignore_index=True) for name, found in parts.items()})
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in frames.items():
            files.append(folder / f"{name}.csv")
            frame.to_csv(files[-1], index=False)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); choose another --out directory."
        ) from error
    return files


def as_metrics(lines: pd.DataFrame) -> dict[str, float]:
    """The table's main numbers by name, for a tracker.

    Args:
        lines: as `table` gives them.

    Returns:
        e.g. {"mr-ct/dice/glua": 0.8, "mr-ct/dice_sd/glua": 0.01, "mr-ct/assd_mm/glua": 4.0,
        "mr-ct/gap_recovered/glua": 0.7}; the share of the gap as a fraction, nan where a number
        is not defined.
    """
    names = {
        "Dice": "dice",
        "sd": "dice_sd",
        "ASSD mm": "assd_mm",
        "gap recovered": "gap_recovered",
    }
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
    named = {
        entry: f"{entry} (privileged)" if entry == UPPER else entry for _, entry in lines.index
    }
    width = max(map(len, named.values()))
    head = (
        f"{'':<{width}}  {'Dice ± sd':>13}  {'gap recovered':>20}  {'ASSD mm':>7}  {'missed':>6}  "
        f"{'s a step':>8}  {'MiB':>5}  seeds"
    )
    text = []
    for task, block in lines.groupby(level="task", sort=False):
        text += [str(task), head]
        for (_, entry), row in block.iterrows():
            text.append(
                f"{named[entry]:<{width}}  {_spread(row['Dice'], row['sd']):>13}  {_gap(row):>20}  "
                f"{row['ASSD mm']:>7.1f}  {row['missed']:>6.0f}  {_number(row['s a step'], 2):>8}  "
                f"{row['peak MiB']:>5.0f}  {row['seeds']:>5.0f}"
            )
        text.append("")
    if (lines["seeds"] == 1).any():
        text.append("One seed has no standard deviation, and decides nothing: give --seeds 3.")
    return "\n".join(text).rstrip()


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" + ("        " if math.isnan(deviation) else f" ± {deviation:.3f}")


def _gap(row: pd.Series) -> str:
    if math.isnan(row["gap recovered"]):
        return ""
    values: Sequence[float] = [100 * row[n] for n in ("gap recovered", "gap min", "gap max")]
    mean, low, high = (f"{value:.0f}".replace("-0", "0") for value in values)
    return f"{mean} %" if row["seeds"] == 1 else f"{mean} % ({low} to {high})"


def _number(value: float, digits: int) -> str:
    return "?" if math.isnan(value) else f"{value:.{digits}f}"
