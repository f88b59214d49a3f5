"""What a benchmark is, how its sides take turns, and how its rows become a table."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT

SCHEMA = 1  # of the JSON
# Libraries that a benchmark compares with; none is a dependency of the package.
COMPARATORS = ("monai", "surface-distance")


Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: turns of each side.
        quick: use tiny sizes, to test the command.
        scratch: directory for files, removed at the end.
        report: prints a line about the progress.
        threads: threads per process.
    """

    rounds: int
    quick: bool
    scratch: Path
    report: Callable[[str], None]
    threads: int = 1

    @property
    def clock(self) -> Clock:
        """For work of this process alone: its processor time if it has one thread.

        Unlike the time on the wall, that hardly depends on what else the machine does.
        """
        return time.process_time if self.threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Aim:
    """A bound that a ratio should keep.

    Attributes:
        bound: the value.
        least: whether the ratio should be at least the bound, instead of at most.
        reachable: False if the row cannot reach the aim on this machine, for the reason in `note`
            of the row.
    """

    bound: float
    least: bool = False
    reachable: bool = True

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound:g}"

    def met(self, ratio: float) -> bool:
        """Return True if a ratio keeps the bound."""
        return ratio >= self.bound if self.least else ratio <= self.bound


@dataclass(frozen=True)
class Row:
    """A ratio of two durations that were measured in turn.

    Attributes:
        name: e.g. "surface.medpy".
        compared: what is divided by what.
        ratios: one per round; empty if nothing was measured.
        seconds: medians of both durations.
        aim: the bound, if there is one.
        note: details, or why nothing was measured.
    """

    name: str
    compared: str
    ratios: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    aim: Aim | None = None
    note: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the ratios."""
        if len(self.ratios) == 1:
            return (self.ratios[0],) * 3
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, middle, high

    @property
    def verdict(self) -> str:
        """Return "met", "missed" or why there is neither."""
        if not self.ratios:
            return "not measured"
        if self.aim is None:
            return ""
        if self.aim.met(self.quartiles[1]):
            return "met"
        return "missed" if self.aim.reachable else "out of reach"

    def as_json(self) -> dict[str, Any]:
        """Return the row for the JSON document."""
        measured = bool(self.ratios)
        return {
            "name": self.name,
            "compared": self.compared,
            "median": self.quartiles[1] if measured else None,
            "quartiles": [self.quartiles[0], self.quartiles[2]] if measured else None,
            "ratios": list(self.ratios),
            "seconds": list(self.seconds),
            "aim": None if self.aim is None else str(self.aim),
            "verdict": self.verdict,
            "note": self.note,
        }


Measure = Callable[[Settings], Iterator[Row]]


@dataclass(frozen=True)
class Benchmark:
    """A named group of rows that are measured together.

    Attributes:
        name: the first part of its rows' names.
        measure: yields the rows.
        named: measured only if the user names it, because it takes minutes.
    """

    name: str
    measure: Measure
    named: bool = False


class Missing(Exception):
    """A library or a server that a row compares with is not there."""


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    least: float = 0.15,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turn.

    Every side is called once or, if it is short, twice, to warm up and to find how many calls last
    `least` seconds. Each round then times every side once, and the order turns from round to round.

    Args:
        sides: name → function.
        rounds: number of rounds.
        least: seconds that a side lasts in a round.
        clock: tells the seconds.

    Returns:
        Name → seconds per call, one value per round.
    """
    calls = {}
    for name, side in sides.items():
        seconds = _timed(side, 1, clock)
        seconds = _timed(side, 1, clock) if seconds < 0.5 else seconds
        calls[name] = max(1, round(least / max(1e-6, seconds)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        turned = number % len(names)
        for name in names[turned:] + names[:turned]:
            found[name].append(_timed(sides[name], calls[name], clock))
    return found


def _timed(side: Callable[[], object], calls: int, clock: Clock) -> float:
    began = clock()
    for _ in range(calls):
        side()
    return (clock() - began) / calls


def ratio_row(
    name: str,
    compared: str,
    first: Sequence[float],
    second: Sequence[float],
    aim: Aim | None = None,
    note: str = "",
) -> Row:
    """Return the row of two lists of seconds, one ratio per round."""
    ratios = tuple(a / b for a, b in zip(first, second, strict=True))
    medians = (statistics.median(first), statistics.median(second))
    return Row(name, compared, ratios, medians, aim, note)


# -- output ---------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """Return a duration with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of the rows."""
    lines = [
        "| row | time of A ÷ time of B | ratio (quartiles) | A, B | aim | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = pair = ""
        if row.ratios:
            low, middle, high = row.quartiles
            ratio = f"{middle:.3g} ({low:.3g} to {high:.3g})"
            pair = ", ".join(map(span, row.seconds))
        told = "; ".join(filter(None, (row.verdict, row.note)))
        aim = "" if row.aim is None else str(row.aim)
        lines.append(f"| `{row.name}` | {row.compared} | {ratio} | {pair} | {aim} | {told} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Machine:
    """Where a table was measured, without names of users, machines or directories.

    Attributes:
        processor: model name.
        cores: number of cores that this process may use.
        threads: threads of one operation.
        versions: library → version.
        commit: of the checkout; "" outside of one.
        changed: whether the checkout differs from the commit.
        load: load average of the last minute before the start.
    """

    processor: str
    cores: int
    threads: int
    versions: Mapping[str, str]
    commit: str
    changed: bool
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        from importlib.metadata import PackageNotFoundError, version

        import torch

        from glua_bench.records.environment import environment, git_state

        facts, state = environment(), git_state(ROOT) or {}
        known = {"python": facts["python"], **facts["libraries"]}
        for name in COMPARATORS:
            try:
                known[name] = version(name)
            except PackageNotFoundError:
                continue
        return cls(
            facts["processor"],
            facts["cpus"],
            torch.get_num_threads(),
            known,
            str(state.get("commit", "")),
            bool(state.get("dirty", False)),
        )

    def __str__(self) -> str:
        shown = ("torch", "numpy", "scipy", "medpy", *COMPARATORS)
        used = ", ".join(f"{n} {self.versions[n]}" for n in shown if n in self.versions)
        state = f"commit {self.commit[:9]}{' with changes' if self.changed else ''}"
        return (
            f"{self.processor}, {self.cores} cores, load {self.load:.1f} before the start; threads "
            f"per process: {self.threads}; Python {self.versions['python']}, {used}; {state}."
        )


def document(machine: Machine, rows: Sequence[Any]) -> str:
    """Return the JSON document of rows of any kind that have `as_json`."""
    whole = {"schema": SCHEMA, "machine": vars(machine), "rows": [row.as_json() for row in rows]}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def into_page(page: Path, mark: str, text: str) -> None:
    """Replace what stands between two comments of a Markdown page.

    Raises:
        SystemExit: the page lacks the comments.
    """
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {mark}: begin -->\n).*?(<!-- {mark}: end -->)", re.DOTALL)
    if not pattern.search(old):
        raise SystemExit(
            f"{page} lacks the comments <!-- {mark}: begin --> and <!-- {mark}: end -->."
        )
    new = pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old)
    page.write_text(new, encoding="utf-8")
