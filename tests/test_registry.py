"""registry.py: plugins are listed without an import, and broken ones affect no others."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glua_bench.cli import scaffold
from glua_bench.console import ask
from glua_bench.errors import ConfigError, PluginError
from glua_bench.registry import GROUPS, Registry, load_dataset

METHOD = '''
from glua_bench.method import Method

class Mine(Method):
    """Does what it can.

    More of it.
    """

    name = "mine"
    reference = "nobody, nowhere"
    needs = "source images"
    strange = {[1]: 2} if False else {**{}}

    def optimizers(self):
        return {}

    def step(self, batch, context):
        return {}

    def predict(self, images, domain):
        return images
'''
SELECTOR = '''
from glua_bench import selection

class Newest(selection.Selector):
    """The newest."""

    name: str = "newest"
    reference = "none"
    needs = "nothing"

    def score(self, candidate):
        return 1.0
'''


def one_sentence(error: pytest.ExceptionInfo[PluginError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", ")."))
    return text


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Create an installed distribution with one module."""
    before = set(sys.modules)

    def install(distribution: str, text: str, kind: str, *points: str) -> Path:
        site = tmp_path / f"site-{distribution}"
        module = site / f"{distribution}_module.py"
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        module.write_text(text)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = [f"[{GROUPS[kind]}]", *points]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(site))
        return module

    yield install
    for name in set(sys.modules) - before:
        if name.endswith("_module"):
            del sys.modules[name]


# -- built-ins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GROUPS)
def test_built_ins_are_listed_and_load(kind: str) -> None:
    registry = Registry(kind)
    ours = [entry for entry in registry.entries() if entry.origin == "glua-bench"]
    assert ours and [entry.name for entry in ours] == sorted(entry.name for entry in ours)
    for entry in ours:
        assert not entry.error and entry.summary.endswith(".")
        assert entry.attributes["needs"] and entry.attributes["reference"]
        assert registry.load(entry.name).name == entry.name  # type: ignore[attr-defined]


def test_the_first_methods_datasets_and_selectors_are_there() -> None:
    assert {"source_only", "global_only", "local_only", "glua"} <= {
        entry.name for entry in Registry("method").entries()
    }
    assert {"phantom", "mscmr"} <= {entry.name for entry in Registry("dataset").entries()}
    assert {"last", "source_val"} <= {entry.name for entry in Registry("selector").entries()}


def test_listing_imports_neither_torch_nor_a_plugin(write: Callable[..., Path]) -> None:
    file = write(METHOD.replace("from glua", "raise SystemExit('imported')\nfrom glua", 1))
    script = f"""
        import sys
        from pathlib import Path
        from glua_bench.registry import GROUPS, Registry
        for kind in GROUPS:
            for entry in Registry(kind, [Path({str(file)!r})]).entries():
                print(entry.name, entry.summary)
        loaded = set(sys.modules)
        assert not loaded & {{"torch", "numpy", "timm", "glua_bench.method", "glua_bench.methods"}}
        assert not any(name.startswith("glua_bench.methods.") for name in loaded)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mine Does what it can.\n" in done.stdout and "source_only " in done.stdout


# -- misses and doubles ---------------------------------------------------------------------------


def test_a_miss_names_the_nearest_and_all() -> None:
    with pytest.raises(PluginError, match="did you mean 'source_only'") as error:
        Registry("method").load("sorce_only")
    assert "glua" in one_sentence(error) and "--plugin" in str(error.value)
    with pytest.raises(PluginError) as error:
        Registry("dataset").load("zzzzzzzz")
    assert "did you mean" not in str(error.value) and "phantom" in one_sentence(error)


def test_two_plugins_of_one_name_are_an_error(
    write: Callable[..., Path], install: Callable[..., Path]
) -> None:
    clash = write(METHOD.replace('"mine"', '"source_only"'), "clash.py")
    with pytest.raises(PluginError, match="Two methods are called 'source_only'") as error:
        Registry("method", [clash])
    assert "glua-bench" in one_sentence(error) and str(clash) in str(error.value)

    install("alpha", METHOD, "method", "mine = alpha_module:Mine")
    assert Registry("method").entry("mine").origin == "alpha"
    with pytest.raises(PluginError, match="Two methods are called 'mine'"):
        Registry("method", [write(METHOD)])
    install("beta", METHOD, "method", "mine = beta_module:Mine")
    with pytest.raises(PluginError, match="alpha and beta|beta and alpha"):
        Registry("method")


def test_the_same_file_given_twice_is_one_plugin(write: Callable[..., Path]) -> None:
    file = write(METHOD)
    assert Registry("method", [file, file]).load("mine").name == "mine"  # type: ignore[attr-defined]


# -- single files ---------------------------------------------------------------------------------


def test_a_file_may_hold_several_kinds(write: Callable[..., Path]) -> None:
    file = write(METHOD + SELECTOR)
    entry = Registry("method", [file]).entry("mine")
    assert (entry.summary, entry.origin) == ("Does what it can.", str(file))
    assert entry.attributes["reference"] == "nobody, nowhere"
    method = Registry("method", [file]).load("mine")
    selector = Registry("selector", [file]).load("newest")
    assert method.__module__ == selector.__module__
    assert Registry("method", [file]).load("mine") is method
    with pytest.raises(PluginError):
        Registry("dataset", [file]).load("mine")


def test_files_of_one_name_in_two_folders_stay_apart(write: Callable[..., Path]) -> None:
    first = write(METHOD, "a/plugin.py")
    second = write(METHOD.replace('"mine"', '"yours"'), "b/plugin.py")
    registry = Registry("method", [first, second])
    mine, yours = registry.load("mine"), registry.load("yours")
    assert (mine.name, yours.name) == ("mine", "yours")  # type: ignore[attr-defined]
    for loaded, file in ((mine, first), (yours, second)):
        assert sys.modules[loaded.__module__].__file__ == str(file)


def test_a_class_that_is_no_literal_plugin_is_passed_over(write: Callable[..., Path]) -> None:
    """Base classes without a name and helpers are not plugins."""
    file = write(METHOD.replace('name = "mine"', "") + "\nclass Helper:\n    name = 'helper'\n")
    assert {e.name for e in Registry("method", [file]).entries()} == {
        e.name for e in Registry("method").entries()
    }


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\0", b"class A(\n", b"\xff\xfe\0\1"])
def test_a_file_that_is_not_python_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_bytes(content)
    with pytest.raises(PluginError, match="correct it") as error:
        Registry("method", [tmp_path / "mine.py"])
    assert "mine.py" in one_sentence(error)


def test_a_file_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.py", tmp_path):
        with pytest.raises(PluginError, match="--plugin") as error:
            Registry("method", [path])
        one_sentence(error)


# -- broken plugins -------------------------------------------------------------------------------

RAISES = "import no_such_library_anywhere\n" + METHOD


@pytest.mark.parametrize(
    ("text", "point", "said"),
    [
        ("def broken(:\n", "broken_module:Mine", "SyntaxError"),
        (METHOD, "broken_module:Yours", "no class Yours"),
        (METHOD, "no_such_module:Mine", "no_such_module"),
        (METHOD, "broken_module.inner:Mine", "not a package"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_error_and_harms_no_other(
    text: str, point: str, said: str, install: Callable[..., Path]
) -> None:
    install("broken", text, "method", f"mine = {point}", "also = broken_module:Mine")
    registry = Registry("method")
    entry = registry.entry("mine")
    assert said in entry.error and "\n" not in entry.error and entry.origin == "broken"
    assert entry in registry.entries()
    with pytest.raises(PluginError, match="'mine' from broken") as error:
        registry.load("mine")
    one_sentence(error)
    assert registry.load("source_only").name == "source_only"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RAISES, "no_such_library_anywhere"),
        ("1 / 0\n" + METHOD, "ZeroDivisionError"),
        ("raise SystemExit(0)\n" + METHOD, "SystemExit"),
        (METHOD.replace("(Method)", "(Missing)"), "Missing"),
    ],
)
def test_a_plugin_that_raises_on_import_is_one_sentence(
    text: str, said: str, write: Callable[..., Path], install: Callable[..., Path]
) -> None:
    install("broken", text, "method", "mine = broken_module:Mine")
    with pytest.raises(PluginError, match=said) as error:
        Registry("method").load("mine")
    assert "broken" in one_sentence(error) and "correct or remove it" in str(error.value)
    assert Registry("method").load("source_only").name == "source_only"  # type: ignore[attr-defined]


def test_a_file_that_raises_on_import_leaves_no_half_module(write: Callable[..., Path]) -> None:
    file = write("1 / 0\n" + METHOD)
    for _ in range(2):
        with pytest.raises(PluginError, match="ZeroDivisionError"):
            Registry("method", [file]).load("mine")
    file.write_text(METHOD)
    assert Registry("method", [file]).load("mine").name == "mine"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Mine:\n    name = 'mine'\n", "not a subclass of glua_bench.method.Method"),
        ("def Mine():\n    pass\n", "not a subclass"),
        (SELECTOR.replace("Newest", "Mine"), "not a subclass"),
        (METHOD.replace('"mine"', '"yours"'), "`name` = 'yours'"),
    ],
)
def test_a_class_of_another_kind_is_one_sentence(
    text: str, said: str, install: Callable[..., Path]
) -> None:
    install("wrong", text, "method", "mine = wrong_module:Mine")
    with pytest.raises(PluginError, match=said) as error:
        Registry("method").load("mine")
    assert "wrong" in one_sentence(error)


def test_an_attribute_that_cannot_be_read_does_not_end_the_listing(
    install: Callable[..., Path],
) -> None:
    text = METHOD.replace("strange = {[1]: 2} if False else {**{}}", "strange = {[1]: 2}")
    install("strange", text, "method", "mine = strange_module:Mine")
    entry = Registry("method").entry("mine")
    assert entry.attributes["name"] == "mine" and "strange" not in entry.attributes


@pytest.mark.parametrize(
    ("name", "said"),
    [("../mine", "begins with a dot"), ("a/b", "contains a path separator"), (" ", "is empty")],
)
def test_a_plugin_s_name_cannot_lead_out_of_the_runs(
    write: Callable[..., Path], name: str, said: str
) -> None:
    file = write(METHOD.replace('"mine"', f'"{name}"'))
    with pytest.raises(PluginError) as error:
        Registry("method", [file]).load(name)
    assert said in one_sentence(error) and str(file) in str(error.value)


@pytest.mark.parametrize("name", ["sweeps", "mlartifacts"])
def test_a_dataset_is_not_called_like_another_directory_of_the_runs(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"name: {name}\n")
    with pytest.raises(PluginError, match="is a reserved directory name"):
        Registry("dataset", [file]).load(name)
    with pytest.raises(ConfigError, match=f"'{name}' is not a valid name for a dataset"):
        scaffold.new_description(name, tmp_path, tmp_path, ask)


def test_a_name_with_a_fold_is_the_fold_of_the_dataset(tmp_path: Path) -> None:
    registry = Registry("dataset")
    assert registry.fold_of("mmwhs") == ("mmwhs", 1) and registry.fold_of("mmwhs", 4)[1] == 4
    for fold in (1, 3):
        assert registry.fold_of("abdomen_fold3", fold) == ("abdomen", 3)
    with pytest.raises(ConfigError, match="mmwhs_fold2 is fold 2 of 'mmwhs' and --fold is 3"):
        registry.fold_of("mmwhs_fold2", 3)
    with pytest.raises(PluginError, match="No dataset is called 'mine_fold2'"):
        load_dataset("mine_fold2", tmp_path, ())
    for name, fold in (("mmwhs_fold2", 1), ("mmwhs", 2)):
        found = load_dataset(name, tmp_path, (), fold)
        assert (found.name, found.fold, found.fold_name) == ("mmwhs", 2, "mmwhs_fold2")
    with pytest.raises(ConfigError, match="'mmwhs' has no fold 6; it has folds 1 to 5"):
        load_dataset("mmwhs_fold6", tmp_path, ())


def test_a_dataset_that_is_called_like_a_fold_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from glua_bench.conformance import TinyDataset\n"
        "from glua_bench.task import Dataset\n"
        "class Own(TinyDataset, Dataset):\n"
        "    name = 'mmwhs_fold2'\n"
        "    def __init__(self, root):  # of a time before folds\n"
        "        super().__init__(root)\n"
    )
    found = load_dataset("mmwhs_fold2", tmp_path, [file])
    assert (found.name, found.fold_name) == ("mmwhs_fold2", "mmwhs_fold2")
    with pytest.raises(ConfigError, match="'mmwhs_fold2' has no fold 2; it has one split"):
        load_dataset("mmwhs_fold2", tmp_path, [file], 2)
