"""The plugin interface of datasets: structures, domains, cases, splits and grids.

A `Dataset` names files; the harness (`data/`) reads, resamples and caches them, so that every
dataset goes through the same code. Target cases reach training as `UnlabelledCase`, a type without
a field for a label.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from glua_bench.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")
# Class index of voxels without annotation, which losses and scores exclude.
UNANNOTATED = 255
AVERAGE = "mean"  # in results, the structure of rows that average over structures
# Names with another meaning in results or in nnU-Net's `dataset.json`.
_RESERVED = {
    AVERAGE: "the average over structures in results",
    "background": "the class of voxels without structure",
    "ignore": "nnU-Net's name for voxels without annotation",
}
# Presets that only train longer than another one, whose sizes and settings they take over.
LONGER = {"benchmark": "quick"}
Answer = TypeVar("Answer")


def fold_name(dataset: str, fold: int) -> str:
    """Return the name of a dataset with its fold, which `Registry.fold_of` parses.

    Example:
        >>> fold_name("mmwhs", 1), fold_name("mmwhs", 2)
        ('mmwhs', 'mmwhs_fold2')
    """
    return dataset if fold == 1 else f"{dataset}_fold{fold}"


@dataclass(frozen=True)
class Structure:
    """One class of the segmentation task.

    Attributes:
        name: short name, e.g. "MYO".
        title: full name, e.g. "left ventricular myocardium".
        values: raw label values of the structure in the dataset's files.
        color: "#rrggbb" for contours and charts.

    Raises:
        ConfigError: the name is reserved.
    """

    name: str
    title: str
    values: tuple[int, ...]
    color: str

    def __post_init__(self) -> None:
        meaning = _RESERVED.get(self.name.lower())
        if meaning:
            raise ConfigError(
                f"The structure name '{self.name}' is reserved for {meaning}; choose another name."
            )


@dataclass(frozen=True)
class Channel:
    """One of several input channels of a domain, such as T1 and T2.

    Attributes:
        name: e.g. "T1"; the domains may use different names.
        percentiles: as in `Reading`; None uses the reading's.
        intensity_range: as in `Reading`; None uses `percentiles`, or the reading's range.

    Raises:
        ConfigError: both are given.
    """

    name: str
    percentiles: tuple[float, float] | None = None
    intensity_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.percentiles is not None and self.intensity_range is not None:
            raise ConfigError(
                f"Channel '{self.name}' has percentiles and an intensity range; remove one."
            )


@dataclass(frozen=True)
class Reading:
    """How files are converted to arrays.

    Attributes:
        orientation: "canonical" reorients to RAS+ by the header; "stored" keeps the array as
            stored, for files with wrong headers but consistent arrays.
        slice_axis: axis of the (oriented) array along which slices are cut.
        row_axis: axis of the (oriented) array that runs down a displayed slice.
        flip: axes to reverse after orientation, so that displayed slices are upright.
        stated_spacing: mm per axis of the (oriented) array, if the header's spacing is wrong.
        percentiles: foreground intensities that map to -1 and 1.
        ignored_values: raw label values that count as background.
        intensity_range: intensities that map to -1 and 1 in all volumes, for calibrated images;
            None uses `percentiles` of each volume.
        unannotated_values: raw label values of voxels without annotation, which become
            `UNANNOTATED`.
        channels: the input channels, in the order of `Case.images`; empty for a single one.
    """

    orientation: str = "canonical"
    slice_axis: int = 2
    row_axis: int = 1
    flip: tuple[int, ...] = ()
    stated_spacing: tuple[float, float, float] | None = None
    percentiles: tuple[float, float] = (0.5, 99.5)
    ignored_values: tuple[int, ...] = ()
    intensity_range: tuple[float, float] | None = None
    unannotated_values: tuple[int, ...] = ()
    channels: tuple[Channel, ...] = ()

    def channel(self, index: int) -> Reading:
        """Return the reading of one channel, with its own intensities and no `channels`."""
        if not self.channels:
            return self
        own, plain = self.channels[index], replace(self, channels=())
        if own.intensity_range is not None:
            return replace(plain, intensity_range=own.intensity_range)
        if own.percentiles is not None:
            return replace(plain, percentiles=own.percentiles, intensity_range=None)
        return plain

    @property
    def inputs(self) -> int:
        """Number of input channels, at least 1."""
        return max(1, len(self.channels))

    def identity(self) -> dict[str, Any]:
        """Return the fields as hashed in cache keys and run ids.

        `intensity_range`, `unannotated_values` and `channels`, which were added later, are omitted
        unless set, so that older caches stay valid.
        """
        later = ("intensity_range", "unannotated_values", "channels")
        return {name: v for name, v in asdict(self).items() if v or name not in later}


@dataclass(frozen=True)
class Grid:
    """The working grid on which networks see slices; `config.build_settings` validates it.

    Attributes:
        size: side of the square slice in pixels.
        spacing: side of a pixel in mm.
        slice_spacing: distance of slices in mm; None keeps the slices of the file.
    """

    size: int = field(metadata={"low": 32, "high": 4096})
    spacing: float = field(metadata={"low": 0.01, "high": 100})
    slice_spacing: float | None = field(default=None, metadata={"low": 0.01, "high": 100})


@dataclass(frozen=True)
class DomainView:
    """How the files of one domain are read, and the meaning of their label values.

    Attributes:
        name: name of the domain.
        reading: conversion of its files to arrays.
        structures: the classes, with the raw label values of the domain.
    """

    name: str
    reading: Reading
    structures: tuple[Structure, ...]

    def on(self, grid: Grid) -> GridView:
        """Return the view on a working grid."""
        return GridView(self.name, self.reading, self.structures, grid)

    def of_predictions(self) -> DomainView:
        """Return the view of a run's predictions, which annotate all voxels."""
        reading = replace(self.reading, unannotated_values=())
        return DomainView(self.name, reading, self.structures)


@dataclass(frozen=True)
class GridView(DomainView):
    """A `DomainView` on a working grid, which together with a file determines its slices."""

    grid: Grid


@dataclass(frozen=True)
class UnlabelledCase:
    """An image volume; the only part of a target case that training sees.

    Attributes:
        id, domain, image, further: as in `Case`.
    """

    id: str
    domain: str
    image: Path
    further: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """The image file of each channel."""
        return (self.image, *self.further)


@dataclass(frozen=True)
class Case:
    """Image and label volume of one subject in one domain.

    Attributes:
        id: unique within the dataset, e.g. "ct_1003".
        domain: name of the domain, e.g. "ct".
        image: image file; of several channels the first, which defines grid and crop.
        label: label file; None is allowed for training cases, which then serve as target images
            only.
        split: "train", "val" or "test".
        subject: the person, shared by all cases of one person.
        further: image files of the second and later channels, in the order of `Reading.channels`
            and on the grid of `image`.
    """

    id: str
    domain: str
    image: Path
    label: Path | None
    split: str
    subject: str
    further: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """The image file of each channel."""
        return (self.image, *self.further)

    @property
    def truth(self) -> Path:
        """The label file.

        Raises:
            DataError: the case has none.
        """
        if self.label is None:
            raise DataError(
                f"{self.image} has no label; add its label file, or use the case as target "
                "training image only."
            )
        return self.label

    def unlabelled(self) -> UnlabelledCase:
        """Return the case without its label."""
        return UnlabelledCase(self.id, self.domain, self.image, self.further)


class Ask(Protocol):
    """Prompts a user; see `console.ask`."""

    def __call__(self, question: str, guess: str, read: Callable[[str], Answer]) -> Answer:
        """Prompt until `read` accepts the answer; `guess` is the default."""


class Dataset(ABC):
    """Base class of cross-modality segmentation tasks on files.

    The first line of the class docstring is the description in `glua-bench list`.

    Args:
        root: directory of the data; None uses `default_root()`.
        fold: split of the cases, from 1 to `folds`.

    Raises:
        ConfigError: the dataset has no such fold.
        DataError: `root` is None and there is no default directory.
    """

    name: ClassVar[str]
    reference: ClassVar[str]  # source of the data, for `list` and cards
    needs: ClassVar[str]  # files that a user needs, for `list`
    structures: ClassVar[tuple[Structure, ...]]
    directions: ClassVar[tuple[str, ...]]  # "source-target"; the first is the default
    reading: ClassVar[Reading]
    grids: ClassVar[Mapping[str, Grid]]  # preset → grid
    distance_note: ClassVar[str] = "mm by the files' headers"
    # Number of splits of the same files; fold 1 is the default, e.g. the literature's.
    folds: ClassVar[int] = 1
    fold: int = 1
    protocol: ClassVar[str] = ""  # deviations from the harness's protocol, printed with results
    publishable: ClassVar[bool] = False  # True if images may be published
    # Suffixes of files that describe a dataset of this class, for `--dataset FILE`.
    described_by: ClassVar[tuple[str, ...]] = ()
    # False if consecutive slices of a file are not neighbours in the body.
    neighbouring_slices: ClassVar[bool] = True

    def __init__(self, root: Path | None = None, fold: int = 1) -> None:
        self.check_fold(fold)
        self.root, self.fold = (root or self.default_root()).expanduser(), fold

    @classmethod
    def check_fold(cls, fold: int) -> None:
        """Reject a fold that the dataset does not have.

        Raises:
            ConfigError: there is no such fold.
        """
        if not 1 <= fold <= cls.folds:
            has = f"folds 1 to {cls.folds}" if cls.folds > 1 else "one split: omit --fold"
            raise ConfigError(f"Dataset '{cls.name}' has no fold {fold}; it has {has}.")

    @property
    def fold_name(self) -> str:
        """The name with the fold, e.g. "mmwhs_fold2"; the name alone for fold 1."""
        return fold_name(self.name, self.fold)

    @classmethod
    def default_root(cls) -> Path:
        """Return `$GLUA_BENCH_DATA/<name>`.

        Raises:
            DataError: the variable is not set.
        """
        base = os.environ.get("GLUA_BENCH_DATA")
        if not base:
            raise DataError(
                f"Dataset '{cls.name}' needs {cls.needs}: give the directory of the files with "
                f"--data-root, or set GLUA_BENCH_DATA to the directory that contains '{cls.name}'."
            )
        return Path(base) / cls.name

    @abstractmethod
    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Check that the files exist, or generate them.

        Args:
            report: receives lines about progress.

        Raises:
            DataError: files are missing and cannot be generated.
        """

    @abstractmethod
    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of a domain, sorted by id, each in exactly one split."""

    @classmethod
    def described(cls, file: Path) -> type[Dataset]:
        """Return the dataset that a file describes, for classes with `described_by`.

        Args:
            file: given as `--dataset FILE` or `--plugin FILE`.

        Raises:
            ConfigError: the description is invalid; the message names the line.
        """
        raise NotImplementedError(f"'{cls.name}' sets described_by without defining described()")

    def caveat(self, direction: str) -> str:
        """Return why results of a direction may be too good, or "".

        The sentence, without its full stop, is printed with results, stored in each run, and shown
        by reports and `data check`. Override it e.g. for files whose training and test cases share
        patients.

        Args:
            direction: "source-target".

        Raises:
            DataError: files are missing.
        """
        return ""

    def carried(self) -> Mapping[str, str]:
        """Return the description to store with a run, for described datasets.

        Returns:
            File name → text: `dataset.yaml`, which `described` can read from any directory, and
            the files that it refers to. Empty for other datasets.
        """
        return {}

    @classmethod
    def draft(
        cls,
        name: str,
        data: Path,
        ask: Ask,
        domains: tuple[str, ...] = (),
        structures: Mapping[str, tuple[int, ...]] | None = None,
    ) -> str:
        """Draft a description of a user's files, for classes with `described_by`.

        Args:
            name: name of the dataset.
            data: directory of the files.
            ask: prompts the user.
            domains: names of the domains in the files' paths; empty infers them.
            structures: full name → raw label values, the same in all domains; None prompts.

        Returns:
            The text of the description.

        Raises:
            DataError: the files do not define a task.
            ConfigError: an answer is invalid.
        """
        raise NotImplementedError(f"'{cls.name}' sets described_by without defining draft()")

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """Return the reading of one domain's files, by default `reading`.

        Override it for different windows, orientations or ignored values per domain. `slice_axis`
        and `row_axis` must show the same anatomical view in all domains.
        """
        return cls.reading

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """Return the structures with one domain's raw label values, by default `structures`.

        Only the values may differ between domains.
        """
        return cls.structures

    @classmethod
    def view(cls, domain: str) -> DomainView:
        """Return `reading_of` and `structures_of` of one domain."""
        return DomainView(domain, cls.reading_of(domain), tuple(cls.structures_of(domain)))

    def domains(self) -> tuple[str, ...]:
        """Return the names of the domains, in order of appearance in `directions`."""
        return tuple(dict.fromkeys(name for d in self.directions for name in d.split("-")))

    def split(self, domain: str, split: str) -> tuple[Case, ...]:
        """Return the cases of one split ("train", "val" or "test") of a domain."""
        return tuple(case for case in self.cases(domain) if case.split == split)

    def labelled(self, domain: str, split: str) -> tuple[Case, ...]:
        """Return the cases of one split of a domain that have a label file."""
        return tuple(case for case in self.split(domain, split) if case.label is not None)

    def grid(self, preset: str) -> Grid:
        """Return the working grid of a preset; one that only trains longer uses its original's.

        Raises:
            ConfigError: the dataset defines no grid for the preset.
        """
        if preset not in self.grids:
            preset = LONGER.get(preset, preset)
        if preset not in self.grids:
            raise ConfigError(
                f"Dataset '{self.name}' has no grid for preset '{preset}'; "
                f"choose one of {', '.join(self.grids)}."
            )
        return self.grids[preset]


def parse_direction(dataset: type[Dataset] | Dataset, direction: str | None) -> tuple[str, str]:
    """Split "source-target" into the names of its domains.

    Args:
        dataset: the dataset, or its class.
        direction: e.g. "mr-ct"; None uses the dataset's default.

    Raises:
        ConfigError: the dataset has no such direction.
    """
    chosen = direction or dataset.directions[0]
    if chosen not in dataset.directions:
        raise ConfigError(
            f"Dataset '{dataset.name}' has no direction '{chosen}'; "
            f"use --direction with one of {', '.join(dataset.directions)}."
        )
    source, target = chosen.split("-")
    return source, target


def common_channels(dataset: type[Dataset] | Dataset, direction: str | None) -> int:
    """Return the number of input channels of a direction.

    Raises:
        ConfigError: source and target have different numbers.
    """
    source, target = parse_direction(dataset, direction)
    own, other = (dataset.view(domain).reading for domain in (source, target))
    if own.inputs != other.inputs:
        raise ConfigError(
            f"Dataset '{dataset.name}' has {_channels(own)} of '{source}' but {_channels(other)} "
            f"of '{target}'; both domains need the same number of channels."
        )
    return own.inputs


def _channels(reading: Reading) -> str:
    """Return e.g. "2 input channels (T1, T2)"."""
    if not reading.channels:
        return "1 input channel"
    names = ", ".join(channel.name for channel in reading.channels)
    return f"{reading.inputs} input channel{'s' if reading.inputs > 1 else ''} ({names})"


def check_channels(case: Case | UnlabelledCase, reading: Reading) -> None:
    """Check that a case has one image per channel.

    Raises:
        DataError: it has more or fewer.
    """
    if len(case.images) != reading.inputs:
        raise DataError(
            f"Case {case.id} has {len(case.images)} image file(s), but its domain "
            f"'{case.domain}' has {_channels(reading)}: give one image per channel."
        )


def role_fault(dataset: Dataset, direction: str, privileged: bool = False) -> str:
    """Return why a direction has too few cases for training and test, or "".

    Args:
        dataset: the dataset.
        direction: "source-target".
        privileged: True if labelled target training cases serve as source.

    Raises:
        DataError: files are missing.
    """
    source, target = parse_direction(dataset, direction)
    needed = (
        (dataset.labelled, target if privileged else source, "train", "labelled training case"),
        (dataset.split, target, "train", "training case"),
        (dataset.split, target, "test", "test case"),
    )
    for cases, domain, split, what in needed:
        if not cases(domain, split):
            bare = "its label file" if dataset.split(domain, split) else "one"
            return (
                f"Dataset '{dataset.name}' has no {what} of '{domain}', which {direction} needs: "
                f"add {bare} to the split {split}, or remove {direction} from the directions."
            )
    return ""
