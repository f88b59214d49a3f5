"""What several commands share: their options, and how they speak and end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from glua_bench.documents import SUFFIXES as DESCRIPTIONS
from glua_bench.errors import ERROR
from glua_bench.registry import Registry

if TYPE_CHECKING:
    from glua_bench.runs import RunRequest

Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file with further methods, datasets or selectors."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="The dataset's directory; default is $GLUA_BENCH_DATA/DATASET (generated data: "
        "the cache).",
    ),
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="The directory of all runs.")]
DatasetName = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="See `glua-bench list`; or a description, FILE.yaml."),
]
PresetName = Annotated[
    str, typer.Option("--preset", help="Whose working grid: quick, standard or paper.")
]
RunPreset = Annotated[
    str | None,
    typer.Option("--preset", help="quick, standard or paper; default: quick, with a GPU standard."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting, e.g. method.lr=1e-3, segmenter.name=timm:resnet18, "
        "grid.size=96, batch_size=4, slices=3. Repeatable; `list methods -v` names them.",
    ),
]
Augmentation = Annotated[
    str | None,
    typer.Option("--augmentation", help="none, geometric (default) or photometric."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Updates of the segmenter.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="32-true (default), bf16-mixed or 16-mixed."),
]
Oracle = Annotated[
    bool,
    typer.Option(
        "--oracle",
        help="Also score every checkpoint on the labelled test cases, to see what a selector "
        "misses; flagged, and never a result.",
    ),
]
Mirrored = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Mirror runs to MLflow.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run, and how long; train nothing.")
]
DatasetNames = Annotated[
    str,
    typer.Option("--datasets", "--dataset", help="Names, or descriptions FILE.yaml, by commas."),
]
Fold = Annotated[
    int,
    typer.Option(
        "--fold",
        min=1,
        help="Of the dataset, each with other test cases; 1 is its default split.",
    ),
]
DirectionNames = Annotated[
    str | None,
    typer.Option(
        "--directions",
        "--direction",
        help="all, or some by commas, e.g. mr-ct; default is each dataset's first.",
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", help="How many, from 0.")]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=0,
        help="Train seed 0 this many times more, from initial weights that differ in their last "
        "bits alone, and print how far results move.",
    ),
]
Bounds = Annotated[
    bool,
    typer.Option(
        "--bounds/--no-bounds",
        help="Add source_only and supervised, between which the gap lies.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs", min=1, help="Runs at once: one a GPU, or each with its share of the cores."
    ),
]
Processes = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Processes, a case each; default: all cores.")
]
Numbers = Annotated[
    Path | None,
    typer.Option("--out", help="Also write rows, table, intervals, pairs and ranking as CSV here."),
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
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Begin again what failed earlier.")
]


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


def say_browse(request: RunRequest) -> None:
    """Say how to look at the tracker."""
    from glua_bench.tracking import open_tracker

    if request.mlflow:
        say(f"Browse:  {open_tracker(request.runs_root).browse}")


class Told(SystemExit):
    """An end whose reason has been said."""


def end(message: str, code: int) -> NoReturn:
    """Say why a command ends, and end with an exit code."""
    sys.stdout.flush()
    print(f"{ERROR}{message}", file=sys.stderr, flush=True)
    raise Told(code)
