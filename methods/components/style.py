"""Restyling of source images as target images, Step A of GLUA; used by `global_only` and `glua`.

A style network is a module that implements `Restyler`, with a prefix for its settings. `STYLES`
maps names to networks; the setting `style` selects one, by default that of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from glua_bench.config import setting
from glua_bench.method import Adjustment, Batch, Cases, Context, Stage, TaskInfo
from glua_bench.methods.components.adgan import ADGAN, QUICK_ADGAN, ADGANConfig
from glua_bench.methods.components.style_codes import QUICK_CODES, CodesConfig, StyleCodes

STYLES: Mapping[str, Any] = {"adgan": ADGAN, "codes": StyleCodes}


class Restyler(Protocol):
    """A network that learns to restyle source images.

    Attributes:
        hold: fraction of the stage with constant learning rates.
        decay: power of their polynomial decay afterwards.
    """

    hold: float
    decay: float

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Return adjustments of settings to the number of cases."""

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the optimizers by name."""

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update once; return the scalars to log."""

    def finish(self, context: Context) -> None:
        """Finish the stage after its last step."""

    def restyle(self, images: Tensor) -> Tensor:
        """Restyle source images as target images, (N, S, H, W) → the same shape in [-1, 1]."""


@dataclass(frozen=True)
class StyleConfig(ADGANConfig, CodesConfig):
    """Style network, its share of the budget, and the settings of all style networks."""

    style: str = setting(
        "adgan", "style network: AD-GAN, or DAR-UNet's style codes", choices=tuple(STYLES)
    )
    style_share: float = setting(
        2.0, "updates of the style stage as a multiple of steps", low=0.001, high=100
    )


QUICK_STYLE = {**QUICK_ADGAN, **QUICK_CODES, "style_share": 3.0}


def build_style(config: StyleConfig, task: TaskInfo) -> Restyler:
    """Build the style network that `config.style` names."""
    restyler: Restyler = STYLES[config.style](config, task)
    return restyler


def style_stage(style: Restyler, config: StyleConfig) -> Stage:
    """Return the stage that trains module `style`; runs with equal settings share its result."""
    own = tuple(n for n in StyleConfig.__dataclass_fields__ if n.startswith(f"{config.style}_"))
    return Stage(
        "style",
        config.style_share,
        depends_on=("style", "style_share", *own),
        modules=("style",),
        photometric=False,
        decay=style.decay,
        hold=style.hold,
        finish=style.finish,
        step=style.step,
        optimizers=style.optimizers,
    )
