"""The main job's table: each method's Dice, the share of the gap that it recovers, and its cost.

    glua-bench compare --methods glua,slaug --dataset phantom --directions all --seeds 3
    python benchmarks/comparison.py --runs runs --rows results/phantom_quick_baselines.parquet
    python benchmarks/comparison.py --table-of results/phantom_quick.parquet

Prints the table of all finished runs below a directory, or of the entries that `--entries` names,
with what it says, the intervals and tests of every two entries, and Dice of each repeat; and writes
their publishable rows to a file if asked. `--table-of` prints the same of such a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from glua_bench.config import PRESETS
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.reports import statistics
from glua_bench.reports.comparison import collect, competing, table, verdict


def entry_of(run: RunDirectory) -> str:
    """A run's name in the table: its method, and what is not as by default."""
    config, said = run.config, run.read_environment()
    parts = ["supervised" if config.scenario == "supervised" else config.method]
    if said["changed"]:
        parts.append(said["variant"] or ", ".join(f"{k} = {v}" for k, v in said["changed"].items()))
    if config.augmentation == "photometric":
        parts.append("photometric")
    if config.steps != PRESETS[config.preset]["steps"]:
        parts.append(f"{config.steps} updates")
    return " + ".join(parts)


def found(runs_root: Path, entries: list[str]) -> pd.DataFrame:
    """The rows of the finished runs below a directory; of those entries, if any are given."""
    named = [(entry_of(run), run) for run in list_runs(runs_root) if run.done]
    return collect(
        (entry, f"{run.config.dataset} {run.config.direction}", run)
        for entry, run in named
        if entry in entries or not entries
    )


def show(rows: pd.DataFrame) -> None:
    """Print the table, and what follows from the same rows."""
    print(table(rows).round(3).to_string())
    for task in rows["task"].unique():
        print(f"\n{verdict(rows, task, percent=True)}")
        print(statistics.pairs(competing(statistics.scores(rows, task))).round(3).to_string())
    if statistics.REPEAT in rows:
        last = rows[rows["selector"] == "last"].groupby(
            ["task", "entry", "seed", statistics.REPEAT]
        )
        print(f"\n{last['dice'].mean().unstack(statistics.REPEAT).dropna().round(3).to_string()}")


def main() -> None:
    """Print the table, of runs or of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--entries", default="", help="names of entries, separated by semicolons")
    parser.add_argument("--rows", type=Path, help="write the publishable rows to this file")
    parser.add_argument("--table-of", type=Path, help="print the table of such a file, and stop")
    options = parser.parse_args()
    if options.table_of is not None:
        show(pd.read_parquet(options.table_of))
        return
    rows = found(options.runs, [entry for entry in options.entries.split(";") if entry])
    if options.rows is not None:
        # Rows of real patients stay where they are.
        rows[rows["dataset"] == "phantom"].to_parquet(options.rows, index=False)
    show(rows)


if __name__ == "__main__":
    main()
