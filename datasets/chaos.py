"""Conversion of a CHAOS MR series (DICOM files with PNG masks) to two NIfTI volumes.

`<id>/T2SPIR/DICOM_anon/IMG-0002-00001.dcm` with `<id>/T2SPIR/Ground/IMG-0002-00001.png`: a mask
belongs to the slice of the same name and has its position.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import nibabel as nib
import numpy as np
from PIL import Image

from glua_bench.data.cache import file_digest, generating
from glua_bench.data.dicom_series import read_series
from glua_bench.errors import DataError
from glua_bench.identity import code_digest
from glua_bench.paths import entries

# The module whose code, with all that it imports, is part of the names of converted files.
CONVERTING = ("glua_bench.datasets.chaos",)

Slices: TypeAlias = tuple[tuple[Path, Path], ...]  # DICOM file and mask of each slice of a scan

LIVER, RIGHT_KIDNEY, LEFT_KIDNEY, SPLEEN = 63, 126, 189, 252
# Each organ has a range of grey levels, above the first number and up to the second.
RANGES = {
    LIVER: (55, 70),
    RIGHT_KIDNEY: (110, 135),
    LEFT_KIDNEY: (175, 200),
    SPLEEN: (240, 255),
}


def slices_of(scan: Path) -> Slices:
    """Return the DICOM file and the mask of each slice, sorted by name.

    Args:
        scan: the folder that holds `DICOM_anon` and `Ground`.

    Raises:
        DataError: there are no files, or a file lacks its counterpart.
    """
    pictures, masks = (
        {file.stem: file for file in entries(scan / folder) if file.suffix.lower() == suffix}
        for folder, suffix in (("DICOM_anon", ".dcm"), ("Ground", ".png"))
    )
    if not pictures:
        raise DataError(f"{scan / 'DICOM_anon'} holds no .dcm files: unpack the release again.")
    for folder, suffix, absent in (
        ("Ground", ".png", sorted(pictures.keys() - masks.keys())),
        ("DICOM_anon", ".dcm", sorted(masks.keys() - pictures.keys())),
    ):
        if absent:
            raise DataError(
                f"{scan / folder} lacks {len(absent)} of {len(pictures.keys() | masks.keys())} "
                f"files, first {absent[0]}{suffix}: each .dcm file of a scan needs the .png mask "
                "of the same name, so unpack the release again."
            )
    return tuple((file, masks[stem]) for stem, file in pictures.items())


def addresses(slices: Slices) -> tuple[str, str]:
    """Return the names of a scan's image and label volume in the cache.

    Names depend on file contents, so a cached volume is never stale. The image's name does not
    depend on masks.

    Args:
        slices: from `slices_of`.

    Raises:
        DataError: a file cannot be read.
    """
    return _addresses(slices, tuple(_stamp(file) for pair in slices for file in pair))


@lru_cache(maxsize=256)
def _addresses(slices: Slices, stamps: tuple[tuple[int, ...], ...]) -> tuple[str, str]:
    """Return `addresses`, cached because a run asks repeatedly for digests of a thousand files."""
    digests = [(file.stem, file_digest(file), file_digest(mask)) for file, mask in slices]
    image = [code_digest(CONVERTING), "image", sorted(content for _, content, _ in digests)]
    label = [code_digest(CONVERTING), "label", digests]
    first, second = (
        hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20] for parts in (image, label)
    )
    return first, second


def _stamp(file: Path) -> tuple[int, ...]:
    """Return values that change with the file; () if it is missing, which `file_digest` reports."""
    with suppress(OSError):
        status = file.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return ()


def convert(slices: Slices, image: Path, label: Path) -> None:
    """Write a scan as two NIfTI volumes in RAS+ coordinates, the image last.

    The image holds float32 values after slope and intercept, the label 63, 126, 189 and 252. Both
    have the affine in sform and qform. Equal inputs give equal bytes.

    Args:
        slices: from `slices_of`.
        image: the file to write, .nii.
        label: the file to write, .nii.

    Raises:
        DataError: a file cannot be used, or the slices do not stack.
        RunFailure: a volume cannot be written.
    """
    masks = dict(slices)
    series = read_series(list(masks))
    labels = np.stack(
        [_mask(masks[file], series.voxels.shape[:2]) for file in series.files], axis=2
    )
    for path, voxels in ((label, labels), (image, series.voxels)):
        volume = nib.Nifti1Image(voxels, series.affine)
        volume.header.set_xyzt_units("mm")
        volume.set_qform(series.affine, 1)
        volume.set_sform(series.affine, 1)
        with generating(path) as unfinished:
            nib.save(volume, unfinished)


def _mask(file: Path, size: tuple[int, ...]) -> np.ndarray:
    """Read a mask as uint8 (columns, rows) with the values 63, 126, 189 and 252."""
    try:
        with Image.open(file) as picture:
            found = picture.size
            # Other releases store the liver with one bit per pixel, which would read as 255.
            usable = picture.mode in ("L", "P", "RGB", "RGBA")
            colours = np.asarray(picture.convert("RGB")) if usable and found == size else None
    except Exception as error:  # the decoder raises many types for damaged files
        raise DataError(f"{file} cannot be read as PNG: unpack the release again.") from error
    if found != size:
        raise DataError(
            f"{file} is {found[0]} pixels wide and {found[1]} high but its slice has "
            f"{size[0]} columns and {size[1]} rows: unpack the release again."
        )
    if colours is None or (colours != colours[..., :1]).any():
        raise DataError(f"{file} is not an 8-bit greyscale image: unpack the release again.")
    grey = colours[..., 0]
    table = np.zeros(256, np.uint8)
    known = np.zeros(256, bool)
    known[0] = True
    for value, (above, last) in RANGES.items():
        table[above + 1 : last + 1] = value
        known[above + 1 : last + 1] = True
    strays = np.unique(grey[~known[grey]])
    if strays.size:
        shown = ", ".join(map(str, strays[:5].tolist())) + (", …" if strays.size > 5 else "")
        raise DataError(
            f"{file} has unknown grey level(s) {shown} (63 is liver, 126 right kidney, 189 left "
            "kidney, 252 spleen): use the latest release, because earlier ones had other values."
        )
    return table[grey].T
