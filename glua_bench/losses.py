"""Segmentation and adversarial losses.

Pixels whose label is `UNANNOTATED` enter no segmentation loss: neither its sums nor its means, and
their logits get no gradient. Where there are none, every factor below is exactly 1, so that values
and gradients are those of the plain formulas to the last bit, without asking the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.task import UNANNOTATED


def precise(x: Tensor) -> Tensor:
    """At least single precision, whatever the mixed precision gave; double stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def annotated(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where labels say something, and what they say, for losses of your own.

    Args:
        labels: (N, H, W), class indices or `UNANNOTATED`.

    Returns:
        boolean (N, H, W); and the labels with background in the place of `UNANNOTATED`, which
        `gather` and `one_hot` take.
    """
    seen = labels != UNANNOTATED
    return seen, labels * seen


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the annotated pixels; 0 where there is none.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    mean = F.cross_entropy(precise(logits), labels, ignore_index=UNANNOTATED)
    return torch.where((labels != UNANNOTATED).any(), mean, torch.zeros_like(mean))


def class_maps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and one-hot labels, both 0 at pixels that are not annotated.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.

    Returns:
        two of (N, K, H, W), at least in single precision.
    """
    seen, classes = annotated(labels)
    probabilities = precise(logits).softmax(1)
    reference = F.one_hot(classes, logits.shape[1]).permute(0, 3, 1, 2).to(probabilities)
    inside = seen.unsqueeze(1)
    return probabilities * inside, reference * inside


def dice_loss(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    r"""Soft Dice loss, mean over the foreground classes that the batch shows.

    1 - 2 Σ p r / (Σ p + Σ r), sums over the batch (Milletari et al., 3DV 2016, with
    plain sums in the denominator). Pooling the batch keeps slices without a structure from
    deciding its loss; a class that no label of the batch shows is left to cross-entropy.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
        smooth: added to numerator and denominator.

    Returns:
        A scalar in [0, 1].
    """
    probabilities, reference = (maps[:, 1:] for maps in class_maps(logits, labels))
    overlap = (probabilities * reference).sum((0, 2, 3))
    size = probabilities.sum((0, 2, 3)) + reference.sum((0, 2, 3))
    present = (reference.sum((0, 2, 3)) > 0).float()
    loss = 1 - (2 * overlap + smooth) / (size + smooth)
    return (loss * present).sum() / present.sum().clamp(min=1)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice + cross-entropy, equally weighted.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    return dice_loss(logits, labels) + cross_entropy(logits, labels)


def squared_dice_loss(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    r"""Soft Dice loss with squares in the denominator, mean over all classes.

    1 - (2 Σ p r + s) / (Σ p² + Σ r² + s), sums over the batch (Milletari et al., 3DV 2016). The
    background counts as a class, and so does a class that no label of the batch shows, whose loss
    is close to 1.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
        smooth: s, added to numerator and denominator.

    Returns:
        A scalar in [0, 1].
    """
    probabilities, reference = class_maps(logits, labels)
    overlap = (probabilities * reference).sum((0, 2, 3))
    size = (probabilities.square() + reference.square()).sum((0, 2, 3))
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def balanced_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """½ cross-entropy + ½ `squared_dice_loss`: the segmentation loss of GLUA's authors.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    return 0.5 * cross_entropy(logits, labels) + 0.5 * squared_dice_loss(logits, labels)


def self_information(logits: Tensor) -> Tensor:
    """-p log p / log K of each class: (N, K, H, W) → (N, K, H, W), with a sum of at most 1."""
    logits = precise(logits)
    return -logits.softmax(1) * logits.log_softmax(1) / math.log(logits.shape[1])


def normalised_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax divided by log K: (N, K, H, W) → (N, 1, H, W) in [0, 1]."""
    return self_information(logits).sum(1, keepdim=True)


def lsgan_loss(
    scores: Tensor | Sequence[Tensor], target: float, mask: Tensor | None = None
) -> Tensor:
    """Least-squares adversarial loss (Mao et al., ICCV 2017): mean (score - target)².

    Args:
        scores: a map of any shape, or one map a scale (their losses are averaged).
        target: 1 for "real" or "source", 0 for the other.
        mask: weights of the map's locations, for a single map; the mean counts them only.
    """
    if not isinstance(scores, Tensor):
        if mask is not None:
            raise TypeError("a mask fits one map of scores, not several")
        return torch.stack([lsgan_loss(score, target) for score in scores]).mean()
    squares = (precise(scores) - target).square()
    if mask is None:
        return squares.mean()
    mask = mask.to(squares).expand_as(squares)
    return (squares * mask).sum() / mask.sum().clamp(min=1)


def real_fake_loss(
    discriminator: Callable[[Tensor], Tensor | list[Tensor]], real: Tensor, fake: Tensor
) -> Tensor:
    """A discriminator's least-squares loss, real towards 1 and fake towards 0, in one pass.

    Only for discriminators that keep the images of a batch apart (instance norm or none).

    Args:
        discriminator: maps (N, ...) to scores, or to a list of scores.
        real: (N, ...).
        fake: (M, ...), detached from what made it.
    """
    scores = discriminator(torch.cat([real, fake]))
    maps = [scores] if isinstance(scores, Tensor) else scores
    count = len(real)
    return lsgan_loss([m[:count] for m in maps], 1) + lsgan_loss([m[count:] for m in maps], 0)
