"""Execute the runs of a matrix, several at once, each in its own process.

Several processes can share a matrix: a run is claimed by a file lock, which the kernel releases
when its holder ends. A run that a killed process has left behind is resumed.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glua_bench import OWN_THREADS, cores
from glua_bench.console import duration, own_command
from glua_bench.errors import ERROR, RunFailure, UserError, complaint, death
from glua_bench.files import try_lock, write_text
from glua_bench.runs.matrix import Planned
from glua_bench.runs.plan import LOST_CODE, PlannedRun
from glua_bench.runs.timing.display import Running, State, position, seconds_left
from glua_bench.runs.timing.parts import parts_of
from glua_bench.scoring.evaluation import mean_score
from glua_bench.scoring.metrics import PRIMARY

CLAIMS = ".claims"  # directory for locks and requests of runs, in the directory of all runs
POLL_SECONDS = 1.0  # between checks of runs that another process executes
SHARED_SECONDS = 5.0  # between checks which of the waiting runs others execute or have finished
ATTEMPTS = 2  # attempts at a run whose process ends without a reason


@dataclass(frozen=True)
class _Seen:
    """A run that is being executed: when it was first seen, and its share done by then."""

    item: Planned
    at: float
    before: float
    here: bool


@dataclass
class Outcome:
    """Result of executing a matrix.

    Attributes:
        ran: runs executed by this process.
        before: runs that were already done.
        elsewhere: runs finished by another process.
        failed: run → reason, including earlier failures that were not retried.
    """

    ran: int = 0
    before: int = 0
    elsewhere: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Executor:
    """Execute the open runs of a matrix.

    Args:
        planned: the matrix.
        jobs: number of concurrent runs, each on its own GPU if there are any, else with an equal
            share of the CPU cores.
        retry_failed: restart runs that failed earlier or are damaged.
        report: receives a line when a run begins or ends.
        show: receives the function `state` several times a second.
        start: executes a run with an environment and returns exit code and stderr.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        jobs: int = 1,
        retry_failed: bool = False,
        report: Callable[[str], None] = lambda line: None,
        start: Callable[[PlannedRun, Mapping[str, str]], tuple[int, str]] | None = None,
        show: Callable[[Callable[[], State]], None] = lambda state: None,
    ) -> None:
        self.planned, self.jobs, self.report, self.show = list(planned), jobs, report, show
        self.start = start or start_process
        self.outcome = Outcome()
        self._lock = threading.Lock()
        self._waiting: deque[Planned] = deque()  # thread-safe
        self._attempts: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._interrupted = False
        self._seen: dict[str, _Seen] = {}  # run → a run that is being executed, here or elsewhere
        self._done: set[str] = set()
        self._timed: set[str] = set()  # finished runs whose duration has been looked up
        self._seconds: dict[str, float] = {}  # finished run → its duration
        self._overheads: list[float] = []  # of runs started here: seconds around their parts
        self._looked = -math.inf
        for item in self.planned:
            if item.state == "done":
                self.outcome.before += 1
                self._done.add(item.run.id)
            elif item.state == "failed" and not retry_failed:
                self.outcome.failed[item.run.id] = str(item.reason)
            else:
                self._waiting.append(item)
        self._total = len(self._waiting)
        self._failed_before = len(self.outcome.failed)

    def run(self) -> Outcome:
        """Execute all open runs, and wait for those of other processes.

        Raises:
            RunFailure: the directory of runs cannot be written or locked.
        """
        workers = [
            threading.Thread(target=self._work, args=(index,), daemon=True)
            for index in range(min(self.jobs, max(1, self._total)))
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():  # short waits, so that Ctrl-C is handled
                    worker.join(0.2)
                    self.show(self.state)
        except BaseException:  # a notebook lives on: start no further run
            self._interrupted = True
            raise
        if self._error is not None:
            raise self._error
        for item in self.planned:  # another process may have finished what failed here
            if item.run.id in self.outcome.failed and item.run.directory.done:
                del self.outcome.failed[item.run.id]
                self.outcome.elsewhere += 1
        return self.outcome

    def _work(self, index: int) -> None:
        try:
            while (item := self._next()) is not None:
                with try_lock(_claim(item.run), "--runs") as mine:
                    if mine and not running(item.run):
                        self._execute(item, index)
                        continue
                # Another process executes it, possibly an orphan: check again after the others.
                if item.run.directory.done:
                    self._end("elsewhere", item)
                else:
                    self._waiting.append(item)
                    time.sleep(POLL_SECONDS)
        except BaseException as error:  # raised again by `run`
            self._error = error

    def _next(self) -> Planned | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self._interrupted else None

    def _execute(self, item: Planned, index: int) -> None:
        if item.run.directory.done:  # finished by another process in the meantime
            self._end("elsewhere", item)
            return
        config, name = item.run.config, _name(item)
        if problem := item.run.directory.problem:
            self.report(f"mend   {name}: damaged ({problem})")
        self.report(f"begin  {name}")
        began = time.monotonic()
        before = position(item.run)[1]
        self._seen[item.run.id] = _Seen(item, began, before, here=True)
        try:
            code, errors = self.start(item.run, environment(index, self.jobs))
        finally:
            self._seen.pop(item.run.id, None)
        for line in errors.splitlines():
            if line.startswith("warning: "):
                self.report(f"{name}: {line}")
        if item.run.directory.done:
            took = time.monotonic() - began
            parts = parts_of(item.run.directory.read_summary())
            if parts and not before:
                self._overheads.append(max(0.0, took - sum(parts.values())))
            cases = item.run.directory.read_cases()
            score = mean_score(cases[cases["selector"] == config.selectors[0]])
            result = f"{PRIMARY.title} {PRIMARY.text(score)}"
            self._end("ran", item, f"{name}: {result}, {duration(took)}")
            return
        if running(item.run):  # started by hand at the same time
            self._waiting.append(item)
            return
        self._attempts[item.run.id] += 1
        recorded = item.run.directory.failed
        # Killed, or ended because the run's lock was held by a process that has ended since.
        killed = code < 0 or code == LOST_CODE
        unexplained = killed or (code == RunFailure.exit_code and recorded is None)
        if unexplained and self._attempts[item.run.id] < ATTEMPTS:
            self.report(f"{'killed' if killed else 'again '} {name}; resumed")
            self._waiting.appendleft(item)
            return
        told = code >= 0 or ERROR in errors  # by the process, or by another one of the run
        reason = recorded or (complaint(errors) if told else death(code))
        with self._lock:
            self.outcome.failed[item.run.id] = reason
        self.report(f"FAILED {name}: {reason}")

    def _end(self, how: str, item: Planned, text: str = "") -> None:
        with self._lock:
            self._done.add(item.run.id)
            self._looked = -math.inf  # its duration is known now
            self.outcome.ran += how == "ran"
            self.outcome.elsewhere += how == "elsewhere"
            failed = len(self.outcome.failed) - self._failed_before
            ended = self.outcome.ran + self.outcome.elsewhere + failed
        if text:
            left = self.state().left
            rest = f", {left}" if left else ""
            self.report(f"done   {text} ({ended} of {self._total}{rest})")

    # -- what is shown -----------------------------------------------------------------------------

    def state(self) -> State:
        """Return how many runs are done, which are running, and the time left."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked >= SHARED_SECONDS:
                self._looked = now
                self._look_around(now)
            # Workers change both without the lock; a list is copied at once.
            seen = [one for run, one in list(self._seen.items()) if run not in self._done]
            shown = {one.item.run.id for one in seen} | self._done
            waiting = [item for item in list(self._waiting) if item.run.id not in shown]
            failed = len(self.outcome.failed)
        usual = self._usual_seconds()
        listed: list[Running] = []
        expected: list[tuple[float, float, float]] = []
        for one in sorted(seen, key=lambda one: (not one.here, one.at)):
            place, share = position(one.item.run)
            elapsed, made = now - one.at, share - one.before
            # Extrapolated from the updates that the run has made since it was seen to start.
            whole = elapsed / made if made > 0 else math.nan
            listed.append(Running(_name(one.item), place, elapsed, one.here))
            expected.append((elapsed, one.before, usual.get(_alike(one.item), whole)))
        known = [whole for _, _, whole in expected if not math.isnan(whole)]
        known += self._seconds.values()
        mean = sum(known) / len(known) if known else math.nan
        left = seconds_left(
            [
                (elapsed, before, mean if math.isnan(whole) else whole)
                for elapsed, before, whole in expected
            ],
            [usual.get(_alike(item), mean) for item in waiting],
        )
        return State(len(self._done), failed, len(self.planned), listed, left)

    def _usual_seconds(self) -> dict[tuple[str, str], float]:
        """Return the mean duration of the finished runs of each row and task."""
        known: dict[tuple[str, str], list[float]] = {}
        for item in self.planned:
            if item.run.id in self._seconds:
                known.setdefault(_alike(item), []).append(self._seconds[item.run.id])
        overheads = list(self._overheads)
        overhead = sum(overheads) / max(1, len(overheads))
        return {alike: sum(own) / len(own) + overhead for alike, own in known.items()}

    def _look_around(self, now: float) -> None:
        """Find finished runs with their duration, and runs that other processes execute."""
        for item in self.planned:
            if item.run.id not in self._done and item.run.directory.done:
                self._done.add(item.run.id)
        ended = self._done - self._timed
        for item in self.planned:
            if item.run.id in ended:
                self._timed.add(item.run.id)
                # By its parts, since several processes executed a resumed run.
                with contextlib.suppress(UserError):
                    parts = parts_of(item.run.directory.read_summary())
                    self._seconds |= {item.run.id: sum(parts.values())} if parts else {}
        for item in list(self._waiting):
            known = self._seen.get(item.run.id)
            if known is not None and known.here:
                continue
            # A momentary lock makes another process skip the run and come back to it.
            with try_lock(_claim(item.run), "--runs") as free:
                if free:
                    self._seen.pop(item.run.id, None)
                elif known is None:
                    before = position(item.run)[1]
                    self._seen[item.run.id] = _Seen(item, now, before, here=False)


def _alike(item: Planned) -> tuple[str, str]:
    """Return row and task of a run; runs that share them take about as long."""
    return item.cell.entry, item.cell.task


def _name(item: Planned) -> str:
    """Return row, task and seed of a run."""
    config = item.run.config
    name = f"{item.cell.entry}, {item.cell.task}, seed {config.seed}"
    return name + (f", repeat {config.perturbation}" if config.perturbation else "")


def _claim(run: PlannedRun) -> Path:
    """Return the lock file of the process that executes a run."""
    return run.request.runs_root / CLAIMS / f"{run.id}.lock"


def environment(index: int, jobs: int) -> dict[str, str]:
    """Return the environment of one of several processes: its share of the cores, and its GPU."""
    changed = dict(os.environ)
    if gpus := torch.cuda.device_count():
        changed["CUDA_VISIBLE_DEVICES"] = str(index % gpus)
    if changed.get("OMP_NUM_THREADS") in (None, OWN_THREADS):
        changed["OMP_NUM_THREADS"] = str(max(1, cores() // jobs))
    return changed


def start_process(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
    """Execute a run in its own process, and return exit code and stderr."""
    done = subprocess.run(
        child_command(run),
        env=dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stderr


def running(run: PlannedRun) -> bool:
    """Return True if a process is executing the run."""
    path = run.directory.path
    if not path.is_dir():
        return False
    with try_lock(path / ".lock") as free:
        return not free


def child_command(run: PlannedRun) -> list[str]:
    """Write a run's request to a file, and return the command that executes it."""
    file = run.request.runs_root / CLAIMS / f"{run.id}.json"
    write_text(file, run.request.to_json(), "--runs")
    return own_command("run-request", str(file))
