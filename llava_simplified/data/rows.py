"""Files of JSON rows, millions of them, read at random with a few bytes of memory a row."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from llava_simplified.data.shards import image_column

BOM = b"\xef\xbb\xbf"
_AFTER = tuple(",:]} \t\r\n")  # what may follow a JSON value
_LARGEST = 1 << 26  # bytes of one JSON value; what is longer is taken for broken JSON


def open_rows(path: str | Path) -> RowFile:
    """The rows of a `.json` array, a `.jsonl` or `.parquet` file, or of a folder of `llava download`.

    Raises:
        ValueError: where there is no such file, or it isn't JSON.
    """
    path = find_records(Path(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such file of records (a .json array, .jsonl or .parquet)")
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise ValueError(
            f"{path}: a file of records ends .json, .jsonl or .parquet; see `llava convert`"
        )
    return RowFile(_parquet_as_jsonl(path) if path.suffix == ".parquet" else path, path.name)


def find_records(path: Path) -> Path:
    """Of a folder of `llava download` its records, of shards or of plain files; a file is itself."""
    names = ("records.json", "records.jsonl") if path.is_dir() else ()
    return next(
        (path / name for name in names if (path / name).is_file()),
        path / names[-1] if names else path,
    )


class RowFile(Sequence[dict[str, Any]]):
    """The rows of a JSON array or JSONL file, read and parsed one at a time.

    3.3 million rows cost 40 MB (where each row begins, and its length), which forked workers share; the text stays in
    the page cache. Not mapped: a map counts as the process's own memory, all of it once rows are read at random.
    Pickled without the open file: a spawned worker opens it again.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._starts, self._lengths = (_line_spans if path.suffix == ".jsonl" else _array_spans)(
            path
        )
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def raw(self, index: int) -> bytes:
        """The JSON text of row `index`, as it stands in the file."""
        start, length = int(self._starts[index]), int(self._lengths[index])
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        return os.pread(
            self._file.fileno(), length, start
        )  # leaves no position behind: forked workers share the file

    def longest(self, count: int) -> list[int]:
        """The `count` rows of most bytes."""
        return np.argsort(-self._lengths, kind="stable")[:count].tolist()

    def where(self, index: int) -> str:
        """What messages to people call row `index`."""
        return f"{self.name} row {index % len(self)}"

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        try:
            return json.loads(self.raw(index))
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: not JSON: {error}") from None


def _line_spans(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where each line that isn't blank begins, and its length."""
    starts, lengths, position = [], [], 0
    with path.open("rb") as file:
        before = len(BOM) - 1 if file.read(3) == BOM else -1  # the place of the last line break
        file.seek(0)
        for block in chain(
            iter(partial(file.read, 1 << 22), b""), [b"\n"]
        ):  # the last line may lack its break
            breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position
            edges = np.concatenate([[before], breaks])
            keep = (
                np.diff(edges) > 2
            )  # the shortest row is {}; a blank line holds a carriage return at most
            starts.append(edges[:-1][keep] + 1)
            lengths.append((np.diff(edges)[keep] - 1).astype(np.int32))
            before, position = edges[-1], position + len(block)
    return np.concatenate(starts), np.concatenate(lengths)


def _array_spans(path: Path) -> tuple[np.ndarray, np.ndarray]:
    starts, lengths = array("q"), array("i")
    with path.open("rb") as file:
        for key, _, start, end in scan_json(file, path.name):
            if key:
                raise ValueError(
                    f"{path}: an object with {key!r}, not an array of records; see `llava convert`"
                )
            starts.append(start)
            lengths.append(end - start)
    return np.array(starts, np.int64), np.array(lengths, np.int32)


def scan_json(
    file: IO[bytes], name: str, block: int = 1 << 20
) -> Iterator[tuple[str, Any, int, int]]:
    """Walk a JSON file of any size with one block of it in memory.

    Yields (key, value, first byte, end byte) for each element of a top-level array (key "") or, where the top
    level is an object, for each element of every array in it and each other value of it.

    Raises:
        ValueError: names the file and the byte where it stops being JSON.
    """
    text = _Window(file, name, block)
    opening, key = text.peek(), ""
    if opening not in ("[", "{"):
        raise ValueError(
            f"{name}: neither a JSON array nor an object: it begins {text.text[:40]!r}"
        )
    text.at += 1
    while (letter := text.peek()) not in ("]", "}"):
        if opening == "{":
            key = text.value()[0]
            text.expect(":")
            letter = text.peek()
        if opening == "[" or letter != "[":
            yield key, *text.value()
            continue
        text.expect("[")
        while text.peek() != "]":
            yield key, *text.value()
        text.expect("]")
    text.expect("]" if opening == "[" else "}")
    if text.peek():
        raise ValueError(f"{name}: more text after the JSON's end, at byte {text.base + text.at}")


class _Window:
    """A moving window over JSON bytes.

    Bytes are read as Latin-1, so that a place in the text is a place in the file, and one bad byte is one bad
    letter; values with letters beyond ASCII are parsed again from UTF-8.
    """

    def __init__(self, file: IO[bytes], name: str, block: int) -> None:
        self.file, self.name, self.block = file, name, block
        self.text, self.base, self.at = (
            "",
            0,
            0,
        )  # what is seen, the byte it begins at, the place reached in it
        self._decode, self._skip = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
        if self._more() and self.text.startswith(BOM.decode("latin-1")):
            self.at = len(BOM)

    def _more(self) -> bool:
        grown = self.file.read(max(self.block, len(self.text) - self.at))
        if grown:
            self.text, self.base, self.at = (
                self.text[self.at :] + grown.decode("latin-1"),
                self.base + self.at,
                0,
            )
        return bool(grown)

    def peek(self) -> str:
        """The next letter that isn't space or comma; "" at the end of the file."""
        while True:
            self.at = self._skip.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def expect(self, letter: str) -> None:
        if self.peek() != letter:
            raise ValueError(
                f"{self.name}: not JSON at byte {self.base + self.at}: {letter!r} expected"
            )
        self.at += 1

    def value(self) -> tuple[Any, int, int]:
        """The JSON value that begins here, its first byte and its end byte."""
        while True:
            try:
                item, end = self._decode(self.text, self.at)
                if (
                    self.text[end : end + 1] in _AFTER or not self._more()
                ):  # 1.5 may look like 1 at a block's end
                    break
            except (
                ValueError,
                RecursionError,
            ) as error:  # the first also of numbers of 5,000 digits
                place = self.base + getattr(error, "pos", self.at)
                if len(self.text) - self.at > _LARGEST or not self._more():
                    message = getattr(error, "msg", error)
                    raise ValueError(f"{self.name}: not JSON at byte {place}: {message}") from None
        piece, start = self.text[self.at : end], self.base + self.at
        if not piece.isascii():
            item = json.loads(piece.encode("latin-1").decode("utf-8", "replace"))
        self.at = end
        return item, start, self.base + end


def _parquet_as_jsonl(path: Path) -> Path:
    """The rows as JSONL in the cache, without pictures: Parquet can't be read one row at a time."""
    import pyarrow.parquet as pq

    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "llava_simplified"
        / "records"
    )
    cache.mkdir(parents=True, exist_ok=True)
    stat, place = path.stat(), hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    cached = cache / f"{place}-{stat.st_size:x}-{stat.st_mtime_ns:x}.jsonl"
    if cached.exists():
        return cached
    for outdated in cache.glob(f"{place}-*.jsonl"):
        outdated.unlink()
    table = pq.ParquetFile(
        path, buffer_size=1 << 20
    )  # a window over each column, not the whole row group
    pictures = image_column(table.schema_arrow)
    columns = [field.name for field in table.schema_arrow if "binary" not in str(field.type)]
    partial, number = cached.with_suffix(f".{os.getpid()}.part"), 0
    with partial.open("w", encoding="utf-8") as file:
        for batch in table.iter_batches(1024, columns=columns, use_threads=False):
            for values in batch.to_pylist():
                row = {name: value for name, value in values.items() if value is not None}
                if pictures:
                    row["image"] = f"{path.name}#{number}"
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                number += 1
    partial.replace(cached)
    return cached
