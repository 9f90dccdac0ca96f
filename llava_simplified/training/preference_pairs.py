"""Preference pairs as examples: the chosen and the rejected answer are two branches of one prompt.

<s> IMG IMG IMG IMG What is this ?  |  a cat </s>  |  a dog </s>
prompt, computed once                  chosen         rejected        (see `data.collate`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_simplified.data.collate import Batch, Collator, Example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.records import Record, pair_problem, response_problem
from llava_simplified.training.rollouts import branch_examples


@dataclass(slots=True)
class PairExample(Example):
    """A prompt with two answers.

    Attributes:
        answer_lengths: Number of tokens of the chosen and of the rejected answer.
    """

    answer_lengths: tuple[int, int] = (0, 0)


def record_problem(objective: str) -> Callable[[Record], str]:
    """Return the check of an objective: a function that returns why a record cannot be used, or "" if it can."""
    return pair_problem if objective == "dpo" else response_problem


class PairDataset(CaptionDataset):
    """A dataset with one pair per record. Records must be pairs, as `pair_problem` checks."""

    def tokenize(self, record: Record, responses: Sequence[str]) -> PairExample:
        """Return the pair of a record, without its images.

        Raises:
            ValueError: The record is not a pair, or its prompt leaves no room for an answer.
        """
        problem = pair_problem(record)
        if problem or record.rejected is None:
            raise ValueError(problem)
        texts = [responses[0], record.rejected]
        prefix, answers, warnings = self.tokenize_answers(record, texts)
        # Only the two answers are compared: earlier answers of a conversation are part of the prompt.
        prompt = Example(prefix.input_ids, [], id=record.id)
        [example] = branch_examples(prompt, answers, share_prefix=True)
        return PairExample(
            example.input_ids,
            example.labels,
            warnings=warnings,
            branches=example.branches,
            id=record.id,
            answer_lengths=(len(answers[0]), len(answers[1])),
        )


class PairCollator(Collator):
    """Collate pairs, and examples of the validation set as usual.

    The batch of pairs has one more entry: `answer_lengths`, int64 (2 * pairs,), the number of labels of each
    answer, in the order of the labels: chosen, rejected, chosen, ...

    Args:
        share_prefix: Keep the two answers of a pair in one row, instead of one row for each.
        arguments: See `Collator`.
    """

    def __init__(self, share_prefix: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.share_prefix = share_prefix

    def __call__(self, rows: Sequence[Example | Sequence[Example]]) -> Batch:
        """Collate examples or packs of examples."""
        lengths: list[int] = []
        for row in rows:
            for example in [row] if isinstance(row, Example) else row:
                if isinstance(example, PairExample):
                    lengths += example.answer_lengths
        if not lengths:
            return super().__call__(rows)
        if not self.share_prefix:
            rows = _split_pairs(rows)
        batch = super().__call__(rows)
        return {**batch, "answer_lengths": torch.tensor(lengths)}  # type: ignore[typeddict-unknown-key]


def _split_pairs(rows: Sequence[Any]) -> list[Example]:
    """Return one example for each answer, with a copy of the prompt."""
    split: list[Example] = []
    for pair in rows:
        # The row contains the prompt (branch 0), the chosen answer (1) and the rejected answer (2), in this order.
        start = pair.branches.index(1)
        chosen_length, _ = pair.answer_lengths
        middle = start + chosen_length
        answers = [pair.input_ids[start:middle], pair.input_ids[middle:]]
        prompt = Example(
            pair.input_ids[:start],
            [],
            pair.pixel_values,
            pair.image_features,
            warnings=pair.warnings,
            id=pair.id,
        )
        split += branch_examples(prompt, answers, share_prefix=False)
    return split
