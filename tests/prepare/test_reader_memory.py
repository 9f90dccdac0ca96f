"""Every reader keeps only a small part of its source in memory: reading a million rows adds less than 260 MB.

Without FUZZ=1, the tests read fewer rows, with lower limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forms import save_to_disk
from sampling import IS_COMPLETE

pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]

ROWS = 1_000_000 if IS_COMPLETE else 20_000
# More rows, because pyarrow keeps buffers of 40 to 60 MB, whose size varies.
ARROW_ROWS = 1_000_000 if IS_COMPLETE else 50_000
BATCH = 25_000
# How much memory a reader may need in addition to that of Python with this package.
MAX_BYTES = 260_000_000 if IS_COMPLETE else 8_000_000
MAX_LINE_BYTES = 260_000_000 if IS_COMPLETE else 3_000_000  # a line is forgotten after it was read
# COCO's images and captions are joined by their ids, which takes an index.
MAX_INDEX_BYTES = 260_000_000 if IS_COMPLETE else 12_000_000
MAX_ARROW_BYTES = 260_000_000 if IS_COMPLETE else 90_000_000
CAPTION = "a photograph of a small brown dog that runs over a green field"
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": CAPTION}]},
]
# A program that reads a source, and prints the number of rows and the bytes by which its peak memory has grown.
READ = """
import sys
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source
def bytes_of(name):
    # Not `ru_maxrss`, which a process inherits from the one that starts it.
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024
before = bytes_of("VmRSS:")
issues = ParseIssues()
count = sum(1 for _ in read_source(sys.argv[1], issues, Columns()))
print(count, bytes_of("VmHWM:") - before)
"""
# Simulates a folder with an image and a text file for each row, because creating the files would be slow.
READ_SIDECARS = """
from llava_simplified.prepare import sidecar_source
def walk(folder, onerror=None):
    yield str(folder), [], [f"{n:07d}.{s}" for n in range(ROWS) for s in ("jpg", "txt")]
sidecar_source.os.walk = walk
sidecar_source._read_captions = lambda *_: ("a caption",)
"""
# Simulates an imagefolder in which every second image has a row of metadata.
READ_IMAGE_FOLDER = """
from llava_simplified.prepare import sidecar_source
def walk(folder, onerror=None):
    yield str(folder), [], ["metadata.jsonl", *(f"{n}.jpg" for n in range(2 * ROWS))]
sidecar_source.os.walk = walk
"""
# Simulates a tar with an image and a text for each row.
READ_TAR = """
from llava_simplified.data import shards
from llava_simplified.prepare import archive_source
def members(path):
    for n in range(ROWS):
        yield shards.TarMember(f"folder/{n:09d}.jpg", 2048 * n + 512, 100)
        yield shards.TarMember(f"folder/{n:09d}.txt", 2048 * n + 1536, 100)
shards.tar_members = members
archive_source.read_range = lambda *_: b"a caption"
"""


def write_lines(path: Path, line: Callable[[int], str]) -> Path:
    with path.open("w") as file:
        file.writelines(line(number) for number in range(ROWS))
    return path


def tables(image: pa.Array) -> Iterator[pa.Table]:
    """Yield tables of `BATCH` rows, `ARROW_ROWS` rows in total, each with the given column of images."""
    for start in range(0, ARROW_ROWS, BATCH):
        texts = [f"{CAPTION} {number}" for number in range(start, start + BATCH)]
        yield pa.table({"image": image, "text": texts})


def embedded() -> pa.Array:
    return pa.array([{"bytes": b"x" * 100, "path": None}] * BATCH)


def write_tsv(folder: Path) -> Path:
    return write_lines(folder / "x.tsv", lambda n: f"{CAPTION}\thttp://a.example/{n}.jpg\n")


def write_json(folder: Path) -> Path:
    row = json.dumps({"image": "NUMBER.jpg", "caption": CAPTION})
    path = folder / "x.json"
    with path.open("w") as file:
        file.write("[")
        file.writelines(f"{row},\n".replace("NUMBER", str(number)) for number in range(ROWS - 1))
        file.write(f"{row}]")
    return path


def write_chats(folder: Path) -> Path:
    row = json.dumps({"images": ["NUMBER.jpg"], "messages": TURNS})
    return write_lines(folder / "x.jsonl", lambda n: f"{row}\n".replace("NUMBER", str(n)))


def write_csv(folder: Path) -> Path:
    path = write_lines(folder / "x.csv", lambda n: f'{n}.jpg,"{CAPTION}"\n')
    path.write_text("image,caption\n" + path.read_text())
    return path


def write_array(path: Path, head: str, row: Callable[[int], str], end: str) -> Path:
    """Write a JSON file with one row of an array per line."""
    with path.open("w") as file:
        file.write(head + row(0))
        file.writelines(f",\n{row(number)}" for number in range(1, ROWS))
        file.write(end)
    return path


def write_conversations(folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": CAPTION}]
    row = json.dumps({"id": "NUMBER", "image": "NUMBER.jpg", "conversations": turns})
    return write_array(folder / "x.json", "[", lambda n: row.replace("NUMBER", str(n)), "]")


def write_karpathy(folder: Path) -> Path:
    sentences = [{"tokens": CAPTION.split(), "raw": CAPTION}]
    row = json.dumps({"filename": "NUMBER.jpg", "split": "train", "sentences": sentences})
    return write_array(
        folder / "x.json", '{"images": [', lambda n: row.replace("NUMBER", str(n)), "]}"
    )


def write_captions_by_name(folder: Path) -> Path:
    return write_array(folder / "x.json", "{", lambda n: f'"{n}.jpg": "{CAPTION}"', "}")


def write_coco(folder: Path, order: str = "images annotations") -> Path:
    """Write COCO's two arrays, the images and the annotations."""
    name = '"COCO_train2014_NUMBER.jpg", "coco_url": "http://a.example/train2014/NUMBER.jpg"'
    rows = {
        "images": f'{{"id": NUMBER, "file_name": {name}}}',
        "annotations": f'{{"image_id": NUMBER, "id": NUMBER, "caption": "{CAPTION}"}}',
    }
    return write_arrays(folder, {key: rows[key] for key in order.split()})


def write_coco_annotations_first(folder: Path) -> Path:
    return write_coco(folder, "annotations images")


def write_sbu(folder: Path) -> Path:
    url = '"http://static.flickr.example/2723/NUMBER_b86780b5e4.jpg"'
    return write_arrays(folder, {"image_urls": url, "captions": f'"{CAPTION} NUMBER"'})


def write_arrays(folder: Path, rows: dict[str, str]) -> Path:
    """Write a JSON object of arrays: key -> JSON of one element, in which NUMBER stands for its index."""
    path = folder / "x.json"
    with path.open("w") as file:
        file.write("{")
        for position, (key, row) in enumerate(rows.items()):
            file.write(f'{"," if position else ""}"{key}": [')
            file.writelines(f"{row},\n".replace("NUMBER", str(n)) for n in range(ROWS - 1))
            file.write(row.replace("NUMBER", str(ROWS - 1)) + "]")
        file.write("}")
    return path


def write_parquet(folder: Path, image: pa.Array | None = None) -> Path:
    path = folder / "x.parquet"
    parts = list(tables(embedded() if image is None else image))
    with pq.ParquetWriter(path, parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)
    return path


def write_parquet_partly_by_path(folder: Path) -> Path:
    """Write a Parquet file in which some images are not embedded, so that the bytes of each row must be checked."""
    values = embedded().to_pylist()[:-1]
    return write_parquet(folder, pa.array([*values, {"bytes": None, "path": "1.jpg"}]))


def write_dataset(folder: Path) -> Path:
    image = embedded()
    # Write a single table, because `datasets` writes few files with many batches.
    save_to_disk(folder / "saved", [pa.concat_tables(tables(image))], rows_per_batch=1000)
    return folder / "saved"


@pytest.mark.parametrize("write", [write_tsv, write_csv, write_chats])
def test_lines_are_read_in_little_memory(write: Callable[[Path], Path], tmp_path: Path) -> None:
    check_memory(READ, write(tmp_path), ROWS, MAX_LINE_BYTES)


@pytest.mark.parametrize(
    "write",
    [
        *(write_json, write_conversations, write_karpathy, write_captions_by_name, write_sbu),
    ],
)
def test_rows_are_read_in_little_memory(write: Callable[[Path], Path], tmp_path: Path) -> None:
    check_memory(READ, write(tmp_path), ROWS, MAX_BYTES)


@pytest.mark.parametrize("write", [write_coco, write_coco_annotations_first])
def test_rows_of_coco_are_read_in_little_memory(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    check_memory(READ, write(tmp_path), ROWS, MAX_INDEX_BYTES)


@pytest.mark.parametrize("write", [write_parquet, write_parquet_partly_by_path, write_dataset])
def test_rows_of_arrow_are_read_in_little_memory(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    check_memory(READ, write(tmp_path), ARROW_ROWS, MAX_ARROW_BYTES)


def test_sidecars_are_read_in_little_memory(tmp_path: Path) -> None:
    check_memory(f"ROWS = {ROWS}\n{READ_SIDECARS}{READ}", tmp_path, ROWS, MAX_BYTES)


def test_image_folder_is_read_in_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "NUMBER.jpg", "text": CAPTION})
    write_lines(tmp_path / "metadata.jsonl", lambda n: f"{row}\n".replace("NUMBER", str(2 * n)))
    check_memory(f"ROWS = {ROWS}\n{READ_IMAGE_FOLDER}{READ}", tmp_path, ROWS, MAX_BYTES)


def test_tar_is_read_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    check_memory(f"ROWS = {ROWS}\n{READ_TAR}{READ}", tmp_path / "x.tar", ROWS, MAX_BYTES)


def check_memory(code: str, source: Path, expected_rows: int, max_bytes: int) -> None:
    """Read a source in a new process; check the number of its rows, and the growth of the peak memory."""
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, growth = map(int, done.stdout.split())
    print(f"{rows:,} rows of {source.name}: {growth / 1e6:.0f} MB")
    assert rows == expected_rows
    assert growth < max_bytes, f"{growth / 1e6:.0f} MB"
