"""The study of a sweep: its trials, who works on them, and what is tried next.

Optuna stores the trials in a journal file or a database. This module adds what several workers
need: a budget that is never exceeded, trials of dead workers that are resumed and counted once, and
tolerance of a database that is unavailable for a while.

A worker is alive while it holds the trial's lock file, which the kernel releases when the process
ends. With a database it also sends heartbeats, which cover workers on other machines.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from glua_bench.errors import ConfigError, RunFailure, escaped_url, first_line, without_password
from glua_bench.files import drop_torn_line, exclusive, try_lock
from glua_bench.paths import SWEEPS, name_fault
from glua_bench.sweeps.definition import Definition, Parameter

optuna.logging.set_verbosity(optuna.logging.WARNING)

ATTEMPTS = 3  # at a trial whose worker is killed, before it is lost
LOST = "lost"  # attribute of such a trial, whose state is FAIL
HEARTBEAT_SECONDS, GRACE_SECONDS = 20, 120
PATIENCE_SECONDS = 600.0  # with an unavailable database
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph")
Value = TypeVar("Value")


def folder_of(runs_root: Path, name: str) -> Path:
    """Return a sweep's own directory below the directory of all runs.

    Raises:
        ConfigError: the name is not a valid directory name.
    """
    fault = name_fault(name)
    if fault:
        raise ConfigError(
            f"The sweep's name '{name}' {fault}, so it cannot name a directory: choose another, "
            "such as loss_weights."
        )
    return runs_root / SWEEPS / name


# -- storages -------------------------------------------------------------------------------------


def open_storage(url: str, workers: int = 1, begun: bool = False) -> optuna.storages.BaseStorage:
    """Open a journal file by its path, or a database by its URL.

    Args:
        url: as for Optuna, e.g. "postgresql://user@host/base"; else a path.
        workers: expected number of concurrent users.
        begun: whether the storage worked before, so that connection errors mean a server that is
            down rather than a wrong URL.

    Raises:
        ConfigError: the storage does not support so many workers, lies on a network file system
            without locks, lacks its driver, or cannot be reached.
        sqlalchemy.exc.OperationalError: `begun`, and the storage does not respond.
    """
    shown = without_password(url, whole=True)
    if "://" not in url:
        if shown != url or re.match(r"[^/\\]+:.*@", url):  # would become the name of a file
            raise ConfigError(
                "--storage has a user or a password but is no URL; write "
                "postgresql://USER:PASSWORD@HOST/BASE."
            )
        path = Path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path), lock_obj=_JournalLock(path))  # type: ignore[arg-type]
        return optuna.storages.JournalStorage(backend)
    url = escaped_url(url)
    if url.startswith("postgresql://"):  # any driver is allowed; psycopg is installed
        url = url.replace("://", "+psycopg://", 1)
    if url.startswith("sqlite"):
        path = Path(url.partition("///")[2])
        if workers > 1:
            raise ConfigError(
                f"--storage {shown}: SQLite is damaged or stalls with {workers} workers; omit "
                "--storage (a journal file), or give a PostgreSQL URL."
            )
        kind = file_system(path.parent)
        if kind in NETWORK_FILE_SYSTEMS:
            raise ConfigError(
                f"--storage {shown} lies on a network file system ({kind}), where SQLite loses "
                "trials; give a PostgreSQL URL, or a path on a local disk."
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        except ImportError as error:
            raise ConfigError(
                f"--storage {shown} needs a driver that is not installed ({first_line(error)}); "
                "for PostgreSQL: pip install 'glua-bench[cluster]'."
            ) from error
        except Exception as error:  # SQLAlchemy and its drivers raise many types
            if begun and isinstance(error, away_errors()):
                raise
            raise ConfigError(
                f"--storage {shown} cannot be opened ({first_line(error)}); check the server, the "
                "name of the database and the password."
            ) from error


class _JournalLock:
    """Lock of a journal, which the kernel releases at once when its holder is killed.

    Optuna's own locks are files that a killed process leaves behind, so that others wait for a
    grace period. Acquiring this lock also removes a torn last line, which would damage the next.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._held = ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock."""
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._journal.with_suffix(".lock"), option="--runs"))
            drop_torn_line(self._journal)
            self._held = stack.pop_all()
        return True

    def release(self) -> None:
        """Release the lock."""
        self._held.close()


def file_system(path: Path) -> str:
    """Return the type of the file system of a path, as Linux names it; "" if unknown."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    place, best, kind = os.path.realpath(path), "", ""
    for line in mounts:
        _, point, found, *_ = line.split(" ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind


def away_errors() -> tuple[type[Exception], ...]:
    """Return the errors that a storage raises if its server does not respond."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return OperationalError, InterfaceError, optuna.exceptions.StorageInternalError


def retry_while_unavailable(
    work: Callable[[], Value],
    report: Callable[[str], None] = lambda line: None,
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Value:
    """Call a function that uses a storage, and retry while the server is unavailable.

    Args:
        work: the function, which may be called repeatedly.
        report: receives a line when the server becomes unavailable, and one when it responds again.
        patience: maximum time to wait in seconds.
        sleep: waits.

    Raises:
        RunFailure: the server stayed unavailable.
    """
    began, pause, away = time.monotonic(), 0.5, False
    while True:
        try:
            value = work()
        except away_errors() as error:
            if time.monotonic() - began > patience:
                raise RunFailure(
                    f"The storage did not respond for {patience:.0f} s ({first_line(error)}); "
                    "start it and repeat the command, nothing is lost."
                ) from error
            if not away:
                report(f"the storage does not respond ({first_line(error)}); waiting")
            away = True
            sleep(pause)
            pause = min(2 * pause, 15.0)
        else:
            if away:
                report("the storage responds again")
            return value


# -- the study ------------------------------------------------------------------------------------


@dataclass
class Claim:
    """A trial that this process works on.

    Attributes:
        trial: Optuna's handle.
        number: number of the trial.
        params: setting → value.
        attempt: 1, or more if earlier workers were killed.
    """

    trial: optuna.Trial
    number: int
    params: Mapping[str, Any]
    attempt: int
    _lock: ExitStack = field(default_factory=ExitStack, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)


class SweepStudy:
    """A study and its storage, shared by any number of processes.

    Args:
        definition: the sweep.
        runs_root: directory of all runs, visible to all workers.
        storage: path or URL; None uses the journal in the sweep's directory.
        name: name of the study; None uses the definition's.
        report: receives messages for the user.
        workers: expected number of workers.
        begun: whether the study is known to exist, so that an unavailable server is waited for.
    """

    def __init__(
        self,
        definition: Definition,
        runs_root: Path,
        storage: str | None = None,
        name: str | None = None,
        report: Callable[[str], None] = lambda line: None,
        workers: int = 1,
        begun: bool = False,
    ) -> None:
        self.definition, self.report = definition, report
        self.patience = PATIENCE_SECONDS  # for reads; writes always wait as long
        self.name = name or definition.name
        self.folder = folder_of(runs_root, self.name)
        self.url = storage or str(self.folder / "journal.log")
        self._host = socket.gethostname()
        self._asking = partial(exclusive, self.folder / "ask.lock", option="--runs")
        with self._asking():  # only one process creates the tables
            self.storage = retry_while_unavailable(
                lambda: open_storage(self.url, workers, begun), report
            )
            kinds = optuna.study.StudyDirection
            self.study = retry_while_unavailable(
                lambda: optuna.create_study(
                    study_name=self.name,
                    storage=self.storage,
                    sampler=make_sampler(definition, 0),
                    pruner=make_pruner(definition),
                    directions=[kinds.MAXIMIZE, *[kinds.MINIMIZE] * len(definition.objectives[1:])],
                    load_if_exists=True,
                ),
                report,
            )

    # -- identity of the study --------------------------------------------------------------------

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Store what identifies the study and name its values; later calls must give the same.

        Args:
            facts: JSON-able, e.g. the definition's meaning and the version of the code.

        Raises:
            ConfigError: the study was started with other facts; the message gives the changes.
        """
        facts = json.loads(json.dumps(facts))
        known = retry_while_unavailable(lambda: self.study.user_attrs.get("facts"), self.report)
        if known is None:
            retry_while_unavailable(lambda: self.study.set_user_attr("facts", facts), self.report)
        elif changed := differences(known, facts):
            raise ConfigError(
                f"The study '{self.name}' has changed: {'; '.join(changed)}; undo the change, or "
                "pass --fork to start a new study."
            )
        retry_while_unavailable(self._name_values, self.report)

    def _name_values(self) -> None:
        """Name the trials' values by their objectives, also in a study of an earlier version."""
        names = list(self.definition.objectives)
        if self.study.metric_names != names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names(names)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts stored by `remember`; empty for a new study."""
        known = retry_while_unavailable(
            lambda: self.study.user_attrs.get("facts"), self.report, self.patience
        )
        return dict(known or {})

    def trials(self) -> list[FrozenTrial]:
        """Return all trials in order."""
        return retry_while_unavailable(
            lambda: self.study.get_trials(deepcopy=False), self.report, self.patience
        )

    @property
    def ended(self) -> bool:
        """Whether the budget is used up and all trials have ended."""
        counted = counting(self.trials())
        enough = len(counted) >= self.definition.trials
        return enough and all(trial.state.is_finished() for trial in counted)

    # -- claiming a trial -------------------------------------------------------------------------

    def claim(self) -> Claim | None:
        """Return the next trial, or None; trials of dead workers come first."""
        with self._asking():
            # Retried as a whole: if the storage's answer was lost, the trial is found as dead.
            trial = retry_while_unavailable(self._take, self.report)
            if trial is None:
                return None
            attempt = int(trial.user_attrs.get("attempt", 1))
            claim = Claim(trial, trial.number, trial.params, attempt)
            claim._lock.enter_context(exclusive(self._lock_file(trial.number), option="--runs"))
        self._beat(claim)
        return claim

    def _take(self) -> optuna.Trial | None:
        trials = self._reclaim()
        counted = counting(trials)
        waiting = any(t.state == TrialState.WAITING for t in counted)
        if not waiting and len(counted) >= self.definition.trials:
            return None
        # A seed per trial: workers never draw the same values, and the sequence does not depend on
        # who draws.
        self.study.sampler = make_sampler(self.definition, len(trials))
        with warnings.catch_warnings():
            # Heartbeats without `optimize`: `_beat` sends them.
            warnings.filterwarnings("ignore", "Heartbeat of storage")
            trial = self.study.ask({p.name: distribution(p) for p in self.definition.space})
        if isinstance(self.storage, optuna.storages.RDBStorage):
            # A trial without a first heartbeat never becomes stale, and heartbeats are only
            # checked for trials with a host.
            self.storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("process", os.getpid())
        trial.set_user_attr("host", self._host)
        return trial

    def _reclaim(self) -> list[FrozenTrial]:
        """Fail trials of dead workers and offer them again; return all trials."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {t.user_attrs.get("retry_of") for t in trials}
        changed = False
        for trial in trials:
            if trial.state != TrialState.RUNNING or self._alive(trial):
                continue
            # The worker may have finished the trial since the trials were read.
            if self.storage.get_trial(trial._trial_id).state != TrialState.RUNNING:
                continue
            attempt = int(trial.user_attrs.get("attempt", 1))
            # Offer first, so that the trial is not lost if this process dies in between.
            reason = "its worker was killed"
            if attempt >= ATTEMPTS and _drawn(trial):
                reason = f"its workers were killed {attempt} times, most likely for lack of memory"
                self.storage.set_trial_user_attr(trial._trial_id, LOST, True)
            elif trial.number not in retried and _drawn(trial):
                self._offer(trial, attempt + 1)
            self._end(trial, reason)
            changed = True
        return self.study.get_trials(deepcopy=False) if changed else trials

    def _offer(self, trial: FrozenTrial, attempt: int) -> None:
        own = {"attempt": attempt, "retry_of": trial.number}
        self.study.enqueue_trial(_drawn(trial), user_attrs=own)

    def _end(self, trial: FrozenTrial, reason: str) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    # -- liveness ---------------------------------------------------------------------------------

    def _lock_file(self, number: int) -> Path:
        return self.folder / "trials" / f"{number}.lock"

    def _alive(self, trial: FrozenTrial) -> bool:
        """Return True if a worker holds a running trial."""
        here = trial.user_attrs.get("host", self._host) == self._host
        if isinstance(self.storage, optuna.storages.RDBStorage) and not here:
            stale = self.storage._get_stale_trial_ids(self.study._study_id)
            return trial._trial_id not in stale
        with try_lock(self._lock_file(trial.number), "--runs") as free:
            return not free

    def _beat(self, claim: Claim) -> None:
        """Send heartbeats to a database until the trial is released."""
        storage = self.storage
        if not isinstance(storage, optuna.storages.RDBStorage):
            return

        def beat() -> None:
            while True:
                with suppress(Exception):  # this thread need not handle an unavailable server
                    storage.record_heartbeat(claim.trial._trial_id)
                if claim._stop.wait(HEARTBEAT_SECONDS):
                    return

        threading.Thread(target=beat, daemon=True, name="heartbeat").start()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Release the trial at the end of the block, also after an error."""
        try:
            yield
        finally:
            claim._stop.set()
            claim._lock.close()

    # -- results of a trial -----------------------------------------------------------------------

    def note(self, claim: Claim, facts: Mapping[str, Any]) -> None:
        """Store facts of a running trial."""
        retry_while_unavailable(lambda: _write(claim, facts), self.report)

    def finish(self, claim: Claim, values: tuple[float, ...], facts: Mapping[str, Any]) -> None:
        """Store the values and facts of a finished trial."""
        self._tell(claim, facts, values=list(values))

    def prune(self, claim: Claim, facts: Mapping[str, Any]) -> None:
        """Mark a trial as pruned."""
        self._tell(claim, facts, state=TrialState.PRUNED)

    def fail(self, claim: Claim, reason: str) -> None:
        """Mark a trial as failed; it is not retried."""
        self._tell(claim, {"reason": without_password(reason)}, state=TrialState.FAIL)

    def give_back(self, claim: Claim) -> None:
        """Offer an unfinished trial again; this does not count as an attempt."""

        def give() -> None:
            known = {t.number: t for t in self.study.get_trials(deepcopy=False)}
            trial = known[claim.number]
            if trial.state == TrialState.RUNNING:
                self._offer(trial, claim.attempt)
                self._end(trial, "its worker was asked to end")

        with self._asking():
            retry_while_unavailable(give, self.report, patience=30)

    def _tell(self, claim: Claim, facts: Mapping[str, Any], **result: Any) -> None:
        if self.definition.sampler == "grid":
            # After the last cell Optuna's grid stops the study, which raises outside `optimize`.
            self.study.sampler = optuna.samplers.RandomSampler()

        def tell() -> None:
            # Not an error: the first attempt arrived although its answer was lost, or the worker
            # was thought dead and its trial has ended.
            with suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
                _write(claim, facts)
                self.study.tell(claim.trial, **result)

        retry_while_unavailable(tell, self.report)

    def see(self, claim: Claim, step: int, value: float) -> bool:
        """Store an intermediate value, and return True if the trial should be pruned.

        Args:
            claim: the trial.
            step: increases within the trial.
            value: larger is better.
        """

        def report() -> bool:
            claim.trial.report(value, step)
            return bool(claim.trial.should_prune())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed trial reports values again
            return retry_while_unavailable(report, self.report)


def _write(claim: Claim, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        claim.trial.set_user_attr(name, value)


def counting(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that count towards the budget.

    Excluded are trials that a later one repeats, and those killed before they had parameters.
    """
    repeated = {t.user_attrs.get("retry_of") for t in trials}
    return [
        t for t in trials if t.number not in repeated and (t.state != TrialState.FAIL or _drawn(t))
    ]


def _drawn(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's parameters, also if its worker was killed before it used them."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Describe the changes between two JSON values.

    Example:
        >>> differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}})
        ['b.c was [1] and is [2]']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{name} was {json.dumps(old)} and is {json.dumps(new)}"]


def free_name(runs_root: Path, name: str) -> str:
    """Return the first of NAME-2, NAME-3, … that no sweep has."""
    number = 2
    while folder_of(runs_root, f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


# -- Optuna's parts -------------------------------------------------------------------------------


def distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """Return Optuna's distribution for a parameter."""
    kinds = optuna.distributions
    low, high, log = parameter.low, parameter.high, parameter.log
    if parameter.choices:
        return kinds.CategoricalDistribution(parameter.choices)
    if parameter.whole:
        step = int(parameter.step) or 1
        return kinds.IntDistribution(int(low), int(high), log=log, step=step)
    return kinds.FloatDistribution(low, high, log=log, step=parameter.step or None)


def make_sampler(definition: Definition, drawn: int) -> optuna.samplers.BaseSampler:
    """Return the sampler for one draw.

    Args:
        definition: the sweep.
        drawn: number of existing trials, which the seed depends on.
    """
    seed = definition.seed * 100_003 + drawn
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if definition.sampler == "grid":
            values = {p.name: list(p.values()) for p in definition.space}
            return samplers.GridSampler(values, seed=definition.seed)
        if definition.sampler == "tpe":
            # Running trials count as poor, so that workers spread.
            return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        kinds: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
            "random": samplers.RandomSampler,
            "cmaes": samplers.CmaEsSampler,
            "nsga2": samplers.NSGAIISampler,
        }
        return kinds[definition.sampler](seed=seed)


def make_pruner(definition: Definition) -> optuna.pruners.BasePruner:
    """Return the pruner of a sweep."""
    pruners = optuna.pruners
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if definition.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=4)
        if definition.pruner == "hyperband":
            return pruners.HyperbandPruner()
        if definition.pruner == "wilcoxon":
            return pruners.WilcoxonPruner(p_threshold=0.1)
    return pruners.NopPruner()
