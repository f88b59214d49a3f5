"""One trial: the runs that a configuration needs, and the values that they come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glua_bench import runs
from glua_bench.console import Progress
from glua_bench.errors import RunFailure
from glua_bench.sweeps.definition import Definition

See = Callable[[int, float], bool]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Args:
        values: one for each objective: quality (larger is better), then costs.
        facts: run ids, and the quality of each run under "direction, seed N".
    """

    values: tuple[float, ...]
    facts: Mapping[str, Any]


class Pruned(runs.Stopped):
    """A trial was ended early.

    Args:
        facts: as of an `Outcome`, of the runs that were finished before.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.facts = facts


def requests(definition: Definition, base: runs.RunRequest, params: Mapping[str, Any]) -> list:
    """The runs of a configuration: every direction with every seed, in a fixed order.

    Args:
        definition: of the sweep.
        base: what all runs share beyond the definition (directories, devices, plugins).
        params: setting → value.
    """
    chosen = [f"method.{name}={value}" for name, value in params.items()]
    return [
        replace(
            base,
            method=definition.method,
            dataset=definition.dataset,
            direction=direction,
            preset=definition.preset,
            seed=seed,
            assignments=[*base.assignments, *definition.settings, *chosen],
        )
        for seed in range(definition.seeds)
        for direction in definition.directions
    ]


def execute(
    definition: Definition,
    base: runs.RunRequest,
    params: Mapping[str, Any],
    progress: Progress,
    see: See,
) -> Outcome:
    """Run what a configuration needs; what is done already is read.

    Args:
        definition: of the sweep.
        base: what all runs share.
        params: setting → value.
        progress: what the user sees.
        see: told an intermediate step and value; returns whether the trial should end.

    Returns:
        The values: of quality the mean over the runs, each at the checkpoint that the objective
        chooses.

    Raises:
        Pruned: `see` asked for the end.
        UserError: the configuration is refused.
        RunFailure: a run failed, or the objective can judge none of its checkpoints.
    """
    qualities: dict[str, float] = {}
    seconds: list[float] = []
    ids: list[str] = []
    for request in requests(definition, base, params):
        planned = runs.plan(request)
        known = list(qualities.values())

        def watched(
            step: int, score: float, known: list[float] = known, run: runs.PlannedRun = planned
        ) -> None:
            # The mean of what is known by now, at a position that all trials pass alike.
            steps = len(known) * run.config.candidates
            place = steps + math.ceil(step * run.config.candidates / run.config.steps)
            mean = (sum(known) + score) / (len(known) + 1)
            if math.isfinite(mean) and see(place, mean):
                raise runs.Stopped

        pruned = definition.pruner in ("median", "hyperband")
        watch = runs.Watch(definition.selector, watched) if pruned else None
        try:
            runs.execute(planned, progress, watch=watch)
        except runs.Stopped as stopped:
            raise Pruned({"runs": ids, "qualities": qualities}) from stopped
        summary = planned.directory.read_summary()
        quality = best(summary, definition.selector, planned.directory.path)
        key = f"{request.direction}, seed {request.seed}"
        qualities[key] = quality
        ids.append(planned.id)
        own = {s.name for s in planned_stages(planned) if s.depends_on is None}
        seconds.append(sum(v for k, v in summary["stage_seconds"].items() if k in own))
        if definition.pruner == "wilcoxon" and see(len(ids) - 1, quality):
            raise Pruned({"runs": ids, "qualities": qualities})
    mean = sum(qualities.values()) / len(qualities)
    costs = {"seconds": sum(seconds) / len(seconds)}
    values = (mean, *(costs[name] for name in definition.objectives[1:]))
    return Outcome(values, {"runs": ids, "qualities": qualities})


def planned_stages(planned: runs.PlannedRun) -> tuple:
    """The stages of a planned run's method."""
    method = runs.build_method(planned.config, planned.dataset, planned.method_class)
    return tuple(method.stages())


def best(summary: Mapping[str, Any], selector: str, place: Any) -> float:
    """The score of the checkpoint that a selector chose.

    Raises:
        RunFailure: it could judge none.
    """
    scores = summary["selector_scores"].get(selector, {})
    values = [float(v) for v in scores.values() if not math.isnan(float(v))]
    if not values:
        raise RunFailure(
            f"'{selector}' could judge no checkpoint of {place}; use an objective that has what it "
            "needs (`glua-bench list selectors`)."
        )
    return max(values)
