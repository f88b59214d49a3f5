"""The installed package: versions, contents, imports between its parts, promises of the README."""

from __future__ import annotations

import ast
import configparser
import hashlib
import importlib
import importlib.resources
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
import yaml

import glua_bench
from glua_bench.registry import GROUPS, Registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
CONTENT = ("methods", "datasets", "sweeps", "reports")
NOT_PACKAGED = ("tests", "benchmarks", "docs")  # folders with Python files that no user installs

RUN = (
    "python3 -m venv .venv && . .venv/bin/activate && pip install . "
    "&& glua-bench run --method glua --dataset phantom"
)
TEST = "python3 -m venv .venv && . .venv/bin/activate && pip install tox && tox"


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def files() -> Iterator[Path]:
    """Yield every file of the repository that git does not ignore, without using git."""
    passed_over = re.compile(r"\.(?!ci$|gitignore$)|build$|dist$|__pycache__$|.*\.egg-info$")
    waiting = [ROOT]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            if passed_over.match(path.name) or path == ROOT / "runs":
                continue
            if path.is_dir():
                waiting.append(path)
            else:
                yield path


def modules(folder: str) -> list[Path]:
    """Return every Python file of a package and its sub-packages."""
    return sorted((ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    """Return the import name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "glua_bench" else ("glua_bench", *parts))
    return name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Return all modules that a file imports; "from a import b" gives "a" and "a.b"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively: write the whole name"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def content_of(path: Path) -> set[str]:
    """Return the content packages that a file imports."""
    return {
        name
        for name in CONTENT
        if any(f"{module}.".startswith(f"glua_bench.{name}.") for module in imports(path))
    }


# -- what is installed ----------------------------------------------------------------------------


def test_one_version():
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert {
        PYPROJECT["project"]["version"],
        glua_bench.__version__,
        distribution("glua-bench").version,
        str(yaml.safe_load(text("CITATION.cff"))["version"]),
        newest[1],
    } == {glua_bench.__version__}


def test_every_folder_of_code_is_packaged():
    folders = {path.parent.relative_to(ROOT) for path in files() if path.suffix == ".py"}
    folders = {folder for folder in folders if folder.parts[0] not in NOT_PACKAGED}
    assert {folder.parts[0] for folder in folders} == {"glua_bench", *CONTENT}
    mapped = SETUPTOOLS["package-dir"]
    assert mapped == {"glua_bench": "glua_bench"} | {f"glua_bench.{n}": n for n in CONTENT}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    assert set(SETUPTOOLS["packages"]) == {dotted(ROOT / f / "__init__.py") for f in folders}


def test_every_module_is_found_in_the_package():
    expected = {dotted(path) for folder in ("glua_bench", *CONTENT) for path in modules(folder)}

    def fail(name: str) -> None:
        raise ImportError(name)

    found = pkgutil.walk_packages(glua_bench.__path__, "glua_bench.", onerror=fail)
    names = {module.name for module in found}
    # An editable installation maps the sub-packages in a finder that pkgutil cannot walk.
    names |= {f"glua_bench.{name}" for name in CONTENT}
    for name in CONTENT:
        package = importlib.import_module(f"glua_bench.{name}")
        found = pkgutil.walk_packages(package.__path__, f"glua_bench.{name}.", onerror=fail)
        names |= {module.name for module in found}
    assert names | {"glua_bench"} == expected


@pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="the checkout may be tested directly")
def test_tox_tests_the_installed_package():
    for package in ("glua_bench", *(f"glua_bench.{name}" for name in CONTENT)):
        file = importlib.import_module(package).__file__
        assert file is not None and Path(file).is_relative_to(sys.prefix), file


def test_tox_knows_the_supported_pythons_and_runs_one_of_them():
    project, tox = PYPROJECT["project"], configparser.ConfigParser()
    tox.read_string(text("tox.ini"))
    listed = [re.fullmatch(r".* :: 3\.(\d+)", line) for line in project["classifiers"]]
    minors = [int(found[1]) for found in listed if found is not None]
    assert minors == list(range(minors[0], minors[-1] + 1)) and len(minors) >= 4
    assert project["requires-python"] == f">=3.{minors[0]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{minors[0]}"
    environments = [f"py3{minor}" for minor in minors]
    assert tox["tox"]["labels"].split(" = ") == ["\npythons", ", ".join(environments)]
    assert f"testenv:py3{{{','.join(map(str, minors))}}}" in tox
    # The README's test command takes one Python, or it would take four times as long.
    assert tox["tox"]["env_list"] == "lint, py"


def test_deprecation_warnings_fail_tests():
    filters = PYPROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    named = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    assert filters[:3] == [f"error::{name}" for name in named]
    for line in filters[3:]:  # exceptions name the message, the category and the library
        action, message, category, *_ = line.split(":")
        assert action == "ignore" and len(message) > 10 and category in named, line


def test_package_is_typed():
    assert importlib.resources.files("glua_bench").joinpath("py.typed").is_file()


@pytest.mark.parametrize("kind", GROUPS)
def test_every_entry_point_loads(kind):
    declared = PYPROJECT["project"]["entry-points"][GROUPS[kind]]
    points = entry_points(group=GROUPS[kind])
    ours = {p.name: p.value for p in points if p.dist is not None and p.dist.name == "glua-bench"}
    assert ours == declared, "install the package again: its entry points have changed"
    for name in declared:
        assert Registry(kind).load(name).__module__.startswith("glua_bench.")


def test_every_method_and_dataset_has_an_entry_point():
    """A file that defines a plugin but is not registered would be dead code."""
    for kind in ("method", "dataset"):
        declared = set(PYPROJECT["project"]["entry-points"][GROUPS[kind]].values())
        for path in modules(f"{kind}s"):
            module = importlib.import_module(dotted(path))
            for name, value in vars(module).items():
                if inspect.isclass(value) and value.__module__ == module.__name__:
                    plugin = isinstance(vars(value).get("name"), str) and hasattr(value, "needs")
                    assert plugin == (f"{dotted(path)}:{name}" in declared), f"{path}: {name}"


def test_console_script():
    (script,) = entry_points(group="console_scripts", name="glua-bench")
    assert callable(script.load())


def test_every_library_is_declared():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("-", "_")
        for requirement in [*project["dependencies"], *extras["test"], *extras["cluster"]]
    }
    packages = {
        "yaml": "pyyaml",
        "sklearn": "scikit_learn",
        "PIL": "pillow",
        "google": "protobuf",
    }  # import name → package name, where they differ
    for folder in ("glua_bench", *CONTENT):
        for path in modules(folder):
            used = {name.split(".")[0] for name in imports(path)}
            used -= {*sys.stdlib_module_names, "glua_bench"}
            missing = {packages.get(name, name).lower() for name in used} - declared
            assert not missing, f"{path} imports {missing}: add it to pyproject.toml"


# -- the arrows -----------------------------------------------------------------------------------


def test_the_harness_reaches_content_only_through_the_registry():
    package = ROOT / "glua_bench"
    reached = {
        path.relative_to(package).as_posix(): content_of(path) for path in modules("glua_bench")
    }
    # Commands and the Python interface wire things together: they hand the figures to the run.
    allowed = {
        "cli/api.py": {"reports"},
        "cli/data.py": {"reports"},
        "cli/plugins.py": {"sweeps"},
        "cli/reports.py": {"reports", "sweeps"},
        "cli/runs.py": {"reports"},
        "cli/sweeps.py": {"reports", "sweeps"},
    }
    assert {name: found for name, found in reached.items() if found} == allowed


@pytest.mark.parametrize("folder", CONTENT)
def test_content_packages_do_not_know_each_other(folder):
    for path in modules(folder):
        assert content_of(path) <= {folder}, path


def test_only_verification_imports_medpy():
    """medpy is GPL-3: it is the reference of tests and of `score --verify`, imported when used."""
    users = [
        path
        for folder in ("glua_bench", *CONTENT)
        for path in modules(folder)
        if any(name.split(".")[0] == "medpy" for name in imports(path))
    ]
    assert [path.name for path in users] == ["files.py"] and users[0].parent.name == "scoring"
    source = users[0].read_text(encoding="utf-8")
    assert re.findall(r"^( *)(?:from|import) medpy", source, re.MULTILINE) == [" " * 8]


def test_commands_know_no_tracker_but_its_protocol():
    """Another tracker is one file (tests/support/folder_tracker.py), selected in one place."""
    users = {
        path.name
        for folder in ("glua_bench", *CONTENT)
        for path in modules(folder)
        if "MLflowMirror" in path.read_text(encoding="utf-8")
        or any(name.split(".")[0] == "mlflow" for name in imports(path))
    }
    assert users == {"tracker.py", "mlflow_mirror.py", "mlflow_store.py", "fetch.py"}


@pytest.mark.parametrize("arguments", [None, ["list"], ["--help"], ["run", "--help"]])
def test_answers_without_the_heavy_libraries(arguments, tmp_path):
    heavy = {"torch", "mlflow", "optuna", "matplotlib", "timm", "lightning_fabric", "pandas"}
    code = (
        "import sys, glua_bench.cli as cli\n"
        f"arguments = {arguments!r}\n"
        "if arguments is not None:\n"
        "    cli.app(arguments, standalone_mode=False)\n"
        f"loaded = {heavy!r} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(loaded)}' if loaded else 0)\n"
    )
    # Not in the checkout, where the folder glua_bench/ would be taken for the package.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert arguments != ["list"] or {"source_only", "phantom"} <= set(done.stdout.split())


@pytest.mark.parametrize("name", sorted(SETUPTOOLS["packages"]))
def test_packages_say_what_they_hold(name):
    docstring = importlib.import_module(name).__doc__
    assert docstring and docstring.strip().split("\n")[0].endswith(".")


# -- what is promised -----------------------------------------------------------------------------


def test_licence_is_the_standard_text():
    assert (
        hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
        == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )
    assert PYPROJECT["project"]["license"] == yaml.safe_load(text("CITATION.cff"))["license"]
    notice = text("NOTICE")
    assert "medpy" in notice and "GNU General Public License" in notice


def test_the_conda_environment_has_the_dependencies_of_the_package():
    renamed = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    environment = yaml.safe_load(text("environment.yml"))
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "glua-bench" and pip["pip"][-1] == "."
    given = [re.fullmatch(r"([\w-]+)(.*)", line) for line in [*conda, *pip["pip"][:-1]]]
    found = {renamed.get(one[1].lower(), one[1].lower()): one[2] for one in given if one}
    assert found.pop("python") == PYPROJECT["project"]["requires-python"]
    assert found.pop("pip")
    everywhere = [line for line in PYPROJECT["project"]["dependencies"] if ";" not in line]
    own = [re.fullmatch(r"([\w-]+)(.*)", line) for line in everywhere]
    assert found == {one[1].lower(): one[2] for one in own if one}


@pytest.mark.slow
def test_the_image_installs_from_its_wheelhouse_alone(tmp_path):
    """No Docker runs here: its pip command resolves the wheel without an index (`--dry-run`)."""
    pytest.importorskip("setuptools", "77")
    steps = re.sub(r"\\\n\s*", "", text("Dockerfile")).splitlines()
    words = [line.split() for line in steps if line and not line.startswith("#")]
    assert ["COPY", "wheelhouse", "/wheelhouse"] in words
    assert text(".dockerignore").split("\n")[1:3] == ["*", "!wheelhouse"]
    users = [line[1] for line in words if line[0] == "USER"]
    assert users and users[-1] not in ("root", "0")
    (line,) = (line for line in steps if "pip install" in line)
    install = shlex.split(line.removeprefix("RUN ").split("&&")[0])
    assert install[:2] == ["pip", "install"] and "--no-index" in install

    tree, wheels = tmp_path / "tree", tmp_path / "wheelhouse"
    for path in files():  # a build writes into its tree
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, tree]
    subprocess.run([*pip, *build], check=True)
    install = [str(wheels) if word == "/wheelhouse" else word for word in install[1:]]
    dry = ["--dry-run", "--no-deps", "--ignore-installed"]
    done = subprocess.run([*pip, *install, *dry], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Would install glua-bench-{glua_bench.__version__}" in done.stdout


def test_the_citation_names_title_people_and_version():
    """The BibTeX entry in the README has the same fields."""
    citation = yaml.safe_load(text("CITATION.cff"))
    people = [author["name"] for author in citation["authors"]]
    assert people == [author["name"] for author in PYPROJECT["project"]["authors"]]
    assert people == ["glua-bench contributors"]
    entry = re.search(r"^@software\{glua_bench,\n(.*?)^\}", text("README.md"), re.M | re.S)
    assert entry is not None
    fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", entry[1], re.M))
    assert fields["title"].replace("{", "").replace("}", "") == citation["title"]
    assert fields["author"] == "{" + people[0] + "}"
    assert fields["version"] == citation["version"]
    assert fields.get("url") == citation.get("repository-code")


def test_readme_opens_with_the_two_commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", text("README.md"), re.MULTILINE | re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == [RUN, TEST]
    before = text("README.md").split("## ")[0]
    assert RUN in before and TEST in before


def test_readmes_test_command_is_what_ci_runs():
    assert [line for line in text("README.md").splitlines() if line.endswith("&& tox")] == [TEST]
    assert "grep -m 1 '&& tox$' README.md" in text(".ci/run")
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert tox["tox"]["env_list"].replace(" ", "").split(",") == ["lint", "py"]
    assert tox["testenv:lint"]["commands"].split("\n")[1:] == ["ruff check", "ruff format --check"]
    assert "{[testenv:types]commands}" in tox["testenv:py"]["commands"]
    assert "mypy" in tox["testenv:types"]["commands"]
    assert "pytest" in tox["testenv:py"]["commands"]


def test_readmes_run_command_names_what_exists():
    words = shlex.split(RUN.rpartition("&&")[2])
    assert words[:2] == ["glua-bench", "run"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert set(options) == {"--method", "--dataset"}
    assert Registry("method").entry(options["--method"]).error == ""
    assert Registry("dataset").entry(options["--dataset"]).error == ""


def test_ci_can_be_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(script)], check=True)


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in files() if p.suffix == ".md"])
def test_links_resolve(page):
    content = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", content):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page} links to {target}"


def test_nothing_names_a_machine_or_a_package_index():
    # In two halves, so that this file passes its own test.
    names = ["/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/", "/Us" + "ers/"]
    hosts = ["pypi" + ".org", "python" + "hosted", "index" + "-url", "download.py" + "torch"]
    pattern = re.compile("|".join([rf"(?<![\w.]){n}" for n in names] + hosts))
    for path in files():
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
