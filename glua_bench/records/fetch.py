"""Download the copies of runs from MLflow as run directories."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glua_bench.console import warn
from glua_bench.documents import load_json
from glua_bench.errors import RunFailure, UserError, reason, without_password
from glua_bench.files import move_into, new_folder
from glua_bench.records import seal
from glua_bench.records.mlflow_mirror import DIGESTS, check_tracker, mlflow_client
from glua_bench.records.mlflow_store import fault, store_file
from glua_bench.records.run_directory import DAMAGED, RunDirectory, digest_of
from glua_bench.records.seal import CARRIED, COPIED, DRAWN

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


def fetch_runs(
    uri: str,
    into: Path,
    experiments: Sequence[str] | None = None,
    warn: Callable[[str], None] = warn,
) -> list[RunDirectory]:
    """Download the finished runs of a tracker as run directories.

    Directories contain the same files as the originals, except weights and log. Runs that exist
    already are not downloaded again, and runs and comparisons deleted in the tracker are skipped.

    Args:
        uri: address of the tracker, e.g. "http://host:5000" or "sqlite:///runs/mlflow.db".
        into: directory of runs; existing files are not changed.
        experiments: names of the tracker's experiments; None selects all.
        warn: receives a sentence for each skipped run, whose copy is damaged or whose directory
            exists with other content, and for each damaged directory, which is moved and fetched
            again.

    Returns:
        The runs, all `done`, sorted by path.

    Raises:
        UserError: the tracker does not answer, or has no such experiment or no complete run.
        RunFailure: `into` cannot be written.
    """
    place = without_password(uri, whole=True)
    try:
        copies = _copies(uri, experiments)
        client = mlflow_client(uri)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # mlflow's own, the database's, the network's, SystemExit
        raise _unreadable(place, error) from error
    if not copies:
        where = "" if experiments is None else f" in {', '.join(experiments)}"
        raise UserError(
            f"The tracker at {place} has no finished runs{where}; upload them with "
            "`glua-bench sync`."
        )
    runs: dict[str, RunDirectory] = {}
    for copy in copies:
        name = copy.data.tags.get("glua_bench.id", copy.info.run_id)
        if name in runs:  # uploaded from several directories
            continue
        try:
            run = _fetch(client, copy, Path(into), warn)
        except (KeyboardInterrupt, RunFailure):
            raise
        except BaseException as error:
            try:
                check_tracker(uri)
            except OSError as gone:  # all other downloads would fail too
                raise _unreadable(place, gone) from error
            warn(f"Run {name} ({copy.info.run_name}) at {place} was skipped: {reason(error)}.")
        else:
            runs[name] = run
    if not runs:
        raise UserError(
            f"None of the {len(copies)} runs at {place} could be fetched; delete them there and "
            "upload them again with `glua-bench sync`."
        )
    return sorted(runs.values(), key=lambda run: run.path)


def _unreadable(place: str, error: BaseException) -> UserError:
    return UserError(
        f"The tracker at {place} cannot be read ({reason(error)}); check the address "
        "and that the tracker runs."
    )


def _copies(uri: str, experiments: Sequence[str] | None) -> list[Run]:
    """Return complete copies of finished runs, newest first."""
    # mlflow would create tables in a missing or empty file.
    if (file := store_file(uri)) is not None:
        if not file.exists():
            raise FileNotFoundError("the file does not exist")
        if why := fault(file):
            raise OSError(why)
    client = mlflow_client(uri)
    known: list[Experiment] = _all_pages(client.search_experiments)
    ids = {experiment.name: experiment.experiment_id for experiment in known}
    if experiments is not None:
        for name in experiments:
            if name not in ids:
                raise UserError(
                    f"The tracker at {without_password(uri)} has no experiment '{name}'; use one "
                    f"of {', '.join(sorted(ids))}."
                )
        ids = {name: ids[name] for name in experiments}
    done = "tags.`glua_bench.mirrored` LIKE 'done%'"
    found: list[Run] = []
    for experiment in ids.values():
        found += _all_pages(partial(client.search_runs, [experiment], filter_string=done))
    return sorted(found, key=lambda run: run.info.start_time, reverse=True)


def _all_pages(search: Callable[..., Any]) -> list[Any]:
    page = search()
    found = list(page)
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found


def _fetch(
    client: MlflowClient, copy: Run, into: Path, warn: Callable[[str], None]
) -> RunDirectory:
    """Download one copy as a run directory.

    Raises:
        UserError: the copy is incomplete, or its directory exists with other content.
        RunFailure: the directory cannot be written.
        Exception: any error of the tracker's client.
    """
    tags = copy.data.tags
    parts = [tags.get(f"glua_bench.{name}", "") for name in ("dataset", "method", "id")]
    for part in parts:  # they become a path, and the tracker is not trusted
        if not re.fullmatch(r"\w[\w.+-]*", part):
            raise UserError(f"'{part}' cannot be a directory's name")
    path, mark = into.joinpath(*parts), tags["glua_bench.mirrored"].split()[1:]
    if problem := seal.state_of(path, parts[2]).problem:
        place = move_into(path, into.joinpath(DAMAGED, *parts), seal.MARK)
        shutil.rmtree(path)  # the lock remains
        warn(f"{path} was damaged ({problem}): it was moved to {place} and is fetched again.")
    if not _has_mark(path, mark):
        with new_folder(path) as folder:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _download(client, copy.info.run_id, folder, Path(scratch))
            fetched = RunDirectory.open(folder)
            fetched.id = parts[2]
            own = [fetched.config.fold_name, fetched.config.method]
            if not fetched.done or not _has_mark(folder, mark) or own != parts[:2]:
                raise UserError("its files do not fit together")
        if not _has_mark(path, mark):
            raise UserError(f"{path} exists with other content; use another directory")
    return RunDirectory.open(path)


def _has_mark(path: Path, mark: Sequence[str]) -> bool:
    """Return True if a directory's `done` has the given digest."""
    try:
        return [digest_of(path / "done")] == list(mark)
    except OSError:
        return False


def _download(client: MlflowClient, run_id: str, folder: Path, parts: Path) -> None:
    """Download the files of a copy and verify their digests."""

    def fetch(name: str, target: Path) -> None:
        try:
            # Whether subdirectories are kept depends on the store.
            shutil.copyfile(client.download_artifacts(run_id, name, str(parts)), target)
        except Exception as error:
            raise UserError(f"its artifact {name} is missing") from error

    listing = parts / "listing.json"
    fetch(DIGESTS, listing)
    try:
        digests = dict(load_json(listing.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"its artifact {DIGESTS} is damaged") from error
    for name in ("figures", "predictions"):
        (folder / name).mkdir()
    for name in (*COPIED, *(n for n in digests if re.fullmatch(f"{CARRIED}|{DRAWN}", n))):
        fetch(name, folder / name)
        if digest_of(folder / name) != digests.get(name):
            raise UserError(f"its artifact {name} is damaged")
