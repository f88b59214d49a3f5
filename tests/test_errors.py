"""errors.py: what is quoted in messages, and which failures are no bugs."""

from __future__ import annotations

import errno
import gzip
import importlib
import io
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from glua_bench.errors import RunFailure, cause, death, printable

command_line = importlib.import_module("glua_bench.cli.main")  # `cli.main` is its function
CODES = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\r",
    "\x9b31m",
    "\x08\x08",
    "\u202e",
    "\u2067",
    "\x00",
    "\x7f",
]


@pytest.mark.fault("hostile text", "control characters of terminals in a message")
@pytest.mark.parametrize("code", CODES)
def test_control_characters_are_escaped(code: str) -> None:
    shown = printable(f"case{code}\nnext\tline é–")
    assert code not in shown and shown.endswith("\nnext\tline é–")
    assert shown.splitlines()[0] == "case" + code.encode("unicode_escape").decode()


def peer() -> None:
    raise RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]")


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x")


def wrapped() -> None:
    try:
        raise MemoryError
    except MemoryError as error:
        raise ValueError("cannot convert") from error


def gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")


def broken_pool() -> None:
    raise BrokenProcessPool("A child process terminated abruptly")


def damaged_weights() -> None:
    with tempfile.NamedTemporaryFile() as file:
        torch.save({"a": torch.zeros(100_000)}, file)
        file.seek(-300, os.SEEK_END)  # the list of its parts
        file.write(bytes(300))
        file.flush()
        torch.load(file.name, weights_only=True)


def damaged_table() -> None:
    pd.read_parquet(io.BytesIO(b"PAR1" + bytes(100) + b"PAR1"))


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "torch's allocator": (lambda: torch.empty(1 << 58), "The memory of this machine is exhausted"),
    "numpy's allocator": (lambda: np.empty(1 << 58), "The memory of this machine is exhausted"),
    "wrapped": (wrapped, "The memory of this machine is exhausted"),
    "GPU": (gpu, "The memory of the GPU is exhausted"),
    "pool": (broken_pool, "A process was killed, most likely for lack of memory"),
    "peer": (peer, "Another process of this run ended early"),
    "disk": (full, "The disk of /runs/x is full"),
    "gzip": (lambda: gzip.decompress(gzip.compress(b"x" * 99)[:-4] + b"abcd"), "A file is damaged"),
    "zlib": (lambda: zlib.decompress(b"no"), "A file is damaged"),
    "zip": (lambda: zipfile.ZipFile(io.BytesIO(b"no")), "A file is damaged"),
    "torch's file": (damaged_weights, "A file is damaged"),
    "parquet": (damaged_table, "A file is damaged"),
}


@pytest.mark.fault("killed", "out of memory, full disks and damaged files, as libraries raise them")
@pytest.mark.parametrize("kind", FAULTS)
def test_failures_of_the_machine_are_no_bugs(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail, said = FAULTS[kind]
    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    line = capsys.readouterr().err
    assert ended.value.code == RunFailure.exit_code
    assert line.startswith(f"glua-bench: error: {said}") and line.count("\n") == 1
    assert "bug" not in line and ";" in line


def test_other_errors_are_bugs() -> None:
    for error in (ValueError("x"), RuntimeError("shape mismatch"), KeyError("a"), OSError("x")):
        assert cause(error) == ""


def test_a_signal_is_told_with_what_to_do() -> None:
    assert death(-9).startswith("killed (SIGKILL), most likely for lack of memory; use a smaller")
    assert death(-11).startswith("crashed in a library (SIGSEGV)")
    assert death(-15) == "ended by SIGTERM; repeat the command."
    assert death(-200).startswith("ended by signal 200")


@pytest.mark.fault("hostile text", "output that cannot encode its characters")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_cannot_be_encoded_is_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_runs_in: type
) -> None:
    made = made_runs_in(tmp_path / "runs")
    made.add("source_only", 0.5, settings={}, fold=1)
    monkeypatch.chdir(tmp_path)
    report = ["report", "--runs", str(made.root), "--no-pictures", "--out", "→/µ"]
    for words in (
        ["list", "-v"],
        ["run", "--method", "glüa→", "--dataset", "phantom"],
        *[report] * (encoding == "ascii"),  # slow
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["glua-bench", *words])
        code: object = 0
        try:
            command_line.main()
        except SystemExit as ended:
            code = ended.code or 0
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
        assert "Traceback" not in err and "Error" not in err, err
        if words[0] == "run":
            assert code == 2 and "\\u2192" in err  # the arrow
        else:
            assert code == 0, err
    if encoding == "ascii":
        assert (tmp_path / "→" / "µ" / "report.html").is_file()
