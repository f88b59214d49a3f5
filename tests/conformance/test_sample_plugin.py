"""A plugin package from outside: built as a wheel, installed, listed, run and checked."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pandas as pd
import pytest

from glua_bench.registry import Registry

SAMPLE = Path(__file__).resolve().parents[1] / "support" / "sample_plugin"


def call(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )


def done(command: list[str | Path], folder: Path) -> str:
    result = call(command, folder)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with this one's packages and the sample's wheel."""
    folder = tmp_path_factory.mktemp("outside")
    # setuptools writes beside the sources, so they are built in a copy.
    shutil.copytree(SAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist"]
    done([*pip, *build, folder / "source"], folder)
    (wheel,) = (folder / "dist").iterdir()
    done([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
    own = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    libraries = Path(sysconfig.get_path("purelib", "venv", paths))
    # As a site directory, so that an editable installation of glua-bench is found as well.
    parents = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
    lines = [f"import site; site.addsitedir({parent!r})" for parent in parents]
    (libraries / "parents.pth").write_text("\n".join(lines) + "\n")
    done([*pip, "--python", own, "install", "--no-deps", "--no-index", wheel], folder)
    return own


def test_it_is_listed_and_its_broken_part_harms_nothing(python: Path, tmp_path: Path) -> None:
    listed = done([python, "-m", "glua_bench", "list"], tmp_path)
    for line in (
        "random_gamma  Train on source images whose intensities are raised to a random power.",
        "discs         Bright and dark discs on gray, four volumes of each.",
        "first         The first checkpoint that is offered.",
        "glua          Global-local union alignment",
        "BROKEN (glua-bench-sample): ModuleNotFoundError",
        "1 plugin(s) cannot be used",
    ):
        assert line in listed, listed


def test_it_runs(python: Path, tmp_path: Path) -> None:
    run: list[str | Path] = [python, "-m", "glua_bench", "run", "--method", "random_gamma"]
    run += ["--dataset", "discs", "--data-root", tmp_path / "discs", "--preset", "quick"]
    run += ["--steps", "3", "--device", "cpu", "--no-mlflow", "--set", "method.strength=0.5"]
    assert "Finished" in done(run, tmp_path)
    assert "already done" in done(run, tmp_path)
    (cases,) = (tmp_path / "runs" / "discs" / "random_gamma").glob("*/cases.parquet")
    rows = pd.read_parquet(cases)
    assert set(rows["structure"]) == {"DISC"} and rows["dice"].between(0, 1).all()

    refused = call([*run, "--method", "broken"], tmp_path)
    assert refused.returncode == 2
    assert "'broken' from glua-bench-sample cannot be imported" in refused.stderr


def test_it_conforms(python: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from glua_bench import conformance\n"
        "found = conformance.run_checks('random_gamma')\n"
        "found += conformance.run_dataset_checks('discs', data_root=Path('discs'))\n"
        "print(len(found), [r for r in found if not r.passed])\n"
    )
    from glua_bench.conformance import DATASET_CHECKS, METHOD_CHECKS

    printed = done([python, "-c", script], tmp_path)
    assert printed.strip() == f"{len(METHOD_CHECKS) + len(DATASET_CHECKS)} []"


def test_the_tests_own_environment_is_left_alone(python: Path) -> None:
    assert "random_gamma" not in {entry.name for entry in Registry("method").entries()}
