"""Training loop: stages, step budget, checkpoints, resume, devices and precision.

A step depends only on the weights and on (seed, stage, step), from which its slices and random
numbers are derived. A checkpoint therefore holds weights, optimizer states and a position, and a
resumed run ends in the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import math
import signal
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from glua_bench import augment
from glua_bench.config import RunConfig
from glua_bench.console import Progress, warn
from glua_bench.data.batches import Batches
from glua_bench.data.parallel import turns
from glua_bench.errors import ConfigError, RunFailure, reason
from glua_bench.files import (
    Damaged,
    NotWritable,
    add_checksum,
    check,
    exclusive,
    read_checked,
    replacing,
)
from glua_bench.method import Batch, Context, Method, Stage
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs import interruption
from glua_bench.runs.interruption import Interrupted

LAST, PREVIOUS = "last.pt", "previous.pt"  # checkpoints to resume from
LOG_EVERY = 10  # steps between transfers of the losses from the device
CHECKPOINT_SECONDS = 30.0
MAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
AGREE_EVERY = 10  # steps between exchanges of stop signals among processes


def save(
    value: Any, path: Path, name: str, option: str = "--runs", keep: Path | None = None
) -> None:
    """Write a file by `torch.save`, with a checksum.

    Args:
        value: tensors in dictionaries and lists.
        path: the file.
        name: must be repeated by whoever reads the file.
        option: names the directory to whoever cannot write it.
        keep: path to which an existing file is moved.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with replacing(path, option, keep) as temporary:
        with temporary.open("wb") as file:
            try:
                torch.save(value, file)
            except RuntimeError as error:  # e.g. a full disk
                raise OSError(reason(error)) from error
        add_checksum(temporary, name)


def load(path: Path, name: str, device: torch.device | str, older: bool = False) -> Any:
    """Read a file that `save` wrote.

    Args:
        path: the file.
        name: as given to `save`.
        device: device of the tensors.
        older: accept a file without a checksum, which an earlier version wrote, by the checksums
            that its ZIP archive has, which torch does not compare.

    Raises:
        Damaged: the file is not what was written.
        OSError: the file cannot be read.
    """
    try:
        content = read_checked(path, name)
    except Damaged:
        content = path.read_bytes() if older else b""
        if not _is_sound_archive(content):
            raise
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def _is_sound_archive(content: bytes) -> bool:
    """Return True for a ZIP archive without anything behind its end and with right checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return content[-22:-18] == b"PK\5\6" and archive.testzip() is None
    except Exception:  # many types for damaged files
        return False


def checkpoint_name(run: str, path: Path) -> str:
    """Return the name under which a run's checkpoint has its checksum."""
    return f"{run}/{path.name}"


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of returning it to the system after each use.

    Otherwise every large tensor of a step is mapped anew, page by page: thousands of page faults
    per step. Only glibc has this setting; other libraries keep their own.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(MAP_THRESHOLD, 2**30)
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def step_seed(seed: int, stage: str, step: int, rank: int = 0) -> int:
    """Return the seed of one step's random numbers."""
    return zlib.crc32(f"{seed}/{stage}/{step}/{rank}".encode()) + (seed << 32)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the random numbers of this process on its device."""
    if device.type == "cpu":
        # `torch.manual_seed` also queues seeds for unused devices, each with a formatted stack,
        # which would cost a millisecond per step.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class Trainer:
    """Train one method under a run's budget.

    Args:
        method: the method, freshly initialised from the seed.
        config: configuration of the run.
        batches: the data.
        fabric: devices and precision.
        directory: run directory for checkpoints and losses.
        progress: progress bar.
        artefact: stage → file in which its result is shared between runs, or None.
        checkpoint_seconds: interval between checkpoints; 0 writes one after every step.
        watch: called with the step of each candidate, while the method has its weights in eval
            mode; a resumed run starts with its earlier candidates. May stop the run by raising.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        batches: Batches,
        fabric: Fabric,
        directory: RunDirectory,
        progress: Progress,
        artefact: Callable[[Stage], Path | None] = lambda stage: None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.batches, self.fabric = config, batches, fabric
        self.directory, self.progress, self.artefact = directory, progress, artefact
        self.checkpoint_seconds, self.watch = checkpoint_seconds, watch
        self.method = method.to(fabric.device)
        to_channels_last(self.method)
        for tensor in itertools.chain(method.parameters(), method.buffers()):
            tensor.data = fabric.broadcast(tensor.data) if fabric.world_size > 1 else tensor.data
        self.stages = tuple(method.stages())  # may be replaced before `fit` by watched copies
        self.seconds: dict[str, float] = {}  # stage → training time, interrupted processes included
        self.reused: set[str] = set()  # stages taken from the cache
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._saved_at = time.monotonic()

    def candidate_steps(self) -> list[int]:
        """Return the steps of the last stage whose checkpoints are candidates for selection."""
        total = self.stages[-1].steps(self.config.steps)
        count = min(self.config.candidates, total)
        return [round(total * (i + 1) / count) for i in range(count)]

    @property
    def last_path(self) -> Path:
        """The checkpoint from which training is resumed."""
        return self.directory.checkpoints / LAST

    @property
    def previous_path(self) -> Path:
        """The checkpoint before it, from which training is resumed if the last one is damaged."""
        return self.directory.checkpoints / PREVIOUS

    def candidate_path(self, step: int) -> Path:
        """Return the checkpoint file of a candidate."""
        return self.directory.checkpoints / f"candidate_{step:07d}.pt"

    def load_candidate(self, step: int) -> None:
        """Load the weights of a candidate.

        Raises:
            RunFailure: its checkpoint is damaged or missing.
        """
        path = self.candidate_path(step)
        try:
            weights = load(path, self._name(path), self.fabric.device)
        except (Damaged, OSError) as error:
            raise RunFailure(
                f"{_described(error, path)}; repeat the command to train it again."
            ) from error
        self.method.load_state_dict(weights)

    def _name(self, path: Path) -> str:
        path = self.last_path if path == self.previous_path else path  # it was written as the last
        return checkpoint_name(self.directory.id, path)

    def fit(self) -> None:
        """Train all stages, starting from the last checkpoint if there is one.

        Raises:
            RunFailure: a loss or weight is not finite, or a checkpoint cannot be written.
            Interrupted: the process received a stop signal; the last step's checkpoint is written.
        """
        keep_freed_memory()
        position = self._load()
        if self.watch is not None:
            self._replay_candidates(position)
        start, states = position["step"], position["optimizers"]
        for index in range(position["stage"], len(self.stages)):
            self._train_or_reuse(index, self.stages[index], start, states)
            start, states = 0, {}
        self.method.eval()

    def _train_or_reuse(
        self, index: int, stage: Stage, start: int, states: Mapping[str, Any]
    ) -> None:
        """Train a stage and store its result for other runs, or reuse a stored one."""
        artefact = self.artefact(stage)
        if artefact is None:
            with turns.taken(threads_of(self.fabric)):
                self._train(index, stage, start, states)
            return

        def waiting() -> None:
            self.progress.line(
                f"Stage '{stage.name}': another run is training it; waiting for its result."
            )

        if self._reuse(stage, artefact):
            return
        with contextlib.ExitStack() as stack:
            private = False
            # Several processes of one run cannot all hold the lock, so they use none.
            if self.fabric.world_size == 1:
                lock = artefact.with_suffix(".lock")
                try:
                    stack.enter_context(exclusive(lock, waiting, "GLUA_BENCH_CACHE"))
                except NotWritable as error:
                    private = True
                    warn(f"Stage '{stage.name}' is trained for this run alone: {error}")
                else:
                    if self._reuse(stage, artefact, again=True):
                        return
            with turns.taken(threads_of(self.fabric)):
                self._train(index, stage, start, states)
            if self.fabric.is_global_zero:
                modules = {n: self.method.get_submodule(n).state_dict() for n in stage.modules}
                try:
                    save(modules, artefact, artefact.name, "GLUA_BENCH_CACHE")
                except RunFailure as error:  # the run itself has all that it needs
                    if not private:
                        warn(f"Stage '{stage.name}' is not stored for other runs: {error}")
            self.fabric.barrier()

    def _reuse(self, stage: Stage, artefact: Path, again: bool = False) -> bool:
        """Take over a stage's stored result; return False if there is none, or it is damaged.

        Args:
            stage: the stage.
            artefact: its file; reading needs no lock and no permission to write.
            again: the user has been told of damage.
        """
        usable = False
        if self.fabric.is_global_zero:
            try:
                check(artefact, artefact.name)
                usable = True
            except Damaged as error:
                if not again:
                    warn(f"{error}; stage '{stage.name}' is trained again.")
            except OSError:  # missing, or of a user who does not share it
                pass
        # One process decides for all; otherwise they could deadlock on gradients.
        if not self.fabric.broadcast(usable):
            return False
        try:
            saved = load(artefact, artefact.name, self.fabric.device)
            for name in stage.modules:
                self.method.get_submodule(name).load_state_dict(saved[name])
        except Exception as error:  # torch raises many types
            raise ConfigError(
                f"The finished stage {artefact} cannot be read ({type(error).__name__}); "
                "delete it to train the stage again."
            ) from error
        self.reused.add(stage.name)
        self.progress.line(f"Stage '{stage.name}': reused from an earlier run.")
        return True

    def _train(self, index: int, stage: Stage, start: int, states: Mapping[str, Any]) -> None:
        method, config, fabric = self.method, self.config, self.fabric
        total = stage.steps(config.steps)
        update, make = stage.trained_by(method)
        optimizers = self._optimizers(make(), states)
        candidates = set(self.candidate_steps()) if index == len(self.stages) - 1 else set()
        context = Context(
            stage,
            start,
            total,
            optimizers,
            self.batches.target_slices,
            fabric.backward,
            # Not a method of the trainer, through which a step could reach the dataset.
            partial(average_gradients, fabric) if fabric.world_size > 1 else lambda optimizer: None,
        )
        key = zlib.crc32(stage.name.encode())
        method.train()
        self.progress.stage(stage.name, total, start)
        began = time.perf_counter() - self.seconds.get(stage.name, 0.0)
        for step in range(start, total):
            turns.pass_on()
            context.step = step
            seed_all(step_seed(config.seed, stage.name, step, fabric.global_rank), fabric.device)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * stage.rate(context.progress)
            with fabric.autocast():
                batch = self._augmented(Batch(*self.batches.load(key, step)), stage)
                values = update(batch, context)
            values = {name: value.detach() for name, value in values.items()}
            self._pending.append((step + 1, values))
            self.progress.update(step + 1, values)
            if len(self._pending) >= LOG_EVERY:
                self._flush(stage)
            last = step + 1 == total
            if step + 1 in candidates:
                self._flush(stage)
                self._check_weights(stage, step + 1)
                if fabric.is_global_zero:
                    path = self.candidate_path(step + 1)
                    save(method.state_dict(), path, self._name(path))
                if self.watch is not None:
                    method.eval()
                    self.watch(step + 1)
                    method.train()
            ending = self._stop_requested(step + 1)
            if ending or not last and time.monotonic() - self._saved_at >= self.checkpoint_seconds:
                self.seconds[stage.name] = time.perf_counter() - began
                self._save(index, stage, step + 1, optimizers)
                if ending:
                    fabric.barrier()  # until the first process has written the checkpoint
                    interruption.end_if_asked()
                    raise Interrupted(signal.SIGTERM)  # another process received the signal
        self._flush(stage)
        if stage.finish is not None:
            seed_all(step_seed(config.seed, stage.name, total), fabric.device)
            method.eval()
            stage.finish(context)
        self.seconds[stage.name] = time.perf_counter() - began
        self._save(index + 1, stage, 0, {})

    def _stop_requested(self, step: int) -> bool:
        """Return True if this process, or one of several, received a stop signal."""
        asked = interruption.asked()
        if self.fabric.world_size == 1:
            return asked
        # Processes receive signals in different steps and must stop in the same one, so they
        # exchange them, but not in every step, because this synchronises with the device.
        if step % AGREE_EVERY:
            return False
        flag = torch.tensor(float(asked), device=self.fabric.device)
        count = self.fabric.all_reduce(flag, reduce_op="sum")
        assert isinstance(count, Tensor)
        return bool(count > 0)

    def _replay_candidates(self, position: Mapping[str, Any]) -> None:
        """Call `watch` for the candidates of earlier processes, then restore the weights."""
        assert self.watch is not None
        done = self._candidates_before(position)
        if not done:
            return
        before = {name: value.clone() for name, value in self.method.state_dict().items()}
        self.method.eval()
        for step in done:
            self.load_candidate(step)
            self.watch(step)
        self.method.load_state_dict(before)

    def _candidates_before(self, position: Mapping[str, Any]) -> list[int]:
        """Return the steps of the candidates that a checkpoint at this position implies."""
        at_last = position["stage"] == len(self.stages) - 1
        finished = position["stage"] == len(self.stages)
        return [s for s in self.candidate_steps() if finished or at_last and s <= position["step"]]

    def _augmented(self, batch: Batch, stage: Stage) -> Batch:
        """Apply geometric augmentation, the stage's translation, then photometric augmentation."""
        policy = self.config.augmentation
        images, labels, target = batch.source_images, batch.source_labels, batch.target_images
        if policy != "none":
            images, moved = augment.geometric(images, labels)
            labels = labels if moved is None else moved
            if target is not None:
                target, _ = augment.geometric(target)
        if stage.translate is not None:
            with torch.no_grad():
                images = stage.translate(images)
        if policy == "photometric" and stage.photometric:
            images = augment.tone_curves(images, self.batches.source.channels)
        labels = labels.long()  # the type that losses require, 8 bytes per pixel
        return replace(batch, source_images=images, source_labels=labels, target_images=target)

    def _optimizers(
        self, optimizers: dict[str, Optimizer], states: Mapping[str, Any]
    ) -> dict[str, Optimizer]:
        """Set initial learning rates and restore the optimizers' states from a checkpoint."""
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            if name in states:
                optimizer.load_state_dict(states[name])
        if isinstance(self.fabric.strategy.precision.precision, str) and (
            self.config.precision == "16-mixed"
        ):
            # The gradient scaler lives in Fabric's wrapper; other precisions need none.
            return {name: self.fabric.setup_optimizers(o) for name, o in optimizers.items()}  # type: ignore[misc]
        return optimizers

    def _flush(self, stage: Stage) -> None:
        """Record the pending losses, and stop if one is not finite."""
        if not self._pending:
            return
        # One transfer from the device for all steps; names may differ between steps.
        scalars = [value.float() for _, row in self._pending for value in row.values()]
        numbers = iter(torch.stack(scalars).cpu().tolist() if scalars else [])
        for step, row in self._pending:
            values = {name: next(numbers) for name in row}
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:
                self._pending.clear()
                raise self._not_finite(
                    f"The loss '{bad[0]}' is {values[bad[0]]} at step {step} of stage "
                    f"'{stage.name}'"
                )
            if self.fabric.is_global_zero:
                self.directory.log(stage.name, step, values)
        self._pending.clear()

    def _check_weights(self, stage: Stage, step: int) -> None:
        parameters = [p for p in self.method.parameters() if p.is_floating_point()]
        if not all(bool(torch.isfinite(p).all()) for p in parameters):
            raise self._not_finite(
                f"Weights are not finite after step {step} of stage '{stage.name}'"
            )

    def _not_finite(self, what: str) -> RunFailure:
        """Return the error for non-finite losses or weights; it names the last good checkpoint."""
        kept = [self.last_path, *map(self.candidate_path, reversed(self.candidate_steps()))]
        good = next((path for path in kept if path.is_file()), None)
        saved = "nothing was saved" if good is None else f"its last good checkpoint is {good}"
        return RunFailure(
            f"{what}, so the run was stopped ({saved}); lower the learning rates with --set "
            "method.NAME=VALUE, or look for slices that break the method with `glua-bench data "
            f"check {self.config.dataset}`."
        )

    def _save(
        self, index: int, stage: Stage, step: int, optimizers: Mapping[str, Optimizer]
    ) -> None:
        """Write `last.pt` if losses and weights are finite."""
        self._flush(stage)
        self._check_weights(stage, step or stage.steps(self.config.steps))
        if self.fabric.is_global_zero:
            # Steps before the checkpoint are not repeated, so their losses are written first.
            self.directory.flush()
            state = {
                "stage": index,
                "step": step,
                "after": stage.name,
                "method": self.method.state_dict(),
                "optimizers": {name: o.state_dict() for name, o in optimizers.items()},
                "seconds": self.seconds,
                "reused": sorted(self.reused),
            }
            save(state, self.last_path, self._name(self.last_path), keep=self.previous_path)
        self._saved_at = time.monotonic()

    def _load(self) -> dict[str, Any]:
        """Return the position to start from, and load the weights of the last checkpoint."""
        path, state = self._intact_checkpoint() if self.fabric.is_global_zero else (None, None)
        path = self.fabric.broadcast(path)  # one process decides for all
        if path is None:
            if self.fabric.is_global_zero:
                self.directory.rewind(self.stages[0].name, 0)
            return {"stage": 0, "step": 0, "optimizers": {}}
        try:
            if state is None:
                state = load(path, self._name(path), self.fabric.device)
            self.method.load_state_dict(state["method"])
            self.seconds, self.reused = dict(state["seconds"]), set(state["reused"])
        except Exception as error:  # torch raises many types
            raise ConfigError(
                f"The checkpoint {path} cannot be read ({type(error).__name__}); delete it to "
                "restart this run."
            ) from error
        if state["stage"] < len(self.stages):
            stage = self.stages[state["stage"]]
            if self.fabric.is_global_zero:
                self.directory.rewind(stage.name, state["step"])
            if state["stage"] and not state["step"]:
                self.progress.line(f"Resuming at stage '{stage.name}'; earlier ones are finished.")
        else:
            self.progress.line("Resuming after the last stage: its checkpoints are scored.")
        return state

    def _intact_checkpoint(self) -> tuple[Path | None, Any]:
        """Find the last intact checkpoint whose candidates are intact too, and read it.

        Nothing but time is lost by going back, because the steps are the same.
        """
        problem = ""
        for path in filter(Path.exists, (self.last_path, self.previous_path)):
            try:
                state = load(path, self._name(path), self.fabric.device)
                for step in self._candidates_before(state):
                    candidate = self.candidate_path(step)
                    check(candidate, self._name(candidate))
            except (Damaged, OSError) as error:
                problem = problem or _described(error, path)
                continue
            if problem:
                warn(f"{problem}; the run is resumed from the checkpoint before it.")
            return path, state
        if problem:
            warn(f"{problem}; the run is trained again from its first step.")
        return None, None


def _described(error: Damaged | OSError, path: Path) -> str:
    """Return what is wrong with a file, for the beginning of a sentence."""
    if isinstance(error, Damaged):
        return str(error)
    return f"{error.filename or path} cannot be read ({error.strerror or reason(error)})"


def drop_checkpoints(directory: RunDirectory) -> None:
    """Remove the checkpoints of a run that are only needed to resume it."""
    for name in (LAST, PREVIOUS):
        (directory.checkpoints / name).unlink(missing_ok=True)


def threads_of(fabric: Fabric) -> int | None:
    """Return the threads for a turn on the processor; None if the run takes no turns.

    A GPU needs none, and processes that wait for each other's gradients must compute at once.
    """
    alone = fabric.device.type == "cpu" and fabric.world_size == 1
    return torch.get_num_threads() if alone else None


def to_channels_last(module: nn.Module) -> None:
    """Convert 4-D weights to the channels-last memory format of the images.

    `Module.to(memory_format=...)` fails for modules that hold 5-D tensors.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def average_gradients(fabric: Fabric, optimizer: Optimizer) -> None:
    """Replace an optimizer's gradients by their means over processes."""
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    flat = torch.cat([g.flatten() for g in gradients])
    mean = fabric.all_reduce(flat, reduce_op="mean")
    assert isinstance(mean, Tensor)
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def stage_order(stages: tuple[Stage, ...]) -> dict[str, int]:
    """Return stage names → position.

    Raises:
        ConfigError: two stages share a name.
    """
    order = {stage.name: index for index, stage in enumerate(stages)}
    if len(order) < len(stages):
        raise ConfigError("A method's stages must have different names.")
    return order
