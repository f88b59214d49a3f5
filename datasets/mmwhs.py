"""MM-WHS 2017: whole hearts in CT and MR, read from the owners' original files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from glua_bench.datasets.mmwhs_layout import LA_BLOOD, SPLIT_FILE, MMWHSLayout
from glua_bench.datasets.partitions import read_partition
from glua_bench.task import Grid, Structure

# Found in one MR label file of some copies, in place of the left atrium's 420.
STRAY = 421


class MMWHS(MMWHSLayout):
    """Left heart and aorta in cardiac CT and MR of different patients (MM-WHS 2017).

    Files. The owners' 20 CT and 20 MR volumes with labels under their original names, from
    `ct_train_1001_image.nii.gz` to `mr_train_1020_label.nii.gz`, in the folders `ct_train` and
    `mr_train`, in `ct_train1`, `ct_train2` and so on as in newer downloads, or all in one folder.
    The challenge's own test volumes (`ct_test`, `mr_test`) are not used.

    Labels. 205 is MYO, 420 LAC, 500 LVC and 820 AA; 550, 600 and 850 (right atrium, right
    ventricle, pulmonary artery) count as background. 421, found in one MR case of some copies,
    counts as 420. Any other value is an error.

    Cases. Test ids are the literature's; two of the other 16 are for validation; folds 2 to 5 test
    the others (`datasets/splits/mmwhs_v1.csv`). No patient is in both domains.

    Orientation and spacing are the header's: the sform, or the qform if no sform is set. Slices
    are coronal, with the patient's head at the top and right on the left.

    Window. The working window is 320 mm wide and high. In larger volumes it is centred on the
    bounding box of the body, which is found in the image (`volumes.load_image`), not in the label;
    a heart 8 cm off the middle of the body is still inside. Along the third axis every slice is
    kept.

    Args:
        root: directory with the files, or with `ct_train` and `mr_train`; None uses
            `$GLUA_BENCH_DATA/mmwhs`, or `$GLUA_BENCH_DATA` itself.
    """

    name: ClassVar[str] = "mmwhs"
    reference: ClassVar[str] = (
        "MM-WHS 2017; cite Zhuang & Shen, Med Image Anal 2016, and Zhuang et al., Med Image Anal "
        "2019"
    )
    needs: ClassVar[str] = (
        "registration for the MM-WHS 2017 challenge (https://zmiclab.github.io/zxh/0/mmwhs/), and "
        "its 20 CT and 20 MR volumes with labels"
    )
    structures: ClassVar[tuple[Structure, ...]] = tuple(
        replace(s, values=(*s.values, STRAY)) if LA_BLOOD in s.values else s
        for s in MMWHSLayout.structures
    )
    # 320 mm cover the heart anywhere in a scan of up to 420 mm (tests/datasets/test_mmwhs.py);
    # the phantom's 224 mm would cut some hearts.
    grids: ClassVar[Mapping[str, Grid]] = {
        "quick": Grid(80, 4.0, 4.0),
        "standard": Grid(160, 2.0, 3.0),
        "paper": Grid(320, 1.0, 2.0),
    }
    obtain: ClassVar[str] = (
        " (20 CT and 20 MR volumes, ct_train_1001_image.nii.gz with ct_train_1001_label.nii.gz to "
        "mr_train_1020_image.nii.gz with mr_train_1020_label.nii.gz, from the organisers of the "
        "MM-WHS 2017 challenge after registering and accepting its terms of use: "
        "https://zmiclab.github.io/zxh/0/mmwhs/)"
    )
    distance_note: ClassVar[str] = "mm by the files' headers"
    publishable: ClassVar[bool] = False
    folds: ClassVar[int] = 5

    @classmethod
    def default_root(cls) -> Path:
        """Return `$GLUA_BENCH_DATA/mmwhs`, for subclasses as well.

        Raises:
            DataError: the variable is not set.
        """
        return super(MMWHS, MMWHS).default_root()

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Check that every file exists.

        Raises:
            DataError: a directory or files are missing.
        """
        for domain in self.domains():
            found = self.cases(domain)
            places = sorted({str(case.image.parent) for case in found})
            report(f"{domain}: {len(found)} volumes with labels in {' and '.join(places)}")
        ignored = ", ".join(map(str, self.reading.ignored_values))
        report(
            f"labels: {STRAY}, a stray value of one MR case, counts as {LA_BLOOD}; {ignored} "
            "(right heart, pulmonary artery) count as background"
        )

    def split_of(self, domain: str, number: int) -> str:
        """Return the split of an id in the fold."""
        return read_partition(SPLIT_FILE, self.fold)[domain][number]

    def folders(self, domain: str) -> tuple[Path, ...]:
        """Return the directories to search for a domain's files, the expected one first."""
        roots = [self.root]
        # GLUA_BENCH_DATA may point at the files themselves, the parent of the default root.
        if not self.root.exists() and self.root.name == MMWHS.name:
            roots.append(self.root.parent)
        names = [f"{domain}_train", f"{domain}_train1", f"{domain}_train2", ""]
        return tuple(root / name for root in roots for name in names)
