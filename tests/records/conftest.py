"""Fixtures: a run, an empty MLflow store, and a server that answers with errors."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from sample_runs import started

from glua_bench.records.mlflow_mirror import import_mlflow
from glua_bench.records.mlflow_store import prepare
from glua_bench.records.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return started(tmp_path / "runs")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an MLflow store once, because this takes seconds; tests copy it."""
    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    import_mlflow()
    prepare(store, own=True)
    return store


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of runs with an empty store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "runs"
    path.mkdir()
    shutil.copy(empty_store, path / "mlflow.db")
    return path


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
