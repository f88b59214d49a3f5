"""parallel.py: results as they come, and no process left behind, however it ends."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glua_bench.console import Progress
from glua_bench.data.parallel import cores, map_cases, parallel_map
from glua_bench.errors import RunFailure

# Work that other processes can find; a test's own functions they cannot.
PROGRAM = """
import sys
from subprocess import getoutput
from glua_bench.errors import RunFailure
from glua_bench.data.parallel import parallel_map
if __name__ == "__main__":
    try:
        for place, _ in parallel_map(getoutput, sys.argv[1:], jobs=2):
            print(place, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except RunFailure as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_every_item_has_its_result(jobs):
    found = dict(parallel_map(math.factorial, [4, 0, 3], jobs))
    assert found == {0: 24, 1: 1, 2: 6}
    assert list(parallel_map(math.factorial, [], jobs)) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_results_of_cases_keep_their_order_and_are_counted(jobs):
    shown = io.StringIO()
    with Progress(stream=shown) as progress:
        assert map_cases(math.factorial, [4, 0, 3], jobs, progress, "work") == [24, 1, 6]
    assert "work" in shown.getvalue() and "3" in shown.getvalue()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_reaches_the_caller(jobs):
    with pytest.raises(ValueError, match="factorial"):
        list(parallel_map(math.factorial, [3, -1], jobs))


def test_what_has_not_begun_is_left_alone_after_an_error(tmp_path):
    others = [["sh", "-c", f"sleep 0.1; touch {tmp_path / str(i)}"] for i in range(40)]
    with pytest.raises(subprocess.CalledProcessError):
        list(parallel_map(subprocess.check_output, [["false"], *others], 2))
    assert len(list(tmp_path.iterdir())) < 40


def test_one_item_stays_in_this_process():
    assert list(parallel_map(lambda item: os.getpid(), [None], 8)) == [(0, os.getpid())]
    assert cores() >= 1


@pytest.mark.fault("killed", "a worker process of a parallel loop")
def test_a_killed_process_is_a_sentence():
    with pytest.raises(RunFailure, match=r"killed.*--jobs.*\.$"):
        list(parallel_map(os._exit, [1, 1], 2))


@pytest.fixture
def started(tmp_path):
    """Starts the program in a session of its own, with commands that say who runs them."""
    running = []

    def start(*commands: str) -> subprocess.Popen:
        script = tmp_path / "program.py"
        script.write_text(PROGRAM)
        process = subprocess.Popen(
            [sys.executable, script, *commands],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended may wait for its parent's attention)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def told(file: Path) -> int:
    """The process that wrote its number into a file."""
    until(lambda: file.exists() and file.read_text().strip())
    return int(file.read_text())


@linux
def test_ctrl_c_ends_all_at_once_and_quietly(tmp_path, started):
    """The idle and those whose work would never end; a terminal signals the whole group."""
    ids = tmp_path / "a", tmp_path / "b"
    process = started(*(f"echo $PPID > {file}; {work}" for file, work in zip(
        ids, ("exec sleep 1000", "sleep 0.5"), strict=True
    )))  # fmt: skip
    workers = [told(file) for file in ids]
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    assert len({process.pid, *workers}) == 3
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("interrupted\n", "")
    until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.fault("killed", "the parent of processes that prepare volumes")
@linux
def test_workers_end_with_the_process_that_began_them(tmp_path, started):
    ids = tmp_path / "a", tmp_path / "b"
    process = started(*(f"echo $PPID > {file}; exec sleep 5" for file in ids))
    workers = [told(file) for file in ids]
    assert all(alive(pid) for pid in workers)
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in workers))


@linux
def test_what_is_ready_is_given_before_the_rest(tmp_path, started):
    gate = tmp_path / "gate"
    process = started(f"until [ -e {gate} ]; do sleep 0.05; done", "true", "true")
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
    gate.write_text("")
    assert process.communicate(timeout=60)[0] == "0\n"
