"""Download the copies of runs from MLflow as run directories."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glua_bench.errors import RunFailure, UserError, reason, without_password
from glua_bench.files import new_folder
from glua_bench.records.mlflow_mirror import DIGESTS, check_tracker, mlflow_client
from glua_bench.records.run_directory import RunDirectory, digest_of, warn
from glua_bench.records.tracker import CARRIED, COPIED, DRAWN

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


def fetch_runs(
    uri: str,
    into: Path,
    experiments: Sequence[str] | None = None,
    warn: Callable[[str], None] = warn,
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
        return [digest_of(path / "done")] == list(mark)
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
        if digest_of(folder / name) != digests.get(name):
            raise UserError(f"its artifact {name} is damaged")
