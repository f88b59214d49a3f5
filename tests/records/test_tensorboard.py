"""tensorboard.py: event files hold what a run directory holds, once."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_runs import CASES, SUMMARY, one_sentence, started, two_runs

from glua_bench.errors import ConfigError
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import RunDirectory
from glua_bench.records.tracker import open_tracker

NAME = "glua_bench.records.tensorboard:TensorBoard"


@pytest.fixture(autouse=True)
def _selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLUA_BENCH_TRACKER", NAME)


def complete(run: RunDirectory) -> RunDirectory:
    run.write_cases(CASES)
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(run.figures / "cases.png")
    run.finish(SUMMARY)
    return run


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    return found.Reload()


def text(found: Any, tag: str) -> str:
    (event,) = found.Tensors(f"{tag}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


def test_a_run_is_curves_figures_and_a_row_of_hparams(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = complete(started(tmp_path / "runs with spaces"))
    tracker = open_tracker(tmp_path / "runs with spaces")
    tracker.check()
    assert tracker.mirror(run)
    folder = tmp_path / "runs with spaces/tensorboard/phantom/source_only_mr-ct_seed7_abc123"
    found = events(folder)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 5)
    ]
    headline = {tag: found.Scalars(tag)[0].value for tag in ("dice", "assd", "hd95")}
    assert headline == {"dice": 0.5, "assd": 4.0, "hd95": 9.0}
    (image,) = found.Images("figures/cases")
    assert (image.height, image.width) == (4, 6)
    assert "| seed | 7 |" in text(found, "run") and "| method.lr | 0.001 |" in text(
        found, "settings"
    )
    plugin = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"method.lr" in plugin and b"source_only" in plugin
    assert "--logdir" in tracker.browse and "'" in tracker.browse  # quoted for a shell


def test_a_state_is_written_once_and_replaced_by_the_next(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = started(tmp_path / "runs")
    run.fail("the loss is nan")
    tracker = open_tracker(tmp_path / "runs")
    counts = tracker.sync()
    assert (counts.uploaded, counts.present, counts.missed) == (1, 0, 0)
    (folder,) = (tmp_path / "runs/tensorboard/phantom").iterdir()
    assert "the loss is nan" in text(events(folder), "run")
    assert "dice" not in events(folder).Tags()["scalars"]
    complete(run)
    assert [tracker.sync().uploaded, tracker.sync().present] == [1, 1]
    assert events(folder).Scalars("dice")[0].value == 0.5
    assert len(list(folder.glob("events*"))) == 1
    (folder / "glua_bench.json").unlink()  # killed while writing
    assert tracker.sync().uploaded == 1


def test_a_comparison_is_its_numbers_and_tables(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    members = two_runs(tmp_path / "runs", complete)
    (tmp_path / "table.csv").write_text("entry,Dice\nplain,0.5\n")
    tracker = open_tracker(tmp_path / "runs")
    group = Comparison("compare a", members, began=1000.0)
    for note in ("first", "plain is best"):
        metrics = {"mr-ct/dice/plain": 0.5, "mr-ct/assd/plain": math.nan}
        assert tracker.nest(group, metrics, [tmp_path / "table.csv"], note)
    (folder,) = (tmp_path / "runs/tensorboard/phantom").glob("comparison_*")
    found = events(folder)
    assert found.Scalars("mr-ct/dice/plain")[0].value == 0.5
    assert found.Tags()["scalars"] == ["mr-ct/dice/plain"]
    assert text(found, "description") == "plain is best"
    assert "plain,0.5" in text(found, "tables/table.csv") and "| one | plain |" in text(
        found, "runs"
    )
    assert len(list((tmp_path / "runs/tensorboard/phantom").iterdir())) == 3


def test_files_that_cannot_be_written_are_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = complete(started(tmp_path / "runs"))
    (tmp_path / "runs" / "tensorboard").write_text("a file")
    warnings: list[str] = []
    tracker = open_tracker(tmp_path / "runs", warnings.append)
    assert not tracker.mirror(run) and run.done
    (warning,) = warnings
    assert "glua-bench sync" in warning and "\n" not in warning
    with pytest.raises(OSError, match="is a file"):
        tracker.check()


def test_an_unfinished_run_and_an_unreadable_table_are_one_warning_each(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    warnings: list[str] = []
    tracker = open_tracker(tmp_path / "runs", warnings.append)
    assert not tracker.mirror(started(tmp_path / "runs"))
    assert "neither done nor failed" in warnings.pop() and not warnings
    group = Comparison("compare a", two_runs(tmp_path / "runs", complete), began=1000.0)
    assert not tracker.nest(group, {}, [tmp_path / "missing.csv"])
    assert "do not show this comparison" in warnings.pop() and not warnings


def test_tensorboard_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"glua-bench\[tensorboard\]") as error:
        open_tracker(tmp_path)
    one_sentence(error)
