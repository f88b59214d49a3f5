"""Stop after the current step on a signal from a scheduler or a user.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 before preemption or a time limit. The signal sets a
flag; the trainer checks it after every step, writes a checkpoint and raises `Interrupted`. The same
command resumes the run. Windows has none of these requests: there SIGTERM from another process ends
the process at once, and the same command resumes from the last periodic checkpoint.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
_asked: list[int] = []


class Interrupted(BaseException):
    """The process received a stop signal, and its work is saved.

    A `BaseException`, so that plugins do not catch it.

    Args:
        number: signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals as requests to stop; call it in the main thread."""

    def note(number: int, frame: FrameType | None) -> None:
        _asked.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    _asked.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def ask(number: int) -> None:
    """Request to stop, as if this process had received a signal."""
    _asked.append(number)


def requested() -> int | None:
    """Return the first signal with which this process was asked to stop, if any."""
    return _asked[0] if _asked else None


def asked() -> bool:
    """Return True if this process received a stop signal."""
    return bool(_asked)


def end_if_asked() -> None:
    """Raise `Interrupted` if a stop signal was received; call it when all work is saved."""
    if _asked:
        raise Interrupted(_asked[0])
