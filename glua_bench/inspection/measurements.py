"""Measure geometry, intensities, anatomy and content of a case in one pass over its files.

`integrity.py` and `outliers.py` check the measurements, `fingerprint.py` summarises them. They
contain no voxels. Labels of target cases are measured too, but no measurement is used in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from glua_bench.console import Progress
from glua_bench.data.formats import VolumeFile, open_volume, triple
from glua_bench.data.geometry import ambiguities, frame, orient, rows_of, second_form, voxel_ml
from glua_bench.data.parallel import map_cases
from glua_bench.data.volumes import (
    check_same_grid,
    crop,
    extremes,
    foreground,
    intensities,
    read_label_volume,
    sample_step,
)
from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, DomainView, Reading, check_channels

Three = tuple[float, float, float]
Rows = tuple[tuple[float, ...], ...]
# Percentiles of the stored intensity distributions, including minimum and maximum.
LEVELS = np.linspace(0, 100, 101)
# Percentiles between which the intensities of a structure lie without outliers, as in nnU-Net.
INSIDE = (0.5, 99.5)
# Margin around the bounding box of the structures, relative to its size, on each side.
_MARGIN = 0.25
# Maximum number of distinct values that are listed.
_FEW = 16


@dataclass(frozen=True)
class StructureMeasurements:
    """One structure of a case; axes are (Z, Y, X).

    Attributes:
        ml: volume in ml.
        centre: centre of mass in mm from the centre of the image volume.
        spread: standard deviation of the voxel positions along each axis, in mm.
        level: median intensity inside; NaN if the image is unusable.
        inside: intensities at the percentiles `INSIDE`; NaN if the image is unusable.
        outside: fraction of the voxels outside the window of the reading; 0 without a window.
    """

    ml: float
    centre: Three
    spread: Three
    level: float
    inside: tuple[float, float] = (float("nan"), float("nan"))
    outside: float = 0.0


@dataclass(frozen=True)
class ImageMeasurements:
    """An image volume.

    Attributes:
        shape: voxels per stored axis.
        spacing: mm per stored axis, after the dataset's reading.
        affine: of the header, 4 rows of 4.
        second: affine of the header's other form if it differs.
        ambiguities: name and text of each ambiguity of the header.
        axes: stored axis of each of (Z, Y, X).
        extremes: lowest and highest intensity.
        levels: intensities at `LEVELS`, of voxels above the minimum in the body's bounding box.
        negative: fraction of negative voxels.
        flat: fraction of constant slices at the ends, along (Z, Y, X).
        gaps: number of constant slices between others, along (Z, Y, X).
        few: the distinct values if there are at most 16, otherwise empty.
        body: centre of the body's bounding box along (Z, Y, X), in mm from the volume's centre.
        content: SHA-256 of the values in order, independent of data type, scaling and file format.
        values: hash of the values in any order, also independent of the order of axes.
    """

    shape: tuple[int, int, int]
    spacing: Three
    affine: Rows
    second: Rows | None
    ambiguities: tuple[tuple[str, str], ...]
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
        return triple(self.spacing[axis] for axis in self.axes)

    @property
    def oriented_shape(self) -> tuple[int, int, int]:
        """Voxels along (Z, Y, X)."""
        return triple(self.shape[axis] for axis in self.axes)


@dataclass(frozen=True)
class LabelMeasurements:
    """A label volume, together with its image.

    Attributes:
        affine: see `ImageMeasurements`.
        second: see `ImageMeasurements`.
        ambiguities: see `ImageMeasurements`.
        structures: in the dataset's order; None for missing structures.
        whole: union of all structures; None if there are none.
        blank: fraction of the structures' voxels in constant slices of the image.
        inside: mean, standard deviation and percentiles 0.5, 50 and 99.5 of the intensities in all
            structures; None without structures or a usable image.
        around: intensities at `LEVELS` around the structures; empty if `inside` is None.
        content: SHA-256 of the class indices in order.
    """

    affine: Rows
    second: Rows | None
    ambiguities: tuple[tuple[str, str], ...]
    structures: tuple[StructureMeasurements | None, ...]
    whole: StructureMeasurements | None
    blank: float
    inside: tuple[float, float, float, float, float] | None
    around: tuple[float, ...]
    content: str


@dataclass(frozen=True)
class CaseMeasurements:
    """Measurements of a case.

    Attributes:
        case: the case.
        image: None if the image is unusable.
        label: None if the label is missing or unusable.
        image_problem: why the image is unusable, one sentence, or "".
        label_problem: why the label is unusable, one sentence, or "".
        further: the images of the second and later channels, each as a case without a label.
    """

    case: Case
    image: ImageMeasurements | None = None
    label: LabelMeasurements | None = None
    image_problem: str = ""
    label_problem: str = ""
    further: tuple[CaseMeasurements, ...] = ()

    @property
    def channels(self) -> tuple[CaseMeasurements, ...]:
        """The measurements of each channel."""
        return (self, *self.further)


@dataclass(frozen=True)
class Intensities:
    """Intensity distribution of an image.

    Attributes:
        levels: see `ImageMeasurements`.
        negative: see `ImageMeasurements`.
    """

    levels: tuple[float, ...]
    negative: float


def gather(dataset: Dataset, jobs: int, progress: Progress) -> list[CaseMeasurements]:
    """Measure every case of every domain, in the dataset's order.

    Args:
        dataset: a prepared dataset.
        jobs: number of processes, each with one case in memory.
        progress: progress display.

    Raises:
        DataError: the dataset's directory cannot be used.
    """
    domains = dataset.domains()
    cases = [(case, dataset.view(domain)) for domain in domains for case in dataset.cases(domain)]
    return map_cases(_measure, cases, jobs, progress, "read files")


def _measure(item: tuple[Case, DomainView]) -> CaseMeasurements:
    return measure_case(*item)


def measure_case(case: Case, view: DomainView) -> CaseMeasurements:
    """Read and measure the image of each channel and the label of a case.

    Args:
        case: the case.
        view: of its domain.
    """
    image, label, image_problem, label_problem = None, None, "", ""
    volume: _Volume | None = None
    try:
        check_channels(case, view.reading)
        volume = _Volume(case.image, view.reading.channel(0))
        image = _measure_image(volume)
    except DataError as error:
        image_problem = str(error)
    if case.label is None and case.split != "train":
        label_problem = (
            f"{case.image} has no label, which a {case.split} case requires: add the label file, "
            "or use the case as a target training case."
        )
    elif case.label is not None:
        try:
            classes = read_label_volume(case.label, case.image, view)
            if volume is not None:
                label = _measure_label(
                    case, classes, volume, len(view.structures), image is not None
                )
        except DataError as error:
            # An unusable image is reported only once.
            label_problem = "" if str(error) == image_problem else str(error)
    further: tuple[CaseMeasurements, ...] = ()
    if len(case.images) == view.reading.inputs:
        further = tuple(
            _measure_channel(case, index, view.reading, image)
            for index in range(1, view.reading.inputs)
        )
    return CaseMeasurements(case, image, label, image_problem, label_problem, further)


def _measure_channel(
    case: Case, index: int, reading: Reading, first: ImageMeasurements | None
) -> CaseMeasurements:
    """Measure the second or a later channel; one on another grid than the first is unusable."""
    own = replace(case, image=case.images[index], label=None, further=())
    try:
        volume = _Volume(own.image, reading.channel(index))
        if first is not None:
            name, affine = reading.channels[index].name, np.array(first.affine)
            check_same_grid(volume.file, name, reading, first.shape, affine, case.image)
        return CaseMeasurements(own, _measure_image(volume))
    except DataError as error:
        return CaseMeasurements(own, image_problem=str(error))


def read_intensities(file: VolumeFile, reading: Reading) -> Intensities:
    """Measure the intensity distribution of any image.

    Args:
        file: the opened image.
        reading: of its presumed domain.

    Raises:
        DataError: as for `extremes`, or the header has no usable geometry.
    """
    _, _, axes, flips = frame(file, reading)
    stored = file.voxels()
    low, _ = extremes(file, stored)
    volume = orient(stored, axes, flips)
    body = crop(volume, foreground(file, volume))
    below = sum(int((intensities(file, plane) < 0).sum()) for plane in _slices(stored))
    return Intensities(_levels(file, body, above=low), below / stored.size)


class _Volume:
    """An image file with its voxels, axes and constant slices per oriented axis."""

    def __init__(self, image: Path, reading: Reading) -> None:
        self.file, self.reading = open_volume(image), reading
        self.affine, self.spacing, self.axes, self.flips = frame(self.file, reading)
        self.ml = voxel_ml(self.affine, self.spacing, reading)
        self.stored = self.file.voxels()
        self.oriented = orient(self.stored, self.axes, self.flips)
        self.oriented_spacing = np.array([self.spacing[axis] for axis in self.axes])
        # In stored axes, because passes over reversed views are slow.
        flat = [self.stored.min(o) == self.stored.max(o) for o in ((1, 2), (0, 2), (0, 1))]
        self.flat = [
            flat[axis][::-1] if flip else flat[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        ]


def _measure_image(volume: _Volume) -> ImageMeasurements:
    file, stored = volume.file, volume.stored
    low, high = extremes(file, stored)
    values, weights, fingerprint = _distribution(file, stored)
    distinct = values[np.diff(values, prepend=np.nan) != 0]
    box = np.array(foreground(file, volume.oriented))
    body = crop(volume.oriented, box)
    middle = (np.array(volume.oriented.shape) - 1) / 2
    ends, gaps = zip(*map(_ends_and_gaps, volume.flat), strict=True)
    return ImageMeasurements(
        shape=file.shape,
        spacing=volume.spacing,
        affine=rows_of(volume.affine),
        second=_second(file),
        ambiguities=ambiguities(file, volume.reading),
        axes=volume.axes,
        extremes=(low, high),
        levels=_levels(file, body, above=low),
        negative=float(weights[values < 0].sum() / weights.sum()),
        flat=ends,
        gaps=gaps,
        few=tuple(distinct.tolist()) if len(distinct) <= _FEW else (),
        body=triple(((box.mean(1) - middle) * volume.oriented_spacing).tolist()),
        content=_digest(stored.shape, (_plain(file, plane) for plane in _slices(stored))),
        values=fingerprint,
    )


def _measure_label(
    case: Case, classes: np.ndarray, volume: _Volume, count: int, readable: bool
) -> LabelMeasurements:
    """Measure a label, without intensities if the image is not `readable`."""
    labels = orient(classes, volume.axes, volume.flips)
    profiles = [np.zeros(length) for length in labels.shape]
    structures: list[StructureMeasurements | None] = []
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
        one = _structure(own, volume, float("nan"))
        structures.append(_with_intensities(one, samples[-1], volume) if readable else one)
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
        low, middle, high = np.percentile(together, (0.5, 50, 99.5)).tolist()
        mean, deviation = float(together.mean(dtype=float)), float(together.std(dtype=float))
        inside = mean, deviation, low, middle, high
        around = _surroundings(volume, [box for box in boxes if box is not None])
    file = open_volume(case.truth)
    return LabelMeasurements(
        affine=rows_of(file.affine),
        second=_second(file),
        ambiguities=ambiguities(file, volume.reading),
        structures=tuple(structures),
        whole=whole,
        blank=blank,
        inside=inside,
        around=around,
        content=_digest(classes.shape, _slices(classes)),
    )


def _with_intensities(
    structure: StructureMeasurements, inside: np.ndarray, volume: _Volume
) -> StructureMeasurements:
    """Add the intensities in a structure to its measurements."""
    low, high = np.percentile(inside, INSIDE).tolist()
    window = volume.reading.intensity_range
    share = 0.0 if window is None else outside_window(inside, window)
    level = float(np.median(inside))
    return replace(structure, level=level, inside=(low, high), outside=share)


def outside_window(intensities: np.ndarray, window: tuple[float, float]) -> float:
    """Return the fraction of intensities outside a window."""
    return float(np.mean((intensities < window[0]) | (intensities > window[1])))


def _surroundings(volume: _Volume, boxes: Sequence[tuple[slice, ...]]) -> tuple[float, ...]:
    """Return the intensity distribution around the structures, a comparable part of the body."""
    region = []
    for axis in range(3):
        first = min(box[axis].start for box in boxes)
        stop = max(box[axis].stop for box in boxes)
        margin = int(np.ceil(_MARGIN * (stop - first)))
        region.append(slice(max(0, first - margin), stop + margin))
    return _levels(volume.file, volume.oriented[tuple(region)])


def _structure(
    profiles: Sequence[np.ndarray], volume: _Volume, level: float
) -> StructureMeasurements:
    """Compute volume, centre and spread from the numbers of voxels per slice along each axis."""
    total = profiles[0].sum()
    centres, spreads = [], []
    for profile, length in zip(profiles, volume.oriented_spacing, strict=True):
        places = (np.arange(len(profile)) - (len(profile) - 1) / 2) * length
        centre = float((profile * places).sum() / total)
        # Includes the variance within a voxel, so that a single slice has a thickness.
        variance = float((profile * (places - centre) ** 2).sum() / total + length**2 / 12)
        centres.append(centre)
        spreads.append(variance**0.5)
    return StructureMeasurements(float(total * volume.ml), triple(centres), triple(spreads), level)


# -- passes over the voxels -----------------------------------------------------------------------


def _slices(stored: np.ndarray) -> Iterator[np.ndarray]:
    """Iterate over slices along the last stored axis, which are contiguous in memory."""
    return (stored[:, :, z] for z in range(stored.shape[2]))


def _plain(file: VolumeFile, stored: np.ndarray) -> np.ndarray:
    """Return intensities as little-endian float32, so that equal values have equal bytes."""
    return intensities(file, stored).astype("<f4") + np.float32(0)  # -0 becomes 0


def _digest(shape: tuple[int, ...], slices: Iterable[np.ndarray]) -> str:
    """Compute the SHA-256 of a shape and of slices in Fortran order."""
    digest = hashlib.sha256(repr(shape).encode())
    for plane in slices:
        digest.update(plane.tobytes("F"))
    return digest.hexdigest()


def _distribution(file: VolumeFile, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Return sorted values, their weights, and an order-independent hash.

    The hash is a sum over voxels, independent of the data type, so that stored integers can be
    counted.
    """
    counts = counted(stored)
    if counts is not None:
        values, weights = _plain(file, counts[0]), counts[1]
        total = int((_mixed(values) * weights.astype(np.uint64)).sum())
    else:
        step, kept, total = sample_step(stored.size), [], 0
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


def counted(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Count stored integers; None for other types and wide ranges."""
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
    """Hash each float32 to 64 bits by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    bits = values.view("<u4").astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _ends_and_gaps(flat: np.ndarray) -> tuple[float, int]:
    """Return the fraction of constant slices at the ends and the number between other slices."""
    filled = np.flatnonzero(~flat)
    if not len(filled):
        return 1.0, 0
    gaps = int(flat[filled[0] : filled[-1]].sum())
    return float(flat.sum() - gaps) / len(flat), gaps


def _levels(file: VolumeFile, stored: np.ndarray, above: float = -np.inf) -> tuple[float, ...]:
    """Return intensities at `LEVELS`, of voxels above a value if there are any."""
    step = sample_step(stored.size)
    values = _plain(file, stored[::step, ::step, ::step]).ravel()
    chosen = values[values > above]
    found = np.percentile(chosen if chosen.size else values, LEVELS, method="inverted_cdf")
    return tuple(found.tolist())


def _second(file: VolumeFile) -> Rows | None:
    second = second_form(file.forms, file.shape)
    return None if second is None else rows_of(second)
