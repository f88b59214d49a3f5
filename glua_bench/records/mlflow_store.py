"""The default MLflow store, a SQLite file: create it whole, and replace a broken one.

MLflow creates its tables in some forty migrations, each written at once. An interruption leaves a
file that MLflow neither completes nor accepts. Here a store is created under another name and moved
into place. Nothing in it is lost with it, since the run directories hold everything.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

from glua_bench.errors import RunFailure, first_line, reason
from glua_bench.files import exclusive, put_aside, replacing
from glua_bench.paths import ARTIFACTS

PREFIX = "sqlite:///"
TABLES = {"alembic_version", "experiments", "metrics", "params", "runs", "tags"}
BESIDE = ("-journal", "-wal", "-shm")  # files of an interrupted transaction
EMPTY, INTERRUPTED = "it is empty", "its creation was interrupted"
OUTDATED = "its tables are those of an earlier version of MLflow"
LOCK_SECONDS = 2.0  # waiting for another user of the file, who does not break it


def store_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for other trackers."""
    return Path(uri.removeprefix(PREFIX).partition("?")[0]) if uri.startswith(PREFIX) else None


def fault(path: Path, thorough: bool = False) -> str:
    """Return why a file cannot be an MLflow store; "" if it can, or does not exist.

    Args:
        path: the file.
        thorough: also read all pages, and compare the tables with those of the installed MLflow.
    """
    if path.is_dir():
        return "it is a directory"
    if not path.exists():
        return ""
    try:
        if path.stat().st_size == 0:
            return EMPTY
        with _connected(path) as connection:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if missing := TABLES - {name for (name,) in rows}:
                return f"it lacks the table {min(missing)}"
            versions = [row[0] for row in connection.execute("SELECT * FROM alembic_version")]
            connection.execute("SELECT count(*) FROM experiments").fetchone()
            if len(versions) != 1:
                return INTERRUPTED
            if not thorough:
                return ""
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                return str(said)
        return _outdated(versions[0])
    except sqlite3.OperationalError as error:
        # Locked, without permission, on a full disk: the file may be good.
        return reason(error) if "unsupported file format" in str(error) else ""
    except sqlite3.DatabaseError as error:
        return reason(error)
    except OSError:  # likewise
        return ""


def prepare(path: Path, own: bool, thorough: bool = False) -> str:
    """Create a missing store; upgrade or replace one that MLflow would refuse.

    A broken file is renamed.

    Args:
        path: the file.
        own: whether the file is the default store; others are created, but not replaced.
        thorough: as in `fault`.

    Returns:
        One sentence if a store was replaced, else "".

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    if path.exists() and not (own and fault(path, thorough)):
        return ""
    with exclusive(path.with_name(f".{path.name}.lock"), option="--runs"):
        why, kept = fault(path, thorough), None  # another process may have created it
        if path.exists() and not why or why == OUTDATED and _upgraded(path):
            return ""
        with _unfinished_store(path) as temporary:
            _create(temporary, path.parent)
            if why and why != EMPTY:
                kept = put_aside(path, "--runs")
            for beside in BESIDE:  # would be applied to the new file
                if (rest := path.with_name(path.name + beside)).exists():
                    put_aside(rest, "--runs")
        _forget(path)
    if kept is None:
        return ""
    why = INTERRUPTED if why == OUTDATED else why
    return (
        f"The MLflow store {path} was broken ({why}) and has been replaced; it is kept as "
        f"{kept.name}, and `glua-bench sync` uploads all runs again."
    )


def _outdated(version: str) -> str:
    """Return `OUTDATED` if a revision of the tables is known, but not the newest."""
    from mlflow.store import db_migrations
    from mlflow.store.db import utils

    # Unknown revisions are those of a later version of MLflow.
    migrations = Path(db_migrations.__file__).parent / "versions"
    known = version in {file.name.partition("_")[0] for file in migrations.iterdir()}
    return OUTDATED if known and version != utils._get_latest_schema_revision() else ""


def _upgraded(path: Path) -> bool:
    """Upgrade a store of an earlier version of MLflow in a copy; return False if this fails.

    It fails for a store whose creation was interrupted.

    Raises:
        RunFailure: the disk is full, or another program has locked the store.
    """
    from mlflow.store.db import utils

    try:
        with _unfinished_store(path) as temporary:
            with _connected(path) as old, contextlib.closing(sqlite3.connect(temporary)) as new:
                old.backup(new)
            engine = utils.create_sqlalchemy_engine(f"{PREFIX}{temporary.as_posix()}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # alembic's, on MLflow's own tables
                utils._upgrade_db(engine)
            engine.dispose()
    except (KeyboardInterrupt, RunFailure):
        raise
    except Exception as error:  # alembic's, SQLAlchemy's
        if re.search(r"disk|locked|readonly|unable to open", str(error)):
            raise RunFailure(
                f"The MLflow store {path} cannot be upgraded ({first_line(error)}); free some "
                "space or close other programs that use it, then repeat the command."
            ) from error
        return False
    _forget(path)
    return True


@contextlib.contextmanager
def _unfinished_store(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes `path`, and leave no journal of it."""
    with replacing(path, "--runs") as temporary:
        try:
            yield temporary
        finally:
            for beside in BESIDE:
                temporary.with_name(temporary.name + beside).unlink(missing_ok=True)


def _create(path: Path, runs_root: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import Engine, event

    uri = f"{PREFIX}{path.as_posix()}"
    event.listen(Engine, "connect", _without_waiting)
    try:
        SqlAlchemyStore(uri, (runs_root / ARTIFACTS).resolve().as_uri()).engine.dispose()
    finally:
        event.remove(Engine, "connect", _without_waiting)


def _forget(path: Path) -> None:
    """Close the connections that MLflow keeps to the file that was replaced."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if (engine := SqlAlchemyStore._engine_map.get(f"{PREFIX}{path.as_posix()}")) is not None:
        engine.dispose()


def _without_waiting(connection: sqlite3.Connection, record: object) -> None:
    """Do not wait for the disk after each migration, but once at the end, in `replacing`."""
    connection.execute("PRAGMA synchronous = OFF")


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    # Not read-only, which could not undo an interrupted transaction.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, timeout=LOCK_SECONDS, uri=True)) as connection:
        yield connection
