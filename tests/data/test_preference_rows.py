"""Preference pairs in the forms of other programs become the same records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.data.records import Record, pair_problem
from llava_simplified.prepare.convert import convert
from llava_simplified.prompt import Message

IMAGE_PART = {"type": "image", "text": None}
USER = {"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "What?"}]}
CHOSEN = {"role": "assistant", "content": "a cat"}
REJECTED = {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}
ROWS: dict[str, dict[str, Any]] = {
    "ours": {"image": "1.jpg", "instruction": "What?", "chosen": "a cat", "rejected": "a dog"},
    "trl": {"images": ["1.jpg"], "prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
    "trl without a prompt": {
        "images": [{"bytes": None, "path": "1.jpg"}],
        "chosen": [USER, CHOSEN],
        "rejected": [USER, REJECTED],
    },
    "trl without roles": {
        "images": ["1.jpg"],
        "prompt": "<image>\nWhat?",
        "chosen": "a cat",
        "rejected": "a dog",
    },
    "question": {"image": "1.jpg", "question": "What?", "chosen": "a cat", "rejected": "a dog"},
    "messages": {"images": ["1.jpg"], "messages": [USER], "chosen": CHOSEN, "rejected": REJECTED},
    "llama factory": {
        "images": ["1.jpg"],
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
        "chosen": {"from": "gpt", "value": "a cat"},
        "rejected": {"from": "gpt", "value": "a dog"},
    },
}
EXPECTED = Record(
    ("1.jpg",), (Message("user", "<image>\nWhat?"),), ("a cat",), "x row 0", rejected="a dog"
)


@pytest.mark.parametrize("form", ROWS)
def test_every_form_becomes_the_same_record(form: str) -> None:
    record = Record.from_json(ROWS[form], "x row 0")
    assert record == EXPECTED
    assert not pair_problem(record)


def test_conversations_before_the_pair_and_pairs_of_text_are_kept() -> None:
    first = [USER, CHOSEN, {"role": "user", "content": "Sure?"}]
    row = {"images": ["1.jpg"], "prompt": first, "chosen": [CHOSEN], "rejected": [REJECTED]}
    record = Record.from_json(row, "x")
    assert [turn.role for turn in record.turns] == ["user", "assistant", "user"]
    text = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "image": None}
    assert Record.from_json(text, "x").images == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rejected": None}, "'rejected' must be a text"),
        ({"chosen": [USER]}, "role 'user'"),
        ({"chosen": [USER, CHOSEN]}, "last turn only"),
        (
            {"rejected": [{"role": "assistant", "content": [IMAGE_PART]}]},
            "an answer must be a text",
        ),
        ({"prompt": [USER, CHOSEN]}, "another answer, 'a cat'"),
        ({"images": []}, "0 image"),
    ],
)
def test_malformed_pairs_are_errors(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Record.from_json({**ROWS["trl"], **changes}, "x row 3")


@pytest.mark.parametrize(
    ("form", "changes", "named"),
    [
        ("ours", {"prompt": "Where?"}, "'prompt' and 'instruction'"),
        ("question", {"prompt": "Where?"}, "'prompt' and 'question'"),
        ("trl", {"messages": [CHOSEN]}, "'messages' and 'prompt'"),
        ("trl without a prompt", {"prompt": "Where?"}, "'Where"),
        ("trl", {"instruction": "Where?"}, "'Where"),
        ("llama factory", {"question": "Where?"}, "'Where"),
    ],
)
def test_pair_with_two_different_prompts_is_an_error(
    form: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"x row 3: .*{named}.*keep one"):
        Record.from_json({**ROWS[form], **changes}, "x row 3")


@pytest.mark.parametrize("form", ROWS)
def test_pair_may_repeat_its_prompt(form: str) -> None:
    text = ROWS[form].get("prompt", "What?")
    if not isinstance(text, str):
        text = "<image>\nWhat?"
    row = {**ROWS[form], "question": text, "instruction": text}
    assert Record.from_json(row, "x row 0") == EXPECTED
    row |= {"question": "", "prompt": ROWS[form].get("prompt")}
    assert Record.from_json(row, "x row 0") == EXPECTED


def test_a_row_with_null_columns_of_a_pair_has_no_pair() -> None:
    row = {"instruction": "What?", "response": "a cat", "chosen": None, "rejected": None}
    record = Record.from_json(row, "x")
    assert record.rejected is None
    assert "no preference pair" in pair_problem(record)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_convert_writes_pairs_and_counts_the_unusable_ones(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"images": ["1.jpg"], "prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"images": ["1.jpg"], "prompt": [USER], "chosen": [REJECTED], "rejected": [REJECTED]},
        {"images": ["1.jpg"], "prompt": [USER], "chosen": [], "rejected": [REJECTED]},
        {
            "images": [],
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "chosen": [REJECTED],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": " "}]}],
        },
        {
            "images": [],
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "chosen": [REJECTED],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}],
        },
        {"images": ["1.jpg"], "prompt": [USER], "chosen": [USER], "rejected": [REJECTED]},
    ]
    rows[0]["chosen"] = [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    source = tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]"
        source.write_text(text)
    output = tmp_path / "records.jsonl"
    _, issues = convert(str(source), output)
    assert issues.counts == {
        "pair with equal answers (skipped)": 1,
        "pair with an empty answer (skipped)": 2,
        "pair without an image (kept)": 1,
        "malformed pair (skipped)": 1,
    }
    first, second = map(json.loads, output.read_text().splitlines())
    assert Record.from_json(first, "x row 0") == EXPECTED
    assert Record.from_json(second, "x").rejected == "Ho"
    with pytest.raises(ValueError, match="preference pairs.*to .json"):
        convert(str(output), tmp_path / "records.parquet")
