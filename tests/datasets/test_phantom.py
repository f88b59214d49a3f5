"""The phantom: files, anatomy, physics, determinism and errors."""

from __future__ import annotations

import ast
import errno
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from drawn import sentence
from faults import another_user, damaged

from glua_bench import identity
from glua_bench.data.volumes import load_image, load_label, read_label_volume
from glua_bench.datasets.mmwhs_layout import MMWHSLayout
from glua_bench.datasets.phantom import anatomy, physics
from glua_bench.datasets.phantom import dataset as phantom
from glua_bench.datasets.phantom.dataset import (
    GENERATING,
    MANIFEST,
    STARTED,
    Phantom,
    generate,
    write_subject,
)
from glua_bench.datasets.phantom.shapes import Lattice, smooth_field
from glua_bench.errors import DataError, RunFailure
from glua_bench.files import read_checked_json, write_checked_json
from glua_bench.identity import code_digest
from glua_bench.task import Grid

# Every split of both domains, as coarse as still shows all structures.
IDS = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
SCALE = 2.0


@pytest.fixture(scope="session")
def root(phantom_root: Path) -> Path:
    return phantom_root


@pytest.fixture(scope="session")
def dataset(root: Path) -> Phantom:
    return Phantom(root)


def snapshot(root: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


# -- files and facts ------------------------------------------------------------------------------


def test_structures_are_the_tasks_in_the_fields_order() -> None:
    table = [(structure.name, structure.values) for structure in Phantom.structures]
    assert table == [("MYO", (205,)), ("LAC", (420,)), ("LVC", (500,)), ("AA", (820,))]
    assert Phantom.reading.ignored_values == (600, 550, 850)
    assert Phantom.directions == ("mr-ct", "ct-mr")


def test_what_list_shows_can_be_read_without_importing() -> None:
    tree = ast.parse(Path(inspect.getfile(phantom)).read_text())
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert ast.get_docstring(body)
    literal = {
        node.target.id: ast.literal_eval(node.value)
        for node in body.body
        if isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name)
    }
    assert literal["name"] == "phantom"
    assert literal["publishable"] is True
    assert {"reference", "needs", "distance_note"} <= set(literal)


def test_cases_are_those_of_the_manifest_and_every_split_is_there(dataset: Phantom) -> None:
    for domain in ("ct", "mr"):
        cases = dataset.cases(domain)
        assert [case.id for case in cases] == [f"{domain}_{number}" for number in IDS[domain]]
        assert {case.split for case in cases} == {"train", "val", "test"}
        assert all(case.image.is_file() and case.label.is_file() for case in cases)


def test_the_whole_cohort_splits_14_2_20_and_nobody_appears_twice(dataset: Phantom) -> None:
    for domain in ("ct", "mr"):
        splits = [dataset.split_of(domain, number) for number in phantom.ALL_IDS]
        assert [splits.count(split) for split in ("train", "val", "test")] == [14, 2, 20]
        literature = MMWHSLayout.test_ids[domain]
        assert set(literature) <= set(dataset.test_ids[domain])
        assert set(dataset.test_ids[domain]) - set(literature) == set(range(1021, 1037))
    subjects = [case.subject for domain in ("ct", "mr") for case in dataset.cases(domain)]
    assert len(set(subjects)) == len(subjects)


def test_files_have_raw_labels_and_orientations_of_their_own(dataset: Phantom) -> None:
    for domain, codes in (("ct", ("L", "P", "S")), ("mr", ("L", "I", "A"))):
        for case in dataset.cases(domain):
            image, label = nib.load(case.image), nib.load(case.label)
            assert nib.aff2axcodes(image.affine) == codes
            np.testing.assert_array_equal(image.affine, label.affine)
            assert image.shape == label.shape
            assert image.get_data_dtype() == label.get_data_dtype() == np.int16
            values = set(np.unique(np.asarray(label.dataobj)).tolist())
            assert values == {0, 205, 420, 500, 550, 600, 820, 850}
    spacing = nib.affines.voxel_sizes(nib.load(dataset.cases("mr")[0].image).affine)
    assert spacing[2] > 1.4 * spacing[0]  # thick slices


def test_slices_stand_upright_through_the_reading_code(dataset: Phantom) -> None:
    grid = Grid(64, 3.5, 6.0)
    for domain in ("ct", "mr"):
        case = dataset.cases(domain)[0]
        image = load_image(case.image, dataset.reading, grid)
        labels = load_label(case.label, case.image, dataset.view(case.domain), image.placement)
        assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
        middle = {k: np.argwhere(labels == k).mean(0) for k in range(1, 5)}
        assert middle[4][1] < middle[3][1]  # the aorta rises above the ventricle
        assert middle[4][2] < middle[3][2]  # patient's left at the image's right
        assert middle[2][0] < middle[3][0]  # the atrium lies behind: slices run forward
        whole = read_label_volume(case.label, case.image, dataset.view(case.domain))
        assert set(np.unique(whole)) == {0, 1, 2, 3, 4}


def test_default_root_is_a_cache_with_version_and_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("GLUA_BENCH_DATA", "/elsewhere")
    assert Phantom().root == tmp_path / "phantom" / f"{code_digest(GENERATING)}-seed0"
    assert Phantom(seed=3).root.name.endswith("seed3")
    monkeypatch.delenv("GLUA_BENCH_CACHE")
    assert Phantom().root.is_relative_to(Path.home() / ".cache" / "glua-bench")


# -- determinism ----------------------------------------------------------------------------------


def test_a_subject_depends_on_nothing_but_seed_domain_and_id(root: Path, tmp_path: Path) -> None:
    for domain in ("mr", "ct"):  # another order, alone
        (tmp_path / f"{domain}_train").mkdir()
        write_subject(tmp_path, 0, domain, 1003, SCALE)
    made = snapshot(tmp_path)
    assert len(made) == 4
    assert made.items() <= snapshot(root).items()
    write_subject(tmp_path, 1, "ct", 1003, SCALE)
    assert snapshot(tmp_path) != made


@pytest.mark.fault("processes", "two processes generate the same phantom at once")
def test_two_processes_at_once_make_the_same_cohort(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    code = (
        "import sys; from pathlib import Path\n"
        "from glua_bench.datasets.phantom.dataset import generate\n"
        f"generate(Path(sys.argv[1]), ids={IDS!r}, voxel_scale={SCALE}, workers=1)"
    )
    command = [sys.executable, "-c", code, str(target)]
    racers = [subprocess.Popen(command) for _ in range(2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    assert snapshot(target) == snapshot(root)


def test_worker_processes_change_nothing(root: Path, tmp_path: Path) -> None:
    ids = {"ct": [1001], "mr": [1001]}
    lines: list[str] = []
    target = tmp_path / "parallel"
    generate(target, ids=ids, voxel_scale=SCALE, workers=2, report=lines.append)
    assert "2 processes" in lines[0] and not any("do not start" in line for line in lines)
    parallel = snapshot(tmp_path / "parallel")
    parallel.pop(MANIFEST)
    assert parallel.items() <= snapshot(root).items()


def test_prepare_replaces_what_is_missing_and_only_that(root: Path, tmp_path: Path) -> None:
    generate(tmp_path / "c", ids={"ct": [1001, 1003]}, voxel_scale=4.0, workers=1)
    before = snapshot(tmp_path / "c")
    kept = Phantom.image_path(tmp_path / "c", "ct", 1001)
    lost = Phantom.label_path(tmp_path / "c", "ct", 1003)
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    with pytest.raises(DataError, match="lacks 1 of 4 files"):
        Phantom(tmp_path / "c").cases("ct")
    lines: list[str] = []
    Phantom(tmp_path / "c").prepare(lines.append)
    assert snapshot(tmp_path / "c") == before
    assert kept.stat().st_mtime_ns == stamp
    assert any("ct_1003" in line for line in lines)
    lines.clear()
    Phantom(tmp_path / "c").prepare(lines.append)
    assert lines == []


def test_a_later_call_adds_ids(tmp_path: Path) -> None:
    generate(tmp_path, ids={"ct": [1001]}, voxel_scale=4.0, workers=1)
    generate(tmp_path, ids={"ct": [1002], "mr": [1001]}, voxel_scale=4.0, workers=1)
    assert Phantom(tmp_path).ids("ct") == (1001, 1002)
    assert read_checked_json(tmp_path / MANIFEST) == {
        "dataset": "phantom",
        "code": code_digest(GENERATING),
        "seed": 0,
        "voxel_scale": 4.0,
        "ids": {"ct": [1001, 1002], "mr": [1001]},
    }
    assert not (tmp_path / STARTED).exists()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # no temporary files


def test_a_cohort_of_four_test_cases_is_completed_and_a_chosen_one_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(root: Path, seed: int, domain: str, number: int, voxel_scale: float) -> None:
        for name in (Phantom.label_path, Phantom.image_path):
            name(root, domain, number).touch()

    monkeypatch.setattr(phantom, "write_subject", write)
    old = list(range(1001, 1021))
    for chosen, after in ((old, list(phantom.ALL_IDS)), (old[:-1], old[:-1])):
        place = tmp_path / str(len(chosen))
        generate(place, ids=dict.fromkeys(phantom.DOMAINS, chosen), workers=1)
        monkeypatch.setattr(phantom, "cores", lambda: 1)
        Phantom(place).prepare()
        for domain in phantom.DOMAINS:
            assert list(Phantom(place).ids(domain)) == after
            assert len(list(place.glob(f"{domain}_train/*.nii.gz"))) == 2 * len(after)


@pytest.mark.fault("silent damage", "the phantom's volumes in the cache")
def test_damaged_volumes_in_the_cache_are_generated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files in a directory of the user are the user's, as those of any data set."""
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "phantom" / "small"
    generate(place, ids={"ct": [1001, 1003]}, voxel_scale=SCALE, workers=1)
    before = snapshot(place)
    image, label = Phantom.image_path(place, "ct", 1001), Phantom.label_path(place, "ct", 1001)
    other = Phantom.label_path(place, "ct", 1003)
    for damage in ("flip", "exchange"):
        if damage == "flip":
            image.write_bytes(damaged(image.read_bytes(), 1))
        else:
            content = label.read_bytes()
            label.write_bytes(other.read_bytes()), other.write_bytes(content)
        Phantom(place).prepare()
        assert snapshot(place) == before
        told = capsys.readouterr().err
        assert f"{image if damage == 'flip' else label} is damaged (its checksum differs)" in told
    own = tmp_path / "own"
    generate(own, ids={"ct": [1001]}, voxel_scale=SCALE, workers=1)
    assert all(path.name[0] != "." for path in own.rglob("*"))
    Phantom.image_path(own, "ct", 1001).write_bytes(b"mine")
    Phantom(own).prepare()
    assert Phantom.image_path(own, "ct", 1001).read_bytes() == b"mine"


@pytest.mark.fault("two users", "a generated phantom used without permission to write")
def test_a_complete_phantom_needs_no_permission_to_write(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(shared / "cache"))
    place = shared / "cache" / "phantom" / "small"
    generate(place, ids={"ct": [1001]}, voxel_scale=SCALE, workers=1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "unlink"):  # which fail on a read-only file system also without effect
        monkeypatch.setattr(Path, name, refuse)
    with another_user(shared / "cache"):
        Phantom(place).prepare()
        assert Phantom(place).ids("ct") == (1001,)
        with pytest.raises(RunFailure) as error:
            generate(place, ids={"ct": [1002]}, voxel_scale=SCALE, workers=1)
    sentence(error, "GLUA_BENCH_CACHE")
    monkeypatch.undo()


def test_a_phantom_of_an_earlier_version_is_used_but_not_continued(tmp_path: Path) -> None:
    generate(tmp_path, ids={"ct": [1001]}, voxel_scale=SCALE, workers=1)
    old = {"dataset": "phantom", "version": 1, "seed": 0, "voxel_scale": SCALE}
    (tmp_path / MANIFEST).write_text(json.dumps({**old, "ids": {"ct": [1001], "mr": []}}))
    Phantom(tmp_path).prepare()
    assert Phantom(tmp_path).ids("ct") == (1001,)
    with pytest.raises(DataError) as error:
        generate(tmp_path, ids={"ct": [1001, 1002]}, voxel_scale=SCALE, workers=1)
    sentence(error, "another version generated")


@pytest.mark.fault("two versions", "another version's generator behind the same cache")
@pytest.mark.parametrize("name", ["anatomy", "shapes", "physics", "subjects"])
def test_the_generators_code_is_in_the_name_of_its_directory(name: str) -> None:
    assert f"glua_bench.datasets.phantom.{name}" in dict(identity.reached(GENERATING))
    assert "glua_bench.data.volumes" not in dict(identity.reached(GENERATING))  # which only reads


# -- errors ---------------------------------------------------------------------------------------


def test_cases_before_prepare_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        Phantom(tmp_path / "nothing").cases("ct")
    sentence(error, "data prepare")


@pytest.mark.fault("full disk", "while the phantom is generated")
def test_a_full_disk_is_not_taken_for_processes_that_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def full(work: Any, jobs: Any, processes: int) -> Any:
        attempts.append(processes)
        raise RunFailure("The disk is full.") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(phantom, "parallel_map", full)
    with pytest.raises(RunFailure, match="disk is full"):
        generate(tmp_path / "data", ids={"ct": [1001, 1002]}, voxel_scale=SCALE, workers=2)
    assert attempts == [2]


def test_another_seed_or_scale_is_refused(root: Path) -> None:
    with pytest.raises(DataError) as error:
        Phantom(root, seed=5).prepare()
    sentence(error, "seed 0", "seed 5")
    with pytest.raises(DataError, match="seed 5"):
        Phantom(root, seed=5).cases("ct")
    with pytest.raises(DataError) as error:
        generate(root, ids=IDS, voxel_scale=3.0)
    sentence(error, "voxel scale")


def test_foreign_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = Phantom.image_path(tmp_path, "ct", 1001)
    foreign.parent.mkdir()
    foreign.write_bytes(b"a patient")
    with pytest.raises(DataError) as error:
        Phantom(tmp_path).prepare()
    sentence(error, "files of something else")
    assert snapshot(tmp_path) == {"ct_train/ct_train_1001_image.nii.gz": b"a patient"}


@pytest.mark.fault("killed", "a generation of the phantom")
def test_an_interrupted_generation_goes_on_only_as_it_began(tmp_path: Path) -> None:
    plan = {"code": code_digest(GENERATING), "seed": 0, "voxel_scale": 4.0}
    write_checked_json(tmp_path / STARTED, plan)
    (tmp_path / "ct_train").mkdir()
    with pytest.raises(DataError) as error:
        generate(tmp_path, seed=1, ids={"ct": [1001]}, voxel_scale=4.0)
    sentence(error, "unfinished")
    generate(tmp_path, ids={"ct": [1001]}, voxel_scale=4.0, workers=1)
    assert Phantom(tmp_path).ids("ct") == (1001,)


@pytest.mark.fault("silent damage", "the phantom's manifest")
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1, "seed": 0, "ids": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError) as error:
        Phantom(tmp_path).cases("ct")
    sentence(error, MANIFEST)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFailure) as error:
            Phantom(place).prepare()
        sentence(error, "choose another directory with --data-root")


def test_layout_errors_name_directory_and_domain(dataset: Phantom, tmp_path: Path) -> None:
    class Elsewhere(MMWHSLayout):
        """The layout with all ids, as the real release has them."""

        name = "elsewhere"

        def prepare(self, report=lambda line: None) -> None:  # type: ignore[no-untyped-def]
            self.cases("ct")

    with pytest.raises(DataError) as error:
        Elsewhere(tmp_path).prepare()
    sentence(error, "ct_train")
    with pytest.raises(DataError) as error:
        Elsewhere(dataset.root).prepare()
    sentence(error, "ct_train_1002_image.nii.gz")
    with pytest.raises(DataError) as error:
        dataset.cases("us")
    sentence(error, "'us'")


def test_senseless_arguments_are_our_mistake(tmp_path: Path) -> None:
    for ids in ({"us": [1001]}, {"ct": [7]}):
        with pytest.raises(ValueError, match="1001 to 1036"):
            generate(tmp_path, ids=ids)
    with pytest.raises(ValueError, match="voxel_scale"):
        generate(tmp_path, voxel_scale=0.0)


# -- anatomy --------------------------------------------------------------------------------------


def subjects(count: int) -> list[anatomy.Subject]:
    return [anatomy.draw_subject(np.random.default_rng([7, k])) for k in range(count)]


def test_warps_are_invertible() -> None:
    points = np.random.default_rng(0).uniform(-120, 120, (2000, 3))
    step = 1e-3
    for subject in subjects(30):
        warp = subject.warp
        assert 0 < warp.lipschitz <= warp.LIMIT < 1
        columns = [
            (warp(points + step * axis) - warp(points - step * axis)) / (2 * step)
            for axis in np.eye(3)
        ]
        jacobian = np.linalg.det(np.stack(columns, -1))
        assert jacobian.min() >= (1 - warp.lipschitz) ** 3 > 0
        target = warp(points)
        back = target.copy()
        for _ in range(60):  # converges, because the displacement is a contraction
            back -= warp(back) - target
        np.testing.assert_allclose(back, points, atol=1e-6)
        assert np.abs(target - points).max() <= warp.reach


def test_the_fast_warp_is_the_warp() -> None:
    steps = np.array([[-2.0, 0.1, 0], [0, 2.1, 0.2], [0.1, 0, 3]])
    lattice = Lattice((9, 7, 8), steps, np.array([40.0, -30, 10]))
    warp = subjects(1)[0].warp
    slow = warp(np.moveaxis(lattice.points().astype(float), 0, -1))
    np.testing.assert_allclose(np.moveaxis(warp.on_lattice(lattice), 0, -1), slow, atol=1e-3)


def test_the_heart_has_adult_measures(dataset: Phantom) -> None:
    # Generous ranges of normal adults, in ml; the wall counts as volume too.
    ranges = {205: (60, 260), 420: (15, 140), 500: (50, 220), 820: (30, 140), 600: (60, 260)}
    for domain in ("ct", "mr"):
        for case in dataset.cases(domain):
            label = nib.load(case.label)
            data = np.asarray(label.dataobj)
            millilitres = abs(np.linalg.det(label.affine[:3, :3])) / 1000
            for value, (low, high) in ranges.items():
                assert low < (data == value).sum() * millilitres < high, (case.id, value)


def test_both_scanners_see_the_same_person_at_any_resolution() -> None:
    subject = subjects(1)[0]
    volumes = []
    for domain, scale in (("ct", 1.0), ("ct", 2.0), ("mr", 2.0)):
        rng = np.random.default_rng(0)
        volume = physics.ACQUIRE[domain](subject, rng, scale)
        millilitres = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
        values = (205, 420, 500, 820)
        volumes.append([(volume.label == value).sum() * millilitres for value in values])
    np.testing.assert_allclose(volumes[1], volumes[0], rtol=0.06)
    np.testing.assert_allclose(volumes[2], volumes[0], rtol=0.08)


def test_random_fields_have_unit_variance_and_ignore_the_resolution() -> None:
    coarse = Lattice((40, 40, 40), np.eye(3) * 4.0, np.zeros(3))
    fine = Lattice((80, 80, 80), np.eye(3) * 2.0, np.zeros(3))
    low, high = (
        smooth_field(np.random.default_rng(0), lattice, 12.0) for lattice in (coarse, fine)
    )
    assert 0.9 < low.std() < 1.1
    averaged = high.reshape(40, 2, 40, 2, 40, 2).mean((1, 3, 5))
    assert np.corrcoef(low.ravel(), averaged.ravel())[0, 1] > 0.99


# -- physics --------------------------------------------------------------------------------------


def test_bssfp_formula_agrees_with_the_bloch_equations() -> None:
    for t1, t2, tr, flip in ((1441.0, 290.0, 3.4, 60.0), (1030.0, 40.0, 4.2, 45.0)):
        e1, e2 = np.exp(-tr / t1), np.exp(-tr / t2)
        x, z = 0.0, 1.0
        for pulse in range(8000):
            a = np.radians(flip) * (1 if pulse % 2 else -1)
            x, z = x * np.cos(a) + z * np.sin(a), z * np.cos(a) - x * np.sin(a)
            after = abs(x)
            x, z = x * e2, 1 + (z - 1) * e1
        expected = after * np.exp(-0.5 * tr / t2)
        assert physics.bssfp_signal(t1, t2, 1.0, tr, flip) == pytest.approx(expected)
        prepared = physics.bssfp_signal(t1, t2, 0.5, tr, flip, preparation=30.0)
        assert prepared == pytest.approx(0.5 * expected * np.exp(-30 / t2))


def test_every_tissue_has_a_value_in_both_scanners() -> None:
    for draw in (physics.draw_hounsfield, physics.draw_signals):
        assert set(anatomy.TISSUES) <= set(draw(np.random.default_rng(0)))


def test_no_monotone_curve_maps_ct_to_mr() -> None:
    rising, falling = 0, 0
    for k in range(40):
        ct = physics.draw_hounsfield(np.random.default_rng([1, k]))
        mr = physics.draw_signals(np.random.default_rng([2, k]))
        # Fat, myocardium, blood: dark, middle, bright in CT; bright, dark, bright in MR.
        assert ct["epicardial_fat"][0] < ct["myocardium"][0] < ct["lv_blood"][0]
        assert abs(mr["myocardium"][0]) < abs(mr["epicardial_fat"][0])
        assert mr["myocardium"][0] < mr["lv_blood"][0]
        ratio = ct["rv_blood"][0] / ct["lv_blood"][0]
        rising, falling = rising + (ratio > 0.85), falling + (ratio < 0.5)
        assert 60 <= ct["rv_blood"][0] <= 450 and 250 <= ct["lv_blood"][0] <= 450
    assert rising > 5 and falling > 5  # the right heart is bright in some, washed out in others


def test_images_show_what_the_labels_say(dataset: Phantom) -> None:
    for case in dataset.cases("ct"):
        image, label = (np.asarray(nib.load(path).dataobj) for path in (case.image, case.label))
        assert 220 < np.median(image[label == 500]) < 500
        assert 60 < np.median(image[label == 205]) < 190
        assert np.percentile(image, 10) < -600
    for case in dataset.cases("mr"):
        image, label = (np.asarray(nib.load(path).dataobj) for path in (case.image, case.label))
        assert image.min() >= 0
        assert np.median(image[label == 500]) > 1.5 * np.median(image[label == 205])
