"""How long a report over many runs takes, and how much memory.

    python benchmarks/report_scale.py
    python benchmarks/report_scale.py --runs 200 --keep /tmp/many

Makes finished run directories of synthetic scores (no training), 20 test cases of 4 structures and
10 selectors each, lets `glua-bench report --no-pictures` read them in a process of its own, and
prints its seconds and peak memory beside the aims for 1,000 runs: 20 s, 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from glua_bench.config import PRESETS, RunConfig, SegmenterSpec
from glua_bench.records.run_directory import RunDirectory
from glua_bench.task import Grid

STRUCTURES = ("MYO", "LAC", "LVC", "AA")
CASES, SEEDS, DIRECTIONS = 20, 10, ("mr-ct", "ct-mr")


def make(root: Path, count: int) -> None:
    """Write `count` finished runs: ten seeds of each entry, in both directions."""
    rng = np.random.default_rng(0)
    quick = dict(PRESETS["quick"])
    quick["segmenter"] = SegmenterSpec(**quick["segmenter"])
    base = RunConfig("source_only", "phantom", "mr-ct", Grid(64, 3.5, 4.0), **quick)
    keys = pd.MultiIndex.from_product(
        [base.selectors, [f"case_{i:02d}" for i in range(CASES)], STRUCTURES],
        names=["selector", "case", "structure"],
    ).to_frame(index=False)
    sizes = rng.uniform(20, 200, CASES * len(STRUCTURES))
    for number in range(count):
        seed, rest = number % SEEDS, number // SEEDS
        direction, entry = DIRECTIONS[rest % 2], rest // 2
        config = replace(
            base,
            method="source_only" if entry == 0 else f"method_{entry:02d}",
            direction=direction,
            seed=seed,
        )
        directory = RunDirectory(root, config, f"{number:012x}")
        dice = np.clip(rng.normal(0.4 + 0.008 * entry, 0.1, len(keys)), 0, 1)
        rows = keys.assign(
            run=directory.id,
            dice=dice,
            assd=20 * (1 - dice),
            hd95=50 * (1 - dice),
            missed=dice == 0,
            reference_ml=np.tile(sizes, len(base.selectors)),
            prediction_ml=np.tile(sizes, len(base.selectors)),
            step=500,
        )
        facts = {"code": "0", "device": "cpu", "threads": 1, "changed": {}, "variant": ""}
        directory.start({**facts, "data": {"train": direction}})
        directory.write_cases(rows)
        directory.finish(
            {
                "stage_seconds": {"train": 100.0 + entry},
                "reused_stages": [],
                "peak_memory_mib": 900.0,
                "selector_scores": {
                    name: {str(step): float(rng.random()) for step in (100, 200, 300, 400, 500)}
                    for name in base.selectors
                },
            }
        )


def main() -> None:
    """Make the runs, report on them, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="leave runs and report in this directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        make(folder / "runs", options.runs)
        words = ["report", "--runs", "runs", "--out", "report", "--no-pictures"]
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "glua_bench", *words], cwd=folder)
        # Of this child alone: `getrusage` of all children would count the largest of them.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status:
            sys.exit("the report failed")
        page = folder / "report" / "report.html"
        rows = {
            "runs": options.runs,
            "rows": options.runs * CASES * len(STRUCTURES) * 10,
            "seconds (aim 20 for 1,000)": round(seconds, 1),
            "processor seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak MiB (aim 1,024)": round(usage.ru_maxrss / 1024),
            "page MiB": round(page.stat().st_size / 2**20, 1),
        }
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
