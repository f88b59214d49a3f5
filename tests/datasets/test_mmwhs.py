"""datasets/mmwhs.py: the owners' layout and headers, splits, and the working window.

No patient data. Files are drawn in world coordinates and stored in the orientations of various
scanners and converters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from drawn import CODES, HEADERS, SMALL, run_glua, sentence, share_in_window, store

from glua_bench.conformance import parametrize_dataset
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.data.volumes import load_image, load_label, read_label_volume
from glua_bench.datasets import mmwhs_layout, mmwhs_literature
from glua_bench.datasets.mmwhs import MMWHS, STRAY
from glua_bench.datasets.mmwhs_literature import MMWHSLiterature
from glua_bench.datasets.phantom import anatomy, physics
from glua_bench.datasets.phantom.shapes import Canvas, Lattice, smooth_field
from glua_bench.errors import ConfigError, DataError, RunFailure
from glua_bench.inspection.integrity import check_dataset
from glua_bench.task import SPLITS, Dataset, Grid

FOLDS = range(1, MMWHS.folds + 1)
SPACING = (6.0, 5.0, 8.0)  # mm along the world's x, y, z: anisotropic
SHAPE = (40, 40, 26)
# What stands where in a drawn chest: raw value, centre (right, front, up) and radius in mm.
PARTS = (
    (205, (-25, 10, -20), 34),
    (500, (-25, 10, -20), 22),
    (600, (35, 20, -20), 18),
    (420, (-5, -35, 5), 20),
    (550, (42, -12, 5), 15),
    (820, (10, 5, 50), 17),
    (850, (-25, 15, 52), 13),
)
SHOWN = {"ct": (-1000, 40, 100, 320), "mr": (8, 160, 120, 480)}  # air, body, wall, blood


def draw(domain: str, number: int, stray: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw a chest with a heart in RAS+ axes, int16 (X, Y, Z): image and raw labels."""
    rng = np.random.default_rng([number, domain == "mr"])
    x, y, z = (
        (np.arange(n) - (n - 1) / 2) * s + rng.uniform(-4, 4)
        for n, s in zip(SHAPE, SPACING, strict=True)
    )
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
    label = np.zeros(SHAPE, np.int16)
    for value, (a, b, c), radius in PARTS:
        label[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 < radius**2] = value
    air, body, wall, blood = SHOWN[domain]
    inside = np.broadcast_to((x / 112) ** 2 + (y / 90) ** 2 < 1, SHAPE)
    image = np.where(inside, body, air)
    image = np.where(label == 205, wall, np.where(label > 205, blood, image))
    image = image + rng.normal(0, 6, SHAPE)
    if stray:  # half of an atrium
        atrium = label == 420
        atrium[SHAPE[0] // 2 :] = False
        label[atrium] = STRAY
    return np.rint(image).astype(np.int16), label


AFFINE = np.diag([*SPACING, 1.0])
AFFINE[:3, 3] = (-110.0, -95.0, 300.0)


def write(root: Path, stray: tuple[int, ...] = ()) -> Path:
    """Write all 80 files under the owners' names, with different headers."""
    for domain in ("ct", "mr"):
        folder = root / f"{domain}_train"
        folder.mkdir(parents=True)
        for number in mmwhs_layout.ALL_IDS:
            codes, header = CODES[number % len(CODES)], HEADERS[number % len(HEADERS)]
            drawn = draw(domain, number, domain == "mr" and number in stray)
            for data, kind in zip(drawn, ("image", "label"), strict=True):
                path = folder / f"{domain}_train_{number}_{kind}.nii.gz"
                store(path, data, AFFINE, codes, header)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mmwhs") / "data", stray=(1010,))


@pytest.fixture(scope="module")
def dataset(root: Path) -> MMWHS:
    return MMWHS(root)


def touch(root: Path, layout: str = "folders") -> Path:
    """Create empty files under the owners' names."""
    for domain in ("ct", "mr"):
        for number in range(1001, 1021):
            folder = root
            if layout != "flat":
                part = 1 + (number > 1010) if layout == "parts" and domain == "ct" else ""
                folder = root / f"{domain}_train{part}"
            folder.mkdir(parents=True, exist_ok=True)
            for kind in ("image", "label"):
                (folder / f"{domain}_train_{number}_{kind}.nii.gz").touch()
    return root


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folders", "parts", "flat"])
@pytest.mark.parametrize("variable", ["", "mmwhs", "."])
def test_files_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, variable: str
) -> None:
    """In the owners' folders or a single one, below a given root or the variable's."""
    monkeypatch.setenv("GLUA_BENCH_DATA", str(tmp_path))
    base = touch(tmp_path / variable, layout)
    lines: list[str] = []
    for fold in FOLDS:
        found = MMWHS(None if variable else tmp_path, fold)
        lines.clear()
        found.prepare(lines.append)
        first = found.cases("mr")[0].label
        assert first.name == "mr_train_1001_label.nii.gz"
        assert first.parent.resolve() == (base if layout == "flat" else base / "mr_train").resolve()
    assert [line.split(" volumes")[0] for line in lines[:2]] == ["mr: 20", "ct: 20"]
    ct = [case.image.parent.name for case in MMWHS(base).cases("ct")]
    if layout == "parts":
        assert ct == ["ct_train1"] * 10 + ["ct_train2"] * 10
    assert "421" in lines[2] and "counts as 420" in lines[2]
    assert all(value in lines[2] for value in ("550", "600", "850"))


@pytest.mark.parametrize("fault", ["nothing", "empty", "no mr", "image", "label"])
def test_missing_files_are_one_sentence(tmp_path: Path, fault: str) -> None:
    """Where to obtain the data, which terms to accept, which files are expected."""
    root = tmp_path / "data"
    if fault == "empty":
        root.mkdir()
    elif fault != "nothing":
        touch(root)
    if fault == "no mr":
        (root / "mr_train").rename(root / "other")
    elif fault in ("image", "label"):
        for number in (1004, 1009):
            (root / "mr_train" / f"mr_train_{number}_{fault}.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        MMWHS(root).prepare()
    terms = ("MM-WHS 2017 challenge", "register", "accepting its terms")
    files = ("ct_train_1001_image.nii.gz", "mr_train_1020_label.nii.gz")
    text = sentence(caught, root, *terms, *files)
    if fault in ("image", "label"):
        assert f"lacks 2 of 40 files, first mr_train_1004_{fault}.nii.gz" in text
    else:
        assert "--data-root" in text


def test_an_unset_variable_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLUA_BENCH_DATA", raising=False)
    for fold in (1, 3):
        with pytest.raises(DataError, match="GLUA_BENCH_DATA"):
            MMWHS(fold=fold)


# -- splits ---------------------------------------------------------------------------------------


def test_the_split_is_the_literature_s(tmp_path: Path) -> None:
    dataset = MMWHS(touch(tmp_path))
    ids = {
        (domain, split): [case.id for case in dataset.split(domain, split)]
        for domain in dataset.domains()
        for split in SPLITS
    }
    assert ids["ct", "test"] == ["ct_1003", "ct_1008", "ct_1014", "ct_1019"]
    assert ids["mr", "test"] == ["mr_1007", "mr_1009", "mr_1018", "mr_1019"]
    assert ids["ct", "val"] == ["ct_1004", "ct_1011"]
    assert ids["mr", "val"] == ["mr_1003", "mr_1012"]
    assert dataset.directions == ("mr-ct", "ct-mr") and not dataset.publishable


def test_folds_share_nobody_and_test_everybody_once(tmp_path: Path) -> None:
    touch(tmp_path)
    for domain in ("ct", "mr"):
        tested: list[str] = []
        for fold in FOLDS:
            dataset = MMWHS(tmp_path, fold)
            cases = dataset.cases(domain)
            assert [case.id for case in cases] == [f"{domain}_{n}" for n in range(1001, 1021)]
            assert [len(dataset.split(domain, split)) for split in SPLITS] == [14, 2, 4]
            tested += [case.id for case in dataset.split(domain, "test")]
        assert sorted(tested) == [f"{domain}_{n}" for n in range(1001, 1021)]
    people = [case.subject for d in ("ct", "mr") for case in MMWHS(tmp_path).cases(d)]
    assert len(set(people)) == 40


def test_the_split_file_is_complete() -> None:
    table = pd.read_csv(mmwhs_layout.SPLIT_FILE)
    assert list(table.columns[:2]) == ["domain", "id"]
    assert list(table.columns[2:]) == ["literature", "fold2", "fold3", "fold4", "fold5"]
    assert not table.duplicated(["domain", "id"]).any() and len(table) == 40
    assert set(np.unique(table.iloc[:, 2:])) == set(SPLITS)
    with pytest.raises(ConfigError, match="'mmwhs' has no fold 9; it has folds 1 to 5"):
        MMWHS(Path(), 9)
    with pytest.raises(ConfigError, match="'mmwhs_literature' has no fold 2; it has one split"):
        MMWHSLiterature(Path(), 2)


# -- voxels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("codes", CODES)
def test_slices_stand_upright_however_they_are_stored(
    tmp_path: Path, codes: str, header: str
) -> None:
    """The same voxels on the working grid for all axes, also with contradictory headers."""
    image, label = draw("ct", 1001)
    paths = {}
    for name, stored in (("as drawn", ("RAS", "both")), ("stored", (codes, header))):
        paths[name] = [tmp_path / f"{name} {kind}.nii.gz" for kind in ("image", "label")]
        for path, data in zip(paths[name], (image, label), strict=True):
            store(path, data, AFFINE, *stored)
    grid = Grid(64, 4.0, 4.0)
    loaded = {}
    for name, (image_path, label_path) in paths.items():
        volume = load_image(image_path, MMWHS.reading, grid)
        labels = load_label(label_path, image_path, MMWHS.view("ct"), volume.placement)
        loaded[name] = volume.voxels, labels
        # Coronal slices, so the slice distance is the world's y, whichever file axis that is.
        spacing = [volume.placement.spacing[axis] for axis in volume.placement.axes]
        assert spacing == pytest.approx([SPACING[1], SPACING[2], SPACING[0]])
    for found, drawn in zip(loaded["stored"], loaded["as drawn"], strict=True):
        np.testing.assert_allclose(found, drawn, atol=1e-4)
    labels = loaded["stored"][1]
    middle = {k: np.argwhere(labels == k).mean(0) for k in range(1, 5)}  # MYO, LAC, LVC, AA
    assert middle[4][1] < middle[3][1] - 10  # the aorta rises above the ventricle
    assert middle[4][2] < middle[3][2] - 5  # the patient's left is at the right
    assert middle[2][0] < middle[3][0] - 5  # the atrium lies behind, slices run forward


def test_labels_mean_what_the_owners_say(dataset: MMWHS) -> None:
    """All seven values, and 421, which counts as left atrium."""
    names = {value: s.name for s in dataset.structures for value in s.values}
    assert names == {205: "MYO", 420: "LAC", STRAY: "LAC", 500: "LVC", 820: "AA"}
    assert [s.name for s in dataset.structures] == ["MYO", "LAC", "LVC", "AA"]
    assert set(dataset.reading.ignored_values) == {550, 600, 850}
    for case in (dataset.cases("ct")[1], dataset.cases("mr")[1], dataset.cases("mr")[9]):
        raw = np.asarray(nib.load(case.label).dataobj)
        known = {0, 205, 420, 500, 550, 600, 820, 850}
        values = set(np.unique(raw).tolist())
        assert values - {STRAY} <= known and (STRAY in values) == (case.id == "mr_1010")
        classes = read_label_volume(case.label, case.image, dataset.view(case.domain))
        for index, structure in enumerate(dataset.structures, start=1):
            np.testing.assert_array_equal(classes == index, np.isin(raw, structure.values))
        assert (classes[np.isin(raw, dataset.reading.ignored_values)] == 0).all()


def thorax(domain: str, number: int, voxel: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw a phantom thorax, 420 × 320 × 440 mm, RAS+: image and mask of the task's structures."""
    rng = np.random.default_rng([9, number])
    person = anatomy.draw_subject(rng)
    table = physics.draw_hounsfield if domain == "ct" else physics.draw_signals
    a, b, c = (int(extent / voxel) for extent in (420, 320, 440))
    steps = voxel * np.eye(3)
    origin = np.array([0, 0, -10]) - steps @ (np.array([a, b, c]) - 1) / 2
    lattice = Lattice((a, b, c), steps, origin)
    lengths = {"fine": 5.0, "rough": 5.5, "tree_a": 16.0, "tree_b": 16.0}
    fields = {k: smooth_field(rng, lattice, v) for k, v in lengths.items()}
    canvas = Canvas(lattice, person.warp, table(rng), fields)
    anatomy.draw_thorax(canvas, person)
    image = np.abs(canvas.image) if domain == "mr" else canvas.image
    image = image + rng.normal(0, 0.01 * np.ptp(image), image.shape)
    heart = np.isin(canvas.labels, [v for s in MMWHS.structures for v in s.values])
    return image.astype(np.float32), heart


@pytest.mark.parametrize("domain", ["ct", "mr"])
def test_the_window_holds_the_heart_wherever_the_scan_is_centred(
    tmp_path: Path, domain: str
) -> None:
    """Fields of view of 200 to 420 mm with the heart anywhere, without label files."""
    voxel, grids = 6.0, MMWHS.grids
    assert {round(grid.size * grid.spacing, 6) for grid in grids.values()} == {320}
    rng = np.random.default_rng(3)
    for number in range(4):
        image, heart = thorax(domain, number, voxel)
        where = np.argwhere(heart)
        low, high = where.min(0), where.max(0)
        for _ in range(5):
            extent = np.array([rng.uniform(200, 420), rng.uniform(180, 320), rng.uniform(170, 440)])
            counts = np.clip((extent / voxel).astype(int), high - low + 3, image.shape)
            cut = []
            for first, last, count, whole in zip(low, high, counts, image.shape, strict=True):
                start = rng.integers(max(0, last + 1 - count), min(first, whole - count) + 1)
                cut.append(slice(int(start), int(start + count)))
            part = heart[tuple(cut)]
            path = tmp_path / f"{number}.nii.gz"
            nib.save(nib.Nifti1Image(image[tuple(cut)], np.diag([voxel] * 3 + [1])), path)
            placement = load_image(path, MMWHS.reading, grids["quick"]).placement
            assert share_in_window(part, placement) >= 0.999


# -- commands -------------------------------------------------------------------------------------


@parametrize_dataset()
def test_conformance(check: Callable[[Dataset], None], dataset: MMWHS) -> None:
    check(dataset)


def test_check_refuses_values_outside_the_map(
    root: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    """The command names the case and the value, and exits with 2."""
    for domain in ("ct", "mr"):
        (tmp_path / "data" / f"{domain}_train").mkdir(parents=True)
        for file in (root / f"{domain}_train").iterdir():
            (tmp_path / "data" / f"{domain}_train" / file.name).symlink_to(file)
    path = tmp_path / "data" / "ct_train" / "ct_train_1005_label.nii.gz"
    path.unlink()
    label = draw("ct", 1005)[1]
    label[0, 0, 0] = 430
    store(path, label, AFFINE, CODES[1005 % len(CODES)], HEADERS[1005 % len(HEADERS)])
    code, out, err = call("data", "check", "mmwhs", "--data-root", tmp_path / "data")
    assert code == 2 and "1 of 40 cases" in err
    (line,) = (line for line in out.splitlines() if line.startswith("problem"))
    assert str(path) in line and "label value(s) 430" in line
    assert "421, a stray value" in out


def test_check_refuses_a_label_that_lies_otherwise(root: Path, tmp_path: Path) -> None:
    """An image with an sform and a label with a qform are rejected."""

    class One(MMWHS):
        """A single case a domain."""

        def ids(self, domain: str) -> tuple[int, ...]:
            return (1001,)

    for domain in ("ct", "mr"):
        (tmp_path / f"{domain}_train").mkdir()
        image, label = draw(domain, 1001)
        names = [
            tmp_path / f"{domain}_train" / f"{domain}_train_1001_{k}.nii.gz"
            for k in ("image", "label")
        ]
        store(names[0], image, AFFINE, "LPS", "both")
        store(names[1], label, AFFINE, "LPS", "both" if domain == "ct" else "disagree")
        if domain == "mr":
            crossed = nib.load(names[1])
            crossed.set_sform(None, 0)
            nib.save(crossed, names[1])
    _, findings = check_dataset(One(tmp_path), Progress(enabled=False))
    (label,) = (finding for finding in findings if finding.check != "empty role")
    assert label.cases == ("mr_1001",) and label.problem
    assert "has orientation" in label.text and "resample the label" in label.text


@pytest.mark.parametrize("direction", MMWHS.directions)
def test_glua_runs_from_raw_files(root: Path, tmp_path: Path, direction: str) -> None:
    spacing = ("grid.spacing=5", "grid.slice_spacing=16")
    run, rows = run_glua("mmwhs", direction, root, tmp_path, *spacing)
    target = direction.split("-")[1]
    assert set(rows["case"]) == {f"{target}_{n}" for n in MMWHS.test_ids[target]}
    assert set(rows["structure"]) >= {"MYO", "LAC", "LVC", "AA"}
    case = f"{target}_{MMWHS.test_ids[target][0]}"
    (prediction,) = run.glob(f"predictions/{case}*.nii.gz")
    saved = nib.load(prediction)
    original = nib.load(root / f"{target}_train" / f"{target}_train_{case[3:]}_image.nii.gz")
    np.testing.assert_allclose(saved.affine, original.affine, atol=1e-4)
    assert set(np.unique(np.asarray(saved.dataobj))) <= {0, 205, 420, 500, 820}


def test_the_cache_needs_no_label(dataset: MMWHS, tmp_path: Path) -> None:
    """An image's entry does not depend on its label."""
    case = dataset.cases("mr")[3]
    alone = tmp_path / case.image.name
    alone.write_bytes(case.image.read_bytes())
    grid = Grid(32, 10.0)
    with_label = SliceCache(tmp_path / "a").image(
        case.unlabelled(), dataset.view(case.domain).on(grid)
    )
    without = load_image(alone, dataset.reading, grid)
    assert with_label.placement == without.placement


# -- the literature's crop ------------------------------------------------------------------------


def test_the_literature_s_crop_uses_labels_for_the_crop_only(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mmwhs_literature, "SIDE", 170.0)  # these chests are small
    dataset, lines = MMWHSLiterature(root), []
    dataset.prepare(lines.append)
    assert len([line for line in lines if "cropped around its labels" in line]) == 40
    for domain in dataset.domains():
        for case, raw in zip(dataset.cases(domain), MMWHS(root).cases(domain), strict=True):
            assert (case.id, case.split, case.subject[-7:]) == (raw.id, raw.split, raw.id)
            for file, original in ((case.image, raw.image), (case.label, raw.label)):
                part, whole = nib.load(file), nib.load(original)
                assert part.shape != whole.shape and part.get_data_dtype() == np.int16
                # The same voxels at the same place in the world.
                corner = np.linalg.solve(whole.affine, part.affine)[:3, 3]
                first = np.rint(corner).astype(int)
                np.testing.assert_allclose(corner, first, atol=1e-3)
                box = tuple(slice(a, a + n) for a, n in zip(first, part.shape, strict=True))
                np.testing.assert_array_equal(
                    np.asarray(part.dataobj), np.asarray(whole.dataobj)[box]
                )
            task = np.isin(np.asarray(nib.load(raw.label).dataobj), (205, 420, STRAY, 500, 820))
            kept = np.isin(np.asarray(nib.load(case.label).dataobj), (205, 420, STRAY, 500, 820))
            assert kept.sum() == task.sum()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nii.gz")}
    assert len(files) == 80
    lines.clear()
    dataset.prepare(lines.append)
    assert not any("cropped" in line for line in lines)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.gz")}


def test_a_run_of_the_literature_s_crop_is_stamped(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    options = ["--method=source_only", "--dataset=mmwhs_literature", f"--data-root={root}"]
    options += ["--no-mlflow", "--steps=2", "--device=cpu"]
    settings = (*SMALL, "grid.size=32", "grid.slice_spacing=16")
    code, out, _ = call("run", *options, *(f"--set={setting}" for setting in settings))
    assert not code
    (line,) = (line for line in out.splitlines() if line.startswith("PROTOCOL"))
    assert "literature" in line and "labels" in line
    (done,) = Path("runs").glob("mmwhs_literature/source_only/*/done")
    for name in ("environment.json", "summary.json"):
        assert json.loads((done.parent / name).read_text())["protocol"].startswith("literature")
    assert set(pd.read_parquet(done.parent / "cases.parquet")["dataset"]) == {"mmwhs_literature"}
    assert MMWHS.protocol == "" and MMWHSLiterature.protocol.startswith("literature")


def test_a_crop_without_labels_or_space_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class One(MMWHSLiterature):
        """A single case a domain."""

        def ids(self, domain: str) -> tuple[int, ...]:
            return (1001,)

    for domain in ("ct", "mr"):
        (tmp_path / f"{domain}_train").mkdir()
        image, label = draw(domain, 1001)
        for data, kind in ((image, "image"), (label * (domain == "ct"), "label")):
            path = tmp_path / f"{domain}_train" / f"{domain}_train_1001_{kind}.nii.gz"
            store(path, data, AFFINE, "LPS", "both")
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="mr_train_1001_label.nii.gz holds none of"):
        One(tmp_path).prepare()
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "file"))
    store(path, label, AFFINE, "LPS", "both")
    with pytest.raises(RunFailure) as caught:
        One(tmp_path).prepare()
    text = str(caught.value)
    assert "GLUA_BENCH_CACHE" in text and text.endswith(".") and "\n" not in text
