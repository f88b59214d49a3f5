"""Run directory: the files of a run, from which all copies and reports are made."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from glua_bench import console
from glua_bench.config import ORACLE, RunConfig
from glua_bench.documents import load_json
from glua_bench.errors import RunFailure, UserError, without_password
from glua_bench.files import (
    drop_torn_line,
    move_into,
    replacing,
    sha256,
    storing,
    sweep,
    try_lock,
    write_json,
    write_text,
)
from glua_bench.identity import DATA_DIGITS
from glua_bench.paths import ARTIFACTS, matching
from glua_bench.records import seal
from glua_bench.records.environment import now

if TYPE_CHECKING:
    import pandas as pd

FLUSH_SECONDS = 2.0
DAMAGED = "damaged"  # directory of damaged runs in that of all runs, at a depth that no list reads


class RunDirectory:
    """Files of a run in `runs/<dataset>/<method>/<id>/`.

    Writing raises a `RunFailure` if the disk is full or the directory cannot be written. Reading
    raises a `UserError` if the run lacks the file, or if the file is damaged.

    Args:
        runs_root: the directory of all runs.
        config: configuration of the run.
        run_id: id of the run.
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

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """Directory of predicted label volumes."""
        return self.path / "predictions"

    @property
    def figures(self) -> Path:
        """Directory of figures."""
        return self.path / "figures"

    @property
    def done(self) -> bool:
        """True if the run is complete and its files are those with which it finished."""
        return seal.state_of(self.path, self.id).done

    @property
    def sealed(self) -> bool:
        """True if the run is finished and a change of its files would be found."""
        return seal.state_of(self.path, self.id).sealed

    @property
    def damage(self) -> str | None:
        """What is wrong with a finished run, with the fix; None if it is sound or not finished."""
        return self._damaged(self.problem) if self.problem else None

    @property
    def problem(self) -> str:
        """What is wrong with a finished run, such as "cases.parquet was changed"; "" if nothing."""
        return seal.state_of(self.path, self.id).problem

    def _damaged(self, problem: str) -> str:
        remedy = (
            "import its predictions again"
            if self.config.external
            else "repeat its command, with --retry-failed for several runs, to train it again"
        )
        found = f"The finished run {self.path} is damaged ({problem})"
        return f"{found}; restore its files, or {remedy}."

    @property
    def failed(self) -> str | None:
        """Reason of the last attempt's failure; None if it did not fail."""
        try:
            return (self.path / "failed").read_text(encoding="utf-8").strip() or "unknown reason"
        except OSError:
            return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other processes; the lock ends with the process, even if killed.

        Raises:
            RunFailure: another process holds the lock, or the directory cannot be written.
        """
        with try_lock(self.path / ".lock", "--runs") as locked:
            if not locked:
                raise RunFailure(
                    f"The run {self.path} is being executed by another process; wait for it, or "
                    "stop it and repeat the command."
                )
            yield

    def start(self, environment: Mapping[str, Any], stages: Sequence[tuple[str, int]] = ()) -> None:
        """Write configuration and environment, and remove an earlier failure.

        Args:
            environment: from `environment()`.
            stages: name and number of steps of each stage, in order, from which `total_step` is
                computed.
        """
        offsets = itertools.accumulate((steps for _, steps in stages), initial=0)
        self._offsets = {name: offset for (name, _), offset in zip(stages, offsets, strict=False)}
        with storing(self.path, "--runs"):
            for directory in (self.path, self.checkpoints, self.predictions, self.figures):
                directory.mkdir(parents=True, exist_ok=True)
                sweep(directory)  # including files that are not written again
            (self.path / "failed").unlink(missing_ok=True)
        write_text(self.path / "config.yaml", self.config.to_yaml(), "--runs")
        self.write_environment(environment)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write `environment.json`, with the version of the directory's layout."""
        written = {**environment, "schema": seal.SCHEMA}
        write_json(self.path / "environment.json", written, "--runs")

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step to `log.jsonl`, which is written every few seconds.

        Args:
            stage: name of the stage.
            step: number of updates done in the stage.
            values: name → value.
        """
        self._total = self._offsets.setdefault(stage, self._total) + step
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
        """Write buffered log lines."""
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
        """Write buffered log lines and close the log."""
        try:
            self.flush()
        finally:
            if self._log is not None:
                self._log.close()
                self._log = None

    def rewind(self, stage: str, step: int) -> None:
        """Drop log lines after a checkpoint (and a torn line), so that no step is logged twice.

        Args:
            stage: stage of the checkpoint.
            step: updates done in this stage; `rewind(first_stage, 0)` empties the log.
        """
        self._buffer.clear()
        self.close()
        kept, self._total, rows = [], 0, self.read_log()
        for row in rows:
            self._offsets.setdefault(row["stage"], row["total_step"] - row["step"])
        limit = self._offsets.get(stage)
        for row in rows:
            own = row["stage"] == stage and row["step"] <= step
            earlier = row["stage"] != stage and (limit is None or row["total_step"] <= limit)
            if own or earlier:
                kept.append(json.dumps(row) + "\n")
                self._total = row["total_step"]
        if kept or (self.path / "log.jsonl").exists():
            write_text(self.path / "log.jsonl", "".join(kept), "--runs")

    def write_cases(self, frame: pd.DataFrame) -> None:
        """Write the results per case, structure and selector."""
        self._write_table("cases.parquet", frame)

    def own_rows(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add the columns of this run to results per case, structure and selector."""
        config = self.config
        frame = frame.assign(
            privileged_selection=frame["selector"] == ORACLE,
            method=config.method,
            dataset=config.fold_name,
            direction=config.direction,
            scenario=config.scenario,
            seed=config.seed,
            augmentation="" if config.external else config.augmentation,
        )
        frame.insert(0, "run", self.id)
        return frame

    def fail(self, message: str) -> None:
        """Mark the attempt as failed. Never raises, so that the failure itself is reported."""
        with contextlib.suppress(OSError, RunFailure):
            self.close()
        with contextlib.suppress(OSError, RunFailure):
            (self.path / "done").unlink(missing_ok=True)
            text = " ".join(without_password(message).split())
            write_text(self.path / "failed", f"{text}\n", "--runs")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the training metrics, the summary, and at last `done`, which seals all files."""
        import pandas as pd

        self.close()
        rows = [
            (row["stage"], row["step"], row["total_step"], name, value)
            for row in self.read_log()
            for name, value in row["values"].items()
        ]
        metrics = pd.DataFrame(rows, columns=["stage", "step", "total_step", "name", "value"])
        metrics = metrics.astype({"step": "int64", "total_step": "int64", "value": "float64"})
        self._write_table("metrics.parquet", metrics)
        write_json(self.path / "summary.json", summary, "--runs")
        with storing(self.path, "--runs"):
            (self.path / "failed").unlink(missing_ok=True)
            mark = seal.seal(self.path, self.id, now())
        write_json(self.path / seal.MARK, mark, "--runs")

    def set_aside(self) -> Path | None:
        """Move the files of a damaged run to another directory, so that it can be made again.

        The caller holds the lock. Nothing is deleted; `done` is moved last, so that an interrupted
        move is repeated.

        Returns:
            The other directory; None if the run is not damaged.
        """
        if self.damage is None:
            return None
        parts = self.path.parent.parent.name, self.path.parent.name, self.id
        place = self.runs_root.joinpath(DAMAGED, *parts)
        return move_into(self.path, place, seal.MARK, "--runs")

    def check_file(self, path: Path) -> None:
        """Compare a file of the finished run with the seal, e.g. weights before they are loaded.

        Raises:
            UserError: the file is not as it was when the run finished.
        """
        if problem := seal.problem_of(self.path, path.relative_to(self.path).as_posix()):
            raise UserError(self._damaged(problem))

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory.

        Raises:
            UserError: the directory is not a run, a newer version wrote it, or its configuration
                cannot be read.
        """
        path = Path(path)
        seal.check_schema(path)
        try:
            config = RunConfig.from_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        except OSError as error:
            if (path / seal.MARK).is_file():
                raise UserError(
                    f"The finished run {path} is damaged (config.yaml is missing or unreadable); "
                    "restore the file, or remove the directory."
                ) from error
            raise UserError(
                f"{path} is not a run's directory (no readable config.yaml); give a directory "
                "such as runs/<dataset>/<method>/<id>."
            ) from error
        except UserError as error:
            raise UserError(
                f"{path / 'config.yaml'} is not a configuration of this version; restore the "
                f"file, remove the run, or use the version that wrote it ({error})"
            ) from error
        except Exception as error:  # YAML of any shape
            raise UserError(
                f"{path / 'config.yaml'} cannot be read ({type(error).__name__}); restore the "
                "file, or remove the run."
            ) from error
        run = cls(path.parent.parent.parent, config, path.resolve().name)
        run.path = path
        return run

    def read_cases(self) -> pd.DataFrame:
        """Return the results per case, structure and selector."""
        return self._read_table("cases.parquet")

    def read_metrics(self) -> pd.DataFrame:
        """Return the training metrics: stage, step, total_step, name, value."""
        return self._read_table("metrics.parquet")

    def read_summary(self) -> dict[str, Any]:
        """Return the summary passed to `finish`."""
        return self.read_json("summary.json")

    def read_environment(self) -> dict[str, Any]:
        """Return the environment passed to `start`."""
        return self.read_json("environment.json")

    def read_log(self) -> list[dict[str, Any]]:
        """Return the rows of the log, without a torn last line; [] if there is none."""
        try:
            lines = (self.path / "log.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        rows = []
        for line in lines.split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a kill
                row = load_json(line)
                rows.append({k: row[k] for k in ("stage", "step", "total_step", "time", "values")})
        return rows

    def _write_table(self, name: str, frame: pd.DataFrame) -> None:
        with replacing(self.path / name, "--runs") as temporary:
            frame.to_parquet(temporary, index=False)

    def _read_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        try:
            return pd.read_parquet(self.path / name)
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
            raise self._unreadable(name) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file."""
        try:
            return dict(load_json((self.path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(name) from error

    def _unreadable(self, name: str) -> UserError:
        return UserError(f"The run {self.path} has no readable {name}; repeat its command.")


def list_runs(
    runs_root: Path,
    warn: Callable[[str], None] | None = None,
    ids: Collection[str] = (),
) -> list[RunDirectory]:
    """List all runs in a directory, sorted by path.

    Args:
        runs_root: the directory of all runs.
        warn: receives a sentence for each unreadable run; None prints it to stderr.
        ids: the runs to list; () lists all.
    """
    warn = warn or console.warn
    folders = {
        file.parent
        for name in ("config.yaml", seal.MARK)
        for _, file in matching(Path(runs_root), f"*/*/*/{name}")
        # Copies by the default tracker are at the same depth.
        if file.parents[2].name != ARTIFACTS and (not ids or file.parent.name in ids)
    }
    runs = []
    for folder in sorted(folders):
        try:
            runs.append(RunDirectory.open(folder))
        except UserError as error:
            warn(str(error))
    return runs


def run_around(path: Path) -> RunDirectory | None:
    """Return the finished run whose predictions a path names; None if it is in no run's directory.

    Args:
        path: a label file, or a directory of label files.

    Raises:
        UserError: the run's configuration cannot be read.
    """
    for folder in (path.parent, path.parent.parent):
        if (folder / seal.MARK).is_file() and (folder / "config.yaml").is_file():
            return RunDirectory.open(folder.resolve())
    return None


def check_predictions(path: Path) -> None:
    """Check the run whose predictions a path names, if there is one (`run_around`).

    Raises:
        UserError: the run is damaged.
    """
    run = run_around(path)
    if run is not None and run.damage is not None:
        raise UserError(run.damage)


def unsealed_note(runs: Iterable[RunDirectory]) -> str:
    """Describe how many finished runs have no seal; "" if all have one."""
    count = sum(run.done and not run.sealed for run in runs)
    if not count:
        return ""
    return (
        f"NOT SEALED: {count} {'run' if count == 1 else 'runs'} of an earlier version without "
        "checksums, so that a later change of the files cannot be found."
    )


def digest_of(path: Path) -> str:
    """Return a digest of a file's content."""
    return sha256(path)[:DATA_DIGITS]
