"""Export datasets and predictions for nnU-Net v2.

nnU-Net has no domains, so each domain becomes a dataset. Training nnU-Net on the target domain
gives a supervised upper bound, on the source domain a lower bound. Layout of an export:

    nnUNet_raw/Dataset501_NAME_DOMAIN/           dataset.json, imagesTr, labelsTr, imagesTs,
                                                 labelsTs, splits_final.json
    nnUNet_preprocessed/Dataset501_NAME_DOMAIN/  splits_final.json, where nnU-Net reads it
    predictions/Dataset501_NAME_DOMAIN/METHOD_ID/

Classes are 1 to K in the dataset's order; unannotated voxels are K + 1, nnU-Net's "ignore".
Training and validation cases are in `imagesTr`, separated by the single fold of
`splits_final.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from glua_bench import __version__
from glua_bench.console import Progress
from glua_bench.data.cache import file_digest
from glua_bench.data.formats import Forms, VolumeFile, open_volume
from glua_bench.data.geometry import SAME_SIDES, frame
from glua_bench.data.parallel import map_cases
from glua_bench.data.volumes import check_same_grid, read_label_volume, save_volume
from glua_bench.documents import load_json
from glua_bench.errors import ConfigError, DataError
from glua_bench.files import replacing, sweep, write_json
from glua_bench.paths import entries
from glua_bench.task import UNANNOTATED, Case, Dataset, DomainView, Reading, check_channels

ENDING = ".nii.gz"
RAW, PREPROCESSED, PREDICTIONS = "nnUNet_raw", "nnUNet_preprocessed", "predictions"
# Describes the inputs of an export; a folder without it is not an export.
RECORD = "glua-bench.json"
# Increment when exported files change, so that older exports are not resumed.
EXPORT_VERSION = 2
FIRST, LAST = 501, 999  # numbers below are those of published models


@dataclass(frozen=True)
class Exported:
    """The exported dataset of one domain.

    Attributes:
        folder: the dataset of nnU-Net.
        cases: number of exported cases.
        left_out: number of cases without a label, which nnU-Net does not support.
        mebibytes: size of the volumes, without links.
    """

    folder: Path
    cases: int
    left_out: int
    mebibytes: float


@dataclass(frozen=True)
class _Job:
    case: Case
    view: DomainView
    folder: Path
    link: bool


def export(
    dataset: Dataset, to: Path, number: int, link: bool, jobs: int, progress: Progress
) -> list[Exported]:
    """Export every domain of a dataset; an interrupted export is resumed.

    Existing files are kept. Images that nnU-Net reads as this harness does (.nii.gz, 3-D, in mm,
    same voxel size) are copied or linked; others are converted.

    Args:
        dataset: a prepared dataset.
        to: directory of the export.
        number: dataset number of the first domain; other domains have the following ones.
        link: create symbolic links instead of copies.
        jobs: number of processes.
        progress: progress display.

    Raises:
        ConfigError: a number is already used, or a folder contains another export.
        DataError: a case cannot be used.
        RunFailure: the directory cannot be written.
    """
    folders = {domain: folder_of(dataset, domain, to, number) for domain in dataset.domains()}
    labelled = {
        domain: [case for case in dataset.cases(domain) if case.label is not None]
        for domain in folders
    }
    work = []
    for domain, folder in folders.items():
        _begin(folder, dataset, domain, labelled[domain], link)
        work += [_Job(case, dataset.view(domain), folder, link) for case in labelled[domain]]
    map_cases(_export_case, work, jobs, progress, "export")
    exported = []
    for domain, folder in folders.items():
        _finish(folder, dataset, domain, labelled[domain])
        files = [file for file in folder.rglob(f"*{ENDING}") if not file.is_symlink()]
        size = sum(file.stat().st_size for file in files) / 2**20
        count = len(labelled[domain])
        exported.append(Exported(folder, count, len(dataset.cases(domain)) - count, size))
    return exported


def export_predictions(
    dataset: Dataset, domain: str, predictions: Path, folder: Path, jobs: int, progress: Progress
) -> int:
    """Export a run's predictions of a domain's test cases with nnU-Net's names and classes.

    Args:
        dataset: dataset of the run.
        domain: target domain of the run.
        predictions: directory of the run's label volumes, with the dataset's label values.
        folder: output directory; existing files are kept.
        jobs: number of processes.
        progress: progress display.

    Returns:
        Number of cases.

    Raises:
        DataError: a prediction is missing or cannot be read.
        RunFailure: the directory cannot be written.
    """
    view = dataset.view(domain).of_predictions()
    work = [
        _Job(replace(case, label=predictions / f"{case.id}{ENDING}"), view, folder, link=False)
        for case in dataset.split(domain, "test")
    ]
    map_cases(_export_prediction, work, jobs, progress, "export predictions")
    return len(work)


def folder_of(dataset: Dataset, domain: str, to: Path, number: int) -> Path:
    """Return the folder of a domain in an export.

    Raises:
        ConfigError: the number is invalid or already used.
    """
    own = number + dataset.domains().index(domain)
    if not 1 <= own <= LAST:
        raise ConfigError(
            f"--number {number} leads to dataset number {own}: give a number from {FIRST} to "
            f"{LAST}, such that the numbers of all domains have three digits."
        )
    folder = to / RAW / f"Dataset{own:03d}_{export_name(dataset, domain)}"
    for other in sorted(folder.parent.glob(f"Dataset{own:03d}_*")):
        if other != folder:
            raise ConfigError(
                f"{other} already has the number {own}: choose another --number or --to."
            )
    return folder


def export_name(dataset: Dataset, domain: str) -> str:
    """Return the name of a domain's folder after its number, "Dataset501_"."""
    return re.sub(r"\W+", "_", f"{dataset.fold_name}_{domain}")


def name_of(case: Case) -> str:
    """Return a case's identifier in nnU-Net: its id without the domain."""
    return case.id.removeprefix(f"{case.domain}_")


# -- a domain -------------------------------------------------------------------------------------


def _begin(folder: Path, dataset: Dataset, domain: str, cases: Sequence[Case], link: bool) -> None:
    """Start an export in an empty folder, or resume the same export."""
    names = [name_of(case) for case in cases]
    if len(set(names)) < len(names):
        raise DataError(f"Two cases of {domain} in '{dataset.name}' have the same id: rename one.")
    if all(case.split == "test" for case in cases):
        raise DataError(
            f"Domain {domain} of '{dataset.name}' has no labelled training case, which nnU-Net "
            "requires: add one."
        )
    view = dataset.view(domain)
    record = {
        "version": EXPORT_VERSION,
        "dataset": dataset.fold_name,
        "domain": domain,
        "links": link,
        "reading": json.loads(json.dumps(view.reading.identity())),
        "values": [list(structure.values) for structure in view.structures],
        "cases": {
            name: [
                case.split,
                *(file_digest(file) for file in (case.image, case.truth, *case.further)),
            ]
            for name, case in zip(names, cases, strict=True)
        },
    }
    file = folder / RECORD
    try:
        found = load_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists() and entries(folder):
            raise ConfigError(
                f"{folder} exists and is not an export of glua-bench: choose another directory "
                "with --to."
            ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: delete the folder, or choose another directory with --to."
        ) from error
    else:
        if found != record:
            raise ConfigError(
                f"{folder} contains an export of other files or settings: delete it, or choose "
                "another directory with --to."
            )
    write_json(file, record, "--to")


def _finish(folder: Path, dataset: Dataset, domain: str, cases: Sequence[Case]) -> None:
    """Write the splits and, last, dataset.json."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        sweep(place)  # nnU-Net would count temporary files of a killed process
    training = {
        split: [name_of(c) for c in cases if c.split == split] for split in ("train", "val")
    }
    if training["train"] and training["val"]:
        for place in (folder, folder.parents[1] / PREPROCESSED / folder.name):
            write_json(place / "splits_final.json", [training], "--to")
    names = ["background", *(structure.name for structure in dataset.structures)]
    if dataset.view(domain).reading.unannotated_values:
        names.append("ignore")  # must be the last class
    channels = [channel.name for channel in dataset.view(domain).reading.channels] or [domain]
    description = {
        # "CT" makes nnU-Net normalise by the intensities of the whole dataset.
        "channel_names": {
            str(index): "CT" if name.casefold() == "ct" else name
            for index, name in enumerate(channels)
        },
        "labels": {name: index for index, name in enumerate(names)},
        "numTraining": len(training["train"]) + len(training["val"]),
        "file_ending": ENDING,
        "name": folder.name.split("_", 1)[1],
        "reference": dataset.reference,
        "description": f"Domain {domain} of {dataset.fold_name}, written by glua-bench "
        f"{__version__}.",
    }
    write_json(folder / "dataset.json", description, "--to")


# -- a case ---------------------------------------------------------------------------------------


def _export_case(job: _Job) -> None:
    """Export the images of all channels and the label of one case."""
    part = "Ts" if job.case.split == "test" else "Tr"
    name = name_of(job.case)
    label = job.folder / f"labels{part}" / f"{name}{ENDING}"
    first = open_volume(job.case.image)
    forms = _forms(first, job.view.reading)
    if not label.exists():
        classes = read_label_volume(job.case.truth, job.case.image, job.view)
        classes[classes == UNANNOTATED] = len(job.view.structures) + 1
        save_volume(label, classes, forms)
    check_channels(job.case, job.view.reading)
    for index, source in enumerate(job.case.images):
        file = open_volume(source)
        if index:
            channel = job.view.reading.channels[index].name
            own = job.view.reading, first.shape, first.affine
            check_same_grid(file, channel, *own, job.case.image)
        image = job.folder / f"images{part}" / f"{name}_{index:04d}{ENDING}"
        if not image.exists():
            _export_image(job, file, source, image, forms)


def _export_image(job: _Job, file: VolumeFile, source: Path, image: Path, forms: Forms) -> None:
    """Copy, link or convert the image of one channel."""
    if forms == file.forms and file.path.name.endswith(ENDING) and file.dimension == 3:
        with replacing(image, "--to") as temporary:
            if job.link:
                temporary.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, temporary)
        return
    stored = file.voxels()
    if (file.slope, file.inter) != (1, 0):
        stored = file.scaled(stored).astype(np.float32)
    save_volume(image, _native(stored), forms)


def _export_prediction(job: _Job) -> None:
    """Export the prediction of one case, which is the label of `job.case`."""
    target = job.folder / f"{name_of(job.case)}{ENDING}"
    if not target.exists():
        file = open_volume(job.case.image)
        classes = read_label_volume(job.case.truth, job.case.image, job.view)
        save_volume(target, classes, _forms(file, job.view.reading))


def _forms(file: VolumeFile, reading: Reading) -> Forms:
    """Return the header's geometry in mm, with both forms replaced if the voxel size differs."""
    affine, spacing, _, _ = frame(file, reading)
    own = file.forms.in_mm() if file.forms.unit else file.forms
    if (np.abs(np.array(own.pixdim[1:]) / spacing - 1) < SAME_SIDES).all():
        return own
    stated = affine.copy()
    stated[:3, :3] *= np.array(spacing) / np.linalg.norm(affine[:3, :3], axis=0)
    return Forms.of(stated, file.forms.codes)


def _native(stored: np.ndarray) -> np.ndarray:
    """Convert to a data type that all NIfTI readers support."""
    kind = np.dtype(np.uint8) if stored.dtype.kind == "b" else stored.dtype.newbyteorder("=")
    return stored.astype(kind, copy=False)
