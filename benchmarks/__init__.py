"""Benchmarks: `python -m benchmarks` from the root of the repository (docs/performance.md)."""

from __future__ import annotations

import sys
from pathlib import Path

# Variables that limit the threads of libraries.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ROOT = Path(__file__).resolve().parent.parent
# `python -m` puts the checkout first in the path. There `glua_bench` is the folder, to which only
# an installation adds `methods/`, `datasets/`, `sweeps/` and `reports/`.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]
