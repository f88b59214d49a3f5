"""Batches per second against torch's `DataLoader` and MONAI.

A batch holds eight source images with labels and eight target images, 256 × 256 pixels each, drawn
at random; with geometric augmentation each image is turned, scaled and shifted by up to 15°, 15 %
and 10 %, and labels are with it. Our loader reads ahead in one thread, the others in one worker
process. Nothing is done with the batches.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.rows import Row, Settings, ratio_row

CLASSES, BATCH, WARM = 5, 8, 3
Batch = tuple[Tensor, Tensor, Tensor]
Source = Callable[[bool], Iterator[Batch]]  # whether with augmentation


def make_volume(domain: str, number: int, depth: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return smooth images with noise, float32 in [-1, 1], and blocky labels, uint8."""
    rng = np.random.default_rng([number, domain == "ct"])
    coarse = torch.from_numpy(rng.uniform(-0.8, 0.8, (depth, 1, 16, 16)).astype(np.float32))
    images = F.interpolate(coarse, size=size, mode="bilinear")[:, 0].numpy()
    images += rng.normal(0, 0.05, images.shape).astype(np.float32)
    labels = rng.integers(0, CLASSES, (depth, 16, 16)).astype(np.uint8)
    return np.clip(images, -1, 1), labels.repeat(size // 16, 1).repeat(size // 16, 2)


def make_files(folder: Path, volumes: int, depth: int, size: int) -> int:
    """Write what each side reads; return the number of slices of a domain."""
    from glua_bench.data.stores import IMAGE_TYPE
    from glua_bench.files import add_checksum

    def entry(name: str, array: np.ndarray) -> None:
        path = folder / name
        with path.open("wb") as file:
            np.save(file, array)
            file.write(b"{}")
        add_checksum(path, path.name)

    for volume, domain in itertools.product(range(volumes), ("mr", "ct")):
        images, labels = make_volume(domain, volume, depth, size)
        entry(f"{domain}{volume}_images.npy", images.astype(IMAGE_TYPE))
        entry(f"{domain}{volume}_labels.npy", labels)
        for z in range(depth):
            name = f"{domain}{volume * depth + z}.npz"
            np.savez(folder / name, image=images[z], label=labels[z])
    return volumes * depth


def ours(folder: Path, volumes: int, depth: int, size: int, in_memory: bool = True) -> Source:
    """`Batches` over stores of cached volumes."""
    from glua_bench import augment
    from glua_bench.data.batches import Batches
    from glua_bench.data.formats import Forms
    from glua_bench.data.resampling import Placement
    from glua_bench.data.stores import CachedImage, CachedLabel, ImageStore, LabelledStore

    shape = (depth, size, size)
    placement = Placement(
        shape, ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        Forms.of(np.eye(4), (1, 1)), (1, 1, 1), 0.001,
        (0, 1, 2), (False, False, False), (0, 0, 0), (1, 1, 1), shape,
    )  # fmt: skip
    images = {
        domain: [
            CachedImage(folder / f"{domain}{volume}_images.npy", placement, shape)
            for volume in range(volumes)
        ]
        for domain in ("mr", "ct")
    }
    labels = [CachedLabel(folder / f"mr{volume}_labels.npy", shape) for volume in range(volumes)]
    source = LabelledStore(images["mr"], labels, in_memory)
    target = ImageStore(images["ct"], in_memory)

    def batches(moving: bool) -> Iterator[Batch]:
        loader = Batches(source, target, BATCH, 0, torch.device("cpu"))
        try:
            for step in itertools.count():
                first, classes, second = loader.load(0, step)
                assert second is not None
                if moving:
                    first, moved = augment.geometric(first, classes)
                    assert moved is not None
                    classes, second = moved, augment.geometric(second)[0]
                yield first, classes.long(), second
        finally:
            loader.close()

    return batches


class Files(Dataset):
    """A pair of slices, each from its file, moved by a map of its own."""

    def __init__(self, folder: Path, count: int, size: int, moving: bool) -> None:
        self.folder, self.count, self.size, self.moving = folder, count, size, moving

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        with np.load(self.folder / f"mr{index}.npz") as file:
            image, label = torch.from_numpy(file["image"])[None], torch.from_numpy(file["label"])
        other = int(torch.randint(self.count, ()))
        with np.load(self.folder / f"ct{other}.npz") as file:
            target = torch.from_numpy(file["image"])[None]
        if self.moving:
            grid = self.grid()
            image = self.moved(image, grid, "bilinear")
            label = self.moved(label[None].float(), grid, "nearest")[0]
            target = self.moved(target, self.grid(), "bilinear")
        return image, label.long(), target

    def grid(self) -> Tensor:
        """Return where each pixel of a moved image lies in the image."""
        angle, scale = math.radians(15) * torch.empty(1).uniform_(-1, 1), torch.empty(1)
        scale.uniform_(0.85, 1.15)
        shift = torch.empty(2).uniform_(-0.2, 0.2)
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        rows = [torch.cat([cos, -sin, shift[:1]]), torch.cat([sin, cos, shift[1:]])]
        shape = [1, 1, self.size, self.size]
        return F.affine_grid(torch.stack(rows)[None], shape, align_corners=False)

    @staticmethod
    def moved(image: Tensor, grid: Tensor, mode: str) -> Tensor:
        """Sample an image at the places of a grid."""
        return F.grid_sample(image[None], grid, mode, padding_mode="border", align_corners=False)[0]


def by_files(folder: Path, count: int, size: int) -> Source:
    """torch's loader over a file per slice."""

    def batches(moving: bool) -> Iterator[Batch]:
        data = Files(folder, count, size, moving)
        endless = RandomSampler(data, replacement=True, num_samples=10**9)
        return iter(DataLoader(data, BATCH, sampler=endless, num_workers=1))

    return batches


def by_monai(folder: Path, count: int, size: int) -> Source:
    """MONAI's cache in memory, its transforms and its loader."""
    import monai.data
    from monai.transforms import Compose, EnsureTyped, Lambdad, RandAffined

    def read(name: str, key: str) -> np.ndarray:
        with np.load(folder / f"{name}.npz") as file:
            return file[key][None]

    def moves(keys: list[str], modes: list[str]) -> Any:
        return RandAffined(
            keys,
            prob=1,
            rotate_range=math.radians(15),
            shear_range=None,
            translate_range=size * 0.1,
            scale_range=0.15,
            mode=modes,
            padding_mode="border",
        )

    names = [{"image": f"mr{i}", "label": f"mr{i}", "target": f"ct{i}"} for i in range(count)]
    reading = [
        Lambdad(["image", "target"], lambda name: read(name, "image")),
        Lambdad("label", lambda name: read(name, "label")),
        EnsureTyped(["image", "label", "target"]),
    ]
    both = [moves(["image", "label"], ["bilinear", "nearest"]), moves(["target"], ["bilinear"])]
    held = monai.data.CacheDataset(names, Compose(reading), progress=False)

    def batches(moving: bool) -> Iterator[Batch]:
        held.transform = Compose([*reading, *(both if moving else [])])
        endless = RandomSampler(held, replacement=True, num_samples=10**9)
        loader = monai.data.DataLoader(held, batch_size=BATCH, sampler=endless, num_workers=1)
        for batch in loader:
            yield batch["image"], batch["label"][:, 0].long(), batch["target"]

    return batches


def timed(source: Source, moving: bool, count: int, size: int) -> float:
    """Return seconds per batch."""
    batches = source(moving)
    images, labels, target = next(batches)  # the sides give the same
    assert images.shape == target.shape == (BATCH, 1, size, size)
    assert labels.shape == (BATCH, size, size) and labels.dtype == torch.int64
    assert images.dtype == target.dtype == torch.float32
    for _ in range(WARM):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = (time.perf_counter() - began) / count
    del batches  # and its workers end
    return seconds


def measure_batches(settings: Settings) -> Iterator[Row]:
    """Yield two rows per library: without and with augmentation."""
    volumes, depth, size, count = (1, 16, 64, 5) if settings.quick else (4, 50, 256, 40)
    folder = settings.scratch / "slices"
    folder.mkdir(exist_ok=True)
    total = make_files(folder, volumes, depth, size)
    own = ours(folder, volumes, depth, size)
    others: dict[str, Callable[[], Source]] = {
        "files": lambda: by_files(folder, total, size),
        "monai": lambda: by_monai(folder, total, size),
    }
    shown = {
        "files": "torch's `DataLoader` over a file per slice",
        "monai": "MONAI's `CacheDataset` and `DataLoader`",
    }
    for name, make in others.items():
        settings.report(f"batches against {name}")
        try:
            other = make()
        except ImportError:
            yield Row(f"batches.{name}", shown[name], note="needs monai: pip install monai")
            continue
        for moving, what in ((False, "plain"), (True, "geometric")):
            first, second = [], []
            for number in range(min(5, settings.rounds)):
                sides = [(own, first), (other, second)]
                for source, found in sides if number % 2 else sides[::-1]:
                    found.append(timed(source, moving, count, size))
            compared = f"seconds per batch, {what}: `Batches` ÷ {shown[name]}"
            yield ratio_row(f"batches.{name}.{what}", compared, first, second)
