"""Convert sources to files of records, and draw random samples of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.data.records import open_records, open_rows
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.prepare.convert import (
    convert,
    group_captions,
    hash_fraction,
    reduce,
    request_identity,
)
from llava_simplified.prepare.convert_command import main, reduce_main
from llava_simplified.prepare.record_writer import RecordWriter, image_file_name
from llava_simplified.prepare.source_rows import ParseIssues, SourceRow


def write_source(folder: Path, count: int = 400, captions: int = 1) -> Path:
    """Write a TSV in the form of CC3M, in which the captions of an image are far apart."""
    lines = []
    for caption in range(captions):
        lines += [
            f"caption {caption} of {image}\thttp://a.example/{image}.jpg" for image in range(count)
        ]
    path = folder / "train.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- captions and records ----


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_convert_writes_records_in_every_format(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / f"records.{suffix}"
    counts, _ = convert(str(write_source(tmp_path)), output)
    assert counts == {str(output): 400}
    record = open_records(output)[17]
    assert record.images == (image_file_name(17, "http://a.example/17.jpg"),)
    assert record.responses == ("caption 0 of 17",)
    assert record.turns[0].content == "<image>\nGenerate a caption of this image:"


def test_convert_groups_the_captions_of_one_image(tmp_path: Path) -> None:
    convert(str(write_source(tmp_path, count=30, captions=5)), tmp_path / "records.json")
    rows = read_json(tmp_path / "records.json")
    assert len(rows) == 30
    by_first_caption = {row["responses"][0]: row["responses"] for row in rows}
    expected = [f"caption {number} of 7" for number in range(5)]
    assert by_first_caption["caption 0 of 7"] == expected


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
@pytest.mark.parametrize("address", ["url", "link"])
def test_convert_identifies_an_image_by_its_name_where_it_has_one(
    tmp_path: Path, name: str, address: str
) -> None:
    """The URL beside a name may lead to a page with several images, or to one of several copies of an image."""
    page = "https://shop.example/p1"
    rows = [
        {"image": "front.jpg", address: page, "caption": "front of a chair"},
        {"image": "back.jpg", address: page, "caption": "back of a chair"},
        {"image": "front.jpg", address: f"{page}/other", "caption": "a chair"},
        {"image": ".//front.jpg", address: page, "caption": "my chair"},
    ]
    separator = {"x.csv": ",", "x.tsv": "\t"}.get(name)
    lines = [json.dumps(row) for row in rows]
    if separator:
        lines = [separator.join(values) for values in (rows[0], *(row.values() for row in rows))]
    (tmp_path / name).write_text("\n".join(lines))
    convert(str(tmp_path / name), tmp_path / "o.json")
    written = {
        row["image"]: row.get("responses") or [row["response"]]
        for row in read_json(tmp_path / "o.json")
    }
    expected = {
        "front.jpg": ["front of a chair", "a chair", "my chair"],
        "back.jpg": ["back of a chair"],
    }
    assert written == expected


def test_group_captions_for_a_download_keeps_every_url(tmp_path: Path) -> None:
    rows = [("1.jpg", "a"), ("1.jpg", "b"), ("2.jpg", "b"), ("", "b"), ("", "b"), ("", "")]
    source = [
        SourceRow(number, image, url, (f"caption {number}",))
        for number, (image, url) in enumerate(rows)
    ]
    grouped = list(group_captions(lambda _: iter(source), ParseIssues(), request_identity))
    assert {(row.image, row.url) for row in grouped} == set(rows)
    assert len(grouped) == len(set(rows))


def test_convert_notes_an_image_in_two_splits(tmp_path: Path) -> None:
    lines = ["image,caption,split", "1.jpg,a cat,train", "1.jpg,a pet,test"]
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    _, issues = convert(str(tmp_path / "x.json"), tmp_path / "o.json", split="source")
    assert issues.counts == {"image in two splits (kept in the first)": 1}


def test_convert_of_a_list_of_urls_says_that_it_has_no_captions(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("http://a.example/1.jpg\nhttp://a.example/2.jpg\n")
    with pytest.raises(ValueError, match=r"urls\.txt.*\n.*2 image without any caption"):
        convert(str(tmp_path / "urls.txt"), tmp_path / "o.json")
    assert not (tmp_path / "o.json").exists()


def test_convert_keeps_equal_captions_of_one_image_once(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\thttp://a/1.jpg\na\thttp://a/1.jpg\nb\thttp://a/1.jpg\n")
    convert(str(tmp_path / "x.tsv"), tmp_path / "o.json")
    assert read_json(tmp_path / "o.json")[0]["responses"] == ["a", "b"]


def test_convert_leaves_conversations_unchanged_except_for_absolute_paths(tmp_path: Path) -> None:
    hello = {"from": "gpt", "value": "Hello"}
    rows = [
        {
            "id": "a",
            "image": "/home/x/1.jpg",
            "conversations": [{"from": "human", "value": "<image>\nHi"}, hello],
        },
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, hello]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    convert(str(tmp_path / "x.json"), tmp_path / "o.jsonl")
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert written == [{**rows[0], "image": "1.jpg"}, rows[1]]


def test_convert_selects_instructions_by_a_hash_of_the_image_name(tmp_path: Path) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("Say what you see:\n\nDescribe it.\nWhat?\n")
    results = []
    for _ in range(2):
        convert(str(write_source(tmp_path)), tmp_path / "o.json", instruction=str(templates))
        results.append([row["instruction"] for row in read_json(tmp_path / "o.json")])
    assert results[0] == results[1]
    counts = {text: results[0].count(text) for text in set(results[0])}
    assert set(counts) == {"Say what you see:", "Describe it.", "What?"}
    assert min(counts.values()) > 90


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_convert_reads_instructions_in_the_encodings_of_windows(
    tmp_path: Path, encoding: str
) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_bytes("Décris-la.\r\n".encode(encoding))
    source = str(write_source(tmp_path, count=3))
    _, issues = convert(source, tmp_path / "o.json", instruction=str(templates))
    assert {row["instruction"] for row in read_json(tmp_path / "o.json")} == {"Décris-la."}
    assert len(issues.counts) == 2  # the encoding and the line ends


def test_convert_of_a_missing_file_of_instructions_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--instruction nothing.txt: no such file"):
        convert(str(write_source(tmp_path)), tmp_path / "o.json", instruction="nothing.txt")


def test_convert_replaces_the_instructions_of_records_only_if_one_is_passed(
    tmp_path: Path,
) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [
        {"image": "1.jpg", "instruction": "Old:", "response": "a cat"},
        {"image": "2.jpg", "conversations": turns},
        {"image": "3.jpg", "instruction": "Old:", "chosen": "a cat", "rejected": "a dog"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    _, issues = convert(str(tmp_path / "x.json"), tmp_path / "o.json")
    assert read_json(tmp_path / "o.json") == rows
    assert not issues.counts
    _, issues = convert(str(tmp_path / "x.json"), tmp_path / "o.json", instruction="New:")
    expected = [{**rows[0], "instruction": "New:"}, rows[1], {**rows[2], "instruction": "New:"}]
    assert read_json(tmp_path / "o.json") == expected
    assert issues.counts == {"conversation (kept without the --instruction)": 1}


def test_convert_command_keeps_the_instructions_of_records_by_default(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", "instruction": "Old:", "response": "a cat"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    argv = [str(tmp_path / "x.json"), "--output", str(tmp_path / "o.json")]
    assert main(argv) == 0
    assert read_json(tmp_path / "o.json") == rows
    assert main([*argv, "--instruction", "New:"]) == 0
    assert read_json(tmp_path / "o.json") == [{**rows[0], "instruction": "New:"}]


# ---- images ----


def test_convert_keeps_only_rows_whose_image_is_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    jpg = image_file_name(3, "http://a.example/3.jpg")
    png = image_file_name(5, "http://a.example/5.jpg").replace(".jpg", ".png")
    (folder / jpg).touch()
    (folder / png).touch()
    _, issues = convert(str(write_source(tmp_path)), tmp_path / "o.json", image_folder=folder)
    assert [row["image"] for row in read_json(tmp_path / "o.json")] == [jpg, png]
    assert list(issues.counts.values()) == [398]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_convert_finds_every_kind_of_image_that_is_downloaded(tmp_path: Path, suffix: str) -> None:
    name = image_file_name(0, "http://a.example/0.jpg").replace("jpg", suffix)
    (tmp_path / name).write_bytes(b"x")
    convert(str(write_source(tmp_path, 1)), tmp_path / "o.json", image_folder=tmp_path)
    assert open_records(tmp_path / "o.json")[0].images == (name,)


def test_convert_keeps_paths_below_the_image_folder_and_base_names_of_others(
    tmp_path: Path,
) -> None:
    """Images in two folders may have the same base name; their captions must not be joined."""
    for name in ("train/1.jpg", "val/1.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    lines = [
        "image,caption",
        f"{tmp_path}/images/train/1.jpg,a cat",
        f"{tmp_path}/images/val/1.jpg,a dog",
        "C:/x/3.jpg,c",
        "C:\\x\\4.jpg,d",
    ]
    source, output = tmp_path / "x.csv", tmp_path / "o.json"
    source.write_text("\n".join(lines))
    convert(str(source), output, image_folder=tmp_path / "images")
    records = open_records(output)
    assert [(*record.images, *record.responses) for record in records] == [
        ("train/1.jpg", "a cat"),
        ("val/1.jpg", "a dog"),
    ]
    _, issues = convert(str(source), output)
    names = [record.images for record in open_records(output)]
    # Files that exist keep their paths: in another folder, their base names could be those of other images.
    existing = [f"{tmp_path}/images/{part}/1.jpg" for part in ("train", "val")]
    assert names == [(existing[0],), (existing[1],), ("3.jpg",), ("4.jpg",)]
    assert issues.counts == {
        "absolute path of a file that exists (kept)": 2,
        "absolute path (only the base name kept)": 2,
    }
    other = tmp_path / "other"
    other.mkdir()
    for name in ("1.jpg", "3.jpg", "4.jpg"):
        (other / name).write_bytes(b"")
    _, issues = convert(str(source), output, image_folder=other)
    assert [record.images for record in open_records(output)] == [("3.jpg",), ("4.jpg",)]
    assert issues.counts[f"image outside {other} (skipped)"] == 2


# ---- splits ----


def test_convert_split_depends_on_the_image_only(tmp_path: Path) -> None:
    convert(str(write_source(tmp_path)), tmp_path / "a.json", split="val=0.2")
    (tmp_path / "more").mkdir()
    longer = write_source(tmp_path / "more", count=600)
    convert(str(longer), tmp_path / "b.json", split="val=0.2")
    images = {}
    for name in ("a_train", "a_val", "b_train", "b_val"):
        images[name] = {row["image"] for row in read_json(tmp_path / f"{name}.json")}
    assert len(images["a_train"]) + len(images["a_val"]) == 400
    assert 50 < len(images["a_val"]) < 110
    assert images["a_val"] < images["b_val"]
    assert not images["b_train"] & images["b_val"]


def test_hash_fraction_is_uniform_and_fixed() -> None:
    numbers = [hash_fraction(f"{number}.jpg") for number in range(10_000)]
    assert abs(sum(numbers) / 10_000 - 0.5) < 0.02
    assert hash_fraction("0.jpg") == 0x4BF7B45967DB2132 / 2**64, "as `b2sum -l 64` prints it"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_convert_split_without_records_replaces_the_older_file(tmp_path: Path, suffix: str) -> None:
    source, output = tmp_path / "x.tsv", tmp_path / f"o.{suffix}"
    source.write_text("a caption\thttp://a/1.jpg\n")
    older = tmp_path / f"o_val.{suffix}"
    older.write_text("of another run")
    counts, _ = convert(str(source), output, split="val=0.000001")
    assert counts == {str(tmp_path / f"o_train.{suffix}"): 1, str(older): 0}
    assert len(open_rows(older)) == 0
    source.write_text("\thttp://a/1.jpg\n")
    with pytest.raises(ValueError, match=r"x\.tsv: contains no usable record"):
        convert(str(source), output, split="val=0.5")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"x.tsv", f"o_train.{suffix}", f"o_val.{suffix}"}


@pytest.mark.parametrize(
    "split",
    [
        "val",
        "val=2",
        "val=0.6,test=0.5",
        "val=x",
        "val=0.1,val=0.2",
        "train=0.9",
        "train=0.8,val=0.1",
        "=0.1",
        "..=0.1",
        "a/b=0.1",
        "a:b=0.1",
    ],
)
def test_convert_refuses_a_wrong_split(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        convert(str(write_source(tmp_path)), tmp_path / "o.json", split=split)


def test_convert_names_a_row_whose_split_cannot_be_in_a_file_name(tmp_path: Path) -> None:
    rows = [
        {"image": "1.jpg", "caption": "a cat", "split": "val"},
        {"image": "2.jpg", "caption": "a dog", "split": "a/b"},
    ]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="--split source: the split 'a/b' of row 2"):
        convert(str(source), tmp_path / "o.json", split="source")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_convert_uses_the_split_of_karpathy(tmp_path: Path) -> None:
    images = [
        {"filename": f"{index}.jpg", "split": split, "sentences": [{"raw": "x"}]}
        for index, split in enumerate(["train", "restval", "val", "test"])
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    counts, _ = convert(str(tmp_path / "k.json"), tmp_path / "o.json", split="source")
    by_name = {Path(path).name: count for path, count in counts.items()}
    assert by_name == {"o_train.json": 2, "o_val.json": 1, "o_test.json": 1}


def test_convert_notes_rows_without_a_split_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,caption,split\n1.jpg,a cat,\n2.jpg,a dog,val\n")
    counts, issues = convert(str(tmp_path / "x.csv"), tmp_path / "o.json", split="source")
    assert counts == {str(tmp_path / "o_train.json"): 1, str(tmp_path / "o_val.json"): 1}
    assert issues.counts["row without a split (assigned to train)"] == 1


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "x.csv",
            ["image,caption,Split", "1.jpg,a cat,train", "2.jpg,a dog,val", "3.jpg,a, b,test"],
        ),
        (
            "x.jsonl",
            [
                '{"image": "1.jpg", "instruction": "Say:", "response": "a cat", "split": "train"}',
                '{"image": "2.jpg", "instruction": "Say:", "response": "a dog", "split": "val"}',
                '{"image": "3.jpg", "messages": [{"role": "user", "content": "What?"}, '
                '{"role": "assistant", "content": "a"}], "split": "test"}',
            ],
        ),
        (
            "x.ndjson",
            [
                '{"image": "1.jpg", "caption": "a cat", "split": "train"}',
                '{"image": "2.jpg", "caption": "a dog", "split": "val"}',
                '{"image": "3.jpg", "caption": "a", "split": "test"}',
            ],
        ),
    ],
)
def test_convert_uses_the_split_column_of_tables_and_records(
    tmp_path: Path, name: str, lines: list[str]
) -> None:
    (tmp_path / name).write_text("\n".join(lines))
    counts, issues = convert(str(tmp_path / name), tmp_path / "o.jsonl", split="source")
    assert {Path(path).name: count for path, count in counts.items()} == {
        "o_train.jsonl": 1,
        "o_val.jsonl": 1,
        "o_test.jsonl": 1,
    }
    assert "2.jpg" in (tmp_path / "o_val.jsonl").read_text()
    assert "row without a split (assigned to train)" not in issues.counts


def test_convert_refuses_the_split_of_a_source_without_splits(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a cat\thttp://a.example/1.jpg\n")
    with pytest.raises(ValueError, match=r"--split source: no row of .*x\.tsv has a split"):
        convert(str(tmp_path / "x.tsv"), tmp_path / "o.json", split="source")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]


# ---- files that cannot be written ----


def test_convert_refuses_conversations_in_parquet(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", "conversations": [{"from": "human", "value": "Hi"}]}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"onversations.* to \.json or \.jsonl"):
        convert(str(tmp_path / "x.json"), tmp_path / "o.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_convert_that_fails_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"image": "1.jpg", "caption": "a"}, {"image": ')
    with pytest.raises(ValueError, match="not JSON at byte"):
        convert(str(tmp_path / "x.json"), tmp_path / "o.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_record_writer_refuses_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"o\.csv.*\.json, \.jsonl or \.parquet"):
        RecordWriter(tmp_path / "o.csv")


# ---- commands ----


def test_reduce_command_draws_a_random_sample_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"image": f"{number}.jpg", "instruction": "x", "response": f"é {number}"}
        for number in range(1000)
    ]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(rows, indent=1))
    assert reduce_main([str(path), "--count", "100", "--seed", "3"]) == 0
    chosen = sorted(random.Random(3).sample(range(1000), 100))
    assert read_json(tmp_path / "all_100.json") == [rows[index] for index in chosen]
    assert reduce(path, tmp_path / "more.jsonl", 5000, 0) == 1000
    written = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert written == rows
    with pytest.raises(ValueError, match="--count 0"):
        reduce(path, tmp_path / "none.json", 0, 0)


def test_reduce_without_a_valid_row_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"image": "1.jpg", "response": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl row 0: not JSON"):
        reduce(tmp_path / "x.jsonl", tmp_path / "o.jsonl", 1, 0)


def test_convert_command_prints_counts_and_issues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"a\thttp://a/1.jpg\r\nlost\r\nb\tc\thttp://a/2.jpg\r\n")
    assert main([str(path), "--output", str(tmp_path / "o.json")]) == 0
    printed = capsys.readouterr().out
    assert "2 records" in printed
    assert "1 ragged: too few fields (skipped) (first: row 2: 'lost')" in printed
    assert "3 CRLF line end" in printed


def test_reduce_leaves_out_a_row_that_is_not_json_and_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b'{"image": "1.jpg", "response": "a \\ud83d b"}', b"{torn", b'{"image": "2.jpg"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert reduce(tmp_path / "x.jsonl", tmp_path / "o.jsonl", 3, 0) == 2
    assert (tmp_path / "o.jsonl").read_bytes().splitlines() == [lines[0], lines[2]]
    assert "x.jsonl row 1" in caplog.text


def test_reduce_of_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"x\.json.*no record"):
        reduce(tmp_path / "x.json", tmp_path / "o.json", 3, 0)
    assert not (tmp_path / "o.json").exists()


def test_convert_never_joins_two_absolute_paths_of_one_base_name(tmp_path: Path) -> None:
    names = ["/ann/cats/1.jpg", "/ann/dogs/1.jpg", "C:\\ann\\2.jpg"]
    rows = [{"image": name, "caption": f"caption of {name}"} for name in names]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    convert(str(tmp_path / "x.json"), tmp_path / "o.json")
    written = {row["response"]: row["image"] for row in read_json(tmp_path / "o.json")}
    assert list(written.values()) == ["1.jpg", "/ann/dogs/1.jpg", "2.jpg"]


def test_convert_finds_images_whose_names_differ_in_case_or_extension(tmp_path: Path) -> None:
    """Each image is counted under the rule that found it, and no name leads to the file of another image."""
    images = tmp_path / "images"
    for name in ("cats/IMG_1.JPG", "dogs/1.jpg", "cats/1.jpg", "3.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(b"x")
    names = {
        "cats/img_1.jpg": "cats/IMG_1.JPG",
        "/ann/images/dogs/1.jpg": "dogs/1.jpg",
        "C:\\images\\cats\\1.jpg": "cats/1.jpg",
        "3": "3.png",
        "birds/1.jpg": "",
    }
    rows = [{"image": name, "caption": f"caption of {name}"} for name in names]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    _, issues = convert(str(tmp_path / "x.json"), tmp_path / "o.json", image_folder=images)
    written = {row["response"]: row["image"] for row in read_json(tmp_path / "o.json")}
    assert written == {f"caption of {name}": found for name, found in names.items() if found}
    assert issues.counts[f"image not in {images} (skipped)"] == 1
    assert issues.counts["image name matched by case (kept)"] == 1
    assert issues.counts["image name matched by extension (kept)"] == 1


# ---- an earlier output in the source ----


def write_sidecars(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").touch()
        (folder / f"{number}.txt").write_text(f"caption {number}")


def test_convert_does_not_read_its_earlier_output_instead_of_new_images(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    output = folder / "records.jsonl"
    write_sidecars(folder, count=2)
    counts, _ = convert(str(folder), output)
    assert counts == {str(output): 2}
    write_sidecars(folder, count=3)
    with pytest.raises(ValueError, match=r"--output .*records\.jsonl: this file exists.*Delete it"):
        convert(str(folder), output)
    assert len(open_rows(output)) == 2
    # With --sidecar, the records are not a part of the source.
    counts, _ = convert(str(folder), output, sidecar="txt")
    assert counts == {str(output): 3}
    # Into another file, the records are read, but not silently.
    _, issues = convert(str(folder), tmp_path / "other.jsonl")
    assert "file of records in the folder (read instead of all other files)" in issues.counts


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
@pytest.mark.parametrize("split", ["", "val=0.5", "source"])
def test_convert_does_not_read_its_earlier_output_beside_the_source(
    tmp_path: Path, pattern: str, split: str
) -> None:
    for number in range(4):
        row = {"image": f"{number}.jpg", "caption": "a cat", "split": "val"}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    source = str(tmp_path / pattern)
    counts, _ = convert(source, tmp_path / "all.jsonl", split=split)
    assert sum(counts.values()) == 4
    with pytest.raises(ValueError, match="this file exists, and would be read as a part of"):
        convert(source, tmp_path / "all.jsonl", split=split)


def test_convert_replaces_a_file_that_is_the_whole_source(tmp_path: Path) -> None:
    row = {"image": "1.jpg", "caption": "a cat"}
    path = tmp_path / "all.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for source in (path, tmp_path, tmp_path / "*.jsonl"):
        counts, _ = convert(str(source), path)
        assert counts == {str(path): 1}
