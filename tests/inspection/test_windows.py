"""inspection/windows.py: windows that clip a structure."""

from __future__ import annotations

import numpy as np
import pytest

from glua_bench.inspection.windows import clipping, common_levels, outward, widened


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-63, 218, (-75, 225)), (-1.23, 4.41, (-1.3, 4.5)), (0, 5, (0, 5)), (7, 7, (7, 7))],
)
def test_windows_are_rounded_outwards(low: float, high: float, expected: tuple) -> None:
    found = outward(low, high)
    assert found == pytest.approx(expected, abs=1e-5) and found[0] <= low and found[1] >= high


def test_only_the_clipping_end_of_a_window_moves() -> None:
    assert widened((-125, 275), (20, 410)) == (-125, 425)
    assert widened((0, 275), (-30, 200)) == (-50, 275)


def test_the_sentence_names_structure_share_domain_and_a_window_that_keeps_it() -> None:
    assert clipping("ct", "AA (aorta)", 0.432, (-125, 275), (180, 480)) == (
        "The window [-125, 275] of ct clips 43% of the voxels of AA (aorta): the window "
        "[-125, 500] would contain them."
    )


def test_a_small_structure_has_the_weight_of_a_large_one() -> None:
    large, small = np.full(10_000, 60.0), np.linspace(300, 400, 101)
    low, high = common_levels({"liver": large, "aorta": small}) or (0, 0)
    assert low == 60 and high == pytest.approx(399.5)
    assert common_levels({"liver": np.empty(0)}) is None
