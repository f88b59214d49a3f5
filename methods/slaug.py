"""Single-source domain generalisation by location-scale augmentation: SLAug."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.augment import by_channel, sent
from glua_bench.config import setting
from glua_bench.losses import annotated, one_hot, segmentation_loss
from glua_bench.method import Batch, Context
from glua_bench.methods.source_only import SegmentConfig, SourceOnly

CURVE_POINTS = 256  # points at which a Bézier curve is evaluated
BACKGROUND = 0.01  # intensity in [0, 1] up to which local augmentation leaves pixels unchanged


@dataclass(frozen=True)
class SLAugConfig(SegmentConfig):
    """Settings of the segmenter and of saliency fusion; defaults are the authors'."""

    saliency_grid: int = setting(18, "cells per side of the saliency grid", low=1, high=128)


class SLAug(SourceOnly):
    """Augment images globally and per structure, fused by saliency; uses no target data.

    Su et al., *Rethinking Data Augmentation for Single-Source Domain Generalization in Medical
    Image Segmentation*, AAAI 2023 (`Kaiseem/SLAug`). The intensities of a region pass through a
    random cubic Bézier curve B between their extremes, then through σ · B(x) + μ, clipped, with σ
    from N(1, 0.1) in [0.9, 1.1] and μ from N(0, 0.5) within the bounds that the 20th and 80th
    percentiles leave. The global augmentation x_g applies one increasing curve to the whole image.
    The local augmentation x_l applies one curve per class, which decreases for the background and,
    with probability ½, for a structure. The saliency s is the magnitude of the gradient at x_g,
    averaged to a grid, smoothed by quadratic B-splines and scaled to [0, 1] in each image:

        x_f = s · x_g + (1 - s) · x_l,        L = L_seg(S(x_g), y) + L_seg(S(x_f), y).

    Both gradients make one update. The 18 grid cells are those of the authors' cardiac
    configurations. The splines are two box filters whose width is an odd number of pixels. Slices
    of a stack share curves and saliency; since only the middle slice has labels, they define the
    structures of all. Input channels have curves of their own and share the saliency.
    """

    name = "slaug"
    reference = "Su et al., AAAI 2023"
    needs = "source images and labels"
    uses_target = False
    Config = SLAugConfig

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update with two losses: on global images, and on images fused by the first gradient."""
        images, labels = batch.source_images, batch.source_labels
        whole = augment_globally(images, self.task.channels).requires_grad_()
        parts = augment_locally(images, labels, self.task.classes, self.task.channels)

        context.optimizers["segmenter"].zero_grad(set_to_none=True)
        loss_global = segmentation_loss(self.segmenter(whole).logits, labels)
        context.backward(loss_global)
        assert whole.grad is not None
        saliency = saliency_map(whole.grad, self.config.saliency_grid)
        fused = saliency * whole.detach() + (1 - saliency) * parts
        loss_fused = segmentation_loss(self.segmenter(fused).logits, labels)
        context.backward(loss_fused)
        context.apply("segmenter")
        return {"segmentation": loss_global, "segmentation_fused": loss_fused}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return both augmentations, the saliency, and the fused images."""
        images, labels = batch.source_images, batch.source_labels
        whole = augment_globally(images, self.task.channels).requires_grad_()
        with torch.enable_grad():
            loss = segmentation_loss(self.segmenter(whole).logits, labels)
        (gradient,) = torch.autograd.grad(loss, whole)
        saliency = saliency_map(gradient, self.config.saliency_grid)
        parts = augment_locally(images, labels, self.task.classes, self.task.channels)
        return {
            "global": whole.detach(),
            "local": parts,
            "saliency": saliency,
            "fused": saliency * whole.detach() + (1 - saliency) * parts,
        }


def augment_globally(images: Tensor, channels: int = 1) -> Tensor:
    """Map each channel of each image through one increasing curve, (N, C·S, H, W) in [-1, 1]."""
    apart = by_channel(images, channels)
    whole = torch.ones_like(apart[:, :1], dtype=torch.bool)
    return (2 * location_scale((apart + 1) / 2, whole, torch.zeros(1)) - 1).reshape(images.shape)


def augment_locally(images: Tensor, labels: Tensor, classes: int, channels: int = 1) -> Tensor:
    """Map each class in each channel through its own curve; keep the dark background.

    Args:
        images: (N, C·S, H, W) in [-1, 1].
        labels: (N, H, W), class indices; `UNANNOTATED` pixels change with the background.
        classes: K, including the background.
        channels: C, the number of input channels.
    """
    unit = (by_channel(images, channels) + 1) / 2
    labels = labels.repeat_interleave(channels, 0)
    regions = one_hot(annotated(labels)[1], classes)
    falling = torch.tensor([1.0] + [0.5] * (classes - 1))
    changed = location_scale(unit, regions, falling)
    return (2 * torch.where(unit <= BACKGROUND, unit, changed) - 1).reshape(images.shape)


def location_scale(images: Tensor, regions: Tensor, falling: Tensor) -> Tensor:
    """Apply σ · B(x) + μ, drawn for each region of each image.

    Args:
        images: (N, S, H, W) in [0, 1].
        regions: (N, R, H, W), boolean; each pixel in one region, the same in all slices.
        falling: (R,), probability that a region's curve decreases.

    Returns:
        (N, S, H, W) in [0, 1].
    """
    # P: pixels of all slices of an image. Shapes: (N, 1, P) and (N, R, P).
    values = images.flatten(1).unsqueeze(1)
    inside = regions.flatten(2).repeat(1, 1, images.shape[1])
    count, kinds = inside.shape[:2]
    low = torch.where(inside, values, 1.0).amin(2, keepdim=True)
    high = torch.where(inside, values, 0.0).amax(2, keepdim=True)
    high = torch.maximum(high, low)  # an absent class has no extremes
    falls = (torch.rand(count, kinds, 1) <= falling[:, None]).to(images.device, non_blocking=True)
    x, y = bezier_curves(count, kinds)
    x, y = (low + (high - low) * sent(curve, images) for curve in (x, y))
    # As in the authors' code, a decreasing curve is not sorted and need not be monotonic.
    y = torch.where(falls, y.flip(2), y.sort(2).values)
    curved = interpolate(values.expand_as(inside), x, y)

    scale = sent((1 + 0.1 * torch.randn(count, kinds, 1)).clamp(0.9, 1.1), images)
    shift = sent(0.5 * torch.randn(count, kinds, 1), images)
    least, most = -percentile(curved, inside, 0.2), 1 - percentile(curved, inside, 0.8)
    shift = torch.minimum(torch.maximum(shift, least), most)
    moved = (scale * curved + shift).clamp(0, 1)
    return (moved * inside).sum(1, keepdim=True).view_as(images)


def bezier_curves(count: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Draw curves from (0, 0) to (1, 1) with two uniform inner control points.

    Returns:
        x and y, (N, R, T) each; x is sorted.
    """
    t = torch.linspace(0, 1, CURVE_POINTS)
    inner = torch.rand(2, 2, count, kinds, 1)  # axis, point
    first, second = 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)
    x, y = (p[0] * first + p[1] * second + t**3 for p in inner)
    return x.sort(2).values, y


def interpolate(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Evaluate the piecewise-linear curve through (x, y) at values, like `numpy.interp`.

    Args:
        values: (N, R, P).
        x: (N, R, T), ascending.
        y: (N, R, T).
    """
    right = torch.searchsorted(x, values.contiguous()).clamp(1, x.shape[2] - 1)
    x0, x1 = x.gather(2, right - 1), x.gather(2, right)
    y0, y1 = y.gather(2, right - 1), y.gather(2, right)
    share = ((values - x0) / (x1 - x0).clamp(min=1e-8)).clamp(0, 1)
    return y0 + share * (y1 - y0)


def percentile(values: Tensor, inside: Tensor, share: float) -> Tensor:
    """Return the percentile within each region, like `numpy.percentile`; 0 for an empty region.

    Args:
        values: (N, R, P).
        inside: (N, R, P), boolean.
        share: in [0, 1].

    Returns:
        (N, R, 1).
    """
    ordered = values.masked_fill(~inside, float("inf")).sort(2).values
    last = inside.sum(2, keepdim=True) - 1
    position = share * last.clamp(min=0)
    below = position.floor().long()
    above = torch.minimum(below + 1, last.clamp(min=0))
    found = torch.lerp(ordered.gather(2, below), ordered.gather(2, above), position - below)
    return torch.where(last >= 0, found, 0.0)


def saliency_map(gradient: Tensor, grid: int) -> Tensor:
    """Return the gradient's magnitude, smoothed and scaled to [0, 1] in each image.

    Args:
        gradient: (N, S, H, W).
        grid: cells per side.

    Returns:
        (N, 1, H, W).
    """
    size = gradient.shape[-2:]
    magnitude = gradient.float().abs().mean(1, keepdim=True)
    cells = F.adaptive_avg_pool2d(magnitude, min(grid, *size))
    smooth = F.interpolate(cells, size=size)
    kernel = max(1, size[0] // grid) // 2 * 2 + 1
    for _ in range(2):  # two box filters on a piecewise-constant map: quadratic B-splines
        smooth = F.avg_pool2d(smooth, kernel, 1, kernel // 2, count_include_pad=False)
    least, most = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    # A constant map becomes 1 everywhere; elsewhere the smallest normal number has no effect.
    tiny = torch.finfo(smooth.dtype).tiny
    return ((smooth - least + tiny) / (most - least + tiny)).to(gradient.dtype)
