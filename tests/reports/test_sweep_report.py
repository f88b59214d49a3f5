"""reports/sweep_report.py: the choice, and its post hoc evaluation by test labels."""

from __future__ import annotations

import html
import math
import re
import shlex
from dataclasses import replace

import pytest

from glua_bench.errors import RunFailure
from glua_bench.reports import sweep_report
from glua_bench.reports.sweep_report import (
    ORACLE_STAMP,
    notices,
    selection_cost,
    sentences,
    write,
)

RATIOS = [0.1, 0.3, 0.5, 0.7]
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def ratios(made_sweep):
    """The objective chooses the second of four trials, test labels the third."""

    def make(**changes):
        values = {
            "dice": [[0.50, 0.70], [0.60, 0.64], [0.70, 0.80], [0.40, 0.50]],
            **changes,
        }
        return made_sweep({"mask_ratio": RATIOS}, [0.1, 0.4, 0.3, 0.2], **values)

    return make


def test_the_selection_cost_is_paired_over_seeds(ratios):
    cost = selection_cost(ratios())
    assert (cost.chosen, cost.best) == (1, 2)
    assert cost.difference == pytest.approx(0.13)
    assert cost.spread == pytest.approx(0.03 * math.sqrt(2))  # of 0.10 and 0.16
    assert cost.dice(1) == pytest.approx((0.62, 0.02 * math.sqrt(2)))
    assert cost.rho == pytest.approx(0.6)  # ranks 1 4 3 2 against 2 3 4 1
    assert list(cost.trials["dice"]) == pytest.approx([0.6, 0.62, 0.75, 0.45])


def test_missing_seeds_make_no_trial_better(ratios):
    sweep = ratios()
    sweep.runs.loc[(sweep.runs["trial"] == 2) & (sweep.runs["seed"] == 0), "dice"] = math.nan
    cost = selection_cost(sweep)
    assert cost.best == cost.chosen == 1 and list(cost.trials["number"]) == [0, 1, 3]
    assert math.isnan(cost.rho)  # of three trials
    assert any("1 of 8 runs have no readable test scores" in text for text in notices(sweep))
    sweep.runs["dice"] = math.nan
    assert selection_cost(sweep) is None and len(sentences(sweep)) == 1


def test_a_lost_direction_leaves_a_trial_out_by_number(ratios, tmp_path):
    sweep = ratios(directions=("mr-ct", "ct-mr"))
    lost = (sweep.runs["trial"] == 2) & (sweep.runs["direction"] == "ct-mr")
    sweep.runs.loc[lost & (sweep.runs["seed"] == 1), "dice"] = math.nan
    cost = selection_cost(sweep)
    assert list(cost.trials["number"]) == [0, 1, 3] and list(cost.excluded) == [2]
    page = write(sweep, tmp_path / "report")[0].read_text()
    assert "Excluded without scores: trial 2." in page
    assert "±: standard deviation over 2 seeds" in page
    assert "biased upwards" not in page  # the chosen trial is the best: no cost


def test_one_seed_has_no_bars_and_no_spread(ratios, tmp_path):
    page = write(ratios(dice=[[0.1], [0.2], [0.9], [0.3]]), tmp_path / "report")[0].read_text()
    assert "One seed: the difference cannot be separated from variation between seeds." in page
    assert "bars: standard deviation" not in page and "biased upwards" in page


def test_the_summary_separates_choice_and_evaluation(ratios):
    first, second = sentences(ratios())
    assert first == (
        "Selected without target labels: mask_ratio 0.3 with the highest im, 0.4 (trial 1; 4 "
        "finished of 4 trials)."
    )
    assert second == (
        "Post hoc: test Dice of this choice 62.0 ± 2.8 %; oracle choice mask_ratio 0.5: 75.0 ± 7.1 "
        "% (trial 2); cost of selecting without target labels 13.0 ± 4.2 points; rank correlation "
        "of im and test Dice 0.60 over 4 trials."
    )
    alike = ratios(dice=[[0.1], [0.9], [0.2], [0.3]])
    assert "90.0 %, the highest of 4 trials" in sentences(alike)[1]
    assert any("One seed per trial" in text for text in notices(alike))
    assert not any("One seed per trial" in text for text in notices(ratios()))


def test_unfinished_failed_and_lost_trials_are_noted(made_sweep, tmp_path):
    sweep = made_sweep(
        {"lr": [0.1, 0.2, 0.3]}, [0.1] * 3, states=["failed", "pruned", "running"], budget=5
    )
    assert sentences(sweep) == ["No finished trial yet (1 pruned, 1 failed, 1 running of 5)."]
    lost = made_sweep({"lr": [0.1, 0.2]}, [0.1, 0.2], states=["lost", "done"])
    lost.trials.loc[0, "reason"] = "its workers were killed 3 times"
    assert "Trial 0 lost: its workers were killed 3 times." in notices(lost)
    write(lost, tmp_path)
    assert "lost" in (tmp_path / "figures" / "history.svg").read_text(encoding="utf-8")
    told = notices(sweep)
    assert "3 of 5 trials are not finished; the choice may change." in told
    assert "Trial 0 failed: the data are gone." in told


def figures_of(out):
    return {path.stem for path in (out / "figures").iterdir()}


def test_a_sweep_over_one_number_has_its_curve(ratios, tmp_path):
    files = write(ratios(), tmp_path / "report")
    assert files[0] == tmp_path / "report" / "report.html" and all(f.is_file() for f in files)
    assert figures_of(tmp_path / "report") == {
        "history",
        "curve_mask_ratio",
        "curve_mask_ratio_post_hoc",
        "agreement",
        "time_line",
    }
    tables = {path.name for path in (tmp_path / "report" / "tables").iterdir()}
    for name in ("definition", "best", "selection_cost", "trials", "runs"):
        assert {f"{name}.tex", f"{name}.csv", f"{name}.md"} <= tables
    page = files[0].read_text()
    assert "How much of it?" in page and "--set method.mask_ratio=0.3" in page
    assert "run --method glua --set method.mask_ratio=0.3" in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    ids = set(re.findall(r'id="run-(\w+)"', page))
    cited = {run for text in re.findall(r'data-runs="([^"]+)"', page) for run in text.split()}
    assert cited == ids and len(ids) == 8
    # Apart from the summary, only the post hoc section uses test labels.
    before, after = page.split('<section id="post-hoc">')
    assert "never\n" in after or "never " in after.split("</div>")[0]
    assert "test Dice" not in before.split('<section id="question">')[1]


def test_what_a_sweep_sets_of_the_method_is_part_of_its_choice(ratios, tmp_path):
    sweep = replace(ratios(), data=("--set", "method.mask=topk"))
    page = write(sweep, tmp_path)[0].read_text()
    assert "run --method glua --set method.mask=topk --set method.mask_ratio=0.3" in page


def test_the_command_of_a_choice_can_be_pasted(made_sweep, tmp_path):
    """It names the data, and quotes what a shell would split or expand."""
    form = "a b; $(ls) 'c'"
    sweep = made_sweep({"form": [form]}, [0.5], scales={"form": None})
    sweep = replace(sweep, data=("--dataset", "my data.yaml", "--direction", "mr-ct"))
    page = html.unescape(write(sweep, tmp_path)[0].read_text())
    line = re.search(r"<pre><code>(glua-bench .*?)</code></pre>", page)[1]
    assert shlex.split(line) == [
        *("glua-bench", "run", "--method", "glua", "--dataset", "my data.yaml"),
        *("--direction", "mr-ct", "--set", f"method.form={form}"),
    ]


def test_a_sweep_over_many_parameters_has_all_its_charts(made_sweep, tmp_path):
    values = [0.01 * (i + 1) for i in range(12)]
    sweep = made_sweep(
        {"a": values, "b": values[::-1][:6] + values[:6], "mask": ["x", EVIL] * 6},
        [0.1 * ((5 * i) % 7) for i in range(12)],
        costs=[float(20 - i) for i in range(12)],
        states=["done"] * 11 + ["pruned"],
        scales={"a": True, "b": False, "mask": None},
        importances={"a": 0.6, "b": 0.3, "mask": 0.1},
        seen=[(0, 0, 0.1), (11, 0, 0.05)],
    )
    out = tmp_path / "report"
    page = write(sweep, out)[0].read_text()
    assert figures_of(out) == {
        "history",
        "courses",
        "slices",
        "importances",
        "contours",
        "front_seconds",
        "agreement",
        "time_line",
    }
    assert "Pareto front" in page and "<img src=x" not in page and "A note." in page


def test_what_few_trials_cannot_show_is_said(made_sweep, tmp_path):
    sweep = made_sweep({"a": RATIOS, "b": RATIOS[::-1]}, [0.1, 0.2, 0.3, 0.4])
    page = write(sweep, tmp_path / "report")[0].read_text()
    assert "Contours are omitted" in page and "contours" not in figures_of(tmp_path / "report")


def test_what_the_oracle_chose_is_stamped_everywhere(ratios, tmp_path):
    sweep, out = ratios(objective="oracle"), tmp_path / "report"
    page = write(sweep, out)[0].read_text()
    assert f"<title>{ORACLE_STAMP}" in page and f"<h1>{ORACLE_STAMP}" in page
    sections = page.split("<section id=")[1:-1]
    assert all(ORACLE_STAMP.strip() in section for section in sections)
    for path in (out / "tables").glob("*.md"):
        assert path.read_text().startswith("ORACLE"), path.name
    for path in (out / "figures").glob("*.svg"):
        assert "oracle (privileged)" in path.read_text() or path.stem == "time_line"
    captions = re.findall(r"<figcaption>(.*?)<", page, re.DOTALL)
    assert captions and all(caption.startswith(ORACLE_STAMP) for caption in captions)
    assert "by labels of target test cases" in sentences(sweep)[0] and len(sentences(sweep)) == 1
    assert notices(sweep)[0].startswith("ORACLE: ") and selection_cost(sweep) is not None
    assert "post_hoc/selection_cost" not in sweep_report.as_metrics(sweep)
    assert "ORACLE" not in write(ratios(), tmp_path / "other")[0].read_text()


def test_the_tracker_s_numbers_keep_the_two_apart(ratios):
    assert sweep_report.as_metrics(ratios()) == pytest.approx(
        {
            "chosen/im": 0.4,
            "post_hoc/dice/chosen": 0.62,
            "post_hoc/dice/highest": 0.75,
            "post_hoc/selection_cost": 0.13,
            "post_hoc/rank_correlation": 0.6,
        }
    )


def test_an_empty_sweep_has_a_page(made_sweep, tmp_path):
    page = write(made_sweep({"lr": []}, [], budget=3), tmp_path / "report")[0].read_text()
    assert "No finished trial yet (none started of 3)." in page


def test_a_directory_that_cannot_be_is_said(ratios, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="--out"):
        write(ratios(), tmp_path / "file" / "report")


@pytest.mark.slow
def test_the_page_works_in_a_browser(browser, cells, assert_clean, ratios, tmp_path):
    browser.open(write(ratios(), tmp_path / "report")[0])
    browser.driver.execute_script("document.querySelector('#table-best a[data-runs]').click()")
    assert cells("runs", 0) == ["0001m0", "0001m1"]
    assert_clean(browser)
