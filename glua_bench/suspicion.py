"""Which cases are unlike the others? Warnings that only a comparison can give.

Every rule compares a case with the other cases of its domain by medians, which a few odd cases do
not move, or whole domains with each other. docs/checking-data.md explains them with their
thresholds. They are set so that neither the phantom nor MS-CMRSeg raises a false alarm; a warning
asks for a look, and proves nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import NamedTuple

import numpy as np

from glua_bench.facts import CaseFacts, ImageFacts, Intensities, LabelFacts, StructureFacts
from glua_bench.findings import Finding, listed
from glua_bench.task import Case

# A case is compared with at least so many others.
LEAST = 4
# Size: that factor in mm along an axis, and so many robust standard deviations.
_SIZE, _SIZE_DEVIATIONS = 1.7, 5.0
# The same between domains, where it is medians that differ.
_DOMAIN_SIZE, _DOMAIN_DEVIATIONS = 1.3, 4.0
# Orientation: so many deviations from the others' pattern, and a turned one this much nearer.
_TURNED_DEVIATIONS, _TURNED_SHARE, _PATTERN_FLOOR = 2.5, 0.6, 0.15
# One or two structures make no pattern, so that more is asked of them.
_FEW = 3
_TURNED_DEVIATIONS_OF_FEW, _TURNED_SHARE_OF_FEW, _FIT_DEVIATIONS_OF_FEW = 4.0, 0.4, 7.0
# Intensities: nearer to another domain by this share; so many times as far as is usual.
_NEARER, _USUAL, _UNLIKE, _UNLIKE_LEAST = 0.6, 3.0, 5.0, 0.15
# Shares of negative voxels that are none and some.
_NO_NEGATIVES, _NEGATIVES = 0.001, 0.05
# Intensities inside the structures: so many robust standard deviations, which are at least this.
_FIT_DEVIATIONS, _FIT_FLOOR = 4.0, 0.05
# A structure that more cases lack is told once for the domain.
_OFTEN_MISSING = 0.25

# All ways to permute and reverse three axes; the first leaves them as they are.
_TURNS = tuple(product(permutations(range(3)), product((1, -1), repeat=3)))


def comparisons(
    facts: Sequence[CaseFacts], structures: Sequence[str], doubted: Collection[str] = ()
) -> list[Finding]:
    """All warnings that come from comparing cases and domains.

    Args:
        facts: of the cases of all domains.
        structures: their names.
        doubted: ids of cases whose images are known to be faulty, so that their intensities are
            not judged any more.
    """
    domains: dict[str, list[CaseFacts]] = {}
    for one in facts:
        domains.setdefault(one.case.domain, []).append(one)
    findings = [*missing_structures(domains, structures), *odd_sizes(domains)]
    findings += domain_sizes(domains)
    foreign = [found for found in odd_intensities(domains) if found.cases[0] not in doubted]
    misfits = odd_fits(domains) - {*doubted, *(found.cases[0] for found in foreign)}
    turned = list(odd_orientations(domains, misfits))
    findings += [*foreign, *turned, *domain_orientations(domains)]
    told = {found.cases[0] for found in turned}
    for one in facts:
        if one.case.id in misfits - told:
            findings.append(
                Finding(
                    "label fit",
                    (one.case.id,),
                    f"{one.case.label} encloses other intensities than the labels of other cases "
                    f"of {one.case.domain}: look whether it belongs to {one.case.image.name} and "
                    "lies on it.",
                )
            )
    return findings


Domains = Mapping[str, Sequence[CaseFacts]]


class _Labelled(NamedTuple):
    """A case whose image and label can be read, with at least one structure."""

    case: Case
    image: ImageFacts
    label: LabelFacts
    whole: StructureFacts


def missing_structures(domains: Domains, structures: Sequence[str]) -> Iterator[Finding]:
    """Structures that a label lacks while most labels of the domain have them."""
    for domain, facts in domains.items():
        labelled = _labelled(facts)
        for index, name in enumerate(structures):
            without = [one for one in labelled if one.label.structures[index] is None]
            if len(without) > max(1, _OFTEN_MISSING * len(labelled)):
                yield Finding(
                    "structure missing",
                    (),
                    f"{name} is missing in {len(without)} of {len(labelled)} labels of {domain}: "
                    "make sure that the dataset's label values are right.",
                )
                continue
            for one in without:
                yield Finding(
                    "structure missing",
                    (one.case.id,),
                    f"{one.case.label} has no {name}, which other labels of {domain} have: look "
                    "whether it was forgotten.",
                )


# -- size -----------------------------------------------------------------------------------------


def odd_sizes(domains: Domains) -> Iterator[Finding]:
    """Structures that are much larger or smaller in mm than those of other cases."""
    for domain, facts in domains.items():
        labelled = _labelled(facts)
        sizes = np.log([one.whole.spread for one in labelled]).reshape(-1, 3)
        for index, one in enumerate(labelled):
            others = np.delete(sizes, index, 0)
            if len(others) < LEAST:
                break
            centre = np.median(others, 0)
            shift = sizes[index] - centre
            least = np.maximum(np.log(_SIZE), _SIZE_DEVIATIONS * _deviation(others))
            if (np.abs(shift) > least).any():
                ratio = " × ".join(f"{value:.2f}" for value in np.exp(shift))
                yield Finding(
                    "size",
                    (one.case.id,),
                    f"The structures of {one.case.label} reach over {ratio} times the mm of other "
                    f"cases of {domain} (across slices × down × across): check the voxel size in "
                    "the headers, and the label.",
                )


def domain_sizes(domains: Domains) -> Iterator[Finding]:
    """Domains whose structures differ in mm, as bodies do not."""
    usable = {domain: _labelled(facts) for domain, facts in domains.items()}
    for first, second in combinations([d for d, f in usable.items() if len(f) >= LEAST], 2):
        sizes, voxels = [], []
        for domain in (first, second):
            spread = np.array([one.whole.spread for one in usable[domain]])
            sizes.append(np.log(spread))
            voxels.append(np.log(spread / [one.image.oriented_spacing for one in usable[domain]]))
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
        hint = (
            f" but {ratio[1]} times the voxels, so that the headers of one domain are in doubt"
            if agree.any()
            else ""
        )
        yield Finding(
            "size of domains",
            (),
            f"The structures of {first} reach over {ratio[0]} times the mm of those of {second} "
            f"(across slices × down × across){hint}: compare the voxel sizes, and state the right "
            "one in the dataset's reading.",
        )


# -- orientation ----------------------------------------------------------------------------------


def odd_orientations(domains: Domains, misfits: set[str]) -> Iterator[Finding]:
    """Cases whose structures lie as in a mirror, or as on a side."""
    for domain, facts in domains.items():
        labelled = _labelled(facts)
        patterns = _patterns(labelled)
        for index, one in enumerate(labelled):
            others = np.delete(patterns, index, 0)
            if len(others) < LEAST:
                break
            turn = _turn(patterns[index], others, _few(labelled))
            if turn:
                what = (
                    "the intensities inside do not fit either, so that the label alone is in doubt"
                    if one.case.id in misfits
                    else "look whether the label lies on its image, and check the headers of both"
                )
                yield Finding(
                    "orientation",
                    (one.case.id,),
                    f"The structures of {one.case.label} lie {turn} against other cases of "
                    f"{domain}: {what}.",
                )


def domain_orientations(domains: Domains) -> Iterator[Finding]:
    """Domains whose bodies lie differently after the dataset's reading."""
    usable = {domain: _labelled(facts) for domain, facts in domains.items()}
    for first, second in combinations([d for d, f in usable.items() if len(f) > LEAST], 2):
        few = _few(usable[first])
        turn = _turn(_median(_patterns(usable[first])), _patterns(usable[second]), few)
        if turn:
            yield Finding(
                "orientation of domains",
                (),
                f"The structures of {first} lie {turn} against those of {second}: correct the "
                "orientation or the flips in the dataset's reading.",
            )


def _patterns(cases: Sequence[_Labelled]) -> np.ndarray:
    """Where structures lie: (cases, structures, 3), from their common centre, in their own size.

    Where fewer than three structures say nothing about a side, the body's middle is one more.
    """
    made = []
    for one in cases:
        rows = [(np.nan,) * 3 if s is None else s.centre for s in one.label.structures]
        if _few(cases):
            rows.append(one.image.body)
        made.append((np.array(rows) - one.whole.centre) / np.prod(one.whole.spread) ** (1 / 3))
    return np.array(made)


def _turn(pattern: np.ndarray, others: np.ndarray, few: bool) -> str:
    """How a pattern would have to be turned to resemble the others; empty where it does."""
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
    names = ("the slices' order", "up and down", "left and right")
    swapped = [names[i] for i in range(3) if axes[i] != i]
    reversed_ = [names[i] for i in range(3) if axes[i] == i and signs[i] < 0]
    if swapped:
        return f"with other axes ({listed(swapped)} exchanged)"
    return f"reversed ({listed(reversed_)})"


# -- intensities ----------------------------------------------------------------------------------


def odd_intensities(domains: Domains) -> Iterator[Finding]:
    """Images whose intensities are distributed otherwise than those of their domain."""
    found = _verdicts(domains, lambda one: one.image.levels if one.image is not None else ())
    # The body of a narrow scan is another part of the body; the structures' surroundings are the
    # same in all. Where there are any, both have to agree.
    close = _verdicts(domains, lambda one: one.label.around if one.label is not None else ())
    for domain, facts in domains.items():
        readable = [(one.case, one.image) for one in facts if one.image is not None]
        shares = np.array([image.negative for _, image in readable])
        for index, (case, image) in enumerate(readable):
            others = np.delete(shares, index)
            usual = float(np.median(others)) if len(others) >= LEAST else np.nan
            what = found.get(case, "")
            if case in close and close[case] != what:
                what = ""
            what = what or _odd_sign(image.negative, usual, domain)
            if what:
                yield Finding(
                    "intensities",
                    (case.id,),
                    f"The intensity of {case.image} {what}: make sure that it is of this modality "
                    "and in its units.",
                )


def _verdicts(domains: Domains, levels: Callable[[CaseFacts], Sequence[float]]) -> dict[Case, str]:
    """What is odd about a case's distribution, "" for nothing; only of cases that can be compared.

    Distributions run from their 1st percentile, 0, to their 99th, 1, so that a scanner's scale and
    offset do not matter. The distance of two is the mean distance of their percentiles (the
    Wasserstein distance).
    """
    known = {d: [one for one in facts if len(levels(one))] for d, facts in domains.items()}
    curves = {d: np.array([_curve(levels(one)) for one in facts]) for d, facts in known.items()}
    verdicts: dict[Case, str] = {}
    for domain, facts in known.items():
        if len(facts) <= LEAST:
            continue
        far = _from_others(curves[domain])
        usual = float(np.median(far))
        for one, own, curve in zip(facts, far, curves[domain], strict=True):
            elsewhere = {
                other: float(np.median(np.abs(curves[other] - curve).mean(1)))
                for other in curves
                if other != domain and len(curves[other]) >= LEAST
            }
            verdicts[one.case] = _odd_distribution(own, usual, elsewhere, domain)[0]
    return verdicts


def _from_others(curves: np.ndarray) -> list[float]:
    """The median distance of each of (images, percentiles) from the others."""
    apart = np.abs(curves[:, None] - curves[None]).mean(2)
    return [float(np.median(np.delete(row, index))) for index, row in enumerate(apart)]


def _odd_distribution(
    own: float, usual: float, elsewhere: Mapping[str, float], domain: str
) -> tuple[str, str]:
    """What is odd about a distribution, and which other domain has such; "" for nothing and none.

    Args:
        own: its distance from those of its domain.
        usual: such a distance of other images of the domain.
        elsewhere: other domain → its distance from those.
        domain: the domain's name.
    """
    nearest = min(elsewhere, key=elsewhere.__getitem__, default=domain)
    near = elsewhere.get(nearest, np.inf) < _NEARER * own
    if near and own > _USUAL * usual:
        return f"is distributed as in {nearest}, and not as in {domain}", nearest
    if own > max(_UNLIKE * usual, _UNLIKE_LEAST):
        return f"is distributed otherwise than in other images of {domain}", ""
    return "", ""


def _odd_sign(share: float, usual: float, domain: str) -> str:
    """What is odd about an image's share of voxels below 0; "" for nothing."""
    if usual < _NO_NEGATIVES and share > _NEGATIVES:
        return f"is below 0 in {share:.0%} of the voxels, and in no other image of {domain}"
    if usual > _NEGATIVES and share < _NO_NEGATIVES:
        return f"is nowhere below 0, as it is in other images of {domain}"
    return ""


@dataclass(frozen=True)
class Usual:
    """How the intensities of a domain's images are distributed, without any single image.

    Args:
        curve: the median of their distributions, percentiles 1 to 99 between 0 and 1.
        spread: the usual distance between two of them.
        negative: the median share of voxels below 0.
    """

    curve: tuple[float, ...]
    spread: float
    negative: float


def usual(images: Sequence[Intensities]) -> Usual | None:
    """The sum of a domain's images; None where they are too few to tell what is usual."""
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
    """Does an image fit the domain as which it is read, by the rules of `odd_intensities`?

    Args:
        image: its distribution.
        domain: the domain's name.
        known: what is usual in each domain, None where that is not known.

    Returns:
        What is odd, "" for nothing; and the other domain that it looks like, "" for none.
    """
    own = known.get(domain)
    if own is None:
        return "", ""
    others = {name: one for name, one in known.items() if one is not None and name != domain}
    curve = _curve(image.levels)
    apart = {
        name: float(np.abs(curve - one.curve).mean())
        for name, one in {domain: own, **others}.items()
    }
    what, like = _odd_distribution(apart.pop(domain), own.spread, apart, domain)
    sign = "" if what else _odd_sign(image.negative, own.negative, domain)
    if sign:
        fitting = [
            name
            for name, one in others.items()
            if not _odd_sign(image.negative, one.negative, name)
        ]
        like = min(fitting, key=apart.__getitem__, default="")
    return what or sign, like


def odd_fits(domains: Domains) -> set[str]:
    """Ids of cases whose structures enclose other intensities than those of other cases."""
    odd = set()
    for facts in domains.values():
        labelled = [one for one in _labelled(facts) if one.label.around]
        levels = np.array([_inside(one) for one in labelled])
        for index, one in enumerate(labelled):
            others = np.delete(levels, index, 0)
            if len(others) < LEAST:
                break
            deviation = np.maximum(_deviation(others), _FIT_FLOOR)
            far = np.abs(levels[index] - _median(others)) / deviation
            least = _FIT_DEVIATIONS_OF_FEW if _few(labelled) else _FIT_DEVIATIONS
            if np.isfinite(far).any() and np.nanmedian(far) > least:
                odd.add(one.case.id)
    return odd


def _curve(levels: Sequence[float]) -> np.ndarray:
    """Percentiles 1 to 99 between 0 and 1."""
    low, high = levels[1], levels[99]
    return (np.array(levels[1:100]) - low) / (high - low) if high > low else np.zeros(99)


def _inside(one: _Labelled) -> list[float]:
    """For each structure the share of its surroundings that is darker than its median."""
    return [
        np.nan if s is None else float(np.searchsorted(one.label.around, s.level)) / 100
        for s in one.label.structures
    ]


# -- small things ---------------------------------------------------------------------------------


def _labelled(facts: Sequence[CaseFacts]) -> list[_Labelled]:
    return [
        _Labelled(one.case, one.image, one.label, one.label.whole)
        for one in facts
        if one.image is not None and one.label is not None and one.label.whole is not None
    ]


def _few(cases: Sequence[_Labelled]) -> bool:
    """Whether the dataset has too few structures for a pattern."""
    return bool(cases) and len(cases[0].label.structures) < _FEW


def _median(values: np.ndarray) -> np.ndarray:
    """Median along the first axis of what is not nan; nan where nothing else is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of a column of nan
        return np.nanmedian(values, 0)


def _deviation(values: np.ndarray) -> np.ndarray:
    """Robust standard deviation along the first axis, from the distances to the median."""
    return 1.4826 * _median(np.abs(values - _median(values)))
