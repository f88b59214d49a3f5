"""Global alignment alone: restyle source images as target images, then segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from glua_bench.losses import balanced_loss
from glua_bench.method import Adjustment, Batch, Cases, Stage, TaskInfo
from glua_bench.methods.components.alignment import PAPER_ALIGNMENT
from glua_bench.methods.components.style import QUICK_STYLE, StyleConfig, build_style, style_stage
from glua_bench.methods.source_only import SegmentConfig, SourceOnly


@dataclass(frozen=True)
class GlobalConfig(SegmentConfig, StyleConfig):
    """Settings of the segmenter and of the style stage."""


class GlobalOnly(SourceOnly):
    """Restyle source images as target images, then train the segmenter on them.

    Step A of GLUA alone: Su et al., *Mind The Gap*, IEEE JBHI 2023 (arXiv 2205.11888). Stage 1
    trains a style network, by default AD-GAN, which the authors' code names for this step
    (`adgan.py`; re-implemented and checked against its numbers). Stage 2 trains the segmenter on
    restyled source images x̂ = G(E(x, source), target) with GLUA's loss,

        L = ½ CE(S(x̂), y) + ½ Dice(S(x̂), y).

    Images are restyled in every step, after geometric augmentation; the authors restyle once and do
    not augment. `style=codes` selects the style stage of DAR-UNet instead.
    """

    name = "global_only"
    reference = "Su et al., IEEE JBHI 2023 (Step A alone)"
    needs = "source images and labels, target images"
    uses_target = True
    Config: ClassVar[type] = GlobalConfig
    presets = {"quick": QUICK_STYLE, "paper": PAPER_ALIGNMENT}
    segmentation = staticmethod(balanced_loss)

    def __init__(self, task: TaskInfo, config: GlobalConfig) -> None:
        super().__init__(task, config)
        self.style: Any = build_style(config, task)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return both style networks."""
        return {"AD-GAN": {}, "style codes (DAR-UNet)": {"style": "codes"}}

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Return the adjustments of the style stage."""
        return self.style.check(cases)

    def stages(self) -> tuple[Stage, ...]:
        """Return the style stage and the segmentation stage on restyled images."""
        segment = Stage("segment", decay=0.9, translate=self.style.restyle)
        return (style_stage(self.style, self.config), segment)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the restyled source images."""
        return {"restyled": self.style.restyle(batch.source_images)}
