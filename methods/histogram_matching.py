"""Histogram matching of source slices to target slices."""

from __future__ import annotations

import torch
from torch import Tensor

from glua_bench.augment import by_channel
from glua_bench.losses import segmentation_loss
from glua_bench.method import Batch, Context
from glua_bench.methods.source_only import SourceOnly


class HistogramMatching(SourceOnly):
    """Match each source slice to the histogram of a target slice, then train on it.

    A baseline: histogram specification (Gonzalez and Woods, *Digital Image Processing*, 2018). With
    F the distribution function of a slice's intensities, a source pixel x becomes F_t⁻¹(F_s(x)).
    The target slice is one of the same batch, regardless of its content. The tone curve is
    non-decreasing, so contrast that is inverted between modalities stays inverted. A stack of
    slices has one histogram and one curve; each input channel has its own.
    """

    name = "histogram_matching"
    reference = "baseline (Gonzalez & Woods, Digital Image Processing, 2018)"
    needs = "source images and labels, target images"
    uses_target = True

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update on matched source images."""
        matched = match_histograms(batch.source_images, batch.target, self.task.channels)
        loss = segmentation_loss(self.segmenter(matched).logits, batch.source_labels)
        context.update("segmenter", loss)
        return {"segmentation": loss}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return source images with target histograms."""
        channels = self.task.channels
        return {"restyled": match_histograms(batch.source_images, batch.target, channels)}


def match_histograms(images: Tensor, templates: Tensor, channels: int = 1) -> Tensor:
    """Map each pixel x to F_t⁻¹(F_s(x)); equal pixels stay equal.

    Args:
        images: (N, C·S, H, W).
        templates: (M, C·S, H, W) of the same size; image i takes template i mod M.
        channels: C; each has a histogram of its own.
    """
    templates = by_channel(templates, channels)
    source = by_channel(images, channels).flatten(1).float()
    ordered = source.sort(1).values
    rank = torch.searchsorted(ordered, source.contiguous(), right=True)  # n · F_s(x), from 1
    chosen = templates.flatten(1).sort(1).values
    chosen = chosen[torch.arange(len(source), device=chosen.device) % len(chosen)]
    return chosen.gather(1, rank - 1).view_as(images).to(images.dtype)
