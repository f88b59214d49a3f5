"""documents.py: a user's YAML file is read as it is written, and its mistakes are found by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glua_bench.documents import Table, read_document
from glua_bench.errors import ConfigError


@pytest.fixture
def document(tmp_path: Path) -> Callable[[str], Table]:
    def write(text: str) -> Table:
        file = tmp_path / "own.yaml"
        file.write_text(text, encoding="utf-8")
        return read_document(file)

    return write


def test_values_are_taken_by_name_and_type(document: Callable[[str], Table]) -> None:
    table = document(
        "name: heart\nsize: 3\nshare: 1\nfull: true\nids: [007, a, 1.50]\nwindow: [-125, 275.5]\n"
        "empty:\ninner: {one: {x: 1}, two: {x: 2}}\n"
    )
    assert table.take("name", str) == "heart" and table.take("size", int) == 3
    share = table.take("share", float)
    assert share == 1.0 and isinstance(share, float)
    assert table.take("full", bool) is True
    assert table.texts("ids") == ["007", "a", "1.50"]
    assert table.numbers("window", 2) == (-125.0, 275.5)
    assert table.take("empty", str, "nothing") == "nothing" == table.take("no", str, "nothing")
    assert table.texts("no", []) == [] and table.numbers("no", 2, None) is None
    assert [(name, part.take("x", int)) for name, part in table.tables("inner")] == [
        ("one", 1),
        ("two", 2),
    ]
    assert table.table("no") is None
    table.finish()


@pytest.mark.parametrize(
    ("text", "ask", "said"),
    [
        ("a: 1\nname: [x]\n", lambda t: t.take("name", str), "line 2: 'name' must be text, not"),
        ("a: true\n", lambda t: t.take("a", int), "'a' must be a whole number, not True."),
        ("a: 1.5\n", lambda t: t.take("a", int), "'a' must be a whole number, not 1.5."),
        ("a: 1\n", lambda t: t.take("name", str), "line 1: 'name' is missing; add it."),
        ("\n\na: 1\na: 2\n", lambda t: t, "line 4: 'a' is given twice; keep one."),
        ("- a\n", lambda t: t, "line 1: the file must be a table of names and values"),
        ("a: {b: [1, 2\n", lambda t: t, "line 2: expected ',' or ']', but got"),
        (
            "a: !!python/object:os.system x\n",
            lambda t: t.take("a", str),
            "line 1: the value cannot be read; quote it.",
        ),
        ("a: 2026-13-41\n", lambda t: t.take("a", str), "the value cannot be read; quote it."),
        ("", lambda t: t, "is empty: write a description into it."),
        ("w: [1, x]\n", lambda t: t.numbers("w", 2), "'w' must be a list of 2 numbers, not"),
        ("w: [1]\n", lambda t: t.numbers("w", 2), "'w' must be a list of 2 numbers, not [1]."),
        ("w: [[1]]\n", lambda t: t.texts("w"), "'w' must be a list of names."),
        ("w: 3\n", lambda t: t.texts("w"), "'w' must be a list, not 3."),
        (
            "plane: axal\n",
            lambda t: t.choice("plane", ["axial", "coronal"]),
            "'plane' cannot be 'axal'; did you mean 'axial'? known are axial, coronal.",
        ),
        ("in:\n  b: 1\n", lambda t: t.table("in").take("c", int), "'c' is missing in 'in'; add"),
        ("in: 3\n", lambda t: t.table("in"), "line 1: 'in' must be a table of names and values"),
        ("a: 1\n", lambda t: list(t.tables("in")), "'in' is missing; add it."),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(
    document: Callable[[str], Table], text: str, ask: Callable[[Table], object], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        ask(document(text))
    message = str(error.value)
    assert said in message and "own.yaml" in message
    assert message.endswith(".") and "\n" not in message


def test_an_unknown_name_is_told_with_the_nearest(document: Callable[[str], Table]) -> None:
    table = document("name: x\nplain: axial\n")
    table.take("name", str)
    table.take("plane", str, "axial")
    with pytest.raises(ConfigError, match="line 2: unknown 'plain'; did you mean 'plane'\\? known"):
        table.finish()


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        read_document(tmp_path / "latin.yaml")
