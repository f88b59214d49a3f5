"""The command `doctor`: check the installation."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glua_bench import __version__
from glua_bench.console import next_command
from glua_bench.data.cache import cache_root
from glua_bench.errors import UserError
from glua_bench.records.environment import versions
from glua_bench.records.run_directory import list_runs
from glua_bench.records.tracker import open_tracker
from glua_bench.registry import GROUPS, Registry


def examine(runs_root: Path, plugins: Iterable[Path]) -> tuple[list[tuple[str, str]], list[str]]:
    """Check versions, devices, disk, data, plugins, runs and tracker.

    Args:
        runs_root: directory of all runs.
        plugins: plugin files.

    Returns:
        Findings as (item, text), and suggested next steps.
    """
    todo: list[str] = []
    findings = [
        ("glua-bench", f"{__version__}, Python {platform.python_version()}"),
        ("libraries", ", ".join(f"{name} {text}" for name, text in versions().items())),
        ("device", _devices()),
        ("cache", _disk(cache_root())),
    ]
    plugins = list(plugins)
    for kind in GROUPS:
        entries = Registry(kind, plugins).entries()
        broken = [entry for entry in entries if entry.error]
        text = ", ".join(entry.name for entry in entries if not entry.error)
        findings.append((f"{kind}s", text + (f"; BROKEN: {len(broken)}" if broken else "")))
        findings += [(f"  {entry.name}", f"{entry.origin}: {entry.error}") for entry in broken]
        todo += [f"repair or uninstall {entry.origin} ({entry.name})" for entry in broken]
    findings.append(
        (
            "GLUA_BENCH_DATA",
            os.environ.get("GLUA_BENCH_DATA") or "not set (needed for real data only)",
        )
    )
    datasets = Registry("dataset", plugins)
    findings += [
        (f"  {e.name}", _data(datasets, e.name)) for e in datasets.entries() if not e.error
    ]
    runs = list_runs(runs_root) if runs_root.is_dir() else []
    finished, damaged = sum(run.done for run in runs), [run.damage for run in runs if run.damage]
    others = len(runs) - finished - len(damaged)
    findings.append(
        (
            "runs",
            f"{runs_root}: {finished} finished, {others} unfinished or failed"
            + (f", {len(damaged)} DAMAGED" if damaged else ""),
        )
    )
    findings += [("  damaged", text) for text in damaged]
    tracker = open_tracker(runs_root)
    try:
        tracker.check()
        findings.append(("tracker", tracker.place))
    except OSError as error:
        findings.append(("tracker", f"{tracker.place} IS NOT REACHABLE ({error})"))
        todo.append(f"{tracker.remedy}; runs do not depend on it")
    if finished:
        todo.append(next_command("glua-bench", "sync", "--runs", runs_root))
    else:
        todo.append("glua-bench run --method source_only --dataset phantom")
    return findings, todo


def _devices() -> str:
    import torch

    threads = f"CPU with {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return f"{threads}; no CUDA device (preset quick is the default)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; {threads} (preset standard is the default)"


def _disk(path: Path) -> str:
    existing = path
    while not os.path.exists(existing):  # also in directories of other users
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 2**30
    writable = "" if os.access(existing, os.W_OK) else ", NOT WRITABLE: set GLUA_BENCH_CACHE"
    return f"{path}, {free:.0f} GiB free{writable}"


def _data(datasets: Registry, name: str) -> str:
    """Count a dataset's cases without generating any."""
    try:
        dataset: Any = datasets.load(name)()
        counts = [f"{domain} {len(dataset.cases(domain))}" for domain in dataset.domains()]
        return f"{dataset.root}: {', '.join(counts)} cases"
    except UserError as error:
        return f"not ready: {error}"
