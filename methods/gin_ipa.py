"""Single-source domain generalisation by random shallow networks: GIN and IPA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.augment import by_channel, sent
from glua_bench.config import setting
from glua_bench.losses import precise, segmentation_loss
from glua_bench.method import Batch, Context
from glua_bench.methods.source_only import SegmentConfig, SourceOnly

LAYERS, HIDDEN = 4, 2  # of the random networks
KERNELS = (1, 3)  # sizes of their kernels
COPIES = 3  # augmented copies of an image, of which two are blended


@dataclass(frozen=True)
class GINIPAConfig(SegmentConfig):
    """Settings of the segmenter and of both augmentations; defaults are the authors'."""

    lambda_consistency: float = setting(
        10.0, "weight of the consistency between augmented copies", low=0, high=1000
    )
    blend_spacing: float = setting(
        0.25,
        "distance of the blending map's control points over the image's side",
        low=0.02,
        high=1,
    )


class GINIPA(SourceOnly):
    """Recolour images by random networks, and ask for equal predictions; uses no target data.

    Ouyang et al., *Causality-Inspired Single-Source Domain Generalization for Medical Image
    Segmentation*, IEEE TMI 2022. Global intensity non-linear augmentation (GIN) sends an image
    through a random network g of four convolutions with leaky ReLU between them, mixes the result
    with the image and restores its Frobenius norm:

        GIN(x) = z · |x| / |z|,        z = α g(x) + (1 - α) x,        α ~ U(0, 1).

    Each convolution draws its kernel size from 1 and 3 per batch, and its weights and biases from
    N(0, 1) per image. Interventional pseudo-correlation augmentation (IPA) blends two copies with
    a smooth random map b in [0, 1]. With three copies x₁, x₂, x₃ = GIN(x), the segmenter reads
    b x₁ + (1 - b) x₂, (1 - b) x₁ + b x₂ and x₃ and predicts p₁, p₂ and p₃ with mean p:

        L = L_seg(p₁, y) + λ · mean over copies, pixels and classes of p (log p - log p_i).

    As in the authors' code, the last mean includes classes, and p passes gradients. The map b is a
    random grid of control points, 1/4 of the side apart (theirs: 24 pixels at half of a resolution
    of 192), interpolated by cubic splines (theirs: the exponential of quadratic B-splines) and
    scaled to [0, 1] in each image. The authors' networks read and return a slice as three channels;
    here g has one. Copies are clipped to [-1, 1], the range of all images here. Slices of a stack
    share network and map; channels have their own networks.
    """

    name = "gin_ipa"
    reference = "Ouyang et al., IEEE TMI 2022"
    needs = "source images and labels"
    uses_target = False
    Config = GINIPAConfig

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update with the segmentation of a blend and the consistency of three copies."""
        logits = self.segmenter(torch.cat(self.copies(batch.source_images))).logits
        segmentation = segmentation_loss(logits.chunk(COPIES)[0], batch.source_labels)
        consistency = consistency_loss(logits)
        context.update("segmenter", segmentation + self.config.lambda_consistency * consistency)
        return {"segmentation": segmentation, "consistency": consistency}

    def copies(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return two complementary blends and a third augmented copy, each (N, C·S, H, W)."""
        first, second, third = (gin(images, self.task.channels) for _ in range(COPIES))
        share = blending_map(images, self.config.blend_spacing)
        return share * first + (1 - share) * second, (1 - share) * first + share * second, third

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return both blends and the third copy."""
        names = ("blend", "opposite blend", "recoloured")
        return dict(zip(names, self.copies(batch.source_images), strict=True))


def gin(images: Tensor, channels: int = 1) -> Tensor:
    """Recolour images by a random network each, (N, C·S, H, W) in [-1, 1].

    Args:
        images: (N, C·S, H, W) in [-1, 1].
        channels: C, the number of input channels, which have networks of their own.
    """
    apart = by_channel(images, channels)
    count, slices = apart.shape[:2]
    x = apart
    for layer in range(LAYERS):
        size = KERNELS[int(torch.randint(len(KERNELS), ()))]
        wide = slices if layer == LAYERS - 1 else HIDDEN * slices
        # One network for all slices of an image: kernels are shared along S by grouping.
        inner, outer = x.shape[1] // slices, wide // slices
        kernels = torch.randn(count, 1, outer, inner, size, size).expand(-1, slices, -1, -1, -1, -1)
        shifts = torch.randn(count, 1, outer).expand(-1, slices, -1)
        x = F.conv2d(
            x.reshape(1, -1, *x.shape[-2:]),
            sent(kernels.reshape(-1, inner, size, size), images),
            sent(shifts.reshape(-1), images),
            padding=size // 2,
            groups=count * slices,
        ).view(count, wide, *x.shape[-2:])
        if layer < LAYERS - 1:
            x = F.leaky_relu(x)
    share = sent(torch.rand(count, 1, 1, 1), images)
    mixed = share * x + (1 - share) * apart
    norms = [torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True) for v in (apart, mixed)]
    return (mixed * norms[0] / (norms[1] + 1e-5)).clamp(-1, 1).reshape(images.shape)


def blending_map(images: Tensor, spacing: float) -> Tensor:
    """Draw a smooth map in [0, 1] for each image, (N, 1, H, W).

    Args:
        images: (N, C, H, W).
        spacing: distance of control points as a fraction of H.
    """
    height, width = images.shape[-2:]
    step = spacing * height
    shape = [max(2, round(side / step) + 1) for side in (height, width)]
    points = sent(torch.randn(len(images), 1, *shape), images)
    values = F.interpolate(points, (height, width), mode="bicubic", align_corners=True)
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-8)


def consistency_loss(logits: Tensor) -> Tensor:
    """Compute the mean Kullback-Leibler terms from the mean prediction to each copy's, a scalar.

    Args:
        logits: (COPIES · N, K, H, W), copy by copy.
    """
    logs = precise(logits).log_softmax(1).unflatten(0, (COPIES, -1))
    middle = logs.exp().mean(0, keepdim=True)
    return F.kl_div(logs, middle.expand_as(logs), reduction="none").mean()
