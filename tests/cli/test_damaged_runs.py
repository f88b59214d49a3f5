"""A damaged run by a user's commands: named, in no table, and mended."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sample_runs import as_version_1, reseal
from small_commands import SMALL, Call, refused

from glua_bench.records.run_directory import list_runs


@pytest.mark.slow
@pytest.mark.fault("sealed results", "read, export and repeat a run with an edited prediction")
def test_a_damaged_run_is_refused_by_every_command_and_mended_by_its_own(
    call: Call, phantom_root: Path
) -> None:
    words = ["run", "--method=source_only", "--dataset=phantom", *SMALL, "--no-mlflow"]
    words += ["--data-root", str(phantom_root)]
    assert call(*words)[0] == 0
    (run,) = list_runs(Path("runs"))
    scores = run.read_cases()
    (prediction,) = run.predictions.iterdir()
    whole = prediction.read_bytes()
    prediction.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = [str(run.path), f"predictions/{prediction.name} was changed", "--retry-failed"]

    image = next(phantom_root.glob("ct_train/*_image.nii.gz"))
    refused(call("predict", image, "--run", run.id), *said)
    refused(call("export", "--run", run.id, "--out", "model"), *said)
    words_of_export = ["data", "export", "phantom", "--to=nnunet", "--data-root", phantom_root]
    refused(call(*words_of_export, "--run", run.id), *said)
    refused(call("score", run.predictions, phantom_root / "ct_train"), *said)
    code, out, err = call("report", "--no-pictures")
    assert code == 2 and "source_only" not in out and all(word in err for word in said)
    code, out, err = call(*words, "--dry-run")
    assert code == 0 and "Would write" in out and said[1] in err
    code, out, _ = call("doctor")
    assert "1 DAMAGED" in out and said[1] in out

    code, out, err = call(*words)
    assert code == 0 and "already done" not in out
    assert f"{run.path} was damaged ({said[1]}): its files were moved to runs/damaged/" in err
    assert run.done and run.read_cases().equals(scores) and prediction.read_bytes() == whole
    moved = Path("runs/damaged/phantom/source_only", run.id)
    assert (moved / "predictions" / prediction.name).is_file() and len(list_runs(Path("runs"))) == 1
    assert "already done" in call(*words)[1]

    # The weights are compared when they are loaded.
    (weights,) = run.checkpoints.glob("candidate_*")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    refused(call("predict", image, "--run", run.id), f"checkpoints/{weights.name} was changed")


@pytest.mark.fault("sealed results", "report damaged runs, runs of older and of newer versions")
def test_a_report_leaves_out_what_is_damaged_and_says_so(call: Call, made_runs) -> None:
    made_runs.comparison(seeds=1)
    whole, edited = made_runs.add("fda", 0.9, 0), made_runs.add("fda", 0.9, 1)
    as_version_1(whole)
    (edited.path / "summary.json").write_text("{}")
    newer = made_runs.add("advent", 0.9, 0)
    facts = {**newer.read_environment(), "schema": 99}
    (newer.path / "environment.json").write_text(json.dumps(facts))
    reseal(newer)
    code, _, err = call("report", "--no-pictures", "--out=page")
    assert code == 0
    page = re.sub(r"<[^>]+>", "", Path("page/report.html").read_text())
    for text in (
        f"{edited.path.relative_to(Path.cwd())} is damaged (summary.json was truncated)",
        f"{newer.path.relative_to(Path.cwd())} was written by a newer version",
        "NOT SEALED: 1 run of an earlier version",
    ):
        assert text in err and text in page
    assert f"{whole.id}fda" in page and f"{edited.id}fda" not in page
