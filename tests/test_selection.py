"""selection.py: data of candidates, sampled pixels, and the selected candidate."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glua_bench.conformance import TinyDataset
from glua_bench.data.cache import SliceCache
from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.selection import Candidate, Samples, choose, sample_pixels


def test_a_candidate_leads_to_no_target_label() -> None:
    assert {spec.name for spec in fields(Candidate)} == {
        "step",
        "predict",
        "classes",
        "source_val",
        "translate",
        "target_train",
        "device",
        "samples",
        "trajectory",
    }
    assert not hasattr(ImageStore, "labels") and issubclass(LabelledStore, ImageStore)


# -- pixels ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> LabelledStore:
    dataset = TinyDataset(tmp_path / "data")
    dataset.prepare()
    cache = SliceCache(tmp_path / "slices")
    view = dataset.view("plain").on(dataset.grid("quick"))
    cases = dataset.cases("plain") + dataset.cases("inverted")
    return LabelledStore(
        [cache.image(c.unlabelled(), view) for c in cases],
        [cache.label(c, view) for c in cases],
    )


def sample(store: ImageStore, **changes: object) -> Samples:
    given: dict[str, object] = {
        "predict": lambda x: torch.cat([x, -x], 1),
        "features": lambda x: torch.nn.functional.avg_pool2d(x, 8),
        "translate": lambda x: x,
        "device": torch.device("cpu"),
    }
    return sample_pixels(store=store, **{**given, **changes})  # type: ignore[arg-type]


def test_a_pixel_has_its_own_logits_label_and_the_features_of_its_cell(
    store: LabelledStore,
) -> None:
    found = sample(store, pixels=50)
    assert found.logits.shape == (32 * 50, 2) and found.features.shape == (32 * 50, 1)
    rows = np.random.default_rng(0).integers(0, 32 * 32, (32, 50))
    images, labels = store.images(range(32)), store.labels(range(32))
    cells = images.reshape(32, 4, 8, 4, 8).mean((2, 4))
    for n in range(32):
        for i, place in enumerate(rows[n]):
            y, x = divmod(int(place), 32)
            at = n * 50 + i
            assert found.logits[at].tolist() == [images[n, 0, y, x], -images[n, 0, y, x]]
            assert float(found.features[at]) == pytest.approx(cells[n, y // 8, x // 8], abs=1e-5)
            assert found.labels is not None and int(found.labels[at]) == labels[n, y, x]


def test_slices_are_spread_and_places_the_same_every_time(store: LabelledStore) -> None:
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.cat([images, -images], 1)

    first = sample(store, predict=predict, slices=4, pixels=7)
    assert torch.equal(seen[0], torch.from_numpy(store.images([4, 12, 20, 28])))
    assert torch.equal(first.logits, sample(store, slices=4, pixels=7).logits)
    moved = sample(store, slices=4, pixels=7, translate=lambda images: -images)
    assert torch.equal(moved.logits, -first.logits)


def test_without_features_there_is_one_pass_and_equal_logits(store: LabelledStore) -> None:
    found = sample(store, features=None, pixels=7)
    assert torch.equal(found.logits, sample(store, pixels=7).logits)
    assert found.features.shape == (32 * 7, 0)


def test_a_store_without_labels_gives_none(store: LabelledStore) -> None:
    class Unlabelled:
        size, images = store.size, staticmethod(store.images)

        def __len__(self) -> int:
            return len(store)

    assert sample(Unlabelled()).labels is None  # type: ignore[arg-type]


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
