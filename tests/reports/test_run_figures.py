"""reports/run_figures.py: pictures of methods with and without a target, and of datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from glua_bench.data.cache import SliceCache
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.reports import run_figures
from glua_bench.reports.run_figures import draw_dataset, draw_run, most_visible_slice
from glua_bench.task import UNANNOTATED, Case, Grid


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
    method: str, expected: set[str], slices: int, quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    drawn = quick_run(method, tmp_path, f"slices={slices}", draw=draw_run).figures
    assert {file.name for file in drawn.iterdir()} == expected
    for name in expected:
        assert matplotlib.image.imread(drawn / name)[..., :3].std() > 0.05


def test_a_dataset_is_drawn_with_the_volumes_of_its_structures(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Volumes include labelled cases of which no slice is shown."""

    class OneUnlabelled(Phantom):
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
    files = draw_dataset(OneUnlabelled(phantom_root), grid, tmp_path, columns=1)
    assert [file.name for file in files] == ["phantom_mr.png", "phantom_ct.png"]
    assert {name: [len(row) for row in rows] for name, rows in told.items()} == {
        "phantom_mr.png": [3] * 4,
        "phantom_ct.png": [2] * 4,
    }
    case = Phantom(phantom_root).cases("mr")[0]
    labels = SliceCache().label(case, Phantom.view("mr").on(grid)).open()
    expected = (labels == 3).sum() * 4.0 * 3.5 * 3.5 / 1000
    assert told["phantom_mr.png"][2][0] == pytest.approx(expected, rel=0.01) and expected > 40


def test_unannotated_voxels_do_not_make_a_slice_most_visible() -> None:
    labels = np.zeros((3, 4, 4), np.uint8)
    labels[0] = UNANNOTATED
    labels[1, :2] = 1
    assert most_visible_slice(labels) == 1
