"""Progress of a matrix of runs: how many are done, what is running, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from glua_bench.console import columns, duration, is_terminal
from glua_bench.documents import load_json
from glua_bench.errors import printable
from glua_bench.runs.plan import PlannedRun

REDRAW_SECONDS = 0.5
PLAIN_SECONDS = 60.0
SHOWN = 8  # running runs that are listed
TAIL = 4096  # bytes at the end of a log, which hold its last line


@dataclass(frozen=True)
class Running:
    """A run that is being executed.

    Attributes:
        name: row, task and seed.
        place: current stage and step, e.g. "segment 210/500"; "starting" and "scoring" around it.
        seconds: since this process saw it start.
        here: False if another process executes it.
    """

    name: str
    place: str
    seconds: float
    here: bool = True

    @property
    def text(self) -> str:
        """Name and place in a phrase."""
        return f"{self.name} ({self.place}{'' if self.here else ', another process'})"


@dataclass(frozen=True)
class State:
    """State of a matrix.

    Attributes:
        done: number of finished runs, including earlier ones.
        failed: number of failed runs.
        total: number of runs.
        running: runs that are being executed, here or by other processes.
        seconds_left: estimated; nan if unknown.
    """

    done: int
    failed: int
    total: int
    running: Sequence[Running]
    seconds_left: float

    @property
    def left(self) -> str:
        """The time left as text; "" if unknown or if nothing is left."""
        if math.isnan(self.seconds_left) or self.done + self.failed >= self.total:
            return ""
        return f"about {duration(self.seconds_left)} left"

    def line(self) -> str:
        """Return the state in a line."""
        parts = [f"{self.done}/{self.total} runs done"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [self.left] if self.left else []
        more = len(self.running) - SHOWN
        names = [one.text for one in self.running[:SHOWN]]
        names += [f"{more} more"] if more > 0 else []
        return ", ".join(parts) + (f"; running: {'; '.join(names)}" if names else "")


def position(run: PlannedRun) -> tuple[str, float]:
    """Return the stage and step that a run has reached by its log, and its share of all updates.

    Args:
        run: the run; another process may be writing its log.
    """
    total = sum(steps for _, steps in run.stages)
    row = _last_row(run.directory.path / "log.jsonl")
    steps = dict(run.stages)
    if row is None or row["stage"] not in steps:
        return "starting", 0.0
    if row["total_step"] >= total:
        return "scoring", 1.0
    return f"{row['stage']} {row['step']}/{steps[row['stage']]}", row["total_step"] / total


def _last_row(log: Path) -> Mapping[str, Any] | None:
    """Return the last complete line of a log."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = load_json(line.decode())
            return {"stage": row["stage"], "step": row["step"], "total_step": row["total_step"]}
        except (ValueError, KeyError, TypeError):  # torn
            continue
    return None


def seconds_left(
    running: Sequence[tuple[float, float, float]],
    waiting: Sequence[float],
) -> float:
    """Estimate the time until all runs are done.

    Args:
        running: of each running run: seconds since it was seen to start, share of it that was done
            then, and its expected seconds as a whole (nan if unknown).
        waiting: expected seconds of each waiting run (nan if unknown).

    Returns:
        Seconds, if as many runs are executed at once as now; nan if unknown.
    """
    if any(map(math.isnan, [*(whole for _, _, whole in running), *waiting])):
        return math.nan
    left = [max(0.0, whole * (1 - before) - elapsed) for elapsed, before, whole in running]
    work = sum(left) + sum(waiting)
    return max([work / max(1, len(running)), *left])


class Display:
    """Shows the state of a matrix: bars on a terminal, lines elsewhere.

    Args:
        say: prints a line where there is no terminal.
        stream: the terminal, or a file; None shows no bars.
    """

    def __init__(self, say: Callable[[str], None], stream: TextIO | None) -> None:
        self.say, self.stream = say, stream
        self._live: Any = None
        self._due = time.monotonic() + PLAIN_SECONDS

    def __enter__(self) -> Display:
        if self.stream is not None and is_terminal(self.stream):
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.__enter__()
            self._due = 0.0
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)
            self._live = None

    def line(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        if self._live is None:
            self.say(text)
        else:
            self._live.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, state: Callable[[], State]) -> None:
        """Show a state if it is due.

        Args:
            state: computes it.
        """
        now = time.monotonic()
        if now < self._due:
            return
        if self._live is None:
            self.say(state().line())
            self._due = now + PLAIN_SECONDS
        else:
            self._live.update(bars(state(), self._live.console.width), refresh=True)
            self._due = now + REDRAW_SECONDS


def bars(state: State, width: int) -> Any:
    """Return the bar of all runs, and a line for each running one.

    Args:
        state: the state.
        width: of the terminal, in characters.
    """
    from rich.console import Group
    from rich.progress import Progress as Bar
    from rich.table import Table
    from rich.text import Text

    bar = Bar(*columns(width), auto_refresh=False, expand=True)
    failed = f"{state.failed} failed" if state.failed else ""
    bar.add_task(
        "runs", total=state.total, completed=state.done, remaining=state.left, values=failed
    )
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column(no_wrap=True, min_width=10)
    table.add_column(no_wrap=True, min_width=4, justify="right")
    for one in state.running[:SHOWN]:
        name = one.name if one.here else f"{one.name}, another process"
        table.add_row(
            Text(printable(f"  {name}")), Text(printable(one.place)), Text(duration(one.seconds))
        )
    if len(state.running) > SHOWN:
        table.add_row(f"  and {len(state.running) - SHOWN} more", "", "")
    return Group(bar.make_tasks_table(bar.tasks), table)
