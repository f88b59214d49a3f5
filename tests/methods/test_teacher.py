"""The mean teacher and the two methods built on it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_methods import TASK, batch, build, images, take_step

from glua_bench import augment
from glua_bench.config import SegmenterSpec, build_settings
from glua_bench.conformance import first_difference
from glua_bench.losses import segmentation_loss
from glua_bench.methods.glua import GLUA
from glua_bench.methods.glua_self_training import GLUASelfTraining
from glua_bench.methods.mean_teacher import MeanTeacher


def test_the_loss_counts_where_the_teacher_is_sure() -> None:
    method = build(MeanTeacher, confidence=0.4, lambda_consistency=2.0)
    teacher, student = method.teacher, method.segmenter
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    target = batch().target
    torch.manual_seed(3)
    loss, logs = teacher.loss(student, target)
    torch.manual_seed(3)
    with torch.no_grad():
        p = student(augment.tone_curves(target)).logits.softmax(1)
        q = teacher.segmenter(target).logits.softmax(1)
    total, sure, found = 0.0, 0, 0
    for n in range(2):
        for i in range(32):
            for j in range(32):
                if q[n, :, i, j].max() > 0.4:
                    total += float(((p[n, :, i, j] - q[n, :, i, j]) ** 2).mean())
                    sure += 1
                    found += int(q[n, :, i, j].argmax() > 0)
    assert 0 < sure < 2048
    assert float(loss.detach()) == pytest.approx(2 * total / 2048, rel=1e-4)
    assert float(logs["sure"]) == pytest.approx(sure / 2048)
    assert float(logs["sure_foreground"]) == pytest.approx(found / 2048)


def test_a_teacher_that_is_never_sure_changes_nothing() -> None:
    method = build(MeanTeacher, confidence=1.0)
    assert take_step(method)["consistency"] == 0.0


def test_the_student_alone_is_trained_and_the_teacher_follows() -> None:
    method = build(MeanTeacher, confidence=0.0, teacher_decay=0.75)
    trained = {
        id(p) for o in method.optimizers().values() for g in o.param_groups for p in g["params"]
    }
    assert trained == {id(p) for p in method.segmenter.parameters()}
    for update in range(1, 40):
        before = copy.deepcopy(method.teacher.segmenter)
        take_step(method)
        keep = min(0.75, update / (update + 9))
        for own, old, student in zip(
            method.teacher.segmenter.parameters(),
            before.parameters(),
            method.segmenter.parameters(),
            strict=True,
        ):
            assert torch.allclose(own, keep * old + (1 - keep) * student, atol=1e-6)
    assert int(method.teacher.updates) == 39


def test_the_teacher_predicts() -> None:
    method = build(MeanTeacher)
    take_step(method)
    assert torch.equal(
        method.predict(images(), "target"), method.teacher.segmenter(images()).logits
    )
    assert not torch.equal(method.predict(images(), "target"), method.segmenter(images()).logits)


def test_running_statistics_of_a_timm_encoder_follow_too() -> None:
    task = replace(TASK, segmenter=SegmenterSpec("timm:resnet10t", 4, 3))
    torch.manual_seed(0)
    method = MeanTeacher(task, build_settings(MeanTeacher.Config, {}, "method"))
    take_step(method)
    student = dict(method.segmenter.named_buffers())
    assert student
    assert not first_difference(student, dict(method.teacher.segmenter.named_buffers()))


def test_without_its_loss_self_training_trains_as_glua_does() -> None:
    glua, ours = build(GLUA), build(GLUASelfTraining, lambda_consistency=0.0)
    ours.load_state_dict(glua.state_dict(), strict=False)  # all but the teacher
    take_step(glua)
    take_step(ours)
    assert not first_difference(glua.segmenter.state_dict(), ours.segmenter.state_dict())


def test_self_training_adds_its_loss_to_glua() -> None:
    with_it = build(GLUASelfTraining, confidence=0.0)
    without = build(GLUASelfTraining, lambda_consistency=0.0)
    assert first_difference(with_it.segmenter.state_dict(), without.segmenter.state_dict()) is None
    first, second = take_step(with_it), take_step(without)
    assert first["segmentation"] == second["segmentation"]
    assert first["consistency"] > 0
    assert first_difference(with_it.segmenter.state_dict(), without.segmenter.state_dict())


def test_the_first_stage_is_glua_and_leaves_the_teacher() -> None:
    method = build(GLUASelfTraining)
    before = copy.deepcopy(method.teacher.state_dict())
    take_step(method, stage=method.stages()[0])
    assert not first_difference(before, method.teacher.state_dict())


def test_both_learn_on_the_source() -> None:
    own = batch()
    for kind in (MeanTeacher, GLUASelfTraining):
        method = build(kind)
        first = segmentation_loss(method.predict(own.source_images, "source"), own.source_labels)
        for _ in range(40):
            take_step(method)
        last = segmentation_loss(method.predict(own.source_images, "source"), own.source_labels)
        assert float(last.detach()) < 0.9 * float(first.detach()), kind.name
