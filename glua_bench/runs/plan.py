"""Plan a run: resolve its configuration, check it, and compute its id."""

from __future__ import annotations

import inspect
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glua_bench.config import (
    DEFAULT_SELECTORS,
    ORACLE,
    PRESETS,
    SELECTORS,
    UPPER,
    RunConfig,
    SegmenterSpec,
    build_settings,
    parse_overrides,
    preset_values,
    setting_names,
)
from glua_bench.data.cache import fingerprint
from glua_bench.data.neighbours import common_distance
from glua_bench.data.volumes import slice_distance
from glua_bench.errors import ConfigError, PluginError, death
from glua_bench.identity import DATA_DIGITS, code_version, digest, identity
from glua_bench.method import Cases, Method, TaskInfo
from glua_bench.networks import DEEPLAB_STRIDE
from glua_bench.paths import name_fault
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry, load_dataset
from glua_bench.runs.request import RunRequest
from glua_bench.runs.trainer import stage_order
from glua_bench.task import (
    Case,
    Dataset,
    Grid,
    Structure,
    UnlabelledCase,
    check_channels,
    common_channels,
    parse_direction,
    role_fault,
)

LOST_SECONDS = 2.0  # until the loss of another process of a run is noticed
LOST_CODE = 128 + 9  # exit code of a run that lost a process, which can be resumed


@dataclass(frozen=True)
class Fingerprints:
    """Digests of the files that a run uses.

    Attributes:
        train: labelled source images, and target images without labels.
        test: all files that are scored or selected on.
    """

    train: str
    test: str


@dataclass
class PlannedRun:
    """A run that is ready for `execute`.

    Attributes:
        config: its complete configuration.
        id: its identity.
        directory: its run directory.
        dataset: the prepared dataset.
        method_class: the method.
        stages: name and steps of each stage.
        fingerprints: digests of its files.
        code: version and digest of its code.
        request: the user's request.
    """

    config: RunConfig
    id: str
    directory: RunDirectory
    dataset: Dataset
    method_class: type[Method]
    stages: list[tuple[str, int]]
    fingerprints: Fingerprints
    code: str
    request: RunRequest

    def build(self) -> Method:
        """Build the method with its initial weights; see `build_method`."""
        channels = common_channels(self.dataset, self.config.direction)
        return build_method(self.config, self.dataset.structures, self.method_class, channels)


def default_preset() -> str:
    """Return "standard" if there is a CUDA device, else "quick"."""
    return "standard" if torch.cuda.is_available() else "quick"


def resolve(request: RunRequest, dataset: Dataset, method_class: type[Method]) -> RunConfig:
    """Return the complete configuration: the preset, then options, then `--set`.

    Raises:
        ConfigError: an option is unknown or invalid.
    """
    preset = request.preset or default_preset()
    if preset not in PRESETS:
        raise ConfigError(
            f"There is no preset '{preset}'; use --preset with one of {', '.join(PRESETS)}."
        )
    if request.scenario not in ("uda", UPPER):
        raise ConfigError(f"--scenario {request.scenario} is unknown; use uda or {UPPER}.")
    values = dict(PRESETS[preset])
    groups = parse_overrides(request.assignments, setting_names(method_class.Config))
    direction = "-".join(parse_direction(dataset, request.direction))
    segmenter = {**values.pop("segmenter"), **groups["segmenter"]}
    method_values = {**preset_values(method_class.presets, preset), **groups["method"]}
    method_config = build_settings(method_class.Config, method_values, "method")
    for name in ("steps", "augmentation", "precision"):
        if getattr(request, name) is not None:
            values[name] = getattr(request, name)
    values |= groups["run"]
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
            selectors=chosen_selectors(request.selectors, request.plugins),
            **values,
        )
    except TypeError as error:
        raise ConfigError(f"An option has the wrong type ({error}); check --set.") from error


def chosen_selectors(names: str | None, plugins: Sequence[Path] = ()) -> tuple[str, ...]:
    """Return the selectors that `--selectors` names: `last` first, then in the order of tables.

    Args:
        names: comma-separated names, or "all"; None returns the default.
        plugins: plugin files.

    Raises:
        ConfigError: no name is given.
        PluginError: no selector has the name.
    """
    if names is None:
        return DEFAULT_SELECTORS
    registry = Registry("selector", plugins)
    given = {name.strip() for name in names.split(",") if name.strip()}
    if not given:
        raise ConfigError(f"--selectors '{names}' names no selector; give names, or all.")
    if ORACLE in given:
        raise ConfigError(
            f"--selectors {names}: '{ORACLE}' reads labels of test cases; pass --oracle instead."
        )
    known = [*SELECTORS, *sorted({entry.name for entry in registry.entries()} - {*SELECTORS})]
    if "all" in given:
        given = set(known)
    for name in sorted(given):
        registry.load(name)
    return tuple(name for name in known if name in {*given, SELECTORS[0]})


def check_request(config: RunConfig, method_class: type[Method]) -> None:
    """Refuse a scenario or grid that the method does not support.

    Raises:
        ConfigError: the scenario or the grid does not fit.
    """
    if config.privileged and method_class.uses_target:
        raise ConfigError(
            "--scenario supervised trains on target labels, but method "
            f"'{config.method}' adapts to unlabelled images; use --method source_only."
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
    """Refuse a method whose functions have another signature than the harness calls.

    Raises:
        PluginError: a function does not accept the arguments.
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
    config: RunConfig,
    structures: tuple[Structure, ...],
    method_class: type[Method],
    channels: int = 1,
) -> Method:
    """Build a method with weights initialised from the run's seed.

    Args:
        config: configuration of the run.
        structures: structures of the dataset.
        method_class: the method.
        channels: number of input channels, from `common_channels`.

    Raises:
        PluginError: a function of the method has another signature than the contract.
        ConfigError: the method refuses a setting, or two of its stages share a name.
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
        channels,
    )
    method = method_class(task, settings)
    stage_order(tuple(method.stages()))
    if config.perturbation:
        perturb(method, config.perturbation)
    return method


@torch.no_grad()
def perturb(module: nn.Module, draw: int) -> None:
    """Move every weight to the next float above or below it, at random.

    The change is as small as that between machines (threads, processors, library versions), so the
    spread of results over draws estimates the spread over machines. Zeros are kept, because their
    neighbours are denormal and slow.

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
    """Refuse batch normalisation over a single image.

    Raises:
        ConfigError: a process would see one image, and the method has batch normalisation.
    """
    if config.batch_size > devices:
        return
    for name, module in method.named_modules():
        if isinstance(module, _BatchNorm):
            avoidable = config.segmenter.name != "unet" and name.startswith("segmenter.")
            raise ConfigError(
                f"batch_size = {config.batch_size} with --devices {devices} leaves one image per "
                f"process, and '{config.method}' has batch normalisation (at {name}), which needs "
                f"several; set batch_size to {2 * devices} or more"
                + (", or segmenter.name=unet." if avoidable else ".")
            )


@torch.no_grad()
def check_inputs(config: RunConfig, method: Method, channels: int = 1) -> None:
    """Refuse input channels and stacks of slices that the method's networks do not support.

    Args:
        config: configuration of the run.
        method: method built from it.
        channels: number of input channels.

    Raises:
        ConfigError: the method cannot predict or translate such images.
    """
    if config.slices * channels == 1:
        return
    size = config.grid.size
    images = torch.zeros(1, config.slices * channels, size, size)
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
        if reason and channels > 1:
            raise ConfigError(
                f"Dataset '{config.dataset}' has {channels} input channels, which method "
                f"'{config.method}' does not support ({name} {reason}); build its networks with "
                "task.inputs channels, or describe a dataset with one of the channels."
            )
        if reason:
            raise ConfigError(
                f"slices = {config.slices}: method '{config.method}' does not support stacks of "
                f"slices ({name} {reason}); build its networks with task.inputs channels, or use "
                "slices=1."
            )


def with_slice_distance(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Set the distance between neighbouring slices in mm, if the run uses several slices.

    It is the requested distance or the slice spacing of the working grid; if volumes keep their own
    spacing, it is the `common_distance` of the training volumes of both domains. It is equal for
    all methods and scenarios of a comparison.

    Raises:
        ConfigError: consecutive slices in the dataset's files are not neighbours.
        DataError: a file cannot be read.
    """
    if config.slices == 1:
        return config
    if not dataset.neighbouring_slices:
        raise ConfigError(
            f"slices = {config.slices} needs volumes, and dataset '{dataset.name}' trains on "
            "slices that are not neighbours; use slices=1."
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
    """Return the cases of each role.

    Target training cases are `UnlabelledCase`s. In the supervised scenario the labelled target
    training cases take the role of the source, and training uses no other target images.

    Raises:
        ConfigError: a role has no cases, or a case id is not a valid file name.
        DataError: a case has not one image per channel.
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
            "so it cannot be scored: provide its label file, or assign it to another split."
        )
    if fault := role_fault(dataset, config.direction, config.privileged):
        raise ConfigError(fault)
    for case in chosen["test"]:
        if fault := name_fault(case.id):
            raise ConfigError(
                f"The case id '{case.id}' in dataset '{dataset.name}' {fault}, so it cannot name "
                "the file of its prediction: rename the case."
            )
    for case in (case for cases in chosen.values() for case in cases):
        check_channels(case, dataset.view(case.domain).reading)
    trained = {
        c.subject for c in [*chosen["source_train"], *chosen["source_val"]] if isinstance(c, Case)
    }
    tested = {c.subject for c in chosen["test"] if isinstance(c, Case)}
    if trained & tested:
        raise ConfigError(
            f"Subject {min(trained & tested)} of dataset '{dataset.name}' is in training "
            "and in test; assign every subject to one split only."
        )
    return chosen


def adjusted(
    config: RunConfig,
    method: Method,
    chosen: Mapping[str, Sequence[Case | UnlabelledCase]],
    report: Callable[[str], None] = lambda line: None,
) -> RunConfig:
    """Return the configuration with the settings that the method fits to its data.

    Args:
        config: configuration of the run.
        method: method built from it.
        chosen: cases of each role, from `roles`.
        report: receives one line per setting that is changed or has no effect.

    Raises:
        ConfigError: the method refuses the data.
    """
    cases = Cases(len(chosen["source_train"]), len(chosen["target_train"]))
    changes = method.check(cases) or {}  # a check that only raises returns None
    for name, change in changes.items():
        before = config.method_config[name]
        if change.value == before:
            report(f"method.{name} = {before} has no effect: {change.reason}.")
        else:
            report(f"method.{name} is {change.value} instead of {before}: {change.reason}.")
    values = {name: change.value for name, change in changes.items()}
    return replace(config, method_config={**config.method_config, **values})


def plan(request: RunRequest, report: Callable[[str], None] = lambda line: None) -> PlannedRun:
    """Resolve a request, prepare the data, and compute the run's identity.

    Args:
        request: the user's request.
        report: receives lines about data preparation.

    Raises:
        UserError: the request is invalid.
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
    """Plan a run from a resolved configuration, a dataset and a method.

    Args:
        request: paths, devices and plugins.
        config: from `resolve`.
        dataset: the dataset; it is prepared.
        method_class: the method.
        report: receives lines about data preparation.
        scored: if False, plan for training only: files that are only scored or selected on do not
            enter the identity and need not exist.

    Raises:
        UserError: configuration, dataset and method do not fit together.
    """
    check_request(config, method_class)
    channels = common_channels(dataset, config.direction)
    method = build_method(config, dataset.structures, method_class, channels)
    check_batch(config, method, request.devices)
    check_inputs(config, method, channels)
    dataset.prepare(report)
    chosen = roles(config, dataset)
    config = with_slice_distance(config, dataset)
    fitted = adjusted(config, method, chosen, report)
    if fitted != config:
        config = fitted
        method = build_method(config, dataset.structures, method_class, channels)
    views = [dataset.view(domain) for domain in (config.source, config.target)]
    prints = Fingerprints(
        train=digest(
            [
                fingerprint(chosen["source_train"]),
                fingerprint(chosen["target_train"]),
                [view.reading.identity() for view in views],
                [[asdict(structure) for structure in view.structures] for view in views],
            ],
            DATA_DIGITS,
        ),
        test=digest(
            [fingerprint(chosen[role]) for role in ("source_val", "test") if scored], DATA_DIGITS
        ),
    )
    code = code_version(method_class, scoring=True)
    run_id = identity(config, digest([prints.train, prints.test], DATA_DIGITS), code)
    return PlannedRun(
        config,
        run_id,
        RunDirectory(request.runs_root, config, run_id),
        dataset,
        method_class,
        [(s.name, s.steps(config.steps)) for s in method.stages()],
        prints,
        code,
        request,
    )


def choose_device(name: str) -> str:
    """Return "cuda" or "cpu".

    Raises:
        ConfigError: the name is unknown, or there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name} is unknown; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is available; use --device cpu.")
    return name


def make_fabric(request: RunRequest, config: RunConfig) -> Fabric:
    """Set up devices and precision.

    Raises:
        ConfigError: the devices do not support the configuration.
    """
    accelerator = choose_device(request.device)
    if accelerator == "cuda" and request.devices > torch.cuda.device_count():
        raise ConfigError(
            f"--devices {request.devices}: this machine has {torch.cuda.device_count()}; use fewer."
        )
    if config.precision == "16-mixed" and accelerator == "cpu":
        raise ConfigError("--precision 16-mixed needs a GPU; use bf16-mixed or 32-true.")
    if config.batch_size % request.devices:
        raise ConfigError(
            f"batch_size = {config.batch_size} is not divisible by --devices {request.devices}."
        )
    torch.backends.cudnn.deterministic = True  # same seed, same weights
    return Fabric(
        accelerator=accelerator,
        devices=request.devices,
        strategy="ddp" if request.devices > 1 else "auto",
        precision=config.precision,  # type: ignore[arg-type]
        # A run starts its own processes, also in a SLURM job, where Fabric expects srun's.
        plugins=[LightningEnvironment()],
    )


def launch(fabric: Fabric, processes: int, tell: Callable[[str], None]) -> None:
    """Start the other processes of a run; the first one tells it and ends if one is killed."""
    first = processes > 1 and "LOCAL_RANK" not in os.environ
    if first and os.name == "posix":
        _meet_on_loopback(processes)
    fabric.launch()
    if first:
        launcher = fabric.strategy.launcher
        others = list(getattr(launcher, "procs", ()))
        Thread(target=_end_with, args=(others, tell), daemon=True).start()


def _end_with(others: Sequence[subprocess.Popen], tell: Callable[[str], None]) -> None:
    """End this process if another one of the run is killed; it would wait for it in vain.

    Fabric does the same without a message, some seconds later.
    """
    while True:
        time.sleep(LOST_SECONDS / 4)
        codes = [process.poll() for process in others]
        for number, code in enumerate(codes, 2):
            if code is not None and code < 0:
                why = death(code).removesuffix(" repeat the command.").rstrip(".;")
                name = f"process {number} of {len(others) + 1} of this run"
                try:
                    tell(f"{name}: {why}; the same command resumes the run.")
                    for process in others:
                        process.kill()
                finally:
                    os._exit(LOST_CODE)
        if all(code is not None for code in codes):
            return


_stores: list[Any] = []  # kept alive, so that the port stays open


def _meet_on_loopback(processes: int) -> None:
    """Let the processes of a run exchange data over the loopback interface only.

    They unpickle what they receive. torch's store listens on all interfaces; opened in advance with
    a socket of our own, it is found by its port and used by `init_process_group`.
    """
    from torch.distributed import TCPStore

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(processes)
        port = listening.getsockname()[1]
        _stores[:] = [
            TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listening.detach(),  # closed by the store
            )
        ]
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    loopback = [name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name)]
    for library in ("GLOO", "NCCL") if loopback else ():
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback[0])
