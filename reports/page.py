"""A page of tables and charts: its parts, the files beside it, and how it becomes one file.

The page holds everything that it shows and needs no network. Every table and every chart of it
also lies beside it, for papers and slides.
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glua_bench import __version__
from glua_bench.files import storing, write_text
from glua_bench.reports import charts, tables
from glua_bench.reports.tables import Table


@dataclass
class Section:
    """A part of the page.

    Args:
        id: its anchor.
        title: its heading.
        intro: what is in it, a sentence or two.
        blocks: tables and drawings, in order.
        warning: what a reader must know before it; "" for nothing.
        command: what a reader may copy; "" for nothing.
    """

    id: str
    title: str
    intro: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    warning: str = ""
    command: str = ""


def make_folders(out: Path) -> None:
    """The directories of a page.

    Raises:
        RunFailure: they cannot be made.
    """
    with storing(out, "--out"):
        for folder in (out, out / "tables", out / "figures"):
            folder.mkdir(parents=True, exist_ok=True)


class PageWriter:
    """Writes tables, charts and pictures, and gives what the page shows of them.

    Args:
        out: the page's directory, with `tables` and `figures`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.files: list[Path] = []
        self._stems: set[Path] = set()

    def stem(self, folder: str, name: str) -> Path:
        """A path without ending for a name, which no other file of the page has."""
        stem, number = self.out / folder / file_name(name), 1
        while stem in self._stems:
            number += 1
            stem = stem.with_name(f"{file_name(name)}-{number}")
        self._stems.add(stem)
        return stem

    def table(self, table: Table) -> dict[str, Any]:
        """Write a table in all its forms."""
        stem = self.stem("tables", table.name)
        for suffix, text in (
            (".tex", tables.latex(table)),
            (".md", tables.markdown(table)),
            (".csv", table.frame().to_csv(index=False)),
        ):
            path = stem.with_name(stem.name + suffix)
            write_text(path, text, "--out")
            self.files.append(path)
        return {"kind": "table", "table": table, "name": stem.name}

    def chart(self, name: str, caption: str, figure: Any) -> dict[str, Any]:
        """Write a chart, and give its lines to the page."""
        stem = self.stem("figures", name)
        written = charts.files(figure, stem)
        self.files += written
        return {
            "kind": "chart",
            "name": stem.name,
            "caption": caption,
            "svg": _inline(written[0].read_text(encoding="utf-8")),
        }

    def picture(self, path: Path, caption: str) -> dict[str, Any]:
        """A PNG for the page."""
        data = base64.b64encode(path.read_bytes()).decode()
        return {"kind": "picture", "data": data, "caption": caption}


def render(template: str, **values: Any) -> str:
    """A page from its template in `templates/`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glua_bench.reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sortable"] = _sortable
    return environment.get_template(template).render(version=__version__, **values)


def _sortable(table: Table, row: int, column: int) -> str:
    """What a column is sorted by."""
    value = table.columns[column].values[row]
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else repr(float(value))


def _inline(svg: str) -> str:
    """A chart's lines for the page: without the file's head, in the page's own colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    for colour, name in ((charts.INK, "ink"), (charts.FAINT, "faint"), (charts.LINE, "line")):
        svg = svg.replace(colour, f"var(--{name})")
    # The page decides the size; the drawing keeps its shape.
    head, _, rest = svg.partition(">")
    width = re.search(r'width="([\d.]+)pt"', head)
    head = re.sub(r' (?:width|height)="[\d.]+pt"', "", head)
    points = float(width[1]) if width else 600.0
    return f'{head} style="width:{points * 4 / 3:.0f}px" role="img">{rest}'


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "unnamed"


def slug(text: str) -> str:
    """A name that may be an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
