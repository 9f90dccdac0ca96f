"""Samples as tables: one line for each token, with its position, its text and whether it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import Record
from llava_simplified.options import escape_control_characters
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, IMAGE_PLACEHOLDER, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SampleView:
    """Renders samples as tables of tokens.

    Args:
        tokenizer: The tokenizer of the language model.
        prompt: The prompt renderer of training.
        tokens_per_image: Number of positions per image in the language model; None if unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Prompt,
        tokens_per_image: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._tokens_per_image = tokens_per_image

    def render(self, record: Record) -> Iterator[Text | Table]:
        """Yield a heading, the tokens of the first example of a record, and its length.

        For a preference pair, the first example has the chosen answer. The tokens of the rejected answer follow.
        """
        input_ids, labels = self._prompt.render(record.turns, record.responses[0], record.id)
        table = _token_table()
        # Count positions in the language model. An image has many of them, but only one entry in `input_ids`.
        position = 0
        for token, label in zip(input_ids, labels):
            if token == IMAGE_INDEX:
                position += self._add_image(table, position)
                continue
            is_trained = label != IGNORE_INDEX
            # Wrap the token in Text: in a str, rich would interpret a token such as "[red]" as markup.
            table.add_row(
                str(position),
                Text(self.token_text(token)),
                str(token),
                "yes" if is_trained else "-",
                style="bold green" if is_trained else "dim",
            )
            position += 1

        num_trained = sum(label != IGNORE_INDEX for label in labels)
        alternatives = ""
        if len(record.responses) > 1:
            alternatives = f" (the first of {len(record.responses)} responses)"
        if record.rejected is not None:
            alternatives = " (a preference pair: first the chosen answer, then the rejected one)"
        images = ", ".join(record.images) or "no image"
        heading = escape_control_characters(f"{record.id}{alternatives}  {images}")
        yield Text(heading, "bold")
        yield table
        share = num_trained / position
        yield Text(f"{position} tokens, {num_trained} trained ({share:.0%})\n")
        if record.rejected is not None:
            yield from self._render_rejected(record)

    def _render_rejected(self, record: Record) -> Iterator[Text | Table]:
        """Yield the tokens of the rejected answer, which follows the same prompt."""
        rejected = record.rejected or ""
        prefix, [answer] = self._prompt.render_branches(record.turns, [rejected], record.id)
        # The first position after the prompt. Each image is one entry of `input_ids`, but has more positions.
        position = len(prefix.input_ids)
        if self._tokens_per_image:
            position += prefix.input_ids.count(IMAGE_INDEX) * (self._tokens_per_image - 1)
        table = _token_table()
        for number, token in enumerate(answer, start=position):
            row = (str(number), Text(self.token_text(token)), str(token), "rejected")
            table.add_row(*row, style="bold red")
        yield Text("the rejected answer, after the same prompt", "bold")
        yield table
        yield Text(f"{len(answer)} tokens\n")

    def _add_image(self, table: Table, position: int) -> int:
        """Add the table row of an image, and return its number of positions."""
        # If the vision tower is unknown, count the image as one token.
        count = self._tokens_per_image or 1
        # Show all positions of the image in one row, for example "4-199".
        positions = str(position)
        if count > 1:
            positions = f"{position}-{position + count - 1}"
        # If the chat template writes an image token of its own, show that token.
        name = escape_control_characters(self._prompt.image_token or IMAGE_PLACEHOLDER)
        if self._tokens_per_image:
            name = f"{name} x {self._tokens_per_image}"
        table.add_row(positions, Text(name), "", "image", style="magenta")
        return count

    def token_text(self, token: int) -> str:
        """Return the text of a token on one line: a space as `␣`, unprintable characters escaped."""
        # Decode the token after an "x", because decoders may drop a space at the beginning.
        prefix = self._tokenizer.encode("x", add_special_tokens=False)
        decode = self._tokenizer.backend_tokenizer.decode
        prefix_text = decode(prefix, skip_special_tokens=False)
        text = decode([*prefix, token], skip_special_tokens=False)[len(prefix_text) :]
        # A token may be only a part of a character (some bytes of its UTF-8). Then show its name in the vocabulary.
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = str(self._tokenizer.convert_ids_to_tokens(token))
        return _make_visible(text).replace(" ", "␣")

    def describe_images(self, record: Record, folder: str) -> tuple[list[Text], list[str]]:
        """Open the images of a record as training does, and describe them.

        Returns:
            A line with the size of each readable image, and a message for each unreadable one.
        """
        lines = []
        problems = []
        for name in record.images:
            # Decode the image completely: a truncated file has a valid header.
            try:
                height, width, _ = decode_image(read_image_bytes(name, folder)).shape
            # ImageError, which is raised for an unreadable image, is a ValueError. So is the error for an invalid name.
            except ValueError as error:
                problems.append(f"{record.id}: {error}")
                continue
            line = escape_control_characters(f"{name}: {width} x {height} pixels")
            lines.append(Text(line))
        return lines, problems


def _token_table() -> Table:
    return Table(
        "position",
        "token",
        "id",
        "trained",
        box=None,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )


def _make_visible(text: str) -> str:
    """Escape every character that cannot be seen, such as line breaks, joiners and unusual spaces.

    `escape_control_characters` keeps them, because they are harmless. Here, each token must be recognizable.
    """
    # Check each character separately, so that emoji and letters of all scripts stay readable.
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)
