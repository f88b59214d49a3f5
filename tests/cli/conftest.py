"""Fixtures of tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_commands import Call


@pytest.fixture
def call(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run a command in an empty directory, without the user's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLUA_BENCH_DATA", raising=False)
    return call
