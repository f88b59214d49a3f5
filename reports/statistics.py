"""How sure a comparison is: what is paired, intervals, paired tests, and ranks.

Everything starts from one score for each entry, seed and case. Seeds and cases are crossed: every
seed is scored on the same cases, so scores of one case (or of one seed) go up and down together.
The model is that of crossed random effects,

    score = mean + effect of the seed + effect of the case + rest,

of which intervals and tests use the mean squares. `benchmarks/coverage.py` measures how often the
intervals hold the truth; its table is in docs/protocol.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.errors import DataError
from glua_bench.scoring.metrics import PRIMARY

LEVEL = 0.95
SIGNIFICANT = 0.05
# Tests are withheld below these. One training says nothing about the next one. With fewer cases
# an exact test of signs cannot reach 0.05 (2 / 2^5 = 0.0625), so a smaller p would come from the
# assumption of a normal distribution, which so few cases cannot support.
FEWEST_SEEDS, FEWEST_CASES = 2, 6
REPEAT = "perturbation"  # of a run: 0, or which draw nudged the last bits of its first weights


# -- what is compared ----------------------------------------------------------------------------


def means(rows: pd.DataFrame, keys: list[str], metric: str | list[str] = PRIMARY.name) -> Any:
    """Means over the structures of each case, then over the cases.

    Args:
        rows: per case and structure.
        keys: columns; each combination of their values has a mean of its own.
        metric: the name of one metric, or a list of names.

    Returns:
        A series indexed by `keys`; for a list of names, a frame.
    """
    per_case = rows.groupby([*keys, "case"], observed=True)[metric].mean()
    return per_case.groupby(keys, observed=True).mean()


def ordinary(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without repeats, i.e. without runs whose first weights were nudged in their last bits.

    Args:
        rows: of runs; rows of older versions have no column `perturbation`, and no repeats.
    """
    return rows[rows[REPEAT].fillna(0) == 0] if REPEAT in rows else rows


@dataclass(frozen=True)
class Design:
    """What is paired in a comparison.

    Args:
        entries: that have a score for each of the seeds and cases.
        seeds: that all of them have.
        cases: that all of them have.
        notes: a sentence for each entry, seed or case that is left out.
    """

    entries: tuple[str, ...]
    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows as tables average them: paired entries by what is paired, others by what they have.

        Args:
            rows: of one task and selector, with columns entry, seed and case.
        """
        paired = rows["entry"].isin(self.entries)
        return rows[rows["case"].isin(self.cases) & (rows["seed"].isin(self.seeds) | ~paired)]


def design(rows: pd.DataFrame) -> Design:
    """The seeds and cases that are compared, and the entries that have all of them.

    An entry that lacks a seed does not take it from the others: the most seeds count that more
    than half of the entries have, and entries that lack one of these are left out. A case that has
    no score in some run (neither reference nor prediction shows any structure) is left out of all.

    Args:
        rows: ordinary rows of one task and selector.

    Raises:
        DataError: no case has a score in every run.
    """
    by_case = rows.groupby(["entry", "seed", "case"], observed=True)
    per_run = by_case[PRIMARY.name].mean().unstack("case")
    # Whether a run was scored on a case is one thing, whether the score is defined another.
    scored = by_case.size().unstack("case").notna()
    undefined = (scored & per_run.isna()).any()
    if len(undefined) and undefined.all():
        raise DataError(
            f"{rows['task'].iloc[0]}: no test case has a score in every run, because a case "
            "without structures has none where nothing is predicted; test on cases with structures."
        )
    whole = scored.all(axis=1)
    own: dict[str, set[int]] = {str(e): set() for e in per_run.index.get_level_values("entry")}
    for entry, seed in per_run.index[whole]:
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
        f"{entry} lacks {_numbered('seed', sorted(seeds - own[entry]))} and is left out of "
        "intervals, tests and ranks."
        for entry in own
        if entry not in entries
    ]
    spare = sorted(set().union(*(own[entry] for entry in entries)) - seeds) if entries else []
    if spare:
        them = f"not used, since not all entries have {'it' if len(spare) == 1 else 'them'}."
        notes.append(f"{_numbered('Seed', spare)} {_is(spare)} {them}")
    names = [str(case) for case in per_run.columns[undefined]]
    if names:
        notes.append(
            f"{_numbered('Case', names)} {_is(names)} not averaged: some run has no score there, "
            "since neither reference nor prediction shows any structure."
        )
    cases = tuple(str(case) for case in per_run.columns[~undefined])
    return Design(tuple(entries), tuple(sorted(seeds)), cases, tuple(notes))


def scores(rows: pd.DataFrame, task: str, selector: str = "last") -> pd.DataFrame:
    """The primary metric of each entry, seed and case of a task: its mean over structures.

    A missed structure enters with its penalty, one that nobody shows (nan) does not enter.

    Args:
        rows: as `comparison.collect` gives them.
        task: e.g. "phantom mr-ct".
        selector: whose checkpoints count.

    Returns:
        A column for each entry of the `design`, indexed by seed and case.
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
    """Numbers of seeds and of cases.

    Args:
        table: from `scores`.
    """
    index = table.index
    return index.get_level_values("seed").nunique(), index.get_level_values("case").nunique()


def untested(seeds: int, cases: int) -> str:
    """Why nothing is tested, and what would be needed; "" where tests are made."""
    needed = []
    if seeds < FEWEST_SEEDS:
        needed.append(f"{FEWEST_SEEDS} seeds or more (--seeds 3)")
    if cases < FEWEST_CASES:
        needed.append(f"{FEWEST_CASES} test cases or more")
    if not needed:
        return ""
    has = [f"{seeds} seed"] * (seeds < FEWEST_SEEDS)
    signs = ""
    if cases < FEWEST_CASES:
        has.append(f"{cases} case{'s'[: cases != 1]}")
        signs = f" (with {has[-1]} an exact test of signs cannot go below p = {2 / 2**cases:g})"
    return f"A test needs {' and '.join(needed)}; this comparison has {' and '.join(has)}{signs}."


# -- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """Means over crossed seeds and cases, and how sure they are.

    The variance of a mean is estimated by (A + B - R) / (seeds × cases), with the mean squares A
    of seeds, B of cases and R of the rest, of which R takes away half of A + B at most. The
    quantile is Cochran and Cox's: that of Student's t with seeds - 1 degrees of freedom and that
    with cases - 1, weighted by A and B. With one seed, the error is that over cases of this
    training alone.

    Args:
        mean: (N,), the means.
        error: (N,), their standard errors; nan for one case.
        share: (N,), weight of the seeds' quantile.
        seeds: how many.
        cases: how many.
    """

    mean: np.ndarray
    error: np.ndarray
    share: np.ndarray
    seeds: int
    cases: int

    @classmethod
    def of(cls, cube: np.ndarray) -> Means:
        """Means of N tables of scores.

        Args:
            cube: (N, seeds, cases).
        """
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
        """How many standard errors leave this probability above them, (N,)."""
        from scipy.stats import t

        of_case = t.isf(tail, self.cases - 1) * np.ones_like(self.share)
        if self.seeds < 2:
            return np.asarray(of_case)
        return np.asarray(self.share * t.isf(tail, self.seeds - 1) + (1 - self.share) * of_case)

    def interval(self, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends, (N,) each; nan for one case."""
        half = self.quantile((1 - level) / 2) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> np.ndarray:
        """Two-sided p-values of "the mean is 0", (N,).

        The smallest level at which the interval leaves 0 out: p < 0.05 where the 95 % interval
        does.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.abs(self.mean) / self.error
        wanted = np.where((self.mean == 0) & (self.error == 0), 0.0, wanted)
        # The quantile falls as the tail grows: halve the interval of its logarithm.
        low, high = np.full(len(wanted), -80.0), np.full(len(wanted), math.log(0.5))
        for _ in range(60):
            middle = (low + high) / 2
            above = self.quantile(np.exp(middle)) > wanted
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(np.isnan(self.error), math.nan, 2 * np.exp(high))


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each entry with its interval.

    Args:
        table: from `scores`.

    Returns:
        Indexed by entry: mean, low, high, seeds, cases. With one seed the interval is over cases,
        for this one training; with one case there is none (nan).
    """
    found = Means.of(_cube(table))
    low, high = found.interval()
    return pd.DataFrame(
        {
            "mean": found.mean,
            "low": low,
            "high": high,
            "seeds": found.seeds,
            "cases": found.cases,
        },
        index=table.columns,
    )


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every two entries: the difference, its interval, and whether it is beyond chance.

    The p-values belong to the intervals and are corrected by Holm's method over all pairs.

    Args:
        table: from `scores`.

    Returns:
        a, b, difference (mean of a - b), low, high, p, p_holm; the last two nan where a test is
        withheld (`untested`).
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
    """Ranks of entries by both ways to aggregate, and which ranks the tests leave open.

    Aggregate-then-rank ranks mean scores. Rank-then-aggregate ranks entries within every case and
    seed and averages these ranks. The ranks that are left open lie between one more than the
    number of entries that are better beyond chance, and the number of those that are not worse
    beyond chance (Mogstad et al. 2024): they hold all true ranks at once with 95 % confidence.

    Args:
        table: from `scores`.
        higher: whether a higher score is better.

    Returns:
        Indexed by entry, best first: mean, rank (aggregate-then-rank), mean_rank
        (rank-then-aggregate), rank_low, rank_high; the last two nan where tests are withheld.
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
    """How far last bits alone move the mean Dice of a run: the standard deviation over repeats.

    Repeats are runs of one entry and seed whose first weights differ in their last bits, the
    ordinary run included. The variances of seeds with repeats are pooled, by their degrees of
    freedom.

    Args:
        rows: of one selector, with repeats.

    Returns:
        Standard deviation by task and entry; without entries that have no repeats.
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
    """(entries, seeds, cases).

    Raises:
        ValueError: a seed lacks a case.
    """
    seeds = table.index.get_level_values("seed").unique()
    cases = table.index.get_level_values("case").unique()
    full = pd.MultiIndex.from_product([seeds, cases], names=["seed", "case"])
    if len(table) != len(full):
        raise ValueError("every seed must have the same cases")
    cube = table.reindex(full).to_numpy().reshape(len(seeds), len(cases), -1)
    return np.moveaxis(cube, 2, 0)


def _numbered(noun: str, names: list[int] | list[str]) -> str:
    """ "seed 1", or "seeds 1 and 2"."""
    words = [str(name) for name in names]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{noun}{'s'[: len(words) != 1]} {listed}"


def _is(names: list[int] | list[str]) -> str:
    return "is" if len(names) == 1 else "are"
