"""reports/results.py: reading runs and rows, names of entries, and rejected mixtures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from sample_runs import as_version_1, reseal

from glua_bench.errors import ConfigError, RunFailure
from glua_bench.records.run_directory import list_runs
from glua_bench.reports import report_tables
from glua_bench.reports.results import from_rows, from_runs, parse_where, record
from glua_bench.reports.statistics import last_bits


def entries(found):
    return sorted(str(entry) for entry in found.rows["entry"].unique())


def noted(found, start):
    return any(text.startswith(start) for text in found.notices)


@pytest.fixture
def reread(tmp_path):
    """Write frames to a file and read it: frames, and `where`."""

    def read(*frames, where=None):
        pd.concat(frames).to_parquet(tmp_path / "rows.parquet")
        return from_rows(tmp_path / "rows.parquet", where)

    return read


def test_an_entry_is_named_after_its_changes(made_runs):
    made_runs.add("source_only", 0.2)
    made_runs.add("source_only", 0.8, scenario="supervised")
    made_runs.add("source_only", 0.4, augmentation="photometric")
    made_runs.add("source_only", 0.3, augmentation="none")
    made_runs.add("glua", 0.6)
    made_runs.add("glua", 0.5, settings={"mask": "random"})
    made_runs.add("glua", 0.5, settings={"mask_ratio": 0.1, "lambda_output": 0.5})
    found = from_runs(made_runs.root)
    assert entries(found) == [
        "glua",
        "glua, lambda_output = 0.5, mask_ratio = 0.1",
        "glua, mask = random",
        "source_only",
        "source_only + photometric",
        "source_only, no augmentation",
        "supervised",
    ]
    by_entry = found.rows.drop_duplicates("run").set_index("entry")
    assert by_entry.loc["glua, mask = random", "variant"] == "random mask (ours)"
    assert by_entry.loc["glua", "variant"] == "GLUA"
    assert json.loads(by_entry.loc["glua, mask = random", "settings"]) == {"mask": "random"}
    assert (by_entry["base"].loc[["glua", "glua, mask = random"]] == "glua").all()
    assert found.tasks == ["phantom mr-ct"] and len(found.directories) == 7


def test_recorded_changes_take_precedence_over_current_defaults(made_runs):
    said = {"changed": {"mask": "soft"}, "variant": "of then"}
    made_runs.add("glua", 0.6, environment=said)
    made_runs.add("gone_since", 0.5, environment={"changed": {}, "variant": ""})
    assert entries(from_runs(made_runs.root)) == ["glua, mask = soft", "gone_since"]
    made_runs.add("gone_too", 0.5)  # which does not record it
    found = from_runs(made_runs.root)
    assert len(entries(found)) == 2
    assert any("gone_too" in text and "changed settings" in text for text in found.notices)
    with pytest.raises(ConfigError, match="finished and readable"):
        from_runs(made_runs.root, {"method": ["gone_too"]})


def test_rows_hold_every_score_in_the_dataset_s_order(made_runs):
    run = made_runs.add("glua", 0.6, seed=2)
    found = from_runs(made_runs.root)
    rows = found.of("phantom mr-ct")
    columns, texts = ["case", "structure", "dice", "assd"], {"case": str, "structure": str}
    stored = run.read_cases()[columns].astype(texts)
    pd.testing.assert_frame_equal(rows[columns].astype(texts), stored)
    assert list(rows["structure"].cat.categories) == ["MYO", "LAC"]  # not by the alphabet
    assert set(rows["seed"]) == {2} and set(rows["run"]) == {run.id}
    assert set(rows["seconds"]) == {100.0} and set(rows["device"]) == {"CPU, 1 thread"}
    scores = found.checkpoints.set_index("step")["score"]
    assert scores.to_dict() == pytest.approx({250: 0.54, 500: 0.6})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 20}, r"steps is 500 in 2 runs and 20 in 1 run; select with --where steps=500"),
        ({"batch_size": 2}, r"batch_size is .*--where batch_size=8"),
        ({"precision": "bf16-mixed"}, r"precision is "),
        (
            {"slices": 3, "slice_distance": 4.0},
            r"slices is 1 in 2 runs and 3, 4 mm apart in 1 run; select with --where slices=",
        ),
        ({"size": 90.0}, r"different test sets: case case_1 has references of different sizes"),
        ({"environment": {"data": {"train": "other"}}}, r"data is t in 2 runs and other in 1 run"),
    ],
)
def test_protocols_are_never_mixed(made_runs, changes, said):
    made_runs.add("source_only", 0.2)
    made_runs.add("slaug", 0.5)
    made_runs.add("glua", 0.6, **changes)
    with pytest.raises(ConfigError, match=f"phantom mr-ct mixes .*{said}"):
        from_runs(made_runs.root)
    assert entries(from_runs(made_runs.root, {"method": ["slaug", "source_only"]})) == [
        "slaug",
        "source_only",
    ]


def test_a_run_on_more_slices_does_not_replace_one_on_a_single_slice(made_runs):
    """They are the same entry with the same seed, but no versions of each other."""
    made_runs.add("glua", 0.6)
    made_runs.add("glua", 0.7, slices=3, slice_distance=4.0)
    made_runs.add("glua", 0.7, slices=3, slice_distance=8.0)
    with pytest.raises(ConfigError, match=r"slices is 1 in 1 run and 3, 4 mm apart in 1 run and 3"):
        from_runs(made_runs.root)
    for where in ({"slices": ["1"]}, {"slices": ["3"], "slice_distance": ["8.0"]}):
        assert len(from_runs(made_runs.root, where).directories) == 1


def test_rows_without_slices_are_of_single_slices(made_runs, reread):
    """Rows of older versions do not state the slices."""
    made_runs.add("glua", 0.6)
    older = from_runs(made_runs.root).rows.astype({"protocol": str, "run": str})
    without = {k: v for k, v in json.loads(older["protocol"].iloc[0]).items() if k != "slices"}
    older["protocol"] = json.dumps(without)
    newer = older.assign(run="newer", seed=1, protocol=json.dumps({**without, "slices": "1"}))
    stacked = older.assign(run="s", seed=1, protocol=json.dumps({**without, "slices": "3, 4 mm"}))
    assert reread(older, newer).rows["run"].nunique() == 2
    with pytest.raises(ConfigError, match="slices is 1 in 1 run and 3, 4 mm in 1 run"):
        reread(older, stacked)


def test_the_upper_bound_has_training_data_of_its_own(made_runs):
    made_runs.add("source_only", 0.2)
    made_runs.add(
        "source_only", 0.8, scenario="supervised", environment={"data": {"train": "target"}}
    )
    assert entries(from_runs(made_runs.root)) == ["source_only", "supervised"]


def test_excluded_runs_are_noted(made_runs):
    kept = made_runs.add("source_only", 0.2)
    torn = made_runs.add("glua", 0.6)
    whole = (torn.path / "cases.parquet").read_bytes()
    (torn.path / "cases.parquet").write_bytes(whole[: len(whole) // 2])
    failed = made_runs.add("slaug", 0.5)
    failed.fail("no memory")
    open_ = made_runs.add("fda", 0.5)
    (open_.path / "done").unlink()
    warned = []
    found = from_runs(made_runs.root, warn=warned.append)
    assert set(found.directories) == {kept.id} and found.notices == warned
    assert any(torn.id in text and "cases.parquet was truncated" in text for text in warned)
    assert {"1 failed run excluded.", "1 unfinished run excluded."} <= set(warned)


@pytest.mark.fault("sealed results", "report runs with edited, exchanged and missing files")
def test_damaged_runs_are_excluded_and_named(made_runs):
    made_runs.comparison(seeds=1)
    edited, bare, configured = (made_runs.add("fda", 0.9, seed) for seed in (1, 2, 3))
    table = pd.read_parquet(edited.path / "cases.parquet")
    table.assign(dice=1.0).to_parquet(edited.path / "cases.parquet", index=False)
    (bare.path / "config.yaml").unlink()
    text = (configured.path / "config.yaml").read_text()
    (configured.path / "config.yaml").write_text(text.replace("seed: 3", "seed: 4"))
    for where in (None, {"seed": ["0", "1"]}, {"code": ["c1"]}):
        found = from_runs(made_runs.root, where)
        assert "fda" not in set(found.rows["entry"]) and len(found.directories) == 4
        for run, name in ((edited, "cases.parquet"), (bare, "config.yaml is missing")):
            assert noted(found, f"Excluded: The finished run {run.path} is damaged ({name}")
        assert noted(found, f"Excluded: The finished run {configured.path} is damaged (config.yaml")
    rows = from_runs(made_runs.root).rows
    assert set(rows["seal"]) == {"sealed"}


def test_runs_of_the_previous_version_are_shown_as_not_sealed(made_runs):
    made_runs.comparison(seeds=1)
    old = as_version_1(made_runs.add("fda", 0.5, 0))
    found = from_runs(made_runs.root)
    assert noted(found, "NOT SEALED: 1 run of an earlier version")
    seals = found.rows.drop_duplicates("run").set_index("run")["seal"]
    assert seals[old.id] == "NOT SEALED" and set(seals.drop(old.id)) == {"sealed"}
    table = report_tables.runs(found).frame()
    assert list(table["seal"]).count("NOT SEALED") == 1


@pytest.mark.fault("sealed results", "report only damaged runs")
def test_only_damaged_runs_are_one_sentence(made_runs):
    (made_runs.add("fda", 0.9).path / "summary.json").write_text("{}")
    warned: list[str] = []
    with pytest.raises(ConfigError, match="is finished and readable"):
        from_runs(made_runs.root, {"seed": ["5"]}, warn=warned.append)
    assert "summary.json was truncated" in warned[0]
    (made_runs.root / "phantom" / "fda" / "000000000001" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="is finished and readable"):
        from_runs(made_runs.root)


def test_the_newest_run_of_a_cell_counts(made_runs):
    old = made_runs.add("glua", 0.3, environment={"code": "old"})
    reseal(old, time="2020-01-01T00:00:00+0000")
    new = made_runs.add("glua", 0.6)
    found = from_runs(made_runs.root)
    assert set(found.directories) == {new.id}
    assert any("1 run excluded: replaced by newer runs" in text for text in found.notices)
    assert set(from_runs(made_runs.root, {"code": ["old"]}).directories) == {old.id}


def test_an_entry_that_lacks_a_seed_is_noted(made_runs):
    made_runs.comparison(seeds=2)
    made_runs.add("fda", 0.5, seed=0)
    told = "phantom mr-ct: fda lacks seed 1 and is excluded from intervals, tests and ranks."
    assert told in from_runs(made_runs.root).notices
    made_runs.add("glua", 0.5, seed=5, settings={"mask": "random"})  # an ablation's own matter
    assert told in from_runs(made_runs.root).notices
    made_runs.add("advent", 0.5, seed=7)
    assert noted(from_runs(made_runs.root), "phantom mr-ct: advent lacks seeds 0 and 1")
    one = from_runs(made_runs.root, {"seed": ["0"]})
    assert any("No tests: 2 seeds (--seeds 3)" in text for text in one.notices)


def test_a_comparison_that_cannot_be_written_down_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "comparisons").write_text("a file in the place of the directory")
    with pytest.raises(RunFailure, match=r"comparisons/compare_.*\.json cannot be created because"):
        record(tmp_path, "compare glua", [])


def test_a_comparison_is_reported_by_its_own_runs_alone(made_runs):
    """Other runs have another budget, code or direction."""
    made_runs.comparison()
    path = record(made_runs.root, "compare glua, slaug", list_runs(made_runs.root))
    wanted = {run.id for run in list_runs(made_runs.root)}
    assert path == record(made_runs.root, "compare glua, slaug", list_runs(made_runs.root))
    made_runs.add("glua", 0.9, steps=20)
    made_runs.add("glua", 0.9, environment={"code": "newer"})
    made_runs.add("slaug", 0.9, direction="ct-mr")
    made_runs.add("advent", 0.9, 0).fail("why")
    with pytest.raises(ConfigError, match="mixes runs of different protocols"):
        from_runs(made_runs.root)
    found = from_runs(path)
    assert set(found.directories) == wanted and found.tasks == ["phantom mr-ct"]
    assert not any("failed" in text or "newer" in text for text in found.notices)
    assert set(from_runs(path, {"method": ["slaug"]}).rows["entry"]) == {"slaug"}
    shutil.rmtree(next(run.path for run in list_runs(made_runs.root) if run.id in wanted))
    assert noted(from_runs(path), "1 run of the comparison missing")
    (path.parent / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"other.json is not a comparison"):
        from_runs(path.parent / "other.json")


def repeats(rows, **changes):
    """Return the rows of a repeat of glua's seed 0."""
    own = rows[(rows["entry"] == "glua") & (rows["seed"] == 0)]
    return own.assign(**{"run": "nudged", "perturbation": 1, **changes})


def test_repeats_are_separate(made_runs, reread):
    made_runs.comparison(seeds=2)
    rows = from_runs(made_runs.root).rows.astype({"run": str, "code": str, "protocol": str})
    found = reread(rows, repeats(rows))
    assert set(found.repeats["run"].astype(str)) == {"nudged"}
    assert set(found.rows["run"]) == set(rows["run"]) and not found.rows["perturbation"].any()
    assert len(found.with_repeats(found.of("phantom mr-ct"))) == len(rows) + len(found.repeats)
    with pytest.raises(ConfigError, match="only repeats"):
        reread(rows, repeats(rows), where={"perturbation": ["1"]})
    found = reread(rows, repeats(rows, code="older"))
    assert found.repeats.empty and noted(found, "1 repeat excluded")
    other = json.dumps({**json.loads(rows["protocol"].iloc[0]), "steps": 20})
    with pytest.raises(ConfigError, match="steps is 500 in 8 runs and 20 in 1 run"):
        reread(rows, repeats(rows, protocol=other))
    older = rows.drop(columns="perturbation")
    assert not reread(older).rows["perturbation"].any()


def test_repeats_are_read_from_runs(made_runs):
    made_runs.comparison(seeds=2)
    again = made_runs.add("glua", 0.7, perturbation=1)
    found = from_runs(made_runs.root)
    assert set(found.repeats["run"]) == {again.id} and again.id not in set(found.rows["run"])
    assert again.id not in set(found.checkpoints["run"])
    bits = last_bits(found.with_repeats(found.of("phantom mr-ct")))
    assert bits["phantom mr-ct", "glua"] == pytest.approx(pd.Series([0.6, 0.7]).std())


def test_nothing_to_report_is_an_error(made_runs, tmp_path):
    with pytest.raises(ConfigError, match="nowhere has no runs; .*--runs"):
        from_runs(tmp_path / "nowhere")
    made_runs.add("glua", 0.6)
    with pytest.raises(ConfigError, match="None of the 1 runs .*seed=5"):
        from_runs(made_runs.root, {"seed": ["5"]})
    with pytest.raises(ConfigError, match="--where colour: runs have no such setting"):
        from_runs(made_runs.root, {"colour": ["5"]})
    made_runs.add("slaug", 0.6).fail("why")
    with pytest.raises(ConfigError, match="finished and readable"):
        from_runs(made_runs.root, {"method": ["slaug"]})


def test_where_is_read():
    assert parse_where(["steps=500", "method=a, b", "method=c"]) == {
        "steps": ["500"],
        "method": ["a", "b", "c"],
    }
    with pytest.raises(ConfigError, match="--where steps has no value"):
        parse_where(["steps"])


def test_rows_of_a_file_are_those_of_the_runs(made_runs, reread):
    made_runs.comparison()
    made_runs.add("glua", 0.5, settings={"mask": "random"})
    rows = from_runs(made_runs.root).rows
    again, text = reread(rows), {"entry": str}
    pd.testing.assert_frame_equal(
        again.rows.astype(text), rows.astype(text), check_categorical=False
    )
    assert again.checkpoints.empty and not again.directories
    glua = reread(rows, where={"method": ["glua"]})
    assert entries(glua) == ["glua", "glua, mask = random"]
    with pytest.raises(ConfigError, match="--where colour: .* has no such column"):
        reread(rows, where={"colour": ["red"]})
    with pytest.raises(ConfigError, match="has no rows that match"):
        reread(rows, where={"seed": ["9"]})


def test_a_file_without_rows_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.parquet cannot be read as Parquet"):
        from_rows(tmp_path / "gone.parquet")
    pd.DataFrame({"dice": [0.5]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match=r"other.parquet has no column case"):
        from_rows(tmp_path / "other.parquet")


def test_two_runs_of_one_entry_and_seed_are_rejected(made_runs, reread):
    made_runs.comparison(seeds=1)
    rows = from_runs(made_runs.root).rows.astype({"run": str})
    again = rows[rows["entry"] == "glua"].assign(run="other")
    with pytest.raises(ConfigError, match=r"two runs of glua with seed 0; select .*--where run="):
        reread(rows, again)
    fewer = {"run": [str(run) for run in rows["run"].unique()]}
    assert len(reread(rows, again, where=fewer).rows) == len(rows)
