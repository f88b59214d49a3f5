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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from glua_bench.data.formats import files_of
from glua_bench.data.resampling import Placement
from glua_bench.data.stores import IMAGE_TYPE, LABEL_TYPE, CachedImage, CachedLabel, map_file
from glua_bench.data.volumes import load_image, load_label
from glua_bench.errors import DataError, RunFailure
from glua_bench.files import replacing, sha256, write_json, write_text
from glua_bench.identity import code_digest
from glua_bench.task import Case, GridView, UnlabelledCase

OPTION = "GLUA_BENCH_CACHE"  # names the cache to whoever cannot write it

CACHE_VERSION = 2  # of what entries look like

READING = ("glua_bench.data.volumes",)  # makes voxels of files; entries of other code are others

# A file changed this recently may change again without a new time stamp.
_SETTLED_NS = 2_000_000_000


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
        map_file(path, shape, dtype)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return description
