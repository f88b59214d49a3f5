"""metrics.py: agreement with medpy, and empty masks."""

import doctest
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import reference_metrics

from glua_bench.scoring import metrics
from glua_bench.scoring.metrics import METRICS, MaskPair, case_metrics, distance_penalty
from glua_bench.task import Structure

A, B, C = (Structure(name, name, (value,), "#000000") for value, name in enumerate("ABC", 1))
SPACINGS = st.floats(0.1, 12.0)


def pair(prediction, reference, spacing) -> MaskPair:
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    return MaskPair(prediction, reference, spacing, distance_penalty(prediction.shape, spacing))


def values(*arguments) -> tuple[float, float, float]:
    """Return Dice, ASSD and HD95."""
    scores = pair(*arguments).scores()
    return scores["dice"], scores["assd"], scores["hd95"]


@st.composite
def masks(draw) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Draw two masks that are not empty, from single voxels to full arrays, in 2-D or 3-D."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9))
    pair = []
    for _ in range(2):
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        mask = rng.random(shape) < draw(st.sampled_from([0.02, 0.3, 0.7, 1.0]))
        mask[tuple(rng.integers(0, length) for length in shape)] = True
        pair.append(mask)
    return pair[0], pair[1], tuple(draw(SPACINGS) for _ in shape)


@settings(max_examples=150, deadline=None)
@given(masks())
def test_values_are_medpys(example):
    prediction, reference, spacing = example
    found = values(prediction, reference, spacing)
    expected = reference_metrics(prediction, reference, spacing)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, (5, 7, 6), elements=st.integers(0, 3)),
    hnp.arrays(np.uint8, (5, 7, 6), elements=st.integers(0, 3)),
    st.tuples(SPACINGS, SPACINGS, SPACINGS),
)
def test_a_case_is_its_structures_one_by_one(prediction, reference, spacing):
    """Metrics of a case equal those of each pair of masks."""
    rows = case_metrics(prediction, reference, (A, B, C), spacing)
    assert [row["structure"] for row in rows] == ["A", "B", "C"]
    for label, row in enumerate(rows, start=1):
        p, r = prediction == label, reference == label
        found = row["dice"], row["assd"], row["hd95"]
        np.testing.assert_allclose(found, values(p, r, spacing), atol=1e-9)
        assert row["missed"] == (r.any() and not p.any())
        assert row["false_alarm"] == (p.any() and not r.any())
        ml = np.prod(spacing) / 1000
        assert row["reference_ml"] == pytest.approx(r.sum() * ml)
        assert row["prediction_ml"] == pytest.approx(p.sum() * ml)


def ball(shape, centre, radii) -> np.ndarray:
    grid = np.indices(shape)
    return (
        sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True)) <= 1
    )  # fmt: skip


def test_surfaces_are_those_of_face_neighbours():
    """Single voxels, and masks that depend on medpy's connectivity, with anisotropic voxels."""
    spacing, speck, far = (0.5, 3.0, 7.0), np.zeros((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    speck[0, 0, 0] = far[2, 3, 4] = True
    expected = reference_metrics(speck, far, spacing)
    found = values(speck, far, spacing)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[1] == pytest.approx(distance_penalty(speck.shape, spacing))

    whole = np.ones((7, 7, 7), bool)
    notched = whole.copy()
    notched[:2, :2, :2] = False  # the voxel inside the notch touches it by a corner alone
    found = values(notched, whole, spacing)[1:]
    assert found == pytest.approx(reference_metrics(notched, whole, spacing)[1:], abs=1e-9)
    assert abs(found[0] - reference_metrics(notched, whole, spacing, connectivity=3)[1]) > 1e-3


def test_organ_like_structures_are_medpys_too():
    """A shell around a cavity and a blob, with anisotropic voxels and a shifted prediction."""
    spacing = (5.0, 0.74, 0.74)
    labels = []
    for shift in (0, 2):
        volume = np.zeros((14, 70, 70), np.uint8)
        volume[ball(volume.shape, (6, 30 + shift, 34), (5, 20, 18))] = 1
        volume[ball(volume.shape, (6, 30 + shift, 34 - shift), (4, 13, 12))] = 2
        volume[ball(volume.shape, (7, 40, 62 - 2 * shift), (5, 15, 7))] = 3
        labels.append(volume)
    for label, row in enumerate(case_metrics(*labels, (A, B, C), spacing), start=1):
        expected = reference_metrics(labels[0] == label, labels[1] == label, spacing)
        found = row["dice"], row["assd"], row["hd95"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
        assert 0.5 < row["dice"] < 1 and row["assd"] > 0.1


def test_known_distances():
    """Two plates are 3 voxels of 2 mm apart."""
    one, other = np.zeros((6, 4), bool), np.zeros((6, 4), bool)
    one[0], other[3] = True, True
    assert pair(one, other, (2.0, 1.0)).distances.tolist() == [6.0] * 8
    assert values(one, other, (2.0, 1.0)) == (0.0, 6.0, 6.0)


def test_surface_is_the_mask_without_its_inside():
    """The number of pooled distances is that of surface voxels, without the interior."""
    cube = np.ones((5, 5, 5), bool)
    assert len(pair(cube, cube, (1, 1, 1)).distances) == 2 * (125 - 27)


def test_nothing_to_find_is_undefined():
    empty = np.zeros((3, 4, 5), np.uint8)
    row = case_metrics(empty, empty, (A,), (1, 1, 1))[0]
    assert all(math.isnan(row[name]) for name in ("dice", "assd", "hd95"))
    assert not row["missed"] and not row["false_alarm"]
    assert all(math.isnan(value) for value in values(empty, empty, (1, 1, 1)))


@pytest.mark.parametrize("missed", [True, False])
def test_miss_and_false_alarm_cost_the_diagonal(missed):
    empty, full = np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 5), np.uint8)
    full[1, 1, 1] = 1
    spacing = (2.0, 3.0, 1.0)
    masks = (empty, full) if missed else (full, empty)
    row = case_metrics(*masks, (A,), spacing)[0]
    diagonal = math.sqrt(4**2 + 9**2 + 4**2)
    assert (row["dice"], row["assd"], row["hd95"]) == values(*masks, spacing)
    assert row["dice"] == 0.0 and row["assd"] == row["hd95"]
    assert row["assd"] == distance_penalty((3, 4, 5), spacing) == pytest.approx(diagonal)
    assert (row["missed"], row["false_alarm"]) == (missed, not missed)
    assert (row["reference_ml"] > 0, row["prediction_ml"] > 0) == (missed, not missed)


@settings(max_examples=50, deadline=None)
@given(masks())
def test_no_distance_exceeds_the_penalty(example):
    """Omitting a structure never improves a score."""
    prediction, reference, spacing = example
    limit = distance_penalty(prediction.shape, spacing) + 1e-9
    assert pair(prediction, reference, spacing).distances.max() <= limit


@settings(max_examples=50, deadline=None)
@given(masks())
def test_order_of_the_masks_does_not_matter(example):
    prediction, reference, spacing = example
    turned = values(reference, prediction, spacing)
    assert values(prediction, reference, spacing) == pytest.approx(turned)


def test_unfit_arguments_are_refused():
    small, large = np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match="differ in shape"):
        case_metrics(small, large, (A,), (1, 1))
    with pytest.raises(ValueError, match="Spacing"):
        case_metrics(small, small, (A,), (1, 1, 1))
    with pytest.raises(ValueError, match="Spacing"):
        pair(small + 1, small + 1, (1, 0))
    with pytest.raises(ValueError, match="not empty"):
        _ = pair(small, small + 1, (1, 1)).distances
    for wrong in (small + 2, small.astype(np.int8) - 1, small.astype(float)):
        with pytest.raises(ValueError, match="class indices"):
            case_metrics(wrong, small, (A,), (1, 1))


def test_one_query_serves_every_metric_of_a_structure(monkeypatch):
    queries = []
    monkeypatch.setattr(metrics, "_one_way", lambda *_: queries.append(1) or np.array([1.0, 3.0]))
    one = np.array([[[1, 0, 0, 0]]], np.uint8)
    (row,) = case_metrics(one, one[..., ::-1], (A,), (1, 1, 1))
    assert len(queries) == 2 and row["assd"] == 2.0  # one in each direction


def test_values_are_printed_in_their_units():
    dice, assd, hd95 = METRICS.values()
    assert (dice.label, dice.heading, dice.key, dice.scale) == ("Dice", "Dice (%)", "dice", 100)
    assert (assd.label, assd.heading, assd.key) == ("ASSD mm", "ASSD (mm)", "assd_mm")
    assert (dice.text(0.81237), hd95.text(4.26)) == ("0.812", "4.3")
    assert hd95.text(None) == assd.text(math.nan) == "–"


def test_medpy_is_not_needed_to_score():
    """medpy is GPL-3: scoring must not import it."""
    script = (
        "import sys, numpy as np\n"
        "from glua_bench.scoring.metrics import case_metrics\n"
        "from glua_bench.task import Structure\n"
        "a = np.ones((2, 2, 2), int)\n"
        "case_metrics(a, a, [Structure('A', 'A', (1,), '')], (1, 1, 1))\n"
        "assert not any(name.split('.')[0] == 'medpy' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_docstring_examples_run():
    outcome = doctest.testmod(metrics)
    assert outcome.attempted >= 8 and outcome.failed == 0
