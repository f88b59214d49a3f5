"""Tables of a report: one description, and what it looks like as CSV, Markdown and LaTeX.

The page shows the same description (`templates/report.html`), so every form holds the same
numbers, the same best values and the same marks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from glua_bench.scoring.metrics import MISSING, Metric

WIDE = 55  # letters in a row; a text width of `article` holds about sixty


@dataclass(frozen=True)
class Column:
    """One column of numbers or texts.

    Args:
        title: its head.
        values: a number (nan where there is none) or a text for each row.
        digits: after the decimal point.
        spread: standard deviations beside the values; nan where there is none.
        better: "higher", "lower", or "" where no value is better.
        group: head over several columns.
    """

    title: str
    values: Sequence[float | str]
    digits: int = 1
    spread: Sequence[float] | None = None
    better: str = ""
    group: str = ""

    @classmethod
    def of(
        cls,
        metric: Metric,
        values: pd.Series,
        title: str = "",
        spread: pd.Series | None = None,
        group: str = "",
    ) -> Column:
        """A metric's stored values, and their spread, as reports print them."""
        around = None if spread is None else list(metric.scale * spread)
        numbers = list(metric.scale * values)
        return cls(title or metric.heading, numbers, metric.digits, around, metric.better, group)

    def text(self, row: int) -> str:
        """The value as it is shown, without its spread."""
        value = self.values[row]
        if isinstance(value, str):
            return value
        if math.isnan(value):
            return MISSING
        return _signless(f"{value:.{self.digits}f}")

    def spread_text(self, row: int) -> str:
        """The standard deviation as it is shown; "" where there is none."""
        if self.spread is None or math.isnan(self.spread[row]):
            return ""
        return f"{self.spread[row]:.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    """Rows of entries.

    Args:
        name: of its files.
        caption: what it shows, in a sentence.
        rows: names of the rows.
        columns: the columns.
        unranked: rows that do not take part in the best and the second (the upper bound, which
            saw target labels).
        marks: (row, column) → a mark behind the value, e.g. "†".
        notes: sentences below it, among them what the marks mean.
        ids: what each row's numbers were made of: run ids.
        first: head of the rows' names.
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

    def place(self, row: int, column: int) -> str:
        """ "best", "second", or ""."""
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
        if len(ranked) < 2:  # one value, or all alike, are not a best one
            return ""
        # By what is shown: values that look alike share a place.
        order = sorted(ranked, key=lambda t: ranked[t], reverse=spec.better == "higher")
        return {order[0]: "best", order[1]: "second"}.get(spec.text(row), "")

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Heads over neighbouring columns, and how many columns each spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans

    def frame(self) -> pd.DataFrame:
        """The numbers in full, for CSV: one column each for values and spreads."""
        data: dict[str, Sequence[float | str]] = {self.first: list(self.rows)}
        for column in self.columns:
            name = f"{column.group} {column.title}".strip()
            data[name] = list(column.values)
            if column.spread is not None:
                data[f"{name} sd"] = list(column.spread)
        return pd.DataFrame(data)


def markdown(table: Table) -> str:
    """A table for Markdown; best in bold, second in italics."""
    heads = [table.first, *(f"{c.group} {c.title}".strip() for c in table.columns)]
    lines = [_md_line(map(_md, heads)), _md_line(["---"] * len(heads))]
    for row, name in enumerate(table.rows):
        cells = [_md(name)]
        for index, column in enumerate(table.columns):
            text = _md(column.text(row))
            text = {"best": f"**{text}**", "second": f"*{text}*"}.get(table.place(row, index), text)
            spread = column.spread_text(row)
            cells.append(
                text + (f" ± {spread}" if spread else "") + table.marks.get((row, index), "")
            )
        lines.append(_md_line(cells))
    notes = "".join(f"\n{_md(note)}\n" for note in table.notes)
    return f"{_md(table.caption)}\n\n" + "\n".join(lines) + "\n" + notes


def latex(table: Table) -> str:
    r"""A table for LaTeX with `\usepackage{booktabs}`; best in bold, second underlined."""
    head = " & ".join(_tex(column.title) for column in table.columns)
    letters = len(table.first) + sum(len(column.title) + 2 for column in table.columns)
    for row, name in enumerate(table.rows):
        texts = [c.text(row) + (f"+{c.spread_text(row)}" * bool(c.spread)) for c in table.columns]
        letters = max(letters, len(name) + sum(len(text) + 2 for text in texts))
    # What is too wide for a column of text goes over both, in smaller letters.
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
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [
        f"\\par\\smallskip\\parbox{{\\linewidth}}{{\\footnotesize {_tex(' '.join(table.notes))}}}"
    ] * bool(table.notes)
    lines += [f"\\end{{{kind}}}", ""]
    return "\n".join(lines)


_TEX = {
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
    '"': r"\textquotedbl{}",
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


def _tex(text: str) -> str:
    """Text without anything that LaTeX would execute."""
    shown = "".join(_TEX.get(letter, letter) for letter in text)
    shown = shown.replace(r"\textquotedbl{}", "''")
    # A plain article without further packages knows ASCII and Latin letters.
    return "".join(
        letter if ord(letter) < 0x250 and letter.isprintable() else "?" for letter in shown
    )


def _md(text: str) -> str:
    """Text without anything that Markdown or HTML in it would execute."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))


def _md_line(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"  # type: ignore[arg-type]


def _signless(text: str) -> str:
    """Without the sign of a zero."""
    return text[1:] if re.fullmatch(r"-0(\.0*)?", text) else text
