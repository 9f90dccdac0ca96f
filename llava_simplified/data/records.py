"""Records: parsed rows of a data set. A record is a captioned image, or a conversation about images.

Three JSON formats are supported:

    {"image": "0.jpg", "instruction": "Describe it.", "response": "a cat"}
    {"image": "0.jpg", "instruction": "Describe it.", "responses": ["a cat", "my pet"]}
    {"image": "0.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "a cat"}]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from llava_simplified.data.rows import RowFile, open_rows
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message, count_images

MAX_CHECKED_ROWS = 20_000  # rows that `open_records` parses before it returns: under a second
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data set.

    Attributes:
        images: Paths relative to the image folder, or `shard.tar#key`; empty for a row with text only.
        turns: The conversation up to the last answer, which is not included. The user turns contain exactly one
            `<image>` per image.
        responses: The alternatives for the last answer (several captions of one image). A record without responses can
            be captioned, but not trained on.
        id: File name and row number, for messages: "train.json row 7".
    """

    images: tuple[str, ...]
    turns: tuple[Message, ...]
    responses: tuple[str, ...]
    id: str

    @classmethod
    def from_json(cls, row: dict[str, Any], where: str) -> Record:
        """Parse one row.

        Args:
            row: A JSON object in one of the formats of the module's docstring.
            where: File name and row number, for error messages.

        Raises:
            ValueError: The row is not a record. The message names `where`, and the key that is missing or has the
                wrong type.
        """
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a record must be a JSON object, got {type(row).__name__}")
        images = _parse_images(row, where)
        if "conversations" in row:
            turns, responses = _parse_conversation(row["conversations"], where)
        else:
            turns, responses = _parse_instruction(row, where)
        return cls(
            images=images,
            turns=insert_image_placeholders(turns, len(images), where),
            responses=responses,
            id=where,
        )


def _parse_images(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the image names of a row: `image` or `images`, a string or a list of strings."""
    value = row.get("image", row.get("images"))
    # In text-only rows the key is missing, null or an empty string, depending on the source.
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if not _is_list_of_strings(value) or "" in value:
        raise ValueError(f"{where}: 'image' must be a path or a list of paths, got {value!r}")
    return tuple(value)


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _parse_instruction(row: dict[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
    """Return turns and responses of a row in the instruction format."""
    instruction = row.get("instruction")
    if not isinstance(instruction, str):
        raise ValueError(
            f"{where}: a record needs the key 'instruction' (a string) or 'conversations', "
            f"got only {sorted(row)}"
        )
    # Without responses the record can still be captioned.
    responses: Any = []
    if "responses" in row:
        responses = row["responses"]
    elif "response" in row:
        responses = [row["response"]]
    if not _is_list_of_strings(responses):
        raise ValueError(
            f"{where}: 'response' must be a string and 'responses' a list of strings, "
            f"got {responses!r}"
        )
    return [Message("user", instruction)], tuple(responses)


def _parse_conversation(value: Any, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """Return turns and responses of LLaVA's `conversations`; the last answer becomes the response."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: 'conversations' must be a list of {{from, value}}, got {value!r}"
        )
    turns = [_parse_turn(turn, number, where) for number, turn in enumerate(value)]
    # Ignore system turns here; rendering the prompt checks their position.
    roles = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user", "assistant"] * len(roles)
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(
            f"{where}: the turns of 'conversations' must alternate: human, gpt, human, ...; "
            f"got {', '.join(roles)}"
        )
    last = turns[-1]
    if last.role == "assistant":
        return turns[:-1], (last.content,)
    # The conversation ends with a question, so the record can be captioned but not trained on.
    return turns, ()


def _parse_turn(turn: Any, number: int, where: str) -> Message:
    """Return one turn of LLaVA's `conversations` as a message."""
    is_turn = isinstance(turn, dict) and isinstance(turn.get("value"), str)
    if not is_turn or turn.get("from") not in _ROLES:
        raise ValueError(
            f"{where}: turn {number} of 'conversations' needs the keys 'from' "
            f"(one of {', '.join(_ROLES)}) and 'value' (a string)"
        )
    return Message(_ROLES[turn["from"]], turn["value"])


def insert_image_placeholders(
    turns: Sequence[Message],
    count: int,
    where: str,
) -> tuple[Message, ...]:
    """Insert `<image>` before the first user text if there are images and no text contains a placeholder.

    Args:
        turns: The conversation.
        count: Number of images.
        where: File name and row number, for error messages.

    Raises:
        ValueError: The texts contain placeholders, but not `count`; or there is no user turn.
    """
    placeholders = count_images(turns)
    if placeholders == count:
        return tuple(turns)
    roles = [turn.role for turn in turns]
    if placeholders > 0 or "user" not in roles:
        raise ValueError(
            f"{where}: {count} image(s), but the text contains {IMAGE_PLACEHOLDER} "
            f"{placeholders} time(s)"
        )
    # As in LLaVA's data, put each placeholder on its own line, before the text.
    lines = f"{IMAGE_PLACEHOLDER}\n" * count
    first_user = roles.index("user")
    with_images = list(turns)
    with_images[first_user] = Message("user", lines + turns[first_user].content)
    return tuple(with_images)


def prediction_row(index: int, record: Record, text: str) -> dict[str, Any]:
    """Return one row of a prediction file: one generated text of one record.

    Args:
        index: The record's index in its data set.
        record: The record.
        text: The generated text.
    """
    # As in the original tutorial, a single reference is a string. No reference is an empty string.
    ground_truth: str | list[str] = "".join(record.responses)
    if len(record.responses) > 1:
        ground_truth = list(record.responses)
    # Remove the placeholders that `insert_image_placeholders` may have added.
    instruction = record.turns[-1].content.replace(f"{IMAGE_PLACEHOLDER}\n", "")
    return {
        "index": index,
        "image": record.images[0] if record.images else None,
        "instruction": instruction,
        "gt_caption": ground_truth,
        "pred_output": text,
    }


class Records(Sequence[Record]):
    """The records of a file, parsed on access. Cheap to keep, to pickle and to fork."""

    def __init__(self, rows: RowFile) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Record.from_json(self.rows[index], self.rows.where(index))

    def longest(self, count: int) -> list[int]:
        """Return the indices of the rows with the most bytes, without reading any text.

        They nearly always include the row with the most tokens.
        """
        return self.rows.longest(count)


def open_records(path: str | Path, require_responses: bool = False) -> Records:
    """Open all records of a file, or of a folder that `llava download` wrote.

    Up to 20,000 rows, evenly spread over the file, are parsed immediately, so that a wrong file is rejected here and not
    in the middle of a run.

    Args:
        path: A .json array, a .jsonl or .parquet file, or a folder.
        require_responses: Reject rows without a response or with an empty response.

    Raises:
        ValueError: The file cannot be read, or one of its rows is not a record. The message names file and row.
    """
    records = Records(open_rows(path))
    num_checked = min(len(records), MAX_CHECKED_ROWS)
    evenly_spread = np.linspace(0, len(records) - 1, num_checked).astype(int)
    for index in evenly_spread.tolist():
        record = records[index]  # raises a ValueError if the row is not a record
        if not require_responses:
            continue
        if not record.responses or not all(text.strip() for text in record.responses):
            raise ValueError(
                f"{record.id}: a response is missing or empty, so the record cannot be used for training. "
                "Remove such records with `llava clean`."
            )
    return records
