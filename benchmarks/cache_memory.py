"""Peak memory of a process that reads random slices of 10 and of 40 cached volumes.

    python benchmarks/cache_memory.py [--batches 300]

The volumes are 130 × 256 × 256 float32 noise in compressed NIfTI, preprocessed through the cache
like any others; each stage runs in a process of its own, whose peak is what `getrusage` reports.
Needs about 1.5 GB under the temporary directory, which is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from glua_bench.data.cache import SliceCache
from glua_bench.data.stores import CachedImage, ImageStore
from glua_bench.task import DomainView, Grid, Reading, UnlabelledCase

SHAPE = (256, 256, 130)
READING = Reading(orientation="stored", slice_axis=2, row_axis=1)
GRID = Grid(256, 1.0)


def make_volumes(folder: Path, count: int) -> None:
    """Volumes that differ, compress fast, and look like nothing."""
    base = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    for index in range(count):
        image = nib.Nifti1Image(np.roll(base, index, 2) + index, np.eye(4))
        nib.save(image, folder / f"{index}.nii.gz")


def cached(folder: Path, count: int) -> list[CachedImage]:
    """The entries of the first volumes."""
    cache = SliceCache(folder / "slices")
    cases = [UnlabelledCase(str(i), "noise", folder / f"{i}.nii.gz") for i in range(count)]
    view = DomainView("noise", READING, ()).on(GRID)
    return [cache.image(case, view) for case in cases]


def read(folder: Path, count: int, batches: int) -> None:
    """Random batches of 16 slices, as training draws them."""
    store = ImageStore(cached(folder, count))
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    total = 0.0
    for _ in range(batches):
        total += float(store.images(rng.integers(0, len(store), 16)).mean())
    print(f"{1000 * (time.perf_counter() - start) / batches:.1f}", end=" ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "FOLDER", "COUNT"))
    options = parser.parse_args()
    if options.child:
        stage, folder, count = options.child[0], Path(options.child[1]), int(options.child[2])
        print("-" if stage != "read" else "", end=" ")
        if stage == "make":
            make_volumes(folder, count)
        elif stage == "build":
            cached(folder, count)
        else:
            read(folder, count, options.batches)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GLUA_BENCH_CACHE": folder}
        print("process          volumes   ms a batch of 16   peak RSS MiB")
        # A child's peak includes what its parent held at the fork, so the parent makes nothing.
        stages = (("make", 40), ("build", 10), ("build", 40), ("read", 10), ("read", 40))
        for stage, count in stages:
            arguments = ["--batches", str(options.batches), "--child", stage, folder, str(count)]
            output = subprocess.run(
                [sys.executable, __file__, *arguments],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            pace, peak = output.split()
            print(f"{stage:15s}  {count:7d}  {pace:>17s}  {int(peak) / 1024:13.0f}", flush=True)


if __name__ == "__main__":
    main()
