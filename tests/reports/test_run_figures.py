"""reports/run_figures.py: every method's own pictures are drawn, with and without a target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.reports import run_figures
from glua_bench.reports.run_figures import draw_dataset, draw_run, telling_slice
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest
from glua_bench.task import UNANNOTATED, Case, Grid

SMALL = ("segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=7", "batch_size=2")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("source_only", {"cases.png"}),
        ("histogram_matching", {"cases.png", "restyled.png"}),
        ("mean_teacher", {"cases.png", "pictures.png"}),
        ("slaug", {"cases.png", "pictures.png"}),  # sees no target image
        ("local_only", {"cases.png", "pictures.png"}),
    ],
)
@pytest.mark.parametrize("slices", [1, 3])
def test_what_a_method_shows_is_drawn(
    method: str, expected: set[str], slices: int, phantom_root: Path, tmp_path: Path
) -> None:
    request = RunRequest(
        method,
        "phantom",
        preset="quick",
        steps=2,
        assignments=[*SMALL, f"slices={slices}"],
        data_root=phantom_root,
        runs_root=tmp_path,
        device="cpu",
        mlflow=False,
    )
    planned = plan(request)
    execute(planned, Progress(enabled=False), draw_run)
    drawn = planned.directory.figures
    assert {file.name for file in drawn.iterdir()} == expected
    for name in expected:
        assert matplotlib.image.imread(drawn / name)[..., :3].std() > 0.05


def test_a_dataset_is_drawn_with_the_volumes_of_its_structures(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All labelled cases count, also those of which no slice is shown."""

    class OneBare(Phantom):
        def cases(self, domain: str) -> tuple[Case, ...]:
            cases = super().cases(domain)
            return tuple(replace(c, label=None) if c.id == "ct_1001" else c for c in cases)

    told = {}

    def watched(path: Path, *arguments: Any) -> Path:
        told[path.name] = arguments[-1]
        return domain_montage(path, *arguments)

    domain_montage = run_figures.domain_montage
    monkeypatch.setattr(run_figures, "domain_montage", watched)
    grid = Grid(64, 3.5, 4.0)
    files = draw_dataset(OneBare(phantom_root), grid, tmp_path, columns=1)
    assert [file.name for file in files] == ["phantom_mr.png", "phantom_ct.png"]
    assert {name: [len(row) for row in rows] for name, rows in told.items()} == {
        "phantom_mr.png": [3] * 4,
        "phantom_ct.png": [2] * 4,
    }
    case = Phantom(phantom_root).cases("mr")[0]
    labels = SliceCache().label(case, Phantom.view("mr").on(grid)).open()
    expected = (labels == 3).sum() * 4.0 * 3.5 * 3.5 / 1000
    assert told["phantom_mr.png"][2][0] == pytest.approx(expected, rel=0.01) and expected > 40


def test_what_nobody_annotated_makes_no_slice_telling() -> None:
    labels = np.zeros((3, 4, 4), np.uint8)
    labels[0] = UNANNOTATED
    labels[1, :2] = 1
    assert telling_slice(labels) == 1
