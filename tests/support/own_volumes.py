"""Small volumes of a user's own: a body with two structures, in any orientation and layout."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

Volume = tuple[nib.Nifti1Image, nib.Nifti1Image]


def own_volume(
    seed: int,
    spacing: tuple[float, float, float] = (5, 5, 8),
    codes: str = "RAS",
    ct: bool = False,
    bright: int = 60,
    values: tuple[int, int] = (1, 2),
) -> Volume:
    """Return image and label of a body of 160 × 140 × 120 mm.

    Args:
        seed: of noise and positions.
        spacing: mm along right, front and up.
        codes: orientation of the arrays.
        ct: Hounsfield units.
        bright: HU of the second structure.
        values: label values.
    """
    rng = np.random.default_rng(seed)
    shape = [round(side / step) for side, step in zip((160, 140, 120), spacing, strict=True)]
    x, y, z = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")
    a, b, c = rng.uniform(-0.02, 0.02, 3)
    body = ((x - 0.5) / 0.45) ** 2 + ((y - 0.5) / 0.4) ** 2 < 1
    first = ((x - 0.3 - a) / 0.15) ** 2 + ((y - 0.6 - b) / 0.15) ** 2 + ((z - 0.65 - c) / 0.25) ** 2
    second = ((x - 0.65) / 0.12) ** 2 + ((y - 0.4) / 0.12) ** 2 + ((z - 0.4) / 0.2) ** 2
    image = np.where(body, 30.0 if ct else 200.0, -1000.0 if ct else 5.0)
    image[(abs(x - 0.5) < 0.06) & (y < 0.25) & body] = 900 if ct else 60
    image[first < 1], image[second < 1] = (60, bright) if ct else (300, 120)
    label = np.where(first < 1, values[0], np.where(second < 1, values[1], 0))
    image = image + rng.normal(0, 8, image.shape)
    affine = np.diag([*spacing, 1.0])
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    first_file, second_file = (
        nib.Nifti1Image(data.astype(np.int16), affine).as_reoriented(turn)
        for data in (image, label)
    )
    return first_file, second_file


def save_volume(volume: Volume, image: Path, label: Path | None = None) -> None:
    """Write image and label."""
    for data, path in zip(volume, (image, label), strict=True):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(data, path)


def save_domain(folder: Path, count: int = 4, first: int = 0, **looks: object) -> None:
    """Write `1.nii.gz` with `1_gt.nii.gz` and so on."""
    for number in range(1, count + 1):
        volume = own_volume(first + number, **looks)  # type: ignore[arg-type]
        save_volume(volume, folder / f"{number}.nii.gz", folder / f"{number}_gt.nii.gz")
