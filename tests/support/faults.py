"""The campaign of faults: what is tried against the harness, how often, and what holds.

A test marked `fault(kind, attack)` is one attack; `pytest -m fault` runs them all and prints their
table. Attacks that can be repeated with other random damage ask the fixture `tries` how often;
`GLUA_BENCH_FAULTS=10` tries them ten times as often.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "GLUA_BENCH_FAULTS"
_KEY = "fault"  # of a report's user_properties, which reach the controller of pytest-xdist


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Record each attack in the report of its test."""
    for item in items:
        mark = item.get_closest_marker("fault")
        if mark is not None:
            kind, attack = mark.args
            item.user_properties.append((_KEY, [kind, attack]))


@pytest.fixture
def tries(record_property: Callable[[str, Any], None]) -> Callable[[int], range]:
    """Return how often to repeat an attack, and record it: `for seed in tries(20)`."""

    def asked(count: int) -> range:
        total = count * int(os.environ.get(VARIABLE, "1"))
        record_property("tries", total)
        return range(total)

    return asked


def damaged(content: bytes, seed: int) -> bytes:
    """Return a file with one random damage, which is never the file itself.

    A bit is flipped, the end is lost, bytes are added, or a block is zeros or noise.
    """
    rng = random.Random(seed)
    at = rng.randrange(len(content))
    block = len(content[at : at + 512])
    found = rng.choice(
        [
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
            content[:at],
            content + rng.randbytes(1 + at % 9),
            content[:at] + bytes(block) + content[at + block :],
            content[:at] + rng.randbytes(block) + content[at + block :],
        ]
    )
    return found if found != content else content + b"x"


@contextlib.contextmanager
def full_disk(written: int) -> Iterator[None]:
    """Have a full disk inside the block, after so many files were written."""
    sync, numbers = os.fsync, itertools.count()

    def write(file: int) -> None:
        if next(numbers) == written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", write)
        yield


@contextlib.contextmanager
def another_user(folder: Path, umask: int = 0o022) -> Iterator[None]:
    """Be a user who owns none of a folder's files, which were written with this umask.

    Root becomes `nobody`; anybody else loses the permissions that a stranger would not have.
    """
    root = getattr(os, "geteuid", lambda: 1)() == 0
    if os.name == "nt":
        pytest.skip("needs the permissions of POSIX")
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path in reversed(paths):
        mode = (0o777 if path.is_dir() else 0o666) & ~umask
        stranger = (mode & 0o7) * 0o111
        path.chmod(mode if root else stranger)
    try:
        if root:
            os.setegid(65534)
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a directory that every user may enter; those of pytest are private."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


def table(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Return the lines of the table: kind, attack, how often it was tried and held.

    A test that repeats its attack counts as not held at all if it fails once.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        properties = dict(report.user_properties)
        # A test is reported thrice: its fixtures are set up, it is called, they are torn down.
        if _KEY not in properties or report.skipped or (report.when != "call" and report.passed):
            continue
        counts = rows.setdefault(tuple(properties[_KEY]), [0, 0])
        tried = properties.get("tries", 1)
        counts[0] += tried
        counts[1] += tried if report.passed else 0
    width = [max([len(row[i]) for row in rows] + [6]) for i in (0, 1)]
    lines = [f"{'kind':<{width[0]}}  {'attack':<{width[1]}}  {'tried':>6}  {'held':>6}"]
    for (kind, attack), (tried, held) in sorted(rows.items()):
        lines.append(f"{kind:<{width[0]}}  {attack:<{width[1]}}  {tried:>6}  {held:>6}")
    total = [sum(counts[i] for counts in rows.values()) for i in (0, 1)]
    lines.append(f"{'total':<{sum(width) + 2}}  {total[0]:>6}  {total[1]:>6}")
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table after `pytest -m fault`, and where GLUA_BENCH_FAULTS is set."""
    if config.option.markexpr == "fault" or VARIABLE in os.environ:
        terminalreporter.section("faults")
        every = [each for found in terminalreporter.stats.values() for each in found]
        for line in table(r for r in every if isinstance(r, pytest.TestReport)):
            terminalreporter.line(line)
