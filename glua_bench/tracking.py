"""The run directory is the truth; MLflow mirrors it.

Everything that a run leaves behind lies in one directory, written so that a killed process
leaves either the old file or the new one. `MLflowMirror` copies finished directories to a
tracker as often as one likes, without doubles, and never harms a run when the tracker is
down. `fetch_runs` is the way back: the copies become directories again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pkgutil
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from glua_bench.config import PRESETS, RunConfig, SegmenterSpec, digest, flat_settings
from glua_bench.console import next_command
from glua_bench.errors import (
    ConfigError,
    RunFailure,
    UserError,
    reason,
    shortened,
    without_password,
)
from glua_bench.files import (
    drop_torn_line,
    exclusive,
    new_folder,
    replacing,
    sha256,
    storing,
    sweep,
    try_lock,
    write_json,
    write_text,
)
from glua_bench.metrics import METRICS
from glua_bench.paths import ARTIFACTS, distinct, entries, matching

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

Answer = TypeVar("Answer")
FLUSH_SECONDS = 2.0
TIME = "%Y-%m-%dT%H:%M:%S%z"  # how a time is written in JSON
# What a copy holds of a directory, besides what is `DRAWN` or `CARRIED`, `cases.csv` and the list
# of digests. Not the weights, which are large.
COPIED = (
    "config.yaml",
    "environment.json",
    "summary.json",
    "cases.parquet",
    "metrics.parquet",
    "done",
)
CARRIED = r"dataset(_\w+)?\.(json|yaml|csv)"  # what a run keeps of its dataset; copied, too
DRAWN = r"figures/[^./\\][^/\\]*\.png|predictions/[^./\\][^/\\]*\.nii\.gz"  # copied, too
DIGESTS = "files.json"  # artifact: name of each copied file → its digest
PARENT, ENTRY = "mlflow.parentRunId", "glua_bench.entry"  # a nested run's tags
_LIBRARIES = (
    "torch",
    "lightning-fabric",
    "timm",
    "numpy",
    "scipy",
    "nibabel",
    "medpy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "mlflow",
    "optuna",
)


# --- the run directory -----------------------------------------------------------------------


class RunDirectory:
    """One run's files: `runs/<dataset>/<method>/<id>/`.

    Args:
        runs_root: the directory of all runs.
        config: what defines the run.
        run_id: its identity.
    """

    def __init__(self, runs_root: Path, config: RunConfig, run_id: str) -> None:
        self.config, self.id = config, run_id
        self.runs_root = Path(runs_root)
        self.path = self.runs_root / config.fold_name / config.method / run_id
        self._offsets: dict[str, int] = {}
        self._total = 0
        self._buffer: list[str] = []
        self._log: TextIO | None = None
        self._flushed = time.monotonic()

    # Where things lie.

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """Directory of the predicted label volumes."""
        return self.path / "predictions"

    @property
    def figures(self) -> Path:
        """Directory of the figures."""
        return self.path / "figures"

    @property
    def done(self) -> bool:
        """Whether the run is complete: `done` exists and fits the summary beside it."""
        try:
            mark = json.loads((self.path / "done").read_text(encoding="utf-8"))
            return bool(mark["summary"] == _digest_of(self.path / "summary.json"))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def failed(self) -> str | None:
        """Why the last attempt failed; None where it did not."""
        try:
            return (self.path / "failed").read_text(encoding="utf-8").strip() or "unknown reason"
        except OSError:
            return None

    # Writing.

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from this run; the lock ends with the process, even killed.

        Raises:
            RunFailure: another process holds it, or the directory cannot be written.
        """
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(try_lock(self.path / ".lock", "--runs")):
                raise RunFailure(
                    f"The run {self.path} is being run by another process; wait for it, or stop "
                    "it and give the same command again."
                )
            yield

    def start(self, environment: Mapping[str, Any], stages: Sequence[tuple[str, int]] = ()) -> None:
        """Write what the run is and where it runs; forget an earlier failure.

        Args:
            environment: as `environment()` gives it.
            stages: name and number of steps of each stage, in order; counts `total_step`.

        Raises:
            RunFailure: the disk is full or the directory cannot be written.
        """
        self._offsets, before = {}, 0
        for name, steps in stages:
            self._offsets[name] = before
            before += steps
        with storing(self.path, "--runs"):
            for directory in (self.path, self.checkpoints, self.predictions, self.figures):
                directory.mkdir(parents=True, exist_ok=True)
                sweep(directory)  # also where nothing is written again
            (self.path / "failed").unlink(missing_ok=True)
        write_text(self.path / "config.yaml", self.config.to_yaml(), "--runs")
        write_json(self.path / "environment.json", environment, "--runs")

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of one step to `log.jsonl`.

        Lines are gathered and written every few seconds, and by `flush`.

        Args:
            stage: name of the stage.
            step: updates done in the stage.
            values: name to number.

        Raises:
            RunFailure: the disk is full or the directory cannot be written.
        """
        if stage not in self._offsets:
            self._offsets[stage] = self._total
        self._total = self._offsets[stage] + step
        row = {
            "stage": stage,
            "step": step,
            "total_step": self._total,
            "time": round(time.time(), 3),
            "values": {name: float(value) for name, value in values.items()},
        }
        self._buffer.append(json.dumps(row) + "\n")
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the gathered log lines.

        Raises:
            RunFailure: the disk is full or the directory cannot be written.
        """
        self._flushed = time.monotonic()
        if not self._buffer:
            return
        path = self.path / "log.jsonl"
        with storing(path, "--runs"):
            if self._log is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                drop_torn_line(path)
                self._log = path.open("a", encoding="utf-8")
            self._log.write("".join(self._buffer))
            self._log.flush()
        self._buffer.clear()

    def close(self) -> None:
        """Write what is gathered and close the log."""
        try:
            self.flush()
        finally:
            if self._log is not None:
                self._log.close()
                self._log = None

    def rewind(self, stage: str, step: int) -> None:
        """Drop the log lines after a checkpoint, so that a resumed run logs no step twice.

        A last line that a kill tore is dropped too. `rewind(first_stage, 0)` empties the log.

        Args:
            stage: the stage that the checkpoint was written in.
            step: updates that had been done in it.

        Raises:
            RunFailure: the disk is full or the directory cannot be written.
        """
        self._buffer.clear()
        self.close()
        kept, self._total = [], 0
        for row in self._rows():
            self._offsets.setdefault(row["stage"], row["total_step"] - row["step"])
        limit = self._offsets.get(stage)
        for row in self._rows():
            own = row["stage"] == stage and row["step"] <= step
            earlier = row["stage"] != stage and (limit is None or row["total_step"] <= limit)
            if own or earlier:
                kept.append(json.dumps(row) + "\n")
                self._total = row["total_step"]
        if kept or (self.path / "log.jsonl").exists():
            write_text(self.path / "log.jsonl", "".join(kept), "--runs")

    def write_cases(self, frame: pd.DataFrame) -> None:
        """Write the table of results per case, structure and selector.

        Raises:
            RunFailure: the disk is full or the directory cannot be written.
        """
        with replacing(self.path / "cases.parquet", "--runs") as temporary:
            frame.to_parquet(temporary, index=False)

    def read_cases(self) -> pd.DataFrame:
        """The table of results per case, structure and selector.

        Raises:
            UserError: the run has none, or it cannot be read.
        """
        return self._read_table("cases.parquet")

    def read_metrics(self) -> pd.DataFrame:
        """The numbers of training: stage, step, total_step, name, value.

        Raises:
            UserError: the run has none, or they cannot be read.
        """
        return self._read_table("metrics.parquet")

    def read_summary(self) -> dict[str, Any]:
        """What `finish` was given.

        Raises:
            UserError: the run has none, or it cannot be read.
        """
        return self._read_json("summary.json")

    def read_environment(self) -> dict[str, Any]:
        """What `start` was given.

        Raises:
            UserError: the run has none, or it cannot be read.
        """
        return self._read_json("environment.json")

    def fail(self, message: str) -> None:
        """Mark the attempt as failed. Never raises: the reason of the failure matters more."""
        with contextlib.suppress(OSError, RunFailure):
            self.close()
        with contextlib.suppress(OSError, RunFailure):
            (self.path / "done").unlink(missing_ok=True)
            write_text(self.path / "failed", " ".join(message.split()) + "\n", "--runs")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the training metrics and the summary, then, last, `done`.

        Raises:
            RunFailure: the disk is full or the directory cannot be written.
        """
        import pandas as pd

        self.close()
        rows = [
            (row["stage"], row["step"], row["total_step"], name, value)
            for row in self._rows()
            for name, value in row["values"].items()
        ]
        metrics = pd.DataFrame(rows, columns=["stage", "step", "total_step", "name", "value"])
        metrics = metrics.astype({"step": "int64", "total_step": "int64", "value": "float64"})
        with replacing(self.path / "metrics.parquet", "--runs") as temporary:
            metrics.to_parquet(temporary, index=False)
        write_json(self.path / "summary.json", summary, "--runs")
        with storing(self.path, "--runs"):
            (self.path / "failed").unlink(missing_ok=True)
        mark = {
            "id": self.id,
            "time": _now(),
            "summary": _digest_of(self.path / "summary.json"),
        }
        write_json(self.path / "done", mark, "--runs")

    # Reading.

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run that lies in a directory.

        Raises:
            UserError: there is none, or its configuration cannot be read.
        """
        path = Path(path)
        try:
            config = RunConfig.from_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path} is not a run's directory (no readable config.yaml); give one that lies "
                "at runs/<dataset>/<method>/<id>."
            ) from error
        except UserError as error:
            raise UserError(
                f"{path / 'config.yaml'} is not a configuration of this version; remove the run "
                f"or use the version that wrote it ({error})"
            ) from error
        except Exception as error:  # YAML of any shape may lie there
            raise UserError(
                f"{path / 'config.yaml'} cannot be read ({type(error).__name__}); remove the run."
            ) from error
        run = cls(path.parent.parent.parent, config, path.name)
        run.path = path
        return run

    def _rows(self) -> list[dict[str, Any]]:
        try:
            lines = (self.path / "log.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        rows = []
        for line in lines.split("\n"):
            try:
                row = json.loads(line)
                rows.append(
                    {key: row[key] for key in ("stage", "step", "total_step", "time", "values")}
                )
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill
        return rows

    def _read_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        try:
            return pd.read_parquet(self.path / name)
        except (OSError, ValueError) as error:  # pyarrow's errors are children of these
            raise UserError(
                f"The run {self.path} has no readable {name}; give its command again."
            ) from error

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"The run {self.path} has no readable {name}; give its command again."
            ) from error


def list_runs(runs_root: Path) -> list[RunDirectory]:
    """All runs below a directory, sorted by path; unreadable ones are named in a warning."""
    runs = []
    for path in _run_paths(runs_root):
        try:
            runs.append(RunDirectory.open(path))
        except UserError as error:
            _warn(str(error))
    return runs


def _run_paths(runs_root: Path) -> list[Path]:
    # The default tracker's copies lie among the runs, as deep as they, and are none.
    found = [path.parent for _, path in matching(Path(runs_root), "*/*/*/config.yaml")]
    return [path for path in found if path.parent.parent.name != ARTIFACTS]


def _digest_of(path: Path) -> str:
    return sha256(path)[:16]


def _now() -> str:
    return time.strftime(TIME)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


# --- the environment -------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a result may depend on, without imports."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and cleanness of the git checkout that holds a directory; None where none does."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def environment(**facts: Any) -> dict[str, Any]:
    """Where and with what a run is made. Holds no user's or machine's name.

    Args:
        facts: further entries, e.g. the data fingerprint and the device in use.
    """
    import glua_bench

    found: dict[str, Any] = {
        "glua_bench": glua_bench.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "libraries": versions(),
        "git": git_state(Path.cwd()),
        "source": git_state(Path(glua_bench.__file__).resolve().parent),
        "command": [_without_home(argument) for argument in sys.argv],
        "time": _now(),
    }
    # Only where torch is in use anyway: asking must not cost an import.
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpus"] = (
            [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if torch.cuda.is_available()
            else []
        )
        found["cuda"] = torch.version.cuda
    return {**found, **facts}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text)[1]  # type: ignore[index]
    except (OSError, TypeError):
        return platform.processor() or "unknown"


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


# --- trackers --------------------------------------------------------------------------------


class Tracker(Protocol):
    """Shows copies of run directories: what the harness asks of MLflow, or of another tracker.

    A class with these members is made by `open_tracker` as `cls(runs_root, warn)`, where `warn`
    receives one sentence for whatever the tracker does not take. Only `check` raises: a tracker
    that is down never harms a run. `RunRecord` and `Comparison` say what to show.
    """

    @property
    def place(self) -> str:
        """Where it is, without a password, for messages."""

    @property
    def browse(self) -> str:
        """The command or the address by which a user looks at it."""

    @property
    def remedy(self) -> str:
        """What to do if it does not answer, as an imperative, e.g. "check MY_TRACKER_URL"."""

    def check(self) -> None:
        """Find out within seconds whether it answers.

        Raises:
            OSError: it does not.
        """

    def mirror(self, run: RunDirectory) -> bool:
        """Upload one finished or failed run, unless the tracker has it in this state.

        Args:
            run: its directory.

        Returns:
            Whether the tracker now has it; if not, one warning was given.
        """

    def nest(
        self,
        comparison: Comparison,
        metrics: Mapping[str, float],
        files: Sequence[Path] = (),
        note: str = "",
    ) -> bool:
        """Show the runs of a comparison as one group, made now or brought up to date.

        Runs that the tracker lacks are uploaded first.

        Args:
            comparison: what is compared.
            metrics: the table's numbers by name; numbers that are not finite are left out.
            files: further artifacts, e.g. the table as CSV.
            note: the answer in words, as Markdown.

        Returns:
            Whether the tracker now shows it; if not, one warning was given.
        """

    def sync(self) -> SyncCounts:
        """Upload every finished or failed run that the tracker does not have."""


def open_tracker(runs_root: Path, warn: Callable[[str], None] = _warn) -> Tracker:
    """Make the tracker that runs are mirrored to.

    It is MLflow, unless `$GLUA_BENCH_TRACKER` names another class as "module:Class". The variable
    reaches the processes that comparisons, sweeps and schedulers start.

    Args:
        runs_root: the directory of all runs.
        warn: receives one sentence for whatever the tracker does not take.

    Raises:
        ConfigError: the variable names no class that can be imported.
    """
    name = os.environ.get("GLUA_BENCH_TRACKER") or "glua_bench.tracking:MLflowMirror"
    try:
        chosen: Callable[[Path, Callable[[str], None]], Tracker] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"GLUA_BENCH_TRACKER names '{name}', which cannot be imported ({reason(error)}); give "
            "it as MODULE:CLASS, or unset it to use MLflow."
        ) from error
    return chosen(Path(runs_root), warn)


@dataclass
class SyncCounts:
    """What `Tracker.sync` did.

    Attributes:
        uploaded: runs that the tracker did not have complete.
        present: runs that it had.
        unfinished: runs that are neither done nor failed, which are not mirrored.
        missed: runs that could not be uploaded.
    """

    uploaded: int = 0
    present: int = 0
    unfinished: int = 0
    missed: int = 0


def sync_runs(runs_root: Path, upload: Callable[[RunDirectory], bool | None]) -> SyncCounts:
    """Upload every finished or failed run below a directory; the loop of `Tracker.sync`.

    Args:
        runs_root: the directory of all runs.
        upload: returns True if it uploaded the run, False if the tracker had it, and None if it
            could not, after which no further run is tried.
    """
    counts = SyncCounts()
    for run in list_runs(runs_root):
        if not run.done and run.failed is None:
            counts.unfinished += 1
        elif counts.missed or (new := upload(run)) is None:
            counts.missed += 1  # the tracker is down: one warning is enough
        else:
            counts.uploaded += new
            counts.present += not new
    return counts


def run_state(run: RunDirectory) -> str:
    """What marks a complete copy of a run, "done DIGEST" or "failed DIGEST".

    Raises:
        RunFailure: it is neither done nor failed.
    """
    if run.done:
        return f"done {_digest_of(run.path / 'done')}"
    if run.failed is not None:
        return f"failed {_digest_of(run.path / 'failed')}"
    raise RunFailure("it is neither done nor failed")


def copied_files(run: RunDirectory) -> list[Path]:
    """The files of a run that a tracker copies, pictures and predictions last."""
    path = run.path
    files = [path / name for name in (*COPIED, "failed") if (path / name).is_file()]
    files += [file for file in path.iterdir() if re.fullmatch(CARRIED, file.name)]
    # The pictures of a report are drawn from predictions; the images lie with the data.
    drawn = [file for file in entries(run.figures) if file.suffix == ".png"]
    drawn += [file for file in entries(run.predictions) if file.name.endswith(".nii.gz")]
    return [*files, *sorted(drawn)]


@dataclass(frozen=True)
class RunRecord:
    """What a tracker shows of a finished or failed run, besides its files.

    Attributes:
        name: for people, see `run_name`.
        tags: what the run is, in words, e.g. {"id": "1c0ffee1", "seed": "0", "error": "..."}.
        params: the settings, by the names that `--set` takes.
        metrics: name, value, seconds since 1970 and step of everything that was logged, then of
            the results (`final_metrics`).
        began: when the run began, in seconds since 1970.
        ended: when it ended.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Sequence[tuple[str, float, float, int]]
    began: float
    ended: float

    @classmethod
    def of(cls, run: RunDirectory) -> RunRecord:
        """Read it from a run's directory."""
        rows, config = run._rows(), run.config
        began, ended = _times(run, rows)
        metrics = [
            (f"{row['stage']}/{name}", value, row["time"], row["step"])
            for row in rows
            for name, value in row["values"].items()
        ]
        if run.done:
            final = final_metrics(run.read_summary())
            metrics += [(name, value, ended, 0) for name, value in final.items()]
        name = f"{run_name(config, _method_changes(run))} | {run.id[:6]}"
        return cls(name, _tags(run), flat_settings(config.to_dict()), metrics, began, ended)


def _times(run: RunDirectory, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """When a run began and ended, in seconds since 1970.

    The log alone would leave out reading and scoring, which may take longer than training.
    """
    times = [row["time"] for row in rows]
    for name in ("environment.json", "done"):
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            times.append(datetime.strptime(run._read_json(name)["time"], TIME).timestamp())
    times = times or [time.time()]
    return min(times), max(times)


def _tags(run: RunDirectory) -> dict[str, str]:
    config = run.config
    tags = {
        "id": run.id,
        "method": config.method,
        "dataset": config.fold_name,
        "direction": config.direction,
        "scenario": config.scenario,
        "seed": str(config.seed),
        "privileged": str(config.privileged).lower(),
    }
    if changed := named_changes(config, _method_changes(run)):
        tags["changed"] = _listed(changed)
    if run.failed and not run.done:
        tags["error"] = run.failed[:4000]
    with contextlib.suppress(UserError):
        environment = run.read_environment()
        for name in ("data", "code"):
            if name in environment:
                tags[name] = _one_text(environment[name])
        if state := environment.get("source") or environment.get("git"):
            tags["git_commit"] = str(state["commit"])
            tags["git_dirty"] = str(state["dirty"]).lower()
    return tags


# --- MLflow ----------------------------------------------------------------------------------


def tracking_uri(runs_root: Path) -> str:
    """`$MLFLOW_TRACKING_URI`, else a SQLite file among the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or (
        f"sqlite:///{(Path(runs_root).resolve() / 'mlflow.db').as_posix()}"
    )


def check_tracker(uri: str, timeout: float = 3.0) -> None:
    """Find out quickly whether anybody answers at a tracker's address.

    mlflow's client retries for minutes; a closed port or an unknown host shows at once.

    Raises:
        OSError: nobody answers.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(
        parts.hostname
    ):
        return  # the proxy is the one who connects
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=timeout).close()


def mlflow_client(uri: str) -> MlflowClient:
    """A quiet client that gives up within seconds on a dead tracker.

    Raises:
        OSError: nobody answers at the address.
    """
    check_tracker(uri)
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # What is trained here, and on whose data, is nobody else's business.
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


@dataclass(frozen=True)
class Comparison:
    """Runs that a tracker shows as one group: those of one comparison on one dataset.

    A group that grows, as a sweep does, states its `identity` and `settings`, which must not
    depend on the runs that happen to be there.

    Attributes:
        title: what was asked for, e.g. "compare glua, sifa".
        members: entry and directory of each run, finished or not; at least one, all of one
            dataset.
        began: when the command began, in seconds since 1970.
        identity: what tells a growing group from others; "" takes its runs.
        settings: of the group; None takes what all runs share.
        facts: further tags of the group.
        complete: whether no further run is to come.
        stopped: whether it was ended early, and may go on later.
    """

    title: str
    members: Sequence[tuple[str, RunDirectory]]
    began: float = field(default_factory=time.time)
    identity: str = ""
    settings: Mapping[str, Any] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    complete: bool = True
    stopped: bool = False

    @property
    def dataset(self) -> str:
        """The dataset, with its fold, of all members."""
        return self.members[0][1].config.fold_name

    @property
    def id(self) -> str:
        """The identity: what is compared, however the command was worded.

        Runs enter by their ids, so that changed settings, data or code make another comparison,
        and old rows stay under the old one.
        """
        if self.identity:
            return digest(self.identity)
        return digest(sorted([entry, run.id] for entry, run in self.members))

    @property
    def entries(self) -> list[str]:
        """Names of the rows, in the order of the members."""
        return list(dict.fromkeys(entry for entry, _ in self.members))

    @property
    def directions(self) -> list[str]:
        """Directions, in the order of the members."""
        return list(dict.fromkeys(run.config.direction for _, run in self.members))

    @property
    def seeds(self) -> list[int]:
        """Seeds, ascending."""
        return sorted({run.config.seed for _, run in self.members})

    @property
    def status(self) -> str:
        """In the tracker's words; a growing group, a search, does not fail by some of its runs."""
        if not self.complete:
            return "KILLED" if self.stopped else "RUNNING"
        enough = any if self.identity else all
        return "FINISHED" if enough(run.done for _, run in self.members) else "FAILED"

    @property
    def name(self) -> str:
        """A line for people, e.g. "compare glua, sifa | phantom mr-ct | 3 seeds | quick"."""
        if self.settings is not None:
            return shortened(self.title, 200)
        count = len(self.seeds)
        changed = [named_changes(r.config, _method_changes(r)) for _, r in self.members]
        shared = {n: v for n, v in changed[0].items() if all(c.get(n) == v for c in changed)}
        preset = self.members[0][1].config.preset
        return " | ".join(
            (
                shortened(self.title, 100),
                f"{self.dataset} {', '.join(self.directions)}",
                f"{count} seed{'s' if count > 1 else ''}",
                ", ".join(filter(None, (preset, _listed(shared)))),
            )
        )

    def parameters(self) -> dict[str, Any]:
        """What the tracker shows as the group's parameters, which it never changes."""
        if self.settings is not None:
            return dict(self.settings)
        return {"entries": len(self.entries), "seeds": len(self.seeds), **self.shared()}

    def tags(self) -> dict[str, str]:
        """What the group is, in words, as it stands now."""
        done = sum(run.done for _, run in self.members)
        return {
            "dataset": self.dataset,
            "direction": ", ".join(self.directions),
            "entries": ", ".join(self.entries),
            "seeds": ", ".join(map(str, self.seeds)),
            "runs": f"{done} of {len(self.members)} done",
            **self.facts,
        }

    def shared(self) -> dict[str, Any]:
        """The settings that all runs share, those left out that are not part of their ids."""
        settings = [flat_settings(run.config.to_dict()) for _, run in self.members]
        return {
            name: value
            for name, value in settings[0].items()
            if name not in ("preset", "selectors")
            and all(name in other and other[name] == value for other in settings)
        }


class MLflowMirror(Tracker):
    """Copies run directories to an MLflow tracker, without doubles.

    Each run is one MLflow run, found again by its tag `glua_bench.id`. A copy that was
    interrupted, or that shows an earlier failure of a run that has succeeded since, is replaced.
    A comparison is one more MLflow run, above those that it compares. A run has one parent in
    MLflow: of several comparisons that contain it, the latest command wins, and the earlier ones
    keep their numbers and files.

    Args:
        runs_root: the directory of all runs; holds the default store.
        warn: receives the one sentence when the tracker is down.
    """

    def __init__(self, runs_root: Path, warn: Callable[[str], None] = _warn) -> None:
        self.runs_root = Path(runs_root)
        self.uri = tracking_uri(self.runs_root)
        self._warn = warn
        self._opened: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._nested: set[tuple[str, str, str, str]] = set()

    @property
    def place(self) -> str:
        return without_password(self.uri)

    @property
    def browse(self) -> str:
        if self._remote:
            return self.place
        return next_command("mlflow", "ui", "--backend-store-uri", self.place)

    @property
    def remedy(self) -> str:
        return "check MLFLOW_TRACKING_URI, or unset it to track in a file"

    def check(self) -> None:
        check_tracker(self.uri)

    def mirror(self, run: RunDirectory) -> bool:
        return self._mirror(run) is not None

    def sync(self) -> SyncCounts:
        return sync_runs(self.runs_root, self._mirror)

    def nest(
        self,
        comparison: Comparison,
        metrics: Mapping[str, float],
        files: Sequence[Path] = (),
        note: str = "",
    ) -> bool:
        shown = self._attempt(
            lambda: self._nest(comparison, metrics, files, note),
            "does not show this comparison",
            "its runs are complete, give the same command again when the tracker answers",
        )
        return shown is not None

    def _mirror(self, run: RunDirectory) -> bool | None:
        """True: uploaded; False: the tracker had it; None: it could not be uploaded."""
        return self._attempt(
            lambda: self._upload(run)[1],
            f"did not take run {run.id}",
            "the run's directory is complete, mirror it later with `glua-bench sync --runs "
            f"{self.runs_root}`",
        )

    def _attempt(self, action: Callable[[], Answer], failure: str, remedy: str) -> Answer | None:
        """What an action returns; None, after a warning, if it fails."""
        try:
            # Two processes must not find at the same time that a run or a parent is missing.
            with exclusive(self.runs_root / ".mlflow.lock"):
                return action()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a tracker never ends a run
            self._warn(f"MLflow at {self.place} {failure} ({reason(error)}); {remedy}.")
            return None

    @property
    def _remote(self) -> bool:
        return self.uri.startswith(("http:", "https:", "databricks"))

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            self._opened = mlflow_client(self.uri)
        return self._opened

    def _upload(self, run: RunDirectory) -> tuple[str, bool]:
        """The MLflow id of a run's copy, and whether it was made now."""
        state, client = run_state(run), self._client
        experiment = self._experiment(run.config.fold_name)
        complete, nesting = None, {}
        for found in client.search_runs(
            [experiment], filter_string=f"tags.`glua_bench.id` = '{run.id}'"
        ):
            tags = found.data.tags
            if complete is None and tags.get("glua_bench.mirrored") == state:
                complete = found.info.run_id
            else:
                nesting = {name: tags[name] for name in (PARENT, ENTRY) if name in tags}
                client.delete_run(found.info.run_id)
        copy = complete or self._copy(run, experiment, state, nesting)
        with contextlib.suppress(RunFailure):
            mark = {"tracking_uri": self.place, "run_id": copy, "mirrored": state}
            write_json(run.path / "mlflow.json", mark)
        return copy, complete is None

    def _copy(
        self, run: RunDirectory, experiment: str, state: str, nesting: Mapping[str, str]
    ) -> str:
        """Copy a run to a new MLflow run, with the tags by which an earlier copy was nested."""
        from mlflow.entities import Metric, Param

        client, record = self._client, RunRecord.of(run)
        tags = {**_own_tags(record.tags), "mlflow.source.name": "glua-bench", **nesting}
        if "git_commit" in record.tags:
            tags["mlflow.source.git.commit"] = record.tags["git_commit"]
        began, ended = (int(seconds * 1000) for seconds in (record.began, record.ended))
        created = client.create_run(experiment, start_time=began, run_name=record.name, tags=tags)
        copy: str = created.info.run_id
        names = distinct(record.params, tracker_key)
        params = [Param(names[name], str(value)[:6000]) for name, value in record.params.items()]
        keys = distinct([name for name, *_ in record.metrics], tracker_key)
        metrics = [
            Metric(keys[name], value, int(seconds * 1000), step)
            for name, value, seconds, step in record.metrics
        ]
        for start in range(0, len(params), 100):  # MLflow's limits of one request
            client.log_batch(copy, params=params[start : start + 100])
        for start in range(0, len(metrics), 1000):
            client.log_batch(copy, metrics=metrics[start : start + 1000])
        self._send_files(run, copy)
        client.set_terminated(copy, "FINISHED" if run.done else "FAILED", ended)
        # Set last: a copy without it is incomplete and will be replaced.
        client.set_tag(copy, "glua_bench.mirrored", state)
        return copy

    def _send_files(self, run: RunDirectory, copy: str) -> None:
        files = {file: file.relative_to(run.path) for file in copied_files(run)}
        with tempfile.TemporaryDirectory() as directory:
            digests, table = Path(directory) / DIGESTS, Path(directory) / "cases.csv"
            found = {name.as_posix(): _digest_of(file) for file, name in files.items()}
            write_json(digests, found)
            files[digests] = Path(DIGESTS)
            if (run.path / "cases.parquet").is_file():
                # MLflow's page shows a CSV file as a table, and a Parquet file not at all.
                run.read_cases().to_csv(table, index=False, float_format="%.4f")
                files[table] = Path(table.name)
            for file, name in files.items():
                folder = name.parent.as_posix()
                self._client.log_artifact(copy, str(file), None if folder == "." else folder)

    def _nest(
        self, comparison: Comparison, metrics: Mapping[str, float], files: Sequence[Path], note: str
    ) -> bool:
        from mlflow.entities import Metric, Param, RunTag

        client, parent = self._client, self._parent(comparison)
        parent_id = parent.info.run_id
        for entry, run in comparison.members:
            if run.done or run.failed is not None:
                shown = (parent_id, entry, run.id, run_state(run))
                if shown in self._nested:  # of a group that grows, by this object
                    continue
                child, _ = self._upload(run)
                client.set_tag(child, PARENT, parent_id)
                client.set_tag(child, ENTRY, entry)
                self._nested.add(shown)
        tags = {
            **_own_tags(comparison.tags()),
            "mlflow.source.name": "glua-bench",
            "mlflow.note.content": note,
        }
        params = comparison.parameters()
        now = int(time.time() * 1000)
        keys, names = distinct(metrics, tracker_key), distinct(params, tracker_key)
        values = {keys[name]: float(value) for name, value in metrics.items()}
        client.log_batch(
            parent_id,
            # Written where they are new: a parameter cannot be changed, and a number that is
            # written again would count as a further step.
            metrics=[
                Metric(name, value, now, 0)
                for name, value in values.items()
                if math.isfinite(value) and parent.data.metrics.get(name) != value
            ][:1000],  # the tracker's limits of one request
            params=[
                Param(names[name], str(value)[:6000])
                for name, value in params.items()
                if names[name] not in parent.data.params
            ][:100],
            tags=[RunTag(name, value[:5000]) for name, value in tags.items()],
        )
        for file in files:
            client.log_artifact(parent_id, str(file))
        status = comparison.status
        if parent.info.status != status:  # a repetition must not look like a longer run
            if status == "RUNNING":
                client.update_run(parent_id, status)
            else:
                client.set_terminated(parent_id, status, now)
        return True

    def _parent(self, comparison: Comparison) -> Run:
        """The MLflow run of a comparison: the oldest if machines made several, else a new one."""
        client, experiment = self._client, self._experiment(comparison.dataset)
        found = client.search_runs(
            [experiment],
            filter_string=f"tags.`glua_bench.comparison` = '{comparison.id}'",
            order_by=["attributes.start_time ASC"],
        )
        for double in found[1:]:
            client.delete_run(double.info.run_id)
        if found:
            return found[0]
        return client.create_run(
            experiment,
            start_time=int(comparison.began * 1000),
            run_name=comparison.name,
            tags={"glua_bench.comparison": comparison.id},
        )

    def _experiment(self, dataset: str) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or f"glua-bench/{dataset}"
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                # A server knows where its artifacts go; without one they lie by the runs.
                place = None if self._remote else (self.runs_root.resolve() / ARTIFACTS).as_uri()
                try:
                    self._experiments[name] = self._client.create_experiment(name, place)
                    return self._experiments[name]
                except MlflowException:
                    # Somebody else may have made it since.
                    found = self._client.get_experiment_by_name(name)
                    if found is None:
                        raise
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            self._experiments[name] = found.experiment_id
        return self._experiments[name]


def _own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {f"glua_bench.{name}": text for name, text in tags.items()}


def final_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The results of a run as the tracker's metrics.

    Args:
        summary: as `RunDirectory.finish` was given it; `scores` holds one record per selector
            and structure (and one for their "mean").

    Returns:
        e.g. {"final/last/mean/dice": 0.8, "final/last/MYO/dice": 0.7, "final/last/MYO/misses": 2}.
        All scores of a structure stand under one name, which no other structure has.
    """
    records = summary.get("scores", ())
    names = distinct((str(record["structure"]) for record in records), _structure)
    return {
        f"final/{record['selector']}/{names[str(record['structure'])]}/{score}": float(
            record[score]
        )
        for record in records
        for score in (*METRICS, "misses")
        if record.get(score) is not None
    }


def named_changes(config: RunConfig, method: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not what preset and method give, by the names that `--set` takes.

    The grid's are left out, because only the dataset's files tell what a preset gives it.

    Args:
        config: of the run.
        method: the method's settings that differ from its defaults; they come first.

    Example:
        >>> from glua_bench.task import Grid
        >>> named_changes(RunConfig("?", "?", "a-b", Grid(32, 7.0), steps=9), {"mask": "soft"})
        {'method.mask': 'soft', 'segmenter.width': 32, 'segmenter.depth': 5, 'steps': 9}
    """
    preset = dict(PRESETS.get(config.preset, {}))
    defaults = flat_settings(
        {
            "augmentation": RunConfig.augmentation,
            "precision": RunConfig.precision,
            "candidates": RunConfig.candidates,
            "slices": RunConfig.slices,
            "perturbation": RunConfig.perturbation,
            **preset,
            "segmenter": {**asdict(SegmenterSpec()), **preset.get("segmenter", {})},
        }
    )
    own = flat_settings(config.to_dict())
    changed = {n: own[n] for n in own if n in defaults and own[n] != defaults[n]}
    return {**{f"method.{name}": value for name, value in method.items()}, **changed}


def _method_changes(run: RunDirectory) -> Mapping[str, Any]:
    """What differed from the method's defaults when the run began."""
    with contextlib.suppress(UserError):
        return dict(run.read_environment().get("changed", {}))
    return {}


def run_name(config: RunConfig, method: Mapping[str, Any]) -> str:
    """A run's name for people: what tells it from its neighbours in a table comes first.

    Method with its changed settings, direction, seed, and the changed settings of the run.

    Args:
        config: of the run.
        method: the method's settings that differ from its defaults.

    Example:
        >>> from glua_bench.task import Grid
        >>> run_name(RunConfig("?", "?", "a-b", Grid(32, 7.0), preset="paper", steps=9), {})
        '? | a-b | seed 0 | steps=9'
    """
    changed = named_changes(config, method)
    name = config.method
    if changed.get("augmentation") == "photometric":  # as the entries of a comparison say it
        del changed["augmentation"]
        name += " + photometric"
    if config.privileged:
        name += f", {config.scenario} (privileged)"
    own = {n: value for n, value in changed.items() if n.startswith("method.")}
    others = {n: value for n, value in changed.items() if n not in own}
    parts = [
        shortened(", ".join(filter(None, (name, _listed(own)))), 120),
        config.direction,
        f"seed {config.seed}",
        shortened(_listed(others), 120),
    ]
    return " | ".join(filter(None, parts))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{n.removeprefix('method.')}={value}" for n, value in settings.items())


def _one_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={entry}" for name, entry in value.items())
    return str(value)


def tracker_key(name: str) -> str:
    """A name with only the characters that a tracker accepts; others may come out alike."""
    return "/".join(map(_word, name.split("/")))[:240].rstrip("/")  # of 250; `distinct` adds some


def _structure(name: str) -> str:
    """A structure in such a name, short enough that a suffix of `distinct` remains in it."""
    return _word(name)[:90]


def _word(name: str) -> str:
    """A part of such a name."""
    word = re.sub(r"[^\w\-. ]", "_", name)[:100]
    return word if word.strip(".") else f"_{word}"  # it would be taken for a directory


# --- the way back ----------------------------------------------------------------------------


def fetch_runs(
    uri: str,
    into: Path,
    experiments: Sequence[str] | None = None,
    warn: Callable[[str], None] = _warn,
) -> list[RunDirectory]:
    """Make directories of the finished runs that a tracker has copies of.

    They are laid out as below a directory of runs, and hold the same bytes as the originals, but
    neither weights nor the log. A run that lies there already is not fetched again.
    Runs and comparisons that were deleted in the tracker are left out.

    Args:
        uri: the tracker's address, e.g. "http://host:5000" or "sqlite:///runs/mlflow.db".
        into: where; nothing that lies there is changed.
        experiments: names of the tracker's experiments; None is all of them.
        warn: receives a sentence for every run that is left out, because its copy is damaged or
            another run is in its place.

    Returns:
        The runs, all `done`, sorted by path.

    Raises:
        UserError: the tracker does not answer, has none of the experiments, or no whole run.
        RunFailure: `into` cannot be written.
    """
    place = without_password(uri)
    try:
        copies = _copies(uri, experiments)
        client = mlflow_client(uri)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # mlflow's own, the database's, the network's, SystemExit
        raise _unreadable(place, error) from error
    if not copies:
        among = "" if experiments is None else f" in {', '.join(experiments)}"
        raise UserError(
            f"The tracker at {place} has no finished runs{among}; send them there with "
            "`glua-bench sync`."
        )
    runs: dict[str, RunDirectory] = {}
    for copy in copies:
        name = copy.data.tags.get("glua_bench.id", copy.info.run_id)
        if name in runs:  # several runs roots may have sent it
            continue
        try:
            run = _fetch(client, copy, Path(into))
        except (KeyboardInterrupt, RunFailure):
            raise
        except BaseException as error:
            try:
                check_tracker(uri)
            except OSError as gone:  # then every other run would wait in vain, too
                raise _unreadable(place, gone) from error
            warn(f"Run {name} ({copy.info.run_name}) at {place} is left out: {reason(error)}.")
        else:
            runs[name] = run
    if not runs:
        raise UserError(
            f"None of the {len(copies)} runs at {place} could be fetched; delete them there and "
            "send them again with `glua-bench sync`."
        )
    return sorted(runs.values(), key=lambda run: run.path)


def _unreadable(place: str, error: BaseException) -> UserError:
    return UserError(
        f"The tracker at {place} cannot be read ({reason(error)}); check the address "
        "and that the tracker runs."
    )


def _copies(uri: str, experiments: Sequence[str] | None) -> list[Run]:
    """Complete copies of finished runs, the newest of each first."""
    prefix = "sqlite:///"
    # mlflow would make an empty database of a wrong name.
    if uri.startswith(prefix) and not Path(uri.removeprefix(prefix).split("?")[0]).is_file():
        raise FileNotFoundError("there is no such file")
    client = mlflow_client(uri)
    shown: list[Experiment] = _all_pages(lambda page: client.search_experiments(page_token=page))
    if experiments is not None:
        names = [experiment.name for experiment in shown]
        for name in experiments:
            if name not in names:
                raise UserError(
                    f"The tracker at {without_password(uri)} has no experiment '{name}'; choose "
                    f"among {', '.join(sorted(names))}."
                )
        shown = [experiment for experiment in shown if experiment.name in experiments]
    found: list[Run] = []
    for experiment in shown:

        def search(page: str | None, within: str = experiment.experiment_id) -> Any:
            wanted = "tags.`glua_bench.mirrored` LIKE 'done%'"
            return client.search_runs([within], filter_string=wanted, page_token=page)

        found += _all_pages(search)
    return sorted(found, key=lambda run: run.info.start_time, reverse=True)


def _all_pages(search: Callable[[str | None], Any]) -> list[Any]:
    found, token = [], None
    while True:
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found


def _fetch(client: MlflowClient, copy: Run, into: Path) -> RunDirectory:
    """One copy as a directory.

    Raises:
        UserError: the copy is not whole, or something else lies in its place.
        RunFailure: the directory cannot be written.
        Exception: whatever the tracker's client raises.
    """
    tags = copy.data.tags
    parts = [tags.get(f"glua_bench.{name}", "") for name in ("dataset", "method", "id")]
    for part in parts:  # they become a path, and a tracker may hold anything
        if not re.fullmatch(r"\w[\w.+-]*", part):
            raise UserError(f"'{part}' cannot be a directory's name")
    path, mark = into.joinpath(*parts), tags["glua_bench.mirrored"].split()[1:]
    if not _has_mark(path, mark):
        with new_folder(path) as folder:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _download(client, copy.info.run_id, folder, Path(scratch))
            fetched = RunDirectory.open(folder)
            own = [fetched.config.fold_name, fetched.config.method]
            if not fetched.done or not _has_mark(folder, mark) or own != parts[:2]:
                raise UserError("its files do not fit together")
        if not _has_mark(path, mark):
            raise UserError(f"another state of it lies at {path}; choose another directory")
    return RunDirectory.open(path)


def _has_mark(path: Path, mark: Sequence[str]) -> bool:
    """Whether a directory has the `done` of a digest."""
    try:
        return [_digest_of(path / "done")] == list(mark)
    except OSError:
        return False


def _download(client: MlflowClient, run_id: str, folder: Path, parts: Path) -> None:
    """The files of a copy, compared with their digests."""

    def fetch(name: str, target: Path) -> None:
        try:
            # Whether folders are kept below the given one depends on the store.
            shutil.copyfile(client.download_artifacts(run_id, name, str(parts)), target)
        except Exception as error:
            raise UserError(f"its artifact {name} is missing") from error

    listing = parts / "listing.json"
    fetch(DIGESTS, listing)
    try:
        digests = dict(json.loads(listing.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"its artifact {DIGESTS} is damaged") from error
    drawn = [name for name in digests if re.fullmatch(DRAWN, name)]
    for name in ("figures", "predictions"):
        (folder / name).mkdir()
    carried = [name for name in digests if re.fullmatch(CARRIED, name)]
    for name in (*COPIED, *carried, *drawn):
        fetch(name, folder / name)
        if _digest_of(folder / name) != digests.get(name):
            raise UserError(f"its artifact {name} is damaged")
