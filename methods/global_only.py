"""Global alignment alone: restyle the source as target, then segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from glua_bench.method import Batch, Cases, Context, Stage, TaskInfo
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.methods.style import QUICK_STYLE, StyleConfig, StyleTransfer, check_size


@dataclass(frozen=True)
class GlobalConfig(SegmentConfig, StyleConfig):
    """The segmenter's and the style stage's settings."""


class GlobalOnly(SourceOnly):
    """Restyle source images as target ones, then train the segmenter on them.

    Stage 1 trains the style transfer of `style.py`; stage 2 is `source_only` on source
    images that are restyled anew in every step, in styles drawn from k-means clusters of the
    target's style codes. The global half of GLUA's ablation; a reconstruction after DAR-UNet.
    """

    name = "global_only"
    reference = "Su et al., arXiv 2205.11888 (global part; reconstruction)"
    needs = "source images and labels, target images"
    uses_target = True
    Config: ClassVar[type] = GlobalConfig
    presets = {"quick": QUICK_STYLE}

    def __init__(self, task: TaskInfo, config: GlobalConfig) -> None:
        super().__init__(task, config)
        check_size(task.size, config)
        self.style = StyleTransfer(config, task.slices)

    def check(self, cases: Cases) -> None:
        """As many target cases as clusters of styles."""
        self.style.check(cases)

    def stages(self) -> tuple[Stage, ...]:
        """Style, then segmentation on restyled images."""
        return (self.style.stage(), Stage("segment", decay=0.9, translate=self.style.restyle))

    def optimizers(self, stage: Stage) -> dict[str, Optimizer]:
        """The stage's own."""
        return self.style.optimizers() if stage.name == "style" else super().optimizers(stage)

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update of the stage."""
        if context.stage.name == "style":
            return self.style.step(batch, context)
        return super().step(batch, context)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The source images, restyled."""
        return {"restyled": self.style.restyle(batch.source_images)}
