"""The checks of a dataset."""

from __future__ import annotations

import ast
import inspect
import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glua_bench.config import PRESETS
from glua_bench.conformance.results import DATASET_CHECKS, CheckFailure, demand, register
from glua_bench.data.cache import SliceCache
from glua_bench.data.formats import open_volume
from glua_bench.data.volumes import read_label_volume
from glua_bench.errors import DataError
from glua_bench.method import Method
from glua_bench.registry import describe_class
from glua_bench.task import SPLITS, Dataset, Reading, Structure

_SOURCE = re.compile(
    r"arxiv|doi|https?://|et al|\b(19|20)\d\d\b|baseline|reconstruction|original|lower bound", re.I
)


def check_card(plugin: type, base: type) -> None:
    """Fail the check where the card of a method or dataset is incomplete."""
    literals = _literals(plugin)
    for name in ("name", "reference", "needs"):
        value = getattr(plugin, name, None)
        demand(
            isinstance(value, str) and bool(value.strip()) and "\n" not in value,
            f"the class attribute `{name}` is {value!r}; give it one line of text",
        )
        demand(
            literals is None or name in literals,
            f"`{name}` must stand as a plain text in the class itself, because "
            "`glua-bench list` reads it without importing the plugin",
        )
    demand(
        re.fullmatch(r"[a-z][a-z0-9_]*", plugin.name) is not None,  # type: ignore[attr-defined]
        f"the name {plugin.name!r} must be lower-case letters, digits and _",  # type: ignore[attr-defined]
    )
    text = plugin.__doc__ or ""
    demand(
        bool(text.strip()) and text != base.__doc__, "the class has no docstring: it is the card"
    )
    lines = inspect.cleandoc(text).splitlines()
    demand(
        lines[0].endswith(".") and len(lines[0]) <= 100 and (len(lines) == 1 or not lines[1]),
        "the docstring must begin with one line of at most 100 characters that ends in a period, "
        "and then an empty line",
    )
    if base is Method:
        demand(
            _SOURCE.search(text + plugin.reference) is not None,  # type: ignore[attr-defined]
            "neither the docstring nor `reference` says where the method comes from; cite a paper "
            "(authors and year, arXiv or doi), or say baseline, reconstruction or original",
        )


def _literals(plugin: type) -> set[str] | None:
    """Names of the plain class attributes in the source; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plugin)))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    return set(describe_class(node)[1]) if isinstance(node, ast.ClassDef) else set()


@register(DATASET_CHECKS)
def _dataset_card(dataset: Dataset) -> None:
    """Name, reference, needs and a docstring, readable without an import."""
    check_card(type(dataset), Dataset)


@register(DATASET_CHECKS)
def _dataset_structures(dataset: Dataset) -> None:
    """Structures have names, values and colours of their own."""
    demand(bool(dataset.structures), "the dataset has no structures")
    for domain in dataset.domains():
        view = dataset.view(domain)
        _check_structures(view.structures, view.reading)
        same = [
            [(s.name, s.title, s.color) for s in structures]
            for structures in (dataset.structures, view.structures)
        ]
        demand(same[0] == same[1], f"domain '{domain}' has other structures than the dataset")


def _check_structures(structures: Sequence[Structure], reading: Reading) -> None:
    demand(
        all(re.fullmatch(r"#[0-9a-fA-F]{6}", s.color) for s in structures),
        "a colour is not of the form #rrggbb",
    )
    demand(all(s.values for s in structures), "a structure has no values")
    for what, values in (
        ("name", [s.name for s in structures]),
        ("title", [s.title for s in structures]),
        ("colour", [s.color.lower() for s in structures]),
        (
            "label value (ignored and unannotated ones and 0 for background included)",
            [v for s in structures for v in s.values]
            + [*reading.ignored_values, *reading.unannotated_values, 0],
        ),
    ):
        twice = [value for value, count in Counter(values).items() if count > 1]
        demand(not twice, f"the {what} {twice[:1]} occurs twice")


@register(DATASET_CHECKS)
def _dataset_grids(dataset: Dataset) -> None:
    """Every preset has a grid that its segmenter can work on."""
    for preset, values in PRESETS.items():
        grid = dataset.grid(preset)
        factor = 2 ** (values["segmenter"]["depth"] - 1)
        demand(
            grid.size >= 32 and grid.size % factor == 0,
            f"the grid of '{preset}' has the size {grid.size}; give at least 32, and a multiple "
            f"of {factor}",
        )
        demand(
            grid.spacing > 0 and (grid.slice_spacing is None or grid.slice_spacing > 0),
            f"the grid of '{preset}' has no positive spacing",
        )


@register(DATASET_CHECKS)
def _dataset_prepare(dataset: Dataset) -> None:
    """prepare makes the files ready; done again it changes none of them."""
    dataset.prepare()
    before = _snapshot(dataset.root)
    dataset.prepare()
    changed = {path for path, _ in before ^ _snapshot(dataset.root)}
    demand(not changed, f"a second prepare changed {sorted(changed)[:1]}")


def _snapshot(root: Path) -> set[tuple[str, tuple[int, int]]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {(str(path), (path.stat().st_size, path.stat().st_mtime_ns)) for path in files}


@register(DATASET_CHECKS, "prepare")
def _dataset_splits(dataset: Dataset) -> None:
    """Both domains of a direction have cases, each once and in one split, sorted by id."""
    demand(bool(dataset.directions), "the dataset has no direction")
    for direction in dataset.directions:
        parts = direction.split("-")
        demand(
            len(parts) == 2 and parts[0] != parts[1],
            f"the direction '{direction}' is not of the form source-target",
        )
        runs_needs = ((parts[0], "train"), (parts[1], "train"), (parts[1], "test"))
        for domain, split in runs_needs:
            demand(bool(dataset.split(domain, split)), f"'{domain}' has no case in '{split}'")
    ids: list[str] = []
    files: set[tuple[Path, str]] = set()
    for domain in dataset.domains():
        cases = dataset.cases(domain)
        own = [case.id for case in cases]
        demand(own == sorted(own), f"the cases of '{domain}' are not sorted by id")
        for case in cases:
            demand(case.domain == domain, f"case {case.id} of '{domain}' says '{case.domain}'")
            demand(case.split in SPLITS, f"case {case.id} has the split '{case.split}'")
            demand(
                case.label is not None or case.split == "train",
                f"case {case.id} of the split '{case.split}' has no label",
            )
        ids += own
        # One label may serve several sequences of a person.
        files |= {(case.image, case.id) for case in cases}
        files |= {(case.label, case.subject) for case in cases if case.label}
    demand(len(set(ids)) == len(ids), "two cases have the same id")
    demand(len({file for file, _ in files}) == len(files), "two cases share a file")


@register(DATASET_CHECKS, "splits")
def _dataset_subjects(dataset: Dataset) -> None:
    """No subject is in two splits, nor on both sides of a direction."""
    for domain in dataset.domains():
        splits: dict[str, str] = {}
        for case in dataset.cases(domain):
            other = splits.setdefault(case.subject, case.split)
            demand(
                other == case.split,
                f"subject {case.subject} of '{domain}' is in '{other}' and in '{case.split}'",
            )
    for direction in dataset.directions:
        source, target = (
            {case.subject for split in splits for case in dataset.split(domain, split)}
            for domain, splits in zip(
                direction.split("-"), (("train", "val"), ("train", "test")), strict=True
            )
        )
        both = sorted(source & target)
        demand(not both, f"subject {both[:1]} is on both sides of {direction}")


@register(DATASET_CHECKS, "splits")
def _dataset_files(dataset: Dataset) -> None:
    """Image and label of every case have one shape, and only values of the table."""
    for case in (case for domain in dataset.domains() for case in dataset.cases(domain)):
        if case.label is None:
            continue
        image, label = open_volume(case.image), open_volume(case.label)
        demand(
            image.shape == label.shape,
            f"image and label of {case.id} have the shapes {image.shape} and {label.shape}",
        )
        try:
            read_label_volume(case.label, case.image, dataset.view(case.domain))
        except DataError as error:
            raise CheckFailure(f"the label of {case.id} cannot be used: {error}") from error


@register(DATASET_CHECKS, "structures", "files")
def _dataset_slices(dataset: Dataset) -> None:
    """On the working grid images are finite in [-1, 1], and every structure shows."""
    grid = dataset.grid("quick")
    with tempfile.TemporaryDirectory(prefix="glua-bench-conformance-") as folder:
        cache = SliceCache(Path(folder))
        for domain in dataset.domains():
            shown: set[int] = set()
            view = dataset.view(domain).on(grid)
            for case in dataset.split(domain, "train"):
                image = cache.image(case.unlabelled(), view)
                voxels = image.open()
                demand(
                    bool(np.isfinite(voxels).all()) and float(np.abs(voxels).max()) <= 1,
                    f"the image of {case.id} leaves [-1, 1]",
                )
                demand(float(np.ptp(voxels)) > 0, f"the image of {case.id} is empty")
                if case.label is None:
                    continue
                labels = cache.label(case, view)
                shown |= set(np.unique(labels.open()).tolist())
            if not dataset.labelled(domain, "train"):
                continue
            missing = [s.name for i, s in enumerate(dataset.structures, 1) if i not in shown]
            demand(not missing, f"no training case of '{domain}' shows {', '.join(missing)}")
