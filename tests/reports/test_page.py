"""reports/page.py: a page and the files beside it."""

from __future__ import annotations

import pytest

from glua_bench.errors import RunFailure
from glua_bench.reports import charts, page
from glua_bench.reports.page import PageWriter, Section, file_name, make_folders, render, slug
from glua_bench.reports.tables import Column, Table

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def writer(tmp_path):
    make_folders(tmp_path / "out")
    return PageWriter(tmp_path / "out")


def test_tables_and_charts_are_also_files(writer):
    table = Table("one", "A caption", ["a"], [Column("x", [1.0])])
    figure = charts.new_figure(3, 2)
    axes = charts.new_axes(figure)[0, 0]
    axes.plot([0, 1], [0, 1], color=charts.INK)
    blocks = [writer.table(table), writer.chart("a/b", "What it shows", figure)]
    names = [file.relative_to(writer.out).as_posix() for file in writer.files]
    assert names == [
        "tables/one.tex",
        "tables/one.md",
        "tables/one.csv",
        "figures/a_b.png",
        "figures/a_b.svg",
        "figures/a_b.pdf",
    ]
    assert all(file.stat().st_size > 0 for file in writer.files)
    section = Section("part", EVIL, "An intro", blocks, warning="Look twice")
    text = render("page.html", title=EVIL, sections=[section])
    assert EVIL not in text and "&lt;script&gt;alert(1)" in text
    assert 'id="table-one"' in text and 'id="figure-a_b"' in text and "Look twice" in text
    # The chart uses the colours of the page's theme.
    assert "var(--ink)" in text and charts.INK not in text.split("<svg")[1]


def test_only_sections_with_a_warning_have_one():
    text = render("page.html", title="t", sections=[Section("part", "Part", "An intro")])
    assert 'class="notices"' not in text.split("</style>")[1]


def test_names_are_fit_for_files_and_anchors():
    assert file_name("glua, mask = 0.1/2") == "glua_mask_0.1_2" and file_name("…") == "unnamed"
    assert slug("Phantom MR-CT!") == "phantom-mr-ct" and slug("…") == "part"


def test_a_directory_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="--out"):
        page.make_folders(tmp_path / "file" / "report")


def test_colliding_file_names_are_numbered(writer):
    """Names may differ only in characters that files cannot have."""
    stems = [writer.stem("figures", name) for name in ("a (b)", "a [b", "a b", "a b", "a_b-2")]
    assert len(set(stems)) == 5 and {stem.parent for stem in stems} == {writer.out / "figures"}
    assert writer.stem("tables", "a b").name == stems[0].name == "a_b"
