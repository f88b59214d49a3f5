"""augment.py: labels move with images, values stay in range, and seeds are reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench import augment
from glua_bench.augment import geometric, random_affine, tone_curves


def discs(count: int = 8, size: int = 64) -> Tensor:
    """Return labels of two nested discs at random places."""
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(size // 3, 2 * size // 3, (count, 2), generator=generator)
    distance = torch.stack([torch.hypot(y - a, x - b) for a, b in centres.float()])
    return (distance < size / 4).long() + (distance < size / 8).long()


def pictures(labels: Tensor) -> Tensor:
    """Return images with the values -1, 0 and 1 of their labels."""
    return labels[:, None].float() - 1


# -- geometric ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_labels_follow_their_images(seed: int) -> None:
    labels = discs()
    torch.manual_seed(seed)
    images, moved = geometric(pictures(labels), labels)
    assert moved is not None
    assert images.shape == (8, 1, 64, 64) and moved.shape == labels.shape
    assert moved.dtype == labels.dtype and set(moved.unique().tolist()) == {0, 1, 2}
    shown = (images[:, 0] + 1).round().long()
    assert (shown == moved).float().mean() > 0.98  # the rest are pixels on a border
    assert (moved != labels).flatten(1).any(1).all()  # every image was moved


def test_what_moves_in_from_outside_is_background() -> None:
    labels = torch.ones(32, 48, 48, dtype=torch.long)
    torch.manual_seed(0)
    images, moved = geometric(torch.ones(32, 1, 48, 48), labels)
    assert moved is not None and (moved == 0).any()
    assert images.min() == -1 and images.max() == 1
    agree = (images[:, 0] > 0) == (moved == 1)
    assert agree.float().mean() > 0.97


def test_images_are_moved_alike_with_and_without_labels() -> None:
    labels = discs()
    torch.manual_seed(1)
    with_labels, _ = geometric(pictures(labels), labels)
    torch.manual_seed(1)
    without, none = geometric(pictures(labels))
    assert none is None and torch.equal(with_labels, without)


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_moved_by_parts_as_all_at_once(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results do not depend on the number of images per chunk, nor on the image's shape."""
    monkeypatch.setattr(augment, "CACHED", 0)
    labels = discs()[:, :48]
    images = torch.rand(8, 3, 48, 64) * 2 - 1
    before = torch.get_num_threads()
    torch.manual_seed(2)
    try:
        torch.set_num_threads(threads)
        moved, moved_labels = geometric(images, labels)
    finally:
        torch.set_num_threads(before)
    torch.manual_seed(2)
    grid = F.affine_grid(random_affine(8), list(images.shape), align_corners=False)
    expected = F.grid_sample(images + 1, grid, align_corners=False) - 1
    # In noise, a rounding of the positions shows as much as it can.
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)
    nearest = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    assert moved_labels is not None
    assert (moved_labels == nearest[:, 0].long()).float().mean() > 0.999  # but for ties


def test_every_image_has_its_own_map() -> None:
    torch.manual_seed(0)
    images, _ = geometric(pictures(discs(1)).expand(6, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in images}) == 6


def test_maps_are_within_their_bounds_and_use_them() -> None:
    torch.manual_seed(0)
    theta = random_affine(5000)
    turn, shift = theta[:, :, :2], theta[:, :, 2]
    angle = torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0]))
    scale = 1 / torch.hypot(turn[:, 0, 0], turn[:, 1, 0])
    assert 14 < angle.abs().max() <= 15.001 and abs(angle.mean()) < 1
    assert 0.849 <= scale.min() < 0.87 and 1.13 < scale.max() <= 1.151
    # A shift by a tenth of the side is two tenths of half the side.
    assert 0.19 < shift.abs().max() <= 0.2001
    # Neither sheared nor mirrored.
    torch.testing.assert_close(turn.det(), 1 / scale**2)
    torch.testing.assert_close((turn[:, :, 0] * turn[:, :, 1]).sum(1), torch.zeros(5000))


# -- tone curves ----------------------------------------------------------------------------------


def ramps(count: int = 200, size: int = 32) -> Tensor:
    return torch.linspace(-1, 1, size * size).view(1, 1, size, size).repeat(count, 1, 1, 1)


def test_tones_stay_in_range() -> None:
    torch.manual_seed(0)
    images = torch.cat([ramps(8), torch.full((2, 1, 32, 32), 1.5), -torch.ones(2, 1, 32, 32)])
    found = tone_curves(images)
    assert found.shape == images.shape and torch.isfinite(found).all()
    assert found.min() >= -1 and found.max() <= 1


def test_a_tone_curve_is_one_continuous_function_of_the_intensity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augment, "NOISE", 0.0)
    torch.manual_seed(0)
    order = torch.randperm(32 * 32)
    images = ramps(50).flatten(2)[..., order].view(50, 1, 32, 32)
    found = tone_curves(images).flatten(1)[:, order.argsort()]
    # Steeper than from one limit to the other within one piece it cannot be.
    steepest = 2 / (2 / (augment.KNOTS - 1)) * (2 / (32 * 32 - 1))
    assert found.diff().abs().max() <= steepest + 1e-5
    torch.manual_seed(0)
    twice = tone_curves(torch.cat([images, images], 2))
    assert torch.equal(twice[:, :, :32], twice[:, :, 32:])


def test_slices_of_an_image_share_its_map_and_its_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "NOISE", 0.0)
    labels = discs(4)
    images = pictures(labels).expand(-1, 3, -1, -1).clone()
    images[:, 2] = images[:, 2].flip(1)
    torch.manual_seed(0)
    moved, moved_labels = geometric(images, labels)
    assert moved_labels is not None and moved_labels.shape == labels.shape
    torch.manual_seed(0)
    alone, alone_labels = geometric(images[:, 1:2], labels)
    assert torch.equal(moved[:, 1:2], alone) and torch.equal(moved_labels, alone_labels)
    assert torch.equal(moved[:, 0], moved[:, 1])
    torch.manual_seed(1)
    toned = tone_curves(images)
    assert torch.equal(toned[:, 0], toned[:, 1]) and torch.equal(toned[:, 2], toned[:, 0].flip(1))
    assert not torch.equal(toned, images)


def test_channels_are_moved_together_and_recoloured_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augment, "NOISE", 0.0)
    labels = discs(4)
    images = pictures(labels).expand(-1, 6, -1, -1).clone()  # three slices of two channels
    torch.manual_seed(0)
    moved, _ = geometric(images, labels)
    assert all(torch.equal(moved[:, 0], moved[:, plane]) for plane in range(1, 6))
    torch.manual_seed(1)
    toned = tone_curves(images, 2)
    first, second = toned.unflatten(1, (2, 3)).unbind(1)
    for channel in (first, second):
        assert torch.equal(channel[:, 0], channel[:, 1])
    assert not torch.equal(first, second)
    # One channel draws the same random numbers as before there were several.
    torch.manual_seed(1)
    one = tone_curves(images[:, :3], 1)
    torch.manual_seed(1)
    assert torch.equal(one, tone_curves(images[:, :3]))


def test_channels_are_split_in_order() -> None:
    images = torch.arange(2 * 6).view(2, 6, 1, 1).float()
    apart = augment.by_channel(images, 2)
    assert apart.flatten(1).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert torch.equal(apart.view_as(images), images)
    assert augment.by_channel(images, 1) is images


def test_some_images_keep_their_tones_and_some_curves_fall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contrast may invert, as between modalities."""
    monkeypatch.setattr(augment, "NOISE", 0.0)
    torch.manual_seed(0)
    images = ramps(400)
    found = tone_curves(images)
    kept = (found - images).abs().flatten(1).amax(1) < 1e-5
    assert kept.float().mean().item() == pytest.approx(1 - augment.CURVE_SHARE, abs=0.06)
    slope = found.flatten(1)[:, -1] - found.flatten(1)[:, 0]
    falling = (slope[~kept] < 0).float().mean().item()
    assert 0.4 < falling < 0.6


def test_noise_is_little_and_everywhere() -> None:
    torch.manual_seed(0)
    noise = torch.cat([(tone_curves(torch.zeros(1, 1, 64, 64))).flatten() for _ in range(20)])
    spread = noise.view(20, -1).std(1)
    assert (spread > 0).all() and spread.max() < 1.2 * augment.NOISE


# -- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda x: geometric(x)[0], tone_curves])
def test_the_seed_decides(change: Callable[[Tensor], Tensor]) -> None:
    images, found = pictures(discs(3)), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(change(images.clone()))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(images, pictures(discs(3))) and math.isfinite(found[2].sum())


@pytest.mark.parametrize("kind", ["geometric", "tones"])
def test_what_is_given_is_left_as_it_was(kind: str) -> None:
    labels = discs(2)
    images = pictures(labels)
    geometric(images, labels) if kind == "geometric" else tone_curves(images)
    assert torch.equal(labels, discs(2)) and torch.equal(images, pictures(discs(2)))
