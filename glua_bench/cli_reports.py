"""The commands that use finished runs: `report`, `predict`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glua_bench.cli_options import DataRoot, Device, Plugins, RunsRoot, Storage, say, warn
from glua_bench.cli_sweeps import report_sweep
from glua_bench.errors import ConfigError, DataError

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
            help="The directory of all runs; or a file in its comparisons, which `compare` names, "
            "for the runs of that comparison alone.",
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
            from glua_bench import tracking

            tracking.fetch_runs(tracking.tracking_uri(runs_root), Path(scratch), warn=warn)
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
        list[Path], typer.Argument(help="NIfTI, NRRD or MetaImage, of the target domain.")
    ],
    run: RunName = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A directory that `export` wrote.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Directory of the results.")] = Path(
        "predicted"
    ),
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
    from glua_bench import prediction
    from glua_bench.console import Progress

    if (run is None) == (model is None):
        raise ConfigError("Give either --run or --model, which say what segments.")
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise DataError(f"The image {missing[0]} does not exist; check the names of the images.")
    if model is not None:
        loaded = prediction.from_directory(model, plugin or [], device)
    else:
        found = prediction.find_run(str(run), runs_root)
        loaded = prediction.from_run(found, plugin or [], device, selector)
    config = loaded.config
    say(
        f"{config.method}, trained on {config.dataset} {config.direction}"
        + (", PRIVILEGED (trained on target labels)" if config.privileged else "")
    )
    results = []
    with Progress() as progress:
        progress.stage("segment", len(images))
        for result in prediction.predict(loaded, images, out, probabilities, progress.update):
            results.append(result)
            if overlay:
                from glua_bench.reports.run_figures import draw_prediction

                name = prediction.name_of(result.file)
                draw_prediction(
                    out / f"{name}.png",
                    result.slices,
                    result.classes,
                    loaded.structures,
                    name,
                    loaded.publishable,
                )
    table = prediction.volumes_table(results)
    table.to_csv(out / "volumes.csv", index=False)
    say()
    for result in results:
        volumes = ", ".join(f"{name} {ml:.1f} ml" for name, ml in result.ml.items())
        say(f"{result.labels}: {volumes}")
    say(f"Volumes: {out / 'volumes.csv'}")
    if overlay and not loaded.publishable:
        say("The pictures may show the data's owner's images: look at them, do not pass them on.")
    say("Next:    open an image with its _seg file in a viewer, and look before you count on it.")


def export(
    run: RunName = None,
    out: Annotated[Path, typer.Option("--out", help="A new directory.")] = Path("model"),
    selector: SelectorName = "last",
    runs_root: RunsRoot = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """Write a finished run's model: weights, configuration, card and licence, without the run."""
    from glua_bench import prediction

    if run is None:
        raise ConfigError("--run is missing; give a finished run's directory or id.")
    found = prediction.find_run(run, runs_root)
    loaded = prediction.from_run(found, plugin or [], "cpu", selector)
    folder = prediction.export(loaded, found, out, selector)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    say(f"Wrote {folder} ({size:.1f} MiB): {', '.join(sorted(f.name for f in folder.iterdir()))}")
    say(f"Next: glua-bench predict --model {folder} IMAGE.nii.gz")
