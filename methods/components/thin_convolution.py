"""Convolutions to few channels; a component of the networks that write images."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ThinConv2d(nn.Conv2d):
    """A convolution with stride 1 that is fast on a CPU also to a single channel.

    The same function and weights as `nn.Conv2d`. A CPU computes 16 output channels at once, so a
    convolution to one channel wastes 15/16 of the work. Here blocks of 4 × 4 output pixels are the
    channels: a kernel of size k + 3 with stride 4 and a pixel shuffle, with (k + 3)² instead of
    16 k² multiplications for each pixel.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(input, weight, bias)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode)
        return ThinConvolution.apply(padded, weight, bias)


class ThinConvolution(torch.autograd.Function):
    """`ThinConv2d` after padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve (N, C, H, W) with (C', C, k, k) to (N, C', H - k + 1, W - k + 1)."""
        ctx.save_for_backward(x, weight)
        return blocked_convolution(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        outputs, _, size, _ = weight.shape
        of_x, of_weight, of_bias = ctx.needs_input_grad
        block = block_size(outputs)
        plain = [of_x, of_weight and block == 1, False]
        found = list(convolution_gradients(gradient, x, weight, 1, plain))
        if of_weight and not plain[1]:
            pull = F.pixel_unshuffle(filled(gradient, 1, block), block)
            kernels = block_kernels(weight, block)
            mask = [False, True, False]
            sums = convolution_gradients(pull, filled(x, size, block), kernels, block, mask)[1]
            parts = sums.unflatten(0, (outputs, block, block))
            inside = itertools.product(range(block), repeat=2)
            shares = [parts[:, i, j, :, i : i + size, j : j + size] for i, j in inside]
            found[1] = torch.stack(shares).sum(0)
        return found[0], found[1], gradient.sum((0, 2, 3)) if of_bias else None


def convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of an unpadded convolution, if wanted."""
    sizes = None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(gradient, x, weight, *sizes, wanted)


def blocked_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve (N, C, H, W) with (C', C, k, k) without padding, in blocks of output pixels."""
    size, block = weight.shape[2], block_size(len(weight))
    if block == 1:
        return F.conv2d(x, weight, bias)
    bias = None if bias is None else bias.repeat_interleave(block**2)
    blocks = F.conv2d(filled(x, size, block), block_kernels(weight, block), bias, stride=block)
    height, width = (side - size + 1 for side in x.shape[2:])
    return F.pixel_shuffle(blocks, block)[..., :height, :width]


def block_size(channels: int) -> int:
    """Return the side of the blocks of pixels that fill 16 channels."""
    return 4 if channels == 1 else 2 if channels <= 4 else 1


def block_kernels(weight: Tensor, block: int) -> Tensor:
    """Return a kernel for each pixel of a block: (C', C, k, k) → (C' · b², C, k + b - 1, …)."""
    outputs, inputs, size, _ = weight.shape
    side = size + block - 1
    kernels = weight.new_zeros(outputs, block, block, inputs, side, side)
    for i, j in itertools.product(range(block), repeat=2):
        kernels[:, i, j, :, i : i + size, j : j + size] = weight
    return kernels.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def filled(x: Tensor, size: int, block: int) -> Tensor:
    """Pad x with zeros until a kernel has a multiple of `block` positions in both directions."""
    height, width = ((size - 1 - side) % block for side in x.shape[2:])
    return F.pad(x, (0, width, 0, height)) if height or width else x
