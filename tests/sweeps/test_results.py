"""sweeps/results.py: a study as plain tables and as a group in the tracker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import sweep_samples
from sample_runs import reseal

from glua_bench.console import Progress
from glua_bench.errors import RunFailure
from glua_bench.records.run_directory import RunDirectory
from glua_bench.reports.sweep_report import Sweep, notices
from glua_bench.runs.request import RunOptions
from glua_bench.sweeps import command, results, trial
from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.study import Claim, SweepStudy
from glua_bench.sweeps.worker import work

RATIO = Parameter("mask_ratio", choices=(0.1, 0.5, 0.9))
WEIGHT = Parameter("lambda_output", low=0.001, high=1.0, log=True)
KIND = Parameter("mask", choices=("topk", "soft"))


def define(**changes: Any) -> Definition:
    own = {"title": "Why?", "seeds": 2, "settings": ("steps=5",), "trials": 5}
    return sweep_samples.define(**{**own, "space": (RATIO, WEIGHT, KIND), **changes})


def facts(runs: dict[str, float]) -> dict[str, Any]:
    names = [f"mr-ct, seed {seed}" for seed in range(len(runs))]
    return {"runs": list(runs), "qualities": dict(zip(names, runs.values(), strict=True))}


def claimed(study: SweepStudy) -> Claim:
    claim = study.claim()
    assert claim is not None
    return claim


@pytest.fixture
def searched(made_runs) -> SweepStudy:
    """Two finished trials, one returned and claimed again, one pruned, one failed.

    The first trial has the lower objective and the higher test Dice.
    """
    study = SweepStudy(define(), made_runs.root)
    study.remember({"code": "c1"})
    for quality, dice in ((0.1, 0.6), (0.3, 0.5)):
        claim = claimed(study)
        made = [
            made_runs.add("glua", 0.1, seed, selectors={"im": dice + 0.1 * seed})
            for seed in range(2)
        ]
        with study.holding(claim):
            study.see(claim, 0, quality / 2)
            study.finish(claim, (quality,), facts({run.id: quality for run in made}))
    claim = claimed(study)
    with study.holding(claim):
        study.give_back(claim)
    claim = claimed(study)
    with study.holding(claim):
        study.prune(claim, facts({made_runs.add("glua", 0.2, 0).id: 0.2}))
    claim = claimed(study)
    with study.holding(claim):
        study.fail(claim, "the data are gone")
    return study


def test_every_trial_has_its_row(searched, made_runs) -> None:
    tables = results.collect(searched, made_runs.root)
    assert tables["data"][:6] == [
        *("--dataset", "phantom", "--direction", "mr-ct"),
        *("--preset", "quick"),
    ]
    table = tables["trials"].set_index("number")
    assert list(table["state"]) == ["done", "done", "failed", "pruned", "failed"]
    assert list(table["counted"]) == [True, True, False, True, True]
    assert list(table["attempt"]) == [1, 1, 1, 1, 1]
    assert list(table["im"].dropna()) == [0.1, 0.3]
    assert table["reason"][4] == "the data are gone"
    # By a number, since a report may be passed on.
    assert set(table["worker"]) == {"worker 1"}
    params = searched.trials()[1].params
    assert {name: table[f"method.{name}"][1] for name in params} == params
    assert (table["ended"] >= table["began"]).all()
    assert tables["seen"].values.tolist() == [[0, 0, 0.05], [1, 0, 0.15]]


@pytest.mark.fault("sealed results", "edit a run of a sweep's trial")
def test_a_damaged_run_has_no_scores_and_is_named(searched, made_runs) -> None:
    run = searched.trials()[1].user_attrs["runs"][0]
    file = made_runs.root / "phantom" / "glua" / run / "cases.parquet"
    frame = pd.read_parquet(file)
    frame.assign(dice=1.0).to_parquet(file, index=False)
    tables = results.collect(searched, made_runs.root)
    dice = tables["runs"].set_index("run")["dice"]
    assert math.isnan(dice[run]) and dice.drop(run).notna().all()
    (stamp,) = (text for text in tables["stamps"] if text.startswith("EXCLUDED "))
    assert str(file.parent) in stamp and "cases.parquet was" in stamp
    group = results.group(searched, made_runs.root)
    assert group is not None and run not in {member.id for _, member in group.members}


def test_runs_have_the_test_scores_of_the_objective_s_checkpoint(searched, made_runs) -> None:
    """Not those of `last`, which are all 0.1."""
    table = results.collect(searched, made_runs.root)["runs"]
    assert list(table["trial"]) == [0, 0, 1, 1] and list(table["seed"]) == [0, 1, 0, 1]
    assert list(table["dice"]) == pytest.approx([0.6, 0.7, 0.5, 0.6])
    assert list(table["quality"]) == [0.1, 0.1, 0.3, 0.3]
    for file in (made_runs.root / "phantom" / "glua").glob("*/cases.parquet"):
        file.unlink()
    table = results.collect(searched, made_runs.root)["runs"]
    assert len(table) == 4 and table["dice"].isna().all()


def test_the_report_takes_what_is_collected(searched, made_runs) -> None:
    sweep = Sweep(**results.collect(searched, made_runs.root))
    assert sweep.chosen == 1 and sweep.name == "own" and sweep.title == "Why?"
    assert sweep.parameters == {"mask_ratio": False, "lambda_output": True, "mask": None}
    assert sweep.facts["values of lambda_output"] == "0.001 to 1, logarithmic"
    assert sweep.facts["values of mask"] == "topk, soft"
    assert sweep.facts["runs per trial"].startswith("2 ") and not sweep.oracle
    assert "pruner" in sweep.facts and sweep.facts["common settings"] == "steps=5"


def test_caveats_of_runs_are_notices_of_the_sweep(searched, made_runs) -> None:
    assert results.collect(searched, made_runs.root)["stamps"] == []
    for file in (made_runs.root / "phantom" / "glua").glob("*/environment.json"):
        facts = json.loads(file.read_text())
        file.write_text(json.dumps({**facts, "caveat": "test patients train"}))
        reseal(RunDirectory.open(file.parent))
    sweep = Sweep(**results.collect(searched, made_runs.root))
    assert notices(sweep)[0] == "CAVEAT test patients train."


def test_the_tracker_s_group_is_the_study_and_grows(searched, made_runs) -> None:
    group = results.group(searched, made_runs.root)
    assert group is not None and not group.complete
    # The finished run of the pruned trial is there as well.
    assert [entry for entry, _ in group.members] == ["trial 0"] * 2 + ["trial 1"] * 2 + ["trial 3"]
    assert group.facts["oracle"] == "false" and group.facts["objective"] == "im"
    assert group.facts["trials"] == "2 done, 1 pruned, 1 failed"
    chosen = searched.trials()[1].params
    assert group.facts["chosen"] == ", ".join(f"method.{n}={v}" for n, v in chosen.items())
    assert group.settings is not None and "values of mask" in group.settings
    claim = claimed(searched)
    with searched.holding(claim):
        made = [made_runs.add("glua", 0.5, seed) for seed in range(2)]
        searched.finish(claim, (0.9,), facts({run.id: 0.9 for run in made}))
    grown = results.group(searched, made_runs.root)
    assert grown is not None and len(grown.members) == 7
    assert grown.id == group.id and grown.parameters() == group.parameters()
    assert grown.complete and grown.facts["chosen"] != group.facts["chosen"]
    late = results.group(searched, made_runs.root, stopped=True)
    assert late is not None and late.status == grown.status == "FINISHED"


def test_the_group_stays_the_same_where_its_first_trial_is_repeated(made_runs) -> None:
    study = SweepStudy(define(trials=2), made_runs.root)
    claims = [claimed(study) for _ in range(2)]
    runs = [made_runs.add("glua", 0.5, seed) for seed in range(2)]
    study.finish(claims[1], (0.9,), facts({run.id: 0.9 for run in runs}))
    first = results.group(study, made_runs.root, stopped=True)
    study.give_back(claims[0])
    claims[0]._lock.close()
    again = results.group(study, made_runs.root)
    assert first is not None and again is not None and first.id == again.id
    assert first.began == again.began
    assert (first.status, again.status) == ("KILLED", "RUNNING")


def test_a_study_without_runs_has_no_group(made_runs) -> None:
    study = SweepStudy(define(), made_runs.root)
    assert results.group(study, made_runs.root) is None
    tables = results.collect(study, made_runs.root)
    assert tables["trials"].empty and tables["runs"].empty and Sweep(**tables).chosen is None


@pytest.fixture
def filled(tmp_path: Path) -> Callable[..., SweepStudy]:
    def make(count: int, value: Callable[[Any], float], **changes: Any) -> SweepStudy:
        study = SweepStudy(define(trials=count, **changes), tmp_path / "runs")
        for _ in range(count):
            claim = claimed(study)
            with study.holding(claim):
                study.finish(claim, (value(claim.params),), {})
        return study

    return make


def test_importances_find_what_matters(filled) -> None:
    study = filled(16, lambda p: math.log10(p["lambda_output"]))
    shares, note = results.parameter_importances(study)
    assert shares is not None and shares.index[0] == "lambda_output" and shares.iloc[0] > 0.8
    assert shares.sum() == pytest.approx(1.0) and "16 finished trials" in note


@pytest.mark.parametrize(
    ("count", "value", "changes", "said"),
    [
        (3, lambda p: p["lambda_output"], {}, "3 of the 12 needed for 3 parameters"),
        (12, lambda p: 0.5, {}, "same value"),
        (3, lambda p: p["lambda_output"], {"space": (WEIGHT,)}, "at least two parameters"),
    ],
)
def test_importances_that_say_nothing_are_not_given(filled, count, value, changes, said) -> None:
    shares, note = results.parameter_importances(filled(count, value, **changes))
    assert shares is None and said in note


# -- what a pruned trial leaves behind ------------------------------------------------------------


def stageless() -> Any:
    """Stand for a method without stages."""
    return SimpleNamespace(stages=lambda: ())


def test_a_pruned_trial_names_the_runs_that_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two runs finishes, the second is pruned."""
    made: list[str] = []

    def plan(request: Any) -> Any:
        directory = SimpleNamespace(
            path="x",
            done=False,
            problem="",
            read_summary=lambda: {"selector_scores": {"im": {"1": 0.5}}, "stage_seconds": {}},
        )
        config = SimpleNamespace(candidates=1, steps=1)
        return SimpleNamespace(
            id=f"run{request.seed}", directory=directory, config=config, build=stageless
        )

    def execute(planned: Any, progress: Any, watch: Any) -> None:
        made.append(planned.id)
        watch.see(1, 0.5)

    monkeypatch.setattr(trial, "plan", plan)
    monkeypatch.setattr(trial.execution, "execute", execute)
    definition = define(space=(WEIGHT,), pruner="median", trials=1)
    study = SweepStudy(definition, tmp_path / "runs")
    base = RunOptions(runs_root=tmp_path / "runs")

    def run(claim: Claim, see: Any) -> Any:
        quiet = Progress(enabled=False)
        return trial.execute(
            definition, base, claim.params, quiet, lambda step, value: len(made) == 2
        )

    done = work(study, run)
    (only,) = study.trials()
    assert done.pruned == 1 and made == ["run0", "run1"]
    assert only.user_attrs["runs"] == ["run0"]
    assert only.user_attrs["qualities"] == {"mr-ct, seed 0": 0.5}


def test_a_failed_trial_names_the_run_that_failed(made_runs, monkeypatch) -> None:
    """The tracker shows it with its reason among the sweep's runs."""
    made = [made_runs.add("glua", 0.5, seed) for seed in range(2)]

    def plan(request: Any) -> Any:
        run = made[request.seed]
        return SimpleNamespace(id=run.id, directory=run, build=stageless)

    monkeypatch.setattr(trial, "plan", plan)

    def execute(planned: Any, progress: Any, watch: Any) -> None:
        if planned.id == made[1].id:
            raise RunFailure("the loss is not finite")

    monkeypatch.setattr(trial.execution, "execute", execute)
    monkeypatch.setattr(trial, "best", lambda *_: 0.5)
    study = SweepStudy(define(trials=1), made_runs.root)
    base = RunOptions(runs_root=made_runs.root)
    done = command.run_worker(study, base, lambda line: None, Progress(enabled=False))
    (only,) = study.trials()
    assert done.failed == 1 and only.user_attrs["runs"] == [run.id for run in made]
    group = results.group(study, made_runs.root)
    assert group is not None and [run.id for _, run in group.members] == [run.id for run in made]
