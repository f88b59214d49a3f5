"""inspection/windows.py: windows that clip a structure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glua_bench.inspection.windows import (
    clipped_structures,
    clipping,
    common_levels,
    outward,
    widened,
)
from glua_bench.task import DomainView, Reading, Structure


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


@pytest.mark.parametrize("directions", [("mr-ct",), ("ct-mr",)])
def test_no_test_label_enters_a_proposed_window(directions: tuple[str, ...]) -> None:
    """Test cases are checked too; the window is from training cases, and said to be from labels."""
    view = DomainView("ct", Reading(intensity_range=(-125, 275)), (Structure("A", "a", (1,), ""),))
    dataset: Any = SimpleNamespace(
        domains=lambda: ("ct",), view=lambda domain: view, directions=directions
    )

    def case(split: str, high: float) -> Any:
        found = SimpleNamespace(ml=1.0, outside=0.5, inside=(0.0, high))
        label = SimpleNamespace(structures=[found])
        return SimpleNamespace(case=SimpleNamespace(domain="ct", split=split), label=label)

    measured = [case("train", 400), case("val", 900), case("test", 2500)]
    (finding,) = clipped_structures(measured, dataset)
    assert "[-125, 400] would contain them" in finding.text
    assert ("state that under 'protocol'" in finding.text) == (directions == ("mr-ct",))
    (finding,) = clipped_structures(measured[2:], dataset)
    assert "clips 50%" in finding.text and "no training case has it" in finding.text
