"""AdaptSegNet: a step's losses by hand, published sizes, and refused settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_methods import TASK, take_step
from torch import Tensor

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch
from glua_bench.methods.ada_output import AdaOutput, AdaOutputConfig, OutputDiscriminator


def build(size: int = 64, depth: int = 3, name: str = "unet", **config: Any) -> AdaOutput:
    torch.manual_seed(0)
    task = replace(TASK, size=size, segmenter=SegmenterSpec(name, 4, depth))
    return AdaOutput(task, AdaOutputConfig(**{"width_discriminator": 8, **config}))


def make_batch(classes: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    source, target = torch.rand(2, 2, 1, 64, 64, generator=generator) * 2 - 1
    labels = torch.randint(0, classes, (2, 64, 64), generator=generator)
    return Batch(source, labels, 0.3 * target + 0.4)


# -- by hand, without the package's losses --------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def cross_entropy_and_dice(logits: np.ndarray, labels: np.ndarray) -> float:
    p = softmax(logits)
    own = np.take_along_axis(p, labels[:, None], 1)
    dice = []
    for k in range(1, p.shape[1]):
        r = labels == k
        dice.append((2 * p[:, k][r].sum() + 1e-5) / (p[:, k].sum() + r.sum() + 1e-5))
    return float(-np.log(own).mean() + 1 - np.mean(dice))


def vanilla(scores: np.ndarray, label: int) -> float:
    """-log σ(s) for label 1, and -log(1 - σ(s)) for label 0."""
    return float(np.log1p(np.exp(-scores if label else scores)).mean())


def least_squares(scores: np.ndarray, label: int) -> float:
    return float(((scores - label) ** 2).mean())


@pytest.mark.parametrize(("gan", "loss"), [("vanilla", vanilla), ("least-squares", least_squares)])
@pytest.mark.parametrize("levels", [1, 2])
def test_the_losses_of_a_step_are_those_computed_by_hand(
    gan: str, loss: Callable[[np.ndarray, int], float], levels: int
) -> None:
    method = build(gan=gan, levels=levels)
    batch = make_batch(method.task.classes)
    names = ("main", "aux")[:levels]

    def array(value: Tensor) -> np.ndarray:
        return value.detach().double().numpy()

    def scores(name: str, output: np.ndarray) -> np.ndarray:
        return array(before.discriminators[name](torch.from_numpy(softmax(output)).float()))

    before = copy.deepcopy(method)
    source = {n: array(v) for n, v in before.outputs(batch.source_images).items()}
    target = {n: array(v) for n, v in before.outputs(batch.target).items()}
    assert set(source) == set(names)
    expected = {}
    for name in names:
        labels = batch.source_labels.numpy()
        expected[f"segmentation_{name}"] = cross_entropy_and_dice(source[name], labels)
        expected[f"align_{name}"] = loss(scores(name, target[name]), 0)
        expected[f"d_{name}"] = 0.5 * (
            loss(scores(name, source[name]), 0) + loss(scores(name, target[name]), 1)
        )
    assert take_step(method, batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_segmenter_follows_the_weighted_sum(levels: int) -> None:
    """A plain gradient step on the sum of the logged losses gives the same weights."""
    weights = {"lambda_main": 0.3, "lambda_aux": 0.2, "aux_weight": 0.4}
    config = {"levels": levels, "optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.0, **weights}
    method = build(**config)
    other = copy.deepcopy(method)
    batch = make_batch(method.task.classes)
    take_step(method, batch)

    source, target = other.outputs(batch.source_images), other.outputs(batch.target)
    loss = segmentation_loss(source["main"], batch.source_labels)
    loss = loss + 0.3 * other.adversarial(
        other.discriminators["main"](target["main"].softmax(1)), 0
    )
    if levels == 2:
        loss = loss + 0.4 * segmentation_loss(source["aux"], batch.source_labels)
        aux = other.discriminators["aux"](target["aux"].softmax(1))
        loss = loss + 0.2 * other.adversarial(aux, 0)
    loss.backward()
    for name, weight in method.named_parameters():
        if name.startswith("discriminators"):
            continue
        rate = 1e-2 if "head" in name else 1e-3  # ten times for the heads
        start = other.get_parameter(name)
        assert start.grad is not None, name
        assert torch.allclose(weight, start - rate * start.grad, atol=1e-7), name


def test_discriminators_are_the_published_ones() -> None:
    discriminator = OutputDiscriminator(19)
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.dim() == 4]
    assert shapes == [
        (64, 19, 4, 4),
        (128, 64, 4, 4),
        (256, 128, 4, 4),
        (512, 256, 4, 4),
        (1, 512, 4, 4),
    ]
    assert discriminator(torch.zeros(1, 19, 64, 96)).shape == (1, 1, 2, 3)


def test_the_published_settings_are_the_defaults() -> None:
    config = AdaOutputConfig()
    assert (config.lambda_main, config.lambda_aux, config.aux_weight) == (1e-3, 2e-4, 0.1)
    assert (config.width_discriminator, config.lr_d, config.gan) == (64, 1e-4, "vanilla")
    paper = AdaOutput.presets["paper"]
    assert paper == {"optimizer": "sgd", "lr": 2.5e-4, "weight_decay": 5e-4}
    method = build(**paper)
    (stage,) = method.stages()
    assert stage.decay == 0.9
    optimizers = method.optimizers()
    groups = optimizers["segmenter"].param_groups
    assert sorted(g["lr"] for g in groups) == [2.5e-4, 2.5e-3]
    assert all(g["momentum"] == 0.9 for g in groups)
    assert optimizers["d_aux"].param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["unet", "timm:resnet10t"])
def test_it_works_on_any_segmenter(name: str, optimizer: str) -> None:
    method = build(name=name, optimizer=optimizer)
    outputs = method.outputs(make_batch(method.task.classes).source_images)
    assert {v.shape for v in outputs.values()} == {(2, method.task.classes, 64, 64)}
    groups = method.optimizers()["segmenter"].param_groups
    known = {id(p) for g in groups for p in g["params"]}
    assert known == {id(p) for p in (*method.segmenter.parameters(), *method.aux_head.parameters())}


def test_unsuitable_depths_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="aux_depth = 3.*at most 2.*method.levels=1"):
        build(depth=3, aux_depth=3)
    build(depth=3, aux_depth=3, levels=1)
    with pytest.raises(ConfigError, match="at least 32 × 32"):
        build(size=16)
