"""Complete names in a shell: methods, datasets, selectors and fixed choices, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from glua_bench.errors import UserError
from glua_bench.registry import Entry, Registry

Complete = Callable[[typer.Context, str], list[tuple[str, str]]]


def complete_names(kind: str, *more: str) -> Complete:
    """Return a completion of the names of plugins, also of the last of several with commas.

    Args:
        kind: "method", "dataset" or "selector".
        more: further names.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        found = [(entry.name, entry.summary) for entry in _entries(kind, ctx) if not entry.error]
        return _matching([*found, *((name, "") for name in more)], incomplete)

    return complete


def complete_choices(names: Sequence[str]) -> Complete:
    """Return a completion of fixed choices."""

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        return _matching([(name, "") for name in names], incomplete)

    return complete


def complete_directions(*more: str) -> Complete:
    """Return a completion of the directions of the datasets on the command line.

    Directions are read from the source of a dataset's class. Those of all datasets are offered if
    none is given, or if it inherits them.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        asked = str(ctx.params.get("datasets") or ctx.params.get("dataset") or "").split(",")
        listed = {e.name: e.attributes.get("directions", ()) for e in _entries("dataset", ctx)}
        found = [direction for name in asked for direction in listed.get(name, ())]
        found = found or [direction for each in listed.values() for direction in each]
        return _matching([(name, "") for name in dict.fromkeys([*found, *more])], incomplete)

    return complete


def _entries(kind: str, ctx: typer.Context) -> list[Entry]:
    """Return the plugins, including those of `--plugin`; the installed ones if these are broken."""
    files = ctx.params.get("plugins") or ctx.params.get("plugin") or []
    try:
        return Registry(kind, [Path(file) for file in files]).entries()
    except UserError:
        return Registry(kind).entries()


def _matching(names: Sequence[tuple[str, str]], incomplete: str) -> list[tuple[str, str]]:
    before, comma, last = incomplete.rpartition(",")
    return [(f"{before}{comma}{name}", text) for name, text in names if name.startswith(last)]
