"""Start-up, reports, and where a run's time goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from benchmarks import THREADS
from benchmarks.rows import Aim, Missing, Row, Settings, alternate, ratio_row, span
from glua_bench.config import PRESETS, RunConfig, SegmenterSpec
from glua_bench.records.run_directory import RunDirectory
from glua_bench.task import Grid

STRUCTURES = ("MYO", "LAC", "LVC", "AA")
SEEDS, DIRECTIONS = 10, ("mr-ct", "ct-mr")
REST, AT_ONCE = Aim(0.15), Aim(1.1)


def process(*words: str, folder: Path | None = None) -> None:
    """Run Python with the given arguments.

    Raises:
        SystemExit: it failed; the message is its own.
    """
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", *words],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"python {' '.join(words)} failed:\n{done.stderr}")


def in_process(*words: str) -> str:
    """Run a glua-bench command in this process and return its output.

    Raises:
        SystemExit: it failed; the message is its own.
    """
    from typer.testing import CliRunner

    from glua_bench.cli import app

    done = CliRunner().invoke(app, list(words))
    if done.exit_code:
        raise SystemExit(f"glua-bench {' '.join(words)} failed: {done.output}{done.exception!r}")
    return done.output


def measure_start(settings: Settings) -> Iterator[Row]:
    """Yield the rows of `--help` and `list` against an empty process and an import of torch."""
    settings.report("start-up")
    start: dict[str, Callable[[], None]] = {
        "help": partial(process, "-m", "glua_bench", "--help", folder=settings.scratch),
        "list": partial(process, "-m", "glua_bench", "list", folder=settings.scratch),
        "python": partial(process, "-c", "pass"),
        "torch": partial(process, "-c", "import torch"),
    }
    found = alternate(start, settings.rounds, 0)
    for name, command in (("help", "--help"), ("list", "list")):
        for other, what in (("python", "python -c pass"), ("torch", "python -c 'import torch'")):
            compared = f"command `{command}` ÷ `{what}`"
            yield ratio_row(f"start.{name}.{other}", compared, found[name], found[other])


# -- reports --------------------------------------------------------------------------------------


def make_runs(root: Path, count: int, cases: int = 20, start: int = 0) -> None:
    """Write finished runs with synthetic scores: ten seeds of each entry, in both directions."""
    rng = np.random.default_rng(start)
    quick = dict(PRESETS["quick"])
    quick["segmenter"] = SegmenterSpec(**quick["segmenter"])
    base = RunConfig("source_only", "phantom", "mr-ct", Grid(64, 3.5, 4.0), **quick)
    keys = pd.MultiIndex.from_product(
        [base.selectors, [f"case_{i:03d}" for i in range(cases)], STRUCTURES],
        names=["selector", "case", "structure"],
    ).to_frame(index=False)
    sizes = np.tile(rng.uniform(20, 200, cases * len(STRUCTURES)), len(base.selectors))
    for number in range(start, start + count):
        seed, rest = number % SEEDS, number // SEEDS
        direction, entry = DIRECTIONS[rest % 2], rest // 2
        config = replace(
            base,
            method="source_only" if entry == 0 else f"method_{entry:02d}",
            direction=direction,
            seed=seed,
        )
        directory = RunDirectory(root, config, f"{number:012x}")
        dice = np.clip(rng.normal(0.4 + 0.008 * entry, 0.1, len(keys)), 0, 1)
        rows = keys.assign(
            run=directory.id,
            dice=dice,
            assd=20 * (1 - dice),
            hd95=50 * (1 - dice),
            missed=dice == 0,
            reference_ml=sizes,
            prediction_ml=sizes,
            step=500,
        )
        facts = {"code": "0", "device": "cpu", "threads": 1, "changed": {}, "variant": ""}
        directory.start({**facts, "data": {"train": direction}})
        directory.write_cases(rows)
        steps = (100, 200, 300, 400, 500)
        directory.finish(
            {
                "stage_seconds": {"train": 100.0 + entry},
                "reused_stages": [],
                "peak_memory_mib": 900.0,
                "selector_scores": {
                    name: {str(step): float(rng.random()) for step in steps}
                    for name in base.selectors
                },
            }
        )


def read_plainly(root: Path) -> pd.DataFrame:
    """Read scores, summary and configuration of every run, as a script would."""
    frames = []
    for path in sorted(root.glob("*/*/*")):
        rows = pd.read_parquet(path / "cases.parquet")
        config = yaml.load((path / "config.yaml").read_text(), yaml.CSafeLoader)
        json.loads((path / "summary.json").read_text())
        frames.append(rows.assign(method=config["method"], seed=config["seed"]))
    return pd.concat(frames)


def report(root: Path, out: Path) -> None:
    """Write the report of all runs below a directory."""
    in_process("report", "--runs", str(root), "--out", str(out), "--no-pictures")


def measure_report(settings: Settings) -> Iterator[Row]:
    """Yield the row of a report over many runs against reading their files."""
    count = 20 if settings.quick else 100
    settings.report(f"report of {count} runs")
    root = settings.scratch / "reported"
    make_runs(root, count)
    sides = {
        "report": lambda: report(root, settings.scratch / "report"),
        "read": lambda: read_plainly(root),
    }
    found = alternate(sides, min(3, settings.rounds), 0.05)
    compared = f"`report` of {count} runs ÷ reading their files with pandas and PyYAML"
    yield ratio_row("report.read", compared, found["report"], found["read"])


# -- two at once ---------------------------------------------------------------------------------


def measure_threads(settings: Settings) -> Iterator[Row]:
    """Yield the rows of two processes at once, with their default threads.

    Raises:
        Missing: this process may use one core only.
    """
    from benchmarks import small, threads
    from glua_bench.data.parallel import cores

    if cores() < 2:
        raise Missing("needs two cores")
    settings.report("two processes at once")
    limits = {name: os.environ.pop(name) for name in THREADS if name in os.environ}
    try:
        with (
            small.phantom(settings.scratch),
            threads.Pair(steps=2 if settings.quick else 30, environment={}) as pair,
        ):
            times = {what: pair.rounds(what, settings.rounds) for what in ("train", "predict")}
    finally:
        os.environ.update(limits)
    for what, found in times.items():
        apart, together = zip(*found, strict=True)
        compared = f"two processes that {what} at once ÷ one after the other, default threads"
        yield ratio_row(f"threads.{what}", compared, together, apart, AT_ONCE)


# -- a run ----------------------------------------------------------------------------------------


def measure_run(settings: Settings) -> Iterator[Row]:
    """Yield what a run of the main job spends outside training, one row per method.

    The command begins with nothing prepared. Generation and preparation of the data are in its
    duration, which the note gives, and not in the run's.
    """
    for name in ("source_only", "glua"):
        settings.report(f"the main job with {name}")
        folder = settings.scratch / f"job_{name}"
        folder.mkdir()
        small = ("--steps", "5") if settings.quick else ()
        words = ("run", "--method", name, "--dataset", "phantom", "--preset", "quick", *small)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "glua_bench", *words],
            cwd=folder,
            env={**os.environ, "GLUA_BENCH_CACHE": str(folder / "cache")},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        whole = time.perf_counter() - began
        (path,) = folder.glob("runs/phantom/*/*/summary.json")
        summary = json.loads(path.read_text())
        training = sum(summary["stage_seconds"].values())
        yield ratio_row(
            f"run.{name}",
            "run without its training ÷ run",
            [summary["seconds"] - training],
            [summary["seconds"]],
            REST,
            f"the command with data generation {span(whole)}",
        )
