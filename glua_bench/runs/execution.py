"""From a plan to a finished run: train, select, evaluate, record, mirror."""

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
from glua_bench.runs.stage_cache import artefacts
from glua_bench.runs.trainer import Trainer
from glua_bench.scoring.evaluation import evaluate, mean_score, summarise
from glua_bench.selection import ROLES, Candidate, Samples, Selector, choose, sample_pixels
from glua_bench.task import Case, Dataset, UnlabelledCase


@dataclass
class Summary:
    """What `execute` reports."""

    already_done: bool
    seconds: float
    table: pd.DataFrame
    warnings: list[str]


def stores(
    planned: PlannedRun, cache: SliceCache, progress: Progress
) -> tuple[LabelledStore, LabelledStore | None, ImageStore | None]:
    """Source training, source validation and target training slices.

    The target's store is made of `UnlabelledCase`s, so no label file of the target is opened.
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
        images = []
        for case in chosen["target_train"]:
            assert isinstance(case, UnlabelledCase)
            images.append(cache.image(case, dataset.view(case.domain).on(config.grid)))
            done += 1
            progress.update(done)
        target = ImageStore(images, neighbourhood=neighbourhood)
    return train, val, target


class Stopped(Exception):
    """A watcher ended the run early: it is neither done nor failed, and may be resumed."""


@dataclass(frozen=True)
class Watch:
    """Looks at the candidates of a run while it trains.

    Attributes:
        selector: whose score is computed.
        see: called with the candidate's step and its score; may raise `Stopped`.
    """

    selector: str
    see: Callable[[int, float], None]


Draw = Callable[[RunDirectory, Dataset, pd.DataFrame, Batch, dict[str, Tensor]], None]


def execute(
    planned: PlannedRun, progress: Progress, draw: Draw | None = None, watch: Watch | None = None
) -> Summary:
    """Train or resume, select, evaluate, record and mirror one run.

    Args:
        planned: from `plan`.
        progress: what the user sees.
        draw: makes the run's figures of its directory, dataset, rows of the primary selector,
            a batch of images, and the method's own pictures; None draws nothing.
        watch: sees the candidates while the run trains; None lets nobody see them.

    Raises:
        UserError: something given cannot be used.
        RunFailure: training stopped; the run is marked as failed.
        Stopped: `watch` ended it.
    """
    directory = planned.directory
    if directory.done:
        return _done_before(planned)
    root, mirrored = planned.request.runs_root, planned.request.mlflow
    tracker = open_tracker(root) if mirrored else None  # before hours of training
    fabric = make_fabric(planned.request, planned.config)
    fabric.launch()
    if not fabric.is_global_zero:
        _train(planned, fabric, Progress(enabled=False))
        return Summary(False, 0.0, pd.DataFrame(), [])
    began = time.perf_counter()
    with directory.lock():
        if directory.done:  # another process finished it while this one waited
            return _done_before(planned)
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
                # Said now, since a later version may have other defaults, or lack the method.
                "changed": changed_settings(planned.config, planned.method_class),
                "variant": variant_name(planned.config, planned.method_class),
            },
            planned.stages,
        )
        try:
            _carry(planned)
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
        warnings.append("the tracker lacks this run; send it with `glua-bench sync`")
    return Summary(False, time.perf_counter() - began, summarise(cases), warnings)


def _carry(planned: PlannedRun) -> None:
    """Keep what others need of the dataset, with intensities of the images that are trained on."""
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    images = [*chosen["source_train"], *chosen["target_train"]]
    facts = carried.facts_of(dataset, (config.source, config.target), images)
    carried.write(planned.directory.path, facts, dataset.carried())


def _done_before(planned: PlannedRun) -> Summary:
    cases = planned.directory.read_cases()
    if planned.request.oracle and ORACLE not in set(cases["selector"]):
        raise ConfigError(
            f"{planned.directory.path} was finished without --oracle, and its other checkpoints "
            "are deleted; give another --runs directory to train it again with --oracle."
        )
    return Summary(True, 0.0, summarise(cases), [])


def estimate(planned: PlannedRun, probe: int = 6) -> float:
    """Seconds that training would take, from a few steps of every stage on the real data.

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
            trainer.artefact = lambda stage: None  # the cache is for stages of real runs
            known = artefacts(planned, built.method)
            missing = [
                stage
                for stage in trainer.stages
                if (artefact := known(stage)) is None or not artefact.path.is_file()
            ]
            built.fit()
    return sum(
        trainer.seconds[stage.name] / stage.steps(probe) * stage.steps(planned.config.steps)
        for stage in missing
    )


@dataclass(frozen=True)
class BuiltRun:
    """A planned run with its data, its method, and the trainer that trains the one on the other.

    Attributes:
        planned: what is built.
        trainer: has the method and the batches. Hooks go here before `fit`: its `stages` may be
            replaced by watched copies, and it has a `watch` of its candidates.
        train: labelled source slices.
        val: labelled source slices that are not trained on, if there are any.
        target: unlabelled target slices, if the method uses them.
    """

    planned: PlannedRun
    trainer: Trainer
    train: LabelledStore
    val: LabelledStore | None
    target: ImageStore | None

    @property
    def method(self) -> Method:
        """The method that is trained."""
        return self.trainer.method

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.trainer.fabric.device

    def fit(self) -> None:
        """Train all stages, from the last checkpoint where there is one; see `Trainer.fit`."""
        try:
            self.trainer.fit()
        finally:
            self.trainer.batches.close()

    def load(self, step: int) -> None:
        """Give the method the weights of a candidate."""
        path = self.trainer.candidate_path(step)
        weights = torch.load(path, map_location=self.device, weights_only=True)
        self.method.load_state_dict(weights)
        self.method.eval()

    @torch.no_grad()
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Logits under the run's precision."""
        with self.trainer.fabric.autocast():
            return self.method.predict(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def features(self, images: Tensor, domain: Role) -> Tensor:
        """The method's features under the run's precision."""
        with self.trainer.fabric.autocast():
            return self.method.features(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def translate(self, images: Tensor) -> Tensor:
        """What the last stage makes of source images."""
        last = self.trainer.stages[-1]
        return images if last.translate is None else last.translate(images)


def build_run(planned: PlannedRun, fabric: Fabric, progress: Progress) -> BuiltRun:
    """Read the data of a planned run, build its method, and connect both to a trainer.

    Args:
        planned: from `plan`.
        fabric: from `make_fabric`.
        progress: what the user sees.
    """
    config = planned.config
    train, val, target = stores(planned, SliceCache(), progress)
    method = build_method(config, planned.dataset.structures, planned.method_class)
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
        artefacts(planned, method),
    )
    return BuiltRun(planned, trainer, train, val, target)


def _train(
    planned: PlannedRun, fabric: Fabric, progress: Progress, watch: Watch | None = None
) -> BuiltRun:
    built = build_run(planned, fabric, progress)
    if watch is not None:
        built.trainer.watch = partial(_show, built, watch)
    built.fit()
    return built


def _show(built: BuiltRun, watch: Watch, step: int) -> None:
    """Score the candidate whose weights the method has, and tell the watcher."""
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
    built = _train(planned, fabric, progress, watch)
    trainer = built.trainer
    predict = partial(built.predict, domain="target")
    scores = _selector_scores(built)
    chosen = {name: choose(by_step) for name, by_step in scores.items()}
    primary = config.selectors[0]
    test = list(dataset.split(config.target, "test"))
    frames: dict[int, pd.DataFrame] = {}

    def evaluated(step: int, name: str) -> pd.DataFrame:
        """Rows of a candidate; the primary selector's predictions are kept."""
        if step not in frames:
            built.load(step)
            frames[step] = evaluate(
                predict,
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

    for name, step in chosen.items():
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
    keep = set(chosen.values())
    for step in trainer.candidate_steps():
        if step not in keep:
            trainer.candidate_path(step).unlink(missing_ok=True)
    mean = summarise(rows)
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
            "scores": mean.to_dict("records"),
        }
    )
    trainer.last_path.unlink(missing_ok=True)  # a finished run does not go on from it
    return rows


def _selector_scores(built: BuiltRun) -> dict[str, dict[int, float]]:
    """Selector → candidate step → score."""
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
    # A selector that can judge no candidate (e.g. without target images) selects nothing.
    return {
        name: by_step
        for name, by_step in scores.items()
        if name == names[0] or not all(map(math.isnan, by_step.values()))
    }


def _domain(role: str) -> Role:
    """Whose images the slices of a role are, e.g. "source" of "source_val"."""
    return "target" if role.startswith("target") else "source"


def _samples(built: BuiltRun) -> dict[str, Samples]:
    """Role → pixels of its slices, as the method answers them with the weights that it has."""
    torch.manual_seed(built.planned.config.seed)  # styles drawn alike for every candidate
    return {
        role: sample_pixels(
            partial(built.predict, domain=_domain(role)),
            partial(built.features, domain=_domain(role)),
            store,
            built.translate if _domain(role) == "source" else lambda images: images,
            built.device,
        )
        for role, store in zip(ROLES, (built.train, built.val, built.target), strict=True)
        if store is not None
    }


def _score(
    built: BuiltRun,
    selector: Selector,
    step: int,
    samples: Mapping[str, Samples],
    trajectory: Mapping[int, Samples],
) -> float:
    """What a selector says of the weights that the method has."""
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
    """Peak memory in MiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _pictures(built: BuiltRun, count: int = 6) -> tuple[Batch, dict[str, Tensor]]:
    """Slices spread over the training ones, and what the method shows of them, (N, 1, H, W)."""

    def spread(store: ImageStore) -> np.ndarray:
        # The outermost slices of a volume show little, so the middle of each share is taken.
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
    shown = replace(
        batch,
        source_images=middle(batch.source_images),
        target_images=None if batch.target_images is None else middle(batch.target_images),
    )
    return shown, {name: middle(p).detach().float().cpu() for name, p in pictures.items()}
