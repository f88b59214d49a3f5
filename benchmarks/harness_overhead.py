"""What the harness costs a step, against a bare loop over the same networks and tensors.

    python benchmarks/harness_overhead.py [--steps 250] [--rounds 4]

Both sides call the same `Method.step`. The trainer adds loading, seeding, learning rates,
augmentation, logging to a run directory, candidates and the progress display; the bare loop has
every batch in memory. They take turns in one process, and each round gives one ratio. On a noisy
machine that ratio jumps by more than the aim of 3 %, so the last column counts in another way:
the trainer's time outside `Method.step`, as a share of that inside, of the same seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from glua_bench.console import Progress
from glua_bench.method import Batch, Context, Stage
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs import execution
from glua_bench.runs.plan import make_fabric, plan
from glua_bench.runs.request import RunRequest
from glua_bench.runs.trainer import Trainer


def time_steps(trainer: Trainer) -> list[float]:
    """Let a trainer note the seconds of each step of its stages; the list that it notes them in."""
    seconds: list[float] = []

    def timed(stage: Stage) -> Stage:
        update, _ = stage.trained_by(trainer.method)

        def step(batch: Batch, context: Context) -> dict[str, torch.Tensor]:
            began = time.perf_counter()
            values = update(batch, context)
            seconds.append(time.perf_counter() - began)
            return values

        return replace(stage, step=step)

    trainer.stages = tuple(map(timed, trainer.stages))
    return seconds


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--method", default="source_only")
    options = parser.parse_args()
    print(f"{options.method} on phantom, preset quick, {torch.get_num_threads()} threads")
    print(
        "augmentation   bare ms/step   harness ms/step   overhead (median of rounds)   outside step"
    )
    for augmentation in ("none", "geometric", "photometric"):
        planned = plan(
            RunRequest(
                options.method,
                "phantom",
                preset="quick",
                augmentation=augmentation,
                steps=options.steps,
            )
        )
        config = replace(planned.config, candidates=1)
        fabric = make_fabric(planned.request, config)
        bare_times, harness_times, ratios, outside = [], [], [], []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
                log = RunDirectory(Path(folder), config, "overhead")
                log.start({})
                with Progress(stream=nowhere) as progress:
                    alone = replace(planned, config=config, directory=log)
                    built = execution.build_run(alone, fabric, progress)
                    trainer, method, batches = built.trainer, built.method, built.trainer.batches
                    loaded = (batches.load(0, step) for step in range(options.steps))
                    tensors = [
                        Batch(images, labels.long(), more) for images, labels, more in loaded
                    ]
                    trainer.artefact = lambda stage: None
                    inside = time_steps(trainer)
                    built.fit()
                log.close()
                total = sum(trainer.seconds.values())
                outside.append(total / sum(inside) - 1)
                harness = total / options.steps
                (stage,) = method.stages()  # the last stage of several would be timed alone
                method.train()
                update, make = stage.trained_by(method)
                optimizers = make()
                context = Context(stage, 0, options.steps, optimizers, batches.target_slices)
                began = time.perf_counter()
                for tensor_batch in tensors:
                    update(tensor_batch, context)
                bare = (time.perf_counter() - began) / options.steps
            bare_times.append(bare)
            harness_times.append(harness)
            ratios.append(harness / bare)
        print(
            f"{augmentation:<13}{1000 * min(bare_times):>14.1f}{1000 * min(harness_times):>18.1f}"
            f"{100 * (statistics.median(ratios) - 1):>17.1f} %"
            f"{100 * statistics.median(outside):>25.1f} %"
        )


if __name__ == "__main__":
    main()
