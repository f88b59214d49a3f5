"""Fixtures: plugin files, and the phantom with thicker and thinner slices."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from small_runs import DISCS, PLUGIN, Ask, small_request

from glua_bench.data.volumes import load_image
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.runs.request import RunOptions
from glua_bench.task import Grid


@pytest.fixture
def ask(phantom_root: Path, tmp_path: Path) -> Ask:
    """Return `small_request` on the phantom in a directory of runs."""
    return partial(small_request, phantom_root, tmp_path / "runs")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugged.py"
    path.write_text(PLUGIN)
    return path


FITTING = '''
from dataclasses import dataclass

from glua_bench.config import setting
from glua_bench.method import Adjustment, Method
from glua_bench.methods.source_only import SegmentConfig, SourceOnly

@dataclass(frozen=True)
class FittingConfig(SegmentConfig):
    clusters: int = setting(6, "at most as many as cases", low=1, high=64)

class Fitting(SourceOnly, Method):
    """Source only, with clusters of target cases."""

    name = "fitting"
    reference = "none"
    needs = "nothing"
    Config = FittingConfig

    def check(self, cases):
        if self.config.clusters <= cases.target:
            return {}
        return {"clusters": Adjustment(cases.target, f"training has {cases.target} target case(s)")}
'''


@pytest.fixture
def fitting(tmp_path: Path) -> Path:
    path = tmp_path / "fitting.py"
    path.write_text(FITTING)
    return path


@pytest.fixture
def thick(phantom_root: Path, tmp_path: Path) -> Ask:
    """Return `ask` on a phantom with a slice spacing of 9 mm (MR) and 2 mm (CT)."""
    root = tmp_path / "thick"
    shutil.copytree(phantom_root, root)
    dataset = Phantom(root)
    for domain, thickness in (("mr", 9.0), ("ct", 2.0)):
        for case in dataset.cases(domain):
            for path in (case.image, case.label):
                image: Any = nib.load(path)
                axis = load_image(case.image, dataset.reading, Grid(32, 7.0)).placement.axes[0]
                affine = image.affine.copy()
                affine[:3, axis] *= thickness / np.linalg.norm(affine[:3, axis])
                nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    return partial(small_request, root, tmp_path / "runs")


@pytest.fixture
def base(tmp_path: Path) -> RunOptions:
    return RunOptions(
        preset="quick",
        steps=2,
        assignments=["segmenter.width=4", "segmenter.depth=3", "batch_size=2", "candidates=2"],
        plugins=DISCS,
        data_root=tmp_path / "discs",
        runs_root=tmp_path / "runs",
        device="cpu",
        mlflow=False,
    )
