"""Train, select and predict: all that calls a method or a selector.

Runs in a process without target labels (`child.py`); checks of plugins and estimates call the same
functions in their own process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from glua_bench.console import Progress
from glua_bench.data.batches import Batches
from glua_bench.data.cache import SliceCache
from glua_bench.data.neighbours import Neighbourhood, middle
from glua_bench.data.parallel import turns
from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.data.volumes import restore
from glua_bench.files import replacing
from glua_bench.method import Batch, Method, Role
from glua_bench.registry import Registry
from glua_bench.runs.plan import PlannedRun
from glua_bench.runs.sealed.withheld import Withheld, withhold
from glua_bench.runs.stage_cache import artefact_path
from glua_bench.runs.timing.parts import EVALUATION, FIGURES, SAMPLES, SLICES, Clock
from glua_bench.runs.trainer import Trainer, threads_of
from glua_bench.scoring.evaluation import predict_volumes
from glua_bench.selection import ROLES, Candidate, Samples, Selector, choose, sample_pixels

SCRATCH = ".predicted"  # directory of label maps that are not scored yet


class Stopped(Exception):
    """A watcher stopped the run: it is neither done nor failed, and can be resumed."""


class Reports(Protocol):
    """Receives what a training tells the process that scores.

    Attributes:
        progress: progress bar.
        watched: selector whose score of each candidate is told; "" for none.
        pictures: whether the method's pictures are wanted.
    """

    progress: Progress
    watched: str
    pictures: bool

    def seen(self, step: int, score: float) -> None:
        """Tell a candidate's score, which no label of the target enters; may raise `Stopped`."""

    def trained(self) -> None:
        """Tell that all stages are trained."""

    def selected(
        self, chosen: Mapping[str, int], scores: Mapping[str, Mapping[int, float]]
    ) -> None:
        """Tell which candidate each selector chose."""

    def predicted(self, step: int, case: str) -> None:
        """Tell that the label map of a test case is written to `predicted_path`."""


def predicted_path(run: Path, step: int, case: str) -> Path:
    """Return the file of a candidate's label map of a test case, in a run's directory."""
    return run / SCRATCH / str(step) / f"{case}.npy"


def pictures_path(run: Path) -> Path:
    """Return the file of the method's pictures, in a run's directory."""
    return run / SCRATCH / "pictures.npz"


def stores(
    planned: PlannedRun, cache: SliceCache, progress: Progress, enough: int | None = None
) -> tuple[LabelledStore, LabelledStore | None, ImageStore | None]:
    """Prepare and open the slices of a run for training and validation; see `withhold`."""
    return opened(withhold(planned, cache, progress, enough, scored=False))


def opened(
    withheld: Withheld,
) -> tuple[LabelledStore, LabelledStore | None, ImageStore | None]:
    """Open the slices for training and validation on the source, and for training on the target."""
    neighbourhood = Neighbourhood.of(withheld.config)

    def labelled(pairs: Any) -> LabelledStore | None:
        if not pairs:
            return None
        images, labels = zip(*pairs, strict=True)
        return LabelledStore(images, labels, neighbourhood=neighbourhood)

    train, val = labelled(withheld.train), labelled(withheld.val)
    assert train is not None, "a run has source cases"
    target = None
    if withheld.target is not None:
        target = ImageStore(withheld.target, neighbourhood=neighbourhood)
    return train, val, target


@dataclass(frozen=True)
class BuiltRun:
    """A run with its data and a trainer for its method.

    Attributes:
        planned: the run, without the labels of the target.
        trainer: holds the method and the batches. Hooks are set before `fit`: `stages` may be
            replaced by wrapped copies, and `watch` observes the candidates.
        train: labelled source slices for training.
        val: labelled source slices for validation, if any.
        target: unlabelled target slices, if the method uses them.
    """

    planned: Withheld
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
    """Prepare the data of a planned run, and build it; see `withhold` and `build`."""
    return build(withhold(planned, SliceCache(), progress, enough, False), fabric, progress)


def build(withheld: Withheld, fabric: Fabric, progress: Progress) -> BuiltRun:
    """Open the data of a run, build its method, and pass both to a trainer.

    Args:
        withheld: from `withhold`.
        fabric: from `make_fabric`.
        progress: progress bar.
    """
    config = withheld.config
    train, val, target = opened(withheld)
    method = withheld.build()
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
        withheld.directory,
        progress,
        partial(artefact_path, withheld, method),
    )
    return BuiltRun(withheld, trainer, train, val, target)


def train_and_predict(withheld: Withheld, fabric: Fabric, reports: Reports) -> dict[str, Any]:
    """Train a run, choose checkpoints, predict the test cases with them, and draw the pictures.

    Args:
        withheld: from `withhold`.
        fabric: launched.
        reports: receives what is done.

    Returns:
        What the run's summary says of it: numbers and texts only.

    Raises:
        Stopped: the watcher stopped it.
        Exception: as `Trainer.fit`, or anything that a plugin raises.
    """
    clock, judging = Clock(), Clock()
    with clock.on(SLICES):
        built = build(withheld, fabric, reports.progress)
    trainer = built.trainer
    if reports.watched:
        trainer.watch = partial(_report_candidate, built, reports)
    built.fit()
    reports.trained()
    scores = _selector_scores(built, reports.progress, clock, judging)
    chosen = {name: choose(by_step) for name, by_step in scores.items()}
    reports.selected(chosen, scores)
    steps = [*dict.fromkeys(chosen.values())]
    if withheld.request.oracle:
        steps += [step for step in trainer.candidate_steps() if step not in steps]
    for step in steps:
        # One turn for many batches, since each change of turns costs some 20 ms.
        with clock.on(EVALUATION), turns.taken(threads_of(fabric)):
            built.load(step)
            for case, labels in predictions(built):
                turns.pass_on()
                with replacing(predicted_path(withheld.directory.path, step, case)) as temporary:
                    np.save(temporary, labels)
                reports.predicted(step, case)
    if reports.pictures:
        with clock.on(FIGURES):
            built.load(chosen[withheld.config.selectors[0]])
            _save_pictures(built)
    return {
        "stage_seconds": trainer.seconds,
        "part_seconds": clock.seconds,
        "selector_seconds": judging.seconds,
        "reused_stages": sorted(trainer.reused),
        "peak_memory_mib": _peak_memory(built.device),
    }


def predictions(built: BuiltRun) -> Iterator[tuple[str, np.ndarray]]:
    """Predict the test cases with the method's current weights.

    Batches span cases, so that all but the last are full.

    Yields:
        Id of a case, and uint8 class indices in the stored axes of its file.
    """
    cases, neighbourhood = built.planned.test, Neighbourhood.of(built.planned.config)
    stacks = (image.stacks(neighbourhood) for _, image in cases)
    found = predict_volumes(partial(built.predict, domain="target"), stacks, built.device)
    for (case, image), probabilities in zip(cases, found, strict=True):
        yield case, restore(probabilities, image.placement)


def _report_candidate(built: BuiltRun, reports: Reports, step: int) -> None:
    """Score the candidate whose weights the method has, and tell the score."""
    plugins = built.planned.request.plugins
    selector: Selector = Registry("selector", plugins).load(reports.watched)()
    samples = samples_of(built, sampled_roles([selector]), selector.uses_features)
    reports.seen(step, score_of(built, selector, step, samples, {}))


def load_selectors(planned: PlannedRun | Withheld) -> dict[str, Selector]:
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


def _save_pictures(built: BuiltRun) -> None:
    """Write images and pictures for the run's figures."""
    batch, pictures = pictures_of(built)
    images = {"source_images": batch.source_images, "source_labels": batch.source_labels}
    if batch.target_images is not None:
        images["target_images"] = batch.target_images
    arrays = {f"batch {name}": value.cpu().numpy() for name, value in images.items()}
    arrays |= {f"picture {name}": value.numpy() for name, value in pictures.items()}
    with replacing(pictures_path(built.planned.directory.path)) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def read_pictures(run: Path) -> tuple[Batch, dict[str, Tensor]]:
    """Return what `train_and_predict` wrote for the figures of a run."""
    with np.load(pictures_path(run), allow_pickle=False) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    images = {name: found.get(f"batch {name}") for name in Batch.__dataclass_fields__}
    marked = "picture "
    pictures = {n.removeprefix(marked): v for n, v in found.items() if n.startswith(marked)}
    return Batch(**images), pictures  # type: ignore[arg-type]
