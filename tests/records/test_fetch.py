"""fetch.py: copies become run directories again, or are skipped."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sample_runs import (
    CONFIG,
    client_of,
    complete,
    counts,
    mirrored,
    one_sentence,
    started,
    two_runs,
)

from glua_bench.errors import UserError
from glua_bench.files import UNFINISHED, replacing
from glua_bench.records import fetch, mlflow_mirror
from glua_bench.records.fetch import fetch_runs
from glua_bench.records.mlflow_mirror import MLflowMirror, tracking_uri
from glua_bench.records.naming import Comparison
from glua_bench.records.run_directory import list_runs
from glua_bench.records.seal import COPIED


def files_of(root: Path) -> dict[str, bytes]:
    """Return path → content of the files that are copied."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted((root / "phantom").rglob("*"))
        if path.name in COPIED or path.suffix == ".png"
    }


@pytest.mark.fault("killed", "a writer of files that are uploaded")
def test_nothing_half_written_is_mirrored_or_fetched(root: Path, tmp_path: Path) -> None:
    run = complete(started(root))
    names = (*COPIED, "failed", "dataset.json", "figures/x.png", "predictions/x.nii.gz")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(replacing(run.path / name)).write_text("half")
        assert MLflowMirror(root).mirror(run)
        (shown,) = mirrored(root)
        client = client_of(root)
        files = {f.path for f in client.list_artifacts(shown.info.run_id)}
        assert files == {*COPIED, mlflow_mirror.DIGESTS, "cases.csv", "scores.csv", "figures"}
        figures = client.list_artifacts(shown.info.run_id, "figures")
        assert [f.path for f in figures] == ["figures/cases.png"]
        (fetched,) = fetch.fetch_runs(tracking_uri(root), tmp_path / "fetched")
        assert fetched.done and not list((tmp_path / "fetched").rglob(f"{UNFINISHED}*"))


def test_what_was_mirrored_is_fetched_byte_for_byte(root: Path, tmp_path: Path) -> None:
    members = two_runs(root)
    started(root, "unfinished")
    started(root, "failed").fail("no reason")
    complete(started(root, "removed"))
    assert MLflowMirror(root).nest(Comparison("compare a", members), {"dice": 0.5})
    assert counts(root) == (2, 2, 1, 0)
    client = client_of(root)
    for shown in mirrored(root):
        if shown.data.tags.get("glua_bench.id") == "removed":
            client.delete_run(shown.info.run_id)
            shutil.rmtree(root / "phantom" / "source_only" / "removed")

    into = tmp_path / "new" / "fetched"
    runs = fetch_runs(tracking_uri(root), into)
    assert [run.id for run in runs] == ["one", "two"] and all(run.done for run in runs)
    assert [run.path for run in runs] == [run.path for run in list_runs(into)]
    shutil.rmtree(root / "phantom" / "source_only" / "failed")
    shutil.rmtree(root / "phantom" / "source_only" / "unfinished")
    assert files_of(into) == files_of(root) and len(files_of(into)) == 14
    assert [p.name for p in into.iterdir()] == ["phantom"]  # no leftovers
    assert runs[0].config == CONFIG
    pd.testing.assert_frame_equal(runs[0].read_metrics(), members[0][1].read_metrics())

    before = {path: path.stat().st_mtime_ns for path in into.rglob("*")}
    again = fetch_runs(tracking_uri(root), into, ["glua-bench/phantom"])
    assert [run.path for run in again] == [run.path for run in runs]
    assert {path: path.stat().st_mtime_ns for path in into.rglob("*")} == before


def test_what_a_run_keeps_of_its_dataset_travels(root: Path, tmp_path: Path) -> None:
    run = started(root)
    kept = {"dataset.json": "{}", "dataset.yaml": "name: mine", "dataset_ct.csv": "image,label"}
    for name, text in {**kept, "dataset.py": "no", "notes_ct.csv": "no"}.items():
        (run.path / name).write_text(text)
    assert MLflowMirror(root).mirror(complete(run))
    (fetched,) = fetch_runs(tracking_uri(root), tmp_path / "fetched")
    texts = {path.name: path.read_text() for path in fetched.path.glob("*ataset*")}
    assert texts == kept and not (fetched.path / "notes_ct.csv").exists()


@pytest.mark.fault("tracker", "delete or truncate files of a copy on the tracker")
@pytest.mark.parametrize("name", [*COPIED, mlflow_mirror.DIGESTS, "figures/cases.png"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_copy_is_left_out_and_named(
    name: str, damage: str, root: Path, tmp_path: Path
) -> None:
    for _, run in two_runs(root):
        assert MLflowMirror(root).mirror(run)
    (copy,) = (r for r in mirrored(root) if r.data.tags["glua_bench.id"] == "two")
    artifact = Path(copy.info.artifact_uri.removeprefix("file://")) / name
    if damage == "missing":
        artifact.unlink()
    else:
        artifact.write_bytes(artifact.read_bytes()[:-5])
    warnings: list[str] = []
    runs = fetch_runs(tracking_uri(root), tmp_path / "fetched", warn=warnings.append)
    assert [run.id for run in runs] == ["one"]
    (warning,) = warnings
    assert warning.startswith("Run two (") and name in warning and warning.endswith(".")
    assert [run.id for run in list_runs(tmp_path / "fetched")] == ["one"]


@pytest.mark.fault("tracker", "fetch over an unfinished run")
def test_what_lies_in_the_place_of_a_run_is_not_touched(root: Path, tmp_path: Path) -> None:
    assert MLflowMirror(root).mirror(complete(started(root)))
    mine = started(tmp_path / "fetched")
    warnings: list[str] = []
    with pytest.raises(UserError, match="None of the 1 runs") as error:
        fetch_runs(tracking_uri(root), tmp_path / "fetched", warn=warnings.append)
    one_sentence(error)
    assert len(warnings) == 1 and str(mine.path) in warnings[0]
    assert not mine.done and (mine.path / "log.jsonl").is_file()


@pytest.mark.fault("sealed results", "damage a fetched copy and fetch again")
@pytest.mark.parametrize("name", ["cases.parquet", "config.yaml", "done", "figures/cases.png"])
def test_a_damaged_directory_is_fetched_again(name: str, root: Path, tmp_path: Path) -> None:
    assert MLflowMirror(root).mirror(complete(started(root)))
    (fetched,) = fetch_runs(tracking_uri(root), tmp_path / "fetched")
    assert fetched.done and fetched.sealed and fetched.id == "abc123"
    file = fetched.path / name
    whole = file.read_bytes()
    file.write_bytes(b"{" + whole[1:-2])
    warnings: list[str] = []
    (again,) = fetch_runs(tracking_uri(root), tmp_path / "fetched", warn=warnings.append)
    assert again.done and file.read_bytes() == whole
    (warning,) = warnings
    assert f"{fetched.path} was damaged ({name} was" in warning
    aside = tmp_path / "fetched" / "damaged" / "phantom" / "source_only" / "abc123"
    assert (aside / name).is_file() and str(aside) in warning


@pytest.mark.fault("tracker", "name a path outside the directory of runs")
def test_a_tracker_cannot_choose_where_files_go(root: Path, tmp_path: Path) -> None:
    assert MLflowMirror(root).mirror(complete(started(root)))
    (copy,) = mirrored(root)
    client = client_of(root)
    client.set_tag(copy.info.run_id, "glua_bench.id", "../../../../outside")
    warnings: list[str] = []
    with pytest.raises(UserError):
        fetch_runs(tracking_uri(root), tmp_path / "a" / "fetched", warn=warnings.append)
    assert len(warnings) == 1 and "outside" in warnings[0]
    assert not list(tmp_path.rglob("outside"))


def test_more_copies_than_a_page_are_all_found(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    search = MlflowClient.search_runs
    for name in ("one", "two", "three"):
        assert MLflowMirror(root).mirror(complete(started(root, name)))
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *given, **named: search(*given, **named, max_results=1)
    )
    runs = fetch_runs(tracking_uri(root), tmp_path / "fetched")
    assert [run.id for run in runs] == ["one", "three", "two"]


@pytest.mark.fault("tracker", "no store, no server, or no run")
def test_a_tracker_that_serves_no_runs_is_one_sentence(
    root: Path, refusing_server: str, tmp_path: Path
) -> None:
    into = tmp_path / "fetched"
    with pytest.raises(UserError, match="has no finished runs") as error:
        fetch_runs(tracking_uri(root), into)
    assert "glua-bench sync" in one_sentence(error) and tracking_uri(root) in str(error.value)
    with pytest.raises(UserError, match="no experiment 'other'") as error:
        fetch_runs(tracking_uri(root), into, ["other"])
    one_sentence(error)
    nowhere = f"sqlite:///{tmp_path}/no.db"
    dead = "http://user:secret@127.0.0.1:9"
    for uri in (nowhere, dead, refusing_server, "foo://bar"):
        with pytest.raises(UserError, match="cannot be read") as error:
            fetch_runs(uri, into)
        assert uri.split("@")[-1] in one_sentence(error) and "secret" not in str(error.value)
    assert not (tmp_path / "no.db").exists() and not into.exists()


@pytest.mark.fault("tracker", "the server dies during a download")
def test_a_tracker_that_dies_meanwhile_is_one_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further runs are not tried."""
    for _, run in two_runs(root):
        assert MLflowMirror(root).mirror(run)

    def dead(*given: Any) -> None:
        raise ConnectionRefusedError("nobody answers")

    monkeypatch.setattr(fetch, "_download", dead)
    monkeypatch.setattr(fetch, "check_tracker", lambda uri: None)
    warnings: list[str] = []
    with pytest.raises(UserError, match="None of the 2"):
        fetch_runs(tracking_uri(root), tmp_path, warn=warnings.append)
    assert len(warnings) == 2
    copies = fetch._copies(tracking_uri(root), None)
    monkeypatch.setattr(fetch, "_copies", lambda *given: copies)
    client = client_of(root)
    monkeypatch.setattr(fetch, "mlflow_client", lambda uri: client)
    monkeypatch.setattr(fetch, "check_tracker", dead)
    with pytest.raises(UserError, match="cannot be read"):
        fetch_runs(tracking_uri(root), tmp_path, warn=warnings.append)
    assert len(warnings) == 2
