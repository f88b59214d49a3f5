"""What a user names on the command line of `predict`, as volumes with a name for their results."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from glua_bench.dicom_series import is_dicom, read_series, series_of
from glua_bench.errors import DataError
from glua_bench.formats import SUFFIXES, Forms, VolumeFile, open_volume
from glua_bench.paths import broken, entries

# Last words of the names of files that lie beside images and are none.
_NO_IMAGES = {"label", "labels", "lab", "lbl", "seg", "segs", "segmentation", "mask", "masks"}
_NO_IMAGES |= {"msk", "gt", "truth", "manual", "prob"}
_NO_IMAGE_FOLDERS = {*_NO_IMAGES, "labelstr", "labelsts", "labelsval"}
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_NNUNET = ("imagesTr", "imagesTs", "imagesVal")


@dataclass(frozen=True)
class Given:
    """An image that somebody gave.

    Args:
        path: the file, or the folder of a DICOM series.
        name: for its results, unlike that of any other image.
        slices: the files of a DICOM series; none for other formats.
    """

    path: Path
    name: str
    slices: tuple[Path, ...] = ()

    def open(self) -> VolumeFile:
        """The volume; of a DICOM series, all voxels are read now.

        Raises:
            DataError: as for `open_volume` and `read_series`.
        """
        if not self.slices:
            return open_volume(self.path)
        series = read_series(self.slices)
        # NIfTI's precision, in which results are saved.
        affine = series.affine.astype(np.float32).astype(float)
        across, down, between = (float(length) for length in nib.affines.voxel_sizes(affine))
        return VolumeFile(
            path=self.path,
            shape=(series.voxels.shape[0], series.voxels.shape[1], series.voxels.shape[2]),
            affine=affine,
            spacing=(across, down, between),
            forms=Forms.of(affine, (1, 1)),
            placed=True,
            dimension=3,
            slope=1.0,
            inter=0.0,
            read=lambda: series.voxels,
        )


@dataclass(frozen=True)
class Inputs:
    """All images of a call.

    Args:
        images: in the order given, those of a folder sorted by name.
        left: files of folders that are passed over, because their names are those of labels.
    """

    images: tuple[Given, ...]
    left: tuple[Path, ...] = ()


def find(paths: Iterable[Path]) -> Inputs:
    """The images that files and folders stand for, each once.

    A folder stands for the volumes that lie in it, without hidden files and without those whose
    names end in a word for labels, which the folder's own may be, too; or, where it holds DICOM
    files, for their series. In nnU-Net's folders the channel's number is no part of a name.

    Args:
        paths: files in any of `formats.SUFFIXES`, and folders.

    Raises:
        DataError: a path does not exist, or a folder holds no image, several channels of a case,
            or several series.
    """
    found: dict[str, Given] = {}
    left: list[Path] = []
    for path in paths:
        if path.is_dir():
            own, passed = _in_folder(path)
            left += passed
        elif path.exists() or broken(path):
            own = [_file(path)]
        else:
            raise DataError(
                f"The image {path} does not exist; check the names of images and folders."
            )
        for one in own:
            found.setdefault(os.path.abspath(one.path), one)
    images = list(found.values())
    names = _distinct([(one.path, one.name) for one in images])
    return Inputs(
        tuple(Given(o.path, n, o.slices) for o, n in zip(images, names, strict=True)), tuple(left)
    )


def stem(file: Path) -> str:
    """A file's name without the suffix of its format, e.g. .nii.gz."""
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), "")
    return file.name[: len(file.name) - len(suffix)]


def _file(path: Path) -> Given:
    if not path.name.lower().endswith(SUFFIXES) and path.is_file() and is_dicom(path):
        raise DataError(f"{path} is one slice of a DICOM series: give the folder of the series.")
    return Given(path, stem(path))


def _in_folder(folder: Path) -> tuple[list[Given], list[Path]]:
    """The images in a folder, and the files that are labels by their names."""
    found = entries(folder)
    files = [path for path in found if path.is_file() or broken(path)]
    volumes = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    slices = [p for p in files if p not in volumes and p.is_file() and is_dicom(p)]
    if volumes and slices:
        raise DataError(
            f"{folder} holds volumes ({volumes[0].name}) and DICOM files ({slices[0].name}): put "
            "them into folders of their own, or name the volumes."
        )
    if slices:
        return [_series(folder, slices)], []
    own = Path(os.path.abspath(folder)).name.lower() in _NO_IMAGE_FOLDERS
    left = [path for path in volumes if own or _is_label(path)]
    images = [path for path in volumes if path not in left]
    if left and not images:
        raise DataError(
            f"{folder} holds only labels, by its name or those of its files ({left[0].name}): name "
            "the files themselves if they are images."
        )
    if not images:
        inner = [p.name for p in found if p.is_dir() and p.name.lower() not in _NO_IMAGE_FOLDERS]
        hint = f"name the folders in it ({', '.join(inner[:3])})" if inner else "check the folder"
        raise DataError(f"{folder} holds no volume ({', '.join(SUFFIXES)}) and no DICOM: {hint}.")
    return _channels(folder, images), left


def _is_label(file: Path) -> bool:
    words = re.split(r"[^a-z]+", stem(file).lower())
    return len(words) > 1 and words[-1] in _NO_IMAGES


def _channels(folder: Path, images: Sequence[Path]) -> list[Given]:
    """Images of a folder, in nnU-Net's layout without the number of the channel.

    Raises:
        DataError: there are several channels.
    """
    numbered = [_CHANNEL.fullmatch(stem(path)) for path in images]
    plain = [Given(path, stem(path)) for path in images]
    channels: dict[str, set[str]] = {}
    for match in numbered:
        if match is None:
            return plain
        channels.setdefault(match[1], set()).add(match[2])
    every = set.union(*channels.values())
    alike = len(channels) > 1 and all(own == every for own in channels.values())
    named = Path(os.path.abspath(folder)).name in _NNUNET
    if len(every) > 1 and "0000" in every and (alike or named):
        raise DataError(
            f"{folder} holds {len(every)} channels of a case (_{', _'.join(sorted(every))}), and a "
            f"method here sees one: name the files of one, as in {folder}/*_0000.nii.gz."
        )
    if every == {"0000"} or (named and len(every) == 1):
        return [Given(p, m[1]) for p, m in zip(images, numbered, strict=True) if m is not None]
    return plain


def _series(folder: Path, slices: Sequence[Path]) -> Given:
    """A folder of DICOM files as one volume.

    Raises:
        DataError: there are several series.
    """
    found = series_of(slices)
    # Some anonymised releases give every file an identifier of its own, which then tells nothing.
    if 1 < len(found) < len(slices):
        told = "; ".join(
            f"{title or 'without description'}, {len(files)} files from {files[0].name}"
            for title, files in found
        )
        raise DataError(
            f"{folder} holds {len(found)} DICOM series ({told}): put the files of each into a "
            "folder of its own, and name these."
        )
    return Given(folder, Path(os.path.abspath(folder)).name, tuple(slices))


def _distinct(given: Sequence[tuple[Path, str]]) -> list[str]:
    """Names that differ, also where a disk does not tell a from A or two spellings of ä.

    Files of one folder that differ in their format have its suffix in their names, and a number
    where that does not help. Other names that are alike follow those of their folders, as many as
    it takes; what then still is alike, a number tells apart.
    """
    folders = [Path(os.path.abspath(path)).parent.parts[1:] for path, _ in given]
    names = [name for _, name in given]
    for group in _alike([f"{'/'.join(own)}/{n}" for own, n in zip(folders, names, strict=True)]):
        for index in group:
            path, name = given[index]
            names[index] = f"{name}_{path.name[len(stem(path)) :].replace('.', '')}".rstrip("_")
        for again in _alike([names[index] for index in group]):
            for number, place in enumerate(again[1:], start=2):
                names[group[place]] += f"_{number}"
    plain, depth = list(names), [0] * len(names)
    while groups := _alike(names):
        growing = [i for group in groups for i in group if depth[i] < len(folders[i])]
        for index in growing:
            depth[index] += 1
            names[index] = "_".join([*folders[index][-depth[index] :], plain[index]])
        if not growing:
            for group in groups:
                for number, index in enumerate(group[1:], start=2):
                    names[index] += f"_{number}"
    return names


def _alike(names: Sequence[str]) -> list[list[int]]:
    """The places of names that some disk takes for one."""
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(unicodedata.normalize("NFC", name.casefold()), []).append(index)
    return [own for own in by_name.values() if len(own) > 1]
