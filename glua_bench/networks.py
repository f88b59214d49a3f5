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
LARGE_MAPS = 1 << 18  # values of a batch's maps, 1 MiB


def normalised(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    epsilon: float = NORM_EPSILON,
) -> Tensor:
    """Apply instance norm, then a scale and a shift.

    A constant map (from a constant slice with reflection padding) is normalised to 0, but each
    layer multiplies its gradient by 1/√eps = 316 until it overflows. Maps with a variance below
    eps / 100 are therefore set to the shift and pass no gradient.

    PyTorch's group norm takes one channel at a time from maps in channels-last format on a CPU.
    The two forms here give the same values, faster.

    Args:
        x: (N, C, H, W).
        scale: (N, C) or (C,); None is 1.
        shift: (N, C) or (C,); None is 0.
        epsilon: added to the variance.

    Returns:
        (N, C, H, W), at least in single precision.
    """
    x = precise(x)  # as in autocast
    scale = x.new_ones(()) if scale is None else scale.to(x.dtype)
    shift = x.new_zeros(()) if shift is None else shift.to(x.dtype)
    of_maps = x.shape[:2]
    large = x.device.type == "cpu" and channels_last(x) and x.numel() >= LARGE_MAPS
    form: Any = NormByRows if large else NormByMaps
    maps: Tensor = form.apply(x, scale.expand(of_maps), shift.expand(of_maps), epsilon)
    return maps


def channels_last(x: Tensor) -> bool:
    """Return True if the channels of a pixel lie together."""
    return x.shape[1] > 1 and x.stride(1) == 1


def varying(inverse: Tensor, epsilon: float) -> Tensor:
    """Return 1 for maps that vary and 0 for constant ones; `inverse` is (variance + eps)^-½."""
    return (inverse < (1.01 * epsilon) ** -0.5).to(inverse)


class NormByMaps(torch.autograd.Function):
    """`normalised` as one group norm of all maps of a batch, each contiguous in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        """Normalise (N, C, H, W) with scale and shift (N, C)."""
        ctx.format = torch.channels_last if channels_last(x) else torch.contiguous_format
        number, pixels = scale.numel(), x.shape[2] * x.shape[3]
        flat, scale, shift = (
            x.contiguous().view(1, number, pixels),
            scale.flatten(),
            shift.flatten(),
        )
        sizes = 1, number, pixels, number, epsilon
        maps, mean, inverse = torch.native_group_norm(flat, None, None, *sizes)
        inverse = inverse * (keep := varying(inverse, epsilon))
        factor = (scale * keep).view(number, 1)
        maps = torch.addcmul(shift.view(number, 1), maps.view(number, pixels), factor)
        ctx.save_for_backward(flat, mean, inverse, scale)
        # Not a view, so that an activation may be in place.
        maps = torch.ops.aten._unsafe_view(maps, x.shape)
        return maps.contiguous(memory_format=ctx.format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, scale and shift."""
        flat, mean, inverse, scale = ctx.saved_tensors
        _, number, pixels = flat.shape
        pull = gradient.contiguous().view(flat.shape)
        sizes = 1, number, pixels, number
        maps, of_scale, of_shift = torch.ops.aten.native_group_norm_backward(
            pull, flat, mean, inverse, scale, *sizes, [True, True, True]
        )
        shape = gradient.shape
        maps = maps.view(shape).contiguous(memory_format=ctx.format)
        return maps, of_scale.view(shape[:2]), of_shift.view(shape[:2]), None


class NormByRows(torch.autograd.Function):
    """`normalised` for large maps in channels-last format.

    A row of all channels (W · C values) is contiguous, and what belongs to a map is repeated along
    it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        """Normalise (N, C, H, W) with scale and shift (N, C)."""
        height, width = x.shape[2:]
        pixels = height * width
        centred = rows(x) - along(width, x.sum((2, 3)) / pixels)[0]
        result = torch.empty_like(x, memory_format=torch.channels_last)
        squares = torch.mul(centred, centred, out=rows(result))
        inverse = (maps_of(squares, width).sum((2, 3)) / pixels + epsilon).rsqrt()
        factor = inverse * varying(inverse, epsilon)
        ctx.save_for_backward(centred, factor, scale)
        offset, slope = along(width, shift, factor * scale)
        torch.addcmul(offset, centred, slope, out=rows(result))
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, scale and shift."""
        centred, factor, scale = ctx.saved_tensors
        height, width = gradient.shape[2:]
        pull = rows(gradient)
        products = pull * centred
        of_shift = maps_of(pull, width).sum((2, 3))
        of_scale = maps_of(products, width).sum((2, 3)) * factor
        by = factor * scale
        mean = by / (-height * width)
        offset, slope, back = along(width, mean * of_shift, by, mean * factor * of_scale)
        torch.addcmul(offset, pull, slope, out=products).addcmul_(centred, back)
        return maps_of(products, width), of_scale, of_shift, None


def rows(x: Tensor) -> Tensor:
    """View maps (N, C, H, W) in channels-last format as rows (N, H, W · C)."""
    return x.permute(0, 2, 3, 1).flatten(2)


def maps_of(x: Tensor, width: int) -> Tensor:
    """View rows (N, H, W · C) as maps (N, C, H, W)."""
    return x.unflatten(2, (width, -1)).permute(0, 3, 1, 2)


def along(width: int, *values: Tensor) -> Tensor:
    """Repeat each of k values (N, C) along a row: (k, N, 1, W · C)."""
    return torch.stack(values).repeat(1, 1, width).unsqueeze(2)


class InstanceNorm(nn.Module):
    """Instance norm without weights that blocks the gradients of constant maps."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); constant maps become 0."""
        return normalised(x)


def instance_norm(channels: int, affine: bool = False) -> nn.Module:
    """Return an instance norm; the affine one is PyTorch's group norm.

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


# --- convolutions and style -----------------------------------------------------------------------


def conv_chain(channels: Sequence[int], kernel: int = 4, stride: int = 2) -> list[nn.Module]:
    """Return convolutions from each number of channels to the next, each with LeakyReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding=1))
        layers.append(nn.LeakyReLU(SLOPE, inplace=True))
    return layers


class AdaIN(nn.Module):
    """Instance norm with the scale and shift of a style (Huang & Belongie, ICCV 2017)."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Normalise x (N, C, H, W) and apply scale and shift, both (N, C)."""
        return normalised(x, 1 + scale, shift)


# --- discriminators -----------------------------------------------------------------------


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
