"""Options and output functions that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from glua_bench.documents import SUFFIXES as DESCRIPTIONS
from glua_bench.errors import ERROR
from glua_bench.registry import Registry
from glua_bench.runs.request import PLUGIN, Fold, RunOptions, options

Plugins = Annotated[list[Path] | None, PLUGIN]
PresetName = Annotated[
    str, typer.Option("--preset", help="Preset of the grid: quick, standard or paper.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the planned runs and their duration, then exit.")
]
DirectionNames = Annotated[
    str | None,
    typer.Option(
        "--directions",
        "--direction",
        help="Comma-separated directions, e.g. mr-ct, or 'all'; default: each dataset's first.",
    ),
]
Bounds = Annotated[
    bool,
    typer.Option("--bounds/--no-bounds", help="Include both bounds: source_only and supervised."),
]
Processes = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Number of processes; default: all cores.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Storage of trials: a path, or a database URL for several machines; default: a "
        "journal in RUNS/sweeps/NAME. Also $GLUA_BENCH_STORAGE.",
        envvar="GLUA_BENCH_STORAGE",
        show_envvar=False,
    ),
]


@dataclass(frozen=True)
class Tasks:
    """Options of `compare` and `ablate` for datasets, directions and seeds."""

    datasets: Annotated[
        str,
        typer.Option(
            "--datasets", "--dataset", help="Comma-separated names or descriptions (FILE.yaml)."
        ),
    ]
    directions: DirectionNames = None
    fold: Fold = 1
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3
    repeats: Annotated[
        int,
        typer.Option(
            min=0,
            help="Extra trainings of seed 0 with perturbed last bits of the initial weights.",
        ),
    ] = 0


@dataclass(frozen=True)
class Work:
    """Options of `compare` and `ablate` for the execution of their runs."""

    jobs: Annotated[
        int, typer.Option(min=1, help="Concurrent runs, which share the GPUs or cores.")
    ] = 1
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry failed runs.")] = False
    out: Annotated[
        Path | None,
        typer.Option(help="Also write rows, table, intervals, pairs and ranking as CSV here."),
    ] = None


def with_options(without: Collection[str] = ()) -> Callable[[Callable], Callable[..., None]]:
    """Replace a command's dataclass parameters, e.g. `RunOptions`, by one option per field.

    Args:
        without: fields that are not options of this command and keep their defaults.
    """

    def decorate(command: Callable) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, list[str]] = {}  # parameter → its fields that are options
        parameters = []
        for name, own in inspect.signature(command).parameters.items():
            if not is_dataclass(hints[name]):
                parameters.append(own.replace(kind=own.KEYWORD_ONLY, annotation=hints[name]))
                continue
            fields = [each for each in options(hints[name]) if each[0].name not in without]
            groups[name] = [spec.name for spec, _ in fields]
            for spec, hint in fields:
                value = own.empty if spec.default is MISSING else spec.default
                if spec.default_factory is not MISSING:
                    value = None  # Typer passes None for a list that is not given
                parameters.append(
                    inspect.Parameter(spec.name, own.KEYWORD_ONLY, default=value, annotation=hint)
                )

        @functools.wraps(command)
        def called(**given: Any) -> None:
            for group, names in groups.items():
                values = {name: given.pop(name) for name in names}
                chosen = {name: value for name, value in values.items() if value is not None}
                given[group] = hints[group](**chosen)
            command(**given)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def say(text: str = "") -> None:
    """Print a line, on the first process of a run only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def with_descriptions(datasets: str, plugins: list[Path] | None) -> tuple[str, list[Path]]:
    """Replace each FILE.yaml among comma-separated names by its name, and add it to the plugins."""
    names, files = [], list(plugins or [])
    for text in map(str.strip, datasets.split(",")):
        path = Path(text)
        if path.suffix in DESCRIPTIONS:
            files += [] if path in files else [path]
            text = Registry("dataset", files).name_of(path)
        names.append(text)
    return ",".join(names), files


def split_names(text: str | None) -> list[str]:
    """Split comma-separated names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def say_browse(shared: RunOptions) -> None:
    """Print how to view the runs in the tracker."""
    from glua_bench.records.tracker import open_tracker

    if shared.mlflow:
        say(f"Browse:  {open_tracker(shared.runs_root).browse}")


class ReportedExit(SystemExit):
    """An exit whose reason has been printed."""


def end(message: str, code: int) -> NoReturn:
    """Print an error and exit."""
    sys.stdout.flush()
    print(f"{ERROR}{message}", file=sys.stderr, flush=True)
    raise ReportedExit(code)
