"""Measure the parts of a run, and say where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from glua_bench.config import ORACLE

SLICES, SAMPLES, SELECTION, EVALUATION, FIGURES = (
    "slices",
    "samples",
    "selectors",
    "evaluation",
    "figures",
)


class Clock:
    """Sums the seconds of named parts.

    Example:
        >>> clock = Clock()
        >>> with clock.on("figures"):
        ...     pass
        >>> list(clock.seconds)
        ['figures']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Add the duration of a block to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def parts_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each part of a finished run, in order; {} for a run without them.

    Stages count with the time of all processes that trained them, reused stages not at all.

    Args:
        summary: from `RunDirectory.read_summary`.
    """
    own = summary.get("part_seconds")
    if own is None:
        return {}
    selection = own.get(SAMPLES, 0.0) + sum(summary["selector_seconds"].values())
    return {
        SLICES: own[SLICES],
        **summary["stage_seconds"],
        SELECTION: selection,
        EVALUATION: own[EVALUATION],
        FIGURES: own.get(FIGURES, 0.0),
    }


def total(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum the parts of several runs."""
    summed: dict[str, float] = {}
    for parts in runs:
        for name, seconds in parts.items():
            summed[name] = summed.get(name, 0.0) + seconds
    return summed


def where_time_went(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Say so if selectors and evaluation took longer than training; "" if not.

    Args:
        summaries: of finished runs.
    """
    parts = total([parts_of(summary) for summary in summaries])
    whole = sum(parts.values())
    scoring = parts.get(SELECTION, 0.0), parts.get(EVALUATION, 0.0)
    others = (SLICES, SELECTION, EVALUATION, FIGURES)
    training = sum(seconds for name, seconds in parts.items() if name not in others)
    if not whole or sum(scoring) <= training:
        return ""
    share = [f"{100 * seconds / whole:.0f} %" for seconds in (*scoring, training)]
    text = f"Time: selectors took {share[0]}, evaluation {share[1]}, training {share[2]}"
    judged = [s for s in summaries if len(s.get("selector_seconds", ())) > 2]
    # With --oracle, every checkpoint is evaluated in any case.
    chosen = [set(s["chosen_steps"].values()) for s in judged if ORACLE not in s["chosen_steps"]]
    fewer = any(len(steps) > 2 for steps in chosen)
    if fewer or judged and scoring[0] > whole / 5:
        text += "; --selectors last,im takes less"
    return f"{text}."
