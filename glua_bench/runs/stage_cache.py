"""Cache of finished stages, for reuse by other runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from glua_bench.data.cache import cache_root
from glua_bench.identity import CACHE_DIGITS, digest, stage_key
from glua_bench.method import Method, Stage
from glua_bench.runs.plan import PlannedRun


def artefacts(planned: PlannedRun, method: Method) -> Callable[[Stage], Path | None]:
    """Return a function that maps a stage to its file in the cache (None if it is not shared).

    The file's name is a digest of everything that the stage's result depends on.
    """
    config = planned.config

    def locate(stage: Stage) -> Path | None:
        if stage.depends_on is None:
            return None
        key = digest(
            {
                **stage_key(method, stage),
                "settings": {n: config.method_config[n] for n in sorted(stage.depends_on)},
                "steps": stage.steps(config.steps),
                "augmented": config.augmentation != "none",
                "photometric": stage.photometric and config.augmentation == "photometric",
                "grid": asdict(config.grid),
                "slices": [config.slices, config.slice_distance],
                # Initial weights are drawn network by network, so those of the stage depend on
                # the size of the segmenter before it.
                "segmenter": asdict(config.segmenter),
                "batch_size": config.batch_size,
                "precision": config.precision,
                "devices": planned.request.devices,
                "seed": config.seed,
                "perturbation": config.perturbation,
                "data": planned.fingerprints.train,
            },
            CACHE_DIGITS,
        )
        return cache_root() / "stages" / f"{stage.name}-{key}.pt"

    return locate
