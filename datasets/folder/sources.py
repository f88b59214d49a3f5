"""Where the files of a drafted description are: nnU-Net folders or patterns, guessed and asked."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib

from glua_bench.console import say
from glua_bench.data.dicom_series import is_dicom
from glua_bench.data.formats import NIFTI, SUFFIXES
from glua_bench.data.nnunet import nnunet_channels, nnunet_unannotated, nnunet_values
from glua_bench.datasets.folder.guess import (
    by_form,
    domains_by_name,
    guess_domains,
    guess_patterns,
    image_patterns,
    volumes_in,
)
from glua_bench.datasets.folder.kinds import (
    no_choice,
    only_structures,
    several_labels,
    stray_files,
)
from glua_bench.datasets.folder.label_sets import Values
from glua_bench.datasets.folder.layouts import (
    SPLITS_FILE,
    Found,
    by_nnunet,
    by_pattern,
    pattern_fault,
)
from glua_bench.errors import ConfigError, DataError
from glua_bench.inspection.findings import enumerate_names
from glua_bench.paths import entries, files_below, matching
from glua_bench.task import Ask

_DICOM = 20  # files in which DICOM is looked for
_FORMS = 20  # forms of names of which a file is opened


@dataclass(frozen=True)
class DraftDomain:
    """The files of one domain.

    Attributes:
        name: domain name.
        place: lines of the description that locate the files.
        images: image files by id.
        labels: label files by id.
        named: structure → raw values, if the files state them.
        unannotated: raw values of unannotated voxels, if the files state them.
        test: ids that the files assign to the test split.
        val: ids that the files assign to the validation split.
    """

    name: str
    place: dict[str, str]
    images: dict[str, Path]
    labels: dict[str, Path]
    named: Values
    unannotated: tuple[int, ...] = ()
    test: frozenset[str] = frozenset()
    val: frozenset[str] = frozenset()


def domains_of(data: Path, names: Sequence[str], ask: Ask) -> list[DraftDomain]:
    """Find the domains in a directory.

    Args:
        data: the directory.
        names: words in the files' paths; empty to guess the domains from the files.
        ask: asks the user a question.

    Raises:
        DataError: the directory holds no volumes, or fewer than two domains.
        ConfigError: an answer is invalid.
    """
    return _nnunet(data, names) or _patterns(data, names, ask)


def _nnunet(data: Path, names: Sequence[str]) -> list[DraftDomain]:
    """Return one domain per nnU-Net or Decathlon folder in the directory."""
    folders = [path for path in entries(data) if (path / "dataset.json").is_file()]
    if len(folders) < 2:
        return []
    short = [_plain(re.sub(r"^(dataset|task)\d+_", "", f.name.lower())) for f in folders]
    made = []
    for folder, name in zip(folders, short, strict=True):
        if not name or short.count(name) > 1:  # Dataset001_Heart beside Dataset002_Heart
            name = _plain(folder.name.lower())
        if names and name not in names:
            continue
        place: dict[str, str] = {"nnunet": json.dumps(folder.name, ensure_ascii=False)}
        if several := nnunet_channels(folder)[1:]:
            place["channel"] = f"0   # {1 + len(several)} channels; to use all, {_all(folder)}"
        fold = 0 if (folder / SPLITS_FILE).is_file() else None
        cases = by_nnunet(folder, fold=fold)
        made.append(
            DraftDomain(
                name,
                place,
                *_files(cases),
                _usable_names(nnunet_values(folder)),
                nnunet_unannotated(folder),
                *(frozenset(c.id for c in cases if c.split == split) for split in ("test", "val")),
            )
        )
    if len(made) < 2:
        raise DataError(
            f"{data} holds the folders {', '.join(f.name for f in folders)}: select two of them "
            "with --domains, without the prefix Dataset### or Task##."
        )
    return made


def _all(folder: Path) -> str:
    """Return the entry that selects all channels of a nnU-Net folder."""
    listed = (
        f"{json.dumps(name, ensure_ascii=False)}: {{channel: {number}}}"
        for number, name in enumerate(nnunet_channels(folder))
    )
    return f"channels: {{{', '.join(listed)}}}"


def _usable_names(regions: Values) -> Values:
    """Return label names normalised for answers; {} if they do not define disjoint classes."""
    made = {re.sub(r"[\s,=]+", " ", name.lower()).strip(): own for name, own in regions.items()}
    values = [value for own in regions.values() for value in own]
    named = all(any(map(str.isalpha, name)) and name.isprintable() for name in made)
    # A voxel has one class, and regions may overlap.
    return made if named and len(made) == len(regions) and len(set(values)) == len(values) else {}


def _patterns(data: Path, names: Sequence[str], ask: Ask) -> list[DraftDomain]:
    """Find domains by words in paths, each with a pattern for images and one for labels."""
    paths = volumes_in(data)
    if not paths:
        if any(is_dicom(path) for path in files_below(data)[:_DICOM]):
            raise DataError(
                f"{data} holds DICOM files, but a description names volumes: convert each series "
                f"to NIfTI, for example with `dcm2niix -z y -o OUT {shlex.quote(str(data))}`."
            )
        raise DataError(
            f"{data} holds no volumes: give a directory with files of type {', '.join(SUFFIXES)}."
        )
    groups = domains_by_name(paths, names) if names else guess_domains(paths)
    if len(groups) < 2:
        raise DataError(
            f"No two domains are recognisable among the {len(paths)} volumes in {data}: name them "
            "with --domains, by words in the files' paths, such as ct,mr."
        )
    made = []
    for name, own in groups.items():
        proposed = _proposal(name, data, own)
        for note in proposed.notes:
            say(note)
        question = f"{name}: images, with * for the case's id"
        read_images = partial(_images, data=data, proposed=proposed)
        images = ask(question, proposed.images, read_images)
        place = {"images": json.dumps(images, ensure_ascii=False)}
        question = f"{name}: labels, with * for the case's id, or none{proposed.choices}"
        read_labels = partial(_labels, data=data, images=images, proposed=proposed)
        guess = "" if proposed.no_labels else proposed.labels or "none"
        labels, cases = ask(question, guess, read_labels)
        if labels is not None:
            place["labels"] = json.dumps(labels, ensure_ascii=False)
        others = proposed.others(labels)
        if others and _paired(data, images, labels) != cases:
            place["exclude"] = json.dumps(others, ensure_ascii=False)
        _report_unlabelled(name, cases)
        made.append(DraftDomain(name, place, *_files(cases), {}))
    return made


@dataclass(frozen=True)
class _Proposal:
    """Proposed patterns of a domain.

    Attributes:
        images: pattern of the images; "" if there is no proposal.
        labels: pattern of the labels; None if there are none.
        no_images: why there is no proposal for the images.
        no_labels: why there is no proposal for the labels.
        choices: the kinds of labels to choose from, in brackets, or "".
        notes: sentences on what the patterns leave out.
        left_out: patterns of files that are neither images nor the proposed labels.
    """

    images: str = ""
    labels: str | None = None
    no_images: str = ""
    no_labels: str = ""
    choices: str = ""
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def others(self, labels: str | None) -> list[str]:
        """Return the patterns to leave out with these labels."""
        return [pattern for pattern in self.left_out if pattern != labels]


def _proposal(name: str, data: Path, paths: Sequence[str]) -> _Proposal:
    """Propose patterns for the files of a domain, without time series."""
    pattern, series = _time_series(data, paths)
    if not series:
        return _proposal_of(name, data, paths, ())
    left = [path for path in paths if path not in series]
    found = _proposal_of(name, data, left, (pattern,))
    note = f"{name}: not used, because not 3-D: {pattern} ({len(series)} files)."
    return replace(found, notes=(*found.notes, note), left_out=(*found.left_out, pattern))


def _time_series(data: Path, paths: Sequence[str]) -> tuple[str, set[str]]:
    """Return the 4-D files of a domain and a pattern of these alone; one file a form is opened."""
    forms = by_form(paths)
    found: set[str] = set()
    for own in forms if len(forms) <= _FORMS else ():
        if own[0].lower().endswith(NIFTI):
            with suppress(Exception):  # damaged files are reported later
                image: Any = nib.load(data / own[0])
                shape = image.shape
                found |= set(own) if len(shape) > 3 and max(shape[3:]) > 1 else set()
    if not found or len(found) == len(paths):
        return "", set()
    wanted = {data / path for path in found}
    for pattern, _ in image_patterns(sorted(found)):
        if {file for _, file in matching(data, pattern)} == wanted:
            return pattern, found
    return "", set()


def _proposal_of(name: str, data: Path, paths: Sequence[str], series: tuple[str, ...]) -> _Proposal:
    """Propose patterns for the files of a domain.

    Args:
        name: name of the domain.
        data: directory of the files.
        paths: relative paths of the domain's 3-D files.
        series: patterns of its other files.
    """

    def finds(
        images: str, labels: str | None, wanted: Collection[str], without: Collection[str] = ()
    ) -> bool:
        return _finds(
            images, labels, data, {data / path for path in wanted}, sorted({*without, *series})
        )

    def exact(wanted: Sequence[str]) -> _Proposal:
        return _Proposal(
            *guess_patterns(wanted, lambda images, labels: finds(images, labels, wanted, strays))
        )

    strays: list[str] = []
    proposed, failure = _Proposal(), ""
    try:
        proposed = exact(paths)
    except DataError as error:
        failure = str(error)
    if proposed.labels is not None:
        return proposed
    kinds = several_labels(data, paths, finds)
    if kinds is not None:
        chosen = kinds.consistent
        if chosen:
            counts = {other: len(own) for other, own in kinds.labels.items() if other != chosen}
            others = enumerate_names([f"{other} ({n} cases)" for other, n in counts.items()])
            note = f"{name}: {chosen} labels most cases; not used: {others}."
            notes = (note,) if counts else ()
            return _Proposal(kinds.images, chosen, notes=notes, left_out=tuple(kinds.labels))
        why = only_structures(name, kinds) if kinds.single else no_choice(name, kinds)
        return _Proposal(
            kinds.images,
            no_labels=why,
            choices=f" ({kinds.listed()})",
            left_out=tuple(kinds.labels),
        )
    if proposed.images:
        return proposed
    strays = stray_files(paths)
    try:
        left = [path for path in paths if path not in strays]
        proposed = exact(left) if strays else proposed
    except DataError:
        strays = []
    if strays and proposed.images:
        note = f"{name}: not used, because named unlike all others: {enumerate_names(strays)}."
        return replace(proposed, notes=(note,), left_out=tuple(strays))
    return _Proposal(no_images=failure)  # the user may know a pattern


def _report_unlabelled(name: str, cases: Sequence[Found]) -> None:
    """Name the images without a label, if they are few among labelled ones."""
    bare = [str(case.image) for case in cases if case.label is None]
    if bare and 3 * len(bare) <= len(cases):
        say(
            f"{name}: no label for {enumerate_names(bare)}: images without labels are used as "
            "target training images only; move files that are no images of the domain."
        )


def _finds(
    images: str, labels: str | None, data: Path, seen: set[Path], without: Sequence[str] = ()
) -> bool:
    """Return True if the patterns find exactly the files `seen`, with others left out."""
    cases = _paired(data, images, labels, without)
    found = [file for case in cases for file in (case.image, case.label) if file is not None]
    return len(found) == len(seen) and set(found) == seen


def _paired(
    data: Path, images: str, labels: str | None, without: Sequence[str] = ()
) -> list[Found]:
    """Return the cases that the patterns find, or [] if the patterns do not match."""
    if pattern_fault(images, labels):
        return []
    try:
        return by_pattern(data, images, labels, data, without)
    except DataError:
        return []


def _plain(name: str) -> str:
    """Reduce a name to letters, digits and _."""
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def _files(cases: Sequence[Found]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return images and labels by id."""
    return (
        {case.id: case.image for case in cases},
        {case.id: case.label for case in cases if case.label is not None},
    )


# -- answers ---------------------------------------------------------------------------------------


def _images(answer: str, data: Path, proposed: _Proposal) -> str:
    """Return the answer if the pattern finds images.

    Args:
        answer: the pattern.
        data: the directory of the volumes.
        proposed: the proposal; images may match its labels, too.
    """
    if not answer:
        raise DataError(proposed.no_images)
    fault = pattern_fault(answer, None)
    if fault:
        raise ConfigError(f"{fault}.")
    if proposed.labels is None or not _paired(data, answer, proposed.labels):
        by_pattern(data, answer, None, data, proposed.left_out)
    return answer


def _labels(
    answer: str, data: Path, images: str, proposed: _Proposal
) -> tuple[str | None, list[Found]]:
    """Return the label pattern, and the cases that it finds with the image pattern.

    Args:
        answer: the pattern, or "none".
        data: the directory of the volumes.
        images: the image pattern.
        proposed: the proposal.
    """
    if not answer and proposed.no_labels:
        raise DataError(proposed.no_labels)
    if answer.lower() in ("none", ""):
        return None, by_pattern(data, images, None, data, proposed.others(None))
    fault = pattern_fault(images, answer)
    if fault:
        raise ConfigError(f"{fault}.")
    return answer, by_pattern(data, images, answer, data, proposed.others(answer))
