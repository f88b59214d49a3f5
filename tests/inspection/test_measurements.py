"""Measurements: geometry, intensities and content, whatever the file's format."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from glua_bench.console import Progress
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.inspection.measurements import LEVELS, CaseMeasurements, gather, measure_case
from glua_bench.task import Case, DomainView, Reading, Structure

STRUCTURES = (
    Structure("A", "first", (10, 11), "#000000"),
    Structure("B", "second", (20,), "#ffffff"),
    Structure("C", "nowhere", (30,), "#00ff00"),
)
SPACING = (2.0, 3.0, 5.0)


def volume(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image and label; the first structure is a block of two values, the second one voxel."""
    image = rng.integers(-300, 900, (12, 10, 8)).astype(np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[2:6, 1:4, 3:5] = 10
    label[2:4, 1:4, 3:5] = 11
    label[9, 8, 7] = 20
    return image, label


def read(folder: Path, image: object, label: object | None, **reading: object) -> CaseMeasurements:
    """Measurements of two volumes saved in a folder."""
    paths = []
    for name, content in (("image", image), ("label", label)):
        if content is None:
            paths.append(None)
            continue
        paths.append(folder / f"{name}.nii.gz")
        if not isinstance(content, nib.Nifti1Image):
            content = nib.Nifti1Image(content, np.diag([*SPACING, 1.0]))
        nib.save(content, paths[-1])
    case = Case("a", "ct", paths[0], paths[1], "train", "a")
    return measure_case(case, DomainView("ct", Reading(**reading), STRUCTURES))  # type: ignore[arg-type]


def test_measurements_by_hand(tmp_path: Path) -> None:
    image, label = volume(np.random.default_rng(0))
    case = read(tmp_path, image, label, slice_axis=2, row_axis=1)
    found, drawn = case.image, case.label
    assert found is not None and drawn is not None and not case.image_problem + case.label_problem
    assert found.shape == (12, 10, 8) and found.spacing == SPACING
    assert found.oriented_spacing == (5.0, 3.0, 2.0)  # slices, rows, columns
    assert found.negative == pytest.approx((image < 0).mean())
    assert found.extremes == (image.min(), image.max())
    first, second, third = drawn.structures
    assert third is None and first is not None and second is not None
    assert first.ml == pytest.approx(4 * 3 * 2 * 30 / 1000) and second.ml == pytest.approx(0.03)
    middle = (np.array([8, 10, 12]) - 1) / 2
    np.testing.assert_allclose(first.centre, (np.array([3.5, 2, 3.5]) - middle) * [5, 3, 2])
    np.testing.assert_allclose(second.centre, (np.array([7, 8, 9]) - middle) * [5, 3, 2])
    # A block of n voxels of side s is as a uniform distribution over n s.
    np.testing.assert_allclose(first.spread, np.array([2 * 5, 3 * 3, 4 * 2]) / math.sqrt(12))
    assert first.level == np.median(image[2:6, 1:4, 3:5])
    assert drawn.whole is not None and drawn.whole.ml == pytest.approx(first.ml + second.ml)
    inside = image[label > 0]
    expected = [inside.mean(), inside.std(), *np.percentile(inside, (0.5, 50, 99.5))]
    np.testing.assert_allclose(drawn.inside, expected, rtol=1e-6)


def test_surroundings_show_the_same_part_of_the_body(tmp_path: Path) -> None:
    """Those of the structures and of the body are the same in a larger, padded field of view."""
    rng = np.random.default_rng(1)
    image, label = np.full((40, 40, 40), 7.0, np.float32), np.zeros((40, 40, 40), np.uint8)
    image[8:32, 8:32, 8:32] = rng.normal(100, 20, (24, 24, 24))
    label[16:24, 16:24, 16:24] = 10
    small = read(tmp_path, image, label)
    wide = [np.pad(array, 20, constant_values=array[0, 0, 0]) for array in (image, label)]
    large = read(tmp_path, *wide)
    assert small.label and large.label and small.image and large.image
    assert small.label.around == large.label.around
    np.testing.assert_array_equal(
        small.label.around, np.percentile(image[14:26, 14:26, 14:26], LEVELS, method="inverted_cdf")
    )
    np.testing.assert_allclose(small.image.levels[5:], large.image.levels[5:], atol=2)
    assert small.image.levels[5] > 40  # without the air around the body


def test_content_does_not_depend_on_how_it_is_stored(tmp_path: Path) -> None:
    image, label = volume(np.random.default_rng(2))
    affine = np.diag([*SPACING, 1.0])
    scaled = nib.Nifti1Image((image + 300).astype(np.uint16), affine)
    scaled.header.set_slope_inter(1, -300)
    variants = {
        "int16": image,
        "float64": image.astype(np.float64),
        "scaled": scaled,
        "big-endian": nib.Nifti1Image(image.astype(">i2"), affine),
        "moved": nib.Nifti1Image(image, affine @ nib.affines.from_matvec(np.eye(3), [5, 0, 0])),
    }
    found = {}
    for name, variant in variants.items():
        case = read(tmp_path, variant, label)
        assert case.image is not None and case.label is not None, case
        found[name] = case.image.content, case.image.values, case.label.content
    path = tmp_path / "image.mha"
    sitk.WriteImage(sitk.GetImageFromArray(image.T), str(path))
    other = measure_case(
        Case("a", "ct", path, None, "train", "a"), DomainView("ct", Reading(), STRUCTURES)
    ).image
    assert other is not None
    found["mha"] = other.content, other.values, found["int16"][2]
    assert len(set(found.values())) == 1, found


def test_order_tells_contents_apart_and_values_together(tmp_path: Path) -> None:
    image, label = volume(np.random.default_rng(3))
    measured = [
        read(tmp_path, array, None).image
        for array in (image, image[::-1], image.transpose(2, 0, 1), image + 1, image.astype("f4"))
    ]
    contents, values = ([getattr(f, name) for f in measured] for name in ("content", "values"))
    assert len(set(contents)) == 4 and contents[4] == contents[0]
    assert len(set(values)) == 2 and values[3] not in (*values[:3], values[4])


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    image = np.random.default_rng(4).normal(size=(6, 6, 6)).astype(np.float32)
    image[0] = 0.0
    plus = read(tmp_path, image, None).image
    image[0] = -0.0
    assert read(tmp_path, image, None).image == plus


@pytest.mark.parametrize("axis", range(3))
def test_flat_slices_at_the_ends_and_between(tmp_path: Path, axis: int) -> None:
    image, label = volume(np.random.default_rng(5))
    view = np.moveaxis(image, axis, 0)
    view[:2] = 5
    view[4] = -7  # each slice has a value of its own
    case = read(tmp_path, image, label, slice_axis=2, row_axis=1, flip=(axis,))
    assert case.image is not None and case.label is not None
    oriented = 2 - axis  # (Z, Y, X)
    assert case.image.gaps[oriented] == 1 and sum(case.image.gaps) == 1
    assert case.image.flat[oriented] == pytest.approx(2 / image.shape[axis])
    lost = (np.moveaxis(label, axis, 0)[[0, 1, 4]] > 0).sum() / (label > 0).sum()
    assert case.label.blank == pytest.approx(lost) and (axis == 2 or lost > 0)


def test_what_cannot_be_read_is_told_once_and_by_its_file(tmp_path: Path) -> None:
    image, label = volume(np.random.default_rng(6))
    case = read(tmp_path, image, label)
    broken = case.case
    broken.image.write_bytes(b"no volume")
    case = measure_case(broken, DomainView("ct", Reading(), STRUCTURES))
    assert case.image is None and case.label is None
    assert str(broken.image) in case.image_problem and case.label_problem == ""
    # Damaged voxels leave the header, so the label is judged, without intensities.
    case = read(tmp_path, np.where(image > 800, np.nan, image), label)
    assert "NaN" in case.image_problem and case.image is None
    assert case.label is not None and case.label.inside is None and case.label.around == ()
    assert case.label.structures[0] is not None and math.isnan(case.label.structures[0].level)


def test_gather_keeps_the_order_of_the_dataset(phantom_root: Path) -> None:
    data = Phantom(phantom_root)
    expected = [case for domain in data.domains() for case in data.cases(domain)]
    for jobs in (1, 2):
        measured = gather(data, jobs, Progress(enabled=False))
        assert [one.case for one in measured] == expected
        assert all(one.image and one.label for one in measured)
