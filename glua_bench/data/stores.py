"""Access to the cached slices of several volumes for training."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from glua_bench.data.neighbours import ALONE, Neighbourhood, Stacks
from glua_bench.data.resampling import Placement
from glua_bench.errors import DataError
from glua_bench.files import Damaged, check

# Half precision halves disk and memory; its error in [-1, 1], at most 2.4e-4, is less than half a
# grey level of a 12-bit image.
IMAGE_TYPE = np.dtype(np.float16)
LABEL_TYPE = np.dtype(np.uint8)
# Smaller stores are held in memory as one array.
IN_MEMORY = 256 * 2**20
# Maximum number of open memory maps.
OPEN_MAPS = 16


@dataclass(frozen=True)
class CachedImage:
    """A preprocessed image volume on disk.

    Attributes:
        path: the .npy file.
        placement: maps the grid to the original file's voxels.
        shape: (Z, H, W).
        further: the second and later channels, on the same grid.
    """

    path: Path
    placement: Placement
    shape: tuple[int, int, int]
    further: tuple[CachedImage, ...] = ()

    @property
    def channels(self) -> tuple[CachedImage, ...]:
        """The volume of each channel."""
        return (self, *self.further)

    def open(self) -> np.memmap:
        """Map the (first channel's) volume, read-only float16 (Z, H, W) in [-1, 1]."""
        return open_entry(self.path)[0]

    def stacks(self, neighbourhood: Neighbourhood) -> Stacks:
        """Return the input of the network for every slice, with all channels."""
        further = (channel.open() for channel in self.further)
        return neighbourhood.stacks(self.open(), self.placement.grid_spacing[0], *further)


@dataclass(frozen=True)
class CachedLabel:
    """A preprocessed label volume on disk, on the grid of its image.

    Attributes:
        path: the .npy file.
        shape: (Z, H, W).
    """

    path: Path
    shape: tuple[int, int, int]

    def open(self) -> np.memmap:
        """Map the volume, read-only uint8 (Z, H, W), class indices."""
        return open_entry(self.path)[0]


class ImageStore:
    """Slices of several cached images, numbered consecutively.

    It has no labels, so it is used for the target domain. Neighbouring slices are gathered on
    reading.

    Args:
        images: volumes with slices of the same size.
        in_memory: load everything as one array; default: if it is smaller than 256 MiB.
        neighbourhood: neighbours returned with each slice; default: none.

    Raises:
        ValueError: no volumes, slices of different sizes, or different numbers of channels.

    Example:
        >>> store = ImageStore([cache.image(case, view) for case in cases])
        ... # doctest: +SKIP
        >>> store.images(np.array([4, 0])).shape  # doctest: +SKIP
        (2, 1, 256, 256)
    """

    def __init__(
        self,
        images: Sequence[CachedImage],
        in_memory: bool | None = None,
        neighbourhood: Neighbourhood = ALONE,
    ) -> None:
        if len({len(image.channels) for image in images}) != 1:
            raise ValueError(
                "A store needs at least one volume, and the same number of channels in all."
            )
        first, *further = zip(*(image.channels for image in images), strict=True)
        self._images = _Slices(first, IMAGE_TYPE, in_memory)
        self._further = [_Slices(channel, IMAGE_TYPE, in_memory) for channel in further]
        starts = np.cumsum([0, *(image.shape[0] for image in images)])
        self._stacks = np.concatenate(  # int64 (len, S), slice numbers of each stack
            [
                start + neighbourhood.numbers(image.shape[0], image.placement.grid_spacing[0])
                for start, image in zip(starts, images, strict=False)
            ]
        )
        self.volumes: np.ndarray = self._images.volumes  # int64 (len,), volume of each slice
        self.positions: np.ndarray = self._images.positions  # int64 (len,), z in the volume

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.volumes)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every slice."""
        return self._images.size

    @property
    def channels(self) -> int:
        """Number of input channels C."""
        return 1 + len(self._further)

    def images(
        self, indices: Sequence[int] | np.ndarray, dtype: type | np.dtype = np.float32
    ) -> np.ndarray:
        """Read slices by number, each as the centre of its stack.

        Args:
            indices: N slice numbers, in any order, possibly repeated.
            dtype: of the result; `IMAGE_TYPE` avoids a conversion.

        Returns:
            (N, C·S, H, W) in [-1, 1]: S slices of the first channel, then of the second, ….

        Raises:
            IndexError: a number is out of range.
        """
        stacks = self._stacks[self._images.checked(indices)]
        found = [
            channel.take(stacks).astype(dtype, copy=False).reshape(*stacks.shape, *self.size)
            for channel in (self._images, *self._further)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


class LabelledStore(ImageStore):
    """Slices with their labels.

    Args:
        images: see `ImageStore`.
        labels: the label of each volume, in the same order.
        in_memory: see `ImageStore`.
        neighbourhood: of images; labels are those of the middle slices.

    Raises:
        ValueError: as for `ImageStore`, or numbers or shapes of images and labels differ.
    """

    def __init__(
        self,
        images: Sequence[CachedImage],
        labels: Sequence[CachedLabel],
        in_memory: bool | None = None,
        neighbourhood: Neighbourhood = ALONE,
    ) -> None:
        if [image.shape for image in images] != [label.shape for label in labels]:
            raise ValueError("Images and labels of a store differ in number or shape.")
        super().__init__(images, in_memory, neighbourhood)
        self._labels = _Slices(labels, LABEL_TYPE, in_memory)

    def labels(
        self, indices: Sequence[int] | np.ndarray, dtype: type | np.dtype = np.int64
    ) -> np.ndarray:
        """Read labels by slice number.

        Args:
            indices: N slice numbers, as for `images`.
            dtype: of the result; `LABEL_TYPE` avoids a conversion.

        Returns:
            (N, H, W), class indices.

        Raises:
            IndexError: a number is out of range.
        """
        return self._labels.take(indices).astype(dtype, copy=False)


class _Slices:
    """Slices of memory-mapped volumes, numbered consecutively."""

    def __init__(
        self, entries: Sequence[CachedImage | CachedLabel], dtype: np.dtype, in_memory: bool | None
    ) -> None:
        if not entries:
            raise ValueError("A store needs at least one volume.")
        sizes = {entry.shape[1:] for entry in entries}
        if len(sizes) > 1:
            raise ValueError(f"Slices of one store differ in size: {sorted(sizes)}.")
        self.size = sizes.pop()
        depths = [entry.shape[0] for entry in entries]
        self.volumes = np.repeat(np.arange(len(depths)), depths)
        self.positions = np.concatenate([np.arange(depth) for depth in depths])
        self._entries = tuple(entries)
        self._dtype = dtype
        self._all: np.ndarray | None = None
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()  # batches are read ahead in a thread
        total = len(self.volumes) * self.size[0] * self.size[1] * dtype.itemsize
        if in_memory if in_memory is not None else total < IN_MEMORY:
            self._all = np.empty((len(self.volumes), *self.size), dtype)
            start = 0
            for entry in entries:  # one at a time, to limit memory
                self._all[start : start + entry.shape[0]] = entry.open()
                start += entry.shape[0]

    def checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return slice numbers as int64 (N,); raise IndexError if one is out of range."""
        numbers = np.asarray(indices, np.int64).reshape(-1)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self.volumes)):
            raise IndexError(f"Slice numbers must be between 0 and {len(self.volumes) - 1}.")
        return numbers

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read a copy of slices, (N, H, W) in the stored type."""
        numbers = self.checked(indices)
        if self._all is not None:
            return self._all[numbers]
        out = np.empty((len(numbers), *self.size), self._dtype)
        # Sorted, so that each volume is opened once per batch and read sequentially.
        with self._lock:
            for place in np.argsort(numbers, kind="stable"):
                number = numbers[place]
                out[place] = self._volume(int(self.volumes[number]))[self.positions[number]]
        return out

    def _volume(self, index: int) -> np.ndarray:
        """Return an open volume; the least recently used one is closed."""
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        while len(self._open) >= OPEN_MAPS:
            self._open.popitem(last=False)
        self._open[index] = self._entries[index].open()
        return self._open[index]

    def __getstate__(self) -> dict:
        """Pickle without memory maps, which are opened again on access."""
        state = {**self.__dict__, "_open": OrderedDict()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=Lock())


def read_entry(path: Path) -> tuple[np.memmap, dict[str, Any]]:
    """Map an entry of the cache, read-only, and return its description.

    An entry is a .npy file, whose array is followed by a description in JSON and a checksum. The
    checksum is compared once per process.

    Raises:
        Damaged: the entry is not what was written.
        OSError: the entry cannot be read.
    """
    length = check(path, path.name)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(array, np.memmap), path
    end = array.offset + array.nbytes
    with path.open("rb") as file:
        file.seek(end)
        return array, json.loads(file.read(length - end))


def open_entry(path: Path) -> tuple[np.memmap, dict[str, Any]]:
    """Return an entry that was intact a moment ago, as `read_entry`.

    Raises:
        DataError: the entry is missing or damaged.
    """
    try:
        return read_entry(path)
    except (OSError, Damaged) as error:
        raise DataError(
            f"{path} of the cache is missing or damaged: run the command again to rebuild it."
        ) from error
