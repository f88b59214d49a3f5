"""Step A of GLUA: restyle source images as target ones, a component of `global_only` and `glua`.

A way to restyle is a module of the form of `Restyler`, with settings whose names begin with its
own; `STYLES` names them, and one setting chooses. The default is what the authors' code names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from glua_bench.config import setting
from glua_bench.method import Adjustment, Batch, Cases, Context, Stage, TaskInfo
from glua_bench.methods.adgan import ADGAN, QUICK_ADGAN, ADGANConfig
from glua_bench.methods.style_codes import QUICK_CODES, CodesConfig, StyleCodes

STYLES: Mapping[str, Any] = {"adgan": ADGAN, "codes": StyleCodes}


class Restyler(Protocol):
    """What trains itself to restyle source images, and then does it."""

    hold: float  # share of the stage with constant learning rates
    decay: float  # power of their polynomial decay after it

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Settings to fit to so many cases."""

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers, by name."""

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update; returns the scalars to log."""

    def finish(self, context: Context) -> None:
        """What is left to do after the last step."""

    def restyle(self, images: Tensor) -> Tensor:
        """Source images as target ones, (N, S, H, W) → the same shape in [-1, 1]."""


@dataclass(frozen=True)
class StyleConfig(ADGANConfig, CodesConfig):
    """Which way to restyle, its share of the budget, and the settings of all ways."""

    style: str = setting(
        "adgan", "how to restyle: AD-GAN, or style codes as DAR-UNet", choices=tuple(STYLES)
    )
    style_share: float = setting(
        2.0, "updates of the style stage, as a multiple of the run's steps", low=0.001, high=100
    )


QUICK_STYLE = {**QUICK_ADGAN, **QUICK_CODES, "style_share": 3.0}


def build_style(config: StyleConfig, task: TaskInfo) -> Restyler:
    """The module that `config.style` names; an `nn.Module`."""
    restyler: Restyler = STYLES[config.style](config, task)
    return restyler


def style_stage(style: Restyler, config: StyleConfig) -> Stage:
    """The stage that trains the method's module `style`; runs with equal settings share it."""
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
