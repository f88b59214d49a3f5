"""Sound methods pass, each kind of mistake is caught by its own check, and the kit itself."""

from __future__ import annotations

import copy
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import glua_bench
from glua_bench import conformance
from glua_bench.config import setting
from glua_bench.conformance import METHOD_CHECKS
from glua_bench.conformance.leaks import unsaved_state
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import middle
from glua_bench.data.stores import ImageStore
from glua_bench.errors import ConfigError, PluginError
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context, Method, Role, Stage, TaskInfo
from glua_bench.methods.components.host_count import HostCount
from glua_bench.networks import instance_norm
from glua_bench.registry import Registry
from glua_bench.runs import execution
from glua_bench.runs import plan as planning
from glua_bench.runs.plan import plan
from glua_bench.runs.sealed import training
from glua_bench.task import Dataset

BUILT_IN = [e.name for e in Registry("method").entries() if e.origin == "glua-bench"]


def short(method: type[Method]) -> Mapping[str, Any]:
    """Return settings that make other stages as short as the last one."""
    return {"style_share": 1.0} if "style_share" in method.Config.__dataclass_fields__ else {}


@conformance.parametrize(*BUILT_IN, config=short)
def test_built_in_methods(check: Callable[[], None]) -> None:
    check()


# -- a sound method, the base of all faulty ones --------------------------------------------------


@dataclass(frozen=True)
class SoundConfig:
    lr: float = setting(0.1, "learning rate", low=1e-6, high=1.0)
    stem_lr: float = setting(0.05, "learning rate of the stem", low=1e-6, high=1.0)
    form: str = setting("plain", "form of the loss", choices=("plain", "double"))
    channels: int = setting(16, "hidden channels", low=3, high=64)


class Sound(Method):
    """Two convolutions on a stem that both domains share.

    An original of this test that keeps every rule.
    """

    name = "sound"
    reference = "original"
    needs = "source images and labels, target images"
    Config = SoundConfig

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__(task, config)
        self.stem = nn.Conv2d(task.inputs, task.inputs, 3, padding=1)
        self.head = nn.Sequential(
            nn.Conv2d(task.inputs, config.channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.channels, task.classes, 1),
        )
        self.extend(task)

    def extend(self, task: TaskInfo) -> None:
        """Add what a faulty copy needs."""

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        return {"double": {"form": "double"}}

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                "stem",
                depends_on=("stem_lr",),
                modules=("stem",),
                photometric=False,
                step=self.stem_step,
                optimizers=self.stem_optimizers,
            ),
            Stage("segment", decay=0.9),
        )

    def stem_optimizers(self) -> dict[str, Optimizer]:
        return {"stem": SGD(self.stem.parameters(), self.config.stem_lr)}

    def stem_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        loss = self.stem_loss(batch)
        context.update("stem", loss)
        return {"loss": loss}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"head": SGD(self.head.parameters(), self.config.lr, momentum=0.9)}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        loss = self.loss(batch) * (2 if self.config.form == "double" else 1)
        context.update("head", loss)
        return {"loss": loss}

    def stem_loss(self, batch: Batch) -> Tensor:
        return sum((self.stem(x) - x).square().mean() for x in (batch.source_images, batch.target))  # type: ignore[return-value]

    def supervised(self, batch: Batch, labels: Tensor) -> Tensor:
        return segmentation_loss(self.predict(batch.source_images, "source"), labels)

    def loss(self, batch: Batch) -> Tensor:
        source = self.supervised(batch, batch.source_labels)
        likely = self.predict(batch.target, "target").softmax(1)
        return source - 0.1 * (likely * likely.clamp(min=1e-6).log()).sum(1).mean()

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return self.head(self.stem(images))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"stem": self.stem(batch.source_images)}


def failed(method: type[Method], without: set[str]) -> set[str]:
    """Return the checks that fail; the card is skipped, since faulty methods have none."""
    names = [n for n in METHOD_CHECKS if n not in {"card", *without}]
    results = conformance.run_checks(method, only=names)
    for result in results:
        assert result.passed or result.message
        assert result.status != "undecided" or "did not pass" in result.message
    return {result.check for result in results if result.status == "failed"}


def test_the_sound_method_passes_everything() -> None:
    results = conformance.run_checks(Sound)
    assert [r.check for r in results] == list(METHOD_CHECKS)
    assert all(r.passed for r in results), [r for r in results if not r.passed]


# -- faulty methods -------------------------------------------------------------------------------

FAULTY: list[tuple[set[str], type[Method]]] = []


def caught_by(*checks: str) -> Callable[[type[Method]], type[Method]]:
    def add(method: type[Method]) -> type[Method]:
        FAULTY.append((set(checks), method))
        return method

    return add


def faulty(name: str, check: str, **attributes: Any) -> None:
    caught_by(check)(type(name, (Sound,), attributes))


@caught_by("label_poison", "labels_absent")
class PeeksAtLabels(Sound):
    """Finds the dataset in calling frames and reads the target's labels."""

    def extend(self, task: TaskInfo) -> None:
        frame, found = sys._getframe(), None
        while not isinstance(found, Dataset):
            assert frame.f_back is not None
            frame = frame.f_back
            near = [v for v in frame.f_locals.values() if not isinstance(v, nn.Module)]
            near += [getattr(value, "dataset", None) for value in near]
            found = next((value for value in near if isinstance(value, Dataset)), None)
        labels = [case.label for case in found.split("inverted", "train")]
        self.seen = 1 + float(np.mean([np.asarray(nib.load(path).dataobj) for path in labels]))

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * self.seen


@caught_by("label_poison", "labels_absent")
class PeeksWhereItCan(PeeksAtLabels):
    """As above, but trains without label files; that its weights then differ is caught as well."""

    def extend(self, task: TaskInfo) -> None:
        try:
            super().extend(task)
        except FileNotFoundError:
            self.seen = 1 + 3.0


class SoundLoss(Sound):
    """Has a loss that ignores changes of `predict`."""

    def loss(self, batch: Batch) -> Tensor:
        source = Sound.predict(self, batch.source_images, "source")
        target = Sound.predict(self, batch.target, "target")
        return segmentation_loss(source, batch.source_labels) + target.square().mean()


@caught_by("logits")
class HalfSize(SoundLoss):
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(images, domain)[:, :, ::2, ::2]


@caught_by("logits")
class KnowsTheTargetAlone(HalfSize):
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return Sound.predict(self, images, domain)[:, :, :: 1 if domain == "target" else 2]


@caught_by("logits")
class OneImageLost(Sound):
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(images[: max(2, len(images) // 2 * 2)], domain)


@caught_by("trains")
class NotANumber(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * float("nan")


@caught_by("trains")
class NothingLearnt(Sound):
    def stem_optimizers(self) -> dict[str, Optimizer]:
        return {"stem": SGD(self.stem.parameters(), 0.0)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"head": SGD(self.head.parameters(), 0.0)}


@caught_by("resume", "hidden_state")
class HiddenState(Sound):
    """Counts its steps in an attribute that no checkpoint saves."""

    count = 0

    def loss(self, batch: Batch) -> Tensor:
        self.count += 1
        return super().loss(batch) * self.count


@caught_by("same_seed")
class OwnRandomness(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * float(np.random.default_rng().uniform(0.5, 1.5))


@caught_by("other_seed")
class SeedsItself(Sound):
    def __init__(self, task: TaskInfo, config: Any) -> None:
        torch.manual_seed(0)
        super().__init__(task, config)


@caught_by("hidden_state", "resume")
class PoolInAList(Sound):
    """Keeps earlier images as a Python list."""

    def extend(self, task: TaskInfo) -> None:
        self.pool: list[Tensor] = []

    def loss(self, batch: Batch) -> Tensor:
        self.pool.append(batch.target)
        return super().loss(batch) + 0.1 * self.predict(self.pool[0], "target").square().mean()


@caught_by("hidden_state", "resume", "checkpoint")
class AverageInADict(Sound):
    """Predicts with averaged weights that no checkpoint saves."""

    def extend(self, task: TaskInfo) -> None:
        self.average = {name: p.detach().clone() for name, p in self.head.named_parameters()}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        values = super().step(batch, context)
        for name, parameter in self.head.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.5)
        return values

    def loss(self, batch: Batch) -> Tensor:
        averaged = torch.func.functional_call(self.head, self.average, self.stem(batch.target))
        return (
            super().loss(batch)
            + (super().predict(batch.target, "target") - averaged).square().mean()
        )

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        if self.training:
            return super().predict(images, domain)
        return torch.func.functional_call(self.head, self.average, self.stem(images))


class Averaged(Sound):
    """Keeps its average as a module that no optimizer updates."""

    rounds = 1

    def extend(self, task: TaskInfo) -> None:
        self.average = copy.deepcopy(self.head).requires_grad_(False)
        self.average_stem = copy.deepcopy(self.stem).requires_grad_(False)

    def stem_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        values = super().stem_step(batch, context)
        self.follow(self.average_stem, self.stem)
        return values

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        for _ in range(self.rounds):
            values = super().step(batch, context)
        self.follow(self.average, self.head)
        return values

    @torch.no_grad()
    def follow(self, average: nn.Module, trained: nn.Module) -> None:
        for a, b in zip(average.parameters(), trained.parameters(), strict=True):
            a.lerp_(b, 0.5)

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        if self.training:
            return super().predict(images, domain)
        return self.average(self.average_stem(images))


def test_an_average_of_weights_is_sound_where_it_is_a_module() -> None:
    assert failed(Averaged, {"whole_run", "shared_stages", "stage_dependencies"}) == set()


class ChoosesItsStem(Sound):
    """A setting chooses between stems that depend on different settings."""

    def stages(self) -> tuple[Stage, ...]:
        stem, last = super().stages()
        own = () if self.config.form == "double" else ("stem_lr",)
        return (replace(stem, depends_on=own), last)


def test_a_choice_between_shared_stages_is_sound() -> None:
    assert failed(ChoosesItsStem, {"shared_stages", "stage_dependencies"}) == set()


@caught_by("budget")
class AveragedOverTooManyUpdates(Averaged):
    """Predicts with averaged weights only, so the budget must count updates of all weights."""

    rounds = 3

    def stages(self) -> tuple[Stage, ...]:
        return tuple(replace(stage, depends_on=None) for stage in super().stages())


@caught_by("optimizers")
class ForgottenNetwork(Sound):
    """Its loss uses a network that no optimizer updates."""

    def extend(self, task: TaskInfo) -> None:
        self.forgotten = nn.Conv2d(task.inputs, 1, 1)

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.forgotten(batch.target).square().mean()


@caught_by("optimizers", "budget")
class MovedTwice(Sound):
    """One weight in two optimizers."""

    def optimizers(self) -> dict[str, Optimizer]:
        again = SGD(self.head[0].parameters(), self.config.lr)
        return {**super().optimizers(), "again": again}

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        values = super().step(batch, context)
        context.apply("again")
        return values


@caught_by("optimizers", "checkpoint", "resume")
class StrangersWeights(Sound):
    """Trains a network that is no module of the method."""

    def extend(self, task: TaskInfo) -> None:
        self.strangers = [nn.Conv2d(task.inputs, task.inputs, 3, padding=1)]

    def optimizers(self) -> dict[str, Optimizer]:
        weights = [*self.head.parameters(), *self.strangers[0].parameters()]
        return {"head": SGD(weights, self.config.lr, momentum=0.9)}

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(images + self.strangers[0](images), domain)


@caught_by("budget")
class TwoUpdatesInOne(Sound):
    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        super().step(batch, context)
        return super().step(batch, context)


@caught_by("checkpoint")
class ForgetsItsScale(SoundLoss):
    scale = 1.0

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        self.scale = 2.0
        return super().step(batch, context)

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(images, domain) * self.scale


@caught_by("features")
class MixedFeatures(Sound):
    """Returns one feature map for the whole batch."""

    def features(self, images: Tensor, domain: Role) -> Tensor:
        return self.predict(images, domain).mean(0, keepdim=True).expand(len(images), -1, -1, -1)


@caught_by("predict_is_pure")
class GuessesAlways(Sound):
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(nn.functional.dropout(images, 0.5, training=True), domain)


@caught_by("predict_is_pure")
class LearnsFromTests(Sound):
    def extend(self, task: TaskInfo) -> None:
        self.register_buffer("seen", torch.zeros(()))

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        if not self.training:
            self.seen += 1
        return super().predict(images, domain)


@caught_by("flat_slices")
class NormalisesConstants(Sound):
    """One of its networks multiplies gradients by 316 per layer where a map is constant."""

    norm: Callable[[int], nn.Module] = staticmethod(
        lambda channels: nn.GroupNorm(channels, channels)
    )

    def extend(self, task: TaskInfo) -> None:
        layers: list[nn.Module] = []
        for _ in range(24):
            layers.append(nn.Conv2d(task.inputs, task.inputs, 3, padding=1, padding_mode="reflect"))
            layers.append(self.norm(task.inputs))
        self.deep = nn.Sequential(*layers)

    def optimizers(self) -> dict[str, Optimizer]:
        weights = [*self.head.parameters(), *self.deep.parameters()]
        return {"head": SGD(weights, self.config.lr, momentum=0.9)}

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + (self.deep(batch.target) - batch.target).square().mean()


@caught_by("flat_slices")
class StandardisesTests(Sound):
    """Divides by the standard deviation of an image, in eval mode only."""

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        if not self.training:
            deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
            images = (images - mean) / deviation
        return super().predict(images, domain)


@caught_by("logs")
class LogsNumbers(Sound):
    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        return {"loss": super().step(batch, context)["loss"].item()}  # type: ignore[dict-item]


@caught_by("logs")
class LogsMaps(Sound):
    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        return {**super().step(batch, context), "map": batch.source_images}


@caught_by("logs")
class LogsNowAndThen(Sound):
    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        values = super().step(batch, context)
        return values if context.step % 2 else {**values, "more": values["loss"]}


@caught_by("stages")
class OfAnEarlierContract(Sound):
    def predict(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.stem(images))


@caught_by("shared_stages")
class KeepsTooLittle(Sound):
    """Trains a module in the shared stage that `modules` does not list."""

    def extend(self, task: TaskInfo) -> None:
        self.gain = nn.Parameter(torch.ones(()))

    def stem_optimizers(self) -> dict[str, Optimizer]:
        return {"stem": SGD([*self.stem.parameters(), self.gain], self.config.stem_lr)}

    def stem_loss(self, batch: Batch) -> Tensor:
        return super().stem_loss(batch) + (self.gain * batch.target - 0.3).square().mean()


@caught_by("stage_dependencies")
class DependsOnMore(Sound):
    def stem_loss(self, batch: Batch) -> Tensor:
        return super().stem_loss(batch) * self.config.lr


@caught_by("stage_dependencies")
class DependsOnAChoice(Sound):
    def stem_loss(self, batch: Batch) -> Tensor:
        return super().stem_loss(batch) * (2 if self.config.form == "double" else 1)


@caught_by("stage_dependencies")
class DrawsInAnotherOrder(Sound):
    """The stem's initial weights depend on the number of channels of the head built before it."""

    def extend(self, task: TaskInfo) -> None:
        self.stem = nn.Conv2d(task.inputs, task.inputs, 3, padding=1)


faulty("UnknownPreset", "presets", presets={"fast": {"lr": 0.2}})
faulty("AsksForNoTarget", "trains", uses_target=False)

for name, setting_name, declared in (
    ("DefaultOutOfRange", "lr", setting(2.0, "learning rate", low=1e-6, high=1.0)),
    ("OpenRange", "more", setting(2.0, "a weight", low=0)),
    ("NoHelp", "more", 2.0),
):
    fields = [(setting_name, float, declared)]
    faulty(name, "settings", Config=make_dataclass("C", fields, bases=(SoundConfig,), frozen=True))

for name, check, stem, segment in (
    ("HalfTheShare", "budget", {}, {"share": 0.5}),
    ("KeepsNothing", "stages", {"modules": ("stemm",)}, {}),
    ("DependsOnNothingKnown", "stages", {"depends_on": ("stem_rate",)}, {}),
    ("SameNameTwice", "stages", {"name": "segment", "depends_on": None}, {}),
):

    def changed_stages(self: Sound, stem: Any = stem, segment: Any = segment) -> tuple[Stage, ...]:
        first, last = Sound.stages(self)
        return replace(first, **stem), replace(last, **segment)

    faulty(name, check, stages=changed_stages)


@caught_by("settings")
class NotFrozen(Sound):
    @dataclass
    class Config:
        lr: float = setting(0.1, "learning rate", low=1e-6, high=1.0)


@caught_by("round_trip")
class GrowsOnTheWay(Sound):
    @dataclass(frozen=True)
    class Config(SoundConfig):
        def __post_init__(self) -> None:
            object.__setattr__(self, "lr", min(1.0, self.lr * 1.1))


@caught_by("presets")
class UnknownInVariant(Sound):
    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        return {"other": {"formm": "plain"}}


@caught_by("variants_train")
class BrokenVariant(Sound):
    def loss(self, batch: Batch) -> Tensor:
        if self.config.form == "double":
            raise ValueError("not written yet")
        return super().loss(batch)


@caught_by("pictures")
class FlatPictures(Sound):
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"stem": batch.source_images[:, 0]}


@caught_by("target_matters")
class NeverLooksAtTheTarget(Sound):
    def stem_loss(self, batch: Batch) -> Tensor:
        return (self.stem(batch.source_images) - batch.source_images).square().mean()

    def loss(self, batch: Batch) -> Tensor:
        return self.supervised(batch, batch.source_labels)


@caught_by("source_labels_matter")
class NeverLooksAtLabels(Sound):
    def loss(self, batch: Batch) -> Tensor:
        target, source = self.predict(batch.target, "target"), batch.source_images
        return (target - self.predict(source, "source")).square().mean()


@caught_by("unannotated")
class NeedsAClassEverywhere(Sound):
    def loss(self, batch: Batch) -> Tensor:
        logits = self.predict(batch.source_images, "source")
        return torch.nn.functional.cross_entropy(logits, batch.source_labels)


@caught_by("unannotated")
class TakesUnannotatedForBackground(Sound):
    def loss(self, batch: Batch) -> Tensor:
        labels = batch.source_labels
        return self.supervised(batch, labels.where(labels < self.task.classes, 0))


@caught_by("unannotated")
class TakesUnannotatedForTheLastStructure(Sound):
    def loss(self, batch: Batch) -> Tensor:
        return self.supervised(batch, batch.source_labels.clamp(max=self.task.classes - 1))


@caught_by("slices")
class SeesOneSlice(Sound):
    """Ignores `task.slices`."""

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__(replace(task, slices=1), config)


@caught_by("slices")
class LooksAtTheMiddleAlone(SeesOneSlice):
    def stem_loss(self, batch: Batch) -> Tensor:
        images = (middle(x, x.shape[1]) for x in (batch.source_images, batch.target))
        return sum((self.stem(x) - x).square().mean() for x in images)  # type: ignore[return-value]

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(middle(images, images.shape[1]), domain)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.source_images
        return {"stem": self.stem(middle(images, images.shape[1]))}


@caught_by("slices", "channels")
class HasADiscriminatorOfOneSlice(Sound):
    """Predicts correctly, so only a training step fails."""

    def extend(self, task: TaskInfo) -> None:
        self.fixed = nn.Conv2d(1, 1, 3).requires_grad_(False)

    def stem_loss(self, batch: Batch) -> Tensor:
        return super().stem_loss(batch) + 0 * self.fixed(batch.source_images).sum()


@caught_by("slices")
class ShowsTwoOfThree(Sound):
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"stem": self.stem(batch.source_images)[:, :2]}


@caught_by("channels")
class SeesTheFirstChannelAlone(Sound):
    """Accepts two channels, and ignores the second."""

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__(replace(task, channels=1), config)

    def first(self, images: Tensor) -> Tensor:
        return images[:, : self.task.inputs]

    def stem_loss(self, batch: Batch) -> Tensor:
        images = (self.first(x) for x in (batch.source_images, batch.target))
        return sum((self.stem(x) - x).square().mean() for x in images)  # type: ignore[return-value]

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return super().predict(self.first(images), domain)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"stem": self.stem(self.first(batch.source_images))}


class DeclinesSeveralChannels(Sound):
    def extend(self, task: TaskInfo) -> None:
        if task.channels > 1:
            raise ConfigError("sound supports one input channel; use another method.")


def test_a_method_may_decline_several_channels() -> None:
    needed = ["trains", "logits", "pictures", "channels"]
    result = conformance.run_checks(DeclinesSeveralChannels, only=needed)[-1]
    assert result.passed and "use another method" in result.message


@caught_by("whole_run")
class FailsOnFour(Sound):
    """Fails on the depth of the test volume, which no other check predicts."""

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        if len(images) == 4:
            raise RuntimeError("four images")
        return super().predict(images, domain)


@pytest.mark.parametrize(("checks", "method"), FAULTY, ids=lambda v: getattr(v, "__name__", ""))
def test_each_mistake_is_caught_by_its_check_alone(checks: set[str], method: type[Method]) -> None:
    # A whole run is slow, and only one mistake needs it.
    assert failed(method, {"whole_run"} - checks) == checks


def test_every_check_of_a_method_was_seen_to_fail() -> None:
    elsewhere = {"card", "no_way_to_labels", "target_served"}
    assert set().union(*(checks for checks, _ in FAULTY)) | elsewhere == set(METHOD_CHECKS)


def test_a_function_of_an_earlier_contract_is_named_with_its_new_form() -> None:
    (result,) = conformance.run_checks(OfAnEarlierContract, only=["stages"])
    assert "defines predict(self, images), which" in result.message
    assert "calls as predict(self, images, domain); change its definition" in result.message


def test_flat_slices_arrive_as_such_in_every_stage() -> None:
    seen: dict[str, Counter[str]] = {}

    def look(batch: Batch, context: Context) -> None:
        for role, images in (("source", batch.source_images), ("target", batch.target)):
            found = seen.setdefault(f"{context.stage.name} {role}", Counter())
            found.update(map(kind_of, images.numpy()))
        pictures = [kind_of(image) == "picture" for image in batch.source_images.numpy()]
        assert not batch.source_labels[~torch.tensor(pictures)].any()

    bench = conformance.Bench(Sound)
    data = bench.copy_of_data()
    for domain in data.domains():
        conformance.flatten_slices(data.split(domain, "train"))
    options = {"augmentation": "none"}
    steps = conformance.FLAT_STEPS
    bench.train(steps=steps, dataset=data, options=options, even=True, inspect_step=look)
    assert set(seen) == {f"{s} {r}" for s in ("stem", "segment") for r in ("source", "target")}
    for found in seen.values():  # five epochs
        assert found == {"picture": 10, "constant": 10, "empty": 10, "halves": 5, "pixel": 5}
    bench.close()


def kind_of(image: np.ndarray) -> str:
    """Classify a slice with intensities in [-1, 1]."""
    values, counts = np.unique(image, return_counts=True)
    if len(values) == 1:
        if values[0] != -1:
            assert abs(values[0]) < 0.5
        return "empty" if values[0] == -1 else "constant"
    if len(values) == 2:
        return "pixel" if min(counts) == 1 else "halves"
    return "picture"


def test_flat_slices_do_no_harm_behind_the_norm_of_this_package() -> None:
    class Guarded(NormalisesConstants):
        norm = staticmethod(instance_norm)

    (failed,) = conformance.run_checks(NormalisesConstants, only=["flat_slices"])
    assert "The loss 'loss' is nan at step" in failed.message
    assert "glua_bench.networks.instance_norm" in failed.message
    assert "learning rates" not in failed.message
    (passed,) = conformance.run_checks(Guarded, only=["flat_slices"])
    assert passed.passed, passed
    (failed,) = conformance.run_checks(StandardisesTests, only=["flat_slices"])
    assert "predictions of the source are not finite" in failed.message


class NoName(Sound):
    """Inherits its name, which a list without imports cannot show."""


class NoCard(Sound):
    name = "no_card"
    reference = "original"
    needs = "nothing"


NoCard.__doc__ = None


class NoSource(Sound):
    """Segments."""

    name = "no_source"
    reference = "ours"
    needs = "nothing"


class Computed(Sound):
    """Has a name that is computed on import.

    An original.
    """

    name = "com" + "puted"
    reference = "original"
    needs = "nothing"


class Wordy(Sound):
    """Goes on
    over the line. An original.
    """

    name = "wordy"
    reference = "original"
    needs = "nothing"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (NoName, "without importing"),
        (NoCard, "no docstring"),
        (NoSource, "where the method comes from"),
        (Computed, "without importing"),
        (Wordy, "one line"),
    ],
)
def test_the_card_is_checked(method: type[Method], message: str) -> None:
    (result,) = conformance.run_checks(method, only=["card"])
    assert result.status == "failed" and message in result.message


# -- faults of the harness, which no method can cause --------------------------------------------


@pytest.mark.parametrize("what", ["file", "entry", "case", "dataset", "labels"])
def test_a_way_to_a_label_is_found(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    bench = conformance.Bench(Sound)
    case = bench.dataset.split("inverted", "train")[0]

    class Telling(ImageStore):
        def __init__(self, images: Any, **named: Any) -> None:
            super().__init__(images, **named)
            labels = np.asarray(nib.load(case.label).dataobj)
            # Anything reachable from an attribute counts.
            self.notes: Any = {
                "file": [str(case.label)],
                "entry": lambda: case,
                "case": {1: (case,)},
                "dataset": bench.dataset,
                "labels": None,
            }[what]
            if what == "labels":
                cache = SliceCache()
                grid = bench.dataset.grid("quick")
                entry = cache.label(case, bench.dataset.view(case.domain).on(grid))
                self.notes = torch.from_numpy(np.array(entry.open(), np.int64))
                assert labels.any()

    monkeypatch.setattr(training, "ImageStore", Telling)
    assert bench.checks.result("no_way_to_labels").status == "failed"


def test_target_images_served_unasked_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.opened

    def always(withheld: Any) -> Any:
        train, val, target = original(withheld)
        return train, val, target or train

    class Plain(Sound):
        uses_target = False

        def stem_loss(self, batch: Batch) -> Tensor:
            return (self.stem(batch.source_images) - 0.1).square().mean()

        def loss(self, batch: Batch) -> Tensor:
            return self.supervised(batch, batch.source_labels)

    assert conformance.Bench(Plain).checks.result("target_served").passed
    monkeypatch.setattr(training, "opened", always)
    monkeypatch.setattr("glua_bench.data.batches.LabelledStore", type("Nothing", (), {}))
    assert conformance.Bench(Plain).checks.result("target_served").status == "failed"


# -- the bench and the entry points ---------------------------------------------------------------


def test_a_training_of_the_bench_is_planned_as_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code gives the same id; a training alone skips the test cases."""
    with closing(conformance.Bench(Sound)) as bench, conformance.quiet_machine():
        request, config = bench.request(0, conformance.STEPS), bench.config()
        monkeypatch.setattr(planning, "load_dataset", lambda *given: bench.dataset)
        monkeypatch.setattr(planning, "resolve", lambda *given: config)
        monkeypatch.setattr(planning.Registry, "load", lambda *given: Sound)
        real, scored, trained = plan(request), bench.plan(scored=True), bench.plan()
        assert real.id == scored.id != trained.id
        assert real.fingerprints.train == trained.fingerprints.train
        for planned in (scored, trained):
            assert (planned.config, planned.code) == (real.config, real.code)
            assert planned.stages == real.stages


def test_a_training_of_the_bench_ends_in_the_weights_of_a_run() -> None:
    with closing(conformance.Bench(Sound)) as bench:
        with conformance.quiet_machine(bench.cache()):
            planned = bench.plan(scored=True)
            execution.execute(planned, execution.Progress(enabled=False), apart=False)
        path = planned.directory.checkpoints / f"candidate_{conformance.STEPS:07d}.pt"
        weights = torch.load(path, weights_only=True)
        assert conformance.first_difference(bench.baseline.weights, weights) is None


def test_a_changed_copy_of_the_data_stays_changed() -> None:
    """Planning prepares the data, which must not restore labels that a check removed."""
    with closing(conformance.Bench(Sound)) as bench:
        data = bench.copy_of_data()
        labels = [case.truth for case in data.cases("inverted")]
        for label in labels:
            label.unlink()
        bench.train(dataset=data, steps=1)
        assert not any(label.exists() for label in labels)


def test_the_callers_world_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", "/somewhere")
    torch.manual_seed(7)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    conformance.run_checks(Sound, only=["resume", "variants_train"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert os.environ["GLUA_BENCH_CACHE"] == "/somewhere"
    assert not Path("/somewhere").exists()


class Aliased(Sound):
    """A sound method with a module under two names and a strided view as an attribute."""

    def extend(self, task: TaskInfo) -> None:
        self.first = self.stem
        self.column = torch.arange(6.0).reshape(3, 2)[:, 0]

    def stages(self) -> tuple[Stage, ...]:
        stem, *rest = super().stages()
        return (replace(stem, modules=("first",)), *rest)


def test_aliases_and_strided_tensors_are_no_fault() -> None:
    results = conformance.run_checks(Aliased, only=["stages", "trains"])
    assert [r.check for r in results if r.passed] == ["stages", "trains"], results


def test_pytest_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)  # an import of it fails now
    monkeypatch.setattr(glua_bench, "conformance", conformance)  # to be restored
    monkeypatch.delitem(sys.modules, "glua_bench.conformance")
    kit = importlib.import_module("glua_bench.conformance")
    assert kit is not conformance
    results = kit.run_checks("source_only", only=["card", "logits"])
    assert all(r.passed for r in results), results
    with pytest.raises(ImportError):
        kit.parametrize("source_only")


def test_plugin_files_and_unknown_names(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from glua_bench.methods.source_only import SourceOnly\n"
        "from glua_bench.method import Method\n\n\n"
        "class Mine(SourceOnly, Method):\n"
        '    """The baseline under another name.\n\n    An original.\n    """\n\n'
        '    name = "mine"\n    reference = "original"\n    needs = "nothing"\n'
    )
    seen: list[str] = []
    results = conformance.run_checks(
        "mine", [plugin], only=["card", "trains"], report=lambda r: seen.append(r.check)
    )
    assert [r.status for r in results] == ["passed", "passed"] and seen == ["card", "trains"]
    with pytest.raises(PluginError, match="No method is called 'mein'; did you mean 'mine'"):
        conformance.run_checks("mein", [plugin])
    with pytest.raises(PluginError, match="no check 'cart'"):
        conformance.run_checks("mine", [plugin], only=["cart"])
    with pytest.raises(PluginError, match="no check"):
        conformance.parametrize(Sound, only=["cart"])


def test_an_undecided_check_is_a_skipped_test_and_a_failed_one_fails() -> None:
    mark = conformance.parametrize(NotANumber, only=["trains", "resume"])
    trains, resume = (case.values[0] for case in mark.args[1])
    with pytest.raises(pytest.skip.Exception, match="'same_seed' did not pass"):
        resume()
    with pytest.raises(conformance.CheckFailure, match="loss 'loss' is nan"):
        trains()
    assert [case.id for case in mark.args[1]] == ["sound-trains", "sound-resume"]


def test_whole_numbers_shrink_within_their_ranges() -> None:
    assert conformance.small_settings(Sound, {})["channels"] == 3
    assert conformance.small_settings(Sound, {"channels": 9})["channels"] == 9


# -- the page for plugin authors ------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_code_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(names["results"]) == 3
    (mark,) = names["test_conformance"].pytestmark
    names["test_conformance"](mark.args[1][0].values[0])


def test_the_page_names_every_check() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in {*METHOD_CHECKS, *conformance.DATASET_CHECKS}:
        assert f"`{name}`" in page, name


def test_state_that_a_module_saves_by_itself_is_saved() -> None:
    """Only what no checkpoint holds is hidden state."""
    kept, plain = HostCount(), torch.nn.Module()
    for module in (kept, plain):
        module.value = 1
    assert unsaved_state(torch.nn.ModuleDict({"kept": kept, "plain": plain}), ()) == {
        "plain.value": 1
    }
