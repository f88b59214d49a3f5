"""The process that trains: sealed before any plugin is imported, and told what to do by a pipe.

Started as a script, it has three roles:

- `child.py serve DESCRIPTOR` imports the harness once and forks a process per training (Linux);
- `child.py train` is one training (elsewhere), with its commands on stdin and reports on stdout;
- `child.py rank FILE` is a further process of a training on several devices.

Commands: a line of JSON with environment and `Reach`; then, when the seal is reported, the
`Withheld` run (pickled, since it comes from the process that started this one); then lines of JSON.
Reports are lines of JSON only, since a plugin may write them, too.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if __name__ == "__main__":  # a script's folder is searched first for modules
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _here]

import contextlib

from glua_bench.runs.sealed.seal import Reach, seal  # needs no library

if TYPE_CHECKING:
    from glua_bench.console import Progress
    from glua_bench.runs.sealed.withheld import Withheld

REDRAW_SECONDS = 0.2  # between reports of a step


class Link:
    """Commands from, and reports to, the process that started this one.

    Implements `training.Reports`.

    Args:
        commands: lines of JSON.
        reports: lines of JSON.
    """

    def __init__(self, commands: BinaryIO, reports: BinaryIO) -> None:
        self.commands, self._reports = commands, reports
        self._lock = threading.Lock()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.progress: Any = None
        self.watched, self.pictures = "", False
        self._saving = True  # a request to stop waits for a checkpoint

    def send(self, kind: str, **values: Any) -> None:
        """Report something."""
        with self._lock:
            self._reports.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            self._reports.flush()

    def end(self, kind: str, **values: Any) -> None:
        """Report how the training ended, after all that it has printed."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.send(kind, **values)

    def listen(self) -> None:
        """Receive commands in a thread, and end this process with the one that started it."""
        threading.Thread(target=self._listen, daemon=True, name="commands").start()

    def _listen(self) -> None:
        from glua_bench.runs import interruption

        for line in self.commands:
            command = json.loads(line)
            if "stop" in command:
                interruption.ask(int(command["stop"]))
            else:
                self._answers.put(bool(command["go_on"]))
        os._exit(1)

    def seen(self, step: int, score: float) -> None:
        """Tell a candidate's score; raise `Stopped` if the watcher stops the run."""
        from glua_bench.runs.sealed.training import Stopped

        self.send("seen", step=step, score=float(score))
        if not self._answers.get():
            raise Stopped

    def trained(self) -> None:
        """Tell that all stages are trained."""
        self._saving = False
        self.send("trained")

    def selected(
        self, chosen: Mapping[str, int], scores: Mapping[str, Mapping[int, float]]
    ) -> None:
        """Tell which candidate each selector chose."""
        plain = {name: {str(s): float(v) for s, v in own.items()} for name, own in scores.items()}
        self.send("selected", chosen=dict(chosen), scores=plain)

    def predicted(self, step: int, case: str) -> None:
        """Tell that a label map is written."""
        self.leave_if_asked()
        self.send("predicted", step=step, case=case)

    def leave_if_asked(self) -> None:
        """Raise `Interrupted` after Ctrl-C, once nothing is left to save."""
        from glua_bench.runs import interruption

        if not self._saving and interruption.requested() == signal.SIGINT:
            interruption.end_if_asked()


class Said(io.TextIOBase):
    """A stream whose lines the process at the other end prints, which masks passwords in them.

    Args:
        link: receives the lines.
        stream: "stdout" or "stderr".
    """

    def __init__(self, link: Link, stream: str) -> None:
        self._link, self._stream, self._line = link, stream, ""

    def write(self, text: str) -> int:
        """Send what is complete up to the last line."""
        lines, end, self._line = (self._line + text).rpartition("\n")
        if end:
            self._link.send("said", stream=self._stream, text=lines + end)
        return len(text)

    def flush(self) -> None:
        """Send an incomplete line, too."""
        if self._line:
            self._link.send("said", stream=self._stream, text=self._line)
            self._line = ""


def relay(link: Link, enabled: bool) -> Progress:
    """Return a progress bar that is drawn by the process at the other end."""
    from glua_bench.console import Progress

    class Relay(Progress):
        """Reports what is to be shown."""

        _next = 0.0

        def stage(
            self, name: str, total: int, start: int = 0, quietly: bool = False, unit: str = "step"
        ) -> None:
            self._total, self._next = total, 0.0
            if enabled:
                link.send("stage", name=name, total=total, start=start, quietly=quietly, unit=unit)

        def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
            link.leave_if_asked()
            now = time.monotonic()
            if enabled and (step >= self._total or now >= self._next):
                self._next = now + REDRAW_SECONDS
                plain = {name: float(value) for name, value in (values or {}).items()}
                link.send("update", step=step, values=plain)

        def line(self, text: str) -> None:
            if enabled:
                link.send("line", text=text)

    return Relay(enabled=False)


def work(commands: BinaryIO, reports: BinaryIO) -> int:
    """Execute one training; return the exit code."""
    link = Link(commands, reports)
    header = json.loads(commands.readline())
    os.environ.clear()
    os.environ.update(header["environment"])
    os.chdir(header["folder"])
    sys.path[:] = header["path"]
    reach = Reach(**{name: tuple(value) for name, value in header["reach"].items()})
    sys.argv[:] = [__file__]
    unsealed = seal(reach)
    import tempfile

    tempfile.tempdir = None  # found again by TMPDIR
    link.send("seal", reason=unsealed, process=os.getpid())
    sys.stdout, sys.stderr = Said(link, "stdout"), Said(link, "stderr")
    content = commands.read(int(commands.readline()))
    from glua_bench.runs import interruption
    from glua_bench.runs.sealed.training import Stopped

    try:
        with interruption.listening():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes as a command
            link.listen()
            link.end("result", **_train(link, content))
    except Stopped:
        link.end("stopped")
    except interruption.Interrupted as stopped:
        link.end("interrupted", number=stopped.number)
    except BaseException as error:  # a plugin may raise anything
        link.end("error", **described(error))
    return 0


def _train(link: Link, content: bytes) -> dict[str, Any]:
    import torch

    from glua_bench.errors import PluginError
    from glua_bench.files import exclusive, write_bytes
    from glua_bench.registry import Registry
    from glua_bench.runs.plan import LOST_SECONDS, launch, make_fabric
    from glua_bench.runs.sealed.training import train_and_predict

    given = pickle.loads(content)
    torch.set_num_threads(given["threads"])
    withheld: Withheld = given["run"]
    method_class = Registry("method", withheld.request.plugins).load(withheld.config.method)
    if [method_class.__module__, method_class.__qualname__] != given["method"]:
        raise PluginError(
            f"The method '{withheld.config.method}' is {'.'.join(given['method'])} here and "
            f"{method_class.__module__}.{method_class.__qualname__} in the process that trains it; "
            "register it with an entry point, or give its file with --plugin."
        )
    object.__setattr__(withheld, "method_class", method_class)
    link.watched, link.pictures = given["watched"], given["pictures"]
    link.progress = relay(link, given["shown"])
    fabric = make_fabric(withheld.request, withheld.config)
    if withheld.request.devices > 1:
        file = Path(os.environ["TMPDIR"]) / "run.pickle"
        write_bytes(file, content)
        # Fabric starts further processes with the command of this one.
        sys.modules["__main__"].__spec__ = None
        sys.argv[:] = [__file__, "rank", str(file)]
    # Held by this process, which may outlive the one that started it for a moment.
    with exclusive(withheld.directory.path / ".training.lock", option="--runs"):
        launch(fabric, withheld.request.devices, lambda text: link.send("lost", text=text))
        try:
            return train_and_predict(withheld, fabric, link)
        except Exception:
            if withheld.request.devices > 1:  # `launch` ends this process if another was killed
                time.sleep(LOST_SECONDS)
            raise


def rank(file: Path) -> None:
    """Train as a further process of a training on several devices."""
    import torch

    from glua_bench.console import Progress
    from glua_bench.registry import Registry
    from glua_bench.runs import interruption
    from glua_bench.runs.plan import make_fabric
    from glua_bench.runs.sealed.training import build

    given = pickle.loads(file.read_bytes())
    sys.path[:] = given["path"]
    torch.set_num_threads(given["threads"])
    withheld: Withheld = given["run"]
    method_class = Registry("method", withheld.request.plugins).load(withheld.config.method)
    object.__setattr__(withheld, "method_class", method_class)
    try:
        with interruption.listening():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            fabric = make_fabric(withheld.request, withheld.config)
            fabric.launch()
            build(withheld, fabric, Progress(enabled=False)).fit()
    except interruption.Interrupted:
        return  # the first process tells it


def described(error: BaseException) -> dict[str, Any]:
    """Describe an exception in JSON."""
    arguments = [
        a if isinstance(a, (str, int, float, bool, type(None))) else str(a) for a in error.args
    ]
    where = traceback.extract_tb(error.__traceback__)[-1:]
    return {
        "name": type(error).__name__,
        "module": type(error).__module__,
        "arguments": arguments,
        "text": str(error),
        "filename": str(error.filename) if isinstance(error, OSError) else None,
        "where": [where[0].filename, where[0].lineno] if where else ["?", 0],
        "traceback": "".join(traceback.format_exception(error)),
    }


# -- a process that forks trainings ----------------------------------------------------------------


def preload() -> None:
    """Import what every training needs, but no dataset."""
    import glua_bench.runs.sealed.training  # noqa: F401


def serve(control: int) -> None:
    """Fork a process per training, until the other end of a socket is closed.

    A request has five descriptors: commands, reports, a pipe for the exit status, stdout, stderr.
    """
    import selectors
    import socket

    _ignore_signals()
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, int] = {}  # process → its pipe for the status
    with socket.socket(fileno=control) as connection, selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_READ)
        waiting.register(ended, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in waiting.select()}
            if ended in ready:
                os.read(ended, 4096)
                _reap(running)
            if connection.fileno() not in ready:
                continue
            _, given, _, _ = socket.recv_fds(connection, 1, 5)
            if not given:
                break
            process = fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                for own in (connection.fileno(), ended, wake, given[2], *running.values()):
                    os.close(own)
                _become(given[0], given[1], given[3], given[4])
            for descriptor in (*given[:2], *given[3:]):
                os.close(descriptor)
            running[process] = given[2]
    for process in running:
        end_group(process)


def _ignore_signals() -> None:
    """Leave requests to stop to the process that started this one, which passes them on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def fork() -> int:
    """Fork this process, in which libraries have threads but no computation has begun."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(commands: int, reports: int, output: int, errors: int) -> None:
    """Be the process of a training; never returns."""
    code = 1
    try:
        os.setsid()  # the terminal's Ctrl-C goes to the process that started this one
        _die_with_parent()
        # Requests to stop are ignored until `interruption.listening`, as by the server: those that
        # all processes receive come as a command, too.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, place in ((null, 0), (output, 1), (errors, 2)):
            os.dup2(descriptor, place)
            if descriptor > 2:
                os.close(descriptor)
        with os.fdopen(commands, "rb") as given, os.fdopen(reports, "wb") as told:
            code = work(given, told)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)


def _die_with_parent() -> None:
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _reap(running: dict[int, int]) -> None:
    """Pass on the exit status of ended trainings, and end what they have left."""
    while running:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return
        process = ended.si_pid
        end_group(process)  # before its number may be given to another
        _, status = os.waitpid(process, 0)
        pipe = running.pop(process, None)
        if pipe is not None:
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):  # nobody waits for it any more
                os.write(pipe, f"{code}\n".encode())
            os.close(pipe)


def end_group(process: int) -> None:
    """Kill a training and its processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def main() -> None:
    """Play the role that the command line names."""
    role, *rest = sys.argv[1:]
    if role == "serve":
        _ignore_signals()  # a scheduler may signal all processes, while this one imports
        preload()
        serve(int(rest[0]))
    elif role == "rank":
        rank(Path(rest[0]))
    else:
        reports = os.dup(1)
        os.dup2(2, 1)  # what plugins print is no report
        with os.fdopen(reports, "wb") as told:
            code = work(sys.stdin.buffer, told)
        os._exit(code)  # a thread still reads commands


if __name__ == "__main__":
    # Under its own name, so that classes exist once.
    from glua_bench.runs.sealed import child

    child.main()
