"""Workers of a sweep on one machine: started, watched, replaced, and asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glua_bench.errors import RunFailure, complaint
from glua_bench.runs.executor import environment
from glua_bench.sweeps.study import SweepStudy

LOOK_SECONDS = 1.0
END_SECONDS = 60.0  # for a worker to write its checkpoint after it was asked to end
DEATHS = 10  # of workers without a trial finished in between


@dataclass
class Worker:
    """A process and where it writes.

    Attributes:
        process: running `glua-bench worker`.
        log: its output.
    """

    process: subprocess.Popen
    log: Path


@dataclass
class Crew:
    """The workers of one machine.

    Attributes:
        study: what they work on.
        words: of the command that starts one, after `glua-bench`.
        count: how many.
        show: called again and again while they work.
        devices: GPUs of each worker.
    """

    study: SweepStudy
    words: Sequence[str]
    count: int
    show: Callable[[], None] = lambda: None
    devices: int = 1
    _workers: list[Worker] = field(default_factory=list)

    def run(self) -> None:
        """Work until the study is finished.

        Raises:
            RunFailure: workers end with an error, or die again and again.
            KeyboardInterrupt: the user asked for the end, and all workers have saved their work.
        """
        finished, deaths = self._finished(), 0
        try:
            self._workers = [self._start(index) for index in range(self.count)]
            # Not while one is alive: all may be killed between two looks.
            while any(worker.process.poll() != 0 for worker in self._workers):
                self.show()
                time.sleep(LOOK_SECONDS)
                for index, worker in enumerate(self._workers):
                    code = worker.process.poll()
                    if code is None or code == 0:
                        continue
                    if code in (1, 2):
                        said = worker.log.read_text(encoding="utf-8", errors="replace")
                        raise RunFailure(f"A worker ended: {complaint(said, f'see {worker.log}')}")
                    deaths = 0 if self._finished() > finished else deaths + 1
                    finished = self._finished()
                    if deaths >= DEATHS:
                        raise RunFailure(
                            f"{deaths} workers were killed and no trial was finished; see "
                            f"{worker.log}, look for a lack of memory, and give the same command "
                            "again."
                        )
                    self._workers[index] = self._start(index)
            self.show()
        finally:
            self._end()

    def _finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self.study.trials())

    def _start(self, index: int) -> Worker:
        log = self.study.folder / "logs" / f"worker-{index}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "glua_bench", *self.words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=worker_environment(index, self.count, self.devices),
                # Ctrl-C reaches this process alone, which asks the workers one by one.
                start_new_session=True,
            )
        return Worker(process, log)

    def _end(self) -> None:
        """Ask all workers that still run to end, and wait for their checkpoints."""
        alive = [worker for worker in self._workers if worker.process.poll() is None]
        for worker in alive:
            worker.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + END_SECONDS
        for worker in alive:
            try:
                worker.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def worker_environment(index: int, count: int, devices: int = 1) -> Mapping[str, str]:
    """The environment of one of several workers: its GPUs, or its share of the cores.

    Args:
        index: of the worker, from 0.
        count: how many workers there are.
        devices: GPUs of each worker.
    """
    changed = environment(index, count)
    gpus = torch.cuda.device_count()
    if gpus and devices > 1:
        own_gpus = (str((index * devices + place) % gpus) for place in range(min(devices, gpus)))
        changed["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus)
    if hasattr(os, "sched_getaffinity") and "CUDA_VISIBLE_DEVICES" not in changed:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[index % len(cores) :: count] if count <= len(cores) else cores
        changed["GLUA_BENCH_CORES"] = ",".join(map(str, own))
    return changed


def pin() -> None:
    """Keep this process to the cores that its starter chose."""
    cores = os.environ.get("GLUA_BENCH_CORES")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
