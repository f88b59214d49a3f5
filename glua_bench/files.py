"""Write, lock, check and hash files; the only module that renames, locks or sweeps files.

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

**Checksums.** What is stored to be read again carries a SHA-256 of its name and content, which is
compared when it is read. Binary files end in a line that holds it (`add_checksum`); readers of
their formats ignore such a line. JSON objects hold it as an entry (`write_checked_json`). The name
is included so that two intact files cannot be exchanged.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from glua_bench.errors import RunFailure, printable

if TYPE_CHECKING:
    import pandas as pd
    from filelock import BaseFileLock

UNFINISHED = ".writing-"  # prefix of temporary names
ABANDONED_SECONDS = 86_400
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# Windows flushes only files that are open for writing; elsewhere the file may be a link to data
# that may not be written.
_FLUSHED = "rb+" if os.name == "nt" else "rb"
_swept: set[str] = set()  # directories that this process has swept
_BLOCK = 1 << 20  # bytes that are compared at once
CHECKSUM = "sha256"  # entry of a JSON object
_LINE = b"\nsha256 "  # begins the last line of a binary file; 64 digits and a newline follow
_TAIL = len(_LINE) + 65
_intact: set[tuple[object, ...]] = set()  # files whose checksum this process has compared


class NotWritable(RunFailure):
    """A file or directory cannot be written for lack of permission."""


class Damaged(RunFailure):
    """A stored file does not have the content that was written.

    Callers add what is done about it.

    Args:
        path: the file.
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why})")


# -- writing --------------------------------------------------------------------------------------


@contextmanager
def storing(path: Path, option: str = "") -> Iterator[None]:
    """Convert an operating-system error on writing to one sentence.

    Args:
        path: file or directory that is written.
        option: command-line option that sets the directory, e.g. "--runs".

    Raises:
        NotWritable: the user lacks the permission.
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
            raise NotWritable(f"{path} cannot be written ({why}); {elsewhere}.") from error
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            text = f"{path} cannot be created because a parent is a file; move it, or {elsewhere}."
        else:
            text = f"{path} cannot be written ({why}); check the disk, then repeat the command."
        raise RunFailure(text) from error


@contextmanager
def replacing(path: Path, option: str = "", keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file that becomes `path` when the block ends without an error.

    Its name has the suffix of the path, by which some writers choose the format. A file with the
    same content stays in place: rules of Landlock hold for a file, not for its path, so a process
    with such rules could no longer read it if another process replaced it by its like.

    Args:
        path: the file; its directory is created.
        option: command-line option that sets the directory.
        keep: path to which an existing file is moved; for a moment, only this one exists.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with storing(path, option):
        temporary = _unfinished(path)
        try:
            yield temporary
            with temporary.open(_FLUSHED) as written:
                os.fsync(written.fileno())
            if keep is not None:
                with suppress(FileNotFoundError):
                    os.replace(path, keep)
            elif _equal(path, temporary):
                return
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _equal(path: Path, other: Path) -> bool:
    """Return True if both are files with the same content; False if one cannot be read."""
    try:
        if path.is_symlink() or path.stat().st_size != other.stat().st_size:
            return False
        with path.open("rb") as first, other.open("rb") as second:
            while (part := first.read(_BLOCK)) == second.read(_BLOCK):
                if not part:
                    return True
    except OSError:
        pass
    return False


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
    with _without_new_parents(path):
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


@contextmanager
def undone(folder: Path) -> Iterator[None]:
    """Remove what the block writes into a missing or empty directory if it ends with an error.

    Parents that it creates are removed as well. A directory with content is left as it is.
    """
    existed = folder.exists()
    empty = not existed or (folder.is_dir() and not any(folder.iterdir()))
    with _without_new_parents(folder):
        try:
            yield
        except BaseException:
            if empty and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
                if existed:
                    folder.mkdir(exist_ok=True)
            raise


@contextmanager
def _without_new_parents(path: Path) -> Iterator[None]:
    """Remove parents of a path that the block creates if it ends with an error."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # another process may use it
                parent.rmdir()
        raise


def move_into(folder: Path, place: Path, last: str, option: str = "") -> Path:
    """Move the visible files and directories of a directory to a new one.

    Args:
        folder: the directory; it remains, with hidden files such as locks.
        place: the new directory; if it exists, a number is added to its name.
        last: name of the file that is moved last.
        option: command-line option that sets the directory.

    Returns:
        The new directory.

    Raises:
        RunFailure: a directory cannot be written.
    """
    with storing(place, option):
        for number in itertools.count(1):
            target = place.with_name(f"{place.name}_{number}") if number > 1 else place
            with suppress(FileExistsError):
                target.mkdir(parents=True)
                break
        for own in sorted(folder.iterdir(), key=lambda own: (own.name == last, own.name)):
            if not own.name.startswith("."):
                os.rename(own, target / own.name)
    return target


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


# Spreadsheets execute cells that begin with these, also in their full-width forms.
_FORMULA = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")


def csv_cell(value: Any) -> Any:
    """Return a value for a cell of a CSV file: texts that spreadsheets would execute get a "'".

    Numbers are unchanged, also those that are written as text. Control characters are escaped:
    pandas does not quote a carriage return, which begins another row.
    """
    if isinstance(value, str):
        value = printable(value)
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def csv_text(frame: pd.DataFrame, **options: Any) -> str:
    """Return a table as CSV without its index, in which no cell is a formula.

    Args:
        frame: the table.
        options: further options of `DataFrame.to_csv`.
    """
    safe = frame.copy(deep=False)
    for place, kind in enumerate(frame.dtypes):
        if kind.kind not in "biufcmM":
            safe.isetitem(place, frame.iloc[:, place].map(csv_cell))
    safe.columns = [csv_cell(name) for name in frame.columns]
    return str(safe.to_csv(index=False, **options))


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


def hold(path: Path, seconds: float) -> Callable[[], None] | None:
    """Lock a file as soon as it is free, in the order of requests.

    It costs some microseconds and no processor time while waiting; `exclusive` looks for the lock
    twenty times per second.

    Args:
        path: the lock file, in an existing directory.
        seconds: longest time to wait.

    Returns:
        The function that releases it; None if it was not free in time.

    Raises:
        OSError: the file cannot be opened or locked, or the system has no `flock`.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
    except ImportError as error:
        raise OSError("no flock") from error
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def release() -> None:
        flock(file, LOCK_UN)  # also for a child that has inherited the file
        os.close(file)

    try:
        flock(file, LOCK_EX | LOCK_NB)
        return release
    except BlockingIOError:
        if seconds <= 0:
            os.close(file)
            return None
    except OSError:
        os.close(file)
        raise
    held, deciding, given_up = threading.Event(), threading.Lock(), False

    def wait() -> None:  # in a thread, since flock knows no time limit
        with suppress(OSError):
            flock(file, LOCK_EX)
        with deciding:
            release() if given_up else held.set()

    threading.Thread(target=wait, daemon=True).start()
    try:
        held.wait(seconds)
    finally:  # also if a signal's handler raises
        with deciding:
            given_up = not held.is_set()
    return None if given_up else release


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


# -- checksums ------------------------------------------------------------------------------------


def add_checksum(path: Path, name: str) -> None:
    """Append the checksum of a name and of the file's content to a file.

    Args:
        path: a complete file that is not in place yet (`replacing`).
        name: must be repeated by whoever reads the file.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("rb+") as file:
        digest = _read_into(_named(name), file)
        file.write(_LINE + digest.hexdigest().encode() + b"\n")


def check(path: Path, name: str) -> int:
    """Compare a file's checksum, once per process as long as the file looks unchanged.

    Forked processes inherit what was compared before.

    Args:
        path: a file with a checksum.
        name: as given to `add_checksum`.

    Returns:
        Size of the content in bytes.

    Raises:
        Damaged: content, name and checksum differ, or there is no checksum.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        times = status.st_mtime_ns, status.st_ctime_ns
        seen = (name, str(path), status.st_dev, status.st_ino, status.st_size, *times)
        length = status.st_size - _TAIL
        if seen not in _intact:
            if length < 0:
                raise Damaged(path, "it has no checksum")
            _compare(path, _read_into(_named(name), file, length), file.read())
            _intact.add(seen)
    return length


def read_checked(path: Path, name: str) -> bytes:
    """Read a file that `add_checksum` completed, without its checksum.

    Raises:
        Damaged: content, name and checksum differ, or there is no checksum.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    length = len(content) - _TAIL
    if length < 0:
        raise Damaged(path, "it has no checksum")
    _compare(path, _named(name, memoryview(content)[:length]), content[length:])
    return content[:length]


def write_checked(path: Path, content: bytes, name: str, option: str = "") -> None:
    """Write a file with its checksum atomically; errors as in `replacing`."""
    with replacing(path, option) as temporary:
        temporary.write_bytes(content)
        add_checksum(temporary, name)


def write_checked_json(path: Path, content: Mapping[str, Any], option: str = "") -> None:
    """Write a JSON object with its checksum, which includes the file's name, as `write_json`."""
    plain = json.loads(json.dumps(content, default=_plain))
    write_json(path, {**plain, CHECKSUM: _json_digest(path, plain)}, option)


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read an object that `write_checked_json` wrote.

    Raises:
        Damaged: content, name and checksum differ, or there is no checksum.
        OSError: the file cannot be read.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        found = content.pop(CHECKSUM)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(path, "it has no checksum") from error
    if found != _json_digest(path, content):
        raise Damaged(path, "its checksum differs")
    return content


def _json_digest(path: Path, content: Mapping[str, Any]) -> str:
    return _named(path.name, json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compare(path: Path, digest: hashlib._Hash, line: bytes) -> None:
    if not line.startswith(_LINE):
        raise Damaged(path, "it has no checksum")
    if line != _LINE + digest.hexdigest().encode() + b"\n":
        raise Damaged(path, "its checksum differs")


def _named(name: str, content: bytes | memoryview = b"") -> hashlib._Hash:
    """Return the hash of a name and of content."""
    digest = hashlib.sha256(f"{name}\0".encode())
    digest.update(content)
    return digest


def _read_into(digest: hashlib._Hash, file: BinaryIO, length: int | None = None) -> hashlib._Hash:
    """Add an open file's next `length` bytes to a hash; None takes all."""
    left = math.inf if length is None else length
    while piece := file.read(int(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    return digest


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return _read_into(hashlib.sha256(), stream).hexdigest()
