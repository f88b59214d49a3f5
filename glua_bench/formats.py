"""Volumes as they lie on disk: NIfTI through nibabel, NRRD and MetaImage through SimpleITK.

Whatever the format, an opened file has the same face: stored axes with the fastest first, an affine
to RAS millimetres as nibabel gives it, and a scaling of the stored values. Lengths become mm here,
whatever unit a header states. Headers are read on opening, voxels when they are asked for.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import hypot, prod
from pathlib import Path
from threading import Lock
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import igzip
from isal.igzip_lib import IsalError
from nibabel import imageglobals
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from glua_bench.errors import DataError, first_line
from glua_bench.paths import broken

NIFTI = (".nii.gz", ".nii")
# Suffix → the ITK reader that must take the file, so that no other one guesses.
_ITK = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
SUFFIXES = (*NIFTI, *_ITK)
# A header may claim anything; more voxels than 1024³ are in no scan that this is for.
_MOST_VOXELS = 2**30
# Deflate makes nothing longer by more than this, so what claims more is cut off or forged.
_DEFLATE = 1032
_STRONGER = (".bz2", ".zst")
_PIECE = 1 << 18  # bytes at a time out of a compressed file
_HEADER_BYTES = 1 << 20  # of a text header, which is read to find its data files
# NIfTI's code of a unit of length → mm; a file that states none is in mm by convention.
_NIFTI_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
# Units in the words of NRRD and MetaImage → mm. "?" is how MetaImage states none.
_WORDS_MM = {
    **dict.fromkeys(("", "?", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("um", "\u03bcm", "micron", "microns"), 0.001),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 0.001),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
}
# NRRD's spaces that say which way the body lies; others are frames of a scanner or of a screen.
_ANATOMICAL = re.compile(
    r"(?:right|left)-(?:anterior|posterior)-(?:superior|inferior)(?:-time)?|[RL][AP][SI]T?",
    re.IGNORECASE,
)
# A quaternion's b, c and d may be this much too long together, as rounding leaves them.
_TOO_LONG = 1e-4
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    OSError,
    EOFError,
    OverflowError,
    ValueError,
    zlib.error,
    cast(type[Exception], IsalError),  # its stub takes the class for an instance
)


@dataclass(frozen=True)
class Forms:
    """Where voxels lie in the words of a NIfTI header, to be written as they were read.

    Args:
        codes: of the qform and of the sform.
        unit: NIfTI's code of the unit of every length here.
        pixdim: the qform's handedness (1 or -1), and a voxel's sides.
        quaternion: b, c and d of the qform's rotation.
        offset: of the qform.
        rows: the sform's three rows of four.
    """

    codes: tuple[int, int]
    unit: int
    pixdim: tuple[float, ...]
    quaternion: tuple[float, ...]
    offset: tuple[float, ...]
    rows: tuple[float, ...]

    @classmethod
    def read(cls, header: Any) -> Forms:
        """The forms of a header of nibabel's."""
        return cls(
            codes=(int(header["qform_code"]), int(header["sform_code"])),
            unit=int(header["xyzt_units"]) & 7,
            pixdim=_floats(header["pixdim"][:4]),
            quaternion=_floats(header[f"quatern_{axis}"] for axis in "bcd"),
            offset=_floats(header[f"qoffset_{axis}"] for axis in "xyz"),
            rows=_floats(np.ravel([header[f"srow_{axis}"] for axis in "xyz"])),
        )

    @classmethod
    def of(cls, affine: np.ndarray, codes: tuple[int, int], unit: int = 2) -> Forms:
        """Both forms from one affine; the qform leaves a shear out, because it has no place for it.

        Args:
            affine: (4, 4), voxel indices to the unit, RAS.
            codes: of the qform and of the sform.
            unit: NIfTI's code; 2 is mm.
        """
        header = nib.Nifti1Header()
        header["xyzt_units"] = unit
        with np.errstate(all="ignore"):
            header.set_sform(affine, codes[1])
            try:
                header.set_qform(affine, codes[0])
            except (np.linalg.LinAlgError, HeaderDataError):  # there are no directions to rotate
                header["qform_code"] = 0
        return cls.read(header)

    def write(self, header: Any) -> None:
        """Put the forms into a header of nibabel's."""
        header["qform_code"], header["sform_code"] = self.codes
        header["xyzt_units"] = (int(header["xyzt_units"]) & ~7) | self.unit
        header["pixdim"][:4] = self.pixdim
        for axis, value in zip("bcd", self.quaternion, strict=True):
            header[f"quatern_{axis}"] = value
        for number, axis in enumerate("xyz"):
            header[f"qoffset_{axis}"] = self.offset[number]
            header[f"srow_{axis}"] = self.rows[4 * number : 4 * number + 4]

    def in_mm(self) -> Forms:
        """The same places in mm."""
        mm = _NIFTI_MM[self.unit]
        return replace(
            self,
            unit=2,
            pixdim=(self.pixdim[0], *(mm * side for side in self.pixdim[1:])),
            offset=tuple(mm * value for value in self.offset),
            rows=tuple(mm * value for value in self.rows),
        )

    def qform(self) -> np.ndarray:
        """The qform's affine in mm, whatever its code; NaN where the quaternion is no rotation."""
        own, found = self.in_mm(), np.eye(4)
        b, c, d = own.quaternion
        rest = 1 - b * b - c * c - d * d
        if not rest >= -_TOO_LONG:
            return np.full((4, 4), np.nan)
        turn = nib.quaternions.quat2mat([max(rest, 0.0) ** 0.5, b, c, d])
        with np.errstate(all="ignore"):
            found[:3, :3] = turn * np.array(own.pixdim[1:]) * (1, 1, own.pixdim[0])
        found[:3, 3] = own.offset
        return found


@dataclass(frozen=True)
class VolumeFile:
    """The header of a volume, and the way to its voxels.

    Args:
        path: the file that was opened.
        shape: voxels per stored axis, the fastest axis first.
        affine: float64 (4, 4), from voxel indices to mm, RAS.
        spacing: mm per stored axis as the header gives it, beside the affine.
        forms: what a NIfTI file on the same voxels says in its header; where the file is NIfTI, its
            own words.
        placed: whether the header says which way its axes run.
        dimension: number of stored axes; those beyond the third have length 1.
        slope: of the values, `slope` · stored + `inter`.
        inter: see `slope`.
        read: reads the stored array.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    forms: Forms
    placed: bool
    dimension: int
    slope: float
    inter: float
    read: Callable[[], np.ndarray]

    def voxels(self) -> np.ndarray:
        """The stored array of `shape`, unscaled and in the file's number type; read at each call.

        Raises:
            DataError: the file is damaged or truncated.
        """
        try:
            return self.read().reshape(self.shape, order="F")
        except (*_UNREADABLE, _ITKError, MemoryError) as error:
            raise DataError(
                f"{self.path} is damaged or truncated ({first_line(error)}): fetch or convert it "
                "again."
            ) from error

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        """Values of (part of) the stored array: itself, or float64 where the header scales."""
        return apply_read_scaling(stored, np.float64(self.slope), np.float64(self.inter))


def open_volume(path: Path) -> VolumeFile:
    """Open a volume by its suffix: .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd.

    NRRD and MetaImage are taken as ITK takes them: a header without a space lies in LPS.

    Raises:
        DataError: the file or its data file is missing, damaged, of another format, not 3-D (axes
            of length 1 may follow), holds more than one real number a voxel, or states a unit that
            is none.
    """
    path = Path(path)
    if broken(path):
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: restore the file, or "
            "remove the link."
        )
    if not path.exists():
        raise DataError(f"{path} does not exist: check the data directory (--data-root).")
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is no file: give a volume, one file a case.")
    name = _ITK.get(path.suffix.lower())
    found = _open_nifti(path) if name is None else _open_itk(path, name)
    size = sum(file.stat().st_size for file in files_of(path))
    claimed = prod(found.shape)
    if claimed > _MOST_VOXELS or (claimed > size * _DEFLATE and path.suffix not in _STRONGER):
        raise DataError(
            f"{path} claims {'×'.join(map(str, found.shape))} voxels in {size} bytes: fetch or "
            "convert it again."
        )
    return found


def _in_mm(file: VolumeFile, mm: float) -> VolumeFile:
    """A file whose lengths are in a unit of so many mm, with lengths in mm."""
    if mm == 1:
        return file
    # In NIfTI's precision, so that a volume lies at the same place whichever unit states it.
    affine = file.affine.copy()
    affine[:3] = (affine[:3] * mm).astype(np.float32)
    spacing = _triple((np.array(file.spacing) * mm).astype(np.float32))
    forms = file.forms
    if _NIFTI_MM[forms.unit] != mm:  # NIfTI has no word for the unit
        forms = Forms.of(affine, forms.codes)
    return replace(file, affine=affine, spacing=spacing, forms=forms)


def files_of(path: Path) -> tuple[Path, ...]:
    """All files that a volume consists of: the given one, then those that hold its voxels.

    Raises:
        DataError: the header cannot be read, a file that it names is missing, or a MetaImage names
            several.
    """
    suffix = path.suffix.lower()
    if suffix in (".hdr", ".img"):  # a pair of NIfTI files
        other = path.with_suffix(".img" if suffix == ".hdr" else ".hdr")
        return (path, other) if other.exists() else (path,)
    if suffix not in _ITK:
        return (path,)
    text = _text(path)
    if _ITK[suffix] == "NrrdImageIO":
        names = _nrrd_files(text)
    else:
        # ITK writes as many numbers as a header says into a table for ten.
        for said in re.findall(r"^NDims[ \t]*[=:][ \t]*(.*?)\s*$", text, re.MULTILINE):
            if said not in ("2", "3", "4"):
                raise DataError(f"{path} has NDims = {said[:20]}: give a 3-D volume.")
        names = _meta_files(text, path)
    files = [path.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{path} keeps its voxels in {file}, which does not exist: put it there, or "
                "correct the name in the header."
            )
    return (path, *files)


# -- NIfTI ----------------------------------------------------------------------------------------


class _NoRotation(Exception):
    """The only geometry of a header is a qform whose quaternion is no rotation; with its length."""


class _Mending:
    """Headers of nibabel's, with mended what is harmless and what nibabel guesses or refuses."""

    @classmethod
    def from_fileobj(cls, fileobj: Any, endianness: str | None = None, check: bool = True) -> Any:
        header = super().from_fileobj(fileobj, endianness, check=False)  # type: ignore[misc]
        if header["pixdim"][0] == 0:  # which the standard reads as 1
            header["pixdim"][0] = 1
        names = [f"quatern_{axis}" for axis in "bcd"]
        length = hypot(*(float(header[name]) for name in names))
        if 1 < length <= 1 + _TOO_LONG:
            for name in names:
                header[name] = float(header[name]) / length
        elif header["qform_code"] and not header["sform_code"] and not length <= 1:
            raise _NoRotation(f"{length:.6g}")
        if check:
            header.check_fix()
        return header


def _mending(kind: Any) -> Any:
    """A class of nibabel's images whose headers are mended on reading."""
    header = type(kind.header_class.__name__, (_Mending, kind.header_class), {})
    return type(kind.__name__, (kind,), {"header_class": header})


_NIFTI_KINDS = [
    _mending(kind) for kind in (nib.Nifti1Pair, nib.Nifti1Image, nib.Nifti2Pair, nib.Nifti2Image)
]


def load_nifti(path: Path) -> Any:
    """A file as nibabel reads it, with a header mended where rounding is all that is wrong.

    Raises:
        Exception: of nibabel's, where the file cannot be read.
    """
    sniff = None
    for kind in _NIFTI_KINDS:
        found, sniff = kind.path_maybe_image(path, sniff)
        if found:
            return kind.from_filename(path)
    return nib.load(path)


def _open_nifti(path: Path) -> VolumeFile:
    try:
        with _repairs() as repairs:
            image: Any = load_nifti(path)
    except _NoRotation as error:
        raise DataError(
            f"{path} has a qform whose quaternion has the length {error}, and that of a rotation "
            "is at most 1: repair the qform, or set the sform."
        ) from error
    except _UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as NIfTI ({first_line(error)}): replace it by an intact "
            ".nii or .nii.gz file."
        ) from error
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise DataError(f"{path} is neither NIfTI nor NRRD nor MetaImage: convert it to .nii.gz.")
    kind = image.get_data_dtype()
    if kind.kind not in "iufb":
        raise DataError(f"{path} stores {kind} voxels: give one real number a voxel.")
    header, stored = image.header, cast(Any, image.dataobj)
    # What nibabel guesses about the place of voxels may be wrong; its other repairs are harmless.
    guessed = [r for r in repairs if "form_code" in r or "pixdim" in r and not header["sform_code"]]
    if guessed:
        raise DataError(
            f"{path} has a header that does not say where its voxels lie ({guessed[0]}): repair "
            "its sform and pixdim."
        )
    forms = Forms.read(header)
    if forms.unit not in _NIFTI_MM:
        raise DataError(
            f"{path} has xyzt_units {int(header['xyzt_units'])}, which is no unit of NIfTI's: "
            "repair it, 2 for mm."
        )
    file = VolumeFile(
        path,
        _three(image.shape, path),
        np.asarray(image.affine, float),
        _triple(header.get_zooms()),
        forms,
        any(forms.codes),
        len(image.shape),
        float(stored.slope),
        float(stored.inter),
        lambda: _read_nifti(stored),
    )
    return _in_mm(file, _NIFTI_MM[forms.unit])


@contextmanager
def _repairs() -> Iterator[list[str]]:
    """What nibabel says about a header that it repairs, instead of on the terminal."""
    told: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        return False

    imageglobals.logger.addFilter(keep)
    try:
        with np.errstate(invalid="ignore"):  # NaN in a header, which is refused by what it means
            yield told
    finally:
        imageglobals.logger.removeFilter(keep)


def _read_nifti(stored: Any) -> np.ndarray:
    """The stored array of nibabel's proxy; what is compressed with gzip, by a faster library."""
    if not str(stored.file_like).endswith(".gz"):
        return stored.get_unscaled()
    voxels = np.empty(stored.shape, stored.dtype, order="F")
    content = voxels.reshape(-1, order="F").view(np.uint8)
    with igzip.open(stored.file_like) as stream:
        stream.seek(stored.offset)
        filled = 0
        while filled < len(content):
            got = stream.readinto(content[filled : filled + _PIECE])
            if not got:
                raise EOFError(f"{len(content)} bytes expected, {filled} found")
            filled += got
        # The checksum stands at the end, which padding may precede.
        rest = 0
        while got := len(stream.read(_PIECE)):
            rest += got
            if rest > _HEADER_BYTES:
                raise ValueError("it holds more voxels than its header says")
    return voxels


# -- NRRD and MetaImage ---------------------------------------------------------------------------


def _open_itk(path: Path, name: str) -> VolumeFile:
    files_of(path)  # a missing data file has its own sentence
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO(name)
    reader.SetFileName(str(path))
    try:
        with _itk():
            reader.ReadImageInformation()
    except _ITKError as error:
        raise DataError(
            f"{path} cannot be read as {name.removesuffix('IO')}: replace it by an intact file."
        ) from error
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind or "unknown" in kind.lower():
        raise DataError(
            f"{path} stores {reader.GetNumberOfComponents()} × {kind} a voxel: give one real "
            "number a voxel."
        )
    shape = _three(reader.GetSize(), path)
    dimension = reader.GetDimension()
    # NIfTI's precision, in which results are saved; so a volume lies at the same place to the last
    # digit, whichever of the formats it comes in.
    spacing = np.array(reader.GetSpacing()[:3], np.float32).astype(float)
    direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    lps = np.eye(4)
    lps[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    lps[:3, 3] = reader.GetOrigin()[:3]
    affine = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps).astype(np.float32).astype(float) + 0.0

    def read() -> np.ndarray:
        # ITK compares no checksum of MetaImage and not every one of NRRD: what it unpacks from
        # damaged bytes may be anything, and another thing each time.
        for file, start in _deflated(path):
            _check_deflated(file, start)
        with _itk():
            image = reader.Execute()
        return np.asarray(_Pixels(sitk.GetArrayViewFromImage(image), image)).T

    placed, mm = _stated(path)
    unit = next((code for code in (1, 2, 3) if _NIFTI_MM[code] == mm), 2)
    forms = Forms.of(affine, (1, 1), unit)
    file = VolumeFile(
        path, shape, affine, _triple(spacing), forms, placed, dimension, 1.0, 0.0, read
    )
    return _in_mm(file, mm)


def _stated(path: Path) -> tuple[bool, float]:
    """What a text header says and ITK does not tell: whether axes are named, and the unit in mm.

    Raises:
        DataError: the unit is unknown, or not one for all axes.
    """
    text = _text(path)
    if _ITK[path.suffix.lower()] == "NrrdImageIO":
        head = _nrrd_head(text)
        lines = re.findall(r"(?m)^([^:#\r\n]+): *(.*?)\s*$", head)
        fields = {name.lower(): value for name, value in lines}
        placed = bool(_ANATOMICAL.fullmatch(fields.get("space", "")))
        placed &= "space directions" in fields
        # Units of a space count for its axes; those of other axes stand beside `spacings`.
        units = fields.get("space units") or fields.get("units", "")
        words = re.findall(r'"([^"]*)"', units) or units.split()
    else:
        head = text.split("ElementDataFile", 1)[0]
        fields = dict(re.findall(r"(?m)^(\w+)[ \t]*[=:][ \t]*(.*?)\s*$", head))
        placed = any(name in fields for name in ("TransformMatrix", "Rotation", "Orientation"))
        words = [fields.get("DistanceUnits", "")]
    # A micro sign in Latin-1, or one of the two in UTF-8.
    found = {word.replace("\udcb5", "\u03bc").strip().casefold() for word in words[:3]}
    sizes = {_WORDS_MM.get(word, 0.0) for word in found} or {1.0}
    if len(sizes) > 1 or 0.0 in sizes:
        raise DataError(
            f"{path} states its lengths in {' and '.join(sorted(map(repr, found)))[:60]}: state "
            "one unit for all axes, such as mm, in the header."
        )
    return placed, sizes.pop()


class _Pixels:
    """Lends an ITK image's buffer to NumPy and keeps the image alive as long as the array."""

    def __init__(self, view: np.ndarray, image: object) -> None:
        self.__array_interface__ = view.__array_interface__
        self._image = image


class _ITKError(Exception):
    """ITK could not read; its own text, of many lines and addresses, is the cause."""


_TERMINAL = Lock()


@contextmanager
def _itk() -> Iterator[None]:
    """ITK's errors as one type, and nothing of what its libraries print on the terminal."""
    with _TERMINAL:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)  # the libraries below ITK write there without asking anybody
            yield
        except RuntimeError as error:
            raise _ITKError("ITK cannot read it") from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _text(path: Path) -> str:
    """The beginning of a file with a text header.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return os.fsdecode(stream.read(_HEADER_BYTES))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the data directory (--data-root)."
        ) from error


def _nrrd_head(text: str) -> str:
    """The header of a NRRD file, without what follows it."""
    return re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]


def _nrrd_files(text: str) -> list[str]:
    """Data files of a NRRD header, relative to it; none where the voxels follow the header."""
    lines = re.split(r"\r?\n", _nrrd_head(text))
    for number, line in enumerate(lines):
        match = re.match(r"data ?file:\s*(\S.*?)\s*$", line, re.IGNORECASE)
        if match and match[1].split()[0] == "LIST":
            return [name.strip() for name in lines[number + 1 :] if name.strip()]
        if match:
            return _numbered(match[1])
    return []


def _numbered(value: str) -> list[str]:
    """`slice%03d.raw 1 20 1` as its files, and any other name as itself."""
    match = re.fullmatch(
        r"(.*)%(0?\d?)d(.*?)\s+(\d{1,5})\s+(\d{1,5})\s+(-?[1-9]\d{0,4})(?:\s+\d+)?", value
    )
    if match is None:
        return [value]
    before, width, after = match[1], match[2], match[3]
    first, last, step = int(match[4]), int(match[5]), int(match[6])
    numbers = range(first, last + (1 if step > 0 else -1), step)
    return [f"{before}{number:{width}d}{after}" for number in numbers]


def _meta_files(text: str, path: Path) -> list[str]:
    """Data file of a MetaImage header, relative to it; none where the voxels follow it."""
    match = re.search(r"^ElementDataFile[ \t]*[=:][ \t]*(.*)", text, re.MULTILINE)
    value = match[1].strip() if match else ""
    if value in ("", "LOCAL", "Local", "local"):
        return []
    # ITK fills slices whose file it misses in the list with whatever the memory holds.
    if value.split()[0] == "LIST" or re.search(r"%\d*d", value):
        raise DataError(
            f"{path} spreads its voxels over several files: convert it to a single .mha or .nii.gz."
        )
    return [value]


def _deflated(path: Path) -> list[tuple[Path, int]]:
    """The files of a volume whose voxels are deflated, with the byte where they begin."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    beside = files_of(path)[1:]
    if _ITK[path.suffix.lower()] == "NrrdImageIO":
        head = re.split(rb"\r?\n\r?\n", header, maxsplit=1)[0]
        if not re.search(rb"^encoding:\s*gz(?:ip)?\s*$", head, re.MULTILINE | re.IGNORECASE):
            return []
        end = re.search(rb"\r?\n\r?\n", header)
    else:
        if not re.search(rb"^CompressedData[ \t]*[=:][ \t]*[Tt1]", header, re.MULTILINE):
            return []
        end = re.search(rb"^ElementDataFile.*\n", header, re.MULTILINE)
    return [(file, 0) for file in beside] or [(path, end.end() if end else len(header))]


def _check_deflated(path: Path, start: int) -> None:
    """Unpack gzip or zlib content to nowhere.

    Raises:
        zlib.error: it is damaged, by its checksum.
        EOFError: it is cut off.
    """
    packed = zlib.decompressobj(wbits=47)  # either of the two
    with path.open("rb") as stream:
        stream.seek(start)
        while not packed.eof:
            piece = packed.unconsumed_tail or stream.read(_PIECE)
            if piece:
                packed.decompress(piece, _HEADER_BYTES)
                continue
            packed.flush()
            if not packed.eof:
                raise EOFError("its compressed voxels end early")


# -- small things ---------------------------------------------------------------------------------


def _three(shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    """The three spatial lengths; further axes may only have length 1."""
    if len(shape) < 3 or any(length != 1 for length in shape[3:]) or min(shape) < 1:
        raise DataError(
            f"{path} has shape {tuple(shape)}: give a 3-D volume (one file per time point)."
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _triple(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values[:3])
    return first, second, third
