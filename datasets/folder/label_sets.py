"""Label values of public datasets, for proposals of structure names.

A set is proposed only where it explains every value found. Sets of small consecutive numbers agree
with many datasets, and are proposed only if the files' paths name the dataset.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

Values = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LabelSet:
    """The label values of a public dataset.

    Attributes:
        name: name of the dataset.
        words: words in paths that name it.
        values: structure → raw label values.
        distinct: True if no other dataset uses these values.
        least: minimum number of the values that must occur, if not all.
    """

    name: str
    words: tuple[str, ...]
    values: Values
    distinct: bool = False
    least: int | None = None


def _numbered(*titles: str) -> Values:
    return {title: (value,) for value, title in enumerate(titles, start=1)}


# Usual abbreviations, as names of classes.
SHORT = {
    "left ventricular myocardium": "MYO",
    "left ventricle": "LV",
    "right ventricle": "RV",
    "left atrium": "LA",
    "right atrium": "RA",
    "aorta": "AO",
    "ascending aorta": "AA",
    "pulmonary artery": "PA",
    "liver": "LIV",
    "spleen": "SPL",
    "right kidney": "RK",
    "left kidney": "LK",
}
_ABDOMEN = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver")
SETS = (
    LabelSet(
        "MM-WHS",
        ("mmwhs", "whs"),
        {
            "left ventricular myocardium": (205,),
            "left atrium": (420, 421),  # 421 is a stray value in one case of some releases
            "left ventricle": (500,),
            "right atrium": (550,),
            "right ventricle": (600,),
            "ascending aorta": (820,),
            "pulmonary artery": (850,),
        },
        distinct=True,
        least=2,
    ),
    LabelSet(
        "MS-CMRSeg",
        ("mscmr", "cmrseg"),
        {
            "left ventricular myocardium": (200,),
            "left ventricle": (500,),
            "right ventricle": (600,),
        },
        distinct=True,
        least=2,
    ),
    LabelSet(
        "CHAOS",
        ("chaos",),
        {"liver": (63,), "right kidney": (126,), "left kidney": (189,), "spleen": (252,)},
        distinct=True,
        least=2,
    ),
    LabelSet(
        "BTCV",
        ("btcv", "synapse"),
        {"spleen": (1,), "right kidney": (2,), "left kidney": (3,), "liver": (6,)},
        distinct=True,
    ),
    LabelSet(
        "BTCV",
        ("btcv", "synapse"),
        _numbered(
            *_ABDOMEN,
            *("stomach", "aorta", "inferior vena cava", "portal and splenic vein", "pancreas"),
            *("right adrenal gland", "left adrenal gland"),
        ),
        least=2,
    ),
    LabelSet(
        "FLARE22",
        ("flare", "flare22"),
        _numbered(
            *("liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava"),
            *("right adrenal gland", "left adrenal gland", "gallbladder", "esophagus", "stomach"),
            *("duodenum", "left kidney"),
        ),
        least=2,
    ),
    LabelSet(
        "AMOS",
        ("amos", "amos22"),
        _numbered(
            *_ABDOMEN,
            *("stomach", "aorta", "inferior vena cava", "pancreas", "right adrenal gland"),
            *("left adrenal gland", "duodenum", "bladder", "prostate or uterus"),
        ),
        least=2,
    ),
    LabelSet(
        "ACDC",
        ("acdc",),
        _numbered("right ventricle", "left ventricular myocardium", "left ventricle"),
    ),
    LabelSet(
        "M&Ms",
        ("mnms", "mms", "mnms2"),
        _numbered("left ventricle", "left ventricular myocardium", "right ventricle"),
    ),
    LabelSet(
        "BraTS 2012-2021",
        ("brats", "brats2021", "brats2020", "brats2019", "brats2018"),
        {"necrotic core": (1,), "edema": (2,), "enhancing tumour": (4,)},
        distinct=True,
    ),
    LabelSet(
        "BraTS 2023",
        ("brats", "brats2023", "bratsgli"),
        _numbered("necrotic core", "edema", "enhancing tumour"),
    ),
    LabelSet(
        "TotalSegmentator heartchambers",
        ("totalsegmentator", "totalseg", "heartchambers"),
        _numbered(
            *("left ventricular myocardium", "left atrium", "left ventricle", "right atrium"),
            *("right ventricle", "aorta", "pulmonary artery"),
        ),
    ),
)


def known_sets(values: Collection[int]) -> list[LabelSet]:
    """Return the public datasets whose label values explain all values found."""
    made, found = [], set(values)
    for one in SETS:
        known = {value for own in one.values.values() for value in own}
        occurring = sum(bool(set(own) & found) for own in one.values.values())
        if found <= known and occurring >= (one.least or len(one.values)):
            made.append(one)
    return made


def proposed_set(values: Collection[int], paths: Iterable[str]) -> LabelSet | None:
    """Return the only public dataset that the values and paths agree with, else None.

    Args:
        values: nonzero label values found in the files.
        paths: paths of the files, which may name a dataset.
    """
    known = known_sets(values)
    words = {word for path in paths for word in re.split(r"[^a-z0-9]+", path.lower())}
    named = [one for one in known if set(one.words) & words]
    distinct = [one for one in known if one.distinct]
    for chosen in (named, distinct):
        meanings = {tuple(sorted(explained(one, values).items())) for one in chosen}
        if len(meanings) == 1:
            return chosen[0]
    return None


def explained(one: LabelSet, values: Collection[int]) -> Values:
    """Return the structures of a set that occur, with the values that occur."""
    kept = {title: tuple(v for v in own if v in values) for title, own in one.values.items()}
    return {title: own for title, own in kept.items() if own}
