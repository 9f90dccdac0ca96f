"""A small compressed file may contain an extremely long line: reading it must not fill the memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_simplified import foreign_files
from llava_simplified.captioning.prompts import read_prompt_file, read_text_lines
from llava_simplified.captioning.sidecars import (
    SidecarError,
    SidecarOptions,
    SidecarWriter,
    read_tags,
)
from llava_simplified.data import rows
from llava_simplified.data.rows import open_rows
from llava_simplified.prepare import archive_source, source_files
from llava_simplified.prepare.convert import convert
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source

MEGABYTE = 1 << 20
BOMB_MEGABYTES = 48
# Several times `LIMIT`, because a text is decoded and split, but only a fraction of the bomb.
MAX_MEMORY = 16 * MEGABYTE
LIMIT = 500_000  # in place of `MAX_ROW_BYTES` and `MAX_TEXT_BYTES`, because tracing memory is slow
ROW = '{"image": "1.jpg", "caption": "a cat"}'
# Name of the file -> (its beginning, the bytes that fill the rest, the position that the error must name).
BOMBS: dict[str, tuple[bytes, bytes, str]] = {
    "list.txt": (b"http://a.example/1.jpg\nhttp://a.example/", b"a", "line 2"),
    "spaces.txt": (b"http://a.example/1.jpg\n\n", b" ", "line 3"),
    "tabs.tsv": (b"a cat\thttp://a.example/1.jpg\n", b"\t", "line 2"),
    "cell.csv": (b"url,caption\nhttp://a.example/1.jpg,", b"a", "line 2"),
    "quoted.csv": (b'url,caption\n"http://a.example/1.jpg","', b"a", "line 2"),
    "header.csv": (b"url,caption,", b"a", "line 1"),
    "object.jsonl": (f'{ROW}\n{{"image": "'.encode(), b"a", "line 2"),
    "array.jsonl": (f"{ROW}\n".encode(), b"[", "line 2"),
    "latin.tsv": (b"a caf\xe9\thttp://a.example/1.jpg\n", b"\xe9", "line 2"),
    "wide.tsv": ("\ufeffa\thttp://a.example/1.jpg\n".encode("utf-16-le"), b"a\0", "line 2"),
    "string.json": (f'[{ROW}, {{"image": "'.encode(), b"a", "byte"),
    "key.json": (f'{{"data": [{ROW}], "'.encode(), b"a", "byte"),
    "number.json": (f"[{ROW}, ".encode(), b"1", "byte"),
    "nested.json": (f"[{ROW}, ".encode(), b"[", "byte"),
    "object.json": (f"[{ROW}, {{".encode(), b'"a": 1,', "byte"),
    "behind.json": (f'[{ROW}, "http://a.example/1.jpg"'.encode(), b"x", "byte"),
}


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, source_files):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", LIMIT)
    for module in (foreign_files, archive_source):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", LIMIT)


def write_bomb(path: Path, begin: bytes, repeated: bytes) -> Path:
    """Write `BOMB_MEGABYTES` of the repeated bytes, compressed in the format of the suffix."""
    block = repeated * (MEGABYTE // len(repeated))
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix)
    if compress is not None:
        # All of these formats allow several streams in one file.
        path.write_bytes(compress(begin) + compress(block) * BOMB_MEGABYTES)
        return path
    if path.suffix == ".zip":
        name = path.name.removesuffix(".zip")
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(name, "w", force_zip64=True) as member,
        ):
            member.write(begin)
            for _ in range(BOMB_MEGABYTES):
                member.write(block)
        return path
    zstandard = pytest.importorskip("zstandard")
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
        stream.write(begin)
        for _ in range(BOMB_MEGABYTES):
            stream.write(block)
    return path


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_MEMORY, f"{peak / MEGABYTE:.0f} MB"


def read_all(source: Path) -> int:
    return sum(1 for _ in read_source(str(source), ParseIssues(), Columns()))


@pytest.mark.medium
@pytest.mark.parametrize("name", BOMBS)
def test_endless_line_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    begin, repeated, where = BOMBS[name]
    path = write_bomb(tmp_path / f"{name}.gz", begin, repeated)
    assert path.stat().st_size < 2 * MEGABYTE
    with little_memory(), pytest.raises(ValueError, match=where) as error:
        read_all(path)
    assert path.name in str(error.value)
    assert f"{LIMIT:,}" in str(error.value)


@pytest.mark.medium
@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".zst", ".zip"])
@pytest.mark.parametrize("name", ["list.txt", "object.jsonl", "string.json"])
def test_endless_line_is_an_error_in_every_compression(
    tmp_path: Path, name: str, suffix: str
) -> None:
    begin, repeated, where = BOMBS[name]
    path = write_bomb(tmp_path / (name + suffix), begin, repeated)
    with little_memory(), pytest.raises(ValueError, match=where) as error:
        read_all(path)
    assert f"{LIMIT:,}" in str(error.value)


@pytest.mark.parametrize("suffix", ["txt", "tsv", "jsonl", "json"])
def test_line_just_below_the_limit_is_read_unchanged(tmp_path: Path, suffix: str) -> None:
    """The shorter rows beside it are read, too."""
    url = "http://a.example/1.jpg"
    caption = "x" * (LIMIT - 1000)
    texts = {
        "txt": f"{url}\n{url}?{caption}\n{url}",
        "tsv": f"a\t{url}\n{caption}\t{url}\nb\t{url}",
        "jsonl": f'{{"url": "{url}", "caption": "a"}}\n{{"url": "{url}", "caption": "{caption}"}}\n',
        "json": f'[{{"url": "{url}", "caption": "a"}}, {{"url": "{url}", "caption": "{caption}"}}]',
    }
    path = tmp_path / f"x.{suffix}"
    path.write_text(texts[suffix])
    found = list(read_source(str(path), ParseIssues(), Columns()))
    long = found[1].url if suffix == "txt" else found[1].captions[0]
    assert long.endswith(caption)
    assert found[0].url == found[-1].url.partition("?")[0] == url


@pytest.mark.medium
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl"])
@pytest.mark.parametrize(
    "repeated",
    [
        "a",
        "a.",
        "://",
        ".jpg",
        ".jpg#a",
        "/",
        "/ ",
        "#1",
        '"',
        '""',
        '",',
        ",",
        ";",
        "| ",
        "\t",
        " ",
        "\\",
    ],
)
def test_long_line_does_not_take_quadratic_time(tmp_path: Path, suffix: str, repeated: str) -> None:
    long = repeated * (LIMIT // 2 // len(repeated))
    lines = [
        f"http://a.example/1.jpg,{long}",
        long,
        f"http://a.example/2.jpg\t{long} x",
        long + "!",
    ]
    path = tmp_path / f"x.{suffix}"
    path.write_text("\n".join([*lines, *(f"http://a.example/{n}.jpg" for n in range(5))]))
    start = time.monotonic()
    with contextlib.suppress(ValueError):  # not all of these files are valid lists or tables
        read_all(path)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_lines_are_the_same_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, line_end: str
) -> None:
    captions = ["", "é", "a cat", "", "x" * 40, "ü" * 17]
    path = tmp_path / "x.tsv"
    lines = [f"{text}é\thttp://a.example/{number}.jpg" for number, text in enumerate(captions)]
    path.write_bytes(line_end.join(["", *lines, ""]).encode(encoding))
    expected = [(number, line) for number, line in enumerate(lines, 2)]
    for size in (2, 3, 7, 64, 1000):
        monkeypatch.setattr(source_files, "_BLOCK_BYTES", size)
        assert list(source_files.read_lines(str(path), ParseIssues())) == expected


def test_long_rows_of_records_are_errors_that_name_the_row_or_the_file(tmp_path: Path) -> None:
    row = '{"image": "1.jpg", "instruction": "What?", "response": "RESPONSE"}'
    path = tmp_path / "x.jsonl"
    path.write_text(row + "\n" + row.replace("RESPONSE", "a" * LIMIT) + "\n" + row)
    records = open_rows(path)
    assert len(records) == 3
    assert records[0] == records[2]
    with pytest.raises(ValueError, match=r"x\.jsonl row 1") as error:
        records[1]
    assert f"{LIMIT:,}" in str(error.value)
    array = tmp_path / "x.json"
    array.write_text("[" + path.read_text().replace("\n", ",") + "]")
    with pytest.raises(ValueError, match=r"x\.json") as error:
        open_rows(array)
    assert f"{LIMIT:,}" in str(error.value)


def test_text_of_a_tar_is_not_read_if_it_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, size in [("a.jpg", 10), ("a.txt", 10), ("b.jpg", 10), ("b.txt", 20 * MEGABYTE)]:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(b"x" * size))
    issues = ParseIssues()
    with little_memory():
        found = list(read_source(str(path), issues, Columns()))
    assert [row.image for row in found] == ["0.tar#a"]
    assert any(f"{LIMIT:,}" in kind for kind in issues.counts)
    assert issues.counts["sample without a caption (skipped)"] == 1


# ---- files beside the images, and files of options ----


def zeros(path: Path) -> Path:
    """Make a file without end."""
    path.symlink_to("/dev/zero")
    return path


def pipe(path: Path) -> Path:
    """Make a pipe without a writer: opening it would wait forever."""
    os.mkfifo(path)
    return path


needs_devices = pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")


@needs_devices
@pytest.mark.parametrize("make", [zeros, pipe])
def test_sidecar_without_end_is_skipped_and_counted(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a cat")
    make(tmp_path / "b.txt")
    issues = ParseIssues()
    found = list(read_source(str(tmp_path), issues, Columns()))
    assert [row.image for row in found] == ["a.jpg"]
    assert issues.counts["sidecar that is not a regular file (skipped)"] == 1
    for existing in ("append", "overwrite"):
        writer = SidecarWriter(SidecarOptions(existing=existing), tmp_path, [])  # type: ignore[arg-type]
        with pytest.raises(SidecarError, match=r"b\.txt"):
            writer.plan("b.jpg", "a dog")
    with pytest.raises(SidecarError, match=r"b\.txt"):
        read_tags("b.jpg", tmp_path)
    assert read_tags("b.jpg", tmp_path, strict=False) == ""


@needs_devices
def test_files_of_options_without_end_are_refused_by_name(tmp_path: Path) -> None:
    path = zeros(tmp_path / "words.txt")
    (tmp_path / "x.jsonl").write_text(ROW)
    for read in (
        lambda: read_prompt_file(path),
        lambda: read_text_lines(path, "--forbid"),
        lambda: convert(str(tmp_path / "x.jsonl"), tmp_path / "o.json", instruction=str(path)),
    ):
        with little_memory(), pytest.raises(ValueError, match=r"words\.txt") as error:
            read()
        assert f"{LIMIT:,}" in str(error.value)
