"""What a dataset hands to the harness: structures, domains, cases, splits and grids.

A `Dataset` names files and facts; it reads no voxels itself. Reading, resampling and
caching are the harness's work (`data/`), so every dataset goes through
the same code. A case of the target domain reaches training as an `UnlabelledCase`, a type
that has no field for a label.
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
# The class index of what a label leaves open, in label arrays: it enters no loss and no score.
UNANNOTATED = 255
AVERAGE = "mean"  # over structures: what results have in the place of a structure's name
# Names that mean something else in results, or in nnU-Net's `dataset.json`.
_RESERVED = {
    AVERAGE: "as results call the average over all structures",
    "background": "which is what no structure covers",
    "ignore": "which is nnU-Net's word for voxels that nobody annotated",
}
Answer = TypeVar("Answer")


def fold_name(dataset: str, fold: int) -> str:
    """Name a dataset with its fold, as results, tables and directories of runs do.

    `Registry.fold_of` reads the name back, so it may be given in the place of the dataset's.

    Example:
        >>> fold_name("mmwhs", 1), fold_name("mmwhs", 2)
        ('mmwhs', 'mmwhs_fold2')
    """
    return dataset if fold == 1 else f"{dataset}_fold{fold}"


@dataclass(frozen=True)
class Structure:
    """One class of the segmentation task.

    Args:
        name: the field's short name, e.g. "MYO".
        title: the name in words, e.g. "left ventricular myocardium".
        values: the raw label values that mean this structure in the dataset's files.
        color: "#rrggbb" for contours, the same in every figure.

    Raises:
        ConfigError: the name is that of the average over structures, or has a meaning of its own in
            nnU-Net's files.
    """

    name: str
    title: str
    values: tuple[int, ...]
    color: str

    def __post_init__(self) -> None:
        meaning = _RESERVED.get(self.name.lower())
        if meaning:
            raise ConfigError(
                f"A structure cannot be called '{self.name}', {meaning}; give it another name."
            )


@dataclass(frozen=True)
class Reading:
    """How the files of a dataset become arrays.

    Args:
        orientation: "canonical" reorients to RAS+ by the header; "stored" keeps the array as
            it lies in the file (for files whose header is wrong and whose arrays agree).
        slice_axis: axis of the (oriented) array along which slices are cut.
        row_axis: axis of the (oriented) array that runs down a displayed slice.
        flip: axes to reverse after orientation, so that displayed slices stand upright.
        stated_spacing: in mm per axis of the (oriented) array, where the header's spacing is
            known to be wrong; None trusts the header.
        percentiles: the intensities that map to -1 and 1, over the foreground.
        ignored_values: raw label values that are known and count as background.
        intensity_range: the intensities that map to -1 and 1 in every volume, for files whose
            values are comparable already; None takes each volume's own `percentiles`.
        unannotated_values: raw label values of voxels that nobody annotated. They become the class
            index `UNANNOTATED`, which losses and scores leave out.
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

    def identity(self) -> dict[str, Any]:
        """The fields, as the cache and a run's data fingerprint count them.

        `intensity_range` and `unannotated_values` are left out where they are not set, because they
        came later than the others: what was cached without them stays valid.
        """
        fields = asdict(self)
        for later in ("intensity_range", "unannotated_values"):
            if not fields[later]:
                del fields[later]
        return fields


@dataclass(frozen=True)
class Grid:
    """The working grid on which networks see slices.

    Args:
        size: side of the square slice in pixels.
        spacing: pixel side in mm.
        slice_spacing: distance of slices in mm; None keeps the file's own slices.
    """

    # What a user may set; `config.build_settings` checks it.
    size: int = field(metadata={"low": 32, "high": 4096})
    spacing: float = field(metadata={"low": 0.01, "high": 100})
    slice_spacing: float | None = field(default=None, metadata={"low": 0.01, "high": 100})


@dataclass(frozen=True)
class DomainView:
    """How the files of one domain are read, and what their label values mean.

    Attributes:
        name: of the domain.
        reading: how its files become arrays.
        structures: the classes, with the raw label values of the domain's files.
    """

    name: str
    reading: Reading
    structures: tuple[Structure, ...]

    def on(self, grid: Grid) -> GridView:
        """Return the view of the domain on a working grid."""
        return GridView(self.name, self.reading, self.structures, grid)

    def of_predictions(self) -> DomainView:
        """Return the view of a run's predictions, which leave no voxel unannotated."""
        reading = replace(self.reading, unannotated_values=())
        return DomainView(self.name, reading, self.structures)


@dataclass(frozen=True)
class GridView(DomainView):
    """A domain on a working grid: what a file's slices depend on, besides the file.

    Attributes:
        grid: on which networks see the slices; the others are those of `DomainView`.
    """

    grid: Grid


@dataclass(frozen=True)
class UnlabelledCase:
    """An image volume; all that target-side training ever sees of a case."""

    id: str
    domain: str
    image: Path


@dataclass(frozen=True)
class Case:
    """One subject's image and label volume in one domain.

    Args:
        id: unique within the dataset, e.g. "ct_1003".
        domain: the domain's name, e.g. "ct".
        image: file of the image volume.
        label: file of the label volume; None where there is none, which only a training case may
            lack: it then serves as a target image, and not as a source.
        split: "train", "val" or "test".
        subject: who was imaged; two cases of one person share it.
    """

    id: str
    domain: str
    image: Path
    label: Path | None
    split: str
    subject: str

    @property
    def truth(self) -> Path:
        """The label file of a labelled case.

        Raises:
            DataError: the case has none.
        """
        if self.label is None:
            raise DataError(
                f"{self.image} has no label: add its label file, or use the case for training of "
                "the target only."
            )
        return self.label

    def unlabelled(self) -> UnlabelledCase:
        """The case without any way to its label."""
        return UnlabelledCase(self.id, self.domain, self.image)


class Ask(Protocol):
    """Puts a question to a user, with a guess that is taken if nothing else is said."""

    def __call__(self, question: str, guess: str, read: Callable[[str], Answer]) -> Answer:
        """What `read` makes of the answer; where it refuses, the question is put again.

        Args:
            question: without a question mark at its end.
            guess: the proposed answer.
            read: the answer's text → its value.

        Raises:
            UserError: `read` refused, and nobody is there to be asked again.
        """


class Dataset(ABC):
    """A cross-modality segmentation task on files.

    The class docstring's first line is the one-line description in `glua-bench list`.

    Args:
        root: the directory of the data; None uses `default_root()`.
        fold: which split of the cases, from 1 to `folds`.

    Raises:
        ConfigError: the dataset has no such fold.
        DataError: from `prepare` or `cases`, naming the directory or file and the fix.
    """

    name: ClassVar[str]
    reference: ClassVar[str]  # where the data come from, for `list` and cards
    needs: ClassVar[str]  # what a user must have, for `list`
    structures: ClassVar[tuple[Structure, ...]]
    directions: ClassVar[tuple[str, ...]]  # "source-target"; the first is the default
    reading: ClassVar[Reading]
    grids: ClassVar[Mapping[str, Grid]]  # preset -> grid
    distance_note: ClassVar[str] = "mm by the files' headers"
    # Splits of the same files with other test cases; 1 is the default one, the literature's if any.
    folds: ClassVar[int] = 1
    fold: int = 1
    # What differs from the harness's protocol, for the stamp on every result; usually nothing.
    protocol: ClassVar[str] = ""
    publishable: ClassVar[bool] = False  # may pictures of it leave the machine?
    # Endings of the files that describe a dataset of this kind, for `--dataset FILE`; usually none.
    described_by: ClassVar[tuple[str, ...]] = ()
    # Do slices that follow each other in a file lie side by side in the body?
    neighbouring_slices: ClassVar[bool] = True

    def __init__(self, root: Path | None = None, fold: int = 1) -> None:
        self.check_fold(fold)
        self.root, self.fold = (root or self.default_root()).expanduser(), fold

    @classmethod
    def check_fold(cls, fold: int) -> None:
        """Refuse a fold that the dataset does not have.

        Raises:
            ConfigError: the message names the folds that it has.
        """
        if not 1 <= fold <= cls.folds:
            has = f"folds 1 to {cls.folds}" if cls.folds > 1 else "one split: leave --fold out"
            raise ConfigError(f"Dataset '{cls.name}' has no fold {fold}; it has {has}.")

    @property
    def fold_name(self) -> str:
        """The name with the fold, e.g. "mmwhs_fold2"; the name alone for fold 1."""
        return fold_name(self.name, self.fold)

    @classmethod
    def default_root(cls) -> Path:
        """`$GLUA_BENCH_DATA/<name>`, where owners' files are expected.

        Raises:
            DataError: the variable is not set.
        """
        base = os.environ.get("GLUA_BENCH_DATA")
        if not base:
            raise DataError(
                f"Dataset '{cls.name}' needs {cls.needs}: give the directory of the files with "
                f"--data-root, or set GLUA_BENCH_DATA to the directory that holds '{cls.name}'."
            )
        return Path(base) / cls.name

    @abstractmethod
    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Make sure that the files are there; generate them where that is possible.

        Args:
            report: receives one line at a time about progress.

        Raises:
            DataError: files are missing and cannot be made.
        """

    @abstractmethod
    def cases(self, domain: str) -> tuple[Case, ...]:
        """All cases of a domain, sorted by id, each in exactly one split."""

    @classmethod
    def described(cls, file: Path) -> type[Dataset]:
        """The dataset that a file describes, for classes that name endings in `described_by`.

        Args:
            file: given as `--dataset FILE` or `--plugin FILE`.

        Raises:
            ConfigError: the description cannot be used; the message names the line.
        """
        raise NotImplementedError(f"'{cls.name}' names endings in described_by and reads no file")

    def carried(self) -> Mapping[str, str]:
        """The description, to be kept with a run, for datasets that a file describes.

        Returns:
            Names of files and their texts: `dataset.yaml`, which `described` reads wherever it
            lies, and what it names beside itself. Nothing for all other datasets.
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
        """The text of a description of somebody's files, for classes that name `described_by`.

        Args:
            name: of the dataset.
            data: the directory of the files.
            ask: puts a question to the user.
            domains: words in the files' paths; empty lets the files suggest them.
            structures: name in words → raw label values, the same in all domains; None asks.

        Raises:
            DataError: the files show no task.
            ConfigError: an answer cannot be used.
        """
        raise NotImplementedError(f"'{cls.name}' names endings in described_by and drafts no file")

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """How the files of one domain become arrays; usually `reading` for all.

        A dataset whose domains need different windows, orientations or ignored values overrides
        this. `slice_axis` and `row_axis` have to show the same view of the body in all.

        Args:
            domain: one of `domains()`.
        """
        return cls.reading

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """`structures` with the raw label values of one domain's files; usually the same for all.

        Names, titles, colours and their order do not depend on the domain.

        Args:
            domain: one of `domains()`.
        """
        return cls.structures

    @classmethod
    def view(cls, domain: str) -> DomainView:
        """Return how the files of one domain are read: `reading_of` and `structures_of` in one.

        Args:
            domain: one of `domains()`.
        """
        return DomainView(domain, cls.reading_of(domain), tuple(cls.structures_of(domain)))

    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in order of their first appearance in `directions`."""
        return tuple(dict.fromkeys(name for d in self.directions for name in d.split("-")))

    def labelled(self, domain: str, split: str) -> tuple[Case, ...]:
        """The cases of one split of a domain that have a label file."""
        return tuple(case for case in self.split(domain, split) if case.label is not None)

    def split(self, domain: str, split: str) -> tuple[Case, ...]:
        """The cases of one split ("train", "val" or "test") of a domain."""
        return tuple(case for case in self.cases(domain) if case.split == split)

    def grid(self, preset: str) -> Grid:
        """The working grid of a preset.

        Raises:
            ConfigError: the dataset defines no grid for the preset.
        """
        if preset not in self.grids:
            raise ConfigError(
                f"Dataset '{self.name}' has no grid for preset '{preset}'; "
                f"choose one of {', '.join(self.grids)}."
            )
        return self.grids[preset]


def parse_direction(dataset: type[Dataset] | Dataset, direction: str | None) -> tuple[str, str]:
    """Split "source-target" into its two domain names.

    Args:
        dataset: the dataset, or its class.
        direction: e.g. "mr-ct"; None takes the dataset's default.

    Raises:
        ConfigError: the dataset does not know the direction.
    """
    chosen = direction or dataset.directions[0]
    if chosen not in dataset.directions:
        raise ConfigError(
            f"Dataset '{dataset.name}' has no direction '{chosen}'; "
            f"use --direction with one of {', '.join(dataset.directions)}."
        )
    source, target = chosen.split("-")
    return source, target


def role_fault(dataset: Dataset, direction: str, privileged: bool = False) -> str:
    """Why a direction cannot be trained or tested, and how that is mended; "" where it can.

    Args:
        dataset: whose files are there.
        direction: "source-target".
        privileged: labelled training cases of the target play the source.

    Raises:
        DataError: files are missing.
    """
    source, target = parse_direction(dataset, direction)
    labelled = target if privileged else source
    of = f"dataset '{dataset.name}'"
    leave = f"leave {direction} out of the directions"
    if not dataset.split(labelled, "train"):
        return (
            f"No case of '{labelled}' in {of} is for training, so nothing can be learned in "
            f"{direction}: put labelled cases of '{labelled}' into the split train, or {leave}."
        )
    if not dataset.labelled(labelled, "train"):
        return (
            f"No training case of '{labelled}' in {of} has a label, so it cannot be the labelled "
            f"side of {direction}: give label files, or {leave}."
        )
    if not dataset.split(target, "train"):
        return (
            f"No case of '{target}' in {of} is for training, so {direction} has no target images: "
            f"put cases of '{target}' into the split train, or {leave}."
        )
    if not dataset.split(target, "test"):
        return (
            f"No case of '{target}' in {of} is for the test, so {direction} has no score: put "
            f"labelled cases of '{target}' into the split test, or {leave}."
        )
    return ""
