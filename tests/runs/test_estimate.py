"""estimate.py and timing.py: estimates hold every part of a run, and say where they come from."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import QUIET, small_request

from glua_bench.config import DEFAULT_SELECTORS, SELECTORS
from glua_bench.data import cache as cache_module
from glua_bench.records.run_directory import list_runs
from glua_bench.reports.run_figures import draw_run
from glua_bench.runs import execution, trainer
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest
from glua_bench.runs.timing import estimate as module
from glua_bench.runs.timing.estimate import Estimator, breakdown
from glua_bench.runs.timing.parts import parts_of, where_time_went
from glua_bench.scoring.selectors import BatchNuclearNorm

SLOW = 0.5  # seconds that a slow piece takes by the test's clock


class Clock:
    """A clock that only slow pieces advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def slow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*given: Any, **named: Any) -> Any:
            self.now += SLOW
            return function(*given, **named)

        return slowly


def draw_nothing(*given: Any) -> None:
    """Draw no figures; matplotlib's first figure takes much longer than others."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLUA_BENCH_CACHE", str(root))
        yield root


@pytest.fixture(scope="module")
def asked(cached: Path, phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRequest:
    """A request for a run with two stages, the first of which is shared, and four checkpoints."""
    own = "method.adgan_width=4", "method.style_share=2.0", "candidates=4"
    return small_request(
        phantom_root, tmp_path_factory.mktemp("runs"), *own, method="global_only", steps=40
    )


@pytest.fixture(scope="module")
def usual(asked: RunRequest) -> dict[str, float]:
    """The estimate without anything slow."""
    return dict(Estimator(draw_nothing).of(plan(asked)).parts)


def test_an_estimate_has_every_part_of_a_run_and_leaves_nothing(
    usual: dict[str, float], asked: RunRequest, cached: Path
) -> None:
    assert list(usual) == ["slices", "style", "segment", "selectors", "evaluation", "figures"]
    assert all(seconds > 0 for name, seconds in usual.items() if name != "slices")
    assert list_runs(asked.runs_root) == [] and not (cached / "stages").exists()


def test_a_slow_piece_counts_as_often_as_a_run_does_it(
    asked: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector for each checkpoint, a case for each chosen one, every update, all figures."""
    clock, planned = Clock(), plan(asked)
    for each in (module, trainer):
        monkeypatch.setattr(each, "time", clock)

    def parts(request: RunRequest = asked, draw: Any = draw_nothing) -> dict[str, float]:
        return dict(Estimator(draw).of(plan(request)).parts)

    nothing = dict.fromkeys(parts(), 0.0)
    assert parts() == nothing
    method = planned.method_class
    monkeypatch.setattr(BatchNuclearNorm, "of", clock.slow(BatchNuclearNorm.of))
    assert parts() == {**nothing, "selectors": 4 * SLOW}
    monkeypatch.setattr(method, "step", clock.slow(method.step))
    assert parts() == pytest.approx({**nothing, "selectors": 4 * SLOW, "segment": 40 * SLOW})
    monkeypatch.setattr(module, "evaluate", clock.slow(module.evaluate))
    found = parts(draw=clock.slow(draw_nothing))
    # Four selectors have a score; if they chose at random, 2.7 of the four checkpoints.
    assert found["evaluation"] == pytest.approx(2.734 * SLOW, rel=0.001)
    assert found["figures"] == SLOW
    assert parts(replace(asked, oracle=True))["evaluation"] == 4 * SLOW
    few = parts(replace(asked, selectors="last"), None)
    assert (few["evaluation"], few["selectors"], few["figures"]) == (SLOW, 0.0, 0.0)


def test_slices_count_until_they_are_cached(
    asked: RunRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(module, "probe", lambda planned, draw: {
        "slices": SLOW, "style": 1.0, "segment": 1.0, "selectors": 1.0, "evaluation": 1.0,
        "figures": 1.0,
    })  # fmt: skip
    time.sleep(2.1)  # the digest of a file that has just changed is not remembered
    planned = plan(asked)
    estimator = Estimator()
    # Source for training and validation, target for training and test: one volume each.
    assert estimator.of(planned).parts["slices"] == pytest.approx(4 * SLOW)
    assert estimator.of(plan(replace(asked, seed=1))).parts["slices"] == 0  # the first leaves them
    execution.stores(planned, cache_module.SliceCache(), QUIET)
    assert Estimator().of(planned).parts["slices"] == pytest.approx(SLOW)  # the test case


def test_a_stage_that_is_cached_or_trained_by_an_earlier_run_counts_as_none(
    asked: RunRequest, usual: dict[str, float]
) -> None:
    estimator = Estimator()
    first, second, other = (
        estimator.of(plan(request))
        for request in (
            asked,
            replace(asked, assignments=[*asked.assignments, "method.lr=0.002"]),
            replace(asked, seed=1),
        )
    )
    assert first.reused == () and first.parts["style"] > 0
    assert second.reused == ("style",) and second.parts["style"] == 0
    assert other.reused == () and other.parts["style"] > 0  # another seed trains its own
    text = breakdown({**second.parts, "segment": 70.0}, second.reused)
    assert "segment 1:10" in text and text.endswith("style cached")


def test_finished_runs_of_the_same_protocol_say_how_long_it_takes(asked: RunRequest) -> None:
    planned = plan(replace(asked, steps=3))
    seconds = execution.execute(planned, QUIET, draw_run).seconds
    parts = parts_of(planned.directory.read_summary())
    assert list(parts) == ["slices", "style", "segment", "selectors", "evaluation", "figures"]
    assert sum(parts.values()) == pytest.approx(seconds, rel=0.5)
    found = Estimator(draw_run).of(plan(replace(asked, steps=3, seed=1)))
    assert found.basis == "from 1 finished run"
    assert {name: found.parts[name] for name in parts if name != "slices"} == pytest.approx(
        {name: seconds for name, seconds in parts.items() if name != "slices"}
    )
    for changed in ({"oracle": True}, {"selectors": "all"}, {"steps": 4}):
        other = plan(replace(asked, **{"steps": 3, "seed": 1, **changed}))  # type: ignore[arg-type]
        assert module.finished_parts(other) == []


# -- where the time went ---------------------------------------------------------------------------


def summary(training: float = 30.0, steps: tuple[int, ...] = (1, 2, 3), **more: Any) -> Any:
    """The summary of a run with a selector for each step."""
    names = SELECTORS[: len(steps)]
    return {
        "part_seconds": {"slices": 0.0, "samples": 10.0, "evaluation": 30.0, "figures": 20.0},
        "selector_seconds": dict.fromkeys(names, 10.0 / len(names)),
        "stage_seconds": {"segment": training},
        "chosen_steps": dict(zip(names, steps, strict=True)),
        **more,
    }


def test_a_sentence_says_where_the_time_went_if_scoring_took_longer_than_training() -> None:
    text = "Time: selectors took 20 %, evaluation 30 %, training 30 %; --selectors last,im takes "
    text += "less."
    assert where_time_went([summary()]) == where_time_went([summary()] * 2) == text
    hint = "--selectors"
    assert hint not in where_time_went([summary(steps=(1, 2))])
    assert hint not in where_time_went([summary(steps=(5, 5, 5))])  # one checkpoint
    oracle = {"last": 1, "source_val": 2, "im": 3, "oracle": 4}
    assert hint not in where_time_went([summary(chosen_steps=oracle)])
    assert hint in where_time_went([summary(10.0, (5, 5, 5))])  # selectors themselves are slow
    assert where_time_went([summary(training=60.0)]) == where_time_went([]) == ""
    assert where_time_went([{"seconds": 5.0}]) == ""  # of an earlier version


# -- the command line ------------------------------------------------------------------------------


def test_dry_runs_show_the_parts(
    call: Callable[..., tuple[int, str, str]], asked: RunRequest
) -> None:
    words = ["--dataset=phantom", f"--data-root={asked.data_root}", f"--runs={asked.runs_root}"]
    words += [f"--set={text}" for text in asked.assignments if "style" not in text]
    words = [word for word in words if "adgan" not in word]
    words += ["--steps=400", "--preset=quick", "--device=cpu", "--no-mlflow", "--dry-run"]
    code, out, err = call("run", "--method=source_only", *words)
    assert code == 0, err
    assert re.search(r"after about \S+( s)? \(timed on a few steps\): .*segment \d", out)
    code, out, err = call("compare", "--methods=fda", "--seeds=1", "--jobs=2", *words)
    assert code == 0, err
    assert "3 runs, 0 done" in out and re.search(r"in all start \S+.*, .*segment \d", out)


def test_selectors_are_chosen_and_checked(
    call: Callable[..., tuple[int, str, str]], asked: RunRequest
) -> None:
    def names(text: str | None) -> tuple[str, ...]:
        return plan(replace(asked, selectors=text)).config.selectors

    assert names(None) == DEFAULT_SELECTORS and names("all") == SELECTORS
    assert names("snd, im") == ("last", "im", "snd")  # last first, in the order of tables
    assert names("last") == ("last",)
    assert plan(replace(asked, selectors="all")).id == plan(asked).id
    words = ["run", "--method=source_only", "--dataset=phantom", "--dry-run"]
    for given, said in (
        ("sdn", "No selector is called 'sdn'; did you mean 'snd'?"),
        ("", "--selectors '' names no selector"),
        ("last,oracle", "pass --oracle instead"),
    ):
        code, _, err = call(*words, f"--selectors={given}", f"--data-root={asked.data_root}")
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_finished_run_is_not_shown_as_if_it_had_more_selectors(
    call: Callable[..., tuple[int, str, str]], asked: RunRequest, tmp_path: Path
) -> None:
    request = replace(asked, steps=3, method="fda", runs_root=tmp_path / "runs", selectors="im")
    request = replace(request, assignments=[a for a in request.assignments if "method" not in a])
    planned = plan(request)
    execution.execute(planned, QUIET)
    assert set(planned.directory.read_cases()["selector"]) == {"last", "im"}
    words = ["--dataset=phantom", f"--data-root={asked.data_root}", f"--runs={request.runs_root}"]
    words += [f"--set={text}" for text in request.assignments]
    words += ["--steps=3", "--augmentation=geometric", "--preset=quick", "--device=cpu"]
    words += ["--no-mlflow"]
    code, out, _ = call("run", "--method=fda", *words)  # no selectors asked for: as it is
    assert code == 0 and "already done" in out and "other selectors: im" in out
    code, _, err = call("run", "--method=fda", *words, "--selectors=im,bnm,snd")
    assert code == 2 and err.count("\n") == 1
    assert "finished without snd, bnm" in err and "another --runs directory" in err
    more = ["--methods=fda", "--seeds=1", "--no-bounds", "--selectors=bnm", f"--out={tmp_path}"]
    code, out, err = call("compare", *more, *words)
    assert code == 0 and "warning: 1 of the runs was finished without bnm" in err
    assert "1 runs: 0 run now, 1 done before" in out
    left = json.loads((planned.directory.path / "summary.json").read_text())
    assert set(left["selector_seconds"]) == {"last", "im"}
    shutil.rmtree(request.runs_root)
