"""Files of settings that would take all memory or time are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_commands import Call, refused

from glua_bench.data.nnunet import read_nnunet
from glua_bench.datasets.folder.layouts import validation_ids
from glua_bench.errors import DataError

LAUGHS = "a: &a [1, 2]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = "a: " + "[" * 5000 + "]" * 5000 + "\n"
COMMANDS = (
    "sweep {file}",
    "data show {file}",
    "run --config {file}",
    "compare --config {file} --dataset phantom",
    "sweep mask_ratio --executor=slurm --slurm={file}",
    "run --method=glua --dataset={file}",
)


@pytest.mark.fault("hostile files", "YAML of many aliases or deep nesting, given to a command")
@pytest.mark.parametrize("words", COMMANDS)
def test_yaml_bombs_are_refused_with_their_line(words: str, call: Call, tmp_path: Path) -> None:
    for text, line in ((LAUGHS, "line 6"), (DEEP, "line 1")):
        (tmp_path / "own.yaml").write_text(text)
        said = refused(call(*words.format(file="own.yaml").split()), "own.yaml", line)
        assert len(said) < 300


@pytest.mark.fault("hostile files", "deeply nested JSON, given to a command")
def test_deep_json_is_refused(call: Call, tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "own.json").write_text(deep)
    refused(call("run-request", "own.json"), "own.json", "nested more than 50 deep")
    words = ["run", "--method=glua", "--dataset=phantom", f"--set=method.lr={'[' * 90}{']' * 90}"]
    refused(call(*words), "--set method.lr=", "the value cannot be parsed")
    (tmp_path / "dataset.json").write_text("\n" + deep)
    with pytest.raises(DataError, match=r"dataset\.json .*nested more than 50 deep: line 2"):
        read_nnunet(tmp_path)
    (tmp_path / "splits_final.json").write_text(deep)
    with pytest.raises(DataError, match=r"splits_final\.json"):
        validation_ids(tmp_path, 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(deep)
    (tmp_path / "image.nii.gz").write_bytes(b"")
    refused(call("predict", "--model=model", "image.nii.gz"), "model")
    folder = tmp_path / "runs" / "sweeps" / "own"
    folder.mkdir(parents=True)
    (folder / "definition.json").write_text(deep)
    (folder / "request.json").write_text(json.dumps({}))
    refused(call("worker", "--study=own"), "own")
