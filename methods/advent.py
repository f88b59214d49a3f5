"""Entropy minimisation: AdvEnt and MinEnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glua_bench.config import setting
from glua_bench.losses import normalised_entropy, self_information
from glua_bench.method import Batch, Context, TaskInfo
from glua_bench.methods.ada_output import AdaOutput, AdaOutputConfig


@dataclass(frozen=True)
class AdventConfig(AdaOutputConfig):
    """Settings of output alignment, and the form of entropy minimisation."""

    form: str = setting(
        "adversarial",
        "adversarial: align entropy maps (AdvEnt); direct: minimise entropy (MinEnt)",
        choices=("adversarial", "direct"),
    )
    lambda_entropy: float = setting(
        1e-3, "weight of main-output entropy (form = direct)", low=0, high=10
    )
    lambda_entropy_aux: float = setting(
        2e-4, "weight of auxiliary-output entropy (form = direct)", low=0, high=10
    )


class Advent(AdaOutput):
    """Reduce the entropy of target predictions, adversarially or directly.

    Vu et al., *ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic
    Segmentation*, CVPR 2019. The adversarial form is `ada_output` with discriminators that read the
    weighted self-information I = -P log P / log K of each class instead of P (eq. 4-7). The direct
    form has no discriminator and adds λ · mean over pixels of the sum of I over classes (eq. 2-3).
    Levels and their weights are those of `ada_output`.
    """

    name = "advent"
    reference = "Vu et al., CVPR 2019"
    needs = "source images and labels, target images"
    uses_target = True
    Config = AdventConfig

    def __init__(self, task: TaskInfo, config: AdventConfig) -> None:
        super().__init__(task, config)
        if config.form == "direct":
            self.discriminators = nn.ModuleDict()

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the two forms of the paper."""
        return {"AdvEnt": {}, "MinEnt": {"form": "direct"}}

    @staticmethod
    def discriminator_input(logits: Tensor) -> Tensor:
        """Return the weighted self-information, (N, K, H, W)."""
        return self_information(logits)

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update as in `ada_output`; in the direct form, with the entropies added to the loss."""
        if self.config.form == "adversarial":
            return super().step(batch, context)
        weights = {"main": self.config.lambda_entropy, "aux": self.config.lambda_entropy_aux}
        loss, logs = self.supervised_loss(self.outputs(batch.source_images), batch.source_labels)
        for name, output in self.outputs(batch.target).items():
            logs[f"entropy_{name}"] = normalised_entropy(output).mean()
            loss = loss + weights[name] * logs[f"entropy_{name}"]
        context.update("segmenter", loss)
        return logs

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the entropy of the main output on target images."""
        return {"entropy": normalised_entropy(self.segmenter(batch.target).logits)}
