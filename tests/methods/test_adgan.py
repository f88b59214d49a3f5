"""AD-GAN against the numbers of its authors' own classes and training steps.

`tests/support/adgan_reference.npz`: width 8, one channel, 64 x 64 pixels, two images per domain;
weights, outputs, losses, gradients, and weights after one step in the published trainings.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from references import deviation, fill, load_reference
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.method import Batch, Context, Stage, TaskInfo
from glua_bench.methods.components.adgan import (
    ADGAN,
    SOURCE,
    TARGET,
    ADGANConfig,
    Decoder,
    DomainDiscriminator,
    Encoder,
)
from glua_bench.task import Structure

Reference = dict[str, np.ndarray]
NETWORKS = {"enc": "encoder", "dec": "decoder", "dis": "discriminator"}
# Name of the reference -> mode.
TRAININGS = {"adgan_adt": "adt", "adgan_no_adt": "no_adt", "glua": "glua"}


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Return all entries except the dummy statistics of the authors' norms."""
    found = load_reference("adgan_reference")
    return {name: value for name, value in found.items() if "running_" not in name}


def build(reference: Reference, mode: str = "adt") -> ADGAN:
    task = TaskInfo("reference", (Structure("A", "a", (1,), "#000000"),), 64, SegmenterSpec(), 2)
    made = ADGAN(ADGANConfig(adgan_width=8, adgan_mode=mode), task).double()
    for short, name in NETWORKS.items():
        fill(made.get_submodule(name).parameters(), reference, f"init/{short}/")
    return made


def batch(reference: Reference) -> Batch:
    a, b = (torch.from_numpy(reference[f"input/x_{name}"]).double() for name in "ab")
    return Batch(a, torch.zeros(2, 64, 64, dtype=torch.long), b)


def names_of(reference: Reference, short: str) -> list[str]:
    """Return the reference's names of a network's parameters, in order."""
    prefix = f"init/{short}/"
    return [n.removeprefix(prefix) for n in reference if n.startswith(prefix)]


class Recorder(Context):
    """Record the gradients with which each network is updated."""

    def apply(self, name: str) -> None:
        self.gradients = getattr(self, "gradients", {})
        for group in self.optimizers[name].param_groups:
            for p in group["params"]:
                self.gradients[id(p)] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        super().apply(name)


def trained(style: ADGAN, reference: Reference, steps: int = 1) -> tuple[Recorder, list[Any]]:
    context = Recorder(Stage("style"), 0, 10, style.optimizers(), lambda: iter(()))
    return context, [style.step(batch(reference), context) for _ in range(steps)]


def columns(logs: dict[str, Tensor], config: ADGANConfig) -> list[float]:
    """Return the losses in the reference's columns."""
    return [
        float(value.detach())
        for value in (
            logs["reconstruction"] * config.adgan_rec,
            logs["cycle"] * config.adgan_cycle,
            logs["content"] * config.adgan_content,
            logs["adversarial"],
            logs["discriminator"],
        )
    ]


def outputs(style: ADGAN, reference: Reference) -> dict[str, Tensor]:
    """Return all outputs of the reference by name."""
    given = batch(reference)
    a, b = given.source_images, given.target
    zero, one = torch.full((2,), SOURCE), torch.full((2,), TARGET)
    e, g, d = style.encoder, style.decoder, style.discriminator
    content_a, content_b = e(a, zero), e(b, one)
    found = {"content_a": content_a, "content_b": content_b}
    found |= {"rec_a": g(content_a, zero), "rec_b": g(content_b, one)}
    found |= {"fake_ab": g(content_a, one), "fake_ba": g(content_b, zero)}
    found |= {"content_ab": e(found["fake_ab"], one), "content_ba": e(found["fake_ba"], zero)}
    found |= {"cyc_aba": g(found["content_ab"], zero), "cyc_bab": g(found["content_ba"], one)}
    for name, images, domains in (
        ("real_a_label_a", a, zero),
        ("real_b_label_b", b, one),
        ("rec_a_label_a", found["rec_a"], zero),
        ("rec_b_label_b", found["rec_b"], one),
        ("fake_ab_label_b", found["fake_ab"], one),
        ("fake_ba_label_a", found["fake_ba"], zero),
    ):
        found[f"D_{name}"] = d(images, domains)
    found |= {"D_both_channels_real_a": d.body(a), "D_both_channels_real_b": d.body(b)}
    for short, network in (("enc", e), ("dec", g)):
        codes = torch.eye(2, dtype=torch.float64)
        found[f"adain_params_{short}_by_domain"] = network.affine.layers(codes)
    return found


@torch.no_grad()
def test_every_output_is_the_authors(reference: Reference) -> None:
    found = outputs(build(reference), reference)
    expected = {n.removeprefix("out/") for n in reference if n.startswith("out/")}
    assert found.keys() == expected
    deviations = {n: deviation(reference[f"out/{n}"], value) for n, value in found.items()}
    norms = {n.removeprefix("out_norm/") for n in reference if n.startswith("out_norm/")}
    assert len(norms) == 10
    for name in norms:
        deviations[f"norm {name}"] = deviation(reference[f"out_norm/{name}"], found[name].norm())
    assert max(deviations.values()) <= 1, deviations


@pytest.mark.parametrize(("name", "mode"), TRAININGS.items())
def test_a_step_is_the_authors(reference: Reference, name: str, mode: str) -> None:
    """Losses, the norms of all gradients, and every gradient and change that is stored."""
    style = build(reference, mode)
    before = copy.deepcopy(style)
    context, (logs,) = trained(style, reference)
    found = columns(logs, style.config)
    if mode == "glua":  # their printed loss has a term that is constant for the networks
        found[3] += float(reference["term/adv_real_as_fake_constant"])
    deviations = {
        "losses": deviation(reference[f"loss/{name}"], torch.tensor(found, dtype=torch.float64))
    }
    for short, attribute in NETWORKS.items():
        network = style.get_submodule(attribute)
        gradients = [context.gradients[id(p)] for p in network.parameters()]
        named = dict(zip(names_of(reference, short), gradients, strict=True))
        groups = {short: list(named.values())}
        for part in ("main", "mlp") if short != "dis" else ():
            groups[f"{short}.{part}"] = [g for n, g in named.items() if n.startswith(part)]
        for group, members in groups.items():
            norm = torch.stack([g.square().sum() for g in members]).sum().sqrt()
            deviations[f"norm {group}"] = deviation(reference[f"gradnorm/{name}/{group}"], norm)
        for own, gradient in named.items():
            key = f"grad/{name}/{short}/{own}"
            if key in reference:
                deviations[key] = deviation(reference[key], gradient)
        old = before.get_submodule(attribute).parameters()
        for own, p, q in zip(named, network.parameters(), old, strict=True):
            key = f"after1_minus_init/{name}/{short}/{own}"
            if key in reference:
                deviations[key] = deviation(reference[key], p - q)
    stored = ("grad", "after1_minus_init")
    wanted = sum(n.split("/")[0] in stored and n.split("/")[1] == name for n in reference)
    assert sum(n.split("/")[0] in stored for n in deviations) == wanted
    assert max(deviations.values()) <= 1, {n: d for n, d in deviations.items() if d > 1}


@pytest.mark.parametrize("name", ["adgan_adt", "glua"])
def test_three_steps_are_the_authors(reference: Reference, name: str) -> None:
    style = build(reference, TRAININGS[name])
    expected = reference[f"traj3/{name}"]
    found = []
    context = Context(Stage("style"), 0, 10, style.optimizers(), lambda: iter(()))
    for _ in range(3):
        constant = 0.0
        if name == "glua":
            with torch.no_grad():
                real = outputs(style, reference)
                both = (real["D_real_a_label_a"], real["D_real_b_label_b"])
                constant = float(torch.cat(both).square().mean())
        row = columns(style.step(batch(reference), context), style.config)
        row[3] += constant
        found.append(row)
    assert deviation(expected, torch.tensor(found, dtype=torch.float64)) <= 1


def test_single_terms_and_their_gradients(reference: Reference) -> None:
    style = build(reference)
    given = batch(reference)
    out = outputs(style, reference)

    def l1(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean()

    def halves(first: str, second: str, label: float) -> Tensor:
        scores = torch.cat([out[f"D_{first}"], out[f"D_{second}"]])
        return (scores - label).square().mean()

    a, b = given.source_images, given.target
    terms = {
        "rec": 20 * (l1(out["rec_a"], a) + l1(out["rec_b"], b)),
        "cyc": 20 * (l1(out["cyc_aba"], a) + l1(out["cyc_bab"], b)),
        "ctr": l1(out["content_a"], out["content_ab"]) + l1(out["content_b"], out["content_ba"]),
        "adv_rec_as_fake": halves("rec_a_label_a", "rec_b_label_b", 0),
        "adv_fake_as_real": halves("fake_ab_label_b", "fake_ba_label_a", 1),
        "adv_real_as_fake_constant": halves("real_a_label_a", "real_b_label_b", 0),
    }
    assert {f"term/{n}" for n in terms} == {n for n in reference if n.startswith("term/")}
    for name, term in terms.items():
        assert deviation(reference[f"term/{name}"], term) <= 1, name
        for short in ("enc", "dec"):
            parameters = list(style.get_submodule(NETWORKS[short]).parameters())
            found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            squares = [g.square().sum() for g in found if g is not None]
            norm = torch.stack(squares).sum().sqrt() if squares else 0.0
            assert deviation(reference[f"term_gradnorm/{name}/{short}"], norm) <= 1, (name, short)


@pytest.mark.parametrize(
    ("name", "mode", "network"),
    [
        ("adgan_adt", "no_adt", "dec"),  # in ADT the decoder learns from the reconstruction alone
        ("adgan_no_adt", "adt", "dec"),
        ("adgan_no_adt", "glua", "dis"),  # what is real differs
        ("glua", "no_adt", "dis"),
    ],
)
def test_another_training_is_seen(reference: Reference, name: str, mode: str, network: str) -> None:
    """The comparison can fail: the gradients of one mode are not those of another."""
    style = build(reference, mode)
    context, _ = trained(style, reference)
    parameters = style.get_submodule(NETWORKS[network]).parameters()
    squares = [context.gradients[id(p)].square().sum() for p in parameters]
    norm = torch.stack(squares).sum().sqrt()
    assert deviation(reference[f"gradnorm/{name}/{network}"], norm) > 1000


def test_a_network_of_other_sizes_is_told(reference: Reference) -> None:
    with pytest.raises(ValueError, match="has the shape .* build the network in the sizes of"):
        fill(Encoder(4, 4).parameters(), reference, "init/enc/")
    with pytest.raises(ValueError, match="tensors below 'init/enc/' and the network"):
        fill(Encoder(8, 3).parameters(), reference, "init/enc/")


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("width", "slices", "expected"),
    [
        (64, 1, (5_421_696, 5_388_161, 2_770_882)),
        (64, 3, (5_427_968, 5_394_435, 2_772_930)),
        (32, 1, (1_441_216, 1_424_449, 697_314)),
        (8, 1, (125_104, 120_913, 45_306)),
    ],
)
def test_parameters_are_the_authors(
    width: int, slices: int, expected: tuple[int, int, int]
) -> None:
    encoder, decoder = Encoder(width, 4, slices), Decoder(width, 4, slices)
    networks = encoder, decoder, DomainDiscriminator(width, slices)
    assert tuple(map(parameters, networks)) == expected
    if width == 64 and slices == 1:
        assert parameters(encoder.affine) == 328_832
        assert parameters(decoder.affine) == 295_552
        assert [sum(n.affine.sizes) for n in (encoder, decoder)] == [4992, 4480]
