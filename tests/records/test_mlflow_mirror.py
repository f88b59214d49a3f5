"""mlflow_mirror.py: copies on a tracker are complete and unique."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sample_runs import (
    CASES,
    CONFIG,
    client_of,
    complete,
    counts,
    mirrored,
    reseal,
    started,
    two_runs,
)

from glua_bench.records import mlflow_mirror
from glua_bench.records.mlflow_mirror import MLflowMirror, tracking_uri
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.records.seal import COPIED


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

    # The headline is the mean over structures of the primary selector; beside it are only curves.
    headline = {k: v for k, v in shown.data.metrics.items() if "/" not in k}
    assert headline == {"dice": 0.5, "assd": 4.0, "hd95": 9.0}
    assert {k for k in shown.data.metrics if "/" in k} == {"train/loss", "train/dice"}
    assert shown.data.tags["glua_bench.selector"] == "last"
    assert shown.data.tags["mlflow.note.content"] == (
        "Dice 0.500, ASSD mm 4.0, HD95 mm 9.0 (mean over structures, selector last)"
    )
    # MLflow's page lists metrics in the order in which they arrived.
    assert list(shown.data.metrics)[:3] == ["dice", "assd", "hd95"]
    client = client_of(root)
    scores = pd.read_csv(client.download_artifacts(shown.info.run_id, "scores.csv"))
    assert list(zip(scores["structure"], scores["dice"], scores["misses"], strict=True)) == [
        ("MYO", 0.5, 2),
        ("mean", 0.5, 2),
    ]
    history = client.get_metric_history(shown.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, 1 / i) for i in range(1, 5)]

    tags = shown.data.tags
    assert tags["glua_bench.id"] == run.id and tags["glua_bench.code"] == "c1"
    assert tags["glua_bench.data"] == "train=d1 test=d2"
    assert tags["glua_bench.privileged"] == "false"

    files = {f.path for f in client.list_artifacts(shown.info.run_id)}
    assert files == {*COPIED, mlflow_mirror.DIGESTS, "cases.csv", "scores.csv", "figures"}
    figures = client.list_artifacts(shown.info.run_id, "figures")
    assert [f.path for f in figures] == ["figures/cases.png"]
    table = pd.read_csv(client.download_artifacts(shown.info.run_id, "cases.csv"))
    assert table["dice"].tolist() == [0.25, 0.75]


def test_a_mirrored_run_takes_from_its_first_file_to_its_last(root: Path) -> None:
    run = RunDirectory(root, CONFIG, "abc123")
    run.start({"time": "2020-01-01T00:00:10+0000"})
    run.log("train", 1, {"loss": 1.0})
    complete(run)
    (run.path / "log.jsonl").write_text(
        (run.path / "log.jsonl").read_text().replace('"time": 1', '"time": 1577836820.0, "was": 1')
    )
    reseal(run, time="2020-01-01T01:00:30+0100")
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
    # The tracker's copies of files are not runs.
    assert {found.id for found in list_runs(root)} == {"one", "two", "unfinished"}


def test_long_logs_arrive_whole(root: Path) -> None:
    """The log exceeds the limit of one request."""
    run = RunDirectory(root, CONFIG, "long")
    run.start({}, [("train", 1100)])
    for step in range(1, 1101):
        run.log("train", step, {"loss": float(step)})
    complete(run)
    assert MLflowMirror(root).mirror(run)
    (shown,) = mirrored(root)
    client = client_of(root)
    history = client.get_metric_history(shown.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 1101))


def test_a_failed_run_is_shown_as_failed_and_replaced_when_it_succeeds(root: Path) -> None:
    run = started(root)
    run.fail("the loss is nan")
    assert counts(root) == (1, 0, 0, 0)
    (shown,) = mirrored(root)
    assert shown.info.status == "FAILED"
    assert shown.data.tags["glua_bench.error"] == "the loss is nan"
    assert all(name.startswith("train/") for name in shown.data.metrics)
    assert counts(root) == (0, 1, 0, 0)

    complete(run)
    assert counts(root) == (1, 0, 0, 0)
    (shown,) = mirrored(root)
    assert shown.info.status == "FINISHED" and "glua_bench.error" not in shown.data.tags


@pytest.mark.fault("killed", "an upload of a run to the tracker")
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
    assert len(mirrored(root)) == 1  # the incomplete one
    assert counts(root) == (1, 0, 0, 0)
    (shown,) = mirrored(root)
    assert shown.info.status == "FINISHED" and shown.data.metrics["dice"] == 0.5


@pytest.mark.fault("tracker", "its client ends the process")
def test_a_tracker_that_ends_the_process_does_not_end_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*arguments: Any) -> None:
        raise SystemExit(3)

    warnings: list[str] = []
    monkeypatch.setattr(mlflow_mirror, "mlflow_client", leave)
    assert not MLflowMirror(root, warnings.append).mirror(complete(started(root)))
    assert len(warnings) == 1


@pytest.mark.fault("tracker", "the server is down")
def test_a_dead_tracker_is_one_warning_and_is_caught_up_later(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Port 9 is closed; the client's own retries would take minutes."""
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


@pytest.mark.fault("tracker", "the server refuses every request")
def test_a_server_that_answers_with_errors_is_a_warning_too(
    root: Path, refusing_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing_server)
    warnings: list[str] = []
    run = complete(started(root))
    assert MLflowMirror(root, warnings.append).mirror(run) is False
    assert len(warnings) == 1 and "\n" not in warnings[0]


COLUMN = "metrics.`dice`"
ALIKE = ("a b", "a(b", "a[b", "a/b", "a_b", "final", "ä", "..", "x" * 300, "x" * 299 + "y")


@pytest.mark.fault("hostile text", "names that a tracker cannot tell apart")
def test_structures_whose_names_are_alike_to_a_tracker_stay_apart(root: Path) -> None:
    run = started(root)
    run.log("train", 4, {name: float(index) for index, name in enumerate(ALIKE)})
    run.flush()
    run.write_cases(CASES)
    run.finish({"scores": [{"selector": "last", "structure": name} for name in (*ALIKE, "mean")]})
    assert MLflowMirror(root).mirror(run)
    (copy,) = mirrored(root)
    logged = {v for k, v in copy.data.metrics.items() if k.startswith("train/")}
    assert set(map(float, range(len(ALIKE)))) <= logged
    place = client_of(root).download_artifacts(copy.info.run_id, "scores.csv")
    assert pd.read_csv(place)["structure"].tolist() == [*ALIKE, "mean"]


def test_an_experiment_offers_its_table_of_runs_and_keeps_what_a_user_chose(root: Path) -> None:
    run = complete(started(root))
    assert MLflowMirror(root).mirror(run)
    client = client_of(root)
    experiment = client.get_experiment_by_name("glua-bench/phantom")
    tags = experiment.tags
    assert tags[mlflow_mirror.KIND] == "custom_model_development"
    view = json.loads(tags["mlflow.sharedViewState.glua-bench"])
    columns = json.loads(view["state"])["columnOrder"]
    assert columns[:4] == ["params.`method`", "params.`direction`", "params.`seed`", COLUMN]
    assert columns == view["selectedColumns"] and isinstance(view["createdAt"], int)
    (shown,) = mirrored(root)
    for column in columns:
        kind, name = column.replace("`", "").split(".")
        assert name in getattr(shown.data, kind)
    link = f"#/experiments/{experiment.experiment_id}/runs?"
    assert link in tags["mlflow.note.content"]
    assert "viewStateShareKey=glua-bench" in tags["mlflow.note.content"]

    own = {mlflow_mirror.KIND: "genai_development", "mlflow.note.content": "ours"}
    for name, value in own.items():
        client.set_experiment_tag(experiment.experiment_id, name, value)
    assert MLflowMirror(root).mirror(run)
    tags = client.get_experiment_by_name("glua-bench/phantom").tags
    assert {name: tags[name] for name in own} == own


def parents_and_children(root: Path) -> tuple[list[Any], list[Any]]:
    runs = mirrored(root)
    return (
        [run for run in runs if "glua_bench.comparison" in run.data.tags],
        sorted(
            (run for run in runs if "glua_bench.id" in run.data.tags),
            key=lambda run: run.data.tags["glua_bench.id"],
        ),
    )


def test_runs_are_nested_under_their_comparison(root: Path, tmp_path: Path) -> None:
    members = two_runs(root)
    assert MLflowMirror(root).mirror(members[0][1])  # mirrored before
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
    client = client_of(root)
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["table.csv"]


def test_the_same_comparison_again_changes_its_parent_and_makes_none(root: Path) -> None:
    members = two_runs(root)
    comparison = Comparison("compare a", members)
    for dice in (0.5, 0.5, 0.75):
        assert MLflowMirror(root).nest(comparison, {"dice": dice}, note=f"{dice}")
    (parent,), children = parents_and_children(root)
    assert parent.data.metrics == {"dice": 0.75}
    assert parent.data.tags["mlflow.note.content"] == "0.75"
    client = client_of(root)
    history = client.get_metric_history(parent.info.run_id, "dice")
    assert [m.value for m in history] == [0.5, 0.75]
    # A run has one parent, the latest; the earlier comparison keeps its values.
    assert MLflowMirror(root).nest(Comparison("ablate a", members[:1]), {})
    parents, children = parents_and_children(root)
    (new,) = (p for p in parents if p.info.run_id != parent.info.run_id)
    assert new.info.run_name.startswith("ablate a | ")
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [
        new.info.run_id,
        parent.info.run_id,
    ]


def test_a_group_that_grows_has_one_parent_that_says_what_it_is(root: Path) -> None:
    """Like a sweep, whose runs are not known at its start."""
    members = two_runs(root)
    settings = {"method": "plain", "searched: lr": "0.1, 0.2"}

    def grown(count: int, chosen: str) -> Comparison:
        facts = {"chosen": chosen, "oracle": "false"}
        own = members[:count]
        return Comparison("sweep a", own, 1000.0, "own", settings, facts, complete=count == 2)

    assert MLflowMirror(root).nest(grown(1, "lr=0.1"), {"chosen/im": 0.5})
    (parent,), _ = parents_and_children(root)
    assert parent.info.status == "RUNNING" and parent.data.tags["glua_bench.chosen"] == "lr=0.1"
    # Parameters cannot be changed later, so they must not depend on the runs so far.
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
    """It is running, stopped, running again and finished; a failed run is its child too."""
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
    assert shown(2).status == "FINISHED"  # despite a failed run
    assert uploaded == [run.id for _, run in members]  # each once
    none = Comparison("sweep b", members[:1], 1000.0, "other", {}, {})
    assert mirror.nest(none, {})
    assert {p.info.status for p in parents_and_children(root)[0]} == {"FINISHED", "FAILED"}


def test_syncing_keeps_runs_where_they_are_nested(root: Path) -> None:
    """Also if a copy is replaced, here after a failure."""
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


@pytest.mark.fault("two users", "processes that upload the same run at once")
@pytest.mark.parametrize("grouped", [False, True])
def test_two_processes_make_no_duplicate(
    grouped: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock, each would find the run or its parent missing."""
    from mlflow import MlflowClient

    members, create = two_runs(root), MlflowClient.create_run
    if grouped:
        assert counts(root) == (2, 0, 0, 0)
    both = threading.Barrier(2)

    def slowly(*arguments: Any, **named: Any) -> Any:
        # Without the lock both processes arrive here, and both continue.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return create(*arguments, **named)

    def work() -> None:
        if grouped:
            MLflowMirror(root).nest(Comparison("compare a", members, began=1000.0), {})
        else:
            MLflowMirror(root).mirror(members[0][1])

    monkeypatch.setattr(MlflowClient, "create_run", slowly)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parents, children = parents_and_children(root)
    assert (len(parents), len(children)) == ((1, 2) if grouped else (0, 1))
    ids = {child.data.tags["glua_bench.id"] for child in children}
    assert ids == {run.id for _, run in (members if grouped else members[:1])}


@pytest.mark.fault("two users", "machines that upload without a common lock")
def test_doubles_that_machines_without_a_common_lock_made_become_one(root: Path) -> None:
    members = two_runs(root)
    comparison = Comparison("compare a", members, began=2000.0)
    assert MLflowMirror(root).nest(comparison, {})
    client = client_of(root)
    ((first,), _) = parents_and_children(root)
    older = client.create_run(
        first.info.experiment_id, 1_000_000, {"glua_bench.comparison": comparison.id}
    )
    assert MLflowMirror(root).nest(comparison, {})
    (parent,), children = parents_and_children(root)
    assert parent.info.run_id == older.info.run_id
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {older.info.run_id}


@pytest.mark.fault("tracker", "the server is down")
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
