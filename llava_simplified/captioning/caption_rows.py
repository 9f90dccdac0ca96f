"""The rows of an output file, from records and their captions or errors, for local models and for servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_simplified.data.images import ImageError
from llava_simplified.data.records import Record

Row = dict[str, Any]


def parse_record(records: Sequence[Record], index: int) -> Record | ValueError:
    """Return a record, or the error that says why the row is not one. One bad row must not end the job."""
    try:
        record = records[index]
        for name in record.images:
            name.encode()
    except UnicodeEncodeError:
        return ImageError(
            "unsafe", f"the image name {record.images!r} is not UTF-8; rename the file"
        )
    except ValueError as error:
        return error
    return record


def failed_row(index: int, record: Record | ValueError, error: object) -> Row:
    """Return the row of a record that has no caption, with the reason.

    Args:
        index: Index of the record.
        record: The record, or the error that says why the row of the file is not a record.
        error: Why it has no caption; ignored for a row that is not a record.
    """
    if isinstance(record, ValueError):
        return {"index": index, "image": None, "error": str(record)}
    image = record.images[0] if record.images else None
    return {"index": index, "image": image, "error": f"{record.id}: {error}"}
