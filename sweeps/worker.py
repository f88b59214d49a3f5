"""Worker of a sweep: run trials of a study until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from optuna.trial import TrialState

from glua_bench.errors import RunFailure, UserError, cause
from glua_bench.runs import execution, interruption
from glua_bench.runs.interruption import Interrupted
from glua_bench.runs.sealed.process import Killed
from glua_bench.sweeps.progress import shown
from glua_bench.sweeps.study import Claim, SweepStudy, counting
from glua_bench.sweeps.trial import Outcome, Pruned, See

POLL_SECONDS = 1.0  # between checks of trials that other workers run
MAX_FAILURES = 3  # a sweep ends if this many trials fail and none succeeds

Run = Callable[[Claim, See], Outcome]


@dataclass
class Done:
    """Trials of one worker.

    Attributes:
        finished: number of trials with values.
        pruned: number of pruned trials.
        failed: number of failed trials.
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
    """Run trials until the study is finished.

    Args:
        study: the study, shared with other workers.
        run: executes a trial; it raises `Stopped` to prune it.
        report: receives a line per trial.
        poll: seconds between checks if only other workers' trials are left.

    Returns:
        The numbers of this worker's trials.

    Raises:
        RunFailure: all of the first trials failed, or the storage stays unavailable.
        Interrupted, KeyboardInterrupt: the process was stopped; its trial is offered to others.
        Killed: a process that trains was killed; the trial is taken up again.
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
        report(f"trial {claim.number}: {shown(claim.params)}{again}")
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
    except Killed:
        raise  # as if this process was killed: another one takes up the trial, up to a limit
    except Exception as error:  # a plugin may raise anything
        known = isinstance(error, (UserError, RunFailure))
        reason = str(error) if known else cause(error) or f"{type(error).__name__}: {error}"
        study.fail(claim, reason)
        done.failed += 1
        report(f"trial {claim.number} FAILED: {reason}")
    else:
        study.finish(claim, outcome.values, outcome.facts)
        done.finished += 1
        report(f"trial {claim.number}: {' '.join(f'{value:.4g}' for value in outcome.values)}")


def _check_failures(study: SweepStudy) -> None:
    """Raise if several trials failed and none succeeded."""
    trials = counting(study.trials())
    failed = [t for t in trials if t.state == TrialState.FAIL]
    good = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(failed) >= MAX_FAILURES and not good:
        reason = str(failed[-1].user_attrs.get("reason", "no reason")).rstrip(".")
        raise RunFailure(
            f"The first {len(failed)} trials of '{study.name}' failed ({reason}); fix this and "
            "start again with --fork."
        )
