"""The configuration of a run.

`RunConfig` is complete: runs with the same configuration, data and code are the same run.
Settings are frozen dataclasses whose field metadata hold help text and allowed values, which the
command line, validation and sweeps share.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from glua_bench.documents import WORDS, dump, dump_line, load, nearest
from glua_bench.errors import ConfigError, without_password
from glua_bench.task import LONGER, Grid, fold_name

AUGMENTATIONS = ("none", "geometric", "photometric")
# Lower and upper bound of a comparison; the upper one is also a scenario.
LOWER, UPPER = "source_only", "supervised"
# Predictions of another tool; the second if it was trained on labels of the target.
EXTERNAL, EXTERNAL_UPPER = "external", "external, privileged"
SCENARIOS = ("uda", UPPER, EXTERNAL, EXTERNAL_UPPER)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# Built-in selectors, in the order of tables; reported results use the first.
SELECTORS = (
    "last",
    "source_val",
    "entropy",
    "im",
    "snd",
    "dev",
    "bnm",
    "class_ami",
    "class_silhouette",
    "agreement",
)
# Fields of `RunConfig` that `--set NAME=VALUE` accepts.
SETTABLE = {
    "augmentation",
    "batch_size",
    "candidates",
    "perturbation",
    "precision",
    "slice_distance",
    "slices",
    "steps",
}
# Those of a run without --selectors, chosen by cost (docs/protocol.md#cost-of-selectors).
DEFAULT_SELECTORS = ("last", "source_val", "im", "bnm")
ORACLE = "oracle"  # the checkpoint of the best score on labelled test cases: privileged


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    log: bool = False,
) -> Any:
    """Return a dataclass field with help text and allowed values.

    Args:
        default: default value.
        help: meaning of the setting in a phrase, with its unit.
        low: smallest allowed value.
        high: largest allowed value.
        choices: allowed values, if they can be listed.
        log: whether sweeps should search on a logarithmic scale.
    """
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "choices": choices, "log": log},
    )


@dataclass(frozen=True)
class SegmenterSpec:
    """The segmentation network, the same for every method of a comparison."""

    name: str = setting(
        "unet",
        "'unet'; 'timm:<encoder>', a timm encoder with a U-Net decoder; 'deeplab' or "
        "'deeplab:<resnet>', a dilated ResNet of timm",
    )
    width: int = setting(32, "channels at full resolution (doubled at each level)", low=4, high=256)
    depth: int = setting(5, "number of resolutions of the U-Net", low=3, high=7)
    pretrained: bool = setting(False, "load timm's weights for the encoder (needs a network)")
    dilations: int = setting(
        4,
        "number of deeplab's four dilated convolutions to sum; the published code sums 2",
        choices=(2, 4),
    )


@dataclass(frozen=True)
class RunConfig:
    """One run of one method on one direction of one dataset with one seed."""

    method: str
    dataset: str
    direction: str
    grid: Grid
    method_config: Mapping[str, Any] = field(default_factory=dict)
    segmenter: SegmenterSpec = field(default_factory=SegmenterSpec)
    scenario: str = setting(
        "uda",
        "'uda', or 'supervised': labelled target-train cases serve as source (privileged); "
        "'external' or 'external, privileged': imported predictions",
        choices=SCENARIOS,
    )
    preset: str = "quick"
    fold: int = setting(1, "the dataset's fold; 1 is its default split", low=1, high=10_000)
    seed: int = setting(0, "random seed", low=0, high=2**31 - 1)
    perturbation: int = setting(
        0,
        "0, or a seed for moving every initial weight to a neighbouring float",
        low=0,
        high=2**31 - 1,
    )
    steps: int = setting(600, "updates of the segmenter", low=1, high=10_000_000)
    batch_size: int = setting(8, "images per domain and step", low=1, high=4096)
    slices: int = setting(
        1, "input slices of the network, of which the middle one is labelled", choices=(1, 3, 5, 7)
    )
    slice_distance: float | None = setting(
        None,
        "mm between input slices; by default that of the grid or of the domain with thicker slices",
        low=0.01,
        high=1000,
    )
    augmentation: str = setting(
        "geometric", "augmentation policy of all methods", choices=AUGMENTATIONS
    )
    precision: str = setting(
        "32-true", "floating-point precision of the forward pass", choices=PRECISIONS
    )
    candidates: int = setting(
        5, "number of checkpoints that selectors choose from", low=1, high=1000
    )
    selectors: tuple[str, ...] = DEFAULT_SELECTORS

    def __post_init__(self) -> None:
        check(self)
        for name, value in self.method_config.items():
            if isinstance(value, str) and without_password(value, whole=True) != value:
                raise ConfigError(
                    f"method.{name} contains a password, which every record of the run would show; "
                    "pass it in an environment variable that the method reads."
                )
        if self.slices == 1 and self.slice_distance is not None:
            raise ConfigError(
                f"slice_distance = {self.slice_distance} has no effect with slices = 1; set slices "
                "to 3, 5 or 7, or remove slice_distance."
            )

    @property
    def fold_name(self) -> str:
        """The dataset with its fold, e.g. "mmwhs_fold2"."""
        return fold_name(self.dataset, self.fold)

    @property
    def source(self) -> str:
        """Name of the source domain."""
        return self.direction.split("-")[0]

    @property
    def target(self) -> str:
        """Name of the target domain."""
        return self.direction.split("-")[1]

    @property
    def privileged(self) -> bool:
        """True if training reads labels of the target domain."""
        return self.scenario in (UPPER, EXTERNAL_UPPER)

    @property
    def external(self) -> bool:
        """True for imported predictions, of whose training only `STATED` is known."""
        return self.scenario in (EXTERNAL, EXTERNAL_UPPER)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain lists, numbers and strings, for YAML and JSON.

        Of imported predictions, the fields `STATED` only.
        """
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: values[name] for name in STATED} if self.external else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build a configuration from the values that `to_dict` returns.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("The configuration is not a mapping of names to values.")
        values = dict(values)
        _reject_unknown(cls, values)
        if values.get("scenario") in (EXTERNAL, EXTERNAL_UPPER):
            values = {**_UNSTATED, **{name: values[name] for name in STATED if name in values}}
        try:
            values["grid"] = build_settings(Grid, values["grid"], "grid")
            values["segmenter"] = build_settings(SegmenterSpec, values["segmenter"], "segmenter")
            values["selectors"] = tuple(values["selectors"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"The configuration is incomplete ({error}).") from error

    def to_yaml(self) -> str:
        """Return the configuration as YAML text."""
        return dump(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> RunConfig:
        """Build a configuration from the text that `to_yaml` returns."""
        return cls.from_dict(load(text))


# All that is known of imported predictions. The other fields have no meaning for them, and are
# neither written nor shown.
STATED = ("method", "dataset", "direction", "scenario", "fold", "seed")
_UNSTATED = {"grid": {"size": 32, "spacing": 1.0}, "segmenter": {}, "selectors": (EXTERNAL,)}


def external_entry(name: str, privileged: bool = False) -> str:
    """Return the name of imported predictions in tables, with their stamp.

    Example:
        >>> external_entry("nnunet"), external_entry("nnunet", privileged=True)
        ('nnunet (external)', 'nnunet (external, privileged)')
    """
    return f"{name} ({EXTERNAL_UPPER if privileged else EXTERNAL})"


def is_external(entry: str) -> bool:
    """Return True for an entry of imported predictions."""
    return entry.endswith((f" ({EXTERNAL})", f" ({EXTERNAL_UPPER})"))


def is_privileged(entry: str) -> bool:
    """Return True for an entry that was trained on target labels, by its name."""
    return entry == UPPER or entry.endswith(f" ({EXTERNAL_UPPER})")


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to the names that `--set` takes, e.g. "grid.size", "method.lr".

    Args:
        values: result of `RunConfig.to_dict`, or a part of it.
        prefix: prepended to every name.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            group = "method" if prefix == "" and name == "method_config" else name
            flat.update(flat_settings(value, f"{prefix}{group}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def changed_settings(config: RunConfig, method: Any) -> dict[str, Any]:
    """Return the method's settings that differ from its defaults under the run's preset.

    Settings that the method no longer has are included.

    Args:
        config: configuration of the run.
        method: the method class, whose `Config` and `presets` define the defaults.
    """
    values = preset_values(method.presets, config.preset)
    defaults = dataclasses.asdict(build_settings(method.Config, values, "method"))
    settings = config.method_config.items()
    return {name: v for name, v in settings if name not in defaults or v != defaults[name]}


def variant_name(config: RunConfig, method: Any) -> str:
    """Return the name under which `method.variants()` lists the run's settings, or "".

    Args:
        config: configuration of the run.
        method: the method class.
    """
    for name, changes in method.variants().items():
        values = {**preset_values(method.presets, config.preset), **changes}
        settings = dataclasses.asdict(build_settings(method.Config, values, "method"))
        if settings == dict(config.method_config):
            return str(name)
    return ""


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "steps": 500,
        "batch_size": 8,
        "segmenter": {"name": "unet", "width": 8, "depth": 4},
    },
    "benchmark": {
        "steps": 8000,
        "batch_size": 8,
        "segmenter": {"name": "unet", "width": 8, "depth": 4},
    },
    "standard": {
        "steps": 4000,
        "batch_size": 8,
        "segmenter": {"name": "unet", "width": 24, "depth": 5},
    },
    "paper": {
        "steps": 20_000,
        "batch_size": 8,
        "segmenter": {"name": "unet", "width": 32, "depth": 5},
    },
}


def preset_values(table: Mapping[str, Mapping[str, Any]], preset: str) -> Mapping[str, Any]:
    """Return a method's settings under a preset; empty where it has none.

    Args:
        table: the method's `presets`.
        preset: name of the preset; one that only trains longer uses the settings of its original.

    Example:
        >>> preset_values({"quick": {"width": 8}}, "benchmark")
        {'width': 8}
    """
    return table.get(preset, table.get(LONGER.get(preset, ""), {}))


def check(settings: Any, prefix: str = "") -> None:
    """Validate every field of a settings dataclass by its type and metadata.

    Raises:
        ConfigError: a value has the wrong type, is out of range or is not among the choices.
    """
    hints = typing.get_type_hints(type(settings))
    for spec in fields(settings):
        value, meta = getattr(settings, spec.name), spec.metadata
        name = f"{prefix}{spec.name}"
        kind, optional = _kind(hints[spec.name])
        if kind in _PLAIN and not (_is_instance(value, kind) or (value is None and optional)):
            raise _wrong_type(name, value, kind)
        if meta.get("choices") is not None and value not in meta["choices"]:
            raise ConfigError(
                f"{name} = {value!r} is invalid; choose one of "
                f"{', '.join(map(str, meta['choices']))}."
            )
        low, high = meta.get("low"), meta.get("high")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            # NaN fails every comparison, so it never counts as inside.
            inside = (low is None or value >= low) and (high is None or value <= high)
            if not inside or value != value:
                raise ConfigError(
                    f"{name} = {value} is out of range; give a value from "
                    f"{'-inf' if low is None else low} to {'inf' if high is None else high}."
                )


def _reject_unknown(cls: type, values: Mapping[str, Any], prefix: str = "") -> None:
    known = sorted(spec.name for spec in fields(cls))
    for name in values:
        if name not in known:
            hint = nearest(name, known, prefix)
            raise ConfigError(f"Unknown setting '{prefix}{name}'; {hint}.")


def build_settings(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Build a settings dataclass from a mapping of names to values.

    Args:
        cls: frozen dataclass.
        values: field name to value; strings are converted to the field's type.
        prefix: name of the group in error messages, e.g. "method".

    Raises:
        ConfigError: unknown name (the closest match is suggested), wrong type, or out of range.
    """
    _reject_unknown(cls, values, f"{prefix}.")
    hints = typing.get_type_hints(cls)
    built = cls(**{n: _convert(value, hints[n], f"{prefix}.{n}") for n, value in values.items()})
    check(built, f"{prefix}.")
    return built


def setting_type(cls: type, name: str) -> Any:
    """Return the type of a setting without `None`: bool, int, float or str."""
    return _kind(typing.get_type_hints(cls)[name])[0]


def setting_names(cls: type) -> list[str]:
    """Return the names of the settings of a dataclass, e.g. of a method's `Config`."""
    return [spec.name for spec in fields(cls)]


def settable(own: Collection[str] = ()) -> list[str]:
    """Return the names that `--set` accepts, e.g. "method.lr", "steps", "grid.size".

    Args:
        own: names of the method's settings.
    """
    known = [f"method.{each}" for each in own] + sorted(SETTABLE)
    for group, cls in (("segmenter", SegmenterSpec), ("grid", Grid)):
        known += [f"{group}.{each}" for each in setting_names(cls)]
    return known


def unknown_setting(name: str, own: Collection[str]) -> str:
    """Return a hint for a name that `--set` does not accept.

    A setting of the same name in another group comes first, e.g. `method.mask_ratio` for
    `mask_ratio`, and `steps` for `method.steps`.

    Args:
        name: the unknown name.
        own: names of the method's settings.

    Example:
        >>> unknown_setting("mask_ratio", ["mask_ratio"]).partition("?")[0]
        "did you mean 'method.mask_ratio'"
    """
    known = settable(own)
    last = [each.rpartition(".")[2] for each in known]
    bare = name.rpartition(".")[2]
    found = [each for each, end in zip(known, last, strict=True) if end == bare]
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    for near in [] if found else difflib.get_close_matches(bare, last, n=1, cutoff=0.6):
        found = [known[last.index(near)]]
    if found:
        return f"did you mean '{found[0]}'? `glua-bench list methods -v` lists all"
    return f"known: {', '.join(known)}"


def parse_overrides(
    assignments: list[str], own: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Parse the arguments of `--set` and group them.

    Args:
        assignments: e.g. ["method.lr=0.001", "steps=100", "segmenter.width=8"].
        own: names of the method's settings, to refuse unknown names; None accepts any name.

    Returns:
        {"run": {...}, "method": {...}, "segmenter": {...}, "grid": {...}}.

    Raises:
        ConfigError: an argument without "=", an unknown group or name, or a value that is not valid
            YAML.
    """
    groups: dict[str, dict[str, Any]] = {"run": {}, "method": {}, "segmenter": {}, "grid": {}}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text} is not of the form name=value.")
        whole = key.strip()
        if own is not None and whole not in settable(own):
            raise ConfigError(f"Unknown setting '{whole}' (--set); {unknown_setting(whole, own)}.")
        group, dot, name = whole.partition(".")
        if not dot:
            group, name = "run", group
        if group not in groups or (group == "run" and dot):
            raise ConfigError(
                f"--set {text}: unknown group '{group}'; write method.NAME, segmenter.NAME, "
                "grid.NAME or a run option such as steps."
            )
        try:
            groups[group][name] = load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {text}: the value cannot be parsed; quote it.") from error
    return groups


def assignment(name: str, value: Any) -> str:
    """Format a setting as an argument of `--set` that `parse_overrides` can parse.

    Args:
        name: e.g. "method.lr".
        value: a number, a string, a list of them, or None.
    """
    try:
        read = load(str(value))
    except (yaml.YAMLError, ValueError):
        read = None
    same = type(read) is type(value) and read == value
    return f"{name}={value if same else dump_line(value)}"


_PLAIN = (bool, int, float, str)


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return a type without `None`, and whether it includes `None`."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    options = typing.get_args(hint)
    return next(o for o in options if o is not type(None)), type(None) in options


def _is_instance(value: Any, kind: type) -> bool:
    """Return True if a value has a plain type; bool is not an int here, but int is a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _convert(value: Any, hint: Any, name: str) -> Any:
    kind, optional = _kind(hint)
    if value is None and optional:
        return None
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # strings may contain numbers
            return float(value)
        except (ValueError, OverflowError):
            raise _wrong_type(name, value, kind) from None
    if kind is bool and isinstance(value, str) and value.lower() in WORDS:
        return WORDS[value.lower()]
    if kind in _PLAIN and _is_instance(value, kind):
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    raise _wrong_type(name, value, kind)


def _wrong_type(name: str, value: Any, kind: Any) -> ConfigError:
    return ConfigError(
        f"{name} = {value!r} has the wrong type; give a value of type "
        f"{getattr(kind, '__name__', kind)}."
    )
