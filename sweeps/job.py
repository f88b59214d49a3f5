"""What a job of a cluster runs: a worker, asked to save its work before the job must end.

submitit sends this to the job, where nothing is imported but the standard library, so that the
worker alone pays for torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# A worker that hears the scheduler's SIGTERM ends before its job does. The job then waits, because
# SLURM does not queue a job again that ended by itself, however politely.
ANNOUNCED_SECONDS = 120.0


@dataclass
class WorkerJob:
    """A worker for submitit, which calls `checkpoint` before a preemption or a time limit.

    Attributes:
        command: starts the worker.
    """

    command: Sequence[str]
    _process: Any = field(default=None, repr=False)

    def __call__(self) -> int:
        """Work until the study is finished; the worker's exit code where it ended by itself."""
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
            # No exception, which submitit would keep as the job's result: it has none.
            sys.exit(128 - code if code < 0 else code)
        return code

    def checkpoint(self) -> Any:
        """Let the worker save its work and give its trial back; what the job runs afterwards."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            wait_for_end(self._process)
        return DelayedSubmission(WorkerJob(self.command))


def wait_for_end(process: subprocess.Popen) -> None:
    """Wait for a process, also from a signal handler that interrupts the same wait.

    `Popen.wait` holds a lock meanwhile, on which the handler would wait forever.
    """
    if process.returncode is None:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def job_environment() -> dict[str, str]:
    """The environment of a worker in a job: as many threads as the job has cores."""
    changed = dict(os.environ)
    cores = changed.get("SLURM_CPUS_PER_TASK")
    if cores is not None:
        changed.setdefault("OMP_NUM_THREADS", cores)
    return changed
