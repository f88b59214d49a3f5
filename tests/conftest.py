"""What every test stands on: nothing of the user's is read or written, and one small phantom."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
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


@pytest.fixture
def write_livers() -> Callable[[Path], None]:
    """Writes files as docs/adding-data.md describes them below a directory."""

    def write(root: Path) -> None:
        for domain in ("ct", "mr"):
            (root / domain).mkdir(parents=True)
            for number in range(1, 6):
                rng = np.random.default_rng([number, domain == "mr"])
                x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 44, 5)), indexing="ij")
                ball = (x - rng.uniform(-0.2, 0.2)) ** 2 + y**2 + z**2 / 4 < 0.2
                body = x**2 + y**2 < 0.9
                image = np.where(ball, 0.9 if domain == "ct" else 0.3, np.where(body, 0.6, 0.0))
                image = (image + rng.normal(0, 0.02, x.shape)).astype(np.float32)
                affine = np.diag([4.0, 4.0, 6.0, 1.0])
                name = root / domain / f"{number:03d}"
                nib.save(nib.Nifti1Image(image, affine), f"{name}_image.nii.gz")
                labels = ball.astype(np.int16)
                labels[0, 0, 0] = 9  # a value that a dataset may ignore
                nib.save(nib.Nifti1Image(labels, affine), f"{name}_label.nii.gz")

    return write
