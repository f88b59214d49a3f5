"""CLAN: weights, cosine and a step by hand; what gradients reach; settings without effect."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_methods import TASK, array, batch, build, context_of, images, softmax, take_step
from torch import Tensor

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.losses import segmentation_loss
from glua_bench.method import Cases, Context
from glua_bench.methods.clan import CLAN, CLANConfig, Pair

CASES = Cases(source=4, target=4)


def context_at(method: CLAN, step: int) -> Context:
    """Return the context of a step of ten."""
    return replace(context_of(method), step=step)


# -- weights --------------------------------------------------------------------------------------


def test_the_disagreement_is_one_minus_the_cosine_of_the_outputs() -> None:
    """(0.5, 0.5) and (0.8, 0.2): cos = 0.5 / (√0.5 · √0.68); equal and opposite outputs."""
    first = torch.tensor([[0.5, 0.5], [0.8, 0.2], [1.0, 1e-20]]).log()
    second = torch.tensor([[0.8, 0.2], [0.8, 0.2], [1e-20, 1.0]]).log()
    maps = [logits.view(3, 2, 1, 1) for logits in (first, second)]
    expected = [1 - 0.5 / np.sqrt(0.5 * 0.68), 0, 1]
    found = Pair(*maps).disagreement
    assert found.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(found.flatten(), expected, atol=1e-6)
    # The scale of both logits' sum is the ensemble's: (0.4, 0.1) / 0.5.
    np.testing.assert_allclose(Pair(*maps).output[0].flatten(), [0.8, 0.2], rtol=1e-6)


def test_pixels_are_weighted_after_the_preheating() -> None:
    method = build(CLAN, preheat=0.2)
    disagreement = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)
    assert method.weights(disagreement, 0.1).flatten().tolist() == [1, 1, 1]
    for progress in (0.2, 0.9):
        found = method.weights(disagreement, progress).flatten().tolist()
        assert found == pytest.approx([0.4, 0.4 + 40 * 0.25, 40.4])


def test_the_classifiers_differ_at_first_and_their_cosine_is_that_of_all_weights() -> None:
    method = build(CLAN)
    heads = method.segmenter.head, method.aux_head
    first, second = (
        np.concatenate([array(p).ravel() for p in head.parameters()]) for head in heads
    )
    assert abs(first - second).min() > 0
    expected = first @ second / np.sqrt((first @ first) * (second @ second))
    assert float(method.cosine().detach()) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        for own, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            own.copy_(-2 * other)
    assert float(method.cosine().detach()) == pytest.approx(-1)


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 5])
def test_the_losses_of_a_step_are_those_computed_by_hand(step: int) -> None:
    method = build(CLAN, lambda_local=10.0, preheat=0.3)
    data = batch()
    before = copy.deepcopy(method)
    source, target = before.outputs(data.source_images), before.outputs(data.target)

    def losses(pair: Pair, label: int) -> np.ndarray:
        p = torch.from_numpy(softmax(array(pair.first) + array(pair.second))).float()
        low = before.discriminator(p)
        assert low.shape == (2, 1, 1, 1)
        scores = np.broadcast_to(array(low), (2, 1, 32, 32))  # one value is upsampled
        return np.log1p(np.exp(-scores if label else scores))

    p1, p2 = softmax(array(target.first)), softmax(array(target.second))
    cos = (p1 * p2).sum(1, keepdims=True) / np.sqrt(
        (p1**2).sum(1, keepdims=True) * (p2**2).sum(1, keepdims=True)
    )
    m = 0.4 + 10 * (1 - cos) if step == 5 else np.ones_like(cos)
    expected = {
        "segmentation": float(segmentation_loss(source.first, data.source_labels).detach()),
        "segmentation_second": float(segmentation_loss(source.second, data.source_labels).detach()),
        "align": (m * losses(target, 0)).mean(),
        "cosine": float(before.cosine().detach()),
        "disagreement": (1 - cos).mean(),
        "d": losses(source, 0).mean() + (m * losses(target, 1)).mean(),
    }
    found = method.step(data, context_at(method, step))
    values = {name: float(value.detach()) for name, value in found.items()}
    assert values == pytest.approx(expected, rel=1e-4)


def test_scores_are_upsampled_before_they_are_weighted() -> None:
    method = build(CLAN, replace(TASK, size=64))
    output = torch.rand(1, method.task.classes, 64, 64)
    low = method.discriminator(output)
    assert low.shape == (1, 1, 2, 2)
    column = torch.zeros(1, 1, 64, 64)
    column[..., 21] = 1  # a third of the way from the left to the right score
    between = (low[..., 0] * 2 / 3 + low[..., 1] / 3).flatten()
    rows = between[0] + (between[1] - between[0]) * torch.arange(64) / 63
    expected = F.softplus(rows).sum() / 64**2
    torch.testing.assert_close(method.adversarial(output, 0.0, column), expected)


@pytest.mark.parametrize("step", [0, 5])
def test_the_segmenter_follows_the_damped_sum(step: int) -> None:
    """A plain gradient step on the weighted sum of losses gives the same weights."""
    settings = {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.0}
    weights = {"lambda_adv": 0.3, "lambda_weight": 0.7, "preheat": 0.0}
    method, other = (build(CLAN, **weights, **settings) for _ in range(2))
    data = batch()
    method.step(data, context_at(method, step))

    source, target = other.outputs(data.source_images), other.outputs(data.target)
    p1, p2 = target.first.softmax(1), target.second.softmax(1)
    m = 0.4 + 40 * (1 - (p1 * p2).sum(1, keepdim=True) / (p1.norm(dim=1) * p2.norm(dim=1))[:, None])
    scores = other.discriminator((target.first + target.second).softmax(1)).expand(2, 1, 32, 32)
    loss = segmentation_loss(source.first, data.source_labels)
    loss = loss + segmentation_loss(source.second, data.source_labels)
    damped = 0.3 * (m * F.softplus(scores)).mean() + 0.7 * other.cosine()
    (loss + (1 - step / 10) * damped).backward()
    for name, weight in method.named_parameters():
        if name.startswith("discriminator"):
            continue
        rate = 1e-2 if "head" in name else 1e-3  # ten times for both classifiers
        start = other.get_parameter(name)
        assert start.grad is not None, name
        assert torch.allclose(weight, start - rate * start.grad, atol=1e-6), name


def test_each_loss_reaches_its_own_networks_alone() -> None:
    method = build(CLAN, preheat=0.0)
    context = context_of(method)
    seen: list[tuple[bool, bool]] = []

    def backward(loss: Tensor, **options: bool) -> None:
        for parameter in method.parameters():
            parameter.grad = None
        loss.backward(**options)
        parts = (method.segmenter, method.aux_head), (method.discriminator,)
        segmenter, d = (
            any(p.grad is not None for m in own for p in m.parameters()) for own in parts
        )
        seen.append((segmenter, d))

    context.backward = backward  # type: ignore[method-assign]
    method.step(batch(), context)
    assert seen == [(True, False), (False, True)]


# -- prediction and settings ----------------------------------------------------------------------


def test_the_ensemble_predicts_and_the_picture_is_the_disagreement() -> None:
    method = build(CLAN).eval()
    with torch.no_grad():
        segmented = method.segmenter(images())
        both = segmented.logits + method.aux_head(segmented.features[-1])
        torch.testing.assert_close(method.predict(images(), "target"), both)
    target = method.outputs(batch().target)
    (picture,) = method.pictures(batch()).values()
    assert torch.equal(picture, target.disagreement)


def test_the_published_settings_are_the_defaults() -> None:
    config = CLANConfig()
    assert (config.lambda_adv, config.lambda_local, config.epsilon) == (1e-3, 40, 0.4)
    assert (config.lambda_weight, config.preheat) == (0.01, 0.05)
    assert (config.width_discriminator, config.lr_d) == (64, 1e-4)
    method = build(CLAN, **CLAN.presets["paper"])
    optimizers = method.optimizers()
    assert sorted(g["lr"] for g in optimizers["segmenter"].param_groups) == [2.5e-4, 2.5e-3]
    assert optimizers["discriminator"].param_groups[0]["betas"] == (0.9, 0.99)
    assert method.stages()[0].decay == 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, {}),
        ({"lambda_local": 0.0, "epsilon": 1.0}, {}),
        (
            {"lambda_local": 0.0, "epsilon": 1.0, "preheat": 0.5},
            {"preheat": "all pixels have the weight 1"},
        ),
        ({"preheat": 1.0, "lambda_local": 10.0}, {"lambda_local": "preheat is 1"}),
        ({"lambda_adv": 0.0, "epsilon": 0.5}, {"epsilon": "lambda_adv is 0"}),
    ],
)
def test_settings_without_effect_are_said(changes: dict[str, Any], said: dict[str, str]) -> None:
    found = build(CLAN, **changes).check(CASES)
    assert {name: adjustment.reason for name, adjustment in found.items()} == said
    assert all(adjustment.value == changes[name] for name, adjustment in found.items())


def test_small_slices_are_refused() -> None:
    with pytest.raises(ConfigError, match="clan needs slices of at least 32 × 32"):
        build(CLAN, replace(TASK, size=16))


@pytest.mark.parametrize("name", ["deeplab:resnet18", "timm:resnet10t"])
def test_it_works_on_other_segmenters(name: str) -> None:
    task = replace(TASK, size=64, segmenter=SegmenterSpec(name, dilations=2), slices=3)
    method = build(CLAN, task)
    found = take_step(method, batch(2, 64, 3))
    assert all(np.isfinite(value) for value in found.values())
    assert method.predict(images(1, 0, 64, 3), "target").shape == (1, task.classes, 64, 64)
