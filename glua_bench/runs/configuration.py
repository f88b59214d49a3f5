"""Read configuration files: a run's `config.yaml`, and files of comparisons.

Both are read from the file and from options beside it; the options override the file. Mistakes in
a file are reported with its line, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from glua_bench.config import (
    AUGMENTATIONS,
    EXTERNAL,
    EXTERNAL_UPPER,
    LOWER,
    PRECISIONS,
    PRESETS,
    SETTABLE,
    UPPER,
    RunConfig,
    SegmenterSpec,
    assignment,
    build_settings,
    flat_settings,
    parse_overrides,
    preset_values,
    settable,
    setting_names,
    unknown_setting,
)
from glua_bench.documents import Table, nearest, read_document
from glua_bench.errors import ConfigError, UserError
from glua_bench.registry import Registry, with_descriptions
from glua_bench.runs import matrix
from glua_bench.runs.matrix import PHOTOMETRIC, Cell
from glua_bench.runs.plan import chosen_selectors
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.task import Grid, fold_name

# Fields of `RunRequest` that a run's file gives; the others become assignments.
_OF_RUN = (
    *("method", "dataset", "direction", "fold", "seed", "scenario", "preset", "steps"),
    *("augmentation", "precision"),
)
# Fields of `RunOptions` that a comparison file may give for all entries, beside `selectors`.
_SHARED: Mapping[str, type] = {
    "preset": str,
    "steps": int,
    "augmentation": str,
    "precision": str,
    "oracle": bool,
}
_CHOICES = {
    "preset": tuple(PRESETS),
    "augmentation": AUGMENTATIONS,
    "precision": PRECISIONS,
}
# Kind of a file → a key that only such files have, and the command that reads them.
_KINDS = {
    "a comparison": ("entries", "glua-bench compare --config"),
    "a sweep": ("space", "glua-bench sweep"),
    "a dataset description": ("domains", "--dataset"),
    "a run's configuration": ("method_config", "glua-bench run --config"),
}


# -- a run ----------------------------------------------------------------------------------------


def of_run(
    file: Path,
    asked: RunRequest,
    named: Collection[str],
    report: Callable[[str], None] = lambda line: None,
) -> RunRequest:
    """Return the request for the run that a `config.yaml` describes.

    Without other options, it is the same run, with the same id, if data and code are the same.

    Args:
        file: `config.yaml` of a run, or a copy of it.
        asked: options from the command line; those that are not `named` come from the file.
        named: names of the fields that the user gave.
        report: receives a line about what overrides the file.

    Raises:
        ConfigError: the file is not a configuration of this version, with file and line.
        PluginError: its method or dataset is unknown.
    """
    if "preset" in named:
        raise ConfigError(
            f"--preset has no effect on {file}, which contains every setting; omit it, and change "
            "settings with --set."
        )
    if "dataset" in named:
        dataset, plugins = with_descriptions(asked.dataset, asked.plugins)
        asked = replace(asked, dataset=dataset, plugins=plugins)
    config, lacking = _read_run(file, asked, named)
    if lacking:
        report(f"{file} lacks {', '.join(lacking)}; the defaults of this version are used.")
    flat = flat_settings(config.to_dict())
    options = {name: getattr(config, name) for name in _OF_RUN}
    options["selectors"] = flat["selectors"] = ",".join(config.selectors)
    options |= {name: getattr(asked, name) for name in options if name in named}
    other = options["method"] != config.method
    groups = ("segmenter.", "grid.") if other else ("segmenter.", "grid.", "method.")
    kept = {name: value for name, value in flat.items() if name.startswith(groups)}
    kept |= {n: v for n, v in flat.items() if n in SETTABLE and n not in _OF_RUN and v is not None}
    _tell(file, flat, options, asked, named, report)
    if other:
        report(f"The settings of '{config.method}' in {file} are not used.")
    texts = [assignment(name, value) for name, value in kept.items()]
    return replace(asked, **options, assignments=[*texts, *asked.assignments])


def _tell(
    file: Path,
    flat: Mapping[str, Any],
    options: Mapping[str, Any],
    asked: RunRequest,
    named: Collection[str],
    report: Callable[[str], None],
) -> None:
    """Report the values that override the file's."""
    new = {name: value for name, value in options.items() if name in named}
    if "selectors" in new:
        new["selectors"] = ",".join(chosen_selectors(new["selectors"], asked.plugins))
    for group, values in parse_overrides(asked.assignments).items():
        prefix = "" if group == "run" else f"{group}."
        new |= {f"{prefix}{name}": value for name, value in values.items()}
    changed = [
        f"{name} = {value} instead of {flat[name]}"
        for name, value in new.items()
        if name in flat and value != flat[name]
    ]
    if changed:
        report(f"Overrides {file}: {', '.join(changed)}.")


def _read_run(file: Path, asked: RunRequest, named: Collection[str]) -> tuple[RunConfig, list[str]]:
    """Return the configuration in a file, and the fields that it lacks."""
    text = read_document(file)
    if text.take("scenario", object, None) in (EXTERNAL, EXTERNAL_UPPER):
        raise text.error(
            "the run was imported from another tool and cannot be repeated; repeat `glua-bench "
            "import`",
            "scenario",
        )
    _refuse_other_kinds(text, "a run's configuration")
    known = [spec.name for spec in fields(RunConfig)]
    for name in text.names():
        if name not in known:
            raise text.error(
                f"unknown '{name}' in a run's configuration; {nearest(name, known)}, or use the "
                "version of glua-bench that wrote the file",
                name,
            )
    required = ("method", "dataset", "direction", "grid", "segmenter", "method_config", "selectors")
    values = {name: text.take(name, object, None) for name in known if name in text}
    for name in required:  # after all others, of which none is a misspelt one
        text.take(name, object)
    plugins = asked.plugins
    for kind in ("method", "dataset"):
        if kind not in named:
            _entry(text, kind, kind, plugins)
    if "selectors" not in named:
        _check_selectors(text, ",".join(text.texts("selectors")), plugins)
    tables: dict[str, tuple[str, type]] = {"grid": ("grid", Grid)}
    tables["segmenter"] = ("segmenter", SegmenterSpec)
    if "method" not in named or asked.method == values["method"]:
        loaded: Any = Registry("method", plugins).load(str(values["method"]))
        tables["method_config"] = ("method", loaded.Config)
    lacking = [name for name in known if name not in text]
    for key, (prefix, cls) in tables.items():
        table = text.table(key)
        if table is None:
            if not isinstance(values[key], dict):
                raise text.error(f"'{key}' must be a mapping of names to values", key)
            continue
        _check_settings(table, prefix, cls)
        lacking += [f"{prefix}.{name}" for name in setting_names(cls) if name not in table]
    try:
        config = RunConfig.from_dict(values)
    except ConfigError as error:
        place = next((name for name in known if str(error).startswith(f"{name} = ")), None)
        raise text.error(str(error).rstrip("."), place) from error
    return config, lacking


def _check_selectors(text: Table, names: str, plugins: Sequence[Path]) -> None:
    """Check names of selectors; errors name the line."""
    try:
        chosen_selectors(names, plugins)
    except UserError as error:
        message = str(error).replace("--selectors", "selectors").rstrip(".")
        raise text.error(message, "selectors") from error


def _check_settings(table: Table, prefix: str, cls: type) -> None:
    """Check a group of settings; errors name the line of the setting."""
    known = setting_names(cls)
    for name in table.names():
        if name not in known:
            raise table.error(
                f"'{name}' is not a setting of this version's {prefix}; {nearest(name, known)}",
                name,
            )
    try:
        build_settings(
            cls, {name: table.take(name, object, None) for name in known if name in table}, prefix
        )
    except TypeError as error:
        raise table.error(f"a setting is missing ({error})") from error
    except ConfigError as error:
        place = next((n for n in known if str(error).startswith(f"{prefix}.{n} ")), None)
        raise table.error(str(error).rstrip("."), place) from error


def _refuse_other_kinds(text: Table, kind: str) -> None:
    """Refuse a file of another kind, with the command that reads it."""
    if _KINDS[kind][0] in text:
        return
    for other, (key, command) in _KINDS.items():
        if key in text:
            raise text.error(f"this is {other}, not {kind}; use {command} {text.file}", key)


def _entry(text: Table, key: str, kind: str, plugins: Sequence[Path]) -> str:
    """Return the name of a known plugin; errors name the line."""
    name = str(text.take(key, str))
    registry = Registry(kind, plugins)
    try:
        registry.entry(registry.fold_of(name)[0] if kind == "dataset" else name)
    except UserError as error:
        raise text.error(str(error).rstrip("."), key) from error
    return name


# -- a comparison ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a user compares.

    Attributes:
        methods: names, or the entries of a file as `matrix.comparison` takes them.
        imported: names of imported entries.
        datasets: names with their folds.
        directions: "source-target", ("all",), or () for each dataset's first.
        seeds: number of seeds.
        repeats: perturbed runs of seed 0.
        bounds: whether both bounds are entries.
        shared: options of all runs.
    """

    methods: Sequence[str] | Mapping[str, Mapping[str, Any]]
    imported: Sequence[str]
    datasets: Sequence[str]
    directions: Sequence[str]
    seeds: int
    repeats: int
    bounds: bool
    shared: RunOptions

    @property
    def title(self) -> str:
        """Title of the command, e.g. "compare glua, sifa"."""
        return f"compare {', '.join([*self.methods, *self.imported])}"

    @property
    def named(self) -> bool:
        """Whether the entries have names of their own."""
        return isinstance(self.methods, Mapping)

    def cells(self) -> list[Cell]:
        """Enumerate the runs; see `matrix.comparison`."""
        return matrix.comparison(
            self.methods,
            self.datasets,
            self.directions,
            self.seeds,
            self.shared,
            self.bounds,
            self.repeats,
        )


def in_folds(
    datasets: Sequence[str], fold: int, shared: RunOptions
) -> tuple[list[str], RunOptions]:
    """Return names of datasets with their folds, and options with descriptions as plugins.

    Args:
        datasets: names or descriptions (FILE.yaml).
        fold: fold of all datasets whose name has none.
        shared: options of all runs.

    Raises:
        ConfigError: a name has another fold.
        PluginError: a description cannot be read.
    """
    joined, plugins = with_descriptions(",".join(datasets), shared.plugins)
    registry = Registry("dataset", plugins)
    names = [fold_name(*registry.fold_of(name, fold)) for name in joined.split(",")]
    return names, replace(shared, plugins=plugins)


def comparison(
    methods: Sequence[str],
    file: Path | None,
    given: Mapping[str, Any],
    shared: RunOptions,
    named: Collection[str],
) -> Asked:
    """Combine the options of a comparison with its file.

    Args:
        methods: names; () if the file lists entries.
        file: comparison file, if any.
        given: what the user gave of datasets and directions (lists of names), seeds, fold, repeats
            and bounds; it overrides the file.
        shared: options of all runs.
        named: names of the fields of `shared` that the user gave.

    Raises:
        ConfigError: neither or both of methods and file are given, or the file is invalid.
        PluginError: a method or dataset is unknown.
    """
    if file is not None and methods:
        raise ConfigError(
            f"--methods and --config exclude each other; list the methods as entries of {file}."
        )
    if file is None and not methods:
        raise ConfigError("--methods is missing; name the methods, or give --config FILE.")
    values: dict[str, Any] = {"directions": [], "seeds": 3, "repeats": 0, "bounds": True, "fold": 1}
    entries: Mapping[str, Mapping[str, Any]] = {}
    if file is not None:
        written, entries, shared = _read_comparison(file, given, shared, named)
        values |= written
    values |= given
    if not values.get("datasets"):
        raise ConfigError("--dataset is missing; name one, or several separated by commas.")
    names, shared = in_folds(values["datasets"], values["fold"], shared)
    known = Registry("method", shared.plugins)
    trained = [n for n in methods if n == UPPER or n.removesuffix(PHOTOMETRIC) in known]
    imported = [name for name in methods if name not in trained]
    if imported and not trained and not values["bounds"]:
        raise ConfigError(
            f"--methods {','.join(methods)} has no method to run; name one, omit --no-bounds, or "
            "show imported entries with `glua-bench report`."
        )
    return Asked(
        entries or trained,
        values.get("imported", imported),
        names,
        values["directions"],
        values["seeds"],
        values["repeats"],
        values["bounds"],
        shared,
    )


def _read_comparison(
    file: Path, given: Mapping[str, Any], shared: RunOptions, named: Collection[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], RunOptions]:
    """Return the tasks, the entries and the shared options of a file."""
    text = read_document(file)
    _refuse_other_kinds(text, "a comparison")
    text.take("title", str, "")
    values: dict[str, Any] = {}
    for name, singular in (("datasets", "dataset"), ("directions", "direction")):
        if name in text and singular in text:
            raise text.error(f"'{name}' and '{singular}' are the same; keep one", singular)
        text.take(name, object, None)  # known, for hints
        key = singular if singular in text else name
        listed = isinstance(text.take(key, object, None), list)
        found = text.texts(key) if listed else text.take(key, str, "").split(",")
        if found := [item.strip() for item in found if item.strip()]:
            values[name] = found
    if not values.get("datasets") and "datasets" not in given:
        raise text.error("'dataset' is missing; add it, or give --dataset")
    for name, low in (("seeds", 1), ("fold", 1), ("repeats", 0)):
        value = text.take(name, int, None)
        if value is not None:
            values[name] = value
            if value < low:
                raise text.error(f"'{name}' must be at least {low}, not {values[name]}", name)
    values["bounds"] = text.take("bounds", bool, True)
    values["imported"] = text.texts("imported") if "imported" in text else []
    options: dict[str, Any] = {}
    for name, kind in _SHARED.items():
        value = text.take(name, kind, None)
        if value is not None:
            choices = _CHOICES.get(name)
            options[name] = text.choice(name, choices) if choices else value
    if "selectors" in text:
        listed = isinstance(text.take("selectors", object), list)
        found = text.texts("selectors") if listed else [text.take("selectors", str)]
        options["selectors"] = ",".join(found)
        if "selectors" not in named:
            _check_selectors(text, options["selectors"], shared.plugins)
    changes = {name: value for name, value in options.items() if name not in named}
    settings = list(_assignments(text, None, ""))
    for argument in shared.assignments:
        if argument.strip().startswith("method."):
            raise ConfigError(
                f"--set {argument} does not say of which entry; write it under 'set' of the entry "
                f"in {file}."
            )
    shared = replace(shared, **changes, assignments=[*settings, *shared.assignments])
    _check_datasets(text, values, given, shared)
    bounds = given.get("bounds", values["bounds"])
    entries = _entries(text, shared, bounds)
    text.finish()
    return values, entries, shared


def _check_datasets(
    text: Table, values: Mapping[str, Any], given: Mapping[str, Any], shared: RunOptions
) -> None:
    """Check the names of datasets and directions in the file."""
    if "datasets" in given:
        return
    key = "dataset" if "dataset" in text else "datasets"
    try:
        joined, plugins = with_descriptions(",".join(values["datasets"]), shared.plugins)
        registry = Registry("dataset", plugins)
        names = [registry.fold_of(name)[0] for name in joined.split(",")]
        for name in names:
            registry.entry(name)
    except UserError as error:
        raise text.error(str(error).rstrip("."), key) from error
    written = [] if "directions" in given else values.get("directions", [])
    for name in names if written and written != ["all"] else []:
        loaded: Any = registry.load(name)
        for direction in written:
            if direction not in loaded.directions:
                raise text.error(
                    f"dataset '{name}' has no direction '{direction}'; "
                    f"{nearest(direction, list(loaded.directions))}",
                    "direction" if "direction" in text else "directions",
                )


def _entries(text: Table, shared: RunOptions, bounds: bool) -> dict[str, dict[str, Any]]:
    """Return entry → its own fields of `RunRequest`, and its line."""
    entries: dict[str, dict[str, Any]] = {}
    lines: dict[str, str] = {}
    for table in text.items("entries"):
        _refuse_protocol(table)
        written = table.take("method", str)
        method = LOWER if written == UPPER else _entry(table, "method", "method", shared.plugins)
        name = table.take("name", str, written)
        if name != " ".join(name.split()) or not name:
            raise table.error("'name' must be one line without leading or double blanks", "name")
        if name in entries:
            raise table.error(
                f"two entries are called '{name}' (see also {lines[name]}); rename one",
                "name" if "name" in table else "method",
            )
        loaded: Any = Registry("method", shared.plugins).load(method)
        own = list(_assignments(table, loaded, shared.preset))
        changes: dict[str, Any] = {"method": method, "where": table.where("method")}
        if written == UPPER:
            changes["scenario"] = UPPER
        if own:
            changes["assignments"] = [*shared.assignments, *own]
        if table.take("augmentation", str, None) is not None:
            changes["augmentation"] = table.choice("augmentation", AUGMENTATIONS)
        table.finish()
        if name in (LOWER, UPPER) and (written != name or len(changes) > 2 + (name == UPPER)):
            raise table.error(
                f"'{name}' is the name of a bound; give the entry another name", "name"
            )
        lines[name] = table.where("method")
        if name in (LOWER, UPPER) and bounds:
            continue  # it is the bound
        entries[name] = changes
    if not entries:
        raise text.error("'entries' has no entry besides the bounds; add one", "entries")
    return entries


def _refuse_protocol(table: Table) -> None:
    """Refuse what all entries of a table must share."""
    of_all = ("preset", "steps", "precision", "selectors", "seeds", "fold", "dataset", "direction")
    for name in of_all:
        if name in table:
            raise table.error(
                f"'{name}' must be the same for all entries of a table; write it at the top level",
                name,
            )


def _assignments(text: Table, method: Any, preset: str | None) -> Iterator[str]:
    """Yield the `--set` texts of `set`, a mapping or a list of NAME=VALUE.

    Args:
        text: the document or an entry.
        method: class of the entry's method; None for the settings of all entries.
        preset: the shared preset.
    """
    own = [] if method is None else setting_names(method.Config)
    known = settable(own)
    for name, value, table, key in _pairs(text):
        whole = f"method.{name}" if name in own else name
        group, _, bare = whole.rpartition(".")
        if method is None and group == "method":
            raise table.error(
                f"'{name}' does not say of which method; write it under 'set' of an entry", key
            )
        if whole not in known:
            of = f"the method '{method.name}'" if method is not None else "all runs"
            hint = unknown_setting(name, own)
            raise table.error(f"'{name}' is not a setting of {of}; {hint}", key)
        if method is not None and group != "method":
            raise table.error(
                f"'{name}' must be the same for all entries of a table; write it under 'set' at "
                "the top level",
                key,
            )
        if method is not None:
            values = {**preset_values(method.presets, preset or "quick"), bare: value}
            try:
                value = asdict(build_settings(method.Config, values, "method"))[bare]
            except ConfigError as error:
                raise table.error(str(error).rstrip("."), key) from error
        yield assignment(whole, value)


def _pairs(text: Table) -> Iterator[tuple[str, Any, Table, str]]:
    """Yield name and value of each setting under `set`, with the table and key for errors."""
    if not isinstance(text.take("set", object, None), list):
        table = text.table("set")
        for name in table.names() if table is not None else ():
            assert table is not None
            yield name, table.take(name, object, None), table, name
        return
    for item in text.texts("set"):
        try:
            groups = parse_overrides([item])
        except ConfigError as error:
            raise text.error(str(error).removeprefix("--set ").rstrip("."), "set") from error
        for group, values in groups.items():
            for name, value in values.items():
                yield (name if group == "run" else f"{group}.{name}"), value, text, "set"
