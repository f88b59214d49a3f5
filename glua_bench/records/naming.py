"""Name runs, comparisons and their settings on a tracker."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from glua_bench.config import (
    PRESETS,
    RunConfig,
    SegmenterSpec,
    external_entry,
    flat_settings,
)
from glua_bench.errors import UserError, shortened
from glua_bench.identity import digest
from glua_bench.records.environment import TIME
from glua_bench.records.run_directory import RunDirectory
from glua_bench.scoring.metrics import METRICS


@dataclass(frozen=True)
class RunRecord:
    """A finished or failed run as shown on a tracker, besides its files.

    Attributes:
        name: from `run_name`.
        tags: description of the run, e.g. {"id": "1c0ffee1", "seed": "0", "error": "..."}.
        params: settings, by the names that `--set` accepts.
        metrics: name, value, seconds since 1970 and step of the results (`headline`), which come
            first because trackers list metrics in this order, and of all logged values
            ("STAGE/NAME").
        note: the results in one line; "" without results.
        began: start of the run, in seconds since 1970.
        ended: end of the run.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Sequence[tuple[str, float, float, int]]
    began: float
    ended: float
    note: str = ""

    @classmethod
    def of(cls, run: RunDirectory) -> RunRecord:
        """Read the record from a run directory."""
        rows, config = run.read_log(), run.config
        began, ended = _times(run, rows)
        metrics = [
            (f"{row['stage']}/{name}", value, row["time"], row["step"])
            for row in rows
            for name, value in row["values"].items()
        ]
        note = ""
        if run.done:
            selector, scores = headline(run.read_summary())
            metrics = [(name, value, ended, 0) for name, value in scores.items()] + metrics
            texts = [f"{METRICS[n].label} {METRICS[n].text(v)}" for n, v in scores.items()]
            of = "external" if config.external else f"selector {selector}"
            note = f"{', '.join(texts)} (mean over structures, {of})"
        name = f"{run_name(config, _method_changes(run))} | {run.id[:6]}"
        return cls(name, _tags(run), flat_settings(config.to_dict()), metrics, began, ended, note)


def _times(run: RunDirectory, rows: list[dict[str, Any]]) -> tuple[float, float]:
    # The log alone would exclude reading and scoring, which may take longer than training.
    times = [row["time"] for row in rows]
    for name in ("environment.json", "done"):
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            times.append(datetime.strptime(run.read_json(name)["time"], TIME).timestamp())
    times = times or [time.time()]
    return min(times), max(times)


def _tags(run: RunDirectory) -> dict[str, str]:
    config = run.config
    tags = {
        "id": run.id,
        "method": config.method,
        "dataset": config.fold_name,
        "direction": config.direction,
        "scenario": config.scenario,
        "seed": str(config.seed),
        "privileged": str(config.privileged).lower(),
    }
    if changed := named_changes(config, _method_changes(run)):
        tags["changed"] = _settings_text(changed)
    if run.done:
        tags["selector"], _ = headline(run.read_summary())
    if run.failed and not run.done:
        tags["error"] = run.failed[:4000]
    with contextlib.suppress(UserError):
        environment = run.read_environment()
        if data := environment.get("data"):
            tags["data"] = " ".join(f"{name}={value}" for name, value in data.items())
        if code := environment.get("code"):
            tags["code"] = code
        if stamp := environment.get("labels"):
            tags["labels"] = stamp
        if state := environment.get("source") or environment.get("git"):
            tags["git_commit"] = str(state["commit"])
            tags["git_dirty"] = str(state["dirty"]).lower()
    return tags


@dataclass(frozen=True)
class Comparison:
    """Runs that a tracker shows as one group: those of one comparison on one dataset.

    A growing group, such as a sweep, defines `identity` and `settings`, which must not depend on
    the runs that exist so far.

    Attributes:
        title: title of the command, e.g. "compare glua, sifa".
        members: entry and directory of each run, finished or not; at least one, all of one dataset.
        began: start of the command, in seconds since 1970.
        identity: identity of a growing group; "" derives it from the runs.
        settings: settings of the group; None selects those that all runs share.
        facts: further tags of the group.
        complete: True if no further run will be added.
        stopped: True if the command was stopped early, and may be resumed.
    """

    title: str
    members: Sequence[tuple[str, RunDirectory]]
    began: float = field(default_factory=time.time)
    identity: str = ""
    settings: Mapping[str, Any] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    complete: bool = True
    stopped: bool = False

    @property
    def dataset(self) -> str:
        """The dataset, with its fold, of all members."""
        return self.members[0][1].config.fold_name

    @property
    def id(self) -> str:
        """The identity, which does not depend on the wording of the command.

        It is computed from the ids of runs, so that changed settings, data or code give another
        comparison, and earlier results are kept.
        """
        return digest(self.identity or sorted([entry, run.id] for entry, run in self.members))

    @property
    def _trained(self) -> list[RunDirectory]:
        """The runs whose settings are known, i.e. all but imported ones (if there are others)."""
        runs = [run for _, run in self.members]
        return [run for run in runs if not run.config.external] or runs

    @property
    def entries(self) -> list[str]:
        """Names of the rows, in the order of the members."""
        return list(dict.fromkeys(entry for entry, _ in self.members))

    @property
    def directions(self) -> list[str]:
        """Directions, in the order of the members."""
        return list(dict.fromkeys(run.config.direction for _, run in self.members))

    @property
    def seeds(self) -> list[int]:
        """Seeds, ascending."""
        return sorted({run.config.seed for _, run in self.members})

    @property
    def status(self) -> str:
        """Status as MLflow names it; a growing group does not fail if some of its runs do."""
        if not self.complete:
            return "KILLED" if self.stopped else "RUNNING"
        enough = any if self.identity else all
        return "FINISHED" if enough(run.done for _, run in self.members) else "FAILED"

    @property
    def name(self) -> str:
        """Display name, e.g. "compare glua, sifa | phantom mr-ct | 3 seeds | quick"."""
        if self.settings is not None:
            return shortened(self.title, 200)
        count, own = len(self.seeds), self._trained
        changed = [named_changes(r.config, _method_changes(r)) for r in own]
        shared = {n: v for n, v in changed[0].items() if all(c.get(n) == v for c in changed)}
        preset = own[0].config.preset
        return " | ".join(
            (
                shortened(self.title, 100),
                f"{self.dataset} {', '.join(self.directions)}",
                f"{count} seed{'s' if count > 1 else ''}",
                ", ".join(filter(None, (preset, _settings_text(shared)))),
            )
        )

    def parameters(self) -> dict[str, Any]:
        """Return the group's parameters, by default the settings that all runs share."""
        if self.settings is not None:
            return dict(self.settings)
        settings = [flat_settings(run.config.to_dict()) for run in self._trained]
        shared = {
            name: value
            for name, value in settings[0].items()
            if name not in ("preset", "selectors")  # which are not part of ids
            and all(name in other and other[name] == value for other in settings)
        }
        return {"entries": len(self.entries), "seeds": len(self.seeds), **shared}

    def tags(self) -> dict[str, str]:
        """Return the current description of the group."""
        done = sum(run.done for _, run in self.members)
        return {
            "dataset": self.dataset,
            "direction": ", ".join(self.directions),
            "entries": ", ".join(self.entries),
            "seeds": ", ".join(map(str, self.seeds)),
            "runs": f"{done} of {len(self.members)} done",
            **self.facts,
        }


def headline(summary: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the scores that a tracker shows first: of the primary selector, over all structures.

    Scores of other selectors and of single structures are in `cases.parquet` and `summary.json`.

    Args:
        summary: passed to `RunDirectory.finish`; `scores` has one record per selector and
            structure, the primary selector first, including the structure "mean".

    Returns:
        The primary selector, and e.g. {"dice": 0.8, "assd": 2.1, "hd95": 6.5}, without unknown
        scores; "" and {} without scores.
    """
    records = summary.get("scores", ())
    if not records:
        return "", {}
    primary = records[0]["selector"]
    # A structure may have the same name; the mean over structures is the last row of a selector.
    mean = [r for r in records if r["selector"] == primary][-1]
    return primary, {
        score: float(mean[score])
        for score in METRICS
        if mean.get(score) is not None and math.isfinite(mean[score])
    }


def named_changes(config: RunConfig, method: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that differ from preset and method, by the names that `--set` accepts.

    The grid is excluded, because its presets depend on the dataset's files.

    Args:
        config: configuration of the run.
        method: settings of the method that differ from its defaults; they come first.

    Example:
        >>> from glua_bench.task import Grid
        >>> named_changes(RunConfig("?", "?", "a-b", Grid(32, 7.0), steps=9), {"mask": "soft"})
        {'method.mask': 'soft', 'segmenter.width': 32, 'segmenter.depth': 5, 'steps': 9}
    """
    preset = dict(PRESETS.get(config.preset, {}))
    own = ("augmentation", "precision", "candidates", "slices", "perturbation")
    defaults = flat_settings(
        {
            **{name: getattr(RunConfig, name) for name in own},
            **preset,
            "segmenter": {**asdict(SegmenterSpec()), **preset.get("segmenter", {})},
        }
    )
    settings = flat_settings(config.to_dict())
    changed = {n: v for n, v in settings.items() if n in defaults and v != defaults[n]}
    return {**{f"method.{name}": value for name, value in method.items()}, **changed}


def _method_changes(run: RunDirectory) -> Mapping[str, Any]:
    """Return the method's settings that differed from its defaults when the run began."""
    with contextlib.suppress(UserError):
        return dict(run.read_environment().get("changed", {}))
    return {}


def run_name(config: RunConfig, method: Mapping[str, Any]) -> str:
    """Return the display name of a run, with its most distinctive parts first.

    The parts are the method with its changed settings, direction, seed, and changed settings of the
    run.

    Args:
        config: configuration of the run.
        method: settings of the method that differ from its defaults.

    Example:
        >>> from glua_bench.task import Grid
        >>> run_name(RunConfig("?", "?", "a-b", Grid(32, 7.0), preset="paper", steps=9), {})
        '? | a-b | seed 0 | steps=9'
    """
    changed = named_changes(config, method)
    name = config.method
    if changed.get("augmentation") == "photometric":  # as in the entries of a comparison
        del changed["augmentation"]
        name += " + photometric"
    if config.external:
        name = external_entry(name, config.privileged)
    elif config.privileged:
        name += f", {config.scenario} (privileged)"
    own = {n: value for n, value in changed.items() if n.startswith("method.")}
    others = {n: value for n, value in changed.items() if n not in own}
    parts = [
        shortened(", ".join(filter(None, (name, _settings_text(own)))), 120),
        config.direction,
        f"seed {config.seed}",
        shortened(_settings_text(others), 120),
    ]
    return " | ".join(filter(None, parts))


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{n.removeprefix('method.')}={value}" for n, value in settings.items())


# Whether the process that trained a run could reach labels of the target, best first.
LABEL_STAMPS = ("sealed", "withheld", "in reach")


def label_stamps(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say whether trainings could reach labels of the target; docs/protocol.md explains the stamps.

    Args:
        environments: of finished runs; without stamp for runs of older versions and other tools.

    Returns:
        One sentence, or none without a stamp.
    """
    known = [(e["labels"], e.get("labels_reason", "")) for e in environments if e.get("labels")]
    if not known:
        return []
    parts = []
    for stamp in LABEL_STAMPS:
        reasons = [reason for own, reason in known if own == stamp]
        if reasons:
            count = f" in {len(reasons)} of {len(known)} runs" if len(reasons) < len(known) else ""
            why = f" ({', '.join(sorted({*reasons} - {''}))})" if any(reasons) else ""
            parts.append(f"{stamp}{count}{why}")
    return [f"LABELS {'; '.join(parts)}."]


def tracker_key(name: str) -> str:
    """Replace the characters that a tracker does not accept; results may coincide."""
    # The limit is 250 characters, of which `distinct` needs some.
    return "/".join(map(_key_part, name.split("/")))[:240].rstrip("/")


def _key_part(name: str) -> str:
    part = re.sub(r"[^\w\-. ]", "_", name)[:100]
    return part if part.strip(".") else f"_{part}"  # "." and ".." are directories
