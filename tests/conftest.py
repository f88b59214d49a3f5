"""What every test stands on: nothing of the user's is read or written, and one small phantom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when torch is imported, so it is said before any test imports it. Tests run in several
# processes, and one thread each gives the same sums everywhere.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, and no tracker. GLUA_BENCH_DATA stays: real-data tests ask it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MLFLOW_") or name in ("GLUA_BENCH_DEBUG", "LOCAL_RANK"):
                patch.delenv(name)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("GLUA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        yield


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated cohort with one case per domain and split, as coarse as still shows a heart.

    Tests that change a file copy the directory first.
    """
    from glua_bench.datasets.phantom import generate

    root = tmp_path_factory.mktemp("phantom") / "tiny"
    ids = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
    generate(root, seed=0, ids=ids, voxel_scale=2.0, workers=1)
    return root
