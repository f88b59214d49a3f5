"""Secrets reach no file, no output, no request and no command line, whatever is run."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow_server import Server
from small_commands import SMALL, Call, refused

from glua_bench.cli import api
from glua_bench.errors import ConfigError

# Where a URL ends is anybody's guess with these; every part of them is looked for.
PASSWORD = "zqxwvkA@zqxwvkB/zqxwvkC:zqxwvkD#zqxwvkE%zqxwvkF"
# Each part of a secret begins with these six letters; compressed files contain three by chance.
FOUND = re.compile(rb"(?i)zqxwvk|enF4d3Zr")  # also if base64 or a hash of the header were written
SWEEP = """\
method: source_only
dataset: phantom
objective: source_val
sampler: grid
set: {grid.size: 32, grid.spacing: 7, grid.slice_spacing: 16, batch_size: 2, candidates: 2,
      segmenter.width: 4, segmenter.depth: 3}
space: {lr: [0.01, 0.02]}
"""


@contextmanager
def command_lines() -> Iterator[list[bytes]]:
    """Collect the command lines of all other processes, as every user of the machine sees them."""
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            for process in Path("/proc").glob("[0-9]*"):
                if process.name != str(os.getpid()):
                    try:
                        seen.add((process / "cmdline").read_bytes())
                    except OSError:  # ended
                        continue

    thread = threading.Thread(target=look)
    thread.start()
    found: list[bytes] = []
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found += [line for line in seen if b"glua_bench" in line]


def assert_nowhere(*places: Path, output: str = "", requests: object = "") -> None:
    """Assert that no byte below the places, no name of a file, and no text has a secret."""
    files = [file for place in places for file in place.rglob("*")]
    assert len(files) > 5
    for file in files:
        assert not FOUND.search(os.fsencode(file)), file
        if file.is_file():
            held = FOUND.search(file.read_bytes())
            assert held is None, (file, file.read_bytes()[max(0, held.start() - 80) :][:200])
    assert not FOUND.search(output.encode()), output
    assert not FOUND.search(str(requests).encode())


@pytest.fixture
def small(phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Set every variable in which a secret may stand, and return the options of a small run."""
    tracker = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    for name in (*tracker, "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "zqxwvkVariable")
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    return ["--dataset=phantom", "--data-root", str(phantom_root), *SMALL]


# -- trackers -------------------------------------------------------------------------------------


@pytest.mark.fault("secrets", "run, compare, sync, report and doctor with a tracker's password")
def test_a_tracker_s_password_is_written_and_printed_nowhere(
    call: Call, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path / "artifacts")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://zqxwvkU:{PASSWORD}@{place}")
    said = ""

    def run(*words: object, code: int = 0) -> None:
        nonlocal said
        found, out, err = call(*words)
        assert found == code, out + err
        said += out + err

    run("run", "--method=source_only", "--json", *small)
    assert len(server.complete()) == 1 and server.authorized
    with command_lines() as lines:  # the second seed runs in a process of its own
        run("compare", "--methods=source_only", "--seeds=2", "--no-bounds", *small)
    assert any(b"run-request" in line for line in lines)
    run("report", "--no-pictures")
    run("doctor", "--json")
    server.refuses = dict.fromkeys(server.complete(), 413)
    server.runs.clear()
    run("sync", code=1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://zqxwvkU:{PASSWORD}@127.0.0.1:9")
    run("sync", code=1)
    run("doctor")
    run("report", "--from-mlflow", "--no-pictures", code=2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:9/b")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)
    run("sync", code=1)
    assert "connection refused" in said.lower()
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "glua_bench.records.tensorboard:TensorBoard")
    run("sync")
    server.shutdown()
    server.server_close()
    assert place in said and "127.0.0.1:9" in said
    assert_nowhere(tmp_path, output=said, requests=[server.said, lines])


# -- storages of sweeps ---------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a storage that works and has a secret."""
    if request.param == "sqlite":  # ignores parameters that it does not know
        yield f"sqlite:///file:{tmp_path}/own.db?uri=true&password={PASSWORD.replace('#', '')}"
        return
    sqlalchemy = pytest.importorskip("sqlalchemy")
    url = sqlalchemy.make_url(request.getfixturevalue("postgres"))
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"own_{os.getpid()}"
    with engine.connect() as connection:
        literal = PASSWORD.replace("%", "%%")
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD '{literal}'")
        connection.exec_driver_sql(f"GRANT ALL ON SCHEMA public TO {name}")
    yield f"postgresql://{name}:{PASSWORD}@{url.host}:{url.port}/{url.database}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}")
        connection.exec_driver_sql(f"DROP ROLE {name}")
    engine.dispose()


@pytest.mark.fault("secrets", "a sweep whose storage has a password")
def test_a_storage_s_password_is_written_and_printed_nowhere(
    call: Call, small: list[str], storage: str, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(SWEEP)
    options = [word for word in small if not word.startswith(("--set", "--preset", "--dataset"))]
    command = ["sweep", "own.yaml", "--storage", storage, *options]
    with command_lines() as lines:
        code, out, err = call(*command, "--trials=1")
    assert code == 0, out + err
    assert any(b"worker" in line for line in lines)
    said = out + err
    for words, expected in (
        ([*command, "--trials=1", "--json", "--fork", "--executor=debug"], 0),
        (["report", "--sweep=own", f"--storage={storage}"], 0),
        (["worker", "--study=own", "--storage", storage], 0),
        (["sweep", "own.yaml", *options, "--trials=1"], 2),  # names the storage that it needs
    ):
        code, out, err = call(*words)
        assert code == expected, out + err
        said += out + err
    assert "storage" in said
    assert_nowhere(tmp_path, output=said, requests=lines)


@pytest.mark.fault("secrets", "a sweep on SLURM whose storage has a password")
def test_jobs_of_a_cluster_hold_no_password(
    call: Call, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "sbatch": f'echo "$@" >>{tmp_path}/asked; echo Submitted batch job 7',
        "squeue": "echo 7",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    (tmp_path / "own.yaml").write_text(SWEEP)
    (tmp_path / "jobs.yaml").write_text("hours: 1\n")
    options = [word for word in small if not word.startswith(("--set", "--preset", "--dataset"))]
    storage = f"sqlite:///file:{tmp_path}/own.db?uri=true&token={PASSWORD.replace('#', '')}"
    slurm = ["--executor=slurm", "--slurm=jobs.yaml", "--detach"]
    code, out, err = call("sweep", "own.yaml", f"--storage={storage}", *slurm, *options)
    assert code == 0 and "submitted 7" in out, out + err
    jobs = tmp_path / "runs/sweeps/own/jobs"
    assert list(jobs.glob("*.pkl")) and list(jobs.glob("*.sh")), list(jobs.iterdir())
    assert_nowhere(tmp_path, output=out + err)


# -- what is refused or fails ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://zqxwvkA:{PASSWORD}@127.0.0.1:9/base",
        f"postgresql://zqxwvkA:12/{PASSWORD}@127.0.0.1:9/base",
        f"postgresql://127.0.0.1:9/base?user=me&password={quote(PASSWORD)}&sslpassword=zqxwvkG",
        f"postgresql:/me:{PASSWORD}@127.0.0.1/base",
        f"me:{PASSWORD}@127.0.0.1/base",
        f"nosuch://me:{PASSWORD}@127.0.0.1/base",
        f"sqlite:////nowhere/at/all.db?password={PASSWORD}",
    ],
)
@pytest.mark.fault("secrets", "a storage that cannot be opened")
def test_a_storage_that_cannot_be_opened_is_told_without_its_password(
    url: str, call: Call, small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(SWEEP)
    options = [word for word in small if not word.startswith(("--set", "--preset", "--dataset"))]
    result = call("sweep", "own.yaml", "--storage", url, *options)
    line = refused(result, "--storage")
    said = "".join(result[1:]).replace("postgresql://zqxwvkA:", "")
    assert not FOUND.search(said.encode()), said
    assert not FOUND.search(b"".join(os.fsencode(file) for file in tmp_path.rglob("*"))), line


@pytest.mark.fault("secrets", "a password in a setting, which every record would show")
def test_a_setting_with_a_password_is_refused(call: Call, small: list[str], tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from glua_bench.methods.source_only import SourceOnly\n"
        "class Own(SourceOnly):\n"
        "    name = 'own'\n"
        "    reference = 'none'\n"
        "    needs = 'nothing'\n"
        "    @dataclass(frozen=True)\n"
        "    class Config(SourceOnly.Config):\n"
        "        weights: str = ''\n"
    )
    setting = f"--set=method.weights=https://me:{PASSWORD}@host/w.pt"
    result = call("run", "--method=own", "--plugin", plugin, setting, *small)
    line = refused(result, "method.weights contains a password", "environment variable")
    assert not FOUND.search(line.encode()) and not (tmp_path / "runs").exists()


@pytest.mark.fault("secrets", "warnings, log lines and tracebacks of libraries that quote a URL")
@pytest.mark.parametrize("debug", ["", "1"])
def test_what_libraries_print_is_masked(
    debug: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://me:{PASSWORD}@host/base"

    def examine(*_: object) -> Any:
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": f"retrying '{url}'"}))
        # As `warnings` prints it, where pytest does not collect it.
        sys.stderr.write(warnings.formatwarning(f"{url} is slow", UserWarning, "x.py", 1))
        sys.stderr.writelines([f"see {url}\n"])
        print(f"connecting to {url}")
        raise ConnectionError(f"no answer from {url}") from ValueError(f"'{url}'")

    monkeypatch.setattr("glua_bench.cli.doctor.examine", examine)
    monkeypatch.setenv("GLUA_BENCH_DEBUG", debug)
    code, out, err = call("doctor")
    assert code == 1 and not FOUND.search((out + err).encode()), out + err
    assert out == "connecting to postgresql://me:…@host/base\n"
    assert err.count("postgresql://me:…@host/base") == (5 if debug else 4)
    assert ("Traceback" in err) == bool(debug)


def test_notebooks_see_no_password() -> None:
    error = ConfigError(f"postgresql://me:{PASSWORD}@host/base is away.")
    assert not FOUND.search(repr(error).encode())
    with pytest.warns(UserWarning, match="me:…@host"):
        api._warn(f"postgresql://me:{PASSWORD}@host/base is slow")
