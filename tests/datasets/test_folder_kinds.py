"""folder/kinds.py: several label files per case."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from own_volumes import own_volume, save_volume

from glua_bench.datasets.folder.guess import labels_among
from glua_bench.datasets.folder.kinds import stray_files
from glua_bench.datasets.folder.sources import _proposal, domains_of
from glua_bench.errors import DataError


def proposed(root: Path) -> tuple[str, str | None, str, tuple[str, ...]]:
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.nii.gz"))
    found = _proposal("ct", root, paths)
    return found.images, found.labels, found.no_labels, found.notes


def write(root: Path, images: str, *labels: tuple[str, int, int | None]) -> None:
    """Write cases 1 to 4; labels are a name, the number of cases, and one value or all."""
    for number in range(1, 5):
        image, label = own_volume(number)
        save_volume((image, label), root / images.format(number))
        values = np.asarray(label.dataobj)
        for name, count, value in labels:
            chosen = values if value is None else (values == value).astype(np.int16)
            if number <= count:
                path = root / name.format(number)
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(chosen, label.affine), path)


@pytest.mark.parametrize(
    ("images", "seg", "other"),
    [
        ("case{}.nii.gz", "case{}_seg.nii.gz", "case{}_seg_rater2.nii.gz"),
        ("p{0}/ct.nii.gz", "p{0}/ct_seg.nii.gz", "p{0}/ct_seg_old.nii.gz"),
        ("img/{}.nii.gz", "masks/{}.nii.gz", "masks_rater2/{}.nii.gz"),
    ],
)
def test_the_labels_of_all_cases_are_proposed_and_others_are_named(
    tmp_path: Path, images: str, seg: str, other: str
) -> None:
    write(tmp_path, images, (seg, 4, None), (other, 2, None))
    found = proposed(tmp_path)
    starred = re.sub(r"(case|p)?\{0?\}", "*", other)
    assert found[1] == re.sub(r"(case|p)?\{0?\}", "*", seg) and not found[2]
    assert found[3] == (f"ct: {found[1]} labels most cases; not used: {starred} (2 cases).",)


def test_labels_of_equal_standing_are_not_chosen_silently(tmp_path: Path) -> None:
    write(tmp_path, "c{}.nii.gz", ("c{}_seg.nii.gz", 4, None), ("c{}_seg_b.nii.gz", 4, None))
    images, labels, why, _ = proposed(tmp_path)
    assert (images, labels) == ("*.nii.gz", None)
    assert "several label files (*_seg.nii.gz (4 cases), *_seg_b.nii.gz (4 cases)): enter" in why


@pytest.mark.parametrize(
    ("images", "first", "second"),
    [
        ("p{}/image.nii.gz", "p{}/lv.nii.gz", "p{}/rv.nii.gz"),
        ("p{}_image.nii.gz", "p{}_lv.nii.gz", "p{}_rv.nii.gz"),
        ("scans/p{}.nii.gz", "lv/p{}.nii.gz", "rv/p{}.nii.gz"),
        ("s{}/ct.nii.gz", "s{}/segmentations/lv.nii.gz", "s{}/segmentations/rv.nii.gz"),
    ],
)
def test_one_file_per_structure_is_one_sentence_with_the_fix(
    tmp_path: Path, images: str, first: str, second: str
) -> None:
    write(tmp_path, images, (first, 4, 1), (second, 4, 2))
    found = proposed(tmp_path)
    assert found[0].count("*") >= 1 and found[1] is None
    assert "one label file per structure" in found[2] and "merge the masks of a case" in found[2]
    assert found[2].endswith("structure.") and "\n" not in found[2]


def test_masks_without_a_word_of_labels_are_told_by_their_voxels(tmp_path: Path) -> None:
    write(tmp_path, "p{}/scan.nii.gz", ("p{}/heart.nii.gz", 4, None))
    assert proposed(tmp_path)[:3] == ("*/scan.nii.gz", "*/heart.nii.gz", "")


def test_images_alone_stay_images(tmp_path: Path) -> None:
    write(tmp_path, "{}.nii.gz")
    assert proposed(tmp_path)[:3] == ("*.nii.gz", None, "")


def test_a_file_unlike_all_others_is_left_out_by_name(tmp_path: Path) -> None:
    write(tmp_path, "p{}_image.nii.gz", ("p{}_label.nii.gz", 4, None))
    save_volume(own_volume(9), tmp_path / "atlas of the mean.nii.gz")
    found = proposed(tmp_path)
    assert found[1] == "*_label.nii.gz"
    assert found[3] == ("ct: not used, because named unlike all others: atlas of the mean.nii.gz.",)
    assert stray_files(["smith.nii", "jones.nii", "miller.nii"]) == []


def test_time_series_beside_volumes_are_left_out_by_name(tmp_path: Path) -> None:
    """The layout of ACDC."""
    write(tmp_path, "p{0}/p{0}_frame01.nii.gz", ("p{0}/p{0}_frame01_gt.nii.gz", 4, None))
    for number in range(1, 5):
        image, _ = own_volume(number)
        beats = np.stack([np.asarray(image.dataobj)] * 2, -1)
        nib.save(nib.Nifti1Image(beats, image.affine), tmp_path / f"p{number}/p{number}_4d.nii.gz")
    found = proposed(tmp_path)
    assert found[1] is not None and found[1].endswith("_frame01_gt.nii.gz") and not found[2]
    assert len(found[3]) == 1 and "not used, because not 3-D: " in found[3][0]
    assert "_4d.nii.gz (4 files)." in found[3][0]


def test_dicom_is_named_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "p 1").mkdir()
    (tmp_path / "p 1" / "IM001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 64)
    with pytest.raises(DataError, match="holds DICOM files.*dcm2niix"):
        domains_of(tmp_path, (), lambda question, guess, read: read(guess))


def test_numbered_words_of_labels_count(tmp_path: Path) -> None:
    paths = ["img001.nii", "label001.nii", "img002.nii", "label002.nii"]
    assert labels_among(paths) == ["label001.nii", "label002.nii"]
