"""Progress of a running sweep, on the terminal and in the tracker."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from glua_bench.console import duration, is_terminal
from glua_bench.errors import RunFailure, printable
from glua_bench.records.tracker import Tracker, open_tracker
from glua_bench.sweeps import results
from glua_bench.sweeps.definition import Definition
from glua_bench.sweeps.study import LOST, SweepStudy, counting

ROWS = 8  # running trials, and finished ones, that are listed
END_PATIENCE_SECONDS = 10.0  # with an unavailable storage when a sweep is interrupted


@dataclass(frozen=True)
class State:
    """State of a sweep.

    Attributes:
        finished: number of trials with a value.
        pruned: number of pruned trials.
        failed: number of failed trials.
        lost: number of trials whose workers were killed repeatedly.
        running: running trials.
        total: budget.
        best: best trial so far; None if there is none, or there are several objectives.
        seconds_left: estimated; nan if unknown.
    """

    finished: int
    pruned: int
    failed: int
    lost: int
    running: Sequence[FrozenTrial]
    total: int
    best: FrozenTrial | None
    seconds_left: float

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return self.finished + self.pruned + self.failed + self.lost

    def line(self, best: bool = True) -> str:
        """Return the state in a line, with or without the best trial."""
        done = self.ended
        parts = [f"{done}/{self.total} trials"]
        named = ((self.pruned, "pruned"), (self.failed, "failed"), (self.lost, "lost"))
        parts += [f"{n} {word}" for n, word in named if n]
        numbers = ", ".join(str(trial.number) for trial in self.running[:ROWS])
        more = ", …" if len(self.running) > ROWS else ""
        parts.append(f"{len(self.running)} running" + (f" ({numbers}{more})" if numbers else ""))
        if best and self.best is not None and self.best.values:
            parts.append(f"best {self.best.values[0]:.4g} ({shown(self.best.params)})")
        if done < self.total and not math.isnan(self.seconds_left):
            parts.append(f"about {duration(self.seconds_left)} left")
        return ", ".join(parts)


def state(definition: Definition, trials: list[FrozenTrial], workers: int) -> State:
    """Summarise the trials of a study."""
    counted = counting(trials)
    of = {kind: [t for t in counted if t.state == kind] for kind in TrialState}
    complete = of[TrialState.COMPLETE]
    lost = sum(LOST in t.user_attrs for t in counted)
    single = len(definition.objectives) == 1
    # A trial whose runs were finished before it began says nothing about the others.
    timed = [t for t in complete + of[TrialState.PRUNED] if not t.user_attrs.get("reused")]
    ended = [t.duration for t in timed if t.duration is not None]
    left = definition.trials - sum(t.state.is_finished() for t in counted)
    each = sum(d.total_seconds() for d in ended) / len(ended) if ended else math.nan
    return State(
        len(complete),
        len(of[TrialState.PRUNED]),
        len(of[TrialState.FAIL]) - lost,
        lost,
        of[TrialState.RUNNING],
        definition.trials,
        max(complete, key=lambda t: t.values[0]) if complete and single else None,
        each * left / max(1, workers, len(of[TrialState.RUNNING])),  # others may share the study
    )


class Display:
    """A live table on a terminal, plain lines elsewhere.

    Args:
        definition: the sweep.
        workers: number of workers.
        stream: output stream.
        pause: seconds between plain lines if nothing changes.
    """

    def __init__(
        self, definition: Definition, workers: int, stream: Any, pause: float = 30.0
    ) -> None:
        self.definition, self.workers, self.stream, self.pause = definition, workers, stream, pause
        self._live: Any = None
        self._said, self._at = "", 0.0

    def __enter__(self) -> Display:
        if is_terminal(self.stream):
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)

    def show(self, trials: list[FrozenTrial]) -> None:
        """Show the state of the trials."""
        now = state(self.definition, trials, self.workers)
        if self._live is not None:
            self._live.update(self.table(now, trials), refresh=True)
            return
        counts = f"{now.finished} {now.pruned} {now.failed} {now.lost}"
        if counts != self._said or time.monotonic() - self._at >= self.pause:
            print(printable(now.line()), file=self.stream, flush=True)
            self._said, self._at = counts, time.monotonic()

    def table(self, now: State, trials: list[FrozenTrial], rows: int = ROWS) -> Any:
        """Return a table of running trials and the best finished ones that fits on a screen."""
        from rich.box import SIMPLE
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        names = [parameter.name for parameter in self.definition.space]
        table = Table(box=SIMPLE, pad_edge=False)
        for column in ("trial", "state", "time", *names, *self.definition.objectives):
            table.add_column(column, justify="left" if column in ("state", "time") else "right")
        complete = [t for t in counting(trials) if t.state == TrialState.COMPLETE]
        complete.sort(key=lambda t: t.values[0], reverse=True)
        for trial in [*now.running[:rows], *complete[:rows]]:
            running = trial.state == TrialState.RUNNING
            values = list(trial.intermediate_values.values())[-1:] if running else trial.values
            cells = [f"{v:.4g}" + ("…" if running else "") for v in values]
            cells += [""] * (len(self.definition.objectives) - len(cells))
            params = [_cell(trial.params.get(name), 3) for name in names]
            state = "running" if running else "best" if trial is now.best else "done"
            table.add_row(
                str(trial.number),
                state,
                duration(_seconds(trial)),
                *(Text(printable(value)) for value in params),
                *cells,
                style={"running": "cyan", "best": "bold green"}.get(state),
            )
            if running and trial is now.running[:rows][-1] and len(now.running) > rows:
                table.add_row("", f"and {len(now.running) - rows} more")
        line = printable(f"{self.definition.name}: {now.line(best=False)}")
        head = Text(line, style="bold")
        hint = Text("Ctrl-C stops the sweep and keeps finished work.", style="dim")
        bar = ProgressBar(total=max(1, now.total), completed=now.ended, width=40)
        return Group(head, bar, table, *([hint] if now.running else []))


class Tracked:
    """Updates a sweep in the tracker: one run, with the runs of its trials as children.

    Args:
        study: the study.
        runs_root: directory of all runs.
        pause: minimum seconds between updates; at least ten times the duration of the last one.
        tracker: the tracker; None opens the configured one.
    """

    def __init__(
        self,
        study: SweepStudy,
        runs_root: Path,
        pause: float = 30.0,
        tracker: Tracker | None = None,
    ) -> None:
        self.study, self.runs_root, self.pause = study, runs_root, pause
        self._tracker = tracker or open_tracker(runs_root)
        self._ended, self._next, self._answers = 0, 0.0, True

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Mark an interrupted sweep as stopped; the next command continues it."""
        if kind is not None:
            self.study.patience = END_PATIENCE_SECONDS
            with suppress(RunFailure):
                self._show(stopped=True)

    def look(self, trials: list[FrozenTrial]) -> None:
        """Upload trials that have ended since the last call; stop if the tracker is unavailable."""
        ended = sum(t.state.is_finished() for t in counting(trials))
        began = time.monotonic()
        if ended == self._ended or began < self._next:
            return
        self._show(stopped=False)
        self._ended = ended
        now = time.monotonic()
        self._next = now + max(self.pause, 10 * (now - began))

    def _show(self, stopped: bool) -> None:
        if not self._answers:
            return
        group = results.group(self.study, self.runs_root, stopped)
        if group is not None:
            note = "The sweep is not finished; its report will be added at the end."
            self._answers = self._tracker.nest(group, {}, note=note)


def _seconds(trial: FrozenTrial) -> float:
    """Return the duration of a trial so far; nan if it has not started."""
    if trial.datetime_start is None:
        return math.nan
    return ((trial.datetime_complete or datetime.now()) - trial.datetime_start).total_seconds()


def shown(params: Mapping[str, Any]) -> str:
    """Format parameters in a line."""
    return ", ".join(f"{name} {_cell(value)}" for name, value in params.items())


def _cell(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)
