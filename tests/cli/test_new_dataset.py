"""From a user's own files to a comparison, by the commands that are printed."""

from __future__ import annotations

import io
import os
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from own_volumes import own_volume, save_domain, save_volume
from small_commands import Call

from glua_bench.reports import report_tables, results
from glua_bench.scoring.metrics import SPACING


@pytest.fixture
def here(call: Call, tmp_path: Path) -> Path:
    """Return the directory in which `call` runs commands."""
    return tmp_path


def piped(call: Call, monkeypatch: pytest.MonkeyPatch, answers: str, *words: object) -> tuple:
    monkeypatch.setattr("sys.stdin", io.StringIO(answers))
    return call("new-dataset", *words)


def following(out: str) -> list[list[str]]:
    """Return the commands that an output suggests."""
    lines = re.findall(r"^(?:Next: +|Report: +| {6,})(glua-bench .*?)(?:   .*)?$", out, re.M)
    return [shlex.split(line)[1:] for line in lines]


def described(name: str) -> dict:
    return yaml.safe_load(Path(f"{name}.yaml").read_text(encoding="utf-8"))


def test_from_two_folders_to_a_comparison_page_by_the_printed_commands(
    call: Call, here: Path
) -> None:
    """new-dataset, data check, data show, compare and report, in a directory with blanks."""
    data = here / "my volumes"
    save_domain(data / "ct", 3, ct=True, bright=420)
    save_domain(data / "mr", 3, first=10, spacing=(5, 5, 10))
    code, out, err = call("new-dataset", "hearts", "--data", "my volumes", "--yes")
    assert code == 0, err
    (check,) = following(out)
    code, out, err = call(*check, "--jobs=1")
    assert code == 0 and "no warnings" in out and "5.00×5.00×10.00" in out, err
    show, _ = following(out)
    code, out, err = call(*show, "--preset=quick")
    assert code == 0 and Path("figures/hearts_ct.png").is_file(), err
    compare = following(out)[1]
    assert compare[:1] == ["compare"] and compare[-2:] == ["--dataset", "hearts.yaml"]
    small = ["--steps=2", "--preset=quick", "--device=cpu", "--no-mlflow", "--set=batch_size=2"]
    tiny = ["--set=segmenter.width=4", "--set=segmenter.depth=3", "--seeds=1", "--no-bounds"]
    tiny += ["--set=grid.size=32", "--set=grid.spacing=5"]
    code, out, err = call(*compare, *small, *tiny, "--direction=ct-mr")
    assert code == 0, err
    report = next(words for words in following(out) if words[0] == "report")
    code, out, err = call(*report, "--out=page")
    assert code == 0, err
    assert "voxel size and mean scores of each test case" in Path("page/report.html").read_text()
    (table,) = Path("page/tables").glob("cases_*.md")
    assert "| 5.00 | 5.00 | 10.00 |" in table.read_text()
    rows = pd.read_parquet("page/rows.parquet")
    assert (rows[[*SPACING]].to_numpy() == [5, 5, 10]).all()
    # Old rows, without the columns, give a dash.
    rows.drop(columns=[*SPACING]).to_parquet("old.parquet")
    old = report_tables.cases(results.from_rows(Path("old.parquet")), "hearts ct-mr")
    assert [column.text(0) for column in old.columns[:3]] == ["–"] * 3 and old.rows == ["mr_2"]


def test_a_refused_answer_is_asked_again_from_a_pipe(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_domain(here / "ct")
    save_domain(here / "mr", first=10)
    words = ("hearts", "--data=.", "--structures=a=1,b=2", "--out=made")
    answers = "ct/none*.nii.gz\n\n\n\n\noblique\ncoronal\n\n\n\nwide\n\n\n"
    code, out, err = piped(call, monkeypatch, answers, *words)
    assert code == 0, err
    assert "No file in . matches ct/none*.nii.gz" in out
    assert "'oblique' is not valid; answer axial or coronal or sagittal." in out
    assert "'wide' is not a window" in out
    assert yaml.safe_load(Path("made/hearts.yaml").read_text())["plane"] == "coronal"


@pytest.mark.parametrize("answers", ["", "\n\n", "\n\n\n\noblique\n"])
def test_a_pipe_that_ends_is_one_sentence_and_nothing_is_written(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    save_domain(here / "ct")
    save_domain(here / "mr", first=10)
    words = ("hearts", "--data=.", "--structures=a=1,b=2", "--out=made")
    code, _, err = piped(call, monkeypatch, answers, *words)
    assert code == 2 and err.count("\n") == 1 and not Path("made").exists()
    assert "The input ended before a valid answer to '" in err and "or give --yes" in err


def test_a_window_that_clips_a_structure_is_told_by_both_commands(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_domain(here / "ct", ct=True, bright=420)
    save_domain(here / "mr", first=10)
    words = ("hearts", "--data=.", "--structures=liver=1,aorta=2")
    answers = "\n" * 8 + "-125 275\n\n"
    code, out, err = piped(call, monkeypatch, answers, *words)
    assert code == 0, err
    said = re.compile(
        r"The window \[-125, 275\] of ct clips 100% of the voxels of AO \(aorta\): the window "
        r"\[-125, 4\d\d\] would contain them\."
    )
    assert said.search(out) and "liver" not in re.findall("clips.*", out)[0]
    assert "protocol" not in described("hearts")
    code, out, err = call("data", "check", "hearts.yaml", "--jobs=1", "--out=found.csv")
    assert code == 0 and "warning (clipped structure): " in out and said.search(out), err
    assert "clipped structure" in Path("found.csv").read_text()
    assert "if you use it, state that under 'protocol'" in out
    fitting = re.findall(r"the window (\[.*?\]) would", out)[0]
    text = Path("hearts.yaml").read_text().replace("[-125, 275]", fitting)
    Path("hearts.yaml").write_text(text)
    code, out, err = call("data", "check", "hearts.yaml", "--jobs=1")
    assert code == 0 and "clipped structure" not in out, err


def test_windows_are_proposed_from_the_labels_of_training_cases(call: Call, here: Path) -> None:
    """Soft tissue has the common window; others a wider one, which is stamped."""
    save_domain(here / "soft" / "ct", ct=True)
    save_domain(here / "soft" / "mr", first=10)
    code, out, err = call("new-dataset", "soft", "--data=soft", "--yes")
    assert code == 0 and "structures of the training cases lie between 3" in out, err
    assert described("soft")["domains"]["ct"]["window"] == [-125, 275]
    assert "window" not in described("soft")["domains"]["mr"] and "protocol" not in described(
        "soft"
    )

    save_domain(here / "bright" / "ct", ct=True, bright=600)
    save_domain(here / "bright" / "mr", first=10)
    # Test and validation cases have no say.
    held_out = [c for s in ("test", "val") for c in described("soft")["domains"]["ct"][s]]
    for case in held_out:
        odd = own_volume(int(case), ct=True, bright=2500)
        save_volume(odd, here / "bright" / "ct" / f"{case}.nii.gz")
    code, out, err = call("new-dataset", "bright", "--data=bright", "--yes")
    assert code == 0 and "Warning" not in out, err
    own = described("bright")
    low, high = own["domains"]["ct"]["window"]
    assert -125 <= low < 0 and 700 <= high <= 800
    assert own["protocol"].startswith("window of ct derived from the labels of its training cases")
    assert own["domains"]["ct"]["test"] + own["domains"]["ct"]["val"] == held_out


def test_headers_that_contradict_each_other_are_asked_about(call: Call, here: Path) -> None:
    for number, codes in enumerate(("RAS", "LPS", "RAS", "PSR"), start=1):
        stored = own_volume(number)
        affine = own_volume(number, codes=codes)[0].affine
        lying = [nib.Nifti1Image(np.asarray(v.dataobj), affine) for v in stored]
        names = here / "a" / f"{number}.nii.gz", here / "a" / f"{number}_gt.nii.gz"
        save_volume((lying[0], lying[1]), *names)
        save_volume(
            own_volume(10 + number, codes=codes),
            here / "b" / f"{number}.nii.gz",
            here / "b" / f"{number}_gt.nii.gz",
        )
    code, out, err = call("new-dataset", "hearts", "--data=.", "--yes")
    assert code == 0, err
    asked = re.findall("^([ab]): the headers give different orientations.*: (yes|no)$", out, re.M)
    assert asked == [("a", "yes"), ("b", "no")] and "headers' orientations are ignored" in out
    own = described("hearts")["domains"]
    assert own["a"]["stored"] == {"slices": 2, "rows": 1, "flip": [0, 1]}
    assert "stored" not in own["b"]
    code, out, err = call("data", "check", "hearts.yaml", "--jobs=1")
    assert code == 0 and "orientation" not in out, err


def test_values_of_public_datasets_are_named_and_shared_structures_proposed(
    call: Call, here: Path
) -> None:
    save_domain(here / "ct", ct=True, values=(500, 205))
    save_domain(here / "mr", first=10, values=(500, 200))
    code, out, err = call("new-dataset", "hearts", "--data=.", "--yes")
    assert code == 0 and "hold 205, 500 (as in MM-WHS)" in out, err
    assert "hold 200, 500 (as in MS-CMRSeg)" in out
    own = described("hearts")
    assert own["classes"]["MYO"]["title"] == "left ventricular myocardium"
    assert own["domains"]["ct"]["values"] == {"MYO": 205, "LV": 500}
    assert own["domains"]["mr"]["values"] == {"MYO": 200, "LV": 500}


def test_labels_of_a_second_rater_are_excluded_by_name(call: Call, here: Path) -> None:
    for domain, count in (("ct", 2), ("mr", 3)):
        save_domain(here / domain, first=10 * count)
        for number in range(1, count + 1):
            label = here / domain / f"{number}_gt.nii.gz"
            label.with_name(f"{number}_gt_rater2.nii.gz").write_bytes(label.read_bytes())
    code, out, err = call("new-dataset", "hearts", "--data=.", "--yes")
    assert code == 0, err
    assert "ct: ct/*_gt.nii.gz labels most cases; not used: ct/*_gt_rater2.nii.gz (2 cases)." in out
    assert described("hearts")["domains"]["mr"]["exclude"] == ["mr/*_gt_rater2.nii.gz"]
    code, out, err = call("data", "check", "hearts.yaml", "--jobs=1")
    assert code == 0 and "All 8 cases" in out, err


def test_a_linked_directory_keeps_its_name_and_an_unlabelled_file_is_named(
    call: Call, here: Path
) -> None:
    save_domain(here / "store" / "ct")
    save_domain(here / "store" / "mr", first=10)
    save_volume(own_volume(30), here / "store" / "mr" / "template.nii.gz")
    (here / "link").symlink_to("store")
    code, out, err = call("new-dataset", "hearts", "--data=link", "--yes")
    assert code == 0, err
    assert described("hearts")["root"] == os.path.join(os.getcwd(), "link")
    assert "mr: no label for link/mr/template.nii.gz: images without labels are used as" in out


def test_one_label_file_serves_all_sequences_of_a_case(call: Call, here: Path) -> None:
    """The layout of BraTS: a directory per patient, one file per sequence, one label."""
    for number in range(1, 5):
        image, label = own_volume(number, (5, 5, 5), values=(1, 4))
        values = np.asarray(label.dataobj).copy()
        values[(values == 4) & (np.indices(values.shape)[0] % 2 == 0)] = 2
        folder = here / "brats" / f"BraTS_{number:03d}"
        for word in ("t1", "t2"):
            rng = np.random.default_rng([number, len(word) + ord(word[1])])
            other = np.asarray(image.dataobj) + rng.integers(0, 9, image.shape)
            one = nib.Nifti1Image(other.astype(np.int16), image.affine)
            save_volume((one, label), folder / f"{folder.name}_{word}.nii.gz")
        nib.save(nib.Nifti1Image(values, label.affine), folder / f"{folder.name}_seg.nii.gz")
    code, out, err = call("new-dataset", "brains", "--data=brats", "--yes")
    assert code == 0 and "(as in BraTS 2012-2021)" in out, err
    own = described("brains")
    assert own["same_people"] is True
    assert [d["labels"] for d in own["domains"].values()] == ["BraTS_*/BraTS_*_seg.nii.gz"] * 2
    code, out, err = call("data", "check", "brains.yaml", "--jobs=1")
    assert code == 0 and "All 8 cases" in out, err
