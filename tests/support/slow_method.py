"""A plugin for tests of sweeps: a method whose steps take as long as they are told."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from glua_bench.config import setting
from glua_bench.method import Batch, Context, Method, Role, TaskInfo


@dataclass(frozen=True)
class SlowConfig:
    """Its settings."""

    lr: float = setting(0.1, "learning rate", low=1e-6, high=1.0)
    pause: float = setting(0.0, "seconds that a step waits", low=0.0, high=9.0)


class Slow(Method):
    """One convolution, trained on source images.

    An original of these tests.
    """

    name = "slow"
    reference = "original"
    needs = "source images and labels, target images"
    Config = SlowConfig

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__(task, config)
        self.head = nn.Conv2d(task.inputs, task.classes, 3, padding=1)

    def optimizers(self) -> dict[str, Optimizer]:
        """One."""
        return {"head": SGD(self.head.parameters(), lr=self.config.lr)}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Write down that it began, wait, then train."""
        steps = os.environ.get("GLUA_BENCH_TEST_STEPS")
        if steps and os.environ.get("LOCAL_RANK", "0") == "0":
            with open(steps, "a", encoding="utf-8") as file:
                file.write(f"{context.step}\n")
        time.sleep(self.config.pause)
        # A mean over pixels, so that two processes with half a batch each find the same gradient.
        loss = F.cross_entropy(self.head(batch.source_images), batch.source_labels.long())
        context.update("head", loss)
        return {"loss": loss}

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Logits."""
        return self.head(images)
