"""`llava pairs`: preference pairs from sampled captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.cli import main
from llava_simplified.data.records import open_records, pair_problem

RECORDS = [
    {"image": "0.jpg", "instruction": "Name it.", "response": "a black cat"},
    {"image": "1.jpg", "instruction": "", "responses": ["a dog", "my pet"]},
    {
        "images": ["2.jpg", "3.jpg"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image> and <image>?"},
            {"from": "gpt", "value": "two cars"},
            {"from": "human", "value": "Which color?"},
            {"from": "gpt", "value": "red and blue"},
        ],
    },
    {"image": "4.jpg", "instruction": "Name it.", "response": "a tree"},
]
# The last caption of each record has the worst word F1. The first one has the best, except for record 1.
CAPTIONS = {
    0: ["a black cat", "a cat", "a cat", "dogs"],
    1: ["a cat", "my pet", "cars"],
    2: ["red and blue", "red"],
}


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def prediction_rows(captions: dict[int, list[str]]) -> list[dict[str, Any]]:
    rows = []
    for index, texts in captions.items():
        record = RECORDS[index]
        image = record.get("image") or record["images"][0]
        rows += [{"index": index, "image": image, "pred_output": text} for text in texts]
    return rows


@pytest.fixture
def make_pairs(tmp_path):
    """Run `llava pairs` on predictions; return the exit status and the output file."""

    def run(rows: list[dict[str, Any]], *options: str, records: object = RECORDS):
        data = write_json(tmp_path / "train.json", records)
        predictions = write_json(tmp_path / "predictions.json", rows)
        output = tmp_path / "pairs.json"
        argv = ["pairs", str(predictions), "--data-path", str(data), "--output", str(output)]
        return main([*argv, "--reward", "word_f1", *options]), output

    return run


def test_pairs_are_the_best_and_the_worst_caption_of_each_record(make_pairs, capsys):
    status, output = make_pairs(prediction_rows(CAPTIONS))
    assert status == 0
    pairs = open_records(output)
    assert not any(map(pair_problem, pairs))
    assert [pair.responses for pair in pairs] == [("a black cat",), ("my pet",), ("red and blue",)]
    assert [pair.rejected for pair in pairs] == ["dogs", "cars", "red"]
    assert "3 pairs" in capsys.readouterr().out


def test_pairs_keep_prompt_and_images_of_the_record(make_pairs, tmp_path):
    _, output = make_pairs(prediction_rows(CAPTIONS))
    originals = open_records(tmp_path / "train.json")
    for pair, original in zip(open_records(output), originals):
        assert pair.images == original.images
        assert pair.turns == original.turns


def test_equal_captions_and_rewards_are_counted(make_pairs, capsys):
    rows = prediction_rows({0: ["a cat", "a cat"], 1: ["cars", "trees"], 3: ["a tree", "a", " "]})
    status, output = make_pairs(rows)
    assert status == 0
    assert [pair.images for pair in open_records(output)] == [("4.jpg",)]
    printed = capsys.readouterr().out
    assert "1 records with fewer than two distinct captions" in printed
    assert "1 records with too small a difference" in printed


def test_min_difference_excludes_close_pairs(make_pairs):
    rows = prediction_rows({0: ["a black cat", "a cat"], 3: ["a tree", "dogs"]})
    _, output = make_pairs(rows, "--min-difference", "0.5")  # word F1 of "a cat": 0.8
    assert [pair.images for pair in open_records(output)] == [("4.jpg",)]


def test_bad_records_are_left_out_and_keep_their_index(make_pairs, package_log):
    """`llava predict` leaves them out. Removing them from the file would give the predictions the wrong indices."""
    rows = prediction_rows({0: ["a black cat", "a cat"], 3: ["a tree", "dogs"]})
    records = [RECORDS[0], {"no": "record"}, {"image": 5}, RECORDS[3]]
    status, output = make_pairs(rows, "--reward", "cider", records=records)
    assert status == 0
    assert [pair.images for pair in open_records(output)] == [("0.jpg",), ("4.jpg",)]
    assert "2 of 4 records cannot be used" in package_log.text


def test_ranked_pairs_compare_opposite_ranks_as_often_as_they_were_sampled(make_pairs):
    captions = {
        # Rewards (word F1): 0.8, 0, 1, 1, 0. The third-ranked caption of five is in no pair.
        0: ["a cat", "dogs", "a black cat", "a black cat", "dogs"],
        1: ["my pet", "cars", "cars", "my pet"],
        # Two captions of each reward: the second best and the second worst are as good as each other.
        3: ["cars", "a tree", "a tree", "a tree"],
    }
    _, output = make_pairs(prediction_rows(captions), "--pairing", "ranked")
    pairs = [(pair.images[0], *pair.responses, pair.rejected) for pair in open_records(output)]
    assert pairs == [
        ("0.jpg", "a black cat", "dogs"),
        ("0.jpg", "a black cat", "dogs"),
        ("1.jpg", "my pet", "cars"),
        ("1.jpg", "my pet", "cars"),
        ("4.jpg", "a tree", "cars"),
    ]


def test_records_without_reference_are_counted(make_pairs, capsys):
    without = {"image": "4.jpg", "instruction": "Name it."}
    rows = prediction_rows({0: ["a cat", "a dog"], 3: ["a tree", "dogs"]})
    status, _ = make_pairs(rows, records=[*RECORDS[:3], without])
    assert status == 0
    assert "1 records without a reference" in capsys.readouterr().out


def test_images_outside_the_image_folder_give_no_pair(make_pairs, tmp_path, capsys):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"x")
    folder = tmp_path / "images"
    folder.mkdir()
    images = ["../outside.jpg", str(outside), "missing.jpg"]
    records = [{"image": name, "instruction": "", "response": "a cat"} for name in images]
    rows = [
        {"index": index, "image": name, "pred_output": text}
        for index, name in enumerate(images)
        for text in ("a cat", "dogs")
    ]
    status, output = make_pairs(rows, "--image-folder", str(folder), records=records)
    assert status == 0
    # Word F1 needs no image, so one that is not on this machine may be missing.
    assert [pair.images for pair in open_records(output)] == [("missing.jpg",)]
    assert "2 records with an image outside the image folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"index": 9, "image": "0.jpg", "pred_output": "a cat"}, "index 9"),
        ({"index": -1, "image": "4.jpg", "pred_output": "a cat"}, "index -1"),
        ({"index": 0, "image": "1.jpg", "pred_output": "a cat"}, "1.jpg"),
        ({"index": True, "image": "1.jpg", "pred_output": "a cat"}, "index"),
        ({"image_id": 0, "caption": "a cat"}, "index"),
    ],
)
def test_predictions_of_other_records_are_refused(make_pairs, capsys, row, named):
    status, output = make_pairs([*prediction_rows(CAPTIONS), row])
    assert status == 2
    assert not output.exists()
    error = capsys.readouterr().err
    assert "predictions.json row 9" in error
    assert named in error


def test_no_pair_at_all_is_an_error(make_pairs, capsys):
    status, output = make_pairs(prediction_rows({0: ["cars", "trees"]}))
    assert status == 2
    assert not output.exists()
    assert "--min-difference" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--min-difference", "-1"),
        ("--min-difference", "nan"),
        ("--output", "pairs.parquet"),
        ("--reward", "qa"),
    ],
)
def test_wrong_options_are_named(make_pairs, capsys, options):
    status, _ = make_pairs(prediction_rows(CAPTIONS), *options)
    assert status == 2
    expected = options[0] if options[1] != "qa" else "--reward_endpoint"
    assert expected in capsys.readouterr().err
