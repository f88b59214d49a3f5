"""dicom_series.py: every voxel where the header says, and what is refused.

Slices are drawn in the patient's coordinates, by the formula of the DICOM standard (PS3.3,
C.7.6.2.1.1), and compared with a second reader.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from refusals import refused

from glua_bench.data.dicom_series import Series, read_series
from glua_bench.errors import DataError

Write = Callable[..., list[Path]]

ROWS, COLUMNS, SLICES = 9, 12, 6
SPACING = (2.0, 1.25)  # mm between rows, between columns
STEP = 7.5
AXIAL = ((1, 0, 0), (0, 1, 0))
TILTED = tuple(
    map(
        tuple,
        np.linalg.qr(np.array([[0.9, 0.2, 0.3], [-0.1, 0.95, 0.2], [0, -0.3, 0.9]]))[0].T[:2],
    )
)
# Directions in which columns and rows are counted, LPS+.
PLANES = {
    "axial": AXIAL,
    "mirrored": ((-1, 0, 0), (0, 1, 0)),
    "upside down": ((1, 0, 0), (0, -1, 0)),
    "prone": ((-1, 0, 0), (0, -1, 0)),
    "turned": ((0, 1, 0), (1, 0, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "oblique": TILTED,
}
ORIGIN = np.array([-40.0, 25.0, 310.0])


def scene(lps: np.ndarray) -> np.ndarray:
    """A value for each place in the patient, with no symmetry: (..., 3) → (...)."""
    x, y, z = np.moveaxis(lps - ORIGIN, -1, 0)
    return 900 + 7 * x - 5 * y + 3 * z + 40 * np.sin(x / 9 + y / 7)


def places(position: np.ndarray, plane: Any) -> np.ndarray:
    """Where the pixels of a slice are, LPS+ (rows, columns, 3)."""
    row, column = np.arange(ROWS)[:, None, None], np.arange(COLUMNS)[None, :, None]
    x, y = np.array(plane)
    return position + x * SPACING[1] * column + y * SPACING[0] * row


@pytest.fixture
def write_series(dicom_slice: Callable[..., Any]) -> Callable[..., list[Path]]:
    """Writes files whose names follow neither the position nor the instance number."""

    def write(
        folder: Path,
        plane: Any = AXIAL,
        syntax: str = ExplicitVRLittleEndian,
        change: Callable[[int, Dataset], None] = lambda number, one: None,
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(1).permutation(SLICES)
        files = []
        for number in range(SLICES):
            position = ORIGIN + np.cross(*plane) * STEP * number
            slope, intercept = 0.5 + number % 3, -20.0 * number
            stored = (scene(places(position, plane)) - intercept) / slope
            one = dicom_slice(stored, position, plane, SPACING, slope, intercept)
            one.InstanceNumber = 100 - number
            one.SliceThickness = 5.5  # with a gap, so not the distance of slices
            one.SliceLocation = 1000.0 - number
            change(number, one)
            if syntax == RLELossless:
                one.compress(RLELossless)
            elif syntax != ExplicitVRLittleEndian:
                one.file_meta.TransferSyntaxUID = syntax
            if syntax == ExplicitVRBigEndian:
                one.PixelData = np.frombuffer(one.PixelData, "<i2").astype(">i2").tobytes()
            files.append(folder / f"IMG-0002-{order[number] + 1:05d}.dcm")
            pydicom.dcmwrite(files[-1], one, enforce_file_format=True)
        return files

    return write


# -- what is read ---------------------------------------------------------------------------------


def check_places(series: Series) -> None:
    """The affine puts every voxel where its value was drawn."""
    index = np.stack(np.indices(series.voxels.shape), -1)
    ras = index @ series.affine[:3, :3].T + series.affine[:3, 3]
    drawn = scene(ras * (-1, -1, 1))
    # Half of the largest slope, by rounding to stored integers.
    np.testing.assert_allclose(series.voxels, drawn, atol=1.26)


@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_is_where_the_header_says(
    write_series: Write, tmp_path: Path, plane: str
) -> None:
    files = write_series(tmp_path, PLANES[plane])
    series = read_series(sorted(files))
    assert series.voxels.shape == (COLUMNS, ROWS, SLICES) and series.voxels.dtype == np.float32
    check_places(series)
    lengths = np.linalg.norm(series.affine[:3, :3], axis=0)
    np.testing.assert_allclose(lengths, (SPACING[1], SPACING[0], STEP), rtol=1e-5)
    assert series.files == tuple(files)  # by position, not by name or instance number
    again = read_series(files[::-1])
    np.testing.assert_array_equal(again.voxels, series.voxels)
    np.testing.assert_array_equal(again.affine, series.affine)


@pytest.mark.parametrize("plane", PLANES)
def test_a_second_reader_agrees(write_series: Write, tmp_path: Path, plane: str) -> None:
    """SimpleITK (GDCM) reads the same values at the same places."""
    files = write_series(tmp_path, PLANES[plane])
    series = read_series(sorted(files))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    other = reader.Execute()
    for index in ((0, 0, 0), (COLUMNS - 1, 0, 2), (3, ROWS - 1, SLICES - 1)):
        x, y, z = other.TransformIndexToPhysicalPoint(index)
        ours = np.linalg.solve(series.affine, (-x, -y, z, 1))[:3]
        np.testing.assert_allclose(ours, np.rint(ours), atol=1e-3)
        found = series.voxels[tuple(np.rint(ours).astype(int))]
        assert found == pytest.approx(float(other.GetPixel(index)), abs=1e-2)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless], ids=lambda uid: uid.name
)
def test_encodings_give_the_same_values(write_series: Write, tmp_path: Path, syntax: str) -> None:
    plain = read_series(write_series(tmp_path / "plain"))
    other = read_series(write_series(tmp_path / "other", syntax=syntax))
    np.testing.assert_array_equal(other.voxels, plain.voxels)


def test_values_without_a_slope_are_taken_as_they_are(write_series: Write, tmp_path: Path) -> None:
    def plain(number: int, one: Dataset) -> None:
        if number == 2:
            del one.RescaleSlope, one.RescaleIntercept
            one.PixelData = np.full((ROWS, COLUMNS), -7, "<i2").tobytes()
        elif number == 3:
            one.RescaleSlope = one.RescaleIntercept = None

    series = read_series(write_series(tmp_path, change=plain))
    assert (series.voxels[..., 2] == -7).all()
    stored = scene(places(ORIGIN + np.array((0, 0, 3 * STEP)), AXIAL)) + 60
    np.testing.assert_allclose(series.voxels[..., 3].T, stored / 0.5, atol=1.1)


def test_one_identifier_for_each_file_tells_nothing(write_series: Write, tmp_path: Path) -> None:
    """As an early release of CHAOS had it, after anonymisation."""

    def distinct(number: int, one: Dataset) -> None:
        one.SeriesInstanceUID = f"1.2.{number}"

    check_places(read_series(write_series(tmp_path, change=distinct)))


def test_rounded_positions_are_an_even_stack(write_series: Write, tmp_path: Path) -> None:
    def rounded(number: int, one: Dataset) -> None:
        one.ImagePositionPatient = [-40, 25, 310 + round(7.5 * number + 0.07 * (-1) ** number, 2)]

    series = read_series(write_series(tmp_path, change=rounded))
    assert series.affine[2, 2] == pytest.approx(STEP, abs=0.05)


# -- what is refused ------------------------------------------------------------------------------


def setter(only: int, **changes: Any) -> Callable[[int, Dataset], None]:
    """Changes elements of one slice, or of all (-1); None removes an element."""

    def change(number: int, one: Dataset) -> None:
        if only in (number, -1):
            for keyword, value in changes.items():
                if value is None:
                    delattr(one, keyword)
                else:
                    setattr(one, keyword, value)

    return change


def at(*xyz: float) -> list[str]:
    return [f"{value:.3f}" for value in xyz]


def halves(number: int, one: Dataset) -> None:
    one.SeriesInstanceUID = f"1.2.{number // 3}"


def sheared(number: int, one: Dataset) -> None:
    one.ImagePositionPatient = at(-40, 25 + 3 * number, 310 + STEP * number)


def smaller(number: int, one: Dataset) -> None:
    if number == 1:
        one.Rows -= 1
        one.PixelData = one.PixelData[: -2 * COLUMNS]


def lookup(number: int, one: Dataset) -> None:
    one.ModalityLUTSequence = [Dataset()]


def compressed(number: int, one: Dataset) -> None:
    one.file_meta.TransferSyntaxUID = JPEGLSLossless
    one.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    one["PixelData"].is_undefined_length = True


FAULTS: dict[str, tuple[Callable[[int, Dataset], None], tuple[str, ...]]] = {
    "missing slice": (
        setter(5, ImagePositionPatient=at(-40, 25, 310 + 6 * STEP)),
        ("15.00 mm", "7.50 mm apart", "a slice is missing"),
    ),
    "uneven": (
        setter(2, ImagePositionPatient=at(-40, 25, 310 + 2.2 * STEP)),
        ("9.00 mm", "7.50 mm apart"),
    ),
    "copy": (
        setter(3, ImagePositionPatient=at(-40, 25, 310 + 4 * STEP)),
        ("have the same position",),
    ),
    "all at one place": (setter(-1, ImagePositionPatient=at(-40, 25, 310)), ("same position",)),
    "two series": (halves, ("belong to different series",)),
    "sheared": (sheared, ("shifted sideways by 3.0 mm",)),
    "other size": (smaller, ("8 rows and 12 columns",)),
    "other pixels": (setter(4, PixelSpacing=["2.0", "1.3"]), ("pixels of 2 by 1.3 mm",)),
    "other plane": (
        setter(1, ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]),
        ("another orientation",),
    ),
    "no position": (setter(2, ImagePositionPatient=None), ("no valid ImagePositionPatient",)),
    "no directions": (setter(0, ImageOrientationPatient=None), ("no valid ImageOrientation",)),
    "skewed directions": (
        setter(-1, ImageOrientationPatient=["1", "0", "0", "0.1", "1", "0"]),
        ("directions are not perpendicular",),
    ),
    "no spacing": (setter(-1, PixelSpacing=None), ("no valid PixelSpacing",)),
    "spacing of 0": (setter(-1, PixelSpacing=["0", "1"]), ("PixelSpacing of 0 by 1 mm",)),
    "slope of 0": (setter(3, RescaleSlope="0"), ("RescaleSlope of 0",)),
    "two slopes": (setter(3, RescaleSlope=["1", "2"]), ("no valid RescaleSlope",)),
    "colour": (setter(-1, PhotometricInterpretation="RGB"), ("not a single grey-level slice",)),
    "inverted": (
        setter(-1, PhotometricInterpretation="MONOCHROME1"),
        ("not a single grey-level slice",),
    ),
    "frames": (setter(-1, NumberOfFrames=2), ("not a single grey-level slice",)),
    "lookup table": (lookup, ("not a single grey-level slice",)),
    "no pixels": (setter(1, PixelData=None), ("pixels that cannot be read",)),
    "few pixels": (setter(1, PixelData=bytes(20)), ("pixels that cannot be read",)),
    "no decoder": (compressed, ("JPEG-LS", "no decoder", "pip install")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_no_volume_is_one_sentence(
    write_series: Write, tmp_path: Path, fault: str
) -> None:
    change, named = FAULTS[fault]
    files = write_series(tmp_path, change=change)
    with refused(tmp_path) as error:
        read_series(files)
    assert all(words in str(error.value) for words in named)


def test_too_few_and_unreadable_files_are_one_sentence(write_series: Write, tmp_path: Path) -> None:
    files = write_series(tmp_path)
    for few, named in (([], "no DICOM file"), (files[:1], "is a single slice")):
        with refused(named):
            read_series(few)
    for content in (b"", b"<html>", bytes(500)):
        files[2].write_bytes(content)
        with refused(files[2], "not a DICOM file"):
            read_series(files)
    files[2].unlink()
    with refused(files[2], "cannot be read"):
        read_series(files)


def test_mutated_files_are_one_sentence_each(
    write_series: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Flipped, cut and inserted bytes: refused in one sentence, or read as a volume."""
    rng = np.random.default_rng(0)
    files = write_series(tmp_path)
    intact = files[2].read_bytes()
    outcomes = []
    for _ in range(400):
        content = bytearray(intact)
        for _ in range(rng.integers(1, 6)):
            # Mostly in the header, which is where a file can go wrong in more than one way.
            end = len(content) if rng.random() < 0.2 else min(1000, len(content))
            if end < 140:
                break
            place = int(rng.integers(128, end))
            kind = rng.integers(4)
            if kind == 0:
                content[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del content[place : place + int(rng.integers(1, 60))]
            elif kind == 2:
                content[place:place] = rng.bytes(int(rng.integers(1, 12)))
            else:
                content[place] = 0xFF
        files[2].write_bytes(content)
        try:
            series = read_series(files)
        except DataError as error:
            text = str(error)
            assert text.endswith(".") and "\n" not in text and ". " not in text, text
            assert str(tmp_path) in text
            outcomes.append("refused")
        else:
            assert np.isfinite(series.voxels).all() and np.isfinite(series.affine).all()
            outcomes.append("read")
    assert outcomes.count("refused") > 200 and outcomes.count("read") > 20
    assert not caplog.records, "and nothing is said beside it"
