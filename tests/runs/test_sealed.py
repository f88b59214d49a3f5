"""sealed/: methods that want labels of the target do not get them, and stamps are true."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import DISCS, PLUGIN, QUIET, Ask, small_request

from glua_bench.console import masked_output
from glua_bench.data.cache import SliceCache
from glua_bench.errors import RunFailure
from glua_bench.reports.run_figures import draw_run
from glua_bench.runs import execution
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import PlannedRun, plan
from glua_bench.runs.sealed import landlock

SUPPORT = Path(__file__).parents[1] / "support"
THIEF = SUPPORT / "thief.py"
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
    assert not [name for name in found if name.endswith("raised")], found
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


def test_what_a_plugin_prints_is_printed_here_without_passwords(
    ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a last line that does not end."""
    plugin = tmp_path / "talkative.py"
    plugin.write_text(
        PLUGIN
        + """
    def pictures(self, batch):
        import sys
        print("to postgresql://me:cr3t@host/base", file=sys.stderr)
        print("no end", end="")
        raise RuntimeError("why")
"""
    )
    with masked_output(), pytest.raises(RuntimeError, match="why"):
        execute(plan(ask(method="plugged", plugins=[plugin])), QUIET, draw_run)
    out, err = capsys.readouterr()
    assert out == "no end" and "to postgresql://me:…@host/base\n" in err and "cr3t" not in err


def alive(words: str) -> list[int]:
    """Return the processes whose command line or environment contains words."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
            if words.encode() in text and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number, marks=pytest.mark.fault("killed", f"`run` receives {number.name} in training")
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    ],
)
def test_a_command_that_is_stopped_leaves_no_process_and_can_be_resumed(
    tmp_path: Path, number: signal.Signals
) -> None:
    words = [sys.executable, "-m", "glua_bench", "run", "--method=slow", "--dataset=discs"]
    words += [f"--plugin={file}" for file in (SUPPORT / "slow_method.py", DISCS[0])]
    words += [f"--data-root={tmp_path / 'discs'}", "--steps=60", "--device=cpu", "--no-mlflow"]
    words += [f"--set={text}" for text in ("segmenter.width=4", "segmenter.depth=3")]
    words += ["--set=batch_size=2", "--set=method.pause=0.2"]
    marked = {**os.environ, "MARK": str(tmp_path)}
    process = subprocess.Popen(
        words, cwd=tmp_path, env=marked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/*/*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (log,) = tmp_path.glob("runs/*/*/*/log.jsonl")
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == {
        signal.SIGINT: 130, signal.SIGTERM: 128 + 15, signal.SIGKILL: -9
    }[number], errors  # fmt: skip
    while alive(f"MARK={tmp_path}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(f"MARK={tmp_path}")
    saved = log.parent / "checkpoints" / "last.pt"
    assert saved.is_file() or number is signal.SIGKILL
    assert not (log.parent / "failed").exists() and not (log.parent / "done").exists()
    if number is not signal.SIGKILL:
        assert b"the same command resumes" in errors
        assert torch.load(saved, weights_only=True)["step"] > 0
