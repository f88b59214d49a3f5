"""display.py: what compare and ablate show while their runs are executed."""

from __future__ import annotations

import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_runs import DISCS

from glua_bench.errors import RunFailure
from glua_bench.files import try_lock
from glua_bench.runs import executor as executor_module
from glua_bench.runs.executor import Executor
from glua_bench.runs.matrix import Planned, comparison, plan
from glua_bench.runs.plan import PlannedRun
from glua_bench.runs.request import RunOptions
from glua_bench.runs.timing import display as module
from glua_bench.runs.timing.display import Display, Running, State, bars, position, seconds_left

NAN = math.nan
LONG = "a method with a name of more than sixty characters, one of many, phantom mr-ct, seed 0"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def planned(base: RunOptions) -> list[Planned]:
    """Three runs of one row."""
    return plan(comparison(["random_gamma"], ["discs"], [], 3, base, bounds=False))


def finish(item: Planned, seconds: float) -> None:
    """Write what a run leaves that took so long."""
    directory = item.run.directory
    directory.start({})
    parts = {"slices": 0.0, "evaluation": 0.0, "figures": 0.0}
    summary = {"part_seconds": parts, "selector_seconds": {}, "stage_seconds": {"train": seconds}}
    directory.finish({**summary, "seconds": 0.1})  # the last of several processes took 0.1 s


def log(item: Planned, step: int) -> None:
    item.run.directory.path.mkdir(parents=True, exist_ok=True)
    row = {
        "stage": item.run.stages[0][0],
        "step": step,
        "total_step": step,
        "time": 0.0,
        "values": {},
    }
    (item.run.directory.path / "log.jsonl").write_text(json.dumps(row) + '\n{"stage": "tor')


# -- the state -------------------------------------------------------------------------------------


def test_the_position_of_a_run_is_the_last_whole_line_of_its_log(planned: list[Planned]) -> None:
    (item, *_) = planned
    assert position(item.run) == ("starting", 0.0)
    log(item, 1)
    assert position(item.run) == ("segment 1/2", 0.5)
    log(item, 2)
    assert position(item.run) == ("scoring", 1.0)


@pytest.mark.parametrize(
    ("running", "waiting", "left"),
    [
        ([], [], 0),
        ([(10, 0.0, 30)], [30, 30], 80),
        ([(10, 0.0, 30), (10, 0.0, 30)], [30, 30], 50),  # two at once
        ([(10, 0.5, 30)], [], 5),  # resumed half way
        ([(90, 0.0, 30)], [], 0),  # slower than expected
        ([(0, 0.0, 100), (0, 0.0, 10)], [], 100),  # not before the slowest ends
        ([(10, 0.0, NAN)], [30], NAN),
    ],
)
def test_the_time_left(
    running: list[tuple[float, float, float]], waiting: list[float], left: float
) -> None:
    assert seconds_left(running, waiting) == pytest.approx(left, nan_ok=True)


def test_finished_runs_count_with_their_own_duration_and_not_as_fast_ones(
    planned: list[Planned],
) -> None:
    """Of several processes, as when the comparison is resumed."""
    finish(planned[0], 50.0)
    executor = Executor(planned)
    now = executor.state()
    assert (now.done, now.failed, now.total, now.running) == (1, 0, 3, [])
    assert now.seconds_left == pytest.approx(100, abs=1)
    assert now.line() == "1/3 runs done, about 1:40 left"


def test_runs_of_other_processes_are_shown_and_share_the_time(planned: list[Planned]) -> None:
    finish(planned[0], 50.0)
    executor = Executor(planned)
    log(planned[1], 1)
    with try_lock(executor_module._claim(planned[1].run)) as mine:
        assert mine
        now = executor.state()
        (other,) = now.running
        assert not other.here and other.place == "segment 1/2" and "seed 1" in other.name
        # Half of a run there, while one waits: one at a time.
        assert now.seconds_left == pytest.approx(75, abs=1)
    executor._looked = -math.inf
    assert executor.state().running == []
    finish(planned[1], 50.0)
    executor._looked = -math.inf
    assert executor.state().done == 2


def test_without_a_finished_run_the_time_is_extrapolated_from_its_updates(
    planned: list[Planned],
) -> None:
    shown: list[State] = []

    def start(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        item = next(item for item in planned if item.run.id == run.id)
        shown.append(executor.state())
        time.sleep(0.2)
        log(item, 1)
        shown.append(executor.state())
        return 2, "no"

    executor = Executor(planned, start=start)
    executor.run()
    first, later = shown[:2]
    assert math.isnan(first.seconds_left) and "left" not in first.line()
    assert first.running[0].place == "starting" and "seed 0" in first.running[0].name
    # Half of 0.4 s, and two more runs.
    assert 0.9 <= later.seconds_left < 5 and later.running[0].place == "segment 1/2"
    assert executor.state().line() == "0/3 runs done, 3 failed"


def test_the_executor_shows_its_state_while_jobs_run(planned: list[Planned]) -> None:
    shown: list[str] = []
    both = threading.Barrier(2, timeout=60)

    def start(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        if run.config.seed < 2:
            both.wait()
            time.sleep(0.6)
        return 2, "no"

    Executor(planned, 2, start=start, show=lambda state: shown.append(state().line())).run()
    assert any("seed 0" in line and "seed 1" in line for line in shown)


# -- what is shown ---------------------------------------------------------------------------------


def state(count: int = 2) -> State:
    own = [Running(LONG, f"train {n}/500", 65.0, here=n < 2) for n in range(1, count + 1)]
    return State(3, 1, 12, own, 750.0)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("count", [0, 2, 30])
def test_bars_keep_their_shape(width: int, count: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(bars(state(count), width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1 + min(count, 8) + (count > 8)
    assert all(len(line) <= width for line in lines)
    assert "3/12" in lines[0] and "about 12:30 left" in lines[0] and "━" in lines[0]
    if count:
        assert "train 1/500" in lines[1] and "1:05" in lines[1]
        assert ("…" in lines[1]) == (width < 120)
    if count > 8:
        assert "and 22 more" in lines[-1]


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.2)
    said: list[str] = []
    with Display(said.append, io.StringIO()) as display:
        display.show(state)
        assert said == []
        time.sleep(0.25)
        display.show(state)
        display.show(state)
        display.line("done   a run")
    first, last = said
    assert first.startswith("3/12 runs done, 1 failed, about 12:30 left; running: ")
    assert f"{LONG} (train 2/500, another process)" in first and last == "done   a run"


def test_a_terminal_gets_bars_and_lines_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with pytest.raises(RunFailure), Display(print, stream) as display:
        display.show(state)
        display.line("done   [a run]")
        raise RunFailure("ended")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "3/12" in shown and "done   [a run]" in shown
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0


@pytest.mark.slow
def test_compare_says_what_runs_and_how_long_it_takes(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    words: list[Any] = ["compare", "--methods=random_gamma", "--dataset=discs", "--no-bounds"]
    words += ["--seeds=2", "--steps=2", "--device=cpu", "--no-mlflow", "--preset=quick"]
    words += ["--data-root=discs", *(f"--plugin={path}" for path in DISCS)]
    code, out, err = call(*words)
    assert code == 0, err
    assert re.search(r"^0/2 runs done; running: random_gamma, .*, seed 0 \(", out, re.M)
    assert re.search(r"\(1 of 2, about \d.* left\)", out)
    code, out, _ = call(*words)  # done runs are not executed
    assert code == 0 and "running:" not in out and "2 done before" in out


@pytest.mark.fault("hostile text", "names with terminal escapes in the table of a comparison")
def test_names_cannot_control_the_terminal() -> None:
    name = "a [/b]\x1b]0;gotcha\x07\r"
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(bars(State(0, 0, 2, [Running(name, name, 2.0, True)], 3.0), 100))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x07" not in said and "gotcha" in said
