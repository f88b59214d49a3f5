"""2.5D inputs: neighbouring slices as channels.

An image is a stack of an odd number of slices of one volume, in order, one per channel; the middle
slice is labelled and predicted. The distance of neighbours in mm is as equal for all volumes of a
run as their slices allow, so that domains with thin and thick slices are comparable. Stacks that
extend beyond a volume repeat its last slice.

With several input channels (T1 and T2), an image holds the stack of the first channel, then that of
the second, and so on: 3 slices of 2 channels are 6 planes.
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
    """Definition of the stacks of slices.

    Attributes:
        slices: number of slices of a stack, odd.
        distance: distance of the slices of a stack in mm; None for one slice.

    Raises:
        ValueError: the number is even, or the distance of several slices is missing.

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
        """Build from the configuration of a planned run."""
        return cls(config.slices, config.slice_distance)

    def __str__(self) -> str:
        return "1" if self.distance is None else f"{self.slices}, {self.distance:g} mm apart"

    def step(self, spacing: float) -> int:
        """Return the offset of neighbours in a volume, rounded, at least 1.

        Args:
            spacing: distance of the volume's slices in mm.
        """
        return 1 if self.distance is None else max(1, math.floor(self.distance / spacing + 0.5))

    def numbers(self, depth: int, spacing: float) -> np.ndarray:
        """Return the slice indices of each stack of a volume.

        Args:
            depth: number of slices of the volume.
            spacing: their distance in mm.

        Returns:
            int64 (depth, slices), in [0, depth).
        """
        beside = np.arange(self.slices) - self.slices // 2
        return np.clip(np.arange(depth)[:, None] + self.step(spacing) * beside[None], 0, depth - 1)

    def stacks(self, volume: np.ndarray, spacing: float, *further: np.ndarray) -> Stacks:
        """Return a volume as stacks.

        Args:
            volume: (Z, H, W), in memory or memory-mapped.
            spacing: distance of its slices in mm.
            further: the second and later input channels, likewise.
        """
        return Stacks((volume, *further), self.numbers(len(volume), spacing))


class Stacks:
    """The stacks of one volume, read on access.

    Args:
        channels: (Z, H, W) of each channel.
        numbers: (Z, slices), slice indices of each stack.
    """

    def __init__(self, channels: Sequence[np.ndarray], numbers: np.ndarray) -> None:
        self._channels, self._numbers = channels, numbers

    def __len__(self) -> int:
        """Number of stacks, one for each slice."""
        return len(self._numbers)

    def __getitem__(self, z: int) -> np.ndarray:
        """Return the stack with middle slice z, (channels · slices, H, W)."""
        found = [channel[self._numbers[z]] for channel in self._channels]
        return found[0] if len(found) == 1 else np.concatenate(found)


ALONE = Neighbourhood()  # single slices


def common_distance(domains: Iterable[Sequence[float]]) -> float:
    """Compute the distance of neighbours in mm for volumes that are not resampled.

    It is the median slice distance of the domain with the thicker slices: there, neighbours are
    adjacent slices; in the other domain, slices at the closest possible distance.

    Args:
        domains: slice distances in mm of each domain's training volumes.

    Returns:
        The distance, rounded to 0.001 mm because headers contain rounding errors.

    Example:
        >>> common_distance([[5.0, 5.0], [8.0, 8.0, 13.0]])
        8.0
    """
    return round(max(float(median(distances)) for distances in domains), 3)


def middle(images: Any, slices: int) -> Any:
    """Return the middle slice of each stack's first channel, (N, 1, H, W).

    Args:
        images: (N, channels · slices, H, W), or (N, 1, H, W), which is returned.
        slices: slices of a stack.
    """
    centre = slices // 2 if images.shape[1] > 1 else 0
    return images[:, centre : centre + 1]
