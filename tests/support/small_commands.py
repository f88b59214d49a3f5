"""Options of commands that train a tiny network for a second, and how a command is refused."""

from __future__ import annotations

from collections.abc import Callable

Result = tuple[int, str, str]
Call = Callable[..., Result]

SMALL = [
    "--preset=quick",
    "--steps=2",
    "--set=segmenter.width=4",
    "--set=segmenter.depth=3",
    "--set=grid.size=32",
    "--set=grid.spacing=7",
    "--set=batch_size=2",
    "--device=cpu",
]


def refused(result: Result, *words: str, code: int = 2) -> str:
    """Assert an exit code and one sentence on stderr with the words, without traceback.

    Returns:
        The line with the sentence.
    """
    found, _, err = result
    assert found == code, err
    lines = [line for line in err.splitlines() if line.startswith("glua-bench: error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]
