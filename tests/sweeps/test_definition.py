"""sweeps/definition.py: valid definitions, and one sentence with the line for invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from glua_bench.errors import ConfigError, UserError
from glua_bench.methods.ada_output import AdaOutput
from glua_bench.methods.glua import GLUA
from glua_bench.sweeps.definition import (
    Definition,
    Parameter,
    automatic,
    automatic_parameter,
    find,
    read,
    shipped,
)
from glua_bench.sweeps.study import folder_of

TEXT = """\
name: own
method: glua
dataset: phantom
directions: all
seeds: 3
objective: im
sampler: tpe
trials: 5
set: {style_share: 2, batch_size: 4}
space:
  mask_ratio: {low: 0.1, high: 0.9}
  mask: [topk, soft]
"""


def make(folder: Path, text: str = TEXT, oracle: bool = False, **changes: object) -> Definition:
    file = folder / "own.yaml"
    file.write_text(text)
    return read(file, oracle, **changes)


def test_everything_that_may_be_said_is_taken(tmp_path: Path) -> None:
    made = make(tmp_path, TEXT + "pruner: median\nseed: 4\ntitle: Why?\npreset: standard\n")
    assert (made.name, made.method, made.dataset) == ("own", "glua", "phantom")
    assert made.preset == "standard"
    assert made.directions == ("mr-ct", "ct-mr") and made.runs_per_trial == 6
    assert made.settings == ("method.style_share=2", "batch_size=4")
    assert made.space == (
        Parameter("mask_ratio", low=0.1, high=0.9),
        Parameter("mask", choices=("topk", "soft")),
    )
    assert (made.objectives, made.sampler, made.pruner) == (("im",), "tpe", "median")
    assert (made.trials, made.seed, made.title) == (5, 4, "Why?")


def test_the_command_line_wins(tmp_path: Path) -> None:
    made = make(tmp_path, trials=9, seeds=1, directions=["ct-mr"], preset="paper", space="auto")
    assert (made.trials, made.seeds, made.directions, made.preset) == (9, 1, ("ct-mr",), "paper")
    assert {p.name for p in made.space} >= {"mask_ratio", "mask", "lambda_output", "codes_clusters"}


@pytest.mark.parametrize("name", list(shipped()))
def test_every_definition_that_is_shipped_is_sound(name: str) -> None:
    made = read(find(name), oracle=False)
    assert made.name == name and made.title and made.selector != "oracle" and made.trials >= 6
    assert find(f"sweeps/{name}.yaml").resolve() == find(name).resolve()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "method: glua",
            "method: glau",
            "line 2: No method is called 'glau'; did you mean 'glua'?",
        ),
        ("dataset: phantom", "dataset: fantom", "line 3: No dataset is called 'fantom'; did you"),
        (
            "all",
            "[mr-pet]",
            "line 4: 'mr-pet' is not a direction of 'phantom'; did you mean",
        ),
        ("name: own", "name: ../x", "line 1: the name '../x' begins with a dot"),
        ("name: own", "name: /x", "line 1: the name '/x' contains a path separ"),
        ("name: own", "name: a/b", "the name 'a/b' contains a path separator"),
        ("name: own", "name: ' '", "line 1: the name ' ' is empty; choose"),
        ("seeds: 3", "seeds: 0", "line 5: 'seeds' must be at least 1, not 0."),
        ("im\n", "dve\n", "line 6: 'dve' is not a selector; did you mean 'dev'?"),
        ("im\n", "last\n", "line 6: 'last' computes no score; use one of"),
        ("im\n", "oracle\n", "line 6: the objective 'oracle' reads the labels of target test"),
        ("im\n", "[im, watts]\n", "line 6: 'watts' is not a cost; known: seconds."),
        ("im\n", "[]\n", "line 6: 'objective' is empty or repeats a name."),
        ("tpe", "tp", "line 7: 'sampler' cannot be 'tp'; did you mean 'tpe'?"),
        ("tpe", "grid", "line 7: the grid needs a step or a list of values for mask_ratio"),
        ("tpe", "cmaes", "line 7: cmaes needs numeric ranges, and mask has a list of values"),
        ("trials: 5\n", "", "line 1: 'trials' is missing; add it."),
        ("trials: 5\n", "trails: 5\n", "line 8: unknown 'trails'; did you mean 'trials'?"),
        ("mask_ratio:", "mask_rato:", "line 11: 'mask_rato' is not a setting of 'glua'; did you"),
        (
            "high: 0.9",
            "hi: 0.9",
            "line 11: unknown 'hi' in 'mask_ratio' in 'space'; did you mean 'high'?",
        ),
        ("high: 0.9", "high: 9", "line 11: method.mask_ratio = 9.0 is out of range"),
        ("high: 0.9", "high: 0.1", "'mask_ratio' has the range 0.1 to 0.1; low must be below"),
        ("high: 0.9", "high: 0.9, step: 2", "'mask_ratio' has the step 2; it must be at most 0.8"),
        ("high: 0.9", "high: 0.9, step: -1", "the step -1; it must be at least 0"),
        ("0.1, high: 0.9", "0, high: 0.9, log: true", "'mask_ratio' with log needs a low above 0"),
        ("0.9}", "0.9, step: 0.1, log: true}", "'mask_ratio' has both step and log; remove one"),
        ("{low: 0.1, high: 0.9}", "0.3", "line 11: 'mask_ratio' in 'space' must be a mapping of"),
        ("[topk, soft]", "[topk]", "line 12: 'mask' needs at least two values."),
        ("[topk, soft]", "[topk, sift]", "line 12: method.mask = 'sift' is invalid; choose"),
        ("[topk, soft]", "[soft, soft]", "line 12: 'mask' repeats a value; remove it."),
        ("[topk, soft]", "{low: 1, high: 2}", "line 12: 'mask' is not a number; list its values"),
        ("sampler", "pruner: wilcoxn\nsampler", "'pruner' cannot be 'wilcoxn'; did you mean 'wil"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(UserError) as error:
        make(tmp_path, TEXT.replace(old, new))
    message = str(error.value)
    assert said in message and "own.yaml, line " in message, message
    assert message[-1] in ".?" and "\n" not in message


def test_an_objective_by_target_images_needs_a_method_that_sees_them(tmp_path: Path) -> None:
    text = "method: source_only\ndataset: phantom\nobjective: {}\ntrials: 2\nspace: auto\n"
    with pytest.raises(ConfigError, match=r"own.yaml, line 3: 'im' scores target images, and "):
        make(tmp_path, text.format("im"))
    assert make(tmp_path, text.format("source_val")).selector == "source_val"


def test_several_objectives(tmp_path: Path) -> None:
    text = TEXT.replace("im\n", "[im, seconds]\n")
    assert make(tmp_path, text + "pruner: none\n").objectives == ("im", "seconds")
    with pytest.raises(ConfigError, match="several objectives cannot be pruned; use none"):
        make(tmp_path, text + "pruner: median\n")


def test_pruners_need_what_they_compare(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="'agreement' compares all checkpoints of a run, so it ca"
    ):
        make(tmp_path, TEXT.replace("im\n", "agreement\n") + "pruner: median\n")
    with pytest.raises(ConfigError, match="the oracle scores only finished runs"):
        make(tmp_path, TEXT.replace("im\n", "oracle\n") + "pruner: median\n", oracle=True)
    alone = TEXT.replace("all", "[mr-ct]").replace("seeds: 3", "seeds: 2")
    with pytest.raises(ConfigError, match="wilcoxon needs at least 3 runs per trial, not 2"):
        make(tmp_path, alone + "pruner: wilcoxon\n")
    assert make(tmp_path, TEXT + "pruner: wilcoxon\n").pruner == "wilcoxon"


def test_an_empty_space_is_refused(tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("space:")]
    for empty in ("", "space:\n", "space: {}\n"):
        with pytest.raises(ConfigError, match="'space' is empty; list settings and their values"):
            make(tmp_path, text + empty)


def test_a_grid_s_budget_is_all_its_combinations(tmp_path: Path) -> None:
    text = TEXT.replace("tpe", "grid").replace("high: 0.9", "high: 0.9, step: 0.2")
    assert make(tmp_path, text.replace("trials: 5\n", "")).trials == 10
    assert make(tmp_path, text).trials == 5
    values = make(tmp_path, text).space[0].values()
    assert values == (0.1, 0.3, 0.5, 0.7, 0.9)


def test_the_oracle_is_asked_for(tmp_path: Path) -> None:
    text = TEXT.replace("im\n", "oracle\n")
    assert make(tmp_path, text, oracle=True).selector == "oracle"


def test_ranges_follow_from_the_settings_own(tmp_path: Path) -> None:
    # The default is 0.01, and the allowed range begins at zero.
    assert automatic_parameter(GLUA, "quick", "lambda_feature") == Parameter(
        "lambda_feature", low=0.001, high=0.1, log=True
    )
    # Each preset has its own default.
    for preset, low, high in (("quick", 1e-4, 1e-2), ("paper", 1e-5, 1e-3)):
        rate = automatic_parameter(GLUA, preset, "lr_d")
        assert rate.log and (rate.low, rate.high) == (pytest.approx(low), pytest.approx(high))
    assert automatic_parameter(GLUA, "quick", "mask").choices == ("none", "topk", "soft", "random")
    clusters = automatic_parameter(GLUA, "paper", "codes_clusters")
    assert clusters.whole and (clusters.low, clusters.high) == (1, 60)
    assert automatic_parameter(AdaOutput, "quick", "levels").choices == (1, 2)
    assert all(p.choices or p.low < p.high for p in automatic(AdaOutput, "quick"))
    listed = TEXT[: TEXT.index("space:")] + "space: [mask_ratio, mask]\n"
    assert [p.name for p in make(tmp_path, listed).space] == ["mask_ratio", "mask"]


def test_only_what_changes_results_is_the_meaning(tmp_path: Path) -> None:
    made = make(tmp_path)
    same = make(tmp_path, TEXT.replace("trials: 5", "trials: 50") + "title: Other\n")
    assert made.meaning() == same.meaning()
    other = make(tmp_path, TEXT.replace("0.9", "0.8"))
    assert made.meaning() != other.meaning()


def test_an_unknown_sweep_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="There is no sweep 'mask_rato'; .* did you mean 'mask_ra"
    ):
        find("mask_rato")
    with pytest.raises(ConfigError, match="There is no sweep '.*none.yaml'"):
        find(str(tmp_path / "none.yaml"))


def test_numbers_are_numbers_in_every_place_of_a_sweep(tmp_path: Path) -> None:
    text = TEXT.replace("low: 0.1, high: 0.9", "low: 1e-1, high: 9e-1")
    text = text.replace("{style_share: 2, batch_size: 4}", "{lr: 1e-4, steps: 2_000}")
    made = make(tmp_path, text.replace("trials: 5", "trials: 1e1"))
    assert made.trials == 10 and set(made.settings) == {"method.lr=0.0001", "steps=2000"}
    (ratio,) = (p for p in made.space if p.name == "mask_ratio")
    assert (ratio.low, ratio.high) == (0.1, 0.9)
    listed = TEXT.replace("{low: 0.1, high: 0.9}", "[.5, 25e-2]")
    assert make(tmp_path, listed).space[0].choices == (0.5, 0.25)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", "."])
def test_no_name_of_a_sweep_leads_out_of_the_runs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="The sweep's name .*, so it cannot name a directory"):
        folder_of(tmp_path, name)
    assert folder_of(tmp_path, "Ränge (2)").parent == tmp_path / "sweeps"


def test_a_fold_is_said_by_the_file_or_the_command_line(tmp_path: Path) -> None:
    text = TEXT.replace("dataset: phantom", "dataset: mmwhs\nfold: 2")
    made = make(tmp_path, text)
    assert (made.dataset, made.fold, made.fold_name) == ("mmwhs", 2, "mmwhs_fold2")
    assert make(tmp_path, text, fold=3).fold_name == "mmwhs_fold3"
    assert make(tmp_path, text, dataset="abdomen").fold_name == "abdomen"  # the fold was of mmwhs
    assert make(tmp_path, TEXT, dataset="mmwhs_fold4").fold_name == "mmwhs_fold4"
    with pytest.raises(ConfigError, match="line 4: .*'mmwhs' has no fold 9; it has folds 1 to 5"):
        make(tmp_path, text.replace("fold: 2", "fold: 9"))
    with pytest.raises(ConfigError, match="'phantom' has no fold 2; it has one split"):
        make(tmp_path, TEXT, fold=2)
