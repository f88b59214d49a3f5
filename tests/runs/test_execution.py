"""runs.py: what is refused, what an id depends on, and what a run leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import glua_bench
from glua_bench import config as configuration
from glua_bench.config import changed_settings, variant_name
from glua_bench.conformance import Bench, quiet_machine
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import Neighbourhood, Stacks
from glua_bench.data.stores import ImageStore
from glua_bench.data.volumes import load_image
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.errors import ConfigError, PluginError, RunFailure
from glua_bench.method import Method, Role, Stage, TaskInfo
from glua_bench.methods.fda import exchange_amplitudes
from glua_bench.methods.local_only import LocalOnly
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.registry import Registry
from glua_bench.reports.run_figures import draw_run
from glua_bench.runs import execution
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import (
    PlannedRun,
    build_method,
    check_slices,
    perturb,
    plan,
    resolve,
    roles,
)
from glua_bench.runs.request import RunRequest
from glua_bench.runs.stage_cache import artefacts
from glua_bench.scoring.evaluation import summarise
from glua_bench.task import Case, Grid, UnlabelledCase

SMALL = (
    "segmenter.name=unet",
    "segmenter.width=4",
    "segmenter.depth=3",
    "grid.size=32",
    "grid.spacing=7",
    "grid.slice_spacing=8",
    "batch_size=2",
    "candidates=2",
)
QUIET = Progress(enabled=False)


def ask(phantom_root: Path, runs_root: Path = Path("runs"), *sets: str, **changes: Any) -> Any:
    """A run that takes a second: three steps of a small network."""
    asked = RunRequest(
        "source_only",
        "phantom",
        direction="mr-ct",
        preset="quick",
        steps=3,
        augmentation="geometric",
        assignments=[*SMALL, *sets],
        data_root=phantom_root,
        runs_root=runs_root,
        device="cpu",
        mlflow=False,
    )
    return replace(asked, **changes)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and text[:-1].count(". ") == 0
    return text


PLUGIN = '''
from glua_bench.methods.source_only import SourceOnly
from glua_bench.method import Method

class Plugged(SourceOnly, Method):
    """Source only, with a twist."""

    name = "plugged"
    reference = "none"
    needs = "nothing"
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugged.py"
    path.write_text(PLUGIN)
    return path


# -- resolving ------------------------------------------------------------------------------------


class Tuned(SourceOnly):
    """Has opinions about one preset."""

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
    "scenario": ({"scenario": "oracle"}, "scenario = 'oracle'"),
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
    "run option": (["stepps=3"], "--set stepps"),
    "seed by set": (["seed=3"], "--set seed"),
    "group": (["net.width=3"], "unknown group 'net'"),
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
    name: str, phantom_root: Path, tmp_path: Path
) -> None:
    changes, said = REFUSED[name]
    sets = changes if isinstance(changes, list) else []
    others = changes if isinstance(changes, dict) else {}
    with pytest.raises(ConfigError) as error:
        plan(ask(phantom_root, tmp_path / "runs", *sets, **others))
    assert said in one_sentence(error)
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
    sets: list[str], changes: dict[str, Any], phantom_root: Path, tmp_path: Path
) -> None:
    assert plan(ask(phantom_root, tmp_path / "runs", *sets, **changes)).stages


# -- what a method fits to its data ---------------------------------------------------------------

FITTING = '''
from dataclasses import dataclass

from glua_bench.config import setting
from glua_bench.method import Adjustment, Method
from glua_bench.methods.source_only import SegmentConfig, SourceOnly

@dataclass(frozen=True)
class FittingConfig(SegmentConfig):
    clusters: int = setting(6, "at most as many as cases", low=1, high=64)

class Fitting(SourceOnly, Method):
    """Source only, with clusters of target cases."""

    name = "fitting"
    reference = "none"
    needs = "nothing"
    Config = FittingConfig

    def check(self, cases):
        if self.config.clusters <= cases.target:
            return {}
        return {"clusters": Adjustment(cases.target, f"training has {cases.target} target case(s)")}
'''


@pytest.fixture
def fitting(tmp_path: Path) -> Path:
    path = tmp_path / "fitting.py"
    path.write_text(FITTING)
    return path


def test_a_fitted_setting_is_told_recorded_and_used(
    fitting: Path, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    asked = ask(phantom_root, tmp_path / "runs", method="fitting", plugins=[fitting])
    planned = plan(asked, lines.append)
    told = "method.clusters is 1 instead of 6: training has 1 target case(s)."
    assert [line for line in lines if "clusters" in line] == [told]
    assert planned.config.method_config["clusters"] == 1
    built: list[int] = []
    original = build_method

    def build(*given: Any) -> Method:
        built.append(original(*given).config.clusters)
        return original(*given)

    monkeypatch.setattr(execution, "build_method", build)
    execute(planned, QUIET)
    assert built == [1]  # what trains has the value as well
    recorded = RunDirectory.open(planned.directory.path).config
    assert recorded.method_config["clusters"] == 1
    assert planned.directory.read_environment()["changed"]["clusters"] == 1


def test_the_id_is_that_of_the_fitted_setting(
    fitting: Path, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def planned(*sets: str) -> PlannedRun:
        asked = ask(phantom_root, tmp_path, *sets, method="fitting", plugins=[fitting])
        return plan(asked, lines.append)

    fitted, other = planned(), planned("method.clusters=4")
    assert len(lines) == 2
    said = planned("method.clusters=1")
    assert len(lines) == 2  # what fits is not told
    assert fitted.id == other.id == said.id
    monkeypatch.setattr(said.method_class, "check", lambda self, cases: {})
    assert planned().config.method_config["clusters"] == 6
    assert planned().id != fitted.id


def test_a_method_may_decline_what_it_cannot_fit(
    fitting: Path, phantom_root: Path, tmp_path: Path
) -> None:
    declining = """
    def check(self, cases):
        from glua_bench.errors import ConfigError
        raise ConfigError(f"method.clusters = 6 with {cases} cannot be; give more cases.")
"""
    fitting.write_text(FITTING.split("    def check")[0] + declining)
    with pytest.raises(ConfigError) as error:
        plan(ask(phantom_root, tmp_path / "runs", method="fitting", plugins=[fitting]))
    assert "Cases(source=1, target=1)" in one_sentence(error)


# -- the contract ---------------------------------------------------------------------------------


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
    definition: str, called: str, plugin: Path, phantom_root: Path, tmp_path: Path
) -> None:
    plugin.write_text(f"{PLUGIN}\n    def {definition}:\n        raise AssertionError\n")
    with pytest.raises(PluginError) as error:
        plan(ask(phantom_root, tmp_path / "runs", method="plugged", plugins=[plugin]))
    assert one_sentence(error) == (
        f"Method 'plugged' defines {definition}, which glua-bench calls as {called}; change its "
        "definition to that."
    )


def test_functions_may_take_more_than_they_are_given(
    plugin: Path, phantom_root: Path, tmp_path: Path
) -> None:
    more = """
    def optimizers(self, rate=1.0):
        return super().optimizers()

    def predict(self, *given, **named):
        return super().predict(*given, **named)
"""
    plugin.write_text(PLUGIN + more)
    assert plan(ask(phantom_root, tmp_path / "runs", method="plugged", plugins=[plugin])).stages


# -- whose images are predicted -------------------------------------------------------------------


def test_evaluation_asks_for_the_target_and_selectors_for_both(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a method that finds one structure in all pixels of the target, another in the source's."""
    plugins = [Path(__file__).parents[1] / "support" / "two_faced_method.py"]
    asked = ask(phantom_root, tmp_path / "runs", method="two_faced", plugins=plugins)
    planned = plan(asked)
    classes: dict[bool, list[int]] = {True: [], False: []}  # with labels, and without
    original = execution.sample_pixels

    def sample_pixels(*given: Any) -> Any:
        found = original(*given)
        for part in (found.logits, found.features):
            classes[found.labels is not None] += part.argmax(1).unique().tolist()
        return found

    monkeypatch.setattr(execution, "sample_pixels", sample_pixels)
    execute(planned, QUIET)
    # Logits and features of two candidates: of the target's slices, and of both source roles.
    assert classes == {False: [1] * 4, True: [2] * 8}

    (case,) = planned.dataset.split("ct", "test")
    predicted = np.asarray(nib.load(planned.directory.predictions / f"{case.id}.nii.gz").dataobj)
    value = planned.dataset.structures[0].values[0]
    assert set(np.unique(predicted).tolist()) <= {0, value} and (predicted == value).any()

    _, val, _ = execution.stores(planned, SliceCache(), QUIET)
    assert val is not None
    labels = val.labels(range(len(val)))
    count = (labels == 2).sum()
    expected = 2 * count / (labels.size + count) / len(np.unique(labels[labels > 0]))
    scores = planned.directory.read_summary()["selector_scores"]["source_val"]
    assert list(scores.values()) == pytest.approx([expected] * 2)


# -- neighbouring slices --------------------------------------------------------------------------


class AsBefore(SourceOnly):
    """Gives its networks one channel, whatever the task says."""

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
        (AsBefore, "(predict raises RuntimeError); build its networks with task.slices channels"),
        (FewLogits, "(predict gives the shape (1, 2, 32, 32))"),
        (TranslatesOne, "(translate gives the shape (1, 1, 32, 32))"),
    ],
)
def test_a_method_that_is_not_made_for_several_slices_is_declined_before_training(
    method: type[Method], said: str, phantom_root: Path
) -> None:
    dataset = Phantom(phantom_root)
    one = resolve(ask(phantom_root), dataset, SourceOnly)
    check_slices(one, build_method(one, dataset.structures, method))
    three = replace(one, slices=3)
    with pytest.raises(ConfigError) as error:
        check_slices(three, build_method(three, dataset.structures, method))
    text = one_sentence(error)
    assert said in text and text.startswith(
        "slices = 3: method 'source_only' does not support stacks"
    )
    sound = build_method(three, dataset.structures, SourceOnly)
    torch.manual_seed(0)
    check_slices(three, sound)
    assert sound.training and torch.equal(torch.rand(1), torch.manual_seed(0) and torch.rand(1))


def test_a_plugin_that_is_not_made_for_several_slices_is_one_sentence(
    phantom_root: Path, tmp_path: Path
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
    asked = ask(phantom_root, tmp_path / "runs", method="plugged", plugins=[plugin])
    assert plan(asked).config.slices == 1
    with pytest.raises(ConfigError) as error:
        plan(replace(asked, assignments=[*SMALL, "slices=3"]))
    assert "method 'plugged' does not support stacks of slices" in one_sentence(error)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def thick(phantom_root: Path, tmp_path: Path) -> Path:
    """The cohort with MR slices that are said to be 9 mm apart, and CT slices 2 mm."""
    root = tmp_path / "thick"
    shutil.copytree(phantom_root, root)
    dataset = Phantom(root)
    for domain, thickness in (("mr", 9.0), ("ct", 2.0)):
        for case in dataset.cases(domain):
            for path in (case.image, case.label):
                image: Any = nib.load(path)
                axis = load_image(case.image, dataset.reading, Grid(32, 7.0)).placement.axes[0]
                affine = image.affine.copy()
                affine[:3, axis] *= thickness / np.linalg.norm(affine[:3, axis])
                nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    return root


def test_neighbours_are_as_far_apart_as_the_thicker_domain_s_slices(
    thick: Path, tmp_path: Path
) -> None:
    """For every method, scenario and direction alike, and part of the run's identity."""
    own = ("grid.slice_spacing=null", "slices=3")
    found = {}
    for name, changes in {
        "lower": {},
        "upper": {"scenario": "supervised"},
        "adapted": {"method": "local_only"},
        "back": {"direction": "ct-mr"},
    }.items():
        found[name] = plan(ask(thick, tmp_path / "runs", *own, **changes)).config
    assert {c.slice_distance for c in found.values()} == {9.0}
    asked = plan(ask(thick, tmp_path / "runs", *own, "slice_distance=4"))
    assert asked.config.slice_distance == 4.0 and isinstance(asked.config.slice_distance, float)
    assert asked.id != plan(ask(thick, tmp_path / "runs", *own)).id
    on_grid = plan(ask(thick, tmp_path / "runs", "slices=3")).config
    assert on_grid.slice_distance == on_grid.grid.slice_spacing == 8
    assert plan(ask(thick, tmp_path / "runs", own[0])).config.slice_distance is None


def test_training_and_test_see_neighbours_at_that_distance(
    thick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(ask(thick, tmp_path / "runs", "grid.slice_spacing=null", "slices=3",
                       method="local_only"))  # fmt: skip
    train, val, target = execution.stores(planned, SliceCache(), QUIET)
    assert val is not None and target is not None
    for store, step in ((train, 1), (val, 1), (target, 5)):  # MR 9 mm, CT 2 mm: 10 mm
        alone = ImageStore(store._images._entries)  # type: ignore[arg-type]
        z = int(store.positions.max() // 2)
        stack = store.images([z])[0]
        assert np.array_equal(stack, alone.images([z - step, z, z + step])[:, 0])
    seen: list[int] = []
    plain = Neighbourhood.stacks

    def stacks(self: Neighbourhood, volume: np.ndarray, spacing: float) -> Stacks:
        seen.append(self.step(spacing))
        return plain(self, volume, spacing)

    monkeypatch.setattr(Neighbourhood, "stacks", stacks)
    execute(planned, QUIET)
    assert seen and set(seen) == {5}  # the test volumes are CT
    stored = RunDirectory.open(planned.directory.path).config
    assert (stored.slices, stored.slice_distance) == (3, 9.0)


def test_figures_show_the_slice_that_is_labelled(phantom_root: Path, tmp_path: Path) -> None:
    shown: dict[int, Any] = {}
    for slices in (1, 3):
        asked = ask(phantom_root, tmp_path / "runs", f"slices={slices}", method="fda")

        def draw(run: Any, dataset: Any, rows: Any, batch: Any, pictures: Any) -> None:
            shown[len(shown)] = batch, pictures

        execute(plan(asked), QUIET, draw)
    (alone, _), (stacked, pictures) = shown.values()
    assert torch.equal(alone.source_images, stacked.source_images)
    assert torch.equal(alone.target_images, stacked.target_images)
    assert torch.equal(alone.source_labels, stacked.source_labels)
    assert {picture.shape[1] for picture in pictures.values()} == {1}
    # Each slice takes the amplitudes of the target's in its place: the middle one its own target's.
    expected = exchange_amplitudes(alone.source_images, alone.target_images, 0.05)
    torch.testing.assert_close(pictures["restyled"], expected)


def test_slices_that_are_no_neighbours_are_not_stacked(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Phantom, "neighbouring_slices", False)
    assert plan(ask(phantom_root, tmp_path / "runs")).config.slices == 1
    with pytest.raises(ConfigError) as error:
        plan(ask(phantom_root, tmp_path / "runs", "slices=3"))
    assert "dataset 'phantom' trains on slices that are not neighbours" in one_sentence(error)
    from glua_bench.datasets.mmwhs_sifa import MMWHSSIFA

    assert not MMWHSSIFA.neighbouring_slices


def test_a_perturbation_moves_last_bits_alone_and_is_another_run(
    phantom_root: Path, tmp_path: Path
) -> None:
    def built(*sets: str) -> tuple[PlannedRun, Method]:
        planned = plan(ask(phantom_root, tmp_path / "runs", *sets))
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
        # The float below a power of two is half as far away as the one above.
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


def test_a_stage_is_shared_by_runs_on_as_many_slices_and_last_bits_alone(
    phantom_root: Path, tmp_path: Path
) -> None:
    small = ("method.cycle_width=4", "method.cycle_width_d=4")
    places = set()
    sliced = (("slices=3",), ("slices=3", "slice_distance=16"), ("slices=5",))
    for sets in ((), *sliced, ("perturbation=1",)):
        asked = ask(phantom_root, tmp_path / "runs", *small, *sets, method="cycle_translate")
        planned = plan(asked)
        structures = planned.dataset.structures
        method = build_method(planned.config, structures, planned.method_class)
        artefact = artefacts(planned, method)(method.stages()[0])
        assert artefact is not None
        places.add(artefact)
    assert len(places) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "tpu"}, "--device tpu"),
        ({"device": "cuda"}, "--device cuda"),
        ({"precision": "16-mixed"}, "16-mixed"),
        ({"devices": 3}, "batch_size = 2"),
    ],
)
def test_a_machine_that_cannot_serve_is_one_sentence_before_anything_is_written(
    changes: dict[str, Any],
    said: str,
    phantom_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = plan(ask(phantom_root, tmp_path / "runs", **changes))
    with pytest.raises(ConfigError) as error:
        execute(planned, QUIET)
    assert said in one_sentence(error)
    assert not (tmp_path / "runs").exists()


def test_unknown_names_are_refused_with_the_nearest(phantom_root: Path) -> None:
    with pytest.raises(PluginError, match="'source_only'"):
        plan(ask(phantom_root, method="source_onyl"))
    with pytest.raises(PluginError, match="'phantom'"):
        plan(ask(phantom_root, dataset="fantom"))


# -- who plays which role -------------------------------------------------------------------------


def planned_config(dataset: Phantom, method: type[Method], **changes: Any) -> Any:
    return resolve(ask(dataset.root, **changes), dataset, method)


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
    """One person was scanned twice, once for training and once for the test."""

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


@pytest.mark.parametrize(("kind", "said"), [(Shared, "Subject twin"), (Untested, "for the test")])
def test_splits_that_give_no_honest_result_are_refused(
    kind: type[Phantom], said: str, phantom_root: Path
) -> None:
    dataset = kind(phantom_root)
    with pytest.raises(ConfigError) as error:
        roles(planned_config(dataset, SourceOnly), dataset)
    assert said in one_sentence(error)


# -- the id ---------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_id_wherever_it_runs(
    phantom_root: Path, tmp_path: Path
) -> None:
    first = plan(ask(phantom_root, tmp_path / "a"))
    copied = shutil.copytree(phantom_root, tmp_path / "elsewhere" / "data")
    second = plan(ask(copied, tmp_path / "b", mlflow=True))
    assert first.id == second.id
    assert second.directory.path == tmp_path / "b" / "phantom" / "source_only" / first.id
    assert not (tmp_path / "a").exists()


def test_the_id_follows_the_configuration(phantom_root: Path) -> None:
    requests = [
        ask(phantom_root),
        ask(phantom_root, steps=4),
        ask(phantom_root, seed=1),
        ask(phantom_root, direction="ct-mr"),
        ask(phantom_root, scenario="supervised"),
        ask(phantom_root, augmentation="none"),
        ask(phantom_root, Path("runs"), "method.lr=0.0123"),
        ask(phantom_root, Path("runs"), "grid.spacing=7.5"),
        ask(phantom_root, Path("runs"), "segmenter.width=5"),
    ]
    assert len({plan(request).id for request in requests}) == len(requests)


@pytest.mark.parametrize("what", ["source label", "target image", "test label", "validation image"])
def test_the_id_follows_every_file_that_is_used(
    what: str, phantom_root: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(phantom_root, tmp_path / "data")
    dataset = Phantom(root)
    before = plan(ask(root)).id
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
    assert plan(ask(root)).id != before


def test_the_id_ignores_the_targets_training_labels(phantom_root: Path, tmp_path: Path) -> None:
    """Nothing of an adaptation run may depend on them, not even its name."""
    root = shutil.copytree(phantom_root, tmp_path / "data")
    before = plan(ask(root)).id
    path = Phantom(root).split("ct", "train")[0].label
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 0, image.affine, image.header), path)
    assert plan(ask(root)).id == before
    assert plan(ask(root, scenario="supervised")).id != before


def test_the_id_follows_the_code(
    phantom_root: Path, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(changed: str) -> str:
        """The id of the plugin's run, with its text changed, from a folder of its own."""
        path = tmp_path / str(len(list(tmp_path.iterdir()))) / plugin.name
        path.parent.mkdir()
        path.write_text(changed)
        return plan(ask(phantom_root, method="plugged", plugins=[path])).id

    first = of(PLUGIN)
    assert of(PLUGIN.replace("a twist", "two twists")) == first  # a docstring
    assert of(PLUGIN + "    twist = 0.5\n") != first != plan(ask(phantom_root)).id
    monkeypatch.setattr(glua_bench, "__version__", "0.0.0")
    assert of(PLUGIN) != first


# -- executing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    phantom_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PlannedRun, execution.Summary]:
    """One run from end to end, with its figures."""
    planned = plan(ask(phantom_root, tmp_path_factory.mktemp("runs"), method="fda"))
    return planned, execute(planned, QUIET, draw_run)


def test_a_run_leaves_all_its_files(finished: tuple[PlannedRun, execution.Summary]) -> None:
    planned, summary = finished
    path = planned.directory.path
    assert not summary.already_done and summary.warnings == [] and summary.seconds > 0
    for name in (
        "config.yaml",
        "environment.json",
        "log.jsonl",
        "metrics.parquet",
        "cases.parquet",
        "summary.json",
        "done",
        "figures/cases.png",
        "figures/restyled.png",  # the method's own pictures
    ):
        assert (path / name).stat().st_size > 0, name
    assert not list(path.rglob(".writing-*"))
    assert not (path / "failed").exists()
    assert planned.directory.done

    again = configuration.RunConfig.from_dict(yaml.safe_load((path / "config.yaml").read_text()))
    assert again == planned.config
    environment = planned.directory.read_environment()
    assert environment["run"] == planned.id and environment["code"] == planned.code
    assert environment["data"]["train"] == planned.fingerprints.train
    assert environment["privileged"] is False
    assert environment["changed"] == changed_settings(planned.config, planned.method_class)
    assert environment["variant"] == variant_name(planned.config, planned.method_class)


def test_its_log_has_every_step_once(finished: tuple[PlannedRun, execution.Summary]) -> None:
    planned, _ = finished
    log = (planned.directory.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["total_step"] for line in log] == [1, 2, 3]
    metrics = planned.directory.read_metrics()
    assert set(metrics["name"]) == set(json.loads(log[0])["values"])
    assert (metrics.groupby("name")["step"].apply(list).map(tuple) == (1, 2, 3)).all()


def test_its_table_has_a_row_for_every_case_structure_and_selector(
    finished: tuple[PlannedRun, execution.Summary],
) -> None:
    planned, summary = finished
    rows = planned.directory.read_cases()
    test = planned.dataset.split("ct", "test")
    names = [structure.name for structure in planned.dataset.structures]
    expected = {
        (case.id, name, selector)
        for case in test
        for name in names
        for selector in set(rows["selector"])
    }
    assert set(zip(rows["case"], rows["structure"], rows["selector"], strict=True)) == expected
    assert len(rows) == len(expected)
    assert (rows["run"] == planned.id).all() and (rows["method"] == "fda").all()
    assert (rows["direction"] == "mr-ct").all() and (rows["seed"] == 0).all()
    last = rows[rows["selector"] == "last"]
    assert (last["step"] == 3).all()
    pd.testing.assert_frame_equal(summary.table, summarise(rows))


def test_its_predictions_lie_on_the_images(
    finished: tuple[PlannedRun, execution.Summary],
) -> None:
    planned, _ = finished
    test = planned.dataset.split("ct", "test")
    files = sorted(path.name for path in planned.directory.predictions.iterdir())
    assert files == [f"{case.id}.nii.gz" for case in test]
    for case in test:
        saved, image = nib.load(planned.directory.predictions / files[0]), nib.load(case.image)
        assert saved.shape == image.shape
        np.testing.assert_array_equal(saved.affine, image.affine)


def test_it_keeps_the_checkpoints_that_a_selector_chose(
    finished: tuple[PlannedRun, execution.Summary],
) -> None:
    planned, _ = finished
    chosen = planned.directory.read_summary()["chosen_steps"]
    judged = {name for name in planned.config.selectors if name != "class_silhouette"}
    assert judged <= set(chosen) and chosen["last"] == 3
    scores = planned.directory.read_summary()["selector_scores"]
    assert all(set(by_step) == {"2", "3"} for by_step in scores.values())
    kept = {path.stem for path in planned.directory.checkpoints.iterdir()}  # nothing to go on from
    assert kept == {f"candidate_{step:07d}" for step in chosen.values()}


def test_selectors_that_need_target_images_leave_out_a_method_without(
    phantom_root: Path, tmp_path: Path
) -> None:
    planned = plan(ask(phantom_root, tmp_path))
    summary = execute(planned, QUIET)
    assert set(summary.table["selector"]) == {"last", "source_val"}


def test_the_oracle_is_asked_for_flagged_and_at_least_as_good(
    phantom_root: Path, tmp_path: Path, finished: tuple[PlannedRun, execution.Summary]
) -> None:
    asked = ask(phantom_root, tmp_path, oracle=True, steps=6)
    planned = plan(asked)
    execute(planned, QUIET)
    rows = planned.directory.read_cases()
    assert set(rows[rows["privileged_selection"]]["selector"]) == {"oracle"}
    assert set(rows[~rows["privileged_selection"]]["selector"]) == {"last", "source_val"}
    summary = planned.directory.read_summary()
    by_step = summary["selector_scores"]["oracle"]
    assert set(by_step) == {"3", "6"}
    best = by_step[str(summary["chosen_steps"]["oracle"])]
    assert best == max(by_step.values())
    mean = summarise(rows).query("structure == 'mean'").set_index("selector")["dice"]
    assert mean["oracle"] == pytest.approx(best) and mean["oracle"] >= mean["last"]
    assert mean["last"] == pytest.approx(by_step["6"])
    assert execute(planned, QUIET).already_done

    # Without it there is none, and a finished run cannot be asked afterwards.
    assert "oracle" not in set(finished[0].directory.read_cases()["selector"])
    late = replace(finished[0].request, oracle=True)
    with pytest.raises(ConfigError) as error:
        execute(plan(late), QUIET)
    assert "without --oracle" in one_sentence(error)


def test_the_same_command_again_does_nothing(
    finished: tuple[PlannedRun, execution.Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, first = finished
    before = snapshot(planned.directory.path)

    def unexpected(*arguments: Any, **named: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(execution, "Trainer", unexpected)
    again = execute(plan(planned.request), QUIET, draw_run)
    assert again.already_done
    pd.testing.assert_frame_equal(again.table, first.table)
    assert snapshot(planned.directory.path) == before


def test_two_runs_of_one_id_give_the_same_numbers(phantom_root: Path, tmp_path: Path) -> None:
    tables = []
    for name in ("a", "b"):
        planned = plan(ask(phantom_root, tmp_path / name))
        execute(planned, QUIET)
        tables.append(planned.directory.read_cases())
    pd.testing.assert_frame_equal(*tables)


def test_a_supervised_run_is_stamped_privileged(phantom_root: Path, tmp_path: Path) -> None:
    planned = plan(ask(phantom_root, tmp_path, scenario="supervised"))
    execute(planned, QUIET)
    assert planned.directory.read_environment()["privileged"] is True
    assert planned.directory.read_summary()["privileged"] is True
    assert (planned.directory.read_cases()["scenario"] == "supervised").all()


# -- failing --------------------------------------------------------------------------------------

FAILING = (
    PLUGIN
    + """
    def step(self, batch, context):
        logs = super().step(batch, context)
        if context.step == 1:
            {what}
        return logs
"""
)


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ('return {"segmentation": logs["segmentation"] * float("nan")}', RunFailure, "nan"),
        ('raise RuntimeError("out of memory")', RuntimeError, "out of memory"),
        ('raise KeyError("no such thing")', KeyError, "no such thing"),
    ],
)
def test_a_failed_run_is_marked_and_never_done(
    what: str,
    error: type[Exception],
    said: str,
    plugin: Path,
    phantom_root: Path,
    tmp_path: Path,
) -> None:
    plugin.write_text(FAILING.replace("{what}", what))
    planned = plan(ask(phantom_root, tmp_path / "runs", method="plugged", plugins=[plugin]))
    with pytest.raises(error):
        execute(planned, QUIET)
    directory = planned.directory
    assert not directory.done and not (directory.path / "done").exists()
    assert directory.failed is not None and said in directory.failed
    assert not (directory.path / "cases.parquet").exists()


def test_a_run_that_failed_to_score_goes_on_where_it_was(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(ask(phantom_root, tmp_path))
    with monkeypatch.context() as patch:

        def full(*arguments: Any, **named: Any) -> None:
            raise OSError("no space left")

        patch.setattr(execution, "evaluate", full)
        with pytest.raises(OSError, match="no space"):
            execute(planned, QUIET)
    assert "no space left" in str(planned.directory.failed) and not planned.directory.done

    def retrained(*arguments: Any) -> None:
        raise AssertionError("a step was trained again")

    monkeypatch.setattr(SourceOnly, "step", retrained)
    summary = execute(plan(planned.request), QUIET)
    assert not summary.already_done
    assert planned.directory.done and planned.directory.failed is None


def test_an_interrupted_run_is_neither_done_nor_failed(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SourceOnly, "step", interrupted)
    planned = plan(ask(phantom_root, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        execute(planned, QUIET)
    assert not planned.directory.done and planned.directory.failed is None
    monkeypatch.undo()
    assert not execute(plan(planned.request), QUIET).already_done
    assert planned.directory.done


@pytest.mark.parametrize("selector", ["im", "source_val"])
def test_a_watcher_sees_the_scores_that_the_run_records(
    phantom_root: Path, tmp_path: Path, selector: str
) -> None:
    seen: dict[int, float] = {}
    request = ask(phantom_root, tmp_path / "watched", method="local_only")
    planned = plan(request)
    execute(planned, QUIET, watch=execution.Watch(selector, seen.__setitem__))
    recorded = planned.directory.read_summary()["selector_scores"][selector]
    assert seen == {int(step): value for step, value in recorded.items()} and len(seen) == 2
    alone = plan(replace(request, runs_root=tmp_path / "alone"))
    execute(alone, QUIET)
    rows = [d.directory.read_cases().drop(columns="run") for d in (planned, alone)]
    pd.testing.assert_frame_equal(*rows)


def test_a_run_that_a_watcher_ends_is_neither_done_nor_failed(
    phantom_root: Path, tmp_path: Path
) -> None:
    def see(step: int, score: float) -> None:
        raise execution.Stopped

    planned = plan(ask(phantom_root, tmp_path))
    with pytest.raises(execution.Stopped):
        execute(planned, QUIET, watch=execution.Watch("source_val", see))
    assert not planned.directory.done and planned.directory.failed is None
    execute(plan(planned.request), QUIET)
    assert planned.directory.done


def test_a_tracker_that_is_down_costs_a_warning(
    phantom_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    planned = plan(ask(phantom_root, tmp_path, mlflow=True))
    summary = execute(planned, QUIET)
    assert planned.directory.done
    assert len(summary.warnings) == 1 and "glua-bench sync" in summary.warnings[0]
    assert "127.0.0.1" in capsys.readouterr().err


# -- estimating -----------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def test_an_estimate_trains_nothing_that_stays(
    phantom_root: Path, tmp_path: Path, own_cache: Path
) -> None:
    planned = plan(ask(phantom_root, tmp_path / "runs", steps=1000))
    few = execution.estimate(planned, probe=2)
    assert few > 0
    assert list_runs(tmp_path / "runs") == [] and not (own_cache / "stages").exists()


def test_open_finds_the_run_again(finished: tuple[PlannedRun, execution.Summary]) -> None:
    planned, _ = finished
    found = RunDirectory.open(planned.directory.path)
    assert found.config == planned.config and found.id == planned.id and found.done


# -- labels that leave something open -------------------------------------------------------------


@pytest.mark.parametrize("what", ["partly annotated", "healthy"])
def test_a_run_goes_through_where_labels_say_little(what: str) -> None:
    """All selectors judge, and every case is scored, whatever its label leaves open."""
    selectors = tuple(entry.name for entry in Registry("selector").entries())
    with closing(Bench(SourceOnly)) as bench, quiet_machine(bench.fresh("cache")):
        data = bench.copy_of_data()
        for case in (case for domain in data.domains() for case in data.cases(domain)):
            label: Any = nib.load(case.truth)
            raw = np.asarray(label.dataobj).copy()
            if what == "healthy":
                raw *= case.split == "train"
            else:
                raw[: len(raw) // 2] = data.reading.unannotated_values[0]
            nib.save(nib.Nifti1Image(raw, label.affine), case.truth)
        planned = bench.plan(data, scored=True, options={"selectors": selectors})
        execute(planned, Progress(enabled=False))
        rows = planned.directory.read_cases()
        scores = json.loads((planned.directory.path / "summary.json").read_text())
        (test,) = data.split(planned.config.target, "test")
        raw = np.asarray(nib.load(test.truth).dataobj)
    judged = {name for name, own in scores["selector_scores"].items() if all(own.values())}
    last = rows[rows["selector"] == "last"].set_index("structure")
    for structure in data.structures:
        row = last.loc[structure.name]
        assert row["reference_ml"] == np.isin(raw, structure.values).sum() / 1000
        assert row["prediction_ml"] <= (raw != 40).sum() / 1000
    if what == "healthy":
        assert last["false_alarm"].tolist() == (last["prediction_ml"] > 0).tolist()
        assert last["dice"].fillna(0).tolist() == [0.0, 0.0] and not last["missed"].any()
    else:
        assert {"source_val", "last"} <= judged and last["dice"].notna().all()
