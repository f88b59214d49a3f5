"""CycleGAN: the paper's sizes, and a step's losses by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_methods import TASK, context_of
from torch import Tensor

from glua_bench.conformance import first_difference
from glua_bench.method import Batch
from glua_bench.methods.cycle_translate import CycleConfig, CycleTranslate, ResnetGenerator
from glua_bench.networks import InstanceNorm, PatchGAN

SMALL = {"cycle_width": 4, "cycle_blocks": 1, "cycle_width_d": 4, "cycle_pool": 2}


def build(**config: Any) -> CycleTranslate:
    torch.manual_seed(0)
    return CycleTranslate(TASK, CycleConfig(**{**SMALL, **config}))


def batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.rand(2, 2, 1, 32, 32, generator=generator) * 2 - 1
    return Batch(source, (source[:, 0] > 0).long(), 0.3 * target + 0.4)


# -- sizes ----------------------------------------------------------------------------------------


def test_full_networks_have_the_papers_layers() -> None:
    def weights(layers: list[tuple[int, int, int]]) -> int:
        return sum(kernel**2 * inputs * outputs for kernel, inputs, outputs in layers)

    generator = ResnetGenerator()
    blocks = [(3, 256, 256)] * 18
    layers = [(7, 1, 64), (3, 64, 128), (3, 128, 256), *blocks, (3, 256, 128), (3, 128, 64)]
    assert sum(p.numel() for p in generator.parameters()) == weights([*layers, (7, 64, 1)]) + 1

    # Only the first and the last convolution have a bias: the others stand before a norm.
    discriminator = [(4, 1, 64), (4, 64, 128), (4, 128, 256), (4, 256, 512), (4, 512, 1)]
    own = sum(p.numel() for p in PatchGAN().parameters())
    assert own == weights(discriminator) + 64 + 1


def test_a_score_sees_70_pixels_a_side() -> None:
    torch.manual_seed(0)
    # Without the norms, through which every pixel depends on all others.
    kept = [m for m in PatchGAN(4).body if not isinstance(m, InstanceNorm)]
    discriminator = torch.nn.Sequential(*kept)
    images = torch.randn(1, 1, 128, 128, requires_grad=True)
    scores = discriminator(images)
    assert scores.shape == (1, 1, 14, 14)
    (gradient,) = torch.autograd.grad(scores[0, 0, 7, 7], images)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize("size", [32, 36])
def test_generators_keep_the_size(size: int) -> None:
    images = torch.rand(1, 1, size, size) * 2 - 1
    translated = ResnetGenerator(4, 1)(images)
    assert translated.shape == images.shape
    assert float(translated.detach().abs().max()) <= 1


# -- the step -------------------------------------------------------------------------------------


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def test_one_steps_losses_are_the_papers() -> None:
    method, own = build(cycle_weight=7.0), batch()
    before = copy.deepcopy(method.cycle)
    logs = method.cycle.step(own, context_of(method, method.stages()[0]))
    with torch.no_grad():
        fake_t, fake_s = before.to_target(own.source_images), before.to_source(own.target)
        again_s, again_t = before.to_source(fake_t), before.to_target(fake_s)
        d_t, d_s = before.d_target, before.d_source
        cycles = np.abs(array(again_s - own.source_images)).mean()
        cycles += np.abs(array(again_t - own.target)).mean()
        expected = {
            "cycles": cycles,
            "adv_target": ((array(d_t(fake_t)) - 1) ** 2).mean(),
            "adv_source": ((array(d_s(fake_s)) - 1) ** 2).mean(),
        }
        for name, d, real, fake in (
            ("d_target", d_t, own.target, fake_t),
            ("d_source", d_s, own.source_images, fake_s),
        ):
            expected[name] = 0.5 * (
                ((array(d(real)) - 1) ** 2).mean() + (array(d(fake)) ** 2).mean()
            )
    got = {name: float(value.detach()) for name, value in logs.items()}
    assert got == pytest.approx(expected, rel=1e-4)


def test_the_generators_update_is_that_of_their_weighted_sum() -> None:
    method, own = build(cycle_weight=7.0), batch()
    other = copy.deepcopy(method.cycle)
    method.cycle.step(own, context_of(method, method.stages()[0]))
    fake_t, fake_s = other.to_target(own.source_images), other.to_source(own.target)
    loss = (other.d_target(fake_t) - 1).square().mean()
    loss = loss + (other.d_source(fake_s) - 1).square().mean()
    loss = loss + 7 * (other.to_source(fake_t) - own.source_images).abs().mean()
    loss = loss + 7 * (other.to_target(fake_s) - own.target).abs().mean()
    for d in (other.d_target, other.d_source):
        d.requires_grad_(False)
    loss.backward()
    optimizer = other.optimizers()["generators"]
    optimizer.step()
    for mine, theirs in (
        (method.cycle.to_target, other.to_target),
        (method.cycle.to_source, other.to_source),
    ):
        for name, weight in theirs.state_dict().items():
            assert torch.allclose(mine.state_dict()[name], weight, atol=2e-5), name


def test_discriminators_see_fakes_of_a_pool() -> None:
    method = build()
    context = context_of(method, method.stages()[0])
    seen: list[Tensor] = []
    method.cycle.d_target.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    old = 0
    for seed in range(12):
        torch.manual_seed(seed)
        seen.clear()
        method.cycle.step(batch(seed), context)
        judged, trained = seen  # by the generators' loss; by the discriminator's own
        assert torch.equal(trained[:2], batch(seed).target)
        old += int(not torch.equal(trained[2:], judged.detach()))
    assert 2 <= old <= 10  # two fill the pool, then even odds
    assert int(method.cycle.pool_target.filled) == 2


def test_a_step_takes_at_most_its_own_batch() -> None:
    method = build(cycle_batch=1)
    assert method.cycle.pool_target.images.shape[1] == 1
    shapes: list[int] = []
    method.cycle.d_source.register_forward_hook(lambda _, given, out: shapes.append(len(given[0])))
    method.cycle.step(batch(), context_of(method, method.stages()[0]))
    assert shapes == [1, 2]


def test_the_second_stage_trains_the_segmenter_alone_on_translated_images() -> None:
    method = build()
    translation, segmentation = method.stages()
    assert translation.translate is None and not translation.photometric
    assert translation.step == method.cycle.step and segmentation.step is None
    assert segmentation.translate is not None
    images = batch().source_images
    assert torch.equal(segmentation.translate(images), method.cycle.to_target(images))
    before = copy.deepcopy(method.cycle.state_dict())
    method.step(batch(), context_of(method, segmentation))
    assert not first_difference(before, method.cycle.state_dict())
