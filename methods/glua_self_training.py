"""GLUA with self-training, an original method of this benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from glua_bench.method import Batch, Context, Role, TaskInfo
from glua_bench.methods.components.teacher import Teacher, TeacherConfig
from glua_bench.methods.glua import GLUA, GLUAConfig


@dataclass(frozen=True)
class GLUASelfTrainingConfig(GLUAConfig, TeacherConfig):
    """Settings of GLUA and of self-training."""


class GLUASelfTraining(GLUA):
    """GLUA with a mean teacher on target images in its second stage.

    Original to this benchmark, not published. The loss is L of `glua` + λ · L_cons of `teacher.py`,
    in one stage, so the segmenter gets as many updates as in every other method. Predictions are
    the teacher's.
    """

    name = "glua_self_training"
    reference = "original; GLUA with French et al., ICLR 2018"
    parts: ClassVar[tuple[str, ...]] = ("glua",)
    needs = "source images and labels, target images"
    uses_target = True
    Config = GLUASelfTrainingConfig

    def __init__(self, task: TaskInfo, config: GLUASelfTrainingConfig) -> None:
        super().__init__(task, config)
        self.teacher = Teacher(self.segmenter, config, task.channels)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return GLUA with and without self-training."""
        return {"GLUA, averaged": {"lambda_consistency": 0.0}, "GLUA + self-training": {}}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter, then the discriminators, then the teacher."""
        logs = self.alignment.step(
            self.segmenter, batch, context, self.segmentation, partial(self.consistency, batch)
        )
        self.teacher.update(self.segmenter)
        return logs

    def consistency(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the teacher's loss on target images; both networks apply the gain."""
        return self.teacher.loss(
            self.segmenter,
            batch.target,
            lambda segmenter, x: self.alignment.segment(segmenter, x, "target").segmented.logits,
        )

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return the teacher's logits, (N, S, H, W) → (N, K, H, W)."""
        return self.alignment.segment(self.teacher.segmenter, images, domain).segmented.logits

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the teacher's last decoder map."""
        return self.alignment.segment(self.teacher.segmenter, images, domain).segmented.features[-1]
