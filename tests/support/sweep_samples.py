"""A definition of a sweep for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glua_bench.sweeps.definition import Definition, Parameter


def define(**changes: Any) -> Definition:
    """Return a definition: six random trials of one run each, unless changed."""
    values: dict[str, Any] = {
        "file": Path("own.yaml"),
        "name": "own",
        "title": "",
        "method": "glua",
        "dataset": "phantom",
        "directions": ("mr-ct",),
        "seeds": 1,
        "preset": "quick",
        "settings": (),
        "space": (Parameter("lr", low=0.01, high=0.5),),
        "objectives": ("im",),
        "sampler": "random",
        "pruner": "none",
        "trials": 6,
        "seed": 0,
    }
    return Definition(**{**values, **changes})
