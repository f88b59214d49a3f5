"""Whole files, locks and digests: the only place where the harness moves, locks or sweeps files.

**Writers.** A file or directory is written beside its place, under a name that begins with
`UNFINISHED`, and moved when it is complete. Readers, and processes that resume after a kill, see
the old content or the new one, never a part. The name begins with a dot, and whatever lists files
here (`paths.entries`, `paths.matching`, the tracker's mirror) passes over such names.

**Leftovers.** What a killed process leaves has such a name, too. `sweep` removes it, and is called
when a process is about to write into a directory for the first time. Nothing is removed that a
live process may be writing: on the same machine the process is asked for by its number, and
anything else is left alone until nobody has written to it for a day.

**Locks.** Locks are `flock` locks: the kernel releases them when their process ends, also by
SIGKILL. On a file system without them, work that needs a lock is refused with one sentence.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout, UnixFileLock

from glua_bench.errors import RunFailure

UNFINISHED = ".writing-"  # how names begin of what is being written
ABANDONED_SECONDS = 86_400
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_swept: set[str] = set()  # directories that this process has swept


# -- writing --------------------------------------------------------------------------------------


@contextmanager
def storing(path: Path, option: str = "") -> Iterator[None]:
    """Turn an operating-system error on writing into one sentence.

    Args:
        path: what is written.
        option: by which the user chooses where, e.g. "--runs".

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    try:
        yield
    except OSError as error:
        again = "give the same command again"
        elsewhere = f"choose another directory{f' with {option}' if option else ''}"
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            other = f" or {elsewhere}" if option else ""
            text = f"The disk that holds {path} is full; free some space{other}, then {again}."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"{path} cannot be written ({why}); {elsewhere}."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            text = (
                f"{path} cannot be made because a file lies where a directory must be; move it, or "
                f"{elsewhere}."
            )
        else:
            text = f"{path} cannot be written ({why}); check the disk, then {again}."
        raise RunFailure(text) from error


@contextmanager
def replacing(path: Path, option: str = "") -> Iterator[Path]:
    """Yield a temporary file that becomes `path` when the block ends without an error.

    Its name ends as that of the path does, since some writers choose the format by it.

    Args:
        path: of the file; its directory is made.
        option: by which the user chooses where.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with storing(path, option):
        temporary = _unfinished(path)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, option: str = "") -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    Args:
        path: of the directory, which is missing or empty. Where another process fills it
            meanwhile, it stays as that process made it.
        option: by which the user chooses where.

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


def write_bytes(path: Path, content: bytes, option: str = "") -> None:
    """Write a whole file.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with replacing(path, option) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, option: str = "") -> None:
    """Write a whole file as UTF-8.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    write_bytes(path, text.encode(), option)


def write_json(path: Path, content: Any, option: str = "") -> None:
    """Write a whole file as JSON; scalars of numpy and torch become numbers.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    write_text(path, json.dumps(content, indent=2, default=_plain) + "\n", option)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line end of a file, if it exists.

    Raises:
        OSError: the file cannot be written.
    """
    with suppress(FileNotFoundError), path.open("rb+") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - 4096)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                at = start + found + 1
                break
            at = start
        if at < end:
            file.truncate(at)


# -- leftovers ------------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a directory; see the top of this file.

    Args:
        folder: it may be missing. Its subdirectories are not swept.
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if _abandoned(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _unfinished(path: Path) -> Path:
    """A free name beside a path, in a directory that exists and is swept."""
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
            pass  # it lives, as another user's
        return False
    newest = max(file.lstat().st_mtime for file in (leftover, *leftover.rglob("*")))
    return time.time() - newest > ABANDONED_SECONDS


@functools.cache
def _machine() -> str:
    """What a process's number belongs to: one boot of a machine, or a container; "" if unknown."""
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
    """Hold a lock file, after waiting for whoever holds it.

    Args:
        path: of the file; its directory is made.
        waiting: called before waiting for another holder.
        option: by which the user chooses where the file lies.

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
    """Hold a lock file if nobody does; yields whether it is held.

    Args:
        path: of the file; its directory is made.
        option: by which the user chooses where the file lies.

    Raises:
        RunFailure: the directory cannot be written, or its file system has no locks.
    """
    lock = _acquired(path, False, option)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _acquired(path: Path, wait: bool, option: str) -> UnixFileLock | None:
    # The class itself and no fallback: `FileLock` and the default may choose a lock that is a
    # mere file, which outlives a killed process. Not bound to a thread, since whoever releases
    # it may be another one than its holder.
    lock = UnixFileLock(path, thread_local=False, fallback_to_soft=False)
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
                f"(flock), or choose another one{f' with {option}' if option else ''}."
            ) from error
    return lock


# -- digests --------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
