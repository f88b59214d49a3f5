"""Names of runs, comparisons and their settings on a tracker."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from glua_bench.config import PRESETS, RunConfig, SegmenterSpec, digest, flat_settings
from glua_bench.errors import UserError, shortened
from glua_bench.paths import distinct
from glua_bench.records.environment import TIME
from glua_bench.records.run_directory import RunDirectory
from glua_bench.scoring.metrics import METRICS


@dataclass(frozen=True)
class RunRecord:
    """What a tracker shows of a finished or failed run, besides its files.

    Attributes:
        name: for people, see `run_name`.
        tags: what the run is, in words, e.g. {"id": "1c0ffee1", "seed": "0", "error": "..."}.
        params: the settings, by the names that `--set` takes.
        metrics: name, value, seconds since 1970 and step of everything that was logged, then of
            the results (`final_metrics`).
        began: when the run began, in seconds since 1970.
        ended: when it ended.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Sequence[tuple[str, float, float, int]]
    began: float
    ended: float

    @classmethod
    def of(cls, run: RunDirectory) -> RunRecord:
        """Read it from a run's directory."""
        rows, config = run._rows(), run.config
        began, ended = _times(run, rows)
        metrics = [
            (f"{row['stage']}/{name}", value, row["time"], row["step"])
            for row in rows
            for name, value in row["values"].items()
        ]
        if run.done:
            final = final_metrics(run.read_summary())
            metrics += [(name, value, ended, 0) for name, value in final.items()]
        name = f"{run_name(config, _method_changes(run))} | {run.id[:6]}"
        return cls(name, _tags(run), flat_settings(config.to_dict()), metrics, began, ended)


def _times(run: RunDirectory, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """When a run began and ended, in seconds since 1970.

    The log alone would leave out reading and scoring, which may take longer than training.
    """
    times = [row["time"] for row in rows]
    for name in ("environment.json", "done"):
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            times.append(datetime.strptime(run._read_json(name)["time"], TIME).timestamp())
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
        tags["changed"] = _listed(changed)
    if run.failed and not run.done:
        tags["error"] = run.failed[:4000]
    with contextlib.suppress(UserError):
        environment = run.read_environment()
        for name in ("data", "code"):
            if name in environment:
                tags[name] = _one_text(environment[name])
        if state := environment.get("source") or environment.get("git"):
            tags["git_commit"] = str(state["commit"])
            tags["git_dirty"] = str(state["dirty"]).lower()
    return tags


@dataclass(frozen=True)
class Comparison:
    """Runs that a tracker shows as one group: those of one comparison on one dataset.

    A group that grows, as a sweep does, states its `identity` and `settings`, which must not
    depend on the runs that happen to be there.

    Attributes:
        title: what was asked for, e.g. "compare glua, sifa".
        members: entry and directory of each run, finished or not; at least one, all of one
            dataset.
        began: when the command began, in seconds since 1970.
        identity: what tells a growing group from others; "" takes its runs.
        settings: of the group; None takes what all runs share.
        facts: further tags of the group.
        complete: whether no further run is to come.
        stopped: whether it was ended early, and may go on later.
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
        """The identity: what is compared, however the command was worded.

        Runs enter by their ids, so that changed settings, data or code make another comparison,
        and old rows stay under the old one.
        """
        if self.identity:
            return digest(self.identity)
        return digest(sorted([entry, run.id] for entry, run in self.members))

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
        """In the tracker's words; a growing group, a search, does not fail by some of its runs."""
        if not self.complete:
            return "KILLED" if self.stopped else "RUNNING"
        enough = any if self.identity else all
        return "FINISHED" if enough(run.done for _, run in self.members) else "FAILED"

    @property
    def name(self) -> str:
        """A line for people, e.g. "compare glua, sifa | phantom mr-ct | 3 seeds | quick"."""
        if self.settings is not None:
            return shortened(self.title, 200)
        count = len(self.seeds)
        changed = [named_changes(r.config, _method_changes(r)) for _, r in self.members]
        shared = {n: v for n, v in changed[0].items() if all(c.get(n) == v for c in changed)}
        preset = self.members[0][1].config.preset
        return " | ".join(
            (
                shortened(self.title, 100),
                f"{self.dataset} {', '.join(self.directions)}",
                f"{count} seed{'s' if count > 1 else ''}",
                ", ".join(filter(None, (preset, _listed(shared)))),
            )
        )

    def parameters(self) -> dict[str, Any]:
        """What the tracker shows as the group's parameters, which it never changes."""
        if self.settings is not None:
            return dict(self.settings)
        return {"entries": len(self.entries), "seeds": len(self.seeds), **self.shared()}

    def tags(self) -> dict[str, str]:
        """What the group is, in words, as it stands now."""
        done = sum(run.done for _, run in self.members)
        return {
            "dataset": self.dataset,
            "direction": ", ".join(self.directions),
            "entries": ", ".join(self.entries),
            "seeds": ", ".join(map(str, self.seeds)),
            "runs": f"{done} of {len(self.members)} done",
            **self.facts,
        }

    def shared(self) -> dict[str, Any]:
        """The settings that all runs share, those left out that are not part of their ids."""
        settings = [flat_settings(run.config.to_dict()) for _, run in self.members]
        return {
            name: value
            for name, value in settings[0].items()
            if name not in ("preset", "selectors")
            and all(name in other and other[name] == value for other in settings)
        }


def final_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The results of a run as the tracker's metrics.

    Args:
        summary: as `RunDirectory.finish` was given it; `scores` holds one record per selector
            and structure (and one for their "mean").

    Returns:
        e.g. {"final/last/mean/dice": 0.8, "final/last/MYO/dice": 0.7, "final/last/MYO/misses": 2}.
        All scores of a structure stand under one name, which no other structure has.
    """
    records = summary.get("scores", ())
    names = distinct((str(record["structure"]) for record in records), _structure)
    return {
        f"final/{record['selector']}/{names[str(record['structure'])]}/{score}": float(
            record[score]
        )
        for record in records
        for score in (*METRICS, "misses")
        if record.get(score) is not None
    }


def named_changes(config: RunConfig, method: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not what preset and method give, by the names that `--set` takes.

    The grid's are left out, because only the dataset's files tell what a preset gives it.

    Args:
        config: of the run.
        method: the method's settings that differ from its defaults; they come first.

    Example:
        >>> from glua_bench.task import Grid
        >>> named_changes(RunConfig("?", "?", "a-b", Grid(32, 7.0), steps=9), {"mask": "soft"})
        {'method.mask': 'soft', 'segmenter.width': 32, 'segmenter.depth': 5, 'steps': 9}
    """
    preset = dict(PRESETS.get(config.preset, {}))
    defaults = flat_settings(
        {
            "augmentation": RunConfig.augmentation,
            "precision": RunConfig.precision,
            "candidates": RunConfig.candidates,
            "slices": RunConfig.slices,
            "perturbation": RunConfig.perturbation,
            **preset,
            "segmenter": {**asdict(SegmenterSpec()), **preset.get("segmenter", {})},
        }
    )
    own = flat_settings(config.to_dict())
    changed = {n: own[n] for n in own if n in defaults and own[n] != defaults[n]}
    return {**{f"method.{name}": value for name, value in method.items()}, **changed}


def _method_changes(run: RunDirectory) -> Mapping[str, Any]:
    """What differed from the method's defaults when the run began."""
    with contextlib.suppress(UserError):
        return dict(run.read_environment().get("changed", {}))
    return {}


def run_name(config: RunConfig, method: Mapping[str, Any]) -> str:
    """A run's name for people: what tells it from its neighbours in a table comes first.

    Method with its changed settings, direction, seed, and the changed settings of the run.

    Args:
        config: of the run.
        method: the method's settings that differ from its defaults.

    Example:
        >>> from glua_bench.task import Grid
        >>> run_name(RunConfig("?", "?", "a-b", Grid(32, 7.0), preset="paper", steps=9), {})
        '? | a-b | seed 0 | steps=9'
    """
    changed = named_changes(config, method)
    name = config.method
    if changed.get("augmentation") == "photometric":  # as the entries of a comparison say it
        del changed["augmentation"]
        name += " + photometric"
    if config.privileged:
        name += f", {config.scenario} (privileged)"
    own = {n: value for n, value in changed.items() if n.startswith("method.")}
    others = {n: value for n, value in changed.items() if n not in own}
    parts = [
        shortened(", ".join(filter(None, (name, _listed(own)))), 120),
        config.direction,
        f"seed {config.seed}",
        shortened(_listed(others), 120),
    ]
    return " | ".join(filter(None, parts))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{n.removeprefix('method.')}={value}" for n, value in settings.items())


def _one_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={entry}" for name, entry in value.items())
    return str(value)


def tracker_key(name: str) -> str:
    """A name with only the characters that a tracker accepts; others may come out alike."""
    return "/".join(map(_word, name.split("/")))[:240].rstrip("/")  # of 250; `distinct` adds some


def _structure(name: str) -> str:
    """A structure in such a name, short enough that a suffix of `distinct` remains in it."""
    return _word(name)[:90]


def _word(name: str) -> str:
    """A part of such a name."""
    word = re.sub(r"[^\w\-. ]", "_", name)[:100]
    return word if word.strip(".") else f"_{word}"  # it would be taken for a directory
