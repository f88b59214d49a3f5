"""Guesses from files on disk: domains, patterns, planes, windows and label values.

`draft.py` asks the user to confirm each guess.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from glua_bench.data.formats import SUFFIXES, VolumeFile, ending, open_volume
from glua_bench.data.volumes import label_integers
from glua_bench.datasets.folder.planes import Anatomy, Header, anatomy, header
from glua_bench.errors import DataError
from glua_bench.inspection.measurements import counted
from glua_bench.paths import LABEL_WORDS, files_below

MODALITY_WORDS = {"ct", "cta", "cbct", "mr", "mri", "mra", "t1", "t2", "t1w", "t2w", "flair"}
MODALITY_WORDS |= {"t1c", "t1ce", "t1gd", "t1n", "t2f", "dwi", "adc", "lge", "bssfp", "c0"}
MODALITY_WORDS |= {"pet", "us"}
_SAMPLED = 4  # images per domain whose voxels are read
_LABELLED = 12  # labelled cases per domain in whose structures intensities are read
_VOXELS = 20_000  # about as many voxels per structure and case
_HOUNSFIELD = (-500, 200)  # CT has values below the first (air, lung) and above the second (bone)


@dataclass(frozen=True)
class Look:
    """Properties of the volumes of a domain.

    Attributes:
        headers: geometry of every image, by case.
        anatomies: where structures lie, by labelled case.
        hounsfield: whether intensities look like Hounsfield units.
        values: nonzero label values that occur in any label.
    """

    headers: Mapping[str, Header]
    anatomies: Mapping[str, Anatomy]
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

    Labels without a modality word belong to all domains, as where one label file serves all
    sequences of a case.

    Args:
        paths: relative paths, as from `volumes_in`.

    Returns:
        Domain name → its volumes, at least two domains; empty if none can be told apart.
    """
    by_word: dict[str, list[str]] = {}
    for path in paths:
        words = [word for word in words_of(path) if word in MODALITY_WORDS]
        by_word.setdefault(words[0] if words else "", []).append(path)
    shared = by_word.pop("", [])
    if len(by_word) > 1 and set(shared) <= set(labels_among(paths)):
        return {name: sorted([*own, *shared]) for name, own in by_word.items()}
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        top = PurePosixPath(path).parts[0] if "/" in path else ""
        by_folder.setdefault(re.sub(r"[^a-z0-9]+", "_", top.lower()).strip("_"), []).append(path)
    kinds = {name for name in by_folder if set(words_of(name)) & LABEL_WORDS}
    if "" in by_folder or kinds or len(by_folder) < 2 or _are_cases(by_folder.values()):
        return {}
    return by_folder


def _are_cases(folders: Iterable[Sequence[str]]) -> bool:
    """Return True for directories of cases, which have the same files in each."""
    forms = []
    for own in folders:
        top = PurePosixPath(own[0]).parts[0]
        forms.append(sorted(starred(path, top) for path in own))
    alike = max(forms.count(form) for form in forms)
    few = len(forms) > 2 and max(map(len, forms)) <= 3
    return (few or len(forms) > 4) and 2 * alike > len(forms)


def domains_by_name(paths: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the volumes whose paths contain each name as a word, and the labels without any name.

    Raises:
        DataError: a name occurs in no path.
    """
    words = {path: {*words_of(path), *PurePosixPath(path.lower()).parts} for path in paths}
    made = {name: [p for p in paths if name.lower() in words[p]] for name in names}
    for name, own in made.items():
        if not own:
            raise DataError(
                f"No volume has '{name}' as a word in its path, such as {name}/1.nii.gz or "
                f"img_{name}.nii.gz: correct --domains, or rename the directories."
            )
    taken = {path for own in made.values() for path in own}
    rest = [p for p in labels_among(paths) if p not in taken]
    shared = [p for p in rest if not words[p] & MODALITY_WORDS]
    return {name: sorted([*own, *shared]) for name, own in made.items()}


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
    labels = labels_among(paths)
    images = [path for path in paths if path not in labels]
    if not images:
        raise DataError(
            f"All volumes, such as {paths[0]}, look like labels by name: describe the images by "
            "hand (see docs/adding-data.md)."
        )
    for images_pattern, ids in image_patterns(images, labels):
        drawn: list[str | None] = [p for p, own in image_patterns(labels) if own <= ids]
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
    """Inspect the headers of all images of a domain, a few images, and all labels.

    Raises:
        DataError: a file cannot be read.
    """
    headers = {case: header(open_volume(path)) for case, path in images.items()}
    lows, highs = [], []
    for path in _some(images):
        volume = open_volume(path)
        sample = volume.scaled(volume.voxels()[::4, ::4, ::2])
        low, high = np.nanpercentile(sample, (1, 99.9))
        lows.append(low)
        highs.append(high)
    values: set[int] = set()
    anatomies = {}
    for case, path in labels.items():  # all, because a lesion may occur in a single case
        volume = open_volume(path)
        stored = volume.voxels()
        own = set(label_integers(distinct(volume, stored), path).tolist()) - {0}
        values |= own
        if volume.shape == headers[case].shape:
            voxels = volume.scaled(stored)
            whole = voxels if voxels.dtype.kind in "iu" else np.rint(voxels).astype(np.int32)
            anatomies[case] = anatomy(whole, sorted(own))
    return Look(
        headers,
        anatomies,
        bool(np.median(lows) < _HOUNSFIELD[0] and np.median(highs) > _HOUNSFIELD[1]),
        tuple(sorted(values)),
    )


def distinct(file: VolumeFile, stored: np.ndarray) -> np.ndarray:
    """Return the distinct values of a volume's stored array, scaled."""
    counts = counted(stored)
    return np.unique(file.scaled(stored if counts is None else counts[0]))


def inside(
    images: Mapping[str, Path], labels: Mapping[str, Path], structures: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Sample the intensities of structures in a few cases.

    Args:
        images: image files by case.
        labels: label files by case.
        structures: name → raw label values.

    Returns:
        Name → intensities of at most some thousand voxels per case.
    """
    samples: dict[str, list[np.ndarray]] = {name: [] for name in structures}
    for case in spread(sorted(labels), _LABELLED):
        image, label = open_volume(images[case]), open_volume(labels[case])
        if image.shape != label.shape:
            continue  # reported by `data check`
        classes, stored = np.rint(label.scaled(label.voxels())), image.voxels()
        for name, values in structures.items():
            chosen = stored[np.isin(classes, list(values))]
            chosen = image.scaled(chosen[:: max(1, len(chosen) // _VOXELS)])
            samples[name].append(chosen[np.isfinite(chosen)])
    return {name: np.concatenate(own or [np.empty(0)]) for name, own in samples.items()}


def spread(names: Sequence[str], most: int) -> list[str]:
    """Return at most `most` names, evenly spread."""
    count = min(most, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def _some(files: Mapping[str, Path]) -> list[Path]:
    """Return a few files, evenly spread."""
    return [files[case] for case in spread(sorted(files), _SAMPLED)]


def labels_among(paths: Sequence[str]) -> list[str]:
    """Return the paths with a word of labels that not all paths have."""
    # Letters alone, too: label001.nii.gz.
    words = {path: {*words_of(path), *re.findall("[a-z]+", path.lower())} for path in paths}
    common = set.intersection(*words.values())
    return [path for path in paths if (words[path] - common) & LABEL_WORDS]


def by_form(paths: Sequence[str]) -> list[list[str]]:
    """Group paths that differ only in their numbers."""
    made: dict[str, list[str]] = {}
    for path in paths:
        made.setdefault(re.sub(r"[0-9]+", "#", path), []).append(path)
    return list(made.values())


def words_of(path: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", path.lower()) if word]


def image_patterns(paths: Sequence[str], others: Sequence[str] = ()) -> list[tuple[str, set[str]]]:
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
        found += [(starred(paths[0], own), [own]) for own in _shared_words(paths[0], others)]
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
        {starred(path, own) for own in ids if own and own in path and starred(path, own) != path}
        for path in paths
    ]
    return sorted(set.intersection(*made), key=lambda pattern: (-len(pattern), pattern))


def starred(path: str, own: str) -> str:
    """Replace an id by a star wherever it stands as a word."""
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(own)}(?![A-Za-z0-9])", "*", path)


def _shared_words(path: str, others: Sequence[str]) -> list[str]:
    """Return texts between separators that a path shares with another, the longest first."""
    pieces = re.split(r"([^A-Za-z0-9]+)", path[: len(path) - len(ending(path))])
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
        and any(starred(other, text) != other for other in others)
        and not set(words_of(text)) & (LABEL_WORDS | MODALITY_WORDS)
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
        stems = [part[: len(part) - len(ending(part))] for part in parts]
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
