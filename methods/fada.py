"""Class-wise feature alignment: FADA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import precise, segmentation_loss
from glua_bench.method import Adjustment, Batch, Cases, Context, TaskInfo, frozen
from glua_bench.methods.components.idle_settings import idle_settings
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.networks import Segmented, conv_chain

SOURCE, TARGET = 0, 1  # position of a domain's outputs in the discriminator


@dataclass(frozen=True)
class FADAConfig(SegmentConfig):
    """Settings of the segmenter and of class-wise alignment; defaults are the authors'."""

    labels: str = setting(
        "soft",
        "domain labels: softmax of the segmenter (soft), or one class only (binary, a control)",
        choices=("soft", "binary"),
    )
    temperature: float = setting(1.8, "temperature of the soft labels", low=0.1, high=100)
    clip: float = setting(0.9, "largest value of a soft label", low=0.01, high=1)
    lambda_adv: float = setting(1e-3, "weight of feature alignment", low=0, high=10)
    depth: int = setting(
        0,
        "decoder levels between the aligned map and the output; 0 aligns the last layer's input",
        low=0,
        high=8,
    )
    width_discriminator: int = setting(
        512, "channels after the discriminator's first convolution", low=4, high=1024
    )
    lr_d: float = setting(1e-4, "learning rate of the discriminator", low=1e-6, high=1e-1, log=True)


class FADA(SourceOnly):
    """Align features class by class with a discriminator that has 2K outputs per pixel.

    Wang et al., *Classes Matter: A Fine-grained Adversarial Approach to Cross-domain Semantic
    Segmentation*, ECCV 2020 (`JDAI-CV/FADA`). f is the input of the segmenter's last layer and z
    its logits. The discriminator D classifies each pixel into one of K source and K target classes.
    Its labels are a = min(softmax(z / 1.8), 0.9), without gradient and, as published, not rescaled
    to a sum of 1. With the log softmax over all 2K outputs, the segmenter minimises

        L_seg(source) + λ · mean -Σ_k a_k log D(source, k | f_t),

    whose second term reaches f but not the last layer. D minimises

        ½ mean -Σ_k a_k log D(source, k | f_s) + ½ mean -Σ_k a_k log D(target, k | f_t)

    on the same features, detached. D is three 3×3 convolutions, upsampled bilinearly. With
    `labels=binary`, D has one output per domain and the labels are 1.

    The authors initialise from a source-only training and add self-distillation afterwards; here
    both are omitted, so that the segmenter gets as many updates as in every method. Their code also
    divides the logits in L_seg by the temperature. As in `ada_output`, L_seg has a Dice term.
    """

    name = "fada"
    reference = "Wang et al., ECCV 2020 (FADA)"
    needs = "source images and labels, target images"
    uses_target = True
    Config = FADAConfig
    presets = {
        "quick": {"width_discriminator": 32, "lr_d": 1e-3},
        "paper": {"optimizer": "sgd", "lr": 2.5e-4, "weight_decay": 5e-4},
    }

    def __init__(self, task: TaskInfo, config: FADAConfig) -> None:
        super().__init__(task, config)
        channels = self.segmenter.feature_channels
        if config.depth >= len(channels):
            raise ConfigError(
                f"method.depth = {config.depth} exceeds the segmenter's depth; set at most "
                f"{len(channels) - 1}, or a deeper segmenter."
            )
        outputs = task.classes if config.labels == "soft" else 1
        self.discriminator = ClassDiscriminator(
            channels[-1 - config.depth], outputs, config.width_discriminator
        )

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return FADA and its control with a discriminator that does not know classes."""
        return {"FADA": {}, "not by class": {"labels": "binary"}}

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Return the adjustments of the base class, and settings without effect."""
        cfg = self.config
        idle: dict[str, str] = {}
        if cfg.labels == "binary":
            idle |= dict.fromkeys(("temperature", "clip"), "labels is binary")
        if cfg.lambda_adv == 0:
            names = ("labels", "temperature", "clip", "depth")
            idle |= dict.fromkeys(names, "lambda_adv is 0")
        return {**super().check(cases), **idle_settings(cfg, idle)}

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the segmenter's optimizer and Adam with betas (0.9, 0.99)."""
        discriminator = Adam(
            self.discriminator.parameters(), self.config.lr_d, (0.9, 0.99), fused=True
        )
        return {**super().optimizers(), "discriminator": discriminator}

    def soft_labels(self, logits: Tensor) -> Tensor:
        """Return the labels a of each pixel without gradient, (N, K, H, W) → (N, K, H, W).

        Binary labels are ones, (N, 1, H, W).
        """
        if self.config.labels == "binary":
            return torch.ones_like(logits[:, :1], dtype=torch.float32)
        scaled = precise(logits.detach()) / self.config.temperature
        return scaled.softmax(1).clamp(max=self.config.clip)

    def scores(self, segmented: Segmented, detach: bool = False) -> Tensor:
        """Return the discriminator's full-size scores, (N, 2K, H, W)."""
        features = segmented.features[-1 - self.config.depth]
        scores = self.discriminator(features.detach() if detach else features)
        size = segmented.logits.shape[-2:]
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=True)

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter, then the discriminator on the same features."""
        source, target = self.segmenter(batch.source_images), self.segmenter(batch.target)
        labels_s, labels_t = self.soft_labels(source.logits), self.soft_labels(target.logits)
        segmentation = segmentation_loss(source.logits, batch.source_labels)
        with frozen(self.discriminator):
            align = domain_loss(self.scores(target), labels_t, SOURCE)
        context.update("segmenter", segmentation + self.config.lambda_adv * align)
        scores_s, scores_t = self.scores(source, detach=True), self.scores(target, detach=True)
        loss = 0.5 * domain_loss(scores_s, labels_s, SOURCE)
        loss = loss + 0.5 * domain_loss(scores_t, labels_t, TARGET)
        context.update("discriminator", loss)
        return {
            "segmentation": segmentation,
            "align": align,
            "d": loss,
            "d_source": target_probability(scores_s.detach()).mean(),
            "d_target": target_probability(scores_t.detach()).mean(),
        }

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return D's probability of "target" at each pixel of target images."""
        return {"D (target)": target_probability(self.scores(self.segmenter(batch.target)))}


class ClassDiscriminator(nn.Sequential):
    """Discriminator of the positions of a feature map, (N, C, h, w) → (N, 2K, h, w).

    Three 3×3 convolutions C → width → width / 2 → 2K with LeakyReLU and without norm. The first K
    outputs are source classes, the others target classes.

    Args:
        inputs: channels C of the map.
        classes: number of classes K.
        width: channels after the first convolution; 512 in the paper, for 2048 channels.
    """

    def __init__(self, inputs: int, classes: int, width: int = 512) -> None:
        channels = [inputs, width, width // 2]
        last = nn.Conv2d(channels[-1], 2 * classes, 3, padding=1)
        super().__init__(*conv_chain(channels, 3, 1), last)


def domain_loss(scores: Tensor, labels: Tensor, domain: int) -> Tensor:
    """Compute the cross-entropy with labels in the half of a domain, averaged over pixels.

    Args:
        scores: (N, 2K, H, W), source classes first.
        labels: (N, K, H, W), of classes; 0 for all classes of the other domain.
        domain: SOURCE or TARGET.
    """
    halves = precise(scores).log_softmax(1).chunk(2, dim=1)
    return -(labels * halves[domain]).sum(1).mean()


def target_probability(scores: Tensor) -> Tensor:
    """Return the probability of all target classes, (N, 2K, H, W) → (N, 1, H, W)."""
    return precise(scores).softmax(1).chunk(2, dim=1)[TARGET].sum(1, keepdim=True)
