"""request.py: the same request as Python, as a command line and as JSON."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from glua_bench import cli
from glua_bench.cli.options import with_options
from glua_bench.errors import ConfigError
from glua_bench.runs import plan as planning
from glua_bench.runs.executor import child_command
from glua_bench.runs.request import RunOptions, RunRequest

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
PATHS = st.builds(Path, TEXTS)
REQUESTS = st.builds(
    RunRequest,
    method=TEXTS,
    dataset=TEXTS,
    direction=st.none() | TEXTS,
    seed=st.integers(),
    scenario=TEXTS,
    preset=st.none() | TEXTS,
    assignments=st.lists(TEXTS, max_size=3),
    augmentation=st.none() | TEXTS,
    steps=st.none() | st.integers(),
    data_root=st.none() | PATHS,
    runs_root=PATHS,
    device=TEXTS,
    devices=st.integers(min_value=1),
    precision=st.none() | TEXTS,
    plugins=st.lists(PATHS, max_size=3),
    oracle=st.booleans(),
    mlflow=st.booleans(),
)


def parsed(words: list[str]) -> RunRequest:
    """Return the request that a command receives."""
    found: list[RunRequest] = []
    app = typer.Typer()

    @app.command()
    @with_options()
    def command(request: RunRequest) -> None:
        found.append(request)

    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return found[0]


@given(REQUESTS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_request_survives_json_and_the_command_line(request_: RunRequest) -> None:
    assert RunRequest.from_json(request_.to_json(), "request.json") == request_
    assert parsed(request_.words()) == request_


def test_words_leave_out_what_is_the_default() -> None:
    request = RunRequest("glua", "phantom", mlflow=False, assignments=["a=1", "b=2"])
    words = "--method glua --dataset phantom --set a=1 --set b=2 --no-mlflow"
    assert request.words() == words.split()
    assert request.shared().words() == words.split()[4:]
    assert request.shared().request(method="glua", dataset="phantom") == request


@pytest.mark.parametrize("text", ['{"method": "glua"}', '{"fold": 2}', "[]", "{", "3"])
def test_a_file_of_another_version_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="^x.json does not hold the options of this version"):
        RunRequest.from_json(text, "x.json")
    (tmp_path / "x.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["glua-bench", "run-request", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1 and "x.json" in err


def test_a_started_process_has_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = RunRequest("glua", "phantom", runs_root=tmp_path / "a run", seed=3, device="cpu")
    planned: Any = type("Planned", (), {"id": "abc", "request": request})
    program, script, *words = child_command(planned)
    assert (program, Path(script).name) == (sys.executable, "__main__.py")
    found = []

    def plan(request: RunRequest, report: Any) -> None:
        found.append(request)
        raise ConfigError("enough.")

    monkeypatch.setattr(planning, "plan", plan)
    monkeypatch.setattr(sys, "argv", ["glua-bench", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert found == [request]


FIELD = '    shade: Annotated[int, typer.Option(help="How dark.")] = 1\n'
PROGRAM = f"""
import importlib.util, sys
from pathlib import Path
from types import SimpleNamespace

spec = importlib.util.find_spec("glua_bench.runs.request")
source = Path(spec.origin).read_text()
marker = "    preset: Annotated["
assert source.count(marker) == 1
module = importlib.util.module_from_spec(spec)
sys.modules["glua_bench.runs.request"] = module
exec(compile(source.replace(marker, {FIELD!r} + marker), spec.origin, "exec"), vars(module))

from glua_bench import cli
from glua_bench.runs import executor, matrix
from glua_bench.runs import plan as planning
from glua_bench.sweeps import command, trial

found = []

class Enough(Exception):
    pass

def seen(*given):
    found.append(given)
    raise Enough

def call(*words):
    try:
        cli.app([*words, "--shade", "3"] if words[0] != "run-request" else words)
    except Enough:
        return found.pop()

planning.plan = matrix.plan = command.open_study = seen
task = "--dataset", "phantom"
asked, _ = call("run", "--method", "glua", *task)
assert asked.shade == 3 and "--shade 3" in " ".join(asked.words())
for words in (["compare", "--methods", "glua"], ["ablate", "--method", "glua"]):
    cells, _ = call(*words, *task)
    assert len(cells) > 2 and {{cell.request.shade for cell in cells}} == {{3}}
started = executor.child_command(SimpleNamespace(id="abc", request=cells[0].request))
again, _ = call(*started[2:])
assert again == cells[0].request and again.shade == 3

definition, base, *_ = call("sweep", "mask_ratio")
assert base.shade == 3
stored = module.RunOptions.from_json(base.to_json(), "request.json")
requests = trial.requests(definition, stored, command.first_values(definition))
assert {{request.shade for request in requests}} == {{3}}
"""


def test_a_new_field_is_an_option_of_every_command_and_reaches_the_runs(tmp_path: Path) -> None:
    assert not hasattr(RunOptions, "shade")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
