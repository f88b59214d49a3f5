"""Image pool for discriminators; a component of AD-GAN, `sifa` and `cycle_translate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glua_bench.methods.components.host_count import HostCount


class ImagePool(nn.Module):
    """Pool of earlier fakes for a discriminator, stored by batch (Shrivastava et al., CVPR 2017).

    While the pool fills up, it returns its input. Once full, it returns with equal probability the
    new batch, or a random stored batch, which the new one replaces. Its content is saved in
    checkpoints.

    Args:
        slots: number of batches to store.
        batch: maximum number of images per batch.
        size: image side in pixels.
        slices: channels of an image.
    """

    images: Tensor

    def __init__(self, slots: int, batch: int, size: int, slices: int = 1) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(slots, batch, slices, size, size))
        self.filled = HostCount()

    @torch.no_grad()
    def forward(self, fakes: Tensor) -> Tensor:
        """Return a batch of fakes of the same shape, (N, S, H, W): these or earlier ones."""
        filled, count = int(self.filled), len(fakes)
        if filled < len(self.images):
            self.images[filled, :count] = fakes
            self.filled.increase()
            return fakes
        if float(torch.rand(())) <= 0.5:
            return fakes
        slot = self.images[int(torch.randint(filled, ())), :count]
        old = slot.to(fakes, copy=True)
        slot.copy_(fakes)
        return old
