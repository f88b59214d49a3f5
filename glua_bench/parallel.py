"""Work over processes: results as they come, and nothing left behind when it ends early."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from threading import Thread
from typing import TypeVar

from glua_bench.errors import RunFailure

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processor cores that this process may use; not every system knows an affinity."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Results of `work` over items, in the order in which they are ready.

    Memory does not grow with the number of items, apart from the items themselves. Whatever ends
    the loop early, an error, an interruption or the death of this process, ends the others too.

    Args:
        work: a function of a module, so that other processes can find it.
        items: what it is called with; picklable, as results are.
        jobs: processes; with 1, or one item, all is done in this one.

    Yields:
        Place of an item, and its result.

    Raises:
        RunFailure: a process was killed.
        Exception: what `work` raised.

    Example:
        >>> sorted(side_by_side(abs, [-3, 2], jobs=1))
        [(0, 3), (1, 2)]
    """
    jobs = min(jobs, len(items))
    if jobs <= 1:
        for place, item in enumerate(items):
            yield place, work(item)
        return
    # Spawned, not forked: the caller may hold threads (torch, BLAS) that a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_follow)
    try:
        waiting = {pool.submit(work, item): place for place, item in enumerate(items)}
        for done in as_completed(waiting):
            yield waiting.pop(done), done.result()
    except BrokenProcessPool as error:
        raise RunFailure(
            "A process was killed, most likely because memory was short: give the same command "
            "again with fewer --jobs; what is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow() -> None:
    """In a new process: end quietly with Ctrl-C, and with the process that began it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
