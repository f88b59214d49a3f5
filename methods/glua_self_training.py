"""GLUA with self-training: ours, not a paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from glua_bench.method import Batch, Context, Role, TaskInfo
from glua_bench.methods.glua import GLUA, GLUAConfig
from glua_bench.methods.teacher import Teacher, TeacherConfig


@dataclass(frozen=True)
class GLUASelfTrainingConfig(GLUAConfig, TeacherConfig):
    """GLUA's and the self-training's settings."""


class GLUASelfTraining(GLUA):
    """GLUA whose second stage also learns from a mean teacher on target images.

    Original, an entry of this benchmark and of no paper: L of `glua` + λ · L_cons of
    `teacher.py`, in one stage, so the segmenter gets as many updates as in every other method.
    The teacher predicts.
    """

    name = "glua_self_training"
    reference = "original; GLUA with French et al., ICLR 2018"
    parts: ClassVar[tuple[str, ...]] = ("glua",)
    needs = "source images and labels, target images"
    uses_target = True
    Config = GLUASelfTrainingConfig

    def __init__(self, task: TaskInfo, config: GLUASelfTrainingConfig) -> None:
        super().__init__(task, config)
        self.teacher = Teacher(self.segmenter, config)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """With and without the self-training."""
        return {"GLUA, averaged": {"lambda_consistency": 0.0}, "GLUA + self-training": {}}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update of the segmenter, one of the discriminators, and then the teacher's."""
        logs = self.alignment.step(
            self.segmenter, batch, context, self.segmentation, partial(self.consistency, batch)
        )
        self.teacher.update(self.segmenter)
        return logs

    def consistency(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's loss on target images, which carry the gain in both networks."""
        return self.teacher.loss(
            self.segmenter,
            batch.target,
            lambda segmenter, x: self.alignment.see(segmenter, x, "target").segmented.logits,
        )

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """The teacher's logits, (N, S, H, W) → (N, K, H, W)."""
        return self.alignment.see(self.teacher.segmenter, images, domain).segmented.logits

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """The teacher's last decoder map."""
        return self.alignment.see(self.teacher.segmenter, images, domain).segmented.features[-1]
