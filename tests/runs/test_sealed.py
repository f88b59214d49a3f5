"""sealed/: methods that want labels of the target do not get them, and stamps are true."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import PLUGIN, QUIET, Ask, small_request

from glua_bench.data.cache import SliceCache
from glua_bench.errors import RunFailure
from glua_bench.runs import execution
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import PlannedRun, plan
from glua_bench.runs.sealed import landlock

THIEF = Path(__file__).parents[1] / "support" / "thief.py"
needs_landlock = pytest.mark.skipif(not landlock.version(), reason="the kernel has no Landlock")


def stolen(planned: PlannedRun, root: Path, apart: bool) -> dict[str, Any]:
    """Return what each way of the thief gave."""
    view = planned.dataset.view("ct").on(planned.config.grid)
    cases = planned.dataset.cases("ct")
    guess = {
        "root": str(root),
        "labels": [str(case.truth) for case in cases],
        "prepared": [str(SliceCache().label(case, view).path) for case in cases],
        "coordinator": os.getpid(),
        "runs": [str(planned.request.runs_root)],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THIEF", json.dumps(guess))
        with pytest.raises(RuntimeError) as error:
            execute(planned, QUIET, apart=apart)
    found: dict[str, Any] = json.loads(str(error.value))
    return found


@pytest.fixture(scope="module")
def thefts(
    phantom_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[PlannedRun, dict[str, Any]]]:
    """Return a run of the thief, in a process of its own or in this one, and what it got."""
    known: dict[bool, tuple[PlannedRun, dict[str, Any]]] = {}

    def of(apart: bool) -> tuple[PlannedRun, dict[str, Any]]:
        if apart not in known:
            root = tmp_path_factory.mktemp("thief")
            planned = plan(small_request(phantom_root, root, method="thief", plugins=[THIEF]))
            known[apart] = planned, stolen(planned, phantom_root, apart)
        return known[apart]

    return of


WAYS = {
    "registry": "a method loads the dataset from the registry",
    "garbage_collector": "a method searches gc.get_objects()",
    "frames": "a method walks up the frames of every thread",
    "modules": "a method searches all modules",
    "open_files": "a method looks for inherited descriptors",
    "parents_memory": "a method attaches to its parents, or opens their memory",
    "guessed_paths": "a method opens label files by guessed paths",
    "other_roots": "a method opens label files through /proc/*/root",
    "listing": "a method walks through the data directory",
    "slice_cache": "a method opens prepared labels in the cache",
    "children": "a method starts processes that open label files",
    "threads": "a method starts threads that open label files",
    "links": "a method links, hard-links and mounts labels to its own directories",
}


@needs_landlock
@pytest.mark.parametrize(
    "way",
    [pytest.param(w, marks=pytest.mark.fault("labels", attack)) for w, attack in WAYS.items()],
)
def test_a_method_cannot_steal_labels(
    thefts: Callable[[bool], tuple[PlannedRun, dict[str, Any]]], way: str
) -> None:
    planned, found = thefts(True)
    assert found[way] == [], found
    assert planned.directory.read_environment()["labels"] == "sealed"


def test_the_thief_steals_where_it_is_trained_beside_the_labels(
    thefts: Callable[[bool], tuple[PlannedRun, dict[str, Any]]],
) -> None:
    """So the ways above are real, and such a run says so."""
    planned, found = thefts(False)
    missed = {way for way in WAYS if not found[way]}
    assert missed <= {"modules", "open_files"}
    assert planned.directory.read_environment()["labels"] == "in reach"


@pytest.mark.fault("labels", "a method searches a process that can open the files")
def test_labels_beneath_a_directory_of_training_are_withheld_and_the_run_says_so(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only the files lead to them, and a run resumed elsewhere keeps this stamp."""
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "stages" / "data"
    shutil.copytree(phantom_root, root)
    planned = plan(small_request(root, tmp_path, method="thief", plugins=[THIEF]))
    found = stolen(planned, root, True)
    memory = ("garbage_collector", "frames", "modules", "open_files", "parents_memory")
    assert not any(found[way] for way in memory[: None if landlock.version() else -1])
    facts = planned.directory.read_environment()
    assert facts["labels"] == "withheld" and facts["labels_reason"]


def test_a_run_has_the_weakest_stamp_of_all_processes_that_trained_it(ask: Ask) -> None:
    planned = plan(ask())
    best = "sealed" if landlock.version() else "withheld"

    def stopping(step: int, score: float) -> None:
        raise execution.Stopped

    watch = execution.Watch("source_val", stopping)
    for apart in (True, False, True):
        with pytest.raises(execution.Stopped):
            execute(planned, QUIET, watch=watch, apart=apart)
        facts = planned.directory.read_environment()
        assert facts["labels"] == (best if apart and not facts["labels_reason"] else "in reach")
    execute(plan(planned.request), QUIET)
    assert planned.directory.read_environment()["labels"] == "in reach"
    assert planned.directory.read_summary()["labels"] == "in reach"


@pytest.mark.fault("processes", "the process that trains is killed")
def test_a_killed_training_leaves_a_run_that_is_resumed(ask: Ask, tmp_path: Path) -> None:
    plugin = tmp_path / "suicide.py"
    plugin.write_text(
        PLUGIN
        + """
    def step(self, batch, context):
        import os, signal
        if context.step == 1 and not os.path.exists(os.environ["MARK"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batch, context)
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARK", str(tmp_path / "mark"))
        planned = plan(ask(method="plugged", plugins=[plugin]))
        with pytest.raises(RunFailure, match="killed by SIGKILL.*same command resumes"):
            execute(planned, QUIET)
        assert not planned.directory.done and planned.directory.failed is None
        (tmp_path / "mark").touch()
        assert not execute(plan(planned.request), QUIET).already_done
    assert planned.directory.done
