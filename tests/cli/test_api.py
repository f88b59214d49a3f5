"""api.py: `import glua_bench`."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import glua_bench
from glua_bench.cli.api import ComparisonResult, RunResult
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.errors import ConfigError, DataError, PluginError, UserError
from glua_bench.reports import results
from glua_bench.task import Structure

SETTINGS = {
    "segmenter.width": 4,
    "segmenter.depth": 3,
    "grid.size": 32,
    "grid.spacing": 7,
    "batch_size": 2,
}
OPTIONS: dict[str, Any] = {"preset": "quick", "steps": 2, "device": "cpu", "mlflow": False}
Place = dict[str, Any]


@pytest.fixture(scope="module")
def place(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return the arguments of all calls."""
    runs = tmp_path_factory.mktemp("api") / "runs"
    return {"settings": SETTINGS, "data_root": phantom_root, "runs": runs, **OPTIONS}


@pytest.fixture(scope="module")
def ran(place: Place) -> RunResult:
    """Train a small run, quietly."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        result = glua_bench.run("source_only", "phantom", "mr-ct", quiet=True, **place)
    assert shown.getvalue() == "" and not result.already_done and result.seconds > 0
    return result


def test_the_import_is_light_and_offers_what_it_names(tmp_path: Path) -> None:
    code = (
        "import sys, glua_bench\n"
        "heavy = {'torch', 'pandas', 'typer', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(glua_bench.__all__) <= set(dir(glua_bench))\n"
        "from glua_bench import *\n"
        "assert all(callable(f) for f in (run, compare, load_results, predict, score))\n"
        "assert not hasattr(glua_bench, 'nothing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_run_has_scores_cases_and_configuration(ran: RunResult) -> None:
    assert (ran.path / "done").is_file() and ran.path.name == ran.id
    assert list(ran.scores.index) == ["MYO", "LAC", "LVC", "AA", "mean"]
    assert {"dice", "assd", "hd95"} <= set(ran.scores.columns)
    last = ran.cases[ran.cases["selector"] == "last"]
    own = last[last["structure"] == "MYO"]["dice"].mean()
    assert ran.scores.loc["MYO", "dice"] == pytest.approx(own)
    assert ran.config.method == "source_only" and ran.config.grid.size == 32
    shown = ran._repr_html_()
    assert "<table" in shown and "source_only on phantom mr-ct, seed 0" in shown


def test_the_same_call_returns_the_same_run_with_plain_lines(
    ran: RunResult, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    again = glua_bench.run(config=ran.path / "config.yaml", runs=place["runs"], mlflow=False,
                           data_root=place["data_root"])  # fmt: skip
    assert again.id == ran.id and again.already_done
    pd.testing.assert_frame_equal(again.scores, ran.scores)
    other = glua_bench.run("source_only", "phantom", "mr-ct", seed=1, **place)
    assert not other.already_done
    out, _ = capsys.readouterr()
    assert "segment: 2 steps" in out and "\x1b" not in out and "\r" not in out


def test_caveats_stand_with_results(
    ran: RunResult, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stamp,) = ran.stamps
    assert stamp.startswith("LABELS ")
    monkeypatch.setattr(Phantom, "caveat", lambda self, direction: f"{direction}: <shared>")
    monkeypatch.setattr(Phantom, "protocol", "is generated")
    again = glua_bench.run("source_only", "phantom", "mr-ct", quiet=True, **place)
    assert again.already_done
    assert again.stamps == ["PROTOCOL is generated.", "CAVEAT mr-ct: <shared>.", stamp]
    assert "CAVEAT mr-ct: &lt;shared&gt;." in again._repr_html_()


def test_a_thread_may_run(ran: RunResult, place: Place) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        found.append(glua_bench.run("source_only", "phantom", "mr-ct", quiet=True, **place))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].id == ran.id and signal.getsignal(signal.SIGTERM) is before


def test_mistakes_raise_the_sentence_of_the_command(
    place: Place, call: Callable[..., tuple[int, str, str]]
) -> None:
    with pytest.raises(PluginError) as error:
        glua_bench.run("glue", "phantom", **place)
    _, _, printed = call("run", "--method=glue", "--dataset=phantom")
    assert printed == f"glua-bench: error: {error.value}\n"
    for faulty, words in (
        ({"method": "glua"}, "'dataset' is missing"),
        ({"method": "glua", "dataset": "phantom", "step": 3}, "did you mean 'steps'"),
        ({"method": "glua", "dataset": "phantom", "devices": 2}, "Unknown argument 'devices'"),
        ({"method": "glua", "dataset": "phantom", "seed": -1}, "seed = -1 is out of range"),
    ):
        given = {**place, **faulty}
        with pytest.raises(ConfigError, match=words):
            glua_bench.run(**given)
    with pytest.raises(ConfigError, match="--dataset is missing"):
        glua_bench.compare("glua", **place)
    with pytest.raises(ConfigError, match="did you mean 'method.mask_ratio'"):
        glua_bench.run("glua", "phantom", settings={"mask_ratio": 0.5}, runs=place["runs"],
                       data_root=place["data_root"])  # fmt: skip


# Runs at the top level of a script without `if __name__ == "__main__"`.
SCRIPT = """
import sys
from pathlib import Path
print("began")
import glua_bench
from glua_bench.datasets.phantom.dataset import generate
ids = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
generate(Path(sys.argv[1]), seed=0, ids=ids, voxel_scale=6.0, workers=2)
result = glua_bench.compare(
    "source_only", "phantom", seeds=1, bounds=False, jobs=2, quiet=True, data_root=sys.argv[1],
    runs=sys.argv[2], settings=SETTINGS, **OPTIONS
)
print(len(result.table), result.counts["ran"])
"""


def test_a_plain_script_may_use_several_processes(tmp_path: Path) -> None:
    script = tmp_path / "my script.py"
    text = SCRIPT.replace("SETTINGS", repr(SETTINGS)).replace("OPTIONS", repr(OPTIONS))
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "coarse", tmp_path / "runs"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "began\n1 1\n" and done.stderr == "", done.stderr


def test_a_comparison_has_table_verdicts_and_rows(
    ran: RunResult, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (["source_only"], ["phantom"])
    found = glua_bench.compare(*words, seeds=3, bounds=False, **place)
    out, _ = capsys.readouterr()
    assert "done   source_only, phantom mr-ct, seed 2: Dice" in out
    assert "\x1b" not in out and "\r" not in out
    with pytest.warns(UserWarning, match="3 of the runs were finished without agreement"):
        glua_bench.compare(
            *words, seeds=3, bounds=False, quiet=True, selectors=["im", "agreement"], **place
        )
    assert capsys.readouterr().out == ""
    assert isinstance(found, ComparisonResult) and found.failed == {}
    assert found.counts["ran"] + found.counts["before"] == 3
    assert list(found.table.index) == [("phantom mr-ct", "source_only")]
    assert found.table["seeds"].tolist() == [3]
    assert found.verdicts["phantom mr-ct"].startswith("phantom mr-ct: source_only has a mean Dice")
    assert set(found.rows["seed"]) == {0, 1, 2} and ran.id in set(found.rows["run"])
    assert "gap recovered" not in found._repr_html_()
    again = glua_bench.load_results(found.members)
    assert set(again["run"]) == set(found.rows["run"])


def test_results_are_one_frame_also_of_several_protocols(made_runs: Any, tmp_path: Path) -> None:
    made_runs.add("glua", 0.7)
    made_runs.add("source_only", 0.5, seed=1)
    made_runs.add("source_only", 0.4, steps=900)
    with pytest.raises(ConfigError, match="different protocols"):
        results.from_runs(made_runs.root)
    rows = glua_bench.load_results(made_runs.root)
    assert rows["run"].nunique() == 3 and not rows.select_dtypes("category").columns.any()
    means = rows.groupby("entry")["dice"].mean()
    assert means["glua"] == pytest.approx(0.7)
    one = glua_bench.load_results(made_runs.root, {"method": ["glua"], "seed": 0})
    assert set(one["entry"]) == {"glua"}
    one.to_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(glua_bench.load_results(tmp_path / "rows.parquet"), one)
    with pytest.raises(UserError, match="has no runs"):
        glua_bench.load_results(tmp_path)


def test_new_volumes_are_segmented(
    ran: RunResult,
    place: Place,
    phantom_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = next(phantom_root.glob("**/*ct*1003*image*.nii.gz"))
    out = tmp_path / "new volumes"
    found = glua_bench.predict(image, run=ran.path, out=out, quiet=True, device="cpu")
    columns = ["file", "labels", "structure", "ml", "spacing_1", "spacing_2", "spacing_3"]
    assert list(found.columns) == [*columns, "model", "adapt", "privileged"] and len(found) == 4
    labels = nib.load(found["labels"][0])
    assert labels.shape == nib.load(image).shape and np.isfinite(found["ml"]).all()
    capsys.readouterr()
    scans = tmp_path / "scans"
    scans.mkdir()
    for file in (image, image.with_name(image.name.replace("image", "label"))):
        shutil.copy(file, scans)
    found = glua_bench.predict(scans, run=ran.path, out=tmp_path / "all", device="cpu")
    assert len(found) == 4 and "Skipped (labels by their names): " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists already"):
        glua_bench.predict([image], run=ran.id, out=out, runs=place["runs"], quiet=True)
    with pytest.raises(ConfigError, match="either --run or --model"):
        glua_bench.predict(image, out=tmp_path / "none", quiet=True)


def test_label_files_are_scored(phantom_root: Path, tmp_path: Path) -> None:
    places = tmp_path / "predictions", tmp_path / "references"
    for place in places:
        place.mkdir()
        for file in (phantom_root / "ct_train").glob("*_label.nii.gz"):
            shutil.copy(file, place)
    found = glua_bench.score(*places)
    assert len(found) and found["dice"].dropna().eq(1).all()
    structure = Structure("MYO", "myocardium", (205,), "red")
    with pytest.raises(DataError, match="add them to the structures"):
        glua_bench.score(*places, [structure])
