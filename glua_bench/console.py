"""Console output: lines, progress bars (lines without a terminal), suggested commands, prompts.

Also the command with which child processes start glua-bench.
Passwords of URLs are masked in whatever is printed, also by libraries.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from glua_bench.errors import ConfigError, UserError, printable, without_password
from glua_bench.task import Answer

REDRAW_SECONDS = 0.5
PLAIN_SECONDS = 10.0
PLAIN_SHARE = 0.1
QUIET_SECONDS = 1.0  # before a stage that is usually short is shown


def is_terminal(stream: TextIO) -> bool:
    """Return True if a stream can show a progress bar."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def leading() -> bool:
    """Return True on the first process of a run."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def say(text: str = "") -> None:
    """Print a line of the result, on the first process of a run only."""
    if leading():
        print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


class _Masked:
    """A stream that masks passwords of URLs in everything written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_password(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def masked_output() -> Iterator[None]:
    """Mask passwords in the output of the block, e.g. in warnings and tracebacks of libraries."""
    out: Any = _Masked(sys.stdout)
    err: Any = _Masked(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def next_command(
    *words: object,
    plugins: Sequence[Path] | None = None,
    data_root: Path | None = None,
    fold: int = 1,
) -> str:
    """Format a command for a shell, with quotes where they are needed.

    Args:
        words: the command and its options.
        plugins: plugin files to pass on.
        data_root: data directory to pass on.
        fold: fold to pass on.
    """
    line = [str(word) for word in words]
    if fold > 1:
        line += ["--fold", str(fold)]
    for file in plugins or ():
        line += ["--plugin", str(file)]
    if data_root is not None:
        line += ["--data-root", str(data_root)]
    return shlex.join(line)


def own_command(*words: str) -> list[str]:
    """Return a command that starts glua-bench in a child process.

    It starts `__main__.py` by its path. `python -m glua_bench` would import Python's own modules
    from the current directory before any code of glua-bench is run.

    Args:
        words: arguments of `glua-bench`.
    """
    return [sys.executable, str(Path(__file__).with_name("__main__.py")), *words]


def duration(seconds: float) -> str:
    """Format seconds as "8 s", "2:05" or "1:02:03"; "?" if not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def columns(width: int) -> list[Any]:
    """Return the columns of a progress bar that fits in a line of `width` characters.

    Long names and values end in an ellipsis; counts and times are never shortened.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.table import Column

    def text(form: str, **own: Any) -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis", **own)
        return TextColumn(form, markup=False, table_column=column)

    return [
        text("{task.description}", max_width=max(12, width // 4)),
        BarColumn(bar_width=min(24, max(6, width // 6))),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        text("{task.fields[remaining]}", min_width=9),
        text("{task.fields[values]}", ratio=1),
    ]


class Progress:
    """Shows stage, steps, losses and remaining time.

    `update` is cheap enough to call at every step: it reads the values (which synchronises a GPU)
    and draws at most a few times a second.

    Args:
        enabled: False shows nothing, e.g. on every process but the first.
        stream: output stream; None is stdout.

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
        self._began = 0.0
        self._due = math.inf
        self._hidden = False  # nothing of this stage has been shown yet

    def __enter__(self) -> Progress:
        if self._terminal:
            from rich.console import Console
            from rich.progress import Progress as Bar

            console = Console(file=self._stream)
            # Refreshed manually: rich's refresh thread would slow down training.
            self._bar = Bar(
                *columns(console.width), console=console, auto_refresh=False, expand=True
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def stage(
        self, name: str, total: int, start: int = 0, quietly: bool = False, unit: str = "step"
    ) -> None:
        """Start a stage.

        Args:
            name: displayed name, e.g. "train".
            total: number of steps.
            start: steps done before resuming.
            quietly: show nothing if the stage takes less than a moment.
            unit: what is counted, in the singular.
        """
        self._name, self._total, self._first = name, total, start
        self._shown_step = start
        self._began = time.monotonic()
        self._hidden = quietly
        if not self.enabled:
            return
        if start:
            self.line(f"{name}: resuming at step {start} of {total}")
        if self._bar is not None:
            self._due = self._began + (QUIET_SECONDS if quietly else 0.0)
            if not quietly:
                self._add_bar()
        else:
            self._due = self._began + PLAIN_SECONDS
            if not (quietly or start):
                self.line(f"{name}: {total} {unit}{'' if total == 1 else 's'}")

    def _add_bar(self) -> None:
        self._task = self._bar.add_task(
            printable(self._name), total=self._total, completed=self._first, remaining="", values=""
        )
        self._bar.refresh()

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Report the number of finished steps.

        Args:
            step: finished steps of this stage, including those before resuming.
            values: numbers (or scalar tensors) to show, e.g. losses.
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
        elif self._hidden or step == self._shown_step and self._shown_step != self._first:
            return  # too short to be shown, or already shown
        parts = (f"{name} {float(value):.4g}" for name, value in (values or {}).items())
        text = printable("  ".join(parts))
        done = max(1, step - self._first)
        left = (now - self._began) / done * (self._total - step)
        remaining = f"in {duration(now - self._began)}" if last else f"{duration(left)} left"
        self._shown_step = step
        if self._bar is not None:
            if self._hidden:
                self._add_bar()
            self._bar.update(self._task, completed=step, remaining=remaining, values=text)
            self._bar.refresh()
            self._due = time.monotonic() + REDRAW_SECONDS
        else:
            self.line(f"{self._name} {step}/{self._total}  {remaining}  {text}".rstrip())
            self._due = now + PLAIN_SECONDS
        self._hidden = False

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.enabled:
            return
        text = printable(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def ask(
    question: str, guess: str, read: Callable[[str], Answer], interactive: bool = True
) -> Answer:
    """Prompt until `read` accepts the answer, also if answers are piped, one a line.

    Args:
        question: text without a question mark.
        guess: default answer.
        read: parses an answer and raises `UserError` if it is invalid.
        interactive: False uses and prints the default instead of prompting.

    Returns:
        The parsed answer.

    Raises:
        UserError: the default is invalid and `interactive` is False, or the input has ended.
    """
    if not interactive:
        print(printable(f"{question}: {guess}"), flush=True)
        return read(guess)
    echo = sys.stdin is None or not sys.stdin.isatty()  # a terminal shows what is typed
    while True:
        try:
            answer = input(printable(f"{question} [{guess}]: ")).strip()
        except (EOFError, OSError, RuntimeError) as error:  # ended, unreadable, or closed
            print(flush=True)
            raise ConfigError(
                f"The input ended before a valid answer to '{question}': enter one answer per "
                "line (an empty line accepts the proposal), or give --yes to accept all proposals."
            ) from error
        except UnicodeDecodeError as error:
            print(flush=True)
            raise ConfigError(
                f"The answer to '{question}' is not valid {error.encoding.upper()}: enter it in "
                "the encoding of the terminal."
            ) from error
        if echo:
            print(answer, flush=True)
        try:
            return read(answer or guess)
        except UserError as error:
            print(printable(str(error)), flush=True)
