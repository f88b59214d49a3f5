"""Start the process that trains, and talk to it.

On Linux it is forked from a *server*, a process that has imported the harness and never held a
dataset: a fresh command line forks it before anything is planned (`prepare`), other programs (a
notebook, a script, a test) start it once. Elsewhere each training is started anew.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glua_bench.errors import RunFailure
from glua_bench.runs import interruption
from glua_bench.runs.sealed import child
from glua_bench.runs.sealed.seal import Reach

POLL_SECONDS = 0.2  # between checks whether this process was asked to stop
GRACE_SECONDS = 60.0  # after Ctrl-C, for the step and its checkpoint
LAST_SECONDS = 30.0  # for what an ended process has reported, on a busy machine
_KILL = 9  # SIGKILL, which Windows does not have
_FORKS = sys.platform == "linux" and hasattr(os, "setsid") and hasattr(os, "killpg")
_lock = threading.Lock()
_server: tuple[int, socket.socket] | None = None  # the process that started it, and its socket


class Killed(RunFailure):
    """A process that trains was killed: the run is neither done nor failed."""

    exit_code = 128 + _KILL  # `plan.LOST_CODE`, as if this process was killed


class Training:
    """A process that trains one run.

    Args:
        reach: the files that it may use.
        temporary: its directory for temporary files; removed by `close`.

    Attributes:
        unsealed: why it can reach target labels; "" if it verifiably cannot.

    Raises:
        RunFailure: the process could not be started.
    """

    def __init__(self, reach: Reach, temporary: Path) -> None:
        self._temporary = temporary
        self._popen: subprocess.Popen[bytes] | None = None
        self._begun = self._ended = False
        self._process = 0
        self._inbox: queue.SimpleQueue[bytes | int | None] = queue.SimpleQueue()
        self._commands, reports, status = self._start()
        threading.Thread(target=self._read, args=(reports,), daemon=True).start()
        threading.Thread(target=self._wait, args=(status,), daemon=True).start()
        environment = {**os.environ, "TMPDIR": str(temporary)}
        header = {
            "environment": environment,
            "folder": os.getcwd(),
            "path": _path(),
            "reach": vars(reach),
        }
        try:
            self._write(json.dumps(header).encode() + b"\n")
            first = next(self.messages())
        except BaseException:
            self.close()
            raise
        self._process, self.unsealed = int(first["process"]), str(first["reason"])

    def begin(self, given: dict[str, Any]) -> None:
        """Send what is to be trained."""
        content = pickle.dumps({**given, "path": _path()})
        self._write(f"{len(content)}\n".encode() + content)
        self._begun = True

    def answer(self, go_on: bool) -> None:
        """Answer a report of a candidate's score."""
        self._tell({"go_on": go_on})

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield reports until the process ends; pass on requests to stop.

        Raises:
            RunFailure: the process was killed.
            KeyboardInterrupt: again, or the process does not end after the first.
            Interrupted, KeyboardInterrupt: before `begin`, or the process ended without an answer.
        """
        stopping: BaseException | None = None
        deadline = float("inf")
        code: int | None = None
        lost = ""  # which other process of the run was killed
        told, silent = False, 0.0  # whether its pipe is closed; since when it has been silent
        while True:
            try:
                item = self._inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                item = b""
            except KeyboardInterrupt as error:
                if stopping is not None or not self._begun:  # nothing is to be saved
                    raise
                stopping, deadline = error, time.monotonic() + GRACE_SECONDS
                self._tell({"stop": int(signal.SIGINT)})
                continue
            now = time.monotonic()
            if stopping is None and (number := interruption.requested()) is not None:
                stopping = interruption.Interrupted(number)
                if not self._begun:
                    raise stopping
                self._tell({"stop": number})
            if now > deadline:
                raise KeyboardInterrupt
            if isinstance(item, int):
                code, silent = item, now
            elif item is None:
                told = True
            elif item:
                silent = now
                with contextlib.suppress(ValueError):  # not from the harness
                    message = json.loads(item)
                    if isinstance(message, dict) and message.get("kind") == "lost":
                        lost = str(message["text"])
                    elif isinstance(message, dict):
                        yield message
            # Something that it has left behind may keep the pipe open.
            if code is not None and (told or now - silent > LAST_SECONDS):
                self._ended = True
                if stopping is not None:  # a scheduler kills what does not end in time
                    raise stopping
                raise Killed(lost) if lost else _killed(code)

    def close(self) -> None:
        """End the process, if it has not ended, and remove its temporary files."""
        with contextlib.suppress(OSError, ValueError):
            self._commands.close()  # on which it ends
        if self._popen is not None:
            try:
                self._popen.wait(LAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        elif self._process and not self._ended:
            child.end_group(self._process)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _tell(self, command: dict[str, Any]) -> None:
        with contextlib.suppress(RunFailure):  # it has ended, which `messages` tells
            self._write(json.dumps(command).encode() + b"\n")

    def _write(self, content: bytes) -> None:
        try:
            self._commands.write(content)
            self._commands.flush()
        except (OSError, ValueError) as error:
            raise _killed(None) from error

    def _read(self, reports: BinaryIO) -> None:
        with reports, contextlib.suppress(OSError, ValueError):
            for line in reports:
                self._inbox.put(line)
        self._inbox.put(None)

    def _wait(self, status: BinaryIO | None) -> None:
        if self._popen is not None:
            self._inbox.put(self._popen.wait())
            return
        assert status is not None
        with status:
            line = status.readline()
        self._inbox.put(int(line) if line else -_KILL)  # or the server was killed

    def _start(self) -> tuple[BinaryIO, BinaryIO, BinaryIO | None]:
        """Return the ends of the pipes for commands, reports and exit status."""
        if not _FORKS:
            command = [sys.executable, child.__file__, "train"]
            pipe = subprocess.PIPE
            self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe)
            assert self._popen.stdin is not None and self._popen.stdout is not None
            return self._popen.stdin, self._popen.stdout, None  # type: ignore[return-value]
        pipes = [os.pipe() for _ in range(3)]
        given = [pipes[0][0], pipes[1][1], pipes[2][1]]
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            outputs = [number if _is_open(number) else null for number in (1, 2)]
            _request([*given, *outputs])
        finally:
            for descriptor in (*given, null):
                os.close(descriptor)
        return (
            os.fdopen(pipes[0][1], "wb"),
            os.fdopen(pipes[1][0], "rb"),
            os.fdopen(pipes[2][0], "rb"),
        )


def prepare() -> None:
    """Fork the server, if this process is a fresh command line, which saves its imports.

    Called before any dataset is loaded.
    """
    global _server
    fresh = "torch" not in sys.modules and threading.active_count() == 1
    if not _FORKS or not fresh or _server is not None:
        return
    child.preload()
    ours, theirs = socket.socketpair()
    process = child.fork()
    if process == 0:
        try:
            ours.close()
            child.serve(theirs.detach())
        finally:
            os._exit(0)
    theirs.close()
    _server = os.getpid(), ours


def _request(descriptors: list[int]) -> None:
    """Have the server fork a training, and start the server if there is none."""
    global _server
    with _lock:
        for _ in range(2):
            if _server is None or _server[0] != os.getpid():
                _server = os.getpid(), _start_server()
            try:
                socket.send_fds(_server[1], [b"+"], descriptors)
                return
            except OSError:  # it was killed
                _server[1].close()
                _server = None
    raise RunFailure("The process that trains could not be started; repeat the command.")


def _start_server() -> socket.socket:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    with theirs:
        started = subprocess.Popen(
            [sys.executable, child.__file__, "serve", str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[number],
            start_new_session=True,  # only this process receives Ctrl-C
        )

    def end() -> None:
        ours.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(5)

    atexit.register(end)
    return ours


def _path() -> list[str]:
    return [str(path) for path in sys.path]


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _killed(code: int | None) -> Killed:
    why = ""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            why = f" by {signal.Signals(-code).name}"
        if code == -_KILL:
            why += ", perhaps for lack of memory"
    what = f"was killed{why}" if code is None or code < 0 else f"ended with code {code}"
    return Killed(f"The process that trains {what}; the same command resumes the run.")
