"""Masked image consistency; a component of `mic` and `translate_and_mask`.

The student sees target images with hidden square blocks and learns the teacher's classes of the
whole images, so that it must infer the hidden parts from their context:

    L_mask = mean over images of q · CE(S(M ⊙ x_t), ŷ),   ŷ = argmax T(x_t),

with the teacher T (`teacher.py`), a random block mask M, and q, the fraction of the image's pixels
where T is more confident than τ. Hidden pixels are 0, the middle of [-1, 1].

Hoyer, Dai, Wang and Van Gool, *MIC: Masked Image Consistency for Context-Enhanced Domain
Adaptation*, CVPR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.augment import sent
from glua_bench.config import setting
from glua_bench.losses import precise
from glua_bench.method import Adjustment
from glua_bench.methods.components.idle_settings import idle_settings
from glua_bench.methods.components.teacher import Teacher, TeacherConfig


@dataclass(frozen=True)
class MaskedConfig(TeacherConfig):
    """Settings of the teacher and of masked consistency; ratio, block and threshold as published.

    The published block of 64 pixels is 1/16 of the side of its images of 1024 pixels.
    """

    lambda_consistency: float = setting(
        1.0, "weight of the masked consistency loss", low=0, high=100
    )
    confidence: float = setting(
        0.968,
        "probability above which a teacher's prediction counts in the weight of its image",
        low=0,
        high=1,
    )
    mask_ratio: float = setting(0.7, "fraction of hidden blocks", low=0, high=1)
    mask_block: float = setting(
        0.0625, "side of a block as a fraction of the image's", low=0.001, high=1
    )


def without_effect(config: Any) -> Mapping[str, Adjustment]:
    """Return changed settings of masks and teacher that have no effect, for `Method.check`.

    Args:
        config: settings of a method, a `MaskedConfig`.
    """
    disabled: dict[str, str] = {}
    if config.mask_ratio == 0:
        disabled["mask_block"] = "mask_ratio is 0"
    if config.lambda_consistency == 0:
        names = ("confidence", "mask_ratio", "mask_block")
        disabled |= dict.fromkeys(names, "lambda_consistency is 0")
    return idle_settings(config, disabled)


def masked_loss(
    teacher: Teacher, student: Any, images: Tensor, shown: Tensor, config: MaskedConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted loss on target images and the scalars to log.

    Args:
        teacher: the teacher, which sees the whole images.
        student: the segmenter to train.
        images: (N, C, H, W).
        shown: what the student sees of them, (N, C, H, W).
        config: weight and threshold.
    """
    with torch.no_grad():
        whole = teacher.segmenter(images).logits
    loss, quality = masked_consistency(student(shown).logits, whole, config.confidence)
    # A teacher that finds only background teaches nothing else.
    found = (whole.argmax(1) > 0).float().mean()
    logs = {"consistency": loss, "quality": quality, "teacher_foreground": found}
    return config.lambda_consistency * loss, logs


def block_mask(images: Tensor, ratio: float, block: float) -> Tensor:
    """Draw which pixels each image shows, in square blocks from its upper left corner.

    Args:
        images: (N, C, H, W).
        ratio: probability of a block to be hidden.
        block: side of a block as a fraction of H; at least one pixel.

    Returns:
        1 where a pixel is shown, else 0, (N, 1, H, W).
    """
    height, width = images.shape[-2:]
    side = max(1, round(block * height))
    shown = torch.rand(len(images), 1, math.ceil(height / side), math.ceil(width / side)) >= ratio
    return sent(F.interpolate(shown.float(), scale_factor=side)[..., :height, :width], images)


def masked_consistency(
    student: Tensor, teacher: Tensor, confidence: float
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy towards a teacher's classes, weighted by its confidence.

    Args:
        student: logits of masked images, (N, K, H, W).
        teacher: logits of the whole images, (N, K, H, W); they pass no gradient.
        confidence: probability above which a pixel counts in its image's weight.

    Returns:
        The loss, and the mean weight, a fraction of pixels.
    """
    highest, classes = precise(teacher.detach()).softmax(1).max(1)
    quality = (highest > confidence).float().mean((1, 2))
    entropy = F.cross_entropy(precise(student), classes, reduction="none").mean((1, 2))
    return (quality * entropy).mean(), quality.mean()
