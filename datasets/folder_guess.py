"""What the files of a directory suggest: domains, patterns, planes, windows and label values.

Guesses only; `folder_draft.py` puts each of them to the user.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np

from glua_bench.errors import DataError
from glua_bench.formats import SUFFIXES, open_volume
from glua_bench.paths import files_below

LABEL_WORDS = {"label", "labels", "labelstr", "labelsts", "lab", "lbl", "seg", "segs"}
LABEL_WORDS |= {"segmentation", "segmentations", "annotation", "annotations", "mask", "masks"}
LABEL_WORDS |= {"msk", "gt", "ground", "truth", "manual"}
MODALITY_WORDS = {"ct", "cta", "cbct", "mr", "mri", "mra", "t1", "t2", "t1w", "t2w", "flair"}
MODALITY_WORDS |= {"dwi", "adc", "lge", "bssfp", "c0", "pet", "us"}
_LOOKED_AT = 4  # volumes of a domain whose voxels are read for a guess
_HOUNSFIELD = (-500, 200)  # a CT reaches below the first (air, lung) and above the second (bone)


@dataclass(frozen=True)
class Look:
    """What a few volumes of a domain are like.

    Args:
        spacing: largest median distance of voxels in mm, along right, front and up.
        extent: largest median side in mm, along the same axes.
        hounsfield: whether intensities look like Hounsfield units.
        values: label values that occur, without 0.
    """

    spacing: tuple[float, float, float]
    extent: tuple[float, float, float]
    hounsfield: bool
    values: tuple[int, ...]


def volumes_in(folder: Path) -> list[str]:
    """Paths of all volumes below a directory, relative to it, sorted; hidden ones are left out."""
    files = files_below(folder)
    return sorted(
        file.relative_to(folder).as_posix()
        for file in files
        if file.name.lower().endswith(SUFFIXES)
    )


def guess_domains(paths: Sequence[str]) -> dict[str, list[str]]:
    """Name of a domain → its volumes: by words for modalities in the paths, else by directories.

    Args:
        paths: relative ones, as of `volumes_in`.

    Returns:
        Two domains or more; empty where nothing tells them apart.
    """
    by_word: dict[str, list[str]] = {}
    for path in paths:
        words = [word for word in _words(path) if word in MODALITY_WORDS]
        by_word.setdefault(words[0] if words else "", []).append(path)
    if "" not in by_word and len(by_word) > 1:
        return by_word
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        top = PurePosixPath(path).parts[0] if "/" in path else ""
        by_folder.setdefault(re.sub(r"[^a-z0-9]+", "_", top.lower()).strip("_"), []).append(path)
    kinds = {name for name in by_folder if set(_words(name)) & LABEL_WORDS}
    return {} if "" in by_folder or kinds or len(by_folder) < 2 else by_folder


def domains_by_name(paths: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The volumes whose paths hold a domain's name as a word.

    Raises:
        DataError: a name occurs in no path.
    """
    made = {name: [p for p in paths if name in _words(p)] for name in names}
    for name, own in made.items():
        if not own:
            raise DataError(
                f"No volume has '{name}' as a word in its path, such as {name}/1.nii.gz or "
                f"img_{name}.nii.gz: correct --domains, or rename the files' directories."
            )
    return made


def guess_patterns(paths: Sequence[str]) -> tuple[str, str | None]:
    """The patterns of images and labels among the volumes of a domain.

    Args:
        paths: relative ones.

    Returns:
        Patterns for `folder_layouts.by_pattern`; None where no path speaks of labels.

    Raises:
        DataError: the paths have no common form.
    """
    common = set.intersection(*(set(_words(path)) for path in paths))
    labels = [path for path in paths if (set(_words(path)) - common) & LABEL_WORDS]
    images = [path for path in paths if path not in labels]
    if not images:
        raise DataError(
            f"All volumes like {paths[0]} look like labels by their names: describe the images by "
            "hand, as docs/adding-data.md shows."
        )
    for words in (True, False):
        pattern, ids = _pattern(images, words)
        if not labels:
            return pattern, None
        other, drawn = _pattern(labels, words)
        if set(drawn) <= set(ids):
            return pattern, other
    return pattern, other


def look(images: Mapping[str, Path], labels: Mapping[str, Path]) -> Look:
    """Open a few volumes of a domain.

    Raises:
        DataError: a file cannot be read.
    """
    spacings, extents, lows, highs = [], [], [], []
    for path in _some(images):
        volume = open_volume(path)
        orientation = nib.io_orientation(volume.affine)
        lengths = nib.affines.voxel_sizes(volume.affine)
        spacing, extent = np.zeros(3), np.zeros(3)
        for axis, (towards, _) in enumerate(orientation):
            if not np.isnan(towards):
                spacing[int(towards)] = lengths[axis]
                extent[int(towards)] = lengths[axis] * volume.shape[axis]
        spacings.append(spacing)
        extents.append(extent)
        sample = volume.scaled(volume.voxels()[::4, ::4, ::2])
        low, high = np.nanpercentile(sample, (1, 99.9))
        lows.append(low)
        highs.append(high)
    values: set[int] = set()
    for path in _some(labels):
        volume = open_volume(path)
        values |= {int(value) for value in np.unique(volume.scaled(volume.voxels()))}
    return Look(
        _triple(np.median(spacings, axis=0)),
        _triple(np.median(extents, axis=0)),
        bool(np.median(lows) < _HOUNSFIELD[0] and np.median(highs) > _HOUNSFIELD[1]),
        tuple(sorted(values - {0})),
    )


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _some(files: Mapping[str, Path]) -> list[Path]:
    """A few files, spread over all."""
    everything = [files[case] for case in sorted(files)]
    count = min(_LOOKED_AT, len(everything))
    return [everything[index * len(everything) // count] for index in range(count)]


def _words(path: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", path.lower()) if word]


def _pattern(paths: Sequence[str], whole_words: bool) -> tuple[str, list[str]]:
    """A glob that all paths match, and what its first star stands for in each.

    Args:
        paths: of one kind of file.
        whole_words: the id reaches back to a separator, instead of to the last letter before it.
    """
    split = [PurePosixPath(path).parts for path in paths]
    if len({len(parts) for parts in split}) > 1:
        raise DataError(
            f"{paths[0]} and {paths[-1]} lie at different depths: sort the files of a domain into "
            "folders alike, or describe them by a table, as docs/adding-data.md shows."
        )
    made: list[str] = []
    ids: list[str] = []
    for parts in zip(*split, strict=True):
        if len(set(parts)) == 1 and (len(paths) > 1 or len(made) < len(split[0]) - 1):
            made.append(parts[0])
            continue
        ending = next((s for s in SUFFIXES if all(p.lower().endswith(s) for p in parts)), "")
        stems = [part[: len(part) - len(ending)] for part in parts]
        start = os.path.commonprefix(stems)
        rest = [stem[len(start) :] for stem in stems]
        stop = os.path.commonprefix([stem[::-1] for stem in rest])[::-1]
        if len(set(parts)) == 1:
            start, stop = "", ""
        border = r"[^A-Za-z0-9]" if whole_words else r"[^0-9]"
        start = start[: max((m.end() for m in re.finditer(border, start)), default=0)]
        first = re.search(border, stop)
        stop = stop[first.start() :] if first else ""
        made.append(f"{start}*{stop}{parts[0][len(stems[0]) :]}")
        if not ids:
            ids = [stem[len(start) : len(stem) - len(stop)] for stem in stems]
    return "/".join(made), ids
