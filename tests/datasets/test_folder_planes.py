"""folder/planes.py: the plane of the slices, and headers that contradict each other."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from own_volumes import own_volume, save_domain, save_volume

from glua_bench.datasets.folder.guess import Look, look
from glua_bench.datasets.folder.planes import (
    arrays_agree,
    body,
    contradiction,
    guess_plane,
    spreads,
    stored_axes,
    usual,
)


def looked(folder: Path) -> Look:
    labels = {path.name.split("_")[0]: path for path in folder.glob("*_gt.nii.gz")}
    images = {case: folder / f"{case}.nii.gz" for case in labels}
    return look(images, labels)


def plane_of(*looks: Look) -> tuple[str, str]:
    return guess_plane(
        {f"d{n}": body(own.headers, own.anatomies, False) for n, own in enumerate(looks)}
    )


@pytest.mark.parametrize(
    ("spacing", "codes", "plane", "reason"),
    [
        ((5, 5, 8), "RAS", "axial", "slices of 8 mm are axial"),
        ((5, 9, 5), "RSA", "coronal", "slices of 9 mm are coronal"),
        ((9, 5, 5), "ASL", "sagittal", "slices of 9 mm are sagittal"),
        ((5, 5, 5), "RAS", "axial", "isotropic, arrays are stored as axial slices, labels in"),
        # Spacing tells nothing: a scan in coronal slices, stored slice by slice.
        ((5, 5, 5), "RSA", "coronal", "isotropic, arrays are stored as coronal slices"),
        ((5, 5, 5), "ASR", "sagittal", "isotropic, arrays are stored as sagittal slices"),
    ],
)
def test_the_plane_follows_spacing_and_else_the_order_of_storage(
    tmp_path: Path, spacing: tuple[float, float, float], codes: str, plane: str, reason: str
) -> None:
    save_domain(tmp_path, 2, spacing=spacing, codes=codes)
    found, why = plane_of(looked(tmp_path))
    assert found == plane and reason in why and why.startswith("d0: ")


def test_labels_on_some_slices_tell_the_plane_of_isotropic_voxels(tmp_path: Path) -> None:
    """Every third coronal slice was annotated, although arrays are stored as axial slices."""
    for number in (1, 2):
        image, label = own_volume(number, (5, 5, 5))
        values = np.asarray(label.dataobj).copy()
        values[:, np.arange(values.shape[1]) % 3 > 0] = 0
        drawn = nib.Nifti1Image(values, label.affine)
        save_volume((image, drawn), tmp_path / f"{number}.nii.gz", tmp_path / f"{number}_gt.nii.gz")
    found, why = plane_of(looked(tmp_path))
    assert found == "coronal" and "labels are drawn on some coronal slices" in why


def test_structures_in_few_slices_tell_the_plane_of_isotropic_voxels(tmp_path: Path) -> None:
    for number in (1, 2):
        image, label = own_volume(number, (5, 5, 5))
        values = np.asarray(label.dataobj).copy()
        values[:, :16], values[:, 19:] = 0, 0
        drawn = nib.Nifti1Image(values, label.affine)
        save_volume((image, drawn), tmp_path / f"{number}.nii.gz", tmp_path / f"{number}_gt.nii.gz")
    found, why = plane_of(looked(tmp_path))
    assert found == "coronal" and "3 coronal" in why


def test_thick_slices_of_one_domain_outweigh_isotropic_ones(tmp_path: Path) -> None:
    save_domain(tmp_path / "a", 2, spacing=(5, 5, 5), codes="RSA")
    save_domain(tmp_path / "b", 2, spacing=(5, 5, 9))
    found, why = plane_of(looked(tmp_path / "a"), looked(tmp_path / "b"))
    assert found == "axial" and "d0: voxels" in why and "d1: slices of 9 mm are axial" in why


def test_a_header_with_its_largest_side_along_most_voxels_is_doubted(tmp_path: Path) -> None:
    """The slice distance was written to the wrong axis."""
    for number in (1, 2):
        image, label = own_volume(number, (3, 3, 12))
        wrong = np.diag([12.0, 3.0, 3.0, 1.0])
        volume = [nib.Nifti1Image(np.asarray(v.dataobj), wrong) for v in (image, label)]
        save_volume(
            (volume[0], volume[1]), tmp_path / f"{number}.nii.gz", tmp_path / f"{number}_gt.nii.gz"
        )
    # 53 × 47 × 10 voxels: not twice as many as along the next axis, so only a longer volume tells.
    own = looked(tmp_path)
    assert plane_of(own)[0] == "sagittal"
    long = body(own.headers, own.anatomies, False)
    object.__setattr__(long, "voxels", np.array([200.0, 47.0, 10.0]))
    found, why = guess_plane({"ct": long})
    assert found == "axial" and "of which there are most (200): check the header" in why


def test_headers_that_disagree_are_told_from_arrays_that_do(tmp_path: Path) -> None:
    """Either the arrays are alike and the headers are wrong, or the headers explain the arrays."""
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    for number, codes in enumerate(("RAS", "LPS", "PSR", "RAS", "LPS"), start=1):
        stored = own_volume(number)
        turned = own_volume(number, codes=codes)
        names = f"{number}.nii.gz", f"{number}_gt.nii.gz"
        save_volume(turned, right / names[0], right / names[1])
        lying = [nib.Nifti1Image(np.asarray(v.dataobj), turned[0].affine) for v in stored]
        save_volume((lying[0], lying[1]), wrong / names[0], wrong / names[1])
    for folder, stored_alike in ((wrong, True), (right, False)):
        own = looked(folder)
        why = contradiction(own.headers)
        assert why.startswith("the headers give different orientations: ")
        assert "RAS (2 files)" in why and "PSR (3.nii.gz)" in why
        found = spreads(own.headers, own.anatomies)
        assert found is not None and arrays_agree(found) == stored_alike
    common = usual(looked(wrong).headers)
    assert common is not None and common.codes in ("RAS", "LPS")
    assert stored_axes(common, "axial") == (2, 1, [0, 1] if common.codes == "RAS" else [])


def test_headers_that_agree_contradict_nothing(tmp_path: Path) -> None:
    save_domain(tmp_path, 3, codes="LPS")
    own = looked(tmp_path)
    assert contradiction(own.headers) == "" and spreads(own.headers, own.anatomies) is None


def test_a_header_that_doubts_itself_is_told(tmp_path: Path) -> None:
    save_domain(tmp_path, 2)
    file = nib.load(tmp_path / "1.nii.gz")
    file.header["pixdim"][1:4] = 2.5  # the affine says 5
    affine = file.affine.copy()
    affine[0, 0] = 6
    file.header.set_sform(affine, 1)
    image = nib.Nifti1Image(np.asarray(file.dataobj), None, file.header)
    image.header["qform_code"] = 0
    nib.save(image, tmp_path / "1.nii.gz")
    why = contradiction(looked(tmp_path).headers)
    assert "1.nii.gz has voxels of" in why and "according to its affine, which is used" in why
