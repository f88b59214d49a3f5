"""evaluation.py: every slice is predicted and scored on the file's grid; misses are penalised."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.conformance import TinyDataset
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import Neighbourhood
from glua_bench.data.stores import CachedLabel
from glua_bench.data.volumes import load_label
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.errors import DataError
from glua_bench.scoring.evaluation import evaluate, predict_volume, summarise
from glua_bench.scoring.metrics import distance_penalty
from glua_bench.task import UNANNOTATED, Case, Grid

CPU = torch.device("cpu")
GRID = Grid(96, 3.0, 4.0)
QUIET = Progress(enabled=False)
Predict = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def dataset(phantom_root: Path) -> Phantom:
    return Phantom(phantom_root)


@pytest.fixture(scope="module", params=["ct", "mr"])
def case(request: pytest.FixtureRequest, dataset: Phantom) -> Case:
    return dataset.split(request.param, "test")[0]


def label_of(dataset: Phantom, case: Case) -> CachedLabel:
    return SliceCache().label(case, dataset.view(case.domain).on(GRID))


def perfect(dataset: Phantom, case: Case, without: int = -1) -> Predict:
    """Return a predictor of the labels on the working grid, for slices in order."""
    labels = torch.from_numpy(np.array(label_of(dataset, case).open(), dtype=np.int64))
    labels[labels == without] = 0
    answers = iter(labels)

    def predict(images: Tensor) -> Tensor:
        asked = torch.stack([next(answers) for _ in images])
        return 20.0 * F.one_hot(asked, len(dataset.structures) + 1).permute(0, 3, 1, 2).float()

    return predict


def score(
    predict: Predict, dataset: Phantom, cases: list[Case], folder: Path | None = None
) -> pd.DataFrame:
    return evaluate(predict, dataset, cases, GRID, SliceCache(), CPU, QUIET, folder)


# -- volumes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_slice_is_predicted_once_in_order(
    batch_size: int, dataset: Phantom, case: Case
) -> None:
    image = SliceCache().image(case.unlabelled(), dataset.view(case.domain).on(GRID))
    voxels, seen = np.asarray(image.open(), np.float32), []

    def predict(images: Tensor) -> Tensor:
        assert images.shape[1:] == (1, 96, 96) and len(images) <= batch_size
        assert images.dtype == torch.float32 and not torch.is_grad_enabled()
        seen.append(images)
        return torch.cat([images, -images, images * 0], 1)

    found = predict_volume(predict, image, CPU, batch_size)
    assert found.shape == (3, *voxels.shape) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert np.array_equal(torch.cat(seen)[:, 0].numpy(), voxels)
    assert np.array_equal(found.argmax(0) == 0, voxels > 0)


def test_every_slice_is_predicted_amid_its_neighbours(dataset: Phantom, case: Case) -> None:
    image = SliceCache().image(case.unlabelled(), dataset.view(case.domain).on(GRID))
    voxels = np.asarray(image.open(), np.float32)
    seen = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.cat([images[:, 1:2], -images[:, 1:2]], 1)

    found = predict_volume(predict, image, CPU, 7, Neighbourhood(3, 8.0))  # slices of 4 mm
    z = np.arange(len(voxels))
    stacks = torch.cat(seen).numpy()
    for channel, number in enumerate((z - 2, z, z + 2)):
        assert np.array_equal(stacks[:, channel], voxels[np.clip(number, 0, len(z) - 1)])
    assert np.array_equal(found.argmax(0) == 0, voxels >= 0)


def test_a_perfect_predictor_is_as_good_as_the_working_grid(dataset: Phantom, case: Case) -> None:
    """Only resampling to 3 mm pixels reduces the score."""
    rows = score(perfect(dataset, case), dataset, [case])
    assert list(rows["structure"]) == [s.name for s in dataset.structures]
    assert (rows["dice"] > 0.9).all() and (rows["dice"] < 1).any()
    assert (rows["assd"] < 1.5).all()
    assert not rows["missed"].any() and not rows["false_alarm"].any()
    assert (rows["case"] == case.id).all() and (rows["subject"] == case.subject).all()
    assert (rows["domain"] == case.domain).all()
    np.testing.assert_allclose(rows["prediction_ml"], rows["reference_ml"], rtol=0.1)


def test_volumes_are_those_of_the_label_file(dataset: Phantom, case: Case) -> None:
    rows = score(perfect(dataset, case), dataset, [case])
    label = nib.load(case.label)
    voxels = np.asarray(label.dataobj)
    ml = abs(np.linalg.det(label.affine[:3, :3])) / 1000
    expected = [np.isin(voxels, s.values).sum() * ml for s in dataset.structures]
    np.testing.assert_allclose(rows["reference_ml"], expected, rtol=1e-4)


def test_saved_volumes_lie_on_the_image_with_the_datasets_values(
    dataset: Phantom, case: Case, tmp_path: Path
) -> None:
    rows = score(perfect(dataset, case), dataset, [case], tmp_path)
    saved, image = nib.load(tmp_path / f"{case.id}.nii.gz"), nib.load(case.image)
    assert saved.shape == image.shape
    np.testing.assert_array_equal(saved.affine, image.affine)
    assert [int(saved.header[c]) for c in ("qform_code", "sform_code")] == [
        int(image.header[c]) for c in ("qform_code", "sform_code")
    ]
    voxels, reference = np.asarray(saved.dataobj), np.asarray(nib.load(case.label).dataobj)
    values = [structure.values[0] for structure in dataset.structures]
    assert set(np.unique(voxels)) == {0, *values}
    for structure, row in zip(dataset.structures, rows.to_dict("records"), strict=True):
        p, r = voxels == structure.values[0], np.isin(reference, structure.values)
        assert row["dice"] == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()))


def test_nothing_is_saved_where_nobody_asked(
    dataset: Phantom, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    score(perfect(dataset, case), dataset, [case])
    assert list(tmp_path.iterdir()) == []


# -- what is missed -------------------------------------------------------------------------------


def test_a_missed_structure_costs_the_penalty_and_is_counted(dataset: Phantom, case: Case) -> None:
    rows = score(perfect(dataset, case, without=2), dataset, [case])
    missed, found = rows.iloc[1], rows.drop(index=1)
    image = nib.load(case.image)
    penalty = distance_penalty(image.shape, image.header.get_zooms()[:3])
    assert missed["missed"] and missed["dice"] == 0 and missed["prediction_ml"] == 0
    assert missed["assd"] == missed["hd95"] == pytest.approx(penalty, rel=1e-5)
    assert (found["dice"] > 0.9).all() and not found["missed"].any()
    table = summarise(rows.assign(selector="last"))
    assert table["misses"].tolist() == [0, 1, 0, 0, 1]


@pytest.fixture
def partly(tmp_path: Path) -> tuple[type[TinyDataset], Case, np.ndarray]:
    """Return a test case with half of its label overwritten by 99, and the original classes."""
    dataset = TinyDataset(tmp_path / "data")
    dataset.prepare()
    case = dataset.split("plain", "test")[0]
    grid = dataset.grid("quick")
    whole = SliceCache().label(case, dataset.view(case.domain).on(grid)).open()
    whole = np.array(whole, np.int64)
    label = nib.load(case.truth)
    raw = np.asarray(label.dataobj).copy()
    raw[:, : raw.shape[1] // 2] = 99
    nib.save(nib.Nifti1Image(raw, label.affine), case.truth)
    return type(dataset), case, whole


def tiny_score(kind: type[TinyDataset], case: Case, answer: np.ndarray, **reading: object) -> Any:
    class Own(kind):  # type: ignore[misc, valid-type]
        """The dataset with another reading."""

    Own.reading = replace(kind.reading, **reading)  # type: ignore[arg-type]
    own, answers = Own(case.image.parents[1]), iter(torch.from_numpy(answer))

    def predict(images: Tensor) -> Tensor:
        asked = torch.stack([next(answers) for _ in images])
        return 20.0 * F.one_hot(asked, 3).permute(0, 3, 1, 2).float()

    return evaluate(predict, own, [case], own.grid("quick"), SliceCache(), CPU, QUIET)


def test_what_nobody_annotated_is_neither_right_nor_wrong(
    partly: tuple[type[TinyDataset], Case, np.ndarray],
) -> None:
    kind, case, whole = partly
    rows = tiny_score(kind, case, whole, unannotated_values=(99,))
    assert rows["dice"].tolist() == [1.0, 1.0] and rows["assd"].tolist() == [0.0, 0.0]
    raw = np.asarray(nib.load(case.truth).dataobj)
    expected = [np.isin(raw, s.values).sum() / 1000 for s in kind.structures]
    assert rows["reference_ml"].tolist() == rows["prediction_ml"].tolist() == expected
    # Any other answer there has the same scores.
    other, view = whole.copy(), kind.view(case.domain)
    placement = SliceCache().image(case.unlabelled(), view.on(Grid(32, 1.0))).placement
    view = replace(view, reading=replace(kind.reading, unannotated_values=(99,)))
    unannotated = load_label(case.truth, case.image, view, placement)
    other[unannotated == UNANNOTATED] = 1
    assert (other != whole).sum() > 100
    again = tiny_score(kind, case, other, unannotated_values=(99,))
    pd.testing.assert_frame_equal(again, rows)
    # Taken for background, the right answer is wrong.
    background = tiny_score(kind, case, whole, ignored_values=(30, 99))
    assert (background["dice"] < 0.95).all()


def test_a_healthy_case_has_no_dice_and_its_false_alarms_have_0(
    partly: tuple[type[TinyDataset], Case, np.ndarray],
) -> None:
    kind, case, whole = partly
    label = nib.load(case.truth)
    nib.save(nib.Nifti1Image(np.zeros(label.shape, np.int16), label.affine), case.truth)
    silent = tiny_score(kind, case, np.zeros_like(whole))
    assert silent["dice"].isna().all() and silent["assd"].isna().all()
    assert not silent["missed"].any() and not silent["false_alarm"].any()
    alarmed = tiny_score(kind, case, whole)
    assert alarmed["false_alarm"].all() and alarmed["dice"].tolist() == [0.0, 0.0]
    assert (alarmed["assd"] == distance_penalty(label.shape, (1.0, 1.0, 1.0))).all()
    both = pd.concat([silent, alarmed.assign(case="other")]).assign(selector="last")
    mean = summarise(both).set_index("structure").loc["mean"]
    assert mean["dice"] == 0.0 and mean["misses"] == 0


def test_a_predictor_of_nothing_finds_nothing(dataset: Phantom, case: Case) -> None:
    def nothing(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), len(dataset.structures) + 1, 96, 96)
        logits[:, 0] = 1
        return logits

    rows = score(nothing, dataset, [case])
    assert rows["missed"].all() and (rows["dice"] == 0).all()


def test_a_label_of_another_shape_is_refused(phantom_root: Path, tmp_path: Path) -> None:
    dataset = Phantom(shutil.copytree(phantom_root, tmp_path / "data"))
    case = dataset.split("ct", "test")[0]
    predict = perfect(dataset, case)
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), case.label)
    with pytest.raises(DataError, match=case.label.name):
        score(predict, dataset, [case])


# -- means ----------------------------------------------------------------------------------------


def test_means_are_those_by_hand() -> None:
    """Undefined values are excluded; structures are averaged before cases."""
    nan = float("nan")
    rows = pd.DataFrame(
        [
            ("last", "c1", "A", 1.0, 1.0, 2.0, False),
            ("last", "c1", "B", 0.5, 3.0, 4.0, False),
            ("last", "c2", "A", 0.0, 9.0, 9.0, True),
            ("last", "c2", "B", nan, nan, nan, False),
            ("other", "c1", "A", 0.2, 1.0, 1.0, False),
        ],
        columns=["selector", "case", "structure", "dice", "assd", "hd95", "missed"],
    )
    table = summarise(rows).set_index(["selector", "structure"])
    assert list(table.index) == [
        ("last", "A"),
        ("last", "B"),
        ("last", "mean"),
        ("other", "A"),
        ("other", "mean"),
    ]
    assert table.loc[("last", "A"), ["dice", "assd", "hd95"]].tolist() == [0.5, 5.0, 5.5]
    assert table.loc[("last", "B"), ["dice", "assd", "hd95"]].tolist() == [0.5, 3.0, 4.0]
    # c1: 0.75, c2: 0.0 (only A is defined there).
    assert table.loc[("last", "mean"), ["dice", "assd", "hd95"]].tolist() == [0.375, 5.5, 6.0]
    assert table["misses"].tolist() == [1, 0, 1, 0, 0]
    assert table["cases"].tolist() == [2, 2, 2, 1, 1]
    assert table.loc[("other", "mean"), "dice"] == pytest.approx(0.2)
