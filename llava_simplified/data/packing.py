"""Pack several examples into one sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from llava_simplified.data.collate import Example


def plan_packs(
    lengths: Sequence[int], pack_length: int, seed: int, pool: int = 8192
) -> list[list[int]]:
    """Which examples share a sequence of at most `pack_length` positions: best fit, the longest first.

    Planned within random pools, so that a pack says nothing of the order of the data. Every index occurs once. An
    example longer than `pack_length` is alone in its pack.
    """
    packs: list[list[int]] = []
    order = np.random.default_rng(seed).permutation(len(lengths))
    for start in range(0, len(order), pool):
        room: list[tuple[int, int]] = []  # (positions left, pack), sorted
        for index in sorted(order[start : start + pool].tolist(), key=lambda i: -lengths[i]):
            best = bisect_left(room, (lengths[index], -1))
            if best == len(room):
                left, pack = pack_length, len(packs)
                packs.append([])
            else:
                left, pack = room.pop(best)
            packs[pack].append(index)
            insort(room, (left - lengths[index], pack))
    return packs


class PackedDataset(Dataset[list[Example]]):
    """Several examples an item. The packs stand; a sampler draws their order anew in every epoch.

    Args:
        dataset: has `lengths(tokens_per_image)` and gives an `Example` by index.
        pack_length: the most positions of a pack.
    """

    def __init__(self, dataset: Any, tokens_per_image: int, pack_length: int, seed: int) -> None:
        self.dataset = dataset
        lengths = dataset.lengths(tokens_per_image)
        if (longest := max(lengths)) > pack_length:
            raise ValueError(
                f"--pack_length {pack_length}: the longest example has {longest} positions; raise it, or lower "
                "--model_max_length"
            )
        packs = plan_packs(lengths.tolist(), pack_length, seed)
        # flat, and not as a million lists: forked workers share what nobody counts references of
        self._order = np.fromiter(
            (index for pack in packs for index in pack), np.int32, len(lengths)
        )
        self._starts = np.cumsum([0, *map(len, packs)])
        self._lengths = np.add.reduceat(lengths[self._order], self._starts[:-1])

    @property
    def fill_ratio(self) -> float:
        """The share of positions that are no padding when every pack is as long as the longest."""
        return float(self._lengths.mean() / self._lengths.max())

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """Positions of each pack."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> list[Example]:
        return [
            self.dataset[int(i)] for i in self._order[self._starts[index] : self._starts[index + 1]]
        ]
