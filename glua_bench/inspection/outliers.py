"""Detect outliers among cases and differences between domains.

Each rule compares a case with the median of the other cases of its domain, or two domains with each
other; docs/checking-data.md documents rules and thresholds. Thresholds are chosen such that neither
the phantom nor MS-CMRSeg raises a false alarm. Findings are warnings that need a visual check.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import NamedTuple, TypeVar

import numpy as np

from glua_bench.inspection.findings import Finding, enumerate_names
from glua_bench.inspection.measurements import (
    CaseMeasurements,
    ImageMeasurements,
    Intensities,
    LabelMeasurements,
    StructureMeasurements,
)
from glua_bench.task import Case

Item = TypeVar("Item")

# Minimum number of other cases to compare a case with.
LEAST = 4
# Size: minimum ratio in mm along an axis, and minimum robust standard deviations.
_SIZE, _SIZE_DEVIATIONS = 1.7, 5.0
# Size of domains: minimum ratio of medians, and minimum standard errors.
_DOMAIN_SIZE, _DOMAIN_DEVIATIONS = 1.3, 4.0
# Orientation: minimum distance from the others in robust standard deviations, maximum relative
# distance after the best rotation or reflection, and minimum standard deviation.
_TURNED_DEVIATIONS, _TURNED_SHARE, _PATTERN_FLOOR = 2.5, 0.6, 0.15
# With fewer than three structures, thresholds are stricter.
_FEW = 3
_TURNED_DEVIATIONS_OF_FEW, _TURNED_SHARE_OF_FEW, _FIT_DEVIATIONS_OF_FEW = 4.0, 0.4, 7.0
# Intensities: maximum distance to another domain relative to the own domain, minimum distance
# relative to the usual one for that rule, and minimum relative and absolute distance without it.
_NEARER, _USUAL, _UNLIKE, _UNLIKE_LEAST = 0.6, 3.0, 5.0, 0.15
# Fractions of negative voxels that count as none and as some.
_NO_NEGATIVES, _NEGATIVES = 0.001, 0.05
# Intensities inside structures: minimum robust standard deviations, and minimum deviation.
_FIT_DEVIATIONS, _FIT_FLOOR = 4.0, 0.05
# A structure missing in more cases is reported once per domain.
_OFTEN_MISSING = 0.25

# All permutations and reversals of three axes; the first is the identity.
_TURNS = tuple(product(permutations(range(3)), product((1, -1), repeat=3)))


def comparisons(
    measured: Sequence[CaseMeasurements], structures: Sequence[str], doubted: Collection[str] = ()
) -> list[Finding]:
    """Compare cases and domains, and return all warnings.

    Args:
        measured: measurements of the cases of all domains.
        structures: names of the structures.
        doubted: ids of cases with faulty images, whose intensities are not checked.
    """
    domains: dict[str, list[CaseMeasurements]] = {}
    for one in measured:
        domains.setdefault(one.case.domain, []).append(one)
    labelled = {domain: _labelled(cases) for domain, cases in domains.items()}
    findings = [*missing_structures(labelled, structures), *size_outliers(labelled)]
    findings += domain_sizes(labelled)
    channels = max((len(one.channels) for one in measured), default=1)
    foreign = [
        found
        for index in range(channels)
        for found in intensity_outliers(_channel(domains, index))
        if found.cases[0] not in doubted
    ]
    misfits = label_misfits(labelled) - {*doubted, *(found.cases[0] for found in foreign)}
    turned = list(orientation_outliers(labelled, misfits))
    findings += [*foreign, *turned, *domain_orientations(labelled)]
    reported = {found.cases[0] for found in turned}
    for one in measured:
        if one.case.id in misfits - reported:
            text = (
                f"{one.case.label} encloses different intensities than the labels of other cases "
                f"of {one.case.domain}: check that it belongs to {one.case.image.name} and "
                "overlays it."
            )
            findings.append(Finding("label fit", (one.case.id,), text))
    return findings


class _LabelledCase(NamedTuple):
    """A case with readable image and label and at least one structure."""

    case: Case
    image: ImageMeasurements
    label: LabelMeasurements
    whole: StructureMeasurements


Domains = Mapping[str, Sequence[CaseMeasurements]]
Labelled = Mapping[str, Sequence[_LabelledCase]]


def missing_structures(domains: Labelled, structures: Sequence[str]) -> Iterator[Finding]:
    """Find structures missing in some labels of a domain."""
    for domain, cases in domains.items():
        for index, name in enumerate(structures):
            without = [one.case for one in cases if one.label.structures[index] is None]
            if len(without) > max(1, _OFTEN_MISSING * len(cases)):
                text = (
                    f"{name} is missing in {len(without)} of {len(cases)} labels of {domain}: "
                    "check the label values of the dataset."
                )
                yield Finding("structure missing", (), text)
                continue
            for case in without:
                text = (
                    f"{case.label} has no {name}, unlike other labels of {domain}: check whether "
                    "it was omitted."
                )
                yield Finding("structure missing", (case.id,), text)


# -- size -----------------------------------------------------------------------------------------


def size_outliers(domains: Labelled) -> Iterator[Finding]:
    """Find structures that are much larger or smaller in mm than those of other cases."""
    for domain, cases in domains.items():
        sizes = np.log([one.whole.spread for one in cases]).reshape(-1, 3)
        for one, own, others in _leave_one_out(cases, sizes):
            shift = own - np.median(others, 0)
            least = np.maximum(np.log(_SIZE), _SIZE_DEVIATIONS * _deviation(others))
            if (np.abs(shift) > least).any():
                ratio = " × ".join(f"{value:.2f}" for value in np.exp(shift))
                text = (
                    f"The structures of {one.case.label} are {ratio} times as large (mm) as in "
                    f"other cases of {domain} (through-plane × vertical × horizontal): check the "
                    "voxel size in the headers, and the label."
                )
                yield Finding("size", (one.case.id,), text)


def domain_sizes(domains: Labelled) -> Iterator[Finding]:
    """Find domains whose structures differ implausibly in size."""
    for first, second in combinations([d for d, f in domains.items() if len(f) >= LEAST], 2):
        sizes, voxels = [], []
        for domain in (first, second):
            spread = np.array([one.whole.spread for one in domains[domain]])
            sizes.append(np.log(spread))
            voxels.append(np.log(spread / [one.image.oriented_spacing for one in domains[domain]]))
        shift = np.median(sizes[0], 0) - np.median(sizes[1], 0)
        error = np.sqrt(sum(_deviation(own) ** 2 / len(own) for own in sizes))
        wrong = (np.abs(shift) > np.log(_DOMAIN_SIZE)) & (
            np.abs(shift) > _DOMAIN_DEVIATIONS * error
        )
        if not wrong.any():
            continue
        in_voxels = np.median(voxels[0], 0) - np.median(voxels[1], 0)
        agree = wrong & (np.abs(in_voxels) < np.abs(shift) / 2)
        ratio = [" × ".join(f"{value:.2f}" for value in np.exp(s)) for s in (shift, in_voxels)]
        hint = f", but {ratio[1]} times in voxels, so the headers of one domain may be wrong"
        text = (
            f"The structures of {first} are {ratio[0]} times as large (mm) as those of {second} "
            f"(through-plane × vertical × horizontal){hint if agree.any() else ''}: compare the "
            "voxel sizes, and set the correct one in the dataset's reading."
        )
        yield Finding("size of domains", (), text)


# -- orientation ----------------------------------------------------------------------------------


def orientation_outliers(domains: Labelled, misfits: set[str]) -> Iterator[Finding]:
    """Find cases whose structures are reflected or rotated."""
    for domain, cases in domains.items():
        for one, own, others in _leave_one_out(cases, _patterns(cases)):
            turn = _turn(own, others, _few(cases))
            if turn:
                advice = (
                    "the intensities inside do not fit either, so only the label may be wrong"
                    if one.case.id in misfits
                    else "check that the label overlays its image, and check the headers of both"
                )
                text = (
                    f"The structures of {one.case.label} are {turn} relative to other cases of "
                    f"{domain}: {advice}."
                )
                yield Finding("orientation", (one.case.id,), text)


def domain_orientations(domains: Labelled) -> Iterator[Finding]:
    """Find domains whose orientations differ after the dataset's reading."""
    for first, second in combinations([d for d, f in domains.items() if len(f) > LEAST], 2):
        patterns = _patterns(domains[first]), _patterns(domains[second])
        turn = _turn(_median(patterns[0]), patterns[1], _few(domains[first]))
        if turn:
            text = (
                f"The structures of {first} are {turn} relative to those of {second}: correct the "
                "orientation or the flips in the dataset's reading."
            )
            yield Finding("orientation of domains", (), text)


def _patterns(cases: Sequence[_LabelledCase]) -> np.ndarray:
    """Return positions of structures, (cases, structures, 3), relative to their centre and size.

    With fewer than three structures, the centre of the body is appended.
    """
    made = []
    for one in cases:
        rows = [(np.nan,) * 3 if s is None else s.centre for s in one.label.structures]
        if _few(cases):
            rows.append(one.image.body)
        made.append((np.array(rows) - one.whole.centre) / np.prod(one.whole.spread) ** (1 / 3))
    return np.array(made)


def _turn(pattern: np.ndarray, others: np.ndarray, few: bool) -> str:
    """Return how a pattern is turned relative to the others, or "" if it is not."""
    centre = _median(others)
    deviation = np.maximum(_deviation(others), _PATTERN_FLOOR)
    known = np.isfinite(pattern + centre).all(1)
    far = [
        float(np.sqrt(np.mean(((turned - centre) / deviation)[known] ** 2))) if known.any() else 0.0
        for turned in (pattern[:, list(axes)] * signs for axes, signs in _TURNS)
    ]
    best = int(np.argmin(far))
    least = _TURNED_DEVIATIONS_OF_FEW if few else _TURNED_DEVIATIONS
    share = _TURNED_SHARE_OF_FEW if few else _TURNED_SHARE
    if not (far[0] > least and far[best] < share * far[0]):
        return ""
    axes, signs = _TURNS[best]
    names = ("slice order", "up-down", "left-right")
    swapped = [names[i] for i in range(3) if axes[i] != i]
    if swapped:
        return f"transposed ({enumerate_names(swapped)})"
    return f"reversed ({enumerate_names(names[i] for i in range(3) if signs[i] < 0)})"


# -- intensities ----------------------------------------------------------------------------------


def _channel(domains: Domains, index: int) -> Domains:
    """Return the measurements of one input channel."""
    return {
        domain: [one.channels[index] for one in cases if index < len(one.channels)]
        for domain, cases in domains.items()
    }


def intensity_outliers(domains: Domains) -> Iterator[Finding]:
    """Find images whose intensity distribution differs from that of their domain."""
    whole = _distribution_anomalies(domains, lambda one: one.image.levels if one.image else ())
    # A scan with a small field of view shows a different part of the body, but the surroundings of
    # the structures are comparable. If there are any, both comparisons must agree.
    close = _distribution_anomalies(domains, lambda one: one.label.around if one.label else ())
    for domain, cases in domains.items():
        readable = [(one.case, one.image) for one in cases if one.image is not None]
        negative = np.array([image.negative for _, image in readable])
        for (case, _), own, others in _leave_one_out(readable, negative):
            anomaly = whole.get(case, "")
            if close.get(case, anomaly) != anomaly:
                anomaly = ""
            anomaly = anomaly or _sign_anomaly(float(own), float(np.median(others)), domain)
            if anomaly:
                text = f"The intensity of {case.image} {anomaly}: check its modality and units."
                yield Finding("intensities", (case.id,), text)


def _distribution_anomalies(
    domains: Domains, levels: Callable[[CaseMeasurements], Sequence[float]]
) -> dict[Case, str]:
    """Describe the anomaly of each comparable case's distribution, "" if there is none.

    Distributions are scaled such that the 1st percentile is 0 and the 99th is 1, which removes the
    scale and offset of the scanner. Their distance is the mean absolute difference of percentiles
    (Wasserstein distance).
    """
    known = {d: [one for one in cases if levels(one)] for d, cases in domains.items()}
    curves = {d: np.array([_curve(levels(one)) for one in cases]) for d, cases in known.items()}
    anomalies: dict[Case, str] = {}
    for domain, cases in known.items():
        if len(cases) <= LEAST:
            continue
        far = _from_others(curves[domain])
        usual = float(np.median(far))
        for one, own, curve in zip(cases, far, curves[domain], strict=True):
            elsewhere = {
                other: float(np.median(np.abs(curves[other] - curve).mean(1)))
                for other in curves
                if other != domain and len(curves[other]) >= LEAST
            }
            anomalies[one.case] = _distribution_anomaly(own, usual, elsewhere, domain)[0]
    return anomalies


def _from_others(curves: np.ndarray) -> list[float]:
    """Return the median distance of each curve (images, percentiles) from the others."""
    distances = np.abs(curves[:, None] - curves[None]).mean(2)
    return [float(np.median(np.delete(row, index))) for index, row in enumerate(distances)]


def _distribution_anomaly(
    own: float, usual: float, elsewhere: Mapping[str, float], domain: str
) -> tuple[str, str]:
    """Describe a distribution's anomaly and name the domain that it resembles, both "" if none.

    Args:
        own: distance from the distributions of its domain.
        usual: median of this distance over the images of the domain.
        elsewhere: other domain → distance from its distributions.
        domain: name of its domain.
    """
    nearest = min(elsewhere, key=elsewhere.__getitem__, default=domain)
    near = elsewhere.get(nearest, np.inf) < _NEARER * own
    if near and own > _USUAL * usual:
        return f"resembles {nearest}, not {domain}", nearest
    if own > max(_UNLIKE * usual, _UNLIKE_LEAST):
        return f"is distributed differently than in other images of {domain}", ""
    return "", ""


def _sign_anomaly(negative: float, usual: float, domain: str) -> str:
    """Describe an anomaly of an image's fraction of negative voxels, "" if there is none."""
    if usual < _NO_NEGATIVES and negative > _NEGATIVES:
        return f"is negative in {negative:.0%} of the voxels, unlike other images of {domain}"
    if usual > _NEGATIVES and negative < _NO_NEGATIVES:
        return f"is never negative, unlike other images of {domain}"
    return ""


@dataclass(frozen=True)
class Usual:
    """Summary of the intensity distributions of a domain's images.

    Attributes:
        curve: median of the distributions, percentiles 1 to 99 scaled to [0, 1].
        spread: median distance between two distributions.
        negative: median fraction of negative voxels.
    """

    curve: tuple[float, ...]
    spread: float
    negative: float


def usual(images: Sequence[Intensities]) -> Usual | None:
    """Summarise the images of a domain; None if there are too few."""
    if len(images) <= LEAST:
        return None
    curves = np.array([_curve(image.levels) for image in images])
    return Usual(
        tuple(float(value) for value in np.median(curves, 0)),
        float(np.median(_from_others(curves))),
        float(np.median([image.negative for image in images])),
    )


def resemblance(
    image: Intensities, domain: str, known: Mapping[str, Usual | None]
) -> tuple[str, str]:
    """Compare an image with its domain by the rules of `intensity_outliers`.

    Args:
        image: intensity distribution of the image.
        domain: name of its domain.
        known: summary of each domain, or None if unknown.

    Returns:
        The anomaly, and the domain that the image resembles; both "" if there is none.
    """
    own = known.get(domain)
    if own is None:
        return "", ""
    others = {name: one for name, one in known.items() if one is not None and name != domain}
    curve = _curve(image.levels)
    distances = {
        name: float(np.abs(curve - one.curve).mean())
        for name, one in {domain: own, **others}.items()
    }
    anomaly, like = _distribution_anomaly(distances.pop(domain), own.spread, distances, domain)
    sign = "" if anomaly else _sign_anomaly(image.negative, own.negative, domain)
    if sign:
        negative = image.negative
        fitting = [d for d, one in others.items() if not _sign_anomaly(negative, one.negative, d)]
        like = min(fitting, key=distances.__getitem__, default="")
    return anomaly or sign, like


def label_misfits(domains: Labelled) -> set[str]:
    """Return ids of cases whose structures enclose unusual intensities."""
    misfits = set()
    for labelled in domains.values():
        cases = [one for one in labelled if one.label.around]
        least = _FIT_DEVIATIONS_OF_FEW if _few(cases) else _FIT_DEVIATIONS
        levels = np.array([_relative_levels(one) for one in cases])
        for one, own, others in _leave_one_out(cases, levels):
            far = np.abs(own - _median(others)) / np.maximum(_deviation(others), _FIT_FLOOR)
            if np.isfinite(far).any() and np.nanmedian(far) > least:
                misfits.add(one.case.id)
    return misfits


def _curve(levels: Sequence[float]) -> np.ndarray:
    """Scale percentiles 1 to 99 to [0, 1]."""
    low, high = levels[1], levels[99]
    return (np.array(levels[1:100]) - low) / (high - low) if high > low else np.zeros(99)


def _relative_levels(one: _LabelledCase) -> list[float]:
    """Return for each structure the fraction of its surroundings darker than its median."""
    return [
        np.nan if s is None else float(np.searchsorted(one.label.around, s.level)) / 100
        for s in one.label.structures
    ]


# -- utilities ------------------------------------------------------------------------------------


def _labelled(cases: Sequence[CaseMeasurements]) -> list[_LabelledCase]:
    return [
        _LabelledCase(one.case, one.image, one.label, one.label.whole)
        for one in cases
        if one.image is not None and one.label is not None and one.label.whole is not None
    ]


def _leave_one_out(
    cases: Sequence[Item], values: np.ndarray
) -> Iterator[tuple[Item, np.ndarray, np.ndarray]]:
    """Yield each case, its values and those of the others; nothing if there are too few."""
    if len(cases) > LEAST:
        for index, one in enumerate(cases):
            yield one, values[index], np.delete(values, index, 0)


def _few(cases: Sequence[_LabelledCase]) -> bool:
    """Return True if the dataset has too few structures for a reliable pattern."""
    return bool(cases) and len(cases[0].label.structures) < _FEW


def _median(values: np.ndarray) -> np.ndarray:
    """Compute the median along the first axis, ignoring NaN; NaN if all values are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns about columns of NaN
        return np.nanmedian(values, 0)


def _deviation(values: np.ndarray) -> np.ndarray:
    """Compute the robust standard deviation along the first axis (scaled MAD)."""
    return 1.4826 * _median(np.abs(values - _median(values)))
