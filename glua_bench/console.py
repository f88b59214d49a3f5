"""What a user sees: a bar on a terminal, plain lines elsewhere; next commands; questions."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from glua_bench.errors import UserError
from glua_bench.task import Answer

REDRAW_SECONDS = 0.5  # a redraw costs milliseconds, a step about thirty
PLAIN_SECONDS = 10.0
PLAIN_SHARE = 0.1


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream can show a bar that redraws itself."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def next_command(
    *words: object,
    plugins: Sequence[Path] | None = None,
    data_root: Path | None = None,
    fold: int = 1,
) -> str:
    """A command as a shell takes it, whatever blanks and brackets its paths hold.

    Args:
        words: the command and its options.
        plugins: the files that this command had, which the next one needs as well.
        data_root: likewise.
        fold: likewise.
    """
    line = [str(word) for word in words]
    if fold > 1:
        line += ["--fold", str(fold)]
    for file in plugins or ():
        line += ["--plugin", str(file)]
    if data_root is not None:
        line += ["--data-root", str(data_root)]
    return shlex.join(line)


def duration(seconds: float) -> str:
    """Seconds as a reader writes them: "8 s", "2:05", "1:02:03"; "?" where unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows stage, steps, losses and remaining time of long work.

    `update` may be called at every step: it looks at the clock and returns, and only a few
    times a second reads the values (which, on a GPU, waits for them) and draws.

    Args:
        enabled: False shows nothing at all, e.g. on every process but the first.
        stream: where to write; None is stdout.

    Example:
        >>> with Progress(enabled=False) as progress:
        ...     progress.stage("train", 500)
        ...     progress.update(1, {"loss": 0.7})
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self._stream = stream or sys.stdout
        self._terminal = enabled and is_terminal(self._stream)
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._total = self._first = self._shown_step = 0
        self._began = self._shown_at = 0.0
        self._due = math.inf

    def __enter__(self) -> Progress:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            # Refreshed by hand: rich's own thread would take time from the steps.
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[remaining]}"),
                TextColumn("{task.fields[values]}", markup=False),
                console=Console(file=self._stream),
                auto_refresh=False,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def stage(self, name: str, total: int, start: int = 0) -> None:
        """Begin a piece of work.

        Args:
            name: what it is called, e.g. "train".
            total: the number of steps it has.
            start: steps that were done before, on resuming.
        """
        self._name, self._total, self._first = name, total, start
        self._shown_step = start
        self._began = self._shown_at = time.monotonic()
        if not self.enabled:
            return
        if self._bar is not None:
            self._due = self._began
            self._task = self._bar.add_task(
                name, total=total, completed=start, remaining="", values=""
            )
            self._bar.refresh()
        else:
            self._due = self._began + PLAIN_SECONDS
            resumed = f", resuming after {start}" if start else ""
            self.line(f"{name}: {total} steps{resumed}")

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Tell how many steps are done.

        Args:
            step: steps done in this stage, those before resuming included.
            values: numbers (or tensors of one number) to show, e.g. losses.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        last = step >= self._total
        if not last:
            if now < self._due:
                return
            if self._bar is None and step - self._shown_step < PLAIN_SHARE * self._total:
                return
        elif step == self._shown_step and self._shown_step != self._first:
            return  # the end was shown already
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in (values or {}).items())
        done = max(1, step - self._first)
        left = (now - self._began) / done * (self._total - step)
        remaining = f"in {duration(now - self._began)}" if last else f"{duration(left)} left"
        self._shown_step, self._shown_at = step, now
        if self._bar is not None:
            self._bar.update(self._task, completed=step, remaining=remaining, values=text)
            self._bar.refresh()
            self._due = time.monotonic() + REDRAW_SECONDS
        else:
            self.line(f"{self._name} {step}/{self._total}  {remaining}  {text}".rstrip())
            self._due = now + PLAIN_SECONDS

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def ask(question: str, guess: str, read: Callable[[str], Answer], asked: bool = True) -> Answer:
    """Put a question to the user; a refused answer is told, and the question put again.

    Args:
        question: without a question mark at its end.
        guess: taken where the user only presses return.
        read: the answer's text → its value.
        asked: False takes the guess, and shows it.

    Raises:
        UserError: the guess is refused and nobody is asked.
    """
    if not asked:
        print(f"{question}: {guess}", flush=True)
        return read(guess)
    while True:
        answer = input(f"{question} [{guess}]: ").strip()
        try:
            return read(answer or guess)
        except UserError as error:
            print(error, flush=True)
