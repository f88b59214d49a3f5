"""No adaptation: the lower bound, and under the supervised scenario the upper one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import AdamW, Optimizer

from glua_bench.config import setting
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, Method, Stage, TaskInfo
from glua_bench.networks import build_segmenter


@dataclass(frozen=True)
class SegmentConfig:
    """Settings of the segmenter's training, the same in every method built on it."""

    lr: float = setting(2e-3, "learning rate of the segmenter", low=1e-6, high=1.0, log=True)
    weight_decay: float = setting(1e-4, "weight decay of the segmenter", low=0, high=1)


class SourceOnly(Method):
    """Train the segmenter on labelled source images only.

    L = Dice + cross-entropy on source images. The lower bound of every comparison. Under
    `--scenario supervised` the harness serves labelled target-train cases as source, which
    makes the same code the upper bound; such results are stamped privileged.
    """

    name = "source_only"
    reference = "baseline"
    needs = "source images and labels"
    uses_target = False
    Config: ClassVar[type] = SegmentConfig

    def __init__(self, task: TaskInfo, config: SegmentConfig) -> None:
        super().__init__(task, config)
        self.segmenter = build_segmenter(task.segmenter, task.classes, task.slices)

    def stages(self) -> tuple[Stage, ...]:
        """One stage with polynomial decay."""
        return (Stage("segment", decay=0.9),)

    def optimizers(self, stage: Stage) -> dict[str, Optimizer]:
        """AdamW."""
        return {"segmenter": segmenter_optimizer(self.segmenter.parameters(), self.config)}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update on source images."""
        loss = segmentation_loss(self.segmenter(batch.source_images).logits, batch.source_labels)
        context.update("segmenter", loss)
        return {"segmentation": loss}

    def predict(self, images: Tensor) -> Tensor:
        """(N, S, H, W) → logits (N, K, H, W)."""
        return self.segmenter(images).logits

    def features(self, images: Tensor) -> Tensor:
        """The segmenter's last decoder map."""
        return self.segmenter(images).features[-1]


def segmenter_optimizer(parameters, config: SegmentConfig) -> Optimizer:  # type: ignore[no-untyped-def]
    """The optimizer that every method of this package gives to its segmenter."""
    return AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
