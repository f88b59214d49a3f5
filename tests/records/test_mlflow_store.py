"""mlflow_store.py: the default store is whole or missing, and a broken one is replaced."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sample_runs import complete, counts, mirrored, started

from glua_bench.records import mlflow_store
from glua_bench.records.mlflow_mirror import MLflowMirror
from glua_bench.records.mlflow_store import INTERRUPTED, fault, prepare

Damage = Callable[[Path], object]
FORKS = """\
import os, random, resource, signal, sys, time
from pathlib import Path
from glua_bench.records.mlflow_mirror import import_mlflow
from glua_bench.records import mlflow_store as store

import_mlflow()
import mlflow.store.tracking.sqlalchemy_store  # so that a process spends its time on the tables

def forked(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    return child

def create(folder, limit=None):
    def work():
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        store.prepare(Path(folder) / "mlflow.db", own=True)
        os._exit(0)
    return forked(work)

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def places(seed):
    folder = Path(sys.argv[1]) / str(seed)
    folder.mkdir()
    return folder
"""


def forks(tmp_path: Path, program: str) -> str:
    """Run a program that starts further processes, in one that has imported MLflow."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS + program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- creating it ----------------------------------------------------------------------------------


@pytest.mark.fault("killed", "the process that creates the MLflow store")
def test_a_store_whose_creation_is_killed_is_missing_and_not_broken(
    tmp_path: Path, tries: Callable[[int], range]
) -> None:
    seeds = tries(6)
    program = f"""
killed = 0
for seed in range({len(seeds)}):
    folder = places(seed)
    child = create(folder)
    time.sleep(random.Random(seed).uniform(0.02, 0.6))
    os.kill(child, signal.SIGKILL)
    killed += ended(child) != 0
    assert store.fault(folder / "mlflow.db") == "", seed
assert ended(create(folder)) == 0
print(killed, *sorted(file.name for file in folder.iterdir()))
"""
    killed, *files = forks(tmp_path, program).split()
    assert int(killed) > 0 and files == [".mlflow.db.lock", "mlflow.db"]


@pytest.mark.fault("killed", "MLflow while it creates the store in place, as before")
def test_a_store_that_an_earlier_version_left_half_created_is_replaced(
    tmp_path: Path, tries: Callable[[int], range]
) -> None:
    program = f"""
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
for seed in range({len(tries(3))}):
    folder = places(seed)
    file = folder / "mlflow.db"
    child = forked(lambda: (SqlAlchemyStore(f"sqlite:///{{file}}", "x"), os._exit(0)))
    while not file.exists() or file.stat().st_size == 0:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    if ended(child) == 0:
        continue
    said = store.prepare(file, own=True, thorough=True)
    assert "was broken" in said and "mlflow.db.broken" in said, said
    assert store.fault(file, thorough=True) == ""
    print("replaced")
"""
    assert "replaced" in forks(tmp_path, program)


@pytest.mark.fault("two users", "processes that create the MLflow store at once")
def test_processes_that_create_the_store_at_once_share_it(tmp_path: Path) -> None:
    program = """
folder = places("both")
children = [create(folder) for _ in range(3)]
assert [ended(child) for child in children] == [0, 0, 0]
print(*sorted(file.name for file in folder.iterdir()), store.fault(folder / "mlflow.db", True))
"""
    assert forks(tmp_path, program).split() == [".mlflow.db.lock", "mlflow.db"]


@pytest.mark.fault("full disk", "while the MLflow store is created")
def test_a_disk_that_is_full_leaves_no_store_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    program = """
folder = places("full")
for limit in (1 << 12, 1 << 16, 1 << 18):
    assert ended(create(folder, limit)) == 1
    assert [file.name for file in folder.iterdir()] == [".mlflow.db.lock"], list(folder.iterdir())
assert ended(create(folder)) == 0
print(store.fault(folder / "mlflow.db", thorough=True))
"""
    assert forks(tmp_path, program).split() == []


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
        statements("UPDATE alembic_version SET version_num = '451aebb31d03'"),
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
    assert counts(root, said.append) == (1, 1, 0, 0)
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
