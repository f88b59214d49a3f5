"""Finished runs without training, and their copies on a tracker."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from glua_bench.config import RunConfig
from glua_bench.records import seal
from glua_bench.records.mlflow_mirror import MLflowMirror, mlflow_client, tracking_uri
from glua_bench.records.run_directory import RunDirectory, digest_of
from glua_bench.task import Grid

CONFIG = RunConfig(
    "source_only",
    "phantom",
    "mr-ct",
    Grid(32, 7.0),
    {"lr": 0.001, "form": "plain"},
    steps=4,
    seed=7,
)


SUMMARY = {
    "scores": [
        {"selector": "last", "dice": 0.5, "hd95": 9.0, "misses": 2, **own}
        for own in ({"structure": "MYO", "assd": float("nan")}, {"structure": "mean", "assd": 4.0})
    ]
}


CASES = pd.DataFrame(
    {"case": ["ct_1", "ct_2"], "structure": ["MYO", "MYO"], "dice": [0.25, 0.75], "missed": 0}
)


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", ")"))
    return text


def started(root: Path, run_id: str = "abc123", config: RunConfig = CONFIG) -> RunDirectory:
    """Return a run with four logged steps."""
    run = RunDirectory(root, config, run_id)
    run.start({"data": {"train": "d1", "test": "d2"}, "code": "c1"}, [("train", 4)])
    for step in range(1, 5):
        run.log("train", step, {"loss": 1.0 / step, "dice": 0.1 * step})
    run.flush()
    return run


def complete(run: RunDirectory) -> RunDirectory:
    run.write_cases(CASES)
    (run.figures / "cases.png").write_bytes(b"a picture")
    run.finish(SUMMARY)
    return run


def reseal(run: RunDirectory, **changes: Any) -> RunDirectory:
    """Seal a finished run again, for a test that needs other files or another time."""
    mark = json.loads((run.path / "done").read_text())
    made = seal.seal(run.path, run.id, changes.get("time", mark["time"]))
    (run.path / "done").write_text(json.dumps(made))
    return run


def as_version_1(run: RunDirectory) -> RunDirectory:
    """Turn a finished run into one as version 1 of run directories was written."""
    facts, mark = run.read_environment(), json.loads((run.path / "done").read_text())
    facts.pop("schema")
    (run.path / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    old = {"id": run.id, "time": mark["time"], "summary": digest_of(run.path / "summary.json")}
    (run.path / "done").write_text(json.dumps(old, indent=2) + "\n")
    return run


def client_of(root: Path) -> Any:
    return mlflow_client(tracking_uri(root))


def mirrored(root: Path) -> list[Any]:
    """Return all runs in the store, without deleted ones."""
    client = client_of(root)
    ids = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(ids)


def counts(root: Path, warn: Callable[[str], None] | None = None) -> tuple[int, int, int, int]:
    mirror = MLflowMirror(root) if warn is None else MLflowMirror(root, warn)
    found = mirror.sync()
    return found.uploaded, found.present, found.unfinished, found.missed


def two_runs(
    root: Path, complete: Callable[[RunDirectory], RunDirectory] = complete
) -> list[tuple[str, RunDirectory]]:
    return [
        ("plain", complete(started(root, "one"))),
        (
            "other (ours)",
            complete(started(root, "two", replace(CONFIG, seed=8, direction="ct-mr"))),
        ),
    ]
