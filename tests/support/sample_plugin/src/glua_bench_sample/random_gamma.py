"""Random gamma: a method that extends one of glua-bench's own."""

from dataclasses import dataclass

import torch

from glua_bench.config import setting
from glua_bench.losses import segmentation_loss
from glua_bench.methods.source_only import SegmentConfig, SourceOnly


@dataclass(frozen=True)
class RandomGammaConfig(SegmentConfig):
    """The segmenter's settings and the range of the exponent."""

    strength: float = setting(1.0, "largest |log2| of the exponent", low=0, high=4)


class RandomGamma(SourceOnly):
    """Train on source images whose intensities are raised to a random power.

    A baseline: x in [0, 1] becomes x^γ, with log2 γ uniform in ± `strength`.
    """

    name = "random_gamma"
    reference = "baseline"
    needs = "source images and labels"
    uses_target = False
    Config = RandomGammaConfig

    def step(self, batch, context):
        """One update."""
        images = batch.source_images
        exponent = (2 * torch.rand(len(images), 1, 1, 1) - 1) * self.config.strength
        powers = ((images + 1) / 2).clamp(0, 1) ** (2**exponent).to(images)
        loss = segmentation_loss(self.segmenter(2 * powers - 1).logits, batch.source_labels)
        context.update("segmenter", loss)
        return {"segmentation": loss}
