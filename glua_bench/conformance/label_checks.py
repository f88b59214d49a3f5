"""Checks that a method sees no target label, and uses the data that it may see."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from glua_bench.conformance.bench import (
    Bench,
    Training,
    poison_labels,
    quiet_machine,
    rewrite_voxels,
)
from glua_bench.conformance.leaks import label_leaks, slice_digest
from glua_bench.conformance.results import (
    METHOD_CHECKS,
    demand,
    demand_other,
    demand_same,
    failing,
    register,
)
from glua_bench.data.cache import SliceCache
from glua_bench.method import Batch, Context

_UNANNOTATED_ADVICE = (
    "use the losses of glua_bench.losses, or exclude pixels labelled task.UNANNOTATED from every "
    "sum and mean; losses.annotated returns a mask"
)


@register(METHOD_CHECKS, "same_seed")
def _label_poison(bench: Bench) -> None:
    """Random values in all target label files leave the weights bit-identical."""
    data = bench.copy_of_data()
    poison_labels(data, data.cases(bench.target))
    weights = bench.train(dataset=data).weights
    what = "with random target labels (the method must not read target labels)"
    demand_same(bench.baseline.weights, weights, what)


@register(METHOD_CHECKS, "same_seed")
def _labels_absent(bench: Bench) -> None:
    """Missing target label files leave the weights bit-identical."""
    data = bench.copy_of_data()
    for case in data.cases(bench.target):
        case.truth.unlink()
    with failing("training fails without target label files"):
        weights = bench.train(dataset=data).weights
    demand_same(bench.baseline.weights, weights, "without target label files")


@register(METHOD_CHECKS, "trains")
def _no_way_to_labels(bench: Bench) -> None:
    """No object passed to a step leads to a target label or its file name."""
    cases = bench.dataset.cases(bench.target)
    names = {case.truth.name for case in cases}
    slices = set()
    with quiet_machine(bench.fresh("cache")):
        for case in cases:
            view = bench.dataset.view(case.domain).on(bench.dataset.grid("quick"))
            entry = SliceCache().label(case, view)
            names.add(entry.path.stem)
            slices |= {slice_digest(plane) for plane in entry.open() if plane.any()}
    found: list[str] = []

    def inspect(batch: Batch, context: Context) -> None:
        roots = {"batch": batch, "context": context}
        if context.step == 0:
            found.extend(label_leaks(roots, names, slices, (Training,)))

    bench.train(steps=1, inspect_step=inspect)
    demand(not found, f"a step can reach target labels: {'; '.join(found[:3])}")


@register(METHOD_CHECKS, "trains")
def _target_served(bench: Bench) -> None:
    """Target images are served if and only if `uses_target` is set."""
    wanted = bench.method.uses_target
    demand(
        all(served == wanted for served in bench.baseline.served),
        f"uses_target is {wanted}, but target images were {'not ' if wanted else ''}served",
    )


@register(METHOD_CHECKS, "same_seed")
def _target_matters(bench: Bench) -> str | None:
    """If `uses_target` is set, other target images give other weights."""
    if not bench.method.uses_target:
        return "the method does not use the target"
    data = bench.copy_of_data()
    for case in data.split(bench.target, "train"):
        rewrite_voxels(case.image, np.flipud)
    weights = bench.train(dataset=data).weights
    what = "mirrored target images change no weight; use them, or set `uses_target = False`"
    demand_other(bench.baseline.weights, weights, what)
    return None


@register(METHOD_CHECKS, "same_seed")
def _source_labels_matter(bench: Bench) -> None:
    """Random source labels change the weights, so the label checks can fail."""
    data = bench.copy_of_data()
    poison_labels(data, data.cases(bench.config().source))
    weights = bench.train(dataset=data).weights
    what = "random source labels change no weight; train on batch.source_labels"
    demand_other(bench.baseline.weights, weights, what)


@register(METHOD_CHECKS, "source_labels_matter")
def _unannotated(bench: Bench) -> None:
    """Unannotated source pixels train no class, including the background."""

    def train_with(value: int) -> dict[str, Tensor]:
        """Return the weights after training with one half of all label volumes set to a value."""

        def overwrite(voxels: np.ndarray) -> np.ndarray:
            voxels[: len(voxels) // 2] = value
            return voxels

        data = bench.copy_of_data()
        for case in data.split(bench.config().source, "train"):
            rewrite_voxels(case.truth, overwrite)
        return bench.train(dataset=data).weights

    with failing("training fails on labels that contain task.UNANNOTATED", _UNANNOTATED_ADVICE):
        unannotated = train_with(bench.dataset.reading.unannotated_values[0])
    last = bench.dataset.structures[-1].values[0]
    for name, value in (("background", 0), ("the last structure", last)):
        what = f"unannotated pixels are trained as {name} ({_UNANNOTATED_ADVICE})"
        demand_other(unannotated, train_with(value), what)
