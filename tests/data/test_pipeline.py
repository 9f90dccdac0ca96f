"""URLs -> shards -> records -> clean records, by the commands a user types, against a server that misbehaves."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from llava_simplified.cli import main
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records


class Server(ThreadingHTTPServer):
    asked: Counter[str]
    pictures: Path


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        name = self.path.strip("/")
        if name == "html.jpg":
            return self.answer(200, b"<html>not here</html>", "image/jpeg")
        if name == "moved.jpg":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return None
        if name == "optout.jpg":
            return self.answer(200, self.picture("0.jpg"), "image/jpeg", {"X-Robots-Tag": "noai"})
        if name == "cut.jpg":
            return self.answer(200, self.picture("0.jpg")[:700], "image/jpeg")
        if (self.server.pictures / name).is_file():
            return self.answer(200, self.picture(name), "image/jpeg")
        return self.answer(404, b"", "text/plain")

    def picture(self, name: str) -> bytes:
        return (self.server.pictures / name).read_bytes()

    def answer(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(data_folder: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.pictures = Counter(), data_folder / "images"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


NAMES = ["0.jpg", "gone.jpg", "html.jpg", "moved.jpg", "optout.jpg", "cut.jpg", "1.jpg"]


def url_list(server: Server, folder: Path) -> Path:
    path = folder / "urls.tsv"
    base = f"http://127.0.0.1:{server.server_port}"
    path.write_text("".join(f"caption {i}\t{base}/{name}\n" for i, name in enumerate(NAMES)))
    return path


def test_good_pictures_are_kept_byte_exact_and_bad_ones_by_their_cause(
    server: Server, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [str(url_list(server, tmp_path)), "--output", str(out), "--allow-private", "--resize", "0"]
    assert main(["download", *words, "--workers", "1"]) == 0
    rows = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert len(rows) == len(NAMES), "every URL has a row"
    status = {row["url"].rsplit("/", 1)[1]: row["error"] or row["status"] for row in rows}
    assert status["0.jpg"] == status["1.jpg"] == "ok"
    assert [name for name in NAMES if status[name] == "ok"] == ["0.jpg", "1.jpg"]
    assert len({status[name] for name in ("gone.jpg", "html.jpg", "moved.jpg", "optout.jpg")}) == 4, status
    records = open_records(out / "records.jsonl")
    assert [record.responses for record in records] == [("caption 0",), ("caption 6",)]
    for record, name in zip(records, ("0.jpg", "1.jpg")):
        assert read_image_bytes(record.images[0], out) == (data_folder / "images" / name).read_bytes()


def test_what_is_recorded_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    words = [
        "download",
        str(url_list(server, tmp_path)),
        "--output",
        str(tmp_path / "out"),
        "--allow-private",
    ]
    main([*words, "--workers", "1"])
    before = Counter(server.asked)
    main([*words, "--workers", "1"])
    assert server.asked == before


def test_private_addresses_are_refused_unless_allowed(server: Server, tmp_path: Path) -> None:
    main(["download", str(url_list(server, tmp_path)), "--output", str(tmp_path / "out"), "--workers", "1"])
    rows = parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["error"] for row in rows} == {"blocked_address"}
    assert not server.asked


def test_odd_rows_of_a_tsv_swallow_no_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "cc.tsv"
    source.write_bytes(
        b"\xef\xbb\xbfa cat\thttp://x.org/1.jpg\r\n"
        b'a 12" pizza\thttp://x.org/2.jpg\r\n'
        b"no url here\r\n"
        b"a caf\xe9\thttp://x.org/3.jpg\r\n"
        b'"quoted"\thttp://x.org/4.jpg\r\n'
    )
    assert main(["convert", str(source), "--output", str(tmp_path / "out.json")]) == 0
    texts = [record.responses[0] for record in open_records(tmp_path / "out.json")]
    assert texts[:2] == ["a cat", 'a 12" pizza']
    assert texts[-1] == '"quoted"'
    assert "row 3" in capsys.readouterr().out + capsys.readouterr().err or len(texts) == 4


def test_captions_of_one_coco_picture_stay_together(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "one"), (8, "two"), (7, "three"))],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    main(["convert", str(tmp_path / "coco.json"), "--output", str(tmp_path / "out.json")])
    found = {record.images[0]: record.responses for record in open_records(tmp_path / "out.json")}
    assert found == {"a.jpg": ("one", "three"), "b.jpg": ("two",)}


def test_cleaning_keeps_order_and_sets_aside_with_the_reason(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    rows[1]["image"], rows[3]["response"] = "gone.jpg", " "
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["--image-folder", str(data_folder / "images"), "--vision_tower", str(models_folder / "clip")]
    out = tmp_path / "clean.json"
    main(
        [
            "clean",
            str(tmp_path / "rows.json"),
            "--output",
            str(out),
            "--min-side",
            "1",
            "--workers",
            "1",
            *words,
        ]
    )
    kept = [record.images[0] for record in open_records(out)]
    assert kept == [row["image"] for i, row in enumerate(rows) if i not in (1, 3)]
    aside = (tmp_path / "clean_quarantine.jsonl").read_text().splitlines()
    assert len(aside) == 2
    assert "gone.jpg" in aside[0]


def test_reduce_draws_a_random_sample_that_repeats(data_folder: Path, tmp_path: Path) -> None:
    def sample(seed: int) -> list[str]:
        out = tmp_path / f"{seed}.json"
        main(
            [
                "reduce",
                str(data_folder / "train.json"),
                "--count",
                "5",
                "--seed",
                str(seed),
                "--output",
                str(out),
            ]
        )
        return [record.images[0] for record in open_records(out)]

    assert sample(0) == sample(0)
    assert len(set(sample(0))) == 5
    assert sample(0) != sample(1)


def test_downloaded_pictures_decode(server: Server, tmp_path: Path) -> None:
    words = [str(url_list(server, tmp_path)), "--output", str(tmp_path / "out"), "--allow-private"]
    main(["download", *words, "--resize", "32", "--workers", "1"])
    for record in open_records(tmp_path / "out" / "records.jsonl"):
        assert min(decode_image(read_image_bytes(record.images[0], tmp_path / "out")).shape[:2]) == 32
