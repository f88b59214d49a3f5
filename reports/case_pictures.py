"""Pictures of the best, median and worst case of a task, with the predictions of every entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from glua_bench.config import is_privileged
from glua_bench.data.cache import SliceCache
from glua_bench.reports.comparison import title
from glua_bench.reports.figures import FORMATS, Frame, Panel, case_grid
from glua_bench.reports.results import Results, plain
from glua_bench.reports.run_figures import frame, most_visible_slice, read_prediction
from glua_bench.reports.statistics import design
from glua_bench.scoring.metrics import PRIMARY
from glua_bench.task import UNANNOTATED, Dataset


@dataclass(frozen=True)
class ComparedCase:
    """One case and the predictions of every entry, on the working grid.

    Attributes:
        id: id of the case.
        note: why the case is shown, e.g. "worst".
        image: (Z, H, W) in [-1, 1].
        reference: (Z, H, W), class indices.
        predictions: entry → (Z, H, W), class indices.
        dice: entry → mean Dice over structures, in [0, 1].
        spacing: mm per voxel (z, y, x).
        frame: size and orientation of its slices.
    """

    id: str
    note: str
    image: np.ndarray
    reference: np.ndarray
    predictions: dict[str, np.ndarray]
    dice: dict[str, float]
    spacing: tuple[float, float, float]
    frame: Frame | None = None


def compared_cases(
    results: Results, task: str, dataset: Dataset, selector: str = "last"
) -> list[ComparedCase]:
    """Load the best, median and worst case of a task at the lowest compared seed.

    Args:
        results: with the directories of the runs.
        task: e.g. "phantom mr-ct".
        dataset: gives images and references.
        selector: checkpoint selector of the Dice; runs keep predictions of their first selector.

    Returns:
        Up to three cases; none if no run keeps predictions.
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
    trained = (d for d in directories.values() if d is not None and not d.config.external)
    known = next(trained, None)
    grid = dataset.grid("standard") if known is None else known.config.grid
    target = first.config.target
    test, cache, shown = {c.id: c for c in dataset.split(target, "test")}, SliceCache(), []
    for case_id, note in example_cases(dice).items():
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
                    frame(image.placement, view.reading, case.image),
                )
            )
    return shown


def example_cases(dice: pd.DataFrame) -> dict[str, str]:
    """Return case → "best", "median" or "worst", by mean Dice without privileged entries.

    Args:
        dice: entry × case.
    """
    mean = dice[[not is_privileged(str(entry)) for entry in dice.index]].mean()
    # Dice is undefined if neither mask has a structure; such a case is not the worst.
    mean = mean.dropna() if mean.notna().any() else mean
    order = [str(case) for case in mean.sort_values(ascending=False, kind="stable").index]
    notes: dict[str, str] = {}
    for note, position in (("best", 0), ("worst", -1), ("median", len(order) // 2)):
        notes.setdefault(order[position], note)
    return {case: notes[case] for case in order if case in notes}


def draw(
    path: Path, cases: Sequence[ComparedCase], entries: Sequence[str], dataset: Dataset
) -> list[Path]:
    """Draw the cases side by side, one row per entry with predictions of all cases.

    Args:
        path: the PNG to write; SVG and PDF are written beside it.
        cases: one column each.
        entries: in the order of the rows.
        dataset: gives the structures, and whether pictures may be redistributed.

    Returns:
        The files, the PNG first.
    """
    shown = [e for e in entries if all(e in case.predictions for case in cases)]
    panels = []
    for case in cases:
        z = most_visible_slice(case.reference)
        predictions = {title(e): case.predictions[e][z] for e in shown}
        dice = {title(e): case.dice[e] for e in shown}
        reference = case.reference[z]
        panels.append(
            Panel(case.image[z], reference, predictions, dice, case.id, case.note, case.frame)
        )
    case_grid(path, panels, dataset.structures, publishable=dataset.publishable)
    return [path.with_suffix(suffix) for suffix in FORMATS]
