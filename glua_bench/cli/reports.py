"""The commands that use finished runs: `report`, `predict`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glua_bench.cli.options import Plugins, Storage, say, warn
from glua_bench.cli.sweeps import report_sweep
from glua_bench.console import next_command
from glua_bench.errors import ConfigError
from glua_bench.files import write_text
from glua_bench.runs.request import DataRoot, Device, RunsRoot

if TYPE_CHECKING:
    from glua_bench.runs.prediction import Model

RunName = Annotated[
    str | None,
    typer.Option("--run", help="A finished run: its directory, or its id or the beginning of it."),
]
SelectorName = Annotated[str, typer.Option("--selector", help="Whose checkpoint of the run.")]


def report(
    runs_root: Annotated[
        Path,
        typer.Option(
            "--runs",
            help="The directory of all runs, or the file of one comparison that `compare` prints, "
            "for its runs alone.",
        ),
    ] = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The directory of the report; default: report, of a sweep its own."
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="The report of a sweep, by its name.")
    ] = None,
    storage: Storage = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="A rows.parquet of a report, instead of run directories."),
    ] = None,
    tracker: Annotated[
        bool,
        typer.Option(
            "--from-mlflow",
            help="The runs of the MLflow store ($MLFLOW_TRACKING_URI, else that of --runs), "
            "instead of run directories.",
        ),
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            help="Only such runs, e.g. dataset=phantom, steps=500, method=glua,sifa. Repeatable.",
        ),
    ] = None,
    selector: Annotated[
        str, typer.Option("--selector", help="Whose checkpoints count; default: last.")
    ] = "last",
    title: Annotated[
        str, typer.Option("--title", help="Of the page.")
    ] = "Comparison of adaptation methods",
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw cases side by side.")
    ] = True,
    viewer: Annotated[
        bool,
        typer.Option("--viewer", help="Embed a viewer of volumes (NiiVue; needs npm once)."),
    ] = False,
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Write a page, tables (LaTeX, CSV, Markdown) and figures (SVG, PNG) of finished runs."""
    import tempfile

    if runs_root.is_file() and (sweep is not None or rows is not None or tracker):
        raise ConfigError(
            f"--runs {runs_root} names the runs of one comparison; leave --sweep, --rows and "
            "--from-mlflow out, or give the directory of all runs."
        )
    if sweep is not None:
        if rows is not None or tracker or where:
            raise ConfigError(
                "--sweep takes all trials of one sweep; leave --rows, --from-mlflow and --where "
                "out, or leave --sweep out."
            )
        from glua_bench.sweeps import command

        study, base = command.join(sweep, runs_root, storage, plugin or [], say)
        page = report_sweep(study, base, out or study.folder / "report")
        say(f"Report: {page}")
        say(f"Next:   open {page}; {command.next_command(study, base)}")
        return
    from glua_bench.reports import report as reporting
    from glua_bench.reports import results

    out = out or Path("report")

    chosen = results.parse_where(where or [])
    options = reporting.Options(selector, title, pictures, viewer, data_root, plugin or [])
    if rows is not None and tracker:
        raise ConfigError("--rows and --from-mlflow name two sources; give one of them.")
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
        files = reporting.write(found, out, options, say)
    say()
    for sentence in reporting.summary(found, options):
        say(sentence)
    say()
    say(f"Report: {files[0]}   ({len(files) - 1} further files in {out})")
    say(f"Next:   open {files[0]}, and take {out}/tables/*.tex into a paper")


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="NIfTI, NRRD or MetaImage; or folders of them, of a DICOM series, or nnU-Net's "
            "imagesTs."
        ),
    ],
    run: RunName = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A directory that `export` wrote.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            "--domain",
            help="Whose images they are, e.g. ct: the source's or the target's name; default: the "
            "target's.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory of the results.")] = Path(
        "predicted"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that are there already.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the classes' probabilities.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also draw slices with contours.")
    ] = False,
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Segment new volumes with a finished run or an exported model."""
    from glua_bench.console import Progress
    from glua_bench.runs import inputs, prediction

    if (run is None) == (model is None):
        raise ConfigError("Give either --run or --model, which say what segments.")
    given = inputs.find(images)
    there = [p for p in prediction.outputs(given.images, out, probabilities, overlay) if p.exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{there[0]} is there already; choose another --out, or give --overwrite to replace "
            f"the {len(there)} file(s) of an earlier prediction."
        )
    if model is not None:
        loaded = prediction.from_directory(model, plugin or [], device)
    else:
        found = prediction.find_run(str(run), runs_root)
        loaded = prediction.from_run(found, plugin or [], device, selector)
    config, name = loaded.config, loaded.domain(domain)
    say(
        f"{config.method}, trained on {config.fold_name} {config.direction}"
        + (", PRIVILEGED (trained on target labels)" if config.privileged else "")
    )
    say(_read_as(loaded, name))
    if given.left:
        files = ", ".join(file.name for file in given.left[:3])
        more = f" and {len(given.left) - 3} more" if len(given.left) > 3 else ""
        say(f"Skipped, since their names say that they are labels: {files}{more}.")
    results = []
    try:
        with Progress() as progress:
            progress.stage("segment", len(given.images))
            for result in prediction.predict(
                loaded, given.images, out, name, probabilities, progress.update, warn
            ):
                results.append(result)
                if overlay:
                    from glua_bench.reports.run_figures import draw_prediction

                    draw_prediction(
                        out / f"{result.name}.png",
                        result.slices,
                        result.classes,
                        loaded.structures,
                        result.name,
                        loaded.data.publishable,
                    )
    finally:  # what is segmented before an image that cannot be used has its volumes, too
        if results:
            table = prediction.volumes_table(results)
            write_text(out / prediction.VOLUMES, table.to_csv(index=False), "--out")
    say()
    for result in results:
        volumes = ", ".join(f"{name} {ml:.1f} ml" for name, ml in result.ml.items())
        say(f"{result.labels}: {volumes}")
    say(f"Volumes: {out / prediction.VOLUMES}")
    if overlay and not loaded.data.publishable:
        say("The pictures may show the data's owner's images: look at them, do not pass them on.")
    say("Next:    open an image with its _seg file in a viewer, and look before you count on it.")


def _read_as(model: Model, domain: str) -> str:
    """As what images are read, in a sentence."""
    role, config = model.role(domain), model.config
    if role == "target":
        return f"Images are read as {domain}, the target domain."
    if config.privileged:
        return (
            f"Images are read as {domain}, the source domain, of which this run has seen no image."
        )
    translated = model.translates()
    return f"Images are read as {domain}, the source domain" + (
        ", and translated as in training." if translated else "."
    )


def export(
    run: RunName = None,
    out: Annotated[Path, typer.Option("--out", help="A new directory.")] = Path("model"),
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """Write a finished run's model: weights, configuration, card and licence, without the run."""
    from glua_bench.runs import prediction

    if run is None:
        raise ConfigError("--run is missing; give a finished run's directory or id.")
    found = prediction.find_run(run, runs_root)
    loaded = prediction.from_run(found, plugin or [], "cpu", selector)
    folder = prediction.export(loaded, found, out, selector)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    say(f"Wrote {folder} ({size:.1f} MiB): {', '.join(sorted(f.name for f in folder.iterdir()))}")
    following = next_command("glua-bench", "predict", "--model", folder, plugins=plugin)
    say(f"Next: {following} IMAGE.nii.gz")
