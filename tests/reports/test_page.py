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


def test_words_in_backticks_are_code_and_still_escaped():
    section = Section("answers", "Answers", warning=f"Run `a {EVIL}` again.")
    text = render("page.html", title="t", sections=[section], notices=["Use `glua-bench report`."])
    assert "<li>Use <code>glua-bench report</code>.</li>" in text
    assert "Run <code>a &lt;script&gt;" in text and EVIL not in text


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


# -- in a browser ---------------------------------------------------------------------------------

# Every visible text with its colour and the first opaque background below it. Texts in charts that
# are black or white by their own background (`charts.on`) are tested in test_readable.py.
CONTRAST = """
const rgb = (text) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, element = text.parentElement;
  const skipped = element.closest('script, style, noscript, metadata, option');
  if (!text.data.trim() || skipped || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const colour = element instanceof SVGElement ? style.fill : style.color;
  if (['rgb(1, 1, 1)', 'rgb(254, 254, 254)'].includes(colour)) continue;
  let below = element, ground = [255, 255, 255, 0];
  while (below && ground[3] < 255) {
    ground = rgb(getComputedStyle(below).backgroundColor); below = below.parentElement;
  }
  const [a, b] = [light(rgb(colour)), light(ground)].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), text.data.trim(), colour]);
}
return found;
"""


@pytest.fixture(scope="module")
def report(made_runs_in, tmp_path_factory):
    from glua_bench.reports.report import Options, write
    from glua_bench.reports.results import from_runs

    root = tmp_path_factory.mktemp("page")
    made = made_runs_in(root / "runs")
    made.comparison()
    return write(from_runs(made.root), root / "report", Options(pictures=False))[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 800])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_is_readable_at_any_width_and_theme(browser, report, width: int, theme: str) -> None:
    driver = browser.driver

    def emulate(command: str, **values: object) -> None:
        driver.execute_cdp_cmd(f"Emulation.{command}", values)

    def of(script: str) -> object:
        return driver.execute_script(f"return {script}")

    emulate("setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    feature = {"name": "prefers-color-scheme", "value": theme}
    emulate("setEmulatedMedia", features=[feature])
    try:
        browser.open(report)
        assert of("document.documentElement.scrollWidth") <= width
        assert of("document.body.scrollWidth") <= width

        # The answer stands on the first screen, before any table.
        answers = driver.find_elements("css selector", ".answer")
        text = answers[0].text
        for part in (
            "glua has the highest mean Dice, 62.0 % (95 % CI",
            "3 cases, 3 seeds",
            "runner-up slaug: difference 10.0 points (95 % CI",
            "source_only 22.0 %",
            "supervised (privileged) 81.0 %",
        ):
            assert part in text
        bottom = of("document.querySelector('.answer').getBoundingClientRect().bottom")
        first = of("document.querySelector('table').getBoundingClientRect().top")
        assert bottom < 900 and bottom < first

        # What is wider than the page has a hint, and nothing else has.
        scrolls = of(
            "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth > b.clientWidth + 1,"
            " !b.previousElementSibling.hidden && b.previousElementSibling.className == 'hint'])"
        )
        assert all(wide == hinted for wide, hinted in scrolls)
        assert any(wide for wide, _ in scrolls) or width == 1400

        contrasts = driver.execute_script(CONTRAST)
        assert len(contrasts) > 200
        assert [found for found in contrasts if found[0] < 4.5] == []
        ground = of("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (theme == "light")
        assert browser.errors() == [] and browser.requests() == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        emulate("setEmulatedMedia", features=[])
