"""Tent: the entropy, what is adapted, and the order of prediction and update."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_methods import TASK, build, images
from torch import Tensor, nn

from glua_bench.errors import UserError
from glua_bench.methods.source_only import SourceOnly
from glua_bench.scoring.tent import LR, Tent, entropy


def test_the_entropy_by_hand() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_hand = -(p * np.log(p)).sum(1).mean()
    assert float(entropy(torch.from_numpy(logits))) == pytest.approx(by_hand, rel=1e-12)
    sure = torch.tensor([[[[1000.0]], [[0.0]]]])
    assert float(entropy(sure)) == 0.0


def test_predictions_come_before_the_update_and_updates_accumulate() -> None:
    method = build(SourceOnly).eval()
    plain = copy.deepcopy(method)
    tent = Tent(method, "run")
    first, second = images(2, seed=0), images(2, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(tent.predict(first, "target"), plain.predict(first, "target"))
        adapted, before = tent.predict(second, "target"), plain.predict(second, "target")
    assert not adapted.requires_grad
    assert not torch.allclose(adapted, before, atol=1e-5)


def test_one_step_of_adam_changes_normalisation_layers_alone() -> None:
    method = build(SourceOnly).eval()
    before = {name: p.clone() for name, p in method.named_parameters()}
    norms = {
        f"{name}.{own}"
        for name, module in method.named_modules()
        if isinstance(module, nn.GroupNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    given = images(2)
    reference = copy.deepcopy(method)
    loss = entropy(reference.predict(given, "target"))
    loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    with torch.no_grad():
        Tent(method, "run").predict(given, "target")
    changed = {n for n, p in method.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in norms if gradients[n].abs().max() > 0} and changed
    for name in changed:  # the first step of Adam is the rate in the gradient's direction
        step = dict(method.named_parameters())[name].detach() - before[name]
        clear = gradients[name].abs() > 1e-5
        torch.testing.assert_close(
            step[clear], -LR * gradients[name][clear].sign(), rtol=1e-2, atol=1e-6
        )


def test_repeated_batches_lower_the_entropy() -> None:
    tent, given = Tent(build(SourceOnly).eval(), "run"), images(2)
    found = [float(entropy(tent.predict(given, "target"))) for _ in range(30)]
    assert found[-1] < found[0]


class Batched(SourceOnly):
    """A method whose prediction ends with batch normalisation."""

    def __init__(self, task: object, config: object) -> None:
        super().__init__(task, config)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(TASK.classes)

    def predict(self, images: Tensor, domain: str) -> Tensor:
        return self.norm(super().predict(images, domain))  # type: ignore[arg-type]


def test_batch_norm_uses_the_statistics_of_the_batch() -> None:
    method = build(Batched).eval()
    with torch.no_grad():
        method.norm.running_mean += 50.0
        found = Tent(method, "run").predict(images(4), "target")
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(TASK.classes), atol=1e-4, rtol=0)


class Bare(SourceOnly):
    """A method whose predictions pass no normalisation layer."""

    def __init__(self, task: object, config: object) -> None:
        super().__init__(task, config)  # type: ignore[arg-type]
        self.own = nn.Conv2d(1, TASK.classes, 1)

    def predict(self, images: Tensor, domain: str) -> Tensor:
        return self.own(images)


def test_models_without_normalisation_are_refused() -> None:
    with pytest.raises(UserError, match="depend on none with weights; predict without --adapt"):
        Tent(build(Bare).eval(), "runs/x").predict(images(1), "target")
    method = build(Bare).eval()
    del method.segmenter
    with pytest.raises(UserError, match="runs/x"):
        Tent(method, "runs/x")
