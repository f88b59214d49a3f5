"""Reading and checking of a dataset description in YAML (docs/adding-data.md).

Everything is checked before a file of the data is opened, and each error gives the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from glua_bench.config import build_settings
from glua_bench.data.nnunet import nnunet_unannotated, nnunet_values
from glua_bench.datasets.folder.layouts import (
    Found,
    by_nnunet,
    by_pattern,
    by_table,
    pattern_fault,
)
from glua_bench.documents import Table, nearest, read_document
from glua_bench.errors import ConfigError
from glua_bench.paths import composed
from glua_bench.task import Channel, Grid, Reading, Structure

# Okabe and Ito's colour-blind-safe palette.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")
# In RAS+ axis 0 points to the patient's right, axis 1 to the front, axis 2 upwards. Flipped, slices
# show the patient's right on the image's left, and front or head at the top.
PLANES: Mapping[str, Reading] = {
    "axial": Reading(slice_axis=2, row_axis=1, flip=(0, 1)),
    "coronal": Reading(slice_axis=1, row_axis=2, flip=(0, 2)),
    "sagittal": Reading(slice_axis=0, row_axis=2, flip=(1, 2)),
}
SIZES = {"quick": 64, "standard": 128, "paper": 256}  # pixels per side


@dataclass(frozen=True)
class Domain:
    """Description of one domain.

    Attributes:
        find: function from the root to the cases found there.
        reading: how files become arrays.
        structures: the classes with this domain's raw label values.
        val: ids of validation cases.
        test: ids of test cases.
        place: the domain's table in the file, for messages.
        notes: changes to suggest to the user, in sentences.
    """

    find: Callable[[Path], list[Found]]
    reading: Reading
    structures: tuple[Structure, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    place: Table
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """Description of a dataset.

    Attributes:
        name: dataset name.
        title: one-line summary.
        reference: what to cite.
        needs: what the user must have.
        root: directory of the files.
        domains: name → domain, at least two.
        directions: "source-target"; the first is the default.
        structures: the classes in order.
        grids: preset → working grid.
        protocol: deviations from the harness's protocol, usually none.
        publishable: whether pictures may leave the machine.
        same_people: whether an id means the same person in all domains.
    """

    name: str
    title: str
    reference: str
    needs: str
    root: Path
    domains: Mapping[str, Domain]
    directions: tuple[str, ...]
    structures: tuple[Structure, ...]
    grids: Mapping[str, Grid]
    protocol: str
    publishable: bool
    same_people: bool


def describe(file: Path) -> Description:
    """Read and check a description.

    Raises:
        ConfigError: the file cannot be read or has an invalid entry.
        DataError: the `dataset.json` of a nnU-Net folder that it names is invalid.
    """
    text = read_document(file)
    name = text.take("name", str)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise text.error(
            f"'{name}' is not a valid dataset name; use lower-case letters, digits and _", "name"
        )
    plane = PLANES[text.choice("plane", tuple(PLANES), "axial")]
    structures = _structures(text)
    root = file.parent / Path(text.take("root", str, ".")).expanduser()
    domains = {
        key: _domain(key, part, structures, plane, root, file.parent)
        for key, part in text.tables("domains")
    }
    if len(domains) < 2:
        raise text.error("'domains' needs at least two, a source and a target", "domains")
    numbers = {key: own.reading.inputs for key, own in domains.items()}
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{key} has {number}" for key, number in numbers.items())
        raise text.error(
            f"the domains need equal numbers of input channels, but {listed}", "domains"
        )
    pairs = [f"{a}-{b}" for a in domains for b in domains if a != b]
    directions = text.texts("directions", pairs)
    for direction in directions:
        if direction not in pairs:
            raise text.error(
                f"'{direction}' is not a direction; {nearest(direction, pairs)}", "directions"
            )
    described = Description(
        name,
        text.take("title", str, f"{name}, described in {file.name}"),
        text.take("reference", str, "unpublished"),
        text.take("needs", str, "the files that its description names"),
        root,
        domains,
        tuple(directions),
        structures,
        _grids(text),
        text.take("protocol", str, ""),
        text.take("publishable", bool, False),
        text.take("same_people", bool, False),
    )
    text.finish()
    return described


def carried(file: Path, root: Path) -> dict[str, str]:
    """Return a description and its tables as texts that work at any place, without comments.

    Args:
        file: the description, already read by `describe`.
        root: directory of its files, which the new text gives as an absolute path.

    Returns:
        `dataset.yaml`, and `dataset_DOMAIN.csv` for each domain that has a table.

    Raises:
        ConfigError: the description or a table can no longer be read.
    """
    text = read_document(file)
    made: dict[str, str] = {}
    for name, part in text.tables("domains"):
        if "table" in part:
            table = file.parent / Path(part.take("table", str)).expanduser()
            try:
                made[f"dataset_{name}.csv"] = table.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise part.error(f"{table} cannot be read; restore it", "table") from error
            part.put("table", f"dataset_{name}.csv")
    text.put("root", str(root.absolute()))
    return {"dataset.yaml": text.text(), **made}


def _structures(text: Table) -> tuple[Structure, ...]:
    """Return the classes; values that a domain gives replace theirs."""
    made: list[Structure] = []
    for index, (name, part) in enumerate(text.tables("classes")):
        color = part.take("color", str, COLORS[index % len(COLORS)])
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
            raise part.error(f"'{color}' is not a colour; write \"#rrggbb\", quoted", "color")
        values = () if part.take("values", object, None) is None else _values(part, "values")
        title = composed(part.take("title", str, name))
        try:
            made.append(Structure(name, title, values, color))
        except ConfigError as error:
            raise part.error(str(error).rstrip(".")) from error
        part.finish()
    if not made:
        raise text.error("'classes' is empty; give at least one class", "classes")
    return tuple(made)


def _values(table: Table, name: str) -> tuple[int, ...]:
    """Return one or several raw label values."""
    value: Any = table.take(name, object)
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(v) is int and v != 0 for v in values):
        raise table.error(
            f"'{name}' must be a nonzero integer or a list of them (0 is background), not "
            f"{value!r}",
            name,
        )
    return tuple(values)


def _domain(
    name: str,
    part: Table,
    structures: tuple[Structure, ...],
    plane: Reading,
    root: Path,
    beside: Path,
) -> Domain:
    """Read the table of one domain."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise part.error(f"'{name}' is not a domain name; use lower-case letters, digits and _")
    layouts = [layout for layout in ("images", "table", "nnunet") if layout in part]
    channels: dict[str, Table] = dict(part.tables("channels")) if "channels" in part else {}
    if channels and not layouts:
        layouts = ["channels"]
    elif "channels" in part and (layouts == ["images"] or not channels):
        raise part.error(
            "'channels' needs an entry for each channel, such as T1: {images: mr/*_t1.nii.gz}, "
            "instead of 'images'",
            "channels",
        )
    if len(layouts) != 1:
        raise part.error(
            f"domain '{name}' needs exactly one of 'images' (a pattern), 'table' (a CSV file) and "
            f"'nnunet' (a folder), but has {' and '.join(layouts) or 'none'}"
        )
    find: Callable[[Path], list[Found]]
    named: Mapping[str, tuple[int, ...]] = {}
    unannotated: tuple[int, ...] = ()
    if layouts in (["images"], ["channels"]):
        find = _patterns(part, channels)
    elif layouts == ["table"]:
        # The path of a table is relative to the description, not to the root.
        find = partial(by_table, file=beside / Path(part.take("table", str)).expanduser())
        if channels:
            find = partial(find, images=_located(channels, "column", str))
    else:
        folder = Path(part.take("nnunet", str)).expanduser()
        if channels and "channel" in part:
            raise part.error("give either 'channel' or 'channels', not both", "channel")
        numbers = _located(channels, "channel", int) or [part.take("channel", int, 0)]
        fold = part.take("fold", int, None)
        find = partial(_nnunet, folder=folder, channels=tuple(numbers), fold=fold)
        if (root / folder / "dataset.json").is_file():
            named = {} if "values" in part else nnunet_values(root / folder)
            unannotated = nnunet_unannotated(root / folder)
    notes = []
    if "ignore" in part:
        notes.append(
            f"{part.where('ignore')}: 'ignore' is deprecated; rename it to 'background', or to "
            "'unannotated' if those voxels were not annotated."
        )
    unannotated = tuple(dict.fromkeys((*unannotated, *_listed(part, "unannotated"))))
    own, background = _domain_values(part, structures, named, unannotated)
    plane = replace(plane, ignored_values=background, unannotated_values=unannotated)
    domain = Domain(
        find,
        replace(_reading(part, plane), channels=_channels(channels)),
        own,
        tuple(map(composed, part.texts("val", []))),
        tuple(map(composed, part.texts("test", []))),
        part,
        tuple(notes),
    )
    both = sorted(set(domain.val) & set(domain.test))
    if both:
        raise part.error(f"{both[0]} is in both 'val' and 'test'; remove one", "test")
    part.finish()
    return domain


def _nnunet(root: Path, folder: Path, channels: tuple[int, ...], fold: int | None) -> list[Found]:
    return by_nnunet(root / folder, channels[0], fold, channels[1:])


def _patterns(part: Table, channels: Mapping[str, Table]) -> Callable[[Path], list[Found]]:
    """Return how the cases of a domain are found by a pattern, or by one per channel."""
    places = channels or {"": part}
    patterns = _located(places, "images", str)
    labels = part.take("labels", str, None)
    for place, pattern in zip(places.values(), patterns, strict=True):
        fault = pattern_fault(pattern, labels)
        if fault:
            raise place.error(fault, "images")
    return partial(
        by_pattern,
        images=patterns[0],
        labels=labels,
        description=part.file,
        further=dict(zip([*places][1:], patterns[1:], strict=True)),
        exclude=_excluded(part),
    )


def _excluded(part: Table) -> list[str]:
    """Return the patterns of files to leave out."""
    exclude = part.texts("exclude", [])
    if any(Path(own).is_absolute() or ".." in Path(own).parts for own in exclude):
        raise part.error("'exclude' must be relative to the root, without ..", "exclude")
    return exclude


def _located(channels: Mapping[str, Table], entry: str, kind: type) -> list[Any]:
    """Return where each channel is found: a pattern, a column or a number, each used once."""
    made: list[Any] = []
    for own in channels.values():
        place = own.take(entry, kind)
        if place in made:
            raise own.error(f"two channels have the same '{entry}', {place}; correct one", entry)
        made.append(place)
    return made


def _channels(channels: Mapping[str, Table]) -> tuple[Channel, ...]:
    """Return the channels with their own intensities."""
    made = []
    for name, own in channels.items():
        window, shares = _intensities(own)
        made.append(Channel(composed(name), shares, window))
        own.finish()
    return tuple(made)


def _listed(part: Table, name: str) -> tuple[int, ...]:
    """Return an optional list of label values."""
    values = part.take(name, list, [])
    if not all(type(v) is int for v in values):
        raise part.error(f"'{name}' must be a list of label values", name)
    return tuple(values)


def _domain_values(
    part: Table,
    structures: tuple[Structure, ...],
    named: Mapping[str, tuple[int, ...]],
    unannotated: tuple[int, ...],
) -> tuple[tuple[Structure, ...], tuple[int, ...]]:
    """Return the classes with the domain's label values, and the values that count as background.

    Args:
        part: the domain's table.
        structures: the classes.
        named: names in `dataset.json` and their values.
        unannotated: values of unannotated voxels.
    """
    values = {s.name: s.values for s in structures if s.values}
    own = part.table("values")
    if own is not None:
        for key in own.names():
            if key not in {s.name for s in structures}:
                hint = nearest(key, [s.name for s in structures])
                raise own.error(f"'{key}' is not a class; {hint}", key)
            values[key] = _values(own, key)
    lower = {name.lower(): numbers for name, numbers in named.items()}
    for structure in structures:
        for key in (structure.title.lower(), structure.name.lower()):
            if key in lower:
                values[structure.name] = lower[key]
    missing = [s.name for s in structures if s.name not in values]
    if missing:
        raise part.error(
            f"{missing[0]} has no label value; add it under 'values', here or in its class"
        )
    background = (*_listed(part, "background"), *_listed(part, "ignore"))
    meanings = {s.name: values[s.name] for s in structures}
    meanings |= {"'background'": background, "'unannotated'": unannotated}
    for (one, first), (other, second) in combinations(meanings.items(), 2):
        shared = sorted(set(first) & set(second))
        if shared:
            raise part.error(
                f"label value {shared[0]} is used for both {one} and {other}; give each its own "
                "under 'values' (overlapping nnU-Net regions are not supported)"
            )
    used = {v for numbers in meanings.values() for v in numbers}
    rest = dict.fromkeys(v for numbers in named.values() for v in numbers if v not in used)
    return (
        tuple(replace(s, values=values[s.name]) for s in structures),
        tuple(dict.fromkeys((*background, *rest))),
    )


def _reading(part: Table, reading: Reading) -> Reading:
    """Return how a domain's files become arrays."""
    stored = part.table("stored")
    if stored is not None:
        axes = [stored.take("slices", int), stored.take("rows", int)]
        flip = stored.take("flip", list, [])
        if len(set(axes)) < 2 or not {*axes, *flip} <= {0, 1, 2}:
            raise stored.error("'slices' and 'rows' must be different axes (0-2), 'flip' a list")
        stored.finish()
        reading = replace(
            reading,
            orientation="stored",
            slice_axis=axes[0],
            row_axis=axes[1],
            flip=tuple(flip),
        )
    spacing = part.numbers("spacing", 3, None)
    if spacing is not None and not all(0 <= length < 1000 for length in spacing):
        raise part.error(
            "'spacing' must be three lengths in mm, 0 to keep the header's value", "spacing"
        )
    window, shares = _intensities(part)
    return replace(
        reading,
        stated_spacing=spacing,
        intensity_range=window,
        percentiles=shares or reading.percentiles,
    )


def _intensities(
    part: Table,
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Return the optional window and percentiles of a domain or channel."""
    window, shares = part.numbers("window", 2, None), part.numbers("percentiles", 2, None)
    if window is not None and shares is not None:
        raise part.error("give either 'window' or 'percentiles', not both", "percentiles")
    if window is not None and not window[0] < window[1]:
        raise part.error("'window' must be increasing, such as [-125, 275]", "window")
    if shares is not None and not 0 <= shares[0] < shares[1] <= 100:
        raise part.error("'percentiles' must increase from 0 to 100, e.g. [1, 99]", "percentiles")
    return window, shares


def _grids(text: Table) -> Mapping[str, Grid]:
    """Return one working grid per preset, from the field of view or as listed."""
    across = text.take("field_of_view", float, None)
    between = text.take("slice_spacing", float, None)
    listed = text.table("grids")
    if across is None and listed is None:
        raise text.error("'field_of_view' is missing; add the side of the window in mm")
    made: dict[str, dict[str, Any]] = {}
    if across is not None:
        made = {
            preset: {"size": size, "spacing": across / size, "slice_spacing": between}
            for preset, size in SIZES.items()
        }
    if listed is not None:
        for preset, part in text.tables("grids"):
            made[preset] = {
                "size": part.take("size", int),
                "spacing": part.take("spacing", float),
                "slice_spacing": part.take("slice_spacing", float, between),
            }
            part.finish()
    try:
        return {preset: build_settings(Grid, v, f"grids.{preset}") for preset, v in made.items()}
    except ConfigError as error:
        place = "grids" if listed is not None else "field_of_view"
        raise text.error(str(error).rstrip("."), place) from error
