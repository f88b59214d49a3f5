"""errors.py: what is quoted in messages, masked or escaped, and which failures are no bugs."""

from __future__ import annotations

import errno
import gzip
import importlib
import io
import itertools
import os
import pickle
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from glua_bench.errors import (
    ConfigError,
    RunFailure,
    cause,
    complaint,
    death,
    escaped_url,
    printable,
    without_password,
)

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


# -- passwords ------------------------------------------------------------------------------------

# Every secret ends in "cr3t", and no part of it but the first characters may be seen.
SECRETS = (
    "cr3t", "s/cr3t", "s:cr3t", "s@cr3t", "s#cr3t", "s%40cr3t", "s?cr3t", "12/cr3t", "s'cr3t",
    's"cr3t', "s=cr3t", "s,cr3t", "s)cr3t", "@cr3t/", "s://cr3t", "s\\cr3t",
)  # fmt: skip
FRAMES = (
    "{}", "'{}'", '"{}"', "see ({}) now.", "<{}>", "`{}`", '{{"a":"{}","b":"c"}}',
    "--storage={} x", "uri.{}", "({!r}, 1)", "a {} b http://u:other@h.x/ c", "x=[{}], y=1",
)  # fmt: skip
USERS = ("me", "me@server", "jane.doe", "")
PLACES = ("host/base", "host.x.org:5432/base?x=1", "127.0.0.1:9")
SCHEMES = ("postgresql", "http", "HTTPS", "mysql+pymysql")


def urls(secret: str) -> list[str]:
    made = [
        f"{scheme}://{user}:{secret}@{place}"
        for scheme, user, place in itertools.product(SCHEMES, USERS, PLACES)
    ]
    return [
        *made,
        f"https://{secret}@host",
        f"https://host/x?token={secret}&y=1",
        f"http://host.x.org:80/x?api_key={secret}",
        f"postgresql://me@host/base?sslpassword={secret}",
        f"postgresql://me:{secret}@host/base?password={secret}&b=2",
        f"postgresql:/me:{secret}@host/base",
    ]


@pytest.mark.fault("secrets", "URLs with every kind of password, in every kind of text")
@pytest.mark.parametrize("secret", SECRETS)
def test_no_part_of_a_secret_is_left(secret: str) -> None:
    for url in urls(secret):
        assert "cr3t" not in without_password(url, whole=True)
        with_blank = f"--storage={url.replace(secret, f'two words {secret}')}"
        assert "cr3t" not in without_password(with_blank, whole=True)
        for frame in FRAMES:
            shown = without_password(frame.format(url))
            assert "cr3t" not in shown and "other" not in shown, (frame, url)
            assert without_password(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://cdn.jsdelivr.net/npm/@niivue/niivue@0.44",
        "https://user.github.io/x?y=a@b",
        "sqlite:////data/me@lab/a:b.db",
        "file:///x/a:b@c",
        "C:/data/a:b@c",
        "http://host:5000: 3 runs uploaded",
        "postgresql://me@host/base?application_name=a",
        "Dice 0.5 @ 500: a/b:c@d",
    ],
)
def test_a_text_without_a_secret_stays(text: str) -> None:
    assert without_password(text) == text == without_password(text, whole=True)


def test_long_texts_are_masked_in_linear_time() -> None:
    seconds = []
    for size in (20_000, 200_000):
        began = time.process_time()
        assert without_password("a" * 3 * size + " x:/y " + "b+" * size).endswith("b+")
        seconds.append(time.process_time() - began)
    assert seconds[1] < 40 * max(seconds[0], 1e-3)  # quadratic time takes a hundredfold


def test_a_connection_string_of_libpq_is_masked() -> None:
    shown = without_password("host=h password='my cr3t' user=me sslpassword=cr3t")
    assert shown == "host=h password=… user=me sslpassword=…"


def test_errors_never_quote_a_password() -> None:
    url = "postgresql://me:cr3t@host/base"
    for kind in (ConfigError, RunFailure):
        error = kind(f"{url} cannot be read.")
        assert str(error) == "postgresql://me:…@host/base cannot be read."
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert complaint(f"glua-bench: error: {url} is away.") == "postgresql://me:…@host/base is away."


@pytest.mark.parametrize("secret", SECRETS)
def test_a_library_finds_the_same_host_and_password(secret: str) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    for user in USERS[:3]:
        url = escaped_url(f"postgresql://{user}:{secret}@host:5432/base?application_name=a")
        found = sqlalchemy.make_url(url)
        assert (found.host, found.port, found.database) == ("host", 5432, "base")
        assert found.username == user and found.password in (secret, "s@cr3t")
        assert escaped_url(url) == url
