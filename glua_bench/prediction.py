"""Segmenting new volumes with a finished run, and handing its model on without the run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from glua_bench import __version__, runs
from glua_bench.cache import IMAGE_TYPE
from glua_bench.config import RunConfig, build_settings
from glua_bench.errors import ConfigError, PluginError, RunFailure, UserError
from glua_bench.evaluation import predict_volumes
from glua_bench.formats import SUFFIXES, open_volume
from glua_bench.method import Method
from glua_bench.neighbours import Neighbourhood, Stacks
from glua_bench.registry import Registry
from glua_bench.task import Dataset, Reading, Structure
from glua_bench.tracking import RunDirectory, list_runs
from glua_bench.trainer import to_channels_last
from glua_bench.volumes import (
    doubts,
    load_image,
    restore,
    restore_probabilities,
    save_labels,
    save_maps,
)

WEIGHTS, CONFIG, CARD, LICENSE = "model.safetensors", "config.json", "README.md", "LICENSE"


@dataclass(frozen=True)
class Model:
    """A trained method, with all that a volume needs on its way to labels and back.

    Args:
        method: in eval mode, on `device`.
        config: of the run that trained it.
        structures: class i + 1 is `structures[i]`.
        reading: how files become arrays.
        publishable: whether pictures of its data may be passed on.
        device: where it predicts.
        source: what it was read from, for messages.
    """

    method: Method
    config: RunConfig
    structures: tuple[Structure, ...]
    reading: Reading
    publishable: bool
    device: torch.device
    source: Path


@dataclass(frozen=True)
class Predicted:
    """One segmented volume.

    Args:
        file: the image.
        labels: where its label volume was written.
        slices: the image on the working grid, float32 (Z, H, W).
        classes: the most probable class of each of its pixels, uint8 (Z, H, W).
        ml: structure → volume.
        doubts: what its header leaves unsure about where its voxels lie, a sentence each.
    """

    file: Path
    labels: Path
    slices: np.ndarray
    classes: np.ndarray
    ml: dict[str, float]
    doubts: tuple[str, ...] = ()


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
        plugins: files in which its method or dataset may be found.
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
    dataset: type[Dataset] = Registry("dataset", plugins).load(run.config.dataset)
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
    method = _built(run.config, dataset.structures, plugins)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint {path} does not fit method '{run.config.method}' as it is now; "
            f"{remedy}."
        ) from error
    return _model(
        method,
        run.config,
        dataset.structures_of(run.config.target),
        dataset.reading_of(run.config.target),
        dataset.publishable,
        device,
        run.path,
    )


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
        structures = tuple(
            Structure(**{**s, "values": tuple(s["values"])}) for s in described["structures"]
        )
        read: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in described["reading"].items()
        }
        reading = Reading(**read)
        config = RunConfig.from_dict(described["run"])
        publishable, expected = bool(described["publishable"]), set(described["weights"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
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
    return _model(method, config, structures, reading, publishable, device, folder)


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
    return runs.build_method(plain, _Task(config.dataset, structures), method_class)


@dataclass(frozen=True)
class _Task:
    """As much of a dataset as a method is built from."""

    name: str
    structures: tuple[Structure, ...]


def _model(
    method: Method,
    config: RunConfig,
    structures: tuple[Structure, ...],
    reading: Reading,
    publishable: bool,
    device: str,
    source: Path,
) -> Model:
    where = torch.device(runs.choose_device(device))
    method = method.to(where).eval()
    to_channels_last(method)  # as the trainer does; rounding follows from it
    return Model(method, config, structures, reading, publishable, where, source)


# -- prediction ----------------------------------------------------------------------------------


def predict(
    model: Model,
    files: Sequence[Path],
    out: Path,
    probabilities: bool = False,
    report: Callable[[int], None] = lambda done: None,
) -> Iterable[Predicted]:
    """Segment volumes, one after the other; slices of several share a batch.

    Each volume is preprocessed as in the run, from the image alone, and its labels are written
    on its own voxels, with its affine and the dataset's label values.

    Args:
        model: what segments.
        files: images of the target domain, in any of `formats.SUFFIXES`.
        out: directory of `<name>_seg.nii.gz`.
        probabilities: also write `<name>_prob.nii.gz`, float32 with the classes as fourth axis.
        report: receives how many volumes are done.

    Raises:
        UserError: two files have one name, or a file cannot be used.
        RunFailure: the disk is full or the directory cannot be written.
    """
    names = [name_of(file) for file in files]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"Two of the given files are called {name}, and their results would overwrite "
                "each other; segment them into different --out directories."
            )
    values = [structure.values[0] for structure in model.structures]
    loaded = (load_image(file, model.reading, model.config.grid) for file in files)
    waiting: list[Any] = []
    neighbourhood = Neighbourhood.of(model.config)

    def volumes() -> Iterable[Stacks]:
        for image in loaded:
            waiting.append(image)
            rounded = image.voxels.astype(IMAGE_TYPE)  # as training's slices are
            yield neighbourhood.stacks(rounded, image.placement.grid_spacing[0])

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        return model.method.predict(images.to(memory_format=torch.channels_last), "target")

    predicted = predict_volumes(logits, volumes(), model.device)
    for done, (file, name, found) in enumerate(zip(files, names, predicted, strict=True), 1):
        image = waiting.pop(0)
        labels = restore(found, image.placement)
        save_labels(out / f"{name}_seg.nii.gz", labels, image.placement, values)
        if probabilities:
            maps = restore_probabilities(found, image.placement)
            save_maps(out / f"{name}_prob.nii.gz", maps, image.placement)
        ml = {
            structure.name: float((labels == index).sum()) * image.placement.ml
            for index, structure in enumerate(model.structures, start=1)
        }
        yield Predicted(
            file,
            out / f"{name}_seg.nii.gz",
            image.voxels,
            found.argmax(0).astype(np.uint8),
            ml,
            tuple(text for _, text in doubts(open_volume(file), model.reading)),
        )
        report(done)


def name_of(file: Path) -> str:
    """A file's name without the suffix of its format, e.g. .nii.gz."""
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), "")
    return file.name[: len(file.name) - len(suffix)]


def volumes_table(predicted: Iterable[Predicted]) -> pd.DataFrame:
    """file, structure and ml, a row for each structure of each volume."""
    return pd.DataFrame(
        [(str(p.file), name, ml) for p in predicted for name, ml in p.ml.items()],
        columns=["file", "structure", "ml"],
    )


# -- export --------------------------------------------------------------------------------------


def export(model: Model, run: RunDirectory, folder: Path, selector: str = "last") -> Path:
    """Write a directory that `from_directory` reads on a machine without the run.

    Only the networks that predict the target are in it: no discriminator that takes no part in
    that, no style networks, and no pools of training images.

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
    from safetensors.torch import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty directory; choose another --out.")
    weights = predicting_weights(model)
    described = {
        "version": __version__,
        "run": model.config.to_dict(),
        "structures": [asdict(structure) for structure in model.structures],
        "reading": asdict(model.reading),
        "publishable": model.publishable,
        "weights": sorted(weights),
    }
    licence = next(f for f in distribution("glua-bench").files or () if f.name == "LICENSE")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card(model, run, selector), encoding="utf-8")
        (folder / LICENSE).write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise RunFailure(f"{folder} cannot be written ({error.strerror or error}).") from error
    return folder


def predicting_weights(model: Model) -> dict[str, Tensor]:
    """State of the modules that take part in a prediction of the target.

    Raises:
        PluginError: with these alone, predictions are others.
    """
    method = model.method
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in method.named_modules()
    ]
    shape = (2, model.config.slices, model.config.grid.size, model.config.grid.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(model.device).contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            expected = method.predict(images, "target")
    finally:
        for hook in hooks:
            hook.remove()
    own = {name for name, _ in method.named_parameters(recurse=False)}  # read by the method itself
    kept = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in method.state_dict().items()
        if name.rpartition(".")[0] in called or name in own
    }
    fresh = _fresh(model, kept)
    with torch.no_grad():
        again = fresh.predict(images, "target")
    if not torch.equal(expected, again):
        raise PluginError(
            f"Predictions of method '{model.config.method}' depend on weights outside the modules "
            "that it calls, so it cannot be exported; call its networks as modules."
        )
    return kept


def _fresh(model: Model, weights: dict[str, Tensor]) -> Method:
    """Another method of the same class, of another seed, with the given weights."""
    config = RunConfig.from_dict({**model.config.to_dict(), "seed": model.config.seed + 1})
    task = _Task(config.dataset, model.structures)
    method = runs.build_method(config, task, type(model.method))
    method.load_state_dict(weights, strict=False)
    method = method.to(model.device).eval()
    to_channels_last(method)
    return method


def card(model: Model, run: RunDirectory, selector: str) -> str:
    """The model's card in Markdown: what it is, how it was trained, how it scored."""
    config, summary = model.config, run.read_summary()
    rows = [row for row in summary["scores"] if row["selector"] == selector]
    lines = [
        f"# {config.method}, trained on {config.dataset} {config.direction}",
        "",
        "Segments slices of "
        + ", ".join(f"{s.title} ({s.name})" for s in model.structures)
        + f" in images of the domains of {config.dataset}. Written by glua-bench {__version__}; "
        "`glua-bench predict --model DIRECTORY IMAGE...` uses it. For research, not for diagnosis.",
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
        f"`{selector}`" + (", **which read target labels.**" if selector == runs.ORACLE else "."),
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
        "| structure | Dice | ASSD mm | HD95 mm | missed | cases |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['structure']} | {row['dice']:.3f} | {row['assd']:.2f} | {row['hd95']:.2f} | "
            f"{row['misses']} | {row['cases']} |"
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
