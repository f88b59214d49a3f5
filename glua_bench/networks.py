"""The networks that methods are built of: segmenters, generators, discriminators.

Widths and depths are arguments, so one definition serves the quick preset and the sizes of
the papers. All of ours use instance normalisation unless said otherwise: it needs no running
statistics, so training, evaluation and any number of devices agree. timm's encoders keep their
own, mostly batch normalisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError

SLOPE = 0.2  # of LeakyReLU, throughout (field's usual value)


def instance_norm(channels: int, affine: bool = False) -> nn.GroupNorm:
    """Instance norm as group norm with one group a channel: the same values, faster on a CPU."""
    return nn.GroupNorm(channels, channels, affine=affine)


class Segmented(NamedTuple):
    """A segmenter's output.

    Args:
        logits: (N, K, H, W).
        features: decoder maps from coarse to fine, each (N, C_i, H / s_i, W / s_i).
    """

    logits: Tensor
    features: tuple[Tensor, ...]


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3×3 convolutions, each with instance norm and LeakyReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            instance_norm(outputs, affine=True),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """U-Net decoder: upsample, concatenate the skip, convolve.

    Args:
        channels: of the encoder's maps, fine to coarse.
        classes: number of output classes K.
        stem: further upsamplings behind the finest map, to reach full resolution.
    """

    def __init__(self, channels: list[int], classes: int, stem: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        below = channels[-1]
        for skip in reversed(channels[:-1]):
            self.blocks.append(conv_block(below + skip, skip))
            below = skip
        for _ in range(stem):
            self.blocks.append(conv_block(below, max(8, below // 2)))
            below = max(8, below // 2)
        self.head = nn.Conv2d(below, classes, 1)
        self.channels = [channels[-1]] + [block[0].out_channels for block in self.blocks]  # type: ignore[index]

    def forward(self, maps: list[Tensor]) -> Segmented:
        """Decode the encoder's maps (fine to coarse)."""
        x = maps[-1]
        features = [x]
        skips: list[Tensor | None] = list(reversed(maps[:-1]))
        skips += [None] * (len(self.blocks) - len(skips))
        for block, skip in zip(self.blocks, skips, strict=True):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
            features.append(x)
        return Segmented(self.head(x), tuple(features))


class UNet(nn.Module):
    """Compact U-Net (Ronneberger et al., MICCAI 2015) with instance norm.

    Args:
        classes: number of output classes K.
        width: channels at full resolution, doubled at each of the `depth - 1` poolings.
        depth: number of resolutions; the slice side must be divisible by 2^(depth-1).
        slices: channels of an image.
    """

    def __init__(self, classes: int, width: int = 32, depth: int = 5, slices: int = 1) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth)]
        self.encoder = nn.ModuleList(
            conv_block(slices if level == 0 else channels[level - 1], channels[level])
            for level in range(depth)
        )
        self.decoder = Decoder(channels, classes)
        self.feature_channels = self.decoder.channels

    def forward(self, images: Tensor) -> Segmented:
        """(N, S, H, W) → logits and decoder maps."""
        maps: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            images = block(F.max_pool2d(images, 2) if level else images)
            maps.append(images)
        return self.decoder(maps)


class TimmSegmenter(nn.Module):
    """Any timm encoder that offers feature maps, with the U-Net decoder.

    Args:
        encoder: timm's model name, e.g. "resnet18".
        classes: number of output classes K.
        pretrained: load timm's weights.
        slices: channels of an image.

    Raises:
        ConfigError: timm does not know the encoder, it has no pyramid of feature maps, or its
            weights cannot be loaded.
    """

    def __init__(
        self, encoder: str, classes: int, pretrained: bool = False, slices: int = 1
    ) -> None:
        super().__init__()
        import timm  # takes a second; most runs do not need it

        if encoder not in timm.list_models():
            near = timm.list_models(f"*{encoder[:6]}*")[:3]
            raise ConfigError(
                f"segmenter.name = 'timm:{encoder}' is not a model of timm "
                f"{timm.__version__}{'; close: ' + ', '.join(near) if near else ''}."
            )
        try:
            self.encoder = timm.create_model(
                encoder, features_only=True, in_chans=slices, pretrained=pretrained
            )
        except Exception as error:  # timm raises many types, from network errors to asserts
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"segmenter.name = 'timm:{encoder}' cannot serve as a segmenter "
                f"({type(error).__name__}: {reason}); choose an encoder with feature maps"
                f"{' or set segmenter.pretrained=false' if pretrained else ''}."
            ) from error
        info: Any = self.encoder.feature_info  # timm's FeatureInfo
        reductions = list(info.reduction())
        steps = [b // a for a, b in zip(reductions, reductions[1:], strict=False)]
        first = reductions[0].bit_length() - 1
        if any(step != 2 for step in steps) or 2**first != reductions[0]:
            raise ConfigError(
                f"segmenter.name = 'timm:{encoder}' has feature maps at strides {reductions}; "
                "choose an encoder whose strides double from map to map."
            )
        self.decoder = Decoder(list(info.channels()), classes, stem=first)
        self.feature_channels = self.decoder.channels

    def forward(self, images: Tensor) -> Segmented:
        """(N, S, H, W) → logits and decoder maps."""
        return self.decoder(self.encoder(images))


def build_segmenter(spec: SegmenterSpec, classes: int, slices: int = 1) -> UNet | TimmSegmenter:
    """The segmenter that a configuration names; `forward` returns `Segmented`.

    Args:
        spec: of a method's `task.segmenter`.
        classes: K, of `task.classes`.
        slices: S, of `task.slices`.

    Raises:
        ConfigError: the name is neither "unet" nor "timm:<encoder>".
    """
    if spec.name == "unet":
        return UNet(classes, spec.width, spec.depth, slices)
    kind, _, encoder = spec.name.partition(":")
    if kind == "timm" and encoder:
        return TimmSegmenter(encoder, classes, spec.pretrained, slices)
    raise ConfigError(
        f"segmenter.name = '{spec.name}' is unknown; write unet, or timm:<encoder> "
        "such as timm:resnet18."
    )


# --- style transfer -----------------------------------------------------------------------


def conv_in(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution with reflection padding, instance norm and LeakyReLU."""
    return nn.Sequential(
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            padding=(kernel - 1) // 2,
            padding_mode="reflect",
            bias=False,
        ),
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
        """Same shape out as in."""
        return x + self.body(x)


class ContentEncoder(nn.Module):
    """What is shown: (N, S, H, W) → (N, 4w, H/4, W/4) (DAR-UNet's shape at w = 32)."""

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
        """The content code of images."""
        return self.body(images)


class StyleEncoder(nn.Module):
    """How it looks: (N, S, H, W) → (N, 8), five stride-2 convolutions and a global average.

    Without normalisation, because instance norm would remove the statistics that are style.
    """

    def __init__(self, width: int = 32, style: int = 8, slices: int = 1) -> None:
        super().__init__()
        channels = [slices, width, 2 * width, 4 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(channels, channels[1:], strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, 4, 2, padding=1),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels[-1], style, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """The style vector of images."""
        return self.body(images).flatten(1)


class UpsampleConv5(nn.Module):
    """Nearest upsampling by 2 and a 5×5 convolution, computed at the low resolution.

    Each output pixel of the pair sees only 3×3 distinct inputs, so the 5×5 kernel folds into
    four 3×3 kernels (one per output parity) and a pixel shuffle: the same function of the
    same 5×5 weights with 9 instead of 25 multiplications an output pixel. Borders repeat the
    edge pixel (replicate padding).
    """

    fold: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 5, 5))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        # Row p of fold[q] says which of the 3 low-resolution taps the 5 taps of parity q fall on.
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


class AdaIN(nn.Module):
    """Instance norm whose scale and shift come from a style vector (Huang & Belongie 2017)."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x (N, C, H, W); scale and shift (N, C)."""
        return F.group_norm(x, x.shape[1]) * (1 + scale[..., None, None]) + shift[..., None, None]


class StyleDecoder(nn.Module):
    """Content and style to an image: AdaIN residual blocks, two upsamplings, tanh.

    Args:
        width: channels at full resolution (32 in the full size).
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
        self.norm1 = nn.GroupNorm(1, 2 * width)  # layer norm: keeps the style's scale per channel
        self.norm2 = nn.GroupNorm(1, width)
        self.head = nn.Conv2d(width, slices, 7, padding=3, padding_mode="reflect")

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """content (N, 4w, h, w), style (N, 8) → image (N, S, 4h, 4w) in [-1, 1]."""
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


# --- discriminators -----------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """4×4 stride-2 convolutions without norm, then 1×1: scores (N, 1, H/2^L, W/2^L)."""

    def __init__(self, inputs: int = 1, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        body: list[nn.Module] = []
        channels = inputs
        for layer in range(layers):
            outputs = width * 2**layer
            body += [
                nn.Conv2d(channels, outputs, 4, 2, padding=1),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
            channels = outputs
        self.body = nn.Sequential(*body, nn.Conv2d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Unbounded scores of patches."""
        return self.body(x)


class MultiScaleDiscriminator(nn.Module):
    """Patch discriminators on an image and its halvings; forward returns one map a scale."""

    def __init__(self, width: int = 64, layers: int = 4, scales: int = 3, slices: int = 1) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(slices, width, layers) for _ in range(scales)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, S, H, W) → scores at each scale."""
        scores = []
        for discriminator in self.scales:
            scores.append(discriminator(images))
            images = F.avg_pool2d(images, 3, 2, padding=1, count_include_pad=False)
        return scores


class FeatureDiscriminator(nn.Module):
    """Scores each location of a feature map: (N, C, h, w) → (N, 1, h, w).

    3×3 convolutions C → 128 → 64 → 32 → 1 with instance norm and LeakyReLU, the shape of
    `feat_Dis` in DAR-UNet's code; `scale` shrinks the hidden widths.
    """

    def __init__(self, inputs: int, scale: float = 1.0) -> None:
        super().__init__()
        channels = [inputs] + [max(8, round(c * scale)) for c in (128, 64, 32)]
        layers: list[nn.Module] = []
        for a, b in zip(channels, channels[1:], strict=False):
            layers += [
                nn.Conv2d(a, b, 3, padding=1),
                instance_norm(b),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Unbounded scores of locations."""
        return self.body(features)
