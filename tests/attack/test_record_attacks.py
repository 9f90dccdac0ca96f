"""Attacks through records and predictions, in which keys are deleted, huge or of another type.

The rule: reading a row returns a record, or raises a ValueError that names the row. A command that reads such a file
ends with a message, not with a traceback.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import HUGE, OTHER_TYPES, deleted, nested, paths, replaced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import IS_COMPLETE

from llava_simplified.cli import main
from llava_simplified.data.records import Record, open_records
from llava_simplified.model.llava import Llava

MAX_SECONDS = 10.0
IMAGE = "1.jpg"

# One row of each form.
ROWS: dict[str, dict[str, Any]] = {
    "instruction": {"image": IMAGE, "instruction": "What?", "response": "a cat"},
    "responses": {"image": IMAGE, "instruction": "What?", "responses": ["a cat", "cats"]},
    "conversations": {
        "id": "1",
        "image": IMAGE,
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cat"},
        ],
    },
    "messages": {
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "a cat"},
        ],
        "images": [IMAGE],
    },
}
PREDICTION = {
    "index": 0,
    "image": IMAGE,
    "instruction": "What?",
    "gt_caption": "a cat",
    "pred_output": "a dog",
}


def mutations(row: dict[str, Any], values: list[Any]) -> Iterator[tuple[object, Any]]:
    for path in paths(row):
        yield (*path, "deleted"), deleted(row, path)
        for value in values:
            yield (*path, repr(value)[:40]), replaced(row, path, value)


def check(read: Callable[[], object], what: object) -> None:
    """Assert that reading a row follows the rule."""
    start = time.perf_counter()
    try:
        read()
    except ValueError as error:
        assert "row 0" in str(error), (what, str(error)[:300])
        assert len(str(error)) < 5000, (what, "the error repeats the row")
    assert time.perf_counter() - start < MAX_SECONDS, what


def use_record(row: Any, model: Llava) -> None:
    record = Record.from_json(row, "row 0")
    model.prompt.render(record.turns, "a cat", "row 0")


@pytest.mark.parametrize("form", ROWS)
def test_mutated_record_is_read_or_the_error_names_its_row(model: Llava, form: str) -> None:
    values = [*OTHER_TYPES, "\ud800", "<image>" * 50, "\u2028", *HUGE, nested(500)]
    for what, mutated in mutations(ROWS[form], values):
        check(lambda mutated=mutated: use_record(mutated, model), what)  # type: ignore[misc]


@pytest.mark.medium
def test_generated_record_is_read_or_the_error_names_its_row(model: Llava) -> None:
    keys = ["image", "instruction", "response", "responses", "conversations", "messages", "images"]
    keys += ["from", "value", "role", "content", "id", "video", "type", "text"]
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    leaves |= st.sampled_from([IMAGE, "<image>", "user", "assistant", "human", "gpt", "system"])
    values = st.recursive(
        leaves,
        lambda children: (
            st.lists(children, max_size=3)
            | st.dictionaries(st.sampled_from(keys), children, max_size=3)
        ),
        max_leaves=10,
    )

    @settings(
        max_examples=5000 if IS_COMPLETE else 300,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.dictionaries(st.sampled_from(keys), values, max_size=4))
    def attack(row: dict[str, Any]) -> None:
        check(lambda: use_record(row, model), row)

    attack()


FILES = {
    "empty": b"",
    "null": b"null",
    "number": b"1",
    "not closed": b'[{"image": "1.jpg"',
    "deep": b"[" * 200_000,
    "deep row": b'[{"image": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]",
    "long number": b"[" + b"9" * 100_000 + b"]",
    "not text": b"\xff\xfe\x00\x01" * 100,
    "zeros": bytes(100_000),
    "rows that are not objects": b"[1, null, [], true]",
    "lines of junk": b"{}\n{\n\n]\n",
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", FILES)
def test_file_of_another_form_is_read_or_refused_by_name(
    tmp_path: Path, name: str, suffix: str
) -> None:
    path = tmp_path / f"records.{suffix}"
    path.write_bytes(FILES[name])
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError)) as refused:
        for record in open_records(path):
            assert record
        raise ValueError(f"{path}: no records")
    assert path.name in str(refused.value)
    assert time.perf_counter() - start < MAX_SECONDS


def test_evaluate_ends_with_a_status_on_mutated_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` raises no exception, and prints neither a traceback nor a control sequence."""
    path = tmp_path / "predictions.json"
    for what, mutated in mutations(
        PREDICTION, [None, -1, "", "\x1b]0;x\x07", [None], {}, nested(500)]
    ):
        path.write_text(json.dumps([mutated, {**PREDICTION, "index": 1, "image": "2.jpg"}]))
        start = time.perf_counter()
        assert main(["evaluate", str(path), "--resamples", "0", "--no-java"]) in (0, 1, 2), what
        assert time.perf_counter() - start < MAX_SECONDS, what
        output = capsys.readouterr()
        assert "Traceback" not in output.err + output.out
        assert "\x1b]" not in output.err + output.out, "a control sequence reached the terminal"
