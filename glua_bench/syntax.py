"""Code as it counts in a run's id: the same text for the same code, on every version of Python."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from typing import Any

# An import in a file: its level (0 is absolute), the module, and the names taken from it.
Import = tuple[int, str, tuple[str, ...]]

_SILENT = ("ctx", "kind", "type_comment")  # fields that say nothing, or that layout decides
_EMPTY: tuple[Any, ...] = (None, [])  # what older versions of Python leave out, or newer ones
_IMPORTING = (ast.Import, ast.ImportFrom, ast.Call)


def normal_form(source: bytes) -> tuple[str, tuple[Import, ...]]:
    """A text that is the same for the same code, and the imports in it.

    It is a listing of the syntax tree without positions, comments, docstrings and other lone
    strings, and `pass`. Python's own listings differ between its versions (fields that came later,
    defaults, printable characters, parts of f-strings), so it is written here such that they do
    not show.

    Raises:
        SyntaxError: the source is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings, which whoever imports it is told
        tree = ast.parse(source)
    text: list[str] = []
    imports: list[Import] = []
    stack: list[Any] = [tree]  # nodes, lists of them, and texts; no recursion, for long sums
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text.append(item)
        elif isinstance(item, list):
            stack.append("]")
            stack += [_item(value) for value in reversed(item) if not _idle(value)]
            text.append("[")
        else:
            kind = type(item)
            if kind in _IMPORTING:
                imports += _imports(item)
            elif kind is ast.JoinedStr:
                item = ast.JoinedStr(_joined(item.values))
            stack.append(")")
            for name in reversed(item._fields):
                value = getattr(item, name, None)
                if name not in _SILENT and value not in _EMPTY:
                    stack += (_item(value), name)
            text.append(f"{kind.__name__}(")
    return " ".join(text), tuple(imports)


def _item(value: Any) -> Any:
    """A node or a list as it is; what has no parts, as text that no version of Python changes."""
    kind = type(value)
    if kind is ast.Name:
        return f"Name({ascii(value.id)})"
    if kind in (ast.Constant, ast.MatchSingleton):
        return f"{kind.__name__}({_item(value.value)})"
    if isinstance(value, (ast.AST, list)):
        return value
    if kind is int:  # decimal digits are limited in number
        return hex(value)
    return f"{kind.__name__}:{ascii(value)}"


def _idle(value: Any) -> bool:
    """Whether a statement does nothing: a docstring, another lone string, or `pass`."""
    return isinstance(value, ast.Pass) or (
        isinstance(value, ast.Expr)
        and isinstance(value.value, ast.Constant)
        and isinstance(value.value.value, str)
    )


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, those that are plain text as few as can be."""
    parts: list[ast.expr] = []
    for value in values:
        if not isinstance(value, ast.Constant):
            parts.append(value)
        elif parts and isinstance(parts[-1], ast.Constant):
            parts[-1] = ast.Constant(str(parts[-1].value) + str(value.value))
        elif value.value:
            parts.append(value)
    return parts


def _imports(node: ast.AST) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield 0, alias.name, ()
    elif isinstance(node, ast.ImportFrom):
        yield node.level, node.module or "", tuple(alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        given = node.args[0].value
        if name in ("import_module", "__import__") and isinstance(given, str) and given:
            module = given.lstrip(".")
            yield len(given) - len(module), module, ()
