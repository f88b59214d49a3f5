"""Enumerate and plan the runs of a comparison or an ablation.

`comparison` and `ablation` return cells, `plan` resolves them to runs; `executor` executes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from glua_bench.config import (
    LOWER,
    SETTABLE,
    UPPER,
    assignment,
    build_settings,
    parse_overrides,
    preset_values,
    setting_names,
)
from glua_bench.documents import nearest
from glua_bench.errors import ConfigError, UserError
from glua_bench.identity import digest
from glua_bench.method import Method
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry
from glua_bench.runs import external
from glua_bench.runs import plan as planning
from glua_bench.runs.external import Guest
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
        request: its request.
        where: file and line of the entry in a comparison file, for errors.
    """

    entry: str
    task: str
    request: RunRequest
    where: str = ""


def comparison(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    datasets: Sequence[str],
    directions: Sequence[str],
    seeds: int,
    base: RunOptions,
    bounds: bool = True,
    repeats: int = 0,
) -> list[Cell]:
    """Enumerate all methods on all directions of all datasets with all seeds.

    Args:
        methods: names; `NAME+photometric` selects that augmentation, `supervised` is the upper
            bound. Or entry → fields of `RunRequest` that are its own, and `where`, as in `Cell`.
        datasets: names.
        directions: "source-target"; () selects each dataset's first one, ("all",) all of them.
        seeds: number of seeds, counted from 0.
        base: options that all runs share.
        bounds: add the bounds of the gap, `source_only` and `supervised`, as the first entries.
        repeats: additional perturbed runs of seed 0.

    Returns:
        Cells ordered by seed, so that complete comparisons are available early, then the repeats.

    Raises:
        UserError: a name or direction is unknown.
    """
    own = methods if isinstance(methods, Mapping) else {}
    names = [*((LOWER, UPPER) if bounds else ()), *(() if own else methods)]
    entries: dict[str, Mapping[str, Any]] = {}
    for name in dict.fromkeys(names):
        changes: dict[str, Any] = {"method": name.removesuffix(PHOTOMETRIC)}
        if name.endswith(PHOTOMETRIC):
            changes["augmentation"] = "photometric"
        if changes["method"] == UPPER:
            changes |= {"method": LOWER, "scenario": UPPER}
        Registry("method", base.plugins).entry(changes["method"])
        entries[name.replace(PHOTOMETRIC, " + photometric")] = changes
    return _cells({**entries, **own}, datasets, directions, seeds, base, repeats)


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
    """Enumerate a method's declared variants and varied settings, on all directions with all seeds.

    A varied value is an entry "NAME = VALUE" that changes only this setting; it is skipped if an
    earlier entry has the same settings. If settings are varied, the method with the settings of
    `base` is an entry too, as the reference; it is called "default" unless a variant equals it.

    Args:
        method: name of the method.
        datasets: names.
        directions: as in `comparison`.
        seeds: number of seeds, counted from 0.
        base: options that all runs share. Its assignments to `method.NAME` do not apply to bounds
            and parts, which are other methods.
        combine: enumerate all combinations of the values that variants and `vary` assign to
            settings, instead of one change at a time.
        vary: texts "NAME=V1,V2", values of a setting; "method.NAME" is the same.
        variants: include the declared variants and (unless combined) the method's parts.
        bounds: add the bounds of the gap, `source_only` and `supervised`, as the first entries.
        report: receives a line for each skipped value.
        repeats: additional perturbed runs of seed 0.

    Returns:
        Cells ordered by seed, then the repeats; entries are bounds, parts, variants, reference,
            values.

    Raises:
        UserError: the method is unknown, nothing is left to run, two entries have one name, or a
            setting or value is invalid.
    """
    method_class: type[Method] = Registry("method", base.plugins).load(method)
    declared: Mapping[str, Mapping[str, Any]] = method_class.variants() if variants else {}
    if not declared and not vary:
        raise ConfigError(
            f"Method '{method}' declares no variants; add values by --vary NAME=V1,V2."
            if variants
            else "--no-variants leaves nothing to run; add values by --vary NAME=V1,V2."
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
                report(f"'{entry}' duplicates '{owner[key]}', skipped")
            return
        if entry in entries:
            raise ConfigError(
                f"Two entries of the ablation of '{method}' are called '{entry}'; rename the "
                "variant, or skip the variants by --no-variants or the bounds by --no-bounds."
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
    """Yield name and value for each value of "NAME=V1,V2", parsed and checked as for `--set`."""
    name, _, values_text = text.partition("=")
    name = name.strip().removeprefix("method.")
    values = [value.strip() for value in values_text.split(",") if value.strip()]
    if not name or not values:
        raise ConfigError(f"--vary {text} is invalid; use the form NAME=V1,V2.")
    method_class: type[Method] = Registry("method", base.plugins).load(method)
    known = setting_names(method_class.Config)
    if name not in known:
        if name.partition(".")[0] in ("segmenter", "grid") or name in SETTABLE:
            raise ConfigError(
                f"--vary {name}: all entries of a table share the settings of the run; give it "
                f"with --set, or vary a setting of '{method}': {', '.join(known)}."
            )
        raise ConfigError(f"--vary {name}: unknown setting; {nearest(name, known)}.")
    for value in values:
        assignments = [*base.assignments, f"method.{name}={value}"]
        yield name, getattr(_settings(method, replace(base, assignments=assignments)), name)


def _settings(method: str, options: RunOptions) -> Any:
    """Return the method's settings from its preset and `--set`."""
    method_class: type[Method] = Registry("method", options.plugins).load(method)
    preset = preset_values(method_class.presets, options.preset or planning.default_preset())
    known = setting_names(method_class.Config)
    overrides = parse_overrides(options.assignments, known)["method"]
    return build_settings(method_class.Config, {**preset, **overrides}, "method")


def combinations(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return all combinations of the values that variants assign to settings, or of the defaults.

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
    choices = [[None, *((name, value) for value in found)] for name, found in values.items()]
    combined = {}
    for chosen in itertools.product(*choices):
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
        raise ConfigError(f"--seeds {seeds} must be at least 1, or 3 for intervals.")
    if parse_overrides(base.assignments)["run"].get("perturbation"):
        raise ConfigError(
            "--set perturbation would turn every run into a repeat of a missing one; use "
            "--repeats instead."
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
                    f"Dataset '{name}' has no direction '{direction}'; use --directions with all "
                    f"or some of {', '.join(known)}."
                )
            tasks.append((name, fold, direction))
    cells = []
    for (seed, draw), (entry, changes), (name, fold, direction) in itertools.product(
        starts, entries.items(), tasks
    ):
        place = {"dataset": name, "fold": fold, "direction": direction}
        own = {key: value for key, value in changes.items() if key != "where"}
        request = base.request(**place, seed=seed, **own)
        if draw:
            texts = [*request.assignments, f"perturbation={draw}"]
            request = replace(request, assignments=texts)
        task = f"{fold_name(name, fold)} {direction}"
        cells.append(Cell(entry, task, request, str(changes.get("where", ""))))
    return cells


@dataclass
class Planned:
    """A cell with its planned run."""

    cell: Cell
    run: PlannedRun

    @property
    def state(self) -> str:
        """ "done", "failed" or "open"."""
        if self.run.directory.done:
            return "done"
        return "open" if self.reason is None else "failed"

    @property
    def reason(self) -> str | None:
        """Why the run counts as failed: its damage, or the failure of its last attempt."""
        return self.run.directory.damage or self.run.directory.failed


def plan(cells: Sequence[Cell], report: Callable[[str], None] = lambda line: None) -> list[Planned]:
    """Plan the runs of all cells before any of them is executed.

    Raises:
        UserError: a cell is invalid, or two cells are the same run, which a table would show twice.
    """
    planned: list[Planned] = []
    owner: dict[str, Cell] = {}
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            report(line)

    for cell in cells:
        place = f"{cell.where}: " if cell.where else ""
        try:
            run = planning.plan(cell.request, once)
        except UserError as error:
            if not place:
                raise
            raise type(error)(f"{place}{error}") from error
        if run.id in owner:
            raise ConfigError(
                f"{place}'{owner[run.id].entry}' and '{cell.entry}' on {cell.task} are the same "
                "run; remove one of them."
            )
        owner[run.id] = cell
        planned.append(Planned(cell, run))
    return planned


def finished(planned: Sequence[Planned]) -> list[tuple[str, str, RunDirectory]]:
    """Return entry, task and directory of finished runs, without repeats of unfinished ones."""
    done = [item for item in planned if item.state == "done"]

    def key(item: Planned) -> tuple[str, str, int]:
        return item.cell.entry, item.cell.task, item.run.config.seed

    ordinary = {key(item) for item in done if not item.run.config.perturbation}
    return [(i.cell.entry, i.cell.task, i.run.directory) for i in done if key(i) in ordinary]


def guests(
    cells: Sequence[Cell],
    names: Sequence[str],
    report: Callable[[str], None] = lambda line: None,
) -> list[Guest]:
    """Find imported entries for the tasks of a comparison.

    Args:
        cells: the runs of the comparison.
        names: names that no method has.
        report: receives a line for each task that an entry lacks.

    Raises:
        ConfigError: an entry has not been imported for any of the tasks.
    """
    requests = [cell.request for cell in cells]
    tasks = [(each.dataset, each.fold, each.direction or "") for each in requests]
    return external.guests(names, tasks, requests[0].runs_root, requests[0].plugins, report)


def by_dataset(
    title: str, planned: Sequence[Planned], guests: Sequence[Guest] = ()
) -> list[Comparison]:
    """Group the runs by dataset, as a tracker shows them.

    Args:
        title: title of the command, e.g. "compare glua, sifa".
        planned: the matrix.
        guests: imported entries.
    """
    groups: dict[str, list[tuple[str, RunDirectory]]] = {}
    for item in planned:
        groups.setdefault(item.run.config.fold_name, []).append(
            (item.cell.entry, item.run.directory)
        )
    for guest in guests:
        groups.setdefault(guest.run.config.fold_name, []).append((guest.entry, guest.run))
    return [Comparison(title, members) for members in groups.values()]
