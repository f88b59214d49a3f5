"""sweeps/slurm.py and job.py: workers as jobs, stopped by SLURM and resumed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from sweep_samples import define

from glua_bench.errors import ConfigError, RunFailure
from glua_bench.sweeps import job
from glua_bench.sweeps import slurm as clusters
from glua_bench.sweeps.job import WorkerJob, exit_file, job_environment, wait_for_end
from glua_bench.sweeps.slurm import Jobs, Resources, read
from glua_bench.sweeps.study import SweepStudy, counting

SUPPORT = Path(__file__).resolve().parents[1] / "support"
STEPS = 30
DEFINITION = """\
name: own
method: slow
dataset: discs
preset: quick
set: {{pause: {pause}, batch_size: 2, candidates: 2, segmenter.width: 4, segmenter.depth: 3}}
space: {{lr: {{low: 0.01, high: 0.5}}}}
sampler: random
objective: im
trials: {trials}
"""


# -- what a job asks for --------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "jobs.yaml"
        path.write_text(text)
        return path

    return write


def test_a_file_says_what_jobs_ask_for(file: Callable[[str], Path]) -> None:
    text = """\
hours: 1.5
partition: gpu
account: lab
gpus: 2
cpus: 8
memory_gb: 32
at_once: 10
setup: ["module load cuda", "export A=1"]
extra: {mail-type: FAIL}
"""
    parameters = read(file(text), devices=2).parameters("sweep-own")
    assert parameters == {
        "name": "sweep-own",
        "timeout_min": 90,
        "cpus_per_task": 8,
        "gpus_per_node": 2,
        "mem_gb": 32.0,
        "slurm_partition": "gpu",
        "slurm_account": "lab",
        "slurm_array_parallelism": 10,
        "slurm_signal_delay_s": 120,
        "slurm_setup": ["module load cuda", "export A=1"],
        "slurm_srun_args": ["--cpus-per-task=8"],
        "slurm_additional_parameters": {"requeue": True, "mail-type": "FAIL"},
    }
    assert set(read(file("hours: 1")).parameters("x")) == {
        "name", "timeout_min", "cpus_per_task", "slurm_signal_delay_s", "slurm_srun_args",
        "slurm_additional_parameters",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpus: 1", "'hours' is missing"),
        ("hours: 1\npartitoin: gpu", "line 2: unknown 'partitoin'; did you mean 'partition'"),
        ("hours: 0", "line 1: 'hours' must be above 0, not 0."),
        ("hours: 1\ncpus: 0", "line 2: 'cpus' must be at least 1, not 0."),
        ("hours: 1\ncpus: many", "line 2: 'cpus' must be a whole number, not 'many'."),
        ("hours: 1\ngpus: 1", "line 2: gpus: 1 is less than --devices 2; increase it."),
        ("hours: 0.02", "line 1: save_seconds: 120 is not below the time limit of 0.02 hours"),
        ("hours: 1\nextra: [a]", "line 2: 'extra' must be a mapping"),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, said: str, file: Callable[[str], Path]) -> None:
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        read(path, devices=2)
    assert str(caught.value).startswith(f"{path}, line") and said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--executor", "slurm"], "--executor slurm needs --slurm FILE.yaml"),
        (["--slurm", "jobs.yaml"], "--executor slurm needs --slurm FILE.yaml"),
        (["--detach"], "--detach needs --executor slurm"),
    ],
)
def test_options_that_need_each_other(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from glua_bench import cli

    with pytest.raises(ConfigError, match=said):
        cli.app(["sweep", "mask_ratio", *words], standalone_mode=False)


# -- a job without a cluster ----------------------------------------------------------------------


def pretended(code: str) -> WorkerJob:
    """Return a job whose worker is a few lines of Python."""
    return WorkerJob([sys.executable, "-c", code])


def test_a_job_ends_with_its_worker() -> None:
    assert pretended("")() == 0
    assert pretended("import sys; sys.exit(2)")() == 2


@pytest.mark.fault("killed", "the worker of a SLURM job")
def test_a_job_whose_worker_is_killed_has_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(job.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as caught:
        pretended("import os; os.kill(os.getpid(), 9)")()
    assert caught.value.code == 128 + signal.SIGKILL and not waited
    # Told by the scheduler itself: only a job that waits for its end is queued again.
    with pytest.raises(SystemExit) as caught:
        pretended("import sys; sys.exit(143)")()
    assert caught.value.code == 143 and waited == [job.ANNOUNCED_SECONDS]


def test_a_worker_has_as_many_threads_as_its_job_has_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert job_environment()["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert job_environment()["OMP_NUM_THREADS"] == "6"


def test_a_job_is_asked_to_save_by_submitit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code path with submitit's local executor."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    waiting = pretended(
        "import os, pathlib, signal, sys, time\n"
        "if pathlib.Path('saved').exists(): sys.exit(0)\n"
        "def save(*_):\n"
        "    pathlib.Path('saved').write_text('')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('began').write_text(str(os.getppid()))\n"
        "time.sleep(60)\n"
    )
    waiting.folder = tmp_path / "jobs"
    executor = submitit.LocalExecutor(waiting.folder)
    executor.update_parameters(timeout_min=5)
    submitted = executor.submit(waiting)
    began = tmp_path / "began"
    until(lambda: began.exists() and bool(began.read_text()))
    os.kill(int(began.read_text()), signal.SIGUSR2)
    assert submitted.result() == 0
    assert (tmp_path / "saved").exists()
    written = exit_file(waiting.folder, submitted.job_id)
    assert json.loads(written.read_text()) == {"code": 0}


def test_a_process_is_awaited_within_the_same_wait() -> None:
    process = subprocess.Popen(["sleep", "60"])
    ended = []

    def hear(*_: object) -> None:
        process.terminate()
        wait_for_end(process)
        ended.append(True)

    before = signal.signal(signal.SIGUSR2, hear)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        wait_for_end(process)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ended == [True] and process.wait() == -signal.SIGTERM
    wait_for_end(process)  # which is gone by now


# -- jobs without a cluster -----------------------------------------------------------------------


def study_in(root: Path, trials: int = 1) -> SweepStudy:
    task = {"method": "slow", "dataset": "discs", "directions": ("bright-dark",)}
    return SweepStudy(define(**task, trials=trials), root)


class Pretended(Jobs):
    """Jobs with given states.

    Args:
        states: what is queued at each look.
        results: job → exit code of its worker; missing if it was killed.
    """

    states: list[set[str]]
    results: dict[str, Any]

    def __init__(self, study: SweepStudy, states: Sequence[set[str]], results: Any = None) -> None:
        super().__init__(study, ["worker"], 2, Resources(1.0))
        self.states, self.results = list(states), results or {}
        self.count_submitted = 0
        self.folder.mkdir(parents=True)

    def _queued(self) -> set[str]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def _submit(self, count: int) -> None:
        for _ in range(count):
            number = str(self.count_submitted)
            self.count_submitted += 1
            self._ids.append(number)
            if number in self.results:
                exit_file(self.folder, number).write_text(
                    json.dumps({"code": self.results[number]})
                )
                (self.folder / f"{number}_0_log.err").write_text(
                    "glua-bench: error: no such thing.\nsubmitit WARNING\n"
                )


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "LOOK_SECONDS", 0.0)
    pytest.importorskip("submitit")


def test_jobs_that_vanish_are_replaced(at_once: None, tmp_path: Path) -> None:
    states: list[set[str]] = [set(), {"1"}, {"1", "2"}, {"2"}, set()]
    jobs = Pretended(study_in(tmp_path), states, {"1": 0, "2": 0})
    jobs.run()
    assert jobs.count_submitted == 3  # only 0 left nothing


@pytest.mark.fault("killed", "every job of a sweep, again and again")
def test_jobs_that_only_die_end_the_sweep(at_once: None, tmp_path: Path) -> None:
    jobs = Pretended(study_in(tmp_path), [set()])
    with pytest.raises(RunFailure, match="10 jobs ended early and no trial was finished"):
        jobs.run()
    assert jobs.count_submitted == 10


def test_what_a_worker_says_at_its_end_ends_the_sweep(at_once: None, tmp_path: Path) -> None:
    jobs = Pretended(study_in(tmp_path), [set()], {"0": 2})
    with pytest.raises(RunFailure, match=r"^A worker failed: no such thing\.$"):
        jobs.run()


class Planted:
    """A pickle that runs code when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.fault("stray code", "a planted pickle as the result of a job")
def test_results_of_jobs_are_not_unpickled(at_once: None, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    jobs = Pretended(study_in(tmp_path), [set(), set(), set(), {"2"}, set()], {"1": 0, "2": 0})
    for place in (jobs.folder / "0_0_result.pkl", exit_file(jobs.folder, "0")):
        place.write_bytes(pickle.dumps(Planted(marker)))
    jobs.run()
    assert not marker.exists()
    assert jobs.count_submitted == 3  # a result that is not ours is no result


@pytest.mark.fault("stray code", "a directory of jobs in which others may write")
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_jobs_are_only_read_from_a_directory_of_their_user(
    at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(study_in(tmp_path), ["worker"], 1, Resources(1.0))
    before = os.umask(0)
    try:
        jobs._keep_private()
    finally:
        os.umask(before)
    assert jobs.folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o702, 0o777):
        jobs.folder.chmod(mode)
        with pytest.raises(ConfigError, match=r"Other users may write in .*chmod go-w"):
            jobs._submit(1)
    jobs.folder.chmod(0o755)
    jobs._keep_private()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        jobs._submit(1)


def test_jobs_of_an_earlier_command_go_on(at_once: None, tmp_path: Path) -> None:
    jobs = Pretended(study_in(tmp_path), [{"7_0", "7_1", "99"}])
    (jobs.folder / "submitted.txt").write_text("6\n7_0\n7_1\n")
    jobs.begin()
    assert jobs._ids == ["7_0", "7_1"] and not jobs.count_submitted


def test_a_machine_without_slurm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="There is no squeue on this machine"):
        Jobs(study_in(tmp_path), ["worker"], 1, Resources(1.0)).begin()


# -- a cluster ------------------------------------------------------------------------------------


def until(holds: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


class Sweep:
    """The command line on a cluster.

    Args:
        root: where everything is written.
        trials: how many.
        pause: seconds of a step.
    """

    def __init__(self, root: Path, trials: int, pause: float) -> None:
        self.root, self.cache = root, root / "cache"
        self.began = self.cache / "stages" / "steps.txt"  # where a process that trains may write
        self.began.parent.mkdir(parents=True)
        (root / "own.yaml").write_text(DEFINITION.format(trials=trials, pause=pause))
        (root / "jobs.yaml").write_text("hours: 0.1\nmemory_gb: 1\nsave_seconds: 30\n")

    def start(self, *words: str, workers: int = 1) -> subprocess.Popen:
        plugins = [
            SUPPORT / "slow_method.py",
            SUPPORT / "sample_plugin/src/glua_bench_sample/discs.py",
        ]
        options = [f"--plugin={file}" for file in plugins]
        options += [f"--workers={workers}", f"--steps={STEPS}", "--device=cpu", "--no-mlflow"]
        options += ["--data-root=discs", "--executor=slurm", "--slurm=jobs.yaml", *words]
        environment = {
            **os.environ,
            "GLUA_BENCH_CACHE": str(self.cache),
            "GLUA_BENCH_TEST_STEPS": str(self.began),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "glua_bench", "sweep", "own.yaml", *options],
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def steps(self) -> list[int]:
        """The steps that began, in all trials."""
        return [int(s) for s in self.began.read_text().split()] if self.began.exists() else []

    def job(self) -> str:
        """The one job."""
        return (self.root / "runs/sweeps/own/jobs/submitted.txt").read_text().strip()

    def trials(self) -> list[Any]:
        """All trials, those that were given back too."""
        return study_in(self.root / "runs").trials()

    def logs(self) -> str:
        """What the jobs wrote, for messages."""
        found = sorted((self.root / "runs/sweeps/own/jobs").glob("*_log.*"))
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in found)


def finished(process: subprocess.Popen, sweep: Sweep) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output + sweep.logs()
    return str(output)


@pytest.mark.cluster
def test_a_sweep_through_sbatch(slurm: None, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=3, pause=0.0)
    said = finished(sweep.start(workers=2), sweep)
    assert "submitted " in said and "_0, " in said and "Chosen by im" in said
    assert [t.state for t in sweep.trials()] == [TrialState.COMPLETE] * 3
    assert sorted(sweep.steps()) == sorted([*range(STEPS)] * 3)
    again = finished(sweep.start(workers=2), sweep)
    assert "submitted" not in again and "Chosen by im" in again


def requeue(number: str) -> None:
    """Requeue a job, as an operator or a preemption does."""
    subprocess.run(["scontrol", "requeue", number], check=True)


def near_its_end(number: str) -> None:
    """Send the signal that SLURM sends before the time limit."""
    subprocess.run(["scancel", "--signal=USR2", number], check=True)


@pytest.mark.cluster
@pytest.mark.parametrize("end", [requeue, near_its_end])
def test_a_trial_whose_job_must_end_goes_on_from_its_checkpoint(
    end: Callable[[str], None], slurm: None, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, trials=1, pause=0.2)
    process = sweep.start()
    until(lambda: len(sweep.steps()) >= 3)
    number = sweep.job()
    end(number)
    # A requeued job waits two minutes, in which SLURM revokes its old credential. Let it begin
    # earlier, but not in the same second, in which the new credential counts as revoked.
    sooner = ["scontrol", "update", f"JobId={number}", "StartTime=now+5"]
    # Only once it has ended: its requeueing sets the time again.
    while process.poll() is None and states_of(number) != ["PENDING"]:
        time.sleep(0.5)
    subprocess.run(sooner, check=process.poll() is None)
    finished(process, sweep)
    states = [t.state for t in sweep.trials()]
    assert states == [TrialState.FAIL, TrialState.COMPLETE], sweep.logs()
    assert sweep.trials()[0].user_attrs["reason"] == "its worker was asked to end"
    assert len(counting(sweep.trials())) == 1
    assert sweep.steps() == list(range(STEPS)), sweep.logs()  # none lost, none repeated
    assert sweep.job() == number


@pytest.mark.cluster
def test_an_interrupted_sweep_cancels_its_jobs_and_goes_on(slurm: None, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=1, pause=0.2)
    process = sweep.start()
    until(lambda: len(sweep.steps()) >= 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command resumes" in output
    assert sweep.job() not in queue()
    finished(sweep.start(), sweep)
    assert sweep.steps() == list(range(STEPS)), sweep.logs()


@pytest.mark.cluster
def test_detached_jobs_are_found_again(slurm: None, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=1, pause=0.0)
    # A full node, so that the job cannot end before the second command looks.
    full = ["sbatch", "--parsable", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]
    other = subprocess.run(full, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    until(lambda: states_of(other.strip()) == ["RUNNING"])
    said = finished(sweep.start("--detach"), sweep)
    assert "Next: the same command without --detach" in said
    assert states_of(sweep.job()) == ["PENDING"]
    process = sweep.start()
    assert process.stdout is not None
    for line in process.stdout:
        if f"jobs {sweep.job()} of an earlier command continue" in line:
            break
    else:
        pytest.fail("the second command says nothing of the jobs of the first")
    subprocess.run(["scancel", other.strip()], check=True)
    finished(process, sweep)
    assert sweep.steps() == list(range(STEPS)), sweep.logs()


@pytest.mark.cluster
def test_what_slurm_refuses_is_said(slurm: None, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=1, pause=0.0)
    with (tmp_path / "jobs.yaml").open("a") as out:
        out.write("partition: nowhere\n")
    process = sweep.start()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("glua-bench: error: SLURM rejects the job (") and "partition" in last


def states_of(number: str) -> list[str]:
    """Return the state of a job in the queue."""
    asking = ["squeue", "--noheader", "--jobs", number, "--format=%T"]
    return subprocess.run(asking, capture_output=True, text=True).stdout.split()


def queue() -> list[str]:
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"], capture_output=True, text=True
    )
    return done.stdout.split()


def test_the_test_suite_can_start_its_servers() -> None:
    """Both scripts exist, are executable, and print their usage."""
    for name in ("slurm", "postgres"):
        script = SUPPORT.parents[1] / ".ci" / name
        assert os.access(script, os.X_OK)
        done = subprocess.run([str(script)], capture_output=True, text=True)
        assert done.returncode == 2 and f".ci/{name} start DIRECTORY" in done.stderr
