"""Unpaired batches of source images with labels and target images without labels.

The slices of a step depend only on (seed, stage, step), so a resumed run needs no sampler state,
and several processes share the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from glua_bench.data.stores import IMAGE_TYPE, LABEL_TYPE, ImageStore, LabelledStore

# Independent random streams for one seed.
_STREAMS = {"source": 1, "target": 2}
# Source images, source labels and target images.
Tensors = tuple[Tensor, Tensor, Tensor | None]


def epoch_indices(
    seed: int, stream: str, stage: int, step: int, size: int, length: int
) -> np.ndarray:
    """Return the slice indices of one batch; each epoch is a new permutation of all slices.

    Args:
        seed: the run's seed.
        stream: "source" or "target".
        stage: index of the stage.
        step: update within the stage, from 0.
        size: batch size.
        length: number of slices.

    Returns:
        (size,) indices; a batch may span two epochs.
    """
    positions = np.arange(step * size, (step + 1) * size)
    epochs = positions // length
    indices = np.empty(size, dtype=np.int64)
    for epoch in np.unique(epochs):
        rng = np.random.default_rng([seed, _STREAMS[stream], stage, int(epoch)])
        order = rng.permutation(length)
        chosen = epochs == epoch
        indices[chosen] = order[positions[chosen] % length]
    return indices


class Batches:
    """Loads the batch of any step of a stage and prefetches the next one in a thread.

    Args:
        source: labelled slices of the source domain.
        target: slices of the target domain, without labels; or None.
        batch_size: images per domain and step, over all processes.
        seed: the run's seed.
        device: device of the batches.
        rank: index of this process; each process takes its share of every batch.
        world: number of processes.
    """

    def __init__(
        self,
        source: LabelledStore,
        target: ImageStore | None,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if isinstance(target, LabelledStore):
            raise TypeError("the target store must be an ImageStore, which has no labels")
        self.source, self.target = source, target
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.rank, self.world = rank, world
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int], Future[Tensors]] | None = None

    def load(self, stage: int, step: int) -> Tensors:
        """Load source images, source labels and target images of a step onto the device.

        Returns:
            float32 (N, C·S, H, W), uint8 (N, H, W) and float32 (N, C·S, H, W) or None.
        """
        if self._ahead is not None and self._ahead[0] == (stage, step):
            tensors = self._ahead[1].result()
        else:
            tensors = self._read(stage, step)
        self._ahead = ((stage, step + 1), self._pool.submit(self._read, stage, step + 1))
        images, labels, target = tensors
        moved = None if target is None else self._move(target).float()
        return self._move(images).float(), self._move(labels), moved

    def target_slices(self, size: int = 32) -> Iterator[Tensor]:
        """Iterate over all target training images in order, (≤ size, C·S, H, W)."""
        if self.target is None:
            raise TypeError("this run has no target images")
        for start in range(0, len(self.target), size):
            indices = np.arange(start, min(start + size, len(self.target)))
            yield self._move(torch.from_numpy(self.target.images(indices, IMAGE_TYPE))).float()

    def close(self) -> None:
        """Stop the loading thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, stage: int, step: int) -> Tensors:
        """Read in the stored types: less to transfer, and the device converts faster than NumPy."""
        share = slice(self.rank, None, self.world)
        of_step = (stage, step, self.batch_size)
        chosen = epoch_indices(self.seed, "source", *of_step, len(self.source))[share]
        images = torch.from_numpy(self.source.images(chosen, IMAGE_TYPE))
        labels = torch.from_numpy(self.source.labels(chosen, LABEL_TYPE))
        target = None
        if self.target is not None:
            chosen = epoch_indices(self.seed, "target", *of_step, len(self.target))[share]
            target = torch.from_numpy(self.target.images(chosen, IMAGE_TYPE))
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
            target = None if target is None else target.pin_memory()
        return images, labels, target

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
