"""GLUA: global-local union alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from glua_bench.methods.components.alignment import PAPER_ALIGNMENT, QUICK_ALIGNMENT
from glua_bench.methods.components.style import QUICK_STYLE
from glua_bench.methods.global_only import GlobalConfig, GlobalOnly
from glua_bench.methods.local_only import LocalConfig, LocalOnly


@dataclass(frozen=True)
class GLUAConfig(GlobalConfig, LocalConfig):
    """Settings of the style stage, the alignment and the segmenter."""


# This order of bases initialises the style network before the discriminators, as in
# `global_only`, so both methods share the trained style stage.
class GLUA(LocalOnly, GlobalOnly):
    """Global-local union alignment: restyle the source, then align and amplify target features.

    Su, Yao, Yang, Wang, Yan, Sun, Huang, *Mind The Gap: Alleviating Local Imbalance for
    Unsupervised Cross-Modality Medical Image Segmentation*, IEEE JBHI 2023 (arXiv 2205.11888).
    Re-implementation, checked numerically against the authors' published code. Step A is the style
    stage of `global_only`, after the code that they name (AD-GAN). Step B trains as `local_only`
    does, on restyled source images x̂ with source labels y and on target images:

        f̂_t = f_t · (1 + |tanh D1(f_t)|),
        L = ½ CE(S(x̂), y) + ½ Dice(S(x̂), y) + 0.01 · (mean D1(f_t)² + mean D2(p_t)²).

    The gain has no ratio. The masks `topk`, `soft` and `random` of D1's loss, with `mask_ratio`,
    are not from the authors. `global_only` and `local_only` list the differences from the published
    code.
    """

    name = "glua"
    reference = "Su et al., IEEE JBHI 2023 (arXiv 2205.11888)"
    needs = "source images and labels, target images"
    uses_target = True
    Config: ClassVar[type] = GLUAConfig
    presets = {"quick": {**QUICK_STYLE, **QUICK_ALIGNMENT}, "paper": PAPER_ALIGNMENT}
    parts: ClassVar[tuple[str, ...]] = ("local_only", "global_only")

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the rows of the ablation, from single alignments to full GLUA."""
        return {
            "Step A + D1": {"gain": "none", "lambda_output": 0.0},
            "Step A + D2": {"gain": "none", "lambda_feature": 0.0},
            "Step A + D1 + D2": {"gain": "none"},
            "gain detached": {"gain": "detached"},
            "gain constant": {"gain": "constant"},
            "ratio mask (ours)": {"mask": "topk"},
            "random mask (ours)": {"mask": "random"},
            "GLUA": {},
        }
