"""batches.py: every slice once an epoch, the same batch at the same step, never a target label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glua_bench.conformance import TinyDataset
from glua_bench.data.batches import Batches, epoch_indices
from glua_bench.data.cache import SliceCache
from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.method import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelledStore, ImageStore]:
    """Eight labelled and four unlabelled slices."""
    root = tmp_path_factory.mktemp("tiny")
    dataset = TinyDataset(root / "data")
    dataset.prepare()
    cache = SliceCache(root / "slices")
    view = dataset.view("plain").on(dataset.grid("quick"))
    cases = dataset.split("plain", "train")
    source = LabelledStore(
        [cache.image(c.unlabelled(), view) for c in cases],
        [cache.label(c, view) for c in cases],
    )
    target = ImageStore([cache.image(dataset.split("inverted", "train")[0].unlabelled(), view)])
    return source, target


@pytest.fixture
def make(stores: tuple[LabelledStore, ImageStore]) -> Iterator[Any]:
    made = []

    def make(size: int = 3, seed: int = 0, rank: int = 0, world: int = 1, **changes: Any) -> Any:
        source, target = stores
        made.append(Batches(source, changes.get("target", target), size, seed, CPU, rank, world))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- which slices ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    stage=st.integers(0, 2**32 - 1),
    size=st.integers(1, 9),
    length=st.integers(1, 20),
    epochs=st.integers(1, 3),
)
def test_every_slice_is_seen_once_an_epoch(
    seed: int, stage: int, size: int, length: int, epochs: int
) -> None:
    """Whether the batch is smaller or larger than the domain, and at any border between epochs."""
    steps = -(-epochs * length // size)
    seen = np.concatenate(
        [epoch_indices(seed, "source", stage, step, size, length) for step in range(steps)]
    )
    assert len(seen) == steps * size
    for epoch in range(epochs):
        part = seen[epoch * length : (epoch + 1) * length]
        assert sorted(part) == list(range(length))


def test_seeds_domains_stages_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int = 0, stream: str = "source", stage: int = 0, epoch: int = 0) -> bytes:
        return epoch_indices(seed, stream, stage, epoch, 30, 30).tobytes()

    orders = [order(), order(seed=1), order(stream="target"), order(stage=1), order(epoch=1)]
    assert len(set(orders)) == 5
    assert order() == orders[0]


# -- what is loaded -------------------------------------------------------------------------------


def test_images_come_with_their_own_labels(
    make: Any, stores: tuple[LabelledStore, ImageStore]
) -> None:
    source, target = stores
    images, labels, others = make().load(5, 0)
    assert images.shape == others.shape == (3, 1, 32, 32) and labels.shape == (3, 32, 32)
    assert images.dtype == others.dtype == torch.float32 and labels.dtype == torch.uint8
    chosen = epoch_indices(0, "source", 5, 0, 3, len(source))
    assert np.array_equal(images.numpy(), source.images(chosen))
    assert np.array_equal(labels.numpy(), source.labels(chosen))
    chosen = epoch_indices(0, "target", 5, 0, 3, len(target))
    assert np.array_equal(others.numpy(), target.images(chosen))


def test_a_step_is_the_same_in_any_order_and_after_a_restart(make: Any) -> None:
    """The batch that is read ahead must not become another step's."""
    first = make()
    forward = {(stage, step): first.load(stage, step) for stage in (0, 1) for step in range(6)}
    second = make()
    for stage, step in [(1, 4), (1, 5), (0, 3), (0, 3), (1, 4), (0, 0), (1, 1), (0, 1), (0, 2)]:
        assert equal(second.load(stage, step), forward[stage, step])
    assert not equal(forward[0, 0], forward[1, 0]) and not equal(forward[0, 0], forward[0, 1])
    assert not equal(make(seed=1).load(0, 0), forward[0, 0])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_divide_the_batch_of_one_process(make: Any, world: int) -> None:
    whole = make(6).load(2, 1)
    shares = [make(6, rank=rank, world=world).load(2, 1) for rank in range(world)]
    for position, tensor in enumerate(whole):
        parts = [share[position] for share in shares]
        assert [len(part) for part in parts] == [6 // world] * world
        found = Counter(image.numpy().tobytes() for part in parts for image in part)
        assert found == Counter(image.numpy().tobytes() for image in tensor)


def test_what_is_read_ahead_is_not_changed_by_its_user(make: Any) -> None:
    """Methods may work in place on what they are given."""
    batches = make()
    for step in range(3):
        for tensor in batches.load(0, step):
            tensor.zero_()
    assert equal(batches.load(0, 1), make().load(0, 1))


def test_an_error_while_reading_ahead_comes_out_at_its_step(
    make: Any, stores: tuple[LabelledStore, ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, calls = make(), []

    def images(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("the disk is gone")
        return original(*arguments)

    original = stores[1].images
    monkeypatch.setattr(stores[1], "images", images)
    batches.load(0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        batches.load(0, 1)


# -- the target -----------------------------------------------------------------------------------


def test_a_target_that_knows_labels_is_refused(
    make: Any, stores: tuple[LabelledStore, ImageStore]
) -> None:
    with pytest.raises(TypeError, match="labels"):
        make(target=stores[0])


def test_a_run_without_target_serves_none(make: Any) -> None:
    batches = make(target=None)
    images, labels, target = batches.load(0, 0)
    assert target is None and len(images) == len(labels) == 3
    with pytest.raises(TypeError, match="no target images"):
        list(batches.target_slices())
    with pytest.raises(TypeError, match="uses_target"):
        _ = Batch(images, labels, target).target


@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_target_slices_are_all_slices_in_order(
    make: Any, size: int, stores: tuple[LabelledStore, ImageStore]
) -> None:
    parts = list(make().target_slices(size))
    assert all(len(part) <= size for part in parts)
    assert np.array_equal(torch.cat(parts).numpy(), stores[1].images(range(len(stores[1]))))
