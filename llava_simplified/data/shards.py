"""Shards: thousands of images in one tar archive, read at random without unpacking.

Millions of small files are slow to create, copy and list on every file system. `llava download` therefore writes shards,
in the layout of webdataset and img2dataset:

    00012.tar                     00012.parquet, the manifest: one row per URL
      000120000.jpg  image          key        url  status  error     offset  length
      000120000.txt  captions       000120000  ...  ok      null         512   34012
      000120000.json metadata       000120001  ...  failed  http_404    null    null
      000120002.jpg                 000120002  ...  ok      null       37376   80511
      ...                           ...

A *sample* consists of consecutive members with the same key: their name up to the first dot. A tar archive is a
sequence of 512-byte headers, each followed by the file's bytes, padded to a multiple of 512. Files are stored
uncompressed, so the (offset, length) of a file is sufficient to read it:

    | header | image ...... pad | header | text pad | header | json pad | header | ...  | two blocks of zeros |
             ^ offset

The manifest contains the offsets. For tars from other tools, which have no manifest with offsets, the headers are read
once, and the index is kept in memory. A record refers to an image in a shard as `00012.tar#000120000`. For images in
Parquet files (as on the Hugging Face hub), see `embedded_images`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_simplified.data.embedded_images import read_embedded_image
from llava_simplified.extras import require_extra
from llava_simplified.jobs import open_descriptor, read_at, write_all

# Lower case, the most common first. Images of formats that cannot be decoded here are reported when they are read.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("jpe", "jfif", "heic", "heif"),
)
_MANIFEST_COLUMNS = ["key", "offset", "length"]  # the columns that the index needs
_BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
_MAX_HEADER_BYTES = 1_000_000
END_OF_ARCHIVE = b"\0" * (2 * _BLOCK)


# ---- writing ----


class ShardWriter:
    """Append samples to a tar archive.

    When `add` returns, the sample has been handed to the operating system and survives the death of this process. When
    `close` returns, it survives a power failure.

    Attributes:
        end: Number of bytes of all complete samples.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        """Create the archive, or open it to append to it.

        Args:
            path: The archive.
            end: Number of bytes of the complete samples in it. The file is truncated there, which removes the
                incomplete sample of a killed writer.
        """
        self._descriptor = open_descriptor(path)
        os.ftruncate(self._descriptor, end)
        self.end = os.lseek(self._descriptor, 0, os.SEEK_END)

    def add(
        self,
        key: str,
        image: bytes,
        suffix: str,
        captions: tuple[str, ...],
        metadata: dict[str, Any],
    ) -> int:
        """Append one sample.

        Args:
            key: Name of the sample, without a dot.
            image: The image file.
            suffix: The image's suffix: "jpg".
            captions: One per line of the .txt member.
            metadata: JSON values for the .json member.

        Returns:
            The offset of the image's first byte in the archive.

        Raises:
            ValueError: The key does not fit into a tar header.
        """
        text = "\n".join(captions).encode()
        metadata_json = json.dumps(metadata, ensure_ascii=False).encode()
        # Write the sample with one call, so that a killed process leaves at most one incomplete sample.
        sample = (
            _tar_member(f"{key}.{suffix}", image)
            + _tar_member(f"{key}.txt", text)
            + _tar_member(f"{key}.json", metadata_json)
        )
        write_all(self._descriptor, sample)
        image_offset = self.end + _BLOCK
        self.end += len(sample)
        return image_offset

    def close(self) -> None:
        """Write the end of the archive, and wait until the disk has stored everything."""
        write_all(self._descriptor, END_OF_ARCHIVE)
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def _tar_member(name: str, data: bytes) -> bytes:
    """Return one file of a tar archive in POSIX's ustar format: header, data, padding.

    The standard library's `tarfile` is not used, because it takes 30 us more per member, at three members per sample.
    """
    if len(name) > 100 or not name.isascii():
        raise ValueError(f"{name!r} does not fit into a tar header: at most 100 ASCII characters")
    checksum_placeholder = b" " * 8  # the checksum is computed as if its field contained spaces
    before_checksum = (
        name.encode().ljust(100, b"\0")
        + b"0000644\0"  # mode
        + b"0000000\0"  # user
        + b"0000000\0"  # group
        + b"%011o\0" % len(data)
        + b"00000000000\0"  # time of modification: constant, so that equal inputs give equal archives
    )
    after_checksum = (
        b"0"  # a regular file
        + b"\0" * 100  # target of a link
        + b"ustar\x0000"
    )
    checksum = b"%06o\0 " % sum(before_checksum + checksum_placeholder + after_checksum)
    header = (before_checksum + checksum + after_checksum).ljust(_BLOCK, b"\0")
    padding = b"\0" * (-len(data) % _BLOCK)
    return header + data + padding


# ---- reading archives from beginning to end ----


class TarMember(NamedTuple):
    """A regular file in a tar archive."""

    name: str
    offset: int  # position of its first byte in the archive
    size: int


def tar_members(path: Path) -> Iterator[TarMember]:
    """Iterate over the regular files of a tar archive, by reading its headers.

    Raises:
        ValueError: The file is not a tar archive or is truncated; or a member is a link, a device or sparse, or has an
            unsafe path. The message names the bad member, or the last good one.
    """
    archive_size = path.stat().st_size
    last_good = "the beginning"
    end = 0  # end of the last member, with its padding
    for member in _tar_headers(path):
        if member.isdir():
            end = member.offset_data
            continue
        _check_member(path, member, archive_size)
        last_good = f"member {member.name!r}"
        blocks = -(-member.size // _BLOCK)  # rounded up
        end = member.offset_data + blocks * _BLOCK
        yield TarMember(member.name, member.offset_data, member.size)
    # Check the end, because tarfile also stops at an incomplete header. The real end is a block of zeros.
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if block != b"\0" * _BLOCK:
        raise ValueError(
            f"{path}: truncated after {last_good}: the block of {_BLOCK} zeros at the end of the archive is missing "
            f"({len(block)} other bytes follow). Copy or download the file again."
        )


class _HeaderFile(io.FileIO):
    """A tar archive from which only headers are read.

    An extended header may claim to have any size, and tarfile would read it into memory, so large reads are refused.
    """

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes."""
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"expected an extended header of at most {_MAX_HEADER_BYTES} bytes, got {size}"
            )
        return super().read(size) or b""


def _tar_headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Iterate over the headers of a tar archive.

    Raises:
        ValueError: The file is not a complete tar archive.
    """
    last_good = "the beginning"
    try:
        with _HeaderFile(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                yield member
                last_good = f"member {member.name!r}"
                # Discard the headers, which tarfile keeps: gigabytes for a large archive.
                archive.members.clear()  # type: ignore[attr-defined]
    # Also catch ValueError and OverflowError, because tarfile does not check the numbers in extended headers, and
    # RecursionError for a thousand of these in a row.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a complete tar archive; reading it failed after {last_good}: {error}"
        ) from None


def _check_member(path: Path, member: tarfile.TarInfo, archive_size: int) -> None:
    """Check that a member is a plain file with a safe path, and completely inside the archive.

    Raises:
        ValueError: The member is a link, a device or sparse, has an unsafe path, or is truncated.
    """
    if not member.isreg() or member.issparse():
        raise ValueError(
            f"{path}: member {member.name!r} is a link, a device or a sparse file; only plain files are supported"
        )
    if member.name.startswith("/") or ".." in Path(member.name).parts:
        raise ValueError(
            f"{path}: member {member.name!r} has an unsafe path; it must be relative, without '..'"
        )
    if member.offset_data + member.size > archive_size:
        raise ValueError(
            f"{path}: truncated in member {member.name!r}: the file ends at byte {archive_size}. Copy or download the "
            "file again."
        )


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Iterate over the samples of a tar archive: consecutive members with the same name up to the first dot.

    Yields:
        (key, {suffix: (offset, size)}). The key includes the folder; suffixes are lower case, without the first dot.

    Raises:
        ValueError: The archive cannot be read, see `tar_members`.
    """
    key = ""
    members: dict[str, tuple[int, int]] = {}
    for member in tar_members(path):
        folder, _, file_name = member.name.rpartition("/")
        stem, _, suffix = file_name.partition(".")
        member_key = f"{folder}/{stem}" if folder else stem
        if member_key != key and members:
            yield key, members
            members = {}
        key = member_key
        members[suffix.lower()] = (member.offset, member.size)
    if members:
        yield key, members


# ---- random access ----


class ShardIndex(NamedTuple):
    """Offset and size of the image of each key in a tar archive.

    Stored as arrays and not as a dict, because a data loader keeps the index of every shard in memory. Arrays need about
    25 bytes per sample.
    """

    keys: np.ndarray  # bytes (samples,), sorted
    offsets: np.ndarray  # int64 (samples,)
    sizes: np.ndarray  # int32 (samples,)
    num_without_image: int = 0  # samples of the tar that have no member with the suffix of an image

    def names(self) -> Iterator[str]:
        """Yield all keys. Bytes that are not UTF-8 become lone surrogates, as Python does in file names."""
        for key in self.keys:
            yield key.decode("utf-8", "surrogatepass")

    def find(self, key: str) -> tuple[int, int] | None:
        """Return (offset, size) of the image of a key; None if the shard has no such key."""
        encoded = _encode_key(key)
        position = int(np.searchsorted(self.keys, encoded))
        if position == len(self.keys) or self.keys[position] != encoded:
            return None
        return int(self.offsets[position]), int(self.sizes[position])


def shard_index(path: Path) -> ShardIndex:
    """Return the index of a tar archive, from its manifest if it has offsets, else from the tar's headers.

    The index is kept in memory until the archive or its manifest changes.

    Raises:
        ValueError: The archive cannot be read.
        MissingExtraError: There is a manifest, and pyarrow is not installed.
    """
    return _cached_index(path, _version(path), _version(_manifest_path(path)))


def _version(path: Path) -> tuple[int, int] | None:
    """Return the time of modification and the size of a file; None if it does not exist."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".parquet")


@lru_cache(maxsize=100_000)
def _cached_index(
    path: Path, _version: tuple[int, int] | None, _manifest_version: tuple[int, int] | None
) -> ShardIndex:
    """Build the index. The versions of both files are arguments so that a changed file misses the cache."""
    images = _read_manifest(_manifest_path(path))
    num_without_image = 0
    if images is None:
        images, num_without_image = _read_tar_index(path)
    names, offsets, sizes = images
    keys = np.array([_encode_key(name) for name in names], dtype="S")
    order = np.argsort(keys, kind="stable")
    return ShardIndex(
        keys=keys[order],
        offsets=np.array(offsets, np.int64)[order],
        sizes=np.array(sizes, np.int32)[order],
        num_without_image=num_without_image,
    )


def _read_manifest(path: Path) -> tuple[list[str], list[int], list[int]] | None:
    """Return keys, offsets and sizes of the images from a manifest; None if it does not exist or has no offsets.

    img2dataset also writes a Parquet file for each shard, but without offsets.
    """
    if not path.is_file():
        return None
    require_extra("download", "pyarrow", purpose="Reading Parquet files")
    import pyarrow.parquet as pq

    if not set(_MANIFEST_COLUMNS) <= set(pq.read_schema(path).names):
        return None
    # Rows without an offset are URLs that were not downloaded.
    table = pq.read_table(path, columns=_MANIFEST_COLUMNS, use_threads=False).drop_null()
    return table["key"].to_pylist(), table["offset"].to_pylist(), table["length"].to_pylist()


def _read_tar_index(path: Path) -> tuple[tuple[list[str], list[int], list[int]], int]:
    """Return keys, offsets and sizes of the images of a tar archive, and the number of samples without an image."""
    num_without_image = 0
    keys: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    for key, members in tar_samples(path):
        suffix = next((s for s in IMAGE_SUFFIXES if s in members), None)
        if suffix is None:
            num_without_image += 1
            continue
        offset, size = members[suffix]
        keys.append(key)
        offsets.append(offset)
        sizes.append(size)
    return (keys, offsets, sizes), num_without_image


def _encode_key(key: str) -> bytes:
    """Return a key as bytes, which need a quarter of the memory of strings in a numpy array.

    Names in a tar can have any encoding. tarfile represents bytes that are not UTF-8 as lone surrogates.
    """
    return key.encode("utf-8", "surrogatepass")


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset`.

    Raises:
        ValueError: The file ends before `offset + size`.
    """
    with path.open("rb", buffering=0) as file:
        data = read_at(file, size, offset)
    if len(data) != size:
        raise ValueError(
            f"{path}: truncated: expected {size} bytes at position {offset}, found {len(data)}. Copy or download the "
            "file again."
        )
    return data


def read_shard_image(path: Path, key: str) -> bytes:
    """Read one image from a shard.

    Args:
        path: A tar archive, or a Parquet or Arrow file with an image column.
        key: Key of the sample in a tar, or the row in the other files; see `embedded_images`.

    Raises:
        ValueError: The file, key or row does not exist, or the shard is truncated.
        MissingExtraError: pyarrow is required but not installed.
    """
    if not path.is_file():
        raise ValueError(f"no shard at {path}; check the image folder")
    if path.suffix in (".parquet", ".arrow"):
        return read_embedded_image(path, key)
    location = shard_index(path).find(key)
    if location is None:
        raise ValueError(f"{path}: no image with key {key!r} in this shard")
    offset, size = location
    return read_range(path, offset, size)
