"""What a user sees when the cache or a model is damaged, or belongs to somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from faults import damaged
from small_commands import SMALL, Call, refused

RUN = ["run", "--dataset=phantom", *SMALL, "--no-mlflow"]


def scores(root: str) -> pd.DataFrame:
    (file,) = Path(root).glob("phantom/*/*/cases.parquet")
    return pd.read_parquet(file)


@pytest.mark.slow
@pytest.mark.fault("silent damage", "slices and a stage between two runs, a model before predict")
def test_damage_is_told_and_changes_no_result(
    call: Call, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    where = [f"--data-root={phantom_root}", "--method=global_only"]
    code, _, err = call(*RUN, *where, "--runs=first")
    assert code == 0 and "warning: " not in err, err
    (stage,) = (tmp_path / "cache" / "stages").glob("*.pt")
    entries = sorted((tmp_path / "cache" / "slices").rglob("*.npy"))
    for seed, file in enumerate([stage, *entries]):
        file.write_bytes(damaged(file.read_bytes(), seed))
    code, _, err = call(*RUN, *where, "--runs=second")
    assert code == 0, err
    told = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1 + len(entries)
    for file in (stage, *entries):
        assert sum(f"{file} is damaged (" in line for line in told) == 1, told
    pd.testing.assert_frame_equal(scores("second"), scores("first"))
    (run,) = Path("second").glob("phantom/*/*/done")
    code, _, err = call("export", f"--run={run.parent}", "--out=model")
    assert code == 0, err
    weights = Path("model", "model.safetensors")
    weights.write_bytes(damaged(weights.read_bytes(), 7))
    image = next(phantom_root.glob("ct_train/*_image.nii.gz"))
    result = call("predict", "--model=model", image, "--out=labels")
    refused(result, "model/model.safetensors is damaged", "export the model again")
    assert not Path("labels").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/sys is a directory of Linux")
@pytest.mark.fault("two users", "a run where the cache cannot be written, also by root")
def test_a_run_keeps_its_slices_where_the_cache_is_read_only(
    phantom_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ,
        "GLUA_BENCH_CACHE": "/sys/glua-bench",
        "TMPDIR": str(tmp_path / "tmp"),
    }
    command = [*RUN, f"--data-root={phantom_root}", "--method=global_only", "--runs=runs"]
    done = subprocess.run(
        [sys.executable, "-c", "from glua_bench.cli import main; main()", *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(told) == 2 and all("GLUA_BENCH_CACHE" in line for line in told), told
    assert "keeps its slices in" in told[0] and "is trained for this run alone" in told[1]
    assert list((tmp_path / "runs").glob("phantom/*/*/done"))
    assert list((tmp_path / "tmp").iterdir()) == []
