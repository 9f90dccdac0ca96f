"""URLs -> shards -> records -> clean records, by the commands a user types, against a server that misbehaves."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified.cli import main
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records

KINDS = ["ok", "missing", "html", "to_file", "optout", "cut", "ok"]


def url_list(server: Server, folder: Path) -> Path:
    path = folder / "urls.tsv"
    lines = (f"caption {i}\t{server.url(f'{kind}/{i}.jpg')}\n" for i, kind in enumerate(KINDS))
    path.write_text("".join(lines))
    return path


def test_good_pictures_are_kept_byte_exact_and_bad_ones_by_their_cause(
    server: Server, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        str(url_list(server, tmp_path)),
        "--output",
        str(out),
        "--allow-private",
        "--resize",
        "0",
    ]
    assert main(["download", *words, "--workers", "1"]) == 0
    rows = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert len(rows) == len(KINDS), "every URL has a row"
    causes = {row["index"]: row["error"] or row["status"] for row in rows}
    assert [causes[index] for index in range(len(KINDS))] == [
        loopback.EXPECTED[kind] for kind in KINDS
    ]
    records = open_records(out / "records.jsonl")
    assert [record.responses for record in records] == [("caption 0",), ("caption 6",)]
    for record, index in zip(records, (0, 6)):
        assert read_image_bytes(record.images[0], out) == loopback.pictures()[index]


def test_what_is_recorded_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    words = [
        "download",
        str(url_list(server, tmp_path)),
        "--output",
        str(tmp_path / "out"),
        "--allow-private",
    ]
    main([*words, "--workers", "1"])
    before = dict(server.served)
    assert before
    main([*words, "--workers", "1"])
    assert server.served == before


def test_private_addresses_are_refused_unless_allowed(server: Server, tmp_path: Path) -> None:
    main(
        [
            "download",
            str(url_list(server, tmp_path)),
            "--output",
            str(tmp_path / "out"),
            "--workers",
            "1",
        ]
    )
    rows = parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["error"] for row in rows} == {"blocked_address"}
    assert not server.served


def test_odd_rows_of_a_tsv_swallow_no_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    printed = capsys.readouterr()
    assert "row 3: 'no url here'" in printed.out + printed.err
    assert len(texts) == 4


def test_captions_of_one_coco_picture_stay_together(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": i, "caption": c} for i, c in ((7, "one"), (8, "two"), (7, "three"))
        ],
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
    words = [
        "--image-folder",
        str(data_folder / "images"),
        "--vision_tower",
        str(models_folder / "clip"),
    ]
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
        assert (
            min(decode_image(read_image_bytes(record.images[0], tmp_path / "out")).shape[:2]) == 32
        )
