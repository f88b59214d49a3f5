"""reports/figures.py: what is drawn, in which colour, and the stamp on patients' images."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

from glua_bench.reports import figures
from glua_bench.reports.figures import Panel, case_grid, domain_montage, strip
from glua_bench.task import Structure

# Far from gray, from each other and from the stamp's red.
STRUCTURES = (
    Structure("MYO", "myocardium", (1,), "#00b000"),
    Structure("LVC", "left ventricular cavity", (2,), "#0060ff"),
)
GREEN, BLUE, RED = "#00b000", "#0060ff", figures.WARNING


def drawn(path: Path) -> np.ndarray:
    """Load a PNG as (H, W, 3) in [0, 1]."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(matplotlib.image.imread(path))[:, :, :3]


def pixels(path: Path, color: str, tolerance: float = 0.12) -> int:
    """Count the pixels close to a colour."""
    wanted = np.array(matplotlib.colors.to_rgb(color))
    return int((np.abs(drawn(path) - wanted).max(-1) < tolerance).sum())


def discs(shift: int = 0, size: int = 48) -> np.ndarray:
    y, x = np.indices((size, size))
    distance = np.hypot(y - size / 2, x - size / 2 - shift)
    return (distance < 16).astype(np.uint8) + (distance < 8).astype(np.uint8)


def image(size: int = 48) -> np.ndarray:
    return np.linspace(-1, 1, size * size, dtype=np.float32).reshape(size, size)


def panel(prediction: np.ndarray, reference: np.ndarray | None = None) -> Panel:
    reference = discs() if reference is None else reference
    return Panel(image(), reference, {"glua": prediction}, {"glua": 0.5}, "ct_1")


def montage(path: Path, **named: Any) -> Path:
    slices = [(image(), discs(), f"case {i}", None) for i in range(3)]
    return domain_montage(path, "a domain", slices, STRUCTURES, **named)


def stack(count: int = 3, size: int = 48) -> np.ndarray:
    return np.stack([image(size)] * count)


DRAWINGS: dict[str, Callable[..., Path]] = {
    "cases": lambda path, **named: case_grid(
        path, [panel(discs(3)), panel(discs())], STRUCTURES, "title", **named
    ),
    "pictures": lambda path, **named: strip(
        path, {"source": stack(), "gap": np.full((3, 12, 12), 0.5)}, **named
    ),
    "domain": montage,
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_a_readable_png_stamped_for_patients_only(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.png"
    assert DRAWINGS[name](path, publishable=True) == path
    height, width, _ = drawn(path).shape
    assert 300 <= height <= 3000 and 300 <= width <= 3000
    assert drawn(path).std() > 0.05  # not an empty page
    assert {p.name for p in path.parent.iterdir()} == {"figure.png", "figure.svg", "figure.pdf"}
    kept = DRAWINGS[name](tmp_path / "kept.png", publishable=False)
    assert pixels(kept, RED, 0.25) >= pixels(path, RED, 0.25) + 30


HOSTILE = ("$x^$", r"cost in $, $\frac{$", r"\$_{^%$#&~$a$b")


@pytest.mark.fault("hostile text", "names that Matplotlib reads as formulas, in figures of cases")
@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_no_formulas(text: str, tmp_path: Path) -> None:
    structures = (Structure("A", text, (1,), GREEN), Structure(text, "b", (2,), BLUE))
    shown = Panel(image(), discs(), {text: discs(3)}, {text: 0.5}, text)
    path = case_grid(tmp_path / "cases.png", [shown], structures, text, publishable=True)
    assert html.escape(text) in path.with_suffix(".svg").read_text(encoding="utf-8")
    slices = [(image(), discs(), text, None)]
    volumes = ([1.0, 2.0], [3.0])
    domain_montage(tmp_path / "domain.png", text, slices, structures, volumes=volumes)
    strip(tmp_path / "strip.png", {text: stack()}, publishable=True)


def test_the_layout_of_a_figure_is_solved_once_for_all_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[object] = []
    original = ConstrainedLayoutEngine.execute
    monkeypatch.setattr(
        ConstrainedLayoutEngine, "execute", lambda *given: solved.append(0) or original(*given)
    )
    strip(tmp_path / "strip.png", {"source": np.zeros((2, 8, 8))}, "A title")
    assert len(solved) == 1 and len(list(tmp_path.iterdir())) == 3


def test_contours_have_the_structures_colours(tmp_path: Path) -> None:
    both = case_grid(tmp_path / "a.png", [panel(discs())], STRUCTURES)
    assert pixels(both, GREEN) > 200 and pixels(both, BLUE) > 100
    missed = np.where(discs() == 2, 0, discs())
    without = case_grid(tmp_path / "b.png", [panel(missed)], STRUCTURES)
    assert pixels(without, BLUE) < pixels(both, BLUE) - 50
    empty = np.zeros_like(discs())
    nothing = case_grid(tmp_path / "c.png", [panel(empty, empty)], STRUCTURES)
    # Only the legend's line is left.
    assert 0 < pixels(nothing, GREEN) < pixels(without, GREEN) / 2


def test_a_deviation_from_the_reference_shows(tmp_path: Path) -> None:
    same = drawn(case_grid(tmp_path / "a.png", [panel(discs())], STRUCTURES))
    moved = drawn(case_grid(tmp_path / "b.png", [panel(discs(8))], STRUCTURES))
    assert same.shape == moved.shape
    changed = np.abs(same - moved).max(-1) > 0.2
    # Image and reference are the same; the prediction's row is the last.
    assert not changed[: len(changed) // 2].any() and changed.sum() > 100


def test_a_structure_at_the_border_has_a_whole_outline(tmp_path: Path) -> None:
    full = np.ones((48, 48), np.uint8)
    path = case_grid(tmp_path / "a.png", [panel(full, full)], STRUCTURES)
    none = case_grid(tmp_path / "b.png", [panel(full * 0, full * 0)], STRUCTURES)
    assert pixels(path, GREEN) > pixels(none, GREEN) + 300


def test_volumes_of_structures_are_dots_in_their_colours(tmp_path: Path) -> None:
    """More volumes draw more marks, in the chart at the bottom right."""
    none = montage(tmp_path / "none.png")
    few = montage(tmp_path / "few.png", volumes=[[100.0], [50.0]])
    many = montage(tmp_path / "many.png", volumes=[[100.0], [20.0, 50.0, 80.0, 140.0]])
    assert pixels(few, GREEN) == pytest.approx(pixels(many, GREEN), rel=0.02)
    assert pixels(many, BLUE) > pixels(few, BLUE) + 30
    corner = np.s_[-drawn(many).shape[0] // 3 : -60, 2 * drawn(many).shape[1] // 3 :]
    blue = np.abs(drawn(many) - np.array(matplotlib.colors.to_rgb(BLUE))).max(-1) < 0.12
    assert blue[corner].sum() > 60
    assert none.is_file()


def test_a_missing_picture_leaves_its_place_empty(tmp_path: Path) -> None:
    rows = {"source": stack(4), "restyled": stack(2)}
    assert strip(tmp_path / "a.png", rows).is_file()


@pytest.mark.parametrize("rows", [{}, {"source": np.zeros((3, 3))}])
def test_rows_that_are_no_pictures_are_refused(rows: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows"):
        strip(tmp_path / "a.png", rows)
    assert list(tmp_path.iterdir()) == []


def test_maps_are_in_colour_and_images_are_not(tmp_path: Path) -> None:
    def colourful(path: Path) -> int:
        found = drawn(path)
        return int((found.max(-1) - found.min(-1) > 0.2).sum())

    for image in ("fake", "source again", "masked"):  # "again" and "masked" hold words of maps
        gray = strip(tmp_path / "a.png", {"source": stack(), image: (stack() + 1) / 2})
        assert colourful(gray) == 0, image
    for map_ in ("gap", "gain minus 1", "target_mask", "D (target)", "entropy"):
        color = strip(tmp_path / "b.png", {"source": stack(), map_: (stack() + 1) / 2})
        assert colourful(color) > 5000, map_


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = montage(tmp_path / "a.png")
    before, files = path.read_bytes(), sorted(tmp_path.iterdir())

    def broken(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(figures.Figure, "savefig", broken)
    with pytest.raises(RuntimeError):
        montage(path)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == files
