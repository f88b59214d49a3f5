"""Tables of a report, and their CSV, Markdown and LaTeX forms.

The page shows the same description (`templates/page.html`), so numbers, best values and marks are
the same in all forms.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from glua_bench.scoring.metrics import MISSING, Metric

WIDE = 55  # characters per row; the text width of `article` is about sixty


@dataclass(frozen=True)
class Column:
    """One column of numbers or texts.

    Attributes:
        title: heading.
        values: a number (nan if missing) or a text per row.
        digits: decimals.
        spread: standard deviations; nan if missing.
        better: "higher", "lower", or "" for columns without ranking.
        group: heading over several columns.
    """

    title: str
    values: Sequence[float | str]
    digits: int = 1
    spread: Sequence[float] | None = None
    better: str = ""
    group: str = ""

    @property
    def empty(self) -> bool:
        """True if no row has a value."""
        texts = (self.text(row) for row in range(len(self.values)))
        return all(text.strip() in ("", MISSING) for text in texts)

    @classmethod
    def of(
        cls,
        metric: Metric,
        values: pd.Series,
        title: str = "",
        spread: pd.Series | None = None,
        group: str = "",
    ) -> Column:
        """Make a column of a metric's values and their spread, in the metric's printed unit."""
        around = None if spread is None else list(metric.scale * spread)
        numbers = list(metric.scale * values)
        return cls(title or metric.heading, numbers, metric.digits, around, metric.better, group)

    def text(self, row: int) -> str:
        """Return the printed value, without its spread."""
        value = self.values[row]
        if isinstance(value, str):
            return value
        if math.isnan(value):
            return MISSING
        shown = f"{value:.{self.digits}f}"
        return shown.lstrip("-") if float(shown) == 0 else shown

    def spread_text(self, row: int) -> str:
        """Return the printed standard deviation; "" if missing."""
        if self.spread is None or math.isnan(self.spread[row]):
            return ""
        return f"{self.spread[row]:.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    """A table with named rows.

    Attributes:
        name: of the files.
        caption: one sentence.
        rows: names of the rows.
        columns: the columns.
        unranked: rows excluded from best and second, e.g. the upper bound.
        marks: (row, column) → a mark after the value, e.g. "†".
        notes: sentences below the table.
        ids: run ids of each row.
        first: heading of the row names.
        apart: rows set apart by a rule, e.g. the bounds.
    """

    name: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[Column]
    unranked: frozenset[str] = frozenset()
    marks: dict[tuple[int, int], str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    ids: Sequence[Sequence[str]] = ()
    first: str = "method"
    apart: frozenset[str] = frozenset()

    @property
    def filled(self) -> Table:
        """The table without empty columns, as it is printed; CSV files have all columns."""
        kept = [index for index, column in enumerate(self.columns) if not column.empty]
        marks = {
            (row, kept.index(column)): mark
            for (row, column), mark in self.marks.items()
            if column in kept
        }
        return replace(self, columns=[self.columns[index] for index in kept], marks=marks)

    def ruled(self, row: int) -> bool:
        """Return True if a rule stands above a row, between rows set apart and others."""
        names = self.rows
        return row > 0 and (names[row] in self.apart or names[row - 1] in self.apart)

    def place(self, row: int, column: int) -> str:
        """Return "best", "second", or ""; values that print alike share a place."""
        spec = self.columns[column]
        if not spec.better or self.rows[row] in self.unranked:
            return ""
        ranked = {
            spec.text(i): float(value)
            for i, value in enumerate(spec.values)
            if self.rows[i] not in self.unranked
            and not isinstance(value, str)
            and not math.isnan(value)
        }
        if len(ranked) < 2:
            return ""
        order = sorted(ranked, key=lambda t: ranked[t], reverse=spec.better == "higher")
        return {order[0]: "best", order[1]: "second"}.get(spec.text(row), "")

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Group headings of neighbouring columns, and the number of columns each spans."""
        runs = itertools.groupby(column.group for column in self.columns)
        return [(group, len(list(own))) for group, own in runs]

    def frame(self) -> pd.DataFrame:
        """Return values and spreads in full precision, for CSV."""
        data: dict[str, Sequence[float | str]] = {self.first: list(self.rows)}
        for column in self.columns:
            name = f"{column.group} {column.title}".strip()
            data[name] = list(column.values)
            if column.spread is not None:
                data[f"{name} sd"] = list(column.spread)
        return pd.DataFrame(data)


def markdown(table: Table) -> str:
    """Return a table in Markdown, without empty columns; best in bold, second in italics."""
    table = table.filled
    heads = [table.first, *(f"{c.group} {c.title}".strip() for c in table.columns)]
    lines = [_md_line(map(_md, heads)), _md_line(["---"] * len(heads))]
    for row, name in enumerate(table.rows):
        cells = [_md(name)]
        for index, column in enumerate(table.columns):
            text = _md(column.text(row))
            text = {"best": f"**{text}**", "second": f"*{text}*"}.get(table.place(row, index), text)
            spread = column.spread_text(row)
            cells.append(text + f" ± {spread}" * bool(spread) + table.marks.get((row, index), ""))
        lines.append(_md_line(cells))
    notes = "".join(f"\n{_md(note)}\n" for note in table.notes)
    return f"{_md(table.caption)}\n\n" + "\n".join(lines) + "\n" + notes


def latex(table: Table) -> str:
    r"""Return a table in LaTeX for `\usepackage{booktabs}`, without empty columns.

    The best value is bold, the second underlined; `\midrule` sets bounds apart.
    """
    table = table.filled
    head = " & ".join(_tex(column.title) for column in table.columns)
    letters = len(table.first) + sum(len(column.title) + 2 for column in table.columns)
    for row, name in enumerate(table.rows):
        texts = [c.text(row) + (f"+{c.spread_text(row)}" * bool(c.spread)) for c in table.columns]
        letters = max(letters, len(name) + sum(len(text) + 2 for text in texts))
    # Wide tables span both columns, in a smaller font.
    kind, size = ("table*", "scriptsize") if letters > WIDE else ("table", "small")
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{{kind}}}",
        f"\\centering\\{size}\\setlength{{\\tabcolsep}}{{{'2pt' if letters > WIDE else '4pt'}}}",
        f"\\caption{{{_tex(table.caption)}}}",
        f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', table.name.lower())}}}",
        f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        "\\toprule",
    ]
    if any(group for group, _ in table.groups):
        cells, rules, position = [], [], 2
        for group, span in table.groups:
            cells.append(
                f"\\multicolumn{{{span}}}{{c}}{{{_tex(group)}}}" if group else " & " * (span - 1)
            )
            if group:
                rules.append(f"\\cmidrule(lr){{{position}-{position + span - 1}}}")
            position += span
        lines += [f" & {' & '.join(cells)} \\\\", " ".join(rules)]
    lines += [f"{_tex(table.first)} & {head} \\\\", "\\midrule"]
    for row, name in enumerate(table.rows):
        cells = [_tex(name)]
        for index, column in enumerate(table.columns):
            text = _tex(column.text(row))
            text = {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}"}.get(
                table.place(row, index), text
            )
            spread = column.spread_text(row)
            if spread:
                text += f"\\,{{\\scriptsize$\\pm$\\,{spread}}}"
            cells.append(text + _tex(table.marks.get((row, index), "")))
        lines += ["\\midrule"] * table.ruled(row)
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    if table.notes:
        notes = _tex(" ".join(table.notes))
        lines.append(f"\\par\\smallskip\\parbox{{\\linewidth}}{{\\footnotesize {notes}}}")
    lines += [f"\\end{{{kind}}}", ""]
    return "\n".join(lines)


_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
        "±": r"$\pm$",
        "→": r"$\rightarrow$",
        "×": r"$\times$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "−": r"$-$",
        "†": r"\textsuperscript{\dag}",
        "–": "--",
        "…": r"\dots{}",
        "“": "``",
        "”": "''",
        "λ": r"$\lambda$",
        "ρ": r"$\rho$",
    }
)


def _tex(text: str) -> str:
    """Escape a text for LaTeX; other than ASCII and Latin letters need further packages."""
    shown = text.translate(_TEX)
    return "".join(c if ord(c) < 0x250 and c.isprintable() else "?" for c in shown)


def _md(text: str) -> str:
    """Escape a text for Markdown and HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))


def _md_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
