"""datasets/placed.py: a file is there whole, or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from glua_bench.datasets.placed import UNFINISHED, placed, sweep


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "case.nii.gz"
    with placed(path) as unfinished:
        assert unfinished.name.endswith("case.nii.gz") and unfinished.parent == path.parent
        assert unfinished.name.startswith(UNFINISHED)
        unfinished.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), placed(path) as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_name(tmp_path: Path) -> None:
    with placed(tmp_path / "x") as one, placed(tmp_path / "x") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "x").read_text() == "1"  # whoever ends last


def test_leftovers_go_after_a_day_and_nothing_else(tmp_path: Path) -> None:
    names = (f"{UNFINISHED}old.nii", f"{UNFINISHED}new.nii", "old.nii")
    for name in names:
        (tmp_path / name).touch()
        if "old" in name:
            os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{UNFINISHED}new.nii", "old.nii"]
    sweep(tmp_path / "missing")
