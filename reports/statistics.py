"""How sure a comparison is: intervals, paired tests, and rankings with their stability.

Everything starts from one score for each entry, seed and case. Seeds and cases are crossed: every
seed is scored on the same cases, so scores of one case (or of one seed) go up and down together,
and resampling draws cases and seeds, not scores. Tests and corrections are those of scipy,
statsmodels and scikit-posthocs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd

DRAWS = 2000
LEVEL = 0.95


def scores(
    rows: pd.DataFrame, task: str, metric: str = "dice", selector: str = "last"
) -> pd.DataFrame:
    """One score for each entry, seed and case of a task: the mean over its structures.

    A missed structure enters with its penalty, one that nobody shows (nan) does not enter.

    Args:
        rows: as `comparison.collect` gives them.
        task: e.g. "phantom mr-ct".
        metric: "dice", "assd" or "hd95".
        selector: whose checkpoints count.

    Returns:
        A column for each entry, indexed by seed and case; without the seeds and cases that some
        entry lacks, since what is compared must be paired.
    """
    own = rows[(rows["task"] == task) & (rows["selector"] == selector)]
    return (
        own.groupby(["seed", "case", "entry"], observed=True)[metric]
        .mean()
        .unstack("entry")
        .dropna()
    )


def resamples(
    table: pd.DataFrame, draws: int = DRAWS, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Means of entries over resampled cases and seeds.

    In each draw, as many seeds and as many cases as there are, each with replacement, and the
    mean over their crossing (the pigeonhole bootstrap of crossed factors, Owen 2007).

    Args:
        table: from `scores`; every seed with the same cases.
        draws: how many.
        rng: of the draws; None begins with seed 0.

    Returns:
        (draws, entries).

    Raises:
        ValueError: a seed lacks a case.
    """
    cube = _cube(table)
    seeds, cases = cube.shape[:2]
    rng = rng or np.random.default_rng(0)
    chosen_seeds = rng.integers(0, seeds, (draws, seeds))
    chosen_cases = rng.integers(0, cases, (draws, cases))
    return np.stack(
        [cube[s][:, c].mean((0, 1)) for s, c in zip(chosen_seeds, chosen_cases, strict=True)]
    )


def intervals(table: pd.DataFrame, draws: int = DRAWS) -> pd.DataFrame:
    """Mean of each entry with the percentile interval of its resamples.

    Args:
        table: from `scores`.
        draws: of the bootstrap.

    Returns:
        Indexed by entry: mean, low, high, seeds, cases. With one seed or one case there is no
        interval (nan): how much the result depends on it is not known.
    """
    seeds, cases = _counts(table)
    found = pd.DataFrame({"mean": table.mean(), "low": math.nan, "high": math.nan})
    if _crossed(table):
        tail = (1 - LEVEL) / 2
        found["low"], found["high"] = np.quantile(resamples(table, draws), [tail, 1 - tail], axis=0)
    return found.assign(seeds=seeds, cases=cases)


def pairs(table: pd.DataFrame, draws: int = DRAWS, higher: bool = True) -> pd.DataFrame:
    """Every two entries: difference, interval, Wilcoxon's test, effect size, and who is better.

    The test is Wilcoxon's signed-rank test on scores paired by case and seed, its p-values
    corrected by Holm's method over all pairs. Scores of one case are alike over seeds, so p is
    too small where seeds are many and cases few: read it beside the interval, which resamples
    both. The effect size is the matched-pairs rank-biserial correlation (Kerby 2014), from -1 to
    1: the share of ranks in favour of a minus those in favour of b.

    Args:
        table: from `scores`.
        draws: of the bootstrap.
        higher: whether a higher score is better.

    Returns:
        a, b, difference (mean of a - b), low, high, p, p_holm, effect, better (share of resamples
        in which a is better than b; ties count half).
    """
    from scipy.stats import rankdata, wilcoxon
    from statsmodels.stats.multitest import multipletests

    drawn = None
    if _crossed(table):
        drawn = pd.DataFrame(resamples(table, draws), columns=table.columns)
    found = []
    for a, b in itertools.combinations(table.columns, 2):
        difference = (table[a] - table[b]).to_numpy()
        shown = difference[difference != 0]
        p, effect = 1.0, 0.0
        if len(shown):
            p = float(wilcoxon(shown).pvalue)
            ranks = rankdata(np.abs(shown))
            effect = float((ranks * np.sign(shown)).sum() / ranks.sum())
        row = {"a": a, "b": b, "difference": difference.mean(), "p": p, "effect": effect}
        if drawn is not None:
            gap = (drawn[a] - drawn[b]).to_numpy()
            tail = (1 - LEVEL) / 2
            row["low"], row["high"] = np.quantile(gap, [tail, 1 - tail])
            sign = 1 if higher else -1
            row["better"] = float(((sign * gap > 0) + 0.5 * (gap == 0)).mean())
        found.append(row)
    columns = ["a", "b", "difference", "low", "high", "p", "p_holm", "effect", "better"]
    result = pd.DataFrame(found).reindex(columns=columns)
    if len(result):
        result["p_holm"] = multipletests(result["p"], method="holm")[1]
    return result


def ranking(table: pd.DataFrame, draws: int = DRAWS, higher: bool = True) -> pd.DataFrame:
    """Ranks of entries by both ways to aggregate, and how stable they are (as challengeR shows).

    Aggregate-then-rank ranks mean scores. Rank-then-aggregate ranks entries within every case and
    seed and averages these ranks. Stability is the share of resamples of cases and seeds in which
    the entry has the same aggregate-then-rank rank, and the ranks that 95 % of them lie between.

    Args:
        table: from `scores`.
        draws: of the bootstrap.
        higher: whether a higher score is better.

    Returns:
        Indexed by entry, best first: mean, rank (aggregate-then-rank), mean_rank
        (rank-then-aggregate), stability, rank_low, rank_high; the last three nan for one seed or
        one case.
    """
    means = table.mean()
    found = pd.DataFrame(
        {
            "mean": means,
            "rank": means.rank(ascending=not higher, method="min"),
            "mean_rank": table.rank(axis=1, ascending=not higher).mean(),
            "stability": math.nan,
            "rank_low": math.nan,
            "rank_high": math.nan,
        }
    )
    if _crossed(table):
        drawn = pd.DataFrame(resamples(table, draws), columns=table.columns)
        ranks = drawn.rank(axis=1, ascending=not higher, method="min")
        found["stability"] = (ranks == found["rank"]).mean()
        tail = (1 - LEVEL) / 2
        found["rank_low"] = ranks.quantile(tail, interpolation="lower")
        found["rank_high"] = ranks.quantile(1 - tail, interpolation="higher")
    return found.sort_values(["rank", "mean_rank"])


def rank_shares(table: pd.DataFrame, draws: int = DRAWS, higher: bool = True) -> pd.DataFrame:
    """How often each entry has each rank in resamples of cases and seeds.

    Args:
        table: from `scores`, with several seeds and cases.
        draws: of the bootstrap.
        higher: whether a higher score is better.

    Returns:
        Entry × rank (1, 2, …), shares in [0, 1]; best mean first. Entries that tie share the
        better rank.
    """
    drawn = pd.DataFrame(resamples(table, draws), columns=table.columns)
    ranks = drawn.rank(axis=1, ascending=not higher, method="min").astype(int)
    shares = {
        entry: ranks[entry].value_counts(normalize=True)
        for entry in table.mean().sort_values(ascending=not higher).index
    }
    positions = range(1, table.shape[1] + 1)
    return pd.DataFrame(shares).T.reindex(columns=positions).fillna(0.0)


def friedman(table: pd.DataFrame) -> tuple[float, pd.DataFrame]:
    """Friedman's test over cases, and Nemenyi's test of every two entries.

    Cases are the blocks, with scores averaged over seeds, since blocks must be independent.

    Args:
        table: from `scores`, with three entries or more and two cases or more.

    Returns:
        p of "all are alike", and the matrix of Nemenyi's p-values, for a critical-difference
        diagram.

    Raises:
        ValueError: there are too few entries or cases.
    """
    import scikit_posthocs
    from scipy.stats import friedmanchisquare

    blocks = table.groupby("case").mean()
    if blocks.shape[0] < 2 or blocks.shape[1] < 3:
        raise ValueError("Friedman's test needs three entries and two cases, or more")
    p = float(friedmanchisquare(*(blocks[entry] for entry in blocks)).pvalue)
    return p, scikit_posthocs.posthoc_nemenyi_friedman(blocks)


def _counts(table: pd.DataFrame) -> tuple[int, int]:
    """Numbers of seeds and of cases."""
    index = table.index
    return index.get_level_values("seed").nunique(), index.get_level_values("case").nunique()


def _crossed(table: pd.DataFrame) -> bool:
    """Whether there are several seeds and several cases to draw from."""
    return min(_counts(table)) > 1


def _cube(table: pd.DataFrame) -> np.ndarray:
    """(seeds, cases, entries)."""
    seeds = table.index.get_level_values("seed").unique()
    cases = table.index.get_level_values("case").unique()
    full = pd.MultiIndex.from_product([seeds, cases], names=["seed", "case"])
    if len(table) != len(full):
        raise ValueError("every seed must have the same cases")
    return table.reindex(full).to_numpy().reshape(len(seeds), len(cases), -1)
