"""Records -> examples: what a training step is fed with, one index at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_simplified.data.collate import Example
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import Record, open_records
from llava_simplified.data.rows import find_records
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prompt import IMAGE_INDEX, Prompt


class FeatureStore(Protocol):
    """Images by name: features (tokens, width), or uint8 pixels (3, height, width); `dummy_image`: one of nothing."""

    @property
    def dummy_image(self) -> torch.Tensor: ...
    def __contains__(self, image: str, /) -> bool: ...
    def __getitem__(self, image: str, /) -> torch.Tensor: ...


class CaptionDataset(Dataset[Example]):
    """One example for each record; five captions of an image are five answers that share image and prompt.

    Args:
        records: what to train on.
        prompt: renders text and labels.
        image_folder: where the records' image paths begin.
        transform: the vision tower's resize and crop.
        max_length: the most text tokens of a prompt with one answer, an image counting as one. A longer answer loses
            words at its end; a prompt that leaves no room is an error.
        share_prefix: False makes one example for each response.
        features: by image name, patch features that were computed before, or pixels: then no picture is opened.
    """

    def __init__(
        self,
        records: Sequence[Record],
        prompt: Prompt,
        image_folder: str | Path,
        transform: ImageTransform,
        max_length: int = 2048,
        share_prefix: bool = True,
        features: FeatureStore | None = None,
    ) -> None:
        self.records = records
        self.prompt = prompt
        self.image_folder = Path(image_folder)
        self.transform = transform
        self.max_length = max_length
        self.features = features
        self._ends: np.ndarray | None = None
        if not share_prefix:  # all records are read for it
            counts = np.fromiter(
                (len(r.responses) for r in records), dtype=np.int64, count=len(records)
            )
            self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.records) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """The example at `index`; where its image can't be read, the next one that can, and a note that says so."""
        warnings: list[str] = []
        for offset in range(len(self)):
            record, responses = self.locate((index + offset) % len(self))
            example = self.tokenize(record, responses)
            try:
                example.pixel_values, example.image_features = self.load_images(record)
            except ImageError as error:
                warnings.append(f"bad image, {record.id}: {error}")
                continue
            example.warnings = warnings + example.warnings
            return example
        raise ValueError(f"no image of {len(self)} could be read; the first: {warnings[0]}")

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """Positions that each example takes. All text is tokenised for it: some 20,000 examples a second."""
        every = (self.tokenize(*self.locate(index)).input_ids for index in range(len(self)))
        counts = (len(ids) + (tokens_per_image - 1) * ids.count(IMAGE_INDEX) for ids in every)
        return np.fromiter(counts, np.int32, len(self))

    def locate(self, index: int) -> tuple[Record, Sequence[str]]:
        """Which record, and which of its responses, are the example at `index`."""
        if self._ends is None:
            return self.records[index], self.records[index].responses
        row = bisect_right(self._ends, index)
        record = self.records[row]
        return record, [
            record.responses[index - int(self._ends[row])]
        ]  # counted from the end: negative

    def load_images(self, record: Record) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Pixels, uint8 (images, 3, height, width), or features, (images, tokens, width), where they are stored already.

        Raises:
            ImageError: an image that can't be read.
        """
        if record.images and self.features is not None:
            if missing := next((name for name in record.images if name not in self.features), None):
                raise ImageError(
                    "corrupt", f"{missing} could not be read when the features of all were computed"
                )
            rows = torch.stack([self.features[name] for name in record.images])
            return (rows, None) if rows.dtype == torch.uint8 else (None, rows)
        return load_record_images(record, self.image_folder, self.transform), None

    def tokenize(self, record: Record, responses: Sequence[str]) -> Example:
        """Ids and labels, each answer cut to `max_length`.

        Raises:
            ValueError: no answer, an empty one, or one for which the prompt leaves no room.
        """
        if not responses:
            raise ValueError(f"{record.id}: no response to train on")
        warnings: list[str] = []
        prefix, answers = self.prompt.render_branches(record.turns, responses, record.id)
        ids, labels = list(prefix.input_ids), list(prefix.labels)
        branches = [0] * len(ids)
        for number, (answer, text) in enumerate(zip(answers, responses), start=1):
            if len(prefix.input_ids) + len(answer) > self.max_length:
                answer = self._truncate(record, text, self.max_length - len(prefix.input_ids))
                warnings.append(
                    f"cut, {record.id}: an answer longer than model_max_length, {self.max_length} tokens"
                )
            ids += answer
            labels += answer
            branches += [number] * len(answer)
        return Example(
            ids,
            labels,
            warnings=warnings,
            branches=branches if len(answers) > 1 else None,
            id=record.id,
        )

    def _truncate(self, record: Record, text: str, room: int) -> list[int]:
        """As many whole words as fit, and the end token: what is learned from it still stops."""
        if room < 2:
            raise ValueError(
                f"{record.id}: the prompt leaves no room for an answer: model_max_length is {self.max_length} tokens; "
                "raise it or shorten the instruction"
            )
        words = text.split(" ")[:room]
        while True:
            _, (answer,) = self.prompt.render_branches(record.turns, [" ".join(words)], record.id)
            if len(answer) <= room:
                return answer
            if len(words) == 1:  # not a word of any language
                return [*answer[: room - 1], self.prompt.end_id]
            words.pop()


def load_record_images(
    record: Record, folder: str | Path, transform: ImageTransform
) -> torch.Tensor | None:
    """A record's images as the tower takes them: uint8 (images, 3, height, width), or None where it has none.

    Raises:
        ImageError: an image that can't be read.
    """
    if not record.images:
        return None
    return torch.stack(
        [transform(decode_image(read_image_bytes(name, folder))) for name in record.images]
    )


def open_data(
    path: str, folder: str | None, option: str, require_responses: bool = True
) -> tuple[Sequence[Record], str]:
    """Records and the folder of their images (the data file's own where `folder` is None).

    The first images are opened as well: a wrong folder shows now, not in an hour.

    Args:
        option: the name of the folder's option, for the errors.
        require_responses: every record must have its answers, as training needs them.

    Raises:
        ValueError: no records, one without an answer, no such folder, or none of the first images can be read.
    """
    records = open_records(path, require_responses)
    if not len(records):
        raise ValueError(f"{path}: no records in it")
    folder = folder or str(find_records(Path(path)).parent)
    if not Path(folder).is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    names = [name for index in range(min(20, len(records))) for name in records[index].images]
    errors = []
    for name in names:
        try:
            decode_image(read_image_bytes(name, folder))
            break
        except ImageError as error:
            errors.append(error)
    if names and len(errors) == len(names):
        raise ValueError(
            f"{option} {folder}: none of the first images can be read; the first: {errors[0]}"
        )
    return records, folder
