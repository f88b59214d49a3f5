"""Fixtures of the tests of reports: short runs, and the texts of a figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glua_bench.records.run_directory import RunDirectory

SMALL = ("segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=7", "batch_size=2")


@pytest.fixture(scope="session")
def quick_run(phantom_root: Path) -> Callable[..., RunDirectory]:
    """Train a method on the phantom for two steps: method, root, `--set` texts, options."""
    from glua_bench.console import Progress
    from glua_bench.runs.execution import execute
    from glua_bench.runs.plan import plan
    from glua_bench.runs.request import RunRequest

    def run(method: str, root: Path, *sets: str, draw: Any = None) -> RunDirectory:
        request = RunRequest(
            method,
            "phantom",
            preset="quick",
            steps=2,
            assignments=[*SMALL, *sets],
            data_root=phantom_root,
            runs_root=root,
            device="cpu",
            mlflow=False,
        )
        planned = plan(request)
        execute(planned, Progress(enabled=False), *([draw] if draw else []))
        return planned.directory

    return run


@pytest.fixture(scope="session")
def texts() -> Callable[[Any], set[str]]:
    """Return all texts of a figure."""

    def find(figure: Any) -> set[str]:
        figure.canvas.draw()
        return {t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))}

    return find


@pytest.fixture(scope="module")
def cells(browser: Any) -> Callable[[str, int], list[str]]:
    """Return the visible cells of a column: table, column."""
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
        ".filter(r => !r.hidden).map(r => r.cells[arguments[1]].textContent)"
    )
    return lambda table, column: browser.driver.execute_script(script, f"#table-{table}", column)


@pytest.fixture(scope="session")
def assert_clean() -> Callable[[Any], None]:
    """Assert that a page has no errors, no requests, and does not scroll sideways."""

    def check(browser: Any) -> None:
        root = "document.documentElement"
        width = browser.driver.execute_script(f"return [{root}.scrollWidth, {root}.clientWidth]")
        assert browser.errors() == [] and browser.requests() == []
        assert width[0] <= width[1], "the page itself must not scroll sideways"

    return check
