"""networks.py: shapes, and that what is computed cheaply is what is written on the card."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glua_bench import networks
from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.networks import (
    AdaIN,
    ContentEncoder,
    FeatureDiscriminator,
    MultiScaleDiscriminator,
    PatchDiscriminator,
    StyleDecoder,
    StyleEncoder,
    UNet,
    UpsampleConv5,
    build_segmenter,
)

SPECS = [SegmenterSpec("unet", 4, 3), SegmenterSpec("unet", 5, 4), SegmenterSpec("timm:resnet18")]


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


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.depth}")
def test_segmenters_of_several_slices_label_one(spec: SegmenterSpec) -> None:
    segmenter = build_segmenter(spec, 5, 3).eval()
    stack = images(6, 64).view(2, 3, 64, 64)
    logits = segmenter(stack).logits
    assert logits.shape == (2, 5, 64, 64)
    assert not torch.equal(logits, segmenter(stack.roll(1, 1)).logits)  # their order counts
    with pytest.raises(RuntimeError, match="channels"):
        segmenter(images(2, 64))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.depth}")
def test_every_weight_of_a_segmenter_is_trained(spec: SegmenterSpec) -> None:
    segmenter = build_segmenter(spec, 3)
    F.cross_entropy(segmenter(images(2, 64)).logits, torch.randint(3, (2, 64, 64))).backward()
    # timm begins with residual blocks at zero, whose first gradients are zero too.
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []


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
    """So a source and a target batch may go through the U-Net in one pass."""
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
    ],
)
def test_a_segmenter_that_cannot_be_built_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        build_segmenter(SegmenterSpec(name), 3)
    assert str(error.value).startswith(f"segmenter.name = '{name}'")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_weights_that_cannot_be_loaded_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*arguments: object, **named: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"segmenter\.pretrained=false") as error:
        build_segmenter(SegmenterSpec("timm:resnet18", pretrained=True), 3)
    assert "\n" not in str(error.value)


# -- equal to what they stand for -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 4)])
def test_the_folded_upsampling_is_upsampling_and_a_5x5_convolution(
    shape: tuple[int, int],
) -> None:
    """Values, and gradients of the input and of the weights."""
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


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_torchs(affine: bool) -> None:
    x = torch.randn(3, 5, 7, 6) * 4 + 2
    torch.testing.assert_close(
        networks.instance_norm(5, affine)(x), nn.InstanceNorm2d(5, affine=affine)(x)
    )


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
    """A linear change of intensity leaves the content alone; that is what style is for."""
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
    assert FeatureDiscriminator(6, 0.1)(torch.randn(2, 6, 8, 8)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", ["patch", "features"])
def test_real_and_fake_images_of_a_batch_do_not_see_each_other(kind: str) -> None:
    """`losses.real_fake_loss` scores both in one pass."""
    network: nn.Module = PatchDiscriminator(1, 4, 2)
    if kind == "features":
        network = FeatureDiscriminator(1, 0.1)
    x = images(4)
    torch.testing.assert_close(network(x), torch.cat([network(x[:1]), network(x[1:])]))
