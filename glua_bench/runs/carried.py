"""Facts about the dataset that a run stores, so that it can be used without the dataset.

`dataset.json` in the run directory holds each domain's reading, the structures and the usual
intensities, which `predict` needs and `export` includes. For a dataset described by a file,
`dataset.yaml` holds the description, by which a report finds the images. Nothing is computed from a
label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glua_bench.console import warn
from glua_bench.data.cache import cache_root, file_digest
from glua_bench.data.formats import open_volume
from glua_bench.data.geometry import tuples
from glua_bench.documents import load_json
from glua_bench.errors import RunFailure, UserError
from glua_bench.files import (
    Damaged,
    read_checked_json,
    write_checked_json,
    write_json,
    write_text,
)
from glua_bench.identity import CACHE_DIGITS, code_digest, digest
from glua_bench.inspection.measurements import Intensities, read_intensities
from glua_bench.inspection.outliers import Usual, usual
from glua_bench.task import (
    Case,
    Channel,
    Dataset,
    DomainView,
    Reading,
    Structure,
    UnlabelledCase,
)

FACTS, DESCRIPTION = "dataset.json", "dataset.yaml"  # match `seal.CARRIED`
MAX_IMAGES = 9  # more images hardly change the median of the intensities
MEASURING = ("glua_bench.inspection.measurements",)  # code in the keys of cached intensities


@dataclass(frozen=True)
class KnownDomain(DomainView):
    """A domain of a run.

    Attributes:
        usual: usual intensities of the training images; None for too few images.
        further: those of the second and later input channels.
    """

    usual: Usual | None = None
    further: tuple[Usual | None, ...] = ()

    def channel(self, index: int) -> Usual | None:
        """Return the usual intensities of one input channel."""
        return (self.usual, *self.further)[index]


@dataclass(frozen=True)
class Carried:
    """Facts about the dataset of a run.

    Attributes:
        domains: the run's source and target domain, by name.
        publishable: whether pictures of the data may be redistributed.
    """

    domains: Mapping[str, KnownDomain]
    publishable: bool

    def to_dict(self) -> dict[str, Any]:
        """Convert to lists, numbers and strings, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Carried:
        """Return the inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the values have another form.
        """
        return cls(
            {name: _domain(name, own) for name, own in values["domains"].items()},
            bool(values["publishable"]),
        )


def facts_of(
    dataset: Dataset | type[Dataset],
    names: Iterable[str],
    images: Sequence[Case | UnlabelledCase] = (),
) -> Carried:
    """Collect the facts of a dataset.

    Args:
        dataset: the dataset, or its class.
        names: domains of the run.
        images: training images, from which the usual intensities are computed.

    Raises:
        DataError: an image cannot be read.
    """
    domains = {}
    for name in names:
        view = dataset.view(name)
        own = sorted({case.images for case in images if case.domain == name})
        chosen = np.linspace(0, len(own) - 1, min(len(own), MAX_IMAGES)).round().astype(int)
        first, *further = (
            usual([_intensities(own[i][channel], view.reading.channel(channel)) for i in chosen])
            for channel in range(view.reading.inputs)
        )
        domains[name] = KnownDomain(name, view.reading, view.structures, first, tuple(further))
    return Carried(domains, dataset.publishable)


def _intensities(image: Path, reading: Reading) -> Intensities:
    """Return `read_intensities`, cached by the file's content."""
    parts = [code_digest(MEASURING), file_digest(image), reading.identity()]
    file = cache_root() / "intensities" / f"{digest(parts, CACHE_DIGITS)}.json"
    try:
        cached = read_checked_json(file)
        return Intensities(tuple(cached["levels"]), cached["negative"])
    except Damaged as error:
        warn(f"{error}; the image is measured again.")
    except OSError:
        pass
    found = read_intensities(open_volume(image), reading)
    with contextlib.suppress(RunFailure):  # a shared cache may be read-only
        write_checked_json(file, asdict(found))
    return found


def write(folder: Path, carried: Carried, described: Mapping[str, str]) -> None:
    """Write the facts and `Dataset.carried` (file name → text) into a run directory.

    Raises:
        RunFailure: the directory cannot be written.
    """
    for name, text in described.items():
        write_text(folder / name, text)
    write_json(folder / FACTS, carried.to_dict())


def read(folder: Path) -> Carried:
    """Read the facts from a run directory.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = folder / FACTS
    try:
        return Carried.from_dict(load_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}): restore it, or repeat the run's "
            "command with another --runs directory."
        ) from error


def description(folder: Path) -> Path | None:
    """Return the dataset's description in a run directory; None if there is none."""
    file = folder / DESCRIPTION
    return file if file.is_file() else None


def _domain(name: str, values: Mapping[str, Any]) -> KnownDomain:
    reading = _fields(values["reading"])
    channels = tuple(Channel(**_fields(own)) for own in reading.pop("channels", ()))
    return KnownDomain(
        name,
        Reading(**reading, channels=channels),
        tuple(Structure(**_fields(structure)) for structure in values["structures"]),
        _usual(values["usual"]),
        tuple(map(_usual, values.get("further", ()))),  # not in older runs
    )


def _usual(values: Mapping[str, Any] | None) -> Usual | None:
    return None if values is None else Usual(**_fields(values))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass with the tuples that JSON turned into lists."""
    return {name: tuples(value) for name, value in values.items()}
