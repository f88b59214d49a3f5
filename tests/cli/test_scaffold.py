"""scaffold.py: generated files pass their checks, and nothing is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glua_bench.cli import scaffold
from glua_bench.conformance import METHOD_CHECKS, run_checks
from glua_bench.errors import ConfigError, RunFailure
from glua_bench.registry import Registry

STRUCTURES = {"liver": (1,), "left kidney": (3,), "left lung": (9,)}


def run_tests(test: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", test.name, *options],
        cwd=test.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_new_method_passes_every_check(tmp_path: Path) -> None:
    file, test = scaffold.new_method("my_method", tmp_path / "deep" / "er")
    assert [file.name, test.name] == ["my_method.py", "test_my_method.py"]
    entry = Registry("method", [file]).entry("my_method")
    assert entry.target == "MyMethod" and entry.attributes["needs"] and entry.summary
    results = run_checks("my_method", plugins=[file])
    assert len(results) == len(METHOD_CHECKS)
    assert not [f"{r.check}: {r.message}" for r in results if not r.passed]


def test_the_new_methods_test_can_pass_and_fail(tmp_path: Path) -> None:
    file, test = scaffold.new_method("my_method", tmp_path)
    only = ("-k", "card or logits")
    done = run_tests(test, *only)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    file.write_text(file.read_text().replace(".logits\n", ".logits[:, 1:]\n"))
    done = run_tests(test, *only)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


def test_a_new_dataset_passes_every_check(write_livers, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, test = scaffold.new_dataset("livers", tmp_path, ("ct", "mr"), STRUCTURES)
    text = file.read_text()
    assert text.count("Structure(") == 3
    write_livers(tmp_path / "data" / "livers")
    done = run_tests(
        test, GLUA_BENCH_DATA=str(tmp_path / "data"), GLUA_BENCH_CACHE=str(tmp_path / "cache")
    )
    # The files show the liver alone, and hold 9 in a corner.
    assert done.returncode == 1 and "no training case of 'ct' shows LEFTK" in done.stdout
    lines = [line for line in text.splitlines() if '"left ' not in line]
    kept_text = "\n".join(lines).replace("row_axis=1)", "row_axis=1, ignored_values=(9,))")
    file.write_text(kept_text)
    done = run_tests(
        test, GLUA_BENCH_DATA=str(tmp_path / "data"), GLUA_BENCH_CACHE=str(tmp_path / "cache")
    )
    assert done.returncode == 0, done.stdout


def test_structures_have_names_and_colours_of_their_own(tmp_path: Path) -> None:
    text = ",".join(f"organ of type {n}={n}" for n in range(1, 8))
    file, _ = scaffold.new_dataset("organs", tmp_path, ("a", "b"), scaffold.parse_structures(text))
    found = Registry("dataset", [file]).load("organs").structures
    assert len({s.name for s in found}) == len({s.color for s in found}) == 7
    assert [s.values for s in found] == [(n,) for n in range(1, 8)]


def test_structures_merge_label_values(tmp_path: Path) -> None:
    parsed = scaffold.parse_structures("tumour=1,2, 3,liver = 4")
    assert parsed == {"tumour": (1, 2, 3), "liver": (4,)}
    assert scaffold.written_structures(parsed) == "tumour=1,2,3,liver=4"
    assert scaffold.parse_structures(scaffold.written_structures(parsed)) == parsed
    file, _ = scaffold.new_dataset("organs", tmp_path, ("a", "b"), parsed)
    found = Registry("dataset", [file]).load("organs").structures
    assert [s.values for s in found] == [(1, 2, 3), (4,)]
    with pytest.raises(ConfigError, match="set unannotated_values in the reading"):
        scaffold.new_dataset("others", tmp_path, ("a", "b"), {**parsed, "unannotated": (9,)})


def test_structures_are_called_as_people_call_them(tmp_path: Path) -> None:
    """Titles may have other letters, brackets and quotes; values may be -1."""
    parsed = scaffold.parse_structures('Gef\u00e4\u00df (links)=1,2nd "rib"=2,\u813e=3,tumour=-1,4')
    assert list(parsed.values()) == [(1,), (2,), (3,), (-1, 4)]
    assert scaffold.parse_structures(scaffold.written_structures(parsed)) == parsed
    file, _ = scaffold.new_dataset("organs", tmp_path, ("a", "b"), parsed)
    found = Registry("dataset", [file]).load("organs").structures
    assert [s.title for s in found] == list(parsed) and len({s.name for s in found}) == 4
    assert all(s.name for s in found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My-Method", "not a valid name for a method"),
        ("class", "not a valid name for a method"),
        ("random", "would hide a module of Python's"),
        ("glua", "exists already (from glua-bench)"),
        ("taken", "taken.py exists already"),
    ],
)
def test_names_that_cannot_be_used_are_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "taken.py").write_text("mine")
    with pytest.raises(ConfigError) as error:
        scaffold.new_method(name, tmp_path)
    assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.py"]
    assert (tmp_path / "taken.py").read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "liver",
        "2,liver=1",
        "a=1,2,1",
        "a=1,b=2,1",
        "a=1,x,2",
        "a=1,=2",
        "liver=x",
        "=1",
        "liver=1,liver=2",
        "a=1,b=1",
        "a=0",
        "1=2",
        "a\tb=1",
        "a=--1",
        "",
    ],
)
def test_structures_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--structures"):
        scaffold.parse_structures(text)


@pytest.mark.parametrize("domains", [("ct", "ct"), ("CT", "mr"), ("ct-a", "mr")])
def test_domains_that_cannot_be_used_are_refused(domains: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--domains"):
        scaffold.new_dataset("livers", tmp_path, domains, {"liver": (1,)})


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="choose another directory with --out"):
        scaffold.new_method("my_method", tmp_path / "file" / "folder")
