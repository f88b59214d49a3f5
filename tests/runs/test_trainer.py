"""trainer.py: an interrupted training ends in the same weights, or in a clear error.

Run as a script, this file trains in processes that are killed, raced and distributed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import another_user, damaged
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from glua_bench.config import RunConfig, SegmenterSpec, setting
from glua_bench.conformance import Bench, TinyDataset, first_difference
from glua_bench.conformance.leaks import reachable
from glua_bench.console import Progress
from glua_bench.data.batches import Batches
from glua_bench.data.cache import SliceCache
from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.errors import ConfigError, RunFailure
from glua_bench.files import Damaged
from glua_bench.method import Batch, Context, Method, Role, Stage, TaskInfo
from glua_bench.methods.cycle_translate import CycleTranslate
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs import interruption
from glua_bench.runs.stage_cache import artefact_path
from glua_bench.runs.trainer import (
    Trainer,
    checkpoint_name,
    keep_freed_memory,
    load,
    save,
    stage_order,
    step_seed,
    to_channels_last,
)


@dataclass(frozen=True)
class ToyConfig:
    lr: float = setting(0.05, "learning rate", low=1e-6, high=1.0)


class Toy(Method):
    """Two stages, the first one shared; its losses are means over images.

    So two processes with half a batch each must find the gradients of the whole batch.
    """

    name = "toy"
    Config = ToyConfig

    def __init__(self, task: TaskInfo, config: ToyConfig) -> None:
        super().__init__(task, config)
        self.stem = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, task.classes, 1)
        )
        self.register_buffer("finished", torch.zeros(()))

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                "stem",
                0.5,
                depends_on=(),
                modules=("stem",),
                finish=self.finish,
                step=self.stem_step,
                optimizers=self.stem_optimizers,
            ),
            Stage("segment", decay=0.9),
        )

    def finish(self, context: Context) -> None:
        self.finished += 1

    def stem_optimizers(self) -> dict[str, Optimizer]:
        return {"stem": Adam(self.stem.parameters(), self.config.lr)}

    def stem_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        loss = (self.stem(batch.target) + batch.target).square().mean()
        context.update("stem", loss)
        return {"loss": loss}

    def optimizers(self) -> dict[str, Optimizer]:
        return {
            "head": SGD(self.head.parameters(), self.config.lr, momentum=0.9),
            "more": SGD([self.stem.bias], 0.01),
        }

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        likely = self.predict(batch.target, "target").softmax(1)
        loss = F.cross_entropy(self.predict(batch.source_images, "source"), batch.source_labels)
        loss = loss - 0.1 * (likely * likely.clamp(min=1e-6).log()).sum(1).mean()
        for name in ("head", "more"):
            context.optimizers[name].zero_grad()
        context.backward(loss)
        context.apply("head")
        context.apply("more")
        return {"loss": loss, "likely": likely.max()}

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        return self.head(self.stem(images))


def interrupted(method: type[Toy], at: int) -> type[Toy]:
    """Return the method, interrupted at a step of its last stage."""

    class Interrupted(method):  # type: ignore[misc, valid-type]
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            if context.step == at:
                raise KeyboardInterrupt
            return super().step(batch, context)  # type: ignore[no-any-return]

    return Interrupted


STEPS = 12


def make(
    root: Path,
    method: type[Toy] = Toy,
    run: str = "run",
    fabric: Fabric | None = None,
    checkpoint_seconds: float = 0.0,
    **options: Any,
) -> Trainer:
    """Return a trainer on the tiny dataset; the same call resumes it."""
    dataset = TinyDataset(root / "data")
    dataset.prepare()
    values: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "candidates": 3}
    config = RunConfig(
        method.name,
        dataset.name,
        "plain-inverted",
        dataset.grid("quick"),
        segmenter=SegmenterSpec("unet", 4, 3),
        **{"augmentation": "photometric", **values, **options},
    )
    cache = SliceCache(root / "slices")
    grid = config.grid
    view = dataset.view("plain").on(grid)
    cases = dataset.split("plain", "train")
    source = LabelledStore(
        [cache.image(c.unlabelled(), view) for c in cases],
        [cache.label(c, view) for c in cases],
    )
    target = ImageStore(
        [cache.image(c.unlabelled(), view) for c in dataset.split("inverted", "train")]
    )
    fabric = fabric or Fabric(accelerator="cpu", devices=1, precision=config.precision)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    task = TaskInfo(dataset.name, dataset.structures, grid.size, config.segmenter, 4)
    directory = RunDirectory(root / run, config, "id")
    directory.path.mkdir(parents=True, exist_ok=True)
    return Trainer(
        method(task, ToyConfig()),
        config,
        Batches(
            source, target, 4, config.seed, fabric.device, fabric.global_rank, fabric.world_size
        ),
        fabric,
        directory,
        Progress(enabled=False),
        lambda stage: None if stage.depends_on is None else root / "stages" / f"{stage.name}.pt",
        checkpoint_seconds,
    )


def finish(trainer: Trainer) -> dict[str, Tensor]:
    """Train to the end, and return the final weights."""
    with quiet(trainer):
        trainer.fit()
    return {name: value.clone() for name, value in trainer.method.state_dict().items()}


@contextlib.contextmanager
def quiet(trainer: Trainer) -> Iterator[None]:
    try:
        yield
    finally:
        trainer.batches.close()
        trainer.directory.close()


def log_rows(trainer: Trainer) -> list[dict[str, Any]]:
    lines = (trainer.directory.path / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def last(trainer: Trainer) -> dict[str, Any]:
    return torch.load(trainer.directory.checkpoints / "last.pt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_ends_after_the_step_and_the_next_process_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    expected = finish(make(tmp_path / "whole"))

    class Asked(Toy):
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            if context.step == 4:
                os.kill(os.getpid(), number)
            return super().step(batch, context)

    trainer = make(tmp_path / "own", Asked, checkpoint_seconds=math.inf)
    with interruption.listening(), quiet(trainer), pytest.raises(interruption.Interrupted) as ended:
        trainer.fit()
    assert ended.value.number == number
    assert (last(trainer)["stage"], last(trainer)["step"]) == (1, 5)
    again = make(tmp_path / "own", checkpoint_seconds=math.inf)
    assert first_difference(expected, finish(again)) is None


def test_a_signal_is_heard_only_while_somebody_listens() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with interruption.listening():
        assert not interruption.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.asked()
    assert not interruption.asked() and signal.getsignal(signal.SIGUSR1) == before
    interruption.end_if_asked()


def test_watching_the_candidates_changes_nothing(tmp_path: Path) -> None:
    expected = finish(make(tmp_path / "alone"))
    seen: dict[int, dict[str, Tensor]] = {}
    trainer = make(tmp_path / "watched")

    def watch(step: int) -> None:
        assert not trainer.method.training
        torch.rand(5)  # a watcher may draw random numbers
        seen[step] = {n: v.clone() for n, v in trainer.method.state_dict().items()}

    trainer.watch = watch
    assert first_difference(expected, finish(trainer)) is None
    assert list(seen) == trainer.candidate_steps() and len(seen) == 3
    assert first_difference(seen[STEPS], expected) is None
    for step, weights in seen.items():
        saved = torch.load(trainer.candidate_path(step), weights_only=True)
        assert first_difference(weights, saved) is None


def test_a_resumed_run_shows_the_candidates_that_it_has(tmp_path: Path) -> None:
    expected = finish(make(tmp_path / "whole"))
    first, again = make(tmp_path / "own"), make(tmp_path / "own")
    seen: list[int] = []

    def stop(step: int) -> None:
        if step == 8:
            raise ValueError

    first.watch = stop
    with quiet(first), pytest.raises(ValueError):
        first.fit()
    assert last(first)["step"] == 7  # the last checkpoint precedes the candidate
    again.watch = seen.append
    assert first_difference(expected, finish(again)) is None
    assert seen == [4, 8, 12]
    seen.clear()
    finished = make(tmp_path / "own")
    finished.watch = seen.append
    assert first_difference(expected, finish(finished)) is None
    assert seen == [4, 8, 12]


def main() -> None:
    """Run the task of the first argument in the directory of the second."""
    torch.set_num_threads(1)
    root = Path(sys.argv[2])
    if sys.argv[1] == "alone":
        kill(root / "kill")
        race(root / "race")
    else:
        two(root)


def forked(work: Callable[[], None]) -> int:
    """Run in a forked process, and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill(root: Path) -> None:
    """Train three runs in processes that are killed repeatedly, until they are done."""
    root.mkdir()
    kills = {}
    for seed in range(3):
        rng, deaths = random.Random(seed), []
        while True:
            # Events are before and after each change of the disk, and in the middle of a
            # checkpoint; a training has about 150 of them.
            fatal = rng.randint(1, 40)
            child = forked(lambda fatal=fatal, seed=seed: dying(root / str(seed), fatal))  # type: ignore[misc]
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            deaths.append(fatal)
            assert len(deaths) < 100
        kills[seed] = deaths
    (root / "kills.json").write_text(json.dumps(kills))


def dying(root: Path, fatal: int) -> None:
    """Train until the given event, and be killed."""
    count = 0

    def event() -> None:
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def half_saved(value: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        file.flush()
        event()
        file.seek(0)
        save(value, file)
        event()

    def replaced(*paths: Any) -> None:
        event()
        replace(*paths)
        event()

    class Dying(Toy):
        def stem_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            event()
            values = super().stem_step(batch, context)
            event()
            return values

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            event()
            values = super().step(batch, context)
            event()
            return values

    trainer = make(root, Dying)
    save, replace = torch.save, os.replace
    torch.save, os.replace = half_saved, replaced  # type: ignore[assignment]
    weights = finish(trainer)
    torch.save = save
    save(weights, root / "weights.pt")


def race(root: Path) -> None:
    """Train two runs with the same shared stage at the same time."""
    root.mkdir()

    def work(number: int) -> None:
        trainer = make(root, run=f"run{number}")
        (root / f"ready{number}").touch()
        while not all((root / f"ready{n}").exists() for n in (0, 1)):
            pass
        weights = finish(trainer)
        torch.save({"weights": weights, "reused": sorted(trainer.reused)}, root / f"{number}.pt")

    for child in [forked(lambda number=number: work(number)) for number in (0, 1)]:  # type: ignore[misc]
        _, status = os.waitpid(child, 0)
        assert status == 0


def two(root: Path) -> None:
    """Train in two processes, twice; the second time the first stage is reused."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    ways: list[str] = []

    class Looking(Toy):
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            assert len(batch.source_images) == len(batch.target) == 2
            if not ways:
                found = reachable({"batch": batch, "context": context}, ())
                ways.extend(way for way, value in found if isinstance(value, Trainer))
                ways.append("looked")
            return super().step(batch, context)

    if fabric.is_global_zero:
        TinyDataset(root / "data").prepare()
    fabric.barrier()
    for run in ("first", "second"):
        trainer = make(root, Looking, run, fabric, augmentation="none")
        weights = finish(trainer)
        found = {"weights": weights, "reused": sorted(trainer.reused), "ways": ways}
        torch.save(found, root / f"{run}{fabric.global_rank}.pt")
        fabric.barrier()


def script(what: str, root: Path) -> None:
    """Run this file as a script."""
    root.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLUA_BENCH_CACHE": str(root / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
    }
    done = subprocess.run(
        [sys.executable, __file__, what, str(root)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of the single-process script, which is started once."""
    root = tmp_path_factory.mktemp("alone")
    script("alone", root)
    return root


@pytest.mark.fault("killed", "a training, at steps, within writes and between files")
def test_killed_anywhere_it_ends_in_the_same_weights(tmp_path: Path, alone: Path) -> None:
    whole = make(tmp_path / "whole")
    expected = finish(whole)
    deaths = json.loads((alone / "kill" / "kills.json").read_text())
    assert sum(map(len, deaths.values())) > 9, deaths
    for seed, kills in deaths.items():
        found = torch.load(alone / "kill" / seed / "weights.pt", weights_only=True)
        assert first_difference(expected, found) is None, (seed, kills)
        killed = make(alone / "kill" / seed)
        # Every step is logged once, with the same values.
        assert log_rows(killed) == log_rows(whole), (seed, kills)
        names = {path.name for path in killed.directory.checkpoints.iterdir()}
        candidates = {f"candidate_{step:07d}.pt" for step in (4, 8, 12)}
        assert names == {"last.pt", "previous.pt", *candidates}
        for step in (4, 8, 12):
            a, b = (torch.load(t.candidate_path(step), weights_only=True) for t in (whole, killed))
            assert first_difference(a, b) is None
        killed.batches.close()


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = make(tmp_path)
    expected = finish(first)
    rows = log_rows(first)

    class Never(Toy):
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            raise AssertionError("trained again")

    again = make(tmp_path, Never)
    assert first_difference(finish(again), expected) is None
    assert log_rows(again) == rows


def test_what_a_step_sees_follows_from_its_position(tmp_path: Path) -> None:
    """Seeds of steps differ, so that augmentation does not depend on earlier steps."""
    seeds = {
        step_seed(seed, stage, step, rank)
        for seed in (0, 1)
        for stage in ("stem", "segment")
        for step in range(50)
        for rank in (0, 1)
    }
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(2**31 - 1, "segment", 10**7) < 2**63


def test_candidates_are_kept_at_the_declared_steps(tmp_path: Path) -> None:
    kept: dict[int, dict[str, Tensor]] = {}

    class Keeping(Toy):
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            kept[context.step] = {n: v.clone() for n, v in self.state_dict().items()}
            return super().step(batch, context)

    trainer = make(tmp_path, Keeping, candidates=5, checkpoint_seconds=math.inf)
    assert trainer.candidate_steps() == [2, 5, 7, 10, 12]
    kept[12] = finish(trainer)
    files = sorted(path.name for path in trainer.directory.checkpoints.glob("candidate_*"))
    assert files == [f"candidate_{step:07d}.pt" for step in (2, 5, 7, 10, 12)]
    for step in trainer.candidate_steps():
        found = torch.load(trainer.candidate_path(step), weights_only=True)
        assert first_difference(found, kept[step]) is None
    few = make(tmp_path, run="few", steps=2, candidates=5)
    assert few.candidate_steps() == [1, 2]
    few.batches.close()


def test_learning_rates_decay_from_their_start_also_when_resumed(tmp_path: Path) -> None:
    rates: list[tuple[str, int, float]] = []

    class Noting(Toy):
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            self.note(context)
            return super().step(batch, context)

        def stem_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            self.note(context)
            return super().stem_step(batch, context)

        def note(self, context: Context) -> None:
            for name, optimizer in context.optimizers.items():
                rates.append((name, context.step, optimizer.param_groups[0]["lr"]))

    with pytest.raises(KeyboardInterrupt):
        finish(make(tmp_path, interrupted(Noting, 5)))
    finish(make(tmp_path, Noting))
    for name, start, total, power in (
        ("stem", 0.05, 6, 0.0),
        ("head", 0.05, 12, 0.9),
        ("more", 0.01, 12, 0.9),
    ):
        found = [(step, rate) for n, step, rate in rates if n == name]
        assert [step for step, _ in found] == list(range(total))
        for step, rate in found:
            assert rate == pytest.approx(start * (1 - step / total) ** power)


def test_the_cost_of_a_resumed_run_is_that_of_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # a clock that advances by a second per step

    class Timed(Toy):
        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            nonlocal now
            now += 1.0
            return super().step(batch, context)

        def stem_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            nonlocal now
            now += 1.0
            return super().stem_step(batch, context)

    monkeypatch.setattr("glua_bench.runs.trainer.time.perf_counter", lambda: now)
    whole = make(tmp_path, Timed, run="whole")
    finish(whole)
    assert whole.seconds == {"stem": 6.0, "segment": 12.0} and whole.reused == set()

    # Another run reuses the stem from the cache, and is interrupted afterwards.
    with pytest.raises(KeyboardInterrupt):
        finish(make(tmp_path, interrupted(Timed, 5)))
    now += 1000.0  # time between processes is not counted
    resumed = make(tmp_path, Timed)
    finish(resumed)
    assert resumed.seconds == {"segment": 12.0} and resumed.reused == {"stem"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_of_a_step_is_used_again_without_page_faults() -> None:
    """4 MiB are 1024 pages; without the setting, the system maps each of them at each use."""
    keep_freed_memory()
    faults = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        torch.empty(1 << 20).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    assert sorted(faults)[10] < 100


def test_only_four_dimensions_are_laid_out_as_channels_last() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 3))
    module.register_buffer("pool", torch.zeros(2, 3, 1, 4, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    to_channels_last(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert module[1].weight.is_contiguous() and module.pool.is_contiguous()
    assert not first_difference(before, module.state_dict())


def test_stages_must_have_different_names() -> None:
    assert stage_order((Stage("a"), Stage("b"))) == {"a": 0, "b": 1}
    with pytest.raises(ConfigError, match="different names"):
        stage_order((Stage("a"), Stage("a")))


class Varied(Toy):
    """Three stages: with its own step, with its own optimizers, and with the method's."""

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("step", 0.5, step=self.other_step),
            Stage("optimizers", 0.5, optimizers=self.other_optimizers),
            Stage("neither", decay=0.9),
        )

    def other_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        loss = self.predict(batch.target, "target").square().mean()
        context.update("head", loss)
        return {"other": loss}

    def other_optimizers(self) -> dict[str, Optimizer]:
        return {
            "head": Adam(self.head.parameters(), 0.01),
            "more": Adam([self.stem.weight], 0.01),  # type: ignore[list-item]
        }


def test_a_stage_takes_its_own_step_and_optimizers_or_the_methods(tmp_path: Path) -> None:
    """Types of optimizers and changed weights show which ones were used."""
    seen: dict[str, tuple[type[Optimizer], set[str]]] = {}
    moved: dict[str, set[str]] = {}

    class Noting(Varied):
        def other_step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            return self.note(super().other_step, batch, context)

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            return self.note(super().step, batch, context)

        def note(self, step: Any, batch: Batch, context: Context) -> dict[str, Tensor]:
            before = {name: p.detach().clone() for name, p in self.named_parameters()}
            values: dict[str, Tensor] = step(batch, context)
            name = context.stage.name
            seen[name] = type(context.optimizers["head"]), set(values)
            moved.setdefault(name, set()).update(
                n for n, p in self.named_parameters() if not torch.equal(p, before[n])
            )
            return values

    finish(make(tmp_path, Noting))
    assert seen == {
        "step": (SGD, {"other"}),
        "optimizers": (Adam, {"loss", "likely"}),
        "neither": (SGD, {"loss", "likely"}),
    }
    stem = {stage: {n for n in names if n.startswith("stem.")} for stage, names in moved.items()}
    assert stem == {"step": set(), "optimizers": {"stem.weight"}, "neither": {"stem.bias"}}


@pytest.mark.parametrize(
    "stop", [("step", 3), ("optimizers", 0), ("optimizers", 4), ("neither", 7)]
)
def test_stages_with_their_own_step_and_optimizers_resume_bit_for_bit(
    tmp_path: Path, stop: tuple[str, int]
) -> None:
    expected = finish(make(tmp_path / "whole", Varied))

    class Stopping(Varied):
        def stages(self) -> tuple[Stage, ...]:
            return tuple(replace(stage, step=self.stopping(stage)) for stage in super().stages())

        def stopping(self, stage: Stage) -> Callable[[Batch, Context], dict[str, Tensor]]:
            def step(batch: Batch, context: Context) -> dict[str, Tensor]:
                if (stage.name, context.step) == stop:
                    raise KeyboardInterrupt
                return (stage.step or self.step)(batch, context)

            return step

    trainer = make(tmp_path / "own", Stopping)
    with pytest.raises(KeyboardInterrupt):
        finish(trainer)
    names = [stage.name for stage in trainer.stages]
    assert (names[last(trainer)["stage"]], last(trainer)["step"]) == stop
    assert first_difference(expected, finish(make(tmp_path / "own", Varied))) is None


@pytest.mark.parametrize(("hold", "decay"), [(0.0, 0.9), (0.5, 1.0), (0.25, 0.0)])
def test_rates_are_held_before_they_decay(tmp_path: Path, hold: float, decay: float) -> None:
    rates: dict[int, float] = {}

    class Holding(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return (Stage("segment", decay=decay, hold=hold),)

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            rates[context.step] = context.optimizers["head"].param_groups[0]["lr"]
            return super().step(batch, context)

    with pytest.raises(KeyboardInterrupt):
        finish(make(tmp_path, interrupted(Holding, 9)))
    finish(make(tmp_path, Holding))  # resumes after the hold
    assert list(rates) == list(range(STEPS))
    for step, rate in rates.items():
        left = min(1.0, (1 - step / STEPS) / (1 - hold))
        assert rate == pytest.approx(0.05 * left**decay)


def test_one_forward_pass_serves_two_losses(tmp_path: Path) -> None:
    """With `retain_graph`, gradients of two losses add up to those of their sum."""

    class Apart(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return (Stage("segment"),)

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            logits = self.predict(batch.source_images, "source")
            losses = [F.cross_entropy(logits, batch.source_labels), logits.square().mean()]
            optimizer = context.optimizers["head"]
            optimizer.zero_grad()
            for loss in losses:
                context.backward(loss, retain_graph=loss is losses[0])
            apart = [p.grad.clone() for p in self.head.parameters() if p.grad is not None]
            optimizer.zero_grad()
            logits = self.predict(batch.source_images, "source")
            context.backward(F.cross_entropy(logits, batch.source_labels) + logits.square().mean())
            for gradient, parameter in zip(apart, self.head.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad)
            context.apply("head")
            return {"loss": losses[0]}

    finish(make(tmp_path, Apart, steps=2, candidates=1))


def test_a_finished_stage_is_taken_over(tmp_path: Path) -> None:
    """`finish` and the other stages' weights are not part of it, and the log shows no step."""
    first = make(tmp_path)
    expected = finish(first)
    second = make(tmp_path, run="second")
    found = finish(second)
    assert second.reused == {"stem"} and not first.reused
    assert {row["stage"] for row in log_rows(second)} == {"segment"}
    expected.pop("finished"), found.pop("finished")
    assert first_difference(expected, found) is None


@pytest.mark.fault("processes", "two runs need the same stage at once")
def test_of_two_processes_one_trains_the_shared_stage(alone: Path) -> None:
    a, b = (torch.load(alone / "race" / f"{n}.pt", weights_only=True) for n in (0, 1))
    assert sorted([a["reused"], b["reused"]]) == [[], ["stem"]]
    a["weights"].pop("finished"), b["weights"].pop("finished")
    assert first_difference(a["weights"], b["weights"]) is None


def test_another_segmenter_has_a_stage_of_its_own(tmp_path: Path) -> None:
    """Its size affects the random numbers of the networks that are built after it."""
    bench = Bench(CycleTranslate)
    planned = bench.plan(bench.dataset)
    wider = replace(planned.config, segmenter=SegmenterSpec("unet", 8, 3))
    methods, paths = [], set()
    for config in (planned.config, wider, replace(planned.config, candidates=3)):
        methods.append(bench.build(config))
        stage = methods[-1].stages()[0]
        paths.add(artefact_path(replace(planned, config=config), methods[-1], stage))
    a, b, _ = (method.get_submodule("cycle").state_dict() for method in methods)
    assert first_difference(a, b) is not None
    assert len(paths) == 2
    bench.close()


@pytest.mark.fault("silent damage", "a finished stage in the cache")
def test_a_damaged_shared_stage_is_trained_again(
    tmp_path: Path, tries: Callable[[int], range], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = finish(make(tmp_path))
    path = tmp_path / "stages" / "stem.pt"
    good = path.read_bytes()
    idle = make(tmp_path, run="idle")
    stage = idle.stages[0]
    for seed in tries(200):
        path.write_bytes(damaged(good, seed))
        assert not idle._reuse(stage, path)
        told = capsys.readouterr().err
        assert told.startswith(f"warning: {path} is damaged (") and told.count("\n") == 1
    with quiet(idle):
        pass
    again = make(tmp_path, run="again")
    assert first_difference(finish(again), expected) is None and not again.reused
    assert "; stage 'stem' is trained again." in capsys.readouterr().err
    path.rename(path.with_name("other.pt"))  # intact, and another stage
    with pytest.raises(Damaged):
        load(path.with_name("other.pt"), "other.pt", "cpu")
    assert first_difference(finish(make(tmp_path, run="third")), expected) is None
    assert make(tmp_path, run="fourth")._reuse(stage, path)


@pytest.mark.fault("two users", "a finished stage taken over without permission to write")
@pytest.mark.parametrize(("umask", "reused"), [(0o022, {"stem"}), (0o077, set())])
def test_a_finished_stage_needs_no_permission_to_write(
    shared: Path, umask: int, reused: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that cannot be read is trained for this run alone, which is told."""
    expected = finish(make(shared))
    (shared / "stages" / "stem.lock").unlink()
    trainer = make(shared, run="second")
    for folder in (trainer.directory.path, trainer.directory.path.parent):
        folder.chmod(0o777)
    with another_user(shared / "stages", umask):
        found = finish(trainer)
    assert trainer.reused == reused and list((shared / "stages").iterdir()) == [
        shared / "stages" / "stem.pt"
    ]
    expected.pop("finished"), found.pop("finished")
    assert first_difference(found, expected) is None
    told = capsys.readouterr().err
    assert told == "" if reused else "for this run alone" in told and "GLUA_BENCH_CACHE" in told


@pytest.mark.fault("full disk", "while a finished stage is stored for other runs")
def test_a_stage_that_cannot_be_stored_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = finish(make(tmp_path / "other"))
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if "stages" in str(target):
            no_space()
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert first_difference(finish(make(tmp_path)), expected) is None
    told = capsys.readouterr().err
    assert "Stage 'stem' is not stored for other runs: The disk of" in told


def test_an_unwritable_cache_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("not a directory")
    with pytest.raises(RunFailure, match=r"stages.*\.$"):
        finish(make(tmp_path))


class Exploding(Toy):
    """The loss is not finite from the fourth step."""

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        values = super().step(batch, context)
        if context.step >= 3:
            values["loss"] = values["loss"] * float("nan")
            with torch.no_grad():
                self.head[0].weight.mul_(float("nan"))  # type: ignore[operator, union-attr]
        return values


@pytest.mark.parametrize(("pause", "position"), [(0.0, (1, 3)), (math.inf, (1, 0))])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, pause: float, position: tuple[int, int]
) -> None:
    trainer = make(tmp_path, Exploding, candidates=1, checkpoint_seconds=pause)
    with pytest.raises(RunFailure, match=r"'loss' is nan at step 4 of stage 'segment'") as failure:
        finish(trainer)
    assert f"(its last good checkpoint is {trainer.last_path})" in advice(failure)
    state = last(trainer)
    assert (state["stage"], state["step"]) == position
    assert all(torch.isfinite(value).all() for value in state["method"].values())
    assert not list(trainer.directory.checkpoints.glob("candidate_*"))
    assert all(math.isfinite(v) for row in log_rows(trainer) for v in row["values"].values())
    # Resumed without the fault, the run ends in the same weights.
    assert first_difference(finish(make(tmp_path)), finish(make(tmp_path / "other"))) is None


def advice(failure: pytest.ExceptionInfo[RunFailure]) -> str:
    """Return the message, which is one sentence with the advice."""
    text = str(failure.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text
    assert "lower the learning rates" in text
    assert "`glua-bench data check conformance`" in text
    return text


@pytest.mark.parametrize("lost", [3, STEPS])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, lost: int) -> None:
    class Silent(Toy):
        """Losses are finite, but a weight is not."""

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            values = super().step(batch, context)
            if context.step == lost - 1:
                with torch.no_grad():
                    self.head[0].weight[0] = float("inf")  # type: ignore[index]
            return values

    trainer = make(tmp_path, Silent, candidates=1)
    said = rf"Weights are not finite after step {lost} of stage 'segment'"
    with pytest.raises(RunFailure, match=said) as failure:
        finish(trainer)
    assert f"(its last good checkpoint is {trainer.last_path})" in advice(failure)
    assert last(trainer)["step"] == lost - 1
    assert not list(trainer.directory.checkpoints.glob("candidate_*"))


@pytest.mark.parametrize(
    ("broken", "saved"), [(2, "nothing was saved"), (9, "its last good checkpoint is {}")]
)
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_run_that_stops_says_whether_anything_is_left(
    tmp_path: Path, what: str, broken: int, saved: str
) -> None:
    """Before the first checkpoint, and with candidates but no `last.pt`."""

    class Breaking(Toy):
        def stages(self) -> tuple[Stage, ...]:
            return (Stage("segment"),)

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            values = super().step(batch, context)
            if context.step + 1 < broken:
                return values
            if what == "loss":
                return {**values, "loss": values["loss"] * float("inf")}
            with torch.no_grad():
                self.head[0].weight.mul_(float("nan"))  # type: ignore[operator, union-attr]
            return {name: torch.zeros(()) for name in values}

    trainer = make(tmp_path, Breaking, checkpoint_seconds=math.inf)  # candidates: 4, 8 and 12
    with pytest.raises(RunFailure) as failure:
        finish(trainer)
    assert f"({saved.format(trainer.candidate_path(8))})" in advice(failure)
    assert not trainer.last_path.exists()


@pytest.mark.fault("silent damage", "checkpoints of a run that is resumed")
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    tmp_path: Path, tries: Callable[[int], range], capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged candidate leads to a checkpoint before it; without any, training starts anew."""
    with contextlib.suppress(KeyboardInterrupt):
        finish(make(tmp_path, interrupted(Toy, 9)))
    trainer = make(tmp_path)
    last, previous = trainer.last_path, trainer.previous_path
    candidates = [trainer.candidate_path(step) for step in (4, 8)]
    good = {path: path.read_bytes() for path in (last, previous, *candidates)}
    assert trainer._intact_checkpoint()[0] == last
    for seed in tries(200):
        path = list(good)[seed % len(good)]
        path.write_bytes(damaged(good[path], seed))
        expected = {last: previous, previous: last}.get(path)
        assert trainer._intact_checkpoint()[0] == expected
        told = capsys.readouterr().err
        assert (told == "") == (path == previous)
        assert path == previous or told.startswith(f"warning: {path} is damaged (")
        path.write_bytes(good[path])
    candidates[0].write_bytes(good[candidates[1]])  # intact, but another file's content
    assert trainer._intact_checkpoint()[0] is None
    candidates[0].unlink()  # killed after unused candidates were removed
    assert trainer._intact_checkpoint()[0] is None
    assert f"{candidates[0]} cannot be read (No such file" in capsys.readouterr().err
    with quiet(trainer):
        pass


@pytest.mark.fault("silent damage", "a run resumed after damage ends in other weights")
@pytest.mark.parametrize("lost", ["last", "both", "foreign", "missing"])
def test_a_run_with_damaged_checkpoints_ends_in_the_same_weights(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make(tmp_path / "whole")
    expected = finish(whole)
    with contextlib.suppress(KeyboardInterrupt):
        finish(make(tmp_path, interrupted(Toy, 9)))
    trainer = make(tmp_path)
    if lost in ("last", "both"):
        trainer.last_path.write_bytes(trainer.last_path.read_bytes()[:-1])
    if lost == "both":
        trainer.previous_path.write_bytes(b"")
    elif lost == "foreign":  # of another run
        trainer.directory.id = "other"
    elif lost == "missing":
        trainer.last_path.unlink()  # killed between moving it and writing the next one
    found = finish(trainer)
    told = capsys.readouterr().err
    assert log_rows(trainer)[-STEPS:] == log_rows(whole)[-STEPS:]
    expected.pop("finished"), found.pop("finished")
    assert first_difference(found, expected) is None
    after = {"last": "resumed from the checkpoint before it", "missing": ""}
    assert after.get(lost, "trained again from its first step") in told
    assert (told == "") == (lost == "missing")


@pytest.mark.fault("silent damage", "a candidate between training and scoring")
def test_a_candidate_damaged_before_it_is_scored_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    finish(trainer)
    path = trainer.candidate_path(8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFailure, match=r"0000008\.pt is damaged \(.*\); repeat the command"):
        trainer.load_candidate(8)


def test_a_checkpoint_of_another_method_is_a_sentence(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    state = {"stage": 0, "step": 0, "method": {"no": torch.zeros(1)}}
    save(state, trainer.last_path, checkpoint_name("id", trainer.last_path))
    with pytest.raises(ConfigError, match=r"last\.pt cannot be read.*delete it.*\.$"):
        finish(trainer)


def no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken_writer(value: Any, file: Any) -> None:
    """Behave as torch does on a full disk."""
    file.write(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")


@pytest.mark.fault("full disk", "while a checkpoint is written")
@pytest.mark.parametrize(
    ("place", "fault"),
    [("torch.save", broken_writer), ("torch.save", no_space), ("os.replace", no_space)],
)
def test_a_full_disk_stops_the_run_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fault: Any
) -> None:
    class Filling(Toy):
        """The disk is full from the fifth step."""

        def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
            if context.step == 4:
                monkeypatch.setattr(place, fault)
            return super().step(batch, context)

    trainer = make(tmp_path, Filling, candidates=1)
    with pytest.raises(RunFailure, match=r"last\.pt.*then repeat the command\.$"):
        finish(trainer)
    monkeypatch.undo()
    assert (last(trainer)["stage"], last(trainer)["step"]) == (1, 4)
    names = {path.name for path in trainer.directory.checkpoints.iterdir()}
    assert names == {"last.pt", "previous.pt"}
    resumed = make(tmp_path, candidates=1)
    assert first_difference(finish(resumed), finish(make(tmp_path / "other"))) is None
    assert [row["step"] for row in log_rows(resumed)] == [*range(1, 7), *range(1, 13)]


def test_a_limit_of_the_system_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save({"a": torch.zeros(10)}, path, "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(RunFailure, match=r"weights\.pt cannot be written"):
            save({"a": torch.zeros(100_000)}, path, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]
    assert torch.load(path, weights_only=True)["a"].shape == (10,)


def test_an_unwritable_directory_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match=r"cannot be created because a parent is.*\.$"):
        save({}, tmp_path / "file" / "weights.pt", "a")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Without augmentation, because its random numbers differ between processes."""
    script("two", tmp_path / "two")
    single = finish(make(tmp_path, augmentation="none"))
    first, second = (
        [torch.load(tmp_path / "two" / f"{run}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for run in ("first", "second")
    )
    for pair, reused in ((first, []), (second, ["stem"])):
        assert [found["reused"] for found in pair] == [reused] * 2
        assert first_difference(pair[0]["weights"], pair[1]["weights"]) is None
        for name, value in pair[0]["weights"].items():
            if name != "finished":
                torch.testing.assert_close(value, single[name], rtol=1e-4, atol=1e-6)
    # A step must not reach the trainer, and thus the dataset and its labels.
    assert [found["ways"] for found in first] == [["looked"]] * 2


def test_bfloat16_runs_on_a_cpu_and_keeps_full_weights(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    class Looking(Toy):
        def predict(self, images: Tensor, domain: Role) -> Tensor:
            logits = super().predict(images, domain)
            seen.add(logits.dtype)
            return logits

    trainer = make(tmp_path, Looking, precision="bf16-mixed", steps=4)
    weights = finish(trainer)
    assert seen == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert all(torch.isfinite(value).all() for value in weights.values())
    other = finish(make(tmp_path / "other", steps=4))
    assert first_difference(weights, other) is not None


if __name__ == "__main__":
    main()
