"""MS-CMRSeg 2019: cardiac MR in two sequences, read from the owners' files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glua_bench.errors import DataError
from glua_bench.task import Case, Dataset, Grid, Reading, Structure

# Patients of each split. Patient N is probably the same person in both sequences, so the domains
# share no number.
_SPLITS = {
    "bssfp": {"train": range(1, 15), "val": range(15, 17), "test": range(17, 21)},
    "lge": {"train": range(21, 27), "val": range(27, 29), "test": range(29, 36)},
}
_FOLDERS = {"bssfp": "C0", "lge": "LGE"}
_OBTAIN = (
    "the data come with the VarDA release, after registering for the MS-CMRSeg 2019 challenge "
    "(https://zmiclab.github.io/zxh/0/mscmrseg19/) and accepting its terms"
)


class MSCMR(Dataset):
    """Myocardium and both ventricles across cardiac MR sequences, bSSFP and LGE (MS-CMRSeg 2019).

    Files as in the VarDA release: `C0/patientN_C0.nii.gz`, `LGE/patientN_LGE.nii.gz`, each with its
    `_manual` label, in the root itself, or in `Patch192/` or `mscmr/` (or both) below it.

    Cases. bSSFP uses patients 1-20 (train 1-14, val 15-16, test 17-20), LGE patients 21-35 (train
    21-26, val 27-28, test 29-35). This keeps source and target patients apart in both directions,
    and is the same for partial and full releases: bSSFP 21-35 and LGE 1-20 and 36-45 of the full
    release are unused, so that scores from different copies are comparable. LGE uses almost half of
    its patients for the test, because four or five cases give wide intervals; its six training
    volumes hold 82 slices.

    Orientation. Axis codes differ between files (LSP, PSR) although the arrays are oriented alike,
    so arrays are used as stored and flipped along their second axis, which shows the anterior wall
    at the top and the right ventricle on the left.

    Spacing. The bSSFP headers give 1.19-1.25 mm in-plane, but their hearts cover as many pixels
    as in LGE (0.73-0.76 mm by header), so 0.74 mm is stated for both. The slice distance is the
    header's in both domains (bSSFP 8-13 mm, LGE 5 mm): with it, the labelled hearts have the same
    length in both.
    """

    name = "mscmr"
    reference = (
        "MS-CMRSeg 2019 as released with VarDA; cite Zhuang, TPAMI 2019, and Wu & Zhuang, TMI 2021"
    )
    needs = (
        "registration for the MS-CMRSeg 2019 challenge "
        "(https://zmiclab.github.io/zxh/0/mscmrseg19/), and the VarDA release of its data"
    )
    structures = (
        Structure("MYO", "left ventricular myocardium", (200,), "#2a9d8f"),
        Structure("LV", "left ventricular cavity", (500,), "#e76f51"),
        Structure("RV", "right ventricular cavity", (600,), "#457b9d"),
    )
    directions = ("bssfp-lge", "lge-bssfp")
    # A stated spacing of 0 leaves that axis to the header.
    reading = Reading(
        orientation="stored",
        slice_axis=2,
        row_axis=1,
        flip=(1,),
        stated_spacing=(0.74, 0.74, 0.0),
    )
    grids = {
        "quick": Grid(72, 1.98),
        "standard": Grid(192, 0.74),
        "paper": Grid(192, 0.74),
    }
    distance_note = (
        "mm, with 0.74 mm in the plane stated for both sequences because the bSSFP headers "
        "contradict their pixels; slice distance by header"
    )
    publishable = False

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Check that every file exists.

        Raises:
            DataError: the directory or files are missing.
        """
        for domain in self.domains():
            found = self.cases(domain)
            report(f"{domain}: {len(found)} volumes with labels in {found[0].image.parent}")

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of "bssfp" or "lge".

        Raises:
            DataError: the directory, an image or a label is missing.
        """
        if domain not in _SPLITS:
            raise DataError(f"Dataset 'mscmr' has no domain '{domain}': use bssfp or lge.")
        suffix = _FOLDERS[domain]
        folder = self._base() / suffix
        cases, missing = [], []
        for split, numbers in _SPLITS[domain].items():
            for number in numbers:
                image = folder / f"patient{number}_{suffix}.nii.gz"
                label = folder / f"patient{number}_{suffix}_manual.nii.gz"
                missing += [file.name for file in (image, label) if not file.is_file()]
                cases.append(
                    Case(f"{domain}_{number:02d}", domain, image, label, split, f"patient{number}")
                )
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"{folder} lacks {', '.join(missing[:3])}{more}: complete the directory with the "
                f"VarDA release's images and _manual labels of patients "
                f"{cases[0].subject[7:]}-{cases[-1].subject[7:]} ({_OBTAIN})."
            )
        return tuple(cases)

    def _base(self) -> Path:
        """Return the directory that holds C0 and LGE."""
        # GLUA_BENCH_DATA may point at the files themselves, the parent of the default root.
        roots = [self.root]
        if not self.root.exists() and self.root.name == self.name:
            roots.append(self.root.parent)
        for root in roots:
            for below in ("", "Patch192", "mscmr", "mscmr/Patch192"):
                base = root / below
                if all((base / folder).is_dir() for folder in _FOLDERS.values()):
                    return base
        raise DataError(
            f"{self.root} does not hold MS-CMRSeg: set GLUA_BENCH_DATA or --data-root to the "
            "directory with C0/patientN_C0.nii.gz and LGE/patientN_LGE.nii.gz (or with Patch192/ "
            f"or mscmr/ that contains them; {_OBTAIN})."
        )
