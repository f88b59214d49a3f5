"""Generate plugin files: a method, a dataset class, or a dataset description."""

from __future__ import annotations

import json
import keyword
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from glua_bench.documents import SUFFIXES
from glua_bench.errors import ConfigError, DataError, UserError
from glua_bench.files import write_text
from glua_bench.paths import ARTIFACTS, SWEEPS
from glua_bench.registry import Registry
from glua_bench.task import Ask

# The colour-blind safe palette of Okabe and Ito.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")

# Name of label values of unannotated voxels in `parse_structures`.
UNANNOTATED_NAME = "unannotated"


def new_method(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `<name>.py` and `test_<name>.py` of a method.

    Args:
        name: name of the method; lower-case letters, digits and _.
        folder: output directory, created if necessary.

    Returns:
        The two files.

    Raises:
        ConfigError: the name is invalid, or a file exists already.
    """
    return _write("method", name, folder, {})


def new_dataset(
    name: str,
    folder: Path,
    domains: tuple[str, str],
    structures: Mapping[str, tuple[int, ...]],
) -> tuple[Path, Path]:
    """Write `<name>.py` and `test_<name>.py` of a dataset.

    Args:
        name: name of the dataset; lower-case letters, digits and _.
        folder: output directory, created if necessary.
        domains: names of both domains.
        structures: structure → raw label values.

    Returns:
        The two files.

    Raises:
        ConfigError: a name is invalid, or a file exists already.
    """
    first, second = domains
    for domain in domains:
        if not re.fullmatch(r"[a-z0-9_]+", domain):
            raise ConfigError(
                f"--domains: '{domain}' is not a valid name; use lower-case letters, digits and _."
            )
    if UNANNOTATED_NAME in structures:
        raise ConfigError(
            f"--structures: '{UNANNOTATED_NAME}' is not a structure; set unannotated_values in the "
            "reading of the class instead."
        )
    if first == second:
        raise ConfigError(f"--domains names '{first}' twice; name two domains, e.g. ct,mr.")
    short = short_names(list(structures))
    lines = [
        f'        Structure("{short[title]}", {json.dumps(title, ensure_ascii=False)}, {values}, '
        f'"{color}"),'
        for (title, values), color in zip(structures.items(), COLORS * 9, strict=False)
    ]
    titles = ", ".join(structures)
    return _write(
        "dataset",
        name,
        folder,
        {
            "first": first,
            "second": second,
            "structures": "\n".join(lines),
            "structure_titles": titles[0].upper() + titles[1:],
        },
    )


def new_description(
    name: str,
    folder: Path,
    data: Path,
    ask: Ask,
    domains: tuple[str, ...] = (),
    structures: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write `<name>.yaml`, which describes the volumes in a directory, and validate it.

    Args:
        name: name of the dataset; lower-case letters, digits and _.
        folder: output directory, created if necessary.
        data: directory of the volumes.
        ask: prompts the user.
        domains: names of the domains in the files' paths; empty infers them from the files.
        structures: structure → raw label values; None prompts for them.

    Returns:
        The file.

    Raises:
        ConfigError: a name or an answer is invalid, or the file exists already.
        DataError: the files do not define a task.
    """
    _check_name("dataset", name)
    file = folder / f"{name}{SUFFIXES[0]}"
    _check_free(file)
    registry = Registry("dataset")
    (reader,) = registry.readers(file.suffix)
    drafter: Any = registry.load(reader.name)
    from glua_bench.inspection.integrity import check_cases

    write_text(file, drafter.draft(name, data, ask, domains, structures), "--out")
    try:
        described: Any = Registry("dataset", [file]).load(name)()
        faults = [found.text for found in check_cases(described) if found.problem]
    except UserError:
        file.unlink()  # it would block a second attempt
        raise
    if faults:
        file.unlink()
        raise DataError(faults[0])
    return file


def parse_structures(
    text: str, option: str = "--structures", overlap: bool = False
) -> dict[str, tuple[int, ...]]:
    """Parse structures and their raw label values, e.g. "liver=1,tumour=2,3".

    The name "unannotated" is for voxels without annotation.

    Args:
        text: the user's input.
        option: name of the option or question, for error messages.
        overlap: allow a value in several structures.

    Returns:
        Structure → raw label values.

    Raises:
        ConfigError: the text is malformed, or a structure or value is repeated.
    """
    found: dict[str, tuple[int, ...]] = {}
    title, used = "", {0}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        named = name.isprintable() and any(map(str.isalpha, name)) if equals else bool(title)
        if not named or not re.fullmatch("-?[0-9]+", value):
            raise ConfigError(
                f"{option}: '{part.strip()}' is not of the form name=value, such as liver=1 or "
                "tumour=1,2,3."
            )
        taken = {0, *found.get(name or title, ())} if overlap else used
        if name in found or int(value) in taken:
            raise ConfigError(
                f"{option}: '{part.strip()}' repeats a name or a value, or has the value 0 of the "
                "background; give each structure its own values."
            )
        title = name or title
        found[title] = (*found.get(title, ()), int(value))
        used.add(int(value))
    return found


def written_structures(structures: Mapping[str, tuple[int, ...]]) -> str:
    """Format structures as text that `parse_structures` can parse."""
    return ",".join(f"{title}={','.join(map(str, own))}" for title, own in structures.items())


def short_names(titles: list[str]) -> dict[str, str]:
    """Abbreviate titles to unique short names: title → short name."""
    for length in range(3, 40):
        short = {t: re.sub(r"[^A-Za-z0-9]", "", t)[:length].upper() for t in titles}
        if len(set(short.values())) == len(titles) and all(short.values()):
            return short
    return {t: f"S{i}" for i, t in enumerate(titles, start=1)}


def _check_name(kind: str, name: str) -> None:
    reserved = kind == "dataset" and name in (SWEEPS, ARTIFACTS)  # directories in runs/
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or reserved:
        raise ConfigError(
            f"'{name}' is not a valid name for a {kind}; use lower-case letters, digits and _, "
            "starting with a letter, and no Python keyword or reserved directory name."
        )
    for entry in Registry(kind).entries():
        if entry.name == name:
            raise ConfigError(
                f"A {kind} '{name}' exists already (from {entry.origin}); choose another name."
            )


def _check_free(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists already; choose another name or --out directory.")


def _write(kind: str, name: str, folder: Path, values: dict[str, str]) -> tuple[Path, Path]:
    _check_name(kind, name)
    if name in sys.stdlib_module_names:
        raise ConfigError(
            f"{name}.py would hide a module of Python's standard library; choose another name."
        )
    file = folder / f"{name}.py"
    test = folder / f"test_{name}.py"
    _check_free(file, test)
    values = {
        "name": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").strip().capitalize(),
        "file": file.name,
        **values,
    }
    templates = files("glua_bench") / "templates"
    texts = {
        file: (templates / f"{kind}.py.txt").read_text(encoding="utf-8"),
        test: (templates / f"test_{kind}.py.txt").read_text(encoding="utf-8"),
    }
    for path, text in texts.items():
        write_text(path, Template(text).substitute(values), "--out")
    return file, test
