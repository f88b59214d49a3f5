"""All volumes of a dataset into the cache: parallel, resumable, and not stopped by a bad file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.parallel import cores, parallel_map
from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, Grid, GridView


@dataclass(frozen=True)
class _Job:
    """One case, and how it is read."""

    case: Case
    view: GridView
    root: Path  # of the cache


def prepare_cases(
    dataset: Dataset, grid: Grid, progress: Progress, jobs: int | None = None
) -> list[str]:
    """Bring every case of a dataset into the cache.

    Cases that are there are passed over at once. Entries appear whole, so that a call that ended
    early, however it did, leaves what it finished, and the next one goes on from there.

    Args:
        dataset: a prepared one.
        grid: the working grid.
        progress: what the user sees.
        jobs: processes, each of which holds one volume at a time; None takes all cores.

    Returns:
        A sentence for each case that cannot be used, in the order of the cases.

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
    there = len(cases) - len(waiting)
    progress.stage("preprocess", len(cases), there)
    progress.update(there)
    problems: dict[int, str] = {}
    results = parallel_map(_prepare, waiting, jobs or cores())
    for done, (place, problem) in enumerate(results, start=1):
        if problem:
            problems[place] = problem
        progress.update(there + done)
    # What several cases share is the same sentence to all of them.
    return list(dict.fromkeys(problems[place] for place in sorted(problems)))


def _prepare(job: _Job) -> str:
    """What is wrong with a case, and nothing where it is in the cache now."""
    cache = SliceCache(job.root)
    try:
        cache.image(job.case.unlabelled(), job.view)
        if job.case.label is not None:
            cache.label(job.case, job.view)
    except DataError as error:
        return str(error)
    return ""
