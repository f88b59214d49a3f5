"""Source-only training: the lower bound, and the upper bound under `--scenario supervised`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, Method, Role, Stage, TaskInfo
from glua_bench.networks import DeepLab, Segmenter, build_segmenter


@dataclass(frozen=True)
class SegmentConfig:
    """Settings of segmenter training, shared by every method built on it."""

    lr: float = setting(2e-3, "learning rate of the segmenter", low=1e-6, high=1.0, log=True)
    weight_decay: float = setting(1e-4, "weight decay of the segmenter", low=0, high=1)
    optimizer: str = setting(
        "adamw",
        "segmenter optimizer: adamw; sgd with a tenfold rate for the last layer, as published for "
        "deeplab; or sgd-repeated, which steps deeplab's weights up to four times as GLUA's code",
        choices=("adamw", "sgd", "sgd-repeated"),
    )


class SourceOnly(Method):
    """Train the segmenter on labelled source images only.

    L = Dice + cross-entropy on source images. This is the lower bound of every comparison. Under
    `--scenario supervised` the harness serves labelled target-train cases as source, so the same
    code gives the upper bound; such results are stamped privileged.
    """

    name = "source_only"
    reference = "baseline"
    needs = "source images and labels"
    uses_target = False
    Config: ClassVar[type] = SegmentConfig
    segmentation = staticmethod(segmentation_loss)

    def __init__(self, task: TaskInfo, config: SegmentConfig) -> None:
        super().__init__(task, config)
        self.segmenter = build_segmenter(task.segmenter, task.classes, task.inputs)
        if config.optimizer == "sgd-repeated" and not isinstance(self.segmenter, DeepLab):
            raise ConfigError(
                "method.optimizer = sgd-repeated works only with segmenter.name = deeplab, not "
                f"'{task.segmenter.name}'; set method.optimizer=sgd or segmenter.name=deeplab."
            )

    def stages(self) -> tuple[Stage, ...]:
        """Return one stage with polynomial decay."""
        return (Stage("segment", decay=0.9),)

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the segmenter's optimizer."""
        return {"segmenter": segmenter_optimizer(self.segmenter, self.config)}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the segmenter on source images."""
        loss = self.segmentation(self.segmenter(batch.source_images).logits, batch.source_labels)
        context.update("segmenter", loss)
        return {"segmentation": loss}

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return logits (N, K, H, W) for images (N, S, H, W) of either domain."""
        return self.segmenter(images).logits

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the segmenter's last decoder map."""
        return self.segmenter(images).features[-1]


def segmenter_optimizer(
    segmenter: Segmenter, config: SegmentConfig, further_heads: tuple[nn.Module, ...] = ()
) -> Optimizer:
    """Build the segmenter's optimizer.

    Args:
        segmenter: the segmenter.
        config: optimizer name, learning rate and weight decay.
        further_heads: further last layers to train like the segmenter's own.
    """
    heads = [p for head in (segmenter.head, *further_heads) for p in head.parameters()]
    own = {id(p) for p in heads}
    body = {n: p for n, p in segmenter.named_parameters() if id(p) not in own}
    if config.optimizer == "adamw":
        weights = [*body.values(), *heads]
        return AdamW(weights, config.lr, weight_decay=config.weight_decay, fused=True)
    groups: list[dict[str, object]] = [{"params": heads, "lr": 10 * config.lr}]
    if config.optimizer == "sgd":
        groups.append({"params": list(body.values())})
        return SGD(groups, config.lr, momentum=0.9, weight_decay=config.weight_decay)
    # The published code lists a weight once per enclosing module, that is, once per dot.
    for repeats in sorted({name.count(".") for name in body}):
        weights = [p for name, p in body.items() if name.count(".") == repeats]
        groups.append({"params": weights, "repeats": repeats})
    return RepeatedSGD(groups, config.lr, momentum=0.9, weight_decay=config.weight_decay)


class RepeatedSGD(SGD):
    """SGD that steps each group `repeats` times per update with the same gradient.

    This reproduces PyTorch's single-tensor SGD for weights that are listed several times, as in
    GLUA's published code: the effective rate and momentum grow with the number of listings. In the
    first update each listing starts with its own momentum.
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step each group as often as its `repeats`."""
        groups = self.param_groups
        fresh = {p for group in groups for p in group["params"] if p not in self.state}
        for repeat in range(max(group.get("repeats", 1) for group in groups)):
            self.param_groups = [g for g in groups if g.get("repeats", 1) > repeat]
            for parameter in (p for group in self.param_groups for p in group["params"]):
                if parameter in fresh:
                    self.state.pop(parameter, None)
            super().step()
        self.param_groups = groups
