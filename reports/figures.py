"""Figures of images and labels, of runs and of datasets.

Every function takes plain arrays and writes a PNG, and beside it the same figure as SVG and PDF.
Images are gray in [-1, 1]; labels are class indices (class i + 1 is `structures[i]`); row 0 is on
top in both. A structure has the dataset's colour in every figure. A `Frame` adds a scale bar and
the letters of the patient's sides to a slice.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from glua_bench.data.resampling import Placement
from glua_bench.errors import shortened
from glua_bench.files import replacing
from glua_bench.task import Reading, Structure

DPI = 130
FOOTER = "not for redistribution"
INK = "#222222"
FAINT = "#6b6b6b"
WARNING = "#b00020"
LEVEL = 0.75  # contour level of a 0/1 mask: a quarter of a pixel inside
COLOUR_MAP = "viridis"  # perceptually uniform, readable with colour blindness
FORMATS = (".png", ".svg", ".pdf")
SIDES = ("LR", "PA", "IS")  # names of the ends of the world's axes (RAS+)
OBLIQUE = 0.5  # cosine from which a second letter is shown, as in "LA"
BOX = {"fc": "black", "alpha": 0.55, "lw": 0, "pad": 1}
LABEL: dict[str, Any] = {"color": "white", "bbox": BOX}
# Words in the names of maps over [0, 1]; `d` is the score of a discriminator.
MAPS = {"gain", "gap", "mask", "discrepancy", "disagreement", "weight", "entropy", "confidence"}
MAPS |= {"saliency", "probability", "d"}


@dataclass(frozen=True)
class Frame:
    """Size and orientation of drawn slices.

    Attributes:
        width: mm across a slice.
        sides: letters of the patient's sides (R, L, A, P, S, I) at the top, right, bottom and left
            edge; "" where unknown.
    """

    width: float
    sides: tuple[str, str, str, str] = ("", "", "", "")

    @classmethod
    def of(cls, placement: Placement, reading: Reading, oriented: bool = True) -> Frame:
        """Return the frame of an image on the working grid.

        Letters come from the affine of the file. They are omitted if it states no orientation, or
        if the dataset's reading ignores it ("stored").

        Args:
            placement: of the image.
            reading: of its domain.
            oriented: False if the file's header states no orientation.
        """
        width = placement.grid_spacing[2] * placement.shape[2]
        if not oriented or reading.orientation != "canonical":
            return cls(width)
        affine = np.asarray(placement.affine)[:3, :3]
        down, right = (
            affine[:, placement.axes[axis]] * (-1 if placement.flips[axis] else 1)
            for axis in (1, 2)
        )
        return cls(width, (_side(-down), _side(right), _side(down), _side(-right)))


def _side(direction: np.ndarray) -> str:
    """Return the letter of a direction in RAS+; two letters if it is far from an axis."""
    cosines = direction / np.linalg.norm(direction)
    axes = [int(axis) for axis in np.argsort(-np.abs(cosines)) if abs(cosines[axis]) >= OBLIQUE]
    return "".join(SIDES[axis][int(cosines[axis] > 0)] for axis in axes[:2])


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
        frame: size and orientation of the slice.
    """

    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, np.ndarray]
    dice: Mapping[str, float]
    case: str
    note: str = ""
    frame: Frame | None = None


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
        path: the PNG to write; SVG and PDF are written beside it.
        panels: one column each; all with the same entries.
        structures: the classes.
        title: of the figure.
        publishable: False stamps the figure as not for redistribution.

    Returns:
        The path.
    """
    entries = list(panels[0].predictions)
    names = ["image", "reference", *entries]
    figure = new_figure(2.2 * len(panels) + 1.2, 2.2 * len(names) + 1.5)
    axes = figure.subplots(len(names), len(panels), squeeze=False)
    for row, name in enumerate(names):
        _row_name(axes[row, 0], textwrap.fill(shortened(name, 72), 20))
    for column, panel in enumerate(panels):
        for cell in axes[:, column]:
            _gray(cell, panel.image)
            _mark(cell, panel.frame)
        heading = f"{panel.note}: {panel.case}" if panel.note else panel.case
        axes[0, column].set_title(textwrap.fill(heading, 30), fontsize=9, color=INK)
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
                **LABEL,
            )
    dashed = Line2D([], [], color=FAINT, lw=0.9, ls="--", label="reference (dashed)")
    return _finish(figure, path, title, [*_keys(structures), dashed], publishable)


def strip(
    path: Path,
    rows: Mapping[str, np.ndarray],
    title: str = "",
    publishable: bool = True,
    frames: Mapping[str, Frame] | None = None,
    gap: pd.DataFrame | None = None,
) -> Path:
    """Draw rows of pictures: images in gray, maps over [0, 1] (named by `MAPS`) in colour.

    Args:
        path: the PNG to write; SVG and PDF are written beside it.
        rows: name → (N, H, W); column n of every row belongs together. Maps may be coarser than
            the images.
        title: of the figure.
        publishable: False stamps the figure as not for redistribution.
        frames: name → size and orientation of the pictures in a row.
        gap: mean score of a domain discriminator on the source and the target ("source",
            "target"), by step, drawn below the pictures; None omits it.

    Returns:
        The path.

    Raises:
        ValueError: `rows` is empty, or a row has not the shape (N, H, W).
    """
    pictures = {name: np.asarray(values, dtype=float) for name, values in rows.items()}
    if not pictures or any(values.ndim != 3 for values in pictures.values()):
        raise ValueError("rows must be arrays of shape (N, H, W), and at least one")
    columns = max(len(values) for values in pictures.values())
    below = 0 if gap is None else 1
    figure = new_figure(1.55 * columns + 1.2, 1.55 * (len(pictures) + below) + 0.8)
    layout = figure.add_gridspec(len(pictures) + below, columns)
    axes = [
        [figure.add_subplot(layout[y, x]) for x in range(columns)] for y in range(len(pictures))
    ]
    for row, (name, values) in zip(axes, pictures.items(), strict=True):
        _row_name(row[0], textwrap.fill(shortened(name.replace("_", " "), 40), 20))
        for cell in row[len(values) :]:
            cell.axis("off")
        # Whole words: "source again" and "masked" are images.
        mapped = not MAPS.isdisjoint(re.findall(r"[a-z]+", name.lower()))
        for cell, picture in zip(row, values, strict=False):
            if mapped:
                drawn = cell.imshow(picture, cmap=COLOUR_MAP, vmin=0, vmax=1, interpolation="none")
                _bare(cell)
            else:
                _gray(cell, picture)
            _mark(cell, (frames or {}).get(name))
        if mapped and len(values):
            bar = figure.colorbar(drawn, ax=row, fraction=0.05, pad=0.01, ticks=[0, 0.5, 1])
            bar.ax.tick_params(labelsize=7, colors=FAINT)
            bar.outline.set_visible(False)
    if gap is not None:
        _gap(figure.add_subplot(layout[-1, :]), gap)
    return _finish(figure, path, title, [], publishable)


def _gap(chart: Any, gap: pd.DataFrame) -> None:
    """Draw the mean score of a discriminator on both domains over training."""
    chart.axhline(0.5, color=FAINT, lw=0.8, ls=":", label="chance")
    chart.fill_between(gap.index, gap["source"], gap["target"], color="#0072b2", alpha=0.12, lw=0)
    for name, colour, style in (("source", "#0072b2", "-"), ("target", "#d55e00", "--")):
        chart.plot(gap.index, gap[name], color=colour, ls=style, lw=1.2, label=name)
    chart.set_xlim(gap.index.min(), max(gap.index.max(), gap.index.min() + 1))
    chart.set_xlabel("update", fontsize=8, color=INK)
    chart.set_ylabel(textwrap.fill("score of the domain discriminator", 18), fontsize=8, color=INK)
    above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3}
    chart.legend(fontsize=7, frameon=False, borderaxespad=0, **above)
    _unbox(chart)


def domain_montage(
    path: Path,
    title: str,
    slices: Sequence[tuple[np.ndarray, np.ndarray, str, Frame | None]],
    structures: Sequence[Structure],
    publishable: bool = True,
    columns: int = 6,
    volumes: Sequence[Sequence[float]] = (),
) -> Path:
    """Draw slices of one domain with label contours, their histograms, and structure volumes.

    Histograms have one line per slice, so that a case normalised unlike the others stands out.
    Pixels at the lower limit (air, padding) are excluded: they would dominate.

    Args:
        path: the PNG to write; SVG and PDF are written beside it.
        title: of the figure, e.g. "phantom, domain ct".
        slices: image (H, W), label (H, W), caption and frame of each.
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
        image, label, caption, frame = slices[index]
        _gray(cell, image)
        _mark(cell, frame)
        _contours(cell, label, structures)
        cell.set_title(textwrap.fill(caption, 28), fontsize=7.5, color=INK, pad=3)
    widths = (5, 3) if volumes else (1,)
    below = grid[count, :].subgridspec(1, len(widths), width_ratios=widths)
    chart = figure.add_subplot(below[0, 0])
    edges = np.linspace(-0.99, 1, 65)
    for image, _, _, _ in slices:
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
    chart.ticklabel_format(axis="x", style="plain", useOffset=False)
    chart.locator_params(axis="x", nbins=4)
    chart.set_xlabel("volume (ml), one line per case", fontsize=8, color=INK)
    _unbox(chart)


# --- parts -----------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. It avoids pyplot, so it is safe in any thread."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, dpi: int = DPI, svg: str = "white") -> list[Path]:
    """Write a figure as PNG, SVG and PDF, each atomically; equal figures give equal files.

    SVG and PDF are vector graphics with text as text.

    Args:
        figure: the figure.
        path: the PNG; the others differ in the suffix.
        dpi: resolution of the PNG.
        svg: background of the SVG; "none" is transparent.

    Returns:
        The files, in the order of `FORMATS`.

    Raises:
        RunFailure: a file cannot be written.
    """
    # Dates would make equal figures differ.
    metadata: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    style: dict[Any, Any] = {"svg.hashsalt": path.name, "svg.fonttype": "none", "pdf.fonttype": 42}
    style["text.parse_math"] = False  # "$" in a name is a dollar sign
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    written = [path.with_suffix(suffix) for suffix in FORMATS]
    # The constrained layout is solved once. Otherwise each format solves it twice, which takes
    # longer than drawing.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for file in written:
        face = svg if file.suffix == ".svg" else "white"
        with replacing(file, "--out") as temporary, mpl.rc_context(style):
            figure.savefig(
                temporary,
                format=file.suffix[1:],
                dpi=dpi,
                facecolor=face,
                metadata=metadata.get(file.suffix),
            )
    return written


def legend_below(figure: Figure, keys: Sequence[Any], size: float = 8.0, **more: Any) -> Any:
    """Add a legend below the panels, with as many columns as fit into the figure's width."""
    width, letter = figure.get_figwidth(), 0.00825 * size
    for key in keys:
        key.set_label(shortened(str(key.get_label()), max(8, int((width - 0.7) / letter))))
    longest = max(len(str(key.get_label())) for key in keys)
    fitting = int(width / (letter * longest + 0.5))
    columns = max(1, min(len(keys), fitting))
    look: dict[str, Any] = {"fontsize": size, "frameon": False, "labelcolor": INK, "ncols": columns}
    return figure.legend(handles=list(keys), loc="outside lower center", **look, **more)


def _finish(
    figure: Figure, path: Path, title: str, keys: Sequence[Line2D], publishable: bool
) -> Path:
    """Add title, legend and stamp, and write the file."""
    if title:
        letters = int(figure.get_figwidth() / 0.1)
        figure.suptitle(textwrap.fill(title, letters), fontsize=11, color=INK)
    if keys:
        stamp = None if publishable else FOOTER
        legend = legend_below(figure, keys, title=stamp, title_fontsize=7)
        legend.get_title().set_color(WARNING)
    elif not publishable:
        figure.supxlabel(FOOTER, fontsize=7, color=WARNING)
    save(figure, path)
    return path


def _unbox(chart: Any) -> None:
    chart.tick_params(labelsize=7, colors=FAINT)
    chart.spines[["top", "right"]].set_visible(False)


def _gray(axes: Any, image: np.ndarray) -> None:
    # Files of vector graphics hold the pixels as they are; the viewer does not blur them.
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="none")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _mark(axes: Any, frame: Frame | None) -> None:
    """Add a scale bar and the letters of the patient's sides to a slice."""
    if frame is None:
        return
    power = 10.0 ** math.floor(math.log10(0.3 * frame.width))
    length = next(n * power for n in (5, 2, 1) if n * power <= 0.3 * frame.width)
    place: dict[str, Any] = {"transform": axes.transAxes, "zorder": 6}
    ends = [0.04, 0.04 + length / frame.width]
    for width, colour in ((3.2, "black"), (1.8, "white")):
        look: dict[str, Any] = {"lw": width, "color": colour, "solid_capstyle": "butt"}
        axes.plot(ends, [0.04, 0.04], scalex=False, scaley=False, **look, **place)
    text: dict[str, Any] = {"fontsize": 5.5, **LABEL, **place}
    axes.text(0.04, 0.075, f"{length:g} mm", ha="left", va="bottom", **text)
    for letters, (x, y), (ha, va) in zip(
        frame.sides,
        ((0.5, 0.98), (0.98, 0.5), (0.5, 0.02), (0.02, 0.5)),
        (("center", "top"), ("right", "center"), ("center", "bottom"), ("left", "center")),
        strict=True,
    ):
        if letters:
            axes.text(x, y, letters, ha=ha, va=va, **text)


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
    def text(structure: Structure) -> str:
        same = structure.name.lower() == structure.title.lower()
        return structure.name if same else f"{structure.name}  {structure.title}"

    return [Line2D([], [], color=s.color, lw=2.0, label=text(s)) for s in structures]
