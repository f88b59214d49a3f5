"""Commands work without the parts of Python that only Unix has.

The tests run on Linux. They show that nothing imports or uses these parts unconditionally, not that
another system works (docs/platforms.md).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

UNIX_ONLY = """
import os, signal, sys
for name in ("fcntl", "resource", "grp", "termios"):
    sys.modules[name] = None  # an import of it fails
for module, names in {
    signal: ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM"),
    os: ("sched_getaffinity", "sched_setaffinity", "killpg", "setsid", "getpgid"),
}.items():
    for name in names:
        delattr(module, name)
"""
MAIN = """
import sys
sys.argv = ["glua-bench", *sys.argv[1:]]
from glua_bench.cli import main
main()
"""

Without = Callable[..., str]


@pytest.fixture
def without(tmp_path: Path) -> Without:
    """Run a command, and its processes, without what only Unix has; return what it prints."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(UNIX_ONLY)

    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MAIN, *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(site)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_commands_start_without_what_only_unix_has(without: Without) -> None:
    assert "compare" in without("--help")
    assert "source_only" in without("list", "methods")


@pytest.mark.slow
def test_a_run_and_a_comparison_work_without_what_only_unix_has(
    without: Without, phantom_root: Path, tmp_path: Path
) -> None:
    """The peak memory is unknown then, which is a dash in tables."""
    small = ["--dataset=phantom", "--data-root", phantom_root, "--steps=2", "--device=cpu"]
    small += ["--set=grid.size=32", "--set=grid.spacing=7", "--set=segmenter.width=4"]
    without("run", "--method=source_only", *small, "--no-mlflow")
    (summary,) = tmp_path.glob("runs/phantom/source_only/*/summary.json")
    assert math.isnan(json.loads(summary.read_text(encoding="utf-8"))["peak_memory_mib"])
    single = ["--methods=source_only", "--seeds=1", "--no-bounds"]
    shown = without("compare", *single, *small, "--no-mlflow", "--out=table")
    assert "1 done before" in shown
    table = (tmp_path / "table" / "table.csv").read_text(encoding="utf-8")
    assert "nan" not in table.lower() and "source_only" in table
    # The lock files of the fallback are removed when they are released.
    assert not [path for path in tmp_path.rglob("*.lock") if path.stat().st_size]
