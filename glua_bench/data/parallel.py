"""Share the processor: parallel processes of one command, and turns of several commands."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import TypeVar

from glua_bench import cores as cores
from glua_bench.console import Progress
from glua_bench.errors import RunFailure
from glua_bench.files import hold

Item = TypeVar("Item")
Result = TypeVar("Result")

PLACE = "GLUA_BENCH_TURNS"  # variable with the directory of the turns
TURN_SECONDS = 1.0  # a change of turns costs some 20 ms
PATIENCE_SECONDS = 60.0  # longer than an update, after which a turn may end
MOST_FILES = 8  # locked for a turn
WITHOUT_SECONDS = 600.0  # without turns after a wait in vain


class Load:
    """Measures how many of this process's cores other processes keep busy, from now on.

    Args:
        file: the kernel's counters (Linux).
    """

    def __init__(self, file: Path = Path("/proc/stat")) -> None:
        self._file = file
        self._began = self._read()

    def of_others(self) -> float:
        """Return the mean number of busy cores, without this process and its ended children.

        It is 0 where the kernel does not tell.
        """
        began, now = self._began, self._read()
        if began is None or now is None or now[0] - began[0] < 0.1:
            return 0.0
        seconds, busy, own = (b - a for a, b in zip(began, now, strict=True))
        return max(0.0, (busy - own) / seconds)

    def _read(self) -> tuple[float, float, float] | None:
        """Return the time, and the seconds for which our cores and this process were busy."""
        if not hasattr(os, "sched_getaffinity"):
            return None
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        try:
            rows = [line.split() for line in self._file.read_text().splitlines()]
            # user, nice, system, idle, iowait, irq, softirq, steal: all but the idle ones.
            counted = [list(map(int, row[1:9])) for row in rows if row and row[0] in names]
        except (OSError, ValueError):
            return None
        ticks = sum(sum(row) - sum(row[3:5]) for row in counted)
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


class Turns:
    """Let processes of one user that have more threads than cores compute in turns.

    The threads of a process meet hundreds of times per update. Where two processes have a thread
    for each core, each meeting waits for a thread that the other process keeps from running, and
    both together take several times as long as one after the other. In turns, each process has its
    cores for itself for `TURN_SECONDS`. It keeps its number of threads, on which the last bits of
    its sums depend.

    A turn is a lock on one file for each core that its threads need, and a lock on another file is
    the right to collect them, so that turns are granted in order and processes with few threads
    compute side by side. Locks of killed processes are released by the kernel. Turns are a
    courtesy: a process computes without one if the files cannot be locked, or if it has waited for
    `PATIENCE_SECONDS`, as for a process that the user has stopped.

    Args:
        folder: existing directory of the lock files; default: one of this user in the temporary
            directory.

    Example:
        >>> with turns.taken(2):  # doctest: +SKIP
        ...     for batch in batches:
        ...         turns.pass_on()
        ...         update(batch)
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: ExitStack | None = None
        self._depth, self._threads = 0, 1
        self._since = 0.0
        self._without_until = -math.inf

    @contextmanager
    def taken(self, threads: int | None) -> Iterator[None]:
        """Hold a turn inside the block, which may contain further ones.

        Args:
            threads: number of threads that compute; None takes no turn.
        """
        if threads is None:
            yield
            return
        if not self._depth:
            self._threads = threads
            self._take()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._give()

    def pass_on(self) -> None:
        """Let waiting processes compute if this process's turn is over."""
        if self._held is not None and time.monotonic() - self._since >= TURN_SECONDS:
            self._give()
            self._take()

    def _give(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _take(self) -> None:
        began = time.monotonic()
        if began < self._without_until:
            return
        try:
            folder = self._folder or turns_folder()
            self._held = _collected(folder, self._threads, began + PATIENCE_SECONDS)
        except OSError:
            self._held = None
        self._since = time.monotonic()
        if self._held is None:
            self._without_until = self._since + WITHOUT_SECONDS


def turns_folder() -> Path:
    """Return the directory of the turns, which only this user can write.

    Processes that are started later find the same one, also with another temporary directory.

    Raises:
        OSError: there is none.
    """
    if not hasattr(os, "getuid"):
        raise OSError("no user ids")
    place = os.environ.get(PLACE) or f"{tempfile.gettempdir()}/glua-bench-{os.getuid()}"
    folder = Path(place)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not private")
    os.environ[PLACE] = place
    return folder


def _collected(folder: Path, threads: int, until: float) -> ExitStack | None:
    """Lock the files of as many cores as there are threads; None if not in time."""
    affinity, total = getattr(os, "sched_getaffinity", None), os.cpu_count() or 1
    own = sorted(affinity(0)) if affinity is not None else list(range(total))
    # Neighbouring cores share a file where there are many, since each lock takes some 10 µs.
    names = sorted({core * MOST_FILES // total if total > MOST_FILES else core for core in own})
    needed = min(len(names), math.ceil(threads * len(names) / len(own)))
    with ExitStack() as held, ExitStack() as queue:
        if not _held(folder / "next.lock", until, queue):
            return None
        mine: set[int] = set()
        for patience in (0.0, until):  # first those that are free
            for core in names:
                if core not in mine and len(mine) < needed:
                    mine |= {core} if _held(folder / f"core-{core}.lock", patience, held) else set()
        return held.pop_all() if len(mine) == needed else None


def _held(path: Path, until: float, stack: ExitStack) -> bool:
    """Lock a file until a stack is closed; False if it is not free in time."""
    release = hold(path, max(0.0, until - time.monotonic()))
    if release is not None:
        stack.callback(release)
    return release is not None


turns = Turns()


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
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker)
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


def _begin_worker() -> None:
    """Initialise a worker: one thread; exit silently on Ctrl-C and when the parent ends."""
    # Before numerical libraries are loaded; the workers together use all cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
