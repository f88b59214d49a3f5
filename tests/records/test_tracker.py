"""tracker.py: the choice of a tracker."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_runs import one_sentence

from glua_bench.errors import ConfigError
from glua_bench.records.mlflow_mirror import MLflowMirror
from glua_bench.records.tracker import open_tracker


def test_runs_are_mirrored_to_mlflow_unless_another_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_tracker(tmp_path), MLflowMirror)
    assert open_tracker(tmp_path).browse.startswith("mlflow ui --backend-store-uri sqlite:///")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracker:5000")
    assert open_tracker(tmp_path).browse == "http://tracker:5000"
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "folder_tracker:FolderTracker")
    monkeypatch.setenv("FOLDER_TRACKER", str(tmp_path / "shown"))
    assert open_tracker(tmp_path).place == str(tmp_path / "shown")


@pytest.mark.fault("tracker", "GLUA_BENCH_TRACKER names no class")
@pytest.mark.parametrize("name", ["no_module:Class", "json:Missing", "a b", "wandb"])
def test_a_tracker_that_is_not_there_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUA_BENCH_TRACKER", name)
    with pytest.raises(ConfigError, match="MODULE:CLASS") as error:
        open_tracker(tmp_path)
    assert name in one_sentence(error)
