"""YAML files that users write: every complaint names the file, the line and the nearest name.

A `Table` is a mapping of such a file. Values are taken from it by name and type; what nobody takes
is unknown, and `finish` says so.

Scalars mean what YAML 1.2 says, here and in `load`, which reads every other YAML text: 1e-4 is a
number, 010 is ten, and no, on, 1:30 and 2026-01-02 are texts. Whole numbers may be written as 1e4
and 1_000.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from glua_bench.errors import ConfigError
from glua_bench.paths import composed

SUFFIXES = (".yaml", ".yml")
_KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table of names and values",
}
_MISSING = object()
_TAG = "tag:yaml.org,2002:"
# Tag, form of a scalar without quotes, and the signs that it may begin with; the first form counts.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    (
        "int",
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?[0-9]{1,3}(_[0-9]{3})+"
        r"|[-+]?[0-9]{1,18}[eE]\+?[0-9]{1,2}",
        tuple("-+0123456789"),
    ),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
    ("merge", r"<<", ("<",)),
)
# What YAML 1.1 took for true and false; a text, unless one of them is asked for.
WORDS = {"yes": True, "on": True, "no": False, "off": False}


def _whole(loader: Any, node: yaml.ScalarNode) -> int:
    """A whole number; a leading zero means nothing."""
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if text.startswith(("0x", "0o")):
        return int(text, 0)
    digits, _, power = text.partition("e")
    return int(digits, 10) * 10 ** int(power or 0)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the scalars of YAML 1.2; its places serve for messages."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, where PyYAML was built with it: ten times faster."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what this or another reader would take for no text."""


for _loader in (_Loader, _FastLoader, _Dumper):
    for _tag, _form, _first in _SCALARS:
        _loader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"(?:{_form})$"), _first)
for _loader in (_Loader, _FastLoader):
    _loader.add_constructor(f"{_TAG}int", _whole)


def load(text: str) -> Any:
    """What a YAML text says; every YAML text that is read in one go goes through here.

    Raises:
        yaml.YAMLError: it is no YAML, or of types that are not plain.
        ValueError: a number has too many digits.
    """
    return yaml.load(text, Loader=_FastLoader)


def dump(value: Any) -> str:
    """Plain values as YAML, in their own order; `load` gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def dump_line(value: Any) -> str:
    """The same in one line, texts in quotes."""
    quotes = '"' if isinstance(value, str) else None
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, default_style=quotes, width=math.inf
    )
    return str(text).removesuffix("...\n").strip()


class Table:
    """One mapping of a user's YAML file.

    Args:
        file: of the document, for messages.
        node: the mapping's place in it.
        title: what the mapping is called in messages; "" for the whole document.

    Raises:
        ConfigError: the node is no mapping, or names something twice.
    """

    def __init__(self, file: Path, node: yaml.Node, title: str = "") -> None:
        self.file, self.node, self.title = file, node, title
        if not isinstance(node, yaml.MappingNode):
            raise self.error(f"{title or 'the file'} must be {_KINDS[dict]}, such as 'name: value'")
        self._keys: dict[str, yaml.Node] = {}
        self._nodes: dict[str, yaml.Node] = {}
        self._taken: set[str] = set()
        for key, value in node.value:
            name = composed(str(key.value))
            if name in self._nodes:
                raise self.error(f"'{name}' is given twice; keep one", key)
            self._keys[name], self._nodes[name] = key, value

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def names(self) -> list[str]:
        """The mapping's keys, in the file's order."""
        return list(self._nodes)

    def take(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """A value by its name.

        Args:
            name: the key.
            kind: str, int, float, bool, list, or object for any. Whole numbers serve as float, any
                single value as a text as it is written (007, no), and yes, no, on, off as bool.
            default: what stands for a missing or empty value; without it the value is required.

        Raises:
            ConfigError: the value is missing, or of another type.
        """
        self._taken.add(name)
        node = self._nodes.get(name)
        value = None if node is None else self._plain(node)
        if value is None:
            if default is _MISSING:
                rest = [key for key in self._nodes if key not in self._taken]
                for near in difflib.get_close_matches(name, rest, n=1, cutoff=0.6):
                    raise self.error(
                        f"unknown '{near}'{self._inside()}; did you mean '{name}'?", near
                    )
                raise self.error(f"'{name}' is missing{self._inside()}; add it")
            return default
        if kind is str and isinstance(node, yaml.ScalarNode):
            return str(node.value)
        if kind is bool and isinstance(value, str):
            value = WORDS.get(value.lower(), value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 10**300 else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise self.error(f"'{name}' must be {_KINDS[kind]}, not {value!r}", node)
        return value

    def texts(self, name: str, default: Any = _MISSING) -> list[str]:
        """A list of names or numbers as texts, as they are written (007 stays 007).

        Raises:
            ConfigError: the value is missing or not such a list.
        """
        self.take(name, list, default)
        node = self._nodes.get(name)
        if not isinstance(node, yaml.SequenceNode):
            return list(default)
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise self.error(f"'{name}' must be a list of names", node)
        return [str(item.value) for item in node.value]

    def numbers(self, name: str, count: int, default: Any = _MISSING) -> Any:
        """A list of `count` numbers, as a tuple of float.

        Raises:
            ConfigError: the value is missing or not such a list.
        """
        values = self.take(name, list, default)
        if values is default:
            return default
        numeric = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(values) != count or len(numeric) != count:
            raise self.error(f"'{name}' must be a list of {count} numbers, not {values}", name)
        return tuple(float(value) for value in values)

    def table(self, name: str) -> Table | None:
        """The mapping under a name; None where there is none.

        Raises:
            ConfigError: the value is no mapping.
        """
        self._taken.add(name)
        node = self._nodes.get(name)
        if node is None or self._plain(node) is None:
            return None
        return Table(self.file, node, f"'{name}'{self._inside()}")

    def tables(self, name: str) -> Iterator[tuple[str, Table]]:
        """The mappings under the names of a mapping, e.g. one for each domain.

        Raises:
            ConfigError: the value is missing or has another form.
        """
        inner = self.table(name)
        if inner is None:
            raise self.error(f"'{name}' is missing{self._inside()}; add it")
        for key, node in inner._nodes.items():
            yield key, Table(self.file, node, f"'{key}'{inner._inside()}")

    def choice(self, name: str, among: Sequence[str], default: Any = _MISSING) -> str:
        """One of a few words.

        Raises:
            ConfigError: the value is missing or another one; the nearest is named.
        """
        value = self.take(name, str, default)
        if value not in among:
            raise self.error(f"'{name}' cannot be '{value}'; {nearest(value, among)}", name)
        return str(value)

    def finish(self) -> None:
        """Refuse what nobody has taken.

        Raises:
            ConfigError: a key is unknown; the nearest known one is named.
        """
        for name in self._nodes:
            if name not in self._taken:
                hint = nearest(name, sorted(self._taken))
                raise self.error(f"unknown '{name}'{self._inside()}; {hint}", name)

    def put(self, name: str, value: str) -> None:
        """Give a key another text, or add it. `text` writes it."""
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value)
        if name in self._nodes:
            pairs = [(key, node if key.value == name else old) for key, old in self.node.value]
        else:
            pairs = [*self.node.value, (yaml.ScalarNode(node.tag, name), node)]
        self.node.value[:] = pairs
        self._nodes[name] = node

    def text(self) -> str:
        """The mapping as YAML, values as they were written; comments and layout are lost."""
        return yaml.serialize(self.node, Dumper=yaml.SafeDumper, allow_unicode=True)

    def error(self, text: str, place: yaml.Node | str | None = None) -> ConfigError:
        """A complaint with the file and the line.

        Args:
            text: what is wrong and how it is repaired, without the final period.
            place: a key of this table, or a node; None takes the table itself.
        """
        end = "" if text.endswith("?") else "."
        return ConfigError(f"{self.where(place)}: {text}{end}")

    def where(self, place: yaml.Node | str | None = None) -> str:
        """The file and the line of a key of this table, or of a node; None takes the table."""
        node = self._keys.get(place) if isinstance(place, str) else place
        return f"{self.file}, line {(node or self.node).start_mark.line + 1}"

    def _plain(self, node: yaml.Node) -> Any:
        """The Python value of a node."""
        loader = _Loader("")
        try:
            return loader.construct_document(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.error("the value cannot be read; quote it", node) from error
        finally:
            loader.dispose()

    def _inside(self) -> str:
        return f" in {self.title}" if self.title else ""


def read_document(file: Path) -> Table:
    """The whole of a user's YAML file.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or is no mapping.
    """
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text in UTF-8: save it as such.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it is no YAML"
        raise ConfigError(f"{file}{where}: {problem}; repair the file.") from error
    if node is None:
        raise ConfigError(f"{file} is empty: write a description into it.")
    return Table(file, node)


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a wrong name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}known are {', '.join(known)}"
