"""How long a user waits: the main job with nothing prepared, and the commands that answer at once.

    python benchmarks/main_job.py [--skip-runs]

Each run starts with an empty cache in an empty directory, so data generation, preprocessing,
imports, evaluation, figures and the tracker are in the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

START = [sys.executable, "-m", "glua_bench"]
RUNS = {
    "run --method source_only --dataset phantom": 120,
    "run --method glua --dataset phantom": 600,
}
ANSWERS = ("--help", "list")


def seconds(arguments: list[str], folder: str) -> float:
    """Wall time of one command."""
    began = time.perf_counter()
    subprocess.run(
        [*START, *arguments],
        cwd=folder,
        env={**os.environ, "GLUA_BENCH_CACHE": f"{folder}/cache"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def main() -> None:
    """Time the commands and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--skip-runs", action="store_true")
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors")
    print(f"{'glua-bench':<46}{'seconds':>9}{'aim':>7}")
    for command in ANSWERS:
        with tempfile.TemporaryDirectory() as folder:
            best = min(seconds([command], folder) for _ in range(7))
        print(f"{command:<46}{best:>9.2f}{0.4:>7}", flush=True)
    for command, aim in {} if options.skip_runs else RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"{command:<46}{seconds(command.split(), folder):>9.0f}{aim:>7}", flush=True)


if __name__ == "__main__":
    main()
