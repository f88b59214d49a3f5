"""Which code can change a result, and its digest: derived from imports, for ids and stage keys.

Starting from what trains, from what scores and from the method, every module that an `import`
reaches counts, wherever in a file the statement stands. Only code counts: comments, docstrings
and layout do not. Names count as modules are called, never where they lie, so an installation in
another place gives the same digest.

Three kinds of modules do not count: those in `NO_RESULT`; the standard library; and libraries,
which are the packages that the harness itself depends on and whatever an installer put into its
folder, unless it registers plugins (`environment.json` names the libraries' versions).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from types import CellType
from typing import TYPE_CHECKING, Any

import glua_bench
from glua_bench.config import digest
from glua_bench.errors import PluginError
from glua_bench.registry import GROUPS, PLUGIN_FILE, module_spec
from glua_bench.syntax import Import, normal_form

if TYPE_CHECKING:
    from glua_bench.method import Method, Stage

PACKAGE = "glua_bench"
# Where trainings start. A dataset's code is not reached: it counts by what it hands over, which
# are files, readings, structures and splits (`runs.Fingerprints`) and the grid (`RunConfig`).
TRAINING = (f"{PACKAGE}.runs",)
# What is computed from finished weights: it can change scores, and no weight.
SCORING = tuple(f"{PACKAGE}.{name}" for name in ("evaluation", "metrics", "selection", "selectors"))
# Modules that training reaches and that change neither weights nor scores, each with the reason.
NO_RESULT: Mapping[str, str] = {
    f"{PACKAGE}.carried": "keeps with a run what segments new volumes",
    f"{PACKAGE}.console": "shows progress, and asks a user",
    f"{PACKAGE}.documents": "reads descriptions of datasets, which count by what they say",
    f"{PACKAGE}.errors": "the types of what is refused",
    f"{PACKAGE}.facts": "measures images for `carried`",
    f"{PACKAGE}.files": "places what was computed",
    f"{PACKAGE}.identity": "names what counts",
    f"{PACKAGE}.interruption": "ends a process; the run goes on in another as if it had not",
    f"{PACKAGE}.registry": "finds the classes that count",
    f"{PACKAGE}.suspicion": "compares what `facts` measures",
    f"{PACKAGE}.syntax": "reads code in order to name it",
    f"{PACKAGE}.tracking": "records what was computed",
}


def code_version(*parts: Any, scoring: bool = False) -> str:
    """The package's version, and a digest of all code behind trained weights.

    It is computed once in a process: a process goes on with the code that it started with.

    Args:
        parts: the method's class; or classes, functions and objects that a stage is made of.
        scoring: count what scores the weights, too.
    """
    homes = {home for part in parts for home in _homes(part)}
    harness = (*TRAINING, *SCORING) if scoring else TRAINING
    return f"{glua_bench.__version__}+{code_digest(harness, tuple(sorted(homes)))}"


def stage_key(method: Method, stage: Stage) -> dict[str, Any]:
    """What a stage's result depends on besides the run's settings: each of its fields, and code.

    Methods that share a component (as `glua` and `global_only` share the style transfer) have
    one key for its stage, although their own files differ. A stage before it may have changed the
    weights that it starts from, so it counts, too.

    Args:
        method: whose stage it is.
        stage: one of `method.stages()`.

    Returns:
        What `config.digest` takes.
    """
    before = itertools.takewhile(lambda other: other.name != stage.name, method.stages())
    parts: list[Any] = []
    stages = []
    for each in (*before, stage):
        values = {item.name: getattr(each, item.name) for item in fields(each)}
        values["step"], values["optimizers"] = each.trained_by(method)
        trained = [method.get_submodule(name) for name in each.modules]
        stages.append([_described(values, parts), _described(trained, parts)])
    if any(part.__module__ not in sys.modules for part in parts):
        parts.append(type(method))  # the method loaded it from somewhere
    return {"stages": stages, "code": code_version(*parts)}


def reached(harness: Sequence[str], homes: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """The modules whose code counts, with their files, sorted.

    Args:
        harness: names of the harness's modules to start from.
        homes: names of other modules to start from.
    """
    left_out = {*NO_RESULT, *SCORING} - set(harness)
    found: dict[Path, str] = {}
    libraries: set[str] = set()
    # The harness comes first, since whatever it imports from elsewhere is a library.
    for names in (harness, homes):
        waiting = [module for module in map(_module, names) if module is not None]
        while waiting:
            module = waiting.pop()
            if module.path in found or module.name in left_out:
                continue
            if not _counts(module, libraries):
                continue
            found[module.path] = module.label
            ours = _top(module.name) == PACKAGE
            for name in _names(module):
                if ours and _top(name) != PACKAGE:
                    libraries.add(_top(name))
                elif _top(name) not in libraries:
                    waiting += filter(None, [_module(name) or _beside(module, name)])
            waiting += [] if ours else _held(module)
    return sorted((label, path) for path, label in found.items())


@functools.cache
def code_digest(harness: tuple[str, ...], homes: tuple[str, ...] = ()) -> str:
    """A digest of the code of what `reached` finds, computed once in a process."""
    counted = [[label, _read(path).digest] for label, path in reached(harness, homes)]
    # Where two modules have one name, their code decides the order, never where they lie.
    return digest(sorted(counted), 10)


# -- modules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A module with a file, imported or not."""

    name: str
    path: Path
    is_package: bool
    loaded: Any = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """Its name, for one file alone the file's: `--plugin` calls it by its whole path."""
        return self.path.stem if "." not in self.name and not self.is_package else self.name

    @property
    def root(self) -> Path:
        """The folder in which its name begins."""
        above = list(self.path.parents)
        return above[min(self.name.count(".") + self.is_package, len(above) - 1)]


def _module(name: str) -> _Module | None:
    """A module by its name; None for what is none, or has no file, as built-in ones."""
    return _of(sys.modules[name], name) if name in sys.modules else _found(name)


def _of(loaded: Any, name: str) -> _Module | None:
    path = getattr(loaded, "__file__", None)
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    return _Module(name, Path(path).resolve(), hasattr(loaded, "__path__"), loaded)


@functools.cache
def _found(name: str) -> _Module | None:
    """A module that was not imported yet, which finds it without running it."""
    try:
        spec = module_spec(name)
    except Exception:  # finders of other packages may raise anything
        return None
    if not spec.has_location or spec.origin is None:
        return None
    path = Path(spec.origin)
    is_package = spec.submodule_search_locations is not None
    return _Module(name, path.resolve(), is_package) if path.is_file() else None


def _beside(module: _Module, name: str) -> _Module | None:
    """A module beside a plugin's, whose folder may be put on the path only when it runs."""
    path = module.root.joinpath(*name.split("."))
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return _Module(name, file, file.name == "__init__.py")
    return None


def _counts(module: _Module, libraries: set[str]) -> bool:
    """Whether a module is no library."""
    top = _top(module.name)
    if top == PACKAGE or top.startswith(PLUGIN_FILE):
        return True
    if top in sys.stdlib_module_names or top in libraries:
        return False
    return not _installed_into(module.root) or top in _registering()


def _top(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _installed_into(folder: Path) -> bool:
    """Whether an installer keeps its books in a folder."""
    return folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


@functools.cache
def _registering() -> set[str]:
    """The packages that register plugins."""
    return {_top(point.module) for group in GROUPS.values() for point in entry_points(group=group)}


def _names(module: _Module) -> Iterator[str]:
    """The names of what a module imports: modules, packages that they lie in, and others."""
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


def _held(module: _Module) -> list[_Module]:
    """What a module has imported under a name that no text shows, e.g. a file by its path."""
    held = []
    for value in list(vars(module.loaded).values()) if module.loaded is not None else ():
        if inspect.ismodule(value):
            held.append(_of(value, value.__name__))
        elif inspect.isclass(value) or inspect.isfunction(value):
            held.append(_module(str(value.__module__)))
    return [each for each in held if each is not None]


# -- code -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """What counts of a file: its code, and the imports in it."""

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
            return _Read(hashlib.sha256(text.encode()).hexdigest(), imports)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # a file that cannot be parsed counts as it is, like compiled ones
    return _Read(hashlib.sha256(content).hexdigest(), ())


# -- what a stage is made of ----------------------------------------------------------------------


def _homes(part: Any) -> set[str]:
    """Names of the modules that define a function, or a class and its bases."""
    defined = part.__mro__ if isinstance(part, type) else (part,)
    return {str(each.__module__) for each in defined}  # None for what was made by exec


def _described(value: Any, parts: list[Any]) -> Any:
    """A value for `config.digest`.

    Objects count by their types: the settings that made them are those of `depends_on`.

    Args:
        value: a stage's field, or what it consists of.
        parts: the functions and classes met so far, whose code counts; grows.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(item, parts) for item in value]
    if isinstance(value, dict):
        return [[_described(k, parts), _described(v, parts)] for k, v in value.items()]
    if isinstance(value, functools.partial):
        return _described([value.func, value.args, value.keywords], parts)
    if inspect.ismethod(value):
        return _described([value.__self__, value.__func__], parts)
    if inspect.isfunction(value):
        if any(value is part for part in parts):
            return value.__qualname__
        parts.append(value)
        given = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [value.__qualname__, _described(given, parts)]
    if inspect.isbuiltin(value):
        return value.__qualname__
    from torch import nn  # not above: who only reads files does not need it

    kind = value if isinstance(value, type) else type(value)
    # A container of networks tells nothing of them.
    inner = {type(part) for part in value.modules()} if isinstance(value, nn.Module) else set()
    parts += [kind, *inner]
    return [kind.__qualname__, *sorted(each.__qualname__ for each in inner)]
