"""docs/notebook.ipynb: it runs, and its stored outputs are what it prints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Execute the notebook in an empty directory, with a temporary profile of IPython."""
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures in the page
        client = nbclient.NotebookClient(
            book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    return book


def outputs(book: Any) -> list[list[dict[str, Any]]]:
    return [cell["outputs"] for cell in book.cells if cell.cell_type == "code"]


def kinds(found: list[dict[str, Any]]) -> set[str]:
    """Return types of data of the outputs of a cell, and names of streams."""
    each = [set(one.get("data", {})) | {one.get("name", "")} for one in found]
    return set().union(*each) - {""}


def test_the_stored_outputs_are_of_the_kind_that_it_has(executed: Any) -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    assert [kinds(o) for o in outputs(stored)] == [kinds(o) for o in outputs(executed)]
    shown = [kind for found in outputs(stored) for kind in kinds(found)]
    assert {"text/html", "image/png", "stdout"} <= set(shown) and "stderr" not in shown


def test_progress_is_plain_lines(executed: Any) -> None:
    lines = "".join(o.get("text", "") for found in outputs(executed) for o in found)
    assert "segment: 60 steps" in lines and "\x1b" not in lines


def test_the_stored_notebook_is_small_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert not re.search(r"/(home|root|work|tmp|Users)/|[A-Z]:\\\\", text)
    assert os.environ.get("HOSTNAME", "no host name") not in text
