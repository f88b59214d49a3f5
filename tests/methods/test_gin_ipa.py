"""GIN and IPA: random networks, blending and the consistency, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_methods import Recorder, batch, build, images, take_step
from torch import Tensor

from glua_bench.losses import segmentation_loss
from glua_bench.methods import gin_ipa
from glua_bench.methods.gin_ipa import GINIPA, blending_map, consistency_loss, gin


def one_by_one(given: Tensor, seed: int) -> Tensor:
    """Apply the random networks image by image, with the draws of `gin` in its order."""
    torch.manual_seed(seed)
    layers = []
    count, wide = len(given), given.shape[1]
    for layer in range(4):
        size = (1, 3)[int(torch.randint(2, ()))]
        outer, inner = (1 if layer == 3 else 2), (1 if layer == 0 else 2)
        layers.append(
            (torch.randn(count, 1, outer, inner, size, size), torch.randn(count, 1, outer))
        )
    alpha = torch.rand(count, 1, 1, 1)
    done = []
    for n in range(count):
        slices = []
        for s in range(wide):
            x = given[n : n + 1, s : s + 1]
            for layer, (kernels, shifts) in enumerate(layers):
                kernel = kernels[n, 0]
                x = F.conv2d(x, kernel, shifts[n, 0], padding=kernel.shape[-1] // 2)
                x = F.leaky_relu(x) if layer < 3 else x
            slices.append(x[0])
        mixed = alpha[n] * torch.cat(slices) + (1 - alpha[n]) * given[n]
        norm = float(given[n].norm()) / (float(mixed.norm()) + 1e-5)
        done.append((mixed * norm).clamp(-1, 1))
    return torch.stack(done)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_gin_is_a_random_network_for_each_image_shared_by_its_slices(
    slices: int, seed: int
) -> None:
    given = images(3, size=16, slices=slices)
    torch.manual_seed(seed)
    found = gin(given)
    torch.testing.assert_close(found, one_by_one(given, seed), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, given, atol=0.01)


def test_gin_keeps_the_norm_where_nothing_is_clipped() -> None:
    given = 0.01 * images(4, size=16)
    torch.manual_seed(0)
    found = gin(given)
    assert found.abs().max() < 1
    torch.testing.assert_close(
        found.flatten(1).norm(dim=1), given.flatten(1).norm(dim=1), rtol=0.02, atol=0
    )


def test_channels_have_networks_of_their_own() -> None:
    given = images(1, size=16).repeat(1, 2, 1, 1)
    torch.manual_seed(0)
    apart = gin(given, channels=2)
    assert not torch.allclose(apart[:, 0], apart[:, 1], atol=0.01)
    torch.manual_seed(0)
    shared = gin(given)
    torch.testing.assert_close(shared[:, 0], shared[:, 1])


def test_an_image_without_content_stays_finite() -> None:
    for value in (0.0, -1.0):
        assert gin(torch.full((2, 1, 16, 16), value)).isfinite().all()


def test_blending_maps_are_smooth_and_reach_from_0_to_1() -> None:
    torch.manual_seed(0)
    found = blending_map(images(5, size=64), 0.125)
    assert found.shape == (5, 1, 64, 64)
    torch.testing.assert_close(found.amin((1, 2, 3)), torch.zeros(5))
    torch.testing.assert_close(found.amax((1, 2, 3)), torch.ones(5))
    noise = torch.rand(5, 1, 64, 64)
    assert found.diff(dim=3).abs().mean() < 0.3 * noise.diff(dim=3).abs().mean()
    assert not torch.allclose(found[0], found[1])
    assert blending_map(images(1, size=32), 1.0).shape == (1, 1, 32, 32)


def test_control_points_are_as_far_apart_as_the_authors() -> None:
    spacing = build(GINIPA).config.blend_spacing
    assert spacing == 2 * 24 / 192  # of a map at half of the resolution
    torch.manual_seed(0)
    found = blending_map(images(1, size=192), spacing)
    torch.manual_seed(0)
    points = torch.randn(1, 1, 5, 5)  # at 0, 48, …, 192 pixels
    expected = F.interpolate(points, (192, 192), mode="bicubic", align_corners=True)
    low, high = expected.min(), expected.max()
    torch.testing.assert_close(found, (expected - low) / (high - low))


def test_blends_are_complementary() -> None:
    method = build(GINIPA)
    given = batch().source_images
    torch.manual_seed(1)
    first, second, third = (gin(given) for _ in range(3))
    torch.manual_seed(1)
    blends = method.copies(given)
    torch.testing.assert_close(blends[0] + blends[1], first + second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blends[2], third)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    assert ((blends[0] >= low - 1e-6) & (blends[0] <= high + 1e-6)).all()


def test_the_consistency_is_the_mean_divergence_from_the_mean_prediction() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 4, 2, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p.reshape(3, 2, 4, 2, 3)
    middle = p.mean(0)
    by_hand = np.mean([middle * (np.log(middle) - np.log(each)) for each in p])
    assert float(consistency_loss(torch.from_numpy(logits))) == pytest.approx(by_hand, rel=1e-9)
    same = torch.from_numpy(np.tile(logits[:2], (3, 1, 1, 1)))
    assert float(consistency_loss(same)) == pytest.approx(0.0, abs=1e-12)


def test_the_step_sums_the_segmentation_of_the_first_blend_and_the_consistency() -> None:
    method = build(GINIPA, lambda_consistency=3.0)
    given = batch()
    recorder = Recorder()
    torch.manual_seed(2)
    logs = method.step(given, recorder)  # type: ignore[arg-type]
    torch.manual_seed(2)
    copies = method.copies(given.source_images)
    logits = method.segmenter(torch.cat(copies)).logits
    segmentation = segmentation_loss(logits[: len(given.source_images)], given.source_labels)
    expected = segmentation + 3.0 * consistency_loss(logits)
    ((name, minimised),) = recorder.losses
    assert name == "segmenter"
    torch.testing.assert_close(minimised, expected)
    torch.testing.assert_close(logs["segmentation"], segmentation)


def test_it_trains_the_segmenter_and_reads_no_target() -> None:
    method = build(GINIPA)
    before = [p.clone() for p in method.segmenter.parameters()]
    logs = take_step(method)
    assert set(logs) == {"segmentation", "consistency"}
    changed = [
        not torch.equal(a, b) for a, b in zip(before, method.segmenter.parameters(), strict=True)
    ]
    assert any(changed) and not GINIPA.uses_target
    assert gin_ipa.COPIES == 3
