"""Tracker protocol, and the choice of a tracker."""

from __future__ import annotations

import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from glua_bench.console import warn
from glua_bench.errors import ConfigError, RunFailure, reason
from glua_bench.files import exclusive
from glua_bench.paths import entries
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory, digest_of, list_runs
from glua_bench.records.seal import CARRIED, COPIED

Answer = TypeVar("Answer")


class Tracker(Protocol):
    """Show copies of run directories, as MLflow or another tracker does.

    `open_tracker` creates an implementation as `cls(runs_root, warn)`, where `warn` receives one
    sentence for each run or comparison that the tracker did not accept. Only `check` raises: a
    tracker that is down never affects a run. `RunRecord` and `Comparison` contain what to show.

    Attributes:
        place: location without a password, for messages.
        browse: command or address for viewing it.
        remedy: fix if it does not answer, as an imperative, e.g. "check MY_TRACKER_URL".
    """

    place: str
    browse: str
    remedy: str

    def check(self) -> None:
        """Check within seconds whether it answers.

        Raises:
            OSError: it does not answer.
        """

    def mirror(self, run: RunDirectory) -> bool:
        """Upload a finished or failed run, unless the tracker has it in this state.

        Args:
            run: its directory.

        Returns:
            True if the tracker now has it; if not, one warning was given.
        """

    def nest(
        self,
        comparison: Comparison,
        metrics: Mapping[str, float],
        files: Sequence[Path] = (),
        note: str = "",
    ) -> bool:
        """Create or update the group of a comparison, and upload its missing runs first.

        Args:
            comparison: the comparison.
            metrics: the table's values by name; non-finite values are skipped.
            files: further artifacts, e.g. the table as CSV.
            note: summary in Markdown.

        Returns:
            True if the tracker now shows it; if not, one warning was given.
        """

    def sync(self) -> SyncCounts:
        """Upload all finished or failed runs that the tracker does not have."""


def open_tracker(runs_root: Path, warn: Callable[[str], None] = warn) -> Tracker:
    """Open the tracker to which runs are mirrored.

    It is MLflow, unless `$GLUA_BENCH_TRACKER` names another class as "module:Class". Child
    processes and jobs inherit the variable.

    Args:
        runs_root: the directory of all runs.
        warn: receives one sentence for each run or comparison that the tracker did not accept.

    Raises:
        ConfigError: the class cannot be imported.
    """
    name = os.environ.get("GLUA_BENCH_TRACKER") or "glua_bench.records.mlflow_mirror:MLflowMirror"
    try:
        chosen: Callable[[Path, Callable[[str], None]], Tracker] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"GLUA_BENCH_TRACKER is '{name}', which cannot be imported ({reason(error)}); set it "
            "to MODULE:CLASS, or unset it to use MLflow."
        ) from error
    return chosen(Path(runs_root), warn)


class UploadingTracker(Tracker):
    """Base of the trackers here, which upload run by run; others need only have the methods.

    Args:
        runs_root: the directory of all runs.
        warn: receives one sentence for each run or comparison that the tracker did not accept.
    """

    lock: str  # name of a file in the directory of runs

    def __init__(self, runs_root: Path, warn: Callable[[str], None] = warn) -> None:
        self.runs_root, self.warn = Path(runs_root), warn

    def upload(self, run: RunDirectory) -> bool | None:
        """Return True if the run was uploaded, False if it was there, None if it failed."""
        raise NotImplementedError

    def mirror(self, run: RunDirectory) -> bool:
        return self.upload(run) is not None

    def answers(self) -> None:
        """Raise any exception if the tracker takes no requests at all; as `check` by default."""
        self.check()

    def sync(self) -> SyncCounts:
        return sync_runs(self.runs_root, self.upload, self.answers, self.warn)

    def attempt(self, action: Callable[[], Answer], failure: str, remedy: str) -> Answer | None:
        """Return an action's result; warn and return None if it fails."""
        try:
            # The lock prevents two processes from creating the same run or comparison.
            with exclusive(self.runs_root / self.lock):
                return action()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # including SystemExit: a tracker never ends a run
            self.warn(f"{failure} ({reason(error)}); {remedy}.")
            return None


@dataclass
class SyncCounts:
    """Result of `Tracker.sync`.

    Attributes:
        uploaded: runs that were uploaded.
        present: runs that the tracker already had.
        unfinished: runs that are neither done nor failed, which are not mirrored.
        missed: runs that could not be uploaded.
        damaged: runs that cannot be read or were changed since they ended, which are not mirrored.
        refused: ids of the missed runs that the tracker refused; it was down for the others.
    """

    uploaded: int = 0
    present: int = 0
    unfinished: int = 0
    missed: int = 0
    damaged: int = 0
    refused: list[str] = field(default_factory=list)


def sync_runs(
    runs_root: Path,
    upload: Callable[[RunDirectory], bool | None],
    answers: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = warn,
) -> SyncCounts:
    """Upload all finished or failed runs in a directory; the loop of `Tracker.sync`.

    Args:
        runs_root: the directory of all runs.
        upload: returns True if it uploaded the run, False if the tracker had it, and None if it
            failed and a warning was given.
        answers: called after a failure; an exception means that the tracker is down, after which
            no further run is tried. Otherwise only this run was refused.
        warn: receives one sentence for each damaged run.
    """
    counts, down = SyncCounts(), False

    def damaged(sentence: str) -> None:
        warn(sentence)
        counts.damaged += 1

    for run in list_runs(runs_root, damaged):
        if run.damage is not None:
            damaged(run.damage)
        elif not run.done and run.failed is None:
            counts.unfinished += 1
        elif down:
            counts.missed += 1  # one warning is enough
        elif (new := upload(run)) is None:
            counts.missed += 1
            try:
                answers()
            except Exception:
                down = True
            else:
                counts.refused.append(run.id)
        else:
            counts.uploaded += new
            counts.present += not new
    return counts


def run_state(run: RunDirectory) -> str:
    """Return the mark of a complete copy of a run, "done DIGEST" or "failed DIGEST".

    Raises:
        RunFailure: the run is damaged, or neither done nor failed.
    """
    if run.damage is not None:
        raise RunFailure(run.damage)
    if run.done:
        return f"done {digest_of(run.path / 'done')}"
    if run.failed is not None:
        return f"failed {digest_of(run.path / 'failed')}"
    raise RunFailure("it is neither done nor failed")


def copied_files(run: RunDirectory) -> list[Path]:
    """Return the files of a run that a tracker copies, figures and predictions last."""
    path = run.path
    files = [path / name for name in (*COPIED, "failed") if (path / name).is_file()]
    files += [file for file in path.iterdir() if re.fullmatch(CARRIED, file.name)]
    # Predictions are needed to draw the figures of a report.
    drawn = [file for file in entries(run.figures) if file.suffix == ".png"]
    drawn += [file for file in entries(run.predictions) if file.name.endswith(".nii.gz")]
    return [*files, *sorted(drawn)]
