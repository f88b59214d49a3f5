"""What a tracker must provide, and which one is used."""

from __future__ import annotations

import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from glua_bench.errors import ConfigError, RunFailure, reason
from glua_bench.paths import entries
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory, digest_of, list_runs, warn

Answer = TypeVar("Answer")

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


def open_tracker(runs_root: Path, warn: Callable[[str], None] = warn) -> Tracker:
    """Make the tracker that runs are mirrored to.

    It is MLflow, unless `$GLUA_BENCH_TRACKER` names another class as "module:Class". The variable
    reaches the processes that comparisons, sweeps and schedulers start.

    Args:
        runs_root: the directory of all runs.
        warn: receives one sentence for whatever the tracker does not take.

    Raises:
        ConfigError: the variable names no class that can be imported.
    """
    name = os.environ.get("GLUA_BENCH_TRACKER") or "glua_bench.records.mlflow_mirror:MLflowMirror"
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
        return f"done {digest_of(run.path / 'done')}"
    if run.failed is not None:
        return f"failed {digest_of(run.path / 'failed')}"
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
