"""datasets/mscmr.py: layouts, splits and messages; real files if available."""

import ast
import inspect
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from drawn import sentence

import glua_bench.datasets.mscmr as module
from glua_bench.data.cache import SliceCache
from glua_bench.data.stores import LabelledStore
from glua_bench.data.volumes import load_image, load_label, read_label_volume, restore, save_labels
from glua_bench.datasets.mscmr import MSCMR
from glua_bench.errors import DataError
from glua_bench.scoring.metrics import case_metrics
from glua_bench.task import SPLITS

LAYOUTS = ["", "Patch192", "mscmr", "mscmr/Patch192"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_files(base: Path, c0=range(1, 21), lge=range(21, 36)) -> Path:
    """Create empty files under the release's names."""
    for folder, numbers in (("C0", c0), ("LGE", lge)):
        (base / folder).mkdir(parents=True)
        for number in numbers:
            for suffix in ("", "_manual"):
                (base / folder / f"patient{number}_{folder}{suffix}.nii.gz").touch()
    return base


def drawn(folder: Path, number: int, sequence: str) -> None:
    """Write a heart in the release's format: a ring, its cavity and a crescent on its left."""
    x, y, z = np.indices((192, 192, 3))
    r = np.hypot(x - 100, y - 92)
    raw = np.zeros(r.shape, np.int16)
    raw[np.hypot((x - 60) / 25, (y - 95) / 40) < 1] = 600
    raw[r < 48] = 200
    raw[r < 32] = 500
    image = (x + y + 40 * z + raw / 3).astype(np.uint8)
    # Axes as in the release (LSP), an in-plane spacing that the pixels contradict.
    affine = np.array([[-1.25, 0, 0, 0], [0, 0, -8, 0], [0, 1.25, 0, 0], [0, 0, 0, 1]])
    for data, suffix in ((image, ""), (raw, "_manual")):
        volume = nib.Nifti1Image(data, affine)
        nib.save(volume, folder / f"patient{number}_{sequence}{suffix}.nii.gz")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_under_a_given_root(tmp_path, layout):
    base = make_files(tmp_path / layout)
    lines: list[str] = []
    dataset = MSCMR(tmp_path)
    dataset.prepare(lines.append)
    assert [line.split(" volumes")[0] for line in lines] == ["bssfp: 20", "lge: 15"]
    assert dataset.cases("bssfp")[0].image == base / "C0" / "patient1_C0.nii.gz"
    assert dataset.cases("lge")[0].label == base / "LGE" / "patient21_LGE_manual.nii.gz"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_under_the_variable(tmp_path, monkeypatch, layout):
    """GLUA_BENCH_DATA is the data directory, or that of the files."""
    make_files(tmp_path / layout)
    monkeypatch.setenv("GLUA_BENCH_DATA", str(tmp_path))
    assert len(MSCMR().cases("bssfp")) == 20


def test_unset_variable_is_a_sentence(monkeypatch):
    monkeypatch.delenv("GLUA_BENCH_DATA", raising=False)
    with pytest.raises(DataError, match="GLUA_BENCH_DATA"):
        MSCMR()


def test_splits_share_no_person(tmp_path):
    """No patient is in both domains; ids and files are unique and sorted."""
    make_files(tmp_path)
    dataset = MSCMR(tmp_path)
    people = {}
    for domain in dataset.domains():
        cases = dataset.cases(domain)
        assert [case.id for case in cases] == sorted({case.id for case in cases})
        assert {case.domain for case in cases} == {domain}
        people[domain] = {case.subject for case in cases}
        assert len(people[domain]) == len(cases) == len({case.image for case in cases})
        assert sum((dataset.split(domain, split) for split in SPLITS), ()) == cases
    assert not people["bssfp"] & people["lge"]
    sizes = {d: [len(dataset.split(d, s)) for s in SPLITS] for d in dataset.domains()}
    assert sizes == {"bssfp": [14, 2, 4], "lge": [6, 2, 7]}


def test_full_release_gives_the_same_cases(tmp_path):
    """Additional files change nothing, so that scores from different copies are comparable."""
    few, all_of_it = tmp_path / "few", tmp_path / "all"
    make_files(few)
    make_files(all_of_it, range(1, 36), range(1, 46))
    for domain in ("bssfp", "lge"):
        ids = [[case.id for case in MSCMR(root).cases(domain)] for root in (few, all_of_it)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("fault", ["nothing", "empty", "one sequence", "flat", "label", "image"])
def test_incomplete_data_is_one_sentence(tmp_path, fault):
    root = tmp_path / "data"
    if fault == "empty":
        root.mkdir()
    elif fault == "one sequence":
        make_files(root)
        (root / "LGE").rename(root / "other")
    elif fault == "flat":
        make_files(root)
        for file in (root / "C0").iterdir():
            file.rename(root / file.name)
        (root / "C0").rmdir()
    elif fault in ("label", "image"):
        make_files(root)
        suffix = "_manual" if fault == "label" else ""
        for number in (22, 23, 24, 25, 26):
            (root / "LGE" / f"patient{number}_LGE{suffix}.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        MSCMR(root).prepare()
    text = sentence(caught, root, "zmiclab.github.io/zxh/0/mscmrseg19")
    if fault in ("label", "image"):
        assert f"patient22_LGE{suffix}.nii.gz" in text and "and 2 more" in text
    else:
        assert "GLUA_BENCH_DATA" in text and "C0/patientN_C0.nii.gz" in text


def test_unknown_domain_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="bssfp or lge"):
        MSCMR(make_files(tmp_path)).cases("ct")


def test_reading_states_the_spacing_and_stands_upright(tmp_path):
    """Arrays as stored, RV on the left, 0.74 mm in-plane, the header's slice distance."""
    make_files(tmp_path)
    drawn(tmp_path / "C0", 1, "C0")
    dataset = MSCMR(tmp_path)
    case = dataset.cases("bssfp")[0]
    original = np.asarray(nib.load(case.label).dataobj)
    reference = read_label_volume(case.label, case.image, dataset.view(case.domain))
    for preset in ("quick", "standard", "paper"):
        grid = dataset.grid(preset)
        loaded = load_image(case.image, dataset.reading, grid)
        np.testing.assert_allclose(loaded.placement.spacing, (0.74, 0.74, 8.0))
        assert loaded.voxels.shape == (3, grid.size, grid.size)
        labels = load_label(case.label, case.image, dataset.view(case.domain), loaded.placement)
        left, right = (np.argwhere(labels[1] == index).mean(0) for index in (3, 2))
        assert left[1] < right[1] - 15
        restored = restore(np.moveaxis(np.eye(4)[labels], -1, 0), loaded.placement)
        rows = case_metrics(restored, reference, dataset.structures, loaded.placement.spacing)
        assert min(row["dice"] for row in rows) > 0.95
        if preset != "quick":
            assert np.array_equal(labels, reference.transpose(2, 1, 0)[:, ::-1])
            values = [structure.values[0] for structure in dataset.structures]
            save_labels(tmp_path / "out.nii.gz", restored, loaded.placement, values)
            assert np.array_equal(np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj), original)


def test_listing_needs_no_heavy_import():
    """`list` reads class attributes from the source and never imports torch."""
    tree = ast.parse(inspect.getsource(module))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    literals = {
        node.targets[0].id: ast.literal_eval(node.value)  # type: ignore[union-attr]
        for node in body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("name", "reference", "needs")  # type: ignore[union-attr]
    }
    assert literals == {"name": "mscmr", "reference": MSCMR.reference, "needs": MSCMR.needs}
    imported = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "collections", "pathlib", "glua_bench"}
    assert MSCMR.publishable is False and "0.74" in MSCMR.distance_note


@pytest.fixture
def real() -> MSCMR:
    if not os.environ.get("GLUA_BENCH_DATA"):
        pytest.skip("set GLUA_BENCH_DATA to the directory that holds mscmr to test real patients")
    dataset = MSCMR()
    dataset.prepare()
    return dataset


@pytest.mark.realdata
def test_real_patients_go_there_and_back(real, tmp_path):
    """Every case has known labels and all structures, and the standard grid is lossless."""
    cache = SliceCache(tmp_path)
    for domain in real.domains():
        depths = []
        for case in real.cases(domain):
            for preset, least in (("standard", 1.0), ("quick", 0.9)):
                grid = real.grid(preset)
                image = cache.image(case.unlabelled(), real.view(case.domain).on(grid))
                labels = cache.label(case, real.view(case.domain).on(grid)).open()
                reference = read_label_volume(case.label, case.image, real.view(case.domain))
                restored = restore(np.moveaxis(np.eye(4)[labels], -1, 0), image.placement)
                rows = case_metrics(restored, reference, real.structures, image.placement.spacing)
                assert min(row["dice"] for row in rows) >= least
                # RV on the left of the LV, and somewhere near the middle of the picture.
                rv, lv = (np.argwhere(labels == index).mean(0)[1:] for index in (3, 2))
                assert rv[1] < lv[1] and np.abs(lv / grid.size - 0.5).max() < 0.25
            depths.append(len(labels))
            assert image.placement.spacing[:2] == (0.74, 0.74)
        assert sum(depths) == {"bssfp": 230, "lge": 220}[domain]


@pytest.mark.realdata
def test_real_sequences_have_hearts_of_one_size(real, tmp_path):
    """The stated spacing gives cavities of equal size, unlike the headers."""
    cache = SliceCache(tmp_path)
    widths = {}
    for domain in real.domains():
        grid, cases = real.grid("quick"), real.cases(domain)
        store = LabelledStore(
            [cache.image(case.unlabelled(), real.view(case.domain).on(grid)) for case in cases],
            [cache.label(case, real.view(case.domain).on(grid)) for case in cases],
        )
        labels = store.labels(np.arange(len(store)))
        inside = np.isin(labels, (1, 2))
        largest = [inside[store.volumes == v].sum((1, 2)).max() for v in range(len(cases))]
        widths[domain] = np.sqrt(np.mean(largest)) * grid.spacing
    assert widths["bssfp"] == pytest.approx(widths["lge"], rel=0.1)
