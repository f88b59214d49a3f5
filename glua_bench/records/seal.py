"""Seal of a finished run: names, sizes and digests of its files.

The file `done` contains the seal. Every reader compares it with the files, so that a result whose
files were edited, truncated, exchanged or lost is reported instead of shown. The seal detects
accidents and edits; it is no signature, because whoever can write the directory can write another
seal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glua_bench.errors import UserError
from glua_bench.files import sha256
from glua_bench.identity import DATA_DIGITS

# Layout of run directories, recorded in environment.json and `done`. Version 1 has no such number
# and no seal: `done` contains the digest of summary.json only.
SCHEMA = 2
MARK = "done"
FOLDERS = ("", "checkpoints", "figures", "predictions")
# Files that a tracker copies, and patterns of further ones: facts about the dataset, and figures
# and predictions.
COPIED = (
    "config.yaml",
    "environment.json",
    "summary.json",
    "cases.parquet",
    "metrics.parquet",
    MARK,
)
CARRIED = r"dataset(_\w+)?\.(json|yaml|csv)"
DRAWN = r"figures/[^./\\][^/\\]*\.png|predictions/[^./\\][^/\\]*\.nii\.gz"
# Not copied, because they are large; weights are verified when they are loaded.
LOCAL = r"log\.jsonl|checkpoints/candidate_[^/\\]*"
_READ = re.compile("|".join([*map(re.escape, COPIED), CARRIED, DRAWN, LOCAL]))


@dataclass(frozen=True)
class State:
    """State of a run directory.

    Attributes:
        done: True if the run is finished and its files are sound.
        sealed: True if `done` has a seal.
        problem: what is wrong with a finished run, such as "cases.parquet was changed"; "" if
            nothing is.
    """

    done: bool = False
    sealed: bool = False
    problem: str = ""


# (directory, id) → sizes and times of its files, and its state; a digest is computed once per
# process unless the file changes.
_known: dict[tuple[str, str], tuple[Any, State]] = {}


def seal(folder: Path, run_id: str, time: str) -> dict[str, Any]:
    """Return the content of `done`.

    Args:
        folder: run directory, complete except for `done`.
        run_id: id of the run.
        time: when it finished.

    Raises:
        OSError: a file cannot be read.
    """
    found = {
        name: [facts[0], sha256(folder / name)]
        for name, facts in sorted(_listing(folder).items())
        if name != MARK
    }
    content = {"schema": SCHEMA, "id": run_id, "time": time, "files": found}
    return {**content, "seal": _digest(content)}


def state_of(folder: Path, run_id: str) -> State:
    """Compare a run directory with its seal.

    Args:
        folder: run directory.
        run_id: id of the run.

    Raises:
        UserError: a newer version wrote the directory.
    """
    listing = _listing(folder)
    if MARK not in listing:
        return State()
    key = os.path.abspath(folder), run_id
    known = _known.get(key)
    if known is None or known[0] != listing:
        known = _known[key] = listing, _compare(folder, run_id, set(listing))
    return known[1]


def check_schema(folder: Path) -> None:
    """Refuse the directory of a run that a newer version wrote.

    Raises:
        UserError: a newer version wrote it.
    """
    found = _schema(_json(folder / "environment.json"))
    if found > SCHEMA:
        raise UserError(
            f"{folder} was written by a newer version of glua-bench (schema {found}, this version "
            f"reads up to {SCHEMA}); install that version, or use another --runs directory."
        )


def problem_of(folder: Path, name: str) -> str:
    """Compare one file of a finished run with the seal, e.g. weights before they are loaded.

    Args:
        folder: run directory.
        name: path of the file in the directory, with slashes.

    Returns:
        What is wrong, or "" if the file is sound or the run has no seal.
    """
    files = _json(folder / MARK).get("files")
    if files is None:
        return ""
    if not _well_formed(files):
        return f"{MARK} was changed"
    return _problem(folder, name, files[name]) if name in files else f"{name} was added"


def _compare(folder: Path, run_id: str, present: set[str]) -> State:
    check_schema(folder)
    mark = _json(folder / MARK)
    if _schema(_json(folder / "environment.json")) < SCHEMA and "seal" not in mark:
        return _unsealed(folder, mark)
    content = {name: value for name, value in mark.items() if name != "seal"}
    whole = mark.get("seal") == _digest(content) and content.get("schema") == SCHEMA
    if not whole or not _well_formed(content.get("files")):
        return State(sealed=True, problem=f"{MARK} was changed")
    if mark.get("id") != run_id:
        problem = f"it is the run {mark.get('id')} under another name"
        return State(sealed=True, problem=problem)
    files: Mapping[str, Any] = mark["files"]
    # Sizes first, which are found at once.
    for name, facts in files.items():
        if name not in present and not re.fullmatch(LOCAL, name):
            return State(sealed=True, problem=f"{name} is missing")
        if name in present and (folder / name).stat().st_size < facts[0]:
            return State(sealed=True, problem=f"{name} was truncated")
    for name in sorted(present - files.keys() - {MARK}):
        return State(sealed=True, problem=f"{name} was added")
    for name, facts in files.items():
        if name not in present or name.startswith("checkpoints/"):
            continue
        if problem := _problem(folder, name, facts):
            return State(sealed=True, problem=problem)
    return State(done=True, sealed=True)


def _well_formed(files: Any) -> bool:
    """Return True if this is a mapping from name to size and digest."""
    return isinstance(files, Mapping) and all(
        isinstance(facts, list) and [type(fact) for fact in facts] == [int, str]
        for facts in files.values()
    )


def _unsealed(folder: Path, mark: Mapping[str, Any]) -> State:
    """Return the state of a run of schema 1; only summary.json has a digest."""
    import pandas as pd

    try:
        if mark["summary"] != sha256(folder / "summary.json")[:DATA_DIGITS]:
            return State(problem="summary.json was changed")
    except (OSError, KeyError):
        return State(problem=f"summary.json or {MARK} cannot be read")
    for name in ("cases.parquet", "metrics.parquet"):
        try:
            pd.read_parquet(folder / name)
        except (OSError, ValueError):  # pyarrow's errors are subclasses of these
            return State(problem=f"{name} cannot be read")
    if not _json(folder / "environment.json"):
        return State(problem="environment.json cannot be read")
    return State(done=True)


def _problem(folder: Path, name: str, facts: Any) -> str:
    try:
        if (folder / name).stat().st_size < facts[0]:
            return f"{name} was truncated"
        return "" if sha256(folder / name) == facts[1] else f"{name} was changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return name → size, time and inode of the files of a run that are read again."""
    found = {}
    for part in FOLDERS:
        try:
            with os.scandir(folder / part) as each:
                for entry in each:
                    name = f"{part}/{entry.name}" if part else entry.name
                    if _READ.fullmatch(name) and entry.is_file():
                        facts = entry.stat()
                        found[name] = facts.st_size, facts.st_mtime_ns, facts.st_ino
        except OSError:  # its files count as missing
            continue
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # JSON of any shape
        return {}


def _schema(content: Mapping[str, Any]) -> int:
    value = content.get("schema", 1)
    return value if isinstance(value, int) else 1


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
