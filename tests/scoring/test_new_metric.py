"""A new metric takes one entry in `METRICS`: surface Dice at 2 mm, from masks to the page."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from glua_bench.console import Progress
from glua_bench.records import mlflow_mirror
from glua_bench.records.mlflow_mirror import MLflowMirror, tracking_uri
from glua_bench.reports import comparison, report, report_tables, sweep_report
from glua_bench.reports.results import from_rows, from_runs
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest
from glua_bench.scoring.metrics import METRICS, MISSING, MaskPair, Metric, case_metrics
from glua_bench.task import Structure

ROOT = Path(__file__).resolve().parents[2]
TASK = "phantom mr-ct"


def surface_dice(masks: MaskPair) -> float:
    """Compute the fraction of both surfaces within 2 mm of the other."""
    return float((masks.distances <= 2).mean())


NSD = Metric("nsd", "NSD 2 mm", "%", "higher", 0.0, surface_dice)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, NSD.name, NSD)


def request(data_root: Path, runs_root: Path, seed: int) -> RunRequest:
    """Return a request for a small run."""
    small = ("segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=7")
    return RunRequest(
        "source_only",
        "phantom",
        direction="mr-ct",
        steps=2,
        seed=seed,
        assignments=[*small, "batch_size=2", "candidates=1"],
        data_root=data_root,
        runs_root=runs_root,
        device="cpu",
        mlflow=False,
    )


@pytest.mark.usefixtures("registered")
def test_the_value_is_that_by_hand() -> None:
    """All voxels of a row are surface: 4 of 4 and 6 of 7 are within 2 mm."""
    prediction, reference = np.zeros((1, 1, 9), np.uint8), np.zeros((1, 1, 9), np.uint8)
    prediction[..., :4] = reference[..., :7] = 1
    structure = Structure("A", "A", (1,), "#000000")
    (row,) = case_metrics(prediction, reference, [structure], (1.0, 1.0, 1.0))
    assert row["nsd"] == pytest.approx(10 / 11)
    (row,) = case_metrics(prediction, 0 * reference, [structure], (1.0, 1.0, 1.0))
    assert row["nsd"] == 0 and row["false_alarm"]


@pytest.mark.slow
def test_a_new_metric_is_wherever_a_metric_is(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears in table, LaTeX, page and MLflow; older runs have a dash."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, quiet = tmp_path / "runs", Progress(enabled=False)
    older = plan(request(phantom_root, root, seed=0))
    execute(older, quiet)
    monkeypatch.setitem(METRICS, NSD.name, NSD)
    assert execute(older, quiet).table["nsd"].isna().all()
    newer = plan(replace(older.request, seed=1))
    own = execute(newer, quiet).table.query("structure == 'mean' and selector == 'last'")["nsd"]
    (expected,) = own
    assert 0 <= expected <= 1

    lines = comparison.table(comparison.collect([("new", TASK, newer.directory)]))
    assert lines.loc[(TASK, "new"), "NSD 2 mm"] == pytest.approx(expected)
    text = comparison.as_text(lines)
    assert "NSD 2 mm" in text and f"{expected:.3f}" in text
    assert comparison.as_metrics(lines)["mr-ct/nsd/new"] == pytest.approx(expected)

    files = report.write(
        from_runs(root, {"seed": ["1"]}), tmp_path / "new", report.Options(pictures=False)
    )
    shown = f"{100 * expected:.1f}"
    page = files[0].read_text(encoding="utf-8")
    assert "NSD 2 mm (%)" in page and shown in page
    latex = (tmp_path / "new" / "tables" / "main_phantom_mr-ct.tex").read_text(encoding="utf-8")
    assert r"NSD 2 mm (\%)" in latex and shown in latex

    assert MLflowMirror(root).mirror(newer.directory)
    client = mlflow_mirror.mlflow_client(tracking_uri(root))
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (copy,) = client.search_runs(ids, "tags.`glua_bench.seed` = '1'")
    assert copy.data.metrics["nsd"] == pytest.approx(expected)

    # Means over both runs have what both runs have.
    both = report_tables.main(from_runs(root), TASK)
    found = {(column.group, column.title): column.text(0) for column in both.columns}
    assert found["NSD 2 mm (%)", "mean"] == MISSING != found["HD95 (mm)", "mean"]
    assert NSD.label not in comparison.as_text(comparison.table(from_runs(root).rows))
    each = [("old", TASK, older.directory), ("new", TASK, newer.directory)]
    text = comparison.as_text(comparison.table(comparison.collect(each)))
    dashes = {line.split()[0]: MISSING in line for line in text.splitlines() if line.split()}
    assert (dashes["old"], dashes["new"]) == (True, False), text


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("results/*.parquet")))
def test_rows_that_are_older_than_a_metric_are_tabled(file: str, tmp_path: Path) -> None:
    results = from_rows(ROOT / "results" / file)
    table = report_tables.main(results, results.tasks[0])
    (column,) = (column for column in table.columns if column.group == NSD.heading)
    assert {column.text(row) for row in range(len(table.rows))} == {MISSING}


@pytest.mark.usefixtures("registered")
def test_rows_without_further_metrics_are_read(tmp_path: Path) -> None:
    rows = pd.read_parquet(ROOT / "results" / "phantom_ladder.parquet")
    rows.drop(columns=["assd", "hd95"]).to_parquet(tmp_path / "rows.parquet")
    results = from_rows(tmp_path / "rows.parquet")
    table = report_tables.main(results, results.tasks[0])
    dashed = {c.group for c in table.columns if c.group and c.text(0) == MISSING}
    assert dashed == {"ASSD (mm)", "HD95 (mm)", NSD.heading}


@pytest.mark.usefixtures("registered")
def test_a_sweep_lists_it_for_every_run(made_sweep, tmp_path: Path) -> None:
    sweep = made_sweep({"ratio": [0.1, 0.2]}, [0.5, 0.6])
    written = sweep_report.write(replace(sweep, runs=sweep.runs.assign(nsd=0.123)), tmp_path)
    assert "test NSD 2 mm (%)" in written[0].read_text(encoding="utf-8")


def test_no_other_file_spells_a_metric_or_the_upper_bound() -> None:
    """No other file contains a metric's name, label or heading, except published results."""
    spelled = {"supervised": "config.py"}
    for metric in METRICS.values():
        spelled |= dict.fromkeys([metric.name, metric.label, metric.heading], "metrics.py")
    for folder in ("glua_bench", "reports", "sweeps"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and node.value in spelled:
                    home = {spelled[node.value], "published.py"}
                    assert path.name in home, f"{path.name}:{node.lineno} spells {node.value!r}"
