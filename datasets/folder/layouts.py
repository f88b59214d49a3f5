"""How the files of a described domain are found: by pattern, by table, or in nnU-Net's layout.

Each function returns a list of `Found`, from which `dataset.py` makes cases.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glua_bench.data.nnunet import read_nnunet
from glua_bench.documents import load_json
from glua_bench.errors import DataError
from glua_bench.paths import composed, entries, located, matching
from glua_bench.task import SPLITS

SPLITS_FILE = "splits_final.json"
COLUMNS = ("id", "image", "label", "subject", "split")


@dataclass(frozen=True)
class Found:
    """One case found among the files.

    Attributes:
        id: id within the domain.
        image: file of the image volume, or of its first channel.
        label: file of the label volume, or None.
        subject: who was imaged; "" if unknown.
        split: "train", "val" or "test"; "" if unknown.
        further: files of the second and later channels.
    """

    id: str
    image: Path
    label: Path | None
    subject: str = ""
    split: str = ""
    further: tuple[Path, ...] = ()


def pattern_fault(images: str, labels: str | None) -> str:
    """Return what is wrong with the patterns of a domain and how to fix it; "" if nothing is.

    Args:
        images: e.g. "ct/*_image.nii.gz".
        labels: likewise, or None.
    """
    if labels == images:
        return "'images' and 'labels' have the same pattern; give the labels their own"
    for name, pattern in (("images", images), ("labels", labels)):
        if pattern is None:
            continue
        if not any("*" in part for part in Path(pattern).parts if part != "**"):
            return f"'{name}' needs a * in place of the case's id, as in ct/*.nii.gz"
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            return f"'{name}' must be relative to the root, without .."
    return ""


def by_pattern(
    root: Path,
    images: str,
    labels: str | None,
    description: Path,
    exclude: Sequence[str] = (),
    further: Mapping[str, str] = MappingProxyType({}),
) -> list[Found]:
    """Find cases by patterns, as in `paths.matching`; the text matched by the first `*` is the id.

    Args:
        root: directory that the patterns are relative to.
        images: e.g. "ct/*_image.nii.gz".
        labels: e.g. "ct/*_label.nii.gz"; None if the domain has no labels.
        description: file that gives the patterns, for messages.
        exclude: patterns of files to leave out.
        further: name and pattern of the second and later channels.

    Raises:
        DataError: nothing matches, two files have one id, a label has no image, or a case lacks a
            channel.
    """
    omitted = {path for pattern in exclude for _, path in matching(root, pattern)}
    label_files = {} if labels is None else _matches(root, labels, description, omitted)
    # A wide pattern, such as *.nii.gz, also matches labels.
    taken = omitted | set(label_files.values())
    channels = {
        name: _matches(root, pattern, description, taken) for name, pattern in further.items()
    }
    taken |= {file for own in channels.values() for file in own.values()}
    image_files = _matches(root, images, description, taken)
    if not image_files:
        raise DataError(
            f"No file in {root} matches {images} ({description}): correct the pattern, or pass "
            "the directory with --data-root."
        )
    unmatched = sorted(set(label_files) - set(image_files))
    if unmatched:
        raise DataError(
            f"{label_files[unmatched[0]]} has no image that matches {images} ({description}): "
            "correct the patterns, or remove the file."
        )
    if labels is not None and not label_files:
        raise DataError(f"No file in {root} matches {labels} ({description}): correct the pattern.")
    for name, own in channels.items():
        for case in sorted(set(image_files) ^ set(own)):
            if case in image_files:
                there, lacking = image_files[case], f"channel {name}, {further[name]}"
            else:
                there, lacking = own[case], f"first channel, {images}"
            raise DataError(
                f"{there} has no file of the {lacking} ({description}): add the file, remove the "
                "case, or correct the patterns."
            )
    return [
        Found(
            case,
            image_files[case],
            label_files.get(case),
            further=tuple(own[case] for own in channels.values()),
        )
        for case in sorted(image_files)
    ]


def _matches(
    root: Path, pattern: str, description: Path, without: Collection[Path] = ()
) -> dict[str, Path]:
    """Return id → file."""
    made: dict[str, Path] = {}
    for case, path in matching(root, pattern):
        if path in without:
            continue
        if case in made:
            raise DataError(
                f"{made[case]} and {path} have the same id '{case}' by the pattern {pattern} "
                f"({description}): put the first * where ids differ, or list the files in a table."
            )
        made[case] = path
    return made


def by_table(root: Path, file: Path, images: Sequence[str] = ("image",)) -> list[Found]:
    """Find cases by a CSV file with columns image and label, and optionally id, subject and split.

    Args:
        root: directory that paths in the table are relative to.
        file: the CSV file.
        images: the columns that give the image of each channel.

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
    unknown = [name for name in names if name not in (*COLUMNS, *images)]
    if set(images) - set(names) or unknown:
        raise DataError(
            f"{file} has the columns {', '.join(names) or 'none'}: give {', '.join(images)} and "
            "label, and optionally id, subject, split."
        )
    made: dict[str, Found] = {}
    for line, row in rows:
        values = {name: (row.get(name) or "").strip() for name in names}
        for column in images:
            if not values[column]:
                raise DataError(f"{file}, line {line}, has no {column}: fill in the column.")
        split = values.get("split", "")
        if split and split not in SPLITS:
            raise DataError(
                f"{file}, line {line}, has the split '{split}': use {', '.join(SPLITS)}."
            )
        image, *further = (located(root / values[column]) for column in images)
        label = located(root / values["label"]) if values.get("label") else None
        case = composed(values.get("id") or image.name.split(".")[0])
        for path in (image, label, *further):
            if path is not None and not path.is_file():
                raise DataError(f"{path} ({file}, line {line}) does not exist: correct the path.")
        if case in made:
            raise DataError(f"{file}, line {line}, repeats '{case}': give each case one line.")
        subject = values.get("subject", "")
        made[case] = Found(case, image, label, subject, split, tuple(further))
    if not made:
        raise DataError(f"{file} has no rows: list the cases in it.")
    return [made[case] for case in sorted(made)]


def by_nnunet(
    folder: Path, channel: int = 0, fold: int | None = None, further: Sequence[int] = ()
) -> list[Found]:
    """Find cases in the raw-data layout of nnU-Net or the Medical Segmentation Decathlon.

    A folder holds `dataset.json`, `imagesTr`, `labelsTr` and `imagesTs`. Images in `imagesTs` are
    test cases if `labelsTs` holds their labels, and are skipped otherwise. With a fold, validation
    cases come from `splits_final.json` in the folder. Decathlon images have no channel number in
    their names; `dataset.json` lists them.

    Args:
        folder: Dataset###_NAME or Task##_NAME.
        channel: image channel, the four digits at the end of the file name.
        fold: index in `splits_final.json`; None keeps all training cases in training.
        further: the second and later image channels.

    Raises:
        DataError: a file is missing or has another format.
    """
    content = read_nnunet(folder)
    ending = str(content.get("file_ending", ".nii.gz"))
    suffix = f"_{channel:04d}{ending}"
    listed = content.get("dataset")
    if isinstance(listed, Mapping):  # nnU-Net v2 may list the files instead
        found = [
            _entry(folder, str(case), entry, (channel, *further)) for case, entry in listed.items()
        ]
    else:
        found = [
            Found(composed(path.name.removesuffix(suffix)), path, None, split=split)
            for part, split in (("imagesTr", "train"), ("imagesTs", "test"))
            for path in entries(folder / part)
            if path.name.endswith(suffix)
        ]
        if not found and isinstance(content.get("training"), list):
            found = _decathlon(folder, content, ending, max(channel, *further, 0))
        endings = [f"_{number:04d}{ending}" for number in further]
        found = [
            replace(
                entry,
                further=tuple(
                    located(entry.image.with_name(entry.image.name.removesuffix(suffix) + own))
                    for own in endings
                ),
            )
            for entry in found
        ]
        found = [entry if entry.label else _labelled(folder, entry, ending) for entry in found]
        found = [entry for entry in found if entry.label or entry.split == "train"]
    if not found:
        raise DataError(
            f"No file in {folder / 'imagesTr'} matches CASE{suffix}: check the folder, the channel "
            "and file_ending in dataset.json."
        )
    made: dict[str, Found] = {}
    for entry in found:
        if entry.id in made:
            raise DataError(
                f"{made[entry.id].image} and {entry.image} have the same id '{entry.id}': remove "
                "one of them."
            )
        made[entry.id] = entry
        for number, own in zip(further, entry.further, strict=True):
            if not own.is_file():
                raise DataError(
                    f"{own}, channel {number} of case '{entry.id}', does not exist: restore it, "
                    "or remove the case."
                )
        for file in (entry.image, entry.label):
            if file is not None and not file.is_file():
                raise DataError(
                    f"{file}, listed in {folder / 'dataset.json'}, does not exist: restore it."
                )
    for case in () if fold is None else validation_ids(folder, fold):
        if case not in made:
            raise DataError(
                f"{folder / SPLITS_FILE} lists '{case}', which is not in {folder}: restore the "
                "file or choose another fold."
            )
        made[case] = replace(made[case], split="val")
    return [made[case] for case in sorted(made)]


def _entry(folder: Path, case: str, entry: Any, channels: Sequence[int]) -> Found:
    """Return a case listed in the `dataset.json` of nnU-Net v2."""
    try:
        images = [located(folder / entry["images"][channel]) for channel in channels]
        label = located(folder / entry["label"])
    except (KeyError, IndexError, TypeError) as error:
        numbers = " and ".join(map(str, channels))
        raise DataError(
            f"{folder / 'dataset.json'} lists no channel {numbers} or no label for '{case}': "
            "correct the entry."
        ) from error
    return Found(composed(case), images[0], label, split="train", further=tuple(images[1:]))


def _decathlon(folder: Path, content: Mapping[str, Any], ending: str, channel: int) -> list[Found]:
    """Return the cases listed in a Decathlon `dataset.json`; its files hold every modality."""
    file = folder / "dataset.json"
    modalities = content.get("modality")
    if isinstance(modalities, Mapping) and len(modalities) > 1:
        raise DataError(
            f"{folder} holds {len(modalities)} modalities in each 4-D file: split them with "
            f"`nnUNetv2_convert_MSD_dataset -i {folder}`, and use the folder that it writes."
        )
    if channel:
        raise DataError(f"{folder} has a single modality, not {channel + 1}: remove 'channel'.")
    made = []
    for part, split in (("training", "train"), ("test", "test")):
        for entry in content.get(part) or ():
            files = entry if isinstance(entry, Mapping) else {"image": entry}
            image, label = files.get("image"), files.get("label")
            if not isinstance(image, str) or not isinstance(label, str | None):
                raise DataError(f"{file} lists '{entry}' under '{part}': give file paths.")
            path = located(folder / image)
            case = composed(path.name.removesuffix(ending))
            made.append(
                Found(case, path, None if label is None else located(folder / label), split=split)
            )
    return made


def _labelled(folder: Path, entry: Found, ending: str) -> Found:
    """Return a case with the label file of the same name, if it exists."""
    part = "labelsTr" if entry.split == "train" else "labelsTs"
    label = located(folder / part / f"{entry.id}{ending}")
    return replace(entry, label=label) if label.is_file() else entry


def validation_ids(folder: Path, fold: int) -> list[str]:
    """Return the validation ids of a fold from the `splits_final.json` of a nnU-Net folder.

    Raises:
        DataError: the file cannot be read or has no such fold.
    """
    file = folder / SPLITS_FILE
    try:
        folds = load_json(file.read_text(encoding="utf-8"))
        return [composed(str(case)) for case in folds[fold]["val"]]
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): copy it there, or remove 'fold'."
        ) from error
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} has no fold {fold} with a list 'val': use a fold from 0, or remove 'fold'."
        ) from error
