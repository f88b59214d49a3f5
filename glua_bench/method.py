"""The plugin contract of a method: `Method`, its `Stage`s, and the `Batch` and `Context` of a step.

The harness owns the loop, the step budget, devices and precision, checkpoints, selection,
evaluation and logging. A method owns its networks, its losses and the order of its updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glua_bench.config import SegmenterSpec
from glua_bench.task import Structure

# The part that a domain plays in a direction.
Role = Literal["source", "target"]


@dataclass(frozen=True)
class TaskInfo:
    """What a method may know about the task.

    Args:
        dataset: name of the dataset.
        structures: the classes, without background; class index = position + 1.
        size: side of the square slices in pixels.
        segmenter: the network that all methods of a comparison share.
        batch_size: images per domain and step.
        slices: S, the slices of an image, which are its channels; networks that take or make
            images have as many. The middle slice is the one that is labelled.
    """

    dataset: str
    structures: tuple[Structure, ...]
    size: int
    segmenter: SegmenterSpec
    batch_size: int
    slices: int = 1

    @property
    def classes(self) -> int:
        """Number of classes K, background included."""
        return len(self.structures) + 1


@dataclass(frozen=True)
class Cases:
    """How many cases a run trains on.

    Args:
        source: labelled ones of the source domain.
        target: unlabelled ones of the target domain.
    """

    source: int
    target: int


@dataclass(frozen=True)
class Adjustment:
    """A setting's value for the data at hand, and why it is not the one that was asked for.

    Args:
        value: what the run takes instead.
        reason: in a clause, e.g. "training has 4 target cases".
    """

    value: Any
    reason: str


@dataclass(frozen=True)
class Batch:
    """One step's images. There is no field for target labels.

    Args:
        source_images: (N, S, H, W) in [-1, 1], S neighbouring slices, of which the middle one is
            labelled; S = 1 is that slice alone.
        source_labels: (N, H, W), class indices, or `task.UNANNOTATED` where a label leaves open
            what a pixel shows; such pixels must enter no loss, and those of `losses.py` see to it.
        target_images: (N, S, H, W) in [-1, 1]; None where the method declares no need.
    """

    source_images: Tensor
    source_labels: Tensor
    target_images: Tensor | None

    @property
    def target(self) -> Tensor:
        """The target images of a method that declared `uses_target = True`."""
        if self.target_images is None:
            raise TypeError("this method reads target images: set `uses_target = True` on it")
        return self.target_images


@dataclass(frozen=True)
class Stage:
    """One phase of a method's training.

    Args:
        name: e.g. "style" or "train".
        share: updates of this stage as a multiple of the run's step budget. The stage that
            trains the segmenter has 1.0 in every method, so all segmenters see the same
            number of updates; further stages are extra cost, which reports show.
        depends_on: names of the config fields that the stage's result depends on. Given (even
            empty), the finished stage is cached and shared by every run with equal values;
            None keeps the stage within its run.
        modules: attributes of the method that the stage trains; what the cache keeps.
        translate: called without gradients on the source images after the geometric and
            before the photometric augmentation, e.g. to restyle them.
        photometric: whether the photometric part of the policy applies in this stage. A stage
            that learns the domains' appearance must see it unchanged.
        decay: power of the polynomial decay of all learning rates; 0 keeps them constant.
        hold: share of the stage, in [0, 1), during which learning rates stay constant before
            they decay.
        finish: called once after the last step, e.g. to compute a style bank.
        step: one update of this stage, as `Method.step`; None takes the method's.
        optimizers: makes this stage's optimizers, as `Method.optimizers`; None takes the method's.
    """

    name: str = "train"
    share: float = 1.0
    depends_on: tuple[str, ...] | None = None
    modules: tuple[str, ...] = ()
    translate: Callable[[Tensor], Tensor] | None = None
    photometric: bool = True
    decay: float = 0.0
    hold: float = 0.0
    finish: Callable[[Context], None] | None = None
    step: Callable[[Batch, Context], dict[str, Tensor]] | None = None
    optimizers: Callable[[], dict[str, Optimizer]] | None = None

    def trained_by(
        self, method: Method
    ) -> tuple[Callable[[Batch, Context], dict[str, Tensor]], Callable[[], dict[str, Optimizer]]]:
        """The step and the optimizers of the stage: its own, or else the method's."""
        return self.step or method.step, self.optimizers or method.optimizers

    def steps(self, budget: int) -> int:
        """Updates of this stage under a budget (at least one)."""
        return max(1, round(self.share * budget))

    def rate(self, progress: float) -> float:
        """Factor of the learning rates when a share `progress` of the stage is done."""
        decaying = max(0.0, progress - self.hold) / (1 - self.hold)
        return (1 - decaying) ** self.decay


@dataclass
class Context:
    """What the harness lends to a step.

    Args:
        stage: the running stage.
        step: updates done in this stage.
        steps: updates that the stage has in all.
        optimizers: by the names that the stage's or the method's `optimizers` gave.
        target_slices: iterates over all target training images in order, (N, S, H, W).
    """

    stage: Stage
    step: int
    steps: int
    optimizers: Mapping[str, Optimizer]
    target_slices: Callable[[], Iterator[Tensor]]
    _backward: Callable[..., None] = field(
        default=lambda loss, **options: loss.backward(**options), repr=False
    )
    _average: Callable[[Optimizer], None] = field(default=lambda optimizer: None, repr=False)

    @property
    def progress(self) -> float:
        """Share of the stage that is done, in [0, 1)."""
        return self.step / self.steps

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Accumulate gradients of a loss (scaled under mixed precision).

        Args:
            loss: a scalar.
            retain_graph: keep the graph for another loss of the same forward pass.
        """
        self._backward(loss, retain_graph=retain_graph)

    def apply(self, name: str) -> None:
        """Step one optimizer on the accumulated gradients, averaged over processes."""
        optimizer = self.optimizers[name]
        self._average(optimizer)
        optimizer.step()

    def update(self, name: str, loss: Tensor) -> None:
        """Clear an optimizer's gradients, backpropagate a loss, and step."""
        self.optimizers[name].zero_grad(set_to_none=True)
        self.backward(loss)
        self.apply(name)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass through modules without computing those of their weights."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class NoConfig:
    """The configuration of a method that has nothing to set."""


class Method(nn.Module, ABC):
    """One way to adapt. Reads top to bottom like the paper's algorithm box.

    The class docstring is the method's card: its first line is the one-line description in
    `glua-bench list`, the rest gives source, equations, and what is chosen here.

    Args:
        task: what is to be segmented, and with which segmenter.
        config: an instance of `Config`.
    """

    name: ClassVar[str]
    reference: ClassVar[str]  # the paper, for `list` and tables
    needs: ClassVar[str]  # in words, for `list`
    uses_target: ClassVar[bool] = True
    Config: ClassVar[type] = NoConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # preset -> config changes
    parts: ClassVar[tuple[str, ...]] = ()  # methods that are this one with something left out

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__()
        self.task = task
        self.config = config

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """The ablation's rows: name → config changes."""
        return {}

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Decline data that the method cannot serve, or fit settings to it, before training.

        What settings and task alone decide is declined in `__init__`, by the same error.

        Returns:
            Setting → its value for these data and why; the harness says so and records the value.

        Raises:
            ConfigError: in one sentence, with the setting to change and its value.
        """
        return {}

    def stages(self) -> Sequence[Stage]:
        """The phases of training, in order."""
        return (Stage(),)

    @abstractmethod
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers, by name, of every stage that does not bring its own."""

    @abstractmethod
    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """One update; returns the scalars to log. Non-finite values stop the run."""

    @abstractmethod
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Segment images of one domain.

        Args:
            images: (N, S, H, W) in [-1, 1].
            domain: whose images they are; those of the source are translated as in training.

        Returns:
            Logits (N, K, H, W) of the middle slices.
        """

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """What predictions are made of, for the selectors.

        The map before the last layer, where a method has one; the logits, where it does not say.

        Args:
            images: (N, S, H, W) in [-1, 1].
            domain: whose images they are.

        Returns:
            (N, D, h, w).
        """
        return self.predict(images, domain)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Further images to look at, e.g. restyled images or a gap map.

        Returns:
            name → (N, 1, H, W), or (N, S, H, W), of which the middle slices are shown.
        """
        return {}
