"""What mkdocs builds besides the pages in docs/: pages of the root, and pages generated from code.

The front page is README.md; `contributing.md` and `changelog.md` are the files of the root.
`commands.md` is generated from the Typer app, `settings.md` from the dataclasses. Formulas become
MathML and notebooks pages, so the site makes no request to another host.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import itertools
import json
import posixpath
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Page of the site → file of the repository.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    texts = {page: (ROOT / file).read_text(encoding="utf-8") for page, file in PAGES.items()}
    texts |= {"commands.md": commands(), "settings.md": settings()}
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

    def resolve(match: re.Match[str]) -> str:
        name, _, anchor = match[2].partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), name))
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


def settings() -> str:
    """Return the page of every setting, from the dataclasses."""
    from typer.main import get_command

    from glua_bench.cli import app
    from glua_bench.config import PRESETS, RunConfig, SegmenterSpec
    from glua_bench.registry import Registry
    from glua_bench.task import Grid

    options = {p.name: p for p in get_command(app).commands["run"].params}  # type: ignore[attr-defined]
    attributes = dict(re.findall(r"^ {4}(\w+): (.*)$", inspect.getdoc(Grid) or "", re.M))
    head = ["setting", "default", *PRESETS, "values", "meaning"]

    def rows(cls: type, prefix: str, presets: dict[str, dict[str, Any]]) -> list[list[str]]:
        found = []
        for spec in dataclasses.fields(cls):
            if spec.name in ("grid", "segmenter", "method_config"):
                continue
            option = options.get(spec.name)
            meaning = spec.metadata.get("help") or attributes.get(spec.name, "")
            meaning = meaning or (option.help if option is not None and not prefix else "")
            default = "" if spec.default is dataclasses.MISSING else spec.default
            own = [presets.get(preset, {}) for preset in PRESETS]
            differs = any(spec.name in values for values in own)
            shown = [code(values.get(spec.name, default)) if differs else "" for values in own]
            first = [f"`{prefix}{spec.name}`", code(default), *shown]
            found.append([*first, allowed(spec), cell(meaning)])
        return found

    networks = {name: preset["segmenter"] for name, preset in PRESETS.items()}
    parts = [
        "# Every setting\n",
        "Generated from the code. `--set NAME=VALUE` of [the commands that train](commands.md) "
        "changes a setting; all of them are part of a run's id and of its `config.yaml`. A preset "
        "changes the defaults in its column.\n",
        "## A run\n",
        table(head, rows(RunConfig, "", PRESETS)),
        "## The segmenter\n",
        table(head, rows(SegmenterSpec, "segmenter.", networks)),
        "## The grid\n",
        "Each dataset states its grids; `--set grid.size=96` changes one.\n",
        table(head, rows(Grid, "grid.", {})),
    ]
    names = [entry.name for entry in Registry("method").entries() if entry.origin == "glua-bench"]
    for name in names:
        method = Registry("method").load(name)
        presets = {p: dict(values) for p, values in method.presets.items()}
        parts += [
            f"## Method {name}\n",
            f"{Registry('method').entry(name).summary} [Card](methods.md#{name}).\n",
            table(head, rows(method.Config, "method.", presets)),
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
