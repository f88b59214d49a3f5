"""Results of a study as plain tables.

Test labels enter only here, after the search: the harness scored the test cases of every finished
run at the checkpoint that the objective chose, and the post hoc analysis uses these scores.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from glua_bench.config import ORACLE
from glua_bench.errors import UserError
from glua_bench.records.naming import Comparison, label_stamps
from glua_bench.records.run_directory import RunDirectory, unsealed_note
from glua_bench.scoring.metrics import METRICS, complete
from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.study import LOST, SweepStudy, counting

STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
# Minimum number of trials per parameter, and in total, for importances.
TRIALS_A_PARAMETER, FEWEST_TRIALS = 4, 10


def state_of(trial: FrozenTrial) -> str:
    """Return the state of a trial in a word; "lost" if its workers were killed repeatedly."""
    return LOST if LOST in trial.user_attrs else STATES[trial.state]


def collect(study: SweepStudy, runs_root: Path) -> dict[str, Any]:
    """Return a study's tables and facts as arguments of `sweep_report.Sweep`.

    Args:
        study: the study.
        runs_root: directory of all runs.

    Returns:
        name; title; facts (entry of the definition → text); parameters (name → True for a
        logarithmic scale, None for listed values); objectives; oracle (whether the search read
        target labels); data (options of `run` that all trials share); trials, runs, seen (the
        tables of `trial_table`, `run_table` and `seen_table`); importances (parameter → share of
        the objective's variance, or None), and importances_note (their meaning, or why there are
        none); stamps (what the dataset states about results).
    """
    definition, trials = study.definition, study.trials()
    runs = run_table(definition, trials, runs_root)
    importances, note = parameter_importances(study)
    return {
        "name": study.name,
        "title": definition.title,
        "facts": facts(definition),
        "parameters": {p.name: None if p.choices else p.log for p in _drawn(definition)},
        "objectives": definition.objectives,
        "oracle": definition.selector == ORACLE,
        "budget": definition.trials,
        "trials": trial_table(definition, trials),
        "runs": runs,
        "seen": seen_table(trials),
        "importances": importances,
        "importances_note": note,
        "data": _options(definition),
        "stamps": _stamps(definition, runs, runs_root),
    }


def _stamps(definition: Definition, runs: pd.DataFrame, runs_root: Path) -> list[str]:
    """Return what the runs record of protocol, caveats, labels, damage and seals."""
    found: dict[str, None] = {}
    known = [own for run in runs["run"].unique() if (own := _run(definition, runs_root, run))]
    found |= {f"EXCLUDED {own.damage}": None for own in known if own.damage}
    if note := unsealed_note(known):
        found[note] = None
    recorded = []
    for own in known:
        with contextlib.suppress(UserError):
            recorded += [] if own.damage else [own.read_environment()]
    for facts in recorded:
        for name in ("protocol", "caveat"):
            if facts.get(name):
                found[f"{name.upper()} {facts[name]}."] = None
    return [*found, *label_stamps(recorded)]


def _options(definition: Definition) -> list[str]:
    """Return the options of `run` that all trials share, with the first direction."""
    words = ["--dataset", definition.dataset, "--direction", definition.directions[0]]
    words += ["--fold", str(definition.fold)] if definition.fold > 1 else []
    words += ["--preset", definition.preset]
    return words + [word for text in definition.settings for word in ("--set", text)]


def _drawn(definition: Definition) -> list[Parameter]:
    """Return the parameters, with lists of numbers as ranges, for numeric axes."""
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
    """Return a definition in words, entry → text."""
    found = {
        "method": definition.method,
        "dataset": f"{definition.fold_name} {', '.join(definition.directions)}",
        "preset": definition.preset,
        "common settings": ", ".join(definition.settings),
        "runs per trial": f"{definition.runs_per_trial} "
        f"({len(definition.directions)} × {definition.seeds}: directions × seeds)",
        "objective": ", ".join(definition.objectives),
        "sampler": f"{definition.sampler}, seed {definition.seed}",
        "pruner": definition.pruner,
        "trials": str(definition.trials),
    }
    found |= {f"values of {p.name}": values_in_words(p) for p in definition.space}
    return {name: text for name, text in found.items() if text}


def values_in_words(parameter: Parameter) -> str:
    """Describe the search range of a setting."""
    if parameter.choices:
        return ", ".join(map(str, parameter.choices))
    step = f" in steps of {parameter.step:g}" if parameter.step else ""
    log = ", logarithmic" if parameter.log else ""
    return f"{parameter.low:g} to {parameter.high:g}{step}{log}"


def trial_table(definition: Definition, trials: list[FrozenTrial]) -> pd.DataFrame:
    """Return a table with one row per trial, including repeated ones.

    Returns:
        Columns number, state, counted (whether it counts towards the budget), attempt, worker
        (a number, because reports name no machine), began and ended (pandas times; NaT while it
        runs), reason (of a failure), "method.NAME" for each parameter, and one for each objective.
    """
    counted = {trial.number for trial in counting(trials)}
    workers: dict[tuple[Any, Any], str] = {}
    names = {p.name: f"method.{p.name}" for p in definition.space}
    rows = []
    for trial in trials:
        attrs = trial.user_attrs
        key = attrs.get("host"), attrs.get("process")
        if None not in key:
            workers.setdefault(key, f"worker {len(workers) + 1}")
        done = trial.state == TrialState.COMPLETE and trial.values
        values = trial.values if done else [math.nan] * len(definition.objectives)
        rows.append(
            {
                "number": trial.number,
                "state": state_of(trial),
                "counted": trial.number in counted,
                "attempt": int(attrs.get("attempt", 1)),
                "worker": workers.get(key, ""),
                "began": trial.datetime_start,
                "ended": trial.datetime_complete,
                "reason": str(attrs.get("reason", "")),
                **{column: trial.params.get(name) for name, column in names.items()},
                **dict(zip(definition.objectives, map(float, values), strict=True)),
            }
        )
    columns = ["number", "state", "counted", "attempt", "worker", "began", "ended", "reason"]
    table = pd.DataFrame(rows, columns=[*columns, *names.values(), *definition.objectives])
    for name in ("began", "ended"):
        table[name] = pd.to_datetime(table[name])
    return table


def run_table(definition: Definition, trials: list[FrozenTrial], runs_root: Path) -> pd.DataFrame:
    """Return a table with one row per run of a finished trial.

    Returns:
        Columns trial, run (its id), direction, seed, quality (the objective's score), and each
        metric's mean over test cases at the checkpoint that the objective chose; nan if the run
        was deleted or is older than the metric.
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
    if directory is None or directory.damage:
        return {}
    try:
        cases = complete(directory.read_cases())
    except UserError:
        return {}
    chosen = cases[cases["selector"] == definition.selector]
    return {name: mean_score(chosen, name) for name in METRICS}


def _run(definition: Definition, runs_root: Path, run: str) -> RunDirectory | None:
    """Return the directory of a trial's run; None if it was deleted."""
    try:
        return RunDirectory.open(runs_root / definition.fold_name / definition.method / run)
    except UserError:
        return None


def seen_table(trials: list[FrozenTrial]) -> pd.DataFrame:
    """Return a table of intermediate values: trial, step, value."""
    rows = [
        (trial.number, step, value)
        for trial in trials
        for step, value in sorted(trial.intermediate_values.items())
    ]
    return pd.DataFrame(rows, columns=["trial", "step", "value"])


def group(study: SweepStudy, runs_root: Path, stopped: bool = False) -> Comparison | None:
    """Return the sweep as a group for the tracker: one run, with its trials' runs as children.

    Args:
        study: the study.
        runs_root: directory of all runs.
        stopped: whether the sweep was interrupted.

    Returns:
        The group, or None if no run has ended.
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
    # Over all trials, so that the group stays the same if its first trial is repeated.
    began = [t.datetime_start for t in known if t.datetime_start is not None]
    chosen = chosen_trial(trials)
    params = {} if chosen is None else chosen.params
    definition_facts = facts(definition)
    states = [state_of(trial) for trial in trials]
    return Comparison(
        f"sweep {study.name} | {definition_facts['dataset']} | {definition.preset}",
        members,
        began=min(began).timestamp(),
        # Studies of the same name in different storages are different groups.
        identity=f"sweep {study.name} {study.facts.get('code', '')} {min(began).isoformat()}",
        settings={name: text for name, text in definition_facts.items() if name != "trials"},
        facts={
            "sweep": study.name,
            "objective": ", ".join(definition.objectives),
            "oracle": str(definition.selector == ORACLE).lower(),
            "chosen": ", ".join(f"method.{name}={value}" for name, value in params.items()),
            "trials": ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)),
        },
        complete=len(trials) >= definition.trials and all(t.state.is_finished() for t in trials),
        stopped=stopped,
    )


def chosen_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Return the finished trial with the highest quality."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    return max(done, key=lambda trial: trial.values[0]) if done else None


def parameter_importances(study: SweepStudy) -> tuple[pd.Series | None, str]:
    """Compute each parameter's share of the objective's variance (fANOVA).

    Returns:
        Shares by parameter, the largest first, and a note; None and the reason if they would be
        meaningless.
    """
    names = [p.name for p in study.definition.space]
    if len(names) < 2:
        return None, "Importances need at least two parameters."
    done = [t for t in study.trials() if t.state == TrialState.COMPLETE]
    needed = max(FEWEST_TRIALS, TRIALS_A_PARAMETER * len(names))
    if len(done) < needed:
        return None, (
            f"Too few finished trials for importances: {len(done)} of the {needed} needed for "
            f"{len(names)} parameters."
        )
    if len({trial.values[0] for trial in done}) == 1:
        return None, "All trials have the same value, so importances are undefined."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study.study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: trial.values[0],
        )
    return pd.Series(found, dtype=float), (
        f"fANOVA over {len(done)} finished trials: share of the variance of "
        f"{study.definition.selector} explained by each parameter alone."
    )
