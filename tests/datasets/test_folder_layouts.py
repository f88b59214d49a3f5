"""folder/layouts.py: cases by patterns, from a table, and in nnU-Net's layout."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from glua_bench.data.nnunet import nnunet_unannotated, nnunet_values
from glua_bench.datasets.folder.layouts import (
    by_nnunet,
    by_pattern,
    by_table,
    pattern_fault,
    validation_ids,
)
from glua_bench.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


TOLD = Path("own.yaml")


@pytest.mark.parametrize(
    ("images", "labels", "files"),
    [
        ("ct/*_image.nii.gz", "ct/*_label.nii.gz", ("ct/{}_image.nii.gz", "ct/{}_label.nii.gz")),
        ("ct/*.nii.gz", "ct/*_label.nii.gz", ("ct/{}.nii.gz", "ct/{}_label.nii.gz")),
        ("img/*.mha", "seg/*.nrrd", ("img/{}.mha", "seg/{}.nrrd")),
        ("*/mr.nii", "*/mr_seg.nii", ("{}/mr.nii", "{}/mr_seg.nii")),
        ("*/scan_*.nii", "*/truth_*.nii", ("{}/scan_7.nii", "{}/truth_9.nii")),
        ("**/*_img.nii", "**/*_gt.nii", ("a/b/{}_img.nii", "c/{}_gt.nii")),
        ("x(1)/img?_*.nii", "x(1)/lab_*.nii", ("x(1)/img7_{}.nii", "x(1)/lab_{}.nii")),
    ],
)
def test_the_first_star_is_the_id(
    tmp_path: Path, images: str, labels: str, files: tuple[str, str]
) -> None:
    root = touch(tmp_path / "d", *(name.format(case) for name in files for case in ("p1", "p2")))
    found = by_pattern(root, images, labels, TOLD)
    assert [(f.id, f.image, f.label) for f in found] == [
        (case, root / files[0].format(case), root / files[1].format(case)) for case in ("p1", "p2")
    ]
    assert [f.label for f in by_pattern(root, images, None, TOLD)][-1] is None


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        ("*.mha", None, "matches \\*.mha .*: correct the pattern"),
        ("*_i.nii", "*_x.nii", "matches \\*_x.nii .*: correct the pattern."),
        ("*_i.nii", "*_l.nii", "c_l.nii has no image that matches \\*_i.nii"),
        ("*_?.nii", None, "a_i.nii and .*a_l.nii have the same id 'a' by the pattern"),
    ],
)
def test_patterns_that_do_not_fit_are_told(
    tmp_path: Path, images: str, labels: str | None, said: str
) -> None:
    root = touch(tmp_path / "d", "a_i.nii", "a_l.nii", "b_i.nii", "c_l.nii")
    with pytest.raises(DataError, match=said):
        by_pattern(root, images, labels, TOLD)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (
            "*.nii",
            "*.nii",
            "'images' and 'labels' have the same pattern; give the labels their own",
        ),
        ("a.nii", None, "'images' needs a * in place of the case's id, as in ct/*.nii.gz"),
        ("**/a.nii", None, "'images' needs a * in place of the case's id, as in ct/*.nii.gz"),
        ("*.nii", "/x/*.nii", "'labels' must be relative to the root, without .."),
        ("../*.nii", None, "'images' must be relative to the root, without .."),
        ("a**/b?.nii", None, ""),
        ("*.nii", "seg/*.nii", ""),
    ],
)
def test_patterns_that_cannot_be_right_have_a_fault(
    images: str, labels: str | None, said: str
) -> None:
    assert pattern_fault(images, labels) == said


def test_a_table_names_files_subjects_and_splits(tmp_path: Path) -> None:
    root = touch(tmp_path, "s/a.nii", "s/b.nii", "s/la.nii")
    file = tmp_path / "ct.csv"
    file.write_text(
        "\ufeffid, image,label,subject,split\n001,s/a.nii,s/la.nii,anna,test\n,s/b.nii,,,\n",
        encoding="utf-8",
    )
    first, second = by_table(root, file)
    assert (first.id, first.image, first.label) == ("001", root / "s/a.nii", root / "s/la.nii")
    assert (first.subject, first.split) == ("anna", "test")
    assert (second.id, second.label, second.subject, second.split) == ("b", None, "", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,file\n", "has the columns id, file: give image and label"),
        ("", "has the columns none: give image"),
        ("image,label\n", "has no rows: list the cases in it"),
        ("image,label\n,a.nii\n", "line 2, has no image: fill in the column"),
        ("image,label\nno.nii,\n", "no.nii .*ct.csv, line 2. does not exist: correct the path"),
        ("image,split\na.nii,training\n", "line 2, has the split 'training': use train, val, test"),
        ("image\na.nii\na.nii\n", "line 3, repeats 'a': give each case one line"),
    ],
)
def test_tables_that_cannot_be_used_are_told(tmp_path: Path, text: str, said: str) -> None:
    touch(tmp_path, "a.nii")
    (tmp_path / "ct.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        by_table(tmp_path, tmp_path / "ct.csv")
    with pytest.raises(DataError, match="none.csv cannot be read as CSV"):
        by_table(tmp_path, tmp_path / "none.csv")


def nnunet(root: Path, **facts: object) -> Path:
    folder = touch(
        root / "Dataset007_Organs",
        *(f"imagesTr/c_{n}_000{m}.nii.gz" for n in (1, 2, 3) for m in (0, 1)),
        *(f"labelsTr/c_{n}.nii.gz" for n in (1, 2)),
        *(f"imagesTs/c_{n}_0000.nii.gz" for n in (4, 5)),
        "labelsTs/c_4.nii.gz",
    )
    content = {"file_ending": ".nii.gz", "labels": {"background": 0, "liver": 1}, **facts}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_nnunet_s_folders_are_read_as_they_are(tmp_path: Path) -> None:
    folder = nnunet(tmp_path)
    found = by_nnunet(folder)
    assert [(f.id, f.split, f.label is not None) for f in found] == [
        ("c_1", "train", True),
        ("c_2", "train", True),
        ("c_3", "train", False),
        ("c_4", "test", True),
    ]
    assert found[0].image == folder / "imagesTr/c_1_0000.nii.gz"
    assert by_nnunet(folder, channel=1)[0].image == folder / "imagesTr/c_1_0001.nii.gz"
    (folder / "splits_final.json").write_text(
        json.dumps([{"train": ["c_1"], "val": ["c_2"]}, {"train": ["c_2"], "val": ["c_1"]}])
    )
    assert [f.split for f in by_nnunet(folder, fold=1)] == ["val", "train", "train", "test"]


def test_files_that_dataset_json_lists_are_taken(tmp_path: Path) -> None:
    entry = {"images": ["imagesTr/c_1_0001.nii.gz"], "label": "labelsTr/c_2.nii.gz"}
    folder = nnunet(tmp_path, dataset={"one": entry})
    (found,) = by_nnunet(folder)
    assert found.id == "one" and found.label == folder / "labelsTr/c_2.nii.gz"
    folder = nnunet(tmp_path, dataset={"one": {**entry, "label": "labelsTr/none.nii.gz"}})
    with pytest.raises(DataError, match="none.nii.gz, listed in .*dataset.json, does not exist"):
        by_nnunet(folder)
    with pytest.raises(DataError, match="lists no channel 3 or no label for 'one'"):
        by_nnunet(folder, channel=3)


def test_nnunet_s_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset.json cannot be read .*: give a nnU-Net folder"):
        by_nnunet(tmp_path)
    folder = nnunet(tmp_path)
    with pytest.raises(DataError, match="matches CASE_0002.nii.gz: check the folder"):
        by_nnunet(folder, channel=2)
    with pytest.raises(DataError, match="splits_final.json cannot be read .* remove 'fold'"):
        by_nnunet(folder, fold=0)
    (folder / "splits_final.json").write_text(json.dumps([{"val": ["x"]}]))
    with pytest.raises(DataError, match="lists 'x', which is not in"):
        by_nnunet(folder, fold=0)
    with pytest.raises(DataError, match="has no fold 4 with a list 'val'"):
        by_nnunet(folder, fold=4)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="is not a JSON object"):
        by_nnunet(folder)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            {"background": 0, "liver": 1, "kidneys": [2, 3], "ignore": 4},
            {"liver": (1,), "kidneys": (2, 3)},
        ),
        ({"0": "background", "1": "liver"}, {"liver": (1,)}),
        ({"whole": [1, 2], "core": [2]}, {"whole": (1, 2), "core": (2,)}),
        ({"0": "background", "1": "liver", "2": "ignore"}, {"liver": (1,)}),
        ({"liver": 1.0}, {"liver": (1,)}),
        ({"liver": 1.5}, "Label 'liver' in .* has the value 1.5: give integers"),
        ({"liver": "one"}, "Label 'liver' in .* has the value one: give integers"),
        (None, "has no object 'labels'"),
    ],
)
def test_nnunet_s_labels(tmp_path: Path, labels: object, expected: object) -> None:
    folder = nnunet(tmp_path, labels=labels)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            nnunet_values(folder)
    else:
        assert nnunet_values(folder) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "liver": 1, "ignore": 2}, (2,)),
        ({"0": "background", "1": "liver", "2": "ignore"}, (2,)),
        ({"background": 0, "liver": 1}, ()),
    ],
)
def test_nnunet_s_ignore_is_known(
    tmp_path: Path, labels: object, expected: tuple[int, ...]
) -> None:
    assert nnunet_unannotated(nnunet(tmp_path, labels=labels)) == expected


NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("image", "label"), [(NFD, NFC), (NFC, NFD)])
def test_image_and_label_meet_whatever_the_unicode_form(
    tmp_path: Path, image: str, label: str
) -> None:
    root = touch(tmp_path, f"ct/{image}_i.nii.gz", f"ct/{label}_l.nii.gz")
    (found,) = by_pattern(root, "ct/*_i.nii.gz", "ct/*_l.nii.gz", TOLD)
    assert (found.id, found.label) == (NFC, root / f"ct/{label}_l.nii.gz")

    (root / "ct.csv").write_text(
        f"image,label\nct/{label}_i.nii.gz,ct/{image}_l.nii.gz\n", encoding="utf-8"
    )
    (found,) = by_table(root, root / "ct.csv")
    assert found.id == f"{NFC}_i" and found.label == root / f"ct/{label}_l.nii.gz"

    folder = touch(tmp_path / "raw", f"imagesTr/{image}_0000.nii.gz", f"labelsTr/{label}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}}))
    (folder / "splits_final.json").write_text(json.dumps([{"train": [], "val": [label]}]))
    (found,) = by_nnunet(folder, fold=0)
    assert (found.id, found.split) == (NFC, "val") and found.label is not None
    assert validation_ids(folder, 0) == [NFC]


def test_hidden_files_are_no_cases(tmp_path: Path) -> None:
    root = touch(tmp_path / "d", "a_i.nii", "._a_i.nii", "a_l.nii", "._a_l.nii")
    assert [f.id for f in by_pattern(root, "*_i.nii", "*_l.nii", TOLD)] == ["a"]
    folder = touch(nnunet(tmp_path), "imagesTr/._c_1_0000.nii.gz", "labelsTr/._c_1.nii.gz")
    assert [f.id for f in by_nnunet(folder)] == ["c_1", "c_2", "c_3", "c_4"]


def test_linked_directories_and_brackets_are_as_good_as_others(tmp_path: Path) -> None:
    store = touch(tmp_path / "store [1]", "ct/a_i.nii", "ct/a_l.nii")
    root = tmp_path / "root [ct]"
    root.mkdir()
    (root / "ct [2]").symlink_to(store / "ct", target_is_directory=True)
    (store / "ct" / "loop").symlink_to(root, target_is_directory=True)
    for images, labels in (
        ("ct [2]/*_i.nii", "ct [2]/*_l.nii"),
        ("**/*_i.nii", "**/*_l.nii"),
    ):
        (found,) = by_pattern(root, images, labels, TOLD)
        assert found.id == "a" and found.image == root / "ct [2]" / "a_i.nii"
    folder = nnunet(store)
    (root / "Dataset007_Organs [x]").symlink_to(folder, target_is_directory=True)
    assert len(by_nnunet(root / "Dataset007_Organs [x]")) == 4


def test_one_case_in_training_and_test_is_told(tmp_path: Path) -> None:
    folder = touch(nnunet(tmp_path), "imagesTs/c_1_0000.nii.gz", "labelsTs/c_1.nii.gz")
    with pytest.raises(DataError, match="imagesTs/c_1_0000.nii.gz have the same id 'c_1': remove"):
        by_nnunet(folder)


def decathlon(root: Path, **facts: object) -> Path:
    """Write Task09 as distributed: no channels in names, listed paths, macOS shadow files."""
    folder = touch(
        root / "Task09_Spleen",
        *(f"imagesTr/spleen_{n}.nii.gz" for n in (2, 10)),
        *(f"labelsTr/spleen_{n}.nii.gz" for n in (2, 10)),
        *(f"imagesTr/._spleen_{n}.nii.gz" for n in (2, 10)),
        "imagesTs/spleen_1.nii.gz",
    )
    content = {
        "name": "Spleen",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "numTraining": 2,
        "training": [
            {
                "image": f"./imagesTr/spleen_{n}.nii.gz",
                "label": f"./labelsTr/spleen_{n}.nii.gz",
            }
            for n in (2, 10)
        ],
        "test": ["./imagesTs/spleen_1.nii.gz"],
        **facts,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_the_decathlon_s_folders_are_read_as_they_are(tmp_path: Path) -> None:
    folder = decathlon(tmp_path)
    assert [(f.id, f.split) for f in by_nnunet(folder)] == [
        ("spleen_10", "train"),
        ("spleen_2", "train"),
    ]
    assert by_nnunet(folder)[0].image == folder / "imagesTr/spleen_10.nii.gz"
    assert by_nnunet(folder)[1].label == folder / "labelsTr/spleen_2.nii.gz"
    assert nnunet_values(folder) == {"spleen": (1,)}
    touch(folder, "labelsTs/spleen_1.nii.gz")  # of somebody who has labelled the test images
    assert by_nnunet(folder)[0].split == "test"
    # As nnU-Net v1 kept the same: numbers in the files' names, none in the list.
    for file in (folder / "imagesTr").glob("spleen*"):
        file.rename(file.with_name(file.name.replace(".nii.gz", "_0000.nii.gz")))
    assert [f.id for f in by_nnunet(folder)] == ["spleen_10", "spleen_2"]


@pytest.mark.parametrize(
    ("facts", "channel", "said"),
    [
        (
            {"modality": {"0": "FLAIR", "1": "T1w"}},
            0,
            "holds 2 modalities in each 4-D file: split them with `nnUNetv2_convert_MSD_dataset",
        ),
        ({}, 1, "has a single modality, not 2"),
        ({"training": [{"label": "x"}]}, 0, "lists .* under 'training': give file paths"),
        (
            {"training": [{"image": "./imagesTr/none.nii.gz"}]},
            0,
            "none.nii.gz, listed in .*, does not exist",
        ),
        ({"training": []}, 0, "imagesTr matches CASE_0000.nii.gz"),
    ],
)
def test_the_decathlon_s_faults_are_told(
    tmp_path: Path, facts: dict[str, object], channel: int, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        by_nnunet(decathlon(tmp_path, **facts), channel)
