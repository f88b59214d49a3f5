"""Earlier fakes for a discriminator, a component of AD-GAN, `sifa` and `cycle_translate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """Earlier fakes for a discriminator, batch by batch (Shrivastava et al., CVPR 2017).

    While it fills, it returns what it gets. Full, it returns, with even odds, the new batch,
    or a random old one whose place the new one takes. Its content is part of a checkpoint.

    Args:
        slots: batches that it holds.
        batch: images of a batch, at most.
        size: side of the images.
        slices: of an image.
    """

    images: Tensor
    filled: Tensor

    def __init__(self, slots: int, batch: int, size: int, slices: int = 1) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(slots, batch, slices, size, size))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, fakes: Tensor) -> Tensor:
        """(N, S, H, W) → as many, of now or of an earlier call."""
        filled, count = int(self.filled), len(fakes)
        if filled < len(self.images):
            self.images[filled, :count] = fakes
            self.filled += 1
            return fakes
        if torch.rand(()) <= 0.5:
            return fakes
        slot = self.images[int(torch.randint(filled, ())), :count]
        old = slot.to(fakes, copy=True)
        slot.copy_(fakes)
        return old
