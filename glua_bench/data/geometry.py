"""Geometry of files: orientation, spacing, shear and ambiguous headers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from glua_bench.data.formats import NIFTI, Forms, VolumeFile, triple
from glua_bench.errors import DataError
from glua_bench.task import Reading

# Minimum voxel size and maximum extent in mm; other headers are damaged, and costly to resample.
_FINEST, _LONGEST = 1e-3, 10_000.0
# Maximum displacement of voxels for equal affines, relative to the voxel size.
_DISPLACED = 0.1
# Relative tolerance for voxel sizes, which headers round.
SAME_SIDES = 0.01
# Maximum cosine of the angle between two axes; the relative error of distances is at most half.
_SHEAR = 0.01
# Rounding error of the square of a quaternion's fourth component in float32, as in nibabel.
_QUATERNION = 3.6e-7


def frame(
    file: VolumeFile, reading: Reading
) -> tuple[np.ndarray, tuple[float, float, float], tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return affine, spacing per file axis, and file axis and reversal of each working axis.

    Raises:
        DataError: the header has no usable orientation or voxel size.
    """
    if reading.orientation not in ("canonical", "stored"):
        raise ValueError(f"Unknown orientation '{reading.orientation}' in a dataset's Reading.")
    if {reading.slice_axis, reading.row_axis} not in ({0, 1}, {0, 2}, {1, 2}):
        raise ValueError("slice_axis and row_axis of a dataset's Reading must be two of 0, 1, 2.")
    affine, path = file.affine, file.path
    file_axes, reverse = [0, 1, 2], [False, False, False]
    if reading.orientation == "canonical":
        _refuse_shear(affine, path)
        for file_axis, (canonical, direction) in enumerate(orientation(affine, path)):
            file_axes[int(canonical)] = file_axis
            reverse[int(canonical)] = bool(direction < 0)
    header = nib.affines.voxel_sizes(affine) if reading.orientation == "canonical" else file.spacing
    spacing = [float(length) for length in header]
    if reading.stated_spacing is not None:
        for oriented, stated in enumerate(reading.stated_spacing):
            if stated > 0:  # 0 leaves this axis to the header
                spacing[file_axes[oriented]] = float(stated)
    for length, count in zip(spacing, file.shape, strict=True):
        if not (length >= _FINEST and length * count <= _LONGEST):  # also True for NaN
            size = " × ".join(f"{own:.3g}" for own in spacing)
            unit = {1: " (its unit is m)", 3: " (its unit is µm)"}
            raise DataError(
                f"{path} has an implausible voxel size of {size} mm{unit.get(file.forms.unit, '')}:"
                " correct pixdim, affine and unit in its header."
            )
    for axis in reading.flip:
        reverse[axis] = not reverse[axis]
    column_axis = 3 - reading.slice_axis - reading.row_axis
    cut = (reading.slice_axis, reading.row_axis, column_axis)
    return (
        affine,
        triple(spacing),
        triple(file_axes[a] for a in cut),
        triple(reverse[a] for a in cut),
    )


def orientation(affine: np.ndarray, path: Path) -> np.ndarray:
    """Return canonical axis and direction of each file axis, as `nibabel.io_orientation`.

    Raises:
        DataError: the affine has no orientation.
    """
    found = np.full((3, 2), np.nan)
    # The singular value decomposition fails for non-finite and extreme values.
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        found = nib.io_orientation(affine)
    if not np.isfinite(found).all():
        raise DataError(
            f"{path} has an affine without an orientation: correct sform or qform in its header."
        )
    return found


def axis_codes(affine: np.ndarray, path: Path) -> str:
    """Return the orientation in letters, such as "RAS".

    Raises:
        DataError: the affine has no orientation.
    """
    return "".join(nib.orientations.ornt2axcodes(orientation(affine, path)))


def _refuse_shear(affine: np.ndarray, path: Path) -> None:
    """Raise an error if axes are not perpendicular, because voxel sizes would give wrong distances.

    Raises:
        DataError: two axes differ from a right angle by more than rounding errors.
    """
    with np.errstate(all="ignore"):  # `orientation` reports degenerate affines
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        cosines = np.abs(np.triu(directions.T @ directions, 1))
        most = float(cosines.max())
    if np.isfinite(most) and _SHEAR < most < 1:
        raise DataError(
            f"{path} has axes at an angle of {np.degrees(np.arccos(most)):.1f}° instead of 90°, "
            "as with a tilted CT gantry: resample image and label onto perpendicular axes "
            "(nibabel.processing.resample_to_output; order=0 for the label)."
        )


def voxel_ml(affine: np.ndarray, spacing: Sequence[float], reading: Reading) -> float:
    """Compute the volume of a voxel in ml.

    Args:
        affine: (4, 4), to mm; its angles are used for a canonical reading.
        spacing: mm per stored axis.
        reading: of the dataset.
    """
    ml = prod(spacing) / 1000
    if reading.orientation != "canonical":
        return ml
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return ml * float(abs(np.linalg.det(directions)))


def same_place(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> bool:
    """Return True if two affines map all voxels to the same positions, up to rounding."""
    with np.errstate(all="ignore"):
        sides = np.linalg.norm(second[:3, :3], axis=0)
    return bool(max_displacement(first, second, shape) <= _DISPLACED * sides.min())  # False for NaN


def second_form(forms: Forms, shape: Sequence[int]) -> np.ndarray | None:
    """Return the qform's affine in mm if it differs from the sform, which is used; otherwise None.

    The affine is NaN if the quaternion is not a rotation.
    """
    if not all(forms.codes):
        return None
    rows, qform = np.eye(4), forms.qform()
    rows[:3] = np.reshape(forms.in_mm().rows, (3, 4))
    if same_place(qform, rows, shape):
        return None
    # A quaternion in float32 is less precise than a matrix for rotations by about 180°.
    rest = max(0.0, 1 - sum(value * value for value in forms.quaternion))
    angle = 2 * ((rest + _QUATERNION) ** 0.5 - rest**0.5)
    extent = np.linalg.norm(np.linalg.norm(rows[:3, :3], axis=0) * shape)
    return None if max_displacement(qform, rows, shape) <= angle * extent else qform


def follows_other_form(
    label: tuple[np.ndarray, np.ndarray | None],
    image: tuple[np.ndarray, np.ndarray | None],
    shape: Sequence[int],
) -> str:
    """Explain a displaced label by a qform that overlays it on its image; "" if there is none.

    Args:
        label: affine and `second_form` of the label.
        image: affine and `second_form` of its image.
        shape: of both.
    """
    if image[1] is not None and same_place(label[0], image[1], shape):
        return "it matches the qform of its image, but the sform is used"
    if label[1] is not None and same_place(label[1], image[0], shape):
        return "its qform matches its image, but the sform is used"
    return ""


def ambiguities(file: VolumeFile, reading: Reading) -> tuple[tuple[str, str], ...]:
    """Return name and text of the most severe ambiguity of a header's geometry; empty if none.

    Args:
        file: a volume with a valid `frame`.
        reading: of its dataset; a stored orientation does not use the header.
    """
    if reading.orientation != "canonical":
        return ()
    path = file.path
    with np.errstate(all="ignore"):
        sides = nib.affines.voxel_sizes(file.affine)
        ratio = np.array(file.spacing) / sides
    second = second_form(file.forms, file.shape)
    if not file.oriented:
        check = "no geometry"
        text = (
            f"has no orientation in its header and is assumed to be {axis_codes(file.affine, path)}"
            ": check this, and write the orientation into the header"
        )
    elif second is not None:
        check, distance = "two geometries", max_displacement(second, file.affine, file.shape)
        what = f"differ by up to {distance:.3g} mm" if distance >= 0 else "are not both rotations"
        text = (
            f"has a qform and an sform that {what}; the sform is used, but other programs may use "
            "the qform: make them equal"
        )
    elif reading.stated_spacing is None and not (np.abs(ratio - 1) < SAME_SIDES).all():
        mm = ["×".join(f"{side:.3g}" for side in own) for own in (file.spacing, sides)]
        field = "pixdim" if path.name.lower().endswith(NIFTI) else "spacing"
        check = "voxel size"
        text = (
            f"has voxels of {mm[0]} mm according to its {field}, but {mm[1]} mm according to its "
            "affine, which is used: make them equal, since other programs may differ"
        )
    else:
        return ()
    return ((check, f"{path} {text}."),)


def max_displacement(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """Return the largest distance in mm between where two affines put the same voxel."""
    corners = np.array(np.meshgrid(*([0, length - 1] for length in shape))).reshape(3, -1)
    with np.errstate(all="ignore"):  # NaN or infinite for non-finite headers
        difference = (second - first)[:3]
        moved = difference[:, :3] @ corners + difference[:, 3:]
        return float(np.linalg.norm(moved, axis=0).max())


def orient(
    data: np.ndarray, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> np.ndarray:
    """Return a (Z, Y, X) view of the stored array."""
    return data.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def tuples(value: Any) -> Any:
    """Convert nested lists, as in JSON, to tuples."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def rows_of(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Convert an affine to nested tuples."""
    return tuples(np.asarray(affine, float).tolist())
