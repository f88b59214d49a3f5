"""sweeps/command.py, trial.py, launch.py: from a definition to the chosen setting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import damaged
from optuna.trial import TrialState

from glua_bench.console import Progress
from glua_bench.errors import ConfigError, RunFailure
from glua_bench.runs import execution
from glua_bench.runs.request import RunOptions
from glua_bench.runs.timing.estimate import Estimate, Estimator
from glua_bench.sweeps import command, launch
from glua_bench.sweeps.definition import Definition, Parameter, find, read, shipped
from glua_bench.sweeps.study import SweepStudy, counting
from glua_bench.sweeps.trial import best, execute, requests

TEXT = """\
name: own
title: Which share?
method: glua
dataset: phantom
objective: im
sampler: grid
set:
  grid.size: 32
  grid.spacing: 7
  grid.slice_spacing: 16
  batch_size: 2
  candidates: 2
  segmenter.width: 4
  segmenter.depth: 3
  mask: topk
  adgan_width: 4
  adgan_blocks: 1
space:
  mask_ratio: [0.2, 0.5, 0.8]
"""


@pytest.fixture
def definition(tmp_path: Path) -> Definition:
    (tmp_path / "own.yaml").write_text(TEXT)
    return read(tmp_path / "own.yaml", oracle=False)


@pytest.fixture
def base(phantom_root: Path, tmp_path: Path) -> RunOptions:
    return RunOptions(
        steps=2,
        data_root=phantom_root,
        runs_root=tmp_path / "runs",
        device="cpu",
        mlflow=False,
    )


def start(folder: Path, phantom_root: Path, *words: str) -> subprocess.Popen[str]:
    shared = f"--steps 2 --device cpu --no-mlflow --data-root {phantom_root} --runs runs"
    return subprocess.Popen(
        [sys.executable, "-m", "glua_bench", "sweep", "own.yaml", *shared.split(), *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


# -- by the command line --------------------------------------------------------------------------


def test_a_sweep_from_start_to_choice_and_again(tmp_path: Path, phantom_root: Path) -> None:
    (tmp_path / "own.yaml").write_text(TEXT)
    code, out, err = ended(start(tmp_path, phantom_root, "--dry-run"))
    assert code == 0 and "3 runs, at most about" in out, err
    assert not list((tmp_path / "runs").glob("sweeps/*"))
    code, out, err = ended(start(tmp_path, phantom_root, "--workers", "2"))
    assert code == 0, err + out
    assert "3/3 trials" in out and "Chosen by im: mask_ratio" in out
    chosen = float(out.partition("--set method.mask_ratio=")[2].split()[0])
    summaries = [
        json.loads(path.read_text()) for path in tmp_path.glob("runs/phantom/glua/*/summary.json")
    ]
    # The style stage is trained once, whoever of the two workers came first.
    assert sorted(summary["reused_stages"] for summary in summaries) == [[], ["style"], ["style"]]
    joined, _ = command.join("own", tmp_path / "runs", None, [], print)
    trials = joined.trials()
    assert chosen == max(trials, key=lambda t: t.values[0]).params["mask_ratio"]
    scores = {
        summary["run"]: max(summary["selector_scores"]["im"].values()) for summary in summaries
    }
    for trial in trials:
        (run,) = trial.user_attrs["runs"]
        assert trial.values == [pytest.approx(scores[run])]
    code, out, err = ended(start(tmp_path, phantom_root))
    assert code == 0 and f"--set method.mask_ratio={chosen}" in out
    assert len(joined.trials()) == 3

    (tmp_path / "own.yaml").write_text(TEXT.replace("0.8", "0.9"))
    code, _, err = ended(start(tmp_path, phantom_root))
    assert code == 2 and "has changed: space.mask_ratio.choices was [0.2, 0.5, 0.8]" in err
    assert err.count("\n") == 1
    code, out, err = ended(start(tmp_path, phantom_root, "--fork", "--trials", "1"))
    assert code == 0 and (tmp_path / "runs" / "sweeps" / "own-2").is_dir(), err


SMALL = ("grid.size=32", "grid.spacing=7", "grid.slice_spacing=16", "batch_size=2", "candidates=2")


@pytest.mark.parametrize("name", list(shipped()))
def test_every_definition_that_is_shipped_runs(name: str, base: RunOptions) -> None:
    """Two trials of two updates on small images."""
    sweep = read(find(name), oracle=False, trials=2, seeds=1)
    glua = ["method.adgan_width=4", "method.codes_width=4", "method.codes_scales=2"]
    small = replace(base, assignments=[*SMALL, *(glua if sweep.method == "glua" else [])])
    study = command.open_study(sweep, small, None, 1, fork=False, resume=False, report=print)
    done = command.run_worker(study, small, print, Progress(enabled=False))
    assert (done.finished, done.failed) == (2, 0), [t.user_attrs for t in study.trials()]
    assert command.conclude(study)[0].startswith(f"Chosen by {sweep.selector}: ")
    assert study.ended and len({str(t.params) for t in study.trials()}) == 2


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    tmp_path: Path, phantom_root: Path
) -> None:
    (tmp_path / "own.yaml").write_text(TEXT)
    process = start(tmp_path, phantom_root)
    journal = tmp_path / "runs" / "sweeps" / "own" / "journal.log"
    until = time.monotonic() + 300
    while not (journal.is_file() and "process" in journal.read_text()):  # a trial has begun
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and "the same command resumes." in err and err.count("\n") == 1
    joined, _ = command.join("own", tmp_path / "runs", None, [], print)
    assert not [t for t in joined.trials() if t.state == TrialState.RUNNING]
    code, out, err = ended(start(tmp_path, phantom_root, "--resume"))
    assert code == 0 and "3/3 trials" in out, err
    assert [t.state for t in counting(joined.trials())] == [TrialState.COMPLETE] * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume"], "There is no sweep 'own' in runs to resume; omit --resume"),
        (["--storage", "sqlite:///own.db", "--workers", "2"], "SQLite is damaged or stalls with 2"),
        (["--direction", "mr-pet"], "'mr-pet' is not a direction of 'phantom'"),
        (["--space", "all"], "--space all is unknown; give auto"),
        (["--preset", "fast"], "fast"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(
    tmp_path: Path, phantom_root: Path, words: list[str], said: str
) -> None:
    (tmp_path / "own.yaml").write_text(TEXT)
    code, _, err = ended(start(tmp_path, phantom_root, *words))
    assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_worker_has_the_options_of_the_sweep(
    definition: Definition, base: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including plugins, from any directory, unless the worker names its own."""
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    asked = replace(base, plugins=[Path("mine.py")], precision="bf16-mixed")
    command.open_study(definition, asked, None, 1, fork=False, resume=False, report=print)
    _, found = command.join("own", base.runs_root, None, [], print)
    assert found == replace(asked, plugins=[tmp_path / "mine.py"])
    _, found = command.join("own", base.runs_root, None, [Path("other.py")], print)
    assert found == replace(asked, plugins=[Path("other.py")])
    file = base.runs_root / "sweeps" / "own" / "request.json"
    file.write_text(file.read_text().replace("precision", "accuracy"))
    with pytest.raises(ConfigError, match="request.json does not hold the options of this version"):
        command.join("own", base.runs_root, None, [], print)


@pytest.mark.fault("silent damage", "the files of a sweep that a worker joins")
def test_a_worker_joins_the_sweep_that_was_started_or_none(
    definition: Definition, base: RunOptions, tries: Callable[[int], range]
) -> None:
    """Number of trials, title and paths may change; the study remembers everything else."""

    def open_study() -> None:
        command.open_study(definition, base, None, 1, fork=False, resume=False, report=print)

    open_study()
    folder = base.runs_root / "sweeps" / "own"
    files = [folder / "definition.json", folder / "request.json"]
    good = [file.read_bytes() for file in files]
    known, _ = command.join("own", base.runs_root, None, [], print)
    refused = 0
    for seed in tries(60):
        file, content = files[seed % 2], good[seed % 2]
        file.write_bytes(damaged(content, seed))
        try:
            found, options = command.join("own", base.runs_root, None, [], print)
        except ConfigError as error:
            refused += 1
            assert str(error).endswith(".") and "\n" not in str(error)
        else:
            assert found.definition.meaning() == known.definition.meaning()
            assert replace(options, runs_root=base.runs_root) == base
        file.write_bytes(content)
    assert refused > 30
    text = good[0].decode().replace("0.2", "0.3")
    files[0].write_text(text)
    with pytest.raises(ConfigError, match=r"is damaged \(space.mask_ratio.*repeat the command"):
        command.join("own", base.runs_root, None, [], print)
    files[0].write_text("{")
    open_study()
    assert files[0].read_bytes() == good[0]


def test_a_worker_of_an_unknown_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no sweep 'none' in .*; start it with"):
        command.join("none", tmp_path, None, [], print)


# -- a trial --------------------------------------------------------------------------------------


def test_a_trial_is_every_direction_with_every_seed(
    definition: Definition, base: RunOptions
) -> None:
    several = replace(definition, directions=("mr-ct", "ct-mr"), seeds=2)
    made = requests(several, base, {"mask_ratio": 0.2})
    assert [(r.direction, r.seed) for r in made] == [
        ("mr-ct", 0),
        ("ct-mr", 0),
        ("mr-ct", 1),
        ("ct-mr", 1),
    ]
    assert all(r.assignments[-1] == "method.mask_ratio=0.2" for r in made)
    assert "grid.size=32" in made[0].assignments and made[0].steps == 2


def test_a_trial_s_value_is_the_mean_of_its_runs_and_a_watcher_may_end_it(
    definition: Definition, base: RunOptions
) -> None:
    small = replace(
        definition,
        method="source_only",
        settings=tuple(s for s in definition.settings if not s.startswith("method.")),
        space=(Parameter("lr", choices=(0.001, 0.01)),),
        objectives=("source_val", "seconds"),
        seeds=2,
        pruner="median",
    )
    seen: list[tuple[int, float]] = []

    def see(step: int, value: float) -> bool:
        seen.append((step, value))
        return False

    outcome = execute(small, base, {"lr": 0.01}, Progress(enabled=False), see)
    qualities = list(outcome.facts["qualities"].values())
    assert outcome.values[0] == pytest.approx(sum(qualities) / 2)
    assert outcome.values[1] > 0 and len(outcome.facts["runs"]) == 2
    # Two candidates of each of two runs, at positions that grow.
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert max(value for _, value in seen[:2]) == pytest.approx(qualities[0])
    with pytest.raises(execution.Stopped):
        execute(small, base, {"lr": 0.001}, Progress(enabled=False), lambda step, value: True)


def test_the_objective_is_among_the_selectors(definition: Definition, base: RunOptions) -> None:
    def asked(objective: str, selectors: str | None) -> str | None:
        sweep = replace(definition, objectives=(objective,))
        return requests(sweep, replace(base, selectors=selectors), {})[0].selectors

    assert asked("im", None) is None and asked("snd", "all") == "all"  # the default has im
    assert asked("snd", None) == "last,source_val,im,bnm,snd"
    assert asked("snd", "last, snd") == "last, snd"
    with pytest.raises(ConfigError, match="--selectors last,im lacks the objective.*'snd'"):
        asked("snd", "last,im")
    assert asked("oracle", "last") == "last"


def test_a_shared_stage_is_estimated_once(
    definition: Definition, base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"slices": 5.0, "style": 100.0, "segment": 10.0, "selectors": 1.0, "evaluation": 2.0}
    monkeypatch.setattr(Estimator, "of", lambda self, planned: Estimate(parts))
    (line,) = command.planned(definition, base, 1, print)
    assert "3 runs, at most about 2:24 with" in line  # 5 + 100 + 3 * 13
    assert "slices 5 s, style 1:40, segment 30 s, selectors 3 s, evaluation 6 s" in line
    swept = replace(definition, space=(Parameter("style_share", low=1.0, high=3.0),), trials=3)
    (line,) = command.planned(swept, base, 2, print)
    assert "style 5:00" in line and "with --workers 2" in line


def test_an_objective_that_can_judge_nothing_is_told() -> None:
    summary: dict[str, Any] = {"selector_scores": {"im": {"1": 0.5, "2": 0.75}, "dev": {}}}
    assert best(summary, "im", "runs/x") == 0.75
    for name in ("dev", "snd"):
        with pytest.raises(RunFailure, match=f"'{name}' scored no checkpoint of runs/x; use"):
            best(summary, name, "runs/x")


# -- workers on this machine ----------------------------------------------------------------------


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    own = [launch.worker_environment(index, 2)["GLUA_BENCH_CORES"] for index in range(2)]
    assert own == ["0,2", "1,3"]
    assert launch.worker_environment(5, 8)["GLUA_BENCH_CORES"] == "0,1,2,3"
    pinned: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
    monkeypatch.setenv("GLUA_BENCH_CORES", "1,3")
    launch.pin()
    assert pinned == [{1, 3}]


def crew(
    tmp_path: Path, definition: Definition, program: str, monkeypatch: pytest.MonkeyPatch
) -> launch.Crew:
    """Return two workers that run a program instead of `glua_bench`."""
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(launch, "own_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.chdir(tmp_path)
    return launch.Crew(SweepStudy(definition, tmp_path / "runs"), ["worker"], 2)


@pytest.mark.fault("killed", "a worker of a sweep")
def test_a_killed_worker_is_replaced(
    tmp_path: Path, definition: Definition, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, pathlib, signal\n"
        "mark = pathlib.Path('killed')\n"
        "if not mark.exists():\n"
        "    mark.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "print('done')\n"
    )
    made = crew(tmp_path, definition, program, monkeypatch)
    made.run()
    logs = [path.read_text() for path in sorted((made.study.folder / "logs").iterdir())]
    assert (tmp_path / "killed").exists() and [log.count("done") for log in logs] == [1, 1]


def test_a_worker_s_error_ends_the_sweep_with_its_sentence(
    tmp_path: Path, definition: Definition, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys\nsys.exit('glua-bench: error: the disk is full; free some.')\n"
    made = crew(tmp_path, definition, program, monkeypatch)
    with pytest.raises(RunFailure, match="A worker failed: the disk is full; free some."):
        made.run()


@pytest.mark.fault("killed", "every worker of a sweep, again and again")
@pytest.mark.parametrize("between_looks", [False, True])
def test_workers_that_die_again_and_again_end_the_sweep(
    tmp_path: Path, definition: Definition, monkeypatch: pytest.MonkeyPatch, between_looks: bool
) -> None:
    """Also if all are dead before the first look."""
    monkeypatch.setattr(launch, "DEATHS", 3)
    made = crew(tmp_path, definition, "import os\nos.kill(os.getpid(), 9)\n", monkeypatch)
    start = made._start

    def dead(index: int) -> launch.Worker:
        worker = start(index)
        worker.process.wait()
        return worker

    if between_looks:
        monkeypatch.setattr(made, "_start", dead)
    with pytest.raises(RunFailure, match="3 workers were killed and no trial was finished; see"):
        made.run()
    assert all(worker.process.poll() is not None for worker in made._workers)


# -- what comes out -------------------------------------------------------------------------------


def concluded(tmp_path: Path, definition: Definition, values: list[tuple[float, ...]]) -> list[str]:
    study = SweepStudy(definition, tmp_path / "runs")
    for own in values:
        claim = study.claim()
        assert claim is not None
        with study.holding(claim):
            study.finish(claim, own, {})
    return command.conclude(study)


def test_the_conclusion_names_the_choice(tmp_path: Path, definition: Definition) -> None:
    lines = concluded(tmp_path, definition, [(0.5,), (0.75,), (0.25,)])
    study = SweepStudy(definition, tmp_path / "runs")
    ratio = study.trials()[1].params["mask_ratio"]
    assert lines == [
        f"Chosen by im: mask_ratio {ratio:.4g} (im 0.75, trial 1 of 3)",
        # With what the sweep sets of the method, without which the choice may mean nothing.
        "Use it: --set method.mask=topk --set method.adgan_width=4 --set method.adgan_blocks=1 "
        f"--set method.mask_ratio={ratio}",
    ]


def test_a_choice_by_the_oracle_is_stamped(tmp_path: Path, definition: Definition) -> None:
    sweep = replace(definition, objectives=("oracle",))
    assert (
        "ORACLE: chosen by labels of test cases, no result"
        in concluded(tmp_path, sweep, [(0.5,)])[0]
    )
    assert "ORACLE (reads target labels)" in command.described(sweep)[0]


def test_several_objectives_end_in_a_front(tmp_path: Path, definition: Definition) -> None:
    sweep = replace(definition, objectives=("im", "seconds"), sampler="random")
    lines = concluded(tmp_path, sweep, [(0.5, 1.0), (0.75, 2.0), (0.25, 3.0)])
    assert lines[0] == "2 configurations on the Pareto front of im, seconds:"
    assert [line.split()[0] for line in lines[1:]] == ["0.75", "0.5"]


def test_nothing_is_concluded_of_nothing(tmp_path: Path, definition: Definition) -> None:
    assert concluded(tmp_path, definition, []) == ["No trial of 'own' has a value."]
    study = SweepStudy(definition, tmp_path / "runs")
    claim = study.claim()
    assert claim is not None and not command.has_value(study)
    with study.holding(claim):
        study.fail(claim, "the disk is full.")
    lines = command.conclude(study)
    assert lines == ["No trial of 'own' has a value; the last one failed: the disk is full."]
    base = RunOptions(runs_root=tmp_path / "runs")
    assert "--fork" in command.next_command(study, base)
