"""CUT: PatchNCE by hand, its layers and gradients, and a step's losses and updates."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_methods import TASK, batch, context_of, images
from torch import Tensor, nn

from glua_bench.conformance import first_difference
from glua_bench.methods import cut
from glua_bench.methods.cut import CUT, CUTConfig

SMALL = {"cut_width": 4, "cut_blocks": 5, "cut_width_d": 4, "cut_width_heads": 8}


def build(**config: Any) -> CUT:
    torch.manual_seed(0)
    return CUT(TASK, CUTConfig(**{**SMALL, **config}))


# -- PatchNCE -------------------------------------------------------------------------------------


def nce_by_hand(queries: np.ndarray, keys: np.ndarray, temperature: float) -> float:
    """Compute the loss of one image, position by position, from features (P, D)."""
    total = 0.0
    for s, query in enumerate(queries):
        scores = [math.exp(float(query @ key) / temperature) for key in keys]
        total -= math.log(scores[s] / sum(scores))
    return total / len(queries)


def test_contrast_is_the_equation_in_each_image() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 2, 5, 3, dtype=torch.double)
    expected = [nce_by_hand(q.numpy(), k.numpy(), 0.5) for q, k in zip(queries, keys, strict=True)]
    assert cut.contrast(queries, keys, 0.5).tolist() == pytest.approx(expected)


def test_two_orthogonal_positions_have_the_loss_of_two_logits() -> None:
    eye = torch.eye(2)[None]
    expected = math.log(1 + math.exp(-1 / 0.07))
    assert float(cut.contrast(eye.double(), eye.double(), 0.07)) == pytest.approx(expected)
    assert float(cut.contrast(eye, eye.flip(1), 0.07)) == pytest.approx(1 / 0.07, rel=1e-5)


def test_features_are_of_length_1_at_the_places_given() -> None:
    mlp, maps = cut.head(3, 8), torch.randn(2, 3, 4, 5)
    places = torch.tensor([7, 0, 19])
    got = cut.unit_features(mlp, maps, places)
    for n in range(2):
        for p, place in enumerate(places.tolist()):
            plain = mlp(maps[n, :, place // 5, place % 5])
            torch.testing.assert_close(got[n, p], plain / plain.norm())
    zero = nn.Linear(3, 8, bias=False)
    flat = torch.zeros(1, 3, 2, 2, requires_grad=True)
    cut.unit_features(zero, flat, torch.arange(4)).sum().backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()
    assert float(flat.grad.abs().max()) < 1e4


@pytest.mark.parametrize(("patches", "taken"), [(6, [6, 6]), (20, [16, 20]), (64, [16, 64])])
def test_a_layer_with_fewer_positions_gives_all(
    patches: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    plain = cut.unit_features

    def spied(mlp: nn.Module, maps: Tensor, places: Tensor) -> Tensor:
        seen.append(places)
        return plain(mlp, maps, places)

    monkeypatch.setattr(cut, "unit_features", spied)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
    heads = [cut.head(3, 8), cut.head(3, 8)]
    losses = cut.patch_nce(heads, maps, maps, patches, 0.07)
    assert losses.shape == (2,)
    assert [len(places.unique()) for places in seen[::2]] == taken
    assert all(torch.equal(q, k) for q, k in zip(seen[::2], seen[1::2], strict=True))


def test_patch_nce_averages_its_layers() -> None:
    """With all positions drawn, the loss does not depend on their order."""
    queries = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    keys = [torch.randn_like(maps) for maps in queries]
    heads = [cut.head(3, 8), cut.head(5, 8)]
    with torch.no_grad():
        got = cut.patch_nce(heads, queries, keys, 256, 0.07)
    for n in range(2):
        layers = []
        for mlp, query, key in zip(heads, queries, keys, strict=True):
            with torch.no_grad():
                q, k = (mlp(maps[n].flatten(1).T).double() for maps in (query, key))
            q, k = (z / z.norm(dim=1, keepdim=True) for z in (q, k))
            layers.append(nce_by_hand(q.numpy(), k.numpy(), 0.07))
        assert float(got[n]) == pytest.approx(sum(layers) / 2, rel=1e-4)


def test_keys_pass_no_gradient() -> None:
    query, key = (torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2))
    mlp = cut.head(3, 8)
    cut.patch_nce([mlp], [query], [key], 256, 0.07).sum().backward()
    assert key.grad is None
    assert query.grad is not None and bool(query.grad.any())
    assert all(p.grad is not None and bool(p.grad.any()) for p in mlp.parameters())


# -- layers ---------------------------------------------------------------------------------------


def test_layers_are_the_papers() -> None:
    made = build(cut_blocks=9).cut
    body = made.to_target.body
    convolutions = [
        i for i, m in enumerate(body) if isinstance(m, nn.Conv2d) and m.stride == (2, 2)
    ]
    blocks = [i for i, m in enumerate(body) if type(m).__name__ == "Residual"]
    assert made.layers == (*convolutions, blocks[0], blocks[4])
    shapes = [tuple(maps.shape[1:]) for maps in made.encode(images())]
    assert shapes == [(1, 32, 32), (8, 16, 16), (16, 8, 8), (16, 8, 8), (16, 8, 8)]
    assert [mlp[0].in_features for mlp in made.heads] == [1, 8, 16, 16, 16]  # type: ignore[index]


@pytest.mark.parametrize(("blocks", "layers"), [(1, 1), (2, 2), (4, 2), (6, 2)])
def test_short_generators_have_the_first_and_their_last_block(blocks: int, layers: int) -> None:
    made = build(cut_blocks=blocks).cut
    last = cut.FIRST_BLOCK + min(blocks, 5) - 1
    assert made.layers[2:] == (cut.FIRST_BLOCK, last)[-layers:]
    assert len(made.encode(images())) == len(made.heads) == 3 + layers


def test_keys_are_features_of_the_images_that_the_generator_was_given() -> None:
    made = build().cut
    translated, keys = made.generate(images())
    assert torch.equal(translated, made.to_target(images()))
    for key, feature in zip(keys, made.encode(images()), strict=True):
        assert torch.equal(key, feature) and not key.requires_grad


# -- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y"), [(1.0, 1.0), (3.0, 0.5), (10.0, 0.0)])
def test_a_steps_losses_and_update_are_those_of_the_weighted_sum(x: float, y: float) -> None:
    method = build(cut_lambda_x=x, cut_lambda_y=y, cut_patches=4096)
    other, own = copy.deepcopy(method.cut), batch()
    logs = method.cut.step(own, context_of(method, method.stages()[0]))
    assert set(logs) == {"nce", "adversarial", "discriminator"} | ({"nce_identity"} if y else set())

    source, target, d = own.source_images, own.target, other.discriminator
    optimizers = other.optimizers()
    fake, same = other.to_target(source), other.to_target(target)
    d_loss = 0.5 * ((d(target) - 1).square().mean() + d(fake.detach()).square().mean())
    d_loss.backward()
    optimizers["discriminator"].step()
    adv = (d(fake) - 1).square().mean()

    def nce(images: Tensor, made: Tensor) -> Tensor:
        keys = [maps.detach() for maps in other.encode(images)]
        return cut.patch_nce(other.heads, other.encode(made), keys, 4096, 0.07).mean()

    nce_x, nce_y = nce(source, fake), nce(target, same)
    optimizers["generator"].zero_grad()
    (adv + x * nce_x + y * nce_y).backward()
    optimizers["generator"].step()
    expected = {"nce": nce_x, "nce_identity": nce_y, "adversarial": adv, "discriminator": d_loss}
    for name, value in logs.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for name, weight in other.state_dict().items():
        # Adam's first step has the size of the learning rate, 2e-4, where a gradient is not 0.
        torch.testing.assert_close(method.cut.state_dict()[name], weight, rtol=0, atol=2e-5)


def test_each_update_changes_its_own_networks() -> None:
    method = build()
    before = copy.deepcopy(method.cut)
    context = context_of(method, method.stages()[0])
    changes: list[set[str]] = []
    parts = ("to_target", "heads", "discriminator")
    plain = context.apply

    def apply(name: str) -> None:
        states = {p: copy.deepcopy(getattr(method.cut, p).state_dict()) for p in parts}
        plain(name)
        changes.append(
            {p for p in parts if first_difference(states[p], getattr(method.cut, p).state_dict())}
        )

    context.apply = apply  # type: ignore[method-assign]
    method.cut.step(batch(), context)
    assert changes == [{"discriminator"}, {"to_target", "heads"}]
    for head, old in zip(method.cut.heads, before.heads, strict=True):
        assert first_difference(old.state_dict(), head.state_dict())


def test_without_the_identity_term_no_target_image_is_translated() -> None:
    for weight, translated in ((1.0, 4), (0.0, 2)):
        method = build(cut_lambda_y=weight)
        first: list[int] = []
        method.cut.to_target.body[0].register_forward_hook(
            lambda _, given, out, first=first: first.append(len(given[0]))
        )
        method.cut.step(batch(), context_of(method, method.stages()[0]))
        assert first == [translated, translated]


def test_a_step_takes_at_most_its_own_batch() -> None:
    method = build(cut_batch=1)
    judged: list[int] = []
    method.cut.discriminator.register_forward_hook(
        lambda _, given, out: judged.append(len(given[0]))
    )
    method.cut.step(batch(), context_of(method, method.stages()[0]))
    assert judged == [2, 1]


def test_translation_learns_to_find_its_own_patches() -> None:
    method = build(cut_lr=1e-3)
    context = context_of(method, method.stages()[0])
    losses = [float(method.cut.step(batch(), context)["nce"].detach()) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


# -- stages ---------------------------------------------------------------------------------------


def test_the_second_stage_trains_the_segmenter_alone_on_translated_images() -> None:
    method = build()
    translation, segmentation = method.stages()
    assert translation.translate is None and not translation.photometric
    assert (translation.hold, translation.decay) == (0.5, 1.0)
    assert segmentation.translate is not None
    assert torch.equal(segmentation.translate(images()), method.cut.to_target(images()))
    before = copy.deepcopy(method.cut.state_dict())
    method.step(batch(), context_of(method, segmentation))
    assert not first_difference(before, method.cut.state_dict())


def test_the_cached_stage_holds_the_heads_and_depends_on_every_setting_of_it() -> None:
    method = build()
    translation = method.stages()[0]
    assert translation.modules == ("cut",)
    assert any(name.startswith("heads.") for name in method.cut.state_dict())
    assert translation.depends_on is not None
    own = set(CUTConfig.__dataclass_fields__) - {"lr", "weight_decay", "optimizer"}
    assert set(translation.depends_on) == own


def test_stacks_are_translated_as_a_whole() -> None:
    torch.manual_seed(0)
    method = CUT(replace(TASK, slices=3), CUTConfig(**SMALL))
    stack = batch(slices=3)
    logs = method.cut.step(stack, context_of(method, method.stages()[0]))
    assert all(torch.isfinite(value) for value in logs.values())
    translated = method.pictures(stack)["restyled"]
    assert translated.shape == stack.source_images.shape
    assert all(bool((translated - stack.source_images)[:, s].abs().mean() > 1e-4) for s in range(3))


def test_variants_are_the_papers_two_weightings() -> None:
    fast = CUT.variants()["weights of FastCUT"]
    assert fast == {"cut_lambda_x": 10.0, "cut_lambda_y": 0.0}
    assert CUT.variants()["CUT"] == {}
    default = CUTConfig()
    assert (default.cut_lambda_x, default.cut_lambda_y) == (1.0, 1.0)
    assert (default.cut_temperature, default.cut_patches) == (0.07, 256)
