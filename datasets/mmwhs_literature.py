"""MM-WHS 2017 cropped around the labels in every split of both domains, as in the literature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import nibabel as nib
import numpy as np

from glua_bench.data.cache import cache_root, generating, intact
from glua_bench.data.formats import load_nifti, open_volume
from glua_bench.data.volumes import read_label_volume
from glua_bench.datasets.mmwhs import MMWHS
from glua_bench.errors import DataError, reason
from glua_bench.identity import code_digest
from glua_bench.task import Case, Grid, Reading

# The module whose code, with all that it imports, is part of the directories of crops.
CROPPING = ("glua_bench.datasets.mmwhs_literature",)
SIDE = 256.0  # side of the cropped cube in mm


class MMWHSLiterature(MMWHS):
    """`mmwhs` cropped around its labels, including the target's, as papers on this task do.

    Use it to measure the effect of the crop and for a task closer to the published one. Every run
    is marked: by the dataset's name in each row, and by `protocol` in `environment.json`,
    `summary.json`, the report's settings and on the terminal.

    Crop. A cube of 256 mm around the mean position of the task's structures in the label file,
    within the volume. Labels decide only its position: no voxel is resampled or changed, and scores
    are computed in the cube, on the file's own voxels.

    Intensity. The lowest value and the 98th percentile are mapped to -1 and 1, because the
    literature cuts the top 2 %.

    The cropped copies lie in the cache. They are patient data: the owners' terms apply to them.
    """

    name: ClassVar[str] = "mmwhs_literature"
    reference: ClassVar[str] = "as mmwhs"
    needs: ClassVar[str] = "the files of mmwhs, and about half their size in the cache"
    protocol: ClassVar[str] = (
        "literature: volumes are cropped around their labels, those of the target included"
    )
    folds: ClassVar[int] = 1
    reading: ClassVar[Reading] = replace(MMWHS.reading, percentiles=(0.0, 98.0))
    grids: ClassVar[Mapping[str, Grid]] = {
        "quick": Grid(64, 4.0, 4.0),
        "standard": Grid(128, 2.0, 3.0),
        "paper": Grid(256, 1.0, 1.0),
    }

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Crop volumes that are not cropped yet into the cache.

        Raises:
            DataError: files are missing or cannot be used.
            RunFailure: the cache cannot be written.
        """
        super().prepare(report)
        for domain in self.domains():
            for case in super().cases(domain):
                cropped = _cropped(case)
                if not intact(cropped.image, cropped.truth):
                    self._crop(case, cropped)
                    report(f"{case.id}: cropped around its labels into {cropped.image.parent}")

    def cases(self, domain: str) -> tuple[Case, ...]:
        """Return all cases of "ct" or "mr", with the files of the cropped copies.

        Raises:
            DataError: the domain is unknown, or original files are missing.
        """
        return tuple(_cropped(case) for case in super().cases(domain))

    def _crop(self, case: Case, cropped: Case) -> None:
        """Write the cropped copies of a case, the image last: an image implies its label."""
        labels = read_label_volume(case.truth, case.image, self.view(case.domain))
        if not labels.any():
            raise DataError(f"{case.truth} holds none of the dataset's structures: replace it.")
        half = SIDE / 2 / nib.affines.voxel_sizes(open_volume(case.image).affine)
        middle = np.argwhere(labels).mean(0)
        low = np.maximum(0, np.rint(middle - half)).astype(int)
        high = np.minimum(labels.shape, np.rint(middle + half)).astype(int)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        for source, target in ((case.truth, cropped.truth), (case.image, cropped.image)):
            try:
                crop = load_nifti(source).slicer[box]
            except (OSError, EOFError) as error:
                raise DataError(
                    f"{source} cannot be read ({reason(error)}): replace it."
                ) from error
            with generating(target) as unfinished:
                nib.save(crop, unfinished)


def _cropped(case: Case) -> Case:
    """Return the case with the paths of its cropped copies, unique to the original files."""
    parts = [code_digest(CROPPING)]
    for file in (case.image, case.truth):
        status = file.resolve().stat()
        parts += [str(file.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = cache_root() / MMWHSLiterature.name / key
    return replace(case, image=folder / case.image.name, label=folder / case.truth.name)
