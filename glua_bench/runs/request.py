"""Options of a run, as a dataclass, as a command line and as JSON.

A field of `RunOptions` is all that a new option of `run`, `compare`, `ablate` and `sweep` needs:
the commands build their options from the fields, and child processes read them from a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from glua_bench.config import (
    AUGMENTATIONS,
    DEFAULT_SELECTORS,
    PRECISIONS,
    PRESETS,
    SCENARIOS,
)
from glua_bench.documents import load_json
from glua_bench.errors import ConfigError
from glua_bench.runs.completion import complete_choices, complete_directions, complete_names

PLUGIN = typer.Option(
    "--plugin", help="Plugin file with methods, datasets or selectors; repeatable."
)
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="Directory of the dataset; default: $GLUA_BENCH_DATA/DATASET, or the cache for "
        "generated data.",
    ),
]
Fold = Annotated[
    int,
    typer.Option("--fold", min=1, help="Fold of the dataset; 1 is the default split."),
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Directory of all runs.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]

ADAPTATIONS = ("tent",)  # of `predict --adapt`
Options = TypeVar("Options", bound="RunOptions")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that all runs of a comparison, an ablation or a sweep share.

    Attributes:
        preset: "quick", "benchmark", "standard" or "paper"; None selects "standard" on a GPU, else
            "quick".
        assignments: `--set` texts, e.g. "method.lr=1e-3".
        augmentation: "none", "geometric" or "photometric"; None keeps the preset's.
        steps: updates of the segmenter; None keeps the preset's.
        data_root: the dataset's directory; None selects the dataset's default.
        runs_root: the directory of all runs.
        device: "auto", "cpu" or "cuda".
        devices: processes per run.
        precision: "32-true", "bf16-mixed" or "16-mixed"; None keeps the preset's.
        plugins: files with further methods, datasets or selectors.
        selectors: comma-separated names of selectors, or "all"; None evaluates the cheap ones.
        oracle: also score every checkpoint on the labelled test cases.
        mlflow: mirror runs to MLflow.
    """

    preset: Annotated[
        str | None,
        typer.Option(
            help="quick, standard or paper; default: standard with a GPU, else quick (of a sweep: "
            "its file's).",
            autocompletion=complete_choices(tuple(PRESETS)),
        ),
    ] = None
    assignments: Annotated[
        list[str],
        typer.Option(
            "--set",
            help="Change a setting, e.g. method.lr=1e-3, segmenter.name=timm:resnet18, "
            "grid.size=96, batch_size=4; repeatable. `list methods -v` lists the settings.",
        ),
    ] = field(default_factory=list)
    augmentation: Annotated[
        str | None,
        typer.Option(
            help="none, geometric (default) or photometric.",
            autocompletion=complete_choices(AUGMENTATIONS),
        ),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Number of updates of the segmenter.")] = None
    data_root: DataRoot = None
    runs_root: RunsRoot = Path("runs")
    device: Device = "auto"
    devices: Annotated[int, typer.Option(min=1, help="Processes per run, one per GPU.")] = 1
    precision: Annotated[
        str | None,
        typer.Option(
            help="32-true (default), bf16-mixed or 16-mixed.",
            autocompletion=complete_choices(PRECISIONS),
        ),
    ] = None
    plugins: Annotated[list[Path], PLUGIN] = field(default_factory=list)
    selectors: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated selectors to evaluate beside `last`, or all; default: the cheap "
            f"ones ({', '.join(DEFAULT_SELECTORS[1:])}).",
            autocompletion=complete_names("selector", "all"),
        ),
    ] = None
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Also score every checkpoint on labelled test cases (privileged, not a result).",
        ),
    ] = False
    mlflow: Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Upload runs to MLflow.")] = (
        True
    )

    def request(self, **changes: Any) -> RunRequest:
        """Return the request for one run with these options.

        Args:
            changes: `method`, `dataset` and other fields of `RunRequest`.
        """
        return RunRequest(**{**vars(self), **changes})

    def words(self) -> list[str]:
        """Return the command-line options, without those at their default."""
        words = []
        for spec, hint in options(type(self)):
            value = getattr(self, spec.name)
            if value == spec.default:
                continue
            declared = hint.__metadata__[0].default  # the first argument of `typer.Option`
            name = f"--{spec.name.replace('_', '-')}" if declared is ... else declared
            if isinstance(value, bool):
                words.append(name.split("/")[0 if value else 1])
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [name, str(item)]
        return words

    def to_json(self) -> str:
        """Return JSON for `from_json`."""
        return json.dumps(asdict(self), default=str, indent=1)

    @classmethod
    def from_json(cls: type[Options], text: str, file: object) -> Options:
        """Parse the output of `to_json`.

        Args:
            text: JSON.
            file: its path, for errors.

        Raises:
            ConfigError: the text is not a JSON object, or its keys are not this version's options.
        """
        hints = get_type_hints(cls)
        try:
            values = load_json(text)
            return cls(**{name: _from_json(value, hints[name]) for name, value in values.items()})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} does not hold the options of this version ({error}); repeat the "
                "command that wrote it."
            ) from error


@dataclass(frozen=True)
class RunRequest(RunOptions):
    """A user's request for one run; `plan` turns it into a complete configuration.

    Attributes:
        method: name of the method.
        dataset: name of the dataset.
        direction: "source-target"; None selects the dataset's first.
        fold: fold of the dataset; 1 is its default split.
        seed: random seed.
        scenario: "uda" or "supervised".
    """

    method: Annotated[
        str,
        typer.Option(
            help="Name of the method; see `glua-bench list methods`.",
            autocompletion=complete_names("method"),
        ),
    ]
    dataset: Annotated[
        str,
        typer.Option(
            help="Name of the dataset (see `glua-bench list datasets`) or FILE.yaml.",
            autocompletion=complete_names("dataset"),
        ),
    ]
    direction: Annotated[
        str | None,
        typer.Option(
            help="source-target, e.g. mr-ct; default: the dataset's first.",
            autocompletion=complete_directions(),
        ),
    ] = None
    fold: Fold = 1
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0
    scenario: Annotated[
        str,
        typer.Option(
            help="uda, or supervised: the upper bound, trained on target labels (privileged).",
            autocompletion=complete_choices(SCENARIOS),
        ),
    ] = "uda"

    def shared(self) -> RunOptions:
        """Return the options without the fields of `RunRequest`."""
        return RunOptions(**{spec.name: getattr(self, spec.name) for spec in fields(RunOptions)})


def options(kind: type) -> Iterator[tuple[Field[Any], Any]]:
    """Yield each field of an options class and its annotation, in the order of the help."""
    hints = get_type_hints(kind, include_extras=True)
    for spec in sorted(fields(kind), key=lambda spec: bool(spec.kw_only)):
        yield spec, hints[spec.name]


def _from_json(value: Any, hint: Any) -> Any:
    """Convert a JSON value to its field's type; only paths differ."""
    if value is None or Path not in (hint, *get_args(hint)):
        return value
    return [Path(item) for item in value] if isinstance(value, list) else Path(value)
