"""Directories of files as users have them, and the names that may become files.

Every listing of data goes through here: hidden files are left out (macOS puts a `._NAME` beside
each file on foreign disks), links to directories are followed and loops of them are not, only `*`
and `?` are special in a pattern, and names that differ in Unicode's composed and decomposed forms
are the same name.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from glua_bench.errors import DataError

# Directories among the runs that are no dataset's: of sweeps, and of the default tracker's files.
SWEEPS, ARTIFACTS = "sweeps", "mlartifacts"
# Bytes of a name that becomes a file's; endings and marks of unfinished files come on top of it.
LONGEST_NAME = 160


def visible(name: str) -> bool:
    """Whether a file or directory of the name counts as the user's own."""
    return not name.startswith(".") and name not in ("__MACOSX", "lost+found")


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which equal names are equal texts."""
    return unicodedata.normalize("NFC", text)


def entries(folder: Path) -> list[Path]:
    """What lies in a directory, sorted by name, without what is hidden.

    Args:
        folder: it may be missing, and is then empty.

    Raises:
        DataError: the directory cannot be listed.
    """
    return [folder / name for name in _names(folder) if visible(name)]


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every directory below a directory, and the root itself, with the names of its files.

    Links to directories are followed. A directory is entered once, under its own name where it
    lies below the root, so that links that lead back or to one place do no harm.

    Args:
        root: it may be missing, and then nothing is found.

    Yields:
        The directory, and the sorted names of the files in it.

    Raises:
        DataError: a directory cannot be listed.
    """
    entered: set[str] = set()
    starts = deque([Path(root)] if Path(root).is_dir() else [])
    while starts:
        for folder, folders, names in os.walk(starts.popleft(), onerror=_refuse):
            place = os.path.realpath(folder)
            own = sorted(filter(visible, folders)) if place not in entered else []
            if place not in entered:
                entered.add(place)
                yield Path(folder), sorted(filter(visible, names))
            linked = [name for name in own if os.path.islink(os.path.join(folder, name))]
            starts.extend(Path(folder, name) for name in linked)  # after what lies here itself
            folders[:] = [name for name in own if name not in linked]


def files_below(root: Path) -> list[Path]:
    """All files below a directory at any depth, sorted, as `walk` finds them.

    Raises:
        DataError: a directory cannot be listed.
    """
    return sorted(folder / name for folder, names in walk(root) for name in names)


def located(path: Path) -> Path:
    """A path as the disk spells it, where only the Unicode form of a name differs.

    Returns:
        The path itself where it exists or nothing like it does.
    """
    if path.exists() or path.parent == path:
        return path
    parent = located(path.parent)
    wanted = composed(path.name)
    try:
        same = [name for name in os.listdir(parent) if composed(name) == wanted]
    except OSError:
        same = []
    return parent / (same[0] if len(same) == 1 else path.name)


def broken(path: Path) -> bool:
    """Whether a path is a link to something that does not exist.

    Such links are listed like files, so that a case whose file is lost is told instead of missed.
    """
    return path.is_symlink() and not path.exists()


def matching(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """The files that a pattern describes, with what its first `*` stands for in each.

    `*` stands for any part of a name and `?` for one character of it, neither for a beginning dot;
    `**` as a whole part of the path stands for any number of directories. Brackets stand for
    themselves.

    Args:
        root: where the pattern begins; nothing in it is special.
        pattern: e.g. "ct/*_image.nii.gz".

    Returns:
        (text of the first star in composed form, file), sorted by file; each file once.

    Raises:
        DataError: a directory cannot be listed.
    """
    found: dict[Path, str] = {}
    for key, path in _matching(Path(root), PurePosixPath(pattern).parts, None):
        found.setdefault(path, key or "")
    return [(found[path], path) for path in sorted(found)]


def _matching(
    folder: Path, parts: tuple[str, ...], key: str | None
) -> Iterator[tuple[str | None, Path]]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below, _ in walk(folder) if rest else ():
            yield from _matching(below, rest, key)
        return
    if not set("*?") & set(part):
        chosen = [(key, located(folder / part))]
    else:
        special = {"*": "(.*)", "?": "."}
        pieces = re.split(r"(\*+|\?)", composed(part))
        form = re.compile(
            "".join(special.get(piece[:1], re.escape(piece)) for piece in pieces), re.DOTALL
        )
        names = [(name, form.fullmatch(composed(name))) for name in _names(folder)]
        chosen = [
            (match[1] if key is None and form.groups else key, folder / name)
            for name, match in names
            if match and (visible(name) or part.startswith("."))
        ]
    for own, path in chosen:
        if rest and path.is_dir():
            yield from _matching(path, rest, own)
        elif not rest and (path.is_file() or broken(path)):
            yield own, path


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _refuse(error)
        raise AssertionError from error


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename} cannot be listed ({error.strerror}): repair its permissions, or move it "
        "out of the data."
    ) from error


def name_fault(name: str) -> str:
    """Why a name cannot be that of a file, in words that follow the name; "" where it can.

    Args:
        name: what a user called something that becomes a file or directory of its own.
    """
    if not name.strip():
        return "is empty"
    if name.startswith("."):
        return "begins with a dot"
    if name != name.strip():
        return "begins or ends with a blank"
    if re.search(r"[/\\]", name):
        return "leads to another directory"
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        return "has characters that cannot be printed"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return ""


def distinct(names: Iterable[str], spell: Callable[[str], str]) -> dict[str, str]:
    """Each name in a narrower spelling, such that different names stay different.

    A name that the spelling leaves as it is keeps it; of others that come out alike, each gets a
    suffix that depends on nothing but the name itself.

    Args:
        names: repeated ones count once.
        spell: replaces what the place cannot take.

    Returns:
        name → its spelling.
    """
    made = {name: spell(name) for name in dict.fromkeys(names)}
    taken = list(made.values())
    return {
        name: own
        if own == name or taken.count(own) == 1
        else f"{own}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        for name, own in made.items()
    }
