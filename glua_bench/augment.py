"""Data augmentation, the same for every method of a comparison.

`none` leaves batches unchanged; `geometric` applies random affine maps to source images with their
labels and to target images; `photometric` also applies random non-linear tone curves to source
images. Images are transformed on their own device; random numbers are drawn on the CPU, so that
they are the same on every device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = math.radians(15)
SCALE = 0.15
SHIFT = 0.10  # fraction of the side
KNOTS = 6
CURVE_SHARE = 0.8  # fraction of images that get a tone curve
NOISE = 0.05
CACHED = 1 << 17  # pixels per chunk on a CPU


def sent(values: Tensor, like: Tensor) -> Tensor:
    """Convert values from the CPU to the type and device of a tensor, without waiting for it."""
    return values.to(like.device, like.dtype, non_blocking=True)


def random_affine(count: int) -> Tensor:
    """Draw maps from output to input coordinates, (N, 2, 3), in units of half the side."""
    angle = (torch.rand(count) * 2 - 1) * ROTATION
    scale = 1 + (torch.rand(count) * 2 - 1) * SCALE
    shift = (torch.rand(count, 2) * 2 - 1) * SHIFT * 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    return torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )


def centres(count: int) -> Tensor:
    """Return the centres of pixels along a side from -1 to 1, (count,)."""
    return (2 * torch.arange(count) + 1) / count - 1


def geometric(images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rotate (±15°), scale (±15 %) and shift (±10 %) each image together with its label.

    Args:
        images: (N, C·S, H, W) in [-1, 1]; pixels from outside become -1 (background).
        labels: (N, H, W), class indices, resampled by nearest neighbour; or None.
    """
    theta = sent(random_affine(len(images)), images)
    moved = torch.empty_like(images, memory_format=torch.contiguous_format)
    moved_labels = None if labels is None else torch.empty_like(labels)
    height, width = images.shape[-2:]
    # An affine map is the sum of a column term (N, 2, W) and a row term (N, 2, H).
    columns = theta[:, :, 0:1] * sent(centres(width), images)
    rows = theta[:, :, 1:2] * sent(centres(height), images) + theta[:, :, 2:]
    count = len(images)
    if images.device.type == "cpu":
        # Small chunks keep intermediate results in the processor's cache.
        count = max(torch.get_num_threads(), CACHED // (height * width))
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        grid = (columns[part, :, None, :] + rows[part, :, :, None]).permute(0, 2, 3, 1)
        # grid_sample pads with zero, so images are shifted such that zero is background.
        lifted = F.grid_sample(images[part] + 1, grid, padding_mode="zeros", align_corners=False)
        torch.sub(lifted, 1, out=moved[part])
        if labels is not None and moved_labels is not None:
            classes = labels[part, None].to(images)
            classes = F.grid_sample(classes, grid, mode="nearest", align_corners=False)
            moved_labels[part] = classes[:, 0]
    return moved, moved_labels


def by_channel(images: Tensor, channels: int) -> Tensor:
    """Return each input channel as an image of its own, (N, C·S, H, W) → (N·C, S, H, W).

    Use it where intensities of one image are related to each other, such as by a histogram or a
    tone curve, because channels (T1 and T2) have unrelated intensities. `view_as` is the inverse.

    Args:
        images: S slices of the first channel, then of the second, ….
        channels: C, `task.channels` in methods.
    """
    if channels == 1:
        return images
    planes = images.shape[1] // channels
    return images.reshape(len(images) * channels, planes, *images.shape[2:])


def tone_curves(images: Tensor, channels: int = 1) -> Tensor:
    """Apply a random piecewise-linear tone curve and noise to each image.

    All slices of an image share one curve; each input channel has its own. The heights of the knots
    are independent and uniform, so a curve need not be monotonic: contrast may invert, as it does
    between modalities.

    Args:
        images: (N, C·S, H, W) in [-1, 1].
        channels: C, the number of input channels.
    """
    if channels > 1:
        return tone_curves(by_channel(images, channels)).reshape(images.shape)
    count = len(images)
    heights = torch.rand(count, KNOTS) * 2 - 1
    identity = torch.linspace(-1, 1, KNOTS).expand(count, KNOTS)
    curved = torch.rand(count, 1) < CURVE_SHARE
    heights = sent(torch.where(curved, heights, identity), images)
    position = (images.clamp(-1, 1) + 1) * ((KNOTS - 1) / 2)
    left = position.floor().clamp(max=KNOTS - 2)
    share = position - left
    index = left.long().flatten(1)
    low = heights.gather(1, index).view_as(images)
    high = heights.gather(1, index + 1).view_as(images)
    noise = sent(torch.randn(images.shape), images) * NOISE
    return (low + share * (high - low) + noise).clamp(-1, 1)
