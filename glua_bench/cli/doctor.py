"""What works on this machine, and what a user should do next."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from glua_bench import __version__
from glua_bench.console import next_command
from glua_bench.data.cache import cache_root
from glua_bench.errors import UserError
from glua_bench.records.environment import versions
from glua_bench.records.run_directory import list_runs
from glua_bench.records.tracker import open_tracker
from glua_bench.registry import GROUPS, Registry


def examine(runs_root: Path, plugins: Iterable[Path]) -> tuple[list[tuple[str, str]], list[str]]:
    """Look at versions, devices, disk, data, plugins, runs and tracker.

    Args:
        runs_root: the directory of all runs.
        plugins: single-file plugins.

    Returns:
        Findings as (what, text), and commands that would be sensible next.
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
        ("GLUA_BENCH_DATA", os.environ.get("GLUA_BENCH_DATA") or "not set (only for owners' data)")
    )
    for entry in Registry("dataset", plugins).entries():
        if not entry.error:
            findings.append((f"  {entry.name}", _data(entry.name, plugins)))
    finished, others = 0, 0
    if runs_root.is_dir():
        for run in list_runs(runs_root):
            finished, others = finished + run.done, others + (not run.done)
    findings.append(("runs", f"{runs_root}: {finished} finished, {others} unfinished or failed"))
    tracker = open_tracker(runs_root)
    try:
        tracker.check()
        findings.append(("tracker", tracker.place))
    except OSError as error:
        findings.append(("tracker", f"{tracker.place} DOES NOT ANSWER ({error})"))
        todo.append(f"{tracker.remedy}; runs go on anyway")
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
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 2**30
    writable = "" if os.access(existing, os.W_OK) else ", NOT WRITABLE: set GLUA_BENCH_CACHE"
    return f"{path}, {free:.0f} GiB free{writable}"


def _data(name: str, plugins: list[Path]) -> str:
    """Whether a dataset's files are there, without generating any."""
    try:
        dataset = Registry("dataset", plugins).load(name)()
        counts = [f"{domain} {len(dataset.cases(domain))}" for domain in dataset.domains()]
        return f"{dataset.root}: {', '.join(counts)} cases"
    except UserError as error:
        return f"not ready: {error}"
