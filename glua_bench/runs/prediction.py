"""Segmenting new volumes with a finished run, and handing its model on without the run."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from glua_bench import __version__
from glua_bench.config import ORACLE, RunConfig, build_settings
from glua_bench.data.geometry import ambiguities
from glua_bench.data.neighbours import Neighbourhood, Stacks
from glua_bench.data.stores import IMAGE_TYPE
from glua_bench.data.volumes import (
    GridImage,
    load_image,
    restore,
    restore_probabilities,
    save_labels,
    save_maps,
)
from glua_bench.errors import ConfigError, PluginError, UserError
from glua_bench.files import new_folder, write_bytes, write_json, write_text
from glua_bench.inspection.measurements import read_intensities
from glua_bench.inspection.outliers import resemblance
from glua_bench.method import Method, Role
from glua_bench.paths import entries
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.registry import Registry
from glua_bench.runs import carried
from glua_bench.runs.carried import Carried
from glua_bench.runs.inputs import Given
from glua_bench.runs.plan import build_method, choose_device
from glua_bench.runs.trainer import to_channels_last
from glua_bench.scoring.evaluation import predict_volumes
from glua_bench.scoring.metrics import METRICS, volumes_ml
from glua_bench.task import Structure

ROLES: tuple[Role, ...] = ("target", "source")
WEIGHTS, CONFIG, CARD, LICENSE = "model.safetensors", "config.json", "README.md", "LICENSE"

VOLUMES = "volumes.csv"


@dataclass(frozen=True)
class Model:
    """A trained method, with all that a volume needs on its way to labels and back.

    Args:
        method: in eval mode, on `device`.
        config: of the run that trained it.
        data: the domains whose images it can read.
        device: where it predicts.
        source: what it was read from, for messages.
    """

    method: Method
    config: RunConfig
    data: Carried
    device: torch.device
    source: Path

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Class i + 1 is `structures[i]`, with the target's label values."""
        return self.data.domains[self.config.target].structures

    def role(self, domain: str) -> Role:
        """What a domain is to the run."""
        return "target" if domain == self.config.target else "source"

    def translates(self) -> bool:
        """Whether images of the source are translated before they are predicted."""
        return _translation(self.method) is not None

    def domain(self, name: str | None) -> str:
        """The domain as which images are read; None takes the target.

        Raises:
            ConfigError: the model knows no such domain.
        """
        config = self.config
        if name is None or name in self.data.domains:
            return name or config.target
        raise ConfigError(
            f"--domain {name}: {self.source} reads images of {config.source}, its source domain, "
            f"and of {config.target}, its target domain; give one of these."
        )


@dataclass(frozen=True)
class Predicted:
    """One segmented volume.

    Args:
        file: the image.
        name: of its results.
        labels: where its label volume was written.
        slices: the image on the working grid, float32 (Z, H, W).
        classes: the most probable class of each of its pixels, uint8 (Z, H, W).
        ml: structure → volume.
    """

    file: Path
    name: str
    labels: Path
    slices: np.ndarray
    classes: np.ndarray
    ml: dict[str, float]


# -- where a model comes from --------------------------------------------------------------------


def find_run(name: str, runs_root: Path) -> RunDirectory:
    """A finished run by its directory, its id, or the beginning of its id.

    Raises:
        UserError: there is none, there are several, or it is not finished.
    """
    if Path(name).is_dir():
        run = RunDirectory.open(Path(name))
    else:
        found = [run for run in list_runs(runs_root) if run.id.startswith(name)]
        if len(found) != 1:
            what = "no run" if not found else f"{len(found)} runs"
            raise UserError(
                f"--run {name}: {what} below {runs_root} begin(s) with this id; give a whole id or "
                "the run's directory, and --runs where it does not lie in ./runs."
            )
        run = found[0]
    if not run.done:
        raise UserError(f"The run {run.path} is not finished; give its command again first.")
    return run


def from_run(
    run: RunDirectory, plugins: Sequence[Path] = (), device: str = "auto", selector: str = "last"
) -> Model:
    """The model of a finished run.

    Args:
        run: the run.
        plugins: files in which its method may be found.
        device: "auto", "cpu" or "cuda".
        selector: whose checkpoint.

    Raises:
        UserError: the selector has chosen none, or the checkpoint cannot be used by the method as
            it is now.
    """
    chosen = run.read_summary()["chosen_steps"]
    if selector not in chosen:
        raise ConfigError(
            f"--selector {selector} has chosen no checkpoint of {run.path}; use one of "
            f"{', '.join(chosen)}."
        )
    config = run.config
    data = carried.read(run.path)
    path = run.checkpoints / f"candidate_{chosen[selector]:07d}.pt"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise UserError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}); restore it, or run "
            "the same command in another --runs directory."
        ) from error
    remedy = "use the version of the code that trained it (environment.json)"
    _check_settings(run.config, plugins, f"The run {run.path}", remedy)
    method = _built(config, data.domains[config.target].structures, plugins)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint {path} does not fit method '{run.config.method}' as it is now; "
            f"{remedy}."
        ) from error
    return _model(method, config, data, device, run.path)


def from_directory(folder: Path, plugins: Sequence[Path] = (), device: str = "auto") -> Model:
    """The model that `export` wrote; needs neither the run nor its dataset.

    Args:
        folder: the directory.
        plugins: files in which its method may be found.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: the directory is not a model, or does not fit the method as it is now.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        config = RunConfig.from_dict(described["run"])
        data, expected = Carried.from_dict(described), set(described["weights"])
        structures = data.domains[config.target].structures
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not an exported model ({type(error).__name__}: {error}); give a "
            "directory that `glua-bench export` wrote."
        ) from error
    version = described.get("version", "of its time")
    remedy = f"use the version of the code that exported it (glua-bench {version})"
    _check_settings(config, plugins, str(folder), remedy)
    method = _built(config, structures, plugins)
    try:
        missing, unexpected = method.load_state_dict(weights, strict=False)
        fits = not unexpected and expected == weights.keys() and not expected & set(missing)
    except RuntimeError:  # shapes differ
        fits = False
    if not fits:
        raise UserError(f"{folder} does not fit method '{config.method}' as it is now; {remedy}.")
    return _model(method, config, data, device, folder)


def _check_settings(config: RunConfig, plugins: Sequence[Path], source: str, remedy: str) -> None:
    """Refuse a model of another version of its method, which had other settings.

    Args:
        config: of the run that trained it.
        plugins: files in which its method may be found.
        source: the model, as a sentence begins with it.
        remedy: what to do, as a sentence ends with it.

    Raises:
        UserError: the method does not take one of the settings now.
    """
    method_class: type[Method] = Registry("method", plugins).load(config.method)
    known = {spec.name for spec in fields(method_class.Config)}
    for name, value in config.method_config.items():
        now = "does not exist"
        if name in known:
            try:
                build_settings(method_class.Config, {name: value}, "method")
                continue
            except ConfigError:
                now = f"cannot be {value}"
        raise UserError(
            f"{source} was trained by another version of method '{config.method}' (its setting "
            f"'{name}' {now} now); {remedy}."
        )


def _built(config: RunConfig, structures: tuple[Structure, ...], plugins: Sequence[Path]) -> Method:
    method_class: type[Method] = Registry("method", plugins).load(config.method)
    # Its weights are about to be replaced, so a pretrained encoder's need not be fetched.
    plain = RunConfig.from_dict(
        {**config.to_dict(), "segmenter": {**asdict(config.segmenter), "pretrained": False}}
    )
    return build_method(plain, structures, method_class)


def _model(method: Method, config: RunConfig, data: Carried, device: str, source: Path) -> Model:
    where = torch.device(choose_device(device))
    method = method.to(where).eval()
    to_channels_last(method)  # as the trainer does; rounding follows from it
    return Model(method, config, data, where, source)


# -- prediction ----------------------------------------------------------------------------------


def predict(
    model: Model,
    images: Sequence[Given],
    out: Path,
    domain: str | None = None,
    probabilities: bool = False,
    report: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[Predicted]:
    """Segment volumes, one after the other; slices of several share a batch.

    Each volume is preprocessed as in the run, from the image alone, and its labels are written
    on its own voxels, with its affine and the domain's label values. Images of the source domain
    are translated as in training where the method does that.

    Args:
        model: what segments.
        images: from `inputs.find`.
        out: directory of `<name>_seg.nii.gz`.
        domain: whose images they are, the source's or the target's name; None takes the target.
        probabilities: also write `<name>_prob.nii.gz`, float32 with the classes as fourth axis.
        report: receives how many volumes are done.
        warn: receives a sentence for each image that looks like one of another domain, or whose
            header leaves unsure where its voxels lie.

    Raises:
        ConfigError: the model knows no such domain.
        DataError: an image cannot be used.
        RunFailure: the disk is full or the directory cannot be written.
    """
    name = model.domain(domain)
    values = [structure.values[0] for structure in model.data.domains[name].structures]
    waiting: list[GridImage] = []
    neighbourhood = Neighbourhood.of(model.config)

    def stacks(image: Given) -> Stacks:
        loaded = _load(model, image, name, warn)
        waiting.append(loaded)
        rounded = loaded.voxels.astype(IMAGE_TYPE)  # as training's slices are
        return neighbourhood.stacks(rounded, loaded.placement.grid_spacing[0])

    role = model.role(name)
    volumes = map(stacks, images)
    found_in = _classes(model, role, volumes)
    for done, (given, found) in enumerate(zip(images, found_in, strict=True), 1):
        image = waiting.pop(0)
        labels = restore(found, image.placement)
        path = out / f"{given.name}_seg.nii.gz"
        save_labels(path, labels, image.placement, values)
        if probabilities:
            maps = restore_probabilities(found, image.placement)
            save_maps(out / f"{given.name}_prob.nii.gz", maps, image.placement)
        ml = volumes_ml(labels, model.structures, image.placement.ml)
        classes = found.argmax(0).astype(np.uint8)
        yield Predicted(given.path, given.name, path, image.voxels, classes, ml)
        report(done)


def _load(model: Model, image: Given, domain: str, warn: Callable[[str], None]) -> GridImage:
    """An image on the working grid; warns where its header or its intensities leave doubts."""
    known = model.data.domains
    file = image.open()
    for _, doubt in ambiguities(file, known[domain].reading):
        warn(doubt)
    voxels = file.voxels()
    file = replace(file, read=lambda: voxels)  # which are looked at twice
    loaded = load_image(file, known[domain].reading, model.config.grid)
    usual = {name: own.usual for name, own in known.items()}
    what, like = resemblance(read_intensities(file, known[domain].reading), domain, usual)
    if what:
        advice = (
            f"give --domain {like} if it is an image of {like}"
            if like
            else f"make sure that it is an image of {domain}, in the units of the others"
        )
        warn(f"The intensity of {image.path} {what}, as which it is read; {advice}.")
    return loaded


def _classes(model: Model, role: Role, volumes: Iterable[Stacks]) -> Iterator[np.ndarray]:
    """Probabilities of each volume, float32 (K, Z, H, W)."""

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        with _precision(model):
            return _answer(model.method, images, role)

    if role == "target":
        yield from predict_volumes(logits, volumes, model.device)
        return
    # A translation may draw styles: it draws the same for a volume, whatever comes before it.
    for volume in volumes:
        with _seeded(model.device, model.config.seed):
            found = list(predict_volumes(logits, [volume], model.device))
        yield from found


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from a seed, without a change of what is drawn afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _answer(method: Method, images: Tensor, role: Role) -> Tensor:
    """Logits of images of a role; those of the source are translated before, as in training."""
    translate = _translation(method) if role == "source" else None
    images = images.to(memory_format=torch.channels_last)
    if translate is not None:
        images = translate(images).to(memory_format=torch.channels_last)
    return method.predict(images, role)


def _translation(method: Method) -> Callable[[Tensor], Tensor] | None:
    """What the last stage makes of source images; None where it takes them as they are."""
    return tuple(method.stages())[-1].translate


def _precision(model: Model) -> contextlib.AbstractContextManager[Any]:
    """The arithmetic in which the run trained and scored; 16 bits on a CPU it cannot have."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    kind = kinds.get(model.config.precision)
    if kind is None or (kind is torch.float16 and model.device.type == "cpu"):
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=kind)


def outputs(
    images: Iterable[Given], out: Path, probabilities: bool = False, overlay: bool = False
) -> list[Path]:
    """The files that a prediction with its table and pictures writes."""
    ends = ["_seg.nii.gz"] + ["_prob.nii.gz"] * probabilities + [".png"] * overlay
    return [out / f"{image.name}{end}" for image in images for end in ends] + [out / VOLUMES]


def volumes_table(predicted: Iterable[Predicted]) -> pd.DataFrame:
    """file, structure and ml, a row for each structure of each volume."""
    return pd.DataFrame(
        [(str(p.file), name, ml) for p in predicted for name, ml in p.ml.items()],
        columns=["file", "structure", "ml"],
    )


# -- export --------------------------------------------------------------------------------------


def export(model: Model, run: RunDirectory, folder: Path, selector: str = "last") -> Path:
    """Write a directory that `from_directory` reads on a machine without the run.

    Only the networks that predict the domains are in it, with what translates the source's images
    on their way: no discriminator that takes no part in that, and no pools of training images.
    What it holds of the data are label values, readings, and medians over training images of how
    their intensities are distributed; no name of a file or a case.

    Args:
        model: from `from_run`.
        run: the run, for its scores.
        folder: a new or empty directory.
        selector: whose checkpoint the model is.

    Raises:
        UserError: the directory is not empty.
        PluginError: the method's predictions do not follow from the networks that it calls.
        RunFailure: the disk is full or the directory cannot be written.
    """
    from safetensors.torch import save

    if folder.exists() and (not folder.is_dir() or entries(folder)):
        raise UserError(f"{folder} is not an empty directory; choose another --out.")
    weights = predicting_weights(model)
    described = {
        "version": __version__,
        "run": model.config.to_dict(),
        **model.data.to_dict(),
        "weights": sorted(weights),
    }
    licence = next(f for f in distribution("glua-bench").files or () if f.name == "LICENSE")
    with new_folder(folder, "--out") as unfinished:
        write_bytes(unfinished / WEIGHTS, save(weights))
        write_json(unfinished / CONFIG, described)
        write_text(unfinished / CARD, card(model, run, selector))
        write_text(unfinished / LICENSE, licence.read_text(encoding="utf-8"))
    return folder


def predicting_weights(model: Model) -> dict[str, Tensor]:
    """State of the modules that take part in a prediction of the target or the source.

    Raises:
        PluginError: with these alone, predictions are others.
    """
    kept: dict[str, Tensor] = {}
    for role in ROLES:
        kept.update(_weights_of(model, role))
    return kept


def _weights_of(model: Model, role: Role) -> dict[str, Tensor]:
    method = model.method
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in method.named_modules()
    ]
    shape = (2, model.config.slices, model.config.grid.size, model.config.grid.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(model.device)
    try:
        expected = _drawn_alike(method, images, role)
    finally:
        for hook in hooks:
            hook.remove()
    # A module may use others without being called itself, and read tensors of its own on the way,
    # as a style bank does. They are kept only where it is so: they may be anything.
    around = {name[:end] for name in called for end in _dots(name)}
    own = {name for name, _ in method.named_parameters(recurse=False)}  # read by the method itself
    for modules in (called, called | around):
        kept = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in method.state_dict().items()
            if name.rpartition(".")[0] in modules or name in own
        }
        if torch.equal(expected, _drawn_alike(_fresh(model, kept), images, role)):
            return kept
    raise PluginError(
        f"Predictions of the {role} by method '{model.config.method}' depend on weights outside "
        "the modules that it calls, so it cannot be exported; call its networks as modules."
    )


@torch.no_grad()
def _drawn_alike(method: Method, images: Tensor, role: Role) -> Tensor:
    """Logits, with the same random numbers at every call."""
    with _seeded(images.device, 0):
        return _answer(method, images, role)


def _dots(name: str) -> list[int]:
    """Where the names of the modules around a module end."""
    return [place for place, letter in enumerate(name) if letter == "."]


def _fresh(model: Model, weights: Mapping[str, Tensor]) -> Method:
    """Another method of the same class, of another seed, with the given weights."""
    config = RunConfig.from_dict({**model.config.to_dict(), "seed": model.config.seed + 1})
    method = build_method(config, model.structures, type(model.method))
    method.load_state_dict(weights, strict=False)
    method = method.to(model.device).eval()
    to_channels_last(method)
    return method


def card(model: Model, run: RunDirectory, selector: str) -> str:
    """The model's card in Markdown: what it is, how it was trained, how it scored."""
    config, summary = model.config, run.read_summary()
    rows = [row for row in summary["scores"] if row["selector"] == selector]
    lines = [
        f"# {config.method}, trained on {config.fold_name} {config.direction}",
        "",
        "Segments slices of "
        + ", ".join(f"{s.title} ({s.name})" for s in model.structures)
        + f" in images of the domains of {config.dataset}. Written by glua-bench {__version__}; "
        "`glua-bench predict --model DIRECTORY IMAGE...` uses it. Images are read as "
        f"{config.target}, or with `--domain {config.source}` as {config.source}. "
        "For research, not for diagnosis.",
        "",
        "## Method",
        "",
        inspect.cleandoc(type(model.method).__doc__ or ""),
        "",
        "## Protocol",
        "",
        f"- Scenario: {config.scenario}"
        + (
            ". **Privileged: it was trained on target labels.**"
            if config.privileged
            else ", no target label was used in training."
        ),
        f"- Checkpoint: step {summary['chosen_steps'][selector]} of {config.steps}, chosen by "
        f"`{selector}`" + (", **which read target labels.**" if selector == ORACLE else "."),
        f"- Working grid: {config.grid.size} × {config.grid.size} pixels of "
        f"{config.grid.spacing:g} mm; batch {config.batch_size}; augmentation "
        f"{config.augmentation}; seed {config.seed}; run {run.id}.",
        f"- Slices that it sees at once: {Neighbourhood.of(config)}.",
        "- Every setting is in config.json.",
        "",
        "## Scores on the target's test cases",
        "",
        "3-D, per case, on the files' own grids, means over cases; missed structures counted. One "
        "seed: no interval.",
        "",
        _line("structure", *(metric.label for metric in METRICS.values()), "missed", "cases"),
        "|---" * (len(METRICS) + 3) + "|",
        *(
            _line(
                row["structure"],
                *(metric.text(row.get(name)) for name, metric in METRICS.items()),
                row["misses"],
                row["cases"],
            )
            for row in rows
        ),
        "",
        "## Licence",
        "",
        "The code is under the Apache License 2.0 (LICENSE). Whether these weights may be passed "
        "on is for the owners of the training data to say.",
        "",
    ]
    return "\n".join(lines)


def _line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
