"""Shards: written so that others can read them, read at random whoever wrote them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_simplified.data.images import ImageError, read_image_bytes
from llava_simplified.data.shards import (
    END_OF_ARCHIVE,
    ShardWriter,
    read_shard_image,
    tar_members,
    tar_samples,
)


def write(path: Path, count: int = 20) -> list[bytes]:
    writer = ShardWriter(path)
    pictures = [bytes([i]) * (37 * i + 1) for i in range(count)]
    for i, picture in enumerate(pictures):
        offset = writer.add(f"{i:09d}", picture, "jpg", (f"caption {i}", "é"), {"width": i})
        assert path.read_bytes()[offset : offset + len(picture)] == picture, (
            "there when add returns"
        )
    writer.close()
    return pictures


def foreign(path: Path, members: dict[str, bytes], **special: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in special.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_tarfile_reads_what_is_written(tmp_path: Path) -> None:
    pictures = write(tmp_path / "0.tar")
    with tarfile.open(tmp_path / "0.tar") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}
    assert [members[f"{i:09d}.jpg"] for i in range(20)] == pictures
    assert members["000000003.txt"] == "caption 3\né".encode()
    assert json.loads(members["000000003.json"]) == {"width": 3}
    assert (tmp_path / "0.tar").read_bytes().endswith(END_OF_ARCHIVE)


def test_what_a_killed_writer_left_is_cut_off(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0.tar")
    writer.add("a", b"one", "jpg", (), {})
    end = writer.end
    with (tmp_path / "0.tar").open("ab") as file:
        file.write(b"half a member")
    again = ShardWriter(tmp_path / "0.tar", end)
    again.add("b", b"two", "png", (), {})
    again.close()
    assert [(key, sorted(members)) for key, members in tar_samples(tmp_path / "0.tar")] == [
        ("a", ["jpg", "json", "txt"]), ("b", ["json", "png", "txt"])]  # fmt: skip


@pytest.mark.parametrize("manifest", [False, True])
def test_pictures_are_read_at_random(tmp_path: Path, manifest: bool) -> None:
    pictures = write(tmp_path / "00000.tar")
    if manifest:
        places = [m for m in tar_members(tmp_path / "00000.tar") if m.name.endswith(".jpg")]
        rows = [{"key": m.name[:-4], "offset": m.offset, "length": m.size} for m in places]
        rows.append({"key": "999999999", "offset": None, "length": None})  # a failed download
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    for i in (13, 0, 19):
        assert read_image_bytes(f"00000.tar#{i:09d}", tmp_path) == pictures[i]
    with pytest.raises(ImageError, match="no picture with key '999999999'"):
        read_image_bytes("00000.tar#999999999", tmp_path)


def test_tars_of_others_are_read(tmp_path: Path) -> None:
    long = "folder/" + "x" * 120
    members = {
        f"{long}.JPG": b"one",
        f"{long}.txt": b"c",
        "./b.seg.png": b"mask",
        "./b.png": b"two",
    }
    foreign(tmp_path / "0.tar", members)
    assert read_shard_image(tmp_path / "0.tar", long) == b"one"
    assert read_shard_image(tmp_path / "0.tar", "./b") == b"two"


def test_names_that_are_no_utf_8_are_names_all_the_same(tmp_path: Path) -> None:
    data = foreign(tmp_path / "0.tar", {"caf_.jpg": b"one", "b.jpg": b"two"}).read_bytes()
    header = data[:512].replace(b"caf_", b"caf\xe9")
    checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    (tmp_path / "0.tar").write_bytes(
        header[:148] + b"%06o\0 " % checksum + header[156:] + data[512:]
    )
    ((key, _), _) = tar_samples(tmp_path / "0.tar")
    assert read_shard_image(tmp_path / "0.tar", key) == b"one"
    assert read_shard_image(tmp_path / "0.tar", "b") == b"two"


def test_truncated_tars_name_the_member(tmp_path: Path) -> None:
    write(tmp_path / "0.tar")
    data = (tmp_path / "0.tar").read_bytes()
    last = list(tar_members(tmp_path / "0.tar"))[-3]
    (tmp_path / "0.tar").write_bytes(data[: last.offset + 5])
    with pytest.raises(ValueError, match="000000019.jpg"):
        list(tar_members(tmp_path / "0.tar"))
    (tmp_path / "0.tar").write_bytes(data[: last.offset - 300])  # in a header
    with pytest.raises(ValueError, match=r"truncated after member '000000018.json': 212 bytes"):
        list(tar_members(tmp_path / "0.tar"))


@pytest.mark.parametrize("name", ["../../etc/cron.d/x.jpg", "/etc/passwd.jpg", "a/../../b.jpg"])
def test_names_that_leave_the_tar_are_refused(tmp_path: Path, name: str) -> None:
    foreign(tmp_path / "0.tar", {"a.jpg": b"x", name: b"y"})
    with pytest.raises(ValueError, match="points out of the archive"):
        list(tar_members(tmp_path / "0.tar"))


def test_links_and_what_is_no_tar_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "0.tar", {"evil.jpg": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="member 'evil.jpg' is a link"):
        list(tar_members(tmp_path / "0.tar"))
    (tmp_path / "1.tar").write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(ValueError, match=r"1.tar: not a whole tar"):
        list(tar_members(tmp_path / "1.tar"))


@pytest.mark.parametrize(
    ("pax", "data"),
    [
        (
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"},
            b"no number\n",
        ),
        ({"GNU.sparse.map": "0,x"}, b"abc"),
        (
            {"GNU.sparse.map": "0,3", "GNU.sparse.size": "9"},
            b"abc",
        ),  # sparse, and well-formed: no range of bytes is it
    ],
)
def test_numbers_that_are_none_and_holes_are_refused(
    tmp_path: Path, pax: dict[str, str], data: bytes
) -> None:
    foreign(tmp_path / "0.tar", {"a.jpg": data}, pax_headers=pax)
    with pytest.raises(ValueError, match=r"0\.tar: .*(invalid literal|sparse)"):
        list(tar_members(tmp_path / "0.tar"))


def test_a_header_longer_than_any_file_is_refused(tmp_path: Path) -> None:
    data = foreign(
        tmp_path / "0.tar", {"a.jpg": b"x"}, pax_headers={"comment": "z" * 40}
    ).read_bytes()
    (tmp_path / "0.tar").write_bytes(
        data.replace(b"52 comment=" + b"z" * 30, b"9" * 30 + b" comment=" + b"z" * 2)
    )
    with pytest.raises(ValueError, match=r"0\.tar: not a whole tar"):
        list(tar_members(tmp_path / "0.tar"))


def test_pictures_inside_parquet_are_read_by_row(tmp_path: Path) -> None:
    pictures = [{"bytes": bytes([i]), "path": None} for i in range(23)]
    pq.write_table(
        pa.table({"image": pictures, "text": ["x"] * 23}), tmp_path / "x.parquet", row_group_size=5
    )
    for row in (22, 0, 5, 4, 11):
        assert read_image_bytes(f"x.parquet#{row}", tmp_path) == bytes([row])
    with pytest.raises(ImageError, match="no row 23, it has 23"):
        read_image_bytes("x.parquet#23", tmp_path)


@pytest.mark.parametrize("image", ["../secret.jpg", "a/../../secret.jpg", "../0.tar#a"])
def test_a_record_opens_nothing_outside_its_folder(tmp_path: Path, image: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    write(tmp_path / "0.tar")
    (tmp_path / "images" / "a").mkdir(parents=True)
    with pytest.raises(ImageError) as error:
        read_image_bytes(image, tmp_path / "images")
    assert error.value.kind == "unsafe"


def test_an_absolute_path_is_its_base_name_unless_it_lies_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.jpg").write_bytes(b"deeper")
    assert read_image_bytes("/data/somebody/1.jpg", tmp_path) == b"mine"
    assert read_image_bytes(str(tmp_path / "sub" / "1.jpg"), tmp_path) == b"deeper"
    with pytest.raises(ImageError, match="no image .*passwd"):
        read_image_bytes("/etc/passwd", tmp_path)


def test_writes_that_the_disk_cuts_short_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:300]))
    writer = ShardWriter(tmp_path / "0.tar")
    writer.add("0", b"x" * 3000, "jpg", ("a cat",), {})
    writer.close()
    monkeypatch.undo()
    assert [member.name for member in tar_members(tmp_path / "0.tar")] == [
        "0.jpg",
        "0.txt",
        "0.json",
    ]
