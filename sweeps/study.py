"""The study of a sweep: which trials there are, who is at which, and what is tried next.

Optuna keeps the trials, in a journal file or a database. What is added here is what many workers
need: a budget that is never exceeded, trials of dead workers that are taken up again and counted
once, and a database that may be away for a while.

Two things tell whether a trial's worker lives. It holds a lock file, which the kernel takes from
it when it ends; and where the storage is a database, it sends a heartbeat, which also tells of
workers on other machines.
"""

from __future__ import annotations

import json
import os
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

from glua_bench.errors import ConfigError, RunFailure, first_line, without_password
from glua_bench.files import drop_torn_line, exclusive, try_lock
from glua_bench.paths import SWEEPS, name_fault
from glua_bench.sweeps.definition import Definition, Parameter

optuna.logging.set_verbosity(optuna.logging.WARNING)

ATTEMPTS = 3  # at a trial whose worker is killed, before it counts as failed
HEARTBEAT_SECONDS, GRACE_SECONDS = 20, 120
PATIENCE_SECONDS = 600.0  # with a database that does not answer
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph")
Value = TypeVar("Value")


def folder_of(runs_root: Path, name: str) -> Path:
    """Where a sweep keeps its own files, below the directory of all runs.

    Raises:
        ConfigError: the name leads elsewhere.
    """
    fault = name_fault(name)
    if fault:
        raise ConfigError(
            f"The sweep's name '{name}' {fault}, so it cannot name a directory: choose another, "
            "such as loss_weights."
        )
    return runs_root / SWEEPS / name


# -- storages -------------------------------------------------------------------------------------


def journal(folder: Path) -> str:
    """The default storage of a sweep: a journal file in its directory."""
    return str(folder / "journal.log")


def open_storage(url: str, workers: int = 1, begun: bool = False) -> optuna.storages.BaseStorage:
    """A journal file by its path, or a database by its URL.

    Args:
        url: as Optuna takes it, e.g. "postgresql://user@host/base"; else a path.
        workers: how many will use it at once, as far as is known.
        begun: whether it served before, so that one that does not answer is away and not misnamed.

    Raises:
        ConfigError: the storage cannot serve so many, lies on a network file system that cannot
            lock it, lacks its driver, or cannot be reached.
        sqlalchemy.exc.OperationalError: it has begun and does not answer.
    """
    if "://" not in url:
        path = Path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path), lock_obj=_JournalLock(path))  # type: ignore[arg-type]
        return optuna.storages.JournalStorage(backend)
    if url.startswith("postgresql://"):  # which may be any driver; ours is this one
        url = url.replace("://", "+psycopg://", 1)
    if url.startswith("sqlite"):
        path = Path(url.partition("///")[2])
        if workers > 1:
            raise ConfigError(
                f"--storage {url}: SQLite is damaged or stalls with {workers} workers; leave "
                "--storage out (a journal file), or give a PostgreSQL URL."
            )
        kind = file_system(path.parent)
        if kind in NETWORK_FILE_SYSTEMS:
            raise ConfigError(
                f"--storage {url} lies on a network file system ({kind}), where SQLite loses "
                "trials; give a PostgreSQL URL, or a path on a local disk."
            )
    shown = without_password(url)
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
    """The right to write to a journal; the kernel takes it back from a killed process at once.

    Optuna's own locks are files that a killed process leaves behind, and others wait for their
    grace period. Whoever gets the right also removes half a line that a killed writer left, since
    the next line would be lost together with it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._held = ExitStack()

    def acquire(self) -> bool:
        """Wait for the right to write."""
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._journal.with_suffix(".lock"), option="--runs"))
            drop_torn_line(self._journal)
            self._held = stack.pop_all()
        return True

    def release(self) -> None:
        """Give the right back."""
        self._held.close()


def file_system(path: Path) -> str:
    """The type of the file system that holds a path, as Linux names it; "" where unknown."""
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
    """What a storage raises whose server does not answer."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return OperationalError, InterfaceError, optuna.exceptions.StorageInternalError


def retry_while_unavailable(
    work: Callable[[], Value],
    report: Callable[[str], None] = lambda line: None,
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Value:
    """Do something with a storage; while its server is away, wait for it.

    Args:
        work: what is done; it may be done again.
        report: told once that the server is away, and once that it is back.
        patience: seconds to wait at most.
        sleep: waits.

    Raises:
        RunFailure: the server stayed away.
    """
    began, pause, away = time.monotonic(), 0.5, False
    while True:
        try:
            value = work()
        except away_errors() as error:
            if time.monotonic() - began > patience:
                raise RunFailure(
                    f"The storage did not answer for {patience:.0f} s ({first_line(error)}); start "
                    "it and give the same command again, nothing is lost."
                ) from error
            if not away:
                report(f"the storage does not answer ({first_line(error)}); waiting for it")
            away = True
            sleep(pause)
            pause = min(2 * pause, 15.0)
        else:
            if away:
                report("the storage answers again")
            return value


# -- the study ------------------------------------------------------------------------------------


@dataclass
class Claim:
    """A trial that this process is at.

    Args:
        trial: Optuna's handle.
        number: of the trial.
        params: setting → value.
        attempt: 1, or more where workers were killed at it.
    """

    trial: optuna.Trial
    number: int
    params: Mapping[str, Any]
    attempt: int
    _lock: ExitStack = field(default_factory=ExitStack, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)


class SweepStudy:
    """A study with its storage, shared by any number of processes.

    Args:
        definition: what is searched.
        runs_root: the directory of all runs, which all workers see.
        storage: path or URL; None takes the journal in the sweep's directory.
        name: of the study; None takes the definition's.
        report: receives what the user should know.
        workers: how many will use the storage, as far as is known.
        begun: whether the study is known to be there; a server that is away is then waited for.
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
        self.patience = PATIENCE_SECONDS  # with questions; what is told waits as long in any case
        self.name = name or definition.name
        self.folder = folder_of(runs_root, self.name)
        self.url = storage or journal(self.folder)
        self._host = socket.gethostname()
        self._asking = partial(exclusive, self.folder / "ask.lock", option="--runs")
        with self._asking():  # of several, one makes the tables
            self.storage = retry_while_unavailable(
                lambda: open_storage(self.url, workers, begun), report
            )
            self.study = retry_while_unavailable(self._open, report)

    def _open(self) -> optuna.Study:
        kinds = optuna.study.StudyDirection
        directions = [kinds.MAXIMIZE, *(kinds.MINIMIZE for _ in self.definition.objectives[1:])]
        return optuna.create_study(
            study_name=self.name,
            storage=self.storage,
            sampler=make_sampler(self.definition, 0),
            pruner=make_pruner(self.definition),
            directions=directions,
            load_if_exists=True,
        )

    # -- what the study is ------------------------------------------------------------------------

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Write down what the study means, the first time; later it must be the same.

        Args:
            facts: JSON-able, e.g. the definition's meaning and the version of the code.

        Raises:
            ConfigError: the study began with other facts; the message says which.
        """
        facts = json.loads(json.dumps(facts))
        known = retry_while_unavailable(lambda: self.study.user_attrs.get("facts"), self.report)
        if known is None:
            retry_while_unavailable(lambda: self.study.set_user_attr("facts", facts), self.report)
            return
        changed = differences(known, facts)
        if changed:
            raise ConfigError(
                f"The study '{self.name}' began otherwise: {'; '.join(changed)}; change it back, "
                "or give --fork to begin a new study beside it."
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What `remember` wrote; empty for a new study."""
        known = retry_while_unavailable(
            lambda: self.study.user_attrs.get("facts"), self.report, self.patience
        )
        return dict(known or {})

    def trials(self) -> list[FrozenTrial]:
        """All trials, in their order."""
        return retry_while_unavailable(
            lambda: self.study.get_trials(deepcopy=False), self.report, self.patience
        )

    @property
    def ended(self) -> bool:
        """Whether all trials that the budget allows have ended."""
        counted = counting(self.trials())
        enough = len(counted) >= self.definition.trials
        return enough and all(trial.state.is_finished() for trial in counted)

    # -- taking a trial ---------------------------------------------------------------------------

    def claim(self) -> Claim | None:
        """The next trial of this process; None where none may begin now.

        What dead workers left behind is offered again first.
        """
        with self._asking():
            # As a whole: where the answer to a question was lost, its trial is found as dead.
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
        # By a seed for each trial, two workers never draw the same, and whoever draws, the
        # sequence is the same.
        self.study.sampler = make_sampler(self.definition, len(trials))
        with warnings.catch_warnings():
            # Of heartbeats without `optimize`: `_beat` sends them.
            warnings.filterwarnings("ignore", "Heartbeat of storage")
            trial = self.study.ask({p.name: distribution(p) for p in self.definition.space})
        if isinstance(self.storage, optuna.storages.RDBStorage):
            # Without a first heartbeat a trial never becomes stale; and without a host nobody
            # asks for one.
            self.storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("process", os.getpid())
        trial.set_user_attr("host", self._host)
        return trial

    def _reclaim(self) -> list[FrozenTrial]:
        """Fail trials whose workers are dead, and offer them again; all trials then."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {t.user_attrs.get("retry_of") for t in trials}
        changed = False
        for trial in trials:
            if trial.state != TrialState.RUNNING or self._alive(trial):
                continue
            # Its worker may have told its value and let go since the trials were read.
            if self.storage.get_trial(trial._trial_id).state != TrialState.RUNNING:
                continue
            attempt = int(trial.user_attrs.get("attempt", 1))
            # The offer comes first: a process that dies in between is taken up here as well.
            if trial.number not in retried and attempt < ATTEMPTS and _drawn(trial):
                self._offer(trial, attempt + 1)
            self._end(trial, "its worker was killed")
            changed = True
        return self.study.get_trials(deepcopy=False) if changed else trials

    def _offer(self, trial: FrozenTrial, attempt: int) -> None:
        own = {"attempt": attempt, "retry_of": trial.number}
        self.study.enqueue_trial(_drawn(trial), user_attrs=own)

    def _end(self, trial: FrozenTrial, reason: str) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    # -- who lives --------------------------------------------------------------------------------

    def _lock_file(self, number: int) -> Path:
        return self.folder / "trials" / f"{number}.lock"

    def _alive(self, trial: FrozenTrial) -> bool:
        """Whether somebody is at a running trial."""
        here = trial.user_attrs.get("host", self._host) == self._host
        if isinstance(self.storage, optuna.storages.RDBStorage) and not here:
            stale = self.storage._get_stale_trial_ids(self.study._study_id)
            return trial._trial_id not in stale
        with try_lock(self._lock_file(trial.number), "--runs") as free:
            return not free

    def _beat(self, claim: Claim) -> None:
        """Tell a database again and again that this process lives."""
        storage = self.storage
        if not isinstance(storage, optuna.storages.RDBStorage):
            return

        def beat() -> None:
            while True:
                with suppress(Exception):  # a server that is away is not this thread's business
                    storage.record_heartbeat(claim.trial._trial_id)
                if claim._stop.wait(HEARTBEAT_SECONDS):
                    return

        threading.Thread(target=beat, daemon=True, name="heartbeat").start()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Keep the trial until the work on it has ended, however it ends."""
        try:
            yield
        finally:
            claim._stop.set()
            claim._lock.close()

    def note(self, claim: Claim, facts: Mapping[str, Any]) -> None:
        """Write down what is known of a trial while it runs."""

        retry_while_unavailable(lambda: _write(claim, facts), self.report)

    # -- ending a trial ---------------------------------------------------------------------------

    def finish(self, claim: Claim, values: tuple[float, ...], facts: Mapping[str, Any]) -> None:
        """Record the values of a trial, and what else is known of it."""
        self._tell(claim, facts, values=list(values))

    def prune(self, claim: Claim, facts: Mapping[str, Any]) -> None:
        """Record that a trial was ended early."""
        self._tell(claim, facts, state=TrialState.PRUNED)

    def fail(self, claim: Claim, reason: str) -> None:
        """Record why a trial has no value; it is not tried again."""
        self._tell(claim, {"reason": reason}, state=TrialState.FAIL)

    def give_back(self, claim: Claim) -> None:
        """Offer a trial again that this process cannot finish; it does not count as an attempt."""

        def give() -> None:
            known = {t.number: t for t in self.study.get_trials(deepcopy=False)}
            trial = known[claim.number]
            if trial.state == TrialState.RUNNING:
                self._offer(trial, claim.attempt)
                self._end(trial, "its worker was asked to end")

        with self._asking():
            retry_while_unavailable(give, self.report, patience=30)

    def _tell(self, claim: Claim, facts: Mapping[str, Any], **told: Any) -> None:
        if self.definition.sampler == "grid":
            # After the last cell Optuna's grid stops the study, which raises outside `optimize`.
            self.study.sampler = optuna.samplers.RandomSampler()

        def tell() -> None:
            # Done again after a break, the first telling may have arrived; and a worker that was
            # thought dead finds its trial ended. Neither is an error.
            with suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
                _write(claim, facts)
                self.study.tell(claim.trial, **told)

        retry_while_unavailable(tell, self.report)

    def see(self, claim: Claim, step: int, value: float) -> bool:
        """Record an intermediate value; whether the trial should end.

        Args:
            claim: the trial.
            step: grows within the trial.
            value: larger is better.
        """

        def report() -> bool:
            claim.trial.report(value, step)
            return bool(claim.trial.should_prune())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a value that a resumed trial reports again
            return retry_while_unavailable(report, self.report)


def _write(claim: Claim, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        claim.trial.set_user_attr(name, value)


def counting(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that the budget counts.

    Left out are those that a later trial repeats, and those whose worker was killed before they
    had a parameter.
    """
    repeated = {t.user_attrs.get("retry_of") for t in trials}
    return [
        t for t in trials if t.number not in repeated and (t.state != TrialState.FAIL or _drawn(t))
    ]


def _drawn(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters, also where its worker was killed before it had taken them."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two JSON values, in words.

    Example:
        >>> differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}})
        ['b.c was [1] and is [2]']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            found += differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{name} was {json.dumps(old)} and is {json.dumps(new)}"]


def free_name(runs_root: Path, name: str) -> str:
    """NAME-2, NAME-3, …: the first that no sweep has yet."""
    number = 2
    while folder_of(runs_root, f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


# -- Optuna's parts -------------------------------------------------------------------------------


def distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """The values of a parameter as Optuna says it."""
    if parameter.choices:
        return optuna.distributions.CategoricalDistribution(parameter.choices)
    if parameter.whole:
        return optuna.distributions.IntDistribution(
            int(parameter.low),
            int(parameter.high),
            log=parameter.log,
            step=int(parameter.step) or 1,
        )
    return optuna.distributions.FloatDistribution(
        parameter.low, parameter.high, log=parameter.log, step=parameter.step or None
    )


def make_sampler(definition: Definition, drawn: int) -> optuna.samplers.BaseSampler:
    """The definition's sampler for one draw.

    Args:
        definition: names it, and its seed.
        drawn: trials that are there already, which the seed depends on.
    """
    seed = definition.seed * 100_003 + drawn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if definition.sampler == "grid":
            values = {p.name: list(p.values()) for p in definition.space}
            return optuna.samplers.GridSampler(values, seed=definition.seed)
        if definition.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if definition.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        if definition.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        # What other workers are at counts as poor, so that they do not all try the same place.
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def make_pruner(definition: Definition) -> optuna.pruners.BasePruner:
    """The definition's pruner."""
    if definition.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if definition.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    if definition.pruner == "wilcoxon":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.pruners.WilcoxonPruner(p_threshold=0.1)
    return optuna.pruners.NopPruner()
