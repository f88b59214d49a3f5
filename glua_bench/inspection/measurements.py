"""What one pass over a case's two files tells: geometry, intensities, anatomy, content.

`integrity.py` and `outliers.py` judge these facts, `fingerprint.py` sums them up. They hold no
voxel, and their size does not depend on that of the volumes. The labels of all cases are read,
those of target cases too: looking at data is no training, and nothing of it reaches a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from glua_bench.console import Progress
from glua_bench.data.formats import VolumeFile, open_volume
from glua_bench.data.geometry import doubts, frame, orient, second_form, voxel_ml
from glua_bench.data.parallel import parallel_map
from glua_bench.data.volumes import extremes, foreground, inside, intensities, read_label_volume
from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, DomainView, Reading

Three = tuple[float, float, float]
# Where distributions of intensities are kept, in percent, from their minimum to their maximum.
LEVELS = np.linspace(0, 100, 101)
# The surroundings of the structures are their bounding box and this share of it on each side.
_MARGIN = 0.25
# Distributions of what is not stored as small integers come from at most this many voxels.
_SAMPLE = 2_000_000
_FEW = 16


@dataclass(frozen=True)
class StructureFacts:
    """One structure of one case; axes are the oriented ones, (Z, Y, X).

    Args:
        ml: its volume.
        centre: of its voxels, in mm from the middle of the volume.
        spread: standard deviation of its voxels' places along each axis, in mm.
        level: median intensity of the image inside; nan where the image cannot be read.
    """

    ml: float
    centre: Three
    spread: Three
    level: float


@dataclass(frozen=True)
class ImageFacts:
    """An image volume, without its voxels.

    Args:
        shape: voxels per stored axis.
        spacing: mm per stored axis, as the dataset reads the file.
        affine: of the header, 4 rows of 4.
        second: the affine of the header's other form, where it lies elsewhere; otherwise None.
        doubts: finding and sentence of what the header leaves unsure.
        axes: stored axis of each of (Z, Y, X).
        extremes: lowest and highest intensity.
        levels: intensities at `LEVELS` of the body: of the voxels above the volume's minimum in the
            body's bounding box, from which preprocessing takes its percentiles, too.
        negative: share of the voxels below 0.
        flat: share of slices along (Z, Y, X) that have one value only and lie at an end.
        gaps: number of slices along (Z, Y, X) that have one value only and lie between others.
        few: the distinct values, where there are no more than 16; empty otherwise.
        body: centre of the body's bounding box along (Z, Y, X), in mm from the volume's middle.
        content: SHA-256 of the values in their order; the same for every number type, scaling,
            compression and format that keeps the values and the stored axes.
        values: hash of the values in any order; the same also when axes are swapped or reversed.
    """

    shape: tuple[int, int, int]
    spacing: Three
    affine: tuple[tuple[float, ...], ...]
    second: tuple[tuple[float, ...], ...] | None
    doubts: tuple[tuple[str, str], ...]
    axes: tuple[int, int, int]
    extremes: tuple[float, float]
    levels: tuple[float, ...]
    negative: float
    flat: Three
    gaps: tuple[int, int, int]
    few: tuple[float, ...]
    body: Three
    content: str
    values: str

    @property
    def oriented_spacing(self) -> Three:
        """mm along (Z, Y, X)."""
        return _floats(self.spacing[axis] for axis in self.axes)

    @property
    def oriented_shape(self) -> tuple[int, int, int]:
        """Voxels along (Z, Y, X)."""
        return _ints(self.shape[axis] for axis in self.axes)


@dataclass(frozen=True)
class LabelFacts:
    """A label volume with its image.

    Args:
        affine: of the label's header, 4 rows of 4.
        second: as `ImageFacts.second`.
        doubts: as `ImageFacts.doubts`.
        structures: in the dataset's order; None where a structure has no voxel.
        whole: all structures as one; None where there are none.
        blank: share of the structures' voxels in slices of the image that have one value only.
        inside: mean, standard deviation and percentiles 0.5, 50 and 99.5 of the image's intensities
            in all structures; None where there are none or the image cannot be read.
        around: intensities at `LEVELS` in the structures' surroundings; empty as `inside`.
        content: SHA-256 of the class indices in their order.
    """

    affine: tuple[tuple[float, ...], ...]
    second: tuple[tuple[float, ...], ...] | None
    doubts: tuple[tuple[str, str], ...]
    structures: tuple[StructureFacts | None, ...]
    whole: StructureFacts | None
    blank: float
    inside: tuple[float, float, float, float, float] | None
    around: tuple[float, ...]
    content: str


@dataclass(frozen=True)
class CaseFacts:
    """A case and what its files hold, or why they cannot be used.

    Args:
        case: the case.
        image: None where the image cannot be used.
        label: None where the case has no label, or it cannot be used.
        image_problem: why the image cannot be used, one sentence; empty where it can.
        label_problem: the same of the label.
    """

    case: Case
    image: ImageFacts | None = None
    label: LabelFacts | None = None
    image_problem: str = ""
    label_problem: str = ""


@dataclass(frozen=True)
class Intensities:
    """How the intensities of one image are distributed.

    Args:
        levels: as of `ImageFacts`.
        negative: share of the voxels below 0.
    """

    levels: tuple[float, ...]
    negative: float


def gather(dataset: Dataset, jobs: int, progress: Progress) -> list[CaseFacts]:
    """The facts of every case of every domain, in the dataset's order.

    Args:
        dataset: its files are there.
        jobs: processes, each of which holds one case at a time.
        progress: shows how many cases are read.

    Raises:
        DataError: the dataset's directory cannot be used at all.
    """
    cases = [
        (case, dataset.view(domain))
        for domain in dataset.domains()
        for case in dataset.cases(domain)
    ]
    progress.stage("read files", len(cases))
    found: dict[int, CaseFacts] = {}
    for place, facts in parallel_map(_read, cases, jobs):
        found[place] = facts
        progress.update(len(found))
    return [found[place] for place in range(len(cases))]


def _read(item: tuple[Case, DomainView]) -> CaseFacts:
    return read_facts(*item)


def read_facts(case: Case, view: DomainView) -> CaseFacts:
    """Read both files of a case, each once.

    Args:
        case: the case.
        view: of its domain.
    """
    image, label, image_problem, label_problem = None, None, "", ""
    volume: _Volume | None = None
    try:
        volume = _Volume(case, view.reading)
        image = _image_facts(volume)
    except DataError as error:
        image_problem = str(error)
    if case.label is None and case.split != "train":
        label_problem = (
            f"{case.image} has no label, which a case for {case.split} needs: add its label file, "
            "or use the case for training of the target."
        )
    elif case.label is not None:
        try:
            classes = read_label_volume(case.label, case.image, view)
            if volume is not None:
                label = _label_facts(case, classes, volume, len(view.structures), image is not None)
        except DataError as error:
            # What keeps the image from being read is told once.
            label_problem = "" if str(error) == image_problem else str(error)
    return CaseFacts(case, image, label, image_problem, label_problem)


def read_intensities(file: VolumeFile, reading: Reading) -> Intensities:
    """The distribution alone, of an image that need not be a case.

    Args:
        file: the opened image.
        reading: of the domain that it may belong to.

    Raises:
        DataError: as for `extremes`, or the header has no usable geometry.
    """
    _, _, axes, flips = frame(file, reading)
    stored = file.voxels()
    low, _ = extremes(file, stored)
    volume = orient(stored, axes, flips)
    body = inside(volume, foreground(file, volume))
    below = sum(int((intensities(file, plane) < 0).sum()) for plane in _slices(stored))
    return Intensities(_levels(file, body, above=low), below / stored.size)


class _Volume:
    """An image file with its voxels and axes; which slices are flat, per oriented axis."""

    def __init__(self, case: Case, reading: Reading) -> None:
        self.file, self.reading = open_volume(case.image), reading
        self.affine, self.spacing, self.axes, self.flips = frame(self.file, reading)
        self.ml = voxel_ml(self.affine, self.spacing, reading)
        self.stored = self.file.voxels()
        self.oriented = orient(self.stored, self.axes, self.flips)
        self.oriented_spacing = np.array([self.spacing[axis] for axis in self.axes])
        flat = [low == high for low, high in _bounds(self.stored)]
        self.flat = [
            flat[axis][::-1] if flip else flat[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        ]


def _image_facts(volume: _Volume) -> ImageFacts:
    """Facts of an image.

    Raises:
        DataError: as for `extremes`.
    """
    file, stored = volume.file, volume.stored
    low, high = extremes(file, stored)
    values, weights, fingerprint = _distribution(file, stored)
    distinct = values[np.diff(values, prepend=np.nan) != 0]
    box = np.array(foreground(file, volume.oriented))
    body = inside(volume.oriented, box)
    middle = (np.array(volume.oriented.shape) - 1) / 2
    ends, gaps = zip(*map(_ends_and_gaps, volume.flat), strict=True)
    return ImageFacts(
        shape=_ints(stored.shape),
        spacing=volume.spacing,
        affine=_rows(volume.affine),
        second=_second(file),
        doubts=doubts(file, volume.reading),
        axes=volume.axes,
        extremes=(low, high),
        levels=_levels(file, body, above=low),
        negative=float(weights[values < 0].sum() / weights.sum()),
        flat=_floats(ends),
        gaps=_ints(gaps),
        few=tuple(float(v) for v in distinct) if len(distinct) <= _FEW else (),
        body=_floats((box.mean(1) - middle) * volume.oriented_spacing),
        content=_digest(stored.shape, (_plain(file, plane) for plane in _slices(stored))),
        values=fingerprint,
    )


def _label_facts(
    case: Case, classes: np.ndarray, volume: _Volume, count: int, readable: bool
) -> LabelFacts:
    """Facts of a label; without intensities where the image is not `readable`."""
    labels = orient(classes, volume.axes, volume.flips)
    profiles = [np.zeros(length) for length in labels.shape]
    structures: list[StructureFacts | None] = []
    samples: list[np.ndarray] = []
    boxes = ndimage.find_objects(labels, count)
    for index, box in enumerate(boxes, start=1):
        if box is None:
            structures.append(None)
            continue
        mask = labels[box] == index
        own = []
        for axis in range(3):
            profile = np.zeros(labels.shape[axis])
            profile[box[axis]] = mask.sum(axis=tuple(a for a in range(3) if a != axis))
            profiles[axis] += profile
            own.append(profile)
        samples.append(_plain(volume.file, volume.oriented[box][mask]))
        level = float(np.median(samples[-1])) if readable else float("nan")
        structures.append(_structure(own, volume, level))
    whole, inside, blank = None, None, 0.0
    around: tuple[float, ...] = ()
    if samples:
        whole = _structure(profiles, volume, float("nan"))
        total = profiles[0].sum()
        blank = max(
            float(p[flat].sum() / total) for p, flat in zip(profiles, volume.flat, strict=True)
        )
    if samples and readable:
        together = np.concatenate(samples)
        low, middle, high = (float(v) for v in np.percentile(together, (0.5, 50, 99.5)))
        mean, deviation = float(together.mean(dtype=float)), float(together.std(dtype=float))
        inside = mean, deviation, low, middle, high
        around = _surroundings(volume, [box for box in boxes if box is not None])
    file = open_volume(case.truth)
    return LabelFacts(
        affine=_rows(file.affine),
        second=_second(file),
        doubts=doubts(file, volume.reading),
        structures=tuple(structures),
        whole=whole,
        blank=blank,
        inside=inside,
        around=around,
        content=_digest(classes.shape, _slices(classes)),
    )


def _surroundings(volume: _Volume, boxes: Sequence[tuple[slice, ...]]) -> tuple[float, ...]:
    """The distribution of intensities where the structures are, the same part of every body."""
    region = []
    for axis in range(3):
        first = min(box[axis].start for box in boxes)
        stop = max(box[axis].stop for box in boxes)
        margin = int(np.ceil(_MARGIN * (stop - first)))
        region.append(slice(max(0, first - margin), stop + margin))
    return _levels(volume.file, volume.oriented[tuple(region)])


def _structure(profiles: Sequence[np.ndarray], volume: _Volume, level: float) -> StructureFacts:
    """Volume, centre and spread from the numbers of voxels in each slice along each axis."""
    total = profiles[0].sum()
    centres, spreads = [], []
    for profile, length in zip(profiles, volume.oriented_spacing, strict=True):
        places = (np.arange(len(profile)) - (len(profile) - 1) / 2) * length
        centre = float((profile * places).sum() / total)
        # A voxel has an extent, so that a structure in one slice is not infinitely thin.
        variance = float((profile * (places - centre) ** 2).sum() / total) + length**2 / 12
        centres.append(centre)
        spreads.append(variance**0.5)
    return StructureFacts(float(total * volume.ml), _floats(centres), _floats(spreads), level)


# -- passes over the voxels -----------------------------------------------------------------------


def _slices(stored: np.ndarray) -> Iterator[np.ndarray]:
    """Slices along the last stored axis, which are contiguous in memory."""
    return (stored[:, :, z] for z in range(stored.shape[2]))


def _plain(file: VolumeFile, stored: np.ndarray) -> np.ndarray:
    """Intensities as little-endian float32, so that equal ones have equal bytes."""
    return intensities(file, stored).astype("<f4") + np.float32(0)  # -0 becomes 0


def _step(size: int) -> int:
    """Take every so many voxels of each axis, to have a sample of so many voxels."""
    return max(1, int(np.ceil((size / _SAMPLE) ** (1 / 3))))


def _digest(shape: Sequence[int], slices: Iterable[np.ndarray]) -> str:
    """SHA-256 of a shape and of slices, the first axis running fastest."""
    digest = hashlib.sha256(repr(_ints(shape)).encode())
    for plane in slices:
        digest.update(plane.tobytes("F"))
    return digest.hexdigest()


def _distribution(file: VolumeFile, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Sorted values, their weights, and a hash of all values in any order.

    The hash is a sum over the voxels of a function of the value alone, so that stored integers
    need only be counted; the same values stored as another type have the same sum.
    """
    counted = _counted(stored)
    if counted is not None:
        values, weights = _plain(file, counted[0]), counted[1]
        total = int((_mixed(values) * weights.astype(np.uint64)).sum())
    else:
        step, kept, total = _step(stored.size), [], 0
        for z, plane in enumerate(_slices(stored)):
            numbers = _plain(file, plane)
            total += int(_mixed(numbers).sum())
            if z % step == 0:
                kept.append(numbers[::step, ::step].ravel())
        values = np.concatenate(kept)
        weights = np.ones(len(values), np.int64)
    order = np.argsort(values, kind="stable")
    text = f"{stored.size} {total % 2**64}"
    return values[order], weights[order], hashlib.sha256(text.encode()).hexdigest()


def _counted(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The distinct stored integers and how often each occurs; None where that does not pay."""
    if stored.dtype.kind not in "iub":
        return None
    low, high = int(stored.min()), int(stored.max())
    if high - low >= 1 << 16:
        return None
    counts = np.zeros(high - low + 1, np.int64)
    for plane in _slices(stored):
        counts += np.bincount(plane.ravel("K").astype(np.int64) - low, minlength=len(counts))
    present = np.flatnonzero(counts)
    return (present + low).astype(stored.dtype), counts[present]


def _mixed(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each float32: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    bits = values.view("<u4").astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _bounds(stored: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Minimum and maximum of each slice, along each stored axis."""
    lows: list[np.ndarray] = []
    highs: list[np.ndarray] = []
    depth = stored.shape[2]
    for z, plane in enumerate(_slices(stored)):
        low, high = [plane.min(1), plane.min(0)], [plane.max(1), plane.max(0)]
        if not z:
            lows = [*low, np.empty(depth, stored.dtype)]
            highs = [*high, np.empty(depth, stored.dtype)]
        for axis in range(2):
            np.minimum(lows[axis], low[axis], out=lows[axis])
            np.maximum(highs[axis], high[axis], out=highs[axis])
        lows[2][z], highs[2][z] = low[0].min(), high[0].max()
    return list(zip(lows, highs, strict=True))


def _ends_and_gaps(flat: np.ndarray) -> tuple[float, int]:
    """Of flat slices: the share that lies at the ends, and how many lie between others."""
    filled = np.flatnonzero(~flat)
    if not len(filled):
        return 1.0, 0
    gaps = int(flat[filled[0] : filled[-1]].sum())
    return float(flat.sum() - gaps) / len(flat), gaps


def _levels(file: VolumeFile, stored: np.ndarray, above: float = -np.inf) -> tuple[float, ...]:
    """Intensities at `LEVELS` of a part of a volume, of voxels above a value if there are any."""
    step = _step(stored.size)
    values = _plain(file, stored[::step, ::step, ::step]).ravel()
    chosen = values[values > above]
    found = np.percentile(chosen if chosen.size else values, LEVELS, method="inverted_cdf")
    return tuple(float(value) for value in found)


# -- small things ---------------------------------------------------------------------------------


def _floats(values: Iterable[float]) -> Three:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _ints(values: Iterable[int]) -> tuple[int, int, int]:
    first, second, third = (int(value) for value in values)
    return first, second, third


def _rows(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in affine)


def _second(file: VolumeFile) -> tuple[tuple[float, ...], ...] | None:
    """Rows of the other form of a header, where it lies elsewhere."""
    second = second_form(file.forms, file.shape)
    return None if second is None else _rows(second)
