"""The order in which training examples are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """A random order in which the examples of a batch are of nearly one length: little is spent on padding.

    Pools of fifty batches are drawn at random, sorted by length, cut into batches, and the batches shuffled: their order
    says nothing of their lengths. The order depends on the seed and the epoch alone.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        pool = 50 * self.batch_size
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            order[start : start + pool] = part[np.argsort(self.lengths[part], kind="stable")]
        whole = (
            len(order) - len(order) % self.batch_size
        )  # the last batch, if it is short, stays the last
        batches = random.permutation(order[:whole].reshape(-1, self.batch_size))
        return (int(index) for part in (batches.flat, order[whole:]) for index in part)
