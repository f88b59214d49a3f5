"""Figures of reports and sweeps with awkward inputs: all texts inside, none overlapping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from drawn import assert_readable, texts_of

from glua_bench.reports import charts, comparison, figures, sweep_charts
from glua_bench.reports import sweep_report as sweeps
from glua_bench.reports.report import Options, write
from glua_bench.reports.results import from_rows
from glua_bench.task import Structure

LONG = "a_method_whose_authors_gave_it_a_name_of_sixty_characters_%02d"
assert len(LONG % 1) == 60


SELECTORS = ("last", "im", "oracle")


def with_gaps(rng: np.random.Generator) -> float:
    """Return a Dice that is nan once in a while."""
    value = float(rng.uniform(0.2, 0.9))
    return math.nan if value < 0.3 else value


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Check every figure instead of writing it; return their names."""
    names: list[str] = []

    def check(figure: Any, path: Path, *arguments: Any, **options: Any) -> list[Path]:
        assert_readable(figure, path.stem)
        names.append(path.stem)
        written = [path.with_suffix(suffix) for suffix in figures.FORMATS]
        for file in written:
            file.write_text('<svg width="1pt" height="1pt"></svg>')
        return written

    monkeypatch.setattr(figures, "save", check)
    monkeypatch.setattr(charts, "save", check)
    yield names


def made(
    entries: list[str],
    seeds: int = 2,
    cases: int = 3,
    directions: tuple[str, ...] = ("mr-ct",),
    dice: Callable[[np.random.Generator], float] = lambda rng: rng.uniform(0.2, 0.9),
    structures: tuple[str, ...] = ("MYO", "LAC"),
    case: str = "case_%d",
) -> pd.DataFrame:
    """Return rows as in rows.parquet."""
    rng = np.random.default_rng(0)
    rows = []
    for direction, entry, seed in itertools.product(directions, entries, range(seeds)):
        cost = float(rng.uniform(30, 60))
        for selector, number, structure in itertools.product(SELECTORS, range(cases), structures):
            value = dice(rng)
            rows.append(
                {
                    "run": f"{entry}{direction}{seed}",
                    "case": case % number,
                    "structure": structure,
                    "dice": value,
                    "assd": 10 * (1 - value),
                    "hd95": 20 * (1 - value),
                    "missed": False,
                    "reference_ml": 100.0 + number,
                    "prediction_ml": 100.0,
                    "selector": selector,
                    "step": 500,
                    "method": entry,
                    "dataset": "phantom",
                    "direction": direction,
                    "scenario": "supervised" if entry == "supervised" else "uda",
                    "seed": seed,
                    "entry": entry,
                    "task": f"phantom {direction}",
                    "perturbation": 0,
                    "seconds": cost,
                    "peak_memory_mib": 900.0,
                }
            )
    return pd.DataFrame(rows)


MANY = ["source_only", *(f"m{i}" for i in range(28)), "supervised"]
NAMES = ["source_only", *(LONG % i for i in range(6)), "supervised"]
REPORTS: dict[str, dict[str, Any]] = {
    "one entry": {"entries": ["glua"]},
    "30 entries": {"entries": MANY, "seeds": 2, "cases": 2, "structures": ("MYO",)},
    "long names": {
        "entries": NAMES,
        "directions": ("a_domain_with_a_long_name-another_domain", "mr-ct"),
        "structures": ("MYO", "a_structure_with_a_name_of_many_letters"),
        "case": "an_institution_and_its_scanner_and_a_patient_of_theirs_%08d",
    },
    "equal": {"entries": ["source_only", "a", "b", "c", "supervised"], "dice": lambda rng: 0.5},
    "nan": {"entries": ["source_only", "a", "b", "supervised"], "dice": with_gaps},
    "one seed, one case": {"entries": ["source_only", "a", "supervised"], "seeds": 1, "cases": 1},
    "40 cases": {"entries": ["a", "b"], "cases": 40, "structures": ("MYO",), "seeds": 1},
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_chart_of_a_report_is_readable(name: str, drawn: list[str], tmp_path: Path) -> None:
    made(**REPORTS[name]).to_parquet(tmp_path / "rows.parquet")
    write(from_rows(tmp_path / "rows.parquet"), tmp_path / "report", Options(pictures=False))
    assert {"cost_quality", "selector_regret"} <= set(drawn)
    assert sum(stem.startswith("scores") for stem in drawn) == len(
        REPORTS[name].get("directions", ("mr-ct",))
    )


def points(tasks: tuple[str, ...], seeds: int, values: tuple[float, ...]) -> pd.DataFrame:
    """Return points of a curve, as `report_tables.curves` does."""
    grid = itertools.product(tasks, values, range(seeds))
    rows = [
        {
            "task": task,
            "entry": str(value),
            "value": value,
            "seed": seed,
            "dice": 0.5 + 0.01 * seed + 0.1 * value / max(values),
            "changed": value != values[0],
        }
        for task, value, seed in grid
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("seeds", "values", "controls"),
    [
        (1, (0.1, 0.3, 0.5), 8),
        (3, (0.1, 0.3, 0.5), 8),
        (3, (1e-5, 1e-4, 1.0), 0),
        (1, (0.05,) * 3, 0),
    ],
)
def test_curves_are_readable(seeds: int, values: tuple[float, ...], controls: int) -> None:
    tasks = ("phantom mr-ct", "a_data_set_with_a_long_name ct-mr")
    given = points(tasks, seeds, values)
    levels = {
        (LONG % i): pd.DataFrame(
            {"task": task, "seed": range(seeds), "dice": 0.5 + 0.01 * np.arange(seeds)}
        )
        for i in range(controls)
        for task in tasks[1:]
    }
    figure = charts.curve(given, "lambda_of_the_loss_with_a_name_of_many_letters", levels)
    assert_readable(figure)
    said = {text for text, _ in texts_of(figure)}
    assert ("mean over seeds" in said) == (seeds > 1) and ("one seed" in said) == (seeds == 1)
    # Levels of variants are lines above all points, and their spreads do not hide each other.
    lines = [line for line in figure.axes[0].lines if line.get_zorder() == 4]
    assert len(lines) == controls
    bars = figure.axes[0].containers
    assert len(bars) == (controls if seeds > 1 else 0)
    places = {round(float(bar.lines[0].get_xdata()[0]), 6) for bar in bars}
    assert len(places) == len(bars) and all(place > 1 for place in places)


@pytest.mark.parametrize(("count", "names"), [(1, "m%02d"), (9, "m%02d"), (5, LONG)])
def test_learning_curves_are_readable(count: int, names: str) -> None:
    entries = [names % i for i in range(count)]
    selectors = ("last", "source_val", "a_selector_with_a_name_of_many_letters", "oracle")
    grid = itertools.product(entries, range(1), selectors, range(1000, 11000, 1000))
    columns = ["entry", "seed", "selector", "step"]
    scores = pd.DataFrame(list(grid), columns=columns).assign(score=0.5)
    chosen = scores[scores["step"] == 3000]
    assert_readable(charts.learning(scores, chosen, entries, charts.Palette(entries)))


def test_labels_stand_at_their_points() -> None:
    """Labels of `cost_quality` are near their points; a line leads to those that are not."""
    index = pd.MultiIndex.from_product([["phantom mr-ct"], MANY], names=["task", "entry"])
    rng = np.random.default_rng(1)
    lines = pd.DataFrame(
        {
            "training s": rng.uniform(40, 60, len(MANY)),
            "Dice": rng.uniform(0.4, 0.5, len(MANY)),
            "peak MiB": 900.0,
        },
        index,
    )
    figure = charts.cost_quality(lines, charts.Palette(MANY))
    assert_readable(figure)
    axes = figure.axes[0]
    labels = {t.get_text(): t for t in axes.texts}
    assert len(labels) == len(MANY) and all(t.get_visible() for t in labels.values())
    leaders = {tuple(np.round(line.get_xydata()[0], 9)) for line in axes.lines}
    for entry, row in lines.loc["phantom mr-ct"].iterrows():
        label = labels[comparison.title(str(entry))]
        at = axes.transData.transform((row["training s"], row["Dice"]))
        box = label.get_window_extent()
        near = np.clip(at, [box.x0, box.y0], [box.x1, box.y1])
        far = np.hypot(*(near - at)) > 16 * figure.dpi / 72
        assert far == (tuple(np.round([row["training s"], row["Dice"]], 9)) in leaders), entry
    inside = axes.get_window_extent()
    for label in labels.values():
        box = label.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, label
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, label


def test_texts_on_colours_have_contrast() -> None:
    def luminance(colour: Any) -> float:
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in matplotlib.colors.to_rgb(colour)
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in [*matplotlib.colormaps["viridis"](np.linspace(0, 1, 64)), *charts.COLOURS]:
        light, dark = sorted((luminance(colour), luminance(charts.on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


# -- sweeps ---------------------------------------------------------------------------------------

COUNT = 12
SPREAD = [0.1 + 0.05 * i for i in range(COUNT)]
TRIED = [float(v) for v in 10 ** np.linspace(-5, 0, COUNT)]
SWEEPS: dict[str, dict[str, Any]] = {
    "one trial": {"settings": {"lr": [0.1]}, "quality": [0.5]},
    "equal": {"settings": {"lr": SPREAD}, "quality": [0.5] * COUNT},
    "one number": {
        "settings": {"mask_ratio": SPREAD},
        "quality": SPREAD,
        "dice": [[v, v + 0.02] for v in SPREAD],
        "directions": ("mr-ct", "ct-mr"),
    },
    "long names": {
        "settings": {
            "a_setting_with_a_name_of_many_letters_for_a_loss": TRIED,
            "narrow": [0.2 + 0.001 * i for i in range(COUNT)],
            "word": [f"a_choice_with_a_long_name_{i}" for i in range(COUNT)],
            "big": [100000.0 * (i + 1) for i in range(COUNT)],
            "truth": [i % 2 == 0 for i in range(COUNT)],
        },
        "scales": {
            "a_setting_with_a_name_of_many_letters_for_a_loss": True,
            "narrow": False,
            "word": None,
            "big": True,
            "truth": None,
        },
        "quality": [float(v) for v in np.random.default_rng(0).uniform(0, 1, COUNT)],
        "costs": [10.0 + 0.1 * i for i in range(COUNT)],
        "states": ["done"] * 9 + ["pruned", "failed", "done"],
        "seen": [(i, step, 0.1 * i) for i in range(COUNT) for step in range(3)],
        "importances": {"narrow": 0.6, "a_setting_with_a_name_of_many_letters_for_a_loss": 0.4},
        "objective": "an_objective_with_a_name_of_many_letters",
    },
    "unfinished": {"settings": {"lr": [0.1, 0.2]}, "quality": [0.1, 0.2], "states": ["failed"] * 2},
    "oracle": {"settings": {"lr": SPREAD}, "quality": SPREAD, "objective": "oracle"},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_chart_of_a_sweep_is_readable(
    name: str, made_sweep: Callable[..., Any], drawn: list[str], tmp_path: Path
) -> None:
    sweeps.write(made_sweep(**SWEEPS[name]), tmp_path / "report")
    assert {"history", "time_line"} <= set(drawn)


def test_bands_of_two_directions_differ(made_sweep: Callable[..., Any]) -> None:
    sweep = made_sweep(**SWEEPS["one number"])
    given = sweep.runs.assign(value=[SPREAD[trial] for trial in sweep.runs["trial"]])
    figure = sweep_charts.curve(given, "mask_ratio", False, "im", dice=True)
    for axes in figure.axes:
        first, second = (band for band in axes.collections if band.get_alpha() == 0.15)
        assert np.abs(first.get_facecolor()[0] - second.get_facecolor()[0]).max() > 0.2
        assert (first.get_hatch(), second.get_hatch()) == (None, "////")


# -- slices ---------------------------------------------------------------------------------------

STRUCTURES = (
    Structure("MYO", "myocardium", (1,), "#00b000"),
    Structure(
        "long", "a structure with a title of many letters, as some atlases have", (2,), "#0060ff"
    ),
)
FRAME = figures.Frame(224.0, ("S", "LA", "I", "RP"))
IMAGE = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


@pytest.mark.parametrize(("count", "entries"), [(1, ["glua"]), (3, [LONG % i for i in range(3)])])
def test_figures_of_slices_are_readable(
    count: int, entries: list[str], drawn: list[str], tmp_path: Path
) -> None:
    label = (IMAGE > 0).astype(np.uint8)
    predictions, dice = dict.fromkeys(entries, label), dict.fromkeys(entries, 0.5)
    name = "an_institution_and_its_scanner_and_a_patient_of_theirs_001"
    panel = figures.Panel(IMAGE, label, predictions, dice, name, "median", FRAME)
    title = f"{LONG % 0} on a_dataset_of_many_letters ct-mr, seed 0, privileged"
    publishable = count == 1
    figures.case_grid(tmp_path / "a.png", [panel] * count, STRUCTURES, title, publishable)
    shown = [(IMAGE, label, f"{name} (train), slice 1/100", FRAME)] * 3 * count
    ml = [[5.0] * count, [1000000.0] * count]
    figures.domain_montage(tmp_path / "b.png", title, shown, STRUCTURES, publishable, 6, ml)
    gap = pd.DataFrame({"source": [0.1, 0.5], "target": [0.9, 0.5]}, index=[1, 100000])
    rows = {"source": [IMAGE] * count, "gain_of_a_long_name": [IMAGE] * count}
    stacks = {key: np.stack(pictures) for key, pictures in rows.items()}
    figures.strip(tmp_path / "c.png", stacks, title, publishable, {"source": FRAME}, gap)
    assert drawn == ["a", "b", "c"]


def test_vector_files_hold_text_as_text(tmp_path: Path) -> None:
    """PDFs embed TrueType fonts, which journals ask for; SVGs keep the letters."""
    panel = figures.Panel(IMAGE, IMAGE > 0, {}, {}, "case_1", frame=FRAME)
    png = figures.case_grid(tmp_path / "cases.png", [panel], STRUCTURES)
    pdf = png.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and b"/FontFile2" in pdf
    svg = png.with_suffix(".svg").read_text()
    assert all(f">{text}</text>" in svg for text in ("case_1", "50 mm", "RP"))
