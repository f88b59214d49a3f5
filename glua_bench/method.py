"""The plugin interface of methods: `Method`, `Stage`, `Batch` and `Context`.

The harness provides the training loop, step budget, devices and precision, checkpoints, selection,
evaluation and logging. A method provides its networks, losses and updates.
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

# Role of a domain in a direction.
Role = Literal["source", "target"]


@dataclass(frozen=True)
class TaskInfo:
    """Description of the task that is available to methods.

    Attributes:
        dataset: name of the dataset.
        structures: the classes, without background; class index = position + 1.
        size: side of the square slices in pixels.
        segmenter: the segmentation network, shared by all methods of a comparison.
        batch_size: images per domain and step.
        slices: S, the number of neighbouring slices of an image. The middle slice is labelled.
        channels: C, the number of input channels, e.g. 2 for T1 and T2.
    """

    dataset: str
    structures: tuple[Structure, ...]
    size: int
    segmenter: SegmenterSpec
    batch_size: int
    slices: int = 1
    channels: int = 1

    @property
    def inputs(self) -> int:
        """Planes C·S of an image: the slices of the first channel, then of the second, …."""
        return self.channels * self.slices

    @property
    def classes(self) -> int:
        """Number of classes K, background included."""
        return len(self.structures) + 1


@dataclass(frozen=True)
class Cases:
    """Numbers of training cases.

    Attributes:
        source: labelled cases of the source domain.
        target: unlabelled cases of the target domain.
    """

    source: int
    target: int


@dataclass(frozen=True)
class Adjustment:
    """A setting that is changed to fit the data, or has no effect.

    Attributes:
        value: the value that the run uses; the given one if it has no effect.
        reason: a clause, e.g. "training has 4 target cases".
    """

    value: Any
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images of one step, without target labels.

    Attributes:
        source_images: (N, C·S, H, W) in [-1, 1]: S neighbouring slices, of which the middle one
            is labelled, of each of C input channels.
        source_labels: (N, H, W), class indices, or `task.UNANNOTATED` for pixels without
            annotation, which losses must ignore (those of `losses.py` do).
        target_images: (N, C·S, H, W) in [-1, 1]; None if the method sets `uses_target = False`.
    """

    source_images: Tensor
    source_labels: Tensor
    target_images: Tensor | None

    @property
    def target(self) -> Tensor:
        """The target images; only for methods with `uses_target = True`."""
        if self.target_images is None:
            raise TypeError("this method reads target images: set `uses_target = True`")
        return self.target_images


@dataclass(frozen=True)
class Stage:
    """One phase of a method's training.

    Attributes:
        name: e.g. "style" or "train".
        share: updates of this stage as a multiple of the run's step budget. The stage that
            trains the segmenter has 1.0 in every method, so all segmenters get the same
            number of updates; other stages are extra cost, which reports show.
        depends_on: names of the config fields that the stage's result depends on. If given (even
            empty), the finished stage is cached and shared by all runs with equal values;
            None disables sharing.
        modules: attributes of the method that the stage trains and the cache stores.
        translate: applied without gradients to source images between geometric and photometric
            augmentation, e.g. to restyle them.
        photometric: whether photometric augmentation applies in this stage. A stage that learns
            the domains' appearance needs False.
        decay: power of the polynomial decay of all learning rates; 0 keeps them constant.
        hold: fraction of the stage, in [0, 1), before the decay starts.
        finish: called once after the last step, e.g. to compute a style bank.
        step: update function of this stage; None uses `Method.step`.
        optimizers: creates this stage's optimizers; None uses `Method.optimizers`.
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
        """Return the step and the optimizers of the stage, by default those of the method."""
        return self.step or method.step, self.optimizers or method.optimizers

    def steps(self, budget: int) -> int:
        """Return the number of updates of this stage for a step budget (at least one)."""
        return max(1, round(self.share * budget))

    def rate(self, progress: float) -> float:
        """Return the learning rate factor at a fraction `progress` of the stage."""
        decaying = max(0.0, progress - self.hold) / (1 - self.hold)
        return (1 - decaying) ** self.decay


@dataclass
class Context:
    """State and utilities that the harness passes to a step.

    Attributes:
        stage: the running stage.
        step: finished updates of this stage.
        steps: total number of updates of this stage.
        optimizers: name → optimizer, from the stage's or the method's `optimizers`.
        target_slices: iterates over all target training images in order, (N, C·S, H, W).
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
        """Finished fraction of the stage, in [0, 1)."""
        return self.step / self.steps

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Accumulate gradients of a loss (scaled under mixed precision).

        Args:
            loss: a scalar.
            retain_graph: keep the graph for another loss of the same forward pass.
        """
        self._backward(loss, retain_graph=retain_graph)

    def apply(self, name: str) -> None:
        """Step an optimizer on the accumulated gradients, averaged over processes."""
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
    """Disable gradients of the modules' weights; gradients still pass through the modules."""
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
    """Configuration of a method without settings."""


class Method(nn.Module, ABC):
    """Base class of adaptation methods.

    The class docstring documents the method: its first line is the description in `glua-bench
    list`, the rest gives source, equations and choices made here.

    Args:
        task: structures, image size and segmenter.
        config: an instance of `Config`.
    """

    name: ClassVar[str]
    reference: ClassVar[str]  # the paper, for `list` and tables
    needs: ClassVar[str]  # required data, for `list`
    uses_target: ClassVar[bool] = True
    Config: ClassVar[type] = NoConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # preset → config changes
    parts: ClassVar[tuple[str, ...]] = ()  # methods that are ablations of this one

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__()
        self.task = task
        self.config = config

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return the variants of an ablation: name → config changes."""
        return {}

    def check(self, cases: Cases) -> Mapping[str, Adjustment]:
        """Reject unsuitable data, or adjust settings to the data, before training.

        Invalid combinations of settings and task are rejected in `__init__` with the same error.

        Returns:
            Setting → adjusted value and reason, which the harness reports and records.

        Raises:
            ConfigError: the data are unsuitable; one sentence that names the setting to change and
                its value.
        """
        return {}

    def stages(self) -> Sequence[Stage]:
        """Return the stages of training, in order."""
        return (Stage(),)

    @abstractmethod
    def optimizers(self) -> dict[str, Optimizer]:
        """Create the optimizers, by name, of stages without optimizers of their own."""

    @abstractmethod
    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Perform one update and return the scalars to log. Non-finite values stop the run."""

    @abstractmethod
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Segment images of one domain.

        Args:
            images: (N, C·S, H, W) in [-1, 1]; source images are translated as in training.
            domain: domain of the images.

        Returns:
            Logits (N, K, H, W) of the middle slices.
        """

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Compute feature maps for the selectors.

        Methods return the map before the last layer; the default is the logits.

        Args:
            images: (N, C·S, H, W) in [-1, 1].
            domain: domain of the images.

        Returns:
            (N, D, h, w).
        """
        return self.predict(images, domain)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Compute images for visual inspection, e.g. restyled images or a gap map.

        Returns:
            name → (N, 1, H, W), or (N, C·S, H, W) with the middle slices of the first channel
            shown.
        """
        return {}
