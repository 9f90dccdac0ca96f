"""Folders and rows in the forms that other programs write. Their content is known without our reader.

Every form is a function that writes a source and returns its records (the images, and the turns of the conversation or
the captions) and its issues. `convert` must find exactly these records, and count exactly these issues.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forms import save_to_disk

from llava_simplified.data.images import read_image_bytes
from llava_simplified.data.records import Record, open_records
from llava_simplified.prepare.convert import convert
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source

Turn = tuple[str, str]


class ExpectedSource(NamedTuple):
    """What `convert` must find in a source.

    Attributes:
        records: The images of each record, and its captions or turns.
        issues: The number of occurrences of each issue.
        source: The name or pattern of the source in the folder; empty if the folder is the source.
        sidecar: The value of `--sidecar`.
    """

    records: list[tuple[tuple[str, ...], Any]]
    issues: dict[str, int]
    source: str = ""
    sidecar: str = ""


def image(folder: Path, name: str) -> bytes:
    """Write an image file whose content is its name, and return the content."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
    return name.encode()


def pair(folder: Path, name: str, sidecar: str, caption: str | bytes) -> None:
    image(folder, name)
    data = caption.encode() if isinstance(caption, str) else caption
    (folder / sidecar).write_bytes(data)


# ---- sidecars ----


def flat_sidecars(folder: Path) -> ExpectedSource:
    for number in range(40):
        pair(folder, f"{number}.jpg", f"{number}.txt", f"1girl, solo, {number} hats")
    records = [((f"{n}.jpg",), [f"1girl, solo, {n} hats"]) for n in range(40)]
    return ExpectedSource(records, {})


def sidecar_like_a_table(folder: Path) -> ExpectedSource:
    text = "a screenshot of readme.png, dark theme"
    pair(folder, "a.png", "a.txt", text)
    return ExpectedSource([(("a.png",), [text])], {})


def suffixes_in_capitals(folder: Path) -> ExpectedSource:
    pair(folder, "A.JPG", "A.TXT", "one")
    pair(folder, "b.Png", "b.CAPTION", "two")
    pair(folder, "c.webp", "c.caption", "three")
    return ExpectedSource(
        [(("A.JPG",), ["one"]), (("b.Png",), ["two"]), (("c.webp",), ["three"])], {}
    )


def nested_folders_with_unicode(folder: Path) -> ExpectedSource:
    decomposed = unicodedata.normalize("NFD", "café")
    pair(folder, "10_cats/é ü.jpg", "10_cats/é ü.txt", "ein Kätzchen")
    pair(folder, f"a/b/c/{decomposed}.png", "a/b/c/café.txt", "composed beside decomposed")
    pair(folder, "日本/猫 (1).webp", "日本/猫 (1).txt", "猫です")
    records = [
        (("10_cats/é ü.jpg",), ["ein Kätzchen"]),
        ((f"a/b/c/{decomposed}.png",), ["composed beside decomposed"]),
        (("日本/猫 (1).webp",), ["猫です"]),
    ]
    return ExpectedSource(records, {})


def missing_halves(folder: Path) -> ExpectedSource:
    pair(folder, "a-1.jpg", "a-1.txt", "one")
    pair(folder, "a.jpg", "a.txt", "two")
    image(folder, "lonely.jpg")
    image(folder, "sub/also.jpg")
    (folder / "sub" / "no_image.txt").write_text("x")
    (folder / "README.txt").write_text("About this folder,\nwritten by me.\n")
    (folder / "latents.npz").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    issues = {
        "image without a sidecar (skipped)": 2,
        "sidecar without an image (skipped)": 2,
        "another file (not read)": 1,
    }
    return ExpectedSource([(("a-1.jpg",), ["one"]), (("a.jpg",), ["two"])], issues)


def names_with_both_suffixes(folder: Path) -> ExpectedSource:
    pair(folder, "a.jpg", "a.jpg.txt", "of the JPEG")
    pair(folder, "a.png", "a.txt", "of the stem")
    pair(folder, "b.jpg", "b.txt", "of both")
    image(folder, "b.png")
    pair(folder, "v1.2.jpg", "v1.2.txt", "a dot in the name")
    records = [
        (("a.jpg",), ["of the JPEG"]),
        (("a.png",), ["of the stem"]),
        (("b.jpg",), ["of both"]),
        (("b.png",), ["of both"]),
        (("v1.2.jpg",), ["a dot in the name"]),
    ]
    return ExpectedSource(records, {"sidecar of several images (used for each)": 1})


def text_encodings(folder: Path) -> ExpectedSource:
    texts = {
        "bom": b"\xef\xbb\xbfone",
        "crlf": b"two\r\nlines\r\n",
        "cp1252": b"caf\xe9",
        "utf16": "three \u0a0a".encode("utf-16"),
        "empty": b"",
        "blank": b" \n\r\n ",
        "nul": b"fo\0ur",
    }
    for name, data in texts.items():
        pair(folder, f"{name}.jpg", f"{name}.txt", data)
    records = [
        (("bom.jpg",), ["one"]),
        (("cp1252.jpg",), ["café"]),
        (("crlf.jpg",), ["two\nlines"]),
        (("nul.jpg",), ["four"]),
        (("utf16.jpg",), ["three \u0a0a"]),
    ]
    issues = {
        "empty sidecar (skipped)": 2,
        "byte order mark (removed)": 1,
        "CRLF line end (removed)": 2,
        "not UTF-8 (read as Windows-1252)": 1,
        "UTF-16 (decoded)": 1,
        "NUL byte (removed)": 1,
    }
    return ExpectedSource(records, issues)


def lines_as_captions(folder: Path) -> ExpectedSource:
    pair(folder, "a.jpg", "a.txt", "one\n\ntwo\r\nthree\n")
    return ExpectedSource(
        [(("a.jpg",), ["one", "two", "three"])], {"CRLF line end (removed)": 1}, sidecar="lines"
    )


def two_kinds_of_sidecars(folder: Path) -> ExpectedSource:
    pair(folder, "a.jpg", "a.txt", "cat, sofa")
    (folder / "a.caption").write_text("A cat on a sofa.")
    issues = {"another file (not read)": 1}
    return ExpectedSource([(("a.jpg",), ["A cat on a sofa."])], issues, sidecar="caption")


# ---- imagefolders and tables ----


def metadata_of_kohya(folder: Path) -> ExpectedSource:
    image(folder, "1.png")
    image(folder, "sub/2.png")
    image(folder, "3.png")
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "sub/2.png", "text": "two"}]
    text = "".join(json.dumps(row) + "\r\n" for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    issues = {
        "image without a row of metadata (skipped)": 1,
        "byte order mark (removed)": 1,
        "CRLF line end (removed)": 2,
    }
    return ExpectedSource([(("1.png",), ["one"]), (("sub/2.png",), ["two"])], issues)


def metadata_in_splits(folder: Path) -> ExpectedSource:
    for split in ("train", "test"):
        image(folder, f"{split}/1.jpg")
        (folder / split / "metadata.csv").write_text(f'file_name,text\n1.jpg,"{split}, quoted"\n')
    records = [(("test/1.jpg",), ["test, quoted"]), (("train/1.jpg",), ["train, quoted"])]
    return ExpectedSource(records, {})


def table_beside_a_folder(folder: Path) -> ExpectedSource:
    image(folder, "Images/1.jpg")
    (folder / "captions.txt").write_text("image,caption\n1.jpg,A cat .\n1.jpg,A pet .\n")
    issues = {"another file or folder in the source (not read)": 1}
    return ExpectedSource([(("1.jpg",), ["A cat .", "A pet ."])], issues)


def metadata_json_of_kohya(folder: Path) -> ExpectedSource:
    rows = {
        "1.jpg": {"caption": "one", "tags": "a, b", "train_resolution": [512, 512]},
        "2.jpg": {"tags": "c, d"},
    }
    (folder / "meta.json").write_text(json.dumps(rows))
    issues = {"tags beside a caption (not read)": 1}
    return ExpectedSource([(("1.jpg",), ["one"]), (("2.jpg",), ["c, d"])], issues, "meta.json")


# ---- chats ----

QUESTION = "What is this?"


def ms_swift(folder: Path) -> ExpectedSource:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": "<image><image>Which is larger?"},
                {"role": "assistant", "content": "The second."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "It is."},
            ],
            "images": ["1.jpg", "2.jpg"],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"messages": [{"role": "user", "content": "Hi"}, "Ho"], "images": ["1.jpg"]},
    ]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [
        ("system", "Answer briefly."),
        ("user", "<image><image>Which is larger?"),
        ("assistant", "The second."),
        ("user", "Why?"),
        ("assistant", "It is."),
    ]
    records = [(("1.jpg", "2.jpg"), turns), ((), [("user", "Hi"), ("assistant", "Ho")])]
    return ExpectedSource(records, {"malformed chat (skipped)": 1}, "x.jsonl")


def part(kind: str, **values: Any) -> dict[str, Any]:
    """Return a content part as `datasets` returns it: keys that the part does not use are null."""
    return {"type": kind, "text": None, "index": None, **values}


def trl(folder: Path) -> ExpectedSource:
    user = [part("image", index=1), part("text", text="Compare."), part("image", index=0)]
    row = {
        "messages": [
            {"role": "user", "content": user},
            {
                "role": "assistant",
                "content": [part("text", text="They "), part("text", text="differ.")],
            },
        ],
        "images": [{"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}],
    }
    (folder / "x.json").write_text(json.dumps([row, row]))
    turns = [("user", "<image>\nCompare.\n<image>\n"), ("assistant", "They differ.")]
    return ExpectedSource([(("2.jpg", "1.jpg"), turns)] * 2, {}, "x.json")


def parts_with_paths(folder: Path) -> ExpectedSource:
    contents = [
        [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": QUESTION}],
        [{"image": "file://2.jpg"}, {"text": QUESTION}],
        [{"type": "image_url", "image_url": {"url": "3.jpg"}}, {"type": "text", "text": QUESTION}],
        [{"type": "image_url", "image_url": {"url": "https://a.example/4.jpg"}}],
        [{"type": "video", "video": "5.mp4"}],
    ]
    lines = []
    for content in contents:
        answer = {"role": "assistant", "content": "a cat"}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (folder / "x.jsonl").write_text("\n".join(lines))
    turns = [("user", f"<image>\n{QUESTION}"), ("assistant", "a cat")]
    records = [((f"{number}.jpg",), turns) for number in (1, 2, 3)]
    return ExpectedSource(records, {"malformed chat (skipped)": 2}, "x.jsonl")


def llama_factory(folder: Path) -> ExpectedSource:
    row = {
        "conversations": [
            {"from": "human", "value": "Hi."},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "And <image> this?"},
            {"from": "gpt", "value": "a cat"},
        ],
        "system": "Be kind.",
        "images": ["a/1.jpg"],
    }
    (folder / "x.json").write_text(json.dumps([row]))
    turns = [
        ("system", "Be kind."),
        ("human", "Hi."),
        ("gpt", "Hello."),
        ("human", "And <image> this?"),
        ("gpt", "a cat"),
    ]
    return ExpectedSource([(("a/1.jpg",), turns)], {}, "x.json")


def finevision_json(folder: Path) -> ExpectedSource:
    row = {
        "images": ["1.jpg", "2.jpg"],
        "texts": [{"user": "One?", "assistant": "1"}, {"user": "Two?", "assistant": "2"}],
        "source": "x",
    }
    (folder / "x.json").write_text(json.dumps([row]))
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    return ExpectedSource([(("1.jpg", "2.jpg"), turns)], {}, "x.json")


# ---- Parquet and Arrow ----

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXTS = pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()}))


def embedded(*names: str) -> list[dict[str, Any]]:
    return [{"bytes": name.encode(), "path": None} for name in names]


def finevision_parquet(folder: Path) -> ExpectedSource:
    images = [embedded("1", "2"), embedded("3"), None, []]
    texts = [[{"user": f"{n}?", "assistant": str(n)}] for n in range(4)]
    schema = pa.schema({"images": pa.list_(IMAGE), "texts": TEXTS})
    table = pa.table({"images": images, "texts": texts}, schema)
    pq.write_table(table, folder / "x.parquet", row_group_size=2)
    turns = [[("user", f"{n}?"), ("assistant", str(n))] for n in range(4)]
    names = [("x.parquet#0/0", "x.parquet#0/1"), ("x.parquet#1/0",), (), ()]
    return ExpectedSource(list(zip(names, turns)), {}, "x.parquet")


def trl_parquet(folder: Path) -> ExpectedSource:
    content = [part("image"), part("text", text=QUESTION)]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [part("text", text="a cat")]},
    ]
    rows = {"messages": [messages] * 3, "images": [embedded("1"), embedded("2"), embedded("3")]}
    pq.write_table(pa.table(rows), folder / "train-0.parquet")
    pq.write_table(pa.table(rows), folder / "train-1.parquet")
    turns = [("user", f"<image>\n{QUESTION}"), ("assistant", "a cat")]
    names = [(f"train-{part}.parquet#{row}/0",) for part in (0, 1) for row in range(3)]
    return ExpectedSource([(name, turns) for name in names], {}, "train-*.parquet")


def parquet_with_bytes_and_paths(folder: Path) -> ExpectedSource:
    values = [
        {"bytes": b"1", "path": "a.jpg"},
        {"bytes": None, "path": "b.jpg"},
        None,
        {"bytes": b"2", "path": None},
    ]
    columns = {"image": pa.array(values, IMAGE), "text": [f"caption {n}" for n in range(4)]}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    records = [
        (("x.parquet#0",), ["caption 0"]),
        (("b.jpg",), ["caption 1"]),
        (("x.parquet#3",), ["caption 3"]),
    ]
    return ExpectedSource(records, {"row without an image (skipped)": 1}, "x.parquet")


def datasets_embedded(folder: Path) -> ExpectedSource:
    names = [["1", "2", "3"], ["4"]]
    tables = [
        pa.table({"image": pa.array(embedded(*part), IMAGE), "text": [f"no. {n}" for n in part]})
        for part in names
    ]
    save_to_disk(folder, tables)
    records = [
        (("data-00000-of-00002.arrow#0",), ["no. 1"]),
        (("data-00000-of-00002.arrow#1",), ["no. 2"]),
        (("data-00000-of-00002.arrow#2",), ["no. 3"]),
        (("data-00001-of-00002.arrow#0",), ["no. 4"]),
    ]
    return ExpectedSource(records, {})


def datasets_by_path(folder: Path) -> ExpectedSource:
    values = [{"bytes": None, "path": f"sub/{n}.jpg"} for n in range(3)]
    columns = {"image": pa.array(values, IMAGE), "caption": ["a", "", "c"]}
    save_to_disk(folder, [pa.table(columns)])
    issues = {"image without any caption (skipped)": 1}
    return ExpectedSource([(("sub/0.jpg",), ["a"]), (("sub/2.jpg",), ["c"])], issues)


def datasets_of_chats_in_one_split(folder: Path) -> ExpectedSource:
    columns = {
        "images": pa.array([embedded("1", "2")], pa.list_(IMAGE)),
        "texts": pa.array([[{"user": "Hi", "assistant": "Ho"}]], TEXTS),
    }
    save_to_disk(folder / "train", [pa.table(columns)])
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    arrow = "train/data-00000-of-00001.arrow"
    turns = [("user", "Hi"), ("assistant", "Ho")]
    return ExpectedSource([((f"{arrow}#0/0", f"{arrow}#0/1"), turns)], {})


FORMS = [
    *(flat_sidecars, sidecar_like_a_table, suffixes_in_capitals, nested_folders_with_unicode),
    *(missing_halves, names_with_both_suffixes, text_encodings, lines_as_captions),
    *(
        two_kinds_of_sidecars,
        metadata_of_kohya,
        metadata_in_splits,
        metadata_json_of_kohya,
        table_beside_a_folder,
    ),
    *(ms_swift, trl, parts_with_paths, llama_factory, finevision_json, finevision_parquet),
    *(trl_parquet, parquet_with_bytes_and_paths, datasets_embedded, datasets_by_path),
    datasets_of_chats_in_one_split,
]


def read_output(path: Path) -> list[tuple[tuple[str, ...], Any]]:
    """Return images, and captions or turns, of the records in a JSON Lines file."""
    found = []
    for line in path.read_text("utf-8").split("\n")[:-1]:
        row = json.loads(line)
        images = row.get("images") or row.get("image") or ()
        images = (images,) if isinstance(images, str) else tuple(images)
        if "conversations" in row:
            content: Any = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        else:
            content = row.get("responses") or [row["response"]]
        found.append((images, content))
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_convert_finds_the_records_of_every_form(
    form: Callable[[Path], ExpectedSource], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    made = form(folder)
    output = tmp_path / "records.jsonl"
    source = folder / made.source if made.source else folder
    _, issues = convert(str(source), output, sidecar=made.sidecar)
    found = read_output(output)
    key = lambda record: (record[0], str(record[1]))  # noqa: E731
    assert sorted(found, key=key) == sorted(made.records, key=key)
    assert issues.counts == made.issues

    # Training can read the output: it has the same images, each with a placeholder in the text.
    records = open_records(output)
    for record, (images, _) in zip(records, found):
        assert record.images == images
        assert sum(turn.content.count("<image>") for turn in record.turns) == len(images)
        assert record.responses


@pytest.mark.parametrize(
    "form", [finevision_parquet, trl_parquet, datasets_embedded, datasets_of_chats_in_one_split]
)
def test_embedded_images_are_read_by_the_names_in_the_records(
    form: Callable[[Path], ExpectedSource], tmp_path: Path
) -> None:
    contents = []
    for images, _ in form(tmp_path).records:
        contents += [read_image_bytes(image, tmp_path).decode() for image in images]
    expected = ["1", "2", "3"] * 2 if form is trl_parquet else list("1234")[: len(contents)]
    assert contents == expected


@pytest.mark.parametrize("form", [ms_swift, trl, llama_factory, finevision_json])
def test_open_records_reads_chat_rows_without_conversion(
    form: Callable[[Path], ExpectedSource], tmp_path: Path
) -> None:
    made = form(tmp_path)
    records = open_records(tmp_path / made.source, max_bad_records=1.0)
    for index, (images, turns) in enumerate(made.records):
        record = records[index]
        assert record.images == images
        assert record.responses == (turns[-1][1],)
        assert len(record.turns) == len(turns) - 1


def test_open_records_reads_a_parquet_file_of_chats_without_conversion(tmp_path: Path) -> None:
    made = finevision_parquet(tmp_path)
    records = open_records(tmp_path / "x.parquet")
    assert [record.images for record in records] == [images for images, _ in made.records]
    assert [record.responses for record in records] == [("0",), ("1",), ("2",), ("3",)]


# ---- errors ----


def read(path: Path, sidecar: str = "") -> list[Any]:
    return list(read_source(str(path), ParseIssues(), Columns(), sidecar))


def test_an_ambiguous_folder_is_an_error_that_shows_what_was_found(tmp_path: Path) -> None:
    pair(tmp_path, "a.jpg", "a.txt", "one")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,two\n")
    with pytest.raises(ValueError, match=r"1 images with a sidecar.*captions\.csv.*--sidecar txt"):
        read(tmp_path)
    assert [row.captions for row in read(tmp_path, "txt")] == [("one",)]
    assert [row.captions for row in read(tmp_path / "captions.csv")] == [("two",)]


def test_sidecars_of_two_kinds_are_an_error_that_names_the_choice(tmp_path: Path) -> None:
    two_kinds_of_sidecars(tmp_path)
    with pytest.raises(ValueError, match=r"a\.jpg.*a\.caption.*--sidecar txt or --sidecar caption"):
        read(tmp_path)
    with pytest.raises(ValueError, match="--sidecar text: expected"):
        read(tmp_path, "text")
    with pytest.raises(ValueError, match="not a folder"):
        read(tmp_path / "a.txt", "lines")


def test_images_without_captions_are_counted_in_the_error(tmp_path: Path) -> None:
    image(tmp_path, "a.jpg")
    image(tmp_path, "b.jpg")
    with pytest.raises(ValueError, match="2 images without a sidecar"):
        read(tmp_path)


def test_a_dataset_of_several_splits_requires_the_name_of_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / split, [pa.table({"image": embedded("1"), "text": [split]})])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="several splits.*train, .*test"):
        read(tmp_path)
    assert [row.captions for row in read(tmp_path / "test")] == [("test",)]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../x.arrow"}]}, "expected the name of a file"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow.* missing"),
        ({"_data_files": [], "_indices_data_files": [{"filename": "i"}]}, "selection"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_an_error_that_says_why(
    state: dict, message: str, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_torn_arrow_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    datasets_embedded(tmp_path)
    path = tmp_path / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="data-00000"):
        read(tmp_path)


USER = {"role": "user", "content": "<image>What?"}
ANSWER = {"role": "assistant", "content": "a cat"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [], "images": ["1.jpg"]}, "'messages' must be a non-empty list"),
        ({"messages": [USER, ANSWER], "conversations": [], "images": ["1.jpg"]}, "both"),
        ({"messages": [USER, {**ANSWER, "role": "tool"}], "images": ["1.jpg"]}, "turn 1"),
        ({"messages": [USER, {**ANSWER, "content": {}}], "images": ["1.jpg"]}, "turn 1"),
        ({"messages": [USER, {"role": "assistant"}], "images": ["1.jpg"]}, "turn 1"),
        ({"messages": [USER, ANSWER], "images": ["1.jpg", "2.jpg"]}, "2 image.*1 time"),
        ({"messages": [USER, ANSWER], "images": ["1.jpg"], "videos": ["1.mp4"]}, "'videos'"),
        (
            {
                "messages": [{**USER, "content": "Draw"}, USER | ANSWER | {"content": "<image>"}],
                "images": ["1.jpg"],
            },
            "system or assistant turn",
        ),
        (
            {
                "messages": [{**USER, "content": [part("image", index=3)]}, ANSWER],
                "images": ["1.jpg"],
            },
            "has the index 3, .* 1 image",
        ),
        (
            {
                "messages": [{**USER, "content": [part("image", image="2.jpg")]}, ANSWER],
                "images": ["1.jpg"],
            },
            "mixes both forms",
        ),
        (
            {"messages": [{**USER, "content": [part("image", image="data:image/png;base64,x")]}]},
            "data: URL",
        ),
        (
            {
                "images": [{"bytes": "aGk=", "path": None}],
                "texts": [{"user": "a", "assistant": "b"}],
            },
            "'image' must be a path",
        ),
    ],
)
def test_record_refuses_malformed_and_ambiguous_chats(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 7.*{message}"):
        Record.from_json(row, "row 7")
