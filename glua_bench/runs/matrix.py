"""The run matrix: which runs a comparison or an ablation needs, and their execution.

Enumeration (`comparison`, `ablation`) makes requests and runs nothing. Execution skips what is
done, and starts each other run as a process of its own, several at once if asked. Two processes
on the same matrix share it: a run is claimed by a file lock, which the kernel gives back when its
holder ends, however it ends; whoever claims a run that another left behind resumes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from glua_bench.config import LOWER, UPPER, assignment, build_settings, digest, parse_overrides
from glua_bench.errors import ConfigError
from glua_bench.method import Method
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry
from glua_bench.runs import execution
from glua_bench.runs import plan as planning
from glua_bench.runs.plan import PlannedRun
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.task import Dataset, fold_name

PHOTOMETRIC = "+photometric"


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
    preset = method_class.presets.get(options.preset or planning.default_preset(), {})
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
        run = planning.plan(cell.request, report)
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
            known[key] = execution.estimate(item.run)
    return known
