"""Segmentation and adversarial losses.

Pixels labelled `UNANNOTATED` are excluded from the sums and means of segmentation losses, and their
logits get no gradient. Without such pixels, the mask is exactly 1 everywhere, so that values and
gradients equal those of the unmasked formulas bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.task import UNANNOTATED


def precise(x: Tensor) -> Tensor:
    """Convert half precision to single; single and double are unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def annotated(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of annotated pixels and labels without `UNANNOTATED`, for custom losses.

    Args:
        labels: (N, H, W), class indices or `UNANNOTATED`.

    Returns:
        boolean mask (N, H, W); and labels with `UNANNOTATED` replaced by background, valid for
        `gather` and `one_hot`.
    """
    seen = labels != UNANNOTATED
    return seen, labels * seen


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return a boolean map of each class, (N, H, W) → (N, K, H, W).

    `F.one_hot` waits for the device, and takes 8 bytes for each value.
    """
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device)[:, None, None]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy over annotated pixels; 0 if there are none.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    mean = F.cross_entropy(precise(logits), labels, ignore_index=UNANNOTATED)
    return torch.where((labels != UNANNOTATED).any(), mean, torch.zeros_like(mean))


def class_maps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute softmax and one-hot labels, both 0 at pixels that are not annotated.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.

    Returns:
        Probabilities and labels, both (N, K, H, W), at least in single precision.
    """
    seen, classes = annotated(labels)
    probabilities = precise(logits).softmax(1)
    reference = one_hot(classes, logits.shape[1]).to(probabilities)
    inside = seen.unsqueeze(1)
    return probabilities * inside, reference * inside


def dice_loss(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    r"""Compute the soft Dice loss, averaged over the foreground classes present in the labels.

    1 - 2 Σ p r / (Σ p + Σ r), with sums over the batch (Milletari et al., 3DV 2016, without squares
    in the denominator). Summing over the batch reduces the influence of slices without a structure;
    classes absent from the batch's labels are left to cross-entropy.

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
    """Compute the sum of Dice loss and cross-entropy.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    return dice_loss(logits, labels) + cross_entropy(logits, labels)


def squared_dice_loss(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    r"""Compute the soft Dice loss with squares in the denominator, averaged over all classes.

    1 - (2 Σ p r + s) / (Σ p² + Σ r² + s), with sums over the batch (Milletari et al., 3DV 2016).
    Background and classes absent from the labels are included; the loss of the latter is close
    to 1.

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
    """Compute ½ cross-entropy + ½ `squared_dice_loss`, the loss of GLUA's authors.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    return 0.5 * cross_entropy(logits, labels) + 0.5 * squared_dice_loss(logits, labels)


def self_information(logits: Tensor) -> Tensor:
    """Compute -p log p / log K for each class, (N, K, H, W); the sum over classes is at most 1."""
    logits = precise(logits)
    return -logits.softmax(1) * logits.log_softmax(1) / math.log(logits.shape[1])


def normalised_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of the softmax over log K: (N, K, H, W) → (N, 1, H, W) in [0, 1]."""
    return self_information(logits).sum(1, keepdim=True)


def lsgan_loss(
    scores: Tensor | Sequence[Tensor], target: float, mask: Tensor | None = None
) -> Tensor:
    """Compute the least-squares adversarial loss (Mao et al., ICCV 2017): mean (score - target)².

    Args:
        scores: a map of any shape, or one map per scale (their losses are averaged).
        target: 1 for "real" or "source", 0 for "fake" or "target".
        mask: weights for a weighted mean over locations; only for a single map.
    """
    if not isinstance(scores, Tensor):
        if mask is not None:
            raise TypeError("a mask needs a single map of scores")
        return torch.stack([lsgan_loss(score, target) for score in scores]).mean()
    squares = (precise(scores) - target).square()
    if mask is None:
        return squares.mean()
    mask = mask.to(squares).expand_as(squares)
    return (squares * mask).sum() / mask.sum().clamp(min=1)


def real_fake_loss(
    discriminator: Callable[[Tensor], Tensor | list[Tensor]], real: Tensor, fake: Tensor
) -> Tensor:
    """Compute a discriminator's least-squares loss (real → 1, fake → 0) in one forward pass.

    Only for discriminators without interaction between images of a batch (no batch norm).

    Args:
        discriminator: maps (N, ...) to scores, or to a list of scores.
        real: (N, ...).
        fake: (M, ...), detached from the generator.
    """
    scores = discriminator(torch.cat([real, fake]))
    maps = [scores] if isinstance(scores, Tensor) else scores
    count = len(real)
    return lsgan_loss([m[:count] for m in maps], 1) + lsgan_loss([m[count:] for m in maps], 0)
