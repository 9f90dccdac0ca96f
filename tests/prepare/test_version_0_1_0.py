"""Continue runs of `llava download` and `llava clean` of version 0.1.0, in tests/fixtures/shard_0_1_0.

urls.tsv      seven URLs of a server at port 54321
finished/     a download of the first three rows, as one shard
unfinished/   a download of all rows, shard_size 3: shard 0 is finished (it is the one in finished/), shard 1 was
              killed while its third journal line was written, shard 2 is only planned
clean/        eight records; the results of the first four are in the work folder, and their images are gone
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.prepare import clean as clean_module
from llava_simplified.prepare.clean import clean
from llava_simplified.prepare.download import download
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source

FIXTURE = Path(__file__).parents[1] / "fixtures" / "shard_0_1_0"
FIXTURE_PORT = "54321"
OPTIONS = FetchOptions(allow_private=True, timeout=20, retries=0, resize=24)
KINDS = ["ok", "missing", "ok", "ok", "html", "ok", "ok"]  # what the server does at each URL


@pytest.fixture
def work(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture with the port of the running server, as the current folder.

    Both ports have five digits, so that the size of the source, which is one of the settings, stays the same.
    """
    folder = tmp_path / "fixture"
    shutil.copytree(FIXTURE, folder)
    for name in ("00000.tar", "00000.parquet"):
        shutil.copy(folder / "finished" / name, folder / "unfinished" / name)
    assert len(str(server.port)) == len(FIXTURE_PORT)
    plans = folder.glob("unfinished/_work/*.plan")
    for path in (folder / "urls.tsv", *plans):
        path.write_text(path.read_text().replace(FIXTURE_PORT, str(server.port)))
    monkeypatch.chdir(folder)
    return folder


def read_manifest(folder: str) -> list[dict[str, Any]]:
    return pq.read_table(Path(folder, "manifest.parquet")).to_pylist()


def test_read_source_reads_a_finished_shard(work: Path) -> None:
    rows = list(read_source("finished", ParseIssues(), Columns()))
    assert [row.captions for row in rows] == [("caption 0",), ("caption 2",)]
    shard = list(read_source("finished/00000.tar", ParseIssues(), Columns()))
    assert [row.image for row in shard] == ["00000.tar#000000000", "00000.tar#000000002"]
    for record in open_records(Path("finished")):
        assert min(decode_image(read_image_bytes(record.images[0], "finished")).shape[:2]) == 24


@pytest.mark.medium
def test_download_of_a_finished_shard_sends_requests_only_for_retries(
    work: Path, server: Server
) -> None:
    before = read_manifest("finished")
    download("urls.tsv", "finished", OPTIONS, shard_size=3, limit=3, workers=1)
    assert not server.served
    assert read_manifest("finished") == before
    with pytest.raises(ValueError, match="shard_size was 3"):
        download("urls.tsv", "finished", OPTIONS, shard_size=4, limit=3, workers=1)
    # The manifest keeps the URLs with the old port, on which no server listens.
    report = download(
        "urls.tsv", "finished", OPTIONS, shard_size=3, limit=3, workers=1, retry=("404",)
    )
    assert report["outcomes"] == {"ok": 2, "refused": 1}


@pytest.mark.medium
def test_download_continues_an_unfinished_work_folder(work: Path, server: Server) -> None:
    report = download("urls.tsv", "unfinished", OPTIONS, shard_size=3, workers=1)
    assert report["outcomes"] == {"ok": 5, "http_404": 1, "html": 1}
    # Only rows that no journal contains are fetched: the row of the torn line, and the last shard.
    assert server.served == {"/ok/5.jpg": 1, "/ok/6.jpg": 1}
    rows = read_manifest("unfinished")
    assert [row["error"] or "ok" for row in rows] == [loopback.EXPECTED[kind] for kind in KINDS]
    records = open_records(Path("unfinished"))
    assert [record.responses[0][-1] for record in records] == ["0", "2", "3", "5", "6"]
    for record in records:
        assert min(decode_image(read_image_bytes(record.images[0], "unfinished")).shape[:2]) == 24
    assert not list(Path("unfinished", "_work").iterdir())


@pytest.mark.medium
def test_clean_continues_an_unfinished_work_folder(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of the first chunk are gone, so its results can only come from the work folder."""
    monkeypatch.setattr(clean_module, "CHUNK_RECORDS", 4)
    monkeypatch.chdir(work / "clean")
    os.utime("records.json", (1_700_000_000, 1_700_000_000))
    rows = json.loads(Path("records.json").read_text())
    counts = clean(
        Path("records.json"),
        Path("clean.json"),
        image_folder=Path("images"),
        dedupe="exact",
        workers=1,
    )
    # Record 1 has a small image; the image of record 6 is a copy of that of record 3.
    assert counts == {"ok": 6, "too_small": 1, "duplicate": 1}
    kept = [row for index, row in enumerate(rows) if index not in (1, 6)]
    assert json.loads(Path("clean.json").read_text()) == kept
    quarantine = [
        json.loads(line) for line in Path("clean_quarantine.jsonl").read_text().splitlines()
    ]
    assert [entry["record"] for entry in quarantine] == [rows[1], rows[6]]
    assert quarantine[1]["detail"] == "of records.json row 3"
    assert not Path("clean.json.work").exists()
