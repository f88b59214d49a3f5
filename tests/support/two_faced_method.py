"""A plugin for tests of domains: a method that answers by the domain alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glua_bench.method import Method, Role, TaskInfo
from glua_bench.methods.source_only import SourceOnly

CLASSES = {"target": 1, "source": 2}  # what it finds in every pixel


class TwoFaced(SourceOnly, Method):
    """Find one structure in all pixels of the target, and another in those of the source.

    An original of these tests.
    """

    name = "two_faced"
    reference = "original"
    needs = "source images and labels, target images"
    uses_target = True

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__(task, config)
        self.heads = nn.ModuleDict()
        for domain, found in CLASSES.items():
            head = nn.Conv2d(task.inputs, task.classes, 1).requires_grad_(False)
            with torch.no_grad():
                head.weight.zero_()
                head.bias.zero_()  # type: ignore[union-attr]
                head.bias[found] = 20  # type: ignore[index]
            self.heads[domain] = head

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Logits of one class."""
        return self.heads[domain](images)

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """The same."""
        return self.predict(images, domain)
