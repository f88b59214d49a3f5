"""Draw the pictures of the pages from runs on the phantom.

    glua-bench compare --methods glua,slaug --dataset phantom --seeds 1 --preset quick
    python benchmarks/picture.py runs docs/figures/adaptation.png
    python benchmarks/picture.py runs docs/figures/methods

The first is the README's: source, target, and what methods predict. The target case is the median
of the test cases by mean Dice over the entries; the source case is the first of the training cases.

The second are those of the methods' pages: the figures `strip` and `cases` of the run of each
method from MR to CT with seed 0 and unchanged settings, with fewer pixels and colours. Of runs
with different budgets, the longest is taken.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from glua_bench.data.cache import SliceCache
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.registry import Registry
from glua_bench.reports.case_pictures import compared_cases
from glua_bench.reports.figures import INK, legend_below, new_figure, save
from glua_bench.reports.results import from_runs
from glua_bench.reports.run_figures import most_visible_slice

TASK = "phantom mr-ct"
WIDTHS = {"strip": 700, "cases": 800}  # pixels of the pictures of methods
SHOWN = {"source_only": "no adaptation", "slaug": "SLAug", "glua": "GLUA"}


def of_methods(runs: Path, folder: Path) -> None:
    """Write `NAME_strip.png`, if the method has pictures, and `NAME_cases.png`.

    Their entry `preset` says how the run was trained.
    """
    longest: dict[str, RunDirectory] = {}
    for run in list_runs(runs):
        config = run.config
        plain = config.scenario == "uda" and config.augmentation == "geometric"
        ours = config.dataset == "phantom" and config.direction == "mr-ct" and config.seed == 0
        if run.done and plain and ours and not run.read_environment()["changed"]:
            known = longest.setdefault(config.method, run)
            longest[config.method] = max(known, run, key=lambda each: each.config.steps)
    folder.mkdir(parents=True, exist_ok=True)
    for method, run in longest.items():
        for name, width in WIDTHS.items():
            if (drawn := run.figures / f"{name}.png").is_file():
                picture = Image.open(drawn).convert("RGB")
                picture.thumbnail((width, 10 * width))
                few = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
                facts = PngInfo()
                facts.add_text("preset", run.config.preset)
                few.save(folder / f"{method}_{name}.png", optimize=True, pnginfo=facts)


def main(runs: Path, out: Path) -> None:
    """Draw one row of panels."""
    results = from_runs(runs, where={"dataset": ["phantom"]})
    dataset = Registry("dataset").load("phantom")()
    (case,) = [c for c in compared_cases(results, TASK, dataset) if c.note == "median"]
    z = most_visible_slice(case.reference)
    grid = next(iter(results.directories.values())).config.grid
    source, view = dataset.split("mr", "train")[0], dataset.view("mr").on(grid)
    cache = SliceCache()
    image = cache.image(source.unlabelled(), view).open()
    label = np.asarray(cache.label(source, view).open())
    first = most_visible_slice(label)
    panels = [
        ("source\nMR", image[first], label[first]),
        ("target\nCT", case.image[z], np.zeros_like(case.reference[z])),
        *(
            (f"{title}\nDice {case.dice[entry]:.2f}", case.image[z], case.predictions[entry][z])
            for entry, title in SHOWN.items()
        ),
        ("reference\n", case.image[z], case.reference[z]),
    ]
    figure = new_figure(1.5 * len(panels), 2.35)
    figure.get_layout_engine().set(h_pad=0.06)
    for axes, (title, picture, mask) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(np.asarray(picture, dtype=np.float32), cmap="gray", vmin=-1, vmax=1)
        for index, structure in enumerate(dataset.structures, start=1):
            if (mask == index).any():
                axes.contour(mask == index, [0.5], colors=structure.color, linewidths=1.4)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    keys = [Line2D([], [], color=s.color, lw=2, label=s.title) for s in dataset.structures]
    legend_below(figure, keys)
    save(figure, out, dpi=180)


if __name__ == "__main__":
    given, target = Path(sys.argv[1]), Path(sys.argv[2])
    (main if target.suffix else of_methods)(given, target)
