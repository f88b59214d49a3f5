"""Networks of DAR-UNet's style stage: encoders, decoder and discriminators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glua_bench.methods.components.thin_convolution import ThinConv2d
from glua_bench.networks import SLOPE, AdaIN, conv_chain, instance_norm


def conv_in(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with reflection padding, instance norm and LeakyReLU."""
    padding = (kernel - 1) // 2
    kind = ThinConv2d if kernel == 7 else nn.Conv2d
    return nn.Sequential(
        kind(inputs, outputs, kernel, stride, padding, padding_mode="reflect", bias=False),
        instance_norm(outputs),
        nn.LeakyReLU(SLOPE, inplace=True),
    )


class ResidualBlock(nn.Module):
    """x + conv(conv(x)) with instance norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_in(channels, channels, 3),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False),
            instance_norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x + self.body(x)


class ContentEncoder(nn.Module):
    """Content encoder: (N, S, H, W) → (N, 4w, H/4, W/4) (DAR-UNet's size at w = 32)."""

    def __init__(self, width: int = 32, blocks: int = 4, slices: int = 1) -> None:
        super().__init__()
        self.channels = 4 * width
        self.body = nn.Sequential(
            conv_in(slices, width, 7),
            conv_in(width, 2 * width, 4, 2),
            conv_in(2 * width, 4 * width, 4, 2),
            *(ResidualBlock(4 * width) for _ in range(blocks)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute the content code of images."""
        return self.body(images)


class StyleEncoder(nn.Module):
    """Style encoder: (N, S, H, W) → (N, 8), five stride-2 convolutions and a global average.

    It has no normalisation, because instance norm would remove the statistics that define style.
    """

    def __init__(self, width: int = 32, style: int = 8, slices: int = 1) -> None:
        super().__init__()
        channels = [slices, width, 2 * width, 4 * width, 4 * width, 4 * width]
        self.body = nn.Sequential(
            *conv_chain(channels), nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels[-1], style, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute the style vector of images."""
        return self.body(images).flatten(1)


class UpsampleConv5(nn.Module):
    """Nearest upsampling by 2 and a 5×5 convolution, computed at the low resolution.

    Each output pixel depends on only 3×3 distinct inputs, so the 5×5 kernel folds into four 3×3
    kernels (one per output parity) and a pixel shuffle: the same function with 9 instead of 25
    multiplications per output pixel. Borders use replicate padding.
    """

    fold: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 5, 5))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        # fold[q] maps the 5 taps of parity q to the 3 low-resolution taps.
        fold = torch.zeros(2, 3, 5)
        for parity in range(2):
            for tap in range(5):
                fold[parity, (parity + tap - 2) // 2 + 1, tap] = 1.0
        self.register_buffer("fold", fold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', 2H, 2W)."""
        fold = self.fold.to(self.weight.dtype)
        kernels = torch.einsum("oiab,pya,qxb->opqiyx", self.weight, fold, fold)
        outputs = self.weight.shape[0]
        kernels = kernels.reshape(outputs * 4, self.weight.shape[1], 3, 3)
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(x, kernels), 2)


class StyleDecoder(nn.Module):
    """Decoder from content and style to an image: AdaIN residual blocks, two upsamplings, tanh.

    Args:
        width: channels at full resolution (32 in the original).
        style: length of the style vector.
        blocks: number of AdaIN residual blocks.
        slices: channels of an image.
    """

    def __init__(self, width: int = 32, style: int = 8, blocks: int = 4, slices: int = 1) -> None:
        super().__init__()
        channels = 4 * width
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)
            for _ in range(2 * blocks)
        )
        self.adain = AdaIN()
        hidden = 8 * width
        self.mlp = nn.Sequential(
            nn.Linear(style, hidden),
            nn.LeakyReLU(SLOPE),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(SLOPE),
            nn.Linear(hidden, 2 * blocks * 2 * channels),
        )
        self.up1 = UpsampleConv5(channels, 2 * width)
        self.up2 = UpsampleConv5(2 * width, width)
        self.norm1 = nn.GroupNorm(1, 2 * width)  # layer norm keeps the relative scale of channels
        self.norm2 = nn.GroupNorm(1, width)
        self.head = ThinConv2d(width, slices, 7, padding=3, padding_mode="reflect")

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """Decode content (N, 4w, h, w) and style (N, 8) to images (N, S, 4h, 4w) in [-1, 1]."""
        n, channels = content.shape[:2]
        affine = self.mlp(style).view(n, len(self.convolutions), 2, channels)
        x = content
        for block in range(0, len(self.convolutions), 2):
            y = self.adain(self.convolutions[block](x), affine[:, block, 0], affine[:, block, 1])
            y = F.leaky_relu(y, SLOPE)
            y = self.adain(
                self.convolutions[block + 1](y), affine[:, block + 1, 0], affine[:, block + 1, 1]
            )
            x = x + y
        x = F.leaky_relu(self.norm1(self.up1(x)), SLOPE)
        x = F.leaky_relu(self.norm2(self.up2(x)), SLOPE)
        return torch.tanh(self.head(x))


class PatchDiscriminator(nn.Module):
    """4×4 stride-2 convolutions without norm, then 1×1: scores (N, 1, H/2^L, W/2^L)."""

    def __init__(self, inputs: int = 1, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        channels = [inputs, *(width * 2**layer for layer in range(layers))]
        self.body = nn.Sequential(*conv_chain(channels), nn.Conv2d(channels[-1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute unbounded scores of patches."""
        return self.body(x)


class MultiScaleDiscriminator(nn.Module):
    """Patch discriminators on an image and its downsampled versions."""

    def __init__(self, width: int = 64, layers: int = 4, scales: int = 3, slices: int = 1) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(slices, width, layers) for _ in range(scales)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute one map of scores per scale for images (N, S, H, W)."""
        scores = []
        for discriminator in self.scales:
            scores.append(discriminator(images))
            images = F.avg_pool2d(images, 3, 2, padding=1, count_include_pad=False)
        return scores
