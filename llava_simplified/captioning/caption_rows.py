"""Convert records to rows of an output file, for captions of local models and of servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_simplified.data.images import ImageError
from llava_simplified.data.records import Record

Row = dict[str, Any]  # a JSON object: one line of an output file or of a list of failures


def parse_record(records: Sequence[Record], index: int) -> Record | ValueError:
    """Return a record, or an error if the row is not a record, or an image name is not UTF-8.

    The error is returned and not raised, because one bad row must not end the job.
    """
    try:
        record = records[index]
        # A file name that is not UTF-8 contains lone surrogates, which cannot be encoded.
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

    The row of an error has no image name; for images, `runner` adds it.

    Args:
        index: Index of the record.
        record: The record, or the error of a row that is not a record (see `parse_record`).
        error: Why the record has no caption. Ignored if `record` is an error.
    """
    if isinstance(record, ValueError):
        return {"index": index, "image": None, "error": str(record)}
    image = record.images[0] if record.images else None
    return {"index": index, "image": image, "error": f"{record.id}: {error}"}
