"""losses.py: values and gradients agree with the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glua_bench.losses import (
    balanced_loss,
    cross_entropy,
    dice_loss,
    lsgan_loss,
    precise,
    real_fake_loss,
    segmentation_loss,
    self_information,
    squared_dice_loss,
)
from glua_bench.methods.sifa import (
    sifa_cross_entropy,
    sifa_dice_loss,
    sifa_segmentation_loss,
)
from glua_bench.task import UNANNOTATED

CLASSES = 4


def example(seed: int = 0, count: int = 2, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, CLASSES, size, size, generator=generator) * 3
    return logits, torch.randint(CLASSES, (count, size, size), generator=generator)


def dice_by_hand(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    """Compute 1 - 2 Σ p r / (Σ p + Σ r) over the batch, averaged over present classes."""
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    terms = []
    for index in range(1, logits.shape[1]):
        p, r = probabilities[:, index], (labels == index).to(logits)
        if r.any():
            terms.append(1 - (2 * (p * r).sum() + smooth) / (p.sum() + r.sum() + smooth))
    return torch.stack(terms).mean() if terms else logits.sum() * 0


def cross_entropy_by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    likelihood = logits.gather(1, labels[:, None])[:, 0] - torch.logsumexp(logits, 1)
    return -likelihood.mean()


def squared_dice_by_hand(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    """Compute 1 - (2 Σ p r + s) / (Σ p² + Σ r² + s) over the batch, averaged over all classes."""
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    terms = []
    for index in range(logits.shape[1]):
        p, r = probabilities[:, index], (labels == index).to(logits)
        terms.append(1 - (2 * (p * r).sum() + smooth) / (p.square().sum() + r.sum() + smooth))
    return torch.stack(terms).mean()


Loss = Callable[[Tensor, Tensor], Tensor]
BY_HAND: dict[Loss, Loss] = {
    dice_loss: dice_by_hand,
    squared_dice_loss: squared_dice_by_hand,
    segmentation_loss: lambda x, y: dice_by_hand(x, y) + cross_entropy_by_hand(x, y),
    balanced_loss: lambda x, y: (cross_entropy_by_hand(x, y) + squared_dice_by_hand(x, y)) / 2,
}


@pytest.mark.parametrize("loss", BY_HAND, ids=lambda loss: loss.__name__)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.lists(st.integers(0, 3), max_size=3))
def test_losses_are_the_formulas_in_value_and_gradient(
    loss: Loss, seed: int, count: int, gone: list[int]
) -> None:
    """Single precision agrees to 1e-5, and double precision, which is kept, to 1e-13."""
    logits, labels = example(seed, count)
    for index in gone:
        labels[labels == index] = 0
    exact, double = (logits.double().requires_grad_() for _ in range(2))
    logits.requires_grad_()
    found, expected = loss(logits, labels), BY_HAND[loss](exact, labels)
    found.backward()
    expected.backward()
    same = loss(double, labels)
    same.backward()
    assert same.dtype == torch.float64 and double.grad is not None
    assert double.grad.dtype == torch.float64
    assert same.item() == pytest.approx(expected.item(), abs=1e-13, rel=1e-13)
    assert found.item() >= 0 and (found.item() <= 1 or "dice" not in loss.__name__)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-5, rtol=1e-3)  # type: ignore[union-attr]


def test_dice_of_right_and_wrong_answers() -> None:
    _, labels = example()
    right = 30.0 * torch.nn.functional.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()
    assert dice_loss(right, labels).item() == pytest.approx(0, abs=1e-5)
    assert dice_loss(right.roll(1, dims=1), labels).item() == pytest.approx(1, abs=1e-5)


def test_a_class_that_no_label_shows_is_left_to_cross_entropy() -> None:
    """Predicting an absent structure has no Dice loss; an empty batch has no loss."""
    logits, labels = example()
    labels[labels == 3] = 0
    more = logits.clone()
    more[:, 3] = -30.0  # nowhere predicted
    kept = dice_by_hand(more, labels)
    assert dice_loss(more, labels).item() == pytest.approx(kept.item(), abs=1e-5)
    empty = torch.zeros_like(labels)
    logits.requires_grad_()
    loss = dice_loss(logits, empty)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_dice_pools_the_batch() -> None:
    """Sums over the batch reduce the influence of slices without a structure."""
    logits, labels = example(count=2)
    labels[1] = 0
    apart = torch.stack([dice_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]).mean()
    assert dice_loss(logits, labels).item() == pytest.approx(
        dice_by_hand(logits.double(), labels).item(), abs=1e-5
    )
    assert abs(dice_loss(logits, labels).item() - apart.item()) > 1e-3


@pytest.mark.parametrize("loss", [segmentation_loss, balanced_loss])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_full_precision_loss(
    kind: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    logits, labels = example()
    found = loss(logits.to(kind), labels)
    assert found.dtype == torch.float32
    expected = loss(logits.to(kind).float(), labels)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_losses_of_two_pixels() -> None:
    """Predictions are (¾, ¼) for a pixel of class 0, and (½, ½) for one of class 1."""
    logits = torch.tensor([[[[math.log(3.0), 0.0]], [[0.0, 0.0]]]])
    labels = torch.tensor([[[0, 1]]])
    # Class 0: 1 - 2 · 0.75 / (0.5625 + 0.25 + 1); class 1: 1 - 2 · 0.5 / (0.0625 + 0.25 + 1).
    dice = ((1 - 1.5 / 1.8125) + (1 - 1.0 / 1.3125)) / 2
    cross_entropy = -(math.log(0.75) + math.log(0.5)) / 2
    assert dice == pytest.approx(0.2052545)
    assert squared_dice_loss(logits, labels).item() == pytest.approx(dice, abs=1e-4)
    found = balanced_loss(logits, labels).item()
    assert found == pytest.approx(0.5 * cross_entropy + 0.5 * dice, abs=1e-4)
    assert found == pytest.approx(0.3478346, abs=1e-4)


def test_squared_dice_counts_background_and_absent_classes() -> None:
    _, labels = example()
    right = 30.0 * torch.nn.functional.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()
    assert squared_dice_loss(right, labels).item() == pytest.approx(0, abs=1e-5)
    assert squared_dice_loss(right.roll(1, dims=1), labels).item() == pytest.approx(1, abs=1e-5)
    shown = labels.clone()
    shown[shown == 3] = 0  # and predicted in some pixels
    alone = squared_dice_loss(right, shown, smooth=0).item()
    background = 1 - 2 * (labels == 0).sum() / ((labels == 0).sum() + (shown == 0).sum())
    assert alone == pytest.approx((float(background) + 0 + 0 + 1) / 4, abs=1e-5)
    assert dice_loss(right, shown).item() == pytest.approx(0, abs=1e-5)  # what other methods take


def test_squared_dice_of_a_class_that_nobody_shows_or_predicts_is_finite() -> None:
    logits, labels = example()
    labels[:] = 0
    logits[:, 3] = -1e4
    logits.requires_grad_()
    loss = squared_dice_loss(logits, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_other_losses_keep_double_precision() -> None:
    logits, _ = example()
    assert self_information(logits.double()).dtype == torch.float64
    assert lsgan_loss(logits.double(), 1).dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_single_precision(kind: torch.dtype, expected: torch.dtype) -> None:
    x = torch.ones(2, dtype=kind)
    assert precise(x).dtype == expected
    assert (precise(x) is x) == (kind == expected)


# -- pixels that nobody annotated -----------------------------------------------------------------


def plain_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the Dice loss without a mask, with the same operations."""
    probabilities = precise(logits).softmax(1)[:, 1:]
    reference = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2)[:, 1:].to(probabilities)
    overlap = (probabilities * reference).sum((0, 2, 3))
    size = probabilities.sum((0, 2, 3)) + reference.sum((0, 2, 3))
    present = (reference.sum((0, 2, 3)) > 0).float()
    loss = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return (loss * present).sum() / present.sum().clamp(min=1)


def plain_squared_dice(logits: Tensor, labels: Tensor) -> Tensor:
    probabilities = precise(logits).softmax(1)
    reference = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).to(probabilities)
    overlap = (probabilities * reference).sum((0, 2, 3))
    size = (probabilities.square() + reference.square()).sum((0, 2, 3))
    return (1 - (2 * overlap + 1e-5) / (size + 1e-5)).mean()


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(precise(logits), labels)


def plain_sifa_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    own = precise(logits).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    counts = torch.bincount(labels.flatten(), minlength=CLASSES)
    frequency = counts.to(own) / labels.numel()
    return -((1 - frequency)[labels] * own.clamp(0.005, 1).log()).mean()


def plain_sifa_dice(logits: Tensor, labels: Tensor) -> Tensor:
    probabilities = precise(logits).softmax(1)
    reference = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).to(probabilities)
    overlap = (probabilities * reference).sum((0, 2, 3))
    size = probabilities.square().sum((0, 2, 3)) + reference.sum((0, 2, 3))
    return 1 - (2 * overlap / (size + 1e-7)).mean()


PLAIN: dict[Loss, Loss] = {
    dice_loss: plain_dice,
    squared_dice_loss: plain_squared_dice,
    cross_entropy: plain_cross_entropy,
    segmentation_loss: lambda x, y: plain_dice(x, y) + plain_cross_entropy(x, y),
    balanced_loss: lambda x, y: 0.5 * plain_cross_entropy(x, y) + 0.5 * plain_squared_dice(x, y),
    sifa_cross_entropy: plain_sifa_cross_entropy,
    sifa_dice_loss: plain_sifa_dice,
    sifa_segmentation_loss: lambda x, y: plain_sifa_cross_entropy(x, y) + plain_sifa_dice(x, y),
}
each_loss = pytest.mark.parametrize("loss", PLAIN, ids=lambda loss: loss.__name__)


@each_loss
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_where_everything_is_annotated_no_bit_changes(
    loss: Loss, kind: torch.dtype, layout: torch.memory_format
) -> None:
    """Published results were trained with the unmasked formulas."""
    for seed, (count, size) in enumerate([(1, 5), (2, 33), (3, 64)]):
        logits, labels = example(seed, count, size)
        results = []
        for formula in (loss, PLAIN[loss]):
            own = logits.to(kind, memory_format=layout).requires_grad_()
            value = formula(own, labels)
            value.backward()
            results.append((value, own.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]


@each_loss
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_a_loss_is_that_of_the_annotated_pixels_alone(loss: Loss, seed: int, share: float) -> None:
    logits, labels = example(seed, 2, 8)
    seen = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) > share
    seen[0, 0, 0] = True
    # The annotated pixels, as one image that is one pixel high.
    kept = logits.double().permute(1, 0, 2, 3)[:, seen][None, :, None].requires_grad_()
    whole = logits.double().requires_grad_()
    found = loss(whole, torch.where(seen, labels, UNANNOTATED))
    expected = loss(kept, labels[seen][None, None])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # factors are single precision
    found.backward()
    expected.backward()
    assert whole.grad is not None and kept.grad is not None
    left_out = whole.grad.permute(1, 0, 2, 3)[:, ~seen]
    assert not left_out.any() and left_out.numel()
    torch.testing.assert_close(
        whole.grad.permute(1, 0, 2, 3)[:, seen], kept.grad[0, :, 0], rtol=1e-5, atol=1e-9
    )


@each_loss
def test_images_that_nobody_annotated_teach_nothing(loss: Loss) -> None:
    logits, labels = example()
    logits.requires_grad_()
    value = loss(logits, torch.full_like(labels, UNANNOTATED))
    value.backward()
    assert torch.isfinite(value) and logits.grad is not None and not logits.grad.any()


# -- adversarial ----------------------------------------------------------------------------------


def test_least_squares_is_the_mean_square() -> None:
    scores = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    assert lsgan_loss(scores, 1).item() == pytest.approx((1 + 0 + 1 + 4) / 4)
    assert lsgan_loss(scores, 0).item() == pytest.approx((0 + 1 + 4 + 1) / 4)
    maps = [scores, torch.full((1, 3), 3.0)]
    assert lsgan_loss(maps, 1).item() == pytest.approx((1.5 + 4.0) / 2)


def test_a_mask_decides_which_places_count() -> None:
    scores = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert lsgan_loss(scores, 1, mask).item() == pytest.approx((1 + 1) / 2)
    assert lsgan_loss(scores, 1, mask.bool()).item() == pytest.approx(1)
    weights = torch.tensor([[[[0.5, 1.0], [0.5, 0.0]]]])
    assert lsgan_loss(scores, 1, weights).item() == pytest.approx((0.5 + 0 + 0.5) / 2)
    both = scores.expand(2, 3, 2, 2)
    assert lsgan_loss(both, 1, mask).item() == pytest.approx(1)
    everything = torch.ones_like(scores)
    assert lsgan_loss(scores, 0, everything).item() == pytest.approx(lsgan_loss(scores, 0).item())


def test_masked_places_pull_no_gradient_and_an_empty_mask_none_at_all() -> None:
    scores = torch.randn(2, 1, 3, 3, requires_grad=True)
    mask = (torch.arange(18).view(2, 1, 3, 3) % 2 == 0).float()
    lsgan_loss(scores, 1, mask).backward()
    assert ((scores.grad != 0) == (mask == 1)).all()
    scores.grad = None
    loss = lsgan_loss(scores, 1, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()  # type: ignore[union-attr]


def test_a_mask_for_several_maps_is_refused() -> None:
    """A mask fits at most one of the maps."""
    with pytest.raises(TypeError, match="mask"):
        lsgan_loss([torch.zeros(2, 2), torch.zeros(1, 1)], 1, torch.ones(2, 2))


@pytest.mark.parametrize("several", [False, True])
def test_one_pass_for_real_and_fake_is_two_losses(several: bool) -> None:
    def single(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) ** 2

    def maps(x: Tensor) -> list[Tensor]:
        return [x * 2, x[..., ::2] - 1]

    score: Callable[[Tensor], Tensor | list[Tensor]] = maps if several else single
    real, fake = torch.randn(3, 1, 4, 4), torch.randn(2, 1, 4, 4)
    found = real_fake_loss(score, real, fake)
    expected = lsgan_loss(score(real), 1) + lsgan_loss(score(fake), 0)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-5)
