"""Workers of a sweep on one machine: start, monitor, replace and stop them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glua_bench.console import own_command
from glua_bench.errors import RunFailure, complaint
from glua_bench.runs.executor import environment
from glua_bench.sweeps.study import LOST, SweepStudy, counting

LOOK_SECONDS = 1.0
END_SECONDS = 60.0  # time for a stopped worker to write its checkpoint
DEATHS = 10  # killed workers without a finished trial in between


@dataclass
class Worker:
    """A worker process.

    Attributes:
        process: `glua-bench worker`.
        log: file of its output.
    """

    process: subprocess.Popen
    log: Path


@dataclass
class Crew:
    """The workers of one machine.

    Attributes:
        study: study to work on.
        words: arguments of `glua-bench` that start a worker.
        count: number of workers.
        show: called repeatedly while they work.
        devices: GPUs per worker.
    """

    study: SweepStudy
    words: Sequence[str]
    count: int
    show: Callable[[], None] = lambda: None
    devices: int = 1
    _workers: list[Worker] = field(default_factory=list)

    def run(self) -> None:
        """Wait until the study is finished, replacing killed workers.

        Raises:
            RunFailure: a worker failed, or workers are killed repeatedly.
            KeyboardInterrupt: interrupted by the user; all workers have saved their work.
        """
        finished, deaths = finished_trials(self.study), 0
        try:
            self._workers = [self._start(index) for index in range(self.count)]
            # Do not test for live workers: all may be killed between two iterations.
            while any(worker.process.poll() != 0 for worker in self._workers):
                self.show()
                time.sleep(LOOK_SECONDS)
                for index, worker in enumerate(self._workers):
                    code = worker.process.poll()
                    if code is None or code == 0:
                        continue
                    if code in (1, 2):
                        said = worker.log.read_text(encoding="utf-8", errors="replace")
                        raise RunFailure(f"A worker failed: {complaint(said, f'see {worker.log}')}")
                    before, finished = finished, finished_trials(self.study)
                    deaths = 0 if finished > before else deaths + 1
                    if deaths >= DEATHS:
                        raise RunFailure(
                            f"{deaths} workers were killed and no trial was finished; see "
                            f"{worker.log}, check the memory, and repeat the command."
                        )
                    self._workers[index] = self._start(index)
            self.show()
        finally:
            self._end()

    def _start(self, index: int) -> Worker:
        log = self.study.folder / "logs" / f"worker-{index}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                own_command(*self.words),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=worker_environment(index, self.count, self.devices),
                # Only this process receives Ctrl-C, and stops the workers.
                start_new_session=True,
            )
        return Worker(process, log)

    def _end(self) -> None:
        """Stop running workers, and wait for their checkpoints."""
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


def finished_trials(study: SweepStudy) -> int:
    """Return the number of trials that have ended, without those whose workers were killed."""
    ended = (t for t in counting(study.trials()) if t.state.is_finished())
    return sum(LOST not in trial.user_attrs for trial in ended)


def worker_environment(index: int, count: int, devices: int = 1) -> Mapping[str, str]:
    """Return the environment of a worker with its GPUs, or its share of the cores.

    Args:
        index: index of the worker, from 0.
        count: number of workers.
        devices: GPUs per worker.
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
    """Pin this process to the cores given by its environment."""
    cores = os.environ.get("GLUA_BENCH_CORES")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
