"""folder/dataset.py: training and scoring use the described files."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from glua_bench.conformance import TinyDataset, run_dataset_checks
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.datasets.folder.dataset import Folder
from glua_bench.errors import ConfigError, DataError, PluginError
from glua_bench.inspection.integrity import check_dataset
from glua_bench.registry import Registry
from glua_bench.task import Dataset, Grid

TEXT = """\
name: tiny
title: A disc in a ring
root: data
field_of_view: 40
classes:
  DISC: {title: disc, values: 10}
  RING: {title: ring, values: [20, 21]}
domains:
  plain:
    images: images/plain_*.nii.gz
    labels: truth/truth_of_plain_*.nii.gz
    background: [30]
    val: [2]
    test: [3]
  inverted:
    images: images/inverted_*.nii.gz
    labels: truth/truth_of_inverted_*.nii.gz
    background: [30]
    val: [2]
    test: [3]
"""


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """Write a description beside the files of the conformance kit."""
    TinyDataset(tmp_path / "data").prepare()
    file = tmp_path / "tiny.yaml"
    file.write_text(TEXT)
    return file


def load(file: Path) -> Dataset:
    return Registry("dataset", [file]).load("tiny")()


def test_a_description_reads_as_the_class_does(described: Path) -> None:
    own, written = load(described), TinyDataset(described.parent / "data")
    assert own.directions == written.directions and own.root == written.root
    assert [(s.name, s.title, s.values) for s in own.structures] == [
        (s.name, s.title, s.values) for s in written.structures
    ]
    grid, cache = Grid(40, 1.0), SliceCache()
    for domain in written.domains():
        cases = own.cases(domain)
        assert [c.id for c in cases] == [c.id for c in written.cases(domain)]
        assert [c.split for c in cases] == ["train", "train", "val", "test"]
        assert len({c.subject for c in cases}) == 4
        for case, other in zip(cases, written.cases(domain), strict=True):
            assert (case.image, case.label) == (other.image, other.label)
            label = cache.label(case, own.view(domain).on(grid))
            expected = cache.label(other, written.view(other.domain).on(grid))
            # Upright: both axes in the plane are reversed.
            np.testing.assert_array_equal(label.open()[:, ::-1, ::-1], expected.open())


def test_it_passes_every_check_of_a_dataset(described: Path) -> None:
    results = run_dataset_checks("tiny", plugins=[described])
    assert results and not [(r.check, r.message) for r in results if not r.passed]


def test_another_process_reads_the_description_again(described: Path) -> None:
    again = pickle.loads(pickle.dumps(load(described)))
    assert again.name == "tiny" and again.cases("plain") == load(described).cases("plain")


def test_another_root_is_named_on_the_command_line(described: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(
        DataError, match="data is not a directory: correct 'root' in .*tiny.yaml, or"
    ):
        load(described).cases("plain")
    moved = Registry("dataset", [described]).load("tiny")(tmp_path / "moved")
    assert len(moved.cases("plain")) == 4


def test_domains_have_values_and_windows_of_their_own(described: Path) -> None:
    text = TEXT.replace(
        "    images: images/inverted", "    values: {DISC: 30}\n    images: images/inverted"
    ).replace("    background: [30]\n    val: [2]\n    test: [3]\n  inv", "    val: [2]\n  inv")
    described.write_text(
        text.replace(
            "background: [30]\n    val", "background: [10]\n    window: [0.1, 0.8]\n    val"
        )
    )
    own = load(described)
    assert own.structures_of("inverted")[0].values == (30,)
    assert own.structures_of("plain")[0].values == (10,)
    assert own.reading_of("inverted").intensity_range == (0.1, 0.8)
    assert own.reading_of("plain").intensity_range is None


def test_volumes_without_labels_serve_as_target(described: Path) -> None:
    for number in (0, 1):
        (described.parent / f"data/truth/truth_of_inverted_{number}.nii.gz").unlink()
    own, lines = load(described), []
    own.prepare(lines.append)
    assert lines == [
        "inverted: 2 of 4 volumes have no label and are used only as target training images"
    ]
    assert [case.label is None for case in own.cases("inverted")] == [True, True, False, False]
    (described.parent / "data/truth/truth_of_inverted_3.nii.gz").unlink()
    with pytest.raises(DataError, match="inverted_3.nii.gz is a test case without a label"):
        own.cases("inverted")


def test_one_person_in_both_domains_is_one_subject(described: Path) -> None:
    described.write_text("same_people: true\n" + TEXT)
    own = load(described)
    assert [c.subject for c in own.cases("plain")] == [c.subject for c in own.cases("inverted")]


def test_an_id_that_no_file_has_is_told(described: Path) -> None:
    described.write_text(TEXT.replace("test: [3]", "test: [13]"))
    with pytest.raises(ConfigError, match="line 14: 'test' lists 13, which is not among the files"):
        load(described).cases("plain")


def test_without_a_description_it_says_how_to_get_one() -> None:
    with pytest.raises(DataError, match="--dataset FILE.yaml, written by `glua-bench new-data"):
        Folder()


def test_the_registry_knows_a_description_by_its_name(described: Path) -> None:
    registry = Registry("dataset", [described])
    assert registry.name_of(described) == "tiny"
    entry = registry.entry("tiny")
    assert entry.summary == "A disc in a ring" and entry.attributes["reference"] == "your own"
    assert not [e for e in Registry("method", [described]).entries() if e.file is not None]
    with pytest.raises(PluginError, match="No dataset reads files like other.yaml"):
        registry.name_of(Path("other.yaml"))
    described.write_text(TEXT.replace("name: tiny", "name: phantom"))
    with pytest.raises(PluginError, match="Two datasets are called 'phantom'"):
        Registry("dataset", [described])


def test_glua_runs_on_described_volumes_of_other_formats(described: Path, tmp_path: Path) -> None:
    """From NRRD and MetaImage files to scores, with the command line."""
    for path in (described.parent / "data").rglob("*.nii.gz"):
        suffix = ".nrrd" if "plain" in path.name else ".mha"
        voxels = SimpleITK.ReadImage(path)
        SimpleITK.WriteImage(voxels, path.with_name(path.name.replace(".nii.gz", suffix)))
        path.unlink()
    text = TEXT.replace("plain_*.nii.gz", "plain_*.nrrd")
    described.write_text(text.replace("inverted_*.nii.gz", "inverted_*.mha"))
    words = f"run --method glua --dataset {described} --runs {tmp_path / 'runs'} --steps 2"
    words += " --device cpu --no-mlflow --preset quick --set batch_size=2"
    words += " --set method.adgan_width=4 --set method.adgan_blocks=1"
    done = subprocess.run(
        [sys.executable, "-m", "glua_bench", *words.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "glua on tiny plain-inverted" in done.stdout and "mean " in done.stdout
    (saved,) = tmp_path.glob("runs/tiny/glua/*/predictions/inverted_3.nii.gz")
    reference = SimpleITK.ReadImage(described.parent / "data/truth/truth_of_inverted_3.mha")
    assert nib.load(saved).shape == reference.GetSize()


def test_one_label_serves_two_sequences_of_the_same_people(tmp_path: Path) -> None:
    """Both domains share their label files; every check passes without reported duplicates."""
    made = TinyDataset(tmp_path / "data")
    made.prepare()
    for case in made.cases("plain"):
        other = case.image.with_name(case.image.name.replace("plain", "inverted"))
        image = nib.load(case.image)
        voxels = np.asarray(image.dataobj, np.float32)
        nib.save(nib.Nifti1Image(np.where(voxels > 0.2, 1.1 - voxels, voxels), image.affine), other)
    text = TEXT.replace("truth_of_inverted_", "truth_of_plain_").replace("name: tiny", "name: two")
    file = tmp_path / "two.yaml"
    file.write_text(text + "same_people: true\n")
    own = Registry("dataset", [file]).load("two")()
    _, findings = check_dataset(own, Progress(enabled=False))
    assert not [f.text for f in findings if f.problem or f.check.startswith("same")]
    results = {r.check: r for r in run_dataset_checks("two", plugins=[file])}
    assert results["splits"].passed and results["files"].passed

    file.write_text(text)
    apart = Registry("dataset", [file]).load("two")()
    _, findings = check_dataset(apart, Progress(enabled=False))
    assert {f.check for f in findings if f.problem} == {"same file"}


def test_the_old_word_for_background_is_reported(described: Path) -> None:
    described.write_text(TEXT.replace("background: [30]", "ignore: [30]"))
    said: list[str] = []
    own = load(described)
    own.prepare(said.append)
    assert [line.partition(": ")[2][:35] for line in said] == [
        "'ignore' is deprecated; rename it t"
    ] * 2
    assert own.reading_of("plain").ignored_values == (30,)
