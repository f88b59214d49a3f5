"""What every command offers: -h, --json, --quiet and completion of names."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer.main
from small_commands import SMALL, Call

from glua_bench.cli.main import app
from glua_bench.cli.options import to_json
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.runs.timing import estimate
from glua_bench.sweeps import command as sweeping

OPTIONS = [*SMALL, "--no-mlflow"]


def commands() -> dict[str, Any]:
    """Return the visible commands and groups by their words."""
    found: dict[str, Any] = {}

    def visit(words: str, command: Any) -> None:
        found[words] = command
        for name, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                visit(f"{words} {name}".strip(), inner)

    visit("", typer.main.get_command(app))
    return found


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_has_help_json_and_quiet(call: Call, words: str) -> None:
    code, out, _ = call(*words.split(), "-h")
    assert code == 0 and "Usage" in out and "-h, --help" in out
    if words not in ("", "data"):
        assert "--json" in out and "-q, --quiet" in out


@pytest.mark.parametrize("words", list(commands()))
def test_every_option_has_its_help(words: str) -> None:
    # Python 3.10's `get_type_hints` wraps `Annotated[...] = None`, which hides help and names.
    for parameter in commands()[words].params:
        assert parameter.param_type_name == "argument" or parameter.help, parameter.name


def test_values_are_plain_json() -> None:
    frame = pd.DataFrame({"dice": [0.1 + 0.2, math.nan]}, index=pd.Index(["a", "b"], name="case"))
    found = to_json({"f": frame, "p": Path("a b"), "n": np.float64(0.1), "l": (1, math.inf, True)})
    assert found == {
        "f": [{"case": "a", "dice": 0.30000000000000004}, {"case": "b", "dice": None}],
        "p": "a b",
        "n": 0.1,
        "l": [1, None, True],
    }
    json.dumps(found, allow_nan=False)


# -- the commands, on one small run ---------------------------------------------------------------


@pytest.fixture(scope="module")
def place(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options of the data and of the runs."""
    runs = tmp_path_factory.mktemp("output") / "my runs"
    return ["--data-root", str(phantom_root), "--runs", str(runs)]


@pytest.fixture
def document(call: Call) -> Callable[..., Any]:
    """Run a command with --json in an empty directory, and return its document."""

    def read(*words: object, code: int = 0) -> Any:
        found, out, err = call(*words, "--json")
        assert found == code, err
        values = json.loads(out, parse_constant=lambda name: pytest.fail(name))
        assert isinstance(values["next"], list)
        return values

    return read


def test_run_prints_scores_in_full(
    document: Callable[..., Any],
    call: Call,
    place: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    words = ["run", "--method=source_only", "--dataset=phantom", *OPTIONS, *place]
    plan = document(*words, "--dry-run")
    assert not plan["already_done"] and plan["stages"] == {"segment": 2} and plan["seconds"] > 0
    first = document(*words)
    assert first["id"] == plan["id"] and not first["already_done"] and first["selector"] == "last"
    run = Path(first["path"])
    cases = pd.read_parquet(run / "cases.parquet")
    own = cases[(cases["selector"] == "last") & (cases["structure"] == "MYO")]["dice"].mean()
    scores = {(row["selector"], row["structure"]): row for row in first["scores"]}
    assert scores["last", "MYO"]["dice"] == own
    assert first["config"]["steps"] == 2 and first["privileged"] is False
    assert first["protocol"] is first["caveat"] is None and first["distances"].startswith("mm")
    assert first["warnings"] == []
    assert first["next"][0].startswith("glua-bench compare --methods source_only")
    again = document(*words)
    assert again["already_done"] and again["scores"] == first["scores"]

    code, out, _ = call(*words, "--quiet")
    assert code == 0 and "MYO" in out and f"Results: {run}" in out
    assert not {"Next:", "Browse:", "already done"} & set(out.replace("    ", " ").split("\n"))
    assert "Next:" not in out and "source_only on phantom" not in out
    _, quiet, _ = call(*words[:3], *OPTIONS, "--seed=1", *place, "-q")
    assert "steps" not in quiet and "evaluate" not in quiet and "MYO" in quiet

    config = ["run", "--config", run / "config.yaml", "--device=cpu", "--no-mlflow", *place]
    same = document(*config)
    assert same["already_done"] and same["id"] == first["id"]
    # The next command omits what the file states but is the default.
    assert same["next"][0].count("--set ") == first["next"][0].count("--set ")
    seeded = document(*config, "--seed=1")
    assert seeded["already_done"] and seeded["config"]["seed"] == 1
    # An option at its default overrides the file too.
    back = ["run", "--config", Path(seeded["path"]) / "config.yaml", *config[3:], "--seed=0"]
    code, _, err = call(*back, "--json")
    assert code == 0 and "seed = 0 instead of 1" in err

    image = next(Path(place[1]).glob("ct_train/*1003_image.nii.gz"))
    found = document("predict", image, "--run", run, "--device=cpu")
    assert set(found["predictions"][0]["ml"]) == {"MYO", "LAC", "LVC", "AA"}
    assert Path(found["predictions"][0]["labels"]).is_file() and found["domain"] == "ct"
    exported = document("export", "--run", run)
    assert "model.safetensors" in exported["files"] and exported["next"]
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "folder_tracker:FolderTracker")
    monkeypatch.setenv("FOLDER_TRACKER", str(tmp_path))
    assert document("sync", *place[2:])["uploaded"] >= 2


def test_an_error_leaves_stdout_empty(call: Call, place: list[str]) -> None:
    code, out, err = call("run", "--method=glue", "--dataset=phantom", *place, "--json")
    assert code == 2 and out == "" and err.startswith("glua-bench: error: No method is called")


def test_comparisons_list_runs_and_table(
    document: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: list[str]
) -> None:
    task = ["--dataset=phantom", "--seeds=1", *OPTIONS, *place, "--dry-run"]
    parts = {"slices": 0.0, "segment": 2.0, "selectors": 0.0, "evaluation": 0.0, "figures": 0.0}
    monkeypatch.setattr(estimate, "probe", lambda planned, draw: parts)
    planned = document("compare", "--methods=source_only", *task)
    states = {run["entry"]: run["state"] for run in planned["runs"]}
    assert set(states) == {"source_only", "supervised"} and states["supervised"] == "open"
    varied = document("ablate", "--method=source_only", "--vary=lr=0.1", "--no-bounds", *task)
    assert [run["entry"] for run in varied["runs"]] == ["default", "lr = 0.1"]
    assert varied["seconds"] >= 2.0 and varied["parts"]["segment"] > 0


def test_finished_comparisons_are_printed_in_full(
    document: Callable[..., Any],
    call: Call,
    place: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--seeds=1", "--dataset=phantom", "--no-bounds", *OPTIONS, *place]
    found = document("compare", "--methods=source_only", *words, "--out", "csv")
    (line,) = found["table"]
    assert line["entry"] == "source_only" and line["sd"] is None and 0 <= line["Dice"] <= 1
    assert found["runs"][0]["state"] == "done" and Path(found["members"]).is_file()
    assert found["next"][0].startswith("glua-bench report --runs") and found["failed"] == {}
    assert all(Path(file).is_file() for file in found["files"])
    assert found["warnings"] == [] and found["external"] == []
    assert found["runs"][0]["privileged"] is False
    (task,) = found["tasks"]
    assert task["task"] == "phantom mr-ct" and task["protocol"] is task["caveat"] is None
    assert task["distances"].startswith("mm")

    words = ["compare", "--methods=source_only", *words, "--selectors=agreement"]
    monkeypatch.setattr(Phantom, "caveat", lambda self, direction: f"{direction} shares patients")
    monkeypatch.setattr(Phantom, "protocol", "is generated")
    again = document(*words)
    assert "was finished without agreement" in again["warnings"][0]
    assert again["tasks"][0]["caveat"] == "mr-ct shares patients"
    code, out, err = call(*words, "--quiet")
    assert code == 0 and err.count("warning: ") == 1
    stamps = ["PROTOCOL is generated.", "CAVEAT mr-ct shares patients."]
    *_, protocol, caveat, labels = out.rstrip().splitlines()
    assert [protocol, caveat] == stamps and labels.startswith("LABELS ")
    assert "Next:" not in out and "runs:" not in out


def test_reports_name_their_page(document: Callable[..., Any], made_runs: Any) -> None:
    made_runs.comparison(seeds=2)
    found = document("report", "--runs", made_runs.root, "--no-pictures")
    assert Path(found["report"]).is_file() and found["summary"] and found["next"]


def test_sweeps_print_their_choice(
    document: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "title: Which rate?\nmethod: source_only\ndataset: phantom\nobjective: source_val\n"
        "sampler: grid\nspace: {lr: [1.0e-3, 1.0e-2]}\ntrials: 1\nset: {segmenter.width: 4, "
        "segmenter.depth: 3, grid.size: 32, grid.spacing: 7, batch_size: 2}\n",
        encoding="utf-8",
    )
    options = ["--steps=2", "--device=cpu", "--no-mlflow", *place]
    monkeypatch.setattr(sweeping, "planned", lambda *given: ["1 run"])
    assert document("sweep", file, *options, "--dry-run")["definition"]["trials"] == 1
    found = document("sweep", file, *options, "--executor=debug")
    assert found["finished"] and set(found["chosen"]["settings"]) == {"lr"}
    assert Path(found["report"]).is_file() and found["next"][0].startswith("glua-bench run")


def test_data_commands(document: Callable[..., Any], phantom_root: Path, tmp_path: Path) -> None:
    words = ["phantom", "--data-root", phantom_root, "--jobs=1"]
    assert document("data", "prepare", *words)["domains"]["ct"]["train"] == 1
    checked = document("data", "check", *words)
    assert len(checked["cases"]) == 6 and set(checked["cases"][0]["ml"]) >= {"MYO"}
    assert len(checked["next"]) == 2
    assert document("data", "fingerprint", *words)["fingerprint"]
    exported = document("data", "export", *words, "--to", tmp_path / "nn")
    assert len(exported["folders"]) == 2 and exported["folders"][0]["cases"]
    shown = document("data", "show", *words[:3])
    assert all(Path(file).is_file() for file in shown["files"])


def test_a_failed_check_has_its_findings(
    document: Callable[..., Any], phantom_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(phantom_root, root)
    next(root.glob("ct_train/*1003_label.nii.gz")).write_bytes(b"")
    found = document("data", "check", "phantom", "--data-root", root, "--jobs=1", code=2)
    assert any(each["severity"].upper() == "PROBLEM" for each in found["findings"])


def test_lists_and_new_plugins(document: Callable[..., Any]) -> None:
    listed = document("list", "methods", "-v")["plugins"]
    glua = next(each for each in listed if each["name"] == "glua")
    assert glua["settings"]["mask_ratio"]["low"] is not None and glua["error"] is None
    kinds = {each["kind"] for each in document("list")["plugins"]}
    assert kinds == {"method", "dataset", "selector", "sweep"}
    assert Path(document("new-method", "mine")["file"]).is_file()
    assert Path(document("new-dataset", "livers", "--python")["file"]).is_file()
    names = [each["name"] for each in document("doctor")["findings"]]
    assert "device" in names


# -- completion -----------------------------------------------------------------------------------


def completed(words: str, folder: Path) -> set[str]:
    """Return what bash offers for the last word, from a process without torch."""
    code = (
        "import sys\n"
        "from glua_bench.cli.main import app\n"
        "try:\n    app(prog_name='glua-bench')\n"
        "finally:\n    heavy = {'torch', 'pandas'} & set(sys.modules)\n    assert not heavy\n"
    )
    environment = {
        "_GLUA_BENCH_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "AssertionError" not in done.stderr, done.stderr
    return set(done.stdout.split())


def test_names_are_completed(tmp_path: Path) -> None:
    assert completed("glua-bench run --method gl", tmp_path) == {
        *("global_only", "glua", "glua_self_training")
    }
    assert "glua,sifa" in completed("glua-bench compare --methods glua,s", tmp_path)
    assert completed("glua-bench run --dataset mscmr --direction b", tmp_path) == {"bssfp-lge"}
    assert completed("glua-bench run --preset q", tmp_path) == {"quick"}
    assert completed("glua-bench run --selectors im,ag", tmp_path) == {"im,agreement"}
    assert completed("glua-bench import x --dataset msc", tmp_path) == {"mscmr"}


def test_the_completion_script_is_shown(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = call("--show-completion", "bash")
    assert code == 0 and "COMPREPLY=(" in out
    assert "--install-completion" in call("-h")[1]
