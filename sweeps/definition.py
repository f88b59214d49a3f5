"""Sweep definitions: YAML files with method, task, search space, objective, sampler and budget.

A definition is checked completely before a study is opened, and each error gives the line.
docs/sweeps.md describes the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from glua_bench.config import (
    ORACLE,
    PRESETS,
    SELECTORS,
    SETTABLE,
    assignment,
    build_settings,
    preset_values,
    settable,
    setting_names,
    setting_type,
    unknown_setting,
)
from glua_bench.documents import Table, nearest, read_document
from glua_bench.errors import ConfigError, UserError
from glua_bench.paths import entries, name_fault
from glua_bench.registry import Registry
from glua_bench.task import fold_name

COSTS = ("seconds",)  # of training, without stages shared by trials
SAMPLERS = ("grid", "random", "tpe", "cmaes", "nsga2")
PRUNERS = ("none", "median", "hyperband", "wilcoxon")
# An automatic range extends by this factor from the default, within the setting's own range.
AUTO_FACTOR = 10.0
WILCOXON_RUNS = 3  # fewer pairs can never be significant


@dataclass(frozen=True)
class Parameter:
    """A setting and its search range.

    Attributes:
        name: name of the method's setting.
        choices: listed values; if empty, the range is `low` to `high`.
        low: smallest value.
        high: largest value.
        step: distance between values; 0 for a continuous range.
        log: whether to sample on a logarithmic scale.
        whole: whether values are integers.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    log: bool = False
    whole: bool = False

    def values(self) -> tuple[Any, ...]:
        """Return all values of a grid; empty for a continuous range."""
        if self.choices:
            return self.choices
        step = self.step or (1 if self.whole and not self.log else 0)
        if not step:
            return ()
        count = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + index * step for index in range(count)]
        return tuple(int(v) if self.whole else float(f"{v:.12g}") for v in values)


@dataclass(frozen=True)
class Definition:
    """A sweep.

    Attributes:
        file: YAML file of the definition.
        name: name of the sweep and its study.
        title: one-line question.
        method: method name.
        dataset: dataset name.
        directions: "source-target" pairs of every trial.
        seeds: number of seeds per trial, from 0.
        preset: preset of every run.
        settings: `--set` arguments common to all runs.
        space: search space.
        objectives: a selector or `oracle`, then costs.
        sampler: one of `SAMPLERS`.
        pruner: one of `PRUNERS`.
        trials: number of trials.
        seed: seed of the sampler.
        fold: fold of the dataset.
    """

    file: Path
    name: str
    title: str
    method: str
    dataset: str
    directions: tuple[str, ...]
    seeds: int
    preset: str
    settings: tuple[str, ...]
    space: tuple[Parameter, ...]
    objectives: tuple[str, ...]
    sampler: str
    pruner: str
    trials: int
    seed: int
    fold: int = 1

    @property
    def fold_name(self) -> str:
        """Dataset with its fold, e.g. "mmwhs_fold2"."""
        return fold_name(self.dataset, self.fold)

    @property
    def selector(self) -> str:
        """First objective, which scores quality."""
        return self.objectives[0]

    @property
    def method_settings(self) -> tuple[str, ...]:
        """`--set` arguments of the method, on which the chosen values may depend."""
        return tuple(text for text in self.settings if text.startswith("method."))

    @property
    def runs_per_trial(self) -> int:
        """Number of runs per trial: directions × seeds."""
        return len(self.directions) * self.seeds

    def meaning(self) -> dict[str, Any]:
        """Return what identifies a study: everything except file, title and number of trials."""
        content = asdict(self)
        for name in ("file", "title", "trials"):
            del content[name]
        content["space"] = {p.pop("name"): p for p in content["space"]}
        return content


def shipped() -> dict[str, Path]:
    """Return name → file of the built-in definitions."""
    found = entries(Path(__file__).parent)
    return {path.stem: path for path in found if path.suffix == ".yaml"}


def find(text: str) -> Path:
    """Return the file of a definition, given by its path or the name of a built-in one.

    Raises:
        ConfigError: it does not exist; the closest name is suggested.
    """
    path, known = Path(text), shipped()
    if path.is_file():
        return path
    # `sweeps/mask_ratio.yaml`, as in a clone, is found wherever the package is installed.
    if path.stem in known and path.parent.name in ("", "sweeps"):
        return known[path.stem]
    raise ConfigError(
        f"There is no sweep '{text}'; pass a YAML file or the name of a built-in sweep: "
        f"{nearest(path.stem, list(known))}."
    )


def read(file: Path, oracle: bool, plugins: Sequence[Path] = (), **changes: Any) -> Definition:
    """Read a definition and check it against the method's settings.

    Args:
        file: the YAML file.
        oracle: whether the objective may read target labels.
        plugins: files with further methods, datasets or selectors.
        changes: values from the command line that override the file's; None keeps the file's.

    Raises:
        ConfigError: an entry is invalid; the message gives the line.
        PluginError: the method or the dataset is unknown.
    """
    text = read_document(file)
    method_name = text.take("method", str)
    method: Any = _loaded(text, "method", method_name, plugins)
    name = text.take("name", str, file.stem)
    fault = name_fault(name)
    if fault:
        raise text.error(f"the name '{name}' {fault}; choose another, such as loss_weights", "name")
    dataset, fold = _dataset(text, changes, plugins)
    preset = changes.get("preset") or text.choice("preset", tuple(PRESETS), "quick")
    text.take("preset", str, "")
    space = _space(text, method, preset, changes.get("space"))
    made = Definition(
        file=file,
        name=name,
        title=text.take("title", str, ""),
        method=method_name,
        dataset=dataset.name,
        directions=_directions(text, dataset, changes.get("directions")),
        seeds=_positive(text, "seeds", changes.get("seeds"), 1),
        preset=preset,
        settings=_shared_settings(text, method),
        space=space,
        objectives=_objectives(text, oracle),
        sampler=text.choice("sampler", SAMPLERS, "tpe"),
        pruner=text.choice("pruner", PRUNERS, "none"),
        trials=_budget(text, space, changes.get("trials")),
        seed=text.take("seed", int, 0),
        fold=fold,
    )
    text.finish()
    for problem, entry in _contradictions(made, method, plugins):
        raise text.error(problem, entry)
    return made


def _dataset(text: Table, changes: Mapping[str, Any], plugins: Sequence[Path]) -> tuple[Any, int]:
    """Return the dataset's class and its fold; the file's fold applies to the file's dataset."""
    given = changes.get("dataset")
    name, written = given or text.take("dataset", str), text.take("fold", int, 1)
    text.take("dataset", str, "")
    requested = changes.get("fold") or (1 if given else written)
    name, fold = Registry("dataset", plugins).fold_of(name, requested)
    dataset: Any = _loaded(text, "dataset", name, plugins)
    try:
        dataset.check_fold(fold)
    except ConfigError as error:
        raise (text.error(str(error).rstrip("."), "fold") if fold == written else error) from error
    return dataset, fold


def _loaded(text: Table, kind: str, name: str, plugins: Sequence[Path]) -> type:
    try:
        return Registry(kind, plugins).load(name)
    except UserError as error:
        if kind in text:
            raise text.error(str(error).rstrip("."), kind) from error
        raise


def _directions(text: Table, dataset: Any, given: Sequence[str] | None) -> tuple[str, ...]:
    known = list(dataset.directions)
    written = text.take("directions", object, known[:1])
    chosen = known if written == "all" else text.texts("directions", known[:1])
    if given:
        chosen = known if list(given) == ["all"] else list(given)
    for direction in chosen:
        if direction not in known:
            raise text.error(
                f"'{direction}' is not a direction of '{dataset.name}'; "
                f"{nearest(direction, known)}",
                "directions",
            )
    return tuple(dict.fromkeys(chosen))


def _shared_settings(text: Table, method: Any) -> tuple[str, ...]:
    """Return the `--set` arguments common to all runs."""
    table = text.table("set")
    if table is None:
        return ()
    own = setting_names(method.Config)
    known, assignments = settable(own), []
    for name in table.names():
        whole = f"method.{name}" if name in own else name
        if whole not in known:
            raise table.error(f"'{name}' is not a setting; {unknown_setting(name, own)}", name)
        assignments.append(assignment(whole, table.take(name, object)))
    return tuple(assignments)


def _space(text: Table, method: Any, preset: str, given: str | None) -> tuple[Parameter, ...]:
    """Return the parameters, as listed or from the settings' declared ranges."""
    if given not in (None, "auto"):
        raise ConfigError(f"--space {given} is unknown; give auto, or omit the option.")
    written = text.take("space", object, None)
    if given == "auto" or written == "auto":
        return automatic(method, preset)
    if isinstance(written, list):  # names only: declared ranges
        return tuple(
            automatic_parameter(method, preset, _known(text, method, name, "space"), text)
            for name in text.texts("space")
        )
    table = text.table("space")
    if table is None or not table.names():
        raise text.error("'space' is empty; list settings and their values, or write auto", "space")
    return tuple(_parameter(table, method, preset, name) for name in table.names())


def _known(text: Table, method: Any, name: str, entry: str) -> str:
    """Return the name of a setting without its prefix `method.`, checked."""
    known = setting_names(method.Config)
    if name.removeprefix("method.") not in known:
        if name.partition(".")[0] in ("segmenter", "grid") or name in SETTABLE:
            raise text.error(
                f"'{name}' is a setting of the run, which all trials share; write it under 'set'",
                entry,
            )
        hint = nearest(name, known)
        raise text.error(f"'{name}' is not a setting of '{method.name}'; {hint}", entry)
    return name.removeprefix("method.")


def _parameter(table: Table, method: Any, preset: str, name: str) -> Parameter:
    setting = _known(table, method, name, name)
    given = table.take(name, object)
    if given == "auto":
        return automatic_parameter(method, preset, setting, table)
    kind = setting_type(method.Config, setting)

    def checked(value: Any) -> Any:
        """Return a value as the method accepts it."""
        try:
            values = {**preset_values(method.presets, preset), setting: value}
            return getattr(build_settings(method.Config, values, "method"), setting)
        except ConfigError as error:
            raise table.error(str(error).rstrip("."), name) from error

    if isinstance(given, list):
        if len(given) < 2:
            raise table.error(f"'{name}' needs at least two values", name)
        values = tuple(map(checked, given))
        if len(set(values)) < len(values):
            raise table.error(f"'{name}' repeats a value; remove it", name)
        return Parameter(setting, choices=values)
    part = table.table(name)
    if part is None:
        raise table.error(
            f"'{name}' needs values, such as [0.1, 0.3] or {{low: 0.1, high: 0.9}}", name
        )
    if kind not in (int, float):
        raise part.error(f"'{name}' is not a number; list its values")
    low, high = part.take("low", float), part.take("high", float)
    step, log = part.take("step", float, 0.0), part.take("log", bool, False)
    part.finish()
    whole = kind is int
    if not low < high:
        raise part.error(f"'{name}' has the range {low:g} to {high:g}; low must be below high")
    if log and low <= 0:
        raise part.error(f"'{name}' with log needs a low above 0, such as {high / 1000:g}")
    if log and step:
        raise part.error(f"'{name}' has both step and log; remove one")
    if not 0 <= step <= high - low:
        limit = "at least 0" if step < 0 else f"at most {high - low:g}"
        raise part.error(f"'{name}' has the step {step:g}; it must be {limit}")
    if whole and any(value != int(value) for value in (low, high, step)):
        raise part.error(f"'{name}' takes whole numbers; round low, high and step")
    for value in (low, high):
        checked(int(value) if whole else value)
    return Parameter(setting, low=low, high=high, step=step, log=log, whole=whole)


def automatic(method: Any, preset: str) -> tuple[Parameter, ...]:
    """Return the parameters of all settings that declare a range or choices.

    Raises:
        ConfigError: the method has none.
    """
    made = tuple(
        automatic_parameter(method, preset, spec.name)
        for spec in fields(method.Config)
        if spec.metadata.get("choices")
        or spec.metadata.get("low") is not None
        or setting_type(method.Config, spec.name) is bool
    )
    if not made:
        raise ConfigError(f"Method '{method.name}' declares no ranges; list settings in 'space'.")
    return made


def automatic_parameter(
    method: Any, preset: str, name: str, text: Table | None = None
) -> Parameter:
    """Return a setting's declared range, within a factor of ten of its default.

    Raises:
        ConfigError: the setting declares neither range nor choices.
    """
    spec = next(spec for spec in fields(method.Config) if spec.name == name)
    meta: Mapping[str, Any] = spec.metadata
    kind = setting_type(method.Config, name)
    if meta.get("choices") or kind is bool:
        return Parameter(name, choices=tuple(meta.get("choices") or (False, True)))
    settings = build_settings(method.Config, preset_values(method.presets, preset), "method")
    default = getattr(settings, name)
    low, high = meta.get("low"), meta.get("high")
    if low is None or high is None or kind not in (int, float):
        fault = f"'{name}' of '{method.name}' declares no range; give low and high"
        raise ConfigError(f"{fault}.") if text is None else text.error(fault)
    log = bool(meta.get("log"))
    if default > 0:
        # Six digits hide the rounding error of the division.
        if log or kind is float:
            low = max(low, float(f"{default / AUTO_FACTOR:.6g}"))
        high = min(high, float(f"{default * AUTO_FACTOR:.6g}"))
    whole = kind is int
    if whole:
        low, high = int(-(-low // 1)), int(high)
    # A logarithmic range cannot start at zero.
    return Parameter(name, low=float(low), high=float(high), log=log and low > 0, whole=whole)


def _objectives(text: Table, oracle: bool) -> tuple[str, ...]:
    written = text.take("objective", object)
    names = text.texts("objective") if isinstance(written, list) else [str(written)]
    selectors = [name for name in SELECTORS if name != "last"]
    for index, name in enumerate(names):
        known = list(COSTS) if index else [*selectors, ORACLE]
        if name == "last":
            hint = f"'last' computes no score; use one of {', '.join(selectors)}"
            raise text.error(hint, "objective")
        if name not in known:
            kind = "cost" if index else "selector"
            raise text.error(f"'{name}' is not a {kind}; {nearest(name, known)}", "objective")
    if len(set(names)) < len(names) or not names:
        raise text.error("'objective' is empty or repeats a name", "objective")
    if ORACLE in names and not oracle:
        raise text.error(
            "the objective 'oracle' reads the labels of target test cases; pass --oracle to allow "
            "it, which marks every result",
            "objective",
        )
    return tuple(names)


def _positive(text: Table, name: str, given: int | None, default: int) -> int:
    value = text.take(name, int, default)
    if given is not None:
        value = given
    if value < 1:
        raise text.error(f"'{name}' must be at least 1, not {value}", name)
    return int(value)


def _budget(text: Table, space: Sequence[Parameter], given: int | None) -> int:
    """Return the number of trials; defaults to the full grid."""
    full = prod(len(parameter.values()) for parameter in space)
    if text.take("sampler", str, "tpe") != "grid" or not full:
        full = 1
        if given is None:
            text.take("trials", int)  # required, because no grid limits the sweep
    return _positive(text, "trials", given, full)


def _contradictions(
    made: Definition, method: Any, plugins: Sequence[Path]
) -> Iterator[tuple[str, str]]:
    """Yield problems with combinations of entries, each with the entry to change."""
    selector: Any = None
    if made.selector != ORACLE:
        selector = Registry("selector", plugins).load(made.selector)
        if selector.uses_samples and not method.uses_target:
            yield (
                f"'{made.selector}' scores target images, and '{made.method}' uses none; use "
                "source_val",
                "objective",
            )
    for parameter in made.space:
        if made.sampler == "grid" and not parameter.values():
            yield (
                f"the grid needs a step or a list of values for {parameter.name}; add one, or use "
                "another sampler",
                "sampler",
            )
        if made.sampler == "cmaes" and parameter.choices:
            yield (
                f"cmaes needs numeric ranges, and {parameter.name} has a list of values; give low "
                "and high, or use tpe",
                "sampler",
            )
    if made.sampler == "cmaes" and len(made.space) < 2:
        yield "cmaes needs at least two parameters; use tpe for one", "sampler"
    if made.sampler == "cmaes" and len(made.objectives) > 1:
        yield "cmaes supports a single objective; use nsga2 or tpe", "sampler"
    if made.pruner == "none":
        return
    if len(made.objectives) > 1:
        yield "trials with several objectives cannot be pruned; use none", "pruner"
    if selector is None:
        yield "the oracle scores only finished runs, so it cannot prune; use none", "pruner"
    elif selector.uses_trajectory:
        yield (
            f"'{made.selector}' compares all checkpoints of a run, so it cannot prune; use another "
            "selector, or pruner: none",
            "pruner",
        )
    if made.pruner == "wilcoxon" and made.runs_per_trial < WILCOXON_RUNS:
        yield (
            f"wilcoxon needs at least {WILCOXON_RUNS} runs per trial, not {made.runs_per_trial}; "
            "use more seeds, or median",
            "pruner",
        )
