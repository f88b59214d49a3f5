"""Tests of convolutions from or to few channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glua_bench.methods.components.thin_convolution import ThinConv2d


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel"), [(1, 6, 7), (6, 1, 7), (1, 1, 3), (3, 5, 5), (5, 3, 7)]
)
@pytest.mark.parametrize("shape", [(16, 16), (17, 14)])
def test_values_and_gradients_are_those_of_conv2d(
    mode: str, inputs: int, outputs: int, kernel: int, shape: tuple[int, int]
) -> None:
    """Also where the sides are no multiple of a block, and without a bias."""
    bias = kernel != 3
    layers = [
        kind(inputs, outputs, kernel, padding=kernel // 2, padding_mode=mode, bias=bias).double()
        for kind in (nn.Conv2d, ThinConv2d)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    image = torch.randn(2, inputs, *shape, dtype=torch.float64)
    pull = torch.randn(2, outputs, *shape, dtype=torch.float64)
    found = []
    for layer in layers:
        x = image.clone().requires_grad_()
        result = layer(x)
        result.backward(pull)
        found.append([result, x.grad, *(p.grad for p in layer.parameters())])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def test_mixed_precision_computes_as_conv2d() -> None:
    layer, x = ThinConv2d(4, 1, 7, padding=3), torch.randn(1, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        layer(x).float().mean().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_frozen_weights_get_no_gradient_but_pass_it() -> None:
    layer, x = ThinConv2d(1, 4, 7, padding=3), torch.randn(1, 1, 16, 16, requires_grad=True)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.any() and layer.weight.grad is None
