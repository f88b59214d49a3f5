"""Abdominal organs in CT (BTCV) and MR (CHAOS), read from the owners' original files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from glua_bench.data.cache import cache_root, intact
from glua_bench.datasets import chaos
from glua_bench.datasets.abdomen_files import find_scans
from glua_bench.datasets.partitions import SPLITS_FOLDER, read_partition
from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, Grid, Reading, Structure

SPLIT_FILE = SPLITS_FOLDER / "abdomen_v1.csv"


class Abdomen(Dataset):
    """Liver, kidneys and spleen in CT (BTCV) and T2-SPIR MR (CHAOS) of different people.

    Files. The owners' 30 labelled CT and 20 labelled MR scans under their original names, at any
    depth below the root. `prepare` converts CHAOS's DICOM series and PNG masks to NIfTI in the
    cache. NIfTI copies of CHAOS, `image_<id>.nii.gz` with `label_<id>.nii.gz`, are used if the root
    holds no series.

    Labels. BTCV: 6 is liver, 2 right kidney, 3 left kidney, 1 spleen; the other nine organs count
    as background. CHAOS: 63, 126, 189 and 252, in copies also 1 to 4. Other values are errors.

    Cases. Test ids are the literature's; of the other cases, three CT and two MR scans are for
    validation; folds 2 to 5 test the others (`datasets/splits/abdomen_v1.csv`). CT patients come
    from a US hospital and MR patients from a Turkish one, so nobody is in both domains.

    Intensity. CT values from -125 to 275 HU are mapped to [-1, 1]. MR is normalised by percentiles
    of each volume.

    Slices are axial, with the patient's front at the top and right on the left. The window is
    416 mm wide and high; in larger scans it is centred on the bounding box of the body, which is
    found in the image (`volumes.load_image`), not in the label.

    Args:
        root: directory with the files of both owners; None uses `$GLUA_BENCH_DATA/abdomen`.
    """

    name: ClassVar[str] = "abdomen"
    reference: ClassVar[str] = (
        "BTCV (Landman et al., MICCAI 2015 challenge) and CHAOS (Kavur et al., Med Image Anal 2021)"
    )
    needs: ClassVar[str] = (
        "registration for BTCV (https://www.synapse.org/Synapse:syn3193805), CHAOS_Train_Sets.zip "
        "(https://doi.org/10.5281/zenodo.3431873), and both owners' terms"
    )
    # Okabe & Ito's colour-blind-safe palette; values are BTCV's.
    structures: ClassVar[tuple[Structure, ...]] = (
        Structure("LIV", "liver", (6,), "#e69f00"),
        Structure("RK", "right kidney", (2,), "#56b4e9"),
        Structure("LK", "left kidney", (3,), "#009e73"),
        Structure("SPL", "spleen", (1,), "#cc79a7"),
    )
    directions: ClassVar[tuple[str, ...]] = ("mr-ct", "ct-mr")
    # In RAS+ axis 0 points to the patient's right and axis 1 to the front, so both are flipped.
    reading: ClassVar[Reading] = Reading(
        orientation="canonical", slice_axis=2, row_axis=1, flip=(0, 1)
    )
    # Slice distance: 5 to 9 mm in CHAOS, 2.5 to 5 mm in BTCV.
    grids: ClassVar[Mapping[str, Grid]] = {
        "quick": Grid(80, 5.2, 8.0),
        "standard": Grid(160, 2.6, 6.0),
        "paper": Grid(320, 1.3, 5.0),
    }
    publishable: ClassVar[bool] = False
    folds: ClassVar[int] = 5

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """Return the reading of a domain; CT has a HU window and ignores nine further organs."""
        if domain != "ct":
            return cls.reading
        return replace(
            cls.reading, intensity_range=(-125.0, 275.0), ignored_values=(4, 5, *range(7, 14))
        )

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """Return the structures of a domain; MR accepts CHAOS's grey levels and 1 to 4."""
        if domain != "mr":
            return cls.structures
        organs = (chaos.LIVER, chaos.RIGHT_KIDNEY, chaos.LEFT_KIDNEY, chaos.SPLEEN)
        return tuple(
            replace(structure, values=(organ, number))
            for number, (structure, organ) in enumerate(
                zip(cls.structures, organs, strict=True), start=1
            )
        )

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Check that every file is there, and convert MR series that are new or have changed.

        Volumes are written atomically, so an interrupted conversion can be resumed and several
        processes may run at once. After an unusable series, the remaining ones are still converted.

        Args:
            report: receives a line for each domain, each converted series, and each problem.

        Raises:
            DataError: files are missing, damaged or do not form a volume.
            RunFailure: the cache cannot be written.
        """
        scans = find_scans(self.root, self._splits)
        for domain in self.domains():
            scans.demand(domain)
            kind = "DICOM series with masks" if domain == "mr" and scans.series else "volumes"
            report(f"{domain}: {len(scans.of(domain))} {kind} below {self.root}")
        problems = []
        for number, folder in scans.series.items():
            try:
                slices = chaos.slices_of(folder)
                image, label = _converted(number, slices)
                if not intact(image, label):
                    chaos.convert(slices, image, label)
                    report(f"mr_{number:02d}: converted to {image}")
            except DataError as error:
                report(f"mr_{number:02d}: {error}")
                problems.append(error)
        if problems:
            raise problems[0]

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of "ct" or "mr", sorted by id.

        Raises:
            DataError: the domain is unknown, files are missing, or a series is not converted yet.
        """
        if domain not in self._splits:
            raise DataError(f"Dataset '{self.name}' has no domain '{domain}': use ct or mr.")
        made = []
        for number, (image, label) in self._volumes(domain).items():
            case = f"{domain}_{number:02d}"
            split = self._splits[domain][number]
            made.append(Case(case, domain, image, label, split, f"{Abdomen.name}_{case}"))
        return tuple(made)

    @property
    def _splits(self) -> Mapping[str, Mapping[int, str]]:
        """Domain → id → split."""
        return read_partition(SPLIT_FILE, self.fold)

    def _volumes(self, domain: str) -> Mapping[int, tuple[Path, Path]]:
        """Return id → NIfTI files of image and label; those of a series lie in the cache."""
        scans = find_scans(self.root, self._splits)
        scans.demand(domain)
        if domain != "mr" or not scans.series:
            return scans.volumes[domain]
        made = {}
        for number, folder in scans.series.items():
            made[number] = _converted(number, chaos.slices_of(folder))
            if not all(map(os.path.isfile, made[number])):  # also where the cache is private
                raise DataError(
                    f"{folder} is not converted to NIfTI: run "
                    f"`glua-bench data prepare {self.name}` first."
                )
        return made


def _converted(number: int, slices: chaos.Slices) -> tuple[Path, Path]:
    """Return the paths of image and label of a converted MR series."""
    image, label = chaos.addresses(slices)
    folder = cache_root() / Abdomen.name  # shared by all folds
    return folder / f"mr_{number:02d}-{image}.nii", folder / f"mr_{number:02d}_label-{label}.nii"
