"""Execute a planned run: train, select, evaluate, record, mirror."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

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
from glua_bench.data.parallel import turns
from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.errors import ConfigError, RunFailure, UserError, cause
from glua_bench.method import Batch, Method, Role
from glua_bench.records.environment import environment
from glua_bench.records.run_directory import RunDirectory
from glua_bench.records.tracker import open_tracker
from glua_bench.registry import Registry
from glua_bench.runs import carried
from glua_bench.runs.plan import LOST_SECONDS, PlannedRun, launch, make_fabric, roles
from glua_bench.runs.stage_cache import artefact_path
from glua_bench.runs.timing.parts import EVALUATION, FIGURES, SAMPLES, SLICES, Clock
from glua_bench.runs.trainer import Trainer, threads_of
from glua_bench.scoring.evaluation import evaluate, mean_score, summarise
from glua_bench.selection import ROLES, Candidate, Samples, Selector, choose, sample_pixels
from glua_bench.task import Case, Dataset, UnlabelledCase

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
    planned: PlannedRun, cache: SliceCache, progress: Progress, enough: int | None = None
) -> tuple[LabelledStore, LabelledStore | None, ImageStore | None]:
    """Read the slices for training and validation on the source, and for training on the target.

    The target's store is built from `UnlabelledCase`s, so no label file of the target is opened.
    Progress is shown if a volume is not cached yet.

    Args:
        planned: the run.
        cache: preprocessed slices.
        progress: progress bar.
        enough: number of training slices per domain that suffice; None reads all.
    """
    config, dataset = planned.config, planned.dataset
    chosen, neighbourhood = roles(config, dataset), Neighbourhood.of(config)
    names = ["source_train", "source_val"]
    names += ["target_train"] if planned.method_class.uses_target else []
    every = [(case, dataset.view(case.domain).on(config.grid)) for n in names for case in chosen[n]]
    missing = {id(case) for case, view in every if not cache.holds(case, view)}
    done = 0
    if missing and enough is None:
        progress.stage("prepare slices", len(missing), unit="case")

    def prepared(case: Case | UnlabelledCase) -> None:
        nonlocal done
        if id(case) in missing:
            done += 1
            if enough is None:
                progress.update(done)

    def labelled(cases: Sequence[Case | UnlabelledCase], enough: int | None) -> LabelledStore:
        images, labels = [], []
        for case in cases:
            assert isinstance(case, Case)
            view = dataset.view(case.domain).on(config.grid)
            images.append(cache.image(case.unlabelled(), view))
            labels.append(cache.label(case, view))
            prepared(case)
            if enough is not None and sum(image.shape[0] for image in images) >= enough:
                break
        return LabelledStore(images, labels, neighbourhood=neighbourhood)

    train = labelled(chosen["source_train"], enough)
    val = labelled(chosen["source_val"], None) if chosen["source_val"] else None
    target = None
    if planned.method_class.uses_target:
        # Apart from `labelled`, so that no label of the target can be read here.
        images = []
        for case in chosen["target_train"]:
            assert isinstance(case, UnlabelledCase)
            images.append(cache.image(case, dataset.view(case.domain).on(config.grid)))
            prepared(case)
            if enough is not None and sum(image.shape[0] for image in images) >= enough:
                break
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
    launch(fabric, planned.request.devices)
    if not fabric.is_global_zero:
        build_run(planned, fabric, Progress(enabled=False)).fit()
        return Summary(False, 0.0, pd.DataFrame(), [])
    began = time.perf_counter()
    warnings: list[str] = []
    with directory.lock():
        if directory.done:  # finished by another process in the meantime
            return _finished_summary(planned)
        if problem := directory.problem:
            place = directory.set_aside()
            warnings.append(
                f"{directory.path} was damaged ({problem}): its files were moved to {place}, and "
                "it was trained again"
            )
        directory.start(
            {
                **environment(),
                "run": planned.id,
                "code": planned.code,
                "data": asdict(planned.fingerprints),
                "privileged": planned.config.privileged,
                "distances": planned.dataset.distance_note,
                "protocol": planned.dataset.protocol,
                "caveat": planned.dataset.caveat(planned.config.direction),
                "device": str(fabric.device),
                # Recorded now, because defaults may change and methods may be removed.
                "changed": changed_settings(planned.config, planned.method_class),
                "variant": variant_name(planned.config, planned.method_class),
            },
            planned.stages,
        )
        try:
            cases = _train_and_score(planned, fabric, progress, began, draw, watch)
        except Stopped:
            raise
        except (UserError, RunFailure) as error:
            directory.fail(str(error))
            raise
        except Exception as error:  # a plugin may raise anything
            if planned.request.devices > 1:  # `launch` ends this process if another was killed
                time.sleep(LOST_SECONDS)
            known = cause(error)
            directory.fail(known or f"{type(error).__name__}: {error}")
            if known:
                raise RunFailure(known) from error
            raise
    if tracker is not None and not tracker.mirror(directory):
        warnings.append("the tracker lacks this run; upload it with `glua-bench sync`")
    return Summary(False, time.perf_counter() - began, summarise(cases), warnings)


def write_dataset_facts(planned: PlannedRun) -> None:
    """Store the facts about the dataset, with the usual intensities of the training images."""
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    images = [*chosen["source_train"], *chosen["target_train"]]
    facts = carried.facts_of(dataset, (config.source, config.target), images)
    carried.write(planned.directory.path, facts, dataset.carried())


def lacking(planned: PlannedRun) -> list[str]:
    """Return the requested selectors, and `--oracle`, that a finished run lacks.

    Without --selectors a run is taken as it is.
    """
    request, directory = planned.request, planned.directory
    missing: list[str] = []
    if request.selectors is not None:
        known = RunDirectory.open(directory.path).config.selectors
        missing += [name for name in planned.config.selectors if name not in known]
    if request.oracle and ORACLE not in directory.read_summary()["chosen_steps"]:
        missing.append("--oracle")
    return missing


def lacking_note(finished: Iterable[PlannedRun]) -> str:
    """Describe which finished runs of a matrix lack a requested selector; "" if none does."""
    missing = {planned.id: lacking(planned) for planned in finished}
    names = sorted({name for own in missing.values() for name in own})
    count = sum(bool(own) for own in missing.values())
    if not count:
        return ""
    return (
        f"{count} of the runs {'was' if count == 1 else 'were'} finished without "
        f"{', '.join(names)} and kept as {'it is' if count == 1 else 'they are'}; use another "
        "--runs directory to train and score all of them alike."
    )


def _finished_summary(planned: PlannedRun) -> Summary:
    if missing := lacking(planned):
        raise ConfigError(
            f"{planned.directory.path} was finished without {', '.join(missing)} and its other "
            "checkpoints are deleted; omit what is missing, or use another --runs directory to "
            "train it again."
        )
    return Summary(True, 0.0, summarise(planned.directory.read_cases()), [])


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
        self.trainer.load_candidate(step)
        self.method.eval()

    @torch.no_grad()
    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return logits under the run's precision."""
        with turns.taken(threads_of(self.trainer.fabric)), self.trainer.fabric.autocast():
            return self.method.predict(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the method's features under the run's precision."""
        with turns.taken(threads_of(self.trainer.fabric)), self.trainer.fabric.autocast():
            return self.method.features(images.to(memory_format=torch.channels_last), domain)

    @torch.no_grad()
    def translate(self, images: Tensor) -> Tensor:
        """Translate source images as the last stage does."""
        last = self.trainer.stages[-1]
        return images if last.translate is None else last.translate(images)


def build_run(
    planned: PlannedRun, fabric: Fabric, progress: Progress, enough: int | None = None
) -> BuiltRun:
    """Read the data of a planned run, build its method, and pass both to a trainer.

    Args:
        planned: from `plan`.
        fabric: from `make_fabric`.
        progress: progress bar.
        enough: as in `stores`.
    """
    config = planned.config
    train, val, target = stores(planned, SliceCache(), progress, enough)
    method = planned.build()
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
    samples = samples_of(built, sampled_roles([selector]), selector.uses_features)
    watch.see(step, score_of(built, selector, step, samples, {}))


def _train_and_score(
    planned: PlannedRun,
    fabric: Fabric,
    progress: Progress,
    began: float,
    draw: Draw | None,
    watch: Watch | None,
) -> pd.DataFrame:
    config, dataset, directory = planned.config, planned.dataset, planned.directory
    clock, judging = Clock(), Clock()
    with clock.on(SLICES):
        write_dataset_facts(planned)
        built = build_run(planned, fabric, progress)
    trainer = built.trainer
    if watch is not None:
        trainer.watch = partial(_report_candidate, built, watch)
    built.fit()
    scores = _selector_scores(built, progress, clock, judging)
    chosen = {name: choose(by_step) for name, by_step in scores.items()}
    primary = config.selectors[0]
    test = list(dataset.split(config.target, "test"))
    frames: dict[int, pd.DataFrame] = {}

    def evaluated(step: int, name: str) -> pd.DataFrame:
        """Evaluate a candidate; the primary selector's predictions are saved."""
        if step not in frames:
            with clock.on(EVALUATION):
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
    rows = directory.own_rows(rows)
    directory.write_cases(rows)
    if draw is not None:
        with clock.on(FIGURES):
            built.load(chosen[primary])
            batch, pictures = pictures_of(built)
            draw(directory, dataset, rows[rows["selector"] == primary], batch, pictures)
    for step in set(trainer.candidate_steps()) - set(chosen.values()):
        trainer.candidate_path(step).unlink(missing_ok=True)
    directory.finish(
        {
            "run": planned.id,
            "seconds": time.perf_counter() - began,
            "stage_seconds": trainer.seconds,
            "part_seconds": clock.seconds,
            "selector_seconds": judging.seconds,
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
    trainer.drop_checkpoints()
    return rows


def load_selectors(planned: PlannedRun) -> dict[str, Selector]:
    """Return the selectors of a run by name."""
    registry = Registry("selector", planned.request.plugins)
    return {name: registry.load(name)() for name in planned.config.selectors}


def _selector_scores(
    built: BuiltRun, progress: Progress, clock: Clock, judging: Clock
) -> dict[str, dict[int, float]]:
    """Return selector → candidate step → score.

    Args:
        built: the trained run.
        progress: progress bar.
        clock: receives the time of predictions at sampled pixels.
        judging: receives the time of each selector.
    """
    selectors = load_selectors(built.planned)
    names = list(selectors)
    steps = built.trainer.candidate_steps()
    sampled = sampled_roles(selectors.values())
    features = any(each.uses_samples and each.uses_features for each in selectors.values())
    late = {name: each for name, each in selectors.items() if each.uses_trajectory}
    early = {name: each for name, each in selectors.items() if name not in late}
    scores: dict[str, dict[int, float]] = {name: {} for name in selectors}
    trajectory: dict[int, Samples] = {}
    kept: dict[int, dict[str, Samples]] = {}
    done = 0
    progress.stage("select", len(steps) * (len(selectors) + bool(sampled)), quietly=True)

    def advance() -> None:
        nonlocal done
        done += 1
        progress.update(done)

    def judge(step: int, judges: Mapping[str, Selector], samples: dict[str, Samples]) -> None:
        for name, selector in judges.items():
            with judging.on(name):
                scores[name][step] = score_of(built, selector, step, samples, trajectory)
            advance()

    for step in steps:
        built.load(step)
        samples: dict[str, Samples] = {}
        if sampled:
            with clock.on(SAMPLES):
                samples = samples_of(built, sampled, features)
            advance()
        judge(step, early, samples)
        if late:
            kept[step] = samples
    # Weights are loaded again only for selectors that compare all candidates.
    trajectory = {s: own["target_train"] for s, own in kept.items() if "target_train" in own}
    for step, samples in kept.items():
        built.load(step)
        judge(step, late, samples)
    # Selectors without a score for any candidate (e.g. without target images) are left out.
    return {
        name: by_step
        for name, by_step in scores.items()
        if name == names[0] or not all(map(math.isnan, by_step.values()))
    }


def sampled_roles(selectors: Iterable[Selector]) -> set[str]:
    """Return the roles whose pixels any of the selectors reads."""
    return {role for each in selectors if each.uses_samples for role in each.samples_from}


def samples_of(
    built: BuiltRun, roles: Collection[str], features: bool = True
) -> dict[str, Samples]:
    """Return role → sampled pixels, predicted with the method's current weights.

    Args:
        built: the run.
        roles: the roles to sample.
        features: False omits features, which take a second forward pass.
    """
    samples = {}
    for role, store in zip(ROLES, (built.train, built.val, built.target), strict=True):
        if store is not None and role in roles:
            # Equal random styles for all candidates, whichever roles are sampled.
            torch.manual_seed(built.planned.config.seed)
            domain: Role = "target" if role.startswith("target") else "source"
            samples[role] = sample_pixels(
                partial(built.predict, domain=domain),
                partial(built.features, domain=domain) if features else None,
                store,
                built.translate if domain == "source" else lambda images: images,
                built.device,
            )
    return samples


def score_of(
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
    """Return the peak memory of the GPU, or of the process, in MiB; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # on Windows, where psutil knows it
        with suppress(ImportError, AttributeError):
            import psutil

            return float(psutil.Process().memory_info().peak_wset) / 2**20
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes or KiB


def pictures_of(built: BuiltRun, count: int = 6) -> tuple[Batch, dict[str, Tensor]]:
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
