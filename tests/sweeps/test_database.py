"""Sweeps on PostgreSQL: the budget holds, dead workers are found, a server may be away.

Worker processes are forked from this file, run as a script, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from glua_bench.errors import ConfigError
from glua_bench.sweeps import study as studies
from glua_bench.sweeps.definition import Definition, Parameter
from glua_bench.sweeps.study import ATTEMPTS, Claim, SweepStudy, counting, open_storage
from glua_bench.sweeps.trial import Outcome
from glua_bench.sweeps.worker import work

POLL = 0.05
BEAT, GRACE = 1, 3  # seconds, in place of those for real machines


def define(name: str, trials: int) -> Definition:
    space = (Parameter("weight", low=0.0, high=1.0), Parameter("mask", choices=("topk", "soft")))
    return Definition(
        Path("own.yaml"), name, "", "glua", "phantom", ("mr-ct",), 1, "quick", (), space, ("im",),
        "random", "none", trials, 0,
    )  # fmt: skip


def opened(
    url: str, root: Path, name: str, trials: int, report: Callable[[str], None] = print
) -> SweepStudy:
    return SweepStudy(define(name, trials), root, url, report=report)


def quick(claim: Claim, see: Any, seconds: float = 0.02) -> Outcome:
    time.sleep(seconds)
    return Outcome((float(claim.params["weight"]),), {"process": os.getpid()})


def forked(act: Callable[[], None]) -> int:
    """Run in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended_well(*children: int) -> None:
    for child in children:
        assert os.waitpid(child, 0)[1] == 0, "a worker failed; its reason stands above"


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(POLL)


def killed_at_a_trial(study: SweepStudy) -> float:
    """A worker claims a trial and is killed at it; the weight that it drew."""
    marker = study.folder / "claimed"
    marker.unlink(missing_ok=True)
    study.storage.engine.dispose()  # type: ignore[attr-defined] # a fork must not share them

    def hang() -> None:
        claim = study.claim()
        assert claim is not None
        part = marker.with_suffix(".part")
        part.write_text(str(claim.params["weight"]))
        part.rename(marker)
        time.sleep(600)

    child = forked(hang)
    until(marker.exists)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return float(marker.read_text())


# -- what the script does -------------------------------------------------------------------------


def share(url: str, root: Path) -> None:
    def act() -> None:
        work(opened(url, root, "share", 30), quick, poll=POLL)

    ended_well(*[forked(act) for _ in range(4)])


def kill(url: str, root: Path) -> None:
    """The first two workers at a trial are killed; then again and again those at another."""
    study = opened(url, root, "kill", 2)
    weights = {killed_at_a_trial(study) for _ in range(ATTEMPTS - 1)}
    assert len(weights) == 1  # taken up again, on the same host at once
    claim = study.claim()
    assert claim is not None and claim.attempt == ATTEMPTS
    assert {claim.params["weight"]} == weights
    with study.holding(claim):
        study.finish(claim, (0.5,), {})
    again = [killed_at_a_trial(study) for _ in range(ATTEMPTS)]
    assert len(set(again)) == 1 and set(again) != weights
    assert study.claim() is None  # neither a further attempt nor a trial beyond the budget


def elsewhere(url: str, root: Path) -> None:
    """The dead worker was on another host, where no lock of this one's kernel tells of it."""
    studies.HEARTBEAT_SECONDS, studies.GRACE_SECONDS = BEAT, GRACE
    here, socket.gethostname = socket.gethostname, lambda: "another"  # type: ignore[assignment]
    far = opened(
        url, root, "elsewhere", 2
    )  # opening takes longer than the grace period on a busy machine
    socket.gethostname = here
    study = opened(url, root, "elsewhere", 2)
    weight = killed_at_a_trial(far)
    other = study.claim()
    assert other is not None and other.params["weight"] != weight  # it may still live
    assert study.claim() is None
    claim = None
    began = time.monotonic()
    while claim is None:
        assert time.monotonic() < began + 60
        time.sleep(POLL)
        claim = study.claim()
    assert claim.params["weight"] == weight and claim.attempt == 2
    for one in (claim, other):
        with study.holding(one):
            study.finish(one, (0.5,), {})


def lives(url: str, root: Path) -> None:
    """A worker on another host that takes longer than the grace period is left alone."""
    studies.HEARTBEAT_SECONDS, studies.GRACE_SECONDS = BEAT, GRACE
    here, socket.gethostname = socket.gethostname, lambda: "another"  # type: ignore[assignment]
    far = opened(url, root, "lives", 1)
    socket.gethostname = here
    claim = far.claim()
    assert claim is not None
    near = opened(url, root, "lives", 1)
    with far.holding(claim):
        end = time.monotonic() + 2 * GRACE
        while time.monotonic() < end:
            assert near.claim() is None
            time.sleep(0.5)
        far.finish(claim, (0.5,), {})


SCENARIOS = {act.__name__: act for act in (share, kill, elsewhere, lives)}


def main() -> None:
    """Act all scenarios at once; each writes what went wrong."""
    url, root = sys.argv[1], Path(sys.argv[2])

    def act(name: str) -> None:
        try:
            SCENARIOS[name](url, root)
        except BaseException:
            (root / f"{name}.txt").write_text(traceback.format_exc())
            raise

    for child in [forked(partial(act, name)) for name in SCENARIOS]:
        os.waitpid(child, 0)


@pytest.fixture(scope="module")
def played(
    postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[FrozenTrial]]:
    """Plays the scenarios; name → the trials that count in the end."""
    root = tmp_path_factory.mktemp("runs")
    # The tables are there, so that the scenarios begin alike.
    opened(postgres, root, "empty", 1)
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), postgres, str(root)],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )

    def trials(name: str) -> list[FrozenTrial]:
        fault = root / f"{name}.txt"
        assert not fault.is_file(), fault.read_text() + done.stdout
        return counting(opened(postgres, root, name, 1).trials())

    return trials


# -- several workers ------------------------------------------------------------------------------


@pytest.mark.cluster
def test_workers_share_the_budget(played: Callable[[str], list[FrozenTrial]]) -> None:
    trials = played("share")
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 30
    assert len({t.params["weight"] for t in trials}) == 30
    assert len({t.user_attrs["process"] for t in trials}) > 1


@pytest.mark.fault("killed", "workers on a database")
@pytest.mark.cluster
def test_the_trial_of_a_killed_worker_is_taken_up_and_counted_once(
    played: Callable[[str], list[FrozenTrial]],
) -> None:
    trials = played("kill")
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert trials[1].user_attrs["reason"].startswith(f"its workers were killed {ATTEMPTS} times")


@pytest.mark.cluster
@pytest.mark.parametrize(("name", "count"), [("elsewhere", 2), ("lives", 1)])
def test_heartbeats_tell_of_workers_on_other_hosts(
    name: str, count: int, played: Callable[[str], list[FrozenTrial]]
) -> None:
    assert [t.state for t in played(name)] == [TrialState.COMPLETE] * count


@pytest.mark.fault("killed", "a worker that asks the database for a trial")
@pytest.mark.cluster
def test_a_worker_that_dies_while_it_asks_loses_nothing(postgres: str, tmp_path: Path) -> None:
    """Between two statements of `claim`: without parameters, and without a sign of life."""
    study = opened(postgres, tmp_path, "asks", 2)
    study.study.ask()  # killed before it drew anything
    study.study.enqueue_trial({"weight": 0.25}, user_attrs={"attempt": 2, "retry_of": 99})
    study.study.ask()  # killed before it took what was offered
    drawn = []

    def note(claim: Claim, see: Any) -> Outcome:
        drawn.append((claim.params["weight"], claim.attempt))
        return quick(claim, see)

    work(study, note, poll=POLL)
    assert [t.state for t in counting(study.trials())] == [TrialState.COMPLETE] * 2
    assert drawn[0] == (0.25, 3) and drawn[1][1] == 1


@pytest.mark.fault("killed", "a worker that asks the database for a trial")
@pytest.mark.cluster
def test_a_worker_elsewhere_that_dies_right_after_it_asked_is_found(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "GRACE_SECONDS", 1)
    near = opened(postgres, tmp_path, "mute", 1)
    far = opened(postgres, tmp_path, "mute", 1)
    monkeypatch.setattr(far, "_host", "another")
    monkeypatch.setattr(far, "_beat", lambda claim: None)
    lost = far.claim()
    assert lost is not None and near.claim() is None
    found = []
    until(lambda: bool(found.append(near.claim()) or found[-1]), seconds=30)
    assert found[-1].params == lost.params and found[-1].attempt == 2
    with near.holding(found[-1]):
        near.finish(found[-1], (0.5,), {})


@pytest.mark.fault("two users", "workers that create the tables of a database at once")
@pytest.mark.cluster
def test_workers_that_open_an_empty_database_at_once_make_its_tables_once(
    postgres: str, tmp_path: Path
) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    url = sqlalchemy.make_url(postgres)
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE at_once_" + url.database))
    own = url.set(database="at_once_" + url.database).render_as_string(hide_password=False)
    with ThreadPoolExecutor(4) as pool:
        studies = list(pool.map(lambda _: opened(own, tmp_path, "once", 1), range(4)))
    assert len({one.study._study_id for one in studies}) == 1
    for one in studies:
        one.storage.engine.dispose()  # type: ignore[attr-defined]
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"DROP DATABASE at_once_{url.database}"))
    engine.dispose()


# -- a server that is away ------------------------------------------------------------------------


class Way:
    """A way to a server that can be closed: connections break, and new ones are refused.

    Args:
        port: of the server on this machine.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._connections: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        assert self._listener is not None
        for one in (self._listener, *self._connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._connections += [client, server]
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@pytest.mark.fault("tracker", "the database of a sweep is down for a while")
@pytest.mark.cluster
def test_a_server_that_is_away_delays_and_loses_nothing(postgres: str, tmp_path: Path) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    url = sqlalchemy.make_url(postgres)
    way = Way(url.port)
    said: list[str] = []
    closed_url = url.set(port=way.port).render_as_string(hide_password=False)
    study = opened(closed_url, tmp_path, "away", 12, said.append)

    def run(claim: Claim, see: Any) -> Outcome:
        if claim.number in (3, 7):  # before the value is told, and for longer than a trial takes
            way.close()
            threading.Timer(1.5, way.open).start()
        see(1, 0.5)
        return quick(claim, see)

    done = work(study, run, poll=POLL)
    way.close()
    assert done.finished == 12
    trials = counting(opened(postgres, tmp_path, "away", 12).trials())
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12
    assert sum("does not respond" in line for line in said) == 2
    assert said[-1] == "the storage responds again"


@pytest.mark.fault("tracker", "the database of a sweep is down for a while")
@pytest.mark.cluster
def test_a_worker_that_starts_while_the_server_is_away_waits(postgres: str, tmp_path: Path) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    url = sqlalchemy.make_url(postgres)
    way = Way(url.port)
    closed_url = url.set(port=way.port).render_as_string(hide_password=False)
    begun = opened(closed_url, tmp_path, "later", 2)
    way.close()
    threading.Timer(1.5, way.open).start()
    said: list[str] = []
    study = SweepStudy(
        begun.definition, tmp_path, closed_url, "later", report=said.append, begun=True
    )
    assert work(study, quick, poll=POLL).finished == 2
    way.close()
    assert "does not respond" in said[0] and said[1] == "the storage responds again"


# -- what is said of a storage that cannot be used ------------------------------------------------


@pytest.mark.fault("secrets", "a database refuses the password")
@pytest.mark.cluster
def test_a_wrong_password_is_said_without_any(postgres: str) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    url = sqlalchemy.make_url(postgres)
    for changes in ({"password": "opensesame"}, {"database": "nowhere"}, {"port": 1}):
        wrong = url.set(**changes).render_as_string(hide_password=False)
        with pytest.raises(ConfigError) as caught:
            open_storage(wrong)
        text = str(caught.value)
        assert text.startswith("--storage postgresql+psycopg://") and text.endswith(".")
        assert "check the server" in text and "\n" not in text
        assert "opensesame" not in text and url.password not in text


@pytest.mark.cluster
def test_a_url_without_a_driver_takes_ours(postgres: str, tmp_path: Path) -> None:
    plain = postgres.replace("+psycopg", "", 1)
    work(opened(plain, tmp_path, "plain", 2), quick, poll=POLL)
    assert len(opened(postgres, tmp_path, "plain", 2).trials()) == 2


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"needs a driver.*glua-bench\[cluster\].*\.$"):
        open_storage("postgresql://somebody:opensesame@127.0.0.1:1/nowhere")


# -- optuna-dashboard -----------------------------------------------------------------------------


@contextmanager
def dashboard(storage: str) -> Iterator[Callable[[str], Any]]:
    """What optuna-dashboard answers to a path."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    process = subprocess.Popen(
        [*command, storage, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def up() -> bool:
        assert process.poll() is None, process.communicate()[1]
        try:
            return bool(get("/dashboard/"))
        except OSError:
            return False

    try:
        until(up)
        yield get
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["journal", pytest.param("postgres", marks=pytest.mark.cluster)])
def test_optuna_dashboard_shows_a_sweep(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("optuna_dashboard")
    url = request.getfixturevalue("postgres") if kind == "postgres" else None
    study = SweepStudy(define("seen", 3), tmp_path, url)
    study.remember({"code": "c1"})
    work(study, quick, poll=POLL)
    with dashboard(study.url) as get:
        assert "<html" in get("/dashboard/").lower()
        shown = json.loads(get("/api/studies"))["study_summaries"]
        number = next(one["study_id"] for one in shown if one["study_name"] == "seen")
        found = json.loads(get(f"/api/studies/{number}?after=0"))
    assert [t["state"] for t in found["trials"]] == ["Complete"] * 3
    assert found["objective_names"] == list(study.definition.objectives)
    assert found["directions"] == ["maximize"]


if __name__ == "__main__":
    main()
