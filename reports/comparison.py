"""The table of a comparison: Dice, distance, the gap recovered, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from glua_bench.tracking import RunDirectory

LOWER, UPPER = "source_only", "supervised"  # the ends of the gap


def collect(runs: Iterable[tuple[str, str, RunDirectory]]) -> pd.DataFrame:
    """Rows per case, structure and selector of finished runs, with what the runs cost.

    A stage that a run took from the cache costs what it cost the run that trained it; where that
    run is not among the given ones, the seconds are unknown (nan).

    Args:
        runs: entry, task and directory of each run.

    Returns:
        The rows of `cases.parquet`, and entry, task, seconds, peak_memory_mib.
    """
    given = [(entry, task, run, run.read_summary()) for entry, task, run in runs]
    trained = {
        (run.config.dataset, run.config.direction, run.config.seed, stage): seconds
        for _, _, run, summary in given
        for stage, seconds in summary["stage_seconds"].items()
        if stage not in summary["reused_stages"] and stage != "segment"
    }
    frames = []
    for entry, task, run, summary in given:
        config, seconds = run.config, sum(summary["stage_seconds"].values())
        for stage in summary["reused_stages"]:
            seconds += trained.get((config.dataset, config.direction, config.seed, stage), math.nan)
        frames.append(
            run.read_cases().assign(
                entry=entry,
                task=task,
                seconds=seconds,
                peak_memory_mib=summary["peak_memory_mib"],
            )
        )
    return pd.concat(frames, ignore_index=True)


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
    per_case = rows.groupby([*keys, "case"])[["dice", "assd"]].mean()
    per_seed = per_case.groupby(keys).mean()
    by_run = rows.groupby(keys)
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
    by_entry = per_seed.groupby(["task", "entry"])
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


def as_text(lines: pd.DataFrame) -> str:
    """The table as plain text, a block for each task.

    Args:
        lines: as `table` gives them.
    """
    width = max(len(entry) for _, entry in lines.index)
    head = (
        f"{'':<{width}}  {'Dice ± sd':>13}  {'gap recovered':>20}  {'ASSD mm':>7}  {'missed':>6}  "
        f"{'s a step':>8}  {'MiB':>5}  seeds"
    )
    text = []
    for task, block in lines.groupby(level="task", sort=False):
        text += [str(task), head]
        for (_, entry), row in block.iterrows():
            text.append(
                f"{entry:<{width}}  {_spread(row['Dice'], row['sd']):>13}  {_gap(row):>20}  "
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
