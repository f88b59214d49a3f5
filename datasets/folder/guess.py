"""Guesses from files on disk: domains, patterns, planes, windows and label values.

`draft.py` asks the user to confirm each guess.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np

from glua_bench.data.formats import SUFFIXES, open_volume
from glua_bench.data.volumes import label_integers
from glua_bench.errors import DataError
from glua_bench.paths import files_below

LABEL_WORDS = {"label", "labels", "labelstr", "labelsts", "lab", "lbl", "seg", "segs"}
LABEL_WORDS |= {"segmentation", "segmentations", "annotation", "annotations", "mask", "masks"}
LABEL_WORDS |= {"msk", "gt", "ground", "truth", "manual"}
MODALITY_WORDS = {"ct", "cta", "cbct", "mr", "mri", "mra", "t1", "t2", "t1w", "t2w", "flair"}
MODALITY_WORDS |= {"dwi", "adc", "lge", "bssfp", "c0", "pet", "us"}
_SAMPLED = 4  # images per domain whose voxels are read
_HOUNSFIELD = (-500, 200)  # CT has values below the first (air, lung) and above the second (bone)


@dataclass(frozen=True)
class Look:
    """Properties of a few volumes of a domain.

    Attributes:
        spacing: largest median voxel spacing in mm, along right, front and up.
        extent: largest median side in mm, along the same axes.
        hounsfield: whether intensities look like Hounsfield units.
        values: nonzero label values that occur in any label.
    """

    spacing: tuple[float, float, float]
    extent: tuple[float, float, float]
    hounsfield: bool
    values: tuple[int, ...]


def volumes_in(folder: Path) -> list[str]:
    """Return the relative paths of all volumes below a directory, sorted, without hidden ones."""
    files = files_below(folder)
    return sorted(
        file.relative_to(folder).as_posix()
        for file in files
        if file.name.lower().endswith(SUFFIXES)
    )


def guess_domains(paths: Sequence[str]) -> dict[str, list[str]]:
    """Group volumes into domains by modality words in their paths, else by directory.

    Args:
        paths: relative paths, as from `volumes_in`.

    Returns:
        Domain name → its volumes, at least two domains; empty if none can be told apart.
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
    """Return the volumes whose paths contain each name as a word.

    Raises:
        DataError: a name occurs in no path.
    """
    made = {name: [p for p in paths if name in _words(p)] for name in names}
    for name, own in made.items():
        if not own:
            raise DataError(
                f"No volume has '{name}' as a word in its path, such as {name}/1.nii.gz or "
                f"img_{name}.nii.gz: correct --domains, or rename the directories."
            )
    return made


def guess_patterns(
    paths: Sequence[str], fits: Callable[[str, str | None], bool] = lambda images, labels: True
) -> tuple[str, str | None]:
    """Guess the patterns of images and labels among the volumes of a domain.

    Args:
        paths: relative paths.
        fits: returns True if the patterns find these volumes and nothing else; the first patterns
            that fit are returned.

    Returns:
        Patterns for `folder_layouts.by_pattern`; the second is None if no path looks like a label.

    Raises:
        DataError: the paths have no common form.
    """
    common = set.intersection(*(set(_words(path)) for path in paths))
    labels = [path for path in paths if (set(_words(path)) - common) & LABEL_WORDS]
    images = [path for path in paths if path not in labels]
    if not images:
        raise DataError(
            f"All volumes, such as {paths[0]}, look like labels by name: describe the images by "
            "hand (see docs/adding-data.md)."
        )
    for images_pattern, ids in _patterns(images, labels):
        drawn: list[str | None] = [p for p, own in _patterns(labels) if own <= ids]
        drawn += _around(labels, ids)
        for labels_pattern in drawn if labels else [None]:
            if images_pattern != labels_pattern and fits(images_pattern, labels_pattern):
                return images_pattern, labels_pattern
    raise DataError(
        f"No pattern matches exactly {paths[0]}, {paths[-1]} and the rest of their domain: sort "
        "the files of a domain into folders of one layout, with one id for image and label, or "
        "list them in a table (see docs/adding-data.md)."
    )


def look(images: Mapping[str, Path], labels: Mapping[str, Path]) -> Look:
    """Inspect a few images of a domain and all labels.

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
    for path in labels.values():  # all, because a lesion may occur in a single case
        volume = open_volume(path)
        found = np.unique(volume.scaled(volume.voxels()))
        values |= set(label_integers(found, path).tolist())
    return Look(
        triple(np.median(spacings, axis=0)),
        triple(np.median(extents, axis=0)),
        bool(np.median(lows) < _HOUNSFIELD[0] and np.median(highs) > _HOUNSFIELD[1]),
        tuple(sorted(values - {0})),
    )


def triple(values: np.ndarray) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _some(files: Mapping[str, Path]) -> list[Path]:
    """Return a few files, evenly spread."""
    everything = [files[case] for case in sorted(files)]
    count = min(_SAMPLED, len(everything))
    return [everything[index * len(everything) // count] for index in range(count)]


def _words(path: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", path.lower()) if word]


def _patterns(paths: Sequence[str], others: Sequence[str] = ()) -> list[tuple[str, set[str]]]:
    """Return patterns that match all paths, likely ones first, with the ids they yield.

    Args:
        paths: paths of one kind of file.
        others: paths of the other kind, used to find the id of a single file.
    """
    if not paths:
        return []
    split = [PurePosixPath(path).parts for path in paths]
    found: list[tuple[str, list[str]]] = []
    if len(paths) == 1:
        found += [(_starred(paths[0], own), [own]) for own in _shared_words(paths[0], others)]
    if len({len(parts) for parts in split}) == 1:
        found += [_pattern(split, whole_words) for whole_words in (True, False)]
        found += [_by_tokens(split)]
    below = os.path.commonprefix([parts[:-1] for parts in split])
    if any(parts[:-1] != below for parts in split):  # at several depths, or in several folders
        names = [(parts[-1],) for parts in split]
        for pattern, ids in (_pattern(names, True), _pattern(names, False), _by_tokens(names)):
            found.append(("/".join((*below, "**", pattern)), ids))
    return [(pattern, set(ids)) for pattern, ids in found if ids and len(set(ids)) == len(paths)]


def _around(paths: Sequence[str], ids: set[str]) -> list[str]:
    """Return patterns that replace an id in each path, the longest first."""
    if not paths:
        return []
    made = [
        {_starred(path, own) for own in ids if own and own in path and _starred(path, own) != path}
        for path in paths
    ]
    return sorted(set.intersection(*made), key=lambda pattern: (-len(pattern), pattern))


def _starred(path: str, own: str) -> str:
    """Replace an id by a star wherever it stands as a word."""
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(own)}(?![A-Za-z0-9])", "*", path)


def _shared_words(path: str, others: Sequence[str]) -> list[str]:
    """Return texts between separators that a path shares with another, the longest first."""
    ending = next((s for s in SUFFIXES if path.lower().endswith(s)), "")
    pieces = re.split(r"([^A-Za-z0-9]+)", path[: len(path) - len(ending)])
    texts = {
        "".join(pieces[i:j])
        for i in range(0, len(pieces), 2)
        for j in range(i + 1, len(pieces) + 1, 2)
    }
    kept = [
        text
        for text in texts
        if text
        and "/" not in text
        and any(_starred(other, text) != other for other in others)
        and not set(_words(text)) & (LABEL_WORDS | MODALITY_WORDS)
    ]
    return sorted(kept, key=lambda text: (-len(text), text))


def _by_tokens(split: Sequence[tuple[str, ...]]) -> tuple[str, list[str]]:
    """Return a glob with the tokens common to all paths, and ids; no ids if token counts differ.

    Args:
        split: parts of paths of equal depth.
    """
    form = re.compile(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9]")
    tokens = [form.findall("/".join(parts)) for parts in split]
    if len({len(own) for own in tokens}) > 1:
        return "", []
    columns = list(zip(*tokens, strict=True))
    ids: list[str] = []
    pattern = ""
    for column in columns:
        if len(set(column)) == 1:
            pattern += column[0]
            continue
        if not pattern.endswith("*"):
            pattern += "*"
            first = "*" not in pattern[:-1]
        if first:
            ids = [
                own + token for own, token in zip(ids or [""] * len(column), column, strict=True)
            ]
    return pattern, ids


def _pattern(split: Sequence[tuple[str, ...]], whole_words: bool) -> tuple[str, list[str]]:
    """Return a glob that matches all paths, and the texts that its first star matches.

    Args:
        split: parts of paths of equal depth.
        whole_words: extend the id back to a separator instead of to the last letter before it.
    """
    made: list[str] = []
    ids: list[str] = []
    for parts in zip(*split, strict=True):
        if len(set(parts)) == 1 and (len(split) > 1 or len(made) < len(split[0]) - 1):
            made.append(parts[0])
            continue
        endings = [next((s for s in SUFFIXES if p.lower().endswith(s)), "") for p in parts]
        stems = [part[: len(part) - len(end)] for part, end in zip(parts, endings, strict=True)]
        tails = {part[len(stem) :] for part, stem in zip(parts, stems, strict=True)}
        tail = os.path.commonprefix(sorted(tails)) + "*" * (len(tails) > 1)
        start = os.path.commonprefix(stems)
        rest = [stem[len(start) :] for stem in stems]
        stop = os.path.commonprefix([stem[::-1] for stem in rest])[::-1]
        if len(set(parts)) == 1:
            start, stop = "", ""
        border = r"[^A-Za-z0-9]" if whole_words else r"[^0-9]"
        start = start[: max((m.end() for m in re.finditer(border, start)), default=0)]
        first = re.search(border, stop)
        stop = stop[first.start() :] if first else ""
        made.append(f"{start}*{stop}{tail}")
        if not ids:
            ids = [stem[len(start) : len(stem) - len(stop)] for stem in stems]
    return "/".join(made), ids
