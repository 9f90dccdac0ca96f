"""Open the files of caption sources, and read lines of text in any encoding."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import itertools
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from llava_simplified.data.rows import BOM, MAX_ROW_BYTES
from llava_simplified.extras import require_extra
from llava_simplified.prepare.source_rows import ParseIssues

_DECOMPRESSORS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
}
# fsspec decompresses these, some of them only if their library is installed.
_OTHER_COMPRESSIONS = (".zst", ".lz4", ".snappy")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BLOCK_BYTES = 1 << 16


@contextlib.contextmanager
def open_source(source: str) -> Iterator[IO[bytes]]:
    """Open a file or any URL that fsspec supports. A compressed file is recognized by its suffix, and decompressed.

    Raises:
        ValueError: The file cannot be opened, or reading it fails (for example a truncated gzip file).
    """
    try:
        # Keep the `yield` inside the `try`: a truncated file is detected while the caller reads it.
        with _open_stream(source) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error


def _open_stream(source: str) -> Any:
    """Open a file or URL, decompressed, as a stream of bytes."""
    suffix = Path(source).suffix.lower()
    if suffix == ".zip":
        return _open_zip(source)
    # Require fsspec only for remote and unusual files; everything else works without the extra.
    if "://" in source or suffix in _OTHER_COMPRESSIONS:
        require_extra("download", "fsspec", purpose=f"the source {source}")
        import fsspec

        return fsspec.open(source, "rb", compression="infer")
    return _DECOMPRESSORS.get(suffix, open)(source, "rb")


@contextlib.contextmanager
def _open_zip(source: str) -> Iterator[IO[bytes]]:
    """Open the only file of a ZIP archive. Archives of several files are rejected, so that none is silently left out."""
    with _open_raw(source) as file, zipfile.ZipFile(file) as archive:
        # Skip the files of metadata that macOS adds, one for each file.
        names = [
            info.filename
            for info in archive.infolist()
            if not info.is_dir() and not info.filename.startswith("__MACOSX/")
        ]
        if len(names) != 1:
            raise ValueError(
                f"{source}: expected an archive of one file, found {len(names)} files. Unpack it, and "
                "pass the folder or the file of captions."
            )
        if archive.getinfo(names[0]).flag_bits & 1:
            raise ValueError(f"{source}: the archive is encrypted; unpack it first")
        with archive.open(names[0]) as stream:
            yield stream


def _open_raw(source: str) -> Any:
    if "://" not in source:
        return Path(source).open("rb")
    require_extra("download", "fsspec", purpose=f"the source {source}")
    import fsspec

    return fsspec.open(source, "rb")


def read_lines(source: str, issues: ParseIssues) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, except for blank lines. Any bytes are accepted.

    Only "\\n" ends a line, except in the files of old Macs. Text that is not UTF-8 is read as Windows-1252, the usual
    encoding of old lists; UTF-16 is recognized by its byte order mark. Repaired and skipped lines are recorded in `issues`.

    Yields:
        The line number, counted from 1, and the text without its line end.

    Raises:
        ValueError: The file cannot be read, or a line is longer than `MAX_ROW_BYTES`.
    """
    with open_source(source) as stream:
        for number, text in enumerate(_decode_lines(stream, source, issues), 1):
            # Strip only the line end: other whitespace may separate fields.
            text = text.rstrip("\n")
            if text.endswith("\r"):
                text = text[:-1]
                issues.note("CRLF line end (removed)", number, text)
            if "\0" in text:
                text = text.replace("\0", "")
                issues.note("NUL byte (removed)", number, text)
            if text.strip():
                yield number, text
            else:
                issues.note("blank line (skipped)", number, "")


def read_text(path: Path, issues: ParseIssues, number: int) -> str:
    """Return the text of a small file; see `decode_text`.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is longer than `MAX_ROW_BYTES`.
    """
    with path.open("rb") as stream:
        return decode_text(stream, path, issues, number)


def decode_text(stream: IO[bytes], path: Path, issues: ParseIssues, number: int) -> str:
    """Return a text in any encoding, with "\\n" as line ends. Repairs are recorded in `issues`.

    Args:
        stream: The bytes of the text.
        path: The file that they come from, for `issues` and error messages.
        issues: Collects the repairs.
        number: Row number, for `issues`.

    Raises:
        ValueError: A line is longer than `MAX_ROW_BYTES`.
    """
    found = ParseIssues()
    text = "".join(_decode_lines(stream, str(path), found))
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
        found.note("CRLF line end (removed)", number, path.name)
    if "\0" in text:
        text = text.replace("\0", "")
        found.note("NUL byte (removed)", number, path.name)
    # Note each kind of repair once, with the name of the file: in a folder, each file is one row.
    for kind in found.counts:
        issues.note(kind, number, path.name)
    return text


def _decode_lines(stream: IO[bytes], source: str, issues: ParseIssues) -> Iterator[str]:
    """Yield the lines of a text in any encoding, with their line ends.

    Raises:
        ValueError: A line is too long.
    """
    blocks: Iterator[bytes] = iter(partial(stream.read, _BLOCK_BYTES), b"")
    # A block may be shorter than requested, even shorter than a byte order mark.
    first = b""
    for block in blocks:
        first += block
        if len(first) >= len(BOM):
            break
    blocks = itertools.chain([first], blocks)
    if first.startswith(_UTF16_MARKS):
        issues.note("UTF-16 (decoded)", 1, first[:80])
        blocks = _utf16_to_utf8(blocks)
    elif first.startswith(BOM):
        issues.note("byte order mark (removed)", 1, "UTF-8")
        blocks = itertools.chain([next(blocks)[len(BOM) :]], blocks)
    blocks = _convert_mac_line_ends(blocks, issues)
    for number, raw in enumerate(_join_lines(blocks, source), 1):
        # Decode each line separately, because a list may be put together from files with different encodings.
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("cp1252", "replace")
            issues.note("not UTF-8 (read as Windows-1252)", number, raw[:80])
        yield text


def _utf16_to_utf8(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Convert blocks of UTF-16 to UTF-8.

    This is done before the text is split, because the byte of a line break may also be a part of another character.
    """
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    for block in blocks:
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


def _convert_mac_line_ends(blocks: Iterator[bytes], issues: ParseIssues) -> Iterator[bytes]:
    """Convert the line ends of old Macs, a lone "\\r", which spreadsheets can still write.

    Without this, such a file would be a single line. A text whose beginning contains a "\\n" is not changed: in it, a lone
    "\\r" is a part of a caption.
    """
    start = b""
    for block in blocks:
        start += block
        if b"\n" in start or len(start) >= _BLOCK_BYTES:
            break
    if b"\n" in start or b"\r" not in start[:-1]:
        yield start
        yield from blocks
        return
    issues.note("CR line ends of old Macs (read as line breaks)", 1, start[:80])
    for block in itertools.chain([start], blocks):
        yield block.replace(b"\r", b"\n")


def _join_lines(blocks: Iterable[bytes], source: str) -> Iterator[bytes]:
    """Yield the lines of a text that is given in blocks, with their line ends.

    A file's own iterator would not limit the length of a line: a megabyte of gzip can contain one line of a gigabyte.

    Raises:
        ValueError: A line is longer than `MAX_ROW_BYTES`.
    """
    begun: list[bytes] = []  # the pieces of a line whose end has not been read yet
    length = 0  # total length of these pieces, in bytes
    number = 1
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        length += len(first)
        if length > MAX_ROW_BYTES:
            raise ValueError(
                f"{source}: line {number} is longer than the limit of {MAX_ROW_BYTES:,} bytes. Check that this is a "
                "text file with line breaks."
            )
        if not others:
            continue
        *complete, rest = others
        yield b"".join(begun) + b"\n"
        for text in complete:
            yield text + b"\n"
        number += len(others)
        begun, length = [rest], len(rest)
    if length:
        yield b"".join(begun)
