"""Landlock: a Linux process denies itself files, for good and for its children.

Needs no privileges and only the standard library. The rules hold for the calling thread and for
threads and processes that it starts later; see `landlock(7)`.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Numbers of the system calls, equal on x86-64 and arm64.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_NO_NEW_PRIVS = 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_DEVICES = 1 << 6 | 1 << 11  # creation of device files
_ALL = (1 << 13) - 1  # of the first version of Landlock
READ = _EXECUTE | _READ_FILE | _READ_DIR
LIST = _READ_DIR
MOST_RULES = 20_000


def version() -> int:
    """Return the version of the kernel's Landlock interface; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    try:
        return max(0, _call(_CREATE_RULESET, None, 0, _VERSION))
    except (OSError, AttributeError):
        return 0


class Rules:
    """An allow-list of files; everything else is denied once it is enforced.

    Raises:
        OSError: the kernel has no Landlock.
    """

    def __init__(self) -> None:
        known = version()
        self._handled = _ALL | (_REFER if known >= 2 else 0) | (_TRUNCATE if known >= 3 else 0)
        attributes = struct.pack("Q", self._handled)
        self._rules = _call(_CREATE_RULESET, attributes, len(attributes), 0)

    def allow(self, path: Path, access: int = READ, writing: bool = False) -> None:
        """Allow access to a file, or to a directory and all that is beneath it.

        Args:
            path: skipped if it does not exist.
            access: kinds of reading.
            writing: allow writing, too.
        """
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            allowed = access | (self._handled & ~_DEVICES if writing else 0)
            if not path.is_dir():
                allowed &= _EXECUTE | _READ_FILE | _WRITE_FILE | _TRUNCATE
            rule = struct.pack("=Qi", allowed & self._handled, descriptor)
            _call(_ADD_RULE, self._rules, _PATH_BENEATH, rule, 0)
        finally:
            os.close(descriptor)

    def enforce(self) -> None:
        """Deny this thread, and what it starts, everything that is not allowed."""
        library = ctypes.CDLL(None, use_errno=True)
        if library.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl failed")
        _call(_RESTRICT_SELF, self._rules, 0)
        os.close(self._rules)


def carved(folder: Path, denied: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the largest files and directories in a directory without anything that is denied.

    Args:
        folder: an absolute, resolved directory.
        denied: absolute, resolved paths.

    Yields:
        Path, and False if only the directory itself may be listed.
    """
    inside = [path for path in denied if beneath(path, folder)]
    if not inside:
        yield folder, True
        return
    if folder in inside or not folder.is_dir():
        return
    yield folder, False
    for entry in sorted(folder.iterdir()):
        if not entry.is_symlink():  # a link grants nothing; its target has rules of its own
            yield from carved(entry, inside)


def beneath(path: Path, folder: Path) -> bool:
    """Return True if a path is a directory, or lies in it."""
    text, above = str(path), str(folder).rstrip(os.sep)
    return text == above or text.startswith(above + os.sep)


def _call(number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    found = library.syscall(ctypes.c_long(number), *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)
