"""Workers of a sweep as SLURM jobs: submit, monitor, replace and cancel them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glua_bench.console import own_command
from glua_bench.documents import Table, load_json, read_document
from glua_bench.errors import ConfigError, RunFailure, complaint
from glua_bench.files import storing
from glua_bench.sweeps.job import WorkerJob, exit_file
from glua_bench.sweeps.launch import DEATHS, finished_trials
from glua_bench.sweeps.study import SweepStudy

LOOK_SECONDS = 5.0
END_SECONDS = 120.0  # time for cancelled jobs to save their work
NAMES = ("partition", "account", "qos", "constraint")
TIME_LIMITS = 1000  # how often a job may reach its limit and be requeued


@dataclass(frozen=True)
class Resources:
    """Resources of a worker's job.

    Attributes:
        hours: time limit of a job; a job that reaches it is requeued and continues.
        partition: partition; None uses the cluster's default, as for the next three.
        account: account to charge.
        qos: quality of service.
        constraint: required node features.
        gpus: GPUs per worker.
        cpus: CPUs per worker.
        memory_gb: memory per worker; None uses the cluster's default.
        at_once: maximum number of concurrent jobs; None for no limit.
        save_seconds: time before the limit at which a worker saves its work.
        setup: shell commands to run before a worker starts, e.g. `module load cuda`.
        extra: further sbatch options by their long names.
    """

    hours: float
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 0
    cpus: int = 1
    memory_gb: float | None = None
    at_once: int | None = None
    save_seconds: int = 120
    setup: tuple[str, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()

    def parameters(self, name: str) -> dict[str, Any]:
        """Return the parameters of submitit's AutoExecutor for jobs with a name."""
        made = {
            "name": name,
            "timeout_min": max(1, round(60 * self.hours)),
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem_gb": self.memory_gb,
            **{f"slurm_{entry}": getattr(self, entry) for entry in NAMES},
            "slurm_array_parallelism": self.at_once,
            "slurm_signal_delay_s": self.save_seconds,
            "slurm_setup": list(self.setup) or None,
            # Since SLURM 22.05, srun does not inherit this from sbatch.
            "slurm_srun_args": [f"--cpus-per-task={self.cpus}"],
            "slurm_additional_parameters": {"requeue": True, **dict(self.extra)},
        }
        return {key: value for key, value in made.items() if value is not None}


def read(file: Path, devices: int = 1) -> Resources:
    """Read the resources from a YAML file.

    Args:
        file: the file.
        devices: GPUs per run.

    Raises:
        ConfigError: an entry is invalid; the message gives the line.
    """
    text = read_document(file)
    extra = text.table("extra")
    made = Resources(
        hours=_above(text, "hours", float, 0.0),
        **{name: text.take(name, str, None) for name in NAMES},
        gpus=_above(text, "gpus", int, -1, 0),
        cpus=_above(text, "cpus", int, 0, 1),
        memory_gb=_above(text, "memory_gb", float, 0.0, None),
        at_once=_above(text, "at_once", int, 0, None),
        save_seconds=_above(text, "save_seconds", int, 0, 120),
        setup=tuple(text.texts("setup", [])),
        extra=tuple((name, extra.take(name, object)) for name in extra.names()) if extra else (),
    )
    text.finish()
    if 0 < made.gpus < devices:
        raise text.error(f"gpus: {made.gpus} is less than --devices {devices}; increase it", "gpus")
    if made.save_seconds >= 3600 * made.hours:
        raise text.error(
            f"save_seconds: {made.save_seconds} is not below the time limit of {made.hours:g} "
            "hours; decrease it, or increase hours",
            "save_seconds" if "save_seconds" in text else "hours",
        )
    return made


def _above(text: Table, name: str, kind: type, bound: float, *default: Any) -> Any:
    value = text.take(name, kind, *default)
    if value is not None and value <= bound:
        least = f"at least {bound + 1:g}" if kind is int else f"above {bound:g}"
        raise text.error(f"'{name}' must be {least}, not {value:g}", name)
    return value


# -- jobs -----------------------------------------------------------------------------------------


@dataclass
class Jobs:
    """The workers of a sweep that run as jobs, including those of an earlier command.

    Attributes:
        study: study to work on.
        words: arguments of `glua-bench` that start a worker.
        count: number of workers.
        resources: resources of each worker.
        show: called repeatedly while they work.
        report: receives messages for the user.
    """

    study: SweepStudy
    words: Sequence[str]
    count: int
    resources: Resources
    show: Callable[[], None] = lambda: None
    report: Callable[[str], None] = lambda line: None
    _ids: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Directory of submitit's files and the jobs' output."""
        return (self.study.folder / "jobs").absolute()

    def begin(self) -> None:
        """Submit missing workers as one array job.

        Raises:
            ConfigError: there is no SLURM, or it rejects the job.
        """
        queued = self._queued()
        self._ids = [number for number in self._submitted() if number in queued]
        if self._ids:
            self.report(f"jobs {', '.join(self._ids)} of an earlier command continue")
        if len(self._ids) < self.count:
            self._submit(self.count - len(self._ids))

    def run(self) -> None:
        """Wait until the study is finished, replacing lost jobs.

        Raises:
            ConfigError: as for `begin`.
            RunFailure: a worker failed, or jobs die repeatedly.
            KeyboardInterrupt: interrupted by the user; jobs are cancelled after saving their work.
        """
        try:
            self.begin()
            finished, deaths = finished_trials(self.study), 0
            while self._ids:
                self.show()
                time.sleep(LOOK_SECONDS)
                queued = self._queued()
                ended = [number for number in self._ids if number not in queued]
                self._ids = [number for number in self._ids if number in queued]
                lost = sum(self._lost(number) for number in ended)
                if not lost:
                    continue
                before, finished = finished, finished_trials(self.study)
                deaths = lost if finished > before else deaths + lost
                if deaths >= DEATHS:
                    raise RunFailure(
                        f"{deaths} jobs ended early and no trial was finished; see {self.folder}, "
                        "check memory and time limits, and repeat the command."
                    )
                self._submit(lost)
            self.show()
        finally:
            self._end()

    def _lost(self, number: str) -> bool:
        """Return True if an ended job must be replaced.

        Raises:
            RunFailure: its worker failed, as all others will.
        """
        from submitit import SlurmJob

        try:  # not submitit's result, which is a pickle
            code = load_json(exit_file(self.folder, number).read_text(encoding="utf-8"))["code"]
        except (OSError, ValueError, TypeError, KeyError):  # killed, out of memory, or cancelled
            return True
        if code:
            log = SlurmJob(self.folder, number).paths.stderr
            said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            raise RunFailure(f"A worker failed: {complaint(said, f'see {log}')}")
        return False

    def _submitted(self) -> list[str]:
        """Return the jobs submitted by this and earlier commands."""
        try:
            return (self.folder / "submitted.txt").read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return []

    def _submit(self, count: int) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "--executor slurm needs submitit, which is not installed; pip install "
                "'glua-bench[cluster]'."
            ) from error
        self._keep_private()
        payload = WorkerJob(own_command(*self.words), self.folder)
        try:
            executor = submitit.AutoExecutor(
                self.folder,
                cluster="slurm",
                slurm_max_num_timeout=TIME_LIMITS,
                slurm_python=_python(),
            )
            executor.update_parameters(**self.resources.parameters(f"sweep-{self.study.name}"))
            with executor.batch():
                jobs = [executor.submit(payload) for _ in range(count)]
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            raise ConfigError(
                f"SLURM rejects the job ({_reason(error)}); correct the file of --slurm, or use "
                "--executor local."
            ) from error
        numbers = [job.job_id for job in jobs]
        with (self.folder / "submitted.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{number}\n" for number in numbers)
        self._ids += numbers
        self.report(f"submitted {', '.join(numbers)}; their logs are in {self.folder}")

    def _keep_private(self) -> None:
        """Create the directory for this user alone.

        Jobs unpickle their payload from it, and a pickle can run any code.

        Raises:
            ConfigError: other users may write in it.
        """
        with storing(self.folder, "--runs"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = (self.folder.lstat(), self.folder.stat())  # of a link, and of its target
        if any(each.st_uid != os.getuid() for each in found):
            raise ConfigError(
                f"{self.folder} belongs to another user, whose files jobs would execute: choose "
                "another directory with --runs."
            )
        if found[1].st_mode & 0o022:
            raise ConfigError(
                f"Other users may write in {self.folder}, whose files jobs execute: run "
                f"`{shlex.join(['chmod', 'go-w', str(self.folder)])}`, and delete files there "
                "that are not yours."
            )

    def _queued(self) -> set[str]:
        """Return the user's pending and running jobs; waits while the scheduler does not respond.

        Raises:
            ConfigError: there is no SLURM.
        """
        command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
        said = False
        while True:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise ConfigError(
                    "There is no squeue on this machine; log in to the cluster, or use "
                    "--executor local."
                ) from error
            if done.returncode == 0:
                return set(done.stdout.split())
            if not self._ids:
                raise ConfigError(
                    f"SLURM does not respond ({done.stderr.strip() or 'squeue failed'}); check "
                    "its state with sinfo, or use --executor local."
                )
            if not said:
                self.report(f"SLURM does not respond ({done.stderr.strip()}); waiting")
            said = True
            time.sleep(LOOK_SECONDS)

    def _end(self) -> None:
        """Cancel jobs, and wait until they have saved their work."""
        if not self._ids:
            return
        subprocess.run(["scancel", *self._ids], stderr=subprocess.DEVNULL)
        until = time.monotonic() + END_SECONDS
        while self._queued() & set(self._ids) and time.monotonic() < until:
            time.sleep(min(1.0, LOOK_SECONDS))
        self._ids = []


def _python() -> str:
    """Return the command of Python in a job, without modules of the job's directory."""
    python = shlex.quote(sys.executable)
    if sys.version_info >= (3, 11):
        return f"{python} -P"
    # Followed by "-u -m MODULE ARGUMENT", which are arguments of this program.
    code = (
        "import sys; sys.path[:] = filter(None, sys.path); del sys.argv[:2]; import runpy; "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    return f"{python} -u -c {shlex.quote(code)}"


def _reason(error: BaseException) -> str:
    """Return the message of sbatch, which submitit appends to its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("sbatch: error:")] or lines or ["no reason"]
    return lines[-1].removeprefix("sbatch: error:").strip().rstrip(".")
