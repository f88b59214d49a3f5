"""A dataset and a run's predictions as nnU-Net v2 keeps raw data, splits and predictions.

Each domain becomes a dataset of nnU-Net, because nnU-Net knows no domains: trained on the target's
it is a supervised upper bound, trained on the source's and applied to the target's `imagesTs` a
lower one. Below the directory of the export lie

    nnUNet_raw/Dataset501_NAME_DOMAIN/           dataset.json, imagesTr, labelsTr, imagesTs,
                                                 labelsTs, splits_final.json
    nnUNet_preprocessed/Dataset501_NAME_DOMAIN/  splits_final.json, where nnU-Net looks for it
    predictions/Dataset501_NAME_DOMAIN/METHOD_ID/

so that nnU-Net runs once its environment variables name the first two. Classes are 1 to K in the
dataset's order; what nobody annotated is K + 1, nnU-Net's "ignore". Training and validation cases
go to `imagesTr`; the one fold of `splits_final.json` tells them apart.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glua_bench import __version__
from glua_bench.console import Progress
from glua_bench.data.cache import file_digest
from glua_bench.data.formats import Forms, VolumeFile, open_volume
from glua_bench.data.geometry import SAME_SIDES, frame
from glua_bench.data.parallel import parallel_map
from glua_bench.data.volumes import read_label_volume, save_volume
from glua_bench.errors import ConfigError, DataError
from glua_bench.files import replacing, sweep, write_json
from glua_bench.paths import entries
from glua_bench.task import UNANNOTATED, Case, Dataset, DomainView, Reading

ENDING = ".nii.gz"
RAW, PREPROCESSED, PREDICTIONS = "nnUNet_raw", "nnUNet_preprocessed", "predictions"
# What a folder was made of; a folder without it is somebody else's.
RECORD = "glua-bench.json"
# Raise it where the same data are written otherwise, so that an older export is not gone on with.
EXPORT_VERSION = 2
FIRST, LAST = 501, 999  # numbers below are those of published models


@dataclass(frozen=True)
class Exported:
    """One domain's folder.

    Args:
        folder: the dataset of nnU-Net.
        cases: cases in it.
        left_out: cases without a label, which nnU-Net has no place for.
        mebibytes: size of the files in it, where they are not links.
    """

    folder: Path
    cases: int
    left_out: int
    mebibytes: float


@dataclass(frozen=True)
class _Job:
    """One case on its way."""

    case: Case
    view: DomainView
    folder: Path
    link: bool


def export(
    dataset: Dataset, to: Path, number: int, link: bool, jobs: int, progress: Progress
) -> list[Exported]:
    """Write every domain of a dataset as a dataset of nnU-Net.

    A file appears complete or not at all; a call that ended early goes on when it is given again,
    and nothing that is there is overwritten. Images are copied (or linked) byte by byte where
    nnU-Net reads them as this harness does: NIfTI, compressed, in mm, with voxels of the size that
    counts here. Others are written anew.

    Args:
        dataset: a prepared one.
        to: the directory of the export.
        number: of the first domain; the others count on.
        link: symbolic links instead of copies.
        jobs: processes.
        progress: what the user sees.

    Raises:
        ConfigError: the numbers are not free, or a folder holds another export.
        DataError: a case cannot be used.
        RunFailure: the directory cannot be written.
    """
    folders = [folder_of(dataset, domain, to, number) for domain in dataset.domains()]
    cases = {domain: dataset.cases(domain) for domain in dataset.domains()}
    work = []
    for domain, folder in zip(dataset.domains(), folders, strict=True):
        labelled = [case for case in cases[domain] if case.label is not None]
        _begin(folder, dataset, domain, labelled, link)
        work += [_Job(case, dataset.view(domain), folder, link) for case in labelled]
    progress.stage("export", len(work))
    for done, _ in enumerate(parallel_map(_export_case, work, jobs), start=1):
        progress.update(done)
    made = []
    for domain, folder in zip(dataset.domains(), folders, strict=True):
        labelled = [case for case in cases[domain] if case.label is not None]
        _finish(folder, dataset, domain, labelled)
        files = [file for file in folder.rglob(f"*{ENDING}") if not file.is_symlink()]
        size = sum(file.stat().st_size for file in files) / 2**20
        left_out = len(cases[domain]) - len(labelled)
        made.append(Exported(folder, len(labelled), left_out, size))
    return made


def export_predictions(
    dataset: Dataset,
    domain: str,
    predictions: Path,
    folder: Path,
    jobs: int,
    progress: Progress,
) -> int:
    """Write a run's predictions of a domain's test cases as nnU-Net names and numbers them.

    Args:
        dataset: what the run was trained on.
        domain: the run's target.
        predictions: the run's label volumes, with the dataset's raw values.
        folder: where to; what is there is kept.
        jobs: processes.
        progress: what the user sees.

    Returns:
        How many cases.

    Raises:
        DataError: a prediction is missing or cannot be read.
        RunFailure: the directory cannot be written.
    """
    work = []
    for case in dataset.split(domain, "test"):
        predicted = Case(
            case.id,
            domain,
            case.image,
            predictions / f"{case.id}{ENDING}",
            case.split,
            case.subject,
        )
        work.append(_Job(predicted, dataset.view(domain).of_predictions(), folder, link=False))
    progress.stage("export predictions", len(work))
    for done, _ in enumerate(parallel_map(_export_prediction, work, jobs), start=1):
        progress.update(done)
    return len(work)


def folder_of(dataset: Dataset, domain: str, to: Path, number: int) -> Path:
    """The folder of a domain below the directory of an export.

    Raises:
        ConfigError: the number is none of nnU-Net's, or another dataset there has it.
    """
    own = number + dataset.domains().index(domain)
    if not 1 <= own <= LAST:
        raise ConfigError(
            f"--number {number} leads to dataset {own}; give one of {FIRST} to {LAST}, so that all "
            "domains have three digits."
        )
    name = re.sub(r"\W+", "_", f"{dataset.fold_name}_{domain}")
    folder = to / RAW / f"Dataset{own:03d}_{name}"
    others = [
        other for other in sorted(folder.parent.glob(f"Dataset{own:03d}_*")) if other != folder
    ]
    if others:
        raise ConfigError(
            f"{others[0]} has the number {own} already: give another by --number, or another "
            "directory by --to."
        )
    return folder


def name_of(case: Case) -> str:
    """A case's identifier in nnU-Net: its id without the domain, which the folder names."""
    return case.id.removeprefix(f"{case.domain}_")


# -- a domain -------------------------------------------------------------------------------------


def _begin(folder: Path, dataset: Dataset, domain: str, cases: Sequence[Case], link: bool) -> None:
    """Claim a folder for an export, or go on with one that was claimed for the same."""
    names = [name_of(case) for case in cases]
    if len(set(names)) < len(names):
        raise DataError(f"Two cases of {domain} in '{dataset.name}' have one id: rename one.")
    if not [case for case in cases if case.split != "test"]:
        raise DataError(
            f"Domain {domain} of '{dataset.name}' has no labelled training case, which nnU-Net "
            "needs."
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
            name: [case.split, file_digest(case.image), file_digest(case.truth)]
            for name, case in zip(names, cases, strict=True)
        },
    }
    file = folder / RECORD
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists() and entries(folder):
            raise ConfigError(
                f"{folder} is there and no export of glua-bench: choose another directory by --to."
            ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: delete the folder, or choose another."
        ) from error
    else:
        if found != record:
            raise ConfigError(
                f"{folder} holds an export of other files or settings: delete it, or choose "
                "another directory by --to."
            )
    write_json(file, record, "--to")


def _finish(folder: Path, dataset: Dataset, domain: str, cases: Sequence[Case]) -> None:
    """Write what makes the folder complete: the splits, and dataset.json last."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        sweep(place)  # nnU-Net would count what a killed call left
    training = {
        split: [name_of(c) for c in cases if c.split == split] for split in ("train", "val")
    }
    if training["train"] and training["val"]:
        for place in (folder, folder.parents[1] / PREPROCESSED / folder.name):
            write_json(place / "splits_final.json", [training], "--to")
    names = {"background": 0}
    for index, structure in enumerate(dataset.structures, start=1):
        names[structure.name] = index
    if dataset.view(domain).reading.unannotated_values:
        names["ignore"] = len(names)  # which has to be the highest
    facts = {
        # "CT" makes nnU-Net normalise by the intensities of the whole dataset.
        "channel_names": {"0": "CT" if domain.casefold() == "ct" else domain},
        "labels": names,
        "numTraining": len(training["train"]) + len(training["val"]),
        "file_ending": ENDING,
        "name": folder.name.split("_", 1)[1],
        "reference": dataset.reference,
        "description": f"Domain {domain} of {dataset.fold_name}, written by glua-bench "
        f"{__version__}.",
    }
    write_json(folder / "dataset.json", facts, "--to")


# -- a case ---------------------------------------------------------------------------------------


def _export_case(job: _Job) -> None:
    """Image and label of one case."""
    part = "Ts" if job.case.split == "test" else "Tr"
    name = name_of(job.case)
    image = job.folder / f"images{part}" / f"{name}_0000{ENDING}"
    label = job.folder / f"labels{part}" / f"{name}{ENDING}"
    file = open_volume(job.case.image)
    forms = _forms(file, job.view.reading)
    if not label.exists():
        classes = read_label_volume(job.case.truth, job.case.image, job.view)
        classes[classes == UNANNOTATED] = len(job.view.structures) + 1
        save_volume(label, classes, forms)
    if image.exists():
        return
    whole = file.path.name.endswith(ENDING) and file.dimension == 3
    if forms != file.forms or not whole:
        stored = file.voxels()
        if (file.slope, file.inter) == (1, 0):
            save_volume(image, _native(stored), forms)
        else:
            save_volume(image, file.scaled(stored).astype(np.float32), forms)
    elif job.link:
        with replacing(image, "--to") as temporary:
            temporary.symlink_to(job.case.image.resolve())
    else:
        with replacing(image, "--to") as temporary:
            shutil.copyfile(job.case.image, temporary)


def _export_prediction(job: _Job) -> None:
    """The prediction of one case; in `job.case` it stands in the place of the label."""
    target = job.folder / f"{name_of(job.case)}{ENDING}"
    if not target.exists():
        file = open_volume(job.case.image)
        classes = read_label_volume(job.case.truth, job.case.image, job.view)
        save_volume(target, classes, _forms(file, job.view.reading))


def _forms(file: VolumeFile, reading: Reading) -> Forms:
    """The header's geometry in mm, as every program is to read it.

    Both forms stay as they are where their voxels have the size that this harness takes; otherwise
    there is one, with that size.
    """
    affine, spacing, _, _ = frame(file, reading)
    own = file.forms.in_mm() if file.forms.unit else file.forms
    if (np.abs(np.array(own.pixdim[1:]) / spacing - 1) < SAME_SIDES).all():
        return own
    stated = affine.copy()
    stated[:3, :3] *= np.array(spacing) / np.linalg.norm(affine[:3, :3], axis=0)
    return Forms.of(stated, file.forms.codes)


def _native(stored: np.ndarray) -> np.ndarray:
    """The array in a number type that NIfTI readers have."""
    kind = np.dtype(np.uint8) if stored.dtype.kind == "b" else stored.dtype.newbyteorder("=")
    return stored.astype(kind, copy=False)
