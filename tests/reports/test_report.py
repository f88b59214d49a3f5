"""reports/report.py: page and files, and use in a browser."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from faults import full_disk

from glua_bench.errors import ConfigError, RunFailure
from glua_bench.reports import comparison, statistics, sweep_report
from glua_bench.reports.report import Options, summary, write
from glua_bench.reports.results import from_rows, from_runs

EVIL = "<img src=x onerror=alert(1)>$_{x}"
NO_PICTURES = Options(pictures=False)


def page_of(results, out, options=NO_PICTURES):
    """Write a report and return its page."""
    return html.unescape(write(results, out, options)[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def filled(made_runs_in, tmp_path_factory):
    """Runs of a comparison, an ablation with a curve, and an entry with a malicious name."""
    made_runs = made_runs_in(tmp_path_factory.mktemp("filled") / "runs")
    made_runs.comparison()
    for seed in range(3):
        for ratio in (0.1, 0.7):
            made_runs.add("glua", 0.5 + ratio / 10, seed, settings={"mask_ratio": ratio})
        made_runs.add("glua", 0.58, seed, settings={"mask": "random"})
        made_runs.add(
            "fda",
            0.3,
            seed,
            environment={"changed": {"note": EVIL}, "variant": ""},
            selectors={"source_val": 0.3, "oracle": 0.4},
        )
        made_runs.add("advent", 0.35, seed, selectors={"source_val": 0.3, "oracle": 0.4})
    return made_runs


@pytest.fixture(scope="module")
def written(filled, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "report"
    write(from_runs(filled.root), out, NO_PICTURES)
    return out


def test_every_part_is_written(written):
    page = (written / "report.html").read_text()
    tables = {path.name for path in (written / "tables").iterdir()}
    for name in (
        "main_phantom_mr-ct",
        "ranking_phantom_mr-ct",
        "pairs_phantom_mr-ct",
        "cost_phantom_mr-ct",
        "ablation_glua",
        "curve_glua_mask_ratio",
        "selectors",
        "selectors_phantom_mr-ct",
        "runs",
    ):
        assert {f"{name}.tex", f"{name}.csv", f"{name}.md"} <= tables
        assert f'id="table-{name}"' in page
    figures = {path.stem for path in (written / "figures").iterdir()}
    for name in (
        "gap_recovered",
        "scores_phantom_mr-ct",
        "intervals_phantom_mr-ct",
        "cases_phantom_mr-ct",
        "curve_glua_mask_ratio",
        "cost_quality",
        "selector_regret",
        "learning_phantom_mr-ct",
    ):
        assert name in figures and f'id="figure-{name}"' in page
    assert all(path.stat().st_size > 500 for path in (written / "figures").iterdir())
    for sentence in (
        "glua has the highest mean Dice, 62.0 %",
        "No tests: 6 test cases are required",
    ):
        assert sentence in page
    # The context block belongs to other data.
    assert "Published results" not in page


def test_the_page_needs_nothing_but_itself(written):
    page = (written / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert "@import" not in page and not re.findall(r"url\((?!#)", page)


@pytest.mark.fault("hostile text", "HTML and LaTeX in names, in the pages of a report")
def test_names_are_shown_and_never_executed(written):
    page = (written / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    for path in written.rglob("*.svg"):
        assert "<img" not in path.read_text()
    text = (written / "tables" / "runs.tex").read_text()
    assert r"\textless{}img src=x" in text and r"\$\_\{x\}" in text


def test_every_number_links_to_its_runs(filled, written):
    page = (written / "report.html").read_text()
    ids = set(re.findall(r'id="run-(\w+)"', page))
    cited = {run for text in re.findall(r'data-runs="([^"]+)"', page) for run in text.split()}
    assert cited <= ids and len(ids) == filled.count


def test_rows_give_the_same_tables(filled, written, tmp_path):
    results = from_rows(written / "rows.parquet")
    write(results, tmp_path / "again", NO_PICTURES)
    compared = 0
    for path in (written / "tables").iterdir():
        if path.name.startswith("selectors."):
            continue  # needs scores of checkpoints, which rows do not hold
        assert (tmp_path / "again" / "tables" / path.name).read_text() == path.read_text()
        compared += 1
    assert compared >= 24
    assert summary(results, NO_PICTURES) == summary(from_runs(filled.root), NO_PICTURES)


def test_published_results_stand_apart(written, tmp_path):
    rows = pd.read_parquet(written / "rows.parquet").astype({"task": str, "dataset": str})
    rows["dataset"], rows["task"] = "mmwhs", "mmwhs mr-ct"
    rows.to_parquet(tmp_path / "rows.parquet")
    page = page_of(from_rows(tmp_path / "rows.parquet"), tmp_path / "other")
    block = page.split('<figure class="table context"')[1].split("</figure>")[0]
    assert "SIFA v2" in block and "not a comparison" in block and "data-runs" not in block
    own = (tmp_path / "other" / "tables" / "main_mmwhs_mr-ct.tex").read_text()
    assert "SIFA v2" not in own


def test_caveats_are_on_the_page(made_runs, tmp_path):
    made_runs.comparison(seeds=1)
    made_runs.add("fda", 0.3).fail("why")
    page = page_of(from_runs(made_runs.root), tmp_path / "report")
    assert "phantom mr-ct: No tests: 2 seeds (--seeds 3)" in page
    assert "1 failed run" in page and "for this training of each method only" in page
    assert "±" not in page and "†" not in page  # neither occurs, so neither is explained


def test_statements_on_the_page_match_the_numbers(made_runs, tmp_path):
    """Enough seeds and cases for tests, an incomplete entry, no gap in one task."""
    made_runs.cases = tuple(f"case_{i}" for i in range(7))
    made_runs.comparison()
    made_runs.add("fda", 0.9, 0)
    for seed in range(3):
        for scenario, dice in (("uda", 0.4), ("supervised", (0.7, 0.3, 0.6)[seed])):
            made_runs.add("source_only", dice, seed, scenario=scenario, direction="ct-mr")
        made_runs.add("glua", 0.5, seed, direction="ct-mr")
    results = from_runs(made_runs.root)
    page = page_of(results, tmp_path / "report")
    task = "phantom mr-ct"
    for said in (
        "fda lacks seeds 1 and 2 and is excluded from intervals, tests and ranks.",
        "Holm correction over 3 pairs; 7 cases, 3 seeds",
        "95 % CI for new cases and new trainings, from 7 cases and 3 seeds",
        "corrected over all 3 pairs",
        "phantom ct-mr: gap recovered is undefined, since supervised is not clearly above",
        "<dt>seeds compared</dt><dd>0, 1, 2</dd>",
        "<dt>test cases</dt><dd>7</dd>",
        comparison.NO_REPEATS.replace(
            "`compare … --repeats 2`", "<code>compare … --repeats 2</code>"
        ),
    ):
        assert said in page, said
    assert "phantom mr-ct: gap recovered is" not in page
    # Verdict, tables and data agree.
    scores = statistics.scores(results.of(task), task)
    assert "fda" not in scores
    best = scores["glua"]
    assert f"glua has the highest mean Dice, {100 * best.mean():.1f} %" in page
    table = pd.read_csv(tmp_path / "report" / "tables" / "main_phantom_mr-ct.csv", index_col=0)
    assert table.loc["glua", "Dice (%) mean"] == pytest.approx(100 * best.mean())
    by_seed = best.groupby("seed").mean()
    assert table.loc["glua", "Dice (%) mean sd"] == pytest.approx(100 * by_seed.std())
    for word in ("resample", "Wilcoxon", "better in", "bootstrap", "Nemenyi"):
        assert word not in page


def test_the_caption_of_a_curve_matches_the_drawing(made_runs, tmp_path):
    for ratio in (0.1, 0.3, 0.7):
        made_runs.add("glua", ratio, settings={"mask_ratio": ratio} if ratio != 0.3 else {})
    made_runs.add("source_only", 0.2)
    captions = []
    for seed in range(3):  # no variant, one with one seed, one with two
        if seed:
            made_runs.add("glua", 0.4, seed - 1, settings={"mask": "random"})
        page = page_of(from_runs(made_runs.root), tmp_path / str(seed))
        captions.append(re.search(r'Dice over mask_ratio\. [^<"]*', page)[0].strip())
    assert captions[0].endswith("mask_ratio. One seed.")
    assert captions[1].endswith("Dashed: variants without a value on this axis.")
    assert captions[2].endswith("on this axis, at the right edge with their standard deviation.")


def test_entries_without_a_common_seed_are_noted_and_drawn(made_runs, tmp_path):
    made_runs.add("glua", 0.6, 0)
    made_runs.add("slaug", 0.5, 1)
    page = page_of(from_runs(made_runs.root), tmp_path / "report")
    assert "slaug lacks seed 0 and is excluded" in page
    assert "No tests: fewer than two methods." in page


def test_repeats_survive_the_rows(made_runs, tmp_path):
    made_runs.comparison(seeds=2)
    rows = from_runs(made_runs.root).rows.astype({"run": str})
    own = rows[(rows["entry"] == "glua") & (rows["seed"] == 0)]
    nudged = own.assign(run="nudged", perturbation=1, dice=own["dice"] + 0.1)
    pd.concat([rows, nudged]).to_parquet(tmp_path / "rows.parquet")
    page = page_of(from_rows(tmp_path / "rows.parquet"), tmp_path / "one")
    write(from_rows(tmp_path / "one" / "rows.parquet"), tmp_path / "two", NO_PICTURES)
    text = (tmp_path / "one" / "tables" / "main_phantom_mr-ct.md").read_text()
    assert "last bits ±" in text and "Last bits: standard deviation" in text
    for path in (tmp_path / "one" / "tables").iterdir():
        assert (tmp_path / "two" / "tables" / path.name).read_text() == path.read_text()
    assert 'id="run-nudged"' in page


def test_entries_without_the_selector_are_named(made_runs, tmp_path):
    made_runs.comparison(seeds=1)
    made_runs.add("glua", 0.5, 0, direction="ct-mr")
    rows = from_runs(made_runs.root).rows.astype({"selector": str})
    made = tmp_path / "rows.parquet"
    own = rows[(rows["entry"] != "source_only")].assign(selector="im")
    pd.concat([rows, own]).to_parquet(made)
    page = page_of(from_rows(made), tmp_path / "out", Options(selector="im", pictures=False))
    assert "excluded without a checkpoint of im: source_only." in page
    task = "phantom ct-mr"
    pd.concat([rows, own[own["task"] != task]]).to_parquet(made)
    with pytest.raises(ConfigError, match=f"im: no run on {task} has a checkpoint"):
        write(from_rows(made), tmp_path / "none", Options(selector="im", pictures=False))


def test_a_missing_dataset_costs_the_pictures_only(made_runs, tmp_path):
    made_runs.comparison()
    (tmp_path / "file").write_text("")
    options = Options(data_root=tmp_path / "file")
    page = page_of(from_runs(made_runs.root), tmp_path / "report", options)
    assert "No pictures of phantom: " in page and 'id="table-runs"' in page


def test_files_of_another_directory_cost_the_pictures_only(
    call, quick_run, phantom_root, tmp_path, monkeypatch
):
    """Runs made with --data-root, reported without it: nothing is generated."""
    from glua_bench.datasets.phantom.dataset import Phantom, generate

    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    runs = tmp_path / "runs"
    quick_run("source_only", runs)
    words = ("report", "--runs", runs, "--out", tmp_path / "report")
    default = Phantom.default_root()
    code, _, err = call(*words)
    assert code == 0 and "give it with --data-root" in err and "data prepare phantom" in err, err
    assert not default.exists()
    ids = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
    generate(default, seed=0, ids=ids, voxel_scale=6.0, workers=1)
    code, _, err = call(*words)
    assert code == 0 and "has shape" in err and "give it with --data-root" in err, err
    code, _, err = call(*words, "--data-root", phantom_root)
    assert code == 0 and "No pictures" not in err, err
    assert (tmp_path / "report" / "figures" / "side_by_side_phantom_mr-ct.png").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(selector="oracle"), "--selector oracle: no run has a checkpoint"),
        (Options(pictures=False), "--out"),
    ],
)
def test_what_cannot_be_written_is_an_error(made_runs, tmp_path, options, said):
    made_runs.comparison(seeds=1)
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, RunFailure), match=said):
        write(from_runs(made_runs.root), tmp_path / "file" / "report", options)


@pytest.mark.fault("full disk", "the report of a comparison and that of a sweep")
def test_a_report_on_a_full_disk_leaves_nothing(made_runs, made_sweep, tmp_path):
    made_runs.comparison(seeds=1)
    sweep = made_sweep({"lr": [0.1, 0.2]}, [0.1, 0.2])
    out = tmp_path / "new" / "report"
    with full_disk(6), pytest.raises(RunFailure, match="is full; free some space"):
        write(from_runs(made_runs.root), out, Options(pictures=False))
    assert not out.parent.exists()
    with full_disk(6), pytest.raises(RunFailure, match="is full; free some space"):
        sweep_report.write(sweep, out)
    assert not out.parent.exists()


# -- in a browser ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_can_use_the_page(browser, cells, assert_clean, written: Path):
    browser.open(written / "report.html")
    driver = browser.driver

    def click(selector):
        driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    # Sort: numbers descending; a second click reverses.
    head = "#table-main_phantom_mr-ct thead tr:last-child th:nth-child(4) button"
    click(head)
    first = [float(text.split()[0].rstrip("†")) for text in cells("main_phantom_mr-ct", 3)]
    assert first == sorted(first, reverse=True) and len(first) == 5
    click(head)
    turned = cells("main_phantom_mr-ct", 3)
    assert [float(text.split()[0].rstrip("†")) for text in turned] == first[::-1]

    # Filter: rows that contain every word remain.
    every = len(cells("runs", 0))
    box = driver.find_element("css selector", "#table-runs input")
    box.send_keys("GLUA 0.7")
    shown = cells("runs", 1)
    assert shown == ["glua, mask_ratio = 0.7"] * 3 and every > 3

    # A link shows its runs, regardless of the filter.
    link = driver.find_element("css selector", "#table-main_phantom_mr-ct a[data-runs]")
    wanted = link.get_attribute("data-runs").split()
    click("#table-main_phantom_mr-ct a[data-runs]")
    assert sorted(cells("runs", 0)) == sorted(wanted)

    # Theme: background and charts change together.
    looks = """return [document.body, document.querySelector('#figure-gap_recovered svg text')]
        .map(e => getComputedStyle(e)).map(style => style.backgroundColor + style.fill)"""
    before = driver.execute_script(looks)
    click("#theme")
    after = driver.execute_script(looks)
    assert before[0] != after[0] and before[1] != after[1]

    assert driver.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert_clean(browser)


def test_the_protocol_is_on_the_page(written):
    page = (written / "report.html").read_text()
    for name, value in (
        ("steps", "500"),
        ("batch size", "8"),
        ("test cases", "3"),
        ("seeds compared", "0, 1, 2"),
    ):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    protocols = pd.read_parquet(written / "rows.parquet")["protocol"].unique()
    assert json.loads(str(protocols[0]))["steps"] == 500


def test_captions_count_the_seeds_of_their_own_task(made_runs, tmp_path):
    made_runs.add("glua", 0.5, 0)
    for seed in range(2):
        made_runs.add("glua", 0.5, seed, direction="ct-mr")
    page = page_of(from_runs(made_runs.root), tmp_path / "report")
    one, two = (page.split(f'id="figure-scores_phantom_{d}"')[1] for d in ("mr-ct", "ct-mr"))
    assert "Dice of every case; missed" in one.split("</figure>")[0]
    assert "Dice of every case and seed; missed" in two.split("</figure>")[0]
