"""How much faster `case_metrics` is than medpy on a cardiac-sized volume, and that they agree.

    python benchmarks/surface_metrics.py [--repeats 5]

Four heart-like structures (a shell around a cavity, and two ellipsoids) in 130 × 256 × 256 voxels,
scored against a prediction with shifted, ragged surfaces. Both sides run in this process, in turn;
the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from medpy.metric import binary
from scipy import ndimage

from glua_bench.scoring.metrics import case_metrics
from glua_bench.task import Structure

SHAPE = (130, 256, 256)
SPACING = (1.0, 1.0, 1.0)
STRUCTURES = [
    Structure(name, name, (i,), "#000000")
    for i, name in enumerate(("MYO", "LAC", "LVC", "AA"), start=1)
]


def heart(rng: np.random.Generator, raggedness: float) -> np.ndarray:
    """uint8 labels 1 MYO, 2 left atrium, 3 LV cavity, 4 aorta; each surface displaced at random."""
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels = np.zeros(SHAPE, np.uint8)
    bodies = (
        (4, (95, 95, 135), (30, 15, 15)),
        (2, (85, 140, 150), (22, 32, 28)),
        (1, (55, 130, 110), (42, 34, 34)),
        (3, (55, 130, 110), (33, 24, 24)),
    )
    for label, centre, radii in bodies:
        noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE, np.float32), 4)
        noise *= raggedness / noise.std()
        shift = rng.uniform(-raggedness, raggedness, 3)
        r = np.sqrt(
            sum(
                ((axis - c - s) / radius) ** 2
                for axis, c, s, radius in zip((z, y, x), centre, shift, radii, strict=True)
            )
        )
        labels[(r - 1) * min(radii) < noise] = label
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    reference, prediction = heart(rng, 0.0), heart(rng, 2.0)

    ours: list[float] = []
    theirs: list[float] = []
    worst = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        rows = case_metrics(prediction, reference, STRUCTURES, SPACING)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        expected = [
            (binary.dc(*masks), binary.assd(*masks, SPACING), binary.hd95(*masks, SPACING))
            for masks in ((prediction == label, reference == label) for label in range(1, 5))
        ]
        theirs.append(time.perf_counter() - start)
        for row, values in zip(rows, expected, strict=True):
            found = (row["dice"], row["assd"], row["hd95"])
            worst = max(worst, *(abs(a - b) for a, b in zip(found, values, strict=True)))
    print("structure   Dice   ASSD mm   HD95 mm")
    for row in rows:
        print(f"{row['structure']:9s}  {row['dice']:.3f}  {row['assd']:8.3f}  {row['hd95']:8.3f}")
    print(f"medpy        {statistics.median(theirs):8.3f} s a case")
    print(f"case_metrics {statistics.median(ours):8.3f} s a case")
    print(f"ratio        {statistics.median(theirs) / statistics.median(ours):8.1f}")
    print(f"largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
