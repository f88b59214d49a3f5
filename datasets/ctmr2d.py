"""The public 2-D CT and MR slices of Wu and Zhuang, read from the release's archives.

The release holds single slices as NIfTI files in five archives. `prepare` stacks the slices of a
case in the cache once. docs/ctmr2d.md lists what is known about the release and what is inferred.
"""

from __future__ import annotations

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np

from glua_bench.data.cache import generating
from glua_bench.data.volumes import label_integers
from glua_bench.datasets.conversion import ConvertedDataset, stamp
from glua_bench.errors import DataError, reason
from glua_bench.files import Damaged
from glua_bench.paths import files_below, visible
from glua_bench.task import Case, Grid, Reading, Structure

SLICES = 16  # per case
# Archive → domain, cases, whether it has labels that may be used.
ARCHIVES = {
    "CT_withGT": ("ct", range(33, 53), True),
    "CT_woGT": ("ct", range(1, 33), False),
    "MR_withGT": ("mr", range(1, 21), True),
    "MR_woGT0": ("mr", range(21, 47), False),
    "MR_woGT1": ("mr", range(21, 47), False),
}
# The last eight labelled cases of each domain: two for validation, six for the test.
VALIDATION, TEST = 2, 6
OTHER_STRUCTURES = (420, 421, 550, 600)  # that some files contain and the release does not explain
_LARGEST = 2**26  # bytes of one slice's file, far above the release's
_ADDED = ("Thumbs.db", "desktop.ini")  # by file managers; `visible` knows the others
_NAME = re.compile(r"(img|lab)(\d+)_slice(\d+)\.nii(\.gz)?")
_OBTAIN = (
    "clone https://github.com/FupingWu90/CT_MR_2D_Dataset_DA and keep its archives as they are"
)


@dataclass(frozen=True)
class Slice:
    """One file of the release: a member of an archive, or a file of its own."""

    place: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.member}" if self.member else str(self.place)


# Case → its images and labels by number of the slice.
Slices = dict[int, tuple[dict[int, Slice], dict[int, Slice]]]


class CTMR2D(ConvertedDataset):
    """Long-axis slices of the heart in CT and MR, the public 2-D release of Wu and Zhuang.

    Files: `CT_withGT.zip`, `CT_woGT.zip`, `MR_withGT.zip`, `MR_woGT0.zip` and `MR_woGT1.zip`, or
    directories of these names, with slices such as `img33_slice1.nii.gz` and labels such as
    `lab33_slice1.nii.gz`.

    Cases. The release has 20 labelled cases of each modality (CT 33-52, MR 1-20) and 32 CT (1-32)
    and 26 MR (21-46) without manual labels, 16 slices each. Labelled cases are split in the order
    of their numbers: 12 for training, 2 for validation, 6 for the test. The others serve only as
    unlabelled target training images; the pseudo-labels that come with them are never read.

    A case is a stack of its 16 slices. The release does not state how they lie in the body, so they
    do not count as neighbours.

    Args:
        root: directory with the release's archives; None uses `default_root()`.
    """

    name = "ctmr2d"
    reference = "Wu & Zhuang, TMI 2020 (CT_MR_2D_Dataset_DA)"
    needs = (
        "the archives of https://github.com/FupingWu90/CT_MR_2D_Dataset_DA, without registration"
    )
    structures = (
        Structure("MYO", "left ventricular myocardium", (205,), "#2a9d8f"),
        Structure("LV", "left ventricular cavity", (500,), "#e76f51"),
    )
    directions = ("mr-ct", "ct-mr")
    reading = Reading(
        orientation="stored", slice_axis=2, row_axis=1, ignored_values=OTHER_STRUCTURES
    )
    grids = {"quick": Grid(64, 3.0), "standard": Grid(192, 1.0), "paper": Grid(192, 1.0)}
    distance_note = (
        "mm by the files' headers in the plane; the distance of the slices is not stated by the "
        "release and taken as their pixel size, so distances across slices have no unit"
    )
    publishable = False
    neighbouring_slices = False

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Stack the slices of cases that are new or have changed; archives are not modified.

        Raises:
            DataError: files are missing, damaged or differ from the release.
            RunFailure: the cache cannot be written.
        """
        index: dict[str, list[str | bool]] = {}
        for name in ARCHIVES:
            if (self.root / name).is_dir() and (self.root / f"{name}.zip").is_file():
                report(f"{self.name}: {name}.zip is read, and the directory {name} beside it not")
        found = self._found()
        for (domain, labelled), cases in found.items():
            for number in sorted(cases):
                case = f"{domain}_{number:02d}"
                index[case] = [domain, _split(domain, number), labelled]
                if self._convert(case, *cases[number]):
                    report(f"{self.name}: {len(index)} {case}")
        self.write_index(index)

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of "ct" or "mr" from the last `prepare`.

        Raises:
            DataError: the domain is unknown, files are missing, or nothing is prepared.
        """
        if domain not in self.domains():
            raise DataError(f"Dataset '{self.name}' has no domain '{domain}': use ct or mr.")
        try:
            index = self.index()
        except (OSError, Damaged) as error:
            self._found()  # a missing file is the clearer problem
            raise DataError(
                f"The slices below {self.root} are not stacked: run "
                f"`glua-bench data prepare {self.name}` first."
            ) from error
        made = []
        for case, (own, split, labelled) in sorted(index.items()):
            image, label = self._paths(case)
            if own == domain:
                made.append(
                    Case(
                        case, own, image, label if labelled else None, split, f"{self.name}_{case}"
                    )
                )
        return tuple(made)

    def _paths(self, case: str) -> tuple[Path, Path]:
        """Return image and label of a case."""
        return self.converted / f"{case}.nii.gz", self.converted / f"{case}_label.nii.gz"

    def _found(self) -> dict[tuple[str, bool], Slices]:
        """Return the slices of each domain, labelled and not, by case.

        Raises:
            DataError: an archive, a slice or a label is missing, or a name is unknown.
        """
        places = {name: self._place(name) for name in ARCHIVES}
        lacking = [f"{name}.zip" for name, place in places.items() if place is None]
        if lacking:
            raise DataError(
                f"{self.root} lacks {', '.join(lacking)}: {_OBTAIN}, and set GLUA_BENCH_DATA or "
                "--data-root to their directory."
            )
        found: dict[tuple[str, bool], Slices] = {}
        faults: list[str] = []
        for name, place in places.items():
            assert place is not None
            domain, numbers, labelled = ARCHIVES[name]
            cases = found.setdefault((domain, labelled), {})
            faults += _grouped(_sorted_in(place, name, numbers, labelled, cases))
        for (domain, labelled), cases in found.items():
            wanted = {
                number
                for own, numbers, usable in ARCHIVES.values()
                if (own, usable) == (domain, labelled)
                for number in numbers
            }
            faults += _grouped(_incomplete(self.root, domain, cases, wanted, labelled))
        if faults:
            # Together, so that files that differ from the release are known at once.
            raise DataError("; ".join(faults) + ".")
        return found

    def _place(self, name: str) -> Path | None:
        """Return an archive, or the directory that was extracted from it."""
        for place in (self.root / f"{name}.zip", self.root / name):
            if place.exists():
                return place
        return None

    def _convert(self, case: str, images: dict[int, Slice], labels: dict[int, Slice]) -> bool:
        """Write image and label of a case if needed; return whether they were written."""
        image, label = self._paths(case)
        files = [*images.values(), *labels.values()]
        stamps = [[*stamp(file.place), file.member] for file in files]
        if self.up_to_date(case, stamps, *((image, label) if labels else (image,))):
            return False
        voxels, affine = _stacked(images)
        if labels:
            classes, _ = _stacked(labels, like=voxels.shape)
            for position, file in enumerate(labels[n] for n in sorted(labels)):
                _known_values(classes[..., position], file)
            _save(label, label_integers(classes, label).astype(np.int16), affine)
        _save(image, voxels, affine)
        self.write_record(case, {"of": stamps})
        return True


def _split(domain: str, number: int) -> str:
    """Return the split of a case."""
    for own, numbers, labelled in ARCHIVES.values():
        if labelled and own == domain and number in numbers:
            left = numbers[-1] - number  # cases after this one
            return "test" if left < TEST else "val" if left < TEST + VALIDATION else "train"
    return "train"


def _sorted_in(
    place: Path, name: str, numbers: range, labelled: bool, cases: Slices
) -> Iterator[tuple[str, str]]:
    """Add the slices of an archive to `cases`, and yield what differs from the release.

    Args:
        place: the archive or directory.
        name: of the archive.
        numbers: cases that it may hold.
        labelled: whether its labels are used; where not, only images are read, because the
            release does not state how its pseudo-labels are called.
        cases: receives the slices.

    Yields:
        Kind of the difference, and a sentence.
    """
    for file in _listed(place):
        shown = PurePosixPath(file.member or file.place.name).name
        match = _NAME.fullmatch(shown)
        if not labelled and not shown.startswith("img"):
            continue  # a pseudo-label
        if match is None:
            yield (
                "name",
                f"{file} is not named as in the release, img33_slice1.nii.gz or "
                "lab33_slice1.nii.gz: rename it, or remove it if it does not belong there.",
            )
            continue
        number, position = int(match[2]), int(match[3])
        if number not in numbers:
            yield (
                "case",
                f"{file} is of case {number}, but {name} holds the cases {numbers[0]} to "
                f"{numbers[-1]} of the release: give the release's files.",
            )
            continue
        own = cases.setdefault(number, ({}, {}))[match[1] == "lab"]
        if position in own:
            yield "twice", f"{file} and {own[position]} are the same slice: remove one of them."
        else:
            own[position] = file


def _grouped(faults: Iterable[tuple[str, str]]) -> list[str]:
    """Return the first sentence of each kind of fault, with the number of the others."""
    kinds: dict[str, list[str]] = {}
    for kind, sentence in faults:
        kinds.setdefault(kind, []).append(sentence)
    return [
        own[0].rstrip(".") + (f" (and {len(own) - 1} more like it)" if len(own) > 1 else "")
        for own in kinds.values()
    ]


def _incomplete(
    root: Path, domain: str, cases: Slices, wanted: set[int], labelled: bool
) -> Iterator[tuple[str, str]]:
    """Yield which cases lack slices or, where they should have some, labels.

    Yields:
        Kind of the fault, and a sentence.
    """
    absent = sorted(wanted - set(cases))
    if absent:
        kind = "labelled" if labelled else "unlabelled"
        yield (
            "absent",
            f"{root} lacks the {kind} {domain} cases {', '.join(map(str, absent[:5]))}"
            f"{' and more' if len(absent) > 5 else ''}: {_OBTAIN}.",
        )
    for number, (images, labels) in cases.items():
        if set(images) not in (set(range(1, SLICES + 1)), set(range(SLICES))):
            some = next(iter({**labels, **images}.values()))
            yield (
                "slices",
                f"{domain} case {number} has the slices {_numbers(images)} instead of 1 to "
                f"{SLICES} (beside {some}): complete it from the release.",
            )
        if labelled and (bare := sorted(set(images) - set(labels))):
            yield (
                "bare",
                f"{images[bare[0]]} has no label lab{number}_slice{bare[0]} beside it: complete it "
                "from the release.",
            )
        if alone := sorted(set(labels) - set(images)):
            yield (
                "alone",
                f"{labels[alone[0]]} has no image beside it: complete it from the release.",
            )


def _numbers(positions: Mapping[int, Slice]) -> str:
    return ", ".join(map(str, sorted(positions))) or "none"


def _listed(place: Path) -> Iterator[Slice]:
    """Yield the files of an archive or directory, without those that systems add.

    Raises:
        DataError: the archive is damaged, or a name leads out of it.
    """
    if place.is_dir():
        yield from (Slice(path) for path in files_below(place) if path.name not in _ADDED)
        return
    with _opened(place) as archive:
        infos = archive.infolist()
    for info in infos:
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        if ".." in parts or info.filename.startswith(("/", "\\")):
            raise DataError(
                f"{place} holds {info.filename!r}, a name that leads out of the archive: give the "
                "release's archive."
            )
        if info.is_dir() or not all(map(visible, parts)) or parts[-1] in _ADDED:
            continue
        if info.file_size > _LARGEST:
            raise DataError(
                f"{place} holds {info.filename!r} with {info.file_size >> 20} MiB, which is no "
                "slice: give the release's archive."
            )
        yield Slice(place, info.filename)


@contextmanager
def _opened(place: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; damage becomes one sentence."""
    try:
        with zipfile.ZipFile(place) as archive:
            yield archive
    # zipfile raises RuntimeError, of which NotImplementedError is one, for encrypted members.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(
            f"{place} cannot be read ({reason(error)}): replace it by an intact archive of the "
            "release."
        ) from error


def _voxels(file: Slice, archive: zipfile.ZipFile | None) -> tuple[np.ndarray, tuple[float, float]]:
    """Read one slice, (X, Y), and its pixel size in mm.

    Args:
        file: a file, or a member of `archive`.
        archive: the opened archive.

    Raises:
        DataError: it is damaged or no slice.
    """
    if archive is not None:
        content = archive.read(file.member)
    else:
        try:
            content = file.place.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({reason(error)}).") from error
    try:
        if content[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                content = packed.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError("it is larger than any slice")
        image = nib.Nifti1Image.from_bytes(content)
        voxels = np.asarray(image.dataobj)
        zooms = image.header.get_zooms()
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise DataError(
            f"{file} cannot be read as a slice ({reason(error)}): replace it by an intact file of "
            "the release."
        ) from error
    # The axis of one voxel may be any: users' loaders suggest that it is the first.
    plane = [axis for axis, n in enumerate(voxels.shape) if n > 1]
    flat = voxels.reshape([voxels.shape[axis] for axis in plane])
    if flat.ndim != 2 or flat.dtype.kind not in "iufb":
        raise DataError(
            f"{file} has {' × '.join(map(str, voxels.shape))} voxels, which is no slice: give the "
            "release's files."
        )
    # NaN fails both comparisons.
    if not (flat.min() >= -(2**31) and flat.max() < 2**31):
        raise DataError(
            f"{file} contains values that are not finite or need more than 32 bits: replace it by "
            "an intact file of the release."
        )
    return flat, (float(zooms[plane[0]]), float(zooms[plane[1]]))


def _stacked(
    files: Mapping[int, Slice], like: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stack slices in the order of their numbers; return (X, Y, slices) and the affine.

    Args:
        files: number of the slice → file.
        like: shape that the stack must have.

    Raises:
        DataError: numbers or sizes of pixels differ, or a file is damaged.
    """
    made: list[np.ndarray] = []
    sizes: list[tuple[float, float]] = []
    places = {file.place: None for file in files.values() if file.member}
    with ExitStack() as stack:
        opened = {place: stack.enter_context(_opened(place)) for place in places}
        read = [_voxels(files[n], opened.get(files[n].place)) for n in sorted(files)]
    for number, (voxels, size) in zip(sorted(files), read, strict=True):
        wanted = like[:2] if like is not None else made[0].shape if made else voxels.shape
        if voxels.shape != wanted:
            raise DataError(
                f"{files[number]} has {voxels.shape[0]} × {voxels.shape[1]} pixels, but its "
                f"{'image' if like is not None else 'first slice'} has {wanted[0]} × {wanted[1]}: "
                "give the release's files."
            )
        if sizes and like is None and not np.allclose(size, sizes[0], rtol=1e-3, atol=0):
            raise DataError(
                f"{files[number]} states pixels of {size[0]:g} × {size[1]:g} mm, but its first "
                f"slice {sizes[0][0]:g} × {sizes[0][1]:g}: give the release's files."
            )
        made.append(voxels)
        sizes.append(size)
    x, y = sizes[0]
    if not (np.isfinite([x, y]).all() and x > 0 and y > 0):
        raise DataError(f"{files[min(files)]} states pixels of {x} × {y} mm: correct its header.")
    return np.stack(made, axis=-1), np.diag([x, y, x, 1.0])


def _known_values(labels: np.ndarray, file: Slice) -> None:
    """Check the values of a label.

    Raises:
        DataError: a value is unknown.
    """
    known = {0, *OTHER_STRUCTURES, *(v for s in CTMR2D.structures for v in s.values)}
    unknown = sorted(set(np.unique(labels).tolist()) - known)
    if unknown:
        raise DataError(
            f"{file} contains the value {unknown[0]:g}, which is none of "
            f"{', '.join(map(str, sorted(known)))}: give the release's labels."
        )


def _save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a stack as NIfTI."""
    kind: np.dtype = np.dtype(np.float32) if voxels.dtype.kind == "f" else voxels.dtype
    if kind.itemsize > 4 or kind == np.dtype(np.uint32):  # that NIfTI readers lack
        kind = np.dtype(np.int32)
    with generating(path) as unfinished:
        nib.save(nib.Nifti1Image(voxels.astype(kind), affine), unfinished)
