"""The raw file layout of MM-WHS 2017, shared by the datasets stored in it.

`<root>/<domain>_train/<domain>_train_<id>_image.nii.gz` with `..._label.nii.gz` beside it, domains
ct and mr, ids 1001 to 1020 (Zhuang & Shen, Medical Image Analysis 2016; Zhuang et al., Medical
Image Analysis 2019). CT and MR subjects are different people.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from glua_bench.datasets.partitions import SPLITS_FOLDER, read_partition
from glua_bench.errors import DataError
from glua_bench.task import SPLITS, Case, Dataset, Grid, Reading, Structure

# Raw label values of the release.
LV_BLOOD, RV_BLOOD, LA_BLOOD, RA_BLOOD = 500, 600, 420, 550
LV_MYOCARDIUM, ASCENDING_AORTA, PULMONARY_ARTERY = 205, 820, 850

ALL_IDS = tuple(range(1001, 1021))
SPLIT_FILE = SPLITS_FOLDER / "mmwhs_v1.csv"


def listed(split: str) -> dict[str, tuple[int, ...]]:
    """Return domain → sorted ids of one split of the literature's partition."""
    return {
        domain: tuple(sorted(number for number, own in ids.items() if own == split))
        for domain, ids in read_partition(SPLIT_FILE, 1).items()
    }


class MMWHSLayout(Dataset):
    """Base class of datasets in the raw layout and with the label values of MM-WHS 2017.

    Subclasses define the name, the source of the files, and `prepare`.

    Args:
        root: the directory that holds `ct_train` and `mr_train`; None uses `default_root()`.
    """

    # Okabe & Ito's colour-blind-safe palette.
    structures: ClassVar[tuple[Structure, ...]] = (
        Structure("MYO", "left ventricular myocardium", (LV_MYOCARDIUM,), "#e69f00"),
        Structure("LAC", "left atrial cavity", (LA_BLOOD,), "#56b4e9"),
        Structure("LVC", "left ventricular cavity", (LV_BLOOD,), "#009e73"),
        Structure("AA", "ascending aorta", (ASCENDING_AORTA,), "#cc79a7"),
    )
    directions: ClassVar[tuple[str, ...]] = ("mr-ct", "ct-mr")
    # Coronal slices, as in the literature on this task. In RAS+ axis 0 points to the patient's
    # right and axis 2 upwards; flipping both puts right on the image's left and head at the top.
    reading: ClassVar[Reading] = Reading(
        orientation="canonical",
        slice_axis=1,
        row_axis=2,
        flip=(0, 2),
        ignored_values=(RV_BLOOD, RA_BLOOD, PULMONARY_ARTERY),
    )
    # Test ids as in the literature (SIFA, AAAI 2019, and later papers); validation ids are ours,
    # because they differ between papers.
    test_ids: ClassVar[Mapping[str, tuple[int, ...]]] = listed("test")
    val_ids: ClassVar[Mapping[str, tuple[int, ...]]] = listed("val")
    grids: ClassVar[Mapping[str, Grid]] = {
        "quick": Grid(64, 3.5, 4.0),
        "standard": Grid(128, 1.75, 3.0),
        "paper": Grid(256, 0.9, 2.0),
    }
    # Appended to messages about missing files: where to obtain them.
    obtain: ClassVar[str] = ""

    @abstractmethod
    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Make sure that the files exist."""

    def ids(self, domain: str) -> tuple[int, ...]:
        """Return the ids that the root must hold, sorted."""
        return ALL_IDS

    def folders(self, domain: str) -> tuple[Path, ...]:
        """Return the directories to search for the files of "ct" or "mr", in order."""
        return (self.root / f"{domain}_train",)

    @staticmethod
    def image_path(root: Path, domain: str, number: int) -> Path:
        """Return the path of a subject's image volume."""
        return root / f"{domain}_train" / f"{domain}_train_{number}_image.nii.gz"

    @staticmethod
    def label_path(root: Path, domain: str, number: int) -> Path:
        """Return the path of a subject's label volume."""
        return root / f"{domain}_train" / f"{domain}_train_{number}_label.nii.gz"

    def split_of(self, domain: str, number: int) -> str:
        """Return the split of an id: "train", "val" or "test"."""
        if number in self.test_ids[domain]:
            return "test"
        return "val" if number in self.val_ids[domain] else "train"

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of "ct" or "mr", sorted by id.

        Raises:
            DataError: the domain is unknown, or files are missing.
        """
        if domain not in self.test_ids:
            raise DataError(
                f"Dataset '{self.name}' has no domain '{domain}'; "
                f"choose one of {', '.join(self.test_ids)}."
            )
        folders = self.folders(domain)
        numbers = self.ids(domain)
        made: list[Case] = []
        missing: list[Path] = []
        for number in sorted(numbers):
            files = []
            for path_of in (self.image_path, self.label_path):
                name = path_of(self.root, domain, number).name
                found = (folder / name for folder in folders if (folder / name).is_file())
                files.append(next(found, folders[0] / name))
            missing += [path for path in files if not path.is_file()]
            image, label = files
            case, split = f"{domain}_{number}", self.split_of(domain, number)
            made.append(Case(case, domain, image, label, split, f"{self.name}_{case}"))
        if missing and len(missing) == 2 * len(numbers):
            raise DataError(
                f"{folders[0]} holds no files of MM-WHS: pass the directory that holds ct_train "
                f"and mr_train with --data-root{self.obtain}."
            )
        if missing:
            raise DataError(
                f"{missing[0].parent} lacks {len(missing)} of {2 * len(numbers)} files, first "
                f"{missing[0].name}: put the unpacked files there under their original names"
                f"{self.obtain}."
            )
        assert all(case.split in SPLITS for case in made)
        return tuple(made)
