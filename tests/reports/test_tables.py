"""reports/tables.py: ranking, and CSV, Markdown and LaTeX of a table."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace

import pytest

from glua_bench.reports.tables import Column, Table, latex, markdown

NASTY = r"<b>&x</b> $\input{/etc/passwd}$ 50% a_b^c~#1 {} | `q` – ± †"


@pytest.fixture
def table():
    return Table(
        "main",
        "A caption with 5 % & more.",
        ["low", "a_1", "b", "bound (privileged)"],
        [
            Column("MYO", [10.0, 20.04, 20.01, 90.0], 1, None, "higher", "Dice (%)"),
            Column(
                "mean", [10.0, 30.0, 25.0, 95.0], 1, [1.0, 2.0, math.nan, 0.5], "higher", "Dice (%)"
            ),
            Column("ASSD", [5.0, 3.0, 4.0, 1.0], 2, None, "lower"),
            Column("gap", [math.nan, -0.2, 60.0, math.nan], 0),
            Column("on", ["CPU", "CPU", "GPU", "CPU"]),
        ],
        frozenset({"bound (privileged)"}),
        {(0, 1): "†"},
        ["A note."],
        [["1"], ["2"], ["3"], ["4"]],
    )


def test_best_and_second_are_by_what_is_shown_and_without_bounds(table):
    places = [[table.place(row, column) for row in range(4)] for column in range(5)]
    assert places[0] == ["second", "best", "best", ""]  # 20.04 and 20.01 look alike
    assert places[1] == ["", "best", "second", ""]
    assert places[2] == ["", "best", "second", ""]  # lower is better
    assert places[3] == places[4] == ["", "", "", ""]
    assert table.groups == [("Dice (%)", 2), ("", 3)]


def test_markdown_holds_values_spreads_and_marks(table):
    lines = markdown(table).splitlines()
    assert lines[2].startswith("| method | Dice (%) MYO | Dice (%) mean | ASSD |")
    assert lines[4] == "| low | *10.0* | 10.0 ± 1.0† | 5.00 | – | CPU |"
    assert lines[5] == r"| a\_1 | **20.0** | **30.0** ± 2.0 | **3.00** | 0 | CPU |"
    assert lines[6] == "| b | **20.0** | *25.0* | *4.00* | 60 | GPU |"
    assert "A note." in lines


def test_csv_holds_the_numbers_in_full(table):
    frame = table.frame()
    assert frame["Dice (%) MYO"].tolist() == [10.0, 20.04, 20.01, 90.0]
    assert frame["Dice (%) mean sd"].tolist()[:2] == [1.0, 2.0]
    assert frame["method"].tolist()[3] == "bound (privileged)"


def test_latex_holds_the_same(table):
    text = latex(table)
    assert r"\textbf{30.0}\,{\scriptsize$\pm$\,2.0}" in text and r"\underline{25.0}" in text
    assert r"10.0\,{\scriptsize$\pm$\,1.0}\textsuperscript{\dag}" in text
    assert r" & \multicolumn{2}{c}{Dice (\%)} &  &  &  \\" in text
    assert r"\cmidrule(lr){2-3}" in text and r"a\_1 &" in text
    assert text.count("\n\\toprule") == text.count("\n\\bottomrule") == 1


@pytest.mark.fault("hostile text", "LaTeX and Markdown in names, in tables")
def test_names_are_text_and_never_commands(table):
    nasty = Table("x", NASTY, [NASTY], [Column(NASTY, [1.0])], notes=[NASTY], first=NASTY)
    text = latex(nasty)
    assert r"\input" not in text.replace(r"\textbackslash{}input", "")
    assert r"\$\textbackslash{}input\{/etc/passwd\}\$ 50\% a\_b\textasciicircum{}c" in text
    plain = markdown(nasty)
    assert "<b>" not in plain and r"\|" in plain and r"\`q\`" in plain


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_in_a_plain_article(table, tmp_path):
    nasty = Table("x", NASTY, [NASTY], [Column(NASTY, [1.0])], notes=[NASTY], first=NASTY)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        f"{latex(table)}{latex(nasty)}\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_rules_set_bounds_apart(table):
    apart = replace(table, apart=frozenset({"low", "bound (privileged)"}))
    lines = [line.partition(" & ")[0] for line in latex(apart).splitlines()]
    rows = lines[lines.index("method") + 1 : lines.index("\\bottomrule")]
    assert rows == [
        "\\midrule",
        "low",
        "\\midrule",
        "a\\_1",
        "b",
        "\\midrule",
        "bound (privileged)",
    ]
    assert latex(table).count("\\midrule") == 1


def test_empty_columns_are_in_csv_only(table):
    """A column without values is not printed, and marks stay at their values."""
    gone = [Column("HD95", [math.nan] * 4, better="lower"), Column("note", ["", "–", "", ""])]
    wider = replace(table, columns=[gone[0], *table.columns, gone[1]], marks={(0, 2): "†"})
    assert latex(wider) == latex(table) and markdown(wider) == markdown(table)
    assert wider.filled == table
    assert {"HD95", "note"} <= set(wider.frame())
