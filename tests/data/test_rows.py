"""Files of rows: JSON walked in blocks, read at random, from processes."""

from __future__ import annotations

import io
import json
import pickle
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows, scan_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
FORMS = st.tuples(st.booleans(), st.sampled_from([None, 1]), st.sampled_from([3, 7, 64, 1 << 20]))


@given(st.lists(VALUES, max_size=6), FORMS)
@settings(max_examples=300, deadline=None)
def test_an_array_is_walked_as_json_reads_it(values: list, form: tuple) -> None:
    ascii_only, indent, block = form
    data = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode(
        "utf-8", "surrogatepass"
    )
    walked = list(scan_json(io.BytesIO(data), "x", block))
    if "\\ud" not in json.dumps(values):  # lone surrogates are no UTF-8
        assert [value for _, value, _, _ in walked] == values
        assert [json.loads(data[start:end]) for _, _, start, end in walked] == values


@given(
    st.dictionaries(st.text(max_size=4), st.lists(VALUES, max_size=3) | st.integers(), max_size=4),
    FORMS,
)
@settings(max_examples=200, deadline=None)
def test_an_object_gives_the_elements_of_its_arrays(values: dict, form: tuple) -> None:
    ascii_only, indent, block = form
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    if "\\ud" in json.dumps(values):
        return
    expected = [(k, e) for k, v in values.items() for e in (v if isinstance(v, list) else [v])]
    assert [item[:2] for item in scan_json(io.BytesIO(text.encode()), "x", block)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "neither a JSON array nor an object"),
        (b"[1, 2", "byte 5"),
        (b"[1] [2]", "more text after the JSON's end, at byte 4"),
        (b'{"a" 1}', "':' expected"),
        (b'[{"a": }]', "byte 7"),
        (b"[1}", "']' expected"),
    ],
)
def test_broken_json_is_named_by_its_byte(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match="f.json: ") as error:
        list(scan_json(io.BytesIO(text), "f.json"))
    assert message in str(error.value)


ROWS = [
    {"image": f"{i}.jpg", "instruction": "What?", "response": "é" * (i % 7) + f" {i}"}
    for i in range(50)
]


def write(folder: Path, kind: str) -> Path:
    path = (
        folder
        / f"rows{'' if kind == 'indented' else '_' + kind}.{'json' if kind == 'indented' else kind}"
    )
    if kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8")
    elif kind == "indented":
        path.write_text(json.dumps(ROWS, indent=1), "utf-8")
    elif kind == "jsonl":  # with a byte order mark, CRLF, blank lines and no last line end
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\n\r\n", 2).encode())
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["json", "indented", "jsonl", "parquet"])
def test_rows_are_read_at_random_and_after_pickling(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = open_rows(write(tmp_path, kind))
    assert len(rows) == 50
    assert [rows[i] for i in (49, 0, 17)] == [ROWS[i] for i in (49, 0, 17)]
    again = pickle.loads(pickle.dumps(rows))
    assert list(again) == ROWS
    with pytest.raises(IndexError):
        rows[50]


def test_a_changed_parquet_file_is_not_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, "parquet")
    assert len(open_rows(path)) == 50
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), path)
    assert len(open_rows(path)) == 3
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1, "the outdated copy is gone"


def test_records_know_their_row_and_slices(tmp_path: Path) -> None:
    records = open_records(write(tmp_path, "jsonl"))
    assert records[3].id == "rows_jsonl.jsonl row 3"
    assert records[3].responses == ("ééé 3",)
    assert [record.images for record in records[1:3]] == [("1.jpg",), ("2.jpg",)]


def test_a_wrong_row_is_named_when_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"image": "a.jpg", "instruction": "x", "response": "y"}\n{"image": "b.jpg"}\n')
    with pytest.raises(ValueError, match="train.jsonl row 1: no 'instruction'"):
        open_records(path)
    path.write_text('{"image": "a.jpg", "instruction": "x", "response": "y"}\n{"image": \n')
    with pytest.raises(ValueError, match="train.jsonl row 1: not JSON"):
        open_records(path)


@pytest.mark.parametrize("name", ["gone.json", "captions.tsv"])
def test_what_is_no_file_of_records_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "captions.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match=name):
        open_records(tmp_path / name)


def test_dates_of_a_parquet_file_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = {
        "image": "1.jpg",
        "instruction": "Say:",
        "response": "a cat",
        "embedding": b"1",
        "at": datetime(2026, 1, 2),
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert open_rows(tmp_path / "x.parquet")[0]["at"] == "2026-01-02 00:00:00"
    assert open_records(tmp_path / "x.parquet")[0].images == ("1.jpg",), (
        "no picture out of the embedding"
    )
