"""What two processes on the same cores cost each other, and one its waiting policy.

    python benchmarks/threads.py [--rounds 10] [--steps 30] [--method source_only]

Two processes train on the phantom, as two `glua-bench run` do, and predict its slices. In each
round they work one after the other and at once, so that other programs on the machine disturb both
alike. The ratio is the time of both at once over that of one after the other; without loss it is 1,
and less where one process leaves cores idle that the other uses. `--apart` shows what turns and the
waiting policy of glua-bench are for: the same without them, as libraries behave by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

LIBRARY = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # its defaults
ALONE = {**LIBRARY, "GLUA_BENCH_TURNS": os.devnull}  # not a directory: no turns


def work(method: str, steps: int) -> None:
    """Train or predict each time that a line asks for it, and print the seconds."""
    import torch

    from glua_bench.console import Progress
    from glua_bench.data.parallel import turns
    from glua_bench.records.run_directory import RunDirectory
    from glua_bench.runs.execution import build_run
    from glua_bench.runs.plan import make_fabric, plan
    from glua_bench.runs.request import RunRequest
    from glua_bench.runs.trainer import threads_of

    quiet = Progress(enabled=False)
    planned = plan(RunRequest(method, "phantom", preset="quick", steps=steps, device="cpu"))
    config = replace(planned.config, candidates=1)
    fabric = make_fabric(planned.request, config)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            log = RunDirectory(Path(folder), config, "threads")
            log.start({})
            built = build_run(replace(planned, config=config, directory=log), fabric, quiet)
            built.trainer.artefact = lambda stage: None
            images = torch.from_numpy(built.train.images(range(32)))
            began = time.perf_counter()
            if line.strip() == "train":
                built.fit()
            else:
                built.method.eval()
                with turns.taken(threads_of(fabric)):  # as the evaluation of a run does
                    for _ in range(steps // 2):
                        turns.pass_on()
                        built.predict(images, "target")
            print(json.dumps(time.perf_counter() - began), flush=True)
            log.close()


class Pair:
    """Two processes that work when they are asked to.

    Args:
        method: method that they train.
        steps: updates, or batches of slices, each time.
        environment: further variables.
    """

    def __init__(
        self, method: str = "source_only", steps: int = 30, environment: Mapping[str, str] = ALONE
    ) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", "--method", method, "--steps", str(steps)],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def seconds(self, what: str, chosen: Sequence[int]) -> float:
        """Return the time until the chosen processes have worked, all at once."""
        began = time.perf_counter()
        for index in chosen:
            channel = self._processes[index].stdin
            assert channel is not None
            channel.write(f"{what}\n")
            channel.flush()
        own = []
        for index in chosen:
            answer = self._processes[index].stdout
            assert answer is not None
            own.append(float(json.loads(answer.readline())))
        # Without the building of networks, which is the same in both.
        return max(own) if len(chosen) == 1 else min(max(own), time.perf_counter() - began)

    def rounds(self, what: str, count: int) -> list[tuple[float, float]]:
        """Return the seconds of one after the other and of both at once, by round."""
        self.seconds(what, [0])
        self.seconds(what, [1])
        return [
            (self.seconds(what, [0]) + self.seconds(what, [1]), self.seconds(what, [0, 1]))
            for _ in range(count)
        ]


def ratio(what: str = "train", rounds: int = 10, steps: int = 30) -> tuple[float, float]:
    """Return the ratio of both at once to one after the other, and its spread.

    Args:
        what: "train" or "predict".
        rounds: number of ratios.
        steps: updates or batches each time.

    Returns:
        Median of the ratios, and their median distance from it.
    """
    with Pair(steps=steps, environment={}) as pair:
        return _middle([both / one for one, both in pair.rounds(what, rounds)])


def alone(rounds: int = 10, steps: int = 30) -> tuple[float, float]:
    """Return the ratio of our waiting policy to the library's for one training, and its spread."""
    with Pair(steps=steps, environment={}) as ours, Pair(steps=steps) as library:
        for pair in (ours, library):
            pair.seconds("train", [0])
        found = [ours.seconds("train", [0]) / library.seconds("train", [0]) for _ in range(rounds)]
    return _middle(found)


def _middle(found: Sequence[float]) -> tuple[float, float]:
    middle = statistics.median(found)
    return middle, statistics.median(abs(each - middle) for each in found)


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--method", default="source_only")
    parser.add_argument("--apart", action="store_true", help="without turns and policy")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.method, options.steps)
        return
    print(f"{os.cpu_count()} processors, {options.method}, {options.steps} steps each")
    print("work      one after the other   both at once   ratio (medians)", flush=True)
    environment = ALONE if options.apart else {}
    with Pair(options.method, options.steps, environment) as pair:
        for what in ("train", "predict"):
            times = pair.rounds(what, options.rounds)
            middle, spread = _middle([both / one for one, both in times])
            one, both = (statistics.median(each) for each in zip(*times, strict=True))
            print(
                f"{what:<10}{one:>17.2f} s{both:>13.2f} s{middle:>8.2f} ± {spread:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
