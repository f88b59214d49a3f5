"""Check the files of a dataset before training.

Checks single cases and what cases must not share; `outliers.py` compares cases with each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from glua_bench.console import Progress
from glua_bench.data.geometry import SAME_SIDES, follows_other_form, max_displacement, same_place
from glua_bench.data.volumes import label_integers
from glua_bench.errors import ConfigError, DataError
from glua_bench.inspection.findings import Finding, enumerate_names
from glua_bench.inspection.measurements import (
    CaseMeasurements,
    ImageMeasurements,
    LabelMeasurements,
    gather,
)
from glua_bench.inspection.outliers import comparisons
from glua_bench.inspection.windows import clipped_structures
from glua_bench.paths import name_fault
from glua_bench.task import Case, Dataset, common_channels, role_fault

# Maximum fraction of constant slices at the ends of an axis.
_PADDING = 0.5
# Maximum fraction of labelled voxels in constant slices.
_BLANK = 0.01
# Maximum fraction of labels of a domain without any structure.
_EMPTY = 0.5
# Findings that make a check of the image's intensities redundant.
_OF_IMAGES = ("image", "swapped files", "few values", "empty slices")


def check_dataset(
    dataset: Dataset, progress: Progress, jobs: int = 1
) -> tuple[list[CaseMeasurements], list[Finding]]:
    """Read and check every case of every domain.

    Returns:
        Measurements in the dataset's order, and findings, problems first.

    Raises:
        DataError: the dataset's directory cannot be used.
    """
    measured = gather(dataset, jobs, progress)
    findings = [found for one in measured for found in case_findings(one, dataset)]
    doubted = {f.cases[0] for f in findings if f.check in _OF_IMAGES}
    images = [channel for one in measured for channel in one.channels]
    findings += [*check_cases(dataset), *empty_labels(measured), *shared_content(images)]
    findings += clipped_structures(measured, dataset)
    findings += comparisons(measured, [s.name for s in dataset.structures], doubted)
    caveats = dict.fromkeys(dataset.caveat(direction) for direction in dataset.directions)
    findings += [Finding("caveat", (), f"{text}.") for text in caveats if text]
    order = {one.case.id: place for place, one in enumerate(measured)}
    findings.sort(key=lambda f: (not f.problem, min((order[c] for c in f.cases), default=-1)))
    return measured, findings


# -- one case -------------------------------------------------------------------------------------


def case_findings(measured: CaseMeasurements, dataset: Dataset) -> Iterator[Finding]:
    """Check one case alone."""
    case, image, label = measured.case, measured.image, measured.label
    view = dataset.view(case.domain)
    own = (case.id,)
    if image is not None and image.few:
        known = {0, *view.reading.ignored_values, *view.reading.unannotated_values}
        known |= {v for s in view.structures for v in s.values}
        if measured.label_problem and _are_labels(image.few, known):
            text = f"{case.image} contains label values and {case.label} does not: swap the files."
            yield Finding("swapped files", own, text, problem=True)
            return
        text = f"{case.image} has {len(image.few)} distinct values: check that it is not a mask."
        yield Finding("few values", own, text)
    if measured.image_problem:
        yield Finding("image", own, measured.image_problem, problem=True)
    if measured.label_problem:
        yield Finding("label", own, measured.label_problem, problem=True)
    if image is not None:
        yield from _empty_slices(case, image, label)
    ambiguities = dict(label.ambiguities) if label is not None else {}
    ambiguities.update(image.ambiguities if image is not None else ())  # reported once, for both
    for check, text in ambiguities.items():
        yield Finding(check, own, text)
    if image is not None and label is not None and view.reading.orientation == "canonical":
        yield from _displaced_label(case, image, label)
    for channel in measured.further:
        yield from case_findings(channel, dataset)


def _are_labels(values: Sequence[float], known: set[int]) -> bool:
    try:
        return set(label_integers(np.array(values), Path()).tolist()) <= known
    except DataError:
        return False


def _empty_slices(
    case: Case, image: ImageMeasurements, label: LabelMeasurements | None
) -> Iterator[Finding]:
    """Find images with constant slices along any axis."""
    blank = label.blank if label is not None else 0.0
    if any(image.gaps):
        what = f"has {max(image.gaps)} empty slices between others"
    elif blank > _BLANK:
        what = f"is empty in the slices of {blank:.0%} of the labelled voxels"
    elif max(image.flat) > _PADDING:
        what = f"is empty in {max(image.flat):.0%} of its slices"
    else:
        return
    text = f"{case.image} {what}: check whether data are missing."
    yield Finding("empty slices", (case.id,), text)


def _displaced_label(
    case: Case, image: ImageMeasurements, label: LabelMeasurements
) -> Iterator[Finding]:
    """Find labels whose header differs from that of the image."""
    affines, shape = (np.array(label.affine), np.array(image.affine)), image.shape
    if same_place(*affines, shape):
        return
    distance = max_displacement(*affines, shape)
    seconds = [None if s is None else np.array(s) for s in (label.second, image.second)]
    other = follows_other_form((affines[0], seconds[0]), (affines[1], seconds[1]), shape)
    sides = [np.linalg.norm(affine[:3, :3], axis=0) for affine in affines]
    for affine in affines:
        affine[:3, 3] = 0  # leaves the angle
    what = f"is offset by {distance:.3g} mm"
    if other:
        what += f" ({other})"
    elif np.abs(sides[0] / sides[1] - 1).max() > SAME_SIDES:
        mm = ["×".join(f"{side:.3g}" for side in own) for own in sides]
        what = f"has voxels of {mm[0]} mm instead of {mm[1]} mm"
    elif not same_place(*affines, shape):
        what = "is rotated"
    text = (
        f"{case.label} {what} relative to its image according to the headers: check that both "
        "overlay voxel by voxel, which is assumed."
    )
    yield Finding("label geometry", (case.id,), text)


def empty_labels(measured: Sequence[CaseMeasurements]) -> Iterator[Finding]:
    """Find labels without any structure; a problem if they are the majority of a domain."""
    for domain, own in _groups(measured, lambda one: one.case.domain if one.label else None):
        empty = [one.case for one in own if one.label.whole is None]
        most = len(empty) > _EMPTY * len(own)
        advice = ": check that it is a healthy case and not a wrong file."
        if most:
            advice = (
                f", like {len(empty)} of {len(own)} labels of {domain}: correct the label values "
                "of the dataset, or the files."
            )
        for case in empty:
            text = f"{case.label} contains none of the dataset's structures{advice}"
            yield Finding("label without structures", (case.id,), text, problem=most)


def check_cases(dataset: Dataset) -> list[Finding]:
    """Check the cases of a dataset without opening their files.

    Raises:
        DataError: files are missing.
    """
    cases = [case for domain in dataset.domains() for case in dataset.cases(domain)]
    checks = (case_names, shared_names, shared_subjects)
    return [
        *unequal_channels(dataset),
        *empty_roles(dataset),
        *(found for check in checks for found in check(cases)),
    ]


# -- directions -----------------------------------------------------------------------------------


def unequal_channels(dataset: Dataset) -> Iterator[Finding]:
    """Find directions whose domains have different numbers of input channels."""
    for direction in dataset.directions:
        try:
            common_channels(dataset, direction)
        except ConfigError as error:
            yield Finding("channels", (), str(error), problem=True)
            return


def empty_roles(dataset: Dataset) -> Iterator[Finding]:
    """Find directions without training or test cases, and sources without validation cases.

    It is a problem if no direction can be run, otherwise a warning.
    """
    faults = {direction: role_fault(dataset, direction) for direction in dataset.directions}
    for text in dict.fromkeys(filter(None, faults.values())):
        yield Finding("empty role", (), text, problem=all(faults.values()))
    sources = [direction.split("-")[0] for direction, fault in faults.items() if not fault]
    for domain in dict.fromkeys(sources):
        if not dataset.labelled(domain, "val"):
            text = (
                f"Domain '{domain}' of dataset '{dataset.name}' has no labelled validation case, "
                "which the selector source_val requires of a source: add a case to the split val, "
                "or use another selector."
            )
            yield Finding("empty role", (), text)


# -- what cases must not share --------------------------------------------------------------------


def case_names(cases: Sequence[Case]) -> Iterator[Finding]:
    """Find ids that are not valid file names."""
    for case in cases:
        fault = name_fault(case.id)
        if fault:
            text = f"The id '{case.id}' of {case.image} {fault}: choose another id."
            yield Finding("id", (case.id,), text, problem=True)


def shared_names(cases: Sequence[Case]) -> Iterator[Finding]:
    """Find ids and files of several cases.

    Several sequences of a subject may have the same label.
    """
    for name, same in _duplicates(cases, lambda case: case.id):
        files = enumerate_names(sorted(str(case.image) for case in same))
        text = f"{len(same)} cases have the id {name} ({files}): choose unique ids."
        yield Finding("same id", (name,), text, problem=True)
    uses = [
        (file, case) for case in cases for file in (*case.images, case.label) if file is not None
    ]
    for file, both in _duplicates(uses, lambda use: use[0]):
        if _same_subject([case for _, case in both]) and all(file not in c.images for _, c in both):
            continue
        names = sorted({case.id for _, case in both})
        text = f"{file} is used {len(both)} times, by {enumerate_names(names)}: use it once."
        yield Finding("same file", tuple(names), text, problem=True)


def shared_subjects(cases: Sequence[Case]) -> Iterator[Finding]:
    """Find subjects in several splits, of one domain or of different ones."""
    for subject, own in _duplicates(cases, lambda case: case.subject):
        splits = sorted({case.split for case in own})
        if len(splits) > 1:
            names = tuple(sorted(case.id for case in own))
            text = (
                f"Subject {subject} is in {enumerate_names(splits)} ({enumerate_names(names)}): "
                "put all cases of a subject into the same split."
            )
            yield Finding("subject in two splits", names, text, problem=True)


def shared_content(measured: Sequence[CaseMeasurements]) -> Iterator[Finding]:
    """Find different images with the same voxels, and different labels with the same voxels."""
    twins: set[tuple[str, str]] = set()
    for _, same in _duplicates(measured, lambda one: one.image.values if one.image else None):
        cases = [one.case for one in same]
        if len({case.image for case in cases}) == 1:
            continue  # reported by `shared_names`
        names = tuple(sorted(case.id for case in cases))
        twins |= set(combinations(names, 2))
        parts = sorted({f"{case.domain} {case.split}" for case in cases})
        across = len(parts) > 1
        where = f"across {enumerate_names(parts)}" if across else f"in {parts[0]}"
        text = (
            f"{enumerate_names(str(case.image) for case in cases)} have the same voxels, {where}, "
            "possibly reoriented or converted: keep one of them."
        )
        yield Finding("same image", names, text, problem=across)
    labels = [one for one in measured if one.label is not None and one.label.whole is not None]
    for _, same in _duplicates(labels, lambda one: one.label.content):
        cases = [one.case for one in same]
        names = tuple(sorted(case.id for case in cases))
        if len(set(names)) == 1 or set(combinations(names, 2)) <= twins:
            continue
        if len({case.label for case in cases}) == 1 or _same_subject(cases):
            continue
        text = (
            f"{enumerate_names(str(case.label) for case in cases)} are the same label of different "
            "images: find out which image it belongs to."
        )
        yield Finding("same label", names, text)


def _same_subject(cases: Sequence[Case]) -> bool:
    """Return True for different cases of the same subject."""
    subjects, ids = {case.subject for case in cases}, {case.id for case in cases}
    return len(subjects) == 1 and len(ids) == len(cases)


def _groups(items: Sequence, key: Callable) -> list[tuple[Any, list]]:
    """Group items by key; those with the key None are omitted."""
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return [(name, same) for name, same in found.items() if name is not None]


def _duplicates(items: Sequence, key: Callable) -> list[tuple[Any, list]]:
    """Group items by key, for keys of several items."""
    return [(name, same) for name, same in _groups(items, key) if len(same) > 1]


def summary(findings: Sequence[Finding]) -> str:
    """Summarise the warnings, e.g. "2 warnings: review them first"."""
    count = sum(not found.problem for found in findings)
    return f"{count} warning{'s' * (count > 1)}: review them first" if count else "no warnings"


def refuse_problems(findings: Sequence[Finding], count: int, place: str) -> None:
    """Raise an error if there are problems.

    Args:
        findings: all findings.
        count: number of cases.
        place: name of the dataset and its directory, for the message.

    Raises:
        DataError: there are problems.
    """
    problems = [found for found in findings if found.problem]
    if problems:
        bad = {case for found in problems for case in found.cases}
        warnings = len(findings) - len(problems)
        what = f"{len(bad)} of {count} cases of {place}" if bad else f"The splits of {place}"
        more = f" ({warnings} warning{'s' * (warnings > 1)})" if warnings else ""
        raise DataError(f"{what} cannot be used{more}: fix the problems listed above.")
