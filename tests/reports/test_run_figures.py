"""reports/run_figures.py: pictures of methods with and without a target, and of datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from drawn import CODES, assert_readable, store

from glua_bench.data.cache import SliceCache
from glua_bench.data.volumes import load_image
from glua_bench.datasets.folder.description import PLANES
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.reports import figures, run_figures
from glua_bench.reports.run_figures import draw_dataset, draw_run, most_visible_slice
from glua_bench.task import UNANNOTATED, Case, Grid


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("source_only", {"cases"}),
        ("histogram_matching", {"cases", "strip"}),
        ("mean_teacher", {"cases", "strip"}),
        ("slaug", {"cases", "strip"}),  # sees no target image
        ("local_only", {"cases", "strip"}),
    ],
)
@pytest.mark.parametrize("slices", [1, 3])
def test_what_a_method_shows_is_drawn(
    method: str, expected: set[str], slices: int, quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    drawn = quick_run(method, tmp_path, f"slices={slices}", draw=draw_run).figures
    suffixes = (".png", ".svg", ".pdf")
    assert {f.name for f in drawn.iterdir()} == {
        n + suffix for n in expected for suffix in suffixes
    }
    for name in expected:
        assert matplotlib.image.imread(drawn / f"{name}.png")[..., :3].std() > 0.05


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


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(
    ("plane", "top", "right"), [("axial", "A", "L"), ("coronal", "S", "L"), ("sagittal", "S", "P")]
)
def test_sides_are_the_patient_s(
    codes: str, plane: str, top: str, right: str, tmp_path: Path
) -> None:
    """However a file stores its axes, a mark in the patient lies at the letter of its side."""
    shape = (24, 28, 32)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    image = np.zeros(shape)
    image[4:-4, 4:-4, 4:-4] = 100
    axes = {
        letter: (i, end)
        for i, ends in enumerate(("LR", "PA", "IS"))
        for end, letter in enumerate(ends)
    }
    for letter in (top, right):
        axis, end = axes[letter]
        inner = [slice(8, -8)] * 3
        inner[axis] = slice(-7, -4) if end else slice(4, 7)
        image[tuple(inner)] = 1000 if letter == right else 700
    store(tmp_path / "image.nii.gz", image, affine, codes, "both")
    reading = PLANES[plane]
    loaded = load_image(tmp_path / "image.nii.gz", reading, Grid(32, 2.0))
    frame = run_figures.frame(loaded.placement, reading, tmp_path / "image.nii.gz")
    opposite = {"A": "P", "S": "I", "L": "R", "P": "A"}
    assert frame.sides == (top, right, opposite[top], opposite[right])
    assert frame.width == pytest.approx(64)
    middle = loaded.voxels[len(loaded.voxels) // 2]
    bright, lighter = middle > 0.9, (middle > 0.2) & (middle < 0.7)
    assert np.argwhere(bright).mean(0)[1] > 20 and np.argwhere(lighter).mean(0)[0] < 12


def test_oblique_slices_have_two_letters_and_unknown_ones_none(tmp_path: Path) -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]]  # 40 degrees
    for angle, expected in ((turn, ("AL", "LP", "PR", "RA")), (np.eye(4), ("A", "L", "P", "R"))):
        voxels = np.zeros((16, 16, 8), np.float32)
        voxels[4:12, 4:12] = 1
        path = tmp_path / "image.nii.gz"
        nib.save(nib.Nifti1Image(voxels, angle), path)
        reading = PLANES["axial"]
        loaded = load_image(path, reading, Grid(32, 1.0))
        assert run_figures.frame(loaded.placement, reading, path).sides == expected
    # The dataset ignores the header's orientation, or the header states none.
    stored = replace(reading, orientation="stored")
    assert run_figures.frame(loaded.placement, stored, path).sides == ("",) * 4
    assert figures.Frame.of(loaded.placement, reading, oriented=False).sides == ("",) * 4


def test_the_strip_shows_images_maps_and_the_gap(
    quick_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def watched(figure: Any, path: Path, *arguments: Any, **options: Any) -> list[Path]:
        seen[path.stem] = figure
        return save(figure, path, *arguments, **options)

    save = figures.save
    monkeypatch.setattr(figures, "save", watched)
    run = quick_run("glua", tmp_path, draw=draw_run)
    axes = seen["strip"].axes
    named = [a.get_ylabel() for a in axes if a.get_ylabel()]
    assert named[:4] == ["source", "restyled", "target", "gain minus 1"]
    chart = next(a for a in axes if a.get_xlabel() == "update")
    logged = [row["values"] for row in run.read_log() if "d1_source" in row["values"]]
    curves = {line.get_label(): list(line.get_ydata()) for line in chart.lines}
    assert curves["source"] == pytest.approx([values["d1_source"] for values in logged])
    assert curves["target"] == pytest.approx([values["d1_target"] for values in logged])
    assert_readable(seen["strip"])
    assert_readable(seen["cases"])
    # Every slice has a scale bar and four letters; grid: 32 pixels of 7 mm.
    for axis in (one for one in axes if one.images):
        texts = {t.get_text() for t in axis.texts}
        assert "50 mm" in texts and {"S", "I", "L", "R"} <= texts
        (bar,) = [line for line in axis.lines if line.get_color() == "white"]
        assert np.ptp(bar.get_xdata()) * 32 * 7 == pytest.approx(50)
