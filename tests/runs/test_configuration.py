"""configuration.py: a run from its config.yaml, and comparisons from files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import small_request

from glua_bench.console import Progress
from glua_bench.errors import UserError
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry
from glua_bench.runs import configuration, execution, executor, matrix
from glua_bench.runs.plan import PlannedRun, chosen_selectors, plan
from glua_bench.runs.request import RunOptions, RunRequest

Call = Callable[..., tuple[int, str, str]]
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "mask_ratio.yaml"


@pytest.fixture(scope="module")
def planned(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedRun:
    """Plan a run whose every kind of setting is changed, and write its config.yaml."""
    root = tmp_path_factory.mktemp("config") / "runs"
    sets = ("slices=3", "method.lr=0.00123", "perturbation=2", "candidates=3")
    changes = {"seed": 7, "augmentation": "photometric", "scenario": "supervised"}
    found = plan(small_request(phantom_root, root, *sets, **changes))
    found.directory.start({}, found.stages)
    return found


def beside(planned: PlannedRun, **changes: Any) -> RunRequest:
    """Return the options of the machine, as given beside --config."""
    asked = planned.request
    given = {"data_root": asked.data_root, "runs_root": asked.runs_root, "mlflow": False}
    return RunRequest(**{"method": "", "dataset": "", "device": "cpu", **given, **changes})


def test_a_runs_configuration_starts_the_same_run(planned: PlannedRun, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "my config.yaml"
    copy.parent.mkdir()
    shutil.copy(planned.directory.path / "config.yaml", copy)
    for file in (planned.directory.path / "config.yaml", copy):
        told: list[str] = []
        request = configuration.of_run(file, beside(planned), (), told.append)
        again = plan(request)
        assert again.id == planned.id and again.config == planned.config
        assert again.directory.path == planned.directory.path and told == []


def test_options_override_the_file_and_that_is_told(planned: PlannedRun) -> None:
    file = planned.directory.path / "config.yaml"
    told: list[str] = []
    asked = beside(planned, seed=1, steps=3, assignments=["method.lr=0.5", "batch_size=4"])
    named = {"seed", "steps", "assignments"}
    request = configuration.of_run(file, asked, named, told.append)
    config = plan(request).config
    assert (config.seed, config.method_config["lr"], config.batch_size) == (1, 0.5, 4)
    assert config.candidates == 3 and config.scenario == "supervised"
    assert told == [
        f"Overrides {file}: seed = 1 instead of 7, batch_size = 4 instead of 2, "
        "method.lr = 0.5 instead of 0.00123."
    ]
    other = beside(planned, method="slaug", scenario="uda")
    told.clear()
    request = configuration.of_run(file, other, {"method", "scenario"}, told.append)
    assert request.method == "slaug" and not any("method." in a for a in request.assignments)
    assert told[-1] == f"The settings of 'source_only' in {file} are not used."
    with pytest.raises(UserError, match="--preset has no effect"):
        configuration.of_run(file, beside(planned, preset="paper"), {"preset"})


def test_the_selectors_of_the_file_are_evaluated_again(phantom_root: Path, tmp_path: Path) -> None:
    asked = small_request(phantom_root, tmp_path / "runs", selectors="agreement,im")
    planned = plan(asked)
    planned.directory.start({}, planned.stages)
    file = planned.directory.path / "config.yaml"
    chosen = ("last", "im", "agreement")
    told: list[str] = []
    request = configuration.of_run(file, beside(planned), (), told.append)
    assert plan(request).config.selectors == chosen and told == []
    fewer = beside(planned, selectors="bnm")
    request = configuration.of_run(file, fewer, {"selectors"}, told.append)
    assert plan(request).config.selectors == ("last", "bnm")
    assert told == [f"Overrides {file}: selectors = last,bnm instead of last,im,agreement."]


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")), text
    return text


def lined(values: Mapping[str, Any] | str, file: Path) -> Path:
    text = values if isinstance(values, str) else yaml.safe_dump(dict(values), sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shade": 3}, ["unknown 'shade'", "line "]),
        ({"step": 3}, ["unknown 'step'", "did you mean 'steps'"]),
        ({"grid": None}, ["'grid' is missing"]),
        ({"direction": None}, ["'direction' is missing; add it"]),
        ({"steps": 0}, ["steps = 0 is out of range", "line 1"]),
        ({"seed": "one"}, ["seed = 'one' has the wrong type"]),
        ({"method": "glue"}, ["No method is called 'glue'", "line 1:"]),
        ({"dataset": "fantom"}, ["No dataset is called 'fantom'", "line 2:"]),
        ({"method_config": {"mask_ratio": 0.1}}, ["'mask_ratio' is not a setting", "line 12"]),
        ({"method_config": {"lr": -1}}, ["method.lr = -1", "out of range"]),
        ({"segmenter": 3}, ["'segmenter' must be a mapping"]),
        ({"entries": []}, ["unknown 'entries'"]),
        ({"selectors": "last"}, ["'selectors' must be a list"]),
        ({"selectors": ["last", "imm"]}, ["No selector is called 'imm'"]),
        ({"selectors": ["oracle"]}, ["reads labels of test cases"]),
        ({"scenario": "external"}, ["imported from another tool"]),
    ],
)
def test_a_file_of_another_version_is_refused_with_its_line(
    planned: PlannedRun, tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    values = {**planned.config.to_dict(), **change}
    values = {name: value for name, value in values.items() if value is not None}
    file = lined(values, tmp_path / "config.yaml")
    with pytest.raises(UserError) as error:
        configuration.of_run(file, beside(planned), ())
    text = sentence(error)
    assert text.startswith(f"{file}, line "), text
    assert all(word in text for word in words if not word.startswith("line ")), text
    lines = file.read_text(encoding="utf-8").splitlines()
    place = int(text.split(", line ")[1].split(":")[0])
    ((key, value),) = change.items()
    if value is not None:
        inner = next(iter(value)) if isinstance(value, dict) else key
        assert lines[place - 1].strip().startswith(f"{inner}:"), (place, lines[place - 1])


def test_an_older_file_takes_the_defaults_and_says_so(planned: PlannedRun, tmp_path: Path) -> None:
    values = planned.config.to_dict()
    del values["candidates"], values["method_config"]["optimizer"]
    told: list[str] = []
    file = lined(values, tmp_path / "config.yaml")
    assert plan(configuration.of_run(file, beside(planned), (), told.append)).config.candidates == 5
    assert told == [
        f"{file} lacks candidates, method.optimizer; the defaults of this version are used."
    ]


def test_files_of_another_kind_name_their_command(planned: PlannedRun, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    sweep = root / "sweeps" / "mask_ratio.yaml"
    for file, words in (
        (sweep, "this is a sweep, not a run's configuration; use glua-bench sweep"),
        (EXAMPLE, "this is a comparison, not a run's configuration; use glua-bench compare"),
        (tmp_path / "absent.yaml", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words) as error:
            configuration.of_run(file, beside(planned), ())
        assert str(file) in sentence(error)
    with pytest.raises(UserError, match="this is a run's configuration, not a comparison"):
        file = planned.directory.path / "config.yaml"
        configuration.comparison([], file, {}, beside(planned).shared(), ())


# -- comparisons ----------------------------------------------------------------------------------


def entered(file: Path, shared: RunOptions, **given: Any) -> list[matrix.Cell]:
    return configuration.comparison([], file, given, shared, ()).cells()


def test_the_example_compares_settings_of_one_method(phantom_root: Path) -> None:
    cells = entered(EXAMPLE, RunOptions(data_root=phantom_root))
    entries = list(dict.fromkeys(cell.entry for cell in cells))
    assert entries == [
        *("source_only", "supervised", "glua"),
        *("glua, top 10 %", "glua, top 50 %", "glua, photometric"),
    ]
    assert len(cells) == 3 * len(entries) and {c.request.preset for c in cells} == {"quick"}
    by_entry = {cell.entry: cell.request for cell in cells}
    assert "method.mask_ratio=0.1" in by_entry["glua, top 10 %"].assignments
    assert by_entry["glua"].assignments == by_entry["source_only"].assignments == []
    assert by_entry["glua, photometric"].augmentation == "photometric"
    fewer = entered(EXAMPLE, RunOptions(data_root=phantom_root), seeds=1, bounds=False)
    assert [cell.entry for cell in fewer] == entries[2:]


def test_the_benchmark_compares_every_method_of_this_repository(phantom_root: Path) -> None:
    cells = entered(EXAMPLE.with_name("benchmark.yaml"), RunOptions(data_root=phantom_root))
    ours = {entry.name for entry in Registry("method").entries()}
    assert {cell.request.method for cell in cells} == ours
    assert {cell.request.preset for cell in cells} == {"benchmark"}
    tasks = {(cell.request.direction, cell.request.seed) for cell in cells}
    assert tasks == {(direction, seed) for direction in ("mr-ct", "ct-mr") for seed in range(3)}


def test_shared_settings_reach_entries_and_bounds(tmp_path: Path) -> None:
    file = lined(
        "dataset: phantom\nseeds: 1\nset: {grid.size: 64, slices: 3}\nsteps: 9\nentries:\n"
        "  - {name: a, method: slaug, set: [lr=0.5]}\n",
        tmp_path / "c.yaml",
    )
    shared = RunOptions(assignments=["slices=1"], steps=4)
    asked = configuration.comparison([], file, {}, shared, {"assignments", "steps"})
    cells = matrix.comparison(asked.methods, asked.datasets, (), 1, asked.shared)
    texts = ["grid.size=64", "slices=3", "slices=1"]
    assert [cell.request.assignments for cell in cells] == [texts, texts, [*texts, "method.lr=0.5"]]
    assert {cell.request.steps for cell in cells} == {4}


def test_a_file_chooses_the_selectors_of_all_entries(tmp_path: Path) -> None:
    for written in ("agreement, im", "[im, agreement]"):
        text = f"dataset: phantom\nselectors: {written}\nentries: [{{method: glua}}]\n"
        cells = entered(lined(text, tmp_path / "c.yaml"), RunOptions())
        found = {chosen_selectors(cell.request.selectors) for cell in cells}
        assert found == {("last", "im", "agreement")}
    shared = RunOptions(selectors="bnm")
    asked = configuration.comparison([], tmp_path / "c.yaml", {}, shared, {"selectors"})
    assert asked.shared.selectors == "bnm"


HEAD = "dataset: phantom\nentries:\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (HEAD + "  - {method: glue}\n", 3, "No method is called 'glue'"),
        (HEAD + "  - {method: glua}\n  - {method: glua}\n", 4, "two entries are called 'glua'"),
        (HEAD + "  - {method: glua, sets: {}}\n", 3, "did you mean 'set'"),
        (HEAD + "  - method: glua\n    set:\n      lr_x: 1\n", 5, "did you mean 'method.lr_d'"),
        (HEAD + "  - method: sifa\n    set: {mask_ratio: 1}\n", 4, "of the method 'sifa'"),
        (HEAD + "  - method: glua\n    set: {mask_ratio: 7}\n", 4, "is out of range"),
        (HEAD + "  - method: glua\n    set: [mask_ratio]\n", 4, "not of the form name=value"),
        (HEAD + "  - {method: glua, steps: 3}\n", 3, "must be the same for all entries"),
        (HEAD + "  - {method: glua, set: {batch_size: 3}}\n", 3, "must be the same for all"),
        (HEAD + "  - {method: glua, augmentation: heavy}\n", 3, "cannot be 'heavy'"),
        (HEAD + "  - {method: glua, name: supervised}\n", 3, "is the name of a bound"),
        (HEAD + "  - {method: source_only}\n", 2, "no entry besides the bounds"),
        (HEAD + "  - glua\n", 3, "must be a mapping"),
        ("dataset: phantom\nentries: glua\n", 2, "'entries' must be a list"),
        ("dataset: fantom\nentries: [{method: glua}]\n", 1, "No dataset is called 'fantom'"),
        ("entries: [{method: glua}]\n", 1, "'dataset' is missing"),
        ("dataset: phantom\nseeds: 0\nentries: [{method: glua}]\n", 2, "at least 1"),
        ("dataset: phantom\nseed: 1\nentries: [{method: glua}]\n", 2, "did you mean 'seeds'"),
        ("dataset: phantom\ndirections: ct-ct\nentries: [{method: glua}]\n", 2, "no direction"),
        ("dataset: phantom\nset: {method.lr: 1}\nentries: [{method: glua}]\n", 2, "which method"),
        ("dataset: phantom\nselectors: imm\nentries: [{method: glua}]\n", 2, "called 'imm'"),
        ("dataset: phantom\nselectors: []\nentries: [{method: glua}]\n", 2, "names no selector"),
        (HEAD + "  - {method: glua, selectors: im}\n", 3, "must be the same for all entries"),
        ("dataset: phantom\nset: {lr: 1}\nentries: [{method: glua}]\n", 2, "of all runs"),
    ],
)
def test_a_wrong_comparison_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    file = lined(text, tmp_path / "c.yaml")
    with pytest.raises(UserError) as error:
        entered(file, RunOptions())
    found = sentence(error)
    assert found.startswith(f"{file}, line {line}: ") and words in found, found


PICKY = '''
from glua_bench.errors import ConfigError
from glua_bench.method import Method
from glua_bench.methods.source_only import SourceOnly

class Picky(SourceOnly, Method):
    """Decline every dataset."""

    name = "picky"
    reference = needs = "none"

    def check(self, cases):
        raise ConfigError(f"'picky' cannot use {cases.target} target cases; give more.")
'''


def test_what_a_dataset_cannot_serve_is_refused_before_anything_runs(
    tmp_path: Path, phantom_root: Path
) -> None:
    plugin = tmp_path / "picky.py"
    plugin.write_text(PICKY, encoding="utf-8")
    text = HEAD + "  - {method: slaug}\n  - name: hard to please\n    method: picky\n"
    file = lined("bounds: false\nseeds: 1\n" + text, tmp_path / "c.yaml")
    place = {"data_root": phantom_root, "runs_root": tmp_path / "runs"}
    shared = RunOptions(preset="quick", plugins=[plugin], **place)
    with pytest.raises(UserError, match="'picky' cannot use 1 target cases") as error:
        matrix.plan(entered(file, shared))
    assert sentence(error).startswith(f"{file}, line 7: ") and not (tmp_path / "runs").exists()


def test_entry_names_are_in_table_tracker_and_report(
    call: Call, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(run: PlannedRun, environment: Mapping[str, str]) -> tuple[int, str]:
        execution.execute(run, Progress(enabled=False))
        return 0, ""

    monkeypatch.setattr(executor, "start_process", here)
    shown = tmp_path / "tracker"
    shown.mkdir()
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "folder_tracker:FolderTracker")
    monkeypatch.setenv("FOLDER_TRACKER", str(shown))
    monkeypatch.chdir(tmp_path)
    sets = "{segmenter.width: 4, segmenter.depth: 3, grid.size: 32, grid.spacing: 7, batch_size: 2}"
    file = lined(
        f"dataset: phantom\nseeds: 1\npreset: quick\nsteps: 2\nset: {sets}\nbounds: no\nentries:\n"
        "  - {name: slow, method: source_only, set: {lr: 1.0e-5}}\n"
        "  - {name: 'fast, twice', method: source_only, set: {lr: 2.0e-3}}\n",
        tmp_path / "my lr.yaml",
    )
    place = ["--data-root", phantom_root, "--device=cpu"]
    code, out, err = call("compare", "--config", file, *place)
    assert code == 0, err
    assert "\nslow " in out and "\nfast, twice " in out
    (group,) = shown.glob("group-*.json")
    nested = json.loads(group.read_text(encoding="utf-8"))
    assert set(nested["members"].values()) == {"slow", "fast, twice"}
    assert nested["name"].startswith("compare slow, fast, twice")
    members = next((tmp_path / "runs" / "comparisons").glob("*.json"))
    code, out, err = call("report", "--runs", members, "--no-pictures", "--out", tmp_path / "page")
    assert code == 0, err
    table = (tmp_path / "page" / "tables").glob("*.csv")
    assert any("fast, twice" in each.read_text(encoding="utf-8") for each in table)
    assert "fast, twice" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for run in (tmp_path / "runs").glob("phantom/*/*"):
        assert RunDirectory.open(run).done
    refused = call("compare", "--config", file, "--set", "method.lr=1", *place)
    assert refused[0] == 2 and "does not say of which entry" in refused[2]
