"""seal.py: a finished run whose files were edited, truncated, lost or exchanged is not shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_runs import as_version_1, complete, one_sentence, started

from glua_bench.errors import RunFailure, UserError
from glua_bench.records import seal
from glua_bench.records.run_directory import RunDirectory, check_predictions, list_runs
from glua_bench.records.tracker import run_state, sync_runs

Tries = Callable[[int], range]
WEIGHTS = "checkpoints/candidate_0000004.pt"


def finished(root: Path, run_id: str = "abc123", dice: int = 1) -> RunDirectory:
    """Return a finished run with every kind of file."""
    run = started(root, run_id)
    for name in ("predictions/ct_1.nii.gz", "predictions/ct_2.nii.gz", WEIGHTS):
        (run.path / name).write_bytes(f"{name} of {run_id}".encode() * (30 + dice))
    (run.path / "dataset.json").write_text('{"domains": {}}')
    return complete(run)


def names_of(run: RunDirectory) -> list[str]:
    files = [file for file in run.path.rglob("*") if file.is_file() and file.name != ".lock"]
    return sorted(file.relative_to(run.path).as_posix() for file in files)


@pytest.fixture
def sound(tmp_path: Path) -> RunDirectory:
    run = finished(tmp_path / "runs")
    assert run.done and run.sealed and run.damage is None
    return run


def named(run: RunDirectory, problem: str) -> None:
    """Assert that the run is not done, and that one sentence names the problem and the fix."""
    again = RunDirectory.open(run.path)
    assert not again.done and again.problem == problem
    text = str(again.damage)
    assert str(run.path) in text and problem in text and "--retry-failed" in text
    assert "\n" not in text and text.count(".") - text.count("..") > 0 and text.endswith(".")


def test_the_seal_lists_every_file(sound: RunDirectory) -> None:
    mark = json.loads((sound.path / "done").read_text())
    assert mark["schema"] == seal.SCHEMA and mark["id"] == sound.id
    assert [*sorted(mark["files"]), "done"] == sorted(names_of(sound), key=lambda n: n == "done")
    for name, (size, digest) in mark["files"].items():
        assert (sound.path / name).stat().st_size == size and len(digest) == 64


@pytest.mark.fault("sealed results", "change one byte of any file of a finished run")
def test_a_changed_byte_is_found(tmp_path: Path, tries: Tries) -> None:
    sound = finished(tmp_path / "runs")
    names = [name for name in names_of(sound) if name != WEIGHTS]
    for attempt in tries(40):
        rng = np.random.default_rng(attempt)
        name = names[attempt % len(names)]
        file = sound.path / name
        whole, times = file.read_bytes(), file.stat()
        position = int(rng.integers(len(whole)))
        flipped = whole[position] ^ (1 << int(rng.integers(8)))
        file.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
        state = seal.state_of(sound.path, sound.id)
        assert not state.done, name
        assert state.problem == f"{name} was changed", name
        file.write_bytes(whole)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sound.done


@pytest.mark.fault("sealed results", "truncate any file of a finished run")
def test_a_truncated_file_is_found(tmp_path: Path, tries: Tries) -> None:
    sound = finished(tmp_path / "runs")
    names = [name for name in names_of(sound) if name != "done"]
    for attempt in tries(20):
        file = sound.path / names[attempt % len(names)]
        whole = file.read_bytes()
        file.write_bytes(whole[: int(np.random.default_rng(attempt).integers(len(whole)))])
        problem = seal.state_of(sound.path, sound.id).problem
        assert problem == f"{names[attempt % len(names)]} was truncated"
        file.write_bytes(whole)
    (sound.path / "done").write_bytes((sound.path / "done").read_bytes()[:40])
    named(sound, "done was changed")


@pytest.mark.fault("sealed results", "delete a file of a finished run")
@pytest.mark.parametrize(
    "name",
    ["cases.parquet", "summary.json", "environment.json", "dataset.json", "figures/cases.png"]
    + ["metrics.parquet", "predictions/ct_1.nii.gz"],
)
def test_a_missing_file_is_found(name: str, sound: RunDirectory) -> None:
    (sound.path / name).unlink()
    named(sound, f"{name} is missing")


@pytest.mark.fault("sealed results", "delete config.yaml of a finished run")
def test_a_run_without_configuration_does_not_vanish(
    sound: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished(sound.runs_root, "other")
    (sound.path / "config.yaml").unlink()
    assert not sound.done and sound.problem == "config.yaml is missing"
    assert [run.id for run in list_runs(sound.runs_root)] == [other.id]
    assert f"{sound.path} is damaged (config.yaml is missing" in capsys.readouterr().err


@pytest.mark.fault("sealed results", "add a prediction or a figure to a finished run")
@pytest.mark.parametrize("name", ["predictions/ct_9.nii.gz", "figures/better.png"])
def test_an_added_file_is_found(name: str, sound: RunDirectory) -> None:
    (sound.path / name).write_bytes(b"new")
    named(sound, f"{name} was added")


@pytest.mark.fault("sealed results", "exchange files or directories of two runs")
@pytest.mark.parametrize("what", ["predictions/ct_1.nii.gz", "cases.parquet", "done", "."])
def test_exchanged_files_are_found(what: str, tmp_path: Path) -> None:
    runs = [finished(tmp_path / "runs", name, dice) for dice, name in enumerate(("one", "two"))]
    pair = [(run.path / what).resolve() for run in runs]
    aside = tmp_path / "aside"
    for source, target in ((pair[0], aside), (pair[1], pair[0]), (aside, pair[1])):
        os.rename(source, target)
    # The contents of cases.parquet are equal here.
    assert [run.done for run in runs] == [what == "cases.parquet"] * 2
    if what in ("done", "."):
        named(runs[0], "it is the run two under another name")
    elif what != "cases.parquet":
        assert all(what in run.problem for run in runs)


@pytest.mark.fault("sealed results", "edit `done` itself")
@pytest.mark.parametrize("edit", ["time", "digest", "entry removed", "seal removed", "version 1"])
def test_an_edited_seal_is_found(edit: str, sound: RunDirectory) -> None:
    file = sound.path / "done"
    mark = json.loads(file.read_text())
    if edit == "time":
        mark["time"] = "2020-01-01T00:00:00+0000"
    elif edit == "digest":
        mark["files"]["cases.parquet"][1] = "0" * 64
    elif edit == "entry removed":
        del mark["files"]["cases.parquet"]
    elif edit == "seal removed":
        del mark["seal"]
    else:  # so that it passes for the mark of an earlier version
        digest = mark["files"]["summary.json"][1][:16]
        mark = {"id": sound.id, "time": mark["time"], "summary": digest}
    file.write_text(json.dumps(mark))
    named(sound, "done was changed")


@pytest.mark.fault("sealed results", "replace `done` by JSON of any shape")
def test_any_content_of_the_mark_is_refused(sound: RunDirectory) -> None:
    for text in ("", "[]", "{}", "null", "3", '{"schema": 2}', '{"schema": "x"}', "[" * 5000):
        (sound.path / "done").write_text(text)
        named(sound, "done was changed")
    shapes: list[Any] = [None, [], 3, {"summary.json": None}, {"summary.json": ["1", "2"]}]
    for files in shapes:  # with a digest that fits
        content = {"schema": seal.SCHEMA, "id": sound.id, "time": "", "files": files}
        (sound.path / "done").write_text(json.dumps({**content, "seal": seal._digest(content)}))
        named(sound, "done was changed")


@pytest.mark.fault("sealed results", "change the weights of a finished run")
def test_changed_weights_are_found_when_they_are_read(sound: RunDirectory) -> None:
    file = sound.path / WEIGHTS
    sound.check_file(file)
    file.write_bytes(b"other weights" + file.read_bytes()[13:])
    assert sound.done  # scores and predictions are those of the run
    with pytest.raises(UserError, match=r"candidate_0000004\.pt was changed") as error:
        sound.check_file(file)
    one_sentence(error)


def test_files_are_hashed_once_per_process(
    sound: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    own = seal.sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return own(path)

    monkeypatch.setattr(seal, "sha256", counted)
    assert RunDirectory.open(sound.path).done and sound.sealed and hashed == []
    (sound.path / "summary.json").write_text("{}")
    assert not sound.done and hashed == []  # the size suffices
    other = finished(sound.runs_root, "other")
    hashed.clear()
    assert other.done and other.done and hashed.count("summary.json") == 1


@pytest.mark.fault("sealed results", "score predictions of a finished run that were edited")
def test_predictions_of_a_damaged_run_are_not_scored(sound: RunDirectory, tmp_path: Path) -> None:
    file = sound.predictions / "ct_1.nii.gz"
    for path in (sound.predictions, file, tmp_path, tmp_path / "nowhere"):
        check_predictions(path)
    file.write_bytes(b"x" * 2000)
    for path in (sound.predictions, sound.predictions / "ct_2.nii.gz"):
        with pytest.raises(UserError, match=r"ct_1\.nii\.gz was changed"):
            check_predictions(path)


@pytest.mark.fault("sealed results", "upload an edited run to the tracker")
def test_a_damaged_run_is_not_mirrored(
    sound: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished(sound.runs_root, "other")
    (sound.path / "summary.json").write_text("{}")
    sent: list[str] = []
    counts = sync_runs(sound.runs_root, lambda run: not sent.append(run.id))
    assert sent == [other.id] and (counts.uploaded, counts.damaged, counts.missed) == (1, 1, 0)
    assert "summary.json was truncated" in capsys.readouterr().err
    with pytest.raises(RunFailure, match="damaged"):
        run_state(sound)


# -- mending --------------------------------------------------------------------------------------


@pytest.mark.fault("killed", "kill the process that moves a damaged run aside")
def test_an_interrupted_move_is_repeated_and_loses_nothing(
    sound: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sound.path / "cases.parquet").write_bytes(b"edited")
    files = names_of(sound)
    assert set(files) > {"done", WEIGHTS}
    rename, moves = os.rename, [0]

    def killed(source: Any, target: Any) -> None:
        moves[0] += 1
        if moves[0] == 4:
            raise KeyboardInterrupt
        rename(source, target)

    with sound.lock():
        monkeypatch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            sound.set_aside()
        monkeypatch.setattr(os, "rename", rename)
        assert sound.problem
        place = sound.set_aside()
        assert sound.set_aside() is None and not sound.done and sound.failed is None
    both = sound.runs_root / "damaged" / "phantom" / "source_only"
    assert place is not None and place.parent == both and names_of(sound) == []
    kept = [f.relative_to(own).as_posix() for own in both.iterdir() for f in own.rglob("*")]
    assert set(files) <= set(kept) and list_runs(sound.runs_root) == []


# -- schema versions ------------------------------------------------------------------------------


def test_a_run_of_the_previous_version_opens_and_is_not_called_sealed(sound: RunDirectory) -> None:
    old = as_version_1(sound)
    assert old.done and not old.sealed and old.damage is None
    assert old.read_summary()["scores"] and len(old.read_cases()) == 2
    assert run_state(old).startswith("done ")


@pytest.mark.fault("sealed results", "tear a file of a run of the previous version")
@pytest.mark.parametrize(
    "name", ["cases.parquet", "metrics.parquet", "summary.json", "environment.json", "done"]
)
def test_a_torn_run_of_the_previous_version_is_damaged(name: str, sound: RunDirectory) -> None:
    old = as_version_1(sound)
    file = old.path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert not old.done and name in old.problem
    with old.lock():
        assert old.set_aside() is not None


def test_a_run_of_a_newer_version_is_refused(
    sound: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished(sound.runs_root, "other")
    facts = sound.read_environment()
    assert facts["schema"] == seal.SCHEMA
    newer = json.dumps({**facts, "schema": seal.SCHEMA + 1})
    (sound.path / "environment.json").write_text(newer)
    for read in (lambda: RunDirectory.open(sound.path), lambda: sound.done):
        with pytest.raises(UserError, match="newer version of glua-bench") as error:
            read()
        one_sentence(error)
    assert [run.id for run in list_runs(sound.runs_root)] == [other.id]
    assert "newer version" in capsys.readouterr().err
    shutil.rmtree(sound.path)
