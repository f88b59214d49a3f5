"""What a study holds, as plain tables that anything can read, draw or write down.

Test labels enter here, after the search and apart from it: the harness scored the test cases of
every finished run at the checkpoint that the objective chose, and `afterwards` is read from there.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from glua_bench.config import ORACLE
from glua_bench.errors import UserError
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory
from glua_bench.scoring.metrics import METRICS, complete
from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.study import SweepStudy, counting

STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
# Trials for each parameter, and in all, below which importances say more of chance.
TRIALS_A_PARAMETER, FEWEST_TRIALS = 4, 10


def collect(study: SweepStudy, runs_root: Path) -> dict[str, Any]:
    """A study's tables and facts, as the report of a sweep takes them.

    Args:
        study: of the sweep.
        runs_root: the directory of all runs.

    Returns:
        name; title; facts (what is searched, entry → text); parameters (name → whether its scale
        is logarithmic, None where its values are listed); objectives; oracle (whether the search
        read target labels); shared (`--set` texts of the method that all trials have); trials,
        runs, seen (the tables of `trial_table`, `run_table` and `seen_table`); importances
        (parameter → share of the objective's variance, or None), and importances_note (why there
        are none, or what they are).
    """
    definition, trials = study.definition, study.trials()
    importances, note = parameter_importances(study)
    return {
        "name": study.name,
        "title": definition.title,
        "facts": facts(definition),
        "parameters": {p.name: None if p.choices else p.log for p in _drawn(definition)},
        "objectives": definition.objectives,
        "oracle": definition.selector == ORACLE,
        "budget": definition.trials,
        "shared": definition.method_settings,
        "trials": trial_table(definition, trials),
        "runs": run_table(definition, trials, runs_root),
        "seen": seen_table(trials),
        "importances": importances,
        "importances_note": note,
    }


def _drawn(definition: Definition) -> list[Parameter]:
    """The parameters; a list of numbers is drawn on a numeric axis."""
    made = []
    for parameter in definition.space:
        values = parameter.choices
        numeric = values and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
        )
        if numeric:
            low, high = float(min(values)), float(max(values))
            log = low > 0 and high / low > 100
            parameter = Parameter(parameter.name, low=low, high=high, log=log)
        made.append(parameter)
    return made


def facts(definition: Definition) -> dict[str, str]:
    """A definition in words, entry by entry."""
    told = {
        "method": definition.method,
        "dataset": f"{definition.fold_name} {', '.join(definition.directions)}",
        "preset": definition.preset,
        "set for all": ", ".join(definition.settings),
        "runs a trial": f"{definition.runs_per_trial} "
        f"({len(definition.directions)} × {definition.seeds}: directions × seeds)",
        "objective": ", ".join(definition.objectives),
        "sampler": f"{definition.sampler}, seed {definition.seed}",
        "pruner": definition.pruner,
        "trials": str(definition.trials),
    }
    searched = {f"searched: {p.name}": values_in_words(p) for p in definition.space}
    return {name: text for name, text in {**told, **searched}.items() if text}


def values_in_words(parameter: Parameter) -> str:
    """The values that a sweep may give a setting."""
    if parameter.choices:
        return ", ".join(map(str, parameter.choices))
    step = f" in steps of {parameter.step:g}" if parameter.step else ""
    log = ", logarithmic" if parameter.log else ""
    return f"{parameter.low:g} to {parameter.high:g}{step}{log}"


def trial_table(definition: Definition, trials: list[FrozenTrial]) -> pd.DataFrame:
    """One row a trial, repeated ones included.

    Returns:
        number, state, counted (whether the budget counts it: no later trial repeats it), attempt,
        worker (by a number: a report names no machine), began and ended (pandas times; NaT while
        it runs), reason (of a failure), then a column for each parameter, "method." before its
        name, and one for each objective.
    """
    counted = {trial.number for trial in counting(trials)}
    workers: dict[tuple[Any, Any], str] = {}
    rows = []
    for trial in trials:
        told = trial.user_attrs
        values = trial.values if trial.state == TrialState.COMPLETE and trial.values else ()
        rows.append(
            {
                "number": trial.number,
                "state": STATES[trial.state],
                "counted": trial.number in counted,
                "attempt": int(told.get("attempt", 1)),
                "worker": _worker(trial, workers),
                "began": trial.datetime_start,
                "ended": trial.datetime_complete,
                "reason": str(told.get("reason", "")),
                **{f"method.{p.name}": trial.params.get(p.name) for p in definition.space},
                **{
                    name: float(values[place]) if values else math.nan
                    for place, name in enumerate(definition.objectives)
                },
            }
        )
    names = [f"method.{p.name}" for p in definition.space]
    columns = ["number", "state", "counted", "attempt", "worker", "began", "ended", "reason"]
    table = pd.DataFrame(rows, columns=[*columns, *names, *definition.objectives])
    for name in ("began", "ended"):
        table[name] = pd.to_datetime(table[name])
    return table


def _worker(trial: FrozenTrial, known: dict[tuple[Any, Any], str]) -> str:
    """A name for the process that was at a trial; "" where nobody was."""
    key = trial.user_attrs.get("host"), trial.user_attrs.get("process")
    return "" if None in key else known.setdefault(key, f"worker {len(known) + 1}")


def run_table(definition: Definition, trials: list[FrozenTrial], runs_root: Path) -> pd.DataFrame:
    """One row for each run of a finished trial.

    Returns:
        trial, run (its id), direction, seed, quality (the objective's score), and each metric's
        mean (of the test cases, at the checkpoint that the objective chose; nan where the run has
        gone or is older than the metric).
    """
    rows = []
    for trial in counting(trials):
        if trial.state != TrialState.COMPLETE:
            continue
        qualities = trial.user_attrs.get("qualities", {})
        for run, (key, quality) in zip(
            trial.user_attrs.get("runs", ()), qualities.items(), strict=False
        ):
            direction, _, seed = key.partition(", seed ")
            rows.append(
                {
                    "trial": trial.number,
                    "run": run,
                    "direction": direction,
                    "seed": int(seed),
                    "quality": float(quality),
                    **_scores(definition, runs_root, run),
                }
            )
    columns = ["trial", "run", "direction", "seed", "quality", *METRICS]
    return pd.DataFrame(rows, columns=columns)


def _scores(definition: Definition, runs_root: Path, run: str) -> dict[str, float]:
    from glua_bench.scoring.evaluation import mean_score

    directory = _run(definition, runs_root, run)
    if directory is None:
        return {}
    try:
        cases = complete(directory.read_cases())
    except UserError:
        return {}
    chosen = cases[cases["selector"] == definition.selector]
    return {name: mean_score(chosen, name) for name in METRICS}


def _run(definition: Definition, runs_root: Path, run: str) -> RunDirectory | None:
    """The directory of a trial's run; None where it has gone."""
    try:
        return RunDirectory.open(runs_root / definition.fold_name / definition.method / run)
    except UserError:
        return None


def seen_table(trials: list[FrozenTrial]) -> pd.DataFrame:
    """What was reported while trials ran: trial, step, value."""
    rows = [
        (trial.number, step, value)
        for trial in trials
        for step, value in sorted(trial.intermediate_values.items())
    ]
    return pd.DataFrame(rows, columns=["trial", "step", "value"])


def group(study: SweepStudy, runs_root: Path, stopped: bool = False) -> Comparison | None:
    """The sweep as the tracker shows it: one run, and below it those of its trials.

    Args:
        study: of the sweep.
        runs_root: the directory of all runs.
        stopped: whether nobody works on it now.

    Returns:
        None where no trial has a run that has ended.
    """
    definition, known = study.definition, study.trials()
    trials = counting(known)
    members = [
        (f"trial {trial.number}", run)
        for trial in trials
        for name in trial.user_attrs.get("runs", ())
        if (run := _run(definition, runs_root, name)) is not None
        and (run.done or run.failed is not None)
    ]
    if not members:
        return None
    # Of all trials: a killed worker's first one is replaced, and the group stays the same.
    began = [t.datetime_start for t in known if t.datetime_start is not None]
    chosen = chosen_trial(trials)
    told = facts(definition)
    states = [STATES[trial.state] for trial in trials]
    return Comparison(
        f"sweep {study.name} | {told['dataset']} | {definition.preset}",
        members,
        began=min(began).timestamp(),
        # A study is one in its storage; a second one of the same name elsewhere is another.
        identity=f"sweep {study.name} {study.facts.get('code', '')} {min(began).isoformat()}",
        settings={name: text for name, text in told.items() if name != "trials"},
        facts={
            "sweep": study.name,
            "objective": ", ".join(definition.objectives),
            "oracle": str(definition.selector == ORACLE).lower(),
            "chosen": "" if chosen is None else _settings_in_words(chosen),
            "trials": ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)),
        },
        complete=len(trials) >= definition.trials and all(t.state.is_finished() for t in trials),
        stopped=stopped,
    )


def chosen_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial of the highest quality."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    return max(done, key=lambda trial: trial.values[0]) if done else None


def _settings_in_words(trial: FrozenTrial) -> str:
    return ", ".join(f"method.{name}={value}" for name, value in trial.params.items())


def parameter_importances(study: SweepStudy) -> tuple[pd.Series | None, str]:
    """How much of the objective's variance follows each parameter (fANOVA), and a note.

    Returns:
        Shares by parameter, the largest first; None, with the reason, where they would say
        nothing.
    """
    names = [p.name for p in study.definition.space]
    if len(names) < 2:
        return None, "With one parameter there is nothing to weigh."
    done = [t for t in study.trials() if t.state == TrialState.COMPLETE]
    needed = max(FEWEST_TRIALS, TRIALS_A_PARAMETER * len(names))
    if len(done) < needed:
        return None, (
            f"Too few finished trials for importances: {len(done)}, and {needed} are needed for "
            f"{len(names)} parameters."
        )
    if len({trial.values[0] for trial in done}) == 1:
        return None, "All trials have the same value, so no parameter matters here."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study.study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: trial.values[0],
        )
    return pd.Series(found, dtype=float), (
        f"fANOVA over {len(done)} finished trials: the share of the variance of "
        f"{study.definition.selector} that follows each parameter alone."
    )
