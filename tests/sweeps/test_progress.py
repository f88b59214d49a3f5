"""sweeps/progress.py: the live table, on screens of any width and with any number of workers."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import optuna
import pytest
from folder_tracker import FolderTracker
from optuna.trial import TrialState
from rich.console import Console
from sweep_samples import define

from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.progress import Display, Tracked, state
from glua_bench.sweeps.study import SweepStudy

WEIGHTS = ("lambda_feature", "lambda_output")


@pytest.fixture
def definition() -> Definition:
    space = tuple(Parameter(name, low=0.0001, high=1.0, log=True) for name in WEIGHTS)
    return define(space=space, sampler="tpe", trials=40)


def trial(number: int, kind: TrialState, value: float | None = None, **attrs: Any) -> Any:
    weight = optuna.distributions.FloatDistribution(0.0001, 1.0, log=True)
    made = optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        value=0.0,
        params=dict.fromkeys(WEIGHTS, 0.00012345),
        distributions=dict.fromkeys(WEIGHTS, weight),
        user_attrs=attrs,
        intermediate_values={1: 0.125},
    )
    made.number, made.state, made.values = number, kind, None if value is None else [value]
    made.datetime_start = datetime.now() - timedelta(seconds=125)
    done = kind != TrialState.RUNNING
    made.datetime_complete = made.datetime_start + timedelta(seconds=65) if done else None
    return made


def drawn(definition: Definition, trials: list[Any], width: int) -> list[str]:
    with Display(definition, 2, io.StringIO()) as display:
        table = display.table(state(definition, trials, 2), trials)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


class Recorder(FolderTracker):
    """A tracker that records its calls.

    Args:
        answers: whether it is there.
    """

    def __init__(self, answers: bool = True) -> None:
        self.answers, self.shown = answers, []

    def nest(self, comparison: Any, *rest: Any, **more: Any) -> bool:
        self.shown.append((comparison.status, comparison.facts["trials"]))
        return self.answers


def step(study: SweepStudy, made_runs: Any) -> None:
    """Finish one more trial."""
    claim = study.claim()
    assert claim is not None
    with study.holding(claim):
        study.finish(claim, (0.5,), {"runs": [made_runs.add("glua", 0.5, 0).id]})


def test_the_tracker_follows_what_has_ended(definition: Definition, made_runs: Any) -> None:
    study = SweepStudy(definition, made_runs.root)
    tracker = Recorder()
    with pytest.raises(KeyboardInterrupt), Tracked(study, made_runs.root, 0, tracker) as tracked:
        tracked.look(study.trials())
        assert not tracker.shown  # no trial has ended
        step(study, made_runs)
        for _ in range(3):
            tracked.look(study.trials())
        tracked.pause = 3600
        step(study, made_runs)
        tracked.look(study.trials())
        step(study, made_runs)
        tracked.look(study.trials())  # not again at once
        raise KeyboardInterrupt
    assert tracker.shown == [("RUNNING", "1 done"), ("RUNNING", "2 done"), ("KILLED", "3 done")]


def test_a_tracker_that_is_down_is_asked_once(definition: Definition, made_runs: Any) -> None:
    study = SweepStudy(definition, made_runs.root)
    tracker = Recorder(answers=False)
    with Tracked(study, made_runs.root, 0, tracker) as tracked:
        for _ in range(3):
            step(study, made_runs)
            tracked.look(study.trials())
    assert tracker.shown == [("RUNNING", "1 done")]


def test_the_state_of_a_sweep_in_a_line(definition: Definition) -> None:
    trials = [
        trial(0, TrialState.COMPLETE, 0.5),
        trial(1, TrialState.PRUNED),
        trial(2, TrialState.FAIL),
        trial(3, TrialState.FAIL, retry=1),
        trial(4, TrialState.RUNNING, retry_of=3, attempt=2),
        trial(5, TrialState.COMPLETE, 0.75),
    ]
    now = state(replace(definition, trials=10), trials, workers=2)
    weights = ", ".join(f"{name} 0.0001234" for name in WEIGHTS)
    counts = "4/10 trials, 1 pruned, 1 failed, 1 running (4)"
    assert now.line() == f"{counts}, best 0.75 ({weights}), about 3:15 left"
    stream = io.StringIO()
    with Display(replace(definition, trials=10), 2, stream) as display:
        display.show(trials)
        display.show(trials)
    assert stream.getvalue() == now.line() + "\n"


def test_trials_whose_runs_were_finished_before_do_not_count_as_fast_ones(
    definition: Definition,
) -> None:
    few = replace(definition, trials=10)
    reused = [trial(number, TrialState.COMPLETE, 0.5, reused=2) for number in range(4)]
    assert math.isnan(state(few, reused, 1).seconds_left)
    fresh = trial(4, TrialState.COMPLETE, 0.5)
    assert state(few, [*reused, fresh], 1).seconds_left == pytest.approx(5 * 65)
    others = [trial(number, TrialState.RUNNING) for number in (5, 6, 7, 8, 9)]
    assert state(few, [*reused, fresh, *others], 1).seconds_left == pytest.approx(65)  # shared


def test_an_unknown_rest_is_not_guessed(definition: Definition) -> None:
    now = state(definition, [], 1)
    assert now.line() == "0/40 trials, 0 running" and math.isnan(now.seconds_left)


def cells(lines: list[str], number: int) -> list[str]:
    (found,) = (line.split() for line in lines if line.split()[:1] == [str(number)])
    return found


def test_the_best_is_marked_and_times_are_told(definition: Definition) -> None:
    trials = [
        trial(0, TrialState.COMPLETE, 0.25),
        trial(1, TrialState.COMPLETE, 0.75),
        trial(2, TrialState.RUNNING),
    ]
    lines = drawn(definition, trials, 110)
    assert cells(lines, 1) == ["1", "best", "1:05", "0.000123", "0.000123", "0.75"]
    assert cells(lines, 0)[1] == "done" and cells(lines, 2)[:3] == ["2", "running", "2:05"]
    assert cells(lines, 2)[-1] == "0.125…"
    numbers = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    assert numbers == ["2", "1", "0"]  # running ones, then the best first
    # The best stands in the table, so the line above does not repeat it.
    assert "best 0.75" not in " ".join(lines) and "2/40 trials, 1 running" in lines[0]
    assert "Ctrl-C stops the sweep" in lines[-1]
    assert "Ctrl-C" not in " ".join(drawn(definition, trials[:2], 110))


def test_two_hundred_workers_fit_on_a_screen(definition: Definition) -> None:
    trials = [trial(n, TrialState.RUNNING) for n in range(200)]
    trials += [trial(n, TrialState.COMPLETE, n / 1000) for n in range(200, 300)]
    lines = drawn(definition, trials, 110)
    assert len(lines) < 24 and any("and 192 more" in line for line in lines)
    assert cells(lines, 299)[1] == "best"


def test_a_narrow_screen_has_a_line_for_each_trial(definition: Definition) -> None:
    lines = drawn(definition, [trial(n, TrialState.COMPLETE, n / 10) for n in range(4)], 60)
    assert max(map(len, lines)) <= 60
    assert [cells(lines, n)[0] for n in range(4)] == ["0", "1", "2", "3"]


@pytest.mark.fault("hostile text", "values with markup and escapes in the table of a sweep")
def test_values_cannot_control_the_terminal(definition: Definition) -> None:
    hostile = trial(0, TrialState.COMPLETE, 0.5)
    hostile.params = dict.fromkeys(WEIGHTS, "[/b]\x1b]0;gotcha\x07")
    said = "".join(drawn(definition, [hostile], 160))
    assert "\x07" not in said and said.count(r"[/b]\x1b]0;gotcha\x07") >= 2
