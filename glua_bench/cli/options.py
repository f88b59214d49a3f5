"""Options and output functions that several commands share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from glua_bench.config import PRESETS
from glua_bench.console import Progress, leading, say
from glua_bench.errors import ERROR, printable, without_password
from glua_bench.runs.completion import complete_choices, complete_directions, complete_names
from glua_bench.runs.request import PLUGIN, Fold, RunOptions, options

Plugins = Annotated[list[Path] | None, PLUGIN]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        help="Preset of the grid: quick, standard or paper.",
        autocompletion=complete_choices(tuple(PRESETS)),
    ),
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
        autocompletion=complete_directions("all"),
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
            "--datasets",
            "--dataset",
            help="Comma-separated names or descriptions (FILE.yaml).",
            autocompletion=complete_names("dataset"),
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
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry failed and damaged runs.")
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(help="Also write rows, table, intervals, pairs and ranking as CSV here."),
    ] = None


def with_options(
    without: Collection[str] = (), optional: Collection[str] = ()
) -> Callable[[Callable], Callable[..., None]]:
    """Replace a command's dataclass parameters, e.g. `RunOptions`, by one option per field.

    Args:
        without: fields that are not options of this command and keep their defaults.
        optional: required texts that a file may give instead; "" if they are not given.
    """

    def decorate(command: Callable) -> Callable[..., None]:
        groups: dict[str, tuple[Any, list[str]]] = {}  # parameter → class, fields that are options
        parameters = []
        for name, own in inspect.signature(command, eval_str=True).parameters.items():
            kind = own.annotation
            if not is_dataclass(own.annotation):
                parameters.append(own.replace(kind=own.KEYWORD_ONLY))
                continue
            fields = [each for each in options(kind) if each[0].name not in without]
            groups[name] = kind, [spec.name for spec, _ in fields]
            for spec, hint in fields:
                value = own.empty if spec.default is MISSING else spec.default
                if spec.default_factory is not MISSING or spec.name in optional:
                    value = None  # Typer passes None for a list that is not given
                parameters.append(
                    inspect.Parameter(spec.name, own.KEYWORD_ONLY, default=value, annotation=hint)
                )

        @functools.wraps(command)
        def called(**given: Any) -> None:
            for group, (kind, names) in groups.items():
                values = {name: given.pop(name) for name in names}
                chosen = {name: value for name, value in values.items() if value is not None}
                left = {name: "" for name in optional if name in names}
                given[group] = kind(**{**left, **chosen})
            command(**given)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def on_command_line(context: typer.Context) -> set[str]:
    """Return the names of the parameters that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


@dataclass
class _Output:
    """How the current command prints.

    Attributes:
        quiet: print only the result.
        answer: the result, for `--json`.
    """

    quiet: bool = False
    answer: dict[str, Any] | None = None


_output = _Output()


def with_output(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--json` and `--quiet` to a command, which states its result by `answer`."""
    own = [
        each.replace(kind=each.KEYWORD_ONLY)
        for each in inspect.signature(command, eval_str=True).parameters.values()
    ]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        for name, hint in (("as_json", _JSON), ("quiet", _QUIET))
    ]

    @functools.wraps(command)
    def called(*, as_json: bool, quiet: bool, **given: Any) -> None:
        _output.quiet, _output.answer = quiet, None
        # Whatever else is printed, progress included, stays out of the document.
        apart = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        try:
            with apart:
                command(**given)
            if as_json and _output.answer is None:
                raise RuntimeError(f"{command.__name__} states no result")
        finally:  # a failure may follow the result, e.g. findings of `data check`
            _output.quiet = False
            if as_json and _output.answer is not None and leading():
                document = json.dumps(to_json(_output.answer), indent=2)  # ASCII, for any locale
                print(document, flush=True)

    called.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    return called


_JSON = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON document; other lines to stderr."),
]
_QUIET = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the result only: no progress, no suggestions."),
]


def answer(**values: Any) -> None:
    """State the result of a command, which `--json` prints at its end.

    Args:
        values: data frames, dataclasses, paths, numbers, and lists and mappings of them; `next`
            lists the suggested commands.
    """
    _output.answer = values


def to_json(value: Any) -> Any:
    """Convert a value to plain JSON types, with None for nan and infinite numbers.

    Data frames become lists of records, including the names of their index; paths become strings.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return without_password(value)
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(asdict(value))
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a frame, without pandas
        named = [name for name in value.index.names if name is not None]
        return to_json((value.reset_index() if named else value).to_dict("records"))
    if hasattr(value, "tolist"):  # numpy
        return to_json(value.tolist())
    return without_password(str(value))


def note(text: str = "") -> None:
    """Print a line that `--quiet` omits, e.g. on progress or the next command."""
    if not _output.quiet:
        say(text)


def progress() -> Progress:
    """Return a progress bar, which shows nothing with `--quiet` or on another process."""
    return Progress(enabled=leading() and not _output.quiet)


def quiet() -> bool:
    """Return True if the command was given `--quiet`."""
    return _output.quiet


def split_names(text: str | None) -> list[str]:
    """Split comma-separated names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def say_browse(shared: RunOptions) -> None:
    """Print how to view the runs in the tracker."""
    from glua_bench.records.tracker import open_tracker

    if shared.mlflow:
        note(f"Browse:  {open_tracker(shared.runs_root).browse}")


class ReportedExit(SystemExit):
    """An exit whose reason has been printed."""


def end(message: str, code: int) -> NoReturn:
    """Print an error and exit."""
    sys.stdout.flush()
    print(f"{ERROR}{printable(message)}", file=sys.stderr, flush=True)
    raise ReportedExit(code)
