"""folder/label_sets.py: label values of public datasets."""

from __future__ import annotations

import pytest

from glua_bench.datasets.folder.label_sets import SETS, explained, known_sets, proposed_set
from glua_bench.datasets.mmwhs_layout import MMWHSLayout
from glua_bench.datasets.mscmr import MSCMR


@pytest.mark.parametrize(
    ("values", "paths", "name"),
    [
        ((205, 420, 421, 500, 550, 600, 820, 850), (), "MM-WHS"),
        ((205, 500), (), "MM-WHS"),
        ((200, 500, 600), (), "MS-CMRSeg"),
        ((63, 126, 189, 252), (), "CHAOS"),
        ((1, 2, 3, 6), (), "BTCV"),
        ((1, 2, 4), (), "BraTS 2012-2021"),
        # Small consecutive numbers mean something only where the dataset is named.
        ((1, 2, 3), (), None),
        ((1, 2, 3), ("data/ACDC/patient001_gt.nii.gz",), "ACDC"),
        ((1, 2, 3), ("mnms/x.nii.gz",), "M&Ms"),
        (range(1, 14), (), None),
        (range(1, 14), ("btcv/x.nii.gz",), "BTCV"),
        (range(1, 14), ("FLARE22/x.nii.gz",), "FLARE22"),
        (range(1, 16), ("amos22/x.nii.gz",), "AMOS"),
        (range(1, 8), ("TotalSegmentator/x.nii.gz",), "TotalSegmentator heartchambers"),
        # A value that the set does not know.
        ((200, 500, 600, 7), (), None),
        ((1,), (), None),
    ],
)
def test_sets_are_proposed_where_they_explain_all_values(
    values: tuple[int, ...], paths: tuple[str, ...], name: str | None
) -> None:
    found = proposed_set(values, paths)
    assert (found.name if found else None) == name
    if found is not None:
        assert {v for own in explained(found, values).values() for v in own} == set(values)


def test_sets_agree_with_the_datasets_of_the_benchmark() -> None:
    known = {one.name: one.values for one in SETS}
    of_mscmr = {s.values for s in MSCMR.structures}
    assert of_mscmr == set(known["MS-CMRSeg"].values())
    of_mmwhs = {value for s in MMWHSLayout.structures for value in s.values}
    assert of_mmwhs <= {value for own in known["MM-WHS"].values() for value in own}


def test_no_set_uses_a_value_twice() -> None:
    for one in SETS:
        values = [value for own in one.values.values() for value in own]
        assert len(values) == len(set(values)) and 0 not in values
    assert {one.name for one in known_sets((1, 2, 3))} >= {"ACDC", "M&Ms", "BraTS 2023"}
