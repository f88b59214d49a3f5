"""naming.py: names and identities of runs and comparisons."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_runs import CONFIG, started, two_runs

from glua_bench.records import naming
from glua_bench.records.naming import Comparison, headline, run_name


def test_the_headline_is_the_mean_of_the_primary_selector() -> None:
    assert headline({}) == ("", {})
    records = [
        {"selector": "last", "structure": "mean", "dice": 0.1},  # a structure of this name
        {"selector": "last", "structure": "mean", "dice": 0.5, "assd": None, "hd95": math.nan},
        {"selector": "oracle", "structure": "mean", "dice": 0.9},
    ]
    assert headline({"scores": records}) == ("last", {"dice": 0.5})


QUICK = replace(
    CONFIG,
    method_config={},
    segmenter=replace(CONFIG.segmenter, width=8, depth=4),
    preset="quick",
    steps=500,
)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "source_only | mr-ct | seed 7"),
        (
            {
                "method": "glua",
                "changed": {"mask": "none", "lambda_output": 0.5},
                "augmentation": "photometric",
            },
            "glua + photometric, mask=none, lambda_output=0.5 | mr-ct | seed 7",
        ),
        (
            {"scenario": "supervised", "steps": 4, "augmentation": "none"},
            "source_only, supervised (privileged) | mr-ct | seed 7 | steps=4, augmentation=none",
        ),
        (
            {"preset": "paper"},
            "source_only | mr-ct | seed 7 | segmenter.width=8, segmenter.depth=4, steps=500",
        ),
        (
            {"method": "mine", "method_config": {"a": 1}, "changed": {"a": 1}},
            "mine, a=1 | mr-ct | seed 7",
        ),
        ({"slices": 3, "slice_distance": 4.0}, "source_only | mr-ct | seed 7 | slices=3"),
    ],
)
def test_a_name_tells_what_is_not_the_default(changes: dict[str, Any], name: str) -> None:
    method = changes.pop("changed", {})
    assert run_name(replace(QUICK, **changes), method) == name


def test_the_examples_hold() -> None:
    assert doctest.testmod(naming).failed == 0


def test_a_comparison_is_what_is_compared_and_not_how_it_was_asked_for(tmp_path: Path) -> None:
    one, two = members = two_runs(tmp_path)
    known = Comparison("compare a", members)
    assert known.name == (
        "compare a | phantom mr-ct, ct-mr | 2 seeds | quick, "
        "segmenter.width=32, segmenter.depth=5, steps=4"
    )
    assert Comparison("b", [two, one], began=0.0).id == known.id
    assert Comparison("compare a", [one]).id != known.id
    assert Comparison("compare a", [one, ("renamed", two[1])]).id != known.id
    assert Comparison("compare a", [one, (two[0], started(tmp_path, "three"))]).id != known.id
    shared = known.parameters()
    assert shared["steps"] == 4 and shared["method.lr"] == 0.001
    assert not {"seed", "direction", "preset", "selectors"} & set(shared)
    assert Comparison("compare a", [one]).name.split(" | ")[1:3] == ["phantom mr-ct", "1 seed"]
