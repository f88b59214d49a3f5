"""What the harness costs a step, against a bare loop over the same networks and tensors.

    python benchmarks/harness_overhead.py [--steps 40] [--rounds 10]

Both sides call the same `Method.step`. The trainer adds loading, seeding, learning rates,
augmentation, logging to a run directory and the progress display; the bare loop has every
batch in memory. They take turns in one process, and each round gives one ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from glua_bench import runs
from glua_bench.batches import Batches
from glua_bench.cache import SliceCache
from glua_bench.console import Progress
from glua_bench.method import Batch, Context
from glua_bench.tracking import RunDirectory
from glua_bench.trainer import Trainer


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--method", default="source_only")
    options = parser.parse_args()
    print(f"{options.method} on phantom, preset quick, {torch.get_num_threads()} threads")
    print("augmentation   bare ms/step   harness ms/step   overhead (median of rounds)")
    for augmentation in ("none", "geometric", "photometric"):
        planned = runs.plan(
            runs.RunRequest(
                options.method,
                "phantom",
                preset="quick",
                augmentation=augmentation,
                steps=options.steps,
            )
        )
        config = replace(planned.config, candidates=1)
        quiet = Progress(enabled=False)
        train, _, target = runs.stores(planned, SliceCache(), quiet)
        fabric = runs.make_fabric(planned.request, config)
        batches = Batches(train, target, config.batch_size, config.seed, fabric.device)
        tensors = [Batch(*batches.load(0, step)) for step in range(options.steps)]
        bare_times, harness_times, ratios = [], [], []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
                log = RunDirectory(Path(folder), config, "overhead")
                log.start({})
                method = runs.build_method(config, planned.dataset, planned.method_class)
                with Progress(stream=nowhere) as progress:
                    trainer = Trainer(
                        method, config, batches, fabric, log.checkpoints, log, progress
                    )
                    trainer.fit()
                log.close()
                harness = sum(trainer.seconds.values()) / options.steps
                stage = trainer.stages[-1]
                method.train()
                optimizers = method.optimizers(stage)
                context = Context(stage, 0, options.steps, optimizers, batches.target_slices)
                began = time.perf_counter()
                for tensor_batch in tensors:
                    method.step(tensor_batch, context)
                bare = (time.perf_counter() - began) / options.steps
            bare_times.append(bare)
            harness_times.append(harness)
            ratios.append(harness / bare)
        batches.close()
        print(
            f"{augmentation:<13}{1000 * min(bare_times):>14.1f}{1000 * min(harness_times):>18.1f}"
            f"{100 * (statistics.median(ratios) - 1):>17.1f} %"
        )


if __name__ == "__main__":
    main()
