"""Selectors: last checkpoint, source validation, and scores on unlabelled target pixels.

Scores follow the papers, computed over sampled pixels instead of images. They agree with the
validators of `pytorch-adapt` (Musgrave et al.) of the same name on equal logits and features
(tested).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glua_bench.selection import Candidate, Samples, Selector
from glua_bench.task import UNANNOTATED

SND_TEMPERATURE = 0.05
# Candidate inverse regularisation strengths of DEV's domain classifier.
DEV_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


class Last(Selector):
    """The last checkpoint, without selection."""

    name = "last"
    reference = "baseline"
    needs = "nothing"

    def score(self, candidate: Candidate) -> float:
        """Return the candidate's step."""
        return float(candidate.step)


class SourceVal(Selector):
    """The checkpoint with the best mean Dice on source validation subjects."""

    name = "source_val"
    reference = "baseline (Gulrajani & Lopez-Paz, ICLR 2021: training-domain validation)"
    needs = "labelled source validation cases"

    def score(self, candidate: Candidate) -> float:
        """Compute the mean Dice over structures, pooled over all validation slices.

        Source images are translated as in training.
        """
        store = candidate.source_val
        if store is None:
            return float("nan")
        counts = np.zeros((3, candidate.classes))  # overlap, predicted, labelled
        for start in range(0, len(store), 32):
            indices = np.arange(start, min(start + 32, len(store)))
            images = torch.from_numpy(store.images(indices)).to(candidate.device)
            logits = candidate.predict(candidate.translate(images), "source")
            predicted = logits.argmax(1).cpu().numpy()
            counts += overlaps(predicted, store.labels(indices), candidate.classes)
        return pooled_dice(counts)


class TargetScore(Selector):
    """Base class of scores computed from target training pixels only."""

    uses_samples = True
    samples_from = ("target_train",)
    uses_features = False

    def score(self, candidate: Candidate) -> float:
        """Compute the score; NaN without target images."""
        target = candidate.samples.get("target_train")
        return float("nan") if target is None else self.of(target)

    def of(self, target: Samples) -> float:
        """Compute the score of target pixels."""
        raise NotImplementedError


class Entropy(TargetScore):
    """The checkpoint with the lowest prediction entropy on target images."""

    name = "entropy"
    reference = "baseline (Morerio et al., ICLR 2018: minimal entropy)"
    needs = "target images"

    def of(self, target: Samples) -> float:
        """Compute -mean H(p), which is also high for confident predictions of background only."""
        return -float(entropies(target.probabilities).mean())


class InformationMaximisation(TargetScore):
    """The checkpoint with confident and diverse predictions of target pixels."""

    name = "im"
    reference = "Musgrave et al., 2022 (information maximisation)"
    needs = "target images"

    def of(self, target: Samples) -> float:
        """Compute H(mean p) - mean H(p), the mutual information of pixel and class."""
        p = target.probabilities
        return float(entropies(p.mean(0, keepdim=True)).mean() - entropies(p).mean())


class SoftNeighbourhoodDensity(TargetScore):
    """The checkpoint whose target predictions lie in the densest neighbourhoods (SND)."""

    name = "snd"
    reference = "Saito et al., ICCV 2021"
    needs = "target images"

    def of(self, target: Samples) -> float:
        """Compute the mean entropy of softmax(cos(p_i, p_j) / 0.05 over j ≠ i)."""
        p = F.normalize(target.probabilities, dim=1)
        similar = (p @ p.T / SND_TEMPERATURE).fill_diagonal_(-math.inf)
        return float(entropies(similar.softmax(1)).mean())


class BatchNuclearNorm(TargetScore):
    """The checkpoint whose target predictions have the largest nuclear norm (BNM)."""

    name = "bnm"
    reference = "Cui et al., CVPR 2020"
    needs = "target images"

    def of(self, target: Samples) -> float:
        """Compute the sum of the singular values of the (M, K) probabilities, divided by M."""
        p = target.probabilities
        return float(torch.linalg.matrix_norm(p, "nuc") / len(p))


class ClusterAgreement(TargetScore):
    """The checkpoint whose predicted target classes agree with clusters of features (AMI)."""

    name = "class_ami"
    reference = "Musgrave et al., 2022 (class-cluster AMI)"
    needs = "target images"
    uses_features = True

    def of(self, target: Samples) -> float:
        """Compute the adjusted mutual information of predicted classes and K k-means clusters."""
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_mutual_info_score

        classes = target.logits.argmax(1).numpy()
        kmeans = KMeans(target.logits.shape[1], n_init=3, random_state=0)
        return float(adjusted_mutual_info_score(classes, kmeans.fit_predict(target.features)))


class ClusterSilhouette(TargetScore):
    """The checkpoint whose predicted target classes are best separated in features (silhouette)."""

    name = "class_silhouette"
    reference = "Rousseeuw, 1987; as a validator Musgrave et al., 2022"
    needs = "target images"
    uses_features = True

    def of(self, target: Samples) -> float:
        """Compute the mean silhouette of features by predicted class; NaN for a single class."""
        from sklearn.metrics import silhouette_score

        classes = target.logits.argmax(1).numpy()
        if not 1 < len(np.unique(classes)) < len(classes):
            return float("nan")
        return float(silhouette_score(target.features.numpy(), classes))


class DeepEmbeddedValidation(Selector):
    """The checkpoint with the lowest importance-weighted risk on source validation pixels (DEV)."""

    name = "dev"
    reference = "You et al., ICML 2019"
    needs = "labelled source cases for training and validation, target images"
    uses_samples = True

    def score(self, candidate: Candidate) -> float:
        """Compute the negative risk: cross-entropy weighted by density ratios."""
        samples = candidate.samples
        if not {"source_train", "source_val", "target_train"} <= samples.keys():
            return float("nan")
        validation = samples["source_val"]
        assert validation.labels is not None
        weights = density_ratios(
            *(samples[r].features.numpy() for r in ("source_train", "source_val", "target_train"))
        )
        seen = (validation.labels != UNANNOTATED).numpy()
        if not seen.any():
            return float("nan")
        errors = F.cross_entropy(
            validation.logits.double(),
            validation.labels,
            reduction="none",
            ignore_index=UNANNOTATED,
        )
        return -dev_risk(weights[seen], errors.numpy()[seen])


class CheckpointAgreement(Selector):
    """The checkpoint with the highest mean agreement with the others on target pixels."""

    name = "agreement"
    reference = "original (after the agreement of models, Jiang et al., ICLR 2022)"
    needs = "target images"
    uses_samples = True
    samples_from = ("target_train",)
    uses_features = False
    uses_trajectory = True

    def score(self, candidate: Candidate) -> float:
        """Compute the mean pooled Dice with each other candidate."""
        classes = {s: t.logits.argmax(1).numpy() for s, t in candidate.trajectory.items()}
        if candidate.step not in classes or len(classes) < 2:
            return float("nan")
        own = classes.pop(candidate.step)
        dice = [pooled_dice(overlaps(own, c, candidate.classes)) for c in classes.values()]
        # Dice is NaN if the other candidate predicts no structure, which counts as no agreement.
        return float(np.mean([0.0 if math.isnan(d) else d for d in dice]))


# -- functions ------------------------------------------------------------------------------------


def entropies(p: Tensor) -> Tensor:
    """Compute -Σ p log p of each row in nats, with 0 log 0 = 0: (M, K) → (M,)."""
    return torch.special.entr(p).sum(1)


def overlaps(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels of overlap, prediction and labels for each class, (3, K).

    Pixels that are `UNANNOTATED` in the labels are excluded from all three.
    """
    counts = np.zeros((3, classes))
    seen = labels != UNANNOTATED
    for index in range(classes):
        p, r = (predicted == index) & seen, labels == index
        counts[:, index] = (p & r).sum(), p.sum(), r.sum()
    return counts


def pooled_dice(counts: np.ndarray) -> float:
    """Compute the mean Dice over the structures present in the labels; NaN if there are none."""
    overlap, predicted, labelled = counts[:, 1:]
    shown = labelled > 0
    if not shown.any():
        return float("nan")
    return float((2 * overlap / np.maximum(predicted + labelled, 1))[shown].mean())


def density_ratios(train: np.ndarray, validation: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Estimate p_target(f) / p_source(f) at validation features with a domain classifier.

    The classifier is a logistic regression on standardised features; its regularisation is chosen
    by the accuracy on a held-out fifth of the pixels.

    Args:
        train: source training features, (N_s, D).
        validation: source validation features, (N_v, D).
        target: target features, (N_t, D).

    Returns:
        Density ratios, (N_v,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.concatenate([train, target])
    is_target = np.repeat([0, 1], [len(train), len(target)])
    fit, held, fit_domain, held_domain = train_test_split(
        features, is_target, train_size=0.8, random_state=0, stratify=is_target
    )
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(fit, fit_domain)
        for c in DEV_STRENGTHS
    ]
    best = max(models, key=lambda model: model.score(held, held_domain))
    source_like, target_like = best.predict_proba(validation).T
    return target_like / np.maximum(source_like, 1e-12) * len(train) / len(target)


def dev_risk(weights: np.ndarray, errors: np.ndarray) -> float:
    """Compute the weighted risk with a control variate.

    It is mean(w e) + η mean(w) - η with η = -cov(w e, w) / var w.

    Args:
        weights: density ratios w, (N,).
        errors: losses e of the same pixels, (N,).
    """
    weighted = weights * errors
    variance = np.var(weights, ddof=1)
    eta = -np.cov(weighted, weights)[0, 1] / variance if variance > 0 else 0.0
    return float(weighted.mean() + eta * weights.mean() - eta)
