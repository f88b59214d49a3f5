"""How often intervals hold the truth, and how often tests see what is not there.

    python benchmarks/coverage.py

Draws scores of crossed seeds and cases whose true mean is known, and prints, as Markdown, how
often the 95 % interval of `glua_bench.reports.statistics` holds it, its width, and how often a
difference of methods that are alike counts as significant; beside it the same of the percentile
bootstrap of seeds and cases and of Wilcoxon's test over cases and seeds, which it replaced. The
tables of docs/protocol.md are this program's. It takes some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit

from glua_bench.reports.statistics import Means, ordinary

RESULTS = Path(__file__).parent.parent / "results"
SEEDS, CASES = (1, 2, 3, 5), (4, 6, 10, 20)
# Standard deviations of seed, case and rest, in points of Dice. "method" and "difference" are
# what `measured` finds in results/*.parquet, the others are their extremes.
PROFILES = {
    "method": (3.1, 11.0, 4.6),
    "difference": (4.5, 7.8, 5.6),
    "seeds alike": (0.0, 8.0, 4.0),
    "seeds apart": (8.0, 0.0, 3.0),
    "rest only": (0.0, 0.0, 5.0),
}
CENTRE, STEEPNESS = 1.5, 0.07  # of bounded scores: the logit's mean, and logit of a point
BOOTSTRAP = 400

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def effects(rows: pd.DataFrame) -> dict[str, list[np.ndarray]]:
    """Estimated effects of seeds and cases and the rest, of every entry and pair of entries.

    Args:
        rows: of finished runs, with three seeds or more.

    Returns:
        "seed", "case" and "rest": an array for each entry; and mean squares under "squares", of
        entries, and "squares of pairs": rows of seed, case and rest variances.
    """
    found: dict[str, list[np.ndarray]] = {
        n: [] for n in ("seed", "case", "rest", "squares", "squares of pairs")
    }
    rows = ordinary(rows[rows["selector"] == "last"])
    for _, own in rows.groupby("task", observed=True):
        dice = 100 * own.groupby(["entry", "seed", "case"], observed=True)["dice"].mean()
        cubes = [part.unstack("case").to_numpy() for _, part in dice.groupby("entry")]
        if min(cube.shape[0] for cube in cubes) < 3:
            continue
        for cube in cubes:
            seed, case, rest, _ = _taken_apart(cube)
            for name, values in (("seed", seed), ("case", case), ("rest", rest)):
                found[name].append(values)
            found["squares"].append(_taken_apart(cube)[3])
        for i, first in enumerate(cubes):
            found["squares of pairs"] += [_taken_apart(first - b)[3] for b in cubes[i + 1 :]]
    return found


def _taken_apart(cube: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Effects of seeds, of cases and the rest, inflated to their variance, and the variances."""
    s, c = cube.shape
    seed, case = cube.mean(1) - cube.mean(), cube.mean(0) - cube.mean()
    rest = cube - cube.mean() - seed[:, None] - case[None, :]
    r = (rest**2).sum() / ((s - 1) * (c - 1))
    variances = np.array([seed.var(ddof=1) - r / c, case.var(ddof=1) - r / s, r])
    inflated = (
        seed * np.sqrt(s / (s - 1)),
        case * np.sqrt(c / (c - 1)),
        rest.ravel() * np.sqrt(s * c / ((s - 1) * (c - 1))),
    )
    return *inflated, variances


def measured() -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """What the results say: typical standard deviations, and pools of standardised effects."""
    parts = [
        effects(pd.read_parquet(file)) for file in sorted(RESULTS.glob("phantom_quick*.parquet"))
    ]
    pools = {}
    for name in ("seed", "case", "rest"):
        values = np.concatenate([v for part in parts for v in part[name]])
        pools[name] = (values - values.mean()) / values.std()
    lines = {}
    for name, label in (("squares", "method"), ("squares of pairs", "difference")):
        variances = np.array([v for part in parts for v in part[name]])
        # Estimates of a variance may be negative; their mean is not biased by it.
        lines[label] = np.sqrt(np.maximum(variances.mean(0), 0))
    return pd.DataFrame(lines, index=["seed", "case", "rest"]).T, pools


def draw(
    rng: np.random.Generator,
    kind: str,
    sizes: tuple[float, float, float],
    shape: tuple[int, int, int],
    pools: dict[str, np.ndarray],
) -> tuple[np.ndarray, float, np.ndarray]:
    """Tables of scores.

    Args:
        rng: of all draws.
        kind: "normal", "resampled" (effects of the results) or "bounded" (normal on the logit).
        sizes: standard deviations of seed, case and rest.
        shape: how many tables, seeds, cases.
        pools: from `measured`.

    Returns:
        The tables; the true mean over seeds and cases; the true mean over cases of each table's
        own seeds, (N,).
    """
    n, s, c = shape
    shapes = {"seed": (n, s, 1), "case": (n, 1, c), "rest": (n, s, c)}
    parts = {
        name: size
        * (rng.choice(pools[name], dims) if kind == "resampled" else rng.normal(size=dims))
        for size, (name, dims) in zip(sizes, shapes.items(), strict=True)
    }
    total = parts["seed"] + parts["case"] + parts["rest"]
    if kind != "bounded":
        return total, 0.0, parts["seed"].mean((1, 2))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()

    def mean(centre: np.ndarray, size: float) -> np.ndarray:
        return 100 * (expit(centre[..., None] + STEEPNESS * size * nodes) @ weights)

    seed, case, rest = sizes
    own = mean(CENTRE + STEEPNESS * parts["seed"][:, :, 0], float(np.hypot(case, rest))).mean(1)
    every = float(mean(np.array(CENTRE), float(np.sqrt(seed**2 + case**2 + rest**2))))
    return 100 * expit(CENTRE + STEEPNESS * total), every, own


def bootstrap(cube: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means over resampled seeds and cases, (draws, N): the procedure that was replaced."""
    _, s, c = cube.shape
    of_seed = rng.multinomial(s, np.full(s, 1 / s), BOOTSTRAP) / s
    of_case = rng.multinomial(c, np.full(c, 1 / c), BOOTSTRAP) / c
    return np.einsum("ks,nsc,kc->kn", of_seed, cube, of_case, optimize=True)


def cell(
    rng: np.random.Generator,
    kind: str,
    sizes: tuple[float, float, float],
    seeds: int,
    cases: int,
    draws: int,
    pools: dict[str, np.ndarray],
    old: bool = False,
) -> dict[str, float]:
    """One design: shares in percent, widths relative to the interval of known variances.

    Returns:
        "covers", "width" (of medians), "p<0.05" and "99 %" (confidence of 99 % that one of two
        methods that are alike is better, either one), and the same of the replaced procedures
        under "old …" where they are asked for.
    """
    cube, every, own = draw(rng, kind, sizes, (draws, seeds, cases), pools)
    truth = own if seeds == 1 else np.full(draws, every)
    found = Means.of(cube)
    low, high = found.interval()
    known = np.std(cube.mean((1, 2)) - truth)
    result = {
        "covers": 100 * float(np.mean((low <= truth) & (truth <= high))),
        "width": float(np.median(high - low) / (2 * stats.norm.isf(0.025) * known)),
    }
    p = Means(found.mean - truth, found.error, found.share, seeds, cases).p()
    result |= {"p<0.05": 100 * float(np.mean(p < 0.05)), "99 %": 100 * float(np.mean(p <= 0.02))}
    if old:
        means = bootstrap(cube, rng)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        better = (means > every).mean(0)
        result |= {
            "old covers": 100 * float(np.mean((low <= every) & (every <= high))),
            "old width": float(np.median(high - low) / (2 * stats.norm.isf(0.025) * known)),
            "old 99 %": 100 * float(np.mean((better >= 0.99) | (better <= 0.01))),
            "old p<0.05": 100
            * float(
                np.mean(
                    stats.wilcoxon(
                        (cube - every).reshape(draws, -1), axis=1, method="asymptotic"
                    ).pvalue
                    < 0.05
                )
            ),
        }
    return result


def coverage(draws: int, pools: dict[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Coverage in percent of each design: of each profile, and the lowest for other effects."""
    lines = []
    for s in SEEDS:
        for c in CASES:
            rng = np.random.default_rng([seed, s, c])
            line: dict[str, float] = {"seeds": s, "cases": c}
            for name, sizes in PROFILES.items():
                line[name] = cell(rng, "normal", sizes, s, c, draws, pools)["covers"]
            for kind in ("resampled", "bounded"):
                line[kind] = min(
                    cell(rng, kind, sizes, s, c, draws, pools)["covers"]
                    for sizes in PROFILES.values()
                )
            lines.append(line)
    return pd.DataFrame(lines)


def against_old(draws: int, pools: dict[str, np.ndarray], seed: int = 1) -> pd.DataFrame:
    """Both procedures for a difference of two methods that are alike, normal effects."""
    lines = []
    for s in SEEDS[1:]:
        for c in CASES:
            rng = np.random.default_rng([seed, s, c])
            found = cell(rng, "normal", PROFILES["difference"], s, c, draws, pools, old=True)
            lines.append({"seeds": s, "cases": c, **found})
    return pd.DataFrame(lines)


def markdown(frame: pd.DataFrame) -> str:
    """Integers for designs, one decimal for shares."""
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        cells = [str(int(v)) if i < 2 else f"{v:.1f}" for i, v in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print what the results say of the sizes, and both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", type=int, default=20_000, help="tables of scores a cell")
    options = parser.parse_args()
    sizes, pools = measured()
    print(sizes.round(1).to_string())
    print()
    print(markdown(coverage(options.draws, pools)))
    print()
    print(markdown(against_old(options.draws // 5, pools)))


if __name__ == "__main__":
    main()
