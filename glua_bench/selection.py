"""What a selector owes: which checkpoint counts is decided without target labels.

A selector gives every candidate checkpoint a score from what a user of unlabelled target data
has: labelled source cases and the target's training images. The candidate with the highest
score is the selector's choice; of equals, the latest. The selectors themselves are in
`selectors.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from glua_bench.cache import ImageStore, LabelledStore
from glua_bench.method import Role

# Pixels that scores are computed of: so many slices, spread evenly, so many of each at random
# places, the same for all candidates of a run and for all methods.
SLICES, PIXELS = 64, 32
ROLES = ("source_train", "source_val", "target_train")


@dataclass(frozen=True)
class Samples:
    """Pixels of slices, as a candidate answers them; on the CPU, float32.

    Args:
        logits: (M, K).
        features: (M, D).
        labels: (M,), class indices of source pixels, or `UNANNOTATED`; None for the target.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor | None

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, (M, K) in double precision."""
        return self.logits.double().softmax(1)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, as a selector sees it. No field leads to a target label.

    Args:
        step: updates of the segmenter behind it.
        predict: images (N, S, H, W) and whose they are, "source" or "target" → logits
            (N, K, H, W), without gradients, on `device`.
        classes: K, background included.
        source_val: labelled slices of source subjects that training did not see; None where
            the scenario has none.
        translate: what the training applied to source images (e.g. restyling).
        target_train: the target's training slices, without labels; None where not served.
        device: where `predict` expects images.
        samples: role ("source_train", "source_val", "target_train") → pixels of its slices,
            source slices translated; without the roles that the run has no slices for, and
            empty where no selector `uses_samples`.
        trajectory: step → target pixels, the same ones, of all candidates of the run.
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
    """Scores candidates; the highest wins."""

    name: ClassVar[str]
    reference: ClassVar[str]
    needs: ClassVar[str]
    uses_samples: ClassVar[bool] = False  # of pixels' logits and features
    uses_trajectory: ClassVar[bool] = False  # of other candidates, so that none is judged alone

    @abstractmethod
    def score(self, candidate: Candidate) -> float:
        """How good the candidate is judged to be; higher is better, nan where it cannot say."""


@torch.no_grad()
def sample_pixels(
    predict: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor],
    store: ImageStore,
    translate: Callable[[Tensor], Tensor],
    device: torch.device,
    slices: int = SLICES,
    pixels: int = PIXELS,
) -> Samples:
    """Logits, features and, where the store has them, labels at fixed random places.

    Args:
        predict: (N, S, H, W) → logits (N, K, H, W).
        features: (N, S, H, W) → (N, D, h, w); a pixel has the features of the cell it lies in.
        store: the slices.
        translate: applied to images before both.
        device: where `predict` expects images.
        slices: of these, at most, spread evenly over the store.
        pixels: of each slice.
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
        for maps, into in ((predict(images), logits), (features(images), found)):
            at = _cells(places[start : start + 32], store.size, maps.shape[-2:]).to(device)
            flat = maps.float().flatten(2)
            picked = flat.gather(2, at[:, None].expand(-1, flat.shape[1], -1))
            into.append(picked.transpose(1, 2).flatten(0, 1).cpu())
    labels = None
    if isinstance(store, LabelledStore):
        own = torch.from_numpy(store.labels(chosen)).flatten(1)
        labels = own.gather(1, places).flatten()
    return Samples(torch.cat(logits), torch.cat(found), labels)


def _cells(places: Tensor, size: tuple[int, int], cells: torch.Size) -> Tensor:
    """Flat positions in an image → those of the cells of a map that covers it."""
    rows = torch.div(places, size[1], rounding_mode="floor") * cells[0]
    columns = places % size[1] * cells[1]
    rows = torch.div(rows, size[0], rounding_mode="floor")
    return rows * cells[1] + torch.div(columns, size[1], rounding_mode="floor")


def choose(scores: dict[int, float]) -> int:
    """The step of the winning candidate: highest score, then the latest; nan never wins.

    Args:
        scores: step → score.

    Returns:
        The winner's step; the latest step where every score is nan.
    """
    valid = {step: score for step, score in scores.items() if not np.isnan(score)}
    if not valid:
        return max(scores)
    return max(valid, key=lambda step: (valid[step], step))
