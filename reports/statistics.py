"""Statistics of a comparison: pairing, confidence intervals, paired tests, and ranks.

The input is one score per entry, seed and case. Seeds and cases are crossed, since every seed is
scored on the same cases, so scores of one case (or of one seed) are correlated. The model has
crossed random effects,

    score = mean + effect of the seed + effect of the case + residual,

whose mean squares give intervals and tests. `benchmarks/coverage.py` measures the coverage of the
intervals; docs/protocol.md has the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.errors import DataError
from glua_bench.scoring.metrics import PRIMARY

LEVEL = 0.95
SIGNIFICANT = 0.05
# Tests are omitted below these. One training does not determine the variation between trainings.
# With fewer cases an exact sign test cannot reach 0.05 (2 / 2^5 = 0.0625), so a smaller p would
# rest on the assumption of a normal distribution, which so few cases cannot support.
MIN_SEEDS, MIN_CASES = 2, 6
REPEAT = "perturbation"  # of a run: 0, or the number of a repeat with perturbed initial weights


# -- pairing -------------------------------------------------------------------------------------


def means(rows: pd.DataFrame, keys: list[str], metric: str | list[str] = PRIMARY.name) -> Any:
    """Average over the structures of each case, then over cases.

    Args:
        rows: per case and structure.
        keys: columns to group by.
        metric: name of a metric, or a list of names.

    Returns:
        A series (a frame for a list of names) indexed by `keys`.
    """
    per_case = rows.groupby([*keys, "case"], observed=True)[metric].mean()
    return per_case.groupby(keys, observed=True).mean()


def ordinary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without repeats (runs whose initial weights were perturbed in last bits).

    Args:
        rows: of runs; rows without the column `perturbation` have no repeats.
    """
    return rows[rows[REPEAT].fillna(0) == 0] if REPEAT in rows else rows


@dataclass(frozen=True)
class Design:
    """The paired entries, seeds and cases of a comparison.

    Attributes:
        entries: entries with a score for every seed and case below.
        seeds: seeds of all entries.
        cases: cases of all entries.
        notes: one sentence per excluded entry, seed or case.
    """

    entries: tuple[str, ...]
    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Select the rows that tables average: excluded entries keep all their seeds.

        Args:
            rows: of one task and selector, with columns entry, seed and case.
        """
        paired = rows["entry"].isin(self.entries)
        return rows[rows["case"].isin(self.cases) & (rows["seed"].isin(self.seeds) | ~paired)]


def design(rows: pd.DataFrame) -> Design:
    """Determine the seeds and cases to compare, and the entries that have all of them.

    The seeds are the largest set that more than half of the entries have; entries that lack one of
    them are excluded. A case without a score in some run (neither reference nor prediction shows
    any structure) is excluded for all entries.

    Args:
        rows: ordinary rows of one task and selector.

    Raises:
        DataError: no case has a score in every run.
    """
    by_case = rows.groupby(["entry", "seed", "case"], observed=True)
    per_run = by_case[PRIMARY.name].mean().unstack("case")
    # A run may be scored on a case while the score is undefined.
    scored = by_case.size().unstack("case").notna()
    undefined = (scored & per_run.isna()).any()
    if len(undefined) and undefined.all():
        raise DataError(
            f"{rows['task'].iloc[0]}: no test case has a score in every run, because Dice is "
            "undefined without reference and prediction; test on cases with structures."
        )
    complete = scored.all(axis=1)
    own: dict[str, set[int]] = {str(e): set() for e in per_run.index.get_level_values("entry")}
    for entry, seed in per_run.index[complete]:
        own[str(entry)].add(int(seed))
    candidates: set[frozenset[int]] = set()
    for has in set(map(frozenset, own.values())):
        candidates |= {has, *(has & other for other in candidates)}

    def holders(seeds: frozenset[int]) -> list[str]:
        return [entry for entry, has in own.items() if has >= seeds]

    def merit(seeds: frozenset[int]) -> tuple[bool, int, int, list[int]]:
        most = bool(seeds) and 2 * len(holders(seeds)) > len(own)
        return most, len(seeds), len(holders(seeds)), [-seed for seed in sorted(seeds)]

    seeds = max(candidates, key=merit, default=frozenset())
    entries = holders(seeds) if seeds else []
    notes = [
        f"{entry} lacks {numbered('seed', sorted(seeds - own[entry]))} and is excluded from "
        "intervals, tests and ranks."
        for entry in own
        if entry not in entries
    ]
    spare = sorted(set().union(*(own[entry] for entry in entries)) - seeds) if entries else []
    if spare:
        notes.append(f"{numbered('Seed', spare)} not used: missing in some entries.")
    names = [str(case) for case in per_run.columns[undefined]]
    if names:
        notes.append(
            f"{numbered('Case', names)} excluded: undefined score in some run (no structure in "
            "reference and prediction)."
        )
    cases = tuple(str(case) for case in per_run.columns[~undefined])
    return Design(tuple(entries), tuple(sorted(seeds)), cases, tuple(notes))


def scores(rows: pd.DataFrame, task: str, selector: str = "last") -> pd.DataFrame:
    """Compute the mean of the primary metric over structures, for each entry, seed and case.

    A missed structure enters with its penalty; one absent from both masks (nan) is ignored.

    Args:
        rows: from `comparison.collect`.
        task: e.g. "phantom mr-ct".
        selector: name of the checkpoint selector.

    Returns:
        One column per entry of the `design`, indexed by seed and case.
    """
    own = ordinary(rows[(rows["task"] == task) & (rows["selector"] == selector)])
    paired = design(own)
    own = paired.of(own)
    table = (
        own[own["entry"].isin(paired.entries)]
        .groupby(["seed", "case", "entry"], observed=True)[PRIMARY.name]
        .mean()
        .unstack("entry")
    )
    table.columns = pd.Index([str(entry) for entry in table.columns], name="entry")
    return table


def counts(table: pd.DataFrame) -> tuple[int, int]:
    """Return the numbers of seeds and cases of a table from `scores`."""
    index = table.index
    return index.get_level_values("seed").nunique(), index.get_level_values("case").nunique()


def untested(seeds: int, cases: int) -> str:
    """Return the reason why tests are omitted; "" if they are not."""
    required, found, limit = [], [], ""
    if seeds < MIN_SEEDS:
        required.append(f"{MIN_SEEDS} seeds (--seeds 3)")
        found.append(counted(seeds, "seed"))
    if cases < MIN_CASES:
        required.append(f"{MIN_CASES} test cases")
        found.append(counted(cases, "case"))
        limit = f" (an exact sign test cannot go below p = {2 / 2**cases:g})"
    if not required:
        return ""
    return f"No tests: {' and '.join(required)} are required, found {' and '.join(found)}{limit}."


# -- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """Means over crossed seeds and cases, with standard errors.

    The variance of a mean is estimated by (A + B - R) / (seeds × cases), with the mean squares A
    of seeds, B of cases and R of the residual; R is limited to half of A + B. The quantile is
    Cochran and Cox's: Student's t with seeds - 1 and with cases - 1 degrees of freedom, weighted
    by A and B. With one seed, the error is that over cases for this training only.

    Attributes:
        mean: (N,), means.
        error: (N,), standard errors; nan for one case.
        share: (N,), weight of the seeds' quantile.
        seeds: number of seeds.
        cases: number of cases.
    """

    mean: np.ndarray
    error: np.ndarray
    share: np.ndarray
    seeds: int
    cases: int

    @classmethod
    def of(cls, cube: np.ndarray) -> Means:
        """Compute the means of N tables of scores, (N, seeds, cases)."""
        count, seeds, cases = cube.shape
        mean = cube.mean((1, 2))
        if cases < 2:
            return cls(mean, np.full(count, math.nan), np.zeros(count), seeds, cases)
        of_seed, of_case = cube.mean(2), cube.mean(1)
        b = seeds * of_case.var(1, ddof=1)
        if seeds < 2:
            return cls(mean, np.sqrt(b / cases), np.zeros(count), seeds, cases)
        a = cases * of_seed.var(1, ddof=1)
        rest = cube - of_seed[:, :, None] - of_case[:, None, :] + mean[:, None, None]
        r = (rest**2).sum((1, 2)) / ((seeds - 1) * (cases - 1))
        total = a + b - np.minimum(r, (a + b) / 2)
        share = np.divide(a, a + b, out=np.zeros(count), where=a + b > 0)
        return cls(mean, np.sqrt(total / (seeds * cases)), share, seeds, cases)

    def quantile(self, tail: float | np.ndarray) -> np.ndarray:
        """Return the quantile for an upper tail probability, in standard errors, (N,)."""
        from scipy.stats import t

        of_case = t.isf(tail, self.cases - 1) * np.ones_like(self.share)
        if self.seeds < 2:
            return np.asarray(of_case)
        return np.asarray(self.share * t.isf(tail, self.seeds - 1) + (1 - self.share) * of_case)

    def interval(self, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper ends of the confidence interval, (N,) each."""
        half = self.quantile((1 - level) / 2) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> np.ndarray:
        """Return two-sided p-values for a mean of 0, (N,).

        p is the smallest level at which the interval excludes 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.abs(self.mean) / self.error
        wanted = np.where((self.mean == 0) & (self.error == 0), 0.0, wanted)
        # Bisect the logarithm of the tail; the quantile decreases with it.
        low, high = np.full(len(wanted), -80.0), np.full(len(wanted), math.log(0.5))
        for _ in range(60):
            middle = (low + high) / 2
            above = self.quantile(np.exp(middle)) > wanted
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(np.isnan(self.error), math.nan, 2 * np.exp(high))


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean of each entry with its confidence interval.

    Args:
        table: from `scores`.

    Returns:
        Indexed by entry: mean, low, high, seeds, cases. With one seed the interval is over cases
        for this training only; with one case it is nan.
    """
    found = Means.of(_cube(table))
    low, high = found.interval()
    columns = {"mean": found.mean, "low": low, "high": high}
    sizes = {"seeds": found.seeds, "cases": found.cases}
    return pd.DataFrame({**columns, **sizes}, index=table.columns)


def difference(table: pd.DataFrame, first: str, second: str) -> tuple[float, float, float]:
    """Return the mean of first - second with the ends of its confidence interval.

    Args:
        table: from `scores`.
        first: an entry.
        second: another entry.
    """
    one, other = _cube(table[[first, second]])
    found = Means.of((one - other)[np.newaxis])
    low, high = found.interval()
    return float(found.mean[0]), float(low[0]), float(high[0])


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Compare every two entries: the difference, its confidence interval and its p-value.

    Args:
        table: from `scores`.

    Returns:
        a, b, difference (mean of a - b), low, high, p (of the interval), p_holm (corrected over
        all pairs by Holm's method); p and p_holm are nan if tests are omitted (`untested`).
    """
    from statsmodels.stats.multitest import multipletests

    columns = ["a", "b", "difference", "low", "high", "p", "p_holm"]
    names = [str(entry) for entry in table.columns]
    if len(names) < 2:
        return pd.DataFrame(columns=columns)
    cube = _cube(table)
    first, second = np.triu_indices(len(names), 1)
    found = Means.of(cube[first] - cube[second])
    low, high = found.interval()
    result = pd.DataFrame(
        {
            "a": [names[i] for i in first],
            "b": [names[i] for i in second],
            "difference": found.mean,
            "low": low,
            "high": high,
            "p": math.nan,
            "p_holm": math.nan,
        }
    )
    if not untested(*counts(table)):
        result["p"] = found.p()
        result["p_holm"] = multipletests(result["p"], method="holm")[1]
    return result


def ranking(table: pd.DataFrame, higher: bool = True) -> pd.DataFrame:
    """Rank entries by both ways to aggregate, with rank intervals.

    Aggregate-then-rank ranks mean scores. Rank-then-aggregate ranks entries within every case and
    seed and averages the ranks. A rank interval is from one more than the number of significantly
    better entries to the number of entries that are not significantly worse (Mogstad et al. 2024);
    the intervals contain all true ranks simultaneously with 95 % confidence.

    Args:
        table: from `scores`.
        higher: whether a higher score is better.

    Returns:
        Indexed by entry, best first: mean, rank (aggregate-then-rank), mean_rank
        (rank-then-aggregate), rank_low, rank_high; the last two are nan if tests are omitted.
    """
    means = table.mean()
    found = pd.DataFrame(
        {
            "mean": means,
            "rank": means.rank(ascending=not higher, method="min"),
            "mean_rank": table.rank(axis=1, ascending=not higher).mean(),
            "rank_low": math.nan,
            "rank_high": math.nan,
        }
    )
    if not untested(*counts(table)):
        found["rank_low"], found["rank_high"] = 1.0, float(len(found))
        for pair in pairs(table).itertuples():
            if pair.p_holm < SIGNIFICANT:
                a_wins = (pair.difference > 0) == higher
                better, worse = (pair.a, pair.b) if a_wins else (pair.b, pair.a)
                found.loc[worse, "rank_low"] += 1
                found.loc[better, "rank_high"] -= 1
    return found.sort_values(["rank", "mean_rank"])


def last_bits(rows: pd.DataFrame) -> pd.Series:
    """Compute the standard deviation of mean Dice over repeats of a run.

    Repeats are runs of one entry and seed whose initial weights differ in their last bits, with
    the ordinary run among them. Variances are pooled over seeds by their degrees of freedom.

    Args:
        rows: of one selector, with repeats.

    Returns:
        Standard deviation by task and entry, for entries with repeats.
    """
    keys = ["task", "entry", "seed"]
    if REPEAT not in rows or not rows[REPEAT].fillna(0).any():
        index = pd.MultiIndex.from_arrays([[], []], names=keys[:2])
        return pd.Series(index=index, dtype=float)
    rows = rows.assign(**{REPEAT: rows[REPEAT].fillna(0)})
    groups = means(rows, [*keys, REPEAT]).groupby(keys, observed=True)
    freedom = groups.size() - 1
    squares = (groups.var() * freedom)[freedom > 0].groupby(keys[:2], observed=True).sum()
    return np.sqrt(squares / freedom[freedom > 0].groupby(keys[:2], observed=True).sum())


def _cube(table: pd.DataFrame) -> np.ndarray:
    """Return the scores as (entries, seeds, cases); every seed must have the same cases."""
    seeds = table.index.get_level_values("seed").unique()
    cases = table.index.get_level_values("case").unique()
    full = pd.MultiIndex.from_product([seeds, cases], names=["seed", "case"])
    if len(table) != len(full):
        raise ValueError("every seed must have the same cases")
    cube = table.reindex(full).to_numpy().reshape(len(seeds), len(cases), -1)
    return np.moveaxis(cube, 2, 0)


def numbered(noun: str, names: Sequence[int] | Sequence[str]) -> str:
    """Return e.g. "seed 1", or "seeds 1 and 2"."""
    words = [str(name) for name in names]
    if len(words) < 2:
        return " ".join([noun, *words])
    return f"{noun}s {', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, noun: str) -> str:
    """Return e.g. "1 run", or "2 runs"."""
    return f"{number} {noun}{'s' * (number != 1)}"
