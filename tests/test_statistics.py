"""reports/statistics.py: against references, and honest where there is too little to say."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from glua_bench.reports.statistics import (
    friedman,
    intervals,
    pairs,
    ranking,
    resamples,
    scores,
)


def made(seeds: int = 3, cases: int = 6, entries: str = "abc", seed: int = 0) -> pd.DataFrame:
    """Crossed scores with effects of entry, case and seed."""
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


def test_scores_are_means_over_structures_of_what_all_have() -> None:
    rows = []
    for entry, seed, case in itertools.product("ab", (0, 1), ("x", "y")):
        if (entry, seed, case) == ("b", 1, "y"):
            continue
        for structure, dice in (("s", 0.2), ("t", 0.6), ("u", np.nan)):
            rows.append((entry, "task", seed, case, structure, dice + (entry == "b"), "last"))
    columns = ["entry", "task", "seed", "case", "structure", "dice", "selector"]
    frame = pd.DataFrame(rows, columns=columns)
    other = frame.assign(selector="source_val", dice=9.0)
    table = scores(pd.concat([frame, other, frame.assign(task="else", dice=7.0)]), "task")
    assert list(table.index) == [(0, "x"), (0, "y"), (1, "x")]
    assert np.allclose(table["a"], 0.4) and np.allclose(table["b"], 1.4)


def test_the_bootstrap_draws_seeds_and_cases() -> None:
    table = made(seeds=2, cases=3, entries="a")
    drawn = resamples(table, 4000)[:, 0]
    cube = table["a"].to_numpy().reshape(2, 3)
    every = [
        cube[list(s)][:, list(c)].mean()
        for s in itertools.product(range(2), repeat=2)
        for c in itertools.product(range(3), repeat=3)
    ]
    assert {round(x, 9) for x in drawn} <= {round(x, 9) for x in every}
    assert drawn.mean() == pytest.approx(np.mean(every), abs=0.005)
    assert drawn.std() == pytest.approx(np.std(every), rel=0.06)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        values = rng.normal(0, 1, (1, 20)) + rng.normal(0, 1, (10, 1)) + rng.normal(0, 1, (10, 20))
        index = pd.MultiIndex.from_product([range(10), range(20)], names=["seed", "case"])
        found = intervals(pd.DataFrame({"a": values.ravel()}, index=index), 300).loc["a"]
        covered.append(found["low"] <= 0 <= found["high"])
    assert 0.85 <= np.mean(covered) <= 1.0
    # Resampling the 200 scores as if they were independent would cover far less.


@pytest.mark.parametrize("few", [{"seeds": 1}, {"cases": 1}])
def test_one_seed_or_one_case_has_no_interval_and_no_stability(few: dict[str, int]) -> None:
    table = made(**few)
    assert intervals(table)[["low", "high"]].isna().all(axis=None)
    assert intervals(table)["mean"].tolist() == pytest.approx(table.mean().tolist())
    assert pairs(table)[["low", "high", "better"]].isna().all(axis=None)
    assert ranking(table)[["stability", "rank_low"]].isna().all(axis=None)


def test_seeds_with_other_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="same cases"):
        resamples(made().iloc[:-1])


def test_pairs_are_scipys_wilcoxon_with_holm_by_hand() -> None:
    table = made()
    found = pairs(table).set_index(["a", "b"])
    assert list(found.index) == [("a", "b"), ("a", "c"), ("b", "c")]
    expected = {k: stats.wilcoxon(table[k[0]], table[k[1]]).pvalue for k in found.index}
    assert found["p"].to_dict() == pytest.approx(expected)
    ordered = sorted(expected.items(), key=lambda item: item[1])
    largest, holm = 0.0, {}
    for position, (key, p) in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ordered) - position)))
        holm[key] = largest
    assert found["p_holm"].to_dict() == pytest.approx(holm)
    assert found.loc[("a", "c"), "difference"] == pytest.approx((table["a"] - table["c"]).mean())
    row = found.loc[("a", "c")]
    assert -0.3 < row["low"] < row["difference"] < row["high"] < 0
    assert found.loc[("a", "c"), "better"] == 0.0 and found.loc[("a", "c"), "effect"] == -1.0
    assert pairs(table, higher=False).set_index(["a", "b"]).loc[("a", "c"), "better"] == 1.0


def test_the_effect_is_the_share_of_ranks() -> None:
    index = pd.MultiIndex.from_product([[0], range(4)], names=["seed", "case"])
    table = pd.DataFrame({"a": [1.0, 2.0, 3.0, 0.0], "b": [0.0, 0.0, 0.0, 4.0]}, index=index)
    # Differences 1, 2, 3, -4 have the ranks 1, 2, 3, 4.
    assert pairs(table)["effect"].item() == pytest.approx((1 + 2 + 3 - 4) / 10)


def test_equal_entries_are_neither_better_nor_worse() -> None:
    table = made(entries="a").assign(b=lambda t: t["a"])
    row = pairs(table).iloc[0]
    assert (row["p"], row["p_holm"], row["effect"], row["better"]) == (1.0, 1.0, 0.0, 0.5)


def test_rankings_of_both_kinds_can_differ_and_say_how_stable_they_are() -> None:
    index = pd.MultiIndex.from_product([range(3), range(5)], names=["seed", "case"])
    steady = np.full(15, 0.60)
    wild = np.tile([0.61, 0.61, 0.61, 0.61, 0.10], 3)  # best in most cases, lost in one
    table = pd.DataFrame({"steady": steady, "wild": wild, "last": steady - 0.3}, index=index)
    found = ranking(table)
    assert found.index[0] == "steady"
    assert found.loc["steady", "rank"] == 1 and found.loc["wild", "rank"] == 2
    assert found.loc["wild", "mean_rank"] < found.loc["steady", "mean_rank"]
    # Without the one case, which (4/5)^5 = 33 % of the draws lack, it would be the best.
    assert found.loc["wild", "stability"] == pytest.approx(1 - 0.8**5, abs=0.05)
    assert (found.loc["wild", "rank_low"], found.loc["wild", "rank_high"]) == (1, 2)
    assert ranking(table, higher=False).index[0] == "last"


def test_friedman_is_scipys_over_cases() -> None:
    table = made(cases=8)
    p, nemenyi = friedman(table)
    blocks = table.groupby("case").mean()
    assert p == pytest.approx(stats.friedmanchisquare(*blocks.to_numpy().T).pvalue)
    assert nemenyi.loc["a", "c"] < 0.05 < nemenyi.loc["a", "a"] == 1.0
    # By hand: the studentised range of the difference of mean ranks.
    ranks = blocks.rank(axis=1).mean()
    q = (ranks["c"] - ranks["a"]) / np.sqrt(3 * 4 / (6 * 8)) * np.sqrt(2)
    assert nemenyi.loc["a", "c"] == pytest.approx(
        stats.studentized_range.sf(q, 3, np.inf), abs=1e-3
    )
    with pytest.raises(ValueError, match="three entries"):
        friedman(made(entries="ab"))
