"""Readers for the slices and volumes of the pre-processed MM-WHS release of PnP-AdaNet and SIFA.

Files that deviate from the release are rejected, never repaired.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from glua_bench.data.volumes import label_integers
from glua_bench.datasets.tfrecord import Values, read_examples
from glua_bench.errors import DataError, reason

# Range that its authors map to [-1, 1], in standard deviations of a volume.
RANGES = {"ct": (-2.8, 3.2), "mr": (-1.8, 4.4)}
UNDOCUMENTED = 5  # label that the release contains but does not explain
_KNOWN = frozenset(range(UNDOCUMENTED + 1))
_LARGEST = 2**29  # maximum number of voxels of a test volume; the release has about 2**24


def rescaled(voxels: np.ndarray, domain: str) -> np.ndarray:
    """Map the release's fixed intensity range of a domain to [-1, 1].

    Args:
        voxels: any shape, in standard deviations of the volume.
        domain: "ct" or "mr".

    Returns:
        float32 of the same shape, clipped to [-1, 1].
    """
    low, high = RANGES[domain]
    return np.clip(2 * (voxels - low) / (high - low) - 1, -1, 1).astype(np.float32)


def read_slice(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the slice of a TFRecord file: the middle one of the neighbours that it holds.

    Args:
        path: file with one example, whose `data_vol` and `label_vol` are float32 values of shape
            `dsize_dim0` x `dsize_dim1` x `dsize_dim2`. (`lsize_dim` may state one slice although
            the labels of three are there.)

    Returns:
        Image, float32 (X, Y), and labels 0 to 5, uint8 (X, Y).

    Raises:
        DataError: the file is damaged or not of the release.
    """
    examples = list(read_examples(path))
    if len(examples) != 1:
        raise DataError(f"{path} holds {len(examples)} slices, not 1: give the release's files.")
    (example,) = examples
    shapes = [_shape(example, letter, path) for letter in "dl"]
    if shapes[0][:2] != shapes[1][:2]:
        raise DataError(
            f"{path} has an image of {shapes[0]} and labels of {shapes[1]}: give the release's "
            "files."
        )
    planes = []
    for name in ("data_vol", "label_vol"):
        content = example.get(name, [])
        held = content[0] if len(content) == 1 else None
        octets = held if isinstance(held, bytes) else b""
        size = len(octets)
        width, height = shapes[0][:2]
        depth, rest = divmod(size, 4 * width * height)
        if rest or depth not in (1, shapes[0][2]):
            raise DataError(
                f"{path} has {size} bytes of {name}, which do not hold {shapes[0]} float32 values: "
                "give the release's files."
            )
        values = np.frombuffer(octets, "<f4").reshape(width, height, depth)
        planes.append(values[..., depth // 2])
    return _checked(planes[0], path, "image"), _checked(planes[1], path, "label")


def read_volume(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a test volume, flipped to the orientation of the training slices.

    Args:
        files: one npz file (`arr_0` image, `arr_1` label), or two NIfTI files (image, label).

    Returns:
        Image, float32 (X, Y, slices); labels 0 to 5, uint8 of the same shape; and the affine that
        overlays a prediction on the original NIfTI file (or the array's indices).

    Raises:
        DataError: a file is damaged or not of the release.
    """
    affine = np.eye(4)
    if len(files) == 1:
        image, label = _arrays(files[0])
    else:
        image, given = _nifti(files[0])
        label, _ = _nifti(files[1])
        affine = given if np.isfinite(given).all() else affine
    if image.ndim != 3 or image.shape != label.shape:
        raise DataError(
            f"{files[0]} has an image of shape {image.shape} and labels of {label.shape}: give "
            "volumes of one 3-D shape."
        )
    image, label = _checked(image, files[0], "image"), _checked(label, files[-1], "label")
    # The authors' evaluation flips test volumes like this before prediction.
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:2, 3] = image.shape[0] - 1, image.shape[1] - 1
    return image[::-1, ::-1], label[::-1, ::-1], affine @ turn


def _shape(example: dict[str, Values], letter: str, path: Path) -> tuple[int, int, int]:
    """Return the three sizes stated in an example."""
    found = []
    for axis in range(3):
        values = example.get(f"{letter}size_dim{axis}", [])
        size = values[0] if len(values) == 1 else None
        if not isinstance(size, int) or not 1 <= size <= 4096:
            raise DataError(
                f"{path} has no valid {letter}size_dim{axis}: give a file of the release."
            )
        found.append(size)
    return found[0], found[1], found[2]


def _checked(values: np.ndarray, path: Path, what: str) -> np.ndarray:
    """Return an image as float32, or a label as uint8."""
    if values.dtype.kind not in "iufb" or not np.isfinite(values).all():
        raise DataError(f"{path} has non-finite {what} values: download it again.")
    if what == "image":
        return values.astype(np.float32)
    values = label_integers(values, path)
    strays = sorted(set(np.unique(values).tolist()) - _KNOWN)
    if strays:
        raise DataError(
            f"{path} has label value(s) {', '.join(map(str, strays[:5]))}, but the release has "
            f"only 0 to {UNDOCUMENTED}: give the release's file."
        )
    return values.astype(np.uint8)


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the two arrays of an npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 2 * 8 * _LARGEST:
            raise DataError(f"{path} unpacks to {size} bytes: give a file of the release.")
        with np.load(path, allow_pickle=False) as content:
            return content["arr_0"], content["arr_1"]
    except KeyError as error:
        raise DataError(
            f"{path} lacks arr_0 or arr_1: save the image and its label with "
            "numpy.savez(file, image, label)."
        ) from error
    except DataError:
        raise
    except Exception as error:  # zipfile and numpy raise many types for damaged files
        raise DataError(
            f"{path} cannot be read as npz ({reason(error)}): create or download it again."
        ) from error


def _nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels, float32, and affine of a NIfTI file."""
    try:
        volume: Any = nib.load(path)
        if math.prod(volume.shape) > _LARGEST:
            raise DataError(f"{path} has the shape {volume.shape}: give a file of the release.")
        return volume.get_fdata(dtype=np.float32, caching="unchanged"), volume.affine
    except DataError:
        raise
    except Exception as error:  # nibabel raises many types for damaged files
        raise DataError(
            f"{path} cannot be read as NIfTI ({reason(error)}): download it again."
        ) from error
