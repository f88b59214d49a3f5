"""What a run carries of its dataset, so that others can use the run without the dataset.

`dataset.json` in the run's directory holds how each domain's files are read, the classes, and how
intensities are distributed: what `predict` needs, and what an exported model takes along. A dataset
that a file describes also leaves the description, as `dataset.yaml`, with which a report finds the
images. Nothing of it is computed from a label.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glua_bench.config import digest
from glua_bench.data.cache import cache_root, file_digest
from glua_bench.data.formats import open_volume
from glua_bench.data.geometry import tuples
from glua_bench.errors import RunFailure, UserError
from glua_bench.files import write_json, write_text
from glua_bench.inspection.measurements import Intensities, read_intensities
from glua_bench.inspection.outliers import Usual, usual
from glua_bench.task import Case, Dataset, DomainView, Reading, Structure, UnlabelledCase

FACTS, DESCRIPTION = "dataset.json", "dataset.yaml"  # among `tracking.CARRIED`
# A median of so many images hardly changes with more of them, which would have to be read.
_READ = 9
_VERSION = 1  # of remembered distributions; raise it when `read_intensities` gives others


@dataclass(frozen=True)
class KnownDomain(DomainView):
    """What a run knows of one of its domains.

    Attributes:
        usual: how intensities of its training images are distributed; None where the run trained
            on too few of them. The others are those of `DomainView`.
    """

    usual: Usual | None = None


@dataclass(frozen=True)
class Carried:
    """What a run knows of its dataset.

    Attributes:
        domains: source and target of the run, by name.
        publishable: whether pictures of the data may be passed on.
    """

    domains: Mapping[str, KnownDomain]
    publishable: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Carried:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the values are not of that form.
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
    """What is carried of a dataset.

    Args:
        dataset: the dataset, or its class.
        names: of the run's domains.
        images: training images, of which some tell the usual intensities; labels are not read.

    Raises:
        DataError: an image cannot be read.
    """
    domains = {}
    for name in names:
        view = dataset.view(name)
        own = sorted({case.image for case in images if case.domain == name})
        places = np.linspace(0, len(own) - 1, min(len(own), _READ)).round().astype(int)
        found = [_intensities(own[place], view.reading) for place in places]
        domains[name] = KnownDomain(name, view.reading, view.structures, usual(found))
    return Carried(domains, dataset.publishable)


def _intensities(image: Path, reading: Reading) -> Intensities:
    """As `read_intensities`, remembered in the cache by the file's content."""
    key = digest([_VERSION, file_digest(image), reading.identity()], 32)
    memory = cache_root() / "intensities" / f"{key}.json"
    try:
        told = json.loads(memory.read_text(encoding="utf-8"))
        return Intensities(tuple(told["levels"]), told["negative"])
    except (OSError, ValueError, KeyError, TypeError):
        found = read_intensities(open_volume(image), reading)
        with contextlib.suppress(RunFailure):  # a cache that others filled may be read-only
            write_json(memory, asdict(found))
        return found


def write(folder: Path, carried: Carried, described: Mapping[str, str]) -> None:
    """Write what is carried into a run's directory.

    Args:
        folder: the directory.
        carried: the facts.
        described: from `Dataset.carried`: name of a file → its text.

    Raises:
        RunFailure: the directory cannot be written.
    """
    for name, text in described.items():
        write_text(folder / name, text)
    write_json(folder / FACTS, carried.to_dict())


def read(folder: Path) -> Carried:
    """Read what `write` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = folder / FACTS
    try:
        return Carried.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}): restore it, or give the run's "
            "command again with another --runs directory."
        ) from error


def description(folder: Path) -> Path | None:
    """The description of the dataset in a run's directory; None where it has none."""
    file = folder / DESCRIPTION
    return file if file.is_file() else None


def _domain(name: str, values: Mapping[str, Any]) -> KnownDomain:
    known = values["usual"]
    return KnownDomain(
        name,
        Reading(**_fields(values["reading"])),
        tuple(Structure(**_fields(one)) for one in values["structures"]),
        None if known is None else Usual(**_fields(known)),
    )


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, as they were before JSON."""
    return {name: tuples(value) for name, value in values.items()}
