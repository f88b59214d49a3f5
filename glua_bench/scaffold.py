"""First files of a plugin: a method or dataset that runs as written, or a dataset's description."""

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

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")

# The name of label values that are no structure, in `parse_structures`.
UNANNOTATED_NAME = "unannotated"


def new_method(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `<name>.py` and `test_<name>.py` of a method.

    Args:
        name: of the method, lower-case letters, digits and _.
        folder: where; it is made.

    Returns:
        The two files.

    Raises:
        ConfigError: the name cannot be used, or a file is there already.
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
        name: of the dataset, lower-case letters, digits and _.
        folder: where; it is made.
        domains: names of both domains.
        structures: name in words → raw label values.

    Returns:
        The two files.

    Raises:
        ConfigError: a name cannot be used, or a file is there already.
    """
    first, second = domains
    for domain in domains:
        if not re.fullmatch(r"[a-z0-9_]+", domain):
            raise ConfigError(
                f"--domains: '{domain}' cannot name a domain; use lower-case letters, digits and _."
            )
    if UNANNOTATED_NAME in structures:
        raise ConfigError(
            f"--structures: '{UNANNOTATED_NAME}' is no structure; write unannotated_values into "
            "the reading of the class instead."
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
    """Write `<name>.yaml`, which describes the volumes in a directory, and read it back.

    Args:
        name: of the dataset, lower-case letters, digits and _.
        folder: where; it is made.
        data: the directory of the volumes.
        ask: puts questions to the user.
        domains: words in the files' paths; empty lets the files suggest them.
        structures: name in words → raw label values; None asks.

    Returns:
        The file.

    Raises:
        ConfigError: a name or an answer cannot be used, or the file is there already.
        DataError: the files show no task.
    """
    _check_name("dataset", name)
    file = folder / f"{name}{SUFFIXES[0]}"
    _check_free(file)
    registry = Registry("dataset")
    (reader,) = registry.readers(file.suffix)
    drafter: Any = registry.load(reader.name)
    from glua_bench.integrity import told_by_cases

    write_text(file, drafter.draft(name, data, ask, domains, structures), "--out")
    try:
        described: Any = Registry("dataset", [file]).load(name)()
        faults = [found.text for found in told_by_cases(described) if found.problem]
    except UserError:
        file.unlink()  # what does not describe the files would only be in the way
        raise
    if faults:
        file.unlink()
        raise DataError(faults[0])
    return file


def parse_structures(text: str, asked: str = "--structures") -> dict[str, tuple[int, ...]]:
    """ "liver=1,tumour=2,3" → name in words → raw label values, those of a tumour 2 and 3.

    The name "unannotated" stands for voxels that nobody annotated.

    Args:
        text: what the user wrote.
        asked: what it answers, for messages.

    Raises:
        ConfigError: the text has another form, or names a structure or a value twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    title, used = "", {0}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        named = name.isprintable() and any(map(str.isalpha, name)) if equals else bool(title)
        if not named or not re.fullmatch("-?[0-9]+", value):
            raise ConfigError(
                f"{asked}: '{part.strip()}' is not of the form name=value, such as liver=1 or "
                "tumour=1,2,3."
            )
        if name in found or int(value) in used:
            raise ConfigError(
                f"{asked}: '{part.strip()}' repeats a name or a value, or has the value 0, "
                "which is background; give each structure its own."
            )
        title = name or title
        found[title] = (*found.get(title, ()), int(value))
        used.add(int(value))
    return found


def written_structures(structures: Mapping[str, tuple[int, ...]]) -> str:
    """What `parse_structures` reads: "liver=1,tumour=2,3"."""
    return ",".join(f"{title}={','.join(map(str, own))}" for title, own in structures.items())


def short_names(titles: list[str]) -> dict[str, str]:
    """Short names of two letters or more, all different: name in words → short name."""
    for length in range(3, 40):
        short = {t: re.sub(r"[^A-Za-z0-9]", "", t)[:length].upper() for t in titles}
        if len(set(short.values())) == len(titles) and all(short.values()):
            return short
    return {t: f"S{i}" for i, t in enumerate(titles, start=1)}


def _check_name(kind: str, name: str) -> None:
    taken = kind == "dataset" and name in (SWEEPS, ARTIFACTS)  # among the directories of runs
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or taken:
        raise ConfigError(
            f"'{name}' cannot name a {kind}; use lower-case letters, digits and _, beginning with "
            "a letter, and no word that Python or the runs' directory uses itself."
        )
    for entry in Registry(kind).entries():
        if entry.name == name:
            raise ConfigError(
                f"A {kind} '{name}' is there already (from {entry.origin}); choose another name."
            )


def _check_free(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another name or --out directory.")


def _write(kind: str, name: str, folder: Path, values: dict[str, str]) -> tuple[Path, Path]:
    _check_name(kind, name)
    if name in sys.stdlib_module_names:
        raise ConfigError(
            f"{name}.py would hide a module of Python of that name; choose another name."
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
