"""networks.py: shapes, and equality of fast and plain implementations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glua_bench import networks
from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.methods.components.style_code_networks import (
    ContentEncoder,
    MultiScaleDiscriminator,
    PatchDiscriminator,
    StyleDecoder,
    StyleEncoder,
    UpsampleConv5,
)
from glua_bench.networks import (
    DILATIONS,
    AdaIN,
    DeepLab,
    DilatedClassifier,
    FeatureDiscriminator,
    OutputDiscriminator,
    Segmenter,
    UNet,
    build_segmenter,
)

SPECS = [SegmenterSpec("unet", 4, 3), SegmenterSpec("unet", 5, 4), SegmenterSpec("timm:resnet18")]
ALL = [*SPECS, SegmenterSpec("deeplab:resnet18")]


def images(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- segmenters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.depth}")
def test_segmenters_give_logits_and_features_from_coarse_to_fine(spec: SegmenterSpec) -> None:
    segmenter = build_segmenter(spec, 5)
    logits, features = segmenter(images(2, 64))
    assert logits.shape == (2, 5, 64, 64) and torch.isfinite(logits).all()
    sides = [feature.shape[-1] for feature in features]
    assert sides[-1] == 64 and sides == [64 // 2**i for i in reversed(range(len(sides)))]
    assert [feature.shape[1] for feature in features] == segmenter.feature_channels
    if spec.name == "unet":
        assert len(features) == spec.depth and features[-1].shape[1] == spec.width


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: f"{spec.name}-{spec.depth}")
def test_segmenters_of_several_slices_label_one(spec: SegmenterSpec) -> None:
    segmenter = build_segmenter(spec, 5, 3).eval()
    stack = images(6, 64).view(2, 3, 64, 64)
    logits = segmenter(stack).logits
    assert logits.shape == (2, 5, 64, 64)
    assert not torch.equal(logits, segmenter(stack.roll(1, 1)).logits)  # their order counts
    with pytest.raises(RuntimeError, match="channels"):
        segmenter(images(2, 64))


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: f"{spec.name}-{spec.depth}")
def test_every_weight_of_a_segmenter_is_trained(spec: SegmenterSpec) -> None:
    segmenter = build_segmenter(spec, 3)
    F.cross_entropy(segmenter(images(2, 64)).logits, torch.randint(3, (2, 64, 64))).backward()
    # timm begins with residual blocks at zero, whose first gradients are zero too.
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("spec", ALL, ids=lambda spec: f"{spec.name}-{spec.depth}")
def test_the_two_halves_of_a_segmenter_are_the_whole(spec: SegmenterSpec, slices: int) -> None:
    segmenter = build_segmenter(spec, 5, slices).eval()
    x = images(2 * slices, 64).view(2, slices, 64, 64)
    maps = segmenter.encode(x)
    assert [found.shape[1] for found in maps] == segmenter.encoder_channels
    sides = [found.shape[-1] for found in maps]
    assert sides == sorted(sides, reverse=True)
    whole, halves = segmenter(x), segmenter.decode(maps, (64, 64))
    assert torch.equal(whole.logits, halves.logits)
    for a, b in zip(whole.features, halves.features, strict=True):
        assert torch.equal(a, b)
    assert [found.shape[1] for found in whole.features] == segmenter.feature_channels
    # The coarsest map is what the decoder begins with, and the head makes logits of the last one.
    assert torch.equal(whole.features[0], maps[-1])
    logits = segmenter.head(whole.features[-1])
    if spec.name.startswith("deeplab"):
        logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=True)
    assert torch.equal(logits, whole.logits)
    assert not torch.equal(segmenter.decode([*maps[:-1], 2 * maps[-1]], (64, 64)).logits, logits)


def test_a_segmenter_without_halves_says_so() -> None:
    for call in (lambda: Segmenter().encode(images()), lambda: Segmenter().decode([], (1, 1))):
        with pytest.raises(NotImplementedError):
            call()


def test_a_segmenter_overfits_one_image() -> None:
    segmenter, image = UNet(2, 4, 3), images(1)
    labels = (image[:, 0] > 0).long()
    optimizer = torch.optim.Adam(segmenter.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(segmenter(image).logits, labels)
        loss.backward()
        optimizer.step()
    assert (segmenter(image).logits.argmax(1) == labels).float().mean() > 0.95


def test_images_of_a_batch_do_not_see_each_other() -> None:
    """Source and target batches may share a forward pass of the U-Net."""
    segmenter = UNet(3, 4, 3)
    both = segmenter(images(4)).logits
    apart = torch.cat([segmenter(images(4)[:1]).logits, segmenter(images(4)[1:]).logits])
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: str(spec.depth))
def test_memory_format_changes_no_value(spec: SegmenterSpec) -> None:
    segmenter = build_segmenter(spec, 3)
    expected = segmenter(images()).logits
    segmenter.to(memory_format=torch.channels_last)
    found = segmenter(images().to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "timm:resnet18"),
        ("timm:", "timm:<encoder>"),
        ("timm:resnet1888", "not a model of timm"),
        ("timm:vit_tiny_patch16_224", "strides"),
        ("deeplabv3", "deeplab, or deeplab:<resnet>"),
        ("deeplab:", "deeplab, or deeplab:<resnet>"),
        ("deeplab:resnet1888", r"Unknown model .*; choose a ResNet of timm, such as"),
        ("deeplab:regnetx_002", r"\(it is not a ResNet\); choose a ResNet of timm"),
        ("deeplab:vit_tiny_patch16_224", r"; choose a ResNet of timm, such as deeplab:resnet50\.$"),
        # timm's own of this class, with other blocks in it.
        ("deeplab:resnest14d", r"\(its blocks are not those of a plain ResNet\); choose"),
        ("deeplab:res2net50_26w_4s", r"\(its blocks are not those of a plain ResNet\); choose"),
        ("deeplab:skresnet18", r"\(its blocks are not those of a plain ResNet\); choose"),
        ("deeplab:resnetaa50", r"\(its blocks are not those of a plain ResNet\); choose"),
    ],
)
def test_a_segmenter_that_cannot_be_built_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        build_segmenter(SegmenterSpec(name), 3)
    assert str(error.value).startswith(f"segmenter.name = '{name}'")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("kind", ["timm", "deeplab"])
def test_weights_that_cannot_be_loaded_are_one_sentence(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **named: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"segmenter\.pretrained=false") as error:
        build_segmenter(SegmenterSpec(f"{kind}:resnet18", pretrained=True), 3)
    assert "\n" not in str(error.value)


# -- DeepLab --------------------------------------------------------------------------------------


def deeplab(name: str = "resnet18", dilations: int = 4, slices: int = 1) -> DeepLab:
    made = build_segmenter(SegmenterSpec(f"deeplab:{name}", dilations=dilations), 5, slices)
    assert isinstance(made, DeepLab)
    return made


@pytest.mark.parametrize(("size", "side"), [(32, 5), (64, 9), (256, 33), (264, 34), (268, 34)])
def test_deeplab_has_maps_at_an_eighth_of_the_resolution(size: int, side: int) -> None:
    """Sides are rounded up, as in the published code."""
    with torch.device("meta"):
        segmented = deeplab()(torch.zeros(2, 1, size, size))
    assert segmented.logits.shape == (2, 5, size, size)
    assert [found.shape for found in segmented.features] == [(2, 512, side, side)] * 2


RESNETS = {
    # Name: channels at the end of the encoder and before the classifier.
    "resnet18": (512, 512),
    "resnet10t": (256, 512),  # its last stage has one block, which is behind the end
    "resnet34": (512, 512),
    "resnet50": (2048, 2048),
    "resnet50d": (2048, 2048),
    "resnet101": (2048, 2048),
    "resnext50_32x4d": (2048, 2048),
    "seresnet50": (2048, 2048),
    "wide_resnet50_2": (2048, 2048),
    "resnetblur50": (2048, 2048),
}


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("name", RESNETS)
def test_deeplab_takes_any_resnet_of_timm(name: str, slices: int) -> None:
    with torch.device("meta"):
        made = deeplab(name, slices=slices)
        segmented = made(torch.zeros(2, slices, 96, 96))
    assert (*made.encoder_channels, made.feature_channels[-1]) == RESNETS[name]
    assert segmented.logits.shape == (2, 5, 96, 96)
    for found, channels in zip(segmented.features, RESNETS[name], strict=True):
        assert found.shape == (2, channels, 13, 13)


def test_deeplab_alone_is_a_resnet101() -> None:
    with torch.device("meta"):
        plain, named = (
            build_segmenter(SegmenterSpec(n), 5) for n in ("deeplab", "deeplab:resnet101")
        )
    shapes = [{n: v.shape for n, v in net.state_dict().items()} for net in (plain, named)]
    assert shapes[0] == shapes[1]
    assert [len(plain.get_submodule(f"layer{n}")) for n in range(1, 6)] == [3, 4, 23, 2, 1]  # type: ignore[arg-type]


def convolutions(stage: Any) -> list[tuple[Any, ...]]:
    """Return stride, dilation and padding of the convolutions of each block of a stage."""
    return [
        tuple((c.stride[0], c.dilation[0], c.padding[0]) for c in convs)
        for convs in (
            [m for n, m in block.named_children() if n.startswith("conv")] for block in stage
        )
    ]


def test_strides_and_dilations_of_a_bottleneck() -> None:
    """The stride is in the first convolution; the last two stages are dilated."""
    net = deeplab("resnet50")
    first, last = (1, 1, 0), (1, 1, 0)
    assert (net.conv1.stride, net.pool.stride, net.pool.ceil_mode) == ((2, 2), 2, True)
    assert convolutions(net.layer1) == [(first, (1, 1, 1), last)] * 3
    assert (
        convolutions(net.layer2) == [((2, 1, 0), (1, 1, 1), last)] + [(first, (1, 1, 1), last)] * 3
    )
    assert convolutions(net.layer3) == [(first, (1, 2, 2), last)] * 6
    assert convolutions(net.layer4) == [(first, (1, 4, 4), last)] * 2
    assert convolutions(net.layer5) == [(first, (1, 4, 4), last)]
    strides = [net.get_submodule(f"layer{n}.0.downsample.0").stride for n in range(1, 6)]
    assert strides == [(1, 1), (2, 2), (1, 1), (1, 1), (1, 1)]
    assert [c.dilation for c in net.head.convolutions] == [(d, d) for d in DILATIONS]
    assert [c.padding for c in net.head.convolutions] == [(d, d) for d in DILATIONS]
    assert DILATIONS == (6, 12, 18, 24)


def test_strides_and_dilations_of_a_basic_block() -> None:
    net = deeplab("resnet18")
    assert convolutions(net.layer1) == [((1, 1, 1), (1, 1, 1))] * 2
    assert convolutions(net.layer2) == [((2, 1, 1), (1, 1, 1)), ((1, 1, 1), (1, 1, 1))]
    assert convolutions(net.layer3) == [((1, 2, 2), (1, 2, 2))] * 2
    assert convolutions(net.layer4) == convolutions(net.layer5) == [((1, 4, 4), (1, 4, 4))]


def test_a_dilated_convolution_sees_so_far_and_no_further() -> None:
    """Gradients show the receptive field."""
    for summed, reach in ((2, 12), (4, 24)):
        classifier = DilatedClassifier(2, 3, summed)
        x = torch.randn(1, 2, 65, 65, requires_grad=True)
        classifier(x)[0, :, 32, 32].sum().backward()
        assert x.grad is not None
        rows, columns = torch.nonzero(x.grad[0].abs().sum(0), as_tuple=True)
        offsets = {*(rows - 32).tolist(), *(columns - 32).tolist()}
        kept = DILATIONS[:summed]
        assert offsets == {0, *kept, *(-d for d in kept)} and max(offsets) == reach


def test_two_of_four_dilations_leave_the_others_untrained() -> None:
    net = deeplab(dilations=2)
    trained = [[p.requires_grad for p in c.parameters()] for c in net.head.convolutions]
    assert trained == [[True, True]] * 2 + [[False, False]] * 2
    F.cross_entropy(net(images(2, 64)).logits, torch.randint(5, (2, 64, 64))).backward()
    assert {n for n, p in net.named_parameters() if p.grad is None} == {
        f"head.convolutions.{n}.{part}" for n in (2, 3) for part in ("weight", "bias")
    }
    # They are in the state all the same, so that weights of both forms fit each other.
    assert net.state_dict().keys() == deeplab(dilations=4).state_dict().keys()


def test_without_pretrained_weights_deeplab_begins_as_published() -> None:
    """Convolution weights have standard deviation 0.01, and norms are the identity."""
    net = deeplab("resnet50")
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            within = 4 * 0.01 / (2 * weight.numel()) ** 0.5  # four standard errors
            assert weight.std().item() == pytest.approx(0.01, abs=max(within, 1e-4)), name
            assert abs(weight.mean().item()) < 5 * 0.01 / weight.numel() ** 0.5, name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


def test_pretrained_weights_are_kept_and_the_added_projection_is_the_identity() -> None:
    resnet = timm.create_model("resnet18", in_chans=1, num_classes=0, output_stride=8)
    kept = copy.deepcopy(resnet.state_dict())
    net = DeepLab(resnet, 5, pretrained=True)
    own = net.state_dict()
    for name, value in kept.items():
        moved = name.replace("layer4.1.", "layer5.0.")
        assert torch.equal(own[moved], value), name
    added = set(own) - {name.replace("layer4.1.", "layer5.0.") for name in kept}
    assert {name.rpartition(".")[0] for name in added} == {
        "layer5.0.downsample.0",
        "layer5.0.downsample.1",
        *(f"head.convolutions.{n}" for n in range(4)),
    }
    net.eval()
    x = torch.randn(2, 512, 9, 9)
    torch.testing.assert_close(net.layer5[0].downsample(x), x, rtol=1e-4, atol=1e-4)
    without = copy.deepcopy(net.layer5[0])
    without.downsample = None
    torch.testing.assert_close(net.layer5(x), without(x), rtol=1e-4, atol=1e-4)


def test_a_last_block_with_a_projection_keeps_it() -> None:
    """In resnet10t the last stage has one block, which changes the number of channels."""
    resnet = timm.create_model("resnet10t", in_chans=1, num_classes=0, output_stride=8)
    kept = copy.deepcopy(resnet.layer4[0].downsample.state_dict())
    net = DeepLab(resnet, 5, pretrained=True)
    assert len(net.layer4) == 0
    found = net.layer5[0].downsample.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(found[name], value) for name, value in kept.items())


def test_deeplab_is_the_resnet_that_it_is_made_of_where_nothing_differs() -> None:
    """For basic blocks and odd sizes, features equal those of the dilated ResNet."""
    resnet = timm.create_model("resnet18", in_chans=1, num_classes=0, output_stride=8).eval()
    expected = copy.deepcopy(resnet)
    for stage, dilation in ((expected.layer3, 2), (expected.layer4, 4)):
        stage[0].conv1.dilation = stage[0].conv1.padding = (dilation, dilation)
    net = DeepLab(resnet, 5, pretrained=True).eval()
    x = images(2, 61)  # 31 after the first convolution, so 16 either way
    with torch.no_grad():
        found = net(x).features[-1]
        torch.testing.assert_close(found, expected.forward_features(x), rtol=1e-4, atol=1e-4)


# -- equal to what they stand for -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 4)])
def test_the_folded_upsampling_is_upsampling_and_a_5x5_convolution(
    shape: tuple[int, int],
) -> None:
    """Values and gradients of input and weights agree."""
    layer = UpsampleConv5(3, 4).double()
    x = torch.randn(2, 3, *shape, dtype=torch.double, requires_grad=True)
    weight = layer.weight.detach().clone().requires_grad_()
    x_plain = x.detach().clone().requires_grad_()

    found = layer(x)
    large = F.interpolate(x_plain, scale_factor=2, mode="nearest")
    expected = F.conv2d(F.pad(large, (2, 2, 2, 2), mode="replicate"), weight)
    assert found.shape == (2, 4, 2 * shape[0], 2 * shape[1])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    pull = torch.randn_like(found)
    found.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(x.grad, x_plain.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_torchs(
    affine: bool, format: torch.memory_format, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of varying maps agree in each of the forms."""
    monkeypatch.setattr(networks, "LARGE_MAPS", 0 if large else 1 << 18)
    x = (torch.randn(3, 5, 7, 6) * 4 + 2).contiguous(memory_format=format).requires_grad_()
    y = x.detach().clone().requires_grad_()
    norm, weight, bias = networks.instance_norm(5, affine), *torch.randn(2, 5)
    plain = torch.nn.GroupNorm(5, 5, affine=affine)
    for layer in (norm, plain) if affine else ():
        layer.load_state_dict({"weight": weight, "bias": bias})
    found, expected = norm(x), plain(y)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=format)
    pull = torch.randn_like(found)
    found.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    for own, others in zip(norm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, others.grad, rtol=1e-5, atol=1e-5)
    torch.nn.functional.leaky_relu_(norm(x), 0.2).sum().backward()  # as in `conv_block`


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [0.0, 0.3, -1.0, 100.0])
def test_constant_maps_become_0_and_pass_no_gradient(
    value: float, format: torch.memory_format, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "LARGE_MAPS", 0 if large else 1 << 18)
    x = torch.randn(2, 3, 7, 6).contiguous(memory_format=format)
    x[0, 1] = value
    x.requires_grad_()
    found = networks.instance_norm(3)(x)
    assert (found[0, 1] == 0).all()
    expected = F.instance_norm(x)
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0, ::2], expected[0, ::2])
    found.backward(torch.randn_like(found))
    assert x.grad is not None and not x.grad[0, 1].any()
    others = [x.grad[n, c] for n in range(2) for c in range(3) if (n, c) != (0, 1)]
    assert all(gradient.any() for gradient in others)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_maps_pass_no_gradient_through_adain(value: float) -> None:
    x = torch.randn(2, 3, 7, 6)
    x[1, 0] = value
    x.requires_grad_()
    scale, shift = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    found = AdaIN()(x, scale, shift)
    torch.testing.assert_close(found[1, 0], shift[1, 0].expand(7, 6))
    found.backward(torch.randn_like(found))
    assert x.grad is not None and not x.grad[1, 0].any() and x.grad[0].any()
    assert scale.grad is not None and scale.grad[1, 0] == 0 and (scale.grad[0] != 0).all()
    assert shift.grad is not None and (shift.grad != 0).all()


@pytest.mark.parametrize(("spread", "passes"), [(1e-5, False), (1e-3, True), (1.0, True)])
def test_a_map_counts_as_constant_below_a_hundredth_of_eps(spread: float, passes: bool) -> None:
    """The threshold applies to the variance; a map of 0 ± 0.003 has variance eps = 1e-5."""
    x = (torch.randn(1, 1, 16, 16) * spread).requires_grad_()
    networks.instance_norm(1)(x).backward(torch.randn(1, 1, 16, 16))
    assert x.grad is not None and bool(x.grad.any()) == passes


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_single(kind: torch.dtype) -> None:
    x = (torch.randn(2, 3, 8, 8) * 4 + 2).to(kind)
    found = networks.instance_norm(3)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.instance_norm(x.float()))
    assert networks.instance_norm(3)(x.double()).dtype == torch.float64


def gradient_through(norm: Any, x: Tensor) -> float:
    """Return the largest gradient through many convolutions with reflection padding."""
    torch.manual_seed(0)
    body: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")]
    for _ in range(20):
        convolution = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        body += [norm(4), nn.LeakyReLU(0.2), convolution]
    net = nn.Sequential(*body)
    x = x.clone().requires_grad_()
    net(x).square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in (x, *net.parameters()) if p.grad is not None])
    return float(gradients.abs().max().nan_to_num(float("inf")))


CONSTANT = torch.full((1, 1, 16, 16), 0.1)


@pytest.mark.parametrize("others", [0, 1])
def test_gradients_of_a_constant_image_stay_finite_through_many_layers(others: int) -> None:
    x = torch.cat([CONSTANT, images(others, 16)])
    assert 0 < gradient_through(networks.instance_norm, x) < 100


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(c, c), nn.InstanceNorm2d])
def test_gradients_of_a_constant_image_explode_through_plain_norms(norm: Any) -> None:
    """The test above can fail."""
    assert gradient_through(norm, CONSTANT) > 1e10
    assert gradient_through(norm, images(1, 16)) < 100


def test_adain_gives_each_image_its_own_mean_and_spread() -> None:
    scale, shift = torch.randn(3, 5), torch.randn(3, 5)
    found = AdaIN()(torch.randn(3, 5, 16, 16) * 3 + 1, scale, shift)
    torch.testing.assert_close(found.mean((2, 3)), shift, atol=1e-4, rtol=0)
    spread = found.std((2, 3), unbiased=False)
    torch.testing.assert_close(spread, (1 + scale).abs(), atol=1e-3, rtol=1e-3)


# -- style ----------------------------------------------------------------------------------------


def test_content_and_style_make_an_image_again() -> None:
    width, style = 4, 3
    content = ContentEncoder(width, 1)(images(2, 32))
    assert content.shape == (2, 4 * width, 8, 8)
    code = StyleEncoder(width, style)(images(2, 32))
    assert code.shape == (2, style)
    made = StyleDecoder(width, style, 1)(content, code)
    assert made.shape == (2, 1, 32, 32) and made.abs().max() <= 1


def test_content_does_not_know_contrast_and_style_does() -> None:
    """A linear change of intensity affects the style but not the content."""
    content, style = ContentEncoder(4, 1), StyleEncoder(4, 3)
    first, second = content(images()), content(images() * 0.5 + 0.1)
    torch.testing.assert_close(first, second, atol=1e-2, rtol=1e-2)
    assert (style(images()) - style(images() * 0.5 + 0.1)).abs().max() > 1e-4


def test_another_style_makes_another_image() -> None:
    decoder, content = StyleDecoder(4, 3, 1), ContentEncoder(4, 1)(images(1))
    made = decoder(content.expand(2, -1, -1, -1), torch.tensor([[0.0, 0, 0], [2.0, -2, 1]]))
    assert (made[0] - made[1]).abs().max() > 1e-3


# -- discriminators -------------------------------------------------------------------------------


def test_discriminators_score_places() -> None:
    assert PatchDiscriminator(1, 4, 3)(images(2, 64)).shape == (2, 1, 8, 8)
    scores = MultiScaleDiscriminator(4, 2, 3)(images(2, 64))
    assert [score.shape for score in scores] == [(2, 1, s, s) for s in (16, 8, 4)]
    assert FeatureDiscriminator(6)(torch.randn(2, 6, 8, 8)).shape == (2, 1, 8, 8)
    assert OutputDiscriminator(5, 4)(torch.randn(2, 5, 64, 96)).shape == (2, 1, 2, 3)


@pytest.mark.parametrize(
    ("inputs", "channels"), [(512, [256, 128, 64, 1]), (16, [8, 4, 2, 1]), (3, [1, 1, 1, 1])]
)
def test_channels_of_the_feature_discriminator(inputs: int, channels: list[int]) -> None:
    layers = [m for m in FeatureDiscriminator(inputs) if isinstance(m, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == channels


@pytest.mark.parametrize("kind", ["patch", "features"])
def test_real_and_fake_images_of_a_batch_do_not_see_each_other(kind: str) -> None:
    """`losses.real_fake_loss` scores both in one forward pass."""
    network: nn.Module = PatchDiscriminator(1, 4, 2)
    if kind == "features":
        network = FeatureDiscriminator(1)
    x = images(4)
    torch.testing.assert_close(network(x), torch.cat([network(x[:1]), network(x[1:])]))
