"""A polite end: what a scheduler or a user asks for is done after the step that is running.

SIGTERM, SIGUSR1 and SIGUSR2 are what schedulers send before a preemption or a time limit. They set
a flag; the trainer looks at it after every step, writes a checkpoint and raises `Interrupted`, and
the same command later goes on from there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_asked: list[int] = []


class Interrupted(BaseException):
    """The process was asked to end, and its work is saved. No plugin may catch it on the way.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as requests to end, in the main thread of a process."""

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


def asked() -> bool:
    """Whether somebody asked this process to end."""
    return bool(_asked)


def end_if_asked() -> None:
    """Raise where somebody asked; called where the work is safe on disk.

    Raises:
        Interrupted: a signal came.
    """
    if _asked:
        raise Interrupted(_asked[0])
