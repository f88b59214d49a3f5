"""A sweep over GLUA's mask ratio against the same trainings run one by one.

    python benchmarks/sweep_reuse.py [--steps 100] [--workers 2] [--trials 12]

The sweep trains its style stage once and shares it; each separate run has a cache of its own, with
the prepared slices and without a finished stage, so it trains the style again. As many separate
runs go on at once as the sweep has workers, each with as many threads as a worker. Report and
tracker are included on both sides. With two cores and 100 updates it takes some 20 minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from glua_bench.runs.executor import environment
from glua_bench.sweeps.definition import find, read


def command(*words: str, folder: Path, cache: Path, changed: dict[str, str] | None = None) -> None:
    """Run glua-bench in a folder, with a cache of its own.

    Raises:
        SystemExit: it failed; the message is its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "glua_bench", *words],
        cwd=folder,
        env={**os.environ, **(changed or {}), "GLUA_BENCH_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="updates of each segmenter")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trials", type=int, default=12, help="trainings on each side")
    options = parser.parse_args()
    definition = read(find("mask_ratio"), oracle=False)
    (parameter,), fixed = definition.space, definition.settings
    ratios = parameter.choices[: options.trials]
    shared = ("--steps", str(options.steps))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared, used = folder / "prepared", folder / "used"
        command("data", "prepare", "phantom", folder=folder, cache=prepared)
        shutil.copytree(prepared, used)
        began = time.perf_counter()
        words = ("sweep", "mask_ratio", "--workers", str(options.workers))
        command(*words, "--trials", str(len(ratios)), *shared, folder=folder, cache=used)
        sweep = time.perf_counter() - began

        def alone(index: int) -> None:
            own = folder / f"run{index}"
            shutil.copytree(prepared, own / "cache")
            settings = (*fixed, f"method.{parameter.name}={ratios[index]}")
            words = ("run", "--method", "glua", "--dataset", "phantom")
            words += tuple(word for setting in settings for word in ("--set", setting))
            changed = environment(index, options.workers)
            command(*words, *shared, folder=own, cache=own / "cache", changed=changed)
            shutil.rmtree(own)

        began = time.perf_counter()
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(alone, range(len(ratios))))
        separate = time.perf_counter() - began
    print(f"{len(ratios)} trainings, {options.steps} updates, {options.workers} at once:")
    print(f"sweep {sweep:.0f} s, separate runs {separate:.0f} s, ratio {sweep / separate:.2f}")


if __name__ == "__main__":
    main()
