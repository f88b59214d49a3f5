"""Preprocessed slices on disk: content-addressed, memory-mapped, shared among processes.

An entry's name is the hash of everything that its content depends on, so it is never stale and
never changes once it is there. Of the two files of an entry, the description is placed last. Two
processes that build the same entry write the same bytes, so it does not matter who comes first.

Images and labels live in different directories under unrelated names. Nothing of an image entry,
nor of the objects that serve it, leads to a label.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from glua_bench.errors import DataError, RunFailure
from glua_bench.files import replacing, sha256, write_json, write_text
from glua_bench.formats import files_of
from glua_bench.identity import code_digest
from glua_bench.neighbours import ALONE, Neighbourhood
from glua_bench.task import Case, GridView, UnlabelledCase
from glua_bench.volumes import Placement, load_image, load_label

OPTION = "GLUA_BENCH_CACHE"  # names the cache to whoever cannot write it
CACHE_VERSION = 2  # of what entries look like
READING = ("glua_bench.volumes",)  # makes voxels of files; entries of other code are others
# Half precision: its error of at most 2.4e-4 in [-1, 1] is under half a unit of a 12-bit image,
# and it halves the disk and the page cache that volumes occupy.
IMAGE_TYPE = np.dtype(np.float16)
LABEL_TYPE = np.dtype(np.uint8)
# Stores up to this size are held in memory as one array.
IN_MEMORY = 256 * 2**20
# More maps than this are never open at once, so that memory does not grow with the data set.
OPEN_MAPS = 16
# A file changed this recently may change again without a new time stamp.
_SETTLED_NS = 2_000_000_000


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
        return _map_file(self.path, self.shape, IMAGE_TYPE)


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
        return _map_file(self.path, self.shape, LABEL_TYPE)


class SliceCache:
    """Preprocessed volumes, built on first use and shared by every process with the same root.

    Args:
        root: directory of the entries; None takes `slices` under `cache_root()`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_root() / "slices"

    def image(self, case: UnlabelledCase, view: GridView) -> CachedImage:
        """The image of a case on the working grid.

        Raises:
            DataError: the image cannot be used.
            RunFailure: the disk is full or the cache cannot be written.
        """
        path = self._image_path(file_digest(case.image), view)
        found = _read_entry(path, IMAGE_TYPE)
        if found is None:
            loaded = load_image(case.image, view.reading, view.grid)
            description = {"placement": json.loads(loaded.placement.to_json())}
            found = self._write(path, loaded.voxels.astype(IMAGE_TYPE), description)
        placement = Placement.from_json(json.dumps(found["placement"]))
        return CachedImage(path, placement, placement.shape)

    def label(self, case: Case, view: GridView) -> CachedLabel:
        """The label of a case on the working grid of its image.

        Raises:
            DataError: image or label cannot be used.
            RunFailure: the disk is full or the cache cannot be written.
        """
        digests = file_digest(case.truth), file_digest(case.image)
        path = self._label_path(*digests, view)
        found = _read_entry(path, LABEL_TYPE)
        if found is None:
            placement = self.image(case.unlabelled(), view).placement
            labels = load_label(case.truth, case.image, view, placement)
            found = self._write(path, labels, {})
        depth, height, width = found["shape"]
        return CachedLabel(path, (depth, height, width))

    def holds(self, case: Case, view: GridView) -> bool:
        """Return True if the case's image (and label, if any) is cached.

        No volume is read: a file whose digest is not remembered counts as not cached.
        """
        image = _remembered_digest(case.image)
        if image is None or not _read_entry(self._image_path(image, view), IMAGE_TYPE):
            return False
        if case.label is None:
            return True
        label = _remembered_digest(case.label)
        if label is None:
            return False
        return _read_entry(self._label_path(label, image, view), LABEL_TYPE) is not None

    def _image_path(self, image: str, view: GridView) -> Path:
        """Of the entry of an image with a digest."""
        key = _key("image", code_digest(READING), image, view.reading.identity(), asdict(view.grid))
        return self._path("images", key)

    def _label_path(self, label: str, image: str, view: GridView) -> Path:
        """Of the entry of a label with a digest."""
        # The crop is found in the image, so the image's content is part of the label's key.
        values = [structure.values for structure in view.structures]
        reading, grid, code = view.reading.identity(), asdict(view.grid), code_digest(READING)
        key = _key("label", code, label, image, reading, grid, values)
        return self._path("labels", key)

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.npy"

    def _write(self, path: Path, voxels: np.ndarray, description: dict) -> dict:
        """Put an entry in place, array first and description last."""
        with replacing(path, OPTION) as array_file:
            np.save(array_file, voxels)
            size = array_file.stat().st_size
        description = {**description, "shape": list(voxels.shape), "bytes": size}
        write_json(path.with_suffix(".json"), description, OPTION)
        return description


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


def cache_root() -> Path:
    """`$GLUA_BENCH_CACHE`, or `~/.cache/glua-bench`."""
    return Path(os.environ.get("GLUA_BENCH_CACHE") or "~/.cache/glua-bench").expanduser()


def file_digest(path: Path) -> str:
    """SHA-256 of a volume's content, as hex.

    Where a header keeps its voxels in other files, it is the digest of all their digests. Those of
    single files are remembered in the cache by path, size, times and inode, one small file each, so
    that a run over gigabytes does not read them again. A file that changed within the last two
    seconds is not remembered: it could change again under the same time stamp.

    Raises:
        DataError: a file cannot be read.
    """
    return _joined([_one_digest(file) for file in files_of(Path(path))])


def fingerprint(cases: Iterable[Case | UnlabelledCase]) -> str:
    """What a set of cases consists of: ids and file contents, in any order.

    A `Case` counts with image and label where it has one, an `UnlabelledCase` with its image alone.

    Returns:
        SHA-256 as hex.

    Raises:
        DataError: a file cannot be read.
    """
    lines = []
    for case in cases:
        digests = [file_digest(case.image)]
        if isinstance(case, Case) and case.label is not None:
            digests.append(file_digest(case.label))
        lines.append([case.id, *digests])
    return _key(*sorted(lines))


# -- entries --------------------------------------------------------------------------------------


def _joined(digests: Sequence[str]) -> str:
    """One digest of the files of a volume."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _remembered_digest(path: Path) -> str | None:
    """As `file_digest`, but None where a file would have to be read or cannot be."""
    try:
        digests = [_recall(file)[0] for file in files_of(path)]
    except DataError:
        return None
    known = [digest for digest in digests if digest]
    return _joined(known) if len(known) == len(digests) else None


def _recall(path: Path) -> tuple[str, Path, bool]:
    """The remembered digest of a file or "", where it is kept, and whether it may be."""
    path = path.resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the data directory (--data-root)."
        ) from error
    identity = (str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    memory = cache_root() / "digests" / _key(*identity)
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
    with suppress(OSError, UnicodeDecodeError):
        remembered = memory.read_text()
        if len(remembered) == 64:
            return remembered, memory, settled
    return "", memory, settled


def _one_digest(path: Path) -> str:
    """SHA-256 of one file, from memory where it has not changed."""
    digest, memory, settled = _recall(path)
    if digest:
        return digest
    try:
        digest = sha256(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions."
        ) from error
    if settled:
        with suppress(RunFailure):  # forgetting costs time only
            write_text(memory, digest)
    return digest


def _key(*parts: object) -> str:
    """SHA-256 of a few JSON-able values and the cache's version."""
    text = json.dumps([CACHE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_entry(path: Path, dtype: np.dtype) -> dict | None:
    """The description of an entry; None where it is absent, unfinished or damaged."""
    try:
        description = json.loads(path.with_suffix(".json").read_text())
        shape = tuple(description["shape"])
        if path.stat().st_size != description["bytes"]:
            return None
        _map_file(path, shape, dtype)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return description


def _map_file(path: Path, shape: Sequence[int], dtype: np.dtype) -> np.memmap:
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
