"""Pages of tables and charts.

A page is one file that works offline. Its tables and charts are also written beside it, for papers
and slides.
"""

from __future__ import annotations

import base64
import html
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glua_bench import __version__
from glua_bench.files import csv_text, storing, write_text
from glua_bench.reports import charts, tables
from glua_bench.reports.tables import Table


@dataclass
class Section:
    """A section of a page.

    Attributes:
        id: anchor.
        title: heading.
        intro: introductory sentences.
        blocks: tables and figures, in order.
        warning: highlighted text; "" for none.
        command: a command to copy; "" for none.
    """

    id: str
    title: str
    intro: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    warning: str = ""
    command: str = ""


def make_folders(out: Path) -> None:
    """Create the directories of a page.

    Raises:
        RunFailure: a directory cannot be created.
    """
    with storing(out, "--out"):
        for folder in (out, out / "tables", out / "figures"):
            folder.mkdir(parents=True, exist_ok=True)


class PageWriter:
    """Writes tables and charts, and returns blocks for the template.

    Args:
        out: directory of the page, with `tables` and `figures`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.files: list[Path] = []
        self._stems: set[Path] = set()

    def stem(self, folder: str, name: str) -> Path:
        """Return a path without suffix that is unique on the page."""
        stem, number = self.out / folder / file_name(name), 1
        while stem in self._stems:
            number += 1
            stem = stem.with_name(f"{file_name(name)}-{number}")
        self._stems.add(stem)
        return stem

    def table(self, table: Table) -> dict[str, Any]:
        """Write a table as LaTeX, Markdown and CSV."""
        stem = self.stem("tables", table.name)
        for suffix, text in (
            (".tex", tables.latex(table)),
            (".md", tables.markdown(table)),
            (".csv", csv_text(table.frame())),
        ):
            path = stem.with_name(stem.name + suffix)
            write_text(path, text, "--out")
            self.files.append(path)
        return {"kind": "table", "table": table.filled, "name": stem.name}

    def chart(self, name: str, caption: str, figure: Any) -> dict[str, Any]:
        """Write a chart as PNG, SVG and PDF."""
        stem = self.stem("figures", name)
        written = charts.files(figure, stem)
        self.files += written
        return {
            "kind": "chart",
            "name": stem.name,
            "caption": caption,
            "svg": _inline(written[1].read_text(encoding="utf-8")),
        }

    def picture(self, path: Path, caption: str) -> dict[str, Any]:
        """Embed a PNG."""
        data = base64.b64encode(path.read_bytes()).decode()
        return {"kind": "picture", "data": data, "caption": caption}


def render(template: str, **values: Any) -> str:
    """Render a template of `templates/`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glua_bench.reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sortable"] = _sortable
    environment.filters["code"] = _code
    return environment.get_template(template).render(version=__version__, **values)


def _code(text: str) -> str:
    """Return escaped HTML with `words` in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _sortable(table: Table, row: int, column: int) -> str:
    """Return the sort key of a cell."""
    value = table.columns[column].values[row]
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else repr(float(value))


def _inline(svg: str) -> str:
    """Return the SVG element of a chart, in the colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    for colour, name in ((charts.INK, "ink"), (charts.FAINT, "faint"), (charts.LINE, "line")):
        svg = svg.replace(colour, f"var(--{name})")
    # The page limits the width, down to where texts are legible; the aspect ratio is kept.
    head, _, rest = svg.partition(">")
    width = re.search(r'width="([\d.]+)pt"', head)
    head = re.sub(r' (?:width|height)="[\d.]+pt"', "", head)
    points = float(width[1]) if width else 600.0
    pixels = points * 4 / 3
    return f'{head} style="width:{pixels:.0f}px;min-width:{0.75 * pixels:.0f}px" role="img">{rest}'


def file_name(name: str) -> str:
    """Return a name that every file system accepts."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "unnamed"


def slug(text: str) -> str:
    """Return a valid HTML anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
