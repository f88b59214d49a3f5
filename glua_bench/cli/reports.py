"""The commands `report`, `predict` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glua_bench.cli.options import Plugins, Storage, answer, note, progress, say
from glua_bench.cli.sweeps import report_sweep
from glua_bench.config import ORACLE
from glua_bench.console import next_command, warn
from glua_bench.errors import ConfigError
from glua_bench.runs.completion import complete_choices, complete_names
from glua_bench.runs.request import ADAPTATIONS, DataRoot, Device, RunsRoot

if TYPE_CHECKING:
    from glua_bench.runs.prediction import Model, Predicted

RunName = Annotated[
    str | None,
    typer.Option("--run", help="Finished run: its directory, or its id or a prefix of it."),
]
SelectorName = Annotated[
    str,
    typer.Option(
        "--selector",
        help="Selector of the checkpoint.",
        autocompletion=complete_names("selector", ORACLE),
    ),
]


def report(
    runs_root: Annotated[
        Path,
        typer.Option(
            "--runs",
            help="Directory of all runs, or the file of one comparison that `compare` prints.",
        ),
    ] = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Output directory; default: report, or the sweep's directory."),
    ] = None,
    sweep: Annotated[str | None, typer.Option("--sweep", help="Report this sweep instead.")] = None,
    storage: Storage = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="Read rows.parquet of a report instead of run directories."),
    ] = None,
    tracker: Annotated[
        bool,
        typer.Option(
            "--from-mlflow",
            help="Read runs from MLflow ($MLFLOW_TRACKING_URI, or the store in --runs).",
        ),
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            help="Filter runs, e.g. dataset=phantom, steps=500, method=glua,sifa; repeatable.",
        ),
    ] = None,
    selector: SelectorName = "last",
    title: Annotated[
        str, typer.Option("--title", help="Page title.")
    ] = "Comparison of adaptation methods",
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Plot example cases.")
    ] = True,
    viewer: Annotated[
        bool,
        typer.Option("--viewer", help="Embed a volume viewer (NiiVue; needs npm once)."),
    ] = False,
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Write a page, tables (LaTeX, CSV, Markdown) and figures (PDF, SVG, PNG)."""
    import tempfile

    sources = {"--sweep": sweep, "--rows": rows, "--from-mlflow": tracker}
    given = [option for option, value in sources.items() if value]
    given += ["--where"] if sweep and where else []
    given += [f"--runs {runs_root} (the file of one comparison)"] if runs_root.is_file() else []
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them.")
    if sweep is not None:
        from glua_bench.sweeps import command

        study, base = command.join(sweep, runs_root, storage, plugin or [], note)
        page, sentences = report_sweep(study, base, out or study.folder / "report")
        following = command.next_command(study, base)
        say(f"Report: {page}")
        note(f"Next:   open {page}; {following}")
        answer(report=page, summary=sentences, next=[following])
        return
    from glua_bench.reports import report as reporting
    from glua_bench.reports import results

    out = out or Path("report")
    chosen = results.parse_where(where or [])
    options = reporting.Options(selector, title, pictures, viewer, data_root, plugin or [])
    with tempfile.TemporaryDirectory() as scratch:
        if rows is not None:
            found = results.from_rows(rows, chosen, plugin or [], warn)
        elif tracker:
            from glua_bench.records import mlflow_mirror
            from glua_bench.records.fetch import fetch_runs

            fetch_runs(mlflow_mirror.tracking_uri(runs_root), Path(scratch), warn=warn)
            found = results.from_runs(Path(scratch), chosen, plugin or [], warn)
        else:
            found = results.from_runs(runs_root, chosen, plugin or [], warn)
        told = len(found.notices)
        files = reporting.write(found, out, options, note)
    for text in found.notices[told:]:
        warn(text)
    note()
    sentences = [
        f"{verdict} {bounds}".rstrip() for verdict, bounds in reporting.summary(found, options)
    ]
    for sentence in sentences:
        say(sentence)
    say()
    say(f"Report: {files[0]}   ({len(files) - 1} other files in {out})")
    note(f"Next:   open {files[0]}; {out}/tables/*.tex are for papers")
    answer(
        report=files[0],
        files=files[1:],
        summary=sentences,
        notices=found.notices,
        next=[f"open {files[0]}"],
    )


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="NIfTI, NRRD or MetaImage files; or directories of them or of a DICOM series. "
            "Of a model with several channels: the files of a case joined by commas, or nnU-Net's "
            "names."
        ),
    ],
    run: RunName = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Directory written by `export`.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            "--domain",
            help="Domain of the images, e.g. ct; default: the target domain.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Output directory.")] = Path("predicted"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing results.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write class probabilities.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also plot slices with contours.")
    ] = False,
    adapt: Annotated[
        str | None,
        typer.Option(
            "--adapt",
            help="Adapt the model to the images while predicting: tent (entropy minimisation).",
            autocompletion=complete_choices(ADAPTATIONS),
        ),
    ] = None,
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Segment new volumes with a finished run or an exported model."""
    from glua_bench.runs import inputs, prediction

    if (run is None) == (model is None):
        raise ConfigError("Give either --run or --model.")
    loaded = prediction.from_either(run, model, runs_root, plugin or [], device, selector)
    loaded = prediction.adapted(loaded, adapt)
    given = inputs.find(images, loaded.channels)
    prediction.refuse_existing(given.images, out, overwrite, probabilities, overlay)
    config, name = loaded.config, loaded.domain(domain)
    note(
        f"{config.method}, trained on {config.fold_name} {config.direction}"
        + (", PRIVILEGED (trained on target labels)" if config.privileged else "")
    )
    note(_read_as(loaded, name))
    if adapt is not None:
        note(f"Adapted by {adapt} from batch to batch: a result depends on the images before it.")
    if given.skipped:
        note(given.skipped)

    def draw(predicted: Predicted) -> None:
        from glua_bench.reports.run_figures import draw_prediction, frame

        draw_prediction(
            out / f"{predicted.name}.png",
            predicted.slices,
            predicted.classes,
            loaded.structures,
            predicted.name,
            loaded.data.publishable,
            frame(predicted.placement, loaded.data.domains[name].reading, predicted.file),
        )

    with progress() as bar:
        results = prediction.predict_all(
            loaded,
            given.images,
            out,
            name,
            probabilities,
            bar,
            warn,
            draw if overlay else lambda predicted: None,
        )
    note()
    for result in results:
        text = ", ".join(f"{structure} {ml:.1f} ml" for structure, ml in result.ml.items())
        say(f"{result.labels}: {text}")
    say(f"Volumes: {out / prediction.VOLUMES}")
    if overlay and not loaded.data.publishable:
        say("The figures may show the data owner's images: do not share them.")
    note("Next:    inspect the _seg files on their images in a viewer before using them.")
    volumes = [{"image": one.file, "labels": one.labels, "ml": one.ml} for one in results]
    answer(
        run=loaded.source,
        domain=name,
        adaptation=adapt,
        privileged=config.privileged,
        predictions=volumes,
        volumes=out / prediction.VOLUMES,
        skipped=given.left,
        next=[],
    )


def _read_as(model: Model, domain: str) -> str:
    """Describe the role of the images' domain."""
    role, note = model.role(domain), ""
    if role == "source" and model.config.privileged:
        note = ", whose images were not in training"
    elif role == "source" and model.translates():
        note = ", and translated as in training"
    return f"Images are read as {domain}, the {role} domain{note}."


def export(
    run: RunName = None,
    out: Annotated[Path, typer.Option("--out", help="Output directory, which must be new.")] = Path(
        "model"
    ),
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """Export a finished run's model: weights, configuration, card and licence."""
    from glua_bench.runs import exporting, prediction

    if run is None:
        raise ConfigError("--run is missing; give the directory or id of a finished run.")
    found = prediction.find_run(run, runs_root)
    loaded = prediction.from_run(found, plugin or [], "cpu", selector)
    folder = exporting.export(loaded, found, out, selector)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    say(f"Wrote {folder} ({size:.1f} MiB): {', '.join(sorted(f.name for f in folder.iterdir()))}")
    following = next_command("glua-bench", "predict", "--model", folder, plugins=plugin)
    further = "".join(f",IMAGE_{number}.nii.gz" for number in range(2, loaded.channels + 1))
    following = f"{following} IMAGE.nii.gz{further}"
    note(f"Next: {following}")
    answer(
        path=folder,
        files=sorted(file.name for file in folder.iterdir()),
        mebibytes=size,
        next=[following],
    )
