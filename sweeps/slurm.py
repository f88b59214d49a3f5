"""Workers of a sweep as jobs of a SLURM cluster: submitted, watched, replaced, and cancelled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glua_bench.documents import Table, read_document
from glua_bench.errors import ConfigError, RunFailure, complaint
from glua_bench.sweeps.job import WorkerJob
from glua_bench.sweeps.launch import DEATHS
from glua_bench.sweeps.study import SweepStudy

LOOK_SECONDS = 5.0
END_SECONDS = 120.0  # for cancelled jobs to save their work
TIME_LIMITS = 1000  # that a job may reach and be queued again


@dataclass(frozen=True)
class Resources:
    """What a worker's job asks SLURM for.

    Attributes:
        hours: time limit of a job; a job that reaches it is queued again and goes on.
        partition: None takes the cluster's default, as do the next ones.
        account: who pays.
        qos: quality of service.
        constraint: features that a node must have.
        gpus: of each worker.
        cpus: of each worker.
        memory_gb: of each worker; None takes the cluster's default.
        at_once: jobs that may run at once; None does not limit them.
        save_seconds: how long before the time limit a worker is asked to save its work.
        setup: lines of shell before the worker starts, e.g. `module load cuda`.
        extra: further options of sbatch, by their long names.
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
        """As submitit's AutoExecutor takes them.

        Args:
            name: of the jobs.
        """
        told = {
            "name": name,
            "timeout_min": max(1, round(60 * self.hours)),
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem_gb": self.memory_gb,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_array_parallelism": self.at_once,
            "slurm_signal_delay_s": self.save_seconds,
            "slurm_setup": list(self.setup) or None,
            # Since SLURM 22.05, srun does not take this over from sbatch.
            "slurm_srun_args": [f"--cpus-per-task={self.cpus}"],
            "slurm_additional_parameters": {"requeue": True, **dict(self.extra)},
        }
        return {key: value for key, value in told.items() if value is not None}


def read(file: Path, devices: int = 1) -> Resources:
    """What a user's YAML file asks for.

    Args:
        file: the file.
        devices: GPUs that a run needs.

    Raises:
        ConfigError: something in it cannot be used; the message names the line.
    """
    text = read_document(file)
    words = ("partition", "account", "qos", "constraint")
    made = Resources(
        hours=_above(text, "hours", float, 0.0),
        **{name: text.take(name, str, None) for name in words},
        gpus=_above(text, "gpus", int, -1, 0),
        cpus=_above(text, "cpus", int, 0, 1),
        memory_gb=_above(text, "memory_gb", float, 0.0, None),
        at_once=_above(text, "at_once", int, 0, None),
        save_seconds=_above(text, "save_seconds", int, 0, 120),
        setup=tuple(text.texts("setup", [])),
        extra=_extra(text),
    )
    text.finish()
    if 0 < made.gpus < devices:
        raise text.error(f"gpus: {made.gpus} is less than --devices {devices}; raise it", "gpus")
    if made.save_seconds >= 3600 * made.hours:
        raise text.error(
            f"workers have {made.hours:g} hours, and would be asked {made.save_seconds} s before "
            "their end to save their work; lower save_seconds, or raise hours",
            "save_seconds" if "save_seconds" in text else "hours",
        )
    return made


def _above(text: Table, name: str, kind: type, bound: float, *default: Any) -> Any:
    value = text.take(name, kind, *default)
    if value is not None and value <= bound:
        least = f"{bound + 1:g} or more" if kind is int else f"above {bound:g}"
        raise text.error(f"'{name}' must be {least}, not {value:g}", name)
    return value


def _extra(text: Table) -> tuple[tuple[str, Any], ...]:
    table = text.table("extra")
    if table is None:
        return ()
    return tuple((name, table.take(name, object)) for name in table.names())


# -- jobs -----------------------------------------------------------------------------------------


@dataclass
class Jobs:
    """The workers of a sweep that are jobs, also those that an earlier command submitted.

    Attributes:
        study: what they work on.
        words: of the command that starts a worker, after `glua-bench`.
        count: how many there shall be.
        resources: of each.
        show: called again and again while they work.
        report: receives what the user should know.
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
        """Where submitit keeps what it sends, and what the jobs write."""
        return (self.study.folder / "jobs").absolute()

    def begin(self) -> None:
        """Submit the workers that are missing, as one array.

        Raises:
            ConfigError: this is no cluster, or SLURM refuses what is asked for.
        """
        queued = self._queued()
        self._ids = [number for number in self._submitted() if number in queued]
        if self._ids:
            self.report(f"jobs {', '.join(self._ids)} of an earlier command go on")
        if len(self._ids) < self.count:
            self._submit(self.count - len(self._ids))

    def run(self) -> None:
        """Work until the study is finished.

        Raises:
            ConfigError: as `begin`.
            RunFailure: workers end with an error, or die again and again.
            KeyboardInterrupt: the user asked for the end; the jobs are cancelled, and have saved
                their work.
        """
        try:
            self.begin()
            finished, deaths = self._finished(), 0
            while self._ids:
                self.show()
                time.sleep(LOOK_SECONDS)
                queued = self._queued()
                ended = [number for number in self._ids if number not in queued]
                self._ids = [number for number in self._ids if number in queued]
                lost = sum(self._lost(number) for number in ended)
                if not lost:
                    continue
                deaths = lost if self._finished() > finished else deaths + lost
                finished = self._finished()
                if deaths >= DEATHS:
                    raise RunFailure(
                        f"{deaths} jobs ended early and no trial was finished; see {self.folder}, "
                        "look for a lack of memory or time, and give the same command again."
                    )
                self._submit(lost)
            self.show()
        finally:
            self._end()

    def _finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self.study.trials())

    def _lost(self, number: str) -> bool:
        """Whether a job that is gone left a worker's place empty.

        Raises:
            RunFailure: its worker ended with an error, as all others will.
        """
        from submitit import SlurmJob

        paths = SlurmJob(self.folder, number).paths
        if not paths.result_pickle.exists():  # killed, out of memory, or cancelled by somebody
            return True
        outcome, code = _result(paths.result_pickle)
        if outcome == "success" and code:
            log = paths.stderr
            said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            raise RunFailure(f"A worker ended: {complaint(said, f'see {log}')}")
        return bool(outcome != "success")

    def _submitted(self) -> list[str]:
        """The jobs that this command and earlier ones submitted."""
        try:
            return (self.folder / "submitted.txt").read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return []

    def _submit(self, count: int) -> None:
        submitit = _submitit()
        command = [sys.executable, "-m", "glua_bench", *self.words]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            executor = submitit.AutoExecutor(
                self.folder, cluster="slurm", slurm_max_num_timeout=TIME_LIMITS
            )
            executor.update_parameters(**self.resources.parameters(f"sweep-{self.study.name}"))
            with executor.batch():
                jobs = [executor.submit(WorkerJob(command)) for _ in range(count)]
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            raise ConfigError(
                f"SLURM takes no job ({_reason(error)}); change the file behind --slurm, or use "
                "--executor local."
            ) from error
        numbers = [job.job_id for job in jobs]
        with (self.folder / "submitted.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{number}\n" for number in numbers)
        self._ids += numbers
        self.report(f"submitted {', '.join(numbers)}; their logs are in {self.folder}")

    def _queued(self) -> set[str]:
        """The user's jobs that wait or run. A scheduler that does not answer is waited for.

        Raises:
            ConfigError: there is no SLURM here.
        """
        command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
        said = False
        while True:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise ConfigError(
                    "There is no squeue on this machine, so no SLURM; log in to the cluster, or "
                    "use --executor local."
                ) from error
            if done.returncode == 0:
                return set(done.stdout.split())
            if not self._ids:
                raise ConfigError(
                    f"SLURM does not answer ({done.stderr.strip() or 'squeue failed'}); ask for "
                    "its state by sinfo, or use --executor local."
                )
            if not said:
                self.report(f"SLURM does not answer ({done.stderr.strip()}); waiting for it")
            said = True
            time.sleep(LOOK_SECONDS)

    def _end(self) -> None:
        """Cancel what still runs, and wait until it has saved its work."""
        if not self._ids:
            return
        subprocess.run(["scancel", *self._ids], stderr=subprocess.DEVNULL)
        until = time.monotonic() + END_SECONDS
        while self._queued() & set(self._ids) and time.monotonic() < until:
            time.sleep(min(1.0, LOOK_SECONDS))
        self._ids = []


def _result(path: Path) -> tuple[str, Any]:
    import pickle

    with path.open("rb") as file:
        outcome, value = pickle.load(file)
    return str(outcome), value


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            "--executor slurm needs submitit, which is not installed; pip install "
            "'glua-bench[cluster]'."
        ) from error
    return submitit


def _reason(error: BaseException) -> str:
    """What sbatch wrote, which submitit puts behind its own words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("sbatch: error:")] or lines
    return told[-1].removeprefix("sbatch: error:").strip().rstrip(".") if told else "no reason"
