"""Volumes as they lie on disk: NIfTI through nibabel, NRRD and MetaImage through SimpleITK.

Whatever the format, an opened file has the same face: stored axes with the fastest first, an affine
to RAS millimetres as nibabel gives it, and a scaling of the stored values. Headers are read on
opening, voxels when they are asked for.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
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

from glua_bench.errors import DataError

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
class VolumeFile:
    """The header of a volume, and the way to its voxels.

    Args:
        path: the file that was opened.
        shape: voxels per stored axis, the fastest axis first.
        affine: float64 (4, 4), from voxel indices to mm, RAS.
        spacing: mm per stored axis as the header gives it.
        codes: NIfTI's qform and sform code; of other formats, both say "scanner".
        slope: of the values, `slope` · stored + `inter`.
        inter: see `slope`.
        read: reads the stored array.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    codes: tuple[int, int]
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
                f"{self.path} is damaged or truncated ({_brief(error)}): fetch or convert it again."
            ) from error

    def scaled(self, stored: np.ndarray) -> np.ndarray:
        """Values of (part of) the stored array: itself, or float64 where the header scales."""
        return apply_read_scaling(stored, np.float64(self.slope), np.float64(self.inter))


def open_volume(path: Path) -> VolumeFile:
    """Open a volume by its suffix: .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd.

    NRRD and MetaImage are taken as ITK takes them: a header without a space lies in LPS.

    Raises:
        DataError: the file or its data file is missing, damaged, of another format, not 3-D (axes
            of length 1 may follow), or holds more than one real number a voxel.
    """
    path = Path(path)
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
    try:
        with path.open("rb") as stream:
            text = os.fsdecode(stream.read(_HEADER_BYTES))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the data directory (--data-root)."
        ) from error
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


def _open_nifti(path: Path) -> VolumeFile:
    try:
        with _repairs() as repairs:
            image: Any = nib.load(path)
    except _UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as NIfTI ({_brief(error)}): replace it by an intact "
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
    return VolumeFile(
        path,
        _three(image.shape, path),
        np.asarray(image.affine, float),
        _triple(header.get_zooms()),
        (int(header["qform_code"]), int(header["sform_code"])),
        float(stored.slope),
        float(stored.inter),
        lambda: _read_nifti(stored),
    )


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

    return VolumeFile(path, shape, affine, _triple(spacing), (1, 1), 1.0, 0.0, read)


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


def _nrrd_files(text: str) -> list[str]:
    """Data files of a NRRD header, relative to it; none where the voxels follow the header."""
    lines = re.split(r"\r?\n", re.split(r"\r?\n\r?\n", text, maxsplit=1)[0])
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


def _triple(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values[:3])
    return first, second, third


def _brief(error: BaseException) -> str:
    """The first line of an error, short enough for one sentence."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".").replace(". ", ", ")[:120]
