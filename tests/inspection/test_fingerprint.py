"""inspection/fingerprint.py: equal data have equal fingerprints; differences are named."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from glua_bench.console import Progress
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.errors import ConfigError, DataError, RunFailure
from glua_bench.inspection.fingerprint import (
    case_digest,
    describe,
    differences,
    fingerprint,
    read,
    write,
)
from glua_bench.inspection.measurements import gather
from glua_bench.task import Case, Dataset

SILENT = Progress(enabled=False)


def of(data: Dataset) -> dict[str, Any]:
    return fingerprint(data, gather(data, 1, SILENT))


@pytest.fixture(scope="module")
def known(phantom_root: Path) -> dict[str, Any]:
    return of(Phantom(phantom_root))


@pytest.fixture
def copy(phantom_root: Path, tmp_path: Path) -> Path:
    """The same phantom elsewhere, to be changed."""
    return Path(shutil.copytree(phantom_root, tmp_path / "elsewhere"))


def test_it_holds_the_facts(known: dict[str, Any]) -> None:
    assert known["dataset"] == "phantom" and known["structures"] == ["MYO", "LAC", "LVC", "AA"]
    ct = known["domains"]["ct"]
    assert (ct["cases"], ct["labelled"]) == (3, 3)
    assert {split: len(own) for split, own in ct["splits"].items()} == dict.fromkeys(
        ("train", "val", "test"), 1
    )
    assert ct["structures"]["LVC"]["labels"] == 3
    ml = ct["structures"]["LVC"]["ml"]
    assert 40 < ml["min"] < ml["median"] < ml["max"] < 400
    assert ct["intensity_inside_structures"]["median"]["median"] > 100  # HU with contrast agent
    text = "\n".join(describe(known))
    assert "ct: 3 cases (1 train, 1 val, 1 test), 3 with a label" in text
    assert all(f"{name} " in text for name in known["structures"])


def test_it_names_nobody(known: dict[str, Any], phantom_root: Path) -> None:
    text = json.dumps(known)
    assert str(phantom_root) not in text and len(text) < 5000
    for domain in ("ct", "mr"):
        assert all(case.id not in text for case in Phantom(phantom_root).cases(domain))


def test_copies_have_the_same_however_they_are_stored(known: dict[str, Any], copy: Path) -> None:
    for path in copy.rglob("*.nii.gz"):
        volume = nib.load(path)
        voxels = np.asarray(volume.dataobj).astype(np.float64)
        stored = nib.Nifti1Image(voxels, volume.affine)
        stored.header["descrip"] = b"Anna Example, 1970-01-01"
        path.write_bytes(gzip.compress(stored.to_bytes(), 9))
    assert of(Phantom(copy)) == known


def test_a_copy_in_another_format_has_the_same(known: dict[str, Any], copy: Path) -> None:
    class Nrrd(Phantom):
        def cases(self, domain: str) -> tuple[Case, ...]:
            made = []
            for case in super().cases(domain):
                files = [
                    path.with_name(path.name.replace(".nii.gz", ".nrrd"))
                    for path in (case.image, case.truth)
                ]
                made.append(replace(case, image=files[0], label=files[1]))
            return tuple(made)

    for path in list(copy.rglob("*.nii.gz")):
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image, str(path).replace(".nii.gz", ".nrrd"))
    assert of(Nrrd(copy)) == known


@pytest.mark.parametrize("what", ["voxel", "label", "spacing", "mirrored"])
def test_every_change_of_content_changes_it(known: dict[str, Any], copy: Path, what: str) -> None:
    case = Phantom(copy).cases("ct")[0]
    path = case.truth if what == "label" else case.image
    volume = nib.load(path)
    voxels, affine = np.asarray(volume.dataobj).copy(), volume.affine.copy()
    if what == "voxel":
        voxels[3, 3, 3] += 1
    elif what == "label":
        voxels[voxels == 500] = 420
    elif what == "spacing":
        affine[:3, 2] *= 1.01
    else:
        affine[:3, 0] *= -1
        nib.save(nib.Nifti1Image(np.asarray(nib.load(case.truth).dataobj), affine), case.truth)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    changed = of(Phantom(copy))
    names = {case_digest(one): one.case.id for one in gather(Phantom(copy), 1, SILENT)}
    told = differences(changed, known, names)
    assert any("only here (ct_1001)" in sentence for sentence in told)
    assert any(" there (" in sentence for sentence in told)
    assert not any("mr" in sentence for sentence in told)
    assert any("LVC" in sentence for sentence in told) == (what == "label")


def test_other_splits_are_told_by_case(known: dict[str, Any], phantom_root: Path) -> None:
    class Other(Phantom):
        def split_of(self, domain: str, number: int) -> str:
            split = super().split_of(domain, number)
            return {"train": "val", "val": "train"}.get(split, split) if domain == "ct" else split

    measured = gather(Other(phantom_root), 1, SILENT)
    names = {case_digest(one): one.case.id for one in measured}
    assert sorted(differences(fingerprint(Other(phantom_root), measured), known, names)) == [
        "ct_1001 of ct is in val here and in train there.",
        "ct_1004 of ct is in train here and in val there.",
    ]


def test_other_structures_and_domains_are_told(known: dict[str, Any], phantom_root: Path) -> None:
    class Fewer(Phantom):
        structures = Phantom.structures[:3]
        reading = replace(Phantom.reading, ignored_values=(*Phantom.reading.ignored_values, 820))

    told = differences(of(Fewer(phantom_root)), known)
    assert "The structures are MYO, LAC, LVC here and MYO, LAC, LVC, AA there." in told
    alone = {**known, "content": "", "domains": {"ct": known["domains"]["ct"]}}
    assert differences(alone, known) == ["Domain mr exists only there."]
    assert differences(known, alone) == ["Domain mr exists only here."]


def test_a_case_that_cannot_be_read_is_its_sentence(copy: Path) -> None:
    broken = Phantom(copy).cases("mr")[0].image
    broken.write_bytes(b"nothing")
    with pytest.raises(DataError, match=str(broken)):
        of(Phantom(copy))


@pytest.mark.parametrize("name", ["sum.json", "new/sum.yaml"])
def test_files_give_back_what_was_written(known: dict[str, Any], tmp_path: Path, name: str) -> None:
    write(tmp_path / name, known)
    assert read(tmp_path / name) == known and differences(read(tmp_path / name), known) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not a fingerprint"),
        ("[1, 2]", "is not a fingerprint"),
        ('{"version": 1, "domains": {}}', "incomplete fingerprint"),
        ('{"version": 99, "domains": {}}', "version 99"),
    ],
)
def test_what_is_no_fingerprint_is_a_sentence(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value) and str(caught.value).endswith(".")


def test_other_suffixes_and_places_are_sentences(known: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must end in .json or .yaml"):
        write(tmp_path / "sum.txt", known)
    (tmp_path / "file").touch()
    with pytest.raises(RunFailure, match="cannot be created.*--out"):
        write(tmp_path / "file" / "sum.json", known)
