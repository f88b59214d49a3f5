"""What is recorded of the machine and of the versions of code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIME = "%Y-%m-%dT%H:%M:%S%z"  # how a time is written in JSON

_LIBRARIES = (
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
    return time.strftime(TIME)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a result may depend on, without imports."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and cleanness of the git checkout that holds a directory; None where none does."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def environment(**facts: Any) -> dict[str, Any]:
    """Where and with what a run is made. Holds no user's or machine's name.

    Args:
        facts: further entries, e.g. the data fingerprint and the device in use.
    """
    import glua_bench

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
        "command": [_without_home(argument) for argument in sys.argv],
        "time": now(),
    }
    # Only where torch is in use anyway: asking must not cost an import.
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpus"] = (
            [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if torch.cuda.is_available()
            else []
        )
        found["cuda"] = torch.version.cuda
    return {**found, **facts}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text)[1]  # type: ignore[index]
    except (OSError, TypeError):
        return platform.processor() or "unknown"


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
