"""Charts of comparisons.

Every function returns one matplotlib figure, which `files` writes. An entry has the same colour and
marker in all charts of a report; bounds are gray. Colours are those of Okabe and Ito, which are
distinguishable with colour blindness.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from glua_bench.config import LOWER, ORACLE, UPPER
from glua_bench.errors import shortened
from glua_bench.reports.comparison import title
from glua_bench.reports.figures import COLOUR_MAP, FAINT, INK, new_figure, save
from glua_bench.scoring.metrics import PRIMARY

LINE = "#d9d9d9"
BOUND = "#8c8c8c"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9467bd")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_VECTOR_POINTS = 4000  # more points are rasterized inside the SVG
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays searchable and takes the page's colour
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
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a drawing function to use the style of reports, without a global effect."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def files(figure: Figure, stem: Path) -> list[Path]:
    """Write a chart as SVG (transparent) and PNG (white), and return both paths.

    Args:
        figure: the chart.
        stem: path of the files without suffix.

    Raises:
        RunFailure: a file cannot be written.
    """
    written = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    with mpl.rc_context(STYLE):
        for path, facecolor in zip(written, ("none", "white"), strict=True):
            save(figure, path, DPI, facecolor)
    return written


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
    """Make an axis ("x" or "y") logarithmic, with plain numbers as tick labels."""
    axes.set(**{f"{along}scale": "log"})
    axis = axes.xaxis if along == "x" else axes.yaxis
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
        axes.set_title(str(task))
    return zip(grid, tasks, strict=True)


def _names(axes: Any, entries: Sequence[str]) -> None:
    axes.set_yticks(range(len(entries)), [_short(entry) for entry in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _short(entry: str, most: int = 46) -> str:
    return shortened(title(entry), most)


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
    figure = new_figure(2.0 + 1.75 * len(panels), 0.9 + 0.3 * len(entries))
    grid = new_axes(figure, 1, len(panels), sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        part = points[points["panel"] == panel]
        colours = {entry: palette.colour(entry) for entry in entries}
        look: dict[str, Any] = {"hue": "entry", "hue_order": list(entries), "palette": colours}
        _strip(axes, part, PRIMARY.name, "entry", entries, alpha=0.55, legend=False, **look)
        axes.set_title(panel)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.5, 1])
        axes.set_xlabel("")
        _names(axes, entries)
    grid[len(panels) // 2].set_xlabel("Dice (dots: cases and seeds, bar: mean)")
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
    figure = new_figure(2.4 + 3.0 * len(tasks), 1.0 + 0.3 * len(entries))
    for axes, task in _task_panels(figure, tasks):
        part = lines.loc[task]
        for y, entry in enumerate(entries):
            if entry not in part.index or math.isnan(part.loc[entry, "gap recovered"]):
                continue
            row = 100 * part.loc[entry, ["gap recovered", "gap min", "gap max"]]
            _span(axes, y, row[["gap min", "gap max"]], row["gap recovered"], palette.look(entry))
        for x, name in ((0, LOWER), (100, UPPER)):
            axes.axvline(x, color=BOUND, lw=1, ls="--", zorder=0)
            axes.text(x, -0.75, _short(name), ha="center", va="bottom", fontsize=7, color=FAINT)
        axes.set_title(str(task), pad=14)
        axes.set_xlabel("gap recovered (%): mean, min and max over seeds")
        axes.grid(axis="x", color=LINE)
        _names(axes, entries)
    return figure


@styled
def cost_quality(lines: pd.DataFrame, palette: Palette) -> Figure:
    """Draw Dice over training time; the area of a marker grows with memory.

    Args:
        lines: from `comparison.table`, of all tasks.
        palette: colours and markers.
    """
    tasks = list(dict.fromkeys(lines.index.get_level_values("task")))
    figure = new_figure(1.0 + 4.2 * len(tasks), 3.6)
    largest = float(lines["peak MiB"].max())
    for axes, task in _task_panels(figure, tasks):
        shown = lines.loc[task].dropna(subset="training s").sort_values("training s")
        middle = math.sqrt(shown["training s"].min() * shown["training s"].max())
        for index, (entry, row) in enumerate(shown.iterrows()):
            point = row["training s"], row[PRIMARY.label]
            size = 30 + (150 * row["peak MiB"] / largest if largest > 0 else 0)
            colour, marker = palette.look(str(entry))
            axes.scatter(*point, s=size, color=colour, marker=marker, alpha=0.85, linewidths=0)
            axes.annotate(
                _short(str(entry), 24),
                point,
                # Alternate the sides of labels of neighbours.
                xytext=(-7 if row["training s"] > middle else 7, 5 if index % 2 else -10),
                ha="right" if row["training s"] > middle else "left",
                textcoords="offset points",
                fontsize=7,
                color=INK,
            )
        log_axis(axes)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_xlabel("training time (s)")
        axes.grid(color=LINE)
        axes.margins(x=0.25, y=0.12)
    figure.axes[0].set_ylabel(PRIMARY.title)
    return figure


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
    figure = new_figure(1.3 + 2.5 * columns, rows * (1.5 + 0.13 * len(selectors)) + 0.6)
    outer = figure.add_gridspec(rows, columns)
    own = checkpoints.astype({"entry": str, "selector": str})
    chosen = chosen.astype({"entry": str, "selector": str})
    steps = sorted(own["step"].unique())
    for index, entry in enumerate(entries):
        cell = outer[index // columns, index % columns].subgridspec(
            2, 1, height_ratios=[1.3, 0.13 * len(selectors)], hspace=0.03
        )
        top = figure.add_subplot(cell[0])
        low = figure.add_subplot(cell[1], sharex=top)
        part = own[own["entry"] == entry]
        for selector, style in (("source_val", "-"), (ORACLE, ":")):
            for _, line in part[part["selector"] == selector].groupby("seed"):
                line = line.sort_values("step")
                look: dict[str, Any] = {"color": palette.colour(entry), "lw": 1.2, "alpha": 0.9}
                top.plot(line["step"], line["score"], style, **look)
        top.set_title(_short(entry, 30), fontsize=8)
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
        low.set_yticks(range(len(selectors)), selectors if index % columns == 0 else [])
        low.tick_params(labelsize=6.5, length=0)
        low.set_xticks(steps if len(steps) <= 6 else [steps[0], steps[-1]])
        low.grid(color=LINE)
        if index // columns == rows - 1 or index + columns >= len(entries):
            low.set_xlabel("segmenter updates", fontsize=7)
        if index % columns == 0:
            top.set_ylabel(PRIMARY.title, fontsize=8)
        for axes in (top, low):
            axes.patch.set_alpha(0)
    keys = [Line2D([], [], color=FAINT, ls="-", label="source validation")]
    if ORACLE in set(own["selector"]):
        keys.append(Line2D([], [], color=FAINT, ls=":", label="target test cases (privileged)"))
    label = "chosen (area: share of seeds)"
    keys.append(Line2D([], [], color=FAINT, ls="", marker="o", label=label))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8)
    return figure


@styled
def selector_regret(regret: pd.DataFrame) -> Figure:
    """Draw the regret of each selector: one dot per run, a bar at the mean.

    Args:
        regret: from `report_tables.regrets`.
    """
    tasks = sorted(regret["task"].astype(str).unique())
    order = regret.groupby("selector")["regret"].mean().sort_values().index.astype(str).tolist()
    figure = new_figure(1.8 + 2.8 * len(tasks), 1.0 + 0.28 * len(order))
    for axes, task in _task_panels(figure, tasks):
        part = regret[regret["task"] == task].assign(regret=lambda d: 100 * d["regret"])
        part = part.astype({"selector": str})
        _strip(axes, part, "regret", "selector", order, color=COLOURS[0], alpha=0.5)
        axes.set_xlabel("regret vs. oracle (privileged), Dice points")
        axes.tick_params(axis="y", length=0)
    return figure


@styled
def intervals(spans: pd.DataFrame, palette: Palette) -> Figure:
    """Draw the mean Dice of each entry with its 95 % CI.

    Args:
        spans: from `statistics.intervals`, from top to bottom.
        palette: colours and markers.
    """
    entries = [str(entry) for entry in spans.index]
    figure = new_figure(6.4, 1.0 + 0.3 * len(entries))
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
    figure = new_figure(
        2.6 + (0.62 if written else max(0.1, 6.0 / len(cases))) * len(cases),
        1.1 + 0.27 * len(entries),
    )
    axes = new_axes(figure)[0, 0]
    drawn = axes.imshow(table, cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto")
    if written:
        for y, values in enumerate(table.to_numpy()):
            for x, value in enumerate(values):
                if not math.isnan(value):
                    colour = "#fefefe" if value < 0.6 else "#010101"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, size=7)
    _names(axes, entries)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
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
    figure = new_figure(1.2 + 3.7 * len(tasks), 3.3)
    default = sorted(points.loc[~points["changed"], "value"].unique())
    for axes, task in _task_panels(figure, tasks, sharey=False):
        part = points[points["task"] == task]
        mean = part.groupby("value")[PRIMARY.name].mean()
        axes.plot(part["value"], part[PRIMARY.name], "o", color=COLOURS[0], ms=3.5, alpha=0.5)
        axes.plot(mean.index, mean, "-o", color=COLOURS[0], ms=5, label="mean over seeds")
        for index, (name, control) in enumerate(controls.items(), start=1):
            own = control[control["task"] == task][PRIMARY.name]
            if len(own):
                colour = COLOURS[index % len(COLOURS)]
                axes.axhline(own.mean(), color=colour, lw=1.2, ls="--", label=name)
                if len(own) > 1:
                    low, high = own.mean() - own.std(), own.mean() + own.std()
                    axes.axhspan(low, high, color=colour, alpha=0.12, lw=0)
        for value in default:
            axes.axvline(value, color=BOUND, lw=0.8, ls=":", zorder=0)
        if part["value"].min() > 0 and part["value"].max() / part["value"].min() > 30:
            log_axis(axes)
        axes.set_xlabel(f"{setting} (dotted: default)")
        axes.grid(color=LINE)
        axes.margins(y=0.25)
    figure.axes[0].set_ylabel(PRIMARY.title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
