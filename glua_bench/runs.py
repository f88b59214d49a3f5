"""From a request to a finished run: resolve it, train, select, evaluate, record, mirror."""

from __future__ import annotations

import inspect
import math
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glua_bench import carried, tracking
from glua_bench import config as configuration
from glua_bench.batches import Batches
from glua_bench.cache import ImageStore, LabelledStore, SliceCache, cache_root, fingerprint
from glua_bench.config import (
    ORACLE,
    RunConfig,
    SegmenterSpec,
    build_settings,
    changed_settings,
    digest,
    identity,
    variant_name,
)
from glua_bench.console import Progress
from glua_bench.errors import ConfigError, PluginError, RunFailure, UserError
from glua_bench.evaluation import evaluate, mean_score, summarise
from glua_bench.identity import code_version, stage_key
from glua_bench.method import Batch, Cases, Method, Role, Stage, TaskInfo
from glua_bench.neighbours import Neighbourhood, common_distance, middle
from glua_bench.networks import DEEPLAB_STRIDE
from glua_bench.paths import name_fault
from glua_bench.registry import Registry, load_dataset
from glua_bench.request import RunRequest
from glua_bench.selection import ROLES, Candidate, Samples, Selector, choose, sample_pixels
from glua_bench.task import (
    Case,
    Dataset,
    Grid,
    Structure,
    UnlabelledCase,
    parse_direction,
    role_fault,
)
from glua_bench.trainer import Artefact, Trainer, stage_order
from glua_bench.volumes import slice_distance


@dataclass(frozen=True)
class Fingerprints:
    """Digests of the files that play each role."""

    train: str  # labelled source images, and target images without labels
    test: str  # everything that is scored or selected on

    @property
    def whole(self) -> str:
        """One digest for all roles."""
        return digest([self.train, self.test], 16)


@dataclass
class PlannedRun:
    """A run that is ready to be executed."""

    config: RunConfig
    id: str
    directory: tracking.RunDirectory
    dataset: Dataset
    method_class: type[Method]
    stages: list[tuple[str, int]]
    fingerprints: Fingerprints
    code: str
    request: RunRequest


@dataclass
class Summary:
    """What `execute` reports."""

    already_done: bool
    seconds: float
    table: pd.DataFrame
    warnings: list[str]


# -- resolving ---------------------------------------------------------------------------------


def default_preset() -> str:
    """ "standard" where there is a CUDA device, else "quick"."""
    return "standard" if torch.cuda.is_available() else "quick"


def resolve(request: RunRequest, dataset: Dataset, method_class: type[Method]) -> RunConfig:
    """The complete configuration: preset, then options, then `--set`.

    Raises:
        ConfigError: an unknown or impossible option.
    """
    preset = request.preset or default_preset()
    if preset not in configuration.PRESETS:
        raise ConfigError(
            f"There is no preset '{preset}'; use --preset with one of "
            f"{', '.join(configuration.PRESETS)}."
        )
    values = dict(configuration.PRESETS[preset])
    groups = configuration.parse_overrides(request.assignments)
    direction = "-".join(parse_direction(dataset, request.direction))
    segmenter = {**values.pop("segmenter"), **groups["segmenter"]}
    method_values = {**method_class.presets.get(preset, {}), **groups["method"]}
    method_config = build_settings(method_class.Config, method_values, "method")
    options = {
        "steps": request.steps,
        "augmentation": request.augmentation,
        "precision": request.precision,
    }
    values.update({name: value for name, value in options.items() if value is not None})
    settable = {
        "perturbation",
        "steps",
        "batch_size",
        "augmentation",
        "candidates",
        "precision",
        "slices",
        "slice_distance",
    }
    for name, value in groups["run"].items():
        if name not in settable:
            raise ConfigError(
                f"--set {name} is not a run option; settable are {', '.join(sorted(settable))}, "
                "and method.NAME, segmenter.NAME, grid.NAME."
            )
        values[name] = value
    grid = build_settings(Grid, {**asdict(dataset.grid(preset)), **groups["grid"]}, "grid")
    try:
        return RunConfig(
            method=method_class.name,
            dataset=dataset.name,
            direction=direction,
            grid=grid,
            method_config=asdict(method_config),
            segmenter=build_settings(SegmenterSpec, segmenter, "segmenter"),
            scenario=request.scenario,
            preset=preset,
            fold=dataset.fold,
            seed=request.seed,
            **values,
        )
    except TypeError as error:
        raise ConfigError(f"An option has the wrong type ({error}); check --set.") from error


def check_request(config: RunConfig, method_class: type[Method]) -> None:
    """Refuse what the method cannot serve, before anything is trained.

    Raises:
        ConfigError: the scenario or the grid does not fit.
    """
    if config.privileged and method_class.uses_target:
        raise ConfigError(
            f"--scenario supervised serves target labels as source, so it needs a method without "
            f"adaptation; '{config.method}' adapts: use --method source_only."
        )
    if config.segmenter.name == "unet":
        factor = 2 ** (config.segmenter.depth - 1)
        if config.grid.size % factor:
            raise ConfigError(
                f"grid.size = {config.grid.size} is not divisible by {factor}, which a U-Net of "
                f"depth {config.segmenter.depth} needs; change grid.size or segmenter.depth."
            )
    if config.segmenter.name.startswith("deeplab") and config.grid.size % DEEPLAB_STRIDE:
        raise ConfigError(
            f"grid.size = {config.grid.size} is not divisible by {DEEPLAB_STRIDE}, the stride of "
            f"segmenter.name = '{config.segmenter.name}'; change grid.size or choose another "
            "segmenter."
        )
    if config.grid.size % 4 or config.grid.size < 32:
        raise ConfigError(f"grid.size = {config.grid.size} must be at least 32 and divisible by 4.")


def check_contract(method_class: type[Method]) -> None:
    """Refuse a method whose functions cannot be called as the harness calls them.

    Python would say so by a TypeError in the middle of a training; e.g. `predict` once had no
    domain.

    Raises:
        PluginError: a function does not take what it is given.
    """
    for name in ("stages", "optimizers", "step", "predict", "features", "pictures", "check"):
        given = list(inspect.signature(getattr(Method, name)).parameters)
        own = inspect.signature(getattr(method_class, name))
        try:
            own.bind(*given)
        except TypeError as error:
            raise PluginError(
                f"Method '{method_class.name}' defines {name}({', '.join(own.parameters)}), which "
                f"glua-bench calls as {name}({', '.join(given)}); change its definition to that."
            ) from error


def build_method(
    config: RunConfig, structures: tuple[Structure, ...], method_class: type[Method]
) -> Method:
    """Build a method with weights initialised from the run's seed.

    Args:
        config: of the run.
        structures: the dataset's classes.
        method_class: the method.

    Raises:
        PluginError: its functions have other arguments than the contract says.
        ConfigError: it declines a setting, or two of its stages share a name.
    """
    check_contract(method_class)
    torch.manual_seed(config.seed)
    settings = build_settings(method_class.Config, config.method_config, "method")
    task = TaskInfo(
        config.dataset,
        structures,
        config.grid.size,
        config.segmenter,
        config.batch_size,
        config.slices,
    )
    method = method_class(task, settings)
    stage_order(tuple(method.stages()))
    if config.perturbation:
        perturb(method, config.perturbation)
    return method


@torch.no_grad()
def perturb(module: nn.Module, draw: int) -> None:
    """Move every weight to the next float above or below it, by chance.

    Threads, processors and versions of libraries change last bits as much, and nobody controls
    them: how far a result moves between draws is how far it moves between machines. Zeros stay,
    since their neighbours are denormal and slow.

    Args:
        module: changed in place; the global random state is not.
        draw: seed of the directions.
    """
    generator = torch.Generator().manual_seed(draw)
    for weight in module.parameters():
        up = torch.rand(weight.shape, generator=generator).to(weight.device) < 0.5
        moved = torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf).to(weight))
        weight.copy_(torch.where(weight == 0, weight, moved))


def check_batch(config: RunConfig, method: Method, devices: int) -> None:
    """Refuse to normalise over a batch of one image.

    Raises:
        ConfigError: a process would see one image, and the method has batch normalisation.
    """
    if config.batch_size > devices:
        return
    for name, module in method.named_modules():
        if isinstance(module, _BatchNorm):
            raise ConfigError(
                f"batch_size = {config.batch_size} with --devices {devices} leaves one image a "
                f"process, and '{config.method}' has batch normalisation (at {name}), which needs "
                "several; "
                f"set batch_size to {2 * devices} or more"
                + (
                    ", or segmenter.name=unet."
                    if config.segmenter.name != "unet" and name.startswith("segmenter.")
                    else "."
                )
            )


@torch.no_grad()
def check_slices(config: RunConfig, method: Method) -> None:
    """Refuse several slices where a method's networks are not made for them.

    Raises:
        ConfigError: it cannot predict a stack of slices, or not translate it.
    """
    if config.slices == 1:
        return
    size = config.grid.size
    images = torch.zeros(1, config.slices, size, size)
    wanted = {"predict": (1, method.task.classes, size, size), "translate": tuple(images.shape)}
    calls: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("predict", lambda stack: method.predict(stack, "target"))
    ]
    calls += [("translate", s.translate) for s in method.stages() if s.translate is not None]
    for name, call in calls:
        try:
            with torch.random.fork_rng(devices=[]):
                method.eval()
                shape = tuple(call(images).shape)
            reason = f"gives the shape {shape}" if shape != wanted[name] else ""
        except Exception as error:  # a plugin may raise anything
            reason = f"raises {type(error).__name__}"
        finally:
            method.train()
        if reason:
            raise ConfigError(
                f"slices = {config.slices}: method '{config.method}' is not made for images of "
                f"several slices ({name} {reason}); build its networks with task.slices channels, "
                "or leave slices out."
            )


def with_slice_distance(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with the distance of neighbouring slices in mm, if it has several slices.

    It is the one that was asked for, or that of the working grid's slices; or, where volumes keep
    their own, `common_distance` of the training volumes of both domains, by their headers. All
    methods and scenarios of a comparison come to the same.

    Raises:
        ConfigError: slices that follow each other in the dataset's files are no neighbours.
        DataError: a file cannot be read.
    """
    if config.slices == 1:
        return config
    if not dataset.neighbouring_slices:
        raise ConfigError(
            f"slices = {config.slices} needs volumes, and dataset '{dataset.name}' trains on "
            "slices that are not neighbours; leave slices out."
        )
    distance = config.slice_distance or config.grid.slice_spacing
    if distance is None:
        distance = common_distance(
            [
                slice_distance(case.image, dataset.view(domain).reading)
                for case in dataset.split(domain, "train")
            ]
            for domain in (config.source, config.target)
        )
    return replace(config, slice_distance=float(distance))


def roles(config: RunConfig, dataset: Dataset) -> dict[str, Sequence[Case | UnlabelledCase]]:
    """Which cases play which role.

    Target cases are handed to training as `UnlabelledCase`s. Under the supervised scenario
    the labelled target-train cases play the source, and nothing else of the target is trained
    on.

    Raises:
        ConfigError: a role has no cases, or an id cannot name a file.
    """
    labelled = config.target if config.privileged else config.source
    chosen: dict[str, Sequence[Case | UnlabelledCase]] = {
        "source_train": dataset.labelled(labelled, "train"),
        "source_val": dataset.labelled(labelled, "val"),
        "target_train": [c.unlabelled() for c in dataset.split(config.target, "train")],
        "test": dataset.split(config.target, "test"),
    }
    bare = set(dataset.split(config.target, "test")) - set(dataset.labelled(config.target, "test"))
    if bare:
        raise ConfigError(
            f"Test case {min(case.id for case in bare)} of dataset '{dataset.name}' has no label, "
            "so it cannot be scored: give its label file, or put it into another split."
        )
    fault = role_fault(dataset, config.direction, config.privileged)
    if fault:
        raise ConfigError(fault)
    for case in dataset.split(config.target, "test"):
        fault = name_fault(case.id)
        if fault:
            raise ConfigError(
                f"The id '{case.id}' in dataset '{dataset.name}' {fault}, so it cannot name the "
                "file of its prediction: give the case another."
            )
    trained = {
        c.subject for c in [*chosen["source_train"], *chosen["source_val"]] if isinstance(c, Case)
    }
    tested = {c.subject for c in chosen["test"] if isinstance(c, Case)}
    if trained & tested:
        raise ConfigError(
            f"Subject {sorted(trained & tested)[0]} of dataset '{dataset.name}' is in training "
            "and in test; give every subject to one split only."
        )
    return chosen


def adjusted(
    config: RunConfig,
    method: Method,
    chosen: Mapping[str, Sequence[Case | UnlabelledCase]],
    report: Callable[[str], None] = lambda line: None,
) -> RunConfig:
    """The configuration with the settings that a method fits to its data, each told in a line.

    Args:
        config: of the run.
        method: built from it.
        chosen: the cases of each role, as from `roles`.
        report: receives the lines.

    Raises:
        ConfigError: the method declines the data.
    """
    cases = Cases(len(chosen["source_train"]), len(chosen["target_train"]))
    changes = method.check(cases) or {}  # a check that only declines returns nothing
    for name, change in changes.items():
        asked = config.method_config[name]
        report(f"method.{name} is {change.value} instead of {asked}: {change.reason}.")
    values = {name: change.value for name, change in changes.items()}
    return replace(config, method_config={**config.method_config, **values})


def plan(request: RunRequest, report: Callable[[str], None] = lambda line: None) -> PlannedRun:
    """Resolve a request, make the data ready, and compute the run's identity.

    Args:
        request: what the user asks for.
        report: receives lines about the data's preparation.

    Raises:
        UserError: anything in the request cannot be used.
    """
    method_class: type[Method] = Registry("method", request.plugins).load(request.method)
    dataset = load_dataset(request.dataset, request.data_root, request.plugins, request.fold)
    config = resolve(request, dataset, method_class)
    return plan_config(request, config, dataset, method_class, report)


def plan_config(
    request: RunRequest,
    config: RunConfig,
    dataset: Dataset,
    method_class: type[Method],
    report: Callable[[str], None] = lambda line: None,
    scored: bool = True,
) -> PlannedRun:
    """Plan the run of a resolved configuration on a given dataset and method.

    Args:
        request: where and on which devices it runs.
        config: as from `resolve`.
        dataset: is prepared.
        method_class: the method.
        report: receives lines about the data's preparation.
        scored: False plans a training alone: files that are only scored or selected on are left
            out of the identity, so that labels of test cases need not exist.

    Raises:
        UserError: the configuration, the dataset and the method do not fit each other.
    """
    check_request(config, method_class)
    method = build_method(config, dataset.structures, method_class)
    check_batch(config, method, request.devices)
    check_slices(config, method)
    dataset.prepare(report)
    chosen = roles(config, dataset)
    config = with_slice_distance(config, dataset)
    fitted = adjusted(config, method, chosen, report)
    if fitted != config:
        config, method = fitted, build_method(fitted, dataset.structures, method_class)
    views = [dataset.view(domain) for domain in (config.source, config.target)]
    prints = Fingerprints(
        train=digest(
            [
                fingerprint(chosen["source_train"]),
                fingerprint(chosen["target_train"]),
                [view.reading.identity() for view in views],
                [[asdict(structure) for structure in view.structures] for view in views],
            ],
            16,
        ),
        test=digest([fingerprint(chosen[role]) for role in ("source_val", "test") if scored], 16),
    )
    code = code_version(method_class, scoring=True)
    run_id = identity(config, prints.whole, code)
    return PlannedRun(
        config,
        run_id,
        tracking.RunDirectory(request.runs_root, config, run_id),
        dataset,
        method_class,
        [(s.name, s.steps(config.steps)) for s in method.stages()],
        prints,
        code,
        request,
    )


# -- executing ---------------------------------------------------------------------------------


def choose_device(name: str) -> str:
    """ "cuda" or "cpu" for "auto", "cuda" or "cpu".

    Raises:
        ConfigError: the name is another, or the device is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name} is unknown; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; use --device cpu.")
    return name


def make_fabric(request: RunRequest, config: RunConfig) -> Fabric:
    """Devices and precision.

    Raises:
        ConfigError: the device is not there.
    """
    accelerator = choose_device(request.device)
    if accelerator == "cuda" and request.devices > torch.cuda.device_count():
        raise ConfigError(
            f"--devices {request.devices}: this machine has {torch.cuda.device_count()}; ask for "
            "fewer."
        )
    if config.precision == "16-mixed" and accelerator == "cpu":
        raise ConfigError("--precision 16-mixed needs a GPU; use bf16-mixed or 32-true.")
    if config.batch_size % request.devices:
        raise ConfigError(
            f"batch_size = {config.batch_size} is not divisible by --devices {request.devices}."
        )
    torch.backends.cudnn.deterministic = True  # same seed, same weights; costs little here
    return Fabric(
        accelerator=accelerator,
        devices=request.devices,
        strategy="ddp" if request.devices > 1 else "auto",
        precision=config.precision,  # type: ignore[arg-type]
        # A run starts its own processes, in a job of SLURM as well, where Fabric expects srun's.
        plugins=[LightningEnvironment()],
    )


def artefacts(planned: PlannedRun, method: Method) -> Callable[[Stage], Artefact | None]:
    """Stage → where its result is shared: a file named by all that the result depends on."""
    config = planned.config

    def locate(stage: Stage) -> Artefact | None:
        if stage.depends_on is None:
            return None
        key = digest(
            {
                **stage_key(method, stage),
                "settings": {n: config.method_config[n] for n in sorted(stage.depends_on)},
                "steps": stage.steps(config.steps),
                "augmented": config.augmentation != "none",
                "photometric": stage.photometric and config.augmentation == "photometric",
                "grid": asdict(config.grid),
                "slices": [config.slices, config.slice_distance],
                # First weights are drawn one network after the other, so those of the stage
                # follow from the size of the segmenter before it.
                "segmenter": asdict(config.segmenter),
                "batch_size": config.batch_size,
                "precision": config.precision,
                "devices": planned.request.devices,
                "seed": config.seed,
                "perturbation": config.perturbation,
                "data": planned.fingerprints.train,
            },
            20,
        )
        return Artefact(cache_root() / "stages" / f"{stage.name}-{key}.pt")

    return locate


def stores(
    planned: PlannedRun, cache: SliceCache, progress: Progress
) -> tuple[LabelledStore, LabelledStore | None, ImageStore | None]:
    """Source training, source validation and target training slices.

    The target's store is made of `UnlabelledCase`s, so no label file of the target is opened.
    """
    config, dataset = planned.config, planned.dataset
    chosen, neighbourhood = roles(config, dataset), Neighbourhood.of(config)
    total = sum(len(chosen[role]) for role in ("source_train", "source_val", "target_train"))
    progress.stage("read data", total)
    done = 0

    def labelled(cases: Sequence[Case | UnlabelledCase]) -> LabelledStore:
        nonlocal done
        images, labels = [], []
        for case in cases:
            assert isinstance(case, Case)
            view = dataset.view(case.domain).on(config.grid)
            images.append(cache.image(case.unlabelled(), view))
            labels.append(cache.label(case, view))
            done += 1
            progress.update(done)
        return LabelledStore(images, labels, neighbourhood=neighbourhood)

    train = labelled(chosen["source_train"])
    val = labelled(chosen["source_val"]) if chosen["source_val"] else None
    target = None
    if planned.method_class.uses_target:
        images = []
        for case in chosen["target_train"]:
            assert isinstance(case, UnlabelledCase)
            images.append(cache.image(case, dataset.view(case.domain).on(config.grid)))
            done += 1
            progress.update(done)
        target = ImageStore(images, neighbourhood=neighbourhood)
    return train, val, target


class Stopped(Exception):
    """A watcher ended the run early: it is neither done nor failed, and may be resumed."""


@dataclass(frozen=True)
class Watch:
    """Looks at the candidates of a run while it trains.

    Attributes:
        selector: whose score is computed.
        see: called with the candidate's step and its score; may raise `Stopped`.
    """

    selector: str
    see: Callable[[int, float], None]


Draw = Callable[[tracking.RunDirectory, Dataset, pd.DataFrame, Batch, dict[str, Tensor]], None]


def execute(
    planned: PlannedRun, progress: Progress, draw: Draw | None = None, watch: Watch | None = None
) -> Summary:
    """Train or resume, select, evaluate, record and mirror one run.

    Args:
        planned: from `plan`.
        progress: what the user sees.
        draw: makes the run's figures of its directory, dataset, rows of the primary selector,
            a batch of images, and the method's own pictures; None draws nothing.
        watch: sees the candidates while the run trains; None lets nobody see them.

    Raises:
        UserError: something given cannot be used.
        RunFailure: training stopped; the run is marked as failed.
        Stopped: `watch` ended it.
    """
    directory = planned.directory
    if directory.done:
        return _done_before(planned)
    root, mirrored = planned.request.runs_root, planned.request.mlflow
    tracker = tracking.open_tracker(root) if mirrored else None  # before hours of training
    fabric = make_fabric(planned.request, planned.config)
    fabric.launch()
    if not fabric.is_global_zero:
        _train(planned, fabric, Progress(enabled=False))
        return Summary(False, 0.0, pd.DataFrame(), [])
    began = time.perf_counter()
    with directory.lock():
        if directory.done:  # another process finished it while this one waited
            return _done_before(planned)
        directory.start(
            {
                **tracking.environment(),
                "run": planned.id,
                "code": planned.code,
                "data": asdict(planned.fingerprints),
                "privileged": planned.config.privileged,
                "distances": planned.dataset.distance_note,
                "protocol": planned.dataset.protocol,
                "device": str(fabric.device),
                # Said now, since a later version may have other defaults, or lack the method.
                "changed": changed_settings(planned.config, planned.method_class),
                "variant": variant_name(planned.config, planned.method_class),
            },
            planned.stages,
        )
        try:
            _carry(planned)
            cases = _train_and_score(planned, fabric, progress, began, draw, watch)
        except Stopped:
            raise
        except (UserError, RunFailure) as error:
            directory.fail(str(error))
            raise
        except Exception as error:  # a plugin may raise anything
            directory.fail(f"{type(error).__name__}: {error}")
            raise
    warnings = []
    if tracker is not None and not tracker.mirror(directory):
        warnings.append("the tracker lacks this run; send it with `glua-bench sync`")
    return Summary(False, time.perf_counter() - began, summarise(cases), warnings)


def _carry(planned: PlannedRun) -> None:
    """Keep what others need of the dataset, with intensities of the images that are trained on."""
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    images = [*chosen["source_train"], *chosen["target_train"]]
    facts = carried.facts_of(dataset, (config.source, config.target), images)
    carried.write(planned.directory.path, facts, dataset.carried())


def _done_before(planned: PlannedRun) -> Summary:
    cases = planned.directory.read_cases()
    if planned.request.oracle and ORACLE not in set(cases["selector"]):
        raise ConfigError(
            f"{planned.directory.path} was finished without --oracle, and its other checkpoints "
            "are deleted; give another --runs directory to train it again with --oracle."
        )
    return Summary(True, 0.0, summarise(cases), [])


def estimate(planned: PlannedRun, probe: int = 6) -> float:
    """Seconds that training would take, from a few steps of every stage on the real data.

    Args:
        planned: from `plan`.
        probe: step budget of the trial.
    """
    config = replace(planned.config, steps=probe)
    fabric = make_fabric(planned.request, config)
    with tempfile.TemporaryDirectory() as scratch:
        directory = tracking.RunDirectory(Path(scratch), config, planned.id)
        trial = replace(planned, config=config, directory=directory)
        directory.start({})
        with closing(directory):
            built = build_run(trial, fabric, Progress(enabled=False))
            trainer = built.trainer
            trainer.artefact = lambda stage: None  # the cache is for stages of real runs
            known = artefacts(planned, built.method)
            missing = [
                stage
                for stage in trainer.stages
                if (artefact := known(stage)) is None or not artefact.path.is_file()
            ]
            built.fit()
    return sum(
        trainer.seconds[stage.name] / stage.steps(probe) * stage.steps(planned.config.steps)
        for stage in missing
    )


@dataclass(frozen=True)
class BuiltRun:
    """A planned run with its data, its method, and the trainer that trains the one on the other.

    Attributes:
        planned: what is built.
        trainer: has the method and the batches. Hooks go here before `fit`: its `stages` may be
            replaced by watched copies, and it has a `watch` of its candidates.
        train: labelled source slices.
        val: labelled source slices that are not trained on, if there are any.
        target: unlabelled target slices, if the method uses them.
    """

    planned: PlannedRun
    trainer: Trainer
    train: LabelledStore
    val: LabelledStore | None
    target: ImageStore | None

    @property
    def method(self) -> Method:
        """The method that is trained."""
        return self.trainer.method

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.trainer.fabric.device

    def fit(self) -> None:
        """Train all stages, from the last checkpoint where there is one; see `Trainer.fit`."""
        try:
            self.trainer.fit()
        finally:
            self.trainer.batches.close()

    def load(self, step: int) -> None:
        """Give the method the weights of a candidate."""
        path = self.trainer.candidate_path(step)
        weights = torch.load(path, map_location=self.device, weights_only=True)
        self.method.load_state_dict(weights)
        self.method.eval()

    @torch.no_grad()
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Logits under the run's precision."""
        with self.trainer.fabric.autocast():
            return self.method.predict(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def features(self, images: Tensor, domain: Role) -> Tensor:
        """The method's features under the run's precision."""
        with self.trainer.fabric.autocast():
            return self.method.features(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def translate(self, images: Tensor) -> Tensor:
        """What the last stage makes of source images."""
        last = self.trainer.stages[-1]
        return images if last.translate is None else last.translate(images)


def build_run(planned: PlannedRun, fabric: Fabric, progress: Progress) -> BuiltRun:
    """Read the data of a planned run, build its method, and connect both to a trainer.

    Args:
        planned: from `plan`.
        fabric: from `make_fabric`.
        progress: what the user sees.
    """
    config = planned.config
    train, val, target = stores(planned, SliceCache(), progress)
    method = build_method(config, planned.dataset.structures, planned.method_class)
    batches = Batches(
        train,
        target,
        config.batch_size,
        config.seed,
        fabric.device,
        fabric.global_rank,
        fabric.world_size,
    )
    trainer = Trainer(
        method,
        config,
        batches,
        fabric,
        planned.directory,
        progress,
        artefacts(planned, method),
    )
    return BuiltRun(planned, trainer, train, val, target)


def _train(
    planned: PlannedRun, fabric: Fabric, progress: Progress, watch: Watch | None = None
) -> BuiltRun:
    built = build_run(planned, fabric, progress)
    if watch is not None:
        built.trainer.watch = partial(_show, built, watch)
    built.fit()
    return built


def _show(built: BuiltRun, watch: Watch, step: int) -> None:
    """Score the candidate whose weights the method has, and tell the watcher."""
    selector: Selector = Registry("selector", built.planned.request.plugins).load(watch.selector)()
    samples = _samples(built) if selector.uses_samples else {}
    watch.see(step, _score(built, selector, step, samples, {}))


def _train_and_score(
    planned: PlannedRun,
    fabric: Fabric,
    progress: Progress,
    began: float,
    draw: Draw | None,
    watch: Watch | None,
) -> pd.DataFrame:
    config, dataset, directory = planned.config, planned.dataset, planned.directory
    built = _train(planned, fabric, progress, watch)
    trainer = built.trainer
    predict = partial(built.predict, domain="target")
    scores = _selector_scores(built)
    chosen = {name: choose(by_step) for name, by_step in scores.items()}
    primary = config.selectors[0]
    test = list(dataset.split(config.target, "test"))
    frames: dict[int, pd.DataFrame] = {}

    def evaluated(step: int, name: str) -> pd.DataFrame:
        """Rows of a candidate; the primary selector's predictions are kept."""
        if step not in frames:
            built.load(step)
            frames[step] = evaluate(
                predict,
                dataset,
                test,
                config.grid,
                SliceCache(),
                fabric.device,
                progress,
                directory.predictions if name == primary else None,
                f"evaluate {name}",
                Neighbourhood.of(config),
            )
        return frames[step]

    for name, step in chosen.items():
        evaluated(step, name)
    if planned.request.oracle:
        scores[ORACLE] = {
            step: mean_score(evaluated(step, f"step {step}")) for step in trainer.candidate_steps()
        }
        chosen[ORACLE] = choose(scores[ORACLE])
    rows = pd.concat(
        [frames[step].assign(selector=name, step=step) for name, step in chosen.items()],
        ignore_index=True,
    )
    rows.insert(0, "run", planned.id)
    rows = rows.assign(
        privileged_selection=rows["selector"] == ORACLE,
        method=config.method,
        dataset=config.fold_name,
        direction=config.direction,
        scenario=config.scenario,
        seed=config.seed,
        augmentation=config.augmentation,
    )
    directory.write_cases(rows)
    if draw is not None:
        built.load(chosen[primary])
        batch, pictures = _pictures(built)
        draw(directory, dataset, rows[rows["selector"] == primary], batch, pictures)
    keep = set(chosen.values())
    for step in trainer.candidate_steps():
        if step not in keep:
            trainer.candidate_path(step).unlink(missing_ok=True)
    mean = summarise(rows)
    directory.finish(
        {
            "run": planned.id,
            "seconds": time.perf_counter() - began,
            "stage_seconds": trainer.seconds,
            "reused_stages": sorted(trainer.reused),
            "steps": dict(planned.stages),
            "peak_memory_mib": _peak_memory(built.device),
            "selector_scores": {n: {str(s): v for s, v in b.items()} for n, b in scores.items()},
            "chosen_steps": chosen,
            "privileged": config.privileged,
            "protocol": dataset.protocol,
            "scores": mean.to_dict("records"),
        }
    )
    trainer.last_path.unlink(missing_ok=True)  # a finished run does not go on from it
    return rows


def _selector_scores(built: BuiltRun) -> dict[str, dict[int, float]]:
    """Selector → candidate step → score."""
    names = built.planned.config.selectors
    registry = Registry("selector", built.planned.request.plugins)
    selectors: dict[str, Selector] = {name: registry.load(name)() for name in names}
    steps = built.trainer.candidate_steps()
    samples: dict[int, dict[str, Samples]] = {step: {} for step in steps}
    if any(selector.uses_samples for selector in selectors.values()):
        for step in steps:
            built.load(step)
            samples[step] = _samples(built)
    trajectory = {s: own["target_train"] for s, own in samples.items() if "target_train" in own}
    scores: dict[str, dict[int, float]] = {name: {} for name in selectors}
    for step in steps:
        built.load(step)
        for name, selector in selectors.items():
            scores[name][step] = _score(built, selector, step, samples[step], trajectory)
    # A selector that can judge no candidate (e.g. without target images) selects nothing.
    return {
        name: by_step
        for name, by_step in scores.items()
        if name == names[0] or not all(map(math.isnan, by_step.values()))
    }


def _domain(role: str) -> Role:
    """Whose images the slices of a role are, e.g. "source" of "source_val"."""
    return "target" if role.startswith("target") else "source"


def _samples(built: BuiltRun) -> dict[str, Samples]:
    """Role → pixels of its slices, as the method answers them with the weights that it has."""
    torch.manual_seed(built.planned.config.seed)  # styles drawn alike for every candidate
    return {
        role: sample_pixels(
            partial(built.predict, domain=_domain(role)),
            partial(built.features, domain=_domain(role)),
            store,
            built.translate if _domain(role) == "source" else lambda images: images,
            built.device,
        )
        for role, store in zip(ROLES, (built.train, built.val, built.target), strict=True)
        if store is not None
    }


def _score(
    built: BuiltRun,
    selector: Selector,
    step: int,
    samples: Mapping[str, Samples],
    trajectory: Mapping[int, Samples],
) -> float:
    """What a selector says of the weights that the method has."""
    torch.manual_seed(built.planned.config.seed)
    return selector.score(
        Candidate(
            step,
            built.predict,
            built.method.task.classes,
            built.val,
            built.translate,
            built.target,
            built.device,
            samples,
            trajectory,
        )
    )


def _peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _pictures(built: BuiltRun, count: int = 6) -> tuple[Batch, dict[str, Tensor]]:
    """Slices spread over the training ones, and what the method shows of them, (N, 1, H, W)."""

    def spread(store: ImageStore) -> np.ndarray:
        # The outermost slices of a volume show little, so the middle of each share is taken.
        return ((np.arange(count) + 0.5) * len(store) / count).astype(np.int64)

    device, train, target = built.device, built.train, built.target
    source = spread(train)
    batch = Batch(
        torch.from_numpy(train.images(source)).to(device),
        torch.from_numpy(train.labels(source)).to(device),
        None if target is None else torch.from_numpy(target.images(spread(target))).to(device),
    )
    torch.manual_seed(built.planned.config.seed)
    pictures = built.method.pictures(batch)
    shown = replace(
        batch,
        source_images=middle(batch.source_images),
        target_images=None if batch.target_images is None else middle(batch.target_images),
    )
    return shown, {name: middle(p).detach().float().cpu() for name, p in pictures.items()}
