"""First files of a plugin: a method or dataset that runs as written, and its test."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

from glua_bench.errors import ConfigError
from glua_bench.registry import Registry

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


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
    name: str, folder: Path, domains: tuple[str, str], structures: dict[str, int]
) -> tuple[Path, Path]:
    """Write `<name>.py` and `test_<name>.py` of a dataset.

    Args:
        name: of the dataset, lower-case letters, digits and _.
        folder: where; it is made.
        domains: names of both domains.
        structures: name in words → raw label value.

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
    if first == second:
        raise ConfigError(f"--domains names '{first}' twice; name two domains, e.g. ct,mr.")
    short = _short_names(list(structures))
    lines = [
        f'        Structure("{short[title]}", "{title}", ({value},), "{color}"),'
        for (title, value), color in zip(structures.items(), COLORS * 9, strict=False)
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


def parse_structures(text: str) -> dict[str, int]:
    """ "liver=1,spleen=4" → name in words → raw label value.

    Raises:
        ConfigError: the text has another form, or names a structure or a value twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        title, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and re.fullmatch(r"[A-Za-z][A-Za-z0-9 _-]*", title)) or not value.isdigit():
            raise ConfigError(
                f"--structures: '{part.strip()}' is not of the form name=value, such as liver=1."
            )
        if title in found or int(value) in found.values() or int(value) == 0:
            raise ConfigError(
                f"--structures: '{part.strip()}' repeats a name or a value, or has the value 0, "
                "which is background; give each structure its own."
            )
        found[title] = int(value)
    return found


def _short_names(titles: list[str]) -> dict[str, str]:
    """Short names of two letters or more, all different."""
    for length in range(3, 40):
        short = {t: re.sub(r"[^A-Za-z0-9]", "", t)[:length].upper() for t in titles}
        if len(set(short.values())) == len(titles):
            return short
    return {t: f"S{i}" for i, t in enumerate(titles, start=1)}


def _write(kind: str, name: str, folder: Path, values: dict[str, str]) -> tuple[Path, Path]:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"'{name}' cannot name a {kind}; use lower-case letters, digits and _, beginning with "
            "a letter."
        )
    if name in sys.stdlib_module_names:
        raise ConfigError(
            f"{name}.py would hide a module of Python of that name; choose another name."
        )
    for entry in Registry(kind).entries():
        if entry.name == name:
            raise ConfigError(
                f"A {kind} '{name}' is there already (from {entry.origin}); choose another name."
            )
    file = folder / f"{name}.py"
    test = folder / f"test_{name}.py"
    for path in (file, test):
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another name or --out directory.")
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(Template(text).substitute(values), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); choose another --out directory."
        ) from error
    return file, test
