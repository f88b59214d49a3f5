"""What mkdocs builds besides the pages in docs/: pages of the root, and pages generated from code.

The front page is README.md; `contributing.md` and `changelog.md` are the files of the root.
`commands.md` is generated from the Typer app, `settings.md` from the dataclasses. Each card of
`methods.md` becomes a page with the method's lines of the benchmark's table and its settings, and
`results.md` gets the figures of a report on the same rows. Formulas become MathML and notebooks
pages, so the site makes no request to another host.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import inspect
import itertools
import json
import posixpath
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# Page of the site → file of the repository.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
BENCHMARK = ROOT / "results" / "phantom_benchmark.parquet"
# Figures of the report that `results.md` shows below the benchmark's table, with their captions.
FIGURES = {
    "gap_recovered": "Share of the gap between the bounds that each method recovers.",
    "scores_{task}": "{direction}: Dice of each structure.",
    "intervals_{task}": "{direction}: mean Dice of each method with its 95 % interval.",
    "cost_quality": "Dice against the time of training. The machine had other work.",
    "selector_regret": "Points of Dice that each selector loses to the oracle, which reads target "
    "labels (privileged).",
}
# Pictures of a method's page, drawn by benchmarks/picture.py.
PICTURES = {
    "strip": "Training slices of a run from MR to CT, and what the method makes of them",
    "cases": "Best, median and worst test case of the same run",
}
TASKS = {"phantom_mr-ct": "MR→CT", "phantom_ct-mr": "CT→MR"}


def on_config(config: MkDocsConfig) -> None:
    """Add the pages of the methods to the navigation."""
    for part in config.nav or []:
        for pages in part.values():
            for entry in pages if isinstance(pages, list) else []:
                if entry.get("Methods") == "methods.md":
                    own = [{name: f"methods/{name}.md"} for name in cards()]
                    entry["Methods"] = [{"Overview": "methods.md"}, *own]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    texts = {page: (ROOT / file).read_text(encoding="utf-8") for page, file in PAGES.items()}
    texts |= {"commands.md": commands(), "settings.md": settings()}
    texts |= {f"methods/{name}.md": method_page(name, card) for name, card in cards().items()}
    for name, content in report(BENCHMARK, BENCHMARK.stat().st_mtime_ns).items():
        files.append(File.generated(config, f"benchmark/{name}", content=content))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            texts[file.src_uri.removesuffix("ipynb") + "md"] = notebook(file.content_string)
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links into the repository, and separate blocks as GitHub does."""
    origin = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("methods/"):
        origin = "docs/methods.md"
    if page.file.src_uri == "methods.md":
        markdown = markdown.partition("\n## ")[0]
    if page.file.src_uri == "results.md":
        end = f"<!-- {BENCHMARK.stem}: end -->"
        markdown = markdown.replace(end, f"{end}\n\n{figures()}")

    def resolve(match: re.Match[str]) -> str:
        name, _, anchor = match[2].partition("#")
        if re.match(r"[a-z]+:", name):
            return match[0]
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(origin), name))
        path = beside if name else origin
        if path == "docs/methods.md" and anchor in cards():
            path, anchor = f"docs/methods/{anchor}.md", ""
        elif not name:
            return match[0]
        path = path.removesuffix(".ipynb") + ".md" if path.endswith(".ipynb") else path
        target = next((site for site, file in PAGES.items() if file == path), "")
        if not target and path.startswith("docs/"):
            target = path.removeprefix("docs/")
        if not target:  # a file of the repository, which the site offers for download
            target = f"files/{path}"
            if files.get_file_from_path(target) is None and (ROOT / path).is_file():
                files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        link = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}({link}{'#' + anchor if anchor else ''})"

    return "\n".join(
        part if part.lstrip().startswith("```") else re.sub(r"(\])\(([^)\s]+)\)", resolve, part)
        for part in separated(markdown)
    )


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace formulas in TeX by MathML, which needs no script, and keep options on one line."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[3]).strip()
        display = "block" if match[1] == "div" else "inline"
        return convert(text[2:-2], display=display)

    pattern = r'<(div|span) class="arithmatex">(<!---->)?(.*?)</\1>'
    content = re.sub(pattern, formula, content, flags=re.DOTALL)
    command = r'<code>[^<\n]*</code>|<div class="language-(?:ba)?sh highlight">.*?</pre>'
    return re.sub(command, _whole_words, content, flags=re.DOTALL)


def _whole_words(match: re.Match[str]) -> str:
    """Mark options and the program's name, at whose hyphens a browser would break the line."""
    word = r"<[^>]*>|(?<![\w-])(--?[a-z][\w-]*|glua-bench\b)"
    return re.sub(word, lambda m: f'<span class="whole">{m[1]}</span>' if m[1] else m[0], match[0])


def separated(markdown: str) -> Iterator[str]:
    """Yield fences whole and other lines singly, with a blank line before lists, tables, comments.

    GitHub starts a list or table below a paragraph without a blank line; Python-Markdown does not.
    """
    fence: list[str] = []
    before = ""
    for line in markdown.splitlines():
        if fence or line.lstrip().startswith("```"):
            fence.append(line)
            if len(fence) > 1 and line.strip() == "```":
                yield "\n".join(fence)
                fence, before = [], "```"
            continue
        start = re.match(r"(\||[-*] |\d+\. |<!--)", line)
        if before.startswith("<!--") or (start and before and not _continues(before, start[1])):
            yield ""
        # A number stays on one line with its unit or spread.
        yield re.sub(r"(?<=\d) (?=[±%])|(?<=±) (?=\d)", "\u00a0", line) if start else line
        before = line.rstrip()
    yield from fence


def _continues(before: str, start: str) -> bool:
    """Return True if a block that begins with `start` goes on from the line before."""
    if start == "|":
        return before.startswith("|")
    return re.match(r"([-*] |\d+\. |\s)", before) is not None and start != "<!--"


# -- generated pages ------------------------------------------------------------------------------


def cell(text: object) -> str:
    """Return a text for a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def code(value: Any) -> str:
    """Return a value as code, a list as several, or nothing for an empty one."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(code, value))
    return "" if value in (None, "") else f"`{value}`"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [
        [head[i] for i in kept],
        ["---"] * len(kept),
        *([row[i] for i in kept] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cards() -> dict[str, str]:
    """Return the cards of `methods.md`: name of the method → text below its heading."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def method_page(name: str, card: str) -> str:
    """Return the page of a method: its card, its lines of the benchmark's table, its settings."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    block = text.split(f"<!-- {BENCHMARK.stem}: begin -->\n")[1].split("\n\n")[0].splitlines()
    own = [line for line in block[2:] if line.startswith(f"| `{name}`")]
    bounds = [block[2], block[-1]]
    lines = [*block[:2], *(line for line in block[2:] if line in {*own, *bounds})]
    result = "\n".join(lines) if own else "Not trained with this preset yet."
    pictures = []
    for kind, title in PICTURES.items():
        file = f"figures/methods/{name}_{kind}.png"
        if (ROOT / "docs" / file).is_file():
            with Image.open(ROOT / "docs" / file) as picture:
                said = f"{title}; preset `{picture.info['preset']}`."
            pictures.append(f"![{title}]({file})\n\n*{said}*\n")
    return "\n".join(
        [
            f"# {name}\n",
            card.strip(),
            "\n## Results\n",
            f"Phantom, preset `benchmark` ([all methods](results.md#the-benchmark)):\n\n{result}\n",
            *pictures,
            "## Every setting\n",
            method_settings(name),
            f"Train it: `glua-bench run --method {name} --dataset phantom --preset benchmark`.",
        ]
    )


@functools.lru_cache(maxsize=1)
def report(rows: Path, _: int) -> dict[str, bytes]:
    """Return the files of a report on rows of results: path → content.

    Args:
        rows: the Parquet file.
        _: its time, so that `mkdocs serve` writes the report again if it changed.
    """
    from glua_bench.reports.report import Options, write
    from glua_bench.reports.results import from_rows

    title = "The benchmark: every method on the phantom"
    with tempfile.TemporaryDirectory() as folder:
        files = write(from_rows(rows), Path(folder), Options(title=title, pictures=False))
        kept = (file for file in files if file.suffix != ".md")  # which would become pages
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in kept}


def figures() -> str:
    """Return a link to the benchmark's report, and those of its figures that the page shows."""
    shown = []
    for name, caption in FIGURES.items():
        for task, direction in TASKS.items() if "{task}" in name else [("", "")]:
            said = caption.format(direction=direction)
            picture = f"benchmark/figures/{name.format(task=task)}.svg"
            shown.append(f"![{said}]({picture})\n\n*{said}*")
    link = "The [whole report](benchmark/report.html) has these figures and all tables; "
    link += "[rows.parquet](benchmark/rows.parquet) holds what they were made of."
    return "\n\n".join([link, *shown])


def commands() -> str:
    """Return the page of every command with its options, from the Typer app."""
    from typer.main import get_command

    from glua_bench.cli import app

    parts = [
        "# Every command\n",
        "Generated from the program; `glua-bench COMMAND -h` prints the same.\n",
    ]
    waiting = [("glua-bench", get_command(app))]
    while waiting:
        name, command = waiting.pop(0)
        inner = {n: c for n, c in getattr(command, "commands", {}).items() if not c.hidden}
        waiting[:0] = [(f"{name} {n}", c) for n, c in inner.items()]
        if inner and name != "glua-bench":
            continue
        if name != "glua-bench":
            summary, _, rest = (command.help or "").partition("\n\n")
            parts += [f"## {name}\n", f"{cell(summary)}\n", f"{cell(rest)}\n" if rest else ""]
        rows = [_parameter(p) for p in command.params if not getattr(p, "hidden", False)]
        if rows:
            parts.append(table(["", "value", "default", "meaning"], rows))
    return "\n".join(part for part in parts if part)


def _parameter(parameter: Any) -> list[str]:
    """Return the row of an option or argument."""
    names = [*parameter.opts, *parameter.secondary_opts]
    argument = parameter.param_type_name == "argument"
    flag = getattr(parameter, "is_flag", False)
    default = parameter.default
    if flag and parameter.secondary_opts:
        default = names[0] if default else parameter.secondary_opts[0]
    elif parameter.required:
        default = "required"
    elif flag or callable(default) or default is None:
        default = ""
    shown = "required" if default == "required" else code(getattr(default, "value", default))
    title = parameter.name.upper() if argument else ", ".join(names)
    return [f"`{title}`", "" if flag else _kind(parameter), shown, cell(parameter.help or "")]


def _kind(parameter: Any) -> str:
    """Return the type of a parameter's value; Typer keeps it differently in its versions."""
    if hasattr(parameter, "type"):
        choices, name = getattr(parameter.type, "choices", ()), parameter.type.name
    else:
        hint = parameter.type_descriptor.annotation
        hint = (typing.get_args(hint) or (hint,))[0]
        choices = [each.value for each in hint] if issubclass(hint, Enum) else ()
        name = {str: "text", int: "integer"}.get(hint, hint.__name__.lower())
    return ", ".join(code(choice) for choice in choices) or cell(name)


def allowed(spec: Any) -> str:
    """Return which values a setting may take."""
    if spec.metadata.get("choices"):
        return ", ".join(f"`{value}`" for value in spec.metadata["choices"])
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if low is None:
        return ""
    low, high = (f"{v:,}" if isinstance(v, int) else f"{v:g}" for v in (low, high))
    return f"{low} to {high}"


def setting_table(
    cls: type, prefix: str, presets: Mapping[str, Mapping[str, Any]], told: Mapping[str, str] = {}
) -> str:
    """Return the table of the settings of a dataclass.

    Args:
        cls: the dataclass.
        prefix: of the names, as for `--set`.
        presets: name of a preset → its values.
        told: name → meaning, where the field has none.
    """
    from glua_bench.config import PRESETS

    found = []
    for spec in dataclasses.fields(cls):
        if spec.name in ("grid", "segmenter", "method_config"):
            continue
        meaning = spec.metadata.get("help") or told.get(spec.name, "")
        default = "" if spec.default is dataclasses.MISSING else spec.default
        own = [presets.get(preset, {}) for preset in PRESETS]
        differs = any(spec.name in values for values in own)
        shown = [code(values.get(spec.name, default)) if differs else "" for values in own]
        first = [f"`{prefix}{spec.name}`", code(default), *shown]
        found.append([*first, allowed(spec), cell(meaning)])
    return table(["setting", "default", *PRESETS, "values", "meaning"], found)


def method_settings(name: str) -> str:
    """Return the table of a method's settings."""
    from glua_bench.config import PRESETS, preset_values
    from glua_bench.registry import Registry

    method = Registry("method").load(name)
    presets = {preset: preset_values(method.presets, preset) for preset in PRESETS}
    return setting_table(method.Config, "method.", presets)


def settings() -> str:
    """Return the page of every setting, from the dataclasses."""
    from typer.main import get_command

    from glua_bench.cli import app
    from glua_bench.config import PRESETS, RunConfig, SegmenterSpec
    from glua_bench.registry import Registry
    from glua_bench.task import Grid

    options = {p.name: p for p in get_command(app).commands["run"].params}  # type: ignore[attr-defined]
    told = {name: option.help or "" for name, option in options.items()}
    attributes = dict(re.findall(r"^ {4}(\w+): (.*)$", inspect.getdoc(Grid) or "", re.M))
    networks = {name: preset["segmenter"] for name, preset in PRESETS.items()}
    parts = [
        "# Every setting\n",
        "Generated from the code. `--set NAME=VALUE` of [the commands that train](commands.md) "
        "changes a setting; all of them are part of a run's id and of its `config.yaml`. A preset "
        "changes the defaults in its column.\n",
        "## A run\n",
        setting_table(RunConfig, "", PRESETS, told),
        "## The segmenter\n",
        setting_table(SegmenterSpec, "segmenter.", networks),
        "## The grid\n",
        "Each dataset states its grids; `--set grid.size=96` changes one.\n",
        setting_table(Grid, "grid.", {}, attributes),
    ]
    names = [entry.name for entry in Registry("method").entries() if entry.origin == "glua-bench"]
    for name in names:
        parts += [
            f"## Method {name}\n",
            f"{Registry('method').entry(name).summary} [Card](methods.md#{name}).\n",
            method_settings(name),
        ]
    return "\n".join(parts)


def notebook(text: str) -> str:
    """Return an executed notebook as a page."""
    parts = []
    for each in json.loads(text)["cells"]:
        source = "".join(each["source"])
        parts.append(source if each["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for rich, outputs in itertools.groupby(each.get("outputs", []), _is_rich):
            if not rich:  # lines that were printed one after another
                texts = ("".join(o.get("text") or o["data"]["text/plain"]) for o in outputs)
                lines = "\n".join(text.rstrip() for text in texts)
                parts.append(f"```text\n{lines}\n```")
                continue
            for data in (output["data"] for output in outputs):
                if "image/png" in data:
                    picture = "".join("".join(data["image/png"]).split())
                    parts.append(f'<img alt="output" src="data:image/png;base64,{picture}">')
                else:
                    parts.append(re.sub(r"<table[^>]*>", "<table>", "".join(data["text/html"])))
    return "\n\n".join(parts)


def _is_rich(output: dict[str, Any]) -> bool:
    """Return True for an output that is a picture or a table."""
    return bool({"image/png", "text/html"} & set(output.get("data", {})))
