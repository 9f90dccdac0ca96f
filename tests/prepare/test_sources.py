"""Every caption source in its exact form, and what is strange in real files."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava_simplified.data.records import open_records
from llava_simplified.data.shards import ShardWriter, read_shard_image
from llava_simplified.prepare.sources import Columns, ParseIssues, SourceRow, read_source


def read(path: Path, **columns: str) -> tuple[list[SourceRow], ParseIssues]:
    odd = ParseIssues()
    return list(read_source(str(path), odd, Columns(**columns))), odd


def image_captions(path: Path, **columns: str) -> list[tuple[str, ...]]:
    return [(row.image or row.url, *row.captions) for row in read(path, **columns)[0]]


U = "http://a.example/1.jpg"
V = "https://b.example/2.jpg?w=1,2"

TEXTS = {
    "cc3m.tsv": (f"a cat\t{U}\na dog\t{V}\n", [(U, "a cat"), (V, "a dog")]),
    "cc12m.tsv": (f"{U}\ta cat\n{V}\ta dog\n", [(U, "a cat"), (V, "a dog")]),
    "flickr30k.token": ("1.jpg#0\tA cat .\n1.jpg#1\tA pet .\n", [("1.jpg", "A cat ."), ("1.jpg", "A pet .")]),
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
    "sbu.json": (json.dumps({"image_urls": [U, V], "user_ids": ["x", "y"], "captions": ["c", "d"]}),
                 [(U, "c"), (V, "d")]),
    "coco.json": (json.dumps({
        "info": {"year": 2014},
        "images": [{"id": 9, "file_name": "COCO_9.jpg", "coco_url": U}, {"id": 8, "file_name": "8.jpg"}],
        "licenses": [{"id": 1}],
        "annotations": [{"image_id": 8, "id": 1, "caption": "A dog. "}, {"image_id": 9, "id": 2, "caption": "A cat."}],
    }), [("8.jpg", "A dog."), ("COCO_9.jpg", "A cat.")]),
    "late.json": (json.dumps({  # annotations before images
        "annotations": [{"image_id": 8, "caption": "A dog."}], "images": [{"id": 8, "file_name": "8.jpg"}],
    }), [("8.jpg", "A dog.")]),
    "karpathy.json": (json.dumps({"dataset": "coco", "images": [
        {"filepath": "val2014", "filename": "1.jpg", "split": "test", "imgid": 0,
         "sentences": [{"raw": "A cat.", "tokens": ["a", "cat"]}, {"raw": "A pet."}]}]}),
        [("val2014/1.jpg", "A cat.", "A pet.")]),
    "tutorial.json": (json.dumps([{"image": "1.jpg", "instruction": "Say:", "response": "a cat"}]), [("1.jpg", "a cat")]),
    "llava.json": (json.dumps([{"id": "x", "image": "1.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]}]), [("1.jpg", "a cat")]),
    "rows.jsonl": (json.dumps({"url": U, "caption": "a cat"}) + "\n", [(U, "a cat")]),
    "many.jsonl": (json.dumps({"file_name": "1.jpg", "captions": ["a cat", "a pet"]}) + "\n", [("1.jpg", "a cat", "a pet")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_each_form_is_known_without_being_told(tmp_path: Path, name: str) -> None:
    text, expected = TEXTS[name]
    (tmp_path / name).write_text(text, "utf-8")
    assert image_captions(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (("URL", "TEXT", "hash", "punsafe"), (U, "a cat", 1, 0.1)),  # LAION-2B
        (("uid", "url", "text"), ("u", U, "a cat")),  # DataComp
        (("url", "alt_text"), (U, "a cat")),
    ],
)
def test_parquet_of_urls(tmp_path: Path, columns: tuple, row: tuple) -> None:
    pq.write_table(
        pa.table({name: [value] for name, value in zip(columns, row)}), tmp_path / "part-0.parquet"
    )
    assert image_captions(tmp_path / "part-0.parquet") == [(U, "a cat")]
    assert image_captions(tmp_path) == [(U, "a cat")], "a folder of parts"
    assert image_captions(tmp_path / "part-*.parquet") == [(U, "a cat")], "a glob"


def test_parquet_with_pictures_in_it_names_the_row(tmp_path: Path) -> None:
    pictures = [{"bytes": b"x", "path": "1.jpg"}, {"bytes": b"y", "path": "2.jpg"}]
    pq.write_table(
        pa.table({"image": pictures, "text": ["a cat", "a dog"]}), tmp_path / "train.parquet"
    )
    assert image_captions(tmp_path / "train.parquet") == [
        ("train.parquet#0", "a cat"),
        ("train.parquet#1", "a dog"),
    ]


def test_other_bytes_of_a_parquet_file_are_no_pictures(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": [U], "text": ["a cat"], "phash": [b"123"]}), tmp_path / "laion.parquet"
    )
    assert read(tmp_path / "laion.parquet")[0] == [SourceRow(0, "", U, ("a cat",))]
    both = {"embedding": [b"123"], "image": [{"bytes": b"x", "path": "1.jpg"}], "text": ["a cat"]}
    pq.write_table(pa.table(both), tmp_path / "train.parquet")
    assert read_shard_image(tmp_path / "train.parquet", "0") == b"x"
    pq.write_table(pa.table({"text": ["a cat"], "embedding": [b"123"]}), tmp_path / "no.parquet")
    with pytest.raises(ValueError, match="no url or image column among text"):
        read(tmp_path / "no.parquet")
    with pytest.raises(ValueError, match="no column with images"):
        read_shard_image(tmp_path / "no.parquet", "0")


def test_karpathys_sentences_as_plain_texts(tmp_path: Path) -> None:
    """As his split stands on the hub, in Parquet."""
    columns = {
        "filepath": ["val2014"],
        "filename": ["1.jpg"],
        "sentences": [["A cat.", "A pet."]],
        "url": [U],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet")[0] == [
        SourceRow(0, "val2014/1.jpg", U, ("A cat.", "A pet."))
    ]


def test_a_name_with_brackets_is_a_file_and_a_question_mark_of_a_url_no_glob(
    tmp_path: Path,
) -> None:
    (tmp_path / "train[1].tsv").write_text(f"a cat\t{U}\n")
    assert image_captions(tmp_path / "train[1].tsv") == [(U, "a cat")]
    with fsspec.open("memory://train.jsonl?download=true", "w") as file:
        file.write(json.dumps({"url": U, "caption": "a cat"}))
    rows = read_source("memory://train.jsonl?download=true", ParseIssues(), Columns())
    assert [(row.url, row.captions) for row in rows] == [(U, ("a cat",))]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_a_folder_of_a_download_is_its_records(tmp_path: Path, name: str) -> None:
    """Not its manifests, which name the pictures of shards."""
    (tmp_path / name).write_text(
        f"{'[' * (name[-1] == 'n')}{json.dumps(RECORD)}{']' * (name[-1] == 'n')}"
    )
    pq.write_table(
        pa.table({"key": ["0"], "status": ["ok"], "captions": [["x"]]}), tmp_path / "00000.parquet"
    )
    assert image_captions(tmp_path) == [("images/0_7.jpg", "a cat")]
    assert open_records(tmp_path)[0].images == ("images/0_7.jpg",)


RECORD = {"image": "images/0_7.jpg", "instruction": "Say:", "response": "a cat"}


def test_imagefolder_with_metadata(tmp_path: Path) -> None:
    (tmp_path / "train" / "sub").mkdir(parents=True)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\nsub/1.jpg,a cat\n")
    assert image_captions(tmp_path) == [("train/sub/1.jpg", "a cat")]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_webdataset_tar_with_texts_or_json(tmp_path: Path) -> None:
    members = {
        "0.jpg": b"x",
        "0.txt": b"a cat",
        "1.png": b"y",
        "1.json": b'{"caption": "a dog"}',
        "2.jpg": b"z",
    }
    path = tar_of(tmp_path / "00000.tar", members)
    rows, odd = read(path)
    assert [(row.image, *row.captions) for row in rows] == [
        ("00000.tar#0", "a cat"),
        ("00000.tar#1", "a dog"),
    ]
    assert odd.counts == {"sample without a caption (left out)": 1}


def test_several_captions_of_a_sample_are_apart_without_the_manifest_too(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "00000.tar")
    for key, captions in (("0", ("a cat", "a pet")), ("1", ("a dog",))):
        writer.add(key, b"x", "jpg", captions, {"captions": captions})
    writer.close()
    assert image_captions(tmp_path / "00000.tar") == [
        ("00000.tar#0", "a cat", "a pet"),
        ("00000.tar#1", "a dog"),
    ]


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for folder, caption in (("a", b"a cat"), ("b", b"a dog")):
        (tmp_path / folder).mkdir()
        tar_of(tmp_path / folder / "0.tar", {"1.jpg": b"x", "1.txt": caption})
    assert image_captions(tmp_path / "*" / "0.tar") == [
        ("a/0.tar#1", "a cat"),
        ("b/0.tar#1", "a dog"),
    ]
    assert image_captions(tmp_path / "a" / "*.tar") == [("0.tar#1", "a cat")]


def test_captions_of_tars_put_together_stay_with_their_pictures(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("1.jpg", b"x"), ("1.txt", b"a cat"), ("2.jpg", b"y"), ("2.txt", b"a dog"),
                           ("1.jpg", b"z"), ("1.txt", b"a bird")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert image_captions(tmp_path / "x.tar") == [("x.tar#1", "a cat"), ("x.tar#2", "a dog")]
    assert read_shard_image(tmp_path / "x.tar", "1") == b"x"


def test_a_tar_far_away_is_refused() -> None:
    with pytest.raises(ValueError, match="copy it first"):
        list(read_source("memory://x.tar", ParseIssues(), Columns()))


def test_the_manifest_of_img2dataset_is_used(tmp_path: Path) -> None:
    tar_of(tmp_path / "00000.tar", {"000000000.jpg": b"x", "000000000.txt": b"a cat"})
    rows = {
        "key": ["000000000", "000000001"],
        "status": ["success", "failed_to_download"],
        "caption": ["a cat", "a dog"],
    }
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    assert image_captions(tmp_path) == [("00000.tar#000000000", "a cat")]


def test_gzip_is_seen_through(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv.gz").write_bytes(gzip.compress(f"a cat\t{U}\n".encode()))
    assert image_captions(tmp_path / "cc3m.tsv.gz") == [(U, "a cat")]


ODD: dict[str, tuple[bytes, list[str], str]] = {
    "byte order mark": (b"\xef\xbb\xbfone\tURL0\ntwo\tURL1\n", ["one", "two"], "byte order mark (removed)"),
    "CRLF": (b"one\tURL0\r\ntwo\tURL1\r\n", ["one", "two"], "CRLF line end (removed)"),
    "embedded tab": (b"one\tand more\tURL0\ntwo\tURL1\n", ["one and more", "two"], "'\\t' inside a caption (kept)"),
    "quotes": (b'"one\tURL0\ntwo" "\tURL1\n', ['"one', 'two" "'], "quote character (kept as text)"),
    "ragged": (b"one\tURL0\nlost\ntwo\tURL1\n", ["one", "two"], "ragged: too few fields (left out)"),
    "not UTF-8": (b"caf\xe9\tURL0\ntwo\tURL1\n", ["café", "two"], "not UTF-8 (read as Windows-1252)"),
    "blank": (b"one\tURL0\n\n  \ntwo\tURL1\n", ["one", "two"], "blank line (left out)"),
    "NUL": (b"o\0ne\tURL0\ntwo\tURL1\n", ["one", "two"], "NUL byte (removed)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_oddity_is_counted_named_and_costs_no_neighbour(tmp_path: Path, name: str) -> None:
    data, captions, kind = ODD[name]
    (tmp_path / "x.tsv").write_bytes(data.replace(b"URL", b"http://a.example/"))
    rows, odd = read(tmp_path / "x.tsv")
    assert [row.captions[0] for row in rows] == captions
    assert [row.url[-1] for row in rows] == ["0", "1"]
    assert odd.counts[kind] >= 1, odd.counts
    assert odd.first[kind].startswith("row ")


def test_an_empty_caption_is_noted(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", "caption": "a cat"}, {"image": "2.jpg", "caption": " "}]
    rows.append({"image": "3.jpg", "instruction": "Say:", "response": ""})
    (tmp_path / "x.json").write_text(json.dumps(rows))
    read_rows, odd = read(tmp_path / "x.json")
    assert [(row.image, row.captions) for row in read_rows] == [
        ("1.jpg", ("a cat",)),
        ("2.jpg", ()),
        ("3.jpg", ()),
    ]
    assert odd.counts == {"empty caption (left out)": 1, "record with an empty answer (kept)": 1}


@pytest.mark.parametrize("name", ["../../etc/passwd", "train/../../1.jpg"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.json").write_text(
        json.dumps([{"image": name, "caption": "x"}, {"image": "1.jpg", "caption": "y"}])
    )
    rows, odd = read(tmp_path / "x.json")
    assert [row.image for row in rows] == ["1.jpg"]
    assert odd.counts == {"image outside its folder, '..' (left out)": 1}


def test_a_quote_that_never_closes_costs_one_csv_row(tmp_path: Path) -> None:
    lines = [
        "url,caption",
        f'{U},"a cat',
        *(f"http://a.example/{i}.jpg,dog {i}" for i in range(60)),
    ]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    rows, odd = read(tmp_path / "x.csv")
    assert [row.captions[0] for row in rows] == ['"a cat', *(f"dog {i}" for i in range(60))]
    assert odd.counts == {"quote that never closes (kept as text)": 1}


def test_a_line_break_inside_csv_quotes_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f'url,caption\n{U},"a\ncat"\n{V.split("?")[0]},dog\n')
    assert [row.captions[0] for row in read(tmp_path / "x.csv")[0]] == ["a cat", "dog"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.tsv", "a cat\ta dog\n", r"no field looks like a URL.*first row: \['a cat', 'a dog'\]"),
        ("x.tsv", f"{U}\t{V}\n", "both fields look like an image's place"),
        ("x.csv", "place,words\n1.jpg?,x\n", "no field looks like a URL"),
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
            "3 fields in every row, but no line of names",
        ),
        ("x.json", '{"captions": ["a"], "image_urls": []}', "0 'image_urls', but 1 'captions'"),
        ("x.json", '{"annotations": [{"image_id": 1, "bbox": []}]}', "not the captions file"),
    ],
)
def test_a_missing_or_ambiguous_column_is_an_error_with_the_first_row(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"place,words\n{U},a cat\n")
    assert image_captions(tmp_path / "x.csv", url="place", caption="words") == [(U, "a cat")]
    with pytest.raises(ValueError, match="no column 'wrong'; the columns are place, words"):
        read(tmp_path / "x.csv", url="wrong", caption="words")


@pytest.mark.parametrize("make", [lambda p: p / "gone.tsv", lambda p: p / "*.nothing", lambda p: p])
def test_nothing_there_is_said(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(ValueError, match=r"no such file|no file matches|holds nothing"):
        read(make(tmp_path))


def test_utf_16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(f"a cat\t{U}\n", "utf-16")
    with pytest.raises(ValueError, match="make it UTF-8 first"):
        read(tmp_path / "x.tsv")


# ---- any bytes at all

BYTES = st.lists(
    st.sampled_from(
        [b"\t", b",", b'"', b'""', b"|", b"\n", b"\r\n", b"\r", b"\0", b" ", b"http://a.example/1.jpg", b"1.jpg", b"a cat", b"\xe9",
         "猫".encode(), b"#0", b"| 0| ", b"url", b"caption", b"image", b"\xef\xbb\xbf", b"\xff\xfe", b"{", b"}", b"[", b"]", b":",
         b'"a"', b'"url"', b'"caption"', b'"images"', b'"annotations"', b'"image_id"', b'"id"', b"null", b"1", b"1e999", b'"\\ud83d"',
         b"9" * 5000, b"[" * 3000, b"\x1f\x8b\x08"]
    ) | st.binary(max_size=5),
    max_size=30,
).map(b"".join)  # fmt: skip
FORMS = [
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
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        return read(Path(folder) / name)


@pytest.mark.parametrize("name", FORMS)
@given(data=BYTES)
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_rows_or_an_error_that_names_the_file(name: str, data: bytes) -> None:
    try:
        read_bytes(name, data)
    except ValueError as error:
        assert name in str(error)


@pytest.mark.parametrize("name", ["x.tsv.gz", "x.jsonl.gz", "x.parquet"])
def test_a_torn_file_is_named(tmp_path: Path, name: str) -> None:
    lines = b"".join(b'{"url": "%d", "caption": "a cat"}\n' % i for i in range(5000))
    if name == "x.parquet":
        pq.write_table(pa.table({"url": [U] * 9, "caption": ["a cat"] * 9}), tmp_path / name)
        whole = bytearray((tmp_path / name).read_bytes())
        whole[10:40] = bytes(30)
        (tmp_path / name).write_bytes(whole)
    else:
        (tmp_path / name).write_bytes(
            gzip.compress(lines.replace(b'{"url"', U.encode() + b"\t"))[:-20]
        )
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


def left_out(odd: ParseIssues) -> int:
    """Rows; of an empty caption the row stays, as its picture may have others."""
    return sum(
        n for kind, n in odd.counts.items() if kind.endswith("(left out)") and kind[:5] != "empty"
    )


LINE = st.lists(
    st.sampled_from([b"\t", b'"', b"\r", b"\0", b" ", b"a", b"\xe9", b"|", b",", b"1.jpg"]),
    max_size=9,
).map(b"".join)


@given(st.lists(LINE, max_size=12))
@settings(max_examples=300, deadline=None)
def test_a_line_of_a_tsv_is_a_row_or_named(lines: list[bytes]) -> None:
    known = [f"{U}\ta cat".encode()] * 20
    rows, odd = read_bytes("x.tsv", b"\n".join([*known, *lines, *known]))
    assert len(rows) + left_out(odd) == 40 + len(lines)


@given(st.lists(LINE, max_size=12), st.booleans())
@example([b'"', b'a "'], False)  # an inch is no quotation, and two of them are none
@settings(max_examples=300, deadline=None)
def test_no_line_of_a_csv_is_swallowed(lines: list[bytes], quoted: bool) -> None:
    """Each line is marked: the mark is in a row, or the line is among those left out."""
    marked = [
        b'"@%d@' % i + line if quoted else b"5@%d@" % i + line for i, line in enumerate(lines)
    ]
    text = b"\n".join(
        [b"caption,url", *(line + b"," + U.encode() for line in marked), b"the end," + U.encode()]
    )
    rows, odd = read_bytes("x.csv", text)
    said = " ".join(field for row in rows for field in (*row.captions, row.url))
    missed = [i for i in range(len(lines)) if f"@{i}@" not in said]
    assert len(missed) <= left_out(odd)
    assert rows[-1].captions == ("the end",)


def test_an_inch_mark_does_not_join_two_rows_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f'url,caption\n{U},a 5" cat\n{U},a 6" dog\n')
    rows, odd = read(tmp_path / "x.csv")
    assert [row.captions for row in rows] == [('a 5" cat',), ('a 6" dog',)]
    assert not odd.counts


WORDS = st.sampled_from(
    [
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
)
KEYS = ["url", "image", "caption", "sentences", "filename", "image_id", "id", "file_name", "instruction", "responses",
        "response", "conversations", "split"]  # fmt: skip
OBJECT = (
    st.dictionaries(st.sampled_from(KEYS), WORDS | st.lists(WORDS, max_size=3), max_size=5) | WORDS
)


@pytest.mark.parametrize("form", ["json", "jsonl", "annotations"])
@given(values=st.lists(OBJECT, max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_json_row_is_a_row_or_named(form: str, values: list) -> None:
    first = {"image": "0.jpg", "caption": "the first"}
    if form == "jsonl":
        rows, odd = read_bytes("x.jsonl", "\n".join(map(json.dumps, [first, *values])).encode())
    elif form == "json":
        rows, odd = read_bytes("x.json", json.dumps([first, *values]).encode())
    else:
        coco = {
            "annotations": [{"image_id": 1, **first}, *values],
            "images": [{"id": 1, "file_name": "1.jpg"}],
        }
        rows, odd = read_bytes("x.json", json.dumps(coco).encode())
    assert len(rows) + left_out(odd) == 1 + len(values)
    for row in rows:
        assert all(row.captions) and json.dumps(row._asdict(), ensure_ascii=False).encode()
