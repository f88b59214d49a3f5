"""Read volumes: NIfTI through nibabel, NRRD and MetaImage through SimpleITK.

`VolumeFile` is the same for all formats: stored axes with the fastest first, an affine to RAS in mm
as in nibabel, and a scaling of the stored values. Lengths in other units are converted to mm.
Headers are read on opening, voxels on demand.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import hypot, prod
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

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

Number = TypeVar("Number")
NIFTI = (".nii.gz", ".nii")
# Suffix → ITK reader, so that ITK does not guess.
_ITK = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
SUFFIXES = (*NIFTI, *_ITK)
# Plausibility limit for headers: 1024³ voxels.
_MAX_VOXELS = 2**30
# Largest compression ratio of deflate; a file that claims more is truncated or forged.
_DEFLATE = 1032
_OTHER_COMPRESSION = (".bz2", ".zst")
_CHUNK = 1 << 18  # bytes per read of a compressed file
_HEADER_BYTES = 1 << 20  # maximum size of a text header
# NIfTI unit code → mm; files without a unit are in mm by convention.
_NIFTI_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
# Unit names in NRRD and MetaImage → mm. "?" means no unit in MetaImage.
_WORDS_MM = {
    **dict.fromkeys(("", "?", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("um", "\u03bcm", "micron", "microns"), 0.001),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 0.001),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
}
# NRRD spaces in anatomical coordinates; others are coordinates of a scanner or a screen.
_ANATOMICAL = re.compile(
    r"(?:right|left)-(?:anterior|posterior)-(?:superior|inferior)(?:-time)?|[RL][AP][SI]T?",
    re.IGNORECASE,
)
# Tolerance for the length of a quaternion's (b, c, d), which rounding may bring above 1.
_LENGTH_TOLERANCE = 1e-4
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    OSError,
    EOFError,
    OverflowError,
    ValueError,
    zlib.error,
    cast(type[Exception], IsalError),  # its stub declares an instance
)


def ending(name: str) -> str:
    """Return the suffix of its format that a name or path ends with, e.g. .nii.gz; "" if none."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def stem(file: Path) -> str:
    """Return a file's name without the suffix of its format, e.g. .nii.gz."""
    return file.name[: len(file.name) - len(ending(file.name))]


@dataclass(frozen=True)
class Forms:
    """qform and sform of a NIfTI header, to be written exactly as they were read.

    Attributes:
        codes: qform code and sform code.
        unit: NIfTI unit code of all lengths.
        pixdim: handedness of the qform (1 or -1) and voxel sizes.
        quaternion: b, c and d of the qform's rotation.
        offset: offset of the qform.
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
        """Read the forms from a nibabel header."""
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
        """Build both forms from an affine; the qform cannot represent shears and omits them.

        Args:
            affine: (4, 4), voxel indices to RAS in `unit`.
            codes: qform code and sform code.
            unit: NIfTI unit code; 2 is mm.
        """
        header = nib.Nifti1Header()
        header["xyzt_units"] = unit
        with np.errstate(all="ignore"):
            header.set_sform(affine, codes[1])
            try:
                header.set_qform(affine, codes[0])
            except (np.linalg.LinAlgError, HeaderDataError):  # a singular affine
                header["qform_code"] = 0
        return cls.read(header)

    def write(self, header: Any) -> None:
        """Write the forms into a nibabel header."""
        header["qform_code"], header["sform_code"] = self.codes
        header["xyzt_units"] = (int(header["xyzt_units"]) & ~7) | self.unit
        header["pixdim"][:4] = self.pixdim
        for axis, value in zip("bcd", self.quaternion, strict=True):
            header[f"quatern_{axis}"] = value
        for number, axis in enumerate("xyz"):
            header[f"qoffset_{axis}"] = self.offset[number]
            header[f"srow_{axis}"] = self.rows[4 * number : 4 * number + 4]

    def in_mm(self) -> Forms:
        """Return the forms converted to mm."""
        mm = _NIFTI_MM[self.unit]
        return replace(
            self,
            unit=2,
            pixdim=(self.pixdim[0], *(mm * side for side in self.pixdim[1:])),
            offset=tuple(mm * value for value in self.offset),
            rows=tuple(mm * value for value in self.rows),
        )

    def qform(self) -> np.ndarray:
        """Return the qform's affine in mm, or NaN if the quaternion is not a rotation."""
        own, found = self.in_mm(), np.eye(4)
        b, c, d = own.quaternion
        rest = 1 - b * b - c * c - d * d
        if not rest >= -_LENGTH_TOLERANCE:
            return np.full((4, 4), np.nan)
        turn = nib.quaternions.quat2mat([max(rest, 0.0) ** 0.5, b, c, d])
        with np.errstate(all="ignore"):
            found[:3, :3] = turn * np.array(own.pixdim[1:]) * (1, 1, own.pixdim[0])
        found[:3, 3] = own.offset
        return found


@dataclass(frozen=True)
class VolumeFile:
    """The header of a volume, with access to its voxels.

    Attributes:
        path: the file that was opened.
        shape: voxels per stored axis, the fastest axis first.
        affine: float64 (4, 4), from voxel indices to RAS in mm.
        spacing: voxel size in mm per stored axis, from the header's own field.
        forms: qform and sform for a NIfTI file on the same grid; the file's own if it is NIfTI.
        oriented: True if the header states the orientation of the axes.
        dimension: number of stored axes; those beyond the third have length 1.
        slope: values are `slope` · stored + `inter`.
        inter: see `slope`.
        read: reads the stored array.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    forms: Forms
    oriented: bool
    dimension: int
    slope: float
    inter: float
    read: Callable[[], np.ndarray]

    def voxels(self) -> np.ndarray:
        """Read the stored array of `shape`, unscaled and in the file's data type.

        Raises:
            DataError: the file is damaged or truncated, or does not fit into memory.
        """
        try:
            return self.read().reshape(self.shape, order="F")
        except MemoryError as error:
            raise DataError(
                f"{self.path} with {'×'.join(map(str, self.shape))} voxels does not fit into the "
                "memory of this machine: close other programs, or use fewer --jobs."
            ) from error
        except (*_UNREADABLE, _ITKError) as error:
            raise DataError(
                f"{self.path} is damaged or truncated ({first_line(error)}): fetch or convert it "
                "again."
            ) from error

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        """Scale (part of) the stored array; the result is float64 if the header has a scaling."""
        return apply_read_scaling(stored, np.float64(self.slope), np.float64(self.inter))


def open_volume(path: Path) -> VolumeFile:
    """Open a volume by its suffix: .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd.

    NRRD and MetaImage are interpreted as in ITK: a header without a space is in LPS.

    Raises:
        DataError: the file or its data file is missing, damaged, of another format, not 3-D (axes
            of length 1 may follow), stores more than one real number per voxel, or has an unknown
            unit.
    """
    path = Path(path)
    if broken(path):
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: restore the file, or "
            "remove the link."
        )
    if not path.exists():
        raise DataError(f"{path} does not exist: check the data directory (--data-root).")
    if not path.is_file():  # reading from a pipe would block
        raise DataError(f"{path} is not a file: give one volume file per case.")
    name = _ITK.get(path.suffix.lower())
    found = _open_nifti(path) if name is None else _open_itk(path, name)
    size = sum(file.stat().st_size for file in files_of(path))
    claimed = prod(found.shape)
    implausible = claimed > size * _DEFLATE and path.suffix not in _OTHER_COMPRESSION
    if claimed > _MAX_VOXELS or implausible:
        raise DataError(
            f"{path} claims {'×'.join(map(str, found.shape))} voxels in {size} bytes: fetch or "
            "convert it again."
        )
    return found


def _in_mm(file: VolumeFile, mm: float) -> VolumeFile:
    """Convert lengths from a unit of `mm` millimetres."""
    if mm == 1:
        return file
    # Rounded to the precision of NIfTI, so that all units give the same position.
    affine = file.affine.copy()
    affine[:3] = (affine[:3] * mm).astype(np.float32)
    spacing = triple(_floats((np.array(file.spacing) * mm).astype(np.float32)))
    forms = file.forms
    if _NIFTI_MM[forms.unit] != mm:  # NIfTI has no code for the unit
        forms = Forms.of(affine, forms.codes)
    return replace(file, affine=affine, spacing=spacing, forms=forms)


def files_of(path: Path) -> tuple[Path, ...]:
    """List all files of a volume: the given file, then separate files with its voxels.

    Raises:
        DataError: the header cannot be read, a file that it names is missing or lies outside its
            directory, or a MetaImage names several.
    """
    suffix = path.suffix.lower()
    if suffix in (".hdr", ".img"):  # a pair of NIfTI files
        other = path.with_suffix(".img" if suffix == ".hdr" else ".hdr")
        return (path, other) if other.exists() else (path,)
    if suffix not in _ITK:
        return (path,)
    text, _ = _text_header(path)
    if _ITK[suffix] == "NrrdImageIO":
        names = _nrrd_files(text)
    else:
        # ITK overflows a buffer if a header states more than ten dimensions.
        for value in re.findall(r"^NDims[ \t]*[=:][ \t]*(.*?)\s*$", text, re.MULTILINE):
            if value not in ("2", "3", "4"):
                raise DataError(f"{path} has NDims = {value[:20]}: give a 3-D volume.")
        names = _meta_files(text, path)
    files = [path.parent / name for name in names]
    for file, name in zip(files, names, strict=True):
        if not _inside(file, name, path):
            raise DataError(
                f"{path} names the data file {name[:200]}, which lies outside {path.parent}: copy "
                "it beside the header, and correct the name in the header."
            )
        if not file.is_file():
            raise DataError(
                f"{path} refers to the data file {file}, which does not exist: restore it, or "
                "correct the name in the header."
            )
    return (path, *files)


# -- NIfTI ----------------------------------------------------------------------------------------


class _NoRotation(Exception):
    """A header has only a qform and its quaternion is not a rotation; the message is its length."""


class _RepairedHeader:
    """Mixin for nibabel headers that repairs rounding errors and detects unusable quaternions."""

    @classmethod
    def from_fileobj(cls, fileobj: Any, endianness: str | None = None, check: bool = True) -> Any:
        header = super().from_fileobj(fileobj, endianness, check=False)  # type: ignore[misc]
        if header["pixdim"][0] == 0:  # equivalent to 1 by the standard
            header["pixdim"][0] = 1
        names = [f"quatern_{axis}" for axis in "bcd"]
        length = hypot(*(float(header[name]) for name in names))
        if 1 < length <= 1 + _LENGTH_TOLERANCE:
            for name in names:
                header[name] = float(header[name]) / length
        elif header["qform_code"] and not header["sform_code"] and not length <= 1:
            raise _NoRotation(f"{length:.6g}")
        if check:
            header.check_fix()
        return header


def _with_repairs(kind: Any) -> Any:
    """Derive a nibabel image class whose headers are repaired on reading."""
    header = type(kind.header_class.__name__, (_RepairedHeader, kind.header_class), {})
    return type(kind.__name__, (kind,), {"header_class": header})


_NIFTI_KINDS = [
    _with_repairs(kind)
    for kind in (nib.Nifti1Pair, nib.Nifti1Image, nib.Nifti2Pair, nib.Nifti2Image)
]


def load_nifti(path: Path) -> Any:
    """Load a file with nibabel, tolerating rounding errors in the header.

    Raises:
        Exception: any error of nibabel.
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
            f"{path} has a qform with a quaternion of length {error}, but a rotation has at most "
            "1: correct the qform, or set the sform."
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
        raise DataError(f"{path} stores {kind} voxels: give one real number per voxel.")
    header, stored = image.header, cast(Any, image.dataobj)
    # nibabel's guesses about geometry may be wrong; its other repairs are harmless.
    guessed = [r for r in repairs if "form_code" in r or "pixdim" in r and not header["sform_code"]]
    if guessed:
        raise DataError(
            f"{path} has a header without a valid geometry ({guessed[0]}): correct its sform and "
            "pixdim."
        )
    forms = Forms.read(header)
    if forms.unit not in _NIFTI_MM:
        raise DataError(
            f"{path} has xyzt_units {int(header['xyzt_units'])}, which is not a NIfTI unit: "
            "correct it (2 is mm)."
        )
    file = VolumeFile(
        path,
        _three(image.shape, path),
        np.asarray(image.affine, float),
        triple(_floats(header.get_zooms()[:3])),
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
    """Collect nibabel's messages about repaired headers instead of printing them."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    imageglobals.logger.addFilter(keep)
    try:
        with np.errstate(invalid="ignore"):  # NaN in a header is rejected later
            yield messages
    finally:
        imageglobals.logger.removeFilter(keep)


def _read_nifti(stored: Any) -> np.ndarray:
    """Read the stored array of a nibabel proxy; gzip files are read with a faster library."""
    if not str(stored.file_like).endswith(".gz"):
        return stored.get_unscaled()
    voxels = np.empty(stored.shape, stored.dtype, order="F")
    content = voxels.reshape(-1, order="F").view(np.uint8)
    with igzip.open(stored.file_like) as stream:
        stream.seek(stored.offset)
        filled = 0
        while filled < len(content):
            got = stream.readinto(content[filled : filled + _CHUNK])
            if not got:
                raise EOFError(f"{len(content)} bytes expected, {filled} found")
            filled += got
        # Read to the end, where the checksum is verified; padding may precede it.
        rest = 0
        while got := len(stream.read(_CHUNK)):
            rest += got
            if rest > _HEADER_BYTES:
                raise ValueError("it stores more voxels than its header states")
    return voxels


# -- NRRD and MetaImage ---------------------------------------------------------------------------


def _open_itk(path: Path, name: str) -> VolumeFile:
    files_of(path)  # raises a specific error for a missing data file
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
            f"{path} stores {reader.GetNumberOfComponents()} × {kind} per voxel: give one real "
            "number per voxel."
        )
    shape = _three(reader.GetSize(), path)
    dimension = reader.GetDimension()
    # Rounded to the precision of NIfTI, so that all formats give the same position.
    spacing = np.array(reader.GetSpacing()[:3], np.float32).astype(float)
    direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    lps = np.eye(4)
    lps[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    lps[:3, 3] = reader.GetOrigin()[:3]
    affine = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps).astype(np.float32).astype(float) + 0.0

    def read() -> np.ndarray:
        # ITK verifies no checksums of MetaImage and not all of NRRD; without this check, damaged
        # files would give arbitrary voxels.
        for file, start in _deflated(path):
            _check_deflated(file, start)
        with _itk():
            image = reader.Execute()
        return np.asarray(_Pixels(sitk.GetArrayViewFromImage(image), image)).T

    oriented, mm = _header_fields(path)
    unit = next((code for code in (1, 2, 3) if _NIFTI_MM[code] == mm), 2)
    forms = Forms.of(affine, (1, 1), unit)
    file = VolumeFile(
        path, shape, affine, triple(spacing.tolist()), forms, oriented, dimension, 1.0, 0.0, read
    )
    return _in_mm(file, mm)


def _header_fields(path: Path) -> tuple[bool, float]:
    """Read what ITK does not report: whether the orientation is stated, and the unit in mm.

    Raises:
        DataError: the unit is unknown, or differs between axes.
    """
    text, _ = _text_header(path)
    if _ITK[path.suffix.lower()] == "NrrdImageIO":
        lines = re.findall(r"(?m)^([^:#\r\n]+): *(.*?)\s*$", text)
        fields = {name.lower(): value for name, value in lines}
        oriented = bool(_ANATOMICAL.fullmatch(fields.get("space", "")))
        oriented &= "space directions" in fields
        # `space units` applies to the axes of a space, `units` to axes with `spacings`.
        units = fields.get("space units") or fields.get("units", "")
        words = re.findall(r'"([^"]*)"', units) or units.split()
    else:
        fields = dict(re.findall(r"(?m)^(\w+)[ \t]*[=:][ \t]*(.*?)\s*$", text))
        oriented = any(name in fields for name in ("TransformMatrix", "Rotation", "Orientation"))
        words = [fields.get("DistanceUnits", "")]
    # Normalise the micro sign, which may be in Latin-1.
    found = {word.replace("\udcb5", "\u03bc").strip().casefold() for word in words[:3]}
    sizes = {_WORDS_MM.get(word, 0.0) for word in found} or {1.0}
    if len(sizes) > 1 or 0.0 in sizes:
        raise DataError(
            f"{path} has the units {' and '.join(sorted(map(repr, found)))[:60]}: set one known "
            "unit for all axes, such as mm, in the header."
        )
    return oriented, sizes.pop()


class _Pixels:
    """Exposes an ITK image's buffer to NumPy and keeps the image alive as long as the array."""

    def __init__(self, view: np.ndarray, image: object) -> None:
        self.__array_interface__ = view.__array_interface__
        self._image = image


class _ITKError(Exception):
    """ITK cannot read a file; the long message of ITK is the cause."""


_TERMINAL = Lock()


@contextmanager
def _itk() -> Iterator[None]:
    """Convert ITK's errors to `_ITKError` and suppress what its libraries print."""
    with _TERMINAL:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)  # libraries used by ITK write to the file descriptor directly
            yield
        except RuntimeError as error:
            raise _ITKError("ITK cannot read it") from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _text_header(path: Path) -> tuple[str, int]:
    """Read a NRRD or MetaImage header; return it and the offset of attached voxels.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_HEADER_BYTES)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the data directory (--data-root)."
        ) from error
    nrrd = _ITK[path.suffix.lower()] == "NrrdImageIO"
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile[ \t]*[=:].*\n?", content)
    size = end.end() if end else len(content)
    return os.fsdecode(content[:size]), size


def _nrrd_files(text: str) -> list[str]:
    """List the data files of a NRRD header, relative to it; empty if the header is attached."""
    lines = re.split(r"\r?\n", text)
    for number, line in enumerate(lines):
        match = re.match(r"data ?file:\s*(\S.*?)\s*$", line, re.IGNORECASE)
        if match and match[1].split()[0] == "LIST":
            return [name.strip() for name in lines[number + 1 :] if name.strip()]
        if match:
            return _numbered(match[1])
    return []


def _inside(file: Path, name: str, header: Path) -> bool:
    """Return True if a data file lies in the directory of its header or below.

    Downloaded headers may name any file of this machine. A link may lead out only if the header is
    a link as well, as in directories managed by git-annex or DVC.
    """
    parts = re.split(r"[/\\]", name)
    if "\0" in name or parts[0] == "" or ".." in parts or ":" in parts[0]:
        return False
    folder = Path(os.path.realpath(header.parent))
    return header.is_symlink() or Path(os.path.realpath(file)).is_relative_to(folder)


def _numbered(value: str) -> list[str]:
    """Expand a pattern such as `slice%03d.raw 1 20 1`; other names are returned unchanged."""
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
    """List the data file of a MetaImage header, relative to it; empty if the data are attached."""
    match = re.search(r"^ElementDataFile[ \t]*[=:][ \t]*(.*)", text, re.MULTILINE)
    value = match[1].strip() if match else ""
    if value in ("", "LOCAL", "Local", "local"):
        return []
    # For missing files of a list, ITK returns uninitialised memory.
    if value.split()[0] == "LIST" or re.search(r"%\d*d", value):
        raise DataError(
            f"{path} stores its voxels in several files: convert it to a single .mha or .nii.gz."
        )
    return [value]


def _deflated(path: Path) -> list[tuple[Path, int]]:
    """List the files of a volume with compressed voxels, with the offset of the data."""
    text, start = _text_header(path)
    packed = (
        r"(?im)^encoding:\s*gz(?:ip)?\s*$"
        if _ITK[path.suffix.lower()] == "NrrdImageIO"
        else r"(?m)^CompressedData[ \t]*[=:][ \t]*[Tt1]"
    )
    if not re.search(packed, text):
        return []
    return [(file, 0) for file in files_of(path)[1:]] or [(path, start)]


def _check_deflated(path: Path, start: int) -> None:
    """Decompress gzip or zlib content to verify it.

    Raises:
        zlib.error: the content is damaged.
        EOFError: the content is truncated.
    """
    packed = zlib.decompressobj(wbits=47)  # detects gzip or zlib
    with path.open("rb") as stream:
        stream.seek(start)
        while not packed.eof:
            chunk = packed.unconsumed_tail or stream.read(_CHUNK)
            if chunk:
                packed.decompress(chunk, _HEADER_BYTES)
                continue
            packed.flush()
            if not packed.eof:
                raise EOFError("its compressed voxels end early")


# -- utilities ------------------------------------------------------------------------------------


def _three(shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    """Return the three spatial lengths; further axes must have length 1."""
    if len(shape) < 3 or any(length != 1 for length in shape[3:]) or min(shape) < 1:
        raise DataError(
            f"{path} has shape {tuple(shape)}: give a 3-D volume (one file per time point)."
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def triple(values: Iterable[Number]) -> tuple[Number, Number, Number]:
    """Return three values as a tuple of known length."""
    first, second, third = values
    return first, second, third
