"""Pack several examples into one sequence, so that few positions of a batch are padding.

An image with its caption is much shorter than a sequence that uses a GPU well. Packing puts several examples into one
sequence of at most `pack_length` positions. A block-diagonal attention mask separates them
(`segment_ids` in `collate`), so the loss and every gradient are those of the unpacked examples.

Which examples share a sequence is a bin packing problem, solved by best fit decreasing: examples are placed longest
first, each into the pack with the least room that is still enough.

    pack_length 10, lengths 6 5 4 3 2
      6 -> [6 . . . .]                 a new pack
      5 -> [6 ....] [5 .....]          a new pack: 5 does not fit into the first
      4 -> [6 4] [5 .....]             room 4 fits better than room 5
      3 -> [6 4] [5 3 ..]
      2 -> [6 4] [5 3 2]
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from llava_simplified.data.collate import Example


class DatasetWithLengths(Protocol):
    """A map-style dataset of examples whose lengths are known before they are loaded, such as `CaptionDataset`."""

    def __getitem__(self, index: int, /) -> Example: ...

    def load(self, index: int, warnings: list[str], /) -> Example | None: ...

    def lengths(self, tokens_per_image: int) -> np.ndarray: ...


def plan_packs(
    lengths: Sequence[int],
    pack_length: int,
    seed: int,
    pool: int = 8192,
) -> list[list[int]]:
    """Assign examples to sequences: best fit decreasing within random pools.

    Best fit over all examples would pack the longest examples of the data set together. Random pools avoid this, and
    with thousands of examples per pool the packs are nearly as full.

    Args:
        lengths: Number of positions of each example.
        pack_length: Maximum number of positions of a pack.
        seed: Seed of the pools.
        pool: Number of examples that are packed together.

    Returns:
        Lists of example indices; every index occurs once. An example longer than `pack_length` is alone in its pack.
    """
    packs: list[list[int]] = []
    order = np.random.default_rng(seed).permutation(len(lengths))
    for start in range(0, len(order), pool):
        # Place long examples first, since they fit into few packs; short ones fill the gaps.
        indices = order[start : start + pool].tolist()
        indices.sort(key=lambda index: -lengths[index])
        # (free positions, pack index) of each pack of this pool. The list is sorted, so bisection finds the best fit.
        free: list[tuple[int, int]] = []
        for index in indices:
            # Find the first pack with enough free positions; -1 sorts before every pack index.
            best = bisect_left(free, (lengths[index], -1))
            if best < len(free):
                room, pack = free.pop(best)
            else:
                room = pack_length
                pack = len(packs)
                packs.append([])
            packs[pack].append(index)
            insort(free, (room - lengths[index], pack))
    return packs


class PackedDataset(Dataset[list[Example]]):
    """A dataset whose items are packs: lists of examples for one sequence.

    The examples are assigned to packs once, and the packs stay the same in all epochs. A sampler shuffles their order.

    Args:
        dataset: The examples.
        tokens_per_image: Number of patch features per image.
        pack_length: Maximum number of positions of a pack.
        seed: Seed of `plan_packs`.

    Raises:
        ValueError: An example is longer than `pack_length`.
    """

    def __init__(
        self,
        dataset: DatasetWithLengths,
        tokens_per_image: int,
        pack_length: int,
        seed: int,
    ) -> None:
        self.dataset = dataset
        lengths = dataset.lengths(tokens_per_image)
        longest = max(lengths)
        if longest > pack_length:
            raise ValueError(
                f"--pack_length {pack_length}: the longest example has {longest} positions. "
                f"Pass --pack_length {longest}, or lower --model_max_length."
            )
        packs = plan_packs(lengths.tolist(), pack_length, seed)
        # Store two flat arrays instead of a million lists. Forked workers share arrays, whereas reading a list changes
        # the reference counts of its elements, which copies its memory pages into every worker.
        self._order = np.fromiter(chain.from_iterable(packs), np.int32, len(lengths))
        # Start of each pack in `_order`, and the end of the last one.
        self._starts = np.cumsum([0, *map(len, packs)])
        self._lengths = np.add.reduceat(lengths[self._order], self._starts[:-1])

    @property
    def fill_ratio(self) -> float:
        """Share of positions that are not padding in a batch that is as long as the longest pack."""
        return float(self._lengths.mean() / self._lengths.max())

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """Return the number of positions of each pack.

        Args:
            tokens_per_image: Ignored, because the examples were assigned to packs for a fixed number. The parameter
                exists for compatibility with `CaptionDataset.lengths`.
        """
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> list[Example]:
        """Return the examples of a pack.

        An example whose image cannot be read is left out, with a warning in the first of the others. Its neighbor in the
        dataset, which would replace it in an unpacked batch, may be too long for this pack.
        """
        start = self._starts[index]
        end = self._starts[index + 1]
        # Convert to plain integers, which a dataset may use as list indices or in messages.
        indices = self._order[start:end].tolist()
        warnings: list[str] = []
        examples = []
        for i in indices:
            example = self.dataset.load(i, warnings)
            if example is not None:
                examples.append(example)
        if not examples:
            # A batch cannot be empty, so the next readable example takes the place of the first one, with its warning.
            replacement = self.dataset[indices[0]]
            replacement.warnings += warnings[1:]
            return [replacement]
        examples[0].warnings = warnings + examples[0].warnings
        return examples
