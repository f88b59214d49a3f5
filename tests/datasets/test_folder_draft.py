"""folder/draft.py: descriptions drafted from files and answers."""

from __future__ import annotations

import json
import shutil
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glua_bench.cli import scaffold
from glua_bench.conformance import run_dataset_checks
from glua_bench.console import Progress
from glua_bench.console import ask as put
from glua_bench.datasets.folder.sources import DraftDomain
from glua_bench.datasets.folder.splitting import draw_splits
from glua_bench.errors import ConfigError, DataError
from glua_bench.inspection.integrity import check_dataset
from glua_bench.inspection.nnunet import export
from glua_bench.registry import Registry
from glua_bench.task import Ask, Dataset, role_fault

VALUES = {"ct": (1, 4), "mr": (1, 4)}


@pytest.fixture
def volumes(tmp_path: Path) -> Callable[..., Path]:
    """Writes volumes of p1 to p6 in two domains, with two organs and a stray value."""

    def write(values: dict[str, tuple[int, int]] = VALUES, same: bool = True) -> Path:
        rng = np.random.default_rng(0)
        for domain, air in (("ct", -1000), ("mr", 0)):
            folder = tmp_path / "vols" / domain
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(1, 7):
                scan = np.full((40, 44, 6), air, np.int16)
                scan[8:32, 8:36] = air + 1040
                scan += rng.integers(0, 20, scan.shape).astype(np.int16)
                scan[:2] = air + 1400
                label = np.zeros(scan.shape, np.int16)
                label[12:20, 12:24, 1:5], label[24:28, 12:24, 1:5] = values[domain]
                label[0, 0, 0] = 9
                who = f"p{number}" if same else f"{domain}{number}"
                affine = np.diag([5, 5, 8 if domain == "mr" else 4, 1])
                nib.save(nib.Nifti1Image(scan, affine), folder / f"{who}_image.nii.gz")
                nib.save(nib.Nifti1Image(label, affine), folder / f"{who}_label.nii.gz")
        return tmp_path / "vols"

    return write


def answers(structures: str = "", same: str = "") -> Ask:
    """Return a function that gives these answers and otherwise accepts the guess."""

    def ask(question: str, guess: str, read: Callable[[str], Any]) -> Any:
        given = structures if "name=value" in question else same if "same" in question else ""
        return read(given or guess)

    return ask


def by_domain(**structures: str) -> Ask:
    """Return a function that names each domain's structures and otherwise accepts the guess."""

    def ask(question: str, guess: str, read: Callable[[str], Any]) -> Any:
        return read(structures[question[:2]] if "name=value" in question else guess)

    return ask


def written(folder: Path, data: Path, ask: Ask | None = None) -> Dataset:
    file = scaffold.new_description("livers", folder, data, ask or answers())
    return Registry("dataset", [file]).load("livers")()


def test_guesses_make_a_dataset_that_passes_every_check(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    data = volumes(same=False)
    own = written(tmp_path, data, answers("liver=1,spleen=4"))
    assert [(s.name, s.title, s.values) for s in own.structures_of("mr")] == [
        ("LIV", "liver", (1,)),
        ("SPL", "spleen", (4,)),
    ]
    assert own.directions == ("ct-mr", "mr-ct") and own.root == data
    assert own.reading_of("ct").intensity_range == (-125, 275)
    assert own.reading_of("mr").intensity_range is None
    assert own.reading_of("ct").ignored_values == (9,)
    grid = own.grid("quick")
    assert (grid.size * grid.spacing, grid.slice_spacing) == (220, 8)
    for domain in own.domains():
        assert [len(own.split(domain, s)) for s in ("train", "val", "test")] == [4, 1, 1]
    file = tmp_path / "livers.yaml"
    results = run_dataset_checks("livers", plugins=[file])
    assert not [(r.check, r.message) for r in results if not r.passed]
    assert "# Citation of the data." in file.read_text()


def test_label_values_that_storage_rounded_lose_no_class(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    data = volumes(same=False)
    for file in data.glob("*/*_label.nii.gz"):
        label: Any = nib.load(file)
        values = np.asarray(label.dataobj, np.float32)
        nib.save(nib.Nifti1Image(values * np.float32(0.99999), label.affine), file)
    own = written(tmp_path, data)
    assert [s.values for s in own.structures] == [(), (), ()]
    assert [s.values for s in own.structures_of("ct")] == [(1,), (4,), (9,)]


def test_an_answer_may_say_what_nobody_annotated(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    questions: list[str] = []

    def ask(question: str, guess: str, read: Callable[[str], Any]) -> Any:
        asked = "name=value" in question
        questions.extend([guess] * asked)
        return read("liver=1,unannotated=9,spleen=4" if asked and len(questions) == 1 else guess)

    own = written(tmp_path, volumes(), ask)
    assert questions[1] == "liver=1,unannotated=9,spleen=4"
    for domain in own.domains():
        assert [s.title for s in own.structures_of(domain)] == ["liver", "spleen"]
        reading = own.reading_of(domain)
        assert (reading.unannotated_values, reading.ignored_values) == ((9,), ())
    with pytest.raises(ConfigError, match="'unannotated=9' has no structure"):
        written(tmp_path / "none", tmp_path / "vols", answers("unannotated=9"))


def test_healthy_cases_hide_no_structure(tmp_path: Path, volumes: Callable[..., Path]) -> None:
    data = volumes()
    for file in sorted(data.glob("*/*_label.nii.gz")):
        if not file.name.startswith("p3"):
            label: Any = nib.load(file)
            nib.save(nib.Nifti1Image(np.zeros(label.shape, np.int16), label.affine), file)
    own = written(tmp_path, data, answers("liver=1,spleen=4"))
    assert [s.values for s in own.structures_of("mr")] == [(1,), (4,)]


def test_an_answer_may_merge_label_values(tmp_path: Path, volumes: Callable[..., Path]) -> None:
    own = written(tmp_path, volumes(), answers("organ=1,4"))
    assert [s.values for s in own.structures_of("mr")] == [(1, 4)]
    assert own.reading_of("mr").ignored_values == (9,)
    assert "background: [9]" in (tmp_path / "livers.yaml").read_text()


def test_a_person_is_on_one_side_in_all_domains(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    own = written(tmp_path, volumes())
    splits = [{c.subject: c.split for c in own.cases(d)} for d in own.domains()]
    assert splits[0] == splits[1] and set(splits[0]) == {f"{n}" for n in ("p1", "p2")} | set(
        splits[0]
    )
    apart = written(tmp_path / "apart", tmp_path / "vols", answers(same="no"))
    assert not {c.subject for c in apart.cases("ct")} & {c.subject for c in apart.cases("mr")}


def test_values_that_differ_are_not_guessed(tmp_path: Path, volumes: Callable[..., Path]) -> None:
    data = volumes({"ct": (1, 4), "mr": (63, 252)})
    with pytest.raises(ConfigError, match="mr: the label values differ from the previous domain'"):
        written(tmp_path, data)
    assert not (tmp_path / "livers.yaml").exists()

    ct = "liver=1,spleen=4"
    own = written(tmp_path, data, by_domain(ct=ct, mr="spleen=252,liver=63"))
    assert [s.values for s in own.structures_of("mr")] == [(63,), (252,)]
    with pytest.raises(ConfigError, match="mr: the structures must be liver, spleen"):
        written(tmp_path / "other", data, by_domain(ct=ct, mr="spleen=252,lung=63"))


def test_a_domain_without_labels_trains_and_is_not_tested_on(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    data = volumes()
    for number in range(1, 5):
        (data / "mr" / f"p{number}_label.nii.gz").unlink()
    own = written(tmp_path, data)
    assert [c.label is None for c in own.cases("mr")] == [True] * 4 + [False] * 2
    assert all(c.label for c in own.split("mr", "test")) and own.split("mr", "test")


def nnunet_folders(root: Path, data: Path, labels: dict[str, object]) -> Path:
    """Copy both domains into nnU-Net folders."""
    for number, domain in enumerate(("ct", "mr"), start=1):
        folder = root / f"Dataset00{number}_{domain.upper()}"
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for n in range(1, 7):
            end = "Ts" if n > 4 else "Tr"
            shutil.copy(
                data / domain / f"p{n}_image.nii.gz", folder / f"images{end}/p{n}_0000.nii.gz"
            )
            shutil.copy(data / domain / f"p{n}_label.nii.gz", folder / f"labels{end}/p{n}.nii.gz")
        facts = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": domain}}
        (folder / "dataset.json").write_text(json.dumps(facts))
    return root


def test_folders_of_nnunet_are_described_by_their_names(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    labels = {"background": 0, "Liver": 1, "spleen": 4, "stray": 9}
    own = written(tmp_path, nnunet_folders(tmp_path / "raw", volumes(), labels))
    assert [s.title for s in own.structures] == ["liver", "spleen", "stray"]
    assert [c.id for c in own.split("mr", "test")] == ["mr_p5", "mr_p6"]
    assert len(own.split("ct", "val")) == 1


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (
            ("Gef\u00e4\u00df (re.)", "kidney, left", 'a="b"'),
            ["gef\u00e4\u00df (re.)", "kidney left", 'a "b"'],
        ),
        (("1", "2", "3"), ["label_1", "label_4", "label_9"]),
        (("a b", "a,b", "c"), ["label_1", "label_4", "label_9"]),
    ],
)
def test_names_of_nnunet_are_proposed_as_answers(
    tmp_path: Path, volumes: Callable[..., Path], names: tuple[str, ...], titles: list[str]
) -> None:
    """Proposals are valid answers for any label names."""
    labels = {"background": 0, **dict(zip(names, (1, 4, 9), strict=True))}
    own = written(tmp_path, nnunet_folders(tmp_path / "raw", volumes(), labels))
    assert [s.title for s in own.structures] == titles
    assert [s.values for s in own.structures_of("mr")] == [(1,), (4,), (9,)]


def test_folders_of_nnunet_that_name_nothing_alike_are_asked_about(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    root = nnunet_folders(tmp_path / "raw", volumes(), {"background": 0, "liver": 1, "kidney": 4})
    file = sorted(root.iterdir())[1] / "dataset.json"
    file.write_text(file.read_text().replace("liver", "Leber").replace("kidney", "Niere"))
    with pytest.raises(ConfigError, match="previous domain's; answer the questions"):
        written(tmp_path, root)
    own = written(tmp_path, root, answers("liver=1,kidney=4"))
    assert [s.values for s in own.structures_of("mr")] == [(1,), (4,)]


def test_negative_label_values_are_proposed(tmp_path: Path, volumes: Callable[..., Path]) -> None:
    own = written(tmp_path, volumes({"ct": (-1, 4), "mr": (-1, 4)}))
    assert [s.values for s in own.structures_of("ct")] == [(-1,), (4,), (9,)]


def test_ignore_of_nnunet_is_no_structure_and_no_background(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    labels = {"background": 0, "organs": [1, 4], "ignore": 9}
    own = written(tmp_path, nnunet_folders(tmp_path / "raw", volumes(), labels))
    assert [(s.title, s.values) for s in own.structures_of("mr")] == [("organs", (1, 4))]
    reading = own.reading_of("mr")
    assert reading.unannotated_values == (9,) and reading.ignored_values == ()


def test_regions_of_nnunet_that_overlap_are_proposed_by_value(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    labels = {"background": 0, "whole": [1, 4, 9], "core": [4, 9]}
    own = written(tmp_path, nnunet_folders(tmp_path / "raw", volumes(), labels))
    assert [s.values for s in own.structures_of("mr")] == [(1,), (4,), (9,)]
    assert [s.title for s in own.structures] == ["label_1", "label_4", "label_9"]


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("Plane", "oblique", "'oblique' is not valid; answer axial or coronal or"),
        ("Side", "wide", "'wide' is not a length; enter a number in mm, such as"),
        ("Distance", "-1", "'-1' is not a length"),
        ("intensities", "275 -125", "'275 -125' is not a window; enter two increasing"),
        ("intensities", "much", "'much' is not a window"),
        ("same", "perhaps", "'perhaps' is not valid; answer yes or no."),
        ("images,", "ct/p1.nii", "'images' needs a * in place of the case's id"),
        ("images,", "pet/*.nii", "matches pet/*.nii"),
        ("labels,", "/x/*.nii", "'labels' must be relative to the root"),
        ("labels,", "ct/*_x.nii.gz", "matches ct/*_x.nii.gz"),
        ("hold", "liver", "ct: 'liver' is not of the form name=value"),
    ],
)
def test_an_answer_that_cannot_be_used_is_asked_again(
    tmp_path: Path,
    volumes: Callable[..., Path],
    question: str,
    answer: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[str] = []

    def typed(prompt: str) -> str:
        asked = question in prompt.split() and answer not in given
        given.append(answer if asked else "")
        return given[-1]

    monkeypatch.setattr("builtins.input", typed)
    file = scaffold.new_description("livers", tmp_path, volumes(), put)
    assert said in capsys.readouterr().out and given.count(answer) == 1
    assert Registry("dataset", [file]).load("livers")().cases("mr")


def test_directories_that_show_no_task_are_told(
    tmp_path: Path, volumes: Callable[..., Path]
) -> None:
    with pytest.raises(
        DataError, match="none is not a directory: pass that of your files with --d"
    ):
        written(tmp_path, tmp_path / "none")
    with pytest.raises(DataError, match="holds no volumes: give a directory with files of type"):
        written(tmp_path, tmp_path)
    data = volumes()
    with pytest.raises(DataError, match="No two domains are recognisable among the 12"):
        written(tmp_path, data / "ct")
    for path in data.rglob("*_label*"):
        path.unlink()
    with pytest.raises(DataError, match="No file of ct or mr looks like a label"):
        written(tmp_path, data)


# -- what is written finds what was seen, and passes its own check --------------------------------

SIZE = (12, 14, 5)


def scan(path: Path, values: tuple[int, ...] = (1,)) -> None:
    """Write a small image, or a small label if the path names one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(str(path).encode()))
    image = rng.integers(0, 400, SIZE).astype(np.int16)
    if any(word in f"{path.parent.name}/{path.name}" for word in ("label", "_seg", "gt/", "_gt")):
        image = np.zeros(SIZE, np.int16)
        for index, value in enumerate(values):
            image[2 + 3 * index : 4 + 3 * index, 3:9, 1:4] = value
        image[2, 3, 1] = 0 if rng.random() < 0.5 else values[0]
        image[3, 3 + rng.integers(6), 1 + rng.integers(3)] = 0
    nib.save(nib.Nifti1Image(image, np.diag([2, 2, 3, 1])), path)


def scans(root: Path, *names: str) -> Path:
    for name in names:
        scan(root / name)
    return root


def files_of(data: Dataset) -> set[Path]:
    cases = [case for domain in data.domains() for case in data.cases(domain)]
    return {file for case in cases for file in (case.image, case.label) if file is not None}


def splits_of(data: Dataset, domain: str) -> dict[str, str]:
    return {case.id.removeprefix(f"{domain}_"): case.split for case in data.cases(domain)}


def problems(data: Dataset) -> list[str]:
    return [f.text for f in check_dataset(data, Progress(enabled=False))[1] if f.problem]


def pairs(*forms: str, count: int = 3) -> list[str]:
    return [form.format(n) for form in forms for n in range(1, count + 1)]


NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "names",
    [
        pairs("ct/p{}_image.nii.gz", "ct/p{}_label.nii.gz", "mr/p{}_image.nii", "mr/p{}_label.nii"),
        # Flat, the modality within the names.
        pairs("{}_ct_a.nii", "{}_ct_a_label.nii", "{}_mr_a.nii", "{}_mr_a_label.nii"),
        pairs("ct_{}.nii", "ct_{}_seg.nii", "mr_{}.nii", "mr_{}_seg.nii"),
        # A prefix that all ids share, and the other domain's names begin alike.
        pairs(
            "case1_ct_x{}.nii", "case1_ct_x{}_seg.nii", "case1_mr_x{}.nii", "case1_mr_x{}_seg.nii"
        ),
        # Several hospitals, several depths.
        [
            *("ct/a/s1.nii", "ct/a/s2.nii", "ct/b/s3.nii", "ct/gt/s1.nii", "ct/gt/s2.nii"),
            *("ct/gt/s3.nii", "mr/deep/er/1.nii", "mr/2.nii", "mr/gt/1.nii", "mr/gt/2.nii"),
        ],
        # Compressed and not.
        [
            *("ct/1_i.nii", "ct/2_i.nii.gz", "ct/1_seg.nii.gz", "ct/2_seg.nii"),
            *pairs("mr/{}_i.nii", "mr/{}_seg.nii"),
        ],
        # One case in a domain, one label in another.
        [
            "ct/p1_image.nii",
            "ct/p1_label.nii",
            *pairs("mr/{}.nii"),
            "mr/2_label.nii",
            "mr/3_label.nii",
        ],
        pairs("[1] ct/{}.nii", "[1] ct/{}_label.nii", "[2] mr/{}.nii", "[2] mr/{}_label.nii"),
        pairs("ct/(x)+ {}?.nii", "ct/(x)+ {}?_seg.nii", "mr/{}.nii", "mr/{}_seg.nii"),
        [
            *(f"ct/{NFD}{n}_image.nii" for n in (1, 2, 3)),
            *(f"ct/{NFC}{n}_label.nii" for n in (1, 2, 3)),
            *pairs("mr/{}.nii", "mr/{}_seg.nii"),
        ],
        pairs("ct/00{}/ct.nii", "ct/00{}/ct_seg.nii", "mr/00{}/mr.nii", "mr/00{}/mr_seg.nii"),
    ],
)
def test_what_is_written_finds_what_was_seen_and_passes_its_own_check(
    tmp_path: Path, names: list[str]
) -> None:
    data = scans(tmp_path / "vols [x]", *names)
    for name in names:  # macOS's shadows, on foreign disks
        shadow = (data / name).parent / f"._{Path(name).name}"
        shadow.write_bytes(b"Mac OS X")
    own = written(tmp_path, data)
    assert files_of(own) == {data / name for name in names}
    assert problems(own) == []
    for direction in own.directions:
        assert role_fault(own, direction) == ""


def test_linked_folders_are_described_too(tmp_path: Path) -> None:
    store = scans(tmp_path / "store", *pairs("a/{}_image.nii", "a/{}_label.nii"))
    data = scans(tmp_path / "vols", *pairs("mr/{}_image.nii", "mr/{}_label.nii"))
    (data / "ct").symlink_to(store / "a", target_is_directory=True)
    (store / "a" / "loop").symlink_to(data, target_is_directory=True)
    own = written(tmp_path, data)
    assert len(own.cases("ct")) == len(own.cases("mr")) == 3


def test_files_that_no_pattern_tells_apart_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    data = scans(
        tmp_path / "vols", "ct/a/1.nii", "ct/b/1.nii", "ct/c_label.nii", *pairs("mr/{}.nii")
    )
    with pytest.raises(DataError, match="No pattern matches exactly ct/a/1.nii, .* in a table"):
        written(tmp_path, data)
    assert not (tmp_path / "livers.yaml").exists()


def nnunet(
    root: Path, name: str, train: str, test: str = "", bare: str = "", fold: str = ""
) -> Path:
    """Write an nnU-Net folder with a case per letter, and optionally one fold."""
    folder = root / name
    for case in train + bare:
        scan(folder / f"imagesTr/{case}_0000.nii.gz")
    for case in test:
        scan(folder / f"imagesTs/{case}_0000.nii.gz")
        scan(folder / f"labelsTs/{case}.nii.gz")
    for case in train:
        scan(folder / f"labelsTr/{case}.nii.gz")
    facts = {"labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(facts))
    if fold:
        folds = [{"train": sorted(set(train) - set(fold)), "val": list(fold)}]
        (folder / "splits_final.json").write_text(json.dumps(folds))
    return root


@pytest.mark.parametrize(("first", "second"), [("ct", "mr"), ("mr", "ct")])
def test_a_split_of_nnunet_holds_in_all_domains_of_the_same_people(
    tmp_path: Path, first: str, second: str
) -> None:
    """Whichever domain comes first and has the split."""
    nnunet(tmp_path / "raw", f"Dataset001_{first}", "abcdefg")
    nnunet(tmp_path / "raw", f"Dataset002_{second}", "abcde", "fg", fold="e")
    own = written(tmp_path, tmp_path / "raw")
    for domain in (first, second):
        splits = splits_of(own, domain)
        assert {case for case, split in splits.items() if split == "test"} == {"f", "g"}
        assert {case for case, split in splits.items() if split == "val"} == {"e"}
    assert problems(own) == []


def test_an_export_comes_back_with_its_splits(tmp_path: Path) -> None:
    data = scans(
        tmp_path / "vols",
        *pairs("ct/{}_image.nii", "ct/{}_label.nii", "mr/{}_image.nii", "mr/{}_label.nii", count=6),
    )
    own = written(tmp_path, data)
    export(own, tmp_path / "out", 501, False, 1, Progress(enabled=False))
    (tmp_path / "livers.yaml").unlink()
    again = written(tmp_path, tmp_path / "out" / "nnUNet_raw")
    for domain in own.domains():
        assert splits_of(again, f"livers_{domain}") == splits_of(own, domain)


def test_who_has_no_label_in_one_domain_is_trained_on_in_all(tmp_path: Path) -> None:
    nnunet(tmp_path / "raw", "Dataset001_ct", "abcdefgh")
    nnunet(tmp_path / "raw", "Dataset002_mr", "ab", bare="cdefgh")
    own = written(tmp_path, tmp_path / "raw")
    assert {splits_of(own, "ct")[case] for case in "cdefgh"} == {"train"}
    assert problems(own) == []
    nnunet(tmp_path / "two", "Dataset001_ct", "abc", "d")
    nnunet(tmp_path / "two", "Dataset002_mr", "abc", bare="d")
    with pytest.raises(DataError, match="d is a test case of ct .* but has no label in mr, wh"):
        written(tmp_path / "x", tmp_path / "two")


@pytest.mark.parametrize("shared", ["yes", "no"])
def test_a_lone_case_is_for_training(tmp_path: Path, shared: str) -> None:
    data = scans(
        tmp_path / "vols",
        *("ct/1_image.nii", "ct/1_label.nii"),
        *pairs("mr/{}_image.nii", "mr/{}_label.nii", count=5),
    )
    own = written(tmp_path, data, answers(same=shared))
    assert splits_of(own, "ct") == {"1": "train"}
    # It cannot be tested on, so it is no target, and the description says so.
    assert own.directions == ("ct-mr",) and problems(own) == []
    for file in (data / "mr").glob("[2-5]_*"):
        file.unlink()
    with pytest.raises(DataError, match="The 2 labels in .* are too few for any direction"):
        written(tmp_path / "x", data)


def test_a_value_that_one_label_has_alone_is_described(tmp_path: Path) -> None:
    data = scans(
        tmp_path / "vols",
        *pairs("ct/{}_image.nii", "ct/{}_label.nii", "mr/{}_image.nii", "mr/{}_label.nii", count=9),
    )
    scan(data / "ct/5_label.nii", (1, 7))
    own = written(tmp_path, data, by_domain(ct="liver=1", mr="liver=1"))
    assert own.reading_of("ct").ignored_values == (7,) and problems(own) == []


def test_folders_of_the_decathlon_are_described(tmp_path: Path) -> None:
    for number, organ in ((3, "Liver"), (9, "Spleen")):
        folder = tmp_path / "msd" / f"Task{number:02d}_{organ}"
        names = [f"{organ.lower()}_{n}.nii.gz" for n in range(4)]
        scans(folder, *(f"{part}/{name}" for part in ("imagesTr", "labelsTr") for name in names))
        for name in names:
            (folder / "imagesTr" / f"._{name}").write_bytes(b"Mac OS X")
        facts = {
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "organ"},
            "training": [
                {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
            ],
            "test": ["./imagesTs/none.nii.gz"],
        }
        (folder / "dataset.json").write_text(json.dumps(facts))
    own = written(tmp_path, tmp_path / "msd")
    assert own.directions == ("liver-spleen", "spleen-liver") and problems(own) == []
    assert len(own.cases("liver")) == 4 and [s.title for s in own.structures] == ["organ"]


def test_folders_of_one_name_keep_their_numbers(tmp_path: Path) -> None:
    nnunet(tmp_path / "raw", "Dataset001_Heart", "abc")
    nnunet(tmp_path / "raw", "Dataset002_Heart", "abc")
    own = written(tmp_path, tmp_path / "raw")
    assert own.domains() == ("dataset001_heart", "dataset002_heart")


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    labels=st.lists(st.sets(st.sampled_from("abcdefgh")), min_size=2, max_size=3),
    images=st.lists(st.sets(st.sampled_from("abcdefgh")), min_size=3, max_size=3),
    tests=st.lists(st.sets(st.sampled_from("abcdefgh")), min_size=3, max_size=3),
    vals=st.lists(st.sets(st.sampled_from("abcdefgh")), min_size=3, max_size=3),
    shared=st.booleans(),
)
def test_splits_keep_people_apart_and_a_case_for_training(
    labels: list[set[str]],
    images: list[set[str]],
    tests: list[set[str]],
    vals: list[set[str]],
    shared: bool,
) -> None:
    found = [
        DraftDomain(
            f"d{index}",
            {},
            {case: Path(case) for case in own | images[index]},
            {case: Path(case) for case in own},
            {},
            frozenset(own & tests[index]),
            frozenset(own & vals[index] - tests[index]),
        )
        for index, own in enumerate(labels)
    ]
    bare = {case for d in found for case in d.images if case not in d.labels}
    try:
        splits = draw_splits(found, shared)
    except DataError:
        assert shared and bare & {case for d in found for case in d.test}
        return
    for domain in found:
        test, val = (set(splits[domain.name][split]) for split in ("test", "val"))
        assert test | val <= set(domain.labels) and not test & val and domain.test <= test
        if not domain.test | domain.val and not (shared and any(d.test | d.val for d in found)):
            assert set(domain.labels) - test - val or not domain.labels
            assert len(domain.labels) != 1 or not test | val
    if shared:
        for case in "abcdefgh":
            roles = {
                next((s for s in ("test", "val") if case in splits[d.name][s]), "train")
                for d in found
                if case in d.images
            }
            assert len(roles) < 2
