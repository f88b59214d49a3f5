"""The main job's table: each method's Dice, the share of the gap that it recovers, and its cost.

    glua-bench compare --methods glua,slaug --dataset phantom --directions all --seeds 3
    python -m benchmarks.comparison --runs runs --rows results/phantom_quick_baselines.parquet
    python -m benchmarks.comparison --table-of results/phantom_quick.parquet

Prints the table of all finished runs below a directory, or of the entries that `--entries` names,
with what it says, the intervals and tests of every two entries, and Dice of each repeat; and adds
their publishable rows to a file if asked, where runs of the same id are replaced. `--table-of`
prints the same of such a file, and `--page` writes its table and sentences between
`<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page, where NAME is the file's, or the table
alone where the comments name `NAME table`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.rows import into_page
from glua_bench.config import PRESETS
from glua_bench.records.run_directory import RunDirectory
from glua_bench.reports import statistics
from glua_bench.reports.comparison import competing, table, verdict
from glua_bench.reports.results import DEFAULTS, from_runs


def entry_of(run: RunDirectory) -> str:
    """A run's name in the table: its method, and what is not as by default."""
    config, said = run.config, run.read_environment()
    parts = ["supervised" if config.scenario == "supervised" else config.method]
    if said["changed"]:
        parts.append(said["variant"] or ", ".join(f"{k} = {v}" for k, v in said["changed"].items()))
    if config.augmentation == "photometric":
        parts.append("photometric")
    if config.steps != PRESETS[config.preset]["steps"]:
        parts.append(f"{config.steps} updates")
    return " + ".join(parts)


def found(runs_root: Path, entries: list[str]) -> pd.DataFrame:
    """The rows of the finished runs below a directory; of those entries, if any are given.

    They have the columns of a report's `rows.parquet`, among them the id of the code.
    """
    runs = from_runs(runs_root, pooled=False)
    rows = pd.concat([runs.rows, runs.repeats], ignore_index=True)
    rows["entry"] = rows["run"].map({id_: entry_of(run) for id_, run in runs.directories.items()})
    return rows[rows["entry"].isin(entries)] if entries else rows


def added(rows: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The publishable rows of runs, after those of other runs that a file holds."""
    # Rows of real patients stay where they are.
    rows = rows[rows["dataset"] == "phantom"]
    if not file.exists():
        return rows
    before = pd.read_parquet(file)
    # Columns that rows of an older version lack.
    before = before.assign(**{name: v for name, v in DEFAULTS.items() if name not in before})
    return pd.concat([before[~before["run"].isin(rows["run"])], rows], ignore_index=True)


def show(rows: pd.DataFrame) -> None:
    """Print the table, and what follows from the same rows."""
    print(table(rows).round(3).to_string())
    for task in rows["task"].unique():
        print(f"\n{verdict(rows, task, percent=True)}")
        print(statistics.pairs(competing(statistics.scores(rows, task))).round(3).to_string())
    if statistics.REPEAT in rows:
        last = rows[rows["selector"] == "last"].groupby(
            ["task", "entry", "seed", statistics.REPEAT]
        )
        print(f"\n{last['dice'].mean().unstack(statistics.REPEAT).dropna().round(3).to_string()}")


HEAD = {
    "Dice": "{direction} Dice",
    "last bits": "last bits",
    "gap recovered": "gap",
    "ASSD mm": "ASSD",
}


def page_table(rows: pd.DataFrame) -> list[str]:
    """Return the lines of the table of a page: both directions of each entry, and its memory."""
    lines = table(rows)
    repeated = bool(lines["last bits"].notna().any())
    kinds = [kind for kind in HEAD if kind != "last bits" or repeated]
    shown = {}
    dice = lines["Dice"].unstack("task")
    # By the directions in which all were trained, so that a missing one moves no entry.
    means = dice.dropna(axis=1).mean(axis=1) if dice.notna().all().any() else dice.mean(axis=1)
    for entry in sorted(means.index, key=lambda e: (means[e], e)):
        cells = []
        for task in ("phantom mr-ct", "phantom ct-mr"):
            if (task, entry) not in lines.index:
                cells += [""] * len(kinds)
                continue
            row = lines.loc[task, entry]
            spread = "" if row["seeds"] == 1 else f" ± {row['sd']:.2f}"
            gap = f"{100 * row['gap recovered']:.0f} %".replace("-0 %", "0 %")
            bound = entry in ("source_only", "supervised")
            cells += [f"{row['Dice']:.2f}{spread}"]
            cells += ["" if pd.isna(row["last bits"]) else f"± {row['last bits']:.2f}"] * repeated
            cells += ["" if bound else gap, f"{row['ASSD mm']:.1f}"]
        own = lines.xs(entry, level="entry")
        fewest, most = own["seeds"].min(), own["seeds"].max()
        cells += [f"{own['peak MiB'].mean():.0f}"]
        cells += [f"{fewest:.0f}" if fewest == most else f"{fewest:.0f} to {most:.0f}"]
        head, plus, rest = entry.partition(" + ")
        name = "supervised (privileged)" if entry == "supervised" else f"`{head}`{plus}{rest}"
        shown[entry] = "".join(f"| {text} " if text else "| " for text in [name, *cells]) + "|"
    order = ["source_only", *(e for e in shown if e not in ("source_only", "supervised"))]
    titles = [HEAD[k].format(direction=d) for d in ("MR→CT", "CT→MR") for k in kinds]
    head = ["method", *titles, "MiB", "seeds"]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *(shown[entry] for entry in [*order, "supervised"]),
    ]


def against(rows: pd.DataFrame, task: str, entry: str = "glua") -> str:
    """Return the differences between an entry and all others; "" if it is not compared."""
    pairs = statistics.pairs(competing(statistics.scores(rows, task)))
    own = []
    for a, b, *found in pairs[["a", "b", "difference", "low", "high"]].to_numpy():
        if entry in (a, b):
            mean, low, high = (100 * value for value in found)
            if entry == b:
                a, b, mean, low, high = b, a, -mean, -high, -low
            own.append((mean, f"{b} {mean:.1f} ({low:.1f} to {high:.1f})"))
    if not own:
        return ""
    told = "; ".join(text for _, text in sorted(own))
    return f"{task}, Dice of {entry} minus that of each other entry, points (95 % CI): {told}."


def page_text(rows: pd.DataFrame) -> str:
    """Return the table of a page, and what the comparison says in each direction."""
    tasks = sorted(rows["task"].unique(), reverse=True)
    said = [verdict(rows, task, percent=True) for task in tasks]
    said += filter(None, (against(rows, task) for task in tasks))
    return "\n".join([*page_table(rows), *(f"\n- {sentence}" for sentence in said)])


def main() -> None:
    """Print the table, of runs or of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--entries", default="", help="names of entries, separated by semicolons")
    parser.add_argument("--rows", type=Path, help="add the publishable rows to this file")
    parser.add_argument("--table-of", type=Path, help="print the table of such a file, and stop")
    parser.add_argument("--page", type=Path, help="write the table of --table-of into this page")
    options = parser.parse_args()
    if options.table_of is not None:
        rows = pd.read_parquet(options.table_of)
        show(rows)
        if options.page is not None:
            mark, text = options.table_of.stem, page_text(rows)
            if f"<!-- {mark} table: begin -->" in options.page.read_text(encoding="utf-8"):
                mark, text = f"{mark} table", "\n".join(page_table(rows))
            into_page(options.page, mark, text)
        return
    rows = found(options.runs, [entry for entry in options.entries.split(";") if entry])
    if options.rows is not None:
        added(rows, options.rows).to_parquet(options.rows, index=False)
    show(rows)


if __name__ == "__main__":
    main()
