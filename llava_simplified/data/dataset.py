"""Records -> examples: tokenize the text and load the images of one training example at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_simplified.data.collate import Example
from llava_simplified.data.image_folder import NameMatches
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import (
    BadRecords,
    Record,
    Records,
    response_problem,
)
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prompt import IMAGE_INDEX, Message, Prompt, TokenizedPrompt

MIN_ANSWER_TOKENS = 2  # one token and the end token


class FeatureStore(Protocol):
    """Precomputed inputs by image name, such as the cache of a frozen vision tower's features.

    All values have the same shape and dtype: features (tokens, hidden size), or transformed pixels, uint8 (3, height,
    width).
    """

    @property
    def dummy_image(self) -> torch.Tensor:
        """An empty image, with the shape and dtype of the stored values."""
        ...

    def __contains__(self, image: str, /) -> bool: ...

    def __getitem__(self, image: str, /) -> torch.Tensor: ...


class CaptionDataset(Dataset[Example]):
    """A map-style dataset with one example per record.

    Several responses of a record (five captions of an image) are branches of one example: they share the image and the
    prompt, which are computed once. See `collate`.
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
        """Create a dataset.

        Args:
            records: The records to train on.
            prompt: Renders text to token ids and labels.
            image_folder: The folder that the records' image paths are relative to.
            transform: Resize and crop of the vision tower.
            max_length: Maximum number of text tokens of a prompt with one answer; an image counts as one. Longer
                answers lose words at their end. A prompt that leaves no room for an answer is an error.
            share_prefix: True makes one example per record. False makes one example per response.
            features: Precomputed features or pixels. If given, no image file is opened.
        """
        self.records = records
        self.prompt = prompt
        self.image_folder = Path(image_folder)
        self.transform = transform
        self.max_length = max_length
        self.features = features
        # Used only with one example per response: for each record, the number of examples up to and including it.
        self._ends: np.ndarray | None = None
        if not share_prefix:
            # Slow for large files, because this reads and parses all records.
            counts = (len(record.responses) for record in records)
            self._ends = np.cumsum(np.fromiter(counts, dtype=np.int64, count=len(records)))

    def __len__(self) -> int:
        if self._ends is None:
            return len(self.records)
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """Return the example at `index`.

        If its image cannot be read, the next example with a readable image is returned instead, with a warning. One bad
        file in millions must not end a run, and the trainer counts the warnings.

        Raises:
            ValueError: No image of the dataset can be read, or a record has no usable response.
        """
        warnings: list[str] = []
        for offset in range(len(self)):
            # Wrap around: the first example follows the last one.
            example = self.load((index + offset) % len(self), warnings)
            if example is not None:
                example.warnings = warnings + example.warnings
                return example
        raise ValueError(
            f"the images of all {len(self)} examples cannot be read; check the image folder. "
            f"The first problem: {warnings[0]}"
        )

    def load(self, index: int, warnings: list[str]) -> Example | None:
        """Return the example at `index`, or None if its image cannot be read.

        Args:
            index: Index of the example.
            warnings: A list to which a warning about the image is appended. The trainer counts the warnings of each kind:
                the text before the first comma.

        Raises:
            ValueError: The record has no usable response.
        """
        record, responses = self.locate(index)
        example = self.tokenize(record, responses)
        matches = NameMatches()
        try:
            example.pixel_values, example.image_features = self.load_images(record, matches)
        except ImageError as error:
            warnings.append(f"bad image, {record.id}: {error}")
            return None
        for rule in matches.rules:
            if rule != "exact":
                names = ", ".join(record.images)
                warnings.append(f"image name matched by {rule}, {record.id}: {names}")
        return example

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """Return the number of positions of each example, with expanded image placeholders.

        This tokenizes all text, about 20,000 examples per second.

        Args:
            tokens_per_image: Number of patch features per image.

        Returns:
            int32 (examples,).
        """
        return np.fromiter(self._iter_lengths(tokens_per_image), np.int32, len(self))

    def _iter_lengths(self, tokens_per_image: int) -> Iterator[int]:
        """Yield the number of positions of each example, without reading images."""
        for index in range(len(self)):
            record, responses = self.locate(index)
            input_ids = self.tokenize(record, responses).input_ids
            num_images = input_ids.count(IMAGE_INDEX)
            # Subtract 1, because `input_ids` already contains one token per image.
            yield len(input_ids) + (tokens_per_image - 1) * num_images

    def locate(self, index: int) -> tuple[Record, Sequence[str]]:
        """Return the record of the example at `index`, and the responses that the example contains."""
        if self._ends is None:
            record = self.records[index]
            return record, record.responses
        # Find the first record whose examples end after `index`; this skips records without a response.
        row = bisect_right(self._ends, index)
        record = self.records[row]
        first_index = int(self._ends[row]) - len(record.responses)
        return record, [record.responses[index - first_index]]

    def load_images(
        self, record: Record, matches: NameMatches | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Load the images of a record, or look up their features.

        Args:
            record: The record.
            matches: Counts the image files that each rule finds.

        Returns:
            (pixels, features), at least one of them None: uint8 (images, 3, height, width), and
            (images, tokens, hidden size).

        Raises:
            ImageError: An image cannot be read.
        """
        if not record.images or self.features is None:
            pixels = load_record_images(record, self.image_folder, self.transform, matches)
            return pixels, None
        for name in record.images:
            if name not in self.features:
                raise ImageError(
                    "corrupt",
                    f"{name} has no stored features, because it could not be read when they were computed",
                )
        stored = torch.stack([self.features[name] for name in record.images])
        # The store contains pixels if the tower is trained (its features change) or if features would not fit.
        if stored.dtype == torch.uint8:
            return stored, None
        return None, stored

    def tokenize(self, record: Record, responses: Sequence[str]) -> Example:
        """Return an example without its images.

        Args:
            record: The record.
            responses: The responses that the example contains. Each is truncated separately, so that prompt and response
                have at most `max_length` tokens.

        Raises:
            ValueError: There is no response, a response is empty, or the prompt leaves no room for a response.
        """
        if not responses:
            raise ValueError(f"{record.id}: no response to train on")
        prefix, answers, warnings = self.tokenize_answers(record, responses)
        input_ids = list(prefix.input_ids)
        labels = list(prefix.labels)
        branches = [0] * len(input_ids)
        for number, answer in enumerate(answers, start=1):
            input_ids += answer
            labels += answer  # every token of an answer is trained, its end token included
            branches += [number] * len(answer)
        return Example(
            input_ids,
            labels,
            warnings=warnings,
            branches=branches if len(answers) > 1 else None,
            id=record.id,  # the trainer names it if its loss is not finite
        )

    def tokenize_answers(
        self, record: Record, responses: Sequence[str]
    ) -> tuple[TokenizedPrompt, list[list[int]], list[str]]:
        """Return the prompt, the token ids of each answer, and a warning for each answer that is truncated.

        Args:
            record: The record.
            responses: The answers. Each is truncated separately, so that prompt and answer have at most `max_length`
                tokens.

        Raises:
            ValueError: An answer is empty, or the prompt leaves no room for it.
        """
        warnings: list[str] = []
        prefix, answers = self.prompt.render_branches(record.turns, responses, record.id)
        # The limit applies to the prompt with one answer, so answers that share a prompt are truncated as if each
        # were alone.
        room = self.max_length - len(prefix.input_ids)
        for number, text in enumerate(responses):
            if len(answers[number]) > room:
                answers[number] = self._truncate(record, text, room)
                warnings.append(
                    f"truncated answer, {record.id}: prompt and answer are longer than "
                    f"--model_max_length {self.max_length}"
                )
        return prefix, answers, warnings

    def _truncate(self, record: Record, text: str, room: int) -> list[int]:
        """Cut a response after a word so that it fits, and return its token ids with the end token.

        The end token is kept, so that the model still learns to stop.

        Args:
            record: The record, for its turns.
            text: The response.
            room: Maximum number of tokens, with the end token.

        Raises:
            ValueError: The prompt leaves no room for one token and the end token.
        """
        if room < MIN_ANSWER_TOKENS:
            raise ValueError(no_room_problem(record, self.max_length))
        words = text.split(" ")
        # Keep the first word that is not blank, and what precedes it. Spaces at the beginning are empty words.
        num_kept = next(number for number, word in enumerate(words, 1) if word.strip())
        # A word has at least one token, so more words than tokens cannot fit. Render the text again for each attempt:
        # its number of tokens is not the sum over its words, because tokenizers may merge across spaces.
        words = words[: max(room, num_kept)]
        while True:
            _, (answer,) = self.prompt.render_branches(record.turns, [" ".join(words)], record.id)
            if len(answer) <= room:
                return answer
            if len(words) == num_kept:
                # Cut within a single "word" that does not fit: a long URL, or a language without spaces.
                return [*answer[: room - 1], self.prompt.end_id]
            words.pop()


def load_record_images(
    record: Record,
    folder: str | Path,
    transform: ImageTransform,
    matches: NameMatches | None = None,
) -> torch.Tensor | None:
    """Read, decode and transform the images of a record.

    Returns:
        uint8 (images, 3, height, width); None if the record has no image.

    Raises:
        ImageError: An image cannot be read.
    """
    if not record.images:
        return None
    images = []
    for name in record.images:
        pixels = decode_image(read_image_bytes(name, folder, matches))
        images.append(transform(pixels))
    return torch.stack(images)


def drop_bad_records(
    records: Records,
    max_bad_records: float,
    prompt: Prompt | None = None,
    max_length: int = 0,
    problem_of: Callable[[Record], str] = response_problem,
) -> Records:
    """Return the records that can be trained on. The others would stop a run in the middle.

    All rows are parsed, millions per minute. Few of them are tokenized: the size of a prompt in bytes limits its number
    of tokens, and most prompts are short enough by this limit.

    Args:
        records: All records.
        max_bad_records: Maximum share of bad records, `--max_bad_records`.
        prompt: Renders text to token ids; without it, only the records themselves are checked.
        max_length: Maximum number of tokens, `--model_max_length`. Prompts that leave no room for an answer are bad.
        problem_of: Function that returns why a record cannot be trained on; empty if it can.

    Raises:
        ValueError: The share of bad records exceeds the maximum. The message names the first bad records.
    """
    # A bad record that is found now is a line in the log. One that a worker finds at step 10,000 stops the run.
    bad = BadRecords(max_bad_records, len(records))
    indices = []
    lengths = None if prompt is None else _PromptLengths(prompt)
    for index in range(len(records)):
        try:
            record = records[index]
            problem = problem_of(record)
            if lengths is not None and not lengths.fits(record, max_length - MIN_ANSWER_TOKENS):
                problem = problem or no_room_problem(record, max_length)
        except ValueError as error:
            problem = str(error)
        if problem:
            indices.append(index)
            bad.reasons.append(problem)
    bad.check()
    return Records(records.rows.without(indices)) if indices else records


class _PromptLengths:
    """Compare the lengths of prompts with a limit, tokenizing only those that can exceed it."""

    TOKENS_AT_BOUNDARIES = 4  # additional tokens per turn, see `fits`

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._max_normalizer_growth = prompt.max_normalizer_growth()
        # Roles of the turns -> number of tokens of the template with these roles.
        self._template_lengths: dict[tuple[str, ...], int] = {}

    def fits(self, record: Record, max_tokens: int) -> bool:
        """Return whether the prompt of a record has at most `max_tokens` tokens.

        Raises:
            ValueError: The chat template cannot render the turns.
        """
        roles = tuple(turn.role for turn in record.turns)
        if roles not in self._template_lengths:
            turns = [Message(turn.role, "x") for turn in record.turns]
            self._template_lengths[roles] = self._length(turns, record.id)
        num_bytes = sum(len(turn.content.encode()) for turn in record.turns)
        # Add an upper bound of the tokens of the content to the tokens of the template. The latter were counted with
        # the content "x": where the template meets other content, a few more tokens may be needed.
        upper_bound = self._template_lengths[roles] + self._max_normalizer_growth * num_bytes
        upper_bound += self.TOKENS_AT_BOUNDARIES * len(roles)
        if upper_bound <= max_tokens:
            return True
        # The bound does not decide it: count the tokens.
        return self._length(record.turns, record.id) <= max_tokens

    def _length(self, turns: Sequence[Message], where: str) -> int:
        return len(self._prompt.render(turns, None, where).input_ids)


def no_room_problem(record: Record, max_length: int) -> str:
    """Return the message about a record whose prompt leaves no room for an answer."""
    return (
        f"{record.id}: the prompt leaves no room for an answer with "
        f"--model_max_length {max_length}. Raise --model_max_length, or shorten the instruction."
    )
