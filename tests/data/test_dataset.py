"""Records -> examples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer

from llava_simplified.data.dataset import CaptionDataset, open_data
from llava_simplified.data.records import Record
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Prompt

TRANSFORM = ImageTransform(32, (32, 32), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def dataset(folder: Path, rows: list[dict], **options) -> CaptionDataset:
    records = [Record.from_json(row, f"row {i}") for i, row in enumerate(rows)]
    return CaptionDataset(
        records, Prompt(make_tokenizer()), folder / "images", TRANSFORM, **options
    )


def row(image: str | None = "0.jpg", text: str = "What?", **answer) -> dict:
    return {"image": image, "instruction": text, **(answer or {"response": "a red car"})}


def test_an_example_has_pixels_and_one_placeholder(data_folder: Path) -> None:
    example = dataset(data_folder, [row()])[0]
    assert example.pixel_values.shape == (1, 3, 32, 32)
    assert example.pixel_values.dtype == torch.uint8
    assert example.input_ids.count(IMAGE_INDEX) == 1
    assert any(label != IGNORE_INDEX for label in example.labels)


def test_every_response_is_an_example_in_order_where_the_prefix_is_not_shared(
    data_folder: Path,
) -> None:
    rows = [row(responses=["one", "two"]), row("1.jpg"), row("2.jpg", responses=["a", "b", "c"])]
    data = dataset(data_folder, rows, share_prefix=False)
    assert len(data) == 6
    assert [list(data.locate(i)[1]) for i in range(6)] == [
        ["one"],
        ["two"],
        ["a red car"],
        ["a"],
        ["b"],
        ["c"],
    ]
    assert [data.locate(i)[0].images[0] for i in range(6)] == [
        "0.jpg",
        "0.jpg",
        "1.jpg",
        *["2.jpg"] * 3,
    ]


def test_the_responses_of_a_record_share_its_prompt(data_folder: Path) -> None:
    rows = [row(responses=["one", "two dogs"]), row("1.jpg")]
    shared, apart = dataset(data_folder, rows), dataset(data_folder, rows, share_prefix=False)
    assert len(shared) == 2
    prompt, branches = shared[0].branches.count(0), shared[0].branches
    for number in (1, 2):
        own = [i for i, branch in enumerate(branches) if branch in (0, number)]
        assert [shared[0].input_ids[i] for i in own] == apart[number - 1].input_ids
        assert [shared[0].labels[i] for i in own] == apart[number - 1].labels
    assert branches == sorted(branches) and prompt == apart[0].labels.count(IGNORE_INDEX)
    assert shared[1].branches is None, "one answer needs no mask"


def test_a_bad_image_gives_way_to_the_next_and_says_so(data_folder: Path) -> None:
    data = dataset(data_folder, [row("gone.jpg"), row("1.jpg", response="two dogs")])
    example = data[0]
    assert example.warnings[0].startswith("bad image, row 0: ")
    assert torch.equal(example.pixel_values, data[1].pixel_values)
    assert example.labels == data[1].labels, "the caption must go with the picture"


def test_a_long_answer_loses_words_loudly_and_keeps_its_end_token(data_folder: Path) -> None:
    data = dataset(data_folder, [row(response="a bedroom with a double bed " * 5)], max_length=40)
    example = data[0]
    assert len(example.input_ids) == len(example.labels) <= 40
    assert example.labels[-1] == example.input_ids[-1] == data.prompt.end_id
    answer = [label for label in example.labels if label != IGNORE_INDEX]
    assert ("a bedroom with a double bed " * 5).startswith(data.prompt.decode(answer) + " ")
    assert len(answer) > 5
    assert example.warnings[0].startswith("cut, row 0: ")


def test_a_word_without_end_is_cut_inside(data_folder: Path) -> None:
    example = dataset(data_folder, [row(response="x" * 300)], max_length=40)[0]
    assert len(example.input_ids) == 40 and example.labels[-1] != IGNORE_INDEX


def test_a_prompt_without_room_for_an_answer_is_an_error(data_folder: Path) -> None:
    with pytest.raises(ValueError, match="row 0: the prompt leaves no room"):
        dataset(data_folder, [row()], max_length=5)[0]
    with pytest.raises(ValueError, match="row 0: the prompt leaves no room"):
        dataset(data_folder, [row(text="so many words before it <image>")], max_length=8)[0]


@pytest.mark.parametrize("answer", [{"response": ""}, {"response": "  "}])
def test_an_empty_answer_names_the_row(data_folder: Path, answer: dict) -> None:
    with pytest.raises(ValueError, match="row 0"):
        dataset(data_folder, [row(**answer)])[0]


def test_a_record_without_answers_cannot_be_trained_on(data_folder: Path) -> None:
    data = dataset(data_folder, [row(), {"image": "1.jpg", "instruction": "What?"}])
    with pytest.raises(ValueError, match="row 1: no response to train on"):
        data[1]


def test_text_only_rows_and_several_images(data_folder: Path) -> None:
    data = dataset(
        data_folder,
        [
            row(None),
            {"image": ["0.jpg", "1.jpg"], "instruction": "<image> or <image>?", "response": "no"},
        ],
    )
    assert data[0].pixel_values is None
    assert data[1].pixel_values.shape[0] == 2


def test_features_computed_before_open_no_picture(data_folder: Path) -> None:
    features = {"0.jpg": torch.rand(4, 8)}
    example = dataset(data_folder, [row()], features=features)[0]
    assert torch.equal(example.image_features[0], features["0.jpg"])
    assert example.pixel_values is None


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_a_folder_of_a_download_holds_records_and_pictures(
    data_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(data_folder / "images" / "0.jpg", tmp_path)
    (tmp_path / name).write_text(
        json.dumps([row()])[name[-1] == "l" :].removesuffix("]" * (name[-1] == "l"))
    )
    records, folder = open_data(str(tmp_path), None, "--train_image_folder")
    assert (records[0].images, folder) == (("0.jpg",), str(tmp_path))
