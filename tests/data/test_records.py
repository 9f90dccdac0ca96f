"""Rows of JSON become records: LLaVA's conversations and the instruction form, or an error that names the row."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_tokenizer

from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message, Prompt

TALK = [
    {"from": "human", "value": "What is this?\n<image>"},
    {"from": "gpt", "value": "a red car"},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "on the street"},
]


def test_llavas_conversation_trains_every_answer_and_nothing_else(data_folder: Path) -> None:
    record = Record.from_json({"id": "x", "image": "0.jpg", "conversations": TALK}, "row 0")
    assert record.turns == (
        Message("user", "What is this?\n<image>"), Message("assistant", "a red car"), Message("user", "Where?")
    )  # fmt: skip
    assert record.responses == ("on the street",)
    prompt = Prompt(make_tokenizer())
    transform = ImageTransform(32, (32, 32), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    example = CaptionDataset([record], prompt, data_folder / "images", transform)[0]
    trained = [
        token for token, label in zip(example.input_ids, example.labels) if label != IGNORE_INDEX
    ]
    ends = [place for place, token in enumerate(trained) if token == prompt.end_id]
    assert len(ends) == 2 and ends[-1] == len(trained) - 1
    assert (
        prompt.decode(trained) == "a red car"
        and prompt.decode(trained[ends[0] + 1 :]) == "on the street"
    )
    assert example.input_ids.count(IMAGE_INDEX) == 1


@pytest.mark.parametrize(
    ("row", "turns", "responses"),
    [
        ({"conversations": TALK[2:]}, [("user", "Where?")], ("on the street",)),  # text alone
        (
            {"image": "", "conversations": TALK[2:3]},
            [("user", "Where?")],
            (),
        ),  # a question: enough to ask a model
        (
            {
                "images": ["0.jpg", "1.jpg"],
                "conversations": [{"from": "system", "value": "Be brief."}, *TALK[2:]],
            },
            [("system", "Be brief."), ("user", "<image>\n<image>\nWhere?")],
            ("on the street",),
        ),
        (
            {"image": "0.jpg", "instruction": "What?", "responses": ["a", "b"]},
            [("user", "<image>\nWhat?")],
            ("a", "b"),
        ),
    ],
)
def test_images_stand_before_the_first_question_unless_it_says_where(
    row: dict, turns: list, responses: tuple
) -> None:
    record = Record.from_json(row, "row 0")
    assert [(turn.role, turn.content) for turn in record.turns] == turns
    assert record.responses == responses


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0.jpg"], "a record is a JSON object, this is list"),
        ({"image": 3, "instruction": "?"}, "'image' must be a path"),
        ({"image": ["0.jpg", ""], "instruction": "?"}, "'image' must be a path"),
        (
            {"image": "0.jpg", "caption": "a"},
            "no 'instruction' text and no 'conversations'; keys are .*caption",
        ),
        ({"instruction": "?", "responses": "a"}, "'responses' a list of texts"),
        ({"conversations": []}, "must be a list"),
        ({"conversations": ["hi"]}, "turn 0 needs 'from'"),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, "turn 0 needs 'from' .one of human"),
        (
            {"conversations": [TALK[0], {"from": "gpt", "value": None}]},
            "turn 1 needs .* a text 'value'",
        ),
        (
            {"conversations": TALK[1:]},
            "turns must alternate .* they are assistant, user, assistant",
        ),
        ({"conversations": [{"from": "system", "value": "hi"}]}, "turns must alternate"),
        ({"conversations": TALK}, r"0 image\(s\), but the text says <image> 1 time"),
        (
            {"image": ["0.jpg", "1.jpg"], "conversations": TALK},
            r"2 image\(s\), but the text says <image> 1 time",
        ),
    ],
)
def test_what_is_no_record_is_named_by_its_row(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 7: .*{message}"):
        Record.from_json(row, "row 7")


def test_a_prediction_has_the_tutorials_fields() -> None:
    one = Record.from_json({"image": "0.jpg", "instruction": "What?", "response": "a car"}, "row 0")
    assert prediction_row(3, one, "a dog") == {
        "index": 3, "image": "0.jpg", "instruction": "What?", "gt_caption": "a car", "pred_output": "a dog"
    }  # fmt: skip
    many = Record.from_json({"instruction": "What?", "responses": ["a", "b"]}, "row 0")
    assert (
        prediction_row(0, many, "c")["gt_caption"] == ["a", "b"]
        and prediction_row(0, many, "c")["image"] is None
    )
