"""Shards: other tools can read what `ShardWriter` writes, and single images can be read from shards of other tools."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_simplified.data.embedded_images import ParquetRows, find_image_column
from llava_simplified.data.images import ImageError, read_image_bytes
from llava_simplified.data.shards import (
    END_OF_ARCHIVE,
    ShardWriter,
    read_shard_image,
    tar_members,
    tar_samples,
)


def write_shard(path: Path, count: int = 20) -> list[bytes]:
    """Write a shard with ShardWriter, and return the images: byte i, repeated."""
    images = [bytes([i]) * (37 * i + 1) for i in range(count)]
    writer = ShardWriter(path)
    for i, image in enumerate(images):
        offset = writer.add(f"{i:09d}", image, "jpg", (f"caption {i}", "é"), {"width": i})
        written = path.read_bytes()[offset : offset + len(image)]
        assert written == image, "the image is in the file when add returns"
    writer.close()
    return images


def write_foreign_tar(path: Path, members: dict[str, bytes], **attributes: Any) -> Path:
    """Write a tar as other tools do, with attributes set on every member."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(data))
    return path


# ---- writing ----


def test_shard_writer_writes_a_tar_that_tarfile_reads(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    images = write_shard(path)
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    assert [members[f"{i:09d}.jpg"] for i in range(20)] == images
    assert members["000000003.txt"] == "caption 3\né".encode()
    assert json.loads(members["000000003.json"]) == {"width": 3}
    assert path.read_bytes().endswith(END_OF_ARCHIVE)


def test_shard_writer_cuts_off_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    killed = ShardWriter(path)
    killed.add("a", b"one", "jpg", (), {})
    with path.open("ab") as file:
        file.write(b"half a member")

    resumed = ShardWriter(path, killed.end)
    resumed.add("b", b"two", "png", (), {})
    resumed.close()
    samples = [(key, sorted(members)) for key, members in tar_samples(path)]
    assert samples == [("a", ["jpg", "json", "txt"]), ("b", ["json", "png", "txt"])]


def test_shard_writer_writes_everything_when_the_system_writes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original_write = os.write
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: original_write(descriptor, data[:300])
    )
    writer = ShardWriter(tmp_path / "0.tar")
    writer.add("0", b"x" * 3000, "jpg", ("a cat",), {})
    writer.close()
    monkeypatch.undo()
    names = [member.name for member in tar_members(tmp_path / "0.tar")]
    assert names == ["0.jpg", "0.txt", "0.json"]


# ---- reading tars ----


@pytest.mark.parametrize("has_manifest", [False, True])
def test_shard_images_are_read_at_random(tmp_path: Path, has_manifest: bool) -> None:
    path = tmp_path / "00000.tar"
    images = write_shard(path)
    if has_manifest:
        rows: list[dict[str, Any]] = []
        for member in tar_members(path):
            if member.name.endswith(".jpg"):
                key = member.name.removesuffix(".jpg")
                rows.append({"key": key, "offset": member.offset, "length": member.size})
        # The manifest also has a row of a failed request, which has no image.
        rows.append({"key": "999999999", "offset": None, "length": None})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    for i in (13, 0, 19):
        assert read_image_bytes(f"00000.tar#{i:09d}", tmp_path) == images[i]
    with pytest.raises(ImageError, match="'999999999'") as error:
        read_image_bytes("00000.tar#999999999", tmp_path)
    assert error.value.kind == "missing"


def test_read_shard_image_reads_foreign_tars(tmp_path: Path) -> None:
    long_key = "folder/" + "x" * 120
    members = {
        f"{long_key}.JPG": b"one",
        f"{long_key}.txt": b"c",
        "./b.seg.png": b"mask",
        "./b.png": b"two",
    }
    path = write_foreign_tar(tmp_path / "0.tar", members)
    assert read_shard_image(path, long_key) == b"one"
    assert read_shard_image(path, "./b") == b"two"


def test_read_shard_image_reads_names_that_are_not_utf_8(tmp_path: Path) -> None:
    path = write_foreign_tar(tmp_path / "0.tar", {"caf_.jpg": b"one", "b.jpg": b"two"})
    data = path.read_bytes()
    header = data[:512].replace(b"caf_", b"caf\xe9")
    checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    path.write_bytes(header[:148] + b"%06o\0 " % checksum + header[156:] + data[512:])
    (key, _), _ = tar_samples(path)
    assert read_shard_image(path, key) == b"one"
    assert read_shard_image(path, "b") == b"two"


# ---- damaged and hostile tars ----


def test_tar_members_names_the_truncated_member(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_shard(path)
    data = path.read_bytes()
    last_image = list(tar_members(path))[-3]
    path.write_bytes(data[: last_image.offset + 5])
    with pytest.raises(ValueError, match="000000019.jpg"):
        list(tar_members(path))
    # This position is in the header of the image.
    path.write_bytes(data[: last_image.offset - 300])
    with pytest.raises(
        ValueError, match=r"truncated after member '000000018.json'.*212 other bytes"
    ):
        list(tar_members(path))


@pytest.mark.parametrize("name", ["../../etc/cron.d/x.jpg", "/etc/passwd.jpg", "a/../../b.jpg"])
def test_tar_members_rejects_names_that_leave_the_archive(tmp_path: Path, name: str) -> None:
    path = write_foreign_tar(tmp_path / "0.tar", {"a.jpg": b"x", name: b"y"})
    with pytest.raises(ValueError, match="unsafe path") as error:
        list(tar_members(path))
    assert name in str(error.value)


def test_tar_members_rejects_links(tmp_path: Path) -> None:
    path = write_foreign_tar(
        tmp_path / "0.tar",
        {"evil.jpg": b""},
        type=tarfile.SYMTYPE,
        linkname="/etc/passwd",
    )
    with pytest.raises(ValueError, match="member 'evil.jpg' is a link"):
        list(tar_members(path))


def test_tar_members_rejects_what_is_not_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "1.tar"
    path.write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(ValueError, match=r"1.tar: not a complete tar"):
        list(tar_members(path))


@pytest.mark.parametrize(
    ("headers", "data"),
    [
        pytest.param(
            {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.realsize": "5",
            },
            b"no number\n",
            id="not a number in the map of holes",
        ),
        pytest.param({"GNU.sparse.map": "0,x"}, b"abc", id="not a number in the header"),
        # This tar is valid, but the contents of a sparse file are not a single range of bytes.
        pytest.param(
            {"GNU.sparse.map": "0,3", "GNU.sparse.size": "9"},
            b"abc",
            id="a valid sparse file",
        ),
    ],
)
def test_tar_members_rejects_sparse_files_and_invalid_numbers(
    tmp_path: Path, headers: dict[str, str], data: bytes
) -> None:
    path = write_foreign_tar(tmp_path / "0.tar", {"a.jpg": data}, pax_headers=headers)
    with pytest.raises(ValueError, match=r"0\.tar: .*(invalid literal|sparse)"):
        list(tar_members(path))


def test_tar_members_rejects_an_extended_header_longer_than_any_file(tmp_path: Path) -> None:
    path = write_foreign_tar(tmp_path / "0.tar", {"a.jpg": b"x"}, pax_headers={"comment": "z" * 40})
    length_and_comment = b"52 comment=" + b"z" * 30
    huge_length = b"9" * 30 + b" comment=" + b"z" * 2
    path.write_bytes(path.read_bytes().replace(length_and_comment, huge_length))
    with pytest.raises(ValueError, match=r"0\.tar: not a complete tar"):
        list(tar_members(path))


def tar_header(kind: bytes, size: bytes) -> bytes:
    """Return a header of a tar, with any bytes as the size."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[156:157] = kind
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(header)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize(
    "size", [b"\x80" + (2**60).to_bytes(11, "big"), b"77777777777\0"], ids=["2^60", "2^33"]
)
def test_tar_members_allocates_nothing_for_an_extended_header_that_is_not_there(
    tmp_path: Path, kind: bytes, size: bytes
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(tar_header(kind, size) + bytes(1024))
    with pytest.raises(ValueError, match=r"0\.tar: not a complete tar.*extended header"):
        list(tar_members(path))


def test_tar_members_rejects_thousands_of_extended_headers_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    comment = b"12 comment=a"[:11] + b"\n"
    header = tar_header(b"x", b"%011o\0" % len(comment)) + comment.ljust(512, b"\0")
    path.write_bytes(header * 5000 + bytes(1024))
    with pytest.raises(ValueError, match=r"0\.tar: not a complete tar"):
        list(tar_members(path))


# ---- images in Parquet files ----


def test_parquet_images_are_read_by_row(tmp_path: Path) -> None:
    images = [{"bytes": bytes([i]), "path": None} for i in range(23)]
    table = pa.table({"image": images, "text": ["x"] * 23})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    for row in (22, 0, 5, 4, 11):
        assert read_image_bytes(f"x.parquet#{row}", tmp_path) == bytes([row])
    with pytest.raises(ImageError, match="no row 23.* 23 rows"):
        read_image_bytes("x.parquet#23", tmp_path)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"hash": pa.binary(), "text": pa.string()}, ""),
        ({"hash": pa.binary(), "JPG": pa.binary()}, "JPG"),
        ({"jpg": pa.binary(), "photo": pa.struct({"bytes": pa.binary()})}, "photo"),
    ],
)
def test_image_column_prefers_structs_and_ignores_other_bytes(
    columns: dict[str, pa.DataType], expected: str
) -> None:
    column = find_image_column(pa.schema(columns))
    assert (column.name if column else "") == expected


IMAGE_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"image": IMAGE_STRUCT, "right_image": IMAGE_STRUCT}, "'image', 'right_image'"),
        ({"image": IMAGE_STRUCT, "images": pa.list_(IMAGE_STRUCT)}, "'image', 'images'"),
        ({"jpg": pa.binary(), "text": pa.string(), "png": pa.binary()}, "'jpg', 'png'"),
        ({"image": IMAGE_STRUCT, "audio": IMAGE_STRUCT}, "'audio'"),
        ({"jpg": pa.binary(), "video": pa.binary(), "wav": pa.binary()}, "'video', 'wav'"),
        ({"videos": pa.list_(pa.binary())}, "'videos'"),
        ({"audio": IMAGE_STRUCT}, "'audio'"),
    ],
)
def test_columns_whose_images_or_other_media_would_be_lost_are_refused(
    tmp_path: Path, columns: dict[str, pa.DataType], named: str
) -> None:
    pq.write_table(pa.schema(columns).empty_table(), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"^x.parquet: .*columns.* {named}"):
        ParquetRows(tmp_path / "x.parquet", "x.parquet")


def test_columns_of_texts_and_embeddings_are_not_media() -> None:
    columns = {"image": IMAGE_STRUCT, "video": pa.string(), "embedding": pa.binary()}
    assert find_image_column(pa.schema(columns)).name == "image"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_of_a_table_that_is_written_again_are_read_again(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    for image in (b"old", b"new" * 100):
        table = pa.table({"image": [{"bytes": image, "path": None}]})
        if suffix == "parquet":
            pq.write_table(table, path)
        else:
            path.unlink(missing_ok=True)  # the old file stays mapped into memory
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
        # On some file systems, two files that are written soon after each other have the same time.
        os.utime(path, ns=(1, 1))
        assert read_image_bytes(f"x.{suffix}#0", tmp_path) == image


def test_images_of_a_shard_are_found_again_after_its_manifest_has_changed(tmp_path: Path) -> None:
    [first, second] = write_shard(tmp_path / "0.tar", 2)
    [(_, a), (_, b)] = tar_samples(tmp_path / "0.tar")
    positions = [a["jpg"], b["jpg"]]
    for order in ([0, 1], [1, 0]):
        rows = []
        for key, number in zip("ab", order):
            offset, length = positions[number]
            rows.append({"key": key, "offset": offset, "length": length})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
        os.utime(tmp_path / "0.parquet", ns=(1, 1 + order[0]))
        assert read_image_bytes("0.tar#a", tmp_path) == [first, second][order[0]]
    # Without the manifest, the keys are those of the archive.
    (tmp_path / "0.parquet").unlink()
    assert read_image_bytes("0.tar#000000001", tmp_path) == second


def test_position_in_a_row_of_one_image_is_a_missing_image(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"x", "path": None}]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ImageError, match=r"x.parquet: row 0 has one image") as error:
        read_image_bytes("x.parquet#0/0", tmp_path)
    assert error.value.kind == "missing"


# ---- paths ----


@pytest.mark.parametrize("image", ["../secret.jpg", "a/../../secret.jpg", "../0.tar#a"])
def test_read_image_bytes_opens_nothing_outside_the_folder(tmp_path: Path, image: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    write_shard(tmp_path / "0.tar")
    (tmp_path / "images" / "a").mkdir(parents=True)
    with pytest.raises(ImageError) as error:
        read_image_bytes(image, tmp_path / "images")
    assert error.value.kind == "unsafe"


def test_read_image_bytes_uses_the_base_name_of_paths_that_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"top")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.jpg").write_bytes(b"sub")
    assert read_image_bytes("/data/somebody/1.jpg", tmp_path) == b"top"
    assert read_image_bytes(str(tmp_path / "sub" / "1.jpg"), tmp_path) == b"sub"
    with pytest.raises(ImageError, match=r"no image .*gone\.jpg"):
        read_image_bytes("/data/somebody/gone.jpg", tmp_path)
    with pytest.raises(ImageError, match="passwd") as error:
        read_image_bytes("/etc/passwd", tmp_path)
    assert error.value.kind == "unsafe"
