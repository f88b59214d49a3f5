"""One subject of the phantom: drawn, imaged, and encoded as the bytes of its two files."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np

from glua_bench.datasets.phantom import anatomy, physics

DOMAINS = ("ct", "mr")
_STREAMS = 1  # begins the seeds of all random numbers


def files_of_subject(
    seed: int, domain: str, number: int, voxel_scale: float
) -> tuple[bytes, bytes]:
    """Generate one subject.

    Args:
        seed: seed of the cohort.
        domain: "ct" or "mr".
        number: id, e.g. 1001.
        voxel_scale: factor on the voxel size.

    Returns:
        Image and label, int16 as .nii.gz. Equal arguments give equal bytes.
    """
    # Separate streams for subject and scan, so a finer scan shows the same subject.
    key = [_STREAMS, seed, DOMAINS.index(domain), number]
    subject = anatomy.draw_subject(np.random.default_rng([*key, 0]))
    volume = physics.ACQUIRE[domain](subject, np.random.default_rng([*key, 1]), voxel_scale)
    return _nifti(volume.image, volume.affine), _nifti(volume.label, volume.affine)


def _nifti(data: np.ndarray, affine: np.ndarray) -> bytes:
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    # Without time and name, which gzip would store otherwise.
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
