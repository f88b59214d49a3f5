"""The run directory: the single source of truth about a run."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from glua_bench.config import RunConfig
from glua_bench.errors import RunFailure, UserError
from glua_bench.files import (
    drop_torn_line,
    replacing,
    sha256,
    storing,
    sweep,
    try_lock,
    write_json,
    write_text,
)
from glua_bench.paths import ARTIFACTS, matching
from glua_bench.records.environment import now

if TYPE_CHECKING:
    import pandas as pd

FLUSH_SECONDS = 2.0


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
            return bool(mark["summary"] == digest_of(self.path / "summary.json"))
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
            "time": now(),
            "summary": digest_of(self.path / "summary.json"),
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
            warn(str(error))
    return runs


def _run_paths(runs_root: Path) -> list[Path]:
    # The default tracker's copies lie among the runs, as deep as they, and are none.
    found = [path.parent for _, path in matching(Path(runs_root), "*/*/*/config.yaml")]
    return [path for path in found if path.parent.parent.name != ARTIFACTS]


def digest_of(path: Path) -> str:
    return sha256(path)[:16]


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
