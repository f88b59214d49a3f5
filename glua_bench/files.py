"""Write, lock and hash files; the only module that renames, locks or sweeps files.

**Writers.** Files and directories are written under a temporary name that begins with `UNFINISHED`
and renamed when complete, so readers and resumed processes see old or new content, never a part.
The leading dot hides them from everything that lists files (`paths.entries`, `paths.matching`, the
tracker's mirror).

**Leftovers.** `sweep` removes what killed processes leave. It runs when a process first writes to a
directory, and keeps files of live processes: on the same machine it checks the process id; other
files are kept until they have not been modified for a day.

**Locks.** Locks are `flock` locks, and those of `LockFileEx` on Windows, which the kernel releases
when their process ends, also by SIGKILL. File systems without them are rejected. Only a Python
without both uses lock files with the holder's process id.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glua_bench.errors import RunFailure

if TYPE_CHECKING:
    from filelock import BaseFileLock

UNFINISHED = ".writing-"  # prefix of temporary names
ABANDONED_SECONDS = 86_400
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# Windows flushes only files that are open for writing; elsewhere the file may be a link to data
# that may not be written.
_FLUSHED = "rb+" if os.name == "nt" else "rb"
_swept: set[str] = set()  # directories that this process has swept


# -- writing --------------------------------------------------------------------------------------


@contextmanager
def storing(path: Path, option: str = "") -> Iterator[None]:
    """Convert an operating-system error on writing to one sentence.

    Args:
        path: file or directory that is written.
        option: command-line option that sets the directory, e.g. "--runs".

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    try:
        yield
    except OSError as error:
        elsewhere = f"choose another directory{f' with {option}' if option else ''}"
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            other = f" or {elsewhere}" if option else ""
            text = f"The disk of {path} is full; free some space{other}, then repeat the command."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"{path} cannot be written ({why}); {elsewhere}."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            text = f"{path} cannot be created because a parent is a file; move it, or {elsewhere}."
        else:
            text = f"{path} cannot be written ({why}); check the disk, then repeat the command."
        raise RunFailure(text) from error


@contextmanager
def replacing(path: Path, option: str = "") -> Iterator[Path]:
    """Yield a temporary file that becomes `path` when the block ends without an error.

    Its name has the suffix of the path, by which some writers choose the format.

    Args:
        path: the file; its directory is created.
        option: command-line option that sets the directory.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with storing(path, option):
        temporary = _unfinished(path)
        try:
            yield temporary
            with temporary.open(_FLUSHED) as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, option: str = "") -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    Args:
        path: the directory, missing or empty. If another process fills it first, that content is
            kept.
        option: command-line option that sets the directory.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with storing(path, option):
        temporary = _unfinished(path)
        temporary.mkdir()
    try:
        yield temporary
        with storing(path, option):
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.is_dir() or not any(path.iterdir()):
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_aside(path: Path, option: str = "") -> Path:
    """Rename a broken file or directory to NAME.broken, NAME.broken-2, …, and return its new path.

    Args:
        path: file or directory.
        option: command-line option that sets the directory.

    Raises:
        RunFailure: the directory cannot be written.
    """
    names = itertools.chain([".broken"], (f".broken-{number}" for number in itertools.count(2)))
    free = (path.with_name(path.name + name) for name in names)
    kept = next(place for place in free if not os.path.lexists(place))
    with storing(path, option):
        os.rename(path, kept)
    return kept


def write_bytes(path: Path, content: bytes, option: str = "") -> None:
    """Write a file atomically; errors as in `replacing`."""
    with replacing(path, option) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, option: str = "") -> None:
    """Write a file atomically as UTF-8; errors as in `replacing`."""
    write_bytes(path, text.encode(), option)


def write_json(path: Path, content: Any, option: str = "") -> None:
    """Write a file atomically as JSON; scalars of numpy and torch become numbers."""
    write_text(path, json.dumps(content, indent=2, default=_plain) + "\n", option)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line of a file, if the file exists.

    Raises:
        OSError: the file cannot be written.
    """
    with suppress(FileNotFoundError), path.open("rb+") as file:
        # From the end, since a journal is long and each of its writers comes here.
        start = end = file.seek(0, os.SEEK_END)
        line = -1
        while start > 0 and line < 0:
            last, start = start, max(0, start - 4096)
            file.seek(start)
            line = file.read(last - start).rfind(b"\n")
        if start + line + 1 < end:
            file.truncate(start + line + 1)


# -- leftovers ------------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove leftovers of killed processes from a directory, without its subdirectories."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if _abandoned(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _unfinished(path: Path) -> Path:
    """Return a temporary path; its directory is created and swept."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if (place := os.path.abspath(folder)) not in _swept:
        _swept.add(place)
        sweep(folder)
    own = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    return folder / f"{UNFINISHED}{own}-{path.name}"


def _abandoned(leftover: Path) -> bool:
    machine, number, *_ = [*leftover.name.removeprefix(UNFINISHED).split("-"), ""]
    if machine and machine == _machine() and number.isdecimal():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass  # a live process of another user
        return False
    newest = max(file.lstat().st_mtime for file in (leftover, *leftover.rglob("*")))
    return time.time() - newest > ABANDONED_SECONDS


@functools.cache
def _machine() -> str:
    """Identify the machine's boot or container in which process ids are unique; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbers = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {numbers}".encode()).hexdigest()[:12]


# -- locks ----------------------------------------------------------------------------------------


@contextmanager
def exclusive(
    path: Path, waiting: Callable[[], None] = lambda: None, option: str = ""
) -> Iterator[None]:
    """Hold a lock file, waiting until it is free.

    Args:
        path: the lock file; its directory is created.
        waiting: called before waiting for another holder.
        option: command-line option that sets the directory.

    Raises:
        RunFailure: the directory cannot be written, or its file system has no locks.
    """
    lock = _acquired(path, False, option)
    if lock is None:
        waiting()
        lock = _acquired(path, True, option)
    assert lock is not None, path
    try:
        yield
    finally:
        lock.release()


@contextmanager
def try_lock(path: Path, option: str = "") -> Iterator[bool]:
    """Try to hold a lock file; yield True if it is held.

    Args:
        path: the lock file; its directory is created.
        option: command-line option that sets the directory.

    Raises:
        RunFailure: the directory cannot be written, or its file system has no locks.
    """
    lock = _acquired(path, False, option)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _acquired(path: Path, wait: bool, option: str) -> BaseFileLock | None:
    from filelock import FileLock, Timeout  # here, since --help needs no locks

    # `fallback_to_soft` would use the existence of a file as lock on file systems without locks,
    # which outlives a process that is killed on another machine. Locks may be released by another
    # thread.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    with storing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            return None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise RunFailure(
                f"{path} cannot be locked ({error.strerror}); mount its file system with locks "
                f"(flock), or choose another directory{f' with {option}' if option else ''}."
            ) from error
    return lock


# -- digests --------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
