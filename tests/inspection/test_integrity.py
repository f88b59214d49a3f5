"""integrity.py and outliers.py: planted faults are found, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from glua_bench.console import Progress
from glua_bench.datasets.mscmr import MSCMR
from glua_bench.datasets.phantom.dataset import Phantom, generate
from glua_bench.inspection import outliers
from glua_bench.inspection.findings import Finding
from glua_bench.inspection.integrity import check_dataset
from glua_bench.task import Case

IDS = range(1001, 1009)
LATER = (1015, 1016)  # scans of other people, who are not in the cohort
SILENT = Progress(enabled=False)


class Cohort(Phantom):
    """Eight small phantoms of each domain, whether or not their files are there."""

    also: tuple[Case, ...] = ()
    subjects: dict[str, str] = {}

    def cases(self, domain: str) -> tuple[Case, ...]:
        made = [
            Case(
                f"{domain}_{number}",
                domain,
                self.image_path(self.root, domain, number),
                self.label_path(self.root, domain, number),
                self.split_of(domain, number),
                self.subjects.get(f"{domain}_{number}", f"{domain}_{number}"),
            )
            for number in IDS
        ]
        return (*made, *(case for case in self.also if case.domain == domain))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort without a fault, and scans of other people beside it."""
    root = tmp_path_factory.mktemp("cohort")
    everybody = [*IDS, *LATER]
    generate(root / "all", ids={"ct": everybody, "mr": everybody}, voxel_scale=4.0, workers=1)
    return root / "all"


@pytest.fixture
def cohort(originals: Path, tmp_path: Path) -> Cohort:
    """A copy to spoil."""
    shutil.copytree(originals, tmp_path / "data")
    return Cohort(tmp_path / "data")


def found(dataset: Cohort) -> set[tuple[str, str, tuple[str, ...]]]:
    """Severity, check and cases of everything that is found; every text is one sentence."""
    _, findings = check_dataset(dataset, SILENT)
    for finding in findings:
        assert_sentence(finding)
    return {(f.severity, f.check, f.cases) for f in findings}


def assert_sentence(finding: Finding) -> None:
    text = finding.text
    assert text.endswith(".") and "\n" not in text and ". " not in text, text


# -- tools to spoil files with --------------------------------------------------------------------


def files(root: Path, name: str) -> tuple[Path, Path]:
    """Image and label of a case."""
    domain, number = name.split("_")
    return Phantom.image_path(root, domain, int(number)), Phantom.label_path(
        root, domain, int(number)
    )


def change(
    path: Path,
    voxels: Callable[[np.ndarray], np.ndarray] | None = None,
    affine: Callable[[np.ndarray], np.ndarray] | None = None,
    to: Path | None = None,
) -> None:
    """Save a volume with other voxels or another affine."""
    image = nib.load(path)
    data, matrix = np.asarray(image.dataobj), image.affine.copy()
    data = data if voxels is None else voxels(data)
    matrix = matrix if affine is None else affine(matrix)
    nib.save(nib.Nifti1Image(data, matrix), to or path)


def both(root: Path, name: str, **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change image and label alike."""
    for path in files(root, name):
        change(path, **changes)


def scaled(*factors: float) -> Callable[[np.ndarray], np.ndarray]:
    """An affine with voxels that are larger by these factors."""
    return lambda affine: affine @ np.diag([*factors, 1.0])


def moved(*mm: float) -> Callable[[np.ndarray], np.ndarray]:
    """An affine that lies elsewhere."""

    def move(affine: np.ndarray) -> np.ndarray:
        affine[:3, 3] += mm
        return affine

    return move


def rotated(affine: np.ndarray) -> np.ndarray:
    """An affine turned by six degrees about the first axis."""
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    return turn @ affine


def put(value: float, place: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Voxels with one value at a place."""

    def voxels(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32 if value % 1 else data.dtype)
        data[place] = value
        return data

    return voxels


def relabelled(old: int, new: int) -> Callable[[np.ndarray], np.ndarray]:
    """Labels with one value replaced."""
    return lambda labels: np.where(labels == old, new, labels).astype(labels.dtype)


def take(dataset: Cohort, source: str, name: str) -> None:
    """Replace a case by a copy of another, image and label."""
    for old, new in zip(files(dataset.root, source), files(dataset.root, name), strict=True):
        shutil.copy(old, new)


def converted(dataset: Cohort, source: str, name: str) -> None:
    """As `take`, in float64, with swapped and reversed axes and a header that says so."""
    for old, new in zip(files(dataset.root, source), files(dataset.root, name), strict=True):
        image = nib.as_closest_canonical(nib.load(old))
        data = np.asarray(image.dataobj).astype(np.float64 if "image" in old.name else np.uint16)
        turned = nib.Nifti1Image(data, image.affine).as_reoriented(
            np.array([[2, -1], [0, 1], [1, -1]])
        )
        nib.save(turned, new)


def swapped_header(affine: np.ndarray) -> np.ndarray:
    """The voxel sizes of the second and third axis exchanged, directions kept."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, :3] = affine[:3, :3] / sides * sides[[0, 2, 1]]
    return affine


# -- twenty and more planted faults ---------------------------------------------------------------

Plant = Callable[[Cohort], None]
FAULTS: dict[str, tuple[Plant, set[tuple[str, str, tuple[str, ...]]]]] = {}


def fault(*expected: tuple[str, ...]) -> Callable[[Plant], Plant]:
    """Register a plant under its name with the expected findings: severity, check, cases."""

    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__.replace("_", " ")] = (
            plant,
            {(s, c, tuple(n)) for s, c, *n in expected},
        )
        return plant

    return register


IMAGE, LABEL, BOTH = slice(0, 1), slice(1, 2), slice(2)
CUBE = np.s_[2:4, 2:4, 2:4]


def plant(
    name: str, severity: str, check: str, case: str, parts: slice, *voxels: Any, **changes: Any
) -> None:
    """Register a change of a case's image, label or both, with the expected finding."""

    def spoil(data: Cohort) -> None:
        for path in files(data.root, case)[parts]:
            change(path, *voxels, **changes)

    FAULTS[name] = (spoil, {(severity, check, (case,))})


@fault(("problem", "image", "ct_1002"))
def truncated_file(data: Cohort) -> None:
    path = files(data.root, "ct_1002")[0]
    path.write_bytes(path.read_bytes()[:5000])


@fault(("problem", "image", "mr_1004"))
def no_nifti(data: Cohort) -> None:
    files(data.root, "mr_1004")[0].write_text("<html>404 Not Found</html>\n" * 40)


@fault(("problem", "label", "ct_1005"))
def label_missing(data: Cohort) -> None:
    files(data.root, "ct_1005")[1].unlink()


@fault(("problem", "image", "ct_1005"))
def image_missing(data: Cohort) -> None:
    files(data.root, "ct_1005")[0].unlink()


plant("several time points", "problem", "image", "mr_1002", IMAGE, lambda v: np.stack([v, v], -1))
plant("other shape", "problem", "label", "mr_1002", LABEL, lambda v: v[:, 1:])
plant("label header mirrored", "problem", "label", "ct_1003", LABEL, affine=scaled(-1, 1, 1))
plant(
    "label header elsewhere", "warning", "label geometry", "ct_1003", LABEL, affine=moved(0, 25, 0)
)
plant(
    "label header spacing", "warning", "label geometry", "ct_1007", LABEL, affine=scaled(1, 1, 1.2)
)
plant("label header at an angle", "warning", "label geometry", "mr_1001", LABEL, affine=rotated)


def header(
    path: Path,
    qform: np.ndarray | None = None,
    codes: tuple[int, int] | None = None,
    **fields: object,
) -> None:
    """Change what a header says, and no voxel."""
    image = nib.load(path)
    if qform is not None:
        image.set_qform(qform, 1)
    if codes is not None:
        image.header["qform_code"], image.header["sform_code"] = codes
    for name, value in fields.items():
        image.header[name] = value
    plain = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    nib.save(plain, path)


def quarter(path: Path) -> np.ndarray:
    """The affine of a file, turned by 90° about the third axis of the body."""
    affine = nib.load(path).affine.copy()
    affine[:3] = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]] @ affine[:3]
    return affine


@fault(("warning", "two geometries", "ct_1004"))
def qform_and_sform_that_differ(data: Cohort) -> None:
    for path in files(data.root, "ct_1004"):
        header(path, qform=moved(0, 40, 0)(nib.load(path).affine.copy()))


@fault(("warning", "two geometries", "ct_1004"))
def two_geometries_in_the_label_alone(data: Cohort) -> None:
    path = files(data.root, "ct_1004")[1]
    header(path, qform=quarter(path))


@fault(("warning", "two geometries", "mr_1003"), ("warning", "label geometry", "mr_1003"))
def label_that_follows_the_qform_of_its_image(data: Cohort) -> None:
    image, label = files(data.root, "mr_1003")
    beside = moved(0, 0, 35)(nib.load(image).affine.copy())
    header(image, qform=beside)
    header(label, qform=beside, codes=(1, 0))


@fault(("problem", "label", "mr_1003"), ("warning", "two geometries", "mr_1003"))
def label_that_follows_a_turned_qform(data: Cohort) -> None:
    image, label = files(data.root, "mr_1003")
    turned = quarter(image)
    header(image, qform=turned)
    header(label, qform=turned, codes=(1, 0))


@fault(("warning", "no geometry", "ct_1007"), ("problem", "label", "ct_1007"))
def no_geometry_in_the_image(data: Cohort) -> None:
    header(files(data.root, "ct_1007")[0], codes=(0, 0))


@fault(("warning", "no geometry", "mr_1005"), ("warning", "orientation", "mr_1005"))
def no_geometry_in_image_and_label(data: Cohort) -> None:
    for path in files(data.root, "mr_1005"):
        header(path, codes=(0, 0))


@fault(("warning", "voxel size", "ct_1002"))
def pixdim_against_the_sform(data: Cohort) -> None:
    path = files(data.root, "ct_1002")[0]
    header(path, codes=(0, 1), pixdim=[1, 1, 1, 5, 0, 0, 0, 0])


@fault(("problem", "image", "ct_1006"))
def gantry_tilt_left_in_the_header(data: Cohort) -> None:
    lean = np.eye(4)
    lean[1, 2] = np.tan(np.radians(20))
    both(data.root, "ct_1006", affine=lambda affine: lean @ affine)


@fault()
def a_header_in_micrometres(data: Cohort) -> None:
    for path in files(data.root, "mr_1006"):
        image = nib.load(path)
        small = nib.Nifti1Image(
            np.asarray(image.dataobj), np.diag([1000, 1000, 1000, 1]) @ image.affine
        )
        small.header.set_xyzt_units("micron")
        nib.save(small, path)


@fault(("warning", "size", "mr_1006"))
def a_header_in_micrometres_that_says_millimetres(data: Cohort) -> None:
    both(data.root, "mr_1006", affine=lambda affine: np.diag([20, 20, 20, 1]) @ affine)


plant("unknown label value", "problem", "label", "ct_1001", LABEL, put(7, CUBE))
plant("interpolated label", "problem", "label", "mr_1008", LABEL, put(204.6, CUBE))
plant("healthy case", "warning", "label without structures", "mr_1003", LABEL, np.zeros_like)


@fault(*(("warning", "label without structures", f"ct_{n}") for n in (1001, 1002, 1004, 1006)))
def half_of_the_cases_healthy(data: Cohort) -> None:
    for number in (1001, 1002, 1004, 1006):
        change(files(data.root, f"ct_{number}")[1], np.zeros_like)


@fault(*(("problem", "label without structures", f"ct_{n}") for n in range(1001, 1006)))
def labels_of_most_cases_empty(data: Cohort) -> None:
    for number in range(1001, 1006):
        change(files(data.root, f"ct_{number}")[1], np.zeros_like)


@fault(("problem", "swapped files", "mr_1007"))
def image_and_label_swapped_and_rounded(data: Cohort) -> None:
    image, label = files(data.root, "mr_1007")
    image.rename(data.root / "x.nii.gz")
    change(label, lambda v: v * np.float32(0.9999999), to=image)
    (data.root / "x.nii.gz").rename(label)


plant("forgotten structure", "warning", "structure missing", "mr_1003", LABEL, relabelled(820, 0))
plant("constant image", "problem", "image", "ct_1004", IMAGE, lambda v: np.full_like(v, 40))
plant("not a number", "problem", "image", "ct_1004", IMAGE, put(np.nan, (3, 4, 5)))


@fault(("warning", "empty slices", "ct_1006"))
def half_of_the_slices_lost(data: Cohort) -> None:
    change(files(data.root, "ct_1006")[0], lambda v: put(-1024, np.s_[..., : v.shape[2] // 2])(v))


plant("two slices lost", "warning", "empty slices", "mr_1006", IMAGE, put(0, np.s_[:, 9:11]))
plant(
    "slices lost beside the heart",
    "warning",
    "empty slices",
    "mr_1004",
    IMAGE,
    put(0, np.s_[:, 2:4]),
)


@fault(("warning", "empty slices", "ct_1001"))
def mostly_padding(data: Cohort) -> None:
    both(
        data.root,
        "ct_1001",
        voxels=lambda v: np.pad(v, ((0, 0), (0, 0), (40, 0)), constant_values=v.min()),
    )


@fault(("problem", "same image", "ct_1002", "ct_1003"))
def training_case_converted_into_the_test(data: Cohort) -> None:
    converted(data, "ct_1002", "ct_1003")


@fault(("warning", "same image", "mr_1002", "mr_1005"))
def training_case_twice(data: Cohort) -> None:
    take(data, "mr_1002", "mr_1005")


@fault(("problem", "same image", "ct_1005", "mr_1002"), ("warning", "intensities", "mr_1002"))
def one_scan_in_both_domains(data: Cohort) -> None:
    take(data, "ct_1005", "mr_1002")


@fault(("warning", "same label", "ct_1002", "ct_1006"))
def label_of_another_image(data: Cohort) -> None:
    take(data, "ct_1002", "ct_1006")
    noise = np.random.default_rng(0)
    change(files(data.root, "ct_1006")[0], lambda v: v + noise.integers(-9, 9, v.shape, v.dtype))


@fault(("problem", "same id", "mr_1004"), ("problem", "same file", "mr_1004"))
def one_case_twice(data: Cohort) -> None:
    data.also = (data.cases("mr")[3],)


@fault(("problem", "subject in two splits", "ct_1003", "ct_1007"))
def one_person_in_training_and_test(data: Cohort) -> None:
    data.subjects = {"ct_1003": "anna", "ct_1007": "anna"}


@fault(("problem", "subject in two splits", "ct_1005", "mr_1007"))
def one_person_in_training_and_in_the_other_domain_s_test(data: Cohort) -> None:
    data.subjects = {"ct_1005": "anna", "mr_1007": "anna"}


@fault(("problem", "swapped files", "mr_1007"))
def image_and_label_swapped(data: Cohort) -> None:
    image, label = files(data.root, "mr_1007")
    image.rename(data.root / "x.nii.gz")
    label.rename(image)
    (data.root / "x.nii.gz").rename(label)


plant("mask for an image", "warning", "few values", "ct_1008", IMAGE, lambda v: np.uint8(v > 0))


@fault(("warning", "intensities", "mr_1005"))
def ct_among_mr(data: Cohort) -> None:
    take(data, "ct_1015", "mr_1005")


@fault(("warning", "intensities", "ct_1005"))
def mr_among_ct(data: Cohort) -> None:
    take(data, "mr_1016", "ct_1005")


@fault(("warning", "intensities", "ct_1006"))
def units_without_the_intercept(data: Cohort) -> None:
    change(files(data.root, "ct_1006")[0], lambda v: np.uint16(v + 1024))


plant("headers in centimetres", "warning", "size", "ct_1004", BOTH, affine=scaled(0.1, 0.1, 0.1))
plant("spacing doubled in the plane", "warning", "size", "mr_1006", BOTH, affine=scaled(2, 2, 1))
plant("spacings of two axes exchanged", "warning", "size", "mr_1002", BOTH, affine=swapped_header)
plant("label mirrored", "warning", "orientation", "ct_1007", LABEL, lambda v: v[::-1])
plant(
    "image and label upside down", "warning", "orientation", "mr_1008", BOTH, lambda v: v[:, ::-1]
)
plant("axes exchanged", "warning", "orientation", "ct_1002", BOTH, lambda v: v.transpose(1, 0, 2))
plant("label shifted", "warning", "label fit", "ct_1004", LABEL, lambda v: np.roll(v, 5, 0))


@fault(("warning", "size of domains"))
def every_mr_header_wrong(data: Cohort) -> None:
    for number in IDS:
        both(data.root, f"mr_{number}", affine=scaled(1.6, 1.6, 1))


@fault(("warning", "orientation of domains"))
def every_ct_mirrored(data: Cohort) -> None:
    for number in IDS:
        both(data.root, f"ct_{number}", voxels=lambda v: v[::-1])


@fault(("warning", "structure missing"))
def structure_with_another_value_in_half_of_the_labels(data: Cohort) -> None:
    for number in range(1001, 1005):
        change(files(data.root, f"ct_{number}")[1], relabelled(420, 550))


def test_nothing_is_found_where_nothing_is_wrong(cohort: Cohort) -> None:
    measured, findings = check_dataset(cohort, SILENT)
    assert len(measured) == 16 and findings == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(cohort: Cohort, name: str) -> None:
    plant, expected = FAULTS[name]
    plant(cohort)
    assert found(cohort) == expected


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("qform and sform that differ", "two geometries", "differ by up to 40 mm; the sform"),
        ("label that follows the qform of its image", "label geometry",
         "is offset by 35 mm (it matches the qform of its image, but the sform is used)"),
        ("label that follows a turned qform", "label", "it matches the qform of its image"),
        ("no geometry in image and label", "no geometry", "is assumed to be LAS"),
        ("pixdim against the sform", "voxel size", "voxels of 1×1×5 mm according to its pixdim"),
        ("gantry tilt left in the header", "image", "° instead of 90°"),
    ],
)  # fmt: skip
def test_a_finding_says_what_the_header_says(
    cohort: Cohort, name: str, check: str, words: str
) -> None:
    FAULTS[name][0](cohort)
    told = [f.text for f in check_dataset(cohort, SILENT)[1] if f.check == check]
    assert len(told) == 1 and words in told[0]


def test_volumes_are_those_of_the_unit(cohort: Cohort) -> None:
    before = {one.case.id: one for one in check_dataset(cohort, SILENT)[0]}["mr_1006"]
    FAULTS["a header in micrometres"][0](cohort)
    after = {one.case.id: one for one in check_dataset(cohort, SILENT)[0]}["mr_1006"]
    assert after.image.spacing == pytest.approx(before.image.spacing)
    ml = [[s.ml for s in one.label.structures] for one in (before, after)]
    assert ml[0] == pytest.approx(ml[1]) and min(ml[0]) > 0
    path = files(cohort.root, "mr_1006")[1]
    image = nib.load(path)
    voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1e9 / 1000
    count = np.isin(np.asarray(image.dataobj), Phantom.structures[0].values).sum()
    assert ml[1][0] == pytest.approx(count * voxel, rel=1e-5)


# -- scanners -------------------------------------------------------------------------------------


def uneven(data: np.ndarray) -> np.ndarray:
    """A receive coil that is near to one side."""
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in data.shape), indexing="ij")
    return data * np.exp(0.6 * grid[0] - 0.5 * grid[1])


def padded(data: np.ndarray) -> np.ndarray:
    """Values outside of a circle replaced, as reconstructions do."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in data.shape[:2]), indexing="ij")
    return np.where((np.hypot(x, y) > 1.2)[..., None], data.min() - 1000, data)


SCANNERS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "ct": ("ct", lambda v: v),
    "ct stored from 0": ("ct", lambda v: v + 1024),
    "ct clipped": ("ct", lambda v: v.clip(-1000, 400)),
    "ct between 0 and 1": ("ct", lambda v: (v.clip(-1000, 1000) + 1000) / 2000),
    "ct with a padded corner": ("ct", padded),
    "mr": ("mr", lambda v: v),
    "mr seven times as bright": ("mr", lambda v: v * 7),
    "mr standardised": ("mr", lambda v: (v - v.mean()) / v.std()),
    "mr with a surface coil": ("mr", uneven),
    "mr with bright noise": ("mr", lambda v: v**0.7),
}


def rescan(root: Path, domain: str, scan: Callable[[np.ndarray], np.ndarray]) -> None:
    """Every image of a domain, those of further people too, as another scanner gives it."""
    for number in (*IDS, *LATER):
        change(
            files(root, f"{domain}_{number}")[0],
            lambda v: scan(v.astype(np.float64)).astype(np.float32),
        )


@pytest.mark.parametrize("name", SCANNERS)
def test_a_scan_of_the_wrong_modality_is_known_by_its_intensities_alone(
    cohort: Cohort, name: str
) -> None:
    """Whatever the scanner: its own images raise no alarm, one among those of the other does."""
    domain, scan = SCANNERS[name]
    rescan(cohort.root, domain, scan)
    assert found(cohort) == set()
    other = {"ct": "mr", "mr": "ct"}[domain]
    take(cohort, f"{domain}_1015", f"{other}_1006")
    assert found(cohort) == {("warning", "intensities", (f"{other}_1006",))}


def test_a_narrow_scan_is_no_other_modality(cohort: Cohort) -> None:
    """Its body is another part of the body, but the structures' surroundings are the same."""
    for path in files(cohort.root, "mr_1001"):
        volume = nib.load(path)
        window = tuple(slice(length // 4, length - length // 4) for length in volume.shape)
        nib.save(volume.slicer[window], path)
    measured, findings = check_dataset(cohort, SILENT)
    assert findings == []
    body = outliers._distribution_anomalies(
        {d: [f for f in measured if f.case.domain == d] for d in ("mr", "ct")},
        lambda one: one.image.levels if one.image is not None else (),
    )
    assert body[cohort.cases("mr")[0]] != ""  # from the body alone it would be one


def test_scales_of_mr_may_differ_between_cases(cohort: Cohort) -> None:
    for number in IDS:
        change(
            files(cohort.root, f"mr_{number}")[0],
            lambda v: v.astype("<i4") * 10 ** (v.shape[0] % 3),
        )
    assert found(cohort) == set()


# -- few cases, no labels, few structures ----------------------------------------------------------


def test_few_cases_are_not_compared(phantom_root: Path, tmp_path: Path) -> None:
    """With two others there is no telling who is odd."""
    shutil.copytree(phantom_root, tmp_path / "few")
    both(tmp_path / "few", "ct_1001", affine=scaled(2, 2, 2))
    assert check_dataset(Phantom(tmp_path / "few"), SILENT)[1] == []


class Unlabelled(Cohort):
    """The same, with training cases of MR without a label."""

    def cases(self, domain: str) -> tuple[Case, ...]:
        made = super().cases(domain)
        if domain == "ct":
            return made
        return tuple(replace(c, label=None) if c.split == "train" else c for c in made)


def test_cases_without_a_label_are_judged_by_their_images(cohort: Cohort) -> None:
    data = Unlabelled(cohort.root)
    assert found(data) == {("warning", "empty role", ())}  # such a domain is no source
    shutil.copy(files(data.root, "ct_1015")[0], files(data.root, "mr_1005")[0])
    assert found(data) - {("warning", "empty role", ())} == {
        ("warning", "intensities", ("mr_1005",))
    }


def test_a_test_case_needs_a_label(cohort: Cohort) -> None:
    class NoTest(Cohort):
        def cases(self, domain: str) -> tuple[Case, ...]:
            made = super().cases(domain)
            return tuple(replace(c, label=None) if c.split == "test" else c for c in made)

    assert found(NoTest(cohort.root)) == {
        ("problem", "label", (f"{domain}_{number}",))
        for domain, number in (("ct", 1003), ("ct", 1008), ("mr", 1007))
    }


def test_one_label_may_serve_the_sequences_of_a_person(cohort: Cohort) -> None:
    """By one file, or by copies of it; the label of another person is still told."""
    image, label = files(cohort.root, "mr_1002")
    noise = np.random.default_rng(0)
    later = []
    for name, person in (("mr_t2", "mr_1002"), ("mr_t3", "mr_1002"), ("mr_t4", "somebody")):
        own = cohort.root / f"{name}.nii.gz"
        change(image, lambda v: v + noise.integers(0, 9, v.shape, v.dtype), to=own)
        labels = label if name == "mr_t2" else cohort.root / f"{name}_label.nii.gz"
        if labels != label:
            shutil.copy(label, labels)
        later.append(Case(name, "mr", own, labels, "train", person))
    cohort.also = tuple(later[:2])
    assert not found(cohort)
    cohort.also = tuple(later)
    assert found(cohort) == {("warning", "same label", ("mr_1002", "mr_t2", "mr_t3", "mr_t4"))}
    cohort.also = (replace(later[0], subject="somebody"),)
    assert found(cohort) == {("problem", "same file", ("mr_1002", "mr_t2"))}
    cohort.also = (replace(later[0], image=image),)
    assert found(cohort) == {("problem", "same file", ("mr_1002", "mr_t2"))}


def test_one_structure_is_enough_to_find_odd_sizes_and_raises_no_alarm(cohort: Cohort) -> None:
    for kept in Phantom.structures:
        ignored = [v for s in Phantom.structures if s is not kept for v in s.values]

        class One(Cohort):
            structures = (kept,)
            reading = replace(
                Phantom.reading, ignored_values=(*Phantom.reading.ignored_values, *ignored)
            )

        assert found(One(cohort.root)) == set()
    both(cohort.root, "ct_1004", affine=scaled(2, 2, 2))
    assert found(One(cohort.root)) == {("warning", "size", ("ct_1004",))}


def test_a_stored_orientation_asks_no_header(cohort: Cohort) -> None:
    """Its header is known to be wrong, so that those of image and label need not agree."""

    class Stored(Cohort):
        reading = replace(Phantom.reading, orientation="stored")

    before = found(Stored(cohort.root))
    change(files(cohort.root, "ct_1003")[1], affine=moved(0, 25, 0))
    assert found(Stored(cohort.root)) == before
    assert found(cohort) == {("warning", "label geometry", ("ct_1003",))}


def test_processes_find_the_same(cohort: Cohort) -> None:
    FAULTS["label mirrored"][0](cohort)
    alone, together = (check_dataset(cohort, SILENT, jobs) for jobs in (1, 2))
    assert repr(alone) == repr(together) and len(alone[1]) == 1  # nan is not itself


# -- real patients ---------------------------------------------------------------------------------


@pytest.fixture
def real() -> MSCMR:
    if not os.environ.get("GLUA_BENCH_DATA"):
        pytest.skip("set GLUA_BENCH_DATA to the directory that holds mscmr to test real patients")
    return MSCMR()


@pytest.mark.realdata
def test_real_patients_raise_no_alarm(real: MSCMR) -> None:
    assert [(f.check, len(f.cases)) for f in check_dataset(real, SILENT)[1]] == []


@pytest.mark.realdata
def test_the_wrong_spacing_of_bssfp_is_known_by_the_hearts(real: MSCMR) -> None:
    """Its headers make hearts 1.7 times as wide as in LGE; the dataset states the right spacing."""

    class Trusting(MSCMR):
        reading = replace(MSCMR.reading, stated_spacing=None)

    (finding,) = check_dataset(Trusting(real.root), SILENT)[1]
    assert finding.check == "size of domains" and not finding.problem
    assert "headers of one domain may be wrong" in finding.text
    ratio = [float(value) for value in finding.text.split(" are ")[1].split(" times")[0].split("×")]
    assert ratio[0] == pytest.approx(1.0, abs=0.15)  # the distance of slices is right
    assert ratio[1:] == pytest.approx([1.7, 1.7], abs=0.1)
