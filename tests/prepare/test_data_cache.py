"""When a source of `--data` is converted again. The forms of sources are tested in `test_data_option`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from llava_simplified.data.records import open_records
from llava_simplified.prepare.data_cache import prepare_data


@pytest.fixture(autouse=True)
def use_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_prepare_data_reads_changed_captions_in_folders_of_a_pattern(tmp_path: Path) -> None:
    """Writing to a file does not change the time of its folder."""
    for album in ("1", "2"):
        folder = tmp_path / "albums" / album
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        (folder / "a.txt").write_text("an old caption")
    pattern = str(tmp_path / "albums" / "*")
    first = prepare_data(pattern)
    assert prepare_data(pattern) == first
    (tmp_path / "albums" / "1" / "a.txt").write_text("a new one")
    records = open_records(prepare_data(pattern).records)
    assert [record.responses for record in records] == [("a new one",), ("an old caption",)]


class SignedRedirect(BaseHTTPRequestHandler):
    """Redirects /x.jsonl to a file with another signature for each request."""

    body = json.dumps({"image": "a.jpg", "caption": "a cat"}).encode()
    num_requests = 0

    def do_GET(self) -> None:
        cls = type(self)
        if self.path == "/x.jsonl":
            cls.num_requests += 1
            self.send_response(302)
            self.send_header("Location", f"/file?signature={cls.num_requests}")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", '"version-1"')
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(name="address")
def redirecting_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SignedRedirect) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_prepare_data_copies_a_file_once_whatever_address_its_url_redirects_to(
    address: str,
) -> None:
    first = prepare_data(f"{address}/x.jsonl")
    assert prepare_data(f"{address}/x.jsonl") == first
    assert SignedRedirect.num_requests > 1
