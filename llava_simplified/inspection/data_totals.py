"""Totals of a data file: number of examples, tokens, trained tokens, lengths and problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.table import Table

from llava_simplified.data.dataset import MIN_ANSWER_TOKENS, no_room_problem
from llava_simplified.data.records import Record, Records, pair_problem
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Prompt


@dataclass
class DataTotals:
    """Totals of rows of a data file.

    Each response of a row counts as one example, and so does each answer of a preference pair.

    Attributes:
        prompt: The prompt renderer of training.
        tokens_per_image: Number of positions per image in the language model.
        max_length: `--model_max_length`, the maximum number of tokens per example; None if it was not passed.
        num_rows: Number of rows.
        num_trained: Number of trained tokens.
        num_images: Number of images; an image with several responses is counted once for each.
        num_pairs: Number of preference pairs.
        lengths: Length of each example, where an image counts as one token, as in `--model_max_length`.
        expanded_lengths: Length of each example in the language model, with all tokens of its images.
        problems: Messages about rows that cannot be trained on.
    """

    prompt: Prompt
    tokens_per_image: int
    max_length: int | None = None
    num_rows: int = 0
    num_trained: int = 0
    num_images: int = 0
    num_pairs: int = 0
    lengths: list[int] = field(default_factory=list)
    expanded_lengths: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, records: Records, index: int) -> Record | None:
        """Render a row as training does, and count it.

        Returns:
            The record, or None if it cannot be trained on; the reason is appended to `problems`.
        """
        self.num_rows += 1
        # Catch ValueError, which is raised for invalid JSON, invalid records and invalid prompts.
        try:
            record = records[index]
            # A preference pair must meet more conditions than a record with responses.
            problem = "" if record.rejected is None else pair_problem(record)
            if problem:
                raise ValueError(problem)
            prefix, branches = self.prompt.render_branches(
                record.turns, answers_of(record), record.id
            )
            # A record without a response is valid for captioning, but not for training.
            if not branches:
                raise ValueError(f"{record.id}: no response to train on")
            # Training cuts long answers, but never the prompt, and a few tokens of the answer must remain.
            if self.max_length and len(prefix.input_ids) > self.max_length - MIN_ANSWER_TOKENS:
                raise ValueError(no_room_problem(record, self.max_length))
        except ValueError as error:
            self.problems.append(str(error))
            return None

        self.num_pairs += record.rejected is not None
        # Count each response as an example with its own copy of the prompt. With --share_prefix, training computes the
        # prompt only once for all responses. This saves time, but does not change these numbers.
        num_images = prefix.input_ids.count(IMAGE_INDEX)
        # The answers to earlier questions of the conversation are trained too.
        trained_in_prefix = sum(label != IGNORE_INDEX for label in prefix.labels)
        for branch in branches:
            # An image is one token in `input_ids`, but `tokens_per_image` positions in the model.
            length = len(prefix.input_ids) + len(branch)
            self.lengths.append(length)
            self.expanded_lengths.append(length + num_images * (self.tokens_per_image - 1))
            self.num_trained += trained_in_prefix + len(branch)
            self.num_images += num_images
        return record

    @property
    def num_tokens(self) -> int:
        """Return the number of positions of all examples in the language model, image tokens included."""
        return sum(self.expanded_lengths)


def answers_of(record: Record) -> tuple[str, ...]:
    """Return the responses of a record, or both answers of a preference pair."""
    return record.responses if record.rejected is None else (*record.responses, record.rejected)


def totals_table(
    shown: DataTotals, scanned: DataTotals, *, num_rows: int, model_max_length: int | None
) -> Table:
    """Return a table with the totals of the shown samples and of the file.

    Args:
        shown: Totals of the samples that were shown.
        scanned: Totals of the rows that were scanned.
        num_rows: Number of rows of the file.
        model_max_length: If given, the table also contains the number of examples that are longer than this.
    """
    scope = "the file"
    if scanned.num_rows < num_rows:
        scope = f"{scanned.num_rows:,} of {num_rows:,} rows"
    title = f"{shown.prompt.name} template"
    table = Table("", "shown", scope, title=title, box=None, padding=(0, 2, 0, 0))
    # Align the numbers to the right. The first column contains the names.
    for column in table.columns[1:]:
        column.justify = "right"

    # Compute each value twice: for the shown samples and for the scanned rows.
    def add_row(name: str, value: Callable[[DataTotals], str]) -> None:
        table.add_row(name, value(shown), value(scanned))

    # `max(1, ...)` avoids a division by zero if no row is valid.
    def trained_fraction(totals: DataTotals) -> str:
        return f"{totals.num_trained / max(1, totals.num_tokens):.1%}"

    def mean_length(totals: DataTotals) -> str:
        return f"{totals.num_tokens / max(1, len(totals.lengths)):.1f}"

    add_row("rows", lambda totals: f"{totals.num_rows:,}")
    if scanned.num_pairs or shown.num_pairs:
        add_row("preference pairs", lambda totals: f"{totals.num_pairs:,}")
    add_row("examples", lambda totals: f"{len(totals.lengths):,}")
    # Indented names are parts of the row "tokens".
    add_row("tokens", lambda totals: f"{totals.num_tokens:,}")
    add_row("  of images", lambda totals: f"{totals.num_images * totals.tokens_per_image:,}")
    add_row("  trained", lambda totals: f"{totals.num_trained:,}")
    add_row("share trained", trained_fraction)
    add_row("mean length", mean_length)
    add_row("longest", lambda totals: f"{max(totals.expanded_lengths, default=0):,}")
    if model_max_length:
        limit = model_max_length

        # Training cuts the end of longer answers. Here, an image counts as one token.
        def num_truncated(totals: DataTotals) -> str:
            return f"{sum(length > limit for length in totals.lengths):,}"

        add_row(f"cut at {limit}", num_truncated)
    add_row("problems", lambda totals: f"{len(totals.problems):,}")
    return table
