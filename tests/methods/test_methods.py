"""Gains, masks, losses and updates do what the cards say; no test depends on a default."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_methods import SIZE, TASK, batch, build, images
from torch import Tensor, nn
from torch.optim import SGD

from glua_bench import losses, networks
from glua_bench.config import PRESETS, RunConfig, SegmenterSpec, build_settings
from glua_bench.conformance import Bench, TinyDataset, first_difference
from glua_bench.console import Progress
from glua_bench.errors import ConfigError
from glua_bench.losses import balanced_loss, lsgan_loss
from glua_bench.method import Batch, Cases, Context, Method, Stage, TaskInfo, frozen
from glua_bench.methods import sifa
from glua_bench.methods.components.adgan import ADGAN, MODES
from glua_bench.methods.components.alignment import (
    CHANCE,
    GAINS,
    MASKS,
    Aligned,
    AlignmentConfig,
    LocalAlignment,
    gap_map,
    local_mask,
)
from glua_bench.methods.components.style import STYLES, StyleConfig, build_style, style_stage
from glua_bench.methods.components.style_codes import StyleCodes
from glua_bench.methods.global_only import GlobalOnly
from glua_bench.methods.glua import GLUA
from glua_bench.methods.glua_self_training import GLUASelfTraining
from glua_bench.methods.local_only import LocalOnly
from glua_bench.methods.source_only import RepeatedSGD, SegmentConfig, SourceOnly
from glua_bench.networks import Segmented, UNet
from glua_bench.registry import Registry
from glua_bench.runs import execution, exporting, prediction
from glua_bench.runs.plan import adjusted, check_request, plan
from glua_bench.runs.request import RunRequest
from glua_bench.task import UNANNOTATED, Grid

BUILT_IN = [e.name for e in Registry("method").entries() if e.origin == "glua-bench"]
NOTHING = {"gain": "none", "lambda_feature": 0.0, "lambda_output": 0.0}  # of Step B


class Spy(Context):
    """Record which parts of the method each update changes, and gradients on discriminators."""

    changes: list[tuple[str, set[str]]]
    watched: dict[str, nn.Module]
    judges: list[nn.Parameter]
    judged: list[list[bool]]

    def backward(self, loss: Tensor, **options: bool) -> None:
        super().backward(loss, **options)
        self.judged.append([p.grad is not None for p in self.judges])

    def apply(self, name: str) -> None:
        before = {n: copy.deepcopy(m.state_dict()) for n, m in self.watched.items()}
        super().apply(name)
        changed = {
            n for n, m in self.watched.items() if first_difference(before[n], m.state_dict())
        }
        self.changes.append((name, changed))


def spy(stage: Stage, optimizers: Callable[[], Any], **watched: nn.Module) -> Spy:
    """Return the context of a stage, with the method's optimizers if the stage has none."""

    def target_slices() -> Iterator[Tensor]:
        yield from images(24, 5).split(8)

    context = Spy(stage, 0, 10, (stage.optimizers or optimizers)(), target_slices)
    context.changes, context.watched = [], watched
    context.judges, context.judged = [], []
    return context


# -- unannotated pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_method_learns_from_unannotated_pixels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss reads the labels unchanged, and has no gradient at unannotated pixels."""
    gradients: list[tuple[Tensor, Tensor]] = []

    def spied(loss: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
        def inner(logits: Tensor, labels: Tensor) -> Any:
            own = logits * 1
            if own.requires_grad:
                own.register_hook(lambda gradient: gradients.append((labels, gradient)))
            return loss(own, labels)

        return inner

    for module in (losses, sifa):
        for loss in ("class_maps", "cross_entropy", "sifa_cross_entropy"):
            if hasattr(module, loss):
                monkeypatch.setattr(module, loss, spied(getattr(module, loss)))
    method, data = build(Registry("method").load(name)), batch()
    labels = data.source_labels.clone()
    labels[:, 4:20, 8:] = UNANNOTATED
    stage = method.stages()[-1]
    method.step(replace(data, source_labels=labels), spy(stage, method.optimizers))
    assert gradients
    for seen, gradient in gradients:
        assert torch.equal(seen, labels)
        inside = (seen == UNANNOTATED)[:, None].expand_as(gradient)
        assert not gradient[inside].any() and gradient[~inside].any()


# -- gap map and mask -----------------------------------------------------------------------------


@st.composite
def score_maps(draw: Callable[..., Any]) -> Tensor:
    """Draw distinct scores, some below 0 and some above 1."""
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    values = np.stack([rng.permutation(np.linspace(-0.5, 1.5, h * w)) for _ in range(n)])
    return torch.from_numpy(values.reshape(n, 1, h, w).astype(np.float32))


ratios = st.floats(0.01, 1.0)
examples = settings(max_examples=40, deadline=None, derandomize=True)


def counts(mask: Tensor) -> list[int]:
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    return mask.flatten(1).sum(1).int().tolist()


@examples
@given(score_maps())
def test_the_gap_is_large_where_the_target_is_recognised(scores: Tensor) -> None:
    gap = gap_map(scores)
    assert gap.shape == scores.shape
    assert (gap >= 0).all() and (gap <= 1).all()
    assert (gap[scores >= 1] == 1).all() and (gap[scores <= 0.5] == 0).all()
    order = scores.flatten().argsort()
    assert (gap.flatten()[order].diff() >= 0).all()
    assert gap_map(torch.tensor([0.75])).item() == 0.5


@examples
@given(score_maps(), ratios)
def test_topk_keeps_the_share_with_the_highest_scores(scores: Tensor, ratio: float) -> None:
    mask = local_mask(scores, "topk", ratio)
    places = scores[0].numel()
    assert mask.shape == scores.shape
    assert counts(mask) == [max(1, round(ratio * places))] * len(scores)
    for own, kept in zip(scores.flatten(1), mask.flatten(1).bool(), strict=True):
        if not kept.all():
            assert own[kept].min() > own[~kept].max()


@examples
@given(score_maps(), ratios, st.integers(0, 2**16))
def test_random_keeps_as_many_and_does_not_look(scores: Tensor, ratio: float, seed: int) -> None:
    torch.manual_seed(seed)
    mask = local_mask(scores, "random", ratio)
    assert counts(mask) == counts(local_mask(scores, "topk", ratio))
    torch.manual_seed(seed)
    assert torch.equal(local_mask(-scores, "random", ratio), mask)


def test_random_places_are_others_each_time_and_evenly_spread() -> None:
    torch.manual_seed(0)
    masks = torch.stack([local_mask(torch.zeros(4, 1, 6, 6), "random", 0.5) for _ in range(200)])
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 200
    assert ((masks.mean((0, 1)) - 0.5).abs() < 0.1).all()


@examples
@given(score_maps(), ratios)
def test_soft_weighs_from_one_to_two_and_none_is_all(scores: Tensor, ratio: float) -> None:
    soft = local_mask(scores, "soft", ratio)
    assert (soft >= 1).all() and (soft <= 2).all()
    assert torch.equal(soft, 1 + gap_map(scores))
    assert torch.equal(local_mask(scores, "none", ratio), torch.ones_like(scores))


# -- the gain -------------------------------------------------------------------------------------


def alignment(**config: Any) -> tuple[LocalAlignment, UNet]:
    """Return an alignment with a U-Net, on which D1's scores vary around ¾."""
    torch.manual_seed(0)
    unet = UNet(3, 4, 3)
    values = {"width_discriminator": 4, "mask_ratio": 0.25, **config}
    made = LocalAlignment(TASK, AlignmentConfig(**values), unet)
    with torch.no_grad():
        last = made.feature[-1]
        last.weight.mul_(10)
        last.bias.fill_(0.0)
        last.bias.fill_(0.75 - made.feature(unet.encode(images(2, 1))[-1]).mean())
    return made, unet


@pytest.mark.parametrize("form", GAINS)
def test_the_gain_is_that_of_the_card(form: str) -> None:
    scores = torch.linspace(-2, 2, 9).view(1, 1, 3, 3).requires_grad_()
    gain = GAINS[form](scores)
    by_tanh = 1 + np.abs(np.tanh(scores.detach().numpy()))
    expected = {"constant": np.full_like(by_tanh, 1 + math.tanh(0.5)), "none": 1 + 0 * by_tanh}
    np.testing.assert_allclose(gain.detach().numpy(), expected.get(form, by_tanh), rtol=1e-6)
    assert gain.shape == scores.shape and gain.requires_grad == (form == "tanh")
    # The constant gain is that of a score at chance.
    assert GAINS["tanh"](torch.tensor(0.5, dtype=torch.double)).item() == pytest.approx(CHANCE)


@pytest.mark.parametrize("at", ["end", "skips"])
@pytest.mark.parametrize("form", GAINS)
def test_the_gain_multiplies_features_of_the_target_only(form: str, at: str) -> None:
    made, unet = alignment(gain=form, gain_at=at)
    seen = made.segment(unet, images(2), "target")
    *skips, features = unet.encode(images(2))
    gain = GAINS[form](made.feature(features))
    if at == "skips":
        sizes = [skip.shape[-2:] for skip in skips]
        gains = [F.interpolate(gain, size=size, mode="bilinear") for size in sizes]
        skips = [skip * own for skip, own in zip(skips, gains, strict=True)]
    expected = unet.decode([*skips, features * gain], (SIZE, SIZE))
    assert torch.equal(seen.segmented.logits, expected.logits)
    assert torch.equal(seen.features, features)  # what D1 reads carries no gain
    assert seen.gain is not None and torch.equal(seen.gain, gain)
    plain = unet(images(2)).logits
    assert torch.equal(seen.segmented.logits, plain) == (form == "none")
    source = made.segment(unet, images(2), "source")
    assert torch.equal(source.segmented.logits, plain)
    assert source.gain is None and source.scores is None


def test_the_gain_at_the_skips_reaches_every_map() -> None:
    """With `end`, it does not reach the skips."""
    maps: dict[str, list[Tensor]] = {}
    for at in ("end", "skips"):
        made, unet = alignment(gain_at=at)
        unet.decode = lambda found, size, at=at, decode=unet.decode: (  # type: ignore[method-assign]
            maps.setdefault(at, found) and decode(found, size)
        )
        made.segment(unet, images(2), "target")
    plain = unet.encode(images(2))
    for at, changed in (("end", [False, False, True]), ("skips", [True, True, True])):
        pairs = zip(maps[at], plain, strict=True)
        assert [not torch.equal(found, own) for found, own in pairs] == changed
        assert all(bool((f.abs() >= p.abs()).all()) for f, p in zip(maps[at], plain, strict=True))


@pytest.mark.parametrize("method", [LocalOnly, GLUA, GLUASelfTraining])
def test_predictions_carry_the_gain_on_the_target_alone(method: type[LocalOnly]) -> None:
    built = build(method).eval()
    network = built.segmenter
    with torch.no_grad():
        if method is GLUASelfTraining:  # whose teacher predicts
            network = built.teacher.segmenter
            for parameter in built.segmenter.parameters():
                parameter.add_(0.1)
        plain = network(images(2))
        found = {d: (built.predict(images(2), d), built.features(images(2), d)) for d in DOMAINS}
        assert torch.equal(found["source"][0], plain.logits)
        assert torch.equal(found["source"][1], plain.features[-1])
        for own, other in zip(found["target"], found["source"], strict=True):
            assert own.shape == other.shape and not torch.equal(own, other)
        for parameter in built.alignment.feature.parameters():
            parameter.zero_()  # a gain of 1
        torch.testing.assert_close(built.predict(images(2), "target"), plain.logits)


DOMAINS = ("source", "target")


# -- losses of the alignment ----------------------------------------------------------------------


def aligned(scores: Tensor) -> Aligned:
    """Return a pass in which D1 gave these scores."""
    return Aligned(Segmented(torch.zeros(len(scores), 3, SIZE, SIZE), ()), scores, scores, scores)


def test_each_weight_scales_its_own_loss() -> None:
    made, unet = alignment(lambda_feature=0.5, lambda_output=0.25)
    seen = made.segment(unet, images(2), "target")
    loss, logs = made.loss(seen)
    torch.testing.assert_close(logs["align_feature"], made.feature(seen.features).square().mean())
    p = seen.segmented.logits.softmax(1)
    torch.testing.assert_close(logs["align_output"], made.output(p).square().mean())
    torch.testing.assert_close(loss, 0.5 * logs["align_feature"] + 0.25 * logs["align_output"])
    assert seen.gain is not None
    for name, value in (("mean", seen.gain.mean()), ("sd", seen.gain.std())):
        torch.testing.assert_close(logs[f"gain_{name}"], value.detach())
    assert 1 <= logs["gain_min"] < logs["gain_mean"] < logs["gain_max"] < 2


@pytest.mark.parametrize("form", ["topk", "random"])
def test_a_mask_lets_its_places_count_alone(form: str) -> None:
    made, _ = alignment(mask=form, lambda_feature=2.0, lambda_output=0.0)
    scores = torch.linspace(-0.5, 1.5, 128).view(2, 1, 8, 8).requires_grad_()
    torch.manual_seed(3)
    mask = local_mask(scores.detach(), form, 0.25)
    torch.manual_seed(3)
    loss, logs = made.loss(aligned(scores))
    loss.backward()
    assert torch.equal(scores.grad != 0, mask == 1)
    torch.testing.assert_close(logs["align_feature"], scores.detach()[mask == 1].square().mean())
    torch.testing.assert_close(loss.detach(), 2 * logs["align_feature"].detach())


def test_the_soft_mask_weights_by_the_gap_and_no_mask_weights_equally() -> None:
    made, _ = alignment(mask="soft", lambda_feature=1.0, lambda_output=0.0)
    scores = torch.linspace(-0.5, 1.5, 128).view(2, 1, 8, 8).requires_grad_()
    loss, _ = made.loss(aligned(scores))
    loss.backward()
    weights = 1 + gap_map(scores.detach())
    torch.testing.assert_close(
        scores.grad, 2 * scores.detach() * weights / weights.sum(), rtol=1e-4, atol=1e-7
    )
    _, logs = alignment(mask="none")[0].loss(aligned(scores))
    torch.testing.assert_close(logs["align_feature"], lsgan_loss(scores, 0))


@pytest.mark.parametrize("form", GAINS)
def test_discriminators_learn_the_domains_and_touch_nothing_else(form: str) -> None:
    """Source → 0, target → 1."""
    made, unet = alignment(gain=form, lr_d=1e-2)
    source = made.segment(unet, images(2), "source")
    target = made.segment(unet, images(2, 1) * 0.3 + 0.4, "target")
    context = Context(Stage(), 0, 10, {"alignment": made.optimizer()}, lambda: iter(()))
    first = made.update(source, target, context)
    for _ in range(150):
        logs = made.update(source, target, context)
    assert set(logs) == {"d_feature", "d_output", "d1_source", "d1_target"}
    assert logs["d_feature"] < first["d_feature"] and logs["d_output"] < first["d_output"]
    assert logs["d1_source"] < 0.25 and logs["d1_target"] > 0.75
    assert all(p.grad is None for p in unet.parameters())


@pytest.mark.parametrize("form", MASKS)
def test_pictures_show_gain_and_mask_in_the_size_of_the_images(form: str) -> None:
    pictures = build(GLUA, mask=form, mask_ratio=0.25).pictures(batch())
    assert set(pictures) == {"restyled", "gain minus 1"} | ({"mask"} if form != "none" else set())
    for name in pictures.keys() - {"restyled"}:
        assert pictures[name].shape == (2, 1, SIZE, SIZE)
        assert pictures[name].min() >= 0 and pictures[name].max() <= 1
    if form in ("topk", "random"):
        assert pictures["mask"].mean().item() == pytest.approx(0.25, abs=0.05)
    assert not build(LocalOnly, gain="none", mask=form).pictures(batch())["gain minus 1"].any()


# -- updates --------------------------------------------------------------------------------------


def test_an_aligned_step_updates_the_segmenter_and_then_the_discriminators() -> None:
    method = build(LocalOnly)
    (stage,) = method.stages()
    judges = {"feature": method.alignment.feature, "output": method.alignment.output}
    context = spy(stage, method.optimizers, segmenter=method.segmenter, **judges)
    logs = method.step(batch(), context)
    assert context.changes == [("segmenter", {"segmenter"}), ("alignment", set(judges))]
    expected = {"segmentation", "align_feature", "align_output", "d_feature", "d_output"}
    expected |= {f"gain_{name}" for name in ("mean", "sd", "min", "max")}
    assert set(logs) == expected | {"d1_source", "d1_target"}
    assert all(torch.isfinite(value) and value.ndim == 0 for value in logs.values())


def test_the_segmenters_losses_leave_no_gradient_on_the_discriminators() -> None:
    method = build(LocalOnly)
    context = spy(method.stages()[-1], method.optimizers)
    context.judges = list(method.alignment.parameters())
    method.step(batch(), context)
    assert [any(found) for found in context.judged] == [False, False, True]
    assert all(context.judged[-1])


def test_the_segmentation_loss_is_that_of_the_source_alone() -> None:
    method, data = build(LocalOnly), batch()
    expected = balanced_loss(method.segmenter(data.source_images).logits, data.source_labels)
    logs = method.step(data, spy(method.stages()[-1], method.optimizers))
    assert logs["segmentation"].item() == expected.item()


STAGES = [
    (SourceOnly, {"segment": {"segmenter"}}),
    (LocalOnly, {"segment": {"segmenter", "alignment"}}),
    (GlobalOnly, {"style": {"style"}, "segment": {"segmenter"}}),
    (GLUA, {"style": {"style"}, "segment": {"segmenter", "alignment"}}),
    (GLUASelfTraining, {"style": {"style"}, "segment": {"segmenter", "alignment", "teacher"}}),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("method", "expected"), STAGES)
def test_a_stage_trains_its_own_parts(
    method: type[Method], expected: dict[str, set[str]], style: str
) -> None:
    built = build(method, **({"style": style} if "style" in expected else {}))
    changed = {}
    for stage in built.stages():
        before = {n: copy.deepcopy(part.state_dict()) for n, part in built.named_children()}
        (stage.step or built.step)(batch(), spy(stage, built.optimizers))
        changed[stage.name] = {
            n
            for n, part in built.named_children()
            if first_difference(before[n], part.state_dict())
        }
    assert changed == expected


# -- optimizers -----------------------------------------------------------------------------------

SEGMENTING = [n for n in BUILT_IN if issubclass(Registry("method").load(n).Config, SegmentConfig)]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("name", SEGMENTING)
def test_methods_give_their_segmenter_the_optimizer_that_is_set(name: str, kind: str) -> None:
    """SGD uses ten times the rate for the last layers; each weight is listed once."""
    method = build(Registry("method").load(name), optimizer=kind, lr=0.02, weight_decay=0.3)
    optimizer = method.optimizers()["segmenter"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    heads = {id(p) for p in method.segmenter.head.parameters()}
    if hasattr(method, "aux_head"):
        heads |= {id(p) for p in method.aux_head.parameters()}
    for own, rate in rates.items():
        assert rate == pytest.approx(0.2 if kind == "sgd" and own in heads else 0.02)
    assert heads | {id(p) for p in method.segmenter.parameters()} == set(rates)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    assert all(group["weight_decay"] == 0.3 for group in optimizer.param_groups)
    assert type(optimizer).__name__.lower() == kind
    if kind == "sgd":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


Groups = list[dict[str, Any]]


def several(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(4)]


def groups_of(weights: list[nn.Parameter], listed: bool) -> Groups:
    """Return groups with 1, 3, 3 and 4 steps per update, as listings or as `repeats`."""
    a, b, c, d = weights
    if listed:
        return [{"params": [a], "lr": 0.1}, {"params": [b, c] * 3}, {"params": [d] * 4}]
    return [
        {"params": [a], "lr": 0.1},
        {"params": [b, c], "repeats": 3},
        {"params": [d], "repeats": 4},
    ]


SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}


def update(optimizer: SGD, weights: list[nn.Parameter], step: int) -> None:
    """Update with a decaying rate; the third weight has no gradient at first."""
    generator = torch.Generator().manual_seed(100 + step)
    for place, weight in enumerate(weights):
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = None if place == 2 and step < 2 else gradient
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * 0.8**step
    optimizer.step()


def test_repeated_sgd_is_torchs_with_weights_that_are_listed_several_times() -> None:
    own, theirs = several(), several()
    repeated = RepeatedSGD(groups_of(own, listed=False), **SETTINGS)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        listed = SGD(groups_of(theirs, listed=True), **SETTINGS, foreach=False)
    plain = several()
    once = SGD([{"params": [p]} for p in plain], **SETTINGS)
    for step in range(6):
        update(repeated, own, step)
        update(listed, theirs, step)
        update(once, plain, step)
        for a, b in zip(own, theirs, strict=True):
            assert torch.equal(a, b)
    assert (own[3] - plain[3]).abs().max() > 0.01  # the comparison can fail


def test_repeated_sgd_goes_on_from_its_state() -> None:
    through, broken = several(), several()
    first = RepeatedSGD(groups_of(through, listed=False), **SETTINGS)
    begun = RepeatedSGD(groups_of(broken, listed=False), **SETTINGS)
    for step in range(3):
        update(first, through, step)
        update(begun, broken, step)
    state = copy.deepcopy(begun.state_dict())
    again = RepeatedSGD(groups_of(broken, listed=False), **SETTINGS)
    again.load_state_dict(state)
    assert [group.get("repeats", 1) for group in again.param_groups] == [1, 3, 4]
    for step in range(3, 6):
        update(first, through, step)
        update(again, broken, step)
    for a, b in zip(through, broken, strict=True):
        assert torch.equal(a, b)


def test_repeated_sgd_keeps_its_groups() -> None:
    weights = several()
    optimizer = RepeatedSGD(groups_of(weights, listed=False), **SETTINGS)
    update(optimizer, weights, 3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1]


@pytest.mark.parametrize("method", [SourceOnly, GLUA])
@pytest.mark.parametrize("name", ["unet", "timm:resnet18"])
def test_repeated_steps_are_for_deeplab(method: type[Method], name: str) -> None:
    task = replace(TASK, segmenter=SegmenterSpec(name, 4, 3))
    with pytest.raises(ConfigError, match=r"method\.optimizer = sgd-repeated .* set") as error:
        build(method, task, optimizer="sgd-repeated")
    said = str(error.value)
    assert f"not '{name}'" in said and said.endswith(".") and "\n" not in said


# -- DeepLab --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd-repeated"])
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("name", ["ada_output", "glua"])
def test_methods_train_and_predict_on_deeplab(name: str, slices: int, optimizer: str) -> None:
    task = TaskInfo(
        "tiny", TinyDataset.structures, 64, SegmenterSpec("deeplab:resnet18"), 2, slices
    )
    method = build(Registry("method").load(name), task, optimizer=optimizer)
    for stage in method.stages():
        context = spy(stage, method.optimizers, segmenter=method.segmenter)
        logs = (stage.step or method.step)(batch(2, 64, slices), context)
        assert all(torch.isfinite(value) for value in logs.values())
    assert context.changes[0] == ("segmenter", {"segmenter"})
    method.eval()
    found = {}
    with torch.no_grad():
        for domain in DOMAINS:
            found[domain] = method.predict(images(2, 3, 64, slices), domain)
            assert found[domain].shape == (2, 3, 64, 64) and torch.isfinite(found[domain]).all()
            features = method.features(images(2, 3, 64, slices), domain)
            assert features.shape == (2, method.segmenter.feature_channels[-1], 9, 9)
    assert torch.equal(found["source"], found["target"]) == (name == "ada_output")


@pytest.mark.parametrize("name", ["deeplab", "deeplab:resnet18"])
def test_slices_that_do_not_fit_deeplab_are_declined(name: str) -> None:
    config = RunConfig("glua", "conformance", "plain-inverted", Grid(64, 1.0))
    config = replace(config, segmenter=SegmenterSpec(name))
    check_request(config, GLUA)
    check_request(replace(config, grid=Grid(72, 1.0)), GLUA)
    said = f"grid.size = 68 is not divisible by 8, the stride of segmenter.name = '{name}'; .*"
    with pytest.raises(ConfigError, match=said + r"another segmenter\.$"):
        check_request(replace(config, grid=Grid(68, 1.0)), GLUA)


@pytest.mark.parametrize("dilations", [2, 4])
def test_a_run_on_deeplab_is_exported_and_predicts_alike(
    dilations: int, phantom_root: Path, tmp_path: Path
) -> None:
    """The export keeps what the gain needs, and drops convolutions that are not summed."""
    sets = ["segmenter.name=deeplab:resnet18", f"segmenter.dilations={dilations}"]
    sets += ["grid.size=32", "grid.spacing=7", "batch_size=2", "method.optimizer=sgd-repeated"]
    planned = plan(
        RunRequest(
            "local_only",
            "phantom",
            preset="quick",
            steps=2,
            assignments=sets,
            data_root=phantom_root,
            runs_root=tmp_path / "runs",
            device="cpu",
            mlflow=False,
        )
    )
    execution.execute(planned, Progress(enabled=False))
    model = prediction.from_run(planned.directory, device="cpu")
    folder = exporting.export(model, planned.directory, tmp_path / "model")
    weights = exporting.predicting_weights(model)
    summed = {name.split(".")[3] for name in weights if name.startswith("segmenter.head.")}
    assert summed == {str(number) for number in range(dilations)}
    assert any(name.startswith("alignment.feature.") for name in weights)
    assert not any(name.startswith("alignment.output.") for name in weights)
    loaded = prediction.from_directory(folder, device="cpu")
    x = images(2)
    with torch.no_grad():
        assert torch.equal(model.method.predict(x, "target"), loaded.method.predict(x, "target"))


# -- frozen ---------------------------------------------------------------------------------------


def test_frozen_passes_gradients_and_restores() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 1)
    b.bias.requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    with frozen(a, b):
        assert not any(p.requires_grad for m in (a, b) for p in m.parameters())
        b(a(x)).sum().backward()
    assert x.grad is not None and (x.grad != 0).any()
    assert all(p.grad is None for m in (a, b) for p in m.parameters())
    assert [p.requires_grad for m in (a, b) for p in m.parameters()] == [True, True, True, False]
    with pytest.raises(KeyError), frozen(a):
        raise KeyError
    assert all(p.requires_grad for p in a.parameters())


# -- both style networks --------------------------------------------------------------------------

SMALL_STYLE = {
    "adgan_width": 4,
    "adgan_blocks": 1,
    "adgan_pool": 2,
    "adgan_lr": 1e-2,
    "codes_width": 4,
    "codes_blocks": 1,
    "codes_scales": 2,
    "codes_clusters": 3,
    "codes_lr": 1e-2,
    "codes_lr_d": 1e-2,
}


def restyler(kind: str, task: TaskInfo = TASK, **config: Any) -> Any:
    torch.manual_seed(0)
    made: Any = build_style(StyleConfig(**{**SMALL_STYLE, "style": kind, **config}), task)
    return made.train()


def context_of(style: Any, **watched: nn.Module) -> Spy:
    kind = next(name for name, way in STYLES.items() if isinstance(style, way))
    return spy(style_stage(style, StyleConfig(style=kind)), style.optimizers, **watched)


def test_a_setting_chooses_how_to_restyle() -> None:
    assert isinstance(restyler("adgan"), ADGAN) and isinstance(restyler("codes"), StyleCodes)
    assert isinstance(build(GLUA, style="adgan").style, ADGAN)
    assert isinstance(build(GLUA, style="codes").style, StyleCodes)
    with pytest.raises(ConfigError, match=r"style = 'cycle' is invalid; choose .*adgan, codes"):
        build(GLUA, style="cycle")


@pytest.mark.parametrize("kind", STYLES)
def test_the_style_stage_depends_on_the_settings_of_its_own_way(kind: str) -> None:
    names = {spec.name for spec in fields(StyleConfig)}
    prefixes = tuple(f"{name}_" for name in STYLES)
    assert {n for n in names if not n.startswith(prefixes)} == {"style", "style_share"}
    style = restyler(kind, style_share=0.7)
    stage = style_stage(style, StyleConfig(style=kind, style_share=0.7))
    assert stage.depends_on is not None and stage.share == 0.7
    own = {n for n in names if n.startswith(f"{kind}_")}
    assert set(stage.depends_on) == own | {"style", "style_share"}
    assert stage.modules == ("style",) and not stage.photometric and stage.translate is None
    assert (stage.step, stage.finish) == (style.step, style.finish)
    assert (stage.hold, stage.decay) == (style.hold, style.decay)


def test_learning_rates_of_the_style_stage() -> None:
    """AD-GAN's are constant for half of it, then decay linearly; the other's decay if set."""
    adgan = style_stage(restyler("adgan"), StyleConfig())
    assert [adgan.rate(p) for p in (0, 0.5, 0.75, 1)] == [1, 1, 0.5, 0]
    for decay, expected in ((0.0, 1.0), (2.0, 0.25)):
        codes = restyler("codes", codes_decay=decay)
        stage = style_stage(codes, StyleConfig(style="codes", codes_decay=decay))
        assert stage.rate(0.5) == expected


def test_settings_of_the_other_way_share_a_style_stage() -> None:
    with closing(Bench(GlobalOnly, {"style_share": 0.4})) as bench:
        cache = bench.cache()
        assert bench.train(cache=cache).reused == set()
        assert bench.train({"codes_width": 5}, cache=cache).reused == {"style"}
        assert bench.train({"adgan_width": 5}, cache=cache).reused == set()
        assert bench.train({"style": "codes"}, cache=cache).reused == set()


@pytest.mark.parametrize("kind", STYLES)
def test_a_style_step_updates_the_generator_and_then_what_judges_it(kind: str) -> None:
    style = restyler(kind)
    parts, judges = {
        "adgan": (("encoder", "decoder"), ("discriminator",)),
        "codes": (("generator",), ("d_source", "d_target", "d_content")),
    }[kind]
    watched = {name: style.get_submodule(name) for name in (*parts, *judges)}
    context = context_of(style, **watched)
    logs = style.step(batch(), context)
    last = "discriminators" if kind == "codes" else "discriminator"
    assert context.changes == [("generator", set(parts)), (last, set(judges))]
    assert all(torch.isfinite(value) and value.ndim == 0 for value in logs.values())


@pytest.mark.parametrize("kind", STYLES)
def test_the_generators_loss_leaves_no_gradient_on_what_judges_it(kind: str) -> None:
    style = restyler(kind)
    context = context_of(style)
    named = style.named_parameters()
    context.judges = [p for n, p in named if n.startswith(("d_", "discriminator"))]
    style.step(batch(), context)
    *before, last = map(any, context.judged)
    assert before and not any(before) and last


@pytest.mark.parametrize("kind", STYLES)
def test_the_style_batch_has_an_upper_limit(kind: str) -> None:
    style = restyler(kind, task=replace(TASK, batch_size=4), **{f"{kind}_batch": 1})
    seen: list[int] = []
    first = style.encoder if kind == "adgan" else style.generator.content
    first.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    for _ in range(4):
        style.step(batch(4), context_of(style))
    assert set(seen) == {2}  # one image of each domain


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("kind", STYLES)
def test_restyled_images_keep_shape_and_range(kind: str, slices: int) -> None:
    style = restyler(kind, replace(TASK, slices=slices))
    context = context_of(style)
    context.target_slices = lambda: iter(images(24, 5, slices=slices).split(8))
    style.step(batch(2, slices=slices), context)
    style.finish(context)
    before = copy.deepcopy(style.state_dict())
    torch.manual_seed(1)
    given = images(5, slices=slices)
    first, second = style.restyle(given), style.restyle(given)
    assert first.shape == given.shape and not first.requires_grad
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, second) == (kind == "adgan")  # codes are drawn, a domain is not
    torch.manual_seed(1)
    assert torch.equal(style.restyle(given), first)
    assert first_difference(before, style.state_dict()) is None


@pytest.mark.parametrize("kind", STYLES)
def test_each_image_is_restyled_by_itself(kind: str) -> None:
    style = restyler(kind)
    style.finish(context_of(style))
    torch.manual_seed(1)
    together = style.restyle(images(4))
    if kind == "adgan":
        torch.testing.assert_close(style.restyle(images(4)[2:]), together[2:], atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


FLAT = ("constant", "empty", "halves", "pixel", "mixed")


def flat(kind: str, count: int = 4) -> Tensor:
    """Return slices with one value, two values in halves, or one pixel of another value."""
    if kind == "mixed":
        return torch.cat([flat(k, 1) for k in FLAT[:4]])[:count]
    made = torch.full((count, 1, SIZE, SIZE), -1.0 if kind == "empty" else 0.1)
    if kind == "halves":
        made[..., : SIZE // 2] = -1.0
    elif kind == "pixel":
        made[..., SIZE // 2, SIZE // 2] = 1.0
    return made


def deep(kind: str, mode: str = "adt") -> Any:
    """Return a style network with the default depth, through which gradients could grow."""
    task = replace(TASK, batch_size=4)
    return restyler(kind, task, adgan_mode=mode, adgan_batch=4, adgan_blocks=4, codes_blocks=4)


def flat_batch(shown: str) -> Batch:
    return Batch(flat(shown), torch.zeros(4, SIZE, SIZE, dtype=torch.long), flat(shown))


@pytest.mark.filterwarnings("ignore")  # k-means warns about empty clusters
@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "mode", "shown"),
    [
        *(("adgan", "adt", shown) for shown in FLAT),
        *(("adgan", mode, "mixed") for mode in MODES if mode != "adt"),
        *(("codes", "", shown) for shown in FLAT),
    ],
)
def test_slices_without_a_picture_break_no_style_stage(
    kind: str, mode: str, shown: str, precision: str
) -> None:
    style = deep(kind, mode or "adt")
    half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    context = context_of(style)
    context.target_slices = lambda: iter([flat(shown)])
    for step in range(25):
        with half:
            logs = style.step(flat_batch(shown), context)
        assert all(torch.isfinite(value) for value in logs.values()), (step, logs)
    with half:
        style.finish(context)
        restyled = style.restyle(flat(shown))
    assert all(torch.isfinite(value).all() for value in style.state_dict().values())
    assert torch.isfinite(restyled).all()


@pytest.mark.parametrize("shown", ["constant", "empty", "mixed"])
def test_a_norm_that_lets_gradients_through_constant_maps_breaks_style_codes(
    shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(networks, "varying", lambda inverse, epsilon: torch.ones_like(inverse))
    style = deep("codes")
    context = context_of(style)
    logs = [style.step(flat_batch(shown), context) for _ in range(3)]
    assert not all(torch.isfinite(value) for value in logs[-1].values())


# -- style codes ----------------------------------------------------------------------------------


@pytest.fixture
def style() -> StyleCodes:
    made: StyleCodes = restyler("codes")
    return made


def test_a_step_moves_every_part_of_the_generator_and_its_average(style: StyleCodes) -> None:
    parts = dict(style.generator.named_children())
    context = context_of(style, **parts)
    before = copy.deepcopy(style.average.state_dict())
    style.step(batch(), context)
    assert context.changes == [("generator", set(parts)), ("discriminators", set())]
    assert first_difference(before, style.average.state_dict()) is not None
    assert int(style.updates) == 1


def test_shapes_of_content_and_style(style: StyleCodes) -> None:
    content = style.generator.content(images(3))
    assert content.shape == (3, 16, SIZE // 4, SIZE // 4)
    codes = style.generator.style_source(images(3))
    assert codes.shape == (3, style.bank.shape[-1])
    made = style.generator.decode(content, codes)
    assert made.shape == (3, 1, SIZE, SIZE)
    assert made.min() >= -1 and made.max() <= 1


def test_a_style_changes_how_it_looks(style: StyleCodes) -> None:
    content = style.generator.content(images(2))
    a, b = torch.zeros(2, style.bank.shape[-1]), torch.full((2, style.bank.shape[-1]), 3.0)
    assert (style.generator.decode(content, a) - style.generator.decode(content, b)).abs().max() > 0


def test_the_bank_holds_styles_of_the_target(style: StyleCodes) -> None:
    context = context_of(style)
    style.finish(context)
    shares = style.bank_share
    assert shares.sum().item() == pytest.approx(1.0) and (shares >= 0).all()
    codes = torch.cat([style.average.style_target(x) for x in context.target_slices()])
    for cluster, share in zip(style.bank, shares, strict=True):
        if share > 0:
            distances = (cluster[:, None] - codes[None]).abs().amax(-1)
            assert distances.min(1).values.max() < 1e-6
    before = style.bank.clone()
    style.finish(context)
    assert torch.equal(style.bank, before)


@pytest.mark.filterwarnings("ignore")  # k-means warns about empty clusters
def test_fewer_slices_than_clusters_still_fill_the_bank(style: StyleCodes) -> None:
    context = context_of(style)
    context.target_slices = lambda: iter([images(2)])
    style.finish(context)
    assert style.bank_share.sum().item() == pytest.approx(1.0)
    assert torch.isfinite(style.bank).all()


def test_empty_clusters_are_never_drawn(style: StyleCodes) -> None:
    style.bank.fill_(float("nan"))
    style.bank[1] = 0.5
    style.bank_share.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert torch.isfinite(style.restyle(images(16))).all()


def test_the_average_follows_the_generator(style: StyleCodes) -> None:
    with torch.no_grad():
        for parameter in style.generator.parameters():
            parameter.add_(1.0)
    distances = []
    for _ in range(60):
        pairs = zip(style.average.parameters(), style.generator.parameters(), strict=True)
        distances.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
        style.update_average()
    assert all(b <= a + 1e-6 for a, b in zip(distances, distances[1:], strict=False))
    assert distances[-1] < 0.01


@pytest.mark.parametrize(("target", "expected"), [(1, 1), (2, 2), (3, None), (4, None)])
def test_there_are_at_most_as_many_clusters_as_target_cases(
    target: int, expected: int | None
) -> None:
    for method in (GlobalOnly, GLUA):
        built = build(method, style="codes", codes_clusters=3)
        if expected is None:
            assert built.check(Cases(source=5, target=target)) == {}
            continue
        lines: list[str] = []
        config = RunConfig(
            method.name,
            "conformance",
            "plain-inverted",
            TinyDataset.grids["quick"],
            asdict(built.config),
        )
        chosen: Any = {"source_train": range(5), "target_train": range(target)}
        found = adjusted(config, built, chosen, lines.append)
        assert found.method_config == {**asdict(built.config), "codes_clusters": expected}
        assert len(lines) == 1
        assert lines[0].startswith(f"method.codes_clusters is {expected} instead of 3: with more")


def test_the_default_style_takes_any_number_of_cases() -> None:
    assert build(GLUA, codes_clusters=64).check(Cases(source=1, target=1)) == {}


@pytest.mark.parametrize("method", [GLUA, LocalOnly])
def test_settings_that_others_disable_are_named(method: type[Method]) -> None:
    """They are kept, and the run says that they have no effect."""
    built = build(method, mask_ratio=0.5, mask="soft", gain="none", gain_at="skips")
    lines: list[str] = []
    config = RunConfig(
        "glua", "conformance", "plain-inverted", TinyDataset.grids["quick"], asdict(built.config)
    )
    chosen: Any = {"source_train": range(5), "target_train": range(5)}
    assert adjusted(config, built, chosen, lines.append) == config
    assert lines == [
        "method.mask_ratio = 0.5 has no effect: it needs mask = topk or random, and mask is soft.",
        "method.gain_at = skips has no effect: gain is none.",
    ]
    for used in ({"mask_ratio": 0.5, "mask": "topk"}, {"gain_at": "skips"}):
        assert build(method, **used).check(Cases(source=5, target=5)) == {}


@pytest.mark.parametrize(("size", "scales", "fitting"), [(32, 3, 2), (48, 3, 2), (64, 4, 3)])
def test_slices_too_small_for_style_codes_are_declined(
    size: int, scales: int, fitting: int
) -> None:
    """They are refused before training, not by an error about kernel sizes during it."""
    task = replace(TASK, size=size)
    config = replace(GLUA.Config(), codes_scales=scales, codes_width=4, adgan_width=4)
    said = f"grid.size = {size} is too small .* needs {16 * 2 ** (scales - 1)}; .* to {fitting} or"
    with pytest.raises(ConfigError, match=said):
        GLUA(task, replace(config, style="codes"))
    built = GLUA(task, replace(config, style="codes", codes_scales=fitting))
    assert len(built.style.d_source(torch.zeros(2, 1, size, size))) == fitting
    GLUA(task, config)  # AD-GAN has no scales


# -- whole methods --------------------------------------------------------------------------------


def demand_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Demand that the second has the weights of the first, bit for bit."""
    assert first_difference(a, {name: b[name] for name in a}) is None


class Balanced(SourceOnly):
    """Source only, with the loss of GLUA's authors."""

    name = "balanced"
    uses_target = True  # served but not used, so that both draw the same random numbers
    segmentation = staticmethod(balanced_loss)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("plain", "union", "short"),
    [(GlobalOnly, GLUA, {"style_share": 0.5}), (Balanced, LocalOnly, {})],
)
def test_without_step_b_its_method_trains_as_the_one_without_it(
    plain: type[Method], union: type[Method], short: dict[str, float], mask: str
) -> None:
    """Initial and trained weights are bit-identical; the norm keeps no statistics."""
    with closing(Bench(plain, short)) as one, closing(Bench(union, short)) as other:
        a, b = one.train(steps=2), other.train({**NOTHING, "mask": mask}, steps=2)
        demand_same(a.initial, b.initial)
        demand_same(a.weights, b.weights)
        changed = other.train({**NOTHING, "lambda_output": 1.0}, steps=2)
    segmenter = {n: v for n, v in b.weights.items() if n.startswith("segmenter.")}
    assert first_difference(segmenter, {n: changed.weights[n] for n in segmenter}) is not None


def test_global_only_segments_restyled_images() -> None:
    method = build(GlobalOnly)
    first, second = method.stages()
    assert first.depends_on is not None and first.modules == ("style",) and not first.photometric
    assert second.translate == method.style.restyle
    assert first.optimizers is not None and set(first.optimizers()) == {
        "generator",
        "discriminator",
    }
    assert set(method.optimizers()) == {"segmenter"}
    assert set(build(GLUA).optimizers()) == {"segmenter", "alignment"}
    assert [stage.translate for stage in build(LocalOnly).stages()] == [None]


def test_glua_is_its_parts_put_together() -> None:
    """Each setting of a part has the same value in GLUA, with every preset."""
    for name in GLUA.parts:
        part = Registry("method").load(name)
        for preset in PRESETS:
            whole, own = (
                asdict(build_settings(m.Config, m.presets.get(preset, {}), "method"))
                for m in (GLUA, part)
            )
            assert own == {n: whole[n] for n in own}, (name, preset)


@pytest.mark.parametrize("method", [GLUA, LocalOnly, GlobalOnly])
def test_the_variants_are_the_rows_of_an_ablation(method: type[Method]) -> None:
    variants = method.variants()
    assert (NOTHING in variants.values()) == (method is LocalOnly)
    assert sum(changes == {} for changes in variants.values()) == 1
    for preset in PRESETS:
        base = method.presets.get(preset, {})
        rows = {n: build_settings(method.Config, {**base, **c}, "m") for n, c in variants.items()}
        assert len(set(rows.values())) == len(rows)
    if method is GLUA:
        styles = {
            tuple(getattr(row, spec.name) for spec in fields(StyleConfig)) for row in rows.values()
        }
        assert len(styles) == 1  # so all of them share one style stage
        assert list(variants)[-1] == "GLUA" and variants["GLUA"] == {}
        without = [row for n, row in rows.items() if n.startswith("Step A")]
        assert {row.gain for row in without} == {"none"} and len(without) == 3
        assert rows["ratio mask (ours)"].mask == "topk"
        assert rows["random mask (ours)"].mask == "random"


@pytest.mark.parametrize("name", BUILT_IN)
def test_methods_keep_the_contract_with_several_slices(name: str) -> None:
    """It trains, predicts and draws; target labels, including neighbours', are never read."""
    method = Registry("method").load(name)
    short = {"style_share": 0.5} if "style_share" in method.Config.__dataclass_fields__ else {}
    with closing(Bench(method, short, slices=3)) as bench:
        trained = bench.baseline
        assert trained.method.task.slices == 3
        for check in ("logits", "pictures", "checkpoint", "label_poison", "resume", "whole_run"):
            result = bench.checks.result(check)
            assert result.passed, f"{check}: {result.message}"
        pictures = trained.method.pictures(bench.batch())
        for shown in ("restyled", "source again", "target as source", "global", "local", "fused"):
            if shown in pictures:
                assert pictures[shown].shape[1] == 3  # the whole stack is translated


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sifa", {}),
        ("cycle_translate", {}),
        ("cut", {}),
        ("global_only", {"style": "adgan"}),
        ("global_only", {"style": "codes", "codes_clusters": 1}),
    ],
)
def test_what_translates_stacks_changes_all_their_slices(
    name: str, changes: dict[str, Any]
) -> None:
    built = build(Registry("method").load(name), replace(TASK, slices=3), **changes).eval()
    stack = images(6).view(2, 3, SIZE, SIZE)
    restyled = built.pictures(
        Batch(stack, torch.zeros(2, SIZE, SIZE, dtype=torch.long), stack.flip(0))
    )["restyled"]
    assert restyled.shape == stack.shape
    assert all(bool((restyled[:, s] - stack[:, s]).abs().mean() > 1e-4) for s in range(3))


@pytest.mark.parametrize("name", BUILT_IN)
def test_supervised_is_for_methods_that_do_not_adapt(name: str) -> None:
    method = Registry("method").load(name)
    config = RunConfig(
        name,
        "conformance",
        "plain-inverted",
        TinyDataset.grids["quick"],
        segmenter=SegmenterSpec("unet", 4, 3),
        scenario="supervised",
    )
    assert config.privileged
    if method.uses_target:
        with pytest.raises(ConfigError, match=r"source_only\.$"):
            check_request(config, method)
    else:
        check_request(config, method)


def test_source_only_learns_what_it_is_shown() -> None:
    method, data = build(SourceOnly), replace(batch(), target_images=None)
    (stage,) = method.stages()
    context = spy(stage, method.optimizers, segmenter=method.segmenter)
    losses = [method.step(data, context)["segmentation"].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(change == ("segmenter", {"segmenter"}) for change in context.changes)
    with pytest.raises(TypeError, match="uses_target"):
        _ = data.target
