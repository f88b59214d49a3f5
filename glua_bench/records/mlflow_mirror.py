"""Mirror runs and comparisons to MLflow."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glua_bench.console import next_command
from glua_bench.errors import RunFailure, reason, without_password
from glua_bench.files import exclusive, write_json
from glua_bench.paths import ARTIFACTS, distinct
from glua_bench.records.naming import Comparison, RunRecord, tracker_key
from glua_bench.records.run_directory import RunDirectory, digest_of, warn
from glua_bench.records.tracker import (
    Answer,
    SyncCounts,
    Tracker,
    copied_files,
    run_state,
    sync_runs,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DIGESTS = "files.json"  # artifact: name of each copied file → its digest

PARENT, ENTRY = "mlflow.parentRunId", "glua_bench.entry"  # a nested run's tags


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

    def __init__(self, runs_root: Path, warn: Callable[[str], None] = warn) -> None:
        self.runs_root = Path(runs_root)
        self.uri = tracking_uri(self.runs_root)
        self.warn = warn
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
            self.warn(f"MLflow at {self.place} {failure} ({reason(error)}); {remedy}.")
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
            found = {name.as_posix(): digest_of(file) for file, name in files.items()}
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
