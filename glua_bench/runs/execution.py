"""Execute a planned run: have it trained, score its predictions, record, mirror.

A method is trained in a process of its own (`sealed/`), which holds no label of the target. This
process calls no method: it prepares the slices before, and reads labels and scores what is
predicted.
"""

from __future__ import annotations

import builtins
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor

from glua_bench import errors
from glua_bench.config import ORACLE, changed_settings, variant_name
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.errors import ConfigError, PluginError, RunFailure, UserError, cause
from glua_bench.method import Batch
from glua_bench.records.environment import environment
from glua_bench.records.naming import LABEL_STAMPS
from glua_bench.records.run_directory import RunDirectory
from glua_bench.records.tracker import open_tracker
from glua_bench.runs import carried, interruption
from glua_bench.runs.plan import PlannedRun, make_fabric, roles
from glua_bench.runs.sealed.process import Killed, Training
from glua_bench.runs.sealed.seal import temporary
from glua_bench.runs.sealed.training import (
    SCRATCH,
    BuiltRun,
    Stopped,
    build_run,
    load_selectors,
    pictures_of,
    predicted_path,
    read_pictures,
    sampled_roles,
    samples_of,
    score_of,
    stores,
    train_and_predict,
)
from glua_bench.runs.sealed.withheld import Withheld, reach_of, withhold
from glua_bench.runs.timing.parts import EVALUATION, FIGURES, SLICES, Clock
from glua_bench.runs.trainer import drop_checkpoints
from glua_bench.scoring.evaluation import mean_score, score_prediction, summarise
from glua_bench.selection import choose
from glua_bench.task import Dataset

__all__ = [
    "BuiltRun",
    "Stopped",
    "build_run",
    "load_selectors",
    "pictures_of",
    "sampled_roles",
    "samples_of",
    "score_of",
    "stores",
]

SEALED, WITHHELD, IN_REACH = LABEL_STAMPS

# Draws a run's figures from its directory, dataset, rows of the primary selector, a batch of
# images, and the method's own pictures.
Draw = Callable[[RunDirectory, Dataset, pd.DataFrame, Batch, dict[str, Tensor]], None]


@dataclass
class Summary:
    """Result of `execute`.

    Attributes:
        already_done: True if the run was finished before.
        seconds: duration.
        table: mean scores per selector and structure.
        warnings: sentences for the user.
    """

    already_done: bool
    seconds: float
    table: pd.DataFrame
    warnings: list[str]


@dataclass(frozen=True)
class Watch:
    """Observer of the candidates of a run during training.

    Attributes:
        selector: selector that scores them.
        see: called with the candidate's step and its score; may raise `Stopped`.
    """

    selector: str
    see: Callable[[int, float], None]


def execute(
    planned: PlannedRun,
    progress: Progress,
    draw: Draw | None = None,
    watch: Watch | None = None,
    apart: bool = True,
) -> Summary:
    """Train or resume, select, evaluate, record and mirror one run.

    Args:
        planned: from `plan`.
        progress: progress bar.
        draw: draws the run's figures; None draws none.
        watch: observes the candidates during training.
        apart: train in a process without target labels. False trains in this process, for checks
            of methods that cannot be imported elsewhere; the run is stamped *labels in reach*.

    Raises:
        UserError: the input is invalid.
        RunFailure: training stopped; the run is marked as failed.
        Stopped: `watch` stopped it.
    """
    directory = planned.directory
    if directory.done:
        return _finished_summary(planned)
    # Opened before training, so that a wrong address is reported at once.
    tracker = open_tracker(planned.request.runs_root) if planned.request.mlflow else None
    fabric = make_fabric(planned.request, planned.config)
    began = time.perf_counter()
    warnings: list[str] = []
    with directory.lock():
        if directory.done:  # finished by another process in the meantime
            return _finished_summary(planned)
        if problem := directory.problem:
            place = directory.set_aside()
            warnings.append(
                f"{directory.path} was damaged ({problem}): its files were moved to {place}, and "
                "it was trained again"
            )
        facts = {
            **environment(),
            "run": planned.id,
            "code": planned.code,
            "data": asdict(planned.fingerprints),
            "privileged": planned.config.privileged,
            "distances": planned.dataset.distance_note,
            "protocol": planned.dataset.protocol,
            "caveat": planned.dataset.caveat(planned.config.direction),
            "device": str(fabric.device),
            # Recorded now, because defaults may change and methods may be removed.
            "changed": changed_settings(planned.config, planned.method_class),
            "variant": variant_name(planned.config, planned.method_class),
        }
        earlier = _earlier_stamp(directory)
        directory.start(facts, planned.stages)
        scores = _Scores(planned, facts, earlier, progress, draw, watch)
        try:
            if apart:
                scores.train_apart()
            else:
                scores.train_here(fabric)
            cases = scores.record(began)
        except Stopped:
            raise
        except (UserError, RunFailure) as error:
            if not isinstance(error, Killed):
                directory.fail(str(error))
            raise
        except Exception as error:  # a plugin may raise anything
            known = cause(error)
            directory.fail(known or f"{type(error).__name__}: {error}")
            if known:
                raise RunFailure(known) from error
            raise
        finally:
            directory.close()
            shutil.rmtree(directory.path / SCRATCH, ignore_errors=True)
    if tracker is not None and not tracker.mirror(directory):
        warnings.append("the tracker lacks this run; upload it with `glua-bench sync`")
    return Summary(False, time.perf_counter() - began, summarise(cases), warnings)


def write_dataset_facts(planned: PlannedRun) -> None:
    """Store the facts about the dataset, with the usual intensities of the training images."""
    config, dataset = planned.config, planned.dataset
    chosen = roles(config, dataset)
    images = [*chosen["source_train"], *chosen["target_train"]]
    facts = carried.facts_of(dataset, (config.source, config.target), images)
    carried.write(planned.directory.path, facts, dataset.carried())


def lacking(planned: PlannedRun) -> list[str]:
    """Return the requested selectors, and `--oracle`, that a finished run lacks.

    Without --selectors a run is taken as it is.
    """
    request, directory = planned.request, planned.directory
    missing: list[str] = []
    if request.selectors is not None:
        known = RunDirectory.open(directory.path).config.selectors
        missing += [name for name in planned.config.selectors if name not in known]
    if request.oracle and ORACLE not in directory.read_summary()["chosen_steps"]:
        missing.append("--oracle")
    return missing


def lacking_note(finished: Iterable[PlannedRun]) -> str:
    """Describe which finished runs of a matrix lack a requested selector; "" if none does."""
    missing = {planned.id: lacking(planned) for planned in finished}
    names = sorted({name for own in missing.values() for name in own})
    count = sum(bool(own) for own in missing.values())
    if not count:
        return ""
    return (
        f"{count} of the runs {'was' if count == 1 else 'were'} finished without "
        f"{', '.join(names)} and kept as {'it is' if count == 1 else 'they are'}; use another "
        "--runs directory to train and score all of them alike."
    )


def _finished_summary(planned: PlannedRun) -> Summary:
    if missing := lacking(planned):
        raise ConfigError(
            f"{planned.directory.path} was finished without {', '.join(missing)} and its other "
            "checkpoints are deleted; omit what is missing, or use another --runs directory to "
            "train it again."
        )
    return Summary(True, 0.0, summarise(planned.directory.read_cases()), [])


class _Scores:
    """The part of a run that reads labels; receives what its training reports.

    Implements `training.Reports` for a training in this process.

    Args:
        planned: the run.
        facts: content of `environment.json`.
        earlier: stamp of the process that began the run, if it is resumed.
        progress: progress bar.
        draw: draws the run's figures.
        watch: observes the candidates.
    """

    def __init__(
        self,
        planned: PlannedRun,
        facts: dict[str, Any],
        earlier: str,
        progress: Progress,
        draw: Draw | None,
        watch: Watch | None,
    ) -> None:
        self.planned, self.facts, self.earlier = planned, facts, earlier
        self.progress, self.draw, self.watch = progress, draw, watch
        self.watched = "" if watch is None else watch.selector
        self.pictures = draw is not None
        self.directory = planned.directory
        self.test = {c.id: c for c in planned.dataset.split(planned.config.target, "test")}
        self.clock = Clock()
        self.stamp = IN_REACH
        self.chosen: dict[str, int] = {}
        self.scores: dict[str, dict[int, float]] = {}
        self.rows: dict[int, list[dict[str, Any]]] = {}
        self.result: dict[str, Any] = {}
        self._began = 0.0
        self._images: dict[str, Any] = {}

    # -- training ---------------------------------------------------------------------------------

    def _prepare(self) -> Withheld:
        shutil.rmtree(self.directory.path / SCRATCH, ignore_errors=True)
        with self.clock.on(SLICES):
            write_dataset_facts(self.planned)
            withheld = withhold(self.planned, SliceCache(), self.progress)
        self._images = dict(withheld.test)
        return withheld

    def _stamped(self, stamp: str, reason: str) -> None:
        """Record whether the training can reach labels; a resumed run has its weakest stamp."""
        self.stamp = max(stamp, self.earlier or stamp, key=LABEL_STAMPS.index)
        if self.stamp != stamp:
            reason = "an earlier process of this run could reach them"
        self.facts |= {"labels": self.stamp, "labels_reason": reason}
        self.directory.write_environment(self.facts)

    def train_here(self, fabric: Fabric) -> None:
        """Train in this process."""
        withheld = self._prepare()
        self._stamped(IN_REACH, "trained in the process that reads them")
        self.result = train_and_predict(withheld, fabric, self)

    def train_apart(self) -> None:
        """Train in a process that holds no label of the target."""
        planned, withheld = self.planned, self._prepare()
        folder = Path(temporary())
        with self.clock.on(SLICES):  # its start counts as preparation
            training = Training(reach_of(planned, withheld, folder), folder)
        try:
            reason = training.unsealed
            self._stamped(WITHHELD if reason else SEALED, reason)
            method = planned.method_class
            # The class is found by its name there, since it may be one of a plugin file.
            object.__setattr__(withheld, "method_class", None)
            training.begin(
                {
                    "run": withheld,
                    "method": [method.__module__, method.__qualname__],
                    "threads": torch.get_num_threads(),
                    "watched": self.watched,
                    "pictures": self.pictures,
                    "shown": self.progress.enabled,
                }
            )
            for message in training.messages():
                if self._received(message, training):
                    break
        finally:
            training.close()

    def _received(self, message: Mapping[str, Any], training: Training) -> bool:
        """Act on a report; return True if it is the last one."""
        kind, values = message.get("kind"), {k: v for k, v in message.items() if k != "kind"}
        if kind in ("stage", "update", "line"):
            getattr(self.progress, kind)(**values)
        elif kind == "said":
            stream = sys.stderr if values["stream"] == "stderr" else sys.stdout
            print(values["text"], end="", file=stream, flush=True)
        elif kind == "seen":
            self.seen(**values)
            training.answer(True)
        elif kind == "selected":
            scores = values["scores"].items()
            found = {name: {int(s): v for s, v in own.items()} for name, own in scores}
            self.selected(values["chosen"], found)
        elif kind == "predicted":
            self.predicted(**values)
        elif kind == "error":
            raise _error(values, self.stamp)
        elif kind == "interrupted":
            number = int(values["number"])
            raise KeyboardInterrupt if number == 2 else interruption.Interrupted(number)
        elif kind == "stopped":
            raise Stopped
        elif kind == "result":
            self.result = values
            return True
        return False

    # -- what a training reports ------------------------------------------------------------------

    def seen(self, step: int, score: float) -> None:
        """Pass a candidate's score on to the watcher."""
        assert self.watch is not None
        self.watch.see(step, score)

    def trained(self) -> None:
        """Do nothing: what follows is reported, too."""

    def selected(
        self, chosen: Mapping[str, int], scores: Mapping[str, Mapping[int, float]]
    ) -> None:
        """Keep which candidate each selector chose."""
        self.chosen = dict(chosen)
        self.scores = {name: dict(by_step) for name, by_step in scores.items()}
        self._began = time.perf_counter()

    def predicted(self, step: int, case: str) -> None:
        """Score the label map of a test case; that of the primary selector is kept."""
        planned, config = self.planned, self.planned.config
        primary = config.selectors[0]
        of_case = self.test[case]
        if step not in self.rows:
            self.rows[step] = []
            names = [name for name, own in self.chosen.items() if own == step]
            title = f"evaluate {names[0]}" if names else f"evaluate step {step}"
            self.progress.stage(title, len(self.test), unit="case")
        image = self._images[case]
        path = predicted_path(self.directory.path, step, of_case.id)
        labels = np.load(path, allow_pickle=False)
        if labels.dtype != np.uint8 or labels.shape != tuple(image.placement.file_shape):
            raise RunFailure(f"{path} is not the prediction of a run; repeat the command.")
        self.rows[step] += score_prediction(
            of_case,
            labels,
            image.placement,
            planned.dataset.view(of_case.domain),
            self.directory.predictions if step == self.chosen[primary] else None,
        )
        path.unlink()
        self.progress.update(len({row["case"] for row in self.rows[step]}))
        self.clock.seconds[EVALUATION] = time.perf_counter() - self._began

    # -- records ----------------------------------------------------------------------------------

    def record(self, began: float) -> pd.DataFrame:
        """Write the results of the run, and return its rows."""
        planned, config, directory = self.planned, self.planned.config, self.directory
        chosen, scores, result = self.chosen, self.scores, self.result
        frames = {step: pd.DataFrame(rows) for step, rows in self.rows.items()}
        primary = config.selectors[0]
        candidates = list(scores[primary])
        wanted = {*chosen.values(), *(candidates if planned.request.oracle else ())}
        for step in wanted:
            if {*frames[step]["case"]} != {*self.test}:
                raise RunFailure(f"{directory.path} lacks predictions; repeat the command.")
        if planned.request.oracle:
            scores[ORACLE] = {step: mean_score(frames[step]) for step in candidates}
            chosen[ORACLE] = choose(scores[ORACLE])
        rows = pd.concat(
            [frames[step].assign(selector=name, step=step) for name, step in chosen.items()],
            ignore_index=True,
        )
        rows = directory.own_rows(rows)
        directory.write_cases(rows)
        if self.draw is not None:
            with self.clock.on(FIGURES):
                batch, pictures = read_pictures(directory.path)
                own = rows[rows["selector"] == primary]
                self.draw(directory, planned.dataset, own, batch, pictures)
        for step in {*candidates} - {*chosen.values()}:
            (directory.checkpoints / f"candidate_{step:07d}.pt").unlink(missing_ok=True)
        parts = {**result["part_seconds"], EVALUATION: 0.0}
        for name, seconds in self.clock.seconds.items():
            parts[name] = parts.get(name, 0.0) + seconds
        directory.finish(
            {
                "run": planned.id,
                "seconds": time.perf_counter() - began,
                "stage_seconds": result["stage_seconds"],
                "part_seconds": parts,
                "selector_seconds": result["selector_seconds"],
                "reused_stages": result["reused_stages"],
                "steps": dict(planned.stages),
                "peak_memory_mib": result["peak_memory_mib"],
                "selector_scores": {
                    n: {str(s): v for s, v in b.items()} for n, b in scores.items()
                },
                "chosen_steps": chosen,
                "privileged": config.privileged,
                "labels": self.stamp,
                "protocol": planned.dataset.protocol,
                "scores": summarise(rows).to_dict("records"),
            }
        )
        drop_checkpoints(directory)
        return rows


class _Elsewhere(Exception):
    """The traceback of an error in the process that trains, as the cause of its copy here."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def _error(described: Mapping[str, Any], stamp: str) -> BaseException:
    """Return an error like the one in the process that trains.

    Only exceptions of the harness, Python and torch keep their class; nothing of the process is
    executed here.
    """
    name, arguments = str(described["name"]), described["arguments"]
    file = described.get("filename")
    if name == "PermissionError" and file and stamp == SEALED:
        error: BaseException = PluginError(
            f"{file} is out of reach for methods, which are trained without access to other files "
            "than code and prepared slices; move the file beside the plugin that reads it."
        )
    else:
        places = {"builtins": builtins, "glua_bench.errors": errors}
        place = places.get(described["module"])
        if str(described["module"]).partition(".")[0] == "torch":
            place = torch
        known = getattr(place, name, None)
        if not (isinstance(known, type) and issubclass(known, BaseException)):
            known, arguments = type(name, (Exception,), {}), [described["text"]]
        try:
            error = known(*arguments)
        except TypeError:
            error = RunFailure(f"{name}: {described['text']}")
    error.where = tuple(described["where"])  # type: ignore[attr-defined]
    error.__cause__ = _Elsewhere(described["traceback"])
    return error


def _earlier_stamp(directory: RunDirectory) -> str:
    """Return the stamp of the process that began a run; "" if nothing is to be resumed."""
    if not any(directory.checkpoints.glob("*.pt")):
        return ""
    try:
        stamp = directory.read_environment().get("labels", IN_REACH)
    except UserError:
        return IN_REACH
    return stamp if stamp in LABEL_STAMPS else IN_REACH
