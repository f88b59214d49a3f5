"""SIFA's networks: generator, shared encoder, decoder, heads and discriminators.

Chen et al., IEEE TMI 2020 (v2). Sizes and numerical conventions follow the authors' TensorFlow 1
graph, whose outputs `tests/methods/test_sifa.py` reproduces: "same" padding puts the odd pixel of a
stride-2 convolution at the right and bottom, bilinear upsampling has no half-pixel shift, and ε is
1e-3 in batch norm and 1e-6 in instance norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glua_bench.methods.components.thin_convolution import ThinConv2d

STRIDE = 8  # of the encoder


def convolution(
    inputs: int, outputs: int, kernel: int, std: float, bias: bool = False, dilation: int = 1
) -> nn.Conv2d:
    """Return a size-preserving, zero-padded convolution with truncated-normal weights."""
    padding = dilation * (kernel - 1) // 2
    kind = DilatedConv if dilation > 1 else ThinConv2d if kernel == 7 else nn.Conv2d
    layer = kind(inputs, outputs, kernel, padding=padding, bias=bias, dilation=dilation)
    return initialised(layer, std)


def initialised(layer: nn.Conv2d | nn.ConvTranspose2d, std: float) -> nn.Conv2d:
    """Draw weights from a normal distribution truncated at 2 σ; set biases to 0."""
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer  # type: ignore[return-value]


def instance_norm(channels: int) -> nn.GroupNorm:
    """Return instance norm with scale and shift."""
    return nn.GroupNorm(channels, channels, eps=1e-6)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return batch norm with momentum 0.1, which `SIFA.encode` overrides."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


class Down(nn.Module):
    """3×3 convolution with stride 2, instance norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = initialised(nn.Conv2d(inputs, outputs, 3, stride=2), 0.02)
        self.norm = instance_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) with even H, W to (N, C', H/2, W/2)."""
        return F.relu(self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))))


class Up(nn.Module):
    """3×3 transposed convolution with stride 2, instance norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = initialised(nn.ConvTranspose2d(inputs, outputs, 3, stride=2), 0.02)
        self.norm = instance_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', 2H, 2W)."""
        return F.relu(self.norm(self.conv(x)[..., :-1, :-1]))


class Residual(nn.Module):
    """ReLU(x + two 3×3 convolutions of x); the skip is zero-padded to `outputs` channels.

    Args:
        inputs: channels of x.
        outputs: channels of the result; outputs - inputs is even.
        norm: "instance" or "batch".
        std: standard deviation of the initial weights.
        bias: whether the convolutions have a bias.
        dilation: dilation of the convolutions.
        dropout: dropout rate on the convolutions' outputs.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: str,
        std: float = 0.01,
        bias: bool = False,
        dilation: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        make = batch_norm if norm == "batch" else instance_norm
        self.widen = (outputs - inputs) // 2
        self.conv1 = convolution(inputs, outputs, 3, std, bias, dilation)
        self.norm1 = make(outputs)
        self.conv2 = convolution(outputs, outputs, 3, std, bias, dilation)
        self.norm2 = make(outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H, W)."""
        y = F.relu(self.norm1(self.dropout(self.conv1(x))))
        y = self.norm2(self.dropout(self.conv2(y)))
        skip = F.pad(x, (0, 0, 0, 0, self.widen, self.widen)) if self.widen else x
        return F.relu(skip + y)


class DilatedConv(nn.Conv2d):
    """Dilated convolution with a bias parameter that is never added, as in the authors' graph.

    The bias counts in the number of parameters and in the L2 loss, which pulls it to 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve without bias."""
        return F.conv2d(input, self.weight, None, 1, self.padding, self.dilation)


class Generator(nn.Module):
    """Generator G: source image → target-like image, by 9 residual blocks and tanh(x + ·)."""

    def __init__(self, width: int = 32, blocks: int = 9, slices: int = 1) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            convolution(slices, width, 7, 0.02, bias=True), instance_norm(width), nn.ReLU()
        )
        # A bias before instance norm has no effect, but counts among the authors' parameters.
        self.body = nn.Sequential(
            Down(width, 2 * width),
            Down(2 * width, 4 * width),
            *(Residual(4 * width, 4 * width, "instance", 0.02, True) for _ in range(blocks)),
            Up(4 * width, 2 * width),
            Up(2 * width, width),
        )
        self.leave = convolution(width, slices, 7, 0.02, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, S, H, W) to (N, S, H, W) in [-1, 1]; H and W must be divisible by 4."""
        return torch.tanh(images + self.leave(self.body(self.enter(images))))


class Encoder(nn.Module):
    """Encoder E, shared by segmenter and decoder, with stride 8."""

    def __init__(self, width: int = 16, slices: int = 1) -> None:
        super().__init__()
        w, pool = width, nn.MaxPool2d(2)

        def residual(inputs: int, outputs: int) -> Residual:
            return Residual(inputs, outputs, "batch")

        def dilated() -> Residual:
            return Residual(32 * w, 32 * w, "batch", bias=True, dilation=2)

        def conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
            return [convolution(inputs, outputs, kernel, 0.01), batch_norm(outputs), nn.ReLU()]

        self.low = nn.Sequential(
            *conv(slices, w, 7),
            *(residual(w, w), pool),
            *(residual(w, 2 * w), pool),
            *(residual(2 * w, 4 * w), residual(4 * w, 4 * w), pool),
            *(residual(4 * w, 8 * w), residual(8 * w, 8 * w)),
            *(residual(8 * w, 16 * w), *(residual(16 * w, 16 * w) for _ in range(3))),
            *(residual(16 * w, 32 * w), residual(32 * w, 32 * w)),
        )
        self.high = nn.Sequential(
            *(dilated(), dilated()), *conv(32 * w, 32 * w, 3), *conv(32 * w, 32 * w, 3)
        )
        self.channels = 32 * w

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, S, H, W) to the upper and the lower latent, both (N, 32w, H/8, W/8)."""
        low = self.low(images)
        return self.high(low), low


class Decoder(nn.Module):
    """Decoder U: latent of a target(-like) image → source-like image, tanh(x + ·)."""

    def __init__(
        self, inputs: int, width: int = 32, dropout: float = 0.25, slices: int = 1
    ) -> None:
        super().__init__()

        def residual() -> Residual:
            return Residual(4 * width, 4 * width, "instance", dropout=dropout)

        self.body = nn.Sequential(
            *(convolution(inputs, 4 * width, 3, 0.02), instance_norm(4 * width), nn.ReLU()),
            *(residual() for _ in range(4)),
            *(Up(4 * width, 2 * width), Up(2 * width, 2 * width), Up(2 * width, width)),
            convolution(width, slices, 7, 0.02),
        )

    def forward(self, latent: Tensor, images: Tensor) -> Tensor:
        """Map latent (N, C, H/8, W/8) and the encoded images (N, S, H, W) to (N, S, H, W)."""
        return torch.tanh(images + self.body(latent))


class Head(nn.Module):
    """1×1 convolution to logits, upsampled to image size."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv = convolution(inputs, classes, 1, 0.01)

    def forward(self, latent: Tensor) -> Tensor:
        """Map (N, C, h, w) to logits (N, K, 8h, 8w)."""
        return enlarge(self.conv(latent), STRIDE)


def enlarge(maps: Tensor, factor: int) -> Tensor:
    """Upsample bilinearly as TensorFlow 1: output pixel i lies at i / factor of the input.

    Args:
        maps: (N, C, h, w).
        factor: upsampling factor.
    """
    # Repeating the last row and column and aligning corners gives these positions.
    height, width = (side * factor for side in maps.shape[-2:])
    padded = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    large = F.interpolate(padded, size=(height + 1, width + 1), mode="bilinear", align_corners=True)
    return large[..., :height, :width]


class Discriminator(nn.Module):
    """PatchGAN: 4×4 convolutions of strides 2, 2, 2, 1, 1 with two pixels of padding.

    Args:
        inputs: input channels.
        width: channels after the first convolution.
        outputs: number of scores per position.
    """

    def __init__(self, inputs: int, width: int = 64, outputs: int = 1) -> None:
        super().__init__()
        channels = [inputs, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for index, stride in enumerate((2, 2, 2, 1)):
            layer = nn.Conv2d(
                channels[index], channels[index + 1], 4, stride, padding=2, bias=False
            )
            layers.append(initialised(layer, 0.02))
            if index:
                layers.append(instance_norm(channels[index + 1]))
            layers.append(nn.LeakyReLU(0.2))
        last = nn.Conv2d(channels[-1], outputs, 4, padding=2, bias=False)
        self.body = nn.Sequential(*layers, initialised(last, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to scores (N, outputs, h, w)."""
        return self.body(x)
