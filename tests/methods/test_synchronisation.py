"""No step waits for the device: values stay there until the trainer logs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_methods import batch, build, context_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glua_bench import augment
from glua_bench.method import Batch, Method
from glua_bench.registry import Registry

BUILT_IN = [e.name for e in Registry("method").entries() if e.origin == "glua-bench"]


class Readings(TorchDispatchMode):
    """Count values that the host reads (`item`, `float`, `if`), except its own random draws."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.drawn: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if name.startswith("aten._local_scalar_dense"):
            self.count += args[0].data_ptr() not in [draw.data_ptr() for draw in self.drawn]
        result = function(*args, **(kwargs or {}))
        if name.startswith(("aten.rand.", "aten.randint.")) and result.dim() == 0:
            self.drawn.append(result)  # and so kept in memory, where nothing else can be
        return result


def small_pools(method: type[Method]) -> dict[str, int]:
    """Return settings with which pools exchange images already in the second step."""
    fields = method.Config.__dataclass_fields__
    return {name: 1 for name in fields if name.endswith(("_pool", "pool_size"))}


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_step_reads_a_value_of_the_device(name: str) -> None:
    kind = Registry("method").load(name)
    method = build(kind, **small_pools(kind))
    for stage in method.stages():
        context = context_of(method, stage)
        step = stage.step or method.step
        step(batch(), context)  # optimizers create their states
        readings = Readings()
        with readings:
            for _ in range(2):
                step(batch(), context)
        assert readings.count == 0, stage.name


def test_augmentation_reads_no_value_of_the_device() -> None:
    data, readings = batch(), Readings()
    with readings:
        augment.geometric(data.source_images, data.source_labels)
        augment.tone_curves(data.source_images)
    assert readings.count == 0


def test_a_value_that_is_read_is_counted() -> None:
    """The tests above can fail."""
    readings, values = Readings(), torch.ones(3)
    with readings:
        float(torch.rand(()))
        assert readings.count == 0
        float(values.sum())
        bool(values[0] > 0)
    assert readings.count == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BUILT_IN)
def test_no_step_waits_for_a_gpu(name: str) -> None:
    kind = Registry("method").load(name)
    method = build(kind, **small_pools(kind)).cuda()
    data = batch()
    tensors = data.source_images, data.source_labels, data.target
    data = Batch(*(x.cuda() for x in tensors))
    for stage in method.stages():
        context = context_of(method, stage)
        step = stage.step or method.step
        step(data, context)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(data, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
