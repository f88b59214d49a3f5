"""The main job's table: each method's Dice, the share of the gap that it recovers, and its cost.

    python benchmarks/comparison.py --seeds 3 --workers 2 [--rows results/phantom_quick.parquet]
    python benchmarks/comparison.py --plugin coral.py --entries source_only supervised coral
    python benchmarks/comparison.py --table-of results/phantom_quick.parquet

Runs `glua-bench run` for every entry, one thread a process, skips what is done, and prints the
table from the runs' rows. An entry is one of the list below, or a method of `--plugin`.
`--table-only` prints what is there, `--table-of` what a file of rows holds. The gap recovered is
(method - source_only) / (supervised - source_only), from the means of the same seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from glua_bench.config import RunConfig
from glua_bench.reports.comparison import collect, table
from glua_bench.tracking import list_runs

# Name in the table → options of `glua-bench run`. `global_only` stands before `glua`, so that
# the style stage is trained once and not waited for.
ENTRIES = {
    "source_only": ["--method", "source_only"],
    "supervised": ["--method", "source_only", "--scenario", "supervised"],
    "source_only + photometric": ["--method", "source_only", "--augmentation", "photometric"],
    "global_only": ["--method", "global_only"],
    "local_only": ["--method", "local_only"],
    "glua": ["--method", "glua"],
    "histogram_matching": ["--method", "histogram_matching"],
    "fda": ["--method", "fda"],
    "advent": ["--method", "advent"],
    "ada_output": ["--method", "ada_output"],
    "slaug": ["--method", "slaug"],
    "mean_teacher": ["--method", "mean_teacher"],
    "cycle_translate": ["--method", "cycle_translate"],
    "sifa": ["--method", "sifa"],
    "glua_self_training": ["--method", "glua_self_training"],
    "glua + photometric": ["--method", "glua", "--augmentation", "photometric"],
}
TASKS = {
    "phantom mr-ct": ["--dataset", "phantom", "--direction", "mr-ct"],
    "phantom ct-mr": ["--dataset", "phantom", "--direction", "ct-mr"],
    "mscmr bssfp-lge": ["--dataset", "mscmr", "--direction", "bssfp-lge"],
}


def execute(commands: list[list[str]], workers: int) -> int:
    """Run commands, `workers` at a time; the number that failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(command: list[str]) -> int:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        state = "done" if done.returncode == 0 else f"FAILED: {done.stderr.strip()[-300:]}"
        print(" ".join(command[3:]), state, flush=True)
        return done.returncode

    with ThreadPoolExecutor(workers) as pool:
        return sum(code != 0 for code in pool.map(one, commands))


def entry_of(config: RunConfig) -> str:
    """A run's name in the table."""
    if config.scenario == "supervised":
        return "supervised"
    return config.method + (" + photometric" if config.augmentation == "photometric" else "")


def found(runs_root: Path) -> pd.DataFrame:
    """The rows of all finished runs below a directory."""
    runs = [run for run in list_runs(runs_root) if run.done]
    return collect(
        (entry_of(run.config), f"{run.config.dataset} {run.config.direction}", run) for run in runs
    )


def show(lines: pd.DataFrame) -> None:
    """Print a table."""
    with pd.option_context("display.width", 200, "display.max_columns", 20):
        print(lines.round(3).to_string())


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--entries", nargs="*", default=list(ENTRIES), help="; ".join(ENTRIES))
    parser.add_argument("--plugin", help="a file with a further method, an entry by its name")
    parser.add_argument("--options", default="", help="further options of each `glua-bench run`")
    parser.add_argument("--rows", type=Path, help="write the publishable rows to this file")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--table-of", type=Path, help="print the table of such a file, and stop")
    options = parser.parse_args()
    if options.table_of is not None:
        show(table(pd.read_parquet(options.table_of)))
        return
    failed = 0
    if not options.table_only:
        start = [
            sys.executable,
            "-m",
            "glua_bench",
            "run",
            "--no-mlflow",
            "--runs",
            str(options.runs),
        ]
        start += shlex.split(options.options)
        if options.plugin is not None:
            start += ["--plugin", options.plugin]
        commands = [
            [*start, *ENTRIES.get(entry, ["--method", entry]), *TASKS[task], "--seed", str(seed)]
            for seed, entry, task in itertools.product(
                range(options.seeds), options.entries, options.tasks
            )
        ]
        failed = execute(commands, options.workers)
    rows = found(options.runs)
    if options.rows is not None:
        # Rows of real patients stay where they are.
        rows[rows["dataset"] == "phantom"].to_parquet(options.rows, index=False)
    show(table(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
