"""Seal a process: allow what training needs, deny all else, and verify that labels are denied.

Used before any plugin is imported. Needs the standard library only.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from glua_bench.runs.sealed.landlock import LIST, MOST_RULES, READ, Rules, beneath, carved, version

# System, libraries and devices; those that do not exist are skipped.
_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/sys", "/proc", "/run"),
    *("/var/cache", "/nix/store", "/gnu/store", "/snap", "/cvmfs"),
)
_DEVICES = ("/dev",)
# Directories of libraries that load weights or compile kernels, and the variables that move them.
_LIBRARIES = (
    ("TORCH_HOME", "~/.cache/torch"),
    ("HF_HOME", "~/.cache/huggingface"),
    ("MPLCONFIGDIR", "~/.config/matplotlib"),
    ("", "~/.cache/matplotlib"),
    ("", "~/.cache/fontconfig"),
    ("CUDA_CACHE_PATH", "~/.nv"),
    ("TRITON_CACHE_DIR", "~/.triton"),
    ("TORCHINDUCTOR_CACHE_DIR", ""),
    ("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"),
)


@dataclass(frozen=True)
class Reach:
    """Files that a training process needs, and those that it must not read.

    Attributes:
        read: files to read, e.g. prepared slices.
        code: further directories of code: packages of plugins, and the places of plugin files.
        write: directories to read and write.
        labels: label files, and directories of their copies, that must be out of reach.
    """

    read: tuple[str, ...]
    code: tuple[str, ...]
    write: tuple[str, ...]
    labels: tuple[str, ...]


def seal(reach: Reach) -> str:
    """Deny this process everything but what training needs.

    Returns:
        "" if the labels are verifiably out of reach, else the reason why they are not.
    """
    if not version():
        return f"{'the kernel' if sys.platform == 'linux' else sys.platform} has no Landlock"
    if not single_threaded():
        return "the process has several threads"
    labels = [Path(path).resolve() for path in reach.labels]
    files = [Path(path).resolve() for path in reach.read]
    writable = [Path(path).resolve() for path in reach.write]
    if {*files} & {*labels}:
        return "a file that training reads is a target label"
    reason = ""  # all else is denied nevertheless
    for folder in writable:
        if any(beneath(label, folder) for label in labels):
            reason = f"target labels lie in {folder}, which training writes to"
    try:
        rules, count = Rules(), 0
        for folder in _readable(reach.code):
            for path, whole in carved(folder, labels):
                rules.allow(path, READ if whole else LIST)
                count += 1
                if count > MOST_RULES:
                    return f"target labels lie in {folder} among too many other files"
        for path in files:
            rules.allow(path)
        for folder in chain(writable, _separate(_libraries(), labels), map(Path, _DEVICES)):
            rules.allow(folder, writing=True)
        rules.enforce()
    except OSError as error:
        return f"Landlock failed ({error.strerror or error})"
    if reason:
        return reason
    allowed = {str(path) for path in files}
    opened = next((file for file in _files(reach.labels) if _opens(file, allowed)), None)
    return "" if opened is None else f"{opened} can still be opened"


def single_threaded() -> bool:
    """Return True if this process has one thread, so that a rule holds for all of it."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _readable(code: Iterable[str]) -> list[Path]:
    """Return the directories of the system, of Python and of all code."""
    found = [
        *_SYSTEM,
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        *sysconfig.get_paths().values(),
    ]
    found += [path for path in sys.path if path and os.path.isdir(path)]
    found += code
    for name in ("PATH", "LD_LIBRARY_PATH"):
        found += [path for path in os.environ.get(name, "").split(os.pathsep) if path]
    for name, module in list(sys.modules.items()):
        places = list(getattr(module, "__path__", None) or ()) if "." not in name else []
        file = getattr(module, "__file__", None)
        if name.startswith("glua_bench") and isinstance(file, str):
            places.append(os.path.dirname(file))
        found += [place for place in places if isinstance(place, str)]
    resolved = sorted({Path(path).resolve() for path in found if os.path.isabs(path)})
    kept: list[Path] = []
    for path in resolved:  # a directory comes before those inside it
        if path.is_dir() and not any(beneath(path, above) for above in kept):
            kept.append(path)
    return kept


def _libraries() -> Iterator[Path]:
    for name, default in _LIBRARIES:
        path = os.environ.get(name, "") or default
        if path:
            yield Path(path).expanduser()


def _separate(folders: Iterable[Path], labels: Iterable[Path]) -> Iterator[Path]:
    """Yield the existing directories in which no label lies."""
    labels = list(labels)
    for folder in folders:
        path = folder.resolve()
        if path.is_dir() and not any(beneath(label, path) for label in labels):
            yield path


def _files(paths: Iterable[str]) -> Iterator[str]:
    """Yield the paths, and the files in those that are directories and can be listed."""
    for path in paths:
        yield path
        for folder, _, names in os.walk(path):
            yield from (os.path.join(folder, name) for name in names)


def _opens(path: str, allowed: set[str]) -> bool:
    if os.path.isdir(path) or os.path.realpath(path) in allowed:
        return False
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True


def temporary() -> str:
    """Create a private directory for temporary files, which all else in /tmp is not."""
    return tempfile.mkdtemp(prefix="glua-bench-training-")
