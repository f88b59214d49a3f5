"""Local alignment alone: gain on target features, unstyled source images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from glua_bench.losses import balanced_loss
from glua_bench.method import Adjustment, Batch, Cases, Context, Role, TaskInfo
from glua_bench.methods.components.alignment import (
    PAPER_ALIGNMENT,
    QUICK_ALIGNMENT,
    AlignmentConfig,
    LocalAlignment,
    without_effect,
)
from glua_bench.methods.source_only import SegmentConfig, SourceOnly


@dataclass(frozen=True)
class LocalConfig(SegmentConfig, AlignmentConfig):
    """Settings of the segmenter and of the alignment."""


class LocalOnly(SourceOnly):
    """Align features and outputs with discriminators and amplify features where domains differ.

    Step B of GLUA alone, on unstyled source images: Su et al., *Mind The Gap*, IEEE JBHI 2023
    (arXiv 2205.11888). Re-implementation, checked numerically against the authors' published code.
    D1 scores the encoder's last features f and D2 the softmax output p; source → 0, target → 1.
    Target features are multiplied by a gain, in training and in prediction:

        f̂_t = f_t · (1 + |tanh D1(f_t)|),
        L = ½ CE(p_s, y_s) + ½ Dice(p_s, y_s) + 0.01 · (mean D1(f_t)² + mean D2(p_t)²).

    The authors' segmenter is `segmenter.name=deeplab`, trained with SGD (`optimizer=sgd`, and the
    preset `paper`). Two quirks of their code are off by default: it steps most weights three or
    four times per update, because it lists them once per enclosing module
    (`optimizer=sgd-repeated`), and it sums only two of the classifier's four dilations
    (`segmenter.dilations=2`).
    """

    name = "local_only"
    reference = "Su et al., IEEE JBHI 2023 (Step B alone)"
    needs = "source images and labels, target images"
    uses_target = True
    Config: ClassVar[type] = LocalConfig
    presets = {"quick": QUICK_ALIGNMENT, "paper": PAPER_ALIGNMENT}
    segmentation = staticmethod(balanced_loss)

    def __init__(self, task: TaskInfo, config: LocalConfig) -> None:
        super().__init__(task, config)
        self.alignment = LocalAlignment(task, config, self.segmenter)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the full Step B, and training with the source loss alone."""
        nothing = {"gain": "none", "lambda_feature": 0.0, "lambda_output": 0.0}
        return {"Step B": {}, "nothing aligned": nothing}

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Return the adjustments of the base class, and settings without effect."""
        return {**super().check(cases), **without_effect(self.config)}

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the segmenter's optimizer and that of both discriminators."""
        return {**super().optimizers(), "alignment": self.alignment.optimizer()}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter, then both discriminators."""
        return self.alignment.step(self.segmenter, batch, context, self.segmentation)

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return logits (N, K, H, W) for (N, S, H, W), with the gain on target images."""
        return self.alignment.segment(self.segmenter, images, domain).segmented.logits

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the segmenter's last decoder map."""
        return self.alignment.segment(self.segmenter, images, domain).segmented.features[-1]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the pictures of the base class and the gain on target features."""
        gain = self.alignment.pictures(self.segmenter, batch.target)
        return {**super().pictures(batch), **gain}
