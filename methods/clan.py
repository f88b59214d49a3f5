"""Output alignment weighted by the disagreement of two classifiers: CLAN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.losses import precise, segmentation_loss
from glua_bench.method import Adjustment, Batch, Cases, Context, Role, TaskInfo, frozen
from glua_bench.methods.ada_output import SOURCE, TARGET, check_size
from glua_bench.methods.components.idle_settings import idle_settings
from glua_bench.methods.source_only import SegmentConfig, SourceOnly, segmenter_optimizer
from glua_bench.networks import OutputDiscriminator, build_segmenter


@dataclass(frozen=True)
class CLANConfig(SegmentConfig):
    """Settings of the segmenter and of weighted output alignment; defaults are the authors'."""

    lambda_adv: float = setting(1e-3, "weight of output alignment", low=0, high=10)
    lambda_local: float = setting(
        40.0,
        "weight of the classifiers' disagreement at a pixel (the authors: 40 or 10)",
        low=0,
        high=1000,
    )
    epsilon: float = setting(0.4, "weight of a pixel without disagreement", low=0, high=10)
    lambda_weight: float = setting(
        0.01, "weight of the cosine between the classifiers' weights", low=0, high=10
    )
    preheat: float = setting(
        0.05, "fraction of the updates before pixels are weighted", low=0, high=1
    )
    width_discriminator: int = setting(
        64, "channels after the discriminator's first convolution", low=4, high=256
    )
    lr_d: float = setting(1e-4, "learning rate of the discriminator", low=1e-6, high=1e-1, log=True)


class Pair(NamedTuple):
    """Full-size logits of both classifiers, (N, K, H, W) each."""

    first: Tensor
    second: Tensor

    @property
    def logits(self) -> Tensor:
        """Logits of the ensemble: the sum."""
        return self.first + self.second

    @property
    def output(self) -> Tensor:
        """Softmax output of the ensemble, (N, K, H, W)."""
        return precise(self.logits).softmax(1)

    @property
    def disagreement(self) -> Tensor:
        """1 - cos of both softmax outputs at each pixel, (N, 1, H, W) in [0, 1]."""
        first, second = (precise(logits).softmax(1) for logits in (self.first, self.second))
        return 1 - F.cosine_similarity(first, second, dim=1).unsqueeze(1)


class CLAN(SourceOnly):
    """Align outputs most where two classifiers with different weights disagree.

    Luo et al., *Taking a Closer Look at Domain Shift: Category-level Adversaries for Semantics
    Consistent Domain Adaptation*, CVPR 2019 (`RoyalVane/CLAN`). Two last layers with weights w1, w2
    read the same features; z1 and z2 are their logits, p1 and p2 their softmax outputs. The
    ensemble P = softmax(z1 + z2) predicts and is the input of the discriminator D, with source = 0
    and target = 1, upsampled bilinearly to pixels. With L binary cross-entropy on logits at each
    pixel and t the finished fraction of the training, the segmenter minimises

        L_seg(z1_s) + L_seg(z2_s) + (1 - t) (λ_weight cos(w1, w2) + λ_adv mean m L(D(P_t), 0)),
        m = ε + λ_local (1 - cos(p1_t, p2_t)),

    and D minimises mean L(D(P_s), 0) + mean m L(D(P_t), 1) on the same outputs, detached. As in the
    published code, the segmenter's gradient also passes through m, m is 1 during the first 5 % of
    the updates (`preheat`), and 1 - t damps both terms. The code doubles λ_weight, uses a focal
    loss for L_seg and raises the learning rates during these first updates; here λ_weight is that
    of the paper, L_seg that of `ada_output`, and rates follow the shared schedule.
    """

    name = "clan"
    reference = "Luo et al., CVPR 2019 (CLAN)"
    needs = "source images and labels, target images"
    uses_target = True
    Config = CLANConfig
    presets = {
        "quick": {"width_discriminator": 16, "lr_d": 1e-3},
        "paper": {"optimizer": "sgd", "lr": 2.5e-4, "weight_decay": 5e-4},
    }

    def __init__(self, task: TaskInfo, config: CLANConfig) -> None:
        super().__init__(task, config)
        check_size(self.name, task)
        # A copy of the first classifier would get its gradients and never differ from it.
        self.aux_head = build_segmenter(task.segmenter, task.classes, task.inputs).head
        self.discriminator = OutputDiscriminator(task.classes, config.width_discriminator)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return CLAN and its control with equal weights of all pixels."""
        equal = {"lambda_local": 0.0, "epsilon": 1.0}
        return {"CLAN": {}, "pixels weighted equally": equal}

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Return the adjustments of the base class, and settings without effect."""
        cfg = self.config
        idle: dict[str, str] = {}
        if cfg.lambda_local == 0 and cfg.epsilon == 1:
            idle["preheat"] = "all pixels have the weight 1"
        if cfg.preheat == 1:
            idle |= dict.fromkeys(("lambda_local", "epsilon"), "preheat is 1")
        if cfg.lambda_adv == 0:
            idle |= dict.fromkeys(("lambda_local", "epsilon", "preheat"), "lambda_adv is 0")
        return {**super().check(cases), **idle_settings(cfg, idle)}

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the segmenter's optimizer and Adam with betas (0.9, 0.99)."""
        discriminator = Adam(
            self.discriminator.parameters(), self.config.lr_d, (0.9, 0.99), fused=True
        )
        segmenter = segmenter_optimizer(self.segmenter, self.config, (self.aux_head,))
        return {"segmenter": segmenter, "discriminator": discriminator}

    def outputs(self, images: Tensor) -> Pair:
        """Return the logits of both classifiers for images (N, C·S, H, W)."""
        segmented = self.segmenter(images)
        second = self.aux_head(segmented.features[-1])
        size = images.shape[-2:]
        second = F.interpolate(second, size=size, mode="bilinear", align_corners=True)
        return Pair(segmented.logits, second)

    def weights(self, disagreement: Tensor, progress: float) -> Tensor:
        """Return the weights m of pixels with the given disagreement, of the same shape."""
        if progress < self.config.preheat:
            return torch.ones_like(disagreement)
        return self.config.epsilon + self.config.lambda_local * disagreement

    def cosine(self) -> Tensor:
        """Return the cosine between the trained weights of both classifiers, a scalar."""
        first, second = (
            torch.cat([p.flatten() for p in head.parameters() if p.requires_grad])
            for head in (self.segmenter.head, self.aux_head)
        )
        return F.cosine_similarity(first, second, dim=0)

    def adversarial(self, output: Tensor, label: float, weights: Tensor | float = 1.0) -> Tensor:
        """Return the mean of m L(D(P), label) over pixels, a scalar.

        Args:
            output: P, (N, K, H, W).
            label: SOURCE or TARGET.
            weights: m, (N, 1, H, W) or 1.
        """
        size = output.shape[-2:]
        scores = precise(self.discriminator(output))
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=True)
        wanted = torch.full_like(scores, label)
        # The argument `weight` of this function takes no weights with a gradient.
        losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        return (weights * losses).mean()

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter with both classifiers, then the discriminator."""
        cfg, damping = self.config, 1 - context.progress
        source, target = self.outputs(batch.source_images), self.outputs(batch.target)
        first, second = (segmentation_loss(logits, batch.source_labels) for logits in source)
        disagreement, cosine = target.disagreement, self.cosine()
        weights = self.weights(disagreement, context.progress)
        with frozen(self.discriminator):
            align = self.adversarial(target.output, SOURCE, weights)
        adapt = cfg.lambda_weight * cosine + cfg.lambda_adv * align
        context.update("segmenter", first + second + damping * adapt)
        d = self.adversarial(source.output.detach(), SOURCE)
        d = d + self.adversarial(target.output.detach(), TARGET, weights.detach())
        context.update("discriminator", d)
        return {
            "segmentation": first,
            "segmentation_second": second,
            "align": align,
            "cosine": cosine,
            "disagreement": disagreement.mean(),
            "d": d,
        }

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return the ensemble's logits (N, K, H, W) for images of either domain."""
        return self.outputs(images).logits

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the disagreement of the classifiers on target images."""
        return {"disagreement": self.outputs(batch.target).disagreement}
