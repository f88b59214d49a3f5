"""prediction.py: segmentation by a run and by its exported model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from faults import damaged, full_disk
from torch import nn
from two_faced_method import CLASSES

from glua_bench.cli import api
from glua_bench.cli.reports import _read_as
from glua_bench.conformance import first_difference
from glua_bench.console import Progress
from glua_bench.data.neighbours import ALONE
from glua_bench.data.volumes import load_image, restore
from glua_bench.errors import ConfigError, PluginError, UserError
from glua_bench.method import Role
from glua_bench.records.run_directory import RunDirectory, digest_of, list_runs
from glua_bench.runs import exporting, inputs, prediction
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest
from glua_bench.scoring.evaluation import predict_volumes
from glua_bench.scoring.metrics import SPACING

SMALL = ("segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=7", "batch_size=2")


@dataclass
class Made:
    run: RunDirectory
    images: list[Path]
    root: Path


def request_of(method: str, phantom_root: Path, root: Path, *sets: str) -> RunRequest:
    return RunRequest(
        method,
        "phantom",
        preset="quick",
        steps=3,
        assignments=[*SMALL, "candidates=2", *sets],
        data_root=phantom_root,
        runs_root=root,
        device="cpu",
        mlflow=False,
    )


def make(
    method: str, phantom_root: Path, root: Path, *sets: str, plugins: Sequence[Path] = ()
) -> Made:
    request = replace(request_of(method, phantom_root, root, *sets), plugins=list(plugins))
    planned = plan(request)
    execute(planned, Progress(enabled=False))
    test = planned.dataset.split("ct", "test") + planned.dataset.split("mr", "test")
    return Made(planned.directory, [case.image for case in test], root)


def given(images: Sequence[Path]) -> tuple[inputs.Given, ...]:
    return inputs.find(images).images


@pytest.fixture(scope="module")
def made(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("mean_teacher", phantom_root, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two_faced(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    plugins = [Path(__file__).parents[1] / "support" / "two_faced_method.py"]
    return make("two_faced", phantom_root, tmp_path_factory.mktemp("runs"), plugins=plugins)


Call = Callable[..., tuple[int, str, str]]


def test_batches_are_filled_across_volumes_and_every_slice_comes_back() -> None:
    rng = np.random.default_rng(0)
    volumes = [rng.uniform(-1, 1, (depth, 4, 4)).astype(np.float32) for depth in (3, 1, 9, 2, 5)]
    sizes: list[int] = []

    def predict(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return torch.cat([images, -images], 1)

    stacks = (ALONE.stacks(volume, 1.0) for volume in volumes)
    found = list(predict_volumes(predict, stacks, torch.device("cpu"), 8))
    assert sizes == [8, 8, 4]
    for volume, probabilities in zip(volumes, found, strict=True):
        expected = torch.from_numpy(np.stack([volume, -volume])).softmax(0).numpy()
        assert np.allclose(probabilities, expected, atol=1e-6)


def test_a_volume_is_given_back_before_all_others_are_read() -> None:
    read: list[int] = []

    def volumes():  # type: ignore[no-untyped-def]
        for index in range(4):
            read.append(index)
            yield ALONE.stacks(np.zeros((8, 4, 4), np.float32), 1.0)

    found = predict_volumes(lambda x: torch.cat([x, x], 1), volumes(), torch.device("cpu"), 8)
    next(found)
    assert read == [0]


def test_a_run_predicts_its_test_cases_as_it_did(made: Made, tmp_path: Path) -> None:
    model = prediction.from_run(made.run, device="cpu")
    results = list(prediction.predict(model, given(made.images), tmp_path, probabilities=True))
    own = nib.load(made.run.predictions / "ct_1003.nii.gz")
    for image, result in zip(made.images, results, strict=True):
        original, saved = nib.load(image), nib.load(result.labels)
        assert saved.shape == original.shape
        assert np.array_equal(saved.affine, original.affine)
        if "ct_" in image.name:
            assert np.array_equal(np.asarray(saved.dataobj), np.asarray(own.dataobj))
        maps = nib.load(tmp_path / f"{inputs.stem(image)}_prob.nii.gz")
        assert maps.shape == (*original.shape, 5)
        p = np.asarray(maps.dataobj)
        assert np.allclose(p.sum(-1), 1, atol=1e-4)
        values = np.array([0, *(s.values[0] for s in model.structures)])
        assert np.array_equal(values[p.argmax(-1)], np.asarray(saved.dataobj))
        voxel = np.prod(np.linalg.norm(original.affine[:3, :3], axis=0)) / 1000
        for index, structure in enumerate(model.structures, start=1):
            count = (np.asarray(saved.dataobj) == values[index]).sum()
            assert result.ml[structure.name] == pytest.approx(count * voxel, rel=1e-5)
    table = prediction.volumes_table(results, model)
    known = ["model", "adapt", "privileged"]
    assert list(table.columns) == ["file", "structure", "ml", *SPACING, *known] and len(table) == 8
    assert set(table["model"]) == {f"{made.run.config.method} {made.run.id}"}
    sides = np.linalg.norm(nib.load(table["file"].iloc[0]).affine[:3, :3], axis=0)
    np.testing.assert_allclose(table[[*SPACING]].iloc[0].astype(float), sides, rtol=1e-6)


def test_new_volumes_whatever_their_header_says(made: Made, tmp_path: Path, call: Call) -> None:
    """Units and forms are those of the image, ml follow the unit, and doubts are reported."""
    plain = nib.load(made.images[0])
    voxels, affine = np.asarray(plain.dataobj), plain.affine

    small = nib.Nifti1Image(voxels, np.diag([1000, 1000, 1000, 1]) @ affine)
    small.header.set_xyzt_units("micron")
    turned = affine.copy()
    turned[:3] = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]] @ turned[:3]
    two = nib.Nifti1Image(voxels, affine)
    two.set_qform(turned, 1)
    none = nib.Nifti1Image(voxels, None)
    none.header.set_zooms(nib.affines.voxel_sizes(affine))
    files = []
    for name, image in (("plain", plain), ("small", small), ("two", two), ("none", none)):
        files.append(tmp_path / f"{name}.nii.gz")
        nib.save(image, files[-1])

    model = prediction.from_run(made.run, device="cpu")
    out = tmp_path / "out"
    told: list[str] = []
    first, second, third, fourth = prediction.predict(
        model, given(files), out, "ct", probabilities=True, warn=told.append
    )
    assert second.ml == pytest.approx(first.ml, rel=1e-4)
    assert np.array_equal(first.classes, second.classes)
    labels = np.asarray(nib.load(first.labels).dataobj)
    assert sum(first.ml.values()) == pytest.approx(
        np.count_nonzero(labels) * abs(np.linalg.det(affine[:3, :3])) / 1000, rel=1e-6
    )
    told = [text for text in told if "intensity" not in text]
    assert len(told) == 2
    assert "two.nii.gz" in told[0] and "a qform and an sform" in told[0]
    assert "none.nii.gz" in told[1] and "has no orientation in its header" in told[1]
    names = ["qform_code", "sform_code", "xyzt_units", "quatern_d", "qoffset_x", "srow_x", "srow_y"]
    for file in files:
        image = nib.load(file).header
        for ending in ("seg", "prob"):
            written = nib.load(out / f"{inputs.stem(file)}_{ending}.nii.gz").header
            assert [written[n].tolist() for n in names] == [image[n].tolist() for n in names]
            assert np.array_equal(written["pixdim"][:4], image["pixdim"][:4])

    code, out_text, err = call("predict", files[3], "--run", made.run.path, "--out", tmp_path / "c")
    assert code == 0 and "has no orientation in its header" in err
    assert out_text


def test_an_exported_model_predicts_alike_without_run_and_data(made: Made, tmp_path: Path) -> None:
    model = prediction.from_run(made.run, device="cpu")
    folder = exporting.export(model, made.run, tmp_path / "model")
    assert {f.name for f in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "LICENSE",
    }
    card = (folder / "README.md").read_text()
    for said in ("mean_teacher, trained on phantom mr-ct", "French et al.", "| mean | ", "`last`"):
        assert said in card
    assert "Apache License" in (folder / "LICENSE").read_text()
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    loaded = prediction.from_directory(elsewhere, device="cpu")
    first = list(prediction.predict(model, given(made.images), tmp_path / "a"))
    second = list(prediction.predict(loaded, given(made.images), tmp_path / "b"))
    for a, b in zip(first, second, strict=True):
        assert a.labels.read_bytes() == b.labels.read_bytes() or np.array_equal(
            nib.load(a.labels).dataobj, nib.load(b.labels).dataobj
        )
        assert a.ml == b.ml


@pytest.mark.parametrize("slice_spacing", ["8", "null"])
def test_a_model_of_several_slices_predicts_new_volumes_as_its_run_did(
    slice_spacing: str, phantom_root: Path, tmp_path: Path
) -> None:
    """Also if volumes keep their own spacing, where neighbours are found by distance."""
    sets = ("slices=3", f"grid.slice_spacing={slice_spacing}")
    made = make("mean_teacher", phantom_root, tmp_path / "runs", *sets)
    distance = made.run.config.slice_distance
    assert distance is not None and (slice_spacing == "null" or distance == 8)
    model = prediction.from_run(made.run, device="cpu")
    folder = exporting.export(model, made.run, tmp_path / "model")
    assert f"3, {distance:g} mm apart" in (folder / "README.md").read_text()
    loaded = prediction.from_directory(folder, device="cpu")
    assert loaded.config.slices == 3 and loaded.config.slice_distance == distance
    own = nib.load(made.run.predictions / "ct_1003.nii.gz")
    for name, used in (("run", model), ("export", loaded)):
        first, second = prediction.predict(used, given(made.images), tmp_path / name)
        assert np.array_equal(nib.load(first.labels).dataobj, own.dataobj)
        assert nib.load(second.labels).shape == nib.load(made.images[1]).shape


def test_only_what_predicts_is_exported(phantom_root: Path, tmp_path: Path) -> None:
    """No discriminators, and no pools of training images."""
    small = ("generator", "encoder", "discriminator")
    sets = [f"method.width_{name}=2" for name in small] + ["method.pool_size=2"]
    made = make("sifa", phantom_root, tmp_path / "runs", *sets)
    model = prediction.from_run(made.run, device="cpu")
    assert any(name.startswith("pool_a") for name in model.method.state_dict())
    weights = exporting.predicting_weights(model)
    assert {name.split(".")[0] for name in weights} == {"encoder", "head", "generator"}
    assert any("running_mean" in name for name in weights)
    exporting.export(model, made.run, tmp_path / "model")
    prediction.from_directory(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("domain", [None, "ct", "mr"])
def test_a_domain_is_predicted_as_such_and_export_keeps_what_predicts_it(
    domain: str | None, two_faced: Made, tmp_path: Path, call: Call
) -> None:
    """The method predicts one structure for all target pixels and another for the source's."""
    plugins = [Path(__file__).parents[1] / "support" / "two_faced_method.py"]
    model = prediction.from_run(two_faced.run, plugins, device="cpu")
    assert {name.rpartition(".")[0] for name in exporting.predicting_weights(model)} == {
        "heads.target",
        "heads.source",
    }
    exporting.export(model, two_faced.run, tmp_path / "model")
    role = "source" if domain == "mr" else "target"
    value = model.structures[CLASSES[role] - 1].values[0]
    words = ["--plugin", plugins[0], *([] if domain is None else ["--domain", domain])]
    for source in (["--run", two_faced.run.path], ["--model", tmp_path / "model"]):
        out = tmp_path / source[0]
        code, said, _ = call("predict", *two_faced.images, *source, "--out", out, *words)
        assert code == 0
        assert f"Images are read as {domain or 'ct'}, the {role} domain." in said
        for image in two_faced.images:
            labels = nib.load(out / f"{inputs.stem(image)}_seg.nii.gz")
            found = set(np.unique(np.asarray(labels.dataobj)).tolist())
            assert value in found and found <= {0, value}


def test_a_model_knows_two_domains(made: Made, tmp_path: Path) -> None:
    model = prediction.from_run(made.run, device="cpu")
    with pytest.raises(ConfigError, match="--domain us: .* of mr, its source domain, and of ct, "):
        prediction.predict(model, given(made.images), tmp_path, "us").__next__()
    folder = exporting.export(model, made.run, tmp_path / "model")
    for again in (model, prediction.from_directory(folder, device="cpu")):
        assert again.domain(None) == again.domain("ct") == "ct" and again.domain("mr") == "mr"
        assert again.data == model.data


@pytest.mark.parametrize("style", ["adgan", "codes"])
def test_images_of_the_source_are_translated_as_in_training(
    style: str, phantom_root: Path, tmp_path: Path
) -> None:
    """Also by an exported model, and independent of earlier volumes."""
    sets = [f"method.style={style}", "method.adgan_width=4", "method.codes_scales=1"]
    made = make("global_only", phantom_root, tmp_path / "runs", *sets)
    model = prediction.from_run(made.run, device="cpu")
    (mr,) = (image for image in made.images if "mr_" in image.name)
    loaded = prediction.from_directory(
        exporting.export(model, made.run, tmp_path / "model"), device="cpu"
    )
    image = load_image(mr, model.data.domains["mr"].reading, made.run.config.grid)
    slices = torch.from_numpy(image.voxels.astype(np.float16).astype(np.float32))[:, None]
    found = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(made.run.config.seed)
        translate = list(model.method.stages())[-1].translate
        assert translate is not None
        for batch in slices.split(32):
            logits = model.method.predict(translate(batch), "source")
            found.append(logits.softmax(1).numpy())
    expected = restore(np.concatenate(found).swapaxes(0, 1), image.placement)
    values = np.array([0, *(s.values[0] for s in model.structures)])
    for number, (used, files) in enumerate(((model, [mr]), (loaded, [*made.images[:1], mr]))):
        *_, last = prediction.predict(used, given(files), tmp_path / str(number), "mr")
        labels = np.asarray(nib.load(last.labels).dataobj)
        assert np.mean(labels == values[expected]) > 0.9999  # rounding may change a voxel
    first, second = (nib.load(f) for f in sorted(tmp_path.glob("[01]/*mr_*_seg.nii.gz")))
    assert np.array_equal(first.dataobj, second.dataobj)


def test_a_run_in_half_precision_predicts_its_test_cases_as_it_did(
    phantom_root: Path, tmp_path: Path
) -> None:
    made = make("source_only", phantom_root, tmp_path / "runs", "precision=bf16-mixed")
    own = nib.load(made.run.predictions / "ct_1003.nii.gz")
    model = prediction.from_run(made.run, device="cpu")
    (result,) = prediction.predict(model, given(made.images[:1]), tmp_path)
    assert np.array_equal(nib.load(result.labels).dataobj, own.dataobj)


def test_the_upper_bound_predicts_both_domains(phantom_root: Path, tmp_path: Path) -> None:
    """It reports that it was not trained on the source."""
    request = replace(request_of("source_only", phantom_root, tmp_path), scenario="supervised")
    planned = plan(request)
    execute(planned, Progress(enabled=False))
    own = nib.load(planned.directory.predictions / "ct_1003.nii.gz")
    model = prediction.from_run(planned.directory, device="cpu")
    image = given([planned.dataset.split("ct", "test")[0].image])
    for domain in ("ct", "mr"):
        (result,) = prediction.predict(model, image, tmp_path / domain, domain)
        labels = np.asarray(nib.load(result.labels).dataobj)
        assert labels.shape == own.shape
        # The phantom has one reading, and the method ignores the domain.
        assert np.array_equal(labels, own.dataobj)
    assert _read_as(model, "mr").endswith("whose images were not in training.")


def test_weights_that_no_module_owns_are_found_out(made: Made) -> None:
    model = prediction.from_run(made.run, device="cpu")

    class Hidden(type(model.method)):  # type: ignore[misc]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.aside = nn.Linear(1, 1)

        def predict(self, images: torch.Tensor, domain: Role) -> torch.Tensor:
            return super().predict(images, domain) * (1 + self.aside.weight.abs().sum())

    hidden = exporting._fresh(model, model.method.state_dict())
    hidden.__class__ = Hidden
    hidden.aside = nn.Linear(1, 1)
    nn.init.constant_(hidden.aside.weight, 2.0)
    spoiled = prediction.Model(
        hidden.eval(),
        model.config,
        model.data,
        model.device,
        model.source,
    )
    with pytest.raises(PluginError, match="cannot be exported"):
        exporting.predicting_weights(spoiled)


def test_a_directory_that_is_not_empty_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    model = prediction.from_run(made.run, device="cpu")
    with pytest.raises(UserError, match="not an empty directory"):
        exporting.export(model, made.run, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.fault("full disk", "export of a model, full at each of its files")
def test_an_export_on_a_full_disk_leaves_nothing(made: Made, tmp_path: Path, call: Call) -> None:
    words = ["export", "--run", made.run.path, "--out", tmp_path / "new" / "deep" / "model"]
    for full in range(4):
        with full_disk(full):
            code, _, said = call(*words)
        assert code == 1 and "is full; free some space" in said and "Traceback" not in said
        assert list(tmp_path.iterdir()) == []
    assert call(*words)[0] == 0


@pytest.fixture(scope="module")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = prediction.from_run(made.run, device="cpu")
    return exporting.export(model, made.run, tmp_path_factory.mktemp("exported") / "model")


def weights_of(model: prediction.Model) -> dict[str, torch.Tensor]:
    return model.method.state_dict()


@pytest.mark.fault("silent damage", "exported models")
def test_a_damaged_model_is_refused(
    exported: Path, made: Made, tmp_path: Path, tries: Callable[[int], range]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    for name in ("config.json", "model.safetensors"):
        good = (folder / name).read_bytes()
        for seed in tries(200):
            (folder / name).write_bytes(damaged(good, seed))
            with pytest.raises(UserError) as error:
                prediction.from_directory(folder, device="cpu")
            text = str(error.value)
            assert str(folder) in text and text.endswith(".") and "\n" not in text
        (folder / name).unlink()
        with pytest.raises(UserError, match="is not an exported model"):
            prediction.from_directory(folder, device="cpu")
        (folder / name).write_bytes(good)
    # Valid in itself: another model's weights, and a setting edited by hand.
    model = prediction.from_run(made.run, device="cpu")
    for tensor in model.method.parameters():
        tensor.data += 1e-3
    other = exporting.export(model, made.run, tmp_path / "other")
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(UserError, match=r"safetensors is damaged \(its checksum differs\);"):
        prediction.from_directory(folder, device="cpu")
    shutil.copy(exported / "model.safetensors", folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"config.json is damaged \(its checksum differs\);"):
        prediction.from_directory(folder, device="cpu")


def test_a_model_of_an_earlier_version_opens_and_says_that_it_has_no_checksum(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    described = json.loads((folder / "config.json").read_text())
    del described["sha256"], described["files"]
    (folder / "config.json").write_text(json.dumps(described))
    models = [prediction.from_directory(each, device="cpu") for each in (folder, exported)]
    old, new = ({n: weights_of(m)[n] for n in described["weights"]} for m in models)
    assert old and first_difference(old, new) is None
    assert capsys.readouterr().err == (
        f"warning: {folder} carries no checksums, because an earlier version exported it; export "
        "it again, so that damage is noticed.\n"
    )


@pytest.mark.fault("silent damage", "weights of finished runs")
@pytest.mark.parametrize("written", ["now", "by an earlier version"])
def test_a_run_with_damaged_weights_is_refused(
    written: str, made: Made, tmp_path: Path, tries: Callable[[int], range]
) -> None:
    """Those of earlier versions are verified by the checksums of their ZIP archive."""
    folder = made.run.path
    run = RunDirectory.open(Path(shutil.copytree(folder, tmp_path / "a" / "b" / folder.name)))
    path = run.checkpoints / f"candidate_{run.read_summary()['chosen_steps']['last']:07d}.pt"
    good = path.read_bytes()
    if written != "now":
        good = good[: good.rindex(b"\nsha256 ")]
        path.write_bytes(good)
        mark = {"id": run.id, "time": "", "summary": digest_of(run.path / "summary.json")}
        (run.path / "done").write_text(json.dumps(mark))
    expected = weights_of(prediction.from_run(run, device="cpu"))
    for seed in tries(200):
        path.write_bytes(damaged(good, seed))
        try:
            found = weights_of(prediction.from_run(run, device="cpu"))
        except UserError as error:
            assert path.name in str(error) and str(error).endswith(".")
        else:  # fields of the archive that mean nothing
            assert written != "now" and first_difference(found, expected) is None


def test_a_run_is_found_by_directory_id_and_beginning(made: Made) -> None:
    for name in (str(made.run.path), made.run.id, made.run.id[:6]):
        assert prediction.find_run(name, made.root).path == made.run.path
    with pytest.raises(UserError, match="no run in .*/ has an id starting with 'zzz'"):
        prediction.find_run("zzz", made.root)
    with pytest.raises(ConfigError, match="--selector oracle chose no checkpoint"):
        prediction.from_run(made.run, selector="oracle")


def test_a_run_that_is_not_finished_cannot_predict(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "phantom" / "mean_teacher" / made.run.id
    shutil.copytree(made.run.path, copy)
    (copy / "done").unlink()
    with pytest.raises(UserError, match="not finished"):
        prediction.find_run(str(copy), tmp_path)


def test_the_commands_write_labels_volumes_and_pictures(
    made: Made, tmp_path: Path, call: Call
) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    named = ("--run", made.run.id, "--runs", made.root)
    code, said, _ = call("export", *named, "--out", model)
    assert code == 0 and f"predict --model {model}" in said
    code, said, _ = call("predict", *made.images, "--model", model, "--overlay", "--out", out)
    assert code == 0 and "MYO" in said and "ml" in said
    name = inputs.stem(made.images[0])
    assert (out / f"{name}_seg.nii.gz").is_file() and (out / f"{name}.png").stat().st_size > 5000
    assert len(pd.read_csv(out / "volumes.csv")) == 8
    for words, text in (
        (["predict", made.images[0]], "either --run or --model"),
        (["predict", "none.nii.gz", *named], "none.nii.gz does not exist"),
        (["predict", made.images[0], "--model", tmp_path], "not an exported model"),
        (["predict", made.images[0], *named, "--domain", "us", "--out", model], "--domain us: "),
        (["export"], "--run is missing"),
    ):
        code, _, err = call(*words)
        assert code == 2 and text in err and "Traceback" not in err


def test_adaptation_is_an_entry_of_its_own(
    made: Made, phantom_root: Path, tmp_path: Path, call: Call
) -> None:
    """`predict --adapt tent` gives other probabilities, the same from Python; import takes them."""
    tested = [image for image in made.images if "ct_" in image.name]
    words = ["predict", *tested, "--run", made.run.path, "--device", "cpu", "--probabilities"]
    assert call(*words, "--out", tmp_path / "plain")[0] == 0
    code, out, err = call(*words, "--out", tmp_path / "tent", "--adapt", "tent")
    assert code == 0 and "Adapted by tent from batch to batch" in out + err
    asked = {"run": made.run.path, "device": "cpu", "quiet": True, "probabilities": True}
    api.predict(tested, out=tmp_path / "again", adapt="tent", **asked)

    def maps(place: str) -> list[np.ndarray]:
        names = [f"{one.name}_prob.nii.gz" for one in given(tested)]
        return [np.asarray(nib.load(tmp_path / place / name).dataobj) for name in names]

    plain, tent, again = (
        np.concatenate([m.ravel() for m in maps(p)]) for p in ("plain", "tent", "again")
    )
    np.testing.assert_array_equal(tent, again)
    assert 0 < np.abs(plain - tent).max() < 0.5
    code, _, err = call(*words, "--out", tmp_path / "x", "--adapt", "shot")
    assert code == 2 and "--adapt shot is unknown; use tent." in err
    assert not (tmp_path / "x").exists()
    for file in (tmp_path / "tent").glob("*_prob.nii.gz"):
        file.unlink()
    runs = tmp_path / "runs"
    place = ("--dataset", "phantom", "--data-root", phantom_root, "--runs", runs, "--no-mlflow")
    labels = ("--predictions", tmp_path / "tent", "--values", "dataset")
    code, out, err = call("import", "mean_teacher_tent", *place, *labels)
    assert code == 0, err
    (imported,) = list_runs(runs)
    assert imported.config.external and len(imported.read_cases()["case"].unique()) == len(tested)
    model = f"{made.run.config.method} {made.run.id}"
    assert imported.read_environment()["external"]["note"] == f"{model}, adapted by tent"
    assert prediction.stated(made.run.predictions) == (False, model)
    assert prediction.stated(made.images[0].parent) == (False, ""), "images of another origin"
    (tmp_path / "config.yaml").write_text("another: program's")
    assert prediction.stated(tmp_path / "tent")[1] == f"{model}, adapted by tent"
    assert prediction.stated(tmp_path / "none") == (False, "")
    table = pd.read_csv(tmp_path / "tent" / "volumes.csv", keep_default_na=False)
    assert set(table["adapt"]) == {"tent"} and set(table["privileged"]) == {False}
    table.assign(privileged=True).to_csv(tmp_path / "tent" / "volumes.csv", index=False)
    code, _, err = call("import", "upper_tent", *place, *labels)
    assert code == 2 and "trained on labels of the target; add --privileged." in err
    assert call("import", "upper_tent", *place, *labels, "--privileged")[0] == 0
    (upper,) = [run for run in list_runs(runs) if run.config.method == "upper_tent"]
    assert upper.config.privileged


def test_results_that_are_there_are_not_replaced_unasked(
    made: Made, tmp_path: Path, call: Call
) -> None:
    words = ("predict", made.images[0], "--run", made.run.path, "--out", tmp_path)
    (mine := tmp_path / f"{inputs.stem(made.images[0])}_seg.nii.gz").write_bytes(b"corrected")
    code, _, err = call(*words)
    assert code == 2 and f"{mine} exists already" in err and "--overwrite" in err
    assert mine.read_bytes() == b"corrected" and not (tmp_path / "volumes.csv").exists()
    assert call(*words, "--overwrite")[0] == 0
    assert nib.load(mine).shape == nib.load(made.images[0]).shape
    code, _, err = call("predict", made.images[1], *words[2:])
    assert code == 2 and "volumes.csv exists already" in err


def test_volumes_before_a_bad_image_are_kept(made: Made, tmp_path: Path, call: Call) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    words = ("--run", made.run.path, "--out", tmp_path / "out")
    code, _, err = call("predict", *made.images, bad, *words)
    assert code == 2 and f"{bad} cannot be read" in err
    table = pd.read_csv(tmp_path / "out" / "volumes.csv")
    assert set(table["file"]) <= set(map(str, made.images)) and len(table)


def test_folders_and_files_of_one_name_are_segmented_beside_each_other(
    made: Made, tmp_path: Path, call: Call
) -> None:
    image = made.images[0]
    for folder, name in (("one", "scan"), ("two", "scan"), ("imagesTs", "liver_7_0000")):
        (tmp_path / folder).mkdir()
        shutil.copy(image, tmp_path / folder / f"{name}.nii.gz")
    shutil.copy(image, tmp_path / "one" / "scan_label.nii.gz")
    (tmp_path / "two" / "._scan.nii.gz").write_bytes(b"a companion of macOS")
    folders = [tmp_path / name for name in ("one", "two", "imagesTs")]
    out = tmp_path / "out"
    code, said, _ = call("predict", *folders, "--run", made.run.path, "--out", out, "--overlay")
    assert code == 0 and "Skipped (labels by their names): scan_label.nii.gz." in said
    names = ["liver_7", "one_scan", "two_scan"]
    assert sorted(f.name for f in out.glob("*_seg.nii.gz")) == [f"{n}_seg.nii.gz" for n in names]
    assert sorted(f.name for f in out.glob("*.png")) == [f"{name}.png" for name in names]
    assert pd.read_csv(out / "volumes.csv")["file"].nunique() == 3


def test_labels_of_a_series_lie_on_it(
    made: Made, tmp_path: Path, dicom_slice: Callable[..., Any], call: Call
) -> None:
    """The geometry equals SimpleITK's, and the labels those of the same volume in NIfTI."""
    import pydicom
    import SimpleITK as sitk

    voxels = np.asarray(nib.load(made.images[0]).dataobj)[::2, ::2, ::4]
    plane = ((1, 0, 0), (0, -0.6, 0.8))
    (tmp_path / "series").mkdir()
    for z in range(voxels.shape[2]):
        place = np.array([10, -20, 30]) + np.cross(*plane) * 4.5 * z
        one = dicom_slice(voxels[:, :, z].T, place, plane, (3.0, 3.5))
        file = tmp_path / "series" / f"{97 * z % 89:03d}.dcm"
        pydicom.dcmwrite(file, one, enforce_file_format=True)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    itk = reader.Execute()
    sitk.WriteImage(itk, str(tmp_path / "converted.nii.gz"))
    words = (tmp_path / "series", tmp_path / "converted.nii.gz", "--run", made.run.path)
    assert call("predict", *words, "--out", tmp_path / "out")[0] == 0
    labels = sitk.ReadImage(str(tmp_path / "out" / "series_seg.nii.gz"))
    assert labels.GetSize() == itk.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(labels, get)(), getattr(itk, get)(), atol=1e-4)
    other = sitk.ReadImage(str(tmp_path / "out" / "converted_seg.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(labels), sitk.GetArrayFromImage(other))


def test_every_format_gives_the_same_segmentation(made: Made, tmp_path: Path) -> None:
    import SimpleITK as sitk

    image = tmp_path / "other.mha"
    sitk.WriteImage(sitk.ReadImage(str(made.images[0])), str(image))
    model = prediction.from_run(made.run)
    for file, folder in ((made.images[0], "nifti"), (image, "meta")):
        list(prediction.predict(model, given([file]), tmp_path / folder))
    name = inputs.stem(made.images[0])
    first = nib.load(tmp_path / "nifti" / f"{name}_seg.nii.gz")
    second = nib.load(tmp_path / "meta" / "other_seg.nii.gz")
    assert np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-3)
