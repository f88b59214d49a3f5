"""executor.py: runs are shared, done once, and resumed or reported if they fail."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sample_runs import as_version_1
from small_runs import DISCS as PLUGINS

from glua_bench.cli import api
from glua_bench.errors import RunFailure
from glua_bench.files import try_lock
from glua_bench.records import mlflow_mirror, run_directory
from glua_bench.reports.comparison import collect
from glua_bench.runs import execution, matrix
from glua_bench.runs import executor as executor_module
from glua_bench.runs import plan as planning
from glua_bench.runs.executor import Executor
from glua_bench.runs.matrix import Planned, comparison, plan
from glua_bench.runs.plan import LOST_CODE, PlannedRun
from glua_bench.runs.request import RunOptions
from glua_bench.runs.timing.estimate import Estimator

Call = Callable[..., tuple[int, str, str]]


def cells_of(base: RunOptions, seeds: int = 2) -> list[Planned]:
    return plan(comparison(["random_gamma"], ["discs"], [], seeds, base, bounds=False))


def in_process(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
    """Execute the run as a child process would."""
    execution.execute(planning.plan(run.request), execution.Progress(enabled=False))
    return 0, ""


def test_runs_are_done_once_and_skipped_afterwards(base: RunOptions) -> None:
    planned = cells_of(base)
    said: list[str] = []
    outcome = Executor(planned, report=said.append, start=in_process).run()
    assert (outcome.ran, outcome.before, outcome.elsewhere, outcome.failed) == (2, 0, 0, {})
    assert [line.split()[0] for line in said] == ["begin", "done", "begin", "done"]
    assert "(2 of 2)" in said[-1]
    known = Estimator().of(planned[0].run)
    assert known.basis == "from 2 finished runs" and known.total > 0

    def never(*given: Any) -> tuple[int, str]:
        raise AssertionError("a finished run was started")

    outcome = Executor(cells_of(base), start=never).run()
    assert (outcome.ran, outcome.before) == (0, 2)


def test_warnings_of_processes_are_told(base: RunOptions) -> None:
    """For example, of a damaged stage that was trained again; other lines are not."""
    said: list[str] = []

    def warning(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        in_process(run, environment)
        return 0, "a library says something\nwarning: /cache/stem.pt is damaged.\n"

    Executor(cells_of(base, seeds=1), report=said.append, start=warning).run()
    assert [line for line in said if "warning" in line or "library" in line] == [
        f"{said[0].removeprefix('begin  ')}: warning: /cache/stem.pt is damaged."
    ]


def test_a_failure_is_kept_and_tried_again_only_if_asked(base: RunOptions) -> None:
    planned = cells_of(base)

    def failing(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        if run.request.seed == 0:
            planned[0].run.directory.fail("the disk is full.")
            return 1, "glua-bench: error: the disk is full."
        return in_process(run, environment)

    outcome = Executor(planned, start=failing).run()
    assert outcome.ran == 1 and list(outcome.failed.values()) == ["the disk is full."]
    assert [p.state for p in planned] == ["failed", "done"]
    said: list[str] = []
    more = cells_of(base, 3)
    outcome = Executor(more, report=said.append, start=in_process).run()
    assert (outcome.ran, outcome.before, len(outcome.failed)) == (1, 1, 1)
    assert "(1 of 1)" in said[-1]  # earlier failures are not counted
    outcome = Executor(cells_of(base), retry_failed=True, start=in_process).run()
    assert (outcome.ran, outcome.before, outcome.failed) == (1, 1, {})


@pytest.mark.fault("sealed results", "edit a score of a run that a comparison has finished")
def test_a_damaged_run_is_a_failure_that_retrying_mends(base: RunOptions) -> None:
    planned = cells_of(base)
    assert Executor(planned, start=in_process).run().ran == 2
    run = planned[0].run.directory
    scores = run.read_cases()
    scores.assign(dice=1.0).to_parquet(run.path / "cases.parquet", index=False)
    edited = (run.path / "cases.parquet").read_bytes()

    assert [p.state for p in planned] == ["failed", "done"]
    outcome = Executor(cells_of(base), start=in_process).run()
    assert (outcome.ran, outcome.before) == (0, 1) and "cases.parquet" in outcome.failed[run.id]
    assert len(matrix.finished(planned)) == 1  # it is in no table

    said: list[str] = []
    again = Executor(cells_of(base), retry_failed=True, report=said.append, start=in_process).run()
    assert (again.ran, again.before, again.failed) == (1, 1, {})
    assert any(line.startswith("mend ") and "cases.parquet" in line for line in said)
    assert run.done and run.sealed
    pd.testing.assert_frame_equal(run.read_cases(), scores)
    place = base.runs_root / "damaged" / "discs" / "random_gamma" / run.id
    assert (place / "cases.parquet").read_bytes() == edited and (place / "done").is_file()

    # A run directory of the previous version is compared, and never called sealed.
    as_version_1(run)
    known = cells_of(base)
    assert Executor(known, start=in_process).run().before == 2
    assert set(collect(matrix.finished(known))["seed"]) == {0, 1}
    assert any("NOT SEALED: 1 run" in text for text in api.stamps([item.run for item in known]))


def test_an_interruption_starts_no_further_run(
    base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook goes on after Ctrl-C, with the threads that execute the runs."""
    started, ended = threading.Event(), threading.Event()
    begun: list[str] = []

    def slow(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        begun.append(run.id)
        started.set()
        assert ended.wait(60)
        return 1, "glua-bench: error: it was stopped."

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        assert started.wait(60)
        raise KeyboardInterrupt

    executor = Executor(cells_of(base), start=slow)
    threads = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            executor.run()
    ended.set()
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)
    assert len(begun) == 1


@pytest.mark.fault("killed", "the process of a run of a comparison")
def test_a_killed_process_is_started_again_once(base: RunOptions) -> None:
    planned, started = cells_of(base, 1), []

    def killed(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        started.append(run.id)
        return (-9, "") if len(started) == 1 else in_process(run, environment)

    outcome = Executor(planned, start=killed).run()
    assert outcome.ran == 1 and started == [planned[0].run.id] * 2

    planned = cells_of(replace(base, runs_root=base.runs_root / "more"), 1)
    outcome = Executor(planned, start=lambda *given: (-9, "")).run()
    (reason,) = outcome.failed.values()
    assert outcome.ran == 0
    assert reason.startswith("killed (SIGKILL), most likely for lack of memory")
    said = "glua-bench: error: process 2 of 2 of this run: killed (SIGKILL)."
    outcome = Executor(planned, start=lambda *given: (LOST_CODE, said)).run()
    assert list(outcome.failed.values()) == ["process 2 of 2 of this run: killed (SIGKILL)."]


def test_a_file_system_without_locks_ends_the_matrix_with_the_reason(
    base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    planned = cells_of(base, 1)
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(RunFailure, match="cannot be locked"):
        Executor(planned, jobs=2, start=in_process).run()


def test_a_process_that_loses_the_run_to_one_that_is_killed_is_started_again(
    base: RunOptions,
) -> None:
    """A lock held by another process is not a failure."""
    planned, errors = cells_of(base, 1), []
    lock = planned[0].run.directory.path / ".lock"

    def beaten(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        with try_lock(lock) if not errors else contextlib.nullcontext():
            try:
                return in_process(run, environment)
            except RunFailure as error:
                errors.append(str(error))
        return RunFailure.exit_code, errors[-1]  # and the other process has ended

    outcome = Executor(planned, start=beaten).run()
    assert len(errors) == 1 and "another process" in errors[0]
    assert outcome.ran == 1 and not outcome.failed

    planned = cells_of(replace(base, runs_root=base.runs_root / "more"), 1)
    outcome = Executor(planned, start=lambda *given: (1, "ImportError: none")).run()
    assert list(outcome.failed.values()) == ["ImportError: none"]


def test_what_failed_here_and_was_done_elsewhere_is_no_failure(base: RunOptions) -> None:
    planned = cells_of(base)

    def killed(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        if run.request.seed == 0:
            return -9, ""
        execution.execute(
            planned[0].run, execution.Progress(enabled=False)
        )  # as another process would
        return in_process(run, environment)

    outcome = Executor(planned, start=killed).run()
    assert (outcome.ran, outcome.elsewhere, outcome.failed) == (1, 1, {})


def test_two_executors_share_the_runs(base: RunOptions) -> None:
    first, second = cells_of(base, 4), cells_of(base, 4)
    began: list[int] = []
    guard = threading.Lock()

    def once(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        with guard:
            began.append(run.request.seed)
        time.sleep(0.2)
        with guard:
            return in_process(run, environment)

    executors = [Executor(planned, jobs=2, start=once) for planned in (first, second)]
    threads = [threading.Thread(target=executor.run) for executor in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(began) == [0, 1, 2, 3]
    outcomes = [executor.outcome for executor in executors]
    assert sum(outcome.ran for outcome in outcomes) == 4
    assert all(o.ran + o.before + o.elsewhere == 4 and not o.failed for o in outcomes)


@pytest.mark.fault("killed", "a comparison whose run goes on")
def test_a_run_whose_starter_was_killed_is_waited_for_then_taken_over(base: RunOptions) -> None:
    planned = cells_of(base, 1)
    item = planned[0]
    item.run.directory.path.mkdir(parents=True)
    # An orphan holds the run's lock, but not its claim.
    script = (
        "import fcntl, sys, time\n"
        f"held = open({str(item.run.directory.path / '.lock')!r}, 'a')\n"
        "fcntl.flock(held, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    orphan = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert orphan.stdout is not None and orphan.stdout.readline() == "held\n"
        executor = Executor(planned, start=in_process)
        thread = threading.Thread(target=executor.run)
        thread.start()
        time.sleep(1.5)
        assert thread.is_alive() and not item.run.directory.done
    finally:
        orphan.kill()
        orphan.wait()
    thread.join(120)
    assert item.run.directory.done and executor.outcome.ran == 1


def test_jobs_have_a_gpu_or_a_share_of_the_cores_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(executor_module, "cores", lambda: 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert executor_module.environment(0, 4)["OMP_NUM_THREADS"] == "3"
    assert executor_module.environment(0, 40)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [executor_module.environment(i, 4)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == list(
        "0101"
    )
    assert executor_module.environment(0, 4)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's value is kept
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert executor_module.environment(0, 4)["OMP_NUM_THREADS"] == "5"


@pytest.mark.slow
def test_two_commands_at_once_make_one_comparison(base: RunOptions, tmp_path: Path) -> None:
    options = ["--data-root", "discs", "--steps", "2", "--device", "cpu", "--no-mlflow"]
    options += [f"--plugin={path}" for path in PLUGINS] + ["--preset", "quick", "--seeds", "1"]
    words = ["compare", "--methods", "random_gamma", "--dataset", "discs", *options]
    start = [sys.executable, "-m", "glua_bench", *words]
    dry = subprocess.run([*start, "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "3 runs, 0 done" in dry.stdout and not (tmp_path / "runs").exists()
    both = [
        subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    ran = [int(text.split("3 runs: ")[1].split(" run now")[0]) for text in printed]
    assert sum(ran) == 3
    for text in printed:
        assert "discs bright-dark" in text and "supervised" in text and "0 failed" in text
    done = sorted(path.parent for path in (tmp_path / "runs").glob("*/*/*/done"))
    assert len(done) == 3
    found = [("e", "t", run_directory.RunDirectory.open(path)) for path in done]
    assert len(collect(found)["run"].unique()) == 3


@pytest.mark.slow
def test_a_comparison_is_one_group_of_runs_in_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """A second command changes nothing, and a dead tracker costs one warning."""
    words = ["compare", "--methods=random_gamma", "--dataset=discs", "--no-bounds", "--seeds=2"]
    words += ["--data-root=discs", "--steps=2", "--device=cpu", "--preset=quick"]
    words += [f"--plugin={path}" for path in PLUGINS]
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert not code and "Browse:  mlflow ui" in out and "warning" not in err
    uri = mlflow_mirror.tracking_uri(tmp_path / "runs")
    client = mlflow_mirror.mlflow_client(uri)

    def shown() -> list[Any]:
        (experiment,) = (e for e in client.search_experiments() if "discs" in e.name)
        return client.search_runs([experiment.experiment_id])

    found = shown()
    (parent,) = (run for run in found if "glua_bench.comparison" in run.data.tags)
    assert len(found) == 3
    assert {r.data.tags.get("mlflow.parentRunId") for r in found} == {None, parent.info.run_id}
    assert parent.info.run_name.startswith(
        "compare random_gamma | discs bright-dark | 2 seeds | quick"
    )
    (directory, _) = run_directory.list_runs(tmp_path / "runs")
    rows = collect([("random_gamma", "discs bright-dark", directory)])
    dice = parent.data.metrics["bright-dark/dice/random_gamma"]
    assert 0 <= dice <= 1 and "bright-dark/dice_sd/random_gamma" in parent.data.metrics
    assert "bright-dark/gap_recovered/random_gamma" not in parent.data.metrics
    assert f"{dice:.3f}" in parent.data.tags["mlflow.note.content"] and len(rows) > 0
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"intervals.csv", "pairs.csv", "ranking.csv", "rows.csv", "table.csv"}

    assert call(*words)[0] == 0
    assert {run.info.run_id for run in shown()} == {run.info.run_id for run in found}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = call(*words)
    assert (
        not code and err.count("warning: ") == 1 and "127.0.0.1:9" in err and "2 done before" in out
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(mlflow_mirror, "mlflow_client", None)  # any use fails
    code, out, err = call(*words, "--no-mlflow")
    assert not code and "warning" not in err and "Browse" not in out


@pytest.mark.slow
def test_a_comparison_ends_with_a_report_of_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Also if runs with another budget are in the same directory."""
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--methods=random_gamma", "--dataset=discs", "--no-bounds", "--seeds=2"]
    words += ["--data-root=discs", "--device=cpu", "--preset=quick", "--no-mlflow"]
    words += [f"--plugin={path}" for path in PLUGINS]
    code, out, _ = call(*words, "--steps=2")
    wanted = {run.id for run in run_directory.list_runs(tmp_path / "runs")}
    (line,) = (line for line in out.splitlines() if line.startswith("Next:    "))
    assert code == 0 and len(wanted) == 2
    assert call(*words, "--steps=3")[0] == 0
    code, _, err = call("report", "--no-pictures")
    assert code and "mixes runs of different protocols" in err
    program, *command_ = shlex.split(line.removeprefix("Next:    "))
    code, out, err = call(*command_)
    assert (program, code) == ("glua-bench", 0), err
    rows = pd.read_parquet(tmp_path / "report" / "rows.parquet")
    assert set(rows["run"].astype(str)) == wanted
    assert "random_gamma has a mean Dice of" in out
    code, _, err = call(*command_, "--from-mlflow")
    assert code and "(the file of one comparison)" in err


def test_repeats_are_named_and_count_beside_their_run_only(
    base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(comparison(["source_only"], ["discs"], [], 1, base, bounds=False, repeats=1))
    first, repeat = planned
    said: list[str] = []

    def fails(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        return 2, "no"

    Executor(planned, report=said.append, start=fails).run()
    assert [line for line in said if line.startswith("begin") and line.endswith(", repeat 1")]
    assert sum("repeat" in line for line in said if line.startswith("begin")) == 1

    done: list[Planned] = []
    monkeypatch.setattr(Planned, "state", property(lambda i: "done" if i in done else "open"))
    for item, names in ((repeat, set()), (first, {first.run.id, repeat.run.id})):
        done.append(item)
        assert {directory.id for _, _, directory in matrix.finished(planned)} == names
