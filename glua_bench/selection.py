"""Which checkpoint counts, decided without target labels.

A selector gives every candidate checkpoint a score from what a user of unlabelled target data
has: the labelled source validation cases and the target's training images. The candidate with
the highest score is the selector's choice; of equals, the latest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from glua_bench.cache import ImageStore, LabelledStore


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, as a selector sees it. No field leads to a target label.

    Args:
        step: updates of the segmenter behind it.
        predict: (N, 1, H, W) → logits (N, K, H, W), without gradients, on `device`.
        classes: K, background included.
        source_val: labelled slices of source subjects that training did not see; None where
            the scenario has none.
        translate: what the training applied to source images (e.g. restyling).
        target_train: the target's training slices, without labels; None where not served.
        device: where `predict` expects images.
    """

    step: int
    predict: Callable[[Tensor], Tensor]
    classes: int
    source_val: LabelledStore | None
    translate: Callable[[Tensor], Tensor]
    target_train: ImageStore | None
    device: torch.device


class Selector(ABC):
    """Scores candidates; the highest wins."""

    name: ClassVar[str]
    reference: ClassVar[str]
    needs: ClassVar[str]

    @abstractmethod
    def score(self, candidate: Candidate) -> float:
        """How good the candidate is judged to be; higher is better, nan never wins."""


class Last(Selector):
    """The last checkpoint: nothing is selected."""

    name = "last"
    reference = "baseline"
    needs = "nothing"

    def score(self, candidate: Candidate) -> float:
        """The candidate's step."""
        return float(candidate.step)


class SourceVal(Selector):
    """The checkpoint with the best mean Dice on source validation subjects."""

    name = "source_val"
    reference = "baseline (Gulrajani & Lopez-Paz, ICLR 2021: training-domain validation)"
    needs = "labelled source validation cases"

    def score(self, candidate: Candidate) -> float:
        """Dice pooled over all validation slices, mean over the structures they show.

        Source images are translated as in training, since that is what the segmenter knows.
        """
        store = candidate.source_val
        if store is None:
            return float("nan")
        counts = np.zeros((3, candidate.classes))  # overlap, predicted, labelled
        for start in range(0, len(store), 32):
            indices = np.arange(start, min(start + 32, len(store)))
            images = torch.from_numpy(store.images(indices)).to(candidate.device)
            predicted = candidate.predict(candidate.translate(images)).argmax(1).cpu().numpy()
            labels = store.labels(indices)
            for index in range(candidate.classes):
                p, r = predicted == index, labels == index
                counts[:, index] += (p & r).sum(), p.sum(), r.sum()
        overlap, predicted_size, labelled = counts[:, 1:]
        shown = labelled > 0
        if not shown.any():
            return float("nan")
        return float((2 * overlap / np.maximum(predicted_size + labelled, 1))[shown].mean())


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
