"""reports/charts.py: the drawn values, read back from the figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from glua_bench.reports import charts, comparison, report_tables, statistics
from glua_bench.reports.results import from_runs, plain

TASK = "phantom mr-ct"


@pytest.fixture
def results(made_runs):
    made_runs.comparison()
    for seed in range(3):
        for ratio in (0.1, 0.7):
            made_runs.add("glua", 0.5 + ratio / 10, seed, settings={"mask_ratio": ratio})
    return from_runs(made_runs.root)


@pytest.fixture
def palette(results):
    return charts.Palette([str(entry) for entry in results.rows["entry"].unique()])


def test_entries_have_looks_of_their_own():
    entries = [f"m{i}" for i in range(40)]
    palette = charts.Palette([*entries, "source_only", "supervised"])
    looks = {palette.look(e) for e in entries}
    assert len(looks) == 40
    assert palette.colour("source_only") == palette.colour("supervised") == charts.BOUND
    assert charts.BOUND not in {colour for colour, _ in looks}


def test_every_case_and_seed_is_a_dot(results, palette, texts):
    rows = plain(results.of(TASK))
    entries = report_tables.entries_of(results, TASK)
    figure = charts.scores(rows, entries, palette)
    assert [axes.get_title() for axes in figure.axes] == ["MYO", "LAC", "mean"]
    for axes in figure.axes:
        dots = sum(len(c.get_offsets()) for c in axes.collections)
        assert dots == 4 * 3 * 3  # entries, seeds, cases
    means = figure.axes[2].lines[-1].get_xdata()
    assert list(means) == pytest.approx([0.22, 0.52, 0.62, 0.81])
    assert "supervised (privileged)" in texts(figure)


def test_gaps_are_drawn_from_the_smallest_to_the_largest_seed(results, palette):
    lines = comparison.table(plain(results.of(TASK)))
    figure = charts.gaps(lines, palette)
    spans = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    wanted = 100 * lines.loc[(TASK, "glua"), ["gap min", "gap max"]].to_numpy(float)
    assert any(np.allclose(span, wanted) for span in spans)


def test_costs_and_curves_show_every_point(results, palette):
    lines = comparison.table(plain(results.of(TASK)))
    figure = charts.cost_quality(lines, palette)
    points = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert sorted(points[:, 1]) == pytest.approx([0.22, 0.52, 0.62, 0.81])
    points = report_tables.curves(results, "glua")["mask_ratio"]
    control = pd.DataFrame({"task": [TASK] * 2, "seed": [0, 1], "dice": [0.4, 0.5]})
    figure = charts.curve(points, "mask_ratio", {"random": control})
    joined = figure.axes[0].lines[1]
    assert list(joined.get_xdata()) == [0.1, 0.3, 0.7]
    assert list(joined.get_ydata()) == pytest.approx([0.51, 0.62, 0.57])
    level = [line for line in figure.axes[0].lines if line.get_label() == "random"]
    assert level[0].get_ydata()[0] == pytest.approx(0.45)


def test_intervals_are_drawn_from_end_to_end(results, palette, texts):
    scores = comparison.competing(statistics.scores(plain(results.of(TASK)), TASK))
    spans = statistics.intervals(scores)
    figure = charts.intervals(spans, palette)
    assert {"glua", "slaug", "source_only"} <= texts(figure)
    drawn = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert np.allclose(drawn, 100 * spans[["low", "high"]].to_numpy())


def test_a_task_without_a_gap_has_no_panel(made_runs, palette):
    made_runs.comparison()
    for seed in range(3):
        made_runs.add("source_only", 0.5, seed, direction="ct-mr")
        made_runs.add("source_only", 0.4, seed, scenario="supervised", direction="ct-mr")
        made_runs.add("glua", 0.6, seed, direction="ct-mr")
    lines = comparison.table(plain(from_runs(made_runs.root).chosen_by("last")))
    figure = charts.gaps(lines, palette)
    assert [axes.get_title() for axes in figure.axes] == [TASK]


def test_learning_marks_what_was_chosen(made_runs, texts):
    made_runs.add("glua", 0.6, selectors={"source_val": 0.7, "oracle": 0.65})
    results = from_runs(made_runs.root)
    chosen = results.rows[["entry", "seed", "selector", "step"]].drop_duplicates()
    figure = charts.learning(results.checkpoints, chosen, ["glua"], charts.Palette(["glua"]))
    top, low = figure.axes
    assert [list(line.get_ydata()) for line in top.lines] == [
        pytest.approx([0.63, 0.7]),
        pytest.approx([0.585, 0.65]),
    ]
    marks = [tuple(c.get_offsets()[0]) for c in low.collections]
    assert marks == [(500, 0), (500, 1)]  # last and source_val; the oracle chooses nothing
    assert "target test cases (privileged)" in texts(figure)


def test_a_heat_map_shows_every_case(texts):
    table = pd.DataFrame([[0.1, 0.9], [np.nan, 0.5]], index=["a", "b"], columns=["c1", "c2"])
    figure = charts.heat_map(table)
    shown = texts(figure)
    assert {"0.10", "0.90", "0.50", "c1", "c2"} <= shown and "nan" not in shown


def test_names_are_drawn_as_they_are_and_files_are_the_same_again(tmp_path):
    name = r"$\frac{a}{b}$ <script>&"
    table = pd.DataFrame([[0.1, 0.9]], index=[name], columns=["c1", "c2"])
    written = charts.files(charts.heat_map(table), tmp_path / "chart")
    assert [path.name for path in written] == ["chart.png", "chart.svg", "chart.pdf"]
    text = written[1].read_text()
    # The text itself, beside which the drawing has it in a comment, too.
    assert r">$\frac{a}{b}$ &lt;script&gt;&amp;</text>" in text and "<script>" not in text
    again = charts.files(charts.heat_map(table), tmp_path / "again" / "chart")
    assert again[1].read_text() == text
