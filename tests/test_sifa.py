"""methods/sifa.py against the authors' own TensorFlow graph.

`data/sifa_reference.npz` holds variables, inputs, outputs and losses of that graph, run once at
reduced width (generator 8, encoder 2, discriminators 8; 64 x 64 pixels, two random images a
domain, dropout off as in the authors' configuration).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.losses import lsgan_loss
from glua_bench.method import Batch, Context, TaskInfo
from glua_bench.methods.sifa import (
    SIFA,
    SIFAConfig,
    discriminator_loss,
    sifa_cross_entropy,
    sifa_dice_loss,
)
from glua_bench.methods.sifa_networks import Decoder, Encoder, Generator, enlarge
from glua_bench.task import Structure

TOLERANCE = 1e-4  # of the largest magnitude of an entry
# What contains a draw of the decoder's dropout, which no setting of the graph turned off.
DRAWN_IMAGES = ("fake_images_a", "cycle_images_a")
DRAWN_LOSSES = (
    "cycle_a",
    "cycle_b",
    "gen_adv_a",
    "gen_adv_a_aux",
    "d_A",
    "g_A_total",
    "de_B_total",
    "seg_total",
)
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
    """TensorFlow's name of each variable of a layer, in the order of its graph."""
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


@torch.no_grad()
def load(method: SIFA, reference: dict[str, np.ndarray]) -> int:
    """Copy the graph's variables into the method; how many."""
    count = 0
    for scope, attribute in SCOPES.items():
        names = [n for n in reference if n.startswith(f"var/{scope}/")]
        own = [v for layer in method.get_submodule(attribute).modules() for v in variables(layer)]
        assert len(names) == len(own), scope
        for name, (kind, tensor) in zip(names, own, strict=True):
            assert name.rsplit("/", 1)[1] == kind, name
            value = torch.from_numpy(reference[name])
            if value.ndim == 4:  # HWIO, or HWOI of a transposed one: both become OIHW and IOHW
                value = value.permute(3, 2, 0, 1)
            assert value.shape == tensor.shape, name
            tensor.copy_(value)
            count += 1
    return count


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / "sifa_reference.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def method(reference: dict[str, np.ndarray]) -> SIFA:
    made = build(width_generator=8, width_encoder=2, width_discriminator=8)
    assert load(made, reference) == sum(name.startswith("var/") for name in reference)
    return made.train().double()  # so that what differs is the graph's own rounding


def image(reference: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(reference[name]).permute(0, 3, 1, 2).double()


def forward(
    method: SIFA, reference: dict[str, np.ndarray], fake_a: Tensor, cycle_a: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The graph's other outputs and its losses, by its names, given what the decoder made."""
    a, b = image(reference, "in/image_a"), image(reference, "in/image_b")
    pool_a, pool_b = image(reference, "in/fake_pool_a"), image(reference, "in/fake_pool_b")
    labels = torch.from_numpy(reference["in/label_a"]).long()
    fake_b = method.generator(a)
    latent_b, low_b = method.encoder(b)
    latent, low = method.encoder(fake_b)
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
        "fake_images_b": fake_b,
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
        "l2": 1e-4 * method.half_square(),
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
    """The largest difference, relative to the largest magnitude of an entry."""
    own = value.detach().numpy()
    own = own.transpose(0, 2, 3, 1) if own.ndim == 4 else own
    assert own.shape == expected.shape
    return float(np.abs(own - expected).max() / np.abs(expected).max())


@torch.no_grad()
def differences(method: SIFA, reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Every entry that does not contain a draw of the decoder's dropout -> its difference."""
    drawn = {f"train/{n}": image(reference, f"train/{n}") for n in DRAWN_IMAGES}
    outputs, losses = forward(method.train(), reference, *drawn.values())
    found = {f"train/{name}": value for name, value in outputs.items()}
    found.update({f"loss/{name}": value for name, value in losses.items()})
    load(method, reference)  # the moving averages of the graph, which training has moved
    latent, low = method.eval().encoder(image(reference, "in/image_b"))
    found["eval/pred_mask_b"] = method.predict(image(reference, "in/image_b"))
    found["eval/pred_mask_b_ll"] = method.head_low(low)
    entries = {n for n in reference if n.split("/")[0] in ("train", "eval", "loss")}
    assert found.keys() | drawn.keys() == entries
    return {
        name: difference(reference[name], found[name])
        for name in sorted(found)
        if name.removeprefix("loss/") not in DRAWN_LOSSES
    }


def test_the_authors_graph_is_reproduced(method: SIFA, reference: dict[str, np.ndarray]) -> None:
    """All that follows from the inputs, and from the two images that contain a draw."""
    table = differences(method, reference)
    for name, value in table.items():
        print(f"{name:<40}{value:.1e}")
    assert len(table) == 27
    assert not {n: d for n, d in table.items() if not d <= TOLERANCE}


def test_losses_of_the_authors_graph_add_up(method: SIFA, reference: dict[str, np.ndarray]) -> None:
    """Its totals follow from its terms by our weights, whatever was drawn."""
    terms = {n.removeprefix("loss/"): torch.tensor(reference[n]) for n in reference if "loss/" in n}
    cycles = terms["cycle_a"] + terms["cycle_b"]
    segmentation = method.loss_segmentation(
        segmentation=terms["ce"] + terms["dice"],
        segmentation_low=terms["ce_ll"] + terms["dice_ll"],
        decoder=terms["de_B_total"],
        adv_p=terms["gen_adv_p"],
        adv_p_low=terms["gen_adv_p_ll"],
        adv_a_aux=terms["gen_adv_a_aux"],
    )
    for name, value in {
        "g_A_total": cycles + terms["gen_adv_b"],
        "de_B_total": cycles + terms["gen_adv_a"],
        "seg_total": segmentation,
    }.items():
        assert difference(reference[f"loss/{name}"], value) <= TOLERANCE, name


@torch.no_grad()
def test_what_the_authors_decoder_drew_is_like_what_ours_draws(
    method: SIFA, reference: dict[str, np.ndarray]
) -> None:
    """The decoder's own outputs, and the losses of a second draw, lie among draws of ours.

    The graph passes its dropout setting (off) to all networks but the decoder's residual
    blocks, which keep a default of 0.25. So two of its runs differ: `loss/cycle_b` is not the
    loss of the images in `train/`, although all else agrees.
    """
    a, b = image(reference, "in/image_a"), image(reference, "in/image_b")
    fake_a, cycle_a = (image(reference, f"train/{n}") for n in DRAWN_IMAGES)
    of_images = forward(method, reference, fake_a, cycle_a)[1]
    assert difference(reference["loss/cycle_b"], of_images["cycle_b"]) > 10 * TOLERANCE

    torch.manual_seed(0)
    latent_b = method.encoder(b)[0]
    latent = method.encoder(method.generator(a))[0]

    def likeness(x: Tensor, y: Tensor) -> float:
        """Correlation of what the decoder adds to its image."""
        added = [v.double().clamp(-1 + 1e-7, 1 - 1e-7).atanh() - b.double() for v in (x, y)]
        return float(np.corrcoef(*(v.flatten().numpy() for v in added))[0, 1])

    draws = [method.decoder(latent_b, b) for _ in range(24)]
    among = [likeness(x, y) for x, y in zip(draws[::2], draws[1::2], strict=True)]
    theirs = np.mean([likeness(x, fake_a) for x in draws])
    assert abs(theirs - np.mean(among)) < 4 * np.std(among)

    values: dict[str, list[float]] = {name: [] for name in DRAWN_LOSSES}
    for _ in range(40):
        drawn = method.decoder(latent_b, b), method.decoder(latent, method.generator(a))
        losses = forward(method, reference, *drawn)[1]
        for name in DRAWN_LOSSES:
            values[name].append(float(losses[name]))
    for name, own in values.items():
        z = (float(reference[f"loss/{name}"]) - np.mean(own)) / np.std(own)
        print(f"loss/{name:<20}{reference[f'loss/{name}']:.4f} at {z:+.1f} sd of 40 draws")
        assert abs(z) < 4, name


def test_a_wrong_convention_is_seen(method: SIFA, reference: dict[str, np.ndarray]) -> None:
    """The comparison can fail: another epsilon of the batch norm is found out."""
    for layer in method.encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5
    assert max(differences(method, reference).values()) > TOLERANCE


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


def published_step(
    method: SIFA, batch: Batch, optimizers: dict[str, torch.optim.Optimizer]
) -> None:
    """The authors' step as they run it: everything anew before each of the seven updates."""
    a, b, labels = batch.source_images, batch.target, batch.source_labels
    fakes: dict[str, Tensor] = {}

    def losses() -> dict[str, Tensor]:
        fake_b = method.generator(a)
        (latent_b, low_b), (latent, low) = method.encoder(b), method.encoder(fake_b)
        fake_a = method.decoder(latent_b, b)
        cycle_a, cycle_b = method.decoder(latent, fake_b), method.generator(fake_a)
        fakes["a"], fakes["b"] = fake_a.detach(), fake_b.detach()
        cycles = 10 * (cycle_a - a).abs().mean() + 10 * (cycle_b - b).abs().mean()

        def towards(scores: Tensor, value: float) -> Tensor:
            return ((scores - value) ** 2).mean()

        def real_fake(real: Tensor, fake: Tensor) -> Tensor:
            return (towards(real, 1) + towards(fake, 0)) / 2

        def segmentation(logits: Tensor) -> Tensor:
            return sifa_cross_entropy(logits, labels) + sifa_dice_loss(logits, labels)

        mask_b, mask_b_low = method.head(latent_b), method.head_low(low_b)
        mask, mask_low = method.head(latent), method.head_low(low)
        scores_a = method.d_a(fake_a)
        decoder = cycles + towards(scores_a[:, 0], 1)
        weights = [*method.encoder.parameters(), *method.head.parameters()]
        weights += list(method.head_low.parameters())
        pool_a, pool_b = fakes.get("pool_a", fakes["a"]), fakes.get("pool_b", fakes["b"])
        return {
            "generator": cycles + towards(method.d_b(fake_b), 1),
            "d_b": real_fake(method.d_b(b), method.d_b(pool_b)),
            "segmentation": segmentation(mask)
            + 0.1 * segmentation(mask_low)
            + sum(1e-4 * (w**2).sum() / 2 for w in weights)
            + 0.1 * decoder
            + 0.1 * towards(method.d_p(mask_b), 1)
            + 0.01 * towards(method.d_p_low(mask_b_low), 1)
            + 0.1 * towards(scores_a[:, 1], 1),
            "decoder": decoder,
            "d_a": real_fake(method.d_a(a)[:, 0], method.d_a(pool_a)[:, 0])
            + real_fake(method.d_a(cycle_a)[:, 1], method.d_a(pool_a)[:, 1]),
            "d_p": real_fake(method.d_p(mask.detach()), method.d_p(mask_b.detach())),
            "d_p_low": real_fake(
                method.d_p_low(mask_low.detach()), method.d_p_low(mask_b_low.detach())
            ),
        }

    for name in ("generator", "d_b", "segmentation", "decoder", "d_a", "d_p", "d_p_low"):
        method.zero_grad()
        losses()[name].backward()
        # The fakes of the pass in which their network was updated go into the pools, which are
        # still filling and give back what they get.
        if name == "generator":
            fakes["pool_b"] = fakes["b"]
        if name == "decoder":
            fakes["pool_a"] = fakes["a"]
        optimizers[name].step()


def test_a_step_updates_as_the_authors_do_with_fewer_passes(
    reference: dict[str, np.ndarray],
) -> None:
    labels = torch.from_numpy(reference["in/label_a"]).long()
    batch = Batch(image(reference, "in/image_a"), labels, image(reference, "in/image_b"))
    ours, theirs = (
        build(width_generator=8, width_encoder=2, width_discriminator=8, decoder_dropout=0.0)
        for _ in range(2)
    )
    passes = {"encoder": 0, "generator": 0, "decoder": 0}
    for name in passes:

        def count(*_: Any, name: str = name) -> None:
            passes[name] += 1

        ours.get_submodule(name).register_forward_hook(count)
    for method in (ours, theirs):
        load(method, reference)
        method.train().double()
    (stage,) = ours.stages()
    # Plain gradient steps: Adam would divide rounding errors of tiny gradients by their size.
    optimizers, own = (
        {n: torch.optim.SGD(o.param_groups[0]["params"], 1e-3) for n, o in made.items()}
        for made in (theirs.optimizers(stage), ours.optimizers(stage))
    )
    context = Context(stage, 0, 1, own, lambda: iter(()))
    start = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    ours.step(batch, context)
    published_step(theirs, batch, optimizers)
    assert passes == {"encoder": 5, "generator": 5, "decoder": 6}
    for attribute in SCOPES.values():
        moved, apart = 0.0, 0.0
        for name, weight in ours.get_submodule(attribute).named_parameters():
            other = theirs.get_submodule(attribute).get_parameter(name)
            moved = max(moved, float((other - start[f"{attribute}.{name}"]).detach().abs().max()))
            apart = max(apart, float((weight - other).detach().abs().max()))
        assert moved > 1e-5, attribute
        assert apart < 1e-5 * moved, attribute


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
    with pytest.raises(ConfigError, match="divisible by 8.*odd have 60 pixels"):
        SIFA(task, SIFAConfig())
    with pytest.raises(ConfigError, match="width_encoder = 3"):
        build(width_encoder=3)
