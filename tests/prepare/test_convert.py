"""Sources -> files of records, and random samples of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llava_simplified.data.records import open_records, open_rows
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.prepare.convert import convert, file_name, fraction, main, reduce, reduce_main


def source(folder: Path, count: int = 400, each: int = 1) -> Path:
    """CC3M's form: `each` captions of every image, apart from one another."""
    lines = [
        f"caption {n} of {i}\thttp://a.example/{i}.jpg" for n in range(each) for i in range(count)
    ]
    path = folder / "train.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_records_come_back_from_every_format(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / f"records.{suffix}"
    counts, _ = convert(str(source(tmp_path)), output)
    assert counts == {str(output): 400}
    record = open_records(output)[17]
    assert record.images == (file_name(17, "http://a.example/17.jpg"),)
    assert record.responses == ("caption 0 of 17",)
    assert record.turns[0].content == "<image>\nGenerate a caption of this image:"


def test_captions_of_one_image_come_together_wherever_they_stand(tmp_path: Path) -> None:
    convert(str(source(tmp_path, count=30, each=5)), tmp_path / "records.json")
    rows = json.loads((tmp_path / "records.json").read_text())
    assert len(rows) == 30
    by_first = {row["responses"][0]: row["responses"] for row in rows}
    assert by_first["caption 0 of 7"] == [f"caption {n} of 7" for n in range(5)]


def test_equal_captions_of_one_image_are_one(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\thttp://a/1.jpg\na\thttp://a/1.jpg\nb\thttp://a/1.jpg\n")
    convert(str(tmp_path / "x.tsv"), tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text())[0]["responses"] == ["a", "b"]


def test_the_split_depends_on_the_image_alone(tmp_path: Path) -> None:
    convert(str(source(tmp_path)), tmp_path / "a.json", split="val=0.2")
    (tmp_path / "more").mkdir()
    longer = source(tmp_path / "more", count=600)
    convert(str(longer), tmp_path / "b.json", split="val=0.2")
    parts = {}
    for name in ("a_train", "a_val", "b_train", "b_val"):
        parts[name] = {row["image"] for row in json.loads((tmp_path / f"{name}.json").read_text())}
    assert len(parts["a_train"]) + len(parts["a_val"]) == 400
    assert 50 < len(parts["a_val"]) < 110
    assert parts["a_val"] < parts["b_val"]
    assert not parts["b_train"] & parts["b_val"]


def test_the_hash_is_uniform_and_fixed() -> None:
    numbers = [fraction(f"{i}.jpg") for i in range(10_000)]
    assert abs(sum(numbers) / 10_000 - 0.5) < 0.02
    assert fraction("0.jpg") == 0x4BF7B45967DB2132 / 2**64, "as b2sum -l 64 says"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_share_that_gets_nothing_is_an_empty_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "x.tsv").write_text("a caption\thttp://a/1.jpg\n")
    (older := tmp_path / f"o_val.{suffix}").write_text("of another run")
    counts, _ = convert(str(tmp_path / "x.tsv"), tmp_path / f"o.{suffix}", split="val=0.000001")
    assert counts == {str(tmp_path / f"o_train.{suffix}"): 1, str(older): 0}
    assert len(open_rows(older)) == 0
    (tmp_path / "x.tsv").write_text("\thttp://a/1.jpg\n")
    with pytest.raises(ValueError, match="no record came of it"):
        convert(str(tmp_path / "x.tsv"), tmp_path / f"o.{suffix}", split="val=0.5")
    assert {path.name for path in tmp_path.iterdir()} == {
        "x.tsv",
        f"o_train.{suffix}",
        f"o_val.{suffix}",
    }


@pytest.mark.parametrize("split", ["val", "val=2", "val=0.6,test=0.5", "val=x"])
def test_a_wrong_split_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        convert(str(source(tmp_path)), tmp_path / "o.json", split=split)


def test_karpathys_own_split(tmp_path: Path) -> None:
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": "x"}]}
        for i, split in enumerate(["train", "restval", "val", "test"])
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    counts, _ = convert(str(tmp_path / "k.json"), tmp_path / "o.json", split="source")
    assert {Path(path).name: n for path, n in counts.items()} == {
        "o_train.json": 2,
        "o_val.json": 1,
        "o_test.json": 1,
    }


def test_a_source_without_a_split_of_its_own_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a cat\thttp://a.example/1.jpg\n")
    counts, odd = convert(str(tmp_path / "x.tsv"), tmp_path / "o.json", split="source")
    assert counts == {str(tmp_path / "o_train.json"): 1}
    assert odd.counts["row without a split of its own (taken for training)"] == 1


def test_instructions_are_drawn_from_a_file_and_stay(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text(
        "Say what you see:\n\nDescribe it.\n<image>\\n?\n".replace("<image>\\n?\n", "What?\n")
    )
    results = []
    for _ in range(2):
        convert(
            str(source(tmp_path)), tmp_path / "o.json", instruction=str(tmp_path / "templates.txt")
        )
        results.append(
            [row["instruction"] for row in json.loads((tmp_path / "o.json").read_text())]
        )
    assert results[0] == results[1]
    assert {text: results[0].count(text) > 90 for text in set(results[0])} == {
        "Say what you see:": True, "Describe it.": True, "What?": True}  # fmt: skip


def test_only_rows_whose_picture_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / file_name(3, "http://a.example/3.jpg")).touch()
    png = file_name(5, "http://a.example/5.jpg").replace(".jpg", ".png")
    (folder / png).touch()
    _, odd = convert(str(source(tmp_path)), tmp_path / "o.json", image_folder=folder)
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["image"] for row in rows] == [file_name(3, "http://a.example/3.jpg"), png]
    assert list(odd.counts.values()) == [398]


def test_conversations_pass_unchanged_but_for_absolute_paths(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "/home/x/1.jpg", "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(rows))
    convert(str(tmp_path / "x.json"), tmp_path / "o.jsonl")
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert written == [{**rows[0], "image": "1.jpg"}, rows[1]]


def test_conversations_to_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(
        '[{"image": "1.jpg", "conversations": [{"from": "human", "value": "Hi"}]}]'
    )
    with pytest.raises(ValueError, match="conversations to .json or .jsonl"):
        convert(str(tmp_path / "x.json"), tmp_path / "o.parquet")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"image": "1.jpg", "caption": "a"}, {"image": ')
    with pytest.raises(ValueError, match="not JSON at byte"):
        convert(str(tmp_path / "x.json"), tmp_path / "o.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_reduce_is_a_random_sample_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": f"{i}.jpg", "instruction": "x", "response": f"é {i}"} for i in range(1000)]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(rows, indent=1))
    assert reduce_main([str(path), "--count", "100", "--seed", "3"]) == 0
    sample = json.loads((tmp_path / "all_100.json").read_text())
    assert sample == [rows[i] for i in sorted(random.Random(3).sample(range(1000), 100))]
    assert reduce(path, tmp_path / "more.jsonl", 5000, 0) == 1000
    assert [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()] == rows


def test_the_command_tells_counts_and_oddities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"a\thttp://a/1.jpg\r\nlost\r\nb\tc\thttp://a/2.jpg\r\n")
    assert main([str(path), "--output", str(tmp_path / "o.json")]) == 0
    told = capsys.readouterr().out
    assert "2 records" in told
    assert "1 ragged: too few fields (left out) (first: row 2: 'lost')" in told
    assert "3 CRLF line end" in told


def test_a_path_below_the_image_folder_stays_whole_and_another_machines_keeps_its_base_name(
    tmp_path: Path,
) -> None:
    """Pictures of two folders may have one base name: their captions are not joined."""
    for name in ("train/1.jpg", "val/1.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    rows = [
        f"{tmp_path}/images/train/1.jpg,a cat",
        f"{tmp_path}/images/val/1.jpg,a dog",
        "C:/x/3.jpg,c",
        "C:\\x\\4.jpg,d",
    ]
    (tmp_path / "x.csv").write_text("image,caption\n" + "\n".join(rows))
    convert(str(tmp_path / "x.csv"), tmp_path / "o.json", image_folder=tmp_path / "images")
    records = open_records(tmp_path / "o.json")
    assert [(*r.images, *r.responses) for r in records] == [
        ("train/1.jpg", "a cat"),
        ("val/1.jpg", "a dog"),
    ]
    _, odd = convert(str(tmp_path / "x.csv"), tmp_path / "o.json")
    assert [r.images for r in open_records(tmp_path / "o.json")] == [
        ("1.jpg",),
        ("1.jpg",),
        ("3.jpg",),
        ("4.jpg",),
    ]
    assert odd.counts == {"absolute path, not in --image-folder (base name kept)": 4}


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_kind_of_picture_that_is_downloaded_is_found(tmp_path: Path, suffix: str) -> None:
    name = file_name(0, "http://a.example/0.jpg").replace("jpg", suffix)
    (tmp_path / name).write_bytes(b"x")
    convert(str(source(tmp_path, 1)), tmp_path / "o.json", image_folder=tmp_path)
    assert open_records(tmp_path / "o.json")[0].images == (name,)


def test_a_row_that_is_no_json_is_named_by_the_sample_too(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"image": "1.jpg", "response": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl row 0: not JSON"):
        reduce(tmp_path / "x.jsonl", tmp_path / "o.jsonl", 1, 0)
