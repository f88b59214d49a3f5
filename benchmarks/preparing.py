"""Preparing CT volumes against nibabel with SciPy, and against MONAI.

Each side reads an int16 image and its label, both .nii.gz, brings them to RAS, 0.9 mm pixels, 2 mm
slices and 256 × 256 pixels, scales the image between its percentiles 0.5 and 99.5 to [-1, 1], and
writes the result. Ours also computes the digests of the files. The volume is synthetic: a body with
lungs and four structures, noise of 20 HU within the scanner's circle and a constant outside, which
gzip brings to about half, as it does real CT.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from benchmarks import small
from benchmarks.rows import Row, Settings, alternate, ratio_row

GRID_MM, SIZE = (0.9, 0.9, 2.0), 256
VALUES = (205, 420, 500, 820)
Work = Callable[[Path, Path, Path], None]  # image, label, directory for the result


def make_volume(folder: Path, shape: tuple[int, int, int], number: int = 0) -> tuple[Path, Path]:
    """Write an image and its label, as a scanner stores them: x to the left, y to the back."""
    rng = np.random.default_rng(number)
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True
    )

    def ball(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1

    image = rng.standard_normal(shape, np.float32)
    image *= 20
    image -= 1000
    label = np.zeros(shape, np.int16)
    image[np.broadcast_to((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, shape)] += 1040
    for side in (-0.4, 0.4):
        image[ball(side, 0, 0, 0.25, 0.4, 0.9)] -= 890
    for value, contrast, where in (
        (205, 70, (0.0, 0.1, 0.0, 0.3, 0.3, 0.6)),
        (500, 260, (0.0, 0.1, 0.0, 0.2, 0.2, 0.4)),
        (820, 280, (0.1, 0.4, 0.2, 0.1, 0.1, 0.7)),
        (420, 240, (-0.2, -0.2, 0.2, 0.12, 0.15, 0.3)),
    ):
        inside = ball(*where)
        image[inside] += contrast
        label[inside] = value
    image[np.broadcast_to(x**2 + y**2 > 1, shape)] = -1024
    mm = 225 / shape[0], 225 / shape[1], 160 / shape[2]
    affine = np.diag([-mm[0], -mm[1], mm[2], 1.0])
    files = folder / f"{number}_image.nii.gz", folder / f"{number}_label.nii.gz"
    for file, data in zip(files, (image.astype(np.int16), label), strict=True):
        nib.save(nib.Nifti1Image(data, affine), file)
    return files


def ours(image: Path, label: Path, out: Path) -> None:
    """Fill a new cache, as `glua-bench data prepare` does."""
    from glua_bench.data.cache import SliceCache
    from glua_bench.task import Case, DomainView, Grid, Reading, Structure

    structures = tuple(Structure(str(value), "", (value,), "") for value in VALUES)
    view = DomainView("ct", Reading(), structures).on(Grid(SIZE, GRID_MM[0], GRID_MM[2]))
    case = Case(image.name, "ct", image, label, "train", image.name)
    with small.cache(out):  # digests of the files are kept there
        cache = SliceCache(out / "slices")
        cache.image(case.unlabelled(), view)
        cache.label(case, view)


def by_scipy(order: int) -> Work:
    """What scripts of the literature do."""

    def window(data: np.ndarray) -> np.ndarray:
        """Return the 256 × 256 pixels around the middle."""
        for axis in (0, 1):
            left = max(0, (data.shape[axis] - SIZE) // 2)
            data = data.take(range(left, min(left + SIZE, data.shape[axis])), axis)
            missing = SIZE - data.shape[axis]
            pad = [(0, 0)] * 3
            pad[axis] = (missing // 2, missing - missing // 2)
            data = np.pad(data, pad, constant_values=data.min())
        return data

    def work(image: Path, label: Path, out: Path) -> None:
        volumes = [nib.as_closest_canonical(nib.load(file)) for file in (image, label)]
        factors = np.array(volumes[0].header.get_zooms()) / GRID_MM
        data = ndimage.zoom(volumes[0].get_fdata(), factors, order=order)
        low, high = np.percentile(data, (0.5, 99.5))
        data = (np.clip(data, low, high) - low) / (high - low) * 2 - 1
        classes = ndimage.zoom(volumes[1].get_fdata(), factors, order=0)
        np.savez(
            out / "volume.npz",
            image=window(data).astype(np.float32),
            label=window(classes).astype(np.int16),
        )

    return work


def by_monai() -> Work:
    """MONAI's transforms, as its tutorials combine them."""
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        Orientationd,
        ResizeWithPadOrCropd,
        ScaleIntensityRangePercentilesd,
        Spacingd,
    )

    both = ["image", "label"]
    transform = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, axcodes="RAS", labels=None),
            Spacingd(both, pixdim=GRID_MM, mode=("bilinear", "nearest")),
            ScaleIntensityRangePercentilesd("image", 0.5, 99.5, -1, 1, clip=True),
            ResizeWithPadOrCropd(both, (SIZE, SIZE, -1)),
        ]
    )

    def work(image: Path, label: Path, out: Path) -> None:
        found = transform({"image": image, "label": label})
        np.savez(
            out / "volume.npz",
            image=found["image"].numpy(),
            label=found["label"].numpy().astype(np.int16),
        )

    return work


def measure_preparation(settings: Settings) -> Iterator[Row]:
    """Yield a row per library."""
    folder = settings.scratch / "volumes"
    folder.mkdir(exist_ok=True)
    image, label = make_volume(folder, (48, 48, 24) if settings.quick else (256, 256, 128))
    others: dict[str, tuple[str, Callable[[], Work]]] = {
        "linear": ("nibabel and SciPy's zoom, linear", lambda: by_scipy(1)),
        "cubic": ("nibabel and SciPy's zoom, cubic", lambda: by_scipy(3)),
        "monai": ("MONAI's transforms, linear", by_monai),
    }
    numbers = itertools.count()

    def once(work: Work) -> None:
        out = folder / f"out{next(numbers)}"
        out.mkdir()
        work(image, label, out)
        shutil.rmtree(out)

    for name, (what, make) in others.items():
        settings.report(f"preparation against {what}")
        compared = f"preparing a volume and its label ÷ {what}"
        try:
            work = make()
        except ImportError:
            yield Row(f"prepare.{name}", compared, note="needs monai: pip install monai")
            continue
        sides = {"ours": lambda: once(ours), "theirs": lambda work=work: once(work)}
        found = alternate(sides, min(3, settings.rounds), 0.05, settings.clock)
        yield ratio_row(f"prepare.{name}", compared, found["ours"], found["theirs"])
