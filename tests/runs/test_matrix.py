"""matrix.py: what a comparison consists of, and that its runs are shared and done once."""

from __future__ import annotations

import contextlib
import doctest
import errno
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from glua_bench import cli
from glua_bench.cli.options import Tasks
from glua_bench.cli.runs import _resolved
from glua_bench.errors import ConfigError, PluginError, RunFailure
from glua_bench.reports.comparison import collect
from glua_bench.runs import execution, matrix
from glua_bench.runs import executor as executor_module
from glua_bench.runs import plan as planning
from glua_bench.runs.executor import Executor
from glua_bench.runs.matrix import Planned, ablation, by_dataset, combinations, comparison, plan
from glua_bench.runs.plan import PlannedRun
from glua_bench.runs.request import RunOptions

SAMPLE = (
    Path(__file__).resolve().parents[1] / "support" / "sample_plugin" / "src" / "glua_bench_sample"
)
PLUGINS = [SAMPLE / "discs.py", SAMPLE / "random_gamma.py"]


@pytest.fixture
def base(tmp_path: Path) -> RunOptions:
    return RunOptions(
        preset="quick",
        steps=2,
        assignments=["segmenter.width=4", "segmenter.depth=3", "batch_size=2", "candidates=2"],
        plugins=PLUGINS,
        data_root=tmp_path / "discs",
        runs_root=tmp_path / "runs",
        device="cpu",
        mlflow=False,
    )


# -- enumeration ----------------------------------------------------------------------------------


def test_a_comparison_is_every_method_on_every_direction_with_every_seed(base: RunOptions) -> None:
    names = ["glua", "glua+photometric", "source_only"]
    cells = comparison(names, ["phantom", "mscmr"], ["all"], 2, base)
    entries = ["source_only", "supervised", "glua", "glua + photometric"]
    tasks = ["phantom mr-ct", "phantom ct-mr", "mscmr bssfp-lge"]
    expected = [(s, e, t) for s in range(2) for e in entries for t in tasks]
    tasks_of = {c.task for c in cells if c.task.startswith("mscmr")}
    expected = [x for x in expected if x[2] in tasks[:2] or x[2] in tasks_of]
    found = [(c.request.seed, c.entry, c.task) for c in cells if c.task in tasks]
    assert found == expected
    by_entry = {c.entry: c.request for c in cells}
    assert by_entry["supervised"].scenario == "supervised"
    assert by_entry["supervised"].method == "source_only"
    assert by_entry["glua + photometric"].augmentation == "photometric"
    assert by_entry["glua"].augmentation is None and by_entry["glua"].scenario == "uda"
    assert {c.request.runs_root for c in cells} == {base.runs_root}


def test_the_default_is_each_datasets_first_direction(base: RunOptions) -> None:
    cells = comparison(["glua"], ["phantom", "discs"], [], 1, base, bounds=False)
    assert [c.task for c in cells] == ["phantom mr-ct", "discs bright-dark"]


def test_folds_are_tasks_of_their_own(base: RunOptions) -> None:
    def made(datasets: str, fold: int = 1) -> list[tuple[str, str, int]]:
        names, _, _ = _resolved(Tasks(datasets, fold=fold), base)
        cells = comparison(["glua"], names, [], 1, base, bounds=False)
        return [(c.task, c.request.dataset, c.request.fold) for c in cells]

    assert made("mmwhs,mmwhs_fold2") == [
        ("mmwhs mr-ct", "mmwhs", 1),
        ("mmwhs_fold2 mr-ct", "mmwhs", 2),
    ]
    assert made("mmwhs,mmwhs_fold3", fold=3) == [("mmwhs_fold3 mr-ct", "mmwhs", 3)]
    with pytest.raises(ConfigError, match="'phantom' has no fold 2; it has one split"):
        made("mmwhs,phantom", fold=2)


def test_a_perturbation_of_everything_is_refused(base: RunOptions) -> None:
    moved = replace(base, assignments=[*base.assignments, "perturbation=1"])
    with pytest.raises(ConfigError, match="leave it out, and give --repeats"):
        comparison(["glua"], ["discs"], [], 1, moved)
    none = replace(base, assignments=[*base.assignments, "perturbation=0"])
    assert comparison(["glua"], ["discs"], [], 1, none)


def test_repeats_are_named_and_count_beside_their_run_only(
    base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(comparison(["source_only"], ["discs"], [], 1, base, bounds=False, repeats=1))
    first, repeat = planned
    said: list[str] = []

    def fails(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        return 2, "no"

    Executor(planned, report=said.append, start=fails).run()
    assert [line for line in said if line.startswith("begin") and line.endswith(", repeat 1")]
    assert sum("repeat" in line for line in said if line.startswith("begin")) == 1

    done: list[Planned] = []
    monkeypatch.setattr(Planned, "state", property(lambda i: "done" if i in done else "open"))
    for item, names in ((repeat, set()), (first, {first.run.id, repeat.run.id})):
        done.append(item)
        assert {directory.id for _, _, directory in matrix.finished(planned)} == names


def test_repeats_are_seed_0_with_other_last_bits(base: RunOptions) -> None:
    for make in (
        lambda repeats: comparison(["glua"], ["discs"], [], 2, base, repeats=repeats),
        lambda repeats: ablation("glua", ["discs"], [], 2, base, repeats=repeats),
    ):
        plain, repeated = make(0), make(2)
        assert repeated[: len(plain)] == plain
        further = repeated[len(plain) :]
        assert len(further) == len(plain)  # as many seeds as repeats
        assert {c.request.seed for c in further} == {0}
        draws = [c.request.assignments[-1] for c in further]
        assert sorted(set(draws)) == ["perturbation=1", "perturbation=2"]
        first = [c for c in plain if c.request.seed == 0]
        for draw in range(2):
            for known, cell in zip(first, further[draw * len(first) :], strict=False):
                assert (cell.entry, cell.task) == (known.entry, known.task)
                assert cell.request.assignments[:-1] == known.request.assignments


def test_an_ablation_is_what_the_method_declares(base: RunOptions) -> None:
    cells = ablation("glua", ["phantom"], [], 1, base)
    entries = [c.entry for c in cells]
    assert entries[:4] == ["source_only", "supervised", "local_only", "global_only"]
    assert entries[-1] == "GLUA" and len(cells) == 12
    assert ablation("glua", ["phantom"], [], 1, base, bounds=False) == cells[2:]
    first = cells[4].request
    assert first.assignments[-2:] == ["method.gain=none", "method.lambda_output=0.0"]
    assert first.assignments[:-2] == base.assignments


def test_combinations_are_of_values_and_of_leaving_them() -> None:
    assert doctest.testmod(matrix).failed == 0
    found = combinations({"a": {"m": 1}, "b": {"m": 2, "w": 0}, "c": {}})
    assert list(found) == ["default", "w=0", "m=1", "m=1, w=0", "m=2", "m=2, w=0"]
    assert found["m=2, w=0"] == {"m": 2, "w": 0}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"methods": ["glau"]}, PluginError, "glau"),
        ({"datasets": ["fantom"]}, PluginError, "fantom"),
        ({"directions": ["ct-ct"]}, ConfigError, "ct-ct"),
        ({"seeds": 0}, ConfigError, "--seeds 0"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(
    change: dict[str, Any], error: type[Exception], said: str, base: RunOptions
) -> None:
    asked = {"methods": ["glua"], "datasets": ["phantom"], "directions": [], "seeds": 1, **change}
    with pytest.raises(error, match=said):
        comparison(**asked, base=base)


def test_a_method_without_variants_cannot_be_ablated(base: RunOptions) -> None:
    with pytest.raises(ConfigError, match="declares no variants; give values by --vary"):
        ablation("random_gamma", ["discs"], [], 1, base)
    with pytest.raises(ConfigError, match="--no-variants leaves nothing"):
        ablation("glua", ["discs"], [], 1, base, variants=False)


def varied(method: str, base: RunOptions, *vary: str, **options: Any) -> dict[str, list[str]]:
    """Entry → what its requests set of the method, for entries other than the bounds."""
    cells = ablation(method, ["discs"], [], 1, base, vary=vary, bounds=False, **options)
    return {c.entry: [a for a in c.request.assignments if a.startswith("method.")] for c in cells}


def test_a_setting_is_varied_beside_its_reference(base: RunOptions) -> None:
    said: list[str] = []
    found = varied("random_gamma", base, "strength=0.5,1,1.0,2, 0.50", report=said.append)
    assert found == {
        "default": [],
        "strength = 0.5": ["method.strength=0.5"],
        "strength = 2.0": ["method.strength=2.0"],
    }
    assert said == ["'strength = 1.0' has the settings of 'default', which stands for it"]
    # The reference is what is asked for, not what the class says.
    asked = replace(base, assignments=[*base.assignments, "method.strength=2"])
    assert varied("random_gamma", asked, "method.strength=1,2", "lr=1e-3") == {
        "default": ["method.strength=2"],
        "strength = 1.0": ["method.strength=2", "method.strength=1.0"],
        "lr = 0.001": ["method.strength=2", "method.lr=0.001"],
    }


def test_a_value_that_a_variant_has_is_the_variant(base: RunOptions) -> None:
    vary = ("gain=none,constant,tanh", "lr_d=0.1,0.001", "mask=random,soft")
    said: list[str] = []
    found = varied("glua", base, *vary, report=said.append)
    assert list(found)[-4:] == ["random mask (ours)", "GLUA", "lr_d = 0.1", "mask = soft"]
    assert said == [
        f"'{value}' has the settings of '{name}', which stands for it"
        for value, name in (
            ("gain = none", "Step A + D1 + D2"),
            ("gain = constant", "gain constant"),
            ("gain = tanh", "GLUA"),
            ("lr_d = 0.001", "GLUA"),
            ("mask = random", "random mask (ours)"),
        )
    ]
    alone = varied("glua", base, *vary, variants=False)
    assert list(alone) == [
        "default",
        "gain = none",
        "gain = constant",
        "lr_d = 0.1",
        "mask = random",
        "mask = soft",
    ]
    # 0.001 is the setting of the preset "quick" only.
    other = varied("glua", replace(base, preset="standard"), "lr_d=0.001", variants=False)
    assert list(other) == ["default", "lr_d = 0.001"]


def test_values_and_variants_combine(base: RunOptions) -> None:
    found = varied(
        "random_gamma", base, "strength=1,2", "lr=0.1", combine=True, report=lambda line: None
    )
    assert list(found) == ["default", "lr=0.1", "strength=2.0", "strength=2.0, lr=0.1"]
    assert found["strength=2.0, lr=0.1"] == ["method.strength=2.0", "method.lr=0.1"]
    found = varied("advent", base, "lambda_entropy=0.1", combine=True)
    assert list(found)[1:] == [
        "lambda_entropy=0.1",
        "form=direct",
        "form=direct, lambda_entropy=0.1",
    ]


def test_bounds_do_not_follow_the_methods_settings(base: RunOptions) -> None:
    asked = replace(base, assignments=[*base.assignments, "method.strength=2"])
    cells = ablation("random_gamma", ["discs"], [], 1, asked, vary=["strength=1"])
    assert [c.entry for c in cells] == ["source_only", "supervised", "default", "strength = 1.0"]
    lower, upper = (c.request for c in cells[:2])
    task = {"dataset": "discs", "direction": "bright-dark"}
    assert lower == base.request(method="source_only", **task)
    assert upper == replace(lower, scenario="supervised")
    planned = plan(cells)  # every run is another
    assert [p.run.config.method for p in planned] == ["source_only"] * 2 + ["random_gamma"] * 2
    settings = [p.run.config.method_config.get("strength") for p in planned]
    assert settings == [None, None, 2.0, 1.0]


def test_a_bound_that_is_varied_is_its_own_reference(base: RunOptions) -> None:
    cells = ablation("source_only", ["discs"], [], 1, base, vary=["lr=0.002,0.1"])
    assert [c.entry for c in cells] == ["source_only", "supervised", "lr = 0.1"]
    plan(cells)


def test_two_entries_of_one_name_are_refused(base: RunOptions, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from glua_bench.methods.source_only import SourceOnly\n"
        "class Mine(SourceOnly):\n"
        '    """My own method."""\n'
        "    name = 'mine'\n"
        "    @classmethod\n"
        "    def variants(cls):\n"
        "        return {'supervised': {'lr': 0.1}}\n"
    )
    asked = replace(base, plugins=[*base.plugins, plugin])
    with pytest.raises(ConfigError, match="are called 'supervised'"):
        ablation("mine", ["discs"], [], 1, asked)
    assert len(ablation("mine", ["discs"], [], 1, asked, bounds=False)) == 1


# -- execution ------------------------------------------------------------------------------------


def cells_of(base: RunOptions, seeds: int = 2) -> list[Planned]:
    return plan(comparison(["random_gamma"], ["discs"], [], seeds, base, bounds=False))


def in_process(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
    """What a started process would do."""
    execution.execute(planning.plan(run.request), execution.Progress(enabled=False))
    return 0, ""


def test_two_cells_of_one_run_are_refused(base: RunOptions) -> None:
    cells = comparison(["random_gamma", "source_only"], ["discs"], [], 1, base, bounds=False)
    twice = [*cells, replace(cells[0], entry="again")]
    with pytest.raises(ConfigError, match="'random_gamma' and 'again' on discs bright-dark"):
        plan(twice)


def test_runs_are_done_once_and_skipped_afterwards(base: RunOptions) -> None:
    planned = cells_of(base)
    said: list[str] = []
    outcome = Executor(planned, report=said.append, start=in_process).run()
    assert (outcome.ran, outcome.before, outcome.elsewhere, outcome.failed) == (2, 0, 0, {})
    assert [line.split()[0] for line in said] == ["begin", "done", "begin", "done"]
    assert "(2 of 2)" in said[-1]
    known = matrix.seconds_known(planned)
    assert set(known) == {("random_gamma", "discs bright-dark")} and min(known.values()) > 0

    def never(*given: Any) -> tuple[int, str]:
        raise AssertionError("a finished run was started")

    outcome = Executor(cells_of(base), start=never).run()
    assert (outcome.ran, outcome.before) == (0, 2)


def test_a_matrix_is_shown_by_dataset(base: RunOptions, phantom_root: Path) -> None:
    discs = plan(comparison(["random_gamma"], ["discs"], [], 2, base))
    other = replace(base, data_root=phantom_root)
    phantom = plan(comparison(["source_only"], ["phantom"], ["all"], 1, other, bounds=False))
    groups = by_dataset("compare random_gamma", [*discs, *phantom])
    assert [group.dataset for group in groups] == ["discs", "phantom"]
    assert groups[0].entries == ["source_only", "supervised", "random_gamma"]
    assert groups[0].seeds == [0, 1] and len(groups[0].members) == 6
    assert groups[1].directions == ["mr-ct", "ct-mr"] and groups[1].seeds == [0]
    assert [run.id for _, run in groups[0].members] == [item.run.id for item in discs]
    (alone,) = by_dataset("compare random_gamma", discs)
    assert alone.id == groups[0].id != groups[1].id


def test_a_failure_is_kept_and_tried_again_only_if_asked(base: RunOptions) -> None:
    planned = cells_of(base)

    def failing(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        if run.request.seed == 0:
            planned[0].run.directory.fail("the disk is full.")
            return 1, "glua-bench: error: the disk is full."
        return in_process(run, environment)

    outcome = Executor(planned, start=failing).run()
    assert outcome.ran == 1 and list(outcome.failed.values()) == ["the disk is full."]
    assert [p.state for p in planned] == ["failed", "done"]
    said: list[str] = []
    more = cells_of(base, 3)
    outcome = Executor(more, report=said.append, start=in_process).run()
    assert (outcome.ran, outcome.before, len(outcome.failed)) == (1, 1, 1)
    assert "(1 of 1)" in said[-1]  # what failed earlier is not part of this work
    outcome = Executor(cells_of(base), retry_failed=True, start=in_process).run()
    assert (outcome.ran, outcome.before, outcome.failed) == (1, 1, {})


def test_a_killed_process_is_started_again_once(base: RunOptions) -> None:
    planned, started = cells_of(base, 1), []

    def killed(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        started.append(run.id)
        return (-9, "") if len(started) == 1 else in_process(run, environment)

    outcome = Executor(planned, start=killed).run()
    assert outcome.ran == 1 and started == [planned[0].run.id] * 2

    planned = cells_of(replace(base, runs_root=base.runs_root / "more"), 1)
    outcome = Executor(planned, start=lambda *given: (-9, "")).run()
    assert outcome.ran == 0 and len(outcome.failed) == 1


def test_a_file_system_without_locks_ends_the_matrix_with_the_reason(
    base: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    planned = cells_of(base, 1)
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(RunFailure, match="cannot be locked"):
        Executor(planned, jobs=2, start=in_process).run()


def test_a_process_that_loses_the_run_to_one_that_is_killed_is_started_again(
    base: RunOptions,
) -> None:
    """That another process had the run is no failure of the run."""
    planned, errors = cells_of(base, 1), []
    lock = planned[0].run.directory.path / ".lock"

    def beaten(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        with matrix.try_lock(lock) if not errors else contextlib.nullcontext():
            try:
                return in_process(run, environment)
            except RunFailure as error:
                errors.append(str(error))
        return RunFailure.exit_code, errors[-1]  # and the other process is gone

    outcome = Executor(planned, start=beaten).run()
    assert len(errors) == 1 and "another process" in errors[0]
    assert outcome.ran == 1 and not outcome.failed

    planned = cells_of(replace(base, runs_root=base.runs_root / "more"), 1)
    outcome = Executor(planned, start=lambda *given: (1, "ImportError: none")).run()
    assert list(outcome.failed.values()) == ["ImportError: none"]


def test_what_failed_here_and_was_done_elsewhere_is_no_failure(base: RunOptions) -> None:
    planned = cells_of(base)

    def killed(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        if run.request.seed == 0:
            return -9, ""
        execution.execute(
            planned[0].run, execution.Progress(enabled=False)
        )  # as another process would
        return in_process(run, environment)

    outcome = Executor(planned, start=killed).run()
    assert (outcome.ran, outcome.elsewhere, outcome.failed) == (1, 1, {})


def test_two_executors_share_the_runs(base: RunOptions) -> None:
    first, second = cells_of(base, 4), cells_of(base, 4)
    began: list[int] = []
    guard = threading.Lock()

    def once(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        with guard:
            began.append(run.request.seed)
        time.sleep(0.2)
        with guard:
            return in_process(run, environment)

    executors = [Executor(planned, jobs=2, start=once) for planned in (first, second)]
    threads = [threading.Thread(target=executor.run) for executor in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(began) == [0, 1, 2, 3]
    outcomes = [executor.outcome for executor in executors]
    assert sum(outcome.ran for outcome in outcomes) == 4
    assert all(o.ran + o.before + o.elsewhere == 4 and not o.failed for o in outcomes)


def test_a_run_whose_starter_was_killed_is_waited_for_then_taken_over(base: RunOptions) -> None:
    planned = cells_of(base, 1)
    item = planned[0]
    item.run.directory.path.mkdir(parents=True)
    # A process that holds the run's own lock, but nobody's claim: an orphan.
    script = (
        "import fcntl, sys, time\n"
        f"held = open({str(item.run.directory.path / '.lock')!r}, 'a')\n"
        "fcntl.flock(held, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    orphan = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert orphan.stdout is not None and orphan.stdout.readline() == "held\n"
        executor = Executor(planned, start=in_process)
        thread = threading.Thread(target=executor.run)
        thread.start()
        time.sleep(1.5)
        assert thread.is_alive() and not item.run.directory.done
    finally:
        orphan.kill()
        orphan.wait()
    thread.join(120)
    assert item.run.directory.done and executor.outcome.ran == 1


def test_jobs_have_a_gpu_or_a_share_of_the_cores_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(matrix.torch.cuda, "device_count", lambda: 0)
    assert executor_module.environment(0, 4)["OMP_NUM_THREADS"] == "3"
    assert executor_module.environment(0, 40)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(matrix.torch.cuda, "device_count", lambda: 2)
    assert [executor_module.environment(i, 4)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == list(
        "0101"
    )
    assert executor_module.environment(0, 4)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # what the user says stands
    monkeypatch.setattr(matrix.torch.cuda, "device_count", lambda: 0)
    assert executor_module.environment(0, 4)["OMP_NUM_THREADS"] == "5"


# -- the commands ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_commands_at_once_make_one_comparison(base: RunOptions, tmp_path: Path) -> None:
    options = ["--data-root", "discs", "--steps", "2", "--device", "cpu", "--no-mlflow"]
    options += [f"--plugin={path}" for path in PLUGINS] + ["--preset", "quick", "--seeds", "1"]
    words = ["compare", "--methods", "random_gamma", "--dataset", "discs", *options]
    start = [sys.executable, "-m", "glua_bench", *words]
    dry = subprocess.run([*start, "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "3 runs, 0 done" in dry.stdout and not (tmp_path / "runs").exists()
    both = [
        subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    ran = [int(text.split("3 runs: ")[1].split(" run now")[0]) for text in printed]
    assert sum(ran) == 3
    for text in printed:
        assert "discs bright-dark" in text and "supervised" in text and "0 failed" in text
    done = sorted(path.parent for path in (tmp_path / "runs").glob("*/*/*/done"))
    assert len(done) == 3
    found = [("e", "t", execution.tracking.RunDirectory.open(path)) for path in done]
    assert len(collect(found)["run"].unique()) == 3


@pytest.mark.slow
def test_a_comparison_is_one_group_of_runs_in_the_tracker(
    base: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Mirrored runs lie under it; a second command changes nothing, a dead tracker costs a line."""
    words = ["compare", "--methods=random_gamma", "--dataset=discs", "--no-bounds", "--seeds=2"]
    words += ["--data-root=discs", "--steps=2", "--device=cpu", "--preset=quick"]
    words += [f"--plugin={path}" for path in PLUGINS]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["glua-bench", *words])

    def compared() -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        said = capsys.readouterr()
        return said.out, said.err

    out, err = compared()
    assert "Browse:  mlflow ui" in out and "warning" not in err
    uri = execution.tracking.tracking_uri(tmp_path / "runs")
    client = execution.tracking.mlflow_client(uri)

    def shown() -> list[Any]:
        (experiment,) = (e for e in client.search_experiments() if "discs" in e.name)
        return client.search_runs([experiment.experiment_id])

    found = shown()
    (parent,) = (run for run in found if "glua_bench.comparison" in run.data.tags)
    assert len(found) == 3
    assert {r.data.tags.get("mlflow.parentRunId") for r in found} == {None, parent.info.run_id}
    assert parent.info.run_name.startswith(
        "compare random_gamma | discs bright-dark | 2 seeds | quick"
    )
    (directory, _) = execution.tracking.list_runs(tmp_path / "runs")
    rows = collect([("random_gamma", "discs bright-dark", directory)])
    dice = parent.data.metrics["bright-dark/dice/random_gamma"]
    assert 0 <= dice <= 1 and "bright-dark/dice_sd/random_gamma" in parent.data.metrics
    assert "bright-dark/gap_recovered/random_gamma" not in parent.data.metrics
    assert f"{dice:.3f}" in parent.data.tags["mlflow.note.content"] and len(rows) > 0
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"intervals.csv", "pairs.csv", "ranking.csv", "rows.csv", "table.csv"}

    compared()
    assert {run.info.run_id for run in shown()} == {run.info.run_id for run in found}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    out, err = compared()
    assert err.count("warning: ") == 1 and "127.0.0.1:9" in err and "2 done before" in out
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(sys, "argv", ["glua-bench", *words, "--no-mlflow"])
    monkeypatch.setattr(execution.tracking, "mlflow_client", None)  # whoever asks it fails
    out, err = compared()
    assert "warning" not in err and "Browse" not in out


@pytest.mark.slow
def test_a_comparison_ends_with_a_report_of_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whatever else lies beside them: here a comparison with another budget."""
    monkeypatch.chdir(tmp_path)

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glua-bench", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    words = ["compare", "--methods=random_gamma", "--dataset=discs", "--no-bounds", "--seeds=2"]
    words += ["--data-root=discs", "--device=cpu", "--preset=quick", "--no-mlflow"]
    words += [f"--plugin={path}" for path in PLUGINS]
    code, out, _ = called(*words, "--steps=2")
    wanted = {run.id for run in execution.tracking.list_runs(tmp_path / "runs")}
    (line,) = (line for line in out.splitlines() if line.startswith("Next:    "))
    assert code == 0 and len(wanted) == 2
    assert called(*words, "--steps=3")[0] == 0
    code, _, err = called("report", "--no-pictures")
    assert code and "mixes runs of different protocols" in err
    program, *command_ = shlex.split(line.removeprefix("Next:    "))
    code, out, err = called(*command_)
    assert (program, code) == ("glua-bench", 0), err
    rows = pd.read_parquet(tmp_path / "report" / "rows.parquet")
    assert set(rows["run"].astype(str)) == wanted
    assert "random_gamma has a mean Dice of" in out
    code, _, err = called(*command_, "--from-mlflow")
    assert code and "(the file of one comparison)" in err
