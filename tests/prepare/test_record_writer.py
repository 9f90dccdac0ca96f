"""Writing records: a Parquet file holds all that training uses of a record, or the record is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.data.records import open_records
from llava_simplified.prepare.convert import reduce

_RECORD = {"image": "1.jpg", "instruction": "Describe it."}


@pytest.mark.parametrize(
    ("row", "responses"),
    [
        ({**_RECORD, "gt_caption": "", "pred_output": "a cat"}, ("a cat",)),
        ({**_RECORD, "gt_caption": ["a", "b"], "pred_output": "a cat"}, ("a", "b")),
        ({**_RECORD, "response": "a cat"}, ("a cat",)),
        ({**_RECORD, "response": "b", "responses": ["a", "b"]}, ("a", "b")),
        ({"image": None, "images": ["1.jpg"], "instruction": "Describe it."}, ()),
        (_RECORD, ()),
    ],
)
def test_record_writer_keeps_the_responses_of_every_form_of_record_in_parquet(
    tmp_path: Path, row: dict[str, Any], responses: tuple[str, ...]
) -> None:
    source, output = tmp_path / "x.json", tmp_path / "o.parquet"
    source.write_text(json.dumps([row]))
    assert reduce(source, output, count=1, seed=0) == 1
    before, after = open_records(source)[0], open_records(output)[0]
    assert after.responses == before.responses == responses
    assert (after.images, after.turns) == (before.images, before.turns)


_QUESTION = {"question": "Which animal?", "options": ["cat", "dog"], "answer": "cat"}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({**_RECORD, "response": "a", "multiple_choice": [_QUESTION]}, "multiple_choice"),
        ({**_RECORD, "chosen": "a", "rejected": "b"}, "rejected"),
        ({**_RECORD, "image": ["1.jpg", "2.jpg"], "response": "a"}, "image"),
        ({"instruction": "Say hi", "response": "hi"}, "instruction"),
        ({**_RECORD, "messages": [{"role": "user", "content": "What?"}]}, "messages"),
        (
            {**_RECORD, "conversations": [{"from": "human", "value": "What?"}]},
            "conversations",
        ),
    ],
)
def test_record_writer_refuses_what_parquet_cannot_hold(
    tmp_path: Path, row: dict[str, Any], key: str
) -> None:
    (tmp_path / "x.json").write_text(json.dumps([_RECORD, row]))
    with pytest.raises(ValueError, match=rf"o\.parquet.*{key}.* to \.json or \.jsonl"):
        reduce(tmp_path / "x.json", tmp_path / "o.parquet", count=2, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_record_writer_refuses_an_invalid_record_in_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([_RECORD, {**_RECORD, "response": 7}]))
    with pytest.raises(ValueError, match=r"o\.parquet: record 1: 'response' must be a string"):
        reduce(tmp_path / "x.json", tmp_path / "o.parquet", count=2, seed=0)
