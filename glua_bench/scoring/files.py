"""Score label files of any tool against references, with the metrics of a run.

Both are read on the grid of the reference. Classes are given, come from an nnU-Net `dataset.json`,
or are the label values found. A reference without a prediction counts as a prediction without any
structure, unless only predicted cases are scored.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.console import Progress
from glua_bench.data.formats import SUFFIXES, open_volume, stem
from glua_bench.data.geometry import frame, voxel_ml
from glua_bench.data.nnunet import DESCRIPTION, nnunet_unannotated, nnunet_values
from glua_bench.data.parallel import map_cases
from glua_bench.data.volumes import Names, read_label_volume, values_of
from glua_bench.errors import ConfigError, DataError
from glua_bench.paths import composed, files_below
from glua_bench.scoring.evaluation import score_case
from glua_bench.scoring.metrics import METRICS, PRIMARY
from glua_bench.task import UNANNOTATED, Case, DomainView, Reading, Structure

MOST_VALUES = 250  # label values of a set of files; class indices are uint8
_MEDPY_NAMES = {PRIMARY.name: "dc"}  # others have ours
MEDPY = " (medpy)"  # suffix of the columns of `verify`
_WORDS = (
    "label|labels|seg|segs|segmentation|mask|pred|prediction|predicted|gt|truth|manual|image|img"
)
_ENDING = re.compile(rf"[-_. ](?:0000|{_WORDS})$", re.IGNORECASE)


@dataclass(frozen=True)
class Pairs:
    """References with their predictions.

    Attributes:
        cases: case → prediction (None if missing) and reference, sorted by case.
        spare: predictions without a reference.
    """

    cases: Mapping[str, tuple[Path | None, Path]]
    spare: tuple[Path, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Cases without a prediction."""
        return [case for case, (prediction, _) in self.cases.items() if prediction is None]


@dataclass(frozen=True)
class Classes:
    """The meaning of label values.

    Attributes:
        structures: classes with their label values, which may overlap (regions).
        unannotated: label values of voxels that are excluded.
        source: where they come from, for messages.
        fix: what to do about label values that are not among them.
    """

    structures: tuple[Structure, ...]
    unannotated: tuple[int, ...] = ()
    source: str = "structures given"
    fix: str = "relabel the file, or add them to the structures (as background=… to ignore them)"


@dataclass(frozen=True)
class ScoredFiles:
    """One case to score.

    Attributes:
        case: the case; its label is the reference, and its image defines the grid.
        prediction: label file; None predicts no structure.
        view: how the reference is read; label values of its structures may overlap.
        predicted: how the prediction is read; the same structures.
        names: words of messages.
        verify: also compute the metrics by medpy.
    """

    case: Case
    prediction: Path | None
    view: DomainView
    predicted: DomainView
    names: Names = Names()
    verify: bool = False


def score_files(
    predictions: Path,
    references: Path,
    structures: Sequence[Structure] | None = None,
    *,
    reading: Reading | None = None,
    only_predicted: bool = False,
    verify: bool = False,
    jobs: int = 1,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Score predicted label files against references.

    Files are paired by name (`pair`). They may have any format of `data/formats.py`; other files,
    such as nnU-Net's `summary.json`, are ignored. Metrics are computed in mm on the grid of the
    reference file, as for a run: NaN if neither mask has the structure, the metric's worst value if
    one of them lacks it.

    Args:
        predictions: a label file, or a directory with label files at any depth.
        references: a label file, or a directory.
        structures: classes with their label values in both kinds of files; values may overlap, as
            nnU-Net's regions do. By default the labels of nnU-Net's `dataset.json`, if there is one
            beside the references or the predictions, else every label value found is a class.
        reading: orientation, spacing, and ignored and unannotated label values of the references;
            by default the geometry of their headers. `unannotated_values` are excluded; with
            `structures=None`, the "ignore" label of `dataset.json` is too.
        only_predicted: omit references without a prediction; by default they count as predictions
            without any structure, i.e. as misses.
        verify: recompute Dice, ASSD and HD95 with medpy, in columns such as "assd (medpy)".
        jobs: number of processes.
        report: receives a line on the source of the classes, on missing predictions and on
            predictions without a reference.
        progress: progress display.

    Returns:
        One row per case and structure: case, structure, all `METRICS`, missed, false_alarm,
        reference_ml, prediction_ml, predicted (False if the case has no prediction).
        `evaluation.summarise` averages them.

    Raises:
        ConfigError: a path does not exist or has no label files, names do not match, or a
            `dataset.json` is invalid.
        DataError: a file cannot be read, is on another grid than its reference, or has an unknown
            label value.

    Example:
        >>> from glua_bench.scoring.files import score_files
        >>> score_files("predictions", "labelsTs")  # doctest: +SKIP
    """
    predictions, references = Path(predictions), Path(references)
    pairs = pairs_to_score(pair(predictions, references), report, only_predicted)
    given = reading or Reading()
    if structures is not None:
        classes = Classes(tuple(structures), given.unannotated_values)
    else:
        found = described(predictions, references)
        classes = found or _values_found(pairs.cases.values(), given)
    report(f"Classes: {classes.source}.")
    given = replace(given, unannotated_values=classes.unannotated)
    view = DomainView("", given, classes.structures)
    names = Names("reference", f"not among the classes ({classes.source}): {classes.fix}")
    work = [
        ScoredFiles(
            Case(name, "", reference, reference, "test", name),
            prediction,
            view,
            view.of_predictions(),
            names,
            verify,
        )
        for name, (prediction, reference) in pairs.cases.items()
    ]
    return score(work, jobs, progress).drop(columns=["subject", "domain"])


def score(
    work: Sequence[ScoredFiles], jobs: int = 1, progress: Progress | None = None
) -> pd.DataFrame:
    """Score cases.

    Returns:
        As `evaluate`, with the column predicted and, if verified, the metrics of medpy.

    Raises:
        DataError: as for `score_files`.
        ConfigError: medpy is to be used and is not installed.
    """
    if any(each.verify for each in work):
        medpy_metrics()
    scored = map_cases(_score, work, jobs, progress or Progress(enabled=False), "score")
    return pd.DataFrame([row for rows in scored for row in rows])


def _score(files: ScoredFiles) -> list[dict[str, Any]]:
    """Score one case, structure by structure, since regions overlap."""
    case = files.case
    wanted, expected_of = _read(case.truth, files.view, files)
    if files.prediction is None:
        found, predicted_of = np.zeros_like(wanted), expected_of
    else:
        found, predicted_of = _read(files.prediction, files.predicted, files)
    file, reading = open_volume(case.image), files.view.reading
    affine, spacing, _, _ = frame(file, reading)
    ml = voxel_ml(affine, spacing, reading)
    rows = []
    for index, structure in enumerate(files.view.structures):
        expected = _mask(wanted, expected_of[index])
        predicted = _mask(found, predicted_of[index])
        (row,) = score_case(case, predicted, expected, [structure], spacing, ml)
        row["predicted"] = files.prediction is not None
        if files.verify:
            seen = expected != UNANNOTATED
            row |= _by_medpy((predicted == 1) & seen, expected == 1, spacing)
        rows.append(row)
    return rows


def _read(path: Path, view: DomainView, files: ScoredFiles) -> tuple[np.ndarray, list[list[int]]]:
    """Read a label file with a class per label value; return it, and the classes of structures."""
    values = list(dict.fromkeys(value for each in view.structures for value in each.values))
    single = tuple(Structure(f"value {value}", "", (value,), "") for value in values)
    classes = read_label_volume(
        path, files.case.image, replace(view, structures=single), files.names
    )
    return classes, [[1 + values.index(v) for v in each.values] for each in view.structures]


def _mask(classes: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Return 1 for some of the classes, `UNANNOTATED` where it is, and 0 elsewhere."""
    table = np.zeros(256, np.uint8)
    table[list(own)], table[UNANNOTATED] = 1, UNANNOTATED
    return table[classes]


# -- medpy ----------------------------------------------------------------------------------------


def medpy_metrics() -> Mapping[str, Callable[..., Any]]:
    """Return medpy's functions by the names of our metrics.

    Raises:
        ConfigError: medpy is not installed.
    """
    try:
        # Imported here only: medpy is GPL-3, and no run and no score needs it.
        from medpy.metric import binary
    except ImportError as error:
        raise ConfigError(
            f"medpy cannot be imported ({error}); install it with `pip install medpy`, or omit "
            "--verify."
        ) from error
    found = {name: getattr(binary, _MEDPY_NAMES.get(name, name), None) for name in METRICS}
    return {name: function for name, function in found.items() if function is not None}


def _by_medpy(
    predicted: np.ndarray, expected: np.ndarray, spacing: Sequence[float]
) -> dict[str, float]:
    """Compute the metrics of two masks by medpy; NaN if one is empty, which medpy refuses."""
    values = {}
    for name, function in medpy_metrics().items():
        own = {} if name == PRIMARY.name else {"voxelspacing": tuple(map(float, spacing))}
        both = predicted.any() and expected.any()
        values[name + MEDPY] = float(function(predicted, expected, **own)) if both else math.nan
    return values


def largest_differences(rows: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Compare with medpy: metric → largest absolute difference, and number of compared values.

    Args:
        rows: from `score_files(…, verify=True)`.
    """
    found = {}
    for name in METRICS:
        if name + MEDPY in rows:
            difference = (rows[name] - rows[name + MEDPY]).abs().dropna()
            found[name] = float(difference.max()), len(difference)
    return found


# -- pairs ----------------------------------------------------------------------------------------


def pairs_to_score(pairs: Pairs, report: Callable[[str], None], only_predicted: bool) -> Pairs:
    """Report missing and spare predictions; return the pairs to score."""
    if pairs.missing:
        count = f"{len(pairs.missing)} of {len(pairs.cases)} references"
        what = (
            "are omitted, so means are over fewer cases"
            if only_predicted
            else "count as missed structures (--only-predicted omits them)"
        )
        report(f"No prediction for {count}, which {what}: {', '.join(pairs.missing)}.")
    if pairs.spare:
        files = ", ".join(map(str, pairs.spare))
        report(f"No reference for {len(pairs.spare)} predictions, which are not scored: {files}.")
    kept = pairs.cases.items()
    return Pairs({n: p for n, p in kept if p[0] or not only_predicted}, pairs.spare)


def volumes(folder: Path) -> list[Path]:
    """List the label files in a directory, at any depth, or the file itself.

    Raises:
        ConfigError: it does not exist, or contains no volume.
    """
    if not folder.is_dir():
        if folder.name.lower().endswith(SUFFIXES) and (folder.is_file() or folder.is_symlink()):
            return [folder]
        why = "is not a volume" if folder.is_file() else "does not exist"
        raise ConfigError(
            f"{folder} {why}; give a file with one of the endings {', '.join(SUFFIXES)}, or a "
            "directory of such files."
        )
    found = [path for path in files_below(folder) if path.name.lower().endswith(SUFFIXES)]
    if not found:
        raise ConfigError(
            f"{folder} contains no volume ({', '.join(SUFFIXES)}); give the directory of the label "
            "files."
        )
    return found


def pair(predictions: Path, references: Path) -> Pairs:
    """Pair predictions with references by name.

    Two files are a pair whatever their names are. In directories, the name is that of the file, or
    the file's without a final word such as "_seg", "_pred" or nnU-Net's "_0000", or the relative
    path, or the directory of the file if each file has its own; of these, the one that is unique
    and pairs most files.

    Args:
        predictions: a file or a directory.
        references: a file or a directory, as `predictions`.

    Raises:
        ConfigError: a path has no volumes, or no name matches.
    """
    own, wanted = volumes(predictions), volumes(references)
    if predictions.is_dir() != references.is_dir():
        raise ConfigError(
            f"{predictions} and {references} are a file and a directory; give two files or two "
            "directories."
        )
    if predictions.resolve() == references.resolve():
        raise ConfigError(f"{predictions} is given as prediction and as reference; give both.")
    if not predictions.is_dir():
        return Pairs({stem(references): (predictions, references)})
    best: tuple[dict[str, Path], dict[str, Path]] | None = None
    clash: tuple[str, list[Path]] | None = None
    for spells in _SPELLINGS:
        sides = []
        for spell, root, files in zip(
            spells, (predictions, references), (own, wanted), strict=True
        ):
            named: dict[str, list[Path]] = {}
            for file in files:
                named.setdefault(spell(file, root), []).append(file)
            twice = next(((name, same) for name, same in named.items() if len(same) > 1), None)
            clash = clash or (twice if spell is _stem else None)
            if twice is None:
                sides.append({name: same[0] for name, same in named.items()})
        if len(sides) == 2:
            matched = len(sides[0].keys() & sides[1].keys())
            if matched and (best is None or matched > len(best[0].keys() & best[1].keys())):
                best = sides[0], sides[1]
    if best is None:
        if clash is not None:
            name, same = clash
            raise ConfigError(
                f"{same[0]} and {same[1]} have the same name '{name}'; give a directory that "
                "contains each case once."
            )
        raise ConfigError(
            f"No file in {predictions} has the name of a reference in {references} (such as "
            f"{own[0].name} and {wanted[0].name}); give corresponding files the same name."
        )
    cases = {name: (best[0].get(name), best[1][name]) for name in sorted(best[1])}
    spare = [file for name, file in sorted(best[0].items()) if name not in best[1]]
    return Pairs(cases, tuple(spare))


def _stem(file: Path, root: Path) -> str:
    return composed(stem(file))


def _plain(file: Path, root: Path) -> str:
    name = _stem(file, root)
    while (shorter := _ENDING.sub("", name)) and shorter != name:
        name = shorter
    return name


def _relative(file: Path, root: Path) -> str:
    return composed((file.parent / stem(file)).relative_to(root).as_posix())


def _folder(file: Path, root: Path) -> str:
    """Return the file's directory; of files in the root, which is no case, their path."""
    inner = file.parent.relative_to(root)
    return composed(inner.as_posix()) if inner.parts else _relative(file, root) + file.suffix


# How predictions and references are named; earlier ones win if they pair as many files.
_SPELLINGS = (
    (_stem, _stem),
    (_plain, _plain),
    (_relative, _relative),
    (_folder, _folder),
    (_folder, _stem),
    (_stem, _folder),
)


def match(predictions: Path, cases: Sequence[Case]) -> tuple[dict[str, Path], list[Path]]:
    """Find the predictions of a dataset's cases, by case id, nnU-Net's name or the image's name.

    Args:
        predictions: directory of label files, at any depth.
        cases: cases of one domain.

    Returns:
        Case id → prediction, and the files that match no case.

    Raises:
        ConfigError: the directory has no volumes, or two files are predictions of one case.
    """
    names: dict[str, set[str]] = {}
    for case in cases:
        own = {case.id, case.id.removeprefix(f"{case.domain}_"), stem(case.image)}
        for name in own | {_ENDING.sub("", stem(case.image))}:
            names.setdefault(composed(name), set()).add(case.id)
    names = {name: ids for name, ids in names.items() if len(ids) == 1}
    names |= {composed(case.id): {case.id} for case in cases}
    found: dict[str, Path] = {}
    spare = []
    for file in volumes(predictions):
        known = names.get(_stem(file, predictions)) or names.get(_plain(file, predictions))
        if known is None:
            spare.append(file)
            continue
        (case_id,) = known
        if case_id in found:
            raise ConfigError(
                f"{found[case_id]} and {file} are predictions of the same case '{case_id}'; give a "
                "directory that contains each case once."
            )
        found[case_id] = file
    return found, spare


# -- classes --------------------------------------------------------------------------------------


def as_structures(values: Mapping[str, tuple[int, ...]]) -> tuple[Structure, ...]:
    """Return structures from names and label values."""
    return tuple(Structure(name, name, own, "#808080") for name, own in values.items())


def described(predictions: Path, references: Path) -> Classes | None:
    """Read the classes from nnU-Net's `dataset.json`; None if there is none.

    It is searched beside the references, then beside the predictions, and in the directories above,
    as in `labelsTr` and `fold_0/validation`.

    Raises:
        ConfigError: the file is invalid.
    """
    for place, depth in ((references, 2), (predictions, 3)):
        start = place if place.is_dir() else place.parent
        for folder in (start, *Path(os.path.abspath(start)).parents)[:depth]:
            if (folder / DESCRIPTION).is_file():
                return nnunet_classes(folder / DESCRIPTION)
    return None


def nnunet_classes(file: Path) -> Classes:
    """Read labels, regions and the ignore label of an nnU-Net `dataset.json`, version 1 or 2.

    Raises:
        ConfigError: the file cannot be read, or has no labels.
    """
    try:
        values, ignored = nnunet_values(file.parent), nnunet_unannotated(file.parent)
    except DataError as error:
        raise ConfigError(
            f"{file} has no readable labels of nnU-Net; repair it, or give --structures."
        ) from error
    if not values:
        raise ConfigError(f"{file} has no label besides the background; give --structures.")
    fix = "relabel the file, or give --structures"
    return Classes(as_structures(values), ignored, f"labels of {file}", fix)


def _values_found(files: Iterable[tuple[Path | None, Path]], reading: Reading) -> Classes:
    """Make every label value of the files a class."""
    found: set[int] = set()
    for path in (path for pair in files for path in pair if path is not None):
        found |= values_of(path)
        if len(found) > MOST_VALUES:
            raise DataError(
                f"{path} has more than {MOST_VALUES} label values, as an image has: give label "
                "files, or --structures."
            )
    found -= {0, *reading.ignored_values, *reading.unannotated_values}
    if not found:
        raise DataError("No file has a label value other than 0: there is nothing to score.")
    structures = as_structures({str(value): (value,) for value in sorted(found)})
    source = f"label values found ({', '.join(s.name for s in structures)})"
    return Classes(structures, reading.unannotated_values, source)
