"""Whether a sweep loses or doubles trials when its workers are killed with SIGKILL.

    python -m benchmarks.kill_workers                         # a journal
    python -m benchmarks.kill_workers --storage postgresql://user@host/base

Trials only sleep, and go on where a killed worker left them, as runs do from a checkpoint. Workers
are killed at random moments and replaced. At the end every trial must have its value once, and the
directories of the trials must agree with the storage; the exit code is 1 if not. What sweeping
costs is measured by `python -m benchmarks sweep storage`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.sweeps import define, forked
from glua_bench.sweeps import study as studies
from glua_bench.sweeps.study import Claim, SweepStudy, counting
from glua_bench.sweeps.trial import Outcome
from glua_bench.sweeps.worker import work

SLEEP = 0.5  # seconds of a trial
STEPS = 10  # of a trial that may be killed, each a tenth of its sleep


def killed(root: Path, url: str | None, trials: int, kills: int, seed: int) -> dict[str, Any]:
    """A study whose workers die; what is left of it."""
    rng = random.Random(seed)
    definition = define(f"killed-{uuid.uuid4().hex[:8]}", trials, "tpe")
    SweepStudy(definition, root, url)
    runs = root / "work"
    runs.mkdir()

    def run(claim: Claim, see: Any) -> Outcome:
        """Go on where an earlier worker was killed, as a run does from its checkpoint."""
        folder = runs / f"{claim.params['ratio']:.12f}"
        folder.mkdir(exist_ok=True)
        position = folder / "position"
        done = int(position.read_text()) if position.exists() else 0
        for step in range(done, STEPS):
            time.sleep(SLEEP / STEPS)
            scratch = folder / f".{os.getpid()}"
            scratch.write_text(str(step + 1))
            os.replace(scratch, position)
        (folder / "done").touch()
        with (folder / "told").open("a") as file:
            file.write(f"{claim.number}\n")
        return Outcome((float(claim.params["ratio"]),), {"runs": [folder.name]})

    def one() -> None:
        work(SweepStudy(definition, root, url), run, poll=0.05)

    crew = [forked(one) for _ in range(4)]
    began, left = time.perf_counter(), kills
    while crew:
        time.sleep(rng.uniform(0.05, 0.4))
        for child in list(crew):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                crew.remove(child)
                if os.waitstatus_to_exitcode(status) != 0:
                    crew.append(forked(one))
        if left and crew:
            os.kill(rng.choice(crew), signal.SIGKILL)
            left -= 1
    study = SweepStudy(definition, root, url)
    counted = counting(study.trials())
    complete = [t for t in counted if t.state.name == "COMPLETE"]
    finished = {folder.name for folder in runs.iterdir() if (folder / "done").exists()}
    named = Counter(run for t in study.trials() if t.values for run in t.user_attrs["runs"])
    return {
        "kills": kills - left,
        "seconds": round(time.perf_counter() - began, 1),
        "complete": len(complete),
        "failed": [t.user_attrs.get("reason") for t in counted if t.state.name == "FAIL"],
        "running": sum(t.state.name == "RUNNING" for t in study.trials()),
        "retries": len(study.trials()) - len(counted),
        "twice": sum(count > 1 for count in named.values()),
        "agree": set(named) == finished and len(finished) == len(complete),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="a database's URL; default is a journal")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    kind = "journal" if asked.storage is None else asked.storage.partition(":")[0]
    # A trial that is hit three times counts as failed in a sweep; here the kills are the subject.
    studies.ATTEMPTS = asked.kills
    with tempfile.TemporaryDirectory() as folder:
        found = killed(Path(folder), asked.storage, asked.trials, asked.kills, asked.seed)
    print(json.dumps({"storage": kind, **found}))
    sound = found["complete"] == asked.trials and not found["twice"] and found["agree"]
    print("nothing lost, nothing twice" if sound else "NOT SOUND")
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
