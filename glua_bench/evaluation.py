"""Volumes → predictions → one tidy row per case and structure.

Every slice of every case is predicted, the probabilities are carried back to the file's own
grid, and the metrics are computed there, in mm, against the label file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from glua_bench.cache import CachedImage, SliceCache
from glua_bench.console import Progress
from glua_bench.metrics import case_metrics
from glua_bench.task import Case, Dataset, Grid
from glua_bench.volumes import read_label_volume, restore, save_labels

Predict = Callable[[Tensor], Tensor]


@torch.no_grad()
def predict_volume(
    predict: Predict, image: CachedImage, device: torch.device, batch_size: int = 32
) -> np.ndarray:
    """Class probabilities of every slice of a volume.

    Args:
        predict: (N, 1, H, W) → logits (N, K, H, W).
        image: the preprocessed volume.
        device: where `predict` expects images.
        batch_size: slices in one pass.

    Returns:
        float32 (K, Z, H, W).
    """
    voxels = image.open()
    parts = []
    for start in range(0, len(voxels), batch_size):
        slices = torch.from_numpy(np.array(voxels[start : start + batch_size], dtype=np.float32))
        logits = predict(slices[:, None].to(device))
        parts.append(logits.float().softmax(1).cpu().numpy())
    probabilities = np.concatenate(parts).transpose(1, 0, 2, 3)
    # Some published pipelines drop the last incomplete block of slices; here it cannot happen.
    assert probabilities.shape[1:] == image.shape, "not every slice was predicted"
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
) -> pd.DataFrame:
    """Predict and score cases.

    Args:
        predict: (N, 1, H, W) → logits (N, K, H, W).
        dataset: gives structures and how files are read.
        cases: what to score; their labels are read here and nowhere in training.
        grid: the working grid.
        cache: preprocessed slices.
        device: where `predict` expects images.
        progress: what the user sees.
        predictions: directory for label volumes on the files' own grids; None saves none.
        title: name of this work in the progress display.

    Returns:
        One row per case and structure: case, subject, domain, structure, dice, assd, hd95
        (mm), missed, false_alarm, reference_ml, prediction_ml.
    """
    values = [structure.values[0] for structure in dataset.structures]
    rows = []
    progress.stage(title, len(cases))
    for done, case in enumerate(cases):
        image = cache.image(case.unlabelled(), dataset.reading, grid)
        labels = restore(predict_volume(predict, image, device), image.placement)
        if predictions is not None:
            save_labels(predictions / f"{case.id}.nii.gz", labels, image.placement, values)
        reference = read_label_volume(case.label, case.image, dataset.structures, dataset.reading)
        spacing = image.placement.spacing
        ml = float(np.prod(spacing)) / 1000
        scores = case_metrics(labels, reference, dataset.structures, spacing)
        for index, (structure, score) in enumerate(
            zip(dataset.structures, scores, strict=True), start=1
        ):
            rows.append(
                {
                    "case": case.id,
                    "subject": case.subject,
                    "domain": case.domain,
                    **score,
                    "structure": structure.name,
                    "reference_ml": float((reference == index).sum()) * ml,
                    "prediction_ml": float((labels == index).sum()) * ml,
                }
            )
        progress.update(done + 1)
    return pd.DataFrame(rows)


def mean_dice(cases: pd.DataFrame) -> float:
    """Dice of one set of predictions: mean over structures within each case, then over cases."""
    return float(cases.groupby("case", sort=False)["dice"].mean().mean())


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """Means over cases, one row per selector and structure, and one for their mean.

    A structure that neither prediction nor reference shows is undefined (nan) and does not
    enter; a missed one enters with Dice 0 and its penalty distance. The "mean" row averages
    structures within each case before it averages cases.

    Args:
        cases: rows of `evaluate`, with a column `selector`.

    Returns:
        selector, structure, dice, assd, hd95, misses, cases.
    """
    metrics = ["dice", "assd", "hd95"]
    rows = []
    for selector, chosen in cases.groupby("selector", sort=False):
        for structure, part in chosen.groupby("structure", sort=False):
            rows.append(
                {
                    "selector": selector,
                    "structure": structure,
                    **part[metrics].mean().to_dict(),
                    "misses": int(part["missed"].sum()),
                    "cases": len(part),
                }
            )
        per_case = chosen.groupby("case", sort=False)[metrics].mean()
        rows.append(
            {
                "selector": selector,
                "structure": "mean",
                **per_case.mean().to_dict(),
                "misses": int(chosen["missed"].sum()),
                "cases": len(per_case),
            }
        )
    return pd.DataFrame(rows)
