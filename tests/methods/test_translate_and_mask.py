"""Translate and mask: masks and consistency by hand, the step, and the shared stages."""

from __future__ import annotations

import copy
import json
import math
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_methods import TASK, batch, context_of, images

from glua_bench.augment import tone_curves
from glua_bench.conformance import first_difference
from glua_bench.conformance.bench import Bench
from glua_bench.identity import stage_key
from glua_bench.losses import segmentation_loss
from glua_bench.method import Cases, Method
from glua_bench.methods.components.masked_consistency import block_mask, masked_consistency
from glua_bench.methods.cut import CUT
from glua_bench.methods.cycle_translate import CycleTranslate
from glua_bench.methods.translate_and_mask import TranslateAndMask, TranslateAndMaskConfig

SMALL = {"cycle_width": 4, "cycle_blocks": 1, "cycle_width_d": 4, "cycle_pool": 2}
SMALL |= {"cut_width": 4, "cut_blocks": 1, "cut_width_d": 4, "cut_width_heads": 8}


def build(**config: Any) -> TranslateAndMask:
    torch.manual_seed(0)
    return TranslateAndMask(TASK, TranslateAndMaskConfig(**{**SMALL, **config}))


# -- masks ----------------------------------------------------------------------------------------


def test_blocks_are_shown_or_hidden_as_a_whole() -> None:
    torch.manual_seed(0)
    shown = block_mask(torch.zeros(50, 3, 32, 32), 0.7, 1 / 8)
    assert shown.shape == (50, 1, 32, 32)
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    blocks = shown.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert torch.equal(blocks.amin(4), blocks.amax(4))
    assert float(shown.mean()) == pytest.approx(0.3, abs=0.03)
    assert len({tuple(image.flatten().tolist()) for image in shown}) == 50


@pytest.mark.parametrize(("block", "side"), [(0.0625, 4), (0.001, 1), (0.3, 19), (1.0, 64)])
def test_a_block_is_a_fraction_of_the_side_and_at_least_a_pixel(block: float, side: int) -> None:
    torch.manual_seed(1)
    row = block_mask(torch.zeros(40, 1, 64, 64), 0.5, block)[:, 0, 0]
    changes = row.diff(dim=1).any(0).nonzero().flatten() + 1
    assert changes.tolist() == list(range(side, 64, side))


def test_ratios_of_0_and_1_hide_nothing_and_everything() -> None:
    assert bool((block_mask(images(), 0.0, 0.1) == 1).all())
    assert bool((block_mask(images(), 1.0, 0.1) == 0).all())


def test_slices_share_a_mask_and_hidden_pixels_are_0() -> None:
    torch.manual_seed(0)
    method = TranslateAndMask(replace(TASK, slices=3), TranslateAndMaskConfig(**SMALL))
    hidden = method.masked(images(2, slices=3)) == 0
    assert 0.4 < float(hidden.float().mean()) < 0.95
    assert torch.equal(hidden[:, 0], hidden[:, 1]) and torch.equal(hidden[:, 0], hidden[:, 2])


# -- consistency ----------------------------------------------------------------------------------


def test_consistency_by_hand() -> None:
    """Two images of two pixels and two classes; the teacher is sure of one pixel, and of none."""
    sure, unsure = math.log(99.0), math.log(3.0)  # probabilities 0.99 and 0.75
    teacher = torch.tensor([[[sure, 0.0], [0.0, unsure]], [[unsure, 0.0], [0.0, unsure]]])
    student = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])
    loss, quality = masked_consistency(student[..., None], teacher[..., None], 0.9)
    first = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert float(loss) == pytest.approx(0.5 * first / 2)  # weights ½ and 0
    assert float(quality) == pytest.approx(0.25)


def test_consistency_trains_the_student_alone_and_nothing_without_confidence() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4).requires_grad_().unbind()
    student.retain_grad(), teacher.retain_grad()
    loss, quality = masked_consistency(student, teacher, 0.0)
    loss.backward()
    assert teacher.grad is None and student.grad is not None and float(quality) == 1
    expected = F.cross_entropy(student.detach(), teacher.argmax(1))
    torch.testing.assert_close(loss.detach(), expected)
    none, quality = masked_consistency(student.detach(), teacher, 1.0)
    assert float(none) == 0 and float(quality) == 0


# -- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recolour", [True, False])
def test_the_loss_is_that_of_the_card(recolour: bool) -> None:
    method, own = build(recolour=recolour, lambda_consistency=2.0, confidence=0.3), batch()
    segmenter = copy.deepcopy(method.segmenter)
    teacher = copy.deepcopy(method.teacher.segmenter)
    context = context_of(method)
    torch.manual_seed(3)
    logs = method.step(own, context)

    torch.manual_seed(3)  # the same curves and masks, in the order of the method
    source = tone_curves(own.source_images) if recolour else own.source_images
    segmentation = segmentation_loss(segmenter(source).logits, own.source_labels)
    shown = block_mask(own.target, 0.7, 0.0625)
    target = (tone_curves(own.target) if recolour else own.target) * shown
    with torch.no_grad():
        found = teacher(own.target).logits
    student = segmenter(target).logits
    consistency, quality = masked_consistency(student, found, 0.3)
    torch.testing.assert_close(logs["segmentation"], segmentation)
    torch.testing.assert_close(logs["consistency"], consistency)
    torch.testing.assert_close(logs["quality"], quality)
    assert float(quality) > 0
    (segmentation + 2 * consistency).backward()
    for mine, theirs in zip(method.segmenter.parameters(), segmenter.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_teacher_follows_and_predicts() -> None:
    method = build()
    before = copy.deepcopy(method.teacher.segmenter)
    method.step(batch(), context_of(method))
    assert first_difference(before.state_dict(), method.teacher.segmenter.state_dict())
    assert int(method.teacher.updates) == 1
    with torch.no_grad():
        for parameter in method.segmenter.parameters():
            parameter.add_(1.0)
        expected = method.teacher.segmenter(images())
        assert torch.equal(method.predict(images(), "target"), expected.logits)
        assert torch.equal(method.features(images(), "target"), expected.features[-1])


@pytest.mark.parametrize("translation", ["cycle", "cut"])
def test_segmentation_leaves_the_translation_alone(translation: str) -> None:
    method = build(translation=translation)
    before = copy.deepcopy(method.translation.state_dict())
    method.step(batch(), context_of(method))
    assert not first_difference(before, method.translation.state_dict())
    translate = method.stages()[1].translate
    assert translate is not None
    assert torch.equal(translate(images()), method.translation.to_target(images()))


def test_without_weight_no_target_image_is_segmented() -> None:
    method = build(lambda_consistency=0.0)
    passes: list[int] = []
    method.segmenter.register_forward_hook(lambda _, given, out: passes.append(len(given[0])))
    logs = method.step(batch(), context_of(method))
    assert passes == [2] and set(logs) == {"segmentation"}


# -- settings and stages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, {}),
        ({"mask_ratio": 0.5}, {}),
        ({"mask_ratio": 0.0}, {}),
        ({"mask_ratio": 0.0, "mask_block": 0.5}, {"mask_block": 0.5}),
        (
            {"lambda_consistency": 0.0, "mask_ratio": 0.5, "confidence": 0.9},
            {"mask_ratio": 0.5, "confidence": 0.9},
        ),
    ],
)
def test_settings_without_effect_are_named(given: dict[str, float], said: dict[str, float]) -> None:
    found = build(**given).check(Cases(source=5, target=5))
    assert {name: change.value for name, change in found.items()} == said


@pytest.mark.parametrize(("translation", "other"), [("cycle", CycleTranslate), ("cut", CUT)])
def test_the_translation_is_shared_with_its_method(translation: str, other: type[Method]) -> None:
    """Key, settings and initial weights of the stage are equal."""
    keys, weights, settings = [], [], []
    own = {"translation": translation}
    for method, given in ((TranslateAndMask, own), (other, {})):
        with closing(Bench(method, given)) as bench:
            torch.manual_seed(0)
            built = bench.build()
            stage = built.stages()[0]
            keys.append(json.dumps(stage_key(built, stage)))
            weights.append(getattr(built, stage.modules[0]).state_dict())
            assert stage.depends_on is not None
            values = asdict(built.config)
            settings.append({name: values[name] for name in stage.depends_on})
    assert keys[0] == keys[1] and settings[0] == settings[1]
    assert not first_difference(*weights)


def test_variants_leave_out_one_part_each() -> None:
    base = TranslateAndMaskConfig()
    changed = [set(changes) for changes in TranslateAndMask.variants().values()]
    assert changed == [{"recolour"}, {"lambda_consistency"}, {"mask_ratio"}, {"translation"}, set()]
    for changes in TranslateAndMask.variants().values():
        assert not changes or replace(base, **changes) != base
