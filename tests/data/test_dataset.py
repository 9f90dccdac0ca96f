"""Records become examples: tokens, labels, images and warnings."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import num_examples
from tiny import make_tokenizer

from llava_simplified.data.dataset import CaptionDataset, drop_bad_records
from llava_simplified.data.open_data import open_data
from llava_simplified.data.packing import PackedDataset
from llava_simplified.data.records import Record, Records, open_records
from llava_simplified.data.rows import open_rows
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Prompt

TRANSFORM = ImageTransform(32, (32, 32), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LONG_ANSWER = "a bedroom with a double bed " * 5


def make_dataset(folder: Path, rows: list[dict], **options: Any) -> CaptionDataset:
    """Return a dataset of JSON rows named "row 0", "row 1", ..."""
    records = [Record.from_json(row, f"row {index}") for index, row in enumerate(rows)]
    prompt = Prompt(make_tokenizer())
    return CaptionDataset(records, prompt, folder / "images", TRANSFORM, **options)


def make_row(image: str | None = "0.jpg", text: str = "What?", **answer: Any) -> dict:
    """Return a JSON row; its response is "a red car" unless `response` or `responses` is given."""
    return {"image": image, "instruction": text, **(answer or {"response": "a red car"})}


def test_dataset_example_has_pixels_and_one_placeholder(data_folder: Path) -> None:
    example = make_dataset(data_folder, [make_row()])[0]
    assert example.pixel_values is not None
    assert example.pixel_values.shape == (1, 3, 32, 32)
    assert example.pixel_values.dtype == torch.uint8
    assert example.input_ids.count(IMAGE_INDEX) == 1
    assert any(label != IGNORE_INDEX for label in example.labels)


def test_dataset_makes_one_example_per_response_without_shared_prefix(data_folder: Path) -> None:
    rows = [
        make_row(responses=["one", "two"]),
        make_row("1.jpg"),
        make_row("2.jpg", responses=["a", "b", "c"]),
    ]
    dataset = make_dataset(data_folder, rows, share_prefix=False)
    assert len(dataset) == 6
    located = [dataset.locate(index) for index in range(6)]
    assert [list(responses) for _, responses in located] == [
        ["one"],
        ["two"],
        ["a red car"],
        ["a"],
        ["b"],
        ["c"],
    ]
    assert [record.images[0] for record, _ in located] == [
        "0.jpg",
        "0.jpg",
        "1.jpg",
        "2.jpg",
        "2.jpg",
        "2.jpg",
    ]


def test_dataset_branches_equal_separate_examples(data_folder: Path) -> None:
    rows = [make_row(responses=["one", "two dogs"]), make_row("1.jpg")]
    shared = make_dataset(data_folder, rows)
    separate = make_dataset(data_folder, rows, share_prefix=False)
    assert len(shared) == 2

    example = shared[0]
    branches = example.branches
    assert branches is not None
    for number in (1, 2):
        own = [i for i, branch in enumerate(branches) if branch in (0, number)]
        assert [example.input_ids[i] for i in own] == separate[number - 1].input_ids
        assert [example.labels[i] for i in own] == separate[number - 1].labels
    assert branches == sorted(branches)
    assert branches.count(0) == separate[0].labels.count(IGNORE_INDEX)
    assert shared[1].branches is None, "one answer needs no branches"


def test_dataset_replaces_an_example_with_a_bad_image(data_folder: Path) -> None:
    rows = [make_row("gone.jpg"), make_row("1.jpg", response="two dogs")]
    dataset = make_dataset(data_folder, rows)
    example = dataset[0]
    assert example.warnings[0].startswith("bad image, row 0: ")
    assert torch.equal(example.pixel_values, dataset[1].pixel_values)
    assert example.labels == dataset[1].labels, "the caption must belong to the image"


def test_dataset_truncates_a_long_answer_at_a_word_and_keeps_its_end(data_folder: Path) -> None:
    dataset = make_dataset(data_folder, [make_row(response=LONG_ANSWER)], max_length=40)
    example = dataset[0]
    assert len(example.input_ids) == len(example.labels) <= 40
    assert example.labels[-1] == example.input_ids[-1] == dataset.prompt.end_id
    answer = [label for label in example.labels if label != IGNORE_INDEX]
    assert LONG_ANSWER.startswith(dataset.prompt.decode(answer) + " ")
    assert len(answer) > 5
    assert example.warnings[0].startswith("truncated answer, row 0: ")


def test_dataset_truncates_inside_a_single_long_word(data_folder: Path) -> None:
    example = make_dataset(data_folder, [make_row(response="x" * 300)], max_length=40)[0]
    assert len(example.input_ids) == 40
    assert example.labels[-1] != IGNORE_INDEX


@pytest.mark.parametrize("start", [" ", "   ", " \n "])
def test_dataset_truncates_inside_a_long_word_after_spaces(data_folder: Path, start: str) -> None:
    dataset = make_dataset(data_folder, [make_row(response=start + "x" * 300)], max_length=40)
    example = dataset[0]
    assert len(example.input_ids) == 40
    answer = [label for label in example.labels if label != IGNORE_INDEX]
    assert answer[-1] == dataset.prompt.end_id
    assert "x" in dataset.prompt.decode(answer)


@pytest.mark.parametrize(
    ("text", "max_length"),
    [("What?", 5), ("so many words before it <image>", 8)],
)
def test_dataset_rejects_a_prompt_without_room_for_an_answer(
    data_folder: Path, text: str, max_length: int
) -> None:
    dataset = make_dataset(data_folder, [make_row(text=text)], max_length=max_length)
    with pytest.raises(ValueError, match="row 0: the prompt leaves no room .*--model_max_length"):
        dataset[0]


@pytest.mark.parametrize("response", ["", "  "])
def test_dataset_error_for_an_empty_answer_names_the_row(data_folder: Path, response: str) -> None:
    dataset = make_dataset(data_folder, [make_row(response=response)])
    with pytest.raises(ValueError, match="row 0"):
        dataset[0]


def test_dataset_rejects_a_record_without_responses(data_folder: Path) -> None:
    rows = [make_row(), {"image": "1.jpg", "instruction": "What?"}]
    dataset = make_dataset(data_folder, rows)
    with pytest.raises(ValueError, match="row 1: no response"):
        dataset[1]


def test_dataset_reads_text_only_rows_and_several_images(data_folder: Path) -> None:
    two_images = {
        "image": ["0.jpg", "1.jpg"],
        "instruction": "<image> or <image>?",
        "response": "no",
    }
    dataset = make_dataset(data_folder, [make_row(None), two_images])
    assert dataset[0].pixel_values is None
    assert dataset[1].pixel_values is not None
    assert dataset[1].pixel_values.shape[0] == 2


def test_dataset_opens_no_image_with_precomputed_features(data_folder: Path) -> None:
    features = {"0.jpg": torch.rand(4, 8)}
    example = make_dataset(data_folder, [make_row()], features=features)[0]
    assert example.image_features is not None
    assert torch.equal(example.image_features[0], features["0.jpg"])
    assert example.pixel_values is None


def test_dataset_treats_an_image_without_features_as_a_bad_image(data_folder: Path) -> None:
    features = {"1.jpg": torch.rand(4, 8)}
    rows = [make_row("0.jpg"), make_row("1.jpg")]
    example = make_dataset(data_folder, rows, features=features)[0]
    assert example.warnings[0].startswith("bad image, row 0: 0.jpg ")
    assert example.image_features is not None
    assert torch.equal(example.image_features[0], features["1.jpg"])


def test_pack_leaves_out_an_example_with_a_bad_image(data_folder: Path) -> None:
    rows = [make_row("gone.jpg"), make_row("1.jpg", response=LONG_ANSWER), make_row("2.jpg")]
    dataset = make_dataset(data_folder, rows)
    lengths = dataset.lengths(4)
    packs = PackedDataset(dataset, tokens_per_image=4, pack_length=int(lengths.sum()), seed=0)
    [examples] = [packs[index] for index in range(len(packs))]
    assert sorted(example.id for example in examples) == ["row 1", "row 2"], "each is trained once"
    [warning] = [warning for example in examples for warning in example.warnings]
    assert warning.startswith("bad image, row 0: ")


def test_pack_of_bad_images_only_contains_another_example(data_folder: Path) -> None:
    rows = [make_row("gone.jpg"), make_row("gone too.jpg"), make_row("1.jpg", response=LONG_ANSWER)]
    dataset = make_dataset(data_folder, rows)
    lengths = dataset.lengths(4)
    pack_length = int(max(lengths[0] + lengths[1], lengths[2]))
    packs = PackedDataset(dataset, tokens_per_image=4, pack_length=pack_length, seed=0)
    assert len(packs) == 2
    for pack in (packs[0], packs[1]):
        [example] = pack
        assert example.id == "row 2"
        named = {warning.partition(":")[0] for warning in example.warnings}
        assert named in (set(), {"bad image, row 0", "bad image, row 1"})


@pytest.mark.parametrize("share_prefix", [True, False])
def test_dataset_lengths_count_expanded_images(data_folder: Path, share_prefix: bool) -> None:
    rows = [make_row(responses=["one", "two dogs"]), make_row(None)]
    dataset = make_dataset(data_folder, rows, share_prefix=share_prefix)
    expected = []
    for index in range(len(dataset)):
        input_ids = dataset[index].input_ids
        expected.append(len(input_ids) + 9 * input_ids.count(IMAGE_INDEX))
    assert dataset.lengths(tokens_per_image=10).tolist() == expected


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_open_data_reads_a_folder_of_a_download(
    data_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(data_folder / "images" / "0.jpg", tmp_path)
    text = json.dumps(make_row())
    if name == "records.json":
        text = f"[{text}]"
    (tmp_path / name).write_text(text)
    records, folder = open_data(str(tmp_path), None, "--train_image_folder")
    assert records[0].images == ("0.jpg",)
    assert folder == str(tmp_path)


def test_open_data_names_the_option_of_a_wrong_image_folder(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([make_row()]))
    with pytest.raises(ValueError, match="--train_image_folder .*nowhere"):
        open_data(str(path), str(tmp_path / "nowhere"), "--train_image_folder")
    with pytest.raises(ValueError, match="--train_image_folder .*first images.*0.jpg"):
        open_data(str(path), str(tmp_path), "--train_image_folder")


# ---- records that cannot be trained on ----


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


BAD_ROWS = [
    make_row(response="a \ud83d b"),  # half of a surrogate pair
    make_row(text="\udc00"),
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}]},
    {"image": "0.jpg", "caption": "not a record"},
    make_row(text="many words " * 30),
    make_row(text="長い質問です" * 20),
    make_row(response="  "),
    {"image": "0.jpg", "instruction": "What?"},
    "[1, 2]",
    '{"image": "0.jpg", ',
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_record_is_set_aside_before_training_and_named(
    data_folder: Path, tmp_path: Path, package_log: pytest.LogCaptureFixture, bad: Any
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(), bad, make_row("1.jpg")])
    records = Records(open_rows(path))
    prompt = Prompt(make_tokenizer())
    good = drop_bad_records(records, 0.01, prompt, max_length=64)
    assert [record.images[0] for record in good] == ["0.jpg", "1.jpg"]
    assert [record.id for record in good] == ["rows.jsonl row 0", "rows.jsonl row 2"]
    assert pickle.loads(pickle.dumps(good))[1].images == ("1.jpg",)
    assert "1 of 3 records" in package_log.text
    assert "rows.jsonl row 1" in package_log.text
    dataset = CaptionDataset(good, prompt, data_folder / "images", TRANSFORM, max_length=64)
    assert [example.id for example in (dataset[0], dataset[1])] == [record.id for record in good]
    with pytest.raises(ValueError, match="rows.jsonl row 1"):
        drop_bad_records(records, 0, prompt, max_length=64)


def test_too_many_bad_records_are_an_error_that_names_the_option(tmp_path: Path) -> None:
    good = make_row()
    bad = make_row(text="many words " * 30)
    prompt = Prompt(make_tokenizer())
    path = write_rows(tmp_path / "rows.jsonl", [good, bad, bad])
    with pytest.raises(
        ValueError, match="--max_bad_records 0.01: 2 of 3 .*row 1.*--model_max_length"
    ):
        drop_bad_records(Records(open_rows(path)), 0.01, prompt, max_length=64)
    assert len(drop_bad_records(Records(open_rows(path)), 0.02, prompt, max_length=64)) == 1
    path = write_rows(tmp_path / "all.jsonl", [bad, bad])
    with pytest.raises(ValueError, match="row 0.*--model_max_length"):
        drop_bad_records(Records(open_rows(path)), 1.0, prompt, max_length=64)


def test_drop_bad_records_tokenizes_only_what_may_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_row(text=f"question {number}?") for number in range(200)]
    rows[77] = make_row(text="many words " * 30)
    records = Records(open_rows(write_rows(tmp_path / "rows.jsonl", rows)))
    prompt = Prompt(make_tokenizer())
    rendered = []
    render = Prompt.render

    def count_and_render(self: Prompt, *arguments: Any) -> Any:
        rendered.append(arguments)
        return render(self, *arguments)

    monkeypatch.setattr(Prompt, "render", count_and_render)
    assert len(drop_bad_records(records, 1.0, prompt, max_length=100)) == 199
    assert len(rendered) == 2, "the template, and the long prompt"


@pytest.mark.medium
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.integers(12, 80))
@settings(max_examples=num_examples(80), deadline=None)
def test_kept_records_always_leave_room_for_an_answer(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_length: int
) -> None:
    rows = [make_row(None, text=text.replace("<", "")) for text in texts] + [make_row(None)]
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    prompt = Prompt(make_tokenizer())
    try:
        good = drop_bad_records(Records(open_rows(path)), 1.0, prompt, max_length)
    except ValueError:
        return  # all are too long
    dataset = CaptionDataset(good, prompt, "unused", TRANSFORM, max_length=max_length)
    for index in range(len(good)):
        assert len(dataset[index].input_ids) <= max_length


def test_image_names_that_do_not_match_exactly_are_counted(
    data_folder: Path, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    rows = [make_row("/home/ann/images/0.jpg"), make_row("/home/ann/images/1.jpg")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    folder = str(data_folder / "images")
    records, _ = open_data(str(path), folder, "--train_image_folder")
    assert "suffix" in package_log.text
    dataset = CaptionDataset(records, Prompt(make_tokenizer()), folder, TRANSFORM)
    assert dataset[0].warnings[0].startswith("image name matched by suffix, rows.jsonl row 0")
    assert make_dataset(data_folder, [make_row()])[0].warnings == []

    rows.append(make_row("/home/bob/0.jpg"))
    path = write_rows(tmp_path / "two.jsonl", rows)
    with pytest.raises(ValueError, match=r"two.jsonl: .*ann/images/0.jpg.*bob/0.jpg"):
        open_data(str(path), folder, "--train_image_folder")


def test_open_data_refuses_a_missing_image_whose_name_leads_to_the_image_of_another_record(
    data_folder: Path, tmp_path: Path
) -> None:
    rows = [make_row("0.jpg"), make_row("1.jpg"), make_row("gone/0.jpg")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows.jsonl: .*0.jpg.*gone/0.jpg.*both names lead"):
        open_data(str(path), str(data_folder / "images"), "--train_image_folder")


@pytest.mark.parametrize("bad", [make_row(response=""), {"image": "0.jpg", "instruction": "?"}])
def test_record_without_a_response_is_tolerated_as_every_bad_record(
    data_folder: Path, tmp_path: Path, bad: dict
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(), bad, make_row("1.jpg")])
    folder = str(data_folder / "images")
    records, _ = open_data(str(path), folder, "--train_image_folder", max_bad_records=0.01)
    assert len(drop_bad_records(records, 0.01)) == 2
    with pytest.raises(ValueError, match=r"rows.jsonl row 1: no response"):
        open_data(str(path), folder, "--train_image_folder")


def test_bad_records_are_logged_once(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    """`drop_bad_records` logs them, so `open_records` does not."""
    row = '{"image": "0.jpg", "instruction": "What?", "response": "a cat"}'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([row, '{"image": 3}', row, "no JSON"]))
    records = open_records(path, max_bad_records=1)
    good = drop_bad_records(records, 1)
    assert len(good) == 2
    [message] = package_log.messages
    assert "row 1" in message
    assert "row 3" in message
