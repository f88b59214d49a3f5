"""A worker takes trials of a study until there is none, and loses none when it is killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from optuna.trial import TrialState

from glua_bench.errors import RunFailure, UserError
from glua_bench.runs import execution, interruption
from glua_bench.runs.interruption import Interrupted
from glua_bench.sweeps.study import Claim, SweepStudy, counting
from glua_bench.sweeps.trial import Outcome, Pruned, See

POLL_SECONDS = 1.0  # between looks at trials that other workers are at
MAX_FAILURES = 3  # trials that all fail, without one that works, end a sweep

Run = Callable[[Claim, See], Outcome]


@dataclass
class Done:
    """What one worker did.

    Attributes:
        finished: trials with values.
        pruned: trials that were ended early.
        failed: trials that have no value.
    """

    finished: int = 0
    pruned: int = 0
    failed: int = 0


def work(
    study: SweepStudy,
    run: Run,
    report: Callable[[str], None] = lambda line: None,
    poll: float = POLL_SECONDS,
) -> Done:
    """Take trials and run them, until the study is finished.

    Args:
        study: shared with other workers.
        run: executes a trial; it may raise `Stopped` to end it early.
        report: receives a line for each trial.
        poll: seconds between looks, where only others' trials are left.

    Returns:
        What this worker did.

    Raises:
        RunFailure: the first trials failed, all of them, or the storage stays away.
        Interrupted: the process was asked to end; its trial is offered to others.
        KeyboardInterrupt: likewise.
    """
    done = Done()
    while True:
        interruption.end_if_asked()
        claim = study.claim()
        if claim is None:
            trials = counting(study.trials())
            if not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in trials):
                return done
            time.sleep(poll)
            continue
        again = f", attempt {claim.attempt}" if claim.attempt > 1 else ""
        said = ", ".join(f"{name} {_short(value)}" for name, value in claim.params.items())
        report(f"trial {claim.number}: {said}{again}")
        with study.holding(claim):
            _run(study, claim, run, report, done)
        if done.failed >= MAX_FAILURES:
            _check_failures(study)


def _run(
    study: SweepStudy, claim: Claim, run: Run, report: Callable[[str], None], done: Done
) -> None:
    try:
        outcome = run(claim, lambda step, value: study.see(claim, step, value))
    except execution.Stopped as stopped:
        study.prune(claim, stopped.facts if isinstance(stopped, Pruned) else {})
        done.pruned += 1
        report(f"trial {claim.number}: pruned")
    except (Interrupted, KeyboardInterrupt):
        study.give_back(claim)
        raise
    except Exception as error:  # a plugin may raise anything
        known = isinstance(error, (UserError, RunFailure))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        study.fail(claim, reason)
        done.failed += 1
        report(f"trial {claim.number} FAILED: {reason}")
    else:
        study.finish(claim, outcome.values, outcome.facts)
        done.finished += 1
        report(f"trial {claim.number}: {' '.join(f'{value:.4g}' for value in outcome.values)}")


def _check_failures(study: SweepStudy) -> None:
    """End a sweep of which nothing works.

    Raises:
        RunFailure: several trials failed and none did not.
    """
    trials = counting(study.trials())
    failed = [t for t in trials if t.state == TrialState.FAIL]
    good = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(failed) >= MAX_FAILURES and not good:
        reason = str(failed[-1].user_attrs.get("reason", "no reason")).rstrip(".")
        raise RunFailure(
            f"The first {len(failed)} trials of '{study.name}' failed ({reason}); repair this and "
            "begin anew with --fork."
        )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
