"""`score` and `import`: predictions of other tools, by a user's commands, up to every table."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sample_runs import reseal
from small_commands import SMALL, Call, Result, refused

import glua_bench
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.scoring.metrics import METRICS

RUN = ["--dataset=phantom", *SMALL, "--no-mlflow", "--data-root"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate a coarse phantom with two test cases in CT."""
    from glua_bench.datasets.phantom.dataset import generate

    root = tmp_path_factory.mktemp("outside") / "my phantom"
    ids = {"ct": [1001, 1003, 1004, 1021], "mr": [1001, 1003, 1007]}
    generate(root, seed=0, ids=ids, voxel_scale=2.0, workers=1)
    return root


def perturb(source: Path, target: Path, shift: int = 1) -> None:
    """Write a label file moved by some voxels, as a tool would that reads the same geometry."""
    image = nib.load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    moved = np.roll(np.asarray(image.dataobj).astype(np.int16), shift, 0)
    nib.save(nib.Nifti1Image(moved, image.affine), target)


@pytest.fixture
def predicted(cohort: Path, tmp_path: Path) -> Path:
    """Perturbed references of both test cases, with the dataset's label values."""
    for number in (1003, 1021):
        label = cohort / "ct_train" / f"ct_train_{number}_label.nii.gz"
        perturb(label, tmp_path / "their predictions" / f"ct_{number}.nii.gz")
    return tmp_path / "their predictions"


def block(out: str) -> list[str]:
    """Return the lines of the printed table of structures."""
    lines = out[out.index("structure ") :].splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("mean")) + 1]


# -- a run, scored and compared -------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_s_predictions_have_the_run_s_scores_and_stand_beside_it(
    call: Call, cohort: Path, predicted: Path
) -> None:
    code, out, err = call("run", "--method=source_only", *RUN, cohort)
    assert code == 0, err
    (run,) = list_runs(Path("runs"))
    code, again, err = call(
        *("score", run.predictions, "--dataset=phantom", "--data-root", cohort),
        *("--jobs=1", "--out=s.csv", "--verify"),
    )
    assert code == 0, err
    assert block(again) == block(out)
    assert len(re.findall(r"^Largest difference to medpy: \w+ \S+ \(\d", again, re.M)) == 3
    own = run.read_cases()
    own = own[own["selector"] == "last"].reset_index(drop=True)
    rows = pd.read_csv("s.csv")
    for name in ("case", "structure", "missed", "false_alarm"):
        assert list(rows[name]) == list(own[name])
    for name in (*METRICS, "reference_ml", "prediction_ml"):
        np.testing.assert_allclose(rows[name], own[name])

    # The printed next command, with a name, imports the same predictions with the same scores.
    (line,) = re.findall(r"^Next: glua-bench (import .*?)   ", again, re.M)
    words = shlex.split(line.replace("NAME", "same"))
    code, out, err = call(*words, "--no-mlflow", "--jobs=1")
    assert code == 0 and block(out) == block(again), err
    data = ["--dataset=phantom", "--no-mlflow", "--jobs=1", "--data-root", cohort]
    code, out, err = call("import", "moved", "--predictions", predicted, *data, "--note=tool 1.2")
    assert code == 0, err
    again = call("import", "upper", "--predictions", predicted, "--privileged", *data)
    assert again[0] == 0 and "PRIVILEGED" in again[1]

    # compare: nothing is trained, since the run is done; the entries stand in table and files.
    code, out, err = call(
        *("compare", "--methods=source_only,same,moved,upper", "--no-bounds", "--seeds=1"),
        *(*RUN, cohort, "--out=cmp"),
    )
    assert code == 0 and "1 runs: 0 run now, 1 done before" in out, err
    table = out[out.index("phantom mr-ct\n") :]
    for entry in ("same (external)", "moved (external)", "upper (external, privileged)"):
        (line,) = re.findall(rf"^{re.escape(entry)} .*$", table, re.M)
        assert line.split()[-3:] == ["–", "–", "1"], "no seconds, no memory, one seed"
    assert "external: predictions of another tool" in table
    assert "phantom mr-ct: moved (external) has the highest mean Dice" in table
    lines = pd.read_csv("cmp/table.csv").set_index("entry")
    assert lines.loc["same (external)", "Dice"] == lines.loc["source_only", "Dice"]
    assert pd.isna(lines.loc["same (external)", "training s"])
    pairs = pd.read_csv("cmp/pairs.csv")
    assert not pairs[["a", "b"]].isin(["upper (external, privileged)"]).any(axis=None)
    # A comparison file and Python add an entry, too.
    file = Path("with moved.yaml")
    text = "bounds: false\nseeds: 1\nimported: [moved]\nentries:\n"
    file.write_text(text + "  - {name: plain, method: source_only}\n", encoding="utf-8")
    code, shown, err = call("compare", "--config", file, *RUN, cohort)
    assert code == 0 and "0 run now" in shown, err
    assert re.search(r"^plain .*\n(.*\n)*moved \(external\) ", shown, re.M), shown
    sets = dict(word.removeprefix("--set=").split("=") for word in SMALL if "--set=" in word)
    found = glua_bench.compare(
        *(["source_only", "moved"], "phantom"),
        seeds=1,
        bounds=False,
        settings={name: int(value) for name, value in sets.items()},
        quiet=True,
        preset="quick",
        steps=2,
        device="cpu",
        mlflow=False,
        data_root=cohort,
    )
    assert [entry for _, entry in found.table.index] == ["source_only", "moved (external)"]

    (line,) = re.findall(r"^Next: +glua-bench (report.*)$", out, re.M)
    code, out, err = call(*shlex.split(line))
    assert code == 0, err
    assert "moved (external) was imported: tool 1.2 (files " in err
    page = Path("report/report.html").read_text(encoding="utf-8")
    assert "moved (external)" in page and "tool 1.2 (files " in page
    for kind in ("main", "cost", "ranking"):
        for suffix in ("csv", "md", "tex"):
            text = Path(f"report/tables/{kind}_phantom_mr-ct.{suffix}").read_text("utf-8")
            assert "moved (external)" in text, (kind, suffix)
    cost = pd.read_csv("report/tables/cost_phantom_mr-ct.csv").set_index("method")
    assert cost.loc["moved (external)", ["training (s)", "s/update"]].isna().all()
    assert "external" not in Path("report/tables/selectors_phantom_mr-ct.md").read_text("utf-8")
    ids = Path("report/tables/runs.md").read_text("utf-8")
    assert all(run.id in ids for run in list_runs(Path("runs")))
    # From the rows alone, under any selector, and whatever setting selects the others.
    for options in (["--rows=report/rows.parquet"], ["--where=steps=2", "--selector=source_val"]):
        code, _, err = call("report", *options, "--no-pictures", "--out=again")
        assert code == 0 and "tool 1.2 (files " in err, err
        text = Path("again/tables/main_phantom_mr-ct.md").read_text("utf-8")
        assert "same (external)" in text and "source" in text

    moved = next(run for run in list_runs(Path("runs")) if run.config.method == "moved")
    image = cohort / "ct_train" / "ct_train_1003_image.nii.gz"
    for command in (["predict", image, "--run"], ["export", "--run"]):
        refused(call(*command, moved.path), "imported from another tool and has no model")


# -- entries only ---------------------------------------------------------------------------------


def imported(call: Call, cohort: Path, *words: object) -> Result:
    data = ["--dataset=phantom", "--data-root", cohort, "--jobs=1"]
    return call("import", *words, *data)


def test_an_export_comes_back_as_an_entry(
    call: Call, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data export` → a tool that writes into nnU-Net's folders → `import`."""
    assert call("data", "export", "phantom", "--to=ex", "--data-root", cohort, "--jobs=1")[0] == 0
    labels = Path("ex/nnUNet_raw/Dataset502_phantom_ct/labelsTs")
    result = Path("nnUNet_results/Dataset502_phantom_ct/nnUNetTrainer__nnUNetPlans__2d/out")
    for file in labels.iterdir():
        perturb(file, result / file.name)
    for name in ("dataset.json", "plans.json", "summary.json"):
        (result / name).write_text("{}")
    code, out, err = imported(call, cohort, "nnunet_2d", "--predictions", result)
    assert code == 0, err
    assert "class indices (1 = MYO, 2 = LAC, 3 = LVC, 4 = AA)" in out and "EXTERNAL" in out
    (result / "dataset.json").unlink()
    code, scored, err = call("score", result, labels, "--jobs=1")
    assert code == 0 and "Dataset502_phantom_ct/dataset.json" in scored, err
    assert block(scored) == block(out)
    # The entry holds what reports read, and nothing that is not known.
    (run,) = list_runs(Path("runs"))
    assert run.done and run.config.external
    assert sorted(p.name for p in run.predictions.iterdir()) == ["ct_1003.nii.gz", "ct_1021.nii.gz"]
    values = set(np.unique(np.asarray(nib.load(run.predictions / "ct_1003.nii.gz").dataobj)))
    assert values == {0, 205, 420, 500, 820}
    assert "steps" not in (run.path / "config.yaml").read_text()
    facts = run.read_environment()["external"]
    assert facts["predictions"]["ct_1003"]["file"] == "1003.nii.gz"
    assert len(facts["predictions"]["ct_1003"]["sha256"]) == 64
    assert not list(Path("runs").rglob(".writing-*"))

    # MLflow has it like any finished run, and gives it back.
    assert "0 runs uploaded, 1 already present" in call("sync")[1]
    code, _, err = call("report", "--from-mlflow", "--out=r", "--data-root", cohort)
    assert code == 0 and "nnunet_2d (external) was imported: no note (files " in err, err
    page = Path("r/report.html").read_text(encoding="utf-8")
    assert "nnunet_2d (external)" in page and Path("r/figures").is_dir()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (copy,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert "nnunet_2d (external)" in copy.info.run_name and "steps" not in copy.data.params
    assert copy.data.params["scenario"] == "external"
    assert copy.data.tags["glua_bench.scenario"] == "external"
    mean = run.read_summary()["scores"][-1]
    assert copy.data.metrics["dice"] == pytest.approx(mean["dice"])
    assert "(mean over structures, external)" in copy.data.tags["mlflow.note.content"]

    # So does TensorBoard.
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "glua_bench.records.tensorboard:TensorBoard")
    code, out, err = call("sync")
    assert code == 0 and "1 runs uploaded" in out, err
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = Path("runs/tensorboard/phantom").iterdir()
    found = accumulator.EventAccumulator(str(folder)).Reload()
    assert found.Scalars("dice")[0].value == pytest.approx(mean["dice"])


def test_scores_and_imports_are_printed_as_json_or_alone(
    call: Call, cohort: Path, predicted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glua_bench.datasets.phantom.dataset import Phantom

    monkeypatch.setattr(Phantom, "caveat", lambda self, direction: f"{direction} shares patients")
    data = ["--dataset=phantom", "--data-root", cohort, "--jobs=1"]
    score = ["score", predicted, *data]
    found = json.loads(call(*score, "--json")[1])
    assert [row["structure"] for row in found["scores"]] == ["MYO", "LAC", "LVC", "AA", "mean"]
    assert len(found["rows"]) == 8 and found["missing"] == 0
    assert found["distances"] == Phantom.distance_note
    done = ["import", "x", "--predictions", predicted, "--privileged", "--no-mlflow", *data]
    made = json.loads(call(*done, "--json")[1])
    assert made["scores"] == found["scores"] and made["values"] == "dataset"
    assert made["privileged"] and made["caveat"] == "mr-ct shares patients"
    (run,) = list_runs(Path("runs"))
    assert made["id"] == run.id and run.read_environment()["caveat"] == made["caveat"]
    for words, last in ((score, "2 cases. Distances in "), (done, "Results: ")):
        code, out, err = call(*words, "--quiet")
        assert code == 0 and err == "" and "Next" not in out and "case 1" not in out
        assert out.rstrip().splitlines()[-1].startswith(last)
    assert "CAVEAT mr-ct shares patients." in out


def test_the_same_again_is_done_and_others_need_a_word(
    call: Call, cohort: Path, predicted: Path
) -> None:
    def once(*words: object) -> Result:
        return imported(call, cohort, "x", "--no-mlflow", "--predictions", predicted, *words)

    assert once()[0] == 0
    (run,) = list_runs(Path("runs"))
    before = (run.path / "done").stat().st_mtime_ns
    code, out, _ = once()
    assert code == 0 and f"already imported: {run.path}" in out
    assert (run.path / "done").stat().st_mtime_ns == before
    shutil.copy(predicted / "ct_1003.nii.gz", "kept.nii.gz")
    perturb(predicted / "ct_1003.nii.gz", predicted / "ct_1003.nii.gz")
    refused(once(), str(run.path), "--overwrite", "--seed")
    assert once("--seed=1")[0] == 0 and len(list_runs(Path("runs"))) == 2
    code, out, _ = once("--overwrite", "--note=second try")
    assert code == 0 and f"Replaced the import {run.id}" in out
    left = list_runs(Path("runs"))
    assert sorted(r.config.seed for r in left) == [0, 1] and run.id not in {r.id for r in left}
    assert once("--overwrite", "--note=third")[0] == 0, "the same files, with another note"
    notes = {
        r.config.seed: r.read_environment()["external"]["note"] for r in list_runs(Path("runs"))
    }
    assert notes == {0: "third", 1: ""}


@pytest.mark.fault("sealed results", "edit the imported predictions of another tool")
def test_a_damaged_import_is_named_and_imported_again(
    call: Call, cohort: Path, predicted: Path
) -> None:
    words = ("--no-mlflow", "--predictions", predicted)
    assert imported(call, cohort, "x", *words)[0] == 0
    (run,) = list_runs(Path("runs"))
    file = run.predictions / "ct_1003.nii.gz"
    whole = file.read_bytes()
    shutil.copy(run.predictions / "ct_1021.nii.gz", file)
    said = (str(run.path), "predictions/ct_1003.nii.gz was", "import its predictions again")
    methods = ("compare", "--methods=x,source_only", "--no-bounds")
    refused(call(*methods, *RUN, cohort), *said)
    code, _, err = call("report", "--no-pictures")
    assert code == 2 and all(word in err for word in said)
    code, out, _ = imported(call, cohort, "x", *words)
    assert code == 0 and "already imported" not in out and "runs/damaged/" in out
    assert run.done and file.read_bytes() == whole and len(list_runs(Path("runs"))) == 1


def test_refused_imports_leave_nothing(call: Call, cohort: Path, predicted: Path) -> None:
    def bad(*words: str, name: str = "x", options: Any = ()) -> None:
        result = imported(call, cohort, name, "--no-mlflow", "--predictions", predicted, *options)
        refused(result, *words)
        assert not [p for p in Path("runs").rglob("*") if p.is_file()], "half an import"

    @contextlib.contextmanager
    def changed(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Any:
        kept = path.read_bytes()
        image = nib.load(path)
        voxels = change(np.asarray(image.dataobj).astype(np.int16))
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
        yield
        path.write_bytes(kept)

    one, other = predicted / "ct_1003.nii.gz", predicted / "ct_1021.nii.gz"
    for name in ("glua", "GLUA", "supervised"):
        bad(f"'{name}'", "is that of a method", name=name)
    for name in ("a/b", "..", "two words", "x,y"):
        bad("cannot name a directory", name=name)
    with changed(one, lambda labels: labels[:-1]):
        bad("ct_1003.nii.gz has shape", "resample the label onto the image")
    with changed(one, lambda labels: np.where(labels == 205, 7, labels)):
        bad("ct_1003.nii.gz has label value(s) 7", "relabel")
    with changed(one, lambda labels: labels):
        bad("ct_1003.nii.gz has label value(s)", "--values", options=["--values=classes"])
    bad("--values raw is unknown", options=["--values=raw"])
    extra = predicted / "notes_1.nii.gz"
    shutil.copy(one, extra)
    bad("notes_1.nii.gz matches no case", "ct_1003.nii.gz")
    extra.rename(predicted / "mr_1007.nii.gz")
    bad("mr_1007.nii.gz is case mr_1007 of mr (test)", "not a test case of phantom mr-ct")
    (predicted / "mr_1007.nii.gz").unlink()
    shutil.move(one, predicted.with_name("away.nii.gz"))
    bad("no prediction for 1 of 2 test cases", "ct_1003", "add them")
    for folder in ("mr", "Dataset501_phantom_mr"):
        (predicted / folder).mkdir()
        shutil.copy(other, predicted / folder / one.name)
        bad(f"{folder}/ct_1003.nii.gz is in a folder of domain 'mr'", "--direction")
        shutil.rmtree(predicted / folder)
    shutil.copy(other, predicted / "1021.nii.gz")
    bad("are predictions of the same case 'ct_1021'")
    refused(imported(call, cohort, "x", "--predictions", "none"), "none does not exist")
    refused(imported(call, cohort, "x", "--predictions", predicted, "--direction=a-b"), "a-b")


def test_ambiguous_label_values_are_asked_for(call: Call, cohort: Path, predicted: Path) -> None:
    """Values that are class indices and the dataset's, with different meanings, decide nothing."""
    from glua_bench.errors import ConfigError
    from glua_bench.runs.external import _values_of
    from glua_bench.task import DomainView, Reading, Structure

    for file in predicted.iterdir():
        image = nib.load(file)
        voxels = np.asarray(image.dataobj)
        swapped = np.select([voxels == 205, voxels == 420], [1, 2], 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(swapped, image.affine), file)
    given = sorted(predicted.iterdir())
    first, second = (Structure(name, "", (value,), "") for name, value in (("A", 2), ("B", 1)))
    with pytest.raises(ConfigError, match=r"1 = A, 2 = B.*2 = A, 1 = B.*--values classes"):
        _values_of(given, DomainView("ct", Reading(), (first, second)))
    assert _values_of(given, DomainView("ct", Reading(), (second, first))) == "classes"


def test_a_compared_name_that_was_never_imported_is_told_how(call: Call, cohort: Path) -> None:
    result = call("compare", "--methods=glua,their_net", *RUN, cohort)
    refused(result, "'their_net' is neither a method nor imported for phantom mr-ct")
    refused(result, "glua-bench import their_net --dataset phantom --direction mr-ct --predictions")
    file = Path("c.yaml")
    file.write_text("imported: [their_net]\nentries: [{method: glua}]\n", encoding="utf-8")
    result = call("compare", "--config", file, *RUN, cohort)
    refused(result, "'their_net' is neither a method nor imported for phantom mr-ct")
    result = call("compare", "--methods=their_net", "--no-bounds", *RUN, cohort)
    refused(result, "no method to run", "report")


# -- score ----------------------------------------------------------------------------------------


def test_score_of_two_folders_told_in_full(call: Call, cohort: Path, predicted: Path) -> None:
    references = Path("labels")
    for file in predicted.iterdir():
        perturb(file, references / file.name, -1)
    words = "MYO=205,LAC=420,heart=205,420,500,AA=820,background=550,600,850"
    code, out, err = call(
        *("score", predicted, references, "--structures", words, "--jobs=1", "--out=a b.csv")
    )
    assert code == 0, err
    assert [line.split()[0] for line in block(out)[1:]] == ["MYO", "LAC", "heart", "AA", "mean"]
    assert "2 cases." in out and "Wrote a b.csv" in out and "Next: " in out
    assert len(pd.read_csv("a b.csv")) == 8
    (predicted / "ct_1021.nii.gz").unlink()
    code, out, _ = call("score", predicted, references, "--structures", words, "--jobs=1")
    assert code == 0 and "count as missed structures" in out and "ct_1021" in out
    assert "1/2" in out and "1 of them without a prediction" in out
    code, out, _ = call("score", predicted, "--dataset=phantom", "--data-root", cohort, "--jobs=1")
    assert code == 0 and "ct_1021" in out and "the dataset's label values" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["REFERENCES is missing"]),
        (["--dataset=phantom", "--structures=a=1"], ["--structures and --dataset"]),
        (["labels", "--domain=ct"], ["--domain needs --dataset"]),
        (["--dataset=phantom", "--domain=us"], ["no domain 'us'", "--domain with one of"]),
        (["--dataset=phantom", "--values=x"], ["--values x is unknown"]),
        (["none"], ["none does not exist"]),
        (["labels", "--structures=a=0"], ["--structures", "background"]),
        (["labels", "--structures=MYO=205"], ["label value(s) 420", "add them to the structures"]),
    ],
)
def test_score_refuses_in_one_sentence(
    call: Call, cohort: Path, predicted: Path, options: list[str], words: list[str]
) -> None:
    perturb(predicted / "ct_1003.nii.gz", Path("labels/ct_1003.nii.gz"))
    extra = ["--data-root", cohort] if "--dataset=phantom" in options else []
    refused(call("score", predicted, *options, *extra, "--jobs=1"), *words)


def test_entries_of_made_runs_are_paired_and_ranked(made_runs: Any, tmp_path: Path) -> None:
    """An external entry with all seeds competes; a privileged one does not."""
    from glua_bench.reports import comparison, results

    made_runs.comparison(seeds=2)
    for seed in range(2):
        made_runs.add("nn", 0.9, seed)
        made_runs.add("up", 0.95, seed)
    for run in list_runs(tmp_path / "runs"):
        if run.config.method in ("nn", "up"):
            _make_external(run, privileged=run.config.method == "up")
    found = results.from_runs(tmp_path / "runs")
    verdict = comparison.verdict(found.rows, "phantom mr-ct")
    assert "nn (external) has the highest mean Dice" in verdict
    table = comparison.table(found.rows).loc["phantom mr-ct"]
    assert table.loc["nn (external)", "compared"] and table.loc["nn (external)", "seeds"] == 2
    assert table.loc["nn (external)", "gap recovered"] > 1
    assert pd.isna(table.loc["nn (external)", "s/update"])
    notice = next(text for text in found.notices if "nn (external)" in text)
    assert "seed 0: a tool (files " in notice and "seed 1: a tool" in notice
    assert "budget" in notice and "checkpoint selection" in notice


def _make_external(run: RunDirectory, privileged: bool) -> None:
    """Turn a made run into what `import` writes."""
    from glua_bench.config import EXTERNAL, EXTERNAL_UPPER, RunConfig

    values = run.config.to_dict()
    stated = {name: values[name] for name in ("method", "dataset", "direction", "fold", "seed")}
    stated["scenario"] = EXTERNAL_UPPER if privileged else EXTERNAL
    (run.path / "config.yaml").write_text(RunConfig.from_dict(stated).to_yaml())
    facts = {**run.read_environment(), "changed": {}, "variant": ""}
    facts["external"] = {"note": "a tool", "predictions": {}}
    (run.path / "environment.json").write_text(json.dumps(facts))
    rows = run.read_cases()
    rows[rows["selector"] == "last"].assign(selector=EXTERNAL, step=np.nan).to_parquet(
        run.path / "cases.parquet"
    )
    reseal(run)
