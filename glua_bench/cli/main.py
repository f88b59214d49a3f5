"""The command line: registers the commands and reports errors.

The commands parse options, call the harness, and print where the results are. They import torch,
mlflow, `reports` and `sweeps` inside functions, so that `--help` and `list` are fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from glua_bench import __version__
from glua_bench.cli import data, outside, plugins, reports, runs, sweeps
from glua_bench.cli.options import (
    Plugins,
    ReportedExit,
    answer,
    end,
    note,
    say,
    with_output,
)
from glua_bench.console import leading, masked_output
from glua_bench.errors import ConfigError, RunFailure, UserError, cause, reason
from glua_bench.runs.interruption import Interrupted
from glua_bench.runs.request import RunsRoot

app = typer.Typer(
    name="glua-bench",
    help="Reproducible benchmark of unsupervised domain adaptation for medical image segmentation.",
    epilog="Start with: glua-bench run --method source_only --dataset phantom",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # inherited by all commands
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data.data_app, name="data")
for command in (
    runs.run,
    runs.compare,
    runs.ablate,
    reports.report,
    reports.predict,
    outside.score,
    reports.export,
    sweeps.sweep,
    sweeps.worker,
):
    app.command()(with_output(command))
app.command(name="import")(with_output(outside.import_predictions))
app.command(name="run-request", hidden=True)(runs.run_request)
app.command(name="list")(with_output(plugins.list_plugins))
app.command()(with_output(plugins.new_method))
app.command()(with_output(plugins.new_dataset))


@app.command()
@with_output
def sync(runs_root: RunsRoot = Path("runs")) -> None:
    """Upload runs missing in MLflow."""
    if not runs_root.is_dir():
        raise ConfigError(f"The directory {runs_root} does not exist; give --runs DIRECTORY.")
    from glua_bench.records.tracker import open_tracker

    tracker = open_tracker(runs_root)
    counts = tracker.sync()
    say(
        f"{tracker.place}: {counts.uploaded} runs uploaded, {counts.present} already present, "
        f"{counts.unfinished} unfinished (skipped), {counts.missed} failed"
        + (f", {counts.damaged} damaged (skipped)." if counts.damaged else ".")
    )
    answer(tracker=tracker.place, **vars(counts), next=[tracker.browse])
    problems = []
    if counts.missed:
        named = f" ({', '.join(counts.refused)})" if counts.refused else ""
        problems.append(f"{counts.missed} runs could not be uploaded to {tracker.place}{named}")
    if counts.damaged:
        problems.append(f"{counts.damaged} runs are damaged")
    if problems:
        down = counts.missed > len(counts.refused)
        remedy = tracker.remedy if down else "correct what the warnings name"
        raise RunFailure(f"{' and '.join(problems)}; {remedy}, and repeat the command.")
    note(f"Next: {tracker.browse}")


@app.command()
@with_output
def doctor(runs_root: RunsRoot = Path("runs"), plugin: Plugins = None) -> None:
    """Check versions, devices, data, tracker and plugins."""
    from glua_bench.cli.doctor import examine

    findings, todo = examine(runs_root, plugin or [])
    width = max(len(name) for name, _ in findings)
    for name, text in findings:
        say(f"{name:<{width}}  {text}")
    note()
    for line in todo:
        note(f"Next: {line}")
    answer(findings=[{"name": name.strip(), "text": text} for name, text in findings], next=todo)


def _version(show: bool) -> None:
    if show:
        print(f"glua-bench {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Global options."""


def main() -> None:
    """Run a command; errors are one sentence without a traceback, and without a password."""
    # Child processes, also those of libraries, import no modules of the current directory.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that it cannot encode ends no command
            stream.reconfigure(errors="backslashreplace")
    with masked_output():
        _run()


def _run() -> None:
    try:
        app()
    except (UserError, RunFailure) as error:
        end(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Typer exits with 130 on an interrupt within a command, without a message.
        if isinstance(stop, SystemExit) and (stop.code != 130 or isinstance(stop, ReportedExit)):
            raise
        end("interrupted; the same command resumes.", 130)
    except Interrupted as error:
        if not leading():
            return  # the first process prints the message, and an error here would kill it
        end(
            f"stopped by {error} after saving a checkpoint; the same command resumes.",
            128 + error.number,
        )
    except BrokenPipeError:
        # The reader of a pipe (e.g. head) has exited; avoid Python's message at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("GLUA_BENCH_DEBUG"):
            traceback.print_exc()  # here, where passwords are masked
            sys.exit(1)
        if known := cause(error):
            end(known, RunFailure.exit_code)
        last = traceback.extract_tb(error.__traceback__)[-1]
        # Of an error in the process that trains, where it was raised.
        file, line = getattr(error, "where", (last.filename, last.lineno))
        end(
            f"{type(error).__name__} at {Path(file).name}:{line} "
            f"({reason(error)}); this is a bug in glua-bench or in a plugin: set "
            "GLUA_BENCH_DEBUG=1 for a traceback, and report it.",
            1,
        )
