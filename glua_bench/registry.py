"""Find plugins in entry points and `--plugin FILE`, and list them without importing.

Built-in methods, datasets and selectors use the same entry-point groups as other packages. The
output of `glua-bench list` is parsed from source with `ast`, so that imports of plugins (torch,
timm) are not run, and broken plugins are reported with their error without affecting others.

A dataset may also be described by a file in another format, which a registered class reads: the
class lists the suffixes of such files in `described_by`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glua_bench.documents import SUFFIXES as DESCRIPTIONS
from glua_bench.documents import nearest, read_document
from glua_bench.errors import ConfigError, PluginError, UserError, reason
from glua_bench.identity import GROUPS, PLUGIN_FILE, module_spec
from glua_bench.paths import ARTIFACTS, SWEEPS, name_fault

if TYPE_CHECKING:
    from glua_bench.task import Dataset

# Module and name of each kind's base class; imported late, since `list` must not import torch.
_BASES = {
    "method": ("glua_bench.method", "Method"),
    "dataset": ("glua_bench.task", "Dataset"),
    "selector": ("glua_bench.selection", "Selector"),
}


@dataclass(frozen=True)
class Entry:
    """Description of a registered plugin, obtained without importing it.

    Attributes:
        kind: "method", "dataset" or "selector".
        name: name on the command line.
        origin: distribution or file of the plugin.
        target: "module:Class" for entry points, the class name for files.
        summary: first line of the class docstring.
        attributes: literal class attributes in the source (`reference`, `needs`).
        error: why the plugin cannot be used, or "".
        file: the plugin file; None for entry points.
        reader: name of the dataset class that reads a description; "" for Python.
    """

    kind: str
    name: str
    origin: str
    target: str
    summary: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    file: Path | None = None
    reader: str = ""


class Registry:
    """The plugins of one kind.

    Args:
        kind: "method", "dataset" or "selector".
        plugin_files: single-file plugins given with `--plugin`.

    Raises:
        PluginError: two plugins share a name, or a plugin file does not exist.
    """

    def __init__(self, kind: str, plugin_files: Iterable[Path] = ()) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        for point in entry_points(group=GROUPS[kind]):
            self._add(_describe_entry_point(kind, point))
        for path in map(Path, plugin_files):
            is_yaml = path.suffix in DESCRIPTIONS
            for entry in self._from_yaml(path) if is_yaml else _describe_file(kind, path):
                self._add(entry)

    def _add(self, entry: Entry) -> None:
        known = self._entries.get(entry.name)
        if known is not None and (known.origin, known.target) != (entry.origin, entry.target):
            raise PluginError(
                f"Two {self.kind}s are called '{entry.name}' ({known.origin} and {entry.origin}); "
                "rename one of them or uninstall one."
            )
        self._entries[entry.name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def readers(self, suffix: str) -> list[Entry]:
        """Return the entries whose classes read descriptions with a suffix."""
        return [e for e in self.entries() if suffix in e.attributes.get("described_by", ())]

    def _from_yaml(self, path: Path) -> list[Entry]:
        """Return the entry of a description, if a registered class reads such files."""
        readers = self.readers(path.suffix)
        if not readers:
            return []
        reader, text = readers[0], read_document(path)
        given = {k: text.take(k, str, reader.attributes.get(k, "")) for k in ("reference", "needs")}
        name, title = text.take("name", str), text.take("title", str, "")
        entry = Entry(self.kind, name, str(path), reader.target, title, given)
        return [replace(entry, file=path.resolve(), reader=reader.name)]

    def entries(self) -> list[Entry]:
        """Return all plugins, including broken ones, sorted by name."""
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def entry(self, name: str) -> Entry:
        """Return the entry of a plugin.

        Raises:
            PluginError: the name is unknown; the closest match is suggested.
        """
        if name in self._entries:
            return self._entries[name]
        raise PluginError(
            f"No {self.kind} is called '{name}'; {nearest(name, sorted(self._entries))} "
            "(see `glua-bench list`, or add one with --plugin FILE)."
        )

    def fold_of(self, name: str, fold: int = 1) -> tuple[str, int]:
        """Parse the name of a dataset with its fold: `mmwhs_fold2` is fold 2 of `mmwhs`.

        Args:
            name: name of a dataset, with or without its fold.
            fold: fold from another option.

        Returns:
            The dataset's name and the fold.

        Raises:
            ConfigError: the name and `fold` contradict each other.
        """
        match = re.fullmatch(r"(.+)_fold(\d+)", name)
        if match is None or name in self or match[1] not in self:
            return name, fold
        if fold not in (1, int(match[2])):
            raise ConfigError(
                f"--dataset {name} is fold {match[2]} of '{match[1]}' and --fold is {fold}; omit "
                "one of them."
            )
        return match[1], int(match[2])

    def name_of(self, file: Path) -> str:
        """Return the name of the plugin that a description defines.

        Args:
            file: one of the plugin files.

        Raises:
            PluginError: no plugin reads such files.
        """
        for entry in self._entries.values():
            if entry.reader and entry.file == file.resolve():
                return entry.name
        raise PluginError(f"No {self.kind} reads files like {file}; give a name instead.")

    def load(self, name: str) -> type:
        """Import the plugin and return its class.

        Raises:
            PluginError: unknown name, failing import, missing class, or a class that is not
                of this kind.
        """
        entry = self.entry(name)
        fault = name_fault(name)
        if self.kind == "dataset" and name in (SWEEPS, ARTIFACTS):
            fault = "is a reserved directory name"
        if fault:
            raise PluginError(
                f"The {self.kind} '{name}' from {entry.origin} {fault}, so it cannot name the "
                "directory of its runs; rename it."
            )
        try:
            if entry.reader:
                reader: Any = self.load(entry.reader)
                loaded = reader.described(entry.file)
            elif entry.file is not None:
                loaded = getattr(_import_file(entry.file), entry.target)
            else:
                module, _, attribute = entry.target.partition(":")
                loaded = getattr(importlib.import_module(module), attribute)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a plugin may raise anything on import
            raise PluginError(
                f"The {self.kind} '{name}' from {entry.origin} cannot be imported "
                f"({type(error).__name__}: {reason(error)}); correct or remove it."
            ) from error
        module_name, base_name = _BASES[self.kind]
        base = getattr(importlib.import_module(module_name), base_name)
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise PluginError(
                f"The {self.kind} '{name}' from {entry.origin} is not a subclass of "
                f"{module_name}.{base_name}; derive it from that class."
            )
        if getattr(loaded, "name", None) != name:
            raise PluginError(
                f"The {self.kind} '{name}' from {entry.origin} has the class attribute `name` = "
                f"'{getattr(loaded, 'name', None)}'; make it equal to the registered name."
            )
        return loaded


def with_descriptions(datasets: str, plugins: Sequence[Path] | None) -> tuple[str, list[Path]]:
    """Replace FILE.yaml among comma-separated names by its name, and add it to the plugins."""
    names, files = [], list(plugins or [])
    for text in map(str.strip, datasets.split(",")):
        path = Path(text)
        if path.suffix in DESCRIPTIONS:
            files += [] if path in files else [path]
            text = Registry("dataset", files).name_of(path)
        names.append(text)
    return ",".join(names), files


def load_dataset(
    name: str, data_root: Path | None, plugins: Sequence[Path], fold: int = 1
) -> Dataset:
    """Load a dataset.

    Args:
        name: name of the dataset; `mmwhs_fold2` is fold 2 of `mmwhs`.
        data_root: directory of its files; None uses the dataset's default.
        plugins: plugin files.
        fold: fold of the dataset.

    Raises:
        PluginError: no dataset has the name, or it cannot be imported.
        ConfigError: the dataset has no such fold.
        DataError: the dataset has no default directory.
    """
    registry = Registry("dataset", plugins)
    name, fold = registry.fold_of(name, fold)
    dataset: Any = registry.load(name)
    dataset.check_fold(fold)  # the __init__ of a plugin may have no argument `fold`
    loaded: Dataset = dataset(data_root) if fold == 1 else dataset(data_root, fold)
    return loaded


def _describe_entry_point(kind: str, point: EntryPoint) -> Entry:
    origin = point.dist.name if point.dist is not None else "an entry point"
    module_name, _, class_name = point.value.partition(":")
    try:
        origin_file = module_spec(module_name).origin
        if origin_file is None:
            raise ModuleNotFoundError(f"'{module_name}' has no source file")
        classes = [n for n in _parse(Path(origin_file)).body if isinstance(n, ast.ClassDef)]
        node = next((n for n in classes if n.name == class_name), None)
        if node is None:
            raise PluginError(f"{module_name} defines no class {class_name}")
    except Exception as error:  # a broken plugin must not break the list
        text = f"{type(error).__name__}: {reason(error)}"
        return Entry(kind, point.name, origin, point.value, error=text)
    summary, attributes = describe_class(node)
    return Entry(kind, point.name, origin, point.value, summary, attributes)


def _describe_file(kind: str, path: Path) -> list[Entry]:
    if not path.is_file():
        raise PluginError(f"The plugin file {path} does not exist; check --plugin.")
    try:
        tree = _parse(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise PluginError(
            f"The plugin file {path} cannot be parsed as Python ({reason(error)}); correct it."
        ) from error
    # A plugin extends the base class, a built-in plugin, or an earlier class of the file.
    known = {_BASES[kind][1]}
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{GROUPS[kind]}."):
            known |= {alias.asname or alias.name for alias in node.names}
        if not isinstance(node, ast.ClassDef):
            continue
        bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
        if not known & bases:
            continue
        known.add(node.name)
        summary, given = describe_class(node)
        name = given.get("name")
        if isinstance(name, str):
            place = path.resolve()
            found.append(Entry(kind, name, str(path), node.name, summary, given, file=place))
    return found


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def describe_class(node: ast.ClassDef) -> tuple[str, dict[str, Any]]:
    """Return the first line of a class's docstring, and its attributes that are literals."""
    docstring = ast.get_docstring(node) or ""
    attributes: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        try:
            literal = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # not a literal
        attributes.update({t.id: literal for t in targets if isinstance(t, ast.Name)})
    return docstring.split("\n", 1)[0].strip(), attributes


def _import_file(path: Path) -> Any:
    # Files in different directories may have the same name.
    name = f"{PLUGIN_FILE}{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"The plugin file {path} is not a Python file; give a .py file.")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look up the module by name during execution.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
