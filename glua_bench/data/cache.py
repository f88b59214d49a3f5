"""Cache of preprocessed volumes: content-addressed, memory-mapped, shared among processes.

The name of an entry is a hash of all its inputs, so entries are never stale; the code that reads
files is one of them. An entry is one file, which is written atomically; concurrent processes write
identical bytes. It carries a checksum, and a damaged entry is rebuilt. Reading needs no permission
to write.

Images and labels have separate directories and unrelated names, so that an image entry does not
lead to its label.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glua_bench.console import warn
from glua_bench.data.formats import files_of
from glua_bench.data.resampling import Placement
from glua_bench.data.stores import (
    IMAGE_TYPE,
    LABEL_TYPE,
    CachedImage,
    CachedLabel,
    open_entry,
    read_entry,
)
from glua_bench.data.volumes import load_channel, load_image, load_label
from glua_bench.errors import DataError, RunFailure
from glua_bench.files import (
    CHECKSUM,
    Damaged,
    NotWritable,
    add_checksum,
    read_checked,
    read_checked_json,
    replacing,
    sha256,
    storing,
    write_checked,
    write_checked_json,
)
from glua_bench.identity import code_digest
from glua_bench.task import Case, GridView, Reading, UnlabelledCase, check_channels

OPTION = "GLUA_BENCH_CACHE"  # named in error messages
# The module whose code, with all that it imports, is part of the keys of prepared slices.
READING = ("glua_bench.data.cache",)
# Part of every hash, and therefore of the ids of all runs. Not a version: formats have checksums,
# and code is hashed.
_SALT = 2
# A file changed more recently may change again with the same time stamp.
_SETTLED_NS = 2_000_000_000
_private: list[tempfile.TemporaryDirectory[str]] = []  # at most one, see `SliceCache`
_told: set[Path] = set()  # damaged files that the user has been told of


class SliceCache:
    """Preprocessed volumes, built on first use.

    Where the user may not write to the cache, entries that it lacks are written to a temporary
    directory of this process.

    Args:
        root: directory of the entries; default: `slices` in `cache_root()`.
        private: use a temporary directory if the cache cannot be written; else raise `NotWritable`.
    """

    def __init__(self, root: Path | None = None, private: bool = True) -> None:
        self.root = root if root is not None else cache_root() / "slices"
        self._private = private

    def image(self, case: UnlabelledCase, view: GridView) -> CachedImage:
        """Return the image of a case on the working grid, with all its channels.

        Raises:
            DataError: the image cannot be used.
            RunFailure: the disk is full or the cache cannot be written.
        """
        check_channels(case, view.reading)
        first = file_digest(case.image)
        name = self._image_name(first, view)
        path = self._find(name)
        if path is None:
            _verify(case.image, first)
            loaded = load_image(case.image, view.reading, view.grid)
            description = {"placement": asdict(loaded.placement)}
            path = self._write(name, loaded.voxels.astype(IMAGE_TYPE), description)
        placement = Placement.from_dict(open_entry(path)[1]["placement"])
        further = []
        for index, file in enumerate(case.further, 1):
            digest = file_digest(file)
            name = self._channel_name(digest, first, view, index)
            own = self._find(name)
            if own is None:
                _verify(file, digest)
                voxels = load_channel(file, view.reading, index, placement, case.image)
                own = self._write(name, voxels.astype(IMAGE_TYPE), {})
            further.append(CachedImage(own, placement, placement.shape))
        return CachedImage(path, placement, placement.shape, tuple(further))

    def label(self, case: Case, view: GridView) -> CachedLabel:
        """Return the label of a case on the working grid of its image.

        Raises:
            DataError: image or label cannot be used.
            RunFailure: the disk is full or the cache cannot be written.
        """
        digest = file_digest(case.truth)
        name = self._label_name(digest, file_digest(case.image), view)
        path = self._find(name)
        if path is None:
            placement = self.image(case.unlabelled(), view).placement
            _verify(case.truth, digest)
            labels = load_label(case.truth, case.image, view, placement)
            path = self._write(name, labels.astype(LABEL_TYPE, copy=False), {})
        depth, height, width = open_entry(path)[0].shape
        return CachedLabel(path, (depth, height, width))

    def holds(self, case: Case | UnlabelledCase, view: GridView) -> bool:
        """Return True if the case's image (and label, if it has one) is cached.

        No volume is read: a file without a stored digest counts as not cached.
        """
        image = _stored_digest(case.image)
        if image is None or self._find(self._image_name(image, view)) is None:
            return False
        if len(case.images) != view.reading.inputs:
            return False
        for index, file in enumerate(case.further, 1):
            own = _stored_digest(file)
            if own is None or self._find(self._channel_name(own, image, view, index)) is None:
                return False
        if not isinstance(case, Case) or case.label is None:
            return True
        label = _stored_digest(case.label)
        return label is not None and self._find(self._label_name(label, image, view)) is not None

    def _image_name(self, image: str, view: GridView) -> Path:
        return self._name("images", view, view.reading.channel(0), image)

    def _channel_name(self, channel: str, image: str, view: GridView, index: int) -> Path:
        # The first channel determines the crop.
        return self._name("images", view, view.reading.channel(index), channel, image)

    def _label_name(self, label: str, image: str, view: GridView) -> Path:
        # The image determines the crop, so its content is part of the label's key.
        values = [structure.values for structure in view.structures]
        return self._name("labels", view, view.reading.channel(0), label, image, values)

    def _name(self, kind: str, view: GridView, reading: Reading, *content: object) -> Path:
        """Return the path of an entry, relative to the root."""
        key = _key(kind, code_digest(READING), content, reading.identity(), asdict(view.grid))
        return Path(kind) / key[:2] / f"{key}.npy"

    def _find(self, name: Path) -> Path | None:
        """Return the path of an intact entry; None if there is none."""
        for root in (self.root, *(Path(own.name) for own in _private)):
            try:
                read_entry(root / name)
                return root / name
            except OSError:  # also one that this user may not read
                pass
            except Damaged as error:
                _tell(root / name, f"{error}; its slices are prepared again.")
        return None

    def _write(self, name: Path, voxels: np.ndarray, description: dict[str, Any]) -> Path:
        """Write an entry and return its path."""
        try:
            return _write_entry(self.root / name, voxels, description)
        except NotWritable as error:
            if not self._private:
                raise
            if not _private:
                with storing(self.root, OPTION):
                    _private.append(tempfile.TemporaryDirectory(prefix="glua-bench-slices-"))
                why = getattr(error.__cause__, "strerror", None) or "no permission"
                warn(
                    f"{self.root} cannot be written ({why}), so this process keeps its slices in "
                    f"{_private[0].name} until it ends; set {OPTION} to a directory of your own to "
                    "keep them."
                )
            return _write_entry(Path(_private[0].name) / name, voxels, description)


def _write_entry(path: Path, voxels: np.ndarray, description: dict[str, Any]) -> Path:
    with replacing(path, OPTION) as temporary:
        np.save(temporary, voxels)
        with temporary.open("ab") as file:
            file.write(json.dumps(description).encode())
        add_checksum(temporary, path.name)
    _told.discard(path)
    return path


def _tell(path: Path, text: str) -> None:
    """Warn of a damaged file, once until it is written again."""
    if path not in _told:
        _told.add(path)
        warn(text)


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


def _verify(path: Path, digest: str) -> None:
    """Compare the content of a volume's files, before it is read, with its stored digest.

    Raises:
        DataError: the content changed although size, times and inode did not.
    """
    if _joined([_hashed(file) for file in files_of(path)]) != digest:
        raise DataError(
            f"{path} no longer has the content that it had at this time stamp, so its disk may be "
            f"damaged: restore it from a copy{' (or delete it)' if _record(path).exists() else ''}."
        )


# -- files that datasets generate or convert ------------------------------------------------------


@contextmanager
def generating(path: Path, option: str = OPTION) -> Iterator[Path]:
    """Write a volume as `files.replacing` does, and keep its checksum beside it for `intact`.

    Args:
        path: the file; its directory is created.
        option: names the directory to whoever cannot write it.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    with replacing(path, option) as temporary:
        yield temporary
        # First, so that a complete volume has a checksum. Equal inputs give equal volumes.
        write_checked_json(_record(path), {"content": sha256(temporary)}, option)


def intact(*paths: Path) -> bool:
    """Return True if files that `generating` wrote are what was written; warn of a damaged one."""
    return all(map(_one_intact, paths))


def _one_intact(path: Path) -> bool:
    try:
        if read_checked_json(_record(path)).get("content") == file_digest(path):
            return True
        problem = str(Damaged(path, "its checksum differs"))
    except (OSError, DataError):  # one of them is missing
        return False
    except Damaged as error:
        problem = str(error)
    warn(f"{problem}; it is written again.")
    return False


def _record(path: Path) -> Path:
    """Return the file with a volume's checksum, hidden from everything that lists files."""
    return path.with_name(f".{path.name}.{CHECKSUM}")


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
    store = cache_root() / "digests" / f"{_key(*identity)}.{CHECKSUM}"
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
    try:
        return read_checked(store, store.name).decode(), store, settled
    except OSError:
        pass
    except Damaged as error:
        _tell(store, f"{error}; the digest of {path} is computed again.")
    return "", store, settled


def _one_digest(path: Path) -> str:
    """Return the SHA-256 of one file, stored or computed."""
    digest, store, settled = _recall(path)
    if digest:
        return digest
    digest = _hashed(path)
    if settled:
        with suppress(RunFailure):  # the digest is computed again next time
            write_checked(store, digest.encode(), store.name)
            _told.discard(store)
    return digest


def _hashed(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions."
        ) from error


def _key(*parts: object) -> str:
    """Return the SHA-256 of JSON values."""
    text = json.dumps([_SALT, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
