"""Surface metrics against other libraries, and the evaluation of a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy import ndimage

from benchmarks.rows import Row, Settings, alternate, ratio_row
from glua_bench.scoring.metrics import case_metrics
from glua_bench.task import Structure

SPACING = (1.0, 1.0, 1.0)
NAMES = ("MYO", "LAC", "LVC", "AA")
STRUCTURES = [Structure(name, name, (i,), "#000000") for i, name in enumerate(NAMES, start=1)]
Values = list[tuple[float, float, float]]  # Dice, ASSD, HD95 of each structure


def heart(shape: tuple[int, int, int], raggedness: float, seed: int = 0) -> np.ndarray:
    """Return labels of heart-like structures with ragged surfaces.

    uint8, 1 myocardium, 2 left atrium, 3 cavity of the left ventricle, 4 aorta.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    scale = np.array(shape) / (130, 256, 256)
    labels = np.zeros(shape, np.uint8)
    bodies = (
        (4, (95, 95, 135), (30, 15, 15)),
        (2, (85, 140, 150), (22, 32, 28)),
        (1, (55, 130, 110), (42, 34, 34)),
        (3, (55, 130, 110), (33, 24, 24)),
    )
    for label, centre, radii in bodies:
        noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), 4)
        noise *= raggedness / noise.std()
        shift = rng.uniform(-raggedness, raggedness, 3)
        r = np.sqrt(
            sum(
                ((axis - c - s) / radius) ** 2
                for axis, c, s, radius in zip(
                    (z, y, x), scale * centre, shift, scale * radii, strict=True
                )
            )
        )
        labels[(r - 1) * min(scale * radii) < noise] = label
    return labels


def ours(prediction: np.ndarray, reference: np.ndarray) -> Values:
    """Return the values of `case_metrics`."""
    rows = case_metrics(prediction, reference, STRUCTURES, SPACING)
    return [(row["dice"], row["assd"], row["hd95"]) for row in rows]


def by_medpy(prediction: np.ndarray, reference: np.ndarray) -> Values:
    """Return medpy's values."""
    from medpy.metric import binary

    pairs = [(prediction == label, reference == label) for label in range(1, 5)]
    return [
        (binary.dc(*pair), binary.assd(*pair, SPACING), binary.hd95(*pair, SPACING))
        for pair in pairs
    ]


def by_monai(prediction: np.ndarray, reference: np.ndarray) -> Values:
    """Return MONAI's values."""
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
    )

    def one_hot(labels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([labels == label for label in range(1, 5)]))[None]

    first, second = one_hot(prediction), one_hot(reference)
    own = {"include_background": True, "spacing": SPACING}
    dice = compute_dice(first, second, include_background=True)
    assd = compute_average_surface_distance(first, second, symmetric=True, **own)
    hd95 = compute_hausdorff_distance(first, second, percentile=95, **own)
    return [(float(a), float(b), float(c)) for a, b, c in zip(dice[0], assd[0], hd95[0])]  # noqa: B905


def by_deepmind(prediction: np.ndarray, reference: np.ndarray) -> Values:
    """Return the values of DeepMind's surface-distance.

    It weights surface elements by their area, so that its distances differ from the others'.
    """
    import surface_distance as library

    found = []
    for label in range(1, 5):
        first, second = prediction == label, reference == label
        surfaces = library.compute_surface_distances(second, first, SPACING)
        means = library.compute_average_surface_distance(surfaces)
        found.append(
            (
                float(library.compute_dice_coefficient(second, first)),
                float(np.mean(means)),
                float(library.compute_robust_hausdorff(surfaces, 95)),
            )
        )
    return found


def measure_surface(settings: Settings) -> Iterator[Row]:
    """Yield a row per library."""
    shape = (24, 48, 48) if settings.quick else (130, 256, 256)
    reference, prediction = heart(shape, 0.0), heart(shape, 2.0)
    expected = np.array(ours(prediction, reference))
    libraries: tuple[tuple[str, str, Callable[..., Values]], ...] = (
        ("medpy", "medpy", by_medpy),
        ("monai", "monai", by_monai),
        ("deepmind", "surface-distance", by_deepmind),
    )
    for name, package, function in libraries:
        settings.report(f"surface metrics against {package}")
        row = f"surface.{name}"
        compared = f"`case_metrics` ÷ {package}: Dice, ASSD and HD95 of four structures"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = np.array(function(prediction, reference))
            except ImportError:
                yield Row(row, compared, note=f"needs {package}: pip install {package}")
                continue
            sides = {
                "ours": partial(ours, prediction, reference),
                "theirs": partial(function, prediction, reference),
            }
            times = alternate(sides, min(3, settings.rounds), 0.05, settings.clock)
        worst = np.abs(found - expected).max(0)
        note = "largest difference " + ", ".join(
            f"{what} {value:.1g}{unit}"
            for what, value, unit in zip(
                ("Dice", "ASSD", "HD95"), worst, ("", " mm", " mm"), strict=True
            )
        )
        yield ratio_row(row, compared, times["ours"], times["theirs"], note=note)


def measure_evaluation(settings: Settings) -> Iterator[Row]:
    """Yield the rows of a case's evaluation: network and a plain script."""
    import nibabel as nib
    import torch
    from medpy.metric import binary

    from benchmarks import small, steps
    from glua_bench.data.cache import SliceCache
    from glua_bench.scoring.evaluation import evaluate, predict_volume

    settings.report("evaluation of a case")
    config = steps.configure("source_only", settings=steps.SMALL if settings.quick else ())
    ((method, *_),) = steps.training_steps(config)
    method.eval()
    device = torch.device("cpu")
    predict = partial(method.predict, domain="target")
    scale = 3.0 if settings.quick else 1.0
    with small.phantom(settings.scratch / f"scale{scale}", scale):
        dataset = small.Phantom()
        (case,) = dataset.split("ct", "test")[:1]
        view = dataset.view("ct").on(config.grid)
        cache = SliceCache()
        image = cache.image(case.unlabelled(), view)
        out = settings.scratch / "predictions"
        out.mkdir(exist_ok=True)

        def whole() -> None:
            evaluate(predict, dataset, [case], config.grid, cache, device, small.QUIET, out)

        @torch.no_grad()
        def network() -> np.ndarray:
            return predict_volume(predict, image, device)

        def script() -> None:
            """Resample the classes with SciPy, save them, and score them with medpy."""
            classes = network().argmax(0)
            truth = nib.load(case.truth)
            reference = np.asarray(truth.dataobj)
            factors = np.divide(reference.shape, classes.T.shape)
            labels = ndimage.zoom(classes.T.astype(np.uint8), factors, order=0)
            nib.save(nib.Nifti1Image(labels, truth.affine), out / "script.nii.gz")
            for number, structure in enumerate(view.structures, start=1):
                pair = labels == number, np.isin(reference, structure.values)
                binary.dc(*pair)
                if all(mask.any() for mask in pair):
                    binary.assd(*pair, truth.header.get_zooms())
                    binary.hd95(*pair, truth.header.get_zooms())

        found = alternate({"whole": whole, "network": network, "script": script}, settings.rounds)
    for name, what in (
        ("network", "the network's predictions alone"),
        ("script", "plain script: the same predictions, SciPy's zoom, nibabel, medpy"),
    ):
        yield ratio_row(
            f"evaluate.{name}", f"`evaluate` of a case ÷ {what}", found["whole"], found[name]
        )
