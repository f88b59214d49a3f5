"""The figures of a run, of a prediction and of a dataset: load images and labels and draw them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from glua_bench.data.cache import SliceCache
from glua_bench.data.formats import open_volume
from glua_bench.data.resampling import Placement
from glua_bench.data.volumes import load_label
from glua_bench.records.run_directory import RunDirectory
from glua_bench.reports.figures import Frame, Panel, case_grid, domain_montage, strip
from glua_bench.scoring.metrics import PRIMARY, volumes_ml
from glua_bench.task import UNANNOTATED, Case, Dataset, Grid, GridView, Reading, Structure

# Logged mean scores of the discriminator D1 on source and target features (1/2 is chance).
GAP = ("d1_source", "d1_target")
DOMAINS = ("source", "target")

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
    """Draw a run's figures: three of its cases, and the strip of its method's pictures.

    `cases` shows the best, median and worst case. `strip` shows source images, restyled source
    images, target images and maps on them, and the scores of a domain discriminator over training,
    as far as the method has them.

    Args:
        run: directory with the predictions.
        dataset: gives images, labels and colours.
        rows: results per case and structure of the primary selector.
        batch: source and target images.
        pictures: name → (N, 1, H, W). `restyled` stands between source and target.
    """
    cache = SliceCache()
    _draw_cases(run, dataset, rows, cache)
    shown = {name: values[:, 0].numpy() for name, values in pictures.items()}
    gap = gap_over_training(run)
    if not shown and gap is None:
        return
    images = {"source": batch.source_images[:, 0].cpu().numpy()}
    if "restyled" in shown:
        images["restyled"] = shown.pop("restyled")
    if batch.target_images is not None:
        images["target"] = batch.target_images[:, 0].cpu().numpy()
    config = run.config
    # Images of a privileged run come from the target.
    domains = {"source": config.target if config.privileged else config.source}
    domains["target"] = config.target
    frames = {name: _common_frame(cache, dataset, d, config.grid) for name, d in domains.items()}
    plain = Frame(frames["source"].width)  # of pictures that may be from either domain
    if frames["source"].sides == frames["target"].sides:
        plain = frames["source"]
    frames["restyled"] = frames["source"]
    strip(
        run.figures / "strip.png",
        {**images, **shown},
        f"{config.method} on {config.fold_name} {config.direction}, seed {config.seed}: training "
        "slices (source and target are unpaired)",
        dataset.publishable,
        {**dict.fromkeys(shown, plain), **frames},
        gap,
    )


def gap_over_training(run: RunDirectory) -> pd.DataFrame | None:
    """Return the mean scores of a run's domain discriminator on both domains, by update.

    Methods log them as `GAP`. Equal scores mean that the discriminator cannot tell the domains
    apart.

    Returns:
        "source" and "target", indexed by step and averaged over at most 200 spans; None if the
        method does not log them.
    """
    rows = [row for row in run.read_log() if set(GAP) <= set(row["values"])]
    if len(rows) < 2:
        return None
    values = [[row["values"][key] for key in GAP] for row in rows]
    found = pd.DataFrame(values, index=[row["step"] for row in rows], columns=list(DOMAINS))
    spans = np.arange(len(found)) // -(-len(found) // 200)
    steps = found.index.to_series().groupby(spans).last()
    return found.groupby(spans).mean().set_axis(steps.to_numpy())


def _common_frame(cache: SliceCache, dataset: Dataset, domain: str, grid: Grid) -> Frame:
    """Return the frame of a domain's training slices, without letters if they differ."""
    view, cases = dataset.view(domain).on(grid), dataset.split(domain, "train")
    if not cases:
        return Frame(grid.size * grid.spacing)
    placements = [cache.image(case.unlabelled(), view).placement for case in cases]
    # One header stands for all: reading hundreds of DICOM series would take long.
    oriented = _oriented(view.reading, cases[0].image)
    frames = [Frame.of(placement, view.reading, oriented) for placement in placements]
    same = len({frame.sides for frame in frames}) == 1
    return Frame(frames[0].width, frames[0].sides) if same else Frame(frames[0].width)


def frame(placement: Placement, reading: Reading, image: Path) -> Frame:
    """Return size and orientation of the slices of an image file on the working grid."""
    return Frame.of(placement, reading, _oriented(reading, image))


def _oriented(reading: Reading, image: Path) -> bool:
    """Return True if slices are turned by the header of an image, and it states an orientation."""
    return reading.orientation == "canonical" and open_volume(image).oriented


def _draw_cases(run: RunDirectory, dataset: Dataset, rows: pd.DataFrame, cache: SliceCache) -> None:
    config = run.config
    # Dice is undefined if neither mask has a structure; such a case is not the worst.
    dice = rows.groupby("case")[PRIMARY.name].mean().sort_values(ascending=False)
    dice = dice.dropna() if dice.notna().any() else dice
    chosen = {"best": 0, "median": len(dice) // 2, "worst": len(dice) - 1}
    test = {case.id: case for case in dataset.split(config.target, "test")}
    panels = []
    for note, position in chosen.items():
        case = test[str(dice.index[position])]
        view = dataset.view(case.domain).on(config.grid)
        image = cache.image(case.unlabelled(), view)
        reference = cache.label(case, view).open()
        predicted = read_prediction(run, case, dataset, image.placement)
        z = most_visible_slice(np.asarray(reference))
        panels.append(
            Panel(
                np.asarray(image.open()[z], dtype=np.float32),
                np.asarray(reference[z]),
                {"prediction": predicted[z]},
                {"prediction": float(dice.iloc[position])},
                case.id,
                note,
                frame(image.placement, view.reading, case.image),
            )
        )
    privileged = ", privileged" if config.privileged else ""
    case_grid(
        run.figures / "cases.png",
        panels,
        dataset.structures,
        f"{config.method} on {config.fold_name} {config.direction}, seed {config.seed}{privileged}",
        dataset.publishable,
    )


def read_prediction(
    run: RunDirectory, case: Case, dataset: Dataset, placement: Placement
) -> np.ndarray:
    """Load a saved prediction of a run on the working grid, resampled as labels are.

    Args:
        run: directory of the run.
        case: the segmented case.
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


def most_visible_slice(labels: np.ndarray) -> int:
    """Return the index of the slice with the most structures; ties go to the largest area.

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
    frame: Frame | None = None,
    columns: int = 6,
) -> Path:
    """Draw evenly spaced slices of a volume, with contours, where any structure was found.

    Args:
        path: the PNG to write; SVG and PDF are written beside it.
        slices: (Z, H, W) in [-1, 1].
        classes: (Z, H, W), class indices.
        structures: the classes.
        title: of the figure.
        publishable: False stamps the figure as not for redistribution.
        frame: size and orientation of the slices.
        columns: slices per row; at most two rows are drawn.

    Returns:
        The path.
    """
    shown = np.flatnonzero((classes > 0).any((1, 2)))
    shown = shown if len(shown) else np.arange(len(classes))  # nothing found: all slices
    count = min(2 * columns, len(shown))
    chosen = shown[((np.arange(count) + 0.5) * len(shown) / count).astype(int)]
    panels = [
        (np.asarray(slices[z], np.float32), classes[z], f"slice {z + 1}/{len(classes)}", frame)
        for z in chosen
    ]
    return domain_montage(path, title, panels, structures, publishable, columns)


def draw_dataset(dataset: Dataset, grid: Grid, out: Path, columns: int = 6) -> list[Path]:
    """Draw a montage of each domain and channel: slices of all splits, histograms, and volumes.

    Volumes are those of all labelled cases, on the working grid and inside its window.

    Args:
        dataset: the dataset.
        grid: the working grid.
        out: directory of the figures.
        columns: slices per row; two rows are drawn.

    Returns:
        The PNGs; SVG and PDF are beside them.
    """
    cache, files = SliceCache(), []
    for domain in dataset.domains():
        cases, view = dataset.cases(domain), dataset.view(domain).on(grid)
        count = min(len(cases), 2 * columns)
        chosen = [cases[i * len(cases) // count] for i in range(count)]
        volumes = _volumes(cache, cases, view)
        for index in range(view.reading.inputs):
            slices = []
            for case in chosen:
                cached = cache.image(case.unlabelled(), view)
                image = cached.channels[index].open()
                if case.label is None:  # the middle slice, without contours
                    label, z = np.zeros(image.shape, np.uint8), len(image) // 2
                else:
                    label = np.asarray(cache.label(case, view).open())
                    z = most_visible_slice(label)
                voxel = "×".join(f"{length:.2f}" for length in cached.placement.spacing)
                slices.append(
                    (
                        np.asarray(image[z], dtype=np.float32),
                        np.asarray(label[z]),
                        f"{case.id} ({case.split}), slice {z + 1}/{len(label)}\n{voxel} mm",
                        frame(cached.placement, view.reading, case.image),
                    )
                )
            name, title = f"{dataset.fold_name}_{domain}", f"{dataset.fold_name}, domain {domain}"
            if view.reading.inputs > 1:
                channel = view.reading.channels[index].name
                name += f"_{index + 1}_" + re.sub(r"\W+", "_", channel)
                title += f", channel {channel}"
            files.append(
                domain_montage(
                    out / f"{name}.png",
                    f"{title}: {grid.size}×{grid.size} pixels of {grid.spacing:.3g} mm",
                    slices,
                    dataset.structures,
                    dataset.publishable,
                    columns,
                    volumes,
                )
            )
    return files


def _volumes(cache: SliceCache, cases: Sequence[Case], view: GridView) -> list[tuple[float, ...]]:
    """Return the ml of each structure in each labelled case; empty without labels."""
    rows = []
    for case in cases:
        if case.label is None:
            continue
        ml = cache.image(case.unlabelled(), view).placement.grid_ml
        labels = np.asarray(cache.label(case, view).open())
        rows.append(volumes_ml(labels, view.structures, ml).values())
    return list(zip(*rows, strict=True))
