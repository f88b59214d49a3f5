"""A dataset described by a YAML file instead of a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from glua_bench.datasets.folder.description import PLANES, Description, Domain, carried, describe
from glua_bench.datasets.folder.layouts import Found
from glua_bench.documents import nearest
from glua_bench.errors import DataError
from glua_bench.paths import name_fault
from glua_bench.task import Ask, Case, Dataset, Grid, Reading, Structure


class Folder(Dataset):
    """Your own domains, described by a YAML file: `--dataset FILE.yaml`.

    `glua-bench new-dataset` writes the file; docs/adding-data.md lists its entries. `described`
    creates a dataset class with the name and the attributes that the file gives.
    """

    name: ClassVar[str] = "folder"
    reference: ClassVar[str] = "your own"
    needs: ClassVar[str] = "a description, FILE.yaml, and the files that it names"
    described_by: ClassVar[tuple[str, ...]] = (".yaml", ".yml")
    structures: ClassVar[tuple[Structure, ...]] = ()
    directions: ClassVar[tuple[str, ...]] = ()
    reading: ClassVar[Reading] = PLANES["axial"]
    grids: ClassVar[Mapping[str, Grid]] = {}
    file: ClassVar[Path | None] = None
    description: ClassVar[Description | None] = None

    @classmethod
    def described(cls, file: Path) -> type[Dataset]:
        """Return the dataset class for a description.

        Raises:
            ConfigError: the file cannot be read or has an invalid entry; the message gives the
            line.
        """
        file = file.resolve()
        description = describe(file)
        readings = [domain.reading for domain in description.domains.values()]
        stated = any(reading.stated_spacing is not None for reading in readings)
        by = "a spacing stated in the description" if stated else "the files' headers"
        attributes = {
            "__doc__": f"{description.title.rstrip('.')}.\n\nDescribed in {file.name}.",
            "__module__": cls.__module__,
            "name": description.name,
            "reference": description.reference,
            "needs": description.needs,
            "structures": description.structures,
            "directions": description.directions,
            "reading": readings[0],
            "grids": description.grids,
            "distance_note": f"mm, by {by}",
            "protocol": description.protocol,
            "publishable": description.publishable,
            "file": file,
            "description": description,
        }
        return type("Described", (cls,), attributes)

    @classmethod
    def draft(
        cls,
        name: str,
        data: Path,
        ask: Ask,
        domains: tuple[str, ...] = (),
        structures: Mapping[str, tuple[int, ...]] | None = None,
    ) -> str:
        """Return a description of the files in a directory, with guesses for the user to confirm.

        Raises:
            DataError: the files show no task.
            ConfigError: an answer is invalid.
        """
        from glua_bench.datasets.folder.draft import draft

        return draft(name, data, ask, domains, structures)

    @classmethod
    def default_root(cls) -> Path:
        """Return the description's `root`, or its own directory if it has none.

        Raises:
            DataError: there is no description.
        """
        if cls.description is None:
            raise DataError(
                "Dataset 'folder' needs a description: pass --dataset FILE.yaml, written by "
                "`glua-bench new-dataset NAME --data DIRECTORY`."
            )
        return cls.description.root

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by file and root, because a described class cannot be imported by name."""
        return _restored, (self.file, self.root)

    def carried(self) -> Mapping[str, str]:
        """Return the description and its tables, with the current root."""
        return {} if self.file is None else carried(self.file, self.root)

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """Return the reading of a domain."""
        return cls.reading if cls.description is None else cls.description.domains[domain].reading

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """Return the structures with the domain's label values."""
        own = cls.description
        return cls.structures if own is None else own.domains[domain].structures

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Find the files and report what to change in the description; nothing is written.

        Raises:
            DataError: files are missing.
        """
        for own in () if self.description is None else self.description.domains.values():
            for note in own.notes:
                report(note)
        for domain in self.domains():
            cases = self.cases(domain)
            unlabelled = sum(case.label is None for case in cases)
            if unlabelled:
                report(
                    f"{domain}: {unlabelled} of {len(cases)} volumes have no label and are used "
                    "only as target training images"
                )

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of a domain, sorted by id.

        Raises:
            DataError: the domain is unknown, files are missing, or the splits do not match them.
        """
        domains = {} if self.description is None else self.description.domains
        if domain not in domains:
            raise DataError(
                f"Dataset '{self.name}' has no domain '{domain}'; {nearest(domain, list(domains))}."
            )
        own = domains[domain]
        if not self.root.is_dir():
            raise DataError(
                f"{self.root} is not a directory: correct 'root' in {self.file}, or pass the "
                "directory of the files with --data-root."
            )
        found = own.find(self.root)
        ids = {entry.id for entry in found}
        for name, listed in (("val", own.val), ("test", own.test)):
            unknown = [case for case in listed if case not in ids]
            if unknown:
                raise own.place.error(
                    f"'{name}' lists {unknown[0]}, which is not among the files; "
                    f"{nearest(unknown[0], sorted(ids)[:20])}",
                    name,
                )
        return tuple(
            sorted((self._case(domain, own, entry) for entry in found), key=lambda case: case.id)
        )

    def _case(self, domain: str, own: Domain, entry: Found) -> Case:
        fault = name_fault(entry.id)
        if fault:
            raise DataError(
                f"The id '{entry.id}' of {entry.image} {fault}, so it is not a valid file name: "
                "rename the image, or give another id in a table."
            )
        listed = "test" if entry.id in own.test else "val" if entry.id in own.val else ""
        split = listed or entry.split or "train"
        if entry.label is None and split != "train":
            raise DataError(
                f"{entry.image} is a {split} case without a label: add the label, or remove the "
                f"case from '{split}' in {self.file}."
            )
        shared = self.description is not None and self.description.same_people
        who = entry.subject or (entry.id if shared else f"{domain} {entry.id}")
        case = f"{domain}_{entry.id}"
        return Case(case, domain, entry.image, entry.label, split, who, entry.further)


def _restored(file: Path, root: Path) -> Dataset:
    """Recreate a described dataset in another process."""
    return Folder.described(file)(root)
