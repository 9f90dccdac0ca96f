"""Examples -> batches. Every position of a batch is final here: lengths, masks, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX


@dataclass(slots=True)
class Example:
    """One sample, ready for a batch.

    Attributes:
        input_ids, labels: as `Prompt.render` made them, one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), or None for text only.
        image_features: (images, tokens, width), in place of pixels where they were computed before.
        notes: what a person should know of this sample: a picture that had to be replaced, a cut answer.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


def expand_images(ids: Sequence[int], tokens_per_image: int, like: Sequence[int] | None = None) -> np.ndarray:
    """Repeat every IMAGE_INDEX `tokens_per_image` times: room for the patch features.

    Args:
        ids: token ids (length,).
        like: repeat these values instead (the labels), at the places where `ids` has an image.
    """
    array = np.asarray(ids, dtype=np.int64)
    values = array if like is None else np.asarray(like, dtype=np.int64)
    return np.repeat(values, np.where(array == IMAGE_INDEX, tokens_per_image, 1))


def pad(rows: Sequence[np.ndarray], value: int, side: str = "right") -> torch.Tensor:
    """(rows, longest row), `value` where a row is shorter. Training pads right, generation left."""
    length = max(len(row) for row in rows)
    out = np.full((len(rows), length), value, dtype=np.int64)
    for target, row in zip(out, rows):
        target[: len(row) if side == "right" else None][-len(row) :] = row
    return torch.from_numpy(out)


class Collator:
    """Stack examples into what `Llava.forward` takes.

    Returns a dict with
        input_ids (batch, length): IMAGE_INDEX at every position that a patch feature will fill;
        attention_mask (batch, length): 0 on the padding at the right;
        positions (trained,): flat indices into (batch x length) from which a token is predicted;
        labels (trained,): that token. Only these positions get logits;
        pixel_values (images, 3, height, width) or image_features (images, tokens, width), in reading order;
        notes: the examples' messages.
    """

    def __init__(self, tokens_per_image: int, pad_id: int) -> None:
        self.tokens_per_image = tokens_per_image
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        ids = [expand_images(e.input_ids, self.tokens_per_image) for e in examples]
        labels = [expand_images(e.input_ids, self.tokens_per_image, e.labels) for e in examples]
        input_ids = pad(ids, self.pad_id)
        # the token at column c is predicted from column c - 1
        targets = pad(labels, IGNORE_INDEX)[:, 1:]
        row, column = torch.nonzero(targets != IGNORE_INDEX, as_tuple=True)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": pad([np.ones(len(row_ids)) for row_ids in ids], 0),
            "positions": row * input_ids.shape[1] + column,
            "labels": targets[row, column],
            "notes": [note for e in examples for note in e.notes],
        }
        for name in ("pixel_values", "image_features"):
            images = [getattr(e, name) for e in examples if getattr(e, name) is not None]
            if images:
                batch[name] = torch.cat(images)
        return batch


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
        whole = len(order) - len(order) % self.batch_size  # the last batch, if it is short, stays the last
        batches = order[:whole].reshape(-1, self.batch_size)
        return iter(np.concatenate([random.permutation(batches).ravel(), order[whole:]]).tolist())
