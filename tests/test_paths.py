"""paths.py: listings and patterns of files, and valid file names."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glua_bench.data.formats import open_volume
from glua_bench.errors import DataError
from glua_bench.paths import (
    LONGEST_NAME,
    composed,
    distinct,
    entries,
    files_below,
    located,
    matching,
    name_fault,
)
from glua_bench.runs import inputs

NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def below(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_below(root)]


def test_what_is_hidden_does_not_count(tmp_path: Path) -> None:
    root = touch(
        tmp_path, "a.nii", "._a.nii", ".DS_Store", "__MACOSX/a.nii", "b/._c.nii", "b/c.nii", ".d/e"
    )
    assert below(root) == ["a.nii", "b/c.nii"]
    assert [path.name for path in entries(root)] == ["a.nii", "b"]
    assert [path.name for _, path in matching(root, "*.nii")] == ["a.nii"]
    assert [path.name for _, path in matching(root, "**/*.nii")] == ["a.nii", "c.nii"]
    # Who writes the dot means it.
    assert [path.name for _, path in matching(root, "._*.nii")] == ["._a.nii"]
    assert entries(root / "none") == entries(root / "a.nii") == [] == files_below(root / "none")


@pytest.mark.fault("hostile files", "loops of links in a directory of data")
def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "1.nii", "deep/2.nii")
    root = touch(tmp_path / "root", "z/own.nii")
    (root / "all").symlink_to(store, target_is_directory=True)
    (store / "back").symlink_to(root, target_is_directory=True)
    (root / "again").symlink_to(root / "z", target_is_directory=True)
    (root / "self").symlink_to("self")
    assert below(root) == ["all/1.nii", "all/deep/2.nii", "self", "z/own.nii"]
    assert [case for case, _ in matching(root, "**/*.nii")] == ["1", "2", "own"]
    assert [case for case, _ in matching(root, "all/*.nii")] == ["1"]
    assert [path.parent.name for _, path in matching(root, "*/own.nii")] == ["again", "z"]


def test_a_lost_file_behind_a_link_is_told_and_not_missed(tmp_path: Path) -> None:
    """Links may point to file systems that are not mounted."""
    root = touch(tmp_path, "1.nii")
    (root / "2.nii").symlink_to("gone.nii")
    assert [case for case, _ in matching(root, "*.nii")] == ["1", "2"]
    for read in (lambda: open_volume(root / "2.nii"), inputs.find([root]).images[1].open):
        with pytest.raises(DataError, match="2.nii is a link to gone.nii, which does not exist"):
            read()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every directory")
def test_a_directory_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for listing in (files_below, lambda root: matching(root, "*/*.nii")):
        with pytest.raises(DataError, match="closed cannot be listed .*: correct its permissions"):
            listing(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names", "cases"),
    [
        ("[1]/*.nii", ["[1]/a.nii", "1/b.nii"], ["a"]),
        ("[ab]*.nii", ["[ab]x.nii", "ac.nii"], ["x"]),
        ("x?_*.nii", ["x1_p.nii", "x12_q.nii"], ["p"]),
        ("*/mr_*.nii", ["p/mr_1.nii", "q/mr_2.nii"], ["p", "q"]),
        ("**/*.nii", ["a.nii", "b/c/d.nii"], ["a", "d"]),
        ("a/**/b/*.nii", ["a/b/1.nii", "a/x/y/b/2.nii", "a/3.nii"], ["1", "2"]),
        ("a**.nii", ["ab.nii", "a/c.nii"], ["b"]),
        ("./*.nii", ["a.nii"], ["a"]),
        ("*.nii", ["d.nii/e", "f.nii"], ["f"]),
        ("a.nii/*", ["a.nii"], []),
        ("**", ["a/b.nii"], []),
        (f"{NFC}/*.nii", [f"{NFD}/{NFD}.nii"], [NFC]),
        (f"{NFD}*.nii", [f"{NFC}1.nii"], ["1"]),
        ("(a|b)+/*.nii", ["(a|b)+/c.nii", "aa/d.nii"], ["c"]),
    ],
)
def test_a_pattern_finds_what_it_says(
    tmp_path: Path, pattern: str, names: list[str], cases: list[str]
) -> None:
    root = touch(tmp_path / "data [2024] *", *names)
    assert [case for case, _ in matching(root, pattern)] == cases


def test_a_name_is_found_in_the_other_unicode_form(tmp_path: Path) -> None:
    root = touch(tmp_path, f"{NFD}/{NFD}.nii", f"both/{NFD}", f"both/{NFC}")
    assert located(root / NFC / f"{NFC}.nii") == root / NFD / f"{NFD}.nii"
    assert located(root / "both" / NFC).name == NFC and located(root / "both" / NFD).name == NFD
    assert located(root / "none" / NFC) == root / "none" / NFC


@pytest.mark.fault("hostile text", "names of runs that leave their directory")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../x", "begins with a dot"),
        ("..", "begins with a dot"),
        (".x", "begins with a dot"),
        ("/etc/x", "contains a path separator"),
        ("a/b", "contains a path separator"),
        ("a\\b", "contains a path separator"),
        ("", "is empty"),
        ("  ", "is empty"),
        (" a", "begins or ends with whitespace"),
        ("a\n", "begins or ends with whitespace"),
        ("a\0b", "contains unprintable characters"),
        ("a" * (LONGEST_NAME + 1), f"is longer than {LONGEST_NAME} bytes"),
        ("ü" * LONGEST_NAME, f"is longer than {LONGEST_NAME} bytes"),
        ("Müller 2 (pre-op) [1]", ""),
        ("1003", ""),
        ("a.b", ""),
    ],
)
def test_names_that_leave_their_directory_are_known(name: str, fault: str) -> None:
    assert name_fault(name) == fault


@given(st.text(max_size=12))
def test_a_name_without_fault_makes_one_file_of_its_directory(name: str) -> None:
    if not name_fault(name):
        path = Path(os.path.normpath(Path("/runs") / name))
        assert path.parent == Path("/runs") and path.name == name


def plain(name: str) -> str:
    return "".join(sign if sign in "ab_" else "_" for sign in name)


@given(st.lists(st.text("ab_ /(", max_size=4)))
def test_names_stay_distinct_in_a_narrower_spelling(names: list[str]) -> None:
    spelled = distinct(names, plain)
    assert len(set(spelled.values())) == len(set(names)) == len(spelled)
    assert all(set(text) <= set("ab_0123456789cdef") for text in spelled.values())
    for name in spelled:  # neither order nor repetition changes a name's spelling
        assert spelled[name] == distinct([*names[::-1], name], plain)[name]
        assert set(name) - set("ab_") or spelled[name] == name


def test_composed_is_idempotent() -> None:
    assert composed(NFD) == NFC == composed(NFC) != NFD
