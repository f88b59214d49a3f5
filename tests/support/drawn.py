"""Helpers for tests that draw volumes, store them as scanners and converters do, or read charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from matplotlib.text import Text

from glua_bench.console import Progress
from glua_bench.data.resampling import Placement
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest

CODES = ("LPS", "RAS", "LAS", "PIR", "LIA", "ASL")
HEADERS = ("both", "sform", "qform", "disagree")
SMALL = ("segmenter.width=4", "segmenter.depth=3", "batch_size=2")


def store(
    path: Path, data: np.ndarray, affine: np.ndarray, codes: str, header: str, slope: bool = False
) -> None:
    """Write RAS+ data in other axes; `header` says which of the two matrices is correct."""
    image = nib.Nifti1Image(data.astype(np.int16), affine)
    turned = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    image = image.as_reoriented(turned)
    if slope:  # stored from 0, as a converter of CT may do
        image = nib.Nifti1Image((np.asarray(image.dataobj) + 1024) // 2, image.affine)
        image.header.set_slope_inter(2, -1024)
    truth = image.affine.copy()  # setting a matrix changes the array of `affine`
    # Mirrored, as converters leave the matrix that they ignore.
    wrong = truth @ np.diag([-1.0, 1.0, -1.0, 1.0])
    image.set_sform(truth if header != "qform" else wrong, 0 if header == "qform" else 1)
    image.set_qform(truth if header in ("both", "qform") else wrong, int(header != "sform"))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def share_in_window(mask: np.ndarray, placement: Placement) -> float:
    """Return the share of a mask, on the file's axes, that the working window covers."""
    kept = mask.transpose(placement.axes)
    kept = kept[tuple(slice(None, None, -1 if flip else 1) for flip in placement.flips)]
    for axis in (1, 2):
        half = 0.5 * placement.step[axis]
        first = placement.offset[axis] - half
        last = placement.offset[axis] + 2 * half * (placement.shape[axis] - 0.5)
        index = np.arange(kept.shape[axis])
        kept = np.compress((index >= first - 1e-6) & (index <= last + 1e-6), kept, axis)
    return float(kept.sum() / mask.sum())


def run_glua(
    dataset: str, direction: str, root: Path, runs: Path, *settings: str
) -> tuple[Path, pd.DataFrame]:
    """Train GLUA for two updates; return the run's directory and its rows of test cases."""
    request = RunRequest(
        "glua",
        dataset,
        direction=direction,
        preset="quick",
        steps=2,
        assignments=[*SMALL, "grid.size=64", *settings],
        data_root=root,
        runs_root=runs,
        device="cpu",
        mlflow=False,
    )
    planned = plan(request)
    execute(planned, Progress(enabled=False))
    return planned.directory.path, pd.read_parquet(planned.directory.path / "cases.parquet")


def sentence(error: pytest.ExceptionInfo[Exception], *named: object) -> str:
    """Return an error's message: one sentence that contains all of `named`."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text, text
    for part in named:
        assert str(part) in text, text
    return text


def texts_of(figure: Figure) -> list[tuple[str, Outline]]:
    """Return the visible texts of a figure with their outlines in pixels, of turned texts, too."""
    figure.canvas.draw()
    limits = {a.xaxis: a.get_xlim() for a in figure.axes} | {
        a.yaxis: a.get_ylim() for a in figure.axes
    }
    hidden: set[int] = set()  # tick labels beyond the limits of their axis are not drawn
    for axis, ends in limits.items():
        low, high = sorted(ends)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            margin = 1e-6 * (high - low)
            if not low - margin <= tick.get_loc() <= high + margin:
                hidden |= {id(tick.label1), id(tick.label2)}
    shown = [a for a in figure.findobj(Text) if a.get_visible() and a.get_text().strip()]
    gone = [a for a in figure.axes if not a.get_visible()]
    found = []
    for text in shown:
        if id(text) in hidden or text.axes in gone:
            continue
        box = text.get_window_extent()
        middle = np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])
        turn = text.get_rotation()
        text.set_rotation(0)
        flat = text.get_window_extent()
        text.set_rotation(turn)
        half = np.array([flat.width, flat.height]) / 2 - 0.75  # neighbours may touch
        angle = np.radians(turn)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = [rotation @ (half * sign) for sign in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        found.append(
            (text.get_text(), Outline([*(middle + c for c in corners), middle + corners[0]]))
        )
    return found


def assert_readable(figure: Figure, name: str = "") -> None:
    """Assert that all texts lie inside the figure, and that no two of them overlap.

    Texts are titles, labels of axes, ticks and points, and legends.
    """
    found = texts_of(figure)
    assert found, f"{name}: no text"
    width, height = figure.bbox.width, figure.bbox.height
    for text, outline in found:
        box: Any = outline.get_extents()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{name}: '{text}' leaves the figure ({width:.0f} × {height:.0f}): {box}"
    for index, (text, outline) in enumerate(found):
        for other, second in found[index + 1 :]:
            crossing = outline.intersects_path(second, filled=True)
            assert not crossing, f"{name}: '{text}' and '{other}' overlap"
