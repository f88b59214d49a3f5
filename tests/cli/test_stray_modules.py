"""Modules that lie in the current directory are imported by no process of glua-bench."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from small_commands import SMALL
from small_runs import DISCS

import glua_bench
from glua_bench.console import own_command
from glua_bench.sweeps import slurm

NAMES = (
    "cloudpickle", "collections", "glua_bench", "json", "lightning_fabric", "matplotlib", "mlflow",
    "multiprocessing", "numpy", "optuna", "pandas", "pickle", "random", "re", "rich", "runpy",
    "scipy", "sitecustomize", "socket", "sqlalchemy", "struct", "submitit", "tempfile", "torch",
    "typer", "typing", "usercustomize", "yaml",
)  # fmt: skip
HOSTILE = """\
import os
with open({marker!r}, "a") as file:
    file.write(__name__ + "\\n")
raise SystemExit(7)
"""
SCRIPT = [str(Path(sysconfig.get_path("scripts")) / "glua-bench")]
PLUGINS = [f"--plugin={file}" for file in DISCS]
Attack = Callable[..., subprocess.CompletedProcess[str]]
safe = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")


@pytest.fixture
def attack(tmp_path: Path) -> Attack:
    """Run a command in a directory of hostile modules, none of which may be imported."""
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(HOSTILE.format(marker=str(marker)))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    environment["GLUA_BENCH_CACHE"] = str(tmp_path / "cache")

    def run(command: Sequence[str], *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command, *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert not marker.exists(), marker.read_text()
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.mark.fault("stray code", "hostile modules beside a comparison of two jobs and its plugins")
@safe
def test_a_comparison_imports_no_stray_module(attack: Attack) -> None:
    done = attack(
        SCRIPT,
        *("compare", "--methods=source_only", "--dataset=discs", "--jobs=2"),
        *(*PLUGINS, *SMALL, "--data-root=discs", "--no-mlflow", "--seeds=1", "--set=candidates=2"),
    )
    assert "2 of 2" in done.stdout


SESSION = """\
import sys
from pathlib import Path

import glua_bench
from glua_bench.runs.sealed import process

process._FORKS = process._FORKS and {forks}
settings = {{"segmenter.width": 4, "segmenter.depth": 3, "grid.size": 32, "grid.spacing": 7}}
done = glua_bench.run(
    "random_gamma", "discs", preset="quick", steps=2, data_root="discs", device="cpu",
    settings=settings, plugins={plugins}, mlflow=False, quiet=True,
)
print("scored", len(done.cases), process._server is not None)
"""


@pytest.mark.fault("stray code", "hostile modules beside a Python program that trains")
@pytest.mark.parametrize("forks", [True, False])
def test_a_training_started_from_python_imports_no_stray_module(
    forks: bool, attack: Attack, tmp_path: Path
) -> None:
    """The process that trains is forked from a server, or started anew; both by a file's path."""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "session.py"  # whose folder Python searches first
    script.write_text(SESSION.format(forks=forks, plugins=[str(file) for file in DISCS]))
    said = attack([sys.executable, str(script)]).stdout.split()
    assert said[0] == "scored" and int(said[1]) > 0
    assert said[2] == str(forks and sys.platform == "linux")


@pytest.mark.fault("stray code", "hostile modules beside a worker of a sweep")
def test_a_worker_imports_no_stray_module(attack: Attack) -> None:
    said = attack(own_command("worker", "--study=none", "--runs=runs"), code=2)
    assert "There is no sweep 'none'" in said.stderr


@pytest.mark.fault("stray code", "hostile modules beside `python -m glua_bench doctor`")
def test_a_module_started_by_the_user_imports_no_stray_module(
    attack: Attack, tmp_path: Path
) -> None:
    # Python imports these before any code of the module.
    for name in ("runpy", "typing", "re", "collections", "glua_bench"):
        (tmp_path / "hostile" / f"{name}.py").unlink()
    assert "glua-bench" in attack([sys.executable, "-m", "glua_bench", "doctor"]).stdout


@pytest.mark.fault("stray code", "hostile modules beside a job of SLURM")
@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_job_imports_no_stray_module(
    version: tuple[int, int], attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    if version > sys.version_info:
        pytest.skip("this Python has no -P")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", version)
        python = shlex.split(slurm._python())
    # What submitit appends.
    assert "usage" in attack(python, "-u", "-m", "submitit.core._submit", "--help").stdout


def test_no_child_process_is_started_as_a_module() -> None:
    """`python -m` and `python -c` look for modules in the current directory first."""
    root = Path(glua_bench.__file__).parent
    places = [root, *(root.parent / name for name in ("methods", "datasets", "sweeps", "reports"))]
    found = [
        f"{file.name}: {match}"
        for place in places
        for file in sorted(place.rglob("*.py"))
        for match in re.findall(r"sys\.executable, .*", file.read_text(encoding="utf-8"))
    ]
    # Files started by their path, as the tests above do; the estimate removes the directory first.
    known = ("console.py", "estimate.py", "process.py: sys.executable, child.__file__, ")
    assert [line for line in found if not line.startswith(known)] == []
