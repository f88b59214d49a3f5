"""Runs of a small network that take a second, and a method as a plugin file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glua_bench.console import Progress
from glua_bench.errors import ConfigError
from glua_bench.runs.request import RunRequest

SMALL = (
    "segmenter.name=unet",
    "segmenter.width=4",
    "segmenter.depth=3",
    "grid.size=32",
    "grid.spacing=7",
    "grid.slice_spacing=8",
    "batch_size=2",
    "candidates=2",
)


QUIET = Progress(enabled=False)
Ask = Callable[..., RunRequest]


def small_request(
    phantom_root: Path, runs_root: Path = Path("runs"), *sets: str, **changes: Any
) -> RunRequest:
    """Return a request for three steps of a small network."""
    asked = RunRequest(
        "source_only",
        "phantom",
        direction="mr-ct",
        preset="quick",
        steps=3,
        augmentation="geometric",
        assignments=[*SMALL, *sets],
        data_root=phantom_root,
        runs_root=runs_root,
        device="cpu",
        mlflow=False,
    )
    return replace(asked, **changes)


def refusal(
    function: Callable[..., Any], *arguments: Any, kind: type[Exception] = ConfigError
) -> str:
    """Return the sentence with which a call is refused."""
    with pytest.raises(kind) as error:
        function(*arguments)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and text[:-1].count(". ") == 0
    return text


PLUGIN = '''
from glua_bench.methods.source_only import SourceOnly
from glua_bench.method import Method

class Plugged(SourceOnly, Method):
    """Source only, with a twist."""

    name = "plugged"
    reference = "none"
    needs = "nothing"
'''

SAMPLE = Path(__file__).resolve().parent / "sample_plugin" / "src" / "glua_bench_sample"

DISCS = [SAMPLE / "discs.py", SAMPLE / "random_gamma.py"]
