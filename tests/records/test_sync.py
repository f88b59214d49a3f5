"""`sync`: a run that is refused or damaged is named, and the others are uploaded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import Server
from sample_runs import complete, started
from small_commands import Call, refused


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.fault("tracker", "the server refuses one run")
@pytest.mark.parametrize("status", [400, 413, 500, 503])
def test_a_run_that_the_server_refuses_is_named_and_the_others_are_sent(
    status: int, server: Server, call: Call
) -> None:
    for name in ("aaa", "bbb", "ccc"):
        complete(started(Path("runs"), name))
    server.refuses["bbb"] = status
    result = call("sync")
    line = refused(result, "1 runs could not be uploaded", "(bbb)", "warnings", code=1)
    assert "MLFLOW_TRACKING_URI" not in line
    assert "2 runs uploaded, 0 already present, 0 unfinished (skipped), 1 failed" in result[1]
    (warning,) = [text for text in result[2].splitlines() if text.startswith("warning: ")]
    assert "run bbb" in warning and "sync" in warning
    assert server.complete() == {"aaa", "ccc"} and server.seen == ["aaa", "ccc"]

    server.refuses.clear()
    code, out, err = call("sync", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["uploaded"], found["present"], found["refused"]) == (1, 2, [])
    assert server.complete() == {"aaa", "bbb", "ccc"} and server.seen == ["aaa", "ccc", "bbb"]


@pytest.mark.fault("tracker", "the server refuses every request")
def test_a_server_that_refuses_everything_is_one_warning(server: Server, call: Call) -> None:
    for name in ("aaa", "bbb", "ccc"):
        complete(started(Path("runs"), name))
    server.status = 503
    result = call("sync")
    refused(result, "3 runs could not be uploaded", "check MLFLOW_TRACKING_URI", code=1)
    assert result[2].count("warning: ") == 1 and not server.runs


@pytest.mark.fault("silent damage", "files of a run that is to be uploaded")
def test_a_damaged_run_is_named_and_the_others_are_sent(server: Server, call: Call) -> None:
    runs = [complete(started(Path("runs"), name)) for name in ("aaa", "bbb", "ccc", "ddd")]
    (runs[0].path / "config.yaml").write_text("method: [")
    (runs[1].path / "cases.parquet").write_bytes(b"PAR1 no table")
    (runs[2].path / "summary.json").write_text('{"scores": ')
    result = call("sync")
    refused(result, "3 runs are damaged", code=1)
    assert "1 runs uploaded" in result[1] and "3 damaged (skipped)" in result[1]
    warnings = [line for line in result[2].splitlines() if line.startswith("warning: ")]
    for name, file in (("aaa", "config.yaml"), ("bbb", "cases"), ("ccc", "summary.json")):
        assert [1 for line in warnings if name in line and file in line], warnings
    assert server.complete() == {"ddd"}
