"""Every reader holds a small part of its source in memory.

200,000 rows are read in less than 150 MB, and a million, with FUZZ=1, in less than 300 MB.
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
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]

ROWS = 1_000_000 if IS_COMPLETE else 200_000
BATCH = 50_000
MAX_BYTES = 300_000_000 if IS_COMPLETE else 150_000_000
CAPTION = "a photograph of a small brown dog that runs over a green field"
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": CAPTION}]},
]
# Reads a source in a process of its own, and prints the number of rows and the peak of its memory.
READ = """
import sys
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source
issues = ParseIssues()
count = sum(1 for _ in read_source(sys.argv[1], issues, Columns()))
# Not `ru_maxrss`, which a process inherits from the one that starts it.
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM"))
print(count, int(peak.split()[1]) * 1024)
"""
# A directory of an image and a text file for each row, without the time that it takes to create them.
READ_SIDECARS = """
import os
from llava_simplified.prepare import sidecar_source
def walk(folder, onerror=None):
    yield str(folder), [], [f"{n:07d}.{s}" for n in range(ROWS) for s in ("jpg", "txt")]
sidecar_source.os.walk = walk
sidecar_source._read_captions = lambda *_: ("a caption",)
"""


def write_lines(path: Path, line: Callable[[int], str]) -> Path:
    with path.open("w") as file:
        file.writelines(line(number) for number in range(ROWS))
    return path


def tables(image: pa.Array) -> Iterator[pa.Table]:
    """Yield tables of `ROWS` rows in all, with the images given for each."""
    for start in range(0, ROWS, BATCH):
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


def write_parquet(folder: Path, image: pa.Array | None = None) -> Path:
    path = folder / "x.parquet"
    parts = list(tables(embedded() if image is None else image))
    with pq.ParquetWriter(path, parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)
    return path


def write_parquet_by_path(folder: Path) -> Path:
    """Not all images are embedded, so that the bytes must be looked at."""
    values = embedded().to_pylist()[:-1]
    return write_parquet(folder, pa.array([*values, {"bytes": None, "path": "1.jpg"}]))


def write_dataset(folder: Path) -> Path:
    image = embedded()
    # One table of all, as `datasets` writes few files with many batches.
    save_to_disk(folder / "saved", [pa.concat_tables(tables(image))], rows_per_batch=1000)
    return folder / "saved"


@pytest.mark.parametrize(
    "write",
    [write_tsv, write_json, write_chats, write_parquet, write_parquet_by_path, write_dataset],
)
def test_rows_are_read_in_little_memory(write: Callable[[Path], Path], tmp_path: Path) -> None:
    rows, peak = measure(READ, write(tmp_path))
    assert rows == ROWS
    assert peak < MAX_BYTES, f"{peak / 1e6:.0f} MB"


def test_sidecars_are_read_in_little_memory(tmp_path: Path) -> None:
    rows, peak = measure(f"ROWS = {ROWS}\n{READ_SIDECARS}{READ}", tmp_path)
    assert rows == ROWS
    assert peak < MAX_BYTES, f"{peak / 1e6:.0f} MB"


def measure(code: str, source: Path) -> tuple[int, int]:
    """Return the number of rows of a source, and the peak memory of the process that reads them."""
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, peak = map(int, done.stdout.split())
    print(f"{source.name}: {peak / 1e6:.0f} MB")
    return rows, peak
