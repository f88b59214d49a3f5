"""execution.py: what a run leaves behind, and how it fails, resumes and is watched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from small_runs import PLUGIN, QUIET, Ask, refusal, small_request

from glua_bench import config as configuration
from glua_bench.config import changed_settings, variant_name
from glua_bench.conformance import Bench, quiet_machine
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import Neighbourhood, Stacks
from glua_bench.data.stores import ImageStore
from glua_bench.errors import RunFailure
from glua_bench.method import Method
from glua_bench.methods.fda import exchange_amplitudes
from glua_bench.methods.source_only import SourceOnly
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry
from glua_bench.reports.run_figures import draw_run
from glua_bench.runs import execution
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import (
    PlannedRun,
    build_method,
    make_fabric,
    plan,
)
from glua_bench.runs.sealed import training, withheld
from glua_bench.runs.timing.parts import Clock
from glua_bench.scoring.evaluation import summarise

Finished = tuple[PlannedRun, execution.Summary]


def test_selectors_load_each_candidate_once_and_ask_only_for_what_they_use(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The default ones need no features and no other candidate; scores do not depend on it."""
    calls: list[str] = []
    for name in ("load", "features"):
        original = getattr(execution.BuiltRun, name)

        def counted(*given: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            calls.append(name)
            return original(*given, **more)

        monkeypatch.setattr(execution.BuiltRun, name, counted)
    scores: dict[str | None, dict[str, dict[int, float]]] = {}
    for selectors in (None, "all"):
        asked = replace(ask(method="global_only"), runs_root=tmp_path / str(selectors))
        planned = plan(replace(asked, selectors=selectors))
        planned.directory.start({})
        calls.clear()
        built = execution.build_run(planned, make_fabric(asked, planned.config), QUIET)
        built.fit()
        scores[selectors] = training._selector_scores(built, QUIET, Clock(), Clock())
        count = len(built.trainer.candidate_steps())
        expected = count if selectors is None else 2 * count
        assert calls.count("load") == expected
        assert (calls.count("features") > 0) == (selectors == "all")
    assert {name: scores["all"][name] for name in scores[None]} == scores[None]


def test_evaluation_asks_for_the_target_and_selectors_for_both(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method predicts one structure for all target pixels and another for the source's."""
    plugins = [Path(__file__).parents[1] / "support" / "two_faced_method.py"]
    asked = ask(method="two_faced", plugins=plugins, selectors="all")
    planned = plan(asked)
    classes: dict[bool, list[int]] = {True: [], False: []}  # with labels, and without
    original = training.sample_pixels

    def sample_pixels(*given: Any) -> Any:
        found = original(*given)
        for part in (found.logits, found.features):
            classes[found.labels is not None] += part.argmax(1).unique().tolist()
        return found

    monkeypatch.setattr(training, "sample_pixels", sample_pixels)
    execute(planned, QUIET, apart=False)
    # Logits and features of two candidates, for the target and for both source roles.
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


def test_training_and_test_see_neighbours_at_that_distance(
    thick: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("grid.slice_spacing=null", "slices=3")
    planned = plan(thick(*sets, method="local_only"))
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
    execute(planned, QUIET, apart=False)
    assert seen and set(seen) == {5}  # the test volumes are CT
    stored = RunDirectory.open(planned.directory.path).config
    assert (stored.slices, stored.slice_distance) == (3, 9.0)


def test_figures_show_the_slice_that_is_labelled(ask: Ask) -> None:
    shown: dict[int, Any] = {}
    for slices in (1, 3):
        asked = ask(f"slices={slices}", method="fda")

        def draw(run: Any, dataset: Any, rows: Any, batch: Any, pictures: Any) -> None:
            shown[len(shown)] = batch, pictures

        execute(plan(asked), QUIET, draw)
    (alone, _), (stacked, pictures) = shown.values()
    assert torch.equal(alone.source_images, stacked.source_images)
    assert torch.equal(alone.target_images, stacked.target_images)
    assert torch.equal(alone.source_labels, stacked.source_labels)
    assert {picture.shape[1] for picture in pictures.values()} == {1}
    # Each slice gets the amplitudes of the target slice at the same place in the stack.
    expected = exchange_amplitudes(alone.source_images, alone.target_images, 0.05)
    torch.testing.assert_close(pictures["restyled"], expected)


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
    ask: Ask, changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = plan(ask(**changes))
    assert said in refusal(execute, planned, QUIET)
    assert not (tmp_path / "runs").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_fitted_setting_is_told_recorded_and_used(
    ask: Ask, fitting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    asked = ask(method="fitting", plugins=[fitting])
    planned = plan(asked, lines.append)
    told = "method.clusters is 1 instead of 6: training has 1 target case(s)."
    assert [line for line in lines if "clusters" in line] == [told]
    assert planned.config.method_config["clusters"] == 1
    built: list[int] = []
    original = build_method

    def build(*given: Any) -> Method:
        built.append(original(*given).config.clusters)
        return original(*given)

    monkeypatch.setattr(withheld, "build_method", build)
    execute(planned, QUIET, apart=False)
    assert built == [1]  # also in the trained method
    recorded = RunDirectory.open(planned.directory.path).config
    assert recorded.method_config["clusters"] == 1
    assert planned.directory.read_environment()["changed"]["clusters"] == 1


@pytest.fixture(scope="module")
def finished(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Execute one run with its figures."""
    root = tmp_path_factory.mktemp("runs")
    planned = plan(small_request(phantom_root, root, method="fda", selectors="all"))
    return planned, execute(planned, QUIET, draw_run)


def test_a_run_leaves_all_its_files(finished: Finished) -> None:
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
        "figures/strip.png",  # the method's own pictures
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


def test_its_log_has_every_step_once(finished: Finished) -> None:
    planned, _ = finished
    log = (planned.directory.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["total_step"] for line in log] == [1, 2, 3]
    metrics = planned.directory.read_metrics()
    assert set(metrics["name"]) == set(json.loads(log[0])["values"])
    assert (metrics.groupby("name")["step"].apply(list).map(tuple) == (1, 2, 3)).all()


def test_its_table_has_a_row_for_every_case_structure_and_selector(
    finished: Finished,
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
    finished: Finished,
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
    finished: Finished,
) -> None:
    planned, _ = finished
    chosen = planned.directory.read_summary()["chosen_steps"]
    judged = {name for name in planned.config.selectors if name != "class_silhouette"}
    assert judged <= set(chosen) and chosen["last"] == 3
    scores = planned.directory.read_summary()["selector_scores"]
    assert all(set(by_step) == {"2", "3"} for by_step in scores.values())
    kept = {path.stem for path in planned.directory.checkpoints.iterdir()}  # no last.pt
    assert kept == {f"candidate_{step:07d}" for step in chosen.values()}


def test_selectors_that_need_target_images_leave_out_a_method_without(ask: Ask) -> None:
    planned = plan(ask())
    summary = execute(planned, QUIET)
    assert set(summary.table["selector"]) == {"last", "source_val"}


def test_the_oracle_is_asked_for_flagged_and_at_least_as_good(ask: Ask, finished: Finished) -> None:
    asked = ask(oracle=True, steps=6)
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

    # A run finished without the option has no oracle and cannot get one.
    assert "oracle" not in set(finished[0].directory.read_cases()["selector"])
    late = replace(finished[0].request, oracle=True)
    assert "without --oracle" in refusal(execute, plan(late), QUIET)


def test_the_same_command_again_does_nothing(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, first = finished
    before = snapshot(planned.directory.path)

    def unexpected(*arguments: Any, **named: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(execution, "Training", unexpected)
    again = execute(plan(planned.request), QUIET, draw_run)
    assert again.already_done
    pd.testing.assert_frame_equal(again.table, first.table)
    assert snapshot(planned.directory.path) == before


def test_two_runs_of_one_id_give_the_same_numbers(phantom_root: Path, tmp_path: Path) -> None:
    tables = []
    for name in ("a", "b"):
        planned = plan(small_request(phantom_root, tmp_path / name))
        execute(planned, QUIET)
        tables.append(planned.directory.read_cases())
    pd.testing.assert_frame_equal(*tables)


def test_a_supervised_run_is_stamped_privileged(ask: Ask) -> None:
    planned = plan(ask(scenario="supervised"))
    execute(planned, QUIET)
    assert planned.directory.read_environment()["privileged"] is True
    assert planned.directory.read_summary()["privileged"] is True
    assert (planned.directory.read_cases()["scenario"] == "supervised").all()


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
    ask: Ask, what: str, error: type[Exception], said: str, plugin: Path
) -> None:
    plugin.write_text(FAILING.replace("{what}", what))
    planned = plan(ask(method="plugged", plugins=[plugin]))
    with pytest.raises(error):
        execute(planned, QUIET)
    directory = planned.directory
    assert not directory.done and not (directory.path / "done").exists()
    assert directory.failed is not None and said in directory.failed
    assert not (directory.path / "cases.parquet").exists()


def test_a_run_that_failed_to_score_goes_on_where_it_was(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(ask())
    with monkeypatch.context() as patch:

        def full(*arguments: Any, **named: Any) -> None:
            raise OSError("no space left")

        patch.setattr(execution, "score_prediction", full)
        with pytest.raises(OSError, match="no space"):
            execute(planned, QUIET)
    assert "no space left" in str(planned.directory.failed) and not planned.directory.done

    def retrained(*arguments: Any) -> None:
        raise AssertionError("a step was trained again")

    monkeypatch.setattr(SourceOnly, "step", retrained)
    summary = execute(plan(planned.request), QUIET, apart=False)
    assert not summary.already_done
    assert planned.directory.done and planned.directory.failed is None


def test_an_interrupted_run_is_neither_done_nor_failed(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SourceOnly, "step", interrupted)
    planned = plan(ask())
    with pytest.raises(KeyboardInterrupt):
        execute(planned, QUIET, apart=False)
    assert not planned.directory.done and planned.directory.failed is None
    monkeypatch.undo()
    assert not execute(plan(planned.request), QUIET).already_done
    assert planned.directory.done


@pytest.mark.parametrize("selector", ["im", "source_val"])
def test_a_watcher_sees_the_scores_that_the_run_records(
    phantom_root: Path, tmp_path: Path, selector: str
) -> None:
    seen: dict[int, float] = {}
    request = small_request(phantom_root, tmp_path / "watched", method="local_only")
    planned = plan(request)
    execute(planned, QUIET, watch=execution.Watch(selector, seen.__setitem__))
    recorded = planned.directory.read_summary()["selector_scores"][selector]
    assert seen == {int(step): value for step, value in recorded.items()} and len(seen) == 2
    alone = plan(replace(request, runs_root=tmp_path / "alone"))
    execute(alone, QUIET)
    rows = [d.directory.read_cases().drop(columns="run") for d in (planned, alone)]
    pd.testing.assert_frame_equal(*rows)


def test_a_run_that_a_watcher_ends_is_neither_done_nor_failed(ask: Ask) -> None:
    def see(step: int, score: float) -> None:
        raise execution.Stopped

    planned = plan(ask())
    with pytest.raises(execution.Stopped):
        execute(planned, QUIET, watch=execution.Watch("source_val", see))
    assert not planned.directory.done and planned.directory.failed is None
    execute(plan(planned.request), QUIET)
    assert planned.directory.done


def test_a_tracker_that_is_down_costs_a_warning(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    planned = plan(ask(mlflow=True))
    summary = execute(planned, QUIET)
    assert planned.directory.done
    assert len(summary.warnings) == 1 and "glua-bench sync" in summary.warnings[0]
    assert "127.0.0.1" in capsys.readouterr().err


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def test_open_finds_the_run_again(finished: Finished) -> None:
    planned, _ = finished
    found = RunDirectory.open(planned.directory.path)
    assert found.config == planned.config and found.id == planned.id and found.done


@pytest.mark.parametrize("what", ["partly annotated", "healthy"])
def test_a_run_goes_through_where_labels_say_little(what: str) -> None:
    """All selectors and all cases are scored."""
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
