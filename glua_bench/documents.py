"""Read YAML files written by users; errors name the file, the line and the closest known name.

A `Table` is a mapping of such a file. Values are read by name and type, and `finish` rejects keys
that were not read.

Scalars follow YAML 1.2, here and in `load`: 1e-4 is a number, 010 is ten, and no, on, 1:30 and
2026-01-02 are strings. Integers may also be written as 1e4 and 1_000.

Documents are bounded in size, depth and number of values, aliases counted as often as they are
used, so that none takes much time or memory. `load_json` bounds JSON likewise.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from glua_bench.errors import ConfigError, shortened
from glua_bench.paths import composed

SUFFIXES = (".yaml", ".yml")
MOST_BYTES = 4 << 20  # of a YAML file; a line per case and file takes less than 1 MiB
MOST_VALUES = 200_000  # of a YAML file, with aliases
DEEPEST = 50  # nested lists and mappings
_KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping of names to values",
}
_MISSING = object()
_TAG = "tag:yaml.org,2002:"
# Tag, pattern of an unquoted scalar, and its possible first characters; the first match wins.
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
# Booleans of YAML 1.1, which are accepted only where a boolean is expected.
WORDS = {"yes": True, "on": True, "no": False, "off": False}


def _integer(loader: Any, node: yaml.ScalarNode) -> int:
    """Construct an integer; leading zeros are ignored."""
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if text.startswith(("0x", "0o")):
        return int(text, 0)
    digits, _, power = text.partition("e")
    return int(digits, 10) * 10 ** int(power or 0)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and positions for error messages."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, unless it is nested too deeply."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise _too_deep(self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same with libyaml where available, which is ten times faster."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes strings that any loader could take for another type."""


for _loader in (_Loader, _FastLoader, _Dumper):
    for _tag, _form, _first in _SCALARS:
        _loader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"(?:{_form})$"), _first)
for _loader in (_Loader, _FastLoader):
    _loader.add_constructor(f"{_TAG}int", _integer)


def load(text: str) -> Any:
    """Parse a YAML text into plain Python values.

    Raises:
        yaml.YAMLError: the text is not valid YAML, has tags of other types, or is too large.
        ValueError: a number has too many digits.
    """
    loader = _FastLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def load_json(text: str) -> Any:
    """Parse a JSON text into plain Python values.

    Raises:
        ValueError: the text is not valid JSON, or is nested too deeply.
    """
    if text.count("[") + text.count("{") > DEEPEST:
        depth = 0
        for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if depth > DEEPEST:
                raise json.JSONDecodeError(_TOO_DEEP, text, match.start())
    return json.loads(text)


_TOO_DEEP = f"lists and mappings are nested more than {DEEPEST} deep"


def _too_deep(mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=mark)


def _check_size(root: yaml.Node) -> None:
    """Raise if a document has too many values or is nested too deeply, with aliases replaced.

    Raises:
        yaml.MarkedYAMLError: it is too large.
    """
    known: dict[int, tuple[int, int]] = {}  # node → values and depth
    begun: set[int] = set()
    waiting: list[tuple[yaml.Node, list[yaml.Node] | None]] = [(root, None)]
    while waiting:
        node, inner = waiting.pop()
        if inner is None:
            if id(node) in known:
                continue
            problem = "an alias is used inside its own value" if id(node) in begun else ""
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            inner = []
            if isinstance(node, yaml.MappingNode):
                inner = [each for pair in node.value for each in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner = list(node.value)
            begun.add(id(node))
            waiting.append((node, inner))
            waiting += [(each, None) for each in inner]
            continue
        begun.remove(id(node))
        sizes = [known[id(each)] for each in inner]
        values = 1 + sum(size for size, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        known[id(node)] = values, depth
        if values > MOST_VALUES:
            problem = f"there are more than {MOST_VALUES} values, with aliases"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if depth > DEEPEST:
            raise _too_deep(node.start_mark)


def dump(value: Any) -> str:
    """Format plain values as YAML that `load` can parse, keeping their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def dump_line(value: Any) -> str:
    """Format plain values as YAML in one line, with quoted strings."""
    quotes = '"' if isinstance(value, str) else None
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, default_style=quotes, width=math.inf
    )
    return str(text).removesuffix("...\n").strip()


class Table:
    """A mapping in a user's YAML file.

    Args:
        file: path of the document, for error messages.
        node: the mapping.
        title: name of the mapping in error messages; "" for the whole document.

    Raises:
        ConfigError: the node is not a mapping, or has duplicate keys.
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
        """Return the keys in the order of the file."""
        return list(self._nodes)

    def take(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """Read a value.

        Args:
            name: the key.
            kind: str, int, float, bool, list, or object for any type. An integer is accepted as
                float, any scalar as str in the spelling of the file (007, no), and yes, no, on,
                off as bool.
            default: used if the value is missing or empty; without it the value is required.

        Raises:
            ConfigError: the value is missing or has another type.
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
            raise self.error(
                f"'{name}' must be {_KINDS[kind]}, not {shortened(repr(value), 200)}", node
            )
        return value

    def texts(self, name: str, default: Any = _MISSING) -> list[str]:
        """Read a list of scalars as strings in the spelling of the file (007 stays 007).

        Raises:
            ConfigError: the value is missing or is not such a list.
        """
        self.take(name, list, default)
        node = self._nodes.get(name)
        if not isinstance(node, yaml.SequenceNode):
            return list(default)
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise self.error(f"'{name}' must be a list of names", node)
        return [str(item.value) for item in node.value]

    def numbers(self, name: str, count: int, default: Any = _MISSING) -> Any:
        """Read a list of `count` numbers as a tuple of float.

        Raises:
            ConfigError: the value is missing or is not such a list.
        """
        values = self.take(name, list, default)
        if values is default:
            return default
        numeric = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(values) != count or len(numeric) != count:
            raise self.error(
                f"'{name}' must be a list of {count} numbers, not {shortened(str(values), 200)}",
                name,
            )
        return tuple(float(value) for value in values)

    def table(self, name: str) -> Table | None:
        """Read a mapping; None if it is missing or empty.

        Raises:
            ConfigError: the value is not a mapping.
        """
        self._taken.add(name)
        node = self._nodes.get(name)
        if node is None or self._plain(node) is None:
            return None
        return Table(self.file, node, f"'{name}'{self._inside()}")

    def tables(self, name: str) -> Iterator[tuple[str, Table]]:
        """Iterate over a mapping of mappings, e.g. one per domain.

        Raises:
            ConfigError: the value is missing or is not such a mapping.
        """
        inner = self.table(name)
        if inner is None:
            raise self.error(f"'{name}' is missing{self._inside()}; add it")
        for key, node in inner._nodes.items():
            yield key, Table(self.file, node, f"'{key}'{inner._inside()}")

    def items(self, name: str) -> Iterator[Table]:
        """Iterate over a list of mappings.

        Raises:
            ConfigError: the value is missing or is not such a list.
        """
        self.take(name, list)
        node = self._nodes[name]
        for number, item in enumerate(node.value, 1):
            yield Table(self.file, item, f"item {number} of '{name}'{self._inside()}")

    def choice(self, name: str, among: Sequence[str], default: Any = _MISSING) -> str:
        """Read one of several allowed strings.

        Raises:
            ConfigError: the value is missing or not allowed; the closest match is suggested.
        """
        value = self.take(name, str, default)
        if value not in among:
            raise self.error(f"'{name}' cannot be '{value}'; {nearest(value, among)}", name)
        return str(value)

    def finish(self) -> None:
        """Reject keys that were not read.

        Raises:
            ConfigError: a key is unknown; the closest match is suggested.
        """
        for name in self._nodes:
            if name not in self._taken:
                hint = nearest(name, sorted(self._taken))
                raise self.error(f"unknown '{name}'{self._inside()}; {hint}", name)

    def put(self, name: str, value: str) -> None:
        """Set a key to a string, or add it."""
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value)
        if name in self._nodes:
            pairs = [(key, node if key.value == name else old) for key, old in self.node.value]
        else:
            pairs = [*self.node.value, (yaml.ScalarNode(node.tag, name), node)]
        self.node.value[:] = pairs
        self._nodes[name] = node

    def text(self) -> str:
        """Format the mapping as YAML in the original spelling, without comments and layout."""
        return yaml.serialize(self.node, Dumper=yaml.SafeDumper, allow_unicode=True)

    def error(self, text: str, place: yaml.Node | str | None = None) -> ConfigError:
        """Return an error with the file and the line.

        Args:
            text: the problem and its fix, without the final period.
            place: a key of this table, or a node; None is the table itself.
        """
        end = "" if text.endswith("?") else "."
        return ConfigError(f"{self.where(place)}: {text}{end}")

    def where(self, place: yaml.Node | str | None = None) -> str:
        """Return file and line of a key of this table or of a node; None is the table itself."""
        node = self._keys.get(place) if isinstance(place, str) else place
        return f"{self.file}, line {(node or self.node).start_mark.line + 1}"

    def _plain(self, node: yaml.Node) -> Any:
        """Return the Python value of a node."""
        loader = _Loader("")
        try:
            return loader.construct_document(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.error("the value cannot be parsed; quote it", node) from error
        finally:
            loader.dispose()

    def _inside(self) -> str:
        return f" in {self.title}" if self.title else ""


def read_document(file: Path) -> Table:
    """Read a user's YAML file.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{file} has more than {MOST_BYTES >> 20} MiB, too much for a YAML file of "
                "settings: give another file."
            )
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
        if node is not None:
            _check_size(node)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not encoded in UTF-8: save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "invalid YAML"
        raise ConfigError(f"{file}{where}: {problem}; correct the file.") from error
    if node is None:
        raise ConfigError(f"{file} is empty: add a description.")
    return Table(file, node)


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return a hint for an unknown name: the closest known name, and all known names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    names = ", ".join(known) or "none"
    return f"did you mean '{prefix}{near[0]}'? Known: {names}" if near else f"known: {names}"
