"""How costs grow: exponents of power laws, memory of processes, and an estimate for one GPU.

A cost c that is measured at sizes n is described by c ~ n^p, where p is the slope of a straight
line through (log n, log c). Ten times the size then costs 10^p times as much. Each size is measured
in turn with the others, and the fit uses the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ROOT
from benchmarks.rows import Settings, alternate, span

MIB = 2**20


@dataclass(frozen=True)
class Growth:
    """A cost at several sizes.

    Attributes:
        name: e.g. "step.image".
        cost: what is measured.
        grows: what the sizes count.
        sizes: the sizes.
        values: the cost at each size, in seconds or MiB.
        unit: "s" or "MiB".
    """

    name: str
    cost: str
    grows: str
    sizes: tuple[float, ...]
    values: tuple[float, ...]
    unit: str = "s"

    @property
    def exponent(self) -> float:
        """Slope of log cost over log size."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.values), 1)[0])

    @property
    def last_exponent(self) -> float:
        """Slope between the two largest sizes, where constant costs matter least."""
        (a, b), (x, y) = self.sizes[-2:], self.values[-2:]
        return float(np.log(y / x) / np.log(b / a))

    def as_json(self) -> dict[str, Any]:
        """Return the row for the JSON document."""
        return {**vars(self), "exponent": self.exponent, "last_exponent": self.last_exponent}


@dataclass(frozen=True)
class Estimate:
    """What one update of a stage computes and moves, counted, and how long that takes a GPU.

    Attributes:
        name: method, stage and preset.
        operations: floating-point operations of convolutions and matrix products.
        moved: bytes that all operations read and write if nothing stays in a cache.
        kernels: number of operations.
        state: bytes of weights, gradients and the optimizers' states.
        saved: bytes that the largest forward pass keeps for its backward pass.
        updates: updates of the stage in a run.
        seconds: estimated seconds per update.
    """

    name: str
    operations: float
    moved: float
    kernels: int
    state: float
    saved: float
    updates: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the row for the JSON document."""
        return dict(vars(self))


# Assumptions of the estimate, of a card as in its data sheet and as networks like these use it.
PEAK, BANDWIDTH = 19.5e12, 1.555e12  # A100 40 GB: float32 outside tensor cores; bytes per second
SHARE_PEAK, SHARE_BANDWIDTH = 0.5, 0.7
LAUNCH = 5e-6  # seconds per kernel, the least that a host needs to start one


def measure(settings: Settings, parts: Sequence[str] = ()) -> Iterator[Growth | Estimate]:
    """Yield the rows of some parts, e.g. "sweep"; by default of all."""
    for name, part in PARTS.items():
        if not parts or name in parts:
            settings.report(f"scale: {name}")
            yield from part(settings)


def _timed(
    settings: Settings, sides: dict[float, Callable[[], object]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    named = {str(size): side for size, side in sides.items()}
    found = alternate(named, min(3, settings.rounds), 0.1, settings.clock)
    return tuple(sides), tuple(statistics.median(found[str(size)]) for size in sides)


# -- durations ------------------------------------------------------------------------------------


def step_time(settings: Settings) -> Iterator[Growth]:
    """Yield an update's duration over the side of the image, and over the batch."""
    from benchmarks.steps import configure, training_steps
    from glua_bench.task import Structure

    def last_step(name: str, *options: str) -> Callable[[], object]:
        return list(training_steps(configure(name, settings=options)))[-1][2]

    sides = (32, 64) if settings.quick else (64, 128, 256)
    for name in ("source_only",) if settings.quick else ("source_only", "glua", "sifa"):
        measured = {
            float(side): last_step(name, f"grid.size={side}", "batch_size=2") for side in sides
        }
        sizes, values = _timed(settings, measured)
        yield Growth(f"step.side.{name}", f"update of `{name}`", "side of the image", sizes, values)
    batches = (2, 4) if settings.quick else (2, 6, 20)
    batched = {float(n): last_step("source_only", f"batch_size={n}") for n in batches}
    sizes, values = _timed(settings, batched)
    yield Growth("step.batch", "update of `source_only`", "images per batch", sizes, values)
    classified = {}
    for count in (2, 4) if settings.quick else (4, 12, 40):
        structures = tuple(Structure(str(i), "", (i,), "") for i in range(1, count + 1))
        ((*_, step),) = training_steps(configure("source_only"), structures)
        classified[float(count)] = step
    sizes, values = _timed(settings, classified)
    yield Growth("step.classes", "update of `source_only`", "structures", sizes, values)


def preparation(settings: Settings) -> Iterator[Growth]:
    """Yield the preparation's duration over voxels of a volume and over cases."""
    import shutil

    from benchmarks import preparing

    folder = settings.scratch / "growing"
    folder.mkdir(exist_ok=True)
    turn = iter(range(10**6))

    def prepare(files: Sequence[tuple[Path, Path]]) -> None:
        out = folder / f"out{next(turn)}"
        out.mkdir()
        for image, label in files:
            preparing.ours(image, label, out)
        shutil.rmtree(out)

    sides = (24, 48) if settings.quick else (96, 160, 256)
    volumes = {}
    for side in sides:
        own = folder / f"side{side}"
        own.mkdir(exist_ok=True)
        shape = (side, side, side // 2)
        volumes[float(np.prod(shape))] = partial(prepare, [preparing.make_volume(own, shape)])
    sizes, values = _timed(settings, volumes)
    yield Growth("prepare.voxels", "preparing a volume", "voxels of the volume", sizes, values)
    files = [preparing.make_volume(folder, (64, 64, 32), number) for number in range(10)]
    cases = {float(count): partial(prepare, files[:count]) for count in (1, 3, 10)}
    sizes, values = _timed(settings, cases)
    yield Growth("prepare.cases", "preparing volumes", "cases", sizes, values)


def evaluation(settings: Settings) -> Iterator[Growth]:
    """Yield the duration of scores over structures and voxels, and of evaluations over cases."""
    import torch

    from benchmarks import small, steps
    from glua_bench.data.cache import SliceCache
    from glua_bench.scoring.evaluation import evaluate
    from glua_bench.scoring.metrics import case_metrics
    from glua_bench.task import Structure

    def blobs(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
        """Return labels of as many boxes, each of the same size."""
        rng = np.random.default_rng(seed)
        labels = np.zeros(shape, np.uint8)
        for label in range(1, count + 1):
            low = [rng.integers(0, size - size // 4) for size in shape]
            labels[tuple(slice(a, a + size // 4) for a, size in zip(low, shape, strict=True))] = (
                label
            )
        return labels

    def scores(shape: tuple[int, int, int], count: int) -> Callable[[], object]:
        structures = [Structure(str(i), "", (i,), "") for i in range(1, count + 1)]
        first, second = blobs(shape, count, 0), blobs(shape, count, 0)
        second = np.roll(second, 1, 1)
        return partial(case_metrics, first, second, structures, (1.0, 1.0, 1.0))

    side = 32 if settings.quick else 96
    classes = {float(count): scores((side,) * 3, count) for count in (1, 3, 10)}
    sizes, values = _timed(settings, classes)
    yield Growth("score.structures", "scores of a case", "structures", sizes, values)
    shapes = (24, 32) if settings.quick else (48, 96, 160)
    voxels = {float(n**3): scores((n,) * 3, 4) for n in shapes}
    sizes, values = _timed(settings, voxels)
    yield Growth("score.voxels", "scores of a case", "voxels", sizes, values)

    config = steps.configure("source_only", settings=steps.SMALL if settings.quick else ())
    ((method, *_),) = steps.training_steps(config)
    method.eval()
    with small.phantom(settings.scratch):
        dataset, cache = small.Phantom(), SliceCache()
        (case,) = dataset.split("ct", "test")[:1]

        def evaluated(count: int) -> None:
            evaluate(
                partial(method.predict, domain="target"),
                dataset,
                [case] * count,
                config.grid,
                cache,
                torch.device("cpu"),
                small.QUIET,
            )

        cases = {float(count): partial(evaluated, count) for count in (1, 3, 10)}
        sizes, values = _timed(settings, cases)
    yield Growth("evaluate.cases", "evaluation", "test cases", sizes, values)


def reports(settings: Settings) -> Iterator[Growth]:
    """Yield the duration of a report over runs (seeds and methods) and over cases."""
    from benchmarks.commands import make_runs, report

    counts = (10, 20) if settings.quick else (20, 60, 200)
    by_runs, by_cases = {}, {}
    for count in counts:
        root = settings.scratch / f"runs{count}"
        make_runs(root, count)
        by_runs[float(count)] = partial(report, root, settings.scratch / f"report{count}")
    sizes, values = _timed(settings, by_runs)
    grows = "runs (10 seeds, 2 directions, methods)"
    yield Growth("report.runs", "`report`", grows, sizes, values)
    for cases in (5, 10) if settings.quick else (10, 30, 100):
        root = settings.scratch / f"cases{cases}"
        make_runs(root, 20, cases)
        by_cases[float(cases)] = partial(report, root, settings.scratch / f"report_cases{cases}")
    sizes, values = _timed(settings, by_cases)
    yield Growth("report.cases", "`report` of 20 runs", "test cases", sizes, values)


def sweeping(settings: Settings) -> Iterator[Growth]:
    """Yield the duration of taking and ending a trial over the trials that a study has."""
    import optuna

    from benchmarks.sweeps import define
    from glua_bench.sweeps.study import SweepStudy

    counts = (10, 20) if settings.quick else (100, 300, 1000)
    for sampler in ("random", "tpe"):
        measured = {}
        for count in counts:
            definition = define(f"grown-{uuid.uuid4().hex[:8]}", 10**6, sampler)
            study = SweepStudy(definition, settings.scratch)
            rng = np.random.default_rng(0)
            study.study.add_trials(
                [
                    optuna.trial.create_trial(
                        params={"ratio": rng.random(), "weight": 10 ** -rng.uniform(0, 4)},
                        distributions={
                            "ratio": optuna.distributions.FloatDistribution(0, 1),
                            "weight": optuna.distributions.FloatDistribution(1e-4, 1, log=True),
                        },
                        value=float(rng.random()),
                    )
                    for _ in range(count)
                ]
            )

            def once(study: SweepStudy = study) -> None:
                claim = study.claim()
                assert claim is not None
                with study.holding(claim):
                    study.finish(claim, (0.5,), {})

            measured[float(count)] = once
        sizes, values = _timed(settings, measured)
        cost = f"taking and ending a trial, sampler `{sampler}`"
        yield Growth(f"sweep.trials.{sampler}", cost, "trials of the study", sizes, values)


# -- memory ---------------------------------------------------------------------------------------


def memory(settings: Settings) -> Iterator[Growth]:
    """Yield how much memory processes take above that of their imports, at most."""
    from benchmarks import preparing
    from benchmarks.commands import make_runs

    quick = settings.quick
    for side in (24, 48) if quick else (96, 160, 256):
        folder = settings.scratch / "growing" / f"side{side}"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            preparing.make_volume(folder, (side, side, side // 2))
    for count in (10, 20) if quick else (20, 60, 200):
        if not (settings.scratch / f"runs{count}").is_dir():
            make_runs(settings.scratch / f"runs{count}", count)
    tasks: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
        (
            "train",
            "an update of `glua`",
            "side of the image",
            (32, 64) if quick else (64, 128, 256),
        ),
        ("read", "batches of cached slices", "volumes", (2, 4) if quick else (4, 12, 40)),
        ("prepare", "preparing a volume", "voxels", (24, 48) if quick else (96, 160, 256)),
        ("report", "`report`", "runs", (10, 20) if quick else (20, 60, 200)),
    )
    for task, cost, grows, sizes in tasks:
        values = []
        for size in sizes:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scale", task, str(size), str(settings.scratch)],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            imported, peak = json.loads(done.stdout.splitlines()[-1])
            values.append(max(1.0, peak - imported))
        counted = tuple(n * n * (n // 2) if task == "prepare" else n for n in sizes)
        whole = tuple(map(float, counted))
        title = f"peak memory: {cost} (above the {imported:.0f} MiB of imports)"
        yield Growth(f"memory.{task}", title, grows, whole, tuple(values), "MiB")


def peak_memory() -> float:
    """Return the peak memory of this process in MiB.

    `getrusage` would count what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) / 1024


def child(task: str, size: int, scratch: Path) -> tuple[float, float]:
    """Do a task in this process; return its peak memory after the imports and after all, in MiB."""
    import torch

    from benchmarks import commands, loading, preparing
    from benchmarks.steps import configure, training_steps

    torch.set_num_threads(1)
    if task == "train":
        options = (f"grid.size={size}", "batch_size=4")
        steps = training_steps(configure("glua", settings=options))
        imported = peak_memory()
        for *_, step in steps:
            step()
    elif task == "read":
        folder = scratch / f"read{size}"
        folder.mkdir()
        # Made by another process: what it held would count as this one's.
        made = os.fork()
        if not made:
            loading.make_files(folder, size, 20, 128)
            os._exit(0)
        os.waitpid(made, 0)
        imported = peak_memory()
        batches = loading.ours(folder, size, 20, 128, in_memory=False)(False)
        for _ in range(50):
            next(batches)
    elif task == "prepare":
        preparing.make_volume(scratch, (16, 16, 8), size)  # imports what reads and writes need
        own, out = scratch / "growing" / f"side{size}", scratch / f"memory{size}"
        out.mkdir()
        imported = peak_memory()
        preparing.ours(own / "0_image.nii.gz", own / "0_label.nii.gz", out)
    else:
        commands.in_process("report", "--help")
        imported = peak_memory()
        commands.report(scratch / f"runs{size}", scratch / f"memory_report{size}")
    return imported, peak_memory()


# -- what to expect on one GPU --------------------------------------------------------------------


def estimates(settings: Settings) -> Iterator[Estimate]:
    """Yield the counts of one update of each stage of the preset `standard`."""
    from benchmarks.steps import SMALL, configure, training_steps

    for name in ("source_only",) if settings.quick else ("source_only", "glua", "sifa"):
        whole = configure(name, "standard", SMALL if settings.quick else ())
        part = replace(whole, batch_size=2)  # counted faster; counts are proportional to it
        for method, stage, step in training_steps(part):
            settings.report(f"counting {name}, stage {stage.name}")
            updates = stage.steps(whole.steps)
            times = whole.batch_size / part.batch_size
            yield count(f"{name}, {stage.name}", method, step, updates, times)


def count(
    name: str, method: Any, step: Callable[[], object], updates: int, times: float
) -> Estimate:
    """Count operations and bytes of one update, and estimate its duration on a GPU.

    Each operation takes as long as its arithmetic or its traffic, whichever is longer, and at least
    the time to launch it.

    Args:
        name: of the estimate.
        method: whose weights are counted.
        step: one update.
        updates: number of updates in a run.
        times: factor on operations and traffic, for a larger batch than that of `step`.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    from benchmarks.convolutions import eager

    total = {"operations": 0.0, "moved": 0.0, "kernels": 0, "seconds": 0.0}
    live: dict[int, int] = {}
    peaks = [0]

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.is_view:
                return out
            packet = func.overloadpacket
            done = 0.0
            if packet in flop_registry:
                done = times * flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            moved = times * sum(t.numel() * t.element_size() for t in tensors)
            total["operations"] += done
            total["moved"] += moved
            total["kernels"] += 1
            total["seconds"] += max(
                done / (PEAK * SHARE_PEAK), moved / (BANDWIDTH * SHARE_BANDWIDTH), LAUNCH
            )
            return out

    class Kept:
        """A saved tensor, counted while its graph lives."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.key = tensor.untyped_storage().data_ptr()
            self.size = tensor.untyped_storage().nbytes()
            live[self.key] = live.get(self.key, 0) + 1
            kept_bytes[self.key] = self.size
            peaks.append(sum(kept_bytes[key] for key in live))

        def __del__(self) -> None:
            live[self.key] -= 1
            if not live[self.key]:
                del live[self.key]

    kept_bytes: dict[int, int] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)
    with eager(), hooks, Counter():
        step()
    weights = sum(p.numel() * p.element_size() for p in method.parameters())
    return Estimate(
        name,
        total["operations"],
        total["moved"],
        int(total["kernels"]),
        4.0 * weights,  # weights, gradients and Adam's two moments
        times * max(peaks),
        updates,
        total["seconds"],
    )


PARTS: Mapping[str, Callable[[Settings], Iterator[Growth | Estimate]]] = {
    "step": step_time,
    "prepare": preparation,
    "evaluate": evaluation,
    "report": reports,
    "sweep": sweeping,
    "memory": memory,
    "gpu": estimates,
}


# -- output ---------------------------------------------------------------------------------------


def markdown(rows: Sequence[Growth | Estimate]) -> str:
    """Return both tables."""
    grown = [row for row in rows if isinstance(row, Growth)]
    counted = [row for row in rows if isinstance(row, Estimate)]
    lines = []
    if grown:
        lines += [
            "| cost | grows with | measured at | cost there | exponent (of the last two) | 10 × |",
            "|---|---|---|---|---|---|",
        ]
    for row in grown:
        show = span if row.unit == "s" else "{:.0f} MiB".format
        at = ", ".join(f"{size:,.0f}" for size in row.sizes)
        values = ", ".join(map(show, row.values))
        exponent = f"{row.exponent:.2f} ({row.last_exponent:.2f})"
        lines.append(
            f"| {row.cost} | {row.grows} | {at} | {values} | {exponent} | "
            f"{10**row.exponent:.2g} × |"
        )
    if counted:
        lines += [
            "",
            "One update in the preset `standard`, counted, and its duration on one GPU, "
            "**estimated** (GPU: not measured):",
            "",
            "| stage | GFLOP | GB moved | operations | weights, gradients, Adam | kept for the "
            "backward pass | updates | ms per update | stage |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in counted:
        lines.append(
            f"| {row.name} | {row.operations / 1e9:.0f} | {row.moved / 1e9:.1f} | "
            f"{row.kernels:,} | {row.state / MIB:.0f} MiB | {row.saved / MIB:,.0f} MiB | "
            f"{row.updates:,} | {1000 * row.seconds:.0f} | {row.updates * row.seconds / 60:.0f} "
            "min |"
        )
    return "\n".join(lines).strip()


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
