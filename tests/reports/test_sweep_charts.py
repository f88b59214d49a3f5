"""reports/sweep_charts.py: the drawn values, read back from the figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glua_bench.reports import charts, sweep_charts

RATIOS = [0.1, 0.3, 0.5, 0.7]


def offsets(axes):
    return [tuple(point) for c in axes.collections for point in np.asarray(c.get_offsets())]


@pytest.fixture
def sweep(made_sweep):
    """Four trials: the second is pruned, the third fails, the last is the best."""
    return made_sweep(
        {"mask_ratio": RATIOS, "mask": ["topk", "soft", "topk", "soft"]},
        [0.2, 0.5, 0.1, 0.6],
        states=["done", "pruned", "failed", "done"],
        scales={"mask_ratio": False, "mask": None},
        seen=[(0, 0, 0.1), (0, 1, 0.2), (1, 0, 0.05), (3, 0, 0.3), (3, 1, 0.6)],
    )


def test_history_marks_every_kind_of_trial(sweep, texts):
    figure = sweep_charts.history(sweep.counted, sweep.seen, "im", sweep.chosen)
    axes = figure.axes[0]
    best, done, pruned, failed = axes.lines
    assert list(best.get_xdata()) == [0, 3] and list(best.get_ydata()) == [0.2, 0.6]
    assert list(done.get_ydata()) == [0.2, 0.6]
    assert (list(pruned.get_xdata()), list(pruned.get_ydata())) == ([1], [0.05])
    assert list(failed.get_xdata()) == [2]
    assert offsets(axes) == [(3.0, 0.6)]
    assert {"finished", "pruned, at its last value", "failed", "chosen"} <= texts(figure)


def test_a_history_without_values_is_drawn(made_sweep):
    sweep = made_sweep({"lr": [0.1]}, [0.1], states=["failed"])
    assert sweep.chosen is None
    assert len(sweep_charts.history(sweep.counted, sweep.seen, "im", None).axes[0].lines) == 1


def test_slices_have_a_panel_for_each_parameter(sweep):
    figure = sweep_charts.slices(sweep.done, sweep.parameters, "im", sweep.chosen)
    number, word = figure.axes[:2]
    assert sorted(offsets(number)) == [(0.1, 0.2), (0.7, 0.6), (0.7, 0.6)]  # the star twice
    assert [t.get_text() for t in word.get_xticklabels()] == ["soft", "topk"]
    assert sorted(offsets(word)) == [(0.0, 0.6), (0.0, 0.6), (1.0, 0.2)]


def test_contours_need_enough_places_in_a_plane(made_sweep):
    rng = np.random.default_rng(0)
    a, b = 10 ** rng.uniform(-4, 0, 12), rng.uniform(0, 1, 12)
    quality = [float(v) for v in -((np.log10(a) + 2) ** 2) - b]
    sweep = made_sweep({"a": list(a), "b": list(b)}, quality, scales={"a": True, "b": False})
    assert sweep_charts.can_contour(sweep.done, "a", "b")
    assert not sweep_charts.can_contour(sweep.done.head(9), "a", "b")
    line = made_sweep({"a": [0.1, 0.2] * 6, "b": list(b)}, quality)
    assert not sweep_charts.can_contour(line.done, "a", "b")
    figure = sweep_charts.contours(sweep.done, sweep.parameters, [("a", "b")], "im", sweep.chosen)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"
    assert sorted(axes.lines[0].get_xdata()) == pytest.approx(sorted(a))
    best = sweep.settings(sweep.chosen)
    assert (best["a"], best["b"]) in offsets(axes)


def test_importances_are_written_at_their_bars(made_sweep, texts):
    import pandas as pd

    figure = sweep_charts.importances(pd.Series({"a": 0.75, "b": 0.25}), "im")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.75, 0.25]
    assert {"75 %", "25 %", "a", "b"} <= texts(figure)


def test_the_curve_shows_seeds_and_their_spread(made_sweep, texts):
    sweep = made_sweep(
        {"mask_ratio": RATIOS},
        [0.1, 0.4, 0.3, 0.2],
        dice=[[0.5, 0.7], [0.6, 0.6], [0.8, 0.9], [0.4, 0.5]],
        directions=("mr-ct", "ct-mr"),
    )
    points = sweep.runs.assign(value=[RATIOS[t] for t in sweep.runs["trial"]])
    alone = sweep_charts.curve(points, "mask_ratio", False, "im", dice=False)
    assert len(alone.axes) == 1 and not any("Dice" in text for text in texts(alone))
    figure = sweep_charts.curve(points, "mask_ratio", False, "im", dice=True)
    known, after = figure.axes
    dots, mean, *_ = known.lines
    assert len(dots.get_xdata()) == 8  # four values, two seeds
    assert list(mean.get_ydata()) == pytest.approx([0.105, 0.405, 0.305, 0.205])
    assert list(after.lines[1].get_ydata()) == pytest.approx([0.6, 0.6, 0.85, 0.45])
    levels = {line.get_label(): line.get_xdata()[0] for line in after.lines}
    assert levels["chosen by im"] == 0.3 and levels["highest test Dice"] == 0.5
    assert "post hoc" in after.get_title()
    band = after.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.4) and band[:, 1].max() == pytest.approx(0.9)


def test_agreement_names_the_correlation(made_sweep, texts):
    sweep = made_sweep({"lr": RATIOS}, [0.1, 0.2, 0.3, 0.4])
    table = sweep.done.assign(dice=[0.5, 0.4, 0.6, 0.3], sd=math.nan)
    figure = sweep_charts.agreement(table, "im", 3, -0.4)
    assert "Spearman's ρ = -0.40 over 4 trials" in texts(figure)
    assert (0.4, 0.3) in offsets(figure.axes[0]) and (0.3, 0.6) in offsets(figure.axes[0])


def test_the_front_is_drawn_apart_from_dominated_trials(made_sweep):
    sweep = made_sweep({"lr": RATIOS}, [0.1, 0.4, 0.3, 0.2], costs=[5.0, 20.0, 30.0, 10.0])
    assert sweep.front == [0, 1, 3]
    figure = sweep_charts.front(sweep.done, "im", "seconds", sweep.front)
    beaten, steps, _ = figure.axes[0].lines
    assert list(beaten.get_xdata()) == [30.0]
    assert list(steps.get_xdata()) == [5.0, 10.0, 20.0]


def test_courses_end_where_a_trial_was_pruned(sweep, texts):
    figure = sweep_charts.courses(sweep.seen, sweep.counted, "im", sweep.chosen)
    lines = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert [0.1, 0.2] in lines and [0.3, 0.6] in lines
    assert lines.count([0.05]) == 2  # its course, and the cross at its end
    assert {"finished", "pruned", "chosen"} <= texts(figure)


def test_the_time_line_has_a_row_for_each_worker(made_sweep, texts):
    sweep = made_sweep(
        {"lr": RATIOS},
        [0.1, 0.2, 0.3, 0.4],
        states=["failed", "done", "pruned", "done"],
        counted=[False, True, True, True],
    )
    figure = sweep_charts.time_line(sweep.trials)
    bars = figure.axes[0].patches
    assert [round(bar.get_y() + bar.get_height() / 2) for bar in bars] == [0, 1, 0, 1]
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 1, 2, 3])
    assert figure.axes[0].get_xlabel().startswith("minutes")
    assert sum(bars[0].get_facecolor()) > sum(bars[1].get_facecolor())
    assert "pale: restarted" in texts(figure)


def test_pngs_are_white_and_svgs_transparent(made_sweep, tmp_path):
    from matplotlib.image import imread

    sweep = made_sweep({"lr": RATIOS}, [0.1, 0.2, 0.3, 0.4])
    figure = sweep_charts.history(sweep.counted, sweep.seen, "im", 3)
    png, svg, pdf = charts.files(figure, tmp_path / "chart")
    corner = imread(png)[0, 0]
    assert list(corner[:3]) == [1.0, 1.0, 1.0] and (len(corner) == 3 or corner[3] == 1.0)
    before = svg.read_bytes(), pdf.read_bytes()
    charts.files(figure, tmp_path / "chart")
    assert (svg.read_bytes(), pdf.read_bytes()) == before
