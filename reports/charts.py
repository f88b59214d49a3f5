"""Charts of comparisons.

Every function returns one matplotlib figure, which `files` writes. An entry has the same colour and
marker in all charts of a report; bounds are gray. Colours are those of Okabe and Ito, which are
distinguishable with colour blindness. Texts of a chart do not overlap, whatever the names and
values: panels grow with the names, longer names are shortened, and tick labels without room are
omitted (`settle`).
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from matplotlib.transforms import Bbox

from glua_bench.config import LOWER, ORACLE, UPPER
from glua_bench.reports.comparison import title
from glua_bench.reports.figures import COLOUR_MAP, FAINT, INK, legend_below, new_figure, save
from glua_bench.scoring.metrics import PRIMARY

LINE = "#d9d9d9"
BOUND = "#8c8c8c"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9467bd")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 2)))
MAX_VECTOR_POINTS = 4000  # more points are rasterized inside the SVG
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # "$" in a name is a dollar sign
}
DPI = 150
LETTER = 0.075  # inches per letter of 9 points
LONGEST = 40  # letters of a name
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a drawing function to use the style of reports, without a global effect."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            figure = draw(*args, **options)
            settle(figure)
            return figure

    return drawn


def settle(figure: Figure) -> None:
    """Omit every second tick label of an axis until its labels do not overlap."""
    for _ in range(6):
        figure.draw_without_rendering()
        axes = [a for a in figure.axes if a.get_visible()]
        crowded = [axis for a in axes for axis in (a.xaxis, a.yaxis) if _crowded(axis)]
        for axis in crowded:
            ticks = _labelled(axis)
            shown, texts = ticks[::2], [tick.label1.get_text() for tick in ticks[::2]]
            axis.set_major_locator(FixedLocator([float(tick.get_loc()) for tick in shown]))
            axis.set_ticklabels(texts)
        if not crowded:
            return


def _labelled(axis: Any) -> list[Any]:
    """Return the ticks of an axis that lie within its limits and have a label."""
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    return [
        tick
        for tick in axis.get_major_ticks()
        if low - margin <= tick.get_loc() <= high + margin and _has_text(tick.label1)
    ]


def _has_text(text: Any) -> bool:
    return bool(text.get_visible() and text.get_text().strip())


def _crowded(axis: Any) -> bool:
    """Return True if two neighbouring tick labels overlap or touch."""
    ticks = _labelled(axis)
    if len(ticks) < 2:
        return False
    if axis.axis_name == "x" and ticks[0].label1.get_rotation():
        # Turned labels are as wide as their line is high.
        width, scale = axis.axes.bbox.width, axis.axes.figure.dpi / 72
        locs = sorted(float(tick.get_loc()) for tick in ticks)
        low, high = axis.get_view_interval()
        step = min(b - a for a, b in zip(locs, locs[1:], strict=False)) / abs(high - low) * width
        return bool(step < 1.25 * scale * ticks[0].label1.get_fontsize())
    found = [tick.label1.get_window_extent() for tick in ticks]
    boxes = sorted(found, key=lambda box: box.x0 if axis.axis_name == "x" else box.y0)
    gap = 7 if axis.axis_name == "x" else 0
    return any(
        Bbox([[a.x0, a.y0], [a.x1 + gap, a.y1]]).overlaps(b)
        for a, b in zip(boxes, boxes[1:], strict=False)
    )


def files(figure: Figure, stem: Path) -> list[Path]:
    """Write a chart as PNG (white), SVG (transparent) and PDF, and return the paths.

    Args:
        figure: the chart.
        stem: path of the files without suffix.

    Raises:
        RunFailure: a file cannot be written.
    """
    with mpl.rc_context(STYLE):
        return save(figure, stem.with_name(f"{stem.name}.png"), DPI, "none")


def on(colour: Any) -> str:
    """Return black or white, whichever contrasts more with a colour (at least 4.5 : 1).

    Contrast is that of WCAG 2. The values differ from pure black and white, so that the page does
    not take them for its own colours.
    """
    red, green, blue = (
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)
    )
    return "#010101" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fefefe"


class Palette:
    """Colours and markers of entries, the same in every chart.

    Args:
        entries: all entries of the report.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        others = sorted(set(entries) - {LOWER, UPPER})
        self._looks: dict[str, tuple[str, str]] = {}
        for i, entry in enumerate(others):
            turn = i + i // len(COLOURS)  # a repeated colour gets another marker
            self._looks[entry] = COLOURS[i % len(COLOURS)], MARKERS[turn % len(MARKERS)]
        self._looks[LOWER], self._looks[UPPER] = (BOUND, "o"), (BOUND, "*")

    def look(self, entry: str) -> tuple[str, str]:
        """Return the colour and the marker of an entry."""
        return self._looks[entry]

    def colour(self, entry: str) -> str:
        """Return the colour of an entry."""
        return self._looks[entry][0]


def new_axes(figure: Figure, rows: int = 1, columns: int = 1, **options: Any) -> np.ndarray:
    """Add panels to a figure and return them as an array of rows × columns."""
    found: np.ndarray = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in found.flat:
        axes.patch.set_alpha(0)
    return found


def colour_bar(figure: Figure, drawn: Any, axes: Any, label: str, **options: Any) -> None:
    """Add a colour bar without outline."""
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01, **options)
    bar.set_label(label, color=INK)
    bar.outline.set_visible(False)


def log_axis(axes: Any, along: str = "x") -> None:
    """Make an axis ("x" or "y") logarithmic, with plain numbers as tick labels.

    Call it after the data are drawn: ticks depend on how far they reach.
    """
    axes.set(**{f"{along}scale": "log"})
    axis = axes.xaxis if along == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if along == "x" else axes.get_ylim())
    if high / low > 300:
        axis.set_major_locator(LogLocator(numticks=8))
    elif high / low > 3:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _strip(
    axes: Any, part: pd.DataFrame, x: str, y: str, order: Sequence[str], **look: Any
) -> None:
    """Draw a row of dots per category, with a bar at the mean."""
    sns.stripplot(
        part,
        x=x,
        y=y,
        order=list(order),
        size=3.2,
        jitter=0.22,
        ax=axes,
        rasterized=len(part) > MAX_VECTOR_POINTS,
        **look,
    )
    mean = part.groupby(y)[x].mean().reindex(order)
    axes.plot(mean, range(len(order)), "|", color=INK, ms=11, mew=1.6, zorder=5)
    axes.set_ylabel("")
    axes.grid(axis="x", color=LINE)


def _span(axes: Any, y: int, ends: Sequence[float], value: float, look: tuple[str, str]) -> None:
    """Draw a horizontal interval with a marker at its value."""
    colour, marker = look
    axes.plot(ends, [y, y], color=colour, lw=2)
    axes.plot(value, y, marker, color=colour, ms=6)


def _task_panels(figure: Figure, tasks: Sequence[str], sharey: bool = True) -> Any:
    """Return pairs of a titled panel and its task."""
    grid = new_axes(figure, 1, len(tasks), sharey=sharey)[0]
    for axes, task in zip(grid, tasks, strict=True):
        axes.set_title(wrapped(task, figure.get_figwidth() / len(tasks)))
    return zip(grid, tasks, strict=True)


def _names(axes: Any, entries: Sequence[str]) -> None:
    axes.set_yticks(range(len(entries)), [_short(entry) for entry in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _short(entry: str, most: int = LONGEST) -> str:
    return middle_shortened(title(entry), most)


def middle_shortened(text: str, most: int = LONGEST) -> str:
    """Shorten a name in its middle, since names often differ in their last letters only."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def wrapped(text: str, inches: float, size: float = 10.0) -> str:
    """Break a title into lines that fit into a width."""
    letters = max(8, int(inches / (LETTER * size / 9)) - 5)
    return textwrap.fill(middle_shortened(str(text), 4 * letters), letters)


def _beside(entries: Sequence[str]) -> float:
    """Return the inches that the names of entries take beside a panel."""
    return 0.3 + LETTER * max((len(_short(entry)) for entry in entries), default=0)


def line_of(seeds: int) -> str:
    """Return what a line through the runs of a number of seeds shows."""
    return "mean over seeds" if seeds > 1 else "one seed"


@styled
def scores(rows: pd.DataFrame, entries: Sequence[str], palette: Palette) -> Figure:
    """Draw Dice of every case and seed, for each structure and for the mean over structures.

    Args:
        rows: of one task and selector.
        entries: from top to bottom.
        palette: colours and markers.
    """
    structures = [str(name) for name in rows["structure"].unique()]
    keys = ["entry", "seed", "case"]
    own = rows[[*keys, "structure", PRIMARY.name]].copy()
    own["panel"] = own.pop("structure").astype(str)
    mean = own.groupby(keys, observed=True)[PRIMARY.name].mean().reset_index().assign(panel="mean")
    points = pd.concat([own, mean], ignore_index=True)
    points["entry"] = points["entry"].astype(str)
    panels = [*structures, "mean"]
    figure = new_figure(_beside(entries) + 1.75 * len(panels), 1.1 + 0.3 * len(entries))
    grid = new_axes(figure, 1, len(panels), sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        part = points[points["panel"] == panel]
        colours = {entry: palette.colour(entry) for entry in entries}
        look: dict[str, Any] = {"hue": "entry", "hue_order": list(entries), "palette": colours}
        _strip(axes, part, PRIMARY.name, "entry", entries, alpha=0.55, legend=False, **look)
        axes.set_title(wrapped(panel, 1.75))
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_xlabel("")
        _names(axes, entries)
    several = rows["seed"].nunique() > 1
    figure.supxlabel(f"Dice (dots: cases{' and seeds' * several}, bar: mean)", fontsize=9)
    return figure


@styled
def gaps(lines: pd.DataFrame, palette: Palette) -> Figure:
    """Draw the gap recovered by each entry: mean, minimum and maximum over seeds.

    Args:
        lines: from `comparison.table`; tasks without a gap have no panel.
        palette: colours and markers.
    """
    known = lines["gap recovered"].dropna()
    tasks = list(dict.fromkeys(known.index.get_level_values("task")))
    order = lines["gap recovered"].groupby("entry", observed=True).mean().dropna().sort_values()
    entries = [str(e) for e in order.index if e not in (LOWER, UPPER)]
    figure = new_figure(_beside(entries) + 3.0 * len(tasks), 1.4 + 0.3 * len(entries))
    for axes, task in _task_panels(figure, tasks):
        part = lines.loc[task]
        for y, entry in enumerate(entries):
            if entry not in part.index or math.isnan(part.loc[entry, "gap recovered"]):
                continue
            row = 100 * part.loc[entry, ["gap recovered", "gap min", "gap max"]]
            _span(axes, y, row[["gap min", "gap max"]], row["gap recovered"], palette.look(entry))
        for x, style in ((0, "--"), (100, ":")):
            axes.axvline(x, color=BOUND, lw=1, ls=style, zorder=0)
        axes.grid(axis="x", color=LINE)
        _names(axes, entries)
    several = bool((lines["gap seeds"] > 1).any())
    what = "gap recovered (%)" + ", mean and range over seeds" * several
    bounds = f"dashed: {LOWER}, dotted: {title(UPPER)}"
    figure.supxlabel(f"{what}\n{bounds}", fontsize=9)
    return figure


@styled
def cost_quality(lines: pd.DataFrame, palette: Palette) -> Figure:
    """Draw Dice over training time; the area of a marker grows with memory.

    Args:
        lines: from `comparison.table`, of all tasks.
        palette: colours and markers.
    """
    tasks = list(dict.fromkeys(lines.index.get_level_values("task")))
    most = int(lines.groupby(level="task").size().max())
    figure = new_figure(1.0 + 4.6 * len(tasks), max(3.6, 1.2 + 0.2 * most))
    largest = float(lines["peak MiB"].max())
    points: dict[Any, list[tuple[str, float, float]]] = {}
    for axes, task in _task_panels(figure, tasks):
        shown = lines.loc[task].dropna(subset=["training s", PRIMARY.label])
        for entry, row in shown.iterrows():
            x, y = float(row["training s"]), float(row[PRIMARY.label])
            memory = row["peak MiB"] if row["peak MiB"] > 0 else 0.0
            size = 30 + (150 * memory / largest if largest > 0 else 0)
            colour, marker = palette.look(str(entry))
            axes.scatter(x, y, s=size, color=colour, marker=marker, alpha=0.85, linewidths=0)
            points.setdefault(axes, []).append((_short(str(entry), 28), x, y))
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.15)
        low, high = axes.get_xlim()
        if high / low < 4:  # one entry, or equal times
            middle = math.sqrt(low * high)
            axes.set_xlim(middle / 2, middle * 2)
        log_axis(axes)
        axes.set_xlabel("training time (s)")
        axes.grid(color=LINE)
    figure.axes[0].set_ylabel(PRIMARY.title)
    settle(figure)
    for axes, named in points.items():
        label_points(axes, named)
    return figure


def label_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write names beside their points, each as near as it fits; a line leads to distant ones."""
    scale = axes.figure.dpi / 72
    inside = axes.get_window_extent()
    at = axes.transData.transform([(x, y) for _, x, y in points])
    radius = 7 * scale
    taken = [Bbox.from_extents(*(p - radius * 0.8), *(p + radius * 0.8)) for p in at]
    # Around the point first, then farther away in all directions.
    turns = [0.0, 180.0, 90.0, 270.0, *range(15, 360, 15)]
    around = [(r, math.radians(t)) for r in range(10, 420, 6) for t in turns]
    for (name, x, y), centre in zip(points, at, strict=True):
        label = axes.annotate(
            name,
            (x, y),
            textcoords="offset points",
            xytext=(0, 0),
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
            in_layout=False,
        )
        size = label.get_window_extent()
        half = np.array([size.width, size.height]) / 2 + scale
        for distance, turn in around:
            way = np.array([math.cos(turn), math.sin(turn)])
            # The label's edge, not its middle, is at this distance.
            middle = centre + way * (distance * scale + half * np.abs(way))
            box = Bbox.from_extents(*(middle - half), *(middle + half))
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1
            within &= inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                label.xyann = tuple((middle - centre) / scale)
                if distance > 16:
                    end = axes.transData.inverted().transform(
                        middle - way * half * np.abs(way) * 0.9
                    )
                    line = {"color": FAINT, "lw": 0.5, "zorder": 1}
                    axes.plot([x, end[0]], [y, end[1]], scalex=False, scaley=False, **line)
                break
        else:
            label.set_visible(False)


@styled
def learning(
    checkpoints: pd.DataFrame, chosen: pd.DataFrame, entries: Sequence[str], palette: Palette
) -> Figure:
    """Draw source-validation Dice over training, and the checkpoint chosen by each selector.

    Target Dice is drawn if the oracle's scores are given, and marked privileged.

    Args:
        checkpoints: entry, seed, selector, step, score; of one task.
        chosen: entry, seed, selector, step; the chosen checkpoints.
        entries: one panel each.
        palette: colours and markers.
    """
    columns = min(4, len(entries))
    rows = -(-len(entries) // columns)
    selectors = [str(s) for s in chosen["selector"].unique() if s != ORACLE]
    names = [middle_shortened(name, 24) for name in selectors]
    width = 0.8 + 0.055 * max(map(len, names), default=0) + 2.5 * columns
    figure = new_figure(max(4.5, width), rows * (1.5 + 0.14 * len(selectors)) + 0.9)
    outer = figure.add_gridspec(rows, columns)
    own = checkpoints.astype({"entry": str, "selector": str})
    chosen = chosen.astype({"entry": str, "selector": str})
    steps = sorted(own["step"].unique())
    for index, entry in enumerate(entries):
        cell = outer[index // columns, index % columns].subgridspec(
            2, 1, height_ratios=[1.3, 0.14 * max(1, len(selectors))], hspace=0.03
        )
        top = figure.add_subplot(cell[0])
        low = figure.add_subplot(cell[1], sharex=top)
        part = own[own["entry"] == entry]
        for selector, style in (("source_val", "-"), (ORACLE, ":")):
            for _, line in part[part["selector"] == selector].groupby("seed"):
                line = line.sort_values("step")
                look: dict[str, Any] = {"color": palette.colour(entry), "lw": 1.2, "alpha": 0.9}
                top.plot(line["step"], line["score"], style, **look)
        top.set_title(wrapped(title(entry), 2.5, 8), fontsize=8)
        top.set_ylim(-0.03, 1.03)
        top.set_yticks([0, 0.5, 1])
        top.tick_params(axis="x", labelbottom=False, length=0)
        top.grid(axis="y", color=LINE)
        picks = chosen[chosen["entry"] == entry]
        seeds = max(1, picks["seed"].nunique())
        for y, selector in enumerate(selectors):
            counts = picks[picks["selector"] == selector].groupby("step").size()
            low.scatter(
                counts.index,
                [y] * len(counts),
                s=[26 * count / seeds for count in counts],
                color=palette.colour(entry),
                linewidths=0,
            )
        low.set_ylim(len(selectors) - 0.4, -0.6)
        low.set_yticks(range(len(selectors)), names if index % columns == 0 else [])
        low.tick_params(labelsize=6.5, length=0)
        low.set_xticks(steps if len(steps) <= 6 else [steps[0], steps[-1]])
        low.grid(color=LINE)
        if index + columns >= len(entries):  # the lowest of its column
            low.set_xlabel("segmenter updates", fontsize=7)
        if index % columns == 0:
            top.set_ylabel(PRIMARY.title, fontsize=8)
        for axes in (top, low):
            axes.patch.set_alpha(0)
    keys = [Line2D([], [], color=FAINT, ls="-", label="source validation")]
    if ORACLE in set(own["selector"]):
        keys.append(Line2D([], [], color=FAINT, ls=":", label="target test cases (privileged)"))
    several = chosen["seed"].nunique() > 1
    label = "chosen" + " (area: share of seeds)" * several
    keys.append(Line2D([], [], color=FAINT, ls="", marker="o", label=label))
    legend_below(figure, keys)
    return figure


@styled
def selector_regret(regret: pd.DataFrame) -> Figure:
    """Draw the regret of each selector: one dot per run, a bar at the mean.

    Args:
        regret: from `report_tables.regrets`.
    """
    tasks = sorted(regret["task"].astype(str).unique())
    order = regret.groupby("selector")["regret"].mean().sort_values().index.astype(str).tolist()
    figure = new_figure(_beside(order) + 2.8 * len(tasks), 1.2 + 0.28 * len(order))
    for axes, task in _task_panels(figure, tasks):
        part = regret[regret["task"] == task].assign(regret=lambda d: 100 * d["regret"])
        part = part.astype({"selector": str})
        _strip(axes, part, "regret", "selector", order, color=COLOURS[0], alpha=0.5)
        axes.set_xlabel("")
        _names(axes, order)
    figure.supxlabel("regret vs. oracle (privileged), Dice points", fontsize=9)
    return figure


@styled
def intervals(spans: pd.DataFrame, palette: Palette) -> Figure:
    """Draw the mean Dice of each entry with its 95 % CI.

    Args:
        spans: from `statistics.intervals`, from top to bottom.
        palette: colours and markers.
    """
    entries = [str(entry) for entry in spans.index]
    figure = new_figure(_beside(entries) + 4.4, 1.0 + 0.3 * len(entries))
    axes = new_axes(figure)[0, 0]
    for y, entry in enumerate(entries):
        mean, low, high = 100 * spans.loc[entry, ["mean", "low", "high"]]
        _span(axes, y, [low, high], mean, palette.look(entry))
    axes.set_xlabel("mean Dice (%) and 95 % CI")
    axes.grid(axis="x", color=LINE)
    _names(axes, entries)
    return figure


@styled
def heat_map(table: pd.DataFrame) -> Figure:
    """Draw mean Dice over structures and seeds, as entries × cases.

    Args:
        table: entry × case, in [0, 1].
    """
    entries, cases = list(table.index.astype(str)), list(table.columns.astype(str))
    written = len(cases) <= 16 and len(entries) <= 40
    names = [middle_shortened(case, 18) for case in cases]
    below = 0.06 * max(map(len, names), default=0) if len(cases) <= 40 else 0.2
    figure = new_figure(
        _beside(entries) + 1.0 + (0.62 if written else max(0.16, 6.0 / len(cases))) * len(cases),
        0.5 + below + 0.27 * max(3, len(entries)),
    )
    axes = new_axes(figure)[0, 0]
    drawn = axes.imshow(table, cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto")
    if written:
        for y, values in enumerate(table.to_numpy()):
            for x, value in enumerate(values):
                if not math.isnan(value):
                    colour = on(drawn.to_rgba(value))
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, size=7)
    _names(axes, entries)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(cases)), names, fontsize=7, **turned)
    if len(cases) > 40:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(cases)} cases")
    axes.spines[:].set_visible(False)
    colour_bar(figure, drawn, axes, PRIMARY.title, ticks=[0, 0.5, 1])
    return figure


@styled
def curve(points: pd.DataFrame, setting: str, controls: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw Dice over the values of one setting: dots are seeds, the line connects their means.

    Args:
        points: from `report_tables.curves`.
        setting: name of the setting.
        controls: name → task, seed, dice of variants without a value on the axis.
    """
    tasks = sorted(points["task"].unique())
    names = {name: middle_shortened(name) for name in controls}
    figure = new_figure(1.2 + 3.7 * len(tasks), 3.3 + 0.09 * len(controls))
    default = sorted(points.loc[~points["changed"], "value"].unique())
    keys: dict[str, Any] = {}
    for axes, task in _task_panels(figure, tasks, sharey=False):
        part = points[points["task"] == task]
        mean = part.groupby("value")[PRIMARY.name].mean()
        axes.plot(part["value"], part[PRIMARY.name], "o", color=COLOURS[0], ms=3.5, alpha=0.5)
        name = line_of(part["seed"].nunique())
        (keys[name],) = axes.plot(mean.index, mean, "-o", color=COLOURS[0], ms=5, label=name)
        if part["value"].min() > 0 and part["value"].max() / part["value"].min() > 30:
            log_axis(axes)
        for index, (name, control) in enumerate(controls.items(), start=1):
            own = control[control["task"] == task][PRIMARY.name]
            if not len(own):
                continue
            # Levels cross the panel; their spreads stand side by side at its right edge, since
            # bands over the whole panel would hide each other.
            colour, style = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
            look: dict[str, Any] = {"color": colour, "label": names[name]}
            keys[names[name]] = axes.axhline(own.mean(), lw=1.3, ls=style, zorder=4, **look)
            if len(own) > 1:
                axes.errorbar(
                    [1.02 + 0.03 * index],
                    [own.mean()],
                    yerr=[own.std()],
                    color=colour,
                    fmt=MARKERS[index % len(MARKERS)],
                    ms=4,
                    capsize=2,
                    transform=axes.get_yaxis_transform(),
                    clip_on=False,
                )
        for value in default:
            axes.axvline(value, color=BOUND, lw=0.8, ls=":", zorder=0)
        axes.set_xlabel(wrapped(f"{middle_shortened(setting)} (dotted: default)", 3.7, 9))
        axes.grid(color=LINE)
        axes.margins(y=0.25)
    figure.axes[0].set_ylabel(PRIMARY.title)
    legend_below(figure, list(keys.values()))
    return figure
