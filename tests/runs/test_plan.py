"""plan.py: what is refused, and what a run's id depends on."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from small_runs import PLUGIN, SMALL, Ask, refusal, small_request

import glua_bench
from glua_bench import config as configuration
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.errors import PluginError
from glua_bench.method import Method, Role, Stage, TaskInfo
from glua_bench.methods.local_only import LocalOnly
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.runs.plan import (
    PlannedRun,
    build_method,
    check_inputs,
    perturb,
    plan,
    resolve,
    roles,
)
from glua_bench.runs.request import RunRequest
from glua_bench.runs.stage_cache import artefact_path
from glua_bench.task import Case, UnlabelledCase


class Tuned(SourceOnly):
    """Changes settings in one preset."""

    presets = {"quick": {"lr": 0.25, "weight_decay": 0.5}}


def test_options_win_over_presets_and_set_wins_over_options(
    phantom_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Phantom(phantom_root)
    preset = {"steps": 11, "batch_size": 3, "segmenter": {"name": "unet", "width": 5, "depth": 4}}
    monkeypatch.setitem(configuration.PRESETS, "quick", preset)
    asked = RunRequest("source_only", "phantom", preset="quick")

    plain = resolve(asked, dataset, Tuned)
    assert (plain.steps, plain.batch_size, plain.segmenter.width) == (11, 3, 5)
    assert plain.method_config == asdict(SegmentConfig(lr=0.25, weight_decay=0.5))
    assert plain.grid == dataset.grid("quick") and plain.direction == dataset.directions[0]

    asked = replace(asked, steps=12, augmentation="none", precision="bf16-mixed")
    said = resolve(asked, dataset, Tuned)
    assert (said.steps, said.augmentation, said.precision) == (12, "none", "bf16-mixed")

    sets = ["steps=13", "augmentation=photometric", "segmenter.width=6", "method.lr=1e-3"]
    asked = replace(asked, assignments=[*sets, "grid.size=48"])
    last = resolve(asked, dataset, Tuned)
    assert (last.steps, last.augmentation, last.precision) == (13, "photometric", "bf16-mixed")
    assert (last.segmenter.width, last.segmenter.depth) == (6, 4)
    assert last.method_config == asdict(SegmentConfig(lr=0.001, weight_decay=0.5))
    assert last.grid == replace(dataset.grid("quick"), size=48)
    assert preset["segmenter"]["width"] == 5  # type: ignore[index]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preset": ({"preset": "fast"}, "preset 'fast'"),
    "direction": ({"direction": "ct-ct"}, "direction 'ct-ct'"),
    "scenario": ({"scenario": "oracle"}, "--scenario oracle is unknown"),
    "augmentation": ({"augmentation": "mixup"}, "augmentation = 'mixup'"),
    "precision": ({"precision": "8"}, "precision = '8'"),
    "no steps": ({"steps": 0}, "steps = 0"),
    "negative seed": ({"seed": -1}, "seed = -1"),
    "adapting method": (
        {"scenario": "supervised", "method": "local_only"},
        "--scenario supervised",
    ),
    "steps are text": (["steps=many"], "steps = 'many'"),
    "steps are half": (["steps=1.5"], "steps = 1.5"),
    "steps are a truth value": (["steps=true"], "steps = True"),
    "steps are missing": (["steps="], "steps = None"),
    "batch size": (["batch_size=0"], "batch_size = 0"),
    "candidates": (["candidates=-1"], "candidates = -1"),
    "run option": (["stepps=3"], "'stepps' (--set); did you mean 'steps'?"),
    "seed by set": (["seed=3"], "'seed' (--set)"),
    "group": (["net.width=3"], "'net.width' (--set); did you mean 'segmenter.width'?"),
    "form": (["steps"], "--set steps is not of the form"),
    "method option": (["method.lrr=3"], "'method.lrr'"),
    "method range": (["method.lr=-1"], "method.lr = -1"),
    "method not a number": (["method.lr=.nan"], "method.lr = nan"),
    "method type": (["method.lr=[1]"], "method.lr = [1]"),
    "segmenter option": (["segmenter.with=3"], "'segmenter.with'"),
    "segmenter name": (["segmenter.name=vnet"], "segmenter.name = 'vnet'"),
    "segmenter number": (["segmenter.name=3"], "segmenter.name = 3"),
    "segmenter width": (["segmenter.width=1"], "segmenter.width = 1"),
    "grid too small": (["grid.size=16"], "grid.size = 16"),
    "grid does not halve": (["grid.size=36", "segmenter.depth=4"], "grid.size = 36"),
    "grid spacing": (["grid.spacing=0"], "grid.spacing = 0"),
    "grid slices": (["grid.slice_spacing=-1"], "grid.slice_spacing = -1"),
    "one image under the segmenter's batch norm": (
        ["segmenter.name=timm:resnet10t", "batch_size=1"],
        "set batch_size to 2 or more, or segmenter.name=unet",
    ),
    "an even number of slices": (["slices=2"], "slices = 2 is invalid; choose one of 1, 3, 5"),
    "slices as text": (["slices=three"], "slices = 'three'"),
    "a distance of one slice": (["slice_distance=4"], "slice_distance = 4 has no effect"),
    "a distance of nothing": (["slices=3", "slice_distance=0"], "slice_distance = 0 is out of"),
    "one image for each process": (
        {"method": "sifa", "devices": 2},  # a batch of two
        "(at encoder.low.1), which needs several; set batch_size to 4 or more.",
    ),
    "slices too small for the style stage": (
        {"method": "glua", "assignments": [*SMALL, "method.style=codes"]},
        "grid.size = 32 is too small for codes_scales = 3, which needs 64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_served_is_one_sentence(
    ask: Ask, name: str, tmp_path: Path
) -> None:
    changes, said = REFUSED[name]
    sets = changes if isinstance(changes, list) else []
    others = changes if isinstance(changes, dict) else {}
    assert said in refusal(plan, ask(*sets, **others))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sets", "changes"),
    [
        (["batch_size=1"], {}),
        (["segmenter.name=timm:resnet10t"], {}),
        (["method.adgan_width=4"], {"method": "glua"}),
        (["method.style=codes", "method.codes_scales=2"], {"method": "glua"}),
        (["method.cycle_width=4", "method.cycle_width_d=4"], {"method": "cycle_translate"}),
    ],
)
def test_what_a_method_can_serve_is_not_refused(
    ask: Ask, sets: list[str], changes: dict[str, Any]
) -> None:
    assert plan(ask(*sets, **changes)).stages


def test_the_id_is_that_of_the_fitted_setting(
    ask: Ask, fitting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def planned(*sets: str) -> PlannedRun:
        asked = ask(*sets, method="fitting", plugins=[fitting])
        return plan(asked, lines.append)

    fitted, other = planned(), planned("method.clusters=4")
    assert len(lines) == 2
    said = planned("method.clusters=1")
    assert len(lines) == 2  # fitting values are not reported
    assert fitted.id == other.id == said.id
    monkeypatch.setattr(said.method_class, "check", lambda self, cases: {})
    assert planned().config.method_config["clusters"] == 6
    assert planned().id != fitted.id


def test_a_method_may_decline_what_it_cannot_fit(ask: Ask, fitting: Path) -> None:
    declining = """
    def check(self, cases):
        from glua_bench.errors import ConfigError
        raise ConfigError(f"method.clusters = 6 with {cases} cannot be; give more cases.")
"""
    fitting.write_text(fitting.read_text().split("    def check")[0] + declining)
    assert "Cases(source=1, target=1)" in refusal(plan, ask(method="fitting", plugins=[fitting]))


@pytest.mark.parametrize(
    ("definition", "called"),
    [
        ("optimizers(self, stage)", "optimizers(self)"),
        ("predict(self, images)", "predict(self, images, domain)"),
        ("features(self, images)", "features(self, images, domain)"),
        ("step(self, batch)", "step(self, batch, context)"),
        ("check(self)", "check(self, cases)"),
    ],
)
def test_a_function_of_an_earlier_contract_is_one_sentence(
    ask: Ask, definition: str, called: str, plugin: Path
) -> None:
    plugin.write_text(f"{PLUGIN}\n    def {definition}:\n        raise AssertionError\n")
    assert refusal(plan, ask(method="plugged", plugins=[plugin]), kind=PluginError) == (
        f"Method 'plugged' defines {definition}, which glua-bench calls as {called}; change its "
        "definition to that."
    )


def test_functions_may_take_more_than_they_are_given(ask: Ask, plugin: Path) -> None:
    more = """
    def optimizers(self, rate=1.0):
        return super().optimizers()

    def predict(self, *given, **named):
        return super().predict(*given, **named)
"""
    plugin.write_text(PLUGIN + more)
    assert plan(ask(method="plugged", plugins=[plugin])).stages


class AsBefore(SourceOnly):
    """Ignores the number of slices."""

    def __init__(self, task: TaskInfo, config: Any) -> None:
        super().__init__(replace(task, slices=1), config)
        self.task = task


class FewLogits(SourceOnly):
    def predict(self, images: torch.Tensor, domain: Role) -> torch.Tensor:
        return super().predict(images, domain)[:, :2]


class TranslatesOne(SourceOnly):
    def stages(self) -> tuple[Stage, ...]:
        return (Stage("segment", translate=lambda images: images[:, :1]),)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (AsBefore, "(predict raises RuntimeError); build its networks with task.inputs channels"),
        (FewLogits, "(predict gives the shape (1, 2, 32, 32))"),
        (TranslatesOne, "(translate gives the shape (1, 1, 32, 32))"),
    ],
)
def test_a_method_that_is_not_made_for_several_slices_is_declined_before_training(
    ask: Ask, method: type[Method], said: str, phantom_root: Path
) -> None:
    dataset = Phantom(phantom_root)
    one = resolve(ask(), dataset, SourceOnly)
    check_inputs(one, build_method(one, dataset.structures, method))
    three = replace(one, slices=3)
    text = refusal(check_inputs, three, build_method(three, dataset.structures, method))
    assert said in text and text.startswith(
        "slices = 3: method 'source_only' does not support stacks"
    )
    sound = build_method(three, dataset.structures, SourceOnly)
    torch.manual_seed(0)
    check_inputs(three, sound)
    assert sound.training and torch.equal(torch.rand(1), torch.manual_seed(0) and torch.rand(1))


def test_a_plugin_that_is_not_made_for_several_slices_is_one_sentence(
    ask: Ask, tmp_path: Path
) -> None:
    plugin = tmp_path / "plugged.py"
    plugin.write_text(
        PLUGIN
        + """
    def __init__(self, task, config):
        import dataclasses
        super().__init__(dataclasses.replace(task, slices=1), config)
"""
    )
    asked = ask(method="plugged", plugins=[plugin])
    assert plan(asked).config.slices == 1
    assert "method 'plugged' does not support stacks of slices" in refusal(
        plan, replace(asked, assignments=[*SMALL, "slices=3"])
    )
    assert not (tmp_path / "runs").exists()


def test_neighbours_are_as_far_apart_as_the_thicker_domain_s_slices(thick: Ask) -> None:
    """The distance is equal for all methods, scenarios and directions, and part of the id."""
    own = ("grid.slice_spacing=null", "slices=3")
    found = {}
    for name, changes in {
        "lower": {},
        "upper": {"scenario": "supervised"},
        "adapted": {"method": "local_only"},
        "back": {"direction": "ct-mr"},
    }.items():
        found[name] = plan(thick(*own, **changes)).config
    assert {c.slice_distance for c in found.values()} == {9.0}
    asked = plan(thick(*own, "slice_distance=4"))
    assert asked.config.slice_distance == 4.0 and isinstance(asked.config.slice_distance, float)
    assert asked.id != plan(thick(*own)).id
    on_grid = plan(thick("slices=3")).config
    assert on_grid.slice_distance == on_grid.grid.slice_spacing == 8
    assert plan(thick(own[0])).config.slice_distance is None


def test_slices_that_are_no_neighbours_are_not_stacked(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Phantom, "neighbouring_slices", False)
    assert plan(ask()).config.slices == 1
    assert "dataset 'phantom' trains on slices that are not neighbours" in refusal(
        plan, ask("slices=3")
    )
    from glua_bench.datasets.mmwhs_sifa import MMWHSSIFA

    assert not MMWHSSIFA.neighbouring_slices


def test_a_perturbation_moves_last_bits_alone_and_is_another_run(ask: Ask) -> None:
    def built(*sets: str) -> tuple[PlannedRun, Method]:
        planned = plan(ask(*sets))
        structures = planned.dataset.structures
        return planned, build_method(planned.config, structures, planned.method_class)

    (plain, first), (moved, second), (_, third) = (
        built(*sets) for sets in ((), ("perturbation=1",), ("perturbation=2",))
    )
    assert plain.id != moved.id
    assert any(
        not torch.equal(a, b) for a, b in zip(second.parameters(), third.parameters(), strict=True)
    )
    ups, count = 0, 0
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        ulp = torch.nextafter(a.abs(), torch.tensor(torch.inf)) - a.abs()
        # Below a power of two, floats are spaced half as far.
        steps = ((b.double() - a.double()) / ulp.double())[a != 0]
        assert set(steps.abs().unique().tolist()) <= {0.5, 1.0}
        assert torch.equal(a == 0, b == 0)
        ups, count = ups + int((steps > 0).sum()), count + steps.numel()
    assert 0.45 < ups / count < 0.55
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    perturb(first, 3)
    assert torch.equal(torch.rand(1), expected)


def test_a_stage_is_shared_by_runs_on_as_many_slices_and_last_bits_alone(ask: Ask) -> None:
    small = ("method.cycle_width=4", "method.cycle_width_d=4")
    places = set()
    sliced = (("slices=3",), ("slices=3", "slice_distance=16"), ("slices=5",))
    for sets in ((), *sliced, ("perturbation=1",)):
        asked = ask(*small, *sets, method="cycle_translate")
        planned = plan(asked)
        structures = planned.dataset.structures
        method = build_method(planned.config, structures, planned.method_class)
        artefact = artefact_path(planned, method, method.stages()[0])
        assert artefact is not None
        places.add(artefact)
    assert len(places) == 5


def test_unknown_names_are_refused_with_the_nearest(ask: Ask) -> None:
    with pytest.raises(PluginError, match="'source_only'"):
        plan(ask(method="source_onyl"))
    with pytest.raises(PluginError, match="'phantom'"):
        plan(ask(dataset="fantom"))


def planned_config(dataset: Phantom, method: type[Method], **changes: Any) -> Any:
    return resolve(small_request(dataset.root, **changes), dataset, method)


@pytest.mark.parametrize("direction", ["mr-ct", "ct-mr"])
def test_adaptation_trains_on_source_labels_and_target_images(
    direction: str, phantom_root: Path
) -> None:
    dataset = Phantom(phantom_root)
    source, target = direction.split("-")
    chosen = roles(planned_config(dataset, LocalOnly, direction=direction), dataset)
    assert chosen["source_train"] == dataset.split(source, "train")
    assert chosen["source_val"] == dataset.split(source, "val")
    assert chosen["test"] == dataset.split(target, "test")
    assert [case.id for case in chosen["target_train"]] == [
        case.id for case in dataset.split(target, "train")
    ]
    assert all(type(case) is UnlabelledCase for case in chosen["target_train"])


def test_the_supervised_scenario_never_trains_on_a_test_case(phantom_root: Path) -> None:
    dataset = Phantom(phantom_root)
    config = planned_config(dataset, SourceOnly, scenario="supervised")
    chosen = roles(config, dataset)
    assert config.privileged
    assert chosen["source_train"] == dataset.split("ct", "train")
    assert chosen["source_val"] == dataset.split("ct", "val")
    assert chosen["test"] == dataset.split("ct", "test")
    tested = {case.id for case in chosen["test"]}
    for role in ("source_train", "source_val", "target_train"):
        assert not tested & {case.id for case in chosen[role]}


class Shared(Phantom):
    """A subject is in training and test."""

    def cases(self, domain: str) -> tuple[Case, ...]:
        return tuple(
            replace(case, subject="twin") if case.split == split else case
            for case in super().cases(domain)
            for split in ("test" if domain == "ct" else "train",)
        )


class Untested(Phantom):
    """The target has no test cases."""

    def cases(self, domain: str) -> tuple[Case, ...]:
        return tuple(case for case in super().cases(domain) if case.split != "test")


@pytest.mark.parametrize(
    ("kind", "said"), [(Shared, "Subject twin"), (Untested, "has no test case of")]
)
def test_splits_that_give_no_honest_result_are_refused(
    kind: type[Phantom], said: str, phantom_root: Path
) -> None:
    dataset = kind(phantom_root)
    assert said in refusal(roles, planned_config(dataset, SourceOnly), dataset)


def test_the_same_request_has_the_same_id_wherever_it_runs(
    phantom_root: Path, tmp_path: Path
) -> None:
    first = plan(small_request(phantom_root, tmp_path / "a"))
    copied = shutil.copytree(phantom_root, tmp_path / "elsewhere" / "data")
    second = plan(small_request(copied, tmp_path / "b", mlflow=True))
    assert first.id == second.id
    assert second.directory.path == tmp_path / "b" / "phantom" / "source_only" / first.id
    assert not (tmp_path / "a").exists()


def test_the_id_follows_the_configuration(ask: Ask) -> None:
    requests = [
        ask(),
        ask(steps=4),
        ask(seed=1),
        ask(direction="ct-mr"),
        ask(scenario="supervised"),
        ask(augmentation="none"),
        ask("method.lr=0.0123"),
        ask("grid.spacing=7.5"),
        ask("segmenter.width=5"),
    ]
    assert len({plan(request).id for request in requests}) == len(requests)


@pytest.mark.parametrize("what", ["source label", "target image", "test label", "validation image"])
def test_the_id_follows_every_file_that_is_used(
    what: str, phantom_root: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(phantom_root, tmp_path / "data")
    dataset = Phantom(root)
    before = plan(small_request(root)).id
    path = {
        "source label": dataset.split("mr", "train")[0].label,
        "target image": dataset.split("ct", "train")[0].image,
        "test label": dataset.split("ct", "test")[0].label,
        "validation image": dataset.split("mr", "val")[0].image,
    }[what]
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels.flat[0] = voxels.flat[1] = voxels.max()
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)
    assert plan(small_request(root)).id != before


def test_the_id_ignores_the_targets_training_labels(phantom_root: Path, tmp_path: Path) -> None:
    """Nothing in an adaptation run may depend on them, including the id."""
    root = shutil.copytree(phantom_root, tmp_path / "data")
    before = plan(small_request(root)).id
    path = Phantom(root).split("ct", "train")[0].label
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 0, image.affine, image.header), path)
    assert plan(small_request(root)).id == before
    assert plan(small_request(root, scenario="supervised")).id != before


def test_the_id_follows_the_code(
    ask: Ask, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(changed: str) -> str:
        """Return the id of the run of a changed plugin in its own directory."""
        path = tmp_path / str(len(list(tmp_path.iterdir()))) / plugin.name
        path.parent.mkdir()
        path.write_text(changed)
        return plan(ask(method="plugged", plugins=[path])).id

    first = of(PLUGIN)
    assert of(PLUGIN.replace("a twist", "two twists")) == first  # a docstring
    assert of(PLUGIN + "    twist = 0.5\n") != first != plan(ask()).id
    monkeypatch.setattr(glua_bench, "__version__", "0.0.0")
    assert of(PLUGIN) != first
