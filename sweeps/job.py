"""Payload of a cluster job: a worker that saves its work before the job must end.

submitit pickles it into the job. It imports only the standard library, so that torch is loaded
once, by the worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A worker that receives the scheduler's SIGTERM ends before its job. The job then waits to be
# killed, because SLURM does not requeue a job that exits by itself.
ANNOUNCED_SECONDS = 120.0


@dataclass
class WorkerJob:
    """A worker for submitit, which calls `checkpoint` before a preemption or a time limit.

    Attributes:
        command: command that starts the worker.
        folder: directory of the jobs, where the worker's exit code is written; None writes none.
    """

    command: Sequence[str]
    folder: Path | None = None
    _process: Any = field(default=None, repr=False)

    def __call__(self) -> int:
        """Run the worker until the study is finished; return its exit code."""
        process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, env=job_environment())
        self._process = process
        try:
            wait_for_end(process)
        finally:
            if process.poll() is None:
                process.kill()
        code = process.wait()
        if code == 128 + signal.SIGTERM:
            time.sleep(ANNOUNCED_SECONDS)
        if code < 0 or code > 128:
            # Not an exception, which submitit would store as the job's result.
            sys.exit(128 - code if code < 0 else code)
        if self.folder is not None:
            from submitit import JobEnvironment

            from glua_bench.files import write_json

            write_json(exit_file(self.folder, JobEnvironment().job_id), {"code": code})
        return code

    def checkpoint(self) -> Any:
        """Let the worker save its work and return its trial; return the job's next payload."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            wait_for_end(self._process)
        return DelayedSubmission(WorkerJob(self.command, self.folder))


def exit_file(folder: Path, job: str) -> Path:
    """Return the file with the exit code of a job's worker; a job that was killed has none."""
    return folder / f"{job}_exit.json"


def wait_for_end(process: subprocess.Popen) -> None:
    """Wait for a process, also in a signal handler that interrupts the same wait.

    `Popen.wait` would deadlock there on its lock.
    """
    if process.returncode is None:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def job_environment() -> dict[str, str]:
    """Return a worker's environment in a job, with one thread per core."""
    changed = dict(os.environ)
    cores = changed.get("SLURM_CPUS_PER_TASK")
    if cores is not None:
        changed.setdefault("OMP_NUM_THREADS", cores)
    return changed
