"""README.md and docs/: every command shown exists, and runs in the order of its page.

Commands run in this process with a tiny phantom and budget (`BUDGET`, `STANDS_FOR`). One that
cannot run here is in `NOT_RUN` with the reason, and is still parsed.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from glua_bench.cli import app
from glua_bench.config import parse_overrides
from glua_bench.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
SHELLS = ("sh", "console", "bash", "shell")

SMALL = (
    "--preset quick --steps 2 --device cpu --no-mlflow --set grid.size=32 --set grid.spacing=7 "
    "--set grid.slice_spacing=20 --set batch_size=2 --set candidates=1 --set segmenter.width=4 "
    "--set segmenter.depth=3"
)
# Command → options that are appended, and so replace those shown.
BUDGET = {
    "run": SMALL,
    "run --config": SMALL.removeprefix("--preset quick "),
    "compare": f"{SMALL} --seeds 1 --jobs 1",
    "ablate": f"{SMALL} --seeds 1 --jobs 1",
    "sweep": "--executor debug --workers 1 --trials 1 --seeds 1 --steps 2 --device cpu --no-mlflow",
    "new-dataset": "--yes",
    "data show": "--preset quick",
    "data check": "--jobs 1",
    "data prepare": "--jobs 1",
    "data fingerprint": "--jobs 1",
    "data export": "--jobs 1",
}
# Word of a command → what stands for it here; of a pattern, the first match.
STANDS_FOR = {
    "--repeats=2": "--repeats=1",
    "runs/phantom/glua/ID": "runs/phantom/glua/*",
    "runs/phantom/glua/3f51f28ebd3c/config.yaml": "runs/phantom/glua/*/config.yaml",
    "config.yaml": "runs/phantom/glua/*/config.yaml",
    "runs/phantom/source_only/ID": "runs/phantom/source_only/*",
    "runs/phantom/source_only/ID/predictions": "runs/phantom/source_only/*/predictions",
    "mydata.yaml": "phantom",
    "runs/comparisons/NAME.json": "runs/comparisons/*",
    "/path/to/volumes": "livers",
    "scan.nii.gz": "volumes/ct_train/ct_train_1003_image.nii.gz",
}
# Pattern of commands that do not run → why.
NOT_RUN = {
    r"python3 -m venv .*|\. \.venv/bin/activate|pip install \.|pip install tox|tox": ".ci/run does",
    r"pip install ('glua-bench\[cluster\]'|--editable .*)": "needs an index of packages",
    r"export GLUA_BENCH_\w+=.*": "a path or server of the user",
    r"glua-bench compare --config docs/examples/benchmark.yaml": "takes many hours",
    r"git clone .*": "needs the internet",
    r"glua-bench .*\b(mmwhs|mmwhs_sifa|mscmr|ctmr2d|abdomen)\b.*": "needs patients' files",
    r"glua-bench .*--plugin liver\.py.*": "test_docs.py checks the page's class",
    r"pytest -m cluster|\.ci/.*": ".ci/run starts the servers",
    r"python -m build .*|pip (wheel|install) .*wheelhouse .*": "needs an index of packages",
    r"docker .*": "needs Docker",
    r"tensorboard .*": "starts a server",
    r"pip install monai surface-distance": "libraries that benchmarks compare with",
    r"python -m benchmarks.*": "takes minutes; test_benchmarks.py runs it with --quick",
    r"glua-bench --install-completion": "changes the user's shell",
    r"glua-bench predict --model model (patient_t1.*|imagesTs)": "needs several channels",
    r"glua-bench sweep .*--executor slurm.*|glua-bench worker .*": "needs a cluster",
    r"glua-bench sweep mask_ratio --workers 4": "needs PostgreSQL; with 2 workers it runs",
    r"glua-bench report --from-mlflow": "needs runs in MLflow; tests/records fetch them",
    r"glua-bench .*\bcoral\b.*|pytest test_coral\.py": "test_docs.py runs it with the page's code",
}


def shown(page: str) -> list[str]:
    """Return the commands of a page's shell blocks, and of other blocks that show a prompt."""
    commands = []
    blocks = re.findall(
        r"^ *```(\w*)\n(.*?)^ *```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    for language, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip()
            prompted = line.startswith("$ ")
            line = line.removeprefix("$ ")
            if language in SHELLS and ("$ " not in block or prompted):
                pass
            elif not (prompted or (not language and line.startswith("glua-bench "))):
                continue
            line = re.sub(r"\s+[#|>] .*", "", line)  # a comment, or what reads the output
            commands += [part.strip() for part in line.split("&&") if part.strip()]
    return [c for c in commands if not c.startswith("#") and "error:" not in c]


def reason(command: str) -> str:
    """Return why a command does not run here, or ""."""
    return next((why for text, why in NOT_RUN.items() if re.fullmatch(text, command)), "")


def split(words: list[str]) -> tuple[str, Any, list[str]]:
    """Return name, Typer command and arguments of the words after `glua-bench`."""
    command, name = get_command(app), ""
    while words and words[0] in getattr(command, "commands", {}):
        command, name = command.commands[words[0]], f"{name} {words[0]}".strip()
        words = words[1:]
    return name, command, words


SHOWN = [(page, command) for page in PAGES for command in shown(page)]


def test_commands_are_found_and_the_table_of_exceptions_is_used() -> None:
    assert len(SHOWN) > 60
    assert {"README.md", "docs/tutorial.md", "docs/faq.md"} <= {page for page, _ in SHOWN}
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for _, command in SHOWN), f"unused: {pattern}"
    programs = {shlex.split(c)[0] for _, c in SHOWN if not reason(c)}
    assert programs == {"glua-bench"}, programs


@pytest.mark.parametrize("page", sorted({page for page, _ in SHOWN}))
def test_every_command_shown_parses(page: str) -> None:
    """Options exist and take their values; methods, datasets and settings exist."""
    others = {"supervised"}
    for command in shown(page):
        program, *words = shlex.split(command)
        if program != "glua-bench":
            continue
        if words[0] == "import":
            others.add(words[1])
        name, parsed, words = split(words)
        if not name:
            assert set(words) <= {option for p in parsed.params for option in p.opts}, command
        if not name or "--help" in words:
            continue
        values = parsed.make_context(name, list(words)).params
        if values.get("plugin") or values.get("plugins"):
            continue  # what a plugin offers is not installed
        for kind, keys in (("method", ("method", "methods")), ("dataset", ("dataset", "datasets"))):
            named = [values[key] for key in keys if values.get(key)]
            for each in ",".join(named).split(",") if named else ():
                plain = each.partition("+")[0]
                if plain not in others and not plain.endswith(".yaml"):
                    assert Registry(kind).entry(plain).error == "", command
        parse_overrides(list(values.get("assignments") or ()))


def test_commands_within_sentences_exist() -> None:
    """`glua-bench …` between backticks names a command and options that exist."""
    found = 0
    for page in PAGES:
        for text in re.findall(r"`glua-bench ([^`]*)`", (ROOT / page).read_text("utf-8")):
            words = text.replace("\\|", "|").split()
            if words[0] in ("COMMAND", "--version"):
                continue
            name, command, rest = split(words)
            assert name or "|" in text, f"{page}: {text}"
            known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            assert {word for word in rest if word.startswith("-")} <= known, f"{page}: {text}"
            found += 1
    assert found > 20


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, write_livers: Callable[[Path], None]
) -> Iterator[Path]:
    """Prepare a directory with small volumes, in which runs train in this process."""
    from glua_bench.console import Progress
    from glua_bench.datasets.phantom.dataset import Phantom, generate
    from glua_bench.errors import RunFailure, UserError
    from glua_bench.runs import execution, executor

    def start(run: Any, environment: Any) -> tuple[int, str]:
        try:
            execution.execute(run, Progress(enabled=False))
        except (UserError, RunFailure) as error:
            return error.exit_code, str(error)
        return 0, ""

    root = tmp_path_factory.mktemp("desk")
    ids = {"ct": [1001, 1002, 1003, 1004], "mr": [1001, 1002, 1003, 1007]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("GLUA_BENCH_CACHE", str(root / ".cache"))
        patch.delenv("GLUA_BENCH_DATA", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(executor, "start_process", start)
        # Where `phantom` and the tutorial would generate 72 volumes.
        generate(Phantom().root, ids=ids, voxel_scale=3.0, workers=1)
        shutil.copytree(Phantom().root, "volumes")
        write_livers(root / "livers")
        yield root


def small(command: str) -> list[str]:
    """Return the words of a command with a tiny budget and the small phantom."""
    words = []
    for word in shlex.split(command)[1:]:
        word = STANDS_FOR.get(word, word)
        if (ROOT / word).is_file() and not Path(word).exists():
            word = str(ROOT / word)  # an example of this repository
        words.append(str(sorted(Path().glob(word))[0]) if "*" in word else word)
    name = split(words)[0]
    if name == "run" and "--config" in words:
        name = "run --config"
    return words + shlex.split(BUDGET.get(name, ""))


def run(page: str, desk: Path) -> None:
    """Run the commands of a page in its order, beginning with the runs of the README's."""
    for path in desk.iterdir():
        if path.name not in ("volumes", "livers", ".cache", ".runs"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if page != "README.md":
        if not Path(".runs").is_dir():
            run("README.md", desk)
            shutil.rmtree("runs")
        shutil.copytree(".runs", "runs")
    for command in shown(page):
        if reason(command):
            continue
        done = CliRunner().invoke(app, small(command))
        assert done.exit_code == 0, f"{page}: {command}\n{done.output[-3000:]}\n{done.exception!r}"
        assert done.output.strip(), f"{page}: {command} printed nothing"
    if page == "README.md" and not Path(".runs").is_dir():
        shutil.copytree("runs", ".runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not reason(c) for c in shown(page))]
)
def test_the_commands_of_a_page_run_in_its_order(page: str, desk: Path) -> None:
    run(page, desk)
    if page == "docs/tutorial.md":
        (table,) = re.findall(r"\\input\{(.*?)\}", (ROOT / page).read_text("utf-8"))
        text = Path(f"{table}.tex").read_text(encoding="utf-8")
        assert "\\toprule" in text and "slaug" in text and "glua" in text
