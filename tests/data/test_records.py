"""Rows of JSON become records, or an error that names the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tokenizer

from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message, Prompt

CONVERSATION = [
    {"from": "human", "value": "What is this?\n<image>"},
    {"from": "gpt", "value": "a red car"},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "on the street"},
]
QUESTION = CONVERSATION[2:3]
QUESTION_AND_ANSWER = CONVERSATION[2:]


def test_conversation_splits_off_the_last_answer() -> None:
    row = {"id": "x", "image": "0.jpg", "conversations": CONVERSATION}
    record = Record.from_json(row, "row 0")
    assert record.turns == (
        Message("user", "What is this?\n<image>"),
        Message("assistant", "a red car"),
        Message("user", "Where?"),
    )
    assert record.responses == ("on the street",)


def test_null_as_an_answer_of_a_chat_is_an_empty_text() -> None:
    def parse(answer: object) -> Record:
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": answer, "refusal": None, "tool_calls": None},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "a cat"},
        ]
        return Record.from_json({"messages": messages}, "row 0")

    assert parse(None).turns == parse("").turns
    assert parse(None).turns[1] == Message("assistant", "")
    for wrong in (3, {"text": "Ho"}):
        with pytest.raises(ValueError, match="row 0"):
            parse(wrong)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": None},
        {"role": "system", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "text": "Ho"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ],
)
def test_turn_whose_content_is_elsewhere_or_missing_is_refused(turn: dict[str, object]) -> None:
    others = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    messages = [turn, *others] if turn["role"] == "system" else [*others, *others]
    if turn["role"] != "system":
        messages[0 if turn["role"] == "user" else 1] = turn
    with pytest.raises(ValueError, match="row 0"):
        Record.from_json({"messages": messages}, "row 0")


def test_conversation_has_labels_for_every_answer_and_nothing_else(data_folder: Path) -> None:
    row = {"id": "x", "image": "0.jpg", "conversations": CONVERSATION}
    record = Record.from_json(row, "row 0")
    prompt = Prompt(make_tokenizer())
    transform = ImageTransform(32, (32, 32), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    example = CaptionDataset([record], prompt, data_folder / "images", transform)[0]

    trained = []
    for token, label in zip(example.input_ids, example.labels):
        if label != IGNORE_INDEX:
            trained.append(token)
    ends = [position for position, token in enumerate(trained) if token == prompt.end_id]
    assert len(ends) == 2
    assert ends[-1] == len(trained) - 1
    assert prompt.decode(trained) == "a red car"
    assert prompt.decode(trained[ends[0] + 1 :]) == "on the street"
    assert example.input_ids.count(IMAGE_INDEX) == 1


@pytest.mark.parametrize(
    ("row", "turns", "responses"),
    [
        pytest.param(
            {"conversations": QUESTION_AND_ANSWER},
            [("user", "Where?")],
            ("on the street",),
            id="text only",
        ),
        pytest.param(
            {"image": "", "conversations": QUESTION},
            [("user", "Where?")],
            (),
            id="question without an answer",
        ),
        pytest.param(
            {
                "images": ["0.jpg", "1.jpg"],
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    *QUESTION_AND_ANSWER,
                ],
            },
            [("system", "Be brief."), ("user", "<image>\n<image>\nWhere?")],
            ("on the street",),
            id="two images and a system turn",
        ),
        pytest.param(
            {"image": "0.jpg", "instruction": "What?", "responses": ["a", "b"]},
            [("user", "<image>\nWhat?")],
            ("a", "b"),
            id="two responses",
        ),
    ],
)
def test_record_inserts_placeholders_at_the_start_of_the_first_user_turn(
    row: dict, turns: list, responses: tuple
) -> None:
    record = Record.from_json(row, "row 0")
    assert [(turn.role, turn.content) for turn in record.turns] == turns
    assert record.responses == responses


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0.jpg"], "JSON object.* list"),
        ({"image": 3, "instruction": "?"}, "'image'.* path"),
        ({"image": ["0.jpg", ""], "instruction": "?"}, "'image'.* path"),
        ({"image": "0.jpg", "caption": "a"}, "'instruction'.*'conversations'.*caption"),
        ({"instruction": "?", "responses": "a"}, "'responses'.* list"),
        ({"conversations": []}, "'conversations'.* list"),
        ({"conversations": ["hi"]}, "turn 0 .*'from'"),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, "turn 0 .*'from'.* human"),
        (
            {"conversations": [CONVERSATION[0], {"from": "gpt", "value": None}]},
            "turn 1 .*'value'",
        ),
        ({"conversations": CONVERSATION[1:]}, "alternate.* assistant, user, assistant"),
        ({"conversations": [{"from": "system", "value": "hi"}]}, "alternate"),
        ({"conversations": CONVERSATION}, r"0 image.*<image> 1 "),
        ({"image": ["0.jpg", "1.jpg"], "conversations": CONVERSATION}, r"2 image.*<image> 1 "),
    ],
)
def test_record_error_names_the_row_and_the_key(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 7: .*{message}"):
        Record.from_json(row, "row 7")


def test_prediction_row_has_the_fields_of_the_tutorial() -> None:
    row = {"image": "0.jpg", "instruction": "What?", "response": "a car"}
    record = Record.from_json(row, "row 0")
    assert prediction_row(3, record, "a dog") == {
        "index": 3,
        "image": "0.jpg",
        "instruction": "What?",
        "gt_caption": "a car",
        "pred_output": "a dog",
    }


@pytest.mark.parametrize(
    ("references", "prediction", "responses"),
    [
        ("", "a dog", ("a dog",)),
        ("a cat", "a dog", ("a cat",)),
        (["a cat", "my cat"], "a dog", ("a cat", "my cat")),
        ("", "", ()),
    ],
)
def test_prediction_becomes_a_record_of_its_references_or_its_text(
    tmp_path: Path, references: object, prediction: str, responses: tuple[str, ...]
) -> None:
    """The responses of the record are the references, or the generated text if there are no references."""
    row = {"index": 0, "image": "0.jpg", "instruction": "What?"}
    row |= {"gt_caption": references, "pred_output": prediction}
    assert Record.from_json(row, "row 0").responses == responses
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    issues = ParseIssues()
    [read] = read_source(str(tmp_path / "x.jsonl"), issues, Columns())
    assert read.captions == responses
    assert bool(issues.counts) == (not responses)


def test_prediction_row_lists_several_references() -> None:
    record = Record.from_json({"instruction": "What?", "responses": ["a", "b"]}, "row 0")
    row = prediction_row(0, record, "c")
    assert row["gt_caption"] == ["a", "b"]
    assert row["image"] is None


# ---- rows that would otherwise be misread without an error ----

VIDEO_TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
TEXT = {"instruction": "What?", "response": "a dog"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "conversations": VIDEO_TURNS}, "'video'"),
        ({"conversations": VIDEO_TURNS}, "<video>"),
        ({"video": "a.mp4", **TEXT}, "'video'.*a.mp4"),
        ({"videos": ["a.mp4"], "image": "0.jpg", **TEXT}, "'videos'"),
        ({"video_path": "a", **TEXT}, "'video_path'"),
        ({"audio": {"bytes": "x"}, **TEXT}, "'audio'"),
        ({"point_cloud": "a.ply", **TEXT}, "'point_cloud'"),
        ({"clip_name": "a.webm", **TEXT}, "'clip_name'.*a.webm"),
        ({"image_path": "0.jpg", **TEXT}, "'image_path'.*'image'"),
        ({"img": "0.jpg", **TEXT}, "'img'.*'image'"),
        ({"image": None, "picture": "0.jpg", **TEXT}, "'picture'.*'image'"),
        ({"image": "0.jpg", "images": ["1.jpg"], **TEXT}, "'images'.*1.jpg"),
        ({"image": "0.jpg", "instruction": "<image_1> What?", "response": "x"}, "<image_1>"),
        ({"image": "0.jpg", "instruction": "<|image_1|> What?", "response": "x"}, r"<\|image_1\|>"),
        ({"image": "0.jpg", "instruction": "<IMAGE> What?", "response": "x"}, "<IMAGE>"),
        ({"instruction": "<|vision_start|>What?", "response": "x"}, "vision_start"),
        ({"instruction": "<audio> What?", "response": "x"}, "<audio>"),
        ({"instruction": "What?", "response": "a \ud83d b"}, "surrogate.*ud83d"),
        ({"instruction": "What \udc00?", "response": "b"}, "surrogate"),
        ({"image": "caf\udce9.jpg", **TEXT}, "surrogate"),
        (
            {"conversations": [*CONVERSATION, {"from": "system", "value": "hi"}], "image": "0.jpg"},
            "alternate.*system",
        ),
    ],
)
def test_record_refuses_what_would_train_as_something_else(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 7: .*{message}"):
        Record.from_json(row, "row 7")


@pytest.mark.parametrize(
    "key",
    ["Image", "image_bytes", "image_list", "file_name", "path", "media", "frames", "thumbnail"],
)
def test_record_refuses_an_image_under_a_key_that_is_not_read(key: str) -> None:
    for value in ("0.jpg", ["0.PNG", "1.webp"]):
        with pytest.raises(ValueError, match=f"row 7: .*{key!r}.*'image'"):
            Record.from_json({key: value, **TEXT}, "row 7")


@pytest.mark.parametrize(
    "placeholder",
    [
        *("<image/>", "<image />", "<image_placeholder>", "<ImageHere>", "[IMG]", "<video_0>"),
        *("<img>a.jpg</img>", "<image_soft_token>", "<start_of_image>", "<im_start>", "<pdf>"),
        *("<|audio_bos|>", "<|AUDIO|>", "<IMG_CONTEXT>", "<|vision_start|>", "<|video_pad|>"),
    ],
)
def test_record_refuses_placeholders_of_other_programs(placeholder: str) -> None:
    for row in (
        {"instruction": f"{placeholder} What?"},
        {"image": "0.jpg", "instruction": placeholder},
    ):
        with pytest.raises(ValueError, match="row 7: the placeholder"):
            Record.from_json({**row, "response": "x"}, "row 7")


@pytest.mark.parametrize(
    "changed",
    [
        {"images": ["0.jpg"]},
        {"image": "0.jpg"},
        {"video": "a.mp4"},
        {"tool_calls": [{"id": 1}]},
        {"function_call": {"name": "f"}},
    ],
)
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_record_refuses_unsupported_keys_of_a_turn(form: str, changed: dict) -> None:
    names = ("role", "content") if form == "messages" else ("from", "value")
    for number in range(2):
        turns = [dict(zip(names, turn)) for turn in (("user", "What?"), ("assistant", "x"))]
        assert Record.from_json({form: turns}, "row 7").responses == ("x",)
        turns[number].update(changed)
        with pytest.raises(ValueError, match=f"row 7.*{next(iter(changed))!r}"):
            Record.from_json({form: turns}, "row 7")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Translate:", "input": "chien", "response": "dog"},
        {"instruction": "And now?", "history": [["a", "b"]], "response": "dog"},
        {"system": "Be brief.", **TEXT},
        {"tools": [{"name": "f"}], **TEXT},
        {"responses": ["a cat"], **TEXT},
    ],
)
def test_record_refuses_further_keys_that_would_be_ignored(row: dict) -> None:
    with pytest.raises(
        ValueError, match=f"row 7: .*{next(key for key in row if key != 'instruction')}"
    ):
        Record.from_json(row, "row 7")


@pytest.mark.parametrize(
    "row",
    [
        {"input": "", "history": [], "tools": None, "system": "", **TEXT},
        {"responses": ["a dog"], **TEXT},
        {"instruction": 'Close <img src="a.png"> and <b>x</b>', "response": "[img]"},
        {"image": "0.jpg", "video_id": "x7", "source": "talk.mp4", **TEXT},
        {"image": "0.jpg", "image_url": "http://x/0.jpg", "clip": 0.31, "video": False, **TEXT},
        {"image": None, "images": ["0.jpg"], **TEXT},
        {"image": "0.jpg", "images": ["0.jpg"], **TEXT},
        {"video": None, "audio": "", "id": "a.mp4", **TEXT},
        {"instruction": "What does <video src='a'></video> do?", "response": "<video> plays"},
        {"instruction": "Use <b>tags</b> & 1 < 2 <x>", "response": "\u2028\u2029\x85 \U0001f600"},
    ],
)
def test_record_accepts_other_keys_and_texts(row: dict) -> None:
    record = Record.from_json(row, "row 7")
    assert record.responses == (row["response"],)
    assert record.images == (("0.jpg",) if row.get("image") or row.get("images") else ())


# ---- image parts of chats ----


def chat(images: list[str], *parts: dict) -> dict:
    content = [*parts, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    return {"images": images, "messages": turns} if images else {"messages": turns}


def image_part(**keys: object) -> dict:
    return {"type": "image", **keys}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(["a.jpg", "b.jpg"], image_part(index=0)), "'b.jpg'.*the index 1"),
        (chat(["a.jpg", "b.jpg"], image_part(index=1), image_part(index=1)), "'a.jpg'.*index 0"),
        (chat(["a.jpg", "b.jpg"], image_part(index=1), image_part()), "index to every image part"),
        (chat(["a.jpg", "b.jpg"], image_part(), image_part(index=0)), "index to every image part"),
    ],
)
def test_chat_whose_parts_do_not_refer_to_every_image_is_an_error(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 7: .*{message}"):
        Record.from_json(row, "row 7")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///home/ann/my%20cat.jpg", "/home/ann/my cat.jpg"),
        ("file://localhost/home/ann/100%25.jpg", "/home/ann/100%.jpg"),
        ("file://a/1.jpg", "a/1.jpg"),
    ],
)
def test_file_url_is_the_path_of_an_image(url: str, path: str) -> None:
    rows = [
        chat([], image_part(image=url)),
        chat([], image_part(image_url={"url": url})),
        chat([url], image_part()),
        {"image": url, "instruction": "What?", "response": "a cat"},
    ]
    for row in rows:
        assert Record.from_json(row, "row 7").images == (path,)
