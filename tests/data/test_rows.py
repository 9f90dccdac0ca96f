"""Files of rows: JSON is scanned in blocks, and rows are read in any order, also after pickling."""

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
from sampling import num_examples

from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows, scan_json

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
# (ensure_ascii, indent, bytes that are read at a time)
FORMATS = st.tuples(
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from([3, 7, 64, 1 << 20]),
)


def has_surrogates(value: object) -> bool:
    """Return whether the value may be impossible to encode in UTF-8: its JSON has surrogates, single or in pairs."""
    return "\\ud" in json.dumps(value)


@pytest.mark.medium
@given(st.lists(VALUES, max_size=6), FORMATS)
@settings(max_examples=num_examples(300), deadline=None)
def test_scan_json_reads_an_array_as_json_does(values: list, json_format: tuple) -> None:
    ensure_ascii, indent, block = json_format
    text = json.dumps(values, ensure_ascii=ensure_ascii, indent=indent)
    data = text.encode("utf-8", "surrogatepass")
    items = list(scan_json(io.BytesIO(data), "x", block))
    if not has_surrogates(values):
        assert [value for _, value, _, _ in items] == values
        assert [json.loads(data[start:end]) for _, _, start, end in items] == values


@pytest.mark.medium
@given(
    st.dictionaries(st.text(max_size=4), st.lists(VALUES, max_size=3) | st.integers(), max_size=4),
    FORMATS,
)
@settings(max_examples=num_examples(200), deadline=None)
def test_scan_json_yields_the_elements_of_arrays_in_an_object(
    values: dict, json_format: tuple
) -> None:
    ensure_ascii, indent, block = json_format
    text = json.dumps(values, ensure_ascii=ensure_ascii, indent=indent)
    if has_surrogates(values):
        return
    expected = []
    for key, value in values.items():
        elements = value if isinstance(value, list) else [value]
        expected += [(key, element) for element in elements]
    items = scan_json(io.BytesIO(text.encode()), "x", block)
    assert [item[:2] for item in items] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "array or object"),
        (b"[1, 2", "byte 5"),
        (b"[1] [2]", "byte 4"),
        (b'{"a" 1}', "expected ':'"),
        (b'{"a": 2, 1: 5}', "byte 9; got 1"),
        (b'{"a": 2, [1]: 5}', "byte 9; got [1]"),
        (b'[{"a": }]', "byte 7"),
        (b"[1}", "expected ']'"),
    ],
)
def test_scan_json_error_names_the_file_and_the_byte(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match="f.json: ") as error:
        list(scan_json(io.BytesIO(text), "f.json"))
    assert message in str(error.value)


def make_row(index: int) -> dict[str, str]:
    """Return a row whose length depends on its index, with characters beyond ASCII."""
    return {
        "image": f"{index}.jpg",
        "instruction": "What?",
        "response": "é" * (index % 7) + f" {index}",
    }


ROWS = [make_row(index) for index in range(50)]


def write_rows(folder: Path, kind: str) -> Path:
    """Write ROWS as "json", "indented" (JSON too), "jsonl" or "parquet"."""
    if kind == "json":
        path = folder / "rows_json.json"
        path.write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8")
    elif kind == "indented":
        path = folder / "rows.json"
        path.write_text(json.dumps(ROWS, indent=1), "utf-8")
    elif kind == "jsonl":
        # The file has a byte order mark, CRLF, blank lines, and no line break at the end.
        path = folder / "rows_jsonl.jsonl"
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        text = text.replace("\n", "\n\r\n", 2)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    else:
        path = folder / "rows_parquet.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["json", "indented", "jsonl", "parquet"])
def test_rows_are_read_at_random_and_after_pickling(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = open_rows(write_rows(tmp_path, kind))
    assert len(rows) == 50
    assert [rows[i] for i in (49, 0, 17)] == [ROWS[i] for i in (49, 0, 17)]
    unpickled = pickle.loads(pickle.dumps(rows))
    assert list(unpickled) == ROWS
    with pytest.raises(IndexError):
        rows[50]


def test_parquet_cache_is_replaced_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_rows(tmp_path, "parquet")
    assert len(open_rows(path)) == 50
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), path)
    assert len(open_rows(path)) == 3
    cached = list((tmp_path / "cache").rglob("*.jsonl"))
    assert len(cached) == 1, "the outdated copy is deleted"


def test_parquet_cache_distinguishes_the_names_of_links_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are named by the link, `first.parquet#0`, and the folder may contain another file of that name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = {"image": {"bytes": b"x", "path": None}, "instruction": "What?", "response": "a cat"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "blob")
    for name in ("first.parquet", "second.parquet"):
        (tmp_path / name).symlink_to("blob")
        assert open_records(tmp_path / name)[0].images == (f"{name}#0",)


def test_parquet_conversion_goes_on_if_another_process_has_deleted_the_outdated_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_rows(tmp_path, "parquet")
    open_rows(path)
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), path)
    unlink = Path.unlink

    def unlink_second(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=True)  # the other process
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_second)
    assert len(open_rows(path)) == 3


def test_records_have_ids_and_slices(tmp_path: Path) -> None:
    records = open_records(write_rows(tmp_path, "jsonl"))
    assert records[3].id == "rows_jsonl.jsonl row 3"
    assert records[3].responses == ("ééé 3",)
    assert [record.images for record in records[1:3]] == [("1.jpg",), ("2.jpg",)]


def test_open_records_names_a_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    good = '{"image": "a.jpg", "instruction": "x", "response": "y"}\n'
    path.write_text(good + '{"image": "b.jpg"}\n')
    with pytest.raises(ValueError, match="train.jsonl row 1: .*'instruction'"):
        open_records(path)
    path.write_text(good + '{"image": \n')
    with pytest.raises(ValueError, match="train.jsonl row 1: not JSON"):
        open_records(path)


@pytest.mark.parametrize("name", ["gone.json", "captions.tsv"])
def test_open_records_rejects_missing_files_and_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / "captions.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match=name):
        open_records(tmp_path / name)


def test_parquet_dates_become_strings_and_binary_columns_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = {
        "image": "1.jpg",
        "instruction": "Say:",
        "response": "a cat",
        "embedding": b"1",
        "at": datetime(2026, 1, 2),
    }
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert open_rows(path)[0]["at"] == "2026-01-02 00:00:00"
    assert open_records(path)[0].images == ("1.jpg",), "the embedding is not an image"
