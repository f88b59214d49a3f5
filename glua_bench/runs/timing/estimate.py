"""Estimate how long runs take, from finished runs of the same protocol or by timing short pieces.

An estimate has the parts of a run (see `timing.parts_of`): slices that are not cached, every stage
that is not reused, selectors, evaluation and figures. The upload to a tracker is not included, only
the import of MLflow where each run is a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from glua_bench.config import ORACLE
from glua_bench.console import Progress, duration
from glua_bench.data.cache import SliceCache
from glua_bench.data.formats import files_of
from glua_bench.data.neighbours import Neighbourhood
from glua_bench.errors import UserError
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs.execution import (
    BuiltRun,
    Draw,
    build_run,
    load_selectors,
    pictures_of,
    sampled_roles,
    samples_of,
    score_of,
    write_dataset_facts,
)
from glua_bench.runs.plan import PlannedRun, make_fabric, roles
from glua_bench.runs.stage_cache import artefact_path
from glua_bench.runs.timing.parts import EVALUATION, FIGURES, SELECTION, SLICES, parts_of
from glua_bench.scoring.evaluation import evaluate
from glua_bench.selection import SLICES as SAMPLED_SLICES
from glua_bench.selection import Samples
from glua_bench.task import Case, UnlabelledCase

START = "start"  # the part of a process that is started for each run
PROBE = 6  # timed updates of each stage
# A label resembles a prediction if it is moved by pixels and has a share of wrong ones.
SHIFT, WRONG = 2, 0.001


@dataclass(frozen=True)
class Estimate:
    """Expected duration of one or more runs.

    Attributes:
        parts: part → seconds, in the order of a run.
        reused: stages that are cached, or trained by an earlier run of the same matrix.
        basis: what it was computed from.
    """

    parts: Mapping[str, float]
    reused: tuple[str, ...] = ()
    basis: str = "timed on a few steps"

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts.values())


def breakdown(parts: Mapping[str, float], reused: Sequence[str] = ()) -> str:
    """Format parts in a line, e.g. "style 2:10, segment cached, evaluation 20 s".

    Parts below half a second are left out.
    """
    cells = [f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.5]
    return ", ".join([*cells, *(f"{name} cached" for name in reused)]) or "nothing to do"


@dataclass
class Estimator:
    """Estimates runs, and times each kind of run only once.

    Args:
        draw: draws a run's figures; None if the runs draw none.
        processes: whether each run is executed in its own process.
        threads: threads of a run; None keeps those of this process.
        report: receives a line before something is timed.
    """

    draw: Draw | None = None
    processes: bool = False
    threads: int | None = None
    report: Callable[[str], None] = lambda line: None
    _known: dict[str, tuple[dict[str, float], str]] = field(default_factory=dict)
    _claimed: set[str] = field(default_factory=set)  # what an earlier run will leave in the cache
    _start: float | None = None

    def of(self, planned: PlannedRun) -> Estimate:
        """Estimate a run that follows those estimated before.

        Args:
            planned: from `plan`.
        """
        method = planned.build()
        stages = tuple(method.stages())
        paths = {s.name: artefact_path(planned, method, s) for s in stages}
        reused = tuple(
            name
            for name, path in paths.items()
            if path is not None and (path.is_file() or str(path) in self._claimed)
        )
        key = f"{replace(planned.config, seed=0, perturbation=0)} {planned.request.oracle}"
        with self._threads():
            needed = {stage.name for stage in stages} - {*reused}
            if key not in self._known:
                self._known[key] = self._measured(planned, needed)
            known, basis = self._known[key]
            if not needed <= known.keys():  # all finished runs reused the stage
                known, basis = self._known[key] = probe(planned, self.draw), Estimate({}).basis
        self._claimed |= {str(path) for path in paths.values() if path is not None}
        parts = {START: self._start_seconds(planned.request.mlflow)} if self.processes else {}
        parts[SLICES] = self._slices(planned, known[SLICES])
        parts |= {s.name: 0.0 if s.name in reused else known[s.name] for s in stages}
        parts |= {name: known[name] for name in (SELECTION, EVALUATION, FIGURES)}
        if self.draw is None:
            parts[FIGURES] = 0.0
        return Estimate(parts, reused, basis)

    def _measured(self, planned: PlannedRun, needed: set[str]) -> tuple[dict[str, float], str]:
        """Return the parts of a kind of run, uncached, with the seconds per uncached volume."""
        found = finished_parts(planned)
        names = {name for parts in found for name in parts}
        if found and needed <= names:
            means = {
                name: statistics.mean(parts[name] for parts in found if name in parts)
                for name in names
            }
            # Finished runs do not tell how long a volume takes; their volumes are cached.
            runs = "run" if len(found) == 1 else "runs"
            return {**means, SLICES: 0.0}, f"from {len(found)} finished {runs}"
        config = planned.config
        name = config.scenario if config.privileged else config.method
        self.report(f"timing a few steps of {name} on {config.fold_name}")
        return probe(planned, self.draw), Estimate({}).basis

    def _slices(self, planned: PlannedRun, each: float) -> float:
        """Return the seconds for volumes that neither the cache nor an earlier run has."""
        cache, seconds = SliceCache(), 0.0
        for case, view in _volumes(planned):
            key = f"{case.image} {isinstance(case, Case)} {view.grid}"
            if key not in self._claimed and not cache.holds(case, view):
                seconds += each
            self._claimed.add(key)
        return seconds

    def _start_seconds(self, mlflow: bool) -> float:
        """Return the duration of starting a process that can execute a run."""
        if self._start is None:
            # Without the current directory, where a stray module could lie.
            code = "import sys; sys.path[:] = filter(None, sys.path); import "
            modules = "glua_bench.runs.execution, glua_bench.reports.run_figures"
            modules += ", mlflow" if mlflow else ""
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code + modules], check=False)
            self._start = time.perf_counter() - began
        return self._start

    @contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def finished_parts(planned: PlannedRun) -> list[dict[str, float]]:
    """Return the parts of finished runs that differ in seed and repeat only, on such a device."""
    found = []
    own = replace(planned.config, seed=0, perturbation=0)
    device = str(make_fabric(planned.request, planned.config).device)
    folder = planned.directory.path.parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            directory = RunDirectory.open(path)
            if replace(directory.config, seed=0, perturbation=0) != own or not directory.done:
                continue
            facts, summary = directory.read_environment(), directory.read_summary()
            parts, oracle = parts_of(summary), ORACLE in summary["chosen_steps"]
        except UserError:  # not a run, or one that cannot be read
            continue
        same = facts.get("code"), facts.get("device"), facts.get("threads"), oracle
        here = planned.code, device, torch.get_num_threads(), planned.request.oracle
        if parts and same == here:
            found.append(parts)
    return found


def _volumes(planned: PlannedRun) -> Iterator[tuple[Case | UnlabelledCase, Any]]:
    """Yield every volume that a run reads, with its view; of test cases the image only."""
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    names = ["source_train", "source_val", "test"]
    names += ["target_train"] if planned.method_class.uses_target else []
    for name in names:
        for case in chosen[name]:
            bare = case.unlabelled() if name == "test" and isinstance(case, Case) else case
            yield bare, dataset.view(case.domain).on(config.grid)


# -- timing short pieces ---------------------------------------------------------------------------


class _Ticks(Progress):
    """Notes when each update of each stage ends.

    Args:
        device: waited for, since a GPU computes asynchronously.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(enabled=False)
        self.at: dict[str, list[float]] = {}
        self.device = device

    def stage(
        self, name: str, total: int, start: int = 0, quietly: bool = False, unit: str = "step"
    ) -> None:
        self._name = name
        self.at[name] = [_now(self.device)]

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        self.at[self._name].append(_now(self.device))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def probe(planned: PlannedRun, draw: Draw | None = None) -> dict[str, float]:
    """Time short pieces of a run on its own data.

    Args:
        planned: from `plan`.
        draw: draws the run's figures.

    Returns:
        Part → seconds of the whole part if no stage is cached; `SLICES` → seconds per volume.
    """
    config = replace(planned.config, steps=PROBE, candidates=1)
    fabric = make_fabric(planned.request, config)
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory(Path(scratch), config, planned.id)
        trial = replace(planned, config=config, directory=directory)
        directory.start({})
        with closing(directory):
            ticks = _Ticks(fabric.device)
            built, each = _built(trial, fabric, ticks)
            stages = _time_stages(planned, built, ticks)
            selection, judging = _time_selection(planned, built)
            case, predictions, more, figures = _time_case(trial, built, draw)
    test = len(planned.dataset.split(config.target, "test"))
    return {
        SLICES: max(each, more),
        **stages,
        SELECTION: selection,
        EVALUATION: test * (case * _evaluated(planned, judging) + predictions),
        FIGURES: figures,
    }


def _built(trial: PlannedRun, fabric: Fabric, ticks: _Ticks) -> tuple[BuiltRun, float]:
    """Return the built trial on a part of the data, and the seconds per prepared volume."""
    write_dataset_facts(trial)  # reads images once; cached for the run
    cache = SliceCache()

    def missing() -> int:
        return sum(not cache.holds(case, view) for case, view in _volumes(trial))

    before, began = missing(), time.perf_counter()
    built = build_run(trial, fabric, ticks, enough=SAMPLED_SLICES)
    seconds = time.perf_counter() - began
    prepared = before - missing()
    return built, seconds / prepared if prepared else 0.0


def _time_stages(planned: PlannedRun, built: BuiltRun, ticks: _Ticks) -> dict[str, float]:
    trainer = built.trainer
    stages = trainer.stages
    trainer.artefact = lambda stage: None  # neither read nor write the cache
    trainer.stages = tuple(replace(stage, share=1.0) for stage in stages)
    built.fit()
    cases = len(roles(planned.config, planned.dataset)["target_train"])
    left_out = 1.0 if built.target is None else cases / (int(built.target.volumes[-1]) + 1)
    seconds = {}
    for stage in stages:
        at = ticks.at[stage.name]
        steps = np.diff(at)
        usual = float(steps[1:].mean())
        # The first step allocates memory; after the last one, the stage may read all images.
        first = max(0.0, float(steps[0]) - usual)
        rest = max(0.0, trainer.seconds[stage.name] - (at[-1] - at[0]))
        seconds[stage.name] = usual * stage.steps(planned.config.steps) + first
        seconds[stage.name] += rest * (left_out if stage.finish is not None else 1.0)
    return seconds


def _time_selection(planned: PlannedRun, built: BuiltRun) -> tuple[float, int]:
    """Return the seconds of all selectors for all candidates, and how many have a score."""
    selectors = load_selectors(planned)
    count = candidates(planned)
    seconds = 0.0
    samples: dict[str, Samples] = {}
    if wanted := sampled_roles(selectors.values()):
        began = time.perf_counter()
        features = any(each.uses_samples and each.uses_features for each in selectors.values())
        found = samples_of(built, wanted, features)
        samples = {role: _plausible(own) for role, own in found.items()}
        seconds += count * (time.perf_counter() - began)
    own = samples.get("target_train")
    trajectory = {} if own is None else dict.fromkeys(range(1, count + 1), own)
    scored = 0
    for selector in selectors.values():
        times = []
        for _ in range(2):  # the first time, a library may be imported
            began = time.perf_counter()
            score = score_of(built, selector, 1, samples, trajectory)
            times.append(time.perf_counter() - began)
        seconds += count * times[1] + max(0.0, times[0] - times[1])
        scored += not np.isnan(score)
    return seconds, scored


def _plausible(samples: Samples) -> Samples:
    """Return samples of many classes; an untrained network may predict a single one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples.logits.shape, generator=generator)
    noise = torch.randn(samples.features.shape, generator=generator)
    return Samples(logits, samples.features + noise, samples.labels)


def candidates(planned: PlannedRun) -> int:
    """Return the number of checkpoints that selectors score."""
    return min(planned.config.candidates, planned.config.steps)


def _evaluated(planned: PlannedRun, judging: int) -> float:
    """Return the expected number of checkpoints that are evaluated.

    All with --oracle; else the last one, and those that the other selectors choose, as if each
    chose at random.
    """
    count = candidates(planned)
    if planned.request.oracle:
        return count
    return 1 + (count - 1) * (1 - (1 - 1 / count) ** max(0, judging - 1))


def _time_case(
    trial: PlannedRun, built: BuiltRun, draw: Draw | None
) -> tuple[float, float, float, float]:
    """Time the evaluation of a test case of median size, and a run's figures.

    Returns:
        Seconds of predicting and scoring the case, of writing its prediction, of preparing its
        slices (0 if they are cached) and of all figures.
    """
    config, dataset, cache = trial.config, trial.dataset, SliceCache()
    test = sorted(dataset.split(config.target, "test"), key=lambda case: _bytes(case.image))
    case = test[len(test) // 2]
    view = dataset.view(case.domain).on(config.grid)
    cached = cache.holds(case.unlabelled(), view)
    began = time.perf_counter()
    cache.image(case.unlabelled(), view)
    preparing = 0.0 if cached else time.perf_counter() - began
    classes = built.method.task.classes
    plausible = np.roll(np.asarray(cache.label(case, view).open()), SHIFT, axis=-1)
    random = np.random.default_rng(0)
    wrong = random.random(plausible.shape) < WRONG
    plausible[wrong] = random.integers(0, classes, int(wrong.sum()))
    masks = F.one_hot(torch.from_numpy(plausible).long().clamp(max=classes - 1), classes)
    place = 0

    def predict(images: Tensor) -> Tensor:
        """Predict, but return a plausible mask; an untrained network may find nothing."""
        nonlocal place
        logits = built.predict(images, "target")
        own = masks[place : place + len(images)]
        place += len(images)
        return 9.0 * own.movedim(-1, 1).to(logits)

    def evaluated(predictions: Path | None) -> tuple[Any, float]:
        nonlocal place
        place, began = 0, time.perf_counter()
        rows = evaluate(
            predict,
            dataset,
            [case],
            config.grid,
            cache,
            built.device,
            Progress(enabled=False),
            predictions,
            neighbourhood=Neighbourhood.of(config),
        )
        return rows, time.perf_counter() - began

    rows, first = evaluated(trial.directory.predictions)
    _, again = evaluated(None)
    figures = 0.0
    if draw is not None:
        began = time.perf_counter()
        batch, pictures = pictures_of(built)
        draw(trial.directory, dataset, rows, batch, pictures)
        figures = time.perf_counter() - began
    return again, max(0.0, first - again), preparing, figures


def _bytes(image: Path) -> int:
    return sum(file.stat().st_size for file in files_of(Path(image)))
