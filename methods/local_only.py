"""Local alignment alone: target features with a gain, on unstyled source images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from glua_bench.losses import balanced_loss
from glua_bench.method import Batch, Context, Role, TaskInfo
from glua_bench.methods.alignment import (
    PAPER_ALIGNMENT,
    QUICK_ALIGNMENT,
    AlignmentConfig,
    LocalAlignment,
)
from glua_bench.methods.source_only import SegmentConfig, SourceOnly


@dataclass(frozen=True)
class LocalConfig(SegmentConfig, AlignmentConfig):
    """The segmenter's and the alignment's settings."""


class LocalOnly(SourceOnly):
    """Align features and outputs by discriminators, and amplify where the domains differ.

    Step B of GLUA alone, on source images as they are: Su et al., *Mind The Gap*, IEEE JBHI 2023
    (arXiv 2205.11888). Re-implementation, checked against the authors' published code at the level
    of numbers. D1 scores features f at the end of the encoder, D2 the softmax output p, source → 0
    and target → 1; target features carry a gain, in training and in prediction:

        f̂_t = f_t · (1 + |tanh D1(f_t)|),
        L = ½ CE(p_s, y_s) + ½ Dice(p_s, y_s) + 0.01 · (mean D1(f_t)² + mean D2(p_t)²).

    The authors' segmenter is `segmenter.name=deeplab`, trained by SGD (`optimizer=sgd`, and preset
    `paper`). Their code steps most of its weights three or four times an update, since it lists
    them once for each module around them: `optimizer=sgd-repeated`; and sums two of the
    classifier's four dilations: `segmenter.dilations=2`. Both are left out by default.
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
        """With all of it, and with nothing but the loss on the source."""
        nothing = {"gain": "none", "lambda_feature": 0.0, "lambda_output": 0.0}
        return {"Step B": {}, "nothing aligned": nothing}

    def optimizers(self) -> dict[str, Optimizer]:
        """The segmenter's and that of both discriminators."""
        return {**super().optimizers(), "alignment": self.alignment.optimizer()}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update of the segmenter, then one of both discriminators."""
        return self.alignment.step(self.segmenter, batch, context, self.segmentation)

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """(N, S, H, W) → logits (N, K, H, W), with the gain on target images."""
        return self.alignment.see(self.segmenter, images, domain).segmented.logits

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """The segmenter's last decoder map."""
        return self.alignment.see(self.segmenter, images, domain).segmented.features[-1]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What else is to be seen, and where target features are amplified."""
        gain = self.alignment.pictures(self.segmenter, batch.target)
        return {**super().pictures(batch), **gain}
