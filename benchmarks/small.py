"""A small phantom, and runs on it, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.rows import Clock, Settings
from glua_bench.console import Progress
from glua_bench.datasets.phantom.dataset import Phantom, generate
from glua_bench.method import Batch, Context
from glua_bench.runs import execution
from glua_bench.runs.plan import make_fabric, plan
from glua_bench.runs.request import RunRequest

IDS = {"ct": [1001, 1002, 1003, 1004], "mr": [1001, 1002, 1003, 1007]}
QUIET = Progress(enabled=False)


@contextmanager
def cache(folder: Path) -> Iterator[Path]:
    """Use a cache directory of one's own inside the context."""
    old = os.environ.get("GLUA_BENCH_CACHE")
    os.environ["GLUA_BENCH_CACHE"] = str(folder)
    try:
        yield folder
    finally:
        if old is None:
            del os.environ["GLUA_BENCH_CACHE"]
        else:
            os.environ["GLUA_BENCH_CACHE"] = old


@contextmanager
def phantom(scratch: Path, scale: float = 3.0) -> Iterator[Path]:
    """Generate four subjects per domain, once, and use their cache inside the context.

    Args:
        scratch: the cache is a directory in it.
        scale: factor on the size of the voxels.
    """
    with cache(scratch / "cache") as folder:
        generate(Phantom().root, ids=IDS, voxel_scale=scale, workers=1)
        yield folder


def build(
    settings: Settings, name: str, steps: int, augmentation: str, options: Sequence[str] = ()
) -> execution.BuiltRun:
    """Build a run of one stage on the small phantom, with one candidate checkpoint."""
    request = RunRequest(
        name,
        "phantom",
        preset="quick",
        steps=steps,
        augmentation=augmentation,
        assignments=[*options, "candidates=1"],
        runs_root=settings.scratch / "runs",
        device="cpu",
        mlflow=False,
    )
    planned = plan(request)
    planned.directory.start({}, planned.stages)
    return execution.build_run(planned, make_fabric(request, planned.config), QUIET)


def fit(built: execution.BuiltRun, clock: Clock) -> float:
    """Train, close the run directory, and return the seconds of training."""
    trainer = built.trainer
    trainer.artefact = lambda stage: None
    trainer.last_path.unlink(missing_ok=True)  # an earlier round's
    began = clock()
    built.fit()
    seconds = clock() - began
    built.planned.directory.close()
    return seconds


def bare_loop(built: execution.BuiltRun, held: Sequence[Batch], steps: int, clock: Clock) -> float:
    """Return the seconds of as many updates of the last stage on batches in memory."""
    method = built.method
    stage = built.trainer.stages[-1]
    update, make = stage.trained_by(method)
    context = Context(stage, 0, steps, make(), built.trainer.batches.target_slices)
    method.train()
    began = clock()
    for step in range(steps):
        context.step = step
        update(held[step % len(held)], context)
    return clock() - began
