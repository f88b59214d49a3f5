"""Read the `dataset.json` of nnU-Net's folders, version 1 (Decathlon) or 2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from glua_bench.documents import load_json
from glua_bench.errors import DataError, first_line
from glua_bench.paths import composed

DESCRIPTION = "dataset.json"


def read_nnunet(folder: Path) -> dict:
    """Return the `dataset.json` of a nnU-Net folder.

    Raises:
        DataError: it is missing or not a JSON object.
    """
    file = folder / DESCRIPTION
    try:
        content = load_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(
            f"{file} cannot be read ({reason}): give a nnU-Net folder Dataset###_NAME."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object: restore it.")
    return content


def nnunet_channels(folder: Path) -> list[str]:
    """Return the names of the image channels of a nnU-Net folder; [] if it has none.

    Raises:
        DataError: `dataset.json` is missing or not a JSON object.
    """
    content = read_nnunet(folder)
    names = content.get("channel_names", content.get("modality"))  # v1 has "modality"
    return [composed(str(name)) for name in names.values()] if isinstance(names, Mapping) else []


def nnunet_values(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return label name → raw values of a nnU-Net folder, without background and ignore.

    Regions have several values each and may overlap.

    Raises:
        DataError: `dataset.json` has no labels, or labels that are not integers.
    """
    labels = _nnunet_labels(folder)
    return {
        name: values
        for name, values in labels.items()
        if name.lower() not in ("background", "ignore") and values != (0,)
    }


def nnunet_unannotated(folder: Path) -> tuple[int, ...]:
    """Return the raw values of nnU-Net's "ignore" label: voxels that were not annotated.

    Raises:
        DataError: as for `nnunet_values`.
    """
    labels = _nnunet_labels(folder)
    return tuple(v for name, values in labels.items() if name.lower() == "ignore" for v in values)


def _nnunet_labels(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return label name → raw values as listed in `dataset.json`."""
    labels = read_nnunet(folder).get("labels")
    if not isinstance(labels, Mapping):
        raise DataError(f"{folder / 'dataset.json'} has no object 'labels': add it.")
    made: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        if str(name).isdigit() and isinstance(value, str):  # nnU-Net v1 has value → name
            name, value = value, int(name)
        values = [str(v) for v in (value if isinstance(value, list) else [value])]
        if not values or not all(re.fullmatch(r"\d+(\.0*)?", v) for v in values):
            raise DataError(
                f"Label '{name}' in {folder / 'dataset.json'} has the value {value}: give integers."
            )
        made[composed(str(name))] = tuple(int(float(v)) for v in values)
    return made
