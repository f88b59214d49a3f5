"""reports/statistics.py: against references, and omitted where data are too few."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from glua_bench.errors import DataError
from glua_bench.reports.statistics import (
    Means,
    design,
    intervals,
    last_bits,
    ordinary,
    pairs,
    ranking,
    scores,
    untested,
)

ROOT = Path(__file__).parents[2]


def made(seeds: int = 3, cases: int = 6, entries: str = "abc", seed: int = 0) -> pd.DataFrame:
    """Return crossed scores with effects of entry, case and seed."""
    rng = np.random.default_rng(seed)
    of_case, of_seed = rng.normal(0, 0.1, cases), rng.normal(0, 0.02, seeds)
    index = pd.MultiIndex.from_product(
        [range(seeds), [f"case {c}" for c in range(cases)]], names=["seed", "case"]
    )
    table = pd.DataFrame(index=index)
    for position, entry in enumerate(entries):
        noise = rng.normal(0, 0.02, (seeds, cases))
        table[entry] = (0.5 + 0.1 * position + of_case + of_seed[:, None] + noise).ravel()
    return table.rename_axis(columns="entry")


def rows_of(have: dict[str, list[int]], cases: str = "xy") -> pd.DataFrame:
    """Return rows of entries with the given seeds."""
    rows = [
        (entry, "task", seed, case, "s", 0.5 + 0.1 * seed, "last")
        for entry, seeds in have.items()
        for seed in seeds
        for case in cases
    ]
    columns = ["entry", "task", "seed", "case", "structure", "dice", "selector"]
    return pd.DataFrame(rows, columns=columns)


def cube(table: pd.DataFrame, entry: str) -> np.ndarray:
    return table[entry].unstack("case").to_numpy()


# -- what is compared -----------------------------------------------------------------------------


def test_no_case_with_a_score_in_every_run_is_an_error() -> None:
    rows = rows_of({"a": [0, 1], "b": [0, 1]})
    with pytest.raises(DataError, match="task: no test case has a score in every run"):
        design(rows.assign(dice=np.nan))
    # Each case is undefined in some run.
    rows.loc[(rows["entry"] == "a") == (rows["case"] == "x"), "dice"] = np.nan
    with pytest.raises(DataError, match="test on cases with structures"):
        scores(rows, "task")


def test_scores_are_means_over_structures() -> None:
    rows = []
    for entry, seed, case in itertools.product("ab", (0, 1), ("x", "y")):
        for structure, dice in (("s", 0.2), ("t", 0.6), ("u", np.nan)):
            rows.append((entry, "task", seed, case, structure, dice + (entry == "b"), "last"))
    columns = ["entry", "task", "seed", "case", "structure", "dice", "selector"]
    frame = pd.DataFrame(rows, columns=columns)
    other = frame.assign(selector="source_val", dice=9.0)
    table = scores(pd.concat([frame, other, frame.assign(task="else", dice=7.0)]), "task")
    assert list(table.index) == [(0, "x"), (0, "y"), (1, "x"), (1, "y")]
    assert np.allclose(table["a"], 0.4) and np.allclose(table["b"], 1.4)


@pytest.mark.parametrize(
    ("have", "entries", "seeds", "notes"),
    [
        ({"a": [0, 1, 2], "b": [0, 1, 2]}, "ab", [0, 1, 2], []),
        # An incomplete entry removes no seed from the others.
        (
            {"a": [0, 1, 2], "b": [0, 1, 2], "glua": [0, 2]},
            "ab",
            [0, 1, 2],
            ["glua lacks seed 1 and is excluded from intervals, tests and ranks."],
        ),
        (
            {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0], "d": [1], "e": [0, 1, 2]},
            "abe",
            [0, 1, 2],
            [
                "c lacks seeds 1 and 2 and is excluded from intervals, tests and ranks.",
                "d lacks seeds 0 and 2 and is excluded from intervals, tests and ranks.",
            ],
        ),
        # Additional seeds of one entry are not used.
        (
            {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2, 3, 4]},
            "abc",
            [0, 1, 2],
            ["Seeds 3 and 4 not used: missing in some entries."],
        ),
        (
            {"a": [0, 1, 2], "b": [0, 2]},
            "ab",
            [0, 2],
            ["Seed 1 not used: missing in some entries."],
        ),
        # The same with more seeds.
        ({"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 4], "c": [0, 1, 2, 3]}, "ab", range(5), None),
        # Two entries with more seeds do not exclude the others.
        ({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0], "d": [0]}, "abcd", [0], None),
        ({"a": [0, 1], "b": [2]}, "a", [0, 1], None),
    ],
)
def test_incomplete_entries_are_excluded_with_a_note(
    have: dict[str, list[int]], entries: str, seeds: Sequence[int], notes: list[str] | None
) -> None:
    rows = rows_of(have)
    found = design(rows)
    assert (list(found.entries), list(found.seeds)) == (list(entries), list(seeds))
    if notes is not None:
        assert list(found.notes) == notes
    table = scores(rows, "task")
    assert list(table.columns) == list(entries) and len(table) == 2 * len(seeds)
    assert not table.isna().any(axis=None)


def test_an_entry_without_some_case_of_a_seed_lacks_the_seed() -> None:
    rows = rows_of({"a": [0, 1], "b": [0, 1], "c": [0, 1]})
    rows = rows[~((rows["entry"] == "c") & (rows["seed"] == 1) & (rows["case"] == "y"))]
    found = design(rows)
    assert found.entries == ("a", "b") and found.cases == ("x", "y")
    assert found.notes[0].startswith("c lacks seed 1")


def test_a_case_with_an_undefined_score_is_excluded_for_all() -> None:
    """Dice is undefined if neither mask has a structure; a false positive has Dice 0."""
    rows = rows_of({"a": [0, 1], "b": [0, 1]}, "xyz")
    rows.loc[(rows["case"] == "z"), "dice"] = 0.0
    rows.loc[(rows["case"] == "z") & (rows["entry"] == "a"), "dice"] = np.nan
    found = design(rows)
    assert found.cases == ("x", "y") and found.entries == ("a", "b")
    assert found.notes[0].startswith("Case z excluded: undefined score in some run")
    assert set(found.of(rows)["case"]) == {"x", "y"}


# -- the model ------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_mean_squares() -> None:
    """Computed by hand for an additive table: rows 0, 1, 2 plus columns 0, 10, 20, 30."""
    values = np.add.outer([0.0, 1.0, 2.0], [0.0, 10.0, 20.0, 30.0])
    found = Means.of(values[None])
    a, b = 4 * 1.0, 3 * np.var([0, 10, 20, 30], ddof=1)  # the rest is 0
    assert found.mean.item() == 16 and found.share.item() == pytest.approx(a / (a + b))
    assert found.error.item() == pytest.approx(math.sqrt((a + b) / 12))
    low, high = found.interval()
    student = (a * stats.t.isf(0.025, 2) + b * stats.t.isf(0.025, 3)) / (a + b)
    assert (high - low).item() / 2 == pytest.approx(student * found.error.item())


def test_the_rest_takes_half_of_the_variance_at_most() -> None:
    """Otherwise a variance could be negative if the residual is larger than both."""
    values = np.array([[1.0, 0.0], [0.0, 1.0]])  # all means are alike
    assert Means.of(values[None]).error.item() == 0
    rng = np.random.default_rng(0)
    many = rng.normal(size=(500, 3, 4))
    found = Means.of(many)
    a, b = 4 * many.mean(2).var(1, ddof=1), 3 * many.mean(1).var(1, ddof=1)
    assert (found.error >= np.sqrt((a + b) / 2 / 12) - 1e-12).all()


def test_one_seed_has_student_s_interval_over_cases() -> None:
    table = made(seeds=1)
    found = intervals(table).loc["b"]
    reference = stats.ttest_1samp(table["b"], 0.5)
    low, high = reference.confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    cubes = (cube(table, "b") - 0.5)[None]
    assert Means.of(cubes).p().item() == pytest.approx(reference.pvalue)


def test_one_case_has_no_interval() -> None:
    table = made(cases=1)
    assert intervals(table)[["low", "high"]].isna().all(axis=None)
    assert intervals(table)["mean"].tolist() == pytest.approx(table.mean().tolist())
    assert pairs(table)[["low", "high", "p", "p_holm"]].isna().all(axis=None)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(2, 8),
    st.floats(-2, 2),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_p_is_below_a_level_where_the_interval_leaves_zero_out(
    seed: int, seeds: int, cases: int, mean: float, of_seed: float, of_case: float
) -> None:
    rng = np.random.default_rng(seed)
    values = mean + rng.normal(size=(1, seeds, cases))
    values += of_seed * rng.normal(size=(1, seeds, 1)) + of_case * rng.normal(size=(1, 1, cases))
    found = Means.of(values)
    for level in (0.5, 0.95, 0.999):
        low, high = found.interval(level)
        p = found.p().item()
        if abs(p - (1 - level)) > 1e-9:
            assert (p < 1 - level) == (not low.item() <= 0 <= high.item())


def test_seeds_with_other_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="same cases"):
        intervals(made().iloc[:-1])


def test_pairs_are_paired_and_corrected_by_holm() -> None:
    table = made()
    found = pairs(table).set_index(["a", "b"])
    assert list(found.index) == [("a", "b"), ("a", "c"), ("b", "c")]
    single = {k: Means.of((cube(table, k[0]) - cube(table, k[1]))[None]) for k in found.index}
    for key, own in single.items():
        row = found.loc[key]
        assert row["difference"] == pytest.approx(own.mean.item())
        assert row["p"] == pytest.approx(own.p().item())
        assert (row["p"] < 0.05) == (not row["low"] <= 0 <= row["high"])
    assert list(found["p_holm"]) == pytest.approx(multipletests(found["p"], method="holm")[1])
    # Variation between cases is ten times larger than between entries: only pairing detects it.
    assert found.loc[("a", "c"), "p_holm"] < 0.05
    apart = intervals(table)
    assert apart.loc["a", "high"] > apart.loc["a", "mean"] + 0.05
    assert found.loc[("a", "b"), "high"] - found.loc[("a", "b"), "low"] < 0.05


def test_equal_entries_do_not_differ() -> None:
    table = made(entries="a").assign(b=lambda t: t["a"])
    row = pairs(table).iloc[0]
    assert (row["low"], row["high"], row["p"], row["p_holm"]) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("seeds", "cases", "said"),
    [
        (3, 6, ""),
        (2, 20, ""),
        (3, 4, "No tests: 6 test cases are required, found 4 cases (an exact sign test cannot go "
         "below p = 0.125)."),
        (1, 20, "No tests: 2 seeds (--seeds 3) are required, found 1 seed."),
        (1, 5, "No tests: 2 seeds (--seeds 3) and 6 test cases are required, found 1 seed and 5 "
         "cases (an exact sign test cannot go below p = 0.0625)."),
    ],
)  # fmt: skip
def test_tests_of_small_designs_are_omitted_with_a_reason(
    seeds: int, cases: int, said: str
) -> None:
    assert untested(seeds, cases) == said
    table = made(seeds, cases)
    tested = pairs(table)[["p", "p_holm"]].notna().all(axis=None)
    open_ = ranking(table)[["rank_low", "rank_high"]].notna().all(axis=None)
    assert tested == open_ == (not said)
    if cases == 4:  # what the sentence says of the exact test
        signs = list(itertools.product((-1, 1), repeat=4))
        assert 2 / len(signs) == 0.125


def test_two_untrained_networks_do_not_differ() -> None:
    """5.1 and 7.3 % Dice over 4 cases and 2 seeds must not be significant."""
    rng = np.random.default_rng(3)
    index = pd.MultiIndex.from_product([range(2), range(4)], names=["seed", "case"])
    table = pd.DataFrame(
        {"a": 0.051 + rng.normal(0, 0.01, 8), "b": 0.073 + rng.normal(0, 0.01, 8)}, index=index
    )
    (row,) = pairs(table).itertuples()
    assert math.isnan(row.p) and row.low < 0 < row.high


def test_rankings_of_both_kinds_can_differ() -> None:
    index = pd.MultiIndex.from_product([range(3), range(5)], names=["seed", "case"])
    steady = np.full(15, 0.60)
    wild = np.tile([0.61, 0.61, 0.61, 0.61, 0.10], 3)  # best in most cases, lost in one
    table = pd.DataFrame({"steady": steady, "wild": wild, "last": steady - 0.3}, index=index)
    found = ranking(table)
    assert found.index[0] == "steady"
    assert found.loc["steady", "rank"] == 1 and found.loc["wild", "rank"] == 2
    assert found.loc["wild", "mean_rank"] < found.loc["steady", "mean_rank"]
    assert ranking(table, higher=False).index[0] == "last"


def test_rank_intervals_contain_ranks_that_no_test_excludes() -> None:
    table = made(cases=8, entries="ad").assign(b=lambda t: t["a"] + 0.001)
    rng = np.random.default_rng(0)
    table["b"] += rng.normal(0, 0.02, len(table))
    table["d"] += 0.3  # far above both
    found = ranking(table[["a", "b", "d"]])
    low, high = found["rank_low"].to_dict(), found["rank_high"].to_dict()
    assert low == {"d": 1, "a": 2, "b": 2} and high == {"d": 1, "a": 3, "b": 3}
    turned = ranking(table[["a", "b", "d"]], higher=False)
    assert turned.loc["d", "rank_low"] == 3


# -- last bits ------------------------------------------------------------------------------------


def test_last_bits_are_pooled_over_seeds_and_enter_nothing_else() -> None:
    rows = rows_of({"a": [0, 1], "b": [0, 1]})
    assert last_bits(rows).empty and ordinary(rows) is rows
    rows["perturbation"] = 0
    assert last_bits(rows).empty
    more = []
    for seed, moved in ((0, (0.1, 0.4)), (1, (-0.2,))):
        for k, by in enumerate(moved, start=1):
            own = rows[(rows["entry"] == "a") & (rows["seed"] == seed)]
            more.append(own.assign(perturbation=k, dice=own["dice"] + by))
    every = pd.concat([rows, *more], ignore_index=True)
    found = last_bits(every)
    # Seed 0: 0.5, 0.6, 0.9; seed 1: 0.6, 0.4; by hand, over 2 and 1 degrees of freedom.
    pooled = math.sqrt((2 * np.var([0.5, 0.6, 0.9], ddof=1) + np.var([0.6, 0.4], ddof=1)) / 3)
    assert found.to_dict() == {("task", "a"): pytest.approx(pooled)}
    pd.testing.assert_frame_equal(scores(every, "task"), scores(rows, "task"))


# -- measured -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulation() -> Any:
    spec = importlib.util.spec_from_file_location("cov", ROOT / "benchmarks" / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def docs_table(name: str) -> pd.DataFrame:
    """Return a table of docs/protocol.md."""
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    lines = text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(cells[2:], columns=cells[0]).astype(float)


@pytest.mark.parametrize(("seeds", "cases"), [(1, 4), (2, 4), (2, 20), (3, 6), (5, 20)])
def test_the_docs_table_of_coverage_is_what_a_simulation_finds(
    simulation: Any, seeds: int, cases: int
) -> None:
    table = docs_table("coverage").set_index(["seeds", "cases"]).loc[(seeds, cases)]
    draws = 4000
    for name, sizes in simulation.PROFILES.items():
        rng = np.random.default_rng([7, seeds, cases])
        found = simulation.cell(rng, "normal", sizes, seeds, cases, draws, {})["covers"]
        said = table[name]
        assert abs(found - said) < 4 * 100 * math.sqrt(0.05 * 0.95 / draws), name


def test_the_docs_table_of_false_alarms_is_what_a_simulation_finds(simulation: Any) -> None:
    table = docs_table("false alarms").set_index(["seeds", "cases"])
    draws, sizes = 2000, simulation.PROFILES["difference"]
    for seeds, cases in ((2, 4), (3, 20)):
        rng = np.random.default_rng([8, seeds, cases])
        found = simulation.cell(rng, "normal", sizes, seeds, cases, draws, {}, old=True)
        row = table.loc[(seeds, cases)]
        for name in ("covers", "p<0.05", "99 %", "old covers", "old 99 %", "old p<0.05"):
            share = row[name] / 100
            error = 100 * math.sqrt(max(share * (1 - share), 0.01) / draws)
            assert abs(found[name] - row[name]) < 5 * error, (name, seeds, cases)
        assert found["old 99 %"] > 5 > found["99 %"]


def test_what_the_docs_say_of_the_table_is_in_it() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    table = docs_table("coverage")
    normal = table[["method", "difference", "seeds alike", "seeds apart", "rest only"]]
    said = re.search(r"in ([\d.]+) to ([\d.]+) % of the draws", text)
    assert said is not None
    assert [float(x) for x in said.groups()] == [normal.min(axis=None), normal.max(axis=None)]
    typical = table[["method", "difference"]]
    said = re.search(r"in ([\d.]+) to ([\d.]+) % for the measured sizes", text)
    assert said is not None
    assert [float(x) for x in said.groups()] == [typical.min(axis=None), typical.max(axis=None)]
    said = re.search(r"never in fewer than ([\d.]+) %", text)
    assert said is not None
    assert float(said[1]) == table[["resampled", "bounded"]].min(axis=None)


def test_the_sizes_of_the_simulation_are_those_of_the_results(simulation: Any) -> None:
    sizes, pools = simulation.measured()
    for name in ("method", "difference"):
        assert list(sizes.loc[name].round(1)) == list(simulation.PROFILES[name])
    for values in pools.values():
        assert abs(values.mean()) < 1e-12 and values.std() == pytest.approx(1)
