"""FADA: soft labels, domain losses and a step by hand; what gradients reach; refused settings."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_methods import TASK, array, batch, build, context_of, images, softmax, take_step
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.losses import segmentation_loss
from glua_bench.method import Cases
from glua_bench.methods.fada import (
    FADA,
    SOURCE,
    TARGET,
    ClassDiscriminator,
    FADAConfig,
    domain_loss,
    target_probability,
)

CASES = Cases(source=4, target=4)


# -- labels and losses ----------------------------------------------------------------------------


def test_soft_labels_are_softened_and_clipped_without_rescaling() -> None:
    """Logits (9, 0, 0) / 1.8 = (5, 0, 0) have the softmax (0.9867, 0.0066, 0.0066)."""
    method = build(FADA)
    logits = torch.tensor([[9.0, 0, 0], [1.8, 0, -1.8]]).view(2, 3, 1, 1).requires_grad_()
    labels = method.soft_labels(logits)
    rest = 1 / (np.exp(5) + 2)
    mild = np.exp([1, 0, -1]) / np.exp([1, 0, -1]).sum()
    expected = np.array([[0.9, rest, rest], mild])
    np.testing.assert_allclose(labels.view(2, 3).numpy(), expected, rtol=1e-6)
    assert not labels.requires_grad


@pytest.mark.parametrize("domain", [SOURCE, TARGET])
def test_the_domain_loss_is_that_computed_by_hand(domain: int) -> None:
    """One pixel, K = 2, scores (ln 1, ln 2, ln 3, ln 4): D = (0.1, 0.2, 0.3, 0.4)."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().view(1, 4, 1, 1)
    labels = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1)
    shares = {SOURCE: (0.1, 0.2), TARGET: (0.3, 0.4)}[domain]
    expected = -0.75 * np.log(shares[0]) - 0.25 * np.log(shares[1])
    assert float(domain_loss(scores, labels, domain)) == pytest.approx(expected, rel=1e-6)
    # The mean over pixels; labels of 0 count as pixels.
    pair = torch.cat([labels, 0 * labels], dim=3)
    halved = domain_loss(scores.expand(1, 4, 1, 2), pair, domain)
    assert float(halved) == pytest.approx(expected / 2, rel=1e-6)
    assert float(target_probability(scores)) == pytest.approx(0.7)


def test_an_absent_class_has_no_loss() -> None:
    scores = torch.zeros(1, 6, 2, 2)
    labels = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    loss = domain_loss(scores, labels, SOURCE)
    assert float(loss) == pytest.approx(np.log(6), rel=1e-6)
    changed = labels.clone()
    changed[:, 0] = 0
    assert float(domain_loss(scores, changed, SOURCE)) == 0


@pytest.mark.parametrize("form", ["soft", "binary"])
@pytest.mark.parametrize("depth", [0, 1])
def test_the_losses_of_a_step_are_those_computed_by_hand(depth: int, form: str) -> None:
    method = build(FADA, depth=depth, labels=form, temperature=1.5, clip=0.4)
    data = batch()
    before = copy.deepcopy(method)
    source, target = before.segmenter(data.source_images), before.segmenter(data.target)

    def log_shares(features: Tensor) -> np.ndarray:
        low = before.discriminator(features)
        assert low.shape[-1] == 32 // 2**depth
        full = nn.functional.interpolate(low, size=(32, 32), mode="bilinear", align_corners=True)
        return np.log(softmax(array(full)))

    def labels(logits: Tensor) -> np.ndarray:
        if form == "binary":
            return np.ones((2, 1, 32, 32))
        return np.minimum(softmax(array(logits) / 1.5), 0.4)

    k = method.task.classes if form == "soft" else 1
    d_s, d_t = log_shares(source.features[-1 - depth]), log_shares(target.features[-1 - depth])
    a_s, a_t = labels(source.logits), labels(target.logits)
    assert d_s.shape[1] == 2 * k
    expected = {
        "segmentation": float(segmentation_loss(source.logits, data.source_labels).detach()),
        "align": -(a_t * d_t[:, :k]).sum(1).mean(),
        "d": -0.5 * (a_s * d_s[:, :k]).sum(1).mean() - 0.5 * (a_t * d_t[:, k:]).sum(1).mean(),
        "d_source": np.exp(d_s[:, k:]).sum(1).mean(),
        "d_target": np.exp(d_t[:, k:]).sum(1).mean(),
    }
    assert take_step(method, data) == pytest.approx(expected, rel=1e-4)


# -- gradients ------------------------------------------------------------------------------------


def test_the_segmenter_follows_the_weighted_sum_and_the_alignment_spares_the_last_layer() -> None:
    settings = {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.0}
    method, other = (build(FADA, lambda_adv=5.0, **settings) for _ in range(2))
    data = batch()
    take_step(method, data)

    source, target = other.segmenter(data.source_images), other.segmenter(data.target)
    align = domain_loss(other.scores(target), other.soft_labels(target.logits), SOURCE)
    weights = dict(other.segmenter.named_parameters())
    found = torch.autograd.grad(align, list(weights.values()), retain_graph=True, allow_unused=True)
    missing = {name for name, gradient in zip(weights, found, strict=True) if gradient is None}
    assert missing == {name for name in weights if "head" in name}

    (segmentation_loss(source.logits, data.source_labels) + 5 * align).backward()
    for name, weight in method.segmenter.named_parameters():
        rate = 1e-2 if "head" in name else 1e-3
        start = weights[name]
        assert start.grad is not None
        assert torch.allclose(weight, start - rate * start.grad, atol=1e-6), name


def test_each_loss_reaches_its_own_network_alone() -> None:
    method = build(FADA)
    context = context_of(method)
    seen: list[tuple[bool, bool]] = []

    def backward(loss: Tensor, **options: bool) -> None:
        for parameter in method.parameters():
            parameter.grad = None
        loss.backward(**options)
        parts = method.segmenter, method.discriminator
        segmenter, d = (any(p.grad is not None for p in part.parameters()) for part in parts)
        seen.append((segmenter, d))

    context.backward = backward  # type: ignore[method-assign]
    method.step(batch(), context)
    assert seen == [(True, False), (False, True)]


# -- networks and settings ------------------------------------------------------------------------


def test_the_discriminator_is_the_published_one() -> None:
    network = ClassDiscriminator(2048, 19)
    shapes = [tuple(p.shape) for p in network.parameters() if p.dim() == 4]
    assert shapes == [(512, 2048, 3, 3), (256, 512, 3, 3), (38, 256, 3, 3)]
    slopes = [m.negative_slope for m in network if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2, 0.2]
    assert ClassDiscriminator(4, 3, 8)(torch.zeros(1, 4, 5, 7)).shape == (1, 6, 5, 7)


def test_the_published_settings_are_the_defaults() -> None:
    config = FADAConfig()
    assert (config.temperature, config.clip, config.lambda_adv) == (1.8, 0.9, 1e-3)
    assert (config.width_discriminator, config.lr_d, config.labels) == (512, 1e-4, "soft")
    method = build(FADA, **FADA.presets["paper"])
    optimizers = method.optimizers()
    assert sorted(g["lr"] for g in optimizers["segmenter"].param_groups) == [2.5e-4, 2.5e-3]
    assert optimizers["discriminator"].param_groups[0]["betas"] == (0.9, 0.99)
    assert method.stages()[0].decay == 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, {}),
        ({"labels": "binary"}, {}),
        (
            {"labels": "binary", "temperature": 2.0, "clip": 0.8},
            {"temperature": "labels is binary", "clip": "labels is binary"},
        ),
        ({"lambda_adv": 0.0, "depth": 1}, {"depth": "lambda_adv is 0"}),
    ],
)
def test_settings_without_effect_are_said(changes: dict[str, Any], said: dict[str, str]) -> None:
    found = build(FADA, **changes).check(CASES)
    assert {name: adjustment.reason for name, adjustment in found.items()} == said
    assert all(adjustment.value == changes[name] for name, adjustment in found.items())


def test_a_depth_beyond_the_segmenter_is_refused() -> None:
    build(FADA, depth=2)
    with pytest.raises(ConfigError, match=r"method\.depth = 3 exceeds .* at most 2"):
        build(FADA, depth=3)


def test_the_picture_is_the_probability_of_target() -> None:
    method = build(FADA)
    (picture,) = method.pictures(batch()).values()
    scores = method.scores(method.segmenter(batch().target))
    expected = softmax(array(scores))[:, method.task.classes :].sum(1, keepdims=True)
    np.testing.assert_allclose(array(picture), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["deeplab:resnet18", "timm:resnet10t"])
def test_it_works_on_other_segmenters(name: str) -> None:
    task = replace(TASK, size=64, segmenter=SegmenterSpec(name), slices=3)
    method = build(FADA, task)
    found = take_step(method, batch(2, 64, 3))
    assert all(np.isfinite(value) for value in found.values())
    assert method.predict(images(1, 0, 64, 3), "target").shape == (1, task.classes, 64, 64)
