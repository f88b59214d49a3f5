"""Test-time adaptation by entropy minimisation: Tent; for `predict --adapt tent`.

Wang, Shelhamer, Liu, Olshausen and Darrell, *Tent: Fully Test-Time Adaptation by Entropy
Minimization*, ICLR 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import Adam

from glua_bench.errors import UserError
from glua_bench.losses import normalised_entropy
from glua_bench.method import Method, Role

LR = 1e-3  # the authors' learning rate with Adam


class Tent:
    """Predict batch after batch, and adapt normalisation layers to each one.

    For each batch of images x, the logits S(x) are the prediction, and then one step of Adam
    minimises the mean entropy over pixels

        H = -mean Σ_k p_k log p_k,        p = softmax S(x),

    with respect to the weights and biases of normalisation layers alone. Batch normalisation uses
    the statistics of the batch instead of those of training. As in the paper's online setting,
    updates accumulate from batch to batch, so a prediction depends on the images before it.

    Args:
        method: a trained method in eval mode; it is changed.
        source: path from which it was read, for messages.

    Raises:
        UserError: the method has no normalisation layer with weights.
    """

    def __init__(self, method: Method, source: str) -> None:
        self.method, self.source = method, source
        method.requires_grad_(False)
        self.parameters: list[nn.Parameter] = []
        for module in method.modules():
            if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
                self.parameters += module.parameters(recurse=False)
            if isinstance(module, _BatchNorm):
                module.train()
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        if not self.parameters:
            raise self._unsuitable()
        for parameter in self.parameters:
            parameter.requires_grad_()
        self._optimizer = Adam(self.parameters, LR)

    def stages(self) -> Any:
        """Return the stages of the method, whose last one may translate source images."""
        return self.method.stages()

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return logits (N, K, H, W) of images (N, S, H, W), and adapt to them.

        Raises:
            UserError: the predictions depend on no normalisation layer with weights.
        """
        with torch.enable_grad():
            logits = self.method.predict(images, domain)
            if not logits.requires_grad:
                raise self._unsuitable()
            self._optimizer.zero_grad(set_to_none=True)
            entropy(logits).backward()
            self._optimizer.step()
        return logits.detach()

    def _unsuitable(self) -> UserError:
        return UserError(
            f"--adapt tent adapts normalisation layers, but the predictions of {self.source} "
            "depend on none with weights; predict without --adapt."
        )


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the predicted classes in nats, a scalar.

    Args:
        logits: (N, K, H, W).
    """
    return normalised_entropy(logits).mean() * math.log(logits.shape[1])
