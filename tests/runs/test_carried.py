"""carried.py: runs and models work without the dataset, and detect images of other domains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from faults import damaged
from sample_runs import reseal

from glua_bench.console import Progress
from glua_bench.data.formats import open_volume
from glua_bench.data.volumes import load_image, restore
from glua_bench.datasets.folder.dataset import Folder
from glua_bench.errors import UserError
from glua_bench.inspection.measurements import measure_case, read_intensities
from glua_bench.inspection.outliers import LEAST, Usual, resemblance, usual
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry
from glua_bench.runs import carried, exporting, inputs, prediction
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest
from glua_bench.task import Dataset, Reading

TEXT = """\
name: livers
root: files
field_of_view: 44
publishable: true
classes:
  LIVER: {title: liver, values: 1}
domains:
  ct:
    images: ct/*_image.nii.gz
    labels: ct/*_label.nii.gz
    values: {LIVER: 7}
    window: [-150, 250]
    test: [person8]
  mr:
    table: mr.csv
    stored: {slices: 2, rows: 1}
"""
COUNT = 8  # the last is the test case


def volume(number: int, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Return an image in Hounsfield units or of an MR sequence with dark livers, and its label."""
    rng = np.random.default_rng([number, domain == "mr"])
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 44, 5)), indexing="ij")
    ball = (x - rng.uniform(-0.2, 0.2)) ** 2 + y**2 + z**2 / 4 < 0.2
    body, fat = x**2 + y**2 < 0.9, x**2 + y**2 > 0.7
    if domain == "ct":
        image = np.where(ball, 110, np.where(body, np.where(fat, -100, 40), -1000))
        noise = 12.0
    else:
        image = np.where(ball, 150, np.where(body, np.where(fat, 900, 300), 0))
        noise = 40.0
    image = image + rng.normal(0, noise, x.shape) * (body | (domain == "ct"))
    return np.clip(image, -1024 if domain == "ct" else 0, 2000), ball


@dataclass
class Livers:
    description: Path
    run: RunDirectory
    root: Path

    def image(self, domain: str, number: int = COUNT) -> Path:
        return self.description.parent / "files" / domain / f"person{number}_image.nii.gz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Livers:
    """Train a run on described files, from CT to MR."""
    folder = tmp_path_factory.mktemp("livers")
    rows = ["id,image,label,split"]
    for domain in ("ct", "mr"):
        (folder / "files" / domain).mkdir(parents=True)
        for number in range(1, COUNT + 1):
            image, label = volume(number, domain)
            stem = f"{domain}/person{number}"
            for end, voxels in (("image", image), ("label", label * (7 if domain == "ct" else 1))):
                file = folder / "files" / f"{stem}_{end}.nii.gz"
                nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), file)
            split = "test" if number == COUNT else "train"
            rows.append(f"person{number},{stem}_image.nii.gz,{stem}_label.nii.gz,{split}")
    (folder / "mr.csv").write_text("\n".join(r for r in rows if not r.count("ct/")))
    (folder / "livers.yaml").write_text(TEXT)
    planned = plan(
        RunRequest(
            "source_only",
            "livers",
            direction="ct-mr",
            preset="quick",
            steps=120,
            assignments=["segmenter.width=4", "segmenter.depth=3", "batch_size=4", "candidates=1"],
            plugins=[folder / "livers.yaml"],
            runs_root=folder / "runs",
            device="cpu",
            mlflow=False,
        )
    )
    execute(planned, Progress(enabled=False))
    return Livers(folder / "livers.yaml", planned.directory, folder / "runs")


@pytest.fixture
def livers(trained: Livers, tmp_path: Path) -> Livers:
    """Copy the files, so that they can be removed; the run refers to the originals."""
    shutil.copytree(trained.description.parent, tmp_path / "copy")
    path = tmp_path / "copy" / trained.run.path.relative_to(trained.description.parent)
    return Livers(
        tmp_path / "copy" / "livers.yaml", RunDirectory.open(path), tmp_path / "copy" / "runs"
    )


Call = Callable[..., tuple[int, str, str]]


def labels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_a_run_of_a_description_needs_neither_it_nor_its_files(
    livers: Livers, tmp_path: Path, call: Call
) -> None:
    """Run and exported model segment the test case as before."""
    image = tmp_path / "mine.nii.gz"
    shutil.copy(livers.image("mr"), image)
    livers.description.unlink()
    (livers.description.parent / "mr.csv").unlink()
    shutil.rmtree(livers.description.parent / "files")
    code, _, err = call("export", "--run", livers.run.path, "--out", tmp_path / "model")
    assert code == 0, err
    own = labels(livers.run.predictions / "mr_person8.nii.gz")
    for source in (["--run", livers.run.path], ["--model", tmp_path / "model"]):
        out = tmp_path / source[0]
        code, said, err = call("predict", image, *source, "--out", out, "--overlay")
        assert code == 0 and not err, err
        assert "Images are read as mr, the target domain." in said
        assert np.array_equal(labels(out / "mine_seg.nii.gz"), own)


def test_a_report_finds_the_images_of_a_run_without_its_description(
    livers: Livers, trained: Livers, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (livers.description, livers.description.parent / "mr.csv"):
        file.unlink()
    words = ("report", "--runs", livers.root, "--out", tmp_path / "report")
    code, _, err = call(*words)
    assert code == 0 and "No pictures" not in err
    assert (tmp_path / "report" / "figures" / "side_by_side_livers_ct-mr.png").is_file()
    # The run stores the directory of its files; the command line overrides it.
    kept = livers.run.path / "dataset.yaml"
    kept.write_text(kept.read_text().replace(str(trained.description.parent), "/nowhere"))
    reseal(livers.run)
    code, _, err = call(*words)
    page = (tmp_path / "report" / "report.html").read_text()
    assert code == 0 and "No pictures of livers: /nowhere" in page
    shutil.rmtree(tmp_path / "report")
    assert call(*words, "--data-root", livers.description.parent / "files")[0] == 0
    assert (tmp_path / "report" / "figures" / "side_by_side_livers_ct-mr.png").is_file()
    # A given description overrides the stored one.
    livers.description.write_text(TEXT.replace("publishable: true", "publishable: false"))
    shutil.copy(trained.description.parent / "mr.csv", livers.description.parent)
    assert call(*words, "--plugin", livers.description)[0] == 0
    assert "not for redistribution" in (tmp_path / "report" / "report.html").read_text()


def test_a_description_is_kept_as_it_reads(trained: Livers) -> None:
    """Ids such as 007 are kept, comments are dropped, and paths are absolute."""
    own: type[Dataset] = Registry("dataset", [trained.description]).load("livers")
    kept = Folder.described(trained.run.path / "dataset.yaml")()
    assert kept.root == trained.description.parent / "files"
    for domain in ("ct", "mr"):
        assert kept.cases(domain) == own().cases(domain) and len(kept.cases(domain)) == COUNT
        assert kept.reading_of(domain) == own.reading_of(domain)
        assert kept.structures_of(domain) == own.structures_of(domain)
    assert kept.grids == own.grids and kept.publishable == own.publishable
    written = trained.description.with_name("numbers.yaml")
    text = TEXT.replace("[person8]", "[007, 1e3, 08, yes]  # a comment").replace(
        "name: livers", "name: numbers\ntitle: 'äh: #1'"
    )
    written.write_text(text)
    again = written.with_name("again.yaml")
    again.write_text(Folder.described(written)(trained.root).carried()["dataset.yaml"])
    read = Folder.described(again)
    assert read.description is not None and read.description.domains["ct"].test == (
        "007",
        "1e3",
        "08",
        "yes",
    )
    assert read.description.title == "äh: #1" and read.description.root == trained.root
    assert "comment" not in again.read_text()


def test_a_model_names_no_file_and_no_case(trained: Livers, tmp_path: Path) -> None:
    model = prediction.from_run(trained.run, device="cpu")
    folder = exporting.export(model, trained.run, tmp_path / "model")
    for file in folder.iterdir():
        content = file.read_bytes()
        for word in ("person", str(trained.description.parent), "files/", ".csv", "_image"):
            assert word.encode() not in content, (file, word)


@pytest.mark.fault("silent damage", "dataset.json of a run")
@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"domains": {}}', '{"domains": {"mr": {}}}']
)
def test_missing_or_damaged_facts_are_one_sentence(text: str | None, livers: Livers) -> None:
    (livers.run.path / "dataset.json").unlink()
    if text is not None:
        (livers.run.path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset.json cannot be read \(.*--runs directory\.$"):
        prediction.from_run(livers.run, device="cpu")


def test_an_image_of_the_source_is_told_and_read_by_its_own_window(
    livers: Livers, tmp_path: Path, call: Call
) -> None:
    """Regression: CT was read with the range of MR without a warning."""
    ct, words = livers.image("ct"), ("--run", livers.run.path, "--device", "cpu")
    code, said, err = call("predict", ct, *words, "--out", tmp_path / "wrong")
    assert code == 0 and "read as mr, the target domain" in said
    (warning,) = err.splitlines()
    assert warning.startswith(f"warning: The intensity of {ct} resembles ct, not ")
    assert "--domain ct" in warning and warning.endswith(".")
    code, said, err = call("predict", ct, *words, "--out", tmp_path / "right", "--domain", "ct")
    assert code == 0 and not err and "read as ct, the source domain." in said
    found = labels(tmp_path / "right" / "person8_image_seg.nii.gz")

    model = prediction.from_run(livers.run, device="cpu")
    reading = Registry("dataset", [livers.description]).load("livers").reading_of("ct")
    assert reading.intensity_range == (-150, 250) and reading.orientation == "canonical"
    image = load_image(ct, reading, livers.run.config.grid)
    slices = torch.from_numpy(image.voxels.astype(np.float16).astype(np.float32))[:, None]
    with torch.no_grad():
        logits = model.method.predict(slices, "source").softmax(1).numpy()
    expected = restore(logits.swapaxes(0, 1), image.placement)
    assert np.array_equal(found, expected * 7)

    _, truth = volume(COUNT, "ct")

    def dice(path: str) -> float:
        mine = labels(tmp_path / path / "person8_image_seg.nii.gz") > 0
        return float(2 * (mine & truth).sum() / (mine.sum() + truth.sum()))

    assert dice("right") > 0.85 and dice("right") > dice("wrong") + 0.1


def test_no_image_of_its_own_domain_is_doubted(trained: Livers, tmp_path: Path) -> None:
    model = prediction.from_run(trained.run, device="cpu")
    for domain in ("ct", "mr"):
        files = [trained.image(domain, number) for number in range(1, COUNT + 1)]
        told: list[str] = []
        images = inputs.find(files).images
        list(prediction.predict(model, images, tmp_path / domain, domain, warn=told.append))
        assert not told
        other = "mr" if domain == "ct" else "ct"
        list(prediction.predict(model, images, tmp_path / other, other, warn=told.append))
        assert [f"--domain {domain} " in text for text in told] == [True] * COUNT


def test_units_that_are_shifted_are_told(trained: Livers, tmp_path: Path) -> None:
    """A CT with an offset has the same distribution, but outside its window."""
    image = nib.load(trained.image("ct"))
    shifted = nib.Nifti1Image(np.asarray(image.dataobj) + 1024, image.affine)
    nib.save(shifted, tmp_path / "shifted.nii.gz")
    model, told = prediction.from_run(trained.run, device="cpu"), []
    files = inputs.find([tmp_path / "shifted.nii.gz"]).images
    list(prediction.predict(model, files, tmp_path / "out", "ct", warn=told.append))
    (text,) = told
    assert "is never negative, unlike other images of ct" in text


def test_a_domain_of_few_images_doubts_nothing() -> None:
    one = read_intensities_of(volume(1, "ct")[0])
    assert usual([one] * LEAST) is None
    known = usual([one] * (LEAST + 1))
    assert known is not None and known.spread == 0
    assert resemblance(one, "ct", {"ct": None, "mr": known}) == ("", "")
    assert resemblance(one, "ct", {"ct": known, "mr": None}) == ("", "")


def read_intensities_of(voxels: np.ndarray):  # type: ignore[no-untyped-def]
    from glua_bench.data.formats import Forms, VolumeFile

    spacing = (1.0, 1.0, 1.0)
    file = VolumeFile(
        path=Path("x"),
        shape=voxels.shape,
        affine=np.eye(4),
        spacing=spacing,
        forms=Forms.of(np.eye(4), (1, 1)),
        oriented=True,
        dimension=3,
        slope=1.0,
        inter=0.0,
        read=lambda: voxels,
    )
    return read_intensities(file, Reading())


def test_the_measure_is_that_of_data_check(trained: Livers) -> None:
    """The percentiles are equal, and the run stores only their medians."""
    dataset: Dataset = Registry("dataset", [trained.description]).load("livers")()
    kept = carried.read(trained.run.path)
    assert kept is not None
    for domain, own in kept.domains.items():
        found = []
        for case in dataset.split(domain, "train"):
            facts = measure_case(case, own).image
            mine = read_intensities(open_volume(case.image), own.reading)
            assert facts is not None and mine.levels == facts.levels
            assert mine.negative == pytest.approx(facts.negative, abs=1e-6)
            found.append(mine)
        assert own.usual == usual(found)
        assert own.usual is not None and len(own.usual.curve) == 99


def test_facts_travel_through_json(trained: Livers) -> None:
    kept = carried.read(trained.run.path)
    assert kept is not None
    assert carried.Carried.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
    none = replace(kept.domains["ct"], usual=None)
    other = carried.Carried({"ct": none}, False)
    assert carried.Carried.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    assert isinstance(kept.domains["mr"].usual, Usual)


def test_few_images_are_read_once(trained: Livers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intensities are cached, and at most nine images are read."""
    dataset: Dataset = Registry("dataset", [trained.description]).load("livers")()
    kept = carried.read(trained.run.path)
    monkeypatch.setattr(carried, "read_intensities", lambda *_: pytest.fail("read again"))
    images = [case for domain in ("ct", "mr") for case in dataset.split(domain, "train")]
    assert carried.facts_of(dataset, ("ct", "mr"), images) == kept
    monkeypatch.undo()
    monkeypatch.setenv("GLUA_BENCH_CACHE", "/proc/nowhere")  # not writable
    assert carried.facts_of(dataset, ("ct", "mr"), images) == kept
    asked: list[Path] = []
    known = kept and read_intensities_of(volume(1, "ct")[0])
    monkeypatch.setattr(carried, "_intensities", lambda file, _: asked.append(file) or known)
    many = [replace(images[0], image=Path(f"{number:03d}.nii")) for number in range(100)]
    carried.facts_of(dataset, ("ct",), many)
    assert len(asked) == 9 and asked[0] == Path("000.nii") and asked[-1] == Path("099.nii")


@pytest.mark.fault("silent damage", "cached intensities of images")
def test_damaged_intensities_are_measured_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tries: Callable[[int], range],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    image = nib.Nifti1Image(volume(1, "ct")[0], np.eye(4))
    nib.save(image, tmp_path / "image.nii.gz")
    reading = Reading()
    known = carried._intensities(tmp_path / "image.nii.gz", reading)
    (file,) = (tmp_path / "cache" / "intensities").iterdir()
    good = file.read_bytes()
    for seed in tries(100):
        file.write_bytes(damaged(good, seed))
        assert carried._intensities(tmp_path / "image.nii.gz", reading) == known
        assert file.read_bytes() == good
        assert "; the image is measured again." in capsys.readouterr().err
