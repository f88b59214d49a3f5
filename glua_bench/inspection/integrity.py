"""Are a dataset's files what they should be? Read every one before anything is trained.

Here stands what one case tells, and what cases must not share. What only a comparison with other
cases can tell is in `outliers.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from glua_bench.console import Progress
from glua_bench.data.geometry import SAME_SIDES, follows_other_form, max_displacement, same_place
from glua_bench.data.volumes import label_integers
from glua_bench.errors import DataError
from glua_bench.inspection.findings import Finding, enumerate_names
from glua_bench.inspection.measurements import CaseFacts, gather
from glua_bench.inspection.outliers import comparisons
from glua_bench.paths import name_fault
from glua_bench.task import Case, Dataset, role_fault

# Slices without an image: that many of an axis at its ends may be padding.
_PADDING = 0.5
# Labelled voxels in such slices; a border may be touched.
_BLANK = 0.01
# A label without any structure is a healthy case, unless more of a domain's labels are like that.
_MOST = 0.5
# Findings after which an image's intensities say nothing new.
_OF_IMAGES = ("image", "swapped files", "few values", "empty slices")


def check_dataset(
    dataset: Dataset, progress: Progress, jobs: int = 1
) -> tuple[list[CaseFacts], list[Finding]]:
    """Read every case of every domain, and judge each alone and all together.

    Returns:
        What the files hold, in the dataset's order; and what was found, problems first.

    Raises:
        DataError: the dataset's directory cannot be used at all.
    """
    facts = gather(dataset, jobs, progress)
    findings = [found for one in facts for found in case_findings(one, dataset)]
    doubted = {f.cases[0] for f in findings if f.check in _OF_IMAGES}
    cases = [one.case for one in facts]
    findings += [*told_by_cases(dataset), *empty_labels(facts), *shared_content(facts)]
    findings += comparisons(facts, [s.name for s in dataset.structures], doubted)
    order = {case.id: place for place, case in enumerate(cases)}
    findings.sort(key=lambda f: (not f.problem, min((order[c] for c in f.cases), default=-1)))
    return facts, findings


# -- one case -------------------------------------------------------------------------------------


def case_findings(facts: CaseFacts, dataset: Dataset) -> Iterator[Finding]:
    """What is wrong with one case, whatever the others are like."""
    case, image, label = facts.case, facts.image, facts.label
    view = dataset.view(case.domain)
    own = (case.id,)
    if image is not None and image.few:
        known = {0, *view.reading.ignored_values, *view.reading.unannotated_values}
        known |= {v for s in view.structures for v in s.values}
        if facts.label_problem and _are_labels(image.few, known):
            yield Finding(
                "swapped files",
                own,
                f"{case.image} holds label values and {case.label} does not: exchange the two.",
                problem=True,
            )
            return
        yield Finding(
            "few values",
            own,
            f"{case.image} has {len(image.few)} distinct values, as a mask has: make sure that it "
            "is the image.",
        )
    if facts.image_problem:
        yield Finding("image", own, facts.image_problem, problem=True)
    if facts.label_problem:
        yield Finding("label", own, facts.label_problem, problem=True)
    if image is not None:
        yield from _empty_slices(facts)
    canonical = view.reading.orientation == "canonical"
    told = image.doubts if image is not None else ()
    # What a label has from its image is told once.
    told += tuple(d for d in label.doubts if d[0] not in dict(told)) if label is not None else ()
    for check, text in told:
        yield Finding(check, own, text)
    if image is not None and label is not None and canonical:
        yield from _placed_apart(facts)


def _are_labels(values: Sequence[float], known: set[int]) -> bool:
    """Whether an image's distinct values are label values."""
    try:
        return set(label_integers(np.array(values), Path()).tolist()) <= known
    except DataError:
        return False


def _empty_slices(facts: CaseFacts) -> Iterator[Finding]:
    """Slices along any axis that hold one single value."""
    assert facts.image is not None
    case, image, blank = facts.case, facts.image, facts.label.blank if facts.label else 0.0
    what = ""
    if any(image.gaps):
        what = f"has {max(image.gaps)} slices without an image between others"
    elif blank > _BLANK:
        what = f"has no image where {blank:.0%} of the labelled voxels lie"
    elif max(image.flat) > _PADDING:
        what = f"has no image in {max(image.flat):.0%} of its slices"
    if what:
        yield Finding(
            "empty slices", (case.id,), f"{case.image} {what}: look whether a part got lost."
        )


def _placed_apart(facts: CaseFacts) -> Iterator[Finding]:
    """Headers of image and label that put the same voxel at different places."""
    assert facts.image is not None and facts.label is not None
    case = facts.case
    image, label = np.array(facts.image.affine), np.array(facts.label.affine)
    shape = facts.image.shape
    if same_place(label, image, shape):
        return
    distance = max_displacement(image, label, shape)
    seconds = [None if s is None else np.array(s) for s in (facts.label.second, facts.image.second)]
    other = follows_other_form((label, seconds[0]), (image, seconds[1]), shape)
    sides = [np.linalg.norm(affine[:3, :3], axis=0) for affine in (image, label)]
    image[:3, 3] = label[:3, 3] = 0  # what remains is the angle
    if other:
        what = f"lies {distance:.3g} mm beside its image ({other})"
    elif np.abs(sides[1] / sides[0] - 1).max() > SAME_SIDES:
        mm = ["×".join(f"{side:.3g}" for side in own) for own in sides]
        what = f"has voxels of {mm[1]} mm and its image of {mm[0]} mm"
    elif not same_place(label, image, shape):
        what = "lies at another angle than its image"
    else:
        what = f"lies {distance:.3g} mm beside its image"
    yield Finding(
        "label geometry",
        (case.id,),
        f"{case.label} {what}, by their headers: make sure that the two overlay voxel by voxel, as "
        "they are used here.",
    )


def empty_labels(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Labels without any structure: healthy cases, or wrong files where most of a domain are so."""
    labelled = [one for one in facts if one.label is not None]
    for domain in dict.fromkeys(one.case.domain for one in labelled):
        own = [one for one in labelled if one.case.domain == domain]
        empty = [one.case for one in own if one.label is not None and one.label.whole is None]
        most = len(empty) > _MOST * len(own)
        for case in empty:
            text = f"{case.label} holds none of the dataset's structures"
            if most:
                text += (
                    f", like {len(empty)} of {len(own)} labels of {domain}: correct the label "
                    "values of the dataset, or give the right files."
                )
            else:
                text += ": make sure that it is a healthy case and not another file."
            yield Finding("label without structures", (case.id,), text, problem=most)


def told_by_cases(dataset: Dataset) -> list[Finding]:
    """What a dataset's cases tell before a file of theirs is opened.

    Raises:
        DataError: files are missing.
    """
    cases = [case for domain in dataset.domains() for case in dataset.cases(domain)]
    return [
        *empty_roles(dataset),
        *case_names(cases),
        *shared_names(cases),
        *shared_subjects(cases),
    ]


# -- what directions need -------------------------------------------------------------------------


def empty_roles(dataset: Dataset) -> Iterator[Finding]:
    """Directions that have nothing to train with or to test on, and sources without validation.

    Where no direction can be run, that is a problem; where some can, the others are a warning.
    """
    faults = {direction: role_fault(dataset, direction) for direction in dataset.directions}
    for text in dict.fromkeys(filter(None, faults.values())):
        yield Finding("empty role", (), text, problem=all(faults.values()))
    sources = [direction.split("-")[0] for direction, fault in faults.items() if not fault]
    for domain in dict.fromkeys(sources):
        if not dataset.labelled(domain, "val"):
            yield Finding(
                "empty role",
                (),
                f"No labelled case of '{domain}' in dataset '{dataset.name}' is for validation, so "
                "the selector source_val cannot choose where it is the source: put one into the "
                "split val, or choose by another selector.",
            )


# -- what cases must not share --------------------------------------------------------------------


def case_names(cases: Sequence[Case]) -> Iterator[Finding]:
    """Ids that cannot name the file of a prediction."""
    for case in cases:
        fault = name_fault(case.id)
        if fault:
            text = f"The id '{case.id}' of {case.image} {fault}: give the case another."
            yield Finding("id", (case.id,), text, problem=True)


def shared_names(cases: Sequence[Case]) -> Iterator[Finding]:
    """Ids and files that several cases have in common.

    One label may serve several sequences of a person, which lie on one grid.
    """
    for name, same in _groups(cases, lambda case: case.id).items():
        files = enumerate_names(sorted(str(case.image) for case in same))
        yield Finding(
            "same id",
            (name,),
            f"{len(same)} cases are called {name} ({files}): give each an id of its own.",
            problem=True,
        )
    uses = [(file, case) for case in cases for file in (case.image, case.label) if file is not None]
    for file, both in _groups(uses, lambda use: use[0]).items():
        if _one_person(case for _, case in both) and all(file != case.image for _, case in both):
            continue
        names = sorted({case.id for _, case in both})
        yield Finding(
            "same file",
            tuple(names),
            f"{file} is used {len(both)} times, by {enumerate_names(names)}: give each case "
            "its own files.",
            problem=True,
        )


def shared_subjects(cases: Sequence[Case]) -> Iterator[Finding]:
    """Persons who are in two splits of a domain, or trained with in one and tested in another."""
    for subject, own in _groups(cases, lambda case: case.subject).items():
        splits = sorted({case.split for case in own})
        if len(splits) > 1:
            names = tuple(sorted(case.id for case in own))
            yield Finding(
                "subject in two splits",
                names,
                f"Subject {subject} is in {enumerate_names(splits)} ({enumerate_names(names)}): "
                "put all cases of a person into one split.",
                problem=True,
            )


def shared_content(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Images that hold the same voxels, and labels that do."""
    twins: set[tuple[str, str]] = set()
    images = [one for one in facts if one.image is not None]
    for same in _groups(images, lambda one: one.image.values).values():
        cases = [one.case for one in same]
        if len({case.image for case in cases}) == 1:
            continue  # told by its name
        twins |= set(combinations(sorted(case.id for case in cases), 2))
        names = tuple(sorted(case.id for case in cases))
        parts = sorted({f"{case.domain} {case.split}" for case in cases})
        across = len(parts) > 1
        where = f"across {enumerate_names(parts)}" if across else f"in {parts[0]}"
        yield Finding(
            "same image",
            names,
            f"{enumerate_names(str(case.image) for case in cases)} hold the same voxels, {where}, "
            "perhaps turned or converted: keep one of them.",
            problem=across,
        )
    labels = [one for one in facts if one.label is not None and one.label.whole is not None]
    for same in _groups(labels, lambda one: one.label.content).values():
        names = tuple(sorted(one.case.id for one in same))
        if len(set(names)) == 1 or set(combinations(names, 2)) <= twins:
            continue
        if len({one.case.label for one in same}) == 1 or _one_person(one.case for one in same):
            continue
        yield Finding(
            "same label",
            names,
            f"{enumerate_names(str(one.case.label) for one in same)} are the same label of "
            "different images: find out whose it is.",
        )


def _one_person(cases: Iterable[Case]) -> bool:
    """Whether different cases show the same subject."""
    seen = list(cases)
    return len({case.subject for case in seen}) == 1 and len({case.id for case in seen}) == len(
        seen
    )


def _groups(items: Sequence, key: Callable) -> dict:
    """Items with one key, for each key that at least two have."""
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return {name: same for name, same in found.items() if len(same) > 1}


def summary(findings: Sequence[Finding]) -> str:
    """The warnings in words, e.g. "2 warnings: look at them first"."""
    count = sum(not found.problem for found in findings)
    return f"{count} warning{'s' * (count > 1)}: look first" if count else "no warnings"


def refuse_problems(findings: Sequence[Finding], count: int, place: str) -> None:
    """Raise where something cannot be used.

    Args:
        findings: all that was found.
        count: of the cases.
        place: where they are, in words.

    Raises:
        DataError: there are problems; the sentence counts them.
    """
    problems = [found for found in findings if found.problem]
    if problems:
        bad = {case for found in problems for case in found.cases}
        warnings = sum(not found.problem for found in findings)
        what = f"{len(bad)} of {count} cases of {place}" if bad else f"The splits of {place}"
        besides = f", besides {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
        raise DataError(
            f"{what} cannot be used as they are{besides}; repair or replace what is named above."
        )
