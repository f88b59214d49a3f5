"""Local alignment of target features, Step B of GLUA; a component of `local_only` and `glua`.

Re-implementation of the authors' published code (`kiwi12138/GLUA`), checked against its numbers.
f is the encoder's last map and p the softmax output. Discriminator D1 scores each position of f,
discriminator D2 patches of p; source → 0, target → 1 (least squares). Before the decoder, target
features are multiplied by a gain, in training and in prediction; source features are not:

    f̂_t = f_t · (1 + |tanh D1(f_t)|).

On one batch of each domain, the segmenter minimises

    ½ CE(p_s, y_s) + ½ Dice(p_s, y_s) + λ1 · mean D1(f_t)² + λ2 · mean D2(p_t)².

D1 and D2 then minimise mean D(source)² + mean (D(target) - 1)² on the same outputs, detached.
D1 always reads f without the gain. The gradient of the λ2 term also passes through the gain.

Not from the authors: the other forms of the gain, the masks of D1's loss, and the handling of a
U-Net's skips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.augment import sent
from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import lsgan_loss, precise
from glua_bench.method import Adjustment, Batch, Context, Role, TaskInfo, frozen
from glua_bench.methods.components.idle_settings import idle_settings
from glua_bench.networks import FeatureDiscriminator, OutputDiscriminator, Segmented, Segmenter

SOURCE, TARGET = 0.0, 1.0  # the discriminators' labels
CHANCE = 1.4621171572600098  # 1 + tanh(½): the gain where D1 is at chance

# Form of the gain → function from D1's scores to the gain, of the same shape.
GAINS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda scores: 1 + scores.tanh().abs(),
    "detached": lambda scores: 1 + scores.detach().tanh().abs(),
    "constant": lambda scores: torch.full_like(scores, CHANCE),
    "none": torch.ones_like,
}
MASKS = ("none", "topk", "soft", "random")


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of the alignment; defaults are the authors' where they have the setting."""

    gain: str = setting(
        "tanh",
        "gain on target features: 1 + |tanh D1| (tanh), the same without gradient (detached), "
        "1.46 everywhere (constant, a control), or none",
        choices=tuple(GAINS),
    )
    gain_at: str = setting(
        "end",
        "maps that the gain multiplies: the encoder's last map (end), or also the skips",
        choices=("end", "skips"),
    )
    lambda_feature: float = setting(
        0.01, "weight of feature alignment (D1)", low=0, high=10, log=True
    )
    lambda_output: float = setting(
        0.01, "weight of output alignment (D2)", low=0, high=10, log=True
    )
    mask: str = setting(
        "none",
        "mask of D1's loss for the segmenter: none, the positions with the largest gap (topk), "
        "weights by gap (soft), or random positions (random, a control)",
        choices=MASKS,
    )
    mask_ratio: float = setting(
        0.3, "fraction of positions kept by the masks topk and random", low=0.01, high=1.0
    )
    lr_d: float = setting(
        1e-4, "learning rate of both discriminators", low=1e-6, high=1e-1, log=True
    )
    width_discriminator: int = setting(64, "channels after D2's first convolution", low=4, high=256)


# A narrow D2 and a learning rate at which both discriminators learn within the quick budget.
QUICK_ALIGNMENT = {"width_discriminator": 16, "lr_d": 1e-3}
# The authors' SGD, for the preset `paper`.
PAPER_ALIGNMENT = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4}


def without_effect(config: AlignmentConfig) -> dict[str, Adjustment]:
    """Return the settings that differ from their defaults and that other settings disable."""
    disabled: dict[str, str] = {}
    if config.mask in ("none", "soft"):
        disabled["mask_ratio"] = f"it needs mask = topk or random, and mask is {config.mask}"
    if config.gain == "none":
        disabled["gain_at"] = "gain is none"
    return idle_settings(config, disabled)


def gap_map(scores: Tensor) -> Tensor:
    """Return D1's confidence in "target" at each position of a target map, in [0, 1].

    g = clamp(2 D1 - 1, 0, 1) is 0 where D1 is at chance (½) or predicts source, and 1 where it is
    certain. Not from the authors.

    Args:
        scores: D1 on target features, (N, 1, h, w).
    """
    return (2 * scores - 1).clamp(0, 1)


def local_mask(scores: Tensor, form: str, ratio: float) -> Tensor:
    """Return weights for D1's loss, (N, 1, h, w). The authors weight all positions equally.

    Args:
        scores: D1 on target features, (N, 1, h, w); higher means a larger gap.
        form: "topk" keeps the fraction `ratio` of positions with the largest gap in each image,
            "random" the same fraction at random positions, "none" all; "soft" weights by 1 + g.
        ratio: fraction in (0, 1].
    """
    if form == "none":
        return torch.ones_like(scores)
    if form == "soft":
        return 1 + gap_map(scores)
    # "random" ranks by noise, "topk" by the gap; unclamped scores break ties.
    order = scores if form == "topk" else sent(torch.rand(scores.shape), scores)
    flat = order.flatten(1)
    keep = max(1, round(ratio * flat.shape[1]))
    mask = torch.zeros_like(flat).scatter_(1, flat.topk(keep, dim=1).indices, 1.0)
    return mask.view_as(scores)


class Aligned(NamedTuple):
    """Outputs of a pass through the segmenter that the alignment needs.

    Attributes:
        segmented: logits and decoder maps, with the gain applied.
        features: f, the encoder's last map without gain, (N, C, h, w).
        scores: D1(f), (N, 1, h, w); None for source images.
        gain: the gain of f, (N, 1, h, w); None for source images.
    """

    segmented: Segmented
    features: Tensor
    scores: Tensor | None = None
    gain: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """Softmax output p, (N, K, H, W)."""
        return precise(self.segmented.logits).softmax(1)


class LocalAlignment(nn.Module):
    """Discriminators, gain and update step of the local alignment.

    Args:
        task: the task.
        config: the settings.
        segmenter: the segmenter whose features are aligned.

    Raises:
        ConfigError: the segmenter has no encoder.
    """

    def __init__(self, task: TaskInfo, config: AlignmentConfig, segmenter: nn.Module) -> None:
        super().__init__()
        if not isinstance(segmenter, Segmenter):
            raise ConfigError(
                f"segmenter.name = '{task.segmenter.name}' has no encoder output for GLUA's gain; "
                "use unet, timm:<encoder> or deeplab."
            )
        self.config = config
        self.feature = FeatureDiscriminator(segmenter.encoder_channels[-1])  # D1
        self.output = OutputDiscriminator(task.classes, config.width_discriminator)  # D2

    def optimizer(self) -> Optimizer:
        """Return Adam with betas (0.9, 0.99) for both discriminators."""
        return Adam(self.parameters(), self.config.lr_d, (0.9, 0.99), fused=True)

    def segment(self, segmenter: Segmenter, images: Tensor, domain: Role) -> Aligned:
        """Pass images (N, S, H, W) of one domain through the segmenter."""
        *skips, features = segmenter.encode(images)
        size = images.shape[-2:]
        if domain == "source":
            return Aligned(segmenter.decode([*skips, features], size), features)
        scores = self.feature(features)
        gain = GAINS[self.config.gain](scores)
        if self.config.gain_at == "skips":
            skips = [
                skip * F.interpolate(gain, size=skip.shape[-2:], mode="bilinear") for skip in skips
            ]
        segmented = segmenter.decode([*skips, features * gain], size)
        return Aligned(segmented, features, scores, gain)

    def step(
        self,
        segmenter: Segmenter,
        batch: Batch,
        context: Context,
        segmentation_loss: Callable[[Tensor, Tensor], Tensor],
        more: Callable[[], tuple[Tensor, dict[str, Tensor]]] | None = None,
    ) -> dict[str, Tensor]:
        """Update the segmenter on both domains, then both discriminators.

        Args:
            segmenter: the segmenter; its optimizer is "segmenter", this module's is "alignment".
            batch: images of both domains.
            context: the step's context.
            segmentation_loss: function of logits and labels.
            more: returns a further loss of the segmenter and the scalars to log.
        """
        context.optimizers["segmenter"].zero_grad(set_to_none=True)
        source = self.segment(segmenter, batch.source_images, "source")
        segmentation = segmentation_loss(source.segmented.logits, batch.source_labels)
        context.backward(segmentation)
        with frozen(self):
            target = self.segment(segmenter, batch.target, "target")
            loss, logs = self.loss(target)
            context.backward(loss)
            if more is not None:
                further, further_logs = more()
                context.backward(further)
                logs.update(further_logs)
        context.apply("segmenter")
        return {"segmentation": segmentation, **logs, **self.update(source, target, context)}

    def loss(self, target: Aligned) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the segmenter's loss on target images and the scalars to log."""
        cfg, scores, gain = self.config, target.scores, target.gain
        assert scores is not None and gain is not None
        mask = local_mask(scores.detach(), cfg.mask, cfg.mask_ratio)
        feature = lsgan_loss(scores, SOURCE, mask)
        output = lsgan_loss(self.output(target.output), SOURCE)
        gain = gain.detach().float()
        return cfg.lambda_feature * feature + cfg.lambda_output * output, {
            "align_feature": feature,
            "align_output": output,
            "gain_mean": gain.mean(),
            "gain_sd": gain.std(),
            "gain_min": gain.min(),
            "gain_max": gain.max(),
        }

    def update(self, source: Aligned, target: Aligned, context: Context) -> dict[str, Tensor]:
        """Update D1 and D2 on the outputs of a step, detached.

        Returns:
            Their losses, and D1's mean score per domain (source → 0, target → 1; ½ is chance).
        """
        d1_source, d1_target = (self.feature(x.features.detach()) for x in (source, target))
        feature = lsgan_loss(d1_source, SOURCE) + lsgan_loss(d1_target, TARGET)
        output = lsgan_loss(self.output(source.output.detach()), SOURCE)
        output = output + lsgan_loss(self.output(target.output.detach()), TARGET)
        context.update("alignment", feature + output)
        return {
            "d_feature": feature,
            "d_output": output,
            "d1_source": d1_source.mean(),
            "d1_target": d1_target.mean(),
        }

    @torch.no_grad()
    def pictures(self, segmenter: Segmenter, images: Tensor) -> dict[str, Tensor]:
        """Return the gain minus 1 on target images, and the mask if any, (N, 1, H, W)."""
        target = self.segment(segmenter, images, "target")
        assert target.scores is not None and target.gain is not None
        maps = {"gain minus 1": target.gain - 1}  # maps are in [0, 1]
        if self.config.mask != "none":
            mask = local_mask(target.scores, self.config.mask, self.config.mask_ratio)
            maps["mask"] = mask / mask.amax()
        return {name: F.interpolate(m.float(), size=images.shape[-2:]) for name, m in maps.items()}
