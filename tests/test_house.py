"""docs/house.md: which way imports run, where each file is listed, and what a change touches."""

from __future__ import annotations

import ast
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK

from glua_bench.console import Progress
from glua_bench.data import formats
from glua_bench.identity import stage_key
from glua_bench.method import Stage
from glua_bench.methods.source_only import SourceOnly
from glua_bench.reports import comparison, report_tables, tables
from glua_bench.reports.report import Options, write
from glua_bench.reports.results import from_rows
from glua_bench.runs.execution import build_run
from glua_bench.runs.plan import build_method, make_fabric, plan
from glua_bench.runs.request import RunRequest

ROOT = Path(__file__).resolve().parent.parent
HOUSE: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))
FOUND: dict[str, Path] = HOUSE["modules"](ROOT)
PAGE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
# Rooms of the harness, each of which may import those above it in the list.
ROOMS = ("", "data", "inspection", "scoring", "records", "runs", "conformance", "cli")


def room(module: str) -> str:
    """The room of a module of the harness; "" for the files that all stand on."""
    parts = module.split(".")[1:]
    return parts[0] if parts and (FOUND[f"glua_bench.{parts[0]}"].name == "__init__.py") else ""


# -- imports and sizes ----------------------------------------------------------------------------


def test_no_modules_import_each_other() -> None:
    _, circles = HOUSE["floors"](HOUSE["arrows"](FOUND))
    assert circles == []


def test_imports_between_rooms_run_one_way() -> None:
    lines = []
    for module, reached in HOUSE["arrows"](FOUND).items():
        if room(module) in ROOMS[1:]:
            above = ROOMS[ROOMS.index(room(module)) + 1 :]
            lines += [f"{module} imports {other}" for other in reached if room(other) in above]
    assert lines == []


def test_files_and_folders_stay_small() -> None:
    assert {p.name: n for p in FOUND.values() if (n := HOUSE["lines"](p)) > 700} == {}
    folders = pd.Series([path.parent for path in FOUND.values()]).value_counts()
    # The catalogue of methods grows by one page for each.
    folders = folders.drop(ROOT / "methods", errors="raise")
    assert folders.max() <= 16, folders


# -- the page -------------------------------------------------------------------------------------


def test_every_file_answers_a_question() -> None:
    """Each section of the page is about one folder and lists every file in it."""
    questions = PAGE.split("## What does a change touch?")[0]
    for section in re.split(r"^### ", questions, flags=re.MULTILINE)[1:]:
        heading = re.search(r"`([^`]*/)`", section.splitlines()[0])
        assert heading is not None, section.splitlines()[0]
        # First inside the package: `runs/` at the root holds what commands wrote.
        folder = ROOT / "glua_bench" / heading[1]
        if not folder.is_dir():
            folder = ROOT / heading[1]
        listed = set(re.findall(r"`([\w/]+\.py)`", section))
        present = {p.name for p in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
        assert present <= listed, f"{heading[1]} lacks {sorted(present - listed)}"
        assert all((folder / name).is_file() for name in listed), sorted(listed - present)
    named = set(re.findall(r"^### .*?`([^`]*)/`", PAGE, flags=re.MULTILINE))
    folders = {path.parent.relative_to(ROOT).as_posix() for path in FOUND.values()}
    assert {folder.removeprefix("glua_bench/") for folder in folders} == named


def test_pages_name_files_that_exist() -> None:
    """Paths from the root of the repository in every page but the changelog, which is history."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    path = re.compile(rf"(?<![\w./])(?:{'|'.join(HOUSE['PRODUCT'])}|tests|benchmarks)/[\w/]+\.py\b")
    named = {(page.name, name) for page in pages for name in path.findall(page.read_text("utf-8"))}
    assert len(named) > 20
    missing = [(page, name) for page, name in named if not (ROOT / name).is_file()]
    assert [(page, name) for page, name in missing if "NAME" not in name] == []


def trips() -> list[tuple[str, list[str], str]]:
    """The rows of the page's table of changes: change, files, test."""
    table = PAGE.split("## What does a change touch?")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    return [
        (change.strip(), re.findall(r"`([^`]+)`", files), re.findall(r"`([^`]+)`", test)[-1])
        for change, files, test in rows
    ]


@pytest.mark.parametrize(("change", "files", "test"), trips(), ids=lambda value: str(value)[:30])
def test_each_change_touches_the_files_that_the_page_names(
    change: str, files: list[str], test: str
) -> None:
    """The files exist, and so does the test that makes the change in no other file."""
    for name in files:
        assert "NAME" in name or (ROOT / name).is_file(), name
    place, _, function = test.partition("::")
    source = ast.parse((ROOT / place).read_text(encoding="utf-8"))
    assert function in {n.name for n in ast.walk(source) if isinstance(n, ast.FunctionDef)}, test


# -- changes, made here ---------------------------------------------------------------------------


def test_a_file_format_is_an_entry_of_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 2.0, 3.0))
    SimpleITK.WriteImage(image, str(tmp_path / "case.gipl"))
    monkeypatch.setitem(formats._ITK, ".gipl", "GiplImageIO")
    file = formats.open_volume(tmp_path / "case.gipl")
    assert file.shape == (4, 3, 2) and file.spacing == pytest.approx((1, 2, 3))
    np.testing.assert_array_equal(np.asarray(file.read()), voxels.T)


@dataclass(frozen=True)
class Halving(Stage):
    """A stage whose learning rate halves at its middle."""

    def rate(self, progress: float) -> float:
        return 1.0 if progress < 0.5 else 0.5


class Halved(SourceOnly):
    """The baseline with a stage of another type."""

    name = "halved"

    def stages(self) -> tuple[Stage, ...]:
        return (Halving("train"),)


def test_a_stage_type_is_a_class_of_its_own(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loop, identity and cache follow `Stage`; none of them knows its subclasses."""
    from glua_bench.registry import Registry

    load = Registry.load
    monkeypatch.setattr(
        Registry, "load", lambda self, name: Halved if name == "halved" else load(self, name)
    )
    small = ("segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=7")
    request = RunRequest(
        "halved",
        "phantom",
        direction="mr-ct",
        steps=4,
        assignments=[*small, "batch_size=2", "candidates=1"],
        data_root=phantom_root,
        runs_root=tmp_path / "runs",
        device="cpu",
    )
    planned = plan(request)
    rates: list[float] = []
    step = Halved.step

    def watched(self: Halved, batch: Any, context: Any) -> Any:
        rates.append(next(iter(context.optimizers.values())).param_groups[0]["lr"])
        return step(self, batch, context)

    monkeypatch.setattr(Halved, "step", watched)
    run = build_run(planned, make_fabric(request, planned.config), Progress(enabled=False))
    run.trainer.fit()
    assert rates == pytest.approx([rates[0], rates[0], rates[0] / 2, rates[0] / 2])
    method = build_method(planned.config, planned.dataset.structures, Halved)
    usual, halving = Stage("train"), Halving("train")
    assert stage_key(method, usual) != stage_key(method, halving)


def test_a_column_of_the_report_is_a_value_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`comparison.table` computes it, `report_tables.main` shows it; all formats follow."""
    compute, show = comparison.table, report_tables.main

    def with_worst(rows: pd.DataFrame, selector: str = "last") -> pd.DataFrame:
        lines = compute(rows, selector)
        chosen = rows[rows["selector"] == selector] if "selector" in rows else rows
        cases = chosen.groupby(["entry", "case"], observed=True)["dice"].mean()
        worst = cases.groupby("entry", observed=True).min()
        return lines.assign(worst=[float(worst[e]) for e in lines.index.get_level_values("entry")])

    def main(results: Any, task: str, selector: str = "last") -> tables.Table:
        found = show(results, task, selector)
        own = comparison.table(results.of(task, selector), selector).loc[task]
        entries = report_tables.ordered(own)
        column = tables.Column("worst case (%)", list(100 * own.loc[entries, "worst"]), 1)
        found.columns.append(column)
        return found

    monkeypatch.setattr(comparison, "table", with_worst)
    monkeypatch.setattr(report_tables, "main", main)
    results = from_rows(ROOT / "results" / "phantom_quick.parquet")
    write(results, tmp_path, Options(pictures=False))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "worst case (%)" in page
    (latex,) = tmp_path.rglob("main_phantom_mr-ct.tex")
    assert r"worst case (\%)" in latex.read_text(encoding="utf-8")
    (table,) = tmp_path.rglob("main_phantom_mr-ct.csv")
    assert "worst case (%)" in pd.read_csv(table).columns
