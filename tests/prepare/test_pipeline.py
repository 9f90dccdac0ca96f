"""From URLs to clean records, with the commands that a user types, against a faulty server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified.cli import main
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records

KINDS = ["ok", "missing", "html", "to_file", "optout", "cut", "ok"]  # what the server does


def write_urls(server: Server, folder: Path) -> Path:
    path = folder / "urls.tsv"
    urls = [server.url(f"{kind}/{index}.jpg") for index, kind in enumerate(KINDS)]
    path.write_text("".join(f"caption {index}\t{url}\n" for index, url in enumerate(urls)))
    return path


def download(server: Server, folder: Path, *more: str) -> int:
    """Run `llava download` into `folder / "out"`."""
    source = write_urls(server, folder)
    return main(["download", str(source), "--output", str(folder / "out"), "--workers", "1", *more])


@pytest.mark.medium
def test_download_keeps_good_images_and_names_the_cause_of_the_others(
    server: Server, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert download(server, tmp_path, "--allow-private", "--resize", "0") == 0
    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    assert len(rows) == len(KINDS), "every URL has a row"
    causes = {row["index"]: row["error"] or row["status"] for row in rows}
    expected = [loopback.EXPECTED[kind] for kind in KINDS]
    assert [causes[index] for index in range(len(KINDS))] == expected
    records = open_records(output / "records.jsonl")
    assert [record.responses for record in records] == [("caption 0",), ("caption 6",)]
    for record, index in zip(records, (0, 6)):
        assert read_image_bytes(record.images[0], output) == loopback.images()[index]


@pytest.mark.medium
def test_download_again_fetches_nothing(server: Server, tmp_path: Path) -> None:
    download(server, tmp_path, "--allow-private")
    before = dict(server.served)
    assert before
    download(server, tmp_path, "--allow-private")
    assert server.served == before


@pytest.mark.medium
def test_download_refuses_private_addresses_by_default(server: Server, tmp_path: Path) -> None:
    download(server, tmp_path)
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["error"] for row in rows} == {"blocked_address"}
    assert not server.served


@pytest.mark.medium
def test_download_with_resize_stores_images_that_can_be_decoded(
    server: Server, tmp_path: Path
) -> None:
    download(server, tmp_path, "--allow-private", "--resize", "32")
    for record in open_records(tmp_path / "out" / "records.jsonl"):
        pixels = decode_image(read_image_bytes(record.images[0], tmp_path / "out"))
        assert min(pixels.shape[:2]) == 32


def test_convert_reads_the_rows_around_unusual_ones(
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


def test_convert_keeps_the_captions_of_one_coco_image_together(tmp_path: Path) -> None:
    captions = [(7, "one"), (8, "two"), (7, "three")]
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"image_id": image, "caption": caption} for image, caption in captions],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    main(["convert", str(tmp_path / "coco.json"), "--output", str(tmp_path / "out.json")])
    found = {record.images[0]: record.responses for record in open_records(tmp_path / "out.json")}
    assert found == {"a.jpg": ("one", "three"), "b.jpg": ("two",)}


@pytest.mark.medium
def test_clean_keeps_the_order_and_sets_bad_records_aside(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    rows[1]["image"] = "gone.jpg"
    rows[3]["response"] = " "
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = tmp_path / "clean.json"
    argv = ["clean", str(tmp_path / "rows.json"), "--output", str(output)]
    argv += ["--image-folder", str(data_folder / "images"), "--min-side", "1"]
    argv += ["--vision_tower", str(models_folder / "clip"), "--workers", "1"]
    main(argv)
    kept = [record.images[0] for record in open_records(output)]
    assert kept == [row["image"] for index, row in enumerate(rows) if index not in (1, 3)]
    quarantine = (tmp_path / "clean_quarantine.jsonl").read_text().splitlines()
    assert len(quarantine) == 2
    assert "gone.jpg" in quarantine[0]


def test_reduce_draws_the_same_random_sample_for_the_same_seed(
    data_folder: Path, tmp_path: Path
) -> None:
    def draw(seed: int) -> list[str]:
        output = tmp_path / f"{seed}.json"
        argv = ["reduce", str(data_folder / "train.json"), "--count", "5"]
        main([*argv, "--seed", str(seed), "--output", str(output)])
        return [record.images[0] for record in open_records(output)]

    assert draw(0) == draw(0)
    assert len(set(draw(0))) == 5
    assert draw(0) != draw(1)


def test_commands_name_the_extra_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tsv").write_text("a\thttp://a/1.jpg\n")
    for command, module in (("download", "aiohttp"), ("clean", "pyarrow")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            argv = [command, str(tmp_path / "x.tsv"), "--output", str(tmp_path / "out.json")]
            assert main(argv) == 2
        error = capsys.readouterr().err
        assert module in error
        assert "[download]" in error


@pytest.mark.medium
def test_convert_works_without_the_extra(tmp_path: Path) -> None:
    """Converting local text files needs no optional dependency."""
    (tmp_path / "x.tsv").write_text("a\thttp://a/1.jpg\n")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['aiohttp', 'fsspec', 'pyarrow'])); "
        "from llava_simplified.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = ["convert", str(tmp_path / "x.tsv"), "--output", str(tmp_path / "out.json")]
    subprocess.run([sys.executable, "-c", code, *argv], check=True)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 1
