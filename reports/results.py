"""What a report is made of: one frame of rows, read from run directories or from a file.

Reading decides what may stand in one table. Runs of one task must follow one protocol; a run that
cannot be read, or that a newer run of the same cell replaces, is left out and named.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glua_bench.config import LOWER, UPPER, RunConfig, digest, flat_settings
from glua_bench.data.neighbours import Neighbourhood
from glua_bench.errors import ConfigError, UserError
from glua_bench.files import write_json
from glua_bench.records.run_directory import RunDirectory, list_runs
from glua_bench.registry import Registry
from glua_bench.reports import comparison, statistics
from glua_bench.scoring.metrics import METRICS, PRIMARY

TEXTS = ("case", "structure", "selector")
# What every row of a run has, besides metrics that may be newer than the run.
MEASURED = [
    *("case", "structure", PRIMARY.name),
    *("missed", "reference_ml", "prediction_ml", "selector", "step"),
]
KEY = ["task", "entry", "seed"]
NEEDED = [*MEASURED, *KEY, "run", "method", "dataset", "direction", "seconds"]
FROM_OLDER = {  # columns that rows of an older version lack
    "settings": "{}",
    "config": "{}",
    "base": "",
    "variant": "",
    "protocol": "{}",
    "commit": "",
    "device": "",
    "code": "",
    "scenario": "uda",
    "augmentation": "geometric",
    "peak_memory_mib": math.nan,
    statistics.REPEAT: 0,
}
MAY_AGE = ("data", "distances", "protocol")  # of a protocol: what newer runs may replace
PROTOCOL_OF_OLDER = {"slices": "1"}  # what protocols of an older version do not say, but follow


@dataclass
class Results:
    """The runs of a report.

    Args:
        rows: per run, case, structure and selector: what `cases.parquet` holds, and entry (the
            name in tables), base (the entry without changed settings), config (the method's
            settings, as JSON), settings (what of them differs from its defaults), variant (the
            method's own name for these settings), task, protocol (JSON), seconds,
            peak_memory_mib, commit, code, device.
        checkpoints: entry, task, seed, run, selector, step, score: every selector's judgement of
            every candidate; empty for rows from a file.
        directories: run id → its directory; empty for rows from a file.
        notices: what a reader must know about runs that are not here, a sentence each.
        plugins: files with further methods.
        repeats: the same of repeats: runs of an entry and seed that are here, whose first weights
            were nudged in their last bits (perturbation 1, 2, …). They show how far that moves a
            result, and enter nothing else.
    """

    rows: pd.DataFrame
    checkpoints: pd.DataFrame
    directories: Mapping[str, RunDirectory] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    plugins: Sequence[Path] = ()
    repeats: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of their names."""
        return sorted(self.rows["task"].unique())

    def declared(self, method: str) -> tuple[list[str], list[str]]:
        """A method's declared variants, and the methods that are it with parts left out.

        Loads the method, and torch with it; two empty lists where it is not installed.
        """
        try:
            loaded: Any = Registry("method", self.plugins).load(method)
        except UserError:
            return [], []
        return list(loaded.variants()), list(loaded.parts)

    def chosen_by(self, selector: str) -> pd.DataFrame:
        """Rows of one selector, of all tasks."""
        return self.rows[self.rows["selector"] == selector]

    def of(self, task: str, selector: str = "last") -> pd.DataFrame:
        """Rows of one task and selector."""
        rows = self.chosen_by(selector)
        return rows[rows["task"] == task]

    def with_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows of some entries, and those of their repeats.

        Args:
            rows: ordinary rows of one selector.
        """
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
) -> Results:
    """The finished runs below a directory.

    Args:
        runs_root: the directory of all runs; or a file that `record` wrote in it, whose runs
            alone are taken.
        where: which runs: setting → allowed values, as text.
        plugins: files with further methods.
        warn: receives the sentences that also become notices.

    Raises:
        UserError: there is no finished run, or runs of one task follow different protocols.
    """
    recorded: set[str] = set()
    if runs_root.is_file():
        recorded, runs_root = _recorded(runs_root), runs_root.resolve().parent.parent
    runs = [run for run in list_runs(runs_root) if not recorded or run.id in recorded]
    if not runs:
        raise ConfigError(
            f"There are no runs below {runs_root}; run something first (glua-bench compare), or "
            "name the directory with --runs."
        )
    chosen = [run for run in runs if _matches(run, where or {})]
    if not chosen:
        raise ConfigError(
            f"None of the {len(runs)} runs below {runs_root} fits --where "
            f"{_where_text(where or {})}; `glua-bench report` without it shows what there is."
        )
    notices: list[str] = []
    notice = _noticing(notices, warn)
    gone = len(recorded) - len({run.id for run in runs}) if recorded else 0
    if gone:
        notice(f"{_count(gone, 'run')} of the comparison {_is(gone)} not below {runs_root}.")
    done: list[RunDirectory] = []
    left: list[RunDirectory] = []
    for run in chosen:
        (done if run.done else left).append(run)
    failed = sum(run.failed is not None for run in left)
    for count, what in ((failed, "failed"), (len(left) - failed, "did not end")):
        if count:
            notice(f"{_count(count, 'run')} {what} and {_is(count)} not in this report.")
    records = []
    for run in done:
        try:
            records.append(_read(run))
        except UserError as error:
            notice(f"Left out: {error}")
    lines = _lines(records, notice)
    if lines.empty:
        raise ConfigError(
            f"No run below {runs_root} is finished and readable; look at the warnings, or begin "
            "again what failed with glua-bench compare --retry-failed."
        )
    found = _assemble(records, lines, notice, notices, plugins)
    _check(found, notice)
    return found


def record(runs_root: Path, title: str, runs: Iterable[RunDirectory]) -> Path:
    """Write down which runs were compared, for a report of these and no others.

    Args:
        runs_root: the directory of all runs.
        title: what was asked for, e.g. "compare glua, sifa".
        runs: the runs.

    Returns:
        A file in `comparisons` below that directory, the same for the same runs.

    Raises:
        RunFailure: it cannot be written.
    """
    ids = sorted(run.id for run in runs)
    name = re.sub(r"[^\w.+-]+", "_", title)[:60].strip("_")
    path = runs_root / "comparisons" / f"{name}_{digest(ids)[:6]}.json"
    write_json(path, {"title": title, "runs": ids}, "--runs")
    return path


def _recorded(path: Path) -> set[str]:
    """The ids of runs in a file that `record` wrote.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["runs"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is no file of a comparison; give the directory of all runs, or a file below "
            "its comparisons that `glua-bench compare` named."
        ) from error


def from_rows(
    path: Path,
    where: Mapping[str, Sequence[str]] | None = None,
    plugins: Sequence[Path] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> Results:
    """Rows as a report writes them (`rows.parquet`).

    Such rows hold no scores of checkpoints and no pictures, so a report of them lacks both.

    Args:
        path: the file.
        where: which rows: column → allowed values, as text.
        plugins: files with further methods.
        warn: receives the sentences that also become notices.

    Raises:
        UserError: the file cannot be read or lacks a column, or protocols are mixed.
    """
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as a table of rows ({type(error).__name__}); give a "
            "rows.parquet that `glua-bench report` wrote."
        ) from error
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise ConfigError(
            f"{path} has no column {missing[0]}; give a rows.parquet that `glua-bench report` "
            "wrote."
        )
    for name, value in FROM_OLDER.items():
        if name not in rows:
            rows[name] = value
    rows["base"] = rows["base"].where(rows["base"] != "", rows["entry"])
    for name, values in (where or {}).items():
        if name not in rows:
            raise ConfigError(
                f"--where {name}: {path} has no such column; use one of "
                f"{', '.join(sorted(rows.columns))}."
            )
        rows = rows[rows[name].astype(str).isin(values)]
    if rows.empty:
        raise ConfigError(f"{path} holds no rows that fit; leave --where {_where_text(where)} out.")
    notices: list[str] = []
    notice = _noticing(notices, warn)
    own, repeats = _parted(rows.reset_index(drop=True), notice)
    found = Results(own, _no_checkpoints(), notices=notices, plugins=plugins, repeats=repeats)
    _check(found, notice)
    return found


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of entries at their methods' own settings; all rows where only bounds have these.

    Variants of a method belong to its ablation: beside other methods they would be a choice made
    after looking.
    """
    own = rows[rows["settings"] == "{}"]
    return own if set(own["base"]) - {LOWER, UPPER} else rows


def parse_where(texts: Iterable[str]) -> dict[str, list[str]]:
    """`NAME=V1,V2` of `--where`, several of one name gathered.

    Raises:
        ConfigError: one has no `=`.
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
    for name in TEXTS:  # as numbers into a list of texts: a thousand runs hold few different ones
        rows[name] = rows[name].astype("category")
    environment = run.read_environment()
    if not {"changed", "variant"} <= set(environment):
        raise UserError(f"{run.path / 'environment.json'} has no changed settings; run it again.")
    ended = json.loads((run.path / "done").read_text(encoding="utf-8"))["time"]
    columns = list(dict.fromkeys(["case", "structure", *METRICS, *MEASURED]))
    return _Record(run, rows.reindex(columns=columns), run.read_summary(), environment, ended)


def _matches(run: RunDirectory, where: Mapping[str, Sequence[str]]) -> bool:
    if not where:
        return True
    values = {"run": run.id, **flat_settings(run.config.to_dict())}
    values["dataset"] = run.config.fold_name  # as in the rows
    if "code" in where:
        values["code"] = run.read_environment().get("code", "")
    for name, allowed in where.items():
        if name not in values:
            if name.startswith("method."):
                return False  # another method's setting
            raise ConfigError(
                f"--where {name}: a run has no such setting; use one of code, "
                f"{', '.join(sorted(values))}."
            )
        if str(values[name]) not in allowed:
            return False
    return True


def _protocol(record: _Record) -> dict[str, Any]:
    """What must be equal within one table.

    The training data of the upper bound is another by intent, so it is not among its own.
    """
    config = record.run.config
    values = {
        "preset": config.preset,
        "grid": f"{config.grid.size} pixels of {config.grid.spacing:g} mm, slices of "
        f"{config.grid.slice_spacing:g} mm"
        if config.grid.slice_spacing
        else f"{config.grid.size} pixels of {config.grid.spacing:g} mm",
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
    if not config.privileged:
        values["data"] = record.environment.get("data", {}).get("train", "")
    return values


# -- names -------------------------------------------------------------------------------------


def _base(config: RunConfig) -> str:
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


def _lines(records: Sequence[_Record], notice: Callable[[str], None]) -> pd.DataFrame:
    """One line a run: what it is called and was made of; the newest run of each cell."""
    newest: dict[tuple[str, str, int, int, str], dict[str, Any]] = {}
    replaced = 0
    for record in sorted(records, key=lambda record: (record.time, record.run.id)):
        config = record.run.config
        changes = record.environment["changed"]
        base = _base(config)
        entry = ", ".join([base, *(f"{n} = {_shown(v)}" for n, v in changes.items())])
        task = f"{config.fold_name} {config.direction}"
        state = record.environment.get("source") or record.environment.get("git") or {}
        # Runs of other budgets, grids or slices are not older versions of each other; `_check`
        # refuses them.
        nudged = int(getattr(config, statistics.REPEAT, 0))
        set_up = {k: v for k, v in _protocol(record).items() if k not in MAY_AGE}
        key = task, entry, config.seed, nudged, json.dumps(set_up)
        replaced += key in newest
        newest[key] = {
            "run": record.run.id,
            "entry": entry,
            "base": base,
            "settings": json.dumps(changes, sort_keys=True),
            "config": json.dumps(dict(config.method_config), sort_keys=True),
            "variant": record.environment["variant"],
            "task": task,
            "protocol": json.dumps(_protocol(record)),
            "method": config.method,
            "dataset": config.fold_name,
            "direction": config.direction,
            "scenario": config.scenario,
            "augmentation": config.augmentation,
            "seed": config.seed,
            statistics.REPEAT: nudged,
            "peak_memory_mib": float(record.summary["peak_memory_mib"]),
            "commit": str(state.get("commit", ""))[:10] + ("+" if state.get("dirty") else ""),
            "code": str(record.environment.get("code", "")),
            "device": _device(record.environment),
        }
    if replaced:
        notice(
            f"{_count(replaced, 'run')} {_is(replaced)} left out, since newer ones of the same "
            "entry, task and seed exist (of other code or data); --where code=… chooses."
        )
    return pd.DataFrame(newest.values())


def _assemble(
    records: Sequence[_Record],
    lines: pd.DataFrame,
    notice: Callable[[str], None],
    notices: list[str],
    plugins: Sequence[Path],
) -> Results:
    """The rows and scores of the runs that have a line."""
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
        # One vocabulary, in the order of appearance, which is the dataset's own.
        words = dict.fromkeys(w for record in kept for w in record.rows[name].unique())
        for record in kept:
            record.rows[name] = record.rows[name].cat.set_categories(list(words))
    rows = pd.concat([record.rows for record in kept], ignore_index=True)
    rows["line"] = np.repeat(np.arange(len(kept)), [len(record.rows) for record in kept])
    own, repeats = _parted(_with_runs(rows, lines), notice)
    return Results(
        own,
        _with_runs(
            pd.DataFrame(checkpoints, columns=["line", "selector", "step", "score"]),
            lines[["run", "entry", "task", "seed"]],
        ),
        {record.run.id: record.run for record in kept},
        notices,
        plugins,
        repeats,
    )


def _parted(rows: pd.DataFrame, notice: Callable[[str], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ordinary rows, and those of repeats of the same runs by the same code.

    Raises:
        ConfigError: there are none but repeats.
    """
    own = statistics.ordinary(rows)
    if own.empty:
        raise ConfigError(
            "There are only repeats here, which show how far last bits move a result, and not the "
            f"runs that they repeat; leave {statistics.REPEAT} out of --where, or make those runs "
            f"(the same command without --set {statistics.REPEAT}=…)."
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
            f"{_count(len(lost), 'repeat')} {_is(len(lost))} left out: the run of the same code, "
            "entry, task and seed is not here."
        )
    return own.reset_index(drop=True), repeats[~repeats["run"].isin(lost)].reset_index(drop=True)


def _with_runs(rows: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
    """Rows beside the columns of their run; texts as categories, for a thousand runs' sake."""
    position = rows.pop("line").to_numpy()
    for name in lines:
        values = lines[name]
        if pd.api.types.is_numeric_dtype(values):
            rows[name] = values.to_numpy()[position]
        else:
            category = pd.Categorical(values)
            rows[name] = pd.Categorical.from_codes(category.codes[position], dtype=category.dtype)
    return rows


def _device(environment: Mapping[str, Any]) -> str:
    if str(environment.get("device", "")).startswith("cuda"):
        return next(iter(environment.get("gpus", [])), "GPU")
    threads = environment.get("threads")
    return "CPU" if threads is None else f"CPU, {_count(threads, 'thread')}"


def _no_checkpoints() -> pd.DataFrame:
    columns = ["selector", "step", "score", "run", "entry", "task", "seed"]
    return pd.DataFrame(columns=columns)


# -- what may stand in one table ---------------------------------------------------------------


def _check(found: Results, notice: Callable[[str], None]) -> None:
    """Refuse mixed protocols; say what is not paired, and where nothing can be tested.

    Raises:
        ConfigError: the runs of a task follow different protocols.
    """
    for task in found.tasks:
        own = found.rows[found.rows["task"] == task]
        per_run = own.drop_duplicates("run")[["run", "entry", "seed", "protocol", "code", "device"]]
        every = own
        if len(found.repeats):
            every = pd.concat([own, found.repeats[found.repeats["task"] == task]])
        _one_protocol(task, every.drop_duplicates("run")["protocol"])
        _one_test_set(task, every)
        twice = per_run[per_run.duplicated(["entry", "seed"])]
        if len(twice):
            raise ConfigError(
                f"{task} has two runs of {twice.iloc[0]['entry']} with seed "
                f"{twice.iloc[0]['seed']}; choose one with --where run=… or code=…."
            )
        devices = per_run["device"].nunique()
        if devices > 1:
            notice(f"{task}: runs on {devices} devices; seconds compare within one only.")
        mixed = per_run.groupby("entry", observed=True)["code"].nunique()
        for entry in mixed[mixed > 1].index:
            notice(f"{task}: the seeds of {entry} were run by code of different versions.")
        first = own["selector"] == own["selector"].iloc[0]
        paired = statistics.design(plain(own[first]))
        for note in paired.notes:
            notice(f"{task}: {note}")
        why = statistics.untested(len(paired.seeds), len(paired.cases))
        if why:
            notice(f"{task}: {why}")


def _one_protocol(task: str, protocols: pd.Series) -> None:
    counts = protocols.astype(str).value_counts()
    values: dict[str, dict[Any, int]] = {}
    for text, count in counts.items():
        for name, value in {**PROTOCOL_OF_OLDER, **json.loads(str(text))}.items():
            seen = values.setdefault(name, {})
            seen[value] = seen.get(value, 0) + int(count)
    different = {name: seen for name, seen in values.items() if len(seen) > 1}
    if not different:
        return
    name, seen = next(iter(different.items()))
    texts = " and ".join(f"{value} in {_count(count, 'run')}" for value, count in seen.items())
    usable = {"steps": "steps", "preset": "preset", "batch_size": "batch_size"}
    most = max(seen, key=lambda value: seen[value])
    fix = {
        **{key: f"--where {key}={most}" for key in usable},
        "grid": "--where grid.size=… and grid.spacing=…",
        "segmenter": "--where segmenter.name=… and segmenter.width=…",
        "precision": f"--where precision={most}",
        "slices": "--where slices=… and slice_distance=…",
        "data": "--where code=…, or remove the runs on older data",
    }.get(name, "--where")
    raise ConfigError(
        f"{task} mixes runs of different protocols, which no table may average: {name} is "
        f"{texts}; choose with {fix}."
    )


def _one_test_set(task: str, rows: pd.DataFrame) -> None:
    """The volumes of the reference are the test set's fingerprint, also of rows from a file."""
    first = rows.drop_duplicates(["run", "case", "structure"])
    sizes = first.groupby(["case", "structure"], observed=True)["reference_ml"]
    spread = sizes.max() - sizes.min()
    wrong = spread[spread > 1e-6]
    cases = first.groupby("run", observed=True)["case"].nunique()
    if len(wrong):
        case = wrong.index[0][0]
        raise ConfigError(
            f"{task} mixes different test sets: case {case} has references of different sizes; "
            "choose runs on the same data with --where code=…, or another --runs."
        )
    if cases.nunique() > 1:
        raise ConfigError(
            f"{task} mixes different test sets: runs on {cases.min()} and on {cases.max()} cases; "
            "choose runs on the same data with --where code=…, or another --runs."
        )


def _noticing(notices: list[str], warn: Callable[[str], None]) -> Callable[[str], None]:
    """Keep a sentence for the page, and tell it now."""

    def notice(text: str) -> None:
        notices.append(text)
        warn(text)

    return notice


def _where_text(where: Mapping[str, Sequence[str]] | None) -> str:
    return " ".join(f"{name}={','.join(values)}" for name, values in (where or {}).items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"
