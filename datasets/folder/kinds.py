"""Guesses where a case has several label files: raters, versions, or one file per structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np

from glua_bench.data.formats import ending, open_volume
from glua_bench.datasets.folder.guess import (
    by_form,
    distinct,
    image_patterns,
    labels_among,
    starred,
)
from glua_bench.errors import DataError

_FEW = 64  # distinct values of a label file
_OPENED = 2  # files of a kind whose voxels are read
_KINDS = 12  # kinds of label files whose voxels are read
# Maximum fraction of the smaller of two masks inside the other, for masks of different structures.
_OVERLAP = 0.2

Finds = Callable[[str, str | None, Collection[str], Collection[str]], bool]


@dataclass(frozen=True)
class Kinds:
    """The images of a domain, and its kinds of label files.

    Attributes:
        images: pattern of the images.
        labels: pattern of each kind of label file → id → path.
        single: True if the kinds are masks of one structure each.
    """

    images: str
    labels: Mapping[str, Mapping[str, str]]
    single: bool

    @property
    def consistent(self) -> str:
        """The pattern that covers more cases than any other; "" if there is none."""
        counts = sorted((len(own) for own in self.labels.values()), reverse=True)
        if len(counts) > 1 and (self.single or counts[0] == counts[1]):
            return ""
        return next(name for name, own in self.labels.items() if len(own) == counts[0])

    def listed(self) -> str:
        """Enumerate the kinds, each with its number of cases."""
        shown = [f"{name} ({len(own)} cases)" for name, own in self.labels.items()]
        rest = len(shown) - 4
        return ", ".join(shown[:4]) + (f" and {rest} more" if rest > 0 else "")


def several_labels(data: Path, paths: Sequence[str], finds: Finds) -> Kinds | None:
    """Find the images of a domain and its kinds of label files.

    Args:
        data: directory of the files.
        paths: relative paths of all files of the domain.
        finds: returns True if two patterns, with others left out, find exactly the given paths.

    Returns:
        None unless there is a kind of label files.
    """
    for images, pattern, kinds in chain(_by_words(paths), _by_voxels(data, paths)):
        if all(
            finds(pattern, name, [*images, *own.values()], kinds.keys() - {name})
            for name, own in kinds.items()
        ):
            order = sorted(kinds.items(), key=lambda item: (-len(item[1]), len(item[0]), item[0]))
            return Kinds(pattern, dict(order), _one_structure_each(data, list(kinds.values())))
    return None


_Split = tuple[list[str], str, dict[str, dict[str, str]]]


def _by_words(paths: Sequence[str]) -> Iterator[_Split]:
    """Yield images, their pattern and the kinds of labels, where labels are told by their names."""
    labels = labels_among(paths)
    images = [path for path in paths if path not in labels]
    if labels and images:
        for pattern, ids in image_patterns(images, labels):
            kinds = _forms(labels, ids)
            if kinds:
                yield images, pattern, kinds


def _forms(labels: Sequence[str], ids: Collection[str]) -> dict[str, dict[str, str]]:
    """Group labels by their paths without the id; {} if a path has no id."""
    made: dict[str, dict[str, str]] = {}
    longest = sorted(ids, key=len, reverse=True)
    for path in labels:
        own = next((i for i in longest if i and i in path and starred(path, i) != path), None)
        if own is None:
            return {}
        if made.setdefault(starred(path, own), {}).setdefault(own, path) != path:
            return {}
    return made


def _by_voxels(data: Path, paths: Sequence[str]) -> Iterator[_Split]:
    """Yield as `_by_words`, where only the voxels tell labels from images."""
    for split in (_by_name, _by_folder, _by_ending):
        groups: dict[str, dict[str, str]] = {}
        for path in paths:
            kind, own = split(path)
            groups.setdefault(kind, {})[own] = path
        ids = max(groups.values(), key=len)
        whole = sum(map(len, groups.values())) == len(paths)
        if len(groups) < 2 or len(ids) < 2 or not whole:
            continue
        if any(not own.keys() <= ids.keys() for own in groups.values()):
            continue
        kinds = {kind: _is_mask(data, own) for kind, own in list(groups.items())[: _KINDS + 1]}
        masks = [kind for kind in groups if kinds.get(kind, True)]
        images = [kind for kind in groups if kinds.get(kind) is False]
        if None in kinds.values() or len(images) != 1:
            continue
        chosen = list(groups[images[0]].values())
        labels = [path for kind in masks for path in groups[kind].values()]
        for pattern, found in image_patterns(chosen, labels):
            forms = _forms(labels, found)
            if forms:
                yield chosen, pattern, forms


def _by_name(path: str) -> tuple[str, str]:
    """p1/lv.nii.gz: the folder is the case."""
    pure = PurePosixPath(path)
    return pure.name, str(pure.parent)


def _by_folder(path: str) -> tuple[str, str]:
    """lv/p1.nii.gz: the folder is the kind."""
    pure = PurePosixPath(path)
    return str(pure.parent), pure.name.split(".")[0]


def _by_ending(path: str) -> tuple[str, str]:
    """p1_lv.nii.gz: the last word is the kind."""
    stem = path[: len(path) - len(ending(path))]
    head, _, tail = stem.rpartition("_")
    return (tail, head) if head and not tail.isdigit() else ("", stem)


def _is_mask(data: Path, files: Mapping[str, str]) -> bool | None:
    """Return True for label files, False for images, and None for a mixture."""
    found = set()
    for path in list(files.values())[:_OPENED]:
        label = _label(data / path)
        found.add(label is not None and len(label[1]) <= _FEW)
    return found.pop() if len(found) == 1 else None


def _label(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return voxels and distinct values of a volume of integers with background; else None."""
    try:
        volume = open_volume(path)
        stored = volume.voxels()
    except DataError:
        return None
    values = distinct(volume, stored)
    whole = np.abs(values - np.round(values)).max() < 0.001
    return (volume.scaled(stored), np.round(values)) if whole and 0 in np.round(values) else None


def _one_structure_each(data: Path, kinds: Sequence[Mapping[str, str]]) -> bool:
    """Return True if the label files of one case are binary masks that hardly overlap."""
    common = set.intersection(*(set(own) for own in kinds[:_KINDS]))
    if not common or len(kinds) < 2:
        return False
    case, masks = min(common), []
    for own in kinds[:_KINDS]:
        label = _label(data / own[case])
        if label is None or len(label[1]) > 2:
            return False
        masks.append(label[0] > 0.5)
    filled = [mask for mask in masks if mask.any()]
    if len(filled) < 2 or len({mask.shape for mask in filled}) > 1:
        return False
    pairs = [(a, b) for i, a in enumerate(filled) for b in filled[i + 1 :]]
    return all((a & b).sum() <= _OVERLAP * min(a.sum(), b.sum()) for a, b in pairs)


def stray_files(paths: Sequence[str]) -> list[str]:
    """Return the files whose names have a form of their own, unlike those of all others."""
    alone = [own[0] for own in by_form(paths) if len(own) == 1]
    return alone if 2 * len(alone) < len(paths) and len(alone) <= 5 else []


def only_structures(domain: str, kinds: Kinds) -> str:
    """Explain in one sentence that a description takes one label file per case."""
    names = [
        re.sub(r"\*", "", PurePosixPath(name).name.split(".")[0]).strip("_- ")
        for name in kinds.labels
    ]
    example = " + ".join(f"{value} * {name or 'mask'}" for value, name in enumerate(names[:2], 1))
    return (
        f"{domain}: each case has one label file per structure ({kinds.listed()}), but a "
        "description takes one label file per case: merge the masks of a case into one file with "
        f"one value per structure ({example}), or enter the pattern of a single structure."
    )


def no_choice(domain: str, kinds: Kinds) -> str:
    """Explain in one sentence that the label files are ambiguous."""
    return (
        f"{domain}: each case has several label files ({kinds.listed()}): enter the pattern of "
        "those to use (without --yes), or move the others out of the directory."
    )
