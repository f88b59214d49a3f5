"""Preprocess all volumes of a dataset into the cache, in parallel and resumable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.parallel import cores, map_cases
from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, Grid, GridView


@dataclass(frozen=True)
class _Job:
    case: Case
    view: GridView
    root: Path  # of the cache


def prepare_cases(
    dataset: Dataset, grid: Grid, progress: Progress, jobs: int | None = None
) -> list[str]:
    """Preprocess every case of a dataset into the cache; cached cases are skipped.

    Args:
        dataset: a prepared dataset.
        grid: the working grid.
        progress: progress display.
        jobs: number of processes, each with one volume in memory; default: all cores.

    Returns:
        One sentence per unusable case, without duplicates, in the order of the cases.

    Raises:
        DataError: the dataset's directory cannot be used at all.
        RunFailure: the cache cannot be written, or a process was killed.
    """
    cache = SliceCache()
    cases = [case for domain in dataset.domains() for case in dataset.cases(domain)]
    waiting = []
    for case in cases:
        view = dataset.view(case.domain).on(grid)
        if not cache.holds(case, view):
            waiting.append(_Job(case, view, cache.root))
    if not waiting:
        return []
    if len(waiting) < len(cases):
        progress.line(f"{len(cases) - len(waiting)} of {len(cases)} volumes are cached")
    problems = map_cases(_prepare, waiting, jobs or cores(), progress, "preprocess")
    # Cases with a common file have the same problem.
    return list(dict.fromkeys(filter(None, problems)))


def _prepare(job: _Job) -> str:
    """Preprocess a case; return its problem, or ""."""
    cache = SliceCache(job.root, private=False)
    try:
        cache.image(job.case.unlabelled(), job.view)
        if job.case.label is not None:
            cache.label(job.case, job.view)
    except DataError as error:
        return str(error)
    return ""
