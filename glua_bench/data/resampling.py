"""Resample between the grid of a file and the working grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from scipy import sparse

from glua_bench.data.formats import Forms, triple
from glua_bench.data.geometry import tuples

_EPSILON = 1e-6


@dataclass(frozen=True)
class Placement:
    """Position of the working grid relative to a file's voxel grid.

    Working axis i (0 = Z, 1 = H, 2 = W) is file axis `axes[i]`, reversed if `flips[i]`. The centre
    of working voxel j is at oriented voxel index `offset[i] + step[i] * j`.

    Attributes:
        file_shape: voxels per stored axis.
        affine: voxel-to-world matrix of the file, 4 rows of 4.
        forms: geometry of the file's header, copied to predictions.
        spacing: mm per stored axis; a spacing stated by the dataset replaces the header's.
        ml: volume of a voxel of the file in ml.
        axes: file axis of each working axis.
        flips: True for reversed working axes.
        offset: oriented index of the first working voxel, per working axis.
        step: oriented voxels per working voxel, per working axis.
        shape: (Z, H, W) of the working grid.
    """

    file_shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    forms: Forms
    spacing: tuple[float, float, float]
    ml: float
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    offset: tuple[float, float, float]
    step: tuple[float, float, float]
    shape: tuple[int, int, int]

    @property
    def oriented_shape(self) -> tuple[int, int, int]:
        """(Z, Y, X) of the whole file after orientation."""
        return triple(self.file_shape[axis] for axis in self.axes)

    @property
    def grid_spacing(self) -> tuple[float, float, float]:
        """mm per working voxel along (Z, H, W)."""
        return triple(self.spacing[a] * step for a, step in zip(self.axes, self.step, strict=True))

    @property
    def grid_ml(self) -> float:
        """Volume of a working voxel in ml."""
        return self.ml * prod(self.step)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Placement:
        """Build from `dataclasses.asdict`, possibly with lists instead of tuples as in JSON.

        Raises:
            ValueError: the table is not a placement.
        """
        try:
            fields = {name: tuples(value) for name, value in table.items()}
            forms = {name: tuples(value) for name, value in fields.pop("forms").items()}
            return cls(**fields, forms=Forms(**forms))
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"Not a placement: {error}.") from error


@dataclass(frozen=True)
class Map:
    """Linear interpolation along one axis.

    Attributes:
        matrix: (out, in) weights; each row sums to 1.
        inside: (out,), True for outputs centred within the input's voxels; others are clamped.
        same: True if the matrix is the identity.
    """

    matrix: sparse.csr_array
    inside: np.ndarray
    same: bool

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and weights of one output."""
        start, stop = self.matrix.indptr[index : index + 2]
        return self.matrix.indices[start:stop], self.matrix.data[start:stop]

    def window(self) -> slice:
        """Return the range of outputs that are inside."""
        found = np.flatnonzero(self.inside)
        return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0)

    def reached(self, marked: np.ndarray) -> tuple[slice, slice, Map] | None:
        """Restrict the map to the extent of the marked inputs.

        Args:
            marked: (in,), boolean.

        Returns:
            The range of outputs inside that depend on it, the range of their inputs, and the map
            between the two; None if there is no such output.
        """
        first = self.matrix.indices[self.matrix.indptr[:-1]]
        last = self.matrix.indices[self.matrix.indptr[1:] - 1]
        ends = np.flatnonzero(marked)[[0, -1]]
        hit = np.flatnonzero(self.inside & (last >= ends[0]) & (first <= ends[1]))
        if not hit.size:
            return None
        outputs = slice(int(hit[0]), int(hit[-1]) + 1)
        inputs = slice(int(first[outputs].min()), int(last[outputs].max()) + 1)
        part = Map(self.matrix[outputs, inputs], self.inside[outputs], self.same)
        return outputs, inputs, part


def _map(count: int, positions: np.ndarray, scale: float) -> Map:
    """Interpolate `count` samples at `positions`, spaced by `scale` samples.

    The triangular kernel widens with the scale, so that a coarser grid averages samples.
    """
    inside = (positions >= -0.5 - _EPSILON) & (positions <= count - 0.5 + _EPSILON)
    clamped = np.clip(positions, 0, count - 1)
    # Correct rounding errors of positions at a sample.
    whole = np.rint(clamped)
    clamped = np.where(np.abs(clamped - whole) < _EPSILON, whole, clamped)
    width = max(1.0, scale)
    taps = np.floor(clamped - width)[:, None] + np.arange(int(2 * width) + 3)[None]
    weights = np.maximum(0.0, 1 - np.abs(clamped[:, None] - taps) / width)
    weights[(taps < 0) | (taps >= count)] = 0
    weights /= weights.sum(1, keepdims=True)
    rows, columns = np.nonzero(weights)
    indices = rows, taps[rows, columns].astype(np.int64)
    matrix = sparse.csr_array(
        (weights[rows, columns].astype(np.float32), indices), shape=(len(positions), count)
    )
    same = len(positions) == count and scale == 1 and bool((clamped == np.arange(count)).all())
    return Map(matrix, inside, same)


def maps_to_grid(placement: Placement) -> list[Map]:
    """Return the maps from oriented file voxels to working voxels, per axis."""
    maps = []
    for axis in range(3):
        step = placement.step[axis]
        positions = placement.offset[axis] + step * np.arange(placement.shape[axis])
        maps.append(_map(placement.oriented_shape[axis], positions, step))
    return maps


def maps_to_file(placement: Placement) -> list[Map]:
    """Return the maps from working voxels to oriented file voxels, per axis."""
    maps = []
    for axis in range(3):
        step = placement.step[axis]
        indices = np.arange(placement.oriented_shape[axis])
        positions = (indices - placement.offset[axis]) / step
        made = _map(placement.shape[axis], positions, 1 / step)
        if axis == 0:
            # A coarser stack ends up to half a step early; its last slice is used for the rest.
            made = Map(made.matrix, np.ones_like(made.inside), made.same)
        maps.append(made)
    return maps


def apply(rows: Map, columns: Map, planes: np.ndarray) -> np.ndarray:
    """Resample (C, H, W) planes along both in-plane axes."""
    if rows.same and columns.same:
        return planes
    channels, height, width = planes.shape
    # One matrix product per axis, with the resampled axis first and the others flattened.
    flat = np.ascontiguousarray(planes.transpose(1, 0, 2)).reshape(height, channels * width)
    flat = (rows.matrix @ flat).reshape(-1, channels, width)
    flat = np.ascontiguousarray(flat.transpose(2, 1, 0)).reshape(width, -1)
    flat = (columns.matrix @ flat).reshape(-1, channels, rows.matrix.shape[0])
    return flat.transpose(1, 2, 0)
