"""tracking.py: a kill leaves the old file or the new one, and the mirror never a double."""

from __future__ import annotations

import contextlib
import doctest
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glua_bench.config import RunConfig
from glua_bench.errors import ConfigError, RunFailure, UserError
from glua_bench.files import UNFINISHED, replacing
from glua_bench.records import fetch, mlflow_mirror
from glua_bench.records.environment import environment, git_state
from glua_bench.records.fetch import fetch_runs
from glua_bench.records.mlflow_mirror import MLflowMirror, tracking_uri
from glua_bench.records.naming import Comparison, final_metrics, run_name
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.records.tracker import COPIED, open_tracker
from glua_bench.task import Grid

CONFIG = RunConfig(
    "source_only",
    "phantom",
    "mr-ct",
    Grid(32, 7.0),
    {"lr": 0.001, "form": "plain"},
    steps=4,
    seed=7,
)
SUMMARY = {
    "scores": [
        {
            "selector": "last",
            "structure": "MYO",
            "dice": 0.5,
            "assd": float("nan"),
            "hd95": 9.0,
            "misses": 2,
        },
        {
            "selector": "last",
            "structure": "mean",
            "dice": 0.5,
            "assd": 4.0,
            "hd95": 9.0,
            "misses": 2,
        },
    ]
}
CASES = pd.DataFrame(
    {"case": ["ct_1", "ct_2"], "structure": ["MYO", "MYO"], "dice": [0.25, 0.75], "missed": 0}
)


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", ")"))
    return text


def started(root: Path, run_id: str = "abc123", config: RunConfig = CONFIG) -> RunDirectory:
    """A run that logged four steps."""
    run = RunDirectory(root, config, run_id)
    run.start({"data": {"train": "d1", "test": "d2"}, "code": "c1"}, [("train", 4)])
    for step in range(1, 5):
        run.log("train", step, {"loss": 1.0 / step, "dice": 0.1 * step})
    run.flush()
    return run


def complete(run: RunDirectory) -> RunDirectory:
    run.write_cases(CASES)
    (run.figures / "cases.png").write_bytes(b"a picture")
    run.finish(SUMMARY)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return started(tmp_path / "runs")


def steps(run: RunDirectory) -> list[tuple[str, int, int]]:
    lines = (run.path / "log.jsonl").read_text().splitlines()
    return [(r["stage"], r["step"], r["total_step"]) for r in map(json.loads, lines)]


# -- files ----------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
from glua_bench.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(run: RunDirectory) -> None:
    path = run.path / "config.yaml"
    before = path.read_text()
    died = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert died.returncode == -signal.SIGKILL
    assert path.read_text() == before
    assert len(list(run.path.glob(".writing-*"))) == 1
    run.start({})
    assert not list(run.path.glob(".writing-*"))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "full"),
        (errno.EROFS, "--runs"),
        (errno.EACCES, "--runs"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence(
    number: int, said: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunFailure, match=said) as error:
        run.finish(SUMMARY)
    assert str(run.path) in one_sentence(error)
    monkeypatch.undo()
    assert not run.done and not list(run.path.rglob(".writing-*"))


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunFailure, match="because a parent is a file") as error:
        started(tmp_path / "runs")
    one_sentence(error)


# -- done and failed ------------------------------------------------------------------------------


def test_a_run_is_done_when_it_was_finished(run: RunDirectory) -> None:
    assert not run.done
    complete(run)
    assert run.done and run.failed is None
    again = RunDirectory.open(run.path)
    assert again.done and again.id == run.id and again.config == CONFIG
    assert again.read_summary()["scores"][1] == SUMMARY["scores"][1]
    assert again.read_environment()["code"] == "c1"
    pd.testing.assert_frame_equal(again.read_cases(), CASES)


@pytest.mark.parametrize("damage", ["torn mark", "empty mark", "other summary", "no summary"])
def test_half_a_result_is_not_done(damage: str, run: RunDirectory) -> None:
    complete(run)
    mark, summary = run.path / "done", run.path / "summary.json"
    if damage == "torn mark":
        mark.write_text(mark.read_text()[:-20])
    elif damage == "empty mark":
        mark.write_text("")
    elif damage == "other summary":
        summary.write_text(summary.read_text().replace("0.5", "0.9"))
    else:
        summary.unlink()
    assert not run.done


def test_done_is_written_last(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the last phase stops, the run is not done."""
    replace, order = os.replace, []

    def watched(source: Any, target: Any) -> None:
        assert not run.done
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    run.finish(SUMMARY)
    assert order[-1] == "done" and set(order) == {"metrics.parquet", "summary.json", "done"}


def test_a_failure_takes_the_mark_away_and_a_new_attempt_forgets_it(run: RunDirectory) -> None:
    complete(run)
    run.fail("It\nbroke.")
    assert not run.done and run.failed == "It broke."
    run.start({})
    assert run.failed is None and not run.done
    run.fail("")
    assert run.failed == "unknown reason"
    complete(run)
    assert run.done and run.failed is None


def test_a_failure_on_a_broken_disk_hides_no_reason(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log("train", 5, {"loss": 1.0})

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(mlflow_mirror.tempfile, "mkstemp", refuse)
    run.fail("the reason")  # must not raise
    assert not run.done


# -- the log --------------------------------------------------------------------------------------


def test_metrics_are_what_was_logged(run: RunDirectory) -> None:
    run.log("more", 1, {"loss": float("nan")})
    complete(run)
    table = run.read_metrics()
    assert len(table) == 9
    loss = table[(table["name"] == "loss") & (table["stage"] == "train")]
    assert loss["step"].tolist() == [1, 2, 3, 4]
    assert loss["value"].tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4]
    (last,) = table[table["stage"] == "more"].to_dict("records")
    assert (last["step"], last["total_step"]) == (1, 5) and np.isnan(last["value"])


def test_lines_reach_the_disk_when_asked(run: RunDirectory) -> None:
    run.log("train", 5, {"loss": 1.0})
    run.flush()
    assert steps(run)[-1] == ("train", 5, 5)


def test_a_torn_line_is_dropped_before_the_next_one(run: RunDirectory) -> None:
    run.close()
    with (run.path / "log.jsonl").open("a") as log:
        log.write('{"stage": "train", "st')
    again = RunDirectory.open(run.path)
    again.log("train", 5, {"loss": 1.0})
    again.flush()
    assert [step for _, step, _ in steps(again)] == [1, 2, 3, 4, 5]


def test_rewinding_to_the_start_empties_the_log(run: RunDirectory) -> None:
    run.rewind("train", 0)
    assert steps(run) == []
    RunDirectory(run.runs_root, CONFIG, "never started").rewind("train", 0)  # nothing to forget


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    stopped=st.integers(0, 15),
    back=st.integers(0, 15),
    torn=st.booleans(),
    announced=st.booleans(),
)
def test_a_resumed_run_logs_every_step_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    stopped: int,
    back: int,
    torn: bool,
    announced: bool,
) -> None:
    """Stopped anywhere, with a checkpoint anywhere before: the log is that of one attempt."""
    plan = [(f"stage{i}", step + 1) for i, n in enumerate(lengths) for step in range(n)]
    wanted = [(stage, step, i + 1) for i, (stage, step) in enumerate(plan)]
    stopped = min(stopped, len(plan))
    back = min(back, stopped)
    stages = [(f"stage{i}", n) for i, n in enumerate(lengths)] if announced else []
    root = tmp_path_factory.mktemp("runs")

    first = RunDirectory(root, CONFIG, "id")
    first.start({}, stages)
    for stage, step in plan[:stopped]:
        first.log(stage, step, {"loss": 1.0})
    first.flush()
    if torn:
        with (first.path / "log.jsonl").open("a") as log:
            log.write('{"stage": "stage0", "step": 99, "tot')

    # A checkpoint says how many steps of which stage were done; 0 of the next after a stage's end.
    stage, step = plan[back] if back < len(plan) else (plan[-1][0], plan[-1][1] + 1)
    second = RunDirectory(root, CONFIG, "id")
    second.start({}, stages)
    second.rewind(stage, step - 1)
    assert steps(second) == wanted[:back] if stopped or torn else True
    for stage, step in plan[back:]:
        second.log(stage, step, {"loss": 1.0})
    second.flush()
    assert steps(second) == wanted


# -- several processes ----------------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from glua_bench.records.run_directory import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_has_one_process_and_a_killed_one_lets_go(run: RunDirectory) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunFailure, match="another process") as error, run.lock():
            pass
        assert str(run.path) in one_sentence(error)
    finally:
        other.kill()
        other.wait()
    with run.lock(), pytest.raises(RunFailure), RunDirectory.open(run.path).lock():
        pass
    with run.lock():  # it is free again
        pass


def test_an_error_inside_the_lock_comes_out_as_it_is(run: RunDirectory) -> None:
    with pytest.raises(OSError, match="mine"), run.lock():
        raise OSError("mine")


# -- finding runs ---------------------------------------------------------------------------------


def test_unreadable_runs_are_named_and_harm_no_other(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "broken": "method: [",
        "foreign": "surprise: 1",
        "text": "nothing",
        "empty": "",
        "partial": "method: a\ndataset: b\n",
    }.items():
        path = run.path.parent / name
        path.mkdir()
        (path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml"):
            RunDirectory.open(path)
    assert [found.id for found in list_runs(run.runs_root)] == [run.id]
    assert capsys.readouterr().err.count("warning: ") == 5
    assert list_runs(run.runs_root / "nowhere") == []
    with pytest.raises(UserError, match="not a run's directory"):
        RunDirectory.open(run.runs_root)


def test_missing_tables_are_one_sentence(run: RunDirectory) -> None:
    (run.path / "summary.json").write_text("{")
    (run.path / "cases.parquet").write_bytes(b"no table")
    for read in (run.read_cases, run.read_metrics, run.read_summary):
        with pytest.raises(UserError, match="give its command again") as error:
            read()
        one_sentence(error)


# -- the environment ------------------------------------------------------------------------------


def test_the_environment_names_versions_but_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "somebody"))
    monkeypatch.setattr(sys, "argv", ["glua-bench", str(tmp_path / "home" / "somebody" / "data")])
    found = environment(device="cpu")
    text = json.dumps(found)
    assert found["libraries"]["torch"] and found["libraries"]["medpy"] != "missing"
    assert found["device"] == "cpu" and found["command"] == ["glua-bench", "~/data"]
    assert "somebody" not in text


def test_git_state_sees_commits_and_changes(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


# -- the mirror -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without experiments: making one takes seconds, copying it none."""
    root = tmp_path_factory.mktemp("store")
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    client.search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of runs with an empty store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "runs"
    path.mkdir()
    shutil.copy(empty_store, path / "mlflow.db")
    return path


def mirrored(root: Path) -> list[Any]:
    """All runs that the store shows, deleted ones left out."""
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    ids = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(ids)


def counts(root: Path, warn: Callable[[str], None] | None = None) -> tuple[int, int, int, int]:
    mirror = MLflowMirror(root) if warn is None else MLflowMirror(root, warn)
    found = mirror.sync()
    return found.uploaded, found.present, found.unfinished, found.missed


def test_the_store_lies_among_the_runs_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("runs")) == f"sqlite:///{(tmp_path / 'runs' / 'mlflow.db').as_posix()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracker:5000")
    assert tracking_uri(Path("runs")) == "http://user:secret@tracker:5000"
    assert MLflowMirror(Path("runs")).place == "http://tracker:5000"


def test_a_mirrored_run_shows_everything(root: Path) -> None:
    run = complete(started(root))
    assert MLflowMirror(root).mirror(run)
    (shown,) = mirrored(root)
    assert shown.info.status == "FINISHED"
    assert "source_only" in shown.info.run_name and "privileged" not in shown.info.run_name

    params = shown.data.params
    assert params["method"] == "source_only" and params["seed"] == "7"
    assert params["method.lr"] == "0.001" and params["method.form"] == "plain"
    assert params["grid.spacing"] == "7.0" and params["segmenter.name"] == CONFIG.segmenter.name

    metrics = shown.data.metrics
    assert metrics["final/last/mean/dice"] == 0.5 and metrics["final/last/MYO/misses"] == 2
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    history = client.get_metric_history(shown.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, 1 / i) for i in range(1, 5)]

    tags = shown.data.tags
    assert tags["glua_bench.id"] == run.id and tags["glua_bench.code"] == "c1"
    assert tags["glua_bench.data"] == "train=d1 test=d2"
    assert tags["glua_bench.privileged"] == "false"

    files = {f.path for f in client.list_artifacts(shown.info.run_id)}
    assert files == {*COPIED, mlflow_mirror.DIGESTS, "cases.csv", "figures"}
    figures = client.list_artifacts(shown.info.run_id, "figures")
    assert [f.path for f in figures] == ["figures/cases.png"]
    table = pd.read_csv(client.download_artifacts(shown.info.run_id, "cases.csv"))
    assert table["dice"].tolist() == [0.25, 0.75]


def test_nothing_half_written_is_mirrored_or_fetched(root: Path, tmp_path: Path) -> None:
    run = complete(started(root))
    names = (*COPIED, "failed", "dataset.json", "figures/x.png", "predictions/x.nii.gz")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(replacing(run.path / name)).write_text("half")
        assert MLflowMirror(root).mirror(run)
        (shown,) = mirrored(root)
        client = mlflow_mirror.mlflow_client(tracking_uri(root))
        files = {f.path for f in client.list_artifacts(shown.info.run_id)}
        assert files == {*COPIED, mlflow_mirror.DIGESTS, "cases.csv", "figures"}
        figures = client.list_artifacts(shown.info.run_id, "figures")
        assert [f.path for f in figures] == ["figures/cases.png"]
        (fetched,) = fetch.fetch_runs(tracking_uri(root), tmp_path / "fetched")
        assert fetched.done and not list((tmp_path / "fetched").rglob(f"{UNFINISHED}*"))


def test_a_mirrored_run_takes_from_its_first_file_to_its_last(root: Path) -> None:
    run = RunDirectory(root, CONFIG, "abc123")
    run.start({"time": "2020-01-01T00:00:10+0000"})
    run.log("train", 1, {"loss": 1.0})
    complete(run)
    (run.path / "log.jsonl").write_text(
        (run.path / "log.jsonl").read_text().replace('"time": 1', '"time": 1577836820.0, "was": 1')
    )
    mark = json.loads((run.path / "done").read_text())
    (run.path / "done").write_text(json.dumps({**mark, "time": "2020-01-01T01:00:30+0100"}))
    assert MLflowMirror(root).mirror(run)
    (shown,) = mirrored(root)
    assert (shown.info.start_time, shown.info.end_time) == (1577836810_000, 1577836830_000)


def test_syncing_again_makes_no_doubles(root: Path) -> None:
    for name in ("one", "two"):
        complete(started(root, name))
    started(root, "unfinished")
    assert counts(root) == (2, 0, 1, 0)
    before = {r.info.run_id for r in mirrored(root)}
    assert len(before) == 2
    assert counts(root) == (0, 2, 1, 0)
    assert MLflowMirror(root).mirror(RunDirectory.open(root / "phantom" / "source_only" / "one"))
    assert {r.info.run_id for r in mirrored(root)} == before
    assert {r.data.tags["glua_bench.id"] for r in mirrored(root)} == {"one", "two"}
    # The tracker's own copies of their files are no runs.
    assert {found.id for found in list_runs(root)} == {"one", "two", "unfinished"}


def test_long_logs_arrive_whole(root: Path) -> None:
    """More than the tracker takes in one request."""
    run = RunDirectory(root, CONFIG, "long")
    run.start({}, [("train", 1100)])
    for step in range(1, 1101):
        run.log("train", step, {"loss": float(step)})
    complete(run)
    assert MLflowMirror(root).mirror(run)
    (shown,) = mirrored(root)
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    history = client.get_metric_history(shown.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 1101))


def test_a_failed_run_is_shown_as_failed_and_replaced_when_it_succeeds(root: Path) -> None:
    run = started(root)
    run.fail("the loss is nan")
    assert counts(root) == (1, 0, 0, 0)
    (shown,) = mirrored(root)
    assert shown.info.status == "FAILED"
    assert shown.data.tags["glua_bench.error"] == "the loss is nan"
    assert not any(name.startswith("final/") for name in shown.data.metrics)
    assert counts(root) == (0, 1, 0, 0)

    complete(run)
    assert counts(root) == (1, 0, 0, 0)
    (shown,) = mirrored(root)
    assert shown.info.status == "FINISHED" and "glua_bench.error" not in shown.data.tags


def test_two_mirrors_at_once_make_no_double(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would find the run missing, were it not for the lock."""
    from mlflow import MlflowClient

    run, create = complete(started(root)), MlflowClient.create_run
    both = threading.Barrier(2)

    def slowly(*arguments: Any, **named: Any) -> Any:
        # Without the lock both arrive here, and both go on.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return create(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "create_run", slowly)
    threads = [threading.Thread(target=MLflowMirror(root).mirror, args=(run,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [shown.data.tags["glua_bench.id"] for shown in mirrored(root)] == [run.id]


@pytest.mark.parametrize("step", ["log_batch", "log_artifact", "set_terminated"])
def test_an_interrupted_upload_is_replaced(
    step: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run, warnings = complete(started(root)), []

    def broken(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("the line is cut")

    monkeypatch.setattr(MlflowClient, step, broken)
    assert MLflowMirror(root, warnings.append).mirror(run) is False
    (warning,) = warnings
    assert "the line is cut" in warning and "glua-bench sync" in warning
    assert run.done
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert len(mirrored(root)) == 1  # the half
    assert counts(root) == (1, 0, 0, 0)
    (shown,) = mirrored(root)
    assert shown.info.status == "FINISHED" and shown.data.metrics["final/last/mean/dice"] == 0.5


def test_a_tracker_that_ends_the_process_does_not_end_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*arguments: Any) -> None:
        raise SystemExit(3)

    warnings: list[str] = []
    monkeypatch.setattr(mlflow_mirror, "mlflow_client", leave)
    assert not MLflowMirror(root, warnings.append).mirror(complete(started(root)))
    assert len(warnings) == 1


def test_a_dead_tracker_is_one_warning_and_is_caught_up_later(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Port 9 answers nobody; the client's own retries would take minutes."""
    runs = [complete(started(root, name)) for name in ("one", "two", "three")]
    before = {p: p.read_bytes() for p in runs[0].path.rglob("*") if p.is_file()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    warnings: list[str] = []
    assert MLflowMirror(root, warnings.append).mirror(runs[0]) is False
    assert counts(root, warnings.append) == (0, 0, 0, 3)
    assert len(warnings) == 2 and "127.0.0.1:9" in warnings[0]
    assert "secret" not in "".join(warnings)
    assert all(run.done for run in runs)
    assert {p: p.read_bytes() for p in runs[0].path.rglob("*") if p.is_file()} == before

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert counts(root) == (3, 0, 0, 0)
    assert counts(root) == (0, 3, 0, 0)


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


def test_a_server_that_answers_with_errors_is_a_warning_too(
    root: Path, refusing_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing_server)
    warnings: list[str] = []
    run = complete(started(root))
    assert MLflowMirror(root, warnings.append).mirror(run) is False
    assert len(warnings) == 1 and "\n" not in warnings[0]


def test_final_metrics_leave_out_what_is_not_known() -> None:
    assert final_metrics({}) == {}
    records = [{"selector": "last", "structure": "AA", "dice": 0.5, "assd": None}]
    assert final_metrics({"scores": records}) == {"final/last/AA/dice": 0.5}


ALIKE = ("a b", "a(b", "a[b", "a/b", "a_b", "final", "ä", "..", "x" * 300, "x" * 299 + "y")


def test_structures_whose_names_are_alike_to_a_tracker_stay_apart(root: Path) -> None:
    """Each keeps its own Dice and its own ASSD, and both stand under one name."""
    run = started(root)
    run.log("train", 4, {name: float(index) for index, name in enumerate(ALIKE)})
    run.flush()
    run.write_cases(CASES)
    scores = [
        {"selector": "last", "structure": name, "dice": index / 100, "assd": 1.0 + index}
        for index, name in enumerate(ALIKE)
    ]
    run.finish({"scores": scores})
    mirror = MLflowMirror(root)
    assert mirror.mirror(run)
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    (copy,) = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        filter_string=f"tags.`glua_bench.id` = '{run.id}'",
    )
    own = {k: v for k, v in copy.data.metrics.items() if k.startswith("final/last/")}
    assert len(own) == 2 * len(ALIKE)
    dice = {k.removesuffix("/dice"): v for k, v in own.items() if k.endswith("/dice")}
    assd = {k.removesuffix("/assd"): v for k, v in own.items() if k.endswith("/assd")}
    assert assd == pytest.approx({k: 1 + 100 * v for k, v in dice.items()})
    assert sorted(dice.values()) == pytest.approx([i / 100 for i in range(len(ALIKE))])
    assert (own["final/last/a b/dice"], own["final/last/a_b/dice"]) == (0.0, 0.04)
    logged = {v for k, v in copy.data.metrics.items() if k.startswith("train/")}
    assert set(map(float, range(len(ALIKE)))) <= logged


# -- names ----------------------------------------------------------------------------------------

QUICK = replace(
    CONFIG,
    method_config={},
    segmenter=replace(CONFIG.segmenter, width=8, depth=4),
    preset="quick",
    steps=500,
)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "source_only | mr-ct | seed 7"),
        (
            {
                "method": "glua",
                "changed": {"mask": "none", "lambda_output": 0.5},
                "augmentation": "photometric",
            },
            "glua + photometric, mask=none, lambda_output=0.5 | mr-ct | seed 7",
        ),
        (
            {"scenario": "supervised", "steps": 4, "augmentation": "none"},
            "source_only, supervised (privileged) | mr-ct | seed 7 | steps=4, augmentation=none",
        ),
        (
            {"preset": "paper"},
            "source_only | mr-ct | seed 7 | segmenter.width=8, segmenter.depth=4, steps=500",
        ),
        (
            {"method": "mine", "method_config": {"a": 1}, "changed": {"a": 1}},
            "mine, a=1 | mr-ct | seed 7",
        ),
        ({"slices": 3, "slice_distance": 4.0}, "source_only | mr-ct | seed 7 | slices=3"),
    ],
)
def test_a_name_tells_what_is_not_the_default(changes: dict[str, Any], name: str) -> None:
    method = changes.pop("changed", {})
    assert run_name(replace(QUICK, **changes), method) == name


def test_the_examples_hold() -> None:
    assert doctest.testmod(mlflow_mirror).failed == 0


# -- which tracker --------------------------------------------------------------------------------


def test_runs_are_mirrored_to_mlflow_unless_another_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_tracker(tmp_path), MLflowMirror)
    assert open_tracker(tmp_path).browse.startswith("mlflow ui --backend-store-uri sqlite:///")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracker:5000")
    assert open_tracker(tmp_path).browse == "http://tracker:5000"
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "folder_tracker:FolderTracker")
    monkeypatch.setenv("FOLDER_TRACKER", str(tmp_path / "shown"))
    assert open_tracker(tmp_path).place == str(tmp_path / "shown")


@pytest.mark.parametrize("name", ["no_module:Class", "json:Missing", "a b", "wandb"])
def test_a_tracker_that_is_not_there_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUA_BENCH_TRACKER", name)
    with pytest.raises(ConfigError, match="MODULE:CLASS") as error:
        open_tracker(tmp_path)
    assert name in one_sentence(error)


# -- comparisons ----------------------------------------------------------------------------------


def two_runs(root: Path) -> list[tuple[str, RunDirectory]]:
    return [
        ("plain", complete(started(root, "one"))),
        (
            "other (ours)",
            complete(started(root, "two", replace(CONFIG, seed=8, direction="ct-mr"))),
        ),
    ]


def parents_and_children(root: Path) -> tuple[list[Any], list[Any]]:
    runs = mirrored(root)
    return (
        [run for run in runs if "glua_bench.comparison" in run.data.tags],
        sorted(
            (run for run in runs if "glua_bench.id" in run.data.tags),
            key=lambda run: run.data.tags["glua_bench.id"],
        ),
    )


def test_a_comparison_is_what_is_compared_and_not_how_it_was_asked_for(tmp_path: Path) -> None:
    one, two = members = two_runs(tmp_path)
    known = Comparison("compare a", members)
    assert known.name == (
        "compare a | phantom mr-ct, ct-mr | 2 seeds | quick, "
        "segmenter.width=32, segmenter.depth=5, steps=4"
    )
    assert Comparison("b", [two, one], began=0.0).id == known.id
    assert Comparison("compare a", [one]).id != known.id
    assert Comparison("compare a", [one, ("renamed", two[1])]).id != known.id
    assert Comparison("compare a", [one, (two[0], started(tmp_path, "three"))]).id != known.id
    shared = known.shared()
    assert shared["steps"] == 4 and shared["method.lr"] == 0.001
    assert not {"seed", "direction", "preset", "selectors"} & set(shared)
    assert Comparison("compare a", [one]).name.split(" | ")[1:3] == ["phantom mr-ct", "1 seed"]


def test_runs_are_nested_under_their_comparison(root: Path, tmp_path: Path) -> None:
    members = two_runs(root)
    assert MLflowMirror(root).mirror(members[0][1])  # done before, and alone
    table = tmp_path / "table.csv"
    table.write_text("entry,Dice\n")
    numbers = {"mr-ct/dice/plain": 0.5, "mr-ct/dice_sd/plain": float("nan")}
    comparison = Comparison("compare a", members, began=1000.0)
    assert MLflowMirror(root).nest(comparison, numbers, [table], "plain is best")
    (parent,), children = parents_and_children(root)
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [
        parent.info.run_id,
        parent.info.run_id,
    ]
    assert [child.data.tags["glua_bench.entry"] for child in children] == ["plain", "other (ours)"]
    assert {child.info.experiment_id for child in children} == {parent.info.experiment_id}
    assert parent.info.run_name == comparison.name and parent.info.start_time == 1_000_000
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"mr-ct/dice/plain": 0.5}
    assert parent.data.params["entries"] == "2" and parent.data.params["steps"] == "4"
    tags = parent.data.tags
    assert tags["mlflow.note.content"] == "plain is best"
    assert (
        tags["glua_bench.entries"] == "plain, other (ours)" and tags["glua_bench.seeds"] == "7, 8"
    )
    assert tags["glua_bench.runs"] == "2 of 2 done"
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["table.csv"]


def test_the_same_comparison_again_changes_its_parent_and_makes_none(root: Path) -> None:
    members = two_runs(root)
    comparison = Comparison("compare a", members)
    for dice in (0.5, 0.5, 0.75):
        assert MLflowMirror(root).nest(comparison, {"dice": dice}, note=f"{dice}")
    (parent,), children = parents_and_children(root)
    assert parent.data.metrics == {"dice": 0.75}
    assert parent.data.tags["mlflow.note.content"] == "0.75"
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    history = client.get_metric_history(parent.info.run_id, "dice")
    assert [m.value for m in history] == [0.5, 0.75]
    # A run has one parent: the latest command wins, and the earlier comparison keeps its numbers.
    assert MLflowMirror(root).nest(Comparison("ablate a", members[:1]), {})
    parents, children = parents_and_children(root)
    (new,) = (p for p in parents if p.info.run_id != parent.info.run_id)
    assert new.info.run_name.startswith("ablate a | ")
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [
        new.info.run_id,
        parent.info.run_id,
    ]


def test_a_group_that_grows_has_one_parent_that_says_what_it_is(root: Path) -> None:
    """As a sweep does, whose runs are not known when it begins."""
    members = two_runs(root)
    settings = {"method": "plain", "searched: lr": "0.1, 0.2"}

    def grown(count: int, chosen: str) -> Comparison:
        facts = {"chosen": chosen, "oracle": "false"}
        own = members[:count]
        return Comparison("sweep a", own, 1000.0, "own", settings, facts, complete=count == 2)

    assert MLflowMirror(root).nest(grown(1, "lr=0.1"), {"chosen/im": 0.5})
    (parent,), _ = parents_and_children(root)
    assert parent.info.status == "RUNNING" and parent.data.tags["glua_bench.chosen"] == "lr=0.1"
    # Of one run alone everything would be shared, and parameters cannot be changed afterwards.
    wanted = {"method": "plain", "searched_ lr": "0.1, 0.2"}
    assert parent.data.params == wanted and parent.info.run_name == "sweep a"
    assert MLflowMirror(root).nest(grown(2, "lr=0.2"), {"chosen/im": 0.75})
    (same,), children = parents_and_children(root)
    assert same.info.run_id == parent.info.run_id and same.info.status == "FINISHED"
    assert same.data.params == wanted and same.data.metrics == {"chosen/im": 0.75}
    assert same.data.tags["glua_bench.chosen"] == "lr=0.2"
    assert same.data.tags["glua_bench.oracle"] == "false"
    assert [c.data.tags["mlflow.parentRunId"] for c in children] == [same.info.run_id] * 2


def test_a_group_is_followed_while_it_grows(root: Path, monkeypatch: Any) -> None:
    """It runs, was ended early, runs again and is finished; a run that failed is its child."""
    members = two_runs(root)
    members[0][1].fail("no reason")
    mirror = MLflowMirror(root)
    uploaded: list[str] = []
    upload = mirror._upload
    monkeypatch.setattr(mirror, "_upload", lambda run: (uploaded.append(run.id), upload(run))[1])

    def shown(count: int, **how: bool) -> Any:
        group = Comparison("sweep a", members[:count], 1000.0, "own", {}, {}, **how)
        assert mirror.nest(group, {})
        (parent,), children = parents_and_children(root)
        assert len(children) == count
        assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
        return parent.info

    assert shown(1, complete=False).status == "RUNNING"
    stopped = shown(1, complete=False, stopped=True)
    assert stopped.status == "KILLED" and stopped.end_time is not None
    assert shown(1, complete=False).status == "RUNNING"
    assert shown(2).status == "FINISHED"  # a search does not fail by some of its runs
    assert uploaded == [run.id for _, run in members]  # each is looked up once
    none = Comparison("sweep b", members[:1], 1000.0, "other", {}, {})
    assert mirror.nest(none, {})
    assert {p.info.status for p in parents_and_children(root)[0]} == {"FINISHED", "FAILED"}


def test_syncing_keeps_runs_where_they_are_nested(root: Path) -> None:
    """Also those whose copy is replaced, here because they have succeeded since."""
    members = two_runs(root)
    members[1][1].fail("no reason")
    assert MLflowMirror(root).nest(Comparison("compare a", members), {})
    (parent,), (_, child) = parents_and_children(root)
    assert child.info.status == parent.info.status == "FAILED"
    assert parent.data.tags["glua_bench.runs"] == "1 of 2 done"
    complete(members[1][1])
    assert counts(root) == (1, 1, 0, 0)
    (same,), children = parents_and_children(root)
    assert same.info.run_id == parent.info.run_id
    assert [c.data.tags["mlflow.parentRunId"] for c in children] == [same.info.run_id] * 2
    assert [c.data.tags["glua_bench.entry"] for c in children] == ["plain", "other (ours)"]
    assert children[1].info.status == "FINISHED" and children[1].info.run_id != child.info.run_id
    assert MLflowMirror(root).nest(Comparison("compare a", members), {})
    assert parents_and_children(root)[0][0].info.status == "FINISHED"


def test_two_processes_make_one_parent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would find the parent missing, were it not for the lock."""
    from mlflow import MlflowClient

    members, create = two_runs(root), MlflowClient.create_run
    assert counts(root) == (2, 0, 0, 0)
    both = threading.Barrier(2)

    def slowly(*arguments: Any, **named: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return create(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "create_run", slowly)
    comparison = Comparison("compare a", members)
    threads = [
        threading.Thread(target=MLflowMirror(root).nest, args=(comparison, {})) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parents, children = parents_and_children(root)
    assert len(parents) == 1 and len(children) == 2


def test_doubles_that_machines_without_a_common_lock_made_become_one(root: Path) -> None:
    members = two_runs(root)
    comparison = Comparison("compare a", members, began=2000.0)
    assert MLflowMirror(root).nest(comparison, {})
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    ((first,), _) = parents_and_children(root)
    older = client.create_run(
        first.info.experiment_id, 1_000_000, {"glua_bench.comparison": comparison.id}
    )
    assert MLflowMirror(root).nest(comparison, {})
    (parent,), children = parents_and_children(root)
    assert parent.info.run_id == older.info.run_id
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {older.info.run_id}


def test_a_comparison_that_a_dead_tracker_missed_is_one_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, warnings = Comparison("compare a", two_runs(root)), []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    assert MLflowMirror(root, warnings.append).nest(comparison, {}) is False
    (warning,) = warnings
    assert "127.0.0.1:9" in warning and "secret" not in warning and "same command" in warning
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert MLflowMirror(root, warnings.append).nest(comparison, {}) is True
    assert len(warnings) == 1 and len(parents_and_children(root)[0]) == 1


# -- the way back ---------------------------------------------------------------------------------


def files_of(root: Path) -> dict[str, bytes]:
    """Path below a directory → content, of what a copy holds."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted((root / "phantom").rglob("*"))
        if path.name in COPIED or path.suffix == ".png"
    }


def test_what_was_mirrored_is_fetched_byte_for_byte(root: Path, tmp_path: Path) -> None:
    members = two_runs(root)
    started(root, "unfinished")
    started(root, "failed").fail("no reason")
    complete(started(root, "removed"))
    assert MLflowMirror(root).nest(Comparison("compare a", members), {"dice": 0.5})
    assert counts(root) == (2, 2, 1, 0)
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    for shown in mirrored(root):
        if shown.data.tags.get("glua_bench.id") == "removed":
            client.delete_run(shown.info.run_id)
            shutil.rmtree(root / "phantom" / "source_only" / "removed")

    into = tmp_path / "new" / "fetched"
    runs = fetch_runs(tracking_uri(root), into)
    assert [run.id for run in runs] == ["one", "two"] and all(run.done for run in runs)
    assert [run.path for run in runs] == [run.path for run in list_runs(into)]
    shutil.rmtree(root / "phantom" / "source_only" / "failed")
    shutil.rmtree(root / "phantom" / "source_only" / "unfinished")
    assert files_of(into) == files_of(root) and len(files_of(into)) == 14
    assert [p.name for p in into.iterdir()] == ["phantom"]  # no leftovers
    assert runs[0].config == CONFIG
    pd.testing.assert_frame_equal(runs[0].read_metrics(), members[0][1].read_metrics())

    before = {path: path.stat().st_mtime_ns for path in into.rglob("*")}
    again = fetch_runs(tracking_uri(root), into, ["glua-bench/phantom"])
    assert [run.path for run in again] == [run.path for run in runs]
    assert {path: path.stat().st_mtime_ns for path in into.rglob("*")} == before


def test_what_a_run_keeps_of_its_dataset_travels(root: Path, tmp_path: Path) -> None:
    run = started(root)
    kept = {"dataset.json": "{}", "dataset.yaml": "name: mine", "dataset_ct.csv": "image,label"}
    for name, text in {**kept, "dataset.py": "no", "notes_ct.csv": "no"}.items():
        (run.path / name).write_text(text)
    assert MLflowMirror(root).mirror(complete(run))
    (fetched,) = fetch_runs(tracking_uri(root), tmp_path / "fetched")
    texts = {path.name: path.read_text() for path in fetched.path.glob("*ataset*")}
    assert texts == kept and not (fetched.path / "notes_ct.csv").exists()


@pytest.mark.parametrize("name", [*COPIED, mlflow_mirror.DIGESTS, "figures/cases.png"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_copy_is_left_out_and_named(
    name: str, damage: str, root: Path, tmp_path: Path
) -> None:
    for _, run in two_runs(root):
        assert MLflowMirror(root).mirror(run)
    (copy,) = (r for r in mirrored(root) if r.data.tags["glua_bench.id"] == "two")
    artifact = Path(copy.info.artifact_uri.removeprefix("file://")) / name
    if damage == "missing":
        artifact.unlink()
    else:
        artifact.write_bytes(artifact.read_bytes()[:-5])
    warnings: list[str] = []
    runs = fetch_runs(tracking_uri(root), tmp_path / "fetched", warn=warnings.append)
    assert [run.id for run in runs] == ["one"]
    (warning,) = warnings
    assert warning.startswith("Run two (") and name in warning and warning.endswith(".")
    assert [run.id for run in list_runs(tmp_path / "fetched")] == ["one"]


def test_what_lies_in_the_place_of_a_run_is_not_touched(root: Path, tmp_path: Path) -> None:
    assert MLflowMirror(root).mirror(complete(started(root)))
    mine = started(tmp_path / "fetched")
    warnings: list[str] = []
    with pytest.raises(UserError, match="None of the 1 runs") as error:
        fetch_runs(tracking_uri(root), tmp_path / "fetched", warn=warnings.append)
    one_sentence(error)
    assert len(warnings) == 1 and str(mine.path) in warnings[0]
    assert not mine.done and (mine.path / "log.jsonl").is_file()


def test_a_tracker_cannot_choose_where_files_go(root: Path, tmp_path: Path) -> None:
    assert MLflowMirror(root).mirror(complete(started(root)))
    (copy,) = mirrored(root)
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    client.set_tag(copy.info.run_id, "glua_bench.id", "../../../../outside")
    warnings: list[str] = []
    with pytest.raises(UserError):
        fetch_runs(tracking_uri(root), tmp_path / "a" / "fetched", warn=warnings.append)
    assert len(warnings) == 1 and "outside" in warnings[0]
    assert not list(tmp_path.rglob("outside"))


def test_more_copies_than_a_page_are_all_found(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    search = MlflowClient.search_runs
    for name in ("one", "two", "three"):
        assert MLflowMirror(root).mirror(complete(started(root, name)))
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *given, **named: search(*given, **named, max_results=1)
    )
    runs = fetch_runs(tracking_uri(root), tmp_path / "fetched")
    assert [run.id for run in runs] == ["one", "three", "two"]


def test_a_tracker_that_serves_no_runs_is_one_sentence(
    root: Path, refusing_server: str, tmp_path: Path
) -> None:
    into = tmp_path / "fetched"
    with pytest.raises(UserError, match="has no finished runs") as error:
        fetch_runs(tracking_uri(root), into)
    assert "glua-bench sync" in one_sentence(error) and tracking_uri(root) in str(error.value)
    with pytest.raises(UserError, match="no experiment 'other'") as error:
        fetch_runs(tracking_uri(root), into, ["other"])
    one_sentence(error)
    nowhere = f"sqlite:///{tmp_path}/no.db"
    dead = "http://user:secret@127.0.0.1:9"
    for uri in (nowhere, dead, refusing_server, "foo://bar"):
        with pytest.raises(UserError, match="cannot be read") as error:
            fetch_runs(uri, into)
        assert uri.split("@")[-1] in one_sentence(error) and "secret" not in str(error.value)
    assert not (tmp_path / "no.db").exists() and not into.exists()


def test_a_tracker_that_dies_meanwhile_is_one_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every further run would wait for an answer in vain."""
    for _, run in two_runs(root):
        assert MLflowMirror(root).mirror(run)

    def dead(*given: Any) -> None:
        raise ConnectionRefusedError("nobody answers")

    monkeypatch.setattr(fetch, "_download", dead)
    monkeypatch.setattr(fetch, "check_tracker", lambda uri: None)
    warnings: list[str] = []
    with pytest.raises(UserError, match="None of the 2"):
        fetch_runs(tracking_uri(root), tmp_path, warn=warnings.append)
    assert len(warnings) == 2
    copies = fetch._copies(tracking_uri(root), None)
    monkeypatch.setattr(fetch, "_copies", lambda *given: copies)
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    monkeypatch.setattr(fetch, "mlflow_client", lambda uri: client)
    monkeypatch.setattr(fetch, "check_tracker", dead)
    with pytest.raises(UserError, match="cannot be read"):
        fetch_runs(tracking_uri(root), tmp_path, warn=warnings.append)
    assert len(warnings) == 2
