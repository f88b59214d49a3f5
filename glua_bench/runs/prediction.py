"""Segment new volumes with a finished run or an exported model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from glua_bench.config import RunConfig, build_settings
from glua_bench.console import Progress, warn
from glua_bench.data.formats import VolumeFile
from glua_bench.data.geometry import ambiguities
from glua_bench.data.neighbours import Neighbourhood, Stacks
from glua_bench.data.parallel import turns
from glua_bench.data.resampling import Placement
from glua_bench.data.stores import IMAGE_TYPE
from glua_bench.data.volumes import (
    GridImage,
    load_channel,
    load_image,
    restore,
    restore_probabilities,
    save_labels,
    save_maps,
)
from glua_bench.documents import load_json
from glua_bench.errors import ConfigError, DataError, UserError, reason
from glua_bench.files import Damaged, csv_text, read_checked_json, sha256, write_text
from glua_bench.inspection.measurements import read_intensities
from glua_bench.inspection.outliers import resemblance
from glua_bench.method import Method, Role
from glua_bench.records.run_directory import RunDirectory, list_runs, run_around
from glua_bench.registry import Registry
from glua_bench.runs import carried
from glua_bench.runs.carried import Carried
from glua_bench.runs.inputs import Given
from glua_bench.runs.plan import build_method, choose_device
from glua_bench.runs.request import ADAPTATIONS
from glua_bench.runs.trainer import checkpoint_name, load, to_channels_last
from glua_bench.scoring.evaluation import predict_volumes
from glua_bench.scoring.metrics import SPACING, volumes_ml
from glua_bench.task import Structure

ROLES: tuple[Role, ...] = ("target", "source")
WEIGHTS, CONFIG, CARD, LICENSE = "model.safetensors", "config.json", "README.md", "LICENSE"
VOLUMES = "volumes.csv"
# Entries of `CONFIG` as written before exported models had checksums.
_WITHOUT_CHECKSUM = {"version", "run", "domains", "publishable", "weights"}
_HOW = (
    "join the files of a case by commas in this order, as in t1.nii.gz,t2.nii.gz, or name them "
    "CASE_0000, CASE_0001, …"
)


@dataclass(frozen=True)
class Model:
    """A trained method with all that is needed to segment volumes.

    Attributes:
        method: in eval mode, on `device`.
        config: configuration of the run that trained it.
        data: facts about the run's domains.
        device: device of the method.
        source: path from which it was read, for messages.
        adapt: how it adapts to the images that it segments; "" if it does not.
    """

    method: Method
    config: RunConfig
    data: Carried
    device: torch.device
    source: Path
    adapt: str = ""

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Class i + 1 is `structures[i]`, with the target's label values."""
        return self.data.domains[self.config.target].structures

    @property
    def channels(self) -> int:
        """Number of input channels C."""
        return self.data.domains[self.config.target].reading.inputs

    def role(self, domain: str) -> Role:
        """Return "target" or "source"."""
        return "target" if domain == self.config.target else "source"

    def translates(self) -> bool:
        """Return True if source images are translated before they are predicted."""
        return _translation(self.method) is not None

    def domain(self, name: str | None) -> str:
        """Check the domain as which images are read; None selects the target.

        Raises:
            ConfigError: the model has no such domain.
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
    """A segmented volume.

    Attributes:
        file: the image.
        name: name of its results.
        labels: path of its label volume.
        slices: the image (its first channel) on the working grid, float32 (Z, H, W).
        classes: most probable class per pixel, uint8 (Z, H, W).
        ml: structure → volume.
        placement: of the slices in the file.
    """

    file: Path
    name: str
    labels: Path
    slices: np.ndarray
    classes: np.ndarray
    ml: dict[str, float]
    placement: Placement


def find_run(name: str, runs_root: Path) -> RunDirectory:
    """Find a finished run by its directory, its id, or the beginning of its id.

    Raises:
        UserError: no run or several runs match, or the run is not finished or damaged.
    """
    if Path(name).is_dir():
        run = RunDirectory.open(Path(name))
    else:
        found = [run for run in list_runs(runs_root) if run.id.startswith(name)]
        if len(found) != 1:
            which = (
                f"{len(found)} runs in {runs_root}/ have"
                if found
                else f"no run in {runs_root}/ has"
            )
            raise UserError(
                f"--run: {which} an id starting with '{name}'; give the full id or the run's "
                "directory, and --runs if runs are not in ./runs."
            )
        run = found[0]
    if run.damage is not None:
        raise UserError(run.damage)
    if not run.done:
        raise UserError(f"The run {run.path} is not finished; repeat its command first.")
    return run


def from_run(
    run: RunDirectory, plugins: Sequence[Path] = (), device: str = "auto", selector: str = "last"
) -> Model:
    """Load the model of a finished run.

    Args:
        run: the run.
        plugins: files to search for its method.
        device: "auto", "cpu" or "cuda".
        selector: selector that chose the checkpoint.

    Raises:
        UserError: the selector chose none, or the checkpoint does not fit the method's current
            version.
    """
    if run.config.external:
        raise UserError(
            f"{run.path} was imported from another tool and has no model; give a trained run."
        )
    summary = run.read_summary()
    chosen = summary["chosen_steps"]
    if selector not in chosen:
        raise ConfigError(
            f"--selector {selector} chose no checkpoint of {run.path}; use one of "
            f"{', '.join(chosen)}."
        )
    config = run.config
    data = carried.read(run.path)
    path = run.checkpoints / f"candidate_{chosen[selector]:07d}.pt"
    if path.is_file():
        run.check_file(path)
    try:
        weights = load(path, checkpoint_name(summary["run"], path), "cpu", older=True)
    except Exception as error:  # torch raises many types
        what = str(error) if isinstance(error, Damaged) else f"{path} cannot be read"
        raise UserError(
            f"The checkpoint {what}; restore it, or repeat the run's command with another --runs "
            "directory."
        ) from error
    remedy = "use the version of the code that trained it (environment.json)"
    method = _built(config, data, plugins, f"The run {run.path}", remedy)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint {path} does not fit this version of method '{config.method}'; "
            f"{remedy}."
        ) from error
    return _model(method, config, data, device, run.path)


def from_directory(folder: Path, plugins: Sequence[Path] = (), device: str = "auto") -> Model:
    """Load a model that `export` wrote; needs neither the run nor its dataset.

    Args:
        folder: the directory.
        plugins: files to search for its method.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: the directory is not a model, or does not fit the method's current version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_export(folder)
    try:
        described = load_json((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        config = RunConfig.from_dict(described["run"])
        data, expected = Carried.from_dict(described), set(described["weights"])
        data.domains[config.target]  # raises KeyError in a damaged file
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not an exported model ({type(error).__name__}: {error}); give a "
            "directory written by `glua-bench export`."
        ) from error
    version = described.get("version", "unknown")
    remedy = f"use the version of the code that exported it (glua-bench {version})"
    method = _built(config, data, plugins, str(folder), remedy)
    try:
        missing, unexpected = method.load_state_dict(weights, strict=False)
        fits = not unexpected and expected == weights.keys() and not expected & set(missing)
    except RuntimeError:  # shapes differ
        fits = False
    if not fits:
        raise UserError(
            f"{folder} does not fit this version of method '{config.method}'; {remedy}."
        )
    return _model(method, config, data, device, folder)


def _check_export(folder: Path) -> None:
    """Compare the checksums of an exported model.

    Raises:
        UserError: the model is damaged.
    """
    try:
        found = load_json((folder / CONFIG).read_text(encoding="utf-8"))
        if set(found) == _WITHOUT_CHECKSUM:
            warn(
                f"{folder} carries no checksums, because an earlier version exported it; export it "
                "again, so that damage is noticed."
            )
            return
    except (OSError, ValueError, TypeError):
        return  # not a model, or none of this program
    try:
        expected = read_checked_json(folder / CONFIG)["files"][WEIGHTS]
        if sha256(folder / WEIGHTS) != expected:
            raise Damaged(folder / WEIGHTS, "its checksum differs")
    except FileNotFoundError:
        return
    except (Damaged, OSError) as error:
        raise UserError(f"{reason(error)}; restore {folder} or export the model again.") from error


def _built(
    config: RunConfig, data: Carried, plugins: Sequence[Path], source: str, remedy: str
) -> Method:
    """Build the method; refuse a model with settings that its current version does not accept."""
    method_class: type[Method] = Registry("method", plugins).load(config.method)
    known = {spec.name for spec in fields(method_class.Config)}
    for name, value in config.method_config.items():
        try:
            build_settings(method_class.Config, {name: value}, "method")
        except ConfigError as error:
            fault = f"cannot be {value}" if name in known else "does not exist"
            raise UserError(
                f"{source} was trained by another version of method '{config.method}' (its setting "
                f"'{name}' {fault} now); {remedy}."
            ) from error
    # Weights are loaded later, so those of a pretrained encoder need not be downloaded.
    plain = replace(config, segmenter=replace(config.segmenter, pretrained=False))
    target = data.domains[config.target]
    return build_method(plain, target.structures, method_class, target.reading.inputs)


def _model(method: Method, config: RunConfig, data: Carried, device: str, source: Path) -> Model:
    where = torch.device(choose_device(device))
    return Model(ready(method, where), config, data, where, source)


def ready(method: Method, device: torch.device) -> Method:
    method = method.to(device).eval()
    to_channels_last(method)  # as in the trainer, because it affects rounding
    return method


def predict(
    model: Model,
    images: Sequence[Given],
    out: Path,
    domain: str | None = None,
    probabilities: bool = False,
    report: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[Predicted]:
    """Segment volumes one after the other; batches contain slices of several volumes.

    Each volume is preprocessed as in the run, from the image alone. Labels are written on its own
    voxels, with its affine and the domain's label values. Source images are translated as in
    training, if the method does so.

    Args:
        model: the model.
        images: from `inputs.find`.
        out: directory for `<name>_seg.nii.gz`.
        domain: name of the images' domain; None selects the target.
        probabilities: also write `<name>_prob.nii.gz`, float32 with classes as the fourth axis.
        report: receives the number of finished volumes.
        warn: receives a sentence for each image that resembles another domain, or whose header is
            ambiguous about the position of its voxels.

    Raises:
        ConfigError: the model has no such domain.
        DataError: an image is invalid, or has other channels than the model.
        RunFailure: the disk is full or the directory cannot be written.
    """
    name = model.domain(domain)
    values = [structure.values[0] for structure in model.data.domains[name].structures]
    waiting: list[GridImage] = []
    neighbourhood = Neighbourhood.of(model.config)
    check_channels(model, images, name)

    def stacks(image: Given) -> Stacks:
        loaded, *further = _load(model, image, name, warn)
        waiting.append(loaded)
        # Rounded as in training.
        first, *others = (part.voxels.astype(IMAGE_TYPE) for part in (loaded, *further))
        return neighbourhood.stacks(first, loaded.placement.grid_spacing[0], *others)

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
        yield Predicted(given.path, given.name, path, image.voxels, classes, ml, image.placement)
        report(done)


def check_channels(model: Model, images: Iterable[Given], domain: str) -> None:
    """Refuse images with another number of channels than the model.

    Raises:
        DataError: an image has more or fewer.
    """
    reading = model.data.domains[domain].reading
    for image in images:
        files = 1 + len(image.further)
        if files == reading.inputs:
            continue
        given = f"{files} files" if files > 1 else "one file"
        names = ", ".join(channel.name for channel in reading.channels)
        needed = f"{reading.inputs} channels ({names})" if reading.inputs > 1 else "one channel"
        raise DataError(
            f"{image.path} is given as {given}, but {model.source} needs {needed} of {domain}: "
            f"{_HOW if reading.inputs > 1 else 'give one file for each case'}."
        )


def _load(model: Model, image: Given, domain: str, warn: Callable[[str], None]) -> list[GridImage]:
    """Load each channel of an image on the working grid; warn about headers and intensities."""
    known, reading = model.data.domains, model.data.domains[domain].reading
    loaded: list[GridImage] = []
    for index, channel in enumerate((image, *image.further)):
        own = reading.channel(index)
        file = _in_memory(channel.open())
        for _, doubt in ambiguities(file, own):
            warn(doubt)
        if index == 0:
            loaded.append(load_image(file, own, model.config.grid))
        else:
            place = loaded[0].placement
            loaded.append(GridImage(load_channel(file, reading, index, place, image.path), place))
        usual = {name: one.channel(index) for name, one in known.items()}
        difference, like = resemblance(read_intensities(file, own), domain, usual)
        if difference:
            advice = (
                f"use --domain {like} if it is an image of {like}"
                if like
                else f"check that it is an image of {domain} in the same units"
            )
            warn(f"The intensity of {channel.path} {difference}, as which it is read; {advice}.")
    return loaded


def _in_memory(file: VolumeFile) -> VolumeFile:
    """Read the voxels once, because they are used twice."""
    voxels = file.voxels()
    return replace(file, read=lambda: voxels)


def _classes(model: Model, role: Role, volumes: Iterable[Stacks]) -> Iterator[np.ndarray]:
    """Yield the class probabilities of each volume, float32 (K, Z, H, W)."""

    threads = torch.get_num_threads() if model.device.type == "cpu" else None

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        with turns.taken(threads), _precision(model):
            return answer_of(model.method, images, role)

    if role == "target":
        yield from predict_volumes(logits, volumes, model.device)
        return
    # A translation may draw random styles; they must not depend on earlier volumes.
    for volume in volumes:
        with seeded(model.device, model.config.seed):
            found = list(predict_volumes(logits, [volume], model.device))
        yield from found


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed random numbers, and restore the generators afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def answer_of(method: Method, images: Tensor, role: Role) -> Tensor:
    """Return logits; source images are translated first, as in training."""
    translate = _translation(method) if role == "source" else None
    images = images.to(memory_format=torch.channels_last)
    if translate is not None:
        images = translate(images).to(memory_format=torch.channels_last)
    return method.predict(images, role)


def _translation(method: Method) -> Callable[[Tensor], Tensor] | None:
    """Return the last stage's translation of source images, if any."""
    return tuple(method.stages())[-1].translate


def _precision(model: Model) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of the run; float16 is not available on a CPU."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    kind = kinds.get(model.config.precision)
    if kind is None or (kind is torch.float16 and model.device.type == "cpu"):
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=kind)


def outputs(
    images: Iterable[Given], out: Path, probabilities: bool = False, overlay: bool = False
) -> list[Path]:
    """Return the files that `predict` writes, with its table and pictures."""
    ends = ["_seg.nii.gz"] + ["_prob.nii.gz"] * probabilities + [".png", ".svg", ".pdf"] * overlay
    return [out / f"{image.name}{end}" for image in images for end in ends] + [out / VOLUMES]


def refuse_existing(
    images: Iterable[Given],
    out: Path,
    overwrite: bool,
    probabilities: bool = False,
    overlay: bool = False,
) -> None:
    """Refuse to replace results.

    Raises:
        ConfigError: a file that `predict_all` would write exists, and `overwrite` is False.
    """
    there = [p for p in outputs(images, out, probabilities, overlay) if p.exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{there[0]} exists already; choose another --out, or give --overwrite to replace "
            f"{len(there)} file(s)."
        )


def from_either(
    run: str | None,
    model: str | Path | None,
    runs_root: Path,
    plugins: Sequence[Path],
    device: str,
    selector: str,
) -> Model:
    """Load the model of a run (see `find_run`) or of an exported directory.

    Raises:
        UserError: both or none are given, or the model cannot be loaded.
    """
    if (run is None) == (model is None):
        raise ConfigError("Give either --run or --model.")
    if model is not None:
        return from_directory(Path(model), plugins, device)
    return from_run(find_run(str(run), runs_root), plugins, device, selector)


def adapted(model: Model, how: str | None) -> Model:
    """Return a model that adapts to the images while it segments them.

    Args:
        model: the model.
        how: "tent" (`scoring/tent.py`); None returns the model itself.

    Raises:
        ConfigError: the adaptation is unknown.
        UserError: the model has nothing to adapt.
    """
    if how is None:
        return model
    if how not in ADAPTATIONS:
        raise ConfigError(f"--adapt {how} is unknown; use {', '.join(ADAPTATIONS)}.")
    from glua_bench.scoring.tent import Tent

    method: Any = Tent(model.method, str(model.source))
    return replace(model, method=method, adapt=how)


def predict_all(
    model: Model,
    images: Sequence[Given],
    out: Path,
    domain: str | None,
    probabilities: bool,
    progress: Progress,
    warn: Callable[[str], None],
    draw: Callable[[Predicted], None] = lambda predicted: None,
) -> list[Predicted]:
    """Segment volumes by `predict`, and write the table of their structures' volumes.

    Args:
        progress: progress bar.
        draw: called with each segmented volume.
    """
    progress.stage("segment", len(images), unit="image")
    found: list[Predicted] = []
    try:
        for each in predict(model, images, out, domain, probabilities, progress.update, warn):
            found.append(each)
            draw(each)
    finally:  # also after an image that cannot be used
        if found:
            table = volumes_table(found, model)
            write_text(out / VOLUMES, csv_text(table), "--out")
    return found


def volumes_table(predicted: Iterable[Predicted], model: Model) -> pd.DataFrame:
    """Return one row per structure and volume.

    Returns:
        Columns file, structure, ml, the voxel size in mm, and of the model: its method and the name
            of its directory, how it adapted to the images, and whether it was trained on labels
            of the target.
    """
    table = pd.DataFrame(
        [
            (str(p.file), name, ml, *p.placement.spacing)
            for p in predicted
            for name, ml in p.ml.items()
        ],
        columns=["file", "structure", "ml", *SPACING],
    )
    return table.assign(
        model=f"{model.config.method} {model.source.name}",
        adapt=model.adapt,
        privileged=model.config.privileged,
    )


def stated(folder: Path) -> tuple[bool, str]:
    """Return what a folder of predictions says of the model, if it is known here.

    Args:
        folder: a directory that `predict_all` wrote, or the predictions of a run.

    Returns:
        Whether the model was trained on labels of the target, and a note such as "source_only
            0123abcd, adapted by tent"; False and "" for other folders.
    """
    run = run_around(folder.resolve())
    if run is not None and run.predictions == folder.resolve():
        return run.config.privileged, f"{run.config.method} {run.id}"
    try:
        table = pd.read_csv(folder / VOLUMES, keep_default_na=False)
        models = table[["model", "adapt", "privileged"]].drop_duplicates()
    except (OSError, ValueError, KeyError):  # a file of another origin
        return False, ""
    notes = (f"{m}, adapted by {a}" if a else str(m) for m, a, _ in models.to_numpy())
    return bool((models["privileged"].astype(str) == "True").any()), "; ".join(notes)
