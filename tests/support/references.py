"""References to compare with: numbers of published code in `data/*.npz`, and medpy's metrics.

What each entry is, and how it was made, is said in the tests that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXACT, ROUNDED = 1e-9, 1e-6  # tolerances of entries stored in double and in single precision
FLOOR = 1e-3


def load_reference(name: str) -> dict[str, np.ndarray]:
    """All entries of `data/<name>.npz`."""
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@torch.no_grad()
def fill(tensors: Iterable[Tensor], reference: dict[str, np.ndarray], prefix: str) -> None:
    """Copy the entries below a prefix into tensors of the same shapes, in their order.

    Raises:
        ValueError: the numbers of tensors or their shapes differ.
    """
    names = [name for name in reference if name.startswith(prefix)]
    own = list(tensors)
    if len(names) != len(own):
        raise ValueError(
            f"The reference has {len(names)} tensors below '{prefix}' and the network {len(own)}; "
            "build the network in the sizes of the reference."
        )
    for name, tensor in zip(names, own, strict=True):
        if reference[name].shape != tuple(tensor.shape):
            raise ValueError(
                f"'{name}' of the reference has the shape {reference[name].shape} and the "
                f"network's tensor {tuple(tensor.shape)}; build the network in the sizes of the "
                "reference."
            )
        tensor.copy_(torch.from_numpy(reference[name]))


def deviation(expected: np.ndarray, value: Tensor | float) -> float:
    """The largest difference in units of the tolerance that the stored precision allows.

    Relative to the largest magnitude of the entry, or to `FLOOR` where it is smaller, as in
    gradients that are 0 but for rounding; at most 1 passes.
    """
    own = np.asarray(value.detach() if isinstance(value, Tensor) else value, np.float64)
    assert own.shape == expected.shape, f"{own.shape} against {expected.shape}"
    tolerance = EXACT if expected.dtype == np.float64 else ROUNDED
    scale = max(FLOOR, float(np.abs(expected).max()))
    return float(np.abs(own - expected).max()) / (scale * tolerance)


def reference_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], connectivity: int = 1
) -> tuple[float, float, float]:
    """Dice, ASSD and HD95 of two masks by medpy.

    Args:
        prediction: boolean mask, not empty.
        reference: boolean mask of the same shape, not empty.
        spacing: mm per axis.
        connectivity: 1 where surface voxels have a face neighbour outside, which is ours.

    Raises:
        RuntimeError: a mask is empty (medpy's error).
    """
    from medpy.metric import binary

    given = {"voxelspacing": tuple(map(float, spacing)), "connectivity": connectivity}
    return (
        float(binary.dc(prediction, reference)),
        float(binary.assd(prediction, reference, **given)),
        float(binary.hd95(prediction, reference, **given)),
    )
