"""Every source of captions in its published form, and the unusual parts of real files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling import num_examples

from llava_simplified.data.records import image_names, open_records
from llava_simplified.data.shards import ShardWriter, read_shard_image
from llava_simplified.prepare import sources
from llava_simplified.prepare.convert import group_captions
from llava_simplified.prepare.source_rows import Columns, ParseIssues, SourceRow
from llava_simplified.prepare.sources import read_source


def read(path: Path, **columns: str) -> tuple[list[SourceRow], ParseIssues]:
    """Return the rows of a source, and its issues."""
    issues = ParseIssues()
    return list(read_source(str(path), issues, Columns(**columns))), issues


def read_captions(path: Path, **columns: str) -> list[tuple[str, ...]]:
    """Return (image or URL, captions ...) of each row."""
    rows, _ = read(path, **columns)
    return [(row.image or row.url, *row.captions) for row in rows]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


U = "http://a.example/1.jpg"
V = "https://b.example/2.jpg?w=1,2"

# ---- text and JSON ----

COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "COCO_9.jpg", "coco_url": U},
        {"id": 8, "file_name": "8.jpg"},
    ],
    "licenses": [{"id": 1}],
    "annotations": [
        {"image_id": 8, "id": 1, "caption": "A dog. "},
        {"image_id": 9, "id": 2, "caption": "A cat."},
    ],
}
COCO_ANNOTATIONS_FIRST = {
    "annotations": [{"image_id": 8, "caption": "A dog."}],
    "images": [{"id": 8, "file_name": "8.jpg"}],
}
SBU = {"image_urls": [U, V], "user_ids": ["x", "y"], "captions": ["c", "d"]}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "1.jpg",
            "split": "test",
            "imgid": 0,
            "sentences": [{"raw": "A cat.", "tokens": ["a", "cat"]}, {"raw": "A pet."}],
        }
    ],
}
LLAVA = [
    {
        "id": "x",
        "image": "1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cat"},
        ],
    }
]
TUTORIAL = [{"image": "1.jpg", "instruction": "Say:", "response": "a cat"}]

# File name -> (content, rows).
FORMS: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "cc3m.tsv": (f"a cat\t{U}\na dog\t{V}\n", [(U, "a cat"), (V, "a dog")]),
    "cc12m.tsv": (f"{U}\ta cat\n{V}\ta dog\n", [(U, "a cat"), (V, "a dog")]),
    "flickr30k.token": (
        "1.jpg#0\tA cat .\n1.jpg#1\tA pet .\n",
        [("1.jpg", "A cat ."), ("1.jpg", "A pet .")],
    ),
    "results.csv": (
        "image_name| comment_number| comment\n1.jpg| 0| A cat | or so .\n1.jpg| 4   A dog runs .\n",
        [("1.jpg", "A cat | or so ."), ("1.jpg", "A dog runs .")],
    ),
    "flickr8k.txt": (
        'image,caption\n1.jpg,A cat .\n2.jpg,"A ""big"" dog, running ."\n',
        [("1.jpg", "A cat ."), ("2.jpg", 'A "big" dog, running .')],
    ),
    "header.tsv": (f"id\turl\tcaption\n7\t{U}\ta cat\n", [(U, "a cat")]),
    "urls.csv": (f"url,caption\n{U},a cat\n", [(U, "a cat")]),
    "sbu.json": (json.dumps(SBU), [(U, "c"), (V, "d")]),
    "coco.json": (json.dumps(COCO), [("8.jpg", "A dog."), ("COCO_9.jpg", "A cat.")]),
    "late.json": (json.dumps(COCO_ANNOTATIONS_FIRST), [("8.jpg", "A dog.")]),
    "karpathy.json": (json.dumps(KARPATHY), [("val2014/1.jpg", "A cat.", "A pet.")]),
    "tutorial.json": (json.dumps(TUTORIAL), [("1.jpg", "a cat")]),
    "llava.json": (json.dumps(LLAVA), [("1.jpg", "a cat")]),
    "rows.jsonl": (json.dumps({"url": U, "caption": "a cat"}) + "\n", [(U, "a cat")]),
    "many.jsonl": (
        json.dumps({"file_name": "1.jpg", "captions": ["a cat", "a pet"]}) + "\n",
        [("1.jpg", "a cat", "a pet")],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_read_source_recognises_every_form(tmp_path: Path, name: str) -> None:
    text, expected = FORMS[name]
    (tmp_path / name).write_text(text, "utf-8")
    assert read_captions(tmp_path / name) == expected


def test_read_source_decompresses_gzip(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv.gz").write_bytes(gzip.compress(f"a cat\t{U}\n".encode()))
    assert read_captions(tmp_path / "cc3m.tsv.gz") == [(U, "a cat")]


def test_read_source_uses_the_columns_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"place,words\n{U},a cat\n")
    assert read_captions(tmp_path / "x.csv", url="place", caption="words") == [(U, "a cat")]
    with pytest.raises(ValueError, match="no column 'wrong'.* place, words"):
        read(tmp_path / "x.csv", url="wrong", caption="words")


# ---- Parquet ----


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (("URL", "TEXT", "hash", "punsafe"), (U, "a cat", 1, 0.1)),  # LAION-2B
        (("uid", "url", "text"), ("u", U, "a cat")),  # DataComp
        (("url", "alt_text"), (U, "a cat")),
    ],
)
def test_read_source_reads_parquet_files_of_urls(
    tmp_path: Path, columns: tuple[str, ...], row: tuple[Any, ...]
) -> None:
    table = pa.table({name: [value] for name, value in zip(columns, row)})
    pq.write_table(table, tmp_path / "part-0.parquet")
    assert read_captions(tmp_path / "part-0.parquet") == [(U, "a cat")]
    assert read_captions(tmp_path) == [(U, "a cat")], "a folder of parts"
    assert read_captions(tmp_path / "part-*.parquet") == [(U, "a cat")], "a glob pattern"


def test_read_source_names_embedded_images_of_parquet_by_their_rows(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": "1.jpg"}, {"bytes": b"y", "path": "2.jpg"}]
    table = pa.table({"image": images, "text": ["a cat", "a dog"]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert read_captions(tmp_path / "train.parquet") == [
        ("train.parquet#0", "a cat"),
        ("train.parquet#1", "a dog"),
    ]


def test_read_source_does_not_mistake_other_bytes_for_images(tmp_path: Path) -> None:
    laion = {"url": [U], "text": ["a cat"], "phash": [b"123"]}
    pq.write_table(pa.table(laion), tmp_path / "laion.parquet")
    assert read(tmp_path / "laion.parquet")[0] == [SourceRow(0, "", U, ("a cat",))]
    both = {"embedding": [b"123"], "image": [{"bytes": b"x", "path": "1.jpg"}], "text": ["a cat"]}
    pq.write_table(pa.table(both), tmp_path / "train.parquet")
    assert read_shard_image(tmp_path / "train.parquet", "0") == b"x"
    pq.write_table(pa.table({"text": ["a cat"], "embedding": [b"123"]}), tmp_path / "no.parquet")
    with pytest.raises(ValueError, match="no url or image column among text"):
        read(tmp_path / "no.parquet")
    with pytest.raises(ValueError, match=r"no\.parquet"):
        read_shard_image(tmp_path / "no.parquet", "0")


def test_read_source_reads_the_karpathy_split_in_parquet(tmp_path: Path) -> None:
    """In the version on the hub, the sentences are plain texts."""
    columns = {
        "filepath": ["val2014"],
        "filename": ["1.jpg"],
        "sentences": [["A cat.", "A pet."]],
        "url": [U],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    expected = [SourceRow(0, "val2014/1.jpg", U, ("A cat.", "A pet."))]
    assert read(tmp_path / "x.parquet")[0] == expected


# ---- files, patterns and folders ----


def test_read_source_with_brackets_in_a_file_name_and_a_query_in_a_url(tmp_path: Path) -> None:
    (tmp_path / "train[1].tsv").write_text(f"a cat\t{U}\n")
    assert read_captions(tmp_path / "train[1].tsv") == [(U, "a cat")]
    with fsspec.open("memory://train.jsonl?download=true", "w") as stream:
        stream.write(json.dumps({"url": U, "caption": "a cat"}))
    rows = read_source("memory://train.jsonl?download=true", ParseIssues(), Columns())
    assert [(row.url, row.captions) for row in rows] == [(U, ("a cat",))]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_read_source_of_a_download_reads_its_records(tmp_path: Path, name: str) -> None:
    """The captions in the manifests of the shards must not be read."""
    record = {"image": "images/0_7.jpg", "instruction": "Say:", "response": "a cat"}
    text = json.dumps([record]) if name == "records.json" else json.dumps(record)
    (tmp_path / name).write_text(text)
    manifest = pa.table({"key": ["0"], "status": ["ok"], "captions": [["x"]]})
    pq.write_table(manifest, tmp_path / "00000.parquet")
    assert read_captions(tmp_path) == [("images/0_7.jpg", "a cat")]
    assert open_records(tmp_path)[0].images == ("images/0_7.jpg",)


def test_read_source_reads_the_metadata_of_an_imagefolder(tmp_path: Path) -> None:
    (tmp_path / "train" / "sub").mkdir(parents=True)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\nsub/1.jpg,a cat\n")
    assert read_captions(tmp_path) == [("train/sub/1.jpg", "a cat")]


# ---- tar shards ----


def test_read_source_reads_tars_with_texts_or_json(tmp_path: Path) -> None:
    members = [
        ("0.jpg", b"x"),
        ("0.txt", b"a cat"),
        ("1.png", b"y"),
        ("1.json", b'{"caption": "a dog"}'),
        ("2.jpg", b"z"),
    ]
    rows, issues = read(write_tar(tmp_path / "00000.tar", members))
    assert [(row.image, *row.captions) for row in rows] == [
        ("00000.tar#0", "a cat"),
        ("00000.tar#1", "a dog"),
    ]
    assert issues.counts == {"sample without a caption (skipped)": 1}


def test_read_source_separates_several_captions_of_a_sample(tmp_path: Path) -> None:
    """Without a manifest, the captions are read from the members of the tar, and stay separate."""
    writer = ShardWriter(tmp_path / "00000.tar")
    for key, captions in (("0", ("a cat", "a pet")), ("1", ("a dog",))):
        writer.add(key, b"x", "jpg", captions, {"captions": captions})
    writer.close()
    assert read_captions(tmp_path / "00000.tar") == [
        ("00000.tar#0", "a cat", "a pet"),
        ("00000.tar#1", "a dog"),
    ]


def test_read_source_distinguishes_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for folder, caption in (("a", b"a cat"), ("b", b"a dog")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [("1.jpg", b"x"), ("1.txt", caption)])
    assert read_captions(tmp_path / "*" / "0.tar") == [
        ("a/0.tar#1", "a cat"),
        ("b/0.tar#1", "a dog"),
    ]
    assert read_captions(tmp_path / "a" / "*.tar") == [("0.tar#1", "a cat")]


@pytest.mark.parametrize("form", ["captions.csv", "records.jsonl", "1.txt"])
def test_read_source_distinguishes_images_of_one_name_in_two_folders(
    tmp_path: Path, form: str
) -> None:
    """The pattern matches a table in each folder, or the folders themselves."""
    texts = {
        "captions.csv": "image,caption\nmissing.jpg,a bird\n1.jpg,{}\n",
        "records.jsonl": '{{"image": "1.jpg", "instruction": "Say:", "response": "{}"}}',
        "1.txt": "{}",
    }
    for folder, caption in (("a", "a cat"), ("b", "a dog")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(b"x")
        (tmp_path / folder / form).write_text(texts[form].format(caption))
    pattern = tmp_path / "*" if form == "1.txt" else tmp_path / "*" / form
    issues = ParseIssues()
    rows = list(group_captions(lambda issues: read_source(str(pattern), issues, Columns()), issues))
    found = {}
    for row in rows:
        names = [row.image] if row.record is None else image_names(row.record)
        found.update(dict.fromkeys(names, row.captions))
    assert found["a/1.jpg"] == ("a cat",)
    assert found["b/1.jpg"] == ("a dog",)


def test_read_source_says_which_folder_the_images_of_a_pattern_are_taken_from(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.csv").write_text("image,caption\n1.jpg,a cat\n")
    rows, issues = read(tmp_path / "*" / "x.csv")
    assert [row.image for row in rows] == ["1.jpg"]
    (kind,) = issues.counts
    assert str(tmp_path) in kind


def test_read_source_keeps_captions_of_concatenated_tars_with_their_images(tmp_path: Path) -> None:
    members = [
        ("1.jpg", b"x"),
        ("1.txt", b"a cat"),
        ("2.jpg", b"y"),
        ("2.txt", b"a dog"),
        ("1.jpg", b"z"),
        ("1.txt", b"a bird"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    assert read_captions(path) == [("x.tar#1", "a cat"), ("x.tar#2", "a dog")]
    assert read_shard_image(path, "1") == b"x"


def test_read_source_refuses_a_remote_tar() -> None:
    with pytest.raises(ValueError, match=r"memory://x\.tar.*[Cc]opy"):
        list(read_source("memory://x.tar", ParseIssues(), Columns()))


def test_read_source_reads_the_caption_column_of_a_tar_from_its_json(tmp_path: Path) -> None:
    """img2dataset writes the caption to 0.txt, and all columns to 0.json."""
    members = [
        ("0.jpg", b"x"),
        ("0.txt", b"cat.jpg"),
        ("0.json", b'{"caption": "cat.jpg", "re_caption": "a cat on a mat"}'),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    assert read_captions(path) == [("0.tar#0", "cat.jpg")]
    assert read_captions(path, caption="RE_caption") == [("0.tar#0", "a cat on a mat")]
    with pytest.raises(ValueError, match="no column 'other'"):
        read(path, caption="other")


def write_manifest(path: Path) -> None:
    """Write a manifest of `llava download`, for one image."""
    rows = {"url": [U], "captions": [["a cat"]], "key": ["000000000"], "status": ["ok"]}
    pq.write_table(pa.table(rows), path)


@pytest.mark.parametrize("name", ["manifest.parquet", "00000.parquet"])
def test_read_source_refuses_a_manifest_without_its_tar(tmp_path: Path, name: str) -> None:
    """These are the merged manifest, and the manifest of a shard of plain image files."""
    write_manifest(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: .*\.tar.*Pass the folder {tmp_path}"):
        read(tmp_path / name)


def test_read_source_leaves_the_merged_manifest_out_of_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "00000.tar", [("000000000.jpg", b"x")])
    write_manifest(tmp_path / "00000.parquet")
    write_manifest(tmp_path / "manifest.parquet")
    (tmp_path / "download.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for pattern in (str(tmp_path / "*.parquet"), "*.parquet", f"{tmp_path.as_uri()}/*.parquet"):
        issues = ParseIssues()
        rows = list(read_source(pattern, issues, Columns()))
        assert [row.image for row in rows] == ["00000.tar#000000000"]
        assert issues.counts == {"merged manifest of `llava download` (not read)": 1}


def test_read_source_uses_the_manifest_of_img2dataset(tmp_path: Path) -> None:
    members = [("000000000.jpg", b"x"), ("000000000.txt", b"a cat")]
    write_tar(tmp_path / "00000.tar", members)
    rows = {
        "key": ["000000000", "000000001"],
        "status": ["success", "failed_to_download"],
        "caption": ["a cat", "a dog"],
    }
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    assert read_captions(tmp_path) == [("00000.tar#000000000", "a cat")]


# ---- unusual parts of real files ----

# Name -> (bytes, captions, the issue that is noted). "URL" is replaced by the beginning of a URL.
UNUSUAL: dict[str, tuple[bytes, list[str], str]] = {
    "byte order mark": (
        b"\xef\xbb\xbfone\tURL0\ntwo\tURL1\n",
        ["one", "two"],
        "byte order mark (removed)",
    ),
    "CRLF": (b"one\tURL0\r\ntwo\tURL1\r\n", ["one", "two"], "CRLF line end (removed)"),
    "CR": (
        b"one\tURL0\rtwo\tURL1\r",
        ["one", "two"],
        "CR line ends of old Macs (read as line breaks)",
    ),
    "embedded tab": (
        b"one\tand more\tURL0\ntwo\tURL1\n",
        ["one and more", "two"],
        "'\\t' inside a caption (kept)",
    ),
    "quotes": (
        b'"one\tURL0\ntwo" "\tURL1\n',
        ['"one', 'two" "'],
        "quote character (kept as text)",
    ),
    "ragged": (
        b"one\tURL0\nlost\ntwo\tURL1\n",
        ["one", "two"],
        "ragged: too few fields (skipped)",
    ),
    "not UTF-8": (
        b"caf\xe9\tURL0\ntwo\tURL1\n",
        ["café", "two"],
        "not UTF-8 (read as Windows-1252)",
    ),
    "blank": (b"one\tURL0\n\n  \ntwo\tURL1\n", ["one", "two"], "blank line (skipped)"),
    "NUL": (b"o\0ne\tURL0\ntwo\tURL1\n", ["one", "two"], "NUL byte (removed)"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_read_source_notes_what_is_unusual_without_affecting_other_rows(
    tmp_path: Path, name: str
) -> None:
    data, captions, kind = UNUSUAL[name]
    (tmp_path / "x.tsv").write_bytes(data.replace(b"URL", b"http://a.example/"))
    rows, issues = read(tmp_path / "x.tsv")
    assert [row.captions[0] for row in rows] == captions
    assert [row.url[-1] for row in rows] == ["0", "1"]
    assert issues.counts[kind] >= 1, issues.counts
    assert issues.first[kind].startswith("row ")


def test_read_source_notes_empty_captions(tmp_path: Path) -> None:
    rows = [
        {"image": "1.jpg", "caption": "a cat"},
        {"image": "2.jpg", "caption": " "},
        {"image": "3.jpg", "instruction": "Say:", "response": ""},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    found, issues = read(tmp_path / "x.json")
    assert [(row.image, row.captions) for row in found] == [
        ("1.jpg", ("a cat",)),
        ("2.jpg", ()),
        ("3.jpg", ()),
    ]
    expected = {"empty caption (skipped)": 1, "record with an empty answer (kept)": 1}
    assert issues.counts == expected


@pytest.mark.parametrize("name", ["../../etc/passwd", "train/../../1.jpg"])
def test_read_source_leaves_out_names_outside_their_folder(tmp_path: Path, name: str) -> None:
    rows = [{"image": name, "caption": "x"}, {"image": "1.jpg", "caption": "y"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    found, issues = read(tmp_path / "x.json")
    assert [row.image for row in found] == ["1.jpg"]
    assert issues.counts == {"image path with '..' (skipped)": 1}


def test_read_source_keeps_the_rows_after_an_unclosed_quote(tmp_path: Path) -> None:
    following = [f"http://a.example/{number}.jpg,dog {number}" for number in range(60)]
    lines = ["url,caption", f'{U},"a cat', *following]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    rows, issues = read(tmp_path / "x.csv")
    expected = ['"a cat', *(f"dog {number}" for number in range(60))]
    assert [row.captions[0] for row in rows] == expected
    assert issues.counts == {"unclosed quote (kept as text)": 1}


def test_read_source_reads_a_line_break_inside_quotes_as_one_row(tmp_path: Path) -> None:
    text = f'url,caption\n{U},"a\ncat"\n{V.split("?")[0]},dog\n'
    (tmp_path / "x.csv").write_text(text)
    assert [row.captions[0] for row in read(tmp_path / "x.csv")[0]] == ["a cat", "dog"]


def test_read_source_does_not_join_rows_with_inch_marks(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f'url,caption\n{U},a 5" cat\n{U},a 6" dog\n')
    rows, issues = read(tmp_path / "x.csv")
    assert [row.captions for row in rows] == [('a 5" cat',), ('a 6" dog',)]
    assert not issues.counts


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "x.tsv",
            "a cat\ta dog\n",
            r"no column looks like a URL.*[Ff]irst row: \['a cat', 'a dog'\]",
        ),
        ("x.tsv", f"{U}\t{V}\n", "both columns look like"),
        ("x.csv", "place,words\n1.jpg?,x\n", "no column looks like a URL"),
        ("x.csv", f"url,words\n{U},x\n", "no caption column among url, words"),
        (
            "x.jsonl",
            '{"link_to": "x", "caption": "y"}\n',
            "no url or image column among link_to, caption",
        ),
        ("x.tsv", "", "empty file"),
        (
            "x.tsv",
            f"{U}\ta cat\t0.31\n{V}\ta dog\t0.29\n",
            "every row has 3 fields, but there is no header",
        ),
        ("x.json", '{"captions": ["a"], "image_urls": []}', "0 'image_urls', but 1 'captions'"),
        ("x.json", '{"annotations": [{"image_id": 1, "bbox": []}]}', "captions_.*json"),
    ],
)
def test_read_source_error_says_why_a_file_has_no_usable_rows(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "make_path",
    [
        lambda folder: folder / "gone.tsv",
        lambda folder: folder / "*.nothing",
        lambda folder: folder,
    ],
)
def test_read_source_refuses_a_source_that_is_missing_or_empty(
    tmp_path: Path, make_path: Callable[[Path], Path]
) -> None:
    with pytest.raises(ValueError, match=r"no such file|no file matches|contains nothing"):
        read(make_path(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_read_source_reads_utf_16_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    """\u0a0a consists of two bytes that are line feeds in other encodings."""
    mark = "" if encoding == "utf-16" else "\ufeff"
    text = f"{mark}a c\u0a0at\t{U}\r\na dog\u2028\t{V}"
    (tmp_path / "x.tsv").write_bytes(text.encode(encoding))
    assert read_captions(tmp_path / "x.tsv") == [(U, "a c\u0a0at"), (V, "a dog")]


@pytest.mark.parametrize("name", ["x.tsv.gz", "x.jsonl.gz", "x.parquet"])
def test_read_source_names_a_torn_file(tmp_path: Path, name: str) -> None:
    if name == "x.parquet":
        pq.write_table(pa.table({"url": [U] * 9, "caption": ["a cat"] * 9}), tmp_path / name)
        data = bytearray((tmp_path / name).read_bytes())
        data[10:40] = bytes(30)
        (tmp_path / name).write_bytes(data)
    else:
        lines = b"".join(b'{"url": "%d", "caption": "a cat"}\n' % number for number in range(5000))
        lines = lines.replace(b'{"url"', U.encode() + b"\t")
        (tmp_path / name).write_bytes(gzip.compress(lines)[:-20])
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.csv", "x.json"])
def test_read_source_reads_only_archives_of_one_file(tmp_path: Path, name: str) -> None:
    """An archive of several files is an error, because reading only the first one would lose the others."""
    text = "image,caption\n1.jpg,a cat\n"
    if name == "x.json":
        text = json.dumps([{"image": "1.jpg", "caption": "a cat"}])
    path = tmp_path / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"data/{name}", text)
        archive.writestr(f"__MACOSX/data/._{name}", "about the file")
    assert read_captions(path) == [("1.jpg", "a cat")]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.csv", text)
    with pytest.raises(ValueError, match=r"\.zip: .*2 files"):
        read(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"\.zip: cannot be read"):
        read(path)


@pytest.mark.parametrize("name", ["x.xlsx", "x.pkl", "x.jpg"])
def test_read_source_says_that_a_file_is_not_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04\x14\x00\x06\x00image,caption\n\xff\xd8")
    with pytest.raises(ValueError, match=f"{name}: not a text file.*CSV"):
        read(tmp_path / name)


# ---- lists without captions ----

URL_CHARACTERS = st.sampled_from("ab1,;=&?/.%_-")
LISTED_URLS = st.text(URL_CHARACTERS, max_size=12).map(
    lambda path: f"http://a.example/{path}/1.jpg"
)


@pytest.mark.medium
@given(st.lists(LISTED_URLS, min_size=1, max_size=20))
@settings(max_examples=num_examples(100), deadline=None)
def test_read_source_reads_every_line_of_a_list_as_one_url(urls: list[str]) -> None:
    """This is true for each form of a list, even if the URLs contain the separators of tables."""
    lines = "".join(f"{url}\n" for url in urls)
    forms = {
        "x.txt": lines,
        "header.txt": f"url\n{lines}",
        "x.json": json.dumps(urls),
        "x.jsonl": "".join(f"{json.dumps(url)}\n" for url in urls),
        "objects.jsonl": "".join(json.dumps({"url": url}) + "\n" for url in urls),
    }
    for name, text in forms.items():
        rows, _ = read_bytes(name, text.encode())
        assert [(row.url, row.image, row.captions) for row in rows] == [
            (url, "", ()) for url in urls
        ], name


@pytest.mark.parametrize(
    ("lines", "urls", "issues"),
    [
        (["# my list, sorted", U, "and a remark", U], [U, U], 2),
        (['"http://a.example/1,2.jpg"', f'"{U}"'], ["http://a.example/1,2.jpg", U], 0),
        ([U, "http://a.example/my cat.jpg"], [U, "http://a.example/my cat.jpg"], 1),
    ],
)
def test_read_source_reads_lists_that_people_write(
    tmp_path: Path, lines: list[str], urls: list[str], issues: int
) -> None:
    (tmp_path / "x.txt").write_text("\n".join(lines))
    rows, found = read(tmp_path / "x.txt")
    assert [row.url for row in rows] == urls
    assert sum(found.counts.values()) == issues


def test_read_source_refuses_urls_with_captions_after_a_space(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"{U} a cat\n{U} a dog\n")
    with pytest.raises(ValueError, match=r"x\.txt"):
        read(tmp_path / "x.txt")


@pytest.mark.parametrize("header", ["image,link,caption", "image_url,url,caption"])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_read_source_prefers_the_url_of_the_image_to_that_of_its_page(
    tmp_path: Path, header: str, name: str
) -> None:
    values = [U, "http://shop.example/page", "a cat"]
    text = f"{header}\n{','.join(values)}\n"
    if name == "x.jsonl":
        text = json.dumps(dict(zip(header.split(","), values)))
    (tmp_path / name).write_text(text)
    (row,), _ = read(tmp_path / name)
    assert (row.image, row.url, row.captions) == ("", U, ("a cat",))


def test_read_source_reads_a_list_of_image_names(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("cats/1.jpg\ncats/2.PNG\n")
    assert read_captions(tmp_path / "x.txt") == [("cats/1.jpg",), ("cats/2.PNG",)]


def test_read_source_does_not_guess_whether_a_word_is_a_caption(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("http://a.example/photo,large\nhttp://a.example/photo,small\n")
    with pytest.raises(ValueError, match=r"x\.txt.*url,caption"):
        read(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("http://a.example/1.jpg,cat\nhttp://a.example/2.jpg,n0144\n")
    assert [row.captions for row in read(tmp_path / "x.txt")[0]] == [("cat",), ("n0144",)]


@pytest.mark.parametrize("header", ["url,caption", "caption,url"])
def test_read_source_keeps_the_commas_of_a_url_in_a_table(tmp_path: Path, header: str) -> None:
    url, caption = "http://a.example/w_303,h_170/1.jpg", "a cat, a dog"
    line = f"{url},{caption}" if header == "url,caption" else f"{caption},{url}"
    (tmp_path / "x.csv").write_text(f"{header}\n{line}\n{line}\n")
    rows, issues = read(tmp_path / "x.csv")
    assert [(row.url, row.captions) for row in rows] == [(url, (caption,))] * 2
    assert issues.counts["',' inside a URL (kept)"] == 2


# ---- tables from spreadsheets ----


@pytest.mark.parametrize(
    "text",
    [
        'image;caption\n1.jpg;a cat, a dog\n2.jpg;"a; b"\n',
        'sep=;\nimage;caption\n1.jpg;a cat, a dog\n2.jpg;"a; b"\n',
        "sep=|\nimage|caption\n1.jpg|a cat, a dog\n2.jpg|a; b\n",
        '1.jpg;a cat, a dog\n2.jpg;"a; b"\n',
    ],
)
def test_read_source_reads_csv_with_semicolons(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    assert read_captions(tmp_path / "x.csv") == [("1.jpg", "a cat, a dog"), ("2.jpg", "a; b")]


@pytest.mark.parametrize("name", ["1.jpg", U])
def test_read_source_reads_column_names_in_any_language_as_a_header(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "x.csv").write_text(f"Bild;Beschreibung\n{name};eine Katze\n{name};ein Hund\n")
    rows, issues = read(tmp_path / "x.csv")
    assert [row.image or row.url for row in rows] == [name, name]
    assert sum(issues.counts.values()) == 1, "the line that is read as a header is noted"
    # A line after the first one is not a header, even if it has no image name.
    (tmp_path / "x.csv").write_text(f"{name};a\nBild;b\n{name};c\n")
    assert len(read(tmp_path / "x.csv")[0]) == 3


def test_read_source_keeps_semicolons_in_captions_of_a_csv_with_commas(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1.jpg,a cat; a dog\n2.jpg,b; c\n")
    assert read_captions(tmp_path / "x.csv") == [("1.jpg", "a cat; a dog"), ("2.jpg", "b; c")]


CELLS = st.lists(st.sampled_from(["a", " ", '"', ",", ";", "\n", "1", "猫"]), max_size=60).map(
    "".join
)


@pytest.mark.medium
@given(st.lists(CELLS, min_size=1, max_size=6), st.sampled_from([",", ";"]), st.integers(0, 2000))
@settings(max_examples=num_examples(150), deadline=None)
def test_read_source_reads_what_a_csv_writer_has_written(
    cells: list[str], separator: str, long_lines: int
) -> None:
    """RFC 4180: a quoted cell may have any number of lines."""
    captions = [f"x{cell}x" for cell in [*cells, "line\n" * long_lines]]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerow(["image", "caption"])
    for index, caption in enumerate(captions):
        writer.writerow([f"{index}.jpg", caption])
    rows, _ = read_bytes("x.csv", text.getvalue().encode())
    assert [row.image for row in rows] == [f"{index}.jpg" for index in range(len(captions))]
    expected = [" ".join(caption.split()) for caption in captions]
    assert [" ".join(row.captions[0].split()) for row in rows] == expected


# ---- identity of images, and images or captions without a counterpart ----


def test_read_source_notes_images_of_coco_without_an_annotation(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)],
        "annotations": [{"image_id": 1, "caption": "a dog"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(coco))
    rows, issues = read(tmp_path / "x.json")
    assert [row.image for row in rows] == ["1.jpg"]
    assert issues.counts == {"image without an annotation (skipped)": 2}


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")])
def test_read_source_skips_ambiguous_image_ids_of_coco(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    coco = {
        "images": [
            {"id": 1, "file_name": "train/cat.jpg"},
            {"id": 1, "file_name": "val/boat.jpg"},
            {"id": 2, "file_name": "2.jpg"},
            {"id": 2, "file_name": "2.jpg"},
        ],
        "annotations": [
            {"image_id": 1, "caption": "a cat"},
            {"image_id": 1, "caption": "a boat"},
            {"image_id": 2, "caption": "a dog"},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps({key: coco[key] for key in order}))
    rows, issues = read(tmp_path / "x.json")
    assert [(row.image, row.captions) for row in rows] == [("2.jpg", ("a dog",))]
    assert issues.counts == {
        "image with the id of a different image (skipped)": 2,
        "annotation with an id of several images (skipped)": 2,
        "image listed twice (kept once)": 1,
    }


def test_read_source_accepts_a_null_caption_anywhere_in_coco(tmp_path: Path) -> None:
    captions = [None, "a cat", None]
    coco = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "caption": caption} for caption in captions],
    }
    (tmp_path / "x.json").write_text(json.dumps(coco))
    rows, issues = read(tmp_path / "x.json")
    assert [row.captions for row in rows] == [(), ("a cat",), ()]
    assert issues.counts == {"empty caption (skipped)": 2}


def test_read_source_keeps_the_keys_of_shards_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,caption\n0.tar#000,a cat\n0.tar#001,a dog\n")
    assert read_captions(tmp_path / "x.csv") == [("0.tar#000", "a cat"), ("0.tar#001", "a dog")]


def test_read_source_of_metadata_in_several_folders_keeps_their_images_apart(
    tmp_path: Path,
) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.csv").write_text(f"file_name,text\n1.jpg,{name} here\n")
    expected = [("cats/1.jpg", "cats here"), ("dogs/1.jpg", "dogs here")]
    assert read_captions(tmp_path) == expected
    assert read_captions(tmp_path / "*" / "metadata.csv") == expected


def test_read_source_of_a_folder_notes_what_it_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "part.tsv.gz").write_bytes(gzip.compress(f"a cat\t{U}\n".encode()))
    (tmp_path / "other.jsonl").write_text("{}")
    (tmp_path / "more").mkdir()
    rows, issues = read(tmp_path)
    assert [row.url for row in rows] == [U]
    assert issues.counts == {"another file or folder in the source (not read)": 2}
    (tmp_path / "part.tsv.gz").unlink()
    (tmp_path / "more" / "metadata.csv").write_text("file_name,text\n1.jpg,a cat\n")
    (tmp_path / "more" / "1.jpg").write_bytes(b"x")
    (tmp_path / "more" / "2.jpg").write_bytes(b"x")
    assert read(tmp_path)[1].counts == {"image without a row of metadata (skipped)": 1}


@pytest.mark.parametrize("last", ["part-029.txt", "z.tsv"])
def test_read_source_of_a_folder_reads_every_part(tmp_path: Path, last: str) -> None:
    for number in range(29):
        (tmp_path / f"part-{number:03d}.txt").write_text(f"cat {number}\thttp://a/{number}.jpg\n")
    (tmp_path / last).write_text("the last\thttp://a/29.jpg\n")
    (tmp_path / "zz_readme.txt").write_text("Nothing to see here.\n")
    rows, issues = read(tmp_path)
    assert [row.url for row in rows] == [f"http://a/{number}.jpg" for number in range(30)]
    assert issues.counts == {"another file or folder in the source (not read)": 1}


def test_read_source_of_a_folder_opens_few_texts_that_are_not_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("Nothing to see here.\n")
    opened = []
    read_any = sources._read_any

    def count_and_read(source: str, *arguments: Any) -> Iterator[SourceRow]:
        opened.append(source)
        return read_any(source, *arguments)

    monkeypatch.setattr(sources, "_read_any", count_and_read)
    with pytest.raises(ValueError, match="contains no metadata file"):
        read(tmp_path)
    assert len(opened) < 30


# ---- JSON of other forms ----


def test_read_source_reads_json_lines_in_a_json_file(tmp_path: Path) -> None:
    rows = [{"image": f"{number}.jpg", "caption": "a cat"} for number in range(3)]
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, rows)))
    assert read_captions(tmp_path / "x.json") == [(f"{n}.jpg", "a cat") for n in range(3)]


def test_read_source_reads_captions_by_image_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a.jpg": ["a dog", "dog"], U: "a cat"}))
    assert read_captions(tmp_path / "x.json") == [
        ("a.jpg", "a dog"),
        ("a.jpg", "dog"),
        (U, "a cat"),
    ]


def test_read_source_notes_image_names_without_a_caption(tmp_path: Path) -> None:
    values = {
        "a.jpg": {"caption": "x"},
        "b.jpg": {"train_resolution": [512, 512]},
        "c.jpg": None,
        U: {"text": "y"},
        "info": {"year": 2024},
    }
    (tmp_path / "x.json").write_text(json.dumps(values))
    rows, issues = read(tmp_path / "x.json")
    assert [(row.image, *row.captions) for row in rows] == [("a.jpg", "x")]
    assert issues.counts == {"image name without a caption (skipped)": 3}
    assert "b.jpg" in issues.first["image name without a caption (skipped)"]


def test_read_source_names_the_keys_of_json_without_captions(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"items": [{"image": "a.jpg", "caption": "x"}]}))
    with pytest.raises(ValueError, match=r"x\.json.*'items'.*\"data\""):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "X.TAR.BZ2"])
def test_read_source_says_how_to_read_a_compressed_tar(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}.*gunzip"):
            read(source)


# ---- arbitrary bytes ----

PIECES = [
    b"\t",
    b",",
    b'"',
    b'""',
    b"|",
    b"\n",
    b"\r\n",
    b"\r",
    b"\0",
    b" ",
    b"http://a.example/1.jpg",
    b"1.jpg",
    b"a cat",
    b"\xe9",
    "猫".encode(),
    b"#0",
    b"| 0| ",
    b"url",
    b"caption",
    b"image",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b'"a"',
    b'"url"',
    b'"caption"',
    b'"images"',
    b'"annotations"',
    b'"image_id"',
    b'"id"',
    b"null",
    b"1",
    b"1e999",
    b'"\\ud83d"',
    b"9" * 5000,
    b"[" * 3000,
    b"\x1f\x8b\x08",
]
BYTES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=5), max_size=30).map(b"".join)
FILE_NAMES = [
    "x.tsv",
    "x.csv",
    "x.txt",
    "x.json",
    "x.jsonl",
    "x.parquet",
    "x.tar",
    "x.tsv.gz",
    "x.json.xz",
    "x.jsonl.bz2",
]


def read_bytes(name: str, data: bytes) -> tuple[list[SourceRow], ParseIssues]:
    """Return the rows and issues of a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return read(path)


def count_left_out(issues: ParseIssues) -> int:
    """Return how many rows were left out. A row with an empty caption is kept: its image may have other captions."""
    counts = [
        count
        for kind, count in issues.counts.items()
        if kind.endswith("(skipped)") and not kind.startswith("empty")
    ]
    return sum(counts)


@pytest.mark.parametrize("name", FILE_NAMES)
@given(data=BYTES)
@settings(max_examples=num_examples(100), deadline=None)
def test_read_source_of_any_bytes_yields_rows_or_names_the_file(name: str, data: bytes) -> None:
    try:
        read_bytes(name, data)
    except ValueError as error:
        assert name in str(error)


LINE_PIECES = [b"\t", b'"', b"\r", b"\0", b" ", b"a", b"\xe9", b"|", b",", b"1.jpg"]
LINES = st.lists(st.lists(st.sampled_from(LINE_PIECES), max_size=9).map(b"".join), max_size=12)


@pytest.mark.medium
@given(LINES, st.sampled_from([b"", b"x", b'"', b'x\t"']))
@example([b'"', b'"'], b"")
@settings(max_examples=num_examples(300), deadline=None)
def test_read_source_accounts_for_every_line_of_a_tsv(lines: list[bytes], start: bytes) -> None:
    """Each line contains a mark: the mark is in a row, or the line is among those that were left out."""
    marked = [start + b"@%d@" % index + line for index, line in enumerate(lines)]
    known = [f"{U}\ta cat".encode()] * 20
    rows, issues = read_bytes("x.tsv", b"\n".join([*known, *marked, *known]))
    joined = " ".join(field for row in rows for field in (*row.captions, row.url))
    missed = [index for index in range(len(lines)) if f"@{index}@" not in joined]
    assert len(missed) <= count_left_out(issues)
    assert len([row for row in rows if row == (row.number, "", U, ("a cat",), "", None, 0)]) >= 40


@pytest.mark.medium
@given(st.lists(CELLS, min_size=1, max_size=6), st.booleans())
@settings(max_examples=num_examples(150), deadline=None)
def test_read_source_reads_what_pandas_writes_with_tabs(
    cells: list[str], captions_first: bool
) -> None:
    """`to_csv(sep="\\t")` and spreadsheets that save tab-delimited text quote cells with line breaks or quotes."""
    captions = [f"x{cell.replace(chr(9), ' ')}x" for cell in cells]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_MINIMAL)
    columns = ["image", "caption"]
    writer.writerow(columns[::-1] if captions_first else columns)
    for index, caption in enumerate(captions):
        row = [f"{index}.jpg", caption]
        writer.writerow(row[::-1] if captions_first else row)
    rows, _ = read_bytes("x.tsv", text.getvalue().encode())
    assert [row.image for row in rows] == [f"{index}.jpg" for index in range(len(captions))]
    expected = [" ".join(caption.split()) for caption in captions]
    assert [" ".join(row.captions[0].split()) for row in rows] == expected


# Name -> (rows of caption and URL, their captions). In lists of captions, quotes are ordinary text.
STRAY_QUOTES: dict[str, tuple[str, list[str]]] = {
    "lone": ('"one\tURL0\ntwo\tURL1\n', ['"one', "two"]),
    "lone in two rows": ('"one\tURL0\ntwo"\tURL1\n', ['"one', 'two"']),
    "one row quoted": ('"one"\tURL0\ntwo\tURL1\n', ['"one"', "two"]),
    "quoted words": ('"one" and "more"\tURL0\ntwo\tURL1\n', ['"one" and "more"', "two"]),
    "empty quotes": ('""\tURL0\ntwo ""\tURL1\n', ['""', 'two ""']),
    "inches": ('5" x 7"\tURL0\ntwo 8""\tURL1\n', ['5" x 7"', 'two 8""']),
}


@pytest.mark.parametrize("captions_first", [True, False])
@pytest.mark.parametrize("name", STRAY_QUOTES)
def test_read_source_keeps_stray_quotes_of_a_tsv_as_text(
    tmp_path: Path, name: str, captions_first: bool
) -> None:
    text, captions = STRAY_QUOTES[name]
    lines = text.replace("URL", "http://a.example/").splitlines()
    if not captions_first:
        lines = ["\t".join(line.split("\t")[::-1]) for line in lines]
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    rows, _ = read(tmp_path / "x.tsv")
    assert [row.captions[0] for row in rows] == captions


@pytest.mark.medium
@given(LINES, st.booleans())
@example([b'"', b'a "'], False)  # inch marks are not quotes, even if there are two
@settings(max_examples=num_examples(300), deadline=None)
def test_read_source_accounts_for_every_line_of_a_csv(lines: list[bytes], quoted: bool) -> None:
    """Each line contains a mark: the mark is in a row, or the line is among those that were left out."""
    start = b'"' if quoted else b"5"
    text = [b"caption,url"]
    for index, line in enumerate(lines):
        text.append(start + b"@%d@" % index + line + b"," + U.encode())
    text.append(b"the end," + U.encode())
    rows, issues = read_bytes("x.csv", b"\n".join(text))
    fields = [field for row in rows for field in (*row.captions, row.url)]
    joined = " ".join(fields)
    missed = [index for index in range(len(lines)) if f"@{index}@" not in joined]
    assert len(missed) <= count_left_out(issues)
    assert rows[-1].captions == ("the end",)


VALUES = [
    "1.jpg",
    U,
    "a cat",
    "",
    "\ud83d",
    "\0",
    "../x",
    "/abs/1.jpg",
    7,
    None,
    True,
    1.5,
    [],
    {},
    ["a"],
    {"raw": "a"},
]
KEYS = [
    "url",
    "image",
    "caption",
    "sentences",
    "filename",
    "image_id",
    "id",
    "file_name",
    "instruction",
    "responses",
    "response",
    "conversations",
    "split",
]
VALUE = st.sampled_from(VALUES)
OBJECT = (
    st.dictionaries(st.sampled_from(KEYS), VALUE | st.lists(VALUE, max_size=3), max_size=5) | VALUE
)


@pytest.mark.medium
@pytest.mark.parametrize("form", ["json", "jsonl", "annotations"])
@given(values=st.lists(OBJECT, max_size=8))
@settings(max_examples=num_examples(200), deadline=None)
def test_read_source_accounts_for_every_row_of_json(form: str, values: list[Any]) -> None:
    first = {"image": "0.jpg", "caption": "the first"}
    if form == "jsonl":
        name, text = "x.jsonl", "\n".join(map(json.dumps, [first, *values]))
    elif form == "json":
        name, text = "x.json", json.dumps([first, *values])
    else:
        coco = {
            "annotations": [{"image_id": 1, **first}, *values],
            "images": [{"id": 1, "file_name": "1.jpg"}],
        }
        name, text = "x.json", json.dumps(coco)
    rows, issues = read_bytes(name, text.encode())
    assert len(rows) + count_left_out(issues) == 1 + len(values)
    for row in rows:
        assert all(row.captions)
        assert json.dumps(row._asdict(), ensure_ascii=False).encode()


@pytest.mark.parametrize("columns", [Columns(image="img"), Columns(caption="title")])
def test_read_source_notes_columns_that_records_do_not_have(
    tmp_path: Path, columns: Columns
) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}]
    record = {"img": "1.jpg", "title": "a dog", "conversations": turns}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    for columns_passed, num_issues in ((columns, 1), (Columns(), 0)):
        issues = ParseIssues()
        (row,) = read_source(str(tmp_path / "x.jsonl"), issues, columns_passed)
        assert row.record == record
        assert len(issues.counts) == num_issues
