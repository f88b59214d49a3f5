"""Execute the runs of a matrix, several at once, each in its own process.

Several processes can share a matrix: a run is claimed by a file lock, which the kernel releases
when its holder ends. A run that a killed process has left behind is resumed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from glua_bench.console import duration
from glua_bench.errors import RunFailure, complaint
from glua_bench.files import try_lock, write_text
from glua_bench.runs.matrix import Planned
from glua_bench.runs.plan import PlannedRun
from glua_bench.scoring.evaluation import mean_score
from glua_bench.scoring.metrics import PRIMARY

CLAIMS = ".claims"  # directory for locks and requests of runs, in the directory of all runs
POLL_SECONDS = 1.0  # between checks of runs that another process executes
ATTEMPTS = 2  # attempts at a run whose process ends without a reason


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
        retry_failed: restart runs that failed earlier.
        report: receives a line when a run begins or ends.
        start: executes a run with an environment and returns exit code and stderr.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        jobs: int = 1,
        retry_failed: bool = False,
        report: Callable[[str], None] = lambda line: None,
        start: Callable[[PlannedRun, Mapping[str, str]], tuple[int, str]] | None = None,
    ) -> None:
        self.planned, self.jobs, self.report = list(planned), jobs, report
        self.start = start or start_process
        self.outcome = Outcome()
        self._lock = threading.Lock()
        self._waiting: deque[Planned] = deque()  # thread-safe
        self._attempts: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._interrupted = False
        self._began = time.monotonic()
        for item in self.planned:
            if item.state == "done":
                self.outcome.before += 1
            elif item.state == "failed" and not retry_failed:
                self.outcome.failed[item.run.id] = str(item.run.directory.failed)
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
                claim = item.run.request.runs_root / CLAIMS / f"{item.run.id}.lock"
                with try_lock(claim, "--runs") as mine:
                    if mine and not running(item.run):
                        self._execute(item, index)
                        continue
                # Another process executes it, possibly an orphan: check again after the others.
                if item.run.directory.done:
                    self._end("elsewhere")
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
            self._end("elsewhere")
            return
        config = item.run.config
        name = f"{item.cell.entry}, {item.cell.task}, seed {config.seed}"
        name += f", repeat {config.perturbation}" if config.perturbation else ""
        self.report(f"begin  {name}")
        began = time.monotonic()
        code, errors = self.start(item.run, environment(index, self.jobs))
        if item.run.directory.done:
            cases = item.run.directory.read_cases()
            score = mean_score(cases[cases["selector"] == config.selectors[0]])
            result = f"{PRIMARY.title} {PRIMARY.text(score)}"
            self._end("ran", f"{name}: {result}, {duration(time.monotonic() - began)}")
            return
        if running(item.run):  # started by hand at the same time
            self._waiting.append(item)
            return
        self._attempts[item.run.id] += 1
        recorded = item.run.directory.failed
        # Killed, or ended because the run's lock was held by a process that has ended since.
        unexplained = code < 0 or (code == RunFailure.exit_code and recorded is None)
        if unexplained and self._attempts[item.run.id] < ATTEMPTS:
            self.report(f"{'killed' if code < 0 else 'again '} {name}; resumed")
            self._waiting.appendleft(item)
            return
        reason = recorded or complaint(errors)
        with self._lock:
            self.outcome.failed[item.run.id] = reason
        self.report(f"FAILED {name}: {reason}")

    def _end(self, how: str, text: str = "") -> None:
        with self._lock:
            self.outcome.ran += how == "ran"
            self.outcome.elsewhere += how == "elsewhere"
            failed = len(self.outcome.failed) - self._failed_before
            ended = self.outcome.ran + self.outcome.elsewhere + failed
            left = len(self._waiting)
            mean = (time.monotonic() - self._began) / max(1, self.outcome.ran)
        if text:
            rest = f", about {duration(mean * left)} left" if left else ""
            self.report(f"done   {text} ({ended} of {self._total}{rest})")


def environment(index: int, jobs: int) -> dict[str, str]:
    """Return the environment of one of several processes: its share of the cores, and its GPU."""
    changed = dict(os.environ)
    if gpus := torch.cuda.device_count():
        changed["CUDA_VISIBLE_DEVICES"] = str(index % gpus)
    changed.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return changed


def start_process(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
    """Execute a run in its own process, and return exit code and stderr."""
    done = subprocess.run(
        child_command(run),
        env=dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
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
    return [sys.executable, "-m", "glua_bench", "run-request", str(file)]
