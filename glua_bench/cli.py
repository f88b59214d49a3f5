"""The command line: which commands there are, and how errors reach the user.

The commands are in `cli_*.py`, thin: they read options, call the harness, and say where the
results lie. torch, mlflow and the content packages are imported inside a command, so that `--help`
and `list` answer at once. These files are also the one place that wires the harness to `reports`
and `sweeps`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from glua_bench import __version__, cli_data, cli_plugins, cli_reports, cli_runs, cli_sweeps
from glua_bench.cli_options import Plugins, Told, end, say
from glua_bench.console import next_command
from glua_bench.errors import ConfigError, RunFailure, UserError
from glua_bench.interruption import Interrupted
from glua_bench.request import RunsRoot

app = typer.Typer(
    name="glua-bench",
    help="Unsupervised domain adaptation for medical image segmentation, measured so that the "
    "number can be trusted.",
    epilog="Begin with: glua-bench run --method source_only --dataset phantom",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.data_app, name="data")
for command in (
    cli_runs.run,
    cli_runs.compare,
    cli_runs.ablate,
    cli_reports.report,
    cli_reports.predict,
    cli_reports.export,
    cli_sweeps.sweep,
    cli_sweeps.worker,
):
    app.command()(command)
app.command(name="run-request", hidden=True)(cli_runs.run_request)
app.command(name="list")(cli_plugins.list_)
app.command()(cli_plugins.new_method)
app.command()(cli_plugins.new_dataset)


@app.command()
def sync(runs_root: RunsRoot = Path("runs")) -> None:
    """Send to MLflow what it has missed; runs that it has are left alone."""
    if not runs_root.is_dir():
        raise ConfigError(
            f"There is no directory {runs_root}; name the one of your runs by --runs."
        )
    from glua_bench.tracking import MLflowMirror

    mirror = MLflowMirror(runs_root)
    counts = mirror.sync()
    say(
        f"{mirror.place}: {counts.uploaded} runs sent, {counts.present} there before, "
        f"{counts.unfinished} unfinished and left out, {counts.missed} not taken."
    )
    if counts.missed:
        raise RunFailure(
            f"The tracker at {mirror.place} did not take {counts.missed} runs; check "
            "MLFLOW_TRACKING_URI and give the command again, nothing is lost."
        )
    say(f"Next: {next_command('mlflow', 'ui', '--backend-store-uri', mirror.place)}")


@app.command()
def doctor(runs_root: RunsRoot = Path("runs"), plugin: Plugins = None) -> None:
    """Versions, devices, data, tracker, plugins: what works here and what to do next."""
    from glua_bench.doctor import examine

    findings, todo = examine(runs_root, plugin or [])
    width = max(len(name) for name, _ in findings)
    for name, text in findings:
        say(f"{name:<{width}}  {text}")
    say()
    for line in todo:
        say(f"Next: {line}")


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
    """Options before the command."""


def main() -> None:
    """The console script: errors are one sentence, without a traceback."""
    try:
        app()
    except (UserError, RunFailure) as error:
        end(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Typer turns an interruption within a command into this code, and says nothing.
        if isinstance(stop, SystemExit) and (stop.code != 130 or isinstance(stop, Told)):
            raise
        end("interrupted; the same command resumes.", 130)
    except Interrupted as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # the first process of the run says it; an error here would kill that one
        end(f"ended by {error}, after a checkpoint; the same command resumes.", 128 + error.number)
    except BrokenPipeError:
        # The reader of a pipe (e.g. head) has gone; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("GLUA_BENCH_DEBUG"):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        end(
            f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno} ({text}); this "
            "is a defect of glua-bench or of a plugin: set GLUA_BENCH_DEBUG=1 to see where, and "
            "report it.",
            1,
        )
