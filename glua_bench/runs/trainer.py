"""Training loop: stages, step budget, checkpoints, resume, devices and precision.

A step depends only on the weights and on (seed, stage, step), from which its slices and random
numbers are derived. A checkpoint therefore holds weights, optimizer states and a position, and a
resumed run ends in the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import signal
import time
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
from glua_bench.console import Progress
from glua_bench.data.batches import Batches
from glua_bench.errors import ConfigError, RunFailure, reason
from glua_bench.files import exclusive, replacing
from glua_bench.method import Batch, Context, Method, Stage
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs import interruption
from glua_bench.runs.interruption import Interrupted

LOG_EVERY = 10  # steps between transfers of the losses from the device
CHECKPOINT_SECONDS = 30.0
MAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
AGREE_EVERY = 10  # steps between exchanges of stop signals among processes


def save(value: Any, path: Path) -> None:
    """Write a file by `torch.save`.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with replacing(path, "--runs") as temporary, temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # e.g. a full disk
            raise OSError(reason(error)) from error


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
        return self.directory.checkpoints / "last.pt"

    def candidate_path(self, step: int) -> Path:
        """Return the checkpoint file of a candidate."""
        return self.directory.checkpoints / f"candidate_{step:07d}.pt"

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
            self._train(index, stage, start, states)
            return

        def waiting() -> None:
            self.progress.line(
                f"Stage '{stage.name}': another run is training it; waiting for its result."
            )

        with contextlib.ExitStack() as stack:
            # Several processes of one run cannot all hold the lock, so they use none.
            if self.fabric.world_size == 1:
                lock = artefact.with_suffix(".lock")
                stack.enter_context(exclusive(lock, waiting, "GLUA_BENCH_CACHE"))
            # One process decides for all; otherwise they could deadlock on gradients.
            if self.fabric.broadcast(artefact.is_file()):
                self._reuse(stage, artefact)
                return
            self._train(index, stage, start, states)
            if self.fabric.is_global_zero:
                modules = {n: self.method.get_submodule(n).state_dict() for n in stage.modules}
                save(modules, artefact)
            self.fabric.barrier()

    def _reuse(self, stage: Stage, artefact: Path) -> None:
        try:
            saved = torch.load(artefact, map_location=self.fabric.device, weights_only=True)
            for name in stage.modules:
                self.method.get_submodule(name).load_state_dict(saved[name])
        except Exception as error:  # torch raises many types for damaged files
            raise ConfigError(
                f"The finished stage {artefact} cannot be read ({type(error).__name__}); "
                "delete it to train the stage again."
            ) from error
        self.reused.add(stage.name)
        self.progress.line(f"Stage '{stage.name}': reused from an earlier run.")

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
                    save(method.state_dict(), self.candidate_path(step + 1))
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
        at_last = position["stage"] == len(self.stages) - 1
        finished = position["stage"] == len(self.stages)
        done = [s for s in self.candidate_steps() if finished or at_last and s <= position["step"]]
        if not done:
            return
        before = {name: value.clone() for name, value in self.method.state_dict().items()}
        self.method.eval()
        for step in done:
            weights = torch.load(
                self.candidate_path(step), map_location=self.fabric.device, weights_only=True
            )
            self.method.load_state_dict(weights)
            self.watch(step)
        self.method.load_state_dict(before)

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
            save(state, self.last_path)
        self._saved_at = time.monotonic()

    def _load(self) -> dict[str, Any]:
        """Return the position to start from, and load the weights of the last checkpoint."""
        path = self.last_path
        if not path.is_file():
            if self.fabric.is_global_zero:
                self.directory.rewind(self.stages[0].name, 0)
            return {"stage": 0, "step": 0, "optimizers": {}}
        try:
            state: dict[str, Any] = torch.load(
                path, map_location=self.fabric.device, weights_only=True
            )
            self.method.load_state_dict(state["method"])
            self.seconds, self.reused = dict(state["seconds"]), set(state["reused"])
        except Exception as error:  # torch raises many types for damaged files
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
