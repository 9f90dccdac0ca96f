"""One captioned image (or conversation about images) as the rest of the code sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from llava_simplified.data.rows import RowFile, open_rows
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message, count_images

CHECK_ALL = 20_000  # rows that `open_records` parses before it answers
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Record:
    """What every caption source becomes.

    Attributes:
        images: paths relative to the image folder, or `shard.tar#key`; empty for a text-only row.
        turns: the conversation up to, and without, the last answer. The user texts hold exactly one
            `<image>` per image.
        responses: the alternatives of the last answer (several captions of one image); empty where the
            row has none, which is enough to caption it but not to train on it.
        id: where the row came from, for messages to people.
    """

    images: tuple[str, ...]
    turns: tuple[Message, ...]
    responses: tuple[str, ...]
    id: str

    @classmethod
    def from_json(cls, row: dict[str, Any], where: str) -> Record:
        """Read one row: `{image, instruction, response | responses}` or LLaVA's `{image, conversations}`.

        Raises:
            ValueError: names `where` and the key that is missing or of the wrong type.
        """
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a record is a JSON object, this is {type(row).__name__}")
        images = _images(row, where)
        if "conversations" in row:
            turns, responses = _conversation(row["conversations"], where)
        else:
            turns, responses = _instruction(row, where)
        return cls(images, insert_image_placeholders(turns, len(images), where), responses, where)


def _images(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("image", row.get("images"))
    if value is None or value == "":
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"{where}: 'image' must be a path or a list of paths, got {value!r}")
    return tuple(values)


def _instruction(row: dict[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
    if not isinstance(row.get("instruction"), str):
        raise ValueError(
            f"{where}: no 'instruction' text and no 'conversations'; keys are {sorted(row)}"
        )
    responses = (
        row["responses"] if "responses" in row else [row["response"]] if "response" in row else []
    )
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError(
            f"{where}: 'response' must be a text, 'responses' a list of texts, got {responses!r}"
        )
    return [Message("user", row["instruction"])], tuple(responses)


def _conversation(rows: Any, where: str) -> tuple[list[Message], tuple[str, ...]]:
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{where}: 'conversations' must be a list of {{from, value}}, got {rows!r}"
        )
    turns = []
    for number, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or row.get("from") not in _ROLES
            or not isinstance(row.get("value"), str)
        ):
            raise ValueError(
                f"{where}: turn {number} needs 'from' (one of {', '.join(_ROLES)}) and a text 'value'"
            )
        turns.append(Message(_ROLES[row["from"]], row["value"]))  # type: ignore[arg-type]
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if (
        spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2)
        or not spoken
    ):
        raise ValueError(
            f"{where}: turns must alternate human, gpt, human, ...; they are {', '.join(spoken)}"
        )
    if turns[-1].role == "assistant":
        return turns[:-1], (turns[-1].content,)
    return turns, ()


def insert_image_placeholders(
    turns: Sequence[Message], count: int, where: str
) -> tuple[Message, ...]:
    """Put `<image>` before the first user text where there are images and no text names one.

    Raises:
        ValueError: the texts name another number of images.
    """
    named, first = (
        count_images(turns),
        next((i for i, turn in enumerate(turns) if turn.role == "user"), None),
    )
    if first is not None and count and not named:
        lines = f"{IMAGE_PLACEHOLDER}\n" * count
        turns = [*turns[:first], Message("user", lines + turns[first].content), *turns[first + 1 :]]
    elif named != count:
        raise ValueError(
            f"{where}: {count} image(s), but the text says {IMAGE_PLACEHOLDER} {named} time(s)"
        )
    return tuple(turns)


def prediction_row(index: int, record: Record, text: str) -> dict[str, Any]:
    """What a model said of a record, as prediction files hold it: a row a trial."""
    truth: str | list[str] = (
        list(record.responses) if len(record.responses) > 1 else "".join(record.responses)
    )
    return {
        "index": index,
        "image": record.images[0] if record.images else None,
        "instruction": record.turns[-1].content.replace(f"{IMAGE_PLACEHOLDER}\n", ""),
        "gt_caption": truth,
        "pred_output": text,
    }


class Records(Sequence[Record]):
    """Records parsed one at a time out of a file of rows: cheap to hold, to pickle and to fork."""

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
        """The rows of most bytes: among them is, nearly always, the one of most tokens; no text is read."""
        return self.rows.longest(count)


def open_records(path: str | Path, require_responses: bool = False) -> Records:
    """All records of a `.json` array, a `.jsonl` or `.parquet` file, or of a folder of `llava download`.

    Up to `CHECK_ALL` rows are checked at once, of larger files that many, evenly spread, so that a wrong file
    is refused here and not in the middle of a run.

    Args:
        require_responses: a row without an answer, or with an empty one, is wrong too.

    Raises:
        ValueError: names the file, the row and what is wrong with it.
    """
    records = Records(open_rows(path))
    for index in np.linspace(0, len(records) - 1, min(len(records), CHECK_ALL)).astype(int):
        record = records[int(index)]
        if require_responses and not (record.responses and all(map(str.strip, record.responses))):
            raise ValueError(
                f"{record.id}: no answer to learn from, or an empty one; `llava clean` sets those aside"
            )
    return records
