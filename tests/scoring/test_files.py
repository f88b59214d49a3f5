"""files.py: pairs of files, the meaning of their values, and scores as those of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from glua_bench.errors import ConfigError, DataError
from glua_bench.scoring import files
from glua_bench.scoring.evaluation import summarise
from glua_bench.scoring.metrics import METRICS, case_metrics, distance_penalty
from glua_bench.task import Reading, Structure

SPACING = (1.0, 1.5, 4.0)
Write = Callable[..., Path]


def volume(shift: int = 0, shape: tuple[int, int, int] = (16, 14, 6)) -> np.ndarray:
    """Two nested boxes (1 around 2) and a third apart (3), moved along the first axis."""
    labels = np.zeros(shape, np.uint8)
    labels[2:9, 2:10, 1:5] = 1
    labels[4:7, 4:8, 2:4] = 2
    labels[10:13, 3:9, 2:5] = 3
    return np.roll(labels, shift, 0)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a label file below the temporary directory; NIfTI, or by ITK."""

    def save(name: str, labels: np.ndarray, affine: Any = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".nrrd", ".mha")):
            image = SimpleITK.GetImageFromArray(labels.T)
            image.SetSpacing(SPACING)
            image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
            SimpleITK.WriteImage(image, str(path))
        else:
            affine = np.diag([*SPACING, 1.0]) if affine is None else affine
            nib.save(nib.Nifti1Image(labels, affine), path)
        return path

    return save


def scored(*args: Any, **options: Any) -> tuple[Any, str]:
    """Score; return the rows and what is reported."""
    lines: list[str] = []
    return files.score_files(*args, report=lines.append, **options), "\n".join(lines)


# -- scores ---------------------------------------------------------------------------------------


def test_scores_are_those_of_a_run(write: Write) -> None:
    rows, said = scored(write("p.nii.gz", volume(1)), write("r.nrrd", volume()))
    structures = [Structure(str(v), "", (v,), "") for v in (1, 2, 3)]
    expected = case_metrics(volume(1), volume(), structures, SPACING)
    assert list(rows["case"].unique()) == ["r"] and rows["predicted"].all()
    for row, own in zip(rows.to_dict("records"), expected, strict=True):
        assert {name: row[name] for name in own} == pytest.approx(own)
    assert "Classes: label values found (1, 2, 3)." in said


def test_overlapping_structures_are_scored_each_for_itself(write: Write) -> None:
    both = Structure("both", "", (1, 2), "")
    inner = Structure("inner", "", (2,), "")
    rest = Structure("rest", "", (3,), "")
    rows, _ = scored(write("p.nii", volume(1)), write("r.nii", volume()), [both, inner, rest])
    by_name = rows.set_index("structure")
    outer = case_metrics(*((volume(k) % 3 > 0).astype(int) for k in (1, 0)), [both], SPACING)
    assert by_name.loc["both", "dice"] == outer[0]["dice"]
    assert by_name.loc["inner", "reference_ml"] < by_name.loc["both", "reference_ml"]


def test_unannotated_voxels_count_neither_as_hit_nor_as_error(write: Write) -> None:
    reference, prediction = volume(), volume()
    reference[:, :, 0] = 9
    prediction[:, :, 0] = 1
    paths = write("p.nii", prediction), write("r.nii", reference)
    structures = [Structure(str(v), "", (v,), "") for v in (1, 2, 3)]
    rows, _ = scored(*paths, structures, reading=Reading(unannotated_values=(9,)))
    assert (rows["dice"] == 1).all()
    with pytest.raises(DataError, match=r"r\.nii has label value\(s\) 9 not among the classes"):
        scored(*paths, structures)


def test_an_empty_pair_has_no_score_and_a_miss_the_worst(write: Write) -> None:
    structures = [Structure("3", "", (3,), ""), Structure("5", "", (5,), "")]
    only = np.where(volume() == 3, 3, 0).astype(np.uint8)
    rows, _ = scored(write("p.nii", np.zeros_like(only)), write("r.nii", only), structures)
    missed, absent = rows.to_dict("records")
    assert missed["missed"] and missed["dice"] == 0
    assert missed["hd95"] == distance_penalty(only.shape, SPACING)
    assert math.isnan(absent["dice"]) and not absent["missed"]


def test_medpy_agrees(write: Write) -> None:
    rows, _ = scored(write("p.nii", volume(2)), write("r.nii", volume()), verify=True)
    found = files.largest_differences(rows)
    assert set(found) == set(METRICS)
    assert all(difference < 1e-9 and count == 3 for difference, count in found.values())
    # A difference is found where there is one.
    assert files.largest_differences(rows.assign(assd=rows["assd"] + 0.5))["assd"][0] > 0.49


# -- grids ----------------------------------------------------------------------------------------


def test_a_prediction_on_another_grid_is_refused(write: Write) -> None:
    reference = write("r.nii", volume())
    prediction = write("p.nii", volume(shape=(17, 14, 6)))
    with pytest.raises(DataError, match=r"p\.nii has shape .* but its reference .*r\.nii has") as e:
        scored(prediction, reference)
    assert "resample the label onto the reference" in str(e.value)
    turned = write("t.nii", volume(), np.diag([-1.0, 1.5, 4.0, 1.0]))
    with pytest.raises(DataError, match="orientation LAS but its reference .* has RAS"):
        scored(turned, reference)


# -- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        (["a.nii.gz", "b.nii.gz"], ["a.nrrd", "b.mha"]),
        (["fold_0/validation/a.nii.gz", "fold_1/validation/b.nii.gz"], ["a.nii", "b.nii"]),
        (["a_pred.nii.gz", "b_pred.nii.gz"], ["a_label.nii.gz", "b_label.nii.gz"]),
        (["a.nii.gz", "b.nii.gz"], ["a_0000.nii.gz", "b_0000.nii.gz"]),
        (["a/seg.nii.gz", "b/seg.nii.gz"], ["a/seg.nii.gz", "b/seg.nii.gz"]),
        (["a/pred.nii.gz", "b/pred.nii.gz"], ["a/truth.nii.gz", "b/truth.nii.gz"]),
        (["a/pred.nii.gz", "b/pred.nii.gz"], ["a.nii.gz", "b.nii.gz"]),
        (["x 1/a.nii.gz", "x 1/b.nii.gz"], ["a.nii.gz", "b.nii.gz"]),
    ],
)
def test_files_are_paired_by_name(
    write: Write, tmp_path: Path, predictions: list[str], references: list[str]
) -> None:
    for name in predictions:
        write(f"p/{name}", volume())
    for name in references:
        write(f"r/{name}", volume())
    for name in ("summary.json", "dataset.json", "plans.json", "._a.nii.gz"):
        (tmp_path / "p" / name).write_text("{}")
    found = files.pair(tmp_path / "p", tmp_path / "r")
    assert len(found.cases) == 2 and not found.missing and not found.spare
    for (name, (prediction, reference)), wanted in zip(found.cases.items(), "ab", strict=True):
        assert wanted in name
        for path, names in ((prediction, predictions), (reference, references)):
            assert path is not None and path.as_posix().endswith(names["ab".index(wanted)])


def test_missing_and_spare_predictions_are_told(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(f"r/{name}.nii", volume())
    for name in ("a", "z"):
        write(f"p/{name}.nii", volume())
    rows, said = scored(tmp_path / "p", tmp_path / "r")
    assert "No prediction for 2 of 3 references" in said and "b, c." in said
    assert "No reference for 1 predictions" in said and "z.nii" in said
    assert list(rows["predicted"]) == [True] * 3 + [False] * 6
    mean = summarise(rows.assign(selector="")).set_index("structure").loc["mean"]
    assert mean["dice"] == pytest.approx(1 / 3) and mean["cases"] == 3 and mean["misses"] == 6
    rows, said = scored(tmp_path / "p", tmp_path / "r", only_predicted=True)
    assert set(rows["case"]) == {"a"} and "are omitted" in said and "b, c." in said


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ([], "p does not exist"),
        (["p/x.txt"], "p contains no volume"),
        (["p/q.nii"], "No file in .*p has the name of a reference"),
        (["p/1/a.nii", "p/2/a.nii"], "have the same name 'a'; give a directory"),
        (["p/nn/dataset.json", "p/a.nii", "r/dataset.json"], "r/dataset.json has no readable"),
    ],
)
def test_mistakes_end_in_a_sentence(
    write: Write, tmp_path: Path, make: list[str], words: str
) -> None:
    write("r/a.nii", volume())
    for name in make:
        if name.endswith(".nii"):
            write(name, volume())
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("[]")
    with pytest.raises(ConfigError, match=words):
        scored(tmp_path / "p", tmp_path / "r")


def test_a_file_is_not_compared_with_itself_or_with_a_directory(
    write: Write, tmp_path: Path
) -> None:
    path = write("r/a.nii", volume())
    with pytest.raises(ConfigError, match="as prediction and as reference"):
        files.pair(path, path)
    with pytest.raises(ConfigError, match="two files or two directories"):
        files.pair(path, tmp_path / "r")
    with pytest.raises(ConfigError, match="is not a volume"):
        (tmp_path / "x.txt").write_text("")
        files.pair(tmp_path / "x.txt", path)


# -- classes --------------------------------------------------------------------------------------


def test_classes_of_nnunet(write: Write, tmp_path: Path) -> None:
    write("Dataset501_x/labelsTr/a.nii", volume())
    write("p/a.nii", volume(1))
    labels = {"background": 0, "outer": [1, 2], "inner": 2, "other": 3, "ignore": 4}
    (tmp_path / "Dataset501_x" / "dataset.json").write_text(json.dumps({"labels": labels}))
    rows, said = scored(tmp_path / "p", tmp_path / "Dataset501_x" / "labelsTr")
    assert list(rows["structure"]) == ["outer", "inner", "other"]
    assert "Dataset501_x/dataset.json" in said
    first = {"labels": {"0": "background", "1": "LV", "2": "RV", "3": "MYO"}}
    (tmp_path / "Dataset501_x" / "dataset.json").write_text(json.dumps(first))
    rows, _ = scored(tmp_path / "p", tmp_path / "Dataset501_x" / "labelsTr")
    assert list(rows["structure"]) == ["LV", "RV", "MYO"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"background": 0, "liver": 1.5}, "has no readable labels of nnU-Net"),
        ({"background": 0, "liver": []}, "has no readable labels of nnU-Net"),
        ({"background": 0, "ignore": 1}, "has no label besides the background"),
    ],
)
def test_unusable_labels_of_nnunet_are_refused(
    write: Write, tmp_path: Path, labels: dict[str, Any], words: str
) -> None:
    paths = write("p/a.nii", volume()), write("r/a.nii", volume())
    (tmp_path / "r" / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ConfigError, match=words):
        scored(*paths)


def test_the_ignore_label_of_nnunet_is_excluded(write: Write, tmp_path: Path) -> None:
    reference = volume()
    reference[:, :, 0] = 4
    prediction = volume()
    prediction[:, :, 0] = 3
    write("r/a.nii", reference)
    write("p/a.nii", prediction)
    labels = {"background": 0, "A": 1, "B": 2, "C": 3, "ignore": 4}
    (tmp_path / "p" / "dataset.json").write_text(json.dumps({"labels": labels}))
    rows, _ = scored(tmp_path / "p", tmp_path / "r")
    assert list(rows["structure"]) == ["A", "B", "C"] and (rows["dice"] == 1).all()


def test_an_image_is_not_taken_for_a_label(write: Write) -> None:
    image = np.arange(16 * 14 * 6, dtype=np.int16).reshape(16, 14, 6)
    with pytest.raises(DataError, match="more than 250 label values, as an image has"):
        scored(write("p.nii", image), write("r.nii", volume()))
    with pytest.raises(DataError, match="not integers"):
        scored(write("f.nii", image.astype(np.float32) + 0.5), write("q.nii", volume()))
    empty = np.zeros((16, 14, 6), np.uint8)
    with pytest.raises(DataError, match="nothing to score"):
        scored(write("e.nii", empty), write("g.nii", empty))
