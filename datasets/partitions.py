"""Partitions into training, validation and test: the versioned tables in `splits/`.

A table has one row per subject and one column per partition. Published partitions never change: a
new partition is a new column, and a correction is a new version of the file.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SPLITS_FOLDER = Path(__file__).with_name("splits")


@cache
def read_partition(table: Path, fold: int) -> Mapping[str, Mapping[int, str]]:
    """Return domain → id → "train", "val" or "test", in the order of the table.

    Args:
        table: CSV file with the columns `domain`, `id`, `literature` (fold 1), `fold2` and so on.
        fold: the fold to read.

    Raises:
        KeyError: the table has no such column.
    """
    partition = "literature" if fold == 1 else f"fold{fold}"
    found: dict[str, dict[int, str]] = {}
    with table.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            found.setdefault(row["domain"], {})[int(row["id"])] = row[partition]
    return found
