"""Translation, strong recolouring and masked consistency, an original method of this benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from glua_bench.augment import tone_curves
from glua_bench.config import setting
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, Stage, TaskInfo
from glua_bench.methods import cut, cycle_translate
from glua_bench.methods.components.masked_consistency import masked_loss
from glua_bench.methods.cut import CUT, ContrastiveTranslation, CUTConfig
from glua_bench.methods.cycle_translate import CycleConfig, CycleGAN, CycleTranslate
from glua_bench.methods.mic import MIC, MICConfig


@dataclass(frozen=True)
class TranslateAndMaskConfig(CycleConfig, CUTConfig, MICConfig):
    """Settings of the segmenter, both translations, recolouring and masked consistency."""

    translation: str = setting(
        "cycle",
        "translation of source images: that of cycle_translate, or that of cut",
        choices=("cycle", "cut"),
    )
    recolour: bool = setting(
        True, "recolour translated source images and the segmenter's target images"
    )


class TranslateAndMask(MIC):
    """Translate and recolour source images; learn target images from unmasked context.

    Original to this benchmark, not published. Stage 1 is the translation G of `cycle_translate` or
    `cut`. Stage 2 trains the segmenter S and a teacher T, its moving average (`teacher.py`), with
    random tone curves c (`augment.tone_curves`) and random block masks M:

        L = L_seg(S(c(G(x_s))), y_s) + λ · mean over images of q · CE(S(M ⊙ c(x_t)), ŷ),

    where ŷ = argmax T(x_t) and q is the fraction of the image's pixels where T is more confident
    than τ. Predictions are the teacher's. The masked loss is that of Hoyer et al., *MIC: Masked
    Image Consistency for Context-Enhanced Domain Adaptation*, CVPR 2023, with its ratio of 0.7, its
    threshold and its blocks (64 of 1024 pixels: 1/16 of the side). Hidden pixels are 0, the middle
    of [-1, 1]. Slices and channels of an image share the mask.
    """

    name = "translate_and_mask"
    reference = "original; Zhu et al., ICCV 2017, with Hoyer et al., CVPR 2023"
    needs = "source images and labels, target images"
    uses_target = True
    parts: ClassVar[tuple[str, ...]] = ("cycle_translate",)
    Config = TranslateAndMaskConfig
    presets = {"quick": {**CycleTranslate.presets["quick"], **CUT.presets["quick"]}}

    def __init__(self, task: TaskInfo, config: TranslateAndMaskConfig) -> None:
        super().__init__(task, config)
        # Initial weights follow those of the segmenter, as in the methods that share the stage.
        if config.translation == "cycle":
            batch = min(task.batch_size, config.cycle_batch)
            self.cycle = CycleGAN(config, batch, task.size, task.inputs)
        else:
            self.cut = ContrastiveTranslation(config, task.inputs)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the method without each of its parts, and with the other translation."""
        return {
            "without recolouring": {"recolour": False},
            "without masked consistency": {"lambda_consistency": 0.0},
            "consistency without masks": {"mask_ratio": 0.0},
            "translation of CUT": {"translation": "cut"},
            "translate and mask": {},
        }

    @property
    def translation(self) -> CycleGAN | ContrastiveTranslation:
        """The chosen translation."""
        return self.cycle if self.config.translation == "cycle" else self.cut

    def stages(self) -> tuple[Stage, ...]:
        """Return the translation stage of `cycle_translate` or `cut`, and segmentation."""
        if self.config.translation == "cycle":
            first = cycle_translate.translation_stage(self.cycle, self.config)
        else:
            first = cut.translation_stage(self.cut, self.config)
        return (first, Stage("segment", decay=0.9, translate=self.translation.to_target))

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter, then the teacher."""
        source = self.recoloured(batch.source_images)
        segmentation = segmentation_loss(self.segmenter(source).logits, batch.source_labels)
        loss, logs = segmentation, {"segmentation": segmentation}
        if self.config.lambda_consistency:
            masked = self.masked(batch.target)
            consistency, own = masked_loss(
                self.teacher, self.segmenter, batch.target, masked, self.config
            )
            loss = loss + consistency
            logs |= own
        context.update("segmenter", loss)
        self.teacher.update(self.segmenter)
        return logs

    def recoloured(self, images: Tensor) -> Tensor:
        """Return images with random tone curves, unless recolouring is off."""
        return tone_curves(images, self.task.channels) if self.config.recolour else images

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return translated and recoloured source images, masked ones, and the confidence."""
        restyled = self.translation.to_target(batch.source_images)
        return {
            "restyled": restyled,
            "recoloured": self.recoloured(restyled),
            **super().pictures(batch),
        }
