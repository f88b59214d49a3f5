"""inputs.py: which volumes are found in files and directories, and how results are named."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from glua_bench.data.dicom_series import series_of
from glua_bench.data.formats import stem
from glua_bench.errors import DataError
from glua_bench.runs import inputs

PLANE = ((1, 0, 0), (0, 1, 0))


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def names(*paths: Path) -> list[str]:
    return [one.name for one in inputs.find(paths).images]


def refused(*paths: Path) -> str:
    with pytest.raises(DataError) as error:
        inputs.find(paths)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text, text
    return text


def test_a_folder_stands_for_its_volumes(tmp_path: Path) -> None:
    files = ("b.nii.gz", "a.nrrd", "c.mhd", "c.raw", "._a.nrrd", ".b.nii.gz", "notes.txt")
    touch(*(tmp_path / name for name in files), tmp_path / "deeper" / "d.nii.gz")
    assert names(tmp_path) == ["a", "b", "c"]
    assert names(tmp_path / "b.nii.gz", tmp_path) == ["b", "a", "c"]  # each once


def test_labels_beside_images_are_passed_over_and_named(tmp_path: Path) -> None:
    ends = ("", "_label", "-Seg", ".gt", "_manual", "_mask", "_prob")
    touch(*(tmp_path / f"one{end}.nii.gz" for end in ends))
    found = inputs.find([tmp_path])
    assert [one.name for one in found.images] == ["one"]
    assert len(found.left) == len(ends) - 1
    # Explicit files are always used, and a single word is not a label's name.
    assert names(tmp_path / "one_label.nii.gz") == ["one_label"]
    touch(tmp_path / "other" / "mask.nii.gz")
    assert names(tmp_path / "other") == ["mask"]


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path / "labels" / "a_seg.nii.gz", tmp_path / "empty" / "notes.txt")
    assert "only labels (a_seg.nii.gz)" in refused(tmp_path / "labels")
    assert "no volume" in refused(tmp_path / "empty")
    assert "give its subdirectories (empty)" in refused(tmp_path)
    assert "none.nii.gz does not exist" in refused(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("folder", ["labelsTr", "labelsTs", "Labels", "masks", "gt"])
def test_a_folder_of_labels_is_no_folder_of_images(folder: str, tmp_path: Path) -> None:
    """nnU-Net and the Decathlon give labels the names of their images."""
    touch(tmp_path / folder / "liver_1.nii.gz", tmp_path / "imagesTs" / "liver_1.nii.gz")
    assert f"{folder} seems to contain only labels" in refused(tmp_path / folder)
    assert "give its subdirectories (imagesTs)" in refused(tmp_path)
    assert names(tmp_path / folder / "liver_1.nii.gz") == ["liver_1"]


def test_the_channel_is_no_part_of_a_name_of_nnunet(tmp_path: Path) -> None:
    folder = tmp_path / "imagesTs"
    touch(folder / "liver_001_0000.nii.gz", folder / "liver_002_0000.nii.gz")
    assert names(folder) == ["liver_001", "liver_002"]
    touch(tmp_path / "mine" / "a_0000.mha")
    assert names(tmp_path / "mine") == ["a"]


@pytest.mark.parametrize("folder", ["imagesTs", "brain"])
def test_several_channels_are_refused(folder: str, tmp_path: Path) -> None:
    cases = [f"{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)]
    touch(*(tmp_path / folder / name for name in cases))
    assert "contains 2 channels per case (_0000, _0001)" in refused(tmp_path / folder)
    channel = sorted((tmp_path / folder).glob("*_0001.nii.gz"))
    assert names(*channel) == ["a_0001", "b_0001"]


def test_the_channels_of_a_case_are_joined(tmp_path: Path) -> None:
    folder = tmp_path / "imagesTs"
    cases = [folder / f"{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)]
    touch(*cases, tmp_path / "one, two.nii.gz", tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz")
    for paths in ([folder], cases, cases[::-1]):
        found = sorted(inputs.find(paths, 2).images, key=lambda image: image.name)
        assert [image.name for image in found] == ["a", "b"]
        files = [(image.path.name, image.further[0].path.name) for image in found]
        assert files == [(f"{c}_0000.nii.gz", f"{c}_0001.nii.gz") for c in "ab"]
    # A comma may be part of a name.
    (plain,) = inputs.find([tmp_path / "one, two.nii.gz"], 2).images
    assert plain.name == "one, two" and not plain.further
    (pair,) = inputs.find([Path(f"{tmp_path / 't1.nii.gz'}, {tmp_path / 't2.nii.gz'}")], 2).images
    assert pair.name == "t1" and pair.further[0].path == tmp_path / "t2.nii.gz"
    cases[3].unlink()
    with pytest.raises(DataError, match="Case b in .* has the channel.s. _0000, but .* _0001"):
        inputs.find([folder], 2)


def test_numbered_patients_are_no_channels(tmp_path: Path) -> None:
    touch(*(tmp_path / f"patient_{number:04d}.nii.gz" for number in range(3)))
    assert names(tmp_path) == ["patient_0000", "patient_0001", "patient_0002"]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    one, two, deep = (tmp_path / n / "scan.nii.gz" for n in ("one", "two", "three/one"))
    touch(one, two, deep)
    assert names(one, two) == ["one_scan", "two_scan"]
    assert names(one) == ["scan"]
    found = names(one, two, deep)
    assert found[1:] == ["two_scan", "three_one_scan"] and found[0].endswith("_one_scan")
    other = one.with_name("scan.mha")
    touch(other)
    assert names(one, other) == ["scan_niigz", "scan_mha"]
    again = one.with_name("SCAN.nii.gz")
    touch(again)
    assert names(one, again) == ["scan_niigz", "SCAN_niigz_2"]
    touch(tmp_path / "x" / "one_scan.nii.gz")
    found = names(one, two, tmp_path / "x" / "one_scan.nii.gz")
    assert len(set(found)) == 3 and found[1] == "two_scan"


parts = st.sampled_from(["a", "A", "b", "a_b", "\u00e4", "a\u0308"])


@given(st.lists(st.tuples(st.lists(parts, max_size=3), parts, st.sampled_from(inputs.SUFFIXES))))
def test_names_always_differ_on_every_disk(files: list[tuple[list[str], str, str]]) -> None:
    paths = dict.fromkeys(Path("/", *folders, name + end) for folders, name, end in files)
    pairs = [(path, stem(path)) for path in paths]
    found = inputs._unique_names(pairs)
    folded = {unicodedata.normalize("NFC", name.casefold()) for name in found}
    assert len(folded) == len(pairs)
    assert all("/" not in name for name in found)
    assert all(pair[1] in name for pair, name in zip(pairs, found, strict=True))


@pytest.fixture
def write_series(dicom_slice: Callable[..., Any]) -> Callable[..., Path]:
    """Write five random slices, 2.5 mm apart, with names in reverse order."""

    def write(folder: Path, series: str = "1.2.3", title: str = "ax", prefix: str = "") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(3)
        for number in range(5):
            pixels = rng.integers(0, 900, (9, 12)).astype(float)
            one = dicom_slice(pixels, np.array([3, -4, 2.5 * number]), PLANE, (2.0, 1.25), 1, -1024)
            one.SeriesInstanceUID, one.SeriesDescription = series, title
            pydicom.dcmwrite(folder / f"{prefix}{9 - number}", one, enforce_file_format=True)
        return folder

    return write


def test_a_series_is_one_volume_where_itk_puts_it(
    write_series: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_series(tmp_path / "scan")
    touch(folder / "DICOMDIR", folder / ".DS_Store", folder / "notes.txt")
    (one,) = inputs.find([folder]).images
    assert one.name == "scan" and len(one.slices) == 5
    file = one.open()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    assert np.array_equal(file.voxels(), sitk.GetArrayFromImage(image).T)
    sitk.WriteImage(image, str(tmp_path / "itk.nii.gz"))
    assert np.allclose(file.affine, nib.load(tmp_path / "itk.nii.gz").affine, atol=1e-5)
    assert file.spacing == pytest.approx((1.25, 2.0, 2.5))
    assert names(write_series(tmp_path / "other" / "scan"), folder)[0] == "other_scan"


def test_several_series_are_listed(write_series: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", "1.2.3", "portal")
    write_series(folder, "1.2.4", "", "z")
    told = refused(folder)
    assert "2 DICOM series (portal, 5 files from 5; without description, 5 files from z5)" in told
    # Files with different series identifiers are one anonymised series.
    alone = write_series(tmp_path / "anonymous")
    for number, file in enumerate(sorted(alone.iterdir())):
        one = pydicom.dcmread(file)
        one.SeriesInstanceUID = f"1.2.{number}"
        one.save_as(file)
    assert len(series_of(sorted(alone.iterdir()))) == 5
    assert inputs.find([alone]).images[0].open().shape == (12, 9, 5)


def test_a_slice_or_a_mixed_folder_is_one_sentence(
    write_series: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_series(tmp_path / "scan")
    assert "give the series' directory" in refused(folder / "5")
    touch(folder / "a.nii.gz")
    assert "contains both volumes (a.nii.gz) and DICOM files (5)" in refused(folder)
