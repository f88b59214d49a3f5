"""Threads: how they wait, how many there are, and turns where processes share the cores.

What it gains is measured by benchmarks/threads.py; nothing here depends on time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import QUIET, small_request

import glua_bench
from glua_bench.cli import runs as commands
from glua_bench.data import parallel
from glua_bench.data.parallel import Load, Turns, parallel_map
from glua_bench.files import hold
from glua_bench.runs import execution, executor, trainer
from glua_bench.runs.plan import plan
from glua_bench.runs.sealed import training
from glua_bench.sweeps.job import job_environment
from glua_bench.sweeps.launch import worker_environment

FREE = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")


def told(code: str, **more: str) -> str:
    """Run Python without the variables of OpenMP, and return what it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**FREE, **more}, capture_output=True, text=True, check=True)
    return done.stdout.strip() + done.stderr


# -- how they wait --------------------------------------------------------------------------------

SHOWN = "import os, sys; print(*(os.environ.get(n) for n in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')))"


def test_every_way_in_sets_the_policy_before_torch_is_loaded() -> None:
    """Commands, Python, workers, jobs and ranks all import the package first."""
    for entry in ("glua_bench", "glua_bench.cli", "glua_bench.data.parallel"):
        loaded = f"import {entry}, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
        assert told(f"{loaded}; {SHOWN}").split() == ["False", "False", "10000", "1"], entry
    # What OpenMP itself says, in a process that comes to torch through the package.
    seen = told("import glua_bench.data.resampling", OMP_DISPLAY_ENV="VERBOSE")
    if "GOMP_SPINCOUNT" in seen:  # not on macOS
        found = {line.split()[-1] for line in seen.splitlines() if "SPINCOUNT" in line}
        assert found == {"'10000'"}


def test_what_the_user_has_set_is_kept() -> None:
    code = f"import glua_bench; {SHOWN}"
    assert told(code, GOMP_SPINCOUNT="7").split() == ["7", "1"]
    assert told(code, OMP_WAIT_POLICY="ACTIVE").split() == ["None", "None"]
    assert told(f"import sys; sys.modules['torch'] = sys; {code}").split() == ["None", "None"]


# -- how many -------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/pod/one", {"pod/cpu.max": "200000 100000", "pod/one/cpu.max": "400000 100000"}, 2),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/", {"cpu.max": "6400000 100000"}, 8),
        ("0::/../..", {"cpu.max": "400000 100000"}, 4),
        (
            "3:cpu,cpuacct:/job\n0::/",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("not a group", {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_cores_are_those_of_affinity_and_quota(
    groups: str,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "own").write_text(groups + "\n")
    for name, content in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(content + "\n")
    assert glua_bench.cores(str(tmp_path / "tree"), str(tmp_path / "own")) == expected


def test_processes_of_one_command_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `--jobs`, workers of a sweep, jobs of a cluster, and the pool of preparation."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(executor, "cores", lambda: 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert executor.environment(0, 4)["OMP_NUM_THREADS"] == "3"
    assert worker_environment(0, 6)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert job_environment()["OMP_NUM_THREADS"] == "5"
    # A container's quota, which the package has told OpenMP, is shared; a user's number is kept.
    monkeypatch.setattr(executor, "OWN_THREADS", "12")
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    assert executor.environment(0, 4)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert executor.environment(0, 4)["OMP_NUM_THREADS"] == "8"
    assert dict(parallel_map(os.getenv, ["OMP_NUM_THREADS"] * 2, 2)) == {0: "1", 1: "1"}


@linux
def test_other_programs_on_the_cores_are_seen_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four cores are ours; others keep one and a half of them busy, and we a half."""
    now, used = [100.0], [0.0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3})
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "times", lambda: (used[0], 0.0, 0.0, 0.0, 0.0))
    stat, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")

    def write(seconds: float) -> None:
        lines = [f"cpu{core} {seconds * tick:.0f} 0 0 7 7 0 0 0 0 0" for core in (1, 3)]
        stat.write_text("\n".join(["cpu 1 2 3", "cpu0 999999 0 0 0 0 0 0 0", *lines, "intr 5"]))

    write(10.0)
    load = Load(stat)
    now[0], used[0] = 104.0, 2.0
    write(14.0)
    assert load.of_others() == pytest.approx(1.5)
    assert Load(tmp_path / "none").of_others() == 0

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(commands, "cores", lambda: 2)
    said = commands._crowded("cpu", 1.5)
    assert said == (
        "Other programs keep 1.5 of 2 cores busy: OMP_NUM_THREADS=1 may train faster, with other "
        "last bits."
    )
    assert commands._crowded("cpu", 0.4) == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert commands._crowded("cpu", 1.5) == ""


# -- turns ----------------------------------------------------------------------------------------


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    """Start functions in threads that end with the test."""
    running: list[threading.Thread] = []

    def begun(work: Callable[[], object]) -> threading.Thread:
        running.append(threading.Thread(target=work, daemon=True))
        running[-1].start()
        return running[-1]

    yield begun
    for thread in running:
        thread.join(60)
        assert not thread.is_alive()


Start = Callable[[Callable[[], object]], threading.Thread]


def test_processes_with_all_cores_alternate(
    tmp_path: Path, two_cores: None, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two take turns over the same cores: never both at once, and neither waits for the end."""
    monkeypatch.setattr(parallel, "TURN_SECONDS", 0.0)
    at_work, order, met = [0], [], threading.Barrier(2)

    def work(name: str) -> None:
        own = Turns(tmp_path)
        met.wait()
        with own.taken(2):
            for _ in range(20):
                own.pass_on()
                at_work[0] += 1
                assert at_work[0] == 1
                order.append(name)
                time.sleep(0.002)
                at_work[0] -= 1

    threads = [start(lambda name=name: work(name)) for name in "ab"]  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert sorted(order) == ["a"] * 20 + ["b"] * 20
    changes = sum(one != other for one, other in zip(order, order[1:], strict=False))
    assert changes >= 20, "".join(order)


def test_processes_with_a_thread_each_compute_side_by_side(tmp_path: Path, two_cores: None) -> None:
    with Turns(tmp_path).taken(1), ExitStack() as stack:
        other = Turns(tmp_path)
        stack.enter_context(other.taken(1))
        assert other._held is not None


@linux
@pytest.mark.parametrize(("threads", "files"), [(64, 8), (1, 1), (9, 2), (16, 2), (1000, 8)])
def test_a_turn_on_many_cores_locks_few_files(
    threads: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    with Turns(tmp_path).taken(threads):
        assert len(list(tmp_path.glob("core-*.lock"))) == files


def test_turns_nest_and_end_with_an_error(tmp_path: Path, two_cores: None) -> None:
    own, other = Turns(tmp_path), Turns(tmp_path)
    with pytest.raises(ZeroDivisionError), own.taken(2), own.taken(2):
        raise ZeroDivisionError
    with other.taken(2):
        assert other._held is not None
    with own.taken(None):
        assert own._held is None


@linux
def test_processes_find_the_turns_of_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a temporary directory of their own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(parallel.tempfile, "tempdir", None)
    monkeypatch.delenv(parallel.PLACE, raising=False)
    own = parallel.turns_folder()
    assert own == tmp_path / "mine" / f"glua-bench-{os.getuid()}"
    code = "from glua_bench.data.parallel import turns_folder; print(turns_folder())"
    kept = {parallel.PLACE: os.environ[parallel.PLACE]}
    assert told(code, TMPDIR=str(tmp_path), **kept) == str(own)


@linux
def test_a_lock_is_had_in_time_in_order_or_not_at_all(tmp_path: Path, start: Start) -> None:
    path, order = tmp_path / "one.lock", []
    first = hold(path, 0)
    assert first is not None and hold(path, 0) is None and hold(path, 0.05) is None

    def wait(name: str) -> None:
        release = hold(path, 60)
        assert release is not None
        order.append(name)
        release()

    for name in "abc":
        start(lambda name=name: wait(name))  # type: ignore[misc]
        time.sleep(0.05)
    first()
    until = time.monotonic() + 60
    while len(order) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert order == ["a", "b", "c"]
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "none" / "one.lock", 0)


@linux
@pytest.mark.fault("killed", "kill -9 a process in its turn on the processor")
def test_a_killed_process_ends_its_turn(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from glua_bench.data.parallel import Turns\n"
        "with Turns(Path(sys.argv[1])).taken(1000):\n    print('mine', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
    own = Turns(tmp_path)
    assert parallel._collected(tmp_path, 1, time.monotonic() + 0.1) is None
    holder.kill()
    holder.wait()
    with own.taken(1000):
        assert own._held is not None


@pytest.mark.fault("processes", "stop a process in its turn, so that it never ends")
def test_a_stopped_process_does_not_stop_the_others(
    tmp_path: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PATIENCE_SECONDS", 0.05)
    stopped, own = Turns(tmp_path), Turns(tmp_path)
    with stopped.taken(2):
        for _ in range(3):  # it waits once, not at each update
            with own.taken(2):
                assert own._held is None
        monkeypatch.setattr(parallel, "PATIENCE_SECONDS", 600.0)
        with own.taken(2):
            assert own._held is None


@linux
@pytest.mark.fault("two users", "another user owns the directory of turns, or may write to it")
@pytest.mark.parametrize("damage", ["writable", "link", "file", "foreign"])
def test_turns_need_a_directory_that_nobody_else_can_write(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(parallel.PLACE, raising=False)
    own = tmp_path / f"glua-bench-{os.getuid()}"
    if damage == "writable":
        own.mkdir()
        own.chmod(0o777)
    elif damage == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "elsewhere")
    elif damage == "file":
        own.write_text("")
    else:
        monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
        (tmp_path / f"glua-bench-{tmp_path.stat().st_uid + 1}").mkdir(mode=0o700)
    turns = Turns()
    with turns.taken(1):
        assert turns._held is None
    assert not list(tmp_path.rglob("*.lock")) and parallel.PLACE not in os.environ


def test_a_run_on_the_processor_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fabric:
        def __init__(self, device: str, world_size: int) -> None:
            self.device, self.world_size = torch.device(device), world_size

    found = [
        trainer.threads_of(Fabric(device, size))  # type: ignore[arg-type]
        for device, size in (("cpu", 1), ("cpu", 2), ("cuda", 1))
    ]
    assert found == [torch.get_num_threads(), None, None]


def test_a_run_waits_for_its_turn_and_ends_in_the_same_weights(
    phantom_root: Path, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and prediction wait while another process has the cores, and nothing else does."""

    class Asked(Turns):
        """Tell that a turn is asked for."""

        def taken(self, threads: int | None) -> AbstractContextManager[None]:
            asked.set()
            return super().taken(threads)

    weights = []
    (tmp_path / "turns").mkdir()
    for name in ("alone", "beside"):
        monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / name / "cache"))
        own, asked = Asked(tmp_path / "turns"), threading.Event()
        monkeypatch.setattr(trainer, "turns", own)
        monkeypatch.setattr(training, "turns", own)
        planned = plan(small_request(phantom_root, tmp_path / name))
        run = planned.directory
        with ExitStack() as stack:
            if name == "beside":
                stack.enter_context(Turns(tmp_path / "turns").taken(1000))
            # In this process, whose turns are those of the test.
            thread = start(partial(execution.execute, planned, QUIET, apart=False))
            if name == "beside":
                assert asked.wait(60)
                time.sleep(1.0)
                assert run.path.is_dir() and not any(run.checkpoints.glob("*.pt"))
        thread.join(60)
        assert run.done
        (last, *_) = sorted(run.checkpoints.glob("candidate_*.pt"))
        weights.append(torch.load(last, weights_only=True))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
