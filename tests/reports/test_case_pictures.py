"""reports/case_pictures.py, and reports of real runs: pictures, viewer, runs from the tracker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import pandas as pd
import pytest

from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.records import mlflow_mirror
from glua_bench.records.fetch import fetch_runs
from glua_bench.reports.case_pictures import compared_cases, draw, example_cases
from glua_bench.reports.report import Options, write
from glua_bench.reports.results import from_runs

TASK = "phantom mr-ct"


@pytest.fixture(scope="module")
def runs_root(quick_run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for method in ("source_only", "histogram_matching"):
        quick_run(method, root)
    return root


def test_cases_are_shown_for_every_entry(runs_root: Path, phantom_root: Path, tmp_path: Path):
    results, dataset = from_runs(runs_root), Phantom(phantom_root)
    shown = compared_cases(results, TASK, dataset)
    rows = results.of(TASK)
    mean = rows.groupby("case", observed=True)["dice"].mean().sort_values(ascending=False)
    assert shown[0].id == mean.index[0] and shown[0].note == "best"
    assert shown[-1].id == mean.index[-1] and len(shown) == min(3, len(mean))
    for case in shown:
        assert set(case.predictions) == {"source_only", "histogram_matching"}
        for entry, prediction in case.predictions.items():
            assert prediction.shape == case.image.shape == case.reference.shape
            own = rows[(rows["entry"] == entry) & (rows["case"] == case.id)]
            assert case.dice[entry] == pytest.approx(own["dice"].mean())
        assert case.reference.max() == 4 and case.image.min() >= -1 and case.image.max() <= 1
        assert case.spacing == pytest.approx((4.0, 7.0, 7.0))
    paths = draw(tmp_path / "cases.png", shown, ["source_only", "histogram_matching"], dataset)
    picture = matplotlib.image.imread(paths[0])
    assert picture[..., :3].std() > 0.05 and picture.shape[0] > picture.shape[1]
    assert paths[1].read_text().startswith("<?xml")


def test_best_median_and_worst_are_those_of_all_entries() -> None:
    cases = ["a", "b", "c", "d", "e"]
    dice = pd.DataFrame(
        [[0.1, 0.2, 0.9, 0.4, 0.5], [0.3, 0.2, 0.9, 0.4, 0.0], [0.9, 0.0, 0.0, 0.0, 0.0]],
        index=["source_only", "mine", "supervised"],
        columns=cases,
    )
    # Means without the upper bound: c 0.9, d 0.4, e 0.25, a 0.2, b 0.2.
    assert example_cases(dice) == {"c": "best", "e": "median", "b": "worst"}
    assert example_cases(dice[["a", "c"]]) == {"c": "best", "a": "worst"}
    assert example_cases(dice[["a"]]) == {"a": "best"}
    # A case with undefined Dice is never shown.
    healthy = dice.assign(h=float("nan"))
    assert example_cases(healthy) == example_cases(dice)


def test_a_run_without_predictions_has_no_row(runs_root: Path, phantom_root: Path):
    results, dataset = from_runs(runs_root), Phantom(phantom_root)
    gone = results.rows.loc[results.rows["entry"] == "histogram_matching", "run"].iloc[0]
    results.directories = {run: d for run, d in results.directories.items() if run != gone}
    shown = compared_cases(results, TASK, dataset)
    assert all(set(case.predictions) == {"source_only"} for case in shown)
    results.directories = {}
    assert compared_cases(results, TASK, dataset) == []


def test_the_tracker_s_copies_give_the_same_report(
    runs_root: Path, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    counts = mlflow_mirror.MLflowMirror(runs_root).sync()
    assert counts.uploaded == 2 and counts.missed == 0
    fetch_runs(mlflow_mirror.tracking_uri(runs_root), tmp_path / "copies")
    options = Options(data_root=phantom_root)
    written = {}
    for name, root in (("runs", runs_root), ("copies", tmp_path / "copies")):
        files = write(from_runs(root), tmp_path / name / "report", options)
        folder = tmp_path / name / "report"
        written[name] = {str(f.relative_to(folder)): f.read_bytes() for f in files}
    assert written["runs"].keys() == written["copies"].keys()
    assert any("side_by_side" in name for name in written["runs"])
    different = [n for n, content in written["runs"].items() if written["copies"][n] != content]
    assert different == []


@pytest.mark.slow
def test_a_reader_sees_volumes(
    browser, niivue: str, runs_root: Path, phantom_root: Path, tmp_path: Path
) -> None:
    options = Options(data_root=phantom_root, viewer=True)
    page, *_ = write(from_runs(runs_root), tmp_path / "report", options)
    browser.open(page)
    driver = browser.driver
    assert driver.execute_script("return document.querySelectorAll('.picture img').length") == 1
    driver.execute_script("document.getElementById('viewer-start').click()")
    browser.wait("document.documentElement.dataset.viewer", "drawn", 120)
    case = driver.find_element("id", "viewer-case").text
    assert "phantom mr-ct: ct_" in case and "best" in case
    assert browser.errors() == [] and browser.requests() == []


def test_slices_that_a_dataset_keeps_have_their_own_distance(
    quick_run: Callable[..., Any], phantom_root: Path, tmp_path: Path
) -> None:
    quick_run("source_only", tmp_path, "grid.slice_spacing=null")
    dataset = Phantom(phantom_root)
    case = dataset.split("ct", "test")[0]
    (shown,) = compared_cases(from_runs(tmp_path), TASK, dataset)
    header = nib.load(case.image).header.get_zooms()  # coronal slices: along the second axis
    assert shown.spacing == pytest.approx((header[1], 7.0, 7.0)) and header[1] != 7.0
