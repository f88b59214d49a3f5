"""Step B of GLUA and its segmenter against the numbers of the authors' own classes and training.

`tests/support/glua_local_reference.npz`: a tiny instance of the authors' ResNetMulti, D1 and D2,
two images of 64 x 64 pixels per domain; activations, losses, gradients, the weights after one and
after three iterations, and the evaluation with the gain.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import deviation, fill, load_reference
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from glua_bench.config import SegmenterSpec
from glua_bench.errors import ConfigError
from glua_bench.losses import balanced_loss, lsgan_loss, squared_dice_loss
from glua_bench.method import Batch, Context, Stage, TaskInfo, frozen
from glua_bench.methods.components import alignment as alignment_module
from glua_bench.methods.components.alignment import Aligned, AlignmentConfig, LocalAlignment
from glua_bench.methods.local_only import LocalConfig, LocalOnly
from glua_bench.networks import (
    DeepLab,
    FeatureDiscriminator,
    OutputDiscriminator,
    Segmented,
    Segmenter,
    build_segmenter,
)
from glua_bench.task import Structure

Reference = dict[str, np.ndarray]
STRUCTURES = tuple(Structure(n, n, (v,), "#000000") for v, n in enumerate("abcd", 1))
TASK = TaskInfo("reference", STRUCTURES, 64, SegmenterSpec("deeplab", dilations=2), 2, 3)
SETTINGS = LocalConfig(lr=0.01, weight_decay=5e-4, optimizer="sgd-repeated", width_discriminator=8)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference("glua_local_reference")


def tiny_segmenter(dilations: int = 2) -> DeepLab:
    """The reference's network: stem 4, blocks 1-2-2-(2 + 1) of 2, 3, 4 and 4 channels."""
    resnet = ResNet(Bottleneck, (1, 2, 2, 3), 0, 3, output_stride=8, channels=(2, 3, 4, 4))
    resnet.conv1, resnet.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
    first = resnet.layer1[0]
    first.conv1 = nn.Conv2d(4, 2, 1, bias=False)
    first.downsample[0] = nn.Conv2d(4, 8, 1, bias=False)
    # With 16 channels in and out, timm adds no projection; the authors do in every first block.
    projection = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
    resnet.layer4[0].downsample = nn.Sequential(*projection)
    return DeepLab(resnet, len(STRUCTURES) + 1, dilations)


def their_name(name: str) -> str:
    """Return the authors' name of a tensor of `DeepLab`."""
    return name.replace("head.convolutions", "layer6.conv2d_list")


def states(segmenter: DeepLab) -> dict[str, Tensor]:
    """Return parameters and running statistics by the authors' names."""
    found = segmenter.state_dict()
    return {their_name(n): v for n, v in found.items() if "num_batches" not in n}


class Reproduced(LocalOnly):
    """`local_only` on the reference's networks."""

    def __init__(self, reference: Reference, **changes: Any) -> None:
        super(LocalOnly, self).__init__(
            replace(TASK, segmenter=SegmenterSpec("deeplab:resnet18", dilations=2)), SETTINGS
        )
        config = replace(SETTINGS, **changes)
        self.config = config
        self.segmenter = tiny_segmenter()
        self.alignment = LocalAlignment(self.task, config, self.segmenter)
        self.double()
        own = states(self.segmenter)
        prefix = "init/model/"
        assert own.keys() == {n.removeprefix(prefix) for n in reference if n.startswith(prefix)}
        with torch.no_grad():
            for name, tensor in own.items():
                assert tensor.shape == reference[prefix + name].shape, name
                tensor.copy_(torch.from_numpy(reference[prefix + name]))
        fill(self.alignment.feature.parameters(), reference, "init/D1/")
        fill(self.alignment.output.parameters(), reference, "init/D2/")
        self.train()


class Recorder(Context):
    """Record the segmenter's gradients after each backward pass, and all gradients at a step."""

    method: Any

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        super().backward(loss, retain_graph)
        self.passes = getattr(self, "passes", [])
        self.passes.append(named_gradients(self.method.segmenter))

    def apply(self, name: str) -> None:
        self.stepped = getattr(self, "stepped", {})
        found = {"segmenter": self.method.segmenter, "alignment": self.method.alignment}[name]
        self.stepped[name] = named_gradients(found)
        super().apply(name)


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        their_name(n): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None
    }


def images(reference: Reference) -> Batch:
    return Batch(
        torch.from_numpy(reference["input/source_images"]).double(),
        torch.from_numpy(reference["input/source_labels"]).long(),
        torch.from_numpy(reference["input/target_images"]).double(),
    )


def iterations(
    method: Reproduced, reference: Reference, count: int = 1, total: int = 0
) -> tuple[Recorder, list[dict[str, float]]]:
    """Take `count` steps; learning rates decay over `total` steps, or are constant if it is 0."""
    stage = Stage("segment", decay=0.9 if total else 0.0)
    context = Recorder(stage, 0, total or 1, method.optimizers(), lambda: iter(()))
    context.method = method
    logs = []
    for step in range(count):
        context.step = step if total else 0
        for optimizer in context.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * stage.rate(
                    context.progress
                )
        found = method.step(images(reference), context)
        logs.append({name: float(value.detach()) for name, value in found.items()})
    return context, logs


def compared(reference: Reference, prefix: str, tensors: Iterable[Tensor]) -> dict[str, float]:
    """Return the deviations of tensors from the entries with a prefix, in their order."""
    names = [n for n in reference if n.startswith(prefix)]
    return {n: deviation(reference[n], t) for n, t in zip(names, tensors, strict=True)}


def demand(deviations: dict[str, float], count: int | None = None) -> None:
    assert count is None or len(deviations) == count, sorted(deviations)
    assert max(deviations.values()) <= 1, {n: d for n, d in deviations.items() if not d <= 1}


# -- forward --------------------------------------------------------------------------------------


def low(segmenter: DeepLab, seen: Aligned) -> Tensor:
    """Return logits at the resolution of the features."""
    return segmenter.head(seen.segmented.features[-1])


def test_activations_are_the_authors(reference: Reference) -> None:
    """Source and target pass, and both discriminators, with the statistics of each batch."""
    method, batch = Reproduced(reference), images(reference)
    align, segmenter = method.alignment, method.segmenter
    source = align.segment(segmenter, batch.source_images, "source")
    target = align.segment(segmenter, batch.target, "target")
    assert target.scores is not None and target.gain is not None
    outputs = {
        "src/x4": source.features,
        "src/pred_lowres": low(segmenter, source),
        "src/pred_up": source.segmented.logits,
        "tgt/x4": target.features,
        "tgt/D1_out_inside_forward": target.scores,
        "tgt/mask_abs_tanh": target.gain - 1,
        "tgt/x4_masked": target.features * target.gain,
        "tgt/pred_lowres": low(segmenter, target),
        "tgt/pred_up": target.segmented.logits,
        "tgt/D1_out_G_phase": target.scores,
        "tgt/D2_out_G_phase": align.output(target.output),
        "D/D1_out_source": align.feature(source.features),
        "D/D2_out_source": align.output(source.output),
        "D/D1_out_target": align.feature(target.features),
        "D/D2_out_target": align.output(target.output),
    }
    stored = {n for n in reference if n.split("/")[0] in ("src", "tgt", "D")}
    assert outputs.keys() == stored
    demand({name: deviation(reference[name], value) for name, value in outputs.items()}, 15)


def test_the_dice_loss_is_the_authors(reference: Reference) -> None:
    logits = torch.from_numpy(reference["dice/logits"])
    labels = torch.from_numpy(reference["dice/labels"]).long()
    assert 4 not in labels
    loss = squared_dice_loss(logits, labels)
    # Probabilities as logits: what the loss would be without the softmax that it contains.
    probabilities = logits.softmax(1)
    demand(
        {
            "softmax inside": deviation(reference["dice/loss_softmax_inside"], loss),
            "on probabilities": deviation(
                reference["dice/loss_no_softmax_on_probs"],
                squared_dice_loss(probabilities.log(), labels),
            ),
            "mean of classes": deviation(reference["dice/per_class"].mean(), loss),
        }
    )
    per_class = reference["dice/per_class"]
    assert per_class[4] > 0.99  # the class without labels


# -- one iteration --------------------------------------------------------------------------------


def test_losses_and_gradients_are_the_authors(reference: Reference) -> None:
    method, batch = Reproduced(reference), images(reference)
    align, segmenter = method.alignment, method.segmenter
    deviations = {}

    source = align.segment(segmenter, batch.source_images, "source")
    logits = source.segmented.logits
    labels = batch.source_labels
    dice, segmentation = squared_dice_loss(logits, labels), balanced_loss(logits, labels)
    losses = {"ce": F.cross_entropy(logits, labels), "dice": dice, "seg": segmentation}
    found = torch.autograd.grad(segmentation, [source.features, logits], retain_graph=True)
    for name, gradient in zip(("src_x4/seg", "src_pred_up/seg"), found, strict=True):
        deviations[f"grad/{name}"] = deviation(reference[f"grad/{name}"], gradient)

    with frozen(align):
        target = align.segment(segmenter, batch.target, "target")
        adv, logs = align.loss(target)
        # The same pass in single steps, for the gradients in between.
        assert target.scores is not None
        masked = target.features * (1 + target.scores.tanh().abs())
        upper = segmenter.decode([masked], (64, 64)).logits
        part_1 = 0.01 * lsgan_loss(target.scores, 0)
        part_2 = 0.01 * lsgan_loss(align.output(upper.softmax(1)), 0)
        detached = target.features * (1 + target.scores.detach().tanh().abs())
        if_detached = segmenter.decode([detached], (64, 64)).logits
        part_2_detached = 0.01 * lsgan_loss(align.output(if_detached.softmax(1)), 0)
    losses |= {"adv_D1_mse": logs["align_feature"], "adv_D2_mse": logs["align_output"], "adv": adv}
    x4, whole = target.features, target.segmented.logits
    for name, loss, tensor in (
        ("tgt_x4/adv_D1_part", part_1, x4),
        ("tgt_x4/adv_D2_part_mask_attached", part_2, x4),
        ("tgt_x4/adv_D2_part_if_mask_detached", part_2_detached, x4),
        ("tgt_x4/adv_total", adv, x4),
        ("tgt_x4_masked/adv", part_2, masked),
        ("tgt_pred_up/adv", adv, whole),
    ):
        (gradient,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        deviations[f"grad/{name}"] = deviation(reference[f"grad/{name}"], gradient)

    for domain, seen, label in (("source", source, 0.0), ("target", target, 1.0)):
        feature = lsgan_loss(align.feature(seen.features.detach()), label)
        output = lsgan_loss(align.output(seen.output.detach()), label)
        losses |= {f"D1_{domain}": feature, f"D2_{domain}": output, f"D_{domain}": feature + output}
    assert losses.keys() == {n.removeprefix("loss/") for n in reference if n.startswith("loss/")}
    deviations |= {f"loss/{n}": deviation(reference[f"loss/{n}"], v) for n, v in losses.items()}
    assert {n for n in reference if n.startswith("grad/")} <= deviations.keys()
    demand(deviations)


def test_one_update_has_the_authors_gradients(reference: Reference) -> None:
    """After the source's pass, at the step, and of both discriminators, through `step` itself."""
    method = Reproduced(reference)
    context, (logs,) = iterations(method, reference)
    dead = set(reference["meta/params_without_grad"].tolist())
    names = set(reference["meta/param_names"].tolist())
    deviations = {}
    for prefix, found in (
        ("grad_seg/", context.passes[0]),
        ("grad_total/", context.stepped["segmenter"]),
    ):
        assert found.keys() == names - dead
        deviations |= {prefix + n: deviation(reference[prefix + n], g) for n, g in found.items()}
    stepped = context.stepped["alignment"]
    assert sum(n.startswith("gradD/") for n in reference) == len(stepped)
    for part, theirs in (("feature", "D1"), ("output", "D2")):
        own = [g for n, g in stepped.items() if n.startswith(f"{part}.")]
        deviations |= compared(reference, f"gradD/{theirs}/", own)
    for own_name, name in (
        ("segmentation", "seg"),
        ("align_feature", "adv_D1_mse"),
        ("align_output", "adv_D2_mse"),
    ):
        deviations[own_name] = deviation(reference[f"loss/{name}"], logs[own_name])
    sums = {
        "d_feature": reference["loss/D1_source"] + reference["loss/D1_target"],
        "d_output": reference["loss/D2_source"] + reference["loss/D2_target"],
    }
    deviations |= {n: deviation(np.asarray(v), logs[n]) for n, v in sums.items()}
    demand(deviations)


OPTIMIZERS = {"authors": "sgd-repeated", "dedup": "sgd"}


@pytest.mark.parametrize(("kind", "optimizer"), OPTIMIZERS.items())
def test_one_update_ends_in_the_authors_weights(
    reference: Reference, kind: str, optimizer: str
) -> None:
    method = Reproduced(reference, optimizer=optimizer)
    before = copy.deepcopy(method.alignment.output)
    iterations(method, reference)
    prefix = f"after1_{kind}/model/"
    expected = {n.removeprefix(prefix): v for n, v in reference.items() if n.startswith(prefix)}
    statistics = "after1_authors/model/"
    own = states(method.segmenter)
    deviations = {}
    for name, value in own.items():
        stored = expected.get(name, reference[statistics + name])
        assert name in expected or "running" in name
        deviations[name] = deviation(stored, value)
    deviations |= compared(reference, "after1/D1/", method.alignment.feature.parameters())
    pairs = zip(method.alignment.output.parameters(), before.parameters(), strict=True)
    deviations |= compared(reference, "after1/D2_minus_init/", [p - old for p, old in pairs])
    demand(deviations, len(own) + 8 + 10)


@pytest.mark.parametrize(("kind", "optimizer"), OPTIMIZERS.items())
def test_three_updates_end_in_the_authors_weights(
    reference: Reference, kind: str, optimizer: str
) -> None:
    """On the same batches, with rates that decay over three updates."""
    method = Reproduced(reference, optimizer=optimizer)
    _, logs = iterations(method, reference, 3, 3)
    columns = reference["traj3/loss_columns"].tolist()
    assert columns[2:6] == ["seg", "adv_D1_mse", "adv_D2_mse", "adv"]
    expected = reference[f"traj3/loss_{kind}"]
    deviations = {}
    for row, log in zip(expected, logs, strict=True):
        adv = 0.01 * (log["align_feature"] + log["align_output"])
        own = [log["segmentation"], log["align_feature"], log["align_output"], adv]
        deviations[f"losses {row}"] = deviation(row[2:6], torch.tensor(own, dtype=torch.float64))
        both = deviation(np.asarray(row[6] + row[7]), log["d_feature"] + log["d_output"])
        deviations[f"discriminators {row}"] = both
        assert 0.5 * (row[0] + row[1]) == pytest.approx(row[2])
    prefix = f"after3_{kind}/model/"
    stored = {n.removeprefix(prefix): v for n, v in reference.items() if n.startswith(prefix)}
    own_states = states(method.segmenter)
    assert stored.keys() <= own_states.keys() and len(stored) >= 98
    deviations |= {n: deviation(value, own_states[n]) for n, value in stored.items()}
    discriminator = method.alignment.feature.parameters()
    demand(deviations | compared(reference, f"after3_{kind}/D1/", discriminator))


def test_weights_are_listed_as_often_as_the_authors_list_them(reference: Reference) -> None:
    method = Reproduced(reference)
    (optimizer,) = (o for n, o in method.optimizers().items() if n == "segmenter")
    of = {id(p): their_name(n) for n, p in method.segmenter.named_parameters()}
    found = {
        of[id(p)]: (group.get("repeats", 1), group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    rates = {0: 0.01, 1: 0.1}
    expected = {
        str(name): (int(times), rates[int(group)])
        for name, times, group in zip(
            reference["meta/param_names"],
            reference["meta/param_multiplicity"],
            reference["meta/param_lr_group"],
            strict=True,
        )
    }
    assert found == expected


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["init", "after1_authors", "after1_dedup"])
@torch.no_grad()
def test_the_evaluation_with_the_gain_is_the_authors(reference: Reference, kind: str) -> None:
    optimizer = OPTIMIZERS.get(kind.removeprefix("after1_"), "sgd")
    method = Reproduced(reference, optimizer=optimizer)
    if kind != "init":
        with torch.enable_grad():
            iterations(method, reference)
    method.eval()
    image = images(reference).target[:1]
    seen = method.alignment.segment(method.segmenter, image, "target")
    plain = method.alignment.segment(method.segmenter, image, "source")
    assert seen.scores is not None and seen.gain is not None
    prefix = f"eval_{kind}/"
    found = {
        "x4": seen.features,
        "D1_out": seen.scores,
        "mask_abs_tanh": seen.gain - 1,
        "x4_masked": seen.features * seen.gain,
        "pred_lowres": low(method.segmenter, seen),
        "pred_lowres_without_mask": low(method.segmenter, plain),
    }
    demand({n: deviation(reference[prefix + n], value) for n, value in found.items()}, 6)
    predicted = method.predict(image, "target").argmax(1)
    assert np.array_equal(predicted.numpy(), reference[f"{prefix}argmax_up"])
    changed = int((predicted != method.predict(image, "source").argmax(1)).sum())
    assert changed == reference[f"{prefix}n_pixels_changed_by_mask"]
    assert len([n for n in reference if n.startswith(prefix)]) == 8


# -- the local part alone -------------------------------------------------------------------------


class Stub(Segmenter):
    """A segmenter whose encoder returns its images, and whose decoder is one convolution."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.head = nn.Conv2d(16, 5, 1).double()
        fill(self.head.parameters(), reference, "part/head_")
        self.encoder_channels = self.feature_channels = [16]

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]

    def decode(self, maps: list[Tensor], size: Any) -> Segmented:
        logits = F.interpolate(self.head(maps[-1]), (64, 64), mode="bilinear", align_corners=True)
        return Segmented(logits, (maps[-1],))


def test_the_local_part_alone_is_the_authors(reference: Reference) -> None:
    """Gain, losses and their gradients on given features, attached and detached."""
    deviations = {}
    for form, attached in (("tanh", "attached"), ("detached", "detached")):
        stub = Stub(reference)
        align = LocalAlignment(TASK, AlignmentConfig(gain=form, width_discriminator=8), stub)
        align.double()
        fill(align.feature.parameters(), reference, "part/D1/")
        fill(align.output.parameters(), reference, "init/D2/")
        x = torch.from_numpy(reference["part/x"]).requires_grad_()
        seen = align.segment(stub, x, "target")
        assert seen.scores is not None and seen.gain is not None
        masked = seen.segmented.features[-1]
        adv, logs = align.loss(seen)
        probe = (masked * torch.from_numpy(reference["part/probe"])).sum()
        found = {
            "D1_out": seen.scores,
            "mask_abs_tanh": seen.gain - 1,
            "masked": masked,
            "pred_lowres": stub.head(masked),
            "D2_out": align.output(seen.output),
            "adv_D1_mse": logs["align_feature"],
            "adv_D2_mse": logs["align_output"],
            "adv_total": adv,
            "probe_value": probe,
        }
        for name, loss in (
            ("d_adv_D1_mse_dx", logs["align_feature"]),
            (f"d_adv_D2_mse_dx_mask_{attached}", logs["align_output"]),
            (f"d_adv_total_dx_mask_{attached}", adv),
            (f"d_probe_dx_mask_{attached}", probe),
        ):
            (found[name],) = torch.autograd.grad(loss, x, retain_graph=True)
        x_source = torch.from_numpy(reference["part/x_source"])
        d1 = lsgan_loss(align.feature(x_source), 0) + lsgan_loss(align.feature(x.detach()), 1)
        found["D1_loss_source0_target1"] = d1
        gradients = torch.autograd.grad(d1, list(align.feature.parameters()))
        names = [n.removeprefix("part/") for n in reference if n.startswith("part/gradD1/")]
        found |= dict(zip(names, gradients, strict=True))
        deviations |= {n: deviation(reference[f"part/{n}"], value) for n, value in found.items()}
    inputs = ("x", "x_source", "probe", "head_weight", "head_bias")
    stored = {n.removeprefix("part/") for n in reference if n.startswith("part/")}
    stored -= {n for n in stored if n.startswith("D1/")} | set(inputs)
    assert deviations.keys() == stored
    demand(deviations)


# -- negative controls ----------------------------------------------------------------------------


def gradients_after(method: Reproduced, reference: Reference) -> float:
    """Return the largest deviation of the segmenter's gradients at the step."""
    context, _ = iterations(method, reference)
    found = context.stepped["segmenter"]
    return max(deviation(reference[f"grad_total/{n}"], g) for n, g in found.items())


def discriminators_after(method: Reproduced, reference: Reference) -> float:
    """Return the largest deviation of D1's gradients."""
    context, _ = iterations(method, reference)
    own = [g for n, g in context.stepped["alignment"].items() if n.startswith("feature.")]
    return max(compared(reference, "gradD/D1/", own).values())


def test_a_detached_gain_is_seen(reference: Reference) -> None:
    assert gradients_after(Reproduced(reference), reference) <= 1
    assert gradients_after(Reproduced(reference, gain="detached"), reference) > 1000


def test_other_gains_are_seen(reference: Reference) -> None:
    for gain in ("constant", "none"):
        assert gradients_after(Reproduced(reference, gain=gain), reference) > 1000


def test_swapped_labels_are_seen(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    assert discriminators_after(Reproduced(reference), reference) <= 1
    monkeypatch.setattr(alignment_module, "SOURCE", 1.0)
    monkeypatch.setattr(alignment_module, "TARGET", 0.0)
    assert discriminators_after(Reproduced(reference), reference) > 1000
    assert gradients_after(Reproduced(reference), reference) > 1000


def test_a_gain_on_source_features_is_seen(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    see = LocalAlignment.segment
    monkeypatch.setattr(
        LocalAlignment, "segment", lambda self, net, x, domain: see(self, net, x, "target")
    )
    assert gradients_after(Reproduced(reference), reference) > 1000


def test_d1_on_masked_features_is_seen(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    see = LocalAlignment.segment

    def masked(self: LocalAlignment, net: Any, x: Tensor, domain: Any) -> Aligned:
        seen = see(self, net, x, domain)
        if seen.gain is None:
            return seen
        features = seen.features * seen.gain
        return seen._replace(features=features, scores=self.feature(features))

    monkeypatch.setattr(LocalAlignment, "segment", masked)
    assert discriminators_after(Reproduced(reference), reference) > 1000
    assert gradients_after(Reproduced(reference), reference) > 1000


def test_all_dilations_are_seen(reference: Reference) -> None:
    method = Reproduced(reference)
    method.segmenter.head.summed = 4
    seen = method.alignment.segment(method.segmenter, images(reference).source_images, "source")
    assert deviation(reference["src/pred_lowres"], low(method.segmenter, seen)) > 1000


# -- sizes ----------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_the_authors() -> None:
    with torch.device("meta"):
        segmenter = build_segmenter(SegmenterSpec("deeplab"), 5, 3)
    assert count(segmenter) == 47_067_220
    assert segmenter.encoder_channels == [2048]
    sizes = {2048: 24_776_705, 512: 1_549_313, 256: 387_585}
    assert {c: count(FeatureDiscriminator(c)) for c in sizes} == sizes
    assert count(OutputDiscriminator(5)) == 2_766_785


def test_no_entry_of_the_reference_is_left_out(reference: Reference) -> None:
    """Each is compared above, an input, or metadata."""
    compared = ("src", "tgt", "D", "loss", "grad", "grad_seg", "grad_total", "gradD", "part")
    compared += ("after1", "after1_authors", "after1_dedup", "after3_authors", "after3_dedup")
    compared += ("eval_init", "eval_after1_authors", "eval_after1_dedup", "traj3", "dice")
    assert {n.split("/")[0] for n in reference} == {*compared, "input", "init", "meta"}


def test_a_segmenter_without_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no encoder output for GLUA's gain; use"):
        LocalAlignment(TASK, AlignmentConfig(), nn.Conv2d(1, 5, 1))
