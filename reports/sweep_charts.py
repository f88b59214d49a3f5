"""Charts of sweeps.

In every chart, finished trials are dots, pruned ones crosses, failed ones marks at the lower edge,
and the chosen one a star. Numbers from test labels have a colour of their own.
`optuna.visualization.matplotlib` (experimental) is not used: it omits pruned, failed and chosen
trials, and fills contours beyond the trials.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation

from glua_bench.reports.charts import (
    BOUND,
    COLOURS,
    LETTER,
    LINE,
    MARKERS,
    colour_bar,
    label_points,
    line_of,
    log_axis,
    middle_shortened,
    new_axes,
    on,
    settle,
    styled,
    wrapped,
)
from glua_bench.reports.figures import COLOUR_MAP, INK, legend_below, new_figure
from glua_bench.scoring.metrics import PRIMARY

DONE, FADED, POST_HOC, PRUNED = COLOURS[0], COLOURS[5], COLOURS[1], COLOURS[3]
STAR: dict[str, Any] = {"marker": "*", "s": 130, "color": INK, "zorder": 6, "linewidths": 0}
MIN_CONTOUR_POINTS = 10  # interpolation between fewer trials would be invented
STATE_COLOURS = {
    "done": DONE,
    "pruned": PRUNED,
    "failed": POST_HOC,
    "lost": POST_HOC,
    "running": BOUND,
}


def _key(label: str, **look: Any) -> Line2D:
    """Return a legend entry."""
    return Line2D([], [], **{"ls": "", **look}, label=label)


def pale(colour: str) -> str:
    """Return a colour mixed with white."""
    red, green, blue = (0.35 * value + 0.65 for value in to_rgb(colour))
    return to_hex((red, green, blue))


def _positions(values: pd.Series, log: bool | None) -> tuple[np.ndarray, list[str]]:
    """Return positions on an axis, and the tick labels of categorical values."""
    if log is not None:
        return values.astype(float).to_numpy(), []
    words = list(dict.fromkeys(sorted(map(str, values))))
    return np.array([words.index(str(value)) for value in values], dtype=float), words


@styled
def history(trials: pd.DataFrame, seen: pd.DataFrame, objective: str, chosen: int | None) -> Figure:
    """Draw the objective over the trials in order, and the best so far.

    Args:
        trials: number, state, and the objective's column.
        seen: trial, step, value; gives the last values of pruned trials.
        objective: name of the objective.
        chosen: number of the chosen trial, if any.
    """
    figure = new_figure(7.4, 3.2)
    axes = new_axes(figure)[0, 0]
    done = trials[trials["state"] == "done"].sort_values("number")
    best = done[objective].cummax()
    handles = []
    if len(done):
        axes.step(done["number"], best, where="post", color=BOUND, lw=1.2)
        axes.plot(done["number"], done[objective], "o", color=DONE, ms=4.5, alpha=0.8)
        handles.append(_key("finished", color=DONE, marker="o", ms=4.5))
        handles.append(_key("best so far", color=BOUND, ls="-", lw=1.2))
    ended = trials.loc[trials["state"] == "pruned", "number"]
    last = seen[seen["trial"].isin(ended)].sort_values("step").groupby("trial")["value"].last()
    if len(last):
        axes.plot(last.index, last, "x", color=PRUNED, ms=5)
        handles.append(_key("pruned, at its last value", color=PRUNED, marker="x", ms=5))
    for state, marker in (("failed", "|"), ("lost", "2")):
        own = trials.loc[trials["state"] == state, "number"]
        if len(own):
            look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(own, [0.0] * len(own), marker, color=POST_HOC, ms=12, **look)
            handles.append(_key(state, color=POST_HOC, marker=marker, ms=9))
    if chosen is not None:
        row = done[done["number"] == chosen].iloc[0]
        axes.scatter(row["number"], row[objective], **STAR)
        handles.append(_key("chosen", color=INK, marker="*", ms=9))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(wrapped(objective, 2.4, 9))
    axes.grid(axis="y", color=LINE)
    axes.margins(y=0.12)
    if handles:
        legend_below(figure, handles)
    return figure


@styled
def slices(
    done: pd.DataFrame,
    parameters: Mapping[str, bool | None],
    objective: str,
    chosen: int | None,
) -> Figure:
    """Draw the objective over each parameter; later trials are darker.

    Args:
        done: number, "method.NAME" for each parameter, and the objective's column.
        parameters: name → logarithmic; None for categorical ones.
        objective: name of the objective.
        chosen: number of the chosen trial.
    """
    figure, grid = _grid(len(parameters), 4, 2.4, 2.7, sharey=True)
    for axes, (name, log) in zip(grid.flat, parameters.items(), strict=False):
        at, words = _positions(done[f"method.{name}"], log)
        shades: dict[str, Any] = {"c": done["number"], "cmap": f"{COLOUR_MAP}_r"}
        drawn = axes.scatter(at, done[objective], s=22, alpha=0.9, lw=0, **shades)
        if chosen is not None:
            own = (done["number"] == chosen).to_numpy()
            axes.scatter(at[own], done[objective][own], **STAR)
        if log:
            log_axis(axes)
        if words:
            turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
            names = [middle_shortened(word, 14) for word in words]
            axes.set_xticks(range(len(words)), names, fontsize=8, **turned)
            axes.set_xlim(-0.6, len(words) - 0.4)
        axes.set_xlabel(wrapped(name, 2.4, 9))
        axes.grid(axis="y", color=LINE)
    for row in grid:
        row[0].set_ylabel(wrapped(objective, 2.2, 9))
    colour_bar(figure, drawn, grid, "trial", ticks=MaxNLocator(5, integer=True))
    return figure


def _grid(
    count: int, most: int, width: float, height: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure with a grid of panels, at most `most` per row; unused ones are hidden."""
    columns = min(most, count)
    rows = -(-count // columns)
    figure = new_figure(1.4 + width * columns, 0.45 + height * rows)
    grid = new_axes(figure, rows, columns, **options)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid


def can_contour(done: pd.DataFrame, first: str, second: str) -> bool:
    """Return True if trials cover enough points of two parameters to draw contours."""
    places = done[[f"method.{first}", f"method.{second}"]].astype(float).drop_duplicates()
    if len(places) < MIN_CONTOUR_POINTS or (places.nunique() < 3).any():
        return False
    # Points on a line enclose no area, on linear and on logarithmic axes.
    found = places.to_numpy()
    with np.errstate(all="ignore"):
        scales = [found, np.log(found)] if (found > 0).all() else [found]
    xs, ys = zip(*(scale.T for scale in scales), strict=True)
    pairs = itertools.product(xs, ys)
    return all(abs(np.corrcoef(x, y)[0, 1]) < 1 - 1e-6 for x, y in pairs)


@styled
def contours(
    done: pd.DataFrame,
    parameters: Mapping[str, bool | None],
    pairs: Sequence[tuple[str, str]],
    objective: str,
    chosen: int | None,
) -> Figure:
    """Draw filled contours between the trials for pairs of numeric parameters; dots are trials.

    Args:
        done: number, "method.NAME" for each parameter, and the objective's column.
        parameters: name → logarithmic.
        pairs: of parameters for which `can_contour` is True.
        objective: name of the objective.
        chosen: number of the chosen trial.
    """
    figure, grid = _grid(len(pairs), 3, 2.9, 2.8)
    values = done.groupby([f"method.{name}" for name in parameters], observed=True)[objective]
    low, high = values.mean().min(), values.mean().max()
    margin = 1e-6 * max(1.0, abs(high))  # include both ends
    levels = np.linspace(low - margin, high + margin, 9)
    for axes, (first, second) in zip(grid.flat, pairs, strict=False):
        names = [f"method.{first}", f"method.{second}"]
        own = done[names].astype(float).assign(value=done[objective].to_numpy())
        own = own.groupby(names)["value"].mean().reset_index()
        # Triangulate on the scale of the search, i.e. on logarithms of logarithmic parameters.
        flat = [
            np.log10(own[name]) if parameters[short] else own[name]
            for name, short in zip(names, (first, second), strict=True)
        ]
        scaled = [(part - part.min()) / (part.max() - part.min()) for part in flat]
        mesh = Triangulation(own[names[0]], own[names[1]], Triangulation(*scaled).triangles)
        drawn = axes.tricontourf(mesh, own["value"].to_numpy(), levels=levels, cmap=COLOUR_MAP)
        axes.plot(own[names[0]], own[names[1]], "o", ms=3, color="white", mec=INK, mew=0.6)
        if chosen is not None:
            best = done.loc[done["number"] == chosen, names].iloc[0].astype(float)
            axes.scatter(*best, **{**STAR, "color": "white"})
            axes.scatter(*best, **{**STAR, "s": 60})
        for name, along in ((first, "x"), (second, "y")):
            if parameters[name]:
                log_axis(axes, along)
            axes.set(**{f"{along}label": wrapped(name, 2.4, 9)})
    colour_bar(figure, drawn, grid, objective, format="%.3g", ticks=MaxNLocator(5))
    return figure


@styled
def importances(shares: pd.Series, objective: str) -> Figure:
    """Draw the share of the objective's variance explained by each parameter.

    Args:
        shares: by parameter, the largest first.
        objective: name of the objective.
    """
    names = [middle_shortened(str(name)) for name in shares.index]
    figure = new_figure(4.6 + LETTER * max(map(len, names)), 1.1 + 0.3 * len(shares))
    axes = new_axes(figure)[0, 0]
    axes.barh(range(len(shares)), shares, color=DONE, height=0.6)
    for y, share in enumerate(shares):
        axes.text(share + 0.01, y, f"{100 * share:.0f} %", va="center", fontsize=8)
    axes.set_yticks(range(len(shares)), names)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(0.2, 1.15 * float(shares.max())))
    axes.set_xlabel(wrapped(f"share of the variance of {objective} (fANOVA)", 4.4, 9))
    axes.grid(axis="x", color=LINE)
    return figure


@styled
def curve(
    points: pd.DataFrame, parameter: str, log: bool | None, objective: str, dice: bool
) -> Figure:
    """Draw the objective over one parameter, optionally with the test Dice of the same runs.

    Args:
        points: trial, value (of the parameter), direction, seed, quality, dice.
        parameter: name of the parameter.
        log: whether its axis is logarithmic.
        objective: name of the objective.
        dice: draw the test Dice in a second panel, which is marked post hoc.
    """
    panels = [("quality", objective, (DONE, COLOURS[2]))]
    if dice:
        panels.append((PRIMARY.name, "test Dice (post hoc)", (POST_HOC, COLOURS[6])))
    directions = list(dict.fromkeys(points["direction"]))
    figure = new_figure(1.0 + 3.9 * len(panels), 3.5)
    grid = new_axes(figure, 1, len(panels))[0]
    by_objective = points.groupby("trial")["quality"].mean().idxmax()
    chosen = float(points.loc[points["trial"] == by_objective, "value"].iloc[0])
    for axes, (column, label, colours) in zip(grid, panels, strict=True):
        for index, direction in enumerate(directions):
            colour = colours[index % 2]
            own = points[points["direction"] == direction].dropna(subset=column)
            spread = own.groupby("value")[column].agg(["mean", "min", "max"])
            name = line_of(own["seed"].nunique())
            name = f"{middle_shortened(direction, 24)}: {name}" if len(directions) > 1 else name
            look: dict[str, Any] = {"color": colour, "marker": MARKERS[index]}
            axes.plot(own["value"], own[column], ls="", ms=3, alpha=0.6, **look)
            style = ("-", "--", ":", "-.")[index % 4]
            axes.plot(spread.index, spread["mean"], ls=style, ms=4.5, label=name, **look)
            if (spread["max"] > spread["min"]).any():
                # Edges and hatches keep overlapping bands apart.
                ends = spread["min"], spread["max"]
                hatched: dict[str, Any] = {"hatch": (None, "////")[index % 2], "lw": 0}
                axes.fill_between(spread.index, *ends, color=colour, alpha=0.15, **hatched)
                for end in ends:
                    axes.plot(spread.index, end, color=colour, lw=0.6, alpha=0.8, zorder=1)
        by = f"chosen by {middle_shortened(objective, 30)}"
        axes.axvline(chosen, color=INK, lw=0.9, ls="-", zorder=0, label=by)
        if column == PRIMARY.name:
            # Trials that lack a score are no candidates, as in `sweep_report.selection_cost`.
            best = points.groupby("trial")[PRIMARY.name].agg(lambda own: own.mean(skipna=False))
            if best.notna().any():
                at = float(points.loc[points["trial"] == best.idxmax(), "value"].iloc[0])
                dotted: dict[str, Any] = {"color": POST_HOC, "lw": 0.9, "ls": ":", "zorder": 0}
                axes.axvline(at, label="highest test Dice", **dotted)
        if log:
            log_axis(axes)
        axes.set_xlabel(wrapped(parameter, 3.9, 9))
        axes.set_title(wrapped(label, 3.9))
        axes.grid(color=LINE)
        axes.margins(y=0.2)
        axes.legend(fontsize=7, loc="best")
    return figure


@styled
def agreement(trials: pd.DataFrame, objective: str, chosen: int | None, rho: float) -> Figure:
    """Draw test Dice over the objective, one dot per trial.

    Args:
        trials: number, the objective's column, dice, sd (over seeds; nan for one seed).
        objective: name of the objective.
        chosen: number of the chosen trial.
        rho: Spearman's rank correlation; nan if undefined.
    """
    figure = new_figure(4.6, 3.6)
    axes = new_axes(figure)[0, 0]
    look: dict[str, Any] = {"fmt": "o", "color": POST_HOC, "ecolor": LINE, "elinewidth": 1}
    spread = trials["sd"].fillna(0.0)
    axes.errorbar(trials[objective], trials[PRIMARY.name], yerr=spread, ms=4.5, **look)
    own = trials[trials["number"] == chosen]
    axes.scatter(own[objective], own[PRIMARY.name], label="chosen", **STAR)
    best = trials.loc[trials[PRIMARY.name].idxmax()]
    ring = {"s": 110, "fc": "none", "ec": POST_HOC, "label": "highest test Dice"}
    axes.scatter(best[objective], best[PRIMARY.name], **ring)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(wrapped(objective, 4.0, 9))
    axes.set_ylabel("test Dice (post hoc)")
    if not math.isnan(rho):
        axes.set_title(f"Spearman's ρ = {rho:.2f} over {len(trials)} trials", fontsize=9)
    axes.grid(color=LINE)
    axes.margins(0.1)
    legend_below(figure, axes.get_legend_handles_labels()[0], 7)
    return figure


@styled
def front(done: pd.DataFrame, objective: str, cost: str, on_front: Sequence[int]) -> Figure:
    """Draw quality over a cost, with the Pareto front.

    Args:
        done: number and a column for each objective.
        objective: the quality; larger is better.
        cost: smaller is better.
        on_front: numbers of the trials on the front.
    """
    figure = new_figure(5.6, 3.6)
    axes = new_axes(figure)[0, 0]
    best = done[done["number"].isin(on_front)].sort_values(cost)
    others = done[~done["number"].isin(on_front)]
    axes.plot(others[cost], others[objective], "o", color=BOUND, ms=4, alpha=0.6, label="dominated")
    axes.step(best[cost], best[objective], where="post", color=DONE, lw=1.2)
    axes.plot(best[cost], best[objective], "o", color=DONE, ms=6, label="Pareto front")
    axes.set_xlabel(wrapped(f"{cost} (labels: trial numbers)", 5.0, 9))
    axes.set_ylabel(wrapped(objective, 2.4, 9))
    axes.grid(color=LINE)
    axes.margins(0.1)
    legend_below(figure, axes.get_legend_handles_labels()[0])
    settle(figure)
    numbered = [(str(int(row["number"])), row[cost], row[objective]) for _, row in best.iterrows()]
    label_points(axes, numbered)
    return figure


@styled
def courses(seen: pd.DataFrame, trials: pd.DataFrame, objective: str, chosen: int | None) -> Figure:
    """Draw the intermediate values of each trial; pruned ones end with a cross.

    Args:
        seen: trial, step, value.
        trials: number, state.
        objective: name of the objective.
        chosen: number of the chosen trial.
    """
    figure = new_figure(6.4, 3.4)
    axes = new_axes(figure)[0, 0]
    states = trials.set_index("number")["state"]
    handles = {}
    for number, own in seen.groupby("trial"):
        own, state = own.sort_values("step"), states.get(number, "")
        look: dict[str, Any] = {"color": FADED, "lw": 0.9, "alpha": 0.8}
        name = "finished" if state == "done" else state
        if state == "pruned":
            look = {"color": PRUNED, "lw": 0.9, "alpha": 0.9}
            axes.plot(own["step"].iloc[-1:], own["value"].iloc[-1:], "x", color=PRUNED, ms=5)
        elif state in ("failed", "lost", "running"):
            look = {"color": BOUND, "lw": 0.9, "ls": ":"}
        if number == chosen:
            look, name = {"color": INK, "lw": 2.0, "zorder": 5}, "chosen"
        (handles[name],) = axes.plot(own["step"], own["value"], marker="o", ms=2.5, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("checkpoint or run of the trial")
    axes.set_ylabel(wrapped(f"intermediate {objective}", 2.4, 9))
    axes.grid(color=LINE)
    for name, handle in handles.items():
        handle.set_label(name)
    legend_below(figure, list(handles.values()))
    return figure


@styled
def time_line(trials: pd.DataFrame) -> Figure:
    """Draw the trials of each worker over time.

    Args:
        trials: number, state, counted, worker, began, ended; without missing times.
    """
    workers = list(dict.fromkeys(trials.sort_values("began")["worker"]))
    first = trials["began"].min()
    seconds = float((trials["ended"].max() - first).total_seconds())
    unit, name = next(
        (size, word)
        for size, word in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if seconds > 2 * size or size == 1
    )
    names = [middle_shortened(str(worker), 30) for worker in workers]
    figure = new_figure(5.6 + LETTER * max(map(len, names)), 1.3 + 0.32 * len(workers))
    axes = new_axes(figure)[0, 0]
    for row in trials.itertuples():
        start = (row.began - first).total_seconds() / unit
        width = (row.ended - row.began).total_seconds() / unit
        y, colour = workers.index(row.worker), STATE_COLOURS.get(row.state, BOUND)
        if not row.counted:
            colour = pale(colour)
        axes.barh(y, width, left=start, height=0.62, fc=colour, ec="white", lw=0.6)
        # The bars span at least 4 inches; a digit takes 0.07.
        if width > 0.02 * len(str(row.number)) * seconds / unit:
            centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(start + width / 2, y, str(row.number), color=on(colour), **centred)
    axes.set_yticks(range(len(workers)), names)
    axes.set_ylim(len(workers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{name} since the start of the first trial")
    axes.grid(axis="x", color=LINE)
    shown = [state for state in STATE_COLOURS if (trials["state"] == state).any()]
    handles = [_key(s, color=STATE_COLOURS[s], ls="-", lw=6) for s in shown]
    if not trials["counted"].all():
        handles.append(_key("pale: restarted", color=pale(BOUND), ls="-", lw=6))
    legend_below(figure, handles)
    return figure
