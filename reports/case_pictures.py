"""The same cases for every entry: which ones, on which slice, and what each entry found there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from glua_bench.config import UPPER
from glua_bench.data.cache import SliceCache
from glua_bench.reports.comparison import title
from glua_bench.reports.figures import Panel, parallel_map
from glua_bench.reports.results import Results, plain
from glua_bench.reports.run_figures import read_prediction, telling_slice
from glua_bench.reports.statistics import design
from glua_bench.scoring.metrics import PRIMARY
from glua_bench.task import UNANNOTATED, Dataset


@dataclass(frozen=True)
class ComparedCase:
    """One case and what every entry found in it, on the working grid.

    Args:
        id: the case's id.
        note: why it is shown, e.g. "worst".
        image: (Z, H, W) in [-1, 1].
        reference: (Z, H, W), class indices.
        predictions: entry → (Z, H, W), class indices.
        dice: entry → mean Dice over the structures, in [0, 1].
        spacing: of a voxel in mm (z, y, x).
    """

    id: str
    note: str
    image: np.ndarray
    reference: np.ndarray
    predictions: dict[str, np.ndarray]
    dice: dict[str, float]
    spacing: tuple[float, float, float]


def compared_cases(
    results: Results, task: str, dataset: Dataset, selector: str = "last"
) -> list[ComparedCase]:
    """Best, median and worst case of a task by the mean Dice over all entries but the bound.

    One seed is shown, the lowest of those that are compared; no seed is looked for.

    Args:
        results: with the runs' directories.
        task: e.g. "phantom mr-ct".
        dataset: gives images and references.
        selector: whose checkpoints count; predictions are kept of the run's first one.

    Returns:
        Fewer than three where there are fewer cases; none where predictions are not kept.
    """
    rows = plain(results.of(task, selector))
    paired = design(rows)
    if not paired.seeds:
        return []
    rows = rows[rows["seed"] == paired.seeds[0]]
    runs = rows.drop_duplicates("run").set_index("entry")["run"].astype(str).to_dict()
    directories = {entry: results.directories.get(run) for entry, run in runs.items()}
    dice = rows.groupby(["entry", "case"], observed=True)[PRIMARY.name].mean().unstack("case")
    dice.columns = [str(name) for name in dice.columns]
    first = next(iter(d for d in directories.values() if d is not None), None)
    if first is None:
        return []
    grid, target = first.config.grid, first.config.target
    test, cache, shown = {c.id: c for c in dataset.split(target, "test")}, SliceCache(), []
    for case_id, note in telling_cases(dice).items():
        case = test[case_id]
        view = dataset.view(case.domain).on(grid)
        image = cache.image(case.unlabelled(), view)
        reference = cache.label(case, view).open()
        predictions = {
            str(entry): read_prediction(directory, case, dataset, image.placement)
            for entry, directory in directories.items()
            if directory is not None and (directory.predictions / f"{case_id}.nii.gz").is_file()
        }
        if predictions:
            shown.append(
                ComparedCase(
                    case_id,
                    note,
                    np.asarray(image.open(), dtype=np.float32),
                    np.where(reference == UNANNOTATED, 0, reference),
                    predictions,
                    {str(entry): float(dice.loc[entry, case_id]) for entry in runs},
                    image.placement.grid_spacing,
                )
            )
    return shown


def telling_cases(dice: pd.DataFrame) -> dict[str, str]:
    """Case → why it is shown: "best", "median" or "worst" by the mean over entries but the bound.

    Args:
        dice: entry × case.

    Returns:
        Three cases, or as many as there are.
    """
    mean = dice.drop(index=UPPER, errors="ignore").mean()
    # A healthy case in which nothing was found has no Dice, and is the worst of none.
    mean = mean.dropna() if mean.notna().any() else mean
    order = [str(case) for case in mean.sort_values(ascending=False, kind="stable").index]
    notes: dict[str, str] = {}
    for note, position in (("best", 0), ("worst", -1), ("median", len(order) // 2)):
        notes.setdefault(order[position], note)
    return {case: notes[case] for case in order if case in notes}


def draw(
    paths: Sequence[Path], cases: Sequence[ComparedCase], entries: Sequence[str], dataset: Dataset
) -> None:
    """Write the cases side by side, to each of the paths.

    Args:
        paths: the files, PNG or SVG.
        cases: a column each.
        entries: a row each, those without predictions left out.
        dataset: gives the structures, and whether pictures may be redistributed.
    """
    slices = [telling_slice(case.reference) for case in cases]

    def panel(case: ComparedCase, z: int, entry: str) -> Panel:
        return Panel(
            case.image[z],
            case.reference[z],
            case.predictions[entry][z],
            case.id,
            case.dice[entry],
            case.note,
        )

    shown = [e for e in entries if all(e in case.predictions for case in cases)]
    for path in paths:
        parallel_map(
            path,
            [
                Panel(c.image[z], c.reference[z], c.reference[z], c.id, 1.0, c.note)
                for c, z in zip(cases, slices, strict=True)
            ],
            {
                title(entry): [panel(c, z, entry) for c, z in zip(cases, slices, strict=True)]
                for entry in shown
            },
            dataset.structures,
            publishable=dataset.publishable,
        )
