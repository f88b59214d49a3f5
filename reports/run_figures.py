"""The figures of one run, and of a dataset's domains: which pictures, from which files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from glua_bench.data.cache import SliceCache
from glua_bench.data.resampling import Placement
from glua_bench.data.volumes import load_label
from glua_bench.records.run_directory import RunDirectory
from glua_bench.reports.figures import (
    Panel,
    domain_montage,
    overlay_montage,
    picture_grid,
    restyle_grid,
)
from glua_bench.scoring.metrics import PRIMARY, volumes_ml
from glua_bench.task import UNANNOTATED, Case, Dataset, Grid, GridView, Structure

if TYPE_CHECKING:
    from torch import Tensor

    from glua_bench.method import Batch


def draw_run(
    run: RunDirectory,
    dataset: Dataset,
    rows: pd.DataFrame,
    batch: Batch,
    pictures: Mapping[str, Tensor],
) -> None:
    """Write a run's figures: best, median and worst case, and what its method shows.

    Args:
        run: its directory; holds the predictions.
        dataset: gives images, labels and colours.
        rows: results per case and structure of the primary selector.
        batch: source and target images.
        pictures: the method's own, name → (N, 1, H, W). `restyled` is shown between source and
            target, everything else in a grid.
    """
    _draw_cases(run, dataset, rows)
    plain = {name: values[:, 0].numpy() for name, values in pictures.items()}
    source = batch.source_images[:, 0].cpu().numpy()
    target = None if batch.target_images is None else batch.target_images[:, 0].cpu().numpy()
    if target is not None and "restyled" in plain:
        restyle_grid(
            run.figures / "restyled.png",
            source,
            plain.pop("restyled"),
            target,
            publishable=dataset.publishable,
        )
    if plain:
        own = {"source": source} if target is None else {"source": source, "target": target}
        picture_grid(
            run.figures / "pictures.png", {**own, **plain}, publishable=dataset.publishable
        )


def _draw_cases(run: RunDirectory, dataset: Dataset, rows: pd.DataFrame) -> None:
    config = run.config
    # A healthy case in which nothing was found has no Dice, and is the worst of none.
    dice = rows.groupby("case")[PRIMARY.name].mean().sort_values(ascending=False)
    dice = dice.dropna() if dice.notna().any() else dice
    chosen = {"best": 0, "median": len(dice) // 2, "worst": len(dice) - 1}
    test = {case.id: case for case in dataset.split(config.target, "test")}
    cache, panels = SliceCache(), []
    for note, position in chosen.items():
        case = test[str(dice.index[position])]
        view = dataset.view(case.domain).on(config.grid)
        image = cache.image(case.unlabelled(), view)
        reference = cache.label(case, view).open()
        predicted = read_prediction(run, case, dataset, image.placement)
        z = telling_slice(np.asarray(reference))
        panels.append(
            Panel(
                np.asarray(image.open()[z], dtype=np.float32),
                np.asarray(reference[z]),
                predicted[z],
                case.id,
                float(dice.iloc[position]),
                note,
            )
        )
    privileged = ", privileged" if config.privileged else ""
    overlay_montage(
        run.figures / "cases.png",
        panels,
        dataset.structures,
        f"{config.method} on {config.fold_name} {config.direction}, seed {config.seed}{privileged}",
        dataset.publishable,
    )


def read_prediction(
    run: RunDirectory, case: Case, dataset: Dataset, placement: Placement
) -> np.ndarray:
    """A run's prediction as it was saved, brought to the working grid by the code for labels.

    Args:
        run: its directory.
        case: what was segmented.
        dataset: gives structures and how files are read.
        placement: of the case's image.

    Returns:
        (Z, H, W), class indices.

    Raises:
        DataError: the prediction is missing or cannot be read.
    """
    return load_label(
        run.predictions / f"{case.id}.nii.gz",
        case.image,
        dataset.view(case.domain).of_predictions(),
        placement,
    )


def telling_slice(labels: np.ndarray) -> int:
    """The slice with the most structures, among those the one with the largest area.

    Args:
        labels: (Z, H, W), class indices or `UNANNOTATED`.
    """
    labels = np.where(labels == UNANNOTATED, 0, labels)
    structures = [len(np.unique(plane[plane > 0])) for plane in labels]
    areas = (labels > 0).sum((1, 2))
    return max(range(len(labels)), key=lambda z: (structures[z], areas[z]))


def draw_prediction(
    path: Path,
    slices: np.ndarray,
    classes: np.ndarray,
    structures: Sequence[Structure],
    title: str,
    publishable: bool,
    columns: int = 6,
) -> Path:
    """Slices of one volume with the contours of what was found, spread over where it was.

    Args:
        path: the PNG to write.
        slices: (Z, H, W) in [-1, 1].
        classes: (Z, H, W), class indices.
        structures: the classes.
        title: of the figure.
        publishable: False stamps the figure as not for redistribution.
        columns: slices in a row; two rows are drawn at most.

    Returns:
        The path.
    """
    shown = np.flatnonzero((classes > 0).any((1, 2)))
    shown = shown if len(shown) else np.arange(len(classes))  # nothing found is seen, too
    count = min(2 * columns, len(shown))
    chosen = shown[((np.arange(count) + 0.5) * len(shown) / count).astype(int)]
    panels = [
        (np.asarray(slices[z], np.float32), classes[z], f"slice {z + 1}/{len(classes)}")
        for z in chosen
    ]
    return domain_montage(path, title, panels, structures, publishable, columns)


def draw_dataset(dataset: Dataset, grid: Grid, out: Path, columns: int = 6) -> list[Path]:
    """One montage a domain: slices of all splits with contours, intensities, and volumes.

    Volumes are those of all labelled cases on the working grid, inside of its window.

    Args:
        dataset: what to show.
        grid: the working grid to show it on.
        out: directory of the PNGs.
        columns: slices in a row; two rows are drawn.

    Returns:
        The files.
    """
    cache, files = SliceCache(), []
    for domain in dataset.domains():
        cases, view = dataset.cases(domain), dataset.view(domain).on(grid)
        count = min(len(cases), 2 * columns)
        slices = []
        for case in (cases[i * len(cases) // count] for i in range(count)):
            image = cache.image(case.unlabelled(), view).open()
            if case.label is None:  # the middle slice, without contours
                label, z = np.zeros(image.shape, np.uint8), len(image) // 2
            else:
                label = np.asarray(cache.label(case, view).open())
                z = telling_slice(label)
            slices.append(
                (
                    np.asarray(image[z], dtype=np.float32),
                    np.asarray(label[z]),
                    f"{case.id} ({case.split}), slice {z + 1}/{len(label)}",
                )
            )
        files.append(
            domain_montage(
                out / f"{dataset.fold_name}_{domain}.png",
                f"{dataset.fold_name}, domain {domain}: {grid.size}×{grid.size} pixels of "
                f"{grid.spacing:g} mm",
                slices,
                dataset.structures,
                dataset.publishable,
                columns,
                _volumes(cache, cases, view),
            )
        )
    return files


def _volumes(cache: SliceCache, cases: Sequence[Case], view: GridView) -> list[tuple[float, ...]]:
    """ml of each structure in each labelled case; empty where no case has a label."""
    rows = []
    for case in cases:
        if case.label is None:
            continue
        ml = cache.image(case.unlabelled(), view).placement.grid_ml
        labels = np.asarray(cache.label(case, view).open())
        rows.append(volumes_ml(labels, view.structures, ml).values())
    return list(zip(*rows, strict=True))
