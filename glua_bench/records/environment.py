"""Record the machine and the versions of code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glua_bench.errors import without_password

TIME = "%Y-%m-%dT%H:%M:%S%z"  # format of times in JSON
LIBRARIES = (
    "torch",
    "lightning-fabric",
    "timm",
    "numpy",
    "scipy",
    "nibabel",
    "medpy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "mlflow",
    "optuna",
)


def now() -> str:
    """Return the current time in the format `TIME`."""
    return time.strftime(TIME)


def versions() -> dict[str, str]:
    """Return the versions of libraries that can affect a result, without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Return commit and cleanness of a directory's git checkout; None if it is not in one.

    Programs that the checkout's own configuration names are not started.
    """
    inert = ["-c", "core.fsmonitor=false"]

    def git(*arguments: str, check: bool = True) -> str:
        return subprocess.run(
            ["git", *inert, "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=check,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        filters = "--show-scope", "--name-only", "--get-regexp", r"^filter\."
        for line in git("config", *filters, check=False).splitlines():
            scope, _, name = line.partition("\t")
            if scope not in ("system", "global"):
                inert += ["-c", f"{name}={'false' if name.endswith('.required') else ''}"]
        state = git("status", "--porcelain", "--ignore-submodules=all")
        return {"commit": commit, "dirty": bool(state)}
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Describe machine and software, without names of users or machines, and without passwords."""
    import glua_bench

    home = str(Path.home())
    found: dict[str, Any] = {
        "glua_bench": glua_bench.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "libraries": versions(),
        "git": git_state(Path.cwd()),
        "source": git_state(Path(glua_bench.__file__).resolve().parent),
        "command": [
            without_password(word.replace(home, "~") if len(home) > 1 else word, whole=True)
            for word in sys.argv
        ],
        "time": now(),
    }
    if torch := sys.modules.get("torch"):  # not imported for this purpose
        found["threads"] = torch.get_num_threads()
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text)[1]  # type: ignore[index]
    except (OSError, TypeError):
        return platform.processor() or "unknown"
