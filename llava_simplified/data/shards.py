"""Shards: a tar of pictures, captions and metadata, and a Parquet manifest that says where each picture lies.

`00012.tar` holds `key.jpg`, `key.txt`, `key.json` for each sample, as webdataset and img2dataset read and
write it; `00012.parquet` has one row per URL that was asked for, whatever came of it, with the picture's
offset and length in the tar. Pictures are read at random by offset, without unpacking. Tars that others
wrote are read the same way, after one walk over their headers.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_simplified.jobs import write_all

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_PICTURE_COLUMNS = {
    *IMAGE_SUFFIXES,
    "image",
    "img",
    "picture",
    "photo",
    "data",
    "content",
    "bytes",
    "image_bytes",
}
_BLOCK = 512
END_OF_ARCHIVE = b"\0" * (2 * _BLOCK)  # of a tar


class ShardWriter:
    """Appends samples to a tar. What was added is in the file when `add` returns, even if the process dies.

    `end` is where the tar stops being known good; what a killed writer left behind it is cut off.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, end)
        self.end = os.lseek(self._file, 0, os.SEEK_END)

    def add(
        self,
        key: str,
        image: bytes,
        suffix: str,
        captions: tuple[str, ...],
        metadata: dict[str, Any],
    ) -> int:
        """Append one sample; returns the offset of the image's first byte."""
        members = (
            (f"{key}.{suffix}", image),
            (f"{key}.txt", "\n".join(captions).encode()),
            (f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode()),
        )
        sample = b"".join(_member(name, data) for name, data in members)
        write_all(self._file, sample)
        offset, self.end = self.end + _BLOCK, self.end + len(sample)
        return offset

    def close(self) -> None:
        """Write the end mark and wait until the disk has everything."""
        write_all(self._file, END_OF_ARCHIVE)
        os.fsync(self._file)
        os.close(self._file)


def _member(name: str, data: bytes) -> bytes:
    """One file of a POSIX tar: header, data, padding. tarfile's own takes 30 us more."""
    if len(name) > 100 or not name.isascii():
        raise ValueError(f"{name!r} does not fit a tar header: at most 100 ASCII letters")
    begin = (
        name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(data)
    )
    header = begin + b"0" * 11 + b"\0" + b" " * 8 + b"0" + b"\0" * 100 + b"ustar\x0000"
    checksum = b"%06o\0 " % sum(header)
    return (
        header.replace(b" " * 8, checksum, 1).ljust(_BLOCK, b"\0")
        + data
        + b"\0" * (-len(data) % _BLOCK)
    )


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    last = "its beginning"
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                yield member
                last = f"member {member.name!r}"
                archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every header it has seen
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
    ) as error:  # numbers in extended headers: tarfile trusts them
        raise ValueError(f"{path}: not a whole tar: {error}, after {last}") from None


def tar_members(path: Path) -> Iterator[Member]:
    """The regular files of a tar, by walking its headers.

    Raises:
        ValueError: where the tar is truncated, no tar, or holds links, devices or names that leave it; it
            names the last good member, or the bad one.
    """
    last, last_end, length = "its beginning", 0, path.stat().st_size
    for member in _headers(path):
        last_end = member.offset_data  # of a folder
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"{path}: member {member.name!r} is a link, a device or sparse, not a plain file"
            )
        if member.name.startswith("/") or ".." in Path(member.name).parts:
            raise ValueError(f"{path}: member {member.name!r} points out of the archive; refused")
        if member.offset_data + member.size > length:
            raise ValueError(
                f"{path}: truncated in member {member.name!r}: {length} bytes are not all of it"
            )
        last, last_end = (
            f"member {member.name!r}",
            member.offset_data + -(-member.size // _BLOCK) * _BLOCK,
        )
        yield Member(member.name, member.offset_data, member.size)
    with path.open("rb") as file:  # tarfile takes a torn header for the end
        file.seek(last_end)
        if (rest := file.read(_BLOCK)) != b"\0" * _BLOCK:
            raise ValueError(f"{path}: truncated after {last}: {len(rest)} bytes and no end mark")


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {suffix: (offset, size)}) of each sample: neighbours that share a name up to its first dot."""
    key, members = "", dict[str, tuple[int, int]]()
    for member in tar_members(path):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        stem = f"{folder}/{stem}" if folder else stem
        if stem != key and members:
            yield key, members
            members = {}
        key = stem
        members[suffix.lower()] = (member.offset, member.size)
    if members:
        yield key, members


class ShardIndex(NamedTuple):
    """Where each key's picture lies. Arrays: a trainer keeps the index of every shard, 25 bytes a sample."""

    keys: np.ndarray  # bytes, sorted
    offsets: np.ndarray
    sizes: np.ndarray

    def find(self, key: str) -> tuple[int, int] | None:
        """(offset, size) of the picture, None where the shard has no such key."""
        name = _key_bytes(key)
        place = int(np.searchsorted(self.keys, name))
        if place == len(self.keys) or self.keys[place] != name:
            return None
        return int(self.offsets[place]), int(self.sizes[place])


def _key_bytes(key: str) -> bytes:
    return key.encode(
        "utf-8", "surrogatepass"
    )  # a tar's names may be in any encoding: tarfile makes surrogates of it


def shard_index(path: Path) -> ShardIndex:
    """The index of a tar, from the manifest where it has offsets, else from its headers. Kept in memory."""
    stat = path.stat()
    return _shard_index(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=100_000)
def _shard_index(path: Path, _modified: int, _size: int) -> ShardIndex:
    import pyarrow.parquet as pq

    manifest = path.with_suffix(".parquet")
    if manifest.is_file() and {"key", "offset", "length"} <= set(pq.read_schema(manifest).names):
        table = pq.read_table(
            manifest, columns=["key", "offset", "length"], use_threads=False
        ).drop_null()
        names, offsets, sizes = (table[name].to_pylist() for name in ("key", "offset", "length"))
    else:
        pictures = [
            (key, *next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members))
            for key, members in tar_samples(path)
            if any(suffix in members for suffix in IMAGE_SUFFIXES)
        ]
        names, offsets, sizes = (
            (list(column) for column in zip(*pictures)) if pictures else ([], [], [])
        )
    keys = np.array([_key_bytes(name) for name in names], dtype="S")
    order = np.argsort(keys, kind="stable")
    return ShardIndex(
        keys[order], np.array(offsets, np.int64)[order], np.array(sizes, np.int32)[order]
    )


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`.

    Raises:
        ValueError: where the file ends before.
    """
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ValueError(
            f"{path}: truncated: {size} bytes expected at {offset}, {len(data)} are there"
        )
    return data


def read_shard_image(path: Path, key: str) -> bytes:
    """The bytes of one picture: `key` of a tar, or row number `key` of a Parquet file with pictures.

    Raises:
        ValueError: no such file, key or row, or the shard is truncated.
    """
    if not path.is_file():
        raise ValueError(f"no shard {path}; is the image folder right?")
    if path.suffix == ".parquet":
        return _parquet_image(path, int(key))
    if (place := shard_index(path).find(key)) is None:
        raise ValueError(f"{path}: no picture with key {key!r} in this shard")
    return read_range(path, *place)


def image_column(schema: Any) -> str:
    """The column of a Parquet file that holds pictures, "" where none does: other bytes may be a hash, an embedding."""
    fields = [field for field in schema if "binary" in str(field.type)]
    structs = [
        field.name
        for field in fields
        if str(field.type).startswith("struct<") and "bytes: " in str(field.type)
    ]
    return next(
        iter(structs + [field.name for field in fields if field.name.lower() in _PICTURE_COLUMNS]),
        "",
    )


@lru_cache(maxsize=2)
def _picture_column(path: Path, group: int) -> Any:
    """An Arrow column: to make Python bytes of a thousand pictures takes longer than to read them."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path, memory_map=True)
    if not (column := image_column(table.schema_arrow)):
        raise ValueError(f"{path}: no column of pictures")
    return table.read_row_group(group, columns=[column], use_threads=False)[0]


def _parquet_image(path: Path, row: int) -> bytes:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    ends = np.cumsum(
        [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    )
    if not 0 <= row < metadata.num_rows:
        raise ValueError(f"{path}: no row {row}, it has {metadata.num_rows}")
    group = int(np.searchsorted(ends, row, side="right"))
    value = _picture_column(path, group)[row - (int(ends[group - 1]) if group else 0)].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise ValueError(f"{path}: row {row} holds no picture")
    return data
