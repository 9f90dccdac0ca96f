"""The order in which training examples are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

POOL_BATCHES = 50  # batches that are sorted by length together


class LengthGroupedSampler(Sampler[int]):
    """A random order in which the examples of a batch have nearly the same length, to save padding.

    A fully sorted order would save the most padding, but training would then go from short to long examples. Therefore
    the order is sorted only within random pools of 50 batches, and the batches are shuffled afterward:

        shuffle all examples        7 2 9 4 | 3 8 1 6 | ...     (pools; numbers are lengths)
        sort within each pool       2 4 7 9 | 1 3 6 8 | ...
        cut into batches            2 4, 7 9, 1 3, 6 8, ...
        shuffle the batches         6 8, 2 4, 1 3, 7 9, ...

    Neither the order of the batches nor the split into pools depends on the lengths. The order depends on the seed
    and the epoch only, and not on torch's global random state, so that a resumed run continues with the same order.

    Args:
        lengths: Number of positions of each example.
        batch_size: Examples per batch, over all processes.
        seed: Seed of the order.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order. Trainer and Accelerate call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))

        pool_size = POOL_BATCHES * self.batch_size
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            # Use a stable sort, so that equal lengths keep their random order on every platform.
            by_length = np.argsort(self.lengths[pool], kind="stable")
            pool[:] = pool[by_length]  # a view: this sorts the pool within `order`

        # Leave the last batch, which may be incomplete, at the end: anywhere else it would shift the boundaries of the
        # batches after it.
        remainder = len(order) % self.batch_size
        in_full_batches = len(order) - remainder
        full_batches = order[:in_full_batches].reshape(-1, self.batch_size)
        incomplete_batch = order[in_full_batches:]
        shuffled_batches = random.permutation(full_batches)  # along the first axis
        final_order = np.concatenate([shuffled_batches.ravel(), incomplete_batch])
        return map(int, final_order)
