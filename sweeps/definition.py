"""What a sweep's YAML file says: method, task, space, objective, sampler, pruner, budget.

Everything is checked here, before a study is opened, and a complaint names the line. The form is
described in docs/sweeps.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glua_bench.config import (
    ORACLE,
    PRESETS,
    SELECTORS,
    assignment,
    build_settings,
    setting_type,
)
from glua_bench.documents import Table, nearest, read_document
from glua_bench.errors import ConfigError, UserError
from glua_bench.paths import entries, name_fault
from glua_bench.registry import Registry
from glua_bench.task import fold_name

COSTS = ("seconds",)  # of training, without the stages that trials share
SAMPLERS = ("grid", "random", "tpe", "cmaes", "nsga2")
PRUNERS = ("none", "median", "hyperband", "wilcoxon")
# An automatic range goes this far from a setting's default, within the values that it may take.
AUTO_FACTOR = 10.0
WILCOXON_RUNS = 3  # fewer pairs than this can never be told apart


@dataclass(frozen=True)
class Parameter:
    """One setting and the values that a sweep may give it.

    Attributes:
        name: of the method's setting.
        choices: the values, where they are listed; otherwise `low` to `high`.
        low: smallest value.
        high: largest value.
        step: distance of values; 0 for none.
        log: search on a logarithmic scale.
        whole: integers only.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    log: bool = False
    whole: bool = False

    def values(self) -> tuple[Any, ...]:
        """All values of a grid; empty for a range without steps."""
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
        file: where it was read.
        name: of the sweep and its study.
        title: what it asks, in a line.
        method: the method's name.
        dataset: the dataset's name.
        directions: "source-target", of every trial.
        seeds: of every trial, from 0.
        preset: of every run.
        settings: `--set` texts that all runs share.
        space: what is searched.
        objectives: a selector or `oracle` first, then costs.
        sampler: one of `SAMPLERS`.
        pruner: one of `PRUNERS`.
        trials: how many.
        seed: of the sampler.
        fold: of the dataset.
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
        """The dataset with its fold, e.g. "mmwhs_fold2"."""
        return fold_name(self.dataset, self.fold)

    @property
    def selector(self) -> str:
        """The first objective: what quality is judged by."""
        return self.objectives[0]

    @property
    def method_settings(self) -> tuple[str, ...]:
        """The `--set` texts of the method, which what was searched may need."""
        return tuple(text for text in self.settings if text.startswith("method."))

    @property
    def runs_per_trial(self) -> int:
        """Every direction with every seed."""
        return len(self.directions) * self.seeds

    def meaning(self) -> dict[str, Any]:
        """What makes two studies the same one: all but the title, the place and the budget."""
        told = asdict(self)
        for name in ("file", "title", "trials"):
            del told[name]
        told["space"] = {p.pop("name"): p for p in told["space"]}
        return told


def shipped() -> dict[str, Path]:
    """Name → file of the definitions that come with the package."""
    found = entries(Path(__file__).parent)
    return {path.stem: path for path in found if path.suffix == ".yaml"}


def find(text: str) -> Path:
    """The file of a definition that is given by its path or by the name of a shipped one.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    path, known = Path(text), shipped()
    if path.is_file():
        return path
    # `sweeps/mask_ratio.yaml`, as in a clone, is found wherever the package lies.
    if path.stem in known and path.parent.name in ("", "sweeps"):
        return known[path.stem]
    raise ConfigError(
        f"There is no sweep '{text}'; give a YAML file, or the name of one that comes with the "
        f"package: {nearest(path.stem, list(known))}."
    )


def read(file: Path, oracle: bool, plugins: Sequence[Path] = (), **changes: Any) -> Definition:
    """A definition, checked against what its method may be set to.

    Args:
        file: the YAML file.
        oracle: whether the user asked for target labels.
        plugins: files with further methods, datasets or selectors.
        changes: values from the command line in the place of the file's; None leaves the file's.

    Raises:
        ConfigError: something cannot be used; the message names the line.
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
    directions = _directions(text, dataset, changes.get("directions"))
    settings = _fixed(text, method)
    space = _space(text, method, preset, changes.get("space"))
    objectives = _objectives(text, oracle)
    made = Definition(
        file=file,
        name=name,
        title=text.take("title", str, ""),
        method=method_name,
        dataset=dataset.name,
        directions=directions,
        seeds=_positive(text, "seeds", changes.get("seeds"), 1),
        preset=preset,
        settings=settings,
        space=space,
        objectives=objectives,
        sampler=text.choice("sampler", SAMPLERS, "tpe"),
        pruner=text.choice("pruner", PRUNERS, "none"),
        trials=_budget(text, space, changes.get("trials")),
        seed=text.take("seed", int, 0),
        fold=fold,
    )
    text.finish()
    _agree(text, made, plugins)
    return made


def _dataset(text: Table, changes: Mapping[str, Any], plugins: Sequence[Path]) -> tuple[Any, int]:
    """The dataset's class and its fold; the file's fold is one of the file's dataset."""
    given = changes.get("dataset")
    name, written = given or text.take("dataset", str), text.take("fold", int, 1)
    text.take("dataset", str, "")
    asked = changes.get("fold") or (1 if given else written)
    name, fold = Registry("dataset", plugins).fold_of(name, asked)
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
    told = known if written == "all" else text.texts("directions", known[:1])
    if given:
        told = known if list(given) == ["all"] else list(given)
    for direction in told:
        if direction not in known:
            raise text.error(
                f"'{direction}' is no direction of '{dataset.name}'; {nearest(direction, known)}",
                "directions",
            )
    return tuple(dict.fromkeys(told))


def _fixed(text: Table, method: Any) -> tuple[str, ...]:
    """`--set` texts of what all runs share."""
    table = text.table("set")
    if table is None:
        return ()
    made = []
    for name in table.names():
        value = table.take(name, object)
        if "." not in name and name in {spec.name for spec in fields(method.Config)}:
            name = f"method.{name}"
        made.append(assignment(name, value))
    return tuple(made)


def _space(text: Table, method: Any, preset: str, given: str | None) -> tuple[Parameter, ...]:
    """The parameters, as written or from the settings' own ranges."""
    if given is not None and given != "auto":
        raise ConfigError(f"--space {given} is unknown; give auto, or leave it out.")
    written = text.take("space", object, None)
    if given == "auto" or written == "auto":
        return automatic(method, preset)
    if isinstance(written, list):  # names alone: their own ranges
        return tuple(
            automatic_parameter(method, preset, _known(text, method, name), text)
            for name in text.texts("space")
        )
    table = text.table("space")
    if table is None or not table.names():
        raise text.error("'space' is empty; name settings and their values, or write auto", "space")
    return tuple(_parameter(table, method, preset, name) for name in table.names())


def _known(text: Table, method: Any, name: str, place: str | None = None) -> str:
    known = [spec.name for spec in fields(method.Config)]
    if name.removeprefix("method.") not in known:
        raise text.error(
            f"'{name}' is no setting of '{method.name}'; {nearest(name, known)}", place or "space"
        )
    return name.removeprefix("method.")


def _parameter(table: Table, method: Any, preset: str, name: str) -> Parameter:
    setting = _known(table, method, name, name)
    given = table.take(name, object)
    if given == "auto":
        return automatic_parameter(method, preset, setting, table)
    kind = setting_type(method.Config, setting)
    if isinstance(given, list):
        if len(given) < 2:
            raise table.error(f"'{name}' needs two values or more to choose from", name)
        values = tuple(_checked(table, method, preset, setting, name, value) for value in given)
        if len(set(values)) < len(values):
            raise table.error(f"'{name}' lists a value twice; keep one", name)
        return Parameter(setting, choices=values)
    part = table.table(name)
    if part is None:
        raise table.error(f"'{name}' needs values, as [0.1, 0.3] or {{low: 0.1, high: 0.9}}", name)
    if kind not in (int, float):
        raise part.error(f"'{name}' is no number, so its values must be listed")
    low, high = part.take("low", float), part.take("high", float)
    step, log = part.take("step", float, 0.0), part.take("log", bool, False)
    part.finish()
    if not low < high:
        raise part.error(f"'{name}' has no value from {low:g} to {high:g}; low must be below high")
    if log and low <= 0:
        raise part.error(f"'{name}' with log needs a low above 0, such as {high / 1000:g}")
    if log and step:
        raise part.error(f"'{name}' has a step and log, which contradict; keep one")
    if step < 0 or step > high - low:
        raise part.error(
            f"'{name}' has a step of {step:g}, which leaves one value; make it smaller"
        )
    whole = kind is int
    if whole and any(value != int(value) for value in (low, high, step)):
        raise part.error(f"'{name}' takes whole numbers; round low, high and step")
    for value in (low, high):
        _checked(table, method, preset, setting, name, int(value) if whole else value)
    return Parameter(setting, low=low, high=high, step=step, log=log, whole=whole)


def _checked(table: Table, method: Any, preset: str, setting: str, name: str, value: Any) -> Any:
    """A value as the method takes it."""
    try:
        values = {**method.presets.get(preset, {}), setting: value}
        return getattr(build_settings(method.Config, values, "method"), setting)
    except ConfigError as error:
        raise table.error(str(error).rstrip("."), name) from error


def automatic(method: Any, preset: str) -> tuple[Parameter, ...]:
    """Every setting of a method that has a range or choices.

    Raises:
        ConfigError: the method has none.
    """
    made = []
    for spec in fields(method.Config):
        if spec.metadata.get("choices") or spec.metadata.get("low") is not None:
            made.append(automatic_parameter(method, preset, spec.name))
        elif setting_type(method.Config, spec.name) is bool:
            made.append(Parameter(spec.name, choices=(False, True)))
    if not made:
        raise ConfigError(f"Method '{method.name}' has nothing to search; write a space by hand.")
    return tuple(made)


def automatic_parameter(
    method: Any, preset: str, name: str, text: Table | None = None
) -> Parameter:
    """The range of one setting: what it may be, within a factor of ten of its default.

    Raises:
        ConfigError: the setting has neither range nor choices.
    """
    spec = next(spec for spec in fields(method.Config) if spec.name == name)
    meta: Mapping[str, Any] = spec.metadata
    if meta.get("choices"):
        return Parameter(name, choices=tuple(meta["choices"]))
    kind = setting_type(method.Config, name)
    if kind is bool:
        return Parameter(name, choices=(False, True))
    default = getattr(build_settings(method.Config, method.presets.get(preset, {}), "method"), name)
    low, high = meta.get("low"), meta.get("high")
    if low is None or high is None or kind not in (int, float):
        fault = f"'{name}' of '{method.name}' has no range of its own; write low and high"
        raise ConfigError(f"{fault}.") if text is None else text.error(fault)
    log = bool(meta.get("log"))
    if default > 0:
        low = max(low, _round(default / AUTO_FACTOR)) if log or kind is float else low
        high = min(high, _round(default * AUTO_FACTOR))
    if log and low <= 0:  # nothing says where zero ends on a logarithmic scale
        log = False
    whole = kind is int
    if whole:
        low, high = int(-(-low // 1)), int(high)
    return Parameter(name, low=float(low), high=float(high), log=log, whole=whole)


def _round(value: float) -> float:
    """Without the last digits of a division."""
    return float(f"{value:.6g}")


def _objectives(text: Table, oracle: bool) -> tuple[str, ...]:
    written = text.take("objective", object)
    names = text.texts("objective") if isinstance(written, list) else [str(written)]
    judges = [name for name in SELECTORS if name != "last"]
    for index, name in enumerate(names):
        known = list(COSTS) if index else [*judges, ORACLE]
        if name == "last":
            raise text.error(
                f"'last' judges nothing, it takes the last checkpoint; use one of "
                f"{', '.join(judges)}",
                "objective",
            )
        if name not in known:
            what = "cost" if index else "selector"
            raise text.error(f"'{name}' is no {what}; {nearest(name, known)}", "objective")
    if len(set(names)) < len(names) or not names:
        raise text.error("'objective' names nothing, or a thing twice", "objective")
    if ORACLE in names and not oracle:
        raise text.error(
            "the objective 'oracle' reads the labels of target test cases; add --oracle to allow "
            "it, which is stamped on every result",
            "objective",
        )
    return tuple(names)


def _positive(text: Table, name: str, given: int | None, default: int) -> int:
    value = text.take(name, int, default)
    if given is not None:
        value = given
    if value < 1:
        raise text.error(f"'{name}' must be 1 or more, not {value}", name)
    return int(value)


def _budget(text: Table, space: Sequence[Parameter], given: int | None) -> int:
    """Return the number of trials; defaults to the full grid."""
    combinations = 1
    for parameter in space:
        combinations *= len(parameter.values())
    grid = text.take("sampler", str, "tpe") == "grid" and combinations
    default = combinations if grid else None
    if given is None and default is None:
        text.take("trials", int)  # without a grid nothing else says when to end
    return _positive(text, "trials", given, default or 1)


def _agree(text: Table, made: Definition, plugins: Sequence[Path]) -> None:
    """Refuse what contradicts itself."""
    method: Any = Registry("method", plugins).load(made.method)
    judge: Any = None
    if made.selector != ORACLE:
        judge = Registry("selector", plugins).load(made.selector)
    if judge is not None and judge.uses_samples and not method.uses_target:
        raise text.error(
            f"'{made.selector}' judges by target images, and '{made.method}' sees none; use "
            "source_val",
            "objective",
        )
    if made.sampler == "grid":
        for parameter in made.space:
            if not parameter.values():
                raise text.error(
                    f"the grid cannot list {parameter.name} from {parameter.low:g} to "
                    f"{parameter.high:g}; give a step or a list of values, or another sampler",
                    "sampler",
                )
    if made.sampler == "cmaes":
        for parameter in made.space:
            if parameter.choices:
                raise text.error(
                    f"cmaes searches numbers, and {parameter.name} has a list of values; give it "
                    "low and high, or use tpe",
                    "sampler",
                )
        if len(made.space) < 2:
            raise text.error("cmaes needs two parameters or more; use tpe for one", "sampler")
    if len(made.objectives) > 1:
        if made.pruner != "none":
            raise text.error("a sweep with several objectives cannot prune; use none", "pruner")
        if made.sampler == "cmaes":
            raise text.error("cmaes has one objective; use nsga2 or tpe", "sampler")
    if made.pruner != "none":
        if judge is None:
            raise text.error(
                "the oracle scores finished runs, so nothing is pruned by it; use none", "pruner"
            )
        if judge.uses_trajectory:
            raise text.error(
                f"'{made.selector}' compares all checkpoints of a run, so it cannot prune one that "
                "is not finished; use another selector, or pruner: none",
                "pruner",
            )
    if made.pruner == "wilcoxon" and made.runs_per_trial < WILCOXON_RUNS:
        raise text.error(
            f"wilcoxon compares the runs of two trials in pairs, and {made.runs_per_trial} a trial "
            f"are too few; take {WILCOXON_RUNS} seeds or more, or median",
            "pruner",
        )
