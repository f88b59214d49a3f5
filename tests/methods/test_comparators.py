"""FDA, histogram matching and AdvEnt: their papers' operations, recomputed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_methods import batch, build, images, take_step
from torch import Tensor

from glua_bench.losses import normalised_entropy, segmentation_loss, self_information
from glua_bench.methods.advent import Advent
from glua_bench.methods.fda import FDA, exchange_amplitudes
from glua_bench.methods.histogram_matching import HistogramMatching, match_histograms

# -- histogram matching ---------------------------------------------------------------------------


def test_matched_images_have_the_templates_histogram() -> None:
    source, template = images(3), images(3, 1) ** 3
    matched = match_histograms(source, template)
    for own, got, wanted in zip(source, matched, template, strict=True):
        assert torch.equal(got.flatten().sort().values, wanted.flatten().sort().values)
        assert torch.equal(got.flatten().argsort(), own.flatten().argsort())  # rises with the tone


def test_equal_pixels_stay_equal_and_follow_the_distribution_functions() -> None:
    source = (images(1) * 2).round() / 2  # five tones
    template = images(1, 1)
    matched = match_histograms(source, template).numpy().ravel()
    tones, own = source.numpy().ravel(), np.sort(template.numpy().ravel())
    for tone in np.unique(tones):
        share = np.mean(tones <= tone)  # F_s
        expected = own[np.searchsorted(np.arange(1, own.size + 1) / own.size, share - 1e-9)]
        assert set(matched[tones == tone]) == {expected}  # F_t^-1


def test_fewer_templates_than_images_are_taken_in_turn() -> None:
    matched = match_histograms(images(3), images(2, 1))
    assert torch.equal(matched[2:], match_histograms(images(3)[2:], images(2, 1)[:1]))


def test_channels_are_matched_apart() -> None:
    source, target = images(4).view(2, 2, 32, 32), images(4, 1).view(2, 2, 32, 32)
    matched = match_histograms(source, target[:1], 2)
    for channel in (0, 1):
        own = match_histograms(source[:, channel, None], target[:1, channel, None])
        assert torch.equal(matched[:, channel, None], own)
    exchanged = exchange_amplitudes(source, target, 0.1)
    alone = exchange_amplitudes(source[:, 1:], target[:, 1:], 0.1)
    torch.testing.assert_close(exchanged[:, 1:], alone)


def test_slices_of_an_image_are_matched_by_one_curve() -> None:
    """Equal pixels of a stack stay equal, and the whole stack has the target's intensities."""
    source, target = images(6).view(2, 3, 32, 32), images(6, 1).view(2, 3, 32, 32) * 0.3 + 0.4
    source[:, 2] = source[:, 0]
    matched = match_histograms(source, target)
    assert torch.equal(matched[:, 2], matched[:, 0])
    for own, other, tones in zip(source, target, matched, strict=True):
        assert bool((tones.flatten()[own.flatten().argsort()].diff() >= 0).all())
        assert set(tones.flatten().tolist()) <= set(other.flatten().tolist())
        assert abs(float(tones.mean() - other.mean())) < 0.01


def test_histogram_matching_trains_on_matched_images() -> None:
    method = build(HistogramMatching)
    with torch.no_grad():
        own = batch()
        logits = method.segmenter(match_histograms(own.source_images, own.target)).logits
        expected = float(segmentation_loss(logits, own.source_labels))
    assert take_step(method) == pytest.approx({"segmentation": expected})


# -- FDA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.05, 0.2])
def test_amplitudes_are_exchanged_inside_the_band_alone(beta: float) -> None:
    source, target = images(), images(seed=1) * 0.3 + 0.4
    got = exchange_amplitudes(source, target, beta).numpy()[:, 0]

    def centred(x: np.ndarray) -> np.ndarray:
        return np.fft.fftshift(np.fft.fft2(x + 1), axes=(-2, -1))

    own, other = (centred(x.numpy()[:, 0].astype(np.float64)) for x in (source, target))
    amplitude, half = np.abs(own), int(beta * 32)
    low, high = 16 - half, 16 + half + 1
    amplitude[:, low:high, low:high] = np.abs(other)[:, low:high, low:high]
    expected = np.fft.ifft2(
        np.fft.ifftshift(amplitude * np.exp(1j * np.angle(own)), axes=(-2, -1))
    ).real
    assert np.abs(got - (expected - 1)).max() < 1e-5


def test_slices_take_the_amplitudes_of_the_slice_in_their_place() -> None:
    source, target = images(6).view(2, 3, 32, 32), images(6, 1).view(2, 3, 32, 32) * 0.3
    got = exchange_amplitudes(source, target, 0.1)
    for place in range(3):
        own = slice(place, place + 1)
        alone = exchange_amplitudes(source[:, own], target[:, own], 0.1)
        assert torch.allclose(got[:, own], alone, atol=1e-6)


def test_with_the_mean_alone_the_mean_is_the_targets() -> None:
    source, target = images() - 0.5, images(seed=1) * 0.3 + 0.4
    source = source.clamp(-1, 1)
    got = exchange_amplitudes(source, target, 0.0)
    assert torch.allclose(got.mean((1, 2, 3)), target.mean((1, 2, 3)), atol=1e-5)
    spread = [x - x.mean((1, 2, 3), keepdim=True) for x in (got, source)]
    assert torch.allclose(*spread, atol=1e-5)


def test_fdas_losses_are_those_of_its_paper() -> None:
    method = build(FDA, eta=1.5)
    with torch.no_grad():
        own = batch()
        exchanged = exchange_amplitudes(own.source_images, own.target, method.config.beta)
        segmentation = segmentation_loss(method.segmenter(exchanged).logits, own.source_labels)
        p = method.segmenter(own.target).logits.softmax(1).numpy()
    h = -(p * np.log(p)).sum(1) / np.log(p.shape[1])
    expected = {
        "segmentation": float(segmentation),
        "penalty": ((h**2 + 1e-6) ** 1.5).mean(),
        "entropy": h.mean(),
    }
    assert take_step(method) == pytest.approx(expected, rel=1e-4)


# -- entropy --------------------------------------------------------------------------------------


def test_entropy_is_1_where_nothing_is_known_and_0_where_all_is() -> None:
    flat, sure = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    sure[:, 2] = 100.0
    assert torch.allclose(normalised_entropy(flat), torch.ones(1, 1, 2, 2))
    assert torch.allclose(normalised_entropy(sure), torch.zeros(1, 1, 2, 2))
    assert torch.isfinite(self_information(1e4 * sure)).all()


def test_advents_discriminators_see_self_information() -> None:
    method = build(Advent, width_discriminator=8)
    assert set(method.discriminators) == {"main", "aux"}
    p = torch.randn(1, 4, 2, 2).softmax(1)
    expected = -(p * p.log2()) / np.log2(4)
    assert torch.allclose(method.discriminator_input(p.log()), expected, atol=1e-6)
    seen: list[Tensor] = []
    method.discriminators["main"].register_forward_hook(lambda _, given, out: seen.append(given[0]))
    take_step(method)
    assert len(seen) == 3
    for given in seen:
        assert bool((given.sum(1) <= 1 + 1e-6).all()) and bool((given >= 0).all())


def test_the_direct_form_has_no_discriminator_and_adds_entropies() -> None:
    method = build(Advent, form="direct")
    assert len(method.discriminators) == 0
    assert set(method.optimizers()) == {"segmenter"}
    with torch.no_grad():
        own = batch()
        source, target = method.outputs(own.source_images), method.outputs(own.target)
        expected = {
            f"segmentation_{n}": float(segmentation_loss(v, own.source_labels))
            for n, v in source.items()
        }
        for name, output in target.items():
            p = output.softmax(1).numpy()
            expected[f"entropy_{name}"] = (-(p * np.log(p)).sum(1)).mean() / np.log(p.shape[1])
    assert take_step(method) == pytest.approx(expected, rel=1e-4)


def test_the_direct_form_makes_predictions_surer() -> None:
    last = {}
    for weight in (0.0, 10.0):
        method = build(Advent, form="direct", lambda_entropy=weight)
        for _ in range(20):
            last[weight] = take_step(method)["entropy_main"]
    assert last[10.0] < 0.85 * last[0.0]
