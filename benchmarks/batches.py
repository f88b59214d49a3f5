"""Batches a second from the cache, from a `DataLoader` over npz files, and from MONAI.

    pip install monai            # for the comparison only
    python benchmarks/batches.py [--repeats 3]

A batch holds source images with their labels and target images, 256 × 256 pixels each, drawn at
random from 800 slices of either domain; with the augmentation `geometric`, each image is turned,
scaled and shifted by up to 15°, 15 % and 10 %, its label alike.

- `glua-bench`: `Batches`, which reads one batch ahead with one or two threads, from slices held in
  memory; the augmentation is done on the whole batch, with as many threads of torch.
- `glua-bench, mapped`: the same from memory-mapped files, as for data sets that are larger.
- `npz`: torch's `DataLoader` with one or two worker processes over a file of each slice
  (`np.savez`, float32 and uint8), the augmentation with torch on each sample.
- `MONAI`: its `CacheDataset`, which holds all slices in memory, and its `DataLoader` with as many
  worker processes; the augmentation is `RandAffined`.

Nothing is done with the batches, and the indices never end, so that no epoch's end costs the others
a start. All run in turn, each in a process of its own that stays, with workers of its own that do
not. Processor time counts all threads and processes and all batches made, those read ahead too; it
tells more than the clock where the machine has other work. Needs about 1.5 GB of memory and as much
under the temporary directory, which is removed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

VOLUMES, DEPTH, SIZE, CLASSES = 10, 80, 256, 5
COUNT = VOLUMES * DEPTH
SIZES, POLICIES, WORKERS = (8, 32), ("none", "geometric"), (1, 2)
WARM = 5  # batches before the clock starts
Batch = tuple[Tensor, Tensor, Tensor]
Source = Callable[[int, str, int], Iterator[Batch]]  # batch size, policy, workers


def make_slices(domain: str, volume: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth images with noise, float32 in [-1, 1], and blocky labels, uint8."""
    rng = np.random.default_rng([volume, domain == "ct"])
    coarse = torch.from_numpy(rng.uniform(-0.8, 0.8, (DEPTH, 1, 16, 16)).astype(np.float32))
    images = F.interpolate(coarse, size=SIZE, mode="bilinear")[:, 0].numpy()
    images += rng.normal(0, 0.05, images.shape).astype(np.float32)
    labels = rng.integers(0, CLASSES, (DEPTH, 16, 16)).astype(np.uint8)
    return np.clip(images, -1, 1), labels.repeat(16, 1).repeat(16, 2)


def make_files(folder: Path) -> None:
    """What each of the contenders reads."""
    from glua_bench.data.stores import IMAGE_TYPE

    for volume in range(VOLUMES):
        for domain in ("mr", "ct"):
            images, labels = make_slices(domain, volume)
            np.save(folder / f"{domain}{volume}_images.npy", images.astype(IMAGE_TYPE))
            np.save(folder / f"{domain}{volume}_labels.npy", labels)
            for z in range(DEPTH):
                number = volume * DEPTH + z
                np.savez(folder / f"{domain}{number}.npz", image=images[z], label=labels[z])


# -- the contenders -------------------------------------------------------------------------------


def ours(folder: Path, in_memory: bool) -> Source:
    """`Batches` over stores of cached volumes."""
    from glua_bench import augment
    from glua_bench.data.batches import Batches
    from glua_bench.data.formats import Forms
    from glua_bench.data.resampling import Placement
    from glua_bench.data.stores import CachedImage, CachedLabel, ImageStore, LabelledStore

    shape = (DEPTH, SIZE, SIZE)
    placement = Placement(
        shape, ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        Forms.of(np.eye(4), (1, 1)), (1, 1, 1), 0.001,
        (0, 1, 2), (False, False, False), (0, 0, 0), (1, 1, 1), shape,
    )  # fmt: skip
    images = {
        domain: [
            CachedImage(folder / f"{domain}{volume}_images.npy", placement, shape)
            for volume in range(VOLUMES)
        ]
        for domain in ("mr", "ct")
    }
    labels = [CachedLabel(folder / f"mr{v}_labels.npy", shape) for v in range(VOLUMES)]
    source = LabelledStore(images["mr"], labels, in_memory)
    target = ImageStore(images["ct"], in_memory)

    def batches(size: int, policy: str, workers: int) -> Iterator[Batch]:
        torch.set_num_threads(workers)
        loader = Batches(source, target, size, 0, torch.device("cpu"))
        try:
            for step in itertools.count():
                first, classes, second = loader.load(0, step)
                assert second is not None
                if policy == "geometric":
                    first, moved = augment.geometric(first, classes)
                    assert moved is not None
                    classes, second = moved, augment.geometric(second)[0]
                yield first, classes.long(), second
        finally:
            loader.close()

    return batches


class Files(Dataset):
    """A pair of slices, each from its file, moved by a map of its own."""

    def __init__(self, folder: Path, policy: str) -> None:
        self.folder, self.policy = folder, policy

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Batch:
        with np.load(self.folder / f"mr{index}.npz") as file:
            image, label = torch.from_numpy(file["image"])[None], torch.from_numpy(file["label"])
        other = int(torch.randint(COUNT, ()))
        with np.load(self.folder / f"ct{other}.npz") as file:
            target = torch.from_numpy(file["image"])[None]
        if self.policy == "geometric":
            grid = self.grid()
            image = self.moved(image, grid, "bilinear")
            label = self.moved(label[None].float(), grid, "nearest")[0]
            target = self.moved(target, self.grid(), "bilinear")
        return image, label.long(), target

    def grid(self) -> Tensor:
        """Where each pixel of a moved image lies in the image."""
        angle, scale = math.radians(15) * torch.empty(1).uniform_(-1, 1), torch.empty(1)
        scale.uniform_(0.85, 1.15)
        shift = torch.empty(2).uniform_(-0.2, 0.2)
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        rows = [torch.cat([cos, -sin, shift[:1]]), torch.cat([sin, cos, shift[1:]])]
        return F.affine_grid(torch.stack(rows)[None], [1, 1, SIZE, SIZE], align_corners=False)

    def moved(self, image: Tensor, grid: Tensor, mode: str) -> Tensor:
        return F.grid_sample(
            image[None], grid, mode, padding_mode="border", align_corners=False
        )[0]  # fmt: skip


def npz(folder: Path) -> Source:
    """torch's loader over files of slices."""

    def batches(size: int, policy: str, workers: int) -> Iterator[Batch]:
        data = Files(folder, policy)
        endless = RandomSampler(data, replacement=True, num_samples=10**9)
        return iter(DataLoader(data, size, sampler=endless, num_workers=workers))

    return batches


def monai(folder: Path) -> Source:
    """MONAI's cache and transforms, each target slice beside a source slice."""
    import monai.data
    from monai.transforms import Compose, EnsureTyped, Lambdad, RandAffined

    def read(name: str, key: str) -> np.ndarray:
        with np.load(folder / f"{name}.npz") as file:
            return file[key][None]

    def moving(keys: list[str], modes: list[str]) -> Any:
        return RandAffined(
            keys,
            prob=1,
            rotate_range=math.radians(15),
            shear_range=None,
            translate_range=SIZE * 0.1,
            scale_range=0.15,
            mode=modes,
            padding_mode="border",
        )

    names = [{"image": f"mr{i}", "label": f"mr{i}", "target": f"ct{i}"} for i in range(COUNT)]
    keys = ["image", "label", "target"]
    reading = [
        Lambdad(["image", "target"], lambda name: read(name, "image")),
        Lambdad("label", lambda name: read(name, "label")),
        EnsureTyped(keys),
    ]
    moves = [moving(["image", "label"], ["bilinear", "nearest"]), moving(["target"], ["bilinear"])]
    held = monai.data.CacheDataset(names, Compose(reading), progress=False)

    def batches(size: int, policy: str, workers: int) -> Iterator[Batch]:
        held.transform = Compose([*reading, *(moves if policy == "geometric" else [])])
        endless = RandomSampler(held, replacement=True, num_samples=10**9)
        for batch in monai.data.DataLoader(held, batch_size=size, sampler=endless,
                                           num_workers=workers):  # fmt: skip
            yield batch["image"], batch["label"][:, 0].long(), batch["target"]

    return batches


CONTENDERS: dict[str, Callable[[Path], Source]] = {
    "glua-bench": lambda folder: ours(folder, True),
    "glua-bench, mapped": lambda folder: ours(folder, False),
    "npz": npz,
    "MONAI": monai,
}


# -- measuring ------------------------------------------------------------------------------------


def serve(name: str, folder: Path) -> None:
    """One contender: for each line of settings, batches a second and processor ms a batch."""
    source = CONTENDERS[name](folder)
    print("ready", flush=True)
    for line in sys.stdin:
        size, policy, workers, count = line.split()
        before = busy()
        batches = source(int(size), policy, int(workers))
        check(next(batches), int(size))
        for _ in range(WARM - 1):
            next(batches)
        began = time.perf_counter()
        for _ in range(int(count)):
            next(batches)
        took = time.perf_counter() - began
        del batches  # and its workers end, so that their time is known
        ahead = 1 if name.startswith("glua") else 2 * int(workers)
        made = WARM + int(count) + ahead
        print(int(count) / took, 1000 * (busy() - before) / made, flush=True)


def busy() -> float:
    """Processor seconds of this process and of those that it began and that have ended."""
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def check(batch: Iterable[Tensor], size: int) -> None:
    """All contenders give the same thing."""
    images, labels, target = batch
    assert images.shape == target.shape == (size, 1, SIZE, SIZE)
    assert labels.shape == (size, SIZE, SIZE) and labels.dtype == torch.int64
    assert images.dtype == target.dtype == torch.float32
    assert int(labels.max()) == CLASSES - 1 and images.std() > 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1600, help="of a domain, in each measurement")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]))
        return
    found: dict[tuple[int, str, int, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        running = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--serve", name, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Threads that wait sleep: they burn no time that others need.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
                text=True,
            )
            for name in CONTENDERS
        }

        def told(name: str) -> str:
            out = running[name].stdout
            assert out is not None
            line = out.readline().strip()
            if not line:
                raise SystemExit(f"{name} failed; see its message above.")
            return line

        for name in CONTENDERS:
            told(name)
        for _ in range(options.repeats):
            for size, policy, workers in itertools.product(SIZES, POLICIES, WORKERS):
                for name, process in running.items():
                    assert process.stdin is not None
                    count = options.images // size
                    process.stdin.write(f"{size} {policy} {workers} {count}\n")
                    process.stdin.flush()
                    figures = list(map(float, told(name).split()))
                    found.setdefault((size, policy, workers, name), []).append(figures)
        for process in running.values():
            process.communicate()
    print(
        "batch  augmentation  workers  contender           batches/s (range)       "
        "processor ms/batch  glua-bench is"
    )
    for size, policy, workers in itertools.product(SIZES, POLICIES, WORKERS):
        reference = statistics.median(
            pace for pace, _ in found[size, policy, workers, "glua-bench"]
        )
        for name in CONTENDERS:
            paces, used = zip(*found[size, policy, workers, name], strict=True)
            pace = statistics.median(paces)
            between = f"{pace:.1f} ({min(paces):.1f}–{max(paces):.1f})"
            print(
                f"{size:>5}  {policy:<12}  {workers:>7}  {name:<18}  {between:<22}  "
                f"{statistics.median(used):>18.1f}  {reference / pace:.1f} × as fast"
            )


if __name__ == "__main__":
    main()
