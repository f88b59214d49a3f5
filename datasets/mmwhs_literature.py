"""MM-WHS 2017 as the literature crops it: around the labels, in every split of both domains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import nibabel as nib
import numpy as np

from glua_bench.cache import cache_root
from glua_bench.datasets.mmwhs import MMWHS
from glua_bench.datasets.placed import placed
from glua_bench.errors import DataError
from glua_bench.formats import load_nifti, open_volume
from glua_bench.task import Case, Grid, Reading
from glua_bench.volumes import read_label_volume

# Raise with every change that alters a crop.
CROP_VERSION = 1
SIDE = 256.0  # of the cropped cube, mm


class MMWHSLiterature(MMWHS):
    """`mmwhs` with the region found by labels, target included, as papers on this task do it.

    For looking at what the crop is worth, and at a task that is closer to the published one. Every
    run of it is stamped: by the dataset's name in each row, and by `protocol` in
    `environment.json`, `summary.json`, the report's settings and on the terminal.

    Crop. A cube of 256 mm around the mean position of the task's structures in the label file, as
    far as the volume reaches. Labels decide where it lies and nothing else: no voxel is resampled
    or changed, and scores are taken in the cube, on the file's own voxels.

    Intensity. The lowest value and the 98th percentile become -1 and 1, after the literature's cut
    of the top 2 %.

    The cropped copies lie in the cache. They are patients, too: the owners' terms hold for them.
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
        """Crop the volumes that are not yet cropped, into the cache.

        Args:
            report: receives one line at a time about progress.

        Raises:
            DataError: files are missing or cannot be used, or the cache cannot be written.
        """
        super().prepare(report)
        for domain in self.domains():
            for case in super().cases(domain):
                cropped = _cropped(case)
                if not (cropped.image.is_file() and cropped.truth.is_file()):
                    self._crop(case, cropped)
                    report(f"{case.id}: cropped around its labels into {cropped.image.parent}")

    def cases(self, domain: str) -> tuple[Case, ...]:
        """All cases of a domain, with the files of the cropped copies.

        Args:
            domain: "ct" or "mr".

        Raises:
            DataError: the domain is unknown, or original files are missing.
        """
        return tuple(_cropped(case) for case in super().cases(domain))

    def _crop(self, case: Case, cropped: Case) -> None:
        """Write the cropped copies of a case, the image last: where it is, the label is."""
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
                with placed(target) as unfinished:
                    volume = load_nifti(source)
                    nib.save(volume.slicer[box], unfinished)
            except (OSError, EOFError) as error:
                raise DataError(
                    f"The crop of {source} cannot be written to {target.parent} "
                    f"({getattr(error, 'strerror', None) or error}): check the file, and the "
                    "space of the cache (GLUA_BENCH_CACHE)."
                ) from error


def _cropped(case: Case) -> Case:
    """The case with the places of its cropped copies, which another original never shares."""
    parts = [str(CROP_VERSION)]
    for file in (case.image, case.truth):
        status = file.resolve().stat()
        parts += [str(file.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = cache_root() / MMWHSLiterature.name / key
    return replace(case, image=folder / case.image.name, label=folder / case.truth.name)
