"""Build records, and write them to `.json`, `.jsonl` or `.parquet`.

A record is `{"image": ..., "instruction": ..., "response": ...}`, or with `"responses": [...]` for several captions of
one image.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llava_simplified.extras import require_extra
from llava_simplified.jobs import SURROGATES_AS_ESCAPES, atomic_file, prepare_output_file

INSTRUCTION = "Generate a caption of this image:"
SUFFIXES = (".json", ".jsonl", ".parquet")
_PARQUET_BATCH = 8192  # number of records per write to a Parquet file


def image_file_name(index: int, url: str) -> str:
    """Return the file name of a downloaded image: row index and CRC-32 of the URL, such as `0_1595581236.jpg`."""
    return f"{index}_{zlib.crc32(url.encode())}.jpg"


def make_record(image: str, instruction: str, captions: Sequence[str]) -> dict[str, Any]:
    """Return a record with `response` for one caption, or `responses` for several."""
    record: dict[str, Any] = {"image": image, "instruction": instruction}
    if len(captions) == 1:
        record["response"] = captions[0]
    else:
        record["responses"] = list(captions)
    return record


def check_output(path: Path) -> None:
    """Check that records can be written to a file, and create its folder. Call this before a long job.

    Raises:
        ValueError: The suffix is not one of `SUFFIXES`, the path is a folder, or its folder cannot be created.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unsupported suffix; use .json, .jsonl or .parquet")
    prepare_output_file(path)


class RecordWriter:
    """Writes records to a file that appears only when it is complete. Use it as a context manager.

    Args:
        path: The output. Its suffix selects the format: `.json` is an array with one record per line, `.jsonl` has one
            record per line, `.parquet` has the columns image, instruction and responses.

    Raises:
        ValueError: The output is not valid; see `check_output`.
    """

    def __init__(self, path: Path) -> None:
        check_output(path)
        self.path = path
        self.count = 0
        self._stack = ExitStack()
        # Use one encoder for all records: `json.dumps` with options creates a new one for every call.
        # Dates and decimals of a Parquet source, which JSON does not support, are written as strings.
        self._encode = json.JSONEncoder(ensure_ascii=False, default=str).encode
        self._file: Any = None  # the output of .json and .jsonl
        self._parquet: Any = None  # the output of .parquet
        self._rows: list[dict[str, Any]] = []  # rows to be written with the next Parquet batch

    def __enter__(self) -> RecordWriter:
        # Enter this first, so that it is left last: the file must be closed before it is renamed.
        part = self._stack.enter_context(atomic_file(self.path))
        if self.path.suffix == ".parquet":
            require_extra("download", "pyarrow", purpose=f"writing {self.path.name}")
            import pyarrow.parquet as pq

            writer = pq.ParquetWriter(part, _parquet_schema(), compression="zstd")
            self._parquet = self._stack.enter_context(writer)
        else:
            self._file = self._stack.enter_context(
                part.open("w", encoding="utf-8", errors=SURROGATES_AS_ESCAPES)
            )
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # The stack closes the file and then renames it, or deletes it after an error.
        with self._stack:
            if kind is not None:
                self._stack.__exit__(kind, error, trace)
            elif self._parquet is not None:
                self._flush()
            elif self.path.suffix == ".json":
                self._file.write("\n]\n" if self.count else "[]\n")

    def write(self, record: dict[str, Any]) -> None:
        """Add one record.

        Raises:
            ValueError: The output is a Parquet file, which cannot hold the record; see `_parquet_row`.
        """
        if self._parquet is not None:
            self._rows.append(self._parquet_row(record))
            if len(self._rows) == _PARQUET_BATCH:
                self._flush()
        elif self.path.suffix == ".jsonl":
            self._file.write(f"{self._encode(record)}\n")
        else:
            # Write the array incrementally, with one record per line to make it readable.
            separator = "," if self.count else "["
            self._file.write(f"{separator}\n{self._encode(record)}")
        self.count += 1

    def _parquet_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a record in the Parquet file.

        Raises:
            ValueError: The row is not a record. Or it is a conversation or a preference pair, has multiple-choice questions,
                or does not have exactly one image.
        """
        # Imported here, because the parsers of commands import this module, and these modules import numpy.
        from llava_simplified.data.chat_rows import is_chat
        from llava_simplified.data.records import Record

        # Parse the row as training does, because the image and the responses can be under several keys.
        record = Record.from_json(row, f"{self.path}: record {self.count}")
        is_conversation = "conversations" in row or is_chat(row)
        has_one_image = len(record.images) == 1
        is_pair = record.rejected is not None
        if is_conversation or is_pair or record.questions or not has_one_image:
            raise ValueError(
                f"{self.path}: a Parquet file of records has the columns image, instruction and responses, but "
                f"record {self.count} has {', '.join(sorted(row))}. Write conversations, preference pairs, "
                "multiple-choice questions and records of several images to .json or .jsonl."
            )
        return {
            "image": record.images[0],
            "instruction": row["instruction"],
            # Always write a list, since a Parquet column has one type. It is empty for a record without a response.
            "responses": list(record.responses),
        }

    def _flush(self) -> None:
        """Write the buffered rows to the Parquet file."""
        import pyarrow as pa

        self._parquet.write_table(pa.Table.from_pylist(self._rows, _parquet_schema()))
        self._rows.clear()


def _parquet_schema() -> Any:
    """Return the columns of a Parquet file of records."""
    import pyarrow as pa

    return pa.schema(
        {
            "image": pa.string(),
            "instruction": pa.string(),
            "responses": pa.list_(pa.string()),
        }
    )
