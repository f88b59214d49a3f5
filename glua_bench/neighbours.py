"""2.5D: the slices that a network sees beside the one that it labels.

An image of a network is a stack of an odd number of slices of one volume, a slice a channel, in
their order; the middle one is the slice that is labelled and predicted. The slices beside it lie
at a distance in mm that is common to all volumes of a run, as far as their own slices allow, so
that a neighbour means the same in both domains also where one has thin slices and the other thick
ones. A stack that reaches beyond its volume repeats the volume's last slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from glua_bench.config import RunConfig


@dataclass(frozen=True)
class Neighbourhood:
    """How a volume's slices become stacks.

    Args:
        slices: of a stack, odd; 1 is the labelled slice alone.
        distance: of the slices of a stack, in mm; None for one slice.

    Raises:
        ValueError: the number is even, or several slices have no distance.

    Example:
        >>> thin, thick = 3.0, 8.0  # mm from slice to slice of two volumes
        >>> Neighbourhood(3, 8.0).numbers(6, thick).tolist()
        [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 5]]
        >>> Neighbourhood(3, 8.0).numbers(6, thin).tolist()
        [[0, 0, 3], [0, 1, 4], [0, 2, 5], [0, 3, 5], [1, 4, 5], [2, 5, 5]]
    """

    slices: int = 1
    distance: float | None = None

    def __post_init__(self) -> None:
        if self.slices < 1 or self.slices % 2 == 0:
            raise ValueError(f"A stack has an odd number of slices, not {self.slices}.")
        if self.slices > 1 and not (self.distance and self.distance > 0):
            raise ValueError(f"{self.slices} slices need a distance in mm.")

    @classmethod
    def of(cls, config: RunConfig) -> Neighbourhood:
        """That of a run, whose configuration `runs.plan` has completed."""
        return cls(config.slices, config.slice_distance)

    def __str__(self) -> str:
        return "1" if self.distance is None else f"{self.slices}, {self.distance:g} mm apart"

    def step(self, spacing: float) -> int:
        """How many slices away a neighbour lies in a volume: the nearest number, at least 1.

        Args:
            spacing: distance of the volume's slices in mm.
        """
        return 1 if self.distance is None else max(1, math.floor(self.distance / spacing + 0.5))

    def numbers(self, depth: int, spacing: float) -> np.ndarray:
        """Which slices of a volume each stack consists of.

        Args:
            depth: slices of the volume.
            spacing: their distance in mm.

        Returns:
            int64 (depth, slices), in [0, depth).
        """
        beside = np.arange(self.slices) - self.slices // 2
        return np.clip(np.arange(depth)[:, None] + self.step(spacing) * beside[None], 0, depth - 1)

    def stacks(self, volume: np.ndarray, spacing: float) -> Stacks:
        """A volume as stacks.

        Args:
            volume: (Z, H, W), in memory or mapped from a file.
            spacing: distance of its slices in mm.
        """
        return Stacks(volume, self.numbers(len(volume), spacing))


class Stacks:
    """The stacks of one volume, each read when it is asked for.

    Args:
        volume: (Z, H, W).
        numbers: (Z, slices), which slices each consists of.
    """

    def __init__(self, volume: np.ndarray, numbers: np.ndarray) -> None:
        self._volume, self._numbers = volume, numbers

    def __len__(self) -> int:
        """Number of stacks, one for each slice."""
        return len(self._numbers)

    def __getitem__(self, z: int) -> np.ndarray:
        """The stack whose middle is slice z, (slices, H, W)."""
        return self._volume[self._numbers[z]]


ALONE = Neighbourhood()  # each slice without neighbours


def common_distance(domains: Iterable[Sequence[float]]) -> float:
    """The distance of neighbours, in mm, where volumes keep their own slices.

    The median slice distance of the domain with the thicker slices: there a typical volume's
    neighbours are the slices next to each, in the other domain as many slices away as lie nearest
    to that distance. A few volumes with still thicker slices do not move it for all.

    Args:
        domains: for each domain, the slice distance of each of its training volumes in mm.

    Returns:
        Rounded to 0.001 mm, since headers carry rounding errors.

    Example:
        >>> common_distance([[5.0, 5.0], [8.0, 8.0, 13.0]])
        8.0
    """
    return round(max(float(median(distances)) for distances in domains), 3)


def middle(images: Any) -> Any:
    """The labelled slice of each stack, (N, slices, H, W) → (N, 1, H, W); arrays or tensors."""
    centre = images.shape[1] // 2
    return images[:, centre : centre + 1]
