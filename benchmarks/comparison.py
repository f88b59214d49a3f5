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


def entry_of(row: pd.Series) -> str:
    """A row's name in the table."""
    if row["scenario"] == "supervised":
        return "supervised"
    suffix = " + photometric" if row["augmentation"] == "photometric" else ""
    return f"{row['method']}{suffix}"


def collect(runs_root: Path) -> pd.DataFrame:
    """Rows per case, structure and selector of all finished runs, with the run's cost.

    A stage that a run took from the cache costs what it cost the run that trained it.
    """
    finished = [(run, run.read_summary()) for run in list_runs(runs_root) if run.done]
    trained = {
        (run.config.dataset, run.config.direction, run.config.seed, stage): seconds
        for run, summary in finished
        for stage, seconds in summary["stage_seconds"].items()
        if stage not in summary["reused_stages"] and stage != "segment"
    }
    frames = []
    for run, summary in finished:
        config, seconds = run.config, sum(summary["stage_seconds"].values())
        for stage in summary["reused_stages"]:
            seconds += trained[config.dataset, config.direction, config.seed, stage]
        frames.append(
            run.read_cases().assign(seconds=seconds, peak_memory_mib=summary["peak_memory_mib"])
        )
    rows = pd.concat(frames, ignore_index=True)
    rows["entry"] = rows.apply(entry_of, axis=1)
    rows["task"] = rows["dataset"] + " " + rows["direction"]
    return rows


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per task and entry: means and standard deviations over seeds."""
    rows = rows[rows["selector"] == "last"]
    keys = ["task", "entry", "seed"]
    per_case = rows.groupby([*keys, "case"])[["dice", "assd"]].mean()
    per_seed = per_case.groupby(keys).mean()
    per_seed["missed"] = rows.groupby(keys)["missed"].sum()
    per_seed["seconds"] = rows.groupby(keys)["seconds"].first()
    per_seed["memory"] = rows.groupby(keys)["peak_memory_mib"].first()
    per_seed["step"] = rows.groupby(keys)["step"].first()  # the last: the segmenter's budget
    dice = per_seed["dice"].unstack("entry")
    if {"source_only", "supervised"} <= set(dice):
        span = dice["supervised"] - dice["source_only"]
        gap = dice.sub(dice["source_only"], axis=0).div(span, axis=0).stack()
        per_seed["gap"] = gap.reorder_levels(["task", "seed", "entry"]).swaplevel(1, 2)
    else:
        per_seed["gap"] = float("nan")  # without its ends there is no gap
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
            "s a step": (per_seed["seconds"] / per_seed["step"]).groupby(["task", "entry"]).mean(),
            "peak MiB": by_entry["memory"].mean(),
        }
    ).sort_values(["task", "Dice"])


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
    rows = collect(options.runs)
    if options.rows is not None:
        # Rows of real patients stay where they are.
        rows[rows["dataset"] == "phantom"].to_parquet(options.rows, index=False)
    show(table(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
