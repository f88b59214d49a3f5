"""datasets/mmwhs_sifa.py, sifa_release.py, tfrecord.py: synthetic, damaged and real files.

The TFRecord files are written here byte by byte, with a checksum computed the slow way, so that
reader and writer share no code.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import nibabel as nib
import numpy as np
import pytest
from drawn import run_glua, sentence
from faults import damaged

import glua_bench.datasets.mmwhs_sifa as module
from glua_bench.conformance import DATASET_CHECKS, run_dataset_checks
from glua_bench.data.cache import SliceCache
from glua_bench.data.volumes import load_image, read_label_volume
from glua_bench.datasets.mmwhs_sifa import MMWHSSIFA
from glua_bench.datasets.sifa_release import RANGES, read_slice, read_volume, rescaled
from glua_bench.datasets.tfrecord import read_examples
from glua_bench.errors import DataError
from glua_bench.files import UNFINISHED
from glua_bench.task import Grid, Reading

SIDE = 64
TEST_IDS = {"ct": (1003, 1008, 1014, 1019), "mr": (1007, 1009, 1018, 1019)}


# -- a writer -------------------------------------------------------------------------------------


def slow_crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for octet in data:
        register ^= octet
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    # Long payloads are too much for the slow way, which a test below compares with this one.
    checksum = slow_crc32c(data) if len(data) < 2000 else google_crc32c.value(data)
    rotated = ((checksum >> 15) | (checksum << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def part(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def integers(*values: int, packed: bool = True) -> bytes:
    if packed:
        return part(3, part(1, b"".join(varint(v) for v in values)))
    return part(3, b"".join(varint(1 << 3) + varint(v) for v in values))


def octets(content: bytes) -> bytes:
    return part(1, part(1, content))


def example(features: dict[str, bytes]) -> bytes:
    entries = [part(1, part(1, name.encode()) + part(2, f)) for name, f in features.items()]
    return part(1, b"".join(entries))


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def features(image: np.ndarray, label: np.ndarray, **changes: bytes | None) -> dict[str, bytes]:
    """Return the release's features for arrays (X, Y, 3), in arbitrary order."""
    found: dict[str, bytes | None] = {
        "mask_scale": integers(4),
        "label_vol": octets(label.astype("<f4").tobytes()),
        "bias_dim0": integers(-10),
    }
    for letter, array in (("d", image), ("l", label)):
        for axis, size in enumerate(array.shape):
            found[f"{letter}size_dim{axis}"] = integers(size, packed=axis != 1)
    found["data_vol"] = octets(image.astype("<f4").tobytes())
    found.update(changes)
    return {name: content for name, content in found.items() if content is not None}


def hearts(domain: str, seed: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene (X, Y, depth): four discs and one with the undocumented label."""
    rng = np.random.default_rng([seed, domain == "mr"])
    x, y = np.indices((SIDE, SIDE))
    label = np.zeros((SIDE, SIDE))
    for value, at in ((1, (20, 20)), (2, (44, 20)), (3, (20, 44)), (4, (44, 44)), (5, (32, 32))):
        label[np.hypot(x - at[0], y - at[1] + rng.uniform(-2, 2)) < 7] = value
    tones = np.array([-1.0, 0.5, 1.5, 2.0, 1.0, 0.0])
    image = tones[label.astype(int)] * (1 if domain == "ct" else -0.7)
    images = image[..., None] + rng.normal(0, 0.1, (SIDE, SIDE, depth))
    return images.astype(np.float32), np.repeat(label[..., None], depth, 2)


def write_slice(path: Path, domain: str = "ct", seed: int = 0, **changes: bytes | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record(example(features(*hearts(domain, seed, 3), **changes))))
    return path


def write_release(root: Path, slices: int = 3, depth: int = 4) -> Path:
    """Write slices and test volumes under the release's names: CT as NIfTI, MR as npz."""
    for domain in ("ct", "mr"):
        for split in ("train", "val"):
            for number in range(slices):
                name = f"{domain}_{split}_tfs/{domain}_{split}_slice{number}.tfrecords"
                write_slice(root / name, domain, 10 * number + (split == "val"))
        for number in TEST_IDS[domain]:
            image, label = (a[::-1, ::-1] for a in hearts(domain, number, depth))
            if domain == "mr":
                (root / "test_mr").mkdir(exist_ok=True)
                np.savez(root / "test_mr" / f"mr_{number}.npz", image, label)
                continue
            folder = root / "test_ct_image&labels"
            folder.mkdir(exist_ok=True)
            for name, data in (("image", image), ("gth", label.astype(np.int16))):
                volume = nib.Nifti1Image(data, np.diag([0.5, 0.5, 0.7, 1]))
                nib.save(volume, folder / f"{name}_ct_{number}.nii.gz")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))


# -- the reader of records ------------------------------------------------------------------------


def test_checksums_are_those_of_the_standard():
    """RFC 3720, appendix B.4, in the library and in the loop that writes short records here."""
    assert google_crc32c.value(b"123456789") == 0xE3069283
    assert google_crc32c.value(bytes(32)) == 0x8A9136AA
    assert google_crc32c.value(b"\xff" * 32) == 0x62A8AB43
    assert google_crc32c.value(bytes(range(32))) == 0x46DD794E
    rng = np.random.default_rng(0)
    for length in [*range(60, 80), 127, 128, 129, 255, 256, 257, 258, 1021, 4096, 5003]:
        data = rng.integers(0, 256, length, np.uint8).tobytes()
        assert google_crc32c.value(data) == slow_crc32c(data), length


def test_examples_are_read_as_written(tmp_path):
    content = {
        "packed": integers(1, -1, 2**62, 300),
        "single": integers(-5, 7, packed=False),
        "bytes": part(1, part(1, b"ab") + part(1, b"")),
        "floats": part(2, part(1, struct.pack("<2f", 1, 2))),
        "empty": b"",
    }
    unknown = varint(9 << 3 | 1) + bytes(8) + varint(9 << 3 | 5) + bytes(4) + varint(9 << 3) + b"\1"
    payloads = [example(content) + unknown, example({"other": integers(3)}), b""]
    file = tmp_path / "some.tfrecord"
    file.write_bytes(b"".join(record(payload) for payload in payloads))
    first, second, third = read_examples(file)
    assert first["packed"] == [1, -1, 2**62, 300] and first["single"] == [-5, 7]
    assert first["bytes"] == [b"ab", b""]
    assert set(first) == {"packed", "single", "bytes"}
    assert second == {"other": [3]} and third == {}


@pytest.mark.fault("silent damage", "torn TFRecord files")
@pytest.mark.parametrize("cut", [0, 1, 8, 11, 12, 200, -5, -1])
def test_torn_records_are_one_sentence(tmp_path, cut):
    file = write_slice(tmp_path / "torn.tfrecords")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError) as error:
        read_slice(file)
    text = sentence(error, file, "download it again")
    assert "empty" in text if cut == 0 else "it ends within" in text


@pytest.mark.parametrize("place", [0, 7, 8, 11, 12, 300, 5000, -5, -4, -1])
def test_a_flipped_bit_is_found(tmp_path, place):
    file = write_slice(tmp_path / "flipped.tfrecords")
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_slice(file)
    where = "length" if 0 <= place < 12 else "data"
    assert f"the checksum of a record's {where}" in sentence(error, file)


def test_what_is_no_record_is_one_sentence(tmp_path):
    for name, content in {
        "gzip": b"\x1f\x8b\x08" + bytes(40),
        "text": b"<html>Too many users have viewed this file</html>",
        "short": b"PK",
    }.items():
        file = tmp_path / f"{name}.tfrecords"
        file.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_slice(file)
        sentence(error, file, "not a valid TFRecord file")
    with pytest.raises(DataError) as error:
        read_slice(tmp_path)
    sentence(error, tmp_path, "permissions")
    with pytest.raises(DataError) as error:
        read_slice(tmp_path / "absent.tfrecords")
    sentence(error, "absent.tfrecords")


# -- slices and volumes ---------------------------------------------------------------------------


def test_the_middle_slice_is_the_sample(tmp_path):
    image, label = hearts("ct", 5, 3)
    label[..., 0], label[..., 2] = 0, 1
    file = tmp_path / "a.tfrecords"
    file.write_bytes(record(example(features(image, label))))
    read, classes = read_slice(file)
    assert read.dtype == np.float32 and classes.dtype == np.uint8
    assert np.array_equal(read, image[..., 1]) and np.array_equal(classes, label[..., 1])
    # The authors' comments speak of one slice of labels; both forms are read.
    for held in (label, label[..., 1:2]):
        content = octets(held.astype("<f4").tobytes())
        changed = features(image, label, lsize_dim2=integers(1), label_vol=content)
        file.write_bytes(record(example(changed)))
        assert np.array_equal(read_slice(file)[1], label[..., 1])


NAN = np.full((SIDE, SIDE, 3), np.nan, "<f4").tobytes()
FAULTS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no size": ({"dsize_dim1": None}, "dsize_dim1"),
    "no size of labels": ({"lsize_dim0": None}, "lsize_dim0"),
    "two sizes": ({"dsize_dim0": integers(64, 64)}, "dsize_dim0"),
    "size of bytes": ({"dsize_dim2": octets(b"3")}, "dsize_dim2"),
    "negative size": ({"dsize_dim0": integers(-64)}, "dsize_dim0"),
    "absurd size": ({"dsize_dim0": integers(2**40)}, "dsize_dim0"),
    "wrong size": ({"dsize_dim2": integers(5)}, "data_vol"),
    "other labels": ({"lsize_dim0": integers(32)}, "labels of"),
    "no image": ({"data_vol": None}, "data_vol"),
    "image of integers": ({"data_vol": integers(1, 2)}, "data_vol"),
    "short image": ({"data_vol": octets(bytes(400))}, "data_vol"),
    "no label": ({"label_vol": None}, "label_vol"),
    "image of NaN": ({"data_vol": octets(NAN)}, "finite"),
    "label of NaN": ({"label_vol": octets(NAN)}, "finite"),
    "label 6": (
        {"label_vol": octets(np.full((SIDE, SIDE, 3), 6, "<f4").tobytes())},
        "label value(s) 6, ",
    ),
    "label 1.5": (
        {"label_vol": octets(np.full((SIDE, SIDE, 3), 1.5, "<f4").tobytes())},
        "label values that are not integers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_of_something_else_is_one_sentence(tmp_path, fault):
    changes, named = FAULTS[fault]
    file = write_slice(tmp_path / "other.tfrecords", **changes)
    with pytest.raises(DataError) as error:
        read_slice(file)
    sentence(error, file, named)


def test_labels_that_storage_rounded_are_read_as_integers(tmp_path):
    values = (np.full((SIDE, SIDE, 3), 3, "<f4") - np.float32(1e-6)).tobytes()
    file = write_slice(tmp_path / "rounded.tfrecords", label_vol=octets(values))
    assert np.unique(read_slice(file)[1]).tolist() == [3]


def test_mutated_records_are_one_sentence_each(tmp_path):
    """Flipped, removed and inserted bytes with corrected checksums, to test the parser."""
    rng = np.random.default_rng(0)
    image, label = (array[:8, :8] for array in hearts("ct", 0, 3))
    intact = example(features(image, label))
    file, read, refused = tmp_path / "mutated.tfrecords", 0, 0
    for number in range(400):
        content = bytearray(intact if number % 2 else record(intact))
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(content)))
            kind = rng.integers(4)
            if kind == 0:
                content[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del content[place : place + int(rng.integers(1, 40))]
            elif kind == 2:
                content[place:place] = rng.bytes(int(rng.integers(1, 12)))
            else:
                content[place] = 0xFF
            if not content:
                break
        file.write_bytes(record(bytes(content)) if number % 2 else bytes(content))
        try:
            values, classes = read_slice(file)
        except DataError as error:
            text = str(error)
            assert text.startswith(str(file)) and text.endswith(".") and "\n" not in text
            refused += 1
        else:
            assert np.isfinite(values).all() and classes.max() <= 5
            read += 1
    assert refused > 250 and read + refused == 400


def test_the_fixed_range_of_each_modality_becomes_one():
    for domain, (low, high) in RANGES.items():
        values = np.array([low - 9, low, (low + high) / 2, high, high + 9], np.float32)
        np.testing.assert_allclose(rescaled(values, domain), [-1, -1, 0, 1, 1], atol=1e-6)
    assert RANGES == {"ct": (-2.8, 3.2), "mr": (-1.8, 4.4)}


def test_a_fixed_range_replaces_percentiles(tmp_path):
    values = np.random.default_rng(0).uniform(-0.5, 0.5, (32, 32, 4)).astype(np.float32)
    values[0, 0, 0] = 3
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    reading = Reading("stored", intensity_range=(-1, 1))
    loaded = load_image(tmp_path / "a.nii", reading, Grid(32, 1.0))
    np.testing.assert_allclose(loaded.voxels, np.clip(values, -1, 1).transpose(2, 1, 0), atol=1e-6)


def test_a_range_that_is_not_set_changes_no_identity():
    """Caches from before fixed ranges remain valid."""
    assert "intensity_range" not in Reading().identity()
    assert set(Reading().identity()) == {
        *("orientation", "slice_axis", "row_axis", "flip", "stated_spacing"),
        *("percentiles", "ignored_values"),
    }
    assert Reading(intensity_range=(0, 1)).identity() != Reading(intensity_range=(0, 2)).identity()


def test_test_volumes_are_turned_and_overlay_the_original(tmp_path):
    """The flipped array and its affine preserve the position of every voxel."""
    image, label = hearts("ct", 1, 5)
    affine = np.array([[0, 0, 2.0, 1], [0.5, 0, 0, 2], [0, 0.7, 0, 3], [0, 0, 0, 1]])
    files = [tmp_path / "image_ct_1003.nii.gz", tmp_path / "gth_ct_1003.nii.gz"]
    for file, data in zip(files, (image, label.astype(np.int16)), strict=True):
        nib.save(nib.Nifti1Image(data, affine), file)
    np.savez(tmp_path / "ct_1003.npz", image, label)
    for given, base in ((files, affine), ([tmp_path / "ct_1003.npz"], np.eye(4))):
        turned, classes, made = read_volume(given)
        assert np.array_equal(turned, image[::-1, ::-1])
        assert np.array_equal(classes, label[::-1, ::-1])
        for at in ((0, 0, 0), (5, 9, 3)):
            there = (SIDE - 1 - at[0], SIDE - 1 - at[1], at[2])
            np.testing.assert_allclose((made @ [*there, 1]), base @ [*at, 1], atol=1e-5)


@pytest.mark.fault("silent damage", "damaged .npz files of the SIFA release")
@pytest.mark.parametrize("fault", ["text", "cut", "one", "shapes", "flat", "nan", "six", "object"])
def test_a_damaged_npz_is_one_sentence(tmp_path, fault):
    file = tmp_path / "ct_1003.npz"
    image, label = hearts("ct", 0, 4)
    if fault == "text":
        file.write_text("<html></html>")
    elif fault == "cut":
        np.savez(file, image, label)
        file.write_bytes(file.read_bytes()[:5000])
    elif fault == "one":
        np.savez(file, image)
    elif fault == "shapes":
        np.savez(file, image, label[..., 1:])
    elif fault == "flat":
        np.savez(file, image[..., 0], label[..., 0])
    elif fault == "nan":
        image[3, 3, 3] = np.nan
        np.savez(file, image, label)
    elif fault == "six":
        label[3, 3, 3] = 6
        np.savez(file, image, label)
    else:
        np.savez(file, np.array([{}], object), label)
    with pytest.raises(DataError) as error:
        read_volume([file])
    sentence(error, file)


def test_a_damaged_nifti_is_one_sentence(tmp_path):
    image, label = hearts("ct", 0, 4)
    files = [tmp_path / "image_ct_1003.nii.gz", tmp_path / "gth_ct_1003.nii.gz"]
    for file, data in zip(files, (image, label.astype(np.int16)), strict=True):
        nib.save(nib.Nifti1Image(data, np.eye(4)), file)
    whole = files[0].read_bytes()
    for content in (b"", b"text", whole[:100], whole[:3000]):
        files[0].write_bytes(content)
        with pytest.raises(DataError) as error:
            read_volume(files)
        sentence(error, files[0])


# -- the dataset ----------------------------------------------------------------------------------


def test_the_dataset_is_sound(tmp_path, monkeypatch):
    """All conformance checks, on the release's layout below GLUA_BENCH_DATA."""
    write_release(tmp_path / "mmwhs_sifa" / "PnpAda_release_data")
    monkeypatch.setenv("GLUA_BENCH_DATA", str(tmp_path))
    results = run_dataset_checks("mmwhs_sifa")
    assert len(results) == len(DATASET_CHECKS)
    assert not [f"{r.check}: {r.message}" for r in results if not r.passed]


def test_slices_come_in_stacks_and_volumes_as_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STACK", 4)
    root = write_release(tmp_path, slices=11)
    dataset = MMWHSSIFA(root)
    lines: list[str] = []
    dataset.prepare(lines.append)
    assert any("11 train slices, the release has 8400" in line for line in lines)
    for domain in ("ct", "mr"):
        cases = {case.id: case for case in dataset.cases(domain)}
        stacks = [f"{domain}_train_{n:02d}" for n in range(3)]
        assert [c.id for c in dataset.split(domain, "train")] == stacks
        assert len(dataset.split(domain, "val")) == 3
        tests = [f"{domain}_{n}" for n in TEST_IDS[domain]]
        assert [c.id for c in dataset.split(domain, "test")] == tests
        assert len({c.subject for c in dataset.split(domain, "test")}) == 4
        assert {c.subject for c in dataset.split(domain, "train")} == {f"mmwhs_sifa_{domain}_train"}
        # In the order of the numbers: slice 10 is the last one, not the third.
        last = cases[f"{domain}_train_02"]
        volume: Any = nib.load(last.image)
        assert volume.shape == (SIDE, SIDE, 3)
        expected = rescaled(hearts(domain, 100, 3)[0][..., 1], domain)
        np.testing.assert_allclose(volume.get_fdata()[..., 2], expected, atol=2e-5)


def test_label_5_is_known_and_background(tmp_path):
    dataset = MMWHSSIFA(write_release(tmp_path))
    dataset.prepare()
    for case in dataset.cases("ct"):
        raw = np.asarray(nib.load(case.label).dataobj)
        classes = read_label_volume(case.label, case.image, dataset.view(case.domain))
        assert set(np.unique(raw)) == {0, 1, 2, 3, 4, 5}
        assert np.array_equal(classes, np.where(raw == 5, 0, raw))
    assert [s.name for s in dataset.structures] == ["MYO", "LAC", "LVC", "AA"]
    assert [s.values for s in dataset.structures] == [(1,), (2,), (3,), (4,)]


def test_test_and_training_lie_alike_and_upright(tmp_path):
    """Axis 0 runs along columns and axis 1 along rows, both reversed for display."""
    dataset = MMWHSSIFA(write_release(tmp_path))
    dataset.prepare()
    for case in dataset.cases("mr"):
        image = SliceCache().image(case.unlabelled(), dataset.view(case.domain).on(Grid(SIDE, 1.0)))
        volume: Any = nib.load(case.image)
        expected = volume.get_fdata()[::-1, ::-1].transpose(2, 1, 0)
        np.testing.assert_allclose(image.open(), expected, atol=1e-3)
        assert image.placement.spacing == (1.0, 1.0, 1.0)
        label = np.asarray(nib.load(case.label).dataobj)
        assert label[20, 20, 0] == 1 and label[44, 44, 0] == 4


@pytest.mark.fault("silent damage", "converted volumes and records of mmwhs_sifa")
def test_a_second_prepare_writes_nothing_and_a_change_is_seen(tmp_path):
    dataset = MMWHSSIFA(write_release(tmp_path / "data"))
    dataset.prepare()
    folder = dataset.converted
    assert folder.is_relative_to(os.environ["GLUA_BENCH_CACHE"])

    def state() -> dict[str, tuple[int, bytes]]:
        files = sorted(folder.iterdir())
        return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}

    before = state()
    assert not [name for name in before if name.startswith(UNFINISHED)]
    lines: list[str] = []
    dataset.prepare(lines.append)
    assert state() == before and not [line for line in lines if "/" in line]
    # What is damaged or missing is made again, with the same bytes; a new slice changes one stack.
    for seed, name in enumerate(["ct_train_00.nii", "mr_train_00.nii", "ct_val_00.json"]):
        (folder / name).write_bytes(damaged((folder / name).read_bytes(), seed))
    (folder / "mr_1007_label.nii.gz").unlink()
    dataset.prepare()
    assert {n: content for n, (_, content) in state().items()} == {
        n: content for n, (_, content) in before.items()
    }
    write_slice(tmp_path / "data" / "ct_val_tfs" / "ct_val_slice77.tfrecords", "ct", 77)
    lines = []
    dataset.prepare(lines.append)
    assert [line.split()[-1] for line in lines if "/" in line] == ["ct_val_00"]
    assert nib.load(dataset.split("ct", "val")[0].image).shape[2] == 4


@pytest.mark.fault("killed", "a conversion of mmwhs_sifa")
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    root = write_release(tmp_path)
    bad = root / "mr_val_tfs" / "mr_val_slice1.tfrecords"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-9])
    dataset = MMWHSSIFA(root)
    with pytest.raises(DataError) as error:
        dataset.prepare()
    sentence(error, bad)
    with pytest.raises(DataError) as error:
        dataset.cases("ct")
    sentence(error, root, "glua-bench data prepare mmwhs_sifa")
    assert not list(dataset.converted.glob("mr_val*")) + list(dataset.converted.glob("unfin*"))
    assert (dataset.converted / "mr_train_00.nii").is_file()
    bad.write_bytes(whole)
    lines: list[str] = []
    dataset.prepare(lines.append)
    assert [line.split()[-1] for line in lines if "/" in line] == ["mr_val_00"]


@pytest.mark.parametrize("fault", ["nothing", "absent", "no val", "no test", "one test", "no gth"])
def test_missing_files_are_one_sentence(tmp_path, fault):
    root = tmp_path / "data"
    if fault == "nothing":
        root.mkdir()
    elif fault != "absent":
        write_release(root)
    removed = {"no val": "ct_val_*/*", "no test": "test_*/*", "one test": "test_mr/mr_1018.npz"}
    for file in root.glob(removed.get(fault, "test_*/gth_ct_1008*" if fault == "no gth" else "-")):
        file.unlink()
    with pytest.raises(DataError) as error:
        MMWHSSIFA(root).prepare()
    text = sentence(error, root, "GLUA_BENCH_DATA", "cchen-cc/SIFA", "terms of the MM-WHS 2017")
    lacking = {
        "no val": "lacks ct val slices:",
        "no test": "lacks ct test volumes 1003, 1008, 1014, 1019; mr test volumes 1007, 1009",
        "one test": "lacks mr test volumes 1018:",
        "no gth": "lacks gth_ct_1008.nii.gz:",
    }
    assert lacking.get(fault, "lacks every file of the pre-processed MM-WHS release:") in text
    with pytest.raises(DataError) as error:
        MMWHSSIFA(root).cases("ct")
    assert str(error.value) == text


def test_two_files_of_one_slice_are_one_sentence(tmp_path):
    root = write_release(tmp_path)
    for name in ("copy/ct_train_slice1.tfrecords", "copy/ct_1003.npz"):
        (root / "copy").mkdir(exist_ok=True)
        (root / name).touch()
        with pytest.raises(DataError) as error:
            MMWHSSIFA(root).prepare()
        sentence(error, root / name, "remove one of them")
        (root / name).unlink()


def test_a_domain_without_test_volumes_is_a_source(tmp_path):
    """The release's first download has no MR test volumes."""
    root = write_release(tmp_path)
    for file in (root / "test_mr").iterdir():
        file.unlink()
    dataset = MMWHSSIFA(root)
    lines: list[str] = []
    dataset.prepare(lines.append)
    assert "mr: no test volumes, so it can only be the source" in lines
    assert not dataset.split("mr", "test") and len(dataset.split("ct", "test")) == 4


def test_unknown_domain_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="ct or mr"):
        MMWHSSIFA(tmp_path).cases("pet")


def test_what_cannot_be_measured_is_said():
    assert "voxels" in MMWHSSIFA.distance_note and "by their labels" in MMWHSSIFA.distance_note
    assert MMWHSSIFA.publishable is False and MMWHSSIFA.directions == ("mr-ct", "ct-mr")


def test_identical_slices_of_test_and_training_are_counted(tmp_path):
    dataset = MMWHSSIFA(write_release(tmp_path / "data"))
    with pytest.raises(DataError) as error:
        dataset.caveat("ct-mr")
    sentence(error, "glua-bench data prepare mmwhs_sifa")
    dataset.prepare()
    assert dataset.caveat("mr-ct") == ""
    assert "issue 16" in dataset.caveat("ct-mr") and "no identical" in dataset.caveat("ct-mr")
    for domain, number in (("ct", 1008), ("mr", 1007)):
        image, label = (volume[..., 1:4] for volume in hearts(domain, number, 4))
        place = tmp_path / "data" / f"{domain}_train_tfs" / f"{domain}_train_slice1.tfrecords"
        place.write_bytes(record(example(features(image, label))))
    dataset.prepare()
    assert dataset.caveat("ct-mr").startswith("1 of 16 MR test slices are identical")
    assert dataset.caveat("mr-ct").startswith("1 of 16 CT test slices are identical")


def test_constant_slices_are_not_taken_for_copies():
    assert module._digests(np.zeros((4, 4, 3), np.int16)) == [""] * 3


@pytest.mark.slow
def test_results_on_mr_say_what_training_has_seen(tmp_path, monkeypatch, call):
    """`run`, `compare`, `data check` and `report` print it, and the run records it."""
    monkeypatch.chdir(tmp_path)
    source = [f"--data-root={write_release(tmp_path / 'data')}", "--dataset=mmwhs_sifa"]
    small = [*source, "--steps=2", "--device=cpu", "--no-mlflow", "--set=segmenter.width=4"]
    small += ["--set=grid.size=32", "--set=grid.spacing=2"]
    code, out, err = call("run", "--method=source_only", "--direction=ct-mr", *small)
    assert not code, err
    (caveat,) = (line for line in out.splitlines() if line.startswith("CAVEAT"))
    assert "issue 16" in caveat
    (run,) = Path("runs").glob("mmwhs_sifa/source_only/*/environment.json")
    assert json.loads(run.read_text())["caveat"] in caveat

    compare = ["compare", "--methods=source_only", "--seeds=1", "--no-bounds"]
    code, out, err = call(*compare, "--directions=ct-mr", *small)
    assert not code and out.count("CAVEAT") == 1, err
    code, out, err = call("report", "--out=page", "--data-root=data")
    assert not code and err.count("issue 16") == 1, err
    assert "issue 16" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    code, out, err = call("data", "check", "mmwhs_sifa", source[0])
    assert "warning (caveat): the MR test patients" in out


def test_glua_runs_and_predicts_every_slice(tmp_path):
    """End to end; the authors' evaluation skips slices after the last block of 128."""
    root = write_release(tmp_path / "data", slices=6, depth=130)
    settings = ("grid.spacing=1", "method.adgan_width=4")
    run, rows = run_glua("mmwhs_sifa", "ct-mr", root, tmp_path / "runs", *settings)
    assert set(rows["case"]) == {f"mr_{number}" for number in TEST_IDS["mr"]}
    assert set(rows["structure"]) == {"MYO", "LAC", "LVC", "AA"}
    for number in TEST_IDS["mr"]:
        volume: Any = nib.load(run / "predictions" / f"mr_{number}.nii.gz")
        assert volume.shape == (SIDE, SIDE, 130)
        assert set(np.unique(volume.dataobj)) <= {0, 1, 2, 3, 4}


# -- the four records of the release --------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    root = Path(os.environ.get("GLUA_BENCH_DATA", "")) / "sifa_release"
    if not os.environ.get("GLUA_BENCH_DATA") or not root.is_dir():
        pytest.skip("needs GLUA_BENCH_DATA with the directory 'sifa_release'")
    return root


@pytest.mark.realdata
def test_real_records_are_read(real):
    for domain in ("ct", "mr"):
        low, high = RANGES[domain]
        for folder in ("training", "validation"):
            image, label = read_slice(real / f"{folder}_{domain}" / "image_01.tfrecords")
            assert image.shape == label.shape == (256, 256)
            # Not compared as arrays, so that a failure prints nothing of a patient.
            assert bool(np.isfinite(image).all()) and low < image.min() and image.max() < high
            values = {int(value) for value in np.unique(label)}
            assert values <= {0, 1, 2, 3, 4, 5} and 5 in values and len(values) > 2
            scaled = rescaled(image, domain)
            assert scaled.min() > -1 and scaled.max() < 1


@pytest.mark.realdata
def test_real_records_are_found_and_tests_are_asked_for(real):
    with pytest.raises(DataError) as error:
        MMWHSSIFA(real).prepare()
    lacking = sentence(error, real).partition(" lacks ")[2].partition(":")[0]
    # Slices of every role are found, and no test volume of either domain.
    assert re.fullmatch(r"ct test volumes 1003[\d, ]+; mr test volumes [\d, ]+", lacking)
