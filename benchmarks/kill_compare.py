"""Two `compare` processes on one matrix, and random `kill -9`: is every run done once, and right?

    python benchmarks/kill_compare.py [--kills 10] [--seed 0] [--steps 20]

Starts the same comparison twice in an empty runs directory and, at random moments, kills one of
the two processes or one of the runs that they or their killed predecessors started. A comparison
that ends before its work is done is started again. When both have ended well, the runs are
checked, and compared bit by bit with those of the same comparison that nobody kills. Prints what
was killed, what became of each run and every check; the exit code is 1 where a check fails.

The seed fixes the pauses and the draws; what a draw hits depends on the machine. Data, cache and
runs lie below the temporary directory, and are removed. Linux only: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from glua_bench.runs import executor, matrix
from glua_bench.runs.matrix import Planned
from glua_bench.runs.request import RunOptions

TICK = 0.1  # seconds between looks at processes and marks
MOST_STARTS = 30  # of one comparison; more means that it cannot end
METHODS = "global_only,glua"  # which share a stage, so that two runs want to train it


class Comparison:
    """A `compare` process that is started again until it has ended well.

    Each process leads a session. Its runs are in it and stay there when it is killed, so that
    they are found, and nothing else is.
    """

    def __init__(self, name: str, words: list[str], log: Path) -> None:
        self.name, self.words, self.log = name, words, log
        self.sessions: list[int] = []
        self.early: list[str] = []  # last lines of processes that failed without being killed
        self.start()

    def start(self) -> None:
        """Start a process."""
        if len(self.sessions) == MOST_STARTS:
            raise SystemExit(f"{self.name} was started {MOST_STARTS} times and did not end well.")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "glua_bench", *self.words],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.sessions.append(self.process.pid)

    def ended(self) -> bool:
        """Whether it has ended well; starts it again where it has failed."""
        code = self.process.poll()
        if code:
            self.early.append(f"code {code}: {self.log.read_text().splitlines()[-1]}")
            self.start()
        return code == 0

    def kill(self) -> None:
        """Kill the process, and start another."""
        self.process.kill()
        self.process.wait()
        self.start()


def processes(sessions: list[int]) -> Iterator[tuple[int, int, str]]:
    """Yield process id, session and run id of each run process in some sessions."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            words = (folder / "cmdline").read_bytes().decode().split("\0")[:-1]
        except OSError:  # it ended meanwhile
            continue
        found = words[2:4] == ["glua_bench", "run-request"]
        if found and int(session) in sessions and state != "Z":
            yield int(folder.name), int(session), Path(words[4]).stem


@dataclass
class Watched:
    """What is seen of one run from outside.

    Args:
        item: the run.
        starts: processes that were started for it.
        kills: how many of them were killed.
        marks: the states in which `done` was seen; a second one is a run done twice.
    """

    item: Planned
    starts: set[int] = field(default_factory=set)
    kills: int = 0
    marks: list[tuple[int, int] | None] = field(default_factory=list)

    def look(self) -> None:
        """Note whether `done` has appeared, vanished or been replaced."""
        try:
            found = (self.item.run.directory.path / "done").stat()
            mark = (found.st_ino, found.st_mtime_ns)
        except OSError:
            mark = None
        if mark != (self.marks[-1] if self.marks else None):
            self.marks.append(mark)

    def doing(self) -> str:
        """What its process is at."""
        directory = self.item.run.directory
        if not executor.running(self.item.run):
            return "starting"
        if (directory.path / "cases.parquet").is_file():
            return "writing results"
        last = directory.checkpoints / f"candidate_{self.item.run.config.steps:07d}.pt"
        return "scoring" if last.is_file() else "training"


def name_of(item: Planned) -> str:
    """A run in tables."""
    return f"{item.cell.entry} seed {item.cell.request.seed}"


def disturb(
    comparisons: list[Comparison], watched: dict[str, Watched], kills: int, pause: float, seed: int
) -> int:
    """Kill until enough is killed, wait for both to end, and print each kill; how many it were.

    Args:
        comparisons: the processes.
        watched: id of a run → the run.
        kills: how many.
        pause: mean seconds between them.
        seed: of pauses and draws.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    due = began + pause * draw.uniform(0.2, 1.8)
    killed = 0
    print(f"{'kill':>4}{'at s':>7}  {'killed':<26}{'of':<18}while")
    while True:
        time.sleep(TICK)
        ended = [comparison.ended() for comparison in comparisons]
        sessions = [session for c in comparisons for session in c.sessions]
        running = sorted(processes(sessions))
        for pid, _, run_id in running:
            watched[run_id].starts.add(pid)
        for run in watched.values():
            run.look()
        if all(ended):
            return killed
        if killed == kills or time.monotonic() < due:
            continue
        alive = [c for c in comparisons if c.process.poll() is None]
        if not alive:  # ended in this moment
            continue
        at = f"{killed + 1:>4}{time.monotonic() - began:>7.1f}  "
        hit = draw.randrange(len(alive) + len(running))
        if hit < len(alive):
            leaves = sum(session == alive[hit].process.pid for _, session, _ in running)
            alive[hit].kill()
            print(f"{at}{alive[hit].name:<44}{leaves} runs go on without it", flush=True)
        else:
            pid, session, run_id = running[hit - len(alive)]
            run = watched[run_id]
            doing = run.doing()
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # as above
                continue
            run.kills += 1
            owner = next((c.name for c in alive if c.process.pid == session), "nobody (orphan)")
            print(f"{at}{name_of(run.item):<26}{owner:<18}{doing}", flush=True)
        killed += 1
        due = time.monotonic() + pause * draw.uniform(0.2, 1.8)


# -- checks --------------------------------------------------------------------------------------


def log_problem(item: Planned) -> str:
    """What is wrong with a run's log: torn, a step twice or missing; "" where nothing is."""
    directory = item.run.directory
    text = (directory.path / "log.jsonl").read_text()
    try:
        rows = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return "a torn line"
    seen = Counter((row["stage"], row["step"]) for row in rows)
    if text and not text.endswith("\n"):
        return "no end of the last line"
    if max(seen.values()) > 1:
        return f"{seen.most_common(1)[0][0]} twice"
    reused = directory.read_summary()["reused_stages"]
    due = {(s, i + 1) for s, steps in item.run.stages if s not in reused for i in range(steps)}
    logged = {(stage, step) for stage, step in seen if stage not in reused}
    return "" if logged == due else f"{len(due ^ logged)} steps missing or unknown"


def cases_problem(item: Planned) -> str:
    """Whether a row of a case, structure and selector is missing or there twice."""
    run = item.run
    rows = run.directory.read_cases()
    keys = Counter(zip(rows["case"], rows["structure"], rows["selector"], strict=True))
    due = {
        (case.id, structure.name, selector)
        for case in run.dataset.split(run.config.target, "test")
        for structure in run.dataset.structures
        for selector in run.directory.read_summary()["chosen_steps"]
    }
    if set(keys) != due or set(rows["run"]) != {run.id}:
        return f"{len(set(keys) ^ due)} rows missing or unknown"
    return "" if max(keys.values()) == 1 else "a row twice"


def late_problem(item: Planned) -> str:
    """Whether anything was written behind `done`."""
    path = item.run.directory.path
    done = (path / "done").stat().st_mtime_ns
    late = [p.name for p in path.rglob("*") if p.is_file() and p.stat().st_mtime_ns > done]
    return ", ".join(late)


def difference(item: Planned, other: Planned) -> str:
    """Where a run's rows or the weights of its chosen checkpoints are not those of another."""
    mine, theirs = item.run.directory, other.run.directory
    rows = [(d.path / "cases.parquet").read_bytes() for d in (mine, theirs)]
    if rows[0] != rows[1]:
        return "cases.parquet"
    names = [sorted(p.name for p in d.checkpoints.glob("candidate_*.pt")) for d in (mine, theirs)]
    if names[0] != names[1]:
        return "which checkpoints were chosen"
    for name in names[0]:
        if not same_tensors(mine.checkpoints / name, theirs.checkpoints / name):
            return name
    return ""


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files of `torch.save` hold the same tensors, bit by bit."""

    def flat(value: object, prefix: str = "") -> dict[str, bytes]:
        if isinstance(value, dict):
            parts = [flat(inner, f"{prefix}/{name}") for name, inner in value.items()]
            return {name: tensor for part in parts for name, tensor in part.items()}
        assert isinstance(value, torch.Tensor)
        return {f"{prefix} {value.dtype} {tuple(value.shape)}": value.numpy().tobytes()}

    one, two = (flat(torch.load(path, weights_only=True)) for path in (first, second))
    return one == two


def leftovers(*folders: Path) -> list[str]:
    """Names of half-written files and of marks of failure."""
    return [
        path.name
        for folder in folders
        for pattern in (".writing-*", "failed")
        for path in folder.rglob(pattern)
    ]


class Checks:
    """Prints checks, and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, problem: str = "") -> None:
        """One check; a problem is a failure."""
        self.failed += bool(problem)
        print(f"{'FAILED' if problem else 'ok':<8}{what}{': ' if problem else ''}{problem}")

    def each(self, what: str, items: list[Planned], problem: Callable[[Planned], str]) -> None:
        """One check of every run."""
        found = [f"{name_of(item)}: {text}" for item in items if (text := problem(item))]
        self(what, "; ".join(found))


# -- the whole -----------------------------------------------------------------------------------


def cells(base: RunOptions, methods: str, seeds: int) -> list[Planned]:
    """The matrix that the commands work off."""
    return matrix.plan(matrix.comparison(methods.split(","), ["phantom"], [], seeds, base))


def main() -> None:
    """Kill, check, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--pause", type=float, default=8, help="mean seconds between kills")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="of the runs")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--data-root", type=Path, help="a generated phantom, instead of a new one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        failed = measure(Path(name), options)
    sys.exit(1 if failed else 0)


def measure(folder: Path, options: argparse.Namespace) -> int:
    """Do it below a directory; the number of checks that failed."""
    os.environ["GLUA_BENCH_CACHE"] = str(folder / "cache")
    root = options.data_root and options.data_root.resolve()
    where = ["--data-root", str(root)] if root else []
    few = "candidates=2"  # checkpoints to score, so that more of a run's time is training
    base = RunOptions(
        preset="quick",
        steps=options.steps,
        assignments=[few],
        data_root=root,
        runs_root=folder / "runs",
        device="cpu",
        mlflow=False,
    )
    words = ["compare", "--methods", options.methods, "--dataset", "phantom", "--jobs", "2"]
    words += ["--seeds", str(options.seeds), "--steps", str(options.steps), "--preset", "quick"]
    words += ["--set", few, "--device", "cpu", "--no-mlflow", *where]
    prepare = [sys.executable, "-m", "glua_bench", "data", "prepare", "phantom", *where]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    planned = cells(base, options.methods, options.seeds)
    watched = {item.run.id: Watched(item) for item in planned}
    print(f"{os.cpu_count()} processors, {len(planned)} runs, kills drawn with seed {options.seed}")
    print(f"glua-bench {' '.join(words)}\n")

    began = time.monotonic()
    both = [
        Comparison(f"compare {n}", [*words, "--runs", str(base.runs_root)], folder / f"log_{n}")
        for n in (1, 2)
    ]
    try:
        killed = disturb(both, watched, options.kills, options.pause, options.seed)
    finally:
        sessions = [session for comparison in both for session in comparison.sessions]
        for comparison in both:  # ended, unless this was interrupted
            comparison.process.kill()
            comparison.process.wait()
        left = list(processes(sessions))
        for pid, _, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - began

    # The runs to compare with train the shared stages themselves.
    if (folder / "cache" / "stages").is_dir():
        (folder / "cache" / "stages").rename(folder / "stages")
    began = time.monotonic()
    undisturbed = [sys.executable, "-m", "glua_bench", *words, "--runs", str(folder / "reference")]
    subprocess.run(undisturbed, check=True, stdout=subprocess.DEVNULL)
    reference_seconds = time.monotonic() - began
    reference = cells(replace(base, runs_root=folder / "reference"), options.methods, options.seeds)

    print(f"\n{'run':<26}{'state':<7}{'done':>6}{'starts':>8}{'kills':>7}")
    for run in watched.values():
        marked = sum(mark is not None for mark in run.marks)
        starts = len(run.starts)
        print(f"{name_of(run.item):<26}{run.item.state:<7}{marked:>6}{starts:>8}{run.kills:>7}")
    print()
    for comparison in both:
        print(f"{comparison.name} was started {len(comparison.sessions)} times", end="")
        print("".join(f"\n  ended early with {line}" for line in comparison.early))
    print(f"with kills {seconds:.0f} s, one comparison without {reference_seconds:.0f} s\n")

    check = Checks()
    short = f"{killed}; give more --steps or a shorter --pause" if killed < options.kills else ""
    check(f"{options.kills} kills happened before the work was done", short)
    check("no run process is left", ", ".join(str(pid) for pid, _, _ in left))
    ids = sorted(path.parent.name for path in base.runs_root.glob("*/*/*/config.yaml"))
    same = ids == sorted(item.run.id for item in planned)
    check("there are the planned runs and no others", "" if same else ", ".join(ids))
    check.each("every run is done", planned, lambda i: "" if i.state == "done" else i.state)
    twice = [name_of(run.item) for run in watched.values() if len(run.marks) != 1]
    check("every run was done once, and its mark stayed", ", ".join(twice))
    finished = [item for item in planned if item.state == "done"]
    check.each("nothing was written behind the mark", finished, late_problem)
    check.each("every step is in the log, and once", finished, log_problem)
    check.each("every case, structure and selector has one row", finished, cases_problem)
    found = leftovers(base.runs_root, folder / "stages")
    check("no half-written file and no failure is left", ", ".join(found))
    others = {item.run.id: item for item in reference}
    what = "rows and weights are bit-identical to those of runs without kills"
    check.each(what, finished, lambda item: difference(item, others[item.run.id]))
    stages = [sorted(path.glob("*.pt")) for path in (folder / "stages", folder / "cache/stages")]
    alike = [p.name for p in stages[0]] == [p.name for p in stages[1]]
    alike = alike and all(map(same_tensors, *stages))
    check(f"so are the {len(stages[0])} shared stages", "" if alike else "they differ")
    return check.failed


if __name__ == "__main__":
    main()
