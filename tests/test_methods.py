"""methods/*.py: masks, losses and updates do what the cards say; no test knows a default."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glua_bench import runs
from glua_bench.config import PRESETS, RunConfig, SegmenterSpec, build_settings
from glua_bench.conformance import Bench, TinyDataset, first_difference, small_settings
from glua_bench.errors import ConfigError
from glua_bench.losses import lsgan_loss, segmentation_loss
from glua_bench.method import Batch, Context, Method, Stage, TaskInfo, frozen
from glua_bench.methods.alignment import (
    MASKS,
    AlignmentConfig,
    LocalAlignment,
    gap_map,
    local_mask,
)
from glua_bench.methods.global_only import GlobalOnly
from glua_bench.methods.glua import GLUA, GLUAConfig
from glua_bench.methods.local_only import LocalConfig, LocalOnly
from glua_bench.methods.source_only import SourceOnly
from glua_bench.methods.style import StyleConfig, StyleTransfer
from glua_bench.networks import Segmented
from glua_bench.registry import Registry

SIZE = 32
TASK = TaskInfo("tiny", TinyDataset.structures, SIZE, SegmenterSpec("unet", 4, 3), 2)
BUILT_IN = [e.name for e in Registry("method").entries() if e.origin == "glua-bench"]


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, SIZE, SIZE, generator=generator) * 2 - 1


def batch(count: int = 2) -> Batch:
    labels = (images(count)[:, 0] > 0).long()
    return Batch(images(count), labels, images(count, 1) * 0.3 + 0.4)


def build(method: type[Method], **config: Any) -> Any:
    torch.manual_seed(0)
    made = method(TASK, build_settings(method.Config, small_settings(method, config), "method"))
    return made.train()


class Spy(Context):
    """Notes which parts of the method each update changes."""

    changes: list[tuple[str, set[str]]]
    watched: dict[str, nn.Module]

    def apply(self, name: str) -> None:
        before = {n: copy.deepcopy(m.state_dict()) for n, m in self.watched.items()}
        super().apply(name)
        changed = {
            n for n, m in self.watched.items() if first_difference(before[n], m.state_dict())
        }
        self.changes.append((name, changed))


def spy(method: Any, stage: Stage, **watched: nn.Module) -> Spy:
    def target_slices() -> Iterator[Tensor]:
        yield from images(24, 5).split(8)

    context = Spy(stage, 0, 10, method.optimizers(stage), target_slices)
    context.changes, context.watched = [], watched
    return context


# -- gap map and mask -----------------------------------------------------------------------------


@st.composite
def score_maps(draw: Callable[..., Any]) -> Tensor:
    """Different scores at all places, some below 0 and some above 1."""
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
    assert (gap[scores <= 0] == 1).all() and (gap[scores >= 0.5] == 0).all()
    order = scores.flatten().argsort()
    assert (gap.flatten()[order].diff() <= 0).all()
    assert gap_map(torch.tensor([0.25])).item() == 0.5


@examples
@given(score_maps(), ratios)
def test_topk_keeps_the_share_with_the_lowest_scores(scores: Tensor, ratio: float) -> None:
    mask = local_mask(scores, "topk", ratio)
    places = scores[0].numel()
    assert mask.shape == scores.shape
    assert counts(mask) == [max(1, round(ratio * places))] * len(scores)
    for own, kept in zip(scores.flatten(1), mask.flatten(1).bool(), strict=True):
        if not kept.all():
            assert own[kept].max() < own[~kept].min()


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


# -- alignment ------------------------------------------------------------------------------------


def alignment(**config: Any) -> tuple[LocalAlignment, Segmented]:
    torch.manual_seed(0)
    values = {"align_level": 1, "align_width": 0.05, "mask_ratio": 0.25, **config}
    made = LocalAlignment(TASK, AlignmentConfig(**values), [8, 6, 4])
    features = tuple(
        torch.randn(2, c, s, s, requires_grad=True) for c, s in ((8, 4), (6, 8), (4, 16))
    )
    return made, Segmented(torch.zeros(2, 3, 16, 16), features)


@pytest.mark.parametrize("form", ["topk", "random"])
def test_the_local_loss_counts_masked_places_alone(form: str) -> None:
    made, target = alignment(mask=form, lambda_global=0.0, lambda_local=2.0)
    scores = made.discriminator(target.features[1]).detach()
    torch.manual_seed(3)
    mask = local_mask(scores, form, 0.25)
    torch.manual_seed(3)
    loss, logs = made.loss(target)
    torch.testing.assert_close(logs["align_masked"], (scores[mask == 1] - 1).square().mean())
    torch.testing.assert_close(loss, 2 * logs["align_masked"])
    torch.testing.assert_close(logs["gap"], gap_map(scores).mean())
    if form == "topk":
        assert logs["align_masked"] > logs["align"]  # the places with the larger gap


@pytest.mark.parametrize("form", MASKS)
def test_the_global_loss_moves_every_place(form: str) -> None:
    made, target = alignment(mask=form, lambda_global=0.5, lambda_local=0.0)
    loss, logs = made.loss(target)
    loss.backward()
    features = target.features[1]
    assert (features.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]
    torch.testing.assert_close(logs["align"], lsgan_loss(made.discriminator(features), 1))
    torch.testing.assert_close(loss, 0.5 * logs["align"])


def test_the_soft_form_counts_every_place_by_its_gap() -> None:
    made, target = alignment(mask="soft", lambda_global=0.0, lambda_local=1.0)
    loss, _ = made.loss(target)
    loss.backward()
    features = target.features[1]
    assert (features.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]
    scores = made.discriminator(features).detach()
    weights = 1 + gap_map(scores)
    torch.testing.assert_close(
        loss.detach(), ((scores - 1).square() * weights / weights.sum()).sum()
    )


def test_without_a_mask_both_losses_are_one() -> None:
    made, target = alignment(mask="none", lambda_global=0.0, lambda_local=1.0)
    _, logs = made.loss(target)
    torch.testing.assert_close(logs["align"], logs["align_masked"])


def test_the_alignment_loss_leaves_the_discriminator_and_other_maps_alone() -> None:
    made, target = alignment(lambda_global=1.0, lambda_local=1.0)
    made.loss(target)[0].backward()
    assert all(p.grad is None and p.requires_grad for p in made.discriminator.parameters())
    assert target.features[0].grad is None and target.features[2].grad is None


def test_the_level_ends_at_the_finest_map() -> None:
    made, _ = alignment(align_level=8)
    assert made.level == 2


@pytest.mark.parametrize("form", MASKS)
def test_the_discriminator_learns_the_domains_and_touches_nothing_else(form: str) -> None:
    made, target = alignment(mask=form, lambda_local=1.0, align_lr=1e-2)
    source = Segmented(target.logits, tuple(f + 1 for f in target.features))
    context = Context(Stage(), 0, 10, {"alignment": made.optimizer()}, lambda: iter(()))
    first = made.update(source, target, context)
    for _ in range(150):
        logs = made.update(source, target, context)
    assert logs["discriminator"] < first["discriminator"]
    assert 0 <= first["told"] <= 1 and logs["told"] > 0.8
    assert all(f.grad is None for f in target.features)


def test_an_aligned_step_updates_the_segmenter_and_then_the_discriminator() -> None:
    method = build(LocalOnly, lambda_local=0.5, mask="topk")
    stage = method.stages()[-1]
    parts = {"segmenter": method.segmenter, "discriminator": method.alignment.discriminator}
    context = spy(method, stage, **parts)
    logs = method.step(batch(), context)
    assert context.changes == [("segmenter", {"segmenter"}), ("alignment", {"discriminator"})]
    assert {"segmentation", "align", "align_masked", "discriminator", "told", "gap"} == set(logs)


def test_one_pass_over_both_domains_sees_each_image_alone() -> None:
    """The norm keeps images apart, so the joint pass gives what two passes would."""
    method, data = build(LocalOnly), batch()
    both = method.segmenter(torch.cat([data.source_images, data.target]))
    alone = method.segmenter(data.source_images)
    torch.testing.assert_close(both.logits[:2], alone.logits, rtol=1e-4, atol=1e-5)
    logs = method.step(data, spy(method, method.stages()[-1]))
    expected = segmentation_loss(alone.logits, data.source_labels)
    torch.testing.assert_close(logs["segmentation"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", MASKS)
def test_pictures_show_gap_and_mask_in_the_size_of_the_images(form: str) -> None:
    pictures = build(GLUA, mask=form, mask_ratio=0.25).pictures(batch())
    assert set(pictures) == {"restyled", "gap", "mask"}
    for name in ("gap", "mask"):
        assert pictures[name].shape == (2, 1, SIZE, SIZE)
        assert pictures[name].min() >= 0 and pictures[name].max() <= 1
    if form in ("topk", "random"):
        assert pictures["mask"].mean().item() == pytest.approx(0.25, abs=0.05)


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


# -- style ----------------------------------------------------------------------------------------


@pytest.fixture
def style() -> StyleTransfer:
    torch.manual_seed(0)
    small = {"style_width": 4, "style_blocks": 1, "style_scales": 2, "style_clusters": 3}
    return StyleTransfer(StyleConfig(**{**small, "style_lr": 1e-2, "style_lr_d": 1e-2})).train()


def context_of(style: StyleTransfer, **watched: nn.Module) -> Spy:
    class Whole:
        def optimizers(self, stage: Stage) -> Any:
            return style.optimizers()

    return spy(Whole(), style.stage(), **watched)


def test_a_style_step_updates_the_generator_and_then_the_discriminators(
    style: StyleTransfer,
) -> None:
    judges = {name: getattr(style, name) for name in ("d_source", "d_target", "d_content")}
    parts = dict(style.generator.named_children())
    context = context_of(style, **parts, **judges)
    before = copy.deepcopy(style.average.state_dict())
    logs = style.step(batch(), context)
    assert context.changes == [("generator", set(parts)), ("discriminators", set(judges))]
    assert all(torch.isfinite(value) and value.ndim == 0 for value in logs.values())
    assert first_difference(before, style.average.state_dict()) is not None
    assert style.updates == 1


def test_the_generators_loss_leaves_no_gradient_on_discriminators(style: StyleTransfer) -> None:
    judges = [p for d in (style.d_source, style.d_target, style.d_content) for p in d.parameters()]
    found: list[bool] = []

    class Looking(Spy):
        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            found.append(any(p.grad is not None for p in judges))

    context = context_of(style)
    context.__class__ = Looking
    style.step(batch(), context)
    assert found == [False, True]


def test_shapes_of_content_and_style(style: StyleTransfer) -> None:
    content = style.generator.content(images(3))
    assert content.shape == (3, 16, SIZE // 4, SIZE // 4)
    codes = style.generator.style_source(images(3))
    assert codes.shape == (3, style.bank.shape[-1])
    made = style.generator.decode(content, codes)
    assert made.shape == (3, 1, SIZE, SIZE)
    assert made.min() >= -1 and made.max() <= 1


def test_a_style_changes_how_it_looks(style: StyleTransfer) -> None:
    content = style.generator.content(images(2))
    a, b = torch.zeros(2, style.bank.shape[-1]), torch.full((2, style.bank.shape[-1]), 3.0)
    assert (style.generator.decode(content, a) - style.generator.decode(content, b)).abs().max() > 0


def test_the_style_batch_has_an_upper_limit(style: StyleTransfer) -> None:
    style.config = replace(style.config, style_batch=1)
    seen: list[int] = []
    style.generator.content.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    style.step(batch(4), context_of(style))
    assert seen[0] == 2  # one image of each domain


def test_the_bank_holds_styles_of_the_target(style: StyleTransfer) -> None:
    context = context_of(style)
    style.fill_bank(context)
    shares = style.bank_share
    assert shares.sum().item() == pytest.approx(1.0) and (shares >= 0).all()
    codes = torch.cat([style.average.style_target(x) for x in context.target_slices()])
    for cluster, share in zip(style.bank, shares, strict=True):
        if share > 0:
            distances = (cluster[:, None] - codes[None]).abs().amax(-1)
            assert distances.min(1).values.max() < 1e-6
    before = style.bank.clone()
    style.fill_bank(context)
    assert torch.equal(style.bank, before)


@pytest.mark.filterwarnings("ignore")  # k-means says that clusters stay empty
def test_fewer_slices_than_clusters_still_fill_the_bank(style: StyleTransfer) -> None:
    context = context_of(style)
    context.target_slices = lambda: iter([images(2)])
    style.fill_bank(context)
    assert style.bank_share.sum().item() == pytest.approx(1.0)
    assert torch.isfinite(style.bank).all()


def test_restyled_images_keep_shape_and_range(style: StyleTransfer) -> None:
    style.fill_bank(context_of(style))
    before = copy.deepcopy(style.state_dict())
    torch.manual_seed(1)
    first = style.restyle(images(5))
    assert first.shape == (5, 1, SIZE, SIZE) and not first.requires_grad
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(style.restyle(images(5)), first) is False  # other styles
    torch.manual_seed(1)
    assert torch.equal(style.restyle(images(5)), first)
    assert first_difference(before, style.state_dict()) is None


def test_empty_clusters_are_never_drawn(style: StyleTransfer) -> None:
    style.bank.fill_(float("nan"))
    style.bank[1] = 0.5
    style.bank_share.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert torch.isfinite(style.restyle(images(16))).all()


def test_the_average_follows_the_generator(style: StyleTransfer) -> None:
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


# -- whole methods --------------------------------------------------------------------------------


def test_glua_without_alignment_is_global_only() -> None:
    """Same first weights, bit for bit, and the same segmenter but for the rounding of sums.

    The segmenter sees source and target in one pass here, and a convolution may sum a larger
    batch in another order.
    """
    plain = Bench(GlobalOnly, {"style_share": 0.5})
    union = Bench(GLUA, {"style_share": 0.5, "lambda_global": 0.0, "lambda_local": 0.0})
    a, b = plain.train(steps=2), union.train(steps=2)
    assert first_difference(a.initial, {name: b.initial[name] for name in a.initial}) is None
    for name, value in a.weights.items():
        if name.startswith("style."):
            assert torch.equal(value, b.weights[name]), name
        torch.testing.assert_close(b.weights[name], value, rtol=1e-3, atol=1e-4, msg=name)
    changed = union.train({"lambda_global": 1.0}, steps=2)
    segmenter = {n: v for n, v in b.weights.items() if n.startswith("segmenter.")}
    assert first_difference(segmenter, {n: changed.weights[n] for n in segmenter}) is not None


def test_global_only_segments_restyled_images() -> None:
    method = build(GlobalOnly)
    first, second = method.stages()
    assert first.depends_on is not None and "style" in first.modules and not first.photometric
    assert set(first.depends_on) == set(StyleConfig.__dataclass_fields__)
    assert second.translate == method.style.restyle
    assert set(method.optimizers(first)) == {"generator", "discriminators"}
    assert set(method.optimizers(second)) == {"segmenter"}
    assert set(build(GLUA).optimizers(second)) == {"segmenter", "alignment"}


def test_local_only_counts_masked_places_alone_and_restyles_nothing() -> None:
    """Its card says that λ_global is 0 here; nothing else of GLUA's alignment differs."""
    mine, shared = asdict(LocalConfig()), asdict(AlignmentConfig())
    assert mine["lambda_global"] == 0.0
    assert {n: v for n, v in mine.items() if n in shared and n != "lambda_global"} == {
        n: v for n, v in shared.items() if n != "lambda_global"
    }
    assert [stage.translate for stage in build(LocalOnly).stages()] == [None]


def test_the_variants_are_the_rows_of_an_ablation() -> None:
    variants = GLUA.variants()
    assert variants["union (GLUA)"] == {}
    for preset in PRESETS:
        base = GLUA.presets.get(preset, {})
        rows = {n: build_settings(GLUAConfig, {**base, **c}, "m") for n, c in variants.items()}
        assert len(set(rows.values())) == len(rows)
        styles = {tuple(getattr(row, n) for n in StyleConfig.__dataclass_fields__)
                  for row in rows.values()}  # fmt: skip
        assert len(styles) == 1  # so all of them share one style stage
    assert rows["global + unmasked alignment"].lambda_local == 0
    assert rows["global + masked alignment only"].lambda_global == 0
    assert rows["global + random mask"].mask == "random"
    assert rows["global + soft mask"].mask == "soft"


@pytest.mark.parametrize("name", BUILT_IN)
def test_methods_keep_the_contract_with_several_slices(name: str) -> None:
    """Trains, predicts and shows; the target's labels, also a neighbour's, are never read."""
    method = Registry("method").load(name)
    short = {"style_share": 0.5} if "style_share" in method.Config.__dataclass_fields__ else {}
    with closing(Bench(method, short, slices=3)) as bench:
        trained = bench.baseline
        assert trained.method.task.slices == 3
        for check in ("logits", "pictures", "checkpoint", "label_poison", "resume", "whole_run"):
            result = bench.outcome(check)
            assert result.passed, f"{check}: {result.message}"
        pictures = trained.method.pictures(bench.batch())
        for shown in ("restyled", "source again", "target as source", "global", "local", "fused"):
            if shown in pictures:
                assert pictures[shown].shape[1] == 3  # the whole stack is translated


@pytest.mark.parametrize("name", ["sifa", "cycle_translate", "global_only"])
def test_what_translates_stacks_changes_all_their_slices(name: str) -> None:
    task = replace(TASK, slices=3)
    method = Registry("method").load(name)
    torch.manual_seed(0)
    config = build_settings(
        method.Config,
        small_settings(method, {"style_clusters": 1} if name == "global_only" else {}),
        "method",
    )
    built = method(task, config).eval()
    stack = images(6).view(2, 3, SIZE, SIZE)
    batch = Batch(stack, torch.zeros(2, SIZE, SIZE, dtype=torch.long), stack.flip(0))
    restyled = built.pictures(batch)["restyled"]
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
            runs.check_request(config, method)
    else:
        runs.check_request(config, method)


def test_source_only_learns_what_it_is_shown() -> None:
    method, data = build(SourceOnly), replace(batch(), target_images=None)
    (stage,) = method.stages()
    context = spy(method, stage, segmenter=method.segmenter)
    losses = [method.step(data, context)["segmentation"].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(change == ("segmenter", {"segmenter"}) for change in context.changes)
    with pytest.raises(TypeError, match="uses_target"):
        _ = data.target


@pytest.mark.parametrize(("size", "scales", "fitting"), [(32, 3, 2), (48, 3, 2), (64, 4, 3)])
def test_slices_too_small_for_the_style_stage_are_declined(
    size: int, scales: int, fitting: int
) -> None:
    """In a sentence before training, instead of a kernel's size in the midst of it."""
    method = Registry("method").load("glua")
    task = TaskInfo("t", TinyDataset.structures, size, SegmenterSpec("unet", 4, 3), 2)
    config = replace(method.Config(), style_scales=scales, style_width=4)
    said = f"grid.size = {size} is too small .* need {16 * 2 ** (scales - 1)}; .* to {fitting} or"
    with pytest.raises(ConfigError, match=said):
        method(task, config)
    built = method(task, replace(config, style_scales=fitting))
    assert len(built.style.d_source(torch.zeros(2, 1, size, size))) == fitting
