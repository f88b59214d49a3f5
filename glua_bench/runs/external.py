"""Import predictions of other tools as finished runs, stamped external.

The run directory holds what a trained run's does, without checkpoints, log, steps and times. Its
predictions are scored as a run's are, on the voxels of the files, and written with the dataset's
label values. What is not known of their training is not recorded (`config.STATED`).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from glua_bench import __version__
from glua_bench.config import EXTERNAL, EXTERNAL_UPPER, UPPER, RunConfig, external_entry
from glua_bench.console import Progress, next_command
from glua_bench.data.cache import file_digest, fingerprint
from glua_bench.data.formats import open_volume
from glua_bench.data.geometry import frame, voxel_ml
from glua_bench.data.parallel import map_cases
from glua_bench.data.volumes import (
    Names,
    label_values,
    read_label_volume,
    save_volume,
    values_of,
)
from glua_bench.documents import nearest
from glua_bench.errors import ConfigError, DataError, UserError, without_password
from glua_bench.files import new_folder
from glua_bench.identity import DATA_DIGITS, SCORING, code_digest, digest
from glua_bench.inspection.nnunet import ENDING, export_name
from glua_bench.paths import matching, name_fault
from glua_bench.records.environment import environment
from glua_bench.records.run_directory import RunDirectory, check_predictions
from glua_bench.registry import Registry
from glua_bench.runs import carried
from glua_bench.runs.plan import roles
from glua_bench.runs.prediction import stated
from glua_bench.scoring.evaluation import score_case, summarise
from glua_bench.scoring.files import Pairs, ScoredFiles, match, pair, pairs_to_score, score, volumes
from glua_bench.task import Case, Dataset, DomainView, Structure, fold_name, parse_direction

VALUES = ("classes", "dataset")  # what label values of predictions mean


@dataclass(frozen=True)
class Import:
    """What to import.

    Attributes:
        name: name of the entry.
        dataset: the dataset whose test cases are predicted.
        predictions: directory of label files.
        direction: "source-target"; None is the dataset's first.
        seed: seed under which the entry is listed.
        values: "classes" (1 is the first structure, as `data export` writes), "dataset" (the
            dataset's label values), or None if the files show which.
        privileged: True if labels of the target were used in training.
        note: where the predictions come from; "" takes what `predict` or a run states.
        runs_root: directory of all runs.
        plugins: files with further methods and datasets.
        overwrite: replace earlier imports with this name, task and seed.
        jobs: number of processes.
    """

    name: str
    dataset: Dataset
    predictions: Path
    direction: str | None = None
    seed: int = 0
    values: str | None = None
    privileged: bool = False
    note: str = ""
    runs_root: Path = Path("runs")
    plugins: Sequence[Path] = ()
    overwrite: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Imported:
    """Result of `import_predictions`.

    Attributes:
        run: the run directory.
        already_done: True if the same files were imported before.
        values: how label values were read, one of `VALUES`.
        table: mean scores per structure.
        replaced: ids of removed imports.
    """

    run: RunDirectory
    already_done: bool
    values: str
    table: pd.DataFrame
    replaced: Sequence[str] = ()


@dataclass(frozen=True)
class _Job:
    case: Case
    file: Path
    view: DomainView
    predicted: DomainView
    names: Names
    target: Path


def import_predictions(
    given: Import, progress: Progress, report: Callable[[str], None] = lambda line: None
) -> Imported:
    """Score predictions of a dataset's test cases and record them as a finished run.

    Args:
        given: what to import.
        progress: progress display.
        report: receives lines about the preparation of the dataset.

    Raises:
        UserError: the name is taken, a case lacks its prediction, a file matches no test case, has
            another grid or unknown label values, other files have been imported under the same
            name and seed, or the folder says that its model is privileged and `given` does not.
        RunFailure: the run directory cannot be written.
    """
    dataset = given.dataset
    check_name(given.name, given.plugins)
    check_values(given.values)
    volumes(given.predictions)  # before the dataset, which may take long
    check_predictions(given.predictions)
    privileged, note = stated(given.predictions)
    if privileged and not given.privileged:
        raise ConfigError(
            f"{given.predictions} holds predictions of {note}, which was trained on labels of the "
            "target; add --privileged."
        )
    source, target = parse_direction(dataset, given.direction)
    config = RunConfig.from_dict(
        {
            "method": given.name,
            "dataset": dataset.name,
            "direction": f"{source}-{target}",
            "scenario": EXTERNAL_UPPER if given.privileged else EXTERNAL,
            "fold": dataset.fold,
            "seed": given.seed,
        }
    )
    dataset.prepare(report)
    cases = [case for case in roles(config, dataset)["test"] if isinstance(case, Case)]
    files = _matched(given, config, cases)
    view = dataset.view(target)
    values = given.values or _values_of(list(files.values()), view)
    digests = {
        case.id: {"file": files[case.id].name, "sha256": file_digest(files[case.id])}
        for case in cases
    }
    code = f"{__version__}+{code_digest(SCORING)}"
    test = digest(
        [
            fingerprint(cases),
            view.reading.identity(),
            [asdict(structure) for structure in view.structures],
        ],
        DATA_DIGITS,
    )
    predictions = {case: own["sha256"] for case, own in digests.items()}
    run_id = digest([config.to_dict(), predictions, values, test, code])
    run = RunDirectory(given.runs_root, config, run_id)
    if run.done and not given.overwrite:
        return Imported(run, True, values, summarise(run.read_cases()))
    others = _earlier(run, predictions, given.overwrite)
    facts = {
        **environment(),
        "run": run_id,
        "code": code,
        "data": {"test": test},
        "external": {
            "note": without_password(given.note or note),
            "values": values,
            "predictions": digests,
        },
        "privileged": config.privileged,
        "distances": dataset.distance_note,
        "protocol": dataset.protocol,
        "caveat": dataset.caveat(config.direction),
        "device": "",
        "changed": {},
        "variant": "",
    }
    if problem := run.problem:
        with run.lock():
            report(f"{run.path} was damaged ({problem}): its files are now in {run.set_aside()}.")
    final = run.path
    with new_folder(final, "--runs") as folder:
        run.path = folder
        run.start(facts)
        carried.write(folder, carried.facts_of(dataset, (source, target)), dataset.carried())
        rows = _scored(given, cases, files, view, values, run, progress)
        table = summarise(rows)
        run.write_cases(rows)
        run.finish(
            {
                "run": run_id,
                "seconds": math.nan,
                "stage_seconds": {},
                "reused_stages": [],
                "steps": {},
                "peak_memory_mib": math.nan,
                "selector_scores": {},
                "chosen_steps": {},
                "privileged": config.privileged,
                "protocol": dataset.protocol,
                "scores": table.to_dict("records"),
            }
        )
        for other in {*others, *([final] if final.is_dir() else [])}:
            shutil.rmtree(other)
    run.path = final
    return Imported(run, False, values, table, [path.name for path in sorted(others)])


def check_name(name: str, plugins: Sequence[Path] = ()) -> None:
    """Check the name of an entry, which becomes a directory beside those of methods.

    Raises:
        ConfigError: the name is a method's, is reserved, or has characters that are not allowed.
    """
    methods = [entry.name for entry in Registry("method", plugins).entries()]
    if name.casefold() in {own.casefold() for own in (*methods, UPPER)}:
        raise ConfigError(f"The name '{name}' is that of a method; give the entry another name.")
    # As trackers and their copies require.
    if name_fault(name) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"The name '{name}' cannot name a directory; use letters, digits, '-', '_' and '.', "
            "such as nnunet_3d."
        )


# -- files ----------------------------------------------------------------------------------------


def _matched(given: Import, config: RunConfig, cases: Sequence[Case]) -> dict[str, Path]:
    """Find the prediction of every test case.

    Raises:
        ConfigError: a file matches no test case or is in a folder of another domain, or a
            prediction is missing.
    """
    dataset, folder = given.dataset, given.predictions
    task = f"{dataset.fold_name} {config.direction}"
    found, spare = match(folder, cases)
    others = {name for name in dataset.domains() if name != config.target}
    for file in [*found.values(), *spare]:
        domain = _domain_of(file, folder, dataset, others)
        if domain:
            raise ConfigError(
                f"{file} is in a folder of domain '{domain}', but the target of {config.direction} "
                f"is '{config.target}'; give the predictions of '{config.target}', or another "
                "--direction."
            )
    if spare:
        known = {case.id: case for name in dataset.domains() for case in dataset.cases(name)}
        elsewhere, _ = match(folder, [c for c in known.values() if c not in cases])
        case = next((known[own] for own, file in elsewhere.items() if file == spare[0]), None)
        what = f"is case {case.id} of {case.domain} ({case.split})" if case else "matches no case"
        raise ConfigError(
            f"{spare[0]} {what}, not a test case of {task}; remove it from the directory, or name "
            f"it after its case, such as {cases[0].id}{ENDING}."
        )
    missing = [case.id for case in cases if case.id not in found]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ConfigError(
            f"{folder} has no prediction for {len(missing)} of {len(cases)} test cases of {task} "
            f"({shown}); add them, e.g. as {missing[0]}{ENDING}: a table compares all test cases."
        )
    return found


def _domain_of(file: Path, root: Path, dataset: Dataset, others: set[str]) -> str:
    """Return the other domain that a folder of a file is named after; "" if there is none."""
    parts = [root.resolve().name]
    if root.is_dir():
        parts += file.relative_to(root).parent.parts
    for domain in sorted(others):
        # Folders that `data export` names, also above the predictions.
        exported = export_name(dataset, domain)
        above = [re.sub(r"^Dataset\d{3}_", "", part) for part in root.resolve().parts[:-1]]
        inner = [re.sub(r"^Dataset\d{3}_", "", part) for part in parts]
        if domain in inner or exported in (*inner, *above):
            return domain
    return ""


def _values_of(files: Sequence[Path], view: DomainView) -> str:
    """Determine whether label values of predictions are class indices or the dataset's.

    Raises:
        ConfigError: they can be both, with different meanings.
        DataError: a file has values that are neither.
    """
    indices = {index: index for index in range(len(view.structures) + 1)}
    own = dict.fromkeys((0, *view.reading.ignored_values), 0)
    own |= {v: i for i, s in enumerate(view.structures, start=1) for v in s.values}
    seen: set[int] = set()
    fits = dict.fromkeys(VALUES, True)
    for path in files:
        found = values_of(path)
        seen |= found
        fits = {"classes": seen <= indices.keys(), "dataset": seen <= own.keys()}
        if not any(fits.values()):
            strays = sorted(found - indices.keys() or found - own.keys())
            raise DataError(
                f"{path} has label value(s) {', '.join(map(str, strays[:5]))}, but predictions "
                f"have the class indices {_meaning(view.structures, True)}, or the dataset's label "
                f"values {_meaning(view.structures, False)}: relabel the file."
            )
    if all(fits.values()) and any(indices[value] != own[value] for value in seen):
        raise ConfigError(
            f"The label values {', '.join(map(str, sorted(seen)))} of {files[0].parent} can be "
            f"class indices ({_meaning(view.structures, True)}) or the dataset's label values "
            f"({_meaning(view.structures, False)}); give --values classes or --values dataset."
        )
    return next(name for name, fit in fits.items() if fit)


def _meaning(structures: Sequence[Structure], indices: bool) -> str:
    """Describe label values, e.g. "1 = MYO, 2 = LV"."""
    return ", ".join(
        f"{index if indices else '/'.join(map(str, own.values))} = {own.name}"
        for index, own in enumerate(structures, start=1)
    )


def _view_of(values: str, view: DomainView, image: str = "image") -> tuple[DomainView, Names]:
    """Return how predictions are read, and the words of messages about them."""
    predicted = view.of_predictions()
    if values == "classes":
        indexed = [replace(s, values=(i,)) for i, s in enumerate(view.structures, start=1)]
        reading = replace(predicted.reading, ignored_values=())
        predicted = DomainView(view.name, reading, tuple(indexed))
    meaning = _meaning(view.structures, values == "classes")
    return predicted, Names(image, f"other than {meaning}: relabel the file, or give --values")


def _earlier(run: RunDirectory, predictions: Mapping[str, str], overwrite: bool) -> list[Path]:
    """Return the imports to replace; those of the same files by other code or data are kept.

    Raises:
        ConfigError: there are imports of other files, and `overwrite` is False.
    """
    config, other = run.config, []
    for earlier in _runs_of(run.runs_root, config.fold_name, config.method):
        if not earlier.config.external:
            raise ConfigError(
                f"{earlier.path.parent} holds runs of a method called '{config.method}'; give the "
                "entry another name."
            )
        own = earlier.config
        if (own.direction, own.seed) != (config.direction, config.seed) or earlier.id == run.id:
            continue
        same = {"predictions": {}} if earlier.damage else provenance(earlier)
        if (
            own == config
            and {c: f["sha256"] for c, f in same["predictions"].items()} == predictions
        ):
            continue
        other.append(earlier.path)
    if other and not overwrite:
        raise ConfigError(
            f"{other[0]} holds other predictions of '{config.method}' with seed {config.seed}; "
            "give --overwrite to replace them, or another --seed to list both."
        )
    return other


def _scored(
    given: Import,
    cases: Sequence[Case],
    files: Mapping[str, Path],
    view: DomainView,
    values: str,
    run: RunDirectory,
    progress: Progress,
) -> pd.DataFrame:
    """Score all cases and write their predictions with the dataset's label values."""
    predicted, names = _view_of(values, view)
    jobs = [
        _Job(case, files[case.id], view, predicted, names, run.predictions / f"{case.id}{ENDING}")
        for case in cases
    ]
    scored = map_cases(_score, jobs, given.jobs, progress, "score")
    frame = pd.DataFrame([row for rows in scored for row in rows])
    return run.own_rows(frame.assign(selector=EXTERNAL, step=math.nan))


def _score(job: _Job) -> list[dict[str, Any]]:
    """Score one case, and write its prediction with the geometry of the image."""
    case, image, structures = job.case, open_volume(job.case.image), job.view.structures
    labels = read_label_volume(job.file, case.image, job.predicted, job.names)
    reference = read_label_volume(case.truth, case.image, job.view)
    affine, spacing, _, _ = frame(image, job.view.reading)
    ml = voxel_ml(affine, spacing, job.view.reading)
    rows = score_case(case, labels, reference, structures, spacing, ml)
    save_volume(job.target, label_values(labels, [s.values[0] for s in structures]), image.forms)
    return rows


# -- scores without an import ---------------------------------------------------------------------


def score_dataset(
    dataset: Dataset,
    predictions: Path,
    references: Path | None = None,
    domain: str | None = None,
    *,
    values: str | None = None,
    only_predicted: bool = False,
    verify: bool = False,
    jobs: int = 1,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Score predictions with the structures of a dataset, against its test cases or other files.

    Args:
        dataset: a dataset.
        predictions: a label file or a directory.
        references: label files with the dataset's label values; None is the labels of the test
            cases of `domain`.
        domain: domain of the files; None is the target of the dataset's first direction.
        values: as for `Import`.
        only_predicted: as for `score_files`.
        verify: as for `score_files`.
        jobs: number of processes.
        report: receives messages, as for `score_files`.
        progress: progress display.

    Returns:
        As `score_files`.

    Raises:
        UserError: as for `score_files`.
    """
    check_values(values)
    if domain is None:
        domain = parse_direction(dataset, None)[1]
    elif domain not in dataset.domains():
        raise ConfigError(
            f"Dataset '{dataset.name}' has no domain '{domain}'; use --domain with one of "
            f"{', '.join(dataset.domains())}."
        )
    if references is None:
        dataset.prepare(report)
        cases = {case.id: case for case in dataset.labelled(domain, "test")}
        found, spare = match(predictions, list(cases.values()))
        pairs = Pairs({name: (found.get(name), c.truth) for name, c in cases.items()}, tuple(spare))
        if not found:
            raise ConfigError(
                f"No file in {predictions} has the name of a test case of {dataset.fold_name} "
                f"{domain}; name predictions after cases, such as {next(iter(cases))}{ENDING}."
            )
    else:
        pairs = pair(predictions, references)
        cases = {n: Case(n, domain, own, own, "test", n) for n, (_, own) in pairs.cases.items()}
    pairs = pairs_to_score(pairs, report, only_predicted)
    view = dataset.view(domain)
    given = [file for file, _ in pairs.cases.values() if file is not None]
    values = values or _values_of(given, view)
    report(f"Classes: {dataset.fold_name} {domain}. Predictions: {reading_note(values, view)}.")
    predicted, names = _view_of(values, view, "image" if references is None else "reference")
    work = [
        ScoredFiles(cases[name], file, view, predicted, names, verify)
        for name, (file, _) in pairs.cases.items()
    ]
    return score(work, jobs, progress).drop(columns=["subject", "domain"])


def check_values(values: str | None) -> None:
    """Check the option --values.

    Raises:
        ConfigError: it is unknown.
    """
    if values is not None and values not in VALUES:
        raise ConfigError(f"--values {values} is unknown; use {' or '.join(VALUES)}.")


def reading_note(values: str, view: DomainView) -> str:
    """Describe how label values of predictions are read."""
    kind = "class indices" if values == "classes" else "the dataset's label values"
    return f"{kind} ({_meaning(view.structures, values == 'classes')})"


# -- imported entries -----------------------------------------------------------------------------


def provenance(run: RunDirectory) -> dict[str, Any]:
    """Return what an import records: note, values, and case → name and SHA-256 of its file."""
    return dict(run.read_environment().get("external", {"note": "", "predictions": {}}))


def _runs_of(
    runs_root: Path, dataset: str, name: str, report: Callable[[str], None] = lambda line: None
) -> list[RunDirectory]:
    """Return the readable runs of a dataset (with its fold) and name, the latest finished last."""
    found = []
    for _, file in matching(Path(runs_root) / dataset / name, "*/config.yaml"):
        try:
            found.append(RunDirectory.open(file.parent))
        except UserError as error:
            report(str(error))
    done = {run.id: run.read_json("done")["time"] if run.done else "" for run in found}
    return sorted(found, key=lambda run: done[run.id])


@dataclass(frozen=True)
class Guest:
    """An imported entry in a comparison.

    Attributes:
        entry: name of its row, with its stamp.
        task: name of its column group.
        run: its run directory.
    """

    entry: str
    task: str
    run: RunDirectory


def guests(
    names: Sequence[str],
    tasks: Sequence[tuple[str, int, str]],
    runs_root: Path,
    plugins: Sequence[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> list[Guest]:
    """Find imported entries for a comparison, with all their seeds.

    Args:
        names: names that no method has.
        tasks: dataset, fold and direction of the compared runs.
        runs_root: directory of all runs.
        plugins: files with further methods, for hints.
        report: receives a line for each task that an entry lacks.

    Raises:
        ConfigError: an entry has not been imported for any of the tasks.
    """
    found: list[Guest] = []
    for name in dict.fromkeys(names):
        own: dict[tuple[str, str, int], Guest] = {}
        lacking: list[tuple[str, int, str]] = []
        damaged: list[str] = []
        for dataset, fold, direction in dict.fromkeys(tasks):
            place = fold_name(dataset, fold)
            every = _runs_of(runs_root, place, name, report)
            damaged += [run.damage for run in every if run.damage is not None]
            runs = [
                run
                for run in every
                if run.done and run.config.external and run.config.direction == direction
            ]
            for run in runs:  # the latest replaces earlier ones
                entry = external_entry(name, run.config.privileged)
                key = place, direction, run.config.seed
                own[key] = Guest(entry, f"{place} {direction}", run)
            if not runs:
                lacking.append((dataset, fold, direction))
        if not own and damaged:
            raise ConfigError(damaged[0])
        for text in damaged:
            report(f"Excluded: {text}")
        if not own:
            dataset, fold, direction = lacking[0]
            known = [entry.name for entry in Registry("method", plugins).entries()]
            words = ("glua-bench", "import", name, "--dataset", dataset, "--direction", direction)
            line = next_command(*words, "--predictions", "DIR", plugins=plugins, fold=fold)
            raise ConfigError(
                f"'{name}' is neither a method nor imported for {fold_name(dataset, fold)} "
                f"{direction}: {nearest(name, known)}; to import predictions under this name, run "
                f"`{line}`."
            )
        for dataset, fold, direction in lacking:
            report(f"{name} is not imported for {fold_name(dataset, fold)} {direction}.")
        found += own.values()
    return found
