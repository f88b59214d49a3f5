"""Two commands at once against one after the other: what they cost each other.

    python benchmarks/threads.py [--rounds 3] [--steps 100] [--commands run,predict]

Each round times a command, the same command again, and both at once, each in its own process. The
ratio is the time of both at once over that of one after the other: 1 if they share the processor
without loss, less if one uses cores that the other leaves idle. Other programs on the machine
disturb it, so take the median. `alone` compares one command with the waiting policy of glua-bench
and with that of the library (`GOMP_SPINCOUNT`), whose ratio is above 1 if the policy gains.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from glua_bench.datasets.phantom.dataset import Phantom

START = [sys.executable, "-P", "-m", "glua_bench"]
if sys.version_info < (3, 11):
    START.remove("-P")
LIBRARY = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # as without glua-bench

# Arguments of a command, from a fresh directory and a number that makes it unlike the others.
Command = Callable[[Path, int], list[str]]


def training(steps: int, method: str = "source_only") -> Command:
    """Return the command that trains and scores on the phantom."""

    def arguments(folder: Path, number: int) -> list[str]:
        words = ["run", "--method", method, "--dataset", "phantom", "--steps", str(steps)]
        return [*words, "--seed", str(number), "--runs", str(folder), "--no-mlflow"]

    return arguments


def segmenting(model: Path, images: Sequence[Path]) -> Command:
    """Return the command that segments volumes with a run."""

    def arguments(folder: Path, number: int) -> list[str]:
        return ["predict", *map(str, images), "--run", str(model), "--out", str(folder / "out")]

    return arguments


def seconds(commands: Sequence[list[str]], environment: Mapping[str, str]) -> float:
    """Return the time until commands that are started at once have ended.

    Raises:
        RuntimeError: one failed.
    """
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            [*START, *command, "--quiet"],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    errors = [process.communicate()[1] for process in running]
    took = time.perf_counter() - began
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            raise RuntimeError(error)
    return took


def at_once(
    command: Command, rounds: int = 3, environment: Mapping[str, str] | None = None
) -> tuple[list[float], list[float]]:
    """Time a command twice in a row and twice at once.

    Args:
        command: what is run.
        rounds: number of pairs.
        environment: variables of the processes.

    Returns:
        The seconds of one after the other, and those of both at once, by round.
    """
    changed, apart, together, number = dict(environment or {}), [], [], int(time.time())
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            words = [command(Path(folder) / str(i), number + i) for i in range(4)]
            number += 4
            apart.append(sum(seconds([one], changed) for one in words[:2]))
            together.append(seconds(words[2:], changed))
    return apart, together


def ratio(command: Command | None = None, rounds: int = 3) -> tuple[float, float]:
    """Return the ratio of two at once to one after the other, and its spread over the rounds.

    Args:
        command: what is run; default: a short training with its evaluation.
        rounds: number of ratios.

    Returns:
        Median, and largest distance from it.
    """
    apart, together = at_once(command or training(100), rounds)
    found = [both / one for one, both in zip(apart, together, strict=True)]
    return statistics.median(found), max(abs(each - statistics.median(found)) for each in found)


def alone(command: Command | None = None, rounds: int = 3) -> tuple[float, float]:
    """Return the ratio of the library's waiting policy to ours for one command, and its spread."""
    own, number, found = command or training(100), int(time.time()), []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            words = [own(Path(folder) / str(i), number + i) for i in range(2)]
            number += 2
            ours = seconds([words[0]], {})
            found.append(seconds([words[1]], LIBRARY) / ours)
    return statistics.median(found), max(abs(each - statistics.median(found)) for each in found)


def main() -> None:
    """Time the commands and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--commands", default="run", help="run, predict, or both: run,predict")
    parser.add_argument("--alone", action="store_true", help="also one with the library's policy")
    options = parser.parse_args()
    chosen = options.commands.split(",")
    with tempfile.TemporaryDirectory() as folder:
        train, commands = training(options.steps), {}
        first = training(1)(Path(folder), 0)
        seconds([first], {})  # prepares the data, and trains a model for `predict`
        if "run" in chosen:
            commands["run"] = train
        if "predict" in chosen:
            (model,) = (path.parent for path in Path(folder).glob("*/*/*/summary.json"))
            images = sorted(Phantom.default_root().glob("ct_train/*_image.nii.gz"))[:12]
            commands["predict"] = segmenting(model, images)
        print(f"{os.cpu_count()} processors")
        print("command    one after the other   both at once   ratio")
        for name, command in commands.items():
            apart, together = at_once(command, options.rounds)
            for one, both in zip(apart, together, strict=True):
                print(f"{name:<11}{one:>17.1f} s{both:>13.1f} s{both / one:>8.2f}", flush=True)
        if options.alone:
            gain, spread = alone(train, options.rounds)
            print(f"one run with the library's waiting policy: {gain:.2f} ± {spread:.2f} ×")


if __name__ == "__main__":
    main()
