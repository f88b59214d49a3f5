"""reports/comparison.py: table, verdict and files, from synthetic rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from glua_bench.config import RunConfig
from glua_bench.errors import RunFailure
from glua_bench.reports import statistics
from glua_bench.reports.comparison import (
    as_metrics,
    as_text,
    bounds,
    costs,
    table,
    verdict,
    write,
)
from glua_bench.task import Grid


def made(cases: str = "ab", of: dict[str, list[float]] | None = None) -> pd.DataFrame:
    """Return rows with the given Dice of each seed; cases differ slightly."""
    rows = []
    for entry, dice in (of or DICE).items():
        for seed, mean in enumerate(dice):
            if math.isnan(mean):
                continue
            for place, case in enumerate(cases):
                shift = 0.02 * (place - (len(cases) - 1) / 2)
                rows.append((entry, "t x-y", seed, case, "s", mean + shift, 3.0, case == "a", 10))
    columns = ["entry", "task", "seed", "case", "structure", "dice", "assd", "missed", "step"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(selector="last", peak_memory_mib=7.0, seconds=50.0)


DICE = {"source_only": [0.2, 0.22], "supervised": [0.8, 0.82], "mine": [0.5, 0.4]}


def test_the_table_is_of_seeds_and_pairs_the_gap_by_seed() -> None:
    frame = made()
    other = frame.assign(selector="source_val", dice=0.0)
    lines = table(pd.concat([frame, other]))
    mine = lines.loc["t x-y", "mine"]
    assert mine["Dice"] == pytest.approx(0.45) and mine["sd"] == pytest.approx(0.0707, abs=1e-3)
    assert mine["gap recovered"] == pytest.approx(0.4)  # 50 % and 30 %
    assert (mine["gap min"], mine["gap max"]) == pytest.approx((0.3, 0.5))
    assert mine["missed"] == 2 and mine["s/update"] == pytest.approx(5.0) and mine["compared"]
    text = as_text(lines)
    assert "0.450 ± 0.071" in text and "40 % (30 to 50)" in text and "One seed" not in text
    assert "supervised (privileged)  " in text

    lone = table(frame[(frame["entry"] == "mine") & (frame["seed"] == 0)])
    assert lone["gap recovered"].isna().all()
    assert "One seed: no standard deviation" in as_text(lone) and "±  " not in as_text(lone)
    assert "underestimate" not in as_text(lone)  # there is no spread that could
    # In a narrow terminal, columns that do not fit follow below.
    narrow = as_text(lines, 60)
    assert max(map(len, narrow.split("\nThe spread")[0].splitlines())) <= 60
    assert set(narrow.split()) == {*text.split(), "\\"}


@pytest.mark.parametrize(
    "bounds",
    [
        {"source_only": [0.30, 0.42], "supervised": [0.38, 0.37]},  # reversed for one seed
        {"source_only": [0.30, 0.30], "supervised": [0.31, 0.39]},  # above, but not significantly
        {"source_only": [0.5, 0.5], "supervised": [0.4, 0.4]},
        {"source_only": [0.2], "supervised": [math.nan, 0.8]},  # no seed in common
    ],
)
def test_an_uncertain_gap_is_undefined(bounds: dict[str, list[float]]) -> None:
    lines = table(made(of={**bounds, "mine": [0.25, 0.26]}))
    assert lines[["gap recovered", "gap min", "gap max"]].isna().all(axis=None)
    text = as_text(lines)
    assert (
        "t x-y: gap recovered is undefined, since supervised is not clearly above source_only"
        in text
    )
    assert " % (" not in text
    numbers = as_metrics(lines)
    assert math.isnan(numbers["x-y/gap_recovered/mine"])


def test_an_incomplete_entry_takes_no_seed_from_the_others() -> None:
    nan = math.nan
    frame = made("abcdef", {"a": [0.5, 0.6, 0.7], "b": [0.3, 0.4, 0.5], "glua": [0.9, nan, 0.95]})
    lines = table(frame).loc["t x-y"]
    assert lines["seeds"].to_dict() == {"a": 3, "b": 3, "glua": 2}
    assert lines["compared"].to_dict() == {"a": True, "b": True, "glua": False}
    assert lines.loc["glua", "Dice"] == pytest.approx(0.925)
    said = verdict(frame, "t x-y")
    assert said.startswith("t x-y: a has the highest mean Dice, 0.600 (95 % CI ")
    assert said.endswith(" glua lacks seed 1 and is excluded from intervals, tests and ranks.")


def test_seeds_that_others_lack_move_no_number_of_the_table() -> None:
    """The verdict and the table state the same number."""
    frame = made("abcdef", {"a": [0.5, 0.6, 0.1], "b": [0.3, 0.4], "c": [0.2, 0.3]})
    lines = table(frame).loc["t x-y"]
    assert lines.loc["a", "Dice"] == pytest.approx(0.55) and lines.loc["a", "seeds"] == 2
    said = verdict(frame, "t x-y")
    assert "a has the highest mean Dice, 0.550" in said and "Seed 2 not used" in said


def test_all_outputs_state_the_same_mean(tmp_path: Path) -> None:
    frame = made("abcdef", {**DICE, "late": [0.3]})
    lines = table(frame)
    write(frame, tmp_path)
    read = {f.stem: pd.read_csv(f).set_index("entry") for f in tmp_path.iterdir() if f.stem in
            ("table", "intervals", "ranking")}  # fmt: skip
    numbers = as_metrics(lines)
    for entry in ("source_only", "mine"):
        wanted = lines.loc[("t x-y", entry), "Dice"]
        assert read["table"].loc[entry, "Dice"] == pytest.approx(wanted)
        assert read["intervals"].loc[entry, "mean"] == pytest.approx(wanted)
        assert read["ranking"].loc[entry, "mean"] == pytest.approx(wanted)
        assert numbers[f"x-y/dice/{entry}"] == pytest.approx(wanted)
        assert f"{wanted:.3f}" in as_text(lines)
    assert "late" not in read["intervals"].index and not read["table"].loc["late", "compared"]
    assert "supervised" not in read["ranking"].index


def repeated() -> pd.DataFrame:
    """Return `made` with repeats of seed 0 of "mine"."""
    frame = made().assign(perturbation=0)
    own = frame[(frame["entry"] == "mine") & (frame["seed"] == 0)]
    more = [own.assign(perturbation=k, dice=own["dice"] + by) for k, by in ((1, 0.1), (2, -0.3))]
    return pd.concat([frame, *more], ignore_index=True)


def test_repeats_show_the_last_bits_and_change_nothing_else() -> None:
    lines, without = table(repeated()), table(made())
    mine = lines.loc["t x-y", "mine"]
    assert mine["last bits"] == pytest.approx(pd.Series([0.5, 0.6, 0.2]).std())
    pd.testing.assert_frame_equal(
        lines.drop(columns="last bits"), without.drop(columns="last bits")
    )
    assert verdict(repeated(), "t x-y") == verdict(made(), "t x-y")
    text = as_text(lines)
    assert "last bits" in text.splitlines()[1] and "± 0.208" in text
    assert "Last bits: standard deviation" in text and "--repeats 2" not in text
    assert as_metrics(lines)["x-y/dice_last_bits/mine"] == pytest.approx(mine["last bits"])
    assert "`compare … --repeats 2` measures it" in as_text(without)
    assert "last bits" not in as_text(without).splitlines()[1]
    assert not any("last_bits" in name for name in as_metrics(without))


def test_the_numbers_have_names_that_a_tracker_takes() -> None:
    numbers = as_metrics(table(made().replace("mine", "mine + masked (ours)")))
    assert len(numbers) == 15
    assert numbers["x-y/dice/mine masked ours"] == pytest.approx(0.45)
    assert numbers["x-y/dice_sd/mine masked ours"] == pytest.approx(0.0707, abs=1e-3)
    assert numbers["x-y/assd_mm/source_only"] == pytest.approx(3.0)
    assert numbers["x-y/gap_recovered/mine masked ours"] == pytest.approx(0.4)


def test_a_gap_over_fewer_seeds_has_a_note() -> None:
    dice = {"source_only": [0.2, 0.22, 0.21], "supervised": [0.8], "mine": [0.5, 0.4, 0.45]}
    lines = table(made("abcdef", {**dice, "other": [0.3, 0.3, 0.3]}))
    assert lines.loc[("t x-y", "mine"), ["seeds", "gap seeds"]].tolist() == [3, 1]
    text = as_text(lines)
    assert "gap recovered of other, mine is over the seeds of both bounds" in text
    assert " 50 %  " in text and "(50 to 50)" not in text
    whole = as_text(table(made("abcdef", {**dice, "supervised": [0.8, 0.82, 0.81]})))
    assert "of both bounds" not in whole and "(30 to 50)" in whole


def test_zero_has_no_sign() -> None:
    dice = {"b": [0.5, 0.5], "a": [0.5, 0.50002]}  # the difference changes its sign
    rows = made("abcdef", dice)
    assert "−0.0 " not in verdict(rows, "t x-y", percent=True)
    assert "−0.000" not in verdict(rows, "t x-y")
    assert "−0.000" not in verdict(rows.assign(dice=0.5), "t x-y")


@pytest.mark.parametrize("more", ["", "x" * 300])
def test_entries_with_equal_tracker_names_stay_apart(more: str) -> None:
    rows = made().replace({"mine": f"mine {more}(a)", "source_only": f"mine {more}[a]"})
    numbers = as_metrics(table(rows))
    dice = {name.split("/")[2]: v for name, v in numbers.items() if "/dice/" in name}
    assert len(numbers) == 15 and sorted(dice.values()) == pytest.approx([0.21, 0.45, 0.81])
    for name in dice:
        assert {f"x-y/{what}/{name}" for what in ("dice_sd", "assd_mm", "gap_recovered")} <= set(
            numbers
        )


def test_the_verdict_excludes_the_upper_bound() -> None:
    said = verdict(made(), "t x-y")
    assert said.startswith("t x-y: mine has the highest mean Dice, 0.450 (95 % CI ")
    assert "; 2 cases, 2 seeds); runner-up source_only: difference 0.240 (95 % CI " in said
    assert "No tests: 6 test cases are required, found 2 cases" in said
    assert "supervised" not in said and "p = " not in said.split("No tests")[0]
    one = verdict(made().query("seed == 0"), "t x-y")
    assert one.endswith(
        "; 2 cases, 1 seed: for this training only; --seeds 3 covers new trainings)."
    )
    assert verdict(made().query("case == 'a'"), "t x-y").endswith(" (one case, no CI).")
    lone = verdict(made().query("entry == 'mine'"), "t x-y")
    assert "mine has a mean Dice of 0.450" in lone and lone.endswith("2 seeds).")
    assert verdict(made().query("entry == 'supervised'"), "t x-y") == (
        "t x-y: no entries besides supervised."
    )


def test_the_verdict_states_significance() -> None:
    cases = "abcdefgh"
    clear = made(cases, {"a": [0.7, 0.71, 0.7], "b": [0.4, 0.4, 0.41], "c": [0.2, 0.2, 0.2]})
    assert "), significant, p < 0.001 (Holm, 3 pairs)." in verdict(clear, "t x-y")
    open_ = made(cases, {"a": [0.7, 0.2, 0.7], "b": [0.4, 0.6, 0.4]})
    said = verdict(open_, "t x-y")
    # The numbers are those of the pairs in the CSV.
    found = statistics.pairs(statistics.scores(open_, "t x-y")).iloc[0]
    assert said.endswith(f"), not significant, p = {found['p_holm']:.3f}.")
    ends = f"95 % CI {found['low']:.3f} to {found['high']:.3f})".replace("-", "−")
    assert ends in said


def test_the_files_hold_every_number(tmp_path: Path) -> None:
    files = write(made(), tmp_path / "out")
    assert [f.name for f in files] == [
        f"{name}.csv" for name in ("rows", "table", "intervals", "pairs", "ranking")
    ]
    read = {f.stem: pd.read_csv(f) for f in files}
    assert len(read["rows"]) == 12 and len(read["table"]) == 3 and len(read["pairs"]) == 1
    mine = read["intervals"].set_index("entry").loc["mine"]
    assert mine["mean"] == pytest.approx(0.45) and mine["low"] <= 0.45 <= mine["high"]
    assert list(read["ranking"]["entry"]) == ["mine", "source_only"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="--out"):
        write(made(), tmp_path / "file" / "more")


def test_a_shared_stage_costs_every_run_what_it_cost_the_first() -> None:
    config = RunConfig("glua", "phantom", "mr-ct", Grid(64, 3.5))
    first = {"stage_seconds": {"style": 300.0, "segment": 50.0}, "reused_stages": []}
    second = {"stage_seconds": {"segment": 60.0}, "reused_stages": ["style"]}
    alone = {"stage_seconds": {"train": 20.0}, "reused_stages": []}
    assert costs([(config, second), (config, first), (config, alone)]) == [360, 350, 20]
    other = replace(config, seed=1)  # its style stage was trained by another run
    assert math.isnan(costs([(config, first), (other, second)])[1])
    for change in ({"direction": "ct-mr"}, {"steps": 9}, {"preset": "paper"}):
        assert math.isnan(costs([(config, first), (replace(config, **change), second)])[1])


def test_the_best_entry_is_compared_with_both_bounds() -> None:
    cases = "".join(chr(ord("a") + i) for i in range(8))
    rows = made(cases, {"source_only": [0.2, 0.3], "glua": [0.5, 0.6], "supervised": [0.7, 0.8]})
    text = bounds(rows, "t x-y")
    assert text.startswith("Bounds: source_only 25.0 % (glua: +30.0 points, 95 % CI ")
    assert ", significant, p < 0.001); supervised (privileged) 75.0 % (glua: −20.0 " in text
    assert text.endswith("glua recovers 60 % of the gap between them.")
    # The upper bound is not tested, and a lower bound that no method exceeds is named.
    assert text.count("significant") == 1
    worse = made(cases, {"source_only": [0.5, 0.5], "glua": [0.2, 0.3]})
    text = bounds(worse, "t x-y")
    assert text == "Bound: source_only 50.0 %. No method has a higher mean than source_only."
    assert bounds(made(cases, {"glua": [0.5, 0.6]}), "t x-y") == ""


def test_columns_without_values_are_not_printed() -> None:
    text = as_text(table(made().assign(peak_memory_mib=math.nan)))
    assert "HD95" not in text and "MiB" not in text and "ASSD" in text
    full = as_text(table(made().assign(hd95=5.0)))
    assert "HD95" in full and "MiB" in full
