"""Cache of preprocessed volumes: content-addressed, memory-mapped, shared among processes.

The name of an entry is a hash of all its inputs, so entries are never stale. An entry has two
files, of which the description is written last; concurrent processes write identical bytes.

Images and labels have separate directories and unrelated names, so that an image entry does not
lead to its label.
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
from glua_bench.data.volumes import load_channel, load_image, load_label
from glua_bench.errors import DataError, RunFailure
from glua_bench.files import replacing, sha256, write_json, write_text
from glua_bench.identity import code_digest
from glua_bench.task import Case, GridView, Reading, UnlabelledCase, check_channels

OPTION = "GLUA_BENCH_CACHE"  # named in error messages
CACHE_VERSION = 2  # version of the entries' format
READING = ("glua_bench.data.volumes",)  # modules whose code is part of the keys
# A file changed more recently may change again with the same time stamp.
_SETTLED_NS = 2_000_000_000


class SliceCache:
    """Preprocessed volumes, built on first use.

    Args:
        root: directory of the entries; default: `slices` in `cache_root()`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_root() / "slices"

    def image(self, case: UnlabelledCase, view: GridView) -> CachedImage:
        """Return the image of a case on the working grid, with all its channels.

        Raises:
            DataError: the image cannot be used.
            RunFailure: the disk is full or the cache cannot be written.
        """
        check_channels(case, view.reading)
        first = file_digest(case.image)
        path = self._image_path(first, view)
        found = _read_entry(path, IMAGE_TYPE)
        if found is None:
            loaded = load_image(case.image, view.reading, view.grid)
            description = {"placement": asdict(loaded.placement)}
            found = self._write(path, loaded.voxels.astype(IMAGE_TYPE), description)
        placement = Placement.from_dict(found["placement"])
        further = []
        for index, file in enumerate(case.further, 1):
            own = self._channel_path(file_digest(file), first, view, index)
            if _read_entry(own, IMAGE_TYPE) is None:
                voxels = load_channel(file, view.reading, index, placement, case.image)
                self._write(own, voxels.astype(IMAGE_TYPE), {})
            further.append(CachedImage(own, placement, placement.shape))
        return CachedImage(path, placement, placement.shape, tuple(further))

    def label(self, case: Case, view: GridView) -> CachedLabel:
        """Return the label of a case on the working grid of its image.

        Raises:
            DataError: image or label cannot be used.
            RunFailure: the disk is full or the cache cannot be written.
        """
        path = self._label_path(file_digest(case.truth), file_digest(case.image), view)
        found = _read_entry(path, LABEL_TYPE)
        if found is None:
            placement = self.image(case.unlabelled(), view).placement
            labels = load_label(case.truth, case.image, view, placement)
            found = self._write(path, labels, {})
        depth, height, width = found["shape"]
        return CachedLabel(path, (depth, height, width))

    def holds(self, case: Case | UnlabelledCase, view: GridView) -> bool:
        """Return True if the case's image (and label, if it has one) is cached.

        No volume is read: a file without a stored digest counts as not cached.
        """
        image = _stored_digest(case.image)
        if image is None or not _read_entry(self._image_path(image, view), IMAGE_TYPE):
            return False
        if len(case.images) != view.reading.inputs:
            return False
        for index, file in enumerate(case.further, 1):
            own = _stored_digest(file)
            if own is None or not _read_entry(
                self._channel_path(own, image, view, index), IMAGE_TYPE
            ):
                return False
        if not isinstance(case, Case) or case.label is None:
            return True
        label = _stored_digest(case.label)
        return label is not None and bool(
            _read_entry(self._label_path(label, image, view), LABEL_TYPE)
        )

    def _image_path(self, image: str, view: GridView) -> Path:
        return self._path("images", view, view.reading.channel(0), image)

    def _channel_path(self, channel: str, image: str, view: GridView, index: int) -> Path:
        # The first channel determines the crop.
        return self._path("images", view, view.reading.channel(index), channel, image)

    def _label_path(self, label: str, image: str, view: GridView) -> Path:
        # The image determines the crop, so its content is part of the label's key.
        values = [structure.values for structure in view.structures]
        return self._path("labels", view, view.reading.channel(0), label, image, values)

    def _path(self, kind: str, view: GridView, reading: Reading, *content: object) -> Path:
        key = _key(kind, code_digest(READING), content, reading.identity(), asdict(view.grid))
        return self.root / kind / key[:2] / f"{key}.npy"

    def _write(self, path: Path, voxels: np.ndarray, description: dict) -> dict:
        """Write an entry, array first and description last."""
        with replacing(path, OPTION) as array_file:
            np.save(array_file, voxels)
            size = array_file.stat().st_size
        description = {**description, "shape": list(voxels.shape), "bytes": size}
        write_json(path.with_suffix(".json"), description, OPTION)
        return description


def cache_root() -> Path:
    """Return `$GLUA_BENCH_CACHE`, or `~/.cache/glua-bench`."""
    return Path(os.environ.get("GLUA_BENCH_CACHE") or "~/.cache/glua-bench").expanduser()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a volume's file, or of the digests of its files if there are several.

    Digests are stored in the cache by path, size, times and inode, unless the file changed within
    the last two seconds and could change again with the same time stamp.

    Raises:
        DataError: a file cannot be read.
    """
    return _joined([_one_digest(file) for file in files_of(Path(path))])


def fingerprint(cases: Iterable[Case | UnlabelledCase]) -> str:
    """Return the SHA-256 of a set of cases: ids, images and (of a `Case`) labels.

    The order of the cases does not matter; that of a case's channels does.

    Raises:
        DataError: a file cannot be read.
    """
    lines = []
    for case in cases:
        digests = [file_digest(image) for image in case.images]
        if isinstance(case, Case) and case.label is not None:
            digests.append(file_digest(case.label))
        lines.append([case.id, *digests])
    return _key(*sorted(lines))


def _joined(digests: Sequence[str]) -> str:
    """Combine the digests of a volume's files."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _stored_digest(path: Path) -> str | None:
    """Return the digest of a volume, None if it is not stored."""
    try:
        digests = [_recall(file)[0] for file in files_of(path)]
    except DataError:
        return None
    return _joined(digests) if all(digests) else None


def _recall(path: Path) -> tuple[str, Path, bool]:
    """Return the stored digest of a file or "", the path to store it, and whether to store it."""
    path = path.resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the data directory (--data-root)."
        ) from error
    identity = (str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    store = cache_root() / "digests" / _key(*identity)
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
    with suppress(OSError, UnicodeDecodeError):
        digest = store.read_text()
        if len(digest) == 64:
            return digest, store, settled
    return "", store, settled


def _one_digest(path: Path) -> str:
    """Return the SHA-256 of one file, stored or computed."""
    digest, store, settled = _recall(path)
    if digest:
        return digest
    try:
        digest = sha256(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions."
        ) from error
    if settled:
        with suppress(RunFailure):  # the digest is computed again next time
            write_text(store, digest)
    return digest


def _key(*parts: object) -> str:
    """Return the SHA-256 of JSON values and the cache's version."""
    text = json.dumps([CACHE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_entry(path: Path, dtype: np.dtype) -> dict | None:
    """Return the description of an entry; None if it is missing, incomplete or damaged."""
    try:
        description = json.loads(path.with_suffix(".json").read_text())
        shape = tuple(description["shape"])
        if path.stat().st_size != description["bytes"]:
            return None
        map_file(path, shape, dtype)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return description
