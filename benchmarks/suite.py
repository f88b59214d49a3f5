"""Which benchmarks there are, and how they are chosen by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.rows import Benchmark, Missing, Row, Settings


def _of(module: str, function: str, settings: Settings, **given: object) -> Iterator[Row]:
    """Import a module when its benchmark is measured."""
    found: Iterator[Row] = getattr(importlib.import_module(f"benchmarks.{module}"), function)(
        settings, **given
    )
    return found


def _benchmark(name: str, module: str, function: str, named: bool = False) -> Benchmark:
    return Benchmark(name, partial(_of, module, function), named)


METHODS = (
    "source_only", "global_only", "local_only", "glua", "sifa", "cycle_translate", "ada_output",
    "slaug",
)  # fmt: skip
ALL = (
    *(
        Benchmark(f"steps.{name}", partial(_of, "steps", "measure_steps", only=name))
        for name in METHODS
    ),
    _benchmark("recompute", "steps", "measure_recomputation"),
    _benchmark("loop", "steps", "measure_loop"),
    _benchmark("surface", "scoring", "measure_surface"),
    _benchmark("evaluate", "scoring", "measure_evaluation"),
    _benchmark("batches", "loading", "measure_batches"),
    _benchmark("prepare", "preparing", "measure_preparation"),
    _benchmark("start", "commands", "measure_start"),
    _benchmark("report", "commands", "measure_report"),
    _benchmark("sweep", "sweeps", "measure_sweep"),
    *(
        [_benchmark("threads", "commands", "measure_threads")]
        if importlib.util.find_spec("benchmarks.threads")
        else []
    ),
    _benchmark("run", "commands", "measure_run", named=True),
    _benchmark("reuse", "sweeps", "measure_reuse", named=True),
    _benchmark("storage", "sweeps", "measure_storage", named=True),
)


GROWTH = ("step", "prepare", "evaluate", "report", "sweep", "memory", "gpu")  # parts of `scale`


FAILED = "failed"  # how the note of a benchmark that raised begins


def names() -> list[str]:
    """Return the names that a user may give, with a note where a row must be named."""
    own = [f"{each.name} (only by name)" if each.named else each.name for each in ALL]
    return [*own, "scale", *(f"scale.{part}" for part in GROWTH)]


def part(name: str) -> str:
    """Return the part of `scale` that a name means.

    Raises:
        KeyError: there is none.
    """
    found = name.removeprefix("scale.")
    if found not in GROWTH:
        raise KeyError(name)
    return found


def begins(name: str, start: str) -> bool:
    """Return True if a dotted name is another one or lies below it."""
    return name == start or name.startswith(f"{start}.")


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks that have rows of the given names; by default the table's.

    Raises:
        KeyError: no benchmark has such rows.
    """
    if not names:
        return [each for each in ALL if not each.named]
    for name in names:
        if not any(begins(each.name, name) or begins(name, each.name) for each in ALL):
            raise KeyError(name)
    return [e for e in ALL if any(begins(e.name, n) or begins(n, e.name) for n in names)]


def measured(benchmark: Benchmark, settings: Settings, names: Sequence[str]) -> list[Row]:
    """Measure a benchmark and return its rows with the given names.

    Raises:
        SystemExit: a name has no row.
    """
    try:
        rows = list(benchmark.measure(settings))
    except Missing as missing:
        rows = [Row(benchmark.name, "", note=str(missing))]
    except (Exception, SystemExit) as error:  # the other benchmarks are measured all the same
        settings.report(f"{benchmark.name} failed: {error}")
        rows = [Row(benchmark.name, "", note=f"{FAILED}: {type(error).__name__}")]
    if rows and rows[0].note.startswith(FAILED):
        return rows
    wanted = [n for n in names if begins(n, benchmark.name) and n != benchmark.name]
    above = not names or any(begins(benchmark.name, name) for name in names)
    if above:
        return rows
    found = [row for row in rows if any(begins(row.name, name) for name in wanted)]
    if not found:
        known = ", ".join(row.name for row in rows)
        raise SystemExit(f"{benchmark.name} has no row {', '.join(wanted)}; it has {known}.")
    return found
