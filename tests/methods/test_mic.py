"""MIC: the masked loss is that of its component, added to training on source images."""

from __future__ import annotations

import pytest
import torch
from tiny_methods import Recorder, batch, build, take_step

from glua_bench.augment import tone_curves
from glua_bench.losses import segmentation_loss
from glua_bench.methods.components.masked_consistency import block_mask, masked_consistency
from glua_bench.methods.mic import MIC


def test_the_step_adds_the_weighted_loss_of_masked_recoloured_images() -> None:
    method = build(MIC, confidence=0.3, lambda_consistency=2.0, mask_block=0.25)
    with torch.no_grad():
        for parameter in method.segmenter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    given = batch()
    recorder = Recorder()
    torch.manual_seed(5)
    logs = method.step(given, recorder)  # type: ignore[arg-type]
    fresh = build(MIC, confidence=0.3, lambda_consistency=2.0, mask_block=0.25)
    torch.manual_seed(5)
    mask = block_mask(given.target, 0.7, 0.25)
    student = method.segmenter(tone_curves(given.target) * mask).logits
    loss, quality = masked_consistency(student, fresh.teacher.segmenter(given.target).logits, 0.3)
    source = segmentation_loss(method.segmenter(given.source_images).logits, given.source_labels)
    ((name, minimised),) = recorder.losses
    assert name == "segmenter"
    torch.testing.assert_close(minimised, source + 2.0 * loss)
    torch.testing.assert_close(logs["quality"], quality)
    assert 0 < float(quality) <= 1


def test_without_a_sure_pixel_only_source_images_teach() -> None:
    assert take_step(build(MIC, confidence=1.0))["consistency"] == 0.0


def test_the_teacher_predicts_and_follows() -> None:
    method = build(MIC)
    before = [p.clone() for p in method.teacher.segmenter.parameters()]
    take_step(method)
    after = list(method.teacher.segmenter.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(not p.requires_grad for p in after)
    given = batch().target
    torch.testing.assert_close(
        method.predict(given, "target"), method.teacher.segmenter(given).logits
    )


@pytest.mark.parametrize("slices", [1, 3])
def test_hidden_blocks_are_the_middle_of_the_range(slices: int) -> None:
    method = build(MIC, mask_block=0.25, mask_ratio=0.5)
    given = batch(slices=slices).target
    torch.manual_seed(0)
    masked = method.masked(given)
    torch.manual_seed(0)
    shown = block_mask(given, 0.5, 0.25).expand_as(masked)
    assert masked[shown == 0].abs().max() == 0 and 0 < float(shown.mean()) < 1
    assert masked[shown == 1].abs().max() <= 1


def test_settings_without_effect_are_said() -> None:
    def said(**config: object) -> set[str]:
        return set(build(MIC, **config).check(None))  # type: ignore[arg-type]

    assert said(lambda_consistency=0.0, mask_ratio=0.5, confidence=0.5) == {
        "mask_ratio",
        "confidence",
    }
    assert said(mask_ratio=0.0, mask_block=0.5) == {"mask_block"}
    assert said(mask_ratio=0.5) == set()
