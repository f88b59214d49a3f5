"""volumes.py: voxels keep their place and meaning on the way in and on the way back."""

import errno
import gzip
import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from refusals import refused
from scipy import ndimage
from scipy.spatial.transform import Rotation

from glua_bench.data import volumes
from glua_bench.data.formats import Forms, open_volume
from glua_bench.data.geometry import frame, max_displacement, second_form
from glua_bench.data.resampling import Placement
from glua_bench.data.volumes import (
    load_image,
    load_label,
    read_label_volume,
    restore,
    save_labels,
    save_maps,
    slice_distance,
)
from glua_bench.errors import DataError, RunFailure
from glua_bench.scoring.metrics import case_metrics
from glua_bench.task import UNANNOTATED, DomainView, Grid, Reading, Structure

STRUCTURES = (
    Structure("A", "shell", (205,), "#000000"),
    Structure("B", "core", (500, 501), "#000000"),
)
VIEW = DomainView("ct", Reading(), STRUCTURES)
PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CODES = [
    a + b + c
    for x, y, z in ("LAS", "RAS", "LPI", "RPS")
    for a, b, c in ((x, y, z), (x, z, y), (y, x, z), (y, z, x), (z, x, y), (z, y, x))
]


def write(path: Path, data: np.ndarray, spacing=(1.0, 1.0, 1.0), affine=None) -> Path:
    """A NIfTI file, RAS with the given spacing unless an affine is given."""
    nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0]) if affine is None else affine), path)
    return path


def reoriented(path: Path, codes: str, target: Path) -> Path:
    """The same volume in world space with other axes in the file."""
    image = nib.load(path)
    change = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(codes))
    data = apply_orientation(np.asarray(image.dataobj), change)
    affine = image.affine @ inv_ornt_aff(change, image.shape)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(data), affine), target)
    return target


def heart(shape=(30, 28, 20), spacing=(1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """An image without symmetry and its raw labels: a core inside a shell."""
    axes = np.meshgrid(
        *(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    extent = np.array(shape) * spacing
    centre = extent * (0.45, 0.55, 0.5)
    r = np.sqrt(
        sum(((x - c) / (0.36 * e)) ** 2 for x, c, e in zip(axes, centre, extent, strict=True))
    )
    raw = np.zeros(shape, np.int16)
    raw[r < 1] = 205
    raw[r < 0.62] = 500
    image = 100 + axes[0] + 2 * axes[1] - axes[2] + 300 * (raw == 500) + 150 * (raw == 205)
    return image.astype(np.float32), raw


def onehot(labels: np.ndarray, count: int = 3) -> np.ndarray:
    return np.moveaxis(np.eye(count, dtype=np.float32)[labels], -1, 0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@PROPERTY
@given(
    codes=st.sampled_from(CODES),
    canonical=st.booleans(),
    axes=st.permutations([0, 1, 2]),
    flip=st.sets(st.integers(0, 2)),
    spacing=st.tuples(*[st.floats(0.6, 2.5)] * 3),
    coarser=st.sampled_from([0.5, 0.8, 1.0, 1.25]),
)
def test_labels_return_to_the_files_own_voxels(
    tmp_path, codes, canonical, axes, flip, spacing, coarser
):
    """Grid and back: unchanged at the file's own pixels, nearly so at others, wherever it lies."""
    image, raw = heart((24, 30, 26), spacing)
    files = []
    for name, data in (("image", image), ("label", raw)):
        straight = write(tmp_path / f"{name}_ras.nii", data, spacing)
        files.append(reoriented(straight, codes, tmp_path / f"{name}.nii"))
    reading = Reading(
        "canonical" if canonical else "stored", axes[0], axes[1], tuple(sorted(flip)), None
    )
    pixel = coarser * min(spacing)
    grid = Grid(int(np.ceil(32 * max(spacing) / pixel)), pixel)

    placement = load_image(files[0], reading, grid).placement
    labels = load_label(files[1], files[0], DomainView("ct", reading, STRUCTURES), placement)
    original = read_label_volume(files[1], files[0], DomainView("ct", reading, STRUCTURES))
    restored = restore(onehot(labels), placement)

    stored = np.asarray(nib.load(files[1]).dataobj)
    assert np.array_equal(original, np.select([stored == 205, stored == 500], [1, 2], 0))
    assert restored.shape == original.shape
    in_plane = [placement.step[axis] for axis in (1, 2)]
    if in_plane == [1.0, 1.0]:
        assert np.array_equal(restored, original)
    for label in (1, 2):
        assert dice(restored == label, original == label) > 0.9
    np.testing.assert_allclose(placement.spacing, nib.load(files[0]).header.get_zooms(), rtol=1e-5)


@PROPERTY
@given(codes=st.sampled_from(CODES), flip=st.sets(st.integers(0, 2)), slices=st.booleans())
def test_canonical_reading_does_not_see_the_axes_of_the_file(tmp_path, codes, flip, slices):
    image, raw = heart(spacing=(1.1, 0.9, 1.6))
    reading = Reading("canonical", 2, 1, tuple(sorted(flip)))
    grid = Grid(26, 1.3, 2.0 if slices else None)
    views = []
    for name in ("straight", codes):
        files = []
        for kind, data in (("image", image), ("label", raw)):
            straight = write(tmp_path / f"{kind}_ras.nii", data, (1.1, 0.9, 1.6))
            files.append(
                reoriented(
                    straight, "RAS" if name == "straight" else name, tmp_path / f"{kind}_{name}.nii"
                )
            )
        loaded = load_image(files[0], reading, grid)
        labels = load_label(
            files[1], files[0], DomainView("ct", reading, STRUCTURES), loaded.placement
        )
        views.append((loaded.voxels, labels))
    np.testing.assert_allclose(views[0][0], views[1][0], atol=1e-4)
    assert np.mean(views[0][1] != views[1][1]) < 1e-3  # ties may break differently


@pytest.mark.parametrize("pixel", [0.5, 1.0, 1.6, 3.1])
def test_working_voxels_lie_where_their_millimetres_say(tmp_path, pixel):
    """A round spot at a known place is found there at every pixel size."""
    spacing, shape, spot = (0.7, 1.1, 3.0), (60, 50, 9), (23.4, 31.7)
    x, y, _ = np.indices(shape) * np.reshape(spacing, (3, 1, 1, 1))
    data = np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 18) * 100
    file = write(tmp_path / "a.nii", data.astype(np.float32), spacing)
    reading = Reading(flip=(0,), percentiles=(0, 100))
    loaded = load_image(file, reading, Grid(round(56 / pixel), pixel))
    weights = loaded.voxels[4] + 1.0
    for axis, index, expected in ((1, 1, spot[1]), (2, 0, 59 * 0.7 - spot[0])):
        place = loaded.placement
        at = (place.offset[axis] + place.step[axis] * np.arange(place.shape[axis])) * spacing[index]
        np.testing.assert_allclose(np.diff(at), pixel, rtol=1e-6)
        found = (weights.sum(2 - axis) * at).sum() / weights.sum()
        assert abs(found - expected) < 0.05


def test_equal_spacing_copies_voxels(tmp_path):
    """At the file's own pixels, a slice is clipped and scaled, nothing else."""
    rng = np.random.default_rng(0)
    data = rng.normal(100, 20, (33, 32, 5)).astype(np.float32)
    reading = Reading("stored", 2, 1, (), (0.74, 0.74, 5.0), percentiles=(0, 100))
    loaded = load_image(write(tmp_path / "a.nii", data, (1.2, 1.2, 9)), reading, Grid(32, 0.7403))
    body = np.sort(data.ravel())
    low, high = body[1], body[-1]
    expected = np.clip((data - low) / (high - low) * 2 - 1, -1, 1).transpose(2, 1, 0)
    start = int(loaded.placement.offset[2])
    assert start in (0, 1)
    np.testing.assert_allclose(loaded.voxels, expected[:, :, start : start + 32], atol=1e-5)
    assert loaded.placement.spacing == (0.74, 0.74, 5.0)


def test_coarser_pixels_average_what_they_cover(tmp_path):
    """A pattern finer than the grid becomes grey, not a false pattern."""
    data = np.indices((64, 64, 3)).sum(0) % 2 * 100.0
    data[0, 0, 0] = -5
    loaded = load_image(
        write(tmp_path / "a.nii", data.astype(np.float32)), Reading(), Grid(16, 4.0)
    )
    assert np.abs(loaded.voxels[:, 2:-2, 2:-2]).max() < 0.05


def ct(shape=(150, 120, 12), centre=(45, 70)) -> np.ndarray:
    """A body off the centre, a couch below it, air around, padding outside the scanner's circle."""
    rng = np.random.default_rng(1)
    x, y, _ = np.indices(shape)
    data = np.full(shape, -1000.0)
    body = ((x - centre[0]) / 32) ** 2 + ((y - centre[1]) / 24) ** 2 < 1
    lung = ((x - centre[0] + 12) / 9) ** 2 + ((y - centre[1]) / 12) ** 2 < 1
    data[body], data[lung] = 40, -850
    data[10:140, 12:14] = -200
    data += rng.normal(0, 15, shape)
    data[(x - 75) ** 2 + (y - 60) ** 2 > 90**2] = -3024
    return data.astype(np.float32)


def test_window_is_centred_on_the_body(tmp_path):
    loaded = load_image(write(tmp_path / "ct.nii", ct()), Reading(), Grid(64, 1.0))
    _, y, x = (
        offset + step * (n - 1) / 2
        for offset, step, n in zip(
            loaded.placement.offset, loaded.placement.step, loaded.placement.shape, strict=True
        )
    )
    assert abs(x - 45) < 5 and abs(y - 70) < 5
    assert x - 31.5 >= 0  # moved so far only that no pixel lies beyond the volume


@pytest.mark.parametrize("pixel", [0.9, 1.3, 2.0])
def test_window_lies_evenly_about_its_centre(tmp_path, pixel):
    """As much of the window on one side of a small volume as on the other, to the last digit."""
    loaded = load_image(write(tmp_path / "a.nii", heart()[0]), Reading(), Grid(40, pixel))
    for axis, length in ((1, 28), (2, 30)):
        middle = loaded.placement.offset[axis] + loaded.placement.step[axis] * 39 / 2
        assert middle == pytest.approx((length - 1) / 2)


def test_window_that_covers_the_volume_stays_on_its_centre(tmp_path):
    """An already tight volume is not shifted, and what lies beyond it is -1 and background."""
    image, raw = heart()
    file = write(tmp_path / "a.nii", image)
    loaded = load_image(file, Reading(), Grid(40, 1.0))
    assert loaded.placement.offset[1:] == (-6.0, -5.0)
    outside = np.ones((40, 40), bool)
    outside[6:34, 5:35] = False
    assert (loaded.voxels[:, outside] == -1).all()
    labels = load_label(
        write(tmp_path / "l.nii", np.full_like(raw, 205)), file, VIEW, loaded.placement
    )
    assert not labels[:, outside].any() and labels[:, ~outside].all()


def test_padding_and_outliers_do_not_set_the_contrast(tmp_path):
    data = ct()
    data[40, 70, 6] = 30_000
    loaded = load_image(write(tmp_path / "ct.nii", data), Reading(), Grid(64, 1.0))
    tissue = loaded.voxels[6][np.abs(loaded.voxels[6]) < 0.999]
    assert loaded.voxels.min() == -1 and loaded.voxels.max() == pytest.approx(1)
    # Air and tissue lie 1,000 units apart and fill most of the range.
    assert np.percentile(tissue, 90) - np.percentile(tissue, 2) > 1.2


def test_an_outlier_does_not_spread_on_a_coarser_grid(tmp_path):
    """It counts as the brightest tissue, not as a thousand times that, in its neighbours too."""
    data = ct()
    clean = load_image(write(tmp_path / "ct.nii", data), Reading(), Grid(32, 4.0))
    data[40, 70, 6] = 1e6
    spoilt = load_image(write(tmp_path / "hot.nii", data), Reading(), Grid(32, 4.0))
    assert np.abs(clean.voxels - spoilt.voxels).max() < 0.1


@pytest.mark.parametrize("slice_spacing", [None, 1.0, 2.5, 7.0, 23.0, 100.0])
def test_every_slice_is_predicted(tmp_path, slice_spacing):
    """Whatever the slice distance, no slice of the file is left without a prediction."""
    image, _ = heart((20, 20, 11), (1, 1, 3))
    file = write(tmp_path / "a.nii", image, (1, 1, 3))
    placement = load_image(file, Reading(), Grid(20, 1.0, slice_spacing)).placement
    everything = onehot(np.ones(placement.shape, int))
    assert (restore(everything, placement) == 1).all()


@pytest.mark.parametrize("codes", ["RAS", "PSR", "SLP"])
@pytest.mark.parametrize(("thickness", "wanted"), [(8.0, 3.0), (8.0, 5.0), (1.0, 5.0), (13.0, 8.0)])
def test_thick_slices_come_back_from_a_common_distance(tmp_path, thickness, wanted, codes):
    """Onto a finer or a coarser distance of slices and back, each file slice has its own labels."""
    depth = round(96 / thickness)
    x, y, z = np.indices((32, 32, depth))
    centre, mm = 14 + 4 * z / depth, (z + 0.5) * thickness  # a tube that wanders and ends
    tube = (np.hypot(x - centre, y - 16) < 8) & (mm > 24) & (mm < 80)
    raw = np.where(tube, 205, 0).astype(np.int16)
    spacing, reading, grid = (1.0, 1.0, thickness), Reading(), Grid(32, 1.0, wanted)
    write(tmp_path / "a.nii", (tube + 0.1).astype(np.float32), spacing)
    write(tmp_path / "l.nii", raw, spacing)
    image = reoriented(tmp_path / "a.nii", codes, tmp_path / "image.nii")
    label = reoriented(tmp_path / "l.nii", codes, tmp_path / "label.nii")
    assert slice_distance(image, reading) == pytest.approx(thickness)

    loaded = load_image(image, reading, grid)
    assert loaded.placement.grid_spacing == pytest.approx((wanted, 1.0, 1.0))
    assert loaded.placement.shape[0] == round(depth * thickness / wanted)
    labels = load_label(label, image, DomainView("ct", reading, STRUCTURES), loaded.placement)
    restored = restore(onehot(labels, 3), loaded.placement)
    reference = read_label_volume(label, image, DomainView("ct", reading, STRUCTURES))
    slice_axis = loaded.placement.axes[0]
    tubes = [
        (v == 1).any(tuple(a for a in range(3) if a != slice_axis)) for v in (restored, reference)
    ]
    # The tube's ends lie within one slice of the coarser of both distances.
    assert abs(tubes[0].sum() - tubes[1].sum()) * thickness <= 2 * max(thickness, wanted)
    overlap = dice(restored == 1, reference == 1)
    assert overlap > 0.85 and (overlap > 0.98 or wanted > thickness)
    # Whatever is predicted on the working grid, each slice of the file is answered.
    assert (restore(onehot(np.ones(loaded.placement.shape, int)), loaded.placement) == 1).all()


def test_the_distance_of_slices_is_that_of_the_axis_that_is_cut(tmp_path):
    file = write(tmp_path / "a.nii", heart()[0], (1.25, 1.5, 8.0))
    assert slice_distance(file, Reading()) == 8.0
    assert slice_distance(file, Reading(slice_axis=1, row_axis=2)) == 1.5
    assert slice_distance(file, Reading(stated_spacing=(0.0, 0.0, 5.0))) == 5.0
    turned = reoriented(file, "SLP", tmp_path / "b.nii")
    assert slice_distance(turned, Reading()) == 8.0
    with pytest.raises(DataError, match="does not exist"):
        slice_distance(tmp_path / "none.nii", Reading())


def test_outside_the_window_is_background(tmp_path):
    file = write(tmp_path / "a.nii", heart((30, 30, 4))[0])
    placement = load_image(file, Reading(), Grid(10, 1.5)).placement
    restored = restore(onehot(np.ones(placement.shape, int)), placement)
    assert 14 * 14 <= restored.any(2).sum() <= 16 * 16  # 15 mm a side
    assert restored[:5].sum() + restored[25:].sum() == 0


def test_restore_refuses_another_grid(tmp_path):
    file = write(tmp_path / "a.nii", heart()[0])
    placement = load_image(file, Reading(), Grid(10, 1.5)).placement
    with pytest.raises(ValueError, match="working grid"):
        restore(np.zeros((3, 20, 10, 11), np.float32), placement)


def test_placement_round_trips_as_json(tmp_path):
    affine = nib.affines.from_matvec(
        np.array([[0.6, -1.04, 0.0], [0.8, 0.78, 0.0], [0.0, 0.0, 2.0]]), (3.3, -7.1, 0.123456789)
    )
    file = write(tmp_path / "a.nii", heart()[0], affine=affine)
    placement = load_image(file, Reading(), Grid(21, 1.37, 3.1)).placement
    again = Placement.from_dict(json.loads(json.dumps(asdict(placement))))
    assert again == placement and hash(again) == hash(placement)
    with pytest.raises(ValueError, match="placement"):
        Placement.from_dict({"shape": [1, 2, 3]})


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (2, 1), (1, 4)])
def test_saved_labels_overlay_the_original(tmp_path, codes):
    """Affine, header codes, axes and raw values are those of the dataset's own files."""
    image, raw = heart(spacing=(1.5, 0.8, 2.2))
    angle = 0.3
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, -1]]
    )
    original = nib.Nifti1Image(image, None)
    original.header.set_zooms((1.5, 0.8, 2.2))
    affine = nib.affines.from_matvec(turn @ np.diag((1.5, 0.8, 2.2)), (10, -20, 30))
    original.set_qform(affine if codes[0] else None, codes[0])
    original.set_sform(affine if codes[1] else None, codes[1])
    nib.save(original, tmp_path / "a.nii.gz")
    loaded = load_image(tmp_path / "a.nii.gz", Reading(), Grid(48, 0.8))
    classes = np.select([raw == 205, raw == 500], [1, 2], 0).astype(np.uint8)

    out = tmp_path / "new" / "out.nii.gz"
    save_labels(out, classes, loaded.placement, [205, 500])

    source, saved = nib.load(tmp_path / "a.nii.gz"), nib.load(out)
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    np.testing.assert_allclose(saved.header.get_zooms(), source.header.get_zooms(), rtol=1e-5)
    assert (int(saved.header["qform_code"]), int(saved.header["sform_code"])) == codes
    assert np.array_equal(np.asarray(saved.dataobj), raw)
    assert [file.name for file in out.parent.iterdir()] == ["out.nii.gz"]


@pytest.mark.fault("killed", "within the writing of a label volume")
def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    image, raw = heart()
    placement = load_image(write(tmp_path / "a.nii", image), Reading(), Grid(32, 1)).placement
    out = tmp_path / "out.nii.gz"
    save_labels(out, np.zeros(raw.shape, np.uint8), placement, [205, 500])
    before = out.read_bytes()

    def full_disk(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(RunFailure, match="is full"):
        save_labels(out, np.ones(raw.shape, np.uint8), placement, [205, 500])
    assert out.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.nii", "out.nii.gz"}


def test_save_refuses_labels_without_a_value(tmp_path):
    image, raw = heart()
    placement = load_image(write(tmp_path / "a.nii", image), Reading(), Grid(32, 1)).placement
    with pytest.raises(ValueError, match="Class 2"):
        save_labels(tmp_path / "o.nii", np.full(raw.shape, 2, np.uint8), placement, [205])
    with pytest.raises(ValueError, match=r"not \(30, 28, 20\)"):
        save_labels(tmp_path / "o.nii", np.zeros((2, 2, 2), np.uint8), placement, [205])


def test_stated_spacing_replaces_the_header_axis_by_axis(tmp_path):
    file = write(tmp_path / "a.nii", heart()[0], (1.25, 1.2, 8.0))
    reading = Reading("stored", 2, 1, (), (0.74, 0.0, 0.0))
    placement = load_image(file, reading, Grid(16, 1.0)).placement
    np.testing.assert_allclose(placement.spacing, (0.74, 1.2, 8.0), rtol=1e-6)
    np.testing.assert_allclose(placement.grid_spacing, (8.0, 1.0, 1.0), rtol=1e-6)


def scaled(path: Path, data: np.ndarray, slope: float, inter: float) -> Path:
    """A file whose header scales its values; the array is stored as given."""
    image = nib.Nifti1Image(data, np.eye(4), dtype=data.dtype)
    content = bytearray(image.to_bytes())
    order = image.header.endianness
    content[112:120] = np.array([slope, inter], f"{order}f4").tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else bytes(content))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "kind, slope, inter",
    [(">i2", 1, 0), ("<i4", 1, 0), (">f4", 1, 0), ("<f8", 1, 0), ("<u2", 1, 0), ("<i2", 0.5, 0),
     ("<i2", -1, 0), (">i4", 2, -64), ("<f4", 0.5, 8), ("<u1", 4, 0)],
)  # fmt: skip
def test_number_types_and_scaling_do_not_matter(tmp_path, kind, slope, inter, suffix):
    """The same values stored in another way give the same slices and the same labels."""
    image, raw = heart()
    values = (4 * np.rint(image / 4)).astype(np.int16)  # what each of them can store
    classes = np.select([raw == 205, raw == 500], [64, 128], 0)
    structures = [Structure("A", "A", (64,), ""), Structure("B", "B", (128,), "")]
    grid = Grid(20, 1.7, 2.3)
    found = []
    for name, stored, *scaling in (("plain", "<i2", 1, 0), ("other", kind, slope, inter)):
        files = []
        for what, data in (("image", values), ("label", classes)):
            inner = (data - scaling[1]) / scaling[0]
            inner = inner.astype(stored)
            assert np.array_equal(inner.astype(float) * scaling[0] + scaling[1], data)
            files.append(scaled(tmp_path / f"{what}_{name}{suffix}", inner, *scaling))
        loaded = load_image(files[0], Reading(), grid)
        labels = load_label(
            files[1], files[0], DomainView("ct", Reading(), structures), loaded.placement
        )
        found.append((loaded.voxels, labels))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][0].std() > 0.1
    assert np.array_equal(found[0][1], found[1][1]) and set(np.unique(found[0][1])) == {0, 1, 2}


@PROPERTY
@given(
    seed=st.integers(0, 1000),
    sparse=st.booleans(),
    pixel=st.sampled_from([0.7, 1.0, 1.6, 3.0]),
    distance=st.sampled_from([None, 0.6, 2.5]),
    size=st.sampled_from([8, 24, 48]),
    flip=st.sets(st.integers(0, 2)),
)
def test_labels_are_the_largest_share_of_every_pixel(
    tmp_path, seed, sparse, pixel, distance, size, flip
):
    """What is left out of the sums where a slice is background changes no pixel."""
    rng = np.random.default_rng(seed)
    raw = rng.choice([0, 205, 500, 501], (14, 17, 11)).astype(np.int16)
    if sparse:
        low = rng.integers(0, 8, 3)
        kept = np.zeros(raw.shape, bool)
        kept[tuple(slice(a, a + 3) for a in low)] = True
        raw[~kept] = 0
    file = write(tmp_path / "a.nii", rng.normal(0, 1, raw.shape).astype(np.float32))
    reading = Reading(flip=tuple(sorted(flip)))
    placement = load_image(file, reading, Grid(size, pixel, distance)).placement
    found = load_label(
        write(tmp_path / "l.nii", raw), file, DomainView("ct", reading, STRUCTURES), placement
    )

    classes = np.select([raw == 205, raw >= 500], [1, 2], 0).transpose(placement.axes)
    classes = classes[tuple(slice(None, None, -1 if f else 1) for f in placement.flips)]
    dense, inside = [], []
    for step, offset, count, length in zip(
        placement.step, placement.offset, placement.shape, classes.shape, strict=True
    ):
        at = offset + step * np.arange(count)
        inside.append((at >= -0.5 - 1e-6) & (at <= length - 0.5 + 1e-6))
        width = max(1.0, step)
        reach = np.abs(np.clip(at, 0, length - 1)[:, None] - np.arange(length))
        weights = np.maximum(0, 1 - reach / width)
        dense.append(weights / weights.sum(1, keepdims=True))
    shares = np.einsum("zi,yj,xk,ijkc->zyxc", *dense, np.eye(3)[classes], optimize=True)
    first, second = np.sort(shares, -1)[..., :-3:-1].transpose(3, 0, 1, 2)
    clear = first - second > 1e-5  # elsewhere rounding decides
    plane = inside[1][:, None] & inside[2][None]
    clear &= plane[None]
    assert np.array_equal(found[clear], shares.argmax(-1)[clear]) and clear.any()
    assert not found[:, ~plane].any()


def test_preparing_holds_less_than_two_volumes(tmp_path, monkeypatch):
    """The stored array, half of it for classes, and a few slices; never a copy as floats."""
    # What does not grow with the volume would hide, in a small one, what does.
    monkeypatch.setattr(volumes, "_SLAB", 1 << 18)
    monkeypatch.setattr(volumes, "_SAMPLE", 200_000)
    rng = np.random.default_rng(0)
    data = rng.integers(-1000, 1000, (256, 256, 160)).astype(np.int16)
    raw = np.zeros(data.shape, np.int16)
    raw[90:150, 80:160, 40:120] = 205
    file, label = write(tmp_path / "a.nii.gz", data), write(tmp_path / "l.nii.gz", raw)
    grid = Grid(64, 3.0, 4.0)
    placement = load_image(file, Reading(), grid).placement  # imports, once
    for work in (
        lambda: load_image(file, Reading(), grid),
        lambda: load_label(label, file, VIEW, placement),
        lambda: load_image(file, Reading(slice_axis=0, row_axis=2), grid),
    ):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert data.nbytes <= peak < 2 * data.nbytes


def test_label_values_merge_and_ignored_ones_vanish(tmp_path):
    image, raw = heart()
    file = write(tmp_path / "a.nii", image)
    raw[0, 0, 0], raw[1, 0, 0] = 501, 421
    label = write(tmp_path / "l.nii", raw)
    with pytest.raises(DataError, match="421"):
        read_label_volume(label, file, VIEW)
    classes = read_label_volume(
        label, file, DomainView("ct", Reading(ignored_values=(421,)), STRUCTURES)
    )
    assert classes[0, 0, 0] == 2 and classes[1, 0, 0] == 0
    assert np.array_equal(classes == 1, raw == 205)


def test_what_nobody_annotated_keeps_its_place_on_both_grids(tmp_path):
    """It is a class like any other for the resampling, and no structure's neighbour gains by it."""
    image, raw = heart()
    file = write(tmp_path / "a.nii", image)
    raw[: raw.shape[0] // 2, 3:] = 99
    label = write(tmp_path / "l.nii", raw)
    reading = Reading(unannotated_values=(99,))
    classes = read_label_volume(label, file, DomainView("ct", reading, STRUCTURES))
    assert classes.dtype == np.uint8 and np.array_equal(classes == UNANNOTATED, raw == 99)
    for grid in (Grid(32, 1.0), Grid(16, 2.3, 1.7)):
        placement = load_image(file, reading, grid).placement
        labels = load_label(label, file, DomainView("ct", reading, STRUCTURES), placement)
        # The same voxels as a structure of their own end at the same pixels.
        own = [*STRUCTURES, Structure("U", "U", (99,), "")]
        named = load_label(label, file, DomainView("ct", Reading(), own), placement)
        assert np.array_equal(labels == UNANNOTATED, named == len(own))
        assert np.array_equal(np.where(labels == UNANNOTATED, len(own), labels), named)
        assert (labels == UNANNOTATED).any() and (labels == 1).any()
    with pytest.raises(DataError, match="99 unknown to the dataset"):
        read_label_volume(label, file, VIEW)


ONE_TWO = DomainView(
    "ct", Reading(), (Structure("A", "A", (1,), ""), Structure("B", "B", (2,), ""))
)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        *((kind, 0) for kind in (np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64)),
        *((np.float32, -2e-5), (np.float64, 9e-4), (np.float64, -9e-4)),
    ],
)
def test_labels_of_any_number_type_may_be_rounded(tmp_path, kind, error):
    image, raw = heart()
    classes = np.select([raw == 205, raw == 500], [1, 2], 0)
    values, view = (classes, ONE_TWO) if kind is np.uint8 else (raw, VIEW)
    label = write(tmp_path / "l.nii", (values + error * (raw > 0)).astype(kind))
    assert np.any(open_volume(label).voxels() != values) == bool(error)
    found = read_label_volume(label, write(tmp_path / "a.nii", image), view)
    assert np.array_equal(found, classes)


def test_label_values_scaled_by_a_header_are_integers(tmp_path):
    """A slope of 1/3 in single precision makes 2.9999999 or so of 9."""
    image, raw = heart()
    classes = np.select([raw == 205, raw == 500], [1, 2], 0)
    label = nib.Nifti1Image((classes * 3).astype(np.int16), np.eye(4))
    label.header.set_slope_inter(1 / 3, 0)
    nib.save(label, tmp_path / "l.nii")
    file = write(tmp_path / "a.nii", image)
    assert np.array_equal(read_label_volume(tmp_path / "l.nii", file, ONE_TWO), classes)


@pytest.mark.parametrize("value", [0.5, 1.002, np.nan, np.inf])
def test_label_values_that_are_no_integers_are_refused(tmp_path, value):
    image, raw = heart()
    data = (raw > 0).astype(np.float64)
    data[0, 0, 0] = value
    label = write(tmp_path / "l.nii", data)
    with pytest.raises(DataError, match=r"l\.nii has label values that are not integers"):
        read_label_volume(label, write(tmp_path / "a.nii", image), VIEW)


def test_label_values_may_lie_far_apart(tmp_path):
    image, raw = heart()
    file = write(tmp_path / "a.nii", image)
    far = np.select([raw == 205, raw == 500], [-7, 2_000_000_000], 0).astype(np.int32)
    structures = [Structure("A", "A", (-7,), ""), Structure("B", "B", (2_000_000_000,), "")]
    label = write(tmp_path / "l.nii", far)
    classes = read_label_volume(label, file, DomainView("ct", Reading(), structures))
    assert np.array_equal(classes, np.select([raw == 205, raw == 500], [1, 2], 0))
    with pytest.raises(DataError, match=r"value\(s\) 2000000000 unknown"):
        read_label_volume(label, file, DomainView("ct", Reading(), structures[:1]))


def test_singleton_fourth_axis_is_accepted(tmp_path):
    image, raw = heart()
    flat = load_image(write(tmp_path / "a.nii", image), Reading(), Grid(32, 1))
    four = load_image(write(tmp_path / "b.nii", image[..., None]), Reading(), Grid(32, 1))
    assert np.array_equal(flat.voxels, four.voxels)
    classes = read_label_volume(write(tmp_path / "l.nii", raw[..., None]), tmp_path / "b.nii", VIEW)
    assert classes.shape == raw.shape


def _broken_image(kind: str, folder: Path) -> Path:
    image, _ = heart()
    path = folder / f"{kind}.nii.gz"
    if kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        write(path, image)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "short":
        raw = write(folder / "full.nii", image).read_bytes()
        path.write_bytes(gzip.compress(raw[:5000]))
    elif kind in ("checksum", "bit", "more"):
        content = bytearray(write(path, image).read_bytes())
        if kind == "checksum":
            content[-8] ^= 1
        elif kind == "bit":
            content[len(content) // 2] ^= 1
        else:  # a second volume that the header does not tell of
            content += gzip.compress(bytes(2 << 20))
        path.write_bytes(content)
    elif kind == "nan":
        image[3, 4, 5] = np.nan
        write(path, image)
    elif kind == "infinite":
        write(path, np.full_like(image, np.inf))
    elif kind == "constant":
        write(path, np.full_like(image, 7))
    elif kind == "flat":
        write(path, image[:, :, 0])
    elif kind == "series":
        write(path, np.stack([image, image], -1))
    elif kind == "complex":
        write(path, image.astype(np.complex64))
    elif kind == "affine":
        raw = bytearray(gzip.decompress(write(path, image).read_bytes()))
        raw[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # q and sform code
        raw[296:312] = bytes(16)  # srow_y
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "mgz":
        path = folder / "other.mgz"
        nib.save(nib.MGHImage(image, np.eye(4)), path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing", "text", "empty", "truncated", "short", "checksum", "bit", "more", "nan",
     "infinite", "constant", "flat", "series", "complex", "affine", "mgz"],
)  # fmt: skip
def test_unusable_image_is_one_sentence(tmp_path, kind):
    path = _broken_image(kind, tmp_path)
    with refused(path):
        load_image(path, Reading(), Grid(16, 1.0))


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "shape", "turned", "halves",
                                  "stray", "negative", "nan"])  # fmt: skip
def test_unusable_label_is_one_sentence(tmp_path, kind):
    image, raw = heart()
    file = write(tmp_path / "image.nii.gz", image)
    placement = load_image(file, Reading(), Grid(16, 1.0)).placement
    label = tmp_path / f"{kind}.nii.gz"
    if kind in ("text", "truncated"):
        _broken_image(kind, tmp_path)
    elif kind == "shape":
        write(label, raw[:-1])
    elif kind == "turned":
        write(label, raw, affine=np.diag([-1.0, 1.0, 1.0, 1.0]))
    elif kind == "halves":
        write(label, raw + np.float32(0.5))
    elif kind == "stray":
        write(label, np.where(raw == 205, 206, raw).astype(np.int16))
    elif kind == "negative":
        write(label, np.where(raw == 205, -1, raw).astype(np.int16))
    elif kind == "nan":
        write(label, np.where(raw == 205, np.nan, raw).astype(np.float32))
    with refused(label):
        read_label_volume(label, file, VIEW)
    with pytest.raises(DataError):
        load_label(label, file, VIEW, placement)


@pytest.mark.parametrize(
    ("size", "voxels"), [(0.0005, 1.0), (1e6, 1.0), (900.0, 1.0), (1.0, 1e20), (1.0, 1e-22)]
)
def test_headers_and_intensities_beyond_any_scan_are_one_sentence(tmp_path, size, voxels):
    """They would cost memory without bounds, or end as NaN in the cache."""
    image, raw = heart()
    affine = np.diag([1.0, size, 1.0, 1.0])
    file = write(
        tmp_path / "a.nii.gz", image.astype(np.float32) * np.float32(voxels), affine=affine
    )
    with refused(file):
        load_image(file, Reading(), Grid(16, 1.0, 1.0))


@pytest.mark.parametrize("voxels", [1e15, 1e-16])
def test_unusual_but_possible_intensities_are_read(tmp_path, voxels):
    image, _ = heart()
    plain = load_image(write(tmp_path / "a.nii", image), Reading(), Grid(16, 1.0)).voxels
    odd = write(tmp_path / "b.nii", image.astype(np.float32) * np.float32(voxels))
    np.testing.assert_allclose(load_image(odd, Reading(), Grid(16, 1.0)).voxels, plain, atol=1e-3)


def test_a_label_without_an_orientation_is_one_sentence(tmp_path):
    image, raw = heart()
    file, label = write(tmp_path / "a.nii", image), write(tmp_path / "b.nii", raw)
    content = bytearray(label.read_bytes())
    content[280:328] = np.full(12, np.nan, "<f4").tobytes()  # the three rows of the sform
    label.write_bytes(content)
    with refused(label, "without an orientation"):
        read_label_volume(label, file, VIEW)


def test_the_distance_of_two_affines_is_that_of_the_farthest_voxel():
    first = np.diag([2.0, 2.0, 3.0, 1.0])
    moved, longer = first.copy(), first.copy()
    moved[:3, 3] = 3, 4, 0
    longer[2, 2] = 3.5
    assert max_displacement(first, first, (5, 6, 7)) == 0
    assert max_displacement(first, moved, (5, 6, 7)) == pytest.approx(5)
    assert max_displacement(first, longer, (5, 6, 7)) == pytest.approx(0.5 * 6)


def test_thin_walls_survive_a_coarser_grid(tmp_path):
    """A shell of two voxels keeps its volume at half the resolution."""
    x, y, _ = np.indices((64, 64, 3))
    r = np.hypot(x - 31.3, y - 32.1)
    raw = np.where((r > 18) & (r < 20.5), 205, 0).astype(np.int16)
    image = ndimage.gaussian_filter(raw.astype(np.float32), 1) + x
    file = write(tmp_path / "a.nii", image)
    loaded = load_image(file, Reading(), Grid(32, 2.0))
    labels = load_label(write(tmp_path / "l.nii", raw), file, VIEW, loaded.placement)
    share = np.count_nonzero(labels == 1) * 4 / np.count_nonzero(raw)
    assert 0.8 < share < 1.2


# -- two forms, and what is near enough -----------------------------------------------------------


def turned_by(degrees: float, spacing=(1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.0)) -> np.ndarray:
    """An affine turned about the third axis."""
    turn = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    return nib.affines.from_matvec(turn @ np.diag(spacing), offset)


def forms(path: Path, data: np.ndarray, qform, sform, codes=(1, 1)) -> Path:
    """A file with both forms; the voxel size is that of the qform."""
    image = nib.Nifti1Image(data, sform if codes[1] else qform)
    image.set_qform(qform, codes[0])
    image.set_sform(sform, codes[1])
    nib.save(image, path)
    return path


def fields(path: Path) -> dict[str, list]:
    """What a header says about where its voxels lie, number by number."""
    header = nib.load(path).header
    names = ["qform_code", "sform_code", "xyzt_units"]
    names += [f"quatern_{a}" for a in "bcd"] + [f"qoffset_{a}" for a in "xyz"]
    found = {name: header[name].tolist() for name in names + [f"srow_{a}" for a in "xyz"]}
    return {**found, "pixdim": header["pixdim"][:4].tolist()}


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1), (1, 4), (0, 1), (1, 0), (0, 0)])
def test_both_forms_are_written_as_they_were_read(tmp_path, codes):
    """Whichever a viewer takes, labels and probabilities lie on their image."""
    image, raw = heart()
    qform, sform = turned_by(20, offset=(5, 6, 7)), np.diag([-1.0, 1, 1, 1])
    path = forms(tmp_path / "a.nii.gz", image, qform, sform, codes)
    placement = load_image(path, Reading(), Grid(32, 1.0)).placement
    read = nib.load(path).affine
    np.testing.assert_allclose(np.array(placement.affine), read, atol=1e-6)
    save_labels(tmp_path / "l.nii.gz", np.zeros(raw.shape, np.uint8), placement, [205, 500])
    save_maps(tmp_path / "m.nii.gz", np.zeros((*raw.shape, 2), np.float32), placement)
    assert fields(tmp_path / "l.nii.gz") == fields(tmp_path / "m.nii.gz") == fields(path)
    assert nib.load(tmp_path / "m.nii.gz").shape == (*raw.shape, 2)
    first, second = (sitk.ReadImage(str(tmp_path / name)) for name in ("a.nii.gz", "l.nii.gz"))
    for read in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(first, read)() == getattr(second, read)()


@pytest.mark.parametrize("angle", [45 - 1e-5, 45, 45 + 1e-5, 135, -45])
def test_names_of_axes_do_not_count_where_affines_agree(tmp_path, angle):
    """At 45°, a hair's breadth changes which way an axis is said to run."""
    image, raw = heart()
    file = write(tmp_path / "a.nii", image, affine=turned_by(angle))
    for number, step in enumerate((-5e-5, 0, 5e-5)):
        near = turned_by(angle + step)
        label = write(tmp_path / f"l{number}.nii", raw, affine=near)
        assert 0 <= max_displacement(turned_by(angle), near, raw.shape) < 5e-5
        classes = read_label_volume(label, file, VIEW)
        assert np.array_equal(classes == 1, raw == 205)
    # The names alone would have refused one of them.
    codes = {nib.aff2axcodes(turned_by(45 + step, offset=(0, 0, 0))) for step in (-5e-5, 5e-5)}
    assert len(codes) == 2


@pytest.mark.parametrize(
    ("angle", "accepted"), [(10, True), (40, True), (50, False), (90, False), (180, False)]
)
def test_a_label_is_refused_where_an_axis_runs_along_another_one(tmp_path, angle, accepted):
    """By the angle between the two, wherever the image itself lies."""
    image, raw = heart()
    for own in (0, 20, 44):
        file = write(tmp_path / "a.nii", image, affine=turned_by(own, (1, 1, 4)))
        label = write(tmp_path / "l.nii", raw, affine=turned_by(own + angle, (1, 1, 4)))
        if accepted:
            read_label_volume(label, file, VIEW)
            continue
        with refused(label, "resample the label|45°"):
            read_label_volume(label, file, VIEW)


def test_a_label_that_follows_the_other_form_is_told_as_that(tmp_path):
    image, raw = heart()
    sform, qform = np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, 1, 1])
    both = forms(tmp_path / "a.nii", image, qform, sform)
    only = forms(tmp_path / "l.nii", raw, qform, qform, (1, 0))
    with pytest.raises(DataError, match="matches the qform of its image, but the sform is used"):
        read_label_volume(only, both, VIEW)
    other = forms(tmp_path / "b.nii", image, sform, sform)
    torn = forms(tmp_path / "m.nii", raw, sform, qform)
    with refused(torn, "its qform matches its image"):
        read_label_volume(torn, other, VIEW)
    third = forms(tmp_path / "n.nii", raw, np.diag([1.0, -1, 1, 1]), np.diag([1.0, -1, 1, 1]))
    with pytest.raises(DataError, match="resample the label") as caught:
        read_label_volume(third, both, VIEW)
    assert "qform" not in str(caught.value)


@pytest.mark.parametrize("bare", ["image", "label"])
def test_a_file_without_a_geometry_is_named_where_the_other_has_one(tmp_path, bare):
    """It would be taken as LAS; resampling the label would not mend it."""
    image, raw = heart()
    files = {
        name: forms(tmp_path / f"{name}.nii", data, np.eye(4), np.eye(4), (0, 0))
        if name == bare
        else write(tmp_path / f"{name}.nii", data)
        for name, data in (("image", image), ("label", raw))
    }
    with refused(files["label"], f"{bare}.nii has no geometry in its header"):
        read_label_volume(files["label"], files["image"], VIEW)


@settings(max_examples=200, deadline=None)
@given(
    turn=st.one_of(
        st.tuples(*[st.floats(-np.pi, np.pi)] * 3),
        # Half turns with a little more: there a quaternion is least sharp.
        st.tuples(st.sampled_from([0.0, np.pi]), st.just(np.pi), st.floats(-2e-3, 2e-3)),
    ),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    offset=st.tuples(*[st.floats(-900, 900)] * 3),
    shape=st.sampled_from([(512, 512, 300), (20, 30, 8)]),
    mirrored=st.booleans(),
    unit=st.sampled_from([2, 3]),
)
def test_one_geometry_in_both_forms_is_not_taken_for_two(
    turn, spacing, offset, shape, mirrored, unit
):
    """Rounding of the quaternion in the file makes no second geometry, a moved voxel does."""
    directions = Rotation.from_euler("xyz", turn).as_matrix() @ np.diag(
        [-1 if mirrored else 1, 1, 1]
    )
    affine = nib.affines.from_matvec(directions @ np.diag(spacing), offset)
    header = nib.Nifti1Header()
    Forms.of(affine, (1, 1), unit).write(header)
    stored = Forms.read(header)
    assert second_form(stored, shape) is None
    length = 0.001 if unit == 3 else 1.0
    np.testing.assert_allclose(stored.qform()[:3, 3], np.array(offset) * length, 1e-6, 1e-9)
    moved = replace(stored, offset=(stored.offset[0] + 3 + max(spacing), *stored.offset[1:]))
    assert second_form(moved, shape) is not None


# -- the whole way, whatever the header -----------------------------------------------------------


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    angles=st.one_of(st.just((0.0, 0.0, 0.0)), st.tuples(*[st.floats(-3.1, 3.1)] * 3)),
    spacing=st.tuples(*[st.floats(0.5, 3.0)] * 3),
    offset=st.tuples(*[st.floats(-300, 300)] * 3),
    codes=st.sampled_from([(1, 1), (0, 1), (1, 0), (0, 0), (1, 2), (2, 4)]),
    unit=st.sampled_from([0, 1, 2, 3]),
    axes=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([1, -1])] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha"]),
    second=st.booleans(),
)
def test_a_perfect_prediction_lies_on_its_image_and_scores_one(
    tmp_path, angles, spacing, offset, codes, unit, axes, signs, suffix, second
):
    """The label through the working grid and back, for any affine, unit, codes, order and format.

    The grid has the file's own pixels in the plane and holds all of it, so nothing may change.
    """
    image, raw = heart((14, 12, 10))
    turn = Rotation.from_euler("xyz", angles).as_matrix()
    turn = turn @ (np.eye(3)[:, axes] * signs)
    length = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}[unit]
    own = nib.affines.from_matvec(turn @ np.diag(spacing), offset)
    own[:3] /= length
    files = [tmp_path / f"{name}{suffix}" for name in ("image", "label")]
    for path, data in zip(files, (image.astype(np.float32), raw), strict=True):
        if ".nii" in suffix:
            volume = nib.Nifti1Image(data, None)
            other = turned_by(30, spacing)
            other[:3] /= length
            volume.header["xyzt_units"] = unit
            volume.header.set_zooms(np.array(spacing) / length)
            if codes[0]:
                volume.set_qform(other if second else own, codes[0])
            if codes[1]:
                volume.set_sform(own, codes[1])
            nib.save(volume, path)
        else:
            unit, length = 2, 1.0
            own = nib.affines.from_matvec(turn @ np.diag(spacing), offset)
            lps = np.diag([-1, -1, 1, 1]) @ own
            volume = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
            volume.SetSpacing(spacing)
            volume.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
            volume.SetOrigin(lps[:3, 3].tolist())
            sitk.WriteImage(volume, str(path))

    # Slices are cut across the last axis of the body, whichever of the file it is.
    placed = frame(open_volume(files[0]), Reading())
    in_plane = [placed[1][axis] for axis in placed[2][1:]]
    grid = Grid(int(np.ceil(14 * max(in_plane) / min(in_plane))) + 2, min(in_plane))
    reading = Reading()
    loaded = load_image(files[0], reading, grid)
    labels = load_label(files[1], files[0], DomainView("ct", reading, STRUCTURES), loaded.placement)
    restored = restore(onehot(labels), loaded.placement)
    reference = read_label_volume(files[1], files[0], DomainView("ct", reading, STRUCTURES))
    out = tmp_path / "out.nii.gz"
    save_labels(out, restored, loaded.placement, [205, 500])

    # On its image in both libraries, to float precision.
    first, saved = sitk.ReadImage(str(files[0])), sitk.ReadImage(str(out))
    assert first.GetSize() == saved.GetSize()
    tolerance = {"rtol": 1e-6, "atol": 1e-5} if ".nii" in suffix else {"rtol": 1e-4, "atol": 1e-3}
    for read in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(saved, read)(), getattr(first, read)(), **tolerance)
    if ".nii" in suffix:
        assert np.array_equal(nib.load(out).affine, nib.load(files[0]).affine)
        assert fields(out) == fields(files[0])
    else:
        np.testing.assert_allclose(nib.load(out).affine, own, atol=1e-3)

    # Voxels of the right size, by arithmetic.
    assert loaded.placement.ml == pytest.approx(np.prod(spacing) / 1000, rel=1e-5)
    np.testing.assert_allclose(sorted(loaded.placement.spacing), sorted(spacing), rtol=1e-5)

    # And the scores, by the metrics that evaluation uses.
    if loaded.placement.step == (1.0, 1.0, 1.0):
        assert np.array_equal(restored, reference)
    for score in case_metrics(restored, reference, STRUCTURES, loaded.placement.spacing):
        if loaded.placement.step == (1.0, 1.0, 1.0):
            assert score["dice"] == 1 and score["assd"] == score["hd95"] == 0
        else:
            assert score["dice"] > 0.9


@PROPERTY
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    side=st.floats(0.5, 3.0),
    depth=st.floats(0.5, 8.0),
    unit=st.sampled_from([0, 1, 2, 3]),
    codes=st.sampled_from([(1, 1), (0, 1), (1, 0), (0, 0)]),
)
def test_square_pixels_come_back_exactly(tmp_path, angles, side, depth, unit, codes):
    """At the file's own pixel, Dice is 1 and ASSD 0 whatever the header."""
    image, raw = heart((14, 12, 10))
    # Near an axis, so that slices are cut across the third one.
    turn = Rotation.from_euler("xyz", np.array(angles) / 8).as_matrix()
    length = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}[unit]
    own = nib.affines.from_matvec(turn @ np.diag([side, side, depth]) / length, (1, 2, 3))
    files = [tmp_path / "image.nii", tmp_path / "label.nii"]
    for path, data in zip(files, (image, raw), strict=True):
        volume = nib.Nifti1Image(data, own)
        volume.set_qform(own, codes[0])
        volume.set_sform(own, codes[1])
        volume.header["xyzt_units"] = unit
        nib.save(volume, path)
    loaded = load_image(files[0], Reading(), Grid(16, side))
    assert loaded.placement.step == (1.0, 1.0, 1.0)
    labels = load_label(files[1], files[0], VIEW, loaded.placement)
    restored = restore(onehot(labels), loaded.placement)
    reference = read_label_volume(files[1], files[0], VIEW)
    assert np.array_equal(reference == 2, raw == 500)
    for score in case_metrics(restored, reference, STRUCTURES, loaded.placement.spacing):
        assert score["dice"] == 1 and score["assd"] == score["hd95"] == 0
    assert loaded.placement.ml == pytest.approx(side * side * depth / 1000, rel=1e-5)
