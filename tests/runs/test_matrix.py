"""matrix.py: which runs a comparison or an ablation consists of."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glua_bench.errors import ConfigError, PluginError
from glua_bench.runs import configuration, matrix
from glua_bench.runs.matrix import ablation, by_dataset, combinations, comparison, plan
from glua_bench.runs.request import RunOptions


def test_a_comparison_is_every_method_on_every_direction_with_every_seed(base: RunOptions) -> None:
    names = ["glua", "glua+photometric", "source_only"]
    cells = comparison(names, ["phantom", "mscmr"], ["all"], 2, base)
    entries = ["source_only", "supervised", "glua", "glua + photometric"]
    tasks = ["phantom mr-ct", "phantom ct-mr", "mscmr bssfp-lge"]
    expected = [(s, e, t) for s in range(2) for e in entries for t in tasks]
    tasks_of = {c.task for c in cells if c.task.startswith("mscmr")}
    expected = [x for x in expected if x[2] in tasks[:2] or x[2] in tasks_of]
    found = [(c.request.seed, c.entry, c.task) for c in cells if c.task in tasks]
    assert found == expected
    by_entry = {c.entry: c.request for c in cells}
    assert by_entry["supervised"].scenario == "supervised"
    assert by_entry["supervised"].method == "source_only"
    assert by_entry["glua + photometric"].augmentation == "photometric"
    assert by_entry["glua"].augmentation is None and by_entry["glua"].scenario == "uda"
    assert {c.request.runs_root for c in cells} == {base.runs_root}


def test_the_default_is_each_datasets_first_direction(base: RunOptions) -> None:
    cells = comparison(["glua"], ["phantom", "discs"], [], 1, base, bounds=False)
    assert [c.task for c in cells] == ["phantom mr-ct", "discs bright-dark"]


def test_folds_are_tasks_of_their_own(base: RunOptions) -> None:
    def made(datasets: str, fold: int = 1) -> list[tuple[str, str, int]]:
        names, _ = configuration.in_folds(datasets.split(","), fold, base)
        cells = comparison(["glua"], names, [], 1, base, bounds=False)
        return [(c.task, c.request.dataset, c.request.fold) for c in cells]

    assert made("mmwhs,mmwhs_fold2") == [
        ("mmwhs mr-ct", "mmwhs", 1),
        ("mmwhs_fold2 mr-ct", "mmwhs", 2),
    ]
    assert made("mmwhs,mmwhs_fold3", fold=3) == [("mmwhs_fold3 mr-ct", "mmwhs", 3)]
    with pytest.raises(ConfigError, match="'phantom' has no fold 2; it has one split"):
        made("mmwhs,phantom", fold=2)


def test_a_perturbation_of_everything_is_refused(base: RunOptions) -> None:
    moved = replace(base, assignments=[*base.assignments, "perturbation=1"])
    with pytest.raises(ConfigError, match="use --repeats instead"):
        comparison(["glua"], ["discs"], [], 1, moved)
    none = replace(base, assignments=[*base.assignments, "perturbation=0"])
    assert comparison(["glua"], ["discs"], [], 1, none)


def test_repeats_are_seed_0_with_other_last_bits(base: RunOptions) -> None:
    for make in (
        lambda repeats: comparison(["glua"], ["discs"], [], 2, base, repeats=repeats),
        lambda repeats: ablation("glua", ["discs"], [], 2, base, repeats=repeats),
    ):
        plain, repeated = make(0), make(2)
        assert repeated[: len(plain)] == plain
        further = repeated[len(plain) :]
        assert len(further) == len(plain)  # as many seeds as repeats
        assert {c.request.seed for c in further} == {0}
        draws = [c.request.assignments[-1] for c in further]
        assert sorted(set(draws)) == ["perturbation=1", "perturbation=2"]
        first = [c for c in plain if c.request.seed == 0]
        for draw in range(2):
            for known, cell in zip(first, further[draw * len(first) :], strict=False):
                assert (cell.entry, cell.task) == (known.entry, known.task)
                assert cell.request.assignments[:-1] == known.request.assignments


def test_an_ablation_is_what_the_method_declares(base: RunOptions) -> None:
    cells = ablation("glua", ["phantom"], [], 1, base)
    entries = [c.entry for c in cells]
    assert entries[:4] == ["source_only", "supervised", "local_only", "global_only"]
    assert entries[-1] == "GLUA" and len(cells) == 12
    assert ablation("glua", ["phantom"], [], 1, base, bounds=False) == cells[2:]
    first = cells[4].request
    assert first.assignments[-2:] == ["method.gain=none", "method.lambda_output=0.0"]
    assert first.assignments[:-2] == base.assignments


def test_combinations_are_of_values_and_of_leaving_them() -> None:
    assert doctest.testmod(matrix).failed == 0
    found = combinations({"a": {"m": 1}, "b": {"m": 2, "w": 0}, "c": {}})
    assert list(found) == ["default", "w=0", "m=1", "m=1, w=0", "m=2", "m=2, w=0"]
    assert found["m=2, w=0"] == {"m": 2, "w": 0}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"methods": ["glau"]}, PluginError, "glau"),
        ({"datasets": ["fantom"]}, PluginError, "fantom"),
        ({"directions": ["ct-ct"]}, ConfigError, "ct-ct"),
        ({"seeds": 0}, ConfigError, "--seeds 0"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(
    change: dict[str, Any], error: type[Exception], said: str, base: RunOptions
) -> None:
    asked = {"methods": ["glua"], "datasets": ["phantom"], "directions": [], "seeds": 1, **change}
    with pytest.raises(error, match=said):
        comparison(**asked, base=base)


def test_a_method_without_variants_cannot_be_ablated(base: RunOptions) -> None:
    with pytest.raises(ConfigError, match="declares no variants; add values by --vary"):
        ablation("random_gamma", ["discs"], [], 1, base)
    with pytest.raises(ConfigError, match="--no-variants leaves nothing"):
        ablation("glua", ["discs"], [], 1, base, variants=False)


def varied(method: str, base: RunOptions, *vary: str, **options: Any) -> dict[str, list[str]]:
    """Return entry → assignments of the method, without bounds."""
    cells = ablation(method, ["discs"], [], 1, base, vary=vary, bounds=False, **options)
    return {c.entry: [a for a in c.request.assignments if a.startswith("method.")] for c in cells}


def test_a_setting_is_varied_beside_its_reference(base: RunOptions) -> None:
    said: list[str] = []
    found = varied("random_gamma", base, "strength=0.5,1,1.0,2, 0.50", report=said.append)
    assert found == {
        "default": [],
        "strength = 0.5": ["method.strength=0.5"],
        "strength = 2.0": ["method.strength=2.0"],
    }
    assert said == ["'strength = 1.0' duplicates 'default', skipped"]
    # The reference has the requested settings, not the defaults.
    asked = replace(base, assignments=[*base.assignments, "method.strength=2"])
    assert varied("random_gamma", asked, "method.strength=1,2", "lr=1e-3") == {
        "default": ["method.strength=2"],
        "strength = 1.0": ["method.strength=2", "method.strength=1.0"],
        "lr = 0.001": ["method.strength=2", "method.lr=0.001"],
    }


def test_a_value_that_a_variant_has_is_the_variant(base: RunOptions) -> None:
    vary = ("gain=none,constant,tanh", "lr_d=0.1,0.001", "mask=random,soft")
    said: list[str] = []
    found = varied("glua", base, *vary, report=said.append)
    assert list(found)[-4:] == ["random mask (ours)", "GLUA", "lr_d = 0.1", "mask = soft"]
    assert said == [
        f"'{value}' duplicates '{name}', skipped"
        for value, name in (
            ("gain = none", "Step A + D1 + D2"),
            ("gain = constant", "gain constant"),
            ("gain = tanh", "GLUA"),
            ("lr_d = 0.001", "GLUA"),
            ("mask = random", "random mask (ours)"),
        )
    ]
    alone = varied("glua", base, *vary, variants=False)
    assert list(alone) == [
        "default",
        "gain = none",
        "gain = constant",
        "lr_d = 0.1",
        "mask = random",
        "mask = soft",
    ]
    # 0.001 is the value in the preset "quick" only.
    other = varied("glua", replace(base, preset="standard"), "lr_d=0.001", variants=False)
    assert list(other) == ["default", "lr_d = 0.001"]


def test_values_and_variants_combine(base: RunOptions) -> None:
    found = varied(
        "random_gamma", base, "strength=1,2", "lr=0.1", combine=True, report=lambda line: None
    )
    assert list(found) == ["default", "lr=0.1", "strength=2.0", "strength=2.0, lr=0.1"]
    assert found["strength=2.0, lr=0.1"] == ["method.strength=2.0", "method.lr=0.1"]
    found = varied("advent", base, "lambda_entropy=0.1", combine=True)
    assert list(found)[1:] == [
        "lambda_entropy=0.1",
        "form=direct",
        "form=direct, lambda_entropy=0.1",
    ]


def test_bounds_do_not_follow_the_methods_settings(base: RunOptions) -> None:
    asked = replace(base, assignments=[*base.assignments, "method.strength=2"])
    cells = ablation("random_gamma", ["discs"], [], 1, asked, vary=["strength=1"])
    assert [c.entry for c in cells] == ["source_only", "supervised", "default", "strength = 1.0"]
    lower, upper = (c.request for c in cells[:2])
    task = {"dataset": "discs", "direction": "bright-dark"}
    assert lower == base.request(method="source_only", **task)
    assert upper == replace(lower, scenario="supervised")
    planned = plan(cells)  # all runs differ
    assert [p.run.config.method for p in planned] == ["source_only"] * 2 + ["random_gamma"] * 2
    settings = [p.run.config.method_config.get("strength") for p in planned]
    assert settings == [None, None, 2.0, 1.0]


def test_a_bound_that_is_varied_is_its_own_reference(base: RunOptions) -> None:
    cells = ablation("source_only", ["discs"], [], 1, base, vary=["lr=0.002,0.1"])
    assert [c.entry for c in cells] == ["source_only", "supervised", "lr = 0.1"]
    plan(cells)


def test_two_entries_of_one_name_are_refused(base: RunOptions, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from glua_bench.methods.source_only import SourceOnly\n"
        "class Mine(SourceOnly):\n"
        '    """My own method."""\n'
        "    name = 'mine'\n"
        "    @classmethod\n"
        "    def variants(cls):\n"
        "        return {'supervised': {'lr': 0.1}}\n"
    )
    asked = replace(base, plugins=[*base.plugins, plugin])
    with pytest.raises(ConfigError, match="are called 'supervised'"):
        ablation("mine", ["discs"], [], 1, asked)
    assert len(ablation("mine", ["discs"], [], 1, asked, bounds=False)) == 1


def test_two_cells_of_one_run_are_refused(base: RunOptions) -> None:
    cells = comparison(["random_gamma", "source_only"], ["discs"], [], 1, base, bounds=False)
    twice = [*cells, replace(cells[0], entry="again")]
    with pytest.raises(ConfigError, match="'random_gamma' and 'again' on discs bright-dark"):
        plan(twice)


def test_a_matrix_is_shown_by_dataset(base: RunOptions, phantom_root: Path) -> None:
    discs = plan(comparison(["random_gamma"], ["discs"], [], 2, base))
    other = replace(base, data_root=phantom_root)
    phantom = plan(comparison(["source_only"], ["phantom"], ["all"], 1, other, bounds=False))
    groups = by_dataset("compare random_gamma", [*discs, *phantom])
    assert [group.dataset for group in groups] == ["discs", "phantom"]
    assert groups[0].entries == ["source_only", "supervised", "random_gamma"]
    assert groups[0].seeds == [0, 1] and len(groups[0].members) == 6
    assert groups[1].directions == ["mr-ct", "ct-mr"] and groups[1].seeds == [0]
    assert [run.id for _, run in groups[0].members] == [item.run.id for item in discs]
    (alone,) = by_dataset("compare random_gamma", discs)
    assert alone.id == groups[0].id != groups[1].id
