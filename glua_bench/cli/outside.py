"""The commands `score` and `import`, for predictions of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glua_bench.cli.options import Plugins, Processes, answer, progress, say
from glua_bench.cli.options import note as remark
from glua_bench.console import next_command, warn
from glua_bench.errors import ConfigError
from glua_bench.files import csv_text, write_text
from glua_bench.registry import load_dataset, with_descriptions
from glua_bench.runs.completion import complete_directions, complete_names
from glua_bench.runs.request import DataRoot, Fold, RunsRoot
from glua_bench.task import Reading

if TYPE_CHECKING:
    from glua_bench.task import Dataset


def _load(dataset: str, data_root: Path | None, plugin: list[Path] | None, fold: int) -> Dataset:
    """Load a dataset by its name or its description."""
    name, plugins = with_descriptions(dataset, plugin)
    return load_dataset(name, data_root, plugins, fold)


Values = Annotated[
    str | None,
    typer.Option(
        "--values",
        help="Label values of the predictions: 'classes' (1 for the dataset's first structure, as "
        "`data export` writes) or 'dataset' (as in its files); default: detected from the files.",
    ),
]


def score(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS", help="Label file, or directory of label files."),
    ],
    references: Annotated[
        Path | None,
        typer.Argument(
            metavar="[REFERENCES]",
            help="Label file or directory; may be omitted with --dataset, whose test cases are "
            "the references then.",
        ),
    ] = None,
    structures: Annotated[
        str | None,
        typer.Option(
            help="Structures and their label values, which may overlap, e.g. LV=1,MYO=2,heart=1,2; "
            "'unannotated=255' excludes voxels, 'background=9' ignores a value. Default: nnU-Net's "
            "dataset.json beside the files, or each value found."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Dataset whose structures are scored: name or FILE.yaml.",
            autocompletion=complete_names("dataset"),
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(help="Domain of the files; default: target of the dataset's first direction."),
    ] = None,
    values: Values = None,
    fold: Fold = 1,
    data_root: DataRoot = None,
    plugin: Plugins = None,
    only_predicted: Annotated[
        bool,
        typer.Option(
            "--only-predicted",
            help="Omit references without a prediction instead of counting "
            "their structures as missed.",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute Dice, ASSD and HD95 with medpy.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write one row per case and structure as CSV.")
    ] = None,
    jobs: Processes = None,
) -> None:
    """Score label files of any tool against references, with the metrics of a run."""
    from glua_bench.cli import scaffold
    from glua_bench.cli.runs import score_table
    from glua_bench.data.parallel import cores
    from glua_bench.records.run_directory import check_predictions
    from glua_bench.runs import external
    from glua_bench.scoring import files
    from glua_bench.scoring.evaluation import summarise

    reading, own = None, None
    if dataset is not None and structures is not None:
        raise ConfigError("--structures and --dataset both define the classes; omit one of them.")
    if dataset is None:
        given = {"--domain": domain, "--values": values, "--data-root": data_root}
        extra = next((name for name, value in given.items() if value is not None), None)
        if extra or references is None:
            raise ConfigError(
                f"{extra} needs --dataset."
                if extra
                else "REFERENCES is missing; give a file or directory, or --dataset to score "
                "against its test cases."
            )
    if structures is not None:
        named = scaffold.parse_structures(structures, overlap=True)
        unannotated = named.pop("unannotated", ())
        ignored = named.pop("background", ())
        own = files.as_structures(named)
        reading = Reading(ignored_values=ignored, unannotated_values=unannotated)
    check_predictions(predictions)
    shared: dict[str, Any] = {
        "only_predicted": only_predicted,
        "verify": verify,
        "jobs": jobs or cores(),
    }
    with progress() as bar:
        if dataset is None:
            assert references is not None
            rows = files.score_files(
                predictions,
                references,
                own,
                reading=reading,
                report=remark,
                progress=bar,
                **shared,
            )
        else:
            data = _load(dataset, data_root, plugin, fold)
            rows = external.score_dataset(
                data,
                predictions,
                references,
                domain,
                values=values,
                report=remark,
                progress=bar,
                **shared,
            )
    unit = "mm by the files' headers" if dataset is None else data.distance_note
    table = summarise(rows.assign(selector=""))
    remark()
    say(score_table(table))
    cases = rows.drop_duplicates("case")
    missing = len(cases) - int(cases["predicted"].sum())
    noted = f", {missing} of them without a prediction" if missing else ""
    say(f"{len(cases)} cases{noted}. Distances in {unit}.")
    checked = files.largest_differences(rows) if verify else {}
    for metric, (difference, compared) in checked.items():
        say(f"Largest difference to medpy: {metric} {difference:.2g} ({compared} values)")
    if out is not None:
        write_text(out, csv_text(rows), "--out")
        say(f"Wrote {out}")
    words: list[object]
    if dataset is not None:
        words = ["glua-bench", "import", "NAME", "--dataset", dataset, "--predictions"]
        line = next_command(*words, predictions, plugins=plugin, data_root=data_root, fold=fold)
        what = "beside methods in every table"
    elif out is None:
        words = ["glua-bench", "score", predictions, references]
        words += ["--structures", structures] if structures else []
        words += ["--only-predicted"] if only_predicted else []
        line, what = next_command(*words, "--out", "scores.csv"), "each case and structure"
    else:
        line = "glua-bench import --help"
        what = "predictions of a dataset's test cases in its tables"
    remark(f"Next: {line}   ({what})")
    answer(
        scores=table.drop(columns="selector"),
        rows=rows,
        missing=missing,
        distances=unit,
        differences={metric: difference for metric, (difference, _) in checked.items()},
        files=[] if out is None else [out],
        next=[line],
    )


def import_predictions(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the entry, e.g. nnunet_3d.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Name of the dataset, or FILE.yaml.", autocompletion=complete_names("dataset")
        ),
    ],
    predictions: Annotated[
        Path,
        typer.Option(
            help="Directory with a label file for each test case, named by its id or as "
            "`data export` names it."
        ),
    ],
    direction: Annotated[
        str | None,
        typer.Option(
            help="source-target, e.g. mr-ct; default: the dataset's first.",
            autocompletion=complete_directions(),
        ),
    ] = None,
    fold: Fold = 1,
    seed: Annotated[int, typer.Option(help="Seed under which the entry is listed.")] = 0,
    values: Values = None,
    privileged: Annotated[
        bool,
        typer.Option(
            "--privileged", help="The model was trained or selected with labels of the target."
        ),
    ] = False,
    note: Annotated[
        str, typer.Option(help="Where the predictions come from: tool, version, settings.")
    ] = "",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace earlier imports of this name, task and seed."),
    ] = False,
    data_root: DataRoot = None,
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
    jobs: Processes = None,
    mlflow: Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Upload to MLflow.")] = True,
) -> None:
    """Import predictions of another tool as an entry of reports and comparisons.

    The entry is stamped external. All test cases of the direction's target need a prediction.
    """
    from glua_bench.cli.runs import score_table
    from glua_bench.data.parallel import cores
    from glua_bench.records.tracker import open_tracker
    from glua_bench.runs import external

    data = _load(dataset, data_root, plugin, fold)
    tracker = open_tracker(runs_root) if mlflow else None
    given = external.Import(
        name,
        data,
        predictions,
        direction,
        seed,
        values,
        privileged,
        " ".join(note.split()),
        runs_root,
        with_descriptions(dataset, plugin)[1],
        overwrite,
        jobs or cores(),
    )
    with progress() as bar:
        made = external.import_predictions(given, bar, remark)
    config, run = made.run.config, made.run
    if made.already_done:
        say(f"These files are already imported: {run.path}")
    for old in made.replaced:
        say(f"Replaced the import {old}.")
    say(f"Predictions: {external.reading_note(made.values, data.view(config.target))}.")
    say()
    say(score_table(made.table))
    say(f"Distances in {data.distance_note}.")
    say(
        "EXTERNAL: training data, budget, checkpoint selection and seed are as stated by the "
        "importer; they were not checked."
    )
    if privileged:
        say("PRIVILEGED: trained on target labels; an upper bound, not an adaptation result.")
    if data.protocol:
        say(f"PROTOCOL {data.protocol}.")
    if caveat := data.caveat(config.direction):
        say(f"CAVEAT {caveat}.")
    warnings = []
    if tracker is not None and not tracker.mirror(run):
        warnings.append("the tracker lacks this entry; upload it with `glua-bench sync`")
        warn(warnings[0])
    say()
    say(f"Results: {run.path} (cases.parquet, predictions/)")
    words: list[object] = [
        "glua-bench",
        "compare",
        "--methods",
        f"source_only,{name}",
        "--dataset",
        dataset,
    ]
    words += ["--direction", config.direction, "--seeds", "1"]
    words += ["--runs", runs_root] if runs_root != Path("runs") else []
    line = next_command(*words, plugins=plugin, data_root=data_root, fold=config.fold)
    remark(f"Next:    {line}")
    answer(
        path=run.path,
        id=run.id,
        already_done=made.already_done,
        replaced=made.replaced,
        scores=made.table.drop(columns="selector"),
        values=made.values,
        distances=data.distance_note,
        privileged=privileged,
        protocol=data.protocol or None,
        caveat=caveat or None,
        warnings=warnings,
        next=[line],
    )
