"""selectors.py: scores agree with references, and selectors see no target labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.conformance import TinyDataset
from glua_bench.data.cache import SliceCache
from glua_bench.data.stores import LabelledStore
from glua_bench.method import Role
from glua_bench.registry import Registry
from glua_bench.scoring.selectors import (
    BatchNuclearNorm,
    CheckpointAgreement,
    ClusterAgreement,
    ClusterSilhouette,
    DeepEmbeddedValidation,
    Entropy,
    InformationMaximisation,
    Last,
    SoftNeighbourhoodDensity,
    SourceVal,
    density_ratios,
    dev_risk,
    entropies,
    overlaps,
)
from glua_bench.selection import Candidate, Samples
from glua_bench.task import UNANNOTATED

Predict = Callable[[Tensor, Role], Tensor]


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> LabelledStore:
    """Return forty labelled slices of two structures, more than one batch."""
    root = tmp_path_factory.mktemp("tiny")
    dataset = TinyDataset(root / "data")
    dataset.prepare()
    cache = SliceCache(root / "slices")
    view = dataset.view("plain").on(dataset.grid("quick"))
    cases = dataset.cases("plain") + dataset.cases("inverted")
    images = [cache.image(c.unlabelled(), view) for c in cases]
    labels = [cache.label(c, view) for c in cases]
    return LabelledStore(images + images[:2], labels + labels[:2])


def answers(labels: np.ndarray, classes: int = 3) -> Predict:
    """Return a predictor of given labels, for source slices in order."""
    waiting = iter(torch.from_numpy(labels))

    def predict(images: Tensor, domain: Role) -> Tensor:
        assert domain == "source"
        asked = torch.stack([next(waiting) for _ in images])
        return F.one_hot(asked, classes).permute(0, 3, 1, 2).float()

    return predict


def candidate(store: LabelledStore | None, predict: Predict, **changes: object) -> Candidate:
    made = Candidate(7, predict, 3, store, lambda images: images, None, torch.device("cpu"))
    return replace(made, **changes)  # type: ignore[arg-type]


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


def test_what_nobody_annotated_counts_in_no_score() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, (2, 4, 9, 9))
    seen = rng.random(labels.shape) < 0.6
    found = overlaps(predicted, np.where(seen, labels, UNANNOTATED), 3)
    assert np.array_equal(found, overlaps(predicted[seen], labels[seen], 3))

    features = {r: torch.from_numpy(rng.normal(0, 1, (400, 2))).float() for r in ("s", "v", "t")}
    logits = torch.from_numpy(rng.normal(0, 1, (400, 3))).float()
    pixels = torch.from_numpy(rng.integers(0, 3, 400))
    partly = torch.where(torch.arange(400) % 3 > 0, pixels, UNANNOTATED)

    def dev(target: Tensor) -> float:
        return DeepEmbeddedValidation().score(
            with_samples(
                Samples(logits, features["t"], None),
                source_train=Samples(logits, features["s"], pixels),
                source_val=Samples(logits, features["v"], target),
            )
        )

    kept = (partly != UNANNOTATED).numpy()
    weights = density_ratios(*(features[r].numpy() for r in ("s", "v", "t")))
    errors = F.cross_entropy(logits.double()[kept], pixels[kept], reduction="none").numpy()
    assert dev(partly) == pytest.approx(-dev_risk(weights[kept], errors))
    assert math.isnan(dev(torch.full_like(pixels, UNANNOTATED)))


def test_images_are_translated_as_in_training(validation: LabelledStore) -> None:
    seen: list[Tensor] = []

    def predict(images: Tensor, domain: Role) -> Tensor:
        assert domain == "source"
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
    view = dataset.view("plain").on(dataset.grid("quick"))
    image = cache.image(case.unlabelled(), view)
    label = cache.label(case, view)
    store = LabelledStore([image], [label])
    predict = answers(np.ones((4, 32, 32), int))
    assert math.isnan(SourceVal().score(candidate(store, predict)))


# -- scores of target pixels ----------------------------------------------------------------------


def samples(labels: bool = False) -> Samples:
    """Return the samples of the reference values below."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (300, 5)))
    features = torch.from_numpy(rng.normal(0, 1, (300, 8)))
    rng.gamma(2, 0.5, (300, 1))
    own = torch.from_numpy(rng.integers(0, 5, 300)) if labels else None
    return Samples(logits, features, own)


def with_samples(target: Samples | None, **others: Samples) -> Candidate:
    given = {**others} if target is None else {"target_train": target, **others}
    return candidate(None, answers(np.zeros((1, 2, 2), int)), samples=given)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (Entropy, -0.9235066866516313),
        (InformationMaximisation, 0.6802194430083834),
        (SoftNeighbourhoodDensity, 3.6392458153495673),
        (BatchNuclearNorm, 0.09016777846753252),
    ],
)
def test_scores_are_those_of_pytorch_adapt(selector: type, expected: float) -> None:
    """References are from validators of pytorch-adapt 0.0.83, in double precision."""
    assert selector().score(with_samples(samples())) == pytest.approx(expected, rel=1e-9)


def test_the_risk_is_that_of_pytorch_adapt() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (300, 5)))
    rng.normal(0, 1, (300, 8))
    weights = rng.gamma(2, 0.5, (300, 1))[:, 0]
    labels = torch.from_numpy(rng.integers(0, 5, 300))
    errors = F.cross_entropy(logits, labels, reduction="none").numpy()
    assert dev_risk(weights, errors) == pytest.approx(2.897337062594216, rel=1e-9)
    assert dev_risk(np.ones(300), errors) == pytest.approx(errors.mean())  # no shift, no variance


def test_density_ratios_are_those_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    train, target = rng.normal(0, 1, (4000, 1)), rng.normal(1, 1, (2000, 1))
    at = np.linspace(-2, 3, 11)[:, None]
    expected = np.exp(at - 0.5)[:, 0]  # N(x; 1, 1) / N(x; 0, 1)
    found = density_ratios(train, at, target)
    assert np.abs(np.log(found / expected)).max() < 0.35


def test_dev_prefers_what_is_right_where_target_pixels_lie() -> None:
    """Two candidates have equal source errors; one has them where target pixels lie."""
    rng = np.random.default_rng(0)
    source = torch.from_numpy(rng.normal(0, 1, (1000, 2))).float()
    target = torch.from_numpy(rng.normal([1.5, 0], 1, (1000, 2))).float()
    labels = torch.zeros(1000, dtype=torch.long)
    scores = {}
    for name, wrong in (("there", source[:, 0] > 0), ("elsewhere", source[:, 0] < 0)):
        logits = torch.stack([torch.where(wrong, -2.0, 2.0), torch.zeros(1000)], 1)
        scores[name] = DeepEmbeddedValidation().score(
            with_samples(
                Samples(torch.zeros(1000, 2), target, None),
                source_train=Samples(logits, source.flip(0), labels),
                source_val=Samples(logits, source, labels),
            )
        )
    assert scores["elsewhere"] > scores["there"] + 0.3


def test_clusters_of_the_features() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 300)
    features = torch.from_numpy(10 * np.eye(3)[classes] + rng.normal(0, 0.5, (300, 3))).float()
    right = F.one_hot(torch.from_numpy(classes), 3).float()
    wrong = right[torch.from_numpy(rng.permutation(300))]
    for selector in (ClusterAgreement(), ClusterSilhouette()):
        good, bad = (
            selector.score(with_samples(Samples(logits, features, None)))
            for logits in (right, wrong)
        )
        assert good > 0.8 and abs(bad) < 0.1, selector.name
    one_class = Samples(torch.eye(3)[torch.zeros(300, dtype=torch.long)], features, None)
    assert math.isnan(ClusterSilhouette().score(with_samples(one_class)))
    assert ClusterAgreement().score(with_samples(one_class)) == pytest.approx(0.0, abs=1e-9)


def test_agreement_is_the_mean_dice_with_the_others() -> None:
    def answering(classes: list[int]) -> Samples:
        return Samples(torch.eye(3)[torch.tensor(classes)], torch.zeros(4, 1), None)

    trajectory = {
        1: answering([0, 0, 0, 0]),
        2: answering([0, 1, 1, 2]),
        3: answering([0, 1, 2, 2]),
    }
    base = candidate(None, answers(np.zeros((1, 2, 2), int)), trajectory=trajectory)
    scores = {s: CheckpointAgreement().score(replace(base, step=s)) for s in trajectory}
    # 2 and 3: structure 1 has Dice 2/3, structure 2 too; 1 shows nothing to agree with.
    assert scores == pytest.approx({1: 0.0, 2: (0 + 2 / 3) / 2, 3: (0 + 2 / 3) / 2})
    alone = replace(base, step=2, trajectory={2: trajectory[2]})
    assert math.isnan(CheckpointAgreement().score(alone))


def test_entropy_of_certainty_is_0_and_finite() -> None:
    assert entropies(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx(
        [0.0, math.log(2)]
    )


def test_without_target_images_none_of_them_can_say() -> None:
    nothing = with_samples(None)
    for entry in Registry("selector").entries():
        selector = Registry("selector").load(entry.name)()
        if selector.uses_samples:
            assert math.isnan(selector.score(nothing)), entry.name
