"""What a dataset is, in a small table that can be passed on: no voxel, no name, no path.

After nnU-Net's dataset fingerprint (Isensee et al., Nature Methods 2021), with digests of every
case, so that two laboratories can tell whether they have the same data in the same splits.
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
from glua_bench.facts import CaseFacts
from glua_bench.findings import listed
from glua_bench.task import SPLITS, Dataset

# Raise with every change after which the same data have another fingerprint.
VERSION = 1
_DIGITS = 5  # significant ones; further ones differ between machines
_SUFFIXES = (".json", ".yaml", ".yml")
_KEYS = {"version", "dataset", "content", "structures", "domains"}
_DOMAIN_KEYS = {
    *("cases", "labelled", "content", "splits", "voxels", "spacing_mm"),
    *("intensity_inside_structures", "structures"),
}
_GIVE = "give a file that `data fingerprint --out` wrote"
_SAME = 0.01  # what differs by less is not worth a sentence of its own


def fingerprint(dataset: Dataset, facts: Sequence[CaseFacts]) -> dict[str, Any]:
    """The fingerprint of a dataset, as plain values.

    A case's digest covers the values of its image, the classes of its label, voxel sizes and axes:
    not its name, its place, the format, number type or compression of its files.

    Args:
        dataset: gives domains, structures and splits.
        facts: of all its cases.

    Raises:
        DataError: a case cannot be read.
    """
    for one in facts:
        problem = one.image_problem or one.label_problem
        if problem:
            raise DataError(problem)
    names = [structure.name for structure in dataset.structures]
    domains = {
        domain: _domain([one for one in facts if one.case.domain == domain], names)
        for domain in dataset.domains()
    }
    content = _digest({domain: table["content"] for domain, table in domains.items()})
    return {
        "version": VERSION,
        "dataset": dataset.fold_name,
        "content": content,
        "structures": names,
        "domains": domains,
    }


def case_digest(one: CaseFacts) -> str:
    """A short digest of what one case's files hold."""
    image, label = one.image, one.label
    assert image is not None
    spacing = [f"{length:.3f}" for length in image.spacing]
    axes = "".join(str(code) for code in nib.aff2axcodes(np.array(image.affine)))
    return _digest([image.content, spacing, axes, label.content if label else ""])[:16]


def describe(table: Mapping[str, Any]) -> Iterator[str]:
    """A fingerprint as lines to read."""
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
        for name, found in own["structures"].items():
            ml = found["ml"]
            size = f"{ml['median']:g} ml ({ml['min']:g} to {ml['max']:g})" if ml else "nowhere"
            yield f"  {name:<12} {size}, in {found['labels']} of {own['labelled']} labels"


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[str]:
    """In which points two fingerprints differ, a sentence for each; none where the data are equal.

    Args:
        here: the fingerprint of the data at hand.
        there: the one to compare with.
        names: digest of a case at hand → its id.
    """
    if here["content"] == there["content"] and here["structures"] == there["structures"]:
        return []
    told: list[str] = []
    if here["structures"] != there["structures"]:
        told.append(
            f"The structures are {', '.join(here['structures'])} here and "
            f"{', '.join(there['structures'])} there."
        )
    for domain in dict.fromkeys([*here["domains"], *there["domains"]]):
        if domain not in there["domains"] or domain not in here["domains"]:
            told.append(
                f"Domain {domain} is only {'here' if domain in here['domains'] else 'there'}."
            )
            continue
        told += _of_domain(domain, here["domains"][domain], there["domains"][domain], names or {})
    return told


def _of_domain(
    domain: str, here: Mapping[str, Any], there: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[str]:
    """The differences of one domain."""
    if here["content"] == there["content"]:
        return
    splits = [
        {digest: split for split, own in table["splits"].items() for digest in own}
        for table in (here, there)
    ]
    if here["cases"] != there["cases"]:
        yield f"{domain} has {here['cases']} cases here and {there['cases']} there."
    for own, other, place in ((splits[0], splits[1], "here"), (splits[1], splits[0], "there")):
        alone = sorted(names.get(digest, digest) for digest in own.keys() - other.keys())
        if alone:
            yield (
                f"{len(alone)} case{'s' * (len(alone) > 1)} of {domain} with these voxels and "
                f"labels {'are' if len(alone) > 1 else 'is'} only {place} ({listed(alone)})."
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
            f"The intensity inside the structures of {domain} is {middles[0]:g} here and "
            f"{middles[1]:g} there, in the median."
        )


def _differ(here: Sequence[float], there: Sequence[float]) -> bool:
    return any(abs(a - b) > _SAME * max(abs(a), abs(b)) for a, b in zip(here, there, strict=True))


# -- files ----------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """The suffix that says how a fingerprint is written.

    Raises:
        ConfigError: it is another.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--out {path} is neither .json nor .yaml: give one of the two.")
    return path.suffix.lower()


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write a fingerprint as JSON or YAML, by the suffix.

    Raises:
        ConfigError: the suffix is another.
        DataError: the file cannot be written.
    """
    text = json.dumps(table, indent=1) + "\n" if format_of(path) == ".json" else dump(table)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"--out {path} cannot be written ({error.strerror}): choose another place."
        ) from error


def read(path: Path) -> dict[str, Any]:
    """A fingerprint that `write` wrote.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    try:
        # Every JSON text is YAML, too.
        table = load(path.read_text(encoding="utf-8"))
        version = table["version"]
        parts = [set(table), *(set(own) for own in table["domains"].values())]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check --against.") from error
    except (ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no fingerprint: {_GIVE}.") from error
    if version != VERSION:
        raise DataError(
            f"{path} is a fingerprint of version {version}, and this program makes version "
            f"{VERSION}: make both with one version."
        )
    if parts[0] != _KEYS or any(part != _DOMAIN_KEYS for part in parts[1:]):
        raise DataError(f"{path} is not a whole fingerprint: {_GIVE}.")
    return dict(table)


def _domain(facts: Sequence[CaseFacts], names: Sequence[str]) -> dict[str, Any]:
    """Numbers, sizes, intensities and digests of one domain."""
    images = [one.image for one in facts if one.image is not None]
    labels = [one.label for one in facts if one.label is not None]
    inside = [label.inside for label in labels if label.inside is not None]
    splits = {
        split: sorted(case_digest(one) for one in facts if one.case.split == split)
        for split in SPLITS
    }
    structures = {}
    for index, name in enumerate(names):
        found = [label.structures[index] for label in labels]
        ml = [part.ml for part in found if part is not None]
        structures[name] = {"labels": len(ml), "ml": _range(ml)}
    keys = ("mean", "std", "percentile_00_5", "median", "percentile_99_5")
    return {
        "cases": len(facts),
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


def _ranges(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Median, least and largest of each of (Z, Y, X)."""
    columns = [_range([float(row[axis]) for row in rows]) for axis in range(3)]
    return {key: [column[key] for column in columns if column] for key in ("median", "min", "max")}


def _range(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest; empty for nothing."""
    if not values:
        return {}
    found = {"median": np.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.{_DIGITS}g}") for key, value in found.items()}


def _digest(content: Any) -> str:
    """SHA-256 of plain values, as hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
