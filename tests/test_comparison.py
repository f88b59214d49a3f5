"""reports/comparison.py: the table, the sentence, and the files, from rows made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from glua_bench.config import RunConfig
from glua_bench.errors import ConfigError
from glua_bench.reports.comparison import as_metrics, as_text, costs, table, verdict, write
from glua_bench.task import Grid


def made() -> pd.DataFrame:
    """Two seeds, two cases, a lower and an upper bound, and an entry between them."""
    rows = []
    for entry, seed, dice in [
        ("source_only", 0, 0.2),
        ("source_only", 1, 0.4),
        ("supervised", 0, 0.8),
        ("supervised", 1, 0.8),
        ("mine", 0, 0.5),
        ("mine", 1, 0.4),
    ]:
        for case, shift in (("a", -0.1), ("b", 0.1)):
            rows.append((entry, "t x-y", seed, case, "s", dice + shift, 3.0, case == "a", 10, 50.0))
    columns = ["entry", "task", "seed", "case", "structure", "dice", "assd", "missed", "step"]
    frame = pd.DataFrame(rows, columns=[*columns, "seconds"])
    return frame.assign(selector="last", peak_memory_mib=7.0)


def test_the_table_is_of_seeds_and_pairs_the_gap_by_seed() -> None:
    frame = made()
    other = frame.assign(selector="source_val", dice=0.0)
    lines = table(pd.concat([frame, other]))
    mine = lines.loc["t x-y", "mine"]
    assert mine["Dice"] == pytest.approx(0.45) and mine["sd"] == pytest.approx(0.0707, abs=1e-3)
    assert mine["gap recovered"] == pytest.approx(0.25)  # 50 % and 0 %
    assert (mine["gap min"], mine["gap max"]) == pytest.approx((0, 0.5))
    assert mine["missed"] == 2 and mine["s a step"] == pytest.approx(5.0)
    text = as_text(lines)
    assert "0.450 ± 0.071" in text and "25 % (0 to 50)" in text and "One seed" not in text
    assert "supervised (privileged)  " in text

    lone = table(frame[(frame["entry"] == "mine") & (frame["seed"] == 0)])
    assert lone["gap recovered"].isna().all()
    assert "One seed has no standard deviation" in as_text(lone) and "±  " not in as_text(lone)


def test_the_numbers_have_names_that_a_tracker_takes() -> None:
    numbers = as_metrics(table(made().replace("mine", "mine + masked (ours)")))
    assert len(numbers) == 12
    assert numbers["x-y/dice/mine masked ours"] == pytest.approx(0.45)
    assert numbers["x-y/dice_sd/mine masked ours"] == pytest.approx(0.0707, abs=1e-3)
    assert numbers["x-y/assd_mm/source_only"] == pytest.approx(3.0)
    assert numbers["x-y/gap_recovered/mine masked ours"] == pytest.approx(0.25)


@pytest.mark.parametrize("more", ["", "x" * 300])
def test_entries_whose_names_are_alike_to_a_tracker_stay_apart(more: str) -> None:
    rows = made().replace({"mine": f"mine {more}(a)", "source_only": f"mine {more}[a]"})
    numbers = as_metrics(table(rows))
    dice = {name.split("/")[2]: v for name, v in numbers.items() if "/dice/" in name}
    assert len(numbers) == 12 and sorted(dice.values()) == pytest.approx([0.3, 0.45, 0.8])
    for name in dice:
        assert {f"x-y/{what}/{name}" for what in ("dice_sd", "assd_mm", "gap_recovered")} <= set(
            numbers
        )


def test_the_sentence_names_the_best_that_saw_no_target_label() -> None:
    said = verdict(made(), "t x-y")
    assert said.startswith("t x-y: mine has the highest mean Dice, 0.450 (95 % interval ")
    assert "over 2 cases and 2 seeds" in said and "the next, source_only, is 0.150 lower" in said
    assert "supervised" not in said
    one = made().query("seed == 0")
    assert verdict(one, "t x-y").endswith("with one seed; intervals need more (--seeds 3).")
    assert verdict(made().query("case == 'a'"), "t x-y").endswith(
        "on one case; intervals need more."
    )
    lone = made().query("entry == 'mine'")
    assert verdict(lone, "t x-y").endswith("2 seeds).")


def test_the_files_hold_every_number(tmp_path: Path) -> None:
    files = write(made(), tmp_path / "out")
    assert [f.name for f in files] == [
        f"{name}.csv" for name in ("rows", "table", "intervals", "pairs", "ranking")
    ]
    read = {f.stem: pd.read_csv(f) for f in files}
    assert len(read["rows"]) == 12 and len(read["table"]) == 3 and len(read["pairs"]) == 3
    mine = read["intervals"].set_index("entry").loc["mine"]
    assert mine["mean"] == pytest.approx(0.45) and mine["low"] <= 0.45 <= mine["high"]
    assert list(read["ranking"]["entry"]) == ["supervised", "mine", "source_only"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        write(made(), tmp_path / "file" / "more")


def test_a_shared_stage_costs_every_run_what_it_cost_the_first() -> None:
    config = RunConfig("glua", "phantom", "mr-ct", Grid(64, 3.5))
    first = {"stage_seconds": {"style": 300.0, "segment": 50.0}, "reused_stages": []}
    second = {"stage_seconds": {"segment": 60.0}, "reused_stages": ["style"]}
    alone = {"stage_seconds": {"train": 20.0}, "reused_stages": []}
    assert costs([(config, second), (config, first), (config, alone)]) == [360, 350, 20]
    other = replace(config, seed=1)  # its style was trained by a run that is not here
    assert math.isnan(costs([(config, first), (other, second)])[1])
    for change in ({"direction": "ct-mr"}, {"steps": 9}, {"preset": "paper"}):
        assert math.isnan(costs([(config, first), (replace(config, **change), second)])[1])
