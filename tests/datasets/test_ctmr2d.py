"""datasets/ctmr2d.py: archives and directories, splits, values, and files unlike the release."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from drawn import sentence

from glua_bench.conformance import run_dataset_checks
from glua_bench.data.volumes import read_label_volume
from glua_bench.datasets import ctmr2d
from glua_bench.datasets.ctmr2d import ARCHIVES, CTMR2D, SLICES
from glua_bench.errors import DataError

SIZE = 40
Files = dict[str, dict[str, bytes]]  # archive → name → content


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache, so that the release is stacked once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLUA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def packed(voxels: np.ndarray, spacing: float = 1.25) -> bytes:
    """Return a slice as the content of a NIfTI file."""
    volume = nib.Nifti1Image(voxels, np.diag([spacing, spacing, 1.0, 1.0]))
    return gzip.compress(volume.to_bytes(), 1)


def drawn(number: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its labels: a ring around a cavity, and an unexplained structure."""
    x, y = np.indices((SIZE, SIZE))
    r = np.hypot(x - 20, y - 18)
    labels = np.zeros((SIZE, SIZE), np.int16)
    labels[r < 12] = 205
    labels[r < 7 + position % 2] = 500
    labels[:3, :3] = 550
    return (x + 2 * y + number + position + labels / 5).astype(np.float32), labels


@pytest.fixture(scope="module")
def content() -> Files:
    """Return the release in small: all cases, with the same few slices in turn."""
    made: Files = {name: {} for name in ARCHIVES}
    pairs = [tuple(map(packed, drawn(0, position))) for position in range(SLICES)]
    for name, (_, numbers, _) in ARCHIVES.items():
        own = {"MR_woGT0": range(21, 34), "MR_woGT1": range(34, 47)}.get(name, numbers)
        for number in own:
            for position in range(1, SLICES + 1):
                for kind, data in zip(("img", "lab"), pairs[position - 1], strict=True):
                    made[name][f"{name}/{kind}{number}_slice{position}.nii.gz"] = data
    return made


def write(root: Path, content: Files, archived: bool = True) -> Path:
    """Write archives, or directories, below a root."""
    root.mkdir(parents=True, exist_ok=True)
    for name, files in content.items():
        if archived:
            with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
                for member, data in files.items():
                    archive.writestr(member, data)
            continue
        for member, data in files.items():
            path = root / member
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def release(content: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("release"), content)


@pytest.fixture
def few(content: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Return the release as if it had one case in each archive."""
    own = {"CT_withGT": 33, "CT_woGT": 1, "MR_withGT": 1, "MR_woGT0": 21, "MR_woGT1": 34}
    ends = {"MR_woGT0": (21, 34), "MR_woGT1": (21, 34)}
    for name, number in own.items():
        domain, _, labelled = ARCHIVES[name]
        numbers = ends.get(name, (number,))
        monkeypatch.setitem(ctmr2d.ARCHIVES, name, (domain, numbers, labelled))
    return {
        name: {
            member: data
            for member, data in content[name].items()
            if f"{number}_slice" in member and member.split("/")[1][3:].startswith(f"{number}_")
        }
        for name, number in own.items()
    }


def test_archives_and_directories_give_the_same_cases(few: Files, tmp_path: Path) -> None:
    made = {}
    for archived in (True, False):
        dataset = CTMR2D(write(tmp_path / str(archived), few, archived))
        root = dataset.root
        lines: list[str] = []
        dataset.prepare(lines.append)
        assert len(lines) == 5
        again: list[str] = []
        dataset.prepare(again.append)
        assert again == []
        found = {domain: dataset.cases(domain) for domain in ("ct", "mr")}
        made[root] = {
            case.id: (case.split, case.label is not None, nib.load(case.image).get_fdata())
            for cases in found.values()
            for case in cases
        }
    first, second = made.values()
    assert list(first) == list(second)
    for case, (split, labelled, voxels) in first.items():
        assert (split, labelled) == second[case][:2]
        np.testing.assert_array_equal(voxels, second[case][2])


def test_labelled_cases_are_split_and_the_others_only_train(release: Path) -> None:
    dataset = CTMR2D(release)
    dataset.prepare()
    for domain, first, unlabelled in (("ct", 33, range(1, 33)), ("mr", 1, range(21, 47))):
        by_split = {
            split: [int(c.id[3:]) for c in dataset.labelled(domain, split)]
            for split in ("train", "val", "test")
        }
        assert by_split == {
            "train": list(range(first, first + 12)),
            "val": [first + 12, first + 13],
            "test": list(range(first + 14, first + 20)),
        }
        without = [c for c in dataset.cases(domain) if c.label is None]
        assert [int(c.id[3:]) for c in without] == list(unlabelled)
        assert {c.split for c in without} == {"train"}
    results = run_dataset_checks(dataset)
    assert not [f"{r.check}: {r.message}" for r in results if not r.passed]


def test_a_stack_holds_the_slices_in_their_order_and_the_known_values(release: Path) -> None:
    dataset = CTMR2D(release)
    dataset.prepare()
    case = dataset.labelled("ct", "test")[0]
    image = nib.load(case.image)
    assert image.shape == (SIZE, SIZE, SLICES)
    assert image.header.get_zooms() == pytest.approx((1.25, 1.25, 1.25))
    for position in range(SLICES):
        np.testing.assert_array_equal(image.get_fdata()[..., position], drawn(0, position)[0])
    classes = read_label_volume(case.truth, case.image, dataset.view("ct"))
    raw = np.stack([drawn(0, position)[1] for position in range(SLICES)])
    found = dict(zip(*np.unique(classes, return_counts=True), strict=True))
    assert found[1] == (raw == 205).sum() and found[2] == (raw == 500).sum()
    assert set(found) == {0, 1, 2}, "other values are background"


@pytest.mark.parametrize("single", [0, 1, 2])
def test_the_pixel_size_is_that_of_the_plane(few: Files, tmp_path: Path, single: int) -> None:
    sizes = [1.25, 0.75]
    sizes.insert(single, 9.0)
    voxels = np.expand_dims(np.zeros((SIZE, SIZE - 4), np.int16), single)
    data = gzip.compress(nib.Nifti1Image(voxels, np.diag([*sizes, 1.0])).to_bytes())
    dataset = CTMR2D(write(tmp_path, {name: dict.fromkeys(few[name], data) for name in few}))
    dataset.prepare()
    image = nib.load(dataset.cases("mr")[0].image)
    assert image.shape == (SIZE, SIZE - 4, SLICES)
    assert image.header.get_zooms()[:2] == pytest.approx((1.25, 0.75))


@pytest.mark.fault("hostile files", "archives of slices that differ from the release")
def test_encrypted_and_repeated_members_are_refused(few: Files, tmp_path: Path) -> None:
    root = write(tmp_path, few)
    place = root / "CT_withGT.zip"
    whole = place.read_bytes()
    encrypted = bytearray(whole)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := whole.find(signature, start + 1)) >= 0:
            encrypted[start + flags] |= 1
    place.write_bytes(encrypted)
    with pytest.raises(DataError, match="encrypted") as error:
        CTMR2D(root).prepare()
    assert "CT_withGT.zip cannot be read" in sentence(error)
    place.write_bytes(whole)
    with zipfile.ZipFile(place, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(OWN, SMALL)
    with pytest.raises(DataError, match="are the same slice"):
        CTMR2D(root).prepare()


def changed(content: Files, name: str, change: Callable[[dict[str, bytes]], None]) -> Files:
    """Return the release with one archive changed."""
    files = dict(content[name])
    change(files)
    return {**content, name: files}


def renamed(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({new: files.pop(old)})


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({name: data})


OWN = "CT_withGT/img33_slice1.nii.gz"
LABEL = "CT_withGT/lab33_slice1.nii.gz"
SMALL = packed(np.zeros((SIZE, SIZE - 1), np.float32))
COARSE = gzip.compress(
    nib.Nifti1Image(np.zeros((SIZE, SIZE, 1), np.float32), np.diag([2.0, 2.0, 1.0, 1.0])).to_bytes()
)


@pytest.mark.fault("hostile files", "archives of slices that differ from the release")
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("CT_withGT", renamed(OWN, "CT_withGT/ct33_1.nii.gz"), "is not named as in the release"),
        ("CT_withGT", renamed(OWN, "img99_slice1.nii.gz"), "is of case 99.*cases 33 to 52"),
        ("CT_withGT", lambda files: files.pop(OWN), "slices 2, 3, .* instead of 1 to 16"),
        ("CT_withGT", lambda files: files.pop(LABEL), "has no label lab33_slice1 beside it"),
        ("CT_withGT", put("other/img33_slice1.nii.gz", SMALL), "are the same slice"),
        ("CT_withGT", put(OWN, SMALL), r"has 40 × 40 pixels, but its first slice has 40 × 39"),
        ("CT_withGT", put(LABEL, SMALL), r"has 40 × 39 pixels, but its image has 40 × 40"),
        ("CT_withGT", put(OWN, b"\x1f\x8bnothing"), "cannot be read as a slice"),
        ("CT_withGT", put(OWN, packed(np.zeros((8, 8, 8), np.int16))), "which is no slice"),
        (
            "CT_withGT",
            put(LABEL, packed(np.full((SIZE, SIZE), 7, np.int16))),
            "contains the value 7, which is none of 0, 205, 420",
        ),
        (
            "CT_withGT",
            put(OWN, packed(np.full((SIZE, SIZE), np.nan, np.float32))),
            "values that are not finite",
        ),
        ("CT_withGT", put(OWN, packed(np.full((SIZE, SIZE), 1e300))), "more than 32 bits"),
        (
            "CT_withGT",
            put(OWN, packed(np.full((SIZE, SIZE), 2**31, np.uint32))),
            "more than 32 bits",
        ),
        ("CT_withGT", put("CT_withGT/img33_slice2.nii.gz", COARSE), "pixels of 2 × 2 mm, but its"),
        ("MR_woGT1", put("../../evil.nii.gz", SMALL), "a name that leads out of the archive"),
        ("MR_woGT1", put("/evil.nii.gz", SMALL), "a name that leads out of the archive"),
    ],
)
def test_what_differs_from_the_release_is_said(
    content: Files,
    tmp_path: Path,
    name: str,
    change: Callable[[dict[str, bytes]], None],
    words: str,
) -> None:
    root = write(tmp_path / "data", changed(content, name, change))
    with pytest.raises(DataError, match=words) as error:
        CTMR2D(root).prepare()
    assert name in sentence(error)
    assert not list(tmp_path.rglob("evil*"))


def test_all_kinds_of_differences_are_said_at_once(few: Files, tmp_path: Path) -> None:
    files = {name: dict(own) for name, own in few.items()}
    for position in (1, 2):
        renamed(f"CT_withGT/img33_slice{position}.nii.gz", f"ct33_{position}.nii.gz")(
            files["CT_withGT"]
        )
    renamed("MR_withGT/lab1_slice1.nii.gz", "MR_withGT/lab99_slice1.nii.gz")(files["MR_withGT"])
    with pytest.raises(DataError) as error:
        CTMR2D(write(tmp_path / "data", files)).prepare()
    text = str(error.value)
    first, *_ = sentence(error).split("; ")
    assert first.endswith("(and 1 more like it)")
    assert "ct33_1.nii.gz is not named as in the release" in first
    for words in ("is of case 99", "ct case 33 has the slices 3, 4", "lab1_slice1 beside it"):
        assert text.count(words) == 1


def test_pseudo_labels_of_any_name_are_not_read(few: Files, tmp_path: Path) -> None:
    files = {name: dict(own) for name, own in few.items()}
    for name in ("CT_woGT", "MR_woGT0", "MR_woGT1"):
        for member in [member for member in files[name] if "/lab" in member]:
            renamed(member, member.replace("/lab", "/pred_"))(files[name])
    dataset = CTMR2D(write(tmp_path / "data", files))
    dataset.prepare()
    assert (len(dataset.cases("ct")), len(dataset.cases("mr"))) == (2, 3)


def test_a_directory_beside_its_archive_is_said_to_be_unread(few: Files, tmp_path: Path) -> None:
    root = write(tmp_path / "data", few)
    (root / "MR_withGT").mkdir()
    lines: list[str] = []
    CTMR2D(root).prepare(lines.append)
    assert [line for line in lines if "beside it not" in line] == [
        "ctmr2d: MR_withGT.zip is read, and the directory MR_withGT beside it not"
    ]


def test_missing_and_damaged_archives_are_named(release: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(release, root)
    (root / "MR_woGT1.zip").unlink()
    with pytest.raises(DataError, match=r"lacks MR_woGT1\.zip") as error:
        CTMR2D(root).prepare()
    assert "CT_MR_2D_Dataset_DA" in sentence(error)
    whole = (release / "MR_woGT1.zip").read_bytes()
    (root / "MR_woGT1.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"MR_woGT1\.zip cannot be read"):
        CTMR2D(root).prepare()
    with pytest.raises(DataError, match="has no domain 'us'"):
        CTMR2D(release).cases("us")


def test_a_member_that_unpacks_to_more_than_a_slice_is_refused(
    content: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctmr2d, "_LARGEST", 20_000)
    bomb = gzip.compress(bytes(10**6))
    root = write(tmp_path / "data", changed(content, "CT_withGT", put(OWN, bomb)))
    with pytest.raises(DataError, match="it is larger than any slice"):
        CTMR2D(root).prepare()


def test_a_changed_archive_is_stacked_again(few: Files, tmp_path: Path) -> None:
    root = write(tmp_path / "data", few)
    dataset = CTMR2D(root)
    dataset.prepare()
    before = nib.load(dataset.cases("ct")[1].image).get_fdata()
    other = packed(drawn(9, 0)[0] * 2)
    write(root, {"CT_withGT": changed(few, "CT_withGT", put(OWN, other))["CT_withGT"]})
    lines: list[str] = []
    dataset.prepare(lines.append)
    after = nib.load(dataset.cases("ct")[1].image).get_fdata()
    assert len(lines) == 1
    assert not np.array_equal(before[..., 0], after[..., 0])
    np.testing.assert_array_equal(before[..., 1:], after[..., 1:])
