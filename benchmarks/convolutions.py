"""The convolutions of a training step, alone: recorded, counted and repeated.

A step that spent no time on anything else would last as long as they do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
KINDS = (ATEN.convolution, ATEN.convolution_backward)
Call = tuple[Any, tuple[Any, ...]]


@contextmanager
def eager() -> Iterator[None]:
    """Switch off compiled code, which would hide its convolutions."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class Convolutions(TorchDispatchMode):
    """Record the convolutions of the code in a `with` block, with their operations.

    Every call of `aten::convolution` and `aten::convolution_backward` is kept with the shapes,
    strides and types of its tensors and with the gradients that it has to compute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.operations = 0
        self._pool: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in KINDS:
            assert not kwargs
            self.operations += flop_registry[packet](*args, out_val=out)
            self.calls.append((func, tuple(map(self._stand_in, args))))
        return out

    def _stand_in(self, value: Any) -> Any:
        """Return a random tensor like the given one; equal ones share their memory."""
        if not isinstance(value, Tensor):
            return value
        key = (tuple(value.shape), value.stride(), value.dtype)
        if key not in self._pool:
            shape, strides, kind = key
            reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            self._pool[key] = torch.randn(reach).to(kind).as_strided(shape, strides)
        return self._pool[key]

    def repeat(self) -> None:
        """Compute all recorded convolutions in their order."""
        with torch.no_grad():
            for func, args in self.calls:
                func(*args)


def of_step(step: Callable[[], object]) -> Convolutions:
    """Record one call of a step."""
    with eager(), Convolutions() as found:
        step()
    return found


def roofline(quick: bool, clock: Callable[[], float]) -> tuple[Callable[[], None], int]:
    """Return the fastest of several large convolutions, forward and backward.

    Args:
        quick: try one small shape only.
        clock: tells the seconds.

    Returns:
        The function, and the operations of one call.
    """
    shapes = ((8, 64, 64), (8, 128, 32), (16, 64, 32), (4, 256, 32), (8, 256, 16))
    formats = (torch.channels_last, torch.contiguous_format)
    best: tuple[float, Callable[[], None], int] | None = None
    for batch, channels, size in ((2, 16, 16),) if quick else shapes:
        for memory in formats:
            images = torch.randn(batch, channels, size, size).to(memory_format=memory)
            images.requires_grad_()
            weights = torch.randn(channels, channels, 3, 3).to(memory_format=memory)
            weights.requires_grad_()

            def both(images: Tensor = images, weights: Tensor = weights) -> None:
                out = torch.nn.functional.conv2d(images, weights, padding=1)
                torch.autograd.grad(out, (images, weights), out.detach())

            recorded = of_step(both)
            both()
            seconds = []
            for _ in range(3):
                began = clock()
                both()
                seconds.append(clock() - began)
            rate = recorded.operations / min(seconds)
            if best is None or rate > best[0]:
                best = (rate, both, recorded.operations)
    assert best is not None
    return best[1], best[2]
