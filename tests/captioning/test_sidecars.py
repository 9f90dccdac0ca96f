"""Tests of sidecar files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_simplified.captioning import sidecars
from llava_simplified.captioning.sidecars import (
    SidecarError,
    SidecarOptions,
    SidecarWriter,
    new_contents,
    read_tags,
)

BOM = b"\xef\xbb\xbf"


def write(folder: Path, images: list[str], text: str = "new", **options: object) -> list[str]:
    """Write the text of each image in the way that a job does; return the problems."""
    writer = SidecarWriter(SidecarOptions(**options), folder, images)
    problems = []
    for image in images:
        if writer.is_kept(image):
            continue
        problem = writer.problem(image)
        if problem:
            problems.append(problem)
            continue
        plan = writer.plan(image, text)
        assert plan is not None
        assert writer.write(image, text, plan)
    return problems


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("existing", "policy", "expected"),
    [
        (None, "append", b"new\n"),
        (None, "skip", b"new\n"),
        (b"old", "skip", b"old"),
        (b"", "skip", b""),
        (b"old, \xff", "overwrite", b"new\n"),
        (b"old", "append", b"old, new"),
        (b"old\n", "append", b"old, new\n"),
        (b"old,\n\n", "append", b"old, new\n\n"),
        (b"old, ", "append", b"old, new "),
        (b"old\n", "prepend", b"new, old\n"),
        (b"\n old\n", "prepend", b"new, old\n"),
        (BOM + b"old\r\n", "append", BOM + b"old, new\r\n"),
        (BOM + b"old\r\n", "prepend", BOM + b"new, old\r\n"),
        (b"one\r\ntwo\r\n", "append", b"one\r\ntwo, new\r\n"),
        (BOM + b"\r\n", "append", BOM + b"new\r\n"),
        (b"", "append", b"new\n"),
        ("\ufeffold\r\n".encode("utf-16-be"), "append", "\ufeffold, new\r\n".encode("utf-16-be")),
        ("\ufeffold".encode("utf-16-le"), "prepend", "\ufeffnew, old".encode("utf-16-le")),
    ],
)
def test_text_is_combined_with_an_existing_file_by_the_policy(
    tmp_path: Path, existing: bytes | None, policy: str, expected: bytes
) -> None:
    if existing is not None:
        (tmp_path / "a.txt").write_bytes(existing)
    assert write(tmp_path, ["a.jpg"], existing=policy) == []
    assert contents(tmp_path) == {"a.txt": expected}


def test_separator_and_lines_follow_the_existing_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    write(tmp_path, ["a.jpg"], "two\nthree", existing="append", separator="\n")
    assert contents(tmp_path) == {"a.txt": b"one\r\ntwo\r\nthree\r\n"}


@pytest.mark.parametrize("policy", ["append", "prepend"])
def test_file_that_is_not_utf_8_is_left_alone(tmp_path: Path, policy: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SidecarError, match=r"a\.txt.*UTF-8"):
        write(tmp_path, ["a.jpg"], existing=policy)
    assert contents(tmp_path) == {"a.txt": b"caf\xe9"}


def test_output_mirrors_the_folders(tmp_path: Path) -> None:
    images = ["a.jpg", "sub/b.v2.png", "sub/00.tar#dir/key", "no suffix"]
    out = tmp_path / "out"
    assert write(tmp_path / "in", images, output=str(out)) == []
    assert set(contents(out)) == {"a.txt", "sub/b.v2.txt", "sub/00/dir/key.txt", "no suffix.txt"}
    assert not (tmp_path / "in").exists()


def test_suffix_of_captions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tags")
    write(tmp_path, ["a.jpg"], suffix=".caption")
    assert contents(tmp_path) == {"a.txt": b"tags", "a.caption": b"new\n"}


def test_images_with_the_same_stem_are_a_named_conflict(tmp_path: Path) -> None:
    images = ["a.jpg", "b.jpg", "a.png", "sub/a.jpg", "a.webp"]
    problems = write(tmp_path, images, existing="overwrite")
    assert len(problems) == 3
    for name in ("a.jpg", "a.png", "a.webp", "a.txt"):
        assert all(name in problem for problem in problems)
    assert set(contents(tmp_path)) == {"b.txt", "sub/a.txt"}


def test_same_stem_is_not_a_conflict_if_the_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("by hand")
    assert write(tmp_path, ["a.jpg", "a.png"]) == []
    assert contents(tmp_path) == {"a.txt": b"by hand"}


@pytest.mark.parametrize("key", ["../../up", "/root", "a/../../b", "..\\up", "C:\\up"])
def test_key_of_a_shard_does_not_lead_out_of_the_folder(tmp_path: Path, key: str) -> None:
    (problem,) = write(tmp_path, [f"0.tar#{key}"], output=str(tmp_path / "out"))
    assert "safe" in problem
    assert contents(tmp_path) == {}


def test_image_in_a_shard_needs_an_output_folder(tmp_path: Path) -> None:
    (problem,) = write(tmp_path, ["0.tar#a"])
    assert "--output" in problem


def test_sidecar_never_replaces_an_image_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"in truth an image")
    (tmp_path / "b.txt").mkdir()
    problems = write(tmp_path, ["a.txt", "b.jpg"], existing="overwrite")
    assert [name in problem for name, problem in zip(["a.txt", "b.txt"], problems)] == [True, True]
    assert contents(tmp_path) == {"a.txt": b"in truth an image"}


def test_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulate a folder that is not writable, because the tests may run as root, who can write to every folder.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "locked")
    (tmp_path / "locked").mkdir()
    problems = write(tmp_path, ["locked/a.jpg", "open/b.jpg", "locked/new/c.jpg"])
    assert len(problems) == 2
    assert all("locked" in problem and "--output" in problem for problem in problems)
    assert set(contents(tmp_path)) == {"open/b.txt"}


def test_error_of_one_file_is_a_sidecar_error_and_a_full_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, expected in ((13, SidecarError), (28, OSError)):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, "reason")

        monkeypatch.setattr(sidecars, "_replace_file", fail)
        with pytest.raises(expected, match="reason"):
            write(tmp_path, ["a.jpg"])
    assert contents(tmp_path) == {}


# ---- a job that is killed ----


@pytest.mark.parametrize("policy", ["append", "prepend", "overwrite"])
def test_text_that_was_planned_is_written_exactly_once(tmp_path: Path, policy: str) -> None:
    """A job that was killed before or after it replaced a file writes all planned texts again."""
    (tmp_path / "a.txt").write_text("old")
    writer = SidecarWriter(SidecarOptions(existing=policy), tmp_path, ["a.jpg"])
    plan = writer.plan("a.jpg", "new")
    (tmp_path / ".a.txt.part12345678").write_text("half")  # left by the killed process
    assert writer.write("a.jpg", "new", plan, resumed=True)
    once = contents(tmp_path)
    assert set(once) == {"a.txt"}
    assert once["a.txt"].count(b"new") == 1
    assert writer.write("a.jpg", "new", plan, resumed=True)
    assert contents(tmp_path) == once


def test_file_that_somebody_else_has_changed_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    writer = SidecarWriter(SidecarOptions(existing="append"), tmp_path, ["a.jpg"])
    plan = writer.plan("a.jpg", "new")
    (tmp_path / "a.txt").write_text("by hand")
    assert not writer.write("a.jpg", "new", plan)
    assert contents(tmp_path) == {"a.txt": b"by hand"}


def test_skip_keeps_a_file_that_appeared_in_the_meantime(tmp_path: Path) -> None:
    writer = SidecarWriter(SidecarOptions(), tmp_path, ["a.jpg"])
    assert not writer.is_kept("a.jpg")
    (tmp_path / "a.txt").write_text("by hand")
    assert writer.plan("a.jpg", "new") is None


def test_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o604)
    (tmp_path / "a.txt").symlink_to("real.txt")
    write(tmp_path, ["a.jpg"], existing="append")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "old, new"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o604


# ---- tags ----


@pytest.mark.parametrize(
    ("data", "tags"),
    [
        (None, ""),
        (b"", ""),
        (BOM + b" 1girl, solo, \r\n", "1girl, solo"),
        ("\ufeff1girl".encode("utf-16-le"), "1girl"),
    ],
)
def test_read_tags(tmp_path: Path, data: bytes | None, tags: str) -> None:
    if data is not None:
        (tmp_path / "a.txt").write_bytes(data)
    assert read_tags("a.jpg", tmp_path) == tags


def test_read_tags_names_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SidecarError, match=r"a\.txt"):
        read_tags("a.jpg", tmp_path)
    assert read_tags("a.jpg", tmp_path, strict=False) == "caf\ufffd"


def test_new_contents_refuses_what_cannot_be_encoded(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match="encoded"):
        new_contents(None, "half \ud83d", SidecarOptions(), tmp_path / "a.txt")
