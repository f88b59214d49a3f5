"""Segmentation metrics of one case, in 3-D and in mm.

`METRICS` is the only list of metrics: evaluation, result files, comparisons, reports, sweeps and
trackers iterate over it. To add a metric, write a function of a `MaskPair` and register it there.

Definitions agree with medpy: surfaces are the voxels that a 6-neighbour erosion removes; ASSD and
HD95 are mean and 95th percentile of the pooled distances from either surface to the other. Instead
of distance transforms of the volume, one nearest-neighbour query per surface, in a box around the
structure, serves all metrics.

Empty masks are handled for all metrics alike:

- if both masks are empty, the metric is NaN and excluded from means;
- if one is (a miss or a false alarm), the metric has its `worst` value: 0 for Dice, the diagonal of
  the volume for distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from glua_bench.task import Structure

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"  # printed for undefined values
# Columns of a case's voxel size in mm, along the axes of the file's array.
SPACING = ("spacing_1", "spacing_2", "spacing_3")


@dataclass(frozen=True)
class MaskPair:
    """Predicted and reference mask of one structure of one case.

    Attributes:
        prediction: boolean mask, which may be cropped to a box around both masks.
        reference: boolean mask of the same shape.
        spacing: mm per axis.
        diagonal: diagonal of the whole volume in mm (`distance_penalty`).
    """

    prediction: np.ndarray
    reference: np.ndarray
    spacing: Sequence[float]
    diagonal: float

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Number of voxels of prediction and reference."""
        return int(np.count_nonzero(self.prediction)), int(np.count_nonzero(self.reference))

    @cached_property
    def distances(self) -> np.ndarray:
        """Distances from each surface voxel of either mask to the other surface, float64, mm.

        Those of the prediction's surface come first.

        Raises:
            ValueError: a mask is empty.
        """
        if not all(self.sizes):
            raise ValueError("Surface distances need two masks that are not empty.")
        steps = _steps(self.spacing, self.prediction.ndim)
        # No margin is needed, since voxels beyond the array count as outside, as in medpy.
        first, second = _surface(self.prediction), _surface(self.reference)
        return np.concatenate([_one_way(first, second, steps), _one_way(second, first, steps)])

    def scores(self) -> dict[str, float]:
        """Compute every metric, by name."""
        present = [size > 0 for size in self.sizes]
        if not any(present):
            return dict.fromkeys(METRICS, math.nan)
        if not all(present):
            return {
                name: self.diagonal if metric.worst is None else metric.worst
                for name, metric in METRICS.items()
            }
        return {name: float(metric.function(self)) for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Metric:
    """A metric, computed for each structure of each case.

    Attributes:
        name: column in result files, and key in JSON and trackers.
        title: displayed name.
        unit: e.g. "mm"; "%" for fractions that reports print in percent.
        better: "higher" or "lower".
        worst: value if one of the masks is empty; None is the diagonal of the volume.
        function: computes a finite value from masks that are not empty.
        digits: decimals of printed values (of percentages for fractions).
        per_structure: whether main tables show structures besides the mean.
    """

    name: str
    title: str
    unit: str
    better: str
    worst: float | None
    function: Callable[[MaskPair], float]
    digits: int = 1
    per_structure: bool = False

    @property
    def scale(self) -> int:
        """Factor between stored values and reports."""
        return 100 if self.unit == "%" else 1

    @property
    def label(self) -> str:
        """Column heading of stored values, e.g. "Dice" or "ASSD mm"."""
        return self.title if self.unit == "%" else f"{self.title} {self.unit}".strip()

    @property
    def key(self) -> str:
        """Name of a mean in a tracker, e.g. "dice" or "assd_mm"."""
        return self.name if self.unit in ("", "%") else f"{self.name}_{self.unit}"

    @property
    def heading(self) -> str:
        """Column heading in reports, e.g. "Dice (%)"."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: float | None) -> str:
        """Format a stored value for a column headed `label`; a dash if it is undefined."""
        if value is None or math.isnan(value):
            return MISSING
        return f"{value:.{self.digits + (2 if self.unit == '%' else 0)}f}"


def dice(masks: MaskPair) -> float:
    """Compute the Dice score in [0, 1], 2|P ∩ R| / (|P| + |R|).

    Example:
        >>> p, r = np.array([1, 1, 0], bool), np.array([1, 0, 0], bool)
        >>> round(dice(MaskPair(p, r, (1.0,), 2.0)), 3)
        0.667
    """
    return 2 * int(np.count_nonzero(masks.prediction & masks.reference)) / sum(masks.sizes)


def assd(masks: MaskPair) -> float:
    """Compute the average symmetric surface distance in mm.

    Mean of {d(p, ∂R) : p ∈ ∂P} ∪ {d(r, ∂P) : r ∈ ∂R}, over the pooled surface voxels.

    Example:
        >>> p, r = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> assd(MaskPair(p, r, (1.0, 2.0), 6.0))
        6.0
    """
    return float(masks.distances.mean())


def hd95(masks: MaskPair) -> float:
    """Compute the 95 % Hausdorff distance in mm.

    95th percentile of {d(p, ∂R) : p ∈ ∂P} ∪ {d(r, ∂P) : r ∈ ∂R}, over the pooled surface voxels.

    Example:
        >>> p, r = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> hd95(MaskPair(p, r, (1.0, 2.0), 6.0))
        6.0
    """
    return float(np.percentile(masks.distances, 95))


# First in every table, and used by the oracle, ranks, tests and charts.
PRIMARY = Metric("dice", "Dice", "%", "higher", 0.0, dice, per_structure=True)
METRICS = {
    metric.name: metric
    for metric in (
        PRIMARY,
        Metric("assd", "ASSD", "mm", "lower", None, assd, per_structure=True),
        Metric("hd95", "HD95", "mm", "lower", None, hd95),
    )
}


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Add columns of NaN for metrics that the rows lack, since they are older."""
    return rows.assign(**{name: math.nan for name in METRICS if name not in rows})


def distance_penalty(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Return the distance in mm for structures that only one of two masks has.

    It is the diagonal between the centres of the corner voxels, ‖(shape − 1) · spacing‖, the
    largest possible distance, so that omitting a structure never improves a score.

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
    ml: float | None = None,
) -> list[dict[str, Any]]:
    """Compute all metrics and volumes of the structures of one case.

    Args:
        prediction: class indices on the case's own grid, 0 for background.
        reference: class indices of the same shape.
        structures: class i + 1 is `structures[i]`.
        spacing: mm per axis of the arrays.
        ml: volume of a voxel in ml; by default the product of the spacing.

    Returns:
        One row per structure: structure (its name), all `METRICS`, missed (only the reference has
        it), false_alarm (only the prediction has it), reference_ml, prediction_ml.

    Raises:
        ValueError: the shapes differ, the spacing is invalid, or an index has no structure.

    Example:
        >>> reference = np.zeros((4, 8, 8), np.uint8)
        >>> reference[1:3, 2:6, 2:6] = 1
        >>> ventricle = Structure("LV", "left ventricle", (500,), "#e76f51")
        >>> row = case_metrics(reference, reference, [ventricle], (5.0, 1.0, 1.0))[0]
        >>> row["structure"], row["dice"], row["assd"]
        ('LV', 1.0, 0.0)
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise ValueError(
            f"Prediction {prediction.shape} and reference {reference.shape} differ in shape."
        )
    count = len(structures)
    for name, labels in (("Prediction", prediction), ("Reference", reference)):
        indices = labels.dtype.kind in "iu"
        if not indices or (labels.size and (labels.min() < 0 or labels.max() > count)):
            raise ValueError(f"{name} must contain class indices from 0 to {count}.")
    diagonal = distance_penalty(prediction.shape, spacing)
    if ml is None:
        ml = float(np.prod(np.asarray(spacing, float))) / 1000
    # One pass over each volume finds the box of each class.
    found, wanted = (
        ndimage.find_objects(np.asarray(labels, np.int32), count)
        for labels in (prediction, reference)
    )
    rows = []
    for index, structure in enumerate(structures, start=1):
        boxes = [box for box in (found[index - 1], wanted[index - 1]) if box is not None]
        inside = _union(boxes) if boxes else (slice(0, 0),) * prediction.ndim
        masks = MaskPair(prediction[inside] == index, reference[inside] == index, spacing, diagonal)
        predicted, expected = masks.sizes
        rows.append(
            {
                "structure": structure.name,
                **masks.scores(),
                "missed": expected > 0 and not predicted,
                "false_alarm": predicted > 0 and not expected,
                "reference_ml": expected * ml,
                "prediction_ml": predicted * ml,
            }
        )
    return rows


def voxel_sizes(spacing: Sequence[float]) -> dict[str, float]:
    """Return the columns of a case's voxel size, in mm per axis of the file's array."""
    return {name: float(length) for name, length in zip(SPACING, spacing, strict=True)}


def volumes_ml(labels: np.ndarray, structures: Sequence[Structure], ml: float) -> dict[str, float]:
    """Return the volume of each structure in ml, from class indices and the volume of a voxel."""
    return {s.name: np.count_nonzero(labels == i) * ml for i, s in enumerate(structures, start=1)}


def _surface(mask: np.ndarray) -> np.ndarray:
    """Return the voxels of a mask with a face neighbour outside it, where the array ends too."""
    # As `mask & ~ndimage.binary_erosion(mask)`, several times as fast.
    inner = mask.copy()
    for axis in range(mask.ndim):
        ahead = np.moveaxis(mask, axis, 0)
        kept = np.moveaxis(inner, axis, 0)
        kept[1:] &= ahead[:-1]
        kept[:-1] &= ahead[1:]
        kept[0] = False
        kept[-1] = False
    return mask & ~inner


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """Return the smallest box around boxes."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def _one_way(surface: np.ndarray, other: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Compute the distance from each voxel of a surface to another surface."""
    distances = np.zeros(int(np.count_nonzero(surface)))
    # Most surface voxels of good predictions coincide, and their distance is 0.
    apart = ~other[surface]
    if apart.any():
        tree = cKDTree(np.argwhere(other) * steps, balanced_tree=False, compact_nodes=False)
        distances[apart] = tree.query(np.argwhere(surface)[apart] * steps)[0]
    return distances


def _steps(spacing: Sequence[float], axes: int) -> np.ndarray:
    """Return the spacing as a validated array."""
    steps = np.asarray(spacing, float)
    if steps.shape != (axes,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"Spacing {tuple(spacing)} is not a positive length for {axes} axes.")
    return steps
