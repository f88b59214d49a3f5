"""Step B of GLUA: local alignment of target features, a component of `local_only` and `glua`.

Re-implementation after the authors' published code (`kiwi12138/GLUA`), checked against its numbers.
With f the map at the end of the encoder, and p the softmax output, a discriminator D1 scores each
place of f and a discriminator D2 patches of p, source → 0 and target → 1 (least squares). Target
features are multiplied by a gain before the decoder, in training and in prediction; those of the
source are not:

    f̂_t = f_t · (1 + |tanh D1(f_t)|).

The segmenter minimises, on one batch of each domain,

    ½ CE(p_s, y_s) + ½ Dice(p_s, y_s) + λ1 · mean D1(f_t)² + λ2 · mean D2(p_t)²,

and then D1 and D2 minimise mean D(source)² + mean (D(target) - 1)² on the same outputs, detached.
D1 reads f without the gain, in its loss and in the gain, and the gradient of λ2's term passes
through the gain too.

Ours are the other forms of the gain, the masks of D1's loss, which the authors do not have, and
what a U-Net needs: its skips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import lsgan_loss, precise
from glua_bench.method import Batch, Context, Role, TaskInfo, frozen
from glua_bench.networks import FeatureDiscriminator, OutputDiscriminator, Segmented, Segmenter

SOURCE, TARGET = 0.0, 1.0  # the discriminators' labels
CHANCE = 1.4621171572600098  # 1 + tanh(½): the gain where D1 cannot tell

# Form of the gain → the gain of D1's scores, of the same shape.
GAINS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda scores: 1 + scores.tanh().abs(),
    "detached": lambda scores: 1 + scores.detach().tanh().abs(),
    "constant": lambda scores: torch.full_like(scores, CHANCE),
    "none": torch.ones_like,
}
MASKS = ("none", "topk", "soft", "random")


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of the alignment; the defaults are the authors', where they have the setting."""

    gain: str = setting(
        "tanh",
        "of target features: 1 + |tanh D1|, the same without gradient, 1.46 everywhere (control), "
        "or none",
        choices=tuple(GAINS),
    )
    gain_at: str = setting(
        "end",
        "maps that carry the gain: the encoder's last one, or the skips too",
        choices=("end", "skips"),
    )
    lambda_feature: float = setting(
        0.01, "weight of the alignment of features (D1)", low=0, high=10, log=True
    )
    lambda_output: float = setting(
        0.01, "weight of the alignment of outputs (D2)", low=0, high=10, log=True
    )
    mask: str = setting(
        "none",
        "places that D1's loss counts for the segmenter: all, those with the largest gap, all "
        "weighted by their gap, or random ones (control)",
        choices=MASKS,
    )
    mask_ratio: float = setting(
        0.3, "share of places that the masks topk and random keep", low=0.01, high=1.0
    )
    lr_d: float = setting(
        1e-4, "learning rate of both discriminators", low=1e-6, high=1e-1, log=True
    )
    width_discriminator: int = setting(
        64, "channels after the first convolution of D2", low=4, high=256
    )


# A narrow D2 and a rate at which so short a training teaches both discriminators something.
QUICK_ALIGNMENT = {"width_discriminator": 16, "lr_d": 1e-3}
# The authors' SGD, for preset `paper`.
PAPER_ALIGNMENT = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4}


def gap_map(scores: Tensor) -> Tensor:
    """How sure D1 is of "target" at each place of a target map, in [0, 1].

    g = clamp(2 D1 - 1, 0, 1): 0 where D1 cannot tell (½) or takes the place for source, 1 where
    it is sure. Ours.

    Args:
        scores: D1 of target features, (N, 1, h, w).
    """
    return (2 * scores - 1).clamp(0, 1)


def local_mask(scores: Tensor, form: str, ratio: float) -> Tensor:
    """Weights of the places of D1's loss, (N, 1, h, w). Ours; the authors count all places alike.

    Args:
        scores: D1 of target features, (N, 1, h, w); higher means a larger gap.
        form: "topk" keeps the share `ratio` of places with the largest gap in each image,
            "random" the same share at random places, "none" all; "soft" weighs all by 1 + g.
        ratio: share in (0, 1].
    """
    if form == "none":
        return torch.ones_like(scores)
    if form == "soft":
        return 1 + gap_map(scores)
    # "random" ranks by noise where "topk" ranks by the gap; the unclamped scores break ties.
    order = scores if form == "topk" else torch.rand(scores.shape).to(scores)
    flat = order.flatten(1)
    keep = max(1, round(ratio * flat.shape[1]))
    mask = torch.zeros_like(flat).scatter_(1, flat.topk(keep, dim=1).indices, 1.0)
    return mask.view_as(scores)


class Aligned(NamedTuple):
    """What the alignment sees of a pass through the segmenter.

    Args:
        segmented: logits and decoder maps, behind the gain.
        features: f, the encoder's last map without gain, (N, C, h, w).
        scores: D1(f), (N, 1, h, w); None for source images, whose scores nothing needs.
        gain: the gain of f, (N, 1, h, w); None for source images.
    """

    segmented: Segmented
    features: Tensor
    scores: Tensor | None = None
    gain: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """p, the softmax of the logits, (N, K, H, W)."""
        return precise(self.segmented.logits).softmax(1)


class LocalAlignment(nn.Module):
    """Both discriminators, the gain, and the update of a step.

    Args:
        task: the task.
        config: the settings.
        segmenter: whose features are aligned.

    Raises:
        ConfigError: the segmenter has no end of an encoder.
    """

    def __init__(self, task: TaskInfo, config: AlignmentConfig, segmenter: nn.Module) -> None:
        super().__init__()
        if not isinstance(segmenter, Segmenter):
            raise ConfigError(
                f"segmenter.name = '{task.segmenter.name}' has no end of an encoder, where GLUA's "
                "gain acts; use unet, timm:<encoder> or deeplab."
            )
        self.config = config
        self.feature = FeatureDiscriminator(segmenter.encoder_channels[-1])  # D1
        self.output = OutputDiscriminator(task.classes, config.width_discriminator)  # D2

    def optimizer(self) -> Optimizer:
        """Adam with betas (0.9, 0.99) for both discriminators."""
        return Adam(self.parameters(), self.config.lr_d, (0.9, 0.99), fused=True)

    def see(self, segmenter: Segmenter, images: Tensor, domain: Role) -> Aligned:
        """Pass images of one domain through the segmenter, (N, S, H, W)."""
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
        """One update of the segmenter on both domains, then one of both discriminators.

        Args:
            segmenter: the segmenter; its optimizer is "segmenter", that of this module "alignment".
            batch: images of both domains.
            context: of the step.
            segmentation_loss: of logits and labels.
            more: a further loss of the segmenter, and what to log of it.
        """
        context.optimizers["segmenter"].zero_grad(set_to_none=True)
        source = self.see(segmenter, batch.source_images, "source")
        segmentation = segmentation_loss(source.segmented.logits, batch.source_labels)
        context.backward(segmentation)
        with frozen(self):
            target = self.see(segmenter, batch.target, "target")
            loss, logs = self.loss(target)
            context.backward(loss)
            if more is not None:
                further, further_logs = more()
                context.backward(further)
                logs.update(further_logs)
        context.apply("segmenter")
        return {"segmentation": segmentation, **logs, **self.update(source, target, context)}

    def loss(self, target: Aligned) -> tuple[Tensor, dict[str, Tensor]]:
        """What the segmenter minimises on target images, and what to log of it."""
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
        """One update of D1 and D2 on the outputs of a step, detached.

        Returns:
            Their losses, and where D1 stands: its mean scores of both domains (source → 0,
            target → 1; ½ is chance).
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
        """The gain less 1 on target images, and the mask where there is one, (N, 1, H, W)."""
        target = self.see(segmenter, images, "target")
        assert target.scores is not None and target.gain is not None
        maps = {"gain": target.gain - 1}
        if self.config.mask != "none":
            mask = local_mask(target.scores, self.config.mask, self.config.mask_ratio)
            maps["mask"] = mask / mask.amax()
        return {name: F.interpolate(m.float(), size=images.shape[-2:]) for name, m in maps.items()}
