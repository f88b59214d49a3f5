"""tests/support/faults.py: the table of attacks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ATTACKS = '''
import pytest

@pytest.mark.fault("damage", "a bit is flipped")
def test_held(tries):
    assert [*tries(20)] == [*range(20)]

@pytest.mark.fault("damage", "a file is cut")
@pytest.mark.parametrize("size", [0, 1, 2])
def test_held_in_part(size):
    assert size != 1

@pytest.mark.fault("damage", "a file is gone")
def test_broke(tries):
    for n in tries(5):
        assert n != 4

@pytest.mark.fault("hostile", "a server that never starts")
def test_without_server(broken):
    """Its fixture fails."""

@pytest.mark.fault("hostile", "what is skipped counts as not tried")
def test_skipped():
    pytest.skip()

def test_no_attack():
    """Deselected."""

@pytest.fixture
def broken():
    raise OSError
'''


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_the_table_counts_what_was_tried_and_what_held(
    pytester: pytest.Pytester, workers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLUA_BENCH_FAULTS", raising=False)
    support = Path(__file__).parent / "support"
    pytester.makeconftest(
        f"import sys; sys.path.insert(0, {str(support)!r})\n"
        "from faults import pytest_collection_modifyitems, pytest_terminal_summary, tries\n"
    )
    pytester.makepyfile(ATTACKS)
    marker = ["-o", "markers=fault(kind, attack)", "-p", "no:cacheprovider"]
    text = "\n".join(pytester.runpytest("-m", "fault", *marker, *workers).outlines)
    rows = [line.split("  ") for line in text.split(" faults =")[1].splitlines()[1:]]
    found = {tuple(cell.strip() for cell in row if cell.strip()) for row in rows}
    assert {
        ("kind", "attack", "tried", "held"),
        ("damage", "a bit is flipped", "20", "20"),
        ("damage", "a file is cut", "3", "2"),
        ("damage", "a file is gone", "5", "0"),
        ("hostile", "a server that never starts", "1", "0"),
        ("total", "29", "22"),
    } <= found
    assert "skipped counts" not in text.split(" faults =")[1]
    monkeypatch.setenv("GLUA_BENCH_FAULTS", "3")
    text = "\n".join(pytester.runpytest("-m", "fault", "-k", "broke", *marker).outlines)
    assert "15       0" in text
    monkeypatch.delenv("GLUA_BENCH_FAULTS")
    assert "faults =" not in "\n".join(pytester.runpytest(*marker).outlines)
