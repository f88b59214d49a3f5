"""MM-WHS 2017 as pre-processed for PnP-AdaNet and SIFA, the most widespread copy.

The release holds single slices as TFRecord files for training and validation, and whole volumes
for the test. `prepare` converts both to NIfTI in the cache once. docs/mmwhs_sifa.md lists what is
known about the release.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from glua_bench.data.cache import generating
from glua_bench.datasets.conversion import ConvertedDataset, stamp
from glua_bench.datasets.mmwhs_layout import MMWHSLayout
from glua_bench.datasets.sifa_release import RANGES, UNDOCUMENTED, read_slice, read_volume, rescaled
from glua_bench.errors import DataError
from glua_bench.files import Damaged
from glua_bench.paths import files_below
from glua_bench.task import Case, Grid, Reading

# Slices per stack; the release says that it has 600 per patient.
STACK = 600

_STEPS = 32767  # steps of a converted image between 0 and 1

# Slices of the complete release.
RELEASED = {
    ("ct", "train"): 8400,
    ("ct", "val"): 1200,
    ("mr", "train"): 9600,
    ("mr", "val"): 2400,
}

# `ct_train_tfs/ct_train_slice0.tfrecords` in the release, `training_ct/image_01.tfrecords` in the
# SIFA repository. Test volumes are released as NIfTI; SIFA's script converts them to npz.
_SLICE = re.compile(r"(ct|mr)_(train|val)_slice(\d+)\.tfrecords?")
_SAMPLE = re.compile(r"(training|validation)_(ct|mr)/image_(\d+)\.tfrecords?")
_ARRAYS = re.compile(r"(?:\w+_)?(ct|mr)_(?:\w+_)?(1\d{3})\.npz")
_VOLUME = re.compile(r"image_(ct|mr)_(1\d{3})\.nii(\.gz)?")

_LAYOUT = (
    "slices such as ct_train_tfs/ct_train_slice0.tfrecords, with ct_val_tfs, mr_train_tfs and "
    "mr_val_tfs beside it, and test volumes such as image_ct_1003.nii.gz with gth_ct_1003.nii.gz "
    "or ct_1003.npz"
)
_OBTAIN = (
    "the README of cchen-cc/SIFA on GitHub links to all of them under Data Preparation; their use "
    "requires accepting the terms of the MM-WHS 2017 challenge"
)


class MMWHSSIFA(ConvertedDataset):
    """MM-WHS 2017 as pre-processed for SIFA: slices in TFRecord files, test volumes apart.

    Cases. A test case is one volume: CT 1003, 1008, 1014, 1019 and MR 1007, 1009, 1018, 1019, as
    in the literature. Training and validation slices do not state their patient, so they are served
    in stacks of 600, in the order of their numbers. A stack is not a volume: its slices come from
    several patients and are not neighbours. Stacks are used for training and validation, and never
    scored in 3-D. All stacks of a split count as one subject.

    Intensities were normalised by the release; its fixed range per modality is mapped to [-1, 1].

    Labels 1 to 4 are the structures. Label 5, which the release does not explain, is background
    in training and scores.

    Orientation. Slices are coronal; axis 0 points to the patient's right and axis 1 to the head.
    Test volumes are stored reversed along both and are flipped. The release states no voxel size.

    Args:
        root: directory with the release's files, at any depth; None uses `default_root()`.
    """

    name = "mmwhs_sifa"
    reference = (
        "MM-WHS 2017 (Zhuang et al., MedIA 2019) as pre-processed by Dou et al. (PnP-AdaNet, "
        "2018) and used by Chen et al. (SIFA, TMI 2020)"
    )
    needs = (
        "the pre-processed files (34 GB) that the SIFA repository links to "
        "(https://github.com/cchen-cc/SIFA), and MM-WHS's terms"
    )
    structures = tuple(
        replace(structure, values=(label,))
        for label, structure in enumerate(MMWHSLayout.structures, start=1)
    )
    directions = ("mr-ct", "ct-mr")
    reading = Reading(
        orientation="stored",
        slice_axis=2,
        row_axis=1,
        flip=(0, 1),
        stated_spacing=(1.0, 1.0, 1.0),
        ignored_values=(UNDOCUMENTED,),
        intensity_range=(-1.0, 1.0),
    )
    grids = {"quick": Grid(64, 4.0), "standard": Grid(128, 2.0), "paper": Grid(256, 1.0)}
    distance_note = (
        "voxels of the release, written as mm, because it states no voxel size; its authors "
        "cropped all volumes around the heart by their labels, test volumes too"
    )
    protocol = "the release cropped all volumes around the heart by their labels"
    publishable = False
    neighbouring_slices = False

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Convert files that are new or have changed; the release's own files are not modified.

        Cases are written atomically, so an interrupted conversion can be resumed.

        Raises:
            DataError: files are missing, damaged or not of the release.
            RunFailure: the cache cannot be written.
        """
        slices, volumes = self._files()
        plan: dict[str, tuple[str, str, list[Path]]] = {}  # case -> domain, split, files
        for (domain, split), files in slices.items():
            if len(files) != RELEASED[domain, split]:
                report(
                    f"{domain}: {len(files)} {split} slices, the release has "
                    f"{RELEASED[domain, split]}"
                )
            for first in range(0, len(files), STACK):
                case = f"{domain}_{split}_{first // STACK:02d}"
                plan[case] = domain, split, files[first : first + STACK]
        for (domain, number), pair in volumes.items():
            plan[f"{domain}_{number}"] = domain, "test", pair
        for domain in self.domains():
            if not any(split == "test" for own, split, _ in plan.values() if own == domain):
                report(f"{domain}: no test volumes, so it can only be the source")
        for done, (case, (domain, split, files)) in enumerate(sorted(plan.items()), start=1):
            if self._convert(case, domain, split, files):
                report(f"{self.name}: {done}/{len(plan)} {case}")
        index = {case: [domain, split] for case, (domain, split, _) in sorted(plan.items())}
        self.write_index(index)

    def caveat(self, direction: str) -> str:
        """Return what training and test records of the target share; see docs/mmwhs_sifa.md.

        Identical slices are counted, deformed ones cannot be. In MR, the release's own counts of
        patients leave no patient for the test alone (SIFA's issues 16 and 55).
        """
        target = direction.partition("-")[2]
        seen: set[str] = set()
        tested: list[str] = []
        for case in self.cases(target):
            try:
                own = self.read_record(case.id)["slices"]
            except (OSError, Damaged, KeyError) as error:
                raise self._unconverted() from error
            if case.split == "test":
                tested += own
            else:
                seen.update(own)
        shared = sum(digest in seen for digest in tested if digest)
        modality = target.upper()
        if shared:
            return (
                f"{shared} of {len(tested)} {modality} test slices are identical to {modality} "
                "training or validation records of the release, so the test patients' images are "
                "not unseen"
            )
        if tested and target == "mr":
            return (
                "the MR test patients are reported to be among the release's MR training and "
                "validation records (cchen-cc/SIFA, issue 16), so their images are not unseen; "
                "these files have no identical slices, and deformed copies cannot be identified"
            )
        return ""

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of "ct" or "mr" from the last `prepare`.

        Raises:
            DataError: the domain is unknown, files are missing, or nothing is prepared.
        """
        if domain not in RANGES:
            raise DataError(f"Dataset '{self.name}' has no domain '{domain}': use ct or mr.")
        try:
            index = self.index()
        except (OSError, Damaged) as error:
            self._files()  # a missing file is the clearer problem
            raise self._unconverted() from error
        found = [(case, split) for case, (own, split) in index.items() if own == domain]
        return tuple(
            Case(
                case,
                domain,
                *self._paths(case),
                split,
                subject=f"{self.name}_{case if split == 'test' else f'{domain}_{split}'}",
            )
            for case, split in sorted(found)
        )

    def _paths(self, case: str) -> tuple[Path, Path]:
        """Return image and label of a case."""
        return self.converted / f"{case}.nii", self.converted / f"{case}_label.nii.gz"

    def _files(self) -> tuple[dict[tuple[str, str], list[Path]], dict[tuple[str, int], list[Path]]]:
        """Return the release's files: slices in the order of their numbers, and test volumes.

        Raises:
            DataError: files are missing; the message says which and where to obtain them.
        """
        slices: dict[tuple[str, str], dict[int, Path]] = {key: {} for key in RELEASED}
        volumes: dict[tuple[str, int], list[Path]] = {}
        for path in files_below(self.root):
            if match := _SLICE.fullmatch(path.name):
                key, number = (match[1], match[2]), int(match[3])
            elif match := _SAMPLE.fullmatch(f"{path.parent.name}/{path.name}"):
                key = match[2], {"training": "train", "validation": "val"}[match[1]]
                number = int(match[3])
            elif match := _ARRAYS.fullmatch(path.name) or _VOLUME.fullmatch(path.name):
                if int(match[2]) in MMWHSLayout.test_ids[match[1]]:
                    pair = [path]
                    if match.re is _VOLUME:
                        pair.append(path.with_name(path.name.replace("image_", "gth_", 1)))
                    twin = volumes.setdefault((match[1], int(match[2])), pair)[0]
                    if twin != path:
                        raise DataError(f"{path} and {twin} are the same case: remove one of them.")
                continue
            else:
                continue
            twin = slices[key].setdefault(number, path)
            if twin != path:
                raise DataError(f"{path} and {twin} are the same slice: remove one of them.")
        lacks = [f"{domain} {split} slices" for (domain, split), f in slices.items() if not f]
        for domain, ids in MMWHSLayout.test_ids.items():
            absent = [str(number) for number in ids if (domain, number) not in volumes]
            # Without any, the domain may still be a source: the release's MR test volumes are a
            # separate download.
            if absent and (len(absent) < len(ids) or not volumes):
                lacks.append(f"{domain} test volumes {', '.join(absent)}")
        absent = [str(file.name) for pair in volumes.values() for file in pair if not file.exists()]
        lacks += absent[:3]
        if not volumes and not any(slices.values()):
            lacks = ["every file of the pre-processed MM-WHS release"]
        if lacks:
            raise DataError(
                f"{self.root} lacks {'; '.join(lacks)}: set GLUA_BENCH_DATA or --data-root to a "
                f"directory with {_LAYOUT} ({_OBTAIN})."
            )
        return {key: [files[n] for n in sorted(files)] for key, files in slices.items()}, volumes

    def _unconverted(self) -> DataError:
        return DataError(
            f"The files below {self.root} are not converted: run "
            f"`glua-bench data prepare {self.name}` first."
        )

    def _convert(self, case: str, domain: str, split: str, files: Sequence[Path]) -> bool:
        """Write image and label of a case if needed; return whether they were written."""
        image, label = self._paths(case)
        stamps = [stamp(file) for file in files]
        if self.up_to_date(case, stamps, image, label):
            return False
        if split == "test":
            voxels, classes, affine = read_volume(files)
            voxels = _quantised(voxels, domain)
        else:
            voxels, classes, affine = *_stack(domain, files), np.eye(4)
        _write_nifti(label, classes, affine)
        _write_nifti(image, voxels, affine, scale=1 / _STEPS)
        self.write_record(case, {"of": stamps, "slices": _digests(voxels)})
        return True


# -- writing to the cache -------------------------------------------------------------------------


def _stack(domain: str, files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Stack slices into an image, int16 (X, Y, slices), and labels of the same shape."""
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        image, label = read_slice(file)
        if images and images[0].T.shape != image.shape:
            raise DataError(
                f"{file} has {image.shape} pixels and {files[0]} has {images[0].T.shape}: give the "
                "release's files."
            )
        # The first axis of a NIfTI file varies fastest, so this order is written without a copy.
        images.append(_quantised(image, domain).T)
        labels.append(label.T)
    return np.stack(images).T, np.stack(labels).T


def _quantised(voxels: np.ndarray, domain: str) -> np.ndarray:
    """Convert the release's intensities to int16, finer than the cache's half precision."""
    return np.rint(rescaled(voxels, domain) * _STEPS).astype(np.int16)


def _digests(voxels: np.ndarray) -> list[str]:
    """Return a digest of each slice of (X, Y, slices); "" for constant slices, which coincide."""
    slices = (np.ascontiguousarray(voxels[..., place]) for place in range(voxels.shape[-1]))
    return [
        hashlib.sha256(one.tobytes()).hexdigest()[:16] if one.min() != one.max() else ""
        for one in slices
    ]


def _write_nifti(path: Path, data: np.ndarray, affine: np.ndarray, scale: float = 1) -> None:
    """Write integers of at most 16 bits with the slope `scale`."""
    volume = nib.Nifti1Image(data, affine)
    volume.header.set_slope_inter(scale, 0)
    with generating(path) as unfinished:
        nib.save(volume, unfinished)
