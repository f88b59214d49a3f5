"""files.py: atomic files and directories, leftovers and locks, also of killed processes."""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from faults import damaged

from glua_bench import files
from glua_bench.errors import RunFailure, first_line, reason, shortened, without_password
from glua_bench.files import (
    UNFINISHED,
    Damaged,
    add_checksum,
    check,
    csv_cell,
    csv_text,
    drop_torn_line,
    exclusive,
    new_folder,
    read_checked,
    read_checked_json,
    replacing,
    sha256,
    sweep,
    try_lock,
    undone,
    write_checked,
    write_checked_json,
    write_json,
    write_text,
)
from glua_bench.paths import entries, files_below, matching
from glua_bench.runs.sealed import landlock

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("glua_bench", "methods", "datasets", "sweeps", "reports")


def run(code: str, *arguments: object) -> int:
    """Execute code in a new process; return its exit code."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)]).returncode


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"{UNFINISHED}*"))


# -- whole files and directories ------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "case.nii.gz"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        assert temporary.name.endswith("case.nii.gz") and temporary.parent == path.parent
        assert temporary.name.startswith(UNFINISHED)
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["case.nii.gz"]


def test_a_file_is_not_replaced_by_its_like(tmp_path: Path) -> None:
    """Also not by another process, so that rules of Landlock go on to hold for it."""
    path = tmp_path / "entry.npy"
    files.write_text(path, "content")
    first = path.stat()
    files.write_text(path, "content")
    assert path.stat().st_ino == first.st_ino and path.stat().st_mtime_ns == first.st_mtime_ns
    for other in ("Content", "content and more", ""):
        before = path.stat().st_ino
        files.write_text(path, other)
        assert path.read_text() == other and path.stat().st_ino != before
    link = tmp_path / "link"
    link.symlink_to(path)
    files.write_text(link, path.read_text())
    assert not link.is_symlink() and sorted(tmp_path.iterdir()) == [path, link]


@pytest.mark.skipif(not landlock.version(), reason="needs a kernel with Landlock")
@pytest.mark.fault("processes", "write a cache entry again while a sealed process may read it")
def test_a_sealed_process_reads_a_file_that_another_one_wrote_again(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    files.write_text(path, "content")
    code = (
        "import sys; from pathlib import Path; from glua_bench.runs.sealed.landlock import Rules\n"
        "rules, path = Rules(), Path(sys.argv[1])\n"
        "rules.allow(path), rules.enforce(), print('sealed', flush=True)\n"
        "input(); print(path.open().read(), flush=True)\n"
        "input(); print(path.open().read(), flush=True)\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "sealed\n"
        files.write_text(path, "content")
        print(file=child.stdin, flush=True)
        assert child.stdout.readline() == "content\n"
        other = tmp_path / "other"  # the control: a file that is replaced can no longer be read
        other.write_text("content")
        os.replace(other, path)
        _, said = child.communicate("\n")
        assert child.returncode == 1 and "PermissionError" in said


def test_a_directory_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "below" / "model"
    with pytest.raises(ZeroDivisionError), new_folder(path) as temporary:
        write_text(temporary / "half", "")
        raise ZeroDivisionError
    assert not path.parent.exists()
    path.mkdir(parents=True)  # an empty one is no obstacle
    with new_folder(path) as temporary:
        write_text(temporary / "file", "text")
        assert list(path.iterdir()) == []
    assert (path / "file").read_text() == "text" and list(path.parent.iterdir()) == [path]
    with new_folder(path) as temporary:  # somebody else was first
        write_text(temporary / "other", "")
    assert [p.name for p in path.iterdir()] == ["file"] and leftovers(tmp_path) == []


def test_two_writers_do_not_share_a_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "x") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "x").read_text() == "1"  # whoever ends last


def test_json_takes_the_scalars_of_numpy(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": np.float32(0.5), "b": np.int64(3), "c": tmp_path})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.5, "b": 3, "c": str(tmp_path)}


def test_a_file_has_the_permissions_that_the_user_lets_it_have(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("é" * 80), "text")


@pytest.mark.fault("full disk", "while a file is moved into place")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_errors_on_writing_name_the_file_and_what_to_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    advice = {
        errno.ENOSPC: "full; free some space or choose another directory with --out",
        errno.EIO: "check the disk",
    }.get(number, "choose another directory with --out")
    with pytest.raises(RunFailure, match=rf"{tmp_path / 'x'} .*{advice}.*\.$"):
        write_text(tmp_path / "x", "text", "--out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("killed", "half a line at the end of a journal")
def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    drop_torn_line(path)
    assert not path.exists()
    for before, after in (
        (b"", b""),
        (b"whole\n", b"whole\n"),
        (b"whole\nhalf", b"whole\n"),
        (b"half", b""),
        (b"whole\n" + b"x" * 10_000, b"whole\n"),
        (b"x" * 5000 + b"\n" + b"y" * 5000, b"x" * 5000 + b"\n"),
    ):
        path.write_bytes(before)
        drop_torn_line(path)
        assert path.read_bytes() == after


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


# -- checksums ------------------------------------------------------------------------------------


@pytest.mark.fault("silent damage", "any file with a checksum")
def test_a_damaged_file_is_found(tmp_path: Path, tries: Callable[[int], range]) -> None:
    path, listing = tmp_path / "file", tmp_path / "file.json"
    write_checked(path, b"some content" * 50, "name")
    write_checked_json(listing, {"a": [1, 2.5, None], "b": {"c": "text"}, "d": np.int64(3)})
    assert read_checked(path, "name") == b"some content" * 50 and check(path, "name") == 600
    expected = {"a": [1, 2.5, None], "b": {"c": "text"}, "d": 3}
    assert read_checked_json(listing) == expected
    good, text = path.read_bytes(), listing.read_bytes()
    for seed in tries(200):
        path.write_bytes(damaged(good, seed))
        for look in (read_checked, check):
            with pytest.raises(Damaged, match=r"file is damaged \([^.]*\)$"):
                look(path, "name")
        listing.write_bytes(damaged(text, seed))
        with contextlib.suppress(Damaged):
            assert read_checked_json(listing) == expected  # blanks have no meaning
    path.write_bytes(good)
    for name in ("", "other", "name "):
        with pytest.raises(Damaged, match="its checksum differs"):
            check(path, name)
    path.write_bytes(good[: -len(good) // 8])
    with pytest.raises(Damaged, match="it has no checksum"):
        read_checked(path, "name")
    listing.write_bytes(text)
    listing.rename(tmp_path / "other.json")
    with pytest.raises(Damaged, match="its checksum differs"):
        read_checked_json(tmp_path / "other.json")
    for look in (read_checked, check):
        with pytest.raises(FileNotFoundError):
            look(tmp_path / "missing", "name")


def test_readers_of_formats_ignore_the_checksum(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    with replacing(tmp_path / "a.npy") as temporary:
        np.save(temporary, array)
        add_checksum(temporary, "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)
    assert check(tmp_path / "a.npy", "a.npy") == 128 + 48


def test_the_file_that_is_replaced_can_be_kept(tmp_path: Path) -> None:
    for text in "abc":
        with replacing(tmp_path / "last", keep=tmp_path / "previous") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "last").read_text() == "c" and (tmp_path / "previous").read_text() == "b"


# -- leftovers ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from glua_bench.files import new_folder, replacing, write_text
path = Path(sys.argv[1])
with new_folder(path / "folder") as folder, replacing(path / "file.txt") as temporary:
    write_text(folder / "inside", "half")
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault("killed", "within the writing of a file and a directory")
def test_a_killed_writer_leaves_what_was_there_and_the_next_one_sweeps(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    assert run(KILLED, tmp_path) == -signal.SIGKILL
    assert (tmp_path / "file.txt").read_text() == "old" and not (tmp_path / "folder").exists()
    assert len(leftovers(tmp_path)) == 2
    write_text(tmp_path / "other", "")  # the first time that this process writes there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "other"]
    # What the same process would otherwise leave lying, it removes when it is asked to.
    assert run(KILLED, tmp_path) == -signal.SIGKILL
    sweep(tmp_path)
    assert leftovers(tmp_path) == []


def test_nothing_lists_what_is_unfinished(tmp_path: Path) -> None:
    run_path = tmp_path / "phantom" / "glua" / "id"
    with (
        replacing(run_path / "config.yaml") as file,
        new_folder(tmp_path / "phantom" / "glua" / "other") as folder,
    ):
        file.write_text("half")
        (folder / "config.yaml").write_text("half")
        assert entries(run_path) == [] and files_below(tmp_path) == []
        assert matching(tmp_path, "*/*/*/config.yaml") == []
        assert matching(tmp_path, "**/*.yaml") == []


WRITING = """
import sys
from pathlib import Path
from glua_bench.files import replacing
with replacing(Path(sys.argv[1]) / "file") as temporary:
    temporary.write_text("whole")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.fault("processes", "the leftovers of another process are swept while it writes")
def test_what_a_live_process_writes_is_never_swept(tmp_path: Path) -> None:
    """Files of live processes are kept regardless of their age."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    (leftover,) = leftovers(tmp_path)
    os.utime(leftover, (1, 1))
    sweep(tmp_path)
    with replacing(tmp_path / "other") as own:  # nor what this process writes
        own.write_text("")
        os.utime(own, (1, 1))
        sweep(tmp_path)
    writer.stdin.close()
    assert writer.wait() == 0 and leftovers(tmp_path) == []
    assert (tmp_path / "file").read_text() == "whole" and (tmp_path / "other").exists()


def test_leftovers_of_other_machines_go_after_a_day(tmp_path: Path) -> None:
    """Processes on other machines may be alive."""
    old = time.time() - 90_000
    for name in (f"{UNFINISHED}other-1-a-old.nii", f"{UNFINISHED}new.nii", "old.nii"):
        (tmp_path / name).touch()
        if "old" in name:
            os.utime(tmp_path / name, (old, old))
    for name in ("old", "new"):  # a directory is as old as the newest of its files
        folder = tmp_path / f"{UNFINISHED}other-1-{name}-folder"
        folder.mkdir()
        (folder / "file").touch()
        os.utime(folder / "file", (old, old) if name == "old" else None)
        os.utime(folder, (old, old))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{UNFINISHED}new.nii",
        f"{UNFINISHED}other-1-new-folder",
        "old.nii",
    ]
    sweep(tmp_path / "missing")


def test_where_machines_have_no_number_leftovers_are_judged_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_machine", lambda: "")
    for name in ("old", "new"):
        (tmp_path / f"{UNFINISHED}-999999999-{name}").touch()
    os.utime(tmp_path / f"{UNFINISHED}-999999999-old", (1, 1))
    sweep(tmp_path)
    assert [path.name for path in leftovers(tmp_path)] == [f"{UNFINISHED}-999999999-new"]


# -- locks ----------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from pathlib import Path
from glua_bench.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    """Return a lock file and the process that holds it."""
    path = tmp_path / "locks" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    yield path, holder
    holder.kill()
    holder.wait()


@pytest.mark.fault("killed", "the holder of a lock")
def test_a_lock_is_free_as_soon_as_its_holder_is_killed(
    held: tuple[Path, subprocess.Popen],
) -> None:
    path, holder = held
    with try_lock(path) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with try_lock(path) as mine:
        assert mine
        with try_lock(path) as again:  # also against this process itself
            assert not again
    assert path.exists()  # whoever waits for it holds the same file
    with exclusive(path, lambda: pytest.fail("nobody holds it")):
        pass


def test_a_held_lock_is_waited_for(held: tuple[Path, subprocess.Popen]) -> None:
    path, holder = held
    told = []

    def waiting() -> None:
        told.append(True)
        holder.kill()

    with exclusive(path, waiting):
        assert told == [True] and holder.wait() == -signal.SIGKILL


@pytest.mark.parametrize("lock", [try_lock, exclusive])
@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "ENOLCK", "EINVAL"])
def test_a_file_system_without_locks_is_refused(
    lock: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr("fcntl.flock", refuse)
    refused = pytest.raises(
        RunFailure, match=r"lock cannot be locked \(.*\); mount .*\(flock\).* with --runs\.$"
    )
    with refused, lock(tmp_path / "lock", option="--runs"):
        pytest.fail("nothing is held")
    monkeypatch.undo()
    with lock(tmp_path / "lock"):  # no trace of a lock of another kind is in the way
        pass


@pytest.mark.parametrize("lock", [try_lock, exclusive])
def test_locks_report_errors_and_are_released_after_errors(lock: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(RunFailure, match=r"because a parent is a file.*\.$")
    with refused, lock(tmp_path / "file" / "lock"):
        pytest.fail("nothing is held")
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "lock"):
        raise ZeroDivisionError
    with try_lock(tmp_path / "lock") as mine:
        assert mine


# -- what sentences quote -------------------------------------------------------------------------


def test_a_quoted_reason_is_one_line_of_one_sentence() -> None:
    assert reason(ValueError("bad magic.\n  See\tthe manual.")) == "bad magic; See the manual"
    assert first_line(ValueError("\nconnection failed.\n(Background: ...)")) == "connection failed"
    assert reason(KeyError()) == first_line(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 999))) == 200
    assert shortened("abcd", 4) == "abcd" and shortened("abcde", 4) == "abc…"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me@host/base", "postgresql://me@host/base"),
        ("postgresql://me:secret@host/base", "postgresql://me:…@host/base"),
        ("postgresql+psycopg://me:se/c:r@et@host:5432/b", "postgresql+psycopg://me:…@host:5432/b"),
        ("postgresql://host/b?user=me&password=secret", "postgresql://host/b?user=me&password=…"),
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("https://secret@host", "https://host"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////data/me@lab/a:b.db", "sqlite:////data/me@lab/a:b.db"),
        ("/a/journal.log", "/a/journal.log"),
    ],
)
def test_passwords_and_tokens_are_masked(url: str, shown: str) -> None:
    assert without_password(url) == shown


# -- one home -------------------------------------------------------------------------------------

# Savers of libraries, which write in place: only to the name that a writer of files.py gives.
SAFE = {"replacing", "generating", "writing", "tempfile.TemporaryDirectory"}
SAVERS = {"save", "savefig", "to_parquet", "savez", "imwrite", "WriteImage"}


def _strays(path: Path) -> Iterator[str]:
    """Yield the places where a module writes, moves or locks files itself."""

    def visit(node: ast.AST, safe: bool) -> Iterator[str]:
        if isinstance(node, ast.With):
            given = {ast.unparse(item.context_expr).split("(")[0] for item in node.items}
            safe = safe or bool(
                given & {"replacing", "generating", "writing", "tempfile.TemporaryDirectory"}
            )
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {str(getattr(node, "module", ""))}
            if names & {"fcntl", "filelock"}:
                yield f"{path.name}:{node.lineno} imports {ast.unparse(node)}"
        if isinstance(node, ast.Call) and not (safe and _is_saver(node)) and _writes(node):
            yield f"{path.name}:{node.lineno} {ast.unparse(node)[:60]}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, safe)

    return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def _is_saver(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", "")
    return name in (*SAVERS, "to_csv") or ast.unparse(call.func) == "temporary.open"


def _writes(call: ast.Call) -> bool:
    name, of = getattr(call.func, "attr", ""), ast.unparse(call.func)
    if name in ("write_text", "write_bytes", "mkstemp", "NamedTemporaryFile", *SAVERS):
        return not of.startswith("self.")
    if of in ("os.replace", "os.rename", "os.link", "os.fsync", "os.umask", "shutil.move"):
        return True
    if name == "to_csv":
        return bool(call.args)
    if name in ("replace", "rename"):  # of a path; those of strings and tables have more to say
        return len(call.args) == 1 and not call.keywords and not _is_text(call.args[0])
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    return (name == "open" or of == "open") and any(str(mode)[:1] in "wx" for mode in modes)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_other_module_writes_moves_or_locks_files_by_itself() -> None:
    # The conformance kit makes data in directories of its own, which end with it.
    kit = ROOT / "glua_bench" / "conformance"
    sources = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 90
    home = ROOT / "glua_bench" / "files.py"
    checked = [path for path in sources if path != home and path.parent != kit]
    found = [stray for path in checked for stray in _strays(path)]
    assert found == []


def test_the_search_for_other_writers_finds_them(tmp_path: Path) -> None:
    for line in (
        "import fcntl",
        "from filelock import FileLock",
        "path.write_text('x')",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "folder.rename(path)",
        "path.open('w')",
        "open(path, 'wb')",
        "table.to_csv(path, index=False)",
        "figure.savefig(path)",
        "tempfile.mkstemp()",
    ):
        (tmp_path / "module.py").write_text(line)
        assert len(list(_strays(tmp_path / "module.py"))) == 1, line
    (tmp_path / "module.py").write_text(
        "with replacing(path) as temporary:\n    figure.savefig(temporary)\n"
        "text.replace('a', 'b')\ntable.rename('x')\ntable.to_csv(index=False)\nopen(path, 'a')\n"
    )
    assert list(_strays(tmp_path / "module.py")) == []


# -- CSV ------------------------------------------------------------------------------------------

FORMULAS = (
    "=1+1", "=HYPERLINK(\"http://x\")", "+1+cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0",
    "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "-x", "--1", "a\r=1",
)  # fmt: skip


@pytest.mark.fault("hostile text", "names that spreadsheets read as formulas")
@pytest.mark.parametrize("text", FORMULAS)
def test_texts_in_csv_files_are_no_formulas(text: str) -> None:
    frame = pd.DataFrame({text: [-1.5, 2.0], "case": [text, "ct_1"], "n": [-1, 3]})
    frame["kind"] = pd.Categorical([text, "b"])
    cells = [cell for row in csv.reader(io.StringIO(csv_text(frame), newline="")) for cell in row]
    assert not [cell for cell in cells if csv_cell(cell) != cell]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r", "\n"))]
    assert cells.count(csv_cell(text)) == 3
    again = pd.read_csv(io.StringIO(csv_text(frame)))
    assert list(again["n"]) == [-1, 3] and list(again[csv_cell(text)]) == [-1.5, 2.0]


@pytest.mark.parametrize("value", ["-0.5", "+1e-3", "-inf", "a=b", "", "ct_1", "–", -1, -0.5, None])
def test_numbers_and_names_in_csv_files_are_unchanged(value: Any) -> None:
    assert csv_cell(value) == value


# -- a directory or nothing -----------------------------------------------------------------------


def test_what_a_failed_block_writes_is_removed(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with undone(folder):
            write_text(folder / "figures" / "one", "")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    write_text(tmp_path / "filled" / "mine", "")
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "filled")
    assert (tmp_path / "filled" / "mine").exists()
