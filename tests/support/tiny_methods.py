"""Tiny tasks, images and method instances for the tests of methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from glua_bench.config import SegmenterSpec, build_settings
from glua_bench.conformance import TinyDataset, small_settings
from glua_bench.method import Batch, Context, Method, Stage, TaskInfo

SIZE = 32
TASK = TaskInfo("tiny", TinyDataset.structures, SIZE, SegmenterSpec("unet", 4, 3), 2)


def images(count: int = 2, seed: int = 0, size: int = SIZE, slices: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, slices, size, size, generator=generator) * 2 - 1


def batch(count: int = 2, size: int = SIZE, slices: int = 1) -> Batch:
    source, target = images(count, 0, size, slices), images(count, 1, size, slices)
    return Batch(source, (source[:, slices // 2] > 0).long(), target * 0.3 + 0.4)


def build(method: type[Method], task: TaskInfo = TASK, **config: Any) -> Any:
    torch.manual_seed(0)
    made = method(task, build_settings(method.Config, small_settings(method, config), "method"))
    return made.train()


def context_of(method: Any, stage: Stage | None = None) -> Context:
    """Return the context of the first step of a stage, by default the last one."""
    stage = stage or method.stages()[-1]
    optimizers = (stage.optimizers or method.optimizers)()
    return Context(stage, 0, 10, optimizers, lambda: iter(()))


def take_step(
    method: Any, data: Batch | None = None, stage: Stage | None = None
) -> dict[str, float]:
    """Take a step with fixed random numbers, and return the values that it logs."""
    context = context_of(method, stage)
    torch.manual_seed(1)
    values = (context.stage.step or method.step)(data or batch(), context)
    return {name: float(value.detach()) for name, value in values.items()}


class Recorder:
    """A context that keeps the losses of `update` instead of minimising them."""

    def __init__(self) -> None:
        self.losses: list[tuple[str, Tensor]] = []

    def update(self, name: str, loss: Tensor) -> None:
        self.losses.append((name, loss))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over axis 1, by numpy."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()
