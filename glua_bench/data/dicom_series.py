"""Read a DICOM series with one file per slice as a volume.

The order and distance of slices come from `ImagePositionPatient` and the axes from
`ImageOrientationPatient`; file names, instance numbers and slice thickness are ignored. Series
whose geometry would be wrong are rejected. Headers are read with pydicom, because SimpleITK
replaces missing elements by defaults.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder

from glua_bench.errors import DataError, first_line

# Tolerance of slice distances, relative to the median: headers are rounded, and a missing slice
# doubles the distance.
UNEVEN = 0.05


@dataclass(frozen=True)
class Series:
    """A volume and its position.

    Attributes:
        files: the file of each slice, in the order of the third axis of `voxels`.
        voxels: float32 (columns, rows, slices), with rescale slope and intercept applied.
        affine: voxel index to mm in RAS+, as in NIfTI, 4 × 4.
    """

    files: tuple[Path, ...]
    voxels: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class _Slice:
    """One file of a series.

    Attributes:
        file: path of the file.
        values: float32 (rows, columns).
        position: centre of the first pixel, mm in LPS+.
        along_row: unit vector of increasing column index, LPS+.
        along_column: unit vector of increasing row index, LPS+.
        spacing: mm between rows, and between columns.
        series: identifier of the series; may be empty.
    """

    file: Path
    values: np.ndarray
    position: np.ndarray
    along_row: np.ndarray
    along_column: np.ndarray
    spacing: tuple[float, float]
    series: str


def read_series(files: Sequence[Path]) -> Series:
    """Read the files of one series.

    Slices are sorted along the normal of their plane and scaled by their own slope and intercept.

    Args:
        files: all slices of the series, in any order.

    Raises:
        DataError: a file is not a single grey-level slice, or the files do not form a stack:
            different sizes, directions or pixel spacings, duplicate positions, two series, a
            missing slice, unequal distances, slices shifted sideways.
    """
    slices = [_read(file) for file in files]
    if len(slices) < 2:
        where = f"{slices[0].file} is a single slice" if slices else "There is no DICOM file"
        raise DataError(f"{where}: give all files of the series.")
    first = slices[0]
    for other in slices[1:]:
        _compare(first, other)
    # Some anonymised releases give every file a different identifier, which is ignored.
    found = {one.series: one.file for one in slices}
    if 1 < len(found) < len(slices):
        some, more = list(found.values())[:2]
        raise DataError(
            f"{some} and {more} belong to different series: keep one series in {some.parent}."
        )
    normal = np.cross(first.along_row, first.along_column)
    slices.sort(key=lambda one: float(one.position @ normal))
    step = _step(slices, normal)
    lps = np.eye(4)
    lps[:3, 0] = first.along_row * first.spacing[1]
    lps[:3, 1] = first.along_column * first.spacing[0]
    lps[:3, 2] = normal * step
    lps[:3, 3] = slices[0].position
    return Series(
        files=tuple(one.file for one in slices),
        voxels=np.stack([one.values.T for one in slices], axis=2),
        affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps,  # LPS to RAS
    )


def is_dicom(file: Path) -> bool:
    """Return True if a file is DICOM by its suffix or its first bytes, and not a DICOMDIR."""
    if file.name.upper() == "DICOMDIR":
        return False
    if file.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): check the file.") from error


def series_of(files: Sequence[Path]) -> list[tuple[str, list[Path]]]:
    """Group files by series.

    Args:
        files: DICOM files, in any order.

    Returns:
        Description and files of each series, in the order of their first files.

    Raises:
        DataError: a file cannot be read as DICOM.
    """
    found: dict[str, tuple[str, list[Path]]] = {}
    for file in files:
        header = _header(file, pixels=False)
        title = str(_value(header, file, "SeriesDescription") or "")
        key = str(_value(header, file, "SeriesInstanceUID") or "")
        found.setdefault(key, (title, []))[1].append(file)
    return list(found.values())


# -- the stack ------------------------------------------------------------------------------------


def _compare(first: _Slice, other: _Slice) -> None:
    """Raise an error unless two slices have the same size, spacing and orientation."""
    difference = ""
    if other.values.shape != first.values.shape:
        rows, columns = other.values.shape
        difference = f"{rows} rows and {columns} columns"
    elif not np.allclose(other.spacing, first.spacing, rtol=1e-3):
        difference = f"pixels of {other.spacing[0]:g} by {other.spacing[1]:g} mm"
    elif not (
        np.allclose(other.along_row, first.along_row, atol=1e-3)
        and np.allclose(other.along_column, first.along_column, atol=1e-3)
    ):
        difference = "another orientation (ImageOrientationPatient)"
    if difference:
        raise DataError(
            f"{other.file} has {difference}, unlike {first.file}: keep one series in "
            f"{first.file.parent}."
        )


def _step(slices: Sequence[_Slice], normal: np.ndarray) -> float:
    """Return the distance in mm of sorted slices, which must form a regular stack."""
    heights = np.array([one.position @ normal for one in slices])
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    closest = int(gaps.argmin())
    if gaps[closest] < UNEVEN * max(usual, 0.1):
        raise DataError(
            f"{slices[closest].file} and {slices[closest + 1].file} have the same position: remove "
            "the duplicate, or the files of a second series."
        )
    oddest = int(np.abs(gaps - usual).argmax())
    if abs(gaps[oddest] - usual) > UNEVEN * usual:
        raise DataError(
            f"{slices[oddest].file} is {gaps[oddest]:.2f} mm from the next slice, but others are "
            f"{usual:.2f} mm apart: a slice is missing; fetch {slices[oddest].file.parent} again."
        )
    step = float((heights[-1] - heights[0]) / (len(slices) - 1))
    for number, one in enumerate(slices):
        aside = one.position - slices[0].position - normal * step * number
        sideways = aside - normal * (aside @ normal)
        if np.linalg.norm(sideways) > min(one.spacing) / 2:
            raise DataError(
                f"{one.file} is shifted sideways by {np.linalg.norm(sideways):.1f} mm relative to "
                f"{slices[0].file}: convert the series to a NIfTI volume without gantry tilt."
            )
    return step


# -- one file -------------------------------------------------------------------------------------


def _read(file: Path) -> _Slice:
    """Read a slice and its position."""
    header = _header(file)
    if (
        _value(header, file, "PhotometricInterpretation") != "MONOCHROME2"
        or _value(header, file, "SamplesPerPixel") != 1
        or _value(header, file, "NumberOfFrames") not in (None, 1)
        or "ModalityLUTSequence" in header
    ):
        raise DataError(
            f"{file} is not a single grey-level slice (MONOCHROME2, one frame, no lookup table), "
            "or is damaged: fetch the series again, or convert it to NIfTI."
        )
    directions = _numbers(header, file, "ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        raise DataError(
            f"{file} has an ImageOrientationPatient whose directions are not perpendicular: fetch "
            "the series again."
        )
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows, columns = _numbers(header, file, "PixelSpacing", 2)
    if not (rows > 0 and columns > 0):
        raise DataError(f"{file} has a PixelSpacing of {rows:g} by {columns:g} mm: correct it.")
    slope = _numbers(header, file, "RescaleSlope", 1, default=1.0)[0]
    intercept = _numbers(header, file, "RescaleIntercept", 1, default=0.0)[0]
    if slope == 0:
        raise DataError(f"{file} has a RescaleSlope of 0: correct it.")
    pixels = _pixels(header, file)
    return _Slice(
        file=file,
        values=(pixels * slope + intercept).astype(np.float32),
        position=_numbers(header, file, "ImagePositionPatient", 3),
        along_row=directions[0],
        along_column=directions[1],
        spacing=(float(rows), float(columns)),
        series=str(_value(header, file, "SeriesInstanceUID") or ""),
    )


def _header(file: Path, pixels: bool = True) -> pydicom.FileDataset:
    """Parse a file; pixels are left encoded, or skipped."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): check the file and its permissions."
        ) from error
    try:
        with _quiet():
            return pydicom.dcmread(io.BytesIO(content), stop_before_pixels=not pixels)
    except InvalidDicomError as error:
        raise DataError(f"{file} is not a DICOM file: fetch the series again.") from error
    # Damaged files raise many types of errors in pydicom: struct.error, KeyError, and more.
    except Exception as error:
        raise DataError(
            f"{file} is a damaged DICOM file ({first_line(error)}): fetch the series again."
        ) from error


def _value(header: pydicom.FileDataset, file: Path, keyword: str) -> Any:
    """Return an element; None if it is absent or empty."""
    try:
        with _quiet():
            return header.get(keyword)
    except Exception as error:  # as in `_header`, since elements are parsed on access
        raise DataError(f"{file} has no valid {keyword}: fetch the series again.") from error


def _numbers(
    header: pydicom.FileDataset, file: Path, keyword: str, count: int, default: float | None = None
) -> np.ndarray:
    """Return the finite numbers of an element; `default` if it is absent or empty."""
    value = _value(header, file, keyword)
    if value is None and default is not None:
        value = default
    try:
        found = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise DataError(
            f"{file} has no valid {keyword}, which the geometry requires: fetch the series again, "
            "or convert it to NIfTI."
        )
    return found


def _pixels(header: pydicom.FileDataset, file: Path) -> np.ndarray:
    """Decode the stored integers, (rows, columns)."""
    try:
        with _quiet():
            syntax = header.file_meta.TransferSyntaxUID
            if syntax.is_encapsulated and not get_decoder(syntax).is_available:
                raise DataError(
                    f"{file} is compressed ({syntax.name}), and no decoder is installed: run "
                    "`pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg`, or decompress "
                    "the series."
                )
            pixels = np.asarray(header.pixel_array)
            size = (int(header.Rows), int(header.Columns))
    except DataError:
        raise
    except Exception as error:  # as in `_header`
        raise DataError(
            f"{file} has pixels that cannot be read ({first_line(error)}): fetch the series again."
        ) from error
    if pixels.shape != size or pixels.dtype.kind not in "iu":
        raise DataError(f"{file} is not a single slice of integers: convert it to NIfTI.")
    return pixels


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress pydicom's warnings about values that violate the standard but are unambiguous."""
    log = logging.getLogger("pydicom")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
