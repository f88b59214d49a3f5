"""Prepared slices of several volumes, opened for training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from glua_bench.data.neighbours import ALONE, Neighbourhood
from glua_bench.data.resampling import Placement
from glua_bench.errors import DataError

# Half precision: its error of at most 2.4e-4 in [-1, 1] is under half a unit of a 12-bit image,
# and it halves the disk and the page cache that volumes occupy.
IMAGE_TYPE = np.dtype(np.float16)

LABEL_TYPE = np.dtype(np.uint8)

# Stores up to this size are held in memory as one array.
IN_MEMORY = 256 * 2**20

# More maps than this are never open at once, so that memory does not grow with the data set.
OPEN_MAPS = 16


@dataclass(frozen=True)
class CachedImage:
    """A preprocessed image volume on disk.

    Args:
        path: the .npy file.
        placement: the way back to the original file's voxels.
        shape: (Z, H, W).
    """

    path: Path
    placement: Placement
    shape: tuple[int, int, int]

    def open(self) -> np.memmap:
        """Read-only float16 (Z, H, W) in [-1, 1]."""
        return map_file(self.path, self.shape, IMAGE_TYPE)


@dataclass(frozen=True)
class CachedLabel:
    """A preprocessed label volume on disk, on the grid of its image.

    Args:
        path: the .npy file.
        shape: (Z, H, W).
    """

    path: Path
    shape: tuple[int, int, int]

    def open(self) -> np.memmap:
        """Read-only uint8 (Z, H, W), class indices."""
        return map_file(self.path, self.shape, LABEL_TYPE)


class ImageStore:
    """The slices of many cached images, numbered from 0 through all of them.

    It knows images and nothing else: target-side training sees an `ImageStore`. Every slice is
    stored once, and its neighbours are gathered when it is read.

    Args:
        images: volumes whose slices have one size.
        in_memory: hold everything as one array; None decides by size (256 MiB).
        neighbourhood: which slices of its volume are served with each slice; by default none.

    Raises:
        ValueError: no volumes, or slices of different size.

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
        self._images = _Slices(images, IMAGE_TYPE, in_memory)
        starts = np.cumsum([0, *(image.shape[0] for image in images)])
        self._stacks = np.concatenate(  # int64 (len, S), numbers of each stack's slices
            [
                start + neighbourhood.numbers(image.shape[0], image.placement.grid_spacing[0])
                for start, image in zip(starts, images, strict=False)
            ]
        )
        # Both as the caller needs them to go from a slice back to its case.
        self.volumes: np.ndarray = self._images.volumes  # int64 (len,), index of the volume
        self.positions: np.ndarray = self._images.positions  # int64 (len,), z in the volume

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.volumes)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every slice."""
        return self._images.size

    def images(
        self, indices: Sequence[int] | np.ndarray, dtype: type | np.dtype = np.float32
    ) -> np.ndarray:
        """Slices by number, each in the middle of its neighbours.

        Args:
            indices: N numbers from 0 to len - 1, in any order, repeats allowed.
            dtype: of the result; `IMAGE_TYPE` spares the conversion.

        Returns:
            (N, S, H, W) in [-1, 1], in the order of `indices`; S slices of one volume, in its
            order.

        Raises:
            IndexError: a number is out of range.
        """
        stacks = self._stacks[self._images.checked(indices)]
        found = self._images.take(stacks).astype(dtype, copy=False)
        return found.reshape(*stacks.shape, *self.size)


class LabelledStore(ImageStore):
    """Slices with their labels.

    Args:
        images: volumes whose slices have one size.
        labels: the label of each volume, in the same order.
        in_memory: hold everything in memory; None decides by size (256 MiB).
        neighbourhood: of images; labels are those of the middle slices alone.

    Raises:
        ValueError: numbers or shapes of images and labels differ.
    """

    def __init__(
        self,
        images: Sequence[CachedImage],
        labels: Sequence[CachedLabel],
        in_memory: bool | None = None,
        neighbourhood: Neighbourhood = ALONE,
    ) -> None:
        if [image.shape for image in images] != [label.shape for label in labels]:
            raise ValueError("Images and labels of a store have different numbers or shapes.")
        super().__init__(images, in_memory, neighbourhood)
        self._labels = _Slices(labels, LABEL_TYPE, in_memory)

    def labels(
        self, indices: Sequence[int] | np.ndarray, dtype: type | np.dtype = np.int64
    ) -> np.ndarray:
        """Labels of slices by number.

        Args:
            indices: as for `images`.
            dtype: of the result; `LABEL_TYPE` spares the conversion.

        Returns:
            (N, H, W), class indices, in the order of `indices`.

        Raises:
            IndexError: a number is out of range.
        """
        return self._labels.take(indices).astype(dtype, copy=False)


class _Slices:
    """The slices of many memory-mapped volumes under one numbering."""

    def __init__(
        self,
        entries: Sequence[CachedImage | CachedLabel],
        dtype: np.dtype,
        in_memory: bool | None,
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
            for entry in entries:  # one map at a time, so that memory holds each volume once
                self._all[start : start + entry.shape[0]] = entry.open()
                start += entry.shape[0]

    def checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Slice numbers as int64 (N,), all of them in range."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self.volumes)):
            raise IndexError(f"Slice numbers lie between 0 and {len(self.volumes) - 1}.")
        return wanted

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(N, H, W) as they are stored, a copy."""
        wanted = self.checked(indices)
        if self._all is not None:
            return self._all[wanted]
        out = np.empty((len(wanted), *self.size), self._dtype)
        # Sorted, each volume is opened once for a batch and read front to back.
        with self._lock:
            for place in np.argsort(wanted, kind="stable"):
                number = wanted[place]
                out[place] = self._volume(int(self.volumes[number]))[self.positions[number]]
        return out

    def _volume(self, index: int) -> np.ndarray:
        """An open volume; the one unused for longest is closed."""
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        while len(self._open) >= OPEN_MAPS:
            self._open.popitem(last=False)
        self._open[index] = self._entries[index].open()
        return self._open[index]

    def __getstate__(self) -> dict:
        """A store goes to another process without its maps, which open there again."""
        state = {**self.__dict__, "_open": OrderedDict()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=Lock())


def map_file(path: Path, shape: Sequence[int], dtype: np.dtype) -> np.memmap:
    """A read-only map of an array of known shape and type.

    Raises:
        DataError: the file is gone or is not that array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} of the cache is missing or damaged: run the command again to rebuild it."
        ) from error
    if not isinstance(array, np.memmap) or array.shape != tuple(shape) or array.dtype != dtype:
        raise DataError(f"{path} of the cache is damaged: delete it and run the command again.")
    return array
