"""Several input channels, from a description to predictions, through the commands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from small_commands import Call, refused

import glua_bench
from glua_bench.conformance.bench import TinyDataset, TwoChannels
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.method import Method
from glua_bench.records.run_directory import RunDirectory
from glua_bench.registry import Registry
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import PlannedRun, plan
from glua_bench.runs.request import RunRequest
from glua_bench.runs.timing import estimate
from glua_bench.task import Dataset, Grid

SETS = ["segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=1", "batch_size=2"]
SMALL = ["--preset=quick", "--steps=2", "--device=cpu", *(f"--set={one}" for one in SETS)]
HEAD = """\
name: two
root: data
field_of_view: 32
classes:
  DISC: {title: disc, values: 10}
  RING: {title: ring, values: [20, 21]}
domains:
"""
DOMAIN = """\
  DOMAIN:
    channels:
      T1: {images: images/DOMAIN_*.nii.gz}
      T2: {images: second/DOMAIN_*.nii.gz, percentiles: [1, 99]}
    labels: truth/truth_of_DOMAIN_*.nii.gz
    background: [30]
    val: [2]
    test: [3]
"""
PLAIN = DOMAIN.replace("DOMAIN", "plain")
INVERTED = DOMAIN.replace("DOMAIN", "inverted").replace("T2", "FLAIR")
TWO = HEAD + PLAIN + INVERTED


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny dataset with two channels and its description, `two.yaml`."""
    folder = tmp_path_factory.mktemp("channels")
    TwoChannels(folder / "data").prepare()
    (folder / "two.yaml").write_text(TWO)
    return folder


@pytest.fixture
def copy(files: Path, tmp_path: Path) -> Path:
    """Copy the dataset, for a test that changes it."""
    return Path(shutil.copytree(files, tmp_path / "copy"))


@pytest.fixture(scope="module")
def trained(files: Path) -> RunDirectory:
    """Train `source_only` on both channels and three slices."""
    asked = RunRequest(
        "source_only",
        "two",
        plugins=[files / "two.yaml"],
        preset="quick",
        steps=2,
        augmentation="photometric",
        assignments=[*SETS, "slices=3", "slice_distance=1"],
        runs_root=files / "runs",
        device="cpu",
        mlflow=False,
    )
    planned = plan(asked)
    execute(planned, Progress(enabled=False))
    return planned.directory


@pytest.fixture(scope="module")
def exported(trained: RunDirectory, files: Path) -> Path:
    """Export the trained model."""
    from glua_bench.runs import exporting, prediction

    return exporting.export(prediction.from_run(trained, (), "cpu"), trained, files / "model")


def given(files: Path, number: int = 3, domain: str = "inverted") -> list[Path]:
    """Return the two images of a case."""
    return [files / "data" / part / f"{domain}_{number}.nii.gz" for part in ("images", "second")]


def described(file: Path) -> Dataset:
    registry = Registry("dataset", [file])
    (name,) = (line.split()[1] for line in file.read_text().splitlines() if line[:5] == "name:")
    made: Dataset = registry.load(name)()
    return made


def labels_in(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj)  # type: ignore[attr-defined]


def test_a_description_lists_the_channels_of_a_domain(files: Path) -> None:
    dataset = described(files / "two.yaml")
    for domain, second in (("plain", "T2"), ("inverted", "FLAIR")):
        reading = dataset.view(domain).reading
        assert [channel.name for channel in reading.channels] == ["T1", second]
        assert reading.channel(1).percentiles == (1, 99) and reading.inputs == 2
        assert reading.channel(0).percentiles == (0.5, 99.5)
        for number, case in enumerate(dataset.cases(domain)):
            assert case.images == tuple(given(files, number, domain))
            assert case.unlabelled().images == case.images


def test_channels_are_cached_on_one_grid_and_scaled_independently(
    files: Path, tmp_path: Path
) -> None:
    """The first channel has the cache entry that it has alone."""
    cache, dataset = SliceCache(tmp_path), described(files / "two.yaml")
    case, view = dataset.cases("plain")[0], dataset.view("plain").on(Grid(32, 1.0))
    image = cache.image(case.unlabelled(), view)
    first, second = (np.asarray(channel.open(), float) for channel in image.channels)
    assert first.shape == second.shape == image.shape and not np.allclose(first, second, atol=0.1)
    for voxels in (first, second):
        assert voxels.min() == -1 and voxels.max() == 1
    assert cache.holds(case, view) is False  # the label is not cached yet
    cache.label(case, view)
    alone = described(write(tmp_path / "alone.yaml", single(files)))
    lone = alone.cases("plain")[0]
    assert SliceCache(tmp_path).image(lone.unlabelled(), alone.view("plain").on(Grid(32, 1.0))) == (
        type(image)(image.path, image.placement, image.shape)
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def single(files: Path) -> str:
    """Return a description of the first channel alone."""
    text = HEAD + "".join(map(first_of, (PLAIN, INVERTED)))
    return text.replace("root: data", f"root: {files / 'data'}").replace("name: two", "name: one")


def first_of(domain: str) -> str:
    """Return the description of a domain without its second channel."""
    lines = [
        line for line in domain.splitlines() if "channels:" not in line and "second" not in line
    ]
    return "\n".join(lines).replace("  T1: {", "").replace(".gz}", ".gz") + "\n"


@pytest.mark.parametrize("layout", ["pattern", "table", "nnunet"])
def test_every_layout_finds_the_channels(layout: str, files: Path, copy: Path, call: Call) -> None:
    if layout == "table":
        rows = [
            f"{n},images/{{0}}_{n}.nii.gz,second/{{0}}_{n}.nii.gz,truth/truth_of_{{0}}_{n}"
            f".nii.gz,{split}"
            for n, split in enumerate(("train", "train", "val", "test"))
        ]
        text = HEAD
        for domain in ("plain", "inverted"):
            table = "\n".join(["id,t1,t2,label,split", *rows]).format(domain)
            (copy / f"{domain}.csv").write_text(table + "\n")
            channels = "{T1: {column: t1}, T2: {column: t2, percentiles: [1, 99]}}"
            text += f"  {domain}:\n    table: {domain}.csv\n    background: [30]\n"
            text += f"    channels: {channels}\n"
    elif layout == "nnunet":
        out = copy / "data" / "nn"
        code, _, err = call("data", "export", files / "two.yaml", "--to", out)
        assert code == 0, err
        text = HEAD
        for number, domain in ((501, "plain"), (502, "inverted")):
            name = f"Dataset{number}_two_{domain}"
            content = json.loads((out / "nnUNet_raw" / name / "dataset.json").read_text())
            second = "T2" if domain == "plain" else "FLAIR"
            assert content["channel_names"] == {"0": "T1", "1": second}
            channels = "{A: {channel: 0}, B: {channel: 1, percentiles: [1, 99]}}"
            text += f"  {domain}:\n    nnunet: nn/nnUNet_raw/{name}\n    fold: 0\n"
            text += f"    channels: {channels}\n    values: {{DISC: 1, RING: 2}}\n"
        drafted = draft(out / "nnUNet_raw", copy, call)
        for domain, second in (("two_plain", "T2"), ("two_inverted", "FLAIR")):
            names = [own.name for own in drafted.view(domain).reading.channels]
            assert names == ["T1", second] and len(drafted.cases(domain)[0].images) == 2
    else:
        text = TWO
    dataset = described(write(copy / "two.yaml", text))
    original = described(files / "two.yaml")
    for domain in ("plain", "inverted"):
        cases = zip(dataset.cases(domain), original.cases(domain), strict=True)
        for case, same in cases:
            assert (case.id, case.split) == (same.id, same.split)
            assert [f.read_bytes() for f in case.images] == [f.read_bytes() for f in same.images]


def draft(data: Path, folder: Path, call: Call) -> Dataset:
    """Draft a description of nnU-Net folders and follow its hint to use all channels."""
    file = folder / "drafted.yaml"
    code, _, err = call("new-dataset", "drafted", "--data", data, "--yes", "--out", folder)
    assert code == 0, err
    text, count = re.subn(r"channel: 0   # 2 channels; to use all, ", "", file.read_text())
    assert count == 2
    file.write_text(text)
    return described(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: HEAD + PLAIN + first_of(INVERTED),
            "equal numbers of input channels, but plain",
        ),
        (lambda text: text.replace("channels:", "images: a_*.nii\n    channels:", 1), "instead of"),
        (lambda text: text.replace("percentiles: [1, 99]", "windows: [1, 99]", 1), "'windows'"),
        (lambda text: text.replace("second", "images", 1), "have the same 'images'"),
    ],
)
def test_descriptions_of_channels_are_checked(
    change: Callable[[str], str], words: str, copy: Path, call: Call
) -> None:
    file = write(copy / "two.yaml", change(TWO))
    text = refused(call("data", "check", file))
    assert words in text and str(file) in text


def test_a_missing_channel_is_named(copy: Path, call: Call) -> None:
    missing = given(copy, 1)[1]
    missing.unlink()
    text = refused(call("data", "check", copy / "two.yaml"))
    assert "inverted_1.nii.gz has no file of the channel FLAIR" in text


def test_channels_on_another_grid_are_refused(copy: Path, call: Call) -> None:
    first, second = given(copy, 1)
    image = nib.load(second)
    data = np.asarray(image.dataobj)  # type: ignore[attr-defined]
    nib.save(nib.Nifti1Image(data[:, :-1], np.eye(4)), second)
    code, out, err = call("data", "check", copy / "two.yaml")
    (found,) = [line for line in out.splitlines() if line.startswith("problem (image)")]
    assert code == 2 and f"{second}, channel FLAIR, has shape (34, 35, 4)" in found
    assert f"the first channel {first} has (34, 36, 4)" in found and "Traceback" not in err
    shifted = np.eye(4)
    shifted[0, 3] = 5
    nib.save(nib.Nifti1Image(data, shifted), second)
    words = ["run", "--method=source_only", "--dataset", copy / "two.yaml", "--runs", copy / "r"]
    text = refused(call(*words, *SMALL, "--direction=inverted-plain", "--no-mlflow"))
    assert "channel FLAIR, is displaced by up to 5 mm from the first channel" in text


def test_check_show_and_fingerprint_cover_each_channel(copy: Path, call: Call) -> None:
    file = copy / "two.yaml"
    code, out, err = call("data", "check", file)
    assert code == 0 and "no warnings" in out, (out, err)
    code, out, _ = call("data", "fingerprint", file, "--out", copy / "before.json")
    assert code == 0 and "channel      FLAIR" in out and out.count("channel   ") == 4
    _, out, _ = call("data", "show", file, "--preset=quick", "--out", copy / "figures")
    names = sorted(path.name for path in (copy / "figures").iterdir())
    assert names == [
        f"two_{domain}_{channel}.{suffix}"
        for domain, second in (("inverted", "FLAIR"), ("plain", "T2"))
        for channel in ("1_T1", f"2_{second}")
        for suffix in ("pdf", "png", "svg")
    ]
    # A change of the second channel alone is found.
    image = nib.load(given(copy, 0)[1])
    data = np.asarray(image.dataobj) + 1  # type: ignore[attr-defined]
    nib.save(nib.Nifti1Image(data, np.eye(4)), given(copy, 0)[1])
    text = refused(call("data", "fingerprint", file, "--against", copy / "before.json"))
    assert "differ from" in text
    shutil.copy(given(copy, 0)[0], given(copy, 0)[1])
    code, out, _ = call("data", "check", file)
    assert "(same image)" in out and "have the same voxels" in out


def test_training_reads_all_slices_of_all_channels(trained: RunDirectory) -> None:
    weights = trained.checkpoints / "candidate_0000002.pt"
    import torch

    state = torch.load(weights, weights_only=True)
    first = next(value for name, value in state.items() if value.ndim == 4)
    assert first.shape[1] == 6  # three slices of two channels


def test_predictions_equal_those_of_the_run(
    trained: RunDirectory, exported: Path, files: Path, tmp_path: Path, call: Call
) -> None:
    """Files of a case are joined by commas, or named as by nnU-Net."""
    expected = labels_in(trained.predictions / "inverted_3.nii.gz")
    folder = tmp_path / "imagesTs"
    folder.mkdir()
    for channel, file in enumerate(given(files)):
        shutil.copy(file, folder / f"case_{channel:04d}.nii.gz")
    joined = ",".join(map(str, given(files)))
    for number, (words, name) in enumerate(
        [
            ([joined], "inverted_3"),
            ([folder], "case"),
            (sorted(folder.iterdir(), reverse=True), "case"),
        ]
    ):
        out = tmp_path / f"out{number}"
        code, printed, err = call("predict", *words, "--model", exported, "--out", out)
        assert code == 0, err
        assert np.array_equal(labels_in(out / f"{name}_seg.nii.gz"), expected), printed
    swapped = ",".join(map(str, reversed(given(files))))
    code, _, err = call("predict", swapped, "--run", trained.path, "--out", tmp_path / "swapped")
    other = labels_in(tmp_path / "swapped" / "inverted_3_seg.nii.gz")
    assert code == 0 and not np.array_equal(other, expected)
    card = (exported / "README.md").read_text()
    assert "- Input channels, in this order: T1, FLAIR of inverted; T1, T2 of plain." in card


def test_other_channels_than_those_of_the_model_are_refused(
    exported: Path, files: Path, tmp_path: Path, call: Call
) -> None:
    words = ["--model", exported, "--out", tmp_path / "out"]
    first, second = given(files)
    text = refused(call("predict", first, *words))
    assert "needs 2 channels (T1, FLAIR) of inverted" in text and "t1.nii.gz,t2.nii.gz" in text
    text = refused(call("predict", f"{first},{second},{second}", *words))
    assert "is given as 3 files, but" in text
    text = refused(call("predict", f"{first},{tmp_path / 'no.nii.gz'}", *words))
    assert "no.nii.gz of" in text and "does not exist" in text
    shutil.copy(first, tmp_path / "case_0000.nii.gz")
    text = refused(call("predict", tmp_path / "case_0000.nii.gz", *words))
    assert "Case case in" in text and "has the channel(s) _0000" in text and "_0001" in text
    assert not (tmp_path / "out").exists()


def test_a_method_for_one_channel_is_refused_before_training(
    files: Path, tmp_path: Path, call: Call
) -> None:
    plugin = write(
        tmp_path / "narrow.py",
        '''
from glua_bench.method import Method
from glua_bench.methods.source_only import SourceOnly
from glua_bench.networks import build_segmenter


class Narrow(SourceOnly, Method):
    """Train on one channel."""

    name = "narrow"
    reference = "baseline"
    needs = "nothing"

    def __init__(self, task, config):
        super().__init__(task, config)
        self.segmenter = build_segmenter(task.segmenter, task.classes, task.slices)
''',
    )
    words = ["run", "--method=narrow", "--plugin", plugin, "--dataset", files / "two.yaml"]
    text = refused(call(*words, *SMALL, "--runs", tmp_path / "runs", "--no-mlflow"))
    assert "has 2 input channels, which method 'narrow' does not support" in text
    assert "task.inputs" in text and not (tmp_path / "runs").exists()


def test_a_model_of_one_channel_refuses_two(files: Path, tmp_path: Path, call: Call) -> None:
    file = write(tmp_path / "one.yaml", single(files))
    runs = ["--runs", tmp_path / "runs"]
    code, _, err = call(
        "run", "--method=source_only", "--dataset", file, *SMALL, *runs, "--no-mlflow"
    )
    assert code == 0, err
    (run,) = (tmp_path / "runs").glob("one/source_only/*/")
    joined = ",".join(map(str, given(files)))
    text = refused(call("predict", joined, "--run", run, "--out", tmp_path / "out"))
    assert "is given as 2 files" in text and "needs one channel of inverted" in text


def test_the_tiny_datasets_share_their_first_channel(tmp_path: Path) -> None:
    one, two = TinyDataset(tmp_path / "one"), TwoChannels(tmp_path / "two")
    one.prepare()
    two.prepare()
    for domain in one.domains():
        for lone, case in zip(one.cases(domain), two.cases(domain), strict=True):
            assert lone.image.read_bytes() == case.image.read_bytes()


def test_python_segments_cases_of_several_files(
    trained: RunDirectory, files: Path, tmp_path: Path
) -> None:
    found = glua_bench.predict(
        [given(files, 2), given(files)], run=trained.path, out=tmp_path, device="cpu", quiet=True
    )
    assert found["labels"].nunique() == 2 and set(found["structure"]) == {"DISC", "RING"}
    assert np.array_equal(
        labels_in(Path(found["labels"].iloc[-1])),
        labels_in(next(trained.predictions.iterdir())),
    )


def test_imported_entries_stand_beside_runs_on_several_channels(
    trained: RunDirectory, files: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files / "runs", "runs")
    code, out, err = call(
        *("import", "theirs", "--dataset", files / "two.yaml", "--no-mlflow", "--jobs=1"),
        *("--predictions", trained.predictions),
    )
    assert code == 0 and "EXTERNAL" in out, err
    code, out, err = call("report")
    assert code == 0 and "No pictures" not in err, err
    assert "theirs (external)" in Path("report/tables/main_two_plain-inverted.md").read_text()
    assert "T1" not in err and Path("report/figures/side_by_side_two_plain-inverted.pdf").is_file()
    table = pd.read_csv("report/tables/main_two_plain-inverted.csv").set_index("method")
    assert table.loc["theirs (external)"].iloc[0] == table.loc["source_only + photometric"].iloc[0]


def test_the_duration_of_a_run_is_estimated_with_its_channels(
    files: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built: list[int] = []
    build = PlannedRun.build

    def noted(planned: PlannedRun) -> Method:
        method = build(planned)
        built.append(method.task.channels)
        return method

    monkeypatch.setattr(PlannedRun, "build", noted)
    parts = {"slices": 0.0, "segment": 2.0, "selectors": 0.0, "evaluation": 0.0, "figures": 0.0}
    monkeypatch.setattr(estimate, "probe", lambda planned, draw: parts)
    words = ["run", "--method=source_only", "--dataset", files / "two.yaml", *SMALL, "--no-mlflow"]
    code, _, err = call(*words, "--dry-run")
    assert code == 0 and built == [2], err
