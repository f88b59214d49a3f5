"""Networks for methods: segmenters, generators, discriminators.

Networks use instance normalisation unless stated otherwise: without running statistics, training
and evaluation agree on any number of devices. Encoders from timm keep their own normalisation,
mostly batch normalisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError, reason
from glua_bench.losses import precise

SLOPE = 0.2  # negative slope of all LeakyReLU
NORM_EPSILON = 1e-5  # of instance norm


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Apply instance norm and mark constant maps.

    A constant map (from a constant slice with reflection padding) is normalised to 0, but each
    layer multiplies its gradient by 1/√eps = 316 until it overflows. The mask allows callers to
    block the gradients of such maps.

    Args:
        x: (N, C, H, W).

    Returns:
        The normalised maps (N, C, H, W), at least in single precision; and a mask (N, C), 1 where
        the variance is above eps / 100 and 0 elsewhere.
    """
    x = precise(x)  # as in autocast
    count, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    maps, _, inverse = torch.native_group_norm(
        x, None, None, count, channels, pixels, channels, NORM_EPSILON
    )
    varies = inverse < (1.01 * NORM_EPSILON) ** -0.5  # inverse = (variance + eps)^-½
    return maps, varies.to(maps)


class InstanceNorm(nn.Module):
    """Instance norm without weights that blocks the gradients of constant maps."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); constant maps become 0."""
        maps, varies = normalised(x)
        return maps * varies[..., None, None]


def instance_norm(channels: int, affine: bool = False) -> nn.Module:
    """Return an instance norm; the affine one is a group norm, which is faster on a CPU.

    The affine form is for networks with zero padding, where no map is constant.
    """
    return nn.GroupNorm(channels, channels) if affine else InstanceNorm()


class Segmented(NamedTuple):
    """Output of a segmenter.

    Attributes:
        logits: (N, K, H, W).
        features: decoder maps from coarse to fine, each (N, C_i, H / s_i, W / s_i).
    """

    logits: Tensor
    features: tuple[Tensor, ...]


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Return two 3×3 convolutions, each with instance norm and LeakyReLU."""
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
        channels: channels of the encoder's maps, fine to coarse.
        classes: number of output classes K.
        stem: number of upsamplings after the finest map, to reach full resolution.
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
        for block, skip in itertools.zip_longest(self.blocks, maps[-2::-1]):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
            features.append(x)
        return Segmented(self.head(x), tuple(features))


class Segmenter(nn.Module):
    """A segmentation network with separate encoder and decoder.

    Attributes:
        encoder_channels: channels of the maps of `encode`, fine to coarse.
        feature_channels: channels of the `features` of `Segmented`, coarse to fine.
        head: the last layer, from the last feature map to logits.
    """

    encoder_channels: list[int]
    feature_channels: list[int]
    head: nn.Module

    def encode(self, images: Tensor) -> list[Tensor]:
        """Encode images (N, S, H, W) to maps, fine to coarse."""
        raise NotImplementedError

    def decode(self, maps: list[Tensor], size: Sequence[int]) -> Segmented:
        """Decode the encoder's maps to logits of size (H, W) and decoder maps."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Segmented:
        """Segment images (N, S, H, W)."""
        return self.decode(self.encode(images), images.shape[-2:])


class DecodedSegmenter(Segmenter):
    """A segmenter with a U-Net `Decoder`."""

    decoder: Decoder

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The 1×1 convolution to logits."""
        return self.decoder.head

    def decode(self, maps: list[Tensor], size: Sequence[int]) -> Segmented:
        return self.decoder(maps)


class UNet(DecodedSegmenter):
    """Compact U-Net (Ronneberger et al., MICCAI 2015) with instance norm.

    Args:
        classes: number of output classes K.
        width: channels at full resolution, doubled at each of the `depth - 1` poolings.
        depth: number of resolutions; the image side must be divisible by 2^(depth-1).
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
        self.encoder_channels, self.feature_channels = channels, self.decoder.channels

    def encode(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            images = block(F.max_pool2d(images, 2) if level else images)
            maps.append(images)
        return maps


class TimmSegmenter(DecodedSegmenter):
    """A timm encoder with the U-Net decoder.

    Args:
        encoder: name of a timm model with feature maps, e.g. "resnet18".
        classes: number of output classes K.
        pretrained: load timm's weights.
        slices: channels of an image.

    Raises:
        ConfigError: the encoder is unknown to timm, has no pyramid of feature maps, or its weights
            cannot be loaded.
    """

    def __init__(
        self, encoder: str, classes: int, pretrained: bool = False, slices: int = 1
    ) -> None:
        super().__init__()
        import timm  # slow, and most runs do not need it

        if encoder not in timm.list_models():
            near = timm.list_models(f"*{encoder[:6]}*")[:3]
            raise ConfigError(
                f"segmenter.name = 'timm:{encoder}' is not a model of timm "
                f"{timm.__version__}{'; similar: ' + ', '.join(near) if near else ''}."
            )
        try:
            self.encoder = timm.create_model(
                encoder, features_only=True, in_chans=slices, pretrained=pretrained
            )
        except Exception as error:  # timm raises many types, from network errors to asserts
            raise ConfigError(
                f"segmenter.name = 'timm:{encoder}' cannot be used as a segmenter "
                f"({type(error).__name__}: {reason(error)}); choose an encoder with feature maps"
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
        self.encoder_channels = list(info.channels())
        self.decoder = Decoder(self.encoder_channels, classes, stem=first)
        self.feature_channels = self.decoder.channels

    def encode(self, images: Tensor) -> list[Tensor]:
        return list(self.encoder(images))


DILATIONS = (6, 12, 18, 24)  # of DeepLab's classifier
DEEPLAB_STRIDE = 8
DEEPLAB_STD = 0.01  # standard deviation of initial convolution weights


class DeepLab(Segmenter):
    """A dilated ResNet with stride 8 and DeepLab-v2's classifier.

    The segmenter of AdaptSegNet and GLUA (Chen et al., *DeepLab*, TPAMI 2018, without CRF and
    multiple scales). The last two stages of a timm ResNet keep the resolution and use dilations 2
    and 4; the stride of a bottleneck is in its first convolution, and the pooling rounds up. The
    last block, which gets its own projection, belongs to `decode`. Logits are the sum of dilated
    3×3 convolutions, upsampled bilinearly with aligned corners.

    Args:
        resnet: timm ResNet, modified in place.
        classes: number of output classes K.
        dilations: number of the classifier's four convolutions to sum. The published code defines
            four but sums only two, because it returns from within its loop.
        pretrained: keep the ResNet's weights and initialise the added projection as identity.
    """

    def __init__(
        self, resnet: nn.Module, classes: int, dilations: int = 4, pretrained: bool = False
    ) -> None:
        super().__init__()
        net: Any = resnet
        self.conv1, self.bn1, self.act1 = net.conv1, net.bn1, net.act1
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        *blocks, last = net.layer4
        self.layer4, self.layer5 = nn.Sequential(*blocks), nn.Sequential(last)
        for stage, dilation in ((self.layer2, 1), (self.layer3, 2), (net.layer4, 4)):
            for block in stage:
                dilate(block, dilation)
        channels = net.feature_info[-1]["num_chs"]
        before = channels if blocks else net.feature_info[-2]["num_chs"]
        if last.downsample is None:
            convolution = nn.Conv2d(channels, channels, 1, bias=False)
            last.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))
            nn.init.dirac_(convolution.weight)
        self.head = DilatedClassifier(channels, classes, dilations)
        self.encoder_channels, self.feature_channels = [before], [before, channels]
        if not pretrained:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=DEEPLAB_STD)
                elif isinstance(module, nn.BatchNorm2d):
                    nn.init.ones_(module.weight)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Encode images (N, S, H, W) to one map (N, C, h, w), with h in [H / 8, H / 8 + 1]."""
        x = self.pool(self.act1(self.bn1(self.conv1(images))))
        return [self.layer4(self.layer3(self.layer2(self.layer1(x))))]

    def decode(self, maps: list[Tensor], size: Sequence[int]) -> Segmented:
        """Decode the encoder's map to logits and the maps before and after the last block."""
        x = self.layer5(maps[-1])
        logits = F.interpolate(self.head(x), size=tuple(size), mode="bilinear", align_corners=True)
        return Segmented(logits, (maps[-1], x))


class DilatedClassifier(nn.Module):
    """Sum of 3×3 convolutions with different dilations: (N, C, h, w) → logits (N, K, h, w)."""

    def __init__(self, channels: int, classes: int, summed: int = 4) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, classes, 3, padding=dilation, dilation=dilation)
            for dilation in DILATIONS
        )
        self.summed = summed
        self.convolutions[summed:].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits at the resolution of the map."""
        return torch.stack([layer(x) for layer in self.convolutions[: self.summed]]).sum(0)


def dilate(block: nn.Module, dilation: int) -> None:
    """Dilate a timm block's 3×3 convolutions, and move a bottleneck's stride to its first one."""
    found: Any = block
    for convolution in (found.conv1, found.conv2):
        if convolution.kernel_size == (3, 3):
            convolution.dilation = convolution.padding = (dilation, dilation)
    if hasattr(block, "conv3"):
        found.conv1.stride, found.conv2.stride = found.conv2.stride, (1, 1)


def build_deeplab(
    encoder: str, classes: int, dilations: int, pretrained: bool, slices: int
) -> DeepLab:
    """Build `DeepLab` on a timm ResNet.

    Raises:
        ConfigError: timm has no such ResNet, or its weights cannot be loaded.
    """
    import timm  # slow, and most runs do not need it
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    try:
        resnet = timm.create_model(
            encoder, pretrained=pretrained, in_chans=slices, num_classes=0, output_stride=8
        )
        if not isinstance(resnet, ResNet):
            raise TypeError("it is not a ResNet")
        stages: Any = [getattr(resnet, f"layer{number}") for number in range(1, 5)]
        for block in (block for stage in stages for block in stage):
            # Other blocks, such as Res2Net's, have no convolutions to dilate; pooling rounds sizes.
            plain = isinstance(block, (BasicBlock, Bottleneck))
            if not plain or isinstance(block.aa, nn.AvgPool2d):
                raise TypeError("its blocks are not those of a plain ResNet")
    except Exception as error:  # timm raises many types, from network errors to asserts
        raise ConfigError(
            f"segmenter.name = 'deeplab:{encoder}' cannot be used as a segmenter "
            f"({reason(error)}); choose a ResNet of timm, such as deeplab:resnet50"
            f"{', or set segmenter.pretrained=false' if pretrained else ''}."
        ) from error
    return DeepLab(resnet, classes, dilations, pretrained)


def build_segmenter(spec: SegmenterSpec, classes: int, slices: int = 1) -> Segmenter:
    """Build the segmenter of a configuration; its `forward` returns `Segmented`.

    Args:
        spec: configuration, `task.segmenter` in methods.
        classes: number of classes K, `task.classes` in methods.
        slices: channels of an image, `task.inputs` in methods.

    Raises:
        ConfigError: the name is none of "unet", "timm:<encoder>", "deeplab", "deeplab:<resnet>".
    """
    if spec.name == "unet":
        return UNet(classes, spec.width, spec.depth, slices)
    kind, colon, encoder = spec.name.partition(":")
    if kind == "timm" and encoder:
        return TimmSegmenter(encoder, classes, spec.pretrained, slices)
    if kind == "deeplab" and bool(colon) == bool(encoder):
        name = encoder or "resnet101"
        return build_deeplab(name, classes, spec.dilations, spec.pretrained, slices)
    raise ConfigError(
        f"segmenter.name = '{spec.name}' is unknown; write unet, timm:<encoder> such as "
        "timm:resnet18, deeplab, or deeplab:<resnet> such as deeplab:resnet50."
    )


# --- style transfer -----------------------------------------------------------------------


def conv_chain(channels: Sequence[int], kernel: int = 4, stride: int = 2) -> list[nn.Module]:
    """Return convolutions from each number of channels to the next, each with LeakyReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding=1))
        layers.append(nn.LeakyReLU(SLOPE, inplace=True))
    return layers


def conv_in(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with reflection padding, instance norm and LeakyReLU."""
    padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, padding_mode="reflect", bias=False),
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


class AdaIN(nn.Module):
    """Instance norm with the scale and shift of a style (Huang & Belongie, ICCV 2017)."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Normalise x (N, C, H, W) and apply scale and shift, both (N, C)."""
        maps, varies = normalised(x)
        return maps * ((1 + scale) * varies)[..., None, None] + shift[..., None, None]


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
        self.head = nn.Conv2d(width, slices, 7, padding=3, padding_mode="reflect")

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


# --- discriminators -----------------------------------------------------------------------


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


class PatchGAN(nn.Module):
    """Discriminator of 70 × 70 patches: 4×4 convolutions w-2w-4w-8w-K, strides 2, 2, 2, 1, 1.

    Instance norm follows the second to fourth convolution, LeakyReLU all but the last. Initial
    weights are from N(0, 0.02). This is CycleGAN's discriminator and, with one output per domain,
    AD-GAN's.

    Args:
        width: channels w after the first convolution.
        slices: channels of an image.
        outputs: number of scores K per patch.
        bias: use biases also before a norm, where they have no effect.
    """

    def __init__(
        self, width: int = 64, slices: int = 1, outputs: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = [nn.Conv2d(slices, width, 4, 2, padding=1), nn.LeakyReLU(SLOPE)]
        for a, b, stride in zip(channels, channels[1:], (2, 2, 1), strict=False):
            layers.append(nn.Conv2d(a, b, 4, stride, padding=1, bias=bias))
            layers += [instance_norm(b), nn.LeakyReLU(SLOPE)]
        self.body = nn.Sequential(*layers, nn.Conv2d(channels[-1], outputs, 4, padding=1))
        normal_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, K, h, w) of images (N, S, H, W)."""
        return self.body(images)


def normal_weights(network: nn.Module) -> None:
    """Draw convolution weights from N(0, 0.02) and set biases to 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class FeatureDiscriminator(nn.Sequential):
    """Discriminator of the locations of a feature map, (N, C, h, w) → (N, 1, h, w).

    Four 3×3 convolutions C → C/2 → C/4 → C/8 → 1 with LeakyReLU and without norm: GLUA's D1.

    Args:
        inputs: channels C of the map.
    """

    def __init__(self, inputs: int) -> None:
        channels = [inputs, *(max(1, inputs // share) for share in (2, 4, 8))]
        super().__init__(*conv_chain(channels, 3, 1), nn.Conv2d(channels[-1], 1, 3, padding=1))


class OutputDiscriminator(nn.Sequential):
    """Discriminator of patches of the softmax output, (N, K, H, W) → (N, 1, H / 32, W / 32).

    Five 4×4 convolutions with stride 2 to width × (1, 2, 4, 8) and 1 channels with LeakyReLU and
    without norm: AdaptSegNet's discriminator and GLUA's D2.

    Args:
        classes: number of classes K.
        width: channels after the first convolution; 64 in both papers.
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        channels = [classes, width, 2 * width, 4 * width, 8 * width]
        super().__init__(*conv_chain(channels), nn.Conv2d(channels[-1], 1, 4, 2, padding=1))
