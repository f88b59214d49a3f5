"""mlflow_store.py: the default store is whole or missing, and a broken one is replaced."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sample_runs import complete, counts, mirrored, started
from small_commands import Call

from glua_bench.records import mlflow_store
from glua_bench.records.mlflow_mirror import MLflowMirror
from glua_bench.records.mlflow_store import INTERRUPTED, fault, prepare

Damage = Callable[[Path], object]
KILLED, HALF = (int(os.environ.get("GLUA_BENCH_FAULTS", "1")) * often for often in (5, 2))
# Each process spends its time on the tables, since it is forked after the import of MLflow.
FORKS = """\
import json, os, random, resource, signal, sys, time
from pathlib import Path
from typing import Any
from glua_bench.records.mlflow_mirror import import_mlflow
from glua_bench.records import mlflow_store as store

import_mlflow()
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

def forked(work):
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child

def create(folder, limit=None):
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        store.prepare(folder / "mlflow.db", own=True)
    return forked(work)

def killed(child, seed, by=signal.SIGKILL):
    time.sleep(random.Random(seed).uniform(0.02, 0.5))
    os.kill(child, by)
    return ended(child) != 0

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def made(name):
    folder = Path(name)
    folder.mkdir()
    return folder

def files(folder):
    return sorted(file.name for file in folder.iterdir())

many, several = json.loads(sys.argv[1])
found = {}
folder = made("killed")
found["killed"] = []
for seed in range(many):
    if killed(create(folder), seed):
        found["killed"].append(store.fault(folder / "mlflow.db"))
    else:
        (folder / "mlflow.db").unlink()
interrupted = made("interrupted")
found["interrupted"] = []
for seed in range(2):
    if killed(create(interrupted), seed, signal.SIGINT):
        found["interrupted"].append(files(interrupted))
    else:
        (interrupted / "mlflow.db").unlink()
found["killed, at last"] = [ended(create(folder)), files(folder)]

folder = made("half")
file = folder / "mlflow.db"
found["half"] = []
for seed in range(several):
    child = forked(lambda: SqlAlchemyStore(f"sqlite:///{file}", "x"))
    while not file.exists() or file.stat().st_size == 0:
        time.sleep(0.01)
    killed(child, seed)
    before = store.fault(file, thorough=True)
    said = store.prepare(file, own=True, thorough=True)
    found["half"].append([before, said, store.fault(file, thorough=True)])
    file.unlink()

folder = made("at once")
found["at once"] = [[ended(child) for child in [create(folder), create(folder)]], files(folder)]

folder = made("full")
found["full"] = [(ended(create(folder, limit)), files(folder)) for limit in (1 << 12, 1 << 18)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Create stores in processes that are killed, that compete, or whose disk is full."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps([KILLED, HALF])],
        cwd=tmp_path_factory.mktemp("forked"),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# -- creating it ----------------------------------------------------------------------------------


@pytest.mark.fault("killed", "the process that creates the MLflow store")
def test_a_store_whose_creation_is_killed_is_missing_and_not_broken(
    forked: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    record_property("tries", KILLED)
    assert forked["killed"] and set(forked["killed"]) == {""}
    assert forked["killed, at last"] == [0, [".mlflow.db.lock", "mlflow.db"]]


@pytest.mark.fault("killed", "Ctrl-C while the MLflow store is created")
def test_an_interrupted_creation_leaves_nothing(forked: dict[str, Any]) -> None:
    assert forked["interrupted"]
    assert all(set(left) <= {".mlflow.db.lock"} for left in forked["interrupted"])


@pytest.mark.fault("killed", "MLflow while it creates its store in place, as before")
def test_a_store_that_was_left_half_created_is_completed_or_replaced(
    forked: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    record_property("tries", HALF)
    assert any(before for before, _, _ in forked["half"])
    for before, said, after in forked["half"]:
        assert not said or before and "was broken" in said and "mlflow.db.broken" in said
        assert after == ""


@pytest.mark.fault("two users", "processes that create the MLflow store at once")
def test_processes_that_create_the_store_at_once_share_it(forked: dict[str, Any]) -> None:
    assert forked["at once"] == [[0, 0], [".mlflow.db.lock", "mlflow.db"]]


@pytest.mark.fault("full disk", "while the MLflow store is created")
def test_a_disk_that_is_full_leaves_no_store(forked: dict[str, Any]) -> None:
    assert forked["full"] == [[1, [".mlflow.db.lock"]]] * 2


def test_a_full_disk_costs_a_warning_and_sync_makes_up_for_it(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, said = tmp_path / "runs", []
    run = complete(started(root))

    def full(path: Path, runs_root: Path) -> None:
        path.write_bytes(b"SQLite format 3\0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow_store, "_create", full)
    assert MLflowMirror(root, said.append).mirror(run) is False
    assert len(said) == 1 and "is full" in said[0] and "glua-bench sync" in said[0]
    assert not (root / "mlflow.db").exists() and not list(root.glob(".writing-*"))
    monkeypatch.setattr(mlflow_store, "_create", lambda path, _: shutil.copy(empty_store, path))
    assert counts(root) == (1, 0, 0, 0)


# -- replacing a broken one -----------------------------------------------------------------------


def statements(*lines: str) -> Damage:
    """Return a damage by SQL."""

    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            for line in lines:
                connection.execute(line)

    return damage


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("of somebody")


def stale_journal(path: Path) -> None:
    """Leave a journal that would be applied to a new file."""
    path.write_bytes(b"no database")
    path.with_name("mlflow.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" * 64)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda path: os.truncate(path, 100_000), "malformed"),
    "empty": (lambda path: os.truncate(path, 0), ""),
    "text": (lambda path: path.write_text("no database " * 999), "not a database"),
    "directory": (directory, "it is a directory"),
    "no version": (statements("DELETE FROM alembic_version"), INTERRUPTED),
    "no versions": (statements("DROP TABLE alembic_version"), "lacks the table alembic_version"),
    "first migrations": (
        statements(
            "UPDATE alembic_version SET version_num = '451aebb31d03'",
            "CREATE TABLE _alembic_tmp_metrics (x INTEGER)",
            "CREATE TABLE _alembic_tmp_runs (x INTEGER)",
        ),
        INTERRUPTED,
    ),
    "journal": (stale_journal, "not a database"),
}


@pytest.mark.fault("silent damage", "the MLflow store is cut, empty, half created or no store")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_store_is_kept_aside_and_replaced(
    name: str, root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, why = DAMAGES[name]
    monkeypatch.setattr(mlflow_store, "_create", lambda path, _: shutil.copy(empty_store, path))
    first, second = complete(started(root, "one")), complete(started(root, "two"))
    assert MLflowMirror(root).mirror(first)
    file = root / "mlflow.db"
    damage(file)
    before = None if file.is_dir() else file.read_bytes()
    said: list[str] = []
    if name == "first migrations":  # which MLflow compares once in each process
        assert counts(root, said.append) == (2, 0, 0, 0)
    else:
        assert MLflowMirror(root, said.append).mirror(second)
    kept = root / "mlflow.db.broken"
    if why:
        (sentence,) = said
        assert why in sentence and kept.name in sentence and "glua-bench sync" in sentence
        assert sentence.endswith(".") and ". " not in sentence
        assert kept.is_dir() if before is None else kept.read_bytes() == before
    else:
        assert said == [] and not kept.exists()
    assert not file.with_name("mlflow.db-journal").exists()
    assert sum(counts(root, said.append)) == 2
    assert {run.data.tags["glua_bench.id"] for run in mirrored(root)} == {"one", "two"}
    assert len(said) == bool(why)


@pytest.mark.fault("silent damage", "pages of the MLflow store are overwritten")
def test_sync_finds_damaged_pages(
    root: Path, empty_store: Path, tries: Callable[[int], range], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "_create", lambda path, _: shutil.copy(empty_store, path))
    complete(started(root, "one")), complete(started(root, "two"))
    assert counts(root) == (2, 0, 0, 0)
    file = root / "mlflow.db"
    good, size = file.read_bytes(), 4096
    for seed in tries(8):
        dice = random.Random(seed)
        damaged = bytearray(good)
        for _ in range(dice.choice((1, 5, 50))):
            start = size * dice.randrange(len(good) // size)
            damaged[start : start + size] = dice.randbytes(size)
        file.write_bytes(damaged)
        said: list[str] = []
        assert counts(root, said.append)[2:] == (0, 0), said
        assert fault(file, thorough=True) == ""
        assert {run.data.tags["glua_bench.id"] for run in mirrored(root)} == {"one", "two"}


@pytest.mark.parametrize("place", [0, 30_000, 200_000, 600_000])
def test_sync_tells_of_a_damaged_store_in_one_line(
    place: int, root: Path, empty_store: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "_create", lambda path, _: shutil.copy(empty_store, path))
    complete(started(root))
    file = root / "mlflow.db"
    with file.open("rb+") as stream:
        stream.seek(place)
        stream.write(b"\xff" * 50_000)
    code, out, err = call("sync", "--runs", root)
    assert code == 0 and "1 runs uploaded" in out, err
    (line,) = err.splitlines()
    assert line.startswith("warning: The MLflow store") and "was broken" in line


@pytest.mark.fault("two users", "another program has locked the MLflow store")
def test_a_locked_store_is_not_taken_for_a_broken_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "LOCK_SECONDS", 0.1)
    file = root / "mlflow.db"
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert fault(file, thorough=True) == "" and prepare(file, True, thorough=True) == ""
    assert counts(root) == (0, 0, 0, 0) and not (root / "mlflow.db.broken").exists()


def test_a_store_of_an_earlier_mlflow_is_upgraded_and_keeps_its_runs(tmp_path: Path) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.db.base_sql_model import Base  # noqa: F401
    from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

    root = tmp_path / "runs"
    run, file, said = complete(started(root)), root / "mlflow.db", []
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{file}")
    InitialBase.metadata.create_all(engine)
    settings = utils._get_alembic_config(f"sqlite:///{file}")
    earlier = list(ScriptDirectory.from_config(settings).walk_revisions())[10].revision
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, earlier)
    engine.dispose()
    statements("INSERT INTO experiments (experiment_id, name) VALUES (7, 'of old')")(file)
    assert fault(file, thorough=True) == mlflow_store.OUTDATED
    assert MLflowMirror(root, said.append).mirror(run) and said == []
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT name FROM experiments WHERE experiment_id = 7").fetchone()
    assert not (root / "mlflow.db.broken").exists()


@pytest.mark.fault("full disk", "while a broken MLflow store is replaced")
def test_a_broken_store_stays_in_its_place_until_the_new_one_is_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, runs_root: Path) -> None:
        raise OSError(28, "No space left on device")

    run, said = complete(started(root)), []
    (root / "mlflow.db").write_text("no database")
    monkeypatch.setattr(mlflow_store, "_create", full)
    assert not MLflowMirror(root, said.append).mirror(run)
    assert "is full" in said[0] and (root / "mlflow.db").read_text() == "no database"


def test_a_store_that_the_user_named_is_created_whole_but_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, file, said = tmp_path / "runs", tmp_path / "elsewhere" / "own.db", []
    run = complete(started(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    monkeypatch.setattr(mlflow_store, "_create", lambda path, _: path.write_text("no database"))
    assert not MLflowMirror(root, said.append).mirror(run)
    assert file.read_text() == "no database" and len(said) == 1
    assert not list(file.parent.glob("*.broken"))
