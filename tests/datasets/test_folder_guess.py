"""folder/guess.py: guesses from names and voxels."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glua_bench.datasets.folder.guess import (
    domains_by_name,
    guess_domains,
    guess_patterns,
    look,
    volumes_in,
)
from glua_bench.datasets.folder.planes import body
from glua_bench.errors import DataError

TRAINS = ("1001", "1020")


def both(image: str, label: str, ids: tuple[str, ...] = ("1", "2")) -> list[str]:
    return sorted(name.format(case, case) for name in (image, label) for case in ids)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (both("ct/{}_image.nii", "ct/{}_label.nii"), ("ct/*_image.nii", "ct/*_label.nii")),
        (
            both("ct_train/ct_train_{}_image.nii", "ct_train/ct_train_{}_label.nii", TRAINS),
            ("ct_train/ct_train_*_image.nii", "ct_train/ct_train_*_label.nii"),
        ),
        # The ids of images and labels agree only without the letters before them.
        (both("img/img00{}.nii", "label/label00{}.nii"), ("img/img*.nii", "label/label*.nii")),
        (
            both("C0/patient{}_C0.nii.gz", "C0/patient{}_C0_manual.nii.gz", ("1", "12")),
            ("C0/*_C0.nii.gz", "C0/*_C0_manual.nii.gz"),
        ),
        (both("{}/mr.nrrd", "{}/mr_seg.nrrd", ("p1", "q")), ("*/mr.nrrd", "*/mr_seg.nrrd")),
        (both("{}/{}_t1.mha", "{}/{}_gt.mha", ("p1", "p2")), ("*/*_t1.mha", "*/*_gt.mha")),
        # A person's name is not cut where two begin alike.
        (["ct/smith.nii", "ct/smythe.nii"], ("ct/*.nii", None)),
        # The word that labels have stands in all paths, so it tells nothing.
        (["seg/a_1.nii", "seg/a_2.nii"], ("seg/a_*.nii", None)),
        (["ct/one.nii"], ("ct/*.nii", None)),
        # At several depths, and one id in each of several folders.
        (["a/1.nii", "a/b/2.nii"], ("a/**/*.nii", None)),
        (["a/s1.nii", "a/s2.nii", "b/s3.nii"], ("**/*.nii", None)),
        # One case, whose id only its label tells; one label among several images.
        (["ct/p1_image.nii", "ct/p1_label.nii"], ("ct/*_image.nii", "ct/*_label.nii")),
        (["p1/mr.nii", "p1/mr_seg.nii"], ("*/mr.nii", "*/mr_seg.nii")),
        (["ct/7.nii", "ct/8.nii", "ct/8_label.nii"], ("ct/*.nii", "ct/*_label.nii")),
        # Compressed and not.
        (
            ["ct/a_x.nii", "ct/b_x.nii.gz", "ct/a_x_gt.nii.gz", "ct/b_x_gt.nii.gz"],
            ("ct/*_x.nii*", "ct/*_x_gt.nii.gz"),
        ),
    ],
)
def test_patterns_are_found(paths: list[str], expected: tuple[str, str | None]) -> None:
    assert guess_patterns(paths) == expected


def test_paths_without_a_pattern_are_told() -> None:
    with pytest.raises(DataError, match="No pattern matches exactly a/1.nii, a/b/1.nii and"):
        guess_patterns(["a/1.nii", "a/b/1.nii"])
    with pytest.raises(DataError, match="or list them in a table"):
        guess_patterns(["a/1.nii", "a/2.nii"], lambda images, labels: False)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x/1_ct.nii", "x/1_mr.nii", "x/2_mr.nii"], {"ct": 1, "mr": 2}),
        (["CT/a.nii", "MR/b.nii"], {"ct": 1, "mr": 1}),
        (["Hospital A/a.nii", "hospital-b/b.nii"], {"hospital_a": 1, "hospital_b": 1}),
        (["images/a.nii", "labels/a.nii"], {}),
        (["a.nii", "x/b.nii"], {}),
        (["all/a.nii", "all/b.nii"], {}),
        # Directories of patients are no domains, and one label serves both sequences.
        ([f"p{n}/{name}.nii" for n in range(5) for name in ("a", "a_seg")], {}),
        (
            [f"p{n}/{name}.nii" for n in range(5) for name in ("t1", "t2", "seg")],
            {"t1": 10, "t2": 10},
        ),
    ],
)
def test_domains_are_found(paths: list[str], expected: dict[str, int]) -> None:
    assert {name: len(own) for name, own in guess_domains(paths).items()} == expected


def test_domains_are_taken_by_name() -> None:
    paths = ["a/pre_1.nii", "a/post_1.nii"]
    assert domains_by_name(paths, ["post", "pre"]) == {"post": [paths[1]], "pre": [paths[0]]}
    with pytest.raises(DataError, match="No volume has 'p' as a word in its path"):
        domains_by_name(paths, ["post", "p"])


def test_volumes_are_listed_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/1.NRRD", "a.nii.gz", "a.raw", ".b.nii", ".c/1.nii", "b/x.mhd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert volumes_in(tmp_path) == ["a.nii.gz", "b/1.NRRD", "b/x.mhd"]


def test_a_look_is_in_mm_along_the_body_s_axes(tmp_path: Path) -> None:
    # Stored as (up, right, front), with 8 mm between slices.
    affine = np.array([[0, 2, 0, 0], [0, 0, -3, 0], [8, 0, 0, 0], [0, 0, 0, 1]], float)
    rng = np.random.default_rng(0)
    scan = rng.integers(-1000, 900, (10, 40, 30)).astype(np.int16)
    label = np.zeros(scan.shape, np.uint8)
    label[3:5] = 7
    nib.save(nib.Nifti1Image(scan, affine), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "l.nii.gz")
    found = look({"a": tmp_path / "a.nii.gz"}, {"a": tmp_path / "l.nii.gz"})
    own = body(found.headers, found.anatomies, False)
    assert own.spacing.tolist() == [2, 3, 8] and own.extent.tolist() == [80, 90, 80]
    assert own.slices.tolist() == [40, 30, 2] and own.last == 1
    assert found.hounsfield and found.values == (7,)
    nib.save(nib.Nifti1Image(np.abs(scan), affine), tmp_path / "a.nii.gz")
    assert not look({"a": tmp_path / "a.nii.gz"}, {}).hounsfield
