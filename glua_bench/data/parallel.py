"""Map a function over items in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from threading import Thread
from typing import TypeVar

from glua_bench.console import Progress
from glua_bench.errors import RunFailure

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of processor cores available to this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def parallel_map(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Apply `work` to items in parallel and yield results as they are completed.

    Results are not kept in memory. If the loop ends early (an error, an interruption or the death
    of this process), the worker processes end too.

    Args:
        work: a module-level function, so that it can be pickled.
        items: arguments of `work`; they and the results must be picklable.
        jobs: number of processes; with 1, or one item, `work` runs in this process.

    Yields:
        Index of an item, and its result.

    Raises:
        RunFailure: a worker process was killed.
        Exception: raised by `work`.

    Example:
        >>> sorted(parallel_map(abs, [-3, 2], jobs=1))
        [(0, 3), (1, 2)]
    """
    jobs = min(jobs, len(items))
    if jobs <= 1:
        for index, item in enumerate(items):
            yield index, work(item)
        return
    # Spawned, not forked: forking is unsafe when the caller has threads (torch, BLAS).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_exit_with_parent)
    function = getattr(work, "func", work)  # of a partial
    needs_script = getattr(function, "__module__", "") == "__main__"
    try:
        with nullcontext() if needs_script else _without_script():
            waiting = {pool.submit(work, item): index for index, item in enumerate(items)}
        for done in as_completed(waiting):
            yield waiting.pop(done), done.result()
    except BrokenProcessPool as error:
        raise RunFailure(
            "A process was killed, most likely for lack of memory: repeat the command with fewer "
            "--jobs; finished work is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def map_cases(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, progress: Progress, title: str
) -> list[Result]:
    """Apply `work` to cases in parallel, as a stage of the progress display.

    Args:
        work: as for `parallel_map`.
        items: one per case.
        jobs: number of processes.
        progress: progress display.
        title: name of the stage.

    Returns:
        The results in the order of the items.

    Raises:
        Exception: as for `parallel_map`.
    """
    progress.stage(title, len(items), unit="case")
    found: dict[int, Result] = {}
    for index, result in parallel_map(work, items, jobs):
        found[index] = result
        progress.update(len(found))
    return [found[index] for index in range(len(items))]


@contextmanager
def _without_script() -> Iterator[None]:
    """Keep new processes from running the user's script, which may have no `__main__` guard."""
    script = vars(sys.modules["__main__"])
    names: list[str] = [name for name in ("__file__", "__spec__") if name in script]
    hidden = {name: script.pop(name) for name in names}
    script["__spec__"] = None
    try:
        yield
    finally:
        script.update(hidden)


def _exit_with_parent() -> None:
    """Initialise a worker: exit silently on Ctrl-C and when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
