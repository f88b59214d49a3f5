"""Whether it helps GLUA to prefer features with the larger gap, and where D1 stands in training.

    glua-bench ablate --method glua --dataset phantom --directions all --seeds 3 --selectors all \
        --oracle
    python benchmarks/gain.py --runs runs --out results/phantom_quick_gain.csv
    python benchmarks/gain.py

Writes the means of D1's scores and of the gain over parts of the training, a row for each finished
run of `glua` and part; without `--runs`, prints such a file. Prints from the ablation's rows, too,
the difference in Dice between GLUA and its variants, over pairs of the same direction and seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from glua_bench.records.run_directory import list_runs
from glua_bench.reports.results import from_rows

RESULTS = Path(__file__).parent.parent / "results"
PARTS = ((1, 25), (26, 150), (151, 300), (301, 500))  # first and last update
MEANS = ("d1_source", "d1_target", "gain_mean", "gain_sd")


def parts(runs_root: Path) -> pd.DataFrame:
    """direction, seed, updates, the means, gain_min and gain_max of finished runs of `glua`."""
    rows = []
    for run in list_runs(runs_root):
        config = run.config
        if not run.done or config.method != "glua" or config.perturbation:
            continue
        if run.read_environment()["changed"]:
            continue
        losses = pd.read_parquet(run.path / "metrics.parquet").query("stage == 'segment'")
        steps = losses.pivot_table(index="step", columns="name", values="value")
        for first, last in PARTS:
            part = steps.loc[first:last]
            rows.append(
                {
                    "direction": config.direction,
                    "seed": config.seed,
                    "updates": f"{first}-{last}",
                    **{name: part[name].mean() for name in MEANS},
                    "gain_min": part["gain_min"].min(),
                    "gain_max": part["gain_max"].max(),
                }
            )
    return pd.DataFrame(rows)


def differences(rows: Path) -> pd.DataFrame:
    """Variant → Dice of GLUA minus that of the variant in points: mean, sd and number of pairs."""
    found = from_rows(rows).chosen_by("last")
    own = found[found["method"] == "glua"]
    dice = own.pivot_table(index=["task", "seed"], columns="variant", values="dice")
    points = -100 * dice.sub(dice["GLUA"], axis=0)
    return points.agg(["mean", "std", "count"]).T.drop("GLUA")


def main() -> None:
    """Write the file, or print what the files say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="read finished runs below this directory")
    parser.add_argument("--out", type=Path, default=RESULTS / "phantom_quick_gain.csv")
    options = parser.parse_args()
    if options.runs is not None:
        parts(options.runs).to_csv(options.out, index=False, float_format="%.4f")
    steps = pd.read_csv(options.out)
    ends = {"gain_min": "min", "gain_max": "max"}
    by_part = steps.groupby("updates", sort=False)
    print(by_part.agg({**dict.fromkeys(MEANS, "mean"), **ends}).round(2).to_string())
    print(differences(RESULTS / "phantom_quick_ablation.parquet").round(1).to_string())


if __name__ == "__main__":
    main()
