"""Dice, ASSD and HD95 of one case, in 3-D and in mm.

The definitions are those of medpy: surfaces are the voxels that a 6-neighbour erosion removes,
ASSD and HD95 are mean and 95th percentile of the pooled distances from either surface to the
other. What differs is the cost. A distance transform of the whole volume, twice for each metric
and structure, is replaced by one nearest-neighbour query per surface, in a box around the
structure, and both distances come from the same query.

What a mask that is not there means is decided here once:

- neither has the structure: nothing was to be found, every metric is nan and enters no mean;
- one of them has it (a miss, or a false alarm): Dice is 0, and both distances are the diagonal of
  the volume, the largest distance that its voxels allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from glua_bench.task import Structure


class Row(TypedDict):
    """How well one structure of one case was found.

    Args:
        structure: the structure's name.
        dice: overlap in [0, 1]; nan where neither mask has the structure.
        assd: average symmetric surface distance in mm; nan as for `dice`.
        hd95: 95th percentile of surface distances in mm; nan as for `dice`.
        missed: the reference has the structure, the prediction does not.
        false_alarm: the prediction has the structure, the reference does not.
        reference_ml: volume of the reference structure in ml.
        prediction_ml: volume of the predicted structure in ml.
    """

    structure: str
    dice: float
    assd: float
    hd95: float
    missed: bool
    false_alarm: bool
    reference_ml: float
    prediction_ml: float


def dice_score(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Overlap of two masks, in [0, 1].

    2|P ∩ R| / (|P| + |R|); nan where both are empty, because nothing was there to find.

    Args:
        prediction: boolean mask, any shape.
        reference: boolean mask, the same shape.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> round(dice_score(np.array([1, 1, 0], bool), np.array([1, 0, 0], bool)), 3)
        0.667
    """
    prediction, reference = _masks(prediction, reference)
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if not total:
        return float("nan")
    return 2 * int(np.count_nonzero(prediction & reference)) / total


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> np.ndarray:
    """Distances from each surface voxel of either mask to the other mask's surface.

    Args:
        prediction: boolean mask, not empty.
        reference: boolean mask of the same shape, not empty.
        spacing: mm per axis.

    Returns:
        float64, mm; first those from the prediction's surface, then those from the reference's.

    Raises:
        ValueError: the shapes differ, a mask is empty, or the spacing does not fit.

    Example:
        >>> a, b = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> surface_distances(a, b, (1.0, 2.0)).tolist()
        [6.0, 6.0]
    """
    prediction, reference = _masks(prediction, reference)
    steps = _steps(spacing, prediction.ndim)
    if not prediction.any() or not reference.any():
        raise ValueError("Surface distances need two masks that are not empty.")
    box = _box(prediction | reference)
    # No margin is needed: what lies beyond an array counts as outside, here and in medpy.
    surfaces = [_surface(mask[box]) for mask in (prediction, reference)]
    return _pooled_distances(surfaces[0], surfaces[1], steps)


def assd(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """Average symmetric surface distance in mm.

    mean of {d(p, ∂R) : p ∈ ∂P} ∪ {d(r, ∂P) : r ∈ ∂R}, over the pooled surface voxels. nan where
    both masks are empty, `distance_penalty` where one is.

    Args:
        prediction: boolean mask, any shape.
        reference: boolean mask, the same shape.
        spacing: mm per axis.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit.

    Example:
        >>> a, b = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> assd(a, b, (1.0, 2.0))
        6.0
    """
    return _distances(prediction, reference, spacing)[0]


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the surface distances in mm.

    percentile₉₅ of {d(p, ∂R) : p ∈ ∂P} ∪ {d(r, ∂P) : r ∈ ∂R}, over the pooled surface voxels. nan
    where both masks are empty, `distance_penalty` where one is.

    Args:
        prediction: boolean mask, any shape.
        reference: boolean mask, the same shape.
        spacing: mm per axis.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit.

    Example:
        >>> a, b = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> hd95(a, b, (1.0, 2.0))
        6.0
    """
    return _distances(prediction, reference, spacing)[1]


def distance_penalty(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """The distance in mm that counts where only one of two masks has a structure.

    The diagonal of the volume between the centres of its corner voxels, ‖(shape − 1) · spacing‖:
    the largest value that a distance between two of its voxels can take, so no prediction gains by
    leaving a structure out.

    Example:
        >>> distance_penalty((4, 5), (1.0, 1.0))
        5.0
    """
    steps = _steps(spacing, len(shape))
    return float(np.linalg.norm((np.asarray(shape) - 1) * steps))


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    structures: Sequence[Structure],
    spacing: Sequence[float],
) -> list[Row]:
    """Every metric of every structure of one case.

    Args:
        prediction: class indices on the case's own grid, 0 for background.
        reference: class indices, the same shape.
        structures: class i + 1 is `structures[i]`.
        spacing: mm per axis of the arrays.

    Returns:
        one row per structure, in order.

    Raises:
        ValueError: the shapes differ, the spacing does not fit, or an index has no structure.

    Example:
        >>> reference = np.zeros((4, 8, 8), np.uint8)
        >>> reference[1:3, 2:6, 2:6] = 1
        >>> ventricle = Structure("LV", "left ventricle", (500,), "#e76f51")
        >>> row = case_metrics(reference, reference, [ventricle], (5.0, 1.0, 1.0))[0]
        >>> row["structure"], row["dice"], row["assd"]
        ('LV', 1.0, 0.0)
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    _same_shape(prediction, reference)
    steps = _steps(spacing, prediction.ndim)
    for name, labels in (("Prediction", prediction), ("Reference", reference)):
        if labels.dtype.kind not in "iu" or (labels.size and not _known(labels, len(structures))):
            raise ValueError(
                f"{name} holds something else than class indices from 0 to {len(structures)}."
            )
    penalty = distance_penalty(prediction.shape, spacing)
    ml = float(np.prod(steps)) / 1000
    # One pass over the volume finds the box of each class; everything else happens in the boxes.
    found, wanted = (
        ndimage.find_objects(np.asarray(labels, np.int32), len(structures))
        for labels in (prediction, reference)
    )
    rows: list[Row] = []
    for index, structure in enumerate(structures):
        boxes = [box for box in (found[index], wanted[index]) if box is not None]
        box = _union(boxes) if boxes else (slice(0, 0),) * prediction.ndim
        masks = prediction[box] == index + 1, reference[box] == index + 1
        sizes = int(np.count_nonzero(masks[0])), int(np.count_nonzero(masks[1]))
        dice, distances = dice_score(*masks), np.array([np.nan if not boxes else penalty])
        if len(boxes) == 2:
            distances = _pooled_distances(_surface(masks[0]), _surface(masks[1]), steps)
        rows.append(
            Row(
                structure=structure.name,
                dice=dice,
                assd=float(distances.mean()),
                hd95=float(np.percentile(distances, 95)),
                missed=bool(sizes[1] and not sizes[0]),
                false_alarm=bool(sizes[0] and not sizes[1]),
                reference_ml=sizes[1] * ml,
                prediction_ml=sizes[0] * ml,
            )
        )
    return rows


def _distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[float, float]:
    """ASSD and HD95 with the rules for empty masks."""
    prediction, reference = _masks(prediction, reference)
    present = bool(prediction.any()), bool(reference.any())
    if not any(present):
        return float("nan"), float("nan")
    if not all(present):
        penalty = distance_penalty(prediction.shape, spacing)
        return penalty, penalty
    distances = surface_distances(prediction, reference, spacing)
    return float(distances.mean()), float(np.percentile(distances, 95))


def _pooled_distances(
    prediction: np.ndarray, reference: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """Distances between two surfaces, given as boolean masks of one box, in both directions."""
    pooled = []
    for surface, other in ((prediction, reference), (reference, prediction)):
        distances = np.zeros(int(np.count_nonzero(surface)))
        # Where surfaces coincide the distance is 0 without a search, in a good prediction mostly.
        apart = ~other[surface]
        if apart.any():
            tree = cKDTree(np.argwhere(other) * steps, balanced_tree=False, compact_nodes=False)
            distances[apart] = tree.query(np.argwhere(surface)[apart] * steps)[0]
        pooled.append(distances)
    return np.concatenate(pooled)


def _surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask with a face neighbour outside it; beyond the array is outside."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        ahead = np.moveaxis(mask, axis, 0)
        kept = np.moveaxis(inner, axis, 0)
        kept[1:] &= ahead[:-1]
        kept[:-1] &= ahead[1:]
        kept[0] = False
        kept[-1] = False
    return mask & ~inner


def _known(labels: np.ndarray, highest: int) -> bool:
    """Whether all labels lie between 0 and the highest class index."""
    return int(labels.min()) >= 0 and int(labels.max()) <= highest


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around boxes."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty."""
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _masks(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as boolean arrays of one shape."""
    prediction, reference = np.asarray(prediction).astype(bool), np.asarray(reference).astype(bool)
    _same_shape(prediction, reference)
    return prediction, reference


def _same_shape(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"Prediction {prediction.shape} and reference {reference.shape} differ in shape."
        )


def _steps(spacing: Sequence[float], axes: int) -> np.ndarray:
    """The spacing as an array, one positive number an axis."""
    steps = np.asarray(spacing, float)
    if steps.shape != (axes,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"Spacing {tuple(spacing)} is not a positive length for {axes} axes.")
    return steps
