"""Random access to the rows of JSON, JSONL and Parquet files with millions of rows.

A training set of 3.3 million rows takes gigabytes as Python objects, and every data loader worker would get a copy.
Instead, the file is scanned once, and only the *span* of each row is kept in memory: its first byte and its length.

    [{"image": "0.jpg", ...},  {"image": "1.jpg", ...},  ...]
     ^                      ^  ^
     start                     start
     |-------- length ------|

A row is read with `pread` and parsed on access. Spans need 12 bytes per row (40 MB for 3.3 million), in numpy arrays
that forked workers share; the text itself stays in the page cache of the operating system. The file is not
memory-mapped: the kernel would count every page that was read as memory of the process, and after random access to all
rows that is the entire file. Job schedulers kill processes that seem to use too much memory.

Parquet files cannot be read one row at a time: reading one row decodes its entire row group. They are converted to JSONL
in the user's cache folder once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from llava_simplified.data.embedded_images import ParquetRows, text_columns
from llava_simplified.extras import require_extra
from llava_simplified.foreign_files import blame_file
from llava_simplified.jobs import atomic_file, read_at

BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, which Windows programs write
RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")
_LINE_BLOCK_BYTES = 1 << 22
_MAX_INT32 = 2**31 - 1
# Part of the names of converted Parquet files. Change it when the conversion changes, so that old files are not read.
_PARQUET_FORMAT = "v2"
# A longer row is an error: a quote is missing, or the file was made to exhaust the memory.
MAX_ROW_BYTES = 1 << 24
# Characters that can follow a JSON value. This must be a tuple: `"" in "abc"` is true for strings, and "" (the end of
# the window) is not a delimiter.
_VALUE_DELIMITERS = tuple(",:]} \t\r\n")


# An element of a JSON file: (key of the top-level object or "", value, position of its first byte, position of its end).
JsonItem: TypeAlias = tuple[str, Any, int, int]


def open_rows(path: str | Path) -> RowFile:
    """Open the rows of a file, or of a folder that `llava download` wrote.

    Args:
        path: A .json file with an array of objects, a .jsonl or .parquet file, or a folder with `records.json` or
            `records.jsonl`.

    Raises:
        ValueError: The file does not exist, has an unsupported suffix, or is not JSON.
        MissingExtraError: `path` is a Parquet file, and pyarrow is not installed.
    """
    path = find_records(Path(path))
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. Records are read from a .json, .jsonl or .parquet file."
        )
    if path.suffix not in RECORD_SUFFIXES:
        raise ValueError(
            f"{path}: unsupported suffix; use .json, .jsonl or .parquet. "
            "Convert other formats with `llava convert`."
        )
    if path.suffix == ".parquet":
        return RowFile(_parquet_to_jsonl(path), name=path.name)
    return RowFile(path, name=path.name)


def find_records(path: Path) -> Path:
    """Return the file of records in a folder that `llava download` wrote; return the path of a file unchanged.

    `llava download` writes `records.json` with plain image files and `records.jsonl` with shards. If the folder has
    neither, the path of `records.jsonl` is returned, for the error message.
    """
    if not path.is_dir():
        return path
    plain = path / "records.json"
    if plain.is_file():
        return plain
    return path / "records.jsonl"


class RowFile(Sequence[dict[str, Any]]):
    """The rows of a JSON array or JSONL file, read and parsed on access.

    Cheap to keep, to fork and to pickle. The open file is not pickled: a spawned worker opens the file again.

    Args:
        path: The .json or .jsonl file.
        name: The file's name in messages; it differs from `path` for a converted Parquet file.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        if path.suffix == ".jsonl":
            self._starts, self._lengths = _line_spans(path)
        else:
            self._starts, self._lengths = _array_spans(path)
        # The number of each row in the file, if `without` has left out some rows.
        self._numbers: np.ndarray | None = None
        self._file: IO[bytes] | None = None

    def without(self, indices: Sequence[int]) -> RowFile:
        """Return the same file without some rows. The others keep their numbers in messages."""
        remaining = copy.copy(self)
        numbers = np.arange(len(self)) if self._numbers is None else self._numbers
        remaining._numbers = np.delete(numbers, indices)
        remaining._starts = np.delete(self._starts, indices)
        remaining._lengths = np.delete(self._lengths, indices)
        remaining._file = None
        return remaining

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def raw(self, index: int) -> bytes:
        """Return the JSON text of a row as it is in the file.

        Raises:
            ValueError: The row is longer than `MAX_ROW_BYTES`.
        """
        start = int(self._starts[index])
        length = int(self._lengths[index])
        if length > MAX_ROW_BYTES:
            raise ValueError(
                f"{self.where(index)}: the row has {length:,} bytes; the limit is {MAX_ROW_BYTES:,}"
            )
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        return read_at(self._file, length, start)

    def longest(self, count: int) -> list[int]:
        """Return the indices of the `count` rows with the most bytes, longest first."""
        return np.argsort(-self._lengths, kind="stable")[:count].tolist()

    def longer_than(self, num_bytes: int) -> list[int]:
        """Return the indices of the rows with more than `num_bytes` bytes."""
        return np.flatnonzero(self._lengths > num_bytes).tolist()

    def where(self, index: int) -> str:
        """Return the name of a row for messages: "train.json row 7"."""
        number = index % len(self)
        if self._numbers is not None:
            number = int(self._numbers[number])
        return f"{self.name} row {number}"

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        text = self.raw(index)
        try:
            return json.loads(text)
        # Deeply nested arrays exceed Python's recursion limit.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(index)}: not JSON: {error}") from None


# ---- spans ----


def _line_spans(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Find the lines of a JSONL file that are not blank.

    Returns:
        Starts (int64) and lengths (int32) in bytes, without the line breaks. A line of more than 2 GB, which is never
        read, has the largest length that fits.
    """
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    with path.open("rb") as file:
        has_bom = file.read(len(BOM)) == BOM
        file.seek(0)
        # Position of the line break before the current line. Treat the byte order mark as a line break.
        previous_break = len(BOM) - 1 if has_bom else -1
        position = 0
        at_end = False
        while not at_end:
            block = file.read(_LINE_BLOCK_BYTES)
            if not block:
                at_end = True
                block = b"\n"  # the last line of a file may lack its line break
            block_bytes = np.frombuffer(block, np.uint8)
            breaks = position + np.flatnonzero(block_bytes == ord("\n"))
            edges = np.concatenate([[previous_break], breaks])
            distances = np.diff(edges)
            # The shortest row is {}, two bytes and a line break. A blank line has at most a carriage return.
            has_row = distances > 2
            row_starts = edges[:-1][has_row] + 1
            row_lengths = distances[has_row] - 1  # without the line break
            starts.append(row_starts)
            lengths.append(np.minimum(row_lengths, _MAX_INT32).astype(np.int32))
            previous_break = edges[-1]
            position += len(block)
    return np.concatenate(starts), np.concatenate(lengths)


def _array_spans(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Find the elements of the top-level array of a JSON file.

    Returns:
        Starts (int64) and lengths (int32) in bytes.

    Raises:
        ValueError: The top level is an object, or the file is not JSON.
    """
    starts = array("q")
    lengths = array("i")
    with path.open("rb") as file:
        for key, _, start, end in scan_json(file, path.name):
            if key:
                raise ValueError(
                    f"{path}: expected an array of records, got an object with the key {key!r}. "
                    "Convert other formats with `llava convert`."
                )
            starts.append(start)
            lengths.append(end - start)
    return np.array(starts, np.int64), np.array(lengths, np.int32)


def scan_json(
    file: IO[bytes],
    name: str,
    block: int = 1 << 20,
) -> Iterator[JsonItem]:
    """Iterate over the elements of a JSON file of any size, with only a part of it in memory.

    This is not a validator: commas are skipped like whitespace.

    Args:
        file: An open binary file.
        name: The file's name in error messages.
        block: Number of bytes to read at a time.

    Yields:
        If the top level is an array: one item per element, with the key "". If it is an object: one item per element of
        each of its arrays, and one item for any other value, with the key of the array or value.

    Raises:
        ValueError: The file is not JSON. The message names the file and the byte.
    """
    scanner = _JsonScanner(file, name, block)
    opening = scanner.peek()
    if opening == "[":
        yield from _scan_array(scanner, key="")
    elif opening == "{":
        yield from _scan_object(scanner)
    else:
        raise ValueError(
            f"{name}: expected a JSON array or object; the file begins {scanner.text[:40]!r}"
        )
    if scanner.peek():
        raise ValueError(
            f"{name}: unexpected text after the end of the JSON, at byte {scanner.file_position}. If every line is a JSON "
            "object, name the file .jsonl."
        )


def _scan_array(scanner: _JsonScanner, key: str) -> Iterator[JsonItem]:
    """Yield the elements of a JSON array."""
    scanner.expect("[")
    # Stop at any closing bracket, so that `expect` reports a wrong one.
    while scanner.peek() not in ("]", "}"):
        yield key, *scanner.read_value()
    scanner.expect("]")


def _scan_object(scanner: _JsonScanner) -> Iterator[JsonItem]:
    """Yield the items of a JSON object. The elements of its arrays are separate items."""
    scanner.expect("{")
    while scanner.peek() not in ("]", "}"):
        position = scanner.file_position
        key, _, _ = scanner.read_value()
        if not isinstance(key, str):
            raise ValueError(
                f"{scanner.name}: not JSON: expected a key (a string) at byte {position}; got {key!r:.80}"
            )
        scanner.expect(":")
        if scanner.peek() == "[":
            yield from _scan_array(scanner, key)
        else:
            yield key, *scanner.read_value()
    scanner.expect("}")


class _JsonScanner:
    """A moving window over JSON bytes that parses one value at a time.

        file      ...... | already parsed | not parsed yet | ......
                         ^ base           ^ base + position
        text             |<--------- in memory ---------->|

    Bytes are decoded as Latin-1, where every byte is one character, so positions in the text are positions in the
    file. JSON's own characters are the same in Latin-1 and UTF-8. Values with non-ASCII characters are parsed a
    second time, from UTF-8.
    """

    def __init__(self, file: IO[bytes], name: str, block: int) -> None:
        self.file = file
        self.name = name
        self.block = block
        self.text = ""  # the window
        self.base = 0  # the position of the window in the file
        self.position = 0  # how far the window is parsed
        self._decode = json.JSONDecoder().raw_decode
        self._separators = re.compile(r"[\s,]*")
        if self._read_more() and self.text.startswith(BOM.decode("latin-1")):
            self.position = len(BOM)

    @property
    def file_position(self) -> int:
        """Number of bytes of the file that are parsed."""
        return self.base + self.position

    def _read_more(self) -> bool:
        """Drop the parsed text and extend the window. Return False at the end of the file."""
        # At least double the window: a value that spans many blocks is parsed again from its start each time.
        unparsed_length = len(self.text) - self.position
        data = self.file.read(max(self.block, unparsed_length))
        if not data:
            return False
        self.text = self.text[self.position :] + data.decode("latin-1")
        self.base += self.position
        self.position = 0
        return True

    def peek(self) -> str:
        """Skip separators and return the next character; "" at the end of the file."""
        while True:
            match = self._separators.match(self.text, self.position)
            assert match is not None  # the pattern matches the empty string
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._read_more():
                return ""

    def expect(self, character: str) -> None:
        """Consume one character.

        Raises:
            ValueError: The next character is not `character`.
        """
        if self.peek() != character:
            raise ValueError(
                f"{self.name}: not JSON at byte {self.file_position}: expected {character!r}"
            )
        self.position += 1

    def read_value(self) -> tuple[Any, int, int]:
        """Parse the value at the current position.

        Returns:
            The value, the position of its first byte, and the position after its last byte.

        Raises:
            ValueError: There is no valid JSON value at the current position.
        """
        while True:
            # The window grows to twice this limit at most, whatever follows.
            is_too_long = len(self.text) - self.position > MAX_ROW_BYTES
            try:
                value, end = self._decode(self.text, self.position)
            # RecursionError means that arrays are nested too deeply. A plain ValueError, without the position of a
            # JSONDecodeError, is raised for numbers of more than 4,300 digits.
            except (ValueError, RecursionError) as error:
                error_byte = self.base + getattr(error, "pos", self.position)
                # Try again with a larger window, since the value may only be truncated by the end of the window.
                if is_too_long or not self._read_more():
                    reason = getattr(error, "msg", error)
                    if is_too_long:
                        reason = f"{reason}; or the value has more than {MAX_ROW_BYTES:,} bytes, the limit"
                    raise ValueError(
                        f"{self.name}: not JSON at byte {error_byte}: {reason}"
                    ) from None
                continue
            # Make sure that a number is complete: 1.5 looks like 1 if the window ends after the 1.
            next_character = self.text[end : end + 1]
            if next_character in _VALUE_DELIMITERS or is_too_long or not self._read_more():
                break
        if end - self.position > MAX_ROW_BYTES:
            raise ValueError(
                f"{self.name}: the value at byte {self.file_position} has {end - self.position:,} bytes; the limit is "
                f"{MAX_ROW_BYTES:,}"
            )
        text = self.text[self.position : end]
        start_byte = self.file_position
        if not text.isascii():
            value = json.loads(text.encode("latin-1").decode("utf-8", "replace"))
        self.position = end
        return value, start_byte, self.file_position


# ---- Parquet ----


def _parquet_to_jsonl(path: Path) -> Path:
    """Convert the rows of a Parquet file to JSONL in the cache folder, without the bytes of images.

    If the file has an image column, the value of `image` or `images` refers to the row: "file.parquet#7".
    """
    cached = _cache_path(path)
    if cached.exists():
        return cached
    require_extra("download", "pyarrow", purpose="Reading Parquet files")
    cached.parent.mkdir(parents=True, exist_ok=True)
    path_hash = cached.name.partition("-")[0]
    # Delete the conversions of earlier versions of the Parquet file. Their names begin with the same hash.
    for outdated in cached.parent.glob(f"{path_hash}-*.jsonl"):
        # Windows refuses to delete a file that another run is reading. The next conversion tries again.
        with contextlib.suppress(PermissionError):
            # Another process that converts the same file may have deleted it already.
            outdated.unlink(missing_ok=True)
    with blame_file(path):
        table = ParquetRows(path, path.name)
    with atomic_file(cached) as part, part.open("w", encoding="utf-8") as file:
        for values in table.rows(text_columns(table.schema)):
            # Drop null values: in a JSON record, a missing value is a missing key.
            row = {name: value for name, value in values.items() if value is not None}
            # Write dates and decimals, which JSON does not support, as strings.
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return cached


def _cache_path(path: Path) -> Path:
    """Return the path of the converted file: its name identifies the path and the version of the Parquet file."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_home) / "llava_simplified" / "records"
    # The name is a part of the key, because the images in the rows are named by it. Links to one file, as in the cache of
    # the Hugging Face Hub, may have different names.
    identity = f"{path.resolve()}\0{path.name}"
    path_hash = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    stat = path.stat()
    # Use size and modification time to identify the version, since hashing a large file would be slow.
    version = f"{_PARQUET_FORMAT}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    return folder / f"{path_hash}-{version}.jsonl"
