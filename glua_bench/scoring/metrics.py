"""The metrics of one case, in 3-D and in mm.

`METRICS` is the only list of metrics: evaluation, result files, comparisons, reports, sweeps and
trackers iterate over it. To add a metric, write a function of a `MaskPair` and register it there.

The definitions are those of medpy: surfaces are the voxels that a 6-neighbour erosion removes,
ASSD and HD95 are mean and 95th percentile of the pooled distances from either surface to the
other. What differs is the cost. A distance transform of the whole volume, twice for each metric
and structure, is replaced by one nearest-neighbour query per surface, in a box around the
structure, and every metric of the structure reads the distances of this one query.

Masks without the structure are handled here once, for every metric:

- neither mask has the structure: nothing was to be found, every metric is nan and enters no mean;
- one of them has it (a miss, or a false alarm): the metric takes its `worst` value. Dice is 0; a
  distance is the diagonal of the volume, the largest distance that its voxels allow.
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

MISSING = "–"  # printed where there is no value


@dataclass(frozen=True)
class MaskPair:
    """The predicted and the reference mask of one structure of one case.

    Attributes:
        prediction: boolean mask, any shape; a box around both masks is enough.
        reference: boolean mask, the same shape.
        spacing: mm per axis.
        diagonal: mm between opposite corners of the whole volume (`distance_penalty`).
    """

    prediction: np.ndarray
    reference: np.ndarray
    spacing: Sequence[float]
    diagonal: float

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Voxels of the prediction and of the reference."""
        return int(np.count_nonzero(self.prediction)), int(np.count_nonzero(self.reference))

    @cached_property
    def distances(self) -> np.ndarray:
        """Distances from each surface voxel of either mask to the other mask's surface.

        Computed once, on first use, and shared by all metrics that read it.

        Returns:
            float64, mm; first those from the prediction's surface, then those from the
            reference's.

        Raises:
            ValueError: a mask is empty.
        """
        if not all(self.sizes):
            raise ValueError("Surface distances need two masks that are not empty.")
        steps = _steps(self.spacing, self.prediction.ndim)
        # No margin is needed: what lies beyond an array counts as outside, here and in medpy.
        first, second = _surface(self.prediction), _surface(self.reference)
        return np.concatenate([_one_way(first, second, steps), _one_way(second, first, steps)])

    def scores(self) -> dict[str, float]:
        """The value of every metric by name, by the rules for masks without the structure."""
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
    """A number that is computed for each structure of each case.

    Attributes:
        name: the column in result files, and the key in JSON and in trackers.
        title: what readers see.
        unit: of the values, e.g. "mm"; "%" for a share of one that reports print in percent.
        better: "higher" or "lower".
        worst: the value where only one of the masks has the structure; None is the diagonal of
            the volume, for distances in mm.
        function: the value of two masks that are not empty; finite.
        digits: decimals of a printed value (of a share, of its percentage).
        per_structure: whether main tables print each structure besides the mean.
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
        """Factor from stored values to those in reports."""
        return 100 if self.unit == "%" else 1

    @property
    def label(self) -> str:
        """Head of a column of stored values, e.g. "Dice" or "ASSD mm"."""
        return self.title if self.unit == "%" else f"{self.title} {self.unit}".strip()

    @property
    def key(self) -> str:
        """Name of a mean in a tracker, e.g. "dice" or "assd_mm"."""
        return self.name if self.unit in ("", "%") else f"{self.name}_{self.unit}"

    @property
    def heading(self) -> str:
        """Head of a column of a report, e.g. "Dice (%)"."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: float | None) -> str:
        """A stored value as printed below `label`; a dash where there is none."""
        if value is None or math.isnan(value):
            return MISSING
        return f"{value:.{self.digits + (2 if self.unit == '%' else 0)}f}"


def dice(masks: MaskPair) -> float:
    """Overlap in [0, 1]: 2|P ∩ R| / (|P| + |R|).

    Example:
        >>> p, r = np.array([1, 1, 0], bool), np.array([1, 0, 0], bool)
        >>> round(dice(MaskPair(p, r, (1.0,), 2.0)), 3)
        0.667
    """
    return 2 * int(np.count_nonzero(masks.prediction & masks.reference)) / sum(masks.sizes)


def assd(masks: MaskPair) -> float:
    """Average symmetric surface distance in mm.

    mean of {d(p, ∂R) : p ∈ ∂P} ∪ {d(r, ∂P) : r ∈ ∂R}, over the pooled surface voxels.

    Example:
        >>> p, r = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> assd(MaskPair(p, r, (1.0, 2.0), 6.0))
        6.0
    """
    return float(masks.distances.mean())


def hd95(masks: MaskPair) -> float:
    """95th percentile of the surface distances in mm.

    percentile₉₅ of {d(p, ∂R) : p ∈ ∂P} ∪ {d(r, ∂P) : r ∈ ∂R}, over the pooled surface voxels.

    Example:
        >>> p, r = np.array([[1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> hd95(MaskPair(p, r, (1.0, 2.0), 6.0))
        6.0
    """
    return float(np.percentile(masks.distances, 95))


# Selection by the oracle, ranks, tests and charts use this one. It stands first in every table.
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
    """Rows with a column for every metric; nan for metrics that are newer than the rows."""
    return rows.assign(**{name: math.nan for name in METRICS if name not in rows})


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
    ml: float | None = None,
) -> list[dict[str, Any]]:
    """Every metric of every structure of one case, and the volumes.

    Args:
        prediction: class indices on the case's own grid, 0 for background.
        reference: class indices, the same shape.
        structures: class i + 1 is `structures[i]`.
        spacing: mm per axis of the arrays.
        ml: volume of a voxel in ml; by default that of a box of this spacing.

    Returns:
        One row per structure, in order: structure (its name), a value for each of `METRICS`,
        missed (only the reference has the structure), false_alarm (only the prediction has it),
        reference_ml, prediction_ml.

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
    if prediction.shape != reference.shape:
        raise ValueError(
            f"Prediction {prediction.shape} and reference {reference.shape} differ in shape."
        )
    count = len(structures)
    for name, labels in (("Prediction", prediction), ("Reference", reference)):
        indices = labels.dtype.kind in "iu"
        if not indices or (labels.size and (labels.min() < 0 or labels.max() > count)):
            raise ValueError(f"{name} holds something else than class indices from 0 to {count}.")
    diagonal = distance_penalty(prediction.shape, spacing)
    if ml is None:
        ml = float(np.prod(np.asarray(spacing, float))) / 1000
    # One pass over the volume finds the box of each class; everything else happens in the boxes.
    found, wanted = (
        ndimage.find_objects(np.asarray(labels, np.int32), count)
        for labels in (prediction, reference)
    )
    rows = []
    for index, structure in enumerate(structures):
        boxes = [box for box in (found[index], wanted[index]) if box is not None]
        box = _union(boxes) if boxes else (slice(0, 0),) * prediction.ndim
        masks = MaskPair(
            prediction[box] == index + 1, reference[box] == index + 1, spacing, diagonal
        )
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


def volumes_ml(labels: np.ndarray, structures: Sequence[Structure], ml: float) -> dict[str, float]:
    """Return the volume of each structure in ml, from class indices and the volume of a voxel."""
    return {s.name: np.count_nonzero(labels == i) * ml for i, s in enumerate(structures, start=1)}


def _one_way(surface: np.ndarray, other: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Distances from each voxel of a surface to another one, given as masks of one box."""
    distances = np.zeros(int(np.count_nonzero(surface)))
    # Where surfaces coincide the distance is 0 without a search, in a good prediction mostly.
    apart = ~other[surface]
    if apart.any():
        tree = cKDTree(np.argwhere(other) * steps, balanced_tree=False, compact_nodes=False)
        distances[apart] = tree.query(np.argwhere(surface)[apart] * steps)[0]
    return distances


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


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around boxes."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def _steps(spacing: Sequence[float], axes: int) -> np.ndarray:
    """The spacing as an array, one positive number an axis."""
    steps = np.asarray(spacing, float)
    if steps.shape != (axes,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"Spacing {tuple(spacing)} is not a positive length for {axes} axes.")
    return steps
