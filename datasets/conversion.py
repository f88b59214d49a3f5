"""Datasets whose files `prepare` converts into the cache, once for each directory of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glua_bench.data.cache import OPTION, cache_root, intact
from glua_bench.errors import DataError
from glua_bench.files import Damaged, read_checked_json, write_checked_json
from glua_bench.identity import code_digest
from glua_bench.task import Dataset


class ConvertedDataset(Dataset):
    """A dataset of files in the cache, which are converted from those in `root`."""

    @property
    def converted(self) -> Path:
        """Directory in the cache for this root's converted files; its name contains the code."""
        place = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:12]
        return cache_root() / self.name / f"{code_digest((type(self).__module__,))}-{place}"

    def index(self) -> dict[str, Any]:
        """Return what the last `prepare` gave to `write_index`.

        Raises:
            OSError: nothing is prepared.
            Damaged: the index is damaged.
        """
        found: dict[str, Any] = read_checked_json(self.converted / "cases.json")
        return found

    def write_index(self, index: Mapping[str, Any]) -> None:
        """Keep what is known of each case, unless it is kept already.

        Raises:
            RunFailure: the cache cannot be written.
        """
        with suppress(OSError, Damaged):
            if self.index() == index:
                return
        write_checked_json(self.converted / "cases.json", index, OPTION)

    def read_record(self, case: str) -> dict[str, Any]:
        """Return what `write_record` kept of a case.

        Raises:
            OSError: the case is not converted.
            Damaged: the record is damaged.
        """
        found: dict[str, Any] = read_checked_json(self.converted / f"{case}.json")
        return found

    def write_record(self, case: str, record: Mapping[str, Any]) -> None:
        """Keep that a case is converted: `of`, the stamps of its files, and other entries.

        Raises:
            RunFailure: the cache cannot be written.
        """
        write_checked_json(self.converted / f"{case}.json", record, OPTION)

    def up_to_date(self, case: str, stamps: list[list[Any]], *files: Path) -> bool:
        """Tell whether a case is converted from files with these stamps; forget it otherwise.

        Args:
            case: its id.
            stamps: from `stamp`.
            files: converted files that must be intact.
        """
        with suppress(OSError, Damaged):
            if self.read_record(case)["of"] == stamps and intact(*files):
                return True
        (self.converted / f"{case}.json").unlink(missing_ok=True)
        return False


def stamp(file: Path) -> list[Any]:
    """Return values that change with the file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): check the file.") from error
    return [file.name, status.st_size, status.st_mtime_ns]
