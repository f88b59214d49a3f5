"""mkdocs.yml, docs/site: the site builds strictly, is complete, and works in a browser offline."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from glua_bench.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (1400, 800)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `.ci/run` does, with the installed package."""
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if find_spec(name) is None]
    if missing:
        if os.environ.get("GLUA_BENCH_BROWSER") == "required":
            pytest.fail(f"GLUA_BENCH_BROWSER=required, but {missing} are not installed")
        pytest.skip("needs the extra 'docs'")
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, which also hides warnings from --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder / "html")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    # Not in the checkout, where the folder glua_bench/ would be taken for the package.
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def text_of(page: Path) -> str:
    """Return the text of a page without tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_in_the_navigation(site: Path) -> None:
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html"}
    linked = re.findall(r'href="([\w/-]+\.html)"', (site / "index.html").read_text("utf-8"))
    assert pages - {*linked, "index.html"} == {"benchmark/report.html"}
    assert {"commands.html", "settings.html", "api.html", "contributing.html"} <= pages


def test_every_command_and_option_is_on_its_page(site: Path) -> None:
    from typer.main import get_command

    from glua_bench.cli import app

    text = text_of(site / "commands.html")
    waiting = [("glua-bench", get_command(app))]
    while waiting:
        name, command = waiting.pop()
        waiting += [(f"{name} {n}", c) for n, c in getattr(command, "commands", {}).items()]
        if getattr(command, "commands", None) or command.hidden:
            continue
        section = text.split(f"{name}¶")[1].split("¶")[0]
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                assert parameter.opts[0].lower() in section.lower(), f"{name} {parameter.name}"


def test_every_setting_is_on_its_page_with_its_default(site: Path) -> None:
    from glua_bench.config import PRESETS, RunConfig

    page = (site / "settings.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<h2 id="([\w-]+)">.*?</h2>(.*?)(?=<h2|</article>)', page, re.S))
    for name in (e.name for e in Registry("method").entries() if e.origin == "glua-bench"):
        method = Registry("method").load(name)
        for spec in dataclasses.fields(method.Config):
            row = sections[f"method-{name}"].split(f"<code>method.{spec.name}</code>")[1]
            cells = row.split("</tr>")[0]
            shown = spec.default if spec.default not in (None, "") else ""
            assert f"<code>{shown}</code>" in cells or shown == "", f"{name}.{spec.name}"
            for values in method.presets.values():
                if spec.name in values:
                    assert f"<code>{values[spec.name]}</code>" in cells, f"{name}.{spec.name}"
    for spec in dataclasses.fields(RunConfig):
        if spec.name not in ("grid", "segmenter", "method_config"):
            assert f"<code>{spec.name}</code>" in sections["a-run"]
    for preset in PRESETS.values():
        assert f"<code>{preset['steps']}</code>" in sections["a-run"]


def test_every_method_has_a_page_with_its_results_and_settings(site: Path) -> None:
    names = [e.name for e in Registry("method").entries() if e.origin == "glua-bench"]
    assert {page.stem for page in (site / "methods").iterdir()} == set(names)
    rows = pd.read_parquet(ROOT / "results" / "phantom_benchmark.parquet")
    trained = set(rows["method"])
    for name in names:
        page = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        for spec in dataclasses.fields(Registry("method").load(name).Config):
            assert f"<code>method.{spec.name}</code>" in page
        lines = page.count("<td>supervised (privileged)</td>")
        assert (lines, "Not trained" in page) == ((1, False) if name in trained else (0, True))
        shown = re.findall(r'<img[^>]*src="(\.\./figures/methods/[^"]+)"', page)
        assert f"../figures/methods/{name}_cases.png" in shown
        assert all((site / "methods" / picture).resolve().is_file() for picture in shown)
    overview = (site / "methods.html").read_text(encoding="utf-8")
    assert {f"methods/{name}.html" for name in names} <= set(re.findall(r'href="(.+?)"', overview))
    assert 'href="methods/glua.html"' in (site / "settings.html").read_text(encoding="utf-8")


def test_the_results_show_the_figures_of_their_report(site: Path) -> None:
    page = (site / "results.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="(benchmark/[^"]+)"', page)
    assert len(shown) == 7 and all((site / file).read_text("utf-8").count("<svg") for file in shown)
    assert 'href="benchmark/report.html"' in page
    report = text_of(site / "benchmark" / "report.html")
    for entry in pd.read_parquet(ROOT / "results" / "phantom_benchmark.parquet")["entry"].unique():
        assert entry in report


def test_no_page_asks_another_host(site: Path) -> None:
    """Scripts, styles, fonts and pictures are files of the site; formulas need no script."""
    loads = re.compile(
        r'<(?:script|img|iframe|link rel="?stylesheet"?)[^>]*(?:src|href)="?(https?:)'
    )
    for page in site.rglob("*.html"):
        content = page.read_text(encoding="utf-8")
        assert not loads.search(content), page.name
        assert "arithmatex" not in content, f"{page.name} shows a formula as text"
        assert "<p>- " not in content and "<p>| " not in content, f"{page.name} lacks a list"
    assert "<math" in (site / "methods" / "glua.html").read_text(encoding="utf-8")


def test_files_of_the_repository_are_offered_with_the_pages_that_link_to_them(site: Path) -> None:
    for file in ("results/phantom_quick.parquet", "results/phantom_quick_gain.csv"):
        assert (site / "files" / file).read_bytes() == (ROOT / file).read_bytes()


def test_an_executed_notebook_becomes_a_page(site: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    cells = (
        '{"cells": [{"cell_type": "markdown", "source": ["# Title"]}, {"cell_type": "code", '
        '"source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}, '
        '{"output_type": "stream", "text": ["printed\\n"]}]}]}'
    )
    page = hooks.notebook(cells)
    assert page.startswith("# Title\n\n```python\n1 + 1\n```")
    assert "```text\n2\nprinted\n```" in page


def test_commands_break_between_words(site: Path) -> None:
    page = (site / "scoring.html").read_text(encoding="utf-8")
    whole = re.findall(r'<span class="whole">(.*?)</span>', page)
    assert {"glua-bench", "--predictions", "--only-predicted"} <= set(whole)
    assert not [word for word in whole if "<" in word]


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """Serve the site on this machine and return its address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_search_theme_and_width_in_a_browser(served: str, browser: Any) -> None:
    driver = browser.driver
    driver.get("about:blank")
    browser.errors(), browser.requests()
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8").replace("!!python", ""))["nav"]
    pages = [p for part in nav for v in part.values() for p in ([v] if isinstance(v, str) else v)]
    names = [p if isinstance(p, str) else next(iter(p.values())) for p in pages]
    names += ["methods/glua.md"]
    try:
        for width in WIDTHS:
            driver.set_window_size(width, 900)
            for name in names:
                driver.get(f"{served}/{name.rsplit('.', 1)[0]}.html")
                inner, page = driver.execute_script(
                    "return [innerWidth, document.documentElement.scrollWidth]"
                )
                assert page <= inner, f"{name} scrolls sideways at {width} px"
        driver.set_window_size(1400, 900)
        driver.get(f"{served}/index.html")
        scheme = "document.body.getAttribute('data-md-color-scheme')"
        colour = "return getComputedStyle(document.body).backgroundColor"
        browser.wait(f"['default', 'slate'].includes({scheme})", True)
        before = driver.execute_script(f"return {scheme}"), driver.execute_script(colour)
        driver.execute_script(
            "document.querySelector('form[data-md-component=palette] label:not([hidden])').click()"
        )
        browser.wait(f"{scheme} !== '{before[0]}'", True)
        browser.wait(f"({colour.removeprefix('return ')}) !== '{before[1]}'", True)
        driver.execute_script(
            "const box = document.querySelector('input.md-search__input');"
            "box.focus(); box.value = 'lambda_feature';"
            "box.dispatchEvent(new Event('input', {bubbles: true}));"
            "box.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}))"
        )
        found = "[...document.querySelectorAll('.md-search-result__link')].map(a => a.href).join()"
        browser.wait(f"{found}.includes('methods/local_only.html')", True, 20)
        assert browser.errors() == []
        assert [url for url in browser.requests() if not url.startswith(served)] == []
    finally:
        driver.set_window_size(1000, 800)
