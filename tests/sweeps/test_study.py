"""sweeps/study.py and worker.py: no trial is lost or counted twice, and the budget holds."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import sweep_samples
from optuna.trial import TrialState

from glua_bench.errors import ConfigError, RunFailure
from glua_bench.runs import execution, interruption
from glua_bench.runs.sealed.process import Killed
from glua_bench.sweeps import progress
from glua_bench.sweeps import study as studies
from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.launch import finished_trials
from glua_bench.sweeps.results import state_of, trial_table
from glua_bench.sweeps.study import (
    ATTEMPTS,
    LOST,
    Claim,
    SweepStudy,
    counting,
    differences,
    distribution,
    file_system,
    free_name,
    make_sampler,
    open_storage,
    retry_while_unavailable,
)
from glua_bench.sweeps.trial import Outcome
from glua_bench.sweeps.worker import work

LR = Parameter("lr", low=0.001, high=1.0, log=True)
CHOICE = Parameter("mask", choices=("topk", "soft"))


def define(**changes: Any) -> Definition:
    return sweep_samples.define(**{"space": (LR, CHOICE), **changes})


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., SweepStudy]:
    def make(**changes: Any) -> SweepStudy:
        return SweepStudy(define(**changes), tmp_path / "runs")

    return make


def value(claim: Claim, see: Any) -> Outcome:
    """Return the value of a trial at once."""
    return Outcome((float(claim.params["lr"]),), {"runs": [f"run {claim.number}"]})


def states(study: SweepStudy) -> Counter[str]:
    return Counter(trial.state.name for trial in counting(study.trials()))


# -- one worker -----------------------------------------------------------------------------------


def test_a_study_is_worked_off_once(opened: Callable[..., SweepStudy]) -> None:
    study = opened()
    done = work(study, value)
    assert (done.finished, done.pruned, done.failed) == (6, 0, 0)
    trials = study.trials()
    assert [t.values[0] for t in trials] == [t.params["lr"] for t in trials]
    assert trials[3].user_attrs["runs"] == ["run 3"]
    again = work(opened(), value)
    assert again.finished == 0 and len(study.trials()) == 6
    more = work(opened(trials=8), value)
    assert more.finished == 2


def test_who_draws_does_not_change_what_is_drawn(tmp_path: Path) -> None:
    def drawn(name: str, sampler: str, several: bool) -> list[Any]:
        made = [
            SweepStudy(define(name=name, sampler=sampler), tmp_path / "runs")
            for _ in range(3 if several else 1)
        ]
        for turn in range(6):
            study = made[turn % len(made)]
            claim = study.claim()
            assert claim is not None
            with study.holding(claim):
                study.finish(claim, value(claim, None).values, {})
        return [trial.params for trial in made[0].trials()]

    for sampler in ("random", "tpe"):
        alone = drawn(f"alone_{sampler}", sampler, several=False)
        assert alone == drawn(f"several_{sampler}", sampler, several=True)
        assert len({tuple(params.values()) for params in alone}) == 6


def test_a_grid_is_tried_as_a_whole(opened: Callable[..., SweepStudy]) -> None:
    steps = Parameter("ratio", low=0.1, high=0.3, step=0.1)
    study = opened(space=(steps, CHOICE), sampler="grid", trials=6)
    work(study, lambda claim, see: Outcome((claim.params["ratio"],), {}))
    found = {(round(t.params["ratio"], 6), t.params["mask"]) for t in study.trials()}
    assert found == {(r, m) for r in (0.1, 0.2, 0.3) for m in ("topk", "soft")}


@pytest.mark.parametrize("sampler", ["cmaes", "nsga2", "tpe"])
def test_other_samplers_draw_within_the_space(
    opened: Callable[..., SweepStudy], sampler: str
) -> None:
    whole = Parameter("width", low=2, high=64, log=True, whole=True)
    objectives = ("im", "seconds") if sampler == "nsga2" else ("im",)
    study = opened(space=(LR, whole), sampler=sampler, trials=12, objectives=objectives)
    work(study, lambda c, see: Outcome((c.params["lr"], 1.0)[: len(objectives)], {}))
    assert states(study) == {"COMPLETE": 12}
    assert all(0.001 <= t.params["lr"] <= 1 for t in study.trials())
    assert all(isinstance(t.params["width"], int) for t in study.trials())


def test_failures_are_kept_with_their_reason_and_not_tried_again(
    opened: Callable[..., SweepStudy],
) -> None:
    def fragile(claim: Claim, see: Any) -> Outcome:
        if claim.number == 1:
            raise RunFailure("The loss is nan.")
        if claim.number == 2:
            raise ZeroDivisionError("one over zero")
        return value(claim, see)

    study, lines = opened(), []
    done = work(study, fragile, lines.append)
    assert (done.finished, done.failed) == (4, 2)
    trials = study.trials()
    assert trials[1].user_attrs["reason"] == "The loss is nan."
    assert trials[2].user_attrs["reason"] == "ZeroDivisionError: one over zero"
    assert "trial 1 FAILED: The loss is nan." in lines
    assert len(trials) == 6


def test_a_sweep_of_which_nothing_works_ends(opened: Callable[..., SweepStudy]) -> None:
    def broken(claim: Claim, see: Any) -> Outcome:
        raise ConfigError("batch_size = 1 is too small.")

    study = opened(trials=20)
    with pytest.raises(RunFailure, match="The first 3 trials of 'own' failed \\(batch_size = 1 is"):
        work(study, broken)
    assert len(study.trials()) == 3


def test_poor_trials_are_pruned(opened: Callable[..., SweepStudy]) -> None:
    def run(claim: Claim, see: Any) -> Outcome:
        level = 1.0 if claim.number < 5 else 0.0
        for step in range(1, 4):
            if see(step, level):
                raise execution.Stopped
        return Outcome((level,), {})

    study = opened(pruner="median", trials=7)
    done = work(study, run)
    assert (done.finished, done.pruned) == (5, 2)
    assert len(study.trials()[6].intermediate_values) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, interruption.Interrupted])
def test_an_interrupted_trial_is_offered_again(
    opened: Callable[..., SweepStudy], kind: type[BaseException]
) -> None:
    def interrupted(claim: Claim, see: Any) -> Outcome:
        if claim.number == 2:
            raise kind(signal.SIGTERM) if kind is interruption.Interrupted else kind
        return value(claim, see)

    study = opened()
    with pytest.raises(kind):
        work(study, interrupted)
    trials = study.trials()
    assert [t.state.name for t in trials[:4]] == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    again = opened()
    work(again, value)
    assert states(again) == {"COMPLETE": 6}
    trials = again.trials()
    assert trials[3].params == trials[2].params and trials[3].user_attrs["attempt"] == 1


@pytest.mark.fault("killed", "the process that trains a trial, e.g. for lack of memory")
def test_a_trial_whose_training_is_killed_is_tried_again(
    opened: Callable[..., SweepStudy],
) -> None:
    """The worker ends as if it was killed itself; a trial that is killed each time is lost."""
    attempts: list[int] = []

    def killed(claim: Claim, see: Any) -> Outcome:
        if claim.params == first:
            attempts.append(claim.attempt)
            raise Killed("The process that trains was killed by SIGKILL.")
        return value(claim, see)

    first: dict[str, Any] = {}

    def begin(claim: Claim, see: Any) -> Outcome:
        first.update(claim.params)
        return killed(claim, see)

    for number in range(ATTEMPTS):
        with pytest.raises(Killed):
            work(opened(), killed if number else begin)
    study = opened()
    work(study, killed)
    assert attempts == [1, 2, 3]
    assert states(study)["COMPLETE"] == len(counting(study.trials())) - 1
    assert [t.user_attrs["attempt"] for t in study.trials() if LOST in t.user_attrs] == [ATTEMPTS]


# -- several workers, some of them killed ---------------------------------------------------------


def forked(action: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(1)


def test_several_workers_share_a_study(tmp_path: Path) -> None:
    definition, log = define(trials=20), tmp_path / "done.txt"

    def run(claim: Claim, see: Any) -> Outcome:
        time.sleep(0.01)
        with log.open("a") as file:
            file.write(f"{claim.number}\n")
        return value(claim, see)

    def one() -> None:
        work(SweepStudy(definition, tmp_path / "runs"), run, poll=0.02)

    children = [forked(one) for _ in range(4)]
    assert {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children} == {0}
    assert sorted(map(int, log.read_text().split())) == list(range(20))
    study = SweepStudy(definition, tmp_path / "runs")
    assert states(study) == {"COMPLETE": 20} and len(study.trials()) == 20
    assert len({t.user_attrs["process"] for t in study.trials()}) > 1


@pytest.mark.fault("killed", "workers of a study at random moments")
def test_trials_of_killed_workers_are_taken_up_and_counted_once(tmp_path: Path) -> None:
    definition, rng = define(trials=12), random.Random(3)

    def one(seed: float) -> None:
        fate = random.Random(seed)

        def run(claim: Claim, see: Any) -> Outcome:
            time.sleep(0.01)
            if fate.random() < 0.15:
                os.kill(os.getpid(), signal.SIGKILL)
            return value(claim, see)

        work(SweepStudy(definition, tmp_path / "runs"), run, poll=0.02)

    kills = 0
    while True:
        children = [forked(partial(one, rng.random())) for _ in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes) <= {0, -signal.SIGKILL}
        kills += codes.count(-signal.SIGKILL)
        if 0 in codes:
            break
        assert kills < 50
    study = SweepStudy(definition, tmp_path / "runs")
    assert kills > 0 and not [t for t in study.trials() if t.state == TrialState.RUNNING]
    counted = counting(study.trials())
    assert len(counted) == 12
    # A trial that was killed too often counts as failed; all others have their value.
    for trial in counted:
        if trial.state == TrialState.FAIL:
            assert trial.user_attrs["attempt"] == ATTEMPTS
        else:
            assert trial.state == TrialState.COMPLETE
            assert trial.values == [trial.params["lr"]]
    retried = [t for t in study.trials() if "retry_of" in t.user_attrs]
    assert retried and all(
        t.params == study.trials()[t.user_attrs["retry_of"]].params for t in retried
    )


@pytest.mark.fault("killed", "every worker that has a certain trial")
def test_a_trial_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    definition = define(trials=3)

    def one() -> None:
        def run(claim: Claim, see: Any) -> Outcome:
            if claim.params == first:
                os.kill(os.getpid(), signal.SIGKILL)
            return value(claim, see)

        work(SweepStudy(definition, tmp_path / "runs"), run, poll=0.02)

    study = SweepStudy(definition, tmp_path / "runs")
    claim = study.claim()
    assert claim is not None
    first = dict(claim.params)
    with study.holding(claim):
        study.give_back(claim)
    deaths = 0
    while os.waitstatus_to_exitcode(os.waitpid(forked(one), 0)[1]) != 0:
        deaths += 1
    assert deaths == ATTEMPTS
    assert states(study) == {"COMPLETE": 2, "FAIL": 1}
    (lost,) = [t for t in counting(study.trials()) if t.state == TrialState.FAIL]
    assert state_of(lost) == "lost"
    assert lost.user_attrs["reason"].startswith("its workers were killed 3 times, most likely for")
    table = trial_table(definition, study.trials())
    assert list(table.loc[table["counted"], "state"]).count("lost") == 1
    assert ", 1 lost, " in progress.state(definition, study.trials(), 1).line()
    # A trial that kills its workers is no progress of the sweep, so that `DEATHS` is reached.
    assert finished_trials(study) == 2


def test_a_worker_that_was_thought_dead_disturbs_nobody(opened: Callable[..., SweepStudy]) -> None:
    slow, other = opened(trials=1), opened(trials=1)
    claim = slow.claim()
    assert claim is not None
    claim._lock.close()  # as if the kernel had taken it back
    work(other, value)
    slow.finish(claim, (99.0,), {})
    assert [t.state.name for t in slow.trials()] == ["FAIL", "COMPLETE"]
    assert states(slow) == {"COMPLETE": 1}


def test_a_value_that_is_told_while_others_look_is_not_repeated(
    opened: Callable[..., SweepStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = opened(trials=1), opened(trials=1)
    claim = slow.claim()
    assert claim is not None
    look = SweepStudy._alive

    def told_meanwhile(study: SweepStudy, trial: Any) -> bool:
        slow.finish(claim, (1.0,), {})
        claim._lock.close()
        return look(study, trial)

    monkeypatch.setattr(SweepStudy, "_alive", told_meanwhile)
    assert other.claim() is None
    assert [t.state.name for t in other.trials()] == ["COMPLETE"]


def test_a_trial_that_never_had_a_parameter_does_not_count(
    opened: Callable[..., SweepStudy],
) -> None:
    study = opened(trials=2)
    study.storage.create_new_trial(study.study._study_id)  # and its worker is killed
    work(opened(trials=2), value)
    assert [t.state.name for t in study.trials()] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert states(study) == {"COMPLETE": 2}


def test_a_held_trial_is_left_alone(opened: Callable[..., SweepStudy]) -> None:
    study, other = opened(trials=2), opened(trials=2)
    claim = study.claim()
    second = other.claim()
    assert claim is not None and second is not None and claim.number != second.number
    assert opened(trials=2).claim() is None
    with study.holding(claim):
        study.finish(claim, (1.0,), {})
    assert opened(trials=2).claim() is None


# -- what a study means ---------------------------------------------------------------------------


def test_a_study_that_began_otherwise_is_refused(opened: Callable[..., SweepStudy]) -> None:
    opened().remember({**define().meaning(), "code": "a"})
    opened().remember({**define(trials=9).meaning(), "code": "a"})
    wider = define(space=(Parameter("lr", low=0.001, high=10.0, log=True), CHOICE))
    with pytest.raises(ConfigError) as error:
        opened().remember({**wider.meaning(), "code": "b"})
    assert str(error.value) == (
        "The study 'own' has changed: space.lr.high was 1.0 and is 10.0; code was \"a\" and is "
        '"b"; undo the change, or pass --fork to start a new study.'
    )


def test_values_are_named_by_the_objectives_also_in_an_older_study(
    opened: Callable[..., SweepStudy],
) -> None:
    facts = {"code": "a"}
    older = opened(objectives=("im", "seconds"))
    older.study.set_user_attr("facts", facts)  # begun before studies had names
    assert older.study.metric_names is None
    opened(objectives=("im", "seconds")).remember(facts)
    worker = opened(objectives=("im", "seconds"))
    assert worker.study.metric_names == ["im", "seconds"]
    assert [way.name for way in worker.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    with pytest.raises(ConfigError):  # another objective is refused before anything is renamed
        opened().remember({"code": "b"})
    assert worker.study.metric_names == ["im", "seconds"]


def test_differences_are_said_in_words() -> None:
    old, new = {"a": {"b": 1}, "c": [1]}, {"a": {"b": 1, "d": None}, "c": [2], "e": True}
    assert differences(old, new) == ["c was [1] and is [2]", "e was null and is true"]


def test_a_fork_takes_the_first_free_name(tmp_path: Path) -> None:
    assert free_name(tmp_path, "own") == "own-2"
    (tmp_path / "sweeps" / "own-2").mkdir(parents=True)
    assert free_name(tmp_path, "own") == "own-3"


# -- storages -------------------------------------------------------------------------------------


def test_sqlite_serves_one_worker_on_a_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/own.db"
    with pytest.raises(ConfigError, match="SQLite is damaged or stalls with 2 workers; omit --st"):
        open_storage(url, workers=2)
    study = SweepStudy(define(), tmp_path / "runs", url)
    work(study, value)
    assert states(study) == {"COMPLETE": 6}
    monkeypatch.setattr(studies, "file_system", lambda path: "nfs4")
    with pytest.raises(ConfigError, match="lies on a network file system \\(nfs4\\), where SQLite"):
        open_storage(url)


@pytest.mark.fault("secrets", "a storage that cannot be opened")
@pytest.mark.parametrize("url", ["nosuch://me:secret@host/base", "sqlite:////nowhere/at/all.db"])
def test_storages_that_cannot_be_opened_are_told_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_storage(url)
    message = str(error.value)
    assert "cannot be opened" in message and "secret" not in message
    assert message.endswith(".") and "\n" not in message


def test_the_file_system_of_a_path_is_known() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) not in ("", "proc")


def test_a_journal_goes_on_after_half_a_line(opened: Callable[..., SweepStudy]) -> None:
    study = opened(trials=3)
    work(study, value)
    journal = study.folder / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "x", "tri')
    again = opened(trials=5)
    work(again, value)
    assert states(again) == {"COMPLETE": 5}
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.fault("tracker", "the database of a sweep is down for a while")
def test_a_server_that_is_away_delays() -> None:
    from sqlalchemy.exc import OperationalError

    answers = iter([True, True, False])
    lines: list[str] = []
    slept: list[float] = []

    def ask() -> str:
        if next(answers):
            raise OperationalError("select", {}, Exception("server closed the connection"))
        return "here"

    assert retry_while_unavailable(ask, lines.append, sleep=slept.append) == "here"
    assert slept == [0.5, 1.0] and len(lines) == 2
    assert "does not respond" in lines[0] and lines[1] == "the storage responds again"

    def never() -> None:
        raise OperationalError("select", {}, Exception("gone"))

    with pytest.raises(RunFailure, match="did not respond for 0 s .*; start it and repeat"):
        retry_while_unavailable(never, patience=0, sleep=lambda seconds: None)


@pytest.mark.fault("tracker", "the database of a sweep is down for a while")
def test_a_worker_waits_for_a_server_that_is_away_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new sweep does not wait, because its URL may be wrong."""
    from sqlalchemy.exc import OperationalError

    url, real = f"sqlite:///{tmp_path}/study.db", optuna.storages.RDBStorage.__init__
    answers = iter([False, False, True])

    def connect(*arguments: Any, **options: Any) -> None:
        if not next(answers):
            raise OperationalError("select", {}, Exception("connection refused"))
        real(*arguments, **options)

    sweep = define(trials=1)
    SweepStudy(sweep, tmp_path, url)
    lines: list[str] = []
    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", connect)
    with pytest.raises(ConfigError, match="cannot be opened"):
        SweepStudy(sweep, tmp_path, url, report=lines.append)
    assert not lines
    SweepStudy(sweep, tmp_path, url, report=lines.append, begun=True)
    assert "connection refused" in lines[0] and lines[1] == "the storage responds again"


# -- Optuna's parts -------------------------------------------------------------------------------


def test_parameters_as_optuna_says_them() -> None:
    kinds = optuna.distributions
    assert distribution(LR) == kinds.FloatDistribution(0.001, 1.0, log=True)
    assert distribution(CHOICE) == kinds.CategoricalDistribution(("topk", "soft"))
    whole = Parameter("n", low=1, high=9, step=2, whole=True)
    assert distribution(whole) == kinds.IntDistribution(1, 9, step=2)
    stepped = Parameter("x", low=0.0, high=1.0, step=0.25)
    assert distribution(stepped) == kinds.FloatDistribution(0.0, 1.0, step=0.25)
    assert type(make_sampler(define(sampler="tpe"), 3)) is optuna.samplers.TPESampler
