"""Compute run ids and stage keys: how they are hashed, and which code is part of them.

Code is found by following imports, anywhere in a file, from training, scoring and the method.
Comments, docstrings and layout are ignored, and modules are identified by name and not by path, so
that every installation gives the same digest. Three kinds of modules are excluded: those in
`NO_RESULT`, the standard library, and libraries (dependencies of the harness and installed packages
that register no plugin). `environment.json` records the versions of libraries.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from types import CellType
from typing import TYPE_CHECKING, Any

import glua_bench
from glua_bench.errors import PluginError

if TYPE_CHECKING:
    from glua_bench.config import RunConfig
    from glua_bench.method import Method, Stage

GROUPS = {  # kind of plugin → group of its entry points
    "method": "glua_bench.methods",
    "dataset": "glua_bench.datasets",
    "selector": "glua_bench.selectors",
}
PLUGIN_FILE = "glua_bench_plugin_"  # prefix of the module names of plugin files
PACKAGE = "glua_bench"
# Where training starts. The code of datasets is not followed: what they provide (files, readings,
# structures, splits, grid) is hashed instead (`runs.plan.Fingerprints`, `RunConfig`).
TRAINING = (f"{PACKAGE}.runs.execution",)
# Code that runs on finished weights: it can change scores but no weights.
SCORING = tuple(
    f"{PACKAGE}.{name}"
    for name in ("scoring.evaluation", "scoring.metrics", "selection", "scoring.selectors")
)
# Modules that training imports but that change neither weights nor scores, with the reason.
NO_RESULT: Mapping[str, str] = {
    f"{PACKAGE}.runs.carried": "stores what is needed to segment new volumes beside the run",
    f"{PACKAGE}.cli": "the command line",
    f"{PACKAGE}.cli.api": "the Python interface, which `import glua_bench` offers",
    f"{PACKAGE}.console": "progress bars and prompts",
    f"{PACKAGE}.documents": "parses dataset descriptions, whose content is hashed",
    f"{PACKAGE}.errors": "exception types",
    f"{PACKAGE}.inspection.measurements": "image statistics for `runs.carried`",
    f"{PACKAGE}.files": "writes whole files",
    f"{PACKAGE}.identity": "computes the ids",
    f"{PACKAGE}.runs.completion": "completes names in a shell",
    f"{PACKAGE}.runs.request": "holds options; the configuration that they give is hashed",
    f"{PACKAGE}.runs.interruption": "stops a process; the resumed run gives the same result",
    f"{PACKAGE}.runs.sealed.child": "passes a run on to training, whose code is hashed",
    f"{PACKAGE}.runs.sealed.landlock": "denies files",
    f"{PACKAGE}.runs.sealed.process": "starts and stops the process that trains",
    f"{PACKAGE}.runs.sealed.seal": "lists the files that training may use",
    f"{PACKAGE}.runs.timing.parts": "measures durations",
    f"{PACKAGE}.registry": "finds plugin classes, whose code is hashed",
    f"{PACKAGE}.inspection.outliers": "compares these statistics",
    f"{PACKAGE}.records.environment": "describes the machine",
    f"{PACKAGE}.records.naming": "names copies of results",
    f"{PACKAGE}.records.run_directory": "records results",
    f"{PACKAGE}.records.seal": "verifies recorded results",
    f"{PACKAGE}.records.tracker": "copies results",
}

# Hexadecimal digits of each kind of digest.
RUN_DIGITS, DATA_DIGITS, CODE_DIGITS, CACHE_DIGITS = 12, 16, 10, 20

# An import in a file: its level (0 is absolute), the module, and the names imported from it.
Import = tuple[int, str, tuple[str, ...]]


def digest(value: Any, length: int = RUN_DIGITS) -> str:
    """Return the first `length` hexadecimal digits of the hash of a JSON-serialisable value."""
    return _sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())[:length]


def identity(config: RunConfig, data_fingerprint: str, code: str) -> str:
    """Return the run's id, a hash of everything that can change its result.

    Selectors and the preset's name are excluded: all selectors are evaluated on one training, and
    the preset's values are part of the configuration.
    """
    values = config.to_dict()
    del values["preset"], values["selectors"]
    return digest({"config": values, "data": data_fingerprint, "code": code})


def code_version(*parts: Any, scoring: bool = False) -> str:
    """Return the package's version and a digest of the code that determines trained weights.

    Digests are computed once per process, because a process keeps running the code it loaded.

    Args:
        parts: the method's class, or the classes, functions and objects that make up a stage.
        scoring: include the code that scores the weights.
    """
    homes = {home for part in parts for home in _defining_modules(part)}
    harness = (*TRAINING, *SCORING) if scoring else TRAINING
    return f"{glua_bench.__version__}+{code_digest(harness, tuple(sorted(homes)))}"


def stage_key(method: Method, stage: Stage) -> dict[str, Any]:
    """Return the part of a stage's cache key that comes from its fields and its code.

    Methods that share a component get the same key for its stage, even where their own files
    differ (`glua` and `global_only` share the style transfer). Earlier stages are included, since
    they can change the weights that the stage starts from.

    Args:
        method: the method that the stage belongs to.
        stage: one of `method.stages()`.

    Returns:
        A value for `digest`.
    """
    before = itertools.takewhile(lambda other: other.name != stage.name, method.stages())
    parts: list[Any] = []
    stages = []
    for each in (*before, stage):
        values: dict[str, Any] = {"type": type(each)}
        values |= {item.name: getattr(each, item.name) for item in fields(each)}
        values["step"], values["optimizers"] = each.trained_by(method)
        trained = [method.get_submodule(name) for name in each.modules]
        stages.append([_serialisable(values, parts), _serialisable(trained, parts)])
    if any(part.__module__ not in sys.modules for part in parts):
        parts.append(type(method))  # the part comes from a module that the method loaded itself
    return {"stages": stages, "code": code_version(*parts)}


def reached(harness: Sequence[str], homes: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """List the modules whose code is hashed, with their files, sorted.

    Args:
        harness: names of modules of the harness to start from.
        homes: names of other modules to start from.
    """
    left_out = {*NO_RESULT, *SCORING} - set(harness)
    found: dict[Path, str] = {}
    libraries: set[str] = set()
    # The harness comes first: every package that it imports is a library.
    for names in (harness, homes):
        waiting = [module for module in map(_module, names) if module is not None]
        while waiting:
            module = waiting.pop()
            if module.path in found or module.name in left_out:
                continue
            if not _is_hashed(module, libraries):
                continue
            found[module.path] = module.label
            ours = _top(module.name) == PACKAGE
            for name in _imported_names(module):
                if ours and _top(name) != PACKAGE:
                    libraries.add(_top(name))
                elif _top(name) not in libraries:
                    waiting += filter(None, [_module(name) or _sibling(module, name)])
            waiting += [] if ours else _modules_of_values(module)
    return sorted((label, path) for path, label in found.items())


@functools.cache
def code_digest(harness: tuple[str, ...], homes: tuple[str, ...] = ()) -> str:
    """Return a digest of the code of the modules that `reached` finds, once per process."""
    counted = [[label, _read(path).digest] for label, path in reached(harness, homes)]
    # Sorted by label and code, so that the paths of modules with equal labels have no influence.
    return digest(sorted(counted), CODE_DIGITS)


# -- modules --------------------------------------------------------------------------------------


def module_spec(name: str) -> ModuleSpec:
    """Find a module without importing its parent packages.

    Raises:
        ModuleNotFoundError: the module does not exist.
    """
    above, _, _ = name.rpartition(".")
    if not above:
        found = importlib.util.find_spec(name)
    else:
        package = module_spec(above)
        if package.submodule_search_locations is None:
            raise ModuleNotFoundError(f"'{above}' is not a package")
        # Sub-packages may be mapped to other directories (as here), so each level asks the finders.
        finders = [f for finder in sys.meta_path if (f := getattr(finder, "find_spec", None))]
        asked = (find(name, package.submodule_search_locations) for find in finders)
        found = next((spec for spec in asked if spec is not None), None)
    if found is None:
        raise ModuleNotFoundError(f"No module named '{name}'")
    return found


@dataclass(frozen=True)
class _Module:
    """A module with a file, imported or not."""

    name: str
    path: Path
    is_package: bool
    loaded: Any = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """The module's name; for a single file the file's stem (`--plugin` names include paths)."""
        return self.path.stem if "." not in self.name and not self.is_package else self.name

    @property
    def root(self) -> Path:
        """The directory that contains the top-level package or module."""
        above = list(self.path.parents)
        return above[min(self.name.count(".") + self.is_package, len(above) - 1)]


def _module(name: str) -> _Module | None:
    """Find a module by name; None if it does not exist or has no file, such as built-in ones."""
    return _from_loaded(sys.modules[name], name) if name in sys.modules else _find(name)


def _from_loaded(loaded: Any, name: str) -> _Module | None:
    path = getattr(loaded, "__file__", None)
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    return _Module(name, Path(path).resolve(), hasattr(loaded, "__path__"), loaded)


@functools.cache
def _find(name: str) -> _Module | None:
    """Find a module that is not imported yet, without running it."""
    try:
        spec = module_spec(name)
    except Exception:  # finders of other packages may raise anything
        return None
    if not spec.has_location or spec.origin is None:
        return None
    path = Path(spec.origin)
    is_package = spec.submodule_search_locations is not None
    return _Module(name, path.resolve(), is_package) if path.is_file() else None


def _sibling(module: _Module, name: str) -> _Module | None:
    """Find a module next to a plugin, which may extend `sys.path` only when it runs."""
    path = module.root.joinpath(*name.split("."))
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return _Module(name, file, file.name == "__init__.py")
    return None


def _is_hashed(module: _Module, libraries: set[str]) -> bool:
    """Return True if a module belongs to the harness or to a plugin and not to a library."""
    top = _top(module.name)
    if top == PACKAGE or top.startswith(PLUGIN_FILE):
        return True
    if top in sys.stdlib_module_names or top in libraries:
        return False
    return not _is_site_directory(module.root) or top in _plugin_packages()


def _top(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _is_site_directory(folder: Path) -> bool:
    """Return True if packages are installed into a directory."""
    return folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


@functools.cache
def _plugin_packages() -> set[str]:
    """The packages that register plugins."""
    return {_top(point.module) for group in GROUPS.values() for point in entry_points(group=group)}


def _imported_names(module: _Module) -> Iterator[str]:
    """Yield candidate names of imported modules, with their packages; not all are modules."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    if module.loaded is not None:
        package = getattr(module.loaded, "__package__", None) or package
    for level, base, names in _read(module.path).imports:
        if level:
            above = package.split(".")
            base = ".".join([*above[: len(above) - level + 1], *([base] if base else [])])
        parts = base.split(".")
        yield from (".".join(parts[: n + 1]) for n in range(len(parts)))
        # "from package import module" and "from module import name" look the same.
        yield from (f"{base}.{name}" for name in names)


def _modules_of_values(module: _Module) -> list[_Module]:
    """Find modules through a module's attributes, such as files that it loaded by their path."""
    modules = []
    for value in list(vars(module.loaded).values()) if module.loaded is not None else ():
        if inspect.ismodule(value):
            modules.append(_from_loaded(value, value.__name__))
        elif inspect.isclass(value) or inspect.isfunction(value):
            modules.append(_module(str(value.__module__)))
    return [each for each in modules if each is not None]


# -- code -----------------------------------------------------------------------------------------

_IGNORED_FIELDS = ("ctx", "kind", "type_comment")  # without meaning, or determined by layout
_EMPTY: tuple[Any, ...] = (None, [])  # omitted, because versions of Python differ in them
_IMPORTING = (ast.Import, ast.ImportFrom, ast.Call)


@dataclass(frozen=True)
class _Read:
    """The digest of a file's code, and its imports."""

    digest: str
    imports: tuple[Import, ...]


@functools.cache
def _read(path: Path) -> _Read:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PluginError(
            f"{path} is part of the code of this run and cannot be read ({error.strerror}); make "
            "it readable."
        ) from error
    try:
        if path.suffix in importlib.machinery.SOURCE_SUFFIXES:
            text, imports = normal_form(content)
            return _Read(_sha256(text.encode()), imports)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # like compiled files, a file that cannot be parsed is hashed as bytes
    return _Read(_sha256(content), ())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def normal_form(source: bytes) -> tuple[str, tuple[Import, ...]]:
    """Return a text that is equal for equal code on every version of Python, and the imports.

    The text lists the syntax tree without positions, comments, docstrings, other string statements
    and `pass`. `ast.dump` is not used, because its output differs between versions of Python
    (new fields, defaults, printable characters, parts of f-strings).

    Raises:
        SyntaxError: the source is not valid Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are reported when the file is imported
        tree = ast.parse(source)
    text: list[str] = []
    imports: list[Import] = []
    stack: list[Any] = [tree]  # nodes, lists and texts; no recursion, since sums can be deep
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text.append(item)
        elif isinstance(item, list):
            stack.append("]")
            stack += [_item(value) for value in reversed(item) if not _has_no_effect(value)]
            text.append("[")
        else:
            kind = type(item)
            if kind in _IMPORTING:
                imports += _imports(item)
            elif kind is ast.JoinedStr:
                item = ast.JoinedStr(_merge_constants(item.values))
            stack.append(")")
            for name in reversed(item._fields):
                value = getattr(item, name, None)
                if name not in _IGNORED_FIELDS and value not in _EMPTY:
                    stack += (_item(value), name)
            text.append(f"{kind.__name__}(")
    return " ".join(text), tuple(imports)


def _item(value: Any) -> Any:
    """Return nodes and lists unchanged, and leaves as text that all versions of Python share."""
    kind = type(value)
    if kind is ast.Name:
        return f"Name({ascii(value.id)})"
    if kind in (ast.Constant, ast.MatchSingleton):
        return f"{kind.__name__}({_item(value.value)})"
    if isinstance(value, (ast.AST, list)):
        return value
    if kind is int:  # hexadecimal, because Python limits the length of decimal numbers
        return hex(value)
    return f"{kind.__name__}:{ascii(value)}"


def _has_no_effect(value: Any) -> bool:
    """Return True for a docstring, another string statement, or `pass`."""
    return isinstance(value, ast.Pass) or (
        isinstance(value, ast.Expr)
        and isinstance(value.value, ast.Constant)
        and isinstance(value.value.value, str)
    )


def _merge_constants(values: list[ast.expr]) -> list[ast.expr]:
    """Merge neighbouring constant parts of an f-string and drop empty ones."""
    parts: list[ast.expr] = []
    for value in values:
        if not isinstance(value, ast.Constant):
            parts.append(value)
        elif parts and isinstance(parts[-1], ast.Constant):
            parts[-1] = ast.Constant(str(parts[-1].value) + str(value.value))
        elif value.value:
            parts.append(value)
    return parts


def _imports(node: ast.AST) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield 0, alias.name, ()
    elif isinstance(node, ast.ImportFrom):
        yield node.level, node.module or "", tuple(alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        given = node.args[0].value
        if name in ("import_module", "__import__") and isinstance(given, str) and given:
            module = given.lstrip(".")
            yield len(given) - len(module), module, ()


# -- parts of a stage -----------------------------------------------------------------------------


def _defining_modules(part: Any) -> set[str]:
    """Names of the modules that define a function, or a class and its bases."""
    defined = part.__mro__ if isinstance(part, type) else (part,)
    return {str(each.__module__) for each in defined}  # None for what was made by exec


def _serialisable(value: Any, parts: list[Any]) -> Any:
    """Convert a value to a JSON-serialisable one for `digest`.

    Objects are represented by their types, since their settings are in the stage's `depends_on`.

    Args:
        value: a field or a part of a stage.
        parts: functions and classes found so far, whose code is hashed; extended in place.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_serialisable(item, parts) for item in value]
    if isinstance(value, dict):
        return [[_serialisable(k, parts), _serialisable(v, parts)] for k, v in value.items()]
    if isinstance(value, functools.partial):
        return _serialisable([value.func, value.args, value.keywords], parts)
    if inspect.ismethod(value):
        return _serialisable([value.__self__, value.__func__], parts)
    if inspect.isfunction(value):
        if any(value is part for part in parts):
            return value.__qualname__
        parts.append(value)
        given = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [value.__qualname__, _serialisable(given, parts)]
    if inspect.isbuiltin(value):
        return value.__qualname__
    from torch import nn  # imported late: most users of this module do not need torch

    kind = value if isinstance(value, type) else type(value)
    # A container's own type says nothing about the networks in it.
    inner = {type(part) for part in value.modules()} if isinstance(value, nn.Module) else set()
    parts += [kind, *inner]
    return [kind.__qualname__, *sorted(each.__qualname__ for each in inner)]
