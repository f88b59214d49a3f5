"""Fingerprint a dataset without voxels, names or paths, so that it can be shared.

Follows nnU-Net's dataset fingerprint (Isensee et al., Nature Methods 2021) and adds a digest of
every case, so that two sites can check whether they have the same data in the same splits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from glua_bench.documents import dump, load
from glua_bench.errors import ConfigError, DataError
from glua_bench.files import write_text
from glua_bench.inspection.findings import enumerate_names
from glua_bench.inspection.measurements import CaseMeasurements
from glua_bench.task import SPLITS, Dataset

# Increment when a change of this file changes fingerprints.
VERSION = 1
_DIGITS = 5  # significant digits; further digits differ between machines
_SUFFIXES = (".json", ".yaml", ".yml")
_KEYS = {"version", "dataset", "content", "structures", "domains"}
_DOMAIN_KEYS = {
    *("cases", "labelled", "content", "splits", "voxels", "spacing_mm"),
    *("intensity_inside_structures", "structures"),
}
# Percentiles of a channel's intensities in the body.
_LEVELS = {"percentile_01": 1, "percentile_50": 50, "percentile_99": 99}
_EXPECTED = "give a file written by `data fingerprint --out`"
_TOLERANCE = 0.01  # smaller relative differences are not reported


def fingerprint(dataset: Dataset, measured: Sequence[CaseMeasurements]) -> dict[str, Any]:
    """Compute the fingerprint of a dataset as plain values.

    The digest of a case covers image values, label classes, voxel sizes and axes, but not names,
    paths, file formats, number types or compression.

    Args:
        dataset: the dataset with its domains, structures and splits.
        measured: measurements of all its cases.

    Raises:
        DataError: a case cannot be read.
    """
    for one in (channel for case in measured for channel in case.channels):
        problem = one.image_problem or one.label_problem
        if problem:
            raise DataError(problem)
    names = [structure.name for structure in dataset.structures]
    domains = {}
    for domain in dataset.domains():
        own = [one for one in measured if one.case.domain == domain]
        domains[domain] = _domain(own, names)
        channels = dataset.view(domain).reading.channels
        if channels:
            domains[domain]["channels"] = {
                channel.name: _intensity([one.channels[index] for one in own])
                for index, channel in enumerate(channels)
            }
    content = _digest({domain: table["content"] for domain, table in domains.items()})
    return {
        "version": VERSION,
        "dataset": dataset.fold_name,
        "content": content,
        "structures": names,
        "domains": domains,
    }


def case_digest(one: CaseMeasurements) -> str:
    """Return a short digest of a case's content."""
    image, label = one.image, one.label
    assert image is not None
    spacing = [f"{length:.3f}" for length in image.spacing]
    axes = "".join(str(code) for code in nib.aff2axcodes(np.array(image.affine)))
    content = [image.content, spacing, axes, label.content if label else ""]
    content += [channel.image.content for channel in one.further if channel.image is not None]
    return _digest(content)[:16]


def describe(table: Mapping[str, Any]) -> Iterator[str]:
    """Format a fingerprint as lines of text."""
    yield f"{table['dataset']}, content {table['content']}"
    for domain, own in table["domains"].items():
        splits = ", ".join(f"{len(own['splits'][split])} {split}" for split in SPLITS)
        yield ""
        yield f"{domain}: {own['cases']} cases ({splits}), {own['labelled']} with a label"
        yield f"  content      {own['content']}"
        for name, key, unit in (("voxels", "voxels", ""), ("spacing", "spacing_mm", " mm")):
            ends = [" × ".join(f"{v:g}" for v in own[key][k]) for k in ("median", "min", "max")]
            yield f"  {name:<12} {ends[0]}{unit} ({ends[1]} to {ends[2]})"
        inside = own["intensity_inside_structures"]
        if inside["median"]:
            low, middle, high = (
                inside[key]["median"] for key in ("percentile_00_5", "median", "percentile_99_5")
            )
            yield f"  intensity    {middle:g} inside the structures ({low:g} to {high:g})"
        for name, found in own.get("channels", {}).items():
            low, middle, high = (found[key]["median"] for key in _LEVELS)
            yield f"  channel      {name}: {middle:g} in the body ({low:g} to {high:g})"
        for name, found in own["structures"].items():
            ml = found["ml"]
            size = f"{ml['median']:g} ml ({ml['min']:g} to {ml['max']:g})" if ml else "nowhere"
            yield f"  {name:<12} {size}, in {found['labels']} of {own['labelled']} labels"


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[str]:
    """List the differences of two fingerprints, one sentence each; empty for equal data.

    Args:
        here: fingerprint of the local data.
        there: fingerprint to compare with.
        names: digest of a local case → its id.
    """
    if here["content"] == there["content"] and here["structures"] == there["structures"]:
        return []
    sentences: list[str] = []
    if here["structures"] != there["structures"]:
        sentences.append(
            f"The structures are {', '.join(here['structures'])} here and "
            f"{', '.join(there['structures'])} there."
        )
    for domain in dict.fromkeys([*here["domains"], *there["domains"]]):
        if domain not in there["domains"] or domain not in here["domains"]:
            sentences.append(
                f"Domain {domain} exists only {'here' if domain in here['domains'] else 'there'}."
            )
            continue
        sentences += _domain_differences(
            domain, here["domains"][domain], there["domains"][domain], names or {}
        )
    return sentences


def _domain_differences(
    domain: str, here: Mapping[str, Any], there: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[str]:
    """Yield the differences of one domain."""
    if here["content"] == there["content"]:
        return
    splits = [
        {digest: split for split, own in table["splits"].items() for digest in own}
        for table in (here, there)
    ]
    names_of = [", ".join(table.get("channels", {})) or "one" for table in (here, there)]
    if names_of[0] != names_of[1]:
        yield f"The channels of {domain} are {names_of[0]} here and {names_of[1]} there."
    if here["cases"] != there["cases"]:
        yield f"{domain} has {here['cases']} cases here and {there['cases']} there."
    for own, other, place in ((splits[0], splits[1], "here"), (splits[1], splits[0], "there")):
        alone = sorted(names.get(digest, digest) for digest in own.keys() - other.keys())
        if alone:
            yield (
                f"By content, {len(alone)} case{'s' * (len(alone) > 1)} of {domain} "
                f"{'exist' if len(alone) > 1 else 'exists'} only {place} "
                f"({enumerate_names(alone)})."
            )
    moved = [d for d in sorted(splits[0].keys() & splits[1].keys()) if splits[0][d] != splits[1][d]]
    for digest in moved:
        yield (
            f"{names.get(digest, digest)} of {domain} is in {splits[0][digest]} here and in "
            f"{splits[1][digest]} there."
        )
    for key, what in (("voxels", "numbers of voxels"), ("spacing_mm", "voxel sizes in mm")):
        medians = [" × ".join(f"{v:g}" for v in table[key]["median"]) for table in (here, there)]
        if _differ(here[key]["median"], there[key]["median"]):
            yield f"The median {what} of {domain} are {medians[0]} here and {medians[1]} there."
    for name in here["structures"]:
        if name not in there["structures"]:
            continue
        sizes = [table["structures"][name]["ml"].get("median", 0.0) for table in (here, there)]
        if _differ(sizes[:1], sizes[1:]):
            yield (
                f"The median {name} of {domain} has {sizes[0]:g} ml here and {sizes[1]:g} ml there."
            )
    levels = [table["intensity_inside_structures"]["median"] for table in (here, there)]
    middles = [level.get("median", 0.0) for level in levels]
    if _differ(middles[:1], middles[1:]):
        yield (
            f"The median intensity inside the structures of {domain} is {middles[0]:g} here and "
            f"{middles[1]:g} there."
        )


def _differ(here: Sequence[float], there: Sequence[float]) -> bool:
    return any(
        abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) for a, b in zip(here, there, strict=True)
    )


# -- files ----------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """Return the suffix, which determines the file format.

    Raises:
        ConfigError: the suffix is neither .json, .yaml nor .yml.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--out {path} must end in .json or .yaml: give one of the two.")
    return path.suffix.lower()


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write a fingerprint as JSON or YAML, depending on the suffix.

    Raises:
        ConfigError: the suffix is another.
        RunFailure: the file cannot be written.
    """
    text = json.dumps(table, indent=1) + "\n" if format_of(path) == ".json" else dump(table)
    write_text(path, text, "--out")


def read(path: Path) -> dict[str, Any]:
    """Read a fingerprint file.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    try:
        # JSON is a subset of YAML.
        table = load(path.read_text(encoding="utf-8"))
        version = table["version"]
        parts = [set(table), *(set(own) for own in table["domains"].values())]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check --against.") from error
    except (ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a fingerprint: {_EXPECTED}.") from error
    if version != VERSION:
        raise DataError(
            f"{path} is a fingerprint of version {version}, but this program writes version "
            f"{VERSION}: create both with the same version."
        )
    if parts[0] != _KEYS or any(part - {"channels"} != _DOMAIN_KEYS for part in parts[1:]):
        raise DataError(f"{path} is an incomplete fingerprint: {_EXPECTED}.")
    return dict(table)


def _domain(measured: Sequence[CaseMeasurements], names: Sequence[str]) -> dict[str, Any]:
    """Summarise one domain: numbers of cases, sizes, intensities and digests."""
    images = [one.image for one in measured if one.image is not None]
    labels = [one.label for one in measured if one.label is not None]
    inside = [label.inside for label in labels if label.inside is not None]
    splits = {
        split: sorted(case_digest(one) for one in measured if one.case.split == split)
        for split in SPLITS
    }
    structures = {}
    for index, name in enumerate(names):
        found = [label.structures[index] for label in labels]
        ml = [part.ml for part in found if part is not None]
        structures[name] = {"labels": len(ml), "ml": _range(ml)}
    keys = ("mean", "std", "percentile_00_5", "median", "percentile_99_5")
    return {
        "cases": len(measured),
        "labelled": len(labels),
        "content": _digest(splits),
        "splits": splits,
        "voxels": _ranges([image.oriented_shape for image in images]),
        "spacing_mm": _ranges([image.oriented_spacing for image in images]),
        "intensity_inside_structures": {
            key: _range([values[place] for values in inside]) for place, key in enumerate(keys)
        },
        "structures": structures,
    }


def _intensity(channel: Sequence[CaseMeasurements]) -> dict[str, dict[str, float]]:
    """Summarise the intensities of one input channel in the body."""
    levels = [one.image.levels for one in channel if one.image is not None]
    return {key: _range([own[place] for own in levels]) for key, place in _LEVELS.items()}


def _ranges(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Return median, minimum and maximum along each of (Z, Y, X)."""
    columns = [_range([float(row[axis]) for row in rows]) for axis in range(3)]
    return {key: [column[key] for column in columns if column] for key in ("median", "min", "max")}


def _range(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum; empty if there are no values."""
    if not values:
        return {}
    found = {"median": np.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.{_DIGITS}g}") for key, value in found.items()}


def _digest(content: Any) -> str:
    """Return the SHA-256 of plain values as hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
