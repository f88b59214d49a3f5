"""Self-training with a mean teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, Role, TaskInfo
from glua_bench.methods.components.teacher import Teacher, TeacherConfig
from glua_bench.methods.source_only import SegmentConfig, SourceOnly


@dataclass(frozen=True)
class MeanTeacherConfig(SegmentConfig, TeacherConfig):
    """Settings of the segmenter and of self-training."""


class MeanTeacher(SourceOnly):
    """Train on target images with the confident predictions of an averaged segmenter.

    Tarvainen and Valpola, *Mean teachers are better role models*, NeurIPS 2017; for domain
    adaptation and with a confidence threshold, French et al., *Self-ensembling for visual domain
    adaptation*, ICLR 2018. L = L_seg(source) + λ · L_cons(target) (`teacher.py`). Predictions are
    the teacher's. The papers also translate or distort the images; here only the student's images
    are recoloured, with the random tone curves of the photometric augmentation.
    """

    name = "mean_teacher"
    reference = "French et al., ICLR 2018"
    needs = "source images and labels, target images"
    uses_target = True
    Config = MeanTeacherConfig

    def __init__(self, task: TaskInfo, config: MeanTeacherConfig) -> None:
        super().__init__(task, config)
        self.teacher = Teacher(self.segmenter, config, task.channels)

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the student, then the teacher."""
        segmentation = segmentation_loss(
            self.segmenter(batch.source_images).logits, batch.source_labels
        )
        loss, logs = self.teacher.loss(self.segmenter, batch.target)
        context.update("segmenter", segmentation + loss)
        self.teacher.update(self.segmenter)
        return {"segmentation": segmentation, **logs}

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return the teacher's logits, (N, S, H, W) → (N, K, H, W)."""
        return self.teacher.segmenter(images).logits

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the teacher's last decoder map."""
        return self.teacher.segmenter(images).features[-1]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the teacher's confidence on target images, in [1 / K, 1]."""
        return {"confidence": self.predict(batch.target, "target").softmax(1).amax(1, keepdim=True)}
