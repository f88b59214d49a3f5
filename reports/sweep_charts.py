"""Charts of sweeps: how a search went, what it found, and what nobody knew while it went.

A trial that gave a value is a dot, a pruned one a cross, a failed one a mark at the lower edge, and
the chosen one a star, in every chart. Numbers of test labels are drawn in a colour of their own.
`optuna.visualization.matplotlib`, which is experimental, is not used: it leaves out pruned, failed
and chosen trials, and fills contours where no trial was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.tri import Triangulation

from glua_bench.errors import shortened
from glua_bench.reports.charts import (
    BOUND,
    COLOURS,
    FAINT,
    INK,
    LINE,
    MARKERS,
    new_axes,
    new_figure,
    styled,
)
from glua_bench.scoring.metrics import PRIMARY

FOUND, WORSE, AFTERWARDS, PRUNED = COLOURS[0], COLOURS[5], COLOURS[1], COLOURS[3]
STAR: dict[str, Any] = {"marker": "*", "s": 130, "color": INK, "zorder": 6, "linewidths": 0}
SHADES = "viridis"
FEWEST_FOR_CONTOURS = 10  # trials; between fewer, what is drawn would be invented
STATE_COLOURS = {"done": FOUND, "pruned": PRUNED, "failed": AFTERWARDS, "running": BOUND}


def _scale(axes: Any, log: bool | None, along: str = "x") -> None:
    """A logarithmic axis for a parameter that is searched so."""
    if not log:
        return
    axis = axes.xaxis if along == "x" else axes.yaxis
    (axes.set_xscale if along == "x" else axes.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _places(values: pd.Series, log: bool | None) -> tuple[np.ndarray, list[str]]:
    """Where values stand on an axis, and the names of the places where they are words."""
    if log is not None:
        return values.astype(float).to_numpy(), []
    words = list(dict.fromkeys(sorted(map(str, values))))
    return np.array([words.index(str(value)) for value in values], dtype=float), words


@styled
def history(trials: pd.DataFrame, seen: pd.DataFrame, objective: str, chosen: int | None) -> Figure:
    """The objective over the trials in their order, and the best so far.

    Args:
        trials: number, state, and a column of the objective.
        seen: trial, step, value: what pruned trials had reached.
        objective: its name.
        chosen: number of the chosen trial; None for none.
    """
    figure = new_figure(7.4, 3.2)
    axes = new_axes(figure)[0, 0]
    done = trials[trials["state"] == "done"].sort_values("number")
    best = done[objective].cummax()
    handles = []
    if len(done):
        axes.step(done["number"], best, where="post", color=BOUND, lw=1.2)
        axes.plot(done["number"], done[objective], "o", color=FOUND, ms=4.5, alpha=0.8)
        handles += [
            Line2D([], [], color=FOUND, ls="", marker="o", ms=4.5, label="finished"),
            Line2D([], [], color=BOUND, lw=1.2, label="best so far"),
        ]
    ended = trials.loc[trials["state"] == "pruned", "number"]
    last = seen[seen["trial"].isin(ended)].sort_values("step").groupby("trial")["value"].last()
    if len(last):
        axes.plot(last.index, last, "x", color=PRUNED, ms=5)
        handles.append(
            Line2D([], [], color=PRUNED, ls="", marker="x", ms=5, label="pruned, at its last value")
        )
    failed = trials.loc[trials["state"] == "failed", "number"]
    if len(failed):
        edge = axes.get_xaxis_transform()
        axes.plot(
            failed, [0.0] * len(failed), "|", color=AFTERWARDS, ms=12, transform=edge, clip_on=False
        )
        handles.append(Line2D([], [], color=AFTERWARDS, ls="", marker="|", ms=9, label="failed"))
    if chosen is not None:
        row = done[done["number"] == chosen].iloc[0]
        axes.scatter(row["number"], row[objective], **STAR)
        handles.append(Line2D([], [], color=INK, ls="", marker="*", ms=9, label="chosen"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(objective)
    axes.grid(axis="y", color=LINE)
    axes.margins(y=0.12)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    return figure


@styled
def slices(
    done: pd.DataFrame,
    parameters: Mapping[str, bool | None],
    objective: str,
    chosen: int | None,
) -> Figure:
    """The objective over each parameter; later trials are darker.

    Args:
        done: number, "method.NAME" for each parameter, and a column of the objective.
        parameters: name → logarithmic; None where values are words.
        objective: its name.
        chosen: number of the chosen trial.
    """
    columns = min(4, len(parameters))
    rows = -(-len(parameters) // columns)
    figure = new_figure(1.4 + 2.4 * columns, 0.5 + 2.5 * rows)
    grid = new_axes(figure, rows, columns, sharey=True)
    for axes in grid.flat[len(parameters) :]:
        axes.set_visible(False)
    for axes, (name, log) in zip(grid.flat, parameters.items(), strict=False):
        at, words = _places(done[f"method.{name}"], log)
        drawn = axes.scatter(
            at, done[objective], c=done["number"], cmap=f"{SHADES}_r", s=22, alpha=0.9, lw=0
        )
        if chosen is not None:
            own = (done["number"] == chosen).to_numpy()
            axes.scatter(at[own], done[objective][own], **STAR)
        _scale(axes, log)
        if words:
            axes.set_xticks(range(len(words)), [shortened(word, 14) for word in words], rotation=25)
            axes.set_xlim(-0.6, len(words) - 0.4)
        axes.set_xlabel(name)
        axes.grid(axis="y", color=LINE)
    for row in grid:
        row[0].set_ylabel(objective)
    bar = figure.colorbar(
        drawn, ax=grid, fraction=0.03, pad=0.01, ticks=MaxNLocator(5, integer=True)
    )
    bar.set_label("trial", color=INK)
    bar.outline.set_visible(False)
    return figure


def can_contour(done: pd.DataFrame, first: str, second: str) -> bool:
    """Whether two parameters have enough places in a plane to draw lines of equal value."""
    places = done[[f"method.{first}", f"method.{second}"]].astype(float).drop_duplicates()
    return len(places) >= FEWEST_FOR_CONTOURS and bool((places.nunique() >= 3).all())


@styled
def contours(
    done: pd.DataFrame,
    parameters: Mapping[str, bool | None],
    pairs: Sequence[tuple[str, str]],
    objective: str,
    chosen: int | None,
) -> Figure:
    """Areas of equal value between the trials, for pairs of numbers; dots are the trials.

    Args:
        done: number, "method.NAME" for each parameter, and a column of the objective.
        parameters: name → logarithmic.
        pairs: of parameters; `can_contour` holds for each.
        objective: its name.
        chosen: number of the chosen trial.
    """
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = new_figure(1.4 + 2.9 * columns, 0.4 + 2.8 * rows)
    grid = new_axes(figure, rows, columns)
    for axes in grid.flat[len(pairs) :]:
        axes.set_visible(False)
    values = done.groupby([f"method.{name}" for name in parameters], observed=True)[objective]
    low, high = values.mean().min(), values.mean().max()
    margin = 1e-6 * max(1.0, abs(high))  # so that the ends lie within
    levels = np.linspace(low - margin, high + margin, 9)
    for axes, (first, second) in zip(grid.flat, pairs, strict=False):
        names = [f"method.{first}", f"method.{second}"]
        own = done[names].astype(float).assign(value=done[objective].to_numpy())
        own = own.groupby(names)["value"].mean().reset_index()
        # Triangles are made where the search moved: on the logarithm of what is searched so.
        flat = [
            np.log10(own[name]) if parameters[short] else own[name]
            for name, short in zip(names, (first, second), strict=True)
        ]
        scaled = [(part - part.min()) / (part.max() - part.min()) for part in flat]
        mesh = Triangulation(own[names[0]], own[names[1]], Triangulation(*scaled).triangles)
        drawn = axes.tricontourf(mesh, own["value"].to_numpy(), levels=levels, cmap=SHADES)
        axes.plot(own[names[0]], own[names[1]], "o", ms=3, color="white", mec=INK, mew=0.6)
        if chosen is not None:
            best = done[done["number"] == chosen].iloc[0]
            axes.scatter(float(best[names[0]]), float(best[names[1]]), **{**STAR, "color": "white"})
            axes.scatter(float(best[names[0]]), float(best[names[1]]), **{**STAR, "s": 60})
        _scale(axes, parameters[first])
        _scale(axes, parameters[second], "y")
        axes.set_xlabel(first)
        axes.set_ylabel(second)
    bar = figure.colorbar(
        drawn, ax=grid, fraction=0.03, pad=0.01, format="%.3g", ticks=MaxNLocator(5)
    )
    bar.set_label(objective, color=INK)
    bar.outline.set_visible(False)
    return figure


@styled
def importances(shares: pd.Series, objective: str) -> Figure:
    """The share of the objective's variance that follows each parameter.

    Args:
        shares: by parameter, the largest first.
        objective: its name.
    """
    figure = new_figure(6.4, 0.9 + 0.3 * len(shares))
    axes = new_axes(figure)[0, 0]
    axes.barh(range(len(shares)), shares, color=FOUND, height=0.6)
    for y, share in enumerate(shares):
        axes.text(share + 0.01, y, f"{100 * share:.0f} %", va="center", fontsize=8)
    axes.set_yticks(range(len(shares)), list(shares.index))
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(0.2, 1.15 * float(shares.max())))
    axes.set_xlabel(f"share of the variance of {objective}")
    axes.grid(axis="x", color=LINE)
    return figure


@styled
def curve(
    points: pd.DataFrame, parameter: str, log: bool | None, objective: str, dice: bool
) -> Figure:
    """The objective over one parameter, and, if asked, the test Dice of the same runs.

    Args:
        points: trial, value (of the parameter), direction, seed, quality, dice.
        parameter: its name.
        log: whether its axis is logarithmic.
        objective: its name.
        dice: draw the test Dice in a second panel, which says that it was looked at afterwards.
    """
    panels = [("quality", objective, (FOUND, WORSE))]
    if dice:
        label = "test Dice, looked at afterwards"
        panels.append((PRIMARY.name, label, (AFTERWARDS, COLOURS[4])))
    directions = list(dict.fromkeys(points["direction"]))
    figure = new_figure(1.0 + 3.9 * len(panels), 3.3)
    grid = new_axes(figure, 1, len(panels))[0]
    by_objective = points.groupby("trial")["quality"].mean().idxmax()
    chosen = float(points.loc[points["trial"] == by_objective, "value"].iloc[0])
    for axes, (column, label, colours) in zip(grid, panels, strict=True):
        for index, direction in enumerate(directions):
            colour = colours[index % 2]
            own = points[points["direction"] == direction].dropna(subset=column)
            spread = own.groupby("value")[column].agg(["mean", "min", "max"])
            name = f"{direction}: mean over seeds" if len(directions) > 1 else "mean over seeds"
            axes.fill_between(
                spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, lw=0
            )
            axes.plot(own["value"], own[column], MARKERS[index], color=colour, ms=3, alpha=0.6)
            axes.plot(
                spread.index,
                spread["mean"],
                ls=("-", "--", ":", "-.")[index % 4],
                marker=MARKERS[index],
                color=colour,
                ms=4.5,
                label=name,
            )
        axes.axvline(chosen, color=INK, lw=0.9, ls="-", zorder=0, label=f"chosen by {objective}")
        if column == PRIMARY.name:
            # A trial that lacks a score is no candidate, as in `sweep_report.price`.
            best = points.groupby("trial")[PRIMARY.name].agg(lambda own: own.mean(skipna=False))
            if best.notna().any():
                at = points.loc[points["trial"] == best.idxmax(), "value"].iloc[0]
                axes.axvline(
                    float(at), color=AFTERWARDS, lw=0.9, ls=":", zorder=0, label="highest test Dice"
                )
        _scale(axes, log)
        axes.set_xlabel(parameter)
        axes.set_title(label)
        axes.grid(color=LINE)
        axes.margins(y=0.2)
        axes.legend(fontsize=7, loc="best")
    return figure


@styled
def agreement(trials: pd.DataFrame, objective: str, chosen: int | None, rho: float) -> Figure:
    """Test Dice over the objective, a dot a trial: what the objective is worth as a guide.

    Args:
        trials: number, a column of the objective, dice, sd (over seeds; nan for one).
        objective: its name.
        chosen: number of the chosen trial.
        rho: Spearman's rank correlation; nan where there is none.
    """
    figure = new_figure(4.6, 3.6)
    axes = new_axes(figure)[0, 0]
    axes.errorbar(
        trials[objective],
        trials[PRIMARY.name],
        yerr=trials["sd"].fillna(0.0),
        fmt="o",
        color=AFTERWARDS,
        ecolor=LINE,
        ms=4.5,
        elinewidth=1,
    )
    own = trials[trials["number"] == chosen]
    axes.scatter(own[objective], own[PRIMARY.name], label="chosen", **STAR)
    best = trials.loc[trials[PRIMARY.name].idxmax()]
    ring = {"s": 110, "fc": "none", "ec": AFTERWARDS, "label": "highest test Dice"}
    axes.scatter(best[objective], best[PRIMARY.name], **ring)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(objective)
    axes.set_ylabel("test Dice, looked at afterwards")
    if not math.isnan(rho):
        axes.set_title(f"rank correlation {rho:.2f} over {len(trials)} trials", fontsize=9)
    axes.grid(color=LINE)
    axes.margins(0.1)
    axes.legend(fontsize=7, loc="best")
    return figure


@styled
def front(done: pd.DataFrame, objective: str, cost: str, on_front: Sequence[int]) -> Figure:
    """Quality over a cost; the front is what nothing else beats in both.

    Args:
        done: number and a column for each objective.
        objective: the quality, larger is better.
        cost: smaller is better.
        on_front: numbers of the trials on it.
    """
    figure = new_figure(5.6, 3.6)
    axes = new_axes(figure)[0, 0]
    best = done[done["number"].isin(on_front)].sort_values(cost)
    others = done[~done["number"].isin(on_front)]
    axes.plot(others[cost], others[objective], "o", color=BOUND, ms=4, alpha=0.6, label="dominated")
    axes.step(best[cost], best[objective], where="post", color=FOUND, lw=1.2)
    axes.plot(best[cost], best[objective], "o", color=FOUND, ms=6, label="Pareto front")
    for _, row in best.iterrows():
        axes.annotate(
            str(int(row["number"])),
            (row[cost], row[objective]),
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=7,
            color=FAINT,
        )
    axes.set_xlabel(f"{cost} (numbers are trials)")
    axes.set_ylabel(objective)
    axes.grid(color=LINE)
    axes.margins(0.1)
    axes.legend(fontsize=8, loc="lower right")
    return figure


@styled
def courses(seen: pd.DataFrame, trials: pd.DataFrame, objective: str, chosen: int | None) -> Figure:
    """The value of each trial while it ran; pruned ones end with a cross.

    Args:
        seen: trial, step, value.
        trials: number, state.
        objective: its name.
        chosen: number of the chosen trial.
    """
    figure = new_figure(6.4, 3.4)
    axes = new_axes(figure)[0, 0]
    states = trials.set_index("number")["state"]
    handles = {}
    for number, own in seen.groupby("trial"):
        own, state = own.sort_values("step"), states.get(number, "")
        look: dict[str, Any] = {"color": WORSE, "lw": 0.9, "alpha": 0.8}
        name = "finished" if state == "done" else state
        if state == "pruned":
            look = {"color": PRUNED, "lw": 0.9, "alpha": 0.9}
            axes.plot(own["step"].iloc[-1:], own["value"].iloc[-1:], "x", color=PRUNED, ms=5)
        elif state in ("failed", "running"):
            look = {"color": BOUND, "lw": 0.9, "ls": ":"}
        if number == chosen:
            look, name = {"color": INK, "lw": 2.0, "zorder": 5}, "chosen"
        (handles[name],) = axes.plot(own["step"], own["value"], "-o", ms=2.5, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("checkpoint or run of the trial, in order")
    axes.set_ylabel(f"{objective} so far")
    axes.grid(color=LINE)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


@styled
def time_line(trials: pd.DataFrame) -> Figure:
    """Which worker was at which trial, and when.

    Args:
        trials: number, state, counted, worker, began and ended, with times for all.
    """
    workers = list(dict.fromkeys(trials.sort_values("began")["worker"]))
    first = trials["began"].min()
    seconds = float((trials["ended"].max() - first).total_seconds())
    unit, name = next(
        (size, word)
        for size, word in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if seconds > 2 * size or size == 1
    )
    figure = new_figure(7.4, 1.2 + 0.32 * len(workers))
    axes = new_axes(figure)[0, 0]
    for row in trials.itertuples():
        start = (row.began - first).total_seconds() / unit
        width = (row.ended - row.began).total_seconds() / unit
        axes.barh(
            workers.index(row.worker),
            width,
            left=start,
            height=0.62,
            color=STATE_COLOURS.get(row.state, BOUND),
            alpha=0.85 if row.counted else 0.35,
            ec="white",
            lw=0.6,
        )
        if width > 0.02 * seconds / unit:
            axes.text(
                start + width / 2,
                workers.index(row.worker),
                str(row.number),
                ha="center",
                va="center",
                fontsize=7,
                color="#fefefe",
            )
    axes.set_yticks(range(len(workers)), workers)
    axes.set_ylim(len(workers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{name} since the first trial began")
    axes.grid(axis="x", color=LINE)
    shown = [state for state in STATE_COLOURS if (trials["state"] == state).any()]
    handles = [Line2D([], [], color=STATE_COLOURS[s], lw=6, label=s) for s in shown]
    if not trials["counted"].all():
        handles.append(Line2D([], [], color=BOUND, lw=6, alpha=0.4, label="pale: taken up again"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    return figure
