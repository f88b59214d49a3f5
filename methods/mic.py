"""Masked image consistency: MIC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from glua_bench.augment import tone_curves
from glua_bench.losses import segmentation_loss
from glua_bench.method import Adjustment, Batch, Cases, Context
from glua_bench.methods.components.masked_consistency import (
    MaskedConfig,
    block_mask,
    masked_loss,
    without_effect,
)
from glua_bench.methods.mean_teacher import MeanTeacher, MeanTeacherConfig


@dataclass(frozen=True)
class MICConfig(MaskedConfig, MeanTeacherConfig):
    """Settings of the segmenter and of masked consistency."""


class MIC(MeanTeacher):
    """Learn the classes of hidden parts of target images from their context.

    Hoyer, Dai, Wang and Van Gool, *MIC: Masked Image Consistency for Context-Enhanced Domain
    Adaptation*, CVPR 2023. With random tone curves c and block masks M (`masked_consistency.py`),

        L = L_seg(S(x_s), y_s) + λ · mean over images of q · CE(S(M ⊙ c(x_t)), argmax T(x_t)).

    Predictions are the teacher's. The authors add this loss to other adaptation methods, first of
    all DAFormer and HRDA, and alter the colours and blur of what the student sees; here it is
    added to training on source images alone, and tone curves alter the intensities. Their teacher
    has a decay of 0.999 over 40,000 updates; ours keeps that of `mean_teacher`, 0.99, because our
    budgets are shorter. Slices and channels of an image share the mask.
    """

    name = "mic"
    reference = "Hoyer et al., CVPR 2023"
    needs = "source images and labels, target images"
    Config = MICConfig

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Return the adjustments of the base class, and settings without effect."""
        return {**super().check(cases), **without_effect(self.config)}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the student, then the teacher."""
        segmentation = segmentation_loss(
            self.segmenter(batch.source_images).logits, batch.source_labels
        )
        shown = self.masked(batch.target)
        loss, logs = masked_loss(self.teacher, self.segmenter, batch.target, shown, self.config)
        context.update("segmenter", segmentation + loss)
        self.teacher.update(self.segmenter)
        return {"segmentation": segmentation, **logs}

    def masked(self, images: Tensor) -> Tensor:
        """Return recoloured images with hidden blocks."""
        shown = block_mask(images, self.config.mask_ratio, self.config.mask_block)
        return self.recoloured(images) * shown

    def recoloured(self, images: Tensor) -> Tensor:
        """Return images with random tone curves."""
        return tone_curves(images, self.task.channels)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the student sees, and the teacher's confidence in [1 / K, 1]."""
        return {"masked": self.masked(batch.target), **super().pictures(batch)}
