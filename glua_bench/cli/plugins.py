"""The commands `list`, `new-method` and `new-dataset`."""

from __future__ import annotations

import sys
import textwrap
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from glua_bench.cli.options import Plugins, answer, note, say, split_names
from glua_bench.console import next_command
from glua_bench.errors import ConfigError
from glua_bench.registry import Registry

Out = Annotated[Path, typer.Option("--out", help="Output directory.")]


class Kind(str, Enum):
    """Kinds of entries for `list`."""

    methods = "methods"
    datasets = "datasets"
    selectors = "selectors"
    sweeps = "sweeps"


def list_plugins(
    kind: Annotated[Kind | None, typer.Argument(help="List only this kind.")] = None,
    plugin: Plugins = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Include the methods' settings.")
    ] = False,
) -> None:
    """List methods, datasets, selectors and sweeps with summary, reference and required data."""
    broken, listed = 0, []
    for chosen in [kind] if kind is not None else list(Kind):
        if chosen is Kind.sweeps:
            listed += _list_sweeps()
            continue
        singular = chosen.value[:-1]
        entries = Registry(singular, plugin or []).entries()
        say(chosen.value.capitalize())
        for entry in entries:
            listed.append(
                {
                    "kind": singular,
                    "name": entry.name,
                    "summary": entry.summary,
                    "origin": entry.origin,
                    "reference": entry.attributes.get("reference"),
                    "needs": entry.attributes.get("needs"),
                    "error": entry.error or None,
                }
            )
            if entry.error:
                broken += 1
                say(f"  {entry.name:<13} BROKEN ({entry.origin}): {entry.error}")
                continue
            say(f"  {entry.name:<13} {entry.summary}")
            for label, key in (("paper", "reference"), ("needs", "needs"), ("folds", "folds")):
                if text := entry.attributes.get(key):
                    lines = textwrap.wrap(f"{label}: {text}", 80, subsequent_indent=" " * 7)
                    say(textwrap.indent("\n".join(lines), " " * 16))
            if verbose and singular == "method":
                loaded = Registry(singular, plugin or []).load(entry.name)
                listed[-1]["settings"] = _list_settings(loaded)
        say()
    if broken:
        say(f"{broken} plugin(s) cannot be used; correct or uninstall them.")
    following = ["glua-bench run --method NAME --dataset NAME", "glua-bench run --help"]
    if kind is Kind.sweeps:
        following = ["glua-bench sweep NAME --dry-run", "glua-bench sweep --help"]
    note(f"Next: {', or '.join(following)}")
    answer(plugins=listed, next=following)


def _list_sweeps() -> list[dict[str, Any]]:
    from glua_bench.documents import read_document
    from glua_bench.sweeps.definition import shipped

    say("Sweeps")
    listed = []
    for name, file in shipped().items():
        text = read_document(file)
        space, objective = text.take("space", object), text.take("objective", object)
        objectives = ", ".join(objective) if isinstance(objective, list) else objective
        searched = space if isinstance(space, str) else ", ".join(space)
        title = text.take("title", str)
        say(f"  {name:<17} {title}")
        listed.append({"kind": "sweep", "name": name, "summary": title, "origin": str(file)})
        summary = (
            f"{text.take('method', str)}: {searched}; objective {objectives}, "
            f"sampler {text.take('sampler', str, 'tpe')}"
        )
        say(textwrap.indent(textwrap.fill(summary, 76), " " * 20))
    say(f"  Files: {shipped()['example'].parent}; copy example.yaml to define your own.")
    say()
    return listed


def _list_settings(method: Any) -> dict[str, dict[str, Any]]:
    from dataclasses import fields

    settings = {}
    for spec in fields(method.Config):
        meta = spec.metadata
        allowed = ""
        if meta.get("choices"):
            allowed = f" [{', '.join(map(str, meta['choices']))}]"
        elif meta.get("low") is not None:
            allowed = f" [{meta['low']:g} to {meta['high']:g}]"
        say(f"{'':16}method.{spec.name} = {spec.default}{allowed}  {meta.get('help', '')}")
        settings[spec.name] = {"default": spec.default, **meta}
    return settings


def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method.")],
    out: Out = Path("."),
) -> None:
    """Write a working example method with its conformance test."""
    from glua_bench.cli import scaffold

    file, test = scaffold.new_method(name, out)
    say(f"Wrote {file} and {test}; a working example to replace by your method.")
    say(f"Check: {next_command('pytest', test)}")
    following = next_command("glua-bench", "run", "--plugin", file, "--method", name)
    note(f"Next:  {following} --dataset phantom")
    answer(file=file, test=test, next=[f"{following} --dataset phantom"])


def new_dataset(
    name: Annotated[str, typer.Argument(help="Name of the dataset.")],
    data: Annotated[Path | None, typer.Option("--data", help="Directory of your volumes.")] = None,
    out: Out = Path("."),
    domains: Annotated[
        str | None,
        typer.Option(help="Names of the domains in the files' paths, e.g. ct,mr."),
    ] = None,
    structures: Annotated[
        str | None,
        typer.Option(help="Structures and their raw label values, e.g. liver=1,tumour=2,3."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept all proposals.")] = False,
    python: Annotated[
        bool,
        typer.Option("--python", help="Write a Python class with a test instead of YAML."),
    ] = False,
) -> None:
    """Describe your own volumes in NAME.yaml; prompts propose answers from the files.

    Answers may be piped, one a line; an empty line accepts a proposal.
    """
    from glua_bench.cli import scaffold

    names = tuple(split_names(domains))
    if names and len(names) < 2:
        raise ConfigError(f"--domains {domains} needs two domains; write e.g. ct,mr.")
    given = None if structures is None else scaffold.parse_structures(structures)
    if python:
        if len(names) > 2:
            raise ConfigError(f"--domains {domains} has more than two; --python takes two.")
        pair = (names[0], names[1]) if names else ("ct", "mr")
        file, test = scaffold.new_dataset(name, out, pair, given or {"organ": (1,)})
        say(f"Wrote {file} and {test}; set splits, orientation and grids in the first.")
        say(f"Files: DIRECTORY/{{{pair[0]},{pair[1]}}}/PERSON_image.nii.gz and PERSON_label.nii.gz")
        following = next_command("glua-bench", "data", "check", name, plugins=[file])
        note(f"Next:  {following} --data-root DIRECTORY")
        answer(file=file, test=test, next=[f"{following} --data-root DIRECTORY"])
        return
    from glua_bench.console import ask

    if data is None:
        if yes or sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError(
                "new-dataset needs the directory of your volumes: give --data DIRECTORY, or "
                "--python for a template class."
            )
        data = ask("Directory of the volumes", ".", _directory)
    file = scaffold.new_description(
        name, out, data, partial(ask, interactive=not yes), names, given
    )
    say(f"Wrote {file}: review and correct it.")
    following = next_command("glua-bench", "data", "check", file)
    note(f"Next: {following}")
    answer(file=file, next=[following])


def _directory(text: str) -> Path:
    """Return a directory that exists."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigError(f"'{text}' is not a directory; enter that of the volumes.")
    return path
