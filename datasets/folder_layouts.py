"""How the files of a described domain are found: by patterns, from a table, or in nnU-Net's layout.

Each gives the same thing, a `Found` for every case; `folder.py` makes cases of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glua_bench.errors import DataError
from glua_bench.paths import composed, entries, located, matching
from glua_bench.task import SPLITS

SPLITS_FILE = "splits_final.json"
COLUMNS = ("id", "image", "label", "subject", "split")


@dataclass(frozen=True)
class Found:
    """One case as the files tell it.

    Args:
        id: within the domain.
        image: file of the image volume.
        label: file of the label volume; None where there is none.
        subject: who was imaged; "" where the files do not say.
        split: "train", "val" or "test"; "" where the files do not say.
    """

    id: str
    image: Path
    label: Path | None
    subject: str = ""
    split: str = ""


def pattern_fault(images: str, labels: str | None) -> str:
    """What is wrong with the patterns of a domain, and how it is repaired; "" for nothing.

    Args:
        images: e.g. "ct/*_image.nii.gz".
        labels: likewise; None where the domain has none.
    """
    if labels == images:
        return "'labels' is the pattern of the images; give the labels their own"
    for name, pattern in (("images", images), ("labels", labels)):
        if pattern is None:
            continue
        if not any("*" in part for part in Path(pattern).parts if part != "**"):
            return f"'{name}' needs a * where the case's id stands, as in ct/*.nii.gz"
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            return f"'{name}' must be relative to the root, without .."
    return ""


def by_pattern(root: Path, images: str, labels: str | None, told: Path) -> list[Found]:
    """Cases by patterns, as of `paths.matching`; what their first `*` stands for is the id.

    Args:
        root: the patterns are relative to it.
        images: e.g. "ct/*_image.nii.gz".
        labels: e.g. "ct/*_label.nii.gz"; None where the domain has none.
        told: the file that gives the patterns, for messages.

    Raises:
        DataError: nothing matches, two files have one id, or no image fits a label.
    """
    drawn = {} if labels is None else _matches(root, labels, told)
    taken = set(drawn.values())  # a wide pattern, such as *.nii.gz, matches the labels as well
    pictures = _matches(root, images, told, taken)
    if not pictures:
        raise DataError(
            f"{root} holds no file like {images} ({told}): correct the pattern, or name the "
            "directory with --data-root."
        )
    strays = sorted(set(drawn) - set(pictures))
    if strays:
        raise DataError(
            f"{drawn[strays[0]]} is the label of no image like {images} ({told}): correct "
            "the patterns, or remove the file."
        )
    if labels is not None and not drawn:
        raise DataError(
            f"{root} holds no file like {labels} ({told}): correct the pattern of the labels."
        )
    return [Found(case, pictures[case], drawn.get(case)) for case in sorted(pictures)]


def _matches(
    root: Path, pattern: str, told: Path, without: Collection[Path] = ()
) -> dict[str, Path]:
    """Id → file."""
    made: dict[str, Path] = {}
    for case, path in matching(root, pattern):
        if path in without:
            continue
        if case in made:
            raise DataError(
                f"{made[case]} and {path} are both '{case}' by the pattern {pattern} "
                f"({told}): let the first * stand where ids differ, or list the files in a "
                "table."
            )
        made[case] = path
    return made


def by_table(root: Path, file: Path) -> list[Found]:
    """Cases by a CSV file with the columns image and label, and id, subject and split if given.

    Args:
        root: paths in the table are relative to it.
        file: the CSV.

    Raises:
        DataError: the table or one of its files cannot be read.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read as CSV ({reason}): check the table.") from error
    strange = [name for name in names if name not in COLUMNS]
    if "image" not in names or strange:
        raise DataError(
            f"{file} has the columns {', '.join(names) or 'none'}: give image and label, and if "
            f"you like {', '.join(c for c in COLUMNS if c not in ('image', 'label'))}."
        )
    made: dict[str, Found] = {}
    for line, row in rows:
        values = {name: (row.get(name) or "").strip() for name in names}
        if not values["image"]:
            raise DataError(f"{file}, line {line}, names no image: fill the column.")
        split = values.get("split", "")
        if split and split not in SPLITS:
            raise DataError(
                f"{file}, line {line}, has the split '{split}': use {', '.join(SPLITS)}."
            )
        image = located(root / values["image"])
        label = located(root / values["label"]) if values.get("label") else None
        case = composed(values.get("id") or image.name.split(".")[0])
        for path in (image, label):
            if path is not None and not path.is_file():
                raise DataError(f"{path} of {file}, line {line}, is not there: correct the path.")
        if case in made:
            raise DataError(f"{file}, line {line}, names '{case}' again: give each case one line.")
        made[case] = Found(case, image, label, values.get("subject", ""), split)
    if not made:
        raise DataError(f"{file} has no row: list the cases in it.")
    return [made[case] for case in sorted(made)]


def by_nnunet(folder: Path, channel: int = 0, fold: int | None = None) -> list[Found]:
    """Cases as nnU-Net keeps raw data, or the Medical Segmentation Decathlon.

    A folder holds `dataset.json`, `imagesTr`, `labelsTr` and `imagesTs`. Images of `imagesTs` are
    the test cases where `labelsTs` holds their labels, and are left out otherwise.
    `splits_final.json`, where it is in the folder, and a fold give the validation cases. The
    Decathlon's images have no channel's number in their names; its `dataset.json` lists them.

    Args:
        folder: Dataset###_NAME or Task##_NAME.
        channel: which image of a case, its four digits at the end of the name.
        fold: position in `splits_final.json`; None leaves all training cases in training.

    Raises:
        DataError: a file is missing or has another form.
    """
    facts = read_nnunet(folder)
    ending = str(facts.get("file_ending", ".nii.gz"))
    suffix = f"_{channel:04d}{ending}"
    listed = facts.get("dataset")
    if isinstance(listed, Mapping):  # nnU-Net v2 may list the files instead
        found = [_entry(folder, str(case), entry, channel) for case, entry in listed.items()]
    else:
        found = [
            Found(composed(path.name.removesuffix(suffix)), path, None, split=split)
            for part, split in (("imagesTr", "train"), ("imagesTs", "test"))
            for path in entries(folder / part)
            if path.name.endswith(suffix)
        ]
        if not found and isinstance(facts.get("training"), list):
            found = _decathlon(folder, facts, ending, channel)
        found = [entry if entry.label else _labelled(folder, entry, ending) for entry in found]
        found = [entry for entry in found if entry.label or entry.split == "train"]
    if not found:
        raise DataError(
            f"{folder / 'imagesTr'} holds no file like CASE{suffix}: check the folder, the channel "
            "and the file_ending of dataset.json."
        )
    made: dict[str, Found] = {}
    for entry in found:
        if entry.id in made:
            raise DataError(
                f"{made[entry.id].image} and {entry.image} are both '{entry.id}': keep one of them."
            )
        made[entry.id] = entry
        for file in (entry.image, entry.label):
            if file is not None and not file.is_file():
                raise DataError(
                    f"{file} is not there, though {folder / 'dataset.json'} names it: restore it."
                )
    for case in () if fold is None else validation_ids(folder, fold):
        if case not in made:
            raise DataError(
                f"{folder / SPLITS_FILE} names '{case}', which {folder} does not hold: restore the "
                "file or choose another fold."
            )
        made[case] = replace(made[case], split="val")
    return [made[case] for case in sorted(made)]


def _entry(folder: Path, case: str, entry: Any, channel: int) -> Found:
    """A case that the `dataset.json` of nnU-Net v2 lists."""
    try:
        image, label = folder / entry["images"][channel], folder / entry["label"]
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{folder / 'dataset.json'} lists no channel {channel} or no label for '{case}': "
            "correct the entry."
        ) from error
    return Found(composed(case), located(image), located(label), split="train")


def _decathlon(folder: Path, facts: Mapping[str, Any], ending: str, channel: int) -> list[Found]:
    """The cases that a `dataset.json` of the Decathlon lists; its files hold every modality."""
    file = folder / "dataset.json"
    modalities = facts.get("modality")
    if isinstance(modalities, Mapping) and len(modalities) > 1:
        raise DataError(
            f"{folder} holds {len(modalities)} modalities in each 4-D file: split them by "
            f"`nnUNetv2_convert_MSD_dataset -i {folder}`, and name the folder that it writes."
        )
    if channel:
        raise DataError(f"{folder} has one modality, so there is no channel {channel}: leave it.")
    made = []
    for part, split in (("training", "train"), ("test", "test")):
        for entry in facts.get(part) or ():
            told = entry if isinstance(entry, Mapping) else {"image": entry}
            image, label = told.get("image"), told.get("label")
            if not isinstance(image, str) or not isinstance(label, str | None):
                raise DataError(f"{file} lists '{entry}' under '{part}': give the files' paths.")
            path = located(folder / image)
            case = composed(path.name.removesuffix(ending))
            made.append(
                Found(case, path, None if label is None else located(folder / label), split=split)
            )
    return made


def _labelled(folder: Path, entry: Found, ending: str) -> Found:
    """A case with the label of its own name, where there is one."""
    part = "labelsTr" if entry.split == "train" else "labelsTs"
    label = located(folder / part / f"{entry.id}{ending}")
    return replace(entry, label=label) if label.is_file() else entry


def read_nnunet(folder: Path) -> dict:
    """The `dataset.json` of a folder of nnU-Net.

    Raises:
        DataError: it is missing or no JSON object.
    """
    file = folder / "dataset.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise DataError(
            f"{file} cannot be read ({reason}): name a folder Dataset###_NAME of nnU-Net."
        ) from error
    if not isinstance(facts, dict):
        raise DataError(f"{file} is no table of names and values: restore it.")
    return facts


def nnunet_values(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of each label of a nnU-Net folder → its raw values, without background and ignore.

    Regions have several values each, and may share some.

    Raises:
        DataError: `dataset.json` has no labels, or some that are no integers.
    """
    labels = _nnunet_labels(folder)
    return {
        name: values
        for name, values in labels.items()
        if name.lower() not in ("background", "ignore") and values != (0,)
    }


def nnunet_unannotated(folder: Path) -> tuple[int, ...]:
    """The raw values that a nnU-Net folder calls "ignore": nobody annotated those voxels.

    Raises:
        DataError: as for `nnunet_values`.
    """
    labels = _nnunet_labels(folder)
    return tuple(v for name, values in labels.items() if name.lower() == "ignore" for v in values)


def _nnunet_labels(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of each label → its raw values, as `dataset.json` has them."""
    labels = read_nnunet(folder).get("labels")
    if not isinstance(labels, Mapping):
        raise DataError(f"{folder / 'dataset.json'} has no table 'labels': complete it.")
    made: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        if str(name).isdigit() and isinstance(value, str):  # nnU-Net v1 has value → name
            name, value = value, int(name)
        values = [str(v) for v in (value if isinstance(value, list) else [value])]
        if not values or not all(re.fullmatch(r"\d+(\.0*)?", v) for v in values):
            raise DataError(
                f"{folder / 'dataset.json'} has the label '{name}' of {value}: give integers."
            )
        made[composed(str(name))] = tuple(int(float(v)) for v in values)
    return made


def validation_ids(folder: Path, fold: int) -> list[str]:
    """Ids of one fold's validation cases, by the `splits_final.json` of a folder of nnU-Net.

    Raises:
        DataError: the file cannot be read, or has no such fold.
    """
    file = folder / SPLITS_FILE
    try:
        folds = json.loads(file.read_text(encoding="utf-8"))
        return [composed(str(case)) for case in folds[fold]["val"]]
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): copy it there, or leave 'fold' out."
        ) from error
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} has no fold {fold} with a list 'val': choose a fold from 0, or leave it out."
        ) from error
