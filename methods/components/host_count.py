"""A count of updates that is known without asking the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HostCount(nn.Module):
    """A count on the host, saved with the weights; reading a buffer would wait for a GPU."""

    value = 0

    def __int__(self) -> int:
        return self.value

    def increase(self) -> int:
        """Add 1 and return the new count."""
        self.value += 1
        return self.value

    def get_extra_state(self) -> Tensor:
        """Return the count for a checkpoint."""
        return torch.tensor(self.value)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the count from a checkpoint."""
        self.value = int(state)
