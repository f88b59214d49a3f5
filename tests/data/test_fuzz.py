"""benchmarks/fuzz_files.py: a part of the mutated files, and that it would see a defect."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from glua_bench.data.cache import SliceCache
from glua_bench.task import Grid

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_files.py"
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_files", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_files"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.fault("hostile files", "mutated volumes of every format")
@linux
def test_mutated_files_end_in_a_sentence_or_are_sound(fuzz: ModuleType) -> None:
    """Every mutation and every format, each refused, warned about or accepted, without a defect."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--files=170", "--seed=5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line[34:40].strip().isdigit()]
    names = {line[:34].strip() for line in table}
    assert names == {*fuzz.FILES, *fuzz.HEADERS, "all"}
    total = table[-1][34:].split()
    assert total[0] == "170" and int(total[1]) > 80 and int(total[3]) > 20


@linux
def test_a_defect_is_seen(tmp_path: Path) -> None:
    """Code that raises, prints, hangs or dies is told, and the command fails."""
    for number, line in enumerate(
        (
            "raise KeyError('x')",
            "print('x', file=sys.stderr)",
            "time.sleep(3)",
            "os._exit(3)",
        )
    ):
        script = tmp_path / f"broken{number}.py"
        # Children run the same file, so that the broken function is in theirs, too.
        planted = (
            "    signal.signal(signal.SIGALRM, hang)\n"
            "    import glua_bench.inspection.measurements as facts\n"
            "    kept = facts._bounds\n"
            "    def broken(stored):\n"
            f"        {line}\n"
            "        return kept(stored)\n"
            "    facts._bounds = broken\n"
        )
        text = PROGRAM.read_text().replace("SECONDS = 10", "SECONDS = 1")
        assert planted.splitlines()[0] in text
        script.write_text(text.replace(planted.splitlines()[0] + "\n", planted))
        done = subprocess.run(
            [sys.executable, str(script), "--files=1", "--kind=twice"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "DEFECT" in done.stdout, (line, done)


def test_entries_of_the_cache_are_looked_at(fuzz: ModuleType, tmp_path: Path) -> None:
    cache, grid = SliceCache(tmp_path), Grid(8, 1.0)

    def found() -> list[str]:
        return list(fuzz._of_cache(cache, None, None, grid))

    def entry(name: str, voxels: np.ndarray) -> Path:
        path = tmp_path / "images" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, voxels)
        return path

    assert found() == []
    entry("a", np.zeros((3, 8, 8), np.float16))
    assert found() == []
    for voxels in (np.full((3, 8, 8), np.nan), np.full((3, 8, 8), 1.5), np.zeros((3, 9, 8))):
        broken = entry("b", voxels.astype(np.float16))
        assert len(found()) == 1
        broken.unlink()
    (tmp_path / "images" / ".writing-x.npy").touch()
    assert "unfinished" in found()[0]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("/data/image.nii is damaged: fetch it again.", True),
        ("/data/image.nii is damaged. Fetch it again.", False),
        ("/data/image.nii is damaged", False),
        ("Something is damaged.", False),
        ("/data/image.nii\nis damaged.", False),
        ("/data/image.nii is " + "very " * 100 + "damaged.", False),
    ],
)
def test_sentences_are_looked_at(fuzz: ModuleType, text: str, good: bool) -> None:
    assert fuzz._good(text, Path("/data")) is good
