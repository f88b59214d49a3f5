"""The checks that every plugin must pass: many small named ones, for methods and for datasets.

A method is trained on a task of a few small volumes, through the functions that plan and build a
real run (`runs.plan_config`, `runs.build_run`), and one rule of the contract is checked at a time.
In a test of a plugin:

    from glua_bench import conformance

    @conformance.parametrize(MyMethod)
    def test_conformance(check):
        check()

and without pytest: `run_checks(MyMethod)`. docs/conformance.md lists the rules.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from glua_bench import runs
from glua_bench.cache import SliceCache
from glua_bench.config import (
    PRESETS,
    RunConfig,
    SegmenterSpec,
    build_settings,
    identity,
)
from glua_bench.console import Progress
from glua_bench.errors import ConfigError, DataError, PluginError
from glua_bench.formats import open_volume
from glua_bench.method import Batch, Context, Method, Role, Stage
from glua_bench.registry import Registry, describe_class
from glua_bench.task import SPLITS, Case, Dataset, Grid, Reading, Structure
from glua_bench.trainer import stage_order, to_channels_last
from glua_bench.volumes import read_label_volume

STEPS = 3  # the budget of a training: a first step, one in between, and a last one
BATCH = 2
SIZE = 32  # the smallest slices that the harness accepts
SEGMENTER = SegmenterSpec("unet", width=4, depth=3)
DOMAINS: tuple[Role, ...] = get_args(Role)
PRECISIONS = ("32-true", "bf16-mixed")  # in which every device can train
FLAT_STEPS = 20  # of each stage on slices without a picture: enough for gradients to run away
SMALL = 2  # what whole numbers of a method's settings shrink to, where their range allows it


# -- results --------------------------------------------------------------------------------------


class CheckFailure(AssertionError):
    """A plugin breaks the rule of a check; the message says how."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        subject: name of the method or dataset.
        check: name of the check.
        status: "passed", "failed", or "undecided" where a check that it needs failed.
        message: why it failed or is undecided; for a passed one, what did not apply.
        seconds: how long it took.
        error: the exception behind a failure.
    """

    subject: str
    check: str
    status: str
    message: str = ""
    seconds: float = 0.0
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the rule was checked and holds."""
        return self.status == "passed"


@dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        name: what results and test ids call it.
        rule: the rule in a sentence.
        needs: checks that must pass before this one can be decided.
        run: raises where the rule is broken; may return a remark.
    """

    name: str
    rule: str
    needs: tuple[str, ...]
    run: Callable[[Any], str | None]


METHOD_CHECKS: dict[str, Check] = {}
DATASET_CHECKS: dict[str, Check] = {}


def register(
    table: dict[str, Check], *needs: str
) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Add a function to a table of checks; its docstring is the rule.

    Args:
        table: `METHOD_CHECKS` or `DATASET_CHECKS`.
        needs: checks that must pass before this one can be decided.
    """

    def add(run: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        name = run.__name__.removeprefix("_dataset_").removeprefix("_")
        table[name] = Check(name, " ".join((run.__doc__ or "").split()), needs, run)
        return run

    return add


def demand(condition: bool, message: str) -> None:
    """Fail the check with a message unless a condition holds."""
    if not condition:
        raise CheckFailure(message)


@contextmanager
def explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a plugin raises into a failure of the check."""
    try:
        yield
    except CheckFailure:
        raise
    except Exception as error:  # a plugin may raise anything
        # What the trainer advises after it stopped a run is for users, not for authors.
        why = f"{type(error).__name__}: {error}".partition(", so the run was stopped")[0]
        raise CheckFailure(f"{what}: {why}" + (f" ({advice})" if advice else "")) from error


def select_checks(table: Mapping[str, Check], only: Iterable[str] | None) -> list[str]:
    """Names of checks; all of the table for None.

    Raises:
        PluginError: no check has one of the names.
    """
    wanted = list(table if only is None else only)
    for name in wanted:
        if name not in table:
            raise PluginError(f"There is no check '{name}'; known: {', '.join(table)}.")
    return wanted


class Checklist:
    """The checks of one plugin; each runs once.

    Args:
        table: `METHOD_CHECKS` or `DATASET_CHECKS`.
        subject: name of the method or dataset.
        material: what the checks are given: a `Bench` or the dataset.
    """

    def __init__(self, table: Mapping[str, Check], subject: str, material: Any) -> None:
        self.table, self.subject, self.material = table, subject, material
        self._results: dict[str, CheckResult] = {}

    def result(self, name: str) -> CheckResult:
        """Run a check, and first those that it needs."""
        if name not in self._results:
            began = time.perf_counter()
            status, message, error = self._outcome(self.table[name])
            seconds = time.perf_counter() - began
            self._results[name] = CheckResult(self.subject, name, status, message, seconds, error)
        return self._results[name]

    def run(
        self, only: Iterable[str] | None, report: Callable[[CheckResult], None]
    ) -> list[CheckResult]:
        """Run several checks, and report each result as soon as it is there."""
        results = []
        for name in select_checks(self.table, only):
            results.append(self.result(name))
            report(results[-1])
        return results

    def _outcome(self, check: Check) -> tuple[str, str, Exception | None]:
        unmet = next((need for need in check.needs if not self.result(need).passed), None)
        if unmet is not None:
            why = f"{self.subject}: '{check.name}' cannot be decided, as '{unmet}' did not pass"
            return "undecided", why, None
        try:
            return "passed", check.run(self.material) or "", None
        except CheckFailure as failure:
            return "failed", str(failure), failure
        except Exception as error:  # a plugin may raise anything
            return "failed", f"{type(error).__name__}: {error}", error


# -- the entry points -----------------------------------------------------------------------------


def run_checks(
    method: type[Method] | str,
    plugins: Sequence[Path] = (),
    config: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
    report: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run all checks of a method.

    Args:
        method: the class, or a registered name.
        plugins: plugin files in which a name may be found.
        config: settings that make the method small; what is not given comes from the preset
            "quick", with whole numbers shrunk towards the low end of their range.
        only: names of checks; None runs all of them.
        report: receives each result as soon as it is there.

    Returns:
        One result a check, in the order of `METHOD_CHECKS`.

    Raises:
        PluginError: no method has the name, or no check has one of the names.
    """
    with closing(Bench(_method_class(method, plugins), config)) as bench:
        return bench.checks.run(only, report)


def run_dataset_checks(
    dataset: Dataset | str,
    plugins: Sequence[Path] = (),
    data_root: Path | None = None,
    only: Iterable[str] | None = None,
    report: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run all checks of a dataset; its files must be there, or `prepare` makes them.

    Args:
        dataset: the dataset, or a registered name.
        plugins: plugin files in which a name may be found.
        data_root: where the files of a dataset given by name lie; None is its default.
        only: names of checks; None runs all of them.
        report: receives each result as soon as it is there.

    Raises:
        PluginError: no dataset has the name, or no check has one of the names.
    """
    found = runs.load_dataset(dataset, data_root, plugins) if isinstance(dataset, str) else dataset
    return Checklist(DATASET_CHECKS, found.name, found).run(only, report)


def parametrize(
    *methods: type[Method] | str,
    config: Mapping[str, Any] | Callable[[type[Method]], Mapping[str, Any]] | None = None,
    plugins: Sequence[Path] = (),
    only: Iterable[str] | None = None,
) -> Any:
    """A pytest decorator: one test for each method and check, given as the argument `check`.

    Args:
        methods: classes or registered names.
        config: as in `run_checks`, for all the methods; or a function that gives it for one.
        plugins: as in `run_checks`.
        only: names of checks; None takes all of them.

    Raises:
        PluginError: no check has one of the names.
    """
    import pytest  # the kit works without it

    names = select_checks(METHOD_CHECKS, only)
    cases = []
    for method in methods:
        label = method if isinstance(method, str) else getattr(method, "name", method.__name__)
        for name in names:
            run = functools.partial(_run_in_pytest, method, config, tuple(plugins), name)
            cases.append(pytest.param(run, id=f"{label}-{name}"))
    return pytest.mark.parametrize("check", cases)


def parametrize_dataset(only: Iterable[str] | None = None) -> Any:
    """A pytest decorator: one test for each check of a dataset, called as `check(dataset)`.

    Args:
        only: names of checks; None takes all of them.

    Raises:
        PluginError: no check has one of the names.
    """
    import pytest  # the kit works without it

    def run(name: str, dataset: Dataset) -> None:
        _raise(Checklist(DATASET_CHECKS, dataset.name, dataset).result(name))

    names = select_checks(DATASET_CHECKS, only)
    cases = [pytest.param(functools.partial(run, name), id=name) for name in names]
    return pytest.mark.parametrize("check", cases)


@functools.cache
def _shared_bench(method: type[Method], config: str) -> Bench:
    """The checks of one method share its trainings, also when each is a test of its own."""
    return Bench(method, json.loads(config))


def _run_in_pytest(
    method: type[Method] | str,
    config: Mapping[str, Any] | Callable[[type[Method]], Mapping[str, Any]] | None,
    plugins: tuple[Path, ...],
    name: str,
) -> None:
    found = _method_class(method, plugins)
    given = config(found) if callable(config) else config or {}
    _raise(_shared_bench(found, json.dumps(dict(given), sort_keys=True)).outcome(name))


def _raise(result: CheckResult) -> None:
    """Turn a result into what pytest understands."""
    if result.status == "undecided":
        import pytest

        pytest.skip(result.message)
    if result.status == "failed":
        raise CheckFailure(result.message) from result.error


def _method_class(method: type[Method] | str, plugins: Sequence[Path]) -> type[Method]:
    return Registry("method", plugins).load(method) if isinstance(method, str) else method


# -- the tiny task --------------------------------------------------------------------------------


class TinyDataset(Dataset):
    """A disc in a ring in a body, in a plain and in an inverted contrast; four volumes of each.

    Subjects differ in place, size and noise. One further blob has a value that counts as
    background, and the ring has two values, so that a class table is needed to read the labels.
    A value is kept for voxels that nobody annotated; no label has it.
    """

    name: ClassVar[str] = "conformance"
    reference: ClassVar[str] = "generated by glua_bench.conformance"
    needs: ClassVar[str] = "nothing"
    structures: ClassVar[tuple[Structure, ...]] = (
        Structure("DISC", "disc", (10,), "#e69f00"),
        Structure("RING", "ring", (20, 21), "#56b4e9"),
    )
    directions: ClassVar[tuple[str, ...]] = ("plain-inverted", "inverted-plain")
    reading: ClassVar[Reading] = Reading(ignored_values=(30,), unannotated_values=(40,))
    grids: ClassVar[Mapping[str, Grid]] = {preset: Grid(SIZE, 1.0) for preset in PRESETS}
    publishable: ClassVar[bool] = True

    @classmethod
    def default_root(cls) -> Path:
        """None: a directory is always given.

        Raises:
            DataError: always.
        """
        raise DataError("The conformance kit's dataset needs a directory: TinyDataset(root).")

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Write the volumes that are missing."""
        for number, case in enumerate(c for d in self.domains() for c in self.cases(d)):
            if case.image.is_file() and case.truth.is_file():
                continue
            image, label = _tiny_volume(np.random.default_rng(number), case.domain == "inverted")
            for path, voxels in ((case.truth, label), (case.image, image)):
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
            report(f"wrote {case.id}")

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Two training, one validation and one test case."""
        return tuple(
            Case(
                f"{domain}_{number}",
                domain,
                self.root / "images" / f"{domain}_{number}.nii.gz",
                self.root / "truth" / f"truth_of_{domain}_{number}.nii.gz",
                split,
                f"{domain} subject {number}",
            )
            for number, split in enumerate(("train", "train", "val", "test"))
        )


def _tiny_volume(rng: np.random.Generator, inverted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32) and raw labels (int16), (X, Y, Z)."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (34, 36, 4)), indexing="ij")
    left, front = rng.uniform(-0.2, 0.2, 2)
    radius = rng.uniform(0.35, 0.45) * (1 - 0.2 * z**2)
    distance = np.hypot(x - left, y - front)
    labels = np.zeros(x.shape, np.int16)
    labels[np.hypot(x - left - 0.5, y - front) < 0.2] = 30
    labels[distance < radius] = np.where(y > front, 20, 21)[distance < radius]
    labels[distance < 0.6 * radius] = 10
    body = x**2 + y**2 < 0.9
    image = np.where(body, 0.4, 0.0)
    for values, brightness in (((10,), 0.9), ((20, 21), 0.65), ((30,), 0.8)):
        image[np.isin(labels, values)] = brightness
    if inverted:
        image = np.where(body, 1.1 - image, 0.0)
    return (image + rng.normal(0, 0.03, x.shape)).astype(np.float32), labels


class _Spoiled(TinyDataset):
    """A copy whose files are changed or removed: `prepare` does not write them again."""

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Nothing."""


def rewrite_voxels(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the voxels of a NIfTI file by what a function makes of them, (X, Y, Z)."""
    image: Any = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.array(image.dataobj)), image.affine), path)


def poison_labels(dataset: Dataset, cases: Iterable[Case], seed: int = 0) -> None:
    """Overwrite label files with random values of the dataset's table.

    Args:
        dataset: gives the table.
        cases: whose label files; only ever those of a copy.
        seed: of the random values.
    """
    rng = np.random.default_rng(seed)

    def noise(values: Sequence[int], voxels: np.ndarray) -> np.ndarray:
        return rng.choice(np.array(values, np.int16), voxels.shape)

    for case in cases:
        view = dataset.view(case.domain)
        values = [0, *view.reading.ignored_values]
        values += [v for structure in view.structures for v in structure.values]
        if case.label is not None:
            rewrite_voxels(case.label, functools.partial(noise, values))


def flatten_slices(cases: Iterable[Case]) -> None:
    """Replace slices with ones that show no picture, and their labels with background.

    The first slice of each volume stays. The others become in turn, over all volumes: constant in
    the middle of the volume's intensities; empty, i.e. its minimum; half minimum and half maximum;
    and constant but for one pixel.

    Args:
        cases: whose files; only ever those of a copy. Their slices lie along the last axis.
    """
    kinds = itertools.cycle(("constant", "empty", "halves", "pixel"))

    def flat(voxels: np.ndarray) -> np.ndarray:
        low, high = voxels.min(), voxels.max()
        width, height, depth = voxels.shape
        for z, kind in zip(range(1, depth), kinds, strict=False):
            voxels[..., z] = low if kind in ("empty", "halves") else (low + high) / 2
            if kind == "halves":
                voxels[: width // 2, :, z] = high
            elif kind == "pixel":
                voxels[width // 2, height // 2, z] = high
        return voxels

    def background(voxels: np.ndarray) -> np.ndarray:
        voxels[..., 1:] = 0
        return voxels

    for case in cases:
        rewrite_voxels(case.image, flat)
        rewrite_voxels(case.truth, background)


# -- the bench ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a training as a killed process would: nobody may catch it on the way."""


@dataclass(frozen=True)
class Stop:
    """Where to end a training early.

    Attributes:
        stage: name of the stage.
        step: the step within it.
        after: end after the method's update of that step, not before it.
    """

    stage: str
    step: int
    after: bool = False


class Training:
    """One training of a method, watched at every step.

    It hooks into the trainer of a run by wrapping the steps and the optimizers of its stages.

    Args:
        built: the run.
        cache: the cache directory of the training.
        stop: where to end early; a checkpoint is then written after every step.
        inspect_step: called with the batch and the context of every step.
        even: give every stage the whole budget, whatever its share.

    Attributes:
        built: the run, with its trained method.
        cache: the cache directory of the training.
        initial: the method's `state_dict` before training.
        weights: its `state_dict` afterwards.
        calls: (stage, step) of every call of `step`, in order.
        problems: what the values returned by `step` did wrong.
        updates: (stage, parameter name) → number of optimizer updates.
        hidden: stage → after each of its steps, what the method holds elsewhere than in
            parameters and buffers.
        served: whether target images were served, at every step.
    """

    def __init__(
        self,
        built: runs.BuiltRun,
        cache: Path,
        stop: Stop | None = None,
        inspect_step: Callable[[Batch, Context], None] | None = None,
        even: bool = False,
    ) -> None:
        self.built, self.cache = built, cache
        self.initial = self.weights = copy_weights(built.method.state_dict())
        self.calls: list[tuple[str, int]] = []
        self.problems: list[str] = []
        self.updates: Counter[tuple[str, str]] = Counter()
        self.hidden: dict[str, list[dict[str, Any]]] = {}
        self.served: list[bool] = []
        self._stop, self._inspect, self._even = stop, inspect_step, even
        self._names: dict[str, list[str]] = {}
        built.trainer.stages = tuple(map(self._watched, built.trainer.stages))
        built.trainer.checkpoint_seconds = math.inf if stop is None else 0.0

    @property
    def method(self) -> Method:
        """The method; in eval mode once it is trained."""
        return self.built.method

    @property
    def reused(self) -> set[str]:
        """Stages taken from the cache."""
        return self.built.trainer.reused

    def fit(self) -> Training:
        """Train to the end, and return the training.

        Raises:
            Killed: the training reached `stop`.
        """
        with closing(self.built.planned.directory):
            self.built.fit()
        self.weights = copy_weights(self.method.state_dict())
        return self

    # Partials, as no closure may lead a step to the kit, which knows the labels; see `leaks`.

    def _watched(self, stage: Stage) -> Stage:
        update, make = stage.trained_by(self.method)
        return replace(
            stage,
            share=1.0 if self._even else stage.share,
            step=functools.partial(self._step, update),
            optimizers=functools.partial(self._optimizers, make, stage.name),
        )

    def _step(
        self,
        update: Callable[[Batch, Context], dict[str, Tensor]],
        batch: Batch,
        context: Context,
    ) -> dict[str, Tensor]:
        stop, stage = self._stop, context.stage.name
        stopping = stop is not None and (stop.stage, stop.step) == (stage, context.step)
        if stop is not None and stopping and not stop.after:
            raise Killed
        if self._inspect is not None:
            self._inspect(batch, context)
        self.calls.append((stage, context.step))
        self.served.append(batch.target_images is not None)
        values = self._sound(update(batch, context), stage)
        held = held_elsewhere(self.method, (Training,))
        self.hidden.setdefault(stage, []).append(held)
        if stopping:
            raise Killed
        return values

    def _sound(self, values: Any, stage: str) -> dict[str, Tensor]:
        """What the trainer can read of the values; the rest becomes a problem of its own."""
        if not isinstance(values, Mapping):
            self.problems.append(f"step returned a {type(values).__name__}, not a dictionary")
            return {}
        names = self._names.setdefault(stage, list(values))
        if sorted(names, key=str) != sorted(values, key=str):
            self.problems.append(
                f"step of stage '{stage}' returned {sorted(values, key=str)} after "
                f"{sorted(names, key=str)}; a stage must log the same names at every step"
            )
        sound = {}
        for name in names:
            value = values.get(name)
            if isinstance(value, Tensor) and value.ndim == 0:
                sound[name] = value
                continue
            if name in values:
                shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                kind = f"a {type(value).__name__}{shape}"
                self.problems.append(f"step logs '{name}' as {kind}, not as a scalar tensor")
            sound[name] = torch.zeros(())
        return sound

    def _optimizers(
        self, make: Callable[[], dict[str, Optimizer]], stage: str
    ) -> dict[str, Optimizer]:
        optimizers = make()
        # Not by torch's hooks of a step: those of a subclass that calls its parent's step run for
        # both, if anybody has made an optimizer of the parent's class before.
        for optimizer in optimizers.values():
            counted = functools.partial(self._update, stage, optimizer, optimizer.step)
            optimizer.step = counted  # type: ignore[method-assign]
        return optimizers

    def _update(
        self,
        stage: str,
        optimizer: Optimizer,
        update: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = update(*args, **kwargs)
        moved = {
            id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        }
        self.updates.update(
            (stage, name) for name, p in self.method.named_parameters() if id(p) in moved
        )
        return result


class Bench:
    """One method on the tiny task, with the trainings that its checks share.

    Args:
        method: the class.
        config: settings that make it small, over what `small_settings` chooses.
        slices: that the method sees at once.
    """

    def __init__(
        self, method: type[Method], config: Mapping[str, Any] | None = None, slices: int = 1
    ) -> None:
        self.method, self.slices = method, slices
        self.given = dict(config or {})
        self._folder = tempfile.TemporaryDirectory(prefix="glua-bench-conformance-")
        self._made = 0
        self.dataset = TinyDataset(Path(self._folder.name) / "data")
        self.dataset.prepare()
        # The name for results; the checks may find out that it has none.
        name = str(getattr(method, "name", method.__name__))
        self.checks = Checklist(METHOD_CHECKS, name, self)

    def outcome(self, name: str) -> CheckResult:
        """The result of a check, run once."""
        return self.checks.result(name)

    def close(self) -> None:
        """Remove the files; they go at the end of the process otherwise."""
        self._folder.cleanup()

    @property
    def target(self) -> str:
        """Name of the target domain of all trainings."""
        return self.dataset.directions[0].split("-")[1]

    def fresh(self, name: str) -> Path:
        """A directory that nobody used before."""
        self._made += 1
        path = Path(self._folder.name) / f"{self._made}-{name}"
        path.mkdir()
        return path

    def copy_of_data(self) -> TinyDataset:
        """The dataset on files of its own, to be spoiled."""
        root = self.fresh("data")
        shutil.copytree(self.dataset.root, root, dirs_exist_ok=True)
        return _Spoiled(root)

    def cache(self) -> Path:
        """A cache directory that holds the slices of the bench's data, and no stage."""
        path = self.fresh("cache")
        shutil.copytree(self._slices, path / "slices", copy_function=os.link)
        return path

    @functools.cached_property
    def _slices(self) -> Path:
        """The slices of the bench's data, read once."""
        path = self.fresh("cache")
        with quiet_machine(path):
            runs.stores(self.plan(), SliceCache(), Progress(enabled=False))
        return path / "slices"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that all trainings start from."""
        return small_settings(self.method, self.given)

    @functools.cached_property
    def baseline(self) -> Training:
        """The training with which others are compared."""
        return self.train()

    def config(
        self,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        steps: int = STEPS,
        options: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """A run on the tiny task, resolved as the command line resolves one.

        Args:
            settings: changes of the method's settings.
            seed: the run's seed.
            steps: the run's budget.
            options: changes of the run's own options, e.g. its precision.
        """
        request = self.request(seed, steps)
        config = runs.resolve(request, self.dataset, self.method)
        chosen = build_settings(self.method.Config, {**self.settings, **(settings or {})}, "method")
        return replace(
            config,
            method_config=asdict(chosen),
            segmenter=SEGMENTER,
            batch_size=BATCH,
            candidates=2,
            slices=self.slices,
            **(options or {}),
        )

    def request(self, seed: int, steps: int) -> runs.RunRequest:
        """What a user would ask for."""
        return runs.RunRequest(
            self.method.name,
            self.dataset.name,
            preset="quick",
            seed=seed,
            steps=steps,
            augmentation="photometric",
            runs_root=Path(self._folder.name) / "runs",
            device="cpu",
            mlflow=False,
        )

    def plan(
        self,
        dataset: Dataset | None = None,
        scored: bool = False,
        root: Path | None = None,
        **changes: Any,
    ) -> runs.PlannedRun:
        """A run that is ready to be executed.

        Args:
            dataset: another than the bench's own, e.g. a spoiled copy.
            scored: whether it is scored as well; label files of tests are read for that alone.
            root: the directory of its run directory; None takes an empty one.
            changes: arguments of `config`.
        """
        config = self.config(**changes)
        asked = self.request(config.seed, config.steps)
        asked = replace(asked, runs_root=root or self.fresh("runs"))
        return runs.plan_config(asked, config, dataset or self.dataset, self.method, scored=scored)

    def build(self, config: RunConfig | None = None) -> Method:
        """A method with the weights of the run's seed."""
        with quiet_machine():
            return runs.build_method(config or self.config(), self.dataset.structures, self.method)

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Random images, (N, S, H, W) in [-1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, self.slices, SIZE, SIZE, generator=generator) * 2 - 1

    def batch(self) -> Batch:
        """A batch as a step would see it."""
        labels = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.long)
        labels[:, 8:16, 8:16] = 1
        target = self.images(BATCH, 1) if self.method.uses_target else None
        return Batch(self.images(BATCH), labels, target)

    def train(
        self,
        settings: Mapping[str, Any] | None = None,
        dataset: Dataset | None = None,
        cache: Path | None = None,
        stop: Stop | None = None,
        inspect_step: Callable[[Batch, Context], None] | None = None,
        even: bool = False,
        **changes: Any,
    ) -> Training:
        """Train the method as `runs.execute` does, and watch every step.

        Args:
            settings: changes of the method's settings.
            dataset: another than the bench's own, e.g. a spoiled copy.
            cache: the cache directory; None takes one without stages.
            stop: as for `Training`.
            inspect_step: as for `Training`.
            even: as for `Training`.
            changes: further arguments of `plan`; a training whose `root` is that of an
                interrupted one goes on from its checkpoint.

        Raises:
            Killed: the training reached `stop`.
        """
        if cache is None:
            cache = self.cache() if dataset is None else self.fresh("cache")
        with quiet_machine(cache):
            planned = self.plan(dataset, settings=settings, **changes)
            planned.directory.start({}, planned.stages)
            fabric = runs.make_fabric(planned.request, planned.config)
            built = runs.build_run(planned, fabric, Progress(enabled=False))
            return Training(built, cache, stop, inspect_step, even).fit()


@contextmanager
def quiet_machine(cache: Path | None = None) -> Iterator[None]:
    """One thread, the caller's random state kept, and the cache elsewhere.

    Args:
        cache: what GLUA_BENCH_CACHE names meanwhile; None leaves it.
    """
    before, threads = os.environ.get("GLUA_BENCH_CACHE"), torch.get_num_threads()
    if cache is not None:
        os.environ["GLUA_BENCH_CACHE"] = str(cache)
    torch.set_num_threads(1)  # tiny networks are faster so
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        if cache is not None:
            os.environ.pop("GLUA_BENCH_CACHE")
            if before is not None:
                os.environ["GLUA_BENCH_CACHE"] = before


def small_settings(method: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with which a method trains in no time.

    The preset "quick", with every whole number brought down to `SMALL` or the low end of its
    declared range, and then what is given. Real numbers stay: what they mean is unknown.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    built = build_settings(method.Config, dict(method.presets.get("quick", {})), "method")
    values = asdict(built)
    for spec in fields(built):
        value, low = values[spec.name], spec.metadata.get("low")
        countable = isinstance(value, int) and not isinstance(value, bool)
        if countable and low is not None and spec.metadata.get("choices") is None:
            values[spec.name] = min(value, max(SMALL, math.ceil(low)))
    return asdict(build_settings(method.Config, {**values, **given}, "method"))


# -- comparing ------------------------------------------------------------------------------------


def first_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """The first name under which two sets of weights differ in any bit; None where none does."""
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b or not torch.equal(a[name], b[name]):
            return name
    return None


def copy_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that further training leaves alone."""
    return {name: value.detach().clone() for name, value in weights.items()}


def demand_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Fail the check where two sets of weights differ."""
    name = first_difference(a, b)
    demand(name is None, f"{what}: the weights differ, first in '{name}'")


def demand_other(a: Mapping[str, Tensor], b: Mapping[str, Tensor], message: str) -> None:
    """Fail the check where two sets of weights are the same."""
    demand(first_difference(a, b) is not None, message)


def demand_finite(value: Tensor, message: str) -> None:
    """Fail the check where a tensor holds NaN or an infinity."""
    demand(bool(torch.isfinite(value).all()), message)


@torch.no_grad()
def _predict(method: Method, images: Tensor, domain: Role = "target") -> Tensor:
    with quiet_machine():
        return method.eval().predict(images, domain)


# -- checks of a method ---------------------------------------------------------------------------

_SOURCE = re.compile(
    r"arxiv|doi|https?://|et al|\b(19|20)\d\d\b|baseline|reconstruction|original|lower bound", re.I
)


@register(METHOD_CHECKS)
def _card(bench: Bench) -> None:
    """Name, reference, needs and a docstring with its source, readable without an import."""
    return check_card(bench.method, Method)


def check_card(plugin: type, base: type) -> None:
    """Fail the check where the card of a method or dataset is incomplete."""
    literals = _literals(plugin)
    for name in ("name", "reference", "needs"):
        value = getattr(plugin, name, None)
        demand(
            isinstance(value, str) and bool(value.strip()) and "\n" not in value,
            f"the class attribute `{name}` is {value!r}; give it one line of text",
        )
        demand(
            literals is None or name in literals,
            f"`{name}` must stand as a plain text in the class itself, because "
            "`glua-bench list` reads it without importing the plugin",
        )
    demand(
        re.fullmatch(r"[a-z][a-z0-9_]*", plugin.name) is not None,  # type: ignore[attr-defined]
        f"the name {plugin.name!r} must be lower-case letters, digits and _",  # type: ignore[attr-defined]
    )
    text = plugin.__doc__ or ""
    demand(
        bool(text.strip()) and text != base.__doc__, "the class has no docstring: it is the card"
    )
    lines = inspect.cleandoc(text).splitlines()
    demand(
        lines[0].endswith(".") and len(lines[0]) <= 100 and (len(lines) == 1 or not lines[1]),
        "the docstring must begin with one line of at most 100 characters that ends in a period, "
        "and then an empty line",
    )
    if base is Method:
        demand(
            _SOURCE.search(text + plugin.reference) is not None,  # type: ignore[attr-defined]
            "neither the docstring nor `reference` says where the method comes from; cite a paper "
            "(authors and year, arXiv or doi), or say baseline, reconstruction or original",
        )


def _literals(plugin: type) -> set[str] | None:
    """Names of the plain class attributes in the source; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plugin)))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    return set(describe_class(node)[1]) if isinstance(node, ast.ClassDef) else set()


@register(METHOD_CHECKS)
def _settings(bench: Bench) -> None:
    """Every setting has a meaning, a range or choices, and a default inside them."""
    cls = bench.method.Config
    demand(
        is_dataclass(cls) and cls.__dataclass_params__.frozen,  # type: ignore[attr-defined]
        "`Config` must be a frozen dataclass",
    )
    for spec in fields(cls):
        default, meta = spec.default, spec.metadata
        demand(default is not MISSING, f"the setting '{spec.name}' has no default")
        demand(
            bool(meta.get("help")),
            f"the setting '{spec.name}' has no help; declare it with glua_bench.config.setting",
        )
        low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
        if isinstance(default, (bool, tuple)) or choices is not None:
            continue
        if isinstance(default, (int, float)):
            demand(
                low is not None and high is not None and low < high,
                f"the setting '{spec.name}' needs both ends of its range (low < high)",
            )
            for end in (low, high):
                build_settings(cls, {spec.name: end}, "method")
        elif isinstance(default, str):
            raise CheckFailure(f"the setting '{spec.name}' is a text and needs `choices`")
    build_settings(cls, {}, "method")


@register(METHOD_CHECKS, "settings")
def _round_trip(bench: Bench) -> None:
    """The settings and the run's configuration survive a dictionary, JSON and YAML."""
    cls = bench.method.Config
    for values in ({}, bench.method.presets.get("quick", {}), bench.settings):
        built = build_settings(cls, dict(values), "method")
        again = build_settings(cls, json.loads(json.dumps(asdict(built))), "method")
        demand(again == built, f"settings change on their way through JSON: {built} → {again}")
    config = bench.config()
    for again in (RunConfig.from_dict(config.to_dict()), RunConfig.from_yaml(config.to_yaml())):
        demand(again.to_dict() == config.to_dict(), "the run's configuration changes in YAML")
        demand(identity(again, "", "") == identity(config, "", ""), "the run's identity changes")


@register(METHOD_CHECKS, "settings")
def _presets(bench: Bench) -> None:
    """Every preset and, under each of them, every variant gives valid settings."""
    for preset in bench.method.presets:
        demand(preset in PRESETS, f"there is no preset '{preset}'; known: {', '.join(PRESETS)}")
    for preset in PRESETS:
        base = dict(bench.method.presets.get(preset, {}))
        for name, changes in {"": {}, **bench.method.variants()}.items():
            try:
                build_settings(bench.method.Config, {**base, **changes}, "method")
            except ConfigError as error:
                where = f"variant '{name}' under preset '{preset}'" if name else f"'{preset}'"
                raise CheckFailure(f"{where}: {error}") from error


@register(METHOD_CHECKS, "settings")
def _stages(bench: Bench) -> None:
    """Stages have different names, and depend on settings and modules that exist."""
    method = bench.build()
    stages = tuple(method.stages())
    demand(bool(stages), "stages() is empty")
    stage_order(stages)
    known = {spec.name for spec in fields(bench.method.Config)}
    for stage in stages:
        unknown = set(stage.depends_on or ()) - known
        demand(
            not unknown,
            f"stage '{stage.name}' depends on {sorted(unknown)}, which Config does not have",
        )
        for name in stage.modules:
            try:
                method.get_submodule(name)
            except AttributeError as error:
                raise CheckFailure(
                    f"stage '{stage.name}' keeps the module '{name}', which the method lacks"
                ) from error
        demand(
            stage.depends_on is None or bool(stage.modules),
            f"stage '{stage.name}' is shared (depends_on) but names no modules to keep",
        )
        demand(stage.share > 0, f"stage '{stage.name}' has the share {stage.share}")
        optimizers = stage.trained_by(method)[1]()
        demand(
            isinstance(optimizers, dict)
            and bool(optimizers)
            and all(isinstance(o, Optimizer) for o in optimizers.values()),
            f"optimizers() of stage '{stage.name}' must be a dictionary of optimizers",
        )


@register(METHOD_CHECKS, "stages")
def _optimizers(bench: Bench) -> None:
    """Every trainable weight is in one optimizer of some stage, and nothing else is."""
    method = bench.build()
    names = {id(p): name for name, p in method.named_parameters()}
    trained: set[int] = set()
    for stage in method.stages():
        owner: dict[int, str] = {}
        for key, optimizer in stage.trained_by(method)[1]().items():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = names.get(id(parameter))
                demand(
                    name is not None,
                    f"optimizer '{key}' of stage '{stage.name}' holds a weight that is not the "
                    "method's, so no checkpoint keeps it: make its network an attribute",
                )
                demand(
                    id(parameter) not in owner,
                    f"'{name}' is in the optimizers '{owner.get(id(parameter))}' and '{key}' of "
                    f"stage '{stage.name}', which would both move it",
                )
                owner[id(parameter)] = key
        trained |= owner.keys()
    for name, parameter in method.named_parameters():
        demand(
            id(parameter) in trained or not parameter.requires_grad,
            f"'{name}' is in no optimizer of any stage: give it to one, or say "
            "requires_grad_(False) where it is an average or fixed",
        )


@register(METHOD_CHECKS, "settings", "stages")
def _trains(bench: Bench) -> None:
    """Training goes through all stages with finite losses and finite weights."""
    for name, value in bench.baseline.weights.items():
        demand_finite(value, f"'{name}' is not finite after training")
    demand_other(bench.baseline.initial, bench.baseline.weights, "training changes no weight")


_FLAT_ADVICE = (
    "instance norm behind reflection padding multiplies gradients by 1/sqrt(eps) in every layer "
    "where a map is constant: build networks with glua_bench.networks.instance_norm, which passes "
    "no gradient there; and keep denominators, logarithms and roots away from 0"
)


@register(METHOD_CHECKS, "trains")
def _flat_slices(bench: Bench) -> None:
    """Constant, empty and two-valued slices give finite losses, weights and predictions."""
    data, cache = bench.copy_of_data(), bench.fresh("cache")
    for domain in data.domains():
        flatten_slices(data.split(domain, "train"))
    for precision in PRECISIONS:
        # Augmentation would move a border into the slices and add noise to them.
        options = {"precision": precision, "augmentation": "none"}
        where = f"with constant, empty and two-valued slices (precision {precision})"
        with explained(f"{where} it does not train", _FLAT_ADVICE):
            training = bench.train(
                steps=FLAT_STEPS, dataset=data, cache=cache, options=options, even=True
            )
        for name, value in training.weights.items():
            demand_finite(value, f"{where} '{name}' is not finite after training ({_FLAT_ADVICE})")
        slices = training.built.train
        images = torch.from_numpy(slices.images(range(len(slices))))
        for domain in DOMAINS:
            with quiet_machine():
                logits = training.built.predict(images, domain)
            what = f"{where} predictions of the {domain} are not finite ({_FLAT_ADVICE})"
            demand_finite(logits, what)


@register(METHOD_CHECKS, "trains")
def _logs(bench: Bench) -> None:
    """A step returns scalar tensors, under the same names at every step of a stage."""
    problems = bench.baseline.problems
    demand(not problems, "; ".join(dict.fromkeys(problems)))


@register(METHOD_CHECKS, "trains")
def _budget(bench: Bench) -> None:
    """Each stage gets its steps, the last one the budget, and the segmenter no more than that."""
    stages = tuple(bench.build().stages())
    demand(
        stages[-1].share == 1.0,
        f"the last stage has the share {stages[-1].share}, not 1.0: all segmenters of a "
        "comparison get the same number of updates",
    )
    found = Counter(stage for stage, _ in bench.baseline.calls)
    for stage in stages:
        demand(
            found[stage.name] == stage.steps(STEPS),
            f"stage '{stage.name}' made {found[stage.name]} steps, not {stage.steps(STEPS)}",
        )
    updates = bench.baseline.updates
    behind = _behind_predictions(bench.baseline.method, bench.images(1))
    for name in behind:
        count = sum(updates[stage.name, name] for stage in stages)
        demand(
            count <= STEPS,
            f"'{name}', which predictions depend on, was updated {count} times under a budget "
            f"of {STEPS}",
        )
    if behind:
        return
    # An average of trained weights predicts. Which ones it follows cannot be seen, so none may
    # have more updates than the budget.
    for (stage_name, name), count in updates.items():
        demand(
            stage_name != stages[-1].name or count <= STEPS,
            f"'{name}' was updated {count} times under a budget of {STEPS}, and predictions come "
            "from weights that no optimizer moves, such as its average",
        )


def _behind_predictions(method: Method, images: Tensor) -> list[str]:
    """Names of the trained parameters that predictions depend on."""
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    with torch.enable_grad(), quiet_machine():
        answers = [method.eval().predict(images, domain) for domain in DOMAINS]
        scalar = torch.stack([logits.float().square().sum() for logits in answers]).sum()
        if not named or not scalar.requires_grad:
            return []
        gradients = torch.autograd.grad(scalar, [p for _, p in named], allow_unused=True)
    return [name for (name, _), g in zip(named, gradients, strict=True) if g is not None]


@register(METHOD_CHECKS, "trains")
def _logits(bench: Bench) -> None:
    """predict gives finite float logits (N, K, H, W) of both domains, for one image as for many."""
    for count, domain in itertools.product((BATCH, 1, 5), DOMAINS):
        _sound_logits(bench, bench.baseline.method, count, domain)


def _sound_logits(bench: Bench, method: Method, count: int, domain: Role = "target") -> Tensor:
    """Predict random images, and demand sound logits."""
    logits = _predict(method, bench.images(count), domain)
    wanted = (count, len(bench.dataset.structures) + 1, SIZE, SIZE)
    demand(isinstance(logits, Tensor), f"predict returned a {type(logits).__name__}")
    demand(
        tuple(logits.shape) == wanted,
        f"predict of {count} images gives the shape {tuple(logits.shape)}, not {wanted}",
    )
    demand(logits.is_floating_point(), f"predict gives {logits.dtype}, not a float type")
    demand_finite(logits, "predict gives values that are not finite")
    return logits


@register(METHOD_CHECKS, "trains")
def _predict_is_pure(bench: Bench) -> None:
    """In eval mode predict draws no random numbers and changes no weight."""
    method, images = bench.baseline.method, bench.images(3)
    before = copy_weights(method.state_dict())
    for domain in DOMAINS:
        with quiet_machine():
            torch.manual_seed(1)
            first = _predict(method, images, domain)
            torch.manual_seed(2)
            second = _predict(method, images, domain)
        demand(torch.equal(first, second), "predict gives two answers for the same images")
    demand_same(before, method.state_dict(), "after predict")


@register(METHOD_CHECKS, "logits", "predict_is_pure")
def _features(bench: Bench) -> None:
    """features() gives finite maps, one for each image, that do not depend on the others."""
    method, images = bench.baseline.method, bench.images(3)
    for domain in DOMAINS:
        with torch.no_grad(), quiet_machine():
            maps = method.eval().features(images, domain)
            alone = method.features(images[:1], domain)
        demand(
            isinstance(maps, Tensor) and maps.ndim == 4 and len(maps) == 3,
            f"features are {tuple(getattr(maps, 'shape', ()))} for three images, not (3, D, h, w)",
        )
        demand_finite(maps, "features are not finite")
        demand(
            bool(torch.allclose(maps[:1].float(), alone.float(), rtol=1e-3, atol=1e-4)),
            "an image's features depend on the images beside it",
        )


@register(METHOD_CHECKS, "trains")
def _pictures(bench: Bench) -> str | None:
    """pictures gives finite images, of one slice or of as many as the method sees."""
    pictures = _sound_pictures(bench, bench.baseline.method)
    return None if pictures else "the method shows no pictures"


def _sound_pictures(bench: Bench, method: Method) -> dict[str, Tensor]:
    """Let a method show a batch, and demand sound pictures."""
    with quiet_machine():
        pictures = method.eval().pictures(bench.batch())
    for name, picture in pictures.items():
        shape = tuple(picture.shape)
        demand(
            len(shape) == 4
            and shape[0] > 0
            and shape[1] in (1, bench.slices)
            and shape[2:] == (SIZE, SIZE),
            f"the picture '{name}' has the shape {shape}, not (N, {bench.slices}, {SIZE}, {SIZE})",
        )
        demand_finite(picture, f"the picture '{name}' is not finite")
    return pictures


@register(METHOD_CHECKS, "trains", "logits", "pictures")
def _slices(bench: Bench) -> str | None:
    """With three slices in an image it trains, predicts and shows, and the neighbours count."""
    if bench.slices > 1:
        return "all checks see several slices"
    with closing(Bench(bench.method, bench.given, slices=3)) as stacked:
        with explained(
            "with three slices in an image it does not train",
            "build all networks that take or make images with task.slices channels",
        ):
            method = stacked.train(steps=1).method
            logits = _sound_logits(stacked, method, 2)
            _sound_pictures(stacked, method)
        images = stacked.images(2)
        images[:, [0, 2]] *= -1
        demand(
            not torch.equal(logits, _predict(method, images)),
            "predictions do not depend on the neighbours of a slice, so several slices would cost "
            "and change nothing: give its networks task.slices channels",
        )
    return None


@register(METHOD_CHECKS, "trains", "presets")
def _variants_train(bench: Bench) -> str | None:
    """Every declared variant trains a step."""
    variants = bench.method.variants()
    cache = bench.cache()  # one for all, so that a stage they share trains once
    for name, changes in variants.items():
        with explained(f"variant '{name}' does not train"):
            bench.train(changes, steps=1, cache=cache)
    return None if variants else "the method declares no variants"


@register(METHOD_CHECKS, "trains")
def _checkpoint(bench: Bench) -> None:
    """A method built anew that loads saved weights predicts the same, bit for bit."""
    trained, images = bench.baseline.method, bench.images(3)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    other = bench.build(bench.config(seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    to_channels_last(other)  # as the trainer does; rounding follows from it
    for domain in DOMAINS:
        demand(
            torch.equal(_predict(trained, images, domain), _predict(other, images, domain)),
            "predictions change when the weights are saved and loaded: what they depend on must "
            "be parameters or buffers",
        )


# Attributes that torch itself keeps in every module; state in parameters and buffers is saved.
_MODULE_ATTRIBUTES = set(vars(torch.nn.Module()))


@register(METHOD_CHECKS, "trains")
def _hidden_state(bench: Bench) -> None:
    """What a step leaves for the next one is parameters, buffers and optimizers' state."""
    for stage, held in bench.baseline.hidden.items():
        # What the first step makes may be a constant that is made once.
        for before, after in zip(held, held[1:], strict=False):
            changed = [n for n in {**before, **after} if before.get(n) != after.get(n)]
            demand(
                not changed,
                f"'{changed[0] if changed else ''}' changes from step to step of stage '{stage}' "
                "and is in no checkpoint: keep it as a buffer (pools, counters, averages), or "
                "derive it from context.step",
            )


def held_elsewhere(method: Method, leave: tuple[type, ...]) -> dict[str, Any]:
    """What a method holds elsewhere than in parameters and buffers, name → comparable value.

    Args:
        method: is searched.
        leave: types of objects to pass over, besides modules.
    """
    held: dict[str, Any] = {}
    for module_name, module in method.named_modules():
        roots = {k: v for k, v in vars(module).items() if k not in _MODULE_ATTRIBUTES}
        for way, value in reachable(roots, (torch.nn.Module, *leave)):
            name = f"{module_name}.{way}".lstrip(".")
            if isinstance(value, Tensor):
                held[name] = hashlib.sha256(
                    value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                    if value.ndim
                    else str(value.item()).encode()
                ).hexdigest()
            elif isinstance(value, np.ndarray):
                held[name] = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            elif isinstance(value, (str, bytes, int, float, complex)):
                held[name] = value
    return held


@register(METHOD_CHECKS, "trains")
def _same_seed(bench: Bench) -> None:
    """The same seed gives the same weights, bit for bit."""
    demand_same(
        bench.baseline.weights,
        bench.train().weights,
        "two trainings with one seed (draw random numbers from torch only, which the harness "
        "seeds at every step)",
    )


@register(METHOD_CHECKS, "same_seed")
def _other_seed(bench: Bench) -> None:
    """Another seed gives other weights, before training and after it."""
    other = bench.train(seed=1)
    trainable = {name for name, _ in bench.baseline.method.named_parameters()}
    for what, a, b in (
        ("before", bench.baseline.initial, other.initial),
        ("after", bench.baseline.weights, other.weights),
    ):
        demand_other(
            {name: a[name] for name in trainable},
            {name: b[name] for name in trainable},
            f"two seeds give the same weights {what} training",
        )


@register(METHOD_CHECKS, "same_seed")
def _resume(bench: Bench) -> None:
    """A training that is interrupted again and again ends in the weights of one that is not."""
    stages = tuple(bench.build().stages())
    stops = []
    for index, stage in enumerate(stages):
        total = stage.steps(STEPS)
        # Step 0 of a later stage is the boundary. "After the last step" dies between a stage's
        # last update and its end, so that this update is done anew.
        steps = sorted({0 if index else 1, total // 2, total - 1})
        stops += [Stop(stage.name, step) for step in steps if step < total]
        stops.append(Stop(stage.name, total - 1, after=True))
    cache, root = bench.cache(), bench.fresh("runs")
    for stop in stops:
        try:
            bench.train(cache=cache, root=root, stop=stop)
        except Killed:
            continue
        raise CheckFailure(f"step {stop.step} of stage '{stop.stage}' was never reached")
    resumed = bench.train(cache=cache, root=root)
    where = ", ".join(f"{stop.stage} {stop.step}" for stop in stops)
    demand_same(
        bench.baseline.weights,
        resumed.weights,
        f"after interruptions at {where} (what a step depends on must be weights, buffers or "
        "optimizer states, or follow from context.step)",
    )


@register(METHOD_CHECKS, "same_seed")
def _shared_stages(bench: Bench) -> str | None:
    """A run that takes a finished stage from the cache ends as the run that trained it."""
    shared = _shared(bench)
    if not shared:
        return "no stage is shared"
    again = bench.train(cache=bench.baseline.cache)
    demand(
        again.reused == set(shared),
        f"a second run reused the stages {sorted(again.reused)}, not {sorted(shared)}",
    )
    demand_same(
        bench.baseline.weights,
        again.weights,
        f"a run that reuses {', '.join(shared)} (`modules` must name all that a stage trains)",
    )
    return None


@register(METHOD_CHECKS, "shared_stages")
def _stage_dependencies(bench: Bench) -> str | None:
    """The result of a shared stage depends on no setting but those that it names."""
    shared = _shared(bench)
    if not shared:
        return "no stage is shared"
    named = {name for stage in shared.values() for name in stage.depends_on or ()}
    changes = {
        spec.name: _another(bench.settings[spec.name], spec.metadata)
        for spec in fields(bench.method.Config)
        if spec.name not in named and spec.name not in bench.given
    }
    stages = [stage.name for stage in bench.build().stages()]
    after = max(map(stages.index, shared)) + 1
    stop = Stop(stages[after], 0) if after < len(stages) else None
    cache = bench.cache()
    with suppress(Killed):
        bench.train(changes, cache=cache, stop=stop)
    for path in sorted((bench.baseline.cache / "stages").glob("*.pt")):
        other = cache / "stages" / path.name
        demand(other.is_file(), f"{path.name} was not found again under other settings")
        a, b = (torch.load(file, weights_only=True) for file in (path, other))
        for module in a:
            demand_same(
                a[module],
                b[module],
                f"'{module}' of the stage {path.stem.rsplit('-', 1)[0]} changes with one of the "
                f"settings {', '.join(changes)}, which `depends_on` does not name",
            )
    return None


def _shared(bench: Bench) -> dict[str, Stage]:
    return {s.name: s for s in bench.build().stages() if s.depends_on is not None}


def _another(value: Any, meta: Mapping[str, Any]) -> Any:
    """Another allowed value, near the given one."""
    if isinstance(value, bool):
        return not value
    if meta.get("choices") is not None:
        return next((choice for choice in meta["choices"] if choice != value), value)
    low, high = meta.get("low"), meta.get("high")
    if isinstance(value, int):
        return value + 1 if high is None or value + 1 <= high else max(low or 0, value - 1)
    if isinstance(value, float):
        more = value * 1.25 if value else 0.01
        return more if high is None or more <= high else value * 0.8
    return value


@register(METHOD_CHECKS, "same_seed")
def _label_poison(bench: Bench) -> None:
    """Random values in every target label file, and the weights are the same, bit for bit."""
    data = bench.copy_of_data()
    poison_labels(data, data.cases(bench.target))
    demand_same(
        bench.baseline.weights,
        bench.train(dataset=data).weights,
        "with random target labels (the method reads target labels)",
    )


@register(METHOD_CHECKS, "same_seed")
def _labels_absent(bench: Bench) -> None:
    """Training works, and ends the same, where the target has no label files."""
    data = bench.copy_of_data()
    for case in data.cases(bench.target):
        case.truth.unlink()
    with explained("without target label files training stops"):
        weights = bench.train(dataset=data).weights
    demand_same(bench.baseline.weights, weights, "without target label files")


@register(METHOD_CHECKS, "trains")
def _no_way_to_labels(bench: Bench) -> None:
    """Nothing that a step is given leads to a target label or to the name of its file."""
    cases = bench.dataset.cases(bench.target)
    names = {case.truth.name for case in cases}
    cache = bench.fresh("cache")
    slices = set()
    with quiet_machine(cache):
        for case in cases:
            view = bench.dataset.view(case.domain).on(bench.dataset.grid("quick"))
            entry = SliceCache().label(case, view)
            names.add(entry.path.stem)
            slices |= {plane_digest(plane) for plane in entry.open() if plane.any()}
    found: list[str] = []

    def look(batch: Batch, context: Context) -> None:
        if context.step == 0:
            found.extend(
                ways_to_labels({"batch": batch, "context": context}, names, slices, (Training,))
            )

    bench.train(steps=1, inspect_step=look)
    demand(not found, f"a target label can be reached: {'; '.join(found[:3])}")


def plane_digest(plane: np.ndarray) -> str:
    """Digest of a slice of labels, (H, W)."""
    return hashlib.sha256(np.ascontiguousarray(plane, np.uint8).tobytes()).hexdigest()


def ways_to_labels(
    roots: Mapping[str, Any], names: set[str], slices: set[str], leave: tuple[type, ...]
) -> Iterator[str]:
    """Ways from objects to label files' names, or to the labels themselves.

    Args:
        roots: name → object to start from.
        names: parts of the label files' names.
        slices: digests of slices of labels.
        leave: types of objects to pass over.
    """
    for way, value in reachable(roots, leave):
        if isinstance(value, Dataset):
            yield f"{way} is the dataset"
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, (str, os.PathLike)):
            text = str(value)
            if any(name in text for name in names):
                yield f"{way} = {text}"
            continue
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else None
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim > 1:
            planes = value.reshape(-1, *value.shape[-2:])
            if any(plane_digest(plane) in slices for plane in planes):
                yield f"{way} holds a target label"


def reachable(
    roots: Mapping[str, Any], leave: tuple[type, ...], limit: int = 50_000
) -> Iterator[tuple[str, Any]]:
    """Everything that attributes, items, bound methods and closures lead to, near things first.

    Modules, classes and a function's globals are left out: through them everything can be
    reached from everywhere.

    Args:
        roots: name → object to start from.
        leave: types of objects to pass over, e.g. of what stands between trainer and method and
            knows the labels.
        limit: number of objects to look at.
    """
    left_out: tuple[type, ...] = (type, types.ModuleType, type(None), *leave)
    waiting = deque(roots.items())
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is given out twice
    while waiting and len(seen) < limit:
        way, value = waiting.popleft()
        if id(value) in seen or isinstance(value, left_out):
            continue
        seen[id(value)] = value
        yield way, value
        if isinstance(value, (str, bytes, int, float, complex, np.ndarray, Tensor)):
            continue
        waiting.extend((f"{way}{step}", child) for step, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield f"[{key!r}]", item
            yield ".key", key
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for index, item in enumerate(list(value)):
            yield f"[{index}]", item
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    if isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    if isinstance(value, types.FunctionType):
        yield from ((".defaults", value.__defaults__), (".defaults", value.__kwdefaults__))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f".<{name}>", cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
    for name, item in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


@register(METHOD_CHECKS, "trains")
def _target_served(bench: Bench) -> None:
    """Target images are served exactly where `uses_target` asks for them."""
    wanted = bench.method.uses_target
    demand(
        all(served == wanted for served in bench.baseline.served),
        f"uses_target is {wanted}, but target images were {'not ' if wanted else ''}served",
    )


@register(METHOD_CHECKS, "same_seed")
def _target_matters(bench: Bench) -> str | None:
    """A method that declares `uses_target` ends elsewhere with other target images."""
    if not bench.method.uses_target:
        return "the method does not use the target"
    data = bench.copy_of_data()
    for case in data.split(bench.target, "train"):
        rewrite_voxels(case.image, np.flipud)
    demand_other(
        bench.baseline.weights,
        bench.train(dataset=data).weights,
        "mirrored target images change no weight: set `uses_target = False`, or use them",
    )
    return None


@register(METHOD_CHECKS, "same_seed")
def _source_labels_matter(bench: Bench) -> None:
    """Random source labels change the weights; otherwise the label checks would prove nothing."""
    data = bench.copy_of_data()
    source = bench.config().source
    poison_labels(data, data.cases(source))
    demand_other(
        bench.baseline.weights,
        bench.train(dataset=data).weights,
        "random source labels change no weight",
    )


@register(METHOD_CHECKS, "source_labels_matter")
def _unannotated(bench: Bench) -> None:
    """Source pixels that nobody annotated are trained on as no class, background included."""
    source, last = bench.config().source, bench.dataset.structures[-1].values[0]

    def trained(value: int) -> dict[str, Tensor]:
        """Weights after a training on labels of which one half has a value."""

        def half(voxels: np.ndarray) -> np.ndarray:
            voxels[: len(voxels) // 2] = value
            return voxels

        data = bench.copy_of_data()
        for case in data.split(source, "train"):
            rewrite_voxels(case.truth, half)
        return bench.train(dataset=data).weights

    with explained("with labels that hold task.UNANNOTATED it does not train", _UNANNOTATED_ADVICE):
        unknown = trained(bench.dataset.reading.unannotated_values[0])
    for name, value in (("background", 0), ("the last structure", last)):
        what = f"pixels that nobody annotated count as {name} ({_UNANNOTATED_ADVICE})"
        demand_other(unknown, trained(value), what)


_UNANNOTATED_ADVICE = (
    "take losses of glua_bench.losses, or leave pixels whose label is task.UNANNOTATED out of "
    "every sum and mean of your own; losses.annotated tells them"
)


@register(METHOD_CHECKS, "trains", "logs", "logits")
def _whole_run(bench: Bench) -> None:
    """A run trains, selects, evaluates and is done; the same run again does nothing."""
    with quiet_machine(bench.fresh("cache")):
        planned = bench.plan(scored=True)
        runs.execute(planned, Progress(enabled=False))
        rows = planned.directory.read_cases()
        again = runs.execute(planned, Progress(enabled=False))
    tests = bench.dataset.split(planned.config.target, "test")
    # A selector that can judge no checkpoint is left out; the first one always can.
    wanted = len(tests) * len(bench.dataset.structures)
    for selector in {planned.config.selectors[0], *rows["selector"]}:
        found = int((rows["selector"] == selector).sum())
        demand(found == wanted, f"the run has {found} rows of '{selector}', not {wanted}")
    demand(again.already_done, "the same run was executed twice")


# -- checks of a dataset --------------------------------------------------------------------------


@register(DATASET_CHECKS)
def _dataset_card(dataset: Dataset) -> None:
    """Name, reference, needs and a docstring, readable without an import."""
    check_card(type(dataset), Dataset)


@register(DATASET_CHECKS)
def _dataset_structures(dataset: Dataset) -> None:
    """Structures have names, values and colours of their own."""
    demand(bool(dataset.structures), "the dataset has no structures")
    for domain in dataset.domains():
        view = dataset.view(domain)
        _check_structures(view.structures, view.reading)
        same = [
            [(s.name, s.title, s.color) for s in structures]
            for structures in (dataset.structures, view.structures)
        ]
        demand(same[0] == same[1], f"domain '{domain}' has other structures than the dataset")


def _check_structures(structures: Sequence[Structure], reading: Reading) -> None:
    demand(
        all(re.fullmatch(r"#[0-9a-fA-F]{6}", s.color) for s in structures),
        "a colour is not of the form #rrggbb",
    )
    demand(all(s.values for s in structures), "a structure has no values")
    for what, values in (
        ("name", [s.name for s in structures]),
        ("title", [s.title for s in structures]),
        ("colour", [s.color.lower() for s in structures]),
        (
            "label value (ignored and unannotated ones and 0 for background included)",
            [v for s in structures for v in s.values]
            + [*reading.ignored_values, *reading.unannotated_values, 0],
        ),
    ):
        twice = [value for value, count in Counter(values).items() if count > 1]
        demand(not twice, f"the {what} {twice[:1]} occurs twice")


@register(DATASET_CHECKS)
def _dataset_grids(dataset: Dataset) -> None:
    """Every preset has a grid that its segmenter can work on."""
    for preset, values in PRESETS.items():
        grid = dataset.grid(preset)
        factor = 2 ** (values["segmenter"]["depth"] - 1)
        demand(
            grid.size >= 32 and grid.size % factor == 0,
            f"the grid of '{preset}' has the size {grid.size}; give at least 32, and a multiple "
            f"of {factor}",
        )
        demand(
            grid.spacing > 0 and (grid.slice_spacing is None or grid.slice_spacing > 0),
            f"the grid of '{preset}' has no positive spacing",
        )


@register(DATASET_CHECKS)
def _dataset_prepare(dataset: Dataset) -> None:
    """prepare makes the files ready; done again it changes none of them."""
    dataset.prepare()
    before = _snapshot(dataset.root)
    dataset.prepare()
    changed = {path for path, _ in before ^ _snapshot(dataset.root)}
    demand(not changed, f"a second prepare changed {sorted(changed)[:1]}")


def _snapshot(root: Path) -> set[tuple[str, tuple[int, int]]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {(str(path), (path.stat().st_size, path.stat().st_mtime_ns)) for path in files}


@register(DATASET_CHECKS, "prepare")
def _dataset_splits(dataset: Dataset) -> None:
    """Both domains of a direction have cases, each once and in one split, sorted by id."""
    demand(bool(dataset.directions), "the dataset has no direction")
    for direction in dataset.directions:
        parts = direction.split("-")
        demand(
            len(parts) == 2 and parts[0] != parts[1],
            f"the direction '{direction}' is not of the form source-target",
        )
        runs_needs = ((parts[0], "train"), (parts[1], "train"), (parts[1], "test"))
        for domain, split in runs_needs:
            demand(bool(dataset.split(domain, split)), f"'{domain}' has no case in '{split}'")
    ids: list[str] = []
    files: set[tuple[Path, str]] = set()
    for domain in dataset.domains():
        cases = dataset.cases(domain)
        own = [case.id for case in cases]
        demand(own == sorted(own), f"the cases of '{domain}' are not sorted by id")
        for case in cases:
            demand(case.domain == domain, f"case {case.id} of '{domain}' says '{case.domain}'")
            demand(case.split in SPLITS, f"case {case.id} has the split '{case.split}'")
            demand(
                case.label is not None or case.split == "train",
                f"case {case.id} of the split '{case.split}' has no label",
            )
        ids += own
        # One label may serve several sequences of a person.
        files |= {(case.image, case.id) for case in cases}
        files |= {(case.label, case.subject) for case in cases if case.label}
    demand(len(set(ids)) == len(ids), "two cases have the same id")
    demand(len({file for file, _ in files}) == len(files), "two cases share a file")


@register(DATASET_CHECKS, "splits")
def _dataset_subjects(dataset: Dataset) -> None:
    """No subject is in two splits, nor on both sides of a direction."""
    for domain in dataset.domains():
        splits: dict[str, str] = {}
        for case in dataset.cases(domain):
            other = splits.setdefault(case.subject, case.split)
            demand(
                other == case.split,
                f"subject {case.subject} of '{domain}' is in '{other}' and in '{case.split}'",
            )
    for direction in dataset.directions:
        source, target = (
            {case.subject for split in splits for case in dataset.split(domain, split)}
            for domain, splits in zip(
                direction.split("-"), (("train", "val"), ("train", "test")), strict=True
            )
        )
        both = sorted(source & target)
        demand(not both, f"subject {both[:1]} is on both sides of {direction}")


@register(DATASET_CHECKS, "splits")
def _dataset_files(dataset: Dataset) -> None:
    """Image and label of every case have one shape, and only values of the table."""
    for case in (case for domain in dataset.domains() for case in dataset.cases(domain)):
        if case.label is None:
            continue
        image, label = open_volume(case.image), open_volume(case.label)
        demand(
            image.shape == label.shape,
            f"image and label of {case.id} have the shapes {image.shape} and {label.shape}",
        )
        try:
            read_label_volume(case.label, case.image, dataset.view(case.domain))
        except DataError as error:
            raise CheckFailure(f"the label of {case.id} cannot be used: {error}") from error


@register(DATASET_CHECKS, "structures", "files")
def _dataset_slices(dataset: Dataset) -> None:
    """On the working grid images are finite in [-1, 1], and every structure shows."""
    grid = dataset.grid("quick")
    with tempfile.TemporaryDirectory(prefix="glua-bench-conformance-") as folder:
        cache = SliceCache(Path(folder))
        for domain in dataset.domains():
            shown: set[int] = set()
            view = dataset.view(domain).on(grid)
            for case in dataset.split(domain, "train"):
                image = cache.image(case.unlabelled(), view)
                voxels = image.open()
                demand(
                    bool(np.isfinite(voxels).all()) and float(np.abs(voxels).max()) <= 1,
                    f"the image of {case.id} leaves [-1, 1]",
                )
                demand(float(np.ptp(voxels)) > 0, f"the image of {case.id} is empty")
                if case.label is None:
                    continue
                labels = cache.label(case, view)
                shown |= set(np.unique(labels.open()).tolist())
            if not dataset.labelled(domain, "train"):
                continue
            missing = [s.name for i, s in enumerate(dataset.structures, 1) if i not in shown]
            demand(not missing, f"no training case of '{domain}' shows {', '.join(missing)}")
