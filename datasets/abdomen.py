"""BTCV and CHAOS: abdominal organs in CT and MR, from the owners' files as they were downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from glua_bench.cache import cache_root
from glua_bench.datasets import chaos
from glua_bench.datasets.abdomen_files import find_scans
from glua_bench.datasets.partitions import SPLITS_FOLDER, read_partition
from glua_bench.datasets.placed import sweep
from glua_bench.errors import DataError, RunFailure
from glua_bench.task import Case, Dataset, Grid, Reading, Structure

SPLIT_FILE = SPLITS_FOLDER / "abdomen_v1.csv"


class Abdomen(Dataset):
    """Liver, kidneys and spleen in CT (BTCV) and T2-SPIR MR (CHAOS) of different people.

    Files. The owners' 30 labelled CT and 20 labelled MR scans under their own names, at any depth
    below the root. `prepare` converts CHAOS's DICOM series and PNG masks to NIfTI in the cache.
    NIfTI copies of CHAOS, `image_<id>.nii.gz` with `label_<id>.nii.gz`, are taken where the root
    holds no series.

    Labels. BTCV: 6 is liver, 2 right kidney, 3 left kidney, 1 spleen; the other nine organs count
    as background. CHAOS: 63, 126, 189 and 252, in copies also 1 to 4. Other values are errors.

    Cases. Test ids are the literature's, of the others three CT and two MR scans are for
    validation; folds 2 to 5 test the others. See `datasets/splits/abdomen_v1.csv`. The CT is of
    patients of an American hospital and the MR of patients of a Turkish one, so nobody is in both
    domains.

    Intensity. CT from -125 to 275 HU becomes -1 to 1. MR has no unit, so each volume's own
    percentiles do.

    Slices are axial, the front of the body at the top, the patient's right at the left. The window
    is 416 mm wide and high; where a scan is larger, it is centred on the bounding box of the body,
    which is found in the image (`volumes.load_image`). No label is read for it.

    Args:
        root: the directory with the files of both owners; None takes `$GLUA_BENCH_DATA/abdomen`.
    """

    name: ClassVar[str] = "abdomen"
    reference: ClassVar[str] = (
        "BTCV (Landman et al., MICCAI 2015 challenge) and CHAOS (Kavur et al., Med Image Anal 2021)"
    )
    needs: ClassVar[str] = (
        "registration for BTCV (https://www.synapse.org/Synapse:syn3193805), CHAOS_Train_Sets.zip "
        "(https://doi.org/10.5281/zenodo.3431873), and both owners' terms"
    )
    # Okabe & Ito's palette, which stays distinct for colour-blind readers; values are BTCV's.
    structures: ClassVar[tuple[Structure, ...]] = (
        Structure("LIV", "liver", (6,), "#e69f00"),
        Structure("RK", "right kidney", (2,), "#56b4e9"),
        Structure("LK", "left kidney", (3,), "#009e73"),
        Structure("SPL", "spleen", (1,), "#cc79a7"),
    )
    directions: ClassVar[tuple[str, ...]] = ("mr-ct", "ct-mr")
    # In RAS+ axis 0 grows towards the patient's right and axis 1 forwards, so both are reversed.
    reading: ClassVar[Reading] = Reading(
        orientation="canonical", slice_axis=2, row_axis=1, flip=(0, 1)
    )
    # Slices of CHAOS lie 5 to 9 mm apart and those of BTCV 2.5 to 5 mm.
    grids: ClassVar[Mapping[str, Grid]] = {
        "quick": Grid(80, 5.2, 8.0),
        "standard": Grid(160, 2.6, 6.0),
        "paper": Grid(320, 1.3, 5.0),
    }
    publishable: ClassVar[bool] = False
    folds: ClassVar[int] = 5

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """CT has a window in HU and the values of nine other organs."""
        if domain != "ct":
            return cls.reading
        return replace(
            cls.reading, intensity_range=(-125.0, 275.0), ignored_values=(4, 5, *range(7, 14))
        )

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """CHAOS's grey levels, and the class numbers that its NIfTI copies hold instead."""
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
        """Check that every file is there, and convert the MR series that are new or have changed.

        Each volume appears complete or not at all, so a conversion that was interrupted goes on
        where it was, and several processes may work at once. A series that cannot be used does not
        keep the others from being converted.

        Args:
            report: receives a line for each domain, each converted series, and each problem.

        Raises:
            DataError: files are missing, damaged or do not make a volume.
            RunFailure: the cache cannot be written.
        """
        scans = find_scans(self.root, self._splits)
        for domain in self.domains():
            scans.demand(domain)
            kind = "DICOM series with masks" if domain == "mr" and scans.series else "volumes"
            report(f"{domain}: {len(scans.of(domain))} {kind} below {self.root}")
        problems = []
        sweep(_cache())
        for number, folder in scans.series.items():
            try:
                slices = chaos.slices_of(folder)
                image, label = _converted(number, slices)
                if not (image.is_file() and label.is_file()):
                    chaos.convert(slices, image, label)
                    report(f"mr_{number:02d}: converted to {image}")
            except DataError as error:
                report(f"mr_{number:02d}: {error}")
                problems.append(error)
            except OSError as error:
                raise RunFailure(
                    f"{_cache()} cannot be written ({error.strerror or error}): free the space, or "
                    "set GLUA_BENCH_CACHE to another directory."
                ) from error
        if problems:
            raise problems[0]

    def cases(self, domain: str) -> tuple[Case, ...]:
        """All cases of a domain, sorted by id.

        Args:
            domain: "ct" or "mr".

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
        """Id → NIfTI files of image and label, which for a series lie in the cache."""
        scans = find_scans(self.root, self._splits)
        scans.demand(domain)
        if domain != "mr" or not scans.series:
            return scans.volumes[domain]
        made = {}
        for number, folder in scans.series.items():
            made[number] = _converted(number, chaos.slices_of(folder))
            if not all(file.is_file() for file in made[number]):
                raise DataError(
                    f"{folder} is not converted to NIfTI: run "
                    f"`glua-bench data prepare {self.name}` first."
                )
        return made


def _cache() -> Path:
    """Where converted scans lie, of all folds."""
    return cache_root() / Abdomen.name


def _converted(number: int, slices: chaos.Slices) -> tuple[Path, Path]:
    """Where image and label of an MR series lie once they are converted."""
    image, label = chaos.addresses(slices)
    return (
        _cache() / f"mr_{number:02d}-{image}.nii",
        _cache() / f"mr_{number:02d}_label-{label}.nii",
    )
