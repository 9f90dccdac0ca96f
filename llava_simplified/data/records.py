"""Records: parsed rows of a data set. A record is a captioned image, or a conversation about images.

Three JSON formats are supported:

    {"image": "0.jpg", "instruction": "Describe it.", "response": "a cat"}
    {"image": "0.jpg", "instruction": "Describe it.", "responses": ["a cat", "my pet"]}
    {"image": "0.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "a cat"}]}

The chat rows of other programs are converted to these formats (see `chat_rows`), and so are preference pairs, which have
the keys `chosen` and `rejected` instead of `response` (see `preference_rows`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from llava_simplified.data.chat_rows import convert_chat, is_chat, path_of_image
from llava_simplified.data.preference_rows import convert_pair, is_pair
from llava_simplified.data.questions import QUESTIONS_KEY, Question, parse_questions
from llava_simplified.data.rows import RowFile, open_rows
from llava_simplified.data.unsupported import (
    check_placeholders,
    check_row_keys,
    check_turn_keys,
)
from llava_simplified.foreign_files import shorten
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message, count_images

logger = logging.getLogger(__name__)

# Number of rows that `open_records` parses before it returns, which takes less than a second.
MAX_CHECKED_ROWS = 20_000
# Role of a turn in LLaVA's `conversations` -> role of a message.
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# A maximum share of bad records that tolerates any number of them, unless all are bad.
ALL_RECORDS = 1.0
# `BadRecords` computes the allowed number of bad records from at least this number of records. Otherwise, a small file
# could not contain even one bad record.
MIN_RECORDS_FOR_SHARE = 100


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data set.

    Attributes:
        images: Paths relative to the image folder, or `shard.tar#key`; empty for a row with text only.
        turns: The conversation up to the last answer, which is not included. The user turns contain exactly one
            `<image>` per image.
        responses: The alternatives for the last answer (several captions of one image). A record without responses can
            be captioned, but not trained on. For a preference pair, the chosen answer.
        id: File name and row number, for messages: "train.json row 7".
        rejected: The rejected answer of a preference pair; None for other records.
        questions: Multiple-choice questions about the image, which only the reward `qa` uses.
    """

    images: tuple[str, ...]
    turns: tuple[Message, ...]
    responses: tuple[str, ...]
    id: str
    rejected: str | None = None
    questions: tuple[Question, ...] = ()

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
        # Convert the rows of other programs first, so that one parser suffices.
        rejected = None
        if is_pair(row):
            row = convert_pair(row, where)
            rejected = row["rejected"]
        elif is_chat(row):
            row = convert_chat(row, where)
        images = _parse_images(row, where)
        # Refuse what would be ignored, such as a video, because the model would learn to answer without it.
        check_row_keys(row, images, where)
        if "conversations" in row:
            turns, responses = _parse_conversation(row["conversations"], where)
        else:
            turns, responses = _parse_instruction(row, where)
        if rejected is not None:
            _check_unanswered(responses, where)
            # In supervised training, the chosen answer is the response.
            responses = (row["chosen"],)
        _check_texts(images, turns, (*responses, rejected or ""), where)
        return cls(
            images=images,
            turns=_place_images(turns, responses, len(images), where),
            responses=responses,
            id=where,
            rejected=rejected,
            questions=parse_questions(row.get(QUESTIONS_KEY, []), where),
        )


def _check_unanswered(responses: Sequence[str], where: str) -> None:
    """Refuse a preference pair whose prompt already ends with an answer.

    Raises:
        ValueError: There is a response.
    """
    if responses:
        raise ValueError(
            f"{where}: the row has 'chosen' and 'rejected', but also another answer, {responses[0]!r:.80}; "
            "remove this answer, or 'chosen' and 'rejected'"
        )


def _place_images(
    turns: Sequence[Message], responses: Sequence[str], count: int, where: str
) -> tuple[Message, ...]:
    """Insert `<image>` if no user turn contains it; see `insert_image_placeholders`.

    Raises:
        ValueError: The number of placeholders in the user turns is wrong. If system or assistant turns contain the missing
            ones, the message says so.
    """
    # In a system or assistant turn, `<image>` is ordinary text. Report it only if it explains a wrong number in user turns.
    others = [turn.content for turn in turns if turn.role != "user"]
    elsewhere = sum(text.count(IMAGE_PLACEHOLDER) for text in (*others, *responses[:1]))
    if elsewhere and count_images(turns) + elsewhere == count:
        raise ValueError(
            f"{where}: {IMAGE_PLACEHOLDER} occurs in a system or assistant turn; images are supported only in "
            "user turns"
        )
    return insert_image_placeholders(turns, count, where)


def image_names(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the image names of a row; () if they are malformed."""
    try:
        return _parse_images(row, "")
    except ValueError:
        return ()


def _parse_images(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the image names of a row: `image` or `images`, a string or a list of strings."""
    given: list[Any] = []
    for key in ("image", "images"):
        value = row.get(key)
        # In rows without images, the key is missing, or its value is null or empty.
        if not value:
            continue
        if isinstance(value, list):
            given.append([path_of_image(image) for image in value])
        else:
            given.append(path_of_image(value))
    if not given:
        return ()
    value, *others = given
    # Some data sets have both keys, which may name the same image.
    for other in others:
        if value != other and [value] != other:
            raise ValueError(
                f"{where}: 'image' is {value!r}, but 'images' is {other!r}; keep one of them"
            )
    if isinstance(value, str):
        return (value,)
    if not _is_list_of_strings(value) or "" in value:
        raise ValueError(
            f"{where}: 'image' must be a path or a list of paths, got {shorten(value)}"
        )
    return tuple(value)


def _check_texts(
    images: Sequence[str], turns: Sequence[Message], responses: Sequence[str], where: str
) -> None:
    """Refuse texts that cannot be encoded, and placeholders of media that are not supported.

    Raises:
        ValueError: A text contains half of a surrogate pair, or a user turn contains another program's
            placeholder.
    """
    for text in (*images, *(turn.content for turn in turns), *responses):
        # JSON can express half of a surrogate pair ("\ud83d"). It is not a character, and UTF-8 cannot encode it.
        if not text.isascii() and _is_not_unicode(text):
            raise ValueError(
                f"{where}: a text contains half of a surrogate pair, which is not Unicode: {text!r:.200}"
            )
    check_placeholders(turns, where)


def _is_not_unicode(text: str) -> bool:
    """Return whether a text contains half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _parse_instruction(row: dict[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
    """Return turns and responses of a row in the instruction format."""
    instruction = row.get("instruction")
    if not isinstance(instruction, str):
        raise ValueError(
            f"{where}: a record needs the key 'instruction' (a string) or 'conversations'; "
            f"got the keys {shorten(sorted(row))}"
        )
    # Without responses the record can still be captioned.
    responses: Any = []
    if "responses" in row:
        responses = row["responses"]
        # Some data sets repeat one of the responses as `response`.
        single = row.get("response")
        if single and isinstance(responses, list) and single not in responses:
            raise ValueError(
                f"{where}: 'response' does not occur in 'responses'; remove one of the two keys"
            )
    elif "response" in row:
        responses = [row["response"]]
    elif "pred_output" in row:
        responses = answers_of_prediction(row)
    if not _is_list_of_strings(responses):
        raise ValueError(
            f"{where}: 'response' must be a string and 'responses' a list of strings, "
            f"got {shorten(responses)}"
        )
    return [Message("user", instruction)], tuple(responses)


def answers_of_prediction(row: dict[str, Any]) -> list[Any]:
    """Return the answers of a row that `llava predict` or `llava caption` wrote.

    A row with references (`gt_caption`) comes from an evaluation, and its answers are the references. A row without
    them comes from a job that captions images for training, and its answer is the generated caption.
    """
    given = row.get("gt_caption") or row["pred_output"] or []
    return given if isinstance(given, list) else [given]


def _parse_conversation(value: Any, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """Return turns and responses of LLaVA's `conversations`; the last answer becomes the response."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: 'conversations' must be a non-empty list of {{from, value}}, got {shorten(value)}"
        )
    turns = [_parse_turn(turn, number, where) for number, turn in enumerate(value)]
    # Check the order of the roles: an optional system turn, then user and assistant alternating.
    roles = [turn.role for turn in turns]
    if roles[0] == "system":
        roles = roles[1:]
    expected = ["user", "assistant"] * len(roles)
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(
            f"{where}: after an optional system turn, the turns must alternate: user (or human), assistant (or "
            f"gpt), user, ...; got {', '.join(turn.role for turn in turns)}"
        )
    last = turns[-1]
    if last.role == "assistant":
        return turns[:-1], (last.content,)
    # The conversation ends with a question, so the record can be captioned but not trained on.
    return turns, ()


def _parse_turn(turn: Any, number: int, where: str) -> Message:
    """Return one turn of LLaVA's `conversations` as a message."""
    is_turn = isinstance(turn, dict) and isinstance(turn.get("value"), str)
    role = turn.get("from") if is_turn else None
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"{where}: turn {number} of the conversation needs the keys 'from' (one of {', '.join(_ROLES)}) and "
            "'value' (a string), or 'role' and 'content'"
        )
    check_turn_keys(turn, where)
    return Message(_ROLES[role], turn["value"])


def insert_image_placeholders(
    turns: Sequence[Message],
    count: int,
    where: str,
) -> tuple[Message, ...]:
    """Insert `<image>` before the first user text if there are images and no user text contains a placeholder.

    Args:
        turns: The conversation.
        count: Number of images.
        where: File name and row number, for error messages.

    Raises:
        ValueError: The user texts contain placeholders, but not `count`; or there are images, but no user turn.
    """
    placeholders = count_images(turns)
    if placeholders == count:
        return tuple(turns)
    roles = [turn.role for turn in turns]
    if placeholders > 0 or "user" not in roles:
        raise ValueError(
            f"{where}: {count} image(s), but the text contains {IMAGE_PLACEHOLDER} "
            f"{placeholders} time(s); the user turns must contain it once for each image"
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

    def longer_than(self, num_bytes: int) -> list[int]:
        """Return the indices of the rows with more than `num_bytes` bytes of JSON, without reading any text."""
        return self.rows.longer_than(num_bytes)


def response_problem(record: Record) -> str:
    """Return why a record cannot be used for training because of its responses; empty if it can."""
    if record.responses and all(text.strip() for text in record.responses):
        return ""
    return (
        f"{record.id}: no response to train on, or an empty one. "
        "`llava clean` sets such records aside."
    )


def pair_problem(record: Record) -> str:
    """Return why a record cannot be trained on as a preference pair; empty if it can."""
    if record.rejected is None:
        return f"{record.id}: no preference pair; --objective dpo needs the keys 'chosen' and 'rejected'"
    chosen, rejected = record.responses[0].strip(), record.rejected.strip()
    if not chosen or not rejected:
        return f"{record.id}: an answer of the pair is empty"
    if chosen == rejected:
        return f"{record.id}: both answers of the pair are equal, so neither is better"
    return ""


class BadRecords:
    """Collects the records that cannot be used, and raises an error if there are too many.

    Args:
        max_share: Maximum share of bad records, `--max_bad_records`.
        total: Number of records that are checked.

    Attributes:
        reasons: One sentence for each bad record, with its row.
    """

    MAX_SHOWN = 3  # maximum number of reasons in a message

    def __init__(self, max_share: float, total: int) -> None:
        self.max_share = max_share
        self.total = total
        self.reasons: list[str] = []

    def check(self, log: bool = True) -> None:
        """Raise an error if there are too many bad records.

        Args:
            log: Log the bad records if they are tolerated.

        Raises:
            ValueError: The share of bad records exceeds `max_share`, or all records are bad.
        """
        count = len(self.reasons)
        if not count:
            return
        first = self.reasons[0]
        # If no bad record is allowed, or all records are bad, the first reason says enough.
        if not self.max_share or count == self.total:
            raise ValueError(first)
        shown = "; ".join(reason.rstrip(".") for reason in self.reasons[: self.MAX_SHOWN])
        if count > self.max_share * max(self.total, MIN_RECORDS_FOR_SHARE):
            raise ValueError(
                f"--max_bad_records {self.max_share:g}: {count:,} of {self.total:,} records cannot be used. "
                f"The first: {shown}. Remove them with `llava clean`, or raise --max_bad_records."
            )
        if not log:
            return
        logger.warning(
            "%s of %s records cannot be used and are left out: %s",
            f"{count:,}",
            f"{self.total:,}",
            shown,
        )


def open_records(
    path: str | Path, require_responses: bool = False, max_bad_records: float = 0.0
) -> Records:
    """Open all records of a file, or of a folder that `llava download` wrote.

    Up to 20,000 rows, evenly spread over the file, are parsed immediately, so that a wrong file is rejected here and not
    in the middle of a run.

    Args:
        path: A .json array, a .jsonl or .parquet file, or a folder.
        require_responses: Count rows without a response, or with an empty one, as bad.
        max_bad_records: Maximum share of the checked rows that are not records or are bad; the caller must skip such rows.

    Raises:
        ValueError: The file cannot be read, or more of the checked rows than `max_bad_records` are bad. The message names
            the file and the row.
    """
    records = Records(open_rows(path))
    num_checked = min(len(records), MAX_CHECKED_ROWS)
    bad = BadRecords(max_bad_records, num_checked)
    evenly_spread = np.linspace(0, len(records) - 1, num_checked).astype(int)
    for index in evenly_spread.tolist():
        problem = ""
        try:
            record = records[index]
            if require_responses:
                problem = response_problem(record)
        except ValueError as error:
            problem = str(error)
        if problem:
            bad.reasons.append(problem)
            if not max_bad_records:
                break
    # Do not log the bad records here: the caller finds and logs all bad records, not only those among the checked rows.
    bad.check(log=False)
    return records
