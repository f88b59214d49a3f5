"""What several commands share: their options, and how they speak and end."""

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
DatasetName = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="See `glua-bench list`; or a description, FILE.yaml."),
]
PresetName = Annotated[
    str, typer.Option("--preset", help="Whose working grid: quick, standard or paper.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run, and how long; train nothing.")
]
DirectionNames = Annotated[
    str | None,
    typer.Option(
        "--directions",
        "--direction",
        help="all, or some by commas, e.g. mr-ct; default is each dataset's first.",
    ),
]
Bounds = Annotated[
    bool,
    typer.Option(
        "--bounds/--no-bounds",
        help="Add source_only and supervised, between which the gap lies.",
    ),
]
Processes = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Processes, a case each; default: all cores.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Where trials are kept: a path, or a database's URL for many machines; default is a "
        "journal in RUNS/sweeps/NAME. Also $GLUA_BENCH_STORAGE.",
        envvar="GLUA_BENCH_STORAGE",
        show_envvar=False,
    ),
]


@dataclass(frozen=True)
class Tasks:
    """The options of `compare` and `ablate` that say on what each entry is run."""

    datasets: Annotated[
        str,
        typer.Option(
            "--datasets", "--dataset", help="Names, or descriptions FILE.yaml, by commas."
        ),
    ]
    directions: DirectionNames = None
    fold: Fold = 1
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3
    repeats: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train seed 0 this many times more, from initial weights that differ in their "
            "last bits alone, and print how far results move.",
        ),
    ] = 0


@dataclass(frozen=True)
class Work:
    """The options of `compare` and `ablate` that say how their runs are executed."""

    jobs: Annotated[
        int,
        typer.Option(min=1, help="Runs at once: one a GPU, or each with its share of the cores."),
    ] = 1
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Begin again what failed earlier.")
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(help="Also write rows, table, intervals, pairs and ranking as CSV here."),
    ] = None


def with_options(without: Collection[str] = ()) -> Callable[[Callable], Callable[..., None]]:
    """Make a command's parameters that are dataclasses, e.g. `RunOptions`, one option a field.

    Typer reads options from a signature: it is given one with the fields in the place of the
    dataclass, and the command receives the dataclass made of them.

    Args:
        without: fields that are no options of this command, and keep their defaults.
    """

    def decorate(command: Callable) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, list[str]] = {}  # parameter → its fields that are options
        parameters = []
        for name, own in inspect.signature(command).parameters.items():
            if not is_dataclass(hints[name]):
                parameters.append(own.replace(kind=own.KEYWORD_ONLY, annotation=hints[name]))
                continue
            groups[name] = []
            for spec, hint in options(hints[name]):
                if spec.name not in without:
                    value = own.empty if spec.default is MISSING else spec.default
                    if spec.default_factory is not MISSING:
                        value = None  # as Typer passes on a list that nobody gave
                    groups[name].append(spec.name)
                    parameters.append(
                        inspect.Parameter(
                            spec.name, own.KEYWORD_ONLY, default=value, annotation=hint
                        )
                    )

        @functools.wraps(command)
        def called(**given: Any) -> None:
            for group, names in groups.items():
                values = {name: given.pop(name) for name in names}
                told = {name: value for name, value in values.items() if value is not None}
                given[group] = hints[group](**told)
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
    """Names of datasets, and plugins: FILE.yaml among the names is a plugin with its own name."""
    names, files = [], list(plugins or [])
    for text in map(str.strip, datasets.split(",")):
        path = Path(text)
        if path.suffix in DESCRIPTIONS:
            files += [] if path in files else [path]
            text = Registry("dataset", files).name_of(path)
        names.append(text)
    return ",".join(names), files


def split_names(text: str) -> list[str]:
    """Names that are divided by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def say_browse(shared: RunOptions) -> None:
    """Say how to look at the tracker."""
    from glua_bench.records.tracker import open_tracker

    if shared.mlflow:
        say(f"Browse:  {open_tracker(shared.runs_root).browse}")


class Told(SystemExit):
    """An end whose reason has been said."""


def end(message: str, code: int) -> NoReturn:
    """Say why a command ends, and end with an exit code."""
    sys.stdout.flush()
    print(f"{ERROR}{message}", file=sys.stderr, flush=True)
    raise Told(code)
