"""folder_draft.py: a description is written from files and answers, and it describes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from glua_bench import scaffold
from glua_bench.conformance import run_dataset_checks
from glua_bench.console import ask as put
from glua_bench.errors import ConfigError, DataError
from glua_bench.registry import Registry
from glua_bench.task import Ask, Dataset

VALUES = {"ct": (1, 4), "mr": (1, 4)}


@pytest.fixture
def volumes(tmp_path: Path) -> Callable[..., Path]:
    """Writes people p1 to p6 in two domains, with two organs and a stray value."""

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
    """Answers what is given, and takes the guess of everything else."""

    def ask(question: str, guess: str, read: Callable[[str], Any]) -> Any:
        given = structures if "name=value" in question else same if "same" in question else ""
        return read(given or guess)

    return ask


def by_domain(**structures: str) -> Ask:
    """Names the structures of each domain, and takes the guess of everything else."""

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
    assert "# What a paper has to cite." in file.read_text()


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
    with pytest.raises(ConfigError, match="'unannotated=9' names no structure"):
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
    with pytest.raises(ConfigError, match="mr: its label values are not those of the domain befo"):
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
    """Both domains as nnU-Net keeps them."""
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
    assert [s.title for s in own.structures] == ["structure 1", "structure 4", "structure 9"]


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("Plane", "oblique", "'oblique' is no answer; use axial or coronal or sagittal."),
        ("Side", "wide", "'wide' is no length; give mm as a number, such as 320."),
        ("Distance", "-1", "'-1' is no length"),
        ("intensities", "275 -125", "'275 -125' is no window; write two numbers that rise"),
        ("intensities", "much", "'much' is no window"),
        ("same", "perhaps", "'perhaps' is no answer; use yes or no."),
        ("images,", "ct/p1.nii", "'images' needs a * where the case's id stands"),
        ("images,", "pet/*.nii", "holds no file like pet/*.nii"),
        ("labels,", "/x/*.nii", "'labels' must be relative to the root"),
        ("labels,", "ct/*_x.nii.gz", "holds no file like ct/*_x.nii.gz"),
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
        DataError, match="none is no directory: name the one of your files with --d"
    ):
        written(tmp_path, tmp_path / "none")
    with pytest.raises(DataError, match="holds no volume: give a directory with files of .nii.gz"):
        written(tmp_path, tmp_path)
    data = volumes()
    with pytest.raises(DataError, match="The 12 volumes in .*ct do not show two domains"):
        written(tmp_path, data / "ct")
    for path in data.rglob("*_label*"):
        path.unlink()
    with pytest.raises(DataError, match="No file of ct or mr looks like a label"):
        written(tmp_path, data)
