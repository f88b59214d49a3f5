"""Preparing CT volumes of 512 × 512 × 256 voxels: this project, nibabel with scipy, and MONAI.

    pip install monai            # for the comparison only
    python benchmarks/prepare_volumes.py [--repeats 3]

Each of the pipelines reads an int16 image and its label, both .nii.gz, brings them to RAS, 0.9 mm
pixels, 2 mm slices and 256 × 256 pixels, scales the image between its percentiles 0.5 and 99.5 to
[-1, 1], and writes the result:

- `glua-bench`: the cache, as `glua-bench data prepare` fills it (digests of the files included).
- `scipy, order 1` and `order 3`: nibabel's `get_fdata`, `scipy.ndimage.zoom` with linear or, as
  published scripts have it, cubic interpolation (labels: nearest), `np.savez`.
- `MONAI`: its dictionary transforms, bilinear (labels: nearest), `np.savez`.

The volumes are synthetic: a body with lungs and four structures, Gaussian noise of 20 HU within the
scanner's circle and a constant outside it, which gzip brings to about half, as it does real CT.
All pipelines run in turn, each measurement in processes of its own (one or two, one thread each,
half of the volumes each), which start together after their imports. The files come from the page
cache. Memory is what a process's peak grows by after its imports, in int16 volumes (128 MiB).
Needs about 1 GB under the temporary directory, which is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (512, 512, 256)
MM = (0.44, 0.44, 0.625)
GRID_MM, SIZE = (0.9, 0.9, 2.0), 256
VOLUME = 2 * np.prod(SHAPE)  # bytes
VALUES = (205, 420, 500, 820)
Work = Callable[[Path, Path, Path], None]


def make_volume(folder: Path, number: int) -> None:
    """An image and its label, as a scanner stores them: x to the left, y to the back."""
    rng = np.random.default_rng(number)
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True
    )

    def ball(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1

    image = rng.standard_normal(SHAPE, np.float32)
    image *= 20
    image -= 1000
    label = np.zeros(SHAPE, np.int16)
    image[np.broadcast_to((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, SHAPE)] += 1040
    for side in (-0.4, 0.4):
        image[ball(side, 0, 0, 0.25, 0.4, 0.9)] -= 890
    for value, contrast, where in (
        (205, 70, (0.0, 0.1, 0.0, 0.3, 0.3, 0.6)),
        (500, 260, (0.0, 0.1, 0.0, 0.2, 0.2, 0.4)),
        (820, 280, (0.1, 0.4, 0.2, 0.1, 0.1, 0.7)),
        (420, 240, (-0.2, -0.2, 0.2, 0.12, 0.15, 0.3)),
    ):
        inside = ball(*where)
        image[inside] += contrast
        label[inside] = value
    image[np.broadcast_to(x**2 + y**2 > 1, SHAPE)] = -1024
    affine = np.diag([-MM[0], -MM[1], MM[2], 1.0])
    for name, data in (("image", image.astype(np.int16)), ("label", label)):
        nib.save(nib.Nifti1Image(data, affine), folder / f"{number}_{name}.nii.gz")


def ours() -> Work:
    """This project's cache."""
    from glua_bench.data.cache import SliceCache
    from glua_bench.task import Case, DomainView, Grid, Reading, Structure

    structures = tuple(Structure(str(value), "", (value,), "") for value in VALUES)
    view = DomainView("ct", Reading(), structures).on(Grid(SIZE, GRID_MM[0], GRID_MM[2]))

    def work(image: Path, label: Path, out: Path) -> None:
        case = Case(image.name, "ct", image, label, "train", image.name)
        cache = SliceCache(out)
        cache.image(case.unlabelled(), view)
        cache.label(case, view)

    return work


def plain(order: int) -> Work:
    """What scripts of the literature do."""
    from scipy import ndimage

    def window(data: np.ndarray) -> np.ndarray:
        """256 × 256 pixels around the middle."""
        for axis in (0, 1):
            left = max(0, (data.shape[axis] - SIZE) // 2)
            data = data.take(range(left, min(left + SIZE, data.shape[axis])), axis)
            missing = SIZE - data.shape[axis]
            pad = [(0, 0)] * 3
            pad[axis] = (missing // 2, missing - missing // 2)
            data = np.pad(data, pad, constant_values=data.min())
        return data

    def work(image: Path, label: Path, out: Path) -> None:
        volumes = [nib.as_closest_canonical(nib.load(file)) for file in (image, label)]
        factors = np.array(volumes[0].header.get_zooms()) / GRID_MM
        data = ndimage.zoom(volumes[0].get_fdata(), factors, order=order)
        low, high = np.percentile(data, (0.5, 99.5))
        data = (np.clip(data, low, high) - low) / (high - low) * 2 - 1
        classes = ndimage.zoom(volumes[1].get_fdata(), factors, order=0)
        np.savez(
            out / image.name,
            image=window(data).astype(np.float32),
            label=window(classes).astype(np.int16),
        )

    return work


def monai() -> Work:
    """MONAI's transforms, as its tutorials combine them."""
    import torch
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        Orientationd,
        ResizeWithPadOrCropd,
        ScaleIntensityRangePercentilesd,
        Spacingd,
    )

    torch.set_num_threads(1)
    both = ["image", "label"]
    transform = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, axcodes="RAS", labels=None),
            Spacingd(both, pixdim=GRID_MM, mode=("bilinear", "nearest")),
            ScaleIntensityRangePercentilesd("image", 0.5, 99.5, -1, 1, clip=True),
            ResizeWithPadOrCropd(both, (SIZE, SIZE, -1)),
        ]
    )

    def work(image: Path, label: Path, out: Path) -> None:
        found = transform({"image": image, "label": label})
        np.savez(
            out / image.name,
            image=found["image"].numpy(),
            label=found["label"].numpy().astype(np.int16),
        )

    return work


PIPELINES: dict[str, Callable[[], Work]] = {
    "glua-bench": ours,
    "scipy, order 1": lambda: plain(1),
    "scipy, order 3": lambda: plain(3),
    "MONAI": monai,
}


def serve(name: str, folder: Path, numbers: list[int]) -> None:
    """One worker: imports, says so, waits for the start, and tells what it took."""
    work = PIPELINES[name]()
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[1]) * resource.getpagesize()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        for number in numbers:
            work(folder / f"{number}_image.nii.gz", folder / f"{number}_label.nii.gz", Path(out))
        busy = time.process_time() - began
        print("done", flush=True)
        sys.stdin.readline()  # what is removed afterwards is not in the time
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(busy, (peak - before) / VOLUME, flush=True)


def measure(name: str, workers: int, folder: Path, volumes: int) -> tuple[float, float, float]:
    """Seconds and processor seconds of a volume, and the peak memory of the largest worker."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", name, str(folder),
             *map(str, range(worker, volumes, workers))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "GLUA_BENCH_CACHE": str(folder / "digests")},
            text=True,
        )
        for worker in range(workers)
    ]  # fmt: skip

    def all_say(word: str) -> None:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline().strip() != word:
                raise SystemExit(f"{name} failed; see its message above.")

    def all_go() -> None:
        for process in running:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    all_say("ready")
    began = time.perf_counter()
    all_go()
    all_say("done")
    took = time.perf_counter() - began
    all_go()
    told = [list(map(float, process.communicate()[0].split())) for process in running]
    busy, peaks = zip(*told, strict=True)
    return took / volumes, sum(busy) / volumes, max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--volumes", type=int, default=2, help="in each measurement")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, folder, *numbers = options.serve
        if name == "make":
            make_volume(Path(folder), int(numbers[0]))
        else:
            serve(name, Path(folder), list(map(int, numbers)))
        return
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(options.volumes):  # not here: a child's peak includes its parent's
            making = [sys.executable, __file__, "--serve", "make", str(folder), str(number)]
            subprocess.run(making, check=True)
        size = (folder / "0_image.nii.gz").stat().st_size
        print(f"image files of {size / VOLUME:.2f} of the {VOLUME / 2**20:.0f} MiB that they hold")
        for _ in range(options.repeats):
            for name in PIPELINES:
                for workers in (1, 2):
                    figures = measure(name, workers, folder, options.volumes)
                    found.setdefault((name, workers), []).append(figures)
    print(
        "pipeline        workers  s/volume (range)    volumes/s  processor s/volume  memory"
        "  glua-bench is"
    )
    for workers in (1, 2):
        reference = statistics.median(pace for pace, *_ in found["glua-bench", workers])
        for name in PIPELINES:
            paces, busy, peaks = zip(*found[name, workers], strict=True)
            pace = statistics.median(paces)
            print(
                f"{name:<15} {workers:>7}  {pace:>7.2f} ({min(paces):.2f}–{max(paces):.2f})"
                f"  {1 / pace:>9.3f}  {statistics.median(busy):>18.2f}  {max(peaks):>6.2f}"
                f"  {pace / reference:.1f} × as fast"
            )


if __name__ == "__main__":
    main()
