"""neighbours.py: which slices a network sees, and that a neighbour is as far in every volume."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glua_bench.data import neighbours
from glua_bench.data.neighbours import ALONE, Neighbourhood, common_distance, middle

numbers_of_slices = st.sampled_from([1, 3, 5, 7])
mm = st.floats(0.3, 15)


def of(slices: int, distance: float) -> Neighbourhood:
    return Neighbourhood(slices, None if slices == 1 else distance)


@given(numbers_of_slices, mm, st.integers(1, 40), mm)
def test_a_stack_is_its_slice_amid_evenly_spaced_ones_of_its_volume(
    slices: int, distance: float, depth: int, spacing: float
) -> None:
    neighbourhood = of(slices, distance)
    numbers, step = neighbourhood.numbers(depth, spacing), neighbourhood.step(spacing)
    assert numbers.shape == (depth, slices) and numbers.dtype == np.int64
    for z, stack in enumerate(numbers.tolist()):
        wanted = [z + step * beside for beside in range(-(slices // 2), slices // 2 + 1)]
        assert stack == [min(max(number, 0), depth - 1) for number in wanted]
        assert stack[slices // 2] == z


@given(mm, mm)
def test_the_distance_is_met_within_a_third_by_slices_that_are_no_thicker(
    distance: float, spacing: float
) -> None:
    step = Neighbourhood(3, distance).step(spacing)
    if spacing <= distance:
        assert 2 / 3 - 1e-6 <= step * spacing / distance <= 4 / 3 + 1e-6
        nearest = min(range(1, 60), key=lambda n: abs(n * spacing - distance))
        assert abs(step - nearest) <= 1  # of two that are as near, the larger
        assert abs(step * spacing - distance) <= abs(nearest * spacing - distance) + 1e-6
    else:
        assert step == 1  # there is no slice in between


def test_thin_and_thick_slices_have_neighbours_at_one_distance() -> None:
    """1 mm CT and 8 mm MR: eight slices away in one, the next one in the other."""
    neighbourhood = Neighbourhood(3, 8.0)
    assert neighbourhood.numbers(20, 1.0)[10].tolist() == [2, 10, 18]
    assert neighbourhood.numbers(20, 8.0)[10].tolist() == [9, 10, 11]
    assert neighbourhood.numbers(20, 7.9999995)[10].tolist() == [9, 10, 11]  # a header's rounding


def test_one_slice_has_no_neighbours_whatever_the_spacing() -> None:
    assert ALONE.slices == 1 and ALONE.numbers(3, 0.1).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(("slices", "distance"), [(2, 1.0), (0, None), (3, None), (3, 0.0)])
def test_what_makes_no_stack_is_refused(slices: int, distance: float | None) -> None:
    with pytest.raises(ValueError, match=r"odd number|distance in mm"):
        Neighbourhood(slices, distance)


def test_the_examples_hold() -> None:
    found = doctest.testmod(neighbours)
    assert found.attempted > 3 and found.failed == 0


def test_it_is_told_in_words() -> None:
    assert (str(ALONE), str(Neighbourhood(5, 4.0))) == ("1", "5, 4 mm apart")


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ([[1.0] * 5, [8.0] * 5], 8.0),
        ([[8.0] * 5, [1.0] * 5], 8.0),  # whichever is the source
        ([[5.0, 5.0], [8.0, 8.0, 13.0]], 8.0),  # one thick volume does not decide
        ([[5.0, 6.0], [1.0]], 5.5),
        ([[2.0000004], [1.0]], 2.0),
    ],
)
def test_the_common_distance_is_a_typical_one_of_the_thicker_domain(
    domains: list[list[float]], expected: float
) -> None:
    assert common_distance(domains) == expected


def test_stacks_are_read_one_by_one(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(size=(9, 4, 5)).astype(np.float16)
    np.save(tmp_path / "volume.npy", volume)
    mapped = np.load(tmp_path / "volume.npy", mmap_mode="r")
    neighbourhood = Neighbourhood(3, 4.0)
    for source in (volume, mapped):
        stacks = neighbourhood.stacks(source, 2.0)
        assert len(stacks) == 9
        for z in range(9):
            expected = volume[[max(z - 2, 0), z, min(z + 2, 8)]]
            assert np.array_equal(stacks[z], expected) and stacks[z].shape == (3, 4, 5)


def test_stacks_hold_the_slices_of_each_channel_in_turn() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 9, 4, 5))
    neighbourhood = Neighbourhood(3, 2.0)
    stacks = neighbourhood.stacks(first, 2.0, second)
    for z in range(9):
        expected = [neighbourhood.stacks(one, 2.0)[z] for one in (first, second)]
        assert np.array_equal(stacks[z], np.concatenate(expected))
    images = torch.arange(6).view(1, 6, 1, 1)
    assert middle(images, 3).item() == 1  # of the first channel
    assert middle(images[:, :1], 3).item() == 0  # a map with one plane
    assert middle(images[:, :2], 1).item() == 0


@pytest.mark.parametrize("slices", [1, 3, 5])
def test_the_middle_slice_is_the_labelled_one(slices: int) -> None:
    images = torch.arange(slices).view(1, slices, 1, 1).expand(2, slices, 4, 4)
    for kind in (images, images.numpy()):
        shown = middle(kind, slices)
        assert tuple(shown.shape) == (2, 1, 4, 4) and bool((shown == slices // 2).all())
