"""selection.py: the choice is made from what a user without target labels has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glua_bench.cache import ImageStore, LabelledStore, SliceCache
from glua_bench.conformance import TinyDataset
from glua_bench.selection import Candidate, Last, SourceVal, choose

Predict = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> LabelledStore:
    """Forty labelled slices of two structures: more than one batch of them."""
    root = tmp_path_factory.mktemp("tiny")
    dataset = TinyDataset(root / "data")
    dataset.prepare()
    cache, grid, reading = SliceCache(root / "slices"), dataset.grid("quick"), dataset.reading
    cases = dataset.cases("plain") + dataset.cases("inverted")
    images = [cache.image(c.unlabelled(), reading, grid) for c in cases]
    labels = [cache.label(c, reading, grid, dataset.structures) for c in cases]
    return LabelledStore(images + images[:2], labels + labels[:2])


def answers(labels: np.ndarray, classes: int = 3) -> Predict:
    """Gives prepared labels in the order of the slices."""
    waiting = iter(torch.from_numpy(labels))

    def predict(images: Tensor) -> Tensor:
        asked = torch.stack([next(waiting) for _ in images])
        return F.one_hot(asked, classes).permute(0, 3, 1, 2).float()

    return predict


def candidate(store: LabelledStore | None, predict: Predict, **changes: object) -> Candidate:
    made = Candidate(7, predict, 3, store, lambda images: images, None, torch.device("cpu"))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_candidate_leads_to_no_target_label(validation: LabelledStore) -> None:
    assert {spec.name for spec in fields(Candidate)} == {
        "step",
        "predict",
        "classes",
        "source_val",
        "translate",
        "target_train",
        "device",
    }
    assert not hasattr(ImageStore, "labels") and issubclass(LabelledStore, ImageStore)


def test_the_last_checkpoint_is_the_last() -> None:
    assert Last().score(candidate(None, answers(np.zeros((1, 2, 2), int)))) == 7.0


def test_right_answers_have_the_score_one(validation: LabelledStore) -> None:
    assert len(validation) > 32
    labels = validation.labels(range(len(validation)))
    assert SourceVal().score(candidate(validation, answers(labels))) == pytest.approx(1.0)
    nothing = answers(np.zeros_like(labels))
    assert SourceVal().score(candidate(validation, nothing)) == 0.0


def test_the_score_is_dice_pooled_over_slices(validation: LabelledStore) -> None:
    labels = validation.labels(range(len(validation)))
    predicted = labels.copy()
    predicted[::3] = 0  # a third of the slices is missed
    predicted[:, :4][predicted[:, :4] == 0] = 2  # and much is found where nothing is
    expected = []
    for index in (1, 2):
        p, r = predicted == index, labels == index
        expected.append(2 * (p & r).sum() / (p.sum() + r.sum()))
    found = SourceVal().score(candidate(validation, answers(predicted)))
    assert found == pytest.approx(np.mean(expected)) and 0 < found < 1


def test_a_structure_that_no_slice_shows_does_not_count(validation: LabelledStore) -> None:
    labels = validation.labels(range(len(validation)))
    wrong = np.where(labels == 0, 3, labels)
    found = SourceVal().score(candidate(validation, answers(wrong, 4), classes=4))
    assert found == pytest.approx(1.0)


def test_images_are_translated_as_in_training(validation: LabelledStore) -> None:
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return images.repeat(1, 3, 1, 1)

    SourceVal().score(candidate(validation, predict, translate=lambda images: -images))
    expected = -validation.images(range(len(validation)))
    assert np.array_equal(torch.cat(seen).numpy(), expected)


def test_without_validation_cases_there_is_no_score() -> None:
    assert math.isnan(SourceVal().score(candidate(None, answers(np.zeros((1, 2, 2), int)))))


def test_without_any_structure_there_is_no_score(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path / "data")
    dataset.prepare()
    cache, case = SliceCache(tmp_path / "slices"), dataset.split("plain", "val")[0]
    nib.save(nib.Nifti1Image(np.zeros(nib.load(case.label).shape, np.int16), np.eye(4)), case.label)
    grid, reading = dataset.grid("quick"), dataset.reading
    image = cache.image(case.unlabelled(), reading, grid)
    label = cache.label(case, reading, grid, dataset.structures)
    store = LabelledStore([image], [label])
    predict = answers(np.ones((4, 32, 32), int))
    assert math.isnan(SourceVal().score(candidate(store, predict)))


# -- the choice -----------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ({1: 0.1, 2: 0.9, 3: 0.5}, 2),
        ({1: 0.5, 2: 0.5, 3: 0.1}, 2),
        ({3: 0.5, 1: 0.5}, 3),
        ({1: NAN, 2: 0.0, 3: NAN}, 2),
        ({1: NAN, 2: NAN}, 2),
        ({1: -1.0, 2: float("-inf")}, 1),
        ({5: NAN}, 5),
    ],
)
def test_the_best_wins_then_the_latest_and_nan_never(scores: dict[int, float], step: int) -> None:
    assert choose(scores) == step


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1) | st.just(NAN), min_size=1))
def test_the_choice_does_not_depend_on_the_order(scores: dict[int, float]) -> None:
    assert choose(scores) == choose(dict(reversed(scores.items())))
    valid = [score for score in scores.values() if not math.isnan(score)]
    if valid:
        assert scores[choose(scores)] == max(valid)
