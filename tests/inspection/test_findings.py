"""glua_bench/inspection/findings.py: the table of findings, and lists in words."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from glua_bench.errors import RunFailure
from glua_bench.inspection.findings import Finding, enumerate_names, write_findings


def test_the_table_holds_every_finding(tmp_path: Path) -> None:
    findings = [
        Finding("image", ("ct_1",), "It is damaged, and says: “no”.", problem=True),
        Finding("same image", ("ct_1", "mr_2"), "Both hold the same voxels."),
        Finding("size of domains", (), "One is larger."),
    ]
    write_findings(tmp_path / "new" / "found.csv", findings)
    with (tmp_path / "new" / "found.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["severity"] for row in rows] == ["problem", "warning", "warning"]
    assert [row["cases"] for row in rows] == ["ct_1", "ct_1 mr_2", ""]
    assert [row["text"] for row in rows] == [finding.text for finding in findings]


def test_a_table_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFailure, match="cannot be created.*--out"):
        write_findings(tmp_path / "file" / "found.csv", [])


def test_lists_in_words() -> None:
    assert [enumerate_names(names) for names in ("", "a", "ab", "abc", "abcde")] == [
        "",
        "a",
        "a and b",
        "a, b and c",
        "a, b, c and 2 more",
    ]
