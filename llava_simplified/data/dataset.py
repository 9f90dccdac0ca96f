"""Records -> examples: what a training step is fed with, one index at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_simplified.data.batching import Example
from llava_simplified.data.images import ImageError, ImageTransform, decode_image, read_image_bytes
from llava_simplified.data.records import Record
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Prompt


class CaptionDataset(Dataset[Example]):
    """One example for each response of each record (five captions of an image make five examples).

    Args:
        records: what to train on.
        prompt: renders text and labels.
        image_folder: where the records' image paths begin.
        transform: the vision tower's resize and crop.
        max_length: the most text tokens of one example, an image counting as one. A longer answer is cut (its
            end token is then not there to be trained); a prompt that leaves no room is an error.
        features: patch features by image name, computed before: then no picture is opened.
    """

    def __init__(
        self,
        records: Sequence[Record],
        prompt: Prompt,
        image_folder: str | Path,
        transform: ImageTransform,
        max_length: int = 2048,
        features: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.records = records
        self.prompt = prompt
        self.image_folder = Path(image_folder)
        self.transform = transform
        self.max_length = max_length
        self.features = features
        counts = np.fromiter((len(r.responses) for r in records), dtype=np.int64, count=len(records))
        if not len(counts) or not counts.all():
            where = records[int(counts.argmin())].id if len(counts) else "the data"
            raise ValueError(f"{where}: no response to train on")
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """The example at `index`; where its image can't be read, the next one that can, and a note that says so."""
        notes: list[str] = []
        for offset in range(len(self)):
            record, response = self.locate((index + offset) % len(self))
            example = self.text(record, response)
            try:
                if self.features is not None and all(name in self.features for name in record.images):
                    example.image_features = self.stored(record)
                else:
                    example.pixel_values = self.pixels(record)
            except ImageError as error:
                notes.append(f"bad image, {record.id}: {error}")
                continue
            example.notes = notes + example.notes
            return example
        raise ValueError(f"no image of {len(self)} could be read; the first: {notes[0]}")

    def lengths(self, tokens_per_image: int) -> list[int]:
        """Positions that each example takes. All text is tokenised for it: some 20,000 examples a second."""
        return [
            len(ids) + (tokens_per_image - 1) * ids.count(IMAGE_INDEX)
            for ids in (self.text(*self.locate(index)).input_ids for index in range(len(self)))
        ]

    def locate(self, index: int) -> tuple[Record, str]:
        """Which record, and which of its responses, stands at `index`."""
        row = bisect_right(self._ends, index)
        record = self.records[row]
        return record, record.responses[index - int(self._ends[row])]  # counted from the end: negative

    def pixels(self, record: Record) -> torch.Tensor | None:
        """uint8 (images, 3, height, width), or None where the record has no image."""
        return record_pixels(record, self.image_folder, self.transform)

    def stored(self, record: Record) -> torch.Tensor | None:
        """(images, tokens, width), or None where the record has no image."""
        assert self.features is not None
        return torch.stack([self.features[name] for name in record.images]) if record.images else None

    def text(self, record: Record, response: str) -> Example:
        """Ids and labels, cut to `max_length`.

        Raises:
            ValueError: the prompt alone is too long, or nothing is left to train.
        """
        ids, labels = self.prompt.render(record.turns, response, record.id)
        notes = []
        if len(ids) > self.max_length:
            notes.append(f"cut, {record.id}: {len(ids)} tokens, model_max_length is {self.max_length}")
            if IMAGE_INDEX in ids[self.max_length :] or set(labels[: self.max_length]) == {IGNORE_INDEX}:
                raise ValueError(
                    f"{record.id}: the prompt leaves no room for an answer: {len(ids)} tokens in all, "
                    f"model_max_length is {self.max_length}; raise it or shorten the instruction"
                )
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        return Example(list(ids), list(labels), notes=notes)


def record_pixels(record: Record, folder: str | Path, transform: ImageTransform) -> torch.Tensor | None:
    """A record's images as the tower takes them: uint8 (images, 3, height, width), or None where it has none.

    Raises:
        ImageError: an image that can't be read.
    """
    if not record.images:
        return None
    return torch.stack([transform(decode_image(read_image_bytes(name, folder))) for name in record.images])
