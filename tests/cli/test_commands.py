"""The commands: output, exit codes and files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from sample_runs import reseal
from small_commands import SMALL, Call, refused

from glua_bench.files import write_checked_json
from glua_bench.records.run_directory import RunDirectory

RUN = ["run", "--method=source_only", "--dataset=phantom", *SMALL, "--data-root"]
SUPPORT = Path(__file__).parents[1] / "support"


# -- what works ----------------------------------------------------------------------------------


COMMANDS = "run compare ablate sweep worker report predict export score import list data new-method"


@pytest.mark.parametrize("command", ["", *COMMANDS.split(), "new-dataset", "sync", "doctor"])
def test_help_is_there_for_every_command(call: Call, command: str) -> None:
    code, out, _ = call(*command.split(), "--help")
    assert code == 0 and "Usage" in out


def test_list_says_what_each_is_and_needs(call: Call) -> None:
    code, out, _ = call("list")
    assert code == 0
    named = "glua global_only local_only source_only phantom mscmr mmwhs mmwhs_literature last"
    for name in named.split():
        assert f"\n  {name} " in out
    assert "arXiv 2205.11888" in out and "needs:" in out
    only = call("list", "datasets")[1]
    assert "phantom" in only and "source_only" not in only.split("Next:")[0]


def test_list_names_the_settings(call: Call) -> None:
    _, out, _ = call("list", "methods", "-v")
    assert "method.mask_ratio = " in out and "[0.01 to 1]" in out


@pytest.mark.slow
def test_run_then_again_then_sync(call: Call, phantom_root: Path) -> None:
    command = ["run", "--method=local_only", "--dataset=phantom", "--data-root", phantom_root]
    code, out, err = call(*command, *SMALL, "--no-mlflow")
    assert code == 0, err
    for text in ("Dice", "ASSD mm", "missed", "mean", "Results: runs/phantom/local_only/", "Next:"):
        assert text in out
    # What is printed can be typed: the finished run is part of the comparison that it names.
    (following,) = re.findall(r"^Next: +glua-bench (.*?)(?:   .*)?$", out, re.MULTILINE)
    code, shown, err = call(*shlex.split(following), "--seeds=1", "--dry-run")
    assert code == 0, err
    assert re.search(r"^ +local_only +phantom mr-ct +1 done$", shown, re.MULTILINE), shown
    (done,) = Path("runs").glob("phantom/local_only/*/done")
    assert {p.name for p in (done.parent / "figures").iterdir()} == {
        f"{name}{suffix}" for name in ("cases", "strip") for suffix in (".png", ".svg", ".pdf")
    }
    before = {p: p.stat().st_mtime_ns for p in done.parent.rglob("*")}
    code, again, _ = call(*command, *SMALL, "--no-mlflow")
    assert code == 0 and "already done" in again
    assert {p: p.stat().st_mtime_ns for p in done.parent.rglob("*")} == before
    code, plan, _ = call(*command, *SMALL, "--dry-run")
    assert code == 0 and "Already done" in plan
    assert "1 runs uploaded, 0 already present" in call("sync")[1]
    assert "0 runs uploaded, 1 already present" in call("sync")[1]
    code, health, _ = call("doctor")
    assert code == 0 and "1 finished, 0 unfinished" in health and "Next:" in health


@pytest.mark.slow
def test_dry_run_says_how_long_and_writes_no_run(call: Call, phantom_root: Path) -> None:
    code, out, _ = call(*RUN, phantom_root, "--dry-run")
    assert code == 0 and "stage segment: 2 steps" in out and "(timed on a few steps)" in out
    assert not Path("runs").exists()


@pytest.mark.slow
def test_the_upper_bound_is_stamped(call: Call, phantom_root: Path) -> None:
    _, out, _ = call(*RUN, phantom_root, "--scenario=supervised", "--no-mlflow")
    assert out.count("PRIVILEGED") == 2


def test_data_prepare_check_and_show(call: Call, phantom_root: Path) -> None:
    where = ["phantom", "--data-root", phantom_root]
    code, out, _ = call("data", "prepare", *where)
    assert code == 0 and "ct: 1 train, 1 val, 1 test" in out and "Next:" in out
    code, out, _ = call("data", "check", *where)
    assert code == 0 and "All 6 cases" in out and "LVC ml" in out
    code, out, _ = call("data", "show", *where, "--preset=quick", "--out", "pictures")
    assert code == 0 and "Next:" in out
    assert {p.name for p in Path("pictures").iterdir()} == {
        f"phantom_{domain}.{suffix}" for domain in ("ct", "mr") for suffix in ("png", "svg", "pdf")
    }


def test_check_tells_problems_from_warnings(call: Call, phantom_root: Path, tmp_path: Path) -> None:
    """Problems fail the command after all findings are printed; warnings do not."""
    root = tmp_path / "data"
    shutil.copytree(phantom_root, root)
    where = ["data", "check", "phantom", "--data-root", root, "--jobs=1", "--out=found.csv"]
    label = root / "ct_train" / "ct_train_1001_label.nii.gz"
    image = nib.load(label)
    voxels = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.where(voxels == 820, 0, voxels), image.affine), label)
    code, out, err = call(*where)
    assert code == 0, err
    (told,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert (
        told.startswith(f"warning (structure missing): {label} has no AA") and "1 warning:" in out
    )
    (root / "mr_train" / "mr_train_1007_image.nii.gz").write_bytes(b"cut off")
    result = call(*where)
    refused(result, "1 of 6 cases", "cannot be used", "(1 warning)")
    assert "problem (image): " in result[1] and "warning (structure missing): " in result[1]
    table = Path("found.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in table[1:]] == [
        ["problem", "image", "mr_1007"],
        ["warning", "structure missing", "ct_1001"],
    ]


def test_fingerprint_tells_whether_two_copies_are_the_same(
    call: Call, phantom_root: Path, tmp_path: Path
) -> None:
    where = ["data", "fingerprint", "phantom", "--jobs=1", "--data-root"]
    code, out, err = call(*where, phantom_root, "--out=sum.yaml")
    assert code == 0 and "ct: 3 cases (1 train, 1 val, 1 test)" in out, err
    copy = shutil.copytree(phantom_root, tmp_path / "copy")
    code, out, err = call(*where, copy, "--against=sum.yaml")
    assert code == 0 and "the same cases in the same splits" in out, err
    label = copy / "mr_train" / "mr_train_1007_label.nii.gz"
    volume = nib.load(label)
    nib.save(nib.Nifti1Image(np.asarray(volume.dataobj)[:, ::-1], volume.affine), label)
    result = call(*where, copy, "--against=sum.yaml")
    refused(result, "differ from sum.yaml")
    assert "only here (mr_1007)." in result[1] and " of ct" not in result[1].split("\n\n")[-1]
    refused(call(*where, phantom_root, "--out=sum.txt"), "--out sum.txt")
    refused(call(*where, phantom_root, "--against=nothing.json"), "--against")


@pytest.mark.parametrize(
    ("name", "owner", "file"),
    [
        ("mmwhs", "MM-WHS 2017 challenge", "ct_train_1001_image.nii.gz"),
        ("mmwhs_literature", "MM-WHS 2017 challenge", "ct_train_1001_image.nii.gz"),
        ("mmwhs_sifa", "SIFA", "ct_train_slice0.tfrecords"),
        ("mscmr", "MS-CMRSeg 2019 challenge", "C0/patientN_C0.nii.gz"),
    ],
)
def test_data_that_nobody_may_pass_on_say_where_they_are_to_be_had(
    call: Call, tmp_path: Path, name: str, owner: str, file: str
) -> None:
    """Errors name the owner, the terms and the expected files."""
    refused(call("data", "check", name), owner, "--data-root", "GLUA_BENCH_DATA")
    (tmp_path / "empty").mkdir()
    result = call("data", "prepare", name, "--data-root", tmp_path / "empty")
    refused(result, owner, file, "accept", "terms", "--data-root", str(tmp_path / "empty"))


@pytest.mark.slow
def test_export_writes_data_and_a_run_s_predictions(call: Call, phantom_root: Path) -> None:
    code, _, err = call(*RUN, phantom_root, "--no-mlflow")
    assert code == 0, err
    (done,) = Path("runs").glob("phantom/source_only/*/done")
    command = ["data", "export", "phantom", "--data-root", phantom_root, "--to=nn", "--jobs=1"]
    code, out, err = call(*command, "--run", done.parent.name)
    assert code == 0, err
    assert "Dataset502_phantom_ct: 3 cases" in out and "predictions of 1 test cases" in out
    (predicted,) = Path("nn/predictions").rglob("*.nii.gz")
    assert predicted.parts[2] == "Dataset502_phantom_ct" and predicted.name == "1003.nii.gz"
    assert predicted.parent.name == f"source_only_{done.parent.name}"
    classes = np.unique(np.asarray(nib.load(predicted).dataobj))
    assert set(classes.tolist()) <= set(range(5))
    assert call(*command)[0] == 0  # again, nothing to do
    refused(call(*command, "--link"), "other files or settings")
    refused(
        call(*command, "--run", "nothing"),
        "--run: no run in runs/ has an id starting with 'nothing'",
    )


FOLDED = """\
from dataclasses import replace

from glua_bench.conformance import TinyDataset
from glua_bench.task import Dataset


class Folded(TinyDataset, Dataset):
    \"\"\"The tiny task with two folds.\"\"\"

    name = "folded"
    folds = 2

    def cases(self, domain):
        swapped = {"val": "test", "test": "val"} if self.fold == 2 else {}
        return tuple(replace(c, split=swapped.get(c.split, c.split)) for c in super().cases(domain))
"""


@pytest.mark.slow
def test_a_fold_is_a_setting_with_runs_and_tables_of_its_own(call: Call, tmp_path: Path) -> None:
    plugin = tmp_path / "folded.py"
    plugin.write_text(FOLDED)
    mine = ["--plugin", plugin, "--data-root", tmp_path / "files"]
    run = ["run", "--method=source_only", *mine, *SMALL, "--no-mlflow", "--set=grid.spacing=1"]
    assert call(*run, "--dataset=folded")[0] == 0
    code, out, err = call(*run, "--dataset=folded", "--fold=2")
    assert code == 0, err
    (next_one,) = re.findall("^Next:.*", out, re.MULTILINE)
    assert "--dataset folded " in next_one and "--fold 2" in next_one
    (first,) = Path("runs").glob("folded/source_only/*")
    (second,) = Path("runs").glob("folded_fold2/source_only/*")
    assert first.name != second.name
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert (config["dataset"], config["fold"]) == ("folded", 2)
    rows = [pd.read_parquet(folder / "cases.parquet") for folder in (first, second)]
    assert [set(r["dataset"]) for r in rows] == [{"folded"}, {"folded_fold2"}]
    assert [set(r["case"]) for r in rows] == [{"inverted_3"}, {"inverted_2"}]
    # The name of the fold means the same; an impossible fold is one sentence.
    code, again, err = call(*run, "--dataset=folded_fold2")
    assert code == 0 and "already done" in again, err
    refused(call(*run, "--dataset=folded", "--fold=3"), "'folded' has no fold 3", "folds 1 to 2")
    refused(call(*run, "--dataset=folded_fold2", "--fold=3"), "fold 2 of 'folded'", "--fold is 3")
    refused(call("data", "check", "phantom", "--fold=2"), "no fold 2; it has one split")
    code, out, err = call("data", "check", "folded", "--fold=2", "--jobs=1", *mine)
    assert code == 0, err
    assert re.search(r"^inverted_2 +test", out, re.MULTILINE) and out.count("--fold 2") == 2
    # Folds are no seeds of one another: each has its own table.
    code, out, err = call("report", "--out=page", *mine)
    assert code == 0, err
    text = Path("page/report.html").read_text()
    assert "folded plain-inverted" in text and "folded_fold2 plain-inverted" in text
    image = tmp_path / "files/images/inverted_2.nii.gz"
    code, out, err = call("predict", "--run", second.name, "--out=found", image, "--device=cpu")
    assert code == 0, err
    export = ["data", "export", "folded", *mine, "--to=nn", "--jobs=1", "--fold=2"]
    code, out, err = call(*export, "--run", second.name)
    assert code == 0 and "Dataset501_folded_fold2_plain" in out, err
    refused(call(*export, "--run", first.name), "a run on 'folded', not on 'folded_fold2'")


def test_a_file_is_enough_for_a_method(call: Call, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from glua_bench.methods.source_only import SourceOnly\n"
        "class Mine(SourceOnly):\n"
        "    '''My own method.'''\n"
        "    name = 'mine'\n"
    )
    assert "My own method." in call("list", "methods", "--plugin", plugin)[1]


# -- what a user may get wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method=glau", "--dataset=phantom"], ["glau", "did you mean 'glua'"]),
        (["--method=glua", "--dataset=fantom"], ["fantom", "phantom"]),
        (["--method=glua", "--dataset=phantom", "--direction=ct-ct"], ["ct-ct", "--direction"]),
        (["--method=glua", "--dataset=phantom", "--preset=fast"], ["fast", "--preset"]),
        (["--method=glua", "--dataset=phantom", "--set=method.mask=x"], ["method.mask", "topk"]),
        (
            ["--method=glua", "--dataset=phantom", "--set=method.mask_ratio=1.5"],
            ["method.mask_ratio", "out of range"],
        ),
        (["--method=glua", "--dataset=phantom", "--set=method.ratio=1"], ["method.ratio"]),
        (["--method=glua", "--dataset=phantom", "--set=steps"], ["--set steps"]),
        (["--method=glua", "--dataset=phantom", "--scenario=supervised"], ["source_only"]),
        (["--method=glua", "--dataset=mscmr"], ["GLUA_BENCH_DATA", "--data-root"]),
        (["--method=glua", "--dataset=mscmr", "--data-root=none"], ["none"]),
        (["--method=glua", "--dataset=phantom", "--plugin=no.py"], ["no.py", "--plugin"]),
    ],
)
def test_a_wrong_option_is_one_sentence(
    call: Call, arguments: list[str], words: list[str], phantom_root: Path
) -> None:
    if not any(a.startswith("--data-root") for a in arguments) and "phantom" in arguments[1]:
        arguments = [*arguments, "--data-root", str(phantom_root)]
    refused(call("run", *arguments), *words)
    assert not Path("runs").exists()


def test_an_unknown_option_is_refused(call: Call) -> None:
    code, _, err = call("run", "--method=glua", "--dataset=phantom", "--seeed=1")
    assert code == 2 and "--seeed" in err and "Traceback" not in err


def damaged(root: Path, tmp_path: Path, damage: str) -> Path:
    """Copy the phantom and damage one file."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    image = sorted(copy.rglob("mr_train_1001_image.nii.gz"))[0]
    label = Path(str(image).replace("_image", "_label"))
    loaded = nib.load(image)
    data = np.asarray(loaded.dataobj).astype(np.float32)
    if damage == "truncated":
        image.write_bytes(image.read_bytes()[:1000])
    elif damage == "no NIfTI":
        image.write_text("not an image")
    elif damage == "NaN":
        data[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(data, loaded.affine), image)
    elif damage == "shape":
        nib.save(nib.Nifti1Image(data[:, :-2], loaded.affine), image)
    elif damage == "value":
        values = np.asarray(nib.load(label).dataobj).astype(np.int16)
        values[3, 3, 3] = 77
        nib.save(nib.Nifti1Image(values, loaded.affine), label)
    return copy


def test_a_lost_file_of_the_phantom_is_made_again(
    call: Call, phantom_root: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(phantom_root, copy)
    lost = next(copy.rglob("mr_train_1001_image.nii.gz"))
    lost.unlink()
    code, out, _ = call("data", "prepare", "phantom", "--data-root", copy)
    assert code == 0 and "generating 1 volumes" in out and lost.is_file()


@pytest.mark.parametrize("damage", ["truncated", "no NIfTI", "NaN", "shape", "value"])
def test_a_spoilt_file_is_named_and_no_result_counts(
    call: Call, phantom_root: Path, tmp_path: Path, damage: str
) -> None:
    root = damaged(phantom_root, tmp_path, damage)
    refused(call(*RUN, root), "mr_train_1001_")
    assert not list(Path("runs").rglob("done"))
    code, out, err = call("data", "check", "phantom", "--data-root", root)
    assert code == 2 and "mr_train_1001_" in out + err and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("raise RuntimeError('no licence')\n", "no licence"),
        ("import not_installed_anywhere\n", "not_installed_anywhere"),
        ("def broken(:\n", "cannot be parsed as Python"),
    ],
)
def test_a_plugin_that_fails_is_reported_and_harms_nothing(
    call: Call, tmp_path: Path, text: str, word: str
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        text + "from glua_bench.method import Method\nclass Mine(Method):\n    name = 'mine'\n"
    )
    refused(call("run", "--method=mine", "--dataset=phantom", "--plugin", plugin), "mine.py", word)
    code, out, _ = call("list", "methods")
    assert code == 0 and "glua" in out


def test_an_unwritable_run_directory_is_one_sentence(call: Call, phantom_root: Path) -> None:
    Path("occupied").write_text("a file where a directory must be")
    refused(call(*RUN, phantom_root, "--runs=occupied"), "occupied", "--runs", code=1)


def test_sync_without_runs_names_the_option(call: Call) -> None:
    refused(call("sync"), "runs", "--runs")


def test_a_defect_is_reported_as_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("glua_bench.cli.doctor.examine", fail)
    refused(call("doctor"), "ZeroDivisionError", "GLUA_BENCH_DEBUG", code=1)
    monkeypatch.setenv("GLUA_BENCH_DEBUG", "1")
    code, _, err = call("doctor")
    assert code == 1 and err.startswith("Traceback") and "ZeroDivisionError: ours" in err


# -- new-method, new-dataset ----------------------------------------------------------------------


def test_new_files_and_the_command_that_uses_them(call, tmp_path):
    code, out, _ = call("new-method", "my_method", "--out", tmp_path)
    assert code == 0 and f"--plugin {tmp_path / 'my_method.py'} --method my_method" in out
    code, out, _ = call("new-dataset", "livers", "--out", tmp_path, "--domains=pet,ct", "--python")
    assert code == 0 and f"data check livers --plugin {tmp_path / 'livers.py'}" in out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"my_method.py", "test_my_method.py", "livers.py", "test_livers.py"}
    code, out, _ = call("list", "--plugin", tmp_path / "my_method.py")
    assert code == 0 and "my_method" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new-method", "glua"], "'glua' exists already"),
        (["new-dataset", "livers", "--domains", "ct"], "--domains ct"),
        (["new-dataset", "livers", "--structures", "liver"], "--structures: 'liver'"),
        (["new-dataset", "livers"], "give --data DIRECTORY, or --python"),
        (["new-dataset", "livers", "--data", "/nowhere"], "/nowhere is not a directory"),
        (["new-dataset", "phantom", "--data", "."], "'phantom' exists already"),
        (["new-dataset", "livers", "--python", "--domains=a,b,c"], "has more than two"),
    ],
)
def test_new_files_that_cannot_be_are_one_sentence(words, said, call, tmp_path):
    code, _, err = call(*words, "--out", tmp_path)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_next_commands_work_as_a_shell_takes_them(call, tmp_path, write_livers, monkeypatch):
    """Paths contain blanks and brackets, and plugins are passed on."""
    place = tmp_path / "my [study] (2)"
    place.mkdir()
    monkeypatch.chdir(place)
    write_livers(place / "vols")

    def following(out: str) -> list[list[str]]:
        lines = re.findall(r"^(?:Next: +|      )(glua-bench .*?)(?:   .*)?$", out, re.MULTILINE)
        return [shlex.split(line)[1:] for line in lines]

    new = ("new-dataset", "livers", "--data=vols", "--yes", "--structures=liver=1", "--out=a b")
    code, out, err = call(*new)
    assert code == 0, err
    (check,) = following(out)
    code, out, err = call(*check, "--data-root", "vols")
    assert code == 0, err
    show, run = following(out)
    code, out, err = call(*show, "--preset=quick")
    assert code == 0 and following(out)[0] == run and len(following(out)) == 2, err
    small = ["--steps=2", "--preset=quick", "--device=cpu", "--no-mlflow", "--set=batch_size=2"]
    code, out, err = call(*run, *small, "--runs=runs [2]")
    assert code == 0, err
    (compare,) = following(out)
    code, out, err = call(*compare, "--dry-run", "--device=cpu")
    assert code == 0 and "source_only" in out, err
    code, out, err = call("export", "--run", *Path("runs [2]").glob("*/*/*"), "--out=a model")
    assert code == 0, err
    (predict,) = following(out)
    image = next(Path("vols").glob("mr/*_image.nii.gz"))
    code, _, err = call(*predict[:-1], image, "--device=cpu")
    assert code == 0, err


def test_volumes_of_one_s_own_go_from_a_directory_to_a_result(
    call, tmp_path, write_livers, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_livers(tmp_path / "vols")
    new = ["new-dataset", "livers", "--data", "vols", "--yes"]
    code, out, err = call(*new, "--structures=liver=1")
    assert code == 0 and "Next: glua-bench data check livers.yaml" in out, err
    assert "same person" in out and "ct: images, with * for the case's id: ct/*_image.nii.gz" in out
    code, out, err = call("data", "check", "livers.yaml")
    assert code == 0 and "Next: glua-bench data show livers.yaml" in out, err
    assert "no warnings" in out and "--dataset livers.yaml" in out
    small = ["--steps=2", "--preset=quick", "--device=cpu", "--no-mlflow", "--set=batch_size=2"]
    code, out, err = call("run", "--method=source_only", "--dataset=livers.yaml", *small)
    assert code == 0 and "--dataset livers --direction ct-mr" in out, err
    assert "--plugin livers.yaml" in out
    compare = ["compare", "--methods=fda", "--dataset=livers.yaml", "--seeds=1", "--no-bounds"]
    code, out, err = call(*compare, *small)
    assert code == 0 and "livers ct-mr" in out, err
    code, _, err = call(*new)
    assert code == 2 and "livers.yaml exists already" in err
    (tmp_path / "livers.yaml").write_text("name: livers\nplain: axial\n")
    code, _, err = call("data", "check", "livers.yaml")
    refused((code, "", err), "livers.yaml, line 1: 'classes' is missing; add it.")


# -- compare, ablate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "--methods=glau", "--dataset=phantom"], "did you mean 'glua'"),
        (["compare", "--methods=glua", "--dataset=fantom"], "fantom"),
        (["compare", "--methods=glua", "--dataset=phantom", "--direction=x-y"], "--directions"),
        (["compare", "--methods=glua", "--dataset=phantom", "--seeds=0"], "--seeds 0"),
        (["ablate", "--method=fda", "--dataset=phantom"], "declares no variants"),
        (["ablate", "--method=glua", "--dataset=phantom", "--no-variants"], "--no-variants"),
        (["ablate", "--method=glua", "--dataset=phantom", "--vary=mask_ratio"], "NAME=V1,V2"),
        (["ablate", "--method=glua", "--dataset=phantom", "--vary=mask_ratio=,"], "NAME=V1,V2"),
        (
            ["ablate", "--method=glua", "--dataset=phantom", "--vary=mask_ratoi=0.1"],
            "did you mean 'mask_ratio'",
        ),
        (
            ["ablate", "--method=glua", "--dataset=phantom", "--vary=mask_ratio=0.1,1.5"],
            "method.mask_ratio = 1.5 is out of range",
        ),
        (
            ["ablate", "--method=glua", "--dataset=phantom", "--vary=mask=none,some"],
            "method.mask = 'some' is invalid",
        ),
    ],
)
def test_a_matrix_that_cannot_be_is_one_sentence(words, said, call, tmp_path):
    refused(call(*words), said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_ablation_says_what_it_would_run(call: Call, phantom_root: Path) -> None:
    words = ["ablate", "--method=local_only", "--dataset=phantom", "--data-root", phantom_root]
    vary = ["--vary=method.mask_ratio=0.1,0.3", "--vary=mask=random", "--seeds=1"]
    code, out, err = call(*words, *vary, *SMALL, "--dry-run")
    assert code == 0, err
    entries = re.findall(r"^ +(.+?) +phantom mr-ct +1 open", out, re.MULTILINE)
    bounds, variants = ["source_only", "supervised"], ["Step B", "nothing aligned"]
    assert entries == [*bounds, *variants, "mask_ratio = 0.1", "mask = random"]
    assert "'mask_ratio = 0.3' duplicates 'Step B'" in out
    told = "method.mask_ratio = 0.1 has no effect: it needs mask = topk or random, and mask is none"
    assert out.count(told) == 1
    assert not Path("runs").exists()


# -- models of another version of the code --------------------------------------------------------


@pytest.fixture(scope="module")
def trained(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train local_only; return the run's directory and the exported model."""
    from glua_bench.console import Progress
    from glua_bench.runs import exporting, prediction
    from glua_bench.runs.execution import execute
    from glua_bench.runs.plan import plan
    from glua_bench.runs.request import RunRequest

    folder = tmp_path_factory.mktemp("trained")
    small = [word.removeprefix("--set=") for word in SMALL if word.startswith("--set=")]
    options = {"preset": "quick", "steps": 2, "device": "cpu", "mlflow": False}
    folders = {"data_root": phantom_root, "runs_root": folder / "runs"}
    planned = plan(RunRequest("local_only", "phantom", assignments=small, **options, **folders))
    execute(planned, Progress(enabled=False))
    model = prediction.from_run(planned.directory, device="cpu")
    return planned.directory.path, exporting.export(model, planned.directory, folder / "model")


# What changed since -> what is said of it. The first is what local_only had before it had a gain.
SINCE = [
    (
        lambda was: {"mask": "topk", "lambda_global": 0.0, "lambda_local": 0.003, "lr": 0.002},
        "(its setting 'lambda_global' does not exist now)",
    ),
    (lambda was: {**was, "mask": "learned"}, "(its setting 'mask' cannot be learned now)"),
    (lambda was: {**was, "mask_ratio": 1.5}, "(its setting 'mask_ratio' cannot be 1.5 now)"),
    (lambda was: {**was, "lr": [1, 2]}, "(its setting 'lr' cannot be [1, 2] now)"),
]
of_another_version = pytest.mark.parametrize(
    ("change", "said"), SINCE, ids=["gone", "choice", "range", "type"]
)


@of_another_version
def test_a_run_of_another_version_of_its_method_is_one_sentence(
    change: Callable[[dict], dict],
    said: str,
    trained: tuple[Path, Path],
    phantom_root: Path,
    call: Call,
) -> None:
    """The error gives no advice about settings, since the user set none."""
    run = Path("runs") / "phantom" / "local_only" / trained[0].name
    shutil.copytree(trained[0], run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["method_config"] = change(written["method_config"])
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    reseal(RunDirectory.open(run))
    image = next(phantom_root.rglob("*ct*image.nii.gz"))
    for command in (["predict", image, "--device=cpu"], ["export"]):
        result = call(*command, "--run", run)
        refused(result, f"The run {run} was trained by another version of method 'local_only' ")
        refused(result, f"{said}; use the version of the code that trained it (environment.json).")
        assert "did you mean" not in result[2] and "nown: " not in result[2]


@of_another_version
def test_a_model_of_another_version_of_its_method_is_one_sentence(
    change: Callable[[dict], dict],
    said: str,
    trained: tuple[Path, Path],
    phantom_root: Path,
    call: Call,
) -> None:
    shutil.copytree(trained[1], "model")
    described = json.loads(Path("model/config.json").read_text())
    described["run"]["method_config"] = change(described["run"]["method_config"])
    del described["sha256"]
    write_checked_json(Path("model/config.json"), described)
    image = next(phantom_root.rglob("*ct*image.nii.gz"))
    result = call("predict", image, "--model", "model", "--device=cpu")
    refused(result, "model was trained by another version of method 'local_only' ", said)
    refused(result, "use the version of the code that exported it (glua-bench ")
    assert "did you mean" not in result[2] and "nown: " not in result[2]


def test_settings_that_are_new_since_take_their_defaults(
    trained: tuple[Path, Path], phantom_root: Path, call: Call
) -> None:
    """Runs of older versions can predict if their weights fit."""
    run = Path("runs") / "phantom" / "local_only" / trained[0].name
    shutil.copytree(trained[0], run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    del written["method_config"]["optimizer"], written["segmenter"]["dilations"]
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    reseal(RunDirectory.open(run))
    image = next(phantom_root.rglob("*ct*image.nii.gz"))
    found = []
    for number, path in enumerate((trained[0], run)):
        code, _, err = call("predict", image, "--run", path, "--device=cpu", f"--out={number}")
        assert code == 0, err
        (labels,) = Path(str(number)).glob("*_seg.nii.gz")
        found.append(np.asarray(nib.load(labels).dataobj))
    assert np.array_equal(*found)


# -- report ---------------------------------------------------------------------------------------


def test_a_report_says_its_answer_its_limits_and_where_it_lies(call, made_runs, tmp_path):
    made_runs.comparison(seeds=2)
    made_runs.add("fda", 0.3).fail("why")
    words = ["report", "--runs", made_runs.root, "--no-pictures"]
    code, out, err = call(*words, "--where", "method=glua,slaug,source_only")
    assert code == 0 and "Traceback" not in err
    assert "phantom mr-ct: glua has the highest mean Dice, 61.0 %" in out
    assert "Next:" in out and "report/report.html" in out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "slaug" in page and "fda" not in page
    assert "1 failed run" not in err  # it is not among those that were asked for
    code, out, err = call(*words, "--out", "other")
    assert code == 0 and "warning: 1 failed run excluded." in err
    code, again, _ = call("report", "--rows", "other/rows.parquet", "--out", "third")
    assert code == 0
    assert [x for x in again.splitlines() if "highest" in x] == [
        x for x in out.splitlines() if "highest" in x
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runs", "nowhere"], "nowhere has no runs"),
        (["--where", "steps"], "--where steps has no value"),
        (["--where", "steps=9"], "matches --where steps=9"),
        (["--selector", "best"], "--selector best: no run has a checkpoint"),
        (["--rows", "gone.parquet"], "gone.parquet cannot be read"),
        (["--rows", "a.parquet", "--from-mlflow"], "give one of them"),
    ],
)
def test_a_report_that_cannot_be_is_one_sentence(call, made_runs, words, said):
    made_runs.comparison(seeds=1)
    refused(call("report", "--no-pictures", *words), said)


def test_prepare_names_bad_files_after_the_good_ones(
    call: Call, phantom_root: Path, tmp_path: Path
) -> None:
    root = damaged(phantom_root, tmp_path, "truncated")
    time.sleep(2.1)  # the digest of a file that has just changed is not remembered
    arguments = ["data", "prepare", "phantom", "--data-root", root, "--jobs=2"]
    code, out, err = call(*arguments)
    assert code == 2 and "mr_train_1001_image.nii.gz is damaged" in out and "6/6" in out
    assert err.count("\n") == 1 and "Traceback" not in err
    code, out, _ = call(*arguments)
    assert code == 2 and "5 of 6 volumes are cached" in out


# -- sweep ----------------------------------------------------------------------------------------

SWEEP = """\
name: rates
title: Which rate?
method: source_only
dataset: phantom
objective: source_val
sampler: grid
set: {segmenter.width: 4, segmenter.depth: 3, grid.size: 32, grid.spacing: 7, batch_size: 2}
space:
  lr: [0.001, 0.01, 0.1]
"""


def in_tracker(root: Path) -> tuple[list, list]:
    """Return a sweep's parent runs and child runs in the tracker."""
    from glua_bench.records.mlflow_mirror import mlflow_client, tracking_uri

    client = mlflow_client(tracking_uri(root))
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return (
        [run for run in found if "glua_bench.sweep" in run.data.tags],
        [run for run in found if "glua_bench.id" in run.data.tags],
    )


def test_a_sweep_ends_with_its_page_and_one_run_in_the_tracker(
    call: Call, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rates.yaml").write_text(SWEEP)
    words = ["rates.yaml", "--steps=2", "--device=cpu", "--data-root", phantom_root]
    code, out, err = call("sweep", *words, "--trials=2", "--workers=2")
    assert code == 0, err
    page = tmp_path / "runs" / "sweeps" / "rates" / "report" / "report.html"
    assert "Report: runs/sweeps/rates/report/report.html" in out and page.is_file()
    assert "Post hoc: test Dice of this choice" in out
    chosen = out.partition("--set method.lr=")[2].split()[0]
    assert "Next:   glua-bench run --method source_only --dataset phantom --direction mr-ct " in out
    assert "--seed 1 --preset quick --set segmenter.width=4" in out
    assert "rank correlation" not in out  # of two trials
    ((parent,), children) = in_tracker(tmp_path / "runs")
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
    assert sorted(c.data.tags["glua_bench.entry"] for c in children) == ["trial 0", "trial 1"]
    tags = parent.data.tags
    assert tags["glua_bench.chosen"] == f"method.lr={chosen}"
    assert (tags["glua_bench.objective"], tags["glua_bench.oracle"]) == ("source_val", "false")
    assert parent.info.status == "FINISHED" and "chosen/source_val" in parent.data.metrics

    code, out, err = call("sweep", *words, "--resume")  # with the file's own budget
    assert code == 0 and "trial" in out, err
    ((same,), children) = in_tracker(tmp_path / "runs")
    assert same.info.run_id == parent.info.run_id and len(children) == 3
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
    assert same.data.tags["glua_bench.trials"] == "3 done"

    # The page alone, elsewhere; a tracker that is down costs a warning.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = call("report", "--sweep", "rates", "--out", "page")
    assert code == 0 and (tmp_path / "page" / "report.html").is_file()
    assert err.count("warning: MLflow at http://127.0.0.1:9 does not show") == 1
    assert "Next:   open page/report.html" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep", "none"], "There is no sweep 'none' in runs"),
        (["--sweep", "none", "--where", "seed=1"], "--sweep and --where exclude each other"),
    ],
)
def test_a_sweep_that_cannot_be_reported_is_one_sentence(call: Call, words, said) -> None:
    refused(call("report", *words), said)


def test_list_says_what_each_sweep_searches(call: Call) -> None:
    code, out, _ = call("list", "sweeps")
    assert code == 0 and "glua: mask_ratio; objective im, sampler grid" in out
    assert "lambda_cycle, lambda_image" in out and "glua-bench sweep NAME" in out
    assert all(len(line) < 100 for line in out.splitlines() if "Files" not in line)


# -- another tracker ------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_tracker_is_one_file(
    call: Call, phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands use the other tracker, and none imports MLflow."""
    shown = tmp_path / "shown"
    shown.mkdir()
    monkeypatch.setenv("GLUA_BENCH_TRACKER", "folder_tracker:FolderTracker")
    monkeypatch.setenv("FOLDER_TRACKER", str(shown))
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))  # of the sweep's workers
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)  # whoever imports it fails

    def group() -> dict[str, Any]:
        (path,) = shown.glob("group-*.json")
        found = dict(json.loads(path.read_text()))
        path.unlink()
        return found

    small = [*SMALL, "--device=cpu", "--data-root", phantom_root]
    run = ["--dataset=phantom", *small]
    code, out, err = call("run", "--method=source_only", *run)
    assert code == 0 and f"Browse:  ls {shown}" in out, err
    (record,) = (json.loads(path.read_text()) for path in shown.glob("*/record.json"))
    assert record["tags"]["method"] == "source_only" and record["params"]["grid.size"] == 32
    names = {name for name, *_ in record["metrics"]}
    assert {name for name in names if "/" not in name} == {"dice", "assd", "hd95"}
    assert any("/" in name for name in names), sorted(names)
    assert (shown / record["tags"]["id"] / "cases.parquet").is_file()

    code, out, err = call("compare", "--methods=source_only", "--seeds=2", "--no-bounds", *run)
    assert code == 0, err
    compared = group()
    assert record["tags"]["id"] in compared["members"] and len(compared["members"]) == 2
    assert compared["status"] == "FINISHED" and "table.csv" in compared["files"]
    assert "mr-ct/dice/source_only" in compared["metrics"] and "Dice" in compared["note"]

    (tmp_path / "rates.yaml").write_text(SWEEP)
    code, out, err = call("sweep", "rates.yaml", "--trials=1", "--steps=2", *small[-3:])
    assert code == 0, err
    swept = group()
    assert swept["tags"]["sweep"] == "rates" and "chosen/source_val" in swept["metrics"]
    assert set(swept["members"].values()) == {"trial 0"}

    (shown / "DOWN").touch()
    code, out, err = call("doctor")
    assert code == 0 and f"{shown} IS NOT REACHABLE" in out and "check FOLDER_TRACKER" in out
    for path in shown.glob("*/record.json"):
        path.unlink()
    code, out, err = call("sync")
    assert code == 1 and "could not be uploaded to" in err and "check FOLDER_TRACKER" in err
    (shown / "DOWN").unlink()
    code, out, err = call("sync")
    assert code == 0 and "3 runs uploaded, 0 already present" in out, err
    assert f"Next: ls {shown}" in out
    assert not (tmp_path / "runs" / "mlflow.db").exists()
