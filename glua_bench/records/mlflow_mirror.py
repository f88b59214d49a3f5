"""Mirror runs and comparisons to MLflow."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glua_bench.console import next_command, warn
from glua_bench.errors import RunFailure, UserError, escaped_url, without_password
from glua_bench.files import csv_text, write_json, write_text
from glua_bench.paths import ARTIFACTS, distinct
from glua_bench.records import mlflow_store
from glua_bench.records.naming import Comparison, RunRecord, tracker_key
from glua_bench.records.run_directory import RunDirectory, digest_of
from glua_bench.records.tracker import (
    Answer,
    SyncCounts,
    UploadingTracker,
    copied_files,
    run_state,
)
from glua_bench.scoring.metrics import METRICS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Param, Run

DIGESTS = "files.json"  # artifact with the digests of all copied files
SCORES = "scores.csv"  # artifact with the scores of all selectors and structures
PARENT, ENTRY = "mlflow.parentRunId", "glua_bench.entry"  # tags of a nested run
# Tags of an experiment: its kind, and a saved view of the table of runs. MLflow shows no parameter
# or metric by default and keeps chosen columns in the browser, so a client can only offer a view.
# Since the switch "GenAI | Model training" exists (3.17 has it), MLflow opens what the browser used
# last and reads the kind no more; a link can set it.
KIND, VIEW = "mlflow.experimentKind", "mlflow.sharedViewState.glua-bench"
COLUMNS = [f"params.`{name}`" for name in ("method", "direction", "seed")]
COLUMNS += [f"metrics.`{name}`" for name in METRICS]


def tracking_uri(runs_root: Path) -> str:
    """Return `$MLFLOW_TRACKING_URI`, or a SQLite file in the directory of runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or (
        f"sqlite:///{(Path(runs_root).resolve() / 'mlflow.db').as_posix()}"
    )


def check_tracker(uri: str, timeout: float = 3.0) -> None:
    """Check quickly whether a tracker answers; mlflow's client would retry for minutes.

    Raises:
        OSError: it does not answer.
    """
    parts = urllib.parse.urlsplit(escaped_url(uri))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    proxied = parts.scheme in urllib.request.getproxies()
    if proxied and not urllib.request.proxy_bypass(parts.hostname):
        return  # the proxy connects
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=timeout).close()


def mlflow_client(uri: str) -> MlflowClient:
    """Return a quiet client that gives up within seconds if the tracker is down.

    Raises:
        OSError: the tracker does not answer.
    """
    check_tracker(uri)
    import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=escaped_url(uri))


def import_mlflow() -> None:
    """Import mlflow with few retries, without telemetry, and with warnings only."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # Nothing about methods and data is sent to third parties.
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs a traceback of what it raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


class MLflowMirror(UploadingTracker):
    """Copy run directories to an MLflow tracker, without duplicates.

    Each run is one MLflow run, identified by its tag `glua_bench.id`. A copy that is incomplete, or
    that shows an earlier failure, is replaced. A comparison is another MLflow run, the parent of
    its members. Because an MLflow run has one parent, a run in several comparisons is shown under
    the latest one; earlier ones keep their values and files.

    Args:
        runs_root: the directory of all runs; contains the default store.
        warn: receives one sentence if the tracker is down.
    """

    lock = ".mlflow.lock"

    def __init__(self, runs_root: Path, warn: Callable[[str], None] = warn) -> None:
        super().__init__(runs_root, warn)
        self.uri = tracking_uri(self.runs_root)
        self.place = without_password(self.uri, whole=True)
        self.remedy = "check MLFLOW_TRACKING_URI, or unset it to track in a file"
        self._file = mlflow_store.store_file(self.uri)
        self._own = not os.environ.get("MLFLOW_TRACKING_URI")
        if self._own:
            self.remedy = f"check {self._file}, which the next upload replaces if it is broken"
        self._renewed = False
        self._remote = self.uri.startswith(("http:", "https:", "databricks"))
        self.browse = self.place
        if not self._remote:
            self.browse = next_command("mlflow", "ui", "--backend-store-uri", self.place)
        self._experiments: dict[str, str] = {}
        self._nested: set[tuple[str, str, str, str]] = set()

    def check(self) -> None:
        check_tracker(self.uri)
        if self._file is not None and (why := mlflow_store.fault(self._file)):
            raise OSError(why)

    def answers(self) -> None:
        self._client.search_experiments(max_results=1)

    def sync(self) -> SyncCounts:
        if self._file is not None:
            import_mlflow()
            self.attempt(
                lambda: self._prepared(thorough=True),
                f"The MLflow store {self.place} cannot be checked",
                self.remedy,
            )
        self._renewed = False
        counts = super().sync()
        if self._renewed:  # without the runs that were already present
            counts = super().sync()
        return counts

    def attempt(self, action: Callable[[], Answer], failure: str, remedy: str) -> Answer | None:
        return super().attempt(lambda: self._on_good_store(action), failure, remedy)

    def _on_good_store(self, action: Callable[[], Answer]) -> Answer:
        """Repeat an action that failed because the default store is broken, with a new store."""
        try:
            return action()
        except (UserError, RunFailure, OSError):
            raise
        except Exception:  # mlflow's, SQLAlchemy's
            if self._file is None or not self._prepared(thorough=True):
                raise
            return action()

    def _prepared(self, thorough: bool = False) -> bool:
        """Create the store's file if it is missing; return True if a broken one was replaced."""
        assert self._file is not None
        said = mlflow_store.prepare(self._file, self._own, thorough)
        if not said:
            return False
        self.warn(said)
        self.__dict__.pop("_client", None)
        self._experiments.clear()
        self._nested.clear()
        self._renewed = True
        return True

    def nest(
        self,
        comparison: Comparison,
        metrics: Mapping[str, float],
        files: Sequence[Path] = (),
        note: str = "",
    ) -> bool:
        shown = self.attempt(
            lambda: self._nest(comparison, metrics, files, note),
            f"MLflow at {self.place} does not show this comparison",
            "its runs are complete, so repeat the same command when the tracker answers",
        )
        return shown is not None

    def upload(self, run: RunDirectory) -> bool | None:
        return self.attempt(
            lambda: self._upload(run)[1],
            f"MLflow at {self.place} did not take run {run.id}",
            "the run's directory is complete, so upload it later with `glua-bench sync --runs "
            f"{self.runs_root}`",
        )

    @cached_property
    def _client(self) -> MlflowClient:
        if self._file is not None:
            import_mlflow()
            self._prepared()
        return mlflow_client(self.uri)

    def _upload(self, run: RunDirectory) -> tuple[str, bool]:
        """Return the MLflow id of a run's copy, and whether it is new."""
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
        """Copy a run to a new MLflow run, with the nesting tags of an earlier copy."""
        from mlflow.entities import Metric

        client, record = self._client, RunRecord.of(run)
        tags = {**_own_tags(record.tags), "mlflow.source.name": "glua-bench", **nesting}
        if record.note:
            tags["mlflow.note.content"] = record.note
        if "git_commit" in record.tags:
            tags["mlflow.source.git.commit"] = record.tags["git_commit"]
        began, ended = (int(seconds * 1000) for seconds in (record.began, record.ended))
        created = client.create_run(experiment, start_time=began, run_name=record.name, tags=tags)
        copy: str = created.info.run_id
        params = _parameters(record.params)
        keys = distinct([name for name, *_ in record.metrics], tracker_key)
        metrics = [
            Metric(keys[name], value, int(seconds * 1000), step)
            for name, value, seconds, step in record.metrics
        ]
        for start in range(0, len(params), 100):  # MLflow's limits per request
            client.log_batch(copy, params=params[start : start + 100])
        for start in range(0, len(metrics), 1000):
            client.log_batch(copy, metrics=metrics[start : start + 1000])
        self._send_files(run, copy)
        client.set_terminated(copy, "FINISHED" if run.done else "FAILED", ended)
        # Set last, because a copy without it is incomplete and will be replaced.
        client.set_tag(copy, "glua_bench.mirrored", state)
        return copy

    def _send_files(self, run: RunDirectory, copy: str) -> None:
        files = {file: file.relative_to(run.path) for file in copied_files(run)}
        with tempfile.TemporaryDirectory() as directory:
            digests, table = Path(directory) / DIGESTS, Path(directory) / "cases.csv"
            scores = Path(directory) / SCORES
            found = {name.as_posix(): digest_of(file) for file, name in files.items()}
            write_json(digests, found)
            files[digests] = Path(DIGESTS)
            if (run.path / "cases.parquet").is_file():
                # MLflow's UI shows CSV files as tables, but no Parquet files.
                write_text(table, csv_text(run.read_cases(), float_format="%.4f"))
                files[table] = Path(table.name)
            if run.done:
                import pandas as pd

                averages = pd.DataFrame(run.read_summary().get("scores", ()))
                write_text(scores, csv_text(averages, float_format="%.4f"))
                files[scores] = Path(scores.name)
            for file, name in files.items():
                folder = name.parent.as_posix()
                self._client.log_artifact(copy, str(file), None if folder == "." else folder)

    def _nest(
        self, comparison: Comparison, metrics: Mapping[str, float], files: Sequence[Path], note: str
    ) -> bool:
        from mlflow.entities import Metric, RunTag

        client, parent = self._client, self._parent(comparison)
        parent_id = parent.info.run_id
        for entry, run in comparison.members:
            if run.done or run.failed is not None:
                shown = (parent_id, entry, run.id, run_state(run))
                if shown in self._nested:  # earlier, in a growing group
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
        now = int(time.time() * 1000)
        keys = distinct(metrics, tracker_key)
        values = {keys[name]: float(value) for name, value in metrics.items()}
        client.log_batch(
            parent_id,
            # Only new values: parameters cannot be changed, and a repeated metric would count as
            # another step.
            metrics=[
                Metric(name, value, now, 0)
                for name, value in values.items()
                if math.isfinite(value) and parent.data.metrics.get(name) != value
            ][:1000],  # MLflow's limits per request
            params=[
                param
                for param in _parameters(comparison.parameters())
                if param.key not in parent.data.params
            ][:100],
            tags=[RunTag(name, value[:5000]) for name, value in tags.items()],
        )
        for file in files:
            client.log_artifact(parent_id, str(file))
        status = comparison.status
        if parent.info.status != status:  # a repeated command must not extend the duration
            if status == "RUNNING":
                client.update_run(parent_id, status)
            else:
                client.set_terminated(parent_id, status, now)
        return True

    def _parent(self, comparison: Comparison) -> Run:
        """Return the MLflow run of a comparison; of several, the oldest, and delete the others."""
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
                # A server has its own artifact store; otherwise they are stored with the runs.
                place = None if self._remote else (self.runs_root.resolve() / ARTIFACTS).as_uri()
                try:
                    self._client.create_experiment(name, place)
                except MlflowException:  # may have been created by another process
                    if self._client.get_experiment_by_name(name) is None:
                        raise
                found = self._client.get_experiment_by_name(name)
                assert found is not None
            for tag, value in experiment_tags(found.experiment_id).items():
                if tag not in found.tags:  # otherwise it is a user's choice
                    with contextlib.suppress(MlflowException):  # e.g. not the user's experiment
                        self._client.set_experiment_tag(found.experiment_id, tag, value)
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            self._experiments[name] = found.experiment_id
        return self._experiments[name]


def experiment_tags(experiment: str) -> dict[str, str]:
    """Return the tags by which MLflow's pages show an experiment as one of model training.

    The saved view holds the columns of the table of runs twice: as `state` for MLflow 3.17, and as
    keys for earlier versions. Both ignore the other's keys.

    Args:
        experiment: id of the experiment, for the link in its description.
    """
    view = {"selectedColumns": COLUMNS, "columnOrder": COLUMNS}
    saved = {"name": "glua-bench", "createdAt": 0, "state": json.dumps(view), **view}
    link = (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={VIEW.rpartition('.')[2]}"
    )
    return {
        KIND: "custom_model_development",
        VIEW: json.dumps(saved),
        "mlflow.note.content": f"[Table of runs by method, direction, seed and Dice]({link})",
    }


def _parameters(values: Mapping[str, Any]) -> list[Param]:
    from mlflow.entities import Param

    names = distinct(values, tracker_key)
    return [Param(names[name], str(value)[:6000]) for name, value in values.items()]


def _own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {f"glua_bench.{name}": text for name, text in tags.items()}
