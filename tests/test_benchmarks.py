"""benchmarks/: the command, its table and JSON, and that what it counts and compares is right."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def python(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, of which `benchmarks` is imported.

    A command that a test has called in this process may have set PYTHONSAFEPATH.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env={**own, **more}
    )


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "benchmarks", *words)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    names = ("steps.source_only", "surface.medpy")
    done = run(*names, "--quick", "--rounds", "2", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    whole = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert set(whole) == {"schema", "machine", "rows"} and whole["schema"] == 1
    machine = whole["machine"]
    assert machine["threads"] == 1 and machine["cores"] >= 1 and machine["processor"]
    assert {"python", "torch", "numpy", "scipy"} <= set(machine["versions"])
    assert re.fullmatch(r"[0-9a-f]{40}|", machine["commit"])
    rows = {row["name"]: row for row in whole["rows"]}
    assert list(rows) == [
        "steps.source_only.segment.own",
        "steps.source_only.segment.roofline",
        "surface.medpy",
    ]
    for name, row in rows.items():
        assert len(row["ratios"]) == 2 and len(row["seconds"]) == 2, name
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high, name
        assert f"| `{name}` | {row['compared']} | {row['median']:.3g} (" in done.stdout
    own, surface = rows["steps.source_only.segment.own"], rows["surface.medpy"]
    assert own["aim"] == "≥ 0.75" and own["verdict"] == (
        "met" if own["median"] >= 0.75 else "missed"
    )
    assert surface["aim"] is None and surface["verdict"] == ""
    assert "largest difference Dice 0, ASSD" in surface["note"]
    # Neither the table nor the JSON says whose machine this is.
    text = done.stdout + (tmp_path / "rows.json").read_text("utf-8")
    assert str(ROOT) not in text and f"{Path.home()}/" not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_growth_is_a_table_of_its_own(tmp_path: Path) -> None:
    done = run("scale.sweep", "--quick", "--rounds", "1", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["sweep.trials.random", "sweep.trials.tpe"]
    assert all(row["sizes"] == [10, 20] and len(row["values"]) == 2 for row in rows)
    assert "| grows with |" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["surfce"], "no row's name begins with 'surfce'; --list prints the names."),
        (["scale.trials"], "no row's name begins with 'scale.trials'; --list prints the names."),
        (["scale", "loop"], "the rows of 'scale' are a table of their own; name them alone."),
        (
            ["loop", "--page", "x.md"],
            "--page replaces a whole table; name no row, or only 'scale'.",
        ),
        (["--rounds", "0"], "--rounds and --threads must be at least 1."),
    ],
)
def test_a_mistake_ends_in_one_sentence(words: list[str], sentence: str) -> None:
    done = run(*words)
    assert done.returncode == 2 and done.stderr.rstrip().endswith(sentence)
    assert "Traceback" not in done.stderr


def test_names_are_listed_without_measuring() -> None:
    listed = run("--list").stdout.splitlines()
    assert {"steps.glua", "surface", "prepare", "start", "scale.memory"} <= set(listed)


def test_ratios_have_a_median_a_spread_and_a_verdict(load: Any, tmp_path: Path) -> None:
    rows = load("rows")
    row = rows.ratio_row("a", "b", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], rows.Aim(0.9))
    assert row.ratios == (0.5, 1.0, 1.5) and row.quartiles == (0.75, 1.0, 1.25)
    assert row.verdict == "missed" and rows.Aim(1, least=True).met(1.0)
    assert rows.Row("a", "b", note="needs monai").as_json()["median"] is None
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    rows.into_page(page, "table", "new \\1")
    assert (
        page.read_text() == "before\n<!-- table: begin -->\nnew \\1\n<!-- table: end -->\nafter\n"
    )
    with pytest.raises(SystemExit, match="lacks the comments <!-- scale: begin -->"):
        rows.into_page(page, "scale", "new")


def test_a_step_consists_of_the_convolutions_that_are_recorded(load: Any) -> None:
    """Operations by the formula, and as many calls with as many gradients as the step has."""
    images = torch.rand(2, 3, 8, 8)
    first, second = torch.rand(4, 3, 3, 3), torch.rand(5, 4, 1, 1)
    weights = [first.requires_grad_(), second.requires_grad_()]

    def step() -> None:
        out = F.conv2d(F.conv2d(images, weights[0], padding=1).relu(), weights[1])
        torch.autograd.grad(out.sum(), weights)

    found = load("convolutions").of_step(step)
    forward = [2 * 2 * 64 * 4 * 3 * 9, 2 * 2 * 64 * 5 * 4]
    # Images need no gradients: the first convolution has one backward product, the second two.
    assert found.operations == 2 * forward[0] + 3 * forward[1]
    assert [str(func).split(".")[1] for func, _ in found.calls] == [
        "convolution",
        "convolution",
        "convolution_backward",
        "convolution_backward",
    ]
    assert found.calls[0][1][0].shape == images.shape
    assert found.calls[-1][1][-1] == [False, True, False]
    with load("convolutions").Convolutions() as again:
        found.repeat()
    assert again.operations == found.operations and len(again.calls) == 4


def test_exponents_and_memory(load: Any) -> None:
    scale = load("scale")
    row = scale.Growth("a", "cost", "size", (1.0, 10.0, 100.0), (2.0, 20.0, 2000.0))
    assert row.exponent == pytest.approx(1.5) and row.last_exponent == pytest.approx(2.0)
    assert "| 1.50 (2.00) | 32 × |" in scale.markdown([row])
    assert 10 < scale.peak_memory() < 100_000
    count = scale.count("linear", torch.nn.Linear(3, 5), lambda: None, 1, 1.0)
    assert count.state == 4 * 4 * (3 * 5 + 5) and count.operations == 0
    matrices = torch.rand(4, 8), torch.rand(8, 16)
    count = scale.count("product", torch.nn.Linear(1, 1), lambda: torch.mm(*matrices), 1, 2.0)
    assert count.operations == 2 * (2 * 4 * 8 * 16) and count.kernels == 1
    assert count.moved == 2 * 4 * (4 * 8 + 8 * 16 + 4 * 16)


@pytest.mark.parametrize("other", ["recomputing_step", "whole_pass_step"])
def test_steps_that_recompute_end_in_the_same_weights(load: Any, other: str) -> None:
    """The rows of `recompute` compare equal updates: only the passes differ."""
    steps = load("steps")
    config = steps.configure("sifa", settings=(*steps.SMALL, "method.decoder_dropout=0"))

    def trained(recomputing: bool) -> dict[str, torch.Tensor]:
        ((method, stage, step),) = steps.training_steps(config)
        batch = steps.random_batch(config, method)
        optimizers = stage.trained_by(method)[1]()
        if recomputing:
            context = steps.Context(stage, 0, config.steps, optimizers, lambda: iter(()))
            getattr(steps, other)(method, batch, context)
        else:
            step()
        return {name: value.detach() for name, value in method.named_parameters()}

    ours, theirs = trained(False), trained(True)
    for name, value in ours.items():
        # Adam's first update is ± the learning rate, so that only signs of tiny gradients differ.
        close = torch.isclose(value, theirs[name], atol=1e-5).float().mean()
        assert close > 0.99, name


def test_comparators_are_no_dependencies() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8").lower()
    assert "monai" not in text and "surface-distance" not in text
    code = "import sys, benchmarks.suite; print('monai' in sys.modules, 'torch' in sys.modules)"
    done = python("-c", code, PYTHONPATH="")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_benchmark_that_fails_is_told_and_spares_the_others(load: Any, tmp_path: Path) -> None:
    rows, suite = load("rows"), load("suite")
    lines: list[str] = []
    settings = rows.Settings(1, True, tmp_path, lines.append)

    def broken(settings: Any) -> Any:
        raise ValueError("no file")
        yield

    (row,) = suite.measured(rows.Benchmark("broken", broken), settings, [])
    assert row.note == "failed: ValueError" and row.verdict == "not measured"
    assert lines == ["broken failed: no file"]
