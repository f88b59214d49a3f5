"""console.py: plain lines for files, a bar for terminals, durations and prompts."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch

from glua_bench import console
from glua_bench.console import Progress, duration, is_terminal
from glua_bench.errors import ConfigError


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0, "0 s"),
        (8.4, "8 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (125, "2:05"),
        (3599.7, "1:00:00"),
        (3723, "1:02:03"),
        (360000, "100:00:00"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_terminal_is_one_that_can_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(Terminal()) and not is_terminal(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())


# -- plain lines ----------------------------------------------------------------------------------


def test_a_file_gets_few_plain_lines(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.stage("train", 1000)
        for step in range(1, 1001):
            clock.now += 0.5
            progress.update(step, {"loss": torch.tensor(1 / step)})
        progress.line("Done.")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 1000 steps" and lines[-1] == "Done."
    assert 5 <= len(lines) <= 20
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())  # no control characters
    assert lines[1] == "train 100/1000  7:30 left  loss 0.01"
    assert lines[-2] == "train 1000/1000  in 8:20  loss 0.001"


def test_short_work_is_two_lines(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.stage("read data", 3, unit="file")
        for step in range(1, 4):
            progress.update(step)
        progress.update(3)
    assert stream.getvalue().splitlines() == ["read data: 3 files", "read data 3/3  in 0 s"]


def test_a_resumed_stage_says_so_and_estimates_from_its_own_steps(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.stage("train", 100, start=50)
        clock.now += 20
        progress.update(60)
    assert stream.getvalue().splitlines() == [
        "train: resuming at step 50 of 100",
        "train 60/100  1:20 left",
    ]


def test_values_are_read_only_when_they_are_shown(clock: Clock) -> None:
    """Reading a loss synchronises the GPU, so it must not happen at every step."""

    class Watched:
        reads = 0

        def __float__(self) -> float:
            Watched.reads += 1
            return 0.5

    with Progress(stream=io.StringIO()) as progress:
        progress.stage("train", 1000)
        for step in range(1, 1000):
            clock.now += 0.1
            progress.update(step, {"loss": Watched()})
    assert 0 < Watched.reads < 12


def test_a_disabled_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for stream in (None, Terminal()):
        with Progress(enabled=False, stream=stream) as progress:
            progress.stage("train", 3)
            progress.update(3, {"loss": 1.0})
            progress.line("text")
        assert stream is None or stream.getvalue() == ""
    assert capsys.readouterr().out == ""


# -- the bar --------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_with_losses_and_the_time_left(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress.stage("train", 100)
        clock.now += 10
        progress.update(20, {"loss": 0.25})
        progress.line("[a line] above")
        clock.now += 40
        progress.update(100, {"loss": 0.125})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "20/100" in shown and "40 s left" in shown and "loss 0.25" in shown
    assert "[a line] above" in shown
    assert "100/100" in shown and "in 50 s" in shown and "loss 0.125" in shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_bar_keeps_its_shape_when_texts_are_long(
    width: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    name = "a stage that has a name of sixty characters, or even of more"
    with Progress(stream=stream) as progress:
        progress.stage(name, 100_000)
        clock.now += 10
        progress.update(500, {f"loss_{i}": i / 7 for i in range(9)})
        frame = stream.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).strip("\r").split("\r")
    assert "\n" not in frame and all(len(line) <= width for line in shown)  # states of one line
    assert "500/100000" in shown[-1] and "33:10 left" in shown[-1] and "━" in shown[-1]
    assert shown[-1].startswith("a stage that") and "…" in shown[-1]
    assert len({line.rindex("━") for line in shown}) == 1  # the bar does not move
    assert width == 60 or "loss_0 0" in shown[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_resuming_says_at_which_step(
    terminal: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    with Progress(stream=stream) as progress:
        progress.stage("segment", 500, start=300)
    assert "segment: resuming at step 300 of 500" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_that_is_usually_short_is_shown_only_if_it_takes_long(
    terminal: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    with Progress(stream=stream) as progress:
        for seconds in (0.1, 20.0):
            assert "select" not in stream.getvalue()
            progress.stage("select", 4, quietly=True)
            for step in range(1, 5):
                clock.now += seconds
                progress.update(step)
    assert "select" in stream.getvalue() and "4/4" in stream.getvalue()


def test_a_bar_gives_the_terminal_back_after_an_error(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), Progress(stream=stream) as progress:
        progress.stage("train", 100)
        raise ZeroDivisionError
    # The cursor was hidden while the bar was shown.
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0


def test_prompts_repeat_until_the_answer_is_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(text: str) -> int:
        if not text.isdigit():
            raise ConfigError(f"'{text}' is no number; give one.")
        return int(text)

    typed, prompts = iter(["x", " 7 ", ""]), []
    monkeypatch.setattr("builtins.input", lambda text: prompts.append(text) or next(typed))
    assert console.ask("How many", "3", read) == 7
    # Without a terminal, prompt and answer would stand on no line of their own.
    assert capsys.readouterr().out == "x\n'x' is no number; give one.\n7\n"
    assert console.ask("How many", "3", read) == 3 and capsys.readouterr().out == "\n"
    assert prompts == ["How many [3]: "] * 3
    assert console.ask("How many", "4", read, interactive=False) == 4
    assert capsys.readouterr().out == "How many: 4\n"
    with pytest.raises(ConfigError, match="'none' is no number"):
        console.ask("How many", "none", read, interactive=False)


def test_the_end_of_a_pipe_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(text: str) -> int:
        if not text.isdigit():
            raise ConfigError(f"'{text}' is no number; give one.")
        return int(text)

    monkeypatch.setattr("sys.stdin", io.StringIO("x\n5\n"))
    assert console.ask("How many", "3", read) == 5
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    with pytest.raises(ConfigError, match="The input ended before a valid answer to 'How many'"):
        console.ask("How many", "3", read)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="The input ended before a valid answer to 'How many'"):
        console.ask("How many", "3", read)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(ConfigError, match="answer to 'How many' is not valid UTF-8"):
        console.ask("How many", "3", read)


# -- hostile names --------------------------------------------------------------------------------


class Narrow(io.TextIOWrapper):
    """A terminal that shows ASCII only, as `main` configures it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="backslashreplace")

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


@pytest.mark.fault("hostile text", "names with terminal escapes on a progress bar in ASCII")
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_names_cannot_control_the_terminal(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    name, stream = "über [/b]\x1b]0;gotcha\x07\r", Narrow()
    with Progress(stream=stream) as progress:
        progress.stage(name, 3)
        progress.line(f"case {name} →")
        for step in range(1, 4):
            progress.update(step, {name: 1.0})
    said = stream.text()
    assert "\x1b]0;" not in said and "\x07" not in said
    assert r"case \xfcber [/b]\x1b]0;gotcha\x07\r \u2192" in said


@pytest.mark.fault("secrets", "messages printed from Python, where no command masks the output")
def test_what_is_said_and_warned_of_contains_no_password(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for tell in (console.say, console.warn):
        tell("postgresql://me:cr3t@host/base is away")
    out, err = capsys.readouterr()
    assert out == "postgresql://me:…@host/base is away\n" and err == f"warning: {out}"
