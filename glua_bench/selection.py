"""The plugin interface of selectors, which choose a checkpoint without target labels.

A selector scores each candidate checkpoint from labelled source cases and unlabelled target
training images. The candidate with the highest score is selected, the latest in case of ties.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from glua_bench.data.stores import ImageStore, LabelledStore
from glua_bench.method import Role

# Size of `Samples`: evenly spaced slices, and random pixels of each, which are the same for all
# candidates and methods.
SLICES, PIXELS = 64, 32
ROLES = ("source_train", "source_val", "target_train")


@dataclass(frozen=True)
class Samples:
    """Outputs of a candidate at sampled pixels, on the CPU in float32.

    Attributes:
        logits: (M, K).
        features: (M, D); D = 0 if no selector of the run uses them.
        labels: (M,), class indices of source pixels, or `UNANNOTATED`; None for the target.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor | None

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits in double precision, (M, K)."""
        return self.logits.double().softmax(1)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint and the data for its selection, without target labels.

    Attributes:
        step: number of updates of the segmenter.
        predict: images (N, S, H, W) and domain ("source" or "target") → logits (N, K, H, W),
            without gradients, on `device`.
        classes: number of classes K, including background.
        source_val: labelled slices of source subjects held out from training; None if the
            scenario has none.
        translate: transformation of source images in training (e.g. restyling).
        target_train: unlabelled target training slices; None if the run has none.
        device: device of the images for `predict`.
        samples: role ("source_train", "source_val", "target_train") → samples, with translated
            source slices; roles without slices, and those that no selector of the run names in
            `samples_from`, are missing.
        trajectory: step → samples of the same target pixels for all candidates of the run, for
            selectors with `uses_trajectory`.
    """

    step: int
    predict: Callable[[Tensor, Role], Tensor]
    classes: int
    source_val: LabelledStore | None
    translate: Callable[[Tensor], Tensor]
    target_train: ImageStore | None
    device: torch.device
    samples: Mapping[str, Samples] = field(default_factory=dict)
    trajectory: Mapping[int, Samples] = field(default_factory=dict)


class Selector(ABC):
    """Base class of selectors."""

    name: ClassVar[str]
    reference: ClassVar[str]
    needs: ClassVar[str]
    uses_samples: ClassVar[bool] = False  # needs `Candidate.samples`
    samples_from: ClassVar[tuple[str, ...]] = ROLES  # roles of these samples
    uses_features: ClassVar[bool] = True  # needs `Samples.features`, a further forward pass
    uses_trajectory: ClassVar[bool] = False  # needs `Candidate.trajectory`

    @abstractmethod
    def score(self, candidate: Candidate) -> float:
        """Compute a score of the candidate; higher is better, NaN if it is undefined."""


@torch.no_grad()
def sample_pixels(
    predict: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor] | None,
    store: ImageStore,
    translate: Callable[[Tensor], Tensor],
    device: torch.device,
    slices: int = SLICES,
    pixels: int = PIXELS,
) -> Samples:
    """Sample logits, features and, if available, labels at fixed random pixels.

    Args:
        predict: (N, S, H, W) → logits (N, K, H, W).
        features: (N, S, H, W) → (N, D, h, w); each pixel gets the features of its cell. None
            samples none.
        store: the slices.
        translate: applied to images before `predict` and `features`.
        device: device of the images for `predict`.
        slices: maximum number of slices, evenly spaced.
        pixels: number of pixels per slice.
    """
    count = min(slices, len(store))
    chosen = ((np.arange(count) + 0.5) * len(store) / count).astype(np.int64)
    places = torch.from_numpy(
        np.random.default_rng(0).integers(0, store.size[0] * store.size[1], (count, pixels))
    )
    logits: list[Tensor] = []
    found: list[Tensor] = []
    for start in range(0, count, 32):
        images = torch.from_numpy(store.images(chosen[start : start + 32])).to(device)
        images = translate(images)
        wanted = [(predict, logits), *([] if features is None else [(features, found)])]
        for answer, into in wanted:
            maps = answer(images)
            at = _cells(places[start : start + 32], store.size, maps.shape[-2:]).to(device)
            flat = maps.float().flatten(2)
            picked = flat.gather(2, at[:, None].expand(-1, flat.shape[1], -1))
            into.append(picked.transpose(1, 2).flatten(0, 1).cpu())
    labels = None
    if isinstance(store, LabelledStore):
        own = torch.from_numpy(store.labels(chosen)).flatten(1)
        labels = own.gather(1, places).flatten()
    pixels_seen = torch.cat(logits)
    none = pixels_seen.new_empty(len(pixels_seen), 0)
    return Samples(pixels_seen, torch.cat(found) if found else none, labels)


def _cells(places: Tensor, size: tuple[int, int], cells: torch.Size) -> Tensor:
    """Convert flat pixel indices of an image to flat indices of a coarser map."""
    rows = torch.div(places, size[1], rounding_mode="floor") * cells[0]
    columns = places % size[1] * cells[1]
    rows = torch.div(rows, size[0], rounding_mode="floor")
    return rows * cells[1] + torch.div(columns, size[1], rounding_mode="floor")


def choose(scores: dict[int, float]) -> int:
    """Return the step with the highest score, the latest in case of ties; NaN is never selected.

    Args:
        scores: step → score.

    Returns:
        The selected step; the latest step if all scores are NaN.
    """
    valid = {step: score for step, score in scores.items() if not np.isnan(score)}
    if not valid:
        return max(scores)
    return max(valid, key=lambda step: (valid[step], step))
