"""The checks that a method sees no target label and uses what it may see."""

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
from glua_bench.conformance.leaks import plane_digest, ways_to_labels
from glua_bench.conformance.results import (
    METHOD_CHECKS,
    demand,
    demand_other,
    demand_same,
    explained,
    register,
)
from glua_bench.data.cache import SliceCache
from glua_bench.method import Batch, Context


@register(METHOD_CHECKS, "same_seed")
def _label_poison(bench: Bench) -> None:
    """Random values in every target label file, and the weights are the same, bit for bit."""
    data = bench.copy_of_data()
    poison_labels(data, data.cases(bench.target))
    demand_same(
        bench.baseline.weights,
        bench.train(dataset=data).weights,
        "with random target labels (the method reads target labels)",
    )


@register(METHOD_CHECKS, "same_seed")
def _labels_absent(bench: Bench) -> None:
    """Training works, and ends the same, where the target has no label files."""
    data = bench.copy_of_data()
    for case in data.cases(bench.target):
        case.truth.unlink()
    with explained("without target label files training stops"):
        weights = bench.train(dataset=data).weights
    demand_same(bench.baseline.weights, weights, "without target label files")


@register(METHOD_CHECKS, "trains")
def _no_way_to_labels(bench: Bench) -> None:
    """Nothing that a step is given leads to a target label or to the name of its file."""
    cases = bench.dataset.cases(bench.target)
    names = {case.truth.name for case in cases}
    cache = bench.fresh("cache")
    slices = set()
    with quiet_machine(cache):
        for case in cases:
            view = bench.dataset.view(case.domain).on(bench.dataset.grid("quick"))
            entry = SliceCache().label(case, view)
            names.add(entry.path.stem)
            slices |= {plane_digest(plane) for plane in entry.open() if plane.any()}
    found: list[str] = []

    def look(batch: Batch, context: Context) -> None:
        if context.step == 0:
            found.extend(
                ways_to_labels({"batch": batch, "context": context}, names, slices, (Training,))
            )

    bench.train(steps=1, inspect_step=look)
    demand(not found, f"a target label can be reached: {'; '.join(found[:3])}")


@register(METHOD_CHECKS, "trains")
def _target_served(bench: Bench) -> None:
    """Target images are served exactly where `uses_target` asks for them."""
    wanted = bench.method.uses_target
    demand(
        all(served == wanted for served in bench.baseline.served),
        f"uses_target is {wanted}, but target images were {'not ' if wanted else ''}served",
    )


@register(METHOD_CHECKS, "same_seed")
def _target_matters(bench: Bench) -> str | None:
    """A method that declares `uses_target` ends elsewhere with other target images."""
    if not bench.method.uses_target:
        return "the method does not use the target"
    data = bench.copy_of_data()
    for case in data.split(bench.target, "train"):
        rewrite_voxels(case.image, np.flipud)
    demand_other(
        bench.baseline.weights,
        bench.train(dataset=data).weights,
        "mirrored target images change no weight: set `uses_target = False`, or use them",
    )
    return None


@register(METHOD_CHECKS, "same_seed")
def _source_labels_matter(bench: Bench) -> None:
    """Random source labels change the weights; otherwise the label checks would prove nothing."""
    data = bench.copy_of_data()
    source = bench.config().source
    poison_labels(data, data.cases(source))
    demand_other(
        bench.baseline.weights,
        bench.train(dataset=data).weights,
        "random source labels change no weight",
    )


@register(METHOD_CHECKS, "source_labels_matter")
def _unannotated(bench: Bench) -> None:
    """Source pixels that nobody annotated are trained on as no class, background included."""
    source, last = bench.config().source, bench.dataset.structures[-1].values[0]

    def trained(value: int) -> dict[str, Tensor]:
        """Weights after a training on labels of which one half has a value."""

        def half(voxels: np.ndarray) -> np.ndarray:
            voxels[: len(voxels) // 2] = value
            return voxels

        data = bench.copy_of_data()
        for case in data.split(source, "train"):
            rewrite_voxels(case.truth, half)
        return bench.train(dataset=data).weights

    with explained("with labels that hold task.UNANNOTATED it does not train", _UNANNOTATED_ADVICE):
        unknown = trained(bench.dataset.reading.unannotated_values[0])
    for name, value in (("background", 0), ("the last structure", last)):
        what = f"pixels that nobody annotated count as {name} ({_UNANNOTATED_ADVICE})"
        demand_other(unknown, trained(value), what)


_UNANNOTATED_ADVICE = (
    "take losses of glua_bench.losses, or leave pixels whose label is task.UNANNOTATED out of "
    "every sum and mean of your own; losses.annotated tells them"
)
