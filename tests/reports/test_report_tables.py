"""reports/report_tables.py: numbers of the tables, checked by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy.stats import spearmanr

from glua_bench.reports import comparison, report_tables, statistics
from glua_bench.reports.results import from_rows, from_runs

TASK = "phantom mr-ct"


def column(table, title, group=""):
    found = [c for c in table.columns if (c.title, c.group) == (title, group)]
    assert len(found) == 1, [(c.title, c.group) for c in table.columns]
    return dict(zip(table.rows, found[0].values, strict=True))


@pytest.fixture
def compared(made_runs):
    made_runs.comparison()
    return made_runs


def test_the_main_table_has_the_usual_columns(compared):
    compared.add("glua", 0.9, settings={"mask": "random"})  # belongs to the ablation
    table = report_tables.main(from_runs(compared.root), TASK)
    assert list(table.rows) == ["source_only", "slaug", "glua", "supervised (privileged)"]
    assert table.groups[:2] == [("Dice (%)", 3), ("ASSD (mm)", 3)]
    assert column(table, "MYO", "Dice (%)")["glua"] == pytest.approx(57)  # 62 - 5
    assert column(table, "LAC", "Dice (%)")["glua"] == pytest.approx(67)
    assert column(table, "mean", "Dice (%)")["glua"] == pytest.approx(62)
    spread = table.columns[2].spread
    assert spread[list(table.rows).index("glua")] == pytest.approx(2)  # of 60, 62, 64
    assert column(table, "mean", "ASSD (mm)")["slaug"] == pytest.approx(4.8)
    gap = column(table, "gap recov. (%)")
    # (60 - 20) / (80 - 20), (62 - 22) / (81 - 22), (64 - 24) / (82 - 24)
    assert gap["glua"] == pytest.approx(100 * (40 / 60 + 40 / 59 + 40 / 58) / 3)
    assert pd.isna(gap["source_only"]) and pd.isna(gap["supervised (privileged)"])
    assert table.place(2, 2) == "best" and table.place(3, 2) == ""
    assert all(len(ids) == 3 for ids in table.ids)
    # Three cases are too few for tests.
    assert not table.marks
    assert any(note.startswith("No tests: 6 test cases are required") for note in table.notes)


def test_six_cases_are_tested(made_runs):
    made_runs.cases = tuple(f"case_{i}" for i in range(6))
    made_runs.comparison()
    results = from_runs(made_runs.root)
    table = report_tables.main(results, TASK)
    assert table.marks == {(0, 2): "†", (1, 2): "†"}
    (note,) = (n for n in table.notes if n.startswith("†"))
    assert "significantly lower than glua" in note and "over 3 pairs; 6 cases, 3 seeds" in note
    found = statistics.pairs(comparison.competing(statistics.scores(results.of(TASK), TASK)))
    assert (found["p_holm"] < 0.05).all() and len(found) == 3
    ranks = report_tables.ranking(results, TASK)
    assert list(column(ranks, "from", "rank interval").values()) == [1, 2, 3]
    assert list(column(ranks, "to", "rank interval").values()) == [1, 2, 3]
    pairs = report_tables.pairs(results, TASK)
    assert set(column(pairs, "p (Holm)")) == set(pairs.rows)
    assert any("6 cases and 3 seeds" in n for n in ranks.notes)
    assert any("over all 3 pairs" in n for n in pairs.notes)


def test_unused_marks_are_not_explained(made_runs):
    made_runs.cases = tuple(f"case_{i}" for i in range(6))
    for seed, dice in enumerate((0.4, 0.6)):
        made_runs.add("glua", dice, seed)
        made_runs.add("sifa", 1 - dice + 0.01, seed)
    results = from_runs(made_runs.root)
    table = report_tables.main(results, TASK)
    assert not table.marks and not any("†" in note for note in table.notes)
    assert any("No entry is significantly lower than sifa, the best mean" in n for n in table.notes)
    pairs = report_tables.pairs(results, TASK)  # one pair, so there is nothing to correct
    assert not any("Holm" in text for text in (*pairs.notes, *(c.title for c in pairs.columns)))
    assert not any("1 pairs" in note for note in (*table.notes, *pairs.notes))


def test_an_incomplete_row_is_neither_best_nor_second(made_runs):
    made_runs.comparison()
    made_runs.add("fda", 0.9, 0)
    results = from_runs(made_runs.root)
    table = report_tables.main(results, TASK)
    names = list(table.rows)
    places = {name: table.place(row, 2) for row, name in enumerate(names)}
    assert places["glua"] == "best" and places["slaug"] == "second" and places["fda"] == ""
    assert column(table, "seeds")["fda"] == 1 and column(table, "seeds")["glua"] == 3
    told = "fda lacks seeds 1 and 2 and is excluded from intervals, tests and ranks."
    for made in (table, report_tables.ranking(results, TASK), report_tables.pairs(results, TASK)):
        assert told in made.notes
    assert "fda" not in report_tables.ranking(results, TASK).rows
    cost = report_tables.cost(results, TASK)
    assert cost.place(list(cost.rows).index("fda"), 0) == ""


def test_repeats_are_a_column_and_are_listed(made_runs, tmp_path):
    made_runs.comparison()
    made_runs.add("glua", 0.5, settings={"mask": "random"})
    found = from_runs(made_runs.root)
    own = found.of(TASK)
    own = own[(own["entry"] == "glua") & (own["seed"] == 0)].astype({"run": str})
    more = [own.assign(run=f"again{k}", perturbation=k, dice=own["dice"] + 0.1 * k) for k in (1, 2)]
    pd.concat([found.rows.astype({"run": str}), *more]).to_parquet(tmp_path / "rows.parquet")
    again = from_rows(tmp_path / "rows.parquet")
    assert len(again.repeats) == 2 * len(own) and len(again.rows) == len(found.rows)
    table, without = report_tables.main(again, TASK), report_tables.main(found, TASK)
    bits = column(table, "last bits ±", "Dice (%)")
    assert bits["glua"] == pytest.approx(10) and pd.isna(bits["slaug"])  # of 0, 10, 20 more
    assert comparison.LAST_BITS in table.notes and comparison.NO_REPEATS in without.notes
    kept = [c for c in table.columns if c.title != "last bits ±"]
    for one, other in zip(kept, without.columns, strict=True):
        assert one.title == other.title
        assert one.values == pytest.approx(other.values, nan_ok=True)
    for other in (report_tables.pairs, report_tables.ranking, report_tables.cost):
        assert other(again, TASK).frame().equals(other(found, TASK).frame())
    assert (
        report_tables.ablation(again, "glua")
        .frame()
        .equals(report_tables.ablation(found, "glua").frame())
    )
    listed = report_tables.runs(again)
    assert column(listed, "entry")["again2"] == "glua (repeat 2, last bits perturbed)"
    assert {"again1", "again2"} <= set(table.ids[list(table.rows).index("glua")])


def test_one_seed_has_neither_spread_nor_mark(made_runs):
    made_runs.comparison(seeds=1)
    results = from_runs(made_runs.root)
    table = report_tables.main(results, TASK)
    assert not table.marks and any(n.startswith("No tests: 2 seeds") for n in table.notes)
    assert report_tables.SPREAD not in table.notes
    assert any(note.startswith("Means over cases and structures, of one") for note in table.notes)
    pairs = report_tables.pairs(results, TASK)
    assert [c.title for c in pairs.columns] == ["difference", "low", "high"]
    assert column(pairs, "difference", "Dice (points)")["glua – slaug"] == pytest.approx(10)
    assert all(table.columns[2].spread_text(row) == "" for row in range(len(table.rows)))
    assert any("for this training of each method only" in note for note in pairs.notes)


def test_pairs_have_the_better_one_first(compared):
    table = report_tables.pairs(from_runs(compared.root), TASK)
    assert set(table.rows) == {"glua – slaug", "glua – source_only", "slaug – source_only"}
    assert column(table, "difference", "Dice (points)")["glua – slaug"] == pytest.approx(10)
    low, high = (column(table, name, "95 % CI")["glua – slaug"] for name in ("low", "high"))
    assert low <= 10.001 and high >= 9.999


def test_a_swapped_pair_swaps_its_interval(made_runs):
    made_runs.comparison(methods=("slaug", "glua"))  # the later one in the alphabet is better
    for seed in range(3, 5):  # with large variation
        made_runs.add("slaug", 0.7, seed)
        made_runs.add("glua", 0.3, seed)
        made_runs.add("source_only", 0.2, seed)
        made_runs.add("source_only", 0.8, seed, scenario="supervised")
    results = from_runs(made_runs.root)
    table = report_tables.pairs(results, TASK)
    row = {c.title: dict(zip(table.rows, c.values, strict=True)) for c in table.columns}
    scores = statistics.scores(results.of(TASK), TASK)
    found = statistics.pairs(scores[["slaug", "glua"]]).iloc[0]
    assert row["low"]["slaug – glua"] == pytest.approx(100 * found["low"])
    assert row["high"]["slaug – glua"] == pytest.approx(100 * found["high"])
    assert row["low"]["slaug – glua"] < row["difference"]["slaug – glua"]


def test_the_ranking_leaves_the_bound_out(compared):
    table = report_tables.ranking(from_runs(compared.root), TASK)
    assert list(table.rows) == ["glua", "slaug", "source_only"]
    assert list(column(table, "of the mean", "rank").values()) == [1, 2, 3]
    assert "rank interval" not in {c.group for c in table.columns}


def test_selectors_are_compared_on_the_seeds_that_all_judged(made_runs):
    made_runs.add("glua", 0.6, 0, selectors={"im": 0.5})
    made_runs.add("glua", 0.9, 1)
    table = report_tables.selectors(from_runs(made_runs.root), TASK)
    assert column(table, "last")["glua"] == pytest.approx(60)
    assert column(table, "im")["glua"] == pytest.approx(50) and column(table, "seeds")["glua"] == 1


def test_seeds_with_different_selectors_share_those_that_all_have(made_runs):
    """Runs with different --selectors: what is missing is a dash, and no entry is left out."""
    made_runs.add("glua", 0.6, 0, selectors={"im": 0.5})
    made_runs.add("glua", 0.8, 1, selectors={"bnm": 0.7})
    made_runs.add("advent", 0.4, 0, selectors={"im": 0.3, "bnm": 0.2})
    table = report_tables.selectors(from_runs(made_runs.root), TASK)
    assert column(table, "last")["glua"] == pytest.approx(70)
    assert column(table, "seeds")["glua"] == 2
    assert math.isnan(column(table, "im")["glua"]) and math.isnan(column(table, "bnm")["glua"])
    assert column(table, "im")["advent"] == pytest.approx(30)


def test_a_value_with_fewer_seeds_is_not_the_best_of_a_curve(made_runs):
    for seed in range(2):
        made_runs.add("glua", 0.5, seed)
        made_runs.add("glua", 0.55, seed, settings={"mask_ratio": 0.7})
    made_runs.add("glua", 0.9, 0, settings={"mask_ratio": 0.1})
    points = report_tables.curves(from_runs(made_runs.root), "glua")["mask_ratio"]
    table = report_tables.curve("glua", "mask_ratio", points)
    places = {name: table.place(row, 0) for row, name in enumerate(table.rows)}
    assert places == {"0.1": "", "0.3 (default)": "second", "0.7": "best"}


def test_costs_are_of_the_runs(compared):
    table = report_tables.cost(from_runs(compared.root), TASK)
    assert column(table, "training (s)")["glua"] == 100
    assert column(table, "s/update")["glua"] == pytest.approx(0.2)
    assert column(table, "device")["glua"] == "CPU, 1 thread"


def test_an_ablation_lists_bounds_parts_and_variants_in_order(compared):
    for seed in range(3):
        compared.add("global_only", 0.55, seed)
        compared.add("glua", 0.58, seed, settings={"mask": "random"})
        compared.add("glua", 0.57, seed, settings={"gain": "none", "lambda_output": 0.0})
        for ratio in (0.1, 0.7):
            compared.add("glua", 0.5 + ratio / 10, seed, settings={"mask_ratio": ratio})
        compared.add("glua", 0.4, seed, settings={"codes_blocks": 1})
    results = from_runs(compared.root)
    assert report_tables.ablated(results) == ["glua"]
    table = report_tables.ablation(results, "glua")
    assert list(table.rows) == [
        "source_only",
        "global_only",
        "Step A + D1",
        "random mask (ours)",
        "GLUA",
        "glua, codes_blocks = 1",
        "supervised (privileged)",
    ]
    assert column(table, "Dice (%)", TASK)["GLUA"] == pytest.approx(62)
    assert column(table, "Dice (%)", TASK)["random mask (ours)"] == pytest.approx(58)
    assert set(column(table, "seeds", TASK).values()) == {3}

    curves = report_tables.curves(results, "glua")
    assert list(curves) == ["mask_ratio"]  # two values of codes_blocks are no curve
    points = curves["mask_ratio"]
    assert sorted(points["value"].unique()) == [0.1, 0.3, 0.7] and len(points) == 9
    assert set(points.loc[~points["changed"], "value"]) == {0.3}
    shown = report_tables.curve("glua", "mask_ratio", points)
    assert list(shown.rows) == ["0.1", "0.3 (default)", "0.7"]
    assert column(shown, "Dice (%)", TASK)["0.7"] == pytest.approx(57)


def test_runs_of_an_older_version_stand_beside_those_of_today(made_runs):
    """Settings that no longer exist have a curve of their own."""
    made_runs.add("source_only", 0.2)
    made_runs.add("glua", 0.6)
    for weight in (0.1, 0.5, 0.9):
        changed = {"lambda_local": weight}
        older = {"changed": changed, "variant": ""}
        made_runs.add("glua", weight, environment=older, method_config={"mask": "topk", **changed})
    curves = report_tables.curves(from_runs(made_runs.root), "glua")
    assert {name: list(points["value"]) for name, points in curves.items()} == {
        "lambda_local": [0.1, 0.5, 0.9]
    }


def test_selectors_are_judged_by_the_oracle(made_runs):
    for seed in range(2):
        made_runs.add("source_only", 0.2, seed)
        made_runs.add("glua", 0.6, seed, selectors={"im": 0.5, "oracle": 0.65 + 0.05 * seed})
    results = from_runs(made_runs.root)
    table = report_tables.selectors(results, TASK)
    assert [c.title for c in table.columns] == ["last", "im", "oracle (privileged)", "seeds"]
    assert column(table, "oracle (privileged)")["glua"] == pytest.approx(67.5)
    assert pd.isna(column(table, "im")["source_only"])
    regret = report_tables.regrets(results).set_index(["selector", "seed"])["regret"]
    assert regret.to_dict() == pytest.approx(
        {("last", 0): 0.05, ("last", 1): 0.10, ("im", 0): 0.15, ("im", 1): 0.20}
    )
    quality = report_tables.selector_quality(results)
    assert list(quality.rows) == ["last", "im"]  # the smallest regret first
    assert column(quality, "regret", TASK)["im"] == pytest.approx(17.5)
    assert any("privileged" in note for note in quality.notes)


def test_correlations_are_spearman_s_over_all_checkpoints(made_runs):
    made_runs.add("glua", 0.6, 0, selectors={"im": 0.5, "oracle": 0.65})
    made_runs.add("glua", 0.6, 1, selectors={"im": 0.1, "oracle": 0.70})
    results = from_runs(made_runs.root)
    found = report_tables.correlations(results).set_index("selector")
    # A run's candidates have 0.9 and 1 times the mean that it was made with.
    im, oracle = [0.45, 0.5, 0.09, 0.1], [0.585, 0.65, 0.63, 0.70]
    assert found.loc["im", "pooled"] == pytest.approx(spearmanr(im, oracle).statistic)
    assert found.loc["im", "within"] == pytest.approx(1) and found.loc["im", "checkpoints"] == 4
    assert "oracle" not in found.index and "last" not in found.index


def test_without_an_oracle_there_is_no_regret(compared):
    results = from_runs(compared.root)
    assert report_tables.selector_quality(results) is None
    assert report_tables.regrets(results).empty and report_tables.correlations(results).empty


def test_every_run_is_listed(compared):
    table = report_tables.runs(from_runs(compared.root))
    assert len(table.rows) == 12 and len(set(table.rows)) == 12
    assert column(table, "entry")["000000000003"] == "glua"
    assert column(table, "Dice (%)")["000000000003"] == pytest.approx(60)
    # Tasks, seeds and the upper bound stand side by side: nothing is best.
    places = {table.place(row, at) for row in range(12) for at in range(len(table.columns))}
    assert places == {""}
