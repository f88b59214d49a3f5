"""glua_bench/inspection/nnunet.py: the layout that nnU-Net v2 reads, and the way back."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from faults import full_disk

from glua_bench.console import Progress
from glua_bench.data.nnunet import nnunet_unannotated
from glua_bench.data.volumes import load_image, read_label_volume, save_labels
from glua_bench.datasets.folder.dataset import Folder
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.errors import ConfigError, DataError, RunFailure
from glua_bench.files import UNFINISHED
from glua_bench.inspection.fingerprint import differences, fingerprint
from glua_bench.inspection.measurements import gather
from glua_bench.inspection.nnunet import RECORD, export, export_predictions, folder_of, name_of
from glua_bench.reports.run_figures import read_prediction
from glua_bench.task import Case, Dataset

SILENT = Progress(enabled=False)


def exported(data: Dataset, to: Path, number: int = 501, link: bool = False) -> dict[str, Path]:
    """Domain → its folder."""
    made = export(data, to, number, link, 1, SILENT)
    return dict(zip(data.domains(), [one.folder for one in made], strict=True))


@pytest.fixture
def copy(phantom_root: Path, tmp_path: Path) -> Path:
    """A phantom to be changed."""
    return Path(shutil.copytree(phantom_root, tmp_path / "data"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_layout_is_that_of_nnunet(phantom_root: Path, tmp_path: Path) -> None:
    """Names and keys as documented by nnU-Net and asked for by its verify_dataset_integrity."""
    data = Phantom(phantom_root)
    made = export(data, tmp_path, 501, False, 1, SILENT)
    assert [one.folder.name for one in made] == ["Dataset501_phantom_mr", "Dataset502_phantom_ct"]
    assert [(one.cases, one.left_out) for one in made] == [(3, 0)] * 2
    folder = made[1].folder
    assert folder.parent == tmp_path / "nnUNet_raw"
    training, test = ("1001", "1004"), "1003"
    assert files(folder) == {
        *("dataset.json", "splits_final.json", RECORD),
        *(f"imagesTr/{name}_0000.nii.gz" for name in training),
        *(f"labelsTr/{name}.nii.gz" for name in training),
        f"imagesTs/{test}_0000.nii.gz",
        f"labelsTs/{test}.nii.gz",
    }
    description = json.loads((folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "CT"} and description["file_ending"] == ".nii.gz"
    assert description["labels"] == {"background": 0, "MYO": 1, "LAC": 2, "LVC": 3, "AA": 4}
    assert description["numTraining"] == 2
    splits = [{"train": ["1001"], "val": ["1004"]}]
    for place in (folder, tmp_path / "nnUNet_preprocessed" / folder.name):
        assert json.loads((place / "splits_final.json").read_text()) == splits
    assert json.loads((made[0].folder / "dataset.json").read_text())["channel_names"] == {"0": "mr"}
    size = sum(p.stat().st_size for p in folder.rglob("*.nii.gz")) / 2**20
    assert made[1].mebibytes == pytest.approx(size)


def test_images_are_the_owner_s_and_labels_are_classes(phantom_root: Path, tmp_path: Path) -> None:
    data = Phantom(phantom_root)
    folders = exported(data, tmp_path)
    for domain, folder in folders.items():
        for case in data.cases(domain):
            part, name = "Ts" if case.split == "test" else "Tr", name_of(case)
            image = folder / f"images{part}" / f"{name}_0000.nii.gz"
            assert image.read_bytes() == case.image.read_bytes()
            label = nib.load(folder / f"labels{part}" / f"{name}.nii.gz")
            expected = read_label_volume(case.truth, case.image, data.view(case.domain))
            np.testing.assert_array_equal(np.asarray(label.dataobj), expected)
            assert label.get_data_dtype() == np.uint8
            pair = [sitk.ReadImage(str(file)) for file in (image, label.get_filename())]
            for read in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
                first, second = (getattr(volume, read)() for volume in pair)
                np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_what_nobody_annotated_is_nnunet_s_ignore(phantom_root: Path, tmp_path: Path) -> None:
    class Open(Phantom):
        """A value that was background is unannotated."""

        reading = replace(Phantom.reading, ignored_values=(550, 850), unannotated_values=(600,))

    data = Open(phantom_root)
    count = len(data.structures)
    for domain, folder in exported(data, tmp_path).items():
        description = json.loads((folder / "dataset.json").read_text())
        assert description["labels"]["ignore"] == max(description["labels"].values()) == count + 1
        assert nnunet_unannotated(folder) == (count + 1,)
        case = data.split(domain, "test")[0]
        written = np.asarray(nib.load(folder / "labelsTs" / f"{name_of(case)}.nii.gz").dataobj)
        raw = np.asarray(nib.load(case.truth).dataobj)
        assert np.array_equal(written == count + 1, raw == 600) and (raw == 600).any()


def test_the_background_of_a_prediction_is_annotated(phantom_root: Path, tmp_path: Path) -> None:
    """Also where 0 means in labels that nobody annotated a voxel."""

    class Sparse(Phantom):
        reading = replace(Phantom.reading, unannotated_values=(0,))

    data = Sparse(phantom_root)
    (case,) = data.split("ct", "test")
    run: Any = SimpleNamespace(predictions=tmp_path / "run")
    run.predictions.mkdir(parents=True)
    placement = load_image(case.image, data.reading, data.grids["quick"]).placement
    classes = np.zeros(placement.file_shape, np.uint8)
    classes[2:6, 2:6, 2:6] = 1
    values = [structure.values[0] for structure in data.structures]
    save_labels(run.predictions / f"{case.id}.nii.gz", classes, placement, values)
    place = tmp_path / "predictions"
    assert export_predictions(data, "ct", run.predictions, place, 1, SILENT) == 1
    np.testing.assert_array_equal(nib.load(place / "1003.nii.gz").dataobj, classes)
    assert set(np.unique(read_prediction(run, case, data, placement))) <= {0, 1}


def test_links_instead_of_copies(phantom_root: Path, tmp_path: Path) -> None:
    folder = exported(Phantom(phantom_root), tmp_path, link=True)["ct"]
    images = sorted(folder.glob("images*/*.nii.gz"))
    assert len(images) == 3 and all(image.is_symlink() for image in images)
    assert images[0].resolve() == Phantom.image_path(phantom_root.resolve(), "ct", 1001)
    assert not any(label.is_symlink() for label in folder.glob("labels*/*.nii.gz"))


def test_the_way_back_gives_the_same_cases(phantom_root: Path, tmp_path: Path) -> None:
    """Read by the dataset for described folders: ids, splits, voxels, classes, geometry."""
    data = Phantom(phantom_root)
    exported(data, tmp_path)
    description = tmp_path / "back.yaml"
    description.write_text(
        "name: back\n"
        "classes: {MYO: {values: 1}, LAC: {values: 2}, LVC: {values: 3}, AA: {values: 4}}\n"
        "plane: coronal\n"
        "field_of_view: 224\n"
        "domains:\n"
        "  mr: {nnunet: nnUNet_raw/Dataset501_phantom_mr, fold: 0}\n"
        "  ct: {nnunet: nnUNet_raw/Dataset502_phantom_ct, fold: 0}\n"
    )
    back = Folder.described(description)(None)
    for domain in data.domains():
        theirs = [(case.id, case.split) for case in back.cases(domain)]
        assert theirs == [(case.id, case.split) for case in data.cases(domain)]
    sums = [fingerprint(d, gather(d, 1, SILENT)) for d in (data, back)]
    assert differences(*sums) == []


# -- images that nnU-Net would read otherwise ------------------------------------------------------


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_a_stated_spacing_is_written_into_the_headers(phantom_root: Path, tmp_path: Path) -> None:
    class Stated(Phantom):
        reading = replace(Phantom.reading, stated_spacing=(2.0, 0.0, 3.0))

    data = Stated(phantom_root)
    folder = exported(data, tmp_path)["mr"]
    case = data.cases("mr")[0]
    image = nib.load(folder / "imagesTr" / "1001_0000.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), values(case.image))
    before = nib.load(case.image).affine
    # mr lies as stored axes x, z, y of the world.
    sides = nib.affines.voxel_sizes(image.affine)
    by_world = {int(np.abs(before[:3, axis]).argmax()): sides[axis] for axis in range(3)}
    assert by_world[0] == pytest.approx(2) and by_world[2] == pytest.approx(3)
    assert by_world[1] == pytest.approx(
        nib.affines.voxel_sizes(before)[int(np.abs(before[1, :3]).argmax())]
    )
    label = nib.load(folder / "labelsTr" / "1001.nii.gz")
    np.testing.assert_allclose(label.affine, image.affine)


@pytest.mark.parametrize(
    "what", ["two geometries", "voxel sizes", "scaled", "micrometres", "uncompressed", "nrrd"]
)
def test_images_of_another_kind_are_written_anew(copy: Path, tmp_path: Path, what: str) -> None:
    """Values and the geometry that this harness uses stay."""
    path = Phantom.image_path(copy, "ct", 1001)
    volume = nib.load(path)
    voxels, affine = np.asarray(volume.dataobj).copy(), volume.affine.copy()
    target = path

    if what == "two geometries":
        volume.set_qform(affine @ np.diag([1, 1, 1.5, 1]), 1)
        nib.save(volume, path)
    elif what == "scaled":
        scaled = nib.Nifti1Image((voxels + 1024).astype(np.uint16), affine)
        scaled.header.set_slope_inter(0.5, -512)
        nib.save(scaled, path)
        voxels = voxels * 0.5
    elif what == "micrometres":
        small = nib.Nifti1Image(voxels, np.diag([1000, 1000, 1000, 1]) @ affine)
        small.header.set_xyzt_units("micron")
        nib.save(small, path)
    elif what == "voxel sizes":  # the sform counts here, pixdim for nnU-Net
        volume.header["pixdim"][1:4] = 1, 1, 5
        nib.save(volume, path)
    else:
        target = path.with_name("ct_train_1001_image." + {"nrrd": "nrrd"}.get(what, "nii"))
        if what == "nrrd":
            sitk.WriteImage(sitk.ReadImage(str(path)), str(target))
        else:
            nib.save(volume, target)

    class Changed(Phantom):
        def cases(self, domain: str) -> tuple[Case, ...]:
            cases = super().cases(domain)
            return tuple(replace(c, image=target) if c.image == path else c for c in cases)

    folder = exported(Changed(copy), tmp_path / "out")["ct"]
    made = folder / "imagesTr" / "1001_0000.nii.gz"
    written = nib.load(made)
    if what == "scaled":  # a scaled file has one geometry, and other programs scale it, too
        assert made.read_bytes() == path.read_bytes()
    np.testing.assert_allclose(np.asarray(written.dataobj), voxels)
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    np.testing.assert_allclose(written.get_qform(), written.get_sform(), atol=1e-4)
    assert written.header.get_xyzt_units()[0] != "micron"
    # nnU-Net reads with SimpleITK, whose voxel sizes are those of pixdim.
    label = folder / "labelsTr" / "1001.nii.gz"
    for file in (made, label):
        read = sitk.ReadImage(str(file))
        np.testing.assert_allclose(read.GetSpacing(), nib.affines.voxel_sizes(affine), rtol=1e-5)
        np.testing.assert_allclose(nib.load(file).affine, affine, atol=1e-4)


def test_two_geometries_stay_where_voxel_sizes_agree(copy: Path, tmp_path: Path) -> None:
    """Image, label and prediction carry both forms, so that they lie on each other by either."""
    path = Phantom.image_path(copy, "ct", 1003)
    volume = nib.load(path)
    turned = volume.affine.copy()
    turned[:3] = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]] @ turned[:3]
    volume.set_qform(turned, 2)
    nib.save(volume, path)
    data = Phantom(copy)
    folder = exported(data, tmp_path / "out")["ct"]
    (case,) = data.split("ct", "test")
    predictions = tmp_path / "run"
    predictions.mkdir()
    shutil.copy(case.truth, predictions / f"{case.id}.nii.gz")
    export_predictions(data, "ct", predictions, tmp_path / "predicted", 1, SILENT)
    image = folder / "imagesTs" / "1003_0000.nii.gz"
    assert image.read_bytes() == path.read_bytes()
    for file in (folder / "labelsTs" / "1003.nii.gz", tmp_path / "predicted" / "1003.nii.gz"):
        header = nib.load(file).header
        assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 1)
        assert np.array_equal(header.get_qform(), nib.load(path).get_qform())
        assert np.array_equal(header.get_sform(), nib.load(path).get_sform())
        first, second = sitk.ReadImage(str(image)), sitk.ReadImage(str(file))
        for read in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(first, read)() == getattr(second, read)()


# -- again, and over something else ----------------------------------------------------------------


def test_the_same_command_goes_on_where_it_was(phantom_root: Path, tmp_path: Path) -> None:
    data = Phantom(phantom_root)
    folder = exported(data, tmp_path)["ct"]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    lost = [folder / "labelsTr" / "1004.nii.gz", folder / "imagesTs" / "1003_0000.nii.gz"]
    content = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    (folder / "dataset.json").unlink()
    (folder / "imagesTr" / f"{UNFINISHED}1009_0000.nii.gz").write_bytes(b"half")
    os.utime(folder / "imagesTr" / f"{UNFINISHED}1009_0000.nii.gz", (1, 1))
    exported(data, tmp_path)
    assert [path.read_bytes() for path in lost] == content
    assert (folder / "dataset.json").is_file() and not list(folder.rglob(".*"))
    kept = set(times) - set(lost)
    assert {path: path.stat().st_mtime_ns for path in kept} == {p: times[p] for p in kept}


@pytest.mark.fault("full disk", "export of a dataset, full at its nth file")
def test_on_a_full_disk_only_whole_files_are_left_and_it_goes_on(
    phantom_root: Path, tmp_path: Path
) -> None:
    data = Phantom(phantom_root)
    for full in (0, 4, 9):
        with full_disk(full), pytest.raises(RunFailure, match="is full; free some space"):
            exported(data, tmp_path / "to")
        assert not list(tmp_path.rglob(f"{UNFINISHED}*"))
        for file in tmp_path.rglob("*.nii.gz"):
            nib.load(file).get_fdata()
        assert not list(tmp_path.rglob("dataset.json"))  # which is written last
    exported(data, tmp_path / "to")
    exported(data, tmp_path / "at once")
    assert files(tmp_path / "to") == files(tmp_path / "at once")


def test_nothing_else_is_overwritten(phantom_root: Path, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nnUNet_raw" / "Dataset501_phantom_mr"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ConfigError, match="not an export of glua-bench.*--to"):
        exported(Phantom(phantom_root), tmp_path)
    assert (folder / "dataset.json").read_text() == "{}"
    to = tmp_path / "other"
    exported(Phantom(phantom_root), to)
    label = Phantom.label_path(copy, "mr", 1001)
    changed = nib.load(label)
    nib.save(nib.Nifti1Image(np.asarray(changed.dataobj)[::-1], changed.affine), label)
    before = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    for data, link in ((Phantom(copy), False), (Phantom(phantom_root), True)):
        with pytest.raises(ConfigError, match="other files or settings"):
            exported(data, to, link=link)
    assert {path: path.read_bytes() for path in to.rglob("*") if path.is_file()} == before
    record = to / "nnUNet_raw" / "Dataset501_phantom_mr" / RECORD
    older = {k: v for k, v in json.loads(record.read_text()).items() if k != "version"}
    record.write_text(json.dumps(older))  # of a version that wrote other headers
    with pytest.raises(ConfigError, match="other files or settings"):
        exported(Phantom(phantom_root), to)
    record.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        exported(Phantom(phantom_root), to)


def test_numbers_are_three_digits_and_free(phantom_root: Path, tmp_path: Path) -> None:
    data = Phantom(phantom_root)
    assert folder_of(data, "ct", tmp_path, 7).name == "Dataset008_phantom_ct"
    for number in (0, 999, 1000):
        with pytest.raises(ConfigError, match=f"--number {number}"):
            exported(data, tmp_path, number)
    (tmp_path / "nnUNet_raw" / "Dataset602_Spleen").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already has the number 602"):
        exported(data, tmp_path, 601)


def test_a_place_that_cannot_be_written_is_a_sentence(phantom_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFailure, match="cannot be created.*--to"):
        exported(Phantom(phantom_root), tmp_path / "file")


# -- what nnU-Net has no place for -----------------------------------------------------------------


def test_cases_without_a_label_are_left_out_and_counted(phantom_root: Path, tmp_path: Path) -> None:
    class Bare(Phantom):
        def cases(self, domain: str) -> tuple[Case, ...]:
            cases = super().cases(domain)
            return tuple(replace(c, label=None) if c.id == "ct_1001" else c for c in cases)

    class Barer(Phantom):
        def cases(self, domain: str) -> tuple[Case, ...]:
            cases = super().cases(domain)
            return tuple(c if c.split == "test" else replace(c, label=None) for c in cases)

    made = export(Bare(phantom_root), tmp_path, 501, False, 1, SILENT)
    assert [(one.cases, one.left_out) for one in made] == [(3, 0), (2, 1)]
    # One case is left for training, so that nnU-Net has to draw splits itself.
    assert not (made[1].folder / "splits_final.json").exists()
    assert json.loads((made[1].folder / "dataset.json").read_text())["numTraining"] == 1
    with pytest.raises(DataError, match="no labelled training case"):
        exported(Barer(phantom_root), tmp_path / "other")


def test_predictions_get_the_names_and_numbers_of_the_labels(
    phantom_root: Path, tmp_path: Path
) -> None:
    """A perfect prediction, in the dataset's own values, becomes the label of the test case."""
    data = Phantom(phantom_root)
    folder = exported(data, tmp_path)["ct"]
    (case,) = data.split("ct", "test")
    predictions = tmp_path / "run"
    predictions.mkdir()
    shutil.copy(case.truth, predictions / f"{case.id}.nii.gz")
    place = tmp_path / "predictions"
    assert export_predictions(data, "ct", predictions, place, 1, SILENT) == 1
    assert files(place) == files(folder / "labelsTs") == {"1003.nii.gz"}
    mine, theirs = (nib.load(where / "1003.nii.gz") for where in (place, folder / "labelsTs"))
    np.testing.assert_array_equal(np.asarray(mine.dataobj), np.asarray(theirs.dataobj))
    np.testing.assert_array_equal(mine.affine, theirs.affine)
    (predictions / f"{case.id}.nii.gz").unlink()
    shutil.rmtree(place)
    with pytest.raises(DataError, match="ct_1003.nii.gz does not exist"):
        export_predictions(data, "ct", predictions, place, 1, SILENT)
