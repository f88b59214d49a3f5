"""What sweeping costs: a trial against its run, shared stages, and workers on a storage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import small, steps
from benchmarks.commands import in_process
from benchmarks.rows import Row, Settings, alternate, ratio_row, span
from glua_bench.sweeps.definition import Definition, Parameter, find, read
from glua_bench.sweeps.study import Claim, SweepStudy
from glua_bench.sweeps.trial import Outcome
from glua_bench.sweeps.worker import work

TEXT = """\
name: NAME
method: source_only
dataset: phantom
objective: source_val
sampler: random
trials: TRIALS
set: {SETTINGS}
space:
  lr: {low: 0.01, high: 0.02}
"""


def define(name: str, trials: int, sampler: str = "random") -> Definition:
    """Return a definition with two settings; its trials need not be runs."""
    space = (Parameter("ratio", low=0.0, high=1.0), Parameter("weight", low=1e-4, high=1, log=True))
    return Definition(
        Path("benchmark.yaml"), name, "", "glua", "phantom", ("mr-ct",), 1, "quick", (),
        space, ("im",), sampler, "none", trials, 0,
    )  # fmt: skip


def measure_sweep(settings: Settings) -> Iterator[Row]:
    """Yield the row of a sweep against the runs that it contains, by their commands."""
    trials, updates = (2, 2) if settings.quick else (4, 20)
    settings.report(f"a sweep of {trials} trials")
    options = ["--steps", str(updates), "--device", "cpu", "--no-mlflow"]
    chosen = (*(steps.SMALL if settings.quick else ()), "candidates=2")
    text = TEXT.replace("TRIALS", str(trials)).replace(
        "SETTINGS", ", ".join(setting.replace("=", ": ") for setting in chosen)
    )
    turn = iter(range(10**6))

    def sweep() -> None:
        name = f"sweep{next(turn)}"
        file = settings.scratch / f"{name}.yaml"
        file.write_text(text.replace("NAME", name))
        place = ["--runs", str(settings.scratch / name), "--executor", "debug"]
        in_process("sweep", str(file), *place, *options)

    def runs() -> None:
        place = ["--runs", str(settings.scratch / f"runs{next(turn)}")]
        for setting in chosen:
            place += ["--set", setting]
        for seed in range(trials):
            words = ["run", "--method", "source_only", "--dataset", "phantom"]
            in_process(*words, "--seed", str(seed), "--preset", "quick", *place, *options)

    with small.phantom(settings.scratch):
        found = alternate({"sweep": sweep, "runs": runs}, min(3, settings.rounds), 0.05)
    row = ratio_row(
        "sweep.trials",
        f"sweep of {trials} short trials, page included ÷ the same runs by `run`",
        found["sweep"],
        found["runs"],
    )
    extra = span(max(0.0, (row.seconds[0] - row.seconds[1]) / trials))
    yield Row(*list(vars(row).values())[:-1], f"{extra} per trial")


# -- workers on a storage -------------------------------------------------------------------------


def forked(action: Callable[[], Any]) -> int:
    """Call a function in a child process and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def workers_seconds(root: Path, url: str | None, workers: int, trials: int, sleep: float) -> float:
    """Return how long workers take for as many trials each, which only sleep."""
    definition = define(f"overhead-{uuid.uuid4().hex[:8]}", workers * trials)
    SweepStudy(definition, root, url)  # a database's tables are created before the clock starts

    def one() -> None:
        study = SweepStudy(definition, root, url)
        while not (root / "go").exists():
            time.sleep(0.001)
        work(study, asleep, poll=0.05)

    def asleep(claim: Claim, see: Any) -> Outcome:
        time.sleep(sleep)
        return Outcome((float(claim.params["ratio"]),), {})

    children = [forked(one) for _ in range(workers)]
    time.sleep(2.0)  # until all wait
    began = time.perf_counter()
    (root / "go").touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.perf_counter() - began
    (root / "go").unlink()
    assert not any(codes)
    return seconds


def measure_storage(settings: Settings) -> Iterator[Row]:
    """Yield a row per storage and number of workers: their time against that of their trials."""
    trials, sleep = (2, 0.05) if settings.quick else (16, 0.5)
    storages = {"journal": None, "postgresql": os.environ.get("GLUA_BENCH_TEST_POSTGRES")}
    for kind, url in storages.items():
        for workers in (1, 2, 8):
            name = f"storage.{kind}.{workers}"
            compared = f"{workers} workers, trials of {sleep} s ÷ the trials alone"
            if kind != "journal" and url is None:
                yield Row(name, compared, note="needs GLUA_BENCH_TEST_POSTGRES (docs/cluster.md)")
                continue
            settings.report(f"{workers} workers on a {kind}")
            root = settings.scratch / name
            root.mkdir()
            taken = [workers_seconds(root, url, workers, trials, sleep)]
            yield ratio_row(name, compared, taken, [trials * sleep])


# -- shared stages --------------------------------------------------------------------------------


def command(*words: str, folder: Path, cache: Path, changed: dict[str, str] | None = None) -> None:
    """Run glua-bench in a folder, with a cache of its own.

    Raises:
        SystemExit: it failed; the message is its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "glua_bench", *words],
        cwd=folder,
        env={**os.environ, **(changed or {}), "GLUA_BENCH_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)


def measure_reuse(settings: Settings) -> Iterator[Row]:
    """Yield the row of a sweep that trains its style stage once, against separate runs.

    Each separate run has a cache of its own, with the prepared slices and without a finished stage.
    Two of them run at a time, as the sweep has two workers. Report and tracker are included.
    """
    from glua_bench.runs.executor import environment

    workers, updates, trials = (2, "2", 2) if settings.quick else (2, "100", 12)
    definition = read(find("mask_ratio"), oracle=False)
    (parameter,), fixed = definition.space, definition.settings
    ratios = parameter.choices[:trials]
    shared = ("--steps", updates)
    prepared, used = settings.scratch / "prepared", settings.scratch / "used"
    settings.report(f"a sweep of {trials} trials and as many separate runs")
    command("data", "prepare", "phantom", folder=settings.scratch, cache=prepared)
    shutil.copytree(prepared, used)

    def alone(index: int) -> None:
        own = settings.scratch / f"run{index}"
        shutil.copytree(prepared, own / "cache")
        chosen = (*fixed, f"method.{parameter.name}={ratios[index]}")
        words = ("run", "--method", "glua", "--dataset", "phantom")
        words += tuple(word for setting in chosen for word in ("--set", setting))
        place = {"folder": own, "cache": own / "cache", "changed": environment(index, workers)}
        command(*words, *shared, **place)  # type: ignore[arg-type]
        shutil.rmtree(own)

    def separate() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(alone, range(len(ratios))))

    words = ("sweep", "mask_ratio", "--workers", str(workers), "--trials", str(len(ratios)))
    taken = []
    for side in (
        partial(command, *words, *shared, folder=settings.scratch, cache=used),
        separate,
    ):
        began = time.perf_counter()
        side()
        taken.append(time.perf_counter() - began)
    compared = f"sweep of {trials} `glua` trials, {updates} updates each ÷ as many separate runs"
    yield ratio_row("reuse.style", compared, taken[:1], taken[1:])
