"""The run matrix: which runs a comparison or an ablation needs, and their execution.

Enumeration (`comparison`, `ablation`) makes requests and runs nothing. Execution skips what is
done, and starts each other run as a process of its own, several at once if asked. Two processes
on the same matrix share it: a run is claimed by a file lock, which the kernel gives back when its
holder ends, however it ends; whoever claims a run that another left behind resumes it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from glua_bench import runs
from glua_bench.config import LOWER, UPPER, assignment, build_settings, digest, parse_overrides
from glua_bench.console import duration
from glua_bench.errors import ConfigError, RunFailure, complaint
from glua_bench.evaluation import mean_score
from glua_bench.files import try_lock, write_text
from glua_bench.method import Method
from glua_bench.metrics import PRIMARY
from glua_bench.registry import Registry
from glua_bench.request import RunOptions, RunRequest
from glua_bench.runs import PlannedRun
from glua_bench.task import Dataset, fold_name
from glua_bench.tracking import Comparison, RunDirectory

POLL_SECONDS = 1.0  # between looks at runs that another process executes
ATTEMPTS = 2  # at a run whose process ends without a reason, before it counts as failed
PHOTOMETRIC = "+photometric"
CLAIMS = ".claims"  # below the directory of all runs: locks and requests of runs


@dataclass(frozen=True)
class Cell:
    """One run of a matrix.

    Attributes:
        entry: name of its row in tables, e.g. "glua" or "glua + photometric".
        task: name of its column group, e.g. "phantom mr-ct".
        request: what to run.
    """

    entry: str
    task: str
    request: RunRequest


# -- enumeration ---------------------------------------------------------------------------------


def comparison(
    methods: Sequence[str],
    datasets: Sequence[str],
    directions: Sequence[str],
    seeds: int,
    base: RunOptions,
    bounds: bool = True,
    repeats: int = 0,
) -> list[Cell]:
    """Every method on every direction of every dataset with every seed.

    Args:
        methods: names; `NAME+photometric` asks for that augmentation, `supervised` is the
            upper bound.
        datasets: names.
        directions: "source-target"; () is each dataset's first one, ("all",) all of them.
        seeds: how many, from 0.
        base: everything else that the runs share.
        bounds: begin with `source_only` and `supervised`, between which the gap lies.
        repeats: further trainings of seed 0 that start from other last bits.

    Returns:
        Seed by seed, so that whole comparisons are complete early, then the repeats.

    Raises:
        UserError: a name or direction is unknown, or a name is given twice.
    """
    names = [*((LOWER, UPPER) if bounds else ()), *methods]
    entries = {}
    for name in dict.fromkeys(names):
        changes: dict[str, Any] = {"method": name.removesuffix(PHOTOMETRIC)}
        if name.endswith(PHOTOMETRIC):
            changes["augmentation"] = "photometric"
        if changes["method"] == UPPER:
            changes |= {"method": LOWER, "scenario": UPPER}
        Registry("method", base.plugins).entry(changes["method"])
        entries[name.replace(PHOTOMETRIC, " + photometric")] = changes
    return _cells(entries, datasets, directions, seeds, base, repeats)


def ablation(
    method: str,
    datasets: Sequence[str],
    directions: Sequence[str],
    seeds: int,
    base: RunOptions,
    combine: bool = False,
    vary: Sequence[str] = (),
    variants: bool = True,
    bounds: bool = True,
    report: Callable[[str], None] = lambda line: None,
    repeats: int = 0,
) -> list[Cell]:
    """A method's declared variants and varied settings, on every direction with every seed.

    A varied value is an entry "NAME = VALUE" that changes this setting and nothing else. Where
    an entry has these settings already, it stands for the value, since they are one run. The
    method as `base` asks for it is among the entries, so that a varied setting has its reference;
    where no variant is that, its entry is "default".

    Args:
        method: its name.
        datasets: names.
        directions: as in `comparison`.
        seeds: how many, from 0.
        base: everything else that the runs share. Its assignments to `method.NAME` do not concern
            bounds and parts, which are other methods.
        combine: all combinations of the values that variants and `vary` give to settings, instead
            of the variants as they are and one value at a time.
        vary: texts "NAME=V1,V2", values of a setting; "method.NAME" is the same.
        variants: take the declared variants, and the methods that are this one with parts left
            out (but not into combinations).
        bounds: begin with `source_only` and `supervised`, between which the gap lies.
        report: receives a line for each value that another entry stands for.
        repeats: further trainings of seed 0 that start from other last bits.

    Returns:
        Seed by seed: the bounds, the parts, the variants, the reference, the values in their
        order; then the repeats.

    Raises:
        UserError: the method is unknown, nothing is left to run, two entries have one name, or a
            setting or value is refused.
    """
    method_class: type[Method] = Registry("method", base.plugins).load(method)
    declared: Mapping[str, Mapping[str, Any]] = method_class.variants() if variants else {}
    if not declared and not vary:
        raise ConfigError(
            f"Method '{method}' declares no variants; give values by --vary NAME=V1,V2."
            if variants
            else "--no-variants leaves nothing to run; give values by --vary NAME=V1,V2."
        )
    varied = {
        f"{name} = {value}": {name: value}
        for text in vary
        for name, value in _values(text, method, base)
    }
    if combine:
        declared, varied = combinations({**declared, **varied}), {}
    elif varied:
        varied = {"default": {}, **varied}

    entries: dict[str, dict[str, Any]] = {}
    owner: dict[str, str] = {}  # digest of method and settings → entry

    def add(
        entry: str, name: str, own: list[str], scenario: str = "uda", optional: bool = False
    ) -> None:
        key = digest([name, scenario, asdict(_settings(name, replace(base, assignments=own)))])
        if optional and key in owner:
            if entry != "default":
                report(f"'{entry}' has the settings of '{owner[key]}', which stands for it")
            return
        if entry in entries:
            raise ConfigError(
                f"Two entries of the ablation of '{method}' are called '{entry}'; rename the "
                "variant, or leave it out by --no-variants, or the bounds by --no-bounds."
            )
        owner.setdefault(key, entry)
        entries[entry] = {"method": name, "scenario": scenario, "assignments": own}

    shared = [a for a in base.assignments if not a.strip().startswith("method.")]
    if bounds:
        add(LOWER, LOWER, shared)
        add(UPPER, LOWER, shared, UPPER)
    if variants and not combine:
        for part in method_class.parts:
            add(part, part, shared)
    for group, optional in ((declared, combine), (varied, True)):
        for entry, changes in group.items():
            own = [assignment(f"method.{name}", value) for name, value in changes.items()]
            add(entry, method, [*base.assignments, *own], optional=optional)
    return _cells(entries, datasets, directions, seeds, base, repeats)


def _values(text: str, method: str, base: RunOptions) -> Iterator[tuple[str, Any]]:
    """Name and value of each of "NAME=V1,V2", read and checked as `--set` does."""
    name, _, listed = text.partition("=")
    name = name.strip().removeprefix("method.")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if not name or not values:
        raise ConfigError(f"--vary {text} is not of the form NAME=V1,V2.")
    for value in values:
        assignments = [*base.assignments, f"method.{name}={value}"]
        yield name, getattr(_settings(method, replace(base, assignments=assignments)), name)


def _settings(method: str, options: RunOptions) -> Any:
    """The method's settings that options come to: its preset, then `--set`."""
    method_class: type[Method] = Registry("method", options.plugins).load(method)
    preset = method_class.presets.get(options.preset or runs.default_preset(), {})
    chosen = parse_overrides(options.assignments)["method"]
    return build_settings(method_class.Config, {**preset, **chosen}, "method")


def combinations(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All combinations of the values that variants give to settings, and of leaving them.

    Example:
        >>> sorted(combinations({"a": {"mask": "none"}, "b": {"weight": 0.0}}))
        ['default', 'mask=none', 'mask=none, weight=0.0', 'weight=0.0']
    """
    values: dict[str, list[Any]] = {}
    for changes in variants.values():
        for name, value in changes.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    options = [[None, *((name, value) for value in found)] for name, found in values.items()]
    combined = {}
    for chosen in itertools.product(*options):
        changes = dict(pair for pair in chosen if pair is not None)
        combined[", ".join(f"{k}={v}" for k, v in changes.items()) or "default"] = changes
    return combined


def _cells(
    entries: Mapping[str, Mapping[str, Any]],
    datasets: Sequence[str],
    directions: Sequence[str],
    seeds: int,
    base: RunOptions,
    repeats: int,
) -> list[Cell]:
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} asks for no run; give 1 or more, 3 for intervals.")
    if parse_overrides(base.assignments)["run"].get("perturbation"):
        raise ConfigError(
            "--set perturbation would make every run a repeat of one that is not there; leave it "
            "out, and give --repeats."
        )
    starts = [(seed, 0) for seed in range(seeds)] + [(0, draw + 1) for draw in range(repeats)]
    tasks, registry = [], Registry("dataset", base.plugins)
    for name, fold in dict.fromkeys(registry.fold_of(name) for name in datasets):
        dataset: type[Dataset] = registry.load(name)
        dataset.check_fold(fold)
        known = dataset.directions
        chosen = known if tuple(directions) == ("all",) else directions or known[:1]
        for direction in dict.fromkeys(chosen):
            if direction not in known:
                raise ConfigError(
                    f"Dataset '{name}' has no direction '{direction}'; use --directions with all, "
                    f"or some of {', '.join(known)}."
                )
            tasks.append((name, fold, direction))
    cells = []
    for (seed, draw), (entry, changes), (name, fold, direction) in itertools.product(
        starts, entries.items(), tasks
    ):
        place = {"dataset": name, "fold": fold, "direction": direction}
        request = base.request(**place, seed=seed, **changes)
        if draw:
            own = [*request.assignments, f"perturbation={draw}"]
            request = replace(request, assignments=own)
        cells.append(Cell(entry, f"{fold_name(name, fold)} {direction}", request))
    return cells


# -- planning ------------------------------------------------------------------------------------


@dataclass
class Planned:
    """A cell whose run is resolved.

    Attributes:
        cell: the cell.
        run: its run.
    """

    cell: Cell
    run: PlannedRun

    @property
    def state(self) -> str:
        """ "done", "failed" (and not begun again), or "open"."""
        if self.run.directory.done:
            return "done"
        return "failed" if self.run.directory.failed is not None else "open"


def plan(cells: Sequence[Cell], report: Callable[[str], None] = lambda line: None) -> list[Planned]:
    """Resolve every cell, before any of them is run.

    Cells that come to one run (two variants with equal settings) are an error, since a table
    would show one training as two.

    Raises:
        UserError: a cell cannot be served, or two come to the same run.
    """
    planned: list[Planned] = []
    owner: dict[str, Cell] = {}
    for cell in cells:
        run = runs.plan(cell.request, report)
        if run.id in owner:
            raise ConfigError(
                f"'{owner[run.id].entry}' and '{cell.entry}' on {cell.task} are the same run; "
                "leave one of them out."
            )
        owner[run.id] = cell
        planned.append(Planned(cell, run))
    return planned


def finished(planned: Sequence[Planned]) -> list[tuple[str, str, RunDirectory]]:
    """Entry, task and directory of what is done, without repeats of what is not.

    Args:
        planned: the matrix.
    """
    done = [item for item in planned if item.state == "done"]

    def key(item: Planned) -> tuple[str, str, int]:
        return item.cell.entry, item.cell.task, item.run.config.seed

    ordinary = {key(item) for item in done if not item.run.config.perturbation}
    return [(i.cell.entry, i.cell.task, i.run.directory) for i in done if key(i) in ordinary]


def by_dataset(title: str, planned: Sequence[Planned]) -> list[Comparison]:
    """The matrix as the tracker shows it: a group of runs for each dataset.

    Args:
        title: what was asked for, e.g. "compare glua, sifa".
        planned: the matrix.
    """
    groups: dict[str, list[tuple[str, RunDirectory]]] = {}
    for item in planned:
        groups.setdefault(item.run.config.fold_name, []).append(
            (item.cell.entry, item.run.directory)
        )
    return [Comparison(title, members) for members in groups.values()]


def seconds_known(planned: Sequence[Planned]) -> dict[tuple[str, str], float]:
    """(entry, task) → mean seconds of its finished runs."""
    found: dict[tuple[str, str], list[float]] = {}
    for item in planned:
        if item.run.directory.done:
            key = item.cell.entry, item.cell.task
            found.setdefault(key, []).append(float(item.run.directory.read_summary()["seconds"]))
    return {key: sum(values) / len(values) for key, values in found.items()}


def estimate(
    planned: Sequence[Planned], report: Callable[[str], None] = lambda line: None
) -> dict[tuple[str, str], float]:
    """(entry, task) → seconds that one open run will take.

    From finished runs of the same entry and task; where there are none, from a few steps on the
    real data, which are thrown away.
    """
    known = seconds_known(planned)
    for item in planned:
        key = item.cell.entry, item.cell.task
        if item.state != "done" and key not in known:
            report(f"measuring a few steps of {key[0]} on {key[1]}")
            known[key] = runs.estimate(item.run)
    return known


# -- execution -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a matrix.

    Attributes:
        ran: runs that this process executed.
        before: runs that were done before.
        elsewhere: runs that another process finished meanwhile.
        failed: run → why, also those that failed earlier and were not tried again.
    """

    ran: int = 0
    before: int = 0
    elsewhere: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Executor:
    """Works off a matrix with some processes at once.

    Args:
        planned: the matrix.
        jobs: runs at once, each on a GPU of its own where there are some, otherwise with an
            equal share of the CPU cores.
        retry_failed: begin again what failed earlier.
        report: receives a line when a run begins or ends.
        start: executes a run with an environment and returns exit code and stderr.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        jobs: int = 1,
        retry_failed: bool = False,
        report: Callable[[str], None] = lambda line: None,
        start: Callable[[PlannedRun, Mapping[str, str]], tuple[int, str]] | None = None,
    ) -> None:
        self.planned, self.jobs, self.report = list(planned), jobs, report
        self.start = start or start_process
        self.outcome = Outcome()
        self._lock = threading.Lock()
        self._waiting: list[Planned] = []
        self._attempts: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._began = time.monotonic()
        for item in self.planned:
            if item.state == "done":
                self.outcome.before += 1
            elif item.state == "failed" and not retry_failed:
                self.outcome.failed[item.run.id] = str(item.run.directory.failed)
            else:
                self._waiting.append(item)
        self._total = len(self._waiting)
        self._failed_before = len(self.outcome.failed)

    def run(self) -> Outcome:
        """Execute what is open; return when nothing of the matrix is.

        Raises:
            RunFailure: the directory of runs cannot be written or locked.
        """
        workers = [
            threading.Thread(target=self._guarded, args=(index,), daemon=True)
            for index in range(min(self.jobs, max(1, self._total)))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():  # in short waits, so that Ctrl-C is heard
                worker.join(0.2)
        if self._error is not None:
            raise self._error
        for item in self.planned:  # another process may have done since what failed here
            if item.run.id in self.outcome.failed and item.run.directory.done:
                del self.outcome.failed[item.run.id]
                self.outcome.elsewhere += 1
        return self.outcome

    def _guarded(self, index: int) -> None:
        try:
            self._work(index)
        except BaseException as error:  # raised again by `run`, since a thread's are lost
            self._error = error

    def _work(self, index: int) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                item = self._waiting.pop(0)
            claim = item.run.request.runs_root / CLAIMS / f"{item.run.id}.lock"
            with try_lock(claim, "--runs") as mine:
                if mine and not running(item.run):
                    self._execute(item, index)
                    continue
            # Another process has it, or one whose starter was killed: look again when the rest is
            # done.
            if item.run.directory.done:
                self._end(item, "done elsewhere")
            else:
                with self._lock:
                    self._waiting.append(item)
                time.sleep(POLL_SECONDS)

    def _execute(self, item: Planned, index: int) -> None:
        if item.run.directory.done:  # finished by another process since the matrix was read
            self._end(item, "done elsewhere")
            return
        config = item.run.config
        name = f"{item.cell.entry}, {item.cell.task}, seed {config.seed}"
        name += f", repeat {config.perturbation}" if config.perturbation else ""
        self.report(f"begin  {name}")
        began = time.monotonic()
        code, errors = self.start(item.run, environment(index, self.jobs))
        if item.run.directory.done:
            score = mean_score(
                item.run.directory.read_cases().query("selector == @item.run.config.selectors[0]")
            )
            told = f"{PRIMARY.title} {PRIMARY.text(score)}"
            self._end(item, "ran", f"{name}: {told}, {duration(time.monotonic() - began)}")
            return
        if running(item.run):  # somebody ran it by hand in the same moment
            with self._lock:
                self._waiting.append(item)
            return
        self._attempts[item.run.id] += 1
        recorded = item.run.directory.failed
        # Killed, or ended because it found the run's lock held by a process that is gone by now.
        unexplained = code < 0 or (code == RunFailure.exit_code and recorded is None)
        if unexplained and self._attempts[item.run.id] < ATTEMPTS:
            self.report(f"{'killed' if code < 0 else 'again '} {name}; it goes on where it was")
            with self._lock:
                self._waiting.insert(0, item)
            return
        reason = recorded or complaint(errors)
        with self._lock:
            self.outcome.failed[item.run.id] = reason
        self.report(f"FAILED {name}: {reason}")

    def _end(self, item: Planned, how: str, text: str = "") -> None:
        with self._lock:
            if how == "ran":
                self.outcome.ran += 1
            else:
                self.outcome.elsewhere += 1
            failed = len(self.outcome.failed) - self._failed_before
            ended = self.outcome.ran + self.outcome.elsewhere + failed
            left = len(self._waiting)
            mean = (time.monotonic() - self._began) / max(1, self.outcome.ran)
        if text:
            rest = f", about {duration(mean * left)} left" if left else ""
            self.report(f"done   {text} ({ended} of {self._total}{rest})")


def running(run: PlannedRun) -> bool:
    """Return True if a process is executing the run now."""
    path = run.directory.path
    if not path.is_dir():
        return False
    with try_lock(path / ".lock") as free:
        return not free


def environment(index: int, jobs: int) -> dict[str, str]:
    """The environment of one of several processes: its share of the cores, and its GPU."""
    changed = dict(os.environ)
    gpus = torch.cuda.device_count()
    if gpus:
        changed["CUDA_VISIBLE_DEVICES"] = str(index % gpus)
    if "OMP_NUM_THREADS" not in os.environ:
        changed["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return changed


def child_command(run: PlannedRun) -> list[str]:
    """Write a run's request to a file, and return the command that executes it."""
    file = run.request.runs_root / CLAIMS / f"{run.id}.json"
    write_text(file, run.request.to_json(), "--runs")
    return [sys.executable, "-m", "glua_bench", "run-request", str(file)]


def start_process(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
    """Execute a run in a process of its own; its exit code and what it wrote to stderr."""
    done = subprocess.run(
        child_command(run),
        env=dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr
