"""Local alignment alone: masked feature alignment on unstyled source images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from glua_bench.config import setting
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, Stage, TaskInfo
from glua_bench.methods.alignment import QUICK_ALIGNMENT, AlignmentConfig, LocalAlignment
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.networks import Segmented


@dataclass(frozen=True)
class LocalConfig(SegmentConfig, AlignmentConfig):
    """The segmenter's and the alignment's settings; only masked locations count."""

    lambda_global: float = setting(
        0.0, "weight of the unmasked alignment", low=0, high=10, log=True
    )


class LocalOnly(SourceOnly):
    """Align the local features with the largest domain gap, without restyling.

    L = L_seg(source) + λ_global · L_adv(f_t) + λ_local · L_adv(f_t; M) (`alignment.py`).
    The local half of GLUA's ablation: λ_global is 0 here, so only masked locations count.
    A reconstruction.
    """

    name = "local_only"
    reference = "Su et al., arXiv 2205.11888 (local part; reconstruction)"
    needs = "source images and labels, target images"
    uses_target = True
    Config = LocalConfig
    presets = {"quick": QUICK_ALIGNMENT}

    def __init__(self, task: TaskInfo, config: LocalConfig) -> None:
        super().__init__(task, config)
        self.alignment = LocalAlignment(task, config, self.segmenter.feature_channels)

    def optimizers(self, stage: Stage) -> dict[str, Optimizer]:
        """The segmenter's and the feature discriminator's."""
        return {**super().optimizers(stage), "alignment": self.alignment.optimizer()}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update of the segmenter, then one of the discriminator."""
        return aligned_step(self.segmenter, self.alignment, batch, context)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Gap map and mask on target images."""
        return self.alignment.pictures(self.segmenter(batch.target), self.task.size)


def aligned_step(
    segmenter: torch.nn.Module,
    alignment: LocalAlignment,
    batch: Batch,
    context: Context,
    more: tuple[Tensor, dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """L_seg + L_align for the segmenter, then D's loss on the same features.

    Args:
        segmenter: the segmenter.
        alignment: the alignment, with D.
        batch: images of both domains.
        context: of the step.
        more: a further loss of the segmenter, and what to log of it.
    """
    count = len(batch.source_images)
    # One pass for both domains: instance norm keeps the images of a batch apart. (Under the batch
    # norm of a timm encoder the domains share their statistics.)
    both = segmenter(torch.cat([batch.source_images, batch.target]))
    source = Segmented(both.logits[:count], tuple(f[:count] for f in both.features))
    target = Segmented(both.logits[count:], tuple(f[count:] for f in both.features))
    segmentation = segmentation_loss(source.logits, batch.source_labels)
    loss, logs = alignment.loss(target)
    if more is not None:
        loss, logs = loss + more[0], {**logs, **more[1]}
    context.update("segmenter", segmentation + loss)
    return {"segmentation": segmentation, **logs, **alignment.update(source, target, context)}
