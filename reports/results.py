"""The data of a report: rows read from run directories or from a file.

Runs of one task must follow one protocol. Runs that cannot be read, or that a newer run of the same
entry, task and seed replaces, are excluded with a notice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.config import (
    EXTERNAL,
    LOWER,
    UPPER,
    RunConfig,
    external_entry,
    flat_settings,
    is_external,
)
from glua_bench.data.neighbours import Neighbourhood
from glua_bench.documents import load_json
from glua_bench.errors import ConfigError, UserError
from glua_bench.files import write_json
from glua_bench.identity import digest
from glua_bench.records.naming import label_stamps
from glua_bench.records.run_directory import RunDirectory, list_runs, unsealed_note
from glua_bench.registry import Registry
from glua_bench.reports import comparison, statistics
from glua_bench.reports.statistics import counted
from glua_bench.scoring.metrics import METRICS, PRIMARY, SPACING

TEXTS = ("case", "structure", "selector")
# Columns of every run; metrics other than the primary one may be newer than the run.
MEASURED = [
    *("case", "structure", PRIMARY.name),
    *("missed", "reference_ml", "prediction_ml", "selector", "step"),
]
KEY = ["task", "entry", "seed"]
NEEDED = [*MEASURED, *KEY, "run", "method", "dataset", "direction", "seconds"]
DEFAULTS = {  # of columns that rows of older versions lack
    "settings": "{}",
    "config": "{}",
    "base": "",
    "variant": "",
    "protocol": "{}",
    "commit": "",
    "device": "",
    "code": "",
    "labels": "",
    "labels_reason": "",
    "scenario": "uda",
    "augmentation": "geometric",
    "peak_memory_mib": math.nan,
    "note": "",
    "seal": "",
    statistics.REPEAT: 0,
    **dict.fromkeys(SPACING, math.nan),
}
# Newer runs replace older ones despite these.
VERSIONED = ("data", "distances", "protocol", "caveat")
PROTOCOL_DEFAULTS = {"slices": "1"}  # of entries that protocols of older versions lack


@dataclass
class Results:
    """The runs of a report.

    Attributes:
        rows: per run, case, structure and selector: the columns of `cases.parquet`, and entry
            (displayed name), base (entry without changed settings), config (the method's settings
            as JSON), settings (those that differ from the defaults), variant (the method's name
            for these settings), task, protocol (JSON), seconds, peak_memory_mib, commit, code,
            labels and labels_reason (see `label_stamps`), device, note (of external entries: where
            they come from).
        checkpoints: entry, task, seed, run, selector, step, score: scores of all candidates; empty
            for rows from a file.
        directories: run id → directory; empty for rows from a file.
        notices: one sentence per caveat, e.g. excluded runs.
        plugins: files with further methods.
        repeats: rows of repeats, i.e. of runs whose initial weights were perturbed in their last
            bits (perturbation 1, 2, …). They are used for the column "last bits" only.
    """

    rows: pd.DataFrame
    checkpoints: pd.DataFrame
    directories: Mapping[str, RunDirectory] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    plugins: Sequence[Path] = ()
    repeats: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def tasks(self) -> list[str]:
        """The sorted names of the tasks."""
        return sorted(self.rows["task"].unique())

    def declared(self, method: str) -> tuple[list[str], list[str]]:
        """Return a method's declared variants and parts; empty lists if it is not installed."""
        try:
            loaded: Any = Registry("method", self.plugins).load(method)
        except UserError:
            return [], []
        return list(loaded.variants()), list(loaded.parts)

    def chosen_by(self, selector: str) -> pd.DataFrame:
        """Return the rows of one selector."""
        return self.rows[self.rows["selector"] == selector]

    def of(self, task: str, selector: str = "last") -> pd.DataFrame:
        """Return the rows of one task and selector."""
        rows = self.chosen_by(selector)
        return rows[rows["task"] == task]

    def with_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Append the repeats of the entries to ordinary rows of one selector."""
        if self.repeats.empty:
            return rows
        own = self.repeats
        for name in ("task", "entry", "selector"):
            own = own[own[name].isin(rows[name].unique())]
        return pd.concat([rows, own], ignore_index=True)


def from_runs(
    runs_root: Path,
    where: Mapping[str, Sequence[str]] | None = None,
    plugins: Sequence[Path] = (),
    warn: Callable[[str], None] = lambda text: None,
    pooled: bool = True,
) -> Results:
    """Read the finished runs of a directory.

    Args:
        runs_root: directory of all runs, or a file of `record` that selects some of them.
        where: setting → allowed values, as text.
        plugins: files with further methods.
        warn: receives the notices.
        pooled: check that the runs of one task can stand in one table.

    Raises:
        UserError: there is no finished run, or runs of one task follow different protocols.
    """
    recorded: dict[str, str] = {}
    if runs_root.is_file():
        recorded, runs_root = _recorded(runs_root), runs_root.resolve().parent.parent
    notices: list[str] = []
    notice = _noticing(notices, warn)
    runs = list_runs(runs_root, lambda text: notice(f"Excluded: {text}"), recorded)
    if not runs and not notices:
        raise ConfigError(
            f"{runs_root} has no runs; make some with `glua-bench compare`, or name another "
            "directory with --runs."
        )
    damaged = {run.id: run.damage for run in runs if run.damage is not None}
    for text in damaged.values():
        notice(f"Excluded: {text}")
    chosen = [run for run in runs if run.id not in damaged and _matches(run, where or {})]
    if runs and not chosen and not damaged:
        raise ConfigError(
            f"None of the {len(runs)} runs in {runs_root} matches --where "
            f"{_where_text(where or {})}; omit it to report all runs."
        )
    gone = len(recorded) - len({run.id for run in runs}) if recorded else 0
    if gone:
        notice(f"{counted(gone, 'run')} of the comparison missing in {runs_root}.")
    done: list[RunDirectory] = []
    left: list[RunDirectory] = []
    for run in chosen:
        (done if run.done else left).append(run)
    failed = sum(run.failed is not None for run in left)
    for count, state in ((failed, "failed"), (len(left) - failed, "unfinished")):
        if count:
            notice(f"{counted(count, f'{state} run')} excluded.")
    records = []
    for run in done:
        try:
            records.append(_read(run))
        except UserError as error:
            notice(f"Excluded: {error}")
    lines = _lines(records, notice, recorded)
    if lines.empty:
        raise ConfigError(
            f"No run in {runs_root} is finished and readable; see the warnings, or repeat failed "
            "runs with `glua-bench compare --retry-failed`."
        )
    found = _assemble(records, lines, notice, notices, plugins)
    if note := unsealed_note(found.directories.values()):
        notice(note)
    if pooled:
        _check(found, notice)
    return found


def record(
    runs_root: Path,
    title: str,
    runs: Iterable[RunDirectory],
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write the ids of compared runs to a file, for a report of these runs only.

    Args:
        runs_root: directory of all runs.
        title: e.g. "compare glua, sifa".
        runs: the runs.
        names: id → entry of a comparison that names its entries; by default, the entry of a run is
            derived from its settings.

    Returns:
        The file in `runs_root / "comparisons"`; equal runs and names give the same file.

    Raises:
        RunFailure: the file cannot be written.
    """
    ids = sorted(run.id for run in runs)
    name = re.sub(r"[^\w.+-]+", "_", title)[:60].strip("_")
    content = {"title": title, "runs": ids} | ({"entries": dict(names)} if names else {})
    key = digest([ids, dict(names)] if names else ids)
    path = runs_root / "comparisons" / f"{name}_{key[:6]}.json"
    write_json(path, content, "--runs")
    return path


def _recorded(path: Path) -> dict[str, str]:
    """Return the run ids in a file of `record`, with their entries; "" where they have no name."""
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        return {**dict.fromkeys(content["runs"], ""), **content.get("entries", {})}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a comparison; give the directory of all runs, or the file in its "
            "`comparisons` that `glua-bench compare` printed."
        ) from error


def from_rows(
    path: Path,
    where: Mapping[str, Sequence[str]] | None = None,
    plugins: Sequence[Path] = (),
    warn: Callable[[str], None] = lambda text: None,
    pooled: bool = True,
) -> Results:
    """Read the rows of a report (`rows.parquet`), without checkpoint scores and pictures.

    Args:
        path: the file.
        where: column → allowed values, as text.
        plugins: files with further methods.
        warn: receives the notices.
        pooled: as in `from_runs`.

    Raises:
        UserError: the file cannot be read or lacks a column, or protocols are mixed.
    """
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as Parquet ({type(error).__name__}); give a rows.parquet of "
            "`glua-bench report`."
        ) from error
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise ConfigError(
            f"{path} has no column {missing[0]}; give a rows.parquet of `glua-bench report`."
        )
    rows = rows.assign(**{name: v for name, v in DEFAULTS.items() if name not in rows})
    rows["base"] = rows["base"].where(rows["base"] != "", rows["entry"])
    for name, values in (where or {}).items():
        if name not in rows:
            raise ConfigError(
                f"--where {name}: {path} has no such column; use one of "
                f"{', '.join(sorted(rows.columns))}."
            )
        rows = rows[rows[name].astype(str).isin(values)]
    if rows.empty:
        raise ConfigError(f"{path} has no rows that match --where {_where_text(where)}; omit it.")
    notices: list[str] = []
    notice = _noticing(notices, warn)
    own, repeats = _parted(rows.reset_index(drop=True), notice)
    columns = ["selector", "step", "score", "run", "entry", "task", "seed"]
    checkpoints = pd.DataFrame(columns=columns)
    found = Results(own, checkpoints, notices=notices, plugins=plugins, repeats=repeats)
    if pooled:
        _check(found, notice)
    return found


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of entries at default settings; all rows if only bounds have these.

    Variants of a method belong to its ablation; beside other methods they would be selected post
    hoc.
    """
    own = rows[rows["settings"] == "{}"]
    bases = {str(base) for base in own["base"]} - {LOWER, UPPER}
    return own if any(not is_external(base) for base in bases) else rows


def parse_where(texts: Iterable[str]) -> dict[str, list[str]]:
    """Parse `NAME=V1,V2` of `--where`; values of one name are merged.

    Raises:
        ConfigError: a text has no `=`.
    """
    parsed: dict[str, list[str]] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--where {text} has no value; write it as in --where steps=500.")
        parsed.setdefault(name.strip(), []).extend(v.strip() for v in values.split(","))
    return parsed


# -- one run -----------------------------------------------------------------------------------


@dataclass
class _Record:
    run: RunDirectory
    rows: pd.DataFrame
    summary: dict[str, Any]
    environment: dict[str, Any]
    time: str


def _read(run: RunDirectory) -> _Record:
    rows = run.read_cases()
    lacking = [name for name in MEASURED if name not in rows]
    if lacking:
        raise UserError(f"{run.path / 'cases.parquet'} has no column {lacking[0]}; run it again.")
    rows = rows.astype(dict.fromkeys(TEXTS, "category"))  # saves memory with many runs
    environment = run.read_environment()
    if not {"changed", "variant"} <= set(environment):
        raise UserError(f"{run.path / 'environment.json'} has no changed settings; run it again.")
    ended = load_json((run.path / "done").read_text(encoding="utf-8"))["time"]
    columns = list(dict.fromkeys(["case", "structure", *METRICS, *MEASURED, *SPACING]))
    return _Record(run, rows.reindex(columns=columns), run.read_summary(), environment, ended)


def _matches(run: RunDirectory, where: Mapping[str, Sequence[str]]) -> bool:
    if not where:
        return True
    values = {"run": run.id, **flat_settings(run.config.to_dict())}
    values["dataset"] = run.config.fold_name  # as in the rows
    if "code" in where:
        values["code"] = run.read_environment().get("code", "")
    # A setting that is unknown of an external entry does not exclude it.
    unknown = flat_settings(asdict(run.config)) if run.config.external else {}
    for name, allowed in where.items():
        if name not in values and name in unknown:
            continue
        if name not in values:
            if name.startswith("method."):
                return False  # a setting of another method
            raise ConfigError(
                f"--where {name}: runs have no such setting; use one of code, "
                f"{', '.join(sorted(values))}."
            )
        if str(values[name]) not in allowed:
            return False
    return True


def _protocol(record: _Record) -> dict[str, Any]:
    """Return the settings that must be equal within one table; none of external entries.

    The training data of the upper bound differ by design and are excluded.
    """
    config = record.run.config
    if config.external:
        return {}
    depth = config.grid.slice_spacing
    values = {
        "preset": config.preset,
        "grid": f"{config.grid.size} pixels of {config.grid.spacing:g} mm"
        + (f", slices of {depth:g} mm" if depth else ""),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "segmenter": ", ".join(
            f"{name} {value}" if name != "name" else str(value)
            for name, value in flat_settings(config.to_dict()["segmenter"]).items()
            if value is not False
        ),
        "precision": config.precision,
        "slices": str(Neighbourhood.of(config)),
        "selector": config.selectors[0],
        "distances": record.environment.get("distances", ""),
    }
    if record.environment.get("protocol"):
        values["protocol"] = record.environment["protocol"]
    if record.environment.get("caveat"):
        values["caveat"] = record.environment["caveat"]
    if not config.privileged:
        values["data"] = record.environment.get("data", {}).get("train", "")
    return values


# -- names -------------------------------------------------------------------------------------


def _base(config: RunConfig) -> str:
    if config.external:
        return external_entry(config.method, config.privileged)
    if config.privileged and config.method == LOWER:
        name = UPPER
    else:
        name = config.method + (" (supervised)" if config.privileged else "")
    if config.augmentation == "photometric":
        return f"{name} + photometric"
    return name if config.augmentation == "geometric" else f"{name}, no augmentation"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- all runs ----------------------------------------------------------------------------------


def _lines(
    records: Sequence[_Record], notice: Callable[[str], None], names: Mapping[str, str]
) -> pd.DataFrame:
    """Describe each run in one line; keep the newest run of each entry, task and seed.

    A run with a name from a comparison file is an entry of its own instead of a method's variant.
    """
    newest: dict[tuple[str, str, int, int, str], dict[str, Any]] = {}
    replaced = 0
    for record in sorted(records, key=lambda record: (record.time, record.run.id)):
        config = record.run.config
        changes = record.environment["changed"]
        base = _base(config)
        entry = ", ".join([base, *(f"{n} = {_shown(v)}" for n, v in changes.items())])
        if named := names.get(record.run.id):
            entry, base, changes = named, named, {}
        task = f"{config.fold_name} {config.direction}"
        state = record.environment.get("source") or record.environment.get("git") or {}
        repeat = int(getattr(config, statistics.REPEAT, 0))
        # Runs with other budgets, grids or slices do not replace each other; `_check` refuses them.
        protocol = _protocol(record)
        setup = {k: v for k, v in protocol.items() if k not in VERSIONED}
        key = task, entry, config.seed, repeat, json.dumps(setup)
        replaced += key in newest
        newest[key] = {
            "run": record.run.id,
            "entry": entry,
            "base": base,
            "settings": json.dumps(changes, sort_keys=True),
            "config": json.dumps(dict(config.method_config), sort_keys=True),
            "variant": record.environment["variant"],
            "task": task,
            "protocol": json.dumps(protocol),
            "method": config.method,
            "dataset": config.fold_name,
            "direction": config.direction,
            "scenario": config.scenario,
            "augmentation": "" if config.external else config.augmentation,
            "seed": config.seed,
            statistics.REPEAT: repeat,
            "peak_memory_mib": float(record.summary["peak_memory_mib"]),
            "commit": str(state.get("commit", ""))[:10] + ("+" if state.get("dirty") else ""),
            **{n: str(record.environment.get(n, "")) for n in ("code", "labels", "labels_reason")},
            "device": "" if config.external else _device(record.environment),
            "note": _note(record.environment),
            "seal": "sealed" if record.run.sealed else "NOT SEALED",
        }
    if replaced:
        notice(
            f"{counted(replaced, 'run')} excluded: replaced by newer runs of the same entry, task "
            "and seed with other code or data; select with --where code=CODE."
        )
    return pd.DataFrame(newest.values())


def _assemble(
    records: Sequence[_Record],
    lines: pd.DataFrame,
    notice: Callable[[str], None],
    notices: list[str],
    plugins: Sequence[Path],
) -> Results:
    """Collect the rows and scores of the described runs."""
    by_run = {record.run.id: record for record in records}
    kept = [by_run[run] for run in lines["run"]]
    lines["seconds"] = comparison.costs([(r.run.config, r.summary) for r in kept])
    checkpoints = []
    for position, record in enumerate(kept):
        if lines[statistics.REPEAT].iloc[position]:
            continue
        for selector, scores in record.summary.get("selector_scores", {}).items():
            checkpoints += [(position, selector, int(s), float(v)) for s, v in scores.items()]
    for name in TEXTS:
        # Categories in the order of appearance, i.e. the dataset's.
        values = dict.fromkeys(v for record in kept for v in record.rows[name].unique())
        for record in kept:
            record.rows[name] = record.rows[name].cat.set_categories(list(values))
    rows = pd.concat([record.rows for record in kept], ignore_index=True)
    rows["line"] = np.repeat(np.arange(len(kept)), [len(record.rows) for record in kept])
    rows = comparison.for_every_selector(rows)
    rows["selector"] = pd.Categorical(rows["selector"], rows["selector"].unique())
    own, repeats = _parted(_with_runs(rows, lines), notice)
    return Results(
        own,
        _with_runs(
            # The type of an empty frame, without candidates, is object.
            pd.DataFrame(checkpoints, columns=["line", "selector", "step", "score"]).astype(
                {"line": int}
            ),
            lines[["run", "entry", "task", "seed"]],
        ),
        {record.run.id: record.run for record in kept},
        notices,
        plugins,
        repeats,
    )


def _parted(rows: pd.DataFrame, notice: Callable[[str], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split rows into ordinary ones and repeats of these runs by the same code.

    Raises:
        ConfigError: there are only repeats.
    """
    own = statistics.ordinary(rows)
    if own.empty:
        raise ConfigError(
            f"There are only repeats, without the runs that they repeat; omit {statistics.REPEAT} "
            "from --where, or make those runs (the same command without --set "
            f"{statistics.REPEAT}=…)."
        )
    if len(own) == len(rows):
        return own, rows.iloc[:0]
    keys = ["task", "entry", "seed", "code"]
    repeats = rows[rows[statistics.REPEAT] != 0]
    known = set(own[keys].drop_duplicates().astype(str).itertuples(index=False, name=None))
    per_run = repeats.drop_duplicates("run")
    found = per_run[keys].astype(str).itertuples(index=False, name=None)
    lost = {run for run, key in zip(per_run["run"], found, strict=True) if key not in known}
    if lost:
        notice(
            f"{counted(len(lost), 'repeat')} excluded: no run with the same code, entry, task and "
            "seed."
        )
    return own.reset_index(drop=True), repeats[~repeats["run"].isin(lost)].reset_index(drop=True)


def _with_runs(rows: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of its run to each row; texts become categories to save memory."""
    position = rows.pop("line").to_numpy()
    for name in lines:
        values = lines[name]
        if pd.api.types.is_numeric_dtype(values):
            rows[name] = values.to_numpy()[position]
        else:
            category = pd.Categorical(values)
            rows[name] = pd.Categorical.from_codes(category.codes[position], dtype=category.dtype)
    return rows


def _note(environment: Mapping[str, Any]) -> str:
    """Return where an external entry comes from, with a digest of its files; "" for a run."""
    found = environment.get(EXTERNAL)
    if found is None:
        return ""
    files = digest({case: file["sha256"] for case, file in found["predictions"].items()})
    return f"{found['note'] or 'no note'} (files {files})"


def _device(environment: Mapping[str, Any]) -> str:
    if str(environment.get("device", "")).startswith("cuda"):
        return next(iter(environment.get("gpus", [])), "GPU")
    threads = environment.get("threads")
    return "CPU" if threads is None else f"CPU, {counted(threads, 'thread')}"


# -- comparability -----------------------------------------------------------------------------


def _check(found: Results, notice: Callable[[str], None]) -> None:
    """Reject mixed protocols; add notices on unpaired entries and missing tests.

    Raises:
        ConfigError: the runs of a task follow different protocols.
    """
    for task in found.tasks:
        own = found.rows[found.rows["task"] == task]
        per_run = own.drop_duplicates("run")
        every = own
        if len(found.repeats):
            every = pd.concat([own, found.repeats[found.repeats["task"] == task]])
        _one_protocol(task, every.drop_duplicates("run")["protocol"])
        _one_test_set(task, every)
        twice = per_run[per_run.duplicated(["entry", "seed"])]
        if len(twice):
            raise ConfigError(
                f"{task} has two runs of {twice.iloc[0]['entry']} with seed "
                f"{twice.iloc[0]['seed']}; select one with --where run=ID or code=CODE."
            )
        devices = per_run.loc[per_run["device"] != "", "device"].nunique()
        if devices > 1:
            notice(f"{task}: runs on {devices} devices; compare times within one device only.")
        for entry, part in per_run[[is_external(str(entry)) for entry in per_run["entry"]]].groupby(
            "entry", observed=True
        ):
            notes = "; ".join(
                f"seed {seed}: {note}" if len(part) > 1 else str(note)
                for seed, note in zip(part["seed"], part["note"], strict=True)
            )
            notice(
                f"{task}: {entry} was imported: {notes}. Its training data, budget, checkpoint "
                "selection and seeds are not known to glua-bench."
            )
        for stamp in label_stamps(per_run.to_dict("records")):
            notice(f"{task}: {stamp}")
        mixed = per_run.groupby("entry", observed=True)["code"].nunique()
        for entry in mixed[mixed > 1].index:
            notice(f"{task}: the seeds of {entry} were run by different versions of the code.")
        first = own["selector"] == own["selector"].iloc[0]
        paired = statistics.design(plain(own[first]))
        for note in paired.notes:
            notice(f"{task}: {note}")
        for caveat in dict.fromkeys(
            json.loads(str(p)).get("caveat") for p in own["protocol"].unique()
        ):
            if caveat:
                notice(f"{task}: {caveat}.")
        why = statistics.untested(len(paired.seeds), len(paired.cases))
        if why:
            notice(f"{task}: {why}")


def _one_protocol(task: str, protocols: pd.Series) -> None:
    counts = protocols.astype(str).value_counts()
    values: dict[str, dict[Any, int]] = {}
    for text, count in counts.items():
        if text == "{}":  # external entries, of which none is known
            continue
        for name, value in {**PROTOCOL_DEFAULTS, **json.loads(str(text))}.items():
            if name == "caveat":  # a statement about the files, not a choice
                continue
            seen = values.setdefault(name, {})
            seen[value] = seen.get(value, 0) + int(count)
    name, seen = next(((n, seen) for n, seen in values.items() if len(seen) > 1), ("", {}))
    if not name:
        return
    texts = " and ".join(f"{value} in {counted(count, 'run')}" for value, count in seen.items())
    most = max(seen, key=lambda value: seen[value])
    fix = {
        **{key: f"--where {key}={most}" for key in ("steps", "preset", "batch_size", "precision")},
        "grid": "--where grid.size=… and grid.spacing=…",
        "segmenter": "--where segmenter.name=… and segmenter.width=…",
        "slices": "--where slices=… and slice_distance=…",
        "data": "--where code=CODE, or remove the runs on older data",
    }.get(name, "--where")
    raise ConfigError(
        f"{task} mixes runs of different protocols, which cannot be averaged: {name} is {texts}; "
        f"select with {fix}."
    )


def _one_test_set(task: str, rows: pd.DataFrame) -> None:
    """Reject different test sets, recognized by the volumes of the references."""
    first = rows.drop_duplicates(["run", "case", "structure"])
    sizes = first.groupby(["case", "structure"], observed=True)["reference_ml"]
    spread = sizes.max() - sizes.min()
    wrong = spread[spread > 1e-6]
    cases = first.groupby("run", observed=True)["case"].nunique()
    difference = ""
    if len(wrong):
        difference = f"case {wrong.index[0][0]} has references of different sizes"
    elif cases.nunique() > 1:
        difference = f"runs on {cases.min()} and on {cases.max()} cases"
    if difference:
        raise ConfigError(
            f"{task} mixes different test sets: {difference}; select runs on the same data with "
            "--where code=CODE, or another --runs."
        )


def _noticing(notices: list[str], warn: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that collects notices for the page and warns."""

    def notice(text: str) -> None:
        notices.append(text)
        warn(text)

    return notice


def _where_text(where: Mapping[str, Sequence[str]] | None) -> str:
    return " ".join(f"{name}={','.join(values)}" for name, values in (where or {}).items())
