"""Runs of a sweep in two processes: same results, stopping and resuming as with one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sweep_samples import define

from glua_bench.console import Progress
from glua_bench.errors import ConfigError, RunFailure
from glua_bench.files import try_lock
from glua_bench.runs import interruption
from glua_bench.runs import plan as runs
from glua_bench.runs.executor import child_command
from glua_bench.runs.interruption import Interrupted
from glua_bench.runs.plan import LOST_CODE
from glua_bench.runs.request import RunOptions, RunRequest
from glua_bench.sweeps import command
from glua_bench.sweeps.launch import worker_environment
from glua_bench.sweeps.trial import execute, execute_apart

SUPPORT = Path(__file__).resolve().parents[1] / "support"
PLUGINS = [
    SUPPORT / "slow_method.py",
    SUPPORT / "sample_plugin" / "src" / "glua_bench_sample" / "discs.py",
]
QUIET = Progress(enabled=False)
SETTINGS = ("batch_size=2", "candidates=2", "segmenter.width=4", "segmenter.depth=3")
TASK = {"method": "slow", "dataset": "discs", "directions": ("bright-dark",)}
DEFINITION = define(**TASK, settings=SETTINGS, trials=1)


@pytest.fixture
def base(tmp_path: Path) -> RunOptions:
    return RunOptions(
        steps=30,
        plugins=PLUGINS,
        data_root=tmp_path / "discs",
        runs_root=tmp_path / "runs",
        device="cpu",
        devices=2,
        augmentation="none",  # each process draws its own
        mlflow=False,
    )


@pytest.fixture
def began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of the steps that began, where a process that trains may write."""
    file = tmp_path / "cache" / "stages" / "steps.txt"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLUA_BENCH_TEST_STEPS", str(file))
    return file


def plan(base: RunOptions, pause: float = 0.0) -> runs.PlannedRun:
    own = [*DEFINITION.settings, f"method.pause={pause}"]
    task = {"method": "slow", "dataset": "discs", "direction": "bright-dark"}
    return runs.plan(base.request(**task, preset="quick", assignments=own))


def finish(planned: runs.PlannedRun) -> None:
    """Mark a run as finished."""
    planned.directory.start({})
    planned.directory.finish({})


def no_look(step: int, value: float) -> bool:
    return False


def test_a_trial_in_two_processes_is_that_in_one(base: RunOptions, tmp_path: Path) -> None:
    found = {}
    for devices in (1, 2):
        own = replace(base, devices=devices, runs_root=tmp_path / str(devices))
        outcome = execute(DEFINITION, own, {"lr": 0.2}, QUIET, no_look)
        (run,) = (tmp_path / str(devices)).glob("discs/slow/*")
        found[devices] = outcome, pd.read_parquet(run / "cases.parquet")
    (one, cases), (two, same_cases) = found[1], found[2]
    assert two.values == pytest.approx(one.values, rel=1e-4)
    assert list(same_cases["case"]) == list(cases["case"])  # none twice
    assert list(same_cases["dice"]) == pytest.approx(list(cases["dice"]), abs=1e-3)


def test_a_run_in_two_processes_ends_politely_and_goes_on(base: RunOptions, began: Path) -> None:
    planned = plan(base, pause=0.1)

    def ask() -> None:
        while not began.is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with interruption.listening(), pytest.raises(Interrupted):
        execute_apart(planned, QUIET)
    assert not planned.directory.done and planned.directory.failed is None
    with try_lock(planned.directory.path / ".lock") as free:
        assert free  # nobody is left at it
    saved = torch.load(planned.directory.checkpoints / "last.pt", weights_only=True)
    assert saved["step"] in (10, 20)
    execute_apart(planned, QUIET)
    assert planned.directory.done
    assert [int(step) for step in began.read_text().split()] == list(range(30))


def ports(process: int) -> dict[str, str]:
    """Return the addresses, by kernel's notation, on which a process listens."""
    own = {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir() if file.is_symlink()}
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                address, _, port = words[1].partition(":")
                found[port] = address
    return found


def below(process: int) -> list[int]:
    """Return the descendants of a process, parents first; threads start some of them."""
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *below(child)]
    return found


def is_rank(process: int) -> bool:
    """Return True for the further process of a run in two."""
    return b"rank" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")


LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


@pytest.mark.fault("processes", "another machine asks for the store of a run in two processes")
@pytest.mark.fault("killed", "one of the two processes of a run")
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs /proc")
def test_two_processes_meet_on_loopback_and_one_that_is_killed_is_told(
    base: RunOptions, began: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(base, pause=0.2)
    monkeypatch.setenv("MASTER_ADDR", "0.0.0.0")  # of a job script
    with subprocess.Popen(child_command(planned), stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 300
            while not began.is_file():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.1)
            # Below the command: the server that it forked, the first process, and the other one.
            started = below(process.pid)
            (other,) = filter(is_rank, started)
            listening = {k: v for each in [process.pid, *started] for k, v in ports(each).items()}
            os.kill(other, signal.SIGKILL)
            said = process.communicate()[1]
        finally:
            process.kill()
    assert listening and set(listening.values()) <= {*LOOPBACK}
    assert process.returncode == LOST_CODE > 128  # as killed, so that its executor resumes it
    assert "glua-bench: error: process 2 of 2 of this run: killed (SIGKILL), most likely" in said
    assert said.count("error:") == 1 and said.endswith("; the same command resumes the run.\n")
    assert "Traceback" not in said
    assert planned.directory.failed is None


class Started:
    """Starts processes with given exit codes, and records their commands."""

    def __init__(self, *codes: int, then: Callable[[], Any] = lambda: None) -> None:
        self.codes, self.then = list(codes), then
        self.commands: list[Any] = []

    def __call__(self, words: list[str], **options: Any) -> subprocess.Popen:
        self.commands.append((words, options))
        code = self.codes.pop(0)
        if not self.codes:
            self.then()
        act = "import os, signal, sys; print('glua-bench: error: too bad', file=sys.stderr); {}"
        end = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
        return subprocess.Popen([words[0], "-c", act.format(end)], **options)


@pytest.mark.fault("killed", "the processes of a run in two processes, twice")
def test_killed_processes_are_tried_again(base: RunOptions) -> None:
    planned = plan(base)
    started = Started(-9, -9)
    with pytest.raises(RunFailure, match="were killed 2 times"):
        execute_apart(planned, QUIET, started)
    words, options = started.commands[0]
    assert words[2] == "run-request"
    assert RunRequest.from_json(Path(words[3]).read_text(), words[3]) == planned.request
    assert options["env"]["OMP_NUM_THREADS"] == "1"
    execute_apart(planned, QUIET, Started(-9, 0, then=lambda: finish(planned)))


def test_what_a_run_says_at_its_end_is_the_reason(base: RunOptions) -> None:
    with pytest.raises(RunFailure, match="^too bad$"):
        execute_apart(plan(base), QUIET, Started(1))


def test_what_a_killed_worker_left_running_is_awaited(base: RunOptions) -> None:
    planned = plan(base)
    held = threading.Event()

    def left() -> None:
        with planned.directory.lock():
            held.set()
            time.sleep(1)
            finish(planned)

    other = threading.Thread(target=left)
    other.start()
    held.wait()
    execute_apart(planned, QUIET, Started())
    other.join()


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruning_within_a_run_needs_one_process(pruner: str, base: RunOptions) -> None:
    own = replace(DEFINITION, pruner=pruner)
    with pytest.raises(ConfigError, match=f"--devices 2: {pruner} reads the check"):
        command.open_study(own, base, None, 1, False, False, print)
    assert not base.runs_root.exists()


def test_workers_with_two_gpus_each_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [worker_environment(i, 2, 2)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    assert [worker_environment(i, 2)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0", "1"]


def test_runs_in_a_job_of_slurm_start_their_own_processes(
    base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fabric must not mistake the job's single task for a process of the run started by srun."""
    for name, value in {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "sweep",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    planned = plan(base)
    execute_apart(planned, QUIET)
    assert planned.directory.done
