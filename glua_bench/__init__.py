"""Unsupervised domain adaptation for segmentation, measured so that it can be trusted.

The functions in `__all__` are the Python interface, see docs/python.md. They are imported when they
are first used, so that `import glua_bench` stays fast.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "load_results", "predict", "run", "score"]

# Threads of numerical libraries meet hundreds of times per update. By default they wait for each
# other in a busy loop of several milliseconds, which keeps the awaited thread from running where
# other programs use the cores (benchmarks/threads.py). OpenMP reads these variables when torch is
# loaded; what the user has set is kept.
WAITING = {
    "GOMP_SPINCOUNT": "10000",  # of GNU's OpenMP, in torch for Linux: about 0.1 ms, then sleep
    "KMP_BLOCKTIME": "1",  # ms, of Intel's and LLVM's, in torch for macOS and from conda
}


def cores(cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Return the number of processor cores that this process may use.

    These are the cores of its affinity, or fewer if a container or a service manager limits its
    processor time (a CPU quota of cgroups).

    Args:
        cgroups: mount point of the control groups.
        own: file with the groups of this process.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(cgroups, own))]))


def _quotas(cgroups: str, own: str) -> Iterator[float]:
    """Yield the limits of processor time, in cores, of this process's groups and their parents."""
    try:
        with open(own) as file:
            groups = [line.rstrip("\n").split(":", 2)[1:] for line in file if line.count(":") > 1]
    except (OSError, UnicodeDecodeError):
        return
    for kinds, group in groups:
        if kinds and "cpu" not in kinds.split(","):
            continue
        # Version 2 has one tree, mounted at the top or in `unified`; version 1 one for each kind.
        tops = [f"{cgroups}/{name}" for name in ((kinds, "cpu") if kinds else ("", "unified"))]
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for top, depth in itertools.product(tops, range(len(parts) + 1)):
            place = "/".join([top, *parts[:depth]])
            if kinds:
                quota = [_read(f"{place}/cpu.cfs_quota_us"), _read(f"{place}/cpu.cfs_period_us")]
            else:
                quota = _read(f"{place}/cpu.max").split()
            if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
                yield int(quota[0]) / max(1, int(quota[1]))


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


# Set here if the quota is smaller than the affinity, which is all that OpenMP knows; else None.
OWN_THREADS: str | None = None
if "torch" not in sys.modules:
    if "OMP_WAIT_POLICY" not in os.environ:
        for _name, _value in WAITING.items():
            os.environ.setdefault(_name, _value)
    if "OMP_NUM_THREADS" not in os.environ and any(
        True for _ in _quotas("/sys/fs/cgroup", "/proc/self/cgroup")
    ):
        os.environ["OMP_NUM_THREADS"] = OWN_THREADS = str(cores())

if TYPE_CHECKING:
    from glua_bench.cli.api import compare, load_results, predict, run, score
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from glua_bench.cli import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
