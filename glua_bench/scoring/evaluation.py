"""Predict and score cases: one row per case and structure.

Every slice is predicted, probabilities are resampled to the file's own grid, and metrics are
computed there, in mm, against the original label file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import ALONE, Neighbourhood, Stacks
from glua_bench.data.resampling import Placement
from glua_bench.data.stores import CachedImage
from glua_bench.data.volumes import read_label_volume, restore, save_labels
from glua_bench.scoring.metrics import METRICS, PRIMARY, case_metrics, complete, voxel_sizes
from glua_bench.task import AVERAGE, UNANNOTATED, Case, Dataset, DomainView, Grid, Structure

Predict = Callable[[Tensor], Tensor]


@torch.no_grad()
def predict_volumes(
    predict: Predict,
    volumes: Iterable[Stacks],
    device: torch.device,
    batch_size: int = 32,
) -> Iterator[np.ndarray]:
    """Predict class probabilities of every slice of volumes; batches may span volumes.

    Args:
        predict: (N, S, H, W) → logits (N, K, H, W).
        volumes: the stacks of each volume, in [-1, 1].
        device: device of the images for `predict`.
        batch_size: slices per batch.

    Yields:
        float32 (K, Z, H, W) of each volume, in order.
    """
    waiting: list[tuple[Stacks, int]] = []  # volume and slice, not predicted yet
    done: list[np.ndarray] = []  # predicted slices, not yielded yet
    depths: list[int] = []

    def predict_batch(size: int) -> None:
        images = np.stack([np.asarray(stacks[z], np.float32) for stacks, z in waiting[:size]])
        batch = torch.from_numpy(images).to(device)
        done.extend(predict(batch).float().softmax(1).cpu().numpy())
        del waiting[:size]

    def finished() -> Iterator[np.ndarray]:
        while depths and len(done) >= depths[0]:
            depth = depths.pop(0)
            yield np.stack(done[:depth], axis=1)
            del done[:depth]

    for stacks in volumes:
        depths.append(len(stacks))
        waiting.extend((stacks, z) for z in range(len(stacks)))
        while len(waiting) >= batch_size:
            predict_batch(batch_size)
        yield from finished()
    while waiting:
        predict_batch(batch_size)
    yield from finished()
    # Some published pipelines drop the last incomplete batch of slices.
    assert not depths and not done, "not every slice was predicted"


def predict_volume(
    predict: Predict,
    image: CachedImage,
    device: torch.device,
    batch_size: int = 32,
    neighbourhood: Neighbourhood = ALONE,
) -> np.ndarray:
    """Predict class probabilities of one cached volume, float32 (K, Z, H, W)."""
    stacks = image.stacks(neighbourhood)
    (probabilities,) = predict_volumes(predict, [stacks], device, batch_size)
    return probabilities


def evaluate(
    predict: Predict,
    dataset: Dataset,
    cases: Sequence[Case],
    grid: Grid,
    cache: SliceCache,
    device: torch.device,
    progress: Progress,
    predictions: Path | None = None,
    title: str = "evaluate",
    neighbourhood: Neighbourhood = ALONE,
) -> pd.DataFrame:
    """Predict and score cases.

    Args:
        predict: (N, S, H, W) → logits (N, K, H, W).
        dataset: defines structures and readings.
        cases: cases to score; training never reads their labels.
        grid: the working grid.
        cache: preprocessed slices.
        device: device of the images for `predict`.
        progress: progress display.
        predictions: directory for predicted label volumes; None saves none.
        title: stage name in the progress display.
        neighbourhood: input slices of `predict`.

    Returns:
        One row per case and structure: case, subject, domain, the columns of `case_metrics`, and
        the voxel size of the file in mm, on which distances are computed (`SPACING`).
    """
    rows = []
    progress.stage(title, len(cases), unit="case")
    views = [dataset.view(case.domain).on(grid) for case in cases]
    images = [cache.image(case.unlabelled(), view) for case, view in zip(cases, views, strict=True)]
    stacks = (image.stacks(neighbourhood) for image in images)
    found = predict_volumes(predict, stacks, device)
    for done, (case, view, image, probabilities) in enumerate(
        zip(cases, views, images, found, strict=True)
    ):
        labels = restore(probabilities, image.placement)
        rows += score_prediction(case, labels, image.placement, view, predictions)
        progress.update(done + 1)
    return pd.DataFrame(rows)


def score_prediction(
    case: Case,
    labels: np.ndarray,
    placement: Placement,
    view: DomainView,
    predictions: Path | None = None,
) -> list[dict[str, Any]]:
    """Score the prediction of one case against its label file, and save it.

    Args:
        case: the case, with its label.
        labels: predicted class indices, uint8 in the file's stored axes.
        placement: of the case's image.
        view: of the case's domain.
        predictions: directory for the label volume; None saves none.

    Returns:
        As `score_case`.

    Raises:
        DataError: the label file cannot be used.
    """
    if predictions is not None:
        values = [structure.values[0] for structure in view.structures]
        save_labels(predictions / f"{case.id}.nii.gz", labels, placement, values)
    reference = read_label_volume(case.truth, case.image, view)
    return score_case(case, labels, reference, view.structures, placement.spacing, placement.ml)


def score_case(
    case: Case,
    labels: np.ndarray,
    reference: np.ndarray,
    structures: Sequence[Structure],
    spacing: Sequence[float],
    ml: float,
) -> list[dict[str, Any]]:
    """Score the prediction of one case; voxels that are unannotated in the reference are excluded.

    Args:
        case: the case.
        labels: predicted class indices in the file's stored axes.
        reference: class indices or `UNANNOTATED`, same shape.
        structures: class i + 1 is `structures[i]`.
        spacing: mm per axis.
        ml: volume of a voxel in ml.

    Returns:
        One row per structure: case, subject, domain, the columns of `case_metrics`, and the
            voxel size.
    """
    unannotated = reference == UNANNOTATED  # set to background in both
    found, wanted = np.where(unannotated, 0, labels), np.where(unannotated, 0, reference)
    of_case = {"case": case.id, "subject": case.subject, "domain": case.domain}
    scores = case_metrics(found, wanted, structures, spacing, ml)
    return [{**of_case, **score, **voxel_sizes(spacing)} for score in scores]


def mean_score(cases: pd.DataFrame, metric: str = PRIMARY.name) -> float:
    """Average a metric over the structures of each case, then over the cases."""
    return float(cases.groupby("case", sort=False)[metric].mean().mean())


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """Average over cases: one row per selector and structure, and one for the mean.

    NaN (structures in neither mask) is excluded; misses have the `worst` value. The "mean" row
    averages structures within each case before it averages cases.

    Args:
        cases: rows of `evaluate` with a column `selector`; missing metrics are NaN.

    Returns:
        Columns selector, structure, all metrics, misses, cases.
    """
    cases, metrics, rows = complete(cases), list(METRICS), []
    for selector, chosen in cases.groupby("selector", sort=False):
        by_structure = chosen.groupby("structure", sort=False)
        parts = [(name, part, part[metrics]) for name, part in by_structure]
        parts.append((AVERAGE, chosen, chosen.groupby("case", sort=False)[metrics].mean()))
        rows += [
            {
                "selector": selector,
                "structure": structure,
                **scores.mean().to_dict(),
                "misses": int(part["missed"].sum()),
                "cases": len(scores),
            }
            for structure, part, scores in parts
        ]
    return pd.DataFrame(rows)
