"""Fourier domain adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glua_bench.config import setting
from glua_bench.losses import normalised_entropy, segmentation_loss
from glua_bench.method import Batch, Context
from glua_bench.methods.source_only import SegmentConfig, SourceOnly


@dataclass(frozen=True)
class FDAConfig(SegmentConfig):
    """Settings of the segmenter and of the amplitude exchange."""

    beta: float = setting(
        0.05, "half side of the exchanged band as a fraction of the image side", low=0, high=0.5
    )
    lambda_entropy: float = setting(5e-3, "weight of the target entropy penalty", low=0, high=10)
    eta: float = setting(2.0, "exponent of the entropy penalty", low=0.5, high=8)


class FDA(SourceOnly):
    """Train on source images with the low-frequency amplitudes of target images.

    Fourier domain adaptation: Yang and Soatto, CVPR 2020 (eq. 3-6), with a single band and without
    its rounds of self-training. A and P are amplitude and phase of the Fourier transform:

        x̂_s = F⁻¹( A_t inside a centred square of half side ⌊β · side⌋, A_s outside; P_s )
        L = L_seg(S(x̂_s), y_s) + λ_ent · mean of (h² + 10⁻⁶)^η,

    where h is the entropy of the softmax on the target, divided by log K. Images are shifted to [0,
    2] before the transform, because an amplitude drops the sign of the mean. The target slice is
    one of the batch. Each slice of a stack and each input channel takes the amplitudes of the
    target slice at its position.
    """

    name = "fda"
    reference = "Yang & Soatto, CVPR 2020"
    needs = "source images and labels, target images"
    uses_target = True
    Config = FDAConfig

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update on source images with target amplitudes and on target images."""
        cfg = self.config
        exchanged = exchange_amplitudes(batch.source_images, batch.target, cfg.beta)
        segmentation = segmentation_loss(self.segmenter(exchanged).logits, batch.source_labels)
        entropy = normalised_entropy(self.segmenter(batch.target).logits)
        penalty = (entropy.square() + 1e-6).pow(cfg.eta).mean()
        context.update("segmenter", segmentation + cfg.lambda_entropy * penalty)
        return {"segmentation": segmentation, "penalty": penalty, "entropy": entropy.mean()}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return source images with target amplitudes, and the entropy on target images."""
        return {
            "restyled": exchange_amplitudes(batch.source_images, batch.target, self.config.beta),
            "entropy": normalised_entropy(self.segmenter(batch.target).logits),
        }


def exchange_amplitudes(images: Tensor, templates: Tensor, beta: float) -> Tensor:
    """Replace the low-frequency amplitudes of images with those of templates.

    Args:
        images: (N, S, H, W) in [-1, 1].
        templates: (N, S, H, W) in [-1, 1].
        beta: half side of the band as a fraction of the shorter side; 0 exchanges only the mean.

    Returns:
        (N, S, H, W); values may slightly exceed [-1, 1].
    """
    own = torch.fft.fft2(images.float() + 1)
    other = torch.fft.fft2(templates.float() + 1).abs()
    half = math.floor(beta * min(images.shape[-2:]))
    # Frequencies from -half to half along both axes, at the corners of an unshifted transform.
    near = [torch.fft.fftfreq(n, 1 / n, device=images.device).abs() <= half for n in own.shape[-2:]]
    band = near[0][:, None] & near[1][None, :]
    amplitude = torch.where(band, other, own.abs())
    back = torch.fft.ifft2(torch.polar(amplitude, own.angle())).real - 1
    return back.to(images.dtype)
