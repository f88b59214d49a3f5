"""Find the volumes given to `predict`, and name their results."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from glua_bench.data.dicom_series import is_dicom, read_series, series_of
from glua_bench.data.formats import SUFFIXES, Forms, VolumeFile, open_volume, stem
from glua_bench.errors import DataError
from glua_bench.paths import LABEL_WORDS, broken, entries

# Final words of the names of label files, and of directories, including results of `predict`.
_LABELS = LABEL_WORDS | {"prob"}
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_NNUNET = ("imagesTr", "imagesTs", "imagesVal")


@dataclass(frozen=True)
class Given:
    """An input image.

    Attributes:
        path: the file, or the directory of a DICOM series.
        name: unique name of its results.
        slices: the files of a DICOM series; empty for other formats.
        further: the second and later input channels.
    """

    path: Path
    name: str
    slices: tuple[Path, ...] = ()
    further: tuple[Given, ...] = ()

    def open(self) -> VolumeFile:
        """Open the volume; a DICOM series is read completely.

        Raises:
            DataError: as for `open_volume` and `read_series`.
        """
        if not self.slices:
            return open_volume(self.path)
        series = read_series(self.slices)
        # Rounded to the precision of NIfTI, the format of the results.
        affine = series.affine.astype(np.float32).astype(float)
        across, down, between = (float(length) for length in nib.affines.voxel_sizes(affine))
        return VolumeFile(
            path=self.path,
            shape=(series.voxels.shape[0], series.voxels.shape[1], series.voxels.shape[2]),
            affine=affine,
            spacing=(across, down, between),
            forms=Forms.of(affine, (1, 1)),
            oriented=True,
            dimension=3,
            slope=1.0,
            inter=0.0,
            read=lambda: series.voxels,
        )


@dataclass(frozen=True)
class Inputs:
    """All input images of a call.

    Attributes:
        images: images in the order given; those of a directory are sorted by name.
        left: files in directories that are skipped, because they are named like labels.
    """

    images: tuple[Given, ...]
    left: tuple[Path, ...] = ()

    @property
    def skipped(self) -> str:
        """The sentence on skipped files; "" if there are none."""
        if not self.left:
            return ""
        files = ", ".join(file.name for file in self.left[:3])
        more = f" and {len(self.left) - 3} more" if len(self.left) > 3 else ""
        return f"Skipped (labels by their names): {files}{more}."


def find(paths: Iterable[Path], channels: int = 1) -> Inputs:
    """Find the images in files and directories, without duplicates.

    A directory contributes its volumes, except hidden files and files named like labels (or all
    files, if the directory is named like labels), or the DICOM series that it contains. In nnU-Net
    directories, the channel number is removed from names. The files of a case with several input
    channels are joined by commas (`a_t1.nii.gz,a_t2.nii.gz`), or named as by nnU-Net (`a_0000`,
    `a_0001`).

    Args:
        paths: files in any of `formats.SUFFIXES`, directories, and files joined by commas.
        channels: number of input channels of the model.

    Raises:
        DataError: a path does not exist, or a directory contains no image, more channels of a case
            than the model has, or several series; or a case lacks a channel.
    """
    found: dict[str, Given] = {}
    left: list[Path] = []
    for path in paths:
        joined = [] if path.exists() else str(path).split(",")
        if len(joined) > 1:
            own = [_joined(path, [Path(part.strip()) for part in joined])]
        elif path.is_dir():
            own, skipped = _in_folder(path, channels)
            left += skipped
        elif path.exists() or broken(path):
            if not path.name.lower().endswith(SUFFIXES) and path.is_file() and is_dicom(path):
                raise DataError(
                    f"{path} is one slice of a DICOM series: give the series' directory."
                )
            own = [Given(path, stem(path))]
        else:
            raise DataError(f"The image {path} does not exist; check the path.")
        for image in own:
            found.setdefault(os.path.abspath(image.path), image)
    if channels > 1:
        found = _by_case(found, channels)
    names = _unique_names([(image.path, image.name) for image in found.values()])
    images = (replace(i, name=name) for i, name in zip(found.values(), names, strict=True))
    return Inputs(tuple(images), tuple(left))


def _joined(text: Path, paths: Sequence[Path]) -> Given:
    """Return the files or directories of a case's channels as one image.

    Raises:
        DataError: a path does not exist or contains several images.
    """
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DataError(f"The image {missing[0]} of {text} does not exist; check the path.")
    first, *further = (find([path]).images for path in paths)
    for path, own in zip(paths, (first, *further), strict=True):
        if len(own) > 1:
            raise DataError(f"{path} of {text} contains {len(own)} images: give one per channel.")
    return replace(first[0], further=tuple(own[0] for own in further))


def _by_case(found: Mapping[str, Given], channels: int) -> dict[str, Given]:
    """Join single files with names of nnU-Net to cases.

    Raises:
        DataError: a case lacks a channel or has more.
    """
    made: dict[str, Given] = {}
    cases: dict[tuple[Path, str], dict[int, Given]] = {}
    for place, image in found.items():
        match = None if image.further or image.slices else _CHANNEL.fullmatch(stem(image.path))
        if match is None:
            made[place] = image
            continue
        folder = Path(os.path.abspath(image.path)).parent
        own = cases.setdefault((folder, match[1]), {})
        made.setdefault(str(folder / match[1]), image)  # keeps the order
        own[int(match[2])] = image
    for (folder, case), own in cases.items():
        if sorted(own) != list(range(channels)):
            there = ", ".join(f"_{number:04d}" for number in sorted(own))
            needed = ", ".join(f"_{number:04d}" for number in range(channels))
            raise DataError(
                f"Case {case} in {folder} has the channel(s) {there}, but the model needs {needed}:"
                " give one file for each."
            )
        further = tuple(replace(own[number], name=case) for number in range(1, channels))
        made[str(folder / case)] = replace(own[0], name=case, further=further)
    return made


def _in_folder(folder: Path, channels: int) -> tuple[list[Given], list[Path]]:
    """Return the images in a directory, and the files that are named like labels."""
    found = entries(folder)
    files = [path for path in found if path.is_file() or broken(path)]
    volumes = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    slices = [p for p in files if p not in volumes and p.is_file() and is_dicom(p)]
    if volumes and slices:
        raise DataError(
            f"{folder} contains both volumes ({volumes[0].name}) and DICOM files "
            f"({slices[0].name}): put them into separate directories, or give the volumes as files."
        )
    if slices:
        return [_series(folder, slices)], []
    is_label_folder = Path(os.path.abspath(folder)).name.lower() in _LABELS
    left = [path for path in volumes if is_label_folder or _is_label(path)]
    images = [path for path in volumes if path not in left]
    if left and not images:
        raise DataError(
            f"{folder} seems to contain only labels ({left[0].name}): give the files themselves if "
            "they are images."
        )
    if not images:
        inner = [p.name for p in found if p.is_dir() and p.name.lower() not in _LABELS]
        hint = f"give its subdirectories ({', '.join(inner[:3])})" if inner else "check the path"
        raise DataError(
            f"{folder} contains no volume ({', '.join(SUFFIXES)}) and no DICOM files: {hint}."
        )
    if channels > 1:  # joined by `_by_case`
        return [Given(path, stem(path)) for path in images], left
    return _without_channels(folder, images), left


def _is_label(file: Path) -> bool:
    words = re.split(r"[^a-z]+", stem(file).lower())
    return len(words) > 1 and words[-1] in _LABELS


def _without_channels(folder: Path, images: Sequence[Path]) -> list[Given]:
    """Name the images of a directory; in nnU-Net's layout, without the channel number.

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
            f"{folder} contains {len(every)} channels per case (_{', _'.join(sorted(every))}), but "
            f"the model takes one: give the files of one channel, such as {folder}/*_0000.nii.gz."
        )
    if every == {"0000"} or (named and len(every) == 1):
        return [Given(p, m[1]) for p, m in zip(images, numbered, strict=True) if m is not None]
    return plain


def _series(folder: Path, slices: Sequence[Path]) -> Given:
    """Return a directory of DICOM files as one volume.

    Raises:
        DataError: there are several series.
    """
    found = series_of(slices)
    # Some anonymised releases give every file a different identifier, which is ignored.
    if 1 < len(found) < len(slices):
        series = "; ".join(
            f"{title or 'without description'}, {len(files)} files from {files[0].name}"
            for title, files in found
        )
        raise DataError(
            f"{folder} contains {len(found)} DICOM series ({series}): put each series into its own "
            "directory, and give these."
        )
    return Given(folder, Path(os.path.abspath(folder)).name, tuple(slices))


def _unique_names(given: Sequence[tuple[Path, str]]) -> list[str]:
    """Make names unique, also on disks that ignore case and Unicode normalisation.

    Equal names in one directory get the suffix of their format appended, and a number if that is
    not enough. Other equal names are prefixed with as many parent directories as necessary, and
    get a number if they are still equal.
    """
    folders = [Path(os.path.abspath(path)).parent.parts[1:] for path, _ in given]
    names = [name for _, name in given]
    for group in _duplicates(
        [f"{'/'.join(own)}/{n}" for own, n in zip(folders, names, strict=True)]
    ):
        for index in group:
            path, name = given[index]
            names[index] = f"{name}_{path.name[len(stem(path)) :].replace('.', '')}".rstrip("_")
        for again in _duplicates([names[index] for index in group]):
            for number, place in enumerate(again[1:], start=2):
                names[group[place]] += f"_{number}"
    plain, depth = list(names), [0] * len(names)
    while groups := _duplicates(names):
        growing = [i for group in groups for i in group if depth[i] < len(folders[i])]
        for index in growing:
            depth[index] += 1
            names[index] = "_".join([*folders[index][-depth[index] :], plain[index]])
        if not growing:
            for group in groups:
                for number, index in enumerate(group[1:], start=2):
                    names[index] += f"_{number}"
    return names


def _duplicates(names: Sequence[str]) -> list[list[int]]:
    """Group the indices of names that are equal on some disk."""
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(unicodedata.normalize("NFC", name.casefold()), []).append(index)
    return [own for own in by_name.values() if len(own) > 1]
