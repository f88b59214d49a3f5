"""Files that appear complete or not at all, however many processes make them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished-"  # how names begin that are being written; hidden, so that none counts


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A name to write to; then the file is moved to its own.

    Its end is that of the path, since some writers choose the format by it. Errors are left to
    the caller, who knows what the file is and where the user can find room for it.

    Args:
        path: of the file; its directory is made.

    Raises:
        OSError: the directory cannot be made, or the file not moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{uuid.uuid4().hex}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left behind a day ago or earlier.

    Args:
        folder: in which `placed` writes; it may be missing.
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 86_400:
                leftover.unlink()
