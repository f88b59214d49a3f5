"""Figures of images and labels, of runs and of datasets.

Every function takes plain arrays and writes one file atomically, as PNG or SVG by its suffix.
Images are gray in [-1, 1]; labels are class indices (class i + 1 is `structures[i]`); row 0 is on
top in both. A structure has the dataset's colour in every figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from glua_bench.files import replacing
from glua_bench.task import Structure

DPI = 130
FOOTER = "not for redistribution"
INK = "#222222"
FAINT = "#6b6b6b"
WARNING = "#b00020"
LEVEL = 0.75  # contour level of a 0/1 mask: a quarter of a pixel inside
COLOUR_MAP = "viridis"  # perceptually uniform, readable with colour blindness
MAPS = ("gain", "gap", "mask", "discrepancy", "weight")  # words in the names of maps over [0, 1]


@dataclass(frozen=True)
class Panel:
    """One slice of one case: the image, the reference and the predictions.

    Attributes:
        image: (H, W) in [-1, 1].
        reference: (H, W), class indices.
        predictions: entry → (H, W), class indices.
        dice: entry → mean Dice of the case, in [0, 1].
        case: id of the case.
        note: why the case is shown, e.g. "worst".
    """

    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, np.ndarray]
    dice: Mapping[str, float]
    case: str
    note: str = ""


def case_grid(
    path: Path,
    panels: Sequence[Panel],
    structures: Sequence[Structure],
    title: str = "",
    publishable: bool = True,
) -> Path:
    """Draw cases side by side: rows for the image, the reference and each prediction.

    Rows of predictions repeat the reference as a thin dashed line, so that errors are localized.

    Args:
        path: the file to write.
        panels: one column each; all with the same entries.
        structures: the classes.
        title: of the figure.
        publishable: False stamps the figure as not for redistribution.

    Returns:
        The path.
    """
    entries = list(panels[0].predictions)
    names = ["image", "reference", *entries]
    figure = new_figure(2.2 * len(panels) + 1.2, 2.2 * len(names) + 1.0)
    axes = figure.subplots(len(names), len(panels), squeeze=False)
    for row, name in enumerate(names):
        _row_name(axes[row, 0], textwrap.fill(name, 20))
    for column, panel in enumerate(panels):
        for cell in axes[:, column]:
            _gray(cell, panel.image)
        heading = f"{panel.note}: {panel.case}" if panel.note else panel.case
        axes[0, column].set_title(heading, fontsize=9, color=INK)
        _contours(axes[1, column], panel.reference, structures)
        for cell, entry in zip(axes[2:, column], entries, strict=True):
            _contours(cell, panel.reference, structures, dashed=True)
            _contours(cell, panel.predictions[entry], structures)
            cell.text(
                0.02,
                0.97,
                f"Dice {panel.dice[entry]:.2f}",
                transform=cell.transAxes,
                va="top",
                fontsize=7.5,
                color="white",
                bbox={"facecolor": "black", "alpha": 0.55, "lw": 0, "pad": 1.5},
            )
    dashed = Line2D([], [], color=FAINT, lw=0.9, ls="--", label="reference (dashed)")
    return _finish(figure, path, title, [*_keys(structures), dashed], publishable)


def picture_grid(
    path: Path, rows: Mapping[str, np.ndarray], title: str = "", publishable: bool = True
) -> Path:
    """Draw rows of pictures: images in gray, maps over [0, 1] (named by `MAPS`) in colour.

    Args:
        path: the file to write.
        rows: name → (N, H, W); column n of every row belongs together. Maps may be coarser than
            the images.
        title: of the figure.
        publishable: False stamps the figure as not for redistribution.

    Returns:
        The path.

    Raises:
        ValueError: `rows` is empty, or a row has not the shape (N, H, W).
    """
    pictures = {name: np.asarray(values, dtype=float) for name, values in rows.items()}
    if not pictures or any(values.ndim != 3 for values in pictures.values()):
        raise ValueError("rows must be arrays of shape (N, H, W), and at least one")
    columns = max(len(values) for values in pictures.values())
    figure = new_figure(1.55 * columns + 1.2, 1.55 * len(pictures) + 0.8)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for row, (name, values) in zip(axes, pictures.items(), strict=True):
        _row_name(row[0], name.replace("_", " "))
        for cell in row[len(values) :]:
            cell.axis("off")
        if not any(word in name.lower() for word in MAPS):
            for cell, picture in zip(row, values, strict=False):
                _gray(cell, picture)
            continue
        if not len(values):
            continue
        for cell, picture in zip(row, values, strict=False):
            drawn = cell.imshow(picture, cmap=COLOUR_MAP, vmin=0, vmax=1, interpolation="nearest")
            _bare(cell)
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.05, pad=0.01, ticks=[0, 0.5, 1])
        bar.ax.tick_params(labelsize=7, colors=FAINT)
        bar.outline.set_visible(False)
    return _finish(figure, path, title, [], publishable)


def domain_montage(
    path: Path,
    title: str,
    slices: Sequence[tuple[np.ndarray, np.ndarray, str]],
    structures: Sequence[Structure],
    publishable: bool = True,
    columns: int = 6,
    volumes: Sequence[Sequence[float]] = (),
) -> Path:
    """Draw slices of one domain with label contours, their histograms, and structure volumes.

    Histograms have one line per slice, so that a case normalised unlike the others stands out.
    Pixels at the lower limit (air, padding) are excluded: they would dominate.

    Args:
        path: the file to write.
        title: of the figure, e.g. "phantom, domain ct".
        slices: image (H, W), label (H, W) and caption of each.
        structures: the classes.
        publishable: False stamps the figure as not for redistribution.
        columns: slices per row.
        volumes: ml of each structure in each case; empty omits the chart.

    Returns:
        The path.
    """
    columns = max(1, min(columns, len(slices)))
    count = -(-len(slices) // columns)
    figure = new_figure(max(1.75 * columns + 0.2, 6.0), 1.95 * count + 2.1)
    grid = figure.add_gridspec(count + 1, columns, height_ratios=[2.0] * count + [1.5])
    for index in range(count * columns):
        cell = figure.add_subplot(grid[index // columns, index % columns])
        if index >= len(slices):
            cell.axis("off")
            continue
        image, label, caption = slices[index]
        _gray(cell, image)
        _contours(cell, label, structures)
        cell.set_title(caption, fontsize=7.5, color=INK, pad=3)
    widths = (5, 3) if volumes else (1,)
    below = grid[count, :].subgridspec(1, len(widths), width_ratios=widths)
    chart = figure.add_subplot(below[0, 0])
    edges = np.linspace(-0.99, 1, 65)
    for image, _, _ in slices:
        counts, _ = np.histogram(image, edges)
        if counts.any():
            density = counts / counts.sum() / (edges[1] - edges[0])
            chart.plot((edges[1:] + edges[:-1]) / 2, density, color="#0072b2", lw=0.8, alpha=0.5)
    chart.set_xlim(-1, 1)
    chart.set_ylim(bottom=0)
    axis = "normalised intensity (lower limit excluded), one line per slice"
    chart.set_xlabel(axis, fontsize=8, color=INK)
    chart.set_ylabel("density", fontsize=8, color=INK)
    _unbox(chart)
    if volumes:
        _volumes(figure.add_subplot(below[0, 1]), volumes, structures)
    return _finish(figure, path, title, _keys(structures), publishable)


def _volumes(
    chart: Any, volumes: Sequence[Sequence[float]], structures: Sequence[Structure]
) -> None:
    """Draw one row of marks per structure, the first on top."""
    for row, (structure, ml) in enumerate(zip(structures, volumes, strict=True)):
        chart.plot(ml, [row] * len(ml), "|", color=structure.color, ms=9, mew=1.2)
    chart.set_yticks(range(len(structures)), [structure.name for structure in structures])
    chart.set_ylim(len(structures) - 0.5, -0.5)
    chart.set_xlim(left=0)
    chart.set_xlabel("volume (ml), one line per case", fontsize=8, color=INK)
    _unbox(chart)


# --- parts -----------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. It avoids pyplot, so it is safe in any thread."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, dpi: int = DPI, facecolor: str = "white") -> None:
    """Write a figure atomically; equal figures give equal files.

    Args:
        figure: the figure.
        path: PNG or SVG by its suffix.
        dpi: resolution of a PNG.
        facecolor: the background; "none" is transparent.

    Raises:
        RunFailure: the file cannot be written.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with replacing(path, "--out") as temporary, mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(
            temporary, format=path.suffix[1:], dpi=dpi, facecolor=facecolor, metadata=metadata
        )


def _finish(
    figure: Figure, path: Path, title: str, keys: Sequence[Line2D], publishable: bool
) -> Path:
    """Add title, legend and stamp, and write the file."""
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    if keys:
        longest = max(len(str(key.get_label())) for key in keys)
        fitting = int(figure.get_figwidth() / (0.066 * longest + 0.5))
        legend = figure.legend(
            handles=list(keys),
            loc="outside lower center",
            fontsize=8,
            frameon=False,
            ncols=max(1, min(len(keys), fitting)),
            labelcolor=INK,
            title=None if publishable else FOOTER,
            title_fontsize=7,
        )
        legend.get_title().set_color(WARNING)
    elif not publishable:
        figure.supxlabel(FOOTER, fontsize=7, color=WARNING)
    save(figure, path)
    return path


def _unbox(chart: Any) -> None:
    chart.tick_params(labelsize=7, colors=FAINT)
    chart.spines[["top", "right"]].set_visible(False)


def _gray(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _row_name(axes: Any, name: str) -> None:
    axes.set_ylabel(name, fontsize=9, color=INK, parse_math=False)


def _contours(
    axes: Any, label: np.ndarray, structures: Sequence[Structure], dashed: bool = False
) -> None:
    # Pad by one pixel, so that a structure at the border has a closed outline.
    framed = np.pad(label, 1)
    x = np.arange(-1, label.shape[1] + 1)
    y = np.arange(-1, label.shape[0] + 1)
    # Smaller structures are drawn last and lines lie slightly inside, so that both lines of
    # touching structures (a cavity and its wall) remain visible.
    sizes = {index: int((framed == index).sum()) for index in range(1, len(structures) + 1)}
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        if not sizes[index]:
            continue
        mask, structure = (framed == index).astype(float), structures[index - 1]
        if dashed:
            axes.contour(x, y, mask, [LEVEL], colors="white", linewidths=0.8, linestyles="--")
        else:
            # A dark edge keeps light colours visible on light images.
            axes.contour(x, y, mask, [LEVEL], colors="black", linewidths=1.9, alpha=0.35)
            axes.contour(x, y, mask, [LEVEL], colors=structure.color, linewidths=1.3)
    axes.set_xlim(-0.5, label.shape[1] - 0.5)
    axes.set_ylim(label.shape[0] - 0.5, -0.5)


def _keys(structures: Sequence[Structure]) -> list[Line2D]:
    return [Line2D([], [], color=s.color, lw=2.0, label=f"{s.name}  {s.title}") for s in structures]
