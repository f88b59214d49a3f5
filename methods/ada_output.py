"""Output-space alignment: AdaptSegNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, TaskInfo, frozen
from glua_bench.methods.source_only import SegmentConfig, SourceOnly, segmenter_optimizer
from glua_bench.networks import OutputDiscriminator

SMALLEST = 32  # minimum image side in pixels: the discriminators halve it five times
SOURCE, TARGET = 0.0, 1.0  # the discriminators' labels


def check_size(method: str, task: TaskInfo) -> None:
    """Reject slices that an output discriminator cannot halve often enough.

    Raises:
        ConfigError: the slices of the task are too small for the method of this name.
    """
    if task.size < SMALLEST:
        raise ConfigError(
            f"{method} needs slices of at least {SMALLEST} × {SMALLEST} pixels, not "
            f"{task.size} × {task.size} as in {task.dataset}; choose another preset or dataset."
        )


@dataclass(frozen=True)
class AdaOutputConfig(SegmentConfig):
    """Settings of the segmenter and of output alignment; defaults are the authors'."""

    levels: int = setting(2, "aligned outputs: 1 (main) or 2 (and auxiliary)", choices=(1, 2))
    gan: str = setting("vanilla", "adversarial loss", choices=("vanilla", "least-squares"))
    lambda_main: float = setting(1e-3, "weight of main-output alignment", low=0, high=10)
    lambda_aux: float = setting(2e-4, "weight of auxiliary-output alignment", low=0, high=10)
    aux_weight: float = setting(0.1, "weight of the auxiliary segmentation loss", low=0, high=10)
    aux_depth: int = setting(
        1, "decoder levels between the auxiliary and the main output", low=1, high=8
    )
    width_discriminator: int = setting(
        64, "channels after a discriminator's first convolution", low=4, high=256
    )
    lr_d: float = setting(
        1e-4, "learning rate of the discriminators", low=1e-6, high=1e-1, log=True
    )


class AdaOutput(SourceOnly):
    """Align the softmax outputs of both domains with discriminators at one or two levels.

    AdaptSegNet: Tsai et al., *Learning to Adapt Structured Output Space for Semantic
    Segmentation*, CVPR 2018 (`wasidennis/AdaptSegNet`). P is the softmax output, P' that of an
    auxiliary head on an earlier decoder map, and D and D' are their discriminators, with source = 0
    and target = 1. The segmenter minimises

        L_seg(source) + 0.1 L_seg'(source) + λ_aux L(D'(P'_t), 0) + λ_main L(D(P_t), 0),

    where L is binary cross-entropy on logits or squared error. Each discriminator minimises
    ½ (L(D(P_s), 0) + L(D(P_t), 1)) on the same outputs, detached. As in medical applications of the
    method, L_seg has a Dice term. The authors train an ImageNet-initialised DeepLab with SGD; here
    the two levels are the last decoder maps of the segmenter that all methods share.
    """

    name = "ada_output"
    reference = "Tsai et al., CVPR 2018 (AdaptSegNet)"
    needs = "source images and labels, target images"
    uses_target = True
    Config = AdaOutputConfig
    presets = {
        "quick": {"width_discriminator": 16, "lr_d": 1e-3},
        "paper": {"optimizer": "sgd", "lr": 2.5e-4, "weight_decay": 5e-4},
    }

    def __init__(self, task: TaskInfo, config: AdaOutputConfig) -> None:
        super().__init__(task, config)
        check_size(self.name, task)
        outputs = {"main": self.segmenter.feature_channels[-1]}
        if config.levels == 2:
            channels = self.segmenter.feature_channels
            if config.aux_depth >= len(channels):
                raise ConfigError(
                    f"method.aux_depth = {config.aux_depth} exceeds the segmenter's depth; set at "
                    f"most {len(channels) - 1}, a deeper segmenter, or method.levels=1."
                )
            self.aux_head = nn.Conv2d(channels[-1 - config.aux_depth], task.classes, 1)
            outputs["aux"] = channels[-1 - config.aux_depth]
        self.discriminators = nn.ModuleDict(
            {
                name: OutputDiscriminator(task.classes, config.width_discriminator)
                for name in outputs
            }
        )

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the segmenter's optimizer and Adam with betas (0.9, 0.99) per discriminator."""
        heads = (self.aux_head,) if self.config.levels == 2 else ()
        segmenter = segmenter_optimizer(self.segmenter, self.config, heads)
        optimizers: dict[str, Optimizer] = {"segmenter": segmenter}
        for name, discriminator in self.discriminators.items():
            optimizers[f"d_{name}"] = Adam(
                discriminator.parameters(), self.config.lr_d, (0.9, 0.99), fused=True
            )
        return optimizers

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the full-size logits of each level, name → (N, K, H, W)."""
        segmented = self.segmenter(images)
        outputs = {"main": segmented.logits}
        if self.config.levels == 2:
            low = self.aux_head(segmented.features[-1 - self.config.aux_depth])
            outputs["aux"] = F.interpolate(
                low, size=images.shape[-2:], mode="bilinear", align_corners=True
            )
        return outputs

    @staticmethod
    def discriminator_input(logits: Tensor) -> Tensor:
        """Return the discriminators' input for an output, (N, K, H, W)."""
        return logits.float().softmax(1)

    def supervised_loss(
        self, outputs: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted segmentation loss of all levels, and each level's loss to log."""
        losses = {name: segmentation_loss(output, labels) for name, output in outputs.items()}
        weights = {"main": 1.0, "aux": self.config.aux_weight}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return total, {f"segmentation_{name}": loss for name, loss in losses.items()}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter, then each discriminator on the same outputs."""
        weights = {"main": self.config.lambda_main, "aux": self.config.lambda_aux}
        source, target = self.outputs(batch.source_images), self.outputs(batch.target)
        loss, logs = self.supervised_loss(source, batch.source_labels)
        real = {name: self.discriminator_input(output.detach()) for name, output in source.items()}
        fake = {name: self.discriminator_input(output) for name, output in target.items()}
        with frozen(self.discriminators):
            for name, discriminator in self.discriminators.items():
                logs[f"align_{name}"] = self.adversarial(discriminator(fake[name]), SOURCE)
                loss = loss + weights[name] * logs[f"align_{name}"]
        context.update("segmenter", loss)
        for name, discriminator in self.discriminators.items():
            logs[f"d_{name}"] = 0.5 * (
                self.adversarial(discriminator(real[name]), SOURCE)
                + self.adversarial(discriminator(fake[name].detach()), TARGET)
            )
            context.update(f"d_{name}", logs[f"d_{name}"])
        return logs

    def adversarial(self, scores: Tensor, label: float) -> Tensor:
        """Return the adversarial loss L of a score map against one label, a scalar."""
        scores, wanted = scores.float(), torch.full_like(scores, label, dtype=torch.float32)
        if self.config.gan == "vanilla":
            return F.binary_cross_entropy_with_logits(scores, wanted)
        return F.mse_loss(scores, wanted)
