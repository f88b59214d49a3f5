"""documents.py: values keep their spelling and type, and errors name the line."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from glua_bench.documents import MOST_BYTES, Table, dump, load, load_json, read_document
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
        ("- a\n", lambda t: t, "line 1: the file must be a mapping of names to values"),
        ("a: {b: [1, 2\n", lambda t: t, "line 2: expected ',' or ']', but got"),
        (
            "a: !!python/object:os.system x\n",
            lambda t: t.take("a", str),
            "line 1: the value cannot be parsed; quote it.",
        ),
        ("a: !!int x\n", lambda t: t.take("a", int), "the value cannot be parsed; quote it."),
        ("a: 1:30\n", lambda t: t.take("a", int), "'a' must be a whole number, not '1:30'."),
        ("a: 1:30\n", lambda t: t.take("a", float), "'a' must be a number, not '1:30'."),
        ("a: no\n", lambda t: t.take("a", float), "'a' must be a number, not 'no'."),
        ("a: perhaps\n", lambda t: t.take("a", bool), "'a' must be true or false, not 'perhaps'."),
        ("a: 1e-4\n", lambda t: t.take("a", int), "'a' must be a whole number, not 0.0001."),
        (f"a: 1{'0' * 400}\n", lambda t: t.take("a", float), "'a' must be a number, not 1000"),
        (f"a: {'1' * 5000}\n", lambda t: t.take("a", int), "the value cannot be parsed; quote it."),
        ("a: [x]\n", lambda t: t.take("a", str), "'a' must be text, not ['x']."),
        ("", lambda t: t, "is empty: add a description."),
        ("w: [1, x]\n", lambda t: t.numbers("w", 2), "'w' must be a list of 2 numbers, not"),
        ("w: [1]\n", lambda t: t.numbers("w", 2), "'w' must be a list of 2 numbers, not [1]."),
        ("w: [[1]]\n", lambda t: t.texts("w"), "'w' must be a list of names."),
        ("w: 3\n", lambda t: t.texts("w"), "'w' must be a list, not 3."),
        (
            "plane: axal\n",
            lambda t: t.choice("plane", ["axial", "coronal"]),
            "'plane' cannot be 'axal'; did you mean 'axial'? Known: axial, coronal.",
        ),
        ("in:\n  b: 1\n", lambda t: t.table("in").take("c", int), "'c' is missing in 'in'; add"),
        ("in: 3\n", lambda t: t.table("in"), "line 1: 'in' must be a mapping of names to values"),
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
    with pytest.raises(ConfigError, match="line 2: unknown 'plain'; did you mean 'plane'\\? Known"):
        table.finish()


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not encoded in UTF-8"):
        read_document(tmp_path / "latin.yaml")


NUMBERS = {
    "1e-4": 1e-4,
    "1E-4": 1e-4,
    "-1e-4": -1e-4,
    "1.e-4": 1e-4,
    ".5": 0.5,
    "-.5e1": -5.0,
    "5.": 5.0,
    "1e4": 10_000,
    "2e+3": 2000,
    "1_000": 1000,
    "1_000_000": 1_000_000,
    "010": 10,
    "08": 8,
    "-0": 0,
    "0x1F": 31,
    "0o17": 15,
    "1e400": float("inf"),
    ".inf": float("inf"),
    "-.INF": float("-inf"),
}
TEXTS = [
    *("yes", "no", "on", "off", "y", "n", "Yes", "NO", "none", "1:30", "12:30:45", "2026-01-02"),
    *("2026-13-41", "1_0", "10_2", "1_00_000", "_1", "0b1", "1e", "1e+", "e4", ".", "+.", "--"),
    *("0x", "1.2.3", "nan", "inf", "007a", "1e-4x"),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_numbers(document: Callable[[str], Table], text: str, value: float) -> None:
    found = load(f"[{text}]")[0]
    assert found == value and type(found) is type(value)
    table = document(f"a: {text}\nlist: [{text}]\nname: {text}\n")
    assert table.take("a", float) == value
    assert table.take("list", list) == [value]
    assert type(value) is float or table.take("a", int) == value
    # Where a text is asked for, it is what is written.
    assert table.take("name", str) == text and table.texts("list") == [text]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_texts(document: Callable[[str], Table], text: str) -> None:
    assert load(text) == text and load(dump(text)) == text
    table = document(f"a: {text}\nlist: [{text}, b]\n{text}: 1\n")
    assert table.take("a", str) == text == table.take("a", object)
    assert table.texts("list") == [text, "b"] == table.take("list", list)
    assert table.names() == ["a", "list", text]


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("Off", False), ("TRUE", True)])
def test_a_switch_may_be_said_in_words(
    document: Callable[[str], Table], text: str, value: bool
) -> None:
    assert document(f"a: {text}\n").take("a", bool) is value
    assert document(f"a: {text}\n").take("a", str) == text


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=6)
        | st.sampled_from([*NUMBERS, *TEXTS]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    )
)
def test_what_is_dumped_is_loaded_again(value: object) -> None:
    """YAML 1.1 loaders also read strings as strings."""
    text = dump({"value": value})
    assert load(text) == {"value": value}
    if isinstance(value, str):
        assert yaml.safe_load(text) == {"value": value}


LAUGHS = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": ("a: &a [1, 2]\n" + LAUGHS, 6),
    "merges": ("a: &a {x: 1}\n" + LAUGHS.replace("[", "{<<: [").replace("]", "]}"), 6),
    "an alias of itself": ("a: 1\nb: &b [*b]\n", 2),
    "brackets": ("a: 1\nb: " + "[" * 20_000 + "]" * 20_000, 2),
    "braces": ("a: 1\nb: " + "{c: " * 5000 + "1" + "}" * 5000, 2),
    "indented lists": ("a: 1\nb:\n" + "- " * 900 + "1\n", 3),
    "indented mappings": ("a:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 300)), 50),
    "aliases of aliases": (
        "a: &a [1]\n" + "".join(f"b{n}: &b{n} [*{f'b{n - 1}' if n else 'a'}]\n" for n in range(80)),
        50,
    ),
    "keys": ("a: 1\n? " + "[" * 200 + "]" * 200 + "\n: 1\n", 2),
}


@pytest.mark.fault("hostile files", "YAML of many aliases or deep nesting")
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_one_sentence_with_their_line(kind: str, tmp_path: Path) -> None:
    text, line = BOMBS[kind]
    file = tmp_path / "own.yaml"
    file.write_text(text)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=f"own.yaml, line {line}: ") as error:
        read_document(file)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    with pytest.raises(yaml.YAMLError):
        load(text)
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.fault("hostile files", "YAML of many aliases or deep nesting")
def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    with file.open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"own\.yaml has more than 4 MiB"):
        read_document(file)


def test_aliases_and_merges_of_ordinary_size_are_read(document: Callable[[str], Table]) -> None:
    table = document("a: &a {x: 1, y: [2]}\nb: [*a, *a]\nc: {<<: *a, x: 3}\n")
    assert table.take("b", list) == [{"x": 1, "y": [2]}] * 2
    assert table.take("c", object) == {"x": 3, "y": [2]}


@pytest.mark.fault("hostile files", "deeply nested JSON")
def test_deep_json_is_told_with_its_line() -> None:
    for text in ("\n" + "[" * 100_000, '\n{"a": ' + '{"b": [' * 40 + "]}" * 40 + "}"):
        with pytest.raises(ValueError, match="nested more than 50 deep: line 2 column"):
            load_json(text)
    brackets = '{"a": "' + "[" * 100 + '", "b": [' + ", ".join(["[{}]"] * 100) + "]}"
    assert load_json(brackets) == json.loads(brackets)
