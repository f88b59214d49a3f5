"""reports/published.py: published results for context."""

from __future__ import annotations

import pytest

from glua_bench.reports.published import BLOCKS, NOT_COMPARABLE, context


def test_means_are_those_of_their_parts():
    """Detects typing errors in copied numbers."""
    checked = 0
    for block in BLOCKS.values():
        for line in block.lines:
            if line.parts:
                assert line.mean == pytest.approx(sum(line.parts) / len(line.parts), abs=0.11), line
                assert len(line.parts) == len(block.structures)
                checked += 1
    assert checked == 11


def test_a_block_says_what_it_is_and_holds_no_number_of_glua():
    table = context("mmwhs", "mr-ct")
    assert NOT_COMPARABLE in table.notes and "Published" in table.caption
    assert "SIFA v2" in table.rows and not any("glua" in row.lower() for row in table.rows)
    read_in = dict(zip(table.rows, table.columns[-1].values, strict=True))
    assert read_in["SIFA v1"] == "secondary" and read_in["SIFA v2"] == "primary"
    assert all(table.place(row, i) == "" for row in range(5) for i in range(len(table.columns)))


def test_other_data_has_no_context():
    assert context("phantom", "mr-ct") is None and context("mmwhs", "us-ct") is None
