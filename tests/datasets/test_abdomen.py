"""datasets/abdomen.py, abdomen_files.py, chaos.py: the owners' layouts, and upright slices.

No patient data. Bodies are drawn in patient coordinates, with the liver on the right, and stored in
the orientations of various scanners and converters.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from drawn import CODES, HEADERS, run_glua, sentence, share_in_window, store
from faults import damaged
from PIL import Image

from glua_bench.conformance import parametrize_dataset
from glua_bench.data.volumes import load_image, load_label, read_label_volume
from glua_bench.datasets import abdomen, chaos
from glua_bench.datasets.abdomen import Abdomen
from glua_bench.errors import DataError, RunFailure
from glua_bench.paths import entries
from glua_bench.reports import published
from glua_bench.task import SPLITS, Dataset, Grid

FOLDS = range(1, Abdomen.folds + 1)
CT_IDS = (*range(1, 11), *range(21, 41))
# Of the forty MR scans those with masks, as the folders of CHAOS's Train_Sets are called.
MR_IDS = (1, 2, 3, 5, 8, 10, 13, 15, 19, 20, 21, 22, 31, 32, 33, 34, 36, 37, 38, 39)
TEST_IDS = {"ct": (1, 9, 30, 32, 33, 39), "mr": (1, 13, 32, 38)}

SHAPE = (44, 36, 14)  # voxels to the right, to the front, upwards
SPACING = (8.0, 7.0, 10.0)
# Organ, centre (right, front, up) and radius in mm; later ones lie on top.
ORGANS = (
    ("liver", (70, 20, 20), 55),
    ("right kidney", (55, -50, -42), 27),
    ("left kidney", (-55, -50, -36), 27),
    ("spleen", (-95, -20, 25), 33),
    ("stomach", (-45, 45, 15), 24),
    ("spine", (0, -78, 0), 20),
)
CT_LABEL = {"liver": 6, "right kidney": 2, "left kidney": 3, "spleen": 1, "stomach": 7}
MR_LABEL = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}
SHOWN = {
    "ct": dict(zip(["air", "body", "liver", "right", "left", "spleen", "stomach", "spine"],
                   (-1000, 40, 110, 190, 190, 130, 20, 700), strict=True)),
    "mr": dict(zip(["air", "body", "liver", "right", "left", "spleen", "stomach", "spine"],
                   (2, 150, 90, 420, 420, 330, 240, 20), strict=True)),
}  # fmt: skip
# Directions in which columns and rows are counted, LPS+.
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "mirrored": ((-1, 0, 0), (0, 1, 0)),
    "upside down": ((1, 0, 0), (0, -1, 0)),
    "prone": ((-1, 0, 0), (0, -1, 0)),
    "turned": ((0, 1, 0), (1, 0, 0)),
    "oblique": ((0.98480775, 0, -0.17364818), (0, 1, 0)),
}


def draw(domain: str, number: int, ras: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a body at positions in RAS+ mm (..., 3): noise-free intensities and raw labels."""
    rng = np.random.default_rng([number, domain == "mr"])
    place = ras - rng.uniform(-4, 4, 3)
    tones, values = SHOWN[domain], CT_LABEL if domain == "ct" else MR_LABEL
    inside = (place[..., 0] / 165) ** 2 + (place[..., 1] / 112) ** 2 < 1
    image = np.where(inside, tones["body"], tones["air"]).astype(float)
    label = np.zeros(image.shape, np.int16)
    for organ, centre, radius in ORGANS:
        here = np.linalg.norm(place - centre, axis=-1) < radius
        image[here] = tones[organ.split()[0]]
        label[here] = values.get(organ, 0)
    return image, label


def lattice(shape: tuple[int, ...] = SHAPE, spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    """Return the RAS+ affine of a volume centred on the origin."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape, spacing, strict=True)]
    return affine


def world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the positions of voxels in mm, (X, Y, Z, 3)."""
    return np.stack(np.indices(shape), -1) @ affine[:3, :3].T + affine[:3, 3]


def write_ct(root: Path, number: int, codes: str = "LAS", header: str = "both") -> None:
    """Write one scan of BTCV."""
    folder = root / "RawData" / "Training"
    image, label = draw("ct", number, world(lattice(), SHAPE))
    image += np.random.default_rng(number).normal(0, 6, SHAPE)
    path, slope = folder / "img" / f"img{number:04d}.nii.gz", bool(number % 2)
    store(path, np.rint(image), lattice(), codes, header, slope)
    store(folder / "label" / f"label{number:04d}.nii.gz", label, lattice(), codes, header)


WriteMR = Callable[..., Path]


@pytest.fixture(scope="session")
def write_mr(dicom_slice: Callable[..., Any]) -> WriteMR:
    """Writes one scan of CHAOS below `MR`: DICOM and PNG files with shuffled names."""

    def write(root: Path, number: int, plane: str = "axial", names: bool = True) -> Path:
        scan = root / "Train_Sets" / "MR" / str(number) / "T2SPIR"
        for folder in ("DICOM_anon", "Ground"):
            (scan / folder).mkdir(parents=True)
        row, column = np.array(PLANES[plane])
        normal = np.cross(row, column)
        # The pixel grid is the same in all planes: columns along `row`, and the middle at 0.
        columns, rows, depth = SHAPE if plane != "turned" else (SHAPE[1], SHAPE[0], SHAPE[2])
        across, down = SPACING[:2] if plane != "turned" else (SPACING[1], SPACING[0])
        order = np.random.default_rng(number).permutation(depth) if names else np.arange(depth)
        for k in range(depth):
            position = (
                -row * across * (columns - 1) / 2
                - column * down * (rows - 1) / 2
                + normal * SPACING[2] * (k - (depth - 1) / 2)
            )
            i, j = np.arange(columns)[None, :, None], np.arange(rows)[:, None, None]
            lps = position + row * across * i + column * down * j
            image, label = draw("mr", number, lps * (-1, -1, 1))
            image += np.random.default_rng([number, k]).normal(0, 3, image.shape)
            slope, intercept = 0.25 * (1 + k % 3), 5.0 * (k % 2)
            stored = (image - intercept) / slope
            one = dicom_slice(stored, position, (row, column), (down, across), slope, intercept)
            one.InstanceNumber = int(depth - order[k])
            one.SliceThickness = SPACING[2] - 1.5  # slices have gaps
            name = f"IMG-0002-{order[k] + 1:05d}"
            pydicom.dcmwrite(scan / "DICOM_anon" / f"{name}.dcm", one, enforce_file_format=True)
            Image.fromarray(label.astype(np.uint8)).save(scan / "Ground" / f"{name}.png")
        return scan

    return write


def write_all(root: Path, write_mr: WriteMR) -> Path:
    """Write all 50 scans with different headers."""
    for number in CT_IDS:
        write_ct(root / "Abdomen", number, CODES[number % 6], HEADERS[number % 4])
    for number in MR_IDS:
        write_mr(root / "CHAOS_Train_Sets", number, list(PLANES)[number % 6])
    # What else lies in the downloads, and counts for nothing.
    other = root / "CHAOS_Train_Sets" / "Train_Sets"
    (other / "CT" / "1" / "DICOM_anon").mkdir(parents=True)
    (other / "MR" / "1" / "T1DUAL" / "DICOM_anon" / "InPhase").mkdir(parents=True)
    (root / "Abdomen" / "RawData" / "Testing" / "img").mkdir(parents=True)
    (root / "Abdomen" / "RawData" / "Testing" / "img" / "img0061.nii.gz").touch()
    for hidden in ("__MACOSX", ".Trash"):
        (root / hidden / "Train_Sets" / "MR" / "2" / "T2SPIR" / "DICOM_anon").mkdir(parents=True)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_mr: WriteMR) -> Path:
    return write_all(tmp_path_factory.mktemp("abdomen") / "data", write_mr)


@pytest.fixture(scope="module")
def dataset(root: Path) -> Abdomen:
    made = Abdomen(root)
    made.prepare()
    return made


def touch(root: Path, ct: str = "RawData/Training/img", mr: str = "niis/T2SPIR") -> Path:
    """Create empty NIfTI files under the expected names."""
    for names, folder in (
        ([f"{kind}{n:04d}.nii.gz" for n in CT_IDS for kind in ("img", "label")], ct),
        ([f"{kind}_{n}.nii.gz" for n in MR_IDS for kind in ("image", "label")], mr),
    ):
        for name in names:
            path = root / (folder.replace("img", "label") if "label" in name else folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ct", ["RawData/Training/img", "Abdomen/RawData/Training/img", "img", "."])
def test_volumes_are_found_at_any_depth(tmp_path: Path, ct: str) -> None:
    touch(tmp_path, ct, "." if ct == "." else "chaos/niis/T2SPIR")
    lines: list[str] = []
    for fold in FOLDS:
        lines.clear()
        Abdomen(tmp_path, fold).prepare(lines.append)
    assert [line.split(" below")[0] for line in lines] == ["mr: 20 volumes", "ct: 30 volumes"]
    cases = Abdomen(tmp_path).cases("ct")
    assert [case.id for case in cases] == [f"ct_{n:02d}" for n in CT_IDS]
    for case in cases:
        assert case.image.name == f"img00{case.id[3:]}.nii.gz"
        assert case.label.name == f"label00{case.id[3:]}.nii.gz"
    cases = Abdomen(tmp_path).cases("mr")
    assert [case.id for case in cases] == [f"mr_{n:02d}" for n in MR_IDS]
    assert (cases[2].image.name, cases[2].label.name) == ("image_3.nii.gz", "label_3.nii.gz")


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Links to large data sets are followed, and circular links do no harm."""
    store = touch(tmp_path / "store")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "btcv").symlink_to(store / "RawData", target_is_directory=True)
    (tmp_path / "root" / "chaos").symlink_to(store / "niis", target_is_directory=True)
    (store / "niis" / "again").symlink_to(tmp_path / "root", target_is_directory=True)
    assert len(Abdomen(tmp_path / "root").cases("ct")) == 30
    assert len(Abdomen(tmp_path / "root").cases("mr")) == 20


def test_series_count_before_copies(root: Path, dataset: Abdomen, tmp_path: Path) -> None:
    """The originals are preferred to NIfTI copies beside them, and reported."""
    touch(tmp_path)
    (tmp_path / "chaos").symlink_to(root / "CHAOS_Train_Sets", target_is_directory=True)
    lines: list[str] = []
    both = Abdomen(tmp_path)
    both.prepare(lines.append)
    assert lines[0].startswith("mr: 20 DICOM series with masks")
    assert [c.image for c in both.cases("mr")] == [c.image for c in dataset.cases("mr")]


@pytest.mark.parametrize("domain", ["ct", "mr"])
@pytest.mark.parametrize("fault", ["nothing", "domain", "image", "label"])
def test_missing_files_are_one_sentence(tmp_path: Path, domain: str, fault: str) -> None:
    """What is missing, where to obtain it, which terms to accept, which files are expected."""
    root = touch(tmp_path / "data")
    form = {"ct": "{}{:04d}.nii.gz", "mr": "{}_{}.nii.gz"}[domain]
    kinds = {"ct": ("img", "label"), "mr": ("image", "label")}[domain]
    if fault == "nothing":
        shutil.rmtree(root)
    elif fault == "domain":
        shutil.rmtree(root / {"ct": "RawData", "mr": "niis"}[domain])
    else:
        for number in (5, 8):
            for path in root.rglob(form.format(kinds[fault == "label"], number)):
                path.unlink()
    with pytest.raises(DataError) as error:
        Abdomen(root).cases(domain)
    count = {"ct": 30, "mr": 20}[domain]
    gone = 2 if fault in ("image", "label") else count
    text = sentence(error, root, f"lacks {gone} of {count} {domain.upper()} scans", "--data-root")
    if gone == 2:
        assert f"first {form.format(kinds[0], 5)} with {form.format('label', 5)}" in text
    ct = ("Abdomen/RawData.zip", "synapse.org", "syn3193805", "register", "img0001.nii.gz")
    mr = ("CHAOS_Train_Sets.zip", "zenodo.3431873", "accepting its licence", "MR/1/T2SPIR")
    for part in (*(ct if domain == "ct" or fault == "nothing" else ()),
                 *(mr if domain == "mr" or fault == "nothing" else ())):  # fmt: skip
        assert part in text
    with pytest.raises(DataError):
        Abdomen(root).prepare()


def test_a_missing_series_is_one_sentence(root: Path, tmp_path: Path) -> None:
    touch(tmp_path)
    for number in MR_IDS[1:]:
        (tmp_path / "MR" / str(number)).mkdir(parents=True)
        (tmp_path / "MR" / str(number) / "T2SPIR").symlink_to(
            root / "CHAOS_Train_Sets" / "Train_Sets" / "MR" / str(number) / "T2SPIR"
        )
    with pytest.raises(DataError) as error:
        Abdomen(tmp_path).prepare()
    sentence(error, tmp_path, "lacks 1 of 20 MR scans, first MR/1/T2SPIR")


def test_a_scan_in_two_places_is_one_sentence(tmp_path: Path) -> None:
    touch(tmp_path)
    (tmp_path / "copy").mkdir()
    for name in ("img0022.nii.gz", "label0022.nii"):
        (tmp_path / "copy" / name).touch()
        with pytest.raises(DataError) as error:
            Abdomen(tmp_path).cases("mr")
        sentence(error, tmp_path / "copy" / name, "are the same scan", "remove one")
        (tmp_path / "copy" / name).unlink()


def test_an_unset_variable_and_a_wrong_domain_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUA_BENCH_DATA", str(tmp_path))
    for fold in FOLDS:
        assert Abdomen(fold=fold).root == tmp_path / "abdomen"
    with pytest.raises(DataError, match="no domain 'pet'"):
        Abdomen(touch(tmp_path)).cases("pet")
    monkeypatch.delenv("GLUA_BENCH_DATA")
    with pytest.raises(DataError, match="GLUA_BENCH_DATA"):
        Abdomen(fold=3)


# -- splits ---------------------------------------------------------------------------------------


def test_the_split_is_the_literature_s(tmp_path: Path) -> None:
    dataset = Abdomen(touch(tmp_path))
    for domain, count, val in (("ct", 30, 3), ("mr", 20, 2)):
        tests = [case.id for case in dataset.split(domain, "test")]
        assert tests == [f"{domain}_{n:02d}" for n in TEST_IDS[domain]]
        assert len(dataset.split(domain, "val")) == val
        assert len(dataset.split(domain, "train")) == count - val - len(tests)
    assert dataset.directions == ("mr-ct", "ct-mr") and not dataset.publishable
    people = [case.subject for d in ("ct", "mr") for case in dataset.cases(d)]
    assert len(set(people)) == 50


def test_folds_test_everybody_once(tmp_path: Path) -> None:
    touch(tmp_path)
    for domain, ids, sizes in (("ct", CT_IDS, [21, 3, 6]), ("mr", MR_IDS, [14, 2, 4])):
        tested: list[str] = []
        for fold in FOLDS:
            dataset = Abdomen(tmp_path, fold)
            assert [len(dataset.split(domain, split)) for split in SPLITS] == sizes
            tested += [case.id for case in dataset.split(domain, "test")]
        assert sorted(tested) == [f"{domain}_{n:02d}" for n in ids]


def test_the_split_file_is_complete() -> None:
    table = pd.read_csv(abdomen.SPLIT_FILE)
    assert list(table.columns) == ["domain", "id", "literature", *(f"fold{n}" for n in FOLDS[1:])]
    assert list(table["id"]) == [*CT_IDS, *MR_IDS] and set(table["domain"]) == {"ct", "mr"}
    assert set(np.unique(table.iloc[:, 2:])) == set(SPLITS)


def test_published_results_are_found_by_the_name() -> None:
    for direction in Abdomen.directions:
        assert published.context(Abdomen.name, direction) is not None


# -- voxels ---------------------------------------------------------------------------------------


def check_upright(image: np.ndarray, labels: np.ndarray) -> None:
    """Check an image (Z, H, W): right on the left, front at the top, slices ascending."""
    at = {k: np.argwhere(labels == k).mean(0) for k in range(1, 5)}
    liver, right, left, spleen = (at[k] for k in range(1, 5))
    assert liver[2] < spleen[2] - 10 and right[2] < left[2] - 8
    assert liver[1] < right[1] - 5 and spleen[1] < left[1] - 2  # kidneys lie at the back
    assert right[0] < liver[0] - 3 and left[0] < spleen[0] - 3  # and lower
    middle = image[image.shape[0] // 2]
    line = middle[:, middle.shape[1] // 2]  # from front to back through the middle of the body
    line = line[line > -0.99]
    assert abs(line[-9:-5].mean() - line[5:9].mean()) > 0.3, "the spine is at the back"
    assert abs(line[-9:-5].mean() - line[len(line) // 2]) > 0.3


def loaded(image: Path, label: Path, domain: str, grid: Grid) -> tuple[Any, np.ndarray]:
    view = Abdomen.view(domain)
    volume = load_image(image, view.reading, grid)
    return volume, load_label(label, image, view, volume.placement)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("codes", CODES)
def test_ct_stands_upright_however_it_is_stored(tmp_path: Path, codes: str, header: str) -> None:
    """The same slices for all axes, also with contradictory headers."""
    grid, found = Grid(80, 5.2, 10.0), []
    for name, stored in (("drawn", ("RAS", "both")), ("stored", (codes, header))):
        write_ct(tmp_path / name, 2, *stored)
        folder = tmp_path / name / "RawData" / "Training"
        found.append(
            loaded(folder / "img/img0002.nii.gz", folder / "label/label0002.nii.gz", "ct", grid)
        )
    (drawn, drawn_labels), (stored_image, labels) = found
    np.testing.assert_allclose(stored_image.voxels, drawn.voxels, atol=1e-4)
    np.testing.assert_array_equal(labels, drawn_labels)
    check_upright(stored_image.voxels, labels)
    placement = stored_image.placement
    spacing = [placement.spacing[axis] for axis in placement.axes]
    assert spacing == pytest.approx([SPACING[2], SPACING[1], SPACING[0]])


@pytest.mark.parametrize("plane", PLANES)
def test_mr_stands_upright_however_it_is_stored(
    tmp_path: Path, write_mr: WriteMR, plane: str
) -> None:
    """From DICOM files in any orientation and order, with a slope per slice."""
    scan = write_mr(tmp_path, 3, plane)
    image, label = tmp_path / "image.nii", tmp_path / "label.nii"
    chaos.convert(chaos.slices_of(scan), image, label)
    volume, labels = loaded(image, label, "mr", Grid(80, 5.2, 10.0))
    check_upright(volume.voxels, labels)
    placement = volume.placement
    spacing = [placement.spacing[axis] for axis in placement.axes]
    assert spacing == pytest.approx([SPACING[2], SPACING[1], SPACING[0]], rel=1e-4)
    # Every voxel of both files is what was drawn at its place in the patient.
    for file, drawn, error in ((image, 0, 15.0), (label, 1, 0.0)):
        stored = nib.load(file)
        assert (int(stored.header["qform_code"]), int(stored.header["sform_code"])) == (1, 1)
        np.testing.assert_allclose(stored.get_qform(), stored.get_sform(), atol=1e-3)
        voxels = np.asarray(stored.dataobj)
        truth = draw("mr", 3, world(stored.affine, voxels.shape))[drawn]
        # The surface of an organ may fall on the other side of a rounded position.
        assert np.mean(np.abs(voxels - truth) > error) < 1e-3


def test_ct_has_a_window_in_hounsfield_units(tmp_path: Path) -> None:
    """The same range in every volume, whatever its content and storage."""
    values = np.linspace(-1024, 1500, 20 * 20 * 4).reshape(20, 20, 4).round()
    for number, (slope, inter) in enumerate(((1, 0), (2, -1024))):
        volume = nib.Nifti1Image(((values - inter) / slope).astype(np.int16), np.diag([5, 5, 5, 1]))
        volume.header.set_slope_inter(slope, inter)
        nib.save(volume, tmp_path / f"{number}.nii.gz")
        found = load_image(tmp_path / f"{number}.nii.gz", Abdomen.reading_of("ct"), Grid(20, 5.0))
        expected = np.clip((values - 75) / 200, -1, 1)[::-1, ::-1].transpose(2, 1, 0)
        np.testing.assert_allclose(found.voxels, expected, atol=0.011)
    assert Abdomen.reading_of("mr").intensity_range is None


def test_labels_mean_what_the_owners_say(dataset: Abdomen) -> None:
    tables = {
        domain: {s.name: s.values for s in dataset.structures_of(domain)} for domain in ("ct", "mr")
    }
    assert tables["ct"] == {"LIV": (6,), "RK": (2,), "LK": (3,), "SPL": (1,)}
    assert tables["mr"] == {"LIV": (63, 1), "RK": (126, 2), "LK": (189, 3), "SPL": (252, 4)}
    assert set(dataset.reading_of("ct").ignored_values) == {4, 5, 7, 8, 9, 10, 11, 12, 13}
    assert dataset.reading_of("mr").ignored_values == ()
    for domain, values in (("ct", CT_LABEL), ("mr", MR_LABEL)):
        case = dataset.cases(domain)[4]
        raw = np.asarray(nib.load(case.label).dataobj)
        assert set(np.unique(raw)) == {0, *values.values()}
        classes = read_label_volume(case.label, case.image, dataset.view(domain))
        names = ("liver", "right kidney", "left kidney", "spleen")
        for number, organ in enumerate(names, start=1):
            np.testing.assert_array_equal(classes == number, raw == values[organ])
        if domain == "ct":
            assert (classes[raw == CT_LABEL["stomach"]] == 0).all()


def test_copies_with_class_numbers_give_the_same(dataset: Abdomen, tmp_path: Path) -> None:
    """NIfTI copies of CHAOS hold 1 to 4 instead of grey levels."""
    case = dataset.cases("mr")[1]
    grey: Any = nib.load(case.label)
    classes = np.searchsorted([0, 63, 126, 189, 252], np.asarray(grey.dataobj)).astype(np.uint8)
    nib.save(nib.Nifti1Image(classes, grey.affine), tmp_path / "label_2.nii.gz")
    view = dataset.view("mr")
    np.testing.assert_array_equal(
        read_label_volume(tmp_path / "label_2.nii.gz", case.image, view),
        read_label_volume(case.label, case.image, view),
    )


@pytest.mark.parametrize("domain", ["ct", "mr"])
def test_the_window_holds_the_organs_of_a_large_patient(tmp_path: Path, domain: str) -> None:
    """A trunk 440 mm wide anywhere in a field of view of 500 mm, on a couch; no label is read."""
    assert {round(grid.size * grid.spacing, 6) for grid in Abdomen.grids.values()} == {416}
    rng = np.random.default_rng(2)
    spacing, shape = (4.0, 4.0, 10.0), (125, 125, 14)
    places = world(lattice(shape, spacing), shape)
    tones = SHOWN[domain]
    for _ in range(8):
        shift = np.array([*rng.uniform(-28, 28, 2), 0])
        place = places - shift
        x, y = place[..., 0], place[..., 1]
        trunk = (x / 220) ** 2 + (y / 160) ** 2 < 1
        ribs = (x / 190) ** 2 + (y / 130) ** 2
        image = np.where(trunk, tones["body"], tones["air"]).astype(float)
        organs = (ribs < 0.97) & (ribs > 0.5) & (np.abs(y) < 90)
        image[organs] = tones["liver"]
        if domain == "ct":
            couch = (np.abs(place[..., 1] + 178) < 6) & (np.abs(x) < 215)
            image[couch] = -200
        image += rng.normal(0, 8, shape)
        path = tmp_path / "scan.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.float32), lattice(shape, spacing)), path)
        placement = load_image(path, Abdomen.reading_of(domain), Abdomen.grids["quick"]).placement
        assert share_in_window(organs, placement) >= 0.999


# -- from DICOM and PNG to NIfTI ------------------------------------------------------------------


@pytest.fixture
def scan(tmp_path: Path, write_mr: WriteMR) -> Path:
    return write_mr(tmp_path / "scan", 5)


def test_masks_lie_where_their_slices_lie(scan: Path, tmp_path: Path) -> None:
    """A mask belongs to the file of the same name: renaming both changes nothing."""
    image, label = tmp_path / "image.nii", tmp_path / "label.nii"
    chaos.convert(chaos.slices_of(scan), image, label)
    first = [np.asarray(nib.load(file).dataobj) for file in (image, label)]
    order = np.random.default_rng(9).permutation(SHAPE[2])
    for number, (dicom, mask) in enumerate(chaos.slices_of(scan)):
        dicom.rename(dicom.with_name(f"new-{order[number]}.DCM"))
        mask.rename(mask.with_name(f"new-{order[number]}.png"))
    chaos.convert(chaos.slices_of(scan), image, label)
    again = [np.asarray(nib.load(file).dataobj) for file in (image, label)]
    for before, after in zip(first, again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_grey_levels_are_ranges(scan: Path, tmp_path: Path) -> None:
    """Above the first, up to the second number, in any picture mode."""
    slices = chaos.slices_of(scan)
    levels = np.zeros((SHAPE[1], SHAPE[0]), np.uint8)
    levels.flat[:8] = (56, 70, 111, 135, 176, 200, 241, 255)
    for number, mode in enumerate(("L", "RGB", "P", "RGBA")):
        Image.fromarray(levels).convert(mode).save(slices[number][1])
    chaos.convert(slices, tmp_path / "image.nii", tmp_path / "label.nii")
    found = np.asarray(nib.load(tmp_path / "label.nii").dataobj)
    expected = (63, 63, 126, 126, 189, 189, 252, 252)
    hits = [k for k in range(SHAPE[2]) if tuple(found[:8, 0, k]) == expected]
    assert len(hits) == 4 and not found[8:, :, hits].any() and not found[:, 1:, hits].any()


def grey(value: int) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        picture = np.zeros((SHAPE[1], SHAPE[0]), np.uint8)
        picture[3, 4] = value
        Image.fromarray(picture).save(file)

    return write


def coloured(file: Path) -> None:
    picture = np.zeros((SHAPE[1], SHAPE[0], 3), np.uint8)
    picture[3, 4] = (63, 126, 0)
    Image.fromarray(picture).save(file)


def cut(file: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (SHAPE[1], SHAPE[0]), np.uint8) * 63
                    ).save(file)  # fmt: skip
    file.write_bytes(file.read_bytes()[:-60])


MASKS: dict[str, tuple[Callable[[Path], None], str]] = {
    # An early release of CHAOS had 80, 160, 240 and 255.
    "early release": (grey(80), "grey level(s) 80 "),
    "edge below": (grey(55), "grey level(s) 55 "),
    "edge above": (grey(71), "grey level(s) 71 "),
    "edge of the spleen": (grey(240), "grey level(s) 240 "),
    "class numbers": (grey(2), "grey level(s) 2 "),
    "other size": (
        lambda file: Image.new("L", (SHAPE[1], SHAPE[0])).save(file),
        "is 36 pixels wide and 44 high but its slice has 44 columns and 36 rows",
    ),
    "colours": (coloured, "8-bit greyscale image"),
    "one bit": (
        lambda file: Image.new("1", (SHAPE[0], SHAPE[1]), 1).save(file),
        "8-bit greyscale image",
    ),
    "deep": (lambda file: Image.new("I;16", SHAPE[:2], 63).save(file), "8-bit greyscale image"),
    "text": (lambda file: file.write_bytes(b"<html></html>"), "cannot be read as PNG"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read as PNG"),
    "cut": (cut, "cannot be read as PNG"),
}


@pytest.mark.parametrize("fault", MASKS)
def test_a_mask_that_means_nothing_is_one_sentence(scan: Path, tmp_path: Path, fault: str) -> None:
    change, named = MASKS[fault]
    slices = chaos.slices_of(scan)
    change(slices[3][1])
    with pytest.raises(DataError) as error:
        chaos.convert(slices, tmp_path / "image.nii", tmp_path / "label.nii")
    sentence(error, slices[3][1], named)
    assert not list(tmp_path.glob("*.nii")) and not list(tmp_path.glob(".*"))


def test_files_without_a_partner_are_one_sentence(scan: Path) -> None:
    (scan / "Ground" / "._IMG-0002-00001.png").touch()  # of a file manager, and nobody's mask
    assert len(chaos.slices_of(scan)) == SHAPE[2]
    mask = scan / "Ground" / "IMG-0002-00004.png"
    mask.rename(mask.with_name("IMG-0003-00004.png"))
    with pytest.raises(DataError) as error:
        chaos.slices_of(scan)
    sentence(error, scan / "Ground", "lacks 1 of 15 files, first IMG-0002-00004.png")
    mask.write_bytes(b"")
    with pytest.raises(DataError) as error:
        chaos.slices_of(scan)
    sentence(error, scan / "DICOM_anon", "lacks 1 of 15 files, first IMG-0003-00004.dcm")
    shutil.rmtree(scan / "DICOM_anon")
    with pytest.raises(DataError) as error:
        chaos.slices_of(scan)
    sentence(error, scan / "DICOM_anon", "holds no .dcm files")


def test_mutated_masks_are_one_sentence_each(scan: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    slices = chaos.slices_of(scan)
    mask = next(file for _, file in slices if np.asarray(Image.open(file)).any())
    intact, refused = mask.read_bytes(), 0
    for _ in range(60):
        content = bytearray(intact)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(content)))
            if rng.integers(2):
                content[place] ^= 1 << int(rng.integers(8))
            else:
                del content[place : place + int(rng.integers(1, 30))]
            if len(content) < 2:
                break
        mask.write_bytes(content)
        try:
            chaos.convert(slices, tmp_path / "image.nii", tmp_path / "label.nii")
        except DataError as error:
            text = str(error)
            assert text.startswith(str(mask)) and text.endswith(".") and "\n" not in text
            refused += 1
    assert refused > 30


def own(tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> Abdomen:
    """Return a dataset with one MR scan and its own cache, which tests may change."""

    class One(Abdomen):
        """A single MR case, which tests."""

        @property
        def _splits(self) -> dict[str, dict[int, str]]:
            return {"ct": dict.fromkeys(CT_IDS, "train"), "mr": {5: "test"}}

    touch(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "niis")
    scan.parent.parent.rename(tmp_path / "data" / "MR")
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    return One(tmp_path / "data")


@pytest.mark.fault("silent damage", "volumes converted from DICOM")
def test_conversions_are_addressed_by_content(
    tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed files are converted again, and a changed mask leaves the image alone."""
    dataset = own(tmp_path, scan, monkeypatch)
    with pytest.raises(DataError) as error:
        dataset.cases("mr")
    sentence(error, "MR/5/T2SPIR", "glua-bench data prepare abdomen")
    lines: list[str] = []
    dataset.prepare(lines.append)
    assert sum("converted" in line for line in lines) == 1
    (case,) = dataset.cases("mr")
    first = {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (case.image, case.label)
    }
    lines.clear()
    dataset.prepare(lines.append)
    assert not any("converted" in line for line in lines)
    assert all(file.stat().st_mtime_ns == time for file, (_, time) in first.items())
    # An interrupted or damaged conversion is done again, to the same bytes.
    for seed, file in enumerate((case.label, case.image, case.label)):
        if seed:
            file.write_bytes(damaged(first[file][0], seed))
        else:
            file.unlink()
        dataset.prepare()
        assert all(file.read_bytes() == content for file, (content, _) in first.items())
    # Another mask is another label of the same image.
    dicom, mask = chaos.slices_of(tmp_path / "data" / "MR" / "5" / "T2SPIR")[6]
    grey(63)(mask)
    with pytest.raises(DataError, match="not converted"):
        dataset.cases("mr")
    dataset.prepare()
    (masked,) = dataset.cases("mr")
    assert masked.image == case.image and masked.label != case.label
    # Another slice is another image.
    one = pydicom.dcmread(dicom)
    one.RescaleSlope = float(one.RescaleSlope) * 1.5
    one.save_as(dicom)
    dataset.prepare()
    (scaled,) = dataset.cases("mr")
    assert scaled.image not in (case.image, masked.image)


@pytest.mark.fault("processes", "processes convert the same DICOM series at once")
def test_processes_may_convert_at_once(
    tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own(tmp_path, scan, monkeypatch)
    slices = chaos.slices_of(tmp_path / "data" / "MR" / "5" / "T2SPIR")
    image, label = tmp_path / "together" / "a.nii", tmp_path / "together" / "b.nii"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(chaos.convert, slices, image, label) for _ in range(6)]:
            done.result()
    dataset.prepare()
    (case,) = dataset.cases("mr")
    assert sorted(file.name for file in entries(image.parent)) == ["a.nii", "b.nii"]
    assert image.read_bytes() == case.image.read_bytes()
    assert label.read_bytes() == case.label.read_bytes()


def test_one_bad_series_keeps_no_other_from_being_converted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "CHAOS_Train_Sets", tmp_path / "data" / "chaos")
    (tmp_path / "data" / "btcv").symlink_to(root / "Abdomen", target_is_directory=True)
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    places = tmp_path / "data" / "chaos" / "Train_Sets" / "MR"
    for number in (2, 33):
        (places / str(number) / "T2SPIR" / "DICOM_anon" / "IMG-0002-00003.dcm").write_bytes(b"-")
    lines: list[str] = []
    with pytest.raises(DataError) as error:
        Abdomen(tmp_path / "data").prepare(lines.append)
    sentence(error, places / "2" / "T2SPIR", "is not a DICOM file")
    assert sum(": converted to" in line for line in lines) == 18
    assert [line[:5] for line in lines if "not a DICOM file" in line] == ["mr_02", "mr_33"]


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own(tmp_path, scan, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailure) as error:
        dataset.prepare()
    sentence(error, tmp_path / "file", "GLUA_BENCH_CACHE")


# -- commands -------------------------------------------------------------------------------------


@parametrize_dataset()
def test_conformance(check: Callable[[Dataset], None], dataset: Abdomen) -> None:
    check(dataset)


def test_check_names_the_file_that_cannot_be_used(
    root: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    """The command names the case and the value, and exits with 2."""
    shutil.copytree(root / "Abdomen", tmp_path / "data" / "btcv")
    (tmp_path / "data" / "chaos").symlink_to(root / "CHAOS_Train_Sets", target_is_directory=True)
    label = next((tmp_path / "data").rglob("label0022.nii.gz"))
    stored: Any = nib.load(label)
    voxels = np.asarray(stored.dataobj).copy()
    voxels[0, 0, 0] = 14  # the duodenum, which others have added
    nib.save(nib.Nifti1Image(voxels, stored.affine, stored.header), label)
    code, out, err = call("data", "check", "abdomen", "--data-root", tmp_path / "data")
    assert code == 2 and err.count("\n") == 1
    assert "label value(s) 14" in out + err and "label0022" in out + err


@pytest.mark.parametrize("direction", Abdomen.directions)
def test_glua_runs_from_the_owners_files(root: Path, tmp_path: Path, direction: str) -> None:
    """Without preparation; predictions overlay the original, with its domain's values."""
    spacing = ("grid.spacing=6.5", "grid.slice_spacing=20")
    run, rows = run_glua("abdomen", direction, root, tmp_path, *spacing)
    target = direction.split("-")[1]
    assert set(rows["case"]) == {f"{target}_{n:02d}" for n in TEST_IDS[target]}
    assert set(rows["structure"]) >= {"LIV", "RK", "LK", "SPL"}
    case = Abdomen(root).split(target, "test")[1]
    (prediction,) = run.glob(f"predictions/{case.id}*.nii.gz")
    saved: Any = nib.load(prediction)
    np.testing.assert_allclose(saved.affine, nib.load(case.image).affine, atol=1e-4)
    table = {"ct": {0, 1, 2, 3, 6}, "mr": {0, 63, 126, 189, 252}}[target]
    assert set(np.unique(np.asarray(saved.dataobj))) <= table
