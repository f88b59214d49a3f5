"""Measure how fast glua-bench is: every row is a ratio of two durations, taken in turn.

    python -m benchmarks                         # the table, about ten minutes
    python -m benchmarks steps.glua surface      # rows whose names begin so
    python -m benchmarks scale                   # how costs grow
    python -m benchmarks --list                  # names

docs/performance.md explains the rows and shows a table. MONAI and DeepMind's surface-distance are
compared with if they are installed (pip install monai surface-distance).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import THREADS


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        "python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    found.add_argument(
        "names", nargs="*", help="beginnings of rows' names, or 'scale'; default: the table"
    )
    found.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    found.add_argument("--threads", type=int, default=1, help="threads per process (default: 1)")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON, too")
    found.add_argument(
        "--page", type=Path, help="replace the table in this page, e.g. docs/performance.md"
    )
    found.add_argument("--quick", action="store_true", help="tiny sizes, to test the command")
    found.add_argument("--list", action="store_true", help="print the names and stop")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code, 1 if a benchmark failed."""
    asked = parser().parse_args(arguments)
    if asked.rounds < 1 or asked.threads < 1:
        parser().error("--rounds and --threads must be at least 1.")
    for name in THREADS:  # before torch and NumPy start their pools
        os.environ[name] = str(asked.threads)
    from benchmarks import rows, suite

    if asked.list:
        print("\n".join(suite.names()))
        return 0
    growing = [name for name in asked.names if suite.begins(name, "scale")]
    if growing and growing != asked.names:
        parser().error("the rows of 'scale' are a table of their own; name them alone.")
    if asked.page and asked.names not in ([], ["scale"]):
        parser().error("--page replaces a whole table; name no row, or only 'scale'.")
    try:
        chosen = [] if growing else suite.chosen(asked.names)
        parts = [suite.part(name) for name in growing if name != "scale"]
    except KeyError as error:
        parser().error(f"no row's name begins with '{error.args[0]}'; --list prints the names.")
    import torch

    torch.set_num_threads(asked.threads)
    machine = rows.Machine.here()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glua-bench-speed-") as scratch, _outputs():
        settings = rows.Settings(
            asked.rounds, asked.quick, Path(scratch), _reporter(began), asked.threads
        )
        found: list[Any] = []
        if growing:
            from benchmarks import scale

            found = list(scale.measure(settings, parts))
            text = scale.markdown(found)
        else:
            for benchmark in chosen:
                found += suite.measured(benchmark, settings, asked.names)
            text = rows.markdown(found)
    text = f"{text}\n\nMeasured on {machine}"
    print(text)
    if asked.json:
        asked.json.write_text(rows.document(machine, found), encoding="utf-8")
    if asked.page:
        rows.into_page(asked.page, "scale" if growing else "table", text)
    return int(any(getattr(row, "note", "").startswith(suite.FAILED) for row in found))


def _reporter(began: float) -> Callable[[str], None]:
    return lambda line: print(f"{time.monotonic() - began:5.0f} s  {line}", file=sys.stderr)


@contextlib.contextmanager
def _outputs() -> Iterator[None]:
    """Keep what the measured code prints out of the table."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    sys.exit(main())
