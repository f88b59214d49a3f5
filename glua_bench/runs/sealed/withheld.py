"""What the process that trains gets of a run: no label of a target case, and no way to one.

A `Withheld` is made of prepared slices: those of the source with their labels, those of the target
and of the test cases without. It holds neither the dataset nor a `Case`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from glua_bench.config import RunConfig
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache, cache_root
from glua_bench.data.formats import files_of
from glua_bench.data.parallel import turns_folder
from glua_bench.data.stores import CachedImage, CachedLabel
from glua_bench.errors import DataError
from glua_bench.method import Method
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs.plan import Fingerprints, PlannedRun, build_method, roles
from glua_bench.runs.request import RunRequest
from glua_bench.runs.sealed.seal import Reach
from glua_bench.task import Case, Structure, UnlabelledCase, common_channels


@dataclass(frozen=True)
class Withheld:
    """A planned run without the labels of the target.

    Attributes:
        config: its complete configuration.
        request: the user's request, without the directory of the data.
        directory: its run directory.
        method_class: the method.
        stages: name and steps of each stage.
        fingerprints: digests of its files.
        structures: the classes.
        channels: number of input channels.
        train: image and label of each source case for training.
        val: image and label of each source case for validation.
        target: images for training on the target; None if the method uses none.
        test: id and image of each test case, in order.
    """

    config: RunConfig
    request: RunRequest
    directory: RunDirectory
    method_class: type[Method]
    stages: tuple[tuple[str, int], ...]
    fingerprints: Fingerprints
    structures: tuple[Structure, ...]
    channels: int
    train: tuple[tuple[CachedImage, CachedLabel], ...]
    val: tuple[tuple[CachedImage, CachedLabel], ...]
    target: tuple[CachedImage, ...] | None
    test: tuple[tuple[str, CachedImage], ...] = ()

    def build(self) -> Method:
        """Build the method with its initial weights; see `build_method`."""
        return build_method(self.config, self.structures, self.method_class, self.channels)


def withhold(
    planned: PlannedRun,
    cache: SliceCache,
    progress: Progress,
    enough: int | None = None,
    scored: bool = True,
) -> Withheld:
    """Prepare the slices of a run, and return it without the labels of the target.

    The target's images are read from `UnlabelledCase`s, so that no label file of the target is
    opened. Progress is shown if a volume is not cached yet.

    Args:
        planned: the run.
        cache: preprocessed slices.
        progress: progress bar.
        enough: number of training slices per domain that suffice; None prepares all.
        scored: whether test cases will be predicted.
    """
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    names = ["source_train", "source_val"]
    names += ["target_train"] if planned.method_class.uses_target else []
    every: list[Case | UnlabelledCase] = [case for name in names for case in chosen[name]]
    test = [c.unlabelled() for c in chosen["test"] if isinstance(c, Case)] if scored else []
    views = {name: dataset.view(name).on(config.grid) for name in (config.source, config.target)}
    missing = {id(c) for c in (*every, *test) if not cache.holds(c, views[c.domain])}
    done = 0
    if missing and enough is None:
        progress.stage("prepare slices", len(missing), unit="case")

    def prepared(case: Case | UnlabelledCase) -> None:
        nonlocal done
        if id(case) in missing:
            done += 1
            if enough is None:
                progress.update(done)

    def labelled(
        cases: Sequence[Case | UnlabelledCase], enough: int | None
    ) -> tuple[tuple[CachedImage, CachedLabel], ...]:
        found = []
        for case in cases:
            assert isinstance(case, Case)
            view = views[case.domain]
            found.append((cache.image(case.unlabelled(), view), cache.label(case, view)))
            prepared(case)
            if enough is not None and sum(image.shape[0] for image, _ in found) >= enough:
                break
        return tuple(found)

    # Apart from `labelled`, so that no label of the target can be read here.
    def unlabelled(
        cases: Sequence[Case | UnlabelledCase], enough: int | None
    ) -> tuple[CachedImage, ...]:
        found = []
        for case in cases:
            assert isinstance(case, UnlabelledCase)
            found.append(cache.image(case, views[case.domain]))
            prepared(case)
            if enough is not None and sum(image.shape[0] for image in found) >= enough:
                break
        return tuple(found)

    train, val = labelled(chosen["source_train"], enough), labelled(chosen["source_val"], None)
    target = None
    if planned.method_class.uses_target:
        target = unlabelled(chosen["target_train"], enough)
    images = unlabelled(test, None)
    return Withheld(
        config,
        replace(planned.request, data_root=None),
        planned.directory,
        planned.method_class,
        tuple(planned.stages),
        planned.fingerprints,
        dataset.structures,
        common_channels(dataset, config.direction),
        train,
        val,
        target,
        tuple((case.id, image) for case, image in zip(test, images, strict=True)),
    )


def reach_of(planned: PlannedRun, withheld: Withheld, temporary: Path) -> Reach:
    """Return the files that the training of a run needs, and the labels that it must not read.

    Args:
        planned: the run.
        withheld: what its training gets.
        temporary: directory of its temporary files.
    """
    config, dataset = planned.config, planned.dataset
    images = [image for image, _ in (*withheld.train, *withheld.val)]
    images += [*(withheld.target or ()), *(image for _, image in withheld.test)]
    read = [channel.path for image in images for channel in image.channels]
    read += [label.path for _, label in (*withheld.train, *withheld.val)]
    labels = [SliceCache().root / "labels"]
    splits = ("test",) if config.privileged else ("train", "val", "test")
    for case in (case for split in splits for case in dataset.labelled(config.target, split)):
        try:
            labels += files_of(case.truth)
        except DataError:  # a missing label cannot be read
            continue
    stages = cache_root() / "stages"
    shared = [stages]
    with suppress(OSError):  # of a cache that this user may only read
        stages.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        shared.append(turns_folder())
    return Reach(
        tuple(map(str, read)),
        tuple(sorted({*_code(), *(os.path.dirname(p.resolve()) for p in planned.request.plugins)})),
        tuple(map(str, (withheld.directory.path, temporary, *shared))),
        tuple(map(os.path.abspath, labels)),
    )


def _code() -> set[str]:
    """Return the directories of all packages that this process has imported."""
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        if "." not in name and name != "__main__":
            found |= {
                path for path in getattr(module, "__path__", None) or () if os.path.isabs(path)
            }
        elif name.startswith("glua_bench."):
            file: str | None = getattr(module, "__file__", None)
            found |= {os.path.dirname(file)} if file else set()
    return found
