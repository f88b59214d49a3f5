"""Checks of a dataset, and of the card that datasets and methods have in common."""

from __future__ import annotations

import ast
import inspect
import re
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from glua_bench.config import PRESETS
from glua_bench.conformance.results import DATASET_CHECKS, demand, failing, register
from glua_bench.data.cache import SliceCache
from glua_bench.data.formats import open_volume
from glua_bench.data.volumes import check_same_grid, read_label_volume
from glua_bench.method import Method
from glua_bench.registry import describe_class
from glua_bench.task import SPLITS, Dataset, check_channels, common_channels

_SOURCE = re.compile(
    r"arxiv|doi|https?://|et al|\b(19|20)\d\d\b|baseline|reconstruction|original|lower bound", re.I
)


def check_card(plugin: Any, base: type) -> None:
    """Fail the check if the card of a method or dataset class is incomplete."""
    literals = _literals(plugin)
    for name in ("name", "reference", "needs"):
        value = getattr(plugin, name, None)
        demand(
            isinstance(value, str) and bool(value.strip()) and "\n" not in value,
            f"the class attribute `{name}` is {value!r}; set it to one line of text",
        )
        demand(
            literals is None or name in literals,
            f"`{name}` is not a string literal in the class body; write it there, since "
            "`glua-bench list` reads it without importing the plugin",
        )
    demand(
        re.fullmatch(r"[a-z][a-z0-9_]*", plugin.name) is not None,
        f"the name {plugin.name!r} is invalid; use lower-case letters, digits and _ only, and "
        "start with a letter",
    )
    text = plugin.__doc__ or ""
    demand(
        bool(text.strip()) and text != base.__doc__,
        "the class has no docstring; write one, since `glua-bench list` prints it",
    )
    lines = inspect.cleandoc(text).splitlines()
    demand(
        lines[0].endswith(".") and len(lines[0]) <= 100 and lines[1:2] in ([], [""]),
        "the docstring must start with one line of at most 100 characters that ends with a period "
        "and is followed by an empty line",
    )
    demand(
        base is not Method or _SOURCE.search(text + plugin.reference) is not None,
        "neither the docstring nor `reference` says where the method comes from; cite a paper "
        "(authors and year, arXiv or doi), or write baseline, reconstruction or original",
    )


def _literals(plugin: type) -> set[str] | None:
    """Return the names of class attributes that are literals; None if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plugin)))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    return set(describe_class(node)[1]) if isinstance(node, ast.ClassDef) else set()


@register(DATASET_CHECKS)
def _card(dataset: Dataset) -> None:
    """`name`, `reference`, `needs` are string literals; the docstring starts with a summary."""
    check_card(type(dataset), Dataset)


@register(DATASET_CHECKS)
def _structures(dataset: Dataset) -> None:
    """Names, titles, label values and colours are unique."""
    demand(bool(dataset.structures), "the dataset has no structures; set `structures`")
    shown = [(s.name, s.title, s.color) for s in dataset.structures]
    for name, _, color in shown:
        demand(
            re.fullmatch(r"#[0-9a-fA-F]{6}", color) is not None,
            f"the colour of {name} is {color!r}; write it as #rrggbb",
        )
    for domain in dataset.domains():
        view = dataset.view(domain)
        demand(
            [(s.name, s.title, s.color) for s in view.structures] == shown,
            f"structures_of('{domain}') changes names, titles or colours; change only values",
        )
        for structure in view.structures:
            demand(bool(structure.values), f"{structure.name} has no label values; set `values`")
        values = [value for structure in view.structures for value in structure.values]
        values += [0, *view.reading.ignored_values, *view.reading.unannotated_values]
        for what, found in (
            ("name", [name for name, _, _ in shown]),
            ("title", [title for _, title, _ in shown]),
            ("colour", [color.lower() for _, _, color in shown]),
            ("label value (including 0, ignored and unannotated values)", values),
        ):
            value, count = Counter(found).most_common(1)[0]
            demand(count == 1, f"the {what} {value!r} is used twice; make it unique")


@register(DATASET_CHECKS)
def _grids(dataset: Dataset) -> None:
    """Every preset has a grid whose size the segmenter can halve often enough."""
    for preset, values in PRESETS.items():
        grid = dataset.grid(preset)
        factor = 2 ** (values["segmenter"]["depth"] - 1)
        demand(
            grid.size >= 32 and grid.size % factor == 0,
            f"the grid of preset '{preset}' has size {grid.size}; set a multiple of {factor} that "
            "is at least 32",
        )
        demand(
            grid.spacing > 0 and (grid.slice_spacing is None or grid.slice_spacing > 0),
            f"the grid of preset '{preset}' has a spacing of 0 or less; set a positive one",
        )


@register(DATASET_CHECKS)
def _prepare(dataset: Dataset) -> None:
    """Repeating `prepare` changes no file."""
    dataset.prepare()
    before = _snapshot(dataset.root)
    dataset.prepare()
    changed = sorted({path for path, *_ in before ^ _snapshot(dataset.root)})
    demand(not changed, f"a second prepare changed {changed[:1]}; skip files that exist")


def _snapshot(root: Path) -> set[tuple[str, int, int]]:
    files = ((path, path.stat()) for path in root.rglob("*") if path.is_file())
    return {(str(path), found.st_size, found.st_mtime_ns) for path, found in files}


@register(DATASET_CHECKS, "prepare")
def _splits(dataset: Dataset) -> None:
    """Each case is in one split, sorted by id; directions have the cases that they need."""
    demand(bool(dataset.directions), "the dataset has no direction; set `directions`")
    for direction in dataset.directions:
        source, dash, target = direction.partition("-")
        demand(
            bool(dash) and source != target and "-" not in target,
            f"the direction '{direction}' is invalid; write it as source-target",
        )
        for domain, split in ((source, "train"), (target, "train"), (target, "test")):
            demand(
                bool(dataset.split(domain, split)),
                f"'{domain}' has no case in '{split}', which {direction} needs; add one, or remove "
                "the direction",
            )
    cases = [case for domain in dataset.domains() for case in dataset.cases(domain)]
    for domain in dataset.domains():
        own = dataset.cases(domain)
        ids = [case.id for case in own]
        demand(ids == sorted(ids), f"the cases of '{domain}' are not sorted by id; sort them")
        for case in own:
            demand(
                case.domain == domain,
                f"case {case.id} of '{domain}' has domain '{case.domain}'; set '{domain}'",
            )
            demand(
                case.split in SPLITS,
                f"case {case.id} has split '{case.split}'; use {', '.join(SPLITS)}",
            )
            demand(
                case.label is not None or case.split == "train",
                f"case {case.id} of split '{case.split}' has no label; move it to 'train'",
            )
    # Several sequences of a subject may share one label file.
    files = {(image, case.id) for case in cases for image in case.images}
    files |= {(case.label, case.subject) for case in cases if case.label}
    for what, found in (("id", [case.id for case in cases]), ("file", [file for file, _ in files])):
        value, count = Counter(map(str, found)).most_common(1)[0]
        demand(count == 1, f"two cases have the same {what} {value}; make it unique")


@register(DATASET_CHECKS, "splits")
def _subjects(dataset: Dataset) -> None:
    """No subject is in two splits, or on both sides of a direction."""
    for domain in dataset.domains():
        splits: dict[str, str] = {}
        for case in dataset.cases(domain):
            other = splits.setdefault(case.subject, case.split)
            demand(
                other == case.split,
                f"subject {case.subject} of '{domain}' is in '{other}' and in '{case.split}'; "
                "move all its cases to one split",
            )
    for direction in dataset.directions:
        source, target = (
            {case.subject for case in dataset.cases(domain) if case.split in ("train", split)}
            for domain, split in zip(direction.split("-"), ("val", "test"), strict=True)
        )
        both = sorted(source & target)
        demand(
            not both,
            f"subject {both[:1]} is on both sides of {direction}; give the domains different "
            "subjects, or the cases other splits",
        )


@register(DATASET_CHECKS, "splits")
def _files(dataset: Dataset) -> None:
    """Channels and label have the shape of the image; labels contain only known values."""
    for direction in dataset.directions:
        with failing(f"{direction} cannot be trained"):
            common_channels(dataset, direction)
    for case in (case for domain in dataset.domains() for case in dataset.cases(domain)):
        reading = dataset.view(case.domain).reading
        with failing(f"the channels of {case.id} are invalid"):
            check_channels(case, reading)
            image = open_volume(case.image)
            for channel, path in zip(reading.channels[1:], case.further, strict=False):
                own = channel.name, reading, image.shape, image.affine
                check_same_grid(open_volume(path), *own, case.image)
        if case.label is None:
            continue
        label = open_volume(case.label)
        demand(
            image.shape == label.shape,
            f"image and label of {case.id} differ in shape: {image.shape} and {label.shape}",
        )
        with failing(f"the label of {case.id} is invalid"):
            read_label_volume(case.label, case.image, dataset.view(case.domain))


@register(DATASET_CHECKS, "structures", "files")
def _slices(dataset: Dataset) -> None:
    """On the working grid, images lie in [-1, 1] and training cases show every structure."""
    grid = dataset.grid("quick")
    with tempfile.TemporaryDirectory(prefix="glua-bench-conformance-") as folder:
        cache = SliceCache(Path(folder))
        for domain in dataset.domains():
            shown: set[int] = set()
            view = dataset.view(domain).on(grid)
            for case in dataset.split(domain, "train"):
                for channel in cache.image(case.unlabelled(), view).channels:
                    voxels = channel.open()
                    demand(
                        bool(np.isfinite(voxels).all()) and float(np.abs(voxels).max()) <= 1,
                        f"the image of {case.id} has values outside [-1, 1] on the working grid",
                    )
                    demand(float(np.ptp(voxels)) > 0, f"the image of {case.id} is constant")
                if case.label is not None:
                    shown |= set(np.unique(cache.label(case, view).open()).tolist())
            missing = [s.name for i, s in enumerate(dataset.structures, 1) if i not in shown]
            demand(
                not missing or not dataset.labelled(domain, "train"),
                f"no training case of '{domain}' shows {', '.join(missing)}; check `values` and "
                "the grid",
            )
