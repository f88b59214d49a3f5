"""The local part: masked adversarial alignment of features, a component of `local_only` and `glua`.

A discriminator D scores each location of a decoder map of the segmenter, source → 1 and
target → 0 (least squares). From D follows the gap map, from the gap map the local feature
mask M, and the segmenter is moved so that D takes target features for source ones:

    L_align = λ_global · mean (D(f_t) - 1)²  +  λ_local · Σ M (D(f_t) - 1)² / Σ M

Reconstruction: the paper (arXiv 2205.11888) is the source of the idea, that discriminative
features with the larger gap come first. The form of D (DAR-UNet's unused `feat_Dis`), of the
gap and of M is ours. So is where M acts: on D's loss map and not on its input, since a D that
reads features cut out by its own choice is rewarded for agreeing with that choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.losses import lsgan_loss
from glua_bench.method import Context, TaskInfo, frozen
from glua_bench.networks import FeatureDiscriminator, Segmented

MASKS = ("topk", "soft", "random", "none")


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of the alignment."""

    mask: str = setting(
        "topk",
        "locations that the local loss counts: largest gap, all weighted by gap, "
        "random ones (control), or all",
        choices=MASKS,
    )
    mask_ratio: float = setting(0.3, "share of locations that a mask keeps", low=0.01, high=1.0)
    lambda_global: float = setting(
        0.01, "weight of the unmasked alignment", low=0, high=10, log=True
    )
    lambda_local: float = setting(0.01, "weight of the masked alignment", low=0, high=10, log=True)
    align_level: int = setting(2, "which decoder map is aligned, 0 = coarsest", low=0, high=8)
    align_lr: float = setting(
        2e-4, "learning rate of the feature discriminator", low=1e-6, high=1e-1, log=True
    )
    align_width: float = setting(
        1.0, "width of the feature discriminator, 1 = 128-64-32", low=0.05, high=4
    )


# A narrow D; and a weight at which so short a training was not disturbed, on a phantom cohort of
# another seed than the reported (0.1 cost up to half of the Dice there).
QUICK_ALIGNMENT = {"align_width": 0.25, "align_lr": 1e-3, "lambda_local": 0.003}


def gap_map(scores: Tensor) -> Tensor:
    """How well D tells the domain of *target* features at each location, in [0, 1].

    g = clamp(1 - 2 D, 0, 1): 1 where D is sure of "target" (D = 0), 0 where D cannot tell
    (0.5) or is wrong. |tanh(D)| would be large for source-looking places instead, and
    |D - 0.5| would also mark the places where a target feature already passes for source,
    which are the ones that need no further alignment.

    Args:
        scores: D's output for target features, (N, 1, h, w).
    """
    return (1 - 2 * scores).clamp(0, 1)


def local_mask(scores: Tensor, form: str, ratio: float) -> Tensor:
    """The local feature mask M of target features, (N, 1, h, w).

    Args:
        scores: D's output, (N, 1, h, w); lower means a larger gap.
        form: "topk" keeps the share `ratio` of locations with the largest gap in each image,
            "random" the same share at random places, "none" all; "soft" weighs all by
            1 + g (residual re-weighting).
        ratio: share in (0, 1].
    """
    if form == "none":
        return torch.ones_like(scores)
    if form == "soft":
        return 1 + gap_map(scores)
    # "random" ranks by noise where "topk" ranks by the gap; the unclamped scores break ties.
    order = -scores if form == "topk" else torch.rand(scores.shape).to(scores)
    flat = order.flatten(1)
    keep = max(1, round(ratio * flat.shape[1]))
    mask = torch.zeros_like(flat).scatter_(1, flat.topk(keep, dim=1).indices, 1.0)
    return mask.view_as(scores)


class LocalAlignment(nn.Module):
    """The feature discriminator, its losses, and the mask."""

    def __init__(self, task: TaskInfo, config: AlignmentConfig, channels: list[int]) -> None:
        super().__init__()
        self.config = config
        # The last map is at full resolution; beyond it there is nothing to choose.
        self.level = min(config.align_level, len(channels) - 1)
        self.discriminator = FeatureDiscriminator(channels[self.level], config.align_width)

    def optimizer(self) -> Optimizer:
        """Adam with betas (0.5, 0.99)."""
        return Adam(self.discriminator.parameters(), self.config.align_lr, (0.5, 0.99), fused=True)

    def loss(self, target: Segmented) -> tuple[Tensor, dict[str, Tensor]]:
        """What the segmenter minimises on target images, and what to log of it."""
        with frozen(self.discriminator):
            scores = self.discriminator(target.features[self.level])
        mask = local_mask(scores.detach(), self.config.mask, self.config.mask_ratio)
        unmasked, masked = lsgan_loss(scores, 1), lsgan_loss(scores, 1, mask)
        loss = self.config.lambda_global * unmasked + self.config.lambda_local * masked
        return loss, {
            "align": unmasked,
            "align_masked": masked,
            "gap": gap_map(scores.detach()).mean(),
        }

    def update(self, source: Segmented, target: Segmented, context: Context) -> dict[str, Tensor]:
        """One update of D on all locations: source → 1, target → 0.

        Returns:
            What to log: D's loss, and the share of locations whose domain D tells right
            (0.5 is chance; near 1 D wins everywhere and alignment does nothing).
        """
        real = self.discriminator(source.features[self.level].detach())
        fake = self.discriminator(target.features[self.level].detach())
        loss = lsgan_loss(real, 1) + lsgan_loss(fake, 0)
        context.update("alignment", loss)
        told = ((real > 0.5).float().mean() + (fake < 0.5).float().mean()) / 2
        return {"discriminator": loss, "told": told}

    @torch.no_grad()
    def pictures(self, target: Segmented, size: int) -> dict[str, Tensor]:
        """Gap map and mask, enlarged to the image: name → (N, 1, H, W) in [0, 1]."""
        scores = self.discriminator(target.features[self.level])
        mask = local_mask(scores, self.config.mask, self.config.mask_ratio)
        if self.config.mask == "soft":
            mask = mask - 1
        enlarge = nn.Upsample(size=(size, size), mode="nearest")
        return {"gap": enlarge(gap_map(scores).float()), "mask": enlarge(mask.float())}
