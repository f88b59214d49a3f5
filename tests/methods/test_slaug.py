"""SLAug: curves, percentiles, fusion and the step, against numpy and scipy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import comb
from tiny_methods import TASK, context_of
from torch import Tensor

from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch
from glua_bench.methods import slaug
from glua_bench.methods.slaug import SLAug, SLAugConfig
from glua_bench.task import UNANNOTATED

CLASSES = TASK.classes


def build(**config: Any) -> SLAug:
    torch.manual_seed(0)
    return SLAug(TASK, SLAugConfig(**config))


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 32, 32, generator=generator) * 2 - 1
    images[:, :, :4] = -1.0  # air
    labels = torch.randint(0, CLASSES, (2, 32, 32), generator=generator)
    labels[0, labels[0] == 1] = 0  # one image lacks a structure
    return Batch(images, labels, None)


def by_hand(images: np.ndarray, regions: np.ndarray, falling: list[float], seed: int) -> np.ndarray:
    """Compute σ B(x) + μ per region with numpy's percentile and interpolation."""
    count, kinds = regions.shape[:2]
    torch.manual_seed(seed)  # the same draws, in the order of the method
    falls = torch.rand(count, kinds, 1).numpy() <= np.array(falling)[:, None]
    inner = torch.rand(2, 2, count, kinds, 1).numpy()
    scale = np.clip(1 + 0.1 * torch.randn(count, kinds, 1).numpy(), 0.9, 1.1)
    shift = 0.5 * torch.randn(count, kinds, 1).numpy()
    t = np.linspace(0, 1, slaug.CURVE_POINTS)
    bernstein = [comb(3, i) * t**i * (1 - t) ** (3 - i) for i in range(4)]
    result = np.zeros_like(images)
    for n in range(count):
        for r in range(kinds):
            inside = regions[n, r]
            if not inside.any():
                continue
            x = images[n, 0][inside]
            low, high = x.min(), x.max()
            curve = []
            for axis in range(2):
                points = [0.0, *inner[axis, :, n, r, 0], 1.0]
                own = sum(p * b for p, b in zip(points, bernstein, strict=True))
                curve.append(low + (high - low) * own)
            y = curve[1][::-1] if falls[n, r, 0] else np.sort(curve[1])
            curved = np.interp(x, np.sort(curve[0]), y)
            least, most = -np.percentile(curved, 20), 1 - np.percentile(curved, 80)
            mu = np.minimum(np.maximum(shift[n, r, 0], least), most)
            result[n, 0][inside] = np.clip(scale[n, r, 0] * curved + mu, 0, 1)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_recoloured_as_by_hand(seed: int) -> None:
    own = batch()
    unit = (own.source_images + 1) / 2
    regions = torch.nn.functional.one_hot(own.source_labels, CLASSES).permute(0, 3, 1, 2).bool()
    falling = [1.0] + [0.5] * (CLASSES - 1)
    torch.manual_seed(seed)
    got = slaug.location_scale(unit, regions, torch.tensor(falling)).numpy()
    expected = by_hand(unit.double().numpy(), regions.numpy(), falling, seed)
    assert np.abs(got - expected).max() < 1e-4

    torch.manual_seed(seed)
    local = slaug.augment_locally(own.source_images, own.source_labels, CLASSES)
    air = (own.source_images + 1) / 2 <= 0.01
    assert torch.equal(local[air], (own.source_images)[air])
    assert np.abs(((local.numpy() + 1) / 2 - expected)[~air.numpy()]).max() < 1e-4


def test_unannotated_pixels_are_recoloured_with_the_background() -> None:
    own = batch()
    partly = own.source_labels.clone()
    partly[:, :8] = UNANNOTATED
    made = []
    for labels in (partly, torch.where(partly == UNANNOTATED, 0, partly)):
        torch.manual_seed(3)
        made.append(slaug.augment_locally(own.source_images, labels, CLASSES))
    assert torch.equal(*made)


def test_slices_of_an_image_share_its_curves_and_regions() -> None:
    """The middle slice's labels define the regions, whose curves apply to all slices."""
    own = batch()
    stack = torch.cat([own.source_images.roll(1, 2), own.source_images, own.source_images], 1)
    labels = own.source_labels
    torch.manual_seed(3)
    got = slaug.augment_locally(stack, labels, CLASSES)
    assert torch.equal(got[:, 1], got[:, 2])  # equal slices stay equal
    for image, recoloured, classes in zip(stack, got, labels, strict=True):
        for index in range(CLASSES):
            values, there = image[:, classes == index], recoloured[:, classes == index]
            changed = (values + 1) / 2 > slaug.BACKGROUND
            before, after = values[changed].tolist(), there[changed].tolist()
            curve = dict(zip(before, after, strict=True))
            assert [curve[tone] for tone in before] == after  # one tone becomes one tone
    torch.manual_seed(3)
    whole = slaug.augment_globally(stack)
    for before, after in zip(stack.flatten(1), whole.flatten(1), strict=True):
        assert bool((after[before.argsort()].diff() >= -1e-6).all())


def test_channels_have_curves_of_their_own_on_the_same_regions() -> None:
    own = batch()
    images, labels = own.source_images, own.source_labels
    two = torch.cat([images, images.roll(1, 3)], 1)
    for augmented in (
        lambda x, y, channels: slaug.augment_locally(x, y, CLASSES, channels),
        lambda x, y, channels: slaug.augment_globally(x, channels),
    ):
        torch.manual_seed(3)
        got = augmented(two, labels, 2)
        torch.manual_seed(3)
        apart = augmented(two.view(-1, 1, *two.shape[2:]), labels.repeat_interleave(2, 0), 1)
        assert torch.equal(got.flatten(0, 1), apart.flatten(0, 1))


def test_slices_of_an_image_have_one_saliency() -> None:
    gradient = torch.randn(2, 3, 32, 32)
    got = slaug.saliency_map(gradient, 8)
    assert got.shape == (2, 1, 32, 32)
    assert torch.equal(got, slaug.saliency_map(gradient.abs().mean(1, keepdim=True), 8))
    mirrored = slaug.saliency_map(-gradient[:, [2, 0, 1]], 8)
    assert torch.allclose(got, mirrored, atol=1e-6)  # no slice counts more than another


def test_the_global_curve_keeps_the_order_of_tones() -> None:
    images = batch().source_images
    changed = 0
    for seed in range(5):
        torch.manual_seed(seed)
        got = slaug.augment_globally(images)
        assert float(got.amin()) >= -1 and float(got.amax()) <= 1
        for before, after in zip(images.flatten(1), got.flatten(1), strict=True):
            assert bool((after[before.argsort()].diff() >= -1e-6).all())
        changed += int((got - images).abs().mean() > 0.05)
    assert changed >= 3


def test_percentiles_are_numpys_and_0_for_an_empty_region() -> None:
    values = torch.rand(1, 3, 50)
    inside = torch.zeros(1, 3, 50, dtype=torch.bool)
    inside[0, 0], inside[0, 1, 7:20] = True, True
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        got = slaug.percentile(values, inside, share)[0, :, 0]
        expected = [np.percentile(values[0, r][inside[0, r]].numpy(), 100 * share) for r in (0, 1)]
        assert got.tolist() == pytest.approx([*expected, 0.0], abs=1e-6)


def test_saliency_is_a_quadratic_spline_of_the_cells_in_0_to_1() -> None:
    gradient = torch.zeros(1, 1, 45, 45)
    gradient[0, 0, 20:25, 20:25] = -3.0  # the middle one of 9 × 9 cells of 5 × 5 pixels
    got = slaug.saliency_map(gradient, 9)[0, 0].numpy()
    box = np.ones(5)
    spline = np.convolve(np.convolve(box, box), box)
    line = np.zeros(45)
    line[16:29] = spline
    expected = np.outer(line, line)
    assert np.allclose(got, expected / expected.max(), atol=1e-5)


def test_saliency_is_scaled_image_by_image_and_survives_no_gradient() -> None:
    gradient = torch.randn(3, 1, 32, 32) * torch.tensor([1.0, 1e-6, 0.0]).view(3, 1, 1, 1)
    got = slaug.saliency_map(gradient, 8)
    assert torch.isfinite(got).all()
    for image in got[:2]:
        assert float(image.amin()) == pytest.approx(0, abs=1e-6)
        assert float(image.amax()) == pytest.approx(1, abs=1e-6)
    assert bool((got[2] == 1).all())  # only the global image


def test_a_grid_finer_than_the_image_is_the_image() -> None:
    gradient = torch.rand(1, 1, 8, 8)
    own = (gradient - gradient.min()) / (gradient.max() - gradient.min())
    assert torch.allclose(slaug.saliency_map(gradient, 18), own, atol=1e-6)


def test_a_step_is_one_update_by_both_losses() -> None:
    method, own = build(saliency_grid=8), batch()
    other = copy.deepcopy(method)
    torch.manual_seed(5)
    logs = method.step(own, context_of(method))

    torch.manual_seed(5)
    whole = slaug.augment_globally(own.source_images).requires_grad_()
    parts = slaug.augment_locally(own.source_images, own.source_labels, CLASSES)
    first = segmentation_loss(other.segmenter(whole).logits, own.source_labels)
    (gradient,) = torch.autograd.grad(first, whole, retain_graph=True)
    saliency: Tensor = slaug.saliency_map(gradient, 8)
    mixed = saliency * whole.detach() + (1 - saliency) * parts
    second = segmentation_loss(other.segmenter(mixed).logits, own.source_labels)
    context_of(other).update("segmenter", first + second)

    assert float(logs["segmentation"].detach()) == pytest.approx(float(first.detach()), rel=1e-5)
    assert float(logs["segmentation_fused"].detach()) == pytest.approx(
        float(second.detach()), rel=1e-5
    )
    before = build(saliency_grid=8).state_dict()
    for name, weight in other.state_dict().items():
        moved = float((weight - before[name]).abs().max())
        assert float((weight - method.state_dict()[name]).abs().max()) <= 0.05 * moved, name


def test_fused_images_lie_between_both() -> None:
    method = build()
    torch.manual_seed(0)
    with torch.no_grad():  # as the harness calls it
        shown = method.pictures(batch())
    low = torch.minimum(shown["global"], shown["local"])
    high = torch.maximum(shown["global"], shown["local"])
    assert bool((shown["fused"] >= low - 1e-6).all() and (shown["fused"] <= high + 1e-6).all())
    assert 0 < float(shown["saliency"].mean()) < 1
