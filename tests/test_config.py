"""config.py: valid and invalid settings, and the identity of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glua_bench.config import (
    AUGMENTATIONS,
    PRECISIONS,
    PRESETS,
    RunConfig,
    SegmenterSpec,
    assignment,
    build_settings,
    changed_settings,
    parse_overrides,
    preset_values,
    setting,
    variant_name,
)
from glua_bench.errors import ConfigError
from glua_bench.identity import digest, identity
from glua_bench.registry import Registry
from glua_bench.task import Grid

CONFIG = RunConfig("m", "d", "a-b", Grid(64, 2.0), {"rate": 0.1}, steps=5)


def one_sentence(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


# -- the whole configuration, written and read ----------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
values = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | words
values |= st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    RunConfig,
    method=words,
    dataset=words,
    direction=st.just("a-b"),
    grid=st.builds(
        Grid,
        st.integers(32, 512),
        st.floats(0.1, 10),
        st.none() | st.floats(0.1, 10),
    ),
    method_config=st.dictionaries(words, values, max_size=4),
    segmenter=st.builds(
        SegmenterSpec, words, st.integers(4, 256), st.integers(3, 7), st.booleans()
    ),
    scenario=st.sampled_from(("uda", "supervised")),
    preset=words,
    seed=st.integers(0, 2**31 - 1),
    steps=st.integers(1, 10**7),
    batch_size=st.integers(1, 4096),
    augmentation=st.sampled_from(AUGMENTATIONS),
    precision=st.sampled_from(PRECISIONS),
    candidates=st.integers(1, 1000),
    slices=st.sampled_from([3, 5, 7]),
    slice_distance=st.none() | st.floats(0.01, 1000),
    selectors=st.lists(words, max_size=3).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(configs)
def test_what_is_written_is_read_back(config: RunConfig) -> None:
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert identity(RunConfig.from_yaml(config.to_yaml()), "x", "y") == identity(config, "x", "y")


@pytest.mark.parametrize("text", ["", "just text", "- 1\n- 2", "3"])
def test_a_file_that_holds_no_table_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml(text)
    one_sentence(error)


@pytest.mark.parametrize("missing", ["method", "grid", "segmenter", "selectors"])
def test_a_table_that_lacks_something_is_refused(missing: str) -> None:
    kept = {name: value for name, value in CONFIG.to_dict().items() if name != missing}
    with pytest.raises(ConfigError, match=missing) as error:
        RunConfig.from_dict(kept)
    one_sentence(error)


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'stepps'.*did you mean 'steps'"):
        RunConfig.from_dict({**CONFIG.to_dict(), "stepps": 3})
    with pytest.raises(ConfigError, match=r"'grid\.sise'.*did you mean 'grid\.size'"):
        RunConfig.from_dict({**CONFIG.to_dict(), "grid": {"sise": 64, "spacing": 1.0}})


def test_a_configuration_of_before_sees_one_slice() -> None:
    older = CONFIG.to_dict()
    del older["slices"], older["slice_distance"]
    assert RunConfig.from_dict(older) == CONFIG and CONFIG.slices == 1


@pytest.mark.parametrize("scenario", ["external", "external, privileged"])
def test_of_imported_predictions_only_what_is_known_is_written(scenario: str) -> None:
    """A budget, a grid or a network that nobody stated must not stand in config.yaml."""
    stated = {"method": "nnunet", "dataset": "d", "direction": "a-b", "scenario": scenario}
    config = RunConfig.from_dict({**stated, "fold": 2, "seed": 3})
    assert config.external and config.privileged == (scenario != "external")
    assert config.to_dict() == {**stated, "fold": 2, "seed": 3}
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert not CONFIG.external and "steps" in CONFIG.to_dict()


def test_domains_and_privilege_follow_from_direction_and_scenario() -> None:
    assert (CONFIG.source, CONFIG.target, CONFIG.privileged) == ("a", "b", False)
    assert replace(CONFIG, scenario="supervised").privileged


BAD: dict[str, tuple[Any, ...]] = {
    "method": (None, 3),
    "seed": (-1, 2**31, 1.0, "1", True, None),
    "steps": (0, -3, 10**8, 1.5, "10", True, None, math.nan),
    "batch_size": (0, 5000, 2.0, False),
    "candidates": (0, 1001, "5"),
    "slices": (0, 2, 4, 9, -1, 3.0, "3", True, None),
    "slice_distance": (0, -1.0, math.nan, "8", 2.0),  # the last one needs several slices
    "scenario": ("oracle", None, 1, ["uda"]),
    "augmentation": ("", "Geometric", {}, True),
    "precision": ("32", 32, None),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, bad in BAD.items() for v in bad])
def test_every_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, **{name: value})
    assert one_sentence(error).startswith(f"{name} = ")
    with pytest.raises(ConfigError):
        RunConfig.from_dict({**CONFIG.to_dict(), name: value})


@pytest.mark.parametrize(
    "grid",
    [
        {"size": 31, "spacing": 1.0},
        {"size": 64.0, "spacing": 1.0},
        {"size": 64, "spacing": 0},
        {"size": 64, "spacing": -1.0},
        {"size": 64, "spacing": "wide"},
        {"size": 64, "spacing": ".nan"},
        {"size": 64, "spacing": 1.0, "slice_spacing": 0.0},
    ],
)
def test_impossible_grids_are_refused(grid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^grid\.") as error:
        build_settings(Grid, grid, "grid")
    one_sentence(error)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_possible(preset: str) -> None:
    given = dict(PRESETS[preset])
    segmenter = build_settings(SegmenterSpec, given.pop("segmenter"), "segmenter")
    assert replace(CONFIG, preset=preset, segmenter=segmenter, **given).steps > 0


def test_benchmark_trains_the_network_of_quick_for_longer() -> None:
    quick, benchmark = dict(PRESETS["quick"]), dict(PRESETS["benchmark"])
    assert benchmark.pop("steps") > quick.pop("steps")
    assert benchmark == quick
    own = {"quick": {"width": 8}, "paper": {"width": 64}}
    assert preset_values(own, "benchmark") == preset_values(own, "quick") == {"width": 8}
    assert preset_values(own, "standard") == {}
    assert preset_values({**own, "benchmark": {"width": 9}}, "benchmark") == {"width": 9}
    phantom = Registry("dataset").load("phantom")()
    assert phantom.grid("benchmark") == phantom.grid("quick") != phantom.grid("paper")


# -- settings of a plugin -------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Settings of all types."""

    rate: float = setting(0.5, "a rate", low=1e-6, high=1.0, log=True)
    count: int = setting(3, "a number", low=1, high=9)
    form: str = setting("topk", "a choice", choices=("topk", "soft"))
    ratios: tuple[float, ...] = setting((0.1, 0.2), "several")
    flag: bool = setting(False, "a switch")
    limit: float | None = setting(None, "a bound or none", low=0.0)
    free: float = setting(0.0, "any number")


def test_values_arrive_with_their_types() -> None:
    built = build_settings(
        Settings,
        {"rate": 1, "count": 4, "form": "soft", "ratios": [0.3], "flag": True, "limit": 2},
        "method",
    )
    assert built == Settings(1.0, 4, "soft", (0.3,), True, 2.0)
    assert type(built.rate) is float and type(built.limit) is float
    assert build_settings(Settings, {}, "method") == Settings()
    assert build_settings(Settings, {"limit": None}, "method").limit is None


@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "1.0e-4", "+1e-4"])
def test_scientific_notation_is_a_number(text: str) -> None:
    given = parse_overrides([f"method.rate={text}"])["method"]
    assert given["rate"] == pytest.approx(1e-4)
    assert build_settings(Settings, {"rate": text}, "method").rate == pytest.approx(1e-4)
    assert build_settings(Settings, given, "method").rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 0),
        ("rate", 1.1),
        ("rate", math.nan),
        ("rate", "nan"),
        ("rate", math.inf),
        ("rate", True),
        ("rate", None),
        ("rate", "fast"),
        ("rate", [0.1]),
        ("rate", 10**400),
        ("count", 0),
        ("count", 10),
        ("count", 2.0),
        ("count", "2"),
        ("count", True),
        ("form", "hard"),
        ("form", 1),
        ("form", None),
        ("flag", 1),
        ("flag", "true"),
        ("flag", None),
        ("ratios", 0.1),
        ("ratios", "0.1"),
        ("limit", -0.1),
        ("limit", math.nan),
        ("free", math.nan),
        ("limit", "none"),
    ],
)
def test_a_bad_value_of_a_plugin_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        build_settings(Settings, {name: value}, "method")
    assert one_sentence(error).startswith(f"method.{name} = ")


def test_an_unknown_setting_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as error:
        build_settings(Settings, {"cuont": 3}, "method")
    text = one_sentence(error)
    assert "'method.cuont'" in text and "did you mean 'method.count'" in text
    assert all(spec.name in text for spec in fields(Settings))


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1.0), st.integers(1, 9), st.booleans())
def test_settings_survive_a_round_trip(rate: float, count: int, flag: bool) -> None:
    built = Settings(rate, count, flag=flag)
    text = yaml.safe_dump(asdict(replace(built, ratios=[0.25])))
    again = build_settings(Settings, yaml.safe_load(text), "method")
    assert again == replace(built, ratios=(0.25,))


# -- --set ----------------------------------------------------------------------------------------


def test_assignments_go_to_their_groups() -> None:
    found = parse_overrides(
        [
            "steps=100",
            "method.ratio=0.3",
            "method.form=soft",
            "segmenter.name=timm:resnet18",
            "segmenter.pretrained=true",
            "grid.slice_spacing=null",
            "method.path=a=b",
            "method.ratio=0.4",
        ]
    )
    assert found == {
        "run": {"steps": 100},
        "method": {"ratio": 0.4, "form": "soft", "path": "a=b"},
        "segmenter": {"name": "timm:resnet18", "pretrained": True},
        "grid": {"slice_spacing": None},
    }
    assert parse_overrides([]) == {"run": {}, "method": {}, "segmenter": {}, "grid": {}}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("count=1e0", "count", 1),
        ("count=008", "count", 8),
        ("flag=yes", "flag", True),
        ("flag=Off", "flag", False),
        ("limit=null", "limit", None),
        ("form=soft", "form", "soft"),
    ],
)
def test_an_assignment_means_what_its_setting_is(text: str, name: str, value: Any) -> None:
    given = parse_overrides([f"method.{text}"])["method"]
    found = getattr(build_settings(Settings, given, "method"), name)
    assert found == value and type(found) is type(value)


@given(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["no", "1e4", "010", "null", "[a", "a: b", " x "])
    | st.lists(st.floats(0, 1), max_size=3)
)
def test_what_an_assignment_says_is_read_back(value: Any) -> None:
    found = parse_overrides([assignment("method.x", value)])["method"]["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["", "steps", "=3", "method.ratio", "net.width=3", "run.steps=3", "method.x=[1", "steps={"],
)
def test_an_assignment_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_overrides([text])
    assert f"--set {text}" in one_sentence(error)


# -- the identity ---------------------------------------------------------------------------------

OTHER: Mapping[str, Any] = {
    "method": "other",
    "dataset": "other",
    "direction": "b-a",
    "grid": Grid(64, 2.0, 3.0),
    "method_config": {"rate": 0.2},
    "segmenter": SegmenterSpec("timm:other"),
    "scenario": "supervised",
    "fold": 2,
    "seed": 1,
    "perturbation": 1,
    "steps": 6,
    "batch_size": 7,
    "augmentation": "photometric",
    "precision": "bf16-mixed",
    "candidates": 3,
    "slices": 5,
    "slice_distance": 8.0,
}
NO_PART = {"preset": "other", "selectors": ("other",)}


def test_the_identity_follows_everything_that_could_change_a_result() -> None:
    names = {spec.name for spec in fields(RunConfig)}
    assert {*OTHER, *NO_PART} == names, "decide whether the new field is part of the identity"
    config = replace(CONFIG, slices=3)
    found = {identity(config, "data", "code")}
    found |= {identity(replace(config, **{n: v}), "data", "code") for n, v in OTHER.items()}
    found |= {identity(config, "other", "code"), identity(config, "data", "other")}
    assert len(found) == len(OTHER) + 3


def test_the_identity_ignores_names_that_change_nothing() -> None:
    before = identity(CONFIG, "data", "code")
    assert {identity(replace(CONFIG, **{n: v}), "data", "code") for n, v in NO_PART.items()} == {
        before
    }
    shuffled = replace(CONFIG, method_config={"b": 1, "a": 2})
    assert identity(shuffled, "", "") == identity(
        replace(CONFIG, method_config={"a": 2, "b": 1}), "", ""
    )


def test_an_identity_is_a_directory_name() -> None:
    assert identity(CONFIG, "data", "code").isalnum()
    assert digest({"a": 1}, 20)[:12] == digest({"a": 1}, 12) != digest({"a": 2}, 12)


def test_what_differs_from_a_method_s_defaults_is_known_by_its_preset() -> None:
    from glua_bench.methods.glua import GLUA

    def of(**changes: object) -> RunConfig:
        values = {**GLUA.presets["quick"], **changes}
        chosen = asdict(build_settings(GLUA.Config, values, "method"))
        return replace(CONFIG, method="glua", preset="quick", method_config=chosen)

    assert changed_settings(of(), GLUA) == {} and variant_name(of(), GLUA) == "GLUA"
    assert changed_settings(of(mask="random"), GLUA) == {"mask": "random"}
    assert variant_name(of(mask="random"), GLUA) == "random mask (ours)"
    both = of(mask="random", mask_ratio=0.1)
    assert changed_settings(both, GLUA) == {"mask": "random", "mask_ratio": 0.1}
    assert variant_name(both, GLUA) == ""
    # Another preset has other defaults, so that the same settings are a change there.
    assert "lr_d" in changed_settings(replace(of(), preset="paper"), GLUA)
    # And a run of an older version may have settings that are gone.
    older = replace(of(), method_config={**of().method_config, "lambda_global": 0.003})
    assert changed_settings(older, GLUA) == {"lambda_global": 0.003}
    assert variant_name(older, GLUA) == ""
