"""GLUA: global-local union alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from glua_bench.method import Batch, Context, Stage, TaskInfo
from glua_bench.methods.alignment import QUICK_ALIGNMENT, AlignmentConfig, LocalAlignment
from glua_bench.methods.global_only import GlobalConfig, GlobalOnly
from glua_bench.methods.local_only import aligned_step
from glua_bench.methods.style import QUICK_STYLE


@dataclass(frozen=True)
class GLUAConfig(GlobalConfig, AlignmentConfig):
    """The style stage's, the alignment's and the segmenter's settings."""


class GLUA(GlobalOnly):
    """Global-local union alignment: restyle the source, then align masked local features.

    Su et al., *Mind The Gap*, arXiv 2205.11888; a reconstruction, since no code is public.
    Stage 1 (global) is the style transfer of `style.py`. Stage 2 (union) trains on restyled
    source images x̂ with source labels y and on target images:

        L = L_seg(S(x̂), y) + λ_global · L_adv(f_t) + λ_local · L_adv(f_t; M),

    with D, the gap map and the mask M, where the last loss counts, of `alignment.py`. From the
    paper: the two levels, and a local feature mask that prioritises features with the larger
    gap. Ours: the form of everything else.
    """

    name = "glua"
    reference = "Su et al., arXiv 2205.11888 (reconstruction)"
    needs = "source images and labels, target images"
    uses_target = True
    Config: ClassVar[type] = GLUAConfig
    presets = {"quick": {**QUICK_STYLE, **QUICK_ALIGNMENT, "lambda_global": 0.003}}
    parts: ClassVar[tuple[str, ...]] = ("local_only", "global_only")

    def __init__(self, task: TaskInfo, config: GLUAConfig) -> None:
        super().__init__(task, config)
        self.alignment = LocalAlignment(task, config, self.segmenter.feature_channels)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """The rows that a reader of the ablation expects."""
        return {
            "global + unmasked alignment": {"mask": "none", "lambda_local": 0.0},
            "global + random mask": {"mask": "random"},
            "global + soft mask": {"mask": "soft"},
            "global + masked alignment only": {"lambda_global": 0.0},
            "union (GLUA)": {},
        }

    def optimizers(self, stage: Stage) -> dict[str, Optimizer]:
        """The stage's own; the union stage adds the feature discriminator's."""
        optimizers = super().optimizers(stage)
        if stage.name != "style":
            optimizers["alignment"] = self.alignment.optimizer()
        return optimizers

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update of the stage."""
        if context.stage.name == "style":
            return self.style.step(batch, context)
        return aligned_step(self.segmenter, self.alignment, batch, context)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Restyled source images; gap map and mask on target images."""
        return {
            **super().pictures(batch),
            **self.alignment.pictures(self.segmenter(batch.target), self.task.size),
        }
