"""run_directory.py: a kill leaves the old file or the new one, and no step is logged twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import CASES, CONFIG, SUMMARY, complete, one_sentence, started

from glua_bench.errors import RunFailure, UserError
from glua_bench.records.run_directory import RunDirectory, list_runs


def steps(run: RunDirectory) -> list[tuple[str, int, int]]:
    lines = (run.path / "log.jsonl").read_text().splitlines()
    return [(r["stage"], r["step"], r["total_step"]) for r in map(json.loads, lines)]


KILLED = """
import os, signal, sys
from pathlib import Path
from glua_bench.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault("killed", "kill the writer of a file before it is renamed")
def test_a_killed_writer_leaves_the_old_file(run: RunDirectory) -> None:
    path = run.path / "config.yaml"
    before = path.read_text()
    died = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert died.returncode == -signal.SIGKILL
    assert path.read_text() == before
    assert len(list(run.path.glob(".writing-*"))) == 1
    run.start({})
    assert not list(run.path.glob(".writing-*"))


@pytest.mark.fault("full disk", "refuse every write of a finishing run")
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


def test_a_run_is_done_when_it_was_finished(run: RunDirectory) -> None:
    assert not run.done
    complete(run)
    assert run.done and run.failed is None
    again = RunDirectory.open(run.path)
    assert again.done and again.id == run.id and again.config == CONFIG
    assert again.read_summary()["scores"][1] == SUMMARY["scores"][1]
    assert again.read_environment()["code"] == "c1"
    pd.testing.assert_frame_equal(again.read_cases(), CASES)


@pytest.mark.fault("sealed results", "tear `done` or the summary")
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
    """Until the last file is written, the run is not done."""
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


@pytest.mark.fault("full disk", "refuse the record of a failure")
def test_a_failure_on_a_broken_disk_hides_no_reason(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log("train", 5, {"loss": 1.0})

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    run.fail("the reason")  # must not raise
    assert not run.done


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


@pytest.mark.fault("killed", "tear the last line of the log")
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
    RunDirectory(run.runs_root, CONFIG, "never started").rewind("train", 0)  # no log


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
    """The log equals that of an uninterrupted run, for any position of stop and checkpoint."""
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

    # A checkpoint stores the stage and its steps; after a stage, 0 steps of the next one.
    stage, step = plan[back] if back < len(plan) else (plan[-1][0], plan[-1][1] + 1)
    second = RunDirectory(root, CONFIG, "id")
    second.start({}, stages)
    second.rewind(stage, step - 1)
    assert steps(second) == wanted[:back] if stopped or torn else True
    for stage, step in plan[back:]:
        second.log(stage, step, {"loss": 1.0})
    second.flush()
    assert steps(second) == wanted


HOLDS = """
import sys, time
from pathlib import Path
from glua_bench.records.run_directory import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.fault("processes", "run twice at once, and kill the holder of the lock")
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


@pytest.mark.fault("hostile files", "put any content into config.yaml")
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
        with pytest.raises(UserError, match="repeat its command") as error:
            read()
        one_sentence(error)
