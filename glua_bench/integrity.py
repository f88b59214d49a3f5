"""Are a dataset's files what they should be? Read every one before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glua_bench.cache import SliceCache
from glua_bench.console import Progress
from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, Grid
from glua_bench.volumes import read_label_volume


@dataclass(frozen=True)
class CaseReport:
    """What was found in one case's two files.

    Args:
        case: the case.
        shape: voxels per axis of the stored array.
        spacing: mm per axis of the stored array.
        volumes: ml of each structure, in the dataset's order; nan for a case without a label.
        problem: why the case cannot be used; empty where it can.
    """

    case: Case
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    volumes: tuple[float, ...] = ()
    problem: str = ""


def check_case(case: Case, dataset: Dataset, grid: Grid, cache: SliceCache) -> CaseReport:
    """Read a case's image onto the working grid and its label on the file's own."""
    try:
        reading = dataset.reading_of(case.domain)
        image = cache.image(case.unlabelled(), reading, grid)
        structures = dataset.structures_of(case.domain)
        if case.label is None and case.split == "train":
            nothing = tuple(float("nan") for _ in structures)
            return CaseReport(case, image.placement.file_shape, image.placement.spacing, nothing)
        labels = read_label_volume(case.truth, case.image, structures, reading)
    except DataError as error:
        return CaseReport(case, problem=str(error))
    spacing = image.placement.spacing
    counts = np.bincount(labels.ravel(), minlength=len(dataset.structures) + 1)[1:]
    volumes = tuple(float(c) * float(np.prod(spacing)) / 1000 for c in counts)
    problem = "" if counts.any() else f"{case.label} holds none of the dataset's structures."
    return CaseReport(case, image.placement.file_shape, spacing, volumes, problem)


def check_dataset(dataset: Dataset, grid: Grid, progress: Progress) -> list[CaseReport]:
    """Every case of every domain.

    Raises:
        DataError: the dataset's directory cannot be used at all.
    """
    cases = [case for domain in dataset.domains() for case in dataset.cases(domain)]
    cache = SliceCache()
    progress.stage("check files", len(cases))
    reports = []
    for case in cases:
        reports.append(check_case(case, dataset, grid, cache))
        progress.update(len(reports))
    return reports
