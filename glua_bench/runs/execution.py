"""Execute a planned run: train, select, evaluate, record, mirror."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor

from glua_bench.config import ORACLE, changed_settings, variant_name
from glua_bench.console import Progress
from glua_bench.data.batches import Batches
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import Neighbourhood, middle
from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.errors import ConfigError, RunFailure, UserError
from glua_bench.method import Batch, Method, Role
from glua_bench.records.environment import environment
from glua_bench.records.run_directory import RunDirectory
from glua_bench.records.tracker import open_tracker
from glua_bench.registry import Registry
from glua_bench.runs import carried
from glua_bench.runs.plan import PlannedRun, build_method, make_fabric, roles
from glua_bench.runs.stage_cache import artefact_path
from glua_bench.runs.trainer import Trainer
from glua_bench.scoring.evaluation import evaluate, mean_score, summarise
from glua_bench.selection import ROLES, Candidate, Samples, Selector, choose, sample_pixels
from glua_bench.task import Case, Dataset, UnlabelledCase, common_channels

# Draws a run's figures from its directory, dataset, rows of the primary selector, a batch of
# images, and the method's own pictures.
Draw = Callable[[RunDirectory, Dataset, pd.DataFrame, Batch, dict[str, Tensor]], None]


@dataclass
class Summary:
    """Result of `execute`.

    Attributes:
        already_done: True if the run was finished before.
        seconds: duration.
        table: mean scores per selector and structure.
        warnings: sentences for the user.
    """

    already_done: bool
    seconds: float
    table: pd.DataFrame
    warnings: list[str]


class Stopped(Exception):
    """A watcher stopped the run: it is neither done nor failed, and can be resumed."""


@dataclass(frozen=True)
class Watch:
    """Observer of the candidates of a run during training.

    Attributes:
        selector: selector that scores them.
        see: called with the candidate's step and its score; may raise `Stopped`.
    """

    selector: str
    see: Callable[[int, float], None]


def stores(
    planned: PlannedRun, cache: SliceCache, progress: Progress
) -> tuple[LabelledStore, LabelledStore | None, ImageStore | None]:
    """Read the slices for training and validation on the source, and for training on the target.

    The target's store is built from `UnlabelledCase`s, so no label file of the target is opened.
    """
    config, dataset = planned.config, planned.dataset
    chosen, neighbourhood = roles(config, dataset), Neighbourhood.of(config)
    total = sum(len(chosen[role]) for role in ("source_train", "source_val", "target_train"))
    progress.stage("read data", total)
    done = 0

    def labelled(cases: Sequence[Case | UnlabelledCase]) -> LabelledStore:
        nonlocal done
        images, labels = [], []
        for case in cases:
            assert isinstance(case, Case)
            view = dataset.view(case.domain).on(config.grid)
            images.append(cache.image(case.unlabelled(), view))
            labels.append(cache.label(case, view))
            done += 1
            progress.update(done)
        return LabelledStore(images, labels, neighbourhood=neighbourhood)

    train = labelled(chosen["source_train"])
    val = labelled(chosen["source_val"]) if chosen["source_val"] else None
    target = None
    if planned.method_class.uses_target:
        # Apart from `labelled`, so that no label of the target can be read here.
        images = []
        for case in chosen["target_train"]:
            assert isinstance(case, UnlabelledCase)
            images.append(cache.image(case, dataset.view(case.domain).on(config.grid)))
            done += 1
            progress.update(done)
        target = ImageStore(images, neighbourhood=neighbourhood)
    return train, val, target


def execute(
    planned: PlannedRun, progress: Progress, draw: Draw | None = None, watch: Watch | None = None
) -> Summary:
    """Train or resume, select, evaluate, record and mirror one run.

    Args:
        planned: from `plan`.
        progress: progress bar.
        draw: draws the run's figures; None draws none.
        watch: observes the candidates during training.

    Raises:
        UserError: the input is invalid.
        RunFailure: training stopped; the run is marked as failed.
        Stopped: `watch` stopped it.
    """
    directory = planned.directory
    if directory.done:
        return _finished_summary(planned)
    # Opened before training, so that a wrong address is reported at once.
    tracker = open_tracker(planned.request.runs_root) if planned.request.mlflow else None
    fabric = make_fabric(planned.request, planned.config)
    fabric.launch()
    if not fabric.is_global_zero:
        build_run(planned, fabric, Progress(enabled=False)).fit()
        return Summary(False, 0.0, pd.DataFrame(), [])
    began = time.perf_counter()
    with directory.lock():
        if directory.done:  # finished by another process in the meantime
            return _finished_summary(planned)
        directory.start(
            {
                **environment(),
                "run": planned.id,
                "code": planned.code,
                "data": asdict(planned.fingerprints),
                "privileged": planned.config.privileged,
                "distances": planned.dataset.distance_note,
                "protocol": planned.dataset.protocol,
                "device": str(fabric.device),
                # Recorded now, because defaults may change and methods may be removed.
                "changed": changed_settings(planned.config, planned.method_class),
                "variant": variant_name(planned.config, planned.method_class),
            },
            planned.stages,
        )
        try:
            _write_dataset_facts(planned)
            cases = _train_and_score(planned, fabric, progress, began, draw, watch)
        except Stopped:
            raise
        except (UserError, RunFailure) as error:
            directory.fail(str(error))
            raise
        except Exception as error:  # a plugin may raise anything
            directory.fail(f"{type(error).__name__}: {error}")
            raise
    warnings = []
    if tracker is not None and not tracker.mirror(directory):
        warnings.append("the tracker lacks this run; upload it with `glua-bench sync`")
    return Summary(False, time.perf_counter() - began, summarise(cases), warnings)


def _write_dataset_facts(planned: PlannedRun) -> None:
    """Store the facts about the dataset, with the usual intensities of the training images."""
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    images = [*chosen["source_train"], *chosen["target_train"]]
    facts = carried.facts_of(dataset, (config.source, config.target), images)
    carried.write(planned.directory.path, facts, dataset.carried())


def _finished_summary(planned: PlannedRun) -> Summary:
    cases = planned.directory.read_cases()
    if planned.request.oracle and ORACLE not in set(cases["selector"]):
        raise ConfigError(
            f"{planned.directory.path} was finished without --oracle and its other checkpoints "
            "are deleted; use another --runs directory to train it again with --oracle."
        )
    return Summary(True, 0.0, summarise(cases), [])


def estimate(planned: PlannedRun, probe: int = 6) -> float:
    """Return the expected training time in seconds, from a few steps of every stage on real data.

    Args:
        planned: from `plan`.
        probe: step budget of the trial.
    """
    config = replace(planned.config, steps=probe)
    fabric = make_fabric(planned.request, config)
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory(Path(scratch), config, planned.id)
        trial = replace(planned, config=config, directory=directory)
        directory.start({})
        with closing(directory):
            built = build_run(trial, fabric, Progress(enabled=False))
            trainer = built.trainer
            trainer.artefact = lambda stage: None  # do not write to the cache
            cached = partial(artefact_path, planned, built.method)
            missing = [s for s in trainer.stages if not ((path := cached(s)) and path.is_file())]
            built.fit()
    return sum(
        trainer.seconds[stage.name] / stage.steps(probe) * stage.steps(planned.config.steps)
        for stage in missing
    )


@dataclass(frozen=True)
class BuiltRun:
    """A planned run with its data and a trainer for its method.

    Attributes:
        planned: the run.
        trainer: holds the method and the batches. Hooks are set before `fit`: `stages` may be
            replaced by wrapped copies, and `watch` observes the candidates.
        train: labelled source slices for training.
        val: labelled source slices for validation, if any.
        target: unlabelled target slices, if the method uses them.
    """

    planned: PlannedRun
    trainer: Trainer
    train: LabelledStore
    val: LabelledStore | None
    target: ImageStore | None

    @property
    def method(self) -> Method:
        """The method."""
        return self.trainer.method

    @property
    def device(self) -> torch.device:
        """The device of the method."""
        return self.trainer.fabric.device

    def fit(self) -> None:
        """Train all stages; see `Trainer.fit`."""
        try:
            self.trainer.fit()
        finally:
            self.trainer.batches.close()

    def load(self, step: int) -> None:
        """Load the weights of a candidate."""
        path = self.trainer.candidate_path(step)
        weights = torch.load(path, map_location=self.device, weights_only=True)
        self.method.load_state_dict(weights)
        self.method.eval()

    @torch.no_grad()
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return logits under the run's precision."""
        with self.trainer.fabric.autocast():
            return self.method.predict(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the method's features under the run's precision."""
        with self.trainer.fabric.autocast():
            return self.method.features(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def translate(self, images: Tensor) -> Tensor:
        """Translate source images as the last stage does."""
        last = self.trainer.stages[-1]
        return images if last.translate is None else last.translate(images)


def build_run(planned: PlannedRun, fabric: Fabric, progress: Progress) -> BuiltRun:
    """Read the data of a planned run, build its method, and pass both to a trainer.

    Args:
        planned: from `plan`.
        fabric: from `make_fabric`.
        progress: progress bar.
    """
    config = planned.config
    train, val, target = stores(planned, SliceCache(), progress)
    channels = common_channels(planned.dataset, config.direction)
    method = build_method(config, planned.dataset.structures, planned.method_class, channels)
    batches = Batches(
        train,
        target,
        config.batch_size,
        config.seed,
        fabric.device,
        fabric.global_rank,
        fabric.world_size,
    )
    trainer = Trainer(
        method,
        config,
        batches,
        fabric,
        planned.directory,
        progress,
        partial(artefact_path, planned, method),
    )
    return BuiltRun(planned, trainer, train, val, target)


def _report_candidate(built: BuiltRun, watch: Watch, step: int) -> None:
    """Score the candidate whose weights the method has, and pass the score to the watcher."""
    selector: Selector = Registry("selector", built.planned.request.plugins).load(watch.selector)()
    samples = _samples(built) if selector.uses_samples else {}
    watch.see(step, _score(built, selector, step, samples, {}))


def _train_and_score(
    planned: PlannedRun,
    fabric: Fabric,
    progress: Progress,
    began: float,
    draw: Draw | None,
    watch: Watch | None,
) -> pd.DataFrame:
    config, dataset, directory = planned.config, planned.dataset, planned.directory
    built = build_run(planned, fabric, progress)
    trainer = built.trainer
    if watch is not None:
        trainer.watch = partial(_report_candidate, built, watch)
    built.fit()
    scores = _selector_scores(built)
    chosen = {name: choose(by_step) for name, by_step in scores.items()}
    primary = config.selectors[0]
    test = list(dataset.split(config.target, "test"))
    frames: dict[int, pd.DataFrame] = {}

    def evaluated(step: int, name: str) -> pd.DataFrame:
        """Evaluate a candidate; the primary selector's predictions are saved."""
        if step not in frames:
            built.load(step)
            frames[step] = evaluate(
                partial(built.predict, domain="target"),
                dataset,
                test,
                config.grid,
                SliceCache(),
                fabric.device,
                progress,
                directory.predictions if name == primary else None,
                f"evaluate {name}",
                Neighbourhood.of(config),
            )
        return frames[step]

    for name, step in chosen.items():  # the primary selector first
        evaluated(step, name)
    if planned.request.oracle:
        scores[ORACLE] = {
            step: mean_score(evaluated(step, f"step {step}")) for step in trainer.candidate_steps()
        }
        chosen[ORACLE] = choose(scores[ORACLE])
    rows = pd.concat(
        [frames[step].assign(selector=name, step=step) for name, step in chosen.items()],
        ignore_index=True,
    )
    rows.insert(0, "run", planned.id)
    rows = rows.assign(
        privileged_selection=rows["selector"] == ORACLE,
        method=config.method,
        dataset=config.fold_name,
        direction=config.direction,
        scenario=config.scenario,
        seed=config.seed,
        augmentation=config.augmentation,
    )
    directory.write_cases(rows)
    if draw is not None:
        built.load(chosen[primary])
        batch, pictures = _pictures(built)
        draw(directory, dataset, rows[rows["selector"] == primary], batch, pictures)
    for step in set(trainer.candidate_steps()) - set(chosen.values()):
        trainer.candidate_path(step).unlink(missing_ok=True)
    directory.finish(
        {
            "run": planned.id,
            "seconds": time.perf_counter() - began,
            "stage_seconds": trainer.seconds,
            "reused_stages": sorted(trainer.reused),
            "steps": dict(planned.stages),
            "peak_memory_mib": _peak_memory(built.device),
            "selector_scores": {n: {str(s): v for s, v in b.items()} for n, b in scores.items()},
            "chosen_steps": chosen,
            "privileged": config.privileged,
            "protocol": dataset.protocol,
            "scores": summarise(rows).to_dict("records"),
        }
    )
    trainer.last_path.unlink(missing_ok=True)  # only needed to resume
    return rows


def _selector_scores(built: BuiltRun) -> dict[str, dict[int, float]]:
    """Return selector → candidate step → score."""
    names = built.planned.config.selectors
    registry = Registry("selector", built.planned.request.plugins)
    selectors: dict[str, Selector] = {name: registry.load(name)() for name in names}
    steps = built.trainer.candidate_steps()
    samples: dict[int, dict[str, Samples]] = {step: {} for step in steps}
    if any(selector.uses_samples for selector in selectors.values()):
        for step in steps:
            built.load(step)
            samples[step] = _samples(built)
    trajectory = {s: own["target_train"] for s, own in samples.items() if "target_train" in own}
    scores: dict[str, dict[int, float]] = {name: {} for name in selectors}
    for step in steps:
        built.load(step)
        for name, selector in selectors.items():
            scores[name][step] = _score(built, selector, step, samples[step], trajectory)
    # Selectors without a score for any candidate (e.g. without target images) are left out.
    return {
        name: by_step
        for name, by_step in scores.items()
        if name == names[0] or not all(map(math.isnan, by_step.values()))
    }


def _samples(built: BuiltRun) -> dict[str, Samples]:
    """Return role → sampled pixels, predicted with the method's current weights."""
    torch.manual_seed(built.planned.config.seed)  # equal random styles for all candidates
    samples = {}
    for role, store in zip(ROLES, (built.train, built.val, built.target), strict=True):
        if store is not None:
            domain: Role = "target" if role.startswith("target") else "source"
            samples[role] = sample_pixels(
                partial(built.predict, domain=domain),
                partial(built.features, domain=domain),
                store,
                built.translate if domain == "source" else lambda images: images,
                built.device,
            )
    return samples


def _score(
    built: BuiltRun,
    selector: Selector,
    step: int,
    samples: Mapping[str, Samples],
    trajectory: Mapping[int, Samples],
) -> float:
    """Score the method's current weights by a selector."""
    torch.manual_seed(built.planned.config.seed)
    return selector.score(
        Candidate(
            step,
            built.predict,
            built.method.task.classes,
            built.val,
            built.translate,
            built.target,
            built.device,
            samples,
            trajectory,
        )
    )


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory of the GPU, or of the process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _pictures(built: BuiltRun, count: int = 6) -> tuple[Batch, dict[str, Tensor]]:
    """Return evenly spread training slices and the method's pictures of them, (N, 1, H, W)."""

    def spread(store: ImageStore) -> np.ndarray:
        # The middle of each share, because the outermost slices of a volume show little.
        return ((np.arange(count) + 0.5) * len(store) / count).astype(np.int64)

    device, train, target = built.device, built.train, built.target
    source = spread(train)
    batch = Batch(
        torch.from_numpy(train.images(source)).to(device),
        torch.from_numpy(train.labels(source)).to(device),
        None if target is None else torch.from_numpy(target.images(spread(target))).to(device),
    )
    torch.manual_seed(built.planned.config.seed)
    pictures = built.method.pictures(batch)
    centre = partial(middle, slices=built.planned.config.slices)
    shown = replace(
        batch,
        source_images=centre(batch.source_images),
        target_images=None if batch.target_images is None else centre(batch.target_images),
    )
    return shown, {name: centre(p).detach().float().cpu() for name, p in pictures.items()}
