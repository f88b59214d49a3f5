"""List directories of data, and validate names that become file names.

Hidden files are ignored (macOS writes a `._NAME` beside each file on foreign disks), links to
directories are followed except in loops, only `*` and `?` are special in patterns, and names that
differ only in Unicode normalisation are equal.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

from glua_bench.errors import DataError

# Directories in runs/ that belong to no dataset: sweeps, and files of the default tracker.
SWEEPS, ARTIFACTS = "sweeps", "mlartifacts"
# Longest file name in bytes, which leaves room for suffixes.
LONGEST_NAME = 160
# Words in the names of label files and of their directories.
LABEL_WORDS = frozenset(
    {
        *("label", "labels", "labelstr", "labelsts", "labelsval", "lab", "lbl", "seg", "segs"),
        *("segmentation", "segmentations", "annotation", "annotations", "mask", "masks", "msk"),
        *("gt", "ground", "truth", "groundtruth", "manual"),
    }
)


def visible(name: str) -> bool:
    """Return True unless a file name is hidden or created by the system."""
    return not name.startswith(".") and name not in ("__MACOSX", "lost+found")


def composed(text: str) -> str:
    """Return the text in Unicode's composed form (NFC), in which equal names are equal strings."""
    return unicodedata.normalize("NFC", text)


def entries(folder: Path) -> list[Path]:
    """List the visible entries of a directory, sorted by name.

    Args:
        folder: directory; a missing one is empty.

    Raises:
        DataError: the directory cannot be listed.
    """
    return [folder / name for name in _names(folder) if visible(name)]


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Iterate over a directory and all directories below it.

    Links to directories are followed. Each directory is visited once, preferably under its own
    path and not through a link, so that loops of links are harmless.

    Args:
        root: directory; nothing is yielded if it is missing.

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
            starts.extend(Path(folder, name) for name in linked)  # after real directories
            folders[:] = [name for name in own if name not in linked]


def files_below(root: Path) -> list[Path]:
    """List all files below a directory at any depth, sorted.

    Raises:
        DataError: a directory cannot be listed.
    """
    return sorted(folder / name for folder, names in walk(root) for name in names)


def located(path: Path) -> Path:
    """Return the path as stored on disk, which may differ in Unicode normalisation.

    Returns:
        The stored path; the given path if it exists or there is no unique match.
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
    """Return True if a path is a link to a missing target.

    Broken links are listed like files, so that cases with lost files are reported.
    """
    return path.is_symlink() and not path.exists()


def matching(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """Find the files that match a pattern, with the text that its first `*` matches.

    `*` matches any text within a name and `?` one character, but no leading dot; `**` as a whole
    path component matches any number of directories. Brackets are literal.

    Args:
        root: directory that the pattern is relative to; taken literally.
        pattern: e.g. "ct/*_image.nii.gz".

    Returns:
        (text of the first star in composed form, file), sorted by file, without duplicates.

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


def _refuse(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename} cannot be listed ({error.strerror}): correct its permissions, or move "
        "it out of the data."
    ) from error


def name_fault(name: str) -> str:
    """Return why a name is not valid for a file ("is empty"), or "" if it is valid.

    Args:
        name: a user's name for something that becomes a file or directory.
    """
    if not name.strip():
        return "is empty"
    if name.startswith("."):
        return "begins with a dot"
    if name != name.strip():
        return "begins or ends with whitespace"
    if re.search(r"[/\\]", name):
        return "contains a path separator"
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        return "contains unprintable characters"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return ""


def distinct(names: Iterable[str], spell: Callable[[str], str]) -> dict[str, str]:
    """Sanitise names such that different names stay different.

    Names that `spell` leaves unchanged are kept. If others collide, each gets a suffix that depends
    only on the name itself.

    Args:
        names: the names; duplicates are ignored.
        spell: replaces characters that are not allowed.

    Returns:
        name → sanitised name.
    """
    made = {name: spell(name) for name in dict.fromkeys(names)}
    taken = list(made.values())
    return {
        name: own
        if own == name or taken.count(own) == 1
        else f"{own}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        for name, own in made.items()
    }
