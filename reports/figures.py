"""Figures of runs and datasets: what a reader should look at before trusting a number.

Every function takes plain arrays and writes one file, atomically, PNG or SVG by its suffix. Images
are gray in [-1, 1], labels are class indices (class i + 1 is `structures[i]`), both with row 0 on
top. Colours of structures are the dataset's, the same in every figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
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
PAPER = "#ffffff"
INK = "#222222"
FAINT = "#6b6b6b"
WARNING = "#b00020"
LEVEL = 0.75  # of a mask of zeros and ones: a quarter of a pixel inside
SEQUENTIAL = "viridis"  # even in lightness, and readable without red-green vision


@dataclass(frozen=True)
class Panel:
    """One slice of one case, with what was predicted and what is right.

    Args:
        image: (H, W) in [-1, 1].
        reference: (H, W), class indices.
        prediction: (H, W), class indices.
        case: the case's id.
        dice: the case's mean Dice in [0, 1].
        note: why this case is shown, e.g. "worst".
        aspect: height of a pixel over its width.
    """

    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    case: str
    dice: float
    note: str = ""
    aspect: float = 1.0


def overlay_montage(
    path: Path,
    panels: Sequence[Panel],
    structures: Sequence[Structure],
    title: str = "",
    publishable: bool = True,
) -> Path:
    """Cases side by side: the image, the reference's contours, the prediction's contours.

    The prediction's row repeats the reference as a thin dashed line, so that a deviation shows
    where it is.

    Args:
        path: the PNG to write.
        panels: one column each.
        structures: the classes.
        title: of the whole figure.
        publishable: False stamps the figure as not for redistribution.

    Returns:
        The path.
    """
    columns = max(1, len(panels))
    figure = _figure(2.6 * columns + 0.5, 2.6 * 3 + 1.1)
    axes = figure.subplots(3, columns, squeeze=False)
    for row, name in enumerate(("image", "reference", "prediction")):
        _row_name(axes[row, 0], name)
    for column, panel in enumerate(panels):
        for row in range(3):
            _gray(axes[row, column], panel.image, panel.aspect)
        _contours(axes[1, column], panel.reference, structures)
        _contours(axes[2, column], panel.reference, structures, dashed=True)
        _contours(axes[2, column], panel.prediction, structures)
        heading = f"{panel.note}: {panel.case}" if panel.note else panel.case
        axes[0, column].set_title(f"{heading}\nmean Dice {panel.dice:.2f}", fontsize=9, color=INK)
    keys = [
        *_keys(structures),
        Line2D([], [], color=FAINT, lw=0.9, ls="--", label="reference (in the last row)"),
    ]
    return _save(figure, path, title, keys, publishable)


def parallel_map(
    path: Path,
    cases: Sequence[Panel],
    entries: Mapping[str, Sequence[Panel]],
    structures: Sequence[Structure],
    title: str = "",
    publishable: bool = True,
) -> Path:
    """The same slices for several entries: a row each, the reference on top.

    Args:
        path: the file to write.
        cases: one column each; their `reference` is drawn in the first row.
        entries: name → a panel for each case, with its `prediction` and `dice`.
        structures: the classes.
        title: of the whole figure.
        publishable: False stamps the figure as not for redistribution.

    Returns:
        The path.
    """
    columns = len(cases)
    figure = _figure(2.0 * columns + 1.6, 2.05 * (len(entries) + 1) + 0.9)
    axes = figure.subplots(len(entries) + 1, columns, squeeze=False)
    for column, case in enumerate(cases):
        _gray(axes[0, column], case.image, case.aspect)
        _contours(axes[0, column], case.reference, structures)
        axes[0, column].set_title(f"{case.note}\n{case.case}", fontsize=8.5, color=INK)
    _row_name(axes[0, 0], "reference")
    for row, (name, panels) in enumerate(entries.items(), start=1):
        for column, panel in enumerate(panels):
            cell = axes[row, column]
            _gray(cell, panel.image, panel.aspect)
            _contours(cell, panel.reference, structures, dashed=True)
            _contours(cell, panel.prediction, structures)
            cell.text(
                0.02,
                0.97,
                f"Dice {panel.dice:.2f}",
                transform=cell.transAxes,
                va="top",
                fontsize=7.5,
                color="white",
                bbox={"facecolor": "black", "alpha": 0.55, "lw": 0, "pad": 1.5},
            )
        _row_name(axes[row, 0], textwrap.fill(name, 20), parse_math=False)
    keys = [
        *_keys(structures),
        Line2D([], [], color=FAINT, lw=0.9, ls="--", label="reference"),
    ]
    return _save(figure, path, title, keys, publishable)


def picture_grid(
    path: Path,
    rows: Mapping[str, np.ndarray],
    title: str = "",
    publishable: bool = True,
    maps: Collection[str] = ("gain", "gap", "mask", "discrepancy", "weight"),
) -> Path:
    """Rows of pictures under each other: images in gray, maps over [0, 1] in colour.

    Args:
        path: the PNG to write.
        rows: name → (N, H, W); column n of every row belongs together. A map may be coarser
            than the images.
        title: of the whole figure.
        publishable: False stamps the figure as not for redistribution.
        maps: words that mark a row as a map when its name contains one of them.

    Returns:
        The path.

    Raises:
        ValueError: there is no row, or a row is not of shape (N, H, W).
    """
    pictures = {name: np.asarray(values, dtype=float) for name, values in rows.items()}
    if not pictures or any(values.ndim != 3 for values in pictures.values()):
        raise ValueError("rows must be arrays of shape (N, H, W), and at least one")
    columns = max(len(values) for values in pictures.values())
    figure = _figure(1.55 * columns + 1.2, 1.55 * len(pictures) + 0.8)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for row, (name, values) in enumerate(pictures.items()):
        is_map = any(word in name.lower() for word in maps)
        drawn = None
        for column in range(columns):
            cell = axes[row, column]
            if column >= len(values):
                cell.axis("off")
            elif is_map:
                drawn = _map(cell, values[column])
            else:
                _gray(cell, values[column])
        _row_name(axes[row, 0], name.replace("_", " "))
        if drawn is not None:
            _bar(figure, drawn, list(axes[row]))
    return _save(figure, path, title, [], publishable)


def restyle_grid(
    path: Path,
    source: np.ndarray,
    restyled: np.ndarray,
    target: np.ndarray,
    title: str = "Source images, the same restyled, and target images (unpaired)",
    publishable: bool = True,
) -> Path:
    """Restyled images between the source images that they keep and the target that they imitate.

    Args:
        path: the PNG to write.
        source: (N, H, W) in [-1, 1].
        restyled: (N, H, W), image n from source n.
        target: (N, H, W); no image belongs to a source image.
        title: of the whole figure.
        publishable: False stamps the figure as not for redistribution.

    Returns:
        The path.
    """
    rows = {"source": source, "restyled": restyled, "target": target}
    return picture_grid(path, rows, title, publishable)


def domain_montage(
    path: Path,
    title: str,
    slices: Sequence[tuple[np.ndarray, np.ndarray, str]],
    structures: Sequence[Structure],
    publishable: bool = True,
    columns: int = 6,
    volumes: Sequence[Sequence[float]] = (),
) -> Path:
    """Slices of one domain with label contours, its intensities, and the volumes of structures.

    The histogram has one line per slice, so that a case that is normalised unlike the others
    stands out. Pixels at the lower limit (air, padding) are left out: they would hide the rest.

    Args:
        path: the PNG to write.
        title: of the whole figure, e.g. "phantom, domain ct".
        slices: image (H, W), label (H, W) and caption of each.
        structures: the classes.
        publishable: False stamps the figure as not for redistribution.
        columns: slices in a row.
        volumes: ml of each structure in each case, one dot each; none draws no such chart.

    Returns:
        The path.
    """
    columns = max(1, min(columns, len(slices)))
    count = -(-len(slices) // columns)
    width = max(1.75 * columns + 0.2, 6.0)
    figure = _figure(width, 1.95 * count + 2.1)
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
    below = grid[count, :].subgridspec(
        1, 2 if volumes else 1, width_ratios=(5, 3)[: 1 + bool(volumes)]
    )
    chart = figure.add_subplot(below[0, 0])
    edges = np.linspace(-0.99, 1, 65)
    for image, _, _ in slices:
        counts, _ = np.histogram(image, edges)
        if counts.any():
            density = counts / counts.sum() / (edges[1] - edges[0])
            chart.plot((edges[1:] + edges[:-1]) / 2, density, color="#0072b2", lw=0.8, alpha=0.5)
    chart.set_xlim(-1, 1)
    chart.set_ylim(bottom=0)
    chart.set_xlabel(
        "intensity after normalisation (without the lower limit), one line per slice",
        fontsize=8,
        color=INK,
    )
    chart.set_ylabel("density", fontsize=8, color=INK)
    _plain(chart)
    if volumes:
        _volumes(figure.add_subplot(below[0, 1]), volumes, structures)
    return _save(figure, path, title, _keys(structures), publishable)


def _volumes(
    chart: Any, volumes: Sequence[Sequence[float]], structures: Sequence[Structure]
) -> None:
    """A row of dots for each structure, the first on top."""
    for row, (structure, ml) in enumerate(zip(structures, volumes, strict=True)):
        chart.plot(ml, [row] * len(ml), "|", color=structure.color, ms=9, mew=1.2)
    chart.set_yticks(range(len(structures)), [structure.name for structure in structures])
    chart.set_ylim(len(structures) - 0.5, -0.5)
    chart.set_xlim(left=0)
    chart.set_xlabel("volume in ml, one line per case", fontsize=8, color=INK)
    _plain(chart)


def _plain(chart: Any) -> None:
    """Axes without a box."""
    chart.tick_params(labelsize=7, colors=FAINT)
    for side in ("top", "right"):
        chart.spines[side].set_visible(False)


# --- parts -----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    # Not through pyplot: no global state, no window system, safe in any thread.
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(
    figure: Figure, path: Path, title: str, keys: Sequence[Line2D], publishable: bool
) -> Path:
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
    with replacing(Path(path), "--out") as temporary:
        vector = Path(path).suffix == ".svg"
        # Without a date and with fixed names inside, the same drawing is the same file.
        with mpl.rc_context({"svg.hashsalt": "glua-bench"}):
            figure.savefig(
                temporary,
                format="svg" if vector else "png",
                metadata={"Date": None} if vector else None,
            )
    return Path(path)


def _gray(axes: Any, image: np.ndarray, aspect: float = 1.0) -> None:
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1, aspect=aspect, interpolation="nearest")
    _bare(axes)


def _map(axes: Any, values: np.ndarray) -> Any:
    height, width = values.shape
    drawn = axes.imshow(
        values,
        cmap=SEQUENTIAL,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    _bare(axes)
    return drawn


def _bar(figure: Figure, drawn: Any, axes: list[Any]) -> None:
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.01, ticks=[0, 0.5, 1])
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    bar.outline.set_visible(False)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _row_name(axes: Any, name: str, **options: Any) -> None:
    axes.set_ylabel(name, fontsize=9, color=INK, **options)


def _contours(
    axes: Any, label: np.ndarray, structures: Sequence[Structure], dashed: bool = False
) -> None:
    # One pixel of frame, so that a structure at the border has a closed outline.
    framed = np.pad(label, 1)
    x = np.arange(-1, label.shape[1] + 1)
    y = np.arange(-1, label.shape[0] + 1)
    # The smaller last and every line a little inside its structure: where a cavity touches its
    # wall both lines remain visible.
    sizes = {index: int((framed == index).sum()) for index in range(1, len(structures) + 1)}
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        if not sizes[index]:
            continue
        mask, structure = (framed == index).astype(float), structures[index - 1]
        if dashed:
            axes.contour(x, y, mask, [LEVEL], colors="white", linewidths=0.8, linestyles="--")
        else:
            # A dark edge keeps a light colour visible on a light image.
            axes.contour(x, y, mask, [LEVEL], colors="black", linewidths=1.9, alpha=0.35)
            axes.contour(x, y, mask, [LEVEL], colors=structure.color, linewidths=1.3)
    axes.set_xlim(-0.5, label.shape[1] - 0.5)
    axes.set_ylim(label.shape[0] - 0.5, -0.5)


def _keys(structures: Sequence[Structure]) -> list[Line2D]:
    return [Line2D([], [], color=s.color, lw=2.0, label=f"{s.name}  {s.title}") for s in structures]
