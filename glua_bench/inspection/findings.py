"""Findings of data checks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glua_bench.files import csv_cell, write_text


@dataclass(frozen=True)
class Finding:
    """A problem or a suspicion about the data.

    Attributes:
        check: name of the check, e.g. "same image".
        cases: ids of the affected cases, sorted; empty if whole domains are affected.
        text: one sentence with the reason and the fix.
        problem: True if the cases cannot be used as they are; False for a warning.
    """

    check: str
    cases: tuple[str, ...]
    text: str
    problem: bool = False

    @property
    def severity(self) -> str:
        """ "problem" or "warning"."""
        return "problem" if self.problem else "warning"


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write findings as CSV: severity, check, cases (separated by spaces), text.

    Raises:
        RunFailure: the file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["severity", "check", "cases", "text"])
    for found in findings:
        cells = (found.severity, found.check, " ".join(found.cases), found.text)
        table.writerow(map(csv_cell, cells))
    write_text(path, text.getvalue(), "--out")


def enumerate_names(names: Iterable[str], most: int = 3) -> str:
    """Enumerate names: "a", "a and b", "a, b, c and 4 more"."""
    names = list(names)
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])
