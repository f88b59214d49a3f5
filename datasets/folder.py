"""Any domains of files, described by one YAML file instead of a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from glua_bench.datasets.folder_description import (
    PLANES,
    Description,
    Domain,
    carried,
    describe,
)
from glua_bench.datasets.folder_layouts import Found
from glua_bench.documents import nearest
from glua_bench.errors import DataError
from glua_bench.paths import name_fault
from glua_bench.task import Ask, Case, Dataset, Grid, Reading, Structure


class Folder(Dataset):
    """Your own domains, as a YAML file describes them: `--dataset FILE.yaml`.

    `glua-bench new-dataset` writes the file; what may stand in it is in docs/adding-data.md.
    `described` makes a dataset of it, with the name and the facts that the file gives.
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
    told: ClassVar[Description | None] = None

    @classmethod
    def described(cls, file: Path) -> type[Dataset]:
        """The dataset that a file describes.

        Raises:
            ConfigError: the file cannot be read, or says something that cannot be used; the
                message gives the line.
        """
        file = file.resolve()
        told = describe(file)
        readings = [domain.reading for domain in told.domains.values()]
        stated = any(reading.stated_spacing is not None for reading in readings)
        by = "a spacing stated in the description" if stated else "the files' headers"
        facts = {
            "__doc__": f"{told.title.rstrip('.')}.\n\nDescribed in {file.name}.",
            "__module__": cls.__module__,
            "name": told.name,
            "reference": told.reference,
            "needs": told.needs,
            "structures": told.structures,
            "directions": told.directions,
            "reading": readings[0],
            "grids": told.grids,
            "distance_note": f"mm, by {by}",
            "protocol": told.protocol,
            "publishable": told.publishable,
            "file": file,
            "told": told,
        }
        return type("Described", (cls,), facts)

    @classmethod
    def draft(
        cls,
        name: str,
        data: Path,
        ask: Ask,
        domains: tuple[str, ...] = (),
        structures: Mapping[str, tuple[int, ...]] | None = None,
    ) -> str:
        """A description of the files in a directory, with guesses that the user confirms.

        Raises:
            DataError: the files show no task.
            ConfigError: an answer cannot be used.
        """
        from glua_bench.datasets.folder_draft import draft

        return draft(name, data, ask, domains, structures)

    @classmethod
    def default_root(cls) -> Path:
        """The root that the description names; its own directory where it names none.

        Raises:
            DataError: there is no description.
        """
        if cls.told is None:
            raise DataError(
                "Dataset 'folder' needs a description: give --dataset FILE.yaml, which "
                "`glua-bench new-dataset NAME --data DIRECTORY` writes."
            )
        return cls.told.root

    def __reduce__(self) -> tuple[Any, ...]:
        """A described class has no name to be imported by, so another process reads the file."""
        return _restored, (self.file, self.root)

    def carried(self) -> Mapping[str, str]:
        """The description with its tables, for files where they lie now."""
        return {} if self.file is None else carried(self.file, self.root)

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """As described for the domain."""
        return cls.reading if cls.told is None else cls.told.domains[domain].reading

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """The classes with the domain's own values."""
        return cls.structures if cls.told is None else cls.told.domains[domain].structures

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Find the files, and say what should be changed in the description; nothing is made.

        Raises:
            DataError: files are missing.
        """
        for note in () if self.told is None else self.told.notes:
            report(note)
        for domain in self.domains():
            cases = self.cases(domain)
            bare = sum(case.label is None for case in cases)
            if bare:
                report(
                    f"{domain}: {bare} of {len(cases)} volumes have no label and serve as target "
                    "images only"
                )

    def cases(self, domain: str) -> tuple[Case, ...]:
        """All cases of a domain, sorted by id.

        Raises:
            DataError: the domain is unknown, files are missing, or the splits do not fit them.
        """
        domains = {} if self.told is None else self.told.domains
        if domain not in domains:
            raise DataError(
                f"Dataset '{self.name}' has no domain '{domain}'; {nearest(domain, list(domains))}."
            )
        told = domains[domain]
        if not self.root.is_dir():
            raise DataError(
                f"{self.root} is no directory: correct 'root' in {self.file}, or name the files' "
                "directory with --data-root."
            )
        found = told.find(self.root)
        ids = {entry.id for entry in found}
        for name, listed in (("val", told.val), ("test", told.test)):
            unknown = [case for case in listed if case not in ids]
            if unknown:
                raise told.place.error(
                    f"'{name}' names {unknown[0]}, which is not among the files; "
                    f"{nearest(unknown[0], sorted(ids)[:20])}",
                    name,
                )
        return tuple(
            sorted((self._case(domain, told, entry) for entry in found), key=lambda case: case.id)
        )

    def _case(self, domain: str, told: Domain, entry: Found) -> Case:
        fault = name_fault(entry.id)
        if fault:
            raise DataError(
                f"The id '{entry.id}' of {entry.image} {fault}, so it cannot name a file: rename "
                "the image, or give the id in a table."
            )
        listed = "test" if entry.id in told.test else "val" if entry.id in told.val else ""
        split = listed or entry.split or "train"
        if entry.label is None and split != "train":
            raise DataError(
                f"{entry.image} has no label but is a {split} case: add the label, or take the "
                f"case out of '{split}' in {self.file}."
            )
        shared = self.told is not None and self.told.same_people
        who = entry.subject or (entry.id if shared else f"{domain} {entry.id}")
        return Case(f"{domain}_{entry.id}", domain, entry.image, entry.label, split, who)


def _restored(file: Path, root: Path) -> Dataset:
    """A described dataset in another process."""
    return Folder.described(file)(root)
