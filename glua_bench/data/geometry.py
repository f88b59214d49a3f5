"""Where a file's voxels lie: orientation, spacing, shear, and doubts about headers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from glua_bench.data.formats import NIFTI, Forms, VolumeFile
from glua_bench.errors import DataError
from glua_bench.task import Reading

# Voxel sides and lengths of volumes in mm, beyond which a header is damaged. They also bound what
# resampling costs.
_FINEST, _LONGEST = 1e-3, 10_000.0

# Two affines that put no voxel further apart than this share of a voxel's side are the same.
_APART = 0.1

# Voxel sides that differ by less are the same; headers round them.
SAME_SIDES = 0.01

# The cosine of two axes from which on they are sheared: distances are off by half of it, at most.
_SHEAR = 0.01

# What float32 leaves unsure of the square of a quaternion's fourth number; nibabel's own limit.
_QUATERNION = 3.6e-7


def frame(
    file: VolumeFile, reading: Reading
) -> tuple[np.ndarray, tuple[float, float, float], tuple[int, int, int], tuple[bool, bool, bool]]:
    """Affine, spacing per file axis, and the file axis and direction of each working axis.

    Raises:
        DataError: the header has no usable orientation or voxel size.
    """
    if reading.orientation not in ("canonical", "stored"):
        raise ValueError(f"Unknown orientation '{reading.orientation}' in a dataset's Reading.")
    if {reading.slice_axis, reading.row_axis} not in ({0, 1}, {0, 2}, {1, 2}):
        raise ValueError("slice_axis and row_axis of a dataset's Reading are two of 0, 1, 2.")
    affine, path = file.affine, file.path
    file_axes, reverse = [0, 1, 2], [False, False, False]
    if reading.orientation == "canonical":
        _refuse_shear(affine, path)
        for file_axis, (canonical, direction) in enumerate(orientation(affine, path)):
            file_axes[int(canonical)] = file_axis
            reverse[int(canonical)] = direction < 0
    header = nib.affines.voxel_sizes(affine) if reading.orientation == "canonical" else file.spacing
    spacing = [float(length) for length in header]
    if reading.stated_spacing is not None:
        for oriented, stated in enumerate(reading.stated_spacing):
            if stated > 0:  # 0 leaves this axis to the header
                spacing[file_axes[oriented]] = float(stated)
    for length, count in zip(spacing, file.shape, strict=True):
        # Written so that nan fails, too.
        if not (length >= _FINEST and length * count <= _LONGEST):
            size = " × ".join(f"{own:.3g}" for own in spacing)
            unit = {1: " (its unit is the metre)", 3: " (its unit is the micrometre)"}
            raise DataError(
                f"{path} has voxels of {size} mm{unit.get(file.forms.unit, '')}, as no scan has: "
                "repair the header's pixdim, affine and unit."
            )
    for axis in reading.flip:
        reverse[axis] = not reverse[axis]
    column_axis = 3 - reading.slice_axis - reading.row_axis
    cut = (reading.slice_axis, reading.row_axis, column_axis)
    return (
        affine,
        triple(spacing, float),
        triple([file_axes[axis] for axis in cut], int),
        triple([reverse[axis] for axis in cut], bool),
    )


def orientation(affine: np.ndarray, path: Path) -> np.ndarray:
    """For each file axis which canonical axis it feeds, and which way.

    Raises:
        DataError: the affine has no orientation.
    """
    found = np.full((3, 2), np.nan)
    # What is not finite, or nearly so, has no singular values.
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        found = nib.io_orientation(affine)
    if not np.isfinite(found).all():
        raise DataError(
            f"{path} has an affine without an orientation: repair the header's sform or qform."
        )
    return found


def _refuse_shear(affine: np.ndarray, path: Path) -> None:
    """Axes that are not perpendicular: neither distances nor volumes follow from voxel sides.

    Raises:
        DataError: two axes are further from a right angle than rounding leaves them.
    """
    with np.errstate(all="ignore"):  # what has no directions has its own sentence
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        cosines = np.abs(np.triu(directions.T @ directions, 1))
        most = float(cosines.max())
    if np.isfinite(most) and _SHEAR < most < 1:
        raise DataError(
            f"{path} has axes at an angle of {np.degrees(np.arccos(most)):.1f}° instead of "
            "90°, as a tilted CT gantry leaves them: resample image and label onto straight axes "
            "(nibabel.processing.resample_to_output; order=0 for the label)."
        )


def voxel_ml(affine: np.ndarray, spacing: Sequence[float], reading: Reading) -> float:
    """Millilitres of a voxel: by the affine's determinant, with the spacing that counts.

    Args:
        affine: (4, 4), to mm; counts where the reading trusts it.
        spacing: mm per stored axis, as `frame` gives it.
        reading: of the dataset.
    """
    ml = prod(spacing) / 1000
    if reading.orientation != "canonical":
        return ml
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return ml * float(abs(np.linalg.det(directions)))


def same_place(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put each voxel of a volume at one place, within a share of its side."""
    with np.errstate(all="ignore"):
        sides = np.linalg.norm(second[:3, :3], axis=0)
    return bool(max_displacement(first, second, shape) <= _APART * sides.min())  # False with nan


def second_form(forms: Forms, shape: Sequence[int]) -> np.ndarray | None:
    """The qform's affine in mm, where it puts voxels elsewhere than the sform, which is read.

    NaN where the qform is no rotation; None where there is one geometry only.
    """
    if not all(forms.codes):
        return None
    rows, qform = np.eye(4), forms.qform()
    rows[:3] = np.reshape(forms.in_mm().rows, (3, 4))
    if same_place(qform, rows, shape):
        return None
    # Of turns by 180°, a quaternion in float32 says the angle less sharply than rows of a matrix.
    rest = max(0.0, 1 - sum(value * value for value in forms.quaternion))
    unsure = 2 * ((rest + _QUATERNION) ** 0.5 - rest**0.5)
    extent = np.linalg.norm(rows[:3, :3], axis=0) * shape
    if max_displacement(qform, rows, shape) <= unsure * np.linalg.norm(extent):
        return None
    return qform


def follows_other_form(
    label: tuple[np.ndarray, np.ndarray | None],
    image: tuple[np.ndarray, np.ndarray | None],
    shape: Sequence[int],
) -> str:
    """That a label lies on its image by a form of a header that is not read, as words; or "".

    Args:
        label: its affine, and that of its `second_form`.
        image: the same of its image.
        shape: of both.
    """
    if image[1] is not None and same_place(label[0], image[1], shape):
        return "it follows the qform of its image, which is read by its sform"
    if label[1] is not None and same_place(label[1], image[0], shape):
        return "by its qform it lies on its image, and it is read by its sform"
    return ""


def doubts(file: VolumeFile, reading: Reading) -> tuple[tuple[str, str], ...]:
    """What a header leaves unsure about where its voxels lie, in the words of `data check`.

    Args:
        file: one that `frame` takes.
        reading: of its dataset; a stored orientation asks no header.

    Returns:
        The name of a finding and its sentence; at most one, the gravest.
    """
    if reading.orientation != "canonical":
        return ()
    path = file.path
    with np.errstate(all="ignore"):
        sides = nib.affines.voxel_sizes(file.affine)
        ratio = np.array(file.spacing) / sides
    second = second_form(file.forms, file.shape)
    if not file.placed:
        axes = "".join(nib.orientations.ornt2axcodes(orientation(file.affine, path)))
        return (
            (
                "no geometry",
                f"{path} does not say which way its axes run, and they are taken as {axes}: look "
                "whether that is right, and write it into the header.",
            ),
        )
    if second is not None:
        distance = max_displacement(second, file.affine, file.shape)
        what = f"lie up to {distance:.3g} mm apart" if distance >= 0 else "are not both rotations"
        return (
            (
                "two geometries",
                f"{path} has a qform and an sform that {what}; the sform counts here, and other "
                "programs may take the qform: make the two equal.",
            ),
        )
    if reading.stated_spacing is None and not (np.abs(ratio - 1) < SAME_SIDES).all():
        mm = ["×".join(f"{side:.3g}" for side in own) for own in (file.spacing, sides)]
        field = "pixdim" if file.path.name.lower().endswith(NIFTI) else "spacing"
        return (
            (
                "voxel size",
                f"{path} has voxels of {mm[0]} mm by its {field} and of {mm[1]} mm by its affine, "
                "which counts here and not in every program: make the two equal.",
            ),
        )
    return ()


def max_displacement(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """Return the largest distance in mm between where two affines put the same voxel."""
    corners = np.array(np.meshgrid(*([0, length - 1] for length in shape))).reshape(3, -1)
    with np.errstate(all="ignore"):  # what is not finite in a header is nowhere: NaN or infinity
        difference = (second - first)[:3]
        moved = difference[:, :3] @ corners + difference[:, 3:]
        return float(np.linalg.norm(moved, axis=0).max())


def orient(
    data: np.ndarray, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> np.ndarray:
    """A (Z, Y, X) view of the stored array."""
    return data.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def tuples(value: Any) -> Any:
    """JSON lists as tuples, all the way down."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def triple(values: Sequence[Any], kind: type) -> Any:
    """Three values of one type."""
    first, second, third = values
    return kind(first), kind(second), kind(third)


def quadruple(values: Sequence[float]) -> tuple[float, float, float, float]:
    """A row of an affine."""
    a, b, c, d = (float(value) for value in values)
    return a, b, c, d
