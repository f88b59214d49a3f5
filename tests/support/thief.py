"""A method that tries to reach the labels of the target in every way that its author thought of.

Its first step raises an error whose message holds, as JSON, what each way gave; nothing is good.
The environment variable THIEF holds what an insider would guess: data directory, label files,
cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glua_bench.method import Method
from glua_bench.methods.source_only import SourceOnly

WAYS: dict[str, Callable[[dict[str, Any]], list[str]]] = {}


def way(function: Callable[[dict[str, Any]], list[str]]) -> Callable[[dict[str, Any]], list[str]]:
    WAYS[function.__name__] = function
    return function


def _read(path: object) -> list[str]:
    with contextlib.suppress(OSError), open(path, "rb") as file:  # type: ignore[call-overload]
        if file.read(2):
            return [str(path)]
    return []


def _known(values: Any, labels: list[str]) -> list[str]:
    """Return datasets, and cases with a label of the target, among objects."""
    from glua_bench.task import Case, Dataset

    def known(value: Any) -> bool:
        try:
            return (
                isinstance(value, Dataset)
                or (isinstance(value, Case) and str(value.label) in labels)
                or (isinstance(value, Path) and str(value) in labels)
            )
        except Exception:  # proxies of libraries raise anything
            return False

    return [type(value).__name__ for value in values if known(value)]


@way
def registry(guess: dict[str, Any]) -> list[str]:
    from glua_bench.registry import load_dataset

    dataset = load_dataset("phantom", Path(guess["root"]), [])
    return [path for case in dataset.cases("ct") for path in _read(case.truth)]


@way
def garbage_collector(guess: dict[str, Any]) -> list[str]:
    gc.unfreeze()
    return _known(gc.get_objects(), guess["labels"])


@way
def frames(guess: dict[str, Any]) -> list[str]:
    found = []
    for frame in [sys._getframe(), *sys._current_frames().values()]:
        while frame is not None:
            for value in [*frame.f_locals.values()]:
                found += _known(
                    [value, *vars(value).values()] if hasattr(value, "__dict__") else [value],
                    guess["labels"],
                )
            frame = frame.f_back  # type: ignore[assignment]
    return found


@way
def modules(guess: dict[str, Any]) -> list[str]:
    values = [v for m in [*sys.modules.values()] for v in [*getattr(m, "__dict__", {}).values()]]
    return _known(values, guess["labels"])


@way
def open_files(guess: dict[str, Any]) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path in guess["labels"] or path == guess["root"]]


@way
def parents_memory(guess: dict[str, Any]) -> list[str]:
    found = []
    if guess["coordinator"] == os.getpid():
        return [str(os.getpid())]
    for process in {os.getppid(), guess["coordinator"]}:
        with contextlib.suppress(OSError), open(f"/proc/{process}/mem", "rb") as memory:
            found.append(memory.name)
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    found.append(os.readlink(f"/proc/{process}/fd/{number}"))
        if ctypes.CDLL(None).ptrace(0x4206, process, 0, 0) == 0:  # PTRACE_SEIZE, stops nothing
            found.append(f"ptrace {process}")
    return found


@way
def guessed_paths(guess: dict[str, Any]) -> list[str]:
    return [path for label in guess["labels"] for path in _read(label)]


@way
def other_roots(guess: dict[str, Any]) -> list[str]:
    roots = ("/proc/self/root", "/proc/1/root", f"/proc/{guess['coordinator']}/root")
    return [path for label in guess["labels"] for root in roots for path in _read(root + label)]


@way
def listing(guess: dict[str, Any]) -> list[str]:
    found = []
    for folder, _, names in os.walk(guess["root"]):
        paths = [f"{folder}/{name}" for name in names]
        found += [path for path in paths if path in guess["labels"] and _read(path)]
    return found


@way
def slice_cache(guess: dict[str, Any]) -> list[str]:
    return [path for label in guess["prepared"] for path in _read(label)]


@way
def children(guess: dict[str, Any]) -> list[str]:
    found = []
    for label in guess["labels"]:
        done = subprocess.run(["head", "-c", "2", label], capture_output=True)
        found += [label] if done.stdout else []
    ours, theirs = os.pipe()
    process = os.fork()
    if not process:
        os.setsid()
        os.write(theirs, json.dumps(guessed_paths(guess)).encode())
        os._exit(0)
    os.waitpid(process, 0)
    os.close(theirs)
    with os.fdopen(ours) as told:
        return found + json.loads(told.read())


@way
def threads(guess: dict[str, Any]) -> list[str]:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(guessed_paths(guess)))
    thread.start()
    thread.join()
    return found


@way
def links(guess: dict[str, Any]) -> list[str]:
    """In the run's directory, by link, rename and mount."""
    found = []
    places = [*guess["runs"], *(p for p in [os.environ.get("TMPDIR")] if p and "glua-bench" in p)]
    for place in places:
        for folder in _folders(Path(place)):
            for number, label in enumerate(guess["labels"]):
                for make in (os.symlink, os.link):
                    name = folder / f"stolen-{make.__name__}-{number}"
                    with contextlib.suppress(OSError):
                        make(label, name)
                        found += _read(name)
    if guess["coordinator"] == os.getpid():
        return found
    library = ctypes.CDLL(None)
    folder = Path(os.environ["TMPDIR"]) / "mounted"
    with contextlib.suppress(OSError):
        folder.mkdir()
        if library.mount(guess["root"].encode(), str(folder).encode(), None, 4096, None) == 0:
            found += os.listdir(folder)
            library.umount2(str(folder).encode(), 2)
    return found


def _folders(place: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (path for path in [place, *place.glob("*/*/*")] if path.is_dir())


class Thief(SourceOnly, Method):
    """Tries to steal labels, and tells what it got."""

    name = "thief"
    reference = "none"
    needs = "nothing"

    def step(self, batch: Any, context: Any) -> Any:
        guess = json.loads(os.environ["THIEF"])
        found: dict[str, Any] = {}
        for name, function in WAYS.items():
            try:
                found[name] = function(guess)
            except Exception as error:
                found[name] = []
                found[f"{name} raised"] = f"{type(error).__name__}: {error}"
        raise RuntimeError(json.dumps(found))
