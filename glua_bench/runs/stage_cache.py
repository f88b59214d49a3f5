"""Where finished stages are kept, so that other runs can reuse them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from glua_bench.config import digest
from glua_bench.data.cache import cache_root
from glua_bench.identity import stage_key
from glua_bench.method import Method, Stage
from glua_bench.runs.plan import PlannedRun
from glua_bench.runs.trainer import Artefact


def artefacts(planned: PlannedRun, method: Method) -> Callable[[Stage], Artefact | None]:
    """Stage → where its result is shared: a file named by all that the result depends on."""
    config = planned.config

    def locate(stage: Stage) -> Artefact | None:
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
                # First weights are drawn one network after the other, so those of the stage
                # follow from the size of the segmenter before it.
                "segmenter": asdict(config.segmenter),
                "batch_size": config.batch_size,
                "precision": config.precision,
                "devices": planned.request.devices,
                "seed": config.seed,
                "perturbation": config.perturbation,
                "data": planned.fingerprints.train,
            },
            20,
        )
        return Artefact(cache_root() / "stages" / f"{stage.name}-{key}.pt")

    return locate
