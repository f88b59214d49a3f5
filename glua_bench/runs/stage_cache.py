"""Cache of finished stages, for reuse by other runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from glua_bench.config import RunConfig
from glua_bench.data.cache import cache_root
from glua_bench.identity import CACHE_DIGITS, digest, stage_key
from glua_bench.method import Method, Stage
from glua_bench.runs.plan import Fingerprints
from glua_bench.runs.request import RunRequest


class Resolved(Protocol):
    """A run of which everything is known: a `PlannedRun`, or a `Withheld`."""

    @property
    def config(self) -> RunConfig:
        """Its complete configuration."""

    @property
    def fingerprints(self) -> Fingerprints:
        """Digests of its files."""

    @property
    def request(self) -> RunRequest:
        """The user's request."""


def artefact_path(planned: Resolved, method: Method, stage: Stage) -> Path | None:
    """Return the file in which a stage's result is shared between runs; None if it is not shared.

    Its name is a digest of everything that the result depends on.
    """
    config = planned.config
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
