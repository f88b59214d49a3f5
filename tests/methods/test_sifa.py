"""`methods/sifa.py` against the authors' TensorFlow graph.

`tests/support/sifa_reference.npz` holds variables, inputs, outputs and losses of that graph, and
all variables after one step of its training. It was run in double precision at reduced width
(generator 8, encoder 2, discriminators 8; 64 x 64 pixels, two random images per domain) with
dropout off everywhere, and stored in single precision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.conformance import run_checks
from glua_bench.errors import ConfigError
from glua_bench.losses import lsgan_loss
from glua_bench.method import Batch, Context, TaskInfo
from glua_bench.methods import sifa
from glua_bench.methods.components.sifa_networks import Decoder, Encoder, Generator, enlarge
from glua_bench.methods.sifa import (
    ADVERSARIAL,
    SIFA,
    SIFAConfig,
    TensorFlowAdam,
    batch_norm_momenta,
    discriminator_loss,
    sifa_cross_entropy,
    sifa_dice_loss,
)
from glua_bench.task import Structure

TOLERANCE = 1e-6  # of the largest magnitude of an entry
# The same after a step of Adam, which divides a gradient by its size and so enlarges the rounding
# error of a tiny one: 2 of 893,759 weights exceed TOLERANCE.
AFTER_STEP = 1e-5
STRUCTURES = tuple(Structure(n, n, (value,), "#000000") for value, n in enumerate("abcd", 1))
# Scope of the graph -> attribute of the method.
SCOPES = {
    "g_A": "generator",
    "e_B": "encoder",
    "de_B": "decoder",
    "s_B": "head",
    "s_B_ll": "head_low",
    "d_A": "d_a",
    "d_B": "d_b",
    "d_P": "d_p",
    "d_P_ll": "d_p_low",
}


def build(**config: Any) -> SIFA:
    task = TaskInfo("reference", STRUCTURES, 64, SegmenterSpec("unet", 4, 3), 2)
    return SIFA(task, SIFAConfig(**config))


def variables(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Return TensorFlow's name of each variable of a layer, in the order of its graph."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        found = [("weights", layer.weight)]
        return found + ([("biases", layer.bias)] if layer.bias is not None else [])
    if isinstance(layer, nn.GroupNorm):
        return [("beta", layer.bias), ("gamma", layer.weight)]
    if isinstance(layer, nn.BatchNorm2d):
        assert layer.running_mean is not None and layer.running_var is not None
        return [
            ("beta", layer.bias),
            ("gamma", layer.weight),
            ("moving_mean", layer.running_mean),
            ("moving_variance", layer.running_var),
        ]
    return []


def paired(
    method: SIFA, reference: dict[str, np.ndarray], group: str, scope: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, the method's tensor and the graph's value (torch's layout) for a scope.

    Args:
        method: method with the reference's width.
        reference: entries of the file.
        group: "var", or "var_after" for the values after one step.
        scope: scope of the graph.
    """
    names = [n for n in reference if n.startswith(f"{group}/{scope}/")]
    own = [v for m in method.get_submodule(SCOPES[scope]).modules() for v in variables(m)]
    assert len(names) == len(own), scope
    for name, (kind, tensor) in zip(names, own, strict=True):
        assert name.rsplit("/", 1)[1] == kind, name
        value = torch.from_numpy(reference[name])
        if value.ndim == 4:  # HWIO, or HWOI of a transposed one: both become OIHW and IOHW
            value = value.permute(3, 2, 0, 1)
        assert value.shape == tensor.shape, name
        yield name, tensor, value


@torch.no_grad()
def load(method: SIFA, reference: dict[str, np.ndarray]) -> int:
    """Copy the graph's variables into the method, and return their number."""
    count = 0
    for scope in SCOPES:
        for _, tensor, value in paired(method, reference, "var", scope):
            tensor.copy_(value)
            count += 1
    return count


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "support" / "sifa_reference.npz") as file:
        return {name: file[name] for name in file.files}


def at_reference(reference: dict[str, np.ndarray], **config: Any) -> SIFA:
    """Return a method with the reference's width, variables and precision."""
    width = {"width_generator": 8, "width_encoder": 2, "width_discriminator": 8}
    made = build(**width, decoder_dropout=0.0, **config)
    assert load(made, reference) == sum(name.startswith("var/") for name in reference)
    return made.train().double()


@pytest.fixture
def method(reference: dict[str, np.ndarray]) -> SIFA:
    return at_reference(reference)


def image(reference: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(reference[name]).permute(0, 3, 1, 2).double()


def forward(
    method: SIFA, reference: dict[str, np.ndarray]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the graph's outputs and losses by name."""
    a, b = image(reference, "in/image_a"), image(reference, "in/image_b")
    pool_a, pool_b = image(reference, "in/fake_pool_a"), image(reference, "in/fake_pool_b")
    labels = torch.from_numpy(reference["in/label_a"]).long()
    fake_b = method.generator(a)
    latent_b, low_b = method.encoder(b)
    latent, low = method.encoder(fake_b)
    fake_a, cycle_a = method.decoder(latent_b, b), method.decoder(latent, fake_b)
    cycle_b = method.generator(fake_a)
    masks = {
        "pred_mask_b": method.head(latent_b),
        "pred_mask_b_ll": method.head_low(low_b),
        "pred_mask_fake_b": method.head(latent),
        "pred_mask_fake_b_ll": method.head_low(low),
    }
    fake_a_scores = method.d_a(fake_a)
    scores = {
        "prob_real_a_is_real": method.d_a(a)[:, :1],
        "prob_real_b_is_real": method.d_b(b),
        "prob_fake_a_is_real": fake_a_scores[:, :1],
        "prob_fake_b_is_real": method.d_b(fake_b),
        "prob_fake_a_aux_is_real": fake_a_scores[:, 1:],
        "prob_cycle_a_aux_is_real": method.d_a(cycle_a)[:, 1:],
        "prob_pred_mask_b_is_real": method.d_p(masks["pred_mask_b"]),
        "prob_pred_mask_b_ll_is_real": method.d_p_low(masks["pred_mask_b_ll"]),
    }
    outputs = {
        "fake_images_a": fake_a,
        "fake_images_b": fake_b,
        "cycle_images_a": cycle_a,
        "cycle_images_b": cycle_b,
        **masks,
        **scores,
    }
    own, low_own = masks["pred_mask_fake_b"], masks["pred_mask_fake_b_ll"]
    losses = {
        "cycle_a": 10 * (cycle_a - a).abs().mean(),
        "cycle_b": 10 * (cycle_b - b).abs().mean(),
        "gen_adv_a": lsgan_loss(scores["prob_fake_a_is_real"], 1),
        "gen_adv_b": lsgan_loss(scores["prob_fake_b_is_real"], 1),
        "gen_adv_p": lsgan_loss(scores["prob_pred_mask_b_is_real"], 1),
        "gen_adv_p_ll": lsgan_loss(scores["prob_pred_mask_b_ll_is_real"], 1),
        "gen_adv_a_aux": lsgan_loss(scores["prob_fake_a_aux_is_real"], 1),
        "ce": sifa_cross_entropy(own, labels),
        "dice": sifa_dice_loss(own, labels),
        "ce_ll": sifa_cross_entropy(low_own, labels),
        "dice_ll": sifa_dice_loss(low_own, labels),
        "l2": 1e-4 * method.half_squared_norm(),
        "d_A": method.loss_d_a(a, cycle_a, pool_a),
        "d_B": discriminator_loss(method.d_b, b, pool_b),
        "d_P": discriminator_loss(method.d_p, own, masks["pred_mask_b"]),
        "d_P_ll": discriminator_loss(method.d_p_low, low_own, masks["pred_mask_b_ll"]),
    }
    cycles = method.cycles(a, cycle_a, b, cycle_b)
    losses["g_A_total"] = cycles + losses["gen_adv_b"]
    losses["de_B_total"] = cycles + losses["gen_adv_a"]
    losses["seg_total"] = method.loss_segmentation(
        segmentation=losses["ce"] + losses["dice"],
        segmentation_low=losses["ce_ll"] + losses["dice_ll"],
        decoder=losses["de_B_total"],
        adv_p=losses["gen_adv_p"],
        adv_p_low=losses["gen_adv_p_ll"],
        adv_a_aux=losses["gen_adv_a_aux"],
    )
    return outputs, losses


def difference(expected: np.ndarray, value: Tensor) -> float:
    """Return the largest difference relative to the entry's largest magnitude."""
    own = value.detach().numpy()
    own = own.transpose(0, 2, 3, 1) if own.ndim == 4 else own
    assert own.shape == expected.shape
    return float(np.abs(own - expected).max() / np.abs(expected).max())


@torch.no_grad()
def differences(method: SIFA, reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the difference of every entry that the graph computes before its step."""
    outputs, losses = forward(method.train(), reference)
    found = {f"train/{name}": value for name, value in outputs.items()}
    found.update({f"loss/{name}": value for name, value in losses.items()})
    load(method, reference)  # the moving averages of the graph, which training has moved
    b = image(reference, "in/image_b")
    found["eval/pred_mask_b"] = method.eval().predict(b, "target")
    found["eval/pred_mask_b_ll"] = method.head_low(method.encoder(b)[1])
    assert found.keys() == {n for n in reference if n.split("/")[0] in ("train", "eval", "loss")}
    return {name: difference(reference[name], value) for name, value in sorted(found.items())}


def test_the_authors_graph_is_reproduced(method: SIFA, reference: dict[str, np.ndarray]) -> None:
    table = differences(method, reference)
    for name, value in table.items():
        print(f"{name:<40}{value:.1e}")
    assert len(table) == 37
    assert not {n: d for n, d in table.items() if not d <= TOLERANCE}


def test_a_wrong_convention_is_seen(method: SIFA, reference: dict[str, np.ndarray]) -> None:
    """The comparison can fail: it detects another epsilon of a norm."""
    for layer in method.encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1.01e-3
    table = differences(method, reference)
    assert table["eval/pred_mask_b"] > 10 * TOLERANCE < table["train/pred_mask_b"]
    assert table["loss/d_B"] <= TOLERANCE  # no encoder in it


def test_source_images_are_translated_before_they_are_predicted(
    method: SIFA, reference: dict[str, np.ndarray]
) -> None:
    """The segmenter is trained on translated images only."""
    with torch.no_grad():
        logits = method.predict(image(reference, "in/image_a"), "source")
    assert difference(reference["train/pred_mask_fake_b"], logits) <= TOLERANCE


def test_parameters_at_full_width_are_the_authors() -> None:
    method = build()
    counts = {
        scope: sum(p.numel() for p in method.get_submodule(attribute).parameters())
        for scope, attribute in SCOPES.items()
    }
    assert counts == {
        "g_A": 2_849_537,
        "e_B": 27_519_472,
        "de_B": 1_902_848,
        "s_B": 2_560,
        "s_B_ll": 2_560,
        "d_A": 2_771_712,
        "d_B": 2_763_520,
        "d_P": 2_767_616,
        "d_P_ll": 2_767_616,
    }


# -- the step -------------------------------------------------------------------------------------


def stepped(
    reference: dict[str, np.ndarray], method: SIFA, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """Return the difference of every variable after one step on the reference's batch and pools."""
    pooled: dict[str, Tensor] = {}
    for name in ("a", "b"):

        def serve(fakes: Tensor, name: str = name) -> Tensor:
            pooled[name] = fakes
            return image(reference, f"in/fake_pool_{name}")

        monkeypatch.setattr(method.get_submodule(f"pool_{name}"), "forward", serve)
    labels = torch.from_numpy(reference["in/label_a"]).long()
    batch = Batch(image(reference, "in/image_a"), labels, image(reference, "in/image_b"))
    (stage,) = method.stages()
    method.step(batch, Context(stage, 0, 1, method.optimizers(), lambda: iter(())))
    assert difference(reference["train/fake_images_b"], pooled["b"]) <= TOLERANCE
    assert not pooled["a"].requires_grad
    return {
        name.removeprefix("var_after/"): float((own.detach() - after).abs().max())
        / float(after.abs().max())
        for scope in SCOPES
        for name, own, after in paired(method, reference, "var_after", scope)
    }


def is_average(name: str) -> bool:
    return name.rsplit("/", 1)[1] in ("moving_mean", "moving_variance")


def test_a_step_is_the_authors_with_fewer_passes(
    reference: dict[str, np.ndarray], method: SIFA, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {"encoder": 0, "generator": 0, "decoder": 0}
    for name in passes:

        def count(*_: Any, name: str = name) -> None:
            passes[name] += 1

        method.get_submodule(name).register_forward_hook(count)
    table = stepped(reference, method, monkeypatch)
    assert passes == {"encoder": 5, "generator": 5, "decoder": 6}
    assert len(table) == 339
    for scope in SCOPES:
        rows = {n: d for n, d in table.items() if n.startswith(f"{scope}/")}
        worst = max(rows, key=lambda n: rows[n])
        print(f"{rows[worst]:.1e} {worst}")
    assert not {
        n: d for n, d in table.items() if not d <= (TOLERANCE if is_average(n) else AFTER_STEP)
    }


def test_separate_optimizers_are_not_the_authors(
    reference: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = stepped(reference, at_reference(reference, shared_adam=False), monkeypatch)
    apart = {name.split("/")[0] for name, value in table.items() if value > AFTER_STEP}
    assert apart == {"d_B", "de_B", "d_A", "d_P", "d_P_ll"}  # all that come after the first


def test_moving_averages_count_the_authors_passes(
    reference: dict[str, np.ndarray], method: SIFA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting each of the five passes once gives other averages."""
    monkeypatch.setattr(sifa, "batch_norm_momenta", lambda runs: [0.1] * 5)
    table = stepped(reference, method, monkeypatch)
    assert {n for n, value in table.items() if value > 0.01} == {n for n in table if is_average(n)}


def test_momenta_make_averages_those_of_repeated_passes() -> None:
    values, runs = (3.0, -1.0, 7.0), ((1, 4), (2,), (3, 5, 6))
    repeated = passed = 10.0
    for place in range(1, 7):
        (value,) = (v for v, places in zip(values, runs, strict=True) if place in places)
        repeated += 0.1 * (value - repeated)
    for value, momentum in zip(values, batch_norm_momenta(runs), strict=True):
        passed += momentum * (value - passed)
    assert passed == pytest.approx(repeated, rel=1e-12)


@pytest.mark.parametrize(("place", "of"), [(0, 1), (0, 6), (5, 6)])
def test_adam_is_tensorflows(place: int, of: int) -> None:
    """It follows TensorFlow's documentation; gradients are so small that ε's place matters."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.double))
    expected, m, v = weight.detach().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    optimizer = TensorFlowAdam([weight], 1e-3, 0.5, place, of)
    for step in range(6):
        if step == 3:  # a checkpoint
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = TensorFlowAdam([weight], 1e-3, 0.5, place, of)
            optimizer.load_state_dict(state)
        gradient = 1e-8 * torch.randn(5, dtype=torch.double)
        weight.grad = gradient.clone()
        optimizer.step()
        t = step * of + place + 1
        rate = 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.5**t)
        m = 0.5 * m + 0.5 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        expected -= rate * m / (v.sqrt() + 1e-8)
        assert torch.allclose(weight.detach(), expected, rtol=1e-12, atol=0)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_one_count_of_updates_serves_the_six_adversarial_networks() -> None:
    shared, separate = (build(shared_adam=s).optimizers() for s in (True, False))
    assert list(shared) == [*ADVERSARIAL, "segmentation"] == list(separate)
    places = [(shared[name].index, shared[name].sharing) for name in shared]
    assert places == [(0, 6), (1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (0, 1)]
    assert {(o.index, o.sharing) for o in separate.values()} == {(0, 1)}


@pytest.mark.parametrize("kind", ["constant", "zero", "empty", "two values"])
@pytest.mark.parametrize("mixed", [False, True])
def test_slices_without_content_do_no_harm(kind: str, mixed: bool) -> None:
    """Norms divide by standard deviations, which are 0 there."""
    torch.manual_seed(0)
    value = {"constant": 0.3, "zero": 0.0, "empty": -1.0, "two values": -1.0}[kind]
    images, labels = torch.full((2, 1, 64, 64), value), torch.zeros(2, 64, 64, dtype=torch.long)
    if kind == "two values":
        images[..., 16:40, 16:40], labels[..., 16:40, 16:40] = 1.0, 1
    method = build(width_generator=4, width_encoder=2, width_discriminator=4, lr=1e-3).train()
    (stage,) = method.stages()
    context = Context(stage, 0, 4, method.optimizers(), lambda: iter(()))
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses = method.step(Batch(images, labels, images.clone()), context)
        assert all(bool(torch.isfinite(loss)) for loss in losses.values()), losses
    assert all(bool(torch.isfinite(v).all()) for v in method.state_dict().values())
    with torch.no_grad():
        assert bool(torch.isfinite(method.eval().predict(images, "source")).all())


# -- parts ----------------------------------------------------------------------------------------


def test_enlarging_has_no_half_pixel_shift() -> None:
    row = torch.tensor([0.0, 8.0, 24.0])
    large = enlarge(row.expand(1, 1, 3, 3), 8)
    assert large.shape == (1, 1, 24, 24)
    expected = [*range(8), *range(8, 24, 2), *[24] * 8]  # the last pixel has no neighbour
    assert torch.allclose(large[0, 0, 5], torch.tensor(expected).float(), atol=1e-5)


@pytest.mark.parametrize("size", [32, 40])
def test_networks_keep_the_size(size: int) -> None:
    images = torch.zeros(1, 1, size, size)
    assert Generator(4, 1)(images).shape == images.shape
    encoder = Encoder(2).eval()
    latent, low = encoder(images)
    assert latent.shape == low.shape == (1, encoder.channels, size // 8, size // 8)
    assert Decoder(encoder.channels, 4)(latent, images).shape == images.shape


def test_slices_that_the_stride_does_not_divide_are_refused() -> None:
    task = TaskInfo("odd", STRUCTURES, 60, SegmenterSpec("unet", 4, 3), 2)
    with pytest.raises(ConfigError, match="divisible by 8.*odd is 60"):
        SIFA(task, SIFAConfig())
    with pytest.raises(ConfigError, match="width_encoder = 3"):
        build(width_encoder=3)


def test_an_update_counts_once_also_beside_a_plain_adam() -> None:
    """torch's step hooks run twice for a subclass if a plain Adam was created before."""
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    (result,) = run_checks("sifa", only=["budget"])
    assert result.passed, result.message
